//! A call's file on disk: `DATA_DIR/calls/<start time>-<CallSid>.jsonl`, one [`Event`] a line.
//!
//! It is written as the call happens, and is the transcript's home until n8n has it, all that a
//! restarted process knows, and what the live page shows. Whoever has a [`Journal`] notes events
//! in it, and never waits for the disk: the lines go to one [writer](super::writer).
//!
//! ```text
//! call.journal.note(&Event::Stage { stage: "main_convo".into() });
//! ```
//!
//! Whoever has a journal also has a lock on its file, which the system lets go of when the process
//! dies: so a call whose journal is locked is alive, here or in another process, and one whose
//! journal can be [claimed](Journals::claim) is not. Which calls have a journal at all is
//! [known](Journals::knows) without a look at the disk. Reading is [`past`](super::past)'s.

use std::collections::HashSet;
use std::fmt::Display;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Serialize;

use crate::records::event::Event;
use crate::records::index::{Brief, Past};
use crate::records::past::PastCall;
use crate::records::report::Report;
use crate::records::tally::Tally;
use crate::records::writer::{Desk, Note};
use crate::toolbox::log::{Step, presentable};
use crate::toolbox::text::cut;
use crate::toolbox::threads::{lock, wait};
use crate::toolbox::time::by_the_calendar;

/// A message in a journal, and a tool's arguments and result there. What is longer is cut.
pub(crate) const WIRE_CHARS_MAX: usize = 2_000;
/// Whoever reads a journal waits this long for what was noted before. A disk takes milliseconds.
const SETTLE_WITHIN: Duration = Duration::from_millis(500);
/// A call that is to be taken up may still be in the hands of a process that is about to file it.
const CLAIM_WITHIN: Duration = Duration::from_secs(5);
/// How often that is looked at.
const CLAIM_AGAIN_AFTER: Duration = Duration::from_millis(50);
/// The names of all journals are read by then, or the disk hangs, and a call that rings goes on.
const NAMES_WITHIN: Duration = Duration::from_secs(1);

/// All journals of this process.
pub(crate) struct Journals {
    data_dir: PathBuf,
    desk: Arc<Desk>,
    known: Mutex<Known>,
    names_read: Condvar,
}

/// All calls that have a journal, by the figure that their ids are: 16 bytes each.
#[derive(Default)]
struct Known {
    calls: HashSet<u128>,
    /// Those of earlier processes are among them.
    is_complete: bool,
}

/// Why a journal cannot be claimed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Unclaimed {
    /// There is none.
    NoJournal,
    /// This process or another one has it: the call goes on, or is just being filed.
    Held,
}

impl Journals {
    pub(crate) fn new(data_dir: &Path) -> Journals {
        Journals {
            data_dir: data_dir.to_owned(),
            desk: Arc::default(),
            known: Mutex::default(),
            names_read: Condvar::new(),
        }
    }

    /// Once, at the start. Of the journals only the names, which takes no time.
    pub(crate) fn read_names(&self) {
        let calls = journals(&self.data_dir);
        let mut known = lock(&self.known);
        known.calls.extend(calls.iter().filter_map(|path| figure(sid_of(path))));
        known.is_complete = true;
        drop(known);
        self.names_read.notify_all();
    }

    /// Has this call rung before, here or at an earlier process?
    pub(crate) fn knows(&self, sid: &str) -> bool {
        let known = lock(&self.known);
        let known = wait(&self.names_read, known, NAMES_WITHIN, |known| !known.is_complete);
        figure(sid).is_some_and(|figure| known.calls.contains(&figure))
    }

    /// For a process that lives long, so that its first call does not start a thread for it.
    pub(crate) fn start_writer(&self) {
        self.desk.start_writer();
    }

    /// For a call that begins now. The file is made with the first event.
    pub(crate) fn begin(&self, sid: &str) -> Journal {
        let start = Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
        let path: Arc<Path> =
            self.data_dir.join("calls").join(format!("{start}-{sid}.jsonl")).into();
        self.desk.add_handle(&path);
        lock(&self.known).calls.extend(figure(sid));
        Journal {
            path,
            desk: Arc::clone(&self.desk),
            is_incomplete: Arc::default(),
            tally: Arc::default(),
            report: Arc::default(),
        }
    }

    /// Takes a journal that nobody has.
    pub(crate) fn claim(&self, path: &Path) -> Result<Journal, Unclaimed> {
        let path: Arc<Path> = path.into();
        let is_open = self.desk.add_sole_handle(&path).ok_or(Unclaimed::Held)?;
        let journal = Journal {
            path,
            desk: Arc::clone(&self.desk),
            is_incomplete: Arc::default(),
            tally: Arc::default(),
            report: Arc::default(),
        };
        if is_open {
            return Ok(journal);
        }
        match File::options().read(true).append(true).open(&journal.path) {
            Ok(file) => match file.try_lock() {
                Err(TryLockError::WouldBlock) => return Err(Unclaimed::Held),
                // A file system without locks: as if there were no other process.
                Ok(()) | Err(TryLockError::Error(_)) => self.desk.hand_over(&journal.path, file),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => journal.lacks_something(),
            // It will be opened again when there is something to write.
            Err(_) => {}
        }
        Ok(journal)
    }

    /// Takes the journal of a call that is to go on, and what it tells.
    pub(crate) fn take_up(&self, sid: &str) -> Result<(Journal, PastCall), Unclaimed> {
        let path = self.find(sid).ok_or(Unclaimed::NoJournal)?;
        let deadline = Instant::now() + CLAIM_WITHIN;
        loop {
            match self.claim(&path) {
                Ok(journal) => {
                    let past = PastCall::read(&path)
                        .ok()
                        .filter(|past| past.sid == sid || past.is_forgotten());
                    let past = past.ok_or(Unclaimed::NoJournal)?;
                    *lock(&journal.tally) = past.tally.clone();
                    *lock(&journal.report) = past.report.clone();
                    return Ok((journal, past));
                }
                Err(Unclaimed::Held) if Instant::now() < deadline => {
                    // The lock of another process announces nothing.
                    thread::sleep(CLAIM_AGAIN_AFTER);
                }
                Err(why) => return Err(why),
            }
        }
    }

    /// The latest journal of this call, up to date.
    pub(crate) fn find(&self, sid: &str) -> Option<PathBuf> {
        self.settle();
        self.desk.index.find(&self.data_dir, sid)
    }

    /// All calls whose journals' names are not left out, up to date.
    pub(crate) fn past(&self, is_left_out: impl Fn(&str) -> bool) -> Past {
        self.settle();
        self.desk.index.past(&self.data_dir, is_left_out)
    }

    pub(crate) fn brief(&self, path: &Path) -> Arc<Brief> {
        self.desk.index.brief(path)
    }

    /// Until all that was noted before has been written, or could not be. A disk that hangs is not
    /// waited for.
    pub(crate) fn settle(&self) {
        self.desk.await_written(SETTLE_WITHIN);
    }

    /// Before the process ends: all that was noted is on disk, or the time is up.
    pub(crate) fn flush(&self, within: Duration) {
        self.desk.await_idle(within);
    }
}

impl Drop for Journals {
    fn drop(&mut self) {
        self.desk.close();
    }
}

/// A handle to one call's journal. While there is any, the file stays locked.
pub(crate) struct Journal {
    path: Arc<Path>,
    desk: Arc<Desk>,
    is_incomplete: Arc<AtomicBool>,
    tally: Arc<Mutex<Tally>>,
    report: Arc<Mutex<Report>>,
}

impl Journal {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Never waits for the disk, and never fails: the transcript is in memory as well.
    pub(crate) fn note(&self, event: &Event) {
        // A short list, so that a new event is thought about when it is made.
        let sync = matches!(
            event,
            Event::End { .. } | Event::Transfer(_) | Event::Accepted | Event::Delivered
        );
        lock(&self.tally).apply(event);
        lock(&self.report).apply(event);
        let Some(line) = line(event) else { return };
        let (path, is_incomplete) = (Arc::clone(&self.path), Arc::clone(&self.is_incomplete));
        self.desk.note(Note { path, line, sync, is_incomplete });
    }

    /// What did not work, for the page. The log has the same words.
    pub(crate) fn note_failure(&self, step: Step, why: impl Display, id: &str) {
        let why = cut(&presentable(&why.to_string()), WIRE_CHARS_MAX);
        self.note(&Event::Failed { step: step as u8, why, id: id.to_owned() });
    }

    /// Of the whole call so far.
    pub(crate) fn tally(&self) -> Tally {
        lock(&self.tally).clone()
    }

    /// Of the whole call so far.
    pub(crate) fn report(&self) -> Report {
        lock(&self.report).clone()
    }

    pub(super) fn settle(&self) {
        self.desk.await_written(SETTLE_WITHIN);
    }

    /// Whoever knows everything is to note it again.
    pub(super) fn lacks_something(&self) {
        self.is_incomplete.store(true, Ordering::SeqCst);
    }

    /// True once: the file was deleted, or there was no room in memory for all that a disk did not
    /// take.
    pub(super) fn is_to_be_completed(&self) -> bool {
        self.settle();
        self.is_incomplete.swap(false, Ordering::SeqCst)
    }
}

impl Clone for Journal {
    fn clone(&self) -> Journal {
        self.desk.add_handle(&self.path);
        Journal {
            path: Arc::clone(&self.path),
            desk: Arc::clone(&self.desk),
            is_incomplete: Arc::clone(&self.is_incomplete),
            tally: Arc::clone(&self.tally),
            report: Arc::clone(&self.report),
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.desk.drop_handle(&self.path);
    }
}

fn line(event: &Event) -> Option<Vec<u8>> {
    #[derive(Serialize)]
    struct Line<'a> {
        at: String,
        #[serde(flatten)]
        event: &'a Event,
    }
    let line = Line { at: by_the_calendar(Timestamp::now()), event };
    // Events are made of texts, figures and JSON: they can be written.
    let mut line = serde_json::to_vec(&line).ok()?;
    line.push(b'\n');
    Some(line)
}

/// All journals, the oldest first: their names begin with the time.
pub(crate) fn journals(data_dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(data_dir.join("calls")).into_iter().flatten();
    let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
    let mut journals: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|end| end == "jsonl")).collect();
    journals.sort();
    journals
}

fn figure(sid: &str) -> Option<u128> {
    u128::from_str_radix(sid.strip_prefix("CA")?, 16).ok()
}

pub(crate) fn sid_of(journal: &Path) -> &str {
    let name = journal.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
    name.rsplit_once('-').map(|(_, sid)| sid).unwrap_or_default()
}

#[cfg(test)]
mod tests;
