//! The three parties on the other side: what goes over the wire to and from each.
//!
//! `twilio` brings the caller, `ultravox` is the agent, `n8n` the owner's business logic. Each room
//! reads what its party sends into types, writes what the party takes, and says in a
//! `toolbox::failure::Failure` what went wrong and what to do about it. What any of it means for a
//! call is decided in main.rs.

pub(crate) mod n8n;
pub(crate) mod twilio;
pub(crate) mod ultravox;
