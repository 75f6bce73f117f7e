//! Messages on the benchmark's lines: WebSocket frames (RFC 6455) and what Twilio and Ultravox
//! put in.
//!
//! [`write_message`] appends one, [`Inbox`] takes them apart. Written by hand, because buffers
//! are used again for the next message.

use std::fmt::Write as _;
use std::io::{self, Read};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::demo::backstage::moot;
use crate::demo::bench::call::Call;
use crate::demo::bench::line::Line;
use crate::demo::sound::{FRAME_BYTES, mulaw_to_pcm};

pub(super) const TEXT: u8 = 1;

pub(super) const BINARY: u8 = 2;

pub(super) const CLOSE: u8 = 8;

pub(super) const PING: u8 = 9;

pub(super) const PONG: u8 = 10;

pub(super) const NORMAL_CLOSE: [u8; 2] = 1_000_u16.to_be_bytes();

/// Whoever called masks what it sends. With what, is its affair.
const MASK: [u8; 4] = [0x37, 0xFA, 0x21, 0x3D];

/// One WebSocket message (RFC 6455, 5.2), appended.
pub(super) fn write_message(out: &mut Vec<u8>, opcode: u8, masked: bool, payload: &[u8]) {
    let mask_bit = if masked { 0x80 } else { 0 };
    out.push(0x80 | opcode);
    match (u8::try_from(payload.len()), u16::try_from(payload.len())) {
        (Ok(length), _) if length < 126 => out.push(mask_bit | length),
        (_, Ok(length)) => {
            out.push(mask_bit | 0x7E);
            out.extend_from_slice(&length.to_be_bytes());
        }
        _ => {
            out.push(mask_bit | 0x7F);
            out.extend_from_slice(&(payload.len() as u64).to_be_bytes());
        }
    }
    if masked {
        out.extend_from_slice(&MASK);
        out.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    } else {
        out.extend_from_slice(payload);
    }
}

/// Bytes off a line, and the messages in them.
pub(super) struct Inbox {
    bytes: Vec<u8>,
    understood: usize,
}

impl Inbox {
    /// With what has arrived already.
    pub(super) fn new(early: &[u8]) -> Inbox {
        Inbox { bytes: early.to_vec(), understood: 0 }
    }

    /// One `read`. The end of the line is an error.
    pub(super) fn fill(&mut self, line: &mut Line) -> io::Result<()> {
        let mut chunk = [0; 4 * 1_024];
        let count = line.read(&mut chunk)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.bytes.drain(..self.understood);
        self.understood = 0;
        self.bytes.extend_from_slice(&chunk[..count]);
        Ok(())
    }

    /// The next whole message and its opcode. The bridge sends every message in one piece.
    pub(super) fn next(&mut self, payload: &mut Vec<u8>) -> io::Result<Option<u8>> {
        let rest = &self.bytes[self.understood..];
        let Some((&[first, second], behind)) = rest.split_first_chunk() else { return Ok(None) };
        let (length, behind) = match second & 0x7F {
            126 => match behind.split_first_chunk() {
                Some((length, behind)) => (u64::from(u16::from_be_bytes(*length)), behind),
                None => return Ok(None),
            },
            127 => match behind.split_first_chunk() {
                Some((length, behind)) => (u64::from_be_bytes(*length), behind),
                None => return Ok(None),
            },
            length => (u64::from(length), behind),
        };
        let (mask, behind) = match (second & 0x80, behind.split_first_chunk()) {
            (0, _) => ([0; 4], behind),
            (_, Some((mask, behind))) => (*mask, behind),
            (_, None) => return Ok(None),
        };
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > 1 << 20 || first & 0x80 == 0 {
            return Err(io::Error::other("a message of more than 1 MiB, or in pieces"));
        }
        let Some((body, behind)) = behind.split_at_checked(length) else { return Ok(None) };
        payload.clear();
        payload.extend(body.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        self.understood = self.bytes.len() - behind.len();
        Ok(Some(first & 0x0F))
    }
}

/// A `ping`, if the machine has kept the agent from speaking for seconds.
pub(super) fn answer_ping(line: &Line, text: &[u8]) -> Result<(), String> {
    let text: Value = serde_json::from_slice(text).unwrap_or_default();
    let pong = json!({"type": "pong", "timestamp": text["timestamp"]});
    answer(line, TEXT, false, pong.to_string().as_bytes())
}

pub(super) fn answer(line: &Line, opcode: u8, masked: bool, payload: &[u8]) -> Result<(), String> {
    let mut out = Vec::with_capacity(payload.len() + 14);
    write_message(&mut out, opcode, masked, payload);
    line.write(&out).map_err(|error| error.to_string())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ToTwilio<'a> {
    pub(super) event: &'a str,
    #[serde(rename = "streamSid")]
    pub(super) stream_sid: &'a str,
    #[serde(borrow)]
    pub(super) media: Option<Media<'a>>,
    #[serde(borrow)]
    pub(super) mark: Option<Mark<'a>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Media<'a> {
    pub(super) payload: &'a str,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Mark<'a> {
    pub(super) name: &'a str,
}

pub(super) fn write_media_of_twilio(out: &mut Vec<u8>, call: &Call, number: u32, mulaw: &[u8]) {
    let mut text = String::with_capacity(512);
    let (sequence, chunk, timestamp) = (number + 2, number + 1, 155 + 20 * u64::from(number));
    // A String takes all that is written to it.
    moot(write!(
        text,
        "{{\"event\":\"media\",\"sequenceNumber\":\"{sequence}\",\"media\":{{\
         \"track\":\"inbound\",\"chunk\":\"{chunk}\",\"timestamp\":\"{timestamp}\",\
         \"payload\":\""
    ));
    BASE64.encode_string(mulaw, &mut text);
    moot(write!(text, "\"}},\"streamSid\":\"{}\"}}", call.stream_sid));
    write_message(out, TEXT, true, text.as_bytes());
}

pub(super) fn write_media_of_bridge(out: &mut Vec<u8>, call: &Call, mulaw: &[u8]) {
    let mut text = String::with_capacity(512);
    moot(write!(
        text,
        "{{\"event\":\"media\",\"streamSid\":\"{}\",\"media\":{{\"payload\":\"",
        call.stream_sid
    ));
    BASE64.encode_string(mulaw, &mut text);
    text.push_str("\"}}");
    write_message(out, TEXT, false, text.as_bytes());
}

pub(super) fn pcm_frame(mulaw: &[u8]) -> [u8; 2 * FRAME_BYTES] {
    let mut pcm = [0; 2 * FRAME_BYTES];
    for (sample, code) in pcm.chunks_exact_mut(2).zip(mulaw) {
        sample.copy_from_slice(&mulaw_to_pcm(*code).to_le_bytes());
    }
    pcm
}
