//! The agent as it is loaded: the built-in one, one in a directory, and a small one.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::time::Duration;

use serde_json::json;
use tempfile::tempdir;

use crate::setup::agent::{Agent, BUILT_IN_AGENT, ToolAction};
use crate::testing::{HELLO, file_in, read_agent, settings, small_agent, take};

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
fn a_transfer_is_offered_if_there_is_somebody() {
    let mut file = small_agent();
    file["people"] = json!({"Claims": "+4930555001"});
    let tools = [
        ("fallback", json!(true), false),
        ("named", json!("claims"), true),
        ("number", json!("+4930555002"), true),
    ];
    for (name, to, _) in &tools {
        file["tools"][name] = json!({"description": "To a person.", "transfer": to});
    }
    file["stages"]["second"]["tools"] = json!(["fallback", "named", "number"]);
    let scratch = tempdir().unwrap();
    for (name, text) in
        [("agent.json", file.to_string()), ("hello.md", HELLO.into()), ("second.md", "x".into())]
    {
        file_in(&scratch, name, text);
    }
    let directory = scratch.path().display().to_string();
    for fallback in ["", "+4930123456"] {
        let config = settings(&[("AGENT_DIR", &directory), ("FALLBACK_NUMBER", fallback)]);
        let agent = Agent::load(&config.ok().unwrap()).ok().unwrap();
        for (name, _, without) in &tools {
            let offered = agent.stages["second"].tools.iter().any(|own| own == name);
            assert_eq!(offered, *without || !fallback.is_empty(), "{name} {fallback}");
        }
    }
}

#[test]
fn what_a_person_hears_is_whole_sentences() {
    let mut agent = read_agent(&small_agent().to_string(), HELLO).ok().unwrap();
    let cases = [
        ("Anna, a claim", "A call for Example. Anna, a claim. To take it, press 1."),
        ("Anna: who pays?", "A call for Example. Anna: who pays? To take it, press 1."),
        ("{reason}", "A call for Example. {reason}. To take it, press 1."),
        ("", "A call for Example.  To take it, press 1."),
    ];
    for (reason, wanted) in cases {
        assert_eq!(agent.whisper(reason), wanted);
    }
    agent.phrases.whisper = "Take it.".into();
    assert_eq!(agent.whisper("Anna"), "Take it.");

    // Agent files are older than this phrase.
    let mut old = small_agent();
    take(&mut old["phrases"], "whisper");
    let old = read_agent(&old.to_string(), HELLO).ok().unwrap();
    assert_eq!(old.whisper("Anna"), "A call for Example. Anna. To take it, press 1.");
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
