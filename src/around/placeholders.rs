//! What the placeholders in the agent's files stand for in one call.
//!
//! Prompts, first messages and the texts of tools may hold `{company_name}` and a few others; steps
//! 2, 3 and 7 have them filled in here, for the stage in which the call is. What comes from outside
//! and is no number must not talk to the model, so it becomes a word of ours. Which names there are
//! is checked when the files are read; an unknown one is left as it is.

use crate::Call;
use crate::toolbox::text::{fill, is_e164};
use crate::toolbox::threads::lock;

impl Call {
    /// What the agent says first if nobody knows better.
    pub(crate) fn default_greeting(&self) -> String {
        let stage = self.files.stages.get(&lock(&self.state).stage);
        let own = stage.and_then(|stage| stage.first_message.as_ref());
        fill(own.unwrap_or(&self.files.first_message), |name| self.placeholder(name))
    }

    /// What a placeholder stands for in this call's texts.
    pub(crate) fn placeholder(&self, name: &str) -> Option<String> {
        let agent = &self.files;
        match name {
            "agent_name" => {
                let stage = lock(&self.state).stage.clone();
                let own = agent.stages.get(&stage).and_then(|stage| stage.agent_name.clone());
                Some(own.unwrap_or_else(|| agent.name.clone()))
            }
            "company_name" => Some(agent.company.clone()),
            "now" => Some(jiff::Zoned::now().strftime("%A, %-d %B %Y, %H:%M (%Z)").to_string()),
            // A caller's "number" may be any text; what is not a number must not talk to the model.
            "caller_number" if is_e164(&self.number) => Some(self.number.clone()),
            "caller_number" => Some("withheld".into()),
            "facts" => Some(lock(&self.state).facts.clone()),
            _ => None,
        }
    }
}
