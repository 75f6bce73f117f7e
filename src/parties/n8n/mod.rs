//! n8n: a question, and its answer.

pub(crate) mod reply;

use std::time::{Duration, Instant};

use data_encoding::HEXLOWER;
use ring::hmac;
use serde_json::{Value, json};

use crate::Bridge;
use crate::toolbox::failure::{Failure, Party, unreachable_party};
use crate::toolbox::metrics::{N8N_REQUESTS, N8N_TIME};

/// An n8n reply. A longer one counts as nonsense.
pub(crate) const N8N_REPLY_BYTES_MAX: u64 = 64 * 1_024;

/// A question to n8n. On the wire:
///
/// ```text
/// POST N8N_WEBHOOK_URL
/// Content-Type: application/json
/// Idempotency-Key: CA9f3c…-1
/// X-Callbridge-Signature: sha256=<hex HMAC-SHA256 of the body>     (with N8N_HMAC_SECRET)
///
/// {"route":"1","number":"+4930123456","data":"empty","callSid":"CA9f3c…"}
/// ```
pub(crate) struct ToN8n<'a> {
    pub(crate) sid: &'a str,
    pub(crate) number: &'a str,
    /// `1` greeting, `2` transcript, `3` booking, or a tool's own.
    pub(crate) route: &'a str,
    pub(crate) data: &'a str,
    /// The same for every try at the same thing: delivery is at least once.
    pub(crate) key: String,
    /// With a transcript: how the call ended.
    pub(crate) ended_by: Option<&'a str>,
}

impl ToN8n<'_> {
    pub(crate) fn for_the_eye(&self) -> String {
        format!("POST N8N_WEBHOOK_URL\nIdempotency-Key: {}\n\n{}", self.key, self.body())
    }

    pub(crate) fn body(&self) -> Value {
        let mut body = json!({
            "route": self.route,
            "number": self.number,
            "data": self.data,
            "callSid": self.sid,
        });
        if let Some(ended_by) = self.ended_by {
            body["endedBy"] = json!(ended_by);
        }
        body
    }
}

/// What n8n answered. Even a 2xx may mean that the workflow failed.
pub(crate) struct N8nReply {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl N8nReply {
    pub(crate) fn for_the_eye(&self) -> String {
        format!("{}\n\n{}", self.status, self.body)
    }
}

/// What `understand` makes of n8n's answer.
pub(crate) fn ask_n8n<T>(
    bridge: &Bridge,
    question: &ToN8n,
    within: Duration,
    understand: impl Fn(&N8nReply) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let began = Instant::now();
    let posted = post_to_n8n(bridge, question, within);
    let took = began.elapsed();
    let (outcome, answer) = match posted {
        Err(failure) => (if took >= within { "late" } else { "failed" }, Err(failure)),
        Ok(reply) => match understand(&reply) {
            Ok(answer) => ("answered", Ok(answer)),
            Err(why) if (200..300).contains(&reply.status) => ("nonsense", Err(why)),
            Err(why) => ("refused", Err(why)),
        },
    };
    N8N_REQUESTS.of(&[question.route, outcome]).add();
    N8N_TIME.of(&[question.route]).observe(took);
    answer
}

pub(crate) fn post_to_n8n(
    bridge: &Bridge,
    question: &ToN8n,
    within: Duration,
) -> Result<N8nReply, Failure> {
    let Some(url) = &bridge.config.n8n_webhook_url else {
        return Err(Failure::new(Party::N8n, "N8N_WEBHOOK_URL is not set").certainly_not_done());
    };
    let body = question.body().to_string();
    let mut request = bridge
        .web
        .post(url)
        .header("Content-Type", "application/json")
        .header("Idempotency-Key", &question.key);
    if let Some(secret) = &bridge.config.n8n_hmac_secret {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret.reveal().as_bytes());
        let signature =
            format!("sha256={}", HEXLOWER.encode(hmac::sign(&key, body.as_bytes()).as_ref()));
        request = request.header("X-Callbridge-Signature", signature);
    }
    if let Some((name, value)) = &bridge.config.n8n_auth_header {
        request = request.header(name, value.reveal());
    }
    let answered = request.config().timeout_global(Some(within)).build().send(body);
    let mut response = answered.map_err(|error| unreachable_party(Party::N8n, error, within))?;
    let status = response.status().as_u16();
    let limited = response
        .body_mut()
        .with_config()
        .limit(N8N_REPLY_BYTES_MAX)
        .lossy_utf8(true)
        .read_to_string();
    match limited {
        // An answer that is used is taken as it is; one that is refused will be quoted.
        Ok(body) if (200..300).contains(&status) => Ok(N8nReply { status, body }),
        Ok(body) => Ok(N8nReply { status, body: bridge.config.hide_secrets(body) }),
        Err(error) => Err(unreachable_party(Party::N8n, error, within)),
    }
}
