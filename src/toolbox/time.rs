//! Times as others read them: by the calendar, and in round figures.
//!
//! For the journal, the page and the log. How long to wait for something is decided where it is
//! waited for, with an `Instant`, which nobody can set back.

use std::time::Duration;

use jiff::Timestamp;

/// RFC 3339, to the millisecond.
pub(crate) fn by_the_calendar(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()
}

/// Nothing for a time to come: somebody has set the clock back.
pub(crate) fn since(at: Timestamp) -> Duration {
    Timestamp::now().duration_since(at).try_into().unwrap_or_default()
}

pub(crate) fn in_seconds(duration: Duration) -> f64 {
    // To the tenth: nobody reads more.
    (duration.as_secs_f64() * 10.0).round() / 10.0
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
