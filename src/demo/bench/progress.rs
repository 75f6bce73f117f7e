//! Shows at a terminal that a benchmark is still at it, from the second second on.
//!
//! ```text
//!   measuring: 5 s of about 22 s
//! ```
//!
//! One line on standard error, written again every second, and gone before the report. Without a
//! terminal nothing is written.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::demo::backstage::{moot, spawn};

const SHOWN_EVERY: Duration = Duration::from_secs(1);
const SHOWN_FROM: u64 = 2;
/// Written over with blanks: not every terminal knows how to clear a line.
const COLUMNS: usize = 40;

/// While there is one, it is shown.
pub(super) struct Progress {
    over: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    pub(super) fn of_about(seconds: u64) -> Progress {
        if !io::stderr().is_terminal() {
            return Progress { over: None, thread: None };
        }
        let (over, is_over) = mpsc::channel();
        // Without a thread there is only no progress.
        let thread = spawn("progress", move || show(seconds, &is_over)).ok();
        Progress { over: Some(over), thread }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.over = None;
        if let Some(thread) = self.thread.take() {
            moot(thread.join());
        }
    }
}

fn show(about: u64, is_over: &Receiver<()>) {
    let mut seconds = 0;
    while is_over.recv_timeout(SHOWN_EVERY) == Err(RecvTimeoutError::Timeout) {
        seconds += 1;
        if seconds >= SHOWN_FROM {
            let line = format!("  measuring: {seconds} s of about {about} s");
            moot(write!(io::stderr(), "\r{line:<COLUMNS$}"));
        }
    }
    if seconds >= SHOWN_FROM {
        moot(write!(io::stderr(), "\r{:COLUMNS$}\r", ""));
    }
}
