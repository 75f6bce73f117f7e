//! What n8n decides about a call that rings: its reply to route 1.
//!
//! The first message alone is as good as ever. Beside it, or instead of it, there may be more:
//!
//! ```text
//! {"firstMessage":"Hello Anna.","stage":"claims","facts":"Anna has had a policy since 2019."}
//! {"transfer":true}
//! {"refuse":true}
//! ```
//!
//! A [`Decision`] names what in it makes no sense; each such value counts as none, and the rest is
//! taken as it is. Of two that exclude each other the safer one is taken: to refuse, then a person,
//! then a stage. What becomes of the call is decided in step 2.

use serde_json::Value;

use crate::parties::n8n::reply::{N8nReply, n8n_refusal, understand_reply};
use crate::setup::agent::Agent;
use crate::toolbox::failure::Failure;
use crate::toolbox::text::cut;

/// A greeting. A longer one is a mistake in the workflow, and the default is used.
pub(crate) const GREETING_CHARS_MAX: usize = 2_000;
/// Facts for the prompts. What is longer is cut: a prompt has to leave room for the conversation.
const FACTS_CHARS_MAX: usize = 4_000;
/// An odd value, where it is named.
const QUOTED_CHARS_MAX: usize = 40;

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Decision {
    /// None: n8n leaves it to the agent.
    pub(crate) first_message: Option<String>,
    /// One of the agent's. None: n8n leaves it to the agent's file.
    pub(crate) stage: Option<String>,
    /// For the placeholder `{facts}`.
    pub(crate) facts: String,
    /// To a person at once.
    pub(crate) transfer: bool,
    pub(crate) refuse: bool,
    /// What counts as none, or was cut, and why.
    pub(crate) oddities: Vec<String>,
}

/// An error if there is neither a first message nor anything else that decides.
pub(crate) fn read_decision(reply: &N8nReply, agent: &Agent) -> Result<Decision, Failure> {
    const DECIDES: [&str; 4] = ["stage", "facts", "transfer", "refuse"];
    let body = reply.value().unwrap_or_default();
    let fields = body.get(0).unwrap_or(&body);
    let decides = DECIDES.iter().any(|key| fields.get(key).is_some());
    let mut decision = Decision::default();
    match read_first_message(reply, fields) {
        Ok(text) => decision.greet_with(text),
        Err(failure) if !decides || n8n_refusal(reply).is_some() => return Err(failure),
        Err(_) if fields.get("firstMessage").is_none() => {}
        Err(failure) => decision.oddities.push(failure.to_string()),
    }
    decision.refuse = decision.flag(fields, "refuse");
    decision.transfer = decision.flag(fields, "transfer");
    decision.stage = decision.text(fields, "stage");
    decision.facts = decision.text(fields, "facts").unwrap_or_default();
    decision.shorten_facts();
    decision.know_stage(agent);
    decision.take_the_safest();
    Ok(decision)
}

/// `null` is an answer too: nothing is known about this caller, so that the agent's own first
/// message need not be repeated in n8n.
fn read_first_message(reply: &N8nReply, fields: &Value) -> Result<Option<String>, Failure> {
    if n8n_refusal(reply).is_none() && fields.get("firstMessage").is_some_and(Value::is_null) {
        return Ok(None);
    }
    understand_reply(reply, "firstMessage").map(Some)
}

impl Decision {
    fn greet_with(&mut self, text: Option<String>) {
        let length = text.as_ref().map_or(0, |text| text.chars().count());
        if length > GREETING_CHARS_MAX {
            let most = GREETING_CHARS_MAX;
            self.oddities.push(format!(
                "firstMessage has {length} characters, which is more than {most} characters"
            ));
        } else {
            self.first_message = text;
        }
    }

    fn flag(&mut self, fields: &Value, key: &str) -> bool {
        match fields.get(key) {
            None | Some(Value::Null) => false,
            Some(Value::Bool(flag)) => *flag,
            Some(odd) => {
                self.is_odd(key, odd, "neither true nor false");
                false
            }
        }
    }

    fn text(&mut self, fields: &Value, key: &str) -> Option<String> {
        match fields.get(key) {
            None | Some(Value::Null) => None,
            Some(Value::String(text)) => Some(text.trim().to_owned()).filter(|it| !it.is_empty()),
            Some(odd) => {
                self.is_odd(key, odd, "no text");
                None
            }
        }
    }

    fn is_odd(&mut self, key: &str, value: &Value, what: &str) {
        let value = cut(&value.to_string(), QUOTED_CHARS_MAX);
        self.oddities.push(format!("{key} is {value}, which is {what}"));
    }

    fn shorten_facts(&mut self) {
        let length = self.facts.chars().count();
        if length > FACTS_CHARS_MAX {
            self.facts = cut(&self.facts, FACTS_CHARS_MAX);
            let most = FACTS_CHARS_MAX;
            self.oddities.push(format!("facts has {length} characters and is cut to {most}"));
        }
    }

    fn know_stage(&mut self, agent: &Agent) {
        if let Some(stage) = self.stage.take_if(|stage| !agent.stages.contains_key(stage)) {
            let stage = cut(&stage, QUOTED_CHARS_MAX);
            self.oddities.push(format!("the agent has no stage {stage:?}"));
        }
    }

    fn take_the_safest(&mut self) {
        let wanted = [("refuse", self.refuse), ("transfer", self.transfer)];
        let Some((taken, _)) = wanted.iter().find(|(_, is_wanted)| *is_wanted) else { return };
        let too_much = [
            ("transfer", *taken == "refuse" && std::mem::take(&mut self.transfer)),
            ("stage", self.stage.take().is_some()),
        ];
        for (key, _) in too_much.iter().filter(|(_, is_too_much)| *is_too_much) {
            self.oddities.push(format!("{key} counts for nothing beside {taken}"));
        }
    }
}

#[cfg(test)]
mod tests;
