//! Tables of cases for the pure functions, and the full-duplex socket over loopback. Whole calls
//! are played elsewhere, through sockets, as the outside world sees them.
//!
//! In the order of `main.rs`. What others decided (signatures, n8n's replies, G.711) was taken from
//! them, not from our own code: Twilio's published vectors, a real n8n, Python's audioop.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::error::Error as _;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::hmac;
use serde_json::{Map, Value, json};
use tungstenite::Message;
use tungstenite::handshake::machine::TryParse as _;
use tungstenite::handshake::server as ws_server;
use tungstenite::protocol::Role;
use tungstenite::protocol::frame::coding::CloseCode;

use super::workflow::workflow_for;
use super::{
    AGENT_MESSAGE_BYTES_MAX, ANNOUNCED_BYTES_MAX, Agent, BUILT_IN_AGENT, Bridge, Call, Config,
    Direction, Duplex, FRAME_BOUNDS_US, Failure, Filed, Form, FromAgent, FromTwilio,
    HEAD_BYTES_MAX, HangUp, Heard, Histogram, INVOCATION_ID_BYTES_MAX, IncomingCall, Invocation,
    Journal, LINE_BROKE, LOG_CHARS_MAX, Level, LineEnd, LogFormat, MetricsPage, N8nReply, Party,
    READ_BYTES, REFUSALS, Received, SETTINGS, Secret, Speaker, Stop, TOOL_WITHIN_MAX,
    TRANSCRIPT_BYTES_MAX, TWILIO_MESSAGE_BYTES_MAX, ToolAction, Transcript, announced_body,
    await_news, cut, delivered_at, diagram, fill, find, hashes, hex, hidden, host_only, is_e164,
    is_sid, journals, left_behind, listed, media_for_the_eye, missing, mulaw_to_pcm, n8n_refusal,
    needs_attention, note_transcript, pcm_to_mulaw, placeholders, playing_time, presentable,
    random_hex, random_number, read_agent_call, read_greeting, read_head, selected_tools, shorten,
    shorten_number, shown_token, sid_of, signature_is_valid, tidy_journals, trusted_roots, twiml,
    twiml_connect_stream, ultravox_refusal, understand_reply, unreachable_party,
    url_with_and_without_port, wants_media_stream, xml_escape,
};

/// Ends a test that would hang. Never reached while all is well.
const DEADLINE: Duration = Duration::from_secs(20);

/// A directory of a test's own, gone when the test ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::SeqCst);
        let name = format!("callbridge-unit-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if fs::remove_dir_all(&self.0).is_err() {
            // The system clears its directory for such things from time to time.
        }
    }
}

/// The `text` block of the doc comment that begins with `above`, one message an entry.
fn messages_in_doc(above: &str) -> Vec<String> {
    let source = include_str!("main.rs");
    let (_, after) = source.split_once(&format!("/// {above}")).unwrap();
    let (_, after) = after.split_once("/// ```text\n").unwrap();
    let (block, _) = after.split_once("/// ```\n").unwrap();
    let mut messages: Vec<String> = Vec::new();
    for line in block.lines().map(|line| line.trim_start_matches("///").trim_end()) {
        match line.strip_prefix("  ") {
            // A message that is too long for one line goes on in the next.
            Some(more) => messages.last_mut().unwrap().push_str(more),
            None => messages.push(line.trim_start().to_owned()),
        }
    }
    messages
}

// ============================================================================
// 0. Before the call: settings
// ============================================================================

/// The two required settings, and these.
fn settings(pairs: &[(&str, &str)]) -> Result<Config, Vec<String>> {
    let required = [("ULTRAVOX_API_KEY", "key-1"), ("PUBLIC_URL", "https://bridge.example")];
    let all = required.iter().chain(pairs);
    let values = all.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Config::from_values(values, Vec::new())
}

fn complaints(pairs: &[(&str, &str)]) -> Vec<String> {
    settings(pairs).err().unwrap_or_default()
}

#[test]
fn two_settings_are_enough() {
    let config = settings(&[]).ok().unwrap();
    assert_eq!(config.ultravox_api_key.reveal(), "key-1");
    assert_eq!(config.public_url, "https://bridge.example");
    assert_eq!(config.port, 8_000);
    assert_eq!(config.bind, IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    assert_eq!(config.data_dir, Path::new("data"));
    assert_eq!(config.keep, Duration::from_hours(30 * 24));
    assert_eq!(config.ultravox_model, "ultravox-v0.7");
    assert_eq!(config.ultravox_api_url, "https://api.ultravox.ai");
    assert_eq!(config.max_calls, 50);
    assert_eq!(config.max_call, Duration::from_mins(30));
    assert_eq!((config.log_level, config.log_format), (Level::Info, LogFormat::Text));
    assert!(config.n8n_webhook_url.is_none());
    assert!(config.twilio_auth_token.is_none());
    assert!(config.first_message.is_none());
    assert!(config.agent_dir.is_none());
    assert!(config.ultravox_corpus_id.is_none());
    assert!(config.n8n_hmac_secret.is_none());
    assert!(config.n8n_auth_header.is_none());
    assert!(config.fallback_number.is_none());
    assert!(config.api_token.is_none());
    assert!(config.outgoing_allow.is_empty(), "no outgoing calls unless they are wanted");
    assert!(config.ssl_cert_file.is_none());
}

#[test]
fn an_empty_value_means_not_set() {
    let blank: Vec<(&str, &str)> = SETTINGS
        .into_iter()
        .filter(|name| !["ULTRAVOX_API_KEY", "PUBLIC_URL"].contains(name))
        .flat_map(|name| [(name, ""), (name, "  \t")])
        .collect();
    let config = settings(&blank).ok().unwrap();
    assert_eq!(config.port, 8_000);
    assert!(config.twilio_auth_token.is_none(), "an empty token would be a known key");
    assert!(config.n8n_hmac_secret.is_none());
    assert_eq!(config.data_dir, Path::new("data"));
}

#[test]
fn values_are_read_as_they_were_meant() {
    let config = settings(&[
        ("PUBLIC_URL", " https://bridge.example/phone// "),
        ("ULTRAVOX_API_URL", "http://127.0.0.1:9000/"),
        ("N8N_WEBHOOK_URL", "https://n8n.example/webhook/call?x=1"),
        ("PORT", " 0 "),
        ("BIND", "::1"),
        ("KEEP_DAYS", "0"),
        ("MAX_CALLS", "1"),
        ("MAX_CALL_SECONDS", "14400"),
        ("N8N_AUTH_HEADER", "X-Agent-Key: s3cret: with a colon "),
        ("FALLBACK_NUMBER", "+4930123456"),
        ("TWILIO_ACCOUNT_SID", "AC0123456789abcdef0123456789abcdef"),
        ("API_TOKEN", "0123456789abcdef"),
        ("OUTGOING_ALLOW", " +49, ,+4420 "),
        ("LOG_LEVEL", "debug"),
        ("LOG_FORMAT", "json"),
    ]);
    let config = config.ok().unwrap();
    assert_eq!(config.public_url, "https://bridge.example/phone");
    assert_eq!(config.ultravox_api_url, "http://127.0.0.1:9000");
    assert_eq!(config.n8n_webhook_url.unwrap(), "https://n8n.example/webhook/call?x=1");
    assert_eq!((config.port, config.bind.to_string()), (0, "::1".to_owned()));
    assert_eq!((config.keep, config.max_calls), (Duration::ZERO, 1));
    assert_eq!(config.max_call, Duration::from_hours(4));
    let (name, value) = config.n8n_auth_header.unwrap();
    assert_eq!((name.as_str(), value.reveal()), ("X-Agent-Key", "s3cret: with a colon"));
    assert_eq!(config.fallback_number.unwrap(), "+4930123456");
    assert_eq!(config.api_token.unwrap().reveal(), "0123456789abcdef");
    assert_eq!(config.outgoing_allow, ["+49", "+4420"]);
    assert_eq!((config.log_level, config.log_format), (Level::Debug, LogFormat::Json));
}

#[test]
fn a_wrong_setting_is_named_with_what_it_must_be() {
    let number = |least, most| format!("must be a whole number from {least} to {most}");
    let cases = [
        ("ULTRAVOX_API_KEY", "", "is missing (".to_owned()),
        ("PUBLIC_URL", "", "is missing (".to_owned()),
        ("PUBLIC_URL", "http://pbx.example", "is \"http://pbx.example\": must be https".to_owned()),
        ("PUBLIC_URL", "pbx.example", "must be an address that starts with https://".to_owned()),
        ("PUBLIC_URL", "https://", "must be an address that starts with https://".to_owned()),
        ("PUBLIC_URL", "wss://pbx.example", "must be an address that starts".to_owned()),
        ("PUBLIC_URL", "https://pbx.example/a b", "must be an address that starts".to_owned()),
        ("PUBLIC_URL", "https://pbx.example/?x=1", "must not have a ? or #".to_owned()),
        ("PUBLIC_URL", "https://pbx.example/#rc=2", "must not have a ? or #".to_owned()),
        ("PUBLIC_URL", "https://me:hush@pbx.example/x", "must not have a user name".to_owned()),
        ("PUBLIC_URL", "http://me@pbx.example", "must not have a user name".to_owned()),
        ("N8N_WEBHOOK_URL", "n8n.example/webhook/x", "must be an address that starts".to_owned()),
        ("ULTRAVOX_API_URL", "ftp://ultravox.example", "must be an address that".to_owned()),
        ("TWILIO_API_URL", "api.twilio.com", "must be an address that starts".to_owned()),
        ("PORT", "65536", number(0, 65_535)),
        ("PORT", "-1", number(0, 65_535)),
        ("PORT", "http", number(0, 65_535)),
        ("BIND", "localhost", "must be an IP address such as 0.0.0.0".to_owned()),
        ("KEEP_DAYS", "36501", number(0, 36_500)),
        ("MAX_CALLS", "0", number(1, 10_000)),
        ("MAX_CALLS", "10001", number(1, 10_000)),
        ("MAX_CALLS", "1.5", number(1, 10_000)),
        ("MAX_CALL_SECONDS", "9", number(10, 14_400)),
        ("MAX_CALL_SECONDS", "30m", number(10, 14_400)),
        ("TWILIO_ACCOUNT_SID", "SK0123456789abcdef0123456789abcdef", "must be AC and".to_owned()),
        ("TWILIO_ACCOUNT_SID", "AC123", "must be AC and 32 more characters".to_owned()),
        ("TWILIO_PHONE_NUMBER", "030 123456", "must be a number such as +4930123456".to_owned()),
        ("FALLBACK_NUMBER", "+49 30 123456", "must be a number such as +4930123456".to_owned()),
        ("N8N_AUTH_HEADER", "X-Agent-Key", "must be \"Name: value\"".to_owned()),
        ("N8N_AUTH_HEADER", "X-Agent-Key:", "must be \"Name: value\"".to_owned()),
        ("N8N_AUTH_HEADER", ": value", "must be \"Name: value\"".to_owned()),
        ("N8N_AUTH_HEADER", "two words: value", "must be \"Name: value\"".to_owned()),
        ("N8N_AUTH_HEADER", "X-Agent-Key: a\nX-Other: b", "must be \"Name: value\"".to_owned()),
        ("API_TOKEN", "0123456789abcde", "is too short: at least 16".to_owned()),
        ("OUTGOING_ALLOW", "+49,0044", "has \"0044\": must be like +49,+4420".to_owned()),
        ("OUTGOING_ALLOW", "+", "has \"+\": must be like +49,+4420".to_owned()),
        ("LOG_LEVEL", "INFO", "must be one of info, error, warn, debug".to_owned()),
        ("LOG_FORMAT", "xml", "is \"xml\": must be one of text, json".to_owned()),
    ];
    for (name, value, wanted) in cases {
        let found = complaints(&[(name, value)]);
        let [complaint] = found.as_slice() else {
            assert_eq!(found.len(), 1, "{name}={value}: {found:?}");
            continue;
        };
        assert!(complaint.starts_with(&format!("{name}  ")), "{name}={value}: {complaint}");
        assert!(complaint.contains(&wanted), "{name}={value}: {complaint}");
    }
}

#[test]
fn all_complaints_come_at_once_and_hold_no_secret() {
    let earlier = vec![".env  has a line that is not NAME=value".to_owned()];
    let values: HashMap<String, String> = [
        ("PUBLIC_URL", "http://pbx.example"),
        ("PORT", "many"),
        ("TWILIO_AUTH_TOKEN", "hush-1"),
        ("TWILIO_ACCOUNT_SID", "hush-2"),
        ("API_TOKEN", "hush-3"),
        ("N8N_HMAC_SECRET", "hush-4"),
        ("N8N_AUTH_HEADER", "hush-5 without a colon"),
        ("LOG_LEVEL", "loud"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    let found = Config::from_values(values, earlier).err().unwrap();
    let names: Vec<&str> = found.iter().filter_map(|text| text.split("  ").next()).collect();
    let wanted = [
        ".env",
        "ULTRAVOX_API_KEY",
        "PUBLIC_URL",
        "PORT",
        "TWILIO_ACCOUNT_SID",
        "API_TOKEN",
        "N8N_AUTH_HEADER",
        "LOG_LEVEL",
    ];
    assert_eq!(names, wanted, "{found:?}");
    assert!(!found.concat().contains("hush"), "{found:?}");
}

#[test]
fn what_needs_attention_is_counted_and_listed() {
    let text = |complaints: &[&str]| {
        let complaints: Vec<String> = complaints.iter().map(|text| (*text).to_owned()).collect();
        match needs_attention("setting", &complaints) {
            Stop::Misused(text) => text,
            Stop::Failed(text) => format!("as a failure: {text}"),
        }
    };
    assert_eq!(text(&["A  is x"]), "callbridge: 1 setting needs attention\n  A  is x");
    assert_eq!(
        text(&["A  is x", "B  is y"]),
        "callbridge: 2 settings need attention\n  A  is x\n  B  is y"
    );
}

#[test]
fn further_roots_come_from_a_pem_file() {
    let scratch = Scratch::new();
    let known = trusted_roots(None).unwrap().len();
    assert!(known > 50, "Mozilla's roots are there: {known}");

    let home_made = rcgen::generate_simple_self_signed(["n8n.example".to_owned()]).unwrap();
    let good = scratch.file("good.pem", home_made.cert.pem());
    assert_eq!(trusted_roots(Some(&good)).unwrap().len(), known + 1);

    let empty = scratch.file("empty.pem", "no certificate at all");
    let broken = scratch.file("broken.pem", "-----BEGIN CERTIFICATE-----\n!!\n");
    for path in [empty, broken, scratch.0.join("nowhere.pem")] {
        let complaint = trusted_roots(Some(&path)).unwrap_err();
        assert!(complaint.starts_with("SSL_CERT_FILE  "), "{complaint}");
        assert!(complaint.contains(&path.display().to_string()), "{complaint}");
    }
}

#[test]
fn a_phone_number_is_a_plus_and_7_to_15_digits() {
    for good in ["+1234567", "+4930123456", "+123456789012345"] {
        assert!(is_e164(good), "{good}");
    }
    let bad = ["", "+", "+123456", "+1234567890123456", "4930123456", "++4930123", "+49 30 123456"];
    for bad in bad.into_iter().chain(["+49-30-123", "+٤٩٣٠١٢٣٤", "+4930123456\n", "anonymous"])
    {
        assert!(!is_e164(bad), "{bad:?}");
    }
}

// ============================================================================
// 0. Before the call: the agent is data
// ============================================================================

/// A small agent without a mistake.
fn small_agent() -> Value {
    let built_in: Value = serde_json::from_str(include_str!("agent/agent.json")).unwrap();
    json!({
        "agent_name": "Ada",
        "company_name": "Example",
        "language": "en-GB",
        "first_message": "Hello.",
        "phrases": built_in["phrases"],
        "first_stage": "hello",
        "stages": {
            "hello": {"voice": "Mark", "prompt": "hello.md", "tools": ["go_on", "book", "bye"]},
            "second": {"voice": "Mark", "prompt": "second.md", "tools": ["note", "look", "bye"]},
        },
        "tools": {
            "go_on": {
                "description": "Goes on.",
                "parameters": {"type": "object", "properties": {"why": {"type": "string"}}},
                "enter_stage": {"stage": "second", "message": "Because: {why}."},
            },
            "book": {
                "description": "Books.",
                "parameters": {
                    "type": "object",
                    "properties": {"place": {"type": "string"}, "when": {"type": "string"}},
                    "required": ["place"],
                },
                "n8n": {"route": "3", "calendar": "place"},
                "timeout_s": 30,
            },
            "note": {"description": "Notes.", "reply": "Noted as {random_number}, {agent_name}."},
            "look": {"description": "Looks up.", "ultravox": {"tool": "queryCorpus"}},
            "bye": {"description": "Ends the call.", "hang_up": true},
        },
        "calendars": {"Berlin": "berlin@example.com"},
    })
}

/// The prompt of `hello` has its last placeholder in line 3.
const HELLO: &str = "You are {agent_name}.\n\nToday is {now}. {\"json\": \"is not a placeholder\"}";

fn read_agent(agent: &str, hello: &str) -> Result<Agent, Vec<String>> {
    Agent::from_files(&|name| match name {
        "agent.json" => Ok(agent.to_owned()),
        "hello.md" => Ok(hello.to_owned()),
        "second.md" => Ok("Say goodbye.".to_owned()),
        _ => Err("is not here".to_owned()),
    })
}

fn mistakes(agent: &Value, hello: &str) -> Vec<String> {
    read_agent(&agent.to_string(), hello).err().unwrap_or_default()
}

#[test]
fn the_built_in_agent_has_three_stages_and_no_mistakes() {
    let config = settings(&[
        ("N8N_WEBHOOK_URL", "https://n8n.example/webhook/call"),
        ("ULTRAVOX_CORPUS_ID", "corpus-1"),
    ]);
    let agent = Agent::load(&config.ok().unwrap()).ok().unwrap();
    assert_eq!((agent.name.as_str(), agent.first_stage.as_str()), ("Sara", "greeting"));
    assert_eq!(agent.stages.len(), 3);
    let meetings = "schedule_meeting submit_claim move_to_call_summary";
    for (name, voice, tools) in [
        ("greeting", "Tanya-English", "verify move_to_main_convo"),
        ("main_convo", "Mark", meetings),
        ("call_summary", "Tanya-English", ""),
    ] {
        let stage = &agent.stages[name];
        assert_eq!(stage.voice, voice, "{name}");
        for tool in ["queryCorpus", "hangUp"].into_iter().chain(tools.split_whitespace()) {
            assert!(stage.tools.iter().any(|own| own == tool), "{name} lacks {tool}");
        }
    }
    let books = |stage: &str| agent.stages[stage].tools.iter().any(|own| own == "schedule_meeting");
    assert!(!books("greeting") && !books("call_summary"), "nobody books before they are known");
    assert!(agent.stages.values().all(|stage| stage.prompt.len() > 200), "prompts were read");
    assert_eq!(agent.stages["main_convo"].agent_name.as_deref(), Some("Mark"));
}

#[test]
fn a_tool_that_could_only_fail_is_not_offered() {
    let agent = Agent::load(&settings(&[]).ok().unwrap()).ok().unwrap();
    let offered: Vec<&String> = agent.stages.values().flat_map(|stage| &stage.tools).collect();
    let is_offered = |name: &str| offered.iter().any(|tool| *tool == name);
    assert!(!is_offered("schedule_meeting"), "there is no n8n");
    assert!(!is_offered("queryCorpus"), "there is no corpus");
    assert!(is_offered("verify") && is_offered("submit_claim") && is_offered("hangUp"));
}

#[test]
fn first_message_in_the_settings_wins() {
    let agent = Agent::load(&settings(&[("FIRST_MESSAGE", "Welcome.")]).ok().unwrap());
    assert_eq!(agent.ok().unwrap().first_message, "Welcome.");
}

#[test]
fn an_agent_is_read_from_a_directory() {
    let scratch = Scratch::new();
    for (name, text) in BUILT_IN_AGENT {
        scratch.file(name, text.replace("SecureLife", "HomeMade"));
    }
    let directory = scratch.0.display().to_string();
    let config = settings(&[("AGENT_DIR", &directory)]).ok().unwrap();
    assert_eq!(Agent::load(&config).ok().unwrap().company, "HomeMade Insurance");

    fs::remove_file(scratch.0.join("greeting.md")).unwrap();
    let found = Agent::load(&config).err().unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("greeting.md  cannot be read from "), "{found:?}");
    assert!(found[0].ends_with("(stages.greeting.prompt)"), "{found:?}");
}

#[test]
fn a_small_agent_has_no_mistakes_and_sensible_defaults() {
    let agent = read_agent(&small_agent().to_string(), HELLO).ok().unwrap();
    assert_eq!(agent.stages["hello"].prompt, HELLO);
    assert_eq!(agent.tools["book"].within, Duration::from_secs(30));
    let note = &agent.tools["note"];
    assert_eq!(note.within, Duration::from_secs(10), "the default");
    assert_eq!(note.parameters.kind, "object");
    assert!(note.parameters.properties.is_empty() && note.parameters.required.is_empty());
    assert!(matches!(&note.action, ToolAction::Reply(text) if text.starts_with("Noted")));
}

/// A slip of the pen, and how the complaint about it must begin.
type Slip = (fn(&mut Value), &'static str);

const SLIPS: [Slip; 38] = [
    (|a| take(a, "company_name"), "agent.json  missing field `company_name`"),
    (|a| a["greetings"] = json!("Hi"), "agent.json  unknown field `greetings`"),
    (|a| a["language"] = json!(7), "agent.json  invalid type: integer `7`, expected a string"),
    (|a| take(&mut a["phrases"], "busy"), "agent.json  missing field `busy`"),
    (|a| a["phrases"]["bye"] = json!(""), "agent.json  unknown field `bye`"),
    (|a| a["first_stage"] = json!("hullo"), "agent.json  first_stage is \"hullo\", which is no"),
    (
        |a| take(&mut a["stages"]["hello"], "voice"),
        "agent.json  stages.hello missing field `voice`",
    ),
    (|a| a["stages"]["hello"]["tool"] = json!([]), "agent.json  stages.hello unknown field `tool`"),
    (|a| a["stages"]["hello"]["voice"] = json!(""), "agent.json  stages.hello.voice must be a"),
    (
        |a| a["stages"]["hello"]["voice"] = json!("v".repeat(41)),
        "agent.json  stages.hello.voice must be a voice's name or id, 1 to 40 characters",
    ),
    (
        |a| a["stages"]["hello"]["prompt"] = json!("hallo.md"),
        "hallo.md  is not here (stages.hello.prompt)",
    ),
    (
        |a| a["stages"]["hello"]["tools"] = json!(["go_on", "boook"]),
        "agent.json  stages.hello.tools names \"boook\", which is no tool",
    ),
    (
        |a| a["stages"]["third"] = a["stages"]["hello"].clone(),
        "agent.json  stages.third is entered by no tool of a stage that is entered",
    ),
    (
        |a| a["stages"]["hello"]["tools"] = json!(["book", "bye"]),
        "agent.json  stages.second is entered by no tool",
    ),
    (|a| a["tools"]["note"] = json!([]), "agent.json  tools.note "),
    (
        |a| take(&mut a["tools"]["note"], "description"),
        "agent.json  tools.note missing field `description`",
    ),
    (
        |a| take(&mut a["tools"]["note"], "reply"),
        "agent.json  tools.note must do exactly one of enter_stage, n8n, reply, hang_up, ",
    ),
    (
        |a| a["tools"]["note"]["hang_up"] = json!(true),
        "agent.json  tools.note must do exactly one of",
    ),
    (|a| a["tools"]["note"]["timeout"] = json!(5), "agent.json  tools.note must do exactly one of"),
    (
        |a| a["tools"]["go_on"]["enter_stage"]["sound"] = json!("gong"),
        "agent.json  tools.go_on must do exactly one of",
    ),
    (
        |a| a["tools"]["book"]["n8n"] = json!({"calendar": "place"}),
        "agent.json  tools.book must do exactly one of",
    ),
    (
        |a| a["tools"]["book now"] = a["tools"]["book"].clone(),
        "agent.json  tools.book now must be named with 1 to 64 letters, digits, _ and -",
    ),
    (
        |a| a["tools"]["b".repeat(65)] = a["tools"]["book"].clone(),
        "agent.json  tools.bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb must",
    ),
    (
        |a| a["tools"]["book"]["timeout_s"] = json!(0),
        "agent.json  tools.book.timeout_s must be from 1 to 30",
    ),
    (
        |a| a["tools"]["book"]["timeout_s"] = json!(31),
        "agent.json  tools.book.timeout_s must be from 1 to 30",
    ),
    (
        |a| a["tools"]["book"]["timeout_s"] = json!(-1),
        "agent.json  tools.book invalid value: integer `-1`, expected u64",
    ),
    (
        |a| a["tools"]["book"]["parameters"]["type"] = json!("string"),
        "agent.json  tools.book.parameters.type must be \"object\"",
    ),
    (
        |a| take(&mut a["tools"]["book"]["parameters"], "properties"),
        "agent.json  tools.book missing field `properties`",
    ),
    (
        |a| a["tools"]["book"]["parameters"]["properties"]["when"] = json!({"type": "date"}),
        "agent.json  tools.book.parameters.properties.when.type must be one of string, number",
    ),
    (
        |a| a["tools"]["book"]["parameters"]["properties"]["when"] = json!("string"),
        "agent.json  tools.book.parameters.properties.when.type must be one of string, number",
    ),
    (
        |a| a["tools"]["book"]["parameters"]["required"] = json!(["plaice"]),
        "agent.json  tools.book.parameters.required names \"plaice\", which is not among the",
    ),
    (
        |a| a["tools"]["book"]["n8n"]["calendar"] = json!("location"),
        "agent.json  tools.book has no parameter \"location\" for n8n.calendar",
    ),
    (|a| take(a, "calendars"), "agent.json  tools.book needs calendars, and there are none"),
    (
        |a| a["calendars"]["Rome"] = json!("rome.example.com"),
        "agent.json  calendars.Rome must be an e-mail address",
    ),
    (
        |a| a["tools"]["bye"]["hang_up"] = json!(false),
        "agent.json  tools.bye must say true behind hang_up or transfer",
    ),
    (
        |a| a["tools"]["bye"] = json!({"description": "To a person.", "transfer": false}),
        "agent.json  tools.bye must say true behind hang_up or transfer",
    ),
    (
        |a| a["tools"]["note"]["reply"] = json!("Noted: {full_name}."),
        "agent.json  tools.note uses {full_name}, which is not one of its parameters",
    ),
    (
        |a| a["tools"]["go_on"]["enter_stage"]["stage"] = json!("third"),
        "agent.json  tools.go_on enters \"third\", which is no stage",
    ),
];

fn take(object: &mut Value, key: &str) {
    object.as_object_mut().unwrap().remove(key).unwrap();
}

#[test]
fn every_slip_in_the_agent_file_is_named_with_its_place() {
    assert_eq!(mistakes(&small_agent(), HELLO), Vec::<String>::new());
    for (number, (slip, wanted)) in SLIPS.iter().enumerate() {
        let mut agent = small_agent();
        slip(&mut agent);
        let found = mistakes(&agent, HELLO);
        let named = found.iter().any(|mistake| mistake.starts_with(wanted));
        assert!(named, "slip {number}, \"{wanted}\" is not among {found:#?}");
    }
}

#[test]
fn a_slip_in_a_file_is_named_with_its_line() {
    let cases = [
        ("{\"agent_name\": \"Ada\",\n oops", HELLO, "agent.json  ", "at line 2 column"),
        ("", HELLO, "agent.json  ", "at line 1 column 0"),
        ("{}", HELLO, "agent.json  missing field `agent_name`", "at line 1 column 2"),
    ];
    for (agent, hello, begins, ends) in cases {
        let found = read_agent(agent, hello).err().unwrap();
        assert_eq!(found.len(), 1, "{agent}: {found:?}");
        assert!(found[0].starts_with(begins) && found[0].contains(ends), "{agent}: {found:?}");
    }
    let prompts = [
        ("", "hello.md  is empty (stages.hello)"),
        (" \n\t\n", "hello.md  is empty (stages.hello)"),
        ("Hi\n\nyou, {customer}", "hello.md:3  {customer} is not known: use one of agent_name, "),
        ("{now} and {random_number}", "hello.md:1  {random_number} is not known: use one of "),
    ];
    for (hello, wanted) in prompts {
        let found = mistakes(&small_agent(), hello);
        assert_eq!(found.len(), 1, "{hello:?}: {found:?}");
        assert!(found[0].starts_with(wanted), "{hello:?}: {found:?}");
    }
    let found = Agent::from_files(&|_| Err("cannot be read".to_owned())).err().unwrap();
    assert_eq!(found, ["agent.json  cannot be read"]);
}

#[test]
fn all_slips_are_named_at_once() {
    let mut agent = small_agent();
    let slips = [8, 11, 24, 26, 33, 34, 35];
    for number in slips {
        (SLIPS[number].0)(&mut agent);
    }
    let found = mistakes(&agent, "{what}\n{ever}");
    let prompt = ["hello.md:1  {what} is not known", "hello.md:2  {ever} is not known"];
    for wanted in slips.iter().map(|number| SLIPS[*number].1).chain(prompt) {
        let named = found.iter().any(|mistake| mistake.starts_with(wanted));
        assert!(named, "\"{wanted}\" is not among {found:#?}");
    }
}

// ============================================================================
// 0. Before the call: the front door
// ============================================================================

#[test]
fn only_a_get_of_the_media_stream_goes_to_step_5() {
    let yes = ["/media-stream", "/media-stream/", "/media-stream?x=1", "/media-stream/?x=1"];
    for path in yes {
        let head = format!("GET {path} HTTP/1.1\r\nHost: h\r\n\r\n");
        assert!(wants_media_stream(head.as_bytes()), "{path}");
    }
    let no = [
        "GET /media-streams HTTP/1.1\r\n\r\n",
        "GET /media-stream/x HTTP/1.1\r\n\r\n",
        "GET /media-stream/../health HTTP/1.1\r\n\r\n",
        "GET /Media-Stream HTTP/1.1\r\n\r\n",
        "GET //media-stream HTTP/1.1\r\n\r\n",
        "GET /media-stream",
        "GET /health?/media-stream HTTP/1.1\r\n\r\n",
        "POST /media-stream HTTP/1.1\r\n\r\n",
        "POST /incoming-call HTTP/1.1\r\n\r\nGET /media-stream HTTP/1.1\r\n\r\n",
        "",
    ];
    for head in no {
        assert!(!wants_media_stream(head.as_bytes()), "{head}");
    }
}

/// Two ends of one connection on loopback.
fn sockets() -> (Arc<TcpStream>, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (near, _) = listener.accept().unwrap();
    for socket in [&near, &far] {
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.set_write_timeout(Some(DEADLINE)).unwrap();
    }
    (Arc::new(near), far)
}

#[test]
fn a_head_is_read_to_its_empty_line_with_what_came_along() {
    let request = "POST /incoming-call HTTP/1.1\r\nHost: h\r\nX: \u{e9}\r\n\r\nFrom=%2B49";
    let (near, mut far) = sockets();
    for byte in request.bytes() {
        far.write_all(&[byte]).unwrap();
    }
    drop(far);
    let head = read_head(&near).unwrap();
    let end = find(&head, b"\r\n\r\n").unwrap() + 4;
    assert!(request.as_bytes().starts_with(&head), "nothing is lost or made up");
    let mut rest = head[end..].to_vec();
    (&*near).read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"From=%2B49", "what was not read with the head is still there");
}

#[test]
fn what_is_not_a_request_is_refused_at_the_door() {
    let long = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(2 * HEAD_BYTES_MAX));
    let cases: [(&[u8], &str); 10] = [
        (b"", "Left"),
        (b"GET / HTTP/1.1\r\nHost: h\r\n", "Left"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "Tls"),
        (b"get / HTTP/1.1\r\n\r\n", "NotHttp"),
        (b"\r\nGET / HTTP/1.1\r\n\r\n", "NotHttp"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "NotHttp"),
        (b"GET /\r\n\r\n", "NotHttp"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "NotHttp"),
        (b"\xff\xff\xff\xff", "NotHttp"),
        (long.as_bytes(), "TooLong"),
    ];
    for (bytes, wanted) in cases {
        let (near, mut far) = sockets();
        far.write_all(bytes).unwrap();
        drop(far);
        let refusal = read_head(&near).unwrap_err();
        let begin = String::from_utf8_lossy(&bytes[..bytes.len().min(30)]).into_owned();
        assert_eq!(format!("{refusal:?}"), wanted, "{begin:?}");
    }
}

// ============================================================================
// 1. Ring: Twilio's signature and form
// ============================================================================

/// Twilio's own example, in the tests of all its libraries.
const URL: &str = "https://mycompany.com/myapp.php?foo=1&bar=2";
const CALL: &[(&str, &str)] = &[
    ("CallSid", "CA1234567890ABCDE"),
    ("Caller", "+14158675309"),
    ("Digits", "1234"),
    ("From", "+14158675309"),
    ("To", "+18005551212"),
];
const CALL_AND_REASONS: &[(&str, &str)] = &[
    ("CallSid", "CA1234567890ABCDE"),
    ("Caller", "+14158675309"),
    ("Digits", "1234"),
    ("From", "+14158675309"),
    ("To", "+18005551212"),
    ("Reason", "Participant"),
    ("ReasonConferenceEnded", "test"),
];
const CALL_OF_THE_DOCS: &[(&str, &str)] = &[
    ("CallSid", "CA1234567890ABCDE"),
    ("Caller", "+14158675310"),
    ("Digits", "1234"),
    ("From", "+14158675310"),
    ("To", "+18005551212"),
];
const CALL_OF_THE_OLDER_DOCS: &[(&str, &str)] = &[
    ("CallSid", "CA1234567890ABCDE"),
    ("Caller", "+12349013030"),
    ("Digits", "1234"),
    ("From", "+12349013030"),
    ("To", "+18005551212"),
];

/// Row in the table of published vectors, URL, form, signature.
type Vector = (u32, &'static str, &'static [(&'static str, &'static str)], &'static str);

/// All of Twilio's published vectors for form posts, made with the Auth Token `12345`. Rows 9 to
/// 11 are missing on purpose: they sign a JSON body by its hash in the URL, and Twilio's voice
/// webhooks are form posts. Row 30 is one that must not verify: see below. Rows 40 and 41 are the
/// upgrade of the media stream, which has no form.
const VECTORS: [Vector; 38] = [
    (1, URL, CALL, "RSOYDt4T1cUTdK1PDd93/VVr8B8="),
    (2, "https://mycompany.com:443/myapp.php?foo=1&bar=2", CALL, "kvajT1Ptam85bY51eRf/AJRuM3w="),
    (3, "http://mycompany.com:80/myapp.php?foo=1&bar=2", CALL, "0ZXoZLH/DfblKGATFgpif+LLRf4="),
    (4, "http://mycompany.com/myapp.php?foo=1&bar=2", CALL, "OyGYPqTF6ztdbRNCvuQO/oPvqQ4="),
    (5, "http://mycompany.com:1234/myapp.php?foo=1&bar=2", CALL, "Zmvh+3yNM1Phv2jhDCwEM3q5ebU="),
    (6, "https://mycompany.com:1234/myapp.php?foo=1&bar=2", CALL, "CYn1h0gLBdNxDGkKJg6hYohgeD8="),
    (
        7,
        URL,
        &[
            ("Sid", "CA123"),
            ("SidAccount", "AC123"),
            ("Digits", "5678"),
            ("Digits", "1234"),
            ("Digits", "1234"),
        ],
        "IK+Dwps556ElfBT0I3Rgjkr1wJU=",
    ),
    (
        8,
        URL,
        &[
            ("MessagingBinding.Address", "+1325xxxxxxx"),
            ("MessagingBinding.Address", "+1415xxxxxxx"),
        ],
        "83O6e2vORAoJHUNzJjDWN1jz+BA=",
    ),
    (
        8,
        URL,
        &[
            ("MessagingBinding.Address", "+1415xxxxxxx"),
            ("MessagingBinding.Address", "+1325xxxxxxx"),
        ],
        "83O6e2vORAoJHUNzJjDWN1jz+BA=",
    ),
    (
        12,
        "https://user:pass@mycompany.com/myapp.php?foo=1&bar=2",
        CALL,
        "CukzLTc1tT5dXEDIHm/tKBanW10=",
    ),
    (13, "https://user@mycompany.com/myapp.php?foo=1&bar=2", CALL, "2YRLlVAflCqxaNicjMpJcSTgzSs="),
    (
        14,
        "https://user:pass@mycompany.com:443/myapp.php?foo=1&bar=2",
        CALL,
        "ZQFR1PTIZXF2MXB8ZnKCvnnA+rI=",
    ),
    (
        15,
        "https://user@mycompany.com:443/myapp.php?foo=1&bar=2",
        CALL,
        "aZfj4hyX1MLZhSS6QIL18Vn2/RA=",
    ),
    (
        16,
        "https://mycompany.com/myapp.php?foo=1&bar=2&Body=It%27s+amazing",
        CALL,
        "TfZzewPq8wqrGlMfyAud8+/IvJ0=",
    ),
    (17, URL, &[], "zYQTYrRWXE7LtzbG4PfP7/bkkGo="),
    (18, "https://mycompany.com/myapp.php", CALL, "1xaxFBvyzXYvWplzNOSs28HWO94="),
    (
        19,
        "https://mycompany.com/myapp.php?foo=1&bar=2\
         &type=thiswontbeusedinthesignaturegeneratorandsoshouldbeignored",
        CALL,
        "hYkNsTBttoNGkyCS0p+wWmQoRTg=",
    ),
    (
        20,
        "https://mycompany.com/myapp.php?foo=hello%20world&bar=test%2Bvalue",
        CALL,
        "er2tvAP1Wx+iuTTE2BPgvEaN1cs=",
    ),
    (
        21,
        URL,
        &[
            ("Message", "Hello & goodbye! @#$%^*()"),
            ("From", "+1 (415) 867-5309"),
            ("Special", "unicode: ñáéíóú"),
        ],
        "dCPiR4WtQ6QFN6pJh81CtlCcWLQ=",
    ),
    (
        22,
        URL,
        &[("Digits", ""), ("CallSid", "CA1234567890ABCDE"), ("EmptyParam", "")],
        "9HHp/OqQMEwdrVebHDdA/+tqjX8=",
    ),
    (
        23,
        URL,
        &[("Digits", ""), ("CallSid", "CA1234567890ABCDE"), ("NullParam", "")],
        "L9lTTwIlxM1xGAtLRwhOSZggRhM=",
    ),
    (
        24,
        URL,
        &[("Zebra", "last"), ("Alpha", "first"), ("Beta", "second"), ("Gamma", "third")],
        "enveUe73ZTVLAekHxez3Qx6JuuQ=",
    ),
    (
        25,
        URL,
        &[("callSid", "lowercase"), ("CallSid", "uppercase"), ("CALLSID", "allcaps")],
        "jDK7WKT8wiNrwggd4ceTv4e1MJ4=",
    ),
    (26, "https://mycompany.com/webhook/España?año=2023", CALL, "G/Hx6mqqnjUNlPAoi2Sp9bGst0g="),
    (27, "https://mycompany.com:443//myapp.php?foo=1&bar=2", CALL, "A9lH3u16NjyiiM/+wylw5rirFUs="),
    (28, URL, CALL_AND_REASONS, "vOEb5UThFn24KEfnOFLQY2AE5FY="),
    (
        29,
        "http://mycompany.com/myapp.php?foo=1&bar=2",
        CALL_AND_REASONS,
        "n2xBNyzSW7rfYStDtOFiFMv7qNo=",
    ),
    (31, URL, &[("property", "value"), ("boolean", "true")], "NBdBDr/T/lgjI+tlgpXjKZQZs/k="),
    (32, "https://MyCompany.com/myapp.php?foo=1&bar=2", CALL, "g9IN/x4Cft2g517EjYvEvM/W7LU="),
    (33, "https://MyCompany.com:1234/myapp.php?foo=1&bar=2", CALL, "PCqOZm8cnu/L6+u5i5fuEd+Iac4="),
    (34, "http://MyCompany.com/myapp.php?foo=1&bar=2", CALL, "XY7AlKOKL6im4yWyX84gldUrtis="),
    (
        35,
        "http://username:password@MyCompany.com/myapp.php?foo=1&bar=2",
        CALL,
        "PJ08CxXr7KLPjEQCTc8LkUSMwSM=",
    ),
    (
        36,
        "http://Username:Password@MyCompany.com/myapp.php?foo=1&bar=2",
        CALL,
        "SkTSKyDJH9kUlhItI0slbgZ1UsI=",
    ),
    (
        37,
        "HTTP://username:password@MyCompany.com/myapp.php?foo=1&bar=2",
        CALL,
        "hy/l8pca+LFms4cvRdv8uiP6NGc=",
    ),
    (
        38,
        "https://example.com/myapp.php?foo=1&bar=2",
        CALL_OF_THE_DOCS,
        "L/OH5YylLD5NRKLltdqwSvS0BnU=",
    ),
    (39, URL, CALL_OF_THE_OLDER_DOCS, "0/KCTR6DLpKmkAf8muzZqo1nDgQ="),
    (40, "wss://mycompany.com/media-stream", &[], "N2Y//FHA042H22oVtTOPT1X3yoU="),
    (41, "wss://mycompany.com/media-stream/", &[], "B+WT+LSnUu+RWlK9v/62zQuXpec="),
];

/// The form goes over the wire first, as Twilio sends it: `+` becomes `%2B`, a blank becomes `+`.
fn verifies(token: &str, url: &str, form: &[(&str, &str)], signature: &str) -> bool {
    let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
    signature_is_valid(&Secret(token.to_owned()), url, &Form::parse(body.as_bytes()), signature)
}

fn signature_of_row(wanted: u32) -> &'static str {
    let row = VECTORS.iter().find(|(row, ..)| *row == wanted);
    row.map(|(_, _, _, signature)| *signature).unwrap()
}

#[test]
fn twilios_published_signatures_are_accepted() {
    for (row, url, form, signature) in VECTORS {
        assert!(verifies("12345", url, form, signature), "row {row}");
        let mut backwards = form.to_vec();
        backwards.reverse();
        assert!(verifies("12345", url, &backwards, signature), "row {row}, form in another order");
    }
}

#[test]
fn a_signature_is_accepted_with_and_without_the_port() {
    let with_port = |port: u32| format!("https://mycompany.com:{port}/myapp.php?foo=1&bar=2");
    let plain_with_port = |port: u32| format!("http://mycompany.com:{port}/myapp.php?foo=1&bar=2");
    let plain = "http://mycompany.com/myapp.php?foo=1&bar=2".to_owned();
    let cases = [
        (1, with_port(443), CALL),
        (1, with_port(1_234), CALL),
        (2, URL.to_owned(), CALL),
        (3, plain.clone(), CALL),
        (4, plain_with_port(80), CALL),
        (4, plain_with_port(1_234), CALL),
        (29, plain_with_port(1_234), CALL_AND_REASONS),
        (40, "wss://mycompany.com:443/media-stream".to_owned(), &[]),
    ];
    for (row, url, form) in cases {
        assert!(verifies("12345", &url, form, signature_of_row(row)), "row {row} for {url}");
    }
}

/// What is wrong, URL, form, signature.
type Wrong<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)], &'a str);

#[test]
fn a_wrong_signature_is_refused() {
    let row_1 = signature_of_row(1);
    let not_row_1 = format!("NOT{row_1}");
    let cases: [Wrong; 20] = [
        ("row 30: names in the wrong order", URL, CALL_AND_REASONS, "95+Bu0JVPi0r/SsESZCVf0dWAjw="),
        ("NOT and row 1", URL, CALL, &not_row_1),
        ("empty, or no header at all", URL, CALL, ""),
        ("row 1 for row 32", "https://MyCompany.com/myapp.php?foo=1&bar=2", CALL, row_1),
        ("row 1 for row 33", "https://MyCompany.com:1234/myapp.php?foo=1&bar=2", CALL, row_1),
        ("row 1 for row 34", "http://MyCompany.com/myapp.php?foo=1&bar=2", CALL, row_1),
        ("the docs' first sample", URL, CALL, "Np1nax6uFoY6qpfT5l9jWwJeit0="),
        ("the docs' second sample", URL, CALL, "hqeF3G9Hrnv6/R0jOhoYDD2PPUs="),
        ("row 1 without its form", URL, &[], row_1),
        ("row 17 with a form", URL, CALL, signature_of_row(17)),
        ("row 1 with one value changed", URL, CALL_OF_THE_DOCS, row_1),
        ("row 1 with one more field", URL, CALL_AND_REASONS, row_1),
        ("row 1 for http", "http://mycompany.com/myapp.php?foo=1&bar=2", CALL, row_1),
        ("row 1, query turned round", "https://mycompany.com/myapp.php?bar=2&foo=1", CALL, row_1),
        ("row 1 for another path", "https://mycompany.com/myapp.php/?foo=1&bar=2", CALL, row_1),
        (
            "row 5 for another port",
            "http://mycompany.com:1235/myapp.php?foo=1&bar=2",
            CALL,
            signature_of_row(5),
        ),
        ("row 40 for https", "https://mycompany.com/media-stream", &[], signature_of_row(40)),
        ("row 1, cut short", URL, CALL, &row_1[..24]),
        ("row 1 without its padding", URL, CALL, row_1.trim_end_matches('=')),
        ("not base64", URL, CALL, "é/Ω not base64 at all ="),
    ];
    for (why, url, form, signature) in cases {
        assert!(!verifies("12345", url, form, signature), "{why}");
    }
    for token in ["", "12346", "123456", "1234"] {
        assert!(!verifies(token, URL, CALL, row_1), "row 1 with the token {token:?}");
    }
    let urlsafe = row_1.replace('/', "_");
    assert!(!verifies("12345", URL, CALL, &urlsafe), "base64 of the other alphabet");
}

#[test]
fn a_url_is_tried_with_and_without_its_port() {
    let cases = [
        ("https://h/p", "https://h/p", "https://h:443/p"),
        ("http://h/p", "http://h/p", "http://h:80/p"),
        ("wss://h/p", "wss://h/p", "wss://h:443/p"),
        ("https://h:8443/p?a=1:2", "https://h/p?a=1:2", "https://h:8443/p?a=1:2"),
        ("https://h", "https://h", "https://h:443"),
        ("https://h:8443", "https://h", "https://h:8443"),
        ("https://h?to=sip:x@y:5060", "https://h?to=sip:x@y:5060", "https://h:443?to=sip:x@y:5060"),
        ("https://u:p@h/p@q:1", "https://u:p@h/p@q:1", "https://u:p@h:443/p@q:1"),
        ("https://u:1@h:2/p", "https://u:1@h/p", "https://u:1@h:2/p"),
        ("https://[::1]/p", "https://[::1]/p", "https://[::1]:443/p"),
        ("https://[::1]:8443/p", "https://[::1]/p", "https://[::1]:8443/p"),
        ("/p", "/p", "/p"),
        ("", "", ""),
    ];
    for (url, without, with) in cases {
        assert_eq!(url_with_and_without_port(url), [without, with], "{url}");
    }
}

#[test]
fn a_form_is_decoded_whatever_is_in_it() {
    let body = "CallSid=CA1&From=%2B4930123456&CallerName=J%C3%BCrgen+M%C3%BCller&FromCity=&\
                StirVerstat=NULL&New.Field_7=x%26y%3Dz&&Bare&=nameless&CallSid=CA2&Bad=%ff%zz";
    let form = Form::parse(body.as_bytes());
    let cases = [
        ("CallSid", "CA1"),
        ("From", "+4930123456"),
        ("CallerName", "Jürgen Müller"),
        ("FromCity", ""),
        ("New.Field_7", "x&y=z"),
        ("Bare", ""),
        ("", "nameless"),
        ("Bad", "\u{fffd}%zz"),
        ("callsid", ""),
        ("Absent", ""),
    ];
    for (name, value) in cases {
        assert_eq!(form.get(name), value, "{name}");
    }
    assert_eq!(form.0.len(), 10, "a field that comes twice is kept twice: {:?}", form.0);
    for body in [b"".as_slice(), b"&&&", b"\xff\xfe"] {
        assert_eq!(Form::parse(body).get("CallSid"), "");
    }
}

#[test]
fn the_owner_shows_a_token_as_bearer_or_as_a_password() {
    let cases = [
        ("Bearer abc", Some("abc")),
        ("bearer  abc ", Some("abc")),
        ("Basic dXNlcjphYmM=", Some("abc")),
        ("BASIC OmE6Yg==", Some("a:b")),
        ("Basic bm8gY29sb24=", None),
        ("Basic !!", None),
        ("Basic /zr/", None),
        ("Digest abc", None),
        ("abc", None),
        ("", None),
    ];
    for (header, wanted) in cases {
        assert_eq!(shown_token(header).as_deref(), wanted, "{header}");
    }
}

#[test]
fn a_call_id_is_letters_and_digits() {
    for good in ["CA1234567890abcdef1234567890abcdef", "CA", "x9", &"a".repeat(64)] {
        assert!(is_sid(good), "{good}");
    }
    let long = "a".repeat(65);
    for bad in ["", "C", "../../etc/passwd", "CA/1", "CA.1", "CA 1", "CA-1", "CÄ1", "CA\0", &long]
    {
        assert!(!is_sid(bad), "{bad:?}");
    }
}

// ============================================================================
// 2. Greeting: what n8n may answer
// ============================================================================

/// What comes of a reply. The word for certainty matters to bookings: what was certainly not done
/// may be tried again.
#[derive(Clone, Copy)]
enum Understood {
    Says(&'static str),
    /// Advice begins so; the workflow may have done its work.
    PerhapsDone(&'static str),
    /// Advice begins so; the workflow has not run.
    NotDone(&'static str),
}
use Understood::{NotDone, PerhapsDone, Says};

const NOT_ACTIVE: &str = "{\"code\":404,\"message\":\"The requested webhook \\\"POST nope\\\" is \
    not registered.\",\"hint\":\"The workflow must be active for a production URL to run \
    successfully. You can activate the workflow using the toggle in the top-right of the editor. \
    Note that unlike test URL calls, production URL calls aren't shown on the canvas (only in the \
    executions list)\"}";
const TEST_URL: &str = "{\"code\":404,\"message\":\"The requested webhook \\\"call\\\" is not \
    registered.\",\"hint\":\"Click the 'Execute workflow' button on the canvas, then try again. \
    (In test mode, the webhook only works for one call after you click this button)\"}";
const OTHER_METHOD: &str = "{\"code\":404,\"message\":\"This webhook is not registered for GET \
    requests. Did you mean to make a POST request?\"}";
const CANNOT_POST: &str = "<!DOCTYPE html>\n<html lang=\"en\">\n<body>\n<pre>Cannot POST \
    /webhook</pre>\n</body>\n</html>\n";
const BAD_BODY: &str = "{\"code\":422,\"message\":\"Failed to parse request body\",\"hint\":\
    \"Expected double-quoted property name in JSON at position 13\"}";
const NO_ITEM: &str = "{\"code\":0,\"message\":\"No item to return was found\"}";
const UNUSED_NODE: &str =
    "{\"code\":0,\"message\":\"Unused Respond to Webhook node found in the workflow\"}";
const NO_NODE: &str =
    "{\"code\":0,\"message\":\"No Respond to Webhook node found in the workflow\"}";
const PROBLEM: &str = "{\"code\":0,\"message\":\"There was a problem executing the workflow\"}";
const TIMED_OUT: &str =
    "{\"code\":0,\"message\":\"The execution was cancelled because it timed out\"}";
const ECHO: &str = "{\"headers\":{},\"params\":{},\"query\":{},\"body\":{\"route\":\"1\"},\
    \"webhookUrl\":\"http://127.0.0.1:5678/webhook/call\",\"executionMode\":\"production\"}";
const ACTIVATE: &str = "activate (publish) the workflow";
const EXECUTIONS: &str = "the workflow failed: see n8n's Executions";
const EMPTY: &str = "the workflow failed, or took a branch without a Respond node";
const AUTHENTICATE: &str = "the Webhook node wants authentication: set N8N_AUTH_HEADER";
const RESPOND: &str = "set the Webhook node's Respond to";
const NO_TEXT: &str = "answer {\"firstMessage\": …} to route 1";
const SAME_SECRET: &str = "N8N_HMAC_SECRET and the field of the workflow's node Secret";
const NO_BRANCH: &str = "no branch for this route: callbridge workflow prints one";
const HELLO_JSON: &str = "{\"firstMessage\":\"Hello\"}";

/// What n8n 2.8.4 and 2.40.7 were seen to answer: case, status, body, what comes of it.
type Observed = (&'static str, u16, &'static str, Understood);

const OBSERVED: [Observed; 43] = [
    ("not active, or no such path", 404, NOT_ACTIVE, NotDone(ACTIVATE)),
    ("test URL", 404, TEST_URL, NotDone("N8N_WEBHOOK_URL is the test URL")),
    ("wrong method", 404, OTHER_METHOD, NotDone("set the Webhook node's HTTP method to POST")),
    ("not a webhook URL", 404, CANNOT_POST, NotDone("not a webhook's address, or n8n is still")),
    ("body is not JSON", 422, BAD_BODY, NotDone("n8n could not read the body")),
    ("body over the limit", 500, PROBLEM, PerhapsDone(EXECUTIONS)),
    ("Immediately", 200, "{\"message\":\"Workflow was started\"}", PerhapsDone(RESPOND)),
    ("as documented", 200, "{\"message\":\"Workflow got started\"}", PerhapsDone(RESPOND)),
    ("Immediately, Response Data (text/html)", 200, "{\"firstMessage\":\"x\"}", Says("x")),
    ("Immediately, No Response Body", 200, "", PerhapsDone(EMPTY)),
    ("Last Node, First Entry JSON", 200, HELLO_JSON, Says("Hello")),
    ("Last Node, All Entries, 1 item", 200, "[{\"firstMessage\":\"Hello\"}]", Says("Hello")),
    ("Last Node, All Entries, n items", 200, "[{\"n\":1},{\"n\":2}]", PerhapsDone(NO_TEXT)),
    ("Last Node, All Entries, no item", 200, "[]", PerhapsDone(NO_TEXT)),
    ("Last Node, First Entry JSON, no item", 500, NO_ITEM, PerhapsDone(EXECUTIONS)),
    ("a node throws", 500, "{\"message\":\"Error in workflow\"}", PerhapsDone(EXECUTIONS)),
    ("unused Respond node", 500, UNUSED_NODE, PerhapsDone(RESPOND)),
    ("no Respond node", 500, NO_NODE, PerhapsDone("let each branch of the workflow end in")),
    ("branch without a Respond node, or 2.8.4 and a node throws", 200, "", PerhapsDone(EMPTY)),
    ("Respond With: No Data", 200, "\r\n", PerhapsDone(EMPTY)),
    ("Respond With: Text", 200, "Hello caller", Says("Hello caller")),
    ("Respond With: Text, JSON in it", 200, HELLO_JSON, Says("Hello")),
    ("Respond With: All Incoming Items", 200, "[{\"firstMessage\":\"Hello\"}]", Says("Hello")),
    ("Timeout Workflow, Respond node", 500, TIMED_OUT, PerhapsDone(EXECUTIONS)),
    ("Timeout Workflow, Last Node", 500, PROBLEM, PerhapsDone(EXECUTIONS)),
    ("Header Auth", 403, "Authorization data is wrong!", NotDone(AUTHENTICATE)),
    ("Basic Auth missing", 401, "Authorization is required!", NotDone(AUTHENTICATE)),
    ("JWT Auth missing", 401, "No token provided", NotDone(AUTHENTICATE)),
    ("JWT Auth wrong", 403, "jwt malformed", NotDone(AUTHENTICATE)),
    ("no credential", 500, "No authentication data defined on node!", PerhapsDone(EXECUTIONS)),
    (
        "IP allowlist",
        403,
        "IP is not allowed to access the webhook!",
        NotDone("add this server to the Webhook node's IP allowlist"),
    ),
    ("the Webhook item itself", 200, ECHO, PerhapsDone("the workflow echoes the Webhook node")),
    ("workflow answers with an error", 500, "{\"error\":\"x\"}", PerhapsDone(EXECUTIONS)),
    ("a proxy without n8n behind it", 502, "<html>Bad Gateway</html>", PerhapsDone("n8n is busy")),
    ("a proxy that limits", 429, "", NotDone("n8n is busy or down")),
    ("HTML", 200, " <!DOCTYPE html><p>Sign in</p>", PerhapsDone("N8N_WEBHOOK_URL must be the")),
    ("an empty text", 200, "{\"firstMessage\":\" \"}", PerhapsDone("give it a text in the")),
    ("a number for a text", 200, "{\"firstMessage\":7}", PerhapsDone(NO_TEXT)),
    ("null", 200, "null", PerhapsDone(NO_TEXT)),
    ("another key, created", 201, "{\"greeting\":\"Hello\"}", PerhapsDone(NO_TEXT)),
    (
        "our workflow: signature",
        401,
        "{\"error\":\"the signature is wrong\"}",
        NotDone(SAME_SECRET),
    ),
    (
        "our workflow: route",
        400,
        "{\"error\":\"unknown route\",\"route\":\"9\"}",
        NotDone(NO_BRANCH),
    ),
    ("a workflow's own 400", 400, "{\"error\":\"no such day\"}", PerhapsDone(EXECUTIONS)),
];

fn reply(status: u16, body: &str) -> N8nReply {
    N8nReply { status, body: body.to_owned() }
}

#[test]
fn every_observed_reply_of_n8n_becomes_a_text_or_advice() {
    for (case, status, body, wanted) in OBSERVED {
        let found = understand_reply(&reply(status, body), "firstMessage");
        let (advice, not_done) = match (found, wanted) {
            (Ok(text), Says(wanted)) => {
                assert_eq!(text, wanted, "{case}");
                continue;
            }
            (Ok(text), PerhapsDone(_) | NotDone(_)) => {
                assert_eq!(text, "", "{case}: taken for a text");
                continue;
            }
            (Err(failure), Says(wanted)) => {
                assert_eq!(failure.to_string(), wanted, "{case}: refused");
                continue;
            }
            (Err(failure), PerhapsDone(advice)) => {
                assert!(!failure.certainly_not_done, "{case}: it may have been done");
                (advice, failure)
            }
            (Err(failure), NotDone(advice)) => {
                assert!(failure.certainly_not_done, "{case}: it was not done");
                (advice, failure)
            }
        };
        let line = not_done.to_string();
        assert!(line.starts_with(&format!("n8n: {status}")), "{case}: {line}");
        assert!(line.contains(&format!(" ({advice}")), "{case}: {line}");
        assert!(line.lines().count() == 1 && line.len() < 300, "{case}: {line}");
    }
}

/// Respond With: Redirect, and Respond With: JSON with a Response Code. The workflow has run, and
/// may have booked before it said so.
#[test]
fn a_status_that_the_workflow_has_set_is_a_refusal() {
    let cases = [
        (307, "", "it redirects: set N8N_WEBHOOK_URL to the address it leads to"),
        (422, "{\"error\":\"no such day\"}", "the workflow failed: see n8n's Executions"),
        (404, "{\"error\":\"no such day\"}", "there is no webhook, or the workflow says so"),
    ];
    for (status, body, advice) in cases {
        let failure = understand_reply(&reply(status, body), "message").unwrap_err();
        assert!(failure.to_string().starts_with(&format!("n8n: {status}")), "{failure}");
        assert!(failure.to_string().contains(advice), "{failure}");
        assert!(!failure.certainly_not_done, "the workflow has run: {failure}");
    }
}

#[test]
fn greetings_and_tool_answers_come_in_many_shapes() {
    let cases = [
        ("firstMessage", " {\"firstMessage\": \" Hello, Ada. \"} \n", "Hello, Ada."),
        ("firstMessage", "\"Hello\"", "Hello"),
        ("firstMessage", "[\"Hello\"]", "Hello"),
        ("firstMessage", "Hello {name}, \"you\"", "Hello {name}, \"you\""),
        ("firstMessage", "Grüß Gott 👋", "Grüß Gott 👋"),
        ("firstMessage", "{\"firstMessage\":\"Hello\",\"message\":\"Booked\"}", "Hello"),
        ("message", "{\"firstMessage\":\"Hello\",\"message\":\"Booked\"}", "Booked"),
        ("message", "[{\"message\":\"Booked\"},{\"message\":\"Twice\"}]", "Booked"),
        ("message", "{\"message\":\"Workflow is not what we do.\"}", "Workflow is not what we do."),
    ];
    for (field, body, wanted) in cases {
        let found = understand_reply(&reply(200, body), field);
        assert_eq!(found.ok().as_deref(), Some(wanted), "{body}");
    }
    for body in ["{\"message\":\"Workflow was started\"}", "Workflow was started"] {
        let failure = understand_reply(&reply(200, body), "message").unwrap_err().to_string();
        assert!(failure.contains(RESPOND), "a tool's answer it is not: {failure}");
    }
}

/// A workflow that knows some callers leaves the others to the agent, whose words it need not know.
#[test]
fn null_for_a_greeting_is_an_answer_and_not_a_mistake() {
    for body in ["{\"firstMessage\":null}", "[{\"firstMessage\":null,\"more\":1}]"] {
        assert!(matches!(read_greeting(&reply(200, body)), Ok(None)), "{body}");
        assert!(read_greeting(&reply(500, body)).is_err(), "a refusal stays one");
        assert!(understand_reply(&reply(200, body), "message").is_err(), "a tool has no default");
    }
    let found = read_greeting(&reply(200, "{\"firstMessage\":\"Hello\"}"));
    assert_eq!(found.ok().flatten().as_deref(), Some("Hello"));
    for body in ["null", "{}", "[]", "[null]", ""] {
        assert!(read_greeting(&reply(200, body)).is_err(), "{body}");
    }
}

#[test]
fn any_2xx_takes_a_transcript() {
    for (status, body) in [(200, ""), (200, "<p>"), (204, ""), (299, "x")] {
        assert!(n8n_refusal(&reply(status, body)).is_none(), "{status}");
    }
    for status in [300, 404, 500] {
        assert!(n8n_refusal(&reply(status, "")).is_some(), "{status}");
    }
}

#[test]
fn a_quoted_reply_stays_one_short_line() {
    let body = format!("line\r\nline\u{1b}[31m{}", "é".repeat(500));
    let line = n8n_refusal(&reply(500, &body)).unwrap().to_string();
    assert!(line.starts_with("n8n: 500 lineline[31mé"), "{line}");
    assert!(line.chars().count() < 200 && !line.contains(char::is_control), "{line}");
}

#[test]
fn what_never_reached_n8n_was_certainly_not_done() {
    use ureq::{Error, Timeout};
    let refused = || Error::Io(io::ErrorKind::ConnectionRefused.into());
    let reset = || Error::Io(io::ErrorKind::ConnectionReset.into());
    let cases = [
        (Error::Timeout(Timeout::Resolve), true, "no connection in time"),
        (Error::Timeout(Timeout::Connect), true, "no connection in time"),
        (Error::Timeout(Timeout::Global), false, "no answer within 1500 ms"),
        (Error::Timeout(Timeout::RecvResponse), false, "no answer within 1500 ms"),
        (Error::HostNotFound, true, "its host name is not known (check the address)"),
        (Error::ConnectionFailed, true, "no connection (is it running"),
        (refused(), true, "it refuses the connection (is it running"),
        (reset(), false, "the request failed: "),
        (Error::BodyExceedsLimit(65_536), false, "an answer of more than 65536 bytes"),
    ];
    for (error, not_done, wanted) in cases {
        let failure = unreachable_party(Party::N8n, error, Duration::from_millis(1_500));
        let line = failure.to_string();
        assert!(line.starts_with(&format!("n8n: {wanted}")), "{line}");
        assert_eq!(failure.certainly_not_done, not_done, "{line}");
    }
}

// ============================================================================
// 3. Agent: what Ultravox may answer, and what it is offered
// ============================================================================

#[test]
fn a_refusal_of_ultravox_says_what_to_do() {
    let cases = [
        (400, "ULTRAVOX_MODEL and the voices"),
        (401, "check ULTRAVOX_API_KEY"),
        (402, "no minutes left"),
        (403, "check ULTRAVOX_API_KEY"),
        (404, "check ULTRAVOX_API_URL"),
        (429, "too many calls at once"),
        (500, "try again later"),
        (503, "no room at the moment"),
    ];
    for (status, advice) in cases {
        let line = ultravox_refusal(status, "{\"detail\":\n\"why\"}").to_string();
        let begins =
            format!("Ultravox: could not create the agent's call: {status} {{\"detail\":\"why\"}}");
        assert!(line.starts_with(&begins), "{line}");
        assert!(line.contains(advice) && line.ends_with(')'), "{line}");
        let refused = ultravox_refusal(status, "").refused;
        assert_eq!(refused, [400, 404].contains(&status), "asked in another way, it might do");
    }
    assert_eq!(
        ultravox_refusal(401, "").to_string(),
        "Ultravox: could not create the agent's call: 401 (check ULTRAVOX_API_KEY)"
    );
    assert!(ultravox_refusal(400, &"é".repeat(9_999)).to_string().chars().count() < 400);
}

#[test]
fn a_created_call_has_an_id_and_an_address_to_join() {
    let text = "{\"callId\":\"7c21\",\"joinUrl\":\"wss://voice.example/7c21\",\"new\":[1]}";
    let created = read_agent_call(text).ok().unwrap();
    assert_eq!(created.id, "7c21");
    assert_eq!(created.join_url.reveal(), "wss://voice.example/7c21");
    let odd = ["", "<html>", "null", "[]", "{\"callId\":\"7c21\"}", "{\"joinUrl\":\"wss://x\"}"];
    for odd in odd.into_iter().chain(["{\"callId\":7,\"joinUrl\":\"wss://x\"}"]) {
        let failure = read_agent_call(odd).err().unwrap().to_string();
        assert!(failure.starts_with("Ultravox: created the call, but "), "{odd}: {failure}");
    }
}

/// The bridge as `serve` makes it, with the built-in agent; it goes nowhere.
fn bridge() -> Bridge {
    let config = settings(&[
        ("N8N_WEBHOOK_URL", "https://n8n.example/webhook/call"),
        ("ULTRAVOX_CORPUS_ID", "corpus-1"),
    ]);
    Bridge::new(config.ok().unwrap()).ok().unwrap()
}

#[test]
fn the_agent_is_offered_a_stages_tools_in_ultravox_words() {
    let bridge = bridge();
    let tools = selected_tools(&bridge, &bridge.agent.stages["main_convo"]);
    let corpus = tools.iter().find(|tool| tool["toolName"] == "queryCorpus").unwrap();
    assert_eq!(corpus["nameOverride"], "queryCorpus");
    assert_eq!(corpus["parameterOverrides"], json!({"corpus_id": "corpus-1", "max_results": 5}));

    let own: Vec<&Value> = tools.iter().map(|tool| &tool["temporaryTool"]).collect();
    let meeting = *own.iter().find(|tool| tool["modelToolName"] == "schedule_meeting").unwrap();
    assert_eq!(meeting["client"], json!({}));
    assert_eq!(meeting["timeout"], "17s", "five more than our own");
    let parameters = meeting["dynamicParameters"].as_array().unwrap();
    assert_eq!(parameters.len(), 5);
    for parameter in parameters {
        assert_eq!(parameter["location"], "PARAMETER_LOCATION_BODY", "{parameter}");
        assert_eq!(parameter["required"], true, "{parameter}");
        let places = json!(["Chicago", "London", "Manchester", "New York"]);
        let wanted = if parameter["name"] == "location" { &places } else { &Value::Null };
        assert_eq!(&parameter["schema"]["enum"], wanted, "{parameter}");
    }
    let names: Vec<&Value> = parameters.iter().map(|parameter| &parameter["name"]).collect();
    for name in ["name", "email", "purpose", "datetime", "location"] {
        assert!(names.iter().any(|found| *found == name), "{name}: {names:?}");
    }
}

// ============================================================================
// 4. Answer: TwiML
// ============================================================================

#[test]
fn the_answer_connects_a_stream_and_names_what_comes_after() {
    let answer = twiml_connect_stream("https://bridge.example", "0123abcd");
    let begins = concat!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Response>",
        "<Connect action=\"https://bridge.example/stream-ended",
    );
    let ends = concat!(
        "\"><Stream url=\"wss://bridge.example/media-stream\">",
        "<Parameter name=\"token\" value=\"0123abcd\"/>",
        "</Stream></Connect><Hangup/></Response>\n",
    );
    let overrides = answer.strip_prefix(begins).and_then(|rest| rest.strip_suffix(ends));
    // What Twilio is to do when we do not answer stands in the fragment, which it never sends.
    let overrides = overrides.unwrap();
    assert!(overrides.is_empty() || overrides.starts_with('#'), "{answer}");
    assert!(!overrides.contains(['"', '<', '?']), "{answer}");
}

#[test]
fn an_odd_address_or_token_cannot_break_the_answer() {
    let answer = twiml_connect_stream("https://h:8443/http/a&b", "\"/><Dial>1</Dial>'");
    assert!(answer.contains("action=\"https://h:8443/http/a&amp;b/stream-ended"), "{answer}");
    assert!(answer.contains("url=\"wss://h:8443/http/a&amp;b/media-stream\""), "{answer}");
    let token = "value=\"&quot;/&gt;&lt;Dial&gt;1&lt;/Dial&gt;&apos;\"/>";
    assert!(answer.contains(token), "{answer}");

    let token = random_hex();
    assert_eq!(token.len(), 32);
    assert!(token.bytes().all(|byte| byte.is_ascii_hexdigit()), "{token}");
    assert_ne!(token, random_hex());
    let answer = twiml_connect_stream(&format!("https://{}.example", "x".repeat(900)), &token);
    let (_, parameter) = answer.split_once("<Parameter ").unwrap();
    let (parameter, _) = parameter.split_once("/>").unwrap();
    assert!(parameter.len() < 500, "Twilio allows 500 characters: {parameter}");
}

#[test]
fn xml_holds_any_text() {
    let cases = [
        ("", ""),
        ("plain text", "plain text"),
        ("a<b>&\"c\"'d'", "a&lt;b&gt;&amp;&quot;c&quot;&apos;d&apos;"),
        ("&amp;", "&amp;amp;"),
        ("]]>", "]]&gt;"),
        ("Grüß 👋 你好", "Grüß 👋 你好"),
        ("line\nline\tline\r", "line\nline\tline\r"),
        ("\0\u{1}\u{8}a\u{b}b\u{c}c\u{1f}d\u{7f}\u{85}", "abcd"),
    ];
    for (text, wanted) in cases {
        assert_eq!(xml_escape(text), wanted, "{text:?}");
    }
}

// ============================================================================
// 5. Stream: messages from Twilio
// ============================================================================

#[test]
fn the_messages_shown_in_the_text_are_understood() {
    let messages = messages_in_doc("What Twilio sends. One real message of each kind:");
    let parsed: Vec<FromTwilio> =
        messages.iter().map(|text| FromTwilio::parse(text, "").unwrap()).collect();
    let [
        FromTwilio::Connected,
        FromTwilio::Start(start),
        FromTwilio::Media(payload),
        FromTwilio::Dtmf(digit),
        FromTwilio::Mark(mark),
        FromTwilio::Stop,
    ] = parsed.as_slice()
    else {
        assert_eq!(format!("{parsed:?}"), "connected, start, media, dtmf, mark, stop");
        return;
    };
    assert_eq!((start.stream_sid.as_str(), start.call_sid.as_str()), ("MZ…", "CA…"));
    assert_eq!(start.media_format.encoding, "audio/x-mulaw");
    assert_eq!(start.media_format.sample_rate, 8_000);
    assert_eq!(start.custom_parameters["token"], "…");
    assert_eq!((payload.as_ref(), digit.as_str(), mark.as_str()), ("<base64>", "1", "goodbye"));
    assert!(matches!(payload, Cow::Borrowed(_)), "fifty times a second nothing is copied");
    for text in &messages[1..] {
        FromTwilio::parse(text, "MZ…").unwrap();
        let why = FromTwilio::parse(text, "MZother").unwrap_err();
        assert!(why.ends_with("message for another stream"), "{text}: {why}");
    }
}

#[test]
fn twilio_may_order_and_escape_as_it_likes() {
    let cases = [
        (
            r#"{"streamSid":"MZ1","media":{"payload":"ab\/\/+w==","timestamp":"155","chunk":"1",
                "track":"inbound"},"sequenceNumber":"2","event":"media"}"#,
            FromTwilio::Media("ab//+w==".into()),
        ),
        (
            r#"{"event":"\u006dedia","streamSid":"\u004DZ1","media":{"payload":"\u002b\u002F"}}"#,
            FromTwilio::Media("+/".into()),
        ),
        (r#"{"event":"media","streamSid":"MZ1","media":{"payload":""}}"#, media("")),
        // Numbers where texts are documented, and the other way round, where we do not look.
        (
            r#"{"event":"media","sequenceNumber":2,"streamSid":"MZ1","media":{"track":7,
                "chunk":1,"timestamp":155,"payload":"/w==","new":{"key":[null,1.5,true]}}}"#,
            media("/w=="),
        ),
        (
            r#"{"event":"stop","sequenceNumber":50,"streamSid":"MZ1","stop":null,"media":null}"#,
            FromTwilio::Stop,
        ),
        (r#"{"event":"stop","streamSid":"MZ1"}"#, FromTwilio::Stop),
        (
            r#"{"dtmf":{"digit":"\u0023","track":"inbound_track"},"streamSid":"MZ1",
                "event":"dtmf"}"#,
            FromTwilio::Dtmf("#".into()),
        ),
        (
            r#"{"mark":{"name":"a \"b\" \\ ü"},"event":"mark","streamSid":"MZ1"}"#,
            FromTwilio::Mark("a \"b\" \\ ü".into()),
        ),
        (
            r#"{"event":"weather","streamSid":"MZ1","weather":{"rain":[[[[]]]]}}"#,
            FromTwilio::Unknown("weather".into()),
        ),
        (r#"{"event":"","streamSid":"MZ1"}"#, FromTwilio::Unknown(String::new())),
    ];
    for (text, wanted) in cases {
        assert_eq!(FromTwilio::parse(text, "MZ1"), Ok(wanted), "{text}");
    }
}

fn media(payload: &str) -> FromTwilio<'_> {
    FromTwilio::Media(payload.into())
}

#[test]
fn a_start_needs_no_parameters_but_a_call_and_a_format() {
    let start = |fields: &str| format!("{{\"event\":\"start\",\"start\":{{{fields}}}}}");
    let format = "\"mediaFormat\":{\"channels\":1,\"sampleRate\":8000,\"encoding\":\"x\"}";
    let bare = start(&format!("{format},\"callSid\":\"CA1\",\"streamSid\":\"MZ1\""));
    let Ok(FromTwilio::Start(found)) = FromTwilio::parse(&bare, "") else {
        assert_eq!(bare, "a start without customParameters");
        return;
    };
    assert!(found.custom_parameters.is_empty());
    assert_eq!((found.call_sid.as_str(), found.stream_sid.as_str()), ("CA1", "MZ1"));

    let all = format!("{format},\"callSid\":\"CA1\",\"streamSid\":\"MZ1\"");
    let none = start(&format!("{all},\"customParameters\":{{}}"));
    assert!(matches!(FromTwilio::parse(&none, ""), Ok(FromTwilio::Start(_))));
    let wrong = [
        start(&format!("{format},\"callSid\":\"CA1\"")),
        start(&format!("{format},\"streamSid\":\"MZ1\"")),
        start("\"callSid\":\"CA1\",\"streamSid\":\"MZ1\""),
        start(&format!("{all},\"customParameters\":{{\"token\":1}}")),
        start(&format!("{all},\"customParameters\":[]")),
    ];
    for text in wrong {
        assert!(FromTwilio::parse(&text, "").is_err(), "{text}");
    }
}

#[test]
fn a_known_event_in_a_wrong_shape_is_an_error() {
    let cases = [
        (r#"{"event":"start","streamSid":"MZ1"}"#, "a start message without its content"),
        (r#"{"event":"media","streamSid":"MZ1"}"#, "a media message without its content"),
        (
            r#"{"event":"media","streamSid":"MZ1","media":null}"#,
            "a media message without its content",
        ),
        (r#"{"event":"dtmf","streamSid":"MZ1"}"#, "a dtmf message without its content"),
        (r#"{"event":"mark","streamSid":"MZ1"}"#, "a mark message without its content"),
        (
            r#"{"event":"media","streamSid":"MZ1","media":{"playload":"/w=="}}"#,
            "not a message of Twilio's: missing field `payload`",
        ),
        (
            r#"{"event":"media","streamSid":"MZ1","media":{"payload":255}}"#,
            "not a message of Twilio's: invalid type: integer `255`",
        ),
        (r#"{"event":"mark","streamSid":"MZ1","mark":{}}"#, "not a message of Twilio's: missing"),
        (r#"{"streamSid":"MZ1"}"#, "not a message of Twilio's: missing field `event`"),
        (r#"{"event":7,"streamSid":"MZ1"}"#, "not a message of Twilio's: invalid type"),
        (r#"{"event":"stop","streamSid":"MZ2"}"#, "a stop message for another stream"),
        (r#"{"event":"media","media":{"payload":""}}"#, "a media message for another stream"),
        (r#"{"event":"stop","streamSid":"mz1"}"#, "a stop message for another stream"),
        ("", "not a message of Twilio's: EOF"),
        ("{", "not a message of Twilio's: EOF"),
        ("[]", "not a message of Twilio's: "),
        ("null", "not a message of Twilio's: "),
        ("hello", "not a message of Twilio's: "),
        (r#"{"event":"stop","streamSid":"MZ1"}{}"#, "not a message of Twilio's: trailing"),
    ];
    for (text, wanted) in cases {
        let why = FromTwilio::parse(text, "MZ1").unwrap_err();
        assert!(why.starts_with(wanted), "{text}: {why}");
    }
    let deep = format!("{{\"event\":\"stop\",\"streamSid\":\"MZ1\",\"x\":{}", "[".repeat(60_000));
    assert!(FromTwilio::parse(&deep, "MZ1").is_err(), "deep, not whole, and no end of the stack");
}

// ============================================================================
// 6. Talk, 7. Act: messages from the agent
// ============================================================================

#[test]
fn the_agents_messages_shown_in_the_text_are_understood() {
    let messages = messages_in_doc("What Ultravox sends as text. One real message of each kind:");
    let parsed: Vec<FromAgent> =
        messages.iter().map(|text| FromAgent::parse(text).unwrap()).collect();
    let [
        FromAgent::Other(call_started),
        FromAgent::State(state),
        FromAgent::Transcript(heard),
        FromAgent::Invocation(invocation),
        FromAgent::ClearBuffer,
        FromAgent::Other(pong),
    ] = parsed.as_slice()
    else {
        assert_eq!(messages.concat(), "one of another kind");
        return;
    };
    assert_eq!((call_started.as_str(), pong.as_str()), ("call_started", "pong"));
    assert_eq!(state, "listening");
    assert_eq!((heard.speaker, heard.ordinal), (Speaker::Agent, 3));
    assert_eq!((heard.text.as_deref(), heard.delta.as_deref()), (None, Some(" help?")));
    assert!(!heard.finished && !heard.typed);
    assert_eq!((invocation.tool.as_str(), invocation.id.as_str()), ("verify", "i1"));
    assert!(invocation.parameters.is_empty());
}

#[test]
fn what_is_new_from_the_agent_is_skipped_and_what_is_wrong_is_told() {
    let new = [
        ("{\"type\":\"debug\",\"message\":\"x\"}", "debug"),
        ("{\"type\":\"call_event\",\"callId\":\"7c21\",\"extra\":[]}", "call_event"),
        ("{\"no\":\"type\"}", ""),
        ("{\"type\":7}", ""),
        ("[]", ""),
    ];
    for (text, kind) in new {
        let parsed = FromAgent::parse(text).unwrap();
        assert!(matches!(parsed, FromAgent::Other(found) if found == kind), "{text}");
    }
    let transcript = "a transcript without role or ordinal";
    let invocation = "an invocation without name or id";
    let wrong = [
        ("{\"type\":\"transcript\",\"role\":\"agent\",\"text\":\"x\"}", transcript),
        ("{\"type\":\"transcript\",\"role\":\"agent\",\"ordinal\":-1}", transcript),
        ("{\"type\":\"transcript\",\"ordinal\":1}", transcript),
        ("{\"type\":\"transcript\",\"role\":\"ghost\",\"ordinal\":1}", transcript),
        ("{\"type\":\"client_tool_invocation\",\"toolName\":\"x\"}", invocation),
        ("{\"type\":\"client_tool_invocation\",\"invocationId\":\"i1\"}", invocation),
        ("not JSON", "not JSON: "),
        ("", "not JSON: "),
        ("{\"type\":\"state\"", "not JSON: "),
    ];
    for (text, wanted) in wrong {
        let why = FromAgent::parse(text).err().unwrap();
        assert!(why.starts_with(wanted), "{text}: {why}");
    }
}

fn invocation(tool: &str, parameters: &Value) -> Invocation {
    let message = json!({"toolName": tool, "invocationId": "i1", "parameters": parameters});
    Invocation::parse(&message).unwrap()
}

#[test]
fn a_parameter_is_a_text_or_nothing() {
    let parameters = json!({
        "name": " Ada ", "blank": " \n", "none": null, "count": 3, "yes": true, "list": ["a"],
    });
    let found = invocation("x", &parameters);
    let cases = [
        ("name", Some("Ada")),
        ("blank", None),
        ("none", None),
        ("absent", None),
        ("count", Some("3")),
        ("yes", Some("true")),
        ("list", Some("[\"a\"]")),
    ];
    for (name, wanted) in cases {
        assert_eq!(found.text(name).as_deref(), wanted, "{name}");
    }
    for odd in [Value::Null, json!("a text"), json!([1])] {
        assert_eq!(invocation("x", &odd).parameters, Map::new(), "{odd}");
    }
}

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

// ============================================================================
// 9. After: the transcript and the journal
// ============================================================================

/// One transcript message: role, ordinal, text, delta, final.
type Said = (&'static str, u64, Option<&'static str>, Option<&'static str>, bool);

fn transcript_of(messages: &[Said]) -> String {
    let mut transcript = Transcript::default();
    for said in messages {
        transcript.hear(1, &message(said));
    }
    transcript.text()
}

fn message((role, ordinal, text, delta, finished): &Said) -> Heard {
    let message = json!({
        "type": "transcript", "role": role, "medium": "voice", "ordinal": ordinal,
        "text": text, "delta": delta, "final": finished,
    });
    Heard::parse(&message).unwrap()
}

/// What is special, messages as they arrive, the transcript.
const TRANSCRIPTS: [(&str, &[Said], &str); 17] = [
    ("nothing said", &[], ""),
    (
        "deltas, then the final text",
        &[
            ("agent", 0, None, Some("Hel"), false),
            ("agent", 0, None, Some("lo."), false),
            ("agent", 0, Some("Hello."), None, true),
        ],
        "Agent: Hello.",
    ),
    (
        "an interruption cuts the final text",
        &[
            ("agent", 0, None, Some("We have four offices in"), false),
            ("agent", 0, Some("We have four"), None, true),
        ],
        "Agent: We have four",
    ),
    (
        "an interruption before the first word leaves nothing",
        &[("agent", 0, None, Some("We"), false), ("agent", 0, Some(""), None, true)],
        "",
    ),
    (
        "a final without text keeps the deltas",
        &[
            ("agent", 0, None, Some("Hello"), false),
            ("agent", 0, None, None, true),
            ("agent", 2, None, Some("Bye"), false),
            ("agent", 2, None, Some(""), true),
        ],
        "Agent: Hello\nAgent: Bye",
    ),
    ("a final with its last delta", &[("agent", 0, None, Some("Bye"), true)], "Agent: Bye"),
    (
        "text replaces, deltas go on from there",
        &[
            ("agent", 0, None, Some("Helo"), false),
            ("agent", 0, Some("Hello"), None, false),
            ("agent", 0, None, Some(" you"), true),
        ],
        "Agent: Hello you",
    ),
    (
        "text counts, not the delta beside it",
        &[("agent", 0, Some("Hello"), Some("lo"), true)],
        "Agent: Hello",
    ),
    (
        "an utterance that was never finished",
        &[("agent", 0, None, Some("Hel"), false)],
        "Agent: Hel",
    ),
    (
        "ordinals with gaps, out of order",
        &[
            ("agent", 7, Some("three"), None, true),
            ("user", 1, Some("one"), None, true),
            ("agent", 4, Some("two"), None, true),
            ("user", 40, Some("four"), None, true),
        ],
        "User: one\nAgent: two\nAgent: three\nUser: four",
    ),
    (
        "utterances that overlap",
        &[
            ("agent", 2, None, Some("One mo"), false),
            ("user", 3, None, Some("Wa"), false),
            ("agent", 2, None, Some("ment"), false),
            ("user", 3, Some("Wait"), None, true),
            ("agent", 2, Some("One moment"), None, true),
        ],
        "Agent: One moment\nUser: Wait",
    ),
    (
        "blanks and line breaks",
        &[
            ("user", 0, Some("  \n\t "), None, true),
            ("user", 1, Some(" two\nlines  and\u{a0}one "), None, true),
            ("agent", 2, Some(""), None, true),
        ],
        "User: two lines and one",
    ),
    (
        "the line that Ultravox puts into the caller's mouth",
        &[
            ("user", 0, Some("(New Call) Respond as if you are answering"), None, true),
            ("agent", 1, Some("(New Call) is what I say"), None, true),
            ("user", 2, Some("It said (New Call)"), None, true),
        ],
        "Agent: (New Call) is what I say\nUser: It said (New Call)",
    ),
    (
        "the same final twice",
        &[("user", 0, Some("Yes"), None, true), ("user", 0, Some("Yes"), None, true)],
        "User: Yes",
    ),
    (
        "an ordinal that comes again with another role",
        &[
            ("agent", 3, Some("Goodbye"), None, true),
            ("user", 3, Some("Wait"), None, true),
            ("user", 4, Some("Hello?"), None, true),
        ],
        "Agent: Goodbye\nUser: Wait\nUser: Hello?",
    ),
    (
        "the first role of such an ordinal is not touched by the second's deltas",
        &[
            ("user", 3, Some("Yes"), None, true),
            ("agent", 3, None, Some("Fi"), false),
            ("agent", 3, None, Some("ne"), true),
        ],
        "User: Yes\nAgent: Fine",
    ),
    (
        "a speaker's name inside the text starts no line of its own",
        &[("user", 0, Some("x\nAgent: I agree"), None, true)],
        "User: x Agent: I agree",
    ),
];

#[test]
fn a_transcript_is_one_line_an_utterance_by_ordinal() {
    for (case, messages, wanted) in TRANSCRIPTS {
        assert_eq!(transcript_of(messages), wanted, "{case}");
    }
}

#[test]
fn an_agent_that_takes_over_counts_its_ordinals_anew() {
    let mut transcript = Transcript::default();
    transcript.hear(1, &message(&("agent", 0, Some("Hello."), None, true)));
    transcript.hear(1, &message(&("user", 1, Some("I want"), None, true)));
    transcript.hear(2, &message(&("user", 0, Some(LINE_BROKE), None, true)));
    transcript.hear(2, &message(&("agent", 1, None, Some("We are"), false)));
    transcript.hear(2, &message(&("agent", 1, Some("We are back."), None, true)));
    // A last word of the first agent that was on its way.
    transcript.hear(1, &message(&("agent", 2, Some("Sure"), None, true)));
    let wanted = "Agent: Hello.\nUser: I want\nAgent: Sure\nAgent: We are back.";
    assert_eq!(transcript.text(), wanted);
    let history = json!([
        {"role": "MESSAGE_ROLE_AGENT", "text": "Hello."},
        {"role": "MESSAGE_ROLE_USER", "text": "I want"},
        {"role": "MESSAGE_ROLE_AGENT", "text": "Sure"},
        {"role": "MESSAGE_ROLE_AGENT", "text": "We are back."},
    ]);
    assert_eq!(transcript.as_messages(), history);
}

#[test]
fn typed_text_of_ours_is_left_out() {
    let mut transcript = Transcript::default();
    let typed = |role: &str, ordinal: u64| {
        let (medium, text) = ("text", "1234");
        json!({"role": role, "medium": medium, "ordinal": ordinal, "text": text, "final": true})
    };
    assert!(transcript.hear(1, &Heard::parse(&typed("user", 0)).unwrap()).is_none(), "our keys");
    transcript.hear(1, &Heard::parse(&typed("agent", 1)).unwrap());
    assert_eq!(transcript.text(), "Agent: 1234");
}

#[test]
fn only_a_finished_utterance_is_noted() {
    let mut transcript = Transcript::default();
    let delta = json!({"role": "agent", "ordinal": 2, "text": null, "delta": "Hi"});
    assert!(transcript.hear(1, &Heard::parse(&delta).unwrap()).is_none());
    let last = json!({"role": "agent", "ordinal": 2, "delta": "!", "final": true});
    let event = transcript.hear(1, &Heard::parse(&last).unwrap()).unwrap().event();
    assert_eq!(
        event,
        json!({"event": "said", "agent": 1, "ordinal": 2, "speaker": "Agent", "text": "Hi!"})
    );
}

const JOURNAL: &str = r#"{"event":"ring","callSid":"CA1","number":"+4930123456"}
{"at":"2020-01-01T10:00:00Z","event":"agent","callId":"7c21","agent":1}
{"event":"said","ordinal":2,"speaker":"User","text":"Second, as first heard"}
{"event":"said","ordinal":1,"speaker":"Agent","text":"First"}
{"event":"tool","tool":"verify","outcome":"done","ms":3}
{"event":"said","ordinal":2,"speaker":"User","text":"Second"}
{"event":"weather","rain":true}
{"at":"2020-01-02T10:00:00Z","event":"end","endedBy":"AgentHungUp","seconds":61}
"#;

#[test]
fn a_journal_is_read_back() {
    let scratch = Scratch::new();
    let filed = Filed::read(&scratch.file("a.jsonl", JOURNAL)).unwrap();
    assert_eq!((filed.sid.as_str(), filed.number.as_str()), ("CA1", "+4930123456"));
    assert_eq!(filed.ended_by, "AgentHungUp");
    assert_eq!(filed.transcript.text(), "Agent: First\nUser: Second");
    assert!(!filed.delivered && !filed.transferred);
    assert_eq!((filed.agent_id.as_str(), filed.agents), ("7c21", 1));
    let day = Duration::from_hours(24);
    assert!(filed.quiet_for > day, "since its last line");
    assert!(filed.age > filed.quiet_for + day / 2, "since its first line");

    let delivered = format!("{JOURNAL}{{\"event\":\"delivered\"}}\n");
    assert!(Filed::read(&scratch.file("b.jsonl", delivered)).unwrap().delivered);
    assert!(Filed::read(&scratch.0.join("none.jsonl")).is_err());
}

#[test]
fn what_went_over_the_wire_is_nothing_that_a_journal_has_to_know() {
    let scratch = Scratch::new();
    let wire = json!({"at": "2020-01-05T10:00:00Z", "event": "wire", "text": "\"event\":\"end\""});
    // A caller, and an agent's tool, may say what they like.
    let said = json!({"event": "said", "ordinal": 3, "speaker": "User",
        "text": "\"event\":\"wire\"", "agent": 0});
    let text = format!("{JOURNAL}{said}\n{wire}\n");
    let filed = Filed::read(&scratch.file("a.jsonl", text)).unwrap();
    assert_eq!(filed.ended_by, "AgentHungUp");
    assert!(filed.transcript.text().ends_with("\nUser: \"event\":\"wire\""));
    let at = |day| format!("2020-01-0{day}T10:00:00Z").parse().ok();
    assert_eq!((filed.began, filed.ended), (at(1), at(2)), "the end is not the wire's");
    assert_eq!(filed.direction, Direction::In, "of journals that do not tell");
    let browser = r#"{"event":"ring","callSid":"CA1","number":"browser","direction":"browser"}"#;
    let filed = Filed::read(&scratch.file("b.jsonl", browser)).unwrap();
    assert_eq!(filed.direction, Direction::Browser);
    let odd = r#"{"event":"ring","callSid":"CA1","direction":{"up":1}}"#;
    assert_eq!(Filed::read(&scratch.file("c.jsonl", odd)).unwrap().direction, Direction::In);
}

#[test]
fn the_last_line_tells_that_a_journal_was_delivered() {
    let scratch = Scratch::new();
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
        let path = scratch.file("a.jsonl", &text);
        assert_eq!(delivered_at(&path).is_some(), wanted, "{text}");
        assert!(!wanted || Filed::read(&path).unwrap().delivered, "{text}");
    }
    assert!(delivered_at(&scratch.0.join("none.jsonl")).is_none());
}

#[test]
fn what_is_shown_of_a_message_is_short_and_holds_no_key() {
    assert_eq!(
        host_only("wss://voice.example:443/join/7c21?key=s3cret"),
        "wss://voice.example:443/***"
    );
    assert_eq!(host_only("wss://user:s3cret@voice.example?key=s3cret"), "wss://voice.example/***");
    assert_eq!(host_only("s3cret"), "://s3cret/***");
    assert_eq!((cut("grüße", 3), cut("grüße", 5)), ("grü…".to_owned(), "grüße".to_owned()));
    let start = r#"{"start":{"customParameters":{"token":"s3cret"}}}"#;
    assert_eq!(hidden(start, "/start/customParameters/token"), start.replace("s3cret", "***"));
    let media = format!(r#"{{"media":{{"payload":"{}"}}}}"#, "A".repeat(216));
    let short = format!(r#"{{"media":{{"payload":"{}…"}}}}"#, "A".repeat(24));
    assert_eq!(media_for_the_eye(&media), short);
    // serde takes a list for an object.
    for odd in ["[1,2]", "7", "null", "{\"media\":7}", "{\"media\":{\"payload\":{}}}", "{"] {
        assert!(media_for_the_eye(odd).len() < 40, "{odd}");
        assert!(hidden(odd, "/media/payload").len() < 40, "{odd}");
    }
}

#[test]
fn the_hashes_in_the_policy_are_those_of_the_page() {
    let page = "<style>a</style><script>b\n</script>\n<script></script><script src=x></script>";
    let hash = |text: &str| {
        let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
        format!("'sha256-{}'", BASE64.encode(digest))
    };
    assert_eq!(hashes(page, "style"), hash("a"));
    assert_eq!(hashes(page, "script"), format!("{} {}", hash("b\n"), hash("")));
    assert_eq!(hashes("", "script"), "");
}

#[test]
fn a_journal_cut_off_anywhere_keeps_its_whole_lines() {
    let scratch = Scratch::new();
    let texts = ["Agent: First\nUser: Second", "Agent: First\nUser: Second, as first heard"];
    for length in 0..=JOURNAL.len() {
        let path = scratch.file("cut.jsonl", &JOURNAL.as_bytes()[..length]);
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
    let filed = Filed::read(&scratch.file("dirty.jsonl", dirty)).unwrap();
    assert_eq!((filed.sid.as_str(), filed.transcript.text().as_str()), ("CA1", texts[0]));
}

#[test]
fn what_is_noted_can_be_read_back() {
    let scratch = Scratch::new();
    let data = scratch.0.join("not").join("there yet");
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
    let scratch = Scratch::new();
    for cut in [0, 1, JOURNAL.len() - 3, JOURNAL.len()] {
        let path = scratch.file(&format!("{cut}.jsonl"), &JOURNAL.as_bytes()[..cut]);
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
fn a_journal_belongs_to_the_call_in_its_name() {
    let path = Journal::path(Path::new("data"), "CA9f3c");
    assert!(path.starts_with("data/calls"), "{}", path.display());
    assert_eq!(sid_of(&path), "CA9f3c");
    for other in ["", "CA9f3", "9f3c", "CA9f3c0", "ca9f3c"] {
        assert_ne!(sid_of(&path), other);
    }
    assert_eq!(sid_of(Path::new("CA9f3c.jsonl")), "", "it has no time");
}

#[test]
fn journals_are_found_oldest_first() {
    let scratch = Scratch::new();
    for name in ["20270101T000000Z-CA2.jsonl", "20260101T000000Z-CA9.jsonl", "x.txt", "y"] {
        fs::create_dir_all(scratch.0.join("calls")).unwrap();
        scratch.file(&format!("calls/{name}"), "");
    }
    let found = journals(&scratch.0);
    let names: Vec<_> = found.iter().filter_map(|path| path.file_name()?.to_str()).collect();
    assert_eq!(names, ["20260101T000000Z-CA9.jsonl", "20270101T000000Z-CA2.jsonl"]);
    assert!(journals(&scratch.0.join("nowhere")).is_empty());
}

#[test]
fn a_disk_that_takes_nothing_does_not_end_a_call() {
    let scratch = Scratch::new();
    let in_the_way = scratch.file("data", "a file where a directory should be");
    let journal = Journal::at(Journal::path(&in_the_way, "CA1"));
    journal.note(&json!({"event": "ring"}));
    journal.note(&json!({"event": "end"}));
    assert!(!journal.path.exists());
}

/// A full pipe stands for a disk that hangs.
#[test]
fn whoever_looks_at_a_call_does_not_wait_for_the_disk() {
    let scratch = Scratch::new();
    let pipe = scratch.0.join("pipe");
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
    call.journal = Journal::at(pipe);
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

// ============================================================================
// 10. Toolbox: the full-duplex socket
// ============================================================================

/// Twilio's end as we hold it, and ours of the agent's leg, put together.
fn two_ends() -> (Duplex, Duplex) {
    let (near, far) = sockets();
    (
        Duplex::new(near, None, Vec::new(), Role::Server),
        Duplex::new(Arc::new(far), None, Vec::new(), Role::Client),
    )
}

/// An end, and a bare socket that can send it anything.
fn end_and_bare_socket(role: Role) -> (Duplex, TcpStream) {
    let (near, far) = sockets();
    (Duplex::new(near, None, Vec::new(), role), far)
}

/// A message or an end, in one word and its content.
fn heard(end: &Duplex) -> String {
    match end.read(DEADLINE) {
        Ok((Received::Text(text), _)) => format!("text {text}"),
        Ok((Received::Binary(bytes), _)) => format!("binary {}", hex(&bytes)),
        Err(LineEnd::Quiet) => "quiet".to_owned(),
        Err(LineEnd::Closed(code)) => format!("closed {code:?}"),
        Err(LineEnd::Broken(why)) => format!("broken: {why}"),
        Err(LineEnd::Nonsense(why)) => format!("nonsense: {why}"),
    }
}

fn say(end: &Duplex, text: &str) {
    assert!(end.send(Message::text(text)).is_ok(), "{text} was not sent");
}

/// A frame as it comes off the wire: its first byte and its content, without a mask.
fn frame(socket: &mut TcpStream) -> (u8, Vec<u8>) {
    let mut head = [0; 2];
    socket.read_exact(&mut head).unwrap();
    let mut mask = [0; 4];
    if head[1] & 0x80 != 0 {
        socket.read_exact(&mut mask).unwrap();
    }
    let length = usize::from(head[1] & 0x7F);
    assert!(length < 126, "only short frames are looked at");
    let mut content = vec![0; length];
    socket.read_exact(&mut content).unwrap();
    for (byte, key) in content.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= key;
    }
    (head[0], content)
}

#[test]
fn text_and_binary_arrive_whole_in_both_directions() {
    let (server, client) = two_ends();
    for (from, to) in [(&server, &client), (&client, &server)] {
        say(from, "");
        say(from, "Grüß Gott");
        assert!(from.send(Message::binary(vec![0x00, 0xFF, 0x7F])).is_ok());
        let long = "x".repeat(TWILIO_MESSAGE_BYTES_MAX);
        say(from, &long);
        assert!(from.send(Message::binary(Vec::new())).is_ok());
        assert_eq!(heard(to), "text ");
        assert_eq!(heard(to), "text Grüß Gott");
        assert_eq!(heard(to), "binary 00ff7f");
        assert!(heard(to) == format!("text {long}"), "a message of the largest size");
        assert_eq!(heard(to), "binary ");
    }
}

#[test]
fn what_came_with_the_handshake_is_heard_first() {
    let (near, mut far) = sockets();
    let early = b"\x81\x02hi\x82\x01\x07\x81\x05wo".to_vec();
    let end = Duplex::new(near, None, early, Role::Client);
    far.write_all(b"rld").unwrap();
    assert_eq!(heard(&end), "text hi");
    assert_eq!(heard(&end), "binary 07");
    assert_eq!(heard(&end), "text world");
}

#[test]
fn a_ping_is_answered_while_we_read_on() {
    let (end, mut far) = end_and_bare_socket(Role::Client);
    far.write_all(b"\x89\x04ping\x8a\x00\x89\x00\x81\x04next").unwrap();
    assert_eq!(heard(&end), "text next");
    assert_eq!(frame(&mut far), (0x8A, b"ping".to_vec()));
    assert_eq!(frame(&mut far), (0x8A, Vec::new()));
}

#[test]
fn a_message_in_pieces_is_put_together() {
    let (end, mut far) = end_and_bare_socket(Role::Client);
    // "ü" is cut in the middle, and a ping stands between the pieces.
    for byte in b"\x01\x02H\xc3\x89\x00\x00\x01\xbc\x80\x01!\x02\x01\x01\x80\x01\x02" {
        far.write_all(&[*byte]).unwrap();
    }
    assert_eq!(heard(&end), "text Hü!");
    assert_eq!(heard(&end), "binary 0102");
}

#[test]
fn a_goodbye_arrives_with_its_code_and_is_answered() {
    let (server, client) = two_ends();
    say(&server, "last words");
    server.close(CloseCode::Policy, "no token");
    assert_eq!(heard(&client), "text last words");
    assert_eq!(heard(&client), "closed Some(1008)");
    assert_eq!(heard(&server), "closed Some(1008)", "the answer repeats the code");
    assert!(matches!(client.send(Message::text("x")), Err(LineEnd::Closed(None))));
    assert!(matches!(server.send(Message::text("x")), Err(LineEnd::Closed(None))));
    server.close(CloseCode::Normal, "a second time does nothing");
    client.close(CloseCode::Normal, "nor here");
}

#[test]
fn what_crosses_our_goodbye_is_still_heard() {
    let (server, client) = two_ends();
    server.close(CloseCode::Normal, "goodbye");
    say(&client, "the mark came back");
    assert_eq!(heard(&server), "text the mark came back");
    assert_eq!(heard(&client), "closed Some(1000)");
}

#[test]
fn a_goodbye_may_lack_a_code_and_a_reason_may_be_long() {
    let (end, mut far) = end_and_bare_socket(Role::Client);
    far.write_all(b"\x88\x00").unwrap();
    assert_eq!(heard(&end), "closed None");
    assert_eq!(frame(&mut far).0, 0x88);

    let (end, mut far) = end_and_bare_socket(Role::Server);
    end.close(CloseCode::Policy, &"lång ".repeat(100));
    let (first, content) = frame(&mut far);
    assert_eq!((first, &content[..2]), (0x88, 1_008_u16.to_be_bytes().as_slice()));
    assert_eq!(content.len(), 122, "a control frame holds 125 bytes");
}

#[test]
fn a_message_that_is_too_long_is_nonsense_and_the_peer_is_told() {
    let (server, client) = two_ends();
    say(&client, &"x".repeat(TWILIO_MESSAGE_BYTES_MAX + 1));
    assert!(heard(&server).starts_with("nonsense: "));
    let told = heard(&client);
    assert!(["closed Some(1002)", "closed Some(1009)"].contains(&told.as_str()), "{told}");

    // The announcement alone is enough: nobody waits for, or keeps room for, the rest.
    let (end, mut far) = end_and_bare_socket(Role::Client);
    far.write_all(&[0x82, 127]).unwrap();
    far.write_all(&(AGENT_MESSAGE_BYTES_MAX as u64 + 1).to_be_bytes()).unwrap();
    assert!(heard(&end).starts_with("nonsense: "));
    assert!(is_told_off(&mut far));

    // In pieces, each of them short enough.
    let (end, mut far) = end_and_bare_socket(Role::Client);
    let piece = vec![0; AGENT_MESSAGE_BYTES_MAX / 2 + 1];
    let writer = thread::spawn(move || {
        for first in [0x02, 0x80] {
            far.write_all(&[first, 127]).unwrap();
            far.write_all(&(piece.len() as u64).to_be_bytes()).unwrap();
            far.write_all(&piece).unwrap();
        }
        is_told_off(&mut far)
    });
    assert!(heard(&end).starts_with("nonsense: "));
    assert!(writer.join().unwrap());
}

fn is_told_off(peer: &mut TcpStream) -> bool {
    let (first, content) = frame(peer);
    let code = content.get(..2).map_or(0, |code| u16::from_be_bytes([code[0], code[1]]));
    first == 0x88 && [1_002, 1_009].contains(&code)
}

#[test]
fn what_is_not_websocket_is_nonsense_and_the_peer_is_told() {
    let long_ping = [b"\x89\x7e\x00\x80".as_slice(), &[0; 128]].concat();
    let cases: [(&str, Role, &[u8]); 9] = [
        ("text that is not UTF-8", Role::Client, b"\x81\x02\xff\xff"),
        ("a compressed message nobody agreed on", Role::Client, b"\xc1\x02hi"),
        ("an unknown kind of frame", Role::Client, b"\x83\x00"),
        ("an unknown control frame", Role::Client, b"\x8b\x00"),
        ("a ping in pieces", Role::Client, b"\x09\x00"),
        ("a ping that is too long", Role::Client, &long_ping),
        ("a second piece without a first", Role::Client, b"\x80\x00"),
        ("a mask from where none may come", Role::Client, b"\x81\x82\0\0\0\0hi"),
        ("no mask from where one must come", Role::Server, b"\x81\x02hi"),
    ];
    for (case, role, bytes) in cases {
        let (end, mut far) = end_and_bare_socket(role);
        far.write_all(bytes).unwrap();
        let found = heard(&end);
        assert!(found.starts_with("nonsense: "), "{case}: {found}");
        assert!(is_told_off(&mut far), "{case}");
    }
}

#[test]
fn a_line_that_ends_without_a_goodbye_is_broken() {
    let beginnings: [&[u8]; 4] = [b"", b"\x81", b"\x81\x05he", b"\x01\x02he"];
    for bytes in beginnings {
        let (end, mut far) = end_and_bare_socket(Role::Client);
        far.write_all(bytes).unwrap();
        drop(far);
        assert_eq!(heard(&end), "broken: no goodbye", "after {bytes:?}");
    }
    let (end, mut far) = end_and_bare_socket(Role::Client);
    far.write_all(b"\x81\x02hi").unwrap();
    drop(far);
    assert_eq!(heard(&end), "text hi", "what was whole is heard before the end");
    assert_eq!(heard(&end), "broken: no goodbye");
}

#[test]
fn our_own_shut_wakes_the_reader() {
    let (server, _client) = two_ends();
    thread::scope(|scope| {
        let reader = scope.spawn(|| heard(&server));
        server.shut();
        assert!(reader.join().unwrap().starts_with("broken: "));
    });
}

#[test]
fn a_quiet_line_is_still_a_good_line() {
    let (end, mut far) = end_and_bare_socket(Role::Client);
    let patience = Duration::from_millis(1);
    assert!(matches!(end.read(Duration::ZERO), Err(LineEnd::Quiet)));
    assert!(matches!(end.read(patience), Err(LineEnd::Quiet)));
    far.write_all(b"\x81\x05he").unwrap();
    assert!(matches!(end.read(patience), Err(LineEnd::Quiet)), "half a message is none");
    far.write_all(b"llo").unwrap();
    assert_eq!(heard(&end), "text hello");
    assert!(matches!(end.read(patience), Err(LineEnd::Quiet)), "patience can be lost again");
    say(&end, "are you there?");
    assert_eq!(frame(&mut far), (0x81, b"are you there?".to_vec()));
}

#[test]
fn one_thread_sends_while_another_waits_for_the_answer() {
    const ROUNDS: usize = 200;
    let (server, client) = two_ends();
    thread::scope(|scope| {
        let reader = scope.spawn(|| (0..ROUNDS).map(|_| heard(&server)).collect::<Vec<_>>());
        for round in 0..ROUNDS {
            // The reader waits, or is about to: no answer comes before this question.
            say(&server, &format!("question {round}"));
            assert_eq!(heard(&client), format!("text question {round}"));
            say(&client, &format!("answer {round}"));
        }
        let answers = reader.join().unwrap();
        let wanted: Vec<String> = (0..ROUNDS).map(|round| format!("text answer {round}")).collect();
        assert!(answers == wanted, "{answers:?}");
    });
}

#[test]
fn two_thousand_messages_each_way_at_once_arrive_in_order() {
    const MESSAGES: usize = 2_000;
    let (server, client) = two_ends();
    let send_all = |end: &Duplex, name: &str| {
        for number in 0..MESSAGES {
            say(end, &format!("{name} {number}"));
        }
    };
    let first_wrong = |end: &Duplex, name: &str| {
        let mut all = (0..MESSAGES).map(|number| (format!("text {name} {number}"), heard(end)));
        all.find(|(wanted, found)| wanted != found)
    };
    thread::scope(|scope| {
        let readers = [
            scope.spawn(|| first_wrong(&server, "up")),
            scope.spawn(|| first_wrong(&client, "down")),
        ];
        scope.spawn(|| send_all(&server, "down"));
        scope.spawn(|| send_all(&client, "up"));
        for reader in readers {
            assert_eq!(reader.join().unwrap(), None);
        }
    });
    server.close(CloseCode::Normal, "that was all");
    assert_eq!(heard(&client), "closed Some(1000)");
}

#[test]
fn several_threads_may_send_on_one_line() {
    const THREADS: usize = 4;
    const EACH: usize = 100;
    let (server, client) = two_ends();
    thread::scope(|scope| {
        for name in 0..THREADS {
            let server = &server;
            scope.spawn(move || {
                for number in 0..EACH {
                    say(server, &format!("{name} {number}"));
                }
            });
        }
        let mut next = [0; THREADS];
        for _ in 0..THREADS * EACH {
            let found = heard(&client);
            let (name, number) =
                found.trim_start_matches("text ").split_once(' ').unwrap_or_default();
            let place = name.parse::<usize>().unwrap();
            assert_eq!(number, next[place].to_string(), "whole, and in order for each: {found}");
            next[place] += 1;
        }
    });
}

// ============================================================================
// 10. Toolbox: G.711
// ============================================================================

/// Code, decoded sample, the first and the last sample that are encoded as it.
type Code = (u8, i16, Option<(i16, i16)>);

/// The file says how it was made.
fn g711_reference() -> Vec<Code> {
    let lines = include_str!("../tests/data/g711-mulaw.txt").lines();
    let rows = lines.filter(|line| !line.starts_with('#')).map(|line| {
        let columns: Vec<&str> = line.split(' ').collect();
        let [code, decoded, first, last] = columns[..] else {
            return (0, 0, None);
        };
        let samples = first.parse().ok().zip(last.parse().ok());
        (u8::from_str_radix(code, 16).unwrap(), decoded.parse().unwrap(), samples)
    });
    rows.collect()
}

#[test]
fn all_256_codes_sound_as_in_the_reference() {
    let reference = g711_reference();
    assert_eq!(reference.len(), 256);
    for (place, (code, decoded, _)) in reference.into_iter().enumerate() {
        assert_eq!(usize::from(code), place, "the reference has each code once");
        assert_eq!(mulaw_to_pcm(code), decoded, "code {code:02X}");
    }
}

#[test]
fn all_65536_samples_are_encoded_as_in_the_reference() {
    let mut samples_seen = 0;
    for (code, _, samples) in g711_reference() {
        let Some((first, last)) = samples else {
            assert_eq!(code, 0x7F, "only \"minus zero\" is never made");
            continue;
        };
        for sample in first..=last {
            assert_eq!(pcm_to_mulaw(sample), code, "sample {sample}");
            samples_seen += 1;
        }
    }
    assert_eq!(samples_seen, 65_536);
}

#[test]
fn sound_that_is_passed_on_twice_is_the_same() {
    for code in 0..=u8::MAX {
        let again = pcm_to_mulaw(mulaw_to_pcm(code));
        let wanted = if code == 0x7F { 0xFF } else { code };
        assert_eq!(again, wanted, "code {code:02X}");
    }
    assert_eq!((mulaw_to_pcm(0xFF), pcm_to_mulaw(0)), (0, 0xFF), "silence is silence");
}

#[test]
fn a_second_of_sound_plays_for_a_second() {
    let cases = [(0, 0), (1, 125), (160, 20_000), (8_000, 1_000_000), (240_000, 30_000_000)];
    for (bytes, micros) in cases {
        assert_eq!(playing_time(bytes), Duration::from_micros(micros), "{bytes} bytes");
    }
}

// ============================================================================
// 10. Toolbox: failures, secrets, texts
// ============================================================================

#[test]
fn a_failure_reads_as_who_what_why_and_what_now() {
    let cause = || io::Error::other("connection reset");
    let cases = [
        (Failure::new(Party::N8n, "404"), "n8n: 404"),
        (
            Failure::new(Party::Ultravox, "401").advise("check the key"),
            "Ultravox: 401 (check the key)",
        ),
        (
            Failure::new(Party::N8n, "no answer").caused_by(cause()),
            "n8n: no answer: connection reset",
        ),
        (
            Failure::new(Party::Ultravox, "no upgrade").caused_by(cause()).advise("try later"),
            "Ultravox: no upgrade: connection reset (try later)",
        ),
    ];
    for (failure, wanted) in cases {
        assert_eq!(failure.to_string(), wanted);
        assert!(!failure.certainly_not_done, "{wanted}: nobody has said so");
    }
    let failure = Failure::new(Party::N8n, "x").certainly_not_done().advise("y").caused_by(cause());
    assert!(failure.certainly_not_done, "it is kept when more is said");
    assert_eq!(failure.source().map(ToString::to_string).as_deref(), Some("connection reset"));
    assert!(Failure::new(Party::N8n, "x").source().is_none());
}

#[test]
fn the_end_of_a_line_reads_as_a_sentence() {
    let cases = [
        (LineEnd::Quiet, "nothing came for too long"),
        (LineEnd::Closed(Some(1008)), "closed with code 1008"),
        (LineEnd::Closed(None), "closed"),
        (LineEnd::Broken("no goodbye".to_owned()), "the line broke: no goodbye"),
        (LineEnd::Nonsense("too long".to_owned()), "nonsense on the line: too long"),
    ];
    for (end, wanted) in cases {
        assert_eq!(end.to_string(), wanted);
    }
}

#[test]
fn a_secret_cannot_be_printed() {
    let secret = Secret("hush".to_owned());
    let copy = secret.clone();
    assert_eq!(copy.reveal(), "hush");
    for printed in [format!("{secret:?}"), format!("{secret:#?}"), format!("{:?}", Some(&secret))] {
        assert!(printed.contains("***") && !printed.contains("hush"), "{printed}");
    }
}

#[test]
fn a_secret_is_hidden_however_it_is_quoted() {
    let config = settings(&[
        ("API_TOKEN", "hush-hush-hush-0"),
        // It begins with the token.
        ("N8N_HMAC_SECRET", "hush-hush-hush-0-and-more"),
        ("N8N_AUTH_HEADER", "X-Key: hush\"\\tail"),
        ("N8N_WEBHOOK_URL", "https://me:pass@n8n.example/webhook/x"),
    ])
    .unwrap();
    let login = BASE64.encode("me:pass");
    let cases = [
        ("hush-hush-hush-0, hush-hush-hush-0-and-more".to_owned(), "***, ***".to_owned()),
        ("hush\"\\tail".to_owned(), "***".to_owned()),
        (
            json!({"key": "hush\"\\tail", "authorization": format!("Basic {login}")}).to_string(),
            json!({"key": "***", "authorization": "Basic ***"}).to_string(),
        ),
        ("nothing to hide".to_owned(), "nothing to hide".to_owned()),
    ];
    for (text, wanted) in cases {
        assert_eq!(config.hide_secrets(text), wanted);
    }
}

#[test]
fn placeholders_are_filled_and_other_braces_stay() {
    let value_of = |name: &str| match name {
        "name" => Some("Ada".to_owned()),
        "braces" => Some("{name}".to_owned()),
        "empty" => Some(String::new()),
        _ => None,
    };
    let cases = [
        ("", ""),
        ("no braces", "no braces"),
        ("{name}", "Ada"),
        ("Hello {name}, {name}!", "Hello Ada, Ada!"),
        ("{empty}{name}{empty}", "Ada"),
        ("{unknown} {name}", "{unknown} Ada"),
        ("{braces}", "{name}"),
        ("{{name}}", "{Ada}"),
        ("{ name } {}", "{ name } {}"),
        ("{\"json\": {name}}", "{\"json\": Ada}"),
        ("open { and {name", "open { and {name"),
        ("} closed {name}", "} closed Ada"),
        ("ü{name}👋{x", "üAda👋{x"),
    ];
    for (text, wanted) in cases {
        assert_eq!(fill(text, value_of), wanted, "{text}");
    }
}

#[test]
fn placeholders_are_found_with_their_lines() {
    let cases: [(&str, &[(&str, usize)]); 7] = [
        ("", &[]),
        ("{a}", &[("a", 1)]),
        ("{a} {b_2}\n\n{a}", &[("a", 1), ("b_2", 1), ("a", 3)]),
        ("{ a } {} {a-b} {ä} {a", &[]),
        ("{\"json\": {a}}", &[("a", 1)]),
        ("{{a}}", &[("a", 1)]),
        ("{a\n} }{", &[]),
    ];
    for (text, wanted) in cases {
        let found = placeholders(text);
        let found: Vec<(&str, usize)> =
            found.iter().map(|(name, line)| (name.as_str(), *line)).collect();
        assert_eq!(found, wanted, "{text:?}");
    }
}

#[test]
fn a_logged_number_can_be_recognised_but_not_called() {
    let cases = [
        ("+4930123456", "+49…3456"),
        ("+12025550123", "+12…0123"),
        ("+1234567", "a short number"),
        ("+", "a short number"),
        ("anonymous", "anonymous"),
        ("Restricted", "Restricted"),
        ("", "a caller without a number"),
        ("030123456", "a caller without a number"),
        ("client:alice", "a caller without a number"),
        ("sip:alice@example.com", "a caller without a number"),
        ("averyveryverylongword", "a caller without a number"),
        ("two\nlines", "a caller without a number"),
    ];
    for (number, wanted) in cases {
        assert_eq!(shorten_number(number), wanted, "{number:?}");
    }
    assert_eq!(shorten("CA9f3c0123456789"), "CA9f3c");
    assert_eq!((shorten("CA1"), shorten(""), shorten("CALL👋")), ("CA1", "", "CALL👋"));
}

#[test]
fn small_texts_are_as_they_should_be() {
    assert_eq!(hex(&[0x00, 0x0F, 0xA0, 0xFF]), "000fa0ff");
    assert_eq!(find(b"one\r\n\r\ntwo", b"\r\n\r\n"), Some(3));
    assert_eq!((find(b"", b"\r\n"), find(b"\r", b"\r\n")), (None, None));
    assert_eq!(listed(&["email"], "is", "are"), "email is");
    assert_eq!(listed(&["email", "name"], "is", "are"), "email, name are");
    for _ in 0..100 {
        let number = random_number();
        assert!(number.len() == 6 && number.bytes().all(|byte| byte.is_ascii_digit()), "{number}");
    }
}

// ============================================================================
// Whatever comes in
// ============================================================================
//
// One function for all fuzz targets (tests/fuzz), which look for inputs that break it, and for
// `cargo test`, which replays those that are worth keeping.

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
    let announced = announced_to_tiny_http(&sent);
    let Ok(head) = read else {
        return;
    };
    assert_eq!(head.len() + rest.len(), sent.len() + END.len(), "nothing was lost");
    assert!(sent.starts_with(&head) && find(&head, b"\r\n\r\n").is_some());
    assert!(head[0].is_ascii_uppercase());
    assert!(announced.is_none_or(|bytes| bytes <= ANNOUNCED_BYTES_MAX), "it would be set aside");
    if let (Some(ours), Some(theirs)) = (announced_body(&head), announced) {
        assert!(ours >= theirs, "tiny_http waits for more than we do");
    }
    if wants_media_stream(&head) {
        assert!(head.starts_with(b"GET /media-stream"));
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
    if is_sid(sid) {
        let path = Journal::path(Path::new("data"), sid);
        assert_eq!(path.parent(), Some(Path::new("data/calls")), "it stays in its directory");
        assert_eq!(sid_of(&path), sid, "and is found again");
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
    let said = super::demo::twiml::Twiml::read(&twiml(&format!("<Say>{escaped}</Say>"))).unwrap();
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
        let Ok(message) = FromTwilio::parse(text, sid) else {
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
            FromTwilio::Media(payload) => {
                assert_eq!((event, &value["media"]["payload"]), (&json!("media"), &json!(payload)));
                feed_sound(&payload);
            }
            FromTwilio::Start(start) => {
                assert_eq!(value["start"]["callSid"], start.call_sid);
                assert_eq!(value["start"]["streamSid"], start.stream_sid);
                assert_eq!(value["start"]["mediaFormat"]["encoding"], start.media_format.encoding);
                for (name, parameter) in start.custom_parameters {
                    assert_eq!(value["start"]["customParameters"][name], parameter);
                }
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
    static BRIDGE: LazyLock<Bridge> = LazyLock::new(bridge);
    let (mut transcript, mut filed) = (Transcript::default(), Filed::default());
    for line in text.lines() {
        let Ok(message) = FromAgent::parse(line) else {
            continue;
        };
        match message {
            FromAgent::Transcript(heard) => {
                if let Some(line) = transcript.hear(1, &heard) {
                    filed.apply(&line.event());
                }
            }
            FromAgent::Invocation(invocation) => {
                assert!(invocation.id.len() <= INVOCATION_ID_BYTES_MAX);
                for tool in BRIDGE.agent.tools.values() {
                    let told = missing(&BRIDGE, tool, &invocation);
                    assert!(told.is_none_or(|told| told.starts_with("Not done yet: ")));
                }
            }
            FromAgent::ClearBuffer | FromAgent::State(_) | FromAgent::Other(_) => {}
        }
    }
    let kept: usize = transcript.lines.iter().map(|line| line.text.len()).sum();
    assert!(kept <= TRANSCRIPT_BYTES_MAX, "{kept} bytes were kept");
    for line in transcript.lines.iter_mut().filter(|line| !line.finished) {
        line.finished = true;
        filed.apply(&line.event());
    }
    check_transcript(&transcript);
    // What is repeated counts twice when it is read back, so there is less room.
    if transcript.bytes < TRANSCRIPT_BYTES_MAX / 4 {
        let [mut told, mut said] = [&filed.transcript, &transcript].map(Transcript::text);
        let ordinals: BTreeSet<u64> = transcript.lines.iter().map(|line| line.ordinal).collect();
        if ordinals.len() < transcript.lines.len() {
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
    check_failure(&ultravox_refusal(status, &reply.body));
    match read_agent_call(&reply.body) {
        Ok(created) => assert!(reply.body.len() >= created.id.len()),
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
    static BRIDGE: LazyLock<Mutex<Bridge>> = LazyLock::new(|| Mutex::new(bridge()));
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
    assert!(agent.stages.contains_key(&agent.first_stage));
    let mut bridge = BRIDGE.lock().unwrap_or_else(PoisonError::into_inner);
    bridge.agent = agent;
    for stage in bridge.agent.stages.values() {
        assert!(stage.tools.iter().all(|tool| bridge.agent.tools.contains_key(tool)));
        let offered = json!(selected_tools(&bridge, stage));
        assert_eq!(super::demo::objections::tools_objection(&offered), None, "{offered}");
    }
    check_workflow(&workflow_for(&bridge.agent).unwrap());
    check_diagram(&bridge.agent);
    for tool in bridge.agent.tools.values() {
        if let ToolAction::EnterStage { stage, .. } = &tool.action {
            assert!(bridge.agent.stages.contains_key(stage), "it leads nowhere");
        }
        assert!(!tool.within.is_zero() && tool.within <= TOOL_WITHIN_MAX);
    }
}

/// A journal as a process that died has left it, or as somebody has edited it. It is read, and the
/// call it tells of goes on in it.
fn feed_journal(data: &[u8]) {
    static SCRATCH: LazyLock<Mutex<Scratch>> = LazyLock::new(|| Mutex::new(Scratch::new()));
    let scratch = SCRATCH.lock().unwrap_or_else(PoisonError::into_inner);
    let path = scratch.file("20261123T000000Z-CA1.jsonl", data);
    let before = Filed::read(&path).unwrap();
    check_transcript(&before.transcript);
    let said = before.transcript.text();
    let parcel = left_behind(Filed::read(&path).unwrap(), path.clone());
    assert_eq!(parcel.transcript.text(), said);
    assert_eq!(parcel.unfinished, before.ended_by.is_empty());

    let journal = Journal::at(path.clone());
    journal.note(&json!({"event": "stage", "stage": "line\none, \u{1f44b}"}));
    journal.note(&json!({"event": "end", "endedBy": "CallerLeft"}));
    let after = Filed::read(&path).unwrap();
    assert_eq!(after.stage, "line\none, \u{1f44b}", "what was there before spoils nothing");
    assert_eq!(after.ended_by, "CallerLeft");
    assert_eq!(after.transcript.text(), said);
    assert_eq!((after.sid, after.number, after.agents), (before.sid, before.number, before.agents));
    assert_eq!((after.delivered, after.transferred), (before.delivered, before.transferred));
}

// ============================================================================
// The verbs workflow and diagram
// ============================================================================

/// As n8n would read it: names are unique, every line leads to a node, and whatever goes wrong or
/// right there is an answer at the end.
fn check_workflow(workflow: &Value) {
    let nodes = workflow["nodes"].as_array().unwrap();
    let mut names = BTreeSet::new();
    let mut ids = BTreeSet::new();
    let mut places = BTreeSet::new();
    for node in nodes {
        assert!(names.insert(node["name"].as_str().unwrap()), "two nodes {}", node["name"]);
        assert!(ids.insert(node["id"].as_str().unwrap()), "two ids of {}", node["name"]);
        assert!(places.insert(node["position"].to_string()), "{} hides another", node["name"]);
    }
    let connections = workflow["connections"].as_object().unwrap();
    for (from, outputs) in connections {
        assert!(names.contains(from.as_str()), "a line from nowhere: {from}");
        for line in outputs["main"].as_array().unwrap().iter().flat_map(|o| o.as_array().unwrap()) {
            assert!(names.contains(line["node"].as_str().unwrap()), "a line to nowhere: {line}");
        }
    }
    for node in nodes.iter().filter(|node| !node["type"].as_str().unwrap().ends_with("stickyNote"))
    {
        let name = node["name"].as_str().unwrap();
        let outputs = connections.get(name).map(|outputs| outputs["main"].as_array().unwrap());
        let kind = node["type"].as_str().unwrap().trim_start_matches("n8n-nodes-base.");
        let wanted = match kind {
            "respondToWebhook" | "stopAndError" => continue,
            "switch" => node["parameters"]["rules"]["values"].as_array().unwrap().len() + 1,
            "if" => 2,
            _ if node["onError"] == "continueErrorOutput" => 2,
            _ => 1,
        };
        let outputs = outputs.map(|outputs| outputs.iter().filter(|to| to[0]["node"].is_string()));
        assert_eq!(outputs.map(Iterator::count), Some(wanted), "{name} ({kind}) has loose ends");
    }
    let lines = connections["Route"]["main"].as_array().unwrap();
    assert_eq!(lines.last().unwrap()[0]["node"], "Unknown route", "the fallback comes last");
}

/// Every route that the Switch knows, and the node that it leads to.
fn branches(workflow: &Value) -> Vec<(String, String)> {
    let nodes = workflow["nodes"].as_array().unwrap();
    let route = nodes.iter().find(|node| node["name"] == "Route").unwrap();
    let rules = route["parameters"]["rules"]["values"].as_array().unwrap();
    let lines = workflow["connections"]["Route"]["main"].as_array().unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let pairs = rules.iter().zip(lines);
    pairs
        .map(|(rule, to)| {
            (text(&rule["conditions"]["conditions"][0]["rightValue"]), text(&to[0]["node"]))
        })
        .collect()
}

fn built_in_agent() -> Agent {
    Agent::read(None).ok().unwrap()
}

#[test]
fn the_workflow_of_the_built_in_agent_is_the_one_in_the_file() {
    let printed = workflow_for(&built_in_agent()).unwrap();
    let file: Value = serde_json::from_str(include_str!("agent/n8n-workflow.json")).unwrap();
    assert_eq!(printed, file);
    check_workflow(&printed);
    let wanted = [("1", "Greetings"), ("2", "Transcript table"), ("3", "Booking")];
    assert_eq!(branches(&printed), wanted.map(|(route, node)| (route.to_owned(), node.to_owned())));
}

#[test]
fn every_tool_of_ones_own_has_a_branch_that_names_it_and_its_parameters() {
    let mut agent = small_agent();
    agent["tools"]["check_order"] = json!({
        "description": "Finds out\nwhere an order is.",
        "parameters": {
            "type": "object",
            "properties": {
                "order_number": {"type": "string", "description": "As on the bill."},
                "in": {"type": "string"},
            },
            "required": ["order_number"],
        },
        "n8n": {"route": "10", "calendar": "in"},
    });
    agent["tools"]["Route"] = json!({"description": "An odd name.", "n8n": {"route": "4"}});
    agent["stages"]["second"]["tools"] = json!(["note", "look", "bye", "check_order", "Route"]);
    let agent = read_agent(&agent.to_string(), HELLO).ok().unwrap();
    let printed = workflow_for(&agent).unwrap();
    assert_eq!(printed, workflow_for(&agent).unwrap(), "two prints are the same");
    check_workflow(&printed);
    let found = branches(&printed);
    let own: Vec<(&str, &str)> =
        found.iter().skip(3).map(|(r, n)| (r.as_str(), n.as_str())).collect();
    assert_eq!(own, [("4", "Tool Route"), ("10", "Tool check_order")]);
    let nodes = printed["nodes"].as_array().unwrap();
    let text = |name: &str, parameter: &str| {
        let node = nodes.iter().find(|node| node["name"] == name).unwrap();
        node["parameters"][parameter].as_str().unwrap().to_owned()
    };
    let note = text("Tool check_order: note", "content");
    for line in [
        "## Route 10: check_order",
        "**check_order**: Finds out where an order is.",
        "- `order_number` (string): As on the bill.",
        "- `calendar_id` (string, optional): e-mail of the calendar for in",
    ] {
        assert!(note.lines().any(|found| found == line), "{line:?} is not in:\n{note}");
    }
    let answer = text("Tool check_order: answer", "responseBody");
    assert!(answer.contains("check_order is not connected"), "{answer}");
}

#[test]
fn tools_that_share_a_route_share_a_branch() {
    let mut agent = small_agent();
    for (tool, route) in [("ask", "4"), ("tell", "4"), ("greet", "1"), ("book_more", "3")] {
        agent["tools"][tool] = json!({"description": "Asks.", "n8n": {"route": route}});
    }
    let agent = read_agent(&agent.to_string(), HELLO).ok().unwrap();
    let printed = workflow_for(&agent).unwrap();
    check_workflow(&printed);
    let found = branches(&printed);
    assert_eq!(found.len(), 4, "{found:?}");
    assert_eq!(found.last().unwrap(), &("4".to_owned(), "Tool ask, tell".to_owned()));
    assert!(printed.to_string().contains("These tools share a route"));
}

/// n8n reads `=…` and `{{ … }}` in a field as code.
#[test]
fn a_route_that_n8n_would_take_for_code_is_spelled_out() {
    let mut agent = small_agent();
    for (tool, route) in [("plain", "check-order_2.a"), ("code", "={{x}}"), ("quoted", "\"ü👋")]
    {
        agent["tools"][tool] = json!({"description": "Asks.", "n8n": {"route": route}});
    }
    let agent = read_agent(&agent.to_string(), HELLO).ok().unwrap();
    let printed = workflow_for(&agent).unwrap();
    check_workflow(&printed);
    let own: BTreeSet<String> = branches(&printed).into_iter().skip(3).map(|(r, _)| r).collect();
    let wanted = [
        "check-order_2.a",
        "={{ \"\\u003d\\u007b\\u007b\\u0078\\u007d\\u007d\" }}",
        "={{ \"\\u0022\\u00fc\\ud83d\\udc4b\" }}",
    ];
    assert_eq!(own, wanted.map(str::to_owned).into());
}

/// Whatever the names are: every node that a line leads to is there, and no name can end the
/// quotes it stands in.
fn check_diagram(agent: &Agent) {
    let diagram = diagram::mermaid(agent);
    let lines: Vec<&str> = diagram.lines().map(str::trim).collect();
    assert_eq!(lines.first(), Some(&"flowchart TD"));
    for line in &lines {
        assert!(matches!(line.matches('"').count(), 0 | 2), "{line}");
        let Some((_, to)) = line.split_once(" -->") else {
            continue;
        };
        let to = to.rsplit("| ").next().unwrap().trim();
        let node = [format!("{to}["), format!("{to}(")];
        assert!(lines.iter().any(|line| node.iter().any(|node| line.starts_with(node))), "{line}");
    }
    assert!(!diagram::plain(agent).is_empty());
}

#[test]
fn the_diagram_shows_stages_and_what_leads_from_one_to_the_next() {
    let agent = read_agent(&small_agent().to_string(), HELLO).ok().unwrap();
    let wanted = "\
flowchart TD
    caller([\"a call comes in\"]) --> s0
    s0[\"<b>hello</b><br/>Ada, voice Mark<br/>book: by n8n, route 3\"]
    s1[\"<b>second</b><br/>Ada, voice Mark<br/>note: by callbridge<br/>look: by Ultravox\"]
    over([\"the call ends\"])
    s0 -->|\"go_on\"| s1
    s0 -->|\"bye\"| over
    s1 -->|\"bye\"| over
";
    assert_eq!(diagram::mermaid(&agent), wanted);
    let wanted = "\
hello (first stage): Ada, voice Mark
  go_on  -> second
  book   by n8n, route 3
  bye    -> the call ends

second: Ada, voice Mark
  note   by callbridge
  look   by Ultravox
  bye    -> the call ends
";
    assert_eq!(diagram::plain(&agent), wanted);
}

#[test]
fn a_diagram_survives_any_name_of_a_stage() {
    let mut agent = small_agent();
    let odd = "end\" ] --> <b>`x`;\n# 1. ü";
    let stage = agent["stages"]["second"].take();
    take(&mut agent["stages"], "second");
    agent["stages"][odd] = stage;
    agent["tools"]["go_on"]["enter_stage"]["stage"] = json!(odd);
    // And it leads back, which must not go on for ever.
    agent["tools"]["back"] =
        json!({"description": "Back.", "enter_stage": {"stage": "hello", "message": "Again."}});
    agent["stages"][odd]["tools"] = json!(["back", "bye"]);
    let agent = read_agent(&agent.to_string(), HELLO).ok().unwrap();
    check_diagram(&agent);
    let diagram = diagram::mermaid(&agent);
    let label = "<b>end#34; #93; --#62; #60;b#62;#96;x#96;#59; #35; 1. ü</b>";
    assert!(diagram.contains(label), "{diagram}");
    assert!(diagram.contains("s1 -->|\"back\"| s0"), "{diagram}");
}

#[test]
fn the_readme_shows_the_diagram_of_the_built_in_agent() {
    let readme = include_str!("../README.md");
    let shown = readme.split("```mermaid\n").nth(1).and_then(|rest| rest.split("```").next());
    assert_eq!(
        shown.unwrap_or_default(),
        diagram::mermaid(&built_in_agent()),
        "README.md is stale: put what `cargo run -- diagram` prints into its mermaid block"
    );
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

// --- Metrics, and the journals of every day ------------------------------------------

#[test]
fn every_way_a_call_can_end_is_in_the_metrics() {
    let source = include_str!("main.rs");
    let (_, after) = source.split_once("\nenum HangUp {\n").unwrap();
    let (body, _) = after.split_once("\n}\n").unwrap();
    let words = body.lines().map(str::trim).filter(|line| !line.starts_with("//"));
    let words: Vec<&str> = words.map(|word| word.trim_end_matches(',')).collect();
    assert_eq!(HangUp::ALL.map(|how| format!("{how:?}")).to_vec(), words);
}

#[test]
fn every_reason_to_turn_somebody_away_is_in_the_metrics() {
    let source = include_str!("main.rs");
    for call in ["refused(\"", "refuse(\""] {
        for after in source.split(call).skip(1) {
            let reason = after.split('"').next().unwrap();
            assert!(REFUSALS.contains(&reason), "{reason} is not in REFUSALS");
        }
    }
    for reason in REFUSALS {
        let uses = source.matches(&format!("\"{reason}\"")).count();
        assert!(uses > 1, "nobody is turned away for {reason}");
    }
}

#[test]
fn a_histogram_puts_each_time_where_it_belongs() {
    let histogram = Histogram::of_frames();
    for us in [0, 10, 11, 100_000, 100_001, 3_000_000] {
        histogram.observe(Duration::from_micros(us));
    }
    let counts: Vec<u64> = histogram.counts.iter().map(super::Counter::value).collect();
    assert_eq!(counts, [2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2]);
    assert_eq!(histogram.sum_ns.load(Ordering::Relaxed), 3_200_022_000);
    assert!(FRAME_BOUNDS_US.is_sorted() && super::WAIT_BOUNDS_US.is_sorted());
}

#[test]
fn odd_characters_in_a_label_do_not_end_it() {
    let mut page = MetricsPage(String::new());
    page.sample("name", &[("route", "a\"b\\c\nd}"), ("outcome", "ü")], 1);
    assert_eq!(page.0, "name{route=\"a\\\"b\\\\c\\nd}\",outcome=\"ü\"} 1\n");
}

#[test]
fn what_is_to_be_done_every_day_is_done_until_there_is_news() {
    let (news, next_news) = mpsc::channel();
    let mut days = 0;
    let found = await_news(&next_news, Duration::ZERO, || {
        days += 1;
        if days == 3 {
            news.send("stop").unwrap();
        }
    });
    assert_eq!((found, days), (Some("stop"), 3));
    let (news, next_news) = mpsc::channel::<()>();
    drop(news);
    assert_eq!(await_news(&next_news, Duration::ZERO, || ()), None);
}

#[test]
fn journals_are_removed_while_the_process_runs() {
    const HOUR: i64 = 3_600;
    let scratch = Scratch::new();
    let data_dir = scratch.0.to_str().unwrap();
    let config = settings(&[
        ("DATA_DIR", data_dir),
        ("KEEP_DAYS", "2"),
        ("N8N_WEBHOOK_URL", "https://n8n.example/webhook/call"),
    ]);
    let bridge = Bridge::new(config.ok().unwrap()).ok().unwrap();
    fs::create_dir_all(scratch.0.join("calls")).unwrap();
    for (sid, hours, last) in [
        ("CAold", 49, "delivered"),
        ("CAyoung", 47, "delivered"),
        ("CAlate", 100, "end"),
        ("CAnew", 1, "end"),
    ] {
        let at = jiff::Timestamp::now() - jiff::SignedDuration::from_secs(hours * HOUR);
        let ring = json!({"at": at.to_string(), "event": "ring", "callSid": sid});
        let last = json!({"at": at.to_string(), "event": last, "endedBy": "CallerLeft"});
        scratch.file(&format!("calls/{}-{sid}.jsonl", 1_000 - hours), format!("{ring}\n{last}\n"));
    }
    let mut waiting = Vec::new();
    tidy_journals(&bridge, |filed, _| waiting.push(filed.sid));
    let left: Vec<PathBuf> = journals(&scratch.0);
    assert_eq!(
        left.iter().map(|path| sid_of(path)).collect::<Vec<_>>(),
        ["CAlate", "CAyoung", "CAnew"]
    );
    assert_eq!(waiting, ["CAnew"]);
    assert_eq!(bridge.outbox.given_up.load(Ordering::Relaxed), 1);
}
