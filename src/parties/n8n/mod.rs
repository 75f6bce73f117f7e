//! n8n, the owner's business logic: it is asked who calls, told to book, and given the transcript.
//!
//! Everything goes to one address, `N8N_WEBHOOK_URL`, and says by its `route` what is wanted. On
//! the wire:
//!
//! ```text
//! POST N8N_WEBHOOK_URL
//! Content-Type: application/json
//! Idempotency-Key: CA9f3c…-1
//! X-Callbridge-Signature: sha256=<hex HMAC-SHA256 of the body>     (with N8N_HMAC_SECRET)
//!
//! {"route":"1","number":"+4930123456","data":"empty","callSid":"CA9f3c…"}
//! ```
//!
//! An [`N8n`] blocks until there is an answer or the time is up. It never tries twice: whether that
//! is safe depends on what was asked. What the many kinds of answer mean is in [`reply`].

pub(crate) mod answered;
pub(crate) mod decision;
pub(crate) mod reply;

use std::sync::Arc;
use std::time::{Duration, Instant};

use data_encoding::HEXLOWER;
use ring::hmac;
use serde_json::{Map, Value, json};

use crate::parties::n8n::decision::{Decision, read_decision};
use crate::parties::n8n::reply::{N8nReply, n8n_refusal, understand_reply};
use crate::parties::standing;
use crate::records::event::Direction;
use crate::records::tap::{Exhibit, Tap};
use crate::setup::agent::Agent;
use crate::setup::settings::Config;
use crate::toolbox::failure::{Failure, Party};
use crate::toolbox::http::{Ask, Http};
use crate::toolbox::log::{Sid, log};
use crate::toolbox::metrics;

/// An n8n reply. A longer one counts as nonsense.
const REPLY_BYTES_MAX: u64 = 64 * 1_024;

/// The owner's n8n, if there is one.
pub(crate) struct N8n {
    http: Http,
    config: Arc<Config>,
}

/// What n8n is asked or told.
pub(crate) struct Question<'a> {
    pub(crate) sid: &'a str,
    pub(crate) number: &'a str,
    /// `1` greeting, `2` transcript, `3` booking, or a tool's own.
    pub(crate) route: &'a str,
    pub(crate) data: &'a str,
    /// The same for every try at the same thing: delivery is at least once.
    pub(crate) key: String,
    /// What else there is to tell of the ring, or with a transcript.
    pub(crate) report: Map<String, Value>,
}

/// A call that rings, for n8n to decide about.
pub(crate) struct Ring<'a> {
    pub(crate) sid: &'a str,
    pub(crate) number: &'a str,
    /// The number that was called.
    pub(crate) to: &'a str,
    pub(crate) direction: Direction,
    /// Whether the carriers vouch for the caller's number, in Twilio's words. Empty: not known.
    pub(crate) stir_verstat: &'a str,
}

impl N8n {
    pub(crate) fn new(http: Http, config: Arc<Config>) -> N8n {
        N8n { http, config }
    }

    /// Route 1: what is to be done with a call that rings, and what its caller hears first.
    pub(crate) fn ring(
        &self,
        ring: &Ring,
        agent: &Agent,
        within: Duration,
        tap: &Tap,
    ) -> Result<Decision, Failure> {
        let question = ring.question();
        tap.show(Exhibit::Lookup, || question.redacted());
        let decision = self.ask(&question, within, |reply| {
            tap.show(Exhibit::LookedUp, || reply.redacted());
            read_decision(reply, agent)
        })?;
        for oddity in &decision.oddities {
            log!(Sid { sid: ring.sid }, Warn, Greeting, "n8n: {oddity}");
        }
        Ok(decision)
    }

    /// A tool's own route: the sentence that the agent is told.
    pub(crate) fn tool(
        &self,
        question: &Question,
        within: Duration,
        tap: &Tap,
    ) -> Result<String, Failure> {
        tap.show(Exhibit::ToolQuestion, || question.redacted());
        self.ask(question, within, |reply| {
            tap.show(Exhibit::ToolReply, || reply.redacted());
            understand_reply(reply, "message")
        })
    }

    /// Route 2: the transcript. Every 2xx means that n8n has it.
    pub(crate) fn file(
        &self,
        question: &Question,
        within: Duration,
        tap: &Tap,
    ) -> Result<(), Failure> {
        tap.show(Exhibit::Filing, || question.redacted());
        self.ask(question, within, |reply| {
            tap.show(Exhibit::Taken, || reply.redacted());
            n8n_refusal(reply).map_or(Ok(()), Err)
        })
    }

    /// A preflight request of CORS: n8n answers it without running the workflow. It keeps a
    /// connection ready for the next question.
    pub(crate) fn greet(&self, within: Duration) -> Result<(), Failure> {
        let Some(url) = &self.config.n8n_webhook_url else { return Ok(()) };
        let headers = [("Origin", self.config.public_url.as_str())];
        let ask = Ask { method: "OPTIONS", url, headers: &headers, within, ..Ask::default() };
        let answered = self.http.ask(Party::N8n, &ask).map(drop);
        standing::after_look(Party::N8n, &answered);
        answered
    }

    /// What `understand` makes of n8n's answer.
    pub(crate) fn ask<T>(
        &self,
        question: &Question,
        within: Duration,
        understand: impl Fn(&N8nReply) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let began = Instant::now();
        let posted = self.post(question, within);
        let took = began.elapsed();
        let (outcome, answer) = match posted {
            Err(failure) => (if took >= within { "late" } else { "failed" }, Err(failure)),
            Ok(reply) => match understand(&reply) {
                Ok(answer) => ("answered", Ok(answer)),
                Err(why) if (200..300).contains(&reply.status) => ("nonsense", Err(why)),
                Err(why) => ("refused", Err(why)),
            },
        };
        standing::after_use(Party::N8n, &answer);
        metrics::N8N_REQUESTS.of(&[question.route, outcome]).add();
        metrics::N8N_TIME.of(&[question.route]).observe(took);
        answer
    }

    fn post(&self, question: &Question, within: Duration) -> Result<N8nReply, Failure> {
        let Some(url) = &self.config.n8n_webhook_url else {
            return Err(Failure::new(Party::N8n, "N8N_WEBHOOK_URL is not set").certainly_not_done());
        };
        let body = question.body().to_string();
        let mut headers =
            vec![("Content-Type", "application/json"), ("Idempotency-Key", &question.key)];
        let signature = self.config.n8n_hmac_secret.as_ref().map(|secret| {
            let key = hmac::Key::new(hmac::HMAC_SHA256, secret.reveal().as_bytes());
            format!("sha256={}", HEXLOWER.encode(hmac::sign(&key, body.as_bytes()).as_ref()))
        });
        headers.extend(signature.as_deref().map(|value| ("X-Callbridge-Signature", value)));
        let login = self.config.n8n_auth_header.as_ref();
        headers.extend(login.map(|(name, value)| (name.as_str(), value.reveal())));
        let answered = self.http.ask(
            Party::N8n,
            &Ask {
                method: "POST",
                url,
                headers: &headers,
                body: Some(&body),
                within,
                answer_bytes_max: REPLY_BYTES_MAX,
                // n8n has the transcript, whatever else it says.
                status_decides: question.route == "2",
            },
        )?;
        let status = answered.status;
        // An answer that is used is taken as it is; one that is refused will be quoted.
        let is_used = (200..300).contains(&status);
        let hide = |body| if is_used { body } else { self.config.hide_secrets(body) };
        Ok(N8nReply { status, body: hide(answered.body) })
    }
}

impl<'a> Ring<'a> {
    pub(crate) fn question(&self) -> Question<'a> {
        let Ring { sid, number, to, direction, stir_verstat } = *self;
        let mut report = Map::from_iter([
            ("to".to_owned(), json!(to)),
            ("direction".to_owned(), json!(direction)),
        ]);
        if !stir_verstat.is_empty() {
            report.insert("stirVerstat".to_owned(), json!(stir_verstat));
        }
        Question { sid, number, route: "1", data: "empty", key: format!("{sid}-1"), report }
    }
}

impl Question<'_> {
    /// As the page shows it: the address of n8n is a secret.
    fn redacted(&self) -> String {
        format!("POST N8N_WEBHOOK_URL\nIdempotency-Key: {}\n\n{}", self.key, self.body())
    }

    fn body(&self) -> Value {
        let mut body = json!({
            "route": self.route,
            "number": self.number,
            "data": self.data,
            "callSid": self.sid,
        });
        for (name, value) in &self.report {
            body[name] = value.clone();
        }
        body
    }
}
