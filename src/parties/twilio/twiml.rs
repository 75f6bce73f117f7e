//! `TwiML`: the XML in which Twilio is told what to do with a call.
//!
//! Pure functions from values to a few lines of XML. Every value is escaped here, so a name, a
//! sentence or a token may hold anything. What is told when is decided in steps 4 and 8.
//!
//! ```text
//! <?xml version="1.0" encoding="UTF-8"?>
//! <Response><Say language="en-US">All our lines are busy.</Say><Hangup/></Response>
//! ```

use std::time::Duration;

use crate::records::delivery::TRANSFER_MAX;
use crate::records::event::Transfer;
use crate::setup::agent::Agent;

/// How long a person's phone rings when a caller is put through.
pub(crate) const TRANSFER_RINGS: Duration = Duration::from_secs(25);
/// From the end of the whisper to a key. A mailbox presses none.
const KEY_WITHIN: Duration = Duration::from_secs(8);
/// Twilio's connection overrides: five more tries when nobody accepts or a proxy reports a
/// failure, which bridges our restart of a second or two. What is behind the `#` is never sent.
const TRIES: &str = "#rc=5&rp=ct,5xx&ct=2000&tt=15000";

/// Connects the call to our Media Stream. When the stream ends, Twilio asks `/stream-ended` what
/// comes next; `<Hangup/>` stands behind it in case that fails.
pub(crate) fn connect_stream(public_url: &str, token: &str) -> String {
    let action = format!("{public_url}/stream-ended{TRIES}");
    response(&format!(
        "<Connect action=\"{}\"><Stream url=\"{}\"/></Connect><Hangup/>",
        xml_escape(&action),
        xml_escape(&stream_url(public_url, token))
    ))
}

/// Rings the person, who hears what `/whisper` has to say before they are connected; the caller
/// hears ringing until then (`answerOnBridge`). Twilio tells `/stream-ended` how that went. The
/// reason travels in the address, which Twilio signs: no process has to live until they pick up.
pub(crate) fn transfer(public_url: &str, transfer: &Transfer) -> String {
    let reason: String = form_urlencoded::byte_serialize(transfer.reason.as_bytes()).collect();
    response(&format!(
        "<Dial action=\"{}\" answerOnBridge=\"true\" timeout=\"{}\" timeLimit=\"{}\">\
         <Number url=\"{}\">{}</Number></Dial>",
        xml_escape(&format!("{public_url}/stream-ended{TRIES}")),
        TRANSFER_RINGS.as_secs(),
        TRANSFER_MAX.as_secs(),
        xml_escape(&format!("{public_url}/whisper?reason={reason}{TRIES}")),
        xml_escape(&transfer.number)
    ))
}

/// For the person who was rung. Twilio tells `/whisper` which key they press; without one it hangs
/// up on them.
pub(crate) fn whisper(public_url: &str, language: &str, sentence: &str) -> String {
    response(&format!(
        "<Gather action=\"{}\" numDigits=\"1\" finishOnKey=\"\" timeout=\"{}\">{}</Gather>\
         <Hangup/>",
        xml_escape(&format!("{public_url}/whisper{TRIES}")),
        KEY_WITHIN.as_secs(),
        say(language, sentence)
    ))
}

/// For the person who was rung: nothing more to say, so Twilio connects them with the caller.
pub(crate) fn take_the_call() -> String {
    response("")
}

/// Says that the caller is put through, then rings the person.
pub(crate) fn say_and_dial(public_url: &str, agent: &Agent, number: &str) -> String {
    let sentence = say(&agent.language, &agent.phrases.putting_through);
    response(&format!("{sentence}{}", dial(public_url, number)))
}

pub(crate) fn say_and_hang_up(language: &str, sentence: &str) -> String {
    response(&format!("{}<Hangup/>", say(language, sentence)))
}

/// The caller hears that the line is busy. Twilio does not answer the call, and bills nothing.
pub(crate) fn reject() -> String {
    response("<Reject reason=\"busy\"/>")
}

pub(crate) fn hang_up() -> String {
    response("<Hangup/>")
}

/// The Media Stream's address. The token stands in its path, so that the door knows at once whose
/// stream it is: Twilio forbids a query here, and a `<Parameter>` comes only with the `start`.
pub(crate) fn stream_url(public_url: &str, token: &str) -> String {
    format!("{}/media-stream/{token}", public_url.replacen("http", "ws", 1))
}

/// Twilio tells `/stream-ended` how that went.
fn dial(public_url: &str, number: &str) -> String {
    format!(
        "<Dial action=\"{}\" timeout=\"{}\" timeLimit=\"{}\">{}</Dial>",
        xml_escape(&format!("{public_url}/stream-ended")),
        TRANSFER_RINGS.as_secs(),
        TRANSFER_MAX.as_secs(),
        xml_escape(number)
    )
}

fn say(language: &str, text: &str) -> String {
    format!("<Say language=\"{}\">{}</Say>", xml_escape(language), xml_escape(text))
}

/// Not even an empty line may stand before `<?xml` (Twilio error 12100).
pub(crate) fn response(verbs: &str) -> String {
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
