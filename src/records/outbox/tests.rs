//! Which journals are kept, offered again and removed.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::time::Instant;
use std::{fs, thread};

use jiff::Timestamp;
use serde_json::json;
use tempfile::tempdir;

use crate::records::delivery::DELIVER_FOR;
use crate::records::journal::{Journals, journals as all, sid_of};
use crate::records::outbox::{CLOCK_STEADY_FOR, Clock, Found, Outbox};
use crate::testing::{DEADLINE, file_in, settings};
use crate::toolbox::threads::lock;

#[test]
fn journals_are_removed_while_the_process_runs() {
    const HOUR: i64 = 3_600;
    let scratch = tempdir().unwrap();
    let data_dir = scratch.path().to_str().unwrap();
    let config = settings(&[
        ("DATA_DIR", data_dir),
        ("KEEP_DAYS", "2"),
        ("N8N_WEBHOOK_URL", "https://n8n.example/webhook/call"),
    ]);
    let outbox = Outbox::new(&config.ok().unwrap());
    fs::create_dir_all(scratch.path().join("calls")).unwrap();
    for (sid, hours, last) in [
        ("CAold", 49, "delivered"),
        ("CAyoung", 47, "delivered"),
        ("CAlate", 100, "end"),
        ("CAnew", 1, "end"),
    ] {
        let at = jiff::Timestamp::now() - jiff::SignedDuration::from_secs(hours * HOUR);
        let ring = json!({"at": at.to_string(), "event": "ring", "callSid": sid});
        let last = json!({"at": at.to_string(), "event": last, "endedBy": "CallerLeft"});
        file_in(
            &scratch,
            &format!("calls/{}-{sid}.jsonl", 1_000 - hours),
            format!("{ring}\n{last}\n"),
        );
    }
    let journals = Journals::new(scratch.path());
    let left = || -> Vec<String> {
        all(scratch.path()).iter().map(|path| sid_of(path).to_owned()).collect()
    };
    // A start reads, and removes nothing.
    assert_eq!(outbox.look_through(&journals, false), 1);
    assert_eq!(left().len(), 4);
    assert_eq!(outbox.look_through(&journals, true), 1);
    assert_eq!(left(), ["CAlate", "CAyoung", "CAnew"]);
    let deliveries = lock(&outbox.deliveries);
    let waiting: Vec<&str> = deliveries.waiting.iter().map(|one| &*one.sid).collect();
    assert_eq!(waiting, ["CAnew"], "once, however often it is looked at");
    assert_eq!(outbox.given_up(), 1);
}

/// Also if somebody has the journal in that moment, and lets go of it later.
#[test]
fn a_process_that_ends_waits_for_no_summary() {
    let scratch = tempdir().unwrap();
    let config = settings(&[("DATA_DIR", scratch.path().to_str().unwrap())]);
    let outbox = Outbox::new(&config.ok().unwrap());
    let at = Timestamp::now().to_string();
    let events = [
        json!({"at": at, "event": "ring", "callSid": "CA1"}),
        json!({"at": at, "event": "agent", "callId": "u1", "agent": 1}),
        json!({"at": at, "event": "said", "agent": 1, "ordinal": 0, "text": "Hi."}),
        json!({"at": at, "event": "end", "endedBy": "CallerLeft"}),
    ];
    fs::create_dir_all(scratch.path().join("calls")).unwrap();
    let lines = events.map(|event| format!("{event}\n")).concat();
    file_in(&scratch, "calls/1-CA1.jsonl", lines);
    assert_eq!(outbox.look_through(&Journals::new(scratch.path()), false), 1);
    assert_eq!(outbox.waiting(), 0, "it is not n8n's turn yet");
    thread::scope(|scope| {
        scope.spawn(|| outbox.await_first_tries());
        wait_for(|| lock(&outbox.deliveries).is_ending.then_some(()));
        let delivery = outbox.next(|delivery| Some(delivery.due()));
        assert!(delivery.next_ask().is_none(), "it goes as it is");
        outbox.done("CA1", None);
    });
}

#[test]
fn a_call_that_is_over_is_filed_as_soon_as_nobody_has_its_journal() {
    let scratch = tempdir().unwrap();
    let config = settings(&[("DATA_DIR", scratch.path().to_str().unwrap())]);
    let outbox = Outbox::new(&config.ok().unwrap());
    let at = Timestamp::now();
    let ring = json!({"at": at.to_string(), "event": "ring", "callSid": "CA1"});
    let transfer = json!({"at": at.to_string(), "event": "transfer"});
    fs::create_dir_all(scratch.path().join("calls")).unwrap();
    let path = file_in(&scratch, "calls/1-CA1.jsonl", format!("{ring}\n{transfer}\n"));
    let (ours, theirs) = (Journals::new(scratch.path()), Journals::new(scratch.path()));
    assert_eq!(outbox.look_through(&ours, false), 1);
    outbox.is_all_read();
    outbox.file_now("CA1");
    ours.flush(DEADLINE);

    let their_journal = wait_for(|| theirs.claim(&path).ok());
    let due = outbox.next(|delivery| Some(delivery.due()));
    let again = outbox.try_one(&ours, due, |_| Ok(()));
    assert!(again.is_none(), "held");
    outbox.done("CA1", again);
    drop(their_journal);
    wait_for(|| matches!(outbox.look_at(&ours, &path, DELIVER_FOR), Found::Waits).then_some(()));
    let waiting = &lock(&outbox.deliveries).waiting;
    assert!(waiting.iter().any(|delivery| delivery.due() <= Instant::now()), "four hours more");
}

/// Locks are let go of by a thread of their own.
fn wait_for<T>(mut find: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(began.elapsed() < DEADLINE);
        thread::yield_now();
    }
}

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
