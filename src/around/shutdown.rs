//! The end of the process.

use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Duration;
use std::{io, thread};

use serde_json::json;
use signal_hook::iterator::Signals;
use tungstenite::protocol::Message;

use crate::records::ended_by::EndedBy;
use crate::toolbox::log::log;
use crate::toolbox::threads::spawn;
use crate::{AGENT_LEAVES_WITHIN, Bridge};

/// A process that ends stays this long after its last call. Twilio asks what comes next when a
/// stream is over; unanswered, the caller hears of an application error instead of a person.
pub(crate) const LAST_QUESTION_WITHIN: Duration = Duration::from_secs(2);
/// For the last lines of the journals. A disk that hangs does not keep the process.
const FLUSH_WITHIN: Duration = Duration::from_secs(2);

/// Waits for SIGTERM or SIGINT, then for the calls to end by themselves. A second signal ends at
/// once; what has been said is on disk by then, as always.
pub(crate) fn await_end(bridge: &'static Bridge, mut signals: Signals) -> io::Result<()> {
    let (news, next_news) = mpsc::channel();
    let drained = news.clone();
    spawn("signals".into(), move || {
        for _ in signals.forever() {
            if news.send("a second signal").is_err() {
                return;
            }
        }
    })?;
    if next_news.recv().is_err() {
        return Ok(());
    }
    let calls = bridge.calls.all().len();
    let drain = bridge.config.drain;
    let seconds = drain.as_secs();
    log!(
        Info,
        "told to stop: no new calls; {calls} may go on for {seconds} s";
        calls, seconds
    );
    bridge.draining.store(true, Ordering::SeqCst);
    spawn("drain".into(), move || {
        drain_calls(bridge);
        if drained.send("all calls are over").is_err() {
            // A second signal was faster.
        }
    })?;
    if let Ok(why) = next_news.recv() {
        log!(Info, "stopped: {why}");
    }
    bridge.journals.flush(FLUSH_WITHIN);
    Ok(())
}

pub(crate) fn drain_calls(bridge: &'static Bridge) {
    bridge.calls.await_none(bridge.config.drain);
    bridge.stopping.store(true, Ordering::SeqCst);
    let goodbye = json!({"type": "hang_up", "message": bridge.agent.phrases.cut_short}).to_string();
    for call in bridge.calls.all() {
        log!(call, Info, Goodbye, "this process ends, and the call with it");
        let told = call.agent().map(|agent| agent.send(Message::text(goodbye.clone())));
        if !matches!(told, Some(Ok(()))) {
            call.hang_up(EndedBy::ShuttingDown);
        }
    }
    bridge.calls.await_none(AGENT_LEAVES_WITHIN);
    for call in bridge.calls.all() {
        call.hang_up(EndedBy::ShuttingDown);
    }
    bridge.calls.await_none(AGENT_LEAVES_WITHIN);
    bridge.outbox.await_first_tries();
    // Nothing announces that Twilio will not ask.
    thread::sleep(LAST_QUESTION_WITHIN.saturating_sub(bridge.calls.since_last_end()));
}
