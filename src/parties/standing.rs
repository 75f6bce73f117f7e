//! How each of the three parties was when we last had to do with it, and since when.
//!
//! The parties' rooms say what came of each use ([`after_use`]: a call created, a question
//! answered) and of each look that costs nothing ([`after_look`]: is it there at all?). A look that
//! goes well clears only what a look has found: an n8n that answers, but whose workflow fails, is
//! in trouble until the workflow does not. The live page shows it; nothing is decided by it, and
//! nobody is asked for its sake.

use std::sync::Mutex;

use jiff::Timestamp;

use crate::toolbox::failure::{Failure, Party};
use crate::toolbox::threads::lock;

/// What is known of one party. Nothing, until it has been met.
#[derive(Clone, Default)]
pub(crate) struct Standing {
    pub(crate) trouble: Option<Trouble>,
    /// When it got into trouble, or was well again.
    pub(crate) since: Option<Timestamp>,
    /// When it was last met.
    pub(crate) last: Option<Timestamp>,
}

#[derive(Clone)]
pub(crate) struct Trouble {
    /// In the words of the log.
    pub(crate) why: String,
    /// Even a look finds it.
    is_plain: bool,
}

static STANDINGS: [Mutex<Standing>; 3] = [const { Mutex::new(Standing::unknown()) }; 3];

impl Standing {
    const fn unknown() -> Standing {
        Standing { trouble: None, since: None, last: None }
    }

    pub(crate) fn of(party: Party) -> Standing {
        lock(&STANDINGS[party as usize]).clone()
    }

    fn note(&mut self, trouble: Option<Trouble>, at: Timestamp) {
        let is_news = self.last.is_none() || trouble.is_some() != self.trouble.is_some();
        if is_news {
            self.since = Some(at);
        }
        self.last = Some(at);
        self.trouble = trouble;
    }

    fn note_look(&mut self, trouble: Option<Trouble>, at: Timestamp) {
        if trouble.is_none() && self.trouble.as_ref().is_some_and(|trouble| !trouble.is_plain) {
            return;
        }
        self.note(trouble, at);
    }
}

/// It was asked for something that it is there for.
pub(crate) fn after_use<T>(party: Party, outcome: &Result<T, Failure>) {
    lock(&STANDINGS[party as usize]).note(trouble(outcome, false), Timestamp::now());
}

/// It was only asked whether it is there.
pub(crate) fn after_look<T>(party: Party, outcome: &Result<T, Failure>) {
    lock(&STANDINGS[party as usize]).note_look(trouble(outcome, true), Timestamp::now());
}

/// Twilio is the one that calls us. Without a signature it was somebody else.
pub(crate) fn twilio_has_called(signature: &str, is_right: bool) {
    let wrong = || {
        Failure::new(Party::Twilio, "the signature is wrong")
            .advise("check TWILIO_AUTH_TOKEN, and that PUBLIC_URL is the address Twilio calls")
    };
    if is_right || !signature.is_empty() {
        after_use(Party::Twilio, &if is_right { Ok(()) } else { Err(wrong()) });
    }
}

fn trouble<T>(outcome: &Result<T, Failure>, is_plain: bool) -> Option<Trouble> {
    outcome.as_ref().err().map(|failure| Trouble { why: failure.to_string(), is_plain })
}

#[cfg(test)]
mod tests;
