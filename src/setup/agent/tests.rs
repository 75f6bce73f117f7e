//! The agent as it is loaded: the built-in one, one in a directory, and a small one.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::time::Duration;

use tempfile::tempdir;

use crate::setup::agent::{Agent, BUILT_IN_AGENT, ToolAction};
use crate::testing::{HELLO, file_in, read_agent, settings, small_agent};

#[test]
fn the_built_in_agent_has_three_stages_and_no_mistakes() {
    let config = settings(&[
        ("N8N_WEBHOOK_URL", "https://n8n.example/webhook/call"),
        ("ULTRAVOX_CORPUS_ID", "corpus-1"),
    ]);
    let agent = Agent::load(&config.ok().unwrap()).ok().unwrap();
    assert_eq!((agent.name.as_str(), agent.first_stage.as_str()), ("Sara", "greeting"));
    assert_eq!(agent.stages.len(), 3);
    let meetings = "schedule_meeting submit_claim move_to_call_summary";
    for (name, voice, tools) in [
        ("greeting", "Tanya-English", "verify move_to_main_convo"),
        ("main_convo", "Mark", meetings),
        ("call_summary", "Tanya-English", ""),
    ] {
        let stage = &agent.stages[name];
        assert_eq!(stage.voice, voice, "{name}");
        for tool in ["queryCorpus", "hangUp"].into_iter().chain(tools.split_whitespace()) {
            assert!(stage.tools.iter().any(|own| own == tool), "{name} lacks {tool}");
        }
    }
    let books = |stage: &str| agent.stages[stage].tools.iter().any(|own| own == "schedule_meeting");
    assert!(!books("greeting") && !books("call_summary"), "nobody books before they are known");
    assert!(agent.stages.values().all(|stage| stage.prompt.len() > 200), "prompts were read");
    assert_eq!(agent.stages["main_convo"].agent_name.as_deref(), Some("Mark"));
}

#[test]
fn a_tool_that_could_only_fail_is_not_offered() {
    let agent = Agent::load(&settings(&[]).ok().unwrap()).ok().unwrap();
    let offered: Vec<&String> = agent.stages.values().flat_map(|stage| &stage.tools).collect();
    let is_offered = |name: &str| offered.iter().any(|tool| *tool == name);
    assert!(!is_offered("schedule_meeting"), "there is no n8n");
    assert!(!is_offered("queryCorpus"), "there is no corpus");
    assert!(is_offered("verify") && is_offered("submit_claim") && is_offered("hangUp"));
}

#[test]
fn first_message_in_the_settings_wins() {
    let agent = Agent::load(&settings(&[("FIRST_MESSAGE", "Welcome.")]).ok().unwrap());
    assert_eq!(agent.ok().unwrap().first_message, "Welcome.");
}

#[test]
fn an_agent_is_read_from_a_directory() {
    let scratch = tempdir().unwrap();
    for (name, text) in BUILT_IN_AGENT {
        file_in(&scratch, name, text.replace("SecureLife", "HomeMade"));
    }
    let directory = scratch.path().display().to_string();
    let config = settings(&[("AGENT_DIR", &directory)]).ok().unwrap();
    assert_eq!(Agent::load(&config).ok().unwrap().company, "HomeMade Insurance");

    fs::remove_file(scratch.path().join("greeting.md")).unwrap();
    let found = Agent::load(&config).err().unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("greeting.md  cannot be read from "), "{found:?}");
    assert!(found[0].ends_with("(stages.greeting.prompt)"), "{found:?}");
}

#[test]
fn a_small_agent_has_no_mistakes_and_sensible_defaults() {
    let agent = read_agent(&small_agent().to_string(), HELLO).ok().unwrap();
    assert_eq!(agent.stages["hello"].prompt, HELLO);
    assert_eq!(agent.tools["book"].within, Duration::from_secs(30));
    let note = &agent.tools["note"];
    assert_eq!(note.within, Duration::from_secs(10), "the default");
    assert_eq!(note.parameters.kind, "object");
    assert!(note.parameters.properties.is_empty() && note.parameters.required.is_empty());
    assert!(matches!(&note.action, ToolAction::Reply(text) if text.starts_with("Noted")));
}
