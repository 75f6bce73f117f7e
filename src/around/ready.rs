//! Ready for the next call: would it be served, and are the connections for it warm?
//!
//! `keep_ready` starts a thread each for Ultravox and n8n that use the connection to it often
//! enough that no call has to open one. What Ultravox answers is also what `/ready` tells a load
//! balancer. Nothing here keeps a call out: whoever rings all the same is tried.

use std::sync::atomic::Ordering;
use std::time::Duration;
use std::{io, thread};

use crate::Bridge;
use crate::door::reply::Reply;
use crate::toolbox::http::IDLE_MAX;
use crate::toolbox::log::log;
use crate::toolbox::threads::spawn;

/// How often an unused connection to Ultravox is used, so that it is still there for the next call.
const ULTRAVOX_WARM_EVERY: Duration = Duration::from_secs(25);
/// The same for n8n, which closes a connection that was idle for 5 s.
const N8N_WARM_EVERY: Duration = Duration::from_secs(4);
/// The answer to such a request. A later one counts as none.
const WARM_WITHIN: Duration = Duration::from_secs(5);

const _: () = assert!(ULTRAVOX_WARM_EVERY.as_secs() < IDLE_MAX.as_secs());

pub(crate) fn keep_ready(bridge: &'static Bridge) -> io::Result<()> {
    spawn("ultravox ready".into(), move || {
        let mut complaint = None;
        loop {
            let found =
                bridge.ultravox.has_room(WARM_WITHIN).err().map(|failure| failure.to_string());
            bridge.agent_is_ready.store(found.is_none(), Ordering::Relaxed);
            match &found {
                Some(found) if complaint.as_ref() != Some(found) => {
                    log!(Warn, "a call could not be served now: {found}");
                }
                None if complaint.is_some() => log!(Info, "Ultravox would take a call again"),
                _ => {}
            }
            complaint = found;
            thread::sleep(ULTRAVOX_WARM_EVERY);
        }
    })?;
    if bridge.config.n8n_webhook_url.is_some() {
        spawn("n8n ready".into(), move || {
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
    if is_full || is_leaving || !bridge.agent_is_ready.load(Ordering::Relaxed) {
        return Reply::text(503, "not ready");
    }
    Reply::text(200, "ready")
}
