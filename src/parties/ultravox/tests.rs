//! What Ultravox may answer, and what it is offered.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use serde_json::{Value, json};

use crate::parties::ultravox::body::{NewCall, Opening, call_body, selected_tools};
use crate::parties::ultravox::{
    SUMMARY_CHARS_MAX, host_only, read_agent_call, read_summary, refusal,
};
use crate::records::event::Event;
use crate::testing::{full_agent, full_settings};

#[test]
fn a_refusal_of_ultravox_says_what_to_do() {
    let cases = [
        (400, "ULTRAVOX_MODEL and the voices"),
        (401, "check ULTRAVOX_API_KEY"),
        (402, "no minutes left"),
        (403, "check ULTRAVOX_API_KEY"),
        (404, "check ULTRAVOX_API_URL"),
        (429, "too many calls at once"),
        (500, "try again later"),
        (503, "no room at the moment"),
    ];
    for (status, advice) in cases {
        let line = refusal(status, "{\"detail\":\n\"why\"}").to_string();
        let begins =
            format!("Ultravox: could not create the agent's call: {status} {{\"detail\":\"why\"}}");
        assert!(line.starts_with(&begins), "{line}");
        assert!(line.contains(advice) && line.ends_with(')'), "{line}");
        let refused = refusal(status, "").refused;
        assert_eq!(refused, [400, 404].contains(&status), "asked in another way, it might do");
    }
    assert_eq!(
        refusal(401, "").to_string(),
        "Ultravox: could not create the agent's call: 401 (check ULTRAVOX_API_KEY)"
    );
    assert!(refusal(400, &"é".repeat(9_999)).to_string().chars().count() < 400);
}

#[test]
fn what_ultravox_says_of_a_call_is_taken_as_far_as_it_is_there() {
    let long = "ü".repeat(100_000);
    let cases = [
        (
            json!({"summary": " Anna called. ", "shortSummary": "A call.", "billedDuration": "72s",
            "billingStatus": "BILLING_STATUS_BILLED"}),
            "Anna called.",
            Some(72),
        ),
        (
            json!({"summary": null, "shortSummary": "A call.", "billedDuration": "6.0s"}),
            "A call.",
            Some(6),
        ),
        (
            json!({"summary": "A call.", "billedDuration": "6s",
            "billingStatus": "BILLING_STATUS_PENDING"}),
            "A call.",
            None,
        ),
        (
            json!({"summary": "", "shortSummary": null, "billedDuration": "0s",
            "billingStatus": "BILLING_STATUS_FREE_MINUTES"}),
            "",
            Some(0),
        ),
        (json!({"summary": 7, "billedDuration": 72}), "", None),
        (json!({"billedDuration": "PT1M"}), "", None),
        (json!({"billedDuration": "-6s"}), "", None),
        (json!(["summary"]), "", None),
        (json!({"summary": long}), &long, None),
    ];
    for (body, wanted, seconds) in cases {
        let Event::Summary { text, billed_seconds } = read_summary(&body.to_string()) else {
            panic!()
        };
        let cut = text.trim_end_matches('…');
        assert!(wanted.starts_with(cut) && text.chars().count() <= SUMMARY_CHARS_MAX + 1, "{body}");
        assert_eq!((cut.is_empty(), billed_seconds), (wanted.is_empty(), seconds), "{body}");
    }
    assert!(matches!(read_summary("<html>"), Event::Summary { billed_seconds: None, .. }));
}

#[test]
fn a_created_call_has_an_id_and_an_address_to_join() {
    let text = "{\"callId\":\"7c21\",\"joinUrl\":\"wss://voice.example/7c21\",\"new\":[1]}";
    let created = read_agent_call(text).ok().unwrap();
    assert_eq!(created.id, "7c21");
    assert_eq!(created.join_url.reveal(), "wss://voice.example/7c21");
    let odd = ["", "<html>", "null", "[]", "{\"callId\":\"7c21\"}", "{\"joinUrl\":\"wss://x\"}"];
    for odd in odd.into_iter().chain(["{\"callId\":7,\"joinUrl\":\"wss://x\"}"]) {
        let failure = read_agent_call(odd).err().unwrap().to_string();
        assert!(failure.starts_with("Ultravox: created the call, but "), "{odd}: {failure}");
    }
}

#[test]
fn the_agent_is_offered_a_stages_tools_in_ultravox_words() {
    let (config, agent) = (full_settings(), full_agent());
    let tools = selected_tools(&config, &agent, &agent.stages["main_convo"]);
    let corpus = tools.iter().find(|tool| tool["toolName"] == "queryCorpus").unwrap();
    assert_eq!(corpus["nameOverride"], "queryCorpus");
    assert_eq!(corpus["parameterOverrides"], json!({"corpus_id": "corpus-1", "max_results": 5}));

    let own: Vec<&Value> = tools.iter().map(|tool| &tool["temporaryTool"]).collect();
    let meeting = *own.iter().find(|tool| tool["modelToolName"] == "schedule_meeting").unwrap();
    assert_eq!(meeting["client"], json!({}));
    assert_eq!(meeting["timeout"], "17s", "five more than our own");
    let parameters = meeting["dynamicParameters"].as_array().unwrap();
    assert_eq!(parameters.len(), 5);
    for parameter in parameters {
        assert_eq!(parameter["location"], "PARAMETER_LOCATION_BODY", "{parameter}");
        assert_eq!(parameter["required"], true, "{parameter}");
        let places = json!(["Chicago", "London", "Manchester", "New York"]);
        let wanted = if parameter["name"] == "location" { &places } else { &Value::Null };
        assert_eq!(&parameter["schema"]["enum"], wanted, "{parameter}");
    }
    let names: Vec<&Value> = parameters.iter().map(|parameter| &parameter["name"]).collect();
    for name in ["name", "email", "purpose", "datetime", "location"] {
        assert!(names.iter().any(|found| *found == name), "{name}: {names:?}");
    }
}

#[test]
fn of_an_address_only_the_host_is_shown() {
    assert_eq!(
        host_only("wss://voice.example:443/join/7c21?key=s3cret"),
        "wss://voice.example:443/***"
    );
    assert_eq!(host_only("wss://user:s3cret@voice.example?key=s3cret"), "wss://voice.example/***");
    assert_eq!(host_only("s3cret"), "://s3cret/***");
}

/// Each of these ends an agent that nobody talks to any more. Without it, it is billed on.
#[test]
fn an_agent_that_nobody_needs_ends_by_itself() {
    let (config, agent) = (full_settings(), full_agent());
    let opening = Opening::Greet("Hello.".into());
    let new = NewCall {
        stage: json!({"systemPrompt": "You are Sara."}),
        opening: &opening,
        lasts: Duration::from_mins(30),
        sid: "CA1",
    };
    let body = call_body(&config, &agent, new);
    assert_eq!(body["medium"]["serverWebSocket"]["mediaIdleTimeout"], "30s");
    assert_eq!((&body["joinTimeout"], &body["maxDuration"]), (&json!("15s"), &json!("1800s")));
    assert_eq!(body["timeExceededMessage"], agent.phrases.time_is_up);
    let silent = [
        json!({"duration": "30s", "message": agent.phrases.still_there}),
        json!({"duration": "15s", "message": agent.phrases.silence_goodbye,
            "endBehavior": "END_BEHAVIOR_HANG_UP_SOFT"}),
    ];
    assert_eq!(body["inactivityMessages"], json!(silent));
}
