//! What only the tests do with a [`Phone`]: press keys, hang up, break the line, talk nonsense.
//!
//! The shipped program does not contain this file.

use std::io::Write as _;
use std::net::Shutdown;
use std::time::Duration;

use serde_json::json;
use tungstenite::Message;

use crate::demo::PATIENCE;
use crate::demo::backstage::{lock, moot};
use crate::demo::phone::{Heard, HeardAt, Marks, Phone};
use crate::demo::sound::FRAME_BYTES;
use crate::demo::trouble::Trouble;

impl Phone {
    /// The id that Twilio has given this stream.
    pub fn stream_sid(&self) -> &str {
        &self.line.stream_sid
    }

    /// How marks are returned from now on.
    pub fn marks(&self, policy: Marks) {
        self.line.deck.change(|deck| deck.marks = policy);
    }

    /// Says this at once: in messages of 160 bytes, without waiting 20 ms
    /// between them. The last one may be shorter.
    pub fn speak(&self, mulaw: &[u8]) -> Result<(), Trouble> {
        let frames = mulaw.chunks(FRAME_BYTES);
        frames.into_iter().try_for_each(|frame| self.line.send_frame(frame))
    }

    /// Presses keys, one `dtmf` message each.
    pub fn press(&self, keys: &str) -> Result<(), Trouble> {
        for key in keys.chars() {
            self.line.send_numbered(|sequence, stream_sid, _| {
                let dtmf = json!({"track": "inbound_track", "digit": key.to_string()});
                let number = sequence.to_string();
                json!({
                    "event": "dtmf", "streamSid": stream_sid, "sequenceNumber": number,
                    "dtmf": dtmf,
                })
                .to_string()
            })?;
        }
        Ok(())
    }

    /// The line breaks: neither `stop` nor a close frame, TCP just ends.
    pub fn drop_line(&self) {
        moot(self.line.tcp.shutdown(Shutdown::Both));
    }

    /// Sends a binary message, which Twilio never does.
    pub fn send_binary(&self, bytes: &[u8]) -> Result<(), Trouble> {
        let mut mouth = lock(&self.line.mouth);
        let sent = mouth.socket.send(Message::binary(bytes.to_vec()));
        sent.map_err(|error| self.line.broken(&error))
    }

    /// Sends bytes that need not be WebSocket at all.
    pub fn send_raw(&self, bytes: &[u8]) -> Result<(), Trouble> {
        let mut mouth = lock(&self.line.mouth);
        let sent = mouth.socket.get_mut().write_all(bytes);
        sent.map_err(|error| self.line.broken(&error))
    }

    /// Waits until what has been heard makes `ready` true.
    #[track_caller]
    pub fn wait_until(
        &self,
        what: &str,
        within: Duration,
        mut ready: impl FnMut(&[HeardAt]) -> bool,
    ) -> Result<(), Trouble> {
        self.wait(what, within, |ear| ready(&ear.heard).then_some(()))
    }

    /// Waits for a mark and gives its name.
    #[track_caller]
    pub fn wait_mark(&self) -> Result<String, Trouble> {
        self.wait("a mark", PATIENCE, |ear| {
            ear.heard.iter().find_map(|one| match &one.what {
                Heard::Mark(name) => Some(name.clone()),
                _ => None,
            })
        })
    }
}
