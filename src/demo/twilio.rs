//! Pretend Twilio's webhooks: the forms it posts, how it signs them, what it does with the
//! answer.
//!
//! [`Ringing`] is a call whose first webhook has been answered. It can go on as the TwiML says:
//! open the Media Stream, or post to the `action` when the stream is over.
//!
//! The signature is computed here a second time, from Twilio's description and not from the
//! server's code, so that a mistake there is not repeated here. Real forms carry more fields
//! than the server needs, empty ones and unknown ones; so do these.

use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::demo::backstage::random_hex;
use crate::demo::http::HttpAnswer;
use crate::demo::phone::Phone;
use crate::demo::trouble::Trouble;
use crate::demo::twiml::Twiml;
use crate::demo::world::World;
use crate::demo::{ACCOUNT_SID, OUR_NUMBER};

/// A call that has been answered with TwiML.
#[derive(Clone, Debug)]
pub struct Ringing {
    pub call_sid: String,
    pub from: String,
    #[cfg(test)]
    pub answer: HttpAnswer,
    pub twiml: Twiml,
    pub answered_at: Instant,
}

impl Ringing {
    /// Does what the TwiML says: opens the stream, sends `connected` and
    /// `start`. From then on it is a phone.
    #[track_caller]
    pub fn open_stream(&self, world: &World) -> Result<Phone, Trouble> {
        let Some(url) = &self.twiml.stream_url else {
            return Err(world.trouble(format!("the TwiML has no stream: {}", self.twiml.xml)));
        };
        let path = url
            .strip_prefix("wss://")
            .and_then(|rest| rest.find('/').and_then(|at| rest.get(at..)));
        let signature = twilio_signature(&world.auth_token, url, &[]);
        let phone = world.upgrade(path.unwrap_or("/"), Some(&signature))?;
        phone.send_connected()?;
        phone.send_start(&self.call_sid)?;
        Ok(phone)
    }

    /// Posts to the `action` of `<Connect>`, as Twilio does when a stream is
    /// over while the call is not.
    #[track_caller]
    pub fn stream_ended(&self, world: &World) -> Result<HttpAnswer, Trouble> {
        let action = self.twiml.action.clone().unwrap_or_default();
        let path = action.strip_prefix(&world.public_url).unwrap_or(&action);
        world.webhook(path, &self.status_form("in-progress"))
    }

    /// Posts `/call-status`: how Twilio tells that the call is over.
    #[track_caller]
    pub fn call_status(&self, world: &World, status: &str) -> Result<HttpAnswer, Trouble> {
        world.webhook("/call-status", &self.status_form(status))
    }

    fn status_form<'a>(&'a self, status: &'a str) -> Vec<(&'a str, &'a str)> {
        vec![
            ("CallSid", &self.call_sid),
            ("AccountSid", ACCOUNT_SID),
            ("From", &self.from),
            ("To", OUR_NUMBER),
            ("CallStatus", status),
            ("ApiVersion", "2010-04-01"),
            ("Direction", "inbound"),
        ]
    }
}

#[cfg(test)]
impl Ringing {
    /// Whether the door turns its stream away: no call waits for it with this token.
    pub fn stream_is_refused(&self, world: &World) -> bool {
        self.open_stream(world).is_err_and(|why| why.to_string().contains("answered 403"))
    }

    /// As [`Ringing::stream_ended`], with further form fields, and with the
    /// TwiML of the answer: the same call, one step on.
    #[track_caller]
    pub fn next(&self, world: &World, extra: &[(&str, &str)]) -> Result<Ringing, Trouble> {
        let action = self.twiml.action.as_ref().or(self.twiml.dial_action.as_ref());
        let action = action.map_or("/stream-ended", String::as_str);
        let path = action.strip_prefix(&world.public_url).unwrap_or(action);
        let mut form = self.status_form("in-progress");
        for (name, value) in extra {
            form.retain(|(present, _)| present != name);
            form.push((*name, *value));
        }
        let form: Vec<(String, String)> =
            form.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        world.ask_for_twiml(path, &self.from, &form)
    }
}

/// What Twilio posts when a number is called: the usual fields, empty ones, a
/// name with umlauts, and one that nobody has heard of yet.
pub(super) fn incoming_call_form(number: &str) -> Vec<(String, String)> {
    let call_sid = format!("CA{}", random_hex(16));
    [
        ("CallSid", call_sid.as_str()),
        ("AccountSid", ACCOUNT_SID),
        ("From", number),
        ("To", OUR_NUMBER),
        ("CallStatus", "ringing"),
        ("ApiVersion", "2010-04-01"),
        ("Direction", "inbound"),
        ("CallerName", "Jürgen Größe & Söhne"),
        ("CallToken", "%7B%22parentCallInfoToken%22%3A%22eyJhbGciOi+JFUzI1NiJ9%22%7D"),
        ("StirVerstat", "TN-Validation-Passed-A"),
        ("FromCity", ""),
        ("FromState", ""),
        ("FromZip", ""),
        ("FromCountry", "DE"),
        ("ToCity", "LONDON"),
        ("ToState", ""),
        ("ToZip", ""),
        ("ToCountry", "GB"),
        ("Caller", number),
        ("CallerCity", ""),
        ("CallerState", ""),
        ("CallerZip", ""),
        ("CallerCountry", "DE"),
        ("Called", OUR_NUMBER),
        ("CalledCity", "LONDON"),
        ("CalledState", ""),
        ("CalledZip", ""),
        ("CalledCountry", "GB"),
        ("FieldOfTheFuture", "a=1&b=2"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec()
}

/// `X-Twilio-Signature`: HMAC-SHA1 over the URL and, for a form, over each
/// name and decoded value in the byte order of the names.
pub fn twilio_signature(auth_token: &str, url: &str, form: &[(&str, &str)]) -> String {
    let mut sorted = form.to_vec();
    sorted.sort_unstable();
    let mut text = without_fragment(url).to_owned();
    for (name, value) in sorted {
        text.push_str(name);
        text.push_str(value);
    }
    let key =
        ring::hmac::Key::new(ring::hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, auth_token.as_bytes());
    BASE64.encode(ring::hmac::sign(&key, text.as_bytes()))
}

pub(super) fn form_body(form: &[(&str, &str)]) -> String {
    form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish()
}

pub(super) fn without_fragment(url: &str) -> &str {
    url.split('#').next().unwrap_or(url)
}
