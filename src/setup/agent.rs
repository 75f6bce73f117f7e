//! The agent: stages, tools, calendars, people and phrases, as steps 3 and 7 use them.
//!
//! It is data, in files that a person can edit without Rust: `agent.json` and the prompts that it
//! names, from `AGENT_DIR` or, without that, those that are compiled in. [`Agent::load`] reads and
//! checks them and leaves out what could not work with these settings, so that the model is not
//! offered a tool that can only fail. What may be in the files, and every mistake in them, is
//! `agent_files`. Nothing is checked again behind this.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::setup::agent_files::Mistakes;
use crate::setup::agent_in_force::{Seen, look_at};
use crate::setup::settings::{Config, settings_in_force};
use crate::setup::stop::{Stop, needs_attention};
use crate::setup::values::Settings;
use crate::toolbox::text::fill;

/// The longest `timeout_s` in the agent's file.
pub(crate) const TOOL_WITHIN_MAX: Duration = Duration::from_secs(30);

/// Who answers: stages, tools, calendars and phrases, from `agent.json` and the prompts it names.
pub(crate) struct Agent {
    pub(crate) name: String,
    pub(crate) company: String,
    pub(crate) language: String,
    pub(crate) first_message: String,
    pub(crate) phrases: Phrases,
    pub(crate) first_stage: String,
    /// Number that was called -> stage in which the call begins, where that is not `first_stage`.
    pub(crate) numbers: BTreeMap<String, String>,
    pub(crate) stages: BTreeMap<String, Stage>,
    pub(crate) tools: BTreeMap<String, Tool>,
    /// Location -> calendar e-mail.
    pub(crate) calendars: BTreeMap<String, String>,
    /// Name -> telephone number.
    pub(crate) people: BTreeMap<String, String>,
}

/// Sentences that are said for the agent, in the agent's language.
#[derive(Default)]
pub(crate) struct Phrases {
    pub(crate) busy: String,
    pub(crate) apology: String,
    pub(crate) putting_through: String,
    pub(crate) still_there: String,
    pub(crate) silence_goodbye: String,
    pub(crate) time_is_up: String,
    pub(crate) closing: String,
    pub(crate) cut_short: String,
    /// To the person whom a caller is put through to.
    pub(crate) whisper: String,
}

/// A part of the conversation. Entering it replaces prompt, voice and the set of tools.
pub(crate) struct Stage {
    pub(crate) voice: String,
    pub(crate) agent_name: Option<String>,
    /// Instead of the agent's.
    pub(crate) language: Option<String>,
    /// Said when a call begins here, instead of the agent's.
    pub(crate) first_message: Option<String>,
    /// In the file: the name of a Markdown file. Once loaded: its text.
    pub(crate) prompt: String,
    pub(crate) tools: Vec<String>,
}

pub(crate) struct Tool {
    pub(crate) description: String,
    /// A JSON Schema object: what the model has to fill in.
    pub(crate) parameters: Schema,
    pub(crate) within: Duration,
    pub(crate) action: ToolAction,
}

#[derive(Default)]
pub(crate) struct Schema {
    pub(crate) kind: String,
    pub(crate) properties: Map<String, Value>,
    pub(crate) required: Vec<String>,
}

/// The one thing a tool does.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum ToolAction {
    /// Goes on in another stage. `message` is what the model reads first there.
    EnterStage {
        stage: String,
        message: String,
    },
    /// Posts to n8n and tells the agent the reply's `message`. The parameter that `calendar` names
    /// is chosen among the calendars.
    N8n {
        route: String,
        calendar: Option<String>,
    },
    /// Answers from here, with `{param}` filled in.
    Reply(String),
    HangUp(bool),
    /// Puts the caller through to a person. A `reason` among the parameters is told to them.
    Transfer(TransferTo),
    /// A tool that Ultravox runs itself; we only offer it.
    Ultravox {
        tool: String,
        #[serde(default)]
        parameter_overrides: Map<String, Value>,
    },
}

/// Who is rung for the caller.
#[derive(Deserialize)]
#[serde(
    untagged,
    deny_unknown_fields,
    expecting = "transfer must be true, a number, a name among people, or {\"person\": …}"
)]
pub(crate) enum TransferTo {
    /// `FALLBACK_NUMBER`.
    Fallback(bool),
    /// A number, or a name among the people.
    Named(String),
    /// The parameter of that name is chosen among the people.
    Chosen { person: String },
}

/// The agent that is compiled in: the receptionist of an insurance company.
const BUILT_IN_AGENT: [(&str, &str); 4] = [
    ("agent.json", include_str!("../agent/agent.json")),
    ("greeting.md", include_str!("../agent/greeting.md")),
    ("main_convo.md", include_str!("../agent/main_convo.md")),
    ("call_summary.md", include_str!("../agent/call_summary.md")),
];

/// What prompts, the first message and tools may hold in braces. Tools add their own parameters.
pub(super) const PLACEHOLDERS: [&str; 5] =
    ["agent_name", "company_name", "now", "caller_number", "facts"];

impl Agent {
    pub(crate) fn load(config: &Config) -> Result<Agent, Vec<String>> {
        Agent::load_noting(config, &mut Vec::new())
    }

    /// Notes the files that it has looked at, be they right or wrong.
    pub(super) fn load_noting(config: &Config, seen: &mut Vec<Seen>) -> Result<Agent, Vec<String>> {
        let mut agent = Agent::read(config.agent_dir.as_deref(), seen)?;
        if let Some(first_message) = &config.first_message {
            agent.first_message.clone_from(first_message);
        }
        agent.offer_only_what_works(config);
        Ok(agent)
    }

    /// Said to the person whom a caller is put through to, before they take the call.
    pub(crate) fn whisper(&self, reason: &str) -> String {
        let is_whole = reason.is_empty() || reason.ends_with(['.', '!', '?', '…', '。']);
        let reason = if is_whole { reason.to_owned() } else { format!("{reason}.") };
        fill(&self.phrases.whisper, |name| match name {
            "company_name" => Some(self.company.clone()),
            "reason" => Some(reason.clone()),
            _ => None,
        })
    }

    /// From the owner's directory, or else the one that is built in.
    pub(crate) fn read(
        directory: Option<&Path>,
        seen: &mut Vec<Seen>,
    ) -> Result<Agent, Vec<String>> {
        let seen = RefCell::new(seen);
        Agent::from_files(&|name| match directory {
            None => {
                let file = BUILT_IN_AGENT.iter().find(|(built_in, _)| *built_in == name);
                file.map(|(_, text)| (*text).to_owned()).ok_or_else(|| "is not built in".to_owned())
            }
            Some(directory) => {
                let path = directory.join(name);
                // Before it is read: what is edited meanwhile is read once more.
                seen.borrow_mut().push(look_at(path.clone()));
                fs::read_to_string(path).map_err(|error| {
                    format!("cannot be read from {}: {error}", directory.display())
                })
            }
        })
    }

    /// For the commands that need nothing but the agent: of all settings only `AGENT_DIR`.
    pub(crate) fn alone() -> Result<Agent, Stop> {
        let (values, complaints) = settings_in_force();
        if !complaints.is_empty() {
            return Err(needs_attention("setting", &complaints));
        }
        let settings = Settings { values, complaints };
        let directory = settings.text("AGENT_DIR").map(PathBuf::from);
        Agent::read(directory.as_deref(), &mut Vec::new())
            .map_err(|mistakes| needs_attention("agent file mistake", &mistakes))
    }

    /// Reads `agent.json` and the prompts it names. All mistakes at once, each with its place.
    pub(crate) fn from_files(
        read: &dyn Fn(&str) -> Result<String, String>,
    ) -> Result<Agent, Vec<String>> {
        let text = read("agent.json").map_err(|why| vec![format!("agent.json  {why}")])?;
        let file =
            serde_json::from_str(&text).map_err(|error| vec![format!("agent.json  {error}")])?;
        let mut mistakes = Mistakes::default();
        let agent = mistakes.agent(file, read);
        if mistakes.lines.is_empty() { Ok(agent) } else { Err(mistakes.lines) }
    }

    /// Where calls begin: in the first stage, by a number, and wherever a stage has a first message
    /// of its own, which is for n8n to choose. Each stage comes with its numbers.
    pub(crate) fn entries(&self) -> Vec<(&str, Vec<&str>)> {
        let numbers_of = |stage: &str| {
            let numbers = self.numbers.iter().filter(|(_, to)| *to == stage);
            numbers.map(|(number, _)| number.as_str()).collect::<Vec<_>>()
        };
        let first = [(self.first_stage.as_str(), numbers_of(&self.first_stage))];
        let others = self.stages.iter().filter(|(name, _)| **name != self.first_stage);
        let entries = others.filter_map(|(name, stage)| {
            let numbers = numbers_of(name);
            let is_entry = stage.first_message.is_some() || !numbers.is_empty();
            is_entry.then_some((name.as_str(), numbers))
        });
        first.into_iter().chain(entries).collect()
    }

    /// A tool that could only fail is not offered: the model would try it, and apologise.
    fn offer_only_what_works(&mut self, config: &Config) {
        let tools = &self.tools;
        for stage in self.stages.values_mut() {
            stage.tools.retain(|name| match tools.get(name).map(|tool| &tool.action) {
                Some(ToolAction::N8n { .. }) => config.n8n_webhook_url.is_some(),
                Some(ToolAction::Ultravox { tool, .. }) => {
                    tool != "queryCorpus" || config.ultravox_corpus_id.is_some()
                }
                Some(ToolAction::Transfer(TransferTo::Fallback(_))) => {
                    config.fallback_number.is_some()
                }
                Some(
                    ToolAction::EnterStage { .. }
                    | ToolAction::Reply(_)
                    | ToolAction::HangUp(_)
                    | ToolAction::Transfer(TransferTo::Named(_) | TransferTo::Chosen { .. }),
                )
                | None => true,
            });
        }
    }
}

impl Tool {
    /// The parameter that is chosen among names of ours, if this tool has one, and what they stand
    /// for: e-mail addresses of calendars, or numbers of people.
    pub(crate) fn choice<'a>(
        &'a self,
        agent: &'a Agent,
    ) -> Option<(&'a String, &'a BTreeMap<String, String>)> {
        match &self.action {
            ToolAction::N8n { calendar, .. } => Some((calendar.as_ref()?, &agent.calendars)),
            ToolAction::Transfer(TransferTo::Chosen { person }) => Some((person, &agent.people)),
            ToolAction::EnterStage { .. }
            | ToolAction::Reply(_)
            | ToolAction::HangUp(_)
            | ToolAction::Transfer(TransferTo::Fallback(_) | TransferTo::Named(_))
            | ToolAction::Ultravox { .. } => None,
        }
    }
}

/// The entry of that name, however it is capitalised.
pub(crate) fn find<'a>(
    entries: &'a BTreeMap<String, String>,
    wanted: &str,
) -> Option<(&'a str, &'a str)> {
    let found = entries.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted));
    found.map(|(name, value)| (name.as_str(), value.as_str()))
}

#[cfg(test)]
mod tests;
