//! What the tests of several rooms share: an agent and settings made in a moment, sockets on
//! loopback, files of a test's own, and checks that the fuzz targets make too. Never part of the
//! program.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::diagram;
use crate::parties::ultravox::tool::Invocation;
use crate::setup::agent::Agent;
use crate::setup::settings::Config;

/// Ends a test that would hang. Never reached while all is well.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// A file in a test's directory.
pub(crate) fn file_in(directory: &TempDir, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = directory.path().join(name);
    fs::write(&path, content).unwrap();
    path
}

/// The `text` block of the doc comment that begins with `above`, one message an entry.
pub(crate) fn messages_in_doc(source: &str, above: &str) -> Vec<String> {
    let (_, after) = source.split_once(&format!("/// {above}")).unwrap();
    let (_, after) = after.split_once("/// ```text\n").unwrap();
    let (block, _) = after.split_once("/// ```\n").unwrap();
    let mut messages: Vec<String> = Vec::new();
    for line in block.lines().map(|line| line.trim_start_matches("///").trim_end()) {
        match line.strip_prefix("  ") {
            // A message that is too long for one line goes on in the next.
            Some(more) => messages.last_mut().unwrap().push_str(more),
            None => messages.push(line.trim_start().to_owned()),
        }
    }
    messages
}

/// The two required settings, and these.
pub(crate) fn settings(pairs: &[(&str, &str)]) -> Result<Config, Vec<String>> {
    let required = [("ULTRAVOX_API_KEY", "key-1"), ("PUBLIC_URL", "https://bridge.example")];
    let all = required.iter().chain(pairs);
    let values = all.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Config::from_values(values, Vec::new())
}

/// Settings with which the built-in agent offers all that it can; they lead nowhere.
pub(crate) fn full_settings() -> Config {
    let config = settings(&[
        ("N8N_WEBHOOK_URL", "https://n8n.example/webhook/call"),
        ("ULTRAVOX_CORPUS_ID", "corpus-1"),
    ]);
    config.ok().unwrap()
}

/// The agent that is compiled in, as `serve` takes it with these settings.
pub(crate) fn full_agent() -> Agent {
    Agent::load(&full_settings()).ok().unwrap()
}

/// Two ends of one connection on loopback.
pub(crate) fn sockets() -> (Arc<TcpStream>, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (near, _) = listener.accept().unwrap();
    for socket in [&near, &far] {
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.set_write_timeout(Some(DEADLINE)).unwrap();
    }
    (Arc::new(near), far)
}

/// A small agent without a mistake.
pub(crate) fn small_agent() -> Value {
    let built_in: Value = serde_json::from_str(include_str!("agent/agent.json")).unwrap();
    json!({
        "agent_name": "Ada",
        "company_name": "Example",
        "language": "en-GB",
        "first_message": "Hello.",
        "phrases": built_in["phrases"],
        "first_stage": "hello",
        "stages": {
            "hello": {"voice": "Mark", "prompt": "hello.md", "tools": ["go_on", "book", "bye"]},
            "second": {"voice": "Mark", "prompt": "second.md", "tools": ["note", "look", "bye"]},
        },
        "tools": {
            "go_on": {
                "description": "Goes on.",
                "parameters": {"type": "object", "properties": {"why": {"type": "string"}}},
                "enter_stage": {"stage": "second", "message": "Because: {why}."},
            },
            "book": {
                "description": "Books.",
                "parameters": {
                    "type": "object",
                    "properties": {"place": {"type": "string"}, "when": {"type": "string"}},
                    "required": ["place"],
                },
                "n8n": {"route": "3", "calendar": "place"},
                "timeout_s": 30,
            },
            "note": {"description": "Notes.", "reply": "Noted as {random_number}, {agent_name}."},
            "look": {"description": "Looks up.", "ultravox": {"tool": "queryCorpus"}},
            "bye": {"description": "Ends the call.", "hang_up": true},
        },
        "calendars": {"Berlin": "berlin@example.com"},
    })
}

/// The prompt of `hello` has its last placeholder in line 3.
pub(crate) const HELLO: &str =
    "You are {agent_name}.\n\nToday is {now}. {\"json\": \"is not a placeholder\"}";

pub(crate) fn read_agent(agent: &str, hello: &str) -> Result<Agent, Vec<String>> {
    Agent::from_files(&|name| match name {
        "agent.json" => Ok(agent.to_owned()),
        "hello.md" => Ok(hello.to_owned()),
        "second.md" => Ok("Say goodbye.".to_owned()),
        _ => Err("is not here".to_owned()),
    })
}

pub(crate) fn take(object: &mut Value, key: &str) {
    object.as_object_mut().unwrap().remove(key).unwrap();
}

pub(crate) fn built_in_agent() -> Agent {
    Agent::read(None, &mut Vec::new()).ok().unwrap()
}

pub(crate) fn invocation(tool: &str, parameters: &Value) -> Invocation {
    let message = json!({"toolName": tool, "invocationId": "i1", "parameters": parameters});
    Invocation::parse(&message).unwrap()
}

pub(crate) const JOURNAL: &str = r#"{"event":"ring","callSid":"CA1","number":"+4930123456"}
{"at":"2020-01-01T10:00:00Z","event":"agent","callId":"7c21","agent":1}
{"event":"said","ordinal":2,"speaker":"User","text":"Second, as first heard"}
{"event":"said","ordinal":1,"speaker":"Agent","text":"First"}
{"event":"tool","tool":"verify","outcome":"done","ms":3}
{"event":"said","ordinal":2,"speaker":"User","text":"Second"}
{"event":"weather","rain":true}
{"at":"2020-01-02T10:00:00Z","event":"end","endedBy":"AgentHungUp","seconds":61}
"#;

/// As n8n would read it: names are unique, every line leads to a node, and whatever goes wrong or
/// right there is an answer at the end.
pub(crate) fn check_workflow(workflow: &Value) {
    let nodes = workflow["nodes"].as_array().unwrap();
    let mut names = BTreeSet::new();
    let mut ids = BTreeSet::new();
    let mut places = BTreeSet::new();
    for node in nodes {
        assert!(names.insert(node["name"].as_str().unwrap()), "two nodes {}", node["name"]);
        assert!(ids.insert(node["id"].as_str().unwrap()), "two ids of {}", node["name"]);
        assert!(places.insert(node["position"].to_string()), "{} hides another", node["name"]);
    }
    let connections = workflow["connections"].as_object().unwrap();
    for (from, outputs) in connections {
        assert!(names.contains(from.as_str()), "a line from nowhere: {from}");
        for line in outputs["main"].as_array().unwrap().iter().flat_map(|o| o.as_array().unwrap()) {
            assert!(names.contains(line["node"].as_str().unwrap()), "a line to nowhere: {line}");
        }
    }
    for node in nodes.iter().filter(|node| !node["type"].as_str().unwrap().ends_with("stickyNote"))
    {
        let name = node["name"].as_str().unwrap();
        let outputs = connections.get(name).map(|outputs| outputs["main"].as_array().unwrap());
        let kind = node["type"].as_str().unwrap().trim_start_matches("n8n-nodes-base.");
        let wanted = match kind {
            "respondToWebhook" | "stopAndError" => continue,
            "switch" => node["parameters"]["rules"]["values"].as_array().unwrap().len() + 1,
            "if" => 2,
            _ if node["onError"] == "continueErrorOutput" => 2,
            _ => 1,
        };
        let outputs = outputs.map(|outputs| outputs.iter().filter(|to| to[0]["node"].is_string()));
        assert_eq!(outputs.map(Iterator::count), Some(wanted), "{name} ({kind}) has loose ends");
    }
    let lines = connections["Route"]["main"].as_array().unwrap();
    assert_eq!(lines.last().unwrap()[0]["node"], "Unknown route", "the fallback comes last");
}

/// Whatever the names are: every node that a line leads to is there, and no name can end the
/// quotes it stands in.
pub(crate) fn check_diagram(agent: &Agent) {
    let diagram = diagram::mermaid(agent);
    let lines: Vec<&str> = diagram.lines().map(str::trim).collect();
    assert_eq!(lines.first(), Some(&"flowchart TD"));
    for line in &lines {
        assert!(matches!(line.matches('"').count(), 0 | 2), "{line}");
        let Some((_, to)) = line.split_once(" -->") else {
            continue;
        };
        let to = to.rsplit("| ").next().unwrap().trim();
        let node = [format!("{to}["), format!("{to}(")];
        assert!(lines.iter().any(|line| node.iter().any(|node| line.starts_with(node))), "{line}");
    }
    assert!(!diagram::plain(agent).is_empty());
}

/// A process that is being started has copies of all our files until it has become another
/// program, and with them our locks. Whoever starts one, and whoever counts on locks, has it alone.
pub(crate) static NO_FORK: Mutex<()> = Mutex::new(());
