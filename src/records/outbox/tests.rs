//! Which journals are kept, offered again and removed.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::PathBuf;
use std::time::{Duration, Instant};
use std::{fs, thread};

use jiff::Timestamp;
use serde_json::json;
use tempfile::{TempDir, tempdir};

use crate::records::delivery::{DELIVER_FOR, Delivery};
use crate::records::journal::{Journals, journals as all, sid_of};
use crate::records::outbox::{Found, Outbox};
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
    past_call(&scratch);
    assert_eq!(outbox.look_through(&Journals::new(scratch.path()), false), 1);
    assert_eq!(outbox.waiting(), 0, "it is not n8n's turn yet");
    thread::scope(|scope| {
        scope.spawn(|| outbox.await_first_tries());
        wait_for(|| lock(&outbox.deliveries).is_ending.then_some(()));
        let delivery = outbox.next(false);
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
    let due = outbox.next(false);
    let again = outbox.try_one(&ours, due, |_| Ok(()));
    assert!(again.is_none(), "held");
    outbox.done("CA1", again);
    drop(their_journal);
    wait_for(|| matches!(outbox.look_at(&ours, &path, DELIVER_FOR), Found::Waits).then_some(()));
    let waiting = &lock(&outbox.deliveries).waiting;
    assert!(waiting.iter().any(|delivery| delivery.due() <= Instant::now()), "four hours more");
}

/// Also if a thread has its delivery just then, and comes too early or too late for the journal.
#[test]
fn a_call_that_was_deleted_is_not_delivered() {
    let scratch = tempdir().unwrap();
    let config = settings(&[("DATA_DIR", scratch.path().to_str().unwrap())]);
    let outbox = Outbox::new(&config.ok().unwrap());
    let journals = Journals::new(scratch.path());
    let put_back = |delivery: Delivery| {
        let sid = delivery.sid.clone();
        let again = outbox.try_one(&journals, delivery, |_| unreachable!("it is delivered"));
        outbox.done(&sid, again);
    };
    let ask = |delivery: Delivery| {
        outbox.asked(outbox.ask_one(&journals, delivery, |_, _| unreachable!("it is asked for")));
    };
    for (asks, is_late) in [(false, false), (false, true), (true, false), (true, true)] {
        let path = past_call(&scratch);
        assert_eq!(outbox.look_through(&journals, false), 1);
        if !asks {
            lock(&outbox.deliveries).waiting.iter_mut().for_each(Delivery::no_more_asks);
        }
        let delivery = outbox.next(asks);
        let its_journal = wait_for(|| journals.claim(&path).ok());
        let back = |delivery| if asks { ask(delivery) } else { put_back(delivery) };
        fs::remove_file(&path).unwrap();
        outbox.drop_delivery("CA1");
        if is_late {
            drop(its_journal);
            back(delivery);
        } else {
            back(delivery);
            drop(its_journal);
        }
        journals.flush(DEADLINE);
        assert!(!path.exists(), "it was written anew ({asks}, {is_late})");
        let deliveries = lock(&outbox.deliveries);
        assert!(deliveries.waiting.is_empty(), "it is still to be delivered ({asks}, {is_late})");
        assert!(deliveries.on_the_way.is_empty(), "it is remembered ({asks}, {is_late})");
    }
}

#[test]
fn what_waits_for_its_summary_is_not_late_and_is_offered() {
    let scratch = tempdir().unwrap();
    let config = settings(&[("DATA_DIR", scratch.path().to_str().unwrap())]);
    let outbox = Outbox::new(&config.ok().unwrap());
    let journals = Journals::new(scratch.path());
    past_call(&scratch);
    assert_eq!(outbox.look_through(&journals, false), 1);
    let due = lock(&outbox.deliveries).waiting[0].due();
    assert_eq!((outbox.waiting(), outbox.offer_again(&journals)), (0, 1));
    assert_eq!(lock(&outbox.deliveries).waiting[0].due(), due, "it waits anew");
    let delivery = outbox.next(true);
    assert_eq!((outbox.waiting(), outbox.oldest()), (0, Duration::ZERO), "it is only asked for");
    assert_eq!(outbox.offer_again(&journals), 1);
    outbox.asked(delivery);
    lock(&outbox.deliveries).waiting[0].no_more_asks();
    assert_eq!(outbox.waiting(), 1);
    let delivery = outbox.next(false);
    assert_eq!((outbox.waiting(), outbox.offer_again(&journals)), (1, 1));
    outbox.done(&delivery.sid, None);
    assert_eq!(outbox.offer_again(&journals), 0);
}

/// It has ended, and Ultravox may have a summary of it.
fn past_call(scratch: &TempDir) -> PathBuf {
    let at = Timestamp::now().to_string();
    let events = [
        json!({"at": at, "event": "ring", "callSid": "CA1"}),
        json!({"at": at, "event": "agent", "callId": "u1", "agent": 1}),
        json!({"at": at, "event": "said", "agent": 1, "ordinal": 0, "text": "Hi."}),
        json!({"at": at, "event": "end", "endedBy": "CallerLeft"}),
    ];
    fs::create_dir_all(scratch.path().join("calls")).unwrap();
    file_in(scratch, "calls/1-CA1.jsonl", events.map(|event| format!("{event}\n")).concat())
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
