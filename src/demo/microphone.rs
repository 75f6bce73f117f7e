//! A caller with an open microphone: a frame every 20 ms, as a real phone sends it.
//!
//! [`Phone::keep_talking`](super::phone::Phone::keep_talking) opens it. Between words it sends
//! the quietest noise there is and not plain silence, which could not be told from the server's
//! own. It ends when it is dropped, or when the line ends.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use crate::demo::PATIENCE;
use crate::demo::backstage::{Board, moot, spawn};
use crate::demo::phone::PhoneLine;
use crate::demo::server::ChildLog;
use crate::demo::sound::{FRAME_BYTES, FRAME_TIME, SAMPLE_TIME};
use crate::demo::trouble::Trouble;

/// A caller with an open microphone: one frame every 20 ms until dropped, or
/// until the line ends.
pub struct Talking {
    state: Arc<Board<Speech>>,
    log: ChildLog,
    thread: Option<JoinHandle<()>>,
}

struct Speech {
    over: bool,
    words: VecDeque<u8>,
    background: Vec<u8>,
}

impl Talking {
    pub(super) fn start(line: Arc<PhoneLine>, background: &[u8]) -> Talking {
        let speech =
            Speech { over: false, words: VecDeque::new(), background: background.to_vec() };
        let state = Arc::new(Board::new(speech));
        let log = line.log.clone();
        let shared = Arc::clone(&state);
        let thread = spawn("microphone", move || {
            let mut due = Instant::now();
            loop {
                let frame = shared.change(Speech::next_frame);
                if line.send_frame(&frame).is_err() {
                    shared.change(|speech| speech.over = true);
                    return;
                }
                due += FRAME_TIME;
                let wait = due.saturating_duration_since(Instant::now());
                if shared.wait(wait, |speech| speech.over.then_some(())).is_some() {
                    return;
                }
            }
        });
        // No thread is the same as a microphone that has failed.
        if thread.is_err() {
            state.change(|speech| speech.over = true);
        }
        Talking { state, log, thread: thread.ok() }
    }

    /// Says this after what is still to be said, 160 bytes every 20 ms.
    pub fn say(&self, mulaw: &[u8]) {
        self.state.change(|speech| speech.words.extend(mulaw));
    }

    /// Waits until all words have been sent. It takes as long as they last.
    #[track_caller]
    pub fn wait_said(&self) -> Result<(), Trouble> {
        let left = self.state.look(|speech| speech.words.len());
        let samples = u32::try_from(left).unwrap_or(u32::MAX);
        let within = PATIENCE + SAMPLE_TIME * samples;
        match self
            .state
            .wait(within, |speech| (speech.over || speech.words.is_empty()).then_some(speech.over))
        {
            Some(false) => Ok(()),
            _ => Err(self.log.trouble("the line ended before the caller had finished speaking")),
        }
    }

    fn end(&mut self) {
        self.state.change(|speech| speech.over = true);
        if let Some(thread) = self.thread.take() {
            moot(thread.join());
        }
    }
}

#[cfg(test)]
impl Talking {
    /// Closes the microphone.
    pub fn stop(mut self) {
        self.end();
    }
}

impl Drop for Talking {
    fn drop(&mut self) {
        self.end();
    }
}

impl Speech {
    fn next_frame(&mut self) -> Vec<u8> {
        let words = self.words.len().min(FRAME_BYTES);
        let mut frame: Vec<u8> = self.words.drain(..words).collect();
        let silence = self.background.iter().cycle().take(FRAME_BYTES - words);
        frame.extend(silence);
        frame
    }
}
