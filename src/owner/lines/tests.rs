//! How often one number may call, by the clock.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::time::{Duration, Instant};

use crate::owner::lines::{CallList, Calls};
use crate::testing::{full_settings, settings};
use crate::toolbox::threads::lock;

const NUMBER: &str = "+4930123456";

#[test]
fn a_number_may_call_again_when_an_hour_has_passed() {
    let config = full_settings();
    let most = config.calls_per_number_per_hour;
    let mut list = CallList::default();
    for _ in 0..most {
        assert!(list.has_line_for(NUMBER, &config).is_ok());
    }
    for _ in 0..3 * most {
        assert_eq!(list.has_line_for(NUMBER, &config).unwrap_err().reason, "too_often");
    }
    // The refused ones do not count, so the hour is that of the calls.
    assert_eq!(list.recent[NUMBER].len(), most);
    let made_earlier = |list: &mut CallList, by: Duration| {
        let times = list.recent.get_mut(NUMBER).unwrap();
        for time in times {
            *time = time.checked_sub(by).unwrap();
        }
    };
    made_earlier(&mut list, Duration::from_mins(58));
    assert!(list.has_line_for(NUMBER, &config).is_err(), "the hour is not over");
    made_earlier(&mut list, Duration::from_mins(3));
    assert!(list.has_line_for(NUMBER, &config).is_ok());
    assert_eq!(list.recent[NUMBER].len(), 1, "nothing is kept longer");
    assert!(list.recent[NUMBER][0] > Instant::now().checked_sub(Duration::from_mins(1)).unwrap());
}

#[test]
fn as_many_are_put_through_as_there_are_lines() {
    let config = settings(&[("MAX_CALLS", "2")]).ok().unwrap();
    let calls = Calls::default();
    let may = |sid: &str| calls.put_through(&config, sid);
    assert!(may("CA1") && may("CA2") && may("CA1"), "the same one again is no other");
    assert!(!may("CA3"));
    calls.left_person("CA1");
    assert!(may("CA3") && !may("CA1"));
    // Also if Twilio never says how it went.
    for until in lock(&calls.list).with_person.values_mut() {
        *until = Instant::now();
    }
    assert!(may("CA1") && may("CA4"));
}
