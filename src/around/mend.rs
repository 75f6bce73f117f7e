//! A call that goes on after a break: of a stream, or of a whole process.
//!
//! The caller is to notice as little as possible. A stream that broke is followed by another one,
//! with a token of its own. A call that no thread knows is read from its journal, and a new agent
//! goes on with all that was said. How often that is tried, and what the caller hears when it is
//! not any more, is bounded here; that there is a break at all is found in steps 5, 6 and 8.

use std::sync::Arc;

use crate::owner::lines::Admission;
use crate::records::exhibit::Exhibit;
use crate::records::journal::HangUp;
use crate::records::past::{Filed, journal_of};
use crate::records::transcript::LINE_BROKE;
use crate::toolbox::log::{Sid, log};
use crate::toolbox::metrics::{RESUMES, refused};
use crate::toolbox::threads::lock;
use crate::{Answer, Bridge, Call, Opening, after_the_agent, cannot_serve, connect_to_agent};

/// Streams of one call. One more, and the caller hears the apology: something cuts them all.
pub(crate) const STREAMS_MAX: u32 = 6;

/// The stream broke, the call did not: the agent is still there and waits.
pub(crate) fn another_stream(call: &Arc<Call>) -> Answer {
    if lock(&call.state).streams >= STREAMS_MAX {
        log!(call, Error, Stream, "{STREAMS_MAX} streams were cut; giving up");
        call.hang_up(HangUp::CallerLost);
        return cannot_serve(call.bridge, &call.bridge.agent.phrases.apology);
    }
    // Thread T may not have noticed yet.
    if let Some(cut) = lock(&call.state).caller.take() {
        cut.socket.shut();
    }
    RESUMES.of(&["stream"]).add();
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
    let read = journal_of(&bridge.config.data_dir, sid)
        .and_then(|path| Filed::read(&path).ok().map(|filed| (path, filed)));
    let Some((path, filed)) = read.filter(|(_, filed)| filed.sid == sid) else {
        log!(Sid { sid }, Error, Goodbye, "asked about a call of which there is no journal");
        return cannot_serve(bridge, apology);
    };
    if !filed.ended_by.is_empty() {
        return Answer::HangUp;
    }
    if filed.transferred && what_happened == LINE_BROKE {
        return after_the_agent(bridge, HangUp::Transferred);
    }
    match bridge.calls.admit(sid, || Call::from_journal(bridge, path, filed)) {
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
