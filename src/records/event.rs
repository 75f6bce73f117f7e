//! What can stand in a journal: one enum, one event a line.
//!
//! Calls hand these to their [`Journal`](super::journal::Journal), which adds `at`, the time.
//! [`PastCall`](super::past::PastCall) reads them back, and the live page shows them as they are.
//! On disk an event is a JSON object with its name as `event` and its fields beside it:
//!
//! ```text
//! {"at":"2026-11-23T10:04:31.207Z","event":"stage","stage":"main_convo"}
//! ```
//!
//! A reader gets along with every journal there is: it skips events that it does not know, and a
//! field that is missing, or has a shape that only another version knows, is as good as empty.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::records::ended_by::EndedBy;
use crate::records::transcript::Utterance;

/// Who has called whom. The same word goes to the journal and to the page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Direction {
    /// Somebody our number.
    #[default]
    In,
    /// We somebody.
    Out,
    /// The owner us, with the phone in the live page.
    Browser,
}

/// The number before each is the step in which it happens.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "event", rename_all = "snake_case", rename_all_fields = "camelCase")]
pub(crate) enum Event {
    /// 1: we ring this person, who is to be greeted with this, or as usual.
    Ordered {
        #[serde(default, deserialize_with = "lenient")]
        call_sid: String,
        #[serde(default, deserialize_with = "lenient")]
        number: String,
        #[serde(default, deserialize_with = "lenient")]
        first_message: String,
    },
    /// 1: the call has come in, or the person we have called has picked up.
    Ring {
        #[serde(default, deserialize_with = "lenient")]
        call_sid: String,
        #[serde(default, deserialize_with = "lenient")]
        number: String,
        #[serde(default, deserialize_with = "lenient")]
        direction: Direction,
        /// The number that was called.
        #[serde(default, deserialize_with = "lenient")]
        to: String,
    },
    /// 2: `from` is `n8n`, `default` or `order`; `why` says why it is not n8n's.
    Greeting { from: String, ms: u64, why: String },
    /// 2: that the call does not just begin in the first stage. `what` is `agent`, `transfer` or
    /// `refuse`, `by` is `n8n`, `numbers` (of the agent's file) or `default`. Of an agent: where it
    /// begins, and what n8n knows for its prompts.
    Decided {
        #[serde(default, deserialize_with = "lenient")]
        what: String,
        #[serde(default, deserialize_with = "lenient")]
        by: String,
        #[serde(default, deserialize_with = "lenient")]
        stage: String,
        #[serde(default, deserialize_with = "lenient")]
        facts: String,
    },
    /// 3: `call_id` is Ultravox's; `agent` counts the agents of this call, from 1; `stage` is where
    /// it begins.
    Agent {
        #[serde(default, deserialize_with = "lenient")]
        call_id: String,
        #[serde(default, deserialize_with = "lenient")]
        agent: u64,
        #[serde(default, deserialize_with = "lenient")]
        stage: String,
    },
    /// 4: `what` is `stream`, `apology`, `transfer` or `hangup`; `ms` is since the ring.
    Answer { what: String, ms: u64 },
    /// 5: once more for each further stream.
    Stream { stream_sid: String },
    /// 6: `ms` is from the stream's start to the agent's first sound.
    FirstWord { ms: u64 },
    /// 6: of the same agent, ordinal and speaker the last one counts.
    Said(Utterance),
    /// 6: from the caller's last loud frame to the agent's next sound.
    Turn { ms: u64 },
    /// 7: a tool that takes its time.
    ToolBegins(ToolAsked),
    /// 7: `result` is what the agent was told.
    Tool {
        #[serde(flatten)]
        asked: ToolAsked,
        result: String,
        outcome: String,
        ms: u64,
    },
    /// 7: the stage that has been entered.
    Stage {
        #[serde(default, deserialize_with = "lenient")]
        stage: String,
    },
    /// Any step: what did not work in it, in the words of the log. `id` is a tool's invocation.
    Failed {
        #[serde(default, deserialize_with = "lenient")]
        step: u8,
        #[serde(default, deserialize_with = "lenient")]
        why: String,
        #[serde(default, deserialize_with = "lenient", skip_serializing_if = "String::is_empty")]
        id: String,
    },
    /// Whenever Twilio reports it.
    Status { status: String, answered_by: String },
    /// 8: `ms` is since the ring.
    Goodbye {
        #[serde(default, deserialize_with = "lenient")]
        ended_by: EndedBy,
        ms: u64,
    },
    /// 8: the caller is being put through to a person, and may come back.
    Transfer(Transfer),
    /// 8: that person has said that they take the call.
    Accepted,
    /// 9: nothing more will come of this call.
    End {
        #[serde(deserialize_with = "lenient")]
        ended_by: EndedBy,
    },
    /// 9: what Ultravox says of the call. Empty or missing: nothing, or nothing yet.
    Summary {
        #[serde(default, deserialize_with = "lenient")]
        text: String,
        #[serde(default, deserialize_with = "lenient")]
        billed_seconds: Option<u64>,
    },
    /// 9: n8n did not take the transcript.
    Undelivered {
        #[serde(default, deserialize_with = "lenient")]
        why: String,
    },
    /// 9: n8n has it, or there was nothing to deliver.
    Delivered,
    /// Any step: the first message of a kind. `way` is `in` or `out`.
    Wire { step: u8, way: String, with: String, text: String },
}

/// What the agent wants done.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct ToolAsked {
    pub(crate) id: String,
    pub(crate) tool: String,
    /// In which the agent was when it asked.
    pub(crate) stage: String,
    pub(crate) arguments: Value,
}

/// Whom a caller is put through to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub(crate) struct Transfer {
    /// Among the agent's `people`. Empty: only the number is known.
    #[serde(default, deserialize_with = "lenient")]
    pub(crate) person: String,
    #[serde(default, deserialize_with = "lenient")]
    pub(crate) number: String,
    /// What the agent has to tell them: who calls, and why.
    #[serde(default, deserialize_with = "lenient")]
    pub(crate) reason: String,
}

/// Safe because serde has read all fields of an event by the time it looks at one.
#[expect(clippy::unnecessary_wraps, reason = "serde wants a result")]
pub(super) fn lenient<'de, D, T>(field: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(T::deserialize(field).unwrap_or_default())
}

#[cfg(test)]
mod tests;
