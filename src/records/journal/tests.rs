//! What is noted can be read back, whatever the disk or the process before did.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;

use serde_json::{Value, json};
use tempfile::tempdir;

use crate::records::journal::{HangUp, Journal};
use crate::records::past::{Filed, journals};
use crate::testing::{JOURNAL, file_in};

#[test]
fn what_is_noted_can_be_read_back() {
    let scratch = tempdir().unwrap();
    let data = scratch.path().join("not").join("there yet");
    let journal = Journal::at(Journal::path(&data, "CA9f3c"));
    assert!(!journal.path.exists(), "no event, no file");
    let odd = "two\nlines, \"quotes\", \u{2028}, {\"event\":\"delivered\"} and ü👋";
    journal.note(&json!({"event": "ring", "callSid": "CA9f3c", "number": "anonymous"}));
    journal.note(&json!({"event": "said", "ordinal": 0, "speaker": "User", "text": odd}));
    journal.note(&json!({"event": "end", "endedBy": "CallerLeft"}));

    let text = fs::read_to_string(&journal.path).unwrap();
    assert_eq!(text.lines().count(), 3, "one line an event: {text}");
    for line in text.lines() {
        let event: Value = serde_json::from_str(line).unwrap();
        let at: Option<jiff::Timestamp> = event["at"].as_str().and_then(|at| at.parse().ok());
        assert!(at.is_some(), "each line has its time: {line}");
    }
    let filed = Filed::read(&journal.path).unwrap();
    assert_eq!((filed.sid.as_str(), filed.number.as_str()), ("CA9f3c", "anonymous"));
    assert_eq!(filed.ended_by, "CallerLeft");
    let flat = odd.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(filed.transcript.text(), format!("User: {flat}"));
    assert!(!filed.delivered, "a caller cannot talk a transcript into being delivered");
    assert_eq!(journals(&data), [journal.path.as_path()]);
}

#[test]
fn half_a_line_does_not_spoil_the_next() {
    let scratch = tempdir().unwrap();
    for cut in [0, 1, JOURNAL.len() - 3, JOURNAL.len()] {
        let path = file_in(&scratch, &format!("{cut}.jsonl"), &JOURNAL.as_bytes()[..cut]);
        let journal = Journal::at(path.clone());
        journal.note(&json!({"event": "end", "endedBy": "CallerLeft"}));
        // As a process that comes after this one does.
        Journal::at(path.clone()).note(&json!({"event": "delivered"}));
        let filed = Filed::read(&path).unwrap();
        assert!(filed.delivered, "cut at {cut}: n8n would get it again at every start");
        assert_eq!(filed.ended_by, "CallerLeft", "cut at {cut}");
    }
}

#[test]
fn a_disk_that_takes_nothing_does_not_end_a_call() {
    let scratch = tempdir().unwrap();
    let in_the_way = file_in(&scratch, "data", "a file where a directory should be");
    let journal = Journal::at(Journal::path(&in_the_way, "CA1"));
    journal.note(&json!({"event": "ring"}));
    journal.note(&json!({"event": "end"}));
    assert!(!journal.path.exists());
}

#[test]
fn every_way_a_call_can_end_is_in_the_metrics() {
    let source = include_str!("../journal.rs");
    let (_, after) = source.split_once(" enum HangUp {\n").unwrap();
    let (body, _) = after.split_once("\n}\n").unwrap();
    let words = body.lines().map(str::trim).filter(|line| !line.starts_with("//"));
    let words: Vec<&str> = words.map(|word| word.trim_end_matches(',')).collect();
    assert_eq!(HangUp::ALL.map(|how| format!("{how:?}")).to_vec(), words);
}
