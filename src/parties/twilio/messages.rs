//! The messages of a Media Stream (twilio.com/docs/voice/media-streams/websocket-messages).
//!
//! What Twilio sends is read here, once and typed; what Twilio takes is written by the caller's leg
//! (`stream`). A known event in a wrong shape is an error, and ends the stream. An unknown event is
//! handed on by its name, because providers add events. Sound is decoded into a buffer that the
//! reading thread uses again and again: fifty messages a second and call take no memory of their
//! own and build no JSON tree.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;

use crate::toolbox::sound::SAMPLE_RATE_HZ;

/// What Twilio sends. One real message of each kind:
///
/// ```text
/// {"event":"connected","protocol":"Call","version":"1.0.0"}
/// {"event":"start","sequenceNumber":"1","streamSid":"MZ…","start":{"accountSid":"AC…",
///  "streamSid":"MZ…","callSid":"CA…","tracks":["inbound"],"mediaFormat":{"encoding":
///  "audio/x-mulaw","sampleRate":8000,"channels":1},"customParameters":{}}}
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
pub(crate) enum FromTwilio {
    Connected,
    Start(Start),
    /// Mu-law bytes, which have been decoded into the reader's buffer.
    Media,
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
}

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct MediaFormat {
    pub(crate) encoding: String,
    sample_rate: usize,
}

/// The envelope of them all. `borrow` works on a bare `Cow` only, hence the empty texts for "none".
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    event: Cow<'a, str>,
    #[serde(borrow, default, rename = "streamSid")]
    stream_sid: Cow<'a, str>,
    #[serde(borrow)]
    media: Option<Media<'a>>,
    start: Option<Start>,
    dtmf: Option<Dtmf>,
    mark: Option<Mark>,
}

#[derive(Deserialize)]
struct Media<'a> {
    #[serde(borrow)]
    payload: Cow<'a, str>,
}

#[derive(Deserialize)]
struct Dtmf {
    digit: String,
}

#[derive(Deserialize)]
struct Mark {
    name: String,
}

impl Start {
    /// Media Streams know no other sound today (mu-law at 8000 Hz); we know no other sound at all.
    pub(crate) fn has_our_sound(&self) -> bool {
        let MediaFormat { encoding, sample_rate } = &self.media_format;
        encoding == "audio/x-mulaw" && *sample_rate == SAMPLE_RATE_HZ
    }
}

impl FromTwilio {
    /// `stream_sid` is the stream this socket carries, or empty before `start` has said so. Sound
    /// goes into `mulaw`, in the place of what was there.
    pub(crate) fn parse(
        text: &str,
        stream_sid: &str,
        mulaw: &mut Vec<u8>,
    ) -> Result<FromTwilio, String> {
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
            "media" => {
                mulaw.clear();
                let payload = envelope.media.ok_or_else(missing)?.payload;
                let decoded = BASE64.decode_vec(payload.as_bytes(), mulaw);
                decoded.map_err(|_| "a payload that is not base64")?;
                FromTwilio::Media
            }
            "dtmf" => FromTwilio::Dtmf(envelope.dtmf.ok_or_else(missing)?.digit),
            "mark" => FromTwilio::Mark(envelope.mark.ok_or_else(missing)?.name),
            "stop" => FromTwilio::Stop,
            unknown => FromTwilio::Unknown(unknown.to_owned()),
        })
    }
}

#[cfg(test)]
mod tests;
