//! The end of the process.

use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Duration;
use std::{io, thread};

use signal_hook::iterator::Signals;

use crate::records::ended_by::EndedBy;
use crate::toolbox::log::log;
use crate::toolbox::threads::spawn;
use crate::{AGENT_LEAVES_WITHIN, Bridge};

/// A process that ends stays this long after its last call. Twilio asks what comes next when a
/// stream is over; unanswered, the caller hears of an application error instead of a person.
pub(crate) const LAST_QUESTION_WITHIN: Duration = Duration::from_secs(2);
/// How often the journals are looked through for those that are older than `KEEP_DAYS`.
pub(crate) const TIDY_EVERY: Duration = Duration::from_hours(24);

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
    let tidy = || bridge.outbox.tidy(|_, _| {});
    if await_news(&next_news, TIDY_EVERY, tidy).is_none() {
        return Ok(());
    }
    // Before it is said: whoever reads the line may rely on it.
    bridge.draining.store(true, Ordering::SeqCst);
    let calls = bridge.calls.all().len();
    let drain = bridge.config.drain;
    let seconds = drain.as_secs();
    log!(
        Info,
        "told to stop: no new calls; {calls} may go on for {seconds} s";
        calls, seconds
    );
    spawn("drain".into(), move || {
        drain_calls(bridge);
        if drained.send("all calls are over").is_err() {
            // A second signal was faster.
        }
    })?;
    if let Ok(why) = next_news.recv() {
        log!(Info, "stopped: {why}");
    }
    Ok(())
}

/// The thread that waits is the main one, which has nothing else to do.
pub(crate) fn await_news<T>(
    news: &mpsc::Receiver<T>,
    tidy_every: Duration,
    mut tidy: impl FnMut(),
) -> Option<T> {
    loop {
        match news.recv_timeout(tidy_every) {
            Ok(news) => return Some(news),
            Err(mpsc::RecvTimeoutError::Timeout) => tidy(),
            Err(mpsc::RecvTimeoutError::Disconnected) => return None,
        }
    }
}

pub(crate) fn drain_calls(bridge: &'static Bridge) {
    bridge.calls.await_none(bridge.config.drain);
    bridge.stopping.store(true, Ordering::SeqCst);
    for call in bridge.calls.all() {
        log!(call, Info, Goodbye, "this process ends, and the call with it");
        let told = call.agent().map(|agent| agent.hang_up(&bridge.agent.phrases.cut_short));
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

#[cfg(test)]
mod tests;
