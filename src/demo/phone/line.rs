//! A phone's line: sending frames, the listening thread, play-out, and Twilio's rules.
//!
//! Belongs to [`phone`](super): that file says what a phone can do, this one how it does it.

use std::fmt::Display;
use std::net::{Shutdown, TcpStream};
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use tungstenite::{HandshakeError, Message, WebSocket, http};

use crate::demo::PATIENCE;
use crate::demo::backstage::{lock, moot};
use crate::demo::phone::{Deck, Heard, HeardAt, Marks, PhoneLine};
use crate::demo::socket::{Ear, Ending, Incoming, listen, small_buffers};
use crate::demo::sound::SAMPLE_TIME;
use crate::demo::trouble::Trouble;

impl PhoneLine {
    pub(crate) fn send_frame(&self, mulaw: &[u8]) -> Result<(), Trouble> {
        let mut mouth = lock(&self.mouth);
        mouth.sequence += 1;
        mouth.chunk += 1;
        // Twilio's clock does not start at 0 either; 155 was seen.
        let timestamp = 155 + 20 * (mouth.chunk - 1);
        let text = format!(
            "{{\"event\":\"media\",\"sequenceNumber\":\"{}\",\"media\":{{\"track\":\"inbound\",\
             \"chunk\":\"{}\",\"timestamp\":\"{timestamp}\",\"payload\":\"{}\"}},\
             \"streamSid\":\"{}\"}}",
            mouth.sequence,
            mouth.chunk,
            BASE64.encode(mulaw),
            self.stream_sid,
        );
        // Noted before it is sent: the agent may have it before we are back.
        mouth.said.extend_from_slice(mulaw);
        mouth.said_at.push(Instant::now());
        mouth.socket.send(Message::text(text)).map_err(|error| self.broken(&error))
    }

    /// Sends a message that needs the next sequence number. `write` gets that
    /// number, the stream's id and the call's id.
    pub(super) fn send_numbered(
        &self,
        write: impl FnOnce(u64, &str, &str) -> String,
    ) -> Result<(), Trouble> {
        let mut mouth = lock(&self.mouth);
        mouth.sequence += 1;
        let text = write(mouth.sequence, &self.stream_sid, &mouth.call_sid);
        mouth.socket.send(Message::text(text)).map_err(|error| self.broken(&error))
    }

    pub(super) fn broken(&self, error: &impl Display) -> Trouble {
        self.log.trouble(format!("the phone cannot send: {error}"))
    }

    /// The reading thread: it notes everything and never waits for anybody.
    pub(super) fn listen(&self, reader: &mut WebSocket<Ear>) {
        let ending = listen(reader, |message| {
            let at = Instant::now();
            let what = match message {
                Incoming::Reply(reply) => {
                    moot(lock(&self.mouth).socket.send(reply));
                    return;
                }
                Incoming::Text(text) => judge(&text, &self.stream_sid),
                Incoming::Binary(bytes) => {
                    Err(format!("a binary message of {} bytes (31950)", bytes.len()))
                }
            };
            self.note(at, what);
        });
        let ending = match ending {
            Ending::Closed(code) => Heard::Closed(code),
            Ending::Broken(why) => Heard::Broken(why),
        };
        moot(self.tcp.shutdown(Shutdown::Both));
        self.deck.change(|deck| deck.over = true);
        self.ear.change(|ear| {
            ear.heard.push(HeardAt { at: Instant::now(), what: ending.clone() });
            ear.ended = Some(ending);
        });
    }

    fn note(&self, at: Instant, what: Result<Heard, String>) {
        let what = match what {
            Ok(what) => what,
            Err(violation) => {
                self.ear.change(|ear| ear.violations.push(violation.clone()));
                Heard::Other(violation)
            }
        };
        let due = self.deck.change(|deck| deck.take(at, &what));
        self.ear.change(|ear| {
            if let Heard::Audio(mulaw) = &what {
                ear.audio_bytes += mulaw.len();
            }
            ear.heard.push(HeardAt { at, what });
        });
        for name in due {
            self.echo(&name);
        }
    }

    /// The playing thread: it returns each mark at its time.
    pub(super) fn play(&self) {
        let first_due = |deck: &Deck| deck.pending.front().map(|(at, _)| *at);
        loop {
            let now = Instant::now();
            let next = self.deck.look(first_due);
            if self.deck.look(|deck| deck.over) {
                return;
            }
            if next.is_some_and(|at| at <= now) {
                // A clear may have returned it in the meantime.
                let due = self.deck.change(|deck| deck.pending.pop_front_if(|(at, _)| *at <= now));
                if let Some((_, name)) = due {
                    self.echo(&name);
                }
                continue;
            }
            let wait = next.map_or(PATIENCE, |at| at.saturating_duration_since(now));
            self.deck.wait(wait, |deck| (deck.over || first_due(deck) != next).then_some(()));
        }
    }

    fn echo(&self, name: &str) {
        self.ear.change(|ear| ear.echoes.push((Instant::now(), name.to_owned())));
        let name = json!(name);
        let sent = self.send_numbered(|sequence, stream_sid, _| {
            let number = sequence.to_string();
            json!({
                "event": "mark", "streamSid": stream_sid, "sequenceNumber": number,
                "mark": {"name": name},
            })
            .to_string()
        });
        // If the line is gone the reading thread says so.
        moot(sent);
    }
}

impl Deck {
    /// Takes in what was heard, and says which marks are to be returned now.
    fn take(&mut self, at: Instant, what: &Heard) -> Vec<String> {
        match what {
            Heard::Audio(mulaw) => {
                let samples = u32::try_from(mulaw.len()).unwrap_or(u32::MAX);
                self.silent_from = self.silent_from.max(at) + SAMPLE_TIME * samples;
                Vec::new()
            }
            Heard::Mark(name) => match self.marks {
                #[cfg(test)]
                Marks::Never => Vec::new(),
                #[cfg(test)]
                Marks::AtOnce => vec![name.clone()],
                Marks::WhenPlayed if self.silent_from <= at && self.pending.is_empty() => {
                    vec![name.clone()]
                }
                Marks::WhenPlayed => {
                    self.pending.push_back((self.silent_from, name.clone()));
                    Vec::new()
                }
            },
            // Twilio drops what is buffered, and all marks come back.
            Heard::Clear => {
                self.silent_from = at;
                self.pending.drain(..).map(|(_, name)| name).collect()
            }
            Heard::Other(_) | Heard::Closed(_) | Heard::Broken(_) => Vec::new(),
        }
    }
}

/// One message of the bridge, by Twilio's rules: exactly these keys.
fn judge(text: &str, stream_sid: &str) -> Result<Heard, String> {
    let wrong =
        |why: &str| format!("{why} (31951): {}", text.chars().take(200).collect::<String>());
    let message: Value = serde_json::from_str(text).map_err(|error| wrong(&error.to_string()))?;
    if message["streamSid"] != stream_sid {
        return Err(wrong("wrong streamSid"));
    }
    let event = message["event"].as_str().unwrap_or_default();
    let keys = |value: &Value| {
        let keys = value.as_object().map(|object| object.keys().cloned().collect::<Vec<_>>());
        keys.unwrap_or_default().join(" ")
    };
    let inner = &message[event];
    match (event, keys(&message).as_str(), keys(inner).as_str()) {
        ("media", "event media streamSid", "payload") => {
            let payload = inner["payload"].as_str().ok_or_else(|| wrong("payload is no text"))?;
            let mulaw = BASE64.decode(payload).map_err(|error| wrong(&error.to_string()))?;
            if mulaw.is_empty() { Err(wrong("an empty payload")) } else { Ok(Heard::Audio(mulaw)) }
        }
        ("mark", "event mark streamSid", "name") => {
            let name = inner["name"].as_str().ok_or_else(|| wrong("name is no text"))?;
            Ok(Heard::Mark(name.to_owned()))
        }
        ("clear", "event streamSid", "") => Ok(Heard::Clear),
        _ => Err(wrong("wrong event or keys")),
    }
}

/// The upgrade as Twilio asks for it: no Origin, no subprotocol.
pub(super) fn upgrade_as_twilio(
    tcp: &TcpStream,
    path: &str,
    signature: Option<&str>,
) -> Result<WebSocket<Ear>, String> {
    let mut request = http::Request::builder()
        .uri(format!("ws://bridge.example{path}"))
        .header("host", "bridge.example")
        .header("user-agent", "Twilio.TmeWs/1.0")
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", tungstenite::handshake::client::generate_key());
    if let Some(signature) = signature {
        request = request.header("x-twilio-signature", signature);
    }
    let request = request.body(()).map_err(|error| error.to_string())?;
    let ear = Ear::of(tcp).map_err(|error| error.to_string())?;
    match tungstenite::client::client_with_config(request, ear, Some(small_buffers())) {
        Ok((socket, _)) => Ok(socket),
        Err(HandshakeError::Failure(tungstenite::Error::Http(answer))) => {
            Err(format!("answered {}", answer.status()))
        }
        Err(error) => Err(error.to_string()),
    }
}
