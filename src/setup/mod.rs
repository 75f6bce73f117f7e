//! What the owner has set, and who answers the phone.
//!
//! `settings` and `agent` are read at the start, once and completely: all complaints come together,
//! and nobody behind them has to doubt a value. A command that cannot begin gives back a
//! `stop::Stop`. Nothing here talks to anybody outside. Only the agent may be another one later,
//! for the calls that begin then (`agent_in_force`).

pub(crate) mod agent;
mod agent_files;
pub(crate) mod agent_in_force;
mod agent_links;
mod dot_env;
pub(crate) mod settings;
pub(crate) mod start_lines;
pub(crate) mod stop;
pub(crate) mod values;
