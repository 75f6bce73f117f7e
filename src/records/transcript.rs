//! What was said in a call, put together from the pieces in which it arrives.
//!
//! Ultravox sends an utterance in several messages ([`Heard`]): its words so far, more words, and
//! at last the whole. A [`Transcript`] keeps them by agent, ordinal and speaker, whatever the
//! order, and gives them back in three shapes: as text for n8n, as history for an agent that takes
//! over, and one by one for the journal, which tells the same when it is read back.
//!
//! It never holds more than [`TRANSCRIPT_BYTES_MAX`], and it leaves out what nobody has said.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::records::event::lenient;

/// What is remembered of one call's words. More is not speech, and is not kept.
pub(crate) const TRANSCRIPT_BYTES_MAX: usize = 1_024 * 1_024;

/// How the texts begin that are put into the caller's mouth: by Ultravox when a call begins, and by
/// us when one goes on (`INTERRUPTED` and `NOBODY_ANSWERED`). Journals of older versions hold them.
const NOT_SAID: [&str; 3] = [
    "(New Call)",
    "(The line was interrupted for a moment and is back.",
    "(The caller was to be put through to a person, but nobody answered.",
];

/// A transcript message of Ultravox's.
#[derive(Debug)]
pub(crate) struct Heard {
    pub(crate) speaker: Speaker,
    pub(crate) ordinal: u64,
    pub(crate) text: Option<String>,
    pub(crate) delta: Option<String>,
    pub(crate) finished: bool,
    /// Typed, not spoken: an echo of our own `user_text_message`.
    pub(crate) typed: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub(crate) enum Speaker {
    Agent,
    #[default]
    User,
}

impl Heard {
    pub(crate) fn parse(message: &Value) -> Option<Heard> {
        let speaker = match message["role"].as_str()? {
            "agent" => Speaker::Agent,
            "user" => Speaker::User,
            _ => return None,
        };
        let text = |key: &str| message[key].as_str().map(str::to_owned);
        Some(Heard {
            speaker,
            ordinal: message["ordinal"].as_u64()?,
            text: text("text"),
            delta: text("delta"),
            finished: message["final"].as_bool().unwrap_or(false),
            typed: message["medium"].as_str() == Some("text"),
        })
    }
}

/// One utterance, as far as it is known.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Utterance {
    /// Which agent of the call, from 1: each counts its ordinals from 0.
    #[serde(default, deserialize_with = "lenient")]
    pub(crate) agent: u64,
    #[serde(default, deserialize_with = "lenient")]
    pub(crate) ordinal: u64,
    #[serde(default, deserialize_with = "lenient")]
    pub(crate) speaker: Speaker,
    #[serde(default, deserialize_with = "lenient")]
    pub(crate) text: String,
    /// What is read from a journal is.
    #[serde(skip, default = "yes")]
    pub(crate) finished: bool,
}

fn yes() -> bool {
    true
}

impl Utterance {
    /// In one line. None: there are none, or they were put into the caller's mouth.
    fn words(&self) -> Option<String> {
        let words = self.text.split_whitespace().collect::<Vec<_>>().join(" ");
        let injected = NOT_SAID.iter().any(|beginning| words.starts_with(beginning));
        let injected = injected && self.speaker == Speaker::User;
        (!words.is_empty() && !injected).then_some(words)
    }
}

/// What was said, by agent and ordinal.
#[derive(Default)]
pub(crate) struct Transcript {
    utterances: Vec<Utterance>,
    bytes: usize,
}

impl Transcript {
    /// `text` replaces what was there (an interrupted sentence gets shorter), `delta` adds to it.
    /// Gives the utterance once it is finished: for the journal.
    pub(crate) fn hear(&mut self, agent: u64, heard: &Heard) -> Option<&Utterance> {
        self.bytes += heard.text.as_ref().or(heard.delta.as_ref()).map_or(0, String::len) + 1;
        let injected = heard.typed && heard.speaker == Speaker::User;
        if injected || self.bytes > TRANSCRIPT_BYTES_MAX {
            return None;
        }
        let (ordinal, speaker) = (heard.ordinal, heard.speaker);
        let key = (agent, ordinal, speaker);
        let known = |one: &Utterance| (one.agent, one.ordinal, one.speaker) == key;
        let at = self.utterances.iter().rposition(known).unwrap_or_else(|| {
            // Empty ones take memory too.
            self.bytes += size_of::<Utterance>();
            let text = String::new();
            self.utterances.push(Utterance { agent, ordinal, speaker, text, finished: false });
            self.utterances.len() - 1
        });
        let utterance = self.utterances.get_mut(at)?;
        if utterance.finished {
            // It goes into the journal once more, as a whole.
            self.bytes += utterance.text.len();
        }
        if let Some(text) = &heard.text {
            utterance.text.clone_from(text);
        } else if let Some(delta) = &heard.delta {
            utterance.text.push_str(delta);
        }
        utterance.finished |= heard.finished;
        utterance.finished.then_some(&*utterance)
    }

    /// From a journal. Of those with the same agent, ordinal and speaker the last one counts.
    pub(crate) fn remember(&mut self, said: Utterance) {
        let Utterance { agent, ordinal, speaker, text, finished } = said;
        let text = Some(text);
        self.hear(agent, &Heard { speaker, ordinal, text, delta: None, finished, typed: false });
    }

    /// Nothing more will come. Gives those that were not finished until now.
    pub(crate) fn finish(&mut self) -> impl Iterator<Item = &Utterance> {
        self.utterances.iter_mut().filter(|one| !one.finished).map(|one| {
            one.finished = true;
            &*one
        })
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// As they came, also those of which nobody would say that they were said.
    pub(crate) fn utterances(&self) -> &[Utterance] {
        &self.utterances
    }

    /// How many were said.
    pub(crate) fn count(&self) -> usize {
        self.utterances.iter().filter(|one| one.words().is_some()).count()
    }

    /// `Agent: …` and `User: …`, one line each.
    pub(crate) fn text(&self) -> String {
        let lines = self.in_order().map(|(speaker, words)| format!("{speaker:?}: {words}"));
        lines.collect::<Vec<_>>().join(
            "
",
        )
    }

    /// As history for an agent that goes on (`initialMessages`).
    pub(crate) fn as_messages(&self) -> Value {
        let messages = self.in_order().map(|(speaker, words)| match speaker {
            Speaker::Agent => json!({"role": "MESSAGE_ROLE_AGENT", "text": words}),
            Speaker::User => json!({"role": "MESSAGE_ROLE_USER", "text": words}),
        });
        messages.collect()
    }

    pub(crate) fn in_order(&self) -> impl Iterator<Item = (Speaker, String)> {
        let mut all: Vec<&Utterance> = self.utterances.iter().collect();
        all.sort_by_key(|one| (one.agent, one.ordinal));
        all.into_iter().filter_map(|one| Some((one.speaker, one.words()?)))
    }
}

#[cfg(test)]
mod tests;
