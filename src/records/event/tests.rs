//! How each event stands on disk, and what a reader makes of one that is odd.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use serde::Deserialize as _;
use serde_json::{Value, json};

use crate::records::ended_by::EndedBy;
use crate::records::event::{Direction, Event, Transfer};
use crate::records::transcript::Speaker;

/// Journals are read by later versions, by the page, and by whoever has a script for them.
#[test]
fn every_event_keeps_its_spelling() {
    let asked = r#""id":"i1","tool":"verify","stage":"greeting","arguments":{"name":"Anna"}"#;
    let lines = [
        r#"{"event":"ring","callSid":"CA1","number":"+4930123456","direction":"out","to":"+44"}"#,
        r#"{"event":"greeting","from":"default","ms":3,"why":"n8n leaves it to the agent"}"#,
        r#"{"event":"decided","what":"agent","by":"n8n","stage":"claims","facts":"Anna."}"#,
        r#"{"event":"agent","callId":"7c21","agent":1,"stage":"greeting"}"#,
        r#"{"event":"answer","what":"stream","ms":412}"#,
        r#"{"event":"stream","streamSid":"MZ1"}"#,
        r#"{"event":"first_word","ms":9}"#,
        r#"{"event":"said","agent":1,"ordinal":2,"speaker":"Agent","text":"Hello."}"#,
        r#"{"event":"turn","ms":900}"#,
        &format!(r#"{{"event":"tool_begins",{asked}}}"#),
        &format!(r#"{{"event":"tool",{asked},"result":"Yes.","outcome":"done","ms":1}}"#),
        r#"{"event":"stage","stage":"main_convo"}"#,
        r#"{"event":"status","status":"in-progress","answeredBy":"human"}"#,
        r#"{"event":"goodbye","endedBy":"CallerLeft","ms":9}"#,
        r#"{"event":"transfer","person":"Claims","number":"+4930555001","reason":"Anna Berg"}"#,
        r#"{"event":"accepted"}"#,
        r#"{"event":"end","endedBy":"AgentHungUp"}"#,
        r#"{"event":"summary","text":"A call.","billedSeconds":72}"#,
        r#"{"event":"undelivered","why":"n8n: no connection"}"#,
        r#"{"event":"delivered"}"#,
        r#"{"event":"wire","step":1,"way":"in","with":"Twilio","text":"POST /incoming-call"}"#,
    ];
    for line in lines {
        let event: Event = serde_json::from_str(line).unwrap();
        assert_eq!(json!(event), serde_json::from_str::<Value>(line).unwrap());
    }
}

#[test]
fn a_field_that_is_missing_or_odd_is_as_good_as_empty() {
    let read = |event: Value| Event::deserialize(event).ok();
    let odd = json!({"event": "ring", "callSid": "CA1", "number": 7, "direction": {"up": 1}});
    for ring in [odd, json!({"event": "ring", "callSid": "CA1"})] {
        let Some(Event::Ring { call_sid, number, direction, .. }) = read(ring) else { panic!() };
        assert_eq!((&*call_sid, &*number, direction), ("CA1", "", Direction::In));
    }
    let odd = json!({"event": "said", "speaker": "Somebody", "ordinal": -1, "text": "Hello."});
    let Some(Event::Said(said)) = read(odd) else { panic!() };
    assert_eq!((said.agent, said.ordinal, said.speaker), (0, 0, Speaker::User));
    assert!(said.finished && said.text == "Hello.");

    for old in [json!({"event": "transfer"}), json!({"event": "transfer", "number": 7})] {
        let Some(Event::Transfer(transfer)) = read(old) else { panic!() };
        assert_eq!(transfer, Transfer::default());
    }
    let later = json!({"event": "end", "endedBy": "StruckByLightning"});
    let Some(Event::End { ended_by }) = read(later) else { panic!() };
    assert_eq!(ended_by, EndedBy::ProcessDied, "it has ended all the same");
    for unreadable in [json!({"event": "end"}), json!({"event": "weather"}), json!({}), json!(7)] {
        assert!(read(unreadable).is_none());
    }
}
