//! The first message of each kind, for the live page.

use crate::records::event::Event;
use crate::records::journal::WIRE_CHARS_MAX;
use crate::setup::settings::Config;
use crate::toolbox::failure::Party;
use crate::toolbox::log::Step;
use crate::toolbox::text::cut;

/// The kinds of messages of which a journal gets the first one, so that the page can show what
/// goes over the wire. Sound goes on its way first, and is shown then.
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
    pub(crate) fn event(self, config: &Config, text: &str) -> Event {
        let (step, way, party) = self.about();
        let text = cut(&config.hide_secrets(text.to_owned()), WIRE_CHARS_MAX);
        Event::Wire { step: step as u8, way: way.into(), with: party.name().into(), text }
    }

    /// Step, direction, and who is at the other end.
    pub(crate) fn about(self) -> (Step, &'static str, Party) {
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
