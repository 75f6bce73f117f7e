//! Keys become numbers.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::time::{Duration, Instant};

use crate::parties::twilio::keys::{KEYS_MAX, Keys};

impl Keys {
    /// As if the last key had been pressed that long ago.
    fn waits(&mut self, pause: Duration) {
        self.last = Instant::now().checked_sub(pause);
    }
}

/// Slow fingers take half a second from key to key; whoever has keyed in all waits a second.
#[test]
fn a_number_ends_with_a_pause_of_a_second() {
    let mut keys = Keys::default();
    assert_eq!(keys.after_pause(), None);
    for key in ["4", "7", "#"] {
        assert_eq!(keys.press(key), None);
    }
    loop {
        let (mut slow, began) = (Keys::default(), Instant::now());
        slow.press("4");
        slow.waits(Duration::from_millis(500));
        let given = slow.after_pause();
        // Unless the machine has stumbled just here.
        if began.elapsed() < Duration::from_millis(400) {
            assert_eq!(given, None);
            break;
        }
    }
    keys.waits(Duration::from_millis(1_100));
    assert_eq!(keys.after_pause().as_deref(), Some("47#"));
    keys.waits(Duration::from_millis(1_100));
    assert_eq!(keys.after_pause(), None, "once");
}

#[test]
fn what_is_no_key_is_left_out_and_many_come_in_portions() {
    let mut keys = Keys::default();
    for key in ["A", "D", "{", "", "é", "1 2"] {
        assert_eq!(keys.press(key), None);
    }
    keys.waits(Duration::from_millis(1_100));
    assert_eq!(keys.after_pause().as_deref(), Some("12"));
    let portions: Vec<String> = (0..70).filter_map(|_| keys.press("7")).collect();
    assert_eq!(portions, ["7".repeat(KEYS_MAX), "7".repeat(KEYS_MAX)]);
    keys.waits(Duration::from_millis(1_100));
    assert_eq!(keys.after_pause().unwrap().len(), 70 - 2 * KEYS_MAX);
}
