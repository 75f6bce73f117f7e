//! Twilio brings the call: webhooks in, `TwiML` out, and a Media Stream for the sound.
//!
//! Here are the form of a webhook and its signature. The rooms inside: `twiml` writes what Twilio
//! is told, `messages` and `stream` are the caller's leg, `rest` is Twilio's own API for calls
//! that go out. Nothing here decides about a call; and nothing behind here checks a signature
//! again.

pub(crate) mod keys;
pub(crate) mod messages;
pub(crate) mod rest;
pub(crate) mod stream;
mod turn;
pub(crate) mod twiml;

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::hmac;

use crate::door::REQUEST_WITHIN;
use crate::door::reply::Reply;
use crate::toolbox::failure::Secret;
use crate::toolbox::log::log;
use crate::toolbox::metrics::refused;

/// Twilio drops a webhook's answer after this long.
pub(crate) const TWILIO_WEBHOOK: Duration = Duration::from_secs(15);

/// Only in webhooks that Twilio signs by a Shared Key, in the place of the Auth Token.
pub(crate) const SHARED_KEY: &str = "X-Twilio-Webhooks-Signature-Settings";
/// In the address of a webhook: of which outgoing call it tells.
pub(crate) const OUTGOING: &str = "outgoing";
/// In that of `/whisper`: why the caller is put through.
pub(crate) const REASON: &str = "reason";

const _: () = assert!(REQUEST_WITHIN.as_secs() > TWILIO_WEBHOOK.as_secs());

/// What Twilio's routes say in local mode, whoever asks: nobody could tell whether it is Twilio.
pub(crate) fn not_in_use(url: &str) -> Reply {
    log!(Warn, "{url}: not in use, callbridge is in local mode (PUBLIC_URL is not set)");
    refused("local_mode");
    Reply::text(404, "not in use: callbridge is in local mode (PUBLIC_URL is not set)")
}

/// A form body: name and value pairs, decoded, in the order in which they came.
pub(crate) struct Form(pub(crate) Vec<(String, String)>);

impl Form {
    pub(crate) fn parse(body: &[u8]) -> Form {
        Form(form_urlencoded::parse(body).into_owned().collect())
    }

    /// The first value of that name, or nothing: fields may be missing or empty.
    pub(crate) fn get(&self, name: &str) -> &str {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
            .unwrap_or_default()
    }

    /// What we have put into the address ourselves, and nothing else of what stands there: it comes
    /// behind what Twilio says.
    pub(crate) fn add_our_own(&mut self, url: &str) {
        let query = url.split_once('?').map(|(_, query)| query).unwrap_or_default();
        let fields = Form::parse(query.as_bytes()).0.into_iter();
        self.0.extend(fields.filter(|(name, _)| name == OUTGOING || name == REASON));
    }

    /// What tells of the call, for the page. Among the rest there is a token of Twilio's.
    pub(crate) fn redacted(&self) -> String {
        const SHOWN: [&str; 5] = ["CallSid", "From", "To", "CallStatus", "Direction"];
        let lines = self.0.iter().filter(|(name, _)| SHOWN.contains(&name.as_str()));
        let lines: Vec<String> = lines.map(|(name, value)| format!("{name}={value}")).collect();
        format!("{}\n… and {} more", lines.join("\n"), self.0.len() - lines.len())
    }
}

/// Twilio's signature: base64 of HMAC-SHA1, keyed with the account's Auth Token, over the URL it
/// called and, for a form, every name and value, sorted by name and put together without anything
/// between. Twilio leaves the port out of what it signs; its own libraries accept both ways, and
/// so does this (twilio.com/docs/usage/security#validating-requests).
pub(crate) fn signature_is_valid(token: &Secret, url: &str, form: &Form, signature: &str) -> bool {
    let Ok(signature) = BASE64.decode(signature) else {
        return false;
    };
    let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, token.reveal().as_bytes());
    // A name that comes twice is signed once for each different value.
    let mut pairs: Vec<(&str, &str)> =
        form.0.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    pairs.sort_unstable();
    pairs.dedup();
    let rest: String = pairs.into_iter().flat_map(|(name, value)| [name, value]).collect();
    url_with_and_without_port(url).iter().any(|url| {
        // `verify` compares in constant time.
        hmac::verify(&key, format!("{url}{rest}").as_bytes(), &signature).is_ok()
    })
}

/// What to do about a signature that is not valid. `shared_key` is what that header says, if it is
/// there.
pub(crate) fn why_invalid(signature: &str, shared_key: &str) -> &'static str {
    match (signature, shared_key) {
        ("", "") => {
            "Twilio's signature is missing: check that it is Twilio who calls, and that no proxy \
             takes its headers away"
        }
        (_, "") => {
            "Twilio's signature is wrong: check TWILIO_AUTH_TOKEN, and that PUBLIC_URL is the \
             address Twilio calls"
        }
        _ => {
            "Twilio has signed with a Shared Key, which callbridge does not know: in Twilio's \
             console, take the Webhook Rule for this address away, so that the Auth Token signs"
        }
    }
}

pub(crate) fn url_with_and_without_port(url: &str) -> [String; 2] {
    let Some((scheme, rest)) = url.split_once("://") else {
        return [url.to_owned(), url.to_owned()];
    };
    let host_end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(host_end);
    let host_start = authority.rfind('@').map_or(0, |at| at + 1);
    let (user, host_and_port) = authority.split_at(host_start);
    let has_port = |colon: usize| host_and_port[colon + 1..].bytes().all(|b| b.is_ascii_digit());
    let (host, port) = match host_and_port.rfind(':').filter(|&colon| has_port(colon)) {
        Some(colon) => (&host_and_port[..colon], &host_and_port[colon + 1..]),
        None => (host_and_port, if matches!(scheme, "https" | "wss") { "443" } else { "80" }),
    };
    [format!("{scheme}://{user}{host}{path}"), format!("{scheme}://{user}{host}:{port}{path}")]
}

/// Two letters for what it names, and 32 hexadecimal digits. Not a character less or more: nothing
/// separates names and values in what Twilio signs, so whoever has caught one signed webhook could
/// push characters over to the next field, and would have a new call's id each time. A call's id
/// becomes part of a file's name, too.
pub(crate) fn is_sid(kind: &str, text: &str) -> bool {
    text.strip_prefix(kind)
        .is_some_and(|id| id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Who is calling, as a word where the number is withheld. Some networks have no other way to say
/// that than the word on a telephone's keypad: `+266696687` is nobody's number.
pub(crate) fn caller(from: &str) -> &str {
    const WORDS: [&str; 6] =
        ["anonymous", "restricted", "unavailable", "unknown", "blocked", "private"];
    let digits = from.strip_prefix('+').unwrap_or_default();
    WORDS.into_iter().find(|word| on_keypad(word) == digits).unwrap_or(from)
}

fn on_keypad(word: &str) -> String {
    // From `a` to `z`.
    const DIGITS: &[u8; 26] = b"22233344455566677778889999";
    let at = |letter: u8| usize::from(letter.wrapping_sub(b'a'));
    word.bytes()
        .filter_map(|letter| DIGITS.get(at(letter)))
        .map(|&digit| char::from(digit))
        .collect()
}

/// The last word on a call, as Twilio spells it (one l in "canceled").
pub(crate) fn is_final(call_status: &str) -> bool {
    matches!(call_status, "completed" | "busy" | "failed" | "no-answer" | "canceled")
}

#[cfg(test)]
mod tests;
