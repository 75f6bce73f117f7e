//! What the tests do to the sound, to see that the benchmark notices.
//!
//! The shipped program does not contain this file.

use crate::demo::bench::Plan;
use crate::demo::bench::hall::Way;
use crate::demo::bench::stamp::Stamp;
use crate::demo::sound::FRAME_BYTES;

/// A fault comes once in so many frames.
const FAULT_EVERY: u32 = 50;

/// Done to every fiftieth frame of each caller, after it was counted as sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// One sample is changed.
    Damage,
    /// It is not sent.
    Lose,
    /// It is sent after the one that follows it.
    Swap,
}

impl Plan {
    /// The sound that is sent in the place of this frame, if any.
    pub(super) fn spoil(&self, way: Way, mut stamp: Stamp) -> Option<[u8; FRAME_BYTES]> {
        let number = stamp.sequence;
        let phase = number % FAULT_EVERY;
        let fault = self.fault.filter(|_| way == Way::Up && number >= FAULT_EVERY);
        if fault == Some(Fault::Swap) && phase < 2 {
            stamp.sequence ^= 1;
        }
        let mut mulaw = stamp.sound();
        match fault {
            Some(Fault::Lose) if phase == 0 => return None,
            Some(Fault::Damage) if phase == 0 => mulaw[FRAME_BYTES / 2] ^= 0x10,
            _ => {}
        }
        Some(mulaw)
    }
}
