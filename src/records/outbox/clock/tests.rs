//! When the calendar is believed.

use jiff::Timestamp;

use crate::records::outbox::clock::{CLOCK_STEADY_FOR, Clock};

/// A clock that was set is not believed for an hour.
#[test]
fn a_clock_that_jumps_is_not_steady() {
    let now = Timestamp::now();
    let later = |hours: i64| now + jiff::SignedDuration::from_hours(hours);
    for jump in [later(60 * 24), later(1), later(-1)] {
        let mut clock = Clock::new();
        clock.steady_since -= 2 * CLOCK_STEADY_FOR;
        assert!(clock.steady_for(Timestamp::now()) > CLOCK_STEADY_FOR);
        assert!(clock.steady_for(jump) < CLOCK_STEADY_FOR, "it was set to {jump}");
        // Set right again is a jump too; and then it goes on.
        clock.steady_since -= 2 * CLOCK_STEADY_FOR;
        assert!(clock.steady_for(now) < CLOCK_STEADY_FOR);
        clock.steady_since -= 2 * CLOCK_STEADY_FOR;
        assert!(clock.steady_for(Timestamp::now()) > CLOCK_STEADY_FOR);
    }
    assert!(Clock::new().steady_for(Timestamp::now()) < CLOCK_STEADY_FOR, "it has just begun");
}
