//! Durations as figures.

use std::time::Duration;

pub(crate) fn in_seconds(duration: Duration) -> f64 {
    // To the tenth: nobody reads more.
    (duration.as_secs_f64() * 10.0).round() / 10.0
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
