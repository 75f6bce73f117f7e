//! Calls that ring and are never heard of again.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use crate::owner::outgoing::{RINGING_AT_ONCE_MAX, Ringing};
use crate::toolbox::threads::lock;

#[test]
fn an_order_of_which_nothing_is_heard_makes_room_in_the_end() {
    let ringing = Ringing::default();
    let ids: Vec<String> =
        (0..RINGING_AT_ONCE_MAX).map(|_| ringing.add("Hello.").unwrap()).collect();
    assert_eq!(ringing.add("Hello."), None);
    let made_earlier = |by: Duration| {
        for order in lock(&ringing.0).values_mut() {
            order.since = order.since.checked_sub(by).unwrap();
        }
    };
    // Twilio lets a phone ring for ten minutes at the longest.
    made_earlier(Duration::from_mins(10));
    assert_eq!(ringing.add("Hello."), None);
    assert_eq!(ringing.take(&ids[0]).unwrap().first_message, "Hello.");
    assert!(ringing.take(&ids[0]).is_none(), "an id serves once");
    made_earlier(Duration::from_mins(2));
    assert!(ringing.add("Hello.").is_some());
    assert_eq!(lock(&ringing.0).len(), 1);
}
