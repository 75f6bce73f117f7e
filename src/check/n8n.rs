//! n8n: the question of step 2, exactly as a call would ask it, about a number that nobody has.
//!
//! The answer is read by the same code as in a call, so what is right here is right there. One
//! question is all that n8n sees; transcripts and tools are not tried, because the workflow would
//! act on them.

use std::time::{Duration, Instant};

use serde_json::Map;

use super::STEP_WITHIN;
use super::http::NoAnswer;
use super::report::{Finding, Topic};
use super::setup::Setup;
use crate::LOOKUP_WITHIN;
use crate::parties::n8n::reply::read_greeting;
use crate::parties::n8n::{GREETING_CHARS_MAX, Question};
use crate::toolbox::failure::Failure;
use crate::toolbox::random::random_hex;

/// Nobody has this number (North American numbers 555-0100 to 555-0199 are set aside for fiction).
const NOBODYS_NUMBER: &str = "+12025550123";

const WEBHOOK: Topic = Topic::new("n8n", "webhook");

pub(super) fn look(setup: &'static Setup) -> Vec<Finding> {
    vec![ask(setup)]
}

fn ask(setup: &Setup) -> Finding {
    let Some(url) = &setup.bridge.config.n8n_webhook_url else {
        if setup.is_malformed("N8N_WEBHOOK_URL") {
            let what = "not asked: N8N_WEBHOOK_URL is malformed";
            return WEBHOOK.skipped(what, "fix the setting first");
        }
        let what =
            "N8N_WEBHOOK_URL is not set: default greeting, no bookings, transcripts stay on disk";
        return WEBHOOK.skipped(what, "set it if you have a workflow");
    };
    if url.contains("/webhook-test/") {
        let what = "N8N_WEBHOOK_URL is the test URL, which answers only once, while you listen";
        let cure = "activate the workflow, and put /webhook/ in place of /webhook-test/ in \
                    N8N_WEBHOOK_URL";
        return WEBHOOK.wrong(what, cure);
    }
    let sid = format!("CAcheck{}", random_hex());
    let key = format!("{sid}-1");
    let question = Question {
        sid: &sid,
        number: NOBODYS_NUMBER,
        route: "1",
        data: "empty",
        key,
        report: Map::new(),
    };
    let began = Instant::now();
    let reply = setup.bridge.n8n.ask(&question, STEP_WITHIN, read_greeting);
    match reply {
        Ok(greeting) => judge_greeting(greeting.as_deref(), began.elapsed()),
        Err(failure) => no_greeting(failure),
    }
}

/// No greeting: n8n leaves it to the agent, as the workflow that comes along does for strangers.
fn judge_greeting(greeting: Option<&str>, took: Duration) -> Finding {
    let (took, limit) = (took.as_millis(), LOOKUP_WITHIN.as_millis());
    let length = greeting.map_or(0, |greeting| greeting.chars().count());
    if length > GREETING_CHARS_MAX {
        let what =
            format!("its greeting has {length} characters: too long, so the default is used");
        let cure = format!(
            "make firstMessage shorter in the workflow: {GREETING_CHARS_MAX} characters at most"
        );
        return WEBHOOK.warning(what, cure);
    }
    if took > limit {
        let what = format!(
            "answered after {took} ms: a caller waits {limit} ms and then hears the default \
             greeting"
        );
        let cure = "make route 1 of the workflow faster (the first call after n8n starts is slow)";
        return WEBHOOK.warning(what, cure);
    }
    WEBHOOK.ok(match greeting {
        Some(greeting) => {
            let begins: String = greeting.chars().take(40).collect();
            let dots = if length > 40 { "…" } else { "" };
            format!("greets with \"{begins}{dots}\", after {took} ms")
        }
        None => format!("answers after {took} ms, and leaves the greeting to the agent"),
    })
}

fn no_greeting(failure: Failure) -> Finding {
    let source = failure.source.as_deref();
    if let Some(why) = source.and_then(|source| source.downcast_ref::<ureq::Error>()) {
        let why = NoAnswer::of(why);
        let cure = why.cure().unwrap_or("check N8N_WEBHOOK_URL, and that n8n is running");
        return WEBHOOK.wrong(why.to_string(), cure);
    }
    let cure = failure.advice.unwrap_or("is n8n overloaded? See its Executions");
    WEBHOOK.wrong(failure.what, cure)
}
