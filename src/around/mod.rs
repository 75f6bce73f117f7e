//! What goes on around a call, so that the story can go straight on.
//!
//! `mend` is a call that goes on after a break, `placeholders` fills in the agent's texts for one
//! call, `ready` sees to it that the next one is served at once, and `shutdown` is how the process
//! ends without cutting anybody off. They decide nothing that a caller would hear; the steps in
//! main.rs do.

pub(crate) mod mend;
pub(crate) mod placeholders;
pub(crate) mod ready;
pub(crate) mod shutdown;
