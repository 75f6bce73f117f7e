//! The report from a call's events, old ones and odd ones among them.

use std::time::Duration;

use serde::Deserialize as _;
use serde_json::{Value, json};

use crate::records::event::Event;
use crate::records::report::{Report, STAGES_MAX, TOOLS_MAX, TURNS_MAX};

fn report(events: &[Value]) -> Report {
    let mut report = Report::default();
    for event in events {
        if let Ok(event) = Event::deserialize(event) {
            report.apply(&event);
        }
    }
    report
}

fn tool(tool: &str, outcome: &str) -> Value {
    json!({"event": "tool", "id": "i1", "tool": tool, "stage": "greeting", "arguments": {"a": 1},
        "result": "Done.", "outcome": outcome, "ms": 5})
}

#[test]
fn a_call_in_sum() {
    let told = report(&[
        json!({"event": "ring", "callSid": "CA1", "number": "+4930", "direction": "out",
            "to": "+4930"}),
        json!({"event": "agent", "callId": "u1", "agent": 1, "stage": "greeting"}),
        json!({"event": "turn", "ms": 900}),
        json!({"event": "stage", "stage": "main_convo"}),
        tool("schedule_meeting", "uncertain"),
        json!({"event": "turn", "ms": 1_900}),
        json!({"event": "agent", "callId": "u2", "agent": 2, "stage": "main_convo"}),
        json!({"event": "turn", "ms": 500}),
        json!({"event": "goodbye", "endedBy": "CallerLeft", "ms": 73_900}),
        json!({"event": "summary", "text": "A call.", "billedSeconds": 72}),
    ]);
    assert!(told.is_complete());
    let wanted = json!({
        "to": "+4930",
        "direction": "out",
        "seconds": 73,
        "stages": ["greeting", "main_convo"],
        "tools": [{"tool": "schedule_meeting", "arguments": {"a": 1}, "result": "Done.",
            "outcome": "uncertain"}],
        "ultravoxCallId": "u2",
        "medianTurnMs": 900,
        "longestTurnMs": 1_900,
        "summary": "A call.",
        "billedSeconds": 72,
    });
    assert_eq!(Value::Object(told.fields()), wanted);
}

/// As versions wrote it that knew nothing of a report.
#[test]
fn of_an_old_journal_it_tells_what_is_known() {
    let mut told = report(&[
        json!({"event": "ring", "callSid": "CA1", "number": "+4930", "direction": "in"}),
        json!({"event": "agent", "callId": "u1", "agent": 1}),
        json!({"event": "stage", "stage": "main_convo"}),
        json!({"event": "summary", "text": ["odd"], "billedSeconds": "odd"}),
        json!({"event": "from_the_future", "to": "+1"}),
    ]);
    assert!(!told.is_complete());
    told.lasted_until(Duration::from_millis(9_999));
    let wanted = json!({
        "to": null, "direction": "in", "seconds": 9, "stages": ["main_convo"], "tools": [],
        "ultravoxCallId": "u1", "medianTurnMs": null, "longestTurnMs": null, "summary": null,
        "billedSeconds": null,
    });
    assert_eq!(Value::Object(told.fields()), wanted);
}

#[test]
fn a_call_that_comes_back_from_a_transfer_is_told_as_one() {
    let told = report(&[
        json!({"event": "agent", "callId": "u1", "agent": 1, "stage": "greeting"}),
        json!({"event": "goodbye", "endedBy": "Transferred", "ms": 20_000}),
        json!({"event": "transfer"}),
        json!({"event": "agent", "callId": "u2", "agent": 2, "stage": "greeting"}),
    ]);
    assert_eq!(told.fields()["seconds"], Value::Null, "it goes on");
    assert_eq!(told.fields()["stages"], json!(["greeting"]));
}

#[test]
fn it_stays_small_whatever_happens() {
    let mut told = Report::default();
    for ms in 0..10_000 {
        told.apply(&Event::Turn { ms });
        told.apply(&Event::Stage { stage: format!("stage {ms}") });
        if let Ok(event) = Event::deserialize(&tool(&format!("tool {ms}"), "done")) {
            told.apply(&event);
        }
    }
    let sizes = (told.tools.len(), told.turns_ms.len(), told.stages.len());
    assert_eq!(sizes, (TOOLS_MAX, TURNS_MAX, STAGES_MAX));
    assert_eq!(told.fields()["longestTurnMs"], 9_999);
}
