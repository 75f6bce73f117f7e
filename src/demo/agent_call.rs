//! One call of pretend Ultravox, in which somebody here plays the agent.
//!
//! [`AgentCall`] speaks (whole turns with transcripts and sound in odd pieces), invokes tools,
//! listens, and remembers all that the server has sent, with the time. Clones are the same
//! call.
//!
//! Every wait ends, with a [`Trouble`] that brings the server's last log lines along. It never
//! speaks on its own, but for what the real one says when it is joined.

use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tungstenite::http::Uri;
use tungstenite::{Message, WebSocket};

use crate::demo::PATIENCE;
use crate::demo::backstage::{Board, lock, moot, random_hex, random_uuid};
use crate::demo::http::HttpRequest;
use crate::demo::server::ChildLog;
use crate::demo::socket::{Ear, Ending, Incoming, listen, normal_close};
#[cfg(test)]
use crate::demo::tls::Scissors;
use crate::demo::trouble::Trouble;
use crate::demo::ultravox::UltravoxState;

#[cfg(test)]
mod for_tests;

/// One call, in which the test plays the agent. Clones are the same call.
#[derive(Clone)]
pub struct AgentCall {
    line: Arc<AgentLine>,
}

struct AgentLine {
    call_id: String,
    join_url: String,
    request: HttpRequest,
    body: Value,
    state: Board<AgentEar>,
    mouth: Mutex<Option<AgentMouth>>,
    pongs: Arc<AtomicBool>,
    log: ChildLog,
}

pub(super) struct AgentMouth {
    pub(super) socket: WebSocket<TcpStream>,
    /// For ending the line otherwise than by the rules.
    #[cfg(test)]
    pub(super) scissors: Scissors,
}

#[derive(Default)]
struct AgentEar {
    joined_at: Option<Instant>,
    audio: Vec<(Instant, Vec<u8>)>,
    caller_bytes: usize,
    texts: Vec<(Instant, Value)>,
    ended: Option<Ending>,
    ended_at: Option<Instant>,
    next_ordinal: u64,
}

impl AgentCall {
    pub(super) fn new(ultravox: &UltravoxState, request: HttpRequest, body: Value) -> AgentCall {
        let call_id = random_uuid();
        let prefix = lock(&ultravox.join_prefix).clone();
        let line = AgentLine {
            // With a query already, as real ones may have.
            join_url: format!("{prefix}/join/{call_id}?token={}", random_hex(16)),
            call_id,
            request,
            body,
            state: Board::default(),
            mouth: Mutex::new(None),
            pongs: Arc::clone(&ultravox.pongs),
            log: ultravox.log.clone(),
        };
        AgentCall { line: Arc::new(line) }
    }

    /// The body of the request that created it.
    pub fn request(&self) -> &Value {
        &self.line.body
    }

    /// When that request came.
    pub fn created_at(&self) -> Instant {
        self.line.request.at
    }

    /// When the bridge joined; now, if it has not.
    pub fn joined_at(&self) -> Instant {
        self.line.state.look(|ear| ear.joined_at).unwrap_or_else(Instant::now)
    }

    /// Sends one data message, after the join.
    #[track_caller]
    pub fn send(&self, message: &Value) -> Result<(), Trouble> {
        self.send_message(Message::text(message.to_string()))
    }

    /// A whole turn of the agent: `state` speaking, transcript deltas, audio
    /// (s16le, 8 kHz) in messages of odd sizes, the final transcript.
    #[track_caller]
    pub fn say(&self, text: &str, pcm: &[u8]) -> Result<(), Trouble> {
        let ordinal = self.begin_saying(text, pcm)?;
        self.finish_saying(ordinal, text)
    }

    /// The first half of a turn: all audio is sent, the text not yet final.
    #[track_caller]
    pub fn begin_saying(&self, text: &str, pcm: &[u8]) -> Result<u64, Trouble> {
        self.send(&json!({"type": "state", "state": "speaking"}))?;
        let ordinal = self.next_ordinal();
        for word in text.split_inclusive(' ') {
            self.send(&transcript("agent", ordinal, &json!(null), &json!(word), false))?;
        }
        // Lengths as uneven as those of real speech synthesis.
        let mut rest = pcm;
        for length in [640, 3_202, 2, 9_600, 318].into_iter().cycle() {
            let (piece, tail) = rest.split_at(rest.len().min(length));
            if piece.is_empty() {
                break;
            }
            self.send_audio(piece)?;
            rest = tail;
        }
        Ok(ordinal)
    }

    /// Sends audio as one message, of any length, be it odd.
    #[track_caller]
    pub fn send_audio(&self, pcm: &[u8]) -> Result<(), Trouble> {
        self.send_message(Message::binary(pcm.to_vec()))
    }

    /// The second half: the final text, which an interruption makes shorter.
    #[track_caller]
    pub fn finish_saying(&self, ordinal: u64, text: &str) -> Result<(), Trouble> {
        self.send(&transcript("agent", ordinal, &json!(text), &json!(null), true))?;
        self.send(&json!({"type": "state", "state": "listening"}))
    }

    /// What the agent has understood: one final transcript of the user.
    #[track_caller]
    pub fn user_said(&self, text: &str) -> Result<(), Trouble> {
        let ordinal = self.next_ordinal();
        self.send(&transcript("user", ordinal, &json!(text), &json!(null), true))
    }

    /// Invokes a tool and gives the invocation's id.
    #[track_caller]
    pub fn invoke(&self, tool: &str, parameters: &Value) -> Result<String, Trouble> {
        let id = random_uuid();
        self.invoke_as(&id, tool, parameters)?;
        Ok(id)
    }

    /// As [`AgentCall::invoke`], with an id of the test's choice.
    #[track_caller]
    pub fn invoke_as(&self, id: &str, tool: &str, parameters: &Value) -> Result<(), Trouble> {
        self.send(&json!({"type": "client_tool_invocation", "toolName": tool,
            "invocationId": id, "parameters": parameters}))
    }

    /// Waits for the `client_tool_result` of an invocation.
    #[track_caller]
    pub fn wait_result(&self, invocation: &str) -> Result<Value, Trouble> {
        let what = format!("the result of {invocation}");
        self.wait_text(&what, |text| is_result_of(text, invocation))
    }

    /// Waits for a data message that `wanted` accepts, old or new.
    #[track_caller]
    pub fn wait_text(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value, Trouble> {
        self.wait(
            what,
            |_| true,
            |line| {
                line.state.look(|ear| {
                    let found = ear.texts.iter().find(|(_, text)| wanted(text));
                    found.map(|(_, text)| text.clone())
                })
            },
        )
    }

    /// The audio without the messages that are all zero: those are the
    /// bridge's own silence, if the caller's voice has no silent frame.
    pub fn heard_caller(&self) -> Vec<u8> {
        self.line.state.look(|ear| {
            let pieces = ear.audio.iter().map(|(_, pcm)| pcm.as_slice());
            pieces.filter(|pcm| !is_silent(pcm)).collect::<Vec<_>>().concat()
        })
    }

    /// When each message with the caller's voice arrived.
    pub fn audio_at(&self) -> Vec<Instant> {
        self.line.state.look(|ear| {
            let voiced = ear.audio.iter().filter(|(_, pcm)| !is_silent(pcm));
            voiced.map(|(at, _)| *at).collect()
        })
    }

    /// Waits until so many bytes of the caller's voice have arrived.
    #[track_caller]
    pub fn wait_caller_audio(&self, bytes: usize) -> Result<(), Trouble> {
        let what = format!("{bytes} bytes of the caller's voice");
        self.wait(
            &what,
            |_| true,
            |line| line.state.look(|ear| (ear.caller_bytes >= bytes).then_some(())),
        )
    }

    /// The caller's sound (s16le) and the bridge's messages since the last time, as soon as there
    /// is one, or that much time is over. What is taken here is not kept. None: the line has ended.
    pub(super) fn hear(&self, within: Duration) -> Option<(Vec<u8>, Vec<Value>)> {
        self.line.state.wait(within, |ear| {
            let is_quiet = ear.audio.is_empty() && ear.texts.is_empty() && ear.ended.is_none();
            (!is_quiet).then_some(())
        });
        self.line.state.change(|ear| {
            let sound = std::mem::take(&mut ear.audio);
            let texts = std::mem::take(&mut ear.texts);
            let is_there = ear.ended.is_none();
            is_there.then(|| {
                let sound = sound.into_iter().flat_map(|(_, pcm)| pcm).collect();
                (sound, texts.into_iter().map(|(_, text)| text).collect())
            })
        })
    }

    /// The line breaks: it ends without a close frame.
    pub(super) fn fail(&self) {
        if let Some(mouth) = lock(&self.line.mouth).as_ref() {
            moot(mouth.socket.get_ref().shutdown(Shutdown::Both));
        }
    }

    /// Ultravox ends the call: an ordinary close frame.
    #[track_caller]
    pub fn close(&self) -> Result<(), Trouble> {
        self.send_message(normal_close())
    }

    /// What Ultravox answers to the request that has created it.
    pub(super) fn description(&self) -> Value {
        json!({
            "callId": self.line.call_id,
            "created": "2026-11-22T10:00:00.000000Z",
            "joined": null,
            "ended": null,
            "endReason": null,
            "joinUrl": self.line.join_url,
            "metadata": self.line.body["metadata"],
            "aFieldOfTheFuture": [1, 2, 3],
        })
    }

    /// Ultravox's id of the call.
    pub fn id(&self) -> &str {
        &self.line.call_id
    }

    /// Whether its joinUrl leads here. The bridge may add parameters; ours must still be there.
    pub(super) fn is_meant_by(&self, uri: &Uri) -> bool {
        let query = uri.query().unwrap_or_default();
        let Some((_, ours)) = self.line.join_url.split_once("/join/") else {
            return false;
        };
        let (id, token) = ours.split_once('?').unwrap_or((ours, ""));
        uri.path() == format!("/join/{id}") && query.split('&').any(|one| one == token)
    }

    /// Notes that it is joined; false for any time but the first.
    pub(super) fn is_joined_first(&self) -> bool {
        self.line.state.change(|ear| {
            let fresh = ear.joined_at.is_none();
            ear.joined_at.get_or_insert_with(Instant::now);
            fresh
        })
    }

    /// Its line, from the join to the end.
    pub(super) fn attend(&self, reader: &mut WebSocket<Ear>, mouth: AgentMouth) {
        *lock(&self.line.mouth) = Some(mouth);
        // Wakes those who wait for the join.
        self.line.state.change(|ear| ear.joined_at = Some(Instant::now()));
        self.greet();
        let ending = self.line.listen(reader);
        *lock(&self.line.mouth) = None;
        self.line.state.change(|ear| {
            ear.ended_at = Some(Instant::now());
            ear.ended = Some(ending);
        });
    }

    fn greet(&self) {
        // If these do not arrive the line is gone, and its end is recorded.
        moot(self.send(&json!({"type": "call_started", "callId": self.line.call_id})));
        moot(self.send(&json!({"type": "state", "state": "idle"})));
        moot(self.send(&json!({"type": "state", "state": "listening"})));
    }

    /// Waits until the bridge has opened the joinUrl.
    #[track_caller]
    pub fn wait_joined(&self) -> Result<(), Trouble> {
        self.wait("a join", |_| true, |line| lock(&line.mouth).is_some().then_some(()))
    }

    fn next_ordinal(&self) -> u64 {
        self.line.state.change(|ear| {
            ear.next_ordinal += 1;
            ear.next_ordinal
        })
    }

    #[track_caller]
    fn send_message(&self, message: Message) -> Result<(), Trouble> {
        self.wait_joined()?;
        let sent = match lock(&self.line.mouth).as_mut() {
            Some(mouth) => mouth.socket.send(message).map_err(|error| error.to_string()),
            None => Err("the line has ended".to_owned()),
        };
        match sent {
            Ok(()) => Ok(()),
            Err(error) => Err(self.line.log.trouble(format!("the agent cannot send: {error}"))),
        }
    }

    /// Waits on the line's state. `spoiled` says whether the line's end makes
    /// further waiting useless.
    #[track_caller]
    fn wait<R>(
        &self,
        what: &str,
        spoiled: impl Fn(&Ending) -> bool,
        mut ready: impl FnMut(&AgentLine) -> Option<R>,
    ) -> Result<R, Trouble> {
        let deadline = Instant::now() + PATIENCE;
        let mut ended = None;
        loop {
            // Asked outside the lock of the state, since `ready` takes it.
            let version = self.line.state.version();
            if let Some(found) = ready(&self.line) {
                return Ok(found);
            }
            if let Some(ending) = ended {
                return Err(self
                    .line
                    .log
                    .trouble(format!("the agent waited for {what}, but: {ending:?}")));
            }
            ended = self.line.state.look(|ear| ear.ended.clone()).filter(&spoiled);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self
                    .line
                    .log
                    .trouble(format!("the agent waited {PATIENCE:?} for {what}")));
            }
            if ended.is_none() {
                self.line.state.wait_change(version, left);
            }
        }
    }
}

impl AgentLine {
    fn listen(&self, reader: &mut WebSocket<Ear>) -> Ending {
        listen(reader, |message| {
            let at = Instant::now();
            match message {
                Incoming::Reply(reply) => {
                    if let Some(mouth) = lock(&self.mouth).as_mut() {
                        moot(mouth.socket.send(reply));
                    }
                }
                Incoming::Text(text) => {
                    let text = serde_json::from_str(&text).unwrap_or(Value::String(text));
                    if text["type"] == "ping" && self.pongs.load(Ordering::Acquire) {
                        self.pong(&text);
                    }
                    self.state.change(|ear| ear.texts.push((at, text)));
                }
                Incoming::Binary(pcm) => self.state.change(|ear| {
                    ear.caller_bytes += if is_silent(&pcm) { 0 } else { pcm.len() };
                    ear.audio.push((at, pcm));
                }),
            }
        })
    }

    fn pong(&self, ping: &Value) {
        let answer = json!({"type": "pong", "timestamp": ping["timestamp"]});
        if let Some(mouth) = lock(&self.mouth).as_mut() {
            moot(mouth.socket.send(Message::text(answer.to_string())));
        }
    }
}

pub(super) fn transcript(
    role: &str,
    ordinal: u64,
    text: &Value,
    delta: &Value,
    last: bool,
) -> Value {
    json!({"type": "transcript", "role": role, "medium": "voice", "text": text, "delta": delta,
        "final": last, "ordinal": ordinal})
}

pub(super) fn is_result_of(text: &Value, invocation: &str) -> bool {
    text["type"] == "client_tool_result" && text["invocationId"] == invocation
}

fn is_silent(pcm: &[u8]) -> bool {
    pcm.iter().all(|byte| *byte == 0)
}
