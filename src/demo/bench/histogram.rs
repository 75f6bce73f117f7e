//! Many durations, in little room: counted in steps of 1.6 %, by many threads at once.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crate::demo::bench::figures::Spread;

/// Counts durations in steps of 1.6 %. Many threads note at once.
pub(super) struct Histogram {
    steps: Vec<AtomicU64>,
    max_ns: AtomicU64,
}

/// Steps between one power of two and the next.
const FINENESS: u64 = 64;

impl Default for Histogram {
    fn default() -> Histogram {
        let steps = (64 - 6 + 1) * FINENESS;
        Histogram {
            steps: (0..steps).map(|_| AtomicU64::new(0)).collect(),
            max_ns: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    pub(super) fn note(&self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        if let Some(step) = self.steps.get(step_of(ns)) {
            step.fetch_add(1, Relaxed);
        }
        self.max_ns.fetch_max(ns, Relaxed);
    }

    pub(super) fn spread(&self) -> Spread {
        let counts: Vec<u64> = self.steps.iter().map(|step| step.load(Relaxed)).collect();
        let count: u64 = counts.iter().sum();
        let max = self.max_ns.load(Relaxed);
        let quantile = |share: f64| {
            let wanted = (count as f64 * share).ceil() as u64;
            let mut seen = 0;
            let step = counts.iter().position(|count| {
                seen += count;
                seen >= wanted.max(1)
            });
            step.map_or(0.0, |step| middle_of(step).min(max) as f64 / 1_000.0)
        };
        Spread {
            count,
            p50: quantile(0.5),
            p99: quantile(0.99),
            p999: quantile(0.999),
            max: max as f64 / 1_000.0,
        }
    }
}

fn step_of(ns: u64) -> usize {
    let doublings = u64::from((ns / FINENESS).checked_ilog2().map_or(0, |log| log + 1));
    let width = doublings.saturating_sub(1);
    (doublings * FINENESS + (ns >> width) % FINENESS) as usize
}

fn middle_of(step: usize) -> u64 {
    let (doublings, place) = (step as u64 / FINENESS, step as u64 % FINENESS);
    match doublings.checked_sub(1) {
        None => place,
        Some(width) => ((FINENESS + place) << width) + (1 << width) / 2,
    }
}
