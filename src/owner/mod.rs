//! What the owner sees and orders: the lines and who is on them, the page, the calls that go out.
//!
//! Each endpoint has a file; `access` stands before all of them and knows who the owner is. What
//! is shown comes from the calls in progress (`lines`) and from the journals. Nothing here takes
//! part in a call, except that the page's phone begins one, as Twilio does.

pub(crate) mod access;
pub(crate) mod calls;
pub(crate) mod lines;
pub(crate) mod metrics;
pub(crate) mod outgoing;
pub(crate) mod page;
pub(crate) mod phone;
