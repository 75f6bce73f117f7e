//! The scripted calls that come in while somebody looks at the page.
//!
//! Four callers, one after the other and again: one books a meeting, one interrupts the agent, one
//! meets an n8n that fails, and one an agent whose line breaks. So every part of the page has
//! something to show. [`n8n`] is what pretend n8n answers to whom.
//!
//! All of it takes the time that it would take on the telephone.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::{Value, json};

use crate::demo::PATIENCE;
use crate::demo::agent_call::AgentCall;
use crate::demo::backstage::{Board, random_hex};
use crate::demo::http::Reply;
use crate::demo::live::voice::GREETING_WORDS;
use crate::demo::microphone::Talking;
use crate::demo::n8n::FIRST_MESSAGE;
use crate::demo::phone::Phone;
use crate::demo::sound::{pcm_of, voice};
use crate::demo::trouble::Trouble;
use crate::demo::twilio::Ringing;
use crate::demo::world::World;

/// Between two of them the page is quiet.
const PAUSE: Duration = Duration::from_secs(8);
const ANNA: &str = "+4930901820";
const HURRIED: &str = "+442079460123";
const UNLUCKY: &str = "+12025550177";
const CUT_OFF: &str = "+33199001234";
const PLAIN_GREETING: &str =
    "Thank you for calling SecureLife Insurance. This is Sara. How can I help you today?";

type Scene = fn(&mut Line) -> Result<(), Trouble>;

pub(super) const SCENES: [(&str, &str, Scene); 4] = [
    (ANNA, "books a meeting", book),
    (HURRIED, "interrupts the agent", interrupt),
    (UNLUCKY, "meets an n8n that fails", meet_failure),
    (CUT_OFF, "meets an agent whose line breaks", lose_the_agent),
];

/// What pretend n8n answers, where it is not the usual.
pub(super) fn n8n(asked: &Value, before: usize) -> Option<Reply> {
    let failed = || Some(Reply::json(500, &json!({"message": "Error in workflow"})));
    match (asked["route"].as_str()?, asked["number"].as_str()?) {
        ("1", "browser") => Some(Reply::json(200, &json!({"firstMessage": GREETING_WORDS}))),
        ("1", HURRIED | CUT_OFF) => {
            Some(Reply::json(200, &json!({"firstMessage": PLAIN_GREETING})))
        }
        ("1" | "3", UNLUCKY) => failed(),
        // It takes the transcript at the second try.
        ("2", UNLUCKY) if before == 0 => failed(),
        _ => None,
    }
}

/// The agents of the calls that are played here, by the call's id.
#[derive(Default)]
pub(super) struct Cast(Board<HashMap<String, Vec<AgentCall>>>);

impl Cast {
    /// Gives the agent back if its call is none of these.
    pub(super) fn take(&self, agent: AgentCall) -> Option<AgentCall> {
        let sid = agent.request()["metadata"]["callSid"].as_str().unwrap_or_default().to_owned();
        self.0.change(|calls| match calls.get_mut(&sid) {
            Some(agents) => {
                agents.push(agent);
                None
            }
            None => Some(agent),
        })
    }

    fn next(&self, world: &World, sid: &str) -> Result<AgentCall, Trouble> {
        let found = self.0.wait(PATIENCE, |calls| {
            let agents = calls.get_mut(sid)?;
            (!agents.is_empty()).then(|| agents.remove(0))
        });
        found.ok_or_else(|| world.trouble("no agent came for a scripted call"))
    }
}

/// Until the world ends.
pub(super) fn keep_calling(world: &World, cast: &Cast, tell: impl Fn(&str)) {
    for (number, what, scene) in SCENES.into_iter().cycle() {
        tell(&format!("{number} calls, and {what}"));
        if let Err(trouble) = play(world, cast, number, scene)
            && !world.backstage.is_over()
        {
            tell(&format!("this call did not go as it should: {trouble}"));
        }
        world.backstage.pause(PAUSE);
        if world.backstage.is_over() {
            return;
        }
    }
}

fn play(world: &World, cast: &Cast, number: &str, scene: Scene) -> Result<(), Trouble> {
    let sid = format!("CA{}", random_hex(16));
    cast.0.change(|calls| calls.insert(sid.clone(), Vec::new()));
    let ringing = world.ring_with(number, &[("CallSid", &sid)])?;
    let agent = cast.next(world, &sid)?;
    let phone = ringing.open_stream(world)?;
    let microphone = phone.keep_talking();
    let mut line = Line { world, cast, ringing, agent, phone, microphone, spoken: 0 };
    let played = scene(&mut line);
    // What it has heard is of no use any more.
    drop(line.agent.hear(Duration::ZERO));
    cast.0.change(|calls| calls.remove(&sid));
    played
}

/// A call in progress, with both ends of it.
pub(super) struct Line<'a> {
    world: &'a World,
    cast: &'a Cast,
    ringing: Ringing,
    agent: AgentCall,
    phone: Phone,
    microphone: Talking,
    /// Turns so far, so that no two sound alike.
    spoken: u64,
}

fn book(line: &mut Line) -> Result<(), Trouble> {
    line.agent_says(FIRST_MESSAGE)?;
    line.caller_says("I would like to talk to somebody about my life insurance.")?;
    line.go_on_to_the_matter("Anna Berg", "Wants to talk about her life insurance.")?;
    line.agent_says("I can book a meeting for you. When would suit you?")?;
    line.caller_says("Tuesday, half past two. In London, please.")?;
    let wishes = json!({"name": "Anna Berg", "email": "anna.berg@example.com",
        "purpose": "Life insurance", "datetime": "2027-03-09T14:30", "location": "London"});
    line.act("schedule_meeting", &wishes)?;
    line.agent_says("You are booked: Tuesday the ninth, half past two, in London.")?;
    line.caller_says("Thank you, goodbye.")?;
    line.agent_hangs_up("Goodbye, Anna.")
}

fn interrupt(line: &mut Line) -> Result<(), Trouble> {
    line.agent_says(PLAIN_GREETING)?;
    line.caller_says("What does your life insurance cover?")?;
    let whole = "There is a great deal to say about that, so let me begin at the beginning, with \
        the history of our company.";
    let turn = line.agent.begin_saying(whole, &pcm_of(&voice(90, takes(whole))))?;
    line.world.backstage.pause(Duration::from_secs(2));
    line.microphone.say(&voice(91, 500));
    line.microphone.wait_said()?;
    line.agent.send(&json!({"type": "playback_clear_buffer"}))?;
    line.agent.finish_saying(turn, "There is a great deal to say about that, so let me")?;
    line.caller_says("No, please. Only whether it covers accidents.")?;
    line.agent_says("Yes, it does.")?;
    line.caller_says("Thanks. That was all.")?;
    line.caller_hangs_up()
}

fn meet_failure(line: &mut Line) -> Result<(), Trouble> {
    line.agent_says(PLAIN_GREETING)?;
    line.caller_says("I need an appointment, please. My name is Sam Carter.")?;
    line.go_on_to_the_matter("Sam Carter", "Needs an appointment.")?;
    let wishes = json!({"name": "Sam Carter", "email": "sam@example.com",
        "purpose": "Advice", "datetime": "2027-03-10T10:00", "location": "London"});
    line.act("schedule_meeting", &wishes)?;
    line.agent_says("I am sorry, I cannot book right now. A colleague will call you back.")?;
    line.caller_says("All right, goodbye.")?;
    line.agent_hangs_up("Goodbye.")
}

fn lose_the_agent(line: &mut Line) -> Result<(), Trouble> {
    line.agent_says(PLAIN_GREETING)?;
    line.caller_says("A storm has taken tiles off my roof.")?;
    line.agent.fail();
    line.agent = line.cast.next(line.world, &line.ringing.call_sid)?;
    line.agent_says("Sorry, I am back. A storm has taken tiles off your roof, you said.")?;
    line.caller_says("Yes. I will send you pictures. Goodbye.")?;
    line.caller_hangs_up()
}

impl Line<'_> {
    fn agent_says(&mut self, text: &str) -> Result<(), Trouble> {
        self.spoken += 1;
        self.agent.say(text, &pcm_of(&voice(self.spoken, takes(text))))?;
        self.world.backstage.pause(Duration::from_millis(100));
        self.phone.wait_played();
        Ok(())
    }

    fn caller_says(&mut self, text: &str) -> Result<(), Trouble> {
        self.spoken += 1;
        self.microphone.say(&voice(self.spoken, takes(text)));
        self.microphone.wait_said()?;
        self.agent.user_said(text)
    }

    fn act(&self, tool: &str, parameters: &Value) -> Result<(), Trouble> {
        let invocation = self.agent.invoke(tool, parameters)?;
        self.agent.wait_result(&invocation).map(drop)
    }

    fn go_on_to_the_matter(&self, name: &str, details: &str) -> Result<(), Trouble> {
        let reason =
            json!({"issue_type": "meeting", "customer_name": name, "issue_details": details});
        self.act("move_to_main_convo", &reason)
    }

    fn caller_hangs_up(&self) -> Result<(), Trouble> {
        self.phone.hang_up()?;
        self.ringing.call_status(self.world, "completed").map(drop)
    }

    fn agent_hangs_up(&mut self, text: &str) -> Result<(), Trouble> {
        self.act("hangUp", &json!({"reason": "the caller said goodbye"}))?;
        self.spoken += 1;
        self.agent.say(text, &pcm_of(&voice(self.spoken, takes(text))))?;
        self.agent.close()?;
        self.phone.wait_closed()?;
        self.ringing.stream_ended(self.world)?;
        self.ringing.call_status(self.world, "completed").map(drop)
    }
}

/// Milliseconds, as people speak.
fn takes(text: &str) -> u64 {
    let letters = u64::try_from(text.len()).unwrap_or_default();
    60 * letters
}
