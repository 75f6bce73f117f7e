//! What Twilio sends for a call of the benchmark: webhooks, the upgrade, the stream's opening.
//!
//! Bytes only; when they are sent is decided in [`call`](super::call).

use std::io::{self, BufReader};
use std::net::SocketAddr;

use serde_json::json;

use crate::demo::backstage::random_uuid;
use crate::demo::bench::call::Call;
use crate::demo::bench::line::Line;
use crate::demo::bench::message::{TEXT, write_message};
use crate::demo::http::{HttpAnswer, http_exchange, read_head};
use crate::demo::twilio::{form_body, twilio_signature};
use crate::demo::{ACCOUNT_SID, AUTH_TOKEN, PUBLIC_URL};

pub(super) fn webhook(
    bridge: SocketAddr,
    path: &str,
    form: &[(&str, &str)],
) -> Result<HttpAnswer, String> {
    let signature = twilio_signature(AUTH_TOKEN, &format!("{PUBLIC_URL}{path}"), form);
    let headers = [
        ("User-Agent", "TwilioProxy/1.1"),
        ("I-Twilio-Idempotency-Token", &random_uuid()),
        ("Content-Type", "application/x-www-form-urlencoded; charset=UTF-8"),
        ("X-Twilio-Signature", signature.as_str()),
    ];
    let answer = http_exchange(bridge, "POST", path, &headers, form_body(form).as_bytes())
        .map_err(|error| format!("{path}: {error}"))?;
    match answer.status {
        200 => Ok(answer),
        status => Err(format!("{path} was answered {status}: {}", answer.text())),
    }
}

/// The upgrade, and a reader that has not lost what came right behind it.
pub(super) fn upgrade_as_twilio(line: &Line, url: &str) -> io::Result<BufReader<Line>> {
    let path = url.strip_prefix(&PUBLIC_URL.replacen("http", "ws", 1)).unwrap_or_default();
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: bridge.example\r\nUser-Agent: Twilio.TmeWs/1.0\r\n\
         Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: {}\r\nX-Twilio-Signature: {}\r\n\r\n",
        tungstenite::handshake::client::generate_key(),
        twilio_signature(AUTH_TOKEN, url, &[]),
    );
    line.write(request.as_bytes())?;
    let mut reader = line.reader();
    let (status, _) = read_head(&mut reader)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    if status.split(' ').nth(1) == Some("101") {
        Ok(reader)
    } else {
        Err(io::Error::other(format!("answered {status:?}")))
    }
}

pub(super) fn opening_of_stream(call: &Call) -> Vec<u8> {
    let start = json!({
        "event": "start",
        "sequenceNumber": "1",
        "start": {
            "accountSid": ACCOUNT_SID,
            "streamSid": call.stream_sid,
            "callSid": call.sid,
            "tracks": ["inbound"],
            "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1},
            "customParameters": {},
        },
        "streamSid": call.stream_sid,
    });
    let connected = br#"{"event":"connected","protocol":"Call","version":"1.0.0"}"#;
    let mut out = Vec::new();
    write_message(&mut out, TEXT, true, connected);
    write_message(&mut out, TEXT, true, start.to_string().as_bytes());
    out
}
