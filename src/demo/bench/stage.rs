//! A stage: one child process, the bridge or the floor, and the calls through it.
//!
//! It starts the child, dials all calls, lets them talk for the time that is measured, hangs
//! up, and reads off what the child cost meanwhile. Both kinds of child are treated alike, so
//! that their figures can be compared.

use std::process::Command;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use std::{io, thread};

use tempfile::TempDir;

use crate::demo::PATIENCE;
use crate::demo::backstage::lock;
use crate::demo::bench::Plan;
use crate::demo::bench::call::Call;
use crate::demo::bench::figures::{Figures, Machine, Spread, WayFigures};
use crate::demo::bench::hall::Hall;
use crate::demo::bench::histogram::Histogram;
use crate::demo::bench::process::Process;
use crate::demo::bench::vitals::{Moment, Vitals, now_ns};
use crate::demo::http::http_exchange;
use crate::demo::server::ChildLog;
use crate::demo::sound::FRAME_TIME;

/// From the last call's answer to the first frame that counts.
pub(super) const WARM_UP: Duration = Duration::from_secs(1);

/// Threads that ring and hang up.
pub(super) const DIALLERS: usize = 16;

/// Calls do not come all at once. This long lies between two.
const BETWEEN_CALLS: Duration = Duration::from_millis(20);

pub(super) fn measure_bridge(plan: &Plan) -> Result<Figures, String> {
    let stage = Stage::bridge(plan)?;
    let calls = stage.dial_all()?;
    let mut figures = stage.talk(&calls, Duration::from_secs(plan.seconds), || {})?;
    stage.hang_up_all(calls)?;
    stage.settle_parcels(plan.calls);
    stage.conclude(&mut figures);
    Ok(figures)
}

pub(super) fn measure_floor(plan: &Plan, within: Duration) -> Result<Figures, String> {
    let stage = Stage::floor(plan)?;
    let calls = stage.dial_all()?;
    let mut figures = stage.talk(&calls, within, || {})?;
    stage.hang_up_all(calls)?;
    stage.conclude(&mut figures);
    Ok(figures)
}

/// One child process, and the world around it.
pub(super) struct Stage {
    pub(super) hall: Arc<Hall>,
    child: Process,
    start: Histogram,
    pub(super) rest: Vitals,
    /// Holds the server's data and certificate.
    _home: TempDir,
}

impl Stage {
    pub(super) fn bridge(plan: &Plan) -> Result<Stage, String> {
        let broken = |error: io::Error| format!("no world: {error}");
        let home = tempfile::tempdir().map_err(broken)?;
        let (hall, settings) = Hall::open(plan, home.path()).map_err(broken)?;
        let start = Histogram::default();
        let log = ChildLog::default();
        let launch = || -> Result<Process, String> {
            let mut command = Command::new(&plan.program);
            command.env_clear().current_dir(home.path()).envs(settings.iter().cloned());
            let child = Process::launch(command, &log)?;
            let health = http_exchange(child.address, "GET", "/health", &[], &[]);
            match health {
                Ok(answer) if answer.status == 200 => {
                    start.note(child.started.elapsed());
                    Ok(child)
                }
                Ok(answer) => Err(child.trouble(&format!("/health answers {}", answer.status))),
                Err(error) => Err(child.trouble(&format!("/health: {error}"))),
            }
        };
        // One start says little.
        for _ in 0..4 {
            drop(launch()?);
        }
        Stage { hall, child: launch()?, start, rest: Vitals::default(), _home: home }.settled()
    }

    fn floor(plan: &Plan) -> Result<Stage, String> {
        let broken = |error: io::Error| format!("no floor: {error}");
        let home = tempfile::tempdir().map_err(broken)?;
        let plan = Plan {
            tls: false,
            #[cfg(test)]
            fault: None,
            ..plan.clone()
        };
        let (hall, agents) = Hall::open_for_floor(&plan).map_err(broken)?;
        let mut command = Command::new(&plan.program);
        command.args(["demo", "--floor", &agents.to_string()]).current_dir(home.path());
        let child = Process::launch(command, &ChildLog::default())?;
        let start = Histogram::default();
        Stage { hall, child, start, rest: Vitals::default(), _home: home }.settled()
    }

    /// When what is still ending (the connection of the first `/health`) has ended.
    fn settled(mut self) -> Result<Stage, String> {
        self.rest = self.vitals()?;
        for _ in 0..20 {
            thread::sleep(Duration::from_millis(250));
            let last = self.rest;
            self.rest = self.vitals()?;
            if (last.threads, last.descriptors) == (self.rest.threads, self.rest.descriptors) {
                break;
            }
        }
        Ok(self)
    }

    /// What the child holds. Connections that it keeps for the next call are not its calls'.
    pub(super) fn vitals(&self) -> Result<Vitals, String> {
        let mut vitals = Vitals::of(self.child.pid).map_err(|error| self.gone(&error))?;
        let kept = self.hall.kept.load(Relaxed);
        vitals.descriptors = vitals.descriptors.saturating_sub(kept);
        Ok(vitals)
    }

    fn moment(&self) -> Result<Moment, String> {
        Moment::now(self.child.pid).map_err(|error| self.gone(&error))
    }

    fn gone(&self, error: &str) -> String {
        self.child.trouble(&format!("the process that is measured has ended ({error})"))
    }

    pub(super) fn dial_all(&self) -> Result<Vec<Arc<Call>>, String> {
        let began = Instant::now();
        // The floor's legs find each other by their order.
        let diallers = if self.hall.is_floor { 1 } else { DIALLERS };
        let calls = in_parallel(diallers, self.hall.plan.calls, |index| {
            if !self.hall.is_floor {
                let due = began + BETWEEN_CALLS * u32::try_from(index).unwrap_or(u32::MAX);
                sleep_until(due);
            }
            let call = self.dial(u32::try_from(index).unwrap_or(u32::MAX))?;
            self.hall.begin_talking(&call);
            Ok(call)
        })?;
        Ok(calls)
    }

    pub(super) fn dial(&self, number: u32) -> Result<Arc<Call>, String> {
        let dialled = if self.hall.is_floor {
            self.hall.connect_through_floor(self.child.address, number)
        } else {
            self.hall.ring(self.child.address, number)
        };
        dialled.map_err(|why| {
            let stood = self.hall.standing_calls.load(Relaxed);
            self.child.trouble(&format!("with {stood} calls standing, one more failed: {why}"))
        })
    }

    pub(super) fn hang_up_all(&self, calls: Vec<Arc<Call>>) -> Result<(), String> {
        let calls: Vec<Mutex<Option<Arc<Call>>>> =
            calls.into_iter().map(|call| Mutex::new(Some(call))).collect();
        in_parallel(DIALLERS, calls.len(), |index| {
            let call = calls.get(index).and_then(|call| lock(call).take());
            call.map_or(Ok(()), |call| self.hang_up(&call))
        })?;
        Ok(())
    }

    pub(super) fn hang_up(&self, call: &Arc<Call>) -> Result<(), String> {
        let ended = self.hall.hang_up(self.child.address, call);
        ended.map_err(|why| self.child.trouble(&format!("call {}: {why}", call.number)))
    }

    /// All stand. Measures for so long, while `meanwhile` runs.
    pub(super) fn talk(
        &self,
        calls: &[Arc<Call>],
        within: Duration,
        meanwhile: impl FnOnce(),
    ) -> Result<Figures, String> {
        thread::sleep(WARM_UP);
        let before = self.moment()?;
        self.hall.window.from_ns.store(now_ns(), Relaxed);
        let until = Instant::now() + within;
        meanwhile();
        sleep_until(until);
        self.hall.window.until_ns.store(now_ns(), Relaxed);
        let after = self.moment()?;
        let standing = self.vitals()?;
        let mut figures = self.figures(&before, &after, standing);
        figures.calls = calls.len();
        Ok(figures)
    }

    fn figures(&self, before: &Moment, after: &Moment, standing: Vitals) -> Figures {
        let hall = &self.hall;
        let passed = after.at.duration_since(before.at).as_secs_f64();
        // The sum over the threads is exact to the nanosecond, but knows only those that lived all
        // the time. Where they come and go, the kernel's sum over all counts, in steps of 10 ms.
        let cpu = if hall.plan.churn {
            after.cpu.saturating_sub(before.cpu)
        } else {
            after.ran_since(before)
        };
        let frames: u64 = hall.ways.iter().map(|way| way.in_window.load(Relaxed)).sum();
        let share = |cpu: Duration| cpu.as_secs_f64() / passed / after.cores as f64;
        let machine = Machine {
            cores: after.cores,
            busy: after.busy.saturating_sub(before.busy) as f64
                / after.total.saturating_sub(before.total).max(1) as f64,
            child: share(cpu),
            world: share(after.world.saturating_sub(before.world)),
            queue_us: after.waited_since(before).as_secs_f64() * 1e6 / frames.max(1) as f64,
        };
        Figures {
            ways: [WayFigures::default(); 2],
            cpu,
            user_share: (after.user.saturating_sub(before.user)).as_secs_f64()
                / after.cpu.saturating_sub(before.cpu).as_secs_f64().max(0.01),
            call_seconds: frames as f64 / 2.0 * FRAME_TIME.as_secs_f64(),
            rest: self.rest,
            standing,
            start: self.start.spread(),
            webhook: Spread::default(),
            first_audio: Spread::default(),
            clear: Spread::default(),
            machine,
            lateness: Spread::default(),
            filed: 0,
            calls: 0,
            troubles: Vec::new(),
        }
    }

    /// What is known only when all calls have ended.
    pub(super) fn conclude(&self, figures: &mut Figures) {
        let hall = &self.hall;
        for (figures, way) in figures.ways.iter_mut().zip(&hall.ways) {
            *figures = way.figures();
        }
        figures.webhook = hall.webhook.spread();
        figures.first_audio = hall.first_audio.spread();
        figures.clear = hall.clear.spread();
        figures.lateness = hall.lateness.spread();
        figures.filed = hall.filed.load(Relaxed);
        figures.troubles.clone_from(&lock(&hall.troubles));
    }

    /// Waits until n8n has got the transcripts of so many calls.
    pub(super) fn settle_parcels(&self, calls: usize) {
        wait_until(PATIENCE, || self.hall.filed.load(Relaxed) >= calls);
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.hall.over.store(true, Relaxed);
        // The child first: what it holds open then ends by itself.
        self.child.end();
        self.hall.backstage.stop();
    }
}

/// Does so many things with a few threads. The first error ends it.
fn in_parallel<T: Send>(
    threads: usize,
    count: usize,
    work: impl Fn(usize) -> Result<T, String> + Sync,
) -> Result<Vec<T>, String> {
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<T>> = Mutex::new(Vec::with_capacity(count));
    let failed: Mutex<Option<String>> = Mutex::new(None);
    thread::scope(|scope| {
        for _ in 0..threads.min(count) {
            scope.spawn(|| {
                while lock(&failed).is_none() {
                    let index = next.fetch_add(1, Relaxed);
                    if index >= count {
                        return;
                    }
                    match work(index) {
                        Ok(result) => lock(&done).push(result),
                        Err(why) => drop(lock(&failed).get_or_insert(why)),
                    }
                }
            });
        }
    });
    match lock(&failed).take() {
        Some(why) => Err(why),
        None => Ok(std::mem::take(&mut *lock(&done))),
    }
}

pub(super) fn sleep_until(due: Instant) {
    thread::sleep(due.saturating_duration_since(Instant::now()));
}

/// For what announces itself to nobody: another process's figures, frames under way.
pub(super) fn wait_until(within: Duration, mut ready: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + within;
    loop {
        if ready() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(2));
    }
}
