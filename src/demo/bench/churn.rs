//! Churn: calls end and others begin all the time. What is left behind?
//!
//! Threads and descriptors must come back to what they were; memory is a line through samples,
//! with the error of its slope.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::demo::backstage::lock;
use crate::demo::bench::Plan;
use crate::demo::bench::call::Call;
use crate::demo::bench::figures::Figures;
use crate::demo::bench::page::{Page, mib};
use crate::demo::bench::stage::{DIALLERS, Stage, WARM_UP, sleep_until, wait_until};
use crate::demo::bench::vitals::Vitals;

/// For threads and descriptors to come back. `tiny_http` lets a thread sleep for 5 s.
const SETTLE_WITHIN: Duration = Duration::from_secs(30);

/// What was left of all the calls that had come and gone.
#[derive(Clone, Debug)]
pub struct Churn {
    pub calls: usize,
    pub call_lasts: Duration,
    /// Memory over the time at full house, KiB a minute by least squares, and its standard error.
    pub slope: f64,
    pub slope_error: f64,
    pub samples: usize,
    pub before: Vitals,
    pub after: Vitals,
    /// HTTP connections to n8n and Ultravox that the server keeps for its next call.
    pub kept: usize,
}

impl Churn {
    pub(super) fn text(&self, page: &mut Page, figures: &Figures) {
        page.head("churn", ["at rest", "after all", "left"]);
        let counts = [
            ("threads", self.before.threads, self.after.threads, self.threads_left()),
            (
                "file descriptors",
                self.before.descriptors,
                self.after.descriptors,
                self.descriptors_left(),
            ),
        ];
        for (name, before, after, left) in counts {
            page.row(name, [before.to_string(), after.to_string(), left.to_string()]);
        }
        let (before, after) = (mib(self.before.rss_kib), mib(self.after.rss_kib));
        page.row("memory, MiB", [before, after]);
        page.line(&format!(
            "  {} calls of about {:.0} s each, {} transcripts. {} connections are kept for the \
             next call.\n  Memory grew by {:.0} KiB a minute, give or take {:.0}, at {:.0} calls a \
             minute ({} samples).",
            self.calls,
            self.call_lasts.as_secs_f64(),
            figures.filed,
            self.kept,
            self.slope,
            2.0 * self.slope_error,
            60.0 * figures.calls as f64 / self.call_lasts.as_secs_f64(),
            self.samples,
        ));
    }

    pub(super) fn json(&self) -> Value {
        let vitals = |vitals: &Vitals| {
            json!({"rssKib": vitals.rss_kib, "threads": vitals.threads,
                "descriptors": vitals.descriptors})
        };
        json!({
            "calls": self.calls,
            "callSeconds": self.call_lasts.as_secs_f64(),
            "before": vitals(&self.before),
            "after": vitals(&self.after),
            "keptConnections": self.kept,
            "threadsLeft": self.threads_left(),
            "descriptorsLeft": self.descriptors_left(),
            "memoryKibPerMinute": self.slope,
            "memoryKibPerMinuteError": self.slope_error.is_finite().then_some(self.slope_error),
            "samples": self.samples,
        })
    }

    /// Descriptors that belong to nobody any more.
    pub(super) fn descriptors_left(&self) -> i64 {
        difference(self.after.descriptors, self.before.descriptors)
    }

    pub(super) fn threads_left(&self) -> i64 {
        difference(self.after.threads, self.before.threads)
    }
}

fn difference(after: usize, before: usize) -> i64 {
    i64::try_from(after).unwrap_or(i64::MAX) - i64::try_from(before).unwrap_or(i64::MAX)
}

pub(super) fn measure_churn(plan: &Plan) -> Result<(Figures, Churn), String> {
    let stage = Stage::bridge(plan)?;
    // At most twenty a second begin: the machine is to carry calls, not only to answer them.
    let call_lasts = Duration::from_millis(3_000.max(plan.calls as u64 * 1_000 / 20));
    let lines: Vec<Mutex<Option<Arc<Call>>>> =
        stage.dial_all()?.into_iter().map(|call| Mutex::new(Some(call))).collect();
    let dialled = AtomicU32::new(u32::try_from(lines.len()).unwrap_or(u32::MAX));
    let began = Instant::now();
    let until = began + WARM_UP + Duration::from_secs(plan.seconds);
    let due = |line: usize| began + call_lasts.mul_f64((line + 1) as f64 / lines.len() as f64);
    let agenda: BinaryHeap<_> = (0..lines.len()).map(|line| Reverse((due(line), line))).collect();
    let agenda = Mutex::new(agenda);

    let replace_calls = || -> Result<(), String> {
        loop {
            let next = lock(&agenda).pop();
            let Some(Reverse((due, line))) = next.filter(|Reverse((due, _))| *due < until) else {
                return Ok(());
            };
            sleep_until(due);
            let Some(place) = lines.get(line) else { return Ok(()) };
            let ended = lock(place).take();
            ended.map_or(Ok(()), |call| stage.hang_up(&call))?;
            let call = stage.dial(dialled.fetch_add(1, Relaxed))?;
            stage.hall.begin_talking(&call);
            *lock(place) = Some(call);
            lock(&agenda).push(Reverse((due + call_lasts, line)));
        }
    };
    let mut samples = Vec::new();
    let (mut figures, replaced) = thread::scope(|scope| {
        let diallers: Vec<_> = (0..DIALLERS).map(|_| scope.spawn(replace_calls)).collect();
        let standing: Vec<Arc<Call>> = Vec::new();
        let figures = stage.talk(&standing, Duration::from_secs(plan.seconds), || {
            while Instant::now() + Duration::from_secs(1) < until {
                thread::sleep(Duration::from_secs(1));
                // The first generation still fills caches and pools.
                if began.elapsed() > call_lasts
                    && let Ok(vitals) = stage.vitals()
                {
                    samples.push((began.elapsed().as_secs_f64() / 60.0, vitals.rss_kib as f64));
                }
            }
        });
        let ended = diallers.into_iter().map(|dialler| match dialler.join() {
            Ok(outcome) => outcome,
            Err(_) => Err("a dialler has panicked".to_owned()),
        });
        (figures, ended.collect::<Result<Vec<()>, String>>())
    });
    replaced?;
    let standing = lines.iter().filter_map(|line| lock(line).take()).collect();
    stage.hang_up_all(standing)?;
    let calls = dialled.load(Relaxed) as usize;
    stage.settle_parcels(calls);
    if let Ok(figures) = &mut figures {
        figures.calls = plan.calls;
        stage.conclude(figures);
    }
    let (slope, slope_error) = least_squares(&samples);
    let mut churn = Churn {
        calls,
        call_lasts,
        slope,
        slope_error,
        samples: samples.len(),
        before: stage.rest,
        after: stage.rest,
        kept: 0,
    };
    wait_until(SETTLE_WITHIN, || {
        churn.kept = stage.hall.kept.load(Relaxed);
        churn.after = stage.vitals().unwrap_or(churn.after);
        churn.descriptors_left() == 0 && churn.threads_left() == 0
    });
    Ok((figures?, churn))
}

/// The slope of a line through these points, and its standard error.
fn least_squares(points: &[(f64, f64)]) -> (f64, f64) {
    let count = points.len() as f64;
    if points.len() < 3 {
        return (0.0, f64::INFINITY);
    }
    let mean_x = points.iter().map(|(x, _)| x).sum::<f64>() / count;
    let mean_y = points.iter().map(|(_, y)| y).sum::<f64>() / count;
    let spread: f64 = points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    let common: f64 = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    let slope = common / spread;
    let residue = |(x, y): &(f64, f64)| (y - mean_y - slope * (x - mean_x)).powi(2);
    let error = points.iter().map(residue).sum::<f64>() / (count - 2.0) / spread;
    (slope, error.sqrt())
}
