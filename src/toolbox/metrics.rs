//! What is counted: every metric that `/metrics` shows, with its name, help, kind and labels, once.
//!
//! Whoever has something to count says so where it happens, to the whole process at once:
//! `CALLS.of(&["CallerLeft"]).add()`, `N8N_TIME.of(&["2"]).observe(took)`, or, for the commonest,
//! `refused("busy")`. What stands in the table's labels is shown from the first look on, at zero,
//! because Prometheus sees no increase in a series that appears with its first event. Values
//! that come from the agent's files are added by whoever knows these (`owner::metrics`).
//!
//! A label's value never comes from outside, so nobody can make the list long. Nothing here waits
//! for anything but its own short lock, and a frame of sound does not even look its series up.

mod series;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Instant;

pub(crate) use series::{Counter, Family, Gauge, Histogram};

use crate::toolbox::metrics::series::Exposition;

pub(crate) static CALLS: Family<Counter> = Family::counters(
    "callbridge_calls_total",
    "Calls that have ended, by how they ended.",
    &[("ended_by", &ENDS)],
);

pub(crate) static CALLS_IN_PROGRESS: Family<Gauge> =
    Family::gauges("callbridge_calls_in_progress", "Lines in use.", &[]);

pub(crate) static CALLS_MAX: Family<Gauge> =
    Family::gauges("callbridge_calls_max", "The lines there are, MAX_CALLS.", &[]);

static REFUSALS: Family<Counter> = Family::counters(
    "callbridge_refusals_total",
    "Connections, requests and calls turned away.",
    &[("reason", &REASONS)],
);

pub(crate) static ANSWER_TIME: Family<Histogram> =
    Family::waits("callbridge_answer_seconds", "From the ring to our answer.", &[]);

pub(crate) static DEAD_AIR: Family<Histogram> = Family::waits(
    "callbridge_dead_air_seconds",
    "From the first stream to the agent's first sound.",
    &[],
);

static RELAY_DELAY: Family<Histogram> = Family::frames(
    "callbridge_relay_delay_seconds",
    "From reading a message with sound to its being sent.",
    &[("direction", &["to_agent", "to_caller"])],
);

static FRAMES_DROPPED: Family<Counter> = Family::counters(
    "callbridge_frames_dropped_total",
    "Messages with sound that reached nobody.",
    &[("direction", &["to_agent", "to_caller"])],
);

pub(crate) static BROKEN_LINES: Family<Counter> = Family::counters(
    "callbridge_broken_lines_total",
    "Lines that broke in a call.",
    &[("leg", &["agent", "caller"])],
);

pub(crate) static RESUMES: Family<Counter> = Family::counters(
    "callbridge_resumes_total",
    "Calls that went on after a break.",
    &[("after", &["agent_line", "stream", "process", "transfer"])],
);

pub(crate) static TOOLS: Family<Counter> = Family::counters(
    "callbridge_tool_invocations_total",
    "Tools that the agent has asked for.",
    &[("tool", &["unknown"]), ("outcome", &["no such tool"])],
);

pub(crate) static TOOL_TIME: Family<Histogram> = Family::waits(
    "callbridge_tool_seconds",
    "Time until the agent had a tool's result.",
    &[("tool", &[])],
);

pub(crate) static N8N_REQUESTS: Family<Counter> = Family::counters(
    "callbridge_n8n_requests_total",
    "Requests to n8n.",
    &[("route", &["1", "2"]), ("outcome", &N8N_OUTCOMES)],
);

pub(crate) static N8N_TIME: Family<Histogram> =
    Family::waits("callbridge_n8n_seconds", "Time that n8n took.", &[("route", &["1", "2"])]);

pub(crate) static ULTRAVOX_CREATES: Family<Counter> = Family::counters(
    "callbridge_ultravox_creates_total",
    "Requests to create an agent's call.",
    &[("outcome", &["created", "busy", "refused", "late", "failed"])],
);

pub(crate) static ULTRAVOX_TIME: Family<Histogram> = Family::waits(
    "callbridge_ultravox_create_seconds",
    "Time that creating an agent's call took.",
    &[],
);

pub(crate) static OUTBOX_TRANSCRIPTS: Family<Gauge> =
    Family::gauges("callbridge_outbox_transcripts", "Transcripts that wait for n8n.", &[]);

pub(crate) static OUTBOX_OLDEST: Family<Gauge> =
    Family::gauges("callbridge_outbox_oldest_seconds", "Age of the oldest of them.", &[]);

pub(crate) static OUTBOX_GIVEN_UP: Family<Gauge> = Family::gauges(
    "callbridge_outbox_given_up",
    "Transcripts that n8n has not taken in time, see callbridge outbox.",
    &[],
);

pub(super) static LOG_LINES: Family<Counter> = Family::counters(
    "callbridge_log_lines_total",
    "Warnings and errors, logged or not.",
    &[("level", &["error", "warn"])],
);

pub(super) static LOG_LINES_DROPPED: Family<Counter> = Family::counters(
    "callbridge_log_lines_dropped_total",
    "Lines of the log that nobody read in time, or that could not be written.",
    &[],
);

pub(crate) static BUILD_INFO: Family<Gauge> = Family::gauges(
    "callbridge_build_info",
    "The version that runs.",
    &[("version", &[env!("CARGO_PKG_VERSION")])],
);

pub(crate) static START_TIME: Family<Gauge> =
    Family::gauges("process_start_time_seconds", "When the process began, since 1970.", &[]);

/// How calls end, in the words of the journal.
const ENDS: [&str; 13] = [
    "NoAgent",
    "NeverStreamed",
    "CallerLeft",
    "CallerLost",
    "AgentHungUp",
    "AgentLeft",
    "AgentLost",
    "TooLong",
    "Transferred",
    "Machine",
    "Refused",
    "ShuttingDown",
    "ProcessDied",
];

/// Why connections, requests and calls are turned away.
const REASONS: [&str; 26] = [
    "too_many_connections",
    "idle_connection",
    "slow_head",
    "long_head",
    "long_body",
    "no_body",
    "tls",
    "not_http",
    "method",
    "local_mode",
    "signature",
    "call_sid",
    "api_token",
    "other_site",
    "not_json",
    "not_allowed",
    "stopping",
    "busy",
    "too_often",
    "withheld",
    "many_at_once",
    "over",
    "upgrade",
    "no_start",
    "media_format",
    "stream_token",
];

/// What becomes of a request to n8n. Routes beside 1 and 2 come from the agent's tools.
pub(crate) const N8N_OUTCOMES: [&str; 5] = ["answered", "nonsense", "refused", "late", "failed"];

/// In the order in which they are shown.
static ALL: [&dyn Exposition; 23] = [
    &CALLS,
    &CALLS_IN_PROGRESS,
    &CALLS_MAX,
    &REFUSALS,
    &ANSWER_TIME,
    &DEAD_AIR,
    &RELAY_DELAY,
    &FRAMES_DROPPED,
    &BROKEN_LINES,
    &RESUMES,
    &TOOLS,
    &TOOL_TIME,
    &N8N_REQUESTS,
    &N8N_TIME,
    &ULTRAVOX_CREATES,
    &ULTRAVOX_TIME,
    &OUTBOX_TRANSCRIPTS,
    &OUTBOX_OLDEST,
    &OUTBOX_GIVEN_UP,
    &LOG_LINES,
    &LOG_LINES_DROPPED,
    &BUILD_INFO,
    &START_TIME,
];

/// All that is counted, in Prometheus's text format.
pub(crate) fn exposition() -> String {
    let mut page = String::new();
    for family in ALL {
        family.expose(&mut page);
    }
    page
}

pub(crate) fn refused(reason: &str) {
    REFUSALS.of(&[reason]).add();
}

/// One direction of a call, so that a frame costs no look-up.
pub(crate) struct Relayed {
    delay: Arc<Histogram>,
    dropped: Arc<Counter>,
}

impl Relayed {
    pub(crate) fn of(direction: &str) -> Relayed {
        Relayed { delay: RELAY_DELAY.of(&[direction]), dropped: FRAMES_DROPPED.of(&[direction]) }
    }

    pub(crate) fn note(&self, passed_on: bool, arrived: Instant) {
        if passed_on {
            self.delay.observe(arrived.elapsed());
        } else {
            self.dropped.add();
        }
    }
}
