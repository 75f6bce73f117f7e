//! The built-in agent and its workflow: what a stranger starts with must be whole.

use std::collections::BTreeSet;

use crate::{Findings, Untidy, files_under, has_extension, numbered, read};

/// What Ultravox may be sent for one stage. Beyond about 15 KB its messages can time out.
const STAGE_BYTES_MAX: usize = 14_000;
/// The placeholders that a prompt may hold.
const PLACEHOLDERS: [&str; 4] = ["agent_name", "company_name", "now", "caller_number"];

#[test]
fn the_built_in_agent_is_complete() -> Result<(), Untidy> {
    let text = read("src/agent/agent.json")?;
    let agent: serde_json::Value = serde_json::from_str(&text)
        .map_err(|error| Untidy(format!("src/agent/agent.json is not JSON: {error}")))?;
    let mut found = Findings::default();
    let mut prompts_in_use = BTreeSet::new();
    for (stage_name, stage) in members(&agent, "stages") {
        let place = format!("src/agent/agent.json, stage {stage_name}");
        let Some(prompt) = stage.get("prompt").and_then(serde_json::Value::as_str) else {
            found.add(format!("{place}: no \"prompt\""));
            continue;
        };
        prompts_in_use.insert(prompt.to_owned());
        let Ok(body) = read(&format!("src/agent/{prompt}")) else {
            found.add(format!("{place}: there is no file src/agent/{prompt}"));
            continue;
        };
        let mut stage_bytes = body.len();
        for tool in stage.get("tools").and_then(serde_json::Value::as_array).into_iter().flatten() {
            let name = tool.as_str().unwrap_or_default();
            match agent.get("tools").and_then(|tools| tools.get(name)) {
                Some(definition) => stage_bytes += definition.to_string().len(),
                None => found.add(format!("{place}: there is no tool `{name}`")),
            }
        }
        if stage_bytes > STAGE_BYTES_MAX {
            found.add(format!(
                "{place}: prompt and tools are {stage_bytes} bytes: shorten them to \
                 {STAGE_BYTES_MAX}"
            ));
        }
    }
    for path in files_under("src/agent")? {
        let name = path.rsplit('/').next().unwrap_or_default();
        if !has_extension(name, "md") {
            if !["agent.json", "n8n-workflow.json"].contains(&name) {
                found.add(format!("{path}: neither a prompt, nor the agent, nor its workflow"));
            }
            continue;
        }
        if !prompts_in_use.contains(name) {
            found.add(format!("{path}: no stage of agent.json uses it"));
        }
        for (line, placeholder) in placeholders(&read(&path)?) {
            if !PLACEHOLDERS.contains(&placeholder.as_str()) {
                found.add(format!(
                    "{path}:{line}: {{{placeholder}}}: a prompt knows only {PLACEHOLDERS:?}"
                ));
            }
        }
    }
    found.verdict("the default agent has mistakes")
}

/// What a stranger imports must be safe and clear as it is. That its lines lead somewhere and that
/// `callbridge workflow` prints it is tested in `src/tests.rs`; that it works, with a real n8n.
#[test]
fn the_built_in_workflow_can_be_handed_out() -> Result<(), Untidy> {
    const PATH: &str = "src/agent/n8n-workflow.json";
    let workflow: serde_json::Value = serde_json::from_str(&read(PATH)?)
        .map_err(|error| Untidy(format!("{PATH} is not JSON: {error}")))?;
    let mut found = Findings::default();
    if workflow.get("active") != Some(&serde_json::Value::Bool(false)) {
        found.add(format!("{PATH}: its owner switches it on, not the import"));
    }
    let nodes = workflow.get("nodes").and_then(serde_json::Value::as_array);
    let text = |node: &serde_json::Value, pointer: &str| {
        node.pointer(pointer).and_then(serde_json::Value::as_str).unwrap_or_default().to_owned()
    };
    let mut advice = String::new();
    for node in nodes.into_iter().flatten() {
        let place = format!("{PATH}, node {}", text(node, "/name"));
        let kind = text(node, "/type");
        if !kind.starts_with("n8n-nodes-base.") {
            found.add(format!("{place}: `{kind}` does not come with n8n"));
        }
        if node.get("credentials").is_some() {
            found.add(format!("{place}: names a credential, which nobody else has"));
        }
        if text(node, "/name").starts_with("Tool ") {
            found.add(format!("{place}: this word is kept for the agent's own tools"));
        }
        match kind.as_str() {
            "n8n-nodes-base.stickyNote" => advice.push_str(&text(node, "/parameters/content")),
            "n8n-nodes-base.webhook" => {
                if text(node, "/parameters/responseMode") != "responseNode" {
                    found.add(format!("{place}: must be answered by a Respond to Webhook node"));
                }
                if node.pointer("/parameters/options/rawBody").is_none() {
                    found.add(format!("{place}: without Raw Body no signature can be checked"));
                }
            }
            _ => {}
        }
        if text(node, "/name") == "Secret"
            && node.pointer("/parameters/assignments/assignments/0/value")
                != Some(&serde_json::Value::String(String::new()))
        {
            found.add(format!("{place}: holds somebody's secret"));
        }
    }
    for what in [
        "N8N_WEBHOOK_URL",
        "N8N_HMAC_SECRET",
        "CRM",
        "sheet",
        "calendar",
        "Route 1",
        "Route 2",
        "Route 3",
        "callbridge workflow",
    ] {
        if !advice.contains(what) {
            found.add(format!("{PATH}: no note says {what}"));
        }
    }
    found.verdict("the workflow is not ready to be imported by others")
}

/// Everything in braces, with its line. A brace without a partner counts as a wrong placeholder.
fn placeholders(text: &str) -> Vec<(usize, String)> {
    let mut all = Vec::new();
    for (number, line) in numbered(text) {
        let mut rest = line;
        while let Some(at) = rest.find(['{', '}']) {
            let after = &rest[at + 1..];
            let end = after.find(['{', '}']).unwrap_or(after.len());
            all.push((number, after[..end].to_owned()));
            rest = after.get(end + 1..).unwrap_or_default();
        }
    }
    all
}

fn members<'a>(
    value: &'a serde_json::Value,
    key: &str,
) -> impl Iterator<Item = (&'a String, &'a serde_json::Value)> {
    value.get(key).and_then(serde_json::Value::as_object).into_iter().flatten()
}
