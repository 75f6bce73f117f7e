//! What the owner sees and orders.

pub(crate) mod access;
pub(crate) mod calls;
pub(crate) mod metrics;
pub(crate) mod outgoing;
pub(crate) mod page;
pub(crate) mod phone;
