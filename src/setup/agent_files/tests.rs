//! Every slip that can be made in the agent's files, and what is said of it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use serde_json::{Value, json};

use crate::setup::agent::Agent;
use crate::testing::{HELLO, read_agent, small_agent, take};

fn mistakes(agent: &Value, hello: &str) -> Vec<String> {
    read_agent(&agent.to_string(), hello).err().unwrap_or_default()
}

/// A slip of the pen, and how the complaint about it must begin.
type Slip = (fn(&mut Value), &'static str);

const SLIPS: [Slip; 53] = [
    (|a| take(a, "company_name"), "agent.json  missing field `company_name`"),
    (|a| a["greetings"] = json!("Hi"), "agent.json  unknown field `greetings`"),
    (
        |a| a["language"] = json!(7),
        "agent.json  language invalid type: integer `7`, expected a string",
    ),
    (|a| take(&mut a["phrases"], "busy"), "agent.json  phrases missing field `busy`"),
    (|a| a["phrases"]["bye"] = json!(""), "agent.json  phrases unknown field `bye`"),
    (|a| a["first_stage"] = json!("hullo"), "agent.json  first_stage is \"hullo\", which is no"),
    (
        |a| take(&mut a["stages"]["hello"], "voice"),
        "agent.json  stages.hello missing field `voice`",
    ),
    (|a| a["stages"]["hello"]["tool"] = json!([]), "agent.json  stages.hello unknown field `tool`"),
    (|a| a["stages"]["hello"]["voice"] = json!(""), "agent.json  stages.hello.voice must be a"),
    (
        |a| a["stages"]["hello"]["voice"] = json!("v".repeat(41)),
        "agent.json  stages.hello.voice must be a voice's name or id, 1 to 40 characters",
    ),
    (
        |a| a["stages"]["hello"]["prompt"] = json!("hallo.md"),
        "hallo.md  is not here (stages.hello.prompt)",
    ),
    (
        |a| a["stages"]["hello"]["tools"] = json!(["go_on", "boook"]),
        "agent.json  stages.hello.tools names \"boook\", which is no tool",
    ),
    (
        |a| a["stages"]["third"] = a["stages"]["hello"].clone(),
        "agent.json  stages.third is entered by no tool of a stage that is entered",
    ),
    (
        |a| a["stages"]["hello"]["tools"] = json!(["book", "bye"]),
        "agent.json  stages.second is entered by no tool",
    ),
    (|a| a["tools"]["note"] = json!([]), "agent.json  tools.note must be an object"),
    (
        |a| take(&mut a["tools"]["note"], "description"),
        "agent.json  tools.note missing field `description`",
    ),
    (
        |a| take(&mut a["tools"]["note"], "reply"),
        "agent.json  tools.note must do exactly one of enter_stage, n8n, reply, hang_up, ",
    ),
    (
        |a| a["tools"]["note"]["hang_up"] = json!(true),
        "agent.json  tools.note must do exactly one of",
    ),
    (
        |a| a["tools"]["note"]["timeout"] = json!(5),
        "agent.json  tools.note unknown field `timeout`: `timeout_s` is",
    ),
    (
        |a| a["tools"]["go_on"]["enter_stage"]["sound"] = json!("gong"),
        "agent.json  tools.go_on must do exactly one of",
    ),
    (
        |a| a["tools"]["book"]["n8n"] = json!({"calendar": "place"}),
        "agent.json  tools.book must do exactly one of",
    ),
    (
        |a| a["tools"]["book now"] = a["tools"]["book"].clone(),
        "agent.json  tools.book now must be named with 1 to 64 letters, digits, _ and -",
    ),
    (
        |a| a["tools"]["b".repeat(65)] = a["tools"]["book"].clone(),
        "agent.json  tools.bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb must",
    ),
    (
        |a| a["tools"]["book"]["timeout_s"] = json!(0),
        "agent.json  tools.book.timeout_s must be from 1 to 30",
    ),
    (
        |a| a["tools"]["book"]["timeout_s"] = json!(31),
        "agent.json  tools.book.timeout_s must be from 1 to 30",
    ),
    (
        |a| a["tools"]["book"]["timeout_s"] = json!(-1),
        "agent.json  tools.book.timeout_s invalid value: integer `-1`, expected u64",
    ),
    (
        |a| a["tools"]["book"]["parameters"]["type"] = json!("string"),
        "agent.json  tools.book.parameters.type must be \"object\"",
    ),
    (
        |a| take(&mut a["tools"]["book"]["parameters"], "properties"),
        "agent.json  tools.book.parameters missing field `properties`",
    ),
    (
        |a| a["tools"]["book"]["parameters"]["properties"]["when"] = json!({"type": "date"}),
        "agent.json  tools.book.parameters.properties.when.type must be one of string, number",
    ),
    (
        |a| a["tools"]["book"]["parameters"]["properties"]["when"] = json!("string"),
        "agent.json  tools.book.parameters.properties.when.type must be one of string, number",
    ),
    (
        |a| a["tools"]["book"]["parameters"]["required"] = json!(["plaice"]),
        "agent.json  tools.book.parameters.required names \"plaice\", which is not among the",
    ),
    (
        |a| a["tools"]["book"]["n8n"]["calendar"] = json!("location"),
        "agent.json  tools.book has no parameter \"location\" for n8n.calendar",
    ),
    (|a| take(a, "calendars"), "agent.json  tools.book needs calendars, and there are none"),
    (
        |a| a["calendars"]["Rome"] = json!("rome.example.com"),
        "agent.json  calendars.Rome must be an e-mail address",
    ),
    (
        |a| a["tools"]["bye"]["hang_up"] = json!(false),
        "agent.json  tools.bye must say true behind hang_up or transfer",
    ),
    (
        |a| a["tools"]["bye"] = json!({"description": "To a person.", "transfer": false}),
        "agent.json  tools.bye must say true behind hang_up or transfer",
    ),
    (
        |a| a["tools"]["note"]["reply"] = json!("Noted: {full_name}."),
        "agent.json  tools.note uses {full_name}, which is not one of its parameters",
    ),
    (
        |a| a["tools"]["go_on"]["enter_stage"]["stage"] = json!("third"),
        "agent.json  tools.go_on enters \"third\", which is no stage",
    ),
    (
        |a| a["tools"]["bye"] = json!({"description": "To a person.", "transfer": "legal"}),
        "agent.json  tools.bye transfers to \"legal\", who is not among people, nor a number",
    ),
    (
        |a| a["tools"]["bye"] = json!({"description": "To a person.", "transfer": "030 555"}),
        "agent.json  tools.bye transfers to \"030 555\", who is not among people, nor a number",
    ),
    (
        |a| a["tools"]["bye"] = json!({"description": "To a person.", "transfer": 7}),
        "agent.json  tools.bye must do exactly one of enter_stage, n8n, reply, hang_up, transfer, \
         ultravox: transfer must be true, a number, a name among people, or {\"person\": ",
    ),
    (
        |a| a["tools"]["bye"] = json!({"description": "x", "transfer": {"person": "x", "at": 1}}),
        "agent.json  tools.bye must do exactly one of enter_stage, n8n, reply, hang_up, transfer, \
         ultravox: transfer must be true",
    ),
    (
        |a| a["tools"]["book"] = to_whom(a, json!([])),
        "agent.json  tools.book has no required parameter \"place\" for transfer.person",
    ),
    (
        |a| a["tools"]["book"] = to_whom(a, json!(["place"])),
        "agent.json  tools.book needs people, and there are none",
    ),
    (|a| a["people"] = json!({"Claims": "+49"}), "agent.json  people.Claims must be a number like"),
    (
        |a| a["phrases"]["whisper"] = json!("A call from {caller_number}."),
        "agent.json  phrases.whisper uses {caller_number}, which is not known",
    ),
    (
        |a| a["numbers"] = json!({"+442079460000": "helo"}),
        "agent.json  numbers.+442079460000 begins in \"helo\", which is no stage",
    ),
    (
        |a| a["numbers"] = json!({"020 7946 0000": "hello"}),
        "agent.json  numbers.020 7946 0000 is no number such as +442079460000",
    ),
    (
        |a| a["numbers"] = json!(["+442079460000"]),
        "agent.json  numbers invalid type: sequence, expected a map",
    ),
    (
        |a| a["numbers"] = json!({"+442079460000": 1}),
        "agent.json  numbers invalid type: integer `1`, expected a string",
    ),
    (
        |a| a["stages"]["second"]["language"] = json!("de"),
        "agent.json  stages.second.language is \"de\", without its region: use \"de-DE\"",
    ),
    (
        |a| a["stages"]["second"]["first_message"] = json!("Hello {who}."),
        "agent.json  stages.second.first_message uses {who}, which is not known",
    ),
    (
        |a| a["stages"]["second"]["first_message"] = json!(7),
        "agent.json  stages.second.first_message invalid type: integer `7`",
    ),
];

/// The small agent's `book` with a choice of people instead of calendars.
fn to_whom(agent: &Value, required: Value) -> Value {
    let mut tool = agent["tools"]["book"].clone();
    take(&mut tool, "n8n");
    tool["parameters"]["required"] = required;
    tool["transfer"] = json!({"person": "place"});
    tool
}

#[test]
fn every_slip_in_the_agent_file_is_named_with_its_place() {
    assert_eq!(mistakes(&small_agent(), HELLO), Vec::<String>::new());
    for (number, (slip, wanted)) in SLIPS.iter().enumerate() {
        let mut agent = small_agent();
        slip(&mut agent);
        let found = mistakes(&agent, HELLO);
        let named = found.iter().any(|mistake| mistake.starts_with(wanted));
        assert!(named, "slip {number}, \"{wanted}\" is not among {found:#?}");
    }
}

/// Twilio's voice may fail on a bare `de`, just when the apology is to be said.
#[test]
fn a_language_without_its_region_is_named_with_the_one_that_is_meant() {
    let found = |language: &str| {
        let mut agent = small_agent();
        agent["language"] = json!(language);
        mistakes(&agent, HELLO)
    };
    for right in ["de-DE", "en-GB", "es-419", "cmn-CN", "zh-Hant-TW", "sr-Cyrl-RS"] {
        assert_eq!(found(right), [""; 0], "{right}");
    }
    let wanted = [
        ("de", "\"de-DE\""),
        ("EN", "\"en-US\""),
        ("de_DE", "\"de-DE\""),
        ("pt_br", "\"pt-BR\""),
        ("ga", "a tag such as \"en-GB\""),
        ("german", "a tag such as \"en-GB\""),
        ("Deutsch (DE)", "a tag such as \"en-GB\""),
        ("", "a tag such as \"en-GB\""),
    ];
    for (wrong, meant) in wanted {
        let begins =
            format!("agent.json  language is \"{wrong}\", without its region: use {meant}");
        let found = found(wrong);
        assert_eq!(found.len(), 1, "{wrong}: {found:?}");
        assert!(found[0].starts_with(&begins), "{begins}: {found:?}");
    }
}

#[test]
fn a_slip_in_a_file_is_named_with_its_line() {
    let cases = [
        ("{\"agent_name\": \"Ada\",\n oops", HELLO, "agent.json  ", "at line 2 column"),
        ("", HELLO, "agent.json  ", "at line 1 column 0"),
    ];
    for (agent, hello, begins, ends) in cases {
        let found = read_agent(agent, hello).err().unwrap();
        assert_eq!(found.len(), 1, "{agent}: {found:?}");
        assert!(found[0].starts_with(begins) && found[0].contains(ends), "{agent}: {found:?}");
    }
    let prompts = [
        ("", "hello.md  is empty (stages.hello)"),
        (" \n\t\n", "hello.md  is empty (stages.hello)"),
        ("Hi\n\nyou, {customer}", "hello.md:3  {customer} is not known: use one of agent_name, "),
        ("{now} and {random_number}", "hello.md:1  {random_number} is not known: use one of "),
    ];
    for (hello, wanted) in prompts {
        let found = mistakes(&small_agent(), hello);
        assert_eq!(found.len(), 1, "{hello:?}: {found:?}");
        assert!(found[0].starts_with(wanted), "{hello:?}: {found:?}");
    }
    let found = Agent::from_files(&|_| Err("cannot be read".to_owned())).err().unwrap();
    assert_eq!(found, ["agent.json  cannot be read"]);
}

/// And it is not named twice, nor what only follows from it.
#[test]
fn a_misspelt_key_hides_nothing_else() {
    let mut agent = small_agent();
    rename(&mut agent["stages"]["hello"], "prompt", "promt");
    rename(&mut agent["tools"]["note"], "reply", "repply");
    rename(&mut agent["tools"]["book"]["parameters"], "required", "requird");
    rename(&mut agent["phrases"], "busy", "bussy");
    agent["stages"]["second"]["tools"] = json!(["note", "check_ordr"]);
    agent["colour"] = json!("red");
    take(&mut agent, "company_name");
    let found = mistakes(&agent, HELLO);
    let mut wanted = [
        "agent.json  unknown field `colour`",
        "agent.json  missing field `company_name`",
        "agent.json  phrases unknown field `bussy`: `busy` is meant",
        "agent.json  stages.hello unknown field `promt`: `prompt` is meant",
        "agent.json  stages.second.tools names \"check_ordr\", which is no tool",
        "agent.json  tools.book.parameters unknown field `requird`: `required` is meant",
        "agent.json  tools.note unknown field `repply`: `reply` is meant",
    ];
    wanted.sort_unstable();
    let mut found: Vec<&str> = found.iter().map(String::as_str).collect();
    found.sort_unstable();
    assert_eq!(found, wanted);
    assert_eq!(mistakes(&json!({}), HELLO).len(), 8, "each key that must be there");
    assert_eq!(mistakes(&json!([]), HELLO), ["agent.json  must be an object"]);
}

fn rename(object: &mut Value, from: &str, to: &str) {
    let value = object[from].take();
    take(object, from);
    object[to] = value;
}

#[test]
fn the_docs_show_several_agents_that_are_accepted() {
    let docs = include_str!("../../../docs/agent-files.md");
    let section = docs.split("## Several numbers, several agents").nth(1).unwrap();
    let shown = section.split("```json\n").nth(1).and_then(|rest| rest.split("```").next());
    let shown: Value = serde_json::from_str(&format!("{{{}}}", shown.unwrap())).unwrap();
    let mut agent: Value = serde_json::from_str(include_str!("../../init/agent.json")).unwrap();
    agent["first_stage"] = json!("reception");
    (agent["stages"], agent["numbers"]) = (shown["stages"].clone(), shown["numbers"].clone());
    let read = |name: &str| if name == "agent.json" { agent.to_string() } else { "Hi.".to_owned() };
    let agent = Agent::from_files(&|name| Ok(read(name))).map_err(|mistakes| mistakes.join("\n"));
    let entries = agent.as_ref().map(Agent::entries);
    let wanted =
        [("reception", vec![]), ("berlin", vec!["+4930901821"]), ("claims", vec!["+442079460001"])];
    assert_eq!(entries.map_err(String::as_str), Ok(wanted.to_vec()));
}

#[test]
fn all_slips_are_named_at_once() {
    let mut agent = small_agent();
    let slips = [8, 11, 24, 26, 33, 34, 35];
    for number in slips {
        (SLIPS[number].0)(&mut agent);
    }
    let found = mistakes(&agent, "{what}\n{ever}");
    let prompt = ["hello.md:1  {what} is not known", "hello.md:2  {ever} is not known"];
    for wanted in slips.iter().map(|number| SLIPS[*number].1).chain(prompt) {
        let named = found.iter().any(|mistake| mistake.starts_with(wanted));
        assert!(named, "\"{wanted}\" is not among {found:#?}");
    }
}
