//! Calls that go out: `POST /outgoing-call`, an order of the owner's.
//!
//! The number must begin with one of `OUTGOING_ALLOW`. Twilio rings it, and from the moment that
//! somebody picks up the call is one like any other: Twilio posts `/incoming-call`, with an id in
//! the address by which the greeting that was ordered is found again. Nothing is remembered of a
//! number that does not answer, beyond `RINGING_MAX`.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Bridge;
use crate::door::reply::Reply;
use crate::parties::n8n::GREETING_CHARS_MAX;
use crate::parties::twilio::rest;
use crate::toolbox::log::{Sid, log};
use crate::toolbox::metrics::refused;
use crate::toolbox::random::random_hex;
use crate::toolbox::text::{is_e164, shorten_number};
use crate::toolbox::threads::lock;

/// An outgoing call's greeting is remembered for this long while the phone rings.
const RINGING_MAX: Duration = Duration::from_mins(11);
/// Outgoing calls that ring at the same time. The next is refused with 503.
const RINGING_AT_ONCE_MAX: usize = 100;

/// `{"phoneNumber":"+49…","firstMessage":"…"}`, the second one optional. 201 with `callSid`, or an
/// error with `error`, and Twilio's `code` where Twilio has refused.
pub(crate) fn outgoing_call(bridge: &'static Bridge, _url: &str, order: &Value) -> Reply {
    if bridge.config.is_local {
        return Reply::error(503, "PUBLIC_URL is not set, so there is no telephone (local mode)");
    }
    let number = order["phoneNumber"].as_str().unwrap_or_default();
    let first_message = order["firstMessage"].as_str().unwrap_or_default().trim();
    if !is_e164(number) {
        return Reply::error(400, "phoneNumber must be like +4930123456");
    }
    if first_message.chars().count() > GREETING_CHARS_MAX {
        return Reply::error(400, &format!("firstMessage is over {GREETING_CHARS_MAX} characters"));
    }
    if !bridge.config.outgoing_allow.iter().any(|prefix| number.starts_with(prefix)) {
        log!(Warn, "an outgoing call to {} was refused", shorten_number(number));
        refused("not_allowed");
        return Reply::error(403, "OUTGOING_ALLOW has no beginning of this number");
    }
    if !bridge.takes_calls() {
        return Reply::error(503, "this process is about to end");
    }
    if bridge.calls.all().len() >= bridge.config.max_calls.get() {
        return Reply::error(503, "all lines are busy (MAX_CALLS)");
    }
    let Some(id) = bridge.ringing.add(first_message) else {
        return Reply::error(503, "too many outgoing calls ring already");
    };
    match rest::ring(&bridge.http, &bridge.config, number, &id) {
        Ok(sid) => {
            log!(Sid { sid: &sid }, Info, Ring, "ringing {}", shorten_number(number));
            Reply::json(201, &json!({"callSid": sid}))
        }
        Err(reply) => {
            bridge.ringing.take(&id);
            reply
        }
    }
}

/// Outgoing calls that ring, by the id we have put into their webhook's address, each with the
/// greeting that was asked for.
#[derive(Default)]
pub(crate) struct Ringing(Mutex<HashMap<String, (Instant, String)>>);

impl Ringing {
    fn add(&self, first_message: &str) -> Option<String> {
        let mut ringing = lock(&self.0);
        ringing.retain(|_, (since, _)| since.elapsed() < RINGING_MAX);
        if ringing.len() >= RINGING_AT_ONCE_MAX {
            return None;
        }
        let id = random_hex();
        ringing.insert(id.clone(), (Instant::now(), first_message.to_owned()));
        Some(id)
    }

    /// Is this call one of ours, and what is it to be greeted with? Empty: as usual.
    pub(crate) fn take(&self, id: &str) -> Option<String> {
        lock(&self.0).remove(id).map(|(_, first_message)| first_message)
    }
}
