//! What belongs to no room: the story's own functions, and all doors of the bridge fed with what
//! the fuzz targets have found.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use std::{fs, thread};

use tempfile::tempdir;

use crate::feed::feed;
use crate::records::event::Direction;
use crate::records::transcript::{Heard, Speaker};
use crate::testing::{DEADLINE, NO_FORK, full_agent, full_settings};
use crate::toolbox::threads::lock;
use crate::{Bridge, Call, IncomingCall, note_transcript};

/// A full pipe stands for a disk that hangs.
#[test]
fn whoever_looks_at_a_call_does_not_wait_for_the_disk() {
    let scratch = tempdir().unwrap();
    let pipe = scratch.path().join("pipe");
    let alone = lock(&NO_FORK);
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let other_end = fs::OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
    let mut fill = Command::new("dd");
    fill.args(["if=/dev/zero", "bs=4096", "oflag=nonblock"]).arg(format!("of={}", pipe.display()));
    assert!(!fill.output().unwrap().status.success(), "it ends because no more goes in");
    drop(alone);
    let incoming = IncomingCall {
        sid: "CA1",
        number: "+4930123456",
        to: "",
        direction: Direction::In,
        first_message: String::new(),
        wire: String::new(),
    };
    let mut call = Call::new(
        Box::leak(Box::new(Bridge::build(full_settings(), full_agent(), &[]))),
        &incoming,
    );
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
