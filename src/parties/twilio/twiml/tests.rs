//! The `TwiML` that goes to Twilio.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use crate::parties::twilio::Form;
use crate::parties::twilio::twiml::{connect_stream, transfer, whisper, xml_escape};
use crate::records::event::Transfer;
use crate::toolbox::random::random_hex;

#[test]
fn the_answer_connects_a_stream_and_names_what_comes_after() {
    let answer = connect_stream("https://bridge.example", "CA1/0123abcd");
    let begins = concat!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Response>",
        "<Connect action=\"https://bridge.example/stream-ended",
    );
    let ends = concat!(
        "\"><Stream url=\"wss://bridge.example/media-stream/CA1/0123abcd\"/>",
        "</Connect><Hangup/></Response>\n",
    );
    let overrides = answer.strip_prefix(begins).and_then(|rest| rest.strip_suffix(ends));
    // What Twilio is to do when we do not answer stands in the fragment, which it never sends.
    let overrides = overrides.unwrap();
    assert!(overrides.is_empty() || overrides.starts_with('#'), "{answer}");
    assert!(!overrides.contains(['"', '<', '?']), "{answer}");
}

#[test]
fn an_odd_address_or_token_cannot_break_the_answer() {
    let answer = connect_stream("https://h:8443/http/a&b", "\"/><Dial>1</Dial>'");
    assert!(answer.contains("action=\"https://h:8443/http/a&amp;b/stream-ended"), "{answer}");
    let token = "&quot;/&gt;&lt;Dial&gt;1&lt;/Dial&gt;&apos;";
    let stream = format!("<Stream url=\"wss://h:8443/http/a&amp;b/media-stream/{token}\"/>");
    assert!(answer.contains(&stream), "{answer}");

    let token = random_hex();
    assert_eq!(token.len(), 32);
    assert!(token.bytes().all(|byte| byte.is_ascii_hexdigit()), "{token}");
    assert_ne!(token, random_hex());
}

#[test]
fn a_reason_comes_back_from_twilio_as_it_was_given() {
    for reason in ["", "Anna Berg, about a claim", "a&b=c#d?e+f%20 \"<Söhne>\" 你好", "a\nb"] {
        let whom =
            Transfer { number: "+4930555001".into(), reason: reason.into(), ..<_>::default() };
        let dial = transfer("https://h:8443/a&b", &whom);
        let (_, url) = dial.split_once("<Number url=\"").unwrap();
        let (url, behind) = url.split_once('"').unwrap();
        assert_eq!(behind, ">+4930555001</Number></Dial></Response>\n", "{dial}");
        // Twilio sends what stands before the fragment.
        let url = url.replace("&amp;", "&");
        let (address, query) = url.split('#').next().unwrap().split_once('?').unwrap();
        assert_eq!(address, "https://h:8443/a&b/whisper", "{dial}");
        assert_eq!(Form::parse(query.as_bytes()).0, [("reason".to_owned(), reason.to_owned())]);
    }
}

#[test]
fn whoever_presses_no_key_is_hung_up_on() {
    let asked = whisper("https://bridge.example", "de-DE", "Für \"Söhne\" & <b>.");
    let wanted = concat!(
        "<Response><Gather action=\"https://bridge.example/whisper#rc=5&amp;rp=ct,5xx&amp;ct=2000",
        "&amp;tt=15000\" numDigits=\"1\" finishOnKey=\"\" timeout=\"8\"><Say language=\"de-DE\">",
        "Für &quot;Söhne&quot; &amp; &lt;b&gt;.</Say></Gather><Hangup/></Response>\n",
    );
    assert_eq!(asked.split_once('\n').unwrap().1, wanted);
}

#[test]
fn xml_holds_any_text() {
    let cases = [
        ("", ""),
        ("plain text", "plain text"),
        ("a<b>&\"c\"'d'", "a&lt;b&gt;&amp;&quot;c&quot;&apos;d&apos;"),
        ("&amp;", "&amp;amp;"),
        ("]]>", "]]&gt;"),
        ("Grüß 👋 你好", "Grüß 👋 你好"),
        ("line\nline\tline\r", "line\nline\tline\r"),
        ("\0\u{1}\u{8}a\u{b}b\u{c}c\u{1f}d\u{7f}\u{85}", "abcd"),
    ];
    for (text, wanted) in cases {
        assert_eq!(xml_escape(text), wanted, "{text:?}");
    }
}
