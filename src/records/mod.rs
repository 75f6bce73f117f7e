//! What is kept of a call.

pub(crate) mod journal;
pub(crate) mod outbox;
pub(crate) mod past;
pub(crate) mod tap;
pub(crate) mod transcript;
