//! What was said.

use serde_json::{Value, json};

/// What is remembered of one call's words. More is not speech, and is not kept.
pub(crate) const TRANSCRIPT_BYTES_MAX: usize = 1_024 * 1_024;
/// What a new agent is told that takes over from one whose line broke.
pub(crate) const LINE_BROKE: &str = "(The line was interrupted for a moment and is back. Say so briefly, \
    do not greet again, and go on exactly where the conversation was.)";

/// What it is told when a transfer came to nothing.
pub(crate) const NOBODY_ANSWERED: &str = "(The caller was to be put through to a person, but nobody answered. \
    Tell them so, apologise, do not greet again, and offer to help or to take a note.)";

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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Speaker {
    Agent,
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
pub(crate) struct Line {
    /// Which agent of the call, from 1: each counts its ordinals from 0.
    pub(crate) agent: u64,
    pub(crate) ordinal: u64,
    pub(crate) speaker: Speaker,
    pub(crate) text: String,
    pub(crate) finished: bool,
}

impl Line {
    /// The journal's line for it. The last one for an agent, ordinal and speaker counts.
    pub(crate) fn event(&self) -> Value {
        let mut event = self.as_json();
        event["event"] = json!("said");
        event
    }

    pub(crate) fn as_json(&self) -> Value {
        json!({
            "agent": self.agent,
            "ordinal": self.ordinal,
            "speaker": format!("{:?}", self.speaker),
            "text": self.text,
        })
    }

    /// On one line. Ultravox itself puts "(New Call) Respond as if …" into the caller's mouth, and
    /// we a word in brackets into that of a call that goes on: that is nothing anybody said.
    pub(crate) fn words(&self) -> Option<String> {
        let words = self.text.split_whitespace().collect::<Vec<_>>().join(" ");
        let injected =
            words.starts_with("(New Call)") || [LINE_BROKE, NOBODY_ANSWERED].contains(&&*words);
        let injected = injected && self.speaker == Speaker::User;
        (!words.is_empty() && !injected).then_some(words)
    }
}

/// What was said, by agent and ordinal.
#[derive(Default)]
pub(crate) struct Transcript {
    pub(crate) lines: Vec<Line>,
    pub(crate) bytes: usize,
}

impl Transcript {
    /// `text` replaces what was there (an interrupted sentence gets shorter), `delta` adds to it.
    pub(crate) fn hear(&mut self, agent: u64, heard: &Heard) -> Option<&Line> {
        self.bytes += heard.text.as_ref().or(heard.delta.as_ref()).map_or(0, String::len) + 1;
        let injected = heard.typed && heard.speaker == Speaker::User;
        if injected || self.bytes > TRANSCRIPT_BYTES_MAX {
            return None;
        }
        let (ordinal, speaker) = (heard.ordinal, heard.speaker);
        let key = (agent, ordinal, speaker);
        let known = |line: &Line| (line.agent, line.ordinal, line.speaker) == key;
        let at = self.lines.iter().rposition(known).unwrap_or_else(|| {
            // Empty lines take memory too.
            self.bytes += size_of::<Line>();
            self.lines.push(Line { agent, ordinal, speaker, text: String::new(), finished: false });
            self.lines.len() - 1
        });
        let line = self.lines.get_mut(at)?;
        if line.finished {
            // It goes into the journal once more, as a whole.
            self.bytes += line.text.len();
        }
        if let Some(text) = &heard.text {
            line.text.clone_from(text);
        } else if let Some(delta) = &heard.delta {
            line.text.push_str(delta);
        }
        line.finished |= heard.finished;
        line.finished.then_some(&*line)
    }

    /// How many utterances it has.
    pub(crate) fn count(&self) -> usize {
        self.lines.iter().filter(|line| line.words().is_some()).count()
    }

    pub(crate) fn in_order(&self) -> impl Iterator<Item = (Speaker, String)> {
        let mut lines: Vec<&Line> = self.lines.iter().collect();
        lines.sort_by_key(|line| (line.agent, line.ordinal));
        lines.into_iter().filter_map(|line| Some((line.speaker, line.words()?)))
    }

    /// `Agent: …` and `User: …`, one line an utterance.
    pub(crate) fn text(&self) -> String {
        let lines = self.in_order().map(|(speaker, words)| format!("{speaker:?}: {words}"));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// As history for an agent that goes on (`initialMessages`).
    pub(crate) fn as_messages(&self) -> Value {
        let messages = self.in_order().map(|(speaker, words)| match speaker {
            Speaker::Agent => json!({"role": "MESSAGE_ROLE_AGENT", "text": words}),
            Speaker::User => json!({"role": "MESSAGE_ROLE_USER", "text": words}),
        });
        messages.collect()
    }
}

#[cfg(test)]
mod tests;
