//! What n8n may decide, and what counts for nothing.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use serde_json::{Value, json};

use crate::parties::n8n::decision::{Decision, read_decision};
use crate::parties::n8n::reply::{N8nReply, understand_reply};
use crate::testing::built_in_agent;

fn reply(status: u16, body: &str) -> N8nReply {
    N8nReply { status, body: body.to_owned() }
}

fn decided(body: &Value) -> Decision {
    read_decision(&reply(200, &body.to_string()), &built_in_agent()).unwrap()
}

/// A reply, what is taken of it in short, and what is said of the rest.
const REPLIES: &[(&str, &str, &[&str])] = &[
    (r#"{"firstMessage":"Hi"}"#, "Hi", &[]),
    (r#"[{"firstMessage":"Hi","stage":"main_convo"}]"#, "Hi main_convo", &[]),
    (r#"{"stage":" main_convo ","facts":" Owes 12 euros. "}"#, "main_convo Owes 12 euros.", &[]),
    (r#"{"firstMessage":null,"stage":"","facts":null,"transfer":false,"refuse":null}"#, "", &[]),
    (r#"{"transfer":true}"#, "transfer", &[]),
    (r#"{"refuse":true,"firstMessage":"Hi","facts":"F"}"#, "Hi F refuse", &[]),
    (
        r#"{"refuse":true,"transfer":true,"stage":"main_convo"}"#,
        "refuse",
        &["transfer counts for nothing beside refuse", "stage counts for nothing beside refuse"],
    ),
    (
        r#"{"transfer":true,"stage":"main_convo"}"#,
        "transfer",
        &["stage counts for nothing beside transfer"],
    ),
    (r#"{"firstMessage":"Hi","stage":"bok"}"#, "Hi", &["the agent has no stage \"bok\""]),
    (
        r#"{"stage":7,"facts":{"a":1},"transfer":"true","refuse":1}"#,
        "",
        &[
            "refuse is 1, which is neither true nor false",
            "transfer is \"true\", which is neither true nor false",
            "stage is 7, which is no text",
            "facts is {\"a\":1}, which is no text",
        ],
    ),
    (r#"{"firstMessage":"","facts":"F"}"#, "F", &["n8n: 200 with an empty firstMessage"]),
    (r#"{"firstMessage":["x"],"refuse":true}"#, "refuse", &["n8n: 200 with no text named first"]),
];

#[test]
fn what_makes_no_sense_is_named_and_the_rest_counts() {
    for (body, taken, oddities) in REPLIES {
        let decision = read_decision(&reply(200, body), &built_in_agent()).unwrap();
        let words = [
            decision.first_message.as_deref(),
            decision.stage.as_deref(),
            Some(decision.facts.as_str()).filter(|facts| !facts.is_empty()),
            decision.transfer.then_some("transfer"),
            decision.refuse.then_some("refuse"),
        ];
        assert_eq!(words.into_iter().flatten().collect::<Vec<_>>().join(" "), *taken, "{body}");
        assert_eq!(decision.oddities.len(), oddities.len(), "{:?}", decision.oddities);
        for (said, wanted) in decision.oddities.iter().zip(*oddities) {
            assert!(said.starts_with(wanted), "{said}");
        }
    }
}

#[test]
fn what_is_too_long_is_cut_or_left_out() {
    let decision = decided(&json!({"facts": "ü".repeat(4_001), "firstMessage": "Hi"}));
    assert_eq!(decision.facts, format!("{}…", "ü".repeat(4_000)));
    assert_eq!(decision.oddities, ["facts has 4001 characters and is cut to 4000"]);
    assert_eq!(decided(&json!({"facts": "ü".repeat(4_000)})).oddities, [""; 0]);
    let decision = decided(&json!({"firstMessage": "x".repeat(2_001), "stage": "main_convo"}));
    assert_eq!((decision.first_message, decision.stage.as_deref()), (None, Some("main_convo")));
    assert_eq!(
        decision.oddities,
        ["firstMessage has 2001 characters, which is more than 2000 characters"]
    );
    let long = decided(&json!({"stage": "x".repeat(10_000), "transfer": vec![1; 10_000]}));
    assert!(long.oddities.iter().all(|oddity| oddity.len() < 120), "{:?}", long.oddities);
}

#[test]
fn null_for_a_greeting_is_an_answer_and_not_a_mistake() {
    let agent = built_in_agent();
    let null = "\u{feff} {\"firstMessage\":null}";
    for body in [null, "{\"firstMessage\":null}", "[{\"firstMessage\":null,\"more\":1}]"] {
        let decision = read_decision(&reply(200, body), &agent).unwrap();
        assert_eq!(decision, Decision::default(), "{body}");
        assert!(read_decision(&reply(500, body), &agent).is_err(), "a refusal stays one");
        assert!(understand_reply(&reply(200, body), "message").is_err(), "a tool has no default");
    }
    for body in ["null", "{}", "[]", "[null]", ""] {
        assert!(read_decision(&reply(200, body), &agent).is_err(), "{body}");
    }
    for body in [r#"{"refuse":true}"#, r#"{"stage":"main_convo"}"#] {
        assert!(read_decision(&reply(500, body), &agent).is_err(), "{body}");
    }
}
