//! What the owner orders from the page beside calls: to delete one, and to offer n8n again what it
//! has not taken.
//!
//! ```text
//! DELETE /calls/CA9f3c…   {}   or {"evenUndelivered":true}
//! POST /outbox            {}
//! ```
//!
//! A call is deleted at Ultravox first: if that fails, nothing is gone here, and it can be tried
//! again. A call that goes on, or may, is not deleted.

use std::fs;

use serde_json::{Value, json};

use crate::Bridge;
use crate::door::reply::Reply;
use crate::parties::twilio::is_sid;
use crate::parties::ultravox::delete_call;
use crate::records::delivery::TRANSFER_MAX;
use crate::records::past::PastCall;
use crate::toolbox::failure::Failure;
use crate::toolbox::log::{Sid, log};

/// `POST /outbox`: every transcript that waits is due now.
pub(crate) fn offer_again(bridge: &'static Bridge, _url: &str, _order: &Value) -> Reply {
    let offered = bridge.outbox.offer_again(&bridge.journals);
    log!(Info, "{offered} transcripts are offered to n8n again, as ordered"; offered);
    Reply::json(202, &json!({"offered": offered}))
}

/// `DELETE /calls/{sid}`: its journal, and its agents' calls at Ultravox.
pub(crate) fn delete_journal(bridge: &'static Bridge, url: &str, order: &Value) -> Reply {
    let sid = url.split('?').next().unwrap_or_default().trim_start_matches("/calls/");
    let path = Some(sid).filter(|sid| is_sid("CA", sid)).and_then(|sid| bridge.journals.find(sid));
    let Some(path) = path else {
        return Reply::error(404, "there is no journal of such a call");
    };
    // While it is ours, nobody takes the call up or delivers it.
    let claimed = bridge.journals.claim(&path);
    let past = PastCall::read(&path).unwrap_or_default();
    let may_go_on = past.ended_by.is_none() && past.quiet_for <= TRANSFER_MAX;
    if claimed.is_err() || may_go_on {
        return Reply::error(409, "the call goes on, or its transcript is just being delivered");
    }
    let has_n8n = bridge.config.n8n_webhook_url.is_some();
    let is_undelivered = has_n8n && !past.delivered && past.transcript.count() > 0;
    if is_undelivered && order["evenUndelivered"] != true {
        let error = "n8n does not have this transcript yet";
        return Reply::json(409, &json!({"error": error, "undelivered": true}));
    }
    let gone =
        past.agent_ids.iter().try_for_each(|id| delete_call(&bridge.http, &bridge.config, id));
    if let Err(failure) = gone {
        return not_deleted(sid, &failure);
    }
    if let Err(error) = fs::remove_file(&path) {
        return Reply::error(500, &format!("the journal cannot be removed: {error}"));
    }
    bridge.outbox.drop_delivery(sid);
    log!(Sid { sid }, Info, After, "deleted as ordered, here and at Ultravox");
    Reply::json(200, &json!({"deleted": sid}))
}

fn not_deleted(sid: &str, failure: &Failure) -> Reply {
    log!(Sid { sid }, Warn, After, "{failure}; nothing was deleted here");
    Reply::error(502, &format!("{failure}; nothing was deleted here"))
}
