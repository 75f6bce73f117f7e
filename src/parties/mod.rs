//! The three parties on the other side: what goes over the wire to and from each.
//!
//! `twilio` brings the call and its sound, `ultravox` is where the agent lives, and `n8n` is the
//! owner's business logic. Each room turns what its party sends into values, and values into what
//! it is sent, for the story in `main.rs`.
//!
//! [`standing`] keeps how each of them was when it was last met, for the page.
//!
//! None of them knows of a call, or of one another, or decides what a failure means for a caller.

pub(crate) mod n8n;
pub(crate) mod standing;
pub(crate) mod twilio;
pub(crate) mod ultravox;
