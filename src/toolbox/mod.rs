//! What every other room leans on, and a reader can take on trust.
//!
//! Sockets, sound, HTTP, threads, the log and what is counted: each would be the same in a program
//! that answers no telephone. Nothing here knows a call, a setting or what a party wants.

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
pub(crate) mod waiting;
