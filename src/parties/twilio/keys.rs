//! Keys that the caller presses, gathered until a pause: the agent is to read a number, not digits.
//!
//! Twilio sends one `dtmf` message for each key. Thread T puts them in with [`Keys::press`] and
//! asks with every frame whether there has been a pause: the caller's sound is the only clock. What
//! is no key of a telephone's is left out. What the agent is told is decided in step 6.

use std::time::{Duration, Instant};

/// A pause this long after a key ends a number being keyed in.
const PAUSE: Duration = Duration::from_secs(1);
/// Keys kept until the pause. More are given out in portions.
const KEYS_MAX: usize = 32;

#[derive(Default)]
pub(crate) struct Keys {
    pressed: String,
    last: Option<Instant>,
}

impl Keys {
    /// What was gathered before, if this one would be too many.
    pub(crate) fn press(&mut self, digit: &str) -> Option<String> {
        let portion = if self.pressed.len() + digit.len() > KEYS_MAX { self.take() } else { None };
        let keys = digit.chars().take(KEYS_MAX);
        self.pressed.extend(keys.filter(|key| key.is_ascii_digit() || "*#".contains(*key)));
        self.last = Some(Instant::now());
        portion
    }

    /// All that was keyed in, once there has been a pause.
    pub(crate) fn after_pause(&mut self) -> Option<String> {
        if self.last?.elapsed() < PAUSE {
            return None;
        }
        self.take()
    }

    fn take(&mut self) -> Option<String> {
        self.last = None;
        Some(std::mem::take(&mut self.pressed)).filter(|pressed| !pressed.is_empty())
    }
}

#[cfg(test)]
mod tests;
