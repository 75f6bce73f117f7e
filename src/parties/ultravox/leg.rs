//! The agent's leg: Ultravox's `serverWebSocket`, on which its voice is binary and all else JSON.
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

use serde_json::{Value, json};
use tungstenite::Bytes;
use tungstenite::protocol::Message;
use tungstenite::protocol::frame::coding::CloseCode;

use crate::parties::ultravox::tool::{Invocation, ToolResult, result_in_short};
use crate::records::tap::{Exhibit, Tap, hidden};
use crate::records::transcript::Heard;
use crate::toolbox::socket::{Received, Socket, SocketEnd};
use crate::toolbox::sound::pcm_in_short;

/// The code of a socket that is closed because all has been said (RFC 6455, 7.4.1). Servers that
/// restart or fail say 1001, 1011, 1012, or give no code.
pub(crate) const GOODBYE: u16 = 1_000;

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

    pub(crate) fn send_pcm(&self, pcm: Vec<u8>) -> Result<(), SocketEnd> {
        let shown = (!self.tap.has_shown(Exhibit::CallerPcm)).then(|| pcm_in_short(&pcm));
        self.socket.send(Message::Binary(pcm.into()))?;
        if let Some(shown) = shown {
            self.tap.show(Exhibit::CallerPcm, || shown);
        }
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

#[cfg(test)]
mod tests;
