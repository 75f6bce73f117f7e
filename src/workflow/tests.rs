//! The printed n8n workflow, read as n8n would read it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::testing::{HELLO, built_in_agent, check_workflow, read_agent, small_agent};
use crate::workflow::workflow_for;

/// Every route that the Switch knows, and the node that it leads to.
fn branches(workflow: &Value) -> Vec<(String, String)> {
    let nodes = workflow["nodes"].as_array().unwrap();
    let route = nodes.iter().find(|node| node["name"] == "Route").unwrap();
    let rules = route["parameters"]["rules"]["values"].as_array().unwrap();
    let lines = workflow["connections"]["Route"]["main"].as_array().unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let pairs = rules.iter().zip(lines);
    pairs
        .map(|(rule, to)| {
            (text(&rule["conditions"]["conditions"][0]["rightValue"]), text(&to[0]["node"]))
        })
        .collect()
}

#[test]
fn the_workflow_of_the_built_in_agent_is_the_one_in_the_file() {
    let printed = workflow_for(&built_in_agent()).unwrap();
    let file: Value = serde_json::from_str(include_str!("../agent/n8n-workflow.json")).unwrap();
    assert_eq!(printed, file);
    check_workflow(&printed);
    let wanted = [("1", "Greetings"), ("2", "Transcript table"), ("3", "Booking")];
    assert_eq!(branches(&printed), wanted.map(|(route, node)| (route.to_owned(), node.to_owned())));
}

#[test]
fn every_tool_of_ones_own_has_a_branch_that_names_it_and_its_parameters() {
    let mut agent = small_agent();
    agent["tools"]["check_order"] = json!({
        "description": "Finds out\nwhere an order is.",
        "parameters": {
            "type": "object",
            "properties": {
                "order_number": {"type": "string", "description": "As on the bill."},
                "in": {"type": "string"},
            },
            "required": ["order_number"],
        },
        "n8n": {"route": "10", "calendar": "in"},
    });
    agent["tools"]["Route"] = json!({"description": "An odd name.", "n8n": {"route": "4"}});
    agent["stages"]["second"]["tools"] = json!(["note", "look", "bye", "check_order", "Route"]);
    let agent = read_agent(&agent.to_string(), HELLO).ok().unwrap();
    let printed = workflow_for(&agent).unwrap();
    assert_eq!(printed, workflow_for(&agent).unwrap(), "two prints are the same");
    check_workflow(&printed);
    let found = branches(&printed);
    let own: Vec<(&str, &str)> =
        found.iter().skip(3).map(|(r, n)| (r.as_str(), n.as_str())).collect();
    assert_eq!(own, [("4", "Tool Route"), ("10", "Tool check_order")]);
    let nodes = printed["nodes"].as_array().unwrap();
    let text = |name: &str, parameter: &str| {
        let node = nodes.iter().find(|node| node["name"] == name).unwrap();
        node["parameters"][parameter].as_str().unwrap().to_owned()
    };
    let note = text("Tool check_order: note", "content");
    for line in [
        "## Route 10: check_order",
        "**check_order**: Finds out where an order is.",
        "- `order_number` (string): As on the bill.",
        "- `calendar_id` (string, optional): e-mail of the calendar for in",
    ] {
        assert!(note.lines().any(|found| found == line), "{line:?} is not in:\n{note}");
    }
    let answer = text("Tool check_order: answer", "responseBody");
    assert!(answer.contains("check_order is not connected"), "{answer}");
}

#[test]
fn tools_that_share_a_route_share_a_branch() {
    let mut agent = small_agent();
    for (tool, route) in [("ask", "4"), ("tell", "4"), ("greet", "1"), ("book_more", "3")] {
        agent["tools"][tool] = json!({"description": "Asks.", "n8n": {"route": route}});
    }
    let agent = read_agent(&agent.to_string(), HELLO).ok().unwrap();
    let printed = workflow_for(&agent).unwrap();
    check_workflow(&printed);
    let found = branches(&printed);
    assert_eq!(found.len(), 4, "{found:?}");
    assert_eq!(found.last().unwrap(), &("4".to_owned(), "Tool ask, tell".to_owned()));
    assert!(printed.to_string().contains("These tools share a route"));
}

/// n8n reads `=…` and `{{ … }}` in a field as code.
#[test]
fn a_route_that_n8n_would_take_for_code_is_spelled_out() {
    let mut agent = small_agent();
    for (tool, route) in [("plain", "check-order_2.a"), ("code", "={{x}}"), ("quoted", "\"ü👋")]
    {
        agent["tools"][tool] = json!({"description": "Asks.", "n8n": {"route": route}});
    }
    let agent = read_agent(&agent.to_string(), HELLO).ok().unwrap();
    let printed = workflow_for(&agent).unwrap();
    check_workflow(&printed);
    let own: BTreeSet<String> = branches(&printed).into_iter().skip(3).map(|(r, _)| r).collect();
    let wanted = [
        "check-order_2.a",
        "={{ \"\\u003d\\u007b\\u007b\\u0078\\u007d\\u007d\" }}",
        "={{ \"\\u0022\\u00fc\\ud83d\\udc4b\" }}",
    ];
    assert_eq!(own, wanted.map(str::to_owned).into());
}
