//! Whether the agent's files fit together: what names what, and whether it is there.
//!
//! The second half of [`Mistakes`], looked at when everything has been read: a stage that names no
//! tool, a tool that leads to no stage or person, a number that begins nowhere, a stage that nobody
//! enters. What stands in each entry by itself is `agent_files`' part.

use std::collections::{BTreeSet, HashSet};

use crate::setup::agent::{Agent, ToolAction, TransferTo, find};
use crate::setup::agent_files::Mistakes;
use crate::toolbox::text::is_e164;

impl Mistakes {
    pub(super) fn names_that_lead_nowhere(&mut self, agent: &Agent, tools: &BTreeSet<String>) {
        for (name, stage) in &agent.stages {
            for tool in stage.tools.iter().filter(|tool| !tools.contains(*tool)) {
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
        self.entries(agent);
    }

    /// Calendars, people and numbers, and where a call begins.
    fn entries(&mut self, agent: &Agent) {
        for (location, _) in agent.calendars.iter().filter(|(_, email)| !email.contains('@')) {
            self.add(format_args!("calendars.{location}"), "must be an e-mail address");
        }
        for (person, _) in agent.people.iter().filter(|(_, number)| !is_e164(number)) {
            self.add(format_args!("people.{person}"), "must be a number like +4930123456");
        }
        for (number, stage) in &agent.numbers {
            let place = format!("numbers.{number}");
            if !is_e164(number) {
                self.add(&place, "is no number such as +442079460000");
            }
            if !agent.stages.contains_key(stage) {
                self.add(&place, format_args!("begins in \"{stage}\", which is no stage"));
            }
        }
        let is_missing = agent.first_stage.is_empty() && self.is_partial;
        if !is_missing && !agent.stages.contains_key(&agent.first_stage) {
            self.add(
                "first_stage",
                format_args!("is \"{}\", which is no stage", agent.first_stage),
            );
        }
    }

    pub(super) fn stages_nobody_enters(&mut self, agent: &Agent) {
        let mut to_visit: Vec<&str> = agent.entries().into_iter().map(|(stage, _)| stage).collect();
        let mut reached: HashSet<&str> = to_visit.iter().copied().collect();
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
                "is entered by no tool of a stage that is entered, and no call begins in it",
            );
        }
    }
}
