//! What n8n has answered in one call, so that asking twice does not book twice.
//!
//! A question is known again by its fingerprint, a hash of all that is in it. Whoever gets hold of
//! its [`Slot`] first asks n8n and leaves the answer there; a repeat waits for that at the same
//! slot. Kept in memory only: a process that takes the call up later asks anew, and n8n tells by
//! the `Idempotency-Key` that it knows the question.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use data_encoding::HEXLOWER;
use ring::digest;

use crate::toolbox::threads::lock;

/// Different n8n tool invocations remembered in one call, so that none is done twice. The next
/// is refused in words.
const TOOL_ANSWERS_MAX: usize = 100;

/// The answer, once there is one.
pub(crate) type Slot = Arc<Mutex<Option<String>>>;

#[derive(Default)]
pub(crate) struct Answered(Mutex<HashMap<String, Slot>>);

impl Answered {
    /// With the beginning of its fingerprint, in hexadecimal. None: too many different questions.
    pub(crate) fn slot(&self, question: &str) -> Option<(String, Slot)> {
        let mut fingerprint =
            HEXLOWER.encode(digest::digest(&digest::SHA256, question.as_bytes()).as_ref());
        let mut slots = lock(&self.0);
        if slots.len() >= TOOL_ANSWERS_MAX && !slots.contains_key(&fingerprint) {
            return None;
        }
        let slot = Arc::clone(slots.entry(fingerprint.clone()).or_default());
        fingerprint.truncate(16);
        Some((fingerprint, slot))
    }
}
