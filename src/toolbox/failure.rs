//! Who failed, at what, why, and what to do about it, and texts that must not be seen.
//!
//! Whatever asks one of the three parties for something gives back a [`Failure`] if that went
//! wrong. It reads as one line, for the log, the journal and the page, and keeps what the caller's
//! next step depends on: whether the other side may have done it all the same.
//!
//! ```text
//! Ultravox: could not create the agent's call: 401 (check ULTRAVOX_API_KEY)
//! ```
//!
//! A [`Secret`] is in no such line: it prints as `***`, and whoever needs it has to `reveal` it.

use std::fmt::{self, Display};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Party {
    Twilio,
    Ultravox,
    N8n,
}

impl Party {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Party::Twilio => "Twilio",
            Party::Ultravox => "Ultravox",
            Party::N8n => "n8n",
        }
    }
}

/// Who failed, at what, why, and what to do about it, in one line.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) party: Party,
    pub(crate) what: String,
    pub(crate) advice: Option<&'static str>,
    pub(crate) source: Option<Box<dyn std::error::Error + Send + Sync>>,
    /// Nothing can have happened at the other end: it is safe to try again.
    pub(crate) certainly_not_done: bool,
    /// The request was understood and not wanted in this form.
    pub(crate) refused: bool,
}

impl Failure {
    pub(crate) fn new(party: Party, what: impl Into<String>) -> Failure {
        Failure {
            party,
            what: what.into(),
            advice: None,
            source: None,
            certainly_not_done: false,
            refused: false,
        }
    }

    pub(crate) fn advise(self, advice: &'static str) -> Failure {
        Failure { advice: Some(advice), ..self }
    }

    pub(crate) fn caused_by(
        self,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Failure {
        Failure { source: Some(Box::new(source)), ..self }
    }

    pub(crate) fn certainly_not_done(self) -> Failure {
        Failure { certainly_not_done: true, ..self }
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {}", self.party.name(), self.what)?;
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        match self.advice {
            Some(advice) => write!(f, " ({advice})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn std::error::Error + 'static))
    }
}

/// A text that must not be seen. Printing it shows `***`.
#[derive(Clone)]
pub(crate) struct Secret(pub(crate) String);

impl Secret {
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests;
