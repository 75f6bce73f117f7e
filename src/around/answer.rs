//! The answer of steps 4 and 8, put into words: as `TwiML` for Twilio, for the page, for the
//! journal.
//!
//! What is answered is decided in the story; here stands only how it is written. The addresses in
//! it lead back to this very process, also where there are several copies.

use crate::parties::twilio::twiml;
use crate::{Answer, Bridge};

impl Answer {
    pub(crate) fn twiml(&self, bridge: &Bridge) -> String {
        let (config, agent) = (&bridge.config, bridge.agent.get());
        match self {
            Answer::Stream { token } => twiml::connect_stream(config.own_url(), token),
            Answer::Person(number) => twiml::say_and_dial(config.own_url(), &agent, number),
            Answer::Transfer(transfer) => twiml::transfer(config.own_url(), transfer),
            Answer::Sentence(sentence) => twiml::say_and_hang_up(&agent.language, sentence),
            Answer::Refuse => twiml::reject(),
            Answer::HangUp => twiml::hang_up(),
        }
    }

    /// As the page shows it: whoever knows the token may open the stream.
    pub(crate) fn redacted(&self, bridge: &Bridge) -> String {
        let hidden = Answer::Stream { token: "***".into() };
        if matches!(self, Answer::Stream { .. }) { &hidden } else { self }.twiml(bridge)
    }

    /// For the journal.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Answer::Stream { .. } => "stream",
            Answer::Person(_) | Answer::Transfer(_) => "transfer",
            Answer::Sentence(_) => "apology",
            Answer::Refuse => "refuse",
            Answer::HangUp => "hangup",
        }
    }
}
