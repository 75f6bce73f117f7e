//! Journals as they are read back: whole, cut off, or edited by hand.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use tempfile::tempdir;

use crate::records::journal::{Direction, Journal};
use crate::records::past::{Filed, delivered_at, journals, sid_of};
use crate::testing::{JOURNAL, file_in};

#[test]
fn a_journal_is_read_back() {
    let scratch = tempdir().unwrap();
    let filed = Filed::read(&file_in(&scratch, "a.jsonl", JOURNAL)).unwrap();
    assert_eq!((filed.sid.as_str(), filed.number.as_str()), ("CA1", "+4930123456"));
    assert_eq!(filed.ended_by, "AgentHungUp");
    assert_eq!(filed.transcript.text(), "Agent: First\nUser: Second");
    assert!(!filed.delivered && !filed.transferred);
    assert_eq!((filed.agent_id.as_str(), filed.agents), ("7c21", 1));
    let day = Duration::from_hours(24);
    assert!(filed.quiet_for > day, "since its last line");
    assert!(filed.age > filed.quiet_for + day / 2, "since its first line");

    let delivered = format!("{JOURNAL}{{\"event\":\"delivered\"}}\n");
    assert!(Filed::read(&file_in(&scratch, "b.jsonl", delivered)).unwrap().delivered);
    assert!(Filed::read(&scratch.path().join("none.jsonl")).is_err());
}

#[test]
fn what_went_over_the_wire_is_nothing_that_a_journal_has_to_know() {
    let scratch = tempdir().unwrap();
    let wire = json!({"at": "2020-01-05T10:00:00Z", "event": "wire", "text": "\"event\":\"end\""});
    // A caller, and an agent's tool, may say what they like.
    let said = json!({"event": "said", "ordinal": 3, "speaker": "User",
        "text": "\"event\":\"wire\"", "agent": 0});
    let text = format!("{JOURNAL}{said}\n{wire}\n");
    let filed = Filed::read(&file_in(&scratch, "a.jsonl", text)).unwrap();
    assert_eq!(filed.ended_by, "AgentHungUp");
    assert!(filed.transcript.text().ends_with("\nUser: \"event\":\"wire\""));
    let at = |day| format!("2020-01-0{day}T10:00:00Z").parse().ok();
    assert_eq!((filed.began, filed.ended), (at(1), at(2)), "the end is not the wire's");
    assert_eq!(filed.direction, Direction::In, "of journals that do not tell");
    let browser = r#"{"event":"ring","callSid":"CA1","number":"browser","direction":"browser"}"#;
    let filed = Filed::read(&file_in(&scratch, "b.jsonl", browser)).unwrap();
    assert_eq!(filed.direction, Direction::Browser);
    let odd = r#"{"event":"ring","callSid":"CA1","direction":{"up":1}}"#;
    assert_eq!(Filed::read(&file_in(&scratch, "c.jsonl", odd)).unwrap().direction, Direction::In);
}

#[test]
fn the_last_line_tells_that_a_journal_was_delivered() {
    let scratch = tempdir().unwrap();
    let delivered = r#"{"at":"2020-01-03T10:00:00Z","event":"delivered"}"#;
    let cases = [
        (format!("{JOURNAL}{delivered}\n"), true),
        (format!("{delivered}\n"), true),
        // Half of it, more behind it, too much in it, no time in it: read the whole file.
        (format!("{JOURNAL}{delivered}"), false),
        (format!("{JOURNAL}{delivered}\n{delivered}x\n"), false),
        (format!("{delivered}\n{JOURNAL}"), false),
        (format!("{JOURNAL}{{\"event\":\"delivered\"}}\n"), false),
        (format!("{JOURNAL}{}", delivered.replace('}', &" ".repeat(300)) + "}\n"), false),
        (JOURNAL.to_owned(), false),
        (String::new(), false),
        ("\n".to_owned(), false),
    ];
    for (text, wanted) in cases {
        let path = file_in(&scratch, "a.jsonl", &text);
        assert_eq!(delivered_at(&path).is_some(), wanted, "{text}");
        assert!(!wanted || Filed::read(&path).unwrap().delivered, "{text}");
    }
    assert!(delivered_at(&scratch.path().join("none.jsonl")).is_none());
}

#[test]
fn a_journal_cut_off_anywhere_keeps_its_whole_lines() {
    let scratch = tempdir().unwrap();
    let texts = ["Agent: First\nUser: Second", "Agent: First\nUser: Second, as first heard"];
    for length in 0..=JOURNAL.len() {
        let path = file_in(&scratch, "cut.jsonl", &JOURNAL.as_bytes()[..length]);
        let filed = Filed::read(&path).unwrap();
        assert!(["", "CA1"].contains(&filed.sid.as_str()), "{length}");
        assert!(["", "AgentHungUp"].contains(&filed.ended_by.as_str()), "{length}");
        let text = filed.transcript.text();
        let known = texts.contains(&text.as_str())
            || text.is_empty()
            || text == "User: Second, as first heard";
        assert!(known && !filed.delivered, "{length}: {text}");
    }
    let dirty = [b"\xff\xfe\0\n[1]\nnull\n7\n{}\n\n".as_slice(), JOURNAL.as_bytes()].concat();
    let filed = Filed::read(&file_in(&scratch, "dirty.jsonl", dirty)).unwrap();
    assert_eq!((filed.sid.as_str(), filed.transcript.text().as_str()), ("CA1", texts[0]));
}

#[test]
fn a_journal_belongs_to_the_call_in_its_name() {
    let path = Journal::path(Path::new("data"), "CA9f3c");
    assert!(path.starts_with("data/calls"), "{}", path.display());
    assert_eq!(sid_of(&path), "CA9f3c");
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
