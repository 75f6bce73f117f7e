//! One run of a tool, as the agent asks for it and is answered: [`Invocation`], [`ToolResult`].
//!
//! Pure values: what a tool of the agent's files does with them is decided in step 7. Here is what
//! can be said of an invocation by itself: whether the model has left out or made up something,
//! and what of it goes to n8n and into the journal.
//!
//! ```text
//! {"type":"client_tool_invocation","toolName":"schedule_meeting","invocationId":"i1",
//!  "parameters":{"name":"Anna Berg","datetime":"2027-03-09T14:30","location":"Berlin"}}
//! ```

use serde_json::{Map, Value, json};

use crate::parties::ultravox::in_short;
use crate::records::event::Transfer;
use crate::records::journal::WIRE_CHARS_MAX;
use crate::setup::agent::{Agent, Tool, ToolAction, TransferTo, find};
use crate::setup::settings::Config;
use crate::toolbox::text::{cut, is_e164};

/// An invocation's id. Ultravox's are 36 characters long; a longer one counts as none.
pub(crate) const INVOCATION_ID_BYTES_MAX: usize = 256;
/// What a person is told before they take a call. It is to be one sentence.
const REASON_CHARS_MAX: usize = 200;

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

    /// What the model left out or made up, as an instruction to it. Nothing has been done yet. Who
    /// wants to hang up lacks nothing: the caller has heard the goodbye.
    pub(crate) fn lacks(&self, tool: &Tool, agent: &Agent) -> Option<String> {
        if matches!(tool.action, ToolAction::HangUp(_)) {
            return None;
        }
        let choice = tool.choice(agent);
        let required = tool.parameters.required.iter().map(String::as_str);
        let missing: Vec<&str> = required.filter(|name| self.text(name).is_none()).collect();
        if !missing.is_empty() {
            let verb = if missing.len() == 1 { "is" } else { "are" };
            let names = missing.join(", ");
            return Some(format!(
                "Not done yet: {names} {verb} missing. Ask the caller, then try again."
            ));
        }
        let (parameter, names) = choice?;
        let wanted = self.text(parameter)?;
        if find(names, &wanted).is_some() {
            return None;
        }
        let names: Vec<&str> = names.keys().map(String::as_str).collect();
        Some(format!(
            "Not done yet: \"{wanted}\" is not a {parameter} we have. Valid are: {}. Ask the \
             caller which one.",
            names.join(", ")
        ))
    }

    /// The parameters that the tool knows, as JSON; the calendar's e-mail in the place of its name.
    pub(crate) fn n8n_data(&self, tool: &Tool, agent: &Agent) -> String {
        let mut fields = Map::new();
        for name in tool.parameters.properties.keys() {
            let Some(value) = self.parameters.get(name) else { continue };
            let calendars = tool.choice(agent).filter(|(parameter, _)| *parameter == name);
            let location = calendars.zip(self.text(name));
            match location.and_then(|((_, calendars), location)| find(calendars, &location)) {
                Some((_, email)) => fields.insert("calendar_id".into(), json!(email)),
                None => fields.insert(name.clone(), value.clone()),
            };
        }
        Value::Object(fields).to_string()
    }

    /// Whom the caller is to be put through to. None: the tool is not for that, or there is nobody.
    pub(crate) fn transfer(&self, tool: &Tool, agent: &Agent, config: &Config) -> Option<Transfer> {
        let ToolAction::Transfer(to) = &tool.action else { return None };
        let (person, number) = match to {
            TransferTo::Fallback(_) => (String::new(), config.fallback_number.clone()?),
            TransferTo::Named(number) if is_e164(number) => (String::new(), number.clone()),
            TransferTo::Named(name) => entry(agent, name)?,
            TransferTo::Chosen { person } => entry(agent, &self.text(person)?)?,
        };
        let reason = cut(&self.text("reason").unwrap_or_default(), REASON_CHARS_MAX);
        Some(Transfer { person, number, reason })
    }

    /// For the journal. Only the beginning of arguments without end is written out at all.
    pub(crate) fn arguments(&self) -> Value {
        let mut text = [0; WIRE_CHARS_MAX];
        match serde_json::to_writer(text.as_mut_slice(), &self.parameters) {
            Ok(()) => json!(self.parameters),
            Err(_) => json!(format!("{}…", String::from_utf8_lossy(&text))),
        }
    }
}

/// A person's name as it is written in the agent's file, and their number.
fn entry(agent: &Agent, name: &str) -> Option<(String, String)> {
    find(&agent.people, name).map(|(name, number)| (name.to_owned(), number.to_owned()))
}

/// What the agent is told. On the wire, with camelCase keys:
///
/// ```text
/// {"type":"client_tool_result","invocationId":"i1","result":"Booked.",
///  "responseType":"tool-response"}
/// {"type":"client_tool_result","invocationId":"i2","result":"{\"systemPrompt\":…}",
///  "responseType":"new-stage"}
/// {"type":"client_tool_result","invocationId":"i3","result":"{\"strict\":true}",
///  "responseType":"hang-up"}
/// {"type":"client_tool_result","invocationId":"i4","errorType":"undefined","errorMessage":"…"}
/// ```
pub(crate) enum ToolResult {
    Say(String),
    NewStage(Value),
    HangUp,
    NoSuchTool,
    Failed(String),
}

impl ToolResult {
    /// In words, for the journal.
    pub(crate) fn text(&self) -> &str {
        match self {
            ToolResult::Say(text) | ToolResult::Failed(text) => text,
            ToolResult::NewStage(stage) => stage["toolResultText"].as_str().unwrap_or_default(),
            ToolResult::HangUp => "The call ends now.",
            ToolResult::NoSuchTool => "There is no such tool here.",
        }
    }

    pub(super) fn message(&self, invocation: &Invocation) -> Value {
        let mut message = json!({"type": "client_tool_result", "invocationId": invocation.id});
        let fields = match self {
            ToolResult::Say(text) => json!({"result": text, "responseType": "tool-response"}),
            ToolResult::NewStage(stage) => {
                json!({"result": stage.to_string(), "responseType": "new-stage"})
            }
            ToolResult::HangUp => json!({"result": STRICTLY, "responseType": "hang-up"}),
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

/// The call ends whatever the caller says now. Ultravox reads the result of a hang-up as JSON; with
/// a `message` in it the agent would say a second goodbye.
const STRICTLY: &str = r#"{"strict":true}"#;

/// A stage that is entered is as long as one that a call begins with.
pub(super) fn result_in_short(mut message: Value) -> String {
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
