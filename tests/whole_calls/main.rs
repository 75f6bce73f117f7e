//! Whole calls through the real program: the bridge as a child process, the pretend world of
//! `src/demo/` around it, loopback sockets between them. One test program, so that what one
//! call waits for overlaps with what the others do.

mod copies;
mod decide;
#[path = "../../src/demo/mod.rs"]
mod demo;
mod disk;
mod door;
mod faults;
mod happy;
mod local;
mod log;
mod metrics;
mod owner;
mod page;
mod reload;
mod report;
mod ring;
mod sad;
mod transfer;
mod verbs;

use std::error::Error;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use demo::{AgentCall, PATIENCE, Phone, Ringing, Trouble, World};

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

const CALLER: &str = "+4930901820";
/// What the built-in agent says when n8n has nothing better.
const DEFAULT_GREETING: &str = "Thank you for calling SecureLife Insurance. This is Sara, your \
    virtual assistant. How can I help you today?";

/// A call in progress, with all three parties of it in the test's hands.
struct Call {
    ringing: Ringing,
    agent: AgentCall,
    phone: Phone,
}

#[track_caller]
fn connect(world: &World) -> Result<Call, Trouble> {
    connect_from(world, CALLER)
}

#[track_caller]
fn connect_from(world: &World, number: &str) -> Result<Call, Trouble> {
    let ringing = world.ring(number)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(world)?;
    Ok(Call { ringing, agent, phone })
}

impl Call {
    /// Invokes a tool and waits for its result.
    #[track_caller]
    fn act(&self, tool: &str, parameters: &Value) -> Result<Value, Trouble> {
        let invocation = self.agent.invoke(tool, parameters)?;
        self.agent.wait_result(&invocation)
    }

    /// Goes on to the stage in which meetings are booked and claims are recorded.
    #[track_caller]
    fn enter_main_stage(&self) -> Result<Value, Trouble> {
        let details = json!({"issue_type": "claim", "issue_details": "A broken window.",
            "customer_name": "Anna Berg"});
        self.act("move_to_main_convo", &details)
    }
}

/// All that the bridge has dealt with is on disk: a kill loses none of it. Its writer is behind by
/// some milliseconds, or more on a busy machine.
#[track_caller]
fn written(world: &World, sid: &str, agent: &AgentCall) -> Result<(), Trouble> {
    let question = agent.invoke("are_you_there", &json!({}))?;
    agent.wait_result(&question)?;
    let deadline = Instant::now() + PATIENCE;
    while !world.journal(sid).iter().any(|event| event["id"] == question.as_str()) {
        if Instant::now() > deadline {
            return Err(world.trouble("the journal is behind"));
        }
        // Nothing announces that a file has grown.
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn wishes(location: &str) -> Value {
    json!({"name": "Anna Berg", "email": "anna.berg@example.com", "purpose": "Life insurance",
        "datetime": "2027-03-09T14:30", "location": location})
}

fn greeting_of(agent: &AgentCall) -> &str {
    agent.request()["firstSpeakerSettings"]["agent"]["text"].as_str().unwrap_or_default()
}

/// A part of a test, and what it is about.
type Case = (&'static str, fn() -> Outcome);

/// Plays several cases at once, for those that consist of waiting.
fn at_the_same_time(cases: &[Case]) -> Outcome {
    let complaints = thread::scope(|scope| {
        let cases: Vec<_> = cases.iter().map(|(name, case)| (name, scope.spawn(case))).collect();
        let mut complaints = Vec::new();
        for (name, case) in cases {
            match case.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => complaints.push(format!("{name}: {error:?}")),
                Err(_) => complaints.push(format!("{name}: see the assertion above")),
            }
        }
        complaints
    });
    if complaints.is_empty() { Ok(()) } else { Err(complaints.join("\n").into()) }
}
