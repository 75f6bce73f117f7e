//! Journals as they are read back: whole, cut off, or edited by hand.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use serde_json::json;
use tempfile::tempdir;

use crate::records::ended_by::EndedBy;
use crate::records::event::Direction;
use crate::records::past::{PastCall, delivered_at};
use crate::testing::{JOURNAL, file_in};

#[test]
fn a_journal_is_read_back() {
    let scratch = tempdir().unwrap();
    let past = PastCall::read(&file_in(&scratch, "a.jsonl", JOURNAL)).unwrap();
    assert_eq!((past.sid.as_str(), past.number.as_str()), ("CA1", "+4930123456"));
    assert_eq!(past.ended_by, Some(EndedBy::AgentHungUp));
    assert_eq!(past.transcript.text(), "Agent: First\nUser: Second");
    assert!(!past.delivered && past.transfer.is_none());
    assert_eq!((past.agent_id.as_str(), past.agents), ("7c21", 1));
    let day = Duration::from_hours(24);
    assert!(past.quiet_for > day, "since its last line");
    assert!(past.age > past.quiet_for + day / 2, "since its first line");

    let delivered = format!("{JOURNAL}{{\"event\":\"delivered\"}}\n");
    assert!(PastCall::read(&file_in(&scratch, "b.jsonl", delivered)).unwrap().delivered);
    assert!(PastCall::read(&scratch.path().join("none.jsonl")).is_err());
}

#[test]
fn what_went_over_the_wire_is_nothing_that_a_journal_has_to_know() {
    let scratch = tempdir().unwrap();
    let wire = json!({"at": "2020-01-05T10:00:00Z", "event": "wire", "text": "\"event\":\"end\""});
    // A caller, and an agent's tool, may say what they like.
    let said = json!({"event": "said", "ordinal": 3, "speaker": "User",
        "text": "\"event\":\"wire\"", "agent": 0});
    let text = format!("{JOURNAL}{said}\n{wire}\n");
    let past = PastCall::read(&file_in(&scratch, "a.jsonl", text)).unwrap();
    assert_eq!(past.ended_by, Some(EndedBy::AgentHungUp));
    assert!(past.transcript.text().ends_with("\nUser: \"event\":\"wire\""));
    let at = |day| format!("2020-01-0{day}T10:00:00Z").parse().ok();
    assert_eq!((past.began, past.ended), (at(1), at(2)), "the end is not the wire's");
    assert_eq!(past.direction, Direction::In, "of journals that do not tell");
    let browser = r#"{"event":"ring","callSid":"CA1","number":"browser","direction":"browser"}"#;
    let past = PastCall::read(&file_in(&scratch, "b.jsonl", browser)).unwrap();
    assert_eq!(past.direction, Direction::Browser);
    let odd = r#"{"event":"ring","callSid":"CA1","direction":{"up":1}}"#;
    assert_eq!(
        PastCall::read(&file_in(&scratch, "c.jsonl", odd)).unwrap().direction,
        Direction::In
    );
}

#[test]
fn a_transfer_has_come_to_something_if_it_was_accepted() {
    let scratch = tempdir().unwrap();
    let [transfer, accepted, agent, end] = [
        "{\"event\":\"transfer\",\"number\":\"+4930555001\"}\n",
        "{\"event\":\"accepted\"}\n",
        "{\"event\":\"agent\",\"callId\":\"9f\",\"agent\":2}\n",
        "{\"event\":\"end\",\"endedBy\":\"AgentHungUp\"}\n",
    ];
    for (lines, wanted) in [
        (vec![agent], EndedBy::ProcessDied),
        (vec![transfer], EndedBy::CallerLeft),
        (vec![transfer, accepted], EndedBy::Transferred),
        (vec![transfer, agent], EndedBy::ProcessDied),
        (vec![transfer, agent, transfer], EndedBy::CallerLeft),
        (vec![transfer, accepted, agent, transfer], EndedBy::CallerLeft),
        (vec![transfer, accepted, end], EndedBy::AgentHungUp),
    ] {
        let past = PastCall::read(&file_in(&scratch, "a.jsonl", lines.concat())).unwrap();
        assert_eq!(past.came_to(), wanted, "{lines:?}");
    }
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
        assert!(!wanted || PastCall::read(&path).unwrap().delivered, "{text}");
    }
    assert!(delivered_at(&scratch.path().join("none.jsonl")).is_none());
}

#[test]
fn a_journal_cut_off_anywhere_keeps_its_whole_lines() {
    let scratch = tempdir().unwrap();
    let texts = ["Agent: First\nUser: Second", "Agent: First\nUser: Second, as first heard"];
    for length in 0..=JOURNAL.len() {
        let path = file_in(&scratch, "cut.jsonl", &JOURNAL.as_bytes()[..length]);
        let past = PastCall::read(&path).unwrap();
        assert!(["", "CA1"].contains(&past.sid.as_str()), "{length}");
        assert!([None, Some(EndedBy::AgentHungUp)].contains(&past.ended_by), "{length}");
        let text = past.transcript.text();
        let known = texts.contains(&text.as_str())
            || text.is_empty()
            || text == "User: Second, as first heard";
        assert!(known && !past.delivered, "{length}: {text}");
    }
    let dirty = [b"\xff\xfe\0\n[1]\nnull\n7\n{}\n\n".as_slice(), JOURNAL.as_bytes()].concat();
    let past = PastCall::read(&file_in(&scratch, "dirty.jsonl", dirty)).unwrap();
    assert_eq!((past.sid.as_str(), past.transcript.text().as_str()), ("CA1", texts[0]));
}
