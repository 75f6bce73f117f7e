//! The three parties on the other side: what goes over the wire to and from each.

pub(crate) mod n8n;
pub(crate) mod twilio;
pub(crate) mod ultravox;
