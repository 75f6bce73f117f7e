//! The verb `callbridge diagram`: the agent's stages, what leads from one to the next, and the
//! tools, as a picture for [Mermaid](https://mermaid.js.org) or as text.
//!
//! It shows what the agent files say. A tool that is not offered, because a setting it needs is
//! missing, is in the picture all the same.

use std::collections::BTreeMap;

use crate::setup::agent::{Agent, Tool, ToolAction, TransferTo};
use crate::setup::stop::Stop;
use crate::toolbox::log::say;
use crate::usage::options;

const HELP: &str = "\
callbridge diagram: draws the agent's stages and tools.

  Reads the agent's files (AGENT_DIR, or the built-in agent) and prints a
  picture of them for Mermaid (mermaid.js.org). It changes nothing.

usage: callbridge diagram [--plain]

  --plain   as text, to read in the terminal
";

pub(crate) fn run(words: &[&str]) -> Result<(), Stop> {
    let Some(given) = options("diagram", HELP, &["--plain"], words)? else { return Ok(()) };
    let agent = Agent::alone()?;
    say(&if given.is_empty() { mermaid(&agent) } else { plain(&agent) });
    Ok(())
}

/// ```text
/// flowchart TD
///     caller(["a call comes in"]) --> s0
///     s0["greeting<br/>Sara, voice Tanya-English<br/>verify: by callbridge"]
///     s0 -->|"move_to_main_convo"| s1
///     s0 -->|"hangUp"| over(["the call ends"])
/// ```
///
/// Names stand between quotes only, never as the name of a node: Mermaid has words of its own
/// (`end`), and stages may have any name.
pub(crate) fn mermaid(agent: &Agent) -> String {
    let stages = in_order(agent);
    let number: BTreeMap<&str, usize> =
        stages.iter().enumerate().map(|(number, stage)| (*stage, number)).collect();
    let mut nodes =
        vec!["flowchart TD".to_owned(), "    caller([\"a call comes in\"]) --> s0".into()];
    nodes.extend(agent.entries().iter().skip(1).map(|(stage, numbers)| {
        let to = number.get(stage).copied().unwrap_or_default();
        format!("    caller -->|\"{}\"| s{to}", quoted(&entry(numbers)))
    }));
    let mut lines = Vec::new();
    let (mut ends, mut people) = (false, Vec::new());
    for stage in &stages {
        let from = number.get(stage).copied().unwrap_or_default();
        let mut label = vec![format!("<b>{}</b>", quoted(stage)), quoted(&speaker(agent, stage))];
        for (name, tool) in tools_of(agent, stage) {
            let to = match &tool.action {
                ToolAction::EnterStage { stage, .. } => {
                    let to = number.get(stage.as_str()).copied().unwrap_or_default();
                    format!("s{to}")
                }
                ToolAction::HangUp(_) => {
                    ends = true;
                    "over".to_owned()
                }
                ToolAction::Transfer(to) => {
                    let whom = whom(agent, to);
                    let known = people.iter().position(|known| *known == whom);
                    let at = known.unwrap_or_else(|| {
                        people.push(whom);
                        people.len() - 1
                    });
                    format!("p{at}")
                }
                ToolAction::N8n { .. } | ToolAction::Reply(_) | ToolAction::Ultravox { .. } => {
                    label.push(format!("{}: {}", quoted(name), quoted(&what(agent, tool))));
                    continue;
                }
            };
            lines.push(format!("    s{from} -->|\"{}\"| {to}", quoted(name)));
        }
        nodes.push(format!("    s{from}[\"{}\"]", label.join("<br/>")));
    }
    if ends {
        nodes.push("    over([\"the call ends\"])".to_owned());
    }
    for (at, whom) in people.iter().enumerate() {
        nodes.push(format!("    p{at}([\"{}\"])", quoted(whom)));
    }
    nodes.append(&mut lines);
    nodes.join("\n") + "\n"
}

/// ```text
/// greeting (first stage): Sara, voice Tanya-English
///   verify              by callbridge
///   move_to_main_convo  -> main_convo
/// ```
pub(crate) fn plain(agent: &Agent) -> String {
    let widest = agent.tools.keys().map(|name| name.chars().count()).max().unwrap_or_default();
    let mut lines = Vec::new();
    for stage in in_order(agent) {
        if !lines.is_empty() {
            lines.push(String::new());
        }
        let is_it = |(entry, _): &&(&str, _)| *entry == stage;
        let first = match agent.entries().iter().find(is_it) {
            Some(_) if stage == agent.first_stage => " (first stage)".to_owned(),
            Some((_, numbers)) => format!(" (calls that come in: {})", entry(numbers)),
            None => String::new(),
        };
        lines.push(format!("{}{first}: {}", one_line(stage), speaker(agent, stage)));
        for (name, tool) in tools_of(agent, stage) {
            lines.push(format!("  {name:widest$}  {}", what(agent, tool)));
        }
    }
    lines.join("\n") + "\n"
}

/// Which calls begin there.
fn entry(numbers: &[&str]) -> String {
    if numbers.is_empty() { "where n8n says so".to_owned() } else { numbers.join(", ") }
}

/// From those where calls begin, in the order in which their tools lead to the others.
fn in_order(agent: &Agent) -> Vec<&str> {
    let mut stages: Vec<&str> = agent.entries().into_iter().map(|(stage, _)| stage).collect();
    let mut next = 0;
    while let Some(stage) = stages.get(next).copied() {
        for (_, tool) in tools_of(agent, stage) {
            if let ToolAction::EnterStage { stage, .. } = &tool.action
                && !stages.contains(&stage.as_str())
            {
                stages.push(stage);
            }
        }
        next += 1;
    }
    stages
}

fn tools_of<'a>(agent: &'a Agent, stage: &str) -> Vec<(&'a str, &'a Tool)> {
    let names = agent.stages.get(stage).map(|stage| stage.tools.as_slice()).unwrap_or_default();
    names.iter().filter_map(|name| Some((name.as_str(), agent.tools.get(name)?))).collect()
}

fn speaker(agent: &Agent, stage: &str) -> String {
    let Some(stage) = agent.stages.get(stage) else {
        return String::new();
    };
    let name = stage.agent_name.as_ref().unwrap_or(&agent.name);
    format!("{}, voice {}", one_line(name), one_line(&stage.voice))
}

/// Who does what a tool asks for, or where it leads.
fn what(agent: &Agent, tool: &Tool) -> String {
    match &tool.action {
        ToolAction::EnterStage { stage, .. } => format!("-> {}", one_line(stage)),
        ToolAction::N8n { route, .. } => format!("by n8n, route {}", one_line(route)),
        ToolAction::Reply(_) => "by callbridge".to_owned(),
        ToolAction::HangUp(_) => "-> the call ends".to_owned(),
        ToolAction::Transfer(to) => format!("-> {}", one_line(&whom(agent, to))),
        ToolAction::Ultravox { .. } => "by Ultravox".to_owned(),
    }
}

fn whom(agent: &Agent, to: &TransferTo) -> String {
    match to {
        TransferTo::Fallback(_) => "a person takes the call".to_owned(),
        TransferTo::Named(who) => format!("{who} takes the call"),
        TransferTo::Chosen { .. } => {
            let names: Vec<&str> = agent.people.keys().map(String::as_str).collect();
            format!("{} takes the call", names.join(" or "))
        }
    }
}

/// Any text between Mermaid's quotes. It reads `#35;` as the character 35, and Markdown and HTML
/// too; so all that is not a letter, a digit or harmless becomes such a number.
fn quoted(text: &str) -> String {
    let harmless = |c: char| c.is_alphanumeric() || " _-,.:".contains(c);
    let spelled = |c: char| if harmless(c) { c.to_string() } else { format!("#{};", u32::from(c)) };
    one_line(text).chars().map(spelled).collect()
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests;
