use serde_json::json;

use crate::records::event::{Event, ToolAsked};
use crate::records::tally::{Failed, Tally, median};

fn tool(id: &str, name: &str, outcome: &str) -> Event {
    let (id, tool, stage) = (id.to_owned(), name.to_owned(), "greeting".to_owned());
    let asked = ToolAsked { id, tool, stage, arguments: json!({}) };
    Event::Tool { asked, result: "That did not work.".into(), outcome: outcome.into(), ms: 5 }
}

fn failed(step: u8, why: &str, id: &str) -> Event {
    Event::Failed { step, why: why.into(), id: id.into() }
}

#[test]
fn a_tool_that_failed_twice_counts_once_with_its_latest_reason() {
    let mut tally = Tally::default();
    for event in [
        failed(2, "n8n: 500", ""),
        failed(7, "n8n: 500 again", "i1"),
        tool("i1", "schedule_meeting", "uncertain"),
        tool("i2", "verify", "done"),
        tool("i3", "schedule_meeting", "incomplete"),
        failed(7, "n8n: 502", "i4"),
        tool("i4", "schedule_meeting", "failed"),
        tool("i5", "made_up", "no such tool"),
    ] {
        tally.apply(&event);
    }
    let wanted = [
        (2, None, "n8n: 500"),
        (7, Some("schedule_meeting"), "n8n: 502"),
        (7, Some("made_up"), "That did not work."),
    ]
    .map(|(step, tool, why)| Failed { step, tool: tool.map(str::to_owned), why: why.into() });
    assert_eq!(tally.failed(), wanted);
}

#[test]
fn it_stays_small_whatever_happens() {
    let mut tally = Tally::default();
    for index in 0..10_000_u64 {
        tally.apply(&failed(7, &"why ".repeat(1_000), &index.to_string()));
        tally.apply(&tool(&format!("other {index}"), &format!("tool {index}"), "failed"));
        tally.apply(&Event::Turn { ms: index });
    }
    assert!(tally.failed().len() == 20 && tally.reasons.len() <= 20);
    assert_eq!(tally.median_turn_ms(), Some(9_749), "of the latest turns");
}

#[test]
fn the_median_is_a_figure_that_occurred() {
    assert_eq!(median(&mut []), None);
    assert_eq!(median(&mut [7]), Some(7));
    assert_eq!(median(&mut [900, 100]), Some(100));
    assert_eq!(median(&mut [900, 100, 400]), Some(400));
}
