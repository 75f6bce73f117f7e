//! Ready for the next call: would it be served, and are the connections for it warm?
//!
//! `keep_ready` starts a thread each for Ultravox and n8n that use the connection to it often
//! enough that no call has to open one. What Ultravox answers, and when, is also what `/ready`
//! tells a load balancer: an old answer is none. Nothing here keeps a call out: whoever rings all
//! the same is tried.

use std::sync::Mutex;
use std::time::{Duration, Instant};
use std::{io, thread};

use crate::Bridge;
use crate::door::reply::Reply;
use crate::toolbox::http::IDLE_MAX;
use crate::toolbox::log::log;
use crate::toolbox::threads::{lock, spawn_for_good};

/// How often an unused connection to Ultravox is used, so that it is still there for the next call.
const ULTRAVOX_WARM_EVERY: Duration = Duration::from_secs(25);
/// The same for n8n, which closes a connection that was idle for 5 s.
const N8N_WARM_EVERY: Duration = Duration::from_secs(4);
/// The answer to such a request. A later one counts as none.
const WARM_WITHIN: Duration = Duration::from_secs(5);
/// The next question to an Ultravox that would not take a call.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// What is known of Ultravox counts for as long. Then whoever asks it has hung or been held up, and
/// nothing is known.
const KNOWN_FOR: Duration = Duration::from_mins(1);

const _: () = assert!(ULTRAVOX_WARM_EVERY.as_secs() < IDLE_MAX.as_secs());
const _: () = assert!(ULTRAVOX_WARM_EVERY.as_secs() + WARM_WITHIN.as_secs() < KNOWN_FOR.as_secs());

/// Whether Ultravox would take a call, as far as it has been asked.
#[derive(Default)]
pub(crate) struct Readiness(Mutex<Known>);

#[derive(Default)]
struct Known {
    /// When it last said that it would. Missing after any other answer, and before the first.
    ready_at: Option<Instant>,
    /// What the log has said last.
    complaint: Option<String>,
}

pub(crate) fn keep_ready(bridge: &'static Bridge) -> io::Result<()> {
    spawn_for_good("ultravox ready".into(), move || {
        loop {
            let failure = bridge.ultravox.has_room(WARM_WITHIN).err();
            let pause = if failure.is_some() { ASK_AGAIN_AFTER } else { ULTRAVOX_WARM_EVERY };
            bridge.readiness.learn(failure.map(|failure| failure.to_string()));
            thread::sleep(pause);
        }
    })?;
    if bridge.config.n8n_webhook_url.is_some() {
        spawn_for_good("n8n ready".into(), move || {
            loop {
                if let Err(failure) = bridge.n8n.greet(WARM_WITHIN) {
                    // The call that meets it says what to do.
                    log!(Debug, "{failure}");
                }
                thread::sleep(N8N_WARM_EVERY);
            }
        })?;
    }
    Ok(())
}

/// For a load balancer, or whoever watches: would the next caller be served? The log says why not.
pub(crate) fn ready(bridge: &Bridge) -> Reply {
    let is_full = bridge.calls.all().len() >= bridge.config.max_calls.get();
    let is_leaving = !bridge.takes_calls();
    if is_full || is_leaving || !bridge.readiness.is_ready() {
        return Reply::text(503, "not ready");
    }
    Reply::text(200, "ready")
}

impl Readiness {
    fn learn(&self, complaint: Option<String>) {
        let mut known = lock(&self.0);
        known.ready_at = complaint.is_none().then(Instant::now);
        known.say(complaint);
    }

    fn is_ready(&self) -> bool {
        let mut known = lock(&self.0);
        let Some(ready_at) = known.ready_at else { return false };
        let is_fresh = ready_at.elapsed() <= KNOWN_FOR;
        if !is_fresh {
            let seconds = KNOWN_FOR.as_secs();
            known.say(Some(format!("Ultravox has not been asked for more than {seconds} s")));
        }
        is_fresh
    }
}

impl Known {
    /// Each complaint once, and once that it is over.
    fn say(&mut self, complaint: Option<String>) {
        match &complaint {
            Some(found) if self.complaint.as_ref() != Some(found) => {
                log!(Warn, "a call could not be served now: {found}");
            }
            None if self.complaint.is_some() => log!(Info, "Ultravox would take a call again"),
            Some(_) | None => {}
        }
        self.complaint = complaint;
    }
}

#[cfg(test)]
mod tests;
