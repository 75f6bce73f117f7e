//! Three copies behind one load balancer: calls are spread over them, one copy drains and comes back,
//! one is killed and comes back, and no call notices that one machine would have kept.
//!
//! Each copy has a world of its own around it, so that it is seen which one has a call. What Twilio
//! asks goes through the balancer, with the configuration of `docs/copies.md`.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::demo::{
    ACCOUNT_SID, AgentCall, OUR_NUMBER, PATIENCE, PUBLIC_URL, Phone, Ringing, Trouble, World,
    pcm_of, voice,
};
use crate::proxies::{Kind, Proxy};
use crate::{Failed, Outcome, tell};

const COPIES: usize = 3;
const TOKEN: &str = "mosaic-lantern-27-api";
const PERSON: &str = "+4930777888";
/// For the balancer to notice, which looks every second.
const NOTICED_WITHIN: Duration = Duration::from_secs(30);

struct Copies {
    worlds: Vec<World>,
    /// Where each listens itself.
    ports: Vec<u16>,
    proxy: Proxy,
    /// Callers so far.
    rung: Cell<u32>,
}

struct Call {
    copy: usize,
    ringing: Ringing,
    agent: AgentCall,
    phone: Phone,
}

pub fn calls_survive_what_one_machine_survives(kind: Kind) -> Outcome {
    let copies = Copies::start(kind)?;
    let name = copies.proxy.name().to_owned();
    copies.await_all_ready()?;

    // Spread over all of them, and each call comes back to its own.
    let mut calls = (0..2 * COPIES).map(|_| copies.ring()).collect::<Result<Vec<_>, _>>()?;
    let used: BTreeSet<usize> = calls.iter().map(|call| call.copy).collect();
    assert_eq!(used.len(), COPIES, "{name}: {used:?}");
    for at in 0..COPIES {
        calls.push(copies.call_out(at)?);
    }
    for call in &calls {
        call.talks()?;
    }
    tell(&format!("{name}: {} calls at once on {COPIES} copies, in and out", calls.len()));

    // The first copy is told to stop. Its calls go on, and new ones go to the others.
    let drained = 0;
    copies.worlds[drained].bridge.ask_to_stop()?;
    copies.worlds[drained].bridge.wait_for_log("told to stop")?;
    copies.await_noticed()?;
    let meanwhile = (0..2 * COPIES).map(|_| copies.ring()).collect::<Result<Vec<_>, _>>()?;
    for call in &meanwhile {
        assert_ne!(call.copy, drained, "{name}: it takes no new calls");
        call.talks()?;
    }
    let (its, others): (Vec<Call>, Vec<Call>) =
        calls.into_iter().partition(|call| call.copy == drained);
    for call in &its {
        call.talks()?;
        // A stream that breaks now is followed by another one, at the same copy.
        call.phone.drop_line();
        let next = copies.goes_on(call)?;
        hears(&call.agent, &next, 5)?;
        next.hang_up()?;
        call.agent.wait_closed()?;
    }
    copies.worlds[drained].bridge.wait_exit(NOTICED_WITHIN)?;
    copies.filed(drained, its.len())?;
    copies.restart(drained)?;
    copies.await_all_ready()?;
    tell(&format!("{name}: one copy drained, came back, and lost none of {} calls", its.len()));

    // The second is killed. The calls of the others do not notice, and new ones are served at once.
    let killed = 1;
    copies.worlds[killed].bridge.kill();
    let after = (0..2 * COPIES).map(|_| copies.ring()).collect::<Result<Vec<_>, _>>()?;
    for call in others.iter().chain(&meanwhile).chain(&after).filter(|call| call.copy != killed) {
        call.talks()?;
    }
    assert!(after.iter().all(|call| call.copy != killed));
    // Twilio asks again for some seconds; then the copy is back.
    copies.restart(killed)?;
    let lost: Vec<&Call> =
        others.iter().chain(&meanwhile).filter(|call| call.copy == killed).collect();
    assert!(!lost.is_empty());
    for call in &lost {
        let next = copies.goes_on(call)?;
        let agent = copies.worlds[killed].ultravox.next_call(PATIENCE)?;
        hears(&agent, &next, 6)?;
        agent.user_said("I am still here.")?;
        let question = agent.invoke("are_you_there", &json!({}))?;
        agent.wait_result(&question)?;
        next.hang_up()?;
        agent.wait_closed()?;
    }
    copies.filed(killed, lost.len())?;
    tell(&format!("{name}: one copy was killed, and took up {} calls", lost.len()));
    Ok(())
}

impl Copies {
    fn start(kind: Kind) -> Result<Copies, Failed> {
        let mut worlds = Vec::new();
        for number in 1..=COPIES {
            let world = World::builder(env!("CARGO_BIN_EXE_callbridge"))
                .setting("COPY_URL", format!("{PUBLIC_URL}/copy{number}"))
                .setting("TWILIO_ACCOUNT_SID", ACCOUNT_SID)
                .setting("TWILIO_PHONE_NUMBER", OUR_NUMBER)
                .setting("API_TOKEN", TOKEN)
                .setting("OUTGOING_ALLOW", "+49")
                .setting("CALLS_PER_NUMBER_PER_HOUR", 1_000)
                .start()?;
            worlds.push(world);
        }
        let ports: Vec<u16> = worlds.iter().map(|world| world.bridge.address().port()).collect();
        let proxy = Proxy::before_copies(kind, &ports)?;
        for world in &worlds {
            world.bridge.is_behind(proxy.port());
        }
        Ok(Copies { worlds, ports, proxy, rung: Cell::new(0) })
    }

    /// Somebody calls, and the balancer chooses.
    fn ring(&self) -> Result<Call, Failed> {
        // One number is on four lines of a copy at most.
        self.rung.set(self.rung.get() + 1);
        let ringing = self.worlds[0].ring(&format!("+49309018{:02}", self.rung.get()))?;
        let url = ringing.twiml.stream_url.clone().unwrap_or_default();
        let is_its = |at: &usize| url.contains(&format!("/copy{}/media-stream", at + 1));
        let copy = (0..COPIES)
            .find(is_its)
            .ok_or_else(|| format!("a call was not served: {}", ringing.twiml.xml))?;
        let world = &self.worlds[copy];
        let agent = world.ultravox.next_call(PATIENCE)?;
        let phone = ringing.open_stream(world)?;
        let call = Call { copy, ringing, agent, phone };
        call.agent.user_said("Hello from far away.")?;
        Ok(call)
    }

    /// The stream has ended and the call has not: Twilio asks, at the address it was given.
    fn goes_on(&self, call: &Call) -> Result<Phone, Trouble> {
        let world = &self.worlds[call.copy];
        let next = call.ringing.next(world, &[])?;
        next.open_stream(world)
    }

    /// Twilio rings somebody by order of a copy, who picks up, and the call is that copy's.
    fn call_out(&self, at: usize) -> Result<Call, Failed> {
        let world = &self.worlds[at];
        let bearer = format!("Bearer {TOKEN}");
        let headers = [("Authorization", bearer.as_str()), ("Content-Type", "application/json")];
        let order = json!({"phoneNumber": PERSON, "firstMessage": "It is us."}).to_string();
        let path = format!("/copy{}/outgoing-call", at + 1);
        let answer = world.request("POST", &path, &headers, order.as_bytes())?;
        assert_eq!(answer.status, 201, "{}", answer.text());
        let orders = world.twilio.wait_orders(1)?;
        let ringing = world.picks_up(&orders[0])?;
        let agent = world.ultravox.next_call(PATIENCE)?;
        let said = &agent.request()["firstSpeakerSettings"]["user"]["fallback"]["text"];
        assert_eq!(said, "It is us.", "the copy knows what was ordered");
        let phone = ringing.open_stream(world)?;
        agent.user_said("Who is there?")?;
        Ok(Call { copy: at, ringing, agent, phone })
    }

    fn filed(&self, at: usize, count: usize) -> Outcome {
        let posts = self.worlds[at].n8n.wait_for("2", count, NOTICED_WITHIN)?;
        let sids: BTreeSet<&str> =
            posts.iter().filter_map(|post| post.json["callSid"].as_str()).collect();
        assert_eq!((posts.len(), sids.len()), (count, count), "each transcript once");
        assert!(posts.iter().all(|post| post.json["data"] != Value::Null));
        Ok(())
    }

    /// At its own port, behind the same balancer.
    fn restart(&self, at: usize) -> Outcome {
        let bridge = &self.worlds[at].bridge;
        bridge.is_behind(self.ports[at]);
        bridge.restart()?;
        bridge.is_behind(self.proxy.port());
        Ok(())
    }

    /// The balancer asks only copies that are ready: none of many answers is another.
    fn await_noticed(&self) -> Outcome {
        self.until("the balancer notices", || {
            let mut all = (0..4 * COPIES).map(|_| self.worlds[0].get("/ready"));
            all.all(|answer| answer.is_ok_and(|answer| answer.status == 200))
        })
    }

    /// The balancer gives calls to all of them.
    fn await_all_ready(&self) -> Outcome {
        self.until("all copies are ready", || {
            let answers = (0..4 * COPIES).map(|_| self.worlds[0].get("/health?nonce=1"));
            let proofs: BTreeSet<String> =
                answers.filter_map(Result::ok).map(|answer| answer.text()).collect();
            proofs.len() == COPIES
        })?;
        self.await_noticed()
    }

    /// A balancer does not tell what it has noticed.
    fn until(&self, what: &str, is_so: impl Fn() -> bool) -> Outcome {
        let deadline = Instant::now() + NOTICED_WITHIN;
        while !is_so() {
            if Instant::now() > deadline {
                return Err(format!("{}: waited in vain until {what}", self.proxy.name()).into());
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
}

impl Call {
    fn talks(&self) -> Result<(), Trouble> {
        hears(&self.agent, &self.phone, 1)
    }
}

/// The caller hears the agent, to the last sample of it.
fn hears(agent: &AgentCall, phone: &Phone, speaker: u64) -> Result<(), Trouble> {
    let words = voice(speaker, 200);
    let heard = phone.heard_audio().len();
    agent.say("Yes?", &pcm_of(&words))?;
    phone.wait_audio(heard + words.len())
}
