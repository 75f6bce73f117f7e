//! One call leg, seen from Twilio: a [`Phone`] with an open Media Stream.
//!
//! It sends what Twilio sends (`connected`, `start`, `media`, `mark`, `stop`), numbered as
//! Twilio numbers, and notes what arrives, and when. Two threads are its own: `line` listens
//! and never waits for anybody; the deck plays what was heard in real time and returns the
//! marks, as Twilio does.
//!
//! What the server sends is judged by Twilio's rules; offences are in [`Phone::violations`].
//! Waiting for something always ends, and says what was waited for and what came instead.
//!
//! [`microphone`](super::microphone) makes a caller who talks in real time out of it;
//! `for_tests` holds what only the tests do with a phone.

use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;
use tungstenite::error::ProtocolError;
use tungstenite::protocol::Role;
use tungstenite::{Message, WebSocket};

use crate::demo::backstage::{Board, lock, moot, random_hex, spawn};
use crate::demo::http::connect;
use crate::demo::microphone::Talking;
use crate::demo::phone::line::upgrade_as_twilio;
use crate::demo::server::ChildLog;
use crate::demo::socket::{normal_close, split_socket};
use crate::demo::sound::difference;
use crate::demo::trouble::Trouble;
use crate::demo::{ACCOUNT_SID, PATIENCE};

#[cfg(test)]
mod for_tests;
mod line;

/// What the bridge sends on a Media Stream, and how that ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// `media`: mu-law.
    Audio(Vec<u8>),
    /// `mark`, by name.
    Mark(String),
    /// `clear`
    Clear,
    /// What Twilio would not understand; it also is in the violations.
    Other(String),
    /// A close frame, with its code.
    Closed(Option<u16>),
    /// The end without a close frame.
    Broken(String),
}

/// Something heard, and when.
#[derive(Clone, Debug)]
pub struct HeardAt {
    pub at: Instant,
    pub what: Heard,
}

/// When a phone returns the marks that it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marks {
    /// As Twilio: when the audio before it has been played in real time.
    WhenPlayed,
    #[cfg(test)]
    AtOnce,
    #[cfg(test)]
    Never,
}

/// One call leg, seen from Twilio.
pub struct Phone {
    line: Arc<PhoneLine>,
    threads: Vec<JoinHandle<()>>,
}

pub(super) struct PhoneLine {
    stream_sid: String,
    /// For cutting only; all reading and writing goes through the others.
    tcp: TcpStream,
    mouth: Mutex<PhoneMouth>,
    ear: Board<PhoneEar>,
    deck: Board<Deck>,
    pub(super) log: ChildLog,
}

struct PhoneMouth {
    socket: WebSocket<TcpStream>,
    call_sid: String,
    /// One counter for all messages but `connected`.
    sequence: u64,
    chunk: u64,
    said: Vec<u8>,
    said_at: Vec<Instant>,
}

#[derive(Default)]
struct PhoneEar {
    heard: Vec<HeardAt>,
    audio_bytes: usize,
    violations: Vec<String>,
    echoes: Vec<(Instant, String)>,
    ended: Option<Heard>,
}

/// Twilio's play-out: audio is played one after the other in real time, and a
/// mark comes back when all before it has been played.
pub(super) struct Deck {
    marks: Marks,
    silent_from: Instant,
    pending: VecDeque<(Instant, String)>,
    over: bool,
}

impl Phone {
    pub(super) fn connect(
        bridge: SocketAddr,
        path: &str,
        signature: Option<&str>,
        log: &ChildLog,
    ) -> Result<Phone, String> {
        let tcp = connect(bridge).map_err(|error| error.to_string())?;
        let socket = upgrade_as_twilio(&tcp, path, signature)?;
        let (mut reader, writer) =
            split_socket(socket, Role::Client).map_err(|error| error.to_string())?;
        let now = Instant::now();
        let line = Arc::new(PhoneLine {
            stream_sid: format!("MZ{}", random_hex(16)),
            tcp,
            mouth: Mutex::new(PhoneMouth {
                socket: writer,
                call_sid: String::new(),
                sequence: 0,
                chunk: 0,
                said: Vec::new(),
                said_at: Vec::new(),
            }),
            ear: Board::default(),
            deck: Board::new(Deck {
                marks: Marks::WhenPlayed,
                silent_from: now,
                pending: VecDeque::new(),
                over: false,
            }),
            log: log.clone(),
        });
        let listening = Arc::clone(&line);
        let playing = Arc::clone(&line);
        let reader = spawn("phone ear", move || listening.listen(&mut reader));
        let player = spawn("phone deck", move || playing.play());
        let threads = [reader, player].into_iter().collect::<io::Result<Vec<_>>>();
        Ok(Phone { line, threads: threads.map_err(|error| error.to_string())? })
    }

    /// The first message of a stream.
    pub fn send_connected(&self) -> Result<(), Trouble> {
        self.send_text(r#"{"event":"connected","protocol":"Call","version":"1.0.0"}"#)
    }

    /// The second message: which call this is.
    pub fn send_start(&self, call_sid: &str) -> Result<(), Trouble> {
        let mut mouth = lock(&self.line.mouth);
        call_sid.clone_into(&mut mouth.call_sid);
        mouth.sequence += 1;
        let start = json!({
            "event": "start",
            "sequenceNumber": mouth.sequence.to_string(),
            "start": {
                "accountSid": ACCOUNT_SID,
                "streamSid": self.line.stream_sid,
                "callSid": call_sid,
                "tracks": ["inbound"],
                "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1},
                "customParameters": {},
            },
            "streamSid": self.line.stream_sid,
        });
        let sent = mouth.socket.send(Message::text(start.to_string()));
        sent.map_err(|error| self.line.broken(&error))
    }

    /// From now on a frame goes out every 20 ms, as from a real phone: what
    /// is given to [`Talking::say`], else the quietest noise there is. Not
    /// plain silence, since that could not be told from the bridge's own.
    pub fn keep_talking(&self) -> Talking {
        self.keep_talking_with(&[0xFE, 0x7E])
    }

    /// As [`Phone::keep_talking`], with this mu-law sound again and again.
    pub fn keep_talking_with(&self, background: &[u8]) -> Talking {
        Talking::start(Arc::clone(&self.line), background)
    }

    /// Sends any text message.
    pub fn send_text(&self, text: &str) -> Result<(), Trouble> {
        let mut mouth = lock(&self.line.mouth);
        mouth.socket.send(Message::text(text)).map_err(|error| self.line.broken(&error))
    }

    /// The caller hangs up: `stop`, then a close frame.
    pub fn hang_up(&self) -> Result<(), Trouble> {
        self.send_stop()?;
        let mut mouth = lock(&self.line.mouth);
        match mouth.socket.send(normal_close()) {
            // The bridge may have answered the `stop` with a goodbye of its own already.
            Ok(()) | Err(tungstenite::Error::Protocol(ProtocolError::SendAfterClosing)) => Ok(()),
            Err(error) => Err(self.line.broken(&error)),
        }
    }

    /// `stop` alone.
    pub fn send_stop(&self) -> Result<(), Trouble> {
        self.line.send_numbered(|sequence, stream_sid, call_sid| {
            let stop = json!({"accountSid": ACCOUNT_SID, "callSid": call_sid});
            let number = sequence.to_string();
            json!({
                "event": "stop", "streamSid": stream_sid, "sequenceNumber": number, "stop": stop,
            })
            .to_string()
        })
    }

    /// All mu-law said in media messages so far, and when each was sent.
    pub fn said(&self) -> (Vec<u8>, Vec<Instant>) {
        let mouth = lock(&self.line.mouth);
        (mouth.said.clone(), mouth.said_at.clone())
    }

    /// Everything heard so far, in order; the end of the line comes last.
    pub fn heard(&self) -> Vec<HeardAt> {
        self.line.ear.look(|ear| ear.heard.clone())
    }

    /// When the agent's voice first arrived.
    pub fn first_audio_at(&self) -> Option<Instant> {
        self.line.ear.look(|ear| {
            let first = ear.heard.iter().find(|one| matches!(one.what, Heard::Audio(_)));
            first.map(|one| one.at)
        })
    }

    /// What Twilio would have complained about. Tests want this to be empty.
    pub fn violations(&self) -> Vec<String> {
        self.line.ear.look(|ear| ear.violations.clone())
    }

    /// The marks that have been returned, and when.
    pub fn echoes(&self) -> Vec<(Instant, String)> {
        self.line.ear.look(|ear| ear.echoes.clone())
    }

    /// Waits until the audio heard since the beginning is exactly this.
    #[track_caller]
    pub fn expect_audio(&self, mulaw: &[u8]) -> Result<(), Trouble> {
        self.wait_audio(mulaw.len())?;
        match difference(mulaw, &self.heard_audio()) {
            None => Ok(()),
            Some(what) => {
                Err(self.line.log.trouble(format!("the phone heard something else: {what}")))
            }
        }
    }

    /// Waits until so many bytes of audio have been heard in all.
    #[track_caller]
    pub fn wait_audio(&self, bytes: usize) -> Result<(), Trouble> {
        let what = format!("{bytes} bytes of audio in all");
        self.wait(&what, PATIENCE, |ear| (ear.audio_bytes >= bytes).then_some(()))
    }

    /// All audio heard so far.
    pub fn heard_audio(&self) -> Vec<u8> {
        let audio = |ear: &PhoneEar| {
            let pieces = ear.heard.iter().filter_map(|one| match &one.what {
                Heard::Audio(mulaw) => Some(mulaw.as_slice()),
                _ => None,
            });
            pieces.collect::<Vec<_>>().concat()
        };
        self.line.ear.look(audio)
    }

    /// Waits for a `clear`, old or new, and says when the last one came.
    #[track_caller]
    pub fn wait_clear(&self) -> Result<Instant, Trouble> {
        self.wait("a clear", PATIENCE, |ear| {
            let clear = ear.heard.iter().rfind(|one| one.what == Heard::Clear);
            clear.map(|one| one.at)
        })
    }

    /// Waits until the line has ended: [`Heard::Closed`] or [`Heard::Broken`].
    #[track_caller]
    pub fn wait_closed(&self) -> Result<Heard, Trouble> {
        self.wait("the end of the line", PATIENCE, |ear| ear.ended.clone())
    }

    /// Waits until all audio received so far has been played.
    pub fn wait_played(&self) {
        let left = || {
            self.line.deck.look(|deck| deck.silent_from).saturating_duration_since(Instant::now())
        };
        while !left().is_zero() {
            self.line.deck.wait(left(), |deck| (deck.silent_from <= Instant::now()).then_some(()));
        }
    }

    #[track_caller]
    fn wait<R>(
        &self,
        what: &str,
        within: Duration,
        mut ready: impl FnMut(&PhoneEar) -> Option<R>,
    ) -> Result<R, Trouble> {
        let found = self.line.ear.wait(within, |ear| match ready(ear) {
            Some(found) => Some(Ok(found)),
            // After the end nothing can come any more.
            None => ear.ended.clone().map(Err),
        });
        let events = || self.line.ear.look(PhoneEar::summary);
        match found {
            Some(Ok(found)) => Ok(found),
            Some(Err(ending)) => Err(self
                .line
                .log
                .trouble(format!("the phone waited for {what}, but: {ending:?}; {}", events()))),
            None => Err(self
                .line
                .log
                .trouble(format!("the phone waited {within:?} for {what}; {}", events()))),
        }
    }
}

impl Drop for Phone {
    fn drop(&mut self) {
        self.line.deck.change(|deck| deck.over = true);
        moot(self.line.tcp.shutdown(Shutdown::Both));
        for thread in self.threads.drain(..) {
            moot(thread.join());
        }
    }
}

impl PhoneEar {
    fn summary(&self) -> String {
        let kinds: Vec<String> = self.heard.iter().map(|one| one.what.brief()).collect();
        let skipped = kinds.len().saturating_sub(12);
        let last: Vec<&str> = kinds.iter().skip(skipped).map(String::as_str).collect();
        format!("heard {} messages, the last: {}", kinds.len(), last.join(", "))
    }
}

impl Heard {
    fn brief(&self) -> String {
        match self {
            Heard::Audio(mulaw) => format!("audio {}", mulaw.len()),
            other => format!("{other:?}"),
        }
    }
}
