//! What is told of a call beside its transcript: the report that n8n gets with it (route 2).
//!
//! A [`Report`] is fed with events: by the [journal](super::journal) of a call in progress as they
//! are noted, and by [`PastCall`](super::past::PastCall) when a journal is read back. So a call
//! that is filed at its end and one that is filed after a restart are told in the same way, and the
//! page says the same as n8n. It holds a bounded number of lines, however long a call was.
//!
//! ```text
//! {"to":"+442079460000","direction":"in","seconds":73,"stages":["greeting","main_convo"], …}
//! ```

use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::records::event::{Direction, Event, ToolAsked};

/// Tools in one report. Further ones are in the journal only.
const TOOLS_MAX: usize = 100;
/// Stages in one report: an agent that goes to and fro is not to fill the memory.
const STAGES_MAX: usize = 100;
/// Turns that the median is of: those of four hours.
const TURNS_MAX: usize = 2_000;

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Report {
    to: String,
    direction: Direction,
    /// From the ring to the end, once there is one.
    lasted: Option<Duration>,
    stages: Vec<String>,
    tools: Vec<ToolDone>,
    ultravox_call_id: String,
    turns_ms: Vec<u64>,
    longest_turn_ms: Option<u64>,
    summary: String,
    billed_seconds: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct ToolDone {
    tool: String,
    arguments: Value,
    result: String,
    outcome: String,
}

impl Report {
    pub(crate) fn apply(&mut self, event: &Event) {
        match event {
            Event::Ring { to, direction, .. } => {
                self.to.clone_from(to);
                self.direction = *direction;
            }
            // All there is, if the process died while it rang.
            Event::Ordered { number, .. } => {
                self.to.clone_from(number);
                self.direction = Direction::Out;
            }
            Event::Agent { call_id, stage, .. } => {
                self.ultravox_call_id.clone_from(call_id);
                self.enters(stage);
                // Ended or not, it goes on.
                self.lasted = None;
                self.summary.clear();
                self.billed_seconds = None;
            }
            Event::Stage { stage } => self.enters(stage),
            Event::Turn { ms } => {
                self.longest_turn_ms = self.longest_turn_ms.max(Some(*ms));
                if self.turns_ms.len() < TURNS_MAX {
                    self.turns_ms.push(*ms);
                }
            }
            Event::Tool { asked: ToolAsked { tool, arguments, .. }, result, outcome, .. }
                if self.tools.len() < TOOLS_MAX =>
            {
                self.tools.push(ToolDone {
                    tool: tool.clone(),
                    arguments: arguments.clone(),
                    result: result.clone(),
                    outcome: outcome.clone(),
                });
            }
            Event::Goodbye { ms, .. } => self.lasted = Some(Duration::from_millis(*ms)),
            Event::Summary { text, billed_seconds } => {
                self.summary.clone_from(text);
                self.billed_seconds = *billed_seconds;
            }
            _ => {}
        }
    }

    /// A new agent in the stage of the one before has not entered it.
    fn enters(&mut self, stage: &str) {
        let is_news = !stage.is_empty() && self.stages.last().is_none_or(|last| last != stage);
        if is_news && self.stages.len() < STAGES_MAX {
            self.stages.push(stage.to_owned());
        }
    }

    /// For a call whose process died before it could say how long it was.
    pub(super) fn lasted_until(&mut self, last_event: Duration) {
        self.lasted.get_or_insert(last_event);
    }

    pub(crate) fn to(&self) -> &str {
        &self.to
    }

    /// The latest: of a call that was resumed there are several.
    pub(crate) fn ultravox_call_id(&self) -> &str {
        &self.ultravox_call_id
    }

    /// Nothing that Ultravox could add to it.
    pub(super) fn is_complete(&self) -> bool {
        !self.summary.is_empty() && self.billed_seconds.is_some()
    }

    /// As it goes to n8n and to the page. What is not known is `null`.
    pub(crate) fn fields(&self) -> Map<String, Value> {
        let known = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let fields = json!({
            "to": known(&self.to),
            "direction": self.direction,
            "seconds": self.lasted.map(|lasted| lasted.as_secs()),
            "stages": self.stages,
            "tools": self.tools,
            "ultravoxCallId": known(&self.ultravox_call_id),
            "medianTurnMs": median(self.turns_ms.clone()),
            "longestTurnMs": self.longest_turn_ms,
            "summary": known(&self.summary),
            "billedSeconds": self.billed_seconds,
        });
        match fields {
            Value::Object(fields) => fields,
            _ => Map::new(),
        }
    }
}

/// The lower one of the two in the middle.
fn median(mut all: Vec<u64>) -> Option<u64> {
    all.sort_unstable();
    all.get(all.len().saturating_sub(1) / 2).copied()
}

#[cfg(test)]
mod tests;
