//! Who takes a call is decided when it rings: by n8n, by the number that was called, or as usual.
//! A stage, what is known about the caller, a person, or nobody; and answers that make no sense.

use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::demo::{
    AgentCall, OUR_NUMBER, PATIENCE, Reply, Ringing, Trouble, World, WorldBuilder, pcm_of, voice,
};
use crate::{CALLER, Outcome, greeting_of, written};

const TOKEN: &str = "mosaic-lantern-27-api";
/// Whom callers are put through to.
const COLLEAGUE: &str = "+4930111222";
/// Two more numbers of ours.
const CLAIMS: &str = "+442079460001";
const BERLIN: &str = "+4930901821";

/// One process, three agents: a shop, its claims, and its branch in Berlin.
fn three_agents() -> std::io::Result<TempDir> {
    let mut agent: Value = serde_json::from_str(include_str!("../../src/agent/agent.json"))?;
    agent["agent_name"] = json!("Sam");
    agent["first_message"] = json!("This is {agent_name}.");
    agent["first_stage"] = json!("shop");
    agent["numbers"] = json!({CLAIMS: "claims", BERLIN: "berlin"});
    agent["stages"] = json!({
        "shop": {"voice": "Mark", "prompt": "prompt.md", "tools": ["bye"]},
        "claims": {"voice": "Tanya-English", "agent_name": "Clara", "prompt": "prompt.md",
            "first_message": "Claims, {agent_name} speaking.", "tools": ["bye", "to_shop"]},
        "berlin": {"voice": "Hans", "agent_name": "Hans", "language": "de-DE",
            "prompt": "prompt.md", "first_message": "Guten Tag, hier ist {agent_name}.",
            "tools": ["bye"]},
        "vip": {"voice": "Eva", "prompt": "prompt.md", "first_message": "Hello again. {facts}",
            "tools": ["bye"]}});
    agent["tools"] = json!({
        "bye": {"description": "Ends.", "hang_up": true},
        "to_shop": {"description": "Goes on.",
            "enter_stage": {"stage": "shop", "message": "Go on."}}});
    let directory = tempfile::tempdir()?;
    let files = [
        ("agent.json", agent.to_string()),
        ("prompt.md", "You are {agent_name}. Known: [{facts}]".to_owned()),
    ];
    for (name, text) in files {
        fs::write(directory.path().join(name), text)?;
    }
    Ok(directory)
}

fn builder(agents: &TempDir) -> WorldBuilder {
    World::builder(env!("CARGO_BIN_EXE_callbridge"))
        .setting("AGENT_DIR", agents.path().display())
        .setting("API_TOKEN", TOKEN)
}

fn n8n_says(world: &World, answer: &Value) {
    world.n8n.set_reply("1", Reply::json(200, answer));
}

#[track_caller]
fn rings(world: &World, to: &str) -> Result<(Ringing, AgentCall), Trouble> {
    let ringing = world.ring_with(CALLER, &[("To", to), ("Called", to)])?;
    Ok((ringing, world.ultravox.next_call(PATIENCE)?))
}

fn prompt_of(agent: &AgentCall) -> &str {
    agent.request()["systemPrompt"].as_str().unwrap_or_default()
}

/// The event in the call's journal, once it is there.
#[track_caller]
fn noted(world: &World, sid: &str, event: &str) -> Result<Value, Trouble> {
    // Reading a call's story waits until all that was noted before is on disk.
    let story = on_the_page(world, &format!("/calls/{sid}"))?;
    let events = story["events"].as_array().cloned().unwrap_or_default();
    Ok(events.into_iter().find(|one| one["event"] == event).unwrap_or_default())
}

#[track_caller]
fn on_the_page(world: &World, path: &str) -> Result<Value, Trouble> {
    let login = format!("Bearer {TOKEN}");
    Ok(world.request("GET", path, &[("Authorization", &login)], &[])?.json().clone())
}

#[test]
fn n8n_is_told_which_number_was_called_and_whether_the_carriers_vouch() -> Outcome {
    let agents = three_agents()?;
    let world = builder(&agents).start()?;
    rings(&world, CLAIMS)?;
    let asked = world.n8n.wait_for("1", 1, PATIENCE)?.remove(0).json;
    assert_eq!(
        (&asked["to"], &asked["direction"], &asked["stirVerstat"], &asked["data"]),
        (&json!(CLAIMS), &json!("in"), &json!("TN-Validation-Passed-A"), &json!("empty"))
    );
    world.ring_with(CALLER, &[("StirVerstat", "")])?;
    let asked = world.n8n.wait_for("1", 2, PATIENCE)?.remove(1).json;
    assert_eq!((&asked["to"], asked.get("stirVerstat")), (&json!(OUR_NUMBER), None));
    Ok(())
}

/// Without n8n, with one that has no opinion, and with one that is late.
#[test]
fn several_numbers_are_several_agents() -> Outcome {
    let agents = three_agents()?;
    let world = builder(&agents).setting("FIRST_MESSAGE", "Welcome.").start()?;
    for reply in [
        Reply::json(200, &json!({"firstMessage": null})),
        Reply::json(200, &json!({"stage": "nowhere"})),
        Reply::json(500, &json!({"message": "Error in workflow"})),
        Reply::Hang,
    ] {
        world.n8n.set_reply("1", reply);
        let (shop, agent) = rings(&world, OUR_NUMBER)?;
        assert_eq!(greeting_of(&agent), "Welcome.");
        assert_eq!(agent.request()["languageHint"], "en-US");
        assert!(prompt_of(&agent).starts_with("You are Sam. Known: []"), "{}", prompt_of(&agent));
        assert_eq!(noted(&world, &shop.call_sid, "decided")?, Value::Null);
        let (claims, agent) = rings(&world, CLAIMS)?;
        assert_eq!(greeting_of(&agent), "Claims, Clara speaking.");
        assert_eq!(agent.request()["voice"], "Tanya-English");
        let (berlin, agent) = rings(&world, BERLIN)?;
        assert_eq!(greeting_of(&agent), "Guten Tag, hier ist Hans.");
        assert_eq!(agent.request()["languageHint"], "de-DE");
        // What a person sees of it.
        assert_eq!(noted(&world, &claims.call_sid, "ring")?["to"], CLAIMS);
        let decided = noted(&world, &berlin.call_sid, "decided")?;
        assert_eq!(
            (&decided["what"], &decided["by"], &decided["stage"]),
            (&json!("agent"), &json!("numbers"), &json!("berlin"))
        );
        let story = on_the_page(&world, &format!("/calls/{}", berlin.call_sid))?;
        assert_eq!(story["summary"]["to"], BERLIN);
        assert_eq!(story["summary"]["decided"], json!({"what": "agent", "by": "numbers"}));
        for call in [shop, claims, berlin] {
            call.call_status(&world, "completed")?;
        }
    }
    world.bridge.wait_for_log("n8n: the agent has no stage \"nowhere\"")?;
    Ok(())
}

#[test]
fn the_language_of_a_stage_goes_with_it() -> Outcome {
    let agents = three_agents()?;
    let world = builder(&agents).start()?;
    n8n_says(&world, &json!({"stage": "claims"}));
    let (ringing, agent) = rings(&world, BERLIN)?;
    let _phone = ringing.open_stream(&world)?;
    let wish = agent.invoke("to_shop", &json!({}))?;
    let result = agent.wait_result(&wish)?;
    let stage: Value = serde_json::from_str(result["result"].as_str().unwrap_or_default())?;
    assert_eq!((&stage["voice"], &stage["languageHint"]), (&json!("Mark"), &json!("en-US")));
    Ok(())
}

#[test]
fn n8n_chooses_the_stage_and_says_what_is_known() -> Outcome {
    let agents = three_agents()?;
    let world = builder(&agents).start()?;
    n8n_says(&world, &json!({"stage": "vip", "facts": "Owes 12 euros since May."}));
    let (ringing, agent) = rings(&world, CLAIMS)?;
    assert_eq!(greeting_of(&agent), "Hello again. Owes 12 euros since May.");
    assert_eq!(agent.request()["voice"], "Eva");
    assert!(prompt_of(&agent).ends_with("[Owes 12 euros since May.]"), "{}", prompt_of(&agent));
    let decided = noted(&world, &ringing.call_sid, "decided")?;
    assert_eq!((&decided["by"], &decided["stage"]), (&json!("n8n"), &json!("vip")));
    let list = on_the_page(&world, "/calls")?;
    assert_eq!(list["live"][0]["decided"], json!({"what": "agent", "by": "n8n"}));
    assert_eq!(list["live"][0]["to"], CLAIMS);

    // n8n's own words are said in any stage, and facts alone leave the stage as it is.
    n8n_says(&world, &json!({"firstMessage": "Hello Anna.", "facts": "x".repeat(4_001)}));
    let (_, agent) = rings(&world, CLAIMS)?;
    assert_eq!(
        (greeting_of(&agent), &agent.request()["voice"]),
        ("Hello Anna.", &json!("Tanya-English"))
    );
    let cut = format!("Known: [{}…]", "x".repeat(4_000));
    assert!(prompt_of(&agent).ends_with(&cut), "{}", prompt_of(&agent));
    world.bridge.wait_for_log("n8n: facts has 4001 characters and is cut to 4000")?;
    assert!(!world.bridge.log().iter().any(|line| line.contains("Owes 12")), "not in the log");
    Ok(())
}

/// Nothing that n8n answers keeps a caller from being served.
#[test]
fn an_answer_that_makes_no_sense_is_named_and_the_call_goes_on() -> Outcome {
    let agents = three_agents()?;
    let world = builder(&agents).start()?;
    for (answer, said) in [
        (json!({"stage": 7, "firstMessage": null}), "n8n: stage is 7, which is no text"),
        (json!({"facts": ["a"]}), "n8n: facts is [\"a\"], which is no text"),
        (json!({"transfer": "yes"}), "n8n: transfer is \"yes\", which is neither true nor false"),
        (json!({"refuse": 1}), "n8n: refuse is 1, which is neither true nor false"),
        (json!({"firstMessage": 5, "stage": "shop"}), "200 with no text named firstMessage"),
        (json!({"facts": "x".repeat(1_000_000)}), "the default greeting is used"),
        // Nobody is there to be put through to.
        (json!({"transfer": true}), "n8n: transfer, but nobody can be rung (FALLBACK_NUMBER)"),
    ] {
        let before = world.bridge.log().len();
        n8n_says(&world, &answer);
        let (ringing, agent) = rings(&world, OUR_NUMBER)?;
        assert_eq!(greeting_of(&agent), "This is Sam.", "{said}");
        assert!(prompt_of(&agent).ends_with("Known: []"), "{}", prompt_of(&agent));
        let line = world.bridge.wait_for_log_since(before, said)?;
        assert!(line.contains("2 greeting warning: "), "{line}");
        ringing.call_status(&world, "completed")?;
    }
    Ok(())
}

#[test]
fn a_refused_call_is_not_answered_however_often_it_rings() -> Outcome {
    let agents = three_agents()?;
    let world = builder(&agents).setting("FALLBACK_NUMBER", COLLEAGUE).setting("MAX_CALLS", 1);
    let world = world.start()?;
    n8n_says(
        &world,
        &json!({"refuse": true, "transfer": true, "stage": "vip", "firstMessage": "Hi"}),
    );
    let first = world.ring(CALLER)?;
    assert_eq!(first.twiml.elements, ["Response", "Reject"]);
    assert!(first.twiml.xml.contains("<Reject reason=\"busy\"/>"), "{}", first.twiml.xml);
    world.bridge.wait_for_log("n8n: transfer counts for nothing beside refuse")?;
    world.bridge.wait_for_log("n8n: stage counts for nothing beside refuse")?;
    let again = |world: &World| world.ring_with(CALLER, &[("CallSid", &first.call_sid)]);
    assert_eq!(again(&world)?.twiml.xml, first.twiml.xml);
    assert_eq!(world.n8n.requests_of("1").len(), 1, "the same call is asked about once");
    world.bridge.wait_for_log("nothing was said, so there is no transcript to file")?;
    assert_eq!(noted(&world, &first.call_sid, "end")?["endedBy"], "Refused");
    assert_eq!(noted(&world, &first.call_sid, "answer")?["what"], "refuse");
    let list = on_the_page(&world, "/calls")?;
    assert_eq!(list["past"][0]["decided"], json!({"what": "refuse", "by": "n8n"}));
    assert_eq!(list["past"][0]["failed"], false);
    world.bridge.kill();
    world.bridge.restart()?;
    assert_eq!(again(&world)?.twiml.xml, first.twiml.xml);
    assert_eq!(world.ultravox.requests(), 0, "nobody is billed");
    // Its line is free.
    n8n_says(&world, &json!({}));
    rings(&world, OUR_NUMBER)?;
    Ok(())
}

#[test]
fn a_person_takes_the_call_at_once() -> Outcome {
    let agents = three_agents()?;
    let world = builder(&agents).setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    n8n_says(&world, &json!({"transfer": true, "stage": "vip"}));
    let ringing = world.ring(CALLER)?;
    assert_eq!(ringing.twiml.dial.as_deref(), Some(COLLEAGUE));
    world.bridge.wait_for_log("n8n: stage counts for nothing beside transfer")?;
    let decided = noted(&world, &ringing.call_sid, "decided")?;
    assert_eq!((&decided["what"], &decided["by"]), (&json!("transfer"), &json!("n8n")));
    // Twilio asks once more when an answer got lost.
    let ring_again = || world.ring_with(CALLER, &[("CallSid", &ringing.call_sid)]);
    assert_eq!(ring_again()?.twiml.dial.as_deref(), Some(COLLEAGUE));
    let over = ringing.next(&world, &[("DialCallStatus", "completed"), ("DialBridged", "true")])?;
    assert_eq!(over.twiml.elements, ["Response", "Hangup"]);
    world.bridge.wait_for_log("nothing was said, so there is no transcript to file")?;
    assert_eq!(noted(&world, &ringing.call_sid, "end")?["endedBy"], "Transferred");
    assert_eq!(ring_again()?.twiml.elements, ["Response", "Hangup"]);
    assert_eq!(world.ultravox.requests(), 0);
    // Picked up, but not connected: the agent takes it, and nobody is rung for it again.
    let ringing = world.ring(CALLER)?;
    let back =
        ringing.next(&world, &[("DialCallStatus", "completed"), ("DialBridged", "false")])?;
    assert!(back.twiml.stream_url.is_some(), "{}", back.twiml.xml);
    Ok(())
}

/// The page's phone rings nobody, and its owner learns what n8n has decided.
#[test]
fn a_test_call_is_decided_too() -> Outcome {
    let agents = three_agents()?;
    let world = builder(&agents).setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    let login = format!("Bearer {TOKEN}");
    let headers = [("Authorization", login.as_str()), ("Content-Type", "application/json")];
    let test_call = || world.request("POST", "/browser-call", &headers, b"{}");
    n8n_says(&world, &json!({"transfer": true, "facts": "A test."}));
    assert_eq!(test_call()?.status, 200);
    let agent = world.ultravox.next_call(PATIENCE)?;
    assert_eq!(prompt_of(&agent), "You are Sam. Known: [A test.]");
    world.bridge.wait_for_log("n8n: transfer, but nobody can be rung")?;
    n8n_says(&world, &json!({"refuse": true}));
    let refused = test_call()?;
    assert_eq!((refused.status, &refused.json()["error"]), (503, &json!("n8n refuses this call.")));
    Ok(())
}

#[test]
fn an_agent_takes_the_call_that_no_person_has_taken() -> Outcome {
    let agents = three_agents()?;
    let world = builder(&agents).setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    n8n_says(&world, &json!({"transfer": true, "facts": "Wants the boss."}));
    for restarts in [false, true] {
        let ringing = world.ring_with(CALLER, &[("To", CLAIMS)])?;
        assert_eq!(ringing.twiml.dial.as_deref(), Some(COLLEAGUE));
        assert_eq!(noted(&world, &ringing.call_sid, "transfer")?["event"], "transfer");
        if restarts {
            world.bridge.restart()?;
        }
        let asked = world.n8n.requests_of("1").len();
        let back = ringing.next(&world, &[("DialCallStatus", "no-answer")])?;
        let agent = world.ultravox.next_call(PATIENCE)?;
        let told = &agent.request()["firstSpeakerSettings"]["agent"]["prompt"];
        assert!(told.as_str().is_some_and(|text| text.contains("nobody answered")), "{told}");
        assert_eq!(prompt_of(&agent), "You are Clara. Known: [Wants the boss.]");
        assert_eq!(world.n8n.requests_of("1").len(), asked, "n8n would send it back again");
        let phone = back.open_stream(&world)?;
        agent.say("I am sorry.", &pcm_of(&voice(1, 100)))?;
        phone.expect_audio(&voice(1, 100))?;
        phone.hang_up()?;
    }
    assert_eq!(world.n8n.wait_for("2", 2, PATIENCE)?[1].json["data"], "Agent: I am sorry.");
    Ok(())
}

#[test]
fn a_call_that_is_taken_up_keeps_its_stage_and_what_is_known() -> Outcome {
    let agents = three_agents()?;
    let world = builder(&agents).start()?;
    n8n_says(&world, &json!({"stage": "vip", "facts": "Owes 12 euros."}));
    let (ringing, agent) = rings(&world, CLAIMS)?;
    let _phone = ringing.open_stream(&world)?;
    agent.user_said("Hello?")?;
    written(&world, &ringing.call_sid, &agent)?;
    // The agent's line breaks, and then the whole process.
    let next = |what: &str, agent: &AgentCall| {
        assert_eq!(agent.request()["voice"], "Eva", "{what}");
        assert!(prompt_of(agent).ends_with("Known: [Owes 12 euros.]"), "{what}");
    };
    agent.drop_line();
    let second = world.ultravox.next_call(PATIENCE)?;
    next("a new agent", &second);
    written(&world, &ringing.call_sid, &second)?;
    world.bridge.kill();
    world.bridge.restart()?;
    ringing.next(&world, &[])?;
    next("a new process", &world.ultravox.next_call(PATIENCE)?);

    // While it rings n8n is asked once more, and what it knew before holds if it is late then.
    let (ringing, _) = rings(&world, CLAIMS)?;
    noted(&world, &ringing.call_sid, "answer")?;
    world.bridge.kill();
    world.bridge.restart()?;
    world.n8n.set_reply("1", Reply::Hang);
    world.ring_with(CALLER, &[("CallSid", &ringing.call_sid), ("To", CLAIMS)])?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    next("a ring that goes on", &agent);
    let asked = world.n8n.requests_of("1");
    assert_eq!(asked.last().map(|asked| &asked.json["to"]), Some(&json!(CLAIMS)));
    Ok(())
}
