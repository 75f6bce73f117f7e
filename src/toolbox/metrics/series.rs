//! Counters, gauges and histograms, and how they are written down for Prometheus.
//!
//! A family is a metric's name with all its series, which differ in the values of their labels.
//! `metrics.rs` is the only one to make families; everybody else finds a series in one and counts.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::toolbox::threads::lock;

/// A metric by name, whatever its kind.
pub(crate) struct Family<T> {
    name: &'static str,
    help: &'static str,
    labels: Labels,
    fresh: fn() -> T,
    series: Mutex<BTreeMap<Vec<String>, Arc<T>>>,
}

/// Each with the values that it has from the start. None: the agent's files know them.
type Labels = &'static [(&'static str, &'static [&'static str])];

impl Family<Counter> {
    pub(super) const fn counters(
        name: &'static str,
        help: &'static str,
        labels: Labels,
    ) -> Family<Counter> {
        Family::new(name, help, labels, Counter::new)
    }
}

impl Family<Gauge> {
    pub(super) const fn gauges(
        name: &'static str,
        help: &'static str,
        labels: Labels,
    ) -> Family<Gauge> {
        Family::new(name, help, labels, Gauge::default)
    }
}

impl Family<Histogram> {
    /// For what a caller may have to wait for.
    pub(super) const fn waits(
        name: &'static str,
        help: &'static str,
        labels: Labels,
    ) -> Family<Histogram> {
        Family::new(name, help, labels, Histogram::of_waits)
    }

    /// For what happens to a frame of sound.
    pub(super) const fn frames(
        name: &'static str,
        help: &'static str,
        labels: Labels,
    ) -> Family<Histogram> {
        Family::new(name, help, labels, Histogram::of_frames)
    }
}

/// What `/metrics` shows of a family.
pub(super) trait Exposition: Sync {
    fn expose(&self, page: &mut String);
}

impl<T: Series> Exposition for Family<T> {
    fn expose(&self, page: &mut String) {
        self.begin();
        line(page, format_args!("# HELP {} {}", self.name, self.help));
        line(page, format_args!("# TYPE {} {}", self.name, T::KIND));
        for (values, series) in &*lock(&self.series) {
            let names = self.labels.iter().map(|(name, _)| *name);
            let labels: Vec<_> = names.zip(values.iter().map(String::as_str)).collect();
            series.expose(self.name, &labels, page);
        }
    }
}

impl<T> Family<T> {
    const fn new(
        name: &'static str,
        help: &'static str,
        labels: Labels,
        fresh: fn() -> T,
    ) -> Family<T> {
        Family { name, help, labels, fresh, series: Mutex::new(BTreeMap::new()) }
    }

    /// Every series that the table knows: each value of one label with each of the next.
    fn begin(&self) {
        let mut rows = vec![Vec::new()];
        for (_, values) in self.labels {
            rows = rows
                .iter()
                .flat_map(|row| values.iter().map(|value| [row.as_slice(), &[*value]].concat()))
                .collect();
        }
        for row in rows {
            self.of(&row);
        }
    }

    /// The series with these values of the labels, in their order.
    pub(crate) fn of(&self, values: &[&str]) -> Arc<T> {
        let values = values.iter().map(|value| (*value).to_owned()).collect();
        Arc::clone(lock(&self.series).entry(values).or_insert_with(|| Arc::new((self.fresh)())))
    }
}

/// A kind of series.
pub(super) trait Series: Send + Sync {
    const KIND: &'static str;

    fn expose(&self, name: &str, labels: &[(&str, &str)], page: &mut String);
}

/// Relaxed, here and below: each is a number for itself, and orders nothing.
pub(crate) struct Counter(AtomicU64);

impl Counter {
    const fn new() -> Counter {
        Counter(AtomicU64::new(0))
    }

    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Series for Counter {
    const KIND: &'static str = "counter";

    fn expose(&self, name: &str, labels: &[(&str, &str)], page: &mut String) {
        sample(page, name, labels, self.value());
    }
}

/// Something that is looked at when it is asked for, as it is written down.
#[derive(Default)]
pub(crate) struct Gauge(Mutex<String>);

impl Gauge {
    pub(crate) fn set(&self, value: impl Display) {
        *lock(&self.0) = value.to_string();
    }
}

impl Series for Gauge {
    const KIND: &'static str = "gauge";

    fn expose(&self, name: &str, labels: &[(&str, &str)], page: &mut String) {
        sample(page, name, labels, &*lock(&self.0));
    }
}

/// How often something took how long.
pub(crate) struct Histogram {
    bounds_us: &'static [u64; BUCKETS],
    /// One for each bound, and one for what is beyond.
    pub(super) counts: [Counter; BUCKETS + 1],
    pub(super) sum_ns: AtomicU64,
}

const BUCKETS: usize = 12;

/// For a frame, which is to take as good as no time: 10 us to 100 ms.
pub(super) const FRAME_BOUNDS_US: [u64; BUCKETS] =
    [10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 100_000];

/// For what a caller may have to wait for: 5 ms to 30 s.
pub(super) const WAIT_BOUNDS_US: [u64; BUCKETS] = [
    5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_000_000, 5_000_000,
    10_000_000, 30_000_000,
];

impl Histogram {
    pub(super) fn of_frames() -> Histogram {
        Histogram::new(&FRAME_BOUNDS_US)
    }

    fn of_waits() -> Histogram {
        Histogram::new(&WAIT_BOUNDS_US)
    }

    fn new(bounds_us: &'static [u64; BUCKETS]) -> Histogram {
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

impl Series for Histogram {
    const KIND: &'static str = "histogram";

    fn expose(&self, name: &str, labels: &[(&str, &str)], page: &mut String) {
        let seconds = |time: Duration| time.as_secs_f64().to_string();
        let bounds = self.bounds_us.iter().map(|&us| seconds(Duration::from_micros(us)));
        let bucket = format!("{name}_bucket");
        let mut so_far = 0;
        for (bound, counter) in bounds.chain(["+Inf".into()]).zip(&self.counts) {
            so_far += counter.value();
            sample(page, &bucket, &[labels, &[("le", &*bound)]].concat(), so_far);
        }
        let total = Duration::from_nanos(self.sum_ns.load(Ordering::Relaxed));
        sample(page, &format!("{name}_sum"), labels, seconds(total));
        sample(page, &format!("{name}_count"), labels, so_far);
    }
}

pub(super) fn sample(page: &mut String, name: &str, labels: &[(&str, &str)], value: impl Display) {
    let escape = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let labels = labels.iter().map(|(label, value)| format!("{label}=\"{}\"", escape(value)));
    let labels = labels.collect::<Vec<_>>().join(",");
    let labels = if labels.is_empty() { labels } else { format!("{{{labels}}}") };
    line(page, format_args!("{name}{labels} {value}"));
}

fn line(page: &mut String, text: impl Display) {
    if writeln!(page, "{text}").is_err() {
        // Writing to a String does not fail.
    }
}
