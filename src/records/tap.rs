//! The tap: what goes over the wire in a call, for the live page.
//!
//! The legs of a call and the questions to n8n and Ultravox show each message to the call's
//! [`Tap`]. Of each kind the first one is written into the journal, short and without secrets, and
//! the page shows it beside the step it belongs to. For every further message a tap is one look at
//! a number, so nothing on the way of sound is slower for it. What is sent is shown once it is on
//! its way.
//!
//! ```text
//! tap.show(Exhibit::Clear, || clear.to_string());
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};

use crate::records::event::Event;
use crate::records::journal::{Journal, WIRE_CHARS_MAX};
use crate::setup::settings::Config;
use crate::toolbox::failure::Party;
use crate::toolbox::log::Step;
use crate::toolbox::text::cut;

/// Writes the first message of each kind into a journal, or nothing anywhere.
pub(crate) struct Tap {
    /// A bit for each [`Exhibit`] that the journal has.
    shown: AtomicU64,
    into: Option<(Journal, Arc<Config>)>,
}

impl Tap {
    /// `config` knows the secrets that are not to be shown.
    pub(crate) fn new(journal: Journal, config: Arc<Config>) -> Tap {
        Tap { shown: AtomicU64::new(0), into: Some((journal, config)) }
    }

    /// For messages that belong to no call.
    pub(crate) fn closed() -> Tap {
        Tap { shown: AtomicU64::new(0), into: None }
    }

    /// `text` is asked for once at most.
    pub(crate) fn show(&self, exhibit: Exhibit, text: impl FnOnce() -> String) {
        let bit = 1 << exhibit as u8;
        if self.has_shown(exhibit) || self.shown.fetch_or(bit, Ordering::Relaxed) & bit != 0 {
            return;
        }
        let Some((journal, config)) = &self.into else { return };
        let (step, way, party) = exhibit.about();
        let text = cut(&config.hide_secrets(text()), WIRE_CHARS_MAX);
        let (way, with) = (way.to_owned(), party.name().to_owned());
        journal.note(&Event::Wire { step: step as u8, way, with, text });
    }

    pub(crate) fn has_shown(&self, exhibit: Exhibit) -> bool {
        self.shown.load(Ordering::Relaxed) & (1 << exhibit as u8) != 0
    }
}

/// The kinds of messages of which a journal gets the first one.
#[derive(Clone, Copy)]
pub(crate) enum Exhibit {
    Ring,
    Lookup,
    LookedUp,
    Create,
    Created,
    Answer,
    Start,
    CallerFrame,
    CallerPcm,
    AgentPcm,
    AgentFrame,
    State,
    Transcript,
    ClearBuffer,
    Clear,
    Key,
    Keys,
    Invocation,
    ToolQuestion,
    ToolReply,
    Result,
    Mark,
    MarkBack,
    Stop,
    StreamEnded,
    NextStream,
    Filing,
    Taken,
}

impl Exhibit {
    /// Step, direction, and who is at the other end.
    fn about(self) -> (Step, &'static str, Party) {
        match self {
            Exhibit::Ring => (Step::Ring, "in", Party::Twilio),
            Exhibit::Lookup => (Step::Greeting, "out", Party::N8n),
            Exhibit::LookedUp => (Step::Greeting, "in", Party::N8n),
            Exhibit::Create => (Step::Agent, "out", Party::Ultravox),
            Exhibit::Created => (Step::Agent, "in", Party::Ultravox),
            Exhibit::Answer => (Step::Answer, "out", Party::Twilio),
            Exhibit::Start => (Step::Stream, "in", Party::Twilio),
            Exhibit::CallerFrame | Exhibit::Key => (Step::Talk, "in", Party::Twilio),
            Exhibit::AgentFrame | Exhibit::Clear => (Step::Talk, "out", Party::Twilio),
            Exhibit::CallerPcm | Exhibit::Keys => (Step::Talk, "out", Party::Ultravox),
            Exhibit::AgentPcm | Exhibit::State | Exhibit::Transcript | Exhibit::ClearBuffer => {
                (Step::Talk, "in", Party::Ultravox)
            }
            Exhibit::Invocation => (Step::Act, "in", Party::Ultravox),
            Exhibit::ToolQuestion => (Step::Act, "out", Party::N8n),
            Exhibit::ToolReply => (Step::Act, "in", Party::N8n),
            Exhibit::Result => (Step::Act, "out", Party::Ultravox),
            Exhibit::Mark | Exhibit::NextStream => (Step::Goodbye, "out", Party::Twilio),
            Exhibit::MarkBack | Exhibit::Stop | Exhibit::StreamEnded => {
                (Step::Goodbye, "in", Party::Twilio)
            }
            Exhibit::Filing => (Step::After, "out", Party::N8n),
            Exhibit::Taken => (Step::After, "in", Party::N8n),
        }
    }
}

/// A message with one of its fields made unreadable.
pub(crate) fn hidden(text: &str, field: &str) -> String {
    let mut message: Value = serde_json::from_str(text).unwrap_or_default();
    if let Some(value) = message.pointer_mut(field) {
        *value = json!("***");
    }
    message.to_string()
}
