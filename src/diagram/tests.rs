//! The two diagrams, and that they survive odd names.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use serde_json::json;

use crate::diagram;
use crate::testing::{HELLO, built_in_agent, check_diagram, read_agent, small_agent, take};

#[test]
fn the_diagram_shows_stages_and_what_leads_from_one_to_the_next() {
    let agent = read_agent(&small_agent().to_string(), HELLO).ok().unwrap();
    let wanted = "\
flowchart TD
    caller([\"a call comes in\"]) --> s0
    s0[\"<b>hello</b><br/>Ada, voice Mark<br/>book: by n8n, route 3\"]
    s1[\"<b>second</b><br/>Ada, voice Mark<br/>note: by callbridge<br/>look: by Ultravox\"]
    over([\"the call ends\"])
    s0 -->|\"go_on\"| s1
    s0 -->|\"bye\"| over
    s1 -->|\"bye\"| over
";
    assert_eq!(diagram::mermaid(&agent), wanted);
    let wanted = "\
hello (first stage): Ada, voice Mark
  go_on  -> second
  book   by n8n, route 3
  bye    -> the call ends

second: Ada, voice Mark
  note   by callbridge
  look   by Ultravox
  bye    -> the call ends
";
    assert_eq!(diagram::plain(&agent), wanted);
}

#[test]
fn the_diagram_shows_where_calls_begin() {
    let mut agent = small_agent();
    agent["stages"]["claims"] = json!({"voice": "Eva", "prompt": "hello.md", "tools": ["bye"]});
    agent["stages"]["vip"] = agent["stages"]["claims"].clone();
    agent["stages"]["vip"]["first_message"] = json!("Hello again.");
    agent["numbers"] = json!({"+442079460001": "claims", "+442079460002": "hello"});
    let agent = read_agent(&agent.to_string(), HELLO).ok().unwrap();
    check_diagram(&agent);
    let diagram = diagram::mermaid(&agent);
    for line in [
        "caller([\"a call comes in\"]) --> s0",
        "caller -->|\"#43;442079460001\"| s1",
        "caller -->|\"where n8n says so\"| s2",
        "s1[\"<b>claims</b>",
        "s2[\"<b>vip</b>",
    ] {
        assert!(diagram.contains(&format!("    {line}")), "{line}: {diagram}");
    }
    let plain = diagram::plain(&agent);
    assert!(
        plain.contains("claims (calls that come in: +442079460001): Ada, voice Eva"),
        "{plain}"
    );
    assert!(plain.contains("vip (calls that come in: where n8n says so): Ada,"), "{plain}");
    assert!(plain.starts_with("hello (first stage): "), "{plain}");
}

#[test]
fn a_diagram_survives_any_name_of_a_stage() {
    let mut agent = small_agent();
    let odd = "end\" ] --> <b>`x`;\n# 1. ü";
    let stage = agent["stages"]["second"].take();
    take(&mut agent["stages"], "second");
    agent["stages"][odd] = stage;
    agent["tools"]["go_on"]["enter_stage"]["stage"] = json!(odd);
    // And it leads back, which must not go on for ever.
    agent["tools"]["back"] =
        json!({"description": "Back.", "enter_stage": {"stage": "hello", "message": "Again."}});
    agent["stages"][odd]["tools"] = json!(["back", "bye"]);
    let agent = read_agent(&agent.to_string(), HELLO).ok().unwrap();
    check_diagram(&agent);
    let diagram = diagram::mermaid(&agent);
    let label = "<b>end#34; #93; --#62; #60;b#62;#96;x#96;#59; #35; 1. ü</b>";
    assert!(diagram.contains(label), "{diagram}");
    assert!(diagram.contains("s1 -->|\"back\"| s0"), "{diagram}");
}

#[test]
fn the_diagram_shows_who_takes_a_call() {
    let mut agent = small_agent();
    agent["people"] = json!({"Claims": "+4930555001", "Sales \"&\" more": "+4930555002"});
    let transfers = [
        ("any", json!(true)),
        ("again", json!(true)),
        ("claims", json!("claims")),
        ("number", json!("+4930555003")),
        ("chosen", json!({"person": "who"})),
    ];
    let who = json!({"type": "object", "properties": {"who": {"type": "string"}},
        "required": ["who"]});
    for (name, to) in &transfers {
        agent["tools"][name] = json!({"description": "x", "transfer": to, "parameters": who});
    }
    agent["stages"]["second"]["tools"] = transfers.iter().map(|(name, _)| json!(name)).collect();
    let agent = read_agent(&agent.to_string(), HELLO).ok().unwrap();
    check_diagram(&agent);
    let diagram = diagram::mermaid(&agent);
    for wanted in [
        "p0([\"a person takes the call\"])",
        "p1([\"claims takes the call\"])",
        "p2([\"#43;4930555003 takes the call\"])",
        "p3([\"Claims or Sales #34;#38;#34; more takes the call\"])",
        "s1 -->|\"any\"| p0",
        "s1 -->|\"again\"| p0",
        "s1 -->|\"chosen\"| p3",
    ] {
        assert!(diagram.contains(wanted), "{wanted}: {diagram}");
    }
    let plain = diagram::plain(&agent);
    assert!(plain.contains("\n  claims  -> claims takes the call\n"), "{plain}");
}

#[test]
fn the_docs_show_the_diagram_of_the_built_in_agent() {
    let readme = include_str!("../../docs/agent-files.md");
    let shown = readme.split("```mermaid\n").nth(1).and_then(|rest| rest.split("```").next());
    assert_eq!(
        shown.unwrap_or_default(),
        diagram::mermaid(&built_in_agent()),
        "docs/agent-files.md is stale: put what `cargo run -- diagram` prints into its mermaid \
         block"
    );
}
