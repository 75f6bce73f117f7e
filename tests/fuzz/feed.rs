//! Whatever comes in: each function feeds arbitrary bytes to one door of the bridge and asserts what
//! must hold, not only that nothing panics.
//!
//! The fuzz targets look for inputs that break it; `cargo test` replays those that are worth keeping.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::hmac;
use serde::Deserialize as _;
use serde_json::{Value, json};
use tempfile::tempdir;
use tungstenite::handshake::machine::TryParse as _;
use tungstenite::handshake::server as ws_server;

use crate::demo;
use crate::door::head::{
    ANNOUNCED_BYTES_MAX, HEAD_BYTES_MAX, announced_body, find, read_head, stream_token,
};
use crate::door::request::passed_on;
use crate::parties::n8n::decision::read_decision;
use crate::parties::n8n::reply::{N8nReply, n8n_refusal, understand_reply};
use crate::parties::twilio::messages::FromTwilio;
use crate::parties::twilio::twiml::{response, xml_escape};
use crate::parties::twilio::{Form, is_sid, signature_is_valid, url_with_and_without_port};
use crate::parties::ultravox::body::selected_tools;
use crate::parties::ultravox::leg::FromAgent;
use crate::parties::ultravox::tool::INVOCATION_ID_BYTES_MAX;
use crate::parties::ultravox::{read_agent_call, refusal};
use crate::records::delivery::Delivery;
use crate::records::ended_by::EndedBy;
use crate::records::event::Event;
use crate::records::journal::{Journals, sid_of};
use crate::records::past::PastCall;
use crate::records::transcript::{TRANSCRIPT_BYTES_MAX, Transcript, Utterance};
use crate::setup::agent::{Agent, TOOL_WITHIN_MAX, ToolAction};
use crate::setup::settings::Config;
use crate::testing::{
    built_in_agent, check_diagram, check_workflow, file_in, full_agent, full_settings, sockets,
};
use crate::toolbox::failure::{Failure, Secret};
use crate::toolbox::log::{LOG_CHARS_MAX, presentable};
use crate::toolbox::socket::READ_BYTES;
use crate::toolbox::sound::{mulaw_to_pcm, pcm_to_mulaw};
use crate::toolbox::text::{fill, is_e164, placeholders, shorten_number};
use crate::workflow::workflow_for;

/// Feeds this to one of the bridge's doors. What must hold is asserted here.
pub(crate) fn feed(target: &str, data: &[u8]) {
    match target {
        "head" => feed_head(data),
        "form" => feed_form(data),
        "twilio" => with_text(data, feed_twilio),
        "ultravox" => with_text(data, feed_ultravox),
        "n8n" => feed_n8n(data),
        "agent" => with_text(data, feed_agent),
        "journal" => feed_journal(data),
        unknown => assert_eq!(unknown, "", "no such target"),
    }
}

/// What is not UTF-8 does not get past the WebSocket, or the file.
fn with_text(data: &[u8], feed: fn(&str)) {
    if let Ok(text) = std::str::from_utf8(data) {
        feed(text);
    }
}

/// A request as it comes in at the front door, through a socket. An empty line is added, so that
/// nobody has to wait for the rest.
fn feed_head(data: &[u8]) {
    const END: &[u8] = b"-- and here is the very end of it --";
    static LINE: LazyLock<Mutex<(Arc<TcpStream>, TcpStream)>> =
        LazyLock::new(|| Mutex::new(sockets()));
    let sent = [data, b"\r\n\r\n"].concat();
    if sent.len() > 4 * HEAD_BYTES_MAX {
        return;
    }
    let mut line = LINE.lock().unwrap_or_else(PoisonError::into_inner);
    line.1.write_all(&sent).unwrap();
    let read = read_head(&line.0);
    // The next one shall not find what is left of this one.
    line.1.write_all(END).unwrap();
    let mut rest = Vec::new();
    let mut chunk = [0; READ_BYTES];
    while !rest.ends_with(END) {
        let count = (&*line.0).read(&mut chunk).unwrap();
        rest.extend_from_slice(&chunk[..count]);
    }
    let Ok(head) = read else {
        return;
    };
    // An empty line before the request is no part of it.
    let sent = sent.strip_prefix(b"\r\n").unwrap_or(&sent);
    let announced = announced_to_tiny_http(sent);
    assert_eq!(head.len() + rest.len(), sent.len() + END.len(), "nothing was lost");
    assert!(sent.starts_with(&head) && find(&head, b"\r\n\r\n").is_some());
    assert!(head[0].is_ascii_uppercase());
    assert!(announced.is_none_or(|bytes| bytes <= ANNOUNCED_BYTES_MAX), "it would be set aside");
    if let (Some(ours), Some(theirs)) = (announced_body(&head), announced) {
        assert!(ours >= theirs, "tiny_http waits for more than we do");
    }
    let Ok(head) = passed_on(&head) else {
        return;
    };
    let announced = announced_to_tiny_http(&head);
    let end = find(&head, b"\r\n\r\n").unwrap();
    assert!(head[..end].is_ascii(), "tiny_http says nothing to it");
    assert!(!head[..end].contains(&0) && find(&head[..end], b"\r\n ").is_none());
    assert_eq!(announced_body(&head).is_none(), find(&head[..end], b"\r\nTransfer-").is_some());
    assert!(announced.is_none_or(|bytes| Some(bytes) == announced_body(&head)), "one length");
    assert_eq!(passed_on(&head).unwrap(), head, "it is as it is to be");
    if let Some(token) = stream_token(&head) {
        assert!(head.starts_with(format!("GET /media-stream/{token}").as_bytes()));
        if let Ok(Some((length, request))) = ws_server::Request::try_parse(&head) {
            assert!(length <= head.len());
            drop(ws_server::create_response(&request));
        }
    }
}

/// What `tiny_http` 0.12 makes of the head: it takes the first length, unless there is any
/// `Transfer-Encoding`.
fn announced_to_tiny_http(head: &[u8]) -> Option<usize> {
    let end = find(head, b"\r\n\r\n")?;
    let text = std::str::from_utf8(&head[..end]).ok().filter(|text| text.is_ascii())?;
    let headers = || text.split("\r\n").skip(1).filter_map(|line| line.trim().split_once(':'));
    let named = |wanted: &str| {
        headers().find(|(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| value.trim())
    };
    if named("Transfer-Encoding").is_some() {
        return None;
    }
    named("Content-Length")?.parse().ok()
}

/// The body of a webhook, and what becomes of the values in it.
fn feed_form(data: &[u8]) {
    let form = Form::parse(data);
    let pairs: Vec<(&str, &str)> =
        form.0.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let written = form_urlencoded::Serializer::new(String::new()).extend_pairs(&pairs).finish();
    assert_eq!(Form::parse(written.as_bytes()).0, form.0, "read what was written");
    for (name, value) in pairs.iter().take(64) {
        assert!(pairs.iter().any(|(known, first)| known == name && *first == form.get(name)));
        feed_value(value);
    }
    let sid = form.get("CallSid");
    if is_sid("CA", sid) {
        let journal = Journals::new(Path::new("data")).begin(sid);
        let path = journal.path();
        assert_eq!(path.parent(), Some(Path::new("data/calls")), "it stays in its directory");
        assert_eq!(sid_of(path), sid, "and is found again");
    }
    let token = Secret("12345".into());
    let url = "https://bridge.example/incoming-call?a=b";
    let signed: String =
        BTreeSet::from_iter(&pairs).into_iter().flat_map(|(name, value)| [*name, *value]).collect();
    let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, b"12345");
    let signature = BASE64.encode(hmac::sign(&key, format!("{url}{signed}").as_bytes()));
    assert!(signature_is_valid(&token, url, &form, &signature), "{signature}");
    assert!(!signature_is_valid(&token, "https://bridge.example/", &form, &signature));
    assert!(!signature_is_valid(&token, url, &form, form.get("signature")));
}

fn feed_value(value: &str) {
    let escaped = xml_escape(value);
    assert!(!escaped.contains(['<', '>', '"', '\'']), "{escaped}");
    let plain = |c: &char| match c {
        '\n' | '\t' | '\r' => true,
        '\u{fffe}' | '\u{ffff}' => false,
        c => !c.is_control(),
    };
    let wanted: String = value.chars().filter(plain).collect();
    let said = demo::twiml::Twiml::read(&response(&format!("<Say>{escaped}</Say>"))).unwrap();
    assert_eq!(said.said, [wanted.trim()], "Twilio reads what was meant");

    let shown = presentable(value);
    assert!(!shown.contains(char::is_control) && shown.chars().count() <= LOG_CHARS_MAX);
    let number = shorten_number(value);
    assert!(number.chars().filter(char::is_ascii_digit).count() <= 6, "{number}");
    if is_e164(value) {
        assert!(!shown.contains(value), "{shown}");
    }
    assert_eq!(fill(value, |_| None), value, "what is not known stays");
    let filled = fill(value, |_| Some("{caller_number}".into()));
    assert!(filled.len() >= value.len() || value.contains('}'), "{filled}");
    for (name, line) in placeholders(value) {
        assert!(value.lines().nth(line - 1).unwrap().contains(&format!("{{{name}}}")));
    }
    for url in url_with_and_without_port(value) {
        assert!(!url.is_empty() || value.is_empty());
    }
}

/// A message on the Media Stream, read before its start and after.
fn feed_twilio(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_default();
    for sid in ["", "MZ1"] {
        let mut mulaw = Vec::new();
        let Ok(message) = FromTwilio::parse(text, sid, &mut mulaw) else {
            continue;
        };
        if !value.is_object() {
            // Deeper than a tree may be, or a list of values in our order, which is harmless.
            continue;
        }
        let event = &value["event"];
        let is_new = matches!(message, FromTwilio::Unknown(_));
        assert!(is_new || sid.is_empty() || value["streamSid"] == sid, "for another stream");
        match message {
            FromTwilio::Media => {
                let payload = value["media"]["payload"].as_str().unwrap();
                assert_eq!((event, BASE64.decode(payload).unwrap()), (&json!("media"), mulaw));
                feed_sound(payload);
            }
            FromTwilio::Start(start) => {
                assert_eq!(value["start"]["callSid"], start.call_sid);
                assert_eq!(value["start"]["streamSid"], start.stream_sid);
                assert_eq!(value["start"]["mediaFormat"]["encoding"], start.media_format.encoding);
            }
            FromTwilio::Dtmf(digit) => assert_eq!(value["dtmf"]["digit"], digit),
            FromTwilio::Mark(name) => assert_eq!(value["mark"]["name"], name),
            FromTwilio::Connected => assert_eq!(*event, "connected"),
            FromTwilio::Stop => assert_eq!(*event, "stop"),
            FromTwilio::Unknown(other) => assert_eq!(*event, other),
        }
    }
}

/// To the agent and back it is the same sound, but for the two ways to write silence.
fn feed_sound(payload: &str) {
    let Ok(mulaw) = BASE64.decode(payload) else {
        return;
    };
    assert!(mulaw.len() <= payload.len());
    for code in mulaw {
        let back = pcm_to_mulaw(mulaw_to_pcm(code));
        assert!(back == code || (code, back) == (0x7F, 0xFF), "{code} came back as {back}");
    }
}

/// What the agent says on one line of its own, message after message: invocations are looked at,
/// transcripts are kept, and written to a journal as they come.
fn feed_ultravox(text: &str) {
    static AGENT: LazyLock<Agent> = LazyLock::new(full_agent);
    let (mut transcript, mut past) = (Transcript::default(), PastCall::default());
    let mut write = |said: &Utterance| {
        let line = json!(Event::Said(said.clone()));
        past.apply(Event::deserialize(line).unwrap());
    };
    for line in text.lines() {
        let Ok(message) = FromAgent::parse(line) else {
            continue;
        };
        match message {
            FromAgent::Transcript(heard) => {
                if let Some(said) = transcript.hear(1, &heard) {
                    write(said);
                }
            }
            FromAgent::Invocation(invocation) => {
                assert!(invocation.id.len() <= INVOCATION_ID_BYTES_MAX);
                for tool in AGENT.tools.values() {
                    let told = invocation.lacks(tool, &AGENT);
                    assert!(told.is_none_or(|told| told.starts_with("Not done yet: ")));
                }
            }
            FromAgent::Voice(_)
            | FromAgent::ClearBuffer
            | FromAgent::State(_)
            | FromAgent::Other(_) => {}
        }
    }
    let kept: usize = transcript.utterances().iter().map(|one| one.text.len()).sum();
    assert!(kept <= TRANSCRIPT_BYTES_MAX, "{kept} bytes were kept");
    for said in transcript.finish() {
        write(said);
    }
    check_transcript(&transcript);
    // What is repeated counts twice when it is read back, so there is less room.
    if transcript.bytes() < TRANSCRIPT_BYTES_MAX / 4 {
        let [mut told, mut said] = [&past.transcript, &transcript].map(Transcript::text);
        let utterances = transcript.utterances();
        let ordinals: BTreeSet<u64> = utterances.iter().map(|one| one.ordinal).collect();
        if ordinals.len() < utterances.len() {
            // Two speakers under one ordinal: who began first is not in the journal.
            [told, said] = [told, said].map(|text| {
                let mut lines: Vec<&str> = text.lines().collect();
                lines.sort_unstable();
                lines.join("\n")
            });
        }
        assert_eq!(told, said, "the journal tells the same");
    }
}

/// One line an utterance, each with its speaker, in the order of what was said.
fn check_transcript(transcript: &Transcript) {
    let text = transcript.text();
    let spoken = transcript.in_order().count();
    assert_eq!(text.lines().count(), spoken, "{text:?}");
    for line in text.lines() {
        let words = line.strip_prefix("Agent: ").or(line.strip_prefix("User: "));
        assert!(words.is_some_and(|words| words == words.trim() && !words.is_empty()), "{line:?}");
    }
    assert_eq!(transcript.as_messages().as_array().map(Vec::len), Some(spoken));
}

/// An answer of n8n's or Ultravox's. The first byte chooses its status.
fn feed_n8n(data: &[u8]) {
    static AGENT: LazyLock<Agent> = LazyLock::new(built_in_agent);
    const STATUSES: [u16; 12] = [200, 201, 204, 299, 302, 400, 401, 403, 404, 422, 429, 500];
    let Some((first, body)) = data.split_first() else {
        return;
    };
    let status = STATUSES[usize::from(*first) % STATUSES.len()];
    let body = String::from_utf8_lossy(body).into_owned();
    let reply = N8nReply { status, body };
    let refused = n8n_refusal(&reply).is_some();
    assert_eq!(refused, !(200..300).contains(&status));
    for field in ["firstMessage", "message"] {
        let found = understand_reply(&reply, field);
        match found {
            Ok(text) => {
                assert!(!refused && !text.is_empty() && text == text.trim(), "{text:?}");
                let json = serde_json::from_str::<Value>(reply.body.trim()).is_ok();
                assert!(json || !text.starts_with(['{', '[', '<']), "it would be read out: {text}");
            }
            Err(failure) => check_failure(&failure),
        }
    }
    match read_decision(&reply, &AGENT) {
        Ok(decision) => {
            assert!(!refused, "a refusal decides nothing");
            assert!(!decision.refuse || !decision.transfer);
            assert!(decision.stage.is_none_or(|_| !decision.refuse && !decision.transfer));
            for oddity in decision.oddities {
                assert!(oddity.chars().count() < 500, "{oddity}");
            }
        }
        Err(failure) => check_failure(&failure),
    }
    check_failure(&refusal(status, &reply.body));
    match read_agent_call(&reply.body) {
        Ok(created) => {
            let answer: Value = serde_json::from_str(&reply.body).unwrap();
            assert_eq!(
                (&answer["callId"], &answer["joinUrl"]),
                (&json!(created.id), &json!(created.join_url.reveal()))
            );
        }
        Err(failure) => check_failure(&failure),
    }
}

/// One line, and not a long one, whatever was quoted.
fn check_failure(failure: &Failure) {
    let line = failure.to_string();
    assert!(!line.contains(char::is_control) && line.chars().count() < 500, "{line:?}");
}

/// An `agent.json`. What is accepted can be offered to Ultravox.
fn feed_agent(text: &str) {
    static CONFIG: LazyLock<Config> = LazyLock::new(full_settings);
    let agent = Agent::from_files(&|name| match name {
        "agent.json" => Ok(text.to_owned()),
        "empty.md" => Ok(String::new()),
        name if name.contains(".md") => Ok(format!("You are {{agent_name}}, {name}.")),
        name => Err(format!("{name:?} is not there")),
    });
    let agent = match agent {
        Ok(agent) => agent,
        Err(mistakes) => return assert!(!mistakes.is_empty()),
    };
    assert!(agent.entries().iter().all(|(stage, _)| agent.stages.contains_key(*stage)));
    for stage in agent.stages.values() {
        assert!(stage.tools.iter().all(|tool| agent.tools.contains_key(tool)));
        let offered = json!(selected_tools(&CONFIG, &agent, stage));
        assert_eq!(demo::objections::tools_objection(&offered), None, "{offered}");
    }
    check_workflow(&workflow_for(&agent).unwrap());
    check_diagram(&agent);
    for tool in agent.tools.values() {
        if let ToolAction::EnterStage { stage, .. } = &tool.action {
            assert!(agent.stages.contains_key(stage), "it leads nowhere");
        }
        assert!(!tool.within.is_zero() && tool.within <= TOOL_WITHIN_MAX);
    }
}

/// A journal as a process that died has left it, or as somebody has edited it. It is read, and the
/// call it tells of goes on in it.
fn feed_journal(data: &[u8]) {
    let scratch = tempdir().unwrap();
    let path = file_in(&scratch, "20261123T000000Z-CA1.jsonl", data);
    let before = PastCall::read(&path).unwrap();
    check_transcript(&before.transcript);
    let said = before.transcript.text();
    let delivery = Delivery::left_behind(PastCall::read(&path).unwrap(), path.clone());
    assert_eq!(delivery.transcript.text(), said);
    assert_eq!(delivery.is_unfinished(), before.ended_by.is_none());

    let all = Journals::new(scratch.path());
    let journal = all.claim(&path).ok().unwrap();
    journal.note(&Event::Stage { stage: "line\none, \u{1f44b}".into() });
    journal.note(&Event::End { ended_by: EndedBy::CallerLeft });
    all.flush(Duration::from_secs(10));
    let after = PastCall::read(&path).unwrap();
    assert_eq!(after.stage, "line\none, \u{1f44b}", "what was there before spoils nothing");
    assert_eq!(after.ended_by, Some(EndedBy::CallerLeft));
    assert_eq!(after.transcript.text(), said);
    assert_eq!((after.sid, after.number, after.agents), (before.sid, before.number, before.agents));
    assert_eq!((after.delivered, after.transfer), (before.delivered, before.transfer));
}
