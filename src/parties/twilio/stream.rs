//! The caller's leg: a Media Stream.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Write;
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::{Value, json};
use tungstenite::Utf8Bytes;
use tungstenite::handshake::machine::TryParse as _;
use tungstenite::handshake::server as ws_server;
use tungstenite::protocol::{Message, Role};

use crate::parties::twilio::twiml::stream_url;
use crate::parties::twilio::{Form, signature_is_valid};
use crate::records::exhibit::Exhibit;
use crate::records::journal::WIRE_CHARS_MAX;
use crate::toolbox::log::log;
use crate::toolbox::metrics::refused;
use crate::toolbox::socket::{Duplex, LineEnd, Received, shut};
use crate::toolbox::sound::{SAMPLE_RATE_HZ, playing_time};
use crate::toolbox::text::cut;
use crate::toolbox::threads::lock;
use crate::{Bridge, Call};

/// From the upgrade to `start`. Then the stream is closed with 1008.
pub(crate) const START_WITHIN: Duration = Duration::from_secs(10);
/// Mu-law bytes in one message to Twilio: a second of sound.
pub(crate) const TO_TWILIO_BYTES_MAX: usize = SAMPLE_RATE_HZ;

/// What Twilio sends. One real message of each kind:
///
/// ```text
/// {"event":"connected","protocol":"Call","version":"1.0.0"}
/// {"event":"start","sequenceNumber":"1","streamSid":"MZ…","start":{"accountSid":"AC…",
///  "streamSid":"MZ…","callSid":"CA…","tracks":["inbound"],"mediaFormat":{"encoding":
///  "audio/x-mulaw","sampleRate":8000,"channels":1},"customParameters":{"token":"…"}}}
/// {"event":"media","sequenceNumber":"2","streamSid":"MZ…","media":{"track":"inbound",
///  "chunk":"1","timestamp":"155","payload":"<base64>"}}
/// {"event":"dtmf","sequenceNumber":"5","streamSid":"MZ…","dtmf":{"track":"inbound_track",
///  "digit":"1"}}
/// {"event":"mark","sequenceNumber":"4","streamSid":"MZ…","mark":{"name":"goodbye"}}
/// {"event":"stop","sequenceNumber":"50","streamSid":"MZ…","stop":{"accountSid":"AC…",
///  "callSid":"CA…"}}
/// ```
///
/// The order of keys varies, numbers are texts, and events nobody has heard of may be added.
#[derive(Debug, PartialEq)]
pub(crate) enum FromTwilio<'a> {
    Connected,
    Start(Start),
    /// Base64 of mu-law bytes, borrowed from the message.
    Media(Cow<'a, str>),
    Dtmf(String),
    Mark(String),
    Stop,
    Unknown(String),
}

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Start {
    pub(crate) stream_sid: String,
    pub(crate) call_sid: String,
    pub(crate) media_format: MediaFormat,
    #[serde(default)]
    pub(crate) custom_parameters: HashMap<String, String>,
}

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct MediaFormat {
    pub(crate) encoding: String,
    pub(crate) sample_rate: usize,
}

/// The envelope of them all. `borrow` works on a bare `Cow` only, hence the empty texts for "none".
#[derive(Deserialize)]
pub(crate) struct Envelope<'a> {
    #[serde(borrow)]
    pub(crate) event: Cow<'a, str>,
    #[serde(borrow, default, rename = "streamSid")]
    pub(crate) stream_sid: Cow<'a, str>,
    #[serde(borrow)]
    pub(crate) media: Option<Media<'a>>,
    pub(crate) start: Option<Start>,
    pub(crate) dtmf: Option<Dtmf>,
    pub(crate) mark: Option<Mark>,
}

#[derive(Deserialize)]
pub(crate) struct Media<'a> {
    #[serde(borrow)]
    pub(crate) payload: Cow<'a, str>,
}

#[derive(Deserialize)]
pub(crate) struct Dtmf {
    pub(crate) digit: String,
}

#[derive(Deserialize)]
pub(crate) struct Mark {
    pub(crate) name: String,
}

impl<'a> FromTwilio<'a> {
    /// `stream_sid` is the stream this socket carries, or empty before `start` has said so.
    pub(crate) fn parse(text: &'a str, stream_sid: &str) -> Result<FromTwilio<'a>, String> {
        let envelope: Envelope = serde_json::from_str(text)
            .map_err(|error| format!("not a message of Twilio's: {error}"))?;
        let known = ["connected", "start", "media", "dtmf", "mark", "stop"];
        let other_stream = !stream_sid.is_empty() && envelope.stream_sid != stream_sid;
        if other_stream && known.contains(&envelope.event.as_ref()) {
            return Err(format!("a {} message for another stream", envelope.event));
        }
        let missing = || format!("a {} message without its content", envelope.event);
        Ok(match envelope.event.as_ref() {
            "connected" => FromTwilio::Connected,
            "start" => FromTwilio::Start(envelope.start.ok_or_else(missing)?),
            "media" => FromTwilio::Media(envelope.media.ok_or_else(missing)?.payload),
            "dtmf" => FromTwilio::Dtmf(envelope.dtmf.ok_or_else(missing)?.digit),
            "mark" => FromTwilio::Mark(envelope.mark.ok_or_else(missing)?.name),
            "stop" => FromTwilio::Stop,
            unknown => FromTwilio::Unknown(unknown.to_owned()),
        })
    }
}

/// The caller's leg: the socket and what we know of Twilio's play-out at its other end.
pub(crate) struct CallerLeg {
    pub(crate) socket: Duplex,
    pub(crate) stream_sid: String,
    pub(crate) since: Instant,
    /// What stands before the sound in each message of it.
    pub(crate) media_head: String,
    /// When Twilio will have played all that it was sent.
    pub(crate) plays_until: Mutex<Instant>,
}

/// The WebSocket upgrade. Twilio signs it like a webhook, with the `wss://` address and no form;
/// its documentation leaves open whether a slash is added at the end.
pub(crate) fn accept_stream(
    bridge: &Bridge,
    socket: &Arc<TcpStream>,
    mut head: Vec<u8>,
) -> Result<Duplex, String> {
    let parsed = ws_server::Request::try_parse(&head).map_err(|error| {
        refused("upgrade");
        plain_answer(socket, "400 Bad Request");
        error.to_string()
    })?;
    let (length, request) = parsed.ok_or("an incomplete head")?;
    if let Some(token) = &bridge.config.twilio_auth_token
        && let Some(signature) = request.headers().get("X-Twilio-Signature")
    {
        let signature = signature.to_str().unwrap_or_default();
        let url = stream_url(&bridge.config.public_url);
        let nothing = Form(Vec::new());
        if ![&url, &format!("{url}/")]
            .iter()
            .any(|url| signature_is_valid(token, url, &nothing, signature))
        {
            refused("signature");
            plain_answer(socket, "403 Forbidden");
            return Err("Twilio's signature is wrong".into());
        }
    }
    let response = ws_server::create_response(&request).map_err(|error| {
        refused("upgrade");
        plain_answer(socket, "400 Bad Request");
        error.to_string()
    })?;
    let mut bytes = Vec::new();
    ws_server::write_response(&mut bytes, &response).map_err(|error| error.to_string())?;
    (&**socket).write_all(&bytes).map_err(|error| error.to_string())?;
    let early = head.split_off(length);
    Ok(Duplex::new(Arc::clone(socket), None, early, Role::Server))
}

pub(crate) fn plain_answer(mut socket: &TcpStream, status: &str) {
    let answer = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    if socket.write_all(answer.as_bytes()).is_err() {
        // Whoever it was has gone; the log has the reason anyway.
    }
    shut(socket);
}

/// The message and its text. None: the other side said goodbye before it began, as `callbridge
/// check` does.
pub(crate) fn await_start(line: &Duplex) -> Result<Option<(Start, Utf8Bytes)>, String> {
    let deadline = Instant::now() + START_WITHIN;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("no start within {} s", START_WITHIN.as_secs()));
        }
        let text = match line.read(left) {
            Ok((Received::Text(text), _)) => text,
            Ok((Received::Binary(_), _)) => return Err("a binary message before start".into()),
            Err(LineEnd::Quiet) => continue,
            Err(LineEnd::Closed(_)) => return Ok(None),
            Err(end) => return Err(format!("before start: {end}")),
        };
        match FromTwilio::parse(&text, "")? {
            FromTwilio::Start(start) => return Ok(Some((start, text))),
            FromTwilio::Connected | FromTwilio::Unknown(_) => {}
            FromTwilio::Media(_) | FromTwilio::Dtmf(_) | FromTwilio::Mark(_) | FromTwilio::Stop => {
                return Err("another message before start".into());
            }
        }
    }
}

/// A message with sound in it, most of which is left out.
pub(crate) fn media_for_the_eye(text: &str) -> String {
    let mut message: Value = serde_json::from_str(text).unwrap_or_default();
    if let Some(payload) = message.pointer_mut("/media/payload") {
        *payload = json!(cut(payload.as_str().unwrap_or_default(), 24));
    }
    cut(&message.to_string(), WIRE_CHARS_MAX)
}

/// What Twilio takes. Exactly these keys: one more, and the message counts
/// for nothing.
///
/// ```text
/// {"event":"media","streamSid":"MZ…","media":{"payload":"<base64 mu-law>"}}
/// {"event":"mark","streamSid":"MZ…","mark":{"name":"goodbye"}}
/// {"event":"clear","streamSid":"MZ…"}
/// ```
impl CallerLeg {
    pub(crate) fn new(socket: Duplex, stream_sid: String) -> CallerLeg {
        // A streamSid from outside may hold a quote, so it is written by the JSON writer.
        let sid = json!(stream_sid);
        let media_head =
            format!("{{\"event\":\"media\",\"streamSid\":{sid},\"media\":{{\"payload\":\"");
        let now = Instant::now();
        CallerLeg { socket, stream_sid, since: now, media_head, plays_until: Mutex::new(now) }
    }

    pub(crate) fn play(&self, call: &Call, mulaw: &[u8]) -> bool {
        const MEDIA_TAIL: &str = "\"}}";
        let payload_bytes = mulaw.len().div_ceil(3) * 4;
        let mut text =
            String::with_capacity(self.media_head.len() + payload_bytes + MEDIA_TAIL.len());
        text.push_str(&self.media_head);
        BASE64.encode_string(mulaw, &mut text);
        text.push_str(MEDIA_TAIL);
        {
            let mut plays_until = lock(&self.plays_until);
            *plays_until = (*plays_until).max(Instant::now()) + playing_time(mulaw.len());
        }
        self.tell(call, text)
    }

    pub(crate) fn mark(&self, call: &Call, name: &str) {
        let mark = json!({"event": "mark", "streamSid": self.stream_sid, "mark": {"name": name}});
        self.tell(call, mark.to_string());
        call.show(Exhibit::Mark, || mark.to_string());
    }

    pub(crate) fn clear(&self, call: &Call) {
        let clear = json!({"event": "clear", "streamSid": self.stream_sid});
        *lock(&self.plays_until) = Instant::now();
        self.tell(call, clear.to_string());
        call.show(Exhibit::Clear, || clear.to_string());
    }

    /// False: it did not reach Twilio.
    pub(crate) fn tell(&self, call: &Call, text: String) -> bool {
        if let Err(end) = self.socket.send(Message::text(text)) {
            // Thread T reads from this line; it decides what its end means for the call.
            log!(call, Debug, Talk, "a message did not reach Twilio: {end}");
            return false;
        }
        true
    }
}

#[cfg(test)]
mod tests;
