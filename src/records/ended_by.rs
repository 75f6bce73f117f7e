//! How a call ended.
//!
//! Every end has a name, and it is the same word everywhere: in the log, in the journal
//! (`endedBy`), at n8n, in the metrics and on the live page. Others depend on these words, so a
//! variant keeps its name. They are written with [`Display`](std::fmt::Display).

use std::fmt;

use serde::{Deserialize, Serialize};

/// How a call ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub(crate) enum EndedBy {
    /// There was nobody to answer: Ultravox refused, or could not be reached.
    NoAgent,
    /// The caller went away while it rang, Twilio never opened the stream, or nobody has picked up.
    NeverStreamed,
    CallerLeft,
    /// The caller's socket broke, or fell silent.
    CallerLost,
    /// The agent said goodbye and used its hang-up tool.
    AgentHungUp,
    /// Ultravox closed in an orderly way: nobody spoke for long, or its time limit.
    AgentLeft,
    /// Ultravox's socket broke.
    AgentLost,
    /// `MAX_CALL_SECONDS`.
    TooLong,
    /// The caller was put through to a person, who took the call.
    Transferred,
    /// An answering machine has picked up our call.
    Machine,
    /// n8n did not want it to be answered.
    Refused,
    /// This process was told to stop, and the call did not end by itself in time.
    ShuttingDown,
    /// The process that carried it died, and nobody took the call up again. Stands as well for a
    /// word in a journal that only a later version knows.
    #[default]
    ProcessDied,
}

impl EndedBy {
    #[cfg(test)]
    pub(crate) const ALL: [EndedBy; 13] = [
        EndedBy::NoAgent,
        EndedBy::NeverStreamed,
        EndedBy::CallerLeft,
        EndedBy::CallerLost,
        EndedBy::AgentHungUp,
        EndedBy::AgentLeft,
        EndedBy::AgentLost,
        EndedBy::TooLong,
        EndedBy::Transferred,
        EndedBy::Machine,
        EndedBy::Refused,
        EndedBy::ShuttingDown,
        EndedBy::ProcessDied,
    ];
}

impl EndedBy {
    /// Something went wrong: the caller had no conversation, or lost it.
    pub(crate) fn is_failure(self) -> bool {
        match self {
            EndedBy::NoAgent
            | EndedBy::NeverStreamed
            | EndedBy::CallerLost
            | EndedBy::AgentLost
            | EndedBy::ShuttingDown
            | EndedBy::ProcessDied => true,
            EndedBy::CallerLeft
            | EndedBy::AgentHungUp
            | EndedBy::AgentLeft
            | EndedBy::TooLong
            | EndedBy::Transferred
            | EndedBy::Machine
            | EndedBy::Refused => false,
        }
    }
}

impl fmt::Display for EndedBy {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
