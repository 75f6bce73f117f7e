//! `TwiML`: what Twilio is told to do with a call.

use std::time::Duration;

use crate::Bridge;
use crate::records::delivery::TRANSFER_MAX;

/// How long a person's phone rings when a caller is put through.
pub(crate) const TRANSFER_RINGS: Duration = Duration::from_secs(25);

/// When the stream ends, Twilio asks `/stream-ended` what comes next; `<Hangup/>` stands behind it
/// in case that fails. `<Parameter>` allows 500 characters; the token takes 37.
///
/// The `action` carries Twilio's connection overrides behind the `#`: five more tries when nobody
/// accepts or a proxy reports a failure, which bridges our restart of a second or two.
pub(crate) fn twiml_connect_stream(public_url: &str, token: &str) -> String {
    let action = format!("{public_url}/stream-ended#rc=5&rp=ct,5xx&ct=2000&tt=15000");
    let stream = stream_url(public_url);
    twiml(&format!(
        "<Connect action=\"{}\"><Stream url=\"{}\">\
         <Parameter name=\"token\" value=\"{}\"/></Stream></Connect><Hangup/>",
        xml_escape(&action),
        xml_escape(&stream),
        xml_escape(token)
    ))
}

pub(crate) fn twiml_say(bridge: &Bridge, text: &str) -> String {
    let language = xml_escape(&bridge.agent.language);
    format!("<Say language=\"{language}\">{}</Say>", xml_escape(text))
}

pub(crate) fn stream_url(public_url: &str) -> String {
    format!("{}/media-stream", public_url.replacen("http", "ws", 1))
}

/// Rings the person. Twilio tells `/stream-ended` how that went.
pub(crate) fn twiml_transfer(bridge: &Bridge, number: &str) -> String {
    let action = format!("{}/stream-ended", bridge.config.public_url);
    twiml(&format!(
        "<Dial action=\"{}\" timeout=\"{}\" timeLimit=\"{}\">{}</Dial>",
        xml_escape(&action),
        TRANSFER_RINGS.as_secs(),
        TRANSFER_MAX.as_secs(),
        xml_escape(number)
    ))
}

/// Not even an empty line may stand before `<?xml` (Twilio error 12100).
pub(crate) fn twiml(verbs: &str) -> String {
    format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Response>{verbs}</Response>\n")
}

pub(crate) fn xml_escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&apos;"),
            // XML 1.0 has no way at all to write the other control characters.
            '\u{fffe}' | '\u{ffff}' => {}
            character if character.is_control() && !matches!(character, '\n' | '\t' | '\r') => {}
            character => escaped.push(character),
        }
    }
    escaped
}

#[cfg(test)]
mod tests;
