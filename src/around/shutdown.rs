//! The end of the process: told to stop, it takes no new calls, sees the others to their end, and
//! leaves.
//!
//! `await_end` is what the main thread does after the start. After a signal the process drains for
//! at most `DRAIN_SECONDS`, says goodbye in the calls that are left, offers every transcript to n8n
//! once, and stays a moment for Twilio's last question. A second signal ends it at once. Either
//! way journals and log are written to their end first, unless the disk hangs, or whoever reads the
//! log. No call is ended in any other way than its own, `Call::hang_up`.

use std::sync::mpsc;
use std::time::Duration;
use std::{io, thread};

use signal_hook::consts::SIGHUP;
use signal_hook::iterator::Signals;

use crate::records::ended_by::EndedBy;
use crate::toolbox::log::{flush, log};
use crate::toolbox::text::counted;
use crate::toolbox::threads::{lock, spawn, spawn_for_good};
use crate::{AGENT_LEAVES_WITHIN, Bridge};

/// A process that ends stays this long after its last call. Twilio asks what comes next when a
/// stream is over; unanswered, the caller hears of an application error instead of a person.
const LAST_QUESTION_WITHIN: Duration = Duration::from_secs(2);
/// For the last lines of the journals. A disk that hangs does not keep the process.
const FLUSH_WITHIN: Duration = Duration::from_secs(2);

/// How far this process is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Serving,
    /// No new calls any more. The others go on.
    Draining,
    /// And the last ones are being ended.
    Ending,
}

/// Waits for SIGTERM or SIGINT, then for the calls to end by themselves. A second signal ends at
/// once, but for the last lines of the journals. SIGHUP ends nothing: it has the agent files read.
pub(crate) fn await_end(bridge: &'static Bridge, mut signals: Signals) -> io::Result<()> {
    let (news, next_news) = mpsc::channel();
    let drained = news.clone();
    let (begin, begins) = mpsc::channel();
    spawn("signals".into(), move || {
        for signal in signals.forever() {
            if signal == SIGHUP {
                bridge.agent.read_again(&bridge.config);
            } else if news.send("a second signal").is_err() {
                return;
            }
        }
    })?;
    // Started before it is needed: then there may be no thread to be had.
    spawn_for_good("drain".into(), move || {
        // After a fault of its own it goes on at once.
        if bridge.takes_calls() && begins.recv().is_err() {
            return;
        }
        drain_calls(bridge);
        if drained.send("all calls are over").is_err() {
            // A second signal was faster.
        }
    })?;
    if next_news.recv().is_err() {
        return Ok(());
    }
    // Before it is said: whoever reads the line may rely on it.
    *lock(&bridge.phase) = Phase::Draining;
    let calls = bridge.calls.all().len();
    let drain = bridge.config.drain;
    let seconds = drain.as_secs();
    let others = match calls {
        0 => "none is in progress".to_owned(),
        _ => format!("{} may go on for {seconds} s", counted(calls, "call")),
    };
    log!(Info, "told to stop: no new calls; {others}"; calls, seconds);
    if begin.send(()).is_err() {
        // It has noticed by itself.
    }
    if let Ok(why) = next_news.recv() {
        log!(Info, "stopped: {why}");
    }
    bridge.journals.flush(FLUSH_WITHIN);
    flush();
    Ok(())
}

impl Bridge {
    pub(crate) fn takes_calls(&self) -> bool {
        *lock(&self.phase) == Phase::Serving
    }

    pub(crate) fn is_ending(&self) -> bool {
        *lock(&self.phase) == Phase::Ending
    }
}

fn drain_calls(bridge: &'static Bridge) {
    bridge.calls.await_none(bridge.config.drain);
    *lock(&bridge.phase) = Phase::Ending;
    for call in bridge.calls.all() {
        log!(call, Info, Goodbye, "this process ends, and the call with it");
        let told = call.agent().map(|agent| agent.hang_up(&call.files.phrases.cut_short));
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
