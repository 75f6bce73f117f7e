//! The agent's leg: what is said and asked for over its WebSocket.

use serde_json::{Map, Value, json};
use tungstenite::protocol::Message;

use crate::Call;
use crate::parties::ultravox::in_short;
use crate::records::exhibit::Exhibit;
use crate::records::transcript::Heard;
use crate::toolbox::log::log;
use crate::toolbox::socket::Duplex;

/// An invocation's id. Ultravox's are 36 characters long; a longer one counts as none.
pub(crate) const INVOCATION_ID_BYTES_MAX: usize = 256;

/// What Ultravox sends as text. One real message of each kind:
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
    Transcript(Heard),
    Invocation(Invocation),
    ClearBuffer,
    State(String),
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

/// Ultravox answers with a `pong`; anything else it says will do as well.
pub(crate) fn ping(agent: &Duplex) {
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let ping = json!({"type": "ping", "timestamp": now.as_secs_f64()});
    if agent.send(Message::text(ping.to_string())).is_err() {
        // The next read on this line tells the same, and knows what to do.
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

pub(crate) fn tell_result(
    call: &Call,
    agent: &Duplex,
    invocation: &Invocation,
    result: &ToolResult,
) {
    let mut message = json!({"type": "client_tool_result", "invocationId": invocation.id});
    let fields = match result {
        ToolResult::Say(text) => json!({"result": text, "responseType": "tool-response"}),
        ToolResult::NewStage(stage) => {
            json!({"result": stage.to_string(), "responseType": "new-stage"})
        }
        ToolResult::HangUp => json!({"result": result.text(), "responseType": "hang-up"}),
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
    let message = message.to_string();
    if let Err(end) = agent.send(Message::text(message.clone())) {
        log!(call, Warn, Act, "{}: the result did not reach the agent: {end}", invocation.tool);
    }
    call.show(Exhibit::Result, || result_for_the_eye(&message));
}

/// A stage that is entered is as long as one that a call begins with.
pub(crate) fn result_for_the_eye(text: &str) -> String {
    let mut message: Value = serde_json::from_str(text).unwrap_or_default();
    if message["responseType"] == "new-stage"
        && let Some(result) = message.pointer_mut("/result")
    {
        let stage = serde_json::from_str(result.as_str().unwrap_or_default());
        *result = json!(in_short(stage.unwrap_or_default()).to_string());
    }
    message.to_string()
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
}

#[cfg(test)]
mod tests;
