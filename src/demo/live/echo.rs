//! The pretend agent that the page's phone reaches: it says back what it hears.
//!
//! It greets in a real voice, waits until the caller has spoken and is silent, and plays that back
//! after the words "You said". Who speaks meanwhile interrupts it. Keys are read out, and the hash
//! key ends the call as a real agent would: with the tool hangUp, a goodbye, and an orderly close.
//! So a person hears the relay work in both directions.
//!
//! It has no idea what was said: loud is speech, quiet is a pause.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::demo::agent_call::AgentCall;
use crate::demo::live::voice::{GOODBYE, GREETING, GREETING_WORDS, HEARD, pressed};
use crate::demo::sound::{FRAME_BYTES, FRAME_TIME, pcm_of};
use crate::demo::trouble::Trouble;

/// A frame in PCM.
const FRAME_PCM: usize = 2 * FRAME_BYTES;
/// The mean sample of a frame that somebody speaks in. A quiet room has some tens.
const LOUD: u32 = 400;
/// So many loud frames are speech: shorter ones are a click, or a breath.
const SPEECH_FRAMES: usize = 8;
/// Quiet for so long: it is the agent's turn.
const PAUSE_FRAMES: usize = 35;
/// Nobody wants to hear more of it again.
const SPEECH_FRAMES_MAX: usize = 500;
/// How often the agent looks whether it has finished speaking.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Until the line ends, whoever ends it.
pub(super) fn answer(agent: &AgentCall) -> Result<(), Trouble> {
    let now = Instant::now();
    let mut echo = Echo {
        agent,
        rest: Vec::new(),
        speech: Vec::new(),
        loud: 0,
        quiet: 0,
        turn: None,
        began: now,
        silent_from: now,
    };
    echo.say(GREETING_WORDS, &pcm_of(GREETING))?;
    while let Some((sound, texts)) = agent.hear(LOOK_EVERY) {
        echo.hear(&sound)?;
        for text in &texts {
            if text["type"] == "user_text_message" && !echo.read(text)? {
                return Ok(());
            }
        }
        echo.finish_if_played()?;
    }
    Ok(())
}

struct Echo<'a> {
    agent: &'a AgentCall,
    /// Less than a frame.
    rest: Vec<u8>,
    /// What the caller has said since the agent's last turn, with a pause behind it.
    speech: Vec<u8>,
    loud: usize,
    quiet: usize,
    /// What the agent is saying.
    turn: Option<(u64, String)>,
    began: Instant,
    /// When all that was said has been played.
    silent_from: Instant,
}

impl Echo<'_> {
    /// All sound goes out at once, as the real one sends it; the caller hears it in real time.
    fn say(&mut self, text: &str, pcm: &[u8]) -> Result<(), Trouble> {
        self.finish(1.0)?;
        let ordinal = self.agent.begin_saying(text, pcm)?;
        let frames = u32::try_from(pcm.len() / FRAME_PCM).unwrap_or(u32::MAX);
        self.began = Instant::now();
        self.silent_from = self.began + FRAME_TIME * frames;
        self.turn = Some((ordinal, text.to_owned()));
        Ok(())
    }

    fn hear(&mut self, sound: &[u8]) -> Result<(), Trouble> {
        self.rest.extend_from_slice(sound);
        let rest = self.rest.split_off(self.rest.len() / FRAME_PCM * FRAME_PCM);
        let frames = std::mem::replace(&mut self.rest, rest);
        for frame in frames.chunks(FRAME_PCM) {
            let is_loud = level(frame) > LOUD;
            if !is_loud && self.speech.is_empty() {
                continue;
            }
            self.speech.extend_from_slice(frame);
            self.loud += usize::from(is_loud);
            self.quiet = if is_loud { 0 } else { self.quiet + 1 };
            if self.loud >= SPEECH_FRAMES && self.turn.is_some() {
                self.is_interrupted()?;
            }
            let is_long = self.speech.len() >= SPEECH_FRAMES_MAX * FRAME_PCM;
            if self.quiet >= PAUSE_FRAMES || is_long {
                self.say_back()?;
            }
        }
        Ok(())
    }

    fn is_interrupted(&mut self) -> Result<(), Trouble> {
        self.agent.send(&json!({"type": "playback_clear_buffer"}))?;
        let whole = self.silent_from.saturating_duration_since(self.began);
        let heard = self.began.elapsed().as_secs_f64() / whole.as_secs_f64().max(0.1);
        self.finish(heard)
    }

    fn say_back(&mut self) -> Result<(), Trouble> {
        let mut speech = std::mem::take(&mut self.speech);
        let is_speech = self.loud >= SPEECH_FRAMES;
        speech.truncate(speech.len().saturating_sub(self.quiet * FRAME_PCM));
        (self.loud, self.quiet) = (0, 0);
        if !is_speech {
            return Ok(());
        }
        let tenths = speech.len() * 10 / (FRAME_PCM * 50);
        let words = format!("({}.{} seconds of your voice)", tenths / 10, tenths % 10);
        self.agent.user_said(&words)?;
        self.say(&format!("You said: {words}"), &[pcm_of(HEARD), speech].concat())
    }

    /// Keys come as if they had been said at once. False: the call is over.
    fn read(&mut self, text: &Value) -> Result<bool, Trouble> {
        let keys = text["text"].as_str().unwrap_or_default();
        if self.turn.is_some() {
            self.is_interrupted()?;
        }
        if !keys.contains('#') {
            self.say(&format!("You pressed: {keys}"), &pressed(keys))?;
            return Ok(true);
        }
        let invocation = self.agent.invoke("hangUp", &json!({"reason": "the hash key"}))?;
        self.agent.wait_result(&invocation)?;
        self.say("Thank you for calling. Goodbye.", &pcm_of(GOODBYE))?;
        self.finish(1.0)?;
        self.agent.close()?;
        Ok(false)
    }

    fn finish_if_played(&mut self) -> Result<(), Trouble> {
        if self.turn.is_some() && Instant::now() >= self.silent_from {
            self.finish(1.0)
        } else {
            Ok(())
        }
    }

    /// The text becomes final: as much of it as was heard.
    fn finish(&mut self, heard: f64) -> Result<(), Trouble> {
        let Some((ordinal, text)) = self.turn.take() else { return Ok(()) };
        let words: Vec<&str> = text.split(' ').collect();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "some words of a sentence"
        )]
        let count = (words.len() as f64 * heard).ceil() as usize;
        let heard = words.get(..count).unwrap_or(&words);
        self.agent.finish_saying(ordinal, &heard.join(" "))
    }
}

/// The mean of all samples, without their signs.
fn level(frame: &[u8]) -> u32 {
    let (samples, _) = frame.as_chunks::<2>();
    let sum: u32 =
        samples.iter().map(|sample| u32::from(i16::from_le_bytes(*sample).unsigned_abs())).sum();
    sum / u32::try_from(samples.len().max(1)).unwrap_or(u32::MAX)
}
