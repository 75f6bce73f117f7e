//! Reads the agent's files, and names all that is wrong with them.
//!
//! Only `agent.rs` asks. It hands over what it has read and gets [`Mistakes`]: none, or a line for
//! each with file and place. A mistake that would only follow from another one is not named.
//!
//! ```text
//! agent.json  stages.hello.tools names "bok", which is no tool
//! ```
//!
//! What a call would do with a stage or a tool is none of its business.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Display;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::setup::agent::{
    Agent, PLACEHOLDERS, Phrases, Schema, Stage, TOOL_WITHIN_MAX, Tool, ToolAction, TransferTo,
    find,
};
use crate::toolbox::text::{is_e164, placeholders};

/// What the whisper may hold in braces.
const WHISPERED: [&str; 2] = ["reason", "company_name"];
/// Time for a tool of the agent's own file that does not name one.
const TOOL_WITHIN: Duration = Duration::from_secs(10);

/// `agent.json` as it is written. Stages and tools are read one by one, so that a slip in one does
/// not hide a slip in the next.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AgentFile {
    pub(super) agent_name: String,
    pub(super) company_name: String,
    pub(super) language: String,
    pub(super) first_message: String,
    pub(super) phrases: Phrases,
    pub(super) first_stage: String,
    pub(super) stages: Map<String, Value>,
    pub(super) tools: Map<String, Value>,
    #[serde(default)]
    pub(super) calendars: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) people: BTreeMap<String, String>,
}

/// A tool as it is written: beside its action it has these, and no other key.
#[derive(Deserialize)]
pub(super) struct ToolFile {
    pub(super) description: String,
    pub(super) parameters: Option<Schema>,
    timeout_s: Option<u64>,
    #[serde(flatten)]
    pub(super) action: Map<String, Value>,
}

/// What is wrong with the agent's files: file, place, what.
pub(super) struct Mistakes(pub(super) Vec<String>);

impl Mistakes {
    pub(super) fn entries<T: serde::de::DeserializeOwned>(
        &mut self,
        place: &str,
        values: Map<String, Value>,
    ) -> BTreeMap<String, T> {
        let mut entries = BTreeMap::new();
        for (name, value) in values {
            match serde_json::from_value(value) {
                Ok(entry) => drop(entries.insert(name, entry)),
                Err(error) => self.add(format_args!("{place}.{name}"), error),
            }
        }
        entries
    }

    fn add(&mut self, place: impl Display, what: impl Display) {
        self.0.push(format!("agent.json  {place} {what}"));
    }

    pub(super) fn tool(&mut self, name: &str, file: ToolFile) -> Option<Tool> {
        let place = format!("tools.{name}");
        // What Ultravox accepts as a name for the model.
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) {
            self.add(&place, "must be named with 1 to 64 letters, digits, _ and -");
        }
        let action: ToolAction = match serde_json::from_value(Value::Object(file.action)) {
            Ok(action) => action,
            Err(error) => {
                let kinds = "enter_stage, n8n, reply, hang_up, transfer, ultravox";
                self.add(&place, format_args!("must do exactly one of {kinds}: {error}"));
                return None;
            }
        };
        let within = Duration::from_secs(file.timeout_s.unwrap_or(TOOL_WITHIN.as_secs()));
        if within.is_zero() || within > TOOL_WITHIN_MAX {
            let most = TOOL_WITHIN_MAX.as_secs();
            self.add(format_args!("{place}.timeout_s"), format_args!("must be from 1 to {most}"));
        }
        let parameters = file
            .parameters
            .unwrap_or_else(|| Schema { kind: "object".into(), ..Schema::default() });
        self.schema(&place, &parameters);
        self.texts(&place, &action, &parameters);
        Some(Tool { description: file.description, parameters, within, action })
    }

    /// The part of JSON Schema that Ultravox is given, checked as far as a slip of the pen goes.
    fn schema(&mut self, place: &str, schema: &Schema) {
        const TYPES: &str = "string, number, integer, boolean, array, object";
        if schema.kind != "object" {
            self.add(format_args!("{place}.parameters.type"), "must be \"object\"");
        }
        for (name, property) in &schema.properties {
            let kind = property.get("type").and_then(Value::as_str).unwrap_or_default();
            if !TYPES.split(", ").any(|known| known == kind) {
                let place = format!("{place}.parameters.properties.{name}.type");
                self.add(place, format_args!("must be one of {TYPES}"));
            }
        }
        for name in schema.required.iter().filter(|name| !schema.properties.contains_key(*name)) {
            let place = format!("{place}.parameters.required");
            self.add(place, format_args!("names \"{name}\", which is not among the properties"));
        }
    }

    /// A text of a tool may use the tool's own parameters as well.
    fn texts(&mut self, place: &str, action: &ToolAction, parameters: &Schema) {
        let text = match action {
            ToolAction::EnterStage { message: text, .. } | ToolAction::Reply(text) => text,
            ToolAction::N8n { calendar: Some(calendar), .. } => {
                if !parameters.properties.contains_key(calendar) {
                    self.add(
                        place,
                        format_args!("has no parameter \"{calendar}\" for n8n.calendar"),
                    );
                }
                return;
            }
            ToolAction::Transfer(TransferTo::Chosen { person }) => {
                if !parameters.required.contains(person) {
                    self.add(
                        place,
                        format_args!("has no required parameter \"{person}\" for transfer.person"),
                    );
                }
                return;
            }
            ToolAction::HangUp(false) | ToolAction::Transfer(TransferTo::Fallback(false)) => {
                return self.add(place, "must say true behind hang_up or transfer");
            }
            ToolAction::N8n { .. }
            | ToolAction::HangUp(true)
            | ToolAction::Transfer(TransferTo::Fallback(true) | TransferTo::Named(_))
            | ToolAction::Ultravox { .. } => return,
        };
        for (name, _) in placeholders(text) {
            let known = parameters.properties.contains_key(&name) || name == "random_number";
            if !known && !PLACEHOLDERS.contains(&name.as_str()) {
                self.add(
                    place,
                    format_args!("uses {{{name}}}, which is not one of its parameters"),
                );
            }
        }
    }

    pub(super) fn prompt(
        &mut self,
        name: &str,
        stage: &mut Stage,
        read: &dyn Fn(&str) -> Result<String, String>,
    ) {
        let place = format!("stages.{name}");
        if stage.voice.is_empty() || stage.voice.chars().count() > 40 {
            self.add(
                format_args!("{place}.voice"),
                "must be a voice's name or id, 1 to 40 characters",
            );
        }
        let file = std::mem::take(&mut stage.prompt);
        match read(&file) {
            Ok(text) if text.trim().is_empty() => {
                self.0.push(format!("{file}  is empty ({place})"));
            }
            Ok(text) => stage.prompt = text,
            Err(why) => self.0.push(format!("{file}  {why} ({place}.prompt)")),
        }
        for (name, line) in placeholders(&stage.prompt) {
            if !PLACEHOLDERS.contains(&name.as_str()) {
                let known = PLACEHOLDERS.join(", ");
                self.0.push(format!("{file}:{line}  {{{name}}} is not known: use one of {known}"));
            }
        }
    }

    /// Said by Twilio or by Ultravox itself as they are, but for the first message and the whisper.
    pub(super) fn fixed_texts(&mut self, agent: &Agent) {
        for (name, _) in placeholders(&agent.first_message) {
            if !PLACEHOLDERS.contains(&name.as_str()) {
                self.add("first_message", format_args!("uses {{{name}}}, which is not known"));
            }
        }
        for (name, _) in placeholders(&agent.phrases.whisper) {
            if !WHISPERED.contains(&name.as_str()) {
                self.add("phrases.whisper", format_args!("uses {{{name}}}, which is not known"));
            }
        }
    }

    pub(super) fn names_that_lead_nowhere(&mut self, agent: &Agent) {
        for (name, stage) in &agent.stages {
            for tool in stage.tools.iter().filter(|tool| !agent.tools.contains_key(*tool)) {
                self.add(
                    format_args!("stages.{name}.tools"),
                    format_args!("names \"{tool}\", which is no tool"),
                );
            }
            let mut named = HashSet::new();
            for tool in stage.tools.iter().filter(|tool| !named.insert(tool.as_str())) {
                self.add(
                    format_args!("stages.{name}.tools"),
                    format_args!("names \"{tool}\" twice, which Ultravox refuses"),
                );
            }
        }
        for (name, tool) in &agent.tools {
            match &tool.action {
                ToolAction::EnterStage { stage, .. } if !agent.stages.contains_key(stage) => {
                    self.add(
                        format_args!("tools.{name}"),
                        format_args!("enters \"{stage}\", which is no stage"),
                    );
                }
                ToolAction::N8n { calendar: Some(_), .. } if agent.calendars.is_empty() => {
                    self.add(format_args!("tools.{name}"), "needs calendars, and there are none");
                }
                ToolAction::Transfer(TransferTo::Chosen { .. }) if agent.people.is_empty() => {
                    self.add(format_args!("tools.{name}"), "needs people, and there are none");
                }
                ToolAction::Transfer(TransferTo::Named(who))
                    if !is_e164(who) && find(&agent.people, who).is_none() =>
                {
                    self.add(
                        format_args!("tools.{name}"),
                        format_args!(
                            "transfers to \"{who}\", who is not among people, nor a number"
                        ),
                    );
                }
                ToolAction::EnterStage { .. }
                | ToolAction::N8n { .. }
                | ToolAction::Reply(_)
                | ToolAction::HangUp(_)
                | ToolAction::Transfer(_)
                | ToolAction::Ultravox { .. } => {}
            }
        }
        for (location, _) in agent.calendars.iter().filter(|(_, email)| !email.contains('@')) {
            self.add(format_args!("calendars.{location}"), "must be an e-mail address");
        }
        for (person, _) in agent.people.iter().filter(|(_, number)| !is_e164(number)) {
            self.add(format_args!("people.{person}"), "must be a number like +4930123456");
        }
        if !agent.stages.contains_key(&agent.first_stage) {
            self.add(
                "first_stage",
                format_args!("is \"{}\", which is no stage", agent.first_stage),
            );
        }
    }

    pub(super) fn stages_nobody_enters(&mut self, agent: &Agent) {
        let mut reached = HashSet::from([agent.first_stage.as_str()]);
        let mut to_visit = vec![agent.first_stage.as_str()];
        while let Some(stage) = to_visit.pop() {
            let tools =
                agent.stages.get(stage).map(|stage| stage.tools.as_slice()).unwrap_or_default();
            for tool in tools.iter().filter_map(|name| agent.tools.get(name)) {
                if let ToolAction::EnterStage { stage, .. } = &tool.action
                    && reached.insert(stage)
                {
                    to_visit.push(stage);
                }
            }
        }
        for name in agent.stages.keys().filter(|name| !reached.contains(name.as_str())) {
            self.add(
                format_args!("stages.{name}"),
                "is entered by no tool of a stage that is entered",
            );
        }
    }
}

#[cfg(test)]
mod tests;
