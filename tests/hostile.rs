//! Hostile input: whoever finds the port may send anything, and so may a broken or taken-over
//! Ultravox or n8n. Each attack here goes through real sockets against the real program, beside
//! two calls of other people, one whose agent speaks TLS and one in plain text. What must hold:
//!
//! - the bystanders' sound flows both ways in real time during every attack, and in the end it is
//!   complete to the sample;
//! - the attack ends by a limit of `src/main.rs`, which stands beside it in the table below, and
//!   with a line in the log;
//! - threads, file descriptors and memory come back to what they were;
//! - the next caller is served.
//!
//! Every test writes a table of what its attacks have cost to stderr, past the harness's capture:
//! `cargo test --test hostile` shows it without further words.

#[path = "../src/demo/mod.rs"]
mod demo;

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use demo::{
    AgentCall, FRAME_BYTES, FRAME_TIME, Heard, HttpAnswer, PATIENCE, Phone, Reply, Ringing,
    Talking, Trouble, World, WorldBuilder, pcm_of, twilio_signature, voice,
};

type Failed = Box<dyn Error + Send + Sync>;
type Outcome = Result<(), Failed>;

const CALLER: &str = "+4930901820";
/// What the built-in agent says when n8n has nothing better begins so.
const DEFAULT_GREETING: &str = "Thank you for calling SecureLife Insurance. This is Sara";
/// The bearer token of the owner, in worlds that have one.
const API_TOKEN: &str = "the-owners-own-token-0123456789";

/// A frame that takes longer through the bridge than this is not real time. A healthy one takes
/// a millisecond; the rest is for a test machine that runs attacker, victim and bystanders on two
/// busy cores. What that machine stalls for is forgiven on top, three times over.
const REAL_TIME: Duration = Duration::from_secs(1);
/// Threads and file descriptors are back within this time. `tiny_http` keeps a thread that has
/// nothing to do for 5 s, and one whose doors are shut is kept for `REQUEST_WITHIN`.
const RECOVERS_WITHIN: Duration = Duration::from_secs(30);
/// The HTTP clients for Ultravox, n8n and Twilio keep three idle connections each.
const KEPT_CONNECTIONS: usize = 9;
/// The allocator gives back whole pages at its end only.
const KEPT_KIB: usize = 16 * 1_024;
/// An attack that needs no more to show its point than "many".
const MANY: usize = 20;
/// In the place of a limit: it is refused as soon as it is seen.
const FIRST_MISTAKE: &str = "the first mistake";
/// Idle connections at once.
const IDLE: usize = 5_000;
/// File descriptors of this process for that attack, both ends of it counted.
const DESCRIPTORS: usize = IDLE + 1_000;
/// A peer of ours that hangs is a failure, not a wait.
const HANGS: Duration = Duration::from_secs(40);

// ============================================================================
// The door: connections that never become a request
// ============================================================================

#[test]
fn nonsense_ends_at_the_door() -> Outcome {
    let descriptors = raise_descriptors()?;
    let siege = Siege::lay("at the door", builder())?;
    let endless = format!("GET / HTTP/1.1\r\n{}", "X-Header: again\r\n".repeat(100_000));
    let huge = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1_000_000));
    let hello = [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".as_slice(), &noise(506)].concat();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x12\x04\0\0\0\0\0\0\x03\0\0\0\x64";
    let petabyte = head("POST /incoming-call", "Content-Length: 1000000000000000");
    let all_there_is = head("POST /nowhere", &format!("Content-Length: {}", u64::MAX));
    let contradiction =
        head("POST /nowhere", "Content-Length: 1\r\ncontent-length: 999999999999999");
    let no_number =
        head("POST /nowhere", "Content-Length: 999999999999999\r\nContent-Length: many");
    let longer = head("POST /incoming-call", "Content-Length: 2000") + &"a".repeat(1_000_000);
    let chunks = "1000\r\n".to_owned() + &"a".repeat(0x1000) + "\r\n";
    let chunked = head("POST /incoming-call", "Transfer-Encoding: chunked") + &chunks.repeat(100);
    let one_chunk = head("POST /incoming-call", "Transfer-Encoding: chunked")
        + "fffffffffffffff\r\n"
        + &"a".repeat(1_000_000);
    let size = head("POST /incoming-call", "Transfer-Encoding: chunked") + &"0".repeat(1_000_000);
    let pipelined = head("GET /health", "X: y").repeat(300);
    let cases: [(&str, &str, &[u8], &str, &str); 14] = [
        ("endless head", "HEAD_BYTES_MAX", endless.as_bytes(), "431", "head of the request is too"),
        ("huge head", "HEAD_BYTES_MAX", huge.as_bytes(), "431", "head of the request is too long"),
        ("binary junk", FIRST_MISTAKE, &noise(64 * 1_024), "400", "this is not HTTP/1.1"),
        ("HTTP/2 preface", FIRST_MISTAKE, preface, "400", "this is not HTTP/1.1"),
        ("TLS hello", FIRST_MISTAKE, &hello, "400", "TLS on the plain port"),
        ("a petabyte announced", "ANNOUNCED_BYTES_MAX", petabyte.as_bytes(), "413", "announced"),
        ("2^64-1 bytes announced", "ANNOUNCED_BYTES_MAX", all_there_is.as_bytes(), "413", "annou"),
        ("two lengths", "ANNOUNCED_BYTES_MAX", contradiction.as_bytes(), "413", "announced"),
        ("a length and a word", "ANNOUNCED_BYTES_MAX", no_number.as_bytes(), "413", "announced"),
        ("body longer than it says", "BODY_BYTES_MAX", longer.as_bytes(), "403", "is missing"),
        ("chunked for ever", "BODY_BYTES_MAX", chunked.as_bytes(), "413", "longer than 65536 b"),
        ("a chunk of 2^60 bytes", "BODY_BYTES_MAX", one_chunk.as_bytes(), "413", "longer than 65"),
        ("endless chunk length", "BODY_BYTES_MAX", size.as_bytes(), "400", "body did not arrive"),
        ("300 requests in one", "HEAD_BYTES_MAX", pipelined.as_bytes(), "200", ""),
    ];
    for (name, limit, bytes, status, line) in cases {
        siege.attack(name, limit, line, |world| {
            for _ in 0..MANY {
                let answer = says(world, bytes)?;
                let right = answer.starts_with(&format!("HTTP/1.1 {status} "));
                world_is(world, right, &format!("{name} was answered: {answer:.200}"))?;
                let again = answer.matches("HTTP/1.1 ").count();
                world_is(world, again == 1, &format!("{name} got {again} answers"))?;
            }
            Ok(MANY)
        })?;
    }
    let idle = IDLE.min(descriptors.saturating_sub(500));
    siege.attack("idle connections", "UNDECIDED_MAX", "oldest make room", |world| {
        let spared = number_of("UNDECIDED_MAX")?;
        let crowd = |count: usize| (0..count).map(|_| knock(world)).collect::<io::Result<Vec<_>>>();
        let mut idle = crowd(idle - spared - MANY)?;
        // Callers whose streams have been let in, but have not said which they are.
        let streams = (0..MANY).map(|_| stream(world)).collect::<Result<Vec<_>, Failed>>()?;
        idle.extend(crowd(spared + MANY)?);
        for (ringing, mut socket) in streams {
            socket.write_all(&start(&ringing.call_sid, "MZ1"))?;
            let agent = agents_of(world, &ringing.call_sid).into_iter().next();
            agent
                .ok_or("no agent was created for the call")?
                .send_audio(&pcm_of(&voice(7, 100)))?;
            let mut frame = [0; 4];
            socket.read_exact(&mut frame)?;
            world_is(world, frame[0] == 0x81, &format!("the caller got {frame:?}"))?;
            ringing.call_status(world, "completed")?;
        }
        serves_a_call(world)?;
        for socket in idle.iter_mut().rev().skip(spared) {
            world_is(world, socket.read(&mut [0])? == 0, "an idle connection got an answer")?;
        }
        Ok(idle.len())
    })?;
    siege.lift()
}

#[test]
fn a_peer_that_is_slow_runs_out_of_time() -> Outcome {
    thread::scope(|scope| {
        let sieges: Vec<_> = [
            slow_heads as fn() -> Outcome,
            slow_bodies,
            slow_streams,
            slow_frames,
            slow_joins,
            slow_answers_of_n8n,
        ]
        .into_iter()
        .map(|siege| scope.spawn(siege))
        .collect();
        for siege in sieges {
            siege.join().map_err(|_| "a siege panicked")??;
        }
        Ok(())
    })
}

/// A byte every quarter of a second, on each of them.
fn slow_heads() -> Outcome {
    let siege = Siege::lay("slow heads", builder())?;
    siege.attack("trickling head", "HEAD_WITHIN", "request took too long", |world| {
        let sockets = drip(world, 100, b"GET / HTTP/1.1\r\nX: ", Duration::from_millis(250))?;
        for mut socket in sockets {
            let answer = rest_of(&mut socket);
            world_is(world, answer.starts_with("HTTP/1.1 408 "), &answer)?;
        }
        Ok(100)
    })?;
    siege.lift()
}

fn slow_bodies() -> Outcome {
    let siege = Siege::lay("slow bodies", builder())?;
    siege.attack("trickling body", "REQUEST_WITHIN", "it took over 20 s", |world| {
        let request = head("POST /incoming-call", "Content-Length: 60000");
        drip(world, 100, request.as_bytes(), Duration::from_millis(500)).map(|all| all.len())
    })?;
    siege.lift()
}

fn slow_streams() -> Outcome {
    let siege = Siege::lay("slow streams", builder())?;
    siege.attack("streams without a start", "START_WITHIN", "no start within 10 s", |world| {
        let streams = (0..MANY).map(|_| stream(world)).collect::<Result<Vec<_>, Failed>>()?;
        serves_a_call(world)?;
        for (ringing, mut socket) in streams {
            let code = close_code(&mut socket);
            world_is(world, code == Some(1008), &format!("a silent stream got {code:?}"))?;
            ringing.call_status(world, "completed")?;
        }
        Ok(MANY)
    })?;
    siege.lift()
}

/// An Ultravox whose WebSocket says yes for ever, a byte at a time, in plain text and in TLS.
fn slow_joins() -> Outcome {
    let siege = Siege::lay("slow joins", builder())?;
    siege.attack("joining: a byte at a time", "JOIN_WITHIN", "not in time", |world| {
        let door = Door::open(|mut socket, over| {
            // A TLS record begins with 22; a request for an upgrade with a G.
            let mut first = [0];
            let plain = socket.read_exact(&mut first).is_ok() && first == *b"G";
            let opening: &[u8] =
                if plain { b"HTTP/1.1 101 Yes\r\nX: " } else { b"\x16\x03\x03\x40\x00\x02" };
            let mut sent = socket.write_all(opening);
            while sent.is_ok() && !over.pause(Duration::from_millis(100)) {
                sent = socket.write_all(b"\x01");
            }
        })?;
        for scheme in ["ws", "wss"] {
            let url = format!("{scheme}://{}/join?token=slow", door.address);
            let created = json!({"callId": "5f1f7a1e-slow", "joinUrl": url});
            world.ultravox.refuse_next(1, &Reply::json(201, &created));
            let ringing = world.ring(CALLER)?;
            world_is(world, ringing.twiml.stream_url.is_none(), &ringing.twiml.xml)?;
        }
        Ok(2)
    })?;
    siege.lift()
}

/// What is not a message does not count as one, however much of it comes.
fn slow_frames() -> Outcome {
    let siege = Siege::lay("slow frames", builder())?;
    siege.attack("pings and empty fragments", "START_WITHIN", "no start within 10 s", |world| {
        let ping = frame(0x89, &[b'p'; 125]).repeat(20);
        let fragments = [frame(0x01, b""), frame(0x00, b"").repeat(400)].concat();
        let more_fragments = frame(0x00, b"").repeat(400);
        let kinds = [(&ping, &ping), (&fragments, &more_fragments)];
        let (mut sockets, mut calls) = (Vec::new(), Vec::new());
        for (begin, _) in kinds.iter().cycle().take(MANY) {
            let (ringing, mut socket) = stream(world)?;
            socket.write_all(begin)?;
            sockets.push(socket);
            calls.push(ringing);
        }
        let over = Over::default();
        let mut open = sockets.len();
        while open > 0 {
            open = 0;
            for (socket, (_, more)) in sockets.iter_mut().zip(kinds.iter().cycle()) {
                open += usize::from(socket.write_all(more).is_ok());
            }
            over.pause(Duration::from_millis(20));
        }
        for ringing in calls {
            ringing.call_status(world, "completed")?;
        }
        Ok(sockets.len())
    })?;
    siege.lift()
}

// ============================================================================
// The media stream: frames, messages, tokens
// ============================================================================

#[test]
fn a_media_stream_of_a_stranger_ends_with_its_first_mistake() -> Outcome {
    let siege = Siege::lay("media stream, strangers", builder())?;
    let deep = "[".repeat(30_000);
    let deep_start = format!(r#"{{"event":"start","start":{deep}"#);
    let too_deep = "[".repeat(100_000);
    let huge = format!(r#"{{"event":"media","{}":1}}"#, "k".repeat(60_000));
    let parameters: Vec<String> = (0..2_000).map(|n| format!(r#""p{n}":"v{n}""#)).collect();
    let many = format!("{{{}}}", parameters.join(","));
    let fragment = frame(0x01, &[b' '; 16_384]);
    let fragments = [fragment, frame(0x00, &[b' '; 16_384]).repeat(64)].concat();
    let mid_message = [frame(0x01, b"{\"ev"), frame(0x88, &1_000_u16.to_be_bytes())].concat();
    let media = r#"{"event":"media","streamSid":"MZ1","media":{"payload":"fn5+"}}"#;
    let [message, none] = ["TWILIO_MESSAGE_BYTES_MAX", FIRST_MISTAKE];
    let sense = "nonsense on the connection";
    let not_ours = "its sound is not mu-law at 8000 Hz";
    let cases: [(&str, &str, Vec<u8>, &str, u16); 23] = [
        ("a frame not masked", none, b"\x81\x02{}".to_vec(), sense, 1002),
        ("a frame of 2^62 bytes", message, b"\x81\xff\x40\0\0\0\0\0\0\0abcd".to_vec(), sense, 1009),
        ("a frame of 64 KiB + 1", message, frame(0x81, &vec![b' '; 65_537]), sense, 1009),
        ("fragments for ever", message, fragments, sense, 1009),
        ("not UTF-8", none, frame(0x81, b"{\"event\":\"\xc3\x28\"}"), sense, 1007),
        ("half a character", none, frame(0x81, b"\xf0\x9f\x98"), sense, 1007),
        ("reserved bits", none, frame(0xC1, b"{}"), sense, 1002),
        ("reserved opcode", none, frame(0x83, b"{}"), sense, 1002),
        ("a fragmented ping", none, frame(0x09, b"p"), sense, 1002),
        ("a ping of 126 bytes", none, frame(0x89, &[b'p'; 126]), sense, 1002),
        ("a continuation first", none, frame(0x80, b"{}"), sense, 1002),
        ("a close of one byte", none, frame(0x88, b"\x03"), sense, 1002),
        ("close in mid-message", none, mid_message, "said goodbye before its start", 1000),
        ("a binary message", none, frame(0x82, b"{}"), "a binary message before start", 1003),
        ("deep JSON", message, text(&deep), "not a message of Twilio's", 1008),
        ("deep JSON as start", message, text(&deep_start), "not a message of Twilio's", 1008),
        ("deeper JSON", message, text(&too_deep), sense, 1009),
        ("a huge key", message, text(&huge), "a media message without its content", 1008),
        ("media before start", none, text(media), "another message before start", 1008),
        ("start of another call", none, start("CAnobody", "MZ1"), "it is another call's", 1008),
        (
            "2,000 parameters",
            message,
            start_with("CA1", "MZ1", &many),
            "it is another call's",
            1008,
        ),
        ("sound of another kind", none, sound("audio/x-l16", 8_000), not_ours, 1008),
        ("sound of another pace", none, sound("audio/x-mulaw", 16_000), not_ours, 1008),
    ];
    for (name, limit, bytes, line, wanted) in cases {
        siege.attack(name, limit, line, |world| {
            for _ in 0..MANY {
                let (ringing, mut socket) = stream(world)?;
                // The bridge may have closed before all of it is sent.
                drop(socket.write_all(&bytes));
                let code = close_code(&mut socket);
                ringing.call_status(world, "completed")?;
                let why = format!("{name} was closed with {code:?}, not {wanted}");
                world_is(world, code == Some(wanted), &why)?;
            }
            Ok(MANY)
        })?;
    }
    siege.attack("strangers", FIRST_MISTAKE, "no call waits for this stream", |world| {
        for path in ["/media-stream/", "/media-stream/check/x", "/media-stream/CA1/x"] {
            for _ in 0..MANY {
                let answer = says(world, upgrade_of(path, None).as_bytes())?;
                world_is(world, answer.starts_with("HTTP/1.1 403 "), &answer)?;
            }
        }
        Ok(3 * MANY)
    })?;
    siege.attack("wrong signature", FIRST_MISTAKE, "signature is wrong", |world| {
        for wrong in ["", "AAAA", "not base64 at all", &"A".repeat(10_000)] {
            let ringing = world.ring(&somebody())?;
            let (status, _) = upgrade(world, &ringing.twiml.stream_path(), Some(wrong))?;
            ringing.call_status(world, "completed")?;
            world_is(world, status.starts_with("HTTP/1.1 403 "), &format!("{wrong}: {status}"))?;
        }
        Ok(4)
    })?;
    world_is(&siege.world, siege.world.ultravox.requests() > 2, "fresh calls were served")?;
    siege.lift()
}

/// Its name, its limit, what is sent, what the log says, with which code the stream is closed.
type Mistake<'a> = (&'a str, &'a str, &'a dyn Fn(&Victim) -> Vec<u8>, &'a str, u16);

#[test]
fn a_stream_that_misbehaves_after_its_start_ends_alone() -> Outcome {
    let siege = Siege::lay("media stream, in a call", builder())?;
    let [message, none] = ["TWILIO_MESSAGE_BYTES_MAX", FIRST_MISTAKE];
    let media = |sid: &str, payload: &str| {
        text(
            &json!({"event": "media", "streamSid": sid, "media": {"payload": payload}}).to_string(),
        )
    };
    let again = |victim: &Victim| start(victim.sid(), victim.phone.stream_sid());
    let connected = |victim: &Victim| {
        let sid = victim.phone.stream_sid();
        text(&json!({"event": "connected", "streamSid": sid}).to_string())
    };
    let other = |_: &Victim| media("MZ00000000000000000000000000000000", "fn5+");
    let not_base64 = |victim: &Victim| media(victim.phone.stream_sid(), "not base64 @ all");
    let huge = |victim: &Victim| media(victim.phone.stream_sid(), &"/".repeat(4 * 65_536 / 3));
    let binary = |_: &Victim| frame(0x82, b"\0\0");
    let unmasked = |_: &Victim| b"\x81\x02{}".to_vec();
    let empty = |victim: &Victim| {
        let sid = victim.phone.stream_sid();
        text(&json!({"event": "media", "streamSid": sid}).to_string())
    };
    let mid_message =
        |_: &Victim| [frame(0x01, b"{\"ev"), frame(0x88, &1_001_u16.to_be_bytes())].concat();
    let cases: [Mistake; 9] = [
        ("a second start", none, &again, "a second start", 1002),
        ("connected again", none, &connected, "a second start", 1002),
        ("another stream's media", none, &other, "a media message for another stream", 1002),
        ("bad base64", none, &not_base64, "a payload that is not base64", 1002),
        ("a payload of 64 KiB", message, &huge, "nonsense on the connection", 1009),
        ("a binary message", none, &binary, "a binary message", 1003),
        ("not masked", none, &unmasked, "nonsense on the connection", 1002),
        ("media without payload", none, &empty, "a media message without its content", 1002),
        ("close in mid-message", none, &mid_message, "closed with code 1001", 1001),
    ];
    for (name, limit, mistake, line, code) in cases {
        siege.attack(name, limit, line, |world| {
            let victims: Vec<Victim> = (0..5).map(|_| victim(world)).collect::<Result<_, _>>()?;
            for victim in &victims {
                victim.phone.send_raw(&mistake(victim))?;
                let end = victim.phone.wait_closed()?;
                let orderly = matches!(end, Heard::Closed(with) if with == Some(code));
                world_is(world, orderly, &format!("{name} ended with {end:?}, not {code}"))?;
                victim.is_over(world)?;
            }
            Ok(victims.len())
        })?;
    }
    let line = "no call waits for this stream";
    siege.attack("a token used twice", FIRST_MISTAKE, line, |world| {
        let victim = victim(world)?;
        for _ in 0..MANY {
            let refused = victim.ringing.stream_is_refused(world);
            world_is(world, refused, "a token was taken twice")?;
            victim.breathes()?;
        }
        victim.talks()?;
        victim.hangs_up()?;
        Ok(MANY)
    })?;
    siege.attack("5,000 pings", none, "CallerLeft", |world| {
        let victim = victim(world)?;
        let pings = frame(0x89, &[b'p'; 125]).repeat(100);
        for _ in 0..50 {
            victim.phone.send_raw(&pings)?;
        }
        victim.talks()?;
        victim.hangs_up()?;
        Ok(1)
    })?;
    siege.attack("payloads of 0 bytes, of 48,000", message, "CallerLeft", |world| {
        let victim = victim(world)?;
        victim.phone.send_raw(&media(victim.phone.stream_sid(), ""))?;
        let long = voice(5, 6_000);
        victim.phone.speak(&long)?;
        let longest = base64(&long);
        victim.phone.send_raw(&media(victim.phone.stream_sid(), &longest))?;
        victim.phone.send_raw(&media(victim.phone.stream_sid(), ""))?;
        victim.agent.expect_audio(&pcm_of(&[long.clone(), long].concat()))?;
        victim.hangs_up()?;
        Ok(1)
    })?;
    siege.lift()
}

// ============================================================================
// Ultravox
// ============================================================================

#[test]
fn an_ultravox_gone_mad_costs_its_own_call_at_most() -> Outcome {
    let n8n = MadN8n::open()?;
    let siege = Siege::lay("Ultravox", builder().setting("N8N_WEBHOOK_URL", n8n.url()))?;
    siege.attack("junk for text", "AGENT_MESSAGE_BYTES_MAX", "cannot be read", |world| {
        let victim = victim(world)?;
        let junk = ["", "{", "null", "[]", "\u{0}\u{1b}[2J", "{\"type\":7}", "{\"type\":\"new\"}"];
        let odd = [
            json!({"type": "transcript"}),
            json!({"type": "transcript", "role": "agent", "ordinal": -1}),
            json!({"type": "transcript", "role": "nobody", "ordinal": 1}),
            json!({"type": "client_tool_invocation", "toolName": 7}),
            json!({"type": "client_tool_invocation", "toolName": "x".repeat(100_000),
                "invocationId": "i"}),
            json!({"type": "state", "state": "x".repeat(100_000)}),
        ];
        let odd: Vec<String> = odd.iter().map(Value::to_string).collect();
        let all = junk.into_iter().chain(odd.iter().map(String::as_str));
        for text in all.cycle().take(1_000) {
            victim.agent.send_text(text)?;
        }
        victim.talks()?;
        victim.hangs_up()?;
        Ok(1)
    })?;
    siege.attack("deep and huge JSON", "AGENT_MESSAGE_BYTES_MAX", "cannot be read", |world| {
        let victim = victim(world)?;
        let deep = "[".repeat(100_000);
        let pairs = format!("[{}1]", "[],".repeat(300_000));
        let parameters = format!("{{\"type\":\"transcript\",\"text\":{deep}");
        for text in [&deep, &pairs, &parameters].into_iter().cycle().take(9) {
            victim.agent.send_text(text)?;
        }
        victim.talks()?;
        victim.hangs_up()?;
        Ok(1)
    })?;
    siege.attack("sound in odd pieces", "PLAY_BYTES_MAX", "CallerLeft", |world| {
        let victim = victim(world)?;
        let speech = voice(7, 3_000);
        let mut rest = pcm_of(&speech);
        for length in [1, 3, 5, 0, 333, 1, 7, 1_001, 1].into_iter().cycle() {
            let behind = rest.split_off(rest.len().min(length));
            victim.agent.send_audio(&rest)?;
            rest = behind;
            if rest.is_empty() {
                break;
            }
        }
        victim.phone.expect_audio(&speech)?;
        victim.hangs_up()?;
        Ok(1)
    })?;
    let limit = "AGENT_GONE_WITHIN";
    siege.attack("talking on after the end", limit, "nothing was said", |world| {
        let mad = MadAgent::take_next_call(world)?;
        let victim = victim_of(world, &mad)?;
        victim.phone.hang_up()?;
        let on = server_frame(0x81, br#"{"type":"state","state":"thinking"}"#);
        let deadline = Instant::now() + HANGS;
        while mad.send_raw(&on).is_ok() {
            world_is(world, Instant::now() < deadline, "nobody has cut the line")?;
            thread::sleep(Duration::from_millis(100));
        }
        Ok(1)
    })?;
    breaks(&siege)?;
    storms(&siege, &n8n)?;
    transcripts(&siege, &n8n)?;
    siege.attack("REST answers: 100 MB, deep", "ANSWER_BYTES_MAX", "an answer of", |world| {
        let replies = [
            Reply::text(201, None, &"x".repeat(100_000_000)),
            Reply::text(201, None, &"[".repeat(100_000)),
            Reply::text(400, None, &"<".repeat(1_000_000)),
        ];
        for reply in &replies {
            world.ultravox.refuse_next(1, reply);
            let ringing = world.ring(CALLER)?;
            let apologised = ringing.twiml.hangs_up && ringing.twiml.stream_url.is_none();
            world_is(world, apologised, &ringing.twiml.xml)?;
        }
        Ok(replies.len())
    })?;
    siege.lift()
}

/// The line to the agent cannot be used any more. The caller keeps theirs, and gets another agent.
fn breaks(siege: &Siege) -> Outcome {
    siege.attack("a message of 1 MiB + 1", "AGENT_MESSAGE_BYTES_MAX", "nonsense", |world| {
        let victim = victim(world)?;
        victim.agent.send_audio(&vec![1; 1_024 * 1_024 + 1])?;
        victim.goes_on_with_another_agent(world)?;
        Ok(1)
    })?;
    siege.attack("a message without end", "AGENT_MESSAGE_BYTES_MAX", "nonsense", |world| {
        let mad = MadAgent::take_next_call(world)?;
        let victim = victim_of(world, &mad)?;
        let piece = vec![1; 60_000];
        let mut sent = mad.send_raw(&server_frame(0x02, &piece));
        for _ in 0..200 {
            sent = sent.and_then(|()| mad.send_raw(&server_frame(0x00, &piece)));
        }
        world_is(world, sent.is_err(), "12 MB of one message were taken")?;
        victim.goes_on_with_another_agent(world)?;
        Ok(1)
    })?;
    siege.attack("a message by the byte", "PING_AFTER", "nothing came for too long", |world| {
        let mad = MadAgent::take_next_call(world)?;
        let victim = victim_of(world, &mad)?;
        let over = Over::default();
        let mut sent = mad.send_raw(&server_frame(0x02, b""));
        while sent.is_ok() {
            sent = mad.send_raw(&server_frame(0x00, b"\x01"));
            over.pause(Duration::from_millis(100));
        }
        victim.goes_on_with_another_agent(world)?;
        Ok(1)
    })
}

fn transcripts(siege: &Siege, n8n: &MadN8n) -> Outcome {
    siege.attack("1,000 transcripts of 10 KB", "TRANSCRIPT_BYTES_MAX", "n8n has the", |world| {
        let victim = victim(world)?;
        for _ in 0..1_000 {
            victim.agent.user_said(&"word ".repeat(2_000))?;
        }
        victim.talks()?;
        victim.hangs_up()?;
        let filed = eventually("the transcript at n8n", || n8n.filed(victim.sid()))?;
        let most = number_of("TRANSCRIPT_BYTES_MAX")?;
        world_is(world, filed.len() < most, &format!("{} bytes were filed", filed.len()))?;
        world_is(world, filed.len() > most / 2, &format!("{} bytes were filed", filed.len()))?;
        Ok(1)
    })?;
    siege.attack("30,000 empty transcripts", "TRANSCRIPT_BYTES_MAX", "CallerLeft", |world| {
        let victim = victim(world)?;
        // Not a million, since the machine that sends them has two cores; but more than are kept.
        for ordinal in 0..30_000 {
            let empty = json!({"type": "transcript", "role": "user", "ordinal": ordinal});
            victim.agent.send(&empty)?;
        }
        victim.talks()?;
        victim.hangs_up()?;
        Ok(1)
    })
}

/// 1,000 invocations at once: exactly one result each, and n8n sees a bounded number of them.
fn storms(siege: &Siege, n8n: &MadN8n) -> Outcome {
    let one_each = |victim: &Victim, ids: &[String]| -> Outcome {
        for id in ids {
            victim.agent.wait_result(id)?;
            victim.breathes()?;
        }
        victim.talks()?;
        let mut results: BTreeMap<String, usize> = BTreeMap::new();
        for text in victim.agent.texts() {
            if text["type"] == "client_tool_result" {
                let id = text["invocationId"].as_str().unwrap_or_default();
                *results.entry(id.to_owned()).or_default() += 1;
            }
        }
        let wrong = ids.iter().filter(|id| results.get(*id) != Some(&1)).count();
        if wrong > 0 { Err(format!("{wrong} have not one result").into()) } else { Ok(()) }
    };
    siege.attack(
        "1,000 local tools at once",
        "INVOCATIONS_MAX",
        "too many invocations",
        |world| {
            let victim = victim(world)?;
            let who = json!({"full_name": "Anna Berg", "date_of_birth": "1985-04-12",
            "policy_number": "SL20471"});
            let invoke = |_| victim.agent.invoke("verify", &who);
            let ids: Vec<String> = (0..1_000).map(invoke).collect::<Result<_, _>>()?;
            one_each(&victim, &ids)?;
            victim.hangs_up()?;
            Ok(1)
        },
    )?;
    siege.attack(
        "1,000 n8n tools at once",
        "TOOLS_AT_ONCE_MAX",
        "too many things at once",
        |world| {
            let victim = victim(world)?;
            victim.enters_main_stage()?;
            n8n.set("3", Answer::Slow(Duration::from_millis(20)));
            let (before, _) = n8n.posts("3");
            let invoke = |day: usize| victim.agent.invoke("schedule_meeting", &meeting(day));
            let ids: Vec<String> = (0..1_000).map(invoke).collect::<Result<_, _>>()?;
            one_each(&victim, &ids)?;
            let (after, at_once) = n8n.posts("3");
            let most = number_of("TOOL_ANSWERS_MAX")?;
            world_is(world, after - before <= most, &format!("n8n got {} posts", after - before))?;
            let most = number_of("TOOLS_AT_ONCE_MAX")?;
            world_is(world, at_once <= most, &format!("n8n got {at_once} posts at once"))?;
            n8n.set("3", Answer::Good);
            victim.hangs_up()?;
            Ok(1)
        },
    )?;
    siege.attack(
        "one question 400 times",
        "TOOLS_AT_ONCE_MAX",
        "answered from memory",
        |world| {
            let victim = victim(world)?;
            victim.enters_main_stage()?;
            let (before, _) = n8n.posts("3");
            let invoke = |_| victim.agent.invoke("schedule_meeting", &meeting(1));
            let ids: Vec<String> = (0..400).map(invoke).collect::<Result<_, _>>()?;
            one_each(&victim, &ids)?;
            let (after, _) = n8n.posts("3");
            world_is(world, after - before == 1, &format!("{} bookings", after - before))?;
            victim.hangs_up()?;
            Ok(1)
        },
    )?;
    siege.attack(
        "600 ids of 100 KB",
        "INVOCATION_ID_BYTES_MAX",
        "without name or id",
        |world| {
            let victim = victim(world)?;
            for number in 0..600 {
                let id = format!("{number}{}", "i".repeat(100_000));
                victim.agent.invoke_as(&id, "verify", &json!({}))?;
                victim.breathes()?;
            }
            victim.talks()?;
            victim.hangs_up()?;
            Ok(1)
        },
    )?;
    siege.attack("90 questions of 500 KB", "TOOL_ANSWERS_MAX", "schedule_meeting: done", |world| {
        let victim = victim(world)?;
        victim.enters_main_stage()?;
        for day in 0..90 {
            let mut question = meeting(day);
            question["purpose"] = json!("p".repeat(500_000));
            let id = victim.agent.invoke("schedule_meeting", &question)?;
            victim.agent.wait_result(&id)?;
            victim.breathes()?;
        }
        victim.talks()?;
        victim.hangs_up()?;
        Ok(1)
    })
}

// ============================================================================
// n8n
// ============================================================================

#[test]
fn an_n8n_gone_mad_costs_its_own_answer_at_most() -> Outcome {
    let n8n = MadN8n::open()?;
    let siege = Siege::lay("n8n", builder().setting("N8N_WEBHOOK_URL", n8n.url()))?;
    let deep = "[".repeat(100_000);
    let deep_text = format!("{{\"firstMessage\":\"Hello {}", "\"}".repeat(500));
    let huge = json!({"firstMessage": "x".repeat(60_000)}).to_string();
    let [bytes, time, chars] = ["REPLY_BYTES_MAX", "LOOKUP_WITHIN", "GREETING_CHARS_MAX"];
    let greetings = [
        ("greeting: 100 MB", bytes, Answer::Flood, "an answer of more than 65536 bytes"),
        ("greeting: endless headers", time, Answer::Headers, "the default greeting is used"),
        ("greeting: a byte a second", time, Answer::Trickle, "no answer within 2000 ms"),
        ("greeting: 100,000 brackets", bytes, Answer::Body(deep), "more than 65536 bytes"),
        ("greeting: broken JSON", bytes, Answer::Body(deep_text), "broken JSON"),
        ("greeting: 60,000 letters", chars, Answer::Body(huge), "more than 2000 characters"),
    ];
    for (name, limit, answer, line) in greetings {
        siege.attack(name, limit, line, |world| {
            n8n.set("1", answer);
            thread::scope(|scope| {
                let victims: Vec<_> =
                    (0..5).map(|_| scope.spawn(|| default_greeting_in_time(world))).collect();
                for victim in victims {
                    victim.join().map_err(|_| "a ringing thread panicked")??.hangs_up()?;
                }
                Ok::<_, Failed>(())
            })?;
            n8n.set("1", Answer::Good);
            Ok(5)
        })?;
    }
    let tools = [
        ("tool: 100 MB", bytes, Answer::Flood, "an answer of more than 65536 bytes"),
        ("tool: endless headers", bytes, Answer::Headers, "schedule_meeting: uncertain"),
        ("tool: hangs up in the middle", bytes, Answer::Half, "schedule_meeting: uncertain"),
    ];
    for (name, limit, answer, line) in tools {
        siege.attack(name, limit, line, |world| {
            let victim = victim(world)?;
            victim.enters_main_stage()?;
            n8n.set("3", answer);
            let ask = |day| victim.agent.invoke("schedule_meeting", &meeting(day));
            let ids: Vec<String> = (0..8).map(ask).collect::<Result<_, _>>()?;
            for id in &ids {
                let result = victim.agent.wait_result(id)?;
                let told = result["result"].as_str().unwrap_or_default();
                world_is(world, told.starts_with("It is not certain"), told)?;
            }
            victim.talks()?;
            victim.hangs_up()?;
            n8n.set("3", Answer::Good);
            Ok(ids.len())
        })?;
    }
    siege.lift()
}

/// What a caller hears whose n8n does not answer in time, or does not answer sense.
fn default_greeting_in_time(world: &World) -> Result<Victim, Failed> {
    let began = Instant::now();
    let victim = victim(world)?;
    let greeting = &victim.agent.request()["firstSpeakerSettings"]["agent"]["text"];
    let right = greeting.as_str().is_some_and(|text| text.starts_with(DEFAULT_GREETING));
    world_is(world, right, &format!("the greeting is {greeting:.100}"))?;
    // Twilio waits 15 s; LOOKUP_WITHIN is 2 s, the rest is for this machine.
    world_is(world, began.elapsed() < Duration::from_secs(7), "the greeting came too late")?;
    Ok(victim)
}

fn slow_answers_of_n8n() -> Outcome {
    let n8n = MadN8n::open()?;
    let siege = Siege::lay("n8n, slow", builder().setting("N8N_WEBHOOK_URL", n8n.url()))?;
    siege.attack(
        "tool: a byte a second",
        "TOOL_WITHIN_MAX",
        "no answer within 12000 ms",
        |world| {
            let victim = victim(world)?;
            victim.enters_main_stage()?;
            n8n.set("3", Answer::Trickle);
            // Both ends have to say something now and then, or they count as lost.
            let microphone = victim.phone.keep_talking();
            let id = victim.agent.invoke("schedule_meeting", &meeting(1))?;
            let result = eventually("a result", || {
                let listening = victim.agent.send(&json!({"type": "state", "state": "listening"}));
                listening.ok().and_then(|()| victim.agent.results(&id).into_iter().next())
            })?;
            microphone.stop();
            let told = result["result"].as_str().unwrap_or_default();
            world_is(world, told.starts_with("It is not certain"), told)?;
            victim.hangs_up()?;
            n8n.set("3", Answer::Good);
            Ok(1)
        },
    )?;
    // Its head says that n8n has it, and no more is waited for than the time there is. The other is
    // no answer.
    for (name, answer, line) in [
        ("filing: a byte a second", Answer::Trickle, "n8n has the transcript"),
        ("filing: endless headers", Answer::Headers, "the transcript stays in"),
    ] {
        siege.attack(name, "DELIVER_WITHIN", line, |world| {
            let victim = victim(world)?;
            let seen = world.bridge.log().len();
            n8n.set("2", answer);
            victim.agent.user_said("Something that must not be lost.")?;
            victim.talks()?;
            victim.hangs_up()?;
            eventually(line, || {
                world.bridge.log().iter().skip(seen).any(|said| said.contains(line)).then_some(())
            })?;
            n8n.set("2", Answer::Good);
            let filed = eventually("the transcript at n8n", || n8n.filed(victim.sid()))?;
            world_is(world, filed.ends_with("Something that must not be lost."), &filed)?;
            Ok(1)
        })?;
    }
    siege.lift()
}

// ============================================================================
// The owner's door
// ============================================================================

#[test]
fn orders_that_are_no_orders_are_refused() -> Outcome {
    let siege = Siege::lay("outgoing calls", builder().setting("API_TOKEN", API_TOKEN))?;
    let deep = "[".repeat(30_000);
    let cases = [
        ("deep JSON", FIRST_MISTAKE, deep, 400, "the body is not JSON"),
        ("deeper JSON", "BODY_BYTES_MAX", "[".repeat(100_000), 413, "the body is longer than"),
        ("huge JSON", "BODY_BYTES_MAX", format!("[{}0]", "0,".repeat(2_000_000)), 413, "announced"),
        ("no JSON", FIRST_MISTAKE, "phoneNumber=%2B4930123456".into(), 400, "is not JSON"),
    ];
    for (name, limit, body, status, line) in cases {
        siege.attack(name, limit, line, |world| {
            let head = format!(
                "POST /outgoing-call HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_TOKEN}\r\n\
                 Content-Length: {}\r\n\r\n",
                body.len()
            );
            for _ in 0..MANY {
                let answer = says(world, [head.as_bytes(), body.as_bytes()].concat().as_slice())?;
                let right = answer.starts_with(&format!("HTTP/1.1 {status} "));
                world_is(world, right, &format!("{name} was answered {answer:.200}"))?;
            }
            Ok(MANY)
        })?;
    }
    siege.attack("guessing the token", "TOKEN_CHARS_MIN", "is missing or wrong", |world| {
        let long = format!("Bearer {}", "x".repeat(10_000));
        let wrong = ["", "Bearer", "Bearer ", "Basic !!!", "Bearer x", &long, "Basic eDp5"];
        for authorization in wrong {
            let headers = [("Authorization", authorization)];
            let answer = world.request("POST", "/outgoing-call", &headers, b"{}")?;
            world_is(world, answer.status == 401, &format!("{authorization}: {}", answer.status))?;
        }
        Ok(wrong.len())
    })?;
    siege.lift()
}

// ============================================================================
// File descriptors run out
// ============================================================================

#[test]
fn without_file_descriptors_calls_go_on_and_later_ones_are_served_again() -> Outcome {
    let mut siege = Siege::lay("file descriptors", builder())?;
    // A `tiny_http` that dies may lose the wake-up that tells its four idle threads to end, and
    // more than one may die here.
    siege.kept_threads = 12;
    let pid = siege.world.bridge.pid().ok_or("the bridge is gone")?;
    let had = usage(pid)?.fds;
    // Room for a few requests, then for none.
    set_descriptors(pid, had + 40)?;
    let half_a_request = head("POST /incoming-call", "Content-Length: 2000") + "CallSid=CA1";
    for (name, opening) in [("none left", half_a_request.as_str()), ("none left, idle", "")] {
        siege.attack(name, "ACCEPT_PAUSE", "Too many open files", |world| {
            let seen = world.bridge.log().len();
            let mut sockets = Vec::new();
            for _ in 0..100 {
                let mut socket = knock(world)?;
                socket.write_all(opening.as_bytes())?;
                sockets.push(socket);
            }
            // Who calls just now gets no answer; the next call is served.
            world.bridge.wait_for_log_since(seen, "Too many open files")?;
            // So that the figures show it.
            Over::default().pause(Duration::from_millis(50));
            Ok(sockets.len())
        })?;
    }
    set_descriptors(pid, 4_096)?;
    siege.attack("none left, mended", "ACCEPT_PAUSE", "", |world| {
        let health = world.get("/health")?;
        world_is(world, health.status == 200, "no health")?;
        Ok(1)
    })?;
    siege.lift()
}

// ============================================================================
// Threads run out
// ============================================================================

/// Deliveries at once in the outbox, and one more: each of them is to survive it.
const DELIVERIES: usize = 5;

#[test]
fn without_threads_calls_go_on_and_all_is_as_before_afterwards() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let program = limited_program(scratch.path())?;
    let mut siege = Siege::lay("threads", builder_of(&program))?;
    // As above: a `tiny_http` may die of it.
    siege.kept_threads = 12;
    let pid = siege.world.bridge.pid().ok_or("the bridge is gone")?;
    siege.attack("none left", "RESUME_WITHIN", "a new agent is there", |world| {
        let broken = victim(world)?;
        let mut ending = Vec::new();
        for _ in 0..DELIVERIES {
            let victim = victim(world)?;
            victim.agent.user_said("Is anybody there?")?;
            victim.talks()?;
            ending.push(victim);
        }
        let seen = world.bridge.log().len();
        set_threads(pid, 1)?;
        world_is(world, world.get("/health").is_err(), "there is a thread left")?;
        world.bridge.wait_for_log_since(seen, "a connection was turned away")?;
        // Each ends, and its transcript cannot be delivered.
        for victim in &ending {
            victim.hangs_up()?;
        }
        for victim in &ending {
            let sid = victim.sid().get(..6).unwrap_or_default();
            let line = format!("{sid} 9 after    warning: n8n: no thread to look up its name");
            world.bridge.wait_for_log_since(seen, &line)?;
        }
        // The agent's line breaks, and there is no thread for the next one.
        broken.agent.drop_line();
        world.bridge.wait_for_log_since(seen, "no new agent yet: Ultravox: no thread")?;
        set_threads(pid, 4_096)?;
        broken.goes_on_with_another_agent(world)?;
        for victim in &ending {
            eventually("the transcript at n8n", || {
                let posts = world.n8n.requests_of("2");
                posts.iter().any(|post| post.json["callSid"] == victim.sid()).then_some(())
            })?;
        }
        eventually("ready", || {
            world.get("/ready").is_ok_and(|answer| answer.status == 200).then_some(())
        })?;
        Ok(DELIVERIES + 1)
    })?;
    siege.lift()
}

/// The limit of threads does not hold for root, so root's bridge is somebody else's.
fn limited_program(scratch: &Path) -> Result<PathBuf, Failed> {
    let program = env!("CARGO_BIN_EXE_callbridge");
    if !is_root()? {
        return Ok(program.into());
    }
    let as_nobody = AS_NOBODY.join(" ");
    let script = format!("#!/bin/sh\nchown 65534:65534 . && exec {as_nobody} {program} \"$@\"\n");
    let path = scratch.join("callbridge");
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// How root becomes nobody.
const AS_NOBODY: [&str; 6] = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"];

fn is_root() -> io::Result<bool> {
    Ok(fs::metadata("/proc/self")?.uid() == 0)
}

// ============================================================================
// Secrets
// ============================================================================

#[test]
fn secrets_are_nowhere_to_be_read_in_a_log_of_lines() -> Outcome {
    secrets_stay_secret("text")
}

#[test]
fn secrets_are_nowhere_to_be_read_in_a_log_of_json() -> Outcome {
    secrets_stay_secret("json")
}

/// Calls good and bad, with parties that quote in their answers what they were sent.
fn secrets_stay_secret(format: &str) -> Outcome {
    const TOKEN: &str = "97c1f04be2a8d63597c1f04be2a8d6f3";
    const HMAC: &str = "the-hmac-secret-of-n8n";
    const HEADER: &str = "open-sesame-0815";
    const CALLED: &str = "+447700900123";
    let twilio = Door::open(|socket, _| {
        // Twilio's own words for such a number.
        let message = format!("The number {CALLED} is not a valid phone number, {TOKEN}");
        let body = json!({"code": 21_211, "message": message, "status": 400}).to_string();
        answer_once(socket, "400 Bad Request", &body);
    })?;
    let world = builder()
        .setting("LOG_FORMAT", format)
        .setting("TWILIO_AUTH_TOKEN", TOKEN)
        .setting("TWILIO_ACCOUNT_SID", demo::ACCOUNT_SID)
        .setting("TWILIO_PHONE_NUMBER", demo::OUR_NUMBER)
        .setting("TWILIO_API_URL", format!("http://{}", twilio.address))
        .setting("OUTGOING_ALLOW", "+44")
        .setting("N8N_HMAC_SECRET", HMAC)
        .setting("N8N_AUTH_HEADER", format!("X-Agent-Key: {HEADER}"))
        .setting("API_TOKEN", API_TOKEN)
        .start()?;
    let mut answers: Vec<HttpAnswer> = Vec::new();
    let mut tokens: Vec<String> = Vec::new();

    // A good call, whose agent's line breaks once.
    let first = victim(&world)?;
    let token_of =
        |ringing: &Ringing| ringing.twiml.stream_path().rsplit('/').next().map(str::to_owned);
    tokens.extend(token_of(&first.ringing));
    first.talks()?;
    let sid = first.sid().to_owned();
    world_is(&world, first.ringing.stream_is_refused(&world), "a token was taken twice")?;
    first.agent.drop_line();
    eventually("another agent", || agents_of(&world, &sid).get(1).cloned())?.wait_joined()?;
    first.agent_now(&world)?.user_said("Please call me back.")?;
    first.agent_now(&world)?.invoke("verify", &json!({}))?;
    first.phone.drop_line();
    answers.push(first.ringing.stream_ended(&world)?);
    answers.push(first.ringing.call_status(&world, "completed")?);

    // A join URL that nobody answers, one that nobody can read, refusals that quote the key.
    let dead = format!("ws://127.0.0.1:{}/join?token=join-secret-1", demo::closed_port());
    let wrong = "wss://[not an address/join-secret-2";
    for url in [dead.as_str(), wrong] {
        let created = json!({"callId": "c1", "joinUrl": url});
        world.ultravox.refuse_next(1, &Reply::json(201, &created));
        answers.push(world.ring(CALLER)?.answer);
    }
    for status in [400, 401, 403, 500] {
        let detail = format!("Invalid API key {} of {CALLER}", demo::API_KEY);
        world.ultravox.refuse_next(1, &Reply::json(status, &json!({"detail": detail})));
        answers.push(world.ring(CALLER)?.answer);
    }
    let quoted = json!({"headers": {"x-agent-key": HEADER}, "secret": HMAC, "from": CALLER});
    for (route, status) in [("1", 500), ("1", 403), ("2", 500)] {
        world.n8n.reply_next(route, Reply::json(status, &quoted));
    }
    for _ in 0..2 {
        let call = victim(&world)?;
        tokens.extend(token_of(&call.ringing));
        call.agent.user_said("Hello.")?;
        call.talks()?;
        call.hangs_up()?;
    }
    // Requests that are refused, and one that Twilio refuses.
    let bearer = format!("Bearer {API_TOKEN}");
    let order = json!({"phoneNumber": CALLED}).to_string();
    for authorization in [bearer.as_str(), "Bearer wrong", ""] {
        let headers = [("Authorization", authorization)];
        answers.push(world.request("POST", "/outgoing-call", &headers, order.as_bytes())?);
    }
    for path in ["/", "/calls", "/metrics", "/health", "/incoming-call", "/nowhere"] {
        answers.push(world.get(path)?);
        answers.push(world.request("POST", path, &[("X-Twilio-Signature", "AAAA")], b"From=1")?);
    }
    upgrade(&world, "/media-stream/CA1/x", Some("AAAA"))?;
    world.bridge.wait_for_log("the transcript stays in")?;
    world.bridge.wait_for_log("Twilio did not make the call")?;
    world.bridge.wait_for_log("no call waits for this stream")?;
    world.bridge.ask_to_stop()?;
    world.bridge.wait_exit(HANGS)?;

    let log = world.bridge.log().join("\n");
    let journals = journals_of(&world)?;
    world_is(&world, !journals.is_empty(), "there are no journals")?;
    let (twimls, others): (Vec<_>, Vec<_>) =
        answers.iter().map(HttpAnswer::text).partition(|text| text.contains("<Stream"));
    let http = others.join("\n");
    let joins = [demo::API_KEY, "join-secret-1", "join-secret-2", "?token="];
    let secrets = [TOKEN, HMAC, HEADER, API_TOKEN].into_iter().chain(joins);
    let places = [("the log", &log), ("a journal", &journals), ("an answer", &http)];
    for secret in secrets.chain(tokens.iter().map(String::as_str)) {
        for (place, text) in places {
            world_is(&world, !text.contains(secret), &format!("{secret} is in {place}"))?;
        }
        let own = tokens.iter().any(|token| token == secret);
        let elsewhere = twimls.iter().any(|text| text.contains(secret) && !own);
        world_is(&world, !elsewhere, &format!("{secret} is in the TwiML"))?;
    }
    for number in [CALLER, CALLED, "4930901820", "447700900123"] {
        world_is(&world, !log.contains(number), &format!("{number} is in the log:\n{log}"))?;
    }
    world_is(&world, log.contains("+49…1820"), "the log does not tell callers apart")?;
    Ok(())
}

fn journals_of(world: &World) -> io::Result<String> {
    let mut all = String::new();
    for entry in fs::read_dir(world.data_dir().join("calls"))? {
        all.push_str(&fs::read_to_string(entry?.path())?);
    }
    Ok(all)
}

// ============================================================================
// A siege: bystanders, attacks, and what they cost
// ============================================================================

fn builder() -> WorldBuilder {
    builder_of(Path::new(env!("CARGO_BIN_EXE_callbridge")))
}

fn builder_of(program: &Path) -> WorldBuilder {
    World::builder(program)
        .tls(true)
        .setting("CALLS_PER_NUMBER_PER_HOUR", 100_000)
        // glibc gives threads arenas of their own, and each keeps what it once needed. With one for
        // all, memory that does not come back is the bridge's fault.
        .setting("MALLOC_ARENA_MAX", 1)
}

/// A bridge under attack, and two calls of other people.
struct Siege {
    title: &'static str,
    world: World,
    bystanders: Vec<Bystander>,
    /// What the process takes with nothing but the bystanders.
    peace: Usage,
    kept_threads: usize,
    table: Mutex<Vec<Row>>,
}

/// What one attack has cost.
struct Row {
    attack: String,
    limit: String,
    connections: usize,
    peak: Usage,
    recovery: Duration,
    latest_frame: Duration,
}

impl Siege {
    fn lay(title: &'static str, world: WorldBuilder) -> Result<Siege, Failed> {
        let world = world.start()?;
        // What is made once and kept, such as the allocator's arenas, is made now.
        for _ in 0..3 {
            serves_a_call(&world)?;
        }
        let tls = Bystander::of(victim(&world)?, AgentEnd::Tls, 1);
        let plain = MadAgent::take_next_call(&world)?;
        let bystanders =
            vec![tls, Bystander::of(victim_of(&world, &plain)?, AgentEnd::Plain(plain), 2)];
        for bystander in &bystanders {
            bystander.hears_and_is_heard(bystander.frames())?;
        }
        let pid = world.bridge.pid().ok_or("the bridge is gone")?;
        let peace = usage(pid)?;
        Ok(Siege { title, world, bystanders, peace, kept_threads: 0, table: Mutex::default() })
    }

    /// `run` says how many connections it has made. `line` is what the log must say about it.
    fn attack(
        &self,
        name: &str,
        limit: &str,
        line: &str,
        run: impl FnOnce(&World) -> Result<usize, Failed>,
    ) -> Outcome {
        let blame = |error: Failed| self.world.trouble(format!("{name}: {error}"));
        let limit = match limit {
            FIRST_MISTAKE => limit.to_owned(),
            limit => format!("{limit} = {}", value_of(limit)?),
        };
        let pid = self.world.bridge.pid().ok_or("the bridge is gone")?;
        let seen = self.world.bridge.log().len();
        let frames: Vec<_> = self.bystanders.iter().map(Bystander::frames).collect();
        let watch = Watch::over(pid);
        let connections = run(&self.world).map_err(blame);
        let peak = watch.peak();
        let connections = connections?;
        if !line.is_empty() {
            self.world.bridge.wait_for_log_since(seen, line)?;
        }
        let recovery = self.recovers(pid).map_err(blame)?;
        let mut latest_frame = Duration::ZERO;
        for (bystander, frames) in self.bystanders.iter().zip(&frames) {
            let late = bystander.hears_and_is_heard(*frames).map_err(blame)?;
            latest_frame = latest_frame.max(late);
        }
        let stall = self.bystanders.iter().zip(&frames).map(|(one, since)| one.stall(*since)).max();
        if latest_frame > REAL_TIME + 3 * stall.unwrap_or_default() {
            let millis = latest_frame.as_millis();
            return Err(blame(format!("a bystander's frame took {millis} ms").into()).into());
        }
        serves_a_call(&self.world).map_err(blame)?;
        let attack = name.to_owned();
        lock(&self.table).push(Row { attack, limit, connections, peak, recovery, latest_frame });
        Ok(())
    }

    fn recovers(&self, pid: u32) -> Result<Duration, Failed> {
        let began = Instant::now();
        let peace = self.peace;
        let mut last = Usage::default();
        while began.elapsed() < RECOVERS_WITHIN {
            last = usage(pid)?;
            let threads = last.threads <= peace.threads + self.kept_threads;
            let fds = last.fds <= peace.fds + KEPT_CONNECTIONS;
            if threads && fds && last.kib <= peace.kib + KEPT_KIB {
                return Ok(began.elapsed());
            }
            // Nothing announces the end of a thread in another process.
            thread::park_timeout(Duration::from_millis(20));
        }
        Err(format!("it takes {last:?}; before it took {peace:?}").into())
    }

    /// The bystanders hang up, and not a sample was lost.
    fn lift(self) -> Outcome {
        for bystander in self.bystanders {
            bystander.has_missed_nothing()?;
        }
        let violations = self.world.ultravox.violations();
        world_is(&self.world, violations.is_empty(), &format!("{violations:?}"))?;
        let Usage { threads, fds, kib } = self.peace;
        let mut text = format!(
            "\nhostile input, {}: before it {threads} threads, {fds} fds, {:.1} MiB\n\
             {:<30} {:>6} {:>8} {:>6} {:>8} {:>8} {:>8}  limit\n",
            self.title,
            mib(kib),
            "attack",
            "conns",
            "threads",
            "fds",
            "MiB",
            "back ms",
            "late ms"
        );
        for row in lock(&self.table).iter() {
            let Usage { threads, fds, kib } = row.peak;
            writeln!(
                text,
                "{:<30} {:>6} {threads:>8} {fds:>6} {:>8.1} {:>8} {:>8.1}  {}",
                row.attack,
                row.connections,
                mib(kib),
                row.recovery.as_millis(),
                row.latest_frame.as_secs_f64() * 1_000.0,
                row.limit
            )?;
        }
        io::stderr().write_all(text.as_bytes())?;
        Ok(())
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people to read")]
fn mib(kib: usize) -> f64 {
    kib as f64 / 1_024.0
}

/// What a process takes of the machine.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    threads: usize,
    fds: usize,
    /// Resident memory.
    kib: usize,
}

fn usage(pid: u32) -> io::Result<Usage> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.trim().trim_end_matches(" kB").parse().unwrap_or(0)
    };
    let fds = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    Ok(Usage { threads: field("Threads:"), fds, kib: field("VmRSS:") })
}

/// Looks at a process again and again, and keeps the highest figures.
struct Watch {
    over: Over,
    thread: JoinHandle<Usage>,
}

impl Watch {
    fn over(pid: u32) -> Watch {
        let over = Over::default();
        let end = over.clone();
        let thread = thread::spawn(move || {
            let mut peak = Usage::default();
            loop {
                if let Ok(now) = usage(pid) {
                    peak.threads = peak.threads.max(now.threads);
                    peak.fds = peak.fds.max(now.fds);
                    peak.kib = peak.kib.max(now.kib);
                }
                if end.is_set() {
                    return peak;
                }
                end.pause(Duration::from_millis(10));
            }
        });
        Watch { over, thread }
    }

    fn peak(self) -> Usage {
        self.over.set();
        self.thread.join().unwrap_or_default()
    }
}

/// The text of a limit in `src`, so that the table shows it and a rename is noticed.
fn value_of(limit: &str) -> Result<String, Failed> {
    let begin = format!("const {limit}: ");
    let mut directories = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let source = String::from_utf8_lossy(&fs::read(path)?).into_owned();
            let found = source.lines().find_map(|line| {
                let line = line.trim_start_matches("pub(crate) ").trim_start_matches("pub(super) ");
                line.strip_prefix(&begin)?.split_once(" = ")?.1.strip_suffix(';')
            });
            if let Some(value) = found {
                return Ok(value.to_owned());
            }
        }
    }
    Err(format!("src has no limit {limit}").into())
}

/// As a number: `64 * 1_024` is one.
fn number_of(limit: &str) -> Result<usize, Failed> {
    let value = value_of(limit)?;
    let factors = value.split(" * ");
    let numbers = factors.map(|factor| factor.replace('_', "").parse::<usize>());
    numbers.product::<Result<_, _>>().map_err(|error| format!("{limit}: {error}").into())
}

/// A call of somebody who has nothing to do with it: both ends talk all the time.
struct Bystander {
    call: Victim,
    agent: AgentEnd,
    microphone: Talking,
    speech: Vec<u8>,
    spoken_at: Arc<Mutex<Vec<Instant>>>,
    over: Over,
    speaker: JoinHandle<()>,
}

#[derive(Clone)]
enum AgentEnd {
    Tls,
    Plain(MadAgent),
}

impl Bystander {
    fn of(call: Victim, agent: AgentEnd, seed: u64) -> Bystander {
        let speech = voice(seed, 120_000);
        let microphone = call.phone.keep_talking();
        microphone.say(&voice(10 + seed, 120_000));
        let over = Over::default();
        let spoken_at: Arc<Mutex<Vec<Instant>>> = Arc::default();
        let (end, noted, words) = (over.clone(), Arc::clone(&spoken_at), speech.clone());
        let (real, plain) = (call.agent.clone(), agent.clone());
        let speaker = thread::spawn(move || {
            let mut due = Instant::now();
            for frame in words.chunks(FRAME_BYTES) {
                lock(&noted).push(Instant::now());
                let pcm = pcm_of(frame);
                let sent = match &plain {
                    AgentEnd::Tls => real.send_audio(&pcm).is_ok(),
                    AgentEnd::Plain(plain) => plain.send_raw(&server_frame(0x82, &pcm)).is_ok(),
                };
                due += FRAME_TIME;
                if !sent || end.pause(due.saturating_duration_since(Instant::now())) {
                    return;
                }
            }
        });
        Bystander { call, agent, microphone, speech, spoken_at, over, speaker }
    }

    /// Frames so far: the caller's, the agent's.
    fn frames(&self) -> (usize, usize) {
        (self.call.phone.said().1.len(), lock(&self.spoken_at).len())
    }

    /// Every frame since then has arrived, or does within the usual patience. The longest that
    /// one has taken, of those that are there already.
    fn hears_and_is_heard(&self, since: (usize, usize)) -> Result<Duration, Failed> {
        let (said, said_at) = self.call.phone.said();
        let spoken_at = lock(&self.spoken_at).clone();
        let heard_at = match &self.agent {
            AgentEnd::Tls => {
                self.call.agent.wait_caller_audio(2 * said.len())?;
                self.call.agent.audio_at()
            }
            AgentEnd::Plain(plain) => {
                plain.wait_caller_audio(2 * said.len())?;
                plain.audio_at()
            }
        };
        self.call.phone.wait_audio(spoken_at.len() * FRAME_BYTES)?;
        let events = self.call.phone.heard();
        let audio = events.iter().filter(|event| matches!(event.what, Heard::Audio(_)));
        let played_at: Vec<Instant> = audio.map(|event| event.at).collect();
        let late = |sent: &[Instant], got: &[Instant], since: usize| {
            let both = sent.iter().zip(got).skip(since);
            both.map(|(sent, got)| got.saturating_duration_since(*sent)).max().unwrap_or_default()
        };
        let up = late(&said_at, &heard_at, since.0);
        let down = late(&spoken_at, &played_at, since.1);
        Ok(up.max(down))
    }

    /// How long this machine has kept our own speaker waiting, who speaks every 20 ms. What it has
    /// done to the speaker, it may have done to the bridge and to the listener too.
    fn stall(&self, since: (usize, usize)) -> Duration {
        let spoken_at = lock(&self.spoken_at);
        let gaps = spoken_at.windows(2).skip(since.1.saturating_sub(1));
        gaps.map(|pair| pair[1].saturating_duration_since(pair[0])).max().unwrap_or_default()
    }

    fn has_missed_nothing(self) -> Outcome {
        self.microphone.stop();
        self.over.set();
        self.speaker.join().map_err(|_| "the speaker panicked")?;
        let (said, _) = self.call.phone.said();
        match &self.agent {
            AgentEnd::Tls => self.call.agent.expect_audio(&pcm_of(&said))?,
            AgentEnd::Plain(plain) => plain.expect_audio(&pcm_of(&said))?,
        }
        let frames = lock(&self.spoken_at).len();
        let spoken = self.speech.get(..frames * FRAME_BYTES).unwrap_or(&self.speech);
        self.call.phone.expect_audio(spoken)?;
        let violations = self.call.phone.violations();
        if !violations.is_empty() {
            return Err(format!("against Twilio's rules: {violations:?}").into());
        }
        self.call.phone.hang_up()?;
        self.call.phone.wait_closed()?;
        Ok(())
    }
}

// ============================================================================
// Calls
// ============================================================================

/// A call whose one party is about to go mad, or that only shows that calls are served.
struct Victim {
    ringing: Ringing,
    agent: AgentCall,
    phone: Phone,
}

/// Several may ring at once, so the agent is found by the call's id.
fn victim(world: &World) -> Result<Victim, Failed> {
    let ringing = world.ring(&somebody())?;
    let agent = agents_of(world, &ringing.call_sid).into_iter().next();
    let agent = agent.ok_or("no agent was created for the call")?;
    let phone = ringing.open_stream(world)?;
    Ok(Victim { ringing, agent, phone })
}

/// With an agent that is not the pretend world's. Its `agent` is any other one, for what is not
/// asked of it.
fn victim_of(world: &World, mad: &MadAgent) -> Result<Victim, Failed> {
    let ringing = world.ring(&somebody())?;
    mad.wait_joined()?;
    let phone = ringing.open_stream(world)?;
    let agent = world.ultravox.created().into_iter().next();
    Ok(Victim { ringing, agent: agent.ok_or("there was no call before")?, phone })
}

fn agents_of(world: &World, sid: &str) -> Vec<AgentCall> {
    let mut agents = world.ultravox.created();
    agents.retain(|agent| agent.request()["metadata"]["callSid"] == sid);
    agents
}

impl Victim {
    fn sid(&self) -> &str {
        &self.ringing.call_sid
    }

    /// A frame: however slow this machine is, a phone is never silent.
    fn breathes(&self) -> Outcome {
        Ok(self.phone.speak(&voice(9, 20))?)
    }

    /// Sound still flows both ways.
    fn talks(&self) -> Outcome {
        talk(&self.phone, &self.agent)
    }

    fn enters_main_stage(&self) -> Outcome {
        let details = json!({"issue_type": "meeting", "issue_details": "A meeting.",
            "customer_name": "Anna Berg"});
        let id = self.agent.invoke("move_to_main_convo", &details)?;
        self.agent.wait_result(&id)?;
        Ok(())
    }

    fn agent_now(&self, world: &World) -> Result<AgentCall, Failed> {
        agents_of(world, self.sid()).pop().ok_or_else(|| "the call has no agent".into())
    }

    fn hangs_up(&self) -> Outcome {
        self.phone.hang_up()?;
        self.phone.wait_closed()?;
        self.agent.wait_closed()?;
        Ok(())
    }

    /// Twilio reports the end of a call whose stream has broken.
    fn is_over(&self, world: &World) -> Outcome {
        self.ringing.call_status(world, "completed")?;
        self.agent.wait_closed()?;
        Ok(())
    }

    /// The caller has not noticed more than a pause.
    fn goes_on_with_another_agent(&self, world: &World) -> Outcome {
        let next = eventually("another agent", || {
            agents_of(world, self.sid()).into_iter().find(|agent| agent.query() != "")
        })?;
        next.wait_joined()?;
        // Until the bridge has put it in its place, the caller's words are met by a tone.
        let heard = eventually("the caller at the new agent", || {
            self.phone
                .speak(&voice(3, 20))
                .err()
                .map(Err)
                .or_else(|| (!next.audio_at().is_empty()).then_some(Ok(())))
        })?;
        heard?;
        self.phone.hang_up()?;
        next.wait_closed()?;
        Ok(())
    }
}

fn talk(phone: &Phone, agent: &AgentCall) -> Outcome {
    let (said, _) = phone.said();
    let words = voice(8, 100);
    phone.speak(&words)?;
    agent.wait_caller_audio(2 * (said.len() + words.len()))?;
    let heard = phone.heard_audio().len();
    agent.send_audio(&pcm_of(&words))?;
    phone.wait_audio(heard + words.len())?;
    Ok(())
}

fn serves_a_call(world: &World) -> Outcome {
    let call = victim(world)?;
    let words = voice(4, 60);
    call.phone.speak(&words)?;
    call.agent.expect_audio(&pcm_of(&words))?;
    call.agent.send_audio(&pcm_of(&words))?;
    call.phone.expect_audio(&words)?;
    call.hangs_up()
}

/// A meeting, another one for each number.
fn meeting(number: usize) -> Value {
    json!({"name": "Anna Berg", "email": "anna.berg@example.com", "location": "London",
        "purpose": format!("Meeting {number}"), "datetime": "2027-03-09T14:30"})
}

// ============================================================================
// An agent that does as it pleases
// ============================================================================

/// The agent's end of a plain WebSocket, down to the bytes.
#[derive(Clone)]
struct MadAgent {
    line: Arc<MadLine>,
    /// Open as long as somebody may come.
    _door: Arc<Door>,
}

#[derive(Default)]
struct MadLine {
    socket: Mutex<Option<TcpStream>>,
    ear: Mutex<MadEar>,
    changed: Condvar,
}

#[derive(Default)]
struct MadEar {
    joined: bool,
    heard: Vec<u8>,
    heard_at: Vec<Instant>,
}

impl MadAgent {
    /// The next call that is created at the pretend Ultravox is sent here.
    fn take_next_call(world: &World) -> Result<MadAgent, Failed> {
        let line: Arc<MadLine> = Arc::default();
        let listener = Arc::clone(&line);
        let door = Door::open(move |socket, _| {
            // However it ends, the test sees it by what it waits for.
            drop(listener.listen(socket));
        })?;
        let url = format!("ws://{}/join?token=mad", door.address);
        let created = json!({"callId": "5f1f7a1e-mad", "joinUrl": url});
        world.ultravox.refuse_next(1, &Reply::json(201, &created));
        Ok(MadAgent { line, _door: Arc::new(door) })
    }

    fn wait_joined(&self) -> Outcome {
        self.wait("a join", |ear| ear.joined)
    }

    fn send_raw(&self, bytes: &[u8]) -> io::Result<()> {
        let socket = lock(&self.line.socket);
        socket.as_ref().map_or(Err(io::ErrorKind::NotConnected.into()), |mut s| s.write_all(bytes))
    }

    fn wait_caller_audio(&self, bytes: usize) -> Outcome {
        self.wait("the caller's voice", |ear| ear.heard.len() >= bytes)
    }

    fn audio_at(&self) -> Vec<Instant> {
        lock(&self.line.ear).heard_at.clone()
    }

    fn expect_audio(&self, pcm: &[u8]) -> Outcome {
        self.wait_caller_audio(pcm.len())?;
        let same = lock(&self.line.ear).heard == pcm;
        if same { Ok(()) } else { Err("the plain agent heard something else".into()) }
    }

    fn wait(&self, what: &str, ready: impl Fn(&MadEar) -> bool) -> Outcome {
        let ear = lock(&self.line.ear);
        let waited = self.line.changed.wait_timeout_while(ear, PATIENCE, |ear| !ready(ear));
        let (ear, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        drop(ear);
        if timeout.timed_out() {
            return Err(format!("the plain agent waited {PATIENCE:?} for {what}").into());
        }
        Ok(())
    }
}

impl MadLine {
    fn listen(&self, socket: TcpStream) -> Outcome {
        socket.set_nodelay(true)?;
        socket.set_write_timeout(Some(HANGS))?;
        let writer = socket.try_clone()?;
        let mut reader = tungstenite::accept(socket).map_err(|error| error.to_string())?;
        *lock(&self.socket) = Some(writer);
        self.change(|ear| ear.joined = true);
        loop {
            let message = reader.read()?;
            if !message.is_binary() {
                continue;
            }
            let pcm = message.into_data();
            // The bridge's own silence does not count.
            if pcm.iter().any(|byte| *byte != 0) {
                self.change(|ear| {
                    ear.heard.extend_from_slice(&pcm);
                    ear.heard_at.push(Instant::now());
                });
            }
        }
    }

    fn change(&self, change: impl FnOnce(&mut MadEar)) {
        change(&mut lock(&self.ear));
        self.changed.notify_all();
    }
}

// ============================================================================
// An n8n that does as it pleases
// ============================================================================

/// How a route is answered.
#[derive(Clone, PartialEq)]
enum Answer {
    Good,
    Slow(Duration),
    /// 100 MB.
    Flood,
    /// A good head, then a byte a second.
    Trickle,
    /// Headers without end.
    Headers,
    /// Half an answer.
    Half,
    Body(String),
}

struct MadN8n {
    door: Door,
    desk: Arc<Mutex<Desk>>,
}

#[derive(Default)]
struct Desk {
    answers: BTreeMap<String, Answer>,
    posts: Vec<Value>,
    running: BTreeMap<String, usize>,
    most_at_once: BTreeMap<String, usize>,
}

impl MadN8n {
    fn open() -> io::Result<MadN8n> {
        let desk: Arc<Mutex<Desk>> = Arc::default();
        let shared = Arc::clone(&desk);
        let door = Door::open(move |mut socket, over| {
            while let Some(body) = read_request(&mut socket) {
                let post: Value = serde_json::from_slice(&body).unwrap_or_default();
                let route = post["route"].as_str().unwrap_or_default().to_owned();
                let answer = shared_change(&shared, |desk| {
                    desk.posts.push(post);
                    let running = desk.running.entry(route.clone()).or_default();
                    *running += 1;
                    let (now, most) = (*running, desk.most_at_once.entry(route.clone()));
                    let most = most.or_default();
                    *most = now.max(*most);
                    desk.answers.get(&route).cloned().unwrap_or(Answer::Good)
                });
                let sent = answer.send(&mut socket, over);
                shared_change(&shared, |desk| *desk.running.entry(route).or_default() -= 1);
                if sent.is_err() {
                    return;
                }
            }
        })?;
        Ok(MadN8n { door, desk })
    }

    fn url(&self) -> String {
        format!("http://{}/webhook/call", self.door.address)
    }

    fn set(&self, route: &str, answer: Answer) {
        lock(&self.desk).answers.insert(route.to_owned(), answer);
    }

    /// How many there were, and how many at the same time.
    fn posts(&self, route: &str) -> (usize, usize) {
        let desk = lock(&self.desk);
        let count = desk.posts.iter().filter(|post| post["route"] == route).count();
        (count, desk.most_at_once.get(route).copied().unwrap_or_default())
    }

    fn filed(&self, sid: &str) -> Option<String> {
        let desk = lock(&self.desk);
        let ours = |post: &&Value| post["route"] == "2" && post["callSid"] == sid;
        // The last try counts; the one before it was not taken.
        let good = desk.answers.get("2").is_none_or(|answer| *answer == Answer::Good);
        let posts: Vec<&Value> = desk.posts.iter().filter(ours).collect();
        let taken = posts.last().filter(|_| good && desk.running.get("2") == Some(&0));
        taken.and_then(|post| post["data"].as_str()).map(str::to_owned)
    }
}

impl Answer {
    fn send(&self, socket: &mut TcpStream, over: &Over) -> io::Result<()> {
        let good = json!({"firstMessage": "Hello.", "message": "Booked."}).to_string();
        match self {
            Answer::Good => respond(socket, &good),
            Answer::Slow(pause) => {
                over.pause(*pause);
                respond(socket, &good)
            }
            Answer::Body(body) => respond(socket, body),
            Answer::Flood => {
                socket.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")?;
                let flood = vec![b'x'; 100_000];
                (0..1_000).try_for_each(|_| socket.write_all(&flood))
            }
            Answer::Trickle => {
                socket.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")?;
                while !over.pause(Duration::from_secs(1)) {
                    socket.write_all(b"x")?;
                }
                Ok(())
            }
            Answer::Headers => {
                socket.write_all(b"HTTP/1.1 200 OK\r\n")?;
                (0..1_000_000).try_for_each(|_| socket.write_all(b"X-Again: and again\r\n"))
            }
            Answer::Half => {
                socket.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"mess")?;
                Err(io::ErrorKind::ConnectionAborted.into())
            }
        }
    }
}

fn respond(socket: &mut TcpStream, body: &str) -> io::Result<()> {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
    socket.write_all(&[head.as_bytes(), body.as_bytes()].concat())
}

fn answer_once(mut socket: TcpStream, status: &str, body: &str) {
    if read_request(&mut socket).is_some() {
        let length = body.len();
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{body}");
        // Who asks reads it, or sees that it does not come.
        drop(socket.write_all(head.as_bytes()));
    }
}

/// The body of the next request on this connection.
fn read_request(socket: &mut TcpStream) -> Option<Vec<u8>> {
    let head = read_head(socket).ok()?.to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    let length: u64 = length.and_then(|length| length.trim().parse().ok())?;
    let mut body = Vec::new();
    socket.take(length).read_to_end(&mut body).ok()?;
    Some(body)
}

fn shared_change<T, R>(shared: &Mutex<T>, change: impl FnOnce(&mut T) -> R) -> R {
    change(&mut lock(shared))
}

// ============================================================================
// Bytes, sockets, waiting
// ============================================================================

fn head(line: &str, header: &str) -> String {
    format!("{line} HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n")
}

/// Bytes that are nothing.
fn noise(length: usize) -> Vec<u8> {
    let mut noise = voice(99, u64::try_from(length).unwrap_or(0) / 8 + 1);
    noise.truncate(length);
    // The first byte must not be taken for a letter, or for TLS.
    noise.splice(..1, [0x80]);
    noise
}

/// A frame as a client sends it. A key of zeros is a key.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    [&[first], length_of(payload, 0x80).as_slice(), &[0; 4], payload].concat()
}

/// A frame as a server sends it.
fn server_frame(first: u8, payload: &[u8]) -> Vec<u8> {
    [&[first], length_of(payload, 0).as_slice(), payload].concat()
}

fn length_of(payload: &[u8], mask: u8) -> Vec<u8> {
    let length = payload.len();
    match (u8::try_from(length), u16::try_from(length)) {
        (Ok(short), _) if short < 126 => vec![mask + short],
        (_, Ok(middle)) => [&[mask + 126], middle.to_be_bytes().as_slice()].concat(),
        _ => [&[mask + 127], (length as u64).to_be_bytes().as_slice()].concat(),
    }
}

fn text(message: &str) -> Vec<u8> {
    frame(0x81, message.as_bytes())
}

fn start(call_sid: &str, stream_sid: &str) -> Vec<u8> {
    start_with(call_sid, stream_sid, "{}")
}

fn start_with(call_sid: &str, stream_sid: &str, parameters: &str) -> Vec<u8> {
    text(&format!(
        "{{\"event\":\"start\",\"streamSid\":\"{stream_sid}\",\"start\":{{\"streamSid\":\
         \"{stream_sid}\",\"callSid\":\"{call_sid}\",\"mediaFormat\":{{\"encoding\":\
         \"audio/x-mulaw\",\"sampleRate\":8000}},\"customParameters\":{parameters}}}}}"
    ))
}

fn sound(encoding: &str, rate: u32) -> Vec<u8> {
    let format = json!({"encoding": encoding, "sampleRate": rate});
    let start = json!({"streamSid": "MZ1", "callSid": "CA1", "mediaFormat": format});
    text(&json!({"event": "start", "start": start}).to_string())
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn knock(world: &World) -> io::Result<TcpStream> {
    let socket = TcpStream::connect_timeout(&world.bridge.address(), PATIENCE)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(HANGS))?;
    socket.set_write_timeout(Some(HANGS))?;
    Ok(socket)
}

/// Sends this, as far as it is taken, and gives the whole answer.
fn says(world: &World, bytes: &[u8]) -> io::Result<String> {
    let mut socket = knock(world)?;
    // The bridge may have answered and closed before all of it is sent.
    drop(socket.write_all(bytes));
    Ok(rest_of(&mut socket))
}

fn rest_of(socket: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    // A reset behind the answer is an end as well.
    drop(socket.read_to_end(&mut answer));
    String::from_utf8_lossy(&answer).into_owned()
}

/// Many connections that each send a byte now and then, until the bridge has closed them all.
fn drip(
    world: &World,
    count: usize,
    opening: &[u8],
    pace: Duration,
) -> Result<Vec<TcpStream>, Failed> {
    let mut sockets = Vec::new();
    for _ in 0..count {
        let mut socket = knock(world)?;
        socket.write_all(opening)?;
        sockets.push(socket);
    }
    let (over, began) = (Over::default(), Instant::now());
    let mut open = count;
    while open > 0 {
        world_is(world, began.elapsed() < HANGS, &format!("{open} connections never ended"))?;
        over.pause(pace);
        open = 0;
        for socket in &mut sockets {
            open += usize::from(socket.write_all(b"x").is_ok());
        }
    }
    Ok(sockets)
}

/// Asks for the media stream, and gives the first line of the answer.
fn upgrade(
    world: &World,
    path: &str,
    signature: Option<&str>,
) -> Result<(String, TcpStream), Failed> {
    let mut socket = knock(world)?;
    socket.write_all(upgrade_of(path, signature).as_bytes())?;
    let head = read_head(&mut socket)?;
    Ok((head, socket))
}

fn upgrade_of(path: &str, signature: Option<&str>) -> String {
    let signed = signature.map(|signature| format!("X-Twilio-Signature: {signature}\r\n"));
    format!(
        "GET {path} HTTP/1.1\r\nHost: bridge.example\r\nConnection: Upgrade\r\n\
         Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{}\r\n",
        signed.unwrap_or_default()
    )
}

/// A call that rings, and its media stream, opened as Twilio does, with nothing said yet.
fn stream(world: &World) -> Result<(Ringing, TcpStream), Failed> {
    let ringing = world.ring(&somebody())?;
    let url = ringing.twiml.stream_url.as_deref().unwrap_or_default();
    let signature = twilio_signature(demo::AUTH_TOKEN, url, &[]);
    let (answer, socket) = upgrade(world, &ringing.twiml.stream_path(), Some(&signature))?;
    world_is(world, answer.starts_with("HTTP/1.1 101 "), &format!("the upgrade: {answer}"))?;
    Ok((ringing, socket))
}

/// A number that has not called before: one number gets a few lines only.
fn somebody() -> String {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    format!("+4930{:07}", COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Up to the empty line, and not a byte further.
fn read_head(socket: &mut TcpStream) -> io::Result<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        socket.read_exact(&mut byte)?;
        head.extend(byte);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// Reads up to the bridge's close frame and gives its code; none if the line just ends.
fn close_code(socket: &mut TcpStream) -> Option<u16> {
    loop {
        let mut begin = [0; 2];
        socket.read_exact(&mut begin).ok()?;
        let length = match begin[1] {
            // The bridge has nothing long to say to a stranger.
            126.. => return None,
            length => u64::from(length),
        };
        let mut payload = Vec::new();
        Read::by_ref(socket).take(length).read_to_end(&mut payload).ok()?;
        if begin[0] == 0x88 {
            return payload.first_chunk().map(|code| u16::from_be_bytes(*code));
        }
    }
}

type Guest = (TcpStream, JoinHandle<()>);

/// A loopback port with a thread for each visitor. All of it ends with this.
struct Door {
    address: SocketAddr,
    over: Over,
    guests: Arc<Mutex<Vec<Guest>>>,
    porter: Option<JoinHandle<()>>,
}

impl Door {
    fn open(receive: impl Fn(TcpStream, &Over) + Send + Sync + 'static) -> io::Result<Door> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let (over, guests) = (Over::default(), Arc::<Mutex<Vec<Guest>>>::default());
        let (end, seated, receive) = (over.clone(), Arc::clone(&guests), Arc::new(receive));
        let porter = thread::spawn(move || {
            for socket in listener.incoming() {
                let Ok(socket) = socket else { continue };
                if end.is_set() {
                    return;
                }
                let Ok(kept) = socket.try_clone() else { continue };
                let (end, receive) = (end.clone(), Arc::clone(&receive));
                let thread = thread::spawn(move || {
                    let last = socket.try_clone();
                    receive(socket, &end);
                    if let Ok(last) = last {
                        // The peer may have been faster.
                        drop(last.shutdown(Shutdown::Both));
                    }
                });
                let mut seated = lock(&seated);
                seated.retain(|(_, thread)| !thread.is_finished());
                seated.push((kept, thread));
            }
        });
        Ok(Door { address, over, guests, porter: Some(porter) })
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.over.set();
        // A knock wakes the porter.
        drop(TcpStream::connect(self.address));
        if let Some(porter) = self.porter.take() {
            drop(porter.join());
        }
        for (socket, thread) in lock(&self.guests).drain(..) {
            drop(socket.shutdown(Shutdown::Both));
            drop(thread.join());
        }
    }
}

/// Ends what goes on in another thread, also in the middle of a pause.
#[derive(Clone, Default)]
struct Over(Arc<(Mutex<bool>, Condvar)>);

impl Over {
    fn set(&self) {
        *lock(&self.0.0) = true;
        self.0.1.notify_all();
    }

    fn is_set(&self) -> bool {
        *lock(&self.0.0)
    }

    /// Paces an attack or a voice. Whether it is over.
    fn pause(&self, pause: Duration) -> bool {
        let over = lock(&self.0.0);
        let waited = self.0.1.wait_timeout_while(over, pause, |over| !*over);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Waits for something that nothing announces.
fn eventually<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> Result<T, Failed> {
    let began = Instant::now();
    while began.elapsed() < HANGS {
        if let Some(found) = ready() {
            return Ok(found);
        }
        thread::park_timeout(Duration::from_millis(20));
    }
    Err(format!("waited {HANGS:?} for {what}").into())
}

fn world_is(world: &World, right: bool, otherwise: &str) -> Result<(), Trouble> {
    if right { Ok(()) } else { Err(world.trouble(otherwise)) }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes room for the idle connections in this process, and so in its children. Gives how many
/// file descriptors there are now; where the machine does not allow more, fewer idle.
fn raise_descriptors() -> Result<usize, Failed> {
    let limits = fs::read_to_string("/proc/self/limits")?;
    let line = limits.lines().find(|line| line.starts_with("Max open files"));
    let mut numbers = line.unwrap_or_default().split_whitespace().skip(3);
    let mut next = || numbers.next().and_then(|number| number.parse::<usize>().ok());
    let (soft, hard) = (next().unwrap_or(1_024), next().unwrap_or(DESCRIPTORS));
    let wanted = DESCRIPTORS.min(hard);
    if soft >= wanted {
        return Ok(soft);
    }
    set_descriptors(std::process::id(), wanted).map_or(Ok(soft), |()| Ok(wanted))
}

fn set_descriptors(pid: u32, most: usize) -> Outcome {
    set_limit(&["prlimit"], pid, &format!("--nofile={most}:"))
}

/// Of all processes of its user together, so 1 is less than there are.
fn set_threads(pid: u32, most: usize) -> Outcome {
    let mut prlimit = if is_root()? { AS_NOBODY.to_vec() } else { Vec::new() };
    prlimit.push("prlimit");
    set_limit(&prlimit, pid, &format!("--nproc={most}:"))
}

/// std cannot do it; the program `prlimit` spares us an unsafe call.
fn set_limit(prlimit: &[&str], pid: u32, limit: &str) -> Outcome {
    let [program, arguments @ ..] = prlimit else { return Err("no program".into()) };
    let pid = pid.to_string();
    let status = Command::new(program).args(arguments).args(["--pid", &pid, limit]).status()?;
    if status.success() { Ok(()) } else { Err(format!("prlimit {limit}: {status}").into()) }
}
