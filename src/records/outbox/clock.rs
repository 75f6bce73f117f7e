//! Whether the calendar can be believed, by which old journals are removed.
//!
//! A machine that begins with a wrong one is set right soon after. A [`Clock`] compares it with the
//! time that has passed since the last look, and knows since when nobody has set it:
//!
//! ```text
//! let is_steady = clock.steady_for(Timestamp::now()) > CLOCK_STEADY_FOR;
//! ```
//!
//! It removes nothing and decides nothing: the [outbox](super) does.

use std::time::{Duration, Instant};

use jiff::Timestamp;

/// A clock that is about to be set right is set right by then. Nothing is removed before.
pub(super) const CLOCK_STEADY_FOR: Duration = Duration::from_hours(1);
/// By more than this a clock does not go wrong by itself between two looks: it was set.
const CLOCK_JUMP: Duration = Duration::from_mins(1);

/// Whether the calendar can be believed. A machine that begins with a wrong one is set right soon
/// after, and until then every journal may look old enough to go.
pub(super) struct Clock {
    steady_since: Instant,
    looked: (Instant, Timestamp),
}

impl Clock {
    pub(super) fn new() -> Clock {
        Clock { steady_since: Instant::now(), looked: (Instant::now(), Timestamp::now()) }
    }

    pub(super) fn steady_for(&mut self, calendar: Timestamp) -> Duration {
        let (then, calendar_then) = std::mem::replace(&mut self.looked, (Instant::now(), calendar));
        let passed = then.elapsed();
        let by_the_calendar = calendar.duration_since(calendar_then);
        let jump = by_the_calendar.unsigned_abs().abs_diff(passed);
        if by_the_calendar.is_negative() || jump > CLOCK_JUMP {
            self.steady_since = Instant::now();
        }
        self.steady_since.elapsed()
    }
}

#[cfg(test)]
mod tests;
