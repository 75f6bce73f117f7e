//! Shows at a terminal whom we wait for, once it takes longer than a person expects.
//!
//! ```text
//!   waiting for n8n, Twilio: 3 s of at most 9 s
//! ```
//!
//! One line on standard error, written again every second and gone before anything else is
//! printed. Without a terminal nothing is ever written, and standard output stays what scripts
//! read. Whoever waits holds a [`Waiting`] and says who has answered; the line ends with it.

use std::io::{self, IsTerminal as _};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use crate::toolbox::log::complain_raw;

/// Until then nobody wonders.
const SHOWN_AFTER: Duration = Duration::from_secs(2);
const SHOWN_EVERY: Duration = Duration::from_secs(1);
/// Written over with blanks: not every terminal knows how to clear a line.
const COLUMNS: usize = 70;

pub(crate) struct Waiting {
    /// None: nobody looks on.
    told: Option<Sender<&'static str>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Waiting {
    pub(crate) fn for_parties(parties: Vec<&'static str>, at_most: Duration) -> Waiting {
        if !io::stderr().is_terminal() {
            return Waiting { told: None, thread: None };
        }
        let (told, hear) = mpsc::channel();
        let showing = move || show(parties, at_most, &hear);
        // Without a thread there is only no progress.
        let thread = thread::Builder::new().name("waiting".into()).spawn(showing).ok();
        Waiting { told: Some(told), thread }
    }

    pub(crate) fn answered(&self, party: &'static str) {
        if self.told.as_ref().is_some_and(|told| told.send(party).is_err()) {
            // Everybody has answered, or there is no thread.
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.told = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            // It only showed something.
        }
    }
}

fn show(mut parties: Vec<&'static str>, at_most: Duration, hear: &Receiver<&'static str>) {
    let began = Instant::now();
    let mut due = SHOWN_AFTER;
    while !parties.is_empty() {
        match hear.recv_timeout(due.saturating_sub(began.elapsed())) {
            Ok(party) => parties.retain(|waiting| *waiting != party),
            Err(RecvTimeoutError::Timeout) => {
                let (names, took, most) = (parties.join(", "), due.as_secs(), at_most.as_secs());
                let line = format!("  waiting for {names}: {took} s of at most {most} s");
                complain_raw(&format!("\r{line:<COLUMNS$}"));
                due += SHOWN_EVERY;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    if due > SHOWN_AFTER {
        complain_raw(&format!("\r{:COLUMNS$}\r", ""));
    }
}
