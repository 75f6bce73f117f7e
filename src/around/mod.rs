//! What goes on around a call.

pub(crate) mod lines;
pub(crate) mod mend;
pub(crate) mod ready;
pub(crate) mod shutdown;
