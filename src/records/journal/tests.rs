//! What is noted can be read back, whatever the disk or the process before did.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::Path;

use serde_json::Value;
use tempfile::tempdir;

use crate::records::ended_by::EndedBy;
use crate::records::event::{Direction, Event};
use crate::records::journal::{Journal, journals, sid_of};
use crate::records::past::PastCall;
use crate::records::transcript::{Speaker, Utterance};
use crate::testing::{JOURNAL, file_in};

fn ring(sid: &str) -> Event {
    let number = "anonymous".to_owned();
    Event::Ring { call_sid: sid.to_owned(), number, direction: Direction::Out }
}

#[test]
fn what_is_noted_can_be_read_back() {
    let scratch = tempdir().unwrap();
    let data = scratch.path().join("not").join("there yet");
    let journal = Journal::begin(&data, "CA9f3c");
    assert!(!journal.path().exists(), "no event, no file");
    let odd = "two\nlines, \"quotes\", \u{2028}, {\"event\":\"delivered\"} and ü👋";
    journal.note(&ring("CA9f3c"));
    let (text, speaker) = (odd.to_owned(), Speaker::User);
    let said = Utterance { agent: 1, ordinal: 0, speaker, text, finished: true };
    journal.note(&Event::Said(said));
    journal.note(&Event::End { ended_by: EndedBy::CallerLeft });

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
        let journal = Journal::at(path.clone());
        journal.note(&Event::End { ended_by: EndedBy::CallerLeft });
        // As a process that comes after this one does.
        Journal::at(path.clone()).note(&Event::Delivered);
        let past = PastCall::read(&path).unwrap();
        assert!(past.delivered, "cut at {cut}: n8n would get it again at every start");
        assert_eq!(past.ended_by, Some(EndedBy::CallerLeft), "cut at {cut}");
    }
}

#[test]
fn a_disk_that_takes_nothing_does_not_end_a_call() {
    let scratch = tempdir().unwrap();
    let in_the_way = file_in(&scratch, "data", "a file where a directory should be");
    let journal = Journal::begin(&in_the_way, "CA1");
    journal.note(&ring("CA1"));
    journal.note(&Event::Transfer);
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
    let journal = Journal::begin(Path::new("data"), "CA9f3c");
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
