//! The report: a table for people, JSON for programs, and the verdict.
//!
//! It says what makes the figures doubtful (a debug build, a busy machine, a floor that moved),
//! and the verdict is an error if the sound did not arrive as it was sent or something was left
//! behind.

use serde_json::{Value, json};

use crate::demo::bench::Plan;
use crate::demo::bench::churn::Churn;
use crate::demo::bench::figures::{Figures, Machine, Spread, WayFigures};
use crate::demo::bench::hall::Way;
use crate::demo::bench::page::{Page, counted, mib, percent};

/// The world counts as late from here on (99th percentile of its own senders).
const WORLD_LATE_US: f64 = 5_000.0;

/// All that was measured.
#[derive(Clone, Debug)]
pub struct Report {
    pub plan: Plan,
    pub bridge: Figures,
    /// Right before and right after; none with churn.
    pub floors: Vec<Figures>,
    pub churn: Option<Churn>,
}

impl Report {
    /// For people.
    pub fn text(&self) -> String {
        let mut page = Page::default();
        let Report { plan, bridge, .. } = self;
        let tls = if plan.tls { "TLS to the agent" } else { "no TLS" };
        page.line(&format!(
            "\ncallbridge demo: {} at once for {} s, {tls}, {} cores.",
            counted(plan.calls, "call"),
            plan.seconds,
            bridge.machine.cores
        ));
        self.sound(&mut page);
        self.cost(&mut page);
        self.waits(&mut page);
        if let Some(churn) = &self.churn {
            churn.text(&mut page, bridge);
        }
        let machine = &bridge.machine;
        page.line(&format!(
            "\n  The machine was {:.0} % busy: the bridge {:.0} %, this world {:.0} %, others \
             {:.0} %.\n  The world's own frames left {:.0} us late at the median, {:.0} us at the \
             99th percentile.",
            100.0 * machine.busy,
            100.0 * machine.child,
            100.0 * machine.world,
            100.0 * machine.others(),
            bridge.lateness.p50,
            bridge.lateness.p99,
        ));
        for remark in self.remarks() {
            page.line(&format!("  ! {remark}"));
        }
        page.text
    }

    fn sound(&self, page: &mut Page) {
        let [up, down] = &self.bridge.ways;
        page.head("sound", ["to agent", "to caller", ""]);
        for (name, figure) in [
            ("frames", (|way| way.sent) as fn(&WayFigures) -> u64),
            ("lost", |way| way.lost),
            ("damaged", |way| way.damaged),
            ("out of order", |way| way.out_of_order),
            ("timed on arrival", |way| way.delay.count),
            ("  late (over 20 ms)", |way| way.late),
        ] {
            page.row(name, [figure(up).to_string(), figure(down).to_string(), String::new()]);
        }
        for (name, figure) in QUANTILES {
            page.row(
                &format!("  delay {name}, us"),
                [up, down].map(|way| format!("{:.0}", figure(&way.delay))),
            );
        }
        if self.floors.is_empty() {
            return;
        }
        for (name, figure) in QUANTILES {
            let floor = |way: usize| self.floor_of(|floor| figure(&floor.ways[way].delay));
            page.row(
                &format!("the floor's {name}, us"),
                [0, 1].map(|way| format!("{:.0}", floor(way).unwrap_or_default())),
            );
        }
    }

    fn cost(&self, page: &mut Page) {
        let Figures { rest, standing, calls, .. } = &self.bridge;
        let per_call = |with: f64, without: f64| (with - without) / (*calls).max(1) as f64;
        page.head("cost", ["bridge", "floor", "ratio"]);
        let ours = self.cpu_ms();
        let floor = self.floor_of(Figures::cpu_ms);
        page.row(
            "CPU ms per call-second",
            [
                format!("{ours:.2}"),
                floor.map_or_else(String::new, |floor| format!("{floor:.2}")),
                floor.map_or_else(String::new, |floor| format!("{:.2} x", ours / floor)),
            ],
        );
        if let [before, after] = self.floors.as_slice() {
            let (before, after) = (before.cpu_ms(), after.cpu_ms());
            page.row(
                "  the floor before, after",
                [String::new(), format!("{before:.2}, {after:.2}")],
            );
        }
        page.row("calls a core can carry", [format!("{:.0}", 1_000.0 / ours)]);
        page.row("share spent in user code", [percent(self.bridge.user_share)]);
        page.row(
            "waiting for a core, us/frame",
            [
                format!("{:.0}", self.bridge.machine.queue_us),
                self.floor_of(|floor| floor.machine.queue_us)
                    .map_or_else(String::new, |floor| format!("{floor:.0}")),
            ],
        );
        page.row("memory at rest, MiB", [mib(rest.rss_kib)]);
        page.row("memory with all calls, MiB", [mib(standing.rss_kib)]);
        let memory = per_call(standing.rss_kib as f64, rest.rss_kib as f64);
        page.row("memory per call, KiB", [format!("{memory:.1}")]);
        let threads = per_call(standing.threads as f64, rest.threads as f64);
        page.row("threads per call", [format!("{threads:.2}")]);
        let descriptors = per_call(standing.descriptors as f64, rest.descriptors as f64);
        page.row("file descriptors per call", [format!("{descriptors:.2}")]);
    }

    fn waits(&self, page: &mut Page) {
        let bridge = &self.bridge;
        page.head("waits, ms", ["p50", "p99", "max"]);
        for (name, spread) in [
            ("webhook to answer *", &bridge.webhook),
            ("stream start to first sound *", &bridge.first_audio),
            ("barge-in to clear", &bridge.clear),
            ("process start to listening", &bridge.start),
        ] {
            page.row(
                name,
                [spread.p50, spread.p99, spread.max].map(|us| format!("{:.2}", us / 1_000.0)),
            );
        }
        page.line(&format!(
            "  * beyond what the stand-ins take; {} webhooks, {} clears, {} starts",
            bridge.webhook.count, bridge.clear.count, bridge.start.count
        ));
    }

    /// What makes the figures doubtful, in words.
    fn remarks(&self) -> Vec<String> {
        let mut remarks = Vec::new();
        let Machine { busy, world, .. } = self.bridge.machine;
        if cfg!(debug_assertions) {
            remarks.push("This is a debug build: times and CPU mean nothing.".to_owned());
        }
        let sent = self.bridge.call_seconds / (self.plan.calls as f64 * self.plan.seconds as f64);
        if sent < 0.98 && self.churn.is_none() {
            remarks.push(format!(
                "The pretend world is the limit: it sent only {:.0} % of the frames in time, with \
                 {:.0} % of the machine. Fewer calls, or a bigger machine.",
                100.0 * sent,
                100.0 * world
            ));
        } else if self.bridge.lateness.p99 > WORLD_LATE_US {
            remarks.push(
                "The pretend world was late itself, so its frames came in bunches: the delays are \
                 longer for it."
                    .to_owned(),
            );
        }
        if busy > 0.95 {
            remarks.push(
                "The machine had nothing left: the delays are waits for a free core.".to_owned(),
            );
        }
        if self.bridge.machine.others() > 0.1 {
            remarks.push(format!(
                "Others took {:.0} % of the machine meanwhile.",
                100.0 * self.bridge.machine.others()
            ));
        }
        if let [before, after] = self.floors.as_slice() {
            let (before, after) = (before.cpu_ms(), after.cpu_ms());
            if (before - after).abs() > 0.15 * before.max(after) {
                remarks.push(format!(
                    "The floor changed in the course of the run, from {before:.2} to {after:.2}: \
                     the ratio is no better than that."
                ));
            }
        }
        remarks.extend(self.bridge.troubles.iter().cloned());
        remarks
    }

    /// For programs. Times in microseconds where nothing else is said.
    pub fn json(&self) -> Value {
        let figures = &self.bridge;
        json!({
            "calls": self.plan.calls,
            "seconds": self.plan.seconds,
            "tls": self.plan.tls,
            "debugBuild": cfg!(debug_assertions),
            "bridge": figures.json(),
            "floorBefore": self.floors.first().map(Figures::json),
            "floorAfter": self.floors.get(1).map(Figures::json),
            "ratio": {
                "cpu": self.floor_of(Figures::cpu_ms).map(|floor| self.cpu_ms() / floor),
                "delayUp": self.delay_ratio(Way::Up),
                "delayDown": self.delay_ratio(Way::Down),
            },
            "churn": self.churn.as_ref().map(Churn::json),
            "remarks": self.remarks(),
            "verdict": self.verdict().err(),
        })
    }

    fn delay_ratio(&self, way: Way) -> Option<f64> {
        let p50 = |figures: &Figures| figures.ways[way as usize].delay.p50;
        self.floor_of(p50).map(|floor| p50(&self.bridge) / floor)
    }

    /// An error if the sound did not arrive as it was sent, or something was left behind.
    pub fn verdict(&self) -> Result<(), String> {
        let mut wrong = Vec::new();
        for (way, name) in self.bridge.ways.iter().zip(["to the agent", "to the caller"]) {
            let WayFigures { lost, damaged, out_of_order, .. } = way;
            if lost + damaged + out_of_order > 0 {
                wrong.push(format!(
                    "{name}: {lost} frames lost, {damaged} damaged, {out_of_order} out of order"
                ));
            }
        }
        let calls = self.churn.as_ref().map_or(self.plan.calls, |churn| churn.calls);
        if self.bridge.filed < calls {
            wrong.push(format!("n8n got {} transcripts of {calls}", self.bridge.filed));
        }
        if let Some(churn) = &self.churn {
            let (threads, descriptors) = (churn.threads_left(), churn.descriptors_left());
            if threads != 0 || descriptors != 0 {
                wrong.push(format!(
                    "left behind: {threads} threads, {descriptors} file descriptors"
                ));
            }
        }
        wrong.extend(self.bridge.troubles.first().cloned());
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n")) }
    }

    /// The bridge's CPU time for a second of a call, in milliseconds.
    fn cpu_ms(&self) -> f64 {
        self.bridge.cpu_ms()
    }

    fn floor_of(&self, figure: impl Fn(&Figures) -> f64) -> Option<f64> {
        let count = self.floors.len();
        (count > 0).then(|| self.floors.iter().map(figure).sum::<f64>() / count as f64)
    }
}

type Quantile = fn(&Spread) -> f64;

const QUANTILES: [(&str, Quantile); 4] = [
    ("p50", |spread| spread.p50),
    ("p99", |spread| spread.p99),
    ("p99.9", |spread| spread.p999),
    ("max", |spread| spread.max),
];
