//! What only the tests do with an [`AgentCall`]: break its line, send nonsense, look closer.
//!
//! The shipped program does not contain this file.

use std::io::Write as _;
use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::time::Instant;

use serde_json::Value;
use tungstenite::Message;
use tungstenite::protocol::CloseFrame;

use crate::demo::agent_call::{AgentCall, is_result_of};
use crate::demo::backstage::{lock, moot};
use crate::demo::socket::Ending;
use crate::demo::sound::difference;
use crate::demo::trouble::Trouble;

impl AgentCall {
    /// The query string of that request, such as `priorCallId=…`.
    pub fn query(&self) -> &str {
        self.line.request.target.split_once('?').map_or("", |(_, query)| query)
    }

    /// A header of that request.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.line.request.header(name)
    }

    /// When the connection was accepted on which it was asked for.
    pub fn connected_at(&self) -> Instant {
        self.line.request.connected_at
    }

    /// Where it is joined: nobody but the bridge is to know.
    pub fn join_url(&self) -> &str {
        &self.line.join_url
    }

    /// Sends any text message.
    #[track_caller]
    pub fn send_text(&self, text: &str) -> Result<(), Trouble> {
        self.send_message(Message::text(text))
    }

    /// All results of an invocation. There must never be two.
    pub fn results(&self, invocation: &str) -> Vec<Value> {
        let mut texts = self.texts();
        texts.retain(|text| is_result_of(text, invocation));
        texts
    }

    /// All data messages of the bridge so far.
    pub fn texts(&self) -> Vec<Value> {
        self.line.state.look(|ear| ear.texts.iter().map(|(_, text)| text.clone()).collect())
    }

    /// All audio so far, in the bridge's own messages, with their times.
    pub fn audio(&self) -> Vec<(Instant, Vec<u8>)> {
        self.line.state.look(|ear| ear.audio.clone())
    }

    /// All audio so far, silence included.
    pub fn heard_audio(&self) -> Vec<u8> {
        self.line.state.look(|ear| {
            let pieces = ear.audio.iter().map(|(_, pcm)| pcm.as_slice());
            pieces.collect::<Vec<_>>().concat()
        })
    }

    /// Waits until the caller's voice since the beginning is exactly this
    /// (s16le), nothing lost, nothing doubled, nothing mixed in.
    #[track_caller]
    pub fn expect_audio(&self, pcm: &[u8]) -> Result<(), Trouble> {
        self.wait_caller_audio(pcm.len())?;
        match difference(pcm, &self.heard_caller()) {
            None => Ok(()),
            Some(what) => {
                Err(self.line.log.trouble(format!("the agent heard something else: {what}")))
            }
        }
    }

    /// Waits until what the bridge has sent makes `ready` true: its messages
    /// of sound in order, silence included.
    #[track_caller]
    pub fn wait_sound(
        &self,
        what: &str,
        mut ready: impl FnMut(&[(Instant, Vec<u8>)]) -> bool,
    ) -> Result<(), Trouble> {
        self.wait(what, |_| true, |line| line.state.look(|ear| ready(&ear.audio).then_some(())))
    }

    /// The line breaks: TCP ends, without a close frame and (with TLS)
    /// without `close_notify`. What was sent before still arrives.
    pub fn drop_line(&self) {
        if let Some(mouth) = lock(&self.line.mouth).as_ref() {
            mouth.scissors.rude.store(true, Ordering::Release);
            moot(mouth.scissors.socket.shutdown(Shutdown::Both));
        }
    }

    /// Ultravox ends the call with a close frame of this code, or of none.
    #[track_caller]
    pub fn close_with(&self, code: Option<u16>) -> Result<(), Trouble> {
        let frame = code.map(|code| CloseFrame { code: code.into(), reason: "".into() });
        self.send_message(Message::Close(frame))
    }

    /// Sends bytes that are no WebSocket and, with TLS, no TLS either.
    pub fn send_junk(&self, bytes: &[u8]) {
        if let Some(mouth) = lock(&self.line.mouth).as_mut() {
            moot(mouth.scissors.wire.write_all(bytes));
        }
    }

    /// When the line ended.
    pub fn ended_at(&self) -> Option<Instant> {
        self.line.state.look(|ear| ear.ended_at)
    }

    /// Whether the line has ended.
    pub fn is_over(&self) -> bool {
        self.line.state.look(|ear| ear.ended.is_some())
    }

    /// Waits until the line has ended, and says how the bridge ended it (or
    /// how it answered our own close).
    #[track_caller]
    pub fn wait_closed(&self) -> Result<Ending, Trouble> {
        self.wait("the end of the line", |_| false, |line| line.state.look(|ear| ear.ended.clone()))
    }
}
