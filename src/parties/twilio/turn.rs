//! Whose turn it is to speak, and how long the caller waits for an answer.
//!
//! A [`Turn`] is told when the caller and the agent are loud, and when the agent gives up a
//! sentence. An answer is measured from the caller's last loud frame to the agent's next loud one:
//! that is what the caller notices. What is said into the agent's sentence counts for nothing, such
//! as an "mm-hm", unless the agent stops for it; and the greeting answers nobody.

use std::time::{Duration, Instant};

/// The agent's sound after a longer silence is no answer: it speaks up by itself.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// The agent stops for what the caller has said within this time.
const STOPS_WITHIN: Duration = Duration::from_secs(2);

#[derive(Default)]
pub(super) struct Turn {
    caller_loud_at: Option<Instant>,
    /// The same, while the agent owes an answer to it.
    waits_since: Option<Instant>,
    has_greeted: bool,
    /// When the caller will have heard the agent out.
    agent_until: Option<Instant>,
}

impl Turn {
    pub(super) fn caller_is_loud(&mut self, at: Instant) {
        self.caller_loud_at = Some(at);
        if self.agent_until.is_none_or(|until| until <= at) {
            self.waits_since = Some(at);
        }
    }

    /// How long the caller has waited, if this begins an answer.
    pub(super) fn agent_is_loud(&mut self, at: Instant, until: Instant) -> Option<Duration> {
        self.agent_until = Some(until);
        let is_greeting = !std::mem::replace(&mut self.has_greeted, true);
        let waited = at.saturating_duration_since(self.waits_since.take()?);
        (waited <= ANSWER_MAX && !is_greeting).then_some(waited)
    }

    /// The agent has given up what it was saying.
    pub(super) fn agent_stops(&mut self, at: Instant) {
        let was_speaking = self.agent_until.take().is_some_and(|until| until > at);
        let is_for = |loud: &Instant| at.saturating_duration_since(*loud) <= STOPS_WITHIN;
        if was_speaking && let Some(loud_at) = self.caller_loud_at.filter(is_for) {
            self.waits_since = Some(loud_at);
        }
    }

    pub(super) fn caller_loud_at(&self) -> Option<Instant> {
        self.caller_loud_at
    }
}

#[cfg(test)]
mod tests;
