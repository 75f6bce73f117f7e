//! What the owner has set, and who answers the phone.
//!
//! `settings` and `agent` are read at the start, once and completely: all complaints come together,
//! and nobody behind them has to doubt a value. A command that cannot begin gives back a
//! `stop::Stop`. Nothing here talks to anybody outside, and nothing changes while a call lasts.

pub(crate) mod agent;
mod agent_files;
mod dot_env;
pub(crate) mod settings;
pub(crate) mod start_lines;
pub(crate) mod stop;
pub(crate) mod values;
