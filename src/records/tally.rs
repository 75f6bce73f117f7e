//! What went wrong in a call, and how fast the agent answered: in sum, from the call's events.
//!
//! A [`Tally`] is fed with events: by the [journal](super::journal) of a call in progress as they
//! are noted, and by [`PastCall`](super::past::PastCall) when a journal is read back, so both say
//! the same. It holds a few lines however long a call was. Whether the transcript was delivered is
//! nothing of its: that is a fact of a call that has ended.

use std::collections::HashMap;

use serde::Serialize;

use crate::records::event::{Event, ToolAsked};
use crate::toolbox::text::cut;

/// Different things that went wrong in one call, a tool that failed twice counting once.
const FAILURES_MAX: usize = 20;
/// Of a reason, in the list. The journal has all of it.
const WHY_CHARS_MAX: usize = 300;
/// The last ones count.
const TURNS_MAX: usize = 500;

/// Something that did not work in a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Failed {
    pub(crate) step: u8,
    /// In step 7: whose failure it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tool: Option<String>,
    /// In the words of the log.
    pub(crate) why: String,
}

#[derive(Clone, Default)]
pub(crate) struct Tally {
    failed: Vec<Failed>,
    /// Reasons of tools whose outcome is not noted yet, by invocation.
    reasons: HashMap<String, String>,
    turns_ms: Vec<u64>,
    decided: Option<Decided>,
}

/// That the call does not just begin in the first stage, and who says so.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Decided {
    what: String,
    by: String,
}

impl Tally {
    pub(crate) fn apply(&mut self, event: &Event) {
        match event {
            Event::Failed { step, why, id } if id.is_empty() => self.add(*step, None, why),
            Event::Failed { why, id, .. } if self.reasons.len() < FAILURES_MAX => {
                self.reasons.insert(id.clone(), why.clone());
            }
            Event::Tool { asked: ToolAsked { id, tool, .. }, result, outcome, .. } => {
                let why = self.reasons.remove(id);
                if is_failure(outcome) {
                    self.add(7, Some(tool.clone()), &why.unwrap_or_else(|| result.clone()));
                }
            }
            Event::Turn { ms } => {
                if self.turns_ms.len() >= TURNS_MAX {
                    self.turns_ms.remove(0);
                }
                self.turns_ms.push(*ms);
            }
            Event::Decided { what, by, .. } => {
                self.decided = Some(Decided { what: what.clone(), by: by.clone() });
            }
            _ => {}
        }
    }

    fn add(&mut self, step: u8, tool: Option<String>, why: &str) {
        let why = cut(why, WHY_CHARS_MAX);
        let same = |one: &&mut Failed| (one.step, &one.tool) == (step, &tool);
        if let Some(known) = self.failed.iter_mut().find(same) {
            known.why = why;
        } else if self.failed.len() < FAILURES_MAX {
            self.failed.push(Failed { step, tool, why });
        }
    }

    pub(crate) fn failed(&self) -> &[Failed] {
        &self.failed
    }

    pub(crate) fn decided(&self) -> Option<&Decided> {
        self.decided.as_ref()
    }

    pub(crate) fn median_turn_ms(&self) -> Option<u64> {
        median(&mut self.turns_ms.clone())
    }
}

/// The lower one of the two in the middle.
pub(crate) fn median(all: &mut [u64]) -> Option<u64> {
    all.sort_unstable();
    all.get(all.len().saturating_sub(1) / 2).copied()
}

/// Not `incomplete`: the agent is told what is missing, and asks the caller for it.
fn is_failure(outcome: &str) -> bool {
    matches!(outcome, "failed" | "uncertain" | "refused" | "no such tool")
}

#[cfg(test)]
mod tests;
