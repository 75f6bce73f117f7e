//! What is noted can be read back, whatever the disk or the process before did.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tempfile::tempdir;

use crate::records::ended_by::EndedBy;
use crate::records::event::{Direction, Event};
use crate::records::journal::{Journals, Unclaimed, journals, sid_of};
use crate::records::past::PastCall;
use crate::records::transcript::{Speaker, Utterance};
use crate::testing::{DEADLINE, JOURNAL, NO_FORK, file_in};
use crate::toolbox::threads::lock;

fn ring(sid: &str) -> Event {
    let number = "anonymous".to_owned();
    Event::Ring { call_sid: sid.to_owned(), number, direction: Direction::Out, to: String::new() }
}

#[test]
fn what_is_noted_can_be_read_back() {
    let scratch = tempdir().unwrap();
    let data = scratch.path().join("not").join("there yet");
    let all = Journals::new(&data);
    let journal = all.begin("CA9f3c");
    assert!(!journal.path().exists(), "no event, no file");
    let odd = "two\nlines, \"quotes\", \u{2028}, {\"event\":\"delivered\"} and ü👋";
    journal.note(&ring("CA9f3c"));
    let (text, speaker) = (odd.to_owned(), Speaker::User);
    let said = Utterance { agent: 1, ordinal: 0, speaker, text, finished: true };
    journal.note(&Event::Said(said));
    journal.note(&Event::End { ended_by: EndedBy::CallerLeft });

    all.flush(DEADLINE);
    let text = fs::read_to_string(journal.path()).unwrap();
    assert_eq!(text.lines().count(), 3, "one line an event: {text}");
    for line in text.lines() {
        let event: Value = serde_json::from_str(line).unwrap();
        let at: Option<jiff::Timestamp> = event["at"].as_str().and_then(|at| at.parse().ok());
        assert!(at.is_some(), "each line has its time: {line}");
    }
    let past = PastCall::read(journal.path()).unwrap();
    assert_eq!((past.sid.as_str(), past.number.as_str()), ("CA9f3c", "anonymous"));
    assert_eq!(past.ended_by, Some(EndedBy::CallerLeft));
    let flat = odd.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(past.transcript.text(), format!("User: {flat}"));
    assert!(!past.delivered, "a caller cannot talk a transcript into being delivered");
    assert_eq!(journals(&data), [journal.path()]);
}

#[test]
fn half_a_line_does_not_spoil_the_next() {
    let scratch = tempdir().unwrap();
    for cut in [0, 1, JOURNAL.len() - 3, JOURNAL.len()] {
        let path = file_in(&scratch, &format!("{cut}.jsonl"), &JOURNAL.as_bytes()[..cut]);
        // As two processes, one after the other.
        for event in [Event::End { ended_by: EndedBy::CallerLeft }, Event::Delivered] {
            let all = Journals::new(scratch.path());
            all.claim(&path).unwrap().note(&event);
            all.flush(DEADLINE);
        }
        let past = PastCall::read(&path).unwrap();
        assert!(past.delivered, "cut at {cut}: n8n would get it again at every start");
        assert_eq!(past.ended_by, Some(EndedBy::CallerLeft), "cut at {cut}");
    }
}

/// The writer opens and closes files meanwhile. Nobody is to take its locks for another process's.
#[test]
fn what_we_have_just_let_go_of_can_be_claimed_again() {
    let _alone = lock(&NO_FORK);
    let scratch = tempdir().unwrap();
    let path = file_in(&scratch, "1-CA1.jsonl", JOURNAL);
    let all = Journals::new(scratch.path());
    for round in 0..2_000 {
        let journal = all.claim(&path);
        assert!(journal.is_ok(), "round {round}");
        if round % 3 == 0 {
            journal.unwrap().note(&Event::Transfer);
        } else {
            drop(journal);
        }
        // However far the writer is by then.
        thread::sleep(Duration::from_micros(round % 50));
    }
}

#[test]
fn a_disk_that_takes_nothing_does_not_end_a_call() {
    let scratch = tempdir().unwrap();
    let in_the_way = file_in(&scratch, "data", "a file where a directory should be");
    let all = Journals::new(&in_the_way);
    let journal = all.begin("CA1");
    journal.note(&ring("CA1"));
    journal.note(&Event::Transfer);
    all.flush(DEADLINE);
    assert!(!journal.path().exists());
}

#[test]
fn every_way_a_call_can_end_is_in_the_metrics() {
    let source = include_str!("../ended_by.rs");
    let (_, after) = source.split_once(" enum EndedBy {\n").unwrap();
    let (body, _) = after.split_once("\n}\n").unwrap();
    let words = body.lines().map(str::trim).filter(|line| !line.starts_with(['/', '#']));
    let words: Vec<&str> = words.map(|word| word.trim_end_matches(',')).collect();
    assert_eq!(EndedBy::ALL.map(|how| how.to_string()).to_vec(), words);
}

#[test]
fn a_journal_belongs_to_the_call_in_its_name() {
    let journal = Journals::new(Path::new("data")).begin("CA9f3c");
    let path = journal.path();
    assert!(path.starts_with("data/calls"), "{}", path.display());
    assert_eq!(sid_of(path), "CA9f3c");
    assert_eq!(sid_of(Path::new("CA9f3c.jsonl")), "", "it has no time");
}

#[test]
fn journals_are_found_oldest_first() {
    let scratch = tempdir().unwrap();
    for name in ["20270101T000000Z-CA2.jsonl", "20260101T000000Z-CA9.jsonl", "x.txt", "y"] {
        fs::create_dir_all(scratch.path().join("calls")).unwrap();
        file_in(&scratch, &format!("calls/{name}"), "");
    }
    let found = journals(scratch.path());
    let names: Vec<_> = found.iter().filter_map(|path| path.file_name()?.to_str()).collect();
    assert_eq!(names, ["20260101T000000Z-CA9.jsonl", "20270101T000000Z-CA2.jsonl"]);
    assert!(journals(&scratch.path().join("nowhere")).is_empty());
}

/// Two of them are as good as two processes: a lock belongs to an open file.
#[test]
fn who_has_a_journal_has_it_alone() {
    let scratch = tempdir().unwrap();
    let (ours, theirs) = (Journals::new(scratch.path()), Journals::new(scratch.path()));
    let journal = ours.begin("CA1");
    journal.note(&ring("CA1"));
    ours.flush(DEADLINE);
    let path = journal.path().to_owned();
    let is_held = |all: &Journals| matches!(all.claim(&path), Err(Unclaimed::Held));
    assert!(is_held(&theirs) && is_held(&ours), "the call goes on");
    let again = journal.clone();
    drop(journal);
    ours.flush(DEADLINE);
    assert!(is_held(&theirs), "somebody here still has it");
    drop(again);
    ours.flush(DEADLINE);
    let (journal, past) = theirs.take_up("CA1").unwrap();
    assert_eq!(past.sid, "CA1");
    assert!(is_held(&ours) && is_held(&theirs), "it goes on over there");
    journal.note(&Event::Delivered);
    drop(journal);
    theirs.flush(DEADLINE);
    assert!(PastCall::read(&path).unwrap().delivered);
    assert!(ours.claim(&path).is_ok());
    assert!(matches!(ours.take_up("CA2"), Err(Unclaimed::NoJournal)));
}

#[test]
fn a_file_says_its_version_once() {
    let scratch = tempdir().unwrap();
    let all = Journals::new(scratch.path());
    let journal = all.begin("CA1");
    for _ in 0..3 {
        journal.note(&ring("CA1"));
        all.flush(DEADLINE);
    }
    let text = fs::read_to_string(journal.path()).unwrap();
    let versions = |line: &str| serde_json::from_str::<Value>(line).unwrap()["version"].clone();
    let versions: Vec<Value> = text.lines().map(versions).collect();
    assert_eq!(versions, [Value::from(1), Value::Null, Value::Null]);
    // Deleted under our feet: what comes now is a new file, and lacks something.
    fs::remove_file(journal.path()).unwrap();
    journal.note(&Event::Transfer);
    assert!(journal.is_to_be_completed() && !journal.is_to_be_completed());
    assert_eq!(fs::read_to_string(journal.path()).unwrap().lines().count(), 1);
}
