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

use std::collections::BTreeSet;
use std::fmt::Display;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::setup::agent::{
    Agent, PLACEHOLDERS, Phrases, Schema, Stage, TOOL_WITHIN_MAX, Tool, ToolAction, TransferTo,
};
use crate::toolbox::text::{nearest, placeholders};

/// For agent files that are older than this phrase.
const WHISPER: &str = "A call for {company_name}. {reason} To take it, press 1.";
/// What the whisper may hold in braces.
const WHISPERED: [&str; 2] = ["reason", "company_name"];
/// Time for a tool of the agent's own file that does not name one.
const TOOL_WITHIN: Duration = Duration::from_secs(10);

/// The one thing that a tool does, by its key.
const ACTIONS: [&str; 6] = ["enter_stage", "n8n", "reply", "hang_up", "transfer", "ultravox"];

/// An object of the file while it is taken apart, key by key, so that a slip in one does not hide a
/// slip in the next.
struct Object {
    place: String,
    fields: Map<String, Value>,
    /// Keys that it may have, and those of them that it must have and has not.
    known: Vec<&'static str>,
    missing: Vec<&'static str>,
}

/// What is wrong with the agent's files: file, place, what.
#[derive(Default)]
pub(super) struct Mistakes {
    pub(super) lines: Vec<String>,
    /// Something could not be read, and would be missed in other places, which helps nobody.
    pub(super) is_partial: bool,
}

impl Mistakes {
    pub(super) fn agent(
        &mut self,
        file: Value,
        read: &dyn Fn(&str) -> Result<String, String>,
    ) -> Agent {
        let mut file = self.object("", file);
        let mut text = |key| self.required::<String>(&mut file, key).unwrap_or_default();
        let (name, company) = (text("agent_name"), text("company_name"));
        let (language, first_message) = (text("language"), text("first_message"));
        let first_stage = text("first_stage");
        let numbers = self.optional(&mut file, "numbers").unwrap_or_default();
        let phrases = self.required(&mut file, "phrases").map(|value| self.phrases(value));
        let stages: Map<_, _> = self.required(&mut file, "stages").unwrap_or_default();
        let tools: Map<_, _> = self.required(&mut file, "tools").unwrap_or_default();
        let calendars = self.optional(&mut file, "calendars").unwrap_or_default();
        let people = self.optional(&mut file, "people").unwrap_or_default();
        self.end(file);
        let tool_names: BTreeSet<String> = tools.keys().cloned().collect();
        let tools = tools.into_iter().filter_map(|(name, tool)| {
            let tool = self.tool(&name, tool)?;
            Some((name, tool))
        });
        let tools = tools.collect();
        let stages = stages.into_iter().map(|(name, stage)| {
            let stage = self.stage(&name, stage, read);
            (name, stage)
        });
        let stages = stages.collect();
        let phrases = phrases.unwrap_or_default();
        let agent = Agent {
            name,
            company,
            language,
            first_message,
            phrases,
            first_stage,
            numbers,
            stages,
            tools,
            calendars,
            people,
        };
        self.fixed_texts(&agent);
        self.names_that_lead_nowhere(&agent, &tool_names);
        if !self.is_partial {
            self.stages_nobody_enters(&agent);
        }
        agent
    }

    fn object(&mut self, place: &str, value: Value) -> Object {
        let fields = match value {
            Value::Object(fields) => Some(fields),
            _ => None,
        };
        if fields.is_none() {
            self.cannot_read(place, "must be an object");
        }
        // Of what is no object nothing more is missed.
        let known = if fields.is_some() { Vec::new() } else { vec![""] };
        let fields = fields.unwrap_or_default();
        Object { place: place.to_owned(), fields, known, missing: Vec::new() }
    }

    fn required<T: DeserializeOwned>(
        &mut self,
        object: &mut Object,
        key: &'static str,
    ) -> Option<T> {
        if !object.fields.contains_key(key) {
            object.missing.push(key);
        }
        self.optional(object, key)
    }

    fn optional<T: DeserializeOwned>(
        &mut self,
        object: &mut Object,
        key: &'static str,
    ) -> Option<T> {
        object.known.push(key);
        let value = object.fields.remove(key)?;
        let place = object.place_of(key);
        serde_json::from_value(value).map_err(|error| self.cannot_read(&place, error)).ok()
    }

    /// What is left over in an object, and what it lacks.
    fn end(&mut self, mut object: Object) {
        if object.known.first() == Some(&"") {
            return;
        }
        for key in object.fields.keys() {
            let meant = nearest(key, object.missing.iter().chain(&object.known).copied());
            object.missing.retain(|missing| Some(*missing) != meant);
            let meant = meant.map(|meant| format!(": `{meant}` is meant")).unwrap_or_default();
            self.cannot_read(&object.place, format_args!("unknown field `{key}`{meant}"));
        }
        for key in object.missing {
            self.cannot_read(&object.place, format_args!("missing field `{key}`"));
        }
    }

    fn cannot_read(&mut self, place: &str, what: impl Display) {
        self.is_partial = true;
        self.add(place, what);
    }

    pub(super) fn add(&mut self, place: impl Display, what: impl Display) {
        let place = place.to_string();
        let gap = if place.is_empty() { "" } else { " " };
        self.lines.push(format!("agent.json  {place}{gap}{what}"));
    }

    fn phrases(&mut self, value: Value) -> Phrases {
        let mut object = self.object("phrases", value);
        let mut text = |key| self.required::<String>(&mut object, key).unwrap_or_default();
        let phrases = Phrases {
            busy: text("busy"),
            apology: text("apology"),
            putting_through: text("putting_through"),
            still_there: text("still_there"),
            silence_goodbye: text("silence_goodbye"),
            time_is_up: text("time_is_up"),
            closing: text("closing"),
            cut_short: text("cut_short"),
            whisper: self.optional(&mut object, "whisper").unwrap_or_else(|| WHISPER.into()),
        };
        self.end(object);
        phrases
    }

    fn tool(&mut self, name: &str, value: Value) -> Option<Tool> {
        let place = format!("tools.{name}");
        // What Ultravox accepts as a name for the model.
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) {
            self.add(&place, "must be named with 1 to 64 letters, digits, _ and -");
        }
        let mut file = self.object(&place, value);
        let description = self.required(&mut file, "description").unwrap_or_default();
        let parameters = self.optional(&mut file, "parameters");
        let parameters = parameters.map(|value| self.schema(&place, value));
        let seconds: Option<u64> = self.optional(&mut file, "timeout_s");
        let action = self.action(&mut file);
        self.end(file);
        let within = seconds.map_or(TOOL_WITHIN, Duration::from_secs);
        if within.is_zero() || within > TOOL_WITHIN_MAX {
            let most = TOOL_WITHIN_MAX.as_secs();
            self.add(format_args!("{place}.timeout_s"), format_args!("must be from 1 to {most}"));
        }
        let parameters =
            parameters.unwrap_or_else(|| Schema { kind: "object".into(), ..Schema::default() });
        let action = action?;
        self.texts(&place, &action, &parameters);
        Some(Tool { description, parameters, within, action })
    }

    fn action(&mut self, tool: &mut Object) -> Option<ToolAction> {
        tool.known.extend(ACTIONS);
        let mut found = ACTIONS.into_iter().filter_map(|key| tool.fields.remove_entry(key));
        let wanted = || format!("must do exactly one of {}", ACTIONS.join(", "));
        match (found.next(), found.next()) {
            (Some((kind, value)), None) => {
                let action = serde_json::from_value(json!({kind: value}));
                let complain = |error| format!("{}: {error}", wanted());
                action.map_err(|error| self.cannot_read(&tool.place, complain(error))).ok()
            }
            (None, _) if tool.fields.keys().any(|key| nearest(key, ACTIONS).is_some()) => None,
            _ => {
                self.cannot_read(&tool.place, wanted());
                None
            }
        }
    }

    /// The part of JSON Schema that Ultravox is given, checked as far as a slip of the pen goes.
    fn schema(&mut self, tool: &str, value: Value) -> Schema {
        const TYPES: &str = "string, number, integer, boolean, array, object";
        let place = format!("{tool}.parameters");
        let mut file = self.object(&place, value);
        let schema = Schema {
            kind: self.required(&mut file, "type").unwrap_or_else(|| "object".into()),
            properties: self.required(&mut file, "properties").unwrap_or_default(),
            required: self.optional(&mut file, "required").unwrap_or_default(),
        };
        self.end(file);
        if schema.kind != "object" {
            self.add(format_args!("{place}.type"), "must be \"object\"");
        }
        for (name, property) in &schema.properties {
            let kind = property.get("type").and_then(Value::as_str).unwrap_or_default();
            if !TYPES.split(", ").any(|known| known == kind) {
                let place = format!("{place}.properties.{name}.type");
                self.add(place, format_args!("must be one of {TYPES}"));
            }
        }
        for name in schema.required.iter().filter(|name| !schema.properties.contains_key(*name)) {
            let place = format!("{place}.required");
            self.add(place, format_args!("names \"{name}\", which is not among the properties"));
        }
        schema
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

    fn stage(
        &mut self,
        name: &str,
        value: Value,
        read: &dyn Fn(&str) -> Result<String, String>,
    ) -> Stage {
        let place = format!("stages.{name}");
        let mut file = self.object(&place, value);
        let voice: Option<String> = self.required(&mut file, "voice");
        let agent_name = self.optional(&mut file, "agent_name");
        let language = self.optional(&mut file, "language");
        let first_message = self.optional(&mut file, "first_message");
        let prompt: Option<String> = self.required(&mut file, "prompt");
        let tools = self.required(&mut file, "tools").unwrap_or_default();
        self.end(file);
        if voice.as_ref().is_some_and(|voice| voice.is_empty() || voice.chars().count() > 40) {
            self.add(
                format_args!("{place}.voice"),
                "must be a voice's name or id, 1 to 40 characters",
            );
        }
        let voice = voice.unwrap_or_default();
        let prompt = prompt.map(|file| self.prompt(&place, &file, read)).unwrap_or_default();
        Stage { voice, agent_name, language, first_message, prompt, tools }
    }

    fn prompt(
        &mut self,
        place: &str,
        file: &str,
        read: &dyn Fn(&str) -> Result<String, String>,
    ) -> String {
        let text = read(file);
        match &text {
            Ok(text) if text.trim().is_empty() => {
                self.lines.push(format!("{file}  is empty ({place})"));
            }
            Ok(_) => {}
            Err(why) => self.lines.push(format!("{file}  {why} ({place}.prompt)")),
        }
        let prompt = text.unwrap_or_default();
        for (name, line) in placeholders(&prompt) {
            if !PLACEHOLDERS.contains(&name.as_str()) {
                let known = PLACEHOLDERS.join(", ");
                self.lines
                    .push(format!("{file}:{line}  {{{name}}} is not known: use one of {known}"));
            }
        }
        prompt
    }

    /// Said by Twilio or by Ultravox itself as they are, but for the first message and the
    /// whisper.
    fn fixed_texts(&mut self, agent: &Agent) {
        let is_missing = agent.language.is_empty() && self.is_partial;
        if !is_missing {
            self.language("language", &agent.language);
        }
        self.first_message("first_message", &agent.first_message);
        for (name, _) in placeholders(&agent.phrases.whisper) {
            if !WHISPERED.contains(&name.as_str()) {
                self.add("phrases.whisper", format_args!("uses {{{name}}}, which is not known"));
            }
        }
        for (name, stage) in &agent.stages {
            if let Some(language) = &stage.language {
                self.language(&format!("stages.{name}.language"), language);
            }
            if let Some(text) = &stage.first_message {
                self.first_message(&format!("stages.{name}.first_message"), text);
            }
        }
    }

    fn language(&mut self, place: &str, language: &str) {
        if !has_region(language) {
            let meant = with_region(language);
            let meant = meant.map_or("a tag such as \"en-GB\"".into(), |tag| format!("\"{tag}\""));
            self.add(place, format_args!("is \"{language}\", without its region: use {meant}"));
        }
    }

    fn first_message(&mut self, place: &str, text: &str) {
        for (name, _) in placeholders(text) {
            if !PLACEHOLDERS.contains(&name.as_str()) {
                self.add(place, format_args!("uses {{{name}}}, which is not known"));
            }
        }
    }
}

impl Object {
    fn place_of(&self, key: &str) -> String {
        if self.place.is_empty() { key.to_owned() } else { format!("{}.{key}", self.place) }
    }
}

/// Twilio's voices know languages by tags such as `de-DE`, `es-419` and `zh-Hant-TW`, and may say
/// nothing at all in `de`.
fn has_region(language: &str) -> bool {
    let mut parts = language.split('-');
    let is_language = parts.next().is_some_and(|part| matches!(part.len(), 2 | 3));
    let region = parts.next_back().unwrap_or_default();
    let digits = region.bytes().all(|byte| byte.is_ascii_digit());
    let is_region = matches!((region.len(), digits), (2, false) | (3, true));
    let is_plain = |part: &str| part.bytes().all(|byte| byte.is_ascii_alphanumeric());
    is_language && is_region && language.split('-').all(is_plain)
}

/// What is meant by `de` or `de_DE`, as far as that is plain.
fn with_region(language: &str) -> Option<String> {
    const USUAL: [&str; 24] = [
        "ar-XA", "bg-BG", "cs-CZ", "da-DK", "de-DE", "el-GR", "en-US", "es-ES", "fi-FI", "fr-FR",
        "hi-IN", "hu-HU", "it-IT", "ja-JP", "ko-KR", "nb-NO", "nl-NL", "pl-PL", "pt-PT", "ro-RO",
        "ru-RU", "sv-SE", "tr-TR", "uk-UA",
    ];
    let language = language.to_ascii_lowercase();
    if let Some((language, region)) = language.split_once('_') {
        let tag = format!("{language}-{}", region.to_ascii_uppercase());
        return has_region(&tag).then_some(tag);
    }
    USUAL.iter().find(|tag| tag.split('-').next() == Some(&language)).map(ToString::to_string)
}

#[cfg(test)]
mod tests;
