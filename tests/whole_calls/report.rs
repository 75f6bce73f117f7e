//! What n8n is told of a call beside its transcript (route 2), and that nothing about it can keep
//! the transcript from n8n: no summary, a late one, a question for it that hangs, a process that
//! dies meanwhile, a journal of an older version.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::demo::{N8nRequest, OUR_NUMBER, PATIENCE, Reply, SUMMARY, Trouble, World, WorldBuilder};
use crate::{CALLER, Call, Outcome, connect_from, wishes};

/// A summary is waited for up to 10 s, and the machine may stumble.
const LONG_PATIENCE: Duration = Duration::from_mins(1);
const PERSON: &str = "+4930777888";
const TOKEN: &str = "mosaic-lantern-27-api";

fn builder() -> WorldBuilder {
    World::builder(env!("CARGO_BIN_EXE_callbridge"))
}

/// A call in which something was said, so that there is something to file.
#[track_caller]
fn talk(world: &World) -> Result<Call, Trouble> {
    talk_from(world, CALLER)
}

fn talk_from(world: &World, number: &str) -> Result<Call, Trouble> {
    let call = connect_from(world, number)?;
    call.agent.user_said("My window is broken.")?;
    call.act("are_you_there", &json!({}))?;
    Ok(call)
}

/// From now on this is what Ultravox says of the call.
fn says(world: &World, call: &Call, reply: Reply) {
    world.ultravox.set_answer(&path_of(call), reply);
}

fn path_of(call: &Call) -> String {
    format!("/api/calls/{}", call.agent.id())
}

fn summed_up(summary: &Value, billed: &Value) -> Reply {
    let status = if billed.is_null() { "BILLING_STATUS_PENDING" } else { "BILLING_STATUS_BILLED" };
    Reply::json(
        200,
        &json!({"summary": summary, "billedDuration": billed, "billingStatus": status}),
    )
}

/// The one transcript that n8n got.
#[track_caller]
fn filed(world: &World) -> Result<N8nRequest, Trouble> {
    world.n8n.wait_for("2", 1, LONG_PATIENCE)?;
    world.bridge.wait_for_log("n8n has the transcript of")?;
    match world.n8n.requests_of("2").as_slice() {
        [one] => Ok(one.clone()),
        more => Err(world.trouble(format!("{} transcripts came", more.len()))),
    }
}

#[test]
fn the_report_goes_to_n8n_with_the_transcript() -> Outcome {
    let world = builder().start()?;
    let call = talk(&world)?;
    call.enter_main_stage()?;
    call.act("schedule_meeting", &wishes("London"))?;
    call.phone.hang_up()?;
    let told = filed(&world)?.json;

    // What workflows have read all along.
    assert_eq!(told["route"], "2");
    assert_eq!(told["number"], CALLER);
    assert_eq!(told["data"], "User: My window is broken.");
    assert_eq!(told["callSid"], call.ringing.call_sid.as_str());
    assert_eq!(told["endedBy"], "CallerLeft");

    assert_eq!((&told["to"], &told["direction"]), (&json!(OUR_NUMBER), &json!("in")));
    assert!(told["seconds"].is_u64(), "{told}");
    assert_eq!(told["stages"], json!(["greeting", "main_convo"]));
    let tools = told["tools"].as_array().cloned().unwrap_or_default();
    let tool = |tool: &Value| (tool["tool"].clone(), tool["outcome"].clone());
    let wanted = [
        ("are_you_there", "no such tool"),
        ("move_to_main_convo", "done"),
        ("schedule_meeting", "done"),
    ];
    assert_eq!(
        tools.iter().map(tool).collect::<Vec<_>>(),
        wanted.map(|(tool, outcome)| (json!(tool), json!(outcome)))
    );
    assert_eq!(tools[2]["arguments"]["name"], "Anna Berg");
    assert_eq!(tools[2]["result"], crate::demo::BOOKED);
    assert_eq!(told["ultravoxCallId"], call.agent.id());
    assert_eq!((&told["summary"], &told["billedSeconds"]), (&json!(SUMMARY), &json!(72)));
    assert_eq!(world.ultravox.looked_up(call.agent.id()), 1, "all was there at once");
    for name in ["medianTurnMs", "longestTurnMs"] {
        assert!(told.get(name).is_some(), "{name} is missing");
    }
    Ok(())
}

#[test]
fn a_call_that_goes_out_names_the_person_as_the_number_that_was_called() -> Outcome {
    let world = builder()
        .setting("TWILIO_ACCOUNT_SID", crate::demo::ACCOUNT_SID)
        .setting("TWILIO_PHONE_NUMBER", OUR_NUMBER)
        .setting("API_TOKEN", TOKEN)
        .setting("OUTGOING_ALLOW", "+49")
        .start()?;
    let bearer = format!("Bearer {TOKEN}");
    let headers = [("Authorization", bearer.as_str()), ("Content-Type", "application/json")];
    let order = json!({"phoneNumber": PERSON}).to_string();
    world.request("POST", "/outgoing-call", &headers, order.as_bytes())?;
    let orders = world.twilio.wait_orders(1)?;
    let ringing = world.picks_up(&orders[0])?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(&world)?;
    agent.user_said("Who is there?")?;
    let question = agent.invoke("are_you_there", &json!({}))?;
    agent.wait_result(&question)?;
    phone.hang_up()?;
    let told = filed(&world)?.json;
    assert_eq!((&told["to"], &told["direction"]), (&json!(PERSON), &json!("out")));
    Ok(())
}

/// As the real one does: `null` for some seconds, and the bill last.
#[test]
fn a_summary_that_is_late_is_waited_for() -> Outcome {
    let world = builder().start()?;
    let call = talk(&world)?;
    says(&world, &call, summed_up(&Value::Null, &Value::Null));
    call.phone.hang_up()?;
    world.ultravox.wait_looked_up(call.agent.id(), 1)?;
    says(&world, &call, summed_up(&json!("Late."), &Value::Null));
    world.ultravox.wait_looked_up(call.agent.id(), 2)?;
    says(&world, &call, summed_up(&json!("Late."), &json!("6s")));
    let told = filed(&world)?.json;
    assert_eq!(told["summary"], "Late.");
    Ok(())
}

/// Whatever goes wrong with the summary, the transcript comes, once, and says so by `null`.
#[test]
fn without_a_summary_the_transcript_comes_all_the_same() -> Outcome {
    let nothing = summed_up(&Value::Null, &Value::Null);
    let cases = [
        ("gone", Reply::json(404, &json!({"detail": "Not found."})), 1),
        ("forbidden", Reply::json(403, &json!({})), 1),
        ("never ready", nothing, 3),
        ("broken", Reply::text(500, None, "no"), 3),
        ("nonsense", Reply::text(200, None, "<html>"), 3),
        ("dropped", Reply::Reset, 3),
        ("hanging", Reply::Hang, 3),
    ];
    thread::scope(|scope| {
        let play = |(what, reply, asked): (&'static str, Reply, usize)| -> Outcome {
            let world = builder().start()?;
            let call = talk(&world)?;
            says(&world, &call, reply);
            call.phone.hang_up()?;
            let told = filed(&world)?.json;
            assert_eq!(told["data"], "User: My window is broken.", "{what}");
            assert_eq!((&told["summary"], &told["billedSeconds"]), (&json!(null), &json!(null)));
            assert_eq!(told["ultravoxCallId"], call.agent.id(), "{what}");
            // On a machine that stumbles there may be no time left for the last question.
            assert!(world.ultravox.looked_up(call.agent.id()) <= asked, "{what}");
            Ok(())
        };
        let cases: Vec<_> =
            cases.into_iter().map(|case| (case.0, scope.spawn(move || play(case)))).collect();
        for (what, case) in cases {
            match case.join() {
                Ok(outcome) => outcome.map_err(|error| format!("{what}: {error:?}"))?,
                Err(_) => return Err(format!("{what}: see the assertion above").into()),
            }
        }
        Ok(())
    })
}

/// Many hang, and hold up nobody: neither each other, nor a call whose summary is there.
#[test]
fn questions_that_hang_hold_up_no_other_call() -> Outcome {
    const HANGING: usize = 12;
    let world = builder().setting("CALLS_PER_NUMBER_PER_HOUR", 100).start()?;
    let mut calls = Vec::new();
    for number in 0..HANGING {
        // One number is on four lines at most.
        let call = talk_from(&world, &format!("+49309018{number:02}"))?;
        says(&world, &call, Reply::Hang);
        calls.push(call);
    }
    for call in &calls {
        call.phone.hang_up()?;
    }
    let posts = world.n8n.wait_for("2", HANGING, LONG_PATIENCE)?;
    assert!(posts.iter().all(|post| post.json["summary"].is_null()));
    let after: Duration = posts[HANGING - 1].at.duration_since(posts[0].at);
    // One after the other it would take three times as long.
    assert!(after < LONG_PATIENCE / 2, "the last came {after:?} after the first");
    let more = talk(&world)?;
    more.phone.hang_up()?;
    let posts = world.n8n.wait_for("2", HANGING + 1, LONG_PATIENCE)?;
    assert_eq!(posts[HANGING].json["summary"], SUMMARY);
    Ok(())
}

#[test]
fn a_process_that_dies_while_it_asks_leaves_it_to_the_next() -> Outcome {
    let world = builder().start()?;
    let call = talk(&world)?;
    says(&world, &call, Reply::Hang);
    call.phone.hang_up()?;
    world.ultravox.wait_looked_up(call.agent.id(), 1)?;
    // The writer may be behind by a moment.
    let deadline = Instant::now() + LONG_PATIENCE;
    let has_ended =
        || world.journal(&call.ringing.call_sid).iter().any(|one| one["event"] == "end");
    while !has_ended() && Instant::now() < deadline {
        // Nothing announces that a file has grown.
        thread::sleep(Duration::from_millis(2));
    }
    world.bridge.kill();
    assert!(world.n8n.requests_of("2").is_empty(), "it was about to ask");
    says(&world, &call, summed_up(&json!("After the restart."), &json!("12s")));
    world.bridge.restart()?;
    let told = filed(&world)?.json;
    assert_eq!(told["endedBy"], "CallerLeft");
    assert_eq!((&told["to"], &told["direction"]), (&json!(OUR_NUMBER), &json!("in")));
    assert_eq!(told["stages"], json!(["greeting"]));
    assert_eq!(told["tools"][0]["tool"], "are_you_there");
    assert!(told["seconds"].is_u64(), "{told}");
    let summed_up = (&told["summary"], &told["billedSeconds"]);
    assert_eq!(summed_up, (&json!("After the restart."), &json!(12)));
    Ok(())
}

/// n8n is down for longer than the process lives: Ultravox is asked once, and not again.
#[test]
fn a_summary_is_kept_until_n8n_has_it() -> Outcome {
    let world = builder().start()?;
    let call = talk(&world)?;
    world.n8n.reply_next("2", Reply::text(503, None, "down"));
    call.phone.hang_up()?;
    world.bridge.wait_for_log("the transcript stays in")?;
    world.bridge.kill();
    says(&world, &call, Reply::json(404, &json!({})));
    world.bridge.restart()?;
    let posts = world.n8n.wait_for("2", 2, LONG_PATIENCE)?;
    for post in &posts {
        assert_eq!(post.json["summary"], SUMMARY);
        assert_eq!(post.json["billedSeconds"], 72);
    }
    assert_eq!(world.ultravox.looked_up(call.agent.id()), 1);
    Ok(())
}

/// From before there was a report: what it does not tell is `null`.
#[test]
fn a_journal_of_an_older_version_is_filed_with_what_it_tells() -> Outcome {
    let world = builder().start()?;
    world.bridge.kill();
    let sid = "CA0000000000000000000000000000000a";
    let then = jiff::Timestamp::now().checked_sub(jiff::SignedDuration::from_secs(600))?;
    let events = [
        (0, json!({"event": "ring", "callSid": sid, "number": CALLER, "direction": "in"})),
        (1, json!({"event": "agent", "callId": "c1", "agent": 1})),
        (2, json!({"event": "said", "agent": 1, "ordinal": 0, "speaker": "User", "text": "Hi."})),
        (3, json!({"event": "turn", "ms": 700})),
        (4, json!({"event": "turn", "ms": 1_900})),
        (5, json!({"event": "turn", "ms": 800})),
        (21, json!({"event": "stage", "stage": "main_convo"})),
        // Its process died here, and another one noted the end much later.
        (300, json!({"event": "end", "endedBy": "ProcessDied"})),
    ];
    let lines = events.map(|(seconds, mut event)| {
        let at = then.checked_add(jiff::SignedDuration::from_secs(seconds)).unwrap_or(then);
        event["at"] = json!(at.to_string());
        format!("{event}\n")
    });
    let name = format!("{}-{sid}.jsonl", then.strftime("%Y%m%dT%H%M%SZ"));
    fs::create_dir_all(world.data_dir().join("calls"))?;
    fs::write(world.data_dir().join("calls").join(name), lines.concat())?;
    world.bridge.restart()?;
    let mut told = filed(&world)?.json;
    let body = told.as_object_mut().ok_or("no object")?;
    body.retain(|name, _| !["route", "number", "data", "callSid"].contains(&name.as_str()));
    let wanted = json!({
        "endedBy": "ProcessDied",
        "to": null,
        "direction": "in",
        "seconds": 21,
        "stages": ["main_convo"],
        "tools": [],
        "ultravoxCallId": "c1",
        "medianTurnMs": 800,
        "longestTurnMs": 1_900,
        "summary": null,
        "billedSeconds": null,
    });
    assert_eq!(told, wanted);
    Ok(())
}

/// The page gets the same as n8n, of a call that goes on and of one that is over.
#[test]
fn the_page_is_told_the_same() -> Outcome {
    let world = builder().setting("API_TOKEN", TOKEN).start()?;
    let call = talk(&world)?;
    let sid = call.ringing.call_sid.clone();
    let bearer = format!("Bearer {TOKEN}");
    let story = || -> Result<Value, Trouble> {
        let headers = [("Authorization", bearer.as_str())];
        Ok(world.request("GET", &format!("/calls/{sid}"), &headers, &[])?.json())
    };
    let report = story()?["report"].clone();
    assert_eq!((&report["to"], &report["seconds"]), (&json!(OUR_NUMBER), &Value::Null));
    assert_eq!(report["stages"], json!(["greeting"]));
    call.phone.hang_up()?;
    let told = filed(&world)?.json;
    let report = story()?["report"].clone();
    for (name, value) in report.as_object().ok_or("no report")? {
        assert_eq!(value, &told[name], "{name}");
    }
    assert_eq!(report["summary"], SUMMARY);
    Ok(())
}
