//! Ready for the next call: would it be served, and are the connections for it warm?
//!
//! `keep_ready` starts a thread each for Ultravox and n8n that use the connection to it often
//! enough that no call has to open one. What Ultravox answers is also what `/ready` tells a load
//! balancer. Nothing here keeps a call out: whoever rings all the same is tried.

use std::sync::atomic::Ordering;
use std::time::Duration;
use std::{io, thread};

use serde_json::Value;

use crate::Bridge;
use crate::door::reply::Reply;
use crate::parties::n8n::N8N_REPLY_BYTES_MAX;
use crate::parties::ultravox::{ULTRAVOX_REPLY_BYTES_MAX, ultravox_advice};
use crate::toolbox::failure::{Failure, Party, unreachable_party};
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
            let found = ask_ultravox_for_room(bridge).err().map(|failure| failure.to_string());
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
    if let Some(url) = &bridge.config.n8n_webhook_url {
        spawn("n8n ready".into(), move || {
            loop {
                if let Err(failure) = greet_n8n(bridge, url) {
                    // The call that meets it says what to do.
                    log!(Debug, "{failure}");
                }
                thread::sleep(N8N_WARM_EVERY);
            }
        })?;
    }
    Ok(())
}

/// `GET /api/accounts/me`: is the key right, and may one more call be created?
fn ask_ultravox_for_room(bridge: &Bridge) -> Result<(), Failure> {
    let config = &bridge.config;
    let answered = bridge
        .web
        .get(format!("{}/api/accounts/me", config.ultravox_api_url))
        .header("X-API-Key", config.ultravox_api_key.reveal())
        .config()
        .timeout_global(Some(WARM_WITHIN))
        .build()
        .call();
    let unreachable = |error| unreachable_party(Party::Ultravox, error, WARM_WITHIN);
    let mut response = answered.map_err(unreachable)?;
    let status = response.status().as_u16();
    let text = response
        .body_mut()
        .with_config()
        .limit(ULTRAVOX_REPLY_BYTES_MAX)
        .lossy_utf8(true)
        .read_to_string()
        .map_err(unreachable)?;
    if !(200..300).contains(&status) {
        let what = format!("{status} to a question about the account");
        return Err(Failure::new(Party::Ultravox, what).advise(ultravox_advice(status)));
    }
    let account: Value = serde_json::from_str(&text).unwrap_or_default();
    match (account["activeCalls"].as_u64(), account["allowedConcurrentCalls"].as_u64()) {
        (Some(active), Some(allowed)) if active >= allowed => {
            let what = format!("all {allowed} calls that the account allows at once are in use");
            Err(Failure::new(Party::Ultravox, what).advise("set MAX_CALLS to fit"))
        }
        _ => Ok(()),
    }
}

/// A preflight request of CORS: n8n answers it without running the workflow.
fn greet_n8n(bridge: &Bridge, url: &str) -> Result<(), Failure> {
    let answered = bridge
        .web
        .options(url)
        .header("Origin", &bridge.config.public_url)
        .config()
        .timeout_global(Some(WARM_WITHIN))
        .build()
        .call();
    let unreachable = |error| unreachable_party(Party::N8n, error, WARM_WITHIN);
    // Only an answer that was read to its end leaves the connection free for the next request.
    let mut response = answered.map_err(unreachable)?;
    let body = response.body_mut().with_config().limit(N8N_REPLY_BYTES_MAX).read_to_vec();
    body.map(drop).map_err(unreachable)
}

/// For a load balancer, or whoever watches: would the next caller be served? The log says why not.
pub(crate) fn ready(bridge: &Bridge) -> Reply {
    let is_full = bridge.calls.all().len() >= bridge.config.max_calls;
    let is_leaving = !bridge.takes_calls();
    if is_full || is_leaving || !bridge.agent_is_ready.load(Ordering::Relaxed) {
        return Reply::text(503, "not ready");
    }
    Reply::text(200, "ready")
}
