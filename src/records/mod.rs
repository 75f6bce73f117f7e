//! What is kept of a call: what was said, what happened, and how both survive.
//!
//! * [`event`]: everything that can stand in a journal, and [`ended_by`], how a call ends.
//! * [`transcript`]: what was said, put together from the pieces in which it arrives.
//! * [`journal`]: a call's file on disk, one event a line; [`writer`] is the thread that writes.
//! * [`past`]: journals read back, by the process that comes after, and by the live page.
//! * [`delivery`] and [`outbox`]: what n8n is still to get, and when it is offered the next time.
//! * [`report`]: what is told of a call beside its transcript.
//! * [`tap`]: what goes over the wire, and [`tally`], what went wrong: for the live page.
//!
//! Nothing here knows a call in progress, a socket, or n8n: calls hand their events down, and the
//! outbox is told how to deliver by whoever starts it. Nothing here ends a call either. When the
//! disk fails, calls go on.

pub(crate) mod delivery;
pub(crate) mod ended_by;
pub(crate) mod event;
pub(crate) mod index;
pub(crate) mod journal;
pub(crate) mod outbox;
pub(crate) mod past;
pub(crate) mod report;
pub(crate) mod tally;
pub(crate) mod tap;
pub(crate) mod transcript;
pub(crate) mod writer;
