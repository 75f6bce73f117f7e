//! What every other room leans on, and a reader can take on trust.

pub(crate) mod dial;
pub(crate) mod failure;
pub(crate) mod http;
pub(crate) mod log;
pub(crate) mod metrics;
pub(crate) mod random;
pub(crate) mod socket;
pub(crate) mod sound;
pub(crate) mod text;
pub(crate) mod threads;
pub(crate) mod time;
