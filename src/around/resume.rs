//! A call that goes on after a break: of a stream, or of a whole process.
//!
//! The caller is to notice as little as possible. A stream that broke is followed by another one,
//! with a token of its own. A call that no thread knows is read from its journal, and a new agent
//! goes on with all that was said, or greets if nobody has yet. How often that is tried is bounded
//! here, and what the caller hears when it is not tried any more; that there is a break at all is
//! found in steps 1, 5, 6 and 8. A call that is over stays over, however often it rings.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::owner::lines::{Admission, NoLine};
use crate::parties::twilio::Form;
use crate::parties::ultravox::leg::AgentLeg;
use crate::records::ended_by::EndedBy;
use crate::records::event::Event;
use crate::records::journal::{Journal, Unclaimed};
use crate::records::past::PastCall;
use crate::records::tap::{Exhibit, Tap};
use crate::toolbox::log::{Sid, log};
use crate::toolbox::metrics::{RESUMES, refused};
use crate::toolbox::threads::{lock, wait};
use crate::{
    Answer, Bridge, Call, CallState, INTERRUPTED, IncomingCall, NOBODY_ANSWERED, NOT_TAKEN,
    Opening, after_the_agent, begin, cannot_serve, connect_to_agent, join_agent,
};

/// Streams of one call. One more, and the caller hears the apology: something cuts them all.
pub(crate) const STREAMS_MAX: u32 = 6;

/// From a broken connection of the agent's to the next agent. All that time the caller hears a
/// tone, and then the apology.
const RESUME_WITHIN: Duration = Duration::from_secs(10);
/// The first pause between two tries; it doubles. A server that restarts refuses at once, and each
/// try may leave behind an agent that nobody joins.
const RESUME_PAUSE_MIN: Duration = Duration::from_millis(250);

/// The stream broke, the call did not: the agent is still there and waits.
pub(crate) fn another_stream(call: &Arc<Call>) -> Answer {
    if lock(&call.state).answer.is_none() {
        // Asked twice while the call is being taken up.
        return call.await_answer();
    }
    if lock(&call.state).streams >= STREAMS_MAX {
        log!(call, Error, Stream, "{STREAMS_MAX} streams were cut; giving up");
        call.hang_up(EndedBy::CallerLost);
        return cannot_serve(call.bridge, &call.sid, &call.files.phrases.apology);
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

/// `/incoming-call` for a call that has rung before. Twilio repeats a webhook whose answer got
/// lost, also when we were started again meanwhile; and whoever has caught one may repeat it at any
/// time.
/// None: it is new.
pub(crate) fn rings_again(bridge: &'static Bridge, incoming: &IncomingCall) -> Option<Answer> {
    let (sid, is_ours) = (incoming.sid, incoming.order.is_some());
    // Also while no new calls are taken any more.
    if let Some(call) = bridge.calls.find(sid) {
        return Some(call.await_answer());
    }
    let answer = match bridge.calls.how_it_ended(sid) {
        // Its caller is still to hear why.
        Some((how @ (EndedBy::NoAgent | EndedBy::Refused), _)) => {
            return Some(after_the_agent(bridge, sid, how, None));
        }
        // Only the journal knows whether that is over.
        Some((EndedBy::Transferred, _)) => take_up(bridge, sid, INTERRUPTED),
        Some(_) => Answer::HangUp,
        None if is_ours || !bridge.journals.knows(sid) => return None,
        // There may be a name without a file, of a call that never got a line.
        None => bridge.journals.find(sid).map(|_| take_up(bridge, sid, INTERRUPTED))?,
    };
    if matches!(answer, Answer::HangUp) {
        log!(Sid { sid }, Warn, Ring, "it rings again, but is over");
        refused("over");
    }
    Some(answer)
}

/// A call that no thread of this process knows, but whose journal says that it is not over: a
/// process has died with it, or a person did not take it. It goes on with a new agent, in the same
/// stage, with all that was said. If it was still ringing, it begins.
pub(crate) fn take_up(bridge: &'static Bridge, sid: &str, what_happened: &'static str) -> Answer {
    let agent = bridge.agent.get();
    let phrases = &agent.phrases;
    let sorry = |sentence: &str| match what_happened {
        // Not the same person again.
        NOBODY_ANSWERED | NOT_TAKEN => Answer::Sentence(sentence.to_owned()),
        _ => cannot_serve(bridge, sid, sentence),
    };
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
            return sorry(&phrases.apology);
        }
    };
    match past.ended_by {
        Some(EndedBy::Refused) => return Answer::Refuse,
        Some(_) => return Answer::HangUp,
        None if past.is_forgotten() => return Answer::HangUp,
        None => {}
    }
    if past.transfer.is_some() && what_happened == INTERRUPTED {
        return after_the_agent(bridge, sid, EndedBy::Transferred, past.transfer);
    }
    let (was_answered, first_message) = (past.was_answered, past.first_message.clone());
    match bridge.calls.admit(sid, || Call::from_journal(bridge, journal, past)) {
        Admission::Yours(call, line) => {
            log!(call, Warn, Ring, "the call is taken up from its journal");
            bridge.outbox.forget(sid);
            let after = if what_happened == INTERRUPTED { "process" } else { "transfer" };
            RESUMES.of(&[after]).add();
            // Whoever came to no person is spoken to by the agent, whatever n8n has decided.
            if was_answered || what_happened != INTERRUPTED {
                connect_to_agent(&call, line, &Opening::GoOn(what_happened))
            } else {
                begin(&call, line, &first_message)
            }
        }
        Admission::Known(call) => call.await_answer(),
        Admission::None(NoLine { reason, .. }) => {
            refused(reason);
            sorry(&phrases.busy)
        }
    }
}

/// Whether the person who was rung has taken the call. Twilio says so (`DialBridged`). Should it
/// say nothing, the key in the journal does; and who was rung in the agent's place had none to
/// press.
pub(crate) fn has_taken_it(bridge: &Bridge, sid: &str, form: &Form) -> bool {
    match form.get("DialBridged") {
        "" => {
            let is_picked_up = matches!(form.get("DialCallStatus"), "completed" | "answered");
            let read = || PastCall::read(&bridge.journals.find(sid)?).ok();
            is_picked_up && read().is_none_or(|past| past.transfer.is_none() || past.accepted)
        }
        bridged => bridged == "true",
    }
}

/// A person takes the call, so it is filed as one that was put through, whichever process does
/// that. It may be told twice: by the key that they press, and when the call is over.
pub(crate) fn note_accepted(bridge: &Bridge, sid: &str) {
    match bridge.journals.take_up(sid) {
        Ok((journal, past)) if past.transfer.is_some() && !past.accepted => {
            log!(Sid { sid }, Info, Goodbye, "the person takes the call");
            journal.note(&Event::Accepted);
            bridge.journals.settle();
        }
        Ok(_) => {}
        Err(why) => log!(Sid { sid }, Warn, Goodbye, "taken by a person; its journal: {why:?}"),
    }
}

/// A new agent after a broken connection, within [`RESUME_WITHIN`]. Meanwhile thread T finds no
/// agent, and lets the caller hear a tone. None: there is none to be had, or the call is over.
pub(crate) fn resume_agent(call: &Arc<Call>) -> Option<Arc<AgentLeg>> {
    let began = Instant::now();
    let deadline = began + RESUME_WITHIN;
    lock(&call.state).agent = None;
    log!(call, Warn, Agent, "the agent's connection broke; a new one goes on from here");
    let mut pause = RESUME_PAUSE_MIN;
    loop {
        let failure = match join_agent(call, &Opening::GoOn(INTERRUPTED), deadline) {
            Ok(agent) => {
                RESUMES.of(&["agent_line"]).add();
                let ms = began.elapsed().as_millis();
                log!(call, Info, Agent, "a new agent is there after {ms} ms"; ms);
                return Some(agent);
            }
            Err(failure) => failure,
        };
        if call.is_over() {
            return None;
        }
        if failure.refused || Instant::now() + pause > deadline {
            log!(call, Error, Agent, "no new agent: {failure}");
            return None;
        }
        let ms = pause.as_millis();
        log!(call, Warn, Agent, "no new agent yet: {failure}; trying again in {ms} ms"; ms);
        let is_wanted = |state: &mut CallState| state.hang_up.is_none();
        drop(wait(&call.changed, lock(&call.state), pause, is_wanted));
        if call.is_over() {
            return None;
        }
        pause *= 2;
    }
}

impl Call {
    /// A stream that has come and gone is thread T's to wait for.
    pub(crate) fn has_never_streamed(&self) -> bool {
        !self.is_over() && !self.tap.has_shown(Exhibit::Start)
    }

    /// The same call, from what a process that is gone (or a transfer that failed) has left of it.
    pub(crate) fn from_journal(bridge: &'static Bridge, journal: Journal, past: PastCall) -> Call {
        let incoming = IncomingCall {
            sid: &past.sid,
            number: &past.number,
            to: &past.to,
            stir_verstat: "",
            direction: past.direction,
            order: None,
            wire: String::new(),
        };
        let mut call = Call::new(bridge, &incoming);
        call.began = past.began.unwrap_or(call.began);
        {
            let mut state = lock(&call.state);
            if call.files.stages.contains_key(&past.stage) {
                state.stage = past.stage;
            }
            state.facts = past.facts;
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
