//! What `/proc` tells: memory, threads and descriptors of a process, and all clocks at one
//! moment.
//!
//! Linux only, as the benchmark is. Only reads.

use std::collections::BTreeMap;
use std::fs;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// What a process holds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Vitals {
    pub rss_kib: u64,
    pub threads: usize,
    pub descriptors: usize,
}

impl Vitals {
    pub(super) fn of(pid: u32) -> Result<Vitals, String> {
        // The sum over all mappings: `status` and `statm` may be off by a page or hundred.
        let rollup = read_proc(pid, "smaps_rollup")?;
        let count = |name: &str| -> Result<usize, String> {
            let entries = fs::read_dir(format!("/proc/{pid}/{name}"));
            entries.map(Iterator::count).map_err(|error| format!("/proc/{pid}/{name}: {error}"))
        };
        Ok(Vitals {
            rss_kib: field_of(&rollup, "Rss:"),
            threads: count("task")?,
            descriptors: count("fd")?,
        })
    }
}

fn read_proc(pid: u32, name: &str) -> Result<String, String> {
    let path = format!("/proc/{pid}/{name}");
    fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))
}

fn field_of(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let word = line.and_then(|line| line.split_whitespace().next());
    word.and_then(|word| word.parse().ok()).unwrap_or(0)
}

/// All clocks at one moment.
pub(super) struct Moment {
    pub(super) at: Instant,
    /// The child's, threads that have ended included. In steps of 10 ms.
    pub(super) cpu: Duration,
    pub(super) user: Duration,
    pub(super) world: Duration,
    /// The child's threads that live: time on a core, time spent waiting for one.
    threads: BTreeMap<String, (Duration, Duration)>,
    pub(super) cores: usize,
    /// The machine's, in ticks.
    pub(super) busy: u64,
    pub(super) total: u64,
}

impl Moment {
    pub(super) fn now(pid: u32) -> Result<Moment, String> {
        let (user, system) = cpu_of(&read_proc(pid, "stat")?);
        let (own_user, own_system) = cpu_of(&read_proc(std::process::id(), "stat")?);
        let mut threads = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            // A thread that ends between two looks is not there any more.
            let text = fs::read_to_string(entry.path().join("schedstat")).unwrap_or_default();
            let mut times = text
                .split_whitespace()
                .map(|word| word.parse().map(Duration::from_nanos).unwrap_or_default());
            if let (Some(ran), Some(waited)) = (times.next(), times.next()) {
                threads.insert(entry.file_name().to_string_lossy().into_owned(), (ran, waited));
            }
        }
        let machine = fs::read_to_string("/proc/stat").map_err(|error| error.to_string())?;
        let cores = machine.lines().filter(|line| line.starts_with("cpu")).count();
        let words = machine.lines().next().unwrap_or_default().split_whitespace().skip(1);
        // user, nice, system, idle, iowait, irq, softirq, steal; the rest is in them already.
        let ticks: Vec<u64> = words.take(8).filter_map(|word| word.parse().ok()).collect();
        let total: u64 = ticks.iter().sum();
        let idle: u64 = ticks.iter().skip(3).take(2).sum();
        Ok(Moment {
            at: Instant::now(),
            cpu: user + system,
            user,
            world: own_user + own_system,
            threads,
            // The first line is the sum of the others.
            cores: cores.saturating_sub(1).max(1),
            busy: total - idle,
            total,
        })
    }

    pub(super) fn ran_since(&self, before: &Moment) -> Duration {
        self.since(before, |(ran, _)| ran)
    }

    pub(super) fn waited_since(&self, before: &Moment) -> Duration {
        self.since(before, |(_, waited)| waited)
    }

    fn since(&self, before: &Moment, which: fn((Duration, Duration)) -> Duration) -> Duration {
        let times = self.threads.iter().map(|(thread, times)| {
            let began = before.threads.get(thread).copied().unwrap_or_default();
            which(*times).saturating_sub(which(began))
        });
        times.sum()
    }
}

/// User and system time in a `/proc/…/stat`. The name in it may hold blanks and brackets.
fn cpu_of(stat: &str) -> (Duration, Duration) {
    /// `USER_HZ`, which is 100 on every machine this runs on.
    const TICK: Duration = Duration::from_millis(10);
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let mut fields = fields.split_whitespace().skip(11).map(|word| word.parse().unwrap_or(0));
    let mut time = || TICK * fields.next().unwrap_or(0);
    (time(), time())
}

/// The one clock of all stamps.
pub(super) fn now_ns() -> u64 {
    static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(ORIGIN.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
