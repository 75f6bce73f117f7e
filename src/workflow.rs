//! The verb `callbridge workflow`: the n8n workflow that goes with the agent files, to import.
//!
//! `src/agent/n8n-workflow.json` is a workflow as n8n exports it: one webhook, a Switch on `route`,
//! a branch each for the greeting, the transcript and the booking. What is printed has one more
//! branch for every other route that a tool of the agent posts to, between those and the one for
//! unknown routes:
//!
//! ```text
//!   callbridge -> Secret -> ... -> Route --1--> greeting
//!                                        --2--> transcript
//!                                        --3--> booking
//!                                        --4--> Tool check_order -> Tool check_order: answer
//!                                        -----> Unknown route
//! ```
//!
//! The same agent files always give the same text, so that two prints can be compared.

use std::collections::BTreeMap;

use data_encoding::HEXLOWER;
use ring::digest;
use serde_json::{Value, json};

use crate::setup::agent::{Agent, Tool, ToolAction};
use crate::setup::stop::Stop;
use crate::toolbox::log::{complain, say};
use crate::usage::options;

const BUILT_IN: &str = include_str!("agent/n8n-workflow.json");
/// What the built-in workflow answers: greeting, transcript, booking.
const BUILT_IN_ROUTES: [&str; 3] = ["1", "2", "3"];
/// From the top of one branch to the end of its text, without its parameters.
const TEXT_HEIGHT: i64 = 180;
/// A line of a note.
const LINE_HEIGHT: i64 = 26;
/// Characters that fit a line of a note this wide.
const LINE_CHARS: usize = 105;
const NOTE_WIDTH: i64 = 960;
/// A row of nodes with their names, and the gap to the next branch.
const NODES_HEIGHT: i64 = 140;
const GAP: i64 = 40;

const HELP: &str = "\
callbridge workflow: prints the n8n workflow that goes with the agent files.

  Reads the agent's files (AGENT_DIR, or the built-in agent) and prints one JSON
  object, to import into n8n: a branch for each route that the agent's tools
  post to. The same files always give the same text. It changes nothing.

usage: callbridge workflow > workflow.json
";

pub(crate) fn run(words: &[&str]) -> Result<(), Stop> {
    if options("workflow", HELP, &[], words)?.is_none() {
        return Ok(());
    }
    let agent = Agent::alone()?;
    for (route, tools) in tools_by_route(&agent) {
        let wants = match route {
            "1" => "answers greetings",
            "2" => "takes transcripts",
            _ => continue,
        };
        for (name, _) in tools {
            complain(&format!(
                "callbridge: tools.{name} posts to route {route}, which {wants}: give it a route \
                 of its own"
            ));
        }
    }
    let workflow = workflow_for(&agent)
        .ok_or_else(|| Stop::Failed("callbridge: the built-in workflow cannot be read".into()))?;
    say(&format!("{workflow:#}\n"));
    Ok(())
}

/// None only if the built-in file has lost a node, which a test would have noticed.
pub(crate) fn workflow_for(agent: &Agent) -> Option<Value> {
    let mut workflow: Value = serde_json::from_str(BUILT_IN).ok()?;
    let own: Vec<Branch> = tools_by_route(agent)
        .into_iter()
        .filter(|(route, _)| !BUILT_IN_ROUTES.contains(route))
        .map(|(route, tools)| Branch { route, tools })
        .collect();
    let corner = node(&mut workflow, "Note unknown")?.get("position")?;
    let (left, top) = (corner.get(0)?.as_i64()?, corner.get(1)?.as_i64()?);
    let height: i64 = own.iter().map(Branch::height).sum();
    for name in ["Note unknown", "Unknown route"] {
        let position = node(&mut workflow, name)?.get_mut("position")?;
        let lower = position.get(1)?.as_i64()? + height;
        *position.get_mut(1)? = json!(lower);
    }
    let mut top = top;
    for branch in &own {
        let rules = node(&mut workflow, "Route")?.pointer_mut("/parameters/rules/values")?;
        rules.as_array_mut()?.push(branch.rule());
        let outputs = workflow.pointer_mut("/connections/Route/main")?.as_array_mut()?;
        // The last output is the one for unknown routes.
        outputs.insert(outputs.len().checked_sub(1)?, json!([to(&branch.name())]));
        workflow.get_mut("nodes")?.as_array_mut()?.extend(branch.nodes(left, top));
        let lines = json!({"main": [[to(&branch.answer())], [to("Failed")]]});
        workflow.get_mut("connections")?.as_object_mut()?.insert(branch.name(), lines);
        top += branch.height();
    }
    Some(workflow)
}

/// Short routes first: `4`, `5`, `10`, `orders`.
fn tools_by_route(agent: &Agent) -> Vec<(&str, Vec<(&str, &Tool)>)> {
    let mut routes: BTreeMap<(usize, &str), Vec<(&str, &Tool)>> = BTreeMap::new();
    for (name, tool) in &agent.tools {
        if let ToolAction::N8n { route, .. } = &tool.action {
            routes.entry((route.len(), route)).or_default().push((name, tool));
        }
    }
    routes.into_iter().map(|((_, route), tools)| (route, tools)).collect()
}

fn node<'a>(workflow: &'a mut Value, name: &str) -> Option<&'a mut Value> {
    let nodes = workflow.get_mut("nodes")?.as_array_mut()?;
    nodes.iter_mut().find(|node| node.get("name").is_some_and(|own| own == name))
}

fn to(node: &str) -> Value {
    json!({"node": node, "type": "main", "index": 0})
}

/// What n8n does for one route of the agent's own tools. Usually that is one tool; several that
/// share a route reach the same branch, which can tell them apart by their parameters only.
struct Branch<'a> {
    route: &'a str,
    tools: Vec<(&'a str, &'a Tool)>,
}

impl Branch<'_> {
    /// No node of the built-in workflow begins with this word, whatever the tool is called.
    fn name(&self) -> String {
        format!("Tool {}", self.tool_names())
    }

    fn tool_names(&self) -> String {
        let names: Vec<&str> = self.tools.iter().map(|(name, _)| *name).collect();
        names.join(", ")
    }

    fn answer(&self) -> String {
        format!("{}: answer", self.name())
    }

    /// One more rule of the Switch.
    fn rule(&self) -> Value {
        json!({
            "conditions": {
                "options": {
                    "caseSensitive": true,
                    "leftValue": "",
                    "typeValidation": "loose",
                    "version": 2,
                },
                "conditions": [{
                    "id": id(&format!("route {}", self.route)),
                    "leftValue": "={{ $json.body.route }}",
                    "rightValue": literal(self.route),
                    "operator": {"type": "string", "operation": "equals"},
                }],
                "combinator": "and",
            },
            "renameOutput": true,
            "outputKey": self.tool_names(),
        })
    }

    fn nodes(&self, left: i64, top: i64) -> [Value; 3] {
        let (name, answer) = (self.name(), self.answer());
        let row = top + self.text_height();
        // The model reads this. It must not believe that something has been done.
        let message = format!(
            "'{} is not connected to anything in n8n yet: nothing was done. It was called with ' + \
             JSON.stringify($json)",
            self.tool_names()
        );
        let data = json!({"mode": "raw", "jsonOutput": "={{ $json.body.data }}", "options": {}});
        let mut tool = n8n_node(&name, ("set", json!(3.4)), [left + 60, row], &data);
        tool["onError"] = json!("continueErrorOutput");
        [
            n8n_node(
                &format!("{name}: note"),
                ("stickyNote", json!(1)),
                [left, top],
                &json!({
                    "content": self.note(),
                    "width": NOTE_WIDTH,
                    "height": self.height() - GAP,
                    "color": 5,
                }),
            ),
            tool,
            n8n_node(
                &answer,
                ("respondToWebhook", json!(1.5)),
                [left + 420, row],
                &json!({
                    "respondWith": "json",
                    "responseBody": format!("={{{{ JSON.stringify({{ message: {message} }}) }}}}"),
                    "options": {},
                }),
            ),
        ]
    }

    /// What the person who connects the tool has to know: what it is for and what arrives.
    fn note(&self) -> String {
        let mut lines = vec![format!("## Route {}: {}", one_line(self.route), self.tool_names())];
        for (name, tool) in &self.tools {
            lines.push(format!("\n**{name}**: {}", one_line(&tool.description)));
            lines.extend(parameters(tool).iter().map(|parameter| format!("- {parameter}")));
        }
        if self.tools.len() > 1 {
            lines.push(
                "\nThese tools share a route, so only their parameters tell them apart. Give each \
                 a route of its own in agent.json if that is not enough."
                    .to_owned(),
            );
        }
        lines.push(format!(
            "\n**Your system:** add its node between *{}* and *{}*, with *On Error* set to \
             *Continue (using error output)* and that output connected to *Failed*. It finds the \
             parameters in `$json`. The agent is told what the answer says.",
            self.name(),
            self.answer()
        ));
        lines.join("\n")
    }

    fn text_height(&self) -> i64 {
        let lines = |text: &str| text.chars().count().div_ceil(LINE_CHARS);
        let of_tools: usize = self
            .tools
            .iter()
            .map(|(name, tool)| {
                let parameters = parameters(tool);
                let of_parameters: usize = parameters.iter().map(|text| lines(text)).sum();
                1 + lines(&format!("{name}: {}", tool.description)) + of_parameters
            })
            .sum();
        TEXT_HEIGHT + LINE_HEIGHT * i64::try_from(of_tools).unwrap_or_default()
    }

    /// With the gap to the next one.
    fn height(&self) -> i64 {
        self.text_height() + NODES_HEIGHT + GAP
    }
}

fn n8n_node(
    name: &str,
    (kind, version): (&str, Value),
    position: [i64; 2],
    parameters: &Value,
) -> Value {
    json!({
        "id": id(name),
        "name": name,
        "type": format!("n8n-nodes-base.{kind}"),
        "typeVersion": version,
        "position": position,
        "parameters": parameters,
    })
}

/// What n8n gets in `data`, a line each. A calendar arrives as its e-mail.
fn parameters(tool: &Tool) -> Vec<String> {
    let calendar = match &tool.action {
        ToolAction::N8n { calendar, .. } => calendar.as_deref(),
        _ => None,
    };
    let lines = tool.parameters.properties.iter().map(|(name, property)| {
        let text = |key: &str| property.get(key).and_then(Value::as_str).unwrap_or_default();
        let required = if tool.parameters.required.contains(name) { "" } else { ", optional" };
        if calendar == Some(name) {
            return format!("`calendar_id` (string{required}): e-mail of the calendar for {name}");
        }
        let name = one_line(name).replace('`', "'");
        format!("`{name}` ({}{required}): {}", text("type"), one_line(text("description")))
    });
    lines.collect()
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A value in a field of n8n. What it could take for an expression, or for a part of one, becomes
/// an expression that spells it out.
fn literal(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if !text.is_empty() && text.chars().all(is_plain) {
        return text.to_owned();
    }
    let unit = |unit: u16| ["\\u".to_owned(), HEXLOWER.encode(&unit.to_be_bytes())];
    let spelled: String = text.encode_utf16().flat_map(unit).collect();
    format!("={{{{ \"{spelled}\" }}}}")
}

/// n8n wants a UUID, and two prints of the same files must not differ.
fn id(of: &str) -> String {
    let digest = digest::digest(&digest::SHA256, format!("callbridge workflow: {of}").as_bytes());
    let mut id: String = HEXLOWER.encode(digest.as_ref()).chars().take(32).collect();
    for at in [20, 16, 12, 8] {
        id.insert(at, '-');
    }
    id
}

#[cfg(test)]
mod tests;
