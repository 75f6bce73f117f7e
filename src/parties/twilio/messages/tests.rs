//! The messages on the Media Stream.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use serde_json::json;

use crate::parties::twilio::messages::FromTwilio;
use crate::parties::twilio::stream::media_in_short;
use crate::testing::messages_in_doc;

#[test]
fn the_messages_shown_in_the_text_are_understood() {
    let messages = messages_in_doc(
        include_str!("../messages.rs"),
        "What Twilio sends. One real message of each kind:",
    );
    let parsed: Vec<FromTwilio> = messages
        .iter()
        .map(|text| parse(&text.replace("<base64>", "/w=="), "").unwrap().0)
        .collect();
    let [
        FromTwilio::Connected,
        FromTwilio::Start(start),
        FromTwilio::Media,
        FromTwilio::Dtmf(digit),
        FromTwilio::Mark(mark),
        FromTwilio::Stop,
    ] = parsed.as_slice()
    else {
        assert_eq!(format!("{parsed:?}"), "connected, start, media, dtmf, mark, stop");
        return;
    };
    assert_eq!((start.stream_sid.as_str(), start.call_sid.as_str()), ("MZ…", "CA…"));
    assert_eq!(start.media_format.encoding, "audio/x-mulaw");
    assert_eq!(start.media_format.sample_rate, 8_000);
    assert_eq!((digit.as_str(), mark.as_str()), ("1", "goodbye"));
    for text in messages[1..].iter().map(|text| text.replace("<base64>", "/w==")) {
        parse(&text, "MZ…").unwrap();
        let why = parse(&text, "MZother").unwrap_err();
        assert!(why.ends_with("message for another stream"), "{text}: {why}");
    }
}

#[test]
fn twilio_may_order_and_escape_as_it_likes() {
    let cases = [
        (
            r#"{"streamSid":"MZ1","media":{"payload":"ab\/\/+w==","timestamp":"155","chunk":"1",
                "track":"inbound"},"sequenceNumber":"2","event":"media"}"#,
            FromTwilio::Media,
        ),
        (
            r#"{"event":"\u006dedia","streamSid":"\u004DZ1","media":{"payload":"\u002b\u0077=="}}"#,
            FromTwilio::Media,
        ),
        (r#"{"event":"media","streamSid":"MZ1","media":{"payload":""}}"#, FromTwilio::Media),
        // Numbers where texts are documented, and the other way round, where we do not look.
        (
            r#"{"event":"media","sequenceNumber":2,"streamSid":"MZ1","media":{"track":7,
                "chunk":1,"timestamp":155,"payload":"/w==","new":{"key":[null,1.5,true]}}}"#,
            FromTwilio::Media,
        ),
        (
            r#"{"event":"stop","sequenceNumber":50,"streamSid":"MZ1","stop":null,"media":null}"#,
            FromTwilio::Stop,
        ),
        (r#"{"event":"stop","streamSid":"MZ1"}"#, FromTwilio::Stop),
        (
            r#"{"dtmf":{"digit":"\u0023","track":"inbound_track"},"streamSid":"MZ1",
                "event":"dtmf"}"#,
            FromTwilio::Dtmf("#".into()),
        ),
        (
            r#"{"mark":{"name":"a \"b\" \\ ü"},"event":"mark","streamSid":"MZ1"}"#,
            FromTwilio::Mark("a \"b\" \\ ü".into()),
        ),
        (
            r#"{"event":"weather","streamSid":"MZ1","weather":{"rain":[[[[]]]]}}"#,
            FromTwilio::Unknown("weather".into()),
        ),
        (r#"{"event":"","streamSid":"MZ1"}"#, FromTwilio::Unknown(String::new())),
    ];
    for (text, wanted) in cases {
        assert_eq!(parse(text, "MZ1").map(|(message, _)| message), Ok(wanted), "{text}");
    }
}

#[test]
fn sound_is_decoded_in_the_place_of_what_was_there() {
    let cases: [(&str, &[u8]); 5] = [
        (r"ab\/\/+w==", &[0x69, 0xbf, 0xff, 0xfb]),
        (r"\u002b\u0077==", &[0xfb]),
        ("/w==", &[0xff]),
        ("", &[]),
        ("fn5+fg==", &[0x7e, 0x7e, 0x7e, 0x7e]),
    ];
    let mut mulaw = vec![1, 2, 3];
    for (payload, wanted) in cases {
        let text =
            format!(r#"{{"event":"media","streamSid":"MZ1","media":{{"payload":"{payload}"}}}}"#);
        assert_eq!(FromTwilio::parse(&text, "MZ1", &mut mulaw), Ok(FromTwilio::Media));
        assert_eq!(mulaw, wanted, "{payload}");
    }
}

/// With the sound, if there is any.
fn parse(text: &str, stream_sid: &str) -> Result<(FromTwilio, Vec<u8>), String> {
    let mut mulaw = Vec::new();
    FromTwilio::parse(text, stream_sid, &mut mulaw).map(|message| (message, mulaw))
}

#[test]
fn a_start_needs_no_parameters_but_a_call_and_a_format() {
    let start = |fields: &str| format!("{{\"event\":\"start\",\"start\":{{{fields}}}}}");
    let format = "\"mediaFormat\":{\"channels\":1,\"sampleRate\":8000,\"encoding\":\"x\"}";
    let bare = start(&format!("{format},\"callSid\":\"CA1\",\"streamSid\":\"MZ1\""));
    let Ok((FromTwilio::Start(found), _)) = parse(&bare, "") else {
        assert_eq!(bare, "a start without customParameters");
        return;
    };
    assert_eq!((found.call_sid.as_str(), found.stream_sid.as_str()), ("CA1", "MZ1"));

    let all = format!("{format},\"callSid\":\"CA1\",\"streamSid\":\"MZ1\"");
    // Nothing is asked of what may come beside them.
    let more = start(&format!("{all},\"customParameters\":{{\"token\":1}}"));
    assert!(matches!(parse(&more, ""), Ok((FromTwilio::Start(_), _))));
    let wrong = [
        start(&format!("{format},\"callSid\":\"CA1\"")),
        start(&format!("{format},\"streamSid\":\"MZ1\"")),
        start("\"callSid\":\"CA1\",\"streamSid\":\"MZ1\""),
    ];
    for text in wrong {
        assert!(parse(&text, "").is_err(), "{text}");
    }
}

#[test]
fn a_known_event_in_a_wrong_shape_is_an_error() {
    let cases = [
        (r#"{"event":"start","streamSid":"MZ1"}"#, "a start message without its content"),
        (r#"{"event":"media","streamSid":"MZ1"}"#, "a media message without its content"),
        (
            r#"{"event":"media","streamSid":"MZ1","media":null}"#,
            "a media message without its content",
        ),
        (r#"{"event":"dtmf","streamSid":"MZ1"}"#, "a dtmf message without its content"),
        (r#"{"event":"mark","streamSid":"MZ1"}"#, "a mark message without its content"),
        (
            r#"{"event":"media","streamSid":"MZ1","media":{"playload":"/w=="}}"#,
            "not a message of Twilio's: missing field `payload`",
        ),
        (
            r#"{"event":"media","streamSid":"MZ1","media":{"payload":255}}"#,
            "not a message of Twilio's: invalid type: integer `255`",
        ),
        (
            r#"{"event":"media","streamSid":"MZ1","media":{"payload":"no base64"}}"#,
            "a payload that is not base64",
        ),
        (r#"{"event":"mark","streamSid":"MZ1","mark":{}}"#, "not a message of Twilio's: missing"),
        (r#"{"streamSid":"MZ1"}"#, "not a message of Twilio's: missing field `event`"),
        (r#"{"event":7,"streamSid":"MZ1"}"#, "not a message of Twilio's: invalid type"),
        (r#"{"event":"stop","streamSid":"MZ2"}"#, "a stop message for another stream"),
        (r#"{"event":"media","media":{"payload":""}}"#, "a media message for another stream"),
        (r#"{"event":"stop","streamSid":"mz1"}"#, "a stop message for another stream"),
        ("", "not a message of Twilio's: EOF"),
        ("{", "not a message of Twilio's: EOF"),
        ("[]", "not a message of Twilio's: "),
        ("null", "not a message of Twilio's: "),
        ("hello", "not a message of Twilio's: "),
        (r#"{"event":"stop","streamSid":"MZ1"}{}"#, "not a message of Twilio's: trailing"),
    ];
    for (text, wanted) in cases {
        let why = parse(text, "MZ1").unwrap_err();
        assert!(why.starts_with(wanted), "{text}: {why}");
    }
    let deep = format!("{{\"event\":\"stop\",\"streamSid\":\"MZ1\",\"x\":{}", "[".repeat(60_000));
    assert!(parse(&deep, "MZ1").is_err(), "deep, not whole, and no end of the stack");
}

#[test]
fn of_a_sound_only_its_beginning_is_shown() {
    let media = format!(r#"{{"media":{{"payload":"{}"}}}}"#, "A".repeat(216));
    let short = format!(r#"{{"media":{{"payload":"{}…"}}}}"#, "A".repeat(24));
    assert_eq!(media_in_short(&media), short);
    // serde takes a list for an object.
    for odd in ["[1,2]", "7", "null", "{\"media\":7}", "{\"media\":{\"payload\":{}}}", "{"] {
        assert!(media_in_short(odd).len() < 40, "{odd}");
    }
}

#[test]
fn our_sound_has_both_the_right_encoding_and_the_right_pace() {
    let cases = [
        ("audio/x-mulaw", 8_000, true),
        ("audio/x-mulaw", 16_000, false),
        ("audio/x-l16", 8_000, false),
    ];
    for (encoding, rate, is_ours) in cases {
        let format = json!({"encoding": encoding, "sampleRate": rate});
        let start = json!({"streamSid": "MZ1", "callSid": "CA1", "mediaFormat": format});
        let message = json!({"event": "start", "streamSid": "MZ1", "start": start}).to_string();
        let parsed = parse(&message, "").unwrap().0;
        let found = matches!(parsed, FromTwilio::Start(start) if start.has_our_sound() == is_ours);
        assert!(found, "{encoding} {rate}");
    }
}
