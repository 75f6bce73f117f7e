//! What the live page is told beside a call's story: what failed, how the parties are, which calls
//! fit a filter; and what it may order. How that looks is tested in a browser elsewhere.

use std::fs;
use std::time::Instant;

use serde_json::{Value, json};

use crate::demo::{HttpAnswer, PATIENCE, Reply, Trouble, World, pcm_of, voice};
use crate::owner::{TOKEN, builder, look_json, post};
use crate::{CALLER, Outcome, connect, wishes};

#[track_caller]
fn delete(world: &World, sid: &str, order: &Value) -> Result<HttpAnswer, Trouble> {
    let bearer = format!("Bearer {TOKEN}");
    let headers = [("Authorization", bearer.as_str())];
    world.request("DELETE", &format!("/calls/{sid}"), &headers, order.to_string().as_bytes())
}

/// Looks at the list until it is as wanted.
#[track_caller]
fn wait_list(
    world: &World,
    query: &str,
    wanted: impl Fn(&Value) -> bool,
) -> Result<Value, Trouble> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let list = look_json(world, &format!("/calls?{query}"))?;
        if wanted(&list) {
            return Ok(list);
        }
        if Instant::now() > deadline {
            return Err(world.trouble(format!("the list stays as it is: {list}")));
        }
        std::thread::yield_now();
    }
}

#[test]
fn a_wrong_key_is_in_the_journal_the_list_and_the_health_line() -> Outcome {
    let world = builder().setting("ULTRAVOX_API_KEY", "not-the-key").start()?;
    let ringing = world.ring(CALLER)?;
    let list = wait_list(&world, "outcome=failed", |list| list["past"][0]["endedBy"] == "NoAgent")?;
    let failure = &list["past"][0]["failures"][0];
    assert_eq!(failure["step"], 3, "{list}");
    let why = failure["why"].as_str().unwrap_or_default();
    assert!(why.contains("403") && why.ends_with("(check ULTRAVOX_API_KEY)"), "{why}");
    // It is what the log says.
    let log = world.bridge.log().join("\n");
    assert!(log.contains(why), "{log}");
    let events = world.journal(&ringing.call_sid);
    assert!(events.iter().any(|event| event["event"] == "failed" && event["why"] == why));
    // Nothing was said: that is neither delivered nor undelivered.
    assert_eq!(list["past"][0]["delivered"], Value::Null);
    wait_list(&world, "", |list| list["outbox"]["waiting"] == 0)?;
    let ultravox = &list["health"]["parties"][0];
    assert_eq!((&ultravox["name"], &ultravox["state"]), (&json!("Ultravox"), &json!("trouble")));
    assert_eq!(list["health"]["today"]["failed"], 1);
    Ok(())
}

#[test]
fn an_n8n_that_answers_and_fails_is_in_trouble_until_it_does_not_fail() -> Outcome {
    let world = builder().start()?;
    world.ultravox.answer_pings(true);
    let n8n = |list: &Value| list["health"]["parties"][1]["state"].clone();
    wait_list(&world, "", |list| n8n(list) == "well")?;
    world.n8n.reply_next("1", Reply::json(500, &json!({"message": "Error in workflow"})));
    let call = connect(&world)?;
    let list = look_json(&world, "/calls")?;
    assert_eq!(list["live"][0]["failures"][0]["step"], 2, "{list}");
    assert_eq!(n8n(&list), "trouble");
    // It is there, says a look at it, and that changes nothing.
    world.n8n.wait_greeted(3)?;
    assert_eq!(n8n(&look_json(&world, "/calls")?), "trouble");
    call.enter_main_stage()?;
    call.act("schedule_meeting", &wishes("London"))?;
    assert_eq!(n8n(&look_json(&world, "/calls")?), "well");
    assert_eq!(look_json(&world, "/calls")?["live"][0]["failed"], true, "what was, was");
    call.phone.send_stop()?;
    Ok(())
}

#[test]
fn what_failed_before_a_restart_is_still_known_when_the_call_goes_on() -> Outcome {
    let world = builder().start()?;
    world.n8n.reply_next("1", Reply::json(500, &json!({"message": "Error in workflow"})));
    let call = connect(&world)?;
    call.agent.say("How can I help you?", &pcm_of(&voice(1, 100)))?;
    crate::written(&world, &call.ringing.call_sid, &call.agent)?;
    world.bridge.kill();
    world.bridge.restart()?;
    let again = call.ringing.next(&world, &[])?;
    world.ultravox.next_call(PATIENCE)?;
    let phone = again.open_stream(&world)?;
    let list = wait_list(&world, "", |list| list["live"][0]["sid"] == call.ringing.call_sid)?;
    assert_eq!(list["live"][0]["failures"][0]["step"], 2, "{list}");
    phone.send_stop()?;
    wait_list(&world, "outcome=failed", |list| list["past"][0]["sid"] == call.ringing.call_sid)?;
    Ok(())
}

#[test]
fn a_call_is_deleted_when_nothing_is_lost_by_it_and_only_then() -> Outcome {
    let world = builder().start()?;
    world.n8n.set_reply("2", Reply::json(500, &json!({"message": "Error in workflow"})));
    let call = connect(&world)?;
    let sid = call.ringing.call_sid.clone();
    call.agent.user_said("Keep this, please.")?;
    crate::written(&world, &sid, &call.agent)?;
    assert_eq!(delete(&world, &sid, &json!({}))?.status, 409, "it goes on");
    call.phone.send_stop()?;
    wait_list(&world, "outcome=undelivered", |list| list["past"][0]["sid"] == sid.as_str())?;
    let refused = delete(&world, &sid, &json!({}))?;
    assert_eq!((refused.status, &refused.json()["undelivered"]), (409, &json!(true)));
    assert_eq!(world.ultravox.deleted(), [""; 0]);

    // Now n8n takes it, and Ultravox does not want to let go.
    world.n8n.set_reply("2", Reply::json(200, &json!({})));
    assert_eq!(post(&world, "/outbox", &json!({}))?.json()["offered"], 1);
    wait_list(&world, "", |list| list["past"][0]["delivered"] == true)?;
    world.ultravox.refuse_deletes(&Reply::json(500, &json!({})));
    let refused = delete(&world, &sid, &json!({}))?;
    assert_eq!(refused.status, 502, "{}", refused.text());
    assert!(!world.journal(&sid).is_empty(), "then nothing is gone here");
    world.ultravox.allow_deletes();
    assert_eq!(delete(&world, &sid, &json!({}))?.status, 200);
    assert!(world.ultravox.deleted().iter().any(|id| id == call.agent.id()));
    assert!(world.journal(&sid).is_empty());
    assert_eq!(delete(&world, &sid, &json!({}))?.status, 404);
    assert_eq!(delete(&world, "../../etc/passwd", &json!({}))?.status, 404);
    // Without the token, and from another site, there is nothing to order.
    let stranger = world.request("DELETE", &format!("/calls/{sid}"), &[], b"{}")?;
    assert_eq!(stranger.status, 401);
    Ok(())
}

#[test]
fn what_was_given_up_is_offered_again_too() -> Outcome {
    let world = builder().start()?;
    world.bridge.kill();
    let sid = format!("CA{:032x}", 5);
    let at = "2026-01-01T10:00:00.000Z";
    let events = [
        json!({"at": at, "event": "ring", "callSid": sid, "number": CALLER, "direction": "in"}),
        json!({"at": at, "event": "said", "agent": 1, "ordinal": 1, "speaker": "User",
            "text": "An old story."}),
        json!({"at": at, "event": "end", "endedBy": "CallerLeft"}),
        json!({"at": at, "event": "undelivered", "why": "n8n: 500"}),
    ];
    let lines: Vec<String> = events.iter().map(|event| format!("{event}\n")).collect();
    fs::create_dir_all(world.data_dir().join("calls"))?;
    let name = format!("20260101T100000Z-{sid}.jsonl");
    fs::write(world.data_dir().join("calls").join(name), lines.concat())?;
    world.bridge.restart()?;
    wait_list(&world, "", |list| list["outbox"]["givenUp"] == 1)?;
    assert_eq!(world.n8n.requests_of("2").len(), 0);
    assert_eq!(post(&world, "/outbox", &json!({}))?.status, 202);
    let told = world.n8n.wait_for("2", 1, PATIENCE)?;
    assert_eq!(told[0].json["data"], "User: An old story.");
    wait_list(&world, "", |list| {
        list["outbox"] == json!({"waiting": 0, "givenUp": 0, "isLate": false})
    })?;
    Ok(())
}
