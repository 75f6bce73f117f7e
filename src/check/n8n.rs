//! n8n: the question of step 2, exactly as a call would ask it, about a number that nobody has.
//!
//! The answer is read by the same code as in a call, so what is right here is right there. One
//! question is all that n8n sees; transcripts and tools are not tried, because the workflow would
//! act on them.

use std::time::{Duration, Instant};

use super::STEP_WITHIN;
use super::http::NoAnswer;
use super::report::{Finding, Topic};
use super::setup::Setup;
use crate::LOOKUP_WITHIN;
use crate::parties::n8n::Ring;
use crate::parties::n8n::decision::Decision;
use crate::records::event::Direction;
use crate::records::tap::Tap;
use crate::toolbox::failure::Failure;
use crate::toolbox::random::random_hex;
use crate::toolbox::text::cut;

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
    let ring = Ring {
        sid: &sid,
        number: NOBODYS_NUMBER,
        to: setup.bridge.config.twilio_phone_number.as_deref().unwrap_or_default(),
        direction: Direction::In,
        stir_verstat: "",
    };
    let began = Instant::now();
    let agent = setup.bridge.agent.get();
    match setup.bridge.n8n.ring(&ring, &agent, STEP_WITHIN, &Tap::closed()) {
        Ok(decision) => judge(&decision, began.elapsed()),
        Err(failure) => no_greeting(failure),
    }
}

/// No greeting: n8n leaves it to the agent, as the workflow that comes along does for strangers.
fn judge(decision: &Decision, took: Duration) -> Finding {
    let (took, limit) = (took.as_millis(), LOOKUP_WITHIN.as_millis());
    if !decision.oddities.is_empty() {
        let what = format!("answers what counts for nothing: {}", decision.oddities.join("; "));
        return WEBHOOK.warning(what, "correct the answer to route 1 in the workflow");
    }
    if took > limit {
        let what = format!(
            "answered after {took} ms: a caller waits {limit} ms and then hears the default \
             greeting"
        );
        let cure = "make route 1 of the workflow faster (the first call after n8n starts is slow)";
        return WEBHOOK.warning(what, cure);
    }
    let greeting = decision.first_message.as_ref().map(|greeting| cut(greeting, 40));
    WEBHOOK.ok(match (greeting, decision) {
        (_, Decision { refuse: true, .. }) => format!("refuses the call, after {took} ms"),
        (_, Decision { transfer: true, .. }) => format!("wants a person, after {took} ms"),
        (Some(greeting), _) => format!("greets with \"{greeting}\", after {took} ms"),
        (None, _) => format!("answers after {took} ms, and leaves the greeting to the agent"),
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
