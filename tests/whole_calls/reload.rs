//! The owner edits the agent while the server runs: what counts from which call on, and what is
//! said of mistakes. The real program, files in a directory of the test's own.

use std::path::Path;
use std::{fs, io};

use serde_json::{Value, json};

use crate::demo::{AgentCall, PATIENCE, Trouble, World};
use crate::{CALLER, Outcome, connect};

const TOKEN: &str = "mosaic-lantern-27-api";

/// Two stages, so that a call in progress has one before it.
fn agent() -> serde_json::Result<Value> {
    let mut agent: Value = serde_json::from_str(include_str!("../../src/agent/agent.json"))?;
    agent["first_stage"] = json!("order");
    agent["stages"] = json!({
        "order": {"voice": "Hans", "prompt": "order.md", "tools": ["pay"]},
        "payment": {"voice": "Eva", "prompt": "payment.md", "tools": ["bye"]}});
    agent["tools"] = json!({
        "pay": {"description": "Goes on.", "enter_stage": {"stage": "payment", "message": "Go on."}},
        "bye": {"description": "Ends.", "hang_up": true}});
    Ok(agent)
}

fn write(directory: &Path, agent: &Value, prompt: &str) -> io::Result<()> {
    fs::write(directory.join("agent.json"), agent.to_string())?;
    fs::write(directory.join("order.md"), format!("Order: {prompt}"))?;
    fs::write(directory.join("payment.md"), format!("Payment: {prompt}"))
}

fn world(directory: &Path) -> Result<World, Trouble> {
    let builder = World::builder(env!("CARGO_BIN_EXE_callbridge"));
    builder.setting("AGENT_DIR", directory.display()).setting("API_TOKEN", TOKEN).start()
}

fn prompt_of(call: &AgentCall) -> &str {
    call.request()["systemPrompt"].as_str().unwrap_or_default()
}

#[track_caller]
fn rings(world: &World) -> Result<AgentCall, Trouble> {
    world.ring(CALLER)?;
    world.ultravox.next_call(PATIENCE)
}

/// What the page is told of the agent.
#[track_caller]
fn on_the_page(world: &World) -> Result<Value, Trouble> {
    let login = format!("Bearer {TOKEN}");
    let answer = world.request("GET", "/calls", &[("Authorization", &login)], &[])?;
    Ok(answer.json()["agent"].clone())
}

#[test]
fn an_edited_prompt_counts_from_the_next_call_on() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let mut agent = agent()?;
    write(scratch.path(), &agent, "old")?;
    let world = world(scratch.path())?;
    let call = connect(&world)?;
    assert_eq!(
        (prompt_of(&call.agent), &call.agent.request()["voice"]),
        ("Order: old", &json!("Hans"))
    );
    let before = on_the_page(&world)?;
    assert_eq!(before["mistakes"], json!([]));

    agent["stages"]["order"]["voice"] = json!("Mark");
    agent["stages"]["extra"] = json!({"voice": "Eva", "prompt": "order.md", "tools": []});
    agent["tools"]["pay"]["enter_stage"]["stage"] = json!("extra");
    agent["stages"].as_object_mut().and_then(|stages| stages.remove("payment"));
    write(scratch.path(), &agent, "new, and longer")?;
    let next = rings(&world)?;
    assert_eq!(
        (prompt_of(&next), &next.request()["voice"]),
        ("Order: new, and longer", &json!("Mark"))
    );
    world.bridge.wait_for_log("agent files read again: Sara of SecureLife Insurance, 2 stages")?;
    let after = on_the_page(&world)?;
    assert_ne!(after["read"], before["read"]);

    // Who talks already goes on as it was begun, into a stage that is no more.
    let stage = call.act("pay", &json!({}))?;
    let stage: Value = serde_json::from_str(stage["result"].as_str().unwrap_or_default())?;
    assert_eq!((&stage["systemPrompt"], &stage["voice"]), (&json!("Payment: old"), &json!("Eva")));
    assert_eq!(call.act("bye", &json!({}))?["responseType"], "hang-up");

    let seen = world.bridge.log().len();
    rings(&world)?;
    world.bridge.wait_for_log_since(seen, "4 answer")?;
    let log = world.bridge.log();
    assert!(!log[seen..].iter().any(|line| line.contains("read again")), "nothing was edited");
    Ok(())
}

#[test]
fn mistakes_leave_the_agent_as_it_was_and_are_all_named() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let right = agent()?;
    write(scratch.path(), &right, "old")?;
    let world = world(scratch.path())?;
    let mut wrong = right.clone();
    wrong["stages"]["payment"] = json!({"voice": "Eva", "promt": "payment.md", "tools": ["bye"]});
    wrong["stages"]["order"]["tools"] = json!(["pay", "check_ordr"]);
    write(scratch.path(), &wrong, "new")?;
    let seen = world.bridge.log().len();
    assert_eq!(prompt_of(&rings(&world)?), "Order: old");
    for mistake in ["promt", "check_ordr", "the agent stays as it was"] {
        world.bridge.wait_for_log_since(seen, mistake)?;
    }
    let told = on_the_page(&world)?["mistakes"].to_string();
    assert!(told.contains("promt") && told.contains("check_ordr"), "{told}");

    fs::remove_file(scratch.path().join("agent.json"))?;
    let seen = world.bridge.log().len();
    assert_eq!(prompt_of(&rings(&world)?), "Order: old");
    world.bridge.wait_for_log_since(seen, "agent.json  cannot be read")?;

    write(scratch.path(), &right, "new")?;
    assert_eq!(prompt_of(&rings(&world)?), "Order: new");
    assert_eq!(on_the_page(&world)?["mistakes"], json!([]));
    Ok(())
}

/// Whoever has logged out of the terminal in which it runs, or says `systemctl reload`.
#[test]
fn a_sighup_reads_the_agent_and_ends_neither_process_nor_call() -> Outcome {
    let scratch = tempfile::tempdir()?;
    write(scratch.path(), &agent()?, "old")?;
    let world = world(scratch.path())?;
    let call = connect(&world)?;
    let seen = world.bridge.log().len();
    world.bridge.signal("HUP")?;
    world.bridge.wait_for_log_since(seen, "agent files read again")?;
    assert!(call.act("pay", &json!({}))?["responseType"] == "new-stage", "the call goes on");

    let world = World::builder(env!("CARGO_BIN_EXE_callbridge")).start()?;
    let call = connect(&world)?;
    for _ in 0..2 {
        let seen = world.bridge.log().len();
        world.bridge.signal("HUP")?;
        world.bridge.wait_for_log_since(seen, "the agent is built in")?;
    }
    call.enter_main_stage()?;
    rings(&world)?;
    Ok(())
}
