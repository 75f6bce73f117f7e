//! What is counted, and how.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::records::ended_by::EndedBy;
use crate::setup::agent::{Agent, ToolAction};
use crate::toolbox::threads::lock;

/// All that is counted since the process began. What it means to an operator stands in the README.
pub(crate) struct Metrics {
    pub(crate) calls: Family<Counter>,
    pub(crate) refusals: Family<Counter>,
    pub(crate) answer_time: Family<Histogram>,
    pub(crate) dead_air: Family<Histogram>,
    pub(crate) relay_delay: Family<Histogram>,
    pub(crate) frames_dropped: Family<Counter>,
    pub(crate) broken_lines: Family<Counter>,
    pub(crate) resumes: Family<Counter>,
    pub(crate) tools: Family<Counter>,
    pub(crate) tool_time: Family<Histogram>,
    pub(crate) n8n_requests: Family<Counter>,
    pub(crate) n8n_time: Family<Histogram>,
    pub(crate) ultravox_creates: Family<Counter>,
    pub(crate) ultravox_time: Family<Histogram>,
}

/// Why connections, requests and calls are turned away.
pub(crate) const REFUSALS: [&str; 22] = [
    "too_many_connections",
    "idle_connection",
    "slow_head",
    "long_head",
    "long_body",
    "no_body",
    "tls",
    "not_http",
    "method",
    "signature",
    "call_sid",
    "api_token",
    "other_site",
    "not_json",
    "not_allowed",
    "stopping",
    "busy",
    "too_often",
    "upgrade",
    "no_start",
    "media_format",
    "stream_token",
];

impl Metrics {
    pub(crate) fn new(agent: &Agent) -> Metrics {
        let metrics = Metrics {
            calls: Family::new("callbridge_calls_total", &["ended_by"], Counter::new),
            refusals: Family::new("callbridge_refusals_total", &["reason"], Counter::new),
            answer_time: Family::new("callbridge_answer_seconds", &[], Histogram::of_waits),
            dead_air: Family::new("callbridge_dead_air_seconds", &[], Histogram::of_waits),
            relay_delay: Family::new(
                "callbridge_relay_delay_seconds",
                &["direction"],
                Histogram::of_frames,
            ),
            frames_dropped: Family::new(
                "callbridge_frames_dropped_total",
                &["direction"],
                Counter::new,
            ),
            broken_lines: Family::new("callbridge_broken_lines_total", &["leg"], Counter::new),
            resumes: Family::new("callbridge_resumes_total", &["after"], Counter::new),
            tools: Family::new(
                "callbridge_tool_invocations_total",
                &["tool", "outcome"],
                Counter::new,
            ),
            tool_time: Family::new("callbridge_tool_seconds", &["tool"], Histogram::of_waits),
            n8n_requests: Family::new(
                "callbridge_n8n_requests_total",
                &["route", "outcome"],
                Counter::new,
            ),
            n8n_time: Family::new("callbridge_n8n_seconds", &["route"], Histogram::of_waits),
            ultravox_creates: Family::new(
                "callbridge_ultravox_creates_total",
                &["outcome"],
                Counter::new,
            ),
            ultravox_time: Family::new(
                "callbridge_ultravox_create_seconds",
                &[],
                Histogram::of_waits,
            ),
        };
        metrics.begin(agent);
        metrics
    }

    /// Every series is there from the start, at zero: Prometheus sees no increase in one that
    /// appears with its first event.
    pub(crate) fn begin(&self, agent: &Agent) {
        self.calls.begin(&EndedBy::ALL.map(|how| how.to_string()));
        self.refusals.begin(&REFUSALS);
        self.frames_dropped.begin(&["to_agent", "to_caller"]);
        self.relay_delay.begin(&["to_agent", "to_caller"]);
        self.broken_lines.begin(&["agent", "caller"]);
        self.resumes.begin(&["agent_line", "stream", "process", "transfer"]);
        self.ultravox_creates.begin(&["created", "busy", "refused", "late", "failed"]);
        for single in [&self.answer_time, &self.dead_air, &self.ultravox_time] {
            single.of(&[]);
        }
        let mut routes = BTreeSet::from(["1", "2"]);
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
            self.tool_time.of(&[name]);
            for outcome in outcomes.iter().chain(&["incomplete", "no such tool"]) {
                self.tools.of(&[name, outcome]);
            }
        }
        self.tools.of(&["unknown", "no such tool"]);
        for route in routes {
            self.n8n_time.of(&[route]);
            for outcome in ["answered", "nonsense", "refused", "late", "failed"] {
                self.n8n_requests.of(&[route, outcome]);
            }
        }
    }

    pub(crate) fn refused(&self, reason: &str) {
        self.refusals.of(&[reason]).add();
    }

    pub(crate) fn relayed(&self, direction: &str) -> Relayed {
        Relayed {
            delay: self.relay_delay.of(&[direction]),
            dropped: self.frames_dropped.of(&[direction]),
        }
    }
}

/// One direction of a call, so that a frame costs no look-up.
pub(crate) struct Relayed {
    pub(crate) delay: Arc<Histogram>,
    pub(crate) dropped: Arc<Counter>,
}

impl Relayed {
    pub(crate) fn note(&self, passed_on: bool, arrived: Instant) {
        if passed_on {
            self.delay.observe(arrived.elapsed());
        } else {
            self.dropped.add();
        }
    }
}

/// Series that share a name and differ in the values of their labels. The values come from us or
/// from the agent's files, never from outside: nobody can make the list long.
pub(crate) struct Family<T> {
    pub(crate) name: &'static str,
    pub(crate) labels: &'static [&'static str],
    pub(crate) fresh: fn() -> T,
    pub(crate) series: Mutex<BTreeMap<Vec<String>, Arc<T>>>,
}

impl<T> Family<T> {
    pub(crate) fn new(
        name: &'static str,
        labels: &'static [&'static str],
        fresh: fn() -> T,
    ) -> Family<T> {
        Family { name, labels, fresh, series: Mutex::default() }
    }

    pub(crate) fn begin(&self, values: &[impl AsRef<str>]) {
        for value in values {
            self.of(&[value.as_ref()]);
        }
    }

    /// The series with these values of the labels.
    pub(crate) fn of(&self, values: &[&str]) -> Arc<T> {
        let values = values.iter().map(|value| (*value).to_owned()).collect();
        Arc::clone(lock(&self.series).entry(values).or_insert_with(|| Arc::new((self.fresh)())))
    }
}

/// Relaxed, here and below: each is a number for itself, and orders nothing.
pub(crate) struct Counter(pub(crate) AtomicU64);

impl Counter {
    pub(crate) const fn new() -> Counter {
        Counter(AtomicU64::new(0))
    }

    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How often something took how long.
pub(crate) struct Histogram {
    pub(crate) bounds_us: &'static [u64; BUCKETS],
    /// One for each bound, and one for what is beyond.
    pub(crate) counts: [Counter; BUCKETS + 1],
    pub(crate) sum_ns: AtomicU64,
}

pub(crate) const BUCKETS: usize = 12;
/// For a frame, which is to take as good as no time: 10 us to 100 ms.
pub(crate) const FRAME_BOUNDS_US: [u64; BUCKETS] =
    [10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 100_000];

/// For what a caller may have to wait for: 5 ms to 30 s.
pub(crate) const WAIT_BOUNDS_US: [u64; BUCKETS] = [
    5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_000_000, 5_000_000,
    10_000_000, 30_000_000,
];

impl Histogram {
    pub(crate) fn of_frames() -> Histogram {
        Histogram::new(&FRAME_BOUNDS_US)
    }

    pub(crate) fn of_waits() -> Histogram {
        Histogram::new(&WAIT_BOUNDS_US)
    }

    pub(crate) fn new(bounds_us: &'static [u64; BUCKETS]) -> Histogram {
        Histogram {
            bounds_us,
            counts: [const { Counter::new() }; BUCKETS + 1],
            sum_ns: AtomicU64::new(0),
        }
    }

    pub(crate) fn observe(&self, time: Duration) {
        // Five centuries fit.
        let ns = u64::try_from(time.as_nanos()).unwrap_or_default();
        let beyond = self.bounds_us.iter().filter(|bound| ns > **bound * 1_000).count();
        self.counts[beyond].add();
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
