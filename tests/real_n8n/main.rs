//! Whole calls with a real n8n as the bridge's counterpart: the workflow that `callbridge workflow`
//! prints, loaded into the n8n that people install, between the pretend Twilio and Ultravox of
//! `src/demo/`. What it shows that the pretend n8n cannot: that the workflow does what it says,
//! and that the log names what n8n really does when something is wrong with it.
//!
//! Not a part of plain `cargo test`, because n8n takes some minutes and 2.4 GB to install, once:
//!
//! ```sh
//! cargo test --test real_n8n -- --ignored --nocapture
//! ```
//!
//! It needs Node 20.19 to 24 with npm, and a Unix. `CALLBRIDGE_N8N_DIR` is where n8n is kept, by
//! default `target/tmp`.

#[path = "../../src/demo/mod.rs"]
mod demo;
mod n8n;

use std::error::Error;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use demo::{AgentCall, PATIENCE, Phone, Ringing, Trouble, World, WorldBuilder, closed_port};
use n8n::{N8n, N8nProgram, until};

type Failed = Box<dyn Error + Send + Sync>;
type Outcome = Result<(), Failed>;

const CALLBRIDGE: &str = env!("CARGO_BIN_EXE_callbridge");
/// The caller whom the workflow knows as it is printed, and one whom it does not.
const ANNA: &str = "+15551234567";
const STRANGER: &str = "+4930901820";
const GREETING_FOR_ANNA: &str =
    "Hello Anna, it is good to hear from you again. How can I help you today?";
/// What the built-in agent says when n8n has nothing better begins so.
const DEFAULT_GREETING: &str = "Thank you for calling SecureLife Insurance. This is Sara";
/// What the agent is told when nothing was done, and when that is not certain.
const NOT_DONE: &str = "That did not work";
const PERHAPS_DONE: &str = "It is not certain whether that worked";
const SECRET: &str = "a long random word ☎ \"quoted\"";
/// The outbox pauses for 5 s, then 10 s, then 20 s, a quarter more or less.
const DELIVERED_WITHIN: Duration = Duration::from_mins(2);

/// In order: n8n is one for all, and the last part stops it.
#[test]
#[ignore = "installs a real n8n, which takes minutes and 2.4 GB: see the README"]
fn calls_with_a_real_n8n() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let agent = agent_with_a_tool(&scratch.path().join("agent"))?;
    let data = scratch.path().join("n8n");
    fs::create_dir_all(&data)?;
    let program = N8nProgram::get()?;
    let began = Instant::now();
    let mut n8n = N8n::load(program, &data, &workflows(&agent)?, &credentials())?;
    n8n.start()?;
    for path in ["call", "signed"] {
        // A workflow's first run takes longer than the others; a call would wait 2 s for it.
        ureq::post(n8n.url(path)).config().http_status_as_error(false).build().send("{}")?;
    }
    tell(&format!("n8n is ready after {} s\n", began.elapsed().as_secs()));
    a_whole_call(&n8n, &agent)?;
    a_stranger_hears_the_agents_own_greeting(&n8n, &agent)?;
    n8n_decides_who_takes_the_call(&n8n, &agent)?;
    what_comes_twice_is_kept_once(&n8n)?;
    only_the_right_signature_gets_in(&n8n)?;
    what_is_wrong_with_n8n_is_named(&n8n)?;
    n8n_is_stopped_in_the_middle_of_a_call(&mut n8n, &agent)?;
    n8n.stop()?;
    tell("all of it came out right");
    Ok(())
}

// ============================================================================
// The parts
// ============================================================================

fn a_whole_call(n8n: &N8n, agent: &Path) -> Outcome {
    part("a whole call: greeting, booking, a tool of one's own, transcript");
    let world = world(&n8n.url("call")).setting("AGENT_DIR", agent.display()).start()?;
    let call = ring(&world, ANNA)?;
    assert_eq!(call.greeting(), GREETING_FOR_ANNA, "word for word");
    shows("the caller hears", call.greeting());

    call.agent.user_said("I said \"Tuesday\",\nand {{ $json }} & ünïcödé.")?;
    call.enter_main_stage()?;
    let booked = call.book()?;
    assert_eq!(booked, "Booked: Life insurance, 2027-03-09T14:30 for Anna \"Annie\" Berg.");
    shows("the agent is told", &booked);
    let order = call.act("check_order", &json!({"order_number": "A-4711"}))?;
    assert!(order.starts_with("check_order is not connected to anything in n8n yet"), "{order}");
    assert!(order.ends_with("{\"order_number\":\"A-4711\"}"), "the tool's branch got it: {order}");
    shows("own tool", &order);
    call.agent.say("You are booked.", &[])?;
    call.end()?;
    let line = world.bridge.wait_for_log("n8n has the transcript of")?;
    shows("log", without_time(&line));

    let transcripts = n8n.data_table("callbridge_calls")?;
    let kept = the_one(&transcripts, "callSid", &call.ringing.call_sid)?;
    let wanted = "User: I said \"Tuesday\", and {{ $json }} & ünïcödé.\nAgent: You are booked.";
    assert_eq!(kept["transcript"], wanted);
    assert_eq!((&kept["number"], &kept["endedBy"]), (&json!(ANNA), &json!("CallerLeft")));
    for (field, wanted) in [
        ("to", json!(demo::OUR_NUMBER)),
        ("direction", json!("in")),
        ("stages", json!("greeting, main_convo")),
        ("ultravoxCallId", json!(call.agent.id())),
        ("medianTurnMs", json!(null)),
        ("summary", json!(demo::SUMMARY)),
        ("billedSeconds", json!(72)),
    ] {
        assert_eq!(kept[field], wanted, "{field}");
    }
    assert!(kept["seconds"].is_u64(), "{kept}");
    let tools: Value = serde_json::from_str(kept["tools"].as_str().unwrap_or_default())?;
    assert_eq!(tools[1]["tool"], "schedule_meeting");
    shows("row in callbridge_calls", &kept.to_string());
    let bookings = n8n.data_table("callbridge_bookings")?;
    let kept = the_one(&bookings, "number", ANNA)?;
    for (field, wanted) in [
        ("name", "Anna \"Annie\" Berg"),
        ("email", "anna.berg@example.com"),
        ("purpose", "Life insurance"),
        ("datetime", "2027-03-09T14:30"),
        ("calendar_id", "london.meetings@securelife.example"),
    ] {
        assert_eq!(kept[field], wanted, "{field}");
    }
    let key = kept["key"].as_str().unwrap_or_default();
    assert!(key.starts_with(&call.ringing.call_sid), "{key}");
    let runs = "SELECT status FROM execution_entity WHERE workflowId = 'testCall' AND id > 1";
    let runs = until(PATIENCE, || {
        let runs = n8n.query(runs)?;
        Ok((runs.len() == 4).then_some(runs))
    })?;
    assert!(runs.iter().all(|run| run["status"] == "success"), "{runs:?}");
    shows("n8n's executions", "4, all of them success");
    Ok(())
}

fn a_stranger_hears_the_agents_own_greeting(n8n: &N8n, agent: &Path) -> Outcome {
    part("a caller whom the workflow does not know");
    let world = world(&n8n.url("call")).setting("AGENT_DIR", agent.display()).start()?;
    let call = ring(&world, STRANGER)?;
    assert!(call.greeting().starts_with(DEFAULT_GREETING), "{}", call.greeting());
    let line = world.bridge.wait_for_log("and leaves the greeting to the agent")?;
    assert!(!line.contains("warning"), "this is no mistake: {line}");
    shows("log", without_time(&line));
    Ok(())
}

fn n8n_decides_who_takes_the_call(n8n: &N8n, agent: &Path) -> Outcome {
    part("who takes the call: a stage, a person, nobody; by the caller, or the number called");
    let world = world(&n8n.url("call")).setting("AGENT_DIR", agent.display());
    let world = world.setting("FALLBACK_NUMBER", "+4930111222").start()?;
    let call = ring(&world, "+15551234568")?;
    assert_eq!(call.greeting(), "Hello Ben, is this about your claim?");
    assert_eq!(call.agent.request()["voice"], "Mark", "the voice of main_convo");
    world.ring_with(STRANGER, &[("To", "+15551234571")])?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    assert_eq!(agent.request()["voice"], "Mark", "the number called leads to main_convo");
    let person = world.ring("+15551234569")?;
    assert_eq!(person.twiml.dial.as_deref(), Some("+4930111222"));
    let nobody = world.ring("+15551234570")?;
    assert_eq!(nobody.twiml.elements, ["Response", "Reject"]);
    let warnings: Vec<_> =
        world.bridge.log().into_iter().filter(|line| line.contains("n8n: ")).collect();
    assert!(warnings.is_empty(), "{warnings:?}");
    shows("refused", nobody.twiml.xml.trim());
    Ok(())
}

fn what_comes_twice_is_kept_once(n8n: &N8n) -> Outcome {
    part("delivery is at least once, and n8n keeps it once");
    let booking = json!({"name": "Bert"}).to_string();
    for (route, data) in [("2", "User: Twice."), ("3", booking.as_str())] {
        for _ in 0..2 {
            let body = json!({"route": route, "number": "+1555", "data": data, "callSid": "CAtwice",
                "endedBy": "CallerLeft"});
            let sent = ureq::post(n8n.url("call"))
                .header("Content-Type", "application/json")
                .header("Idempotency-Key", format!("CAtwice-{route}"))
                .send(body.to_string())?;
            assert_eq!(sent.status(), 200);
        }
    }
    let transcripts = n8n.data_table("callbridge_calls")?;
    the_one(&transcripts, "callSid", "CAtwice")?;
    let bookings = n8n.data_table("callbridge_bookings")?;
    the_one(&bookings, "key", "CAtwice-3")?;
    shows("after two of each", "one row of each");
    Ok(())
}

fn only_the_right_signature_gets_in(n8n: &N8n) -> Outcome {
    part("HMAC: a secret in the workflow's node Secret");
    let world = world(&n8n.url("signed")).setting("N8N_HMAC_SECRET", SECRET).start()?;
    let call = ring(&world, ANNA)?;
    assert_eq!(call.greeting(), GREETING_FOR_ANNA);
    call.enter_main_stage()?;
    let booked = call.book()?;
    assert!(booked.starts_with("Booked: "), "{booked}");
    call.agent.user_said("Signed.")?;
    call.end()?;
    world.bridge.wait_for_log("n8n has the transcript of")?;
    shows("the right secret", "greeting, booking and transcript as ever");

    let advice = "N8N_HMAC_SECRET and the field of the workflow's node Secret must be the same";
    for (case, secret, why) in [
        ("a wrong secret", Some("guessed"), "the signature is wrong"),
        ("no secret", None, "the signature is missing"),
    ] {
        let mut builder = self::world(&n8n.url("signed"));
        if let Some(secret) = secret {
            builder = builder.setting("N8N_HMAC_SECRET", secret);
        }
        fails(
            &builder.start()?,
            &Failure {
                case,
                greeting: Some(("401", why)),
                booking: (NOT_DONE, why),
                transcript: Some(advice),
            },
        )?;
    }
    let rows = n8n.query("SELECT status FROM execution_entity WHERE workflowId = 'testSigned'")?;
    assert!(rows.len() > 4, "the refused ones are to be seen in n8n too: {rows:?}");
    Ok(())
}

/// What a call is like when something is wrong with n8n, and what the log says about it.
struct Failure {
    case: &'static str,
    /// Two things that the log says at step 2. None: the greeting is there all the same.
    greeting: Option<(&'static str, &'static str)>,
    /// What the agent is told, and what the log says about it at step 7.
    booking: (&'static str, &'static str),
    /// What the log says when the transcript stays on disk. None: n8n has it.
    transcript: Option<&'static str>,
}

fn what_is_wrong_with_n8n_is_named(n8n: &N8n) -> Outcome {
    let activate = "activate (publish) the workflow, or correct the path in N8N_WEBHOOK_URL";
    let header = "set N8N_AUTH_HEADER as in its Header Auth";
    let respond = "set the Webhook node's Respond to \"Using 'Respond to Webhook' Node\"";
    let failures = [
        (
            "inactive",
            Failure {
                case: "the workflow is not active",
                greeting: Some(("404", activate)),
                booking: (NOT_DONE, activate),
                transcript: Some(activate),
            },
        ),
        (
            "call-test",
            Failure {
                case: "a wrong path",
                greeting: Some(("404", activate)),
                booking: (NOT_DONE, activate),
                transcript: Some(activate),
            },
        ),
        (
            "locked",
            Failure {
                case: "Header Auth, and N8N_AUTH_HEADER is missing",
                greeting: Some(("403", header)),
                booking: (NOT_DONE, header),
                transcript: Some(header),
            },
        ),
        (
            "immediate",
            Failure {
                case: "Respond: Immediately, chosen in our workflow",
                greeting: Some(("500", respond)),
                booking: (PERHAPS_DONE, respond),
                transcript: Some(respond),
            },
        ),
        (
            "own-immediate",
            Failure {
                case: "Respond: Immediately, in a workflow without Respond nodes",
                greeting: Some(("200 before the workflow ran", respond)),
                booking: (PERHAPS_DONE, respond),
                // n8n has taken it, as far as anybody can tell.
                transcript: None,
            },
        ),
        (
            "broken",
            Failure {
                case: "a calendar node that fails, its error output led to Failed",
                greeting: None,
                booking: (PERHAPS_DONE, "500"),
                transcript: None,
            },
        ),
        (
            "careless",
            Failure {
                case: "the same node without an error output (n8n before 2.38 answers 200)",
                greeting: None,
                booking: (
                    PERHAPS_DONE,
                    "the workflow failed, or took a branch without a Respond node",
                ),
                transcript: None,
            },
        ),
    ];
    for (path, failure) in &failures {
        fails(&world(&n8n.url(path)).start()?, failure)?;
    }
    for workflow in ["testBroken", "testCareless"] {
        until(PATIENCE, || {
            let sql = format!(
                "SELECT status FROM execution_entity WHERE workflowId = '{workflow}' AND \
                 status = 'error'"
            );
            Ok((!n8n.query(&sql)?.is_empty()).then_some(()))
        })?;
    }
    shows("n8n's executions", "both failed bookings show as failed");

    part("Header Auth, and N8N_AUTH_HEADER is right");
    let world = world(&n8n.url("locked")).setting("N8N_AUTH_HEADER", "x-agent-key: s3cret");
    let world = world.start()?;
    let call = ring(&world, ANNA)?;
    assert_eq!(call.greeting(), GREETING_FOR_ANNA);
    shows("the caller hears", call.greeting());
    Ok(())
}

/// A call in which n8n fails: nobody but the operator notices more than must be.
fn fails(world: &World, wanted: &Failure) -> Outcome {
    part(wanted.case);
    let call = ring(world, ANNA)?;
    if let Some((what, advice)) = wanted.greeting {
        assert!(call.greeting().starts_with(DEFAULT_GREETING), "{}", call.greeting());
        let line = world.bridge.wait_for_log("2 greeting warning: n8n: ")?;
        assert!(line.contains(what) && line.contains(advice), "{line}");
        shows("the caller hears", "the default greeting");
        shows("log", without_time(&line));
    } else {
        assert_eq!(call.greeting(), GREETING_FOR_ANNA);
    }
    call.enter_main_stage()?;
    let booked = call.book()?;
    let (told, logged) = wanted.booking;
    assert!(booked.starts_with(told), "{booked}");
    let line = world.bridge.wait_for_log("schedule_meeting: n8n: ")?;
    assert!(line.contains(logged), "{line}");
    shows("the agent is told", &booked);
    shows("log", without_time(&line));
    call.agent.user_said("This is to be kept.")?;
    call.end()?;
    let Some(advice) = wanted.transcript else {
        world.bridge.wait_for_log("n8n has the transcript of")?;
        return Ok(());
    };
    let line = world.bridge.wait_for_log("the transcript stays in")?;
    assert!(line.contains(advice), "{line}");
    let list = world.bridge.run(&["outbox"])?;
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    assert!(list.contains(&call.ringing.call_sid) && list.contains(advice), "{list}");
    shows("callbridge outbox", list.lines().next().unwrap_or_default());
    Ok(())
}

fn n8n_is_stopped_in_the_middle_of_a_call(n8n: &mut N8n, agent: &Path) -> Outcome {
    part("n8n is stopped in the middle of a call, and started again after it");
    let world = world(&n8n.url("call")).setting("AGENT_DIR", agent.display()).start()?;
    let call = ring(&world, ANNA)?;
    assert_eq!(call.greeting(), GREETING_FOR_ANNA);
    call.enter_main_stage()?;
    n8n.stop()?;
    let booked = call.book()?;
    assert!(booked.starts_with(NOT_DONE), "{booked}");
    shows("the agent is told", &booked);
    call.agent.user_said("Keep this until n8n is back.")?;
    call.end()?;
    let line = world.bridge.wait_for_log("the transcript stays in")?;
    shows("log", without_time(&line));
    n8n.start()?;
    let line = until(DELIVERED_WITHIN, || {
        let log = world.bridge.log();
        Ok(log.into_iter().find(|line| line.contains("n8n has the transcript of")))
    })?;
    shows("log", without_time(&line));
    let transcripts = n8n.data_table("callbridge_calls")?;
    let kept = the_one(&transcripts, "callSid", &call.ringing.call_sid)?;
    assert_eq!(kept["transcript"], "User: Keep this until n8n is back.");
    Ok(())
}

// ============================================================================
// Workflows and agents
// ============================================================================

/// The built-in agent with a tool of its own, as the README says how to.
fn agent_with_a_tool(directory: &Path) -> Result<PathBuf, Failed> {
    fs::create_dir_all(directory)?;
    let built_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/agent");
    for entry in fs::read_dir(&built_in)? {
        let entry = entry?;
        fs::copy(entry.path(), directory.join(entry.file_name()))?;
    }
    let file = directory.join("agent.json");
    let mut agent: Value = serde_json::from_str(&fs::read_to_string(&file)?)?;
    agent["tools"]["check_order"] = json!({
        "description": "Finds out where an order is.",
        "parameters": {
            "type": "object",
            "properties": {"order_number": {"type": "string", "description": "As on the bill."}},
            "required": ["order_number"],
        },
        "n8n": {"route": "4"},
    });
    let tools = agent["stages"]["main_convo"]["tools"].as_array_mut();
    tools.ok_or("main_convo has no tools")?.push(json!("check_order"));
    fs::write(&file, agent.to_string())?;
    Ok(directory.to_owned())
}

/// What `callbridge workflow` prints, once as it is and then with a mistake each. Active or not.
fn workflows(agent: &Path) -> Result<Vec<(Value, bool)>, Failed> {
    let print = |agent: Option<&Path>| -> Result<Value, Failed> {
        let mut command = Command::new(CALLBRIDGE);
        command.arg("workflow").env_clear().current_dir(std::env::temp_dir());
        if let Some(agent) = agent {
            command.env("AGENT_DIR", agent);
        }
        let output = command.output()?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    let variant = |id: &str, path: &str| -> Result<Value, Failed> {
        let mut workflow = print(None)?;
        workflow["id"] = json!(id);
        workflow["name"] = json!(path);
        let webhook = node(&mut workflow, "callbridge")?;
        webhook["webhookId"] = json!(format!("webhook-{path}"));
        webhook["parameters"]["path"] = json!(path);
        Ok(workflow)
    };
    let mut call = print(Some(agent))?;
    call["id"] = json!("testCall");
    let mut signed = variant("testSigned", "signed")?;
    let field = "/parameters/assignments/assignments/0/value";
    let secret = node(&mut signed, "Secret")?.pointer_mut(field);
    *secret.ok_or("the node Secret has no field")? = json!(SECRET);
    let mut locked = variant("testLocked", "locked")?;
    let webhook = node(&mut locked, "callbridge")?;
    webhook["parameters"]["authentication"] = json!("headerAuth");
    webhook["credentials"] = json!({"httpHeaderAuth": {"id": "testHeader", "name": "Agent key"}});
    let mut immediate = variant("testImmediate", "immediate")?;
    node(&mut immediate, "callbridge")?["parameters"]["responseMode"] = json!("onReceived");
    let mut own_immediate = json!({
        "id": "testOwnImmediate",
        "name": "own-immediate",
        "nodes": [node(&mut immediate.clone(), "callbridge")?, {
            "id": "nothing", "name": "Nothing", "type": "n8n-nodes-base.noOp", "typeVersion": 1,
            "position": [200, 0], "parameters": {},
        }],
        "connections": {"callbridge": {"main": [[{"node": "Nothing", "type": "main", "index": 0}]]}},
        "settings": {"executionOrder": "v1"},
    });
    node(&mut own_immediate, "callbridge")?["parameters"]["path"] = json!("own-immediate");
    let mut broken = variant("testBroken", "broken")?;
    connect_a_calendar(&mut broken, true)?;
    let mut careless = variant("testCareless", "careless")?;
    connect_a_calendar(&mut careless, false)?;
    Ok(vec![
        (call, true),
        (signed, true),
        (locked, true),
        (immediate, true),
        (own_immediate, true),
        (broken, true),
        (careless, true),
        (variant("testInactive", "inactive")?, false),
    ])
}

/// A calendar at which nobody answers, where the workflow's note says that it belongs.
fn connect_a_calendar(workflow: &mut Value, with_error_output: bool) -> Outcome {
    let to = |node: &str| json!([{"node": node, "type": "main", "index": 0}]);
    let mut calendar = json!({
        "id": "calendar",
        "name": "Calendar",
        "type": "n8n-nodes-base.httpRequest",
        "typeVersion": 4.2,
        "position": [0, 0],
        "parameters": {"url": format!("http://127.0.0.1:{}/", closed_port()), "options": {}},
    });
    let mut outputs = vec![to("Answer booking")];
    if with_error_output {
        calendar["onError"] = json!("continueErrorOutput");
        outputs.push(to("Failed"));
    }
    workflow["nodes"].as_array_mut().ok_or("no nodes")?.push(calendar);
    workflow["connections"]["Keep booking"]["main"][0] = to("Calendar");
    workflow["connections"]["Calendar"] = json!({"main": outputs});
    Ok(())
}

fn node<'a>(workflow: &'a mut Value, name: &str) -> Result<&'a mut Value, Failed> {
    let nodes = workflow["nodes"].as_array_mut();
    let found = nodes.and_then(|nodes| nodes.iter_mut().find(|node| node["name"] == name));
    found.ok_or_else(|| format!("the workflow has no node {name}").into())
}

fn credentials() -> Value {
    let data = json!({"name": "X-Agent-Key", "value": "s3cret"});
    json!([{"id": "testHeader", "name": "Agent key", "type": "httpHeaderAuth", "data": data}])
}

// ============================================================================
// Calls
// ============================================================================

fn world(n8n_url: &str) -> WorldBuilder {
    World::builder(CALLBRIDGE).setting("N8N_WEBHOOK_URL", n8n_url)
}

/// A call in progress, with all parties of it but n8n in the test's hands.
struct Call {
    ringing: Ringing,
    agent: AgentCall,
    phone: Phone,
}

#[track_caller]
fn ring(world: &World, number: &str) -> Result<Call, Trouble> {
    let ringing = world.ring(number)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(world)?;
    Ok(Call { ringing, agent, phone })
}

impl Call {
    fn greeting(&self) -> &str {
        let settings = &self.agent.request()["firstSpeakerSettings"];
        settings["agent"]["text"].as_str().unwrap_or_default()
    }

    /// What the agent is told.
    #[track_caller]
    fn act(&self, tool: &str, parameters: &Value) -> Result<String, Trouble> {
        let invocation = self.agent.invoke(tool, parameters)?;
        let result = self.agent.wait_result(&invocation)?;
        Ok(result["result"].as_str().unwrap_or_default().to_owned())
    }

    #[track_caller]
    fn enter_main_stage(&self) -> Result<String, Trouble> {
        let details = json!({"issue_type": "meeting", "issue_details": "An adviser.",
            "customer_name": "Anna Berg"});
        self.act("move_to_main_convo", &details)
    }

    #[track_caller]
    fn book(&self) -> Result<String, Trouble> {
        let wishes = json!({"name": "Anna \"Annie\" Berg", "email": "anna.berg@example.com",
            "purpose": "Life insurance", "datetime": "2027-03-09T14:30", "location": "London"});
        self.act("schedule_meeting", &wishes)
    }

    /// The caller hangs up.
    #[track_caller]
    fn end(&self) -> Result<(), Trouble> {
        // What the agent has sent is read in order, and an unknown tool has an answer too: behind
        // it, all that was said has arrived.
        let invocation = self.agent.invoke("are_you_there", &json!({}))?;
        self.agent.wait_result(&invocation)?;
        self.phone.send_stop()?;
        self.agent.wait_closed()?;
        self.phone.wait_closed()?;
        Ok(())
    }
}

// ============================================================================
// Toolbox
// ============================================================================

/// The row with this value, of which there is exactly one.
fn the_one<'a>(rows: &'a [Value], field: &str, value: &str) -> Result<&'a Value, Failed> {
    let found: Vec<&Value> = rows.iter().filter(|row| row[field] == value).collect();
    match found.as_slice() {
        [row] => Ok(row),
        _ => Err(format!("{} rows with {field} {value}: {rows:#?}", found.len()).into()),
    }
}

fn part(title: &str) {
    tell(&format!("\n{title}"));
}

fn shows(what: &str, text: &str) {
    tell(&format!("  {what}: {text}"));
}

/// Past the harness's capture: without `--nocapture` the install would look like a hang.
fn tell(line: &str) {
    if writeln!(io::stderr(), "{line}").is_err() {
        // Nobody listens.
    }
}

fn without_time(line: &str) -> &str {
    line.split_once(' ').map_or(line, |(_, rest)| rest)
}
