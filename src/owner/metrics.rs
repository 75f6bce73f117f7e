//! `GET /metrics`: what the operator's Prometheus reads.
//!
//! The table of all metrics, and how they are written down, is `toolbox::metrics`. Here is what it
//! cannot know by itself: how full the lines and the outbox are in this moment, and which tools
//! and routes the agent's files have. These are at zero from the first look on, as everything is.

use std::collections::BTreeSet;

use crate::Bridge;
use crate::door::reply::Reply;
use crate::records::outbox::Outbox;
use crate::setup::agent::{Agent, ToolAction};
use crate::toolbox::metrics::{
    BUILD_INFO, CALLS_IN_PROGRESS, CALLS_MAX, N8N_OUTCOMES, N8N_REQUESTS, N8N_TIME,
    OUTBOX_GIVEN_UP, OUTBOX_OLDEST, OUTBOX_TRANSCRIPTS, START_TIME, TOOL_TIME, TOOLS, exposition,
};

/// `GET /metrics`.
pub(crate) fn metrics(bridge: &'static Bridge, _: &tiny_http::Request) -> Reply {
    begin(&bridge.agent.get());
    CALLS_IN_PROGRESS.of(&[]).set(bridge.calls.all().len());
    CALLS_MAX.of(&[]).set(bridge.config.max_calls.get());
    look_at(&bridge.outbox);
    BUILD_INFO.of(&[env!("CARGO_PKG_VERSION")]).set(1);
    let began = bridge.began.as_millisecond();
    START_TIME.of(&[]).set(format_args!("{}.{:03}", began / 1_000, began % 1_000));
    Reply::new(200, "text/plain; version=0.0.4; charset=utf-8", exposition())
}

/// The series of the agent's own tools and routes.
fn begin(agent: &Agent) {
    let mut routes = BTreeSet::new();
    for (name, tool) in &agent.tools {
        let outcomes: &[&str] = match &tool.action {
            // Ultravox does not tell us.
            ToolAction::Ultravox { .. } => continue,
            ToolAction::N8n { route, .. } => {
                routes.insert(route);
                &["done", "answered from memory", "failed", "uncertain", "refused"]
            }
            ToolAction::EnterStage { .. }
            | ToolAction::Reply(_)
            | ToolAction::HangUp(_)
            | ToolAction::Transfer(_) => &["done"],
        };
        TOOL_TIME.of(&[name]);
        for outcome in outcomes.iter().chain(&["incomplete", "no such tool"]) {
            TOOLS.of(&[name, outcome]);
        }
    }
    for route in routes {
        N8N_TIME.of(&[route]);
        for outcome in N8N_OUTCOMES {
            N8N_REQUESTS.of(&[route, outcome]);
        }
    }
}

fn look_at(outbox: &Outbox) {
    OUTBOX_TRANSCRIPTS.of(&[]).set(outbox.waiting());
    OUTBOX_OLDEST.of(&[]).set(outbox.oldest().as_secs_f64());
    OUTBOX_GIVEN_UP.of(&[]).set(outbox.given_up());
}
