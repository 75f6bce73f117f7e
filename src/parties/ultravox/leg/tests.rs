//! Messages from the agent.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use crate::parties::ultravox::leg::FromAgent;
use crate::records::transcript::Speaker;
use crate::testing::messages_in_doc;

#[test]
fn the_agents_messages_shown_in_the_text_are_understood() {
    let messages = messages_in_doc(
        include_str!("../leg.rs"),
        "What Ultravox sends. One real message of each kind that is text:",
    );
    let parsed: Vec<FromAgent> =
        messages.iter().map(|text| FromAgent::parse(text).unwrap()).collect();
    let [
        FromAgent::Other(call_started),
        FromAgent::State(state),
        FromAgent::Transcript(heard),
        FromAgent::Invocation(invocation),
        FromAgent::ClearBuffer,
        FromAgent::Other(pong),
    ] = parsed.as_slice()
    else {
        assert_eq!(messages.concat(), "one of another kind");
        return;
    };
    assert_eq!((call_started.as_str(), pong.as_str()), ("call_started", "pong"));
    assert_eq!(state, "listening");
    assert_eq!((heard.speaker, heard.ordinal), (Speaker::Agent, 3));
    assert_eq!((heard.text.as_deref(), heard.delta.as_deref()), (None, Some(" help?")));
    assert!(!heard.finished && !heard.typed);
    assert_eq!((invocation.tool.as_str(), invocation.id.as_str()), ("verify", "i1"));
    assert!(invocation.parameters.is_empty());
}

#[test]
fn what_is_new_from_the_agent_is_skipped_and_what_is_wrong_is_told() {
    let new = [
        ("{\"type\":\"debug\",\"message\":\"x\"}", "debug"),
        ("{\"type\":\"call_event\",\"callId\":\"7c21\",\"extra\":[]}", "call_event"),
        ("{\"no\":\"type\"}", ""),
        ("{\"type\":7}", ""),
        ("[]", ""),
    ];
    for (text, kind) in new {
        let parsed = FromAgent::parse(text).unwrap();
        assert!(matches!(parsed, FromAgent::Other(found) if found == kind), "{text}");
    }
    let transcript = "a transcript without role or ordinal";
    let invocation = "an invocation without name or id";
    let wrong = [
        ("{\"type\":\"transcript\",\"role\":\"agent\",\"text\":\"x\"}", transcript),
        ("{\"type\":\"transcript\",\"role\":\"agent\",\"ordinal\":-1}", transcript),
        ("{\"type\":\"transcript\",\"ordinal\":1}", transcript),
        ("{\"type\":\"transcript\",\"role\":\"ghost\",\"ordinal\":1}", transcript),
        ("{\"type\":\"client_tool_invocation\",\"toolName\":\"x\"}", invocation),
        ("{\"type\":\"client_tool_invocation\",\"invocationId\":\"i1\"}", invocation),
        ("not JSON", "not JSON: "),
        ("", "not JSON: "),
        ("{\"type\":\"state\"", "not JSON: "),
    ];
    for (text, wanted) in wrong {
        let why = FromAgent::parse(text).err().unwrap();
        assert!(why.starts_with(wanted), "{text}: {why}");
    }
}
