//! Calls that go out: `POST /outgoing-call`, an order of the owner's.
//!
//! The number must begin with one of `OUTGOING_ALLOW`. Twilio rings it, and from the moment that
//! somebody picks up the call is one like any other: Twilio posts `/incoming-call`, with an id in
//! the address by which the greeting that was ordered is found again. If this process dies while it
//! rings, the next one finds it in the call's journal, which begins with the order. Whoever does
//! not answer makes room as soon as Twilio says so, else after `RINGING_MAX`.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::door::reply::Reply;
use crate::parties::n8n::decision::GREETING_CHARS_MAX;
use crate::parties::twilio::{is_sid, rest};
use crate::records::ended_by::EndedBy;
use crate::records::event::Event;
use crate::records::index::name_of;
use crate::records::journal::Journal;
use crate::toolbox::log::{Sid, log};
use crate::toolbox::metrics::refused;
use crate::toolbox::random::random_hex;
use crate::toolbox::text::{is_e164, shorten_number};
use crate::toolbox::threads::lock;
use crate::{Bridge, IncomingCall};

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
            if is_sid("CA", &sid) {
                bridge.ringing.rings(bridge, &id, &sid, number);
            }
            log!(Sid { sid: &sid }, Info, Ring, "ringing {}", shorten_number(number));
            Reply::json(201, &json!({"callSid": sid}))
        }
        Err((reply, may_ring)) => {
            if !may_ring {
                bridge.ringing.take(&id);
            }
            reply
        }
    }
}

/// Outgoing calls that ring, by the id we have put into their webhooks' addresses.
#[derive(Default)]
pub(crate) struct Ringing(Mutex<HashMap<String, Order>>);

/// What is known of a call before anybody picks up.
pub(crate) struct Order {
    since: Instant,
    /// What it is to be greeted with. Empty: as usual.
    first_message: String,
    /// Begins when Twilio has given the call its id.
    journal: Option<Journal>,
}

impl Ringing {
    fn add(&self, first_message: &str) -> Option<String> {
        let mut ringing = lock(&self.0);
        for (_, old) in ringing.extract_if(|_, order| order.since.elapsed() >= RINGING_MAX) {
            old.comes_to_nothing();
        }
        if ringing.len() >= RINGING_AT_ONCE_MAX {
            return None;
        }
        let id = random_hex();
        let first_message = first_message.to_owned();
        ringing.insert(id.clone(), Order { since: Instant::now(), first_message, journal: None });
        Some(id)
    }

    /// Whoever picks up at once may have been faster than Twilio's answer to us: then the call has
    /// its journal already.
    fn rings(&self, bridge: &Bridge, id: &str, sid: &str, number: &str) {
        if let Some(order) = lock(&self.0).get_mut(id) {
            let journal = bridge.journals.begin(sid);
            let (call_sid, number) = (sid.to_owned(), number.to_owned());
            let first_message = order.first_message.clone();
            journal.note(&Event::Ordered { call_sid, number, first_message });
            order.journal = Some(journal);
        }
    }

    /// Somebody has picked up, or the order has failed. None: it is none of ours, or an earlier
    /// process's.
    pub(crate) fn take(&self, id: &str) -> Option<Order> {
        lock(&self.0).remove(id)
    }

    /// Twilio says that this call is over. If anybody had picked up, it would not be here.
    pub(crate) fn is_over(&self, id: &str) {
        if let Some(order) = self.take(id) {
            order.comes_to_nothing();
        }
    }

    /// Is this the journal of a call that rings?
    pub(crate) fn has(&self, name: &str) -> bool {
        let is_its =
            |order: &Order| order.journal.as_ref().is_some_and(|it| name_of(it.path()) == name);
        lock(&self.0).values().any(is_its)
    }
}

impl IncomingCall<'_> {
    /// Asked for by whoever ordered the call. Empty: as usual.
    pub(crate) fn first_message(&self) -> &str {
        self.order.as_ref().map(|order| order.first_message.as_str()).unwrap_or_default()
    }

    /// It has no line. Whoever ordered it is told so by its journal.
    pub(crate) fn comes_to_nothing(&self) {
        if let Some(order) = &self.order {
            order.comes_to_nothing();
        }
    }

    /// Of a call that goes out it has begun with the order.
    pub(crate) fn journal(&self, bridge: &Bridge) -> Journal {
        let begun = self.order.as_ref().and_then(|order| order.journal.clone());
        begun.unwrap_or_else(|| bridge.journals.begin(self.sid))
    }
}

impl Order {
    fn comes_to_nothing(&self) {
        if let Some(journal) = &self.journal {
            journal.note(&Event::End { ended_by: EndedBy::NeverStreamed });
            journal.note(&Event::Delivered);
        }
    }
}

#[cfg(test)]
mod tests;
