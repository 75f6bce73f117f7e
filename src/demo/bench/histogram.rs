//! Many durations, in little room: counted in steps of at most 0.8 %, by many threads at once.
//!
//! A thin dress for the `histogram` crate: durations go in as nanoseconds, a [`Spread`] in
//! microseconds comes out. The longest is kept exactly, and no quantile is said to be longer.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use histogram::{AtomicHistogram, Config};

use crate::demo::backstage::moot;
use crate::demo::bench::figures::Spread;

/// 128 steps between one power of two and the next, for any number of nanoseconds.
const CONFIG: Config = match Config::new(7, 64) {
    Ok(config) => config,
    Err(_) => panic!("not a histogram"),
};

/// Counts durations. Many threads note at once.
pub(super) struct Histogram {
    steps: AtomicHistogram,
    max_ns: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { steps: AtomicHistogram::with_config(&CONFIG), max_ns: AtomicU64::new(0) }
    }
}

impl Histogram {
    pub(super) fn note(&self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        // No number is out of range.
        moot(self.steps.increment(ns));
        self.max_ns.fetch_max(ns, Relaxed);
    }

    pub(super) fn spread(&self) -> Spread {
        let steps = self.steps.load();
        let max = self.max_ns.load(Relaxed);
        let quantile = |share: f64| match steps.quantile_bucket(share) {
            Ok(Some(step)) => step.start().midpoint(step.end()).min(max) as f64 / 1_000.0,
            // Nothing was noted.
            Ok(None) | Err(_) => 0.0,
        };
        Spread {
            count: steps.as_slice().iter().sum(),
            p50: quantile(0.5),
            p99: quantile(0.99),
            p999: quantile(0.999),
            max: max as f64 / 1_000.0,
        }
    }
}
