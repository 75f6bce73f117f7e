//! When a transcript is offered again, and when no more.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::time::{Duration, Instant};

use tempfile::tempdir;

use crate::records::delivery::{DELIVER_AGAIN_MAX, DELIVER_AGAIN_MIN, DELIVER_FOR, Delivery};
use crate::records::ended_by::EndedBy;
use crate::records::event::Direction;
use crate::records::journal::Journals;
use crate::records::transcript::Transcript;
use crate::toolbox::failure::{Failure, Party};

fn delivery(journals: &Journals) -> Delivery {
    let who = ("CA1", "+4930123456", Direction::In);
    Delivery::new(who, Transcript::default(), EndedBy::CallerLeft, &journals.begin("CA1"))
}

/// At least and at most: the machine may stumble before the one or after the other.
fn pause(delivery: Delivery) -> Option<(Duration, Duration)> {
    let before = Instant::now();
    let again = delivery.try_again(&Failure::new(Party::N8n, "500"))?;
    let least = again.due.saturating_duration_since(Instant::now());
    Some((least, again.due.saturating_duration_since(before)))
}

#[test]
fn pauses_grow_from_seconds_to_a_quarter_of_an_hour() {
    let scratch = tempdir().unwrap();
    let journals = Journals::new(scratch.path());
    let doubled =
        [(0, 1), (3, 8), (7, 128)].map(|(tries, times)| (tries, times * DELIVER_AGAIN_MIN));
    let capped = [8, 20, u32::MAX - 1].map(|tries| (tries, DELIVER_AGAIN_MAX));
    for (tries, about) in doubled.into_iter().chain(capped) {
        let (least, most) = pause(Delivery { tries, ..delivery(&journals) }).unwrap();
        // A quarter more or less.
        let is_right = most >= about * 3 / 4 && least <= about * 5 / 4;
        assert!(is_right, "{least:?} to {most:?} after {tries}");
    }
    assert_eq!(DELIVER_AGAIN_MAX, Duration::from_mins(15));
}

#[test]
fn what_is_not_taken_for_three_days_is_kept_and_no_longer_offered() {
    let scratch = tempdir().unwrap();
    let journals = Journals::new(scratch.path());
    let hour = Duration::from_hours(1);
    let Some(since) = Instant::now().checked_sub(DELIVER_FOR + hour) else {
        // A machine that has not run for so long yet cannot count back.
        return;
    };
    assert_eq!(pause(Delivery { since, ..delivery(&journals) }), None);
    assert!(pause(Delivery { since: since + 2 * hour, ..delivery(&journals) }).is_some());
    assert_eq!(DELIVER_FOR, 72 * hour);
}
