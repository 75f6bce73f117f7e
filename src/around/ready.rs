//! Ready for the next call.

use std::sync::atomic::Ordering;
use std::time::Duration;
use std::{io, thread};

use ring::hmac;

use crate::Bridge;
use crate::door::reply::Reply;
use crate::parties::twilio::Form;
use crate::toolbox::http::IDLE_MAX;
use crate::toolbox::log::log;
use crate::toolbox::text::hex;
use crate::toolbox::threads::spawn;

/// How often an unused connection to Ultravox is used, so that it is still there for the next call.
pub(crate) const ULTRAVOX_WARM_EVERY: Duration = Duration::from_secs(25);
/// The same for n8n, which closes a connection that was idle for 5 s.
pub(crate) const N8N_WARM_EVERY: Duration = Duration::from_secs(4);
/// The answer to such a request. A later one counts as none.
pub(crate) const WARM_WITHIN: Duration = Duration::from_secs(5);

const _: () = assert!(ULTRAVOX_WARM_EVERY.as_secs() < IDLE_MAX.as_secs());

/// Tells that we live, and nothing else. A `nonce` comes back signed twice, by which `callbridge
/// check` knows whether an address leads to this process, and whether both have the same
/// `PUBLIC_URL`.
pub(crate) fn health(bridge: &Bridge, url: &str) -> Reply {
    let query = url.split_once('?').map(|(_, query)| query).unwrap_or_default();
    match Form::parse(query.as_bytes()).get("nonce") {
        "" => Reply::text(200, "ok"),
        nonce => Reply::text(200, &format!("ok {}", bridge.prove(nonce))),
    }
}

impl Bridge {
    pub(crate) fn prove(&self, nonce: &str) -> String {
        let address = hmac::Key::new(hmac::HMAC_SHA256, self.config.public_url.as_bytes());
        [&self.identity, &address]
            .map(|key| hex(hmac::sign(key, nonce.as_bytes()).as_ref()))
            .join(" ")
    }
}

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
    let is_full = bridge.calls.all().len() >= bridge.config.max_calls;
    let is_draining = bridge.draining.load(Ordering::SeqCst);
    if is_full || is_draining || !bridge.agent_is_ready.load(Ordering::Relaxed) {
        return Reply::text(503, "not ready");
    }
    Reply::text(200, "ready")
}
