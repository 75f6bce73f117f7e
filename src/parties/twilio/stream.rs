//! The caller's leg: a Media Stream, from the upgrade to the goodbye.
//!
//! Twilio opens it because step 4 told it to. [`accept`] answers the upgrade, [`await_start`] waits
//! for the message that says which call it belongs to, and then it is a [`CallerLeg`]: thread T
//! reads what the caller says with `next`, any thread plays sound to the caller with `play`. What
//! Twilio takes, with exactly these keys (one more, and the message counts for nothing):
//!
//! ```text
//! {"event":"media","streamSid":"MZ…","media":{"payload":"<base64 mu-law>"}}
//! {"event":"mark","streamSid":"MZ…","mark":{"name":"goodbye"}}
//! {"event":"clear","streamSid":"MZ…"}
//! ```
//!
//! It knows nothing of the call: whether a break is the end of it is decided in steps 6 and 8.

use std::io::Write as _;
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use tungstenite::Utf8Bytes;
use tungstenite::handshake::machine::TryParse as _;
use tungstenite::handshake::server as ws_server;
use tungstenite::http::HeaderValue;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::protocol::{Message, Role};

use crate::door::head::stream_token;
use crate::parties::twilio::messages::{FromTwilio, Start};
use crate::parties::twilio::turn::Turn;
use crate::parties::twilio::twiml::stream_url;
use crate::parties::twilio::{Form, SHARED_KEY, signature_is_valid, why_invalid};
use crate::records::journal::WIRE_CHARS_MAX;
use crate::records::tap::{Exhibit, Tap, hidden};
use crate::setup::settings::Config;
use crate::toolbox::log::log;
use crate::toolbox::metrics;
use crate::toolbox::socket::{Received, Socket, SocketEnd, shut};
use crate::toolbox::sound::{FRAME_BYTES, SAMPLE_BYTES, SAMPLE_RATE_HZ, is_loud, playing_time};
use crate::toolbox::text::cut;
use crate::toolbox::threads::lock;

/// In the place of a token, from `callbridge check`.
pub(crate) const CHECK: &str = "check";
/// From the upgrade to `start`. Then the stream is closed with 1008.
const START_WITHIN: Duration = Duration::from_secs(10);
/// Mu-law bytes in one message to Twilio: a second of sound.
const PLAY_BYTES_MAX: usize = SAMPLE_RATE_HZ;
/// A caller is speaking until this long after the last loud frame.
const SPEAKS_ON: Duration = Duration::from_millis(300);

/// The WebSocket upgrade. Twilio signs it like a webhook, with the `wss://` address and no form;
/// its documentation leaves open whether a slash is added at the end. Whoever is refused has been
/// told so when this returns.
pub(crate) fn accept(
    socket: &Arc<TcpStream>,
    mut head: Vec<u8>,
    config: &Config,
) -> Result<Socket, String> {
    let refuse = |reason: &str, status: &str, why: String| {
        metrics::refused(reason);
        let answer = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
        if (&**socket).write_all(answer.as_bytes()).is_err() {
            // Whoever it was has gone; the log has the reason anyway.
        }
        shut(socket);
        why
    };
    let unusable =
        |error: tungstenite::Error| refuse("upgrade", "400 Bad Request", error.to_string());
    let parsed = ws_server::Request::try_parse(&head).map_err(unusable)?;
    let (length, request) = parsed.ok_or("an incomplete head")?;
    if let Some(token) = &config.twilio_auth_token
        && let Some(signature) = request.headers().get("X-Twilio-Signature")
    {
        let signature = signature.to_str().unwrap_or_default();
        let url = stream_url(config.own_url(), &stream_token(&head).unwrap_or_default());
        let nothing = Form(Vec::new());
        let is_signed = |url: &str| signature_is_valid(token, url, &nothing, signature);
        if !is_signed(&url) && !is_signed(&format!("{url}/")) {
            let shared_key = request.headers().get(SHARED_KEY).map(HeaderValue::to_str);
            let why = why_invalid(signature, shared_key.and_then(Result::ok).unwrap_or_default());
            return Err(refuse("signature", "403 Forbidden", why.into()));
        }
    }
    let response = ws_server::create_response(&request).map_err(unusable)?;
    let mut bytes = Vec::new();
    ws_server::write_response(&mut bytes, &response).map_err(|error| error.to_string())?;
    (&**socket).write_all(&bytes).map_err(|error| error.to_string())?;
    let early = head.split_off(length);
    Ok(Socket::new(Arc::clone(socket), None, early, Role::Server))
}

/// `callbridge check` asks whether the audio socket opens. It does, and closes at once: whoever
/// else asks for this gets no more of it. False: it is a token, or nothing.
pub(crate) fn opens_for_check(
    token: &str,
    socket: &Arc<TcpStream>,
    head: Vec<u8>,
    config: &Config,
) -> bool {
    if token != CHECK {
        return false;
    }
    match accept(socket, head, config) {
        Ok(socket) => {
            socket.close(CloseCode::Normal, "it opens");
            socket.await_close();
        }
        Err(why) => log!(Warn, "/media-stream was refused to callbridge check: {why}"),
    }
    true
}

/// The message and its text. None: the other side said goodbye before it began.
pub(crate) fn await_start(socket: &Socket) -> Result<Option<(Start, Utf8Bytes)>, String> {
    let deadline = Instant::now() + START_WITHIN;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("no start within {} s", START_WITHIN.as_secs()));
        }
        let text = match socket.read(left) {
            Ok((Received::Text(text), _)) => text,
            Ok((Received::Binary(_), _)) => {
                socket.close(CloseCode::Unsupported, "only text is understood here");
                return Err("a binary message before start".into());
            }
            Err(SocketEnd::Quiet) => continue,
            Err(SocketEnd::Closed(_)) => return Ok(None),
            Err(end) => return Err(format!("before start: {end}")),
        };
        match FromTwilio::parse(&text, "", &mut Vec::new())? {
            FromTwilio::Start(start) => return Ok(Some((start, text))),
            FromTwilio::Connected | FromTwilio::Unknown(_) => {}
            FromTwilio::Media | FromTwilio::Dtmf(_) | FromTwilio::Mark(_) | FromTwilio::Stop => {
                return Err("another message before start".into());
            }
        }
    }
}

/// The socket, and what we know of the sound at its other end.
pub(crate) struct CallerLeg {
    pub(crate) stream_sid: String,
    socket: Socket,
    tap: Arc<Tap>,
    /// What stands before the sound in each message of it.
    media_head: String,
    /// When Twilio will have played all that it was sent.
    plays_until: Mutex<Instant>,
    turn: Mutex<Turn>,
}

impl CallerLeg {
    pub(crate) fn new(socket: Socket, stream_sid: String, tap: Arc<Tap>) -> CallerLeg {
        // A streamSid from outside may hold a quote, so it is written by the JSON writer.
        let sid = json!(stream_sid);
        let media_head =
            format!("{{\"event\":\"media\",\"streamSid\":{sid},\"media\":{{\"payload\":\"");
        let now = Instant::now();
        CallerLeg {
            stream_sid,
            socket,
            tap,
            media_head,
            plays_until: Mutex::new(now),
            turn: Mutex::default(),
        }
    }

    /// The next message, and when it was read off the socket. Sound goes into `mulaw`. An error is
    /// the end of the stream without a `stop`, in a few words.
    pub(crate) fn next(
        &self,
        mulaw: &mut Vec<u8>,
        patience: Duration,
    ) -> Result<(FromTwilio, Instant), String> {
        let (text, arrived) = match self.socket.read(patience) {
            Ok((Received::Text(text), arrived)) => (text, arrived),
            Ok((Received::Binary(_), _)) => {
                self.say_goodbye(CloseCode::Unsupported, "only text is understood here");
                return Err("a binary message".into());
            }
            Err(end) => return Err(end.to_string()),
        };
        let message = FromTwilio::parse(&text, &self.stream_sid, mulaw)?;
        match &message {
            FromTwilio::Media => {
                if is_loud(mulaw) {
                    lock(&self.turn).caller_is_loud(arrived);
                }
                self.tap.show(Exhibit::CallerFrame, || media_in_short(&text));
            }
            // What is keyed in may be a secret of the caller's.
            FromTwilio::Dtmf(_) => self.tap.show(Exhibit::Key, || hidden(&text, "/dtmf/digit")),
            FromTwilio::Mark(_) => self.tap.show(Exhibit::MarkBack, || text.to_string()),
            FromTwilio::Stop => self.tap.show(Exhibit::Stop, || text.to_string()),
            FromTwilio::Connected | FromTwilio::Start(_) | FromTwilio::Unknown(_) => {}
        }
        Ok((message, arrived))
    }

    /// At once, however much it is: Twilio keeps it and keeps the time. False: it was lost.
    pub(crate) fn play(&self, mulaw: &[u8]) -> bool {
        let mut arrives = true;
        for second in mulaw.chunks(PLAY_BYTES_MAX) {
            let text = self.media(second);
            let shown = (!self.tap.has_shown(Exhibit::AgentFrame)).then(|| media_in_short(&text));
            {
                let mut plays_until = lock(&self.plays_until);
                *plays_until = (*plays_until).max(Instant::now()) + playing_time(second.len());
            }
            arrives &= self.send(text);
            if let Some(shown) = shown {
                self.tap.show(Exhibit::AgentFrame, || shown);
            }
        }
        arrives
    }

    /// Asks Twilio to send this name back once all that was played before has been heard.
    pub(crate) fn mark(&self, name: &str) -> bool {
        let mark = json!({"event": "mark", "streamSid": self.stream_sid, "mark": {"name": name}});
        let arrives = self.send(mark.to_string());
        self.tap.show(Exhibit::Mark, || mark.to_string());
        arrives
    }

    /// Tells Twilio to forget what it has not played yet. Returns how much that was.
    pub(crate) fn clear(&self) -> Duration {
        let clear = json!({"event": "clear", "streamSid": self.stream_sid});
        let unheard = self.unheard();
        let now = Instant::now();
        *lock(&self.plays_until) = now;
        lock(&self.turn).agent_stops(now);
        self.send(clear.to_string());
        self.tap.show(Exhibit::Clear, || clear.to_string());
        unheard
    }

    /// How long Twilio will go on playing.
    pub(crate) fn unheard(&self) -> Duration {
        lock(&self.plays_until).saturating_duration_since(Instant::now())
    }

    /// One word on who is heard. The caller hears the agent for as long as Twilio plays it.
    pub(crate) fn speaking(&self) -> Option<&'static str> {
        if !self.unheard().is_zero() {
            return Some("agent");
        }
        let loud_at = lock(&self.turn).caller_loud_at();
        loud_at.is_some_and(|loud_at| loud_at.elapsed() < SPEAKS_ON).then_some("user")
    }

    /// Of what the agent has just been heard with: if it begins an answer, the time since the
    /// caller's last loud frame.
    pub(crate) fn answered_after(&self, mulaw: &[u8]) -> Option<Duration> {
        // Some agents send silence as sound.
        let is_loud = mulaw.chunks(FRAME_BYTES / SAMPLE_BYTES).any(is_loud);
        let now = Instant::now();
        is_loud.then(|| lock(&self.turn).agent_is_loud(now, now + self.unheard()))?
    }

    /// Says goodbye, and gives Twilio a moment to answer it. For the thread that reads.
    pub(crate) fn close(&self, code: CloseCode, why: &str) {
        self.say_goodbye(code, why);
        self.socket.await_close();
    }

    /// For any other thread: the reading one sees the end of it.
    pub(crate) fn say_goodbye(&self, code: CloseCode, why: &str) {
        self.socket.close(code, why);
    }

    /// Without a goodbye: the stream is broken already.
    pub(crate) fn cut(&self) {
        self.socket.shut();
    }

    fn media(&self, mulaw: &[u8]) -> String {
        const TAIL: &str = "\"}}";
        let payload_bytes = mulaw.len().div_ceil(3) * 4;
        let mut text = String::with_capacity(self.media_head.len() + payload_bytes + TAIL.len());
        text.push_str(&self.media_head);
        BASE64.encode_string(mulaw, &mut text);
        text.push_str(TAIL);
        text
    }

    /// False: it did not reach Twilio. Thread T reads from this socket and learns of its end; what
    /// that means for the call is decided there.
    fn send(&self, text: String) -> bool {
        self.socket.send(Message::text(text)).is_ok()
    }
}

/// A message with sound in it, most of which is left out.
pub(super) fn media_in_short(text: &str) -> String {
    let mut message: Value = serde_json::from_str(text).unwrap_or_default();
    if let Some(payload) = message.pointer_mut("/media/payload") {
        *payload = json!(cut(payload.as_str().unwrap_or_default(), 24));
    }
    cut(&message.to_string(), WIRE_CHARS_MAX)
}
