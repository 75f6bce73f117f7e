//! What goes on around a call, so that the story can go straight on.
//!
//! `answer` puts into words what the story answers, and `placeholders` what an agent's text has in
//! braces. `resume` is a call that goes on after a break, or is asked about twice; `ready` sees to
//! it that the next one is served at once, `webhook` lets in what Twilio has signed, and `shutdown`
//! is how the process ends without cutting anybody off. Whom a caller is to hear next is decided by
//! the steps in main.rs, and by `resume` where a call goes on.

mod answer;
pub(crate) mod placeholders;
pub(crate) mod ready;
pub(crate) mod resume;
pub(crate) mod shutdown;
pub(crate) mod webhook;
