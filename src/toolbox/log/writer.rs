//! The log's queue, and the one thread that writes what is in it to standard error.
//!
//! Whoever logs puts a line into the queue, under a lock that nobody holds while standard error is
//! waited for, so a log that nobody reads stops nothing. When the queue is full, lines are dropped
//! and counted, and the log says how many once there is room again. [`flush`] gives the last lines
//! of a process a moment to come out.
//!
//! Without the thread, before [`start`] and in the commands that only print, lines are written by
//! whoever has them. If the thread cannot begin, or ends by a fault, the next line tries again.

use std::io::{self, Write as _};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use crate::toolbox::log::strangers::sum_up;
use crate::toolbox::log::{About, Level, Step, line};
use crate::toolbox::metrics::LOG_LINES_DROPPED;
use crate::toolbox::threads::{lock, spawn, wait};

/// Lines that wait to be written, and as many again that the writer has taken. More is dropped.
const QUEUED_MAX: usize = 2_048;
/// The last lines of a process. A log that is stuck does not keep it.
const FLUSH_WITHIN: Duration = Duration::from_secs(2);

static DESK: Desk = Desk { queue: Mutex::new(Queue::new()), changed: Condvar::new() };

struct Desk {
    queue: Mutex<Queue>,
    changed: Condvar,
}

struct Queue {
    /// Lines go through the queue.
    is_open: bool,
    lines: Vec<String>,
    /// Lines since the last word about it.
    lost: u64,
    writer_runs: bool,
    is_writing: bool,
}

impl Queue {
    const fn new() -> Queue {
        Queue { is_open: false, lines: Vec::new(), lost: 0, writer_runs: false, is_writing: false }
    }
}

/// From now on nobody waits for whoever reads the log.
pub(super) fn start() {
    lock(&DESK.queue).is_open = true;
    wake_writer();
}

pub(super) fn put(line: String) {
    let mut queue = lock(&DESK.queue);
    if !queue.is_open {
        drop(queue);
        write(&line);
        return;
    }
    if queue.lines.len() >= QUEUED_MAX {
        queue.lost += 1;
        drop(queue);
        LOG_LINES_DROPPED.of(&[]).add();
        return;
    }
    queue.lines.push(line);
    drop(queue);
    wake_writer();
}

fn wake_writer() {
    DESK.changed.notify_all();
    if std::mem::replace(&mut lock(&DESK.queue).writer_runs, true) {
        return;
    }
    let began = spawn("log".into(), || {
        let _on_duty = OnDuty;
        loop {
            write_next();
        }
    });
    if began.is_err() {
        lock(&DESK.queue).writer_runs = false;
    }
}

/// While this is there, the writer runs.
struct OnDuty;

impl Drop for OnDuty {
    fn drop(&mut self) {
        let mut queue = lock(&DESK.queue);
        (queue.writer_runs, queue.is_writing) = (false, false);
    }
}

fn write_next() {
    let within = sum_up();
    let mut queue = lock(&DESK.queue);
    queue.is_writing = false;
    DESK.changed.notify_all();
    queue = wait(&DESK.changed, queue, within, |queue| queue.lines.is_empty());
    queue.is_writing = !queue.lines.is_empty();
    let lines = std::mem::take(&mut queue.lines);
    let lost = std::mem::take(&mut queue.lost);
    drop(queue);

    let mut failed = lines.iter().filter(|line| !write(line)).count() as u64;
    for _ in 0..failed {
        LOG_LINES_DROPPED.of(&[]).add();
    }
    if lost > 0 {
        let about = About { sid: None, step: Step::Bridge };
        let what = format_args!("{lost} lines of this log are missing: nobody read it in time");
        // They came behind those that were in the queue.
        if line(Level::Warn, &about, what, &[("lost", &lost)]).is_some_and(|said| !write(&said)) {
            failed += lost;
        }
    }
    lock(&DESK.queue).lost += failed;
}

/// False: it is lost, which must not end a call.
fn write(line: &str) -> bool {
    io::stderr().write_all(line.as_bytes()).is_ok()
}

/// Until all that was logged has been written, or for a moment.
pub(crate) fn flush() {
    let queue = lock(&DESK.queue);
    let is_busy =
        |queue: &mut Queue| queue.is_open && (queue.is_writing || !queue.lines.is_empty());
    drop(wait(&DESK.changed, queue, FLUSH_WITHIN, is_busy));
}
