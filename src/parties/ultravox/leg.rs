//! The agent's leg: Ultravox's `serverWebSocket`, on which its voice is binary and all else is JSON.
//!
//! Thread U reads it with [`AgentLeg::next`]; any thread may send sound, text and results. The
//! caller's PCM goes out in binary messages of any length, and wants to be unbroken: silence is
//! sent, too (docs.ultravox.ai/apps/websockets). What is sent as text, one real message of each
//! kind:
//!
//! ```text
//! {"type":"user_text_message","text":"4711","urgency":"immediate"}
//! {"type":"hang_up","message":"We have to end this call now. Goodbye."}
//! {"type":"ping","timestamp":1234567890.123}
//! ```
//!
//! What an end of it means for the call is decided in steps 6 and 8.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};
use tungstenite::Bytes;
use tungstenite::protocol::Message;
use tungstenite::protocol::frame::coding::CloseCode;

use crate::parties::ultravox::in_short;
use crate::records::tap::{Exhibit, Tap, hidden};
use crate::records::transcript::Heard;
use crate::toolbox::socket::{Received, Socket, SocketEnd};
use crate::toolbox::sound::pcm_in_short;

/// An invocation's id. Ultravox's are 36 characters long; a longer one counts as none.
pub(crate) const INVOCATION_ID_BYTES_MAX: usize = 256;

/// The socket to the agent, and the tap on it.
pub(crate) struct AgentLeg {
    socket: Socket,
    tap: Arc<Tap>,
}

impl AgentLeg {
    pub(crate) fn new(socket: Socket, tap: Arc<Tap>) -> AgentLeg {
        AgentLeg { socket, tap }
    }

    /// The next message, and when it was read off the socket. What cannot be read is an error
    /// inside: it is no reason to end the call.
    pub(crate) fn next(
        &self,
        patience: Duration,
    ) -> Result<(Result<FromAgent, String>, Instant), SocketEnd> {
        let (message, arrived) = self.socket.read(patience)?;
        let text = match message {
            Received::Binary(pcm) => {
                self.tap.show(Exhibit::AgentPcm, || pcm_in_short(&pcm));
                return Ok((Ok(FromAgent::Voice(pcm)), arrived));
            }
            Received::Text(text) => text,
        };
        let message = FromAgent::parse(&text);
        let exhibit = match &message {
            Ok(FromAgent::Transcript(_)) => Some(Exhibit::Transcript),
            Ok(FromAgent::Invocation(_)) => Some(Exhibit::Invocation),
            Ok(FromAgent::ClearBuffer) => Some(Exhibit::ClearBuffer),
            Ok(FromAgent::State(_)) => Some(Exhibit::State),
            Ok(FromAgent::Voice(_) | FromAgent::Other(_)) | Err(_) => None,
        };
        if let Some(exhibit) = exhibit {
            self.tap.show(exhibit, || text.to_string());
        }
        Ok((message, arrived))
    }

    pub(crate) fn send_pcm(&self, pcm: impl Into<Bytes>) -> Result<(), SocketEnd> {
        let pcm = pcm.into();
        self.socket.send(Message::Binary(pcm.clone()))?;
        self.tap.show(Exhibit::CallerPcm, || pcm_in_short(&pcm));
        Ok(())
    }

    /// Silence is no caller's sound, so it is not shown.
    pub(crate) fn send_silence(&self, pcm: &'static [u8]) -> Result<(), SocketEnd> {
        self.socket.send(Message::Binary(Bytes::from_static(pcm)))
    }

    /// What the caller has keyed in, as if they had said it at once.
    pub(crate) fn type_text(&self, text: &str) -> Result<(), SocketEnd> {
        let message = json!({"type": "user_text_message", "text": text, "urgency": "immediate"});
        let message = message.to_string();
        self.tap.show(Exhibit::Keys, || hidden(&message, "/text"));
        self.socket.send(Message::text(message))
    }

    /// The agent says this, and leaves.
    pub(crate) fn hang_up(&self, message: &str) -> Result<(), SocketEnd> {
        self.send_json(&json!({"type": "hang_up", "message": message}))
    }

    /// Ultravox answers with a `pong`; anything else it says will do as well.
    pub(crate) fn ping(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if self.send_json(&json!({"type": "ping", "timestamp": now.as_secs_f64()})).is_err() {
            // The next read on this socket tells the same, and knows what to do.
        }
    }

    /// The one result of an invocation.
    pub(crate) fn result(
        &self,
        invocation: &Invocation,
        result: &ToolResult,
    ) -> Result<(), SocketEnd> {
        let message = result.message(invocation);
        let sent = self.send_json(&message);
        self.tap.show(Exhibit::Result, || result_in_short(message));
        sent
    }

    /// Says goodbye. What the agent still sends can be read until its own goodbye comes.
    pub(crate) fn close(&self, why: &str) {
        self.socket.close(CloseCode::Normal, why);
    }

    /// Ends the socket at once, and whoever reads from it sees the end.
    pub(crate) fn cut(&self) {
        self.socket.shut();
    }

    fn send_json(&self, message: &Value) -> Result<(), SocketEnd> {
        self.socket.send(Message::text(message.to_string()))
    }
}

/// What Ultravox sends. One real message of each kind that is text:
///
/// ```text
/// {"type":"call_started","callId":"7c21…"}
/// {"type":"state","state":"listening"}
/// {"type":"transcript","role":"agent","medium":"voice","text":null,"delta":" help?",
///  "final":false,"ordinal":3}
/// {"type":"client_tool_invocation","toolName":"verify","invocationId":"i1","parameters":{}}
/// {"type":"playback_clear_buffer"}
/// {"type":"pong","timestamp":1234567890.123}
/// ```
pub(crate) enum FromAgent {
    /// PCM, which may end in the middle of a sample.
    Voice(Bytes),
    Transcript(Heard),
    Invocation(Invocation),
    ClearBuffer,
    State(String),
    /// An event that is new to us, by its type.
    Other(String),
}

impl FromAgent {
    pub(crate) fn parse(text: &str) -> Result<FromAgent, String> {
        let message: Value =
            serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))?;
        let kind = message["type"].as_str().unwrap_or_default();
        Ok(match kind {
            "transcript" => FromAgent::Transcript(
                Heard::parse(&message).ok_or("a transcript without role or ordinal")?,
            ),
            "client_tool_invocation" => FromAgent::Invocation(
                Invocation::parse(&message).ok_or("an invocation without name or id")?,
            ),
            "playback_clear_buffer" => FromAgent::ClearBuffer,
            "state" => FromAgent::State(message["state"].as_str().unwrap_or_default().to_owned()),
            other => FromAgent::Other(other.to_owned()),
        })
    }
}

#[derive(Clone)]
pub(crate) struct Invocation {
    pub(crate) tool: String,
    pub(crate) id: String,
    pub(crate) parameters: Map<String, Value>,
}

impl Invocation {
    pub(crate) fn parse(message: &Value) -> Option<Invocation> {
        let is_usable = |id: &&str| id.len() <= INVOCATION_ID_BYTES_MAX;
        Some(Invocation {
            tool: message["toolName"].as_str()?.to_owned(),
            id: message["invocationId"].as_str().filter(is_usable)?.to_owned(),
            parameters: message["parameters"].as_object().cloned().unwrap_or_default(),
        })
    }

    /// A parameter as text, blank ones as none.
    pub(crate) fn text(&self, name: &str) -> Option<String> {
        match self.parameters.get(name)? {
            Value::Null => None,
            Value::String(text) if text.trim().is_empty() => None,
            Value::String(text) => Some(text.trim().to_owned()),
            other => Some(other.to_string()),
        }
    }
}

/// What the agent is told. On the wire, with camelCase keys:
///
/// ```text
/// {"type":"client_tool_result","invocationId":"i1","result":"Booked.",
///  "responseType":"tool-response"}
/// {"type":"client_tool_result","invocationId":"i2","result":"{\"systemPrompt\":…}",
///  "responseType":"new-stage"}
/// {"type":"client_tool_result","invocationId":"i3","errorType":"undefined","errorMessage":"…"}
/// ```
pub(crate) enum ToolResult {
    Say(String),
    NewStage(Value),
    HangUp,
    NoSuchTool,
    Failed(String),
}

impl ToolResult {
    /// What the model reads, for the journal.
    pub(crate) fn text(&self) -> &str {
        match self {
            ToolResult::Say(text) | ToolResult::Failed(text) => text,
            ToolResult::NewStage(stage) => stage["toolResultText"].as_str().unwrap_or_default(),
            ToolResult::HangUp => "The call ends now.",
            ToolResult::NoSuchTool => "There is no such tool here.",
        }
    }

    fn message(&self, invocation: &Invocation) -> Value {
        let mut message = json!({"type": "client_tool_result", "invocationId": invocation.id});
        let fields = match self {
            ToolResult::Say(text) => json!({"result": text, "responseType": "tool-response"}),
            ToolResult::NewStage(stage) => {
                json!({"result": stage.to_string(), "responseType": "new-stage"})
            }
            ToolResult::HangUp => json!({"result": self.text(), "responseType": "hang-up"}),
            ToolResult::NoSuchTool => {
                let why = format!("there is no tool {} here", invocation.tool);
                json!({"errorType": "undefined", "errorMessage": why})
            }
            ToolResult::Failed(why) => {
                json!({"errorType": "implementation-error", "errorMessage": why})
            }
        };
        if let (Value::Object(message), Value::Object(fields)) = (&mut message, fields) {
            message.extend(fields);
        }
        message
    }
}

/// A stage that is entered is as long as one that a call begins with.
fn result_in_short(mut message: Value) -> String {
    if message["responseType"] == "new-stage"
        && let Some(result) = message.pointer_mut("/result")
    {
        let stage = serde_json::from_str(result.as_str().unwrap_or_default());
        *result = json!(in_short(stage.unwrap_or_default()).to_string());
    }
    message.to_string()
}

#[cfg(test)]
mod tests;
