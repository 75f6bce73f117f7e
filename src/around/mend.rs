//! A call that goes on after a break: of a stream, or of a whole process.
//!
//! The caller is to notice as little as possible. A stream that broke is followed by another one,
//! with a token of its own. A call that no thread knows is read from its journal, and a new agent
//! goes on with all that was said. How often that is tried, and what the caller hears when it is
//! not any more, is bounded here; that there is a break at all is found in steps 5, 6 and 8.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::owner::lines::Admission;
use crate::parties::ultravox::AGENT_WITHIN;
use crate::parties::ultravox::leg::AgentLeg;
use crate::records::ended_by::EndedBy;
use crate::records::journal::{Journal, Unclaimed};
use crate::records::past::PastCall;
use crate::records::tap::{Exhibit, Tap};
use crate::toolbox::failure::{Failure, Party};
use crate::toolbox::log::{Sid, log};
use crate::toolbox::metrics::{RESUMES, refused};
use crate::toolbox::threads::lock;
use crate::{
    Answer, Bridge, Call, IncomingCall, LINE_BROKE, Opening, after_the_agent, cannot_serve,
    connect_to_agent, create_agent_call,
};

/// Streams of one call. One more, and the caller hears the apology: something cuts them all.
pub(crate) const STREAMS_MAX: u32 = 6;

/// The stream broke, the call did not: the agent is still there and waits.
pub(crate) fn another_stream(call: &Arc<Call>) -> Answer {
    if lock(&call.state).streams >= STREAMS_MAX {
        log!(call, Error, Stream, "{STREAMS_MAX} streams were cut; giving up");
        call.hang_up(EndedBy::CallerLost);
        return cannot_serve(call.bridge, &call.bridge.agent.phrases.apology);
    }
    // Thread T may not have noticed yet.
    if let Some(cut) = lock(&call.state).caller.take() {
        cut.cut();
    }
    RESUMES.of(&["stream"]).add();
    log!(call, Info, Stream, "Twilio asks for another stream");
    let answer = Answer::Stream { token: call.new_token() };
    call.tap.show(Exhibit::StreamEnded, || "POST /stream-ended".to_owned());
    call.tap.show(Exhibit::NextStream, || answer.redacted(call.bridge));
    answer
}

/// A call that no thread of this process knows, but whose journal says that it is not over: a
/// process has died with it, or a person did not answer. It goes on with a new agent, in the same
/// stage, with all that was said.
pub(crate) fn take_up(bridge: &'static Bridge, sid: &str, what_happened: &'static str) -> Answer {
    let apology = &bridge.agent.phrases.apology;
    let (journal, past) = match bridge.journals.take_up(sid) {
        Ok(found) => found,
        Err(why) => {
            if let Some(call) = bridge.calls.find(sid) {
                // The same question came twice, and the first was faster.
                return call.await_answer();
            }
            match why {
                Unclaimed::NoJournal => log!(
                    Sid { sid },
                    Error,
                    Goodbye,
                    "asked about a call of which there is no journal"
                ),
                Unclaimed::Held => {
                    log!(Sid { sid }, Error, Goodbye, "another process still carries this call");
                }
            }
            return cannot_serve(bridge, apology);
        }
    };
    if past.ended_by.is_some() {
        return Answer::HangUp;
    }
    if past.transferred && what_happened == LINE_BROKE {
        return after_the_agent(bridge, EndedBy::Transferred);
    }
    match bridge.calls.admit(sid, || Call::from_journal(bridge, journal, past)) {
        Admission::Yours(call, line) => {
            log!(call, Warn, Ring, "the call is taken up from its journal");
            bridge.outbox.forget(sid);
            let after = if what_happened == LINE_BROKE { "process" } else { "transfer" };
            RESUMES.of(&[after]).add();
            connect_to_agent(&call, line, &Opening::GoOn(what_happened))
        }
        Admission::Known(call) => call.await_answer(),
        Admission::None => {
            refused("busy");
            cannot_serve(bridge, &bridge.agent.phrases.busy)
        }
    }
}

/// Meanwhile thread T finds no agent, and lets the caller hear a tone.
pub(crate) fn resume_agent(call: &Arc<Call>) -> Result<Arc<AgentLeg>, Failure> {
    let began = Instant::now();
    lock(&call.state).agent = None;
    log!(call, Warn, Agent, "the agent's line broke; a new one goes on from here");
    let opening = Opening::GoOn(LINE_BROKE);
    let created = create_agent_call(call, &opening, began + AGENT_WITHIN)?;
    let joined = call.bridge.ultravox.join(&call.sid, created, began + AGENT_WITHIN, &call.tap)?;
    let agent = Arc::new(joined);
    let mut state = lock(&call.state);
    if state.hang_up.is_some() {
        drop(state);
        agent.close("the call is over");
        return Err(Failure::new(Party::Ultravox, "the caller has left meanwhile"));
    }
    state.agent = Some(Arc::clone(&agent));
    drop(state);
    RESUMES.of(&["agent_line"]).add();
    let ms = began.elapsed().as_millis();
    log!(call, Info, Agent, "a new agent is there after {ms} ms"; ms);
    Ok(agent)
}

impl Call {
    /// The same call, from what a process that is gone (or a transfer that failed) has left of it.
    pub(crate) fn from_journal(bridge: &'static Bridge, journal: Journal, past: PastCall) -> Call {
        let incoming = IncomingCall {
            sid: &past.sid,
            number: &past.number,
            to: "",
            direction: past.direction,
            first_message: String::new(),
            wire: String::new(),
        };
        let mut call = Call::new(bridge, &incoming);
        call.began = past.began.unwrap_or(call.began);
        {
            let mut state = lock(&call.state);
            if bridge.agent.stages.contains_key(&past.stage) {
                state.stage = past.stage;
            }
            state.agent_id = past.agent_id;
            state.agents = past.agents;
        }
        call.rang = Instant::now().checked_sub(past.age).unwrap_or(call.rang);
        call.transcript = Mutex::new(past.transcript);
        call.tap = Arc::new(Tap::new(journal.clone(), Arc::clone(&bridge.config)));
        call.journal = journal;
        call
    }
}
