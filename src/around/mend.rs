//! A call that goes on after a break.

use std::sync::Arc;

use crate::around::lines::Slot;
use crate::records::ended_by::EndedBy;
use crate::records::exhibit::Exhibit;
use crate::records::journal::Unclaimed;
use crate::toolbox::log::{Sid, log};
use crate::toolbox::threads::lock;
use crate::{
    Answer, Bridge, Call, LINE_BROKE, Opening, after_the_agent, cannot_serve, connect_to_agent,
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
        cut.socket.shut();
    }
    call.bridge.metrics.resumes.of(&["stream"]).add();
    log!(call, Info, Stream, "Twilio asks for another stream");
    let answer = Answer::Stream { token: call.new_token() };
    call.show(Exhibit::StreamEnded, || "POST /stream-ended".to_owned());
    call.show(Exhibit::NextStream, || answer.for_the_eye(call.bridge));
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
    match bridge.calls.take_slot(sid, || Call::from_journal(bridge, journal, past)) {
        Slot::Yours(call, slot) => {
            log!(call, Warn, Ring, "the call is taken up from its journal");
            bridge.outbox.forget(sid);
            let after = if what_happened == LINE_BROKE { "process" } else { "transfer" };
            bridge.metrics.resumes.of(&[after]).add();
            connect_to_agent(&call, slot, &Opening::GoOn(what_happened))
        }
        Slot::Known(call) => call.await_answer(),
        Slot::None => {
            bridge.metrics.refused("busy");
            cannot_serve(bridge, &bridge.agent.phrases.busy)
        }
    }
}
