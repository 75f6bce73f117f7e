//! What an agent's call may cost at most: figures that only Ultravox would notice.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use serde_json::{Value, json};

use crate::parties::ultravox::body::{NewCall, Opening, call_body, no_longer_than_documented};
use crate::testing::{full_agent, full_settings};

fn body(opening: &Opening) -> Value {
    let new = NewCall {
        stage: json!({"systemPrompt": "You are Sara."}),
        opening,
        lasts: Duration::from_mins(10),
        sid: "CA1",
    };
    call_body(&full_settings(), &full_agent(), new)
}

#[test]
fn an_agent_that_nobody_talks_to_does_not_stay_at_the_owners_expense() {
    let agent = full_agent();
    let body = body(&Opening::Greet("Hello.".into()));
    assert_eq!(body["maxDuration"], "600s");
    assert_eq!(body["timeExceededMessage"], agent.phrases.time_is_up);
    assert_eq!(body["joinTimeout"], "15s");
    assert_eq!(body["medium"]["serverWebSocket"]["mediaIdleTimeout"], "30s");
    let wanted = json!([
        {"duration": "30s", "message": agent.phrases.still_there},
        {
            "duration": "15s",
            "message": agent.phrases.silence_goodbye,
            "endBehavior": "END_BEHAVIOR_HANG_UP_SOFT",
        },
    ]);
    assert_eq!(body["inactivityMessages"], wanted);
}

#[test]
fn a_call_is_made_shorter_only_if_it_is_too_long() {
    let of =
        |lasts: &str| no_longer_than_documented(&json!({"maxDuration": lasts, "voice": "Mark"}));
    assert_eq!(of("3600s"), None);
    assert_eq!(of("3601s").unwrap(), json!({"maxDuration": "3600s", "voice": "Mark"}));
    assert_eq!(no_longer_than_documented(&json!({})), None);
}
