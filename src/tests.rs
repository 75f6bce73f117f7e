//! What belongs to no room: the story's own functions, and all doors of the bridge fed with what
//! the fuzz targets have found.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use std::{fs, thread};

use serde_json::{Value, json};
use tempfile::tempdir;

use crate::feed::feed;
use crate::records::event::Direction;
use crate::records::transcript::{Heard, Speaker};
use crate::testing::{DEADLINE, bridge, invocation};
use crate::{Call, IncomingCall, missing, note_transcript};

#[test]
fn what_a_booking_lacks_is_told_in_words() {
    let bridge = bridge();
    let ask = |parameters: &Value| {
        let tool = &bridge.agent.tools["schedule_meeting"];
        missing(&bridge, tool, &invocation("schedule_meeting", parameters))
    };
    let whole = json!({
        "name": "Ada Lovelace", "email": "ada@example.com", "purpose": "a policy",
        "datetime": "2027-03-09T14:30", "location": "London",
    });
    assert_eq!(ask(&whole), None);

    let again = ". Ask the caller, then try again.";
    let one = |field: &str, value: Value| {
        let mut parameters = whole.clone();
        parameters[field] = value;
        ask(&parameters)
    };
    for blank in [Value::Null, json!(""), json!("  ")] {
        let wanted = format!("Not done yet: email is missing{again}");
        assert_eq!(one("email", blank).as_deref(), Some(wanted.as_str()));
    }
    let all = format!("Not done yet: name, email, purpose, datetime, location are missing{again}");
    assert_eq!(ask(&json!({})).as_deref(), Some(all.as_str()));

    for good in ["new york", " NEW YORK ", "New York"] {
        assert_eq!(one("location", json!(good)), None, "{good}");
    }
    let told = one("location", json!("Paris")).unwrap();
    assert_eq!(
        told,
        "Not done yet: \"Paris\" is not a location we have. Valid are: Chicago, London, \
         Manchester, New York. Ask the caller which one."
    );

    let hang_up = &bridge.agent.tools["hangUp"];
    let told = missing(&bridge, hang_up, &invocation("hangUp", &json!({})));
    assert!(told.unwrap().contains("reason is missing"));
    let summary = &bridge.agent.tools["move_to_call_summary"];
    let given = invocation("move_to_call_summary", &json!({"summary": "All is well."}));
    assert_eq!(missing(&bridge, summary, &given), None);
}

/// A full pipe stands for a disk that hangs.
#[test]
fn whoever_looks_at_a_call_does_not_wait_for_the_disk() {
    let scratch = tempdir().unwrap();
    let pipe = scratch.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let other_end = fs::OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
    let mut fill = Command::new("dd");
    fill.args(["if=/dev/zero", "bs=4096", "oflag=nonblock"]).arg(format!("of={}", pipe.display()));
    assert!(!fill.output().unwrap().status.success(), "it ends because no more goes in");
    let incoming = IncomingCall {
        sid: "CA1",
        number: "+4930123456",
        direction: Direction::In,
        first_message: String::new(),
        wire: String::new(),
    };
    let mut call = Call::new(Box::leak(Box::new(bridge())), &incoming);
    call.journal = call.bridge.journals.claim(&pipe).ok().unwrap();
    let heard = Heard {
        speaker: Speaker::User,
        ordinal: 0,
        text: Some("Hello?".to_owned()),
        delta: None,
        finished: true,
        typed: false,
    };
    thread::scope(|scope| {
        scope.spawn(|| note_transcript(&call, &heard));
        let began = Instant::now();
        let is_heard = || call.transcript.try_lock().is_ok_and(|heard| heard.count() == 1);
        let mut seen = is_heard();
        while !seen && began.elapsed() < DEADLINE {
            thread::yield_now();
            seen = is_heard();
        }
        // The pipe becomes empty, and the line goes into it.
        assert!(BufReader::new(other_end).read_until(b'\n', &mut Vec::new()).unwrap() > 0);
        assert!(seen, "the words are locked while they are written");
    });
}

/// What the fuzz targets have found, and what they start from.
#[test]
fn what_was_fed_once_is_still_digested() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    for target in ["head", "form", "twilio", "ultravox", "n8n", "agent", "journal"] {
        let entries = fs::read_dir(corpus.join(target)).unwrap();
        let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        assert!(!files.is_empty(), "the corpus of {target} is empty");
        for file in files {
            let data = fs::read(&file).unwrap();
            let fed = std::panic::catch_unwind(|| feed(target, &data));
            assert!(fed.is_ok(), "{}", file.display());
        }
    }
}
