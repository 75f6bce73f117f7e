//! What belongs to no room: the story's own functions, and all doors of the bridge fed with what
//! the fuzz targets have found.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;
use std::{fs, thread};

use tempfile::tempdir;
use tungstenite::protocol::Role;

use crate::feed::feed;
use crate::owner::lines::Admission;
use crate::parties::twilio::stream::CallerLeg;
use crate::records::ended_by::EndedBy;
use crate::records::event::Direction;
use crate::records::transcript::{Heard, Speaker};
use crate::setup::agent_in_force::AgentInForce;
use crate::testing::{DEADLINE, NO_FORK, full_agent, full_settings, settings, sockets};
use crate::toolbox::socket::Socket;
use crate::toolbox::threads::lock;
use crate::{Bridge, Call, IncomingCall, agent_thread, note_transcript};

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
    let mut call = Call::new(
        Box::leak(Box::new(Bridge::build(full_settings(), AgentInForce::of(full_agent()), &[]))),
        &an_incoming_call(),
    );
    call.journal = call.bridge.journals.claim(&pipe).ok().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| note_transcript(&call, &hello()));
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

/// The caller is hung up on, with the apology to come, and what was said is filed.
#[test]
fn a_call_whose_thread_dies_is_ended_and_filed() {
    let scratch = tempdir().unwrap();
    let data = scratch.path().display().to_string();
    let n8n = ("N8N_WEBHOOK_URL", "https://n8n.example/webhook/call");
    let config = settings(&[("DATA_DIR", &data), n8n]).ok().unwrap();
    let bridge: &'static Bridge =
        Box::leak(Box::new(Bridge::build(config, AgentInForce::of(full_agent()), &[])));
    let incoming = || Call::new(bridge, &an_incoming_call());
    let Admission::Yours(call, line) = bridge.calls.admit("CA1", incoming) else {
        unreachable!("there are no other calls");
    };
    note_transcript(&call, &hello());
    let (near, mut twilio) = sockets();
    let socket = Socket::new(near, None, Vec::new(), Role::Server);
    let leg = CallerLeg::new(socket, "MZ1".into(), Arc::clone(&call.tap));
    assert!(call.has_stream(&Arc::new(leg)));
    agent_thread(&call, line, || panic!("on purpose"));
    assert!(bridge.calls.all().is_empty(), "it still has its line");
    assert_eq!(bridge.calls.how_it_ended("CA1"), Some((EndedBy::AgentLost, None)));
    assert_eq!(bridge.outbox.waiting(), 1, "its transcript is lost");
    let mut goodbye = [0; 4];
    twilio.read_exact(&mut goodbye).unwrap();
    assert_eq!((goodbye[0], &goodbye[2..]), (0x88, &1_000_u16.to_be_bytes()[..]));
}

fn an_incoming_call() -> IncomingCall<'static> {
    IncomingCall {
        sid: "CA1",
        number: "+4930123456",
        to: "+442079460000",
        stir_verstat: "",
        direction: Direction::In,
        order: None,
        wire: String::new(),
    }
}

fn hello() -> Heard {
    Heard {
        speaker: Speaker::User,
        ordinal: 0,
        text: Some("Hello?".to_owned()),
        delta: None,
        finished: true,
        typed: false,
    }
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
