//! The calls of the past in sum, kept in memory: for the list, its filters, and the pictures.
//!
//! [`History::look`] gives them newest first. A journal is read when it is new or has grown, and
//! never again; of thousands that nobody has looked at yet, each look reads some, so that no answer
//! waits for all of them. What was said is not kept: whoever searches it reads the files.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::records::ended_by::EndedBy;
use crate::records::journal::{Journals, journals};
use crate::records::past::PastCall;
use crate::toolbox::threads::lock;
use crate::toolbox::time::in_seconds;

/// Journals that one look reads at most, and how much of them.
const READ_AT_ONCE_MAX: usize = 500;
const READ_BYTES_AT_ONCE_MAX: u64 = 16 * 1_024 * 1_024;

/// What was read of the journals so far, and how long each was then.
#[derive(Default)]
pub(crate) struct History(Mutex<HashMap<PathBuf, (u64, Arc<Known>)>>);

/// A call that has ended, without its words.
pub(crate) struct Known {
    pub(crate) path: PathBuf,
    /// Its transcript is empty here.
    pub(crate) past: PastCall,
    /// Utterances.
    pub(crate) lines: usize,
}

/// The calls of the past, newest first, without those in progress.
pub(crate) struct Past {
    pub(crate) calls: Vec<Arc<Known>>,
    /// False: older ones are still to be read.
    pub(crate) is_complete: bool,
}

impl History {
    pub(crate) fn look(
        &self,
        all: &Journals,
        data_dir: &Path,
        is_live: impl Fn(&Path) -> bool,
    ) -> Past {
        all.settle();
        let paths = journals(data_dir);
        let mut known = lock(&self.0);
        let before = std::mem::take(&mut *known);
        let (mut files_left, mut bytes_left) = (READ_AT_ONCE_MAX, READ_BYTES_AT_ONCE_MAX);
        let mut past = Past { calls: Vec::with_capacity(paths.len()), is_complete: true };
        for path in paths.into_iter().rev().filter(|path| !is_live(path)) {
            let bytes = fs::metadata(&path).map_or(0, |file| file.len());
            let call = match before.get(&path) {
                Some((then, call)) if *then == bytes => Arc::clone(call),
                _ if files_left == 0 || bytes_left == 0 => {
                    past.is_complete = false;
                    continue;
                }
                _ => {
                    files_left -= 1;
                    bytes_left = bytes_left.saturating_sub(bytes);
                    Arc::new(Known::read(path.clone()))
                }
            };
            // Behind a gap it is kept for the next look.
            if past.is_complete {
                past.calls.push(Arc::clone(&call));
            }
            known.insert(path, (bytes, call));
        }
        past
    }
}

impl Known {
    /// Also of a journal that cannot be read: its name tells that there was a call.
    pub(crate) fn read(path: PathBuf) -> Known {
        let mut past = PastCall::read(&path).unwrap_or_default();
        let lines = std::mem::take(&mut past.transcript).count();
        Known { path, past, lines }
    }

    /// The journal's name without its ending: by it, calls are older and newer.
    pub(crate) fn cursor(&self) -> &str {
        self.path.file_stem().and_then(|name| name.to_str()).unwrap_or_default()
    }

    pub(crate) fn seconds(&self) -> f64 {
        let times = self.past.began.zip(self.past.ended);
        times.map_or(0.0, |(began, ended)| {
            let lasted = ended.duration_since(began).try_into().unwrap_or_default();
            in_seconds(lasted)
        })
    }

    /// What n8n has not taken, and why. A transcript that was not offered yet is no trouble.
    pub(crate) fn undelivered(&self) -> Option<&str> {
        let waits = !self.past.delivered && self.lines > 0 && !self.past.trouble.is_empty();
        waits.then_some(self.past.trouble.as_str())
    }

    /// Anything went wrong in it, or with its transcript.
    pub(crate) fn is_failure(&self) -> bool {
        let past = &self.past;
        let ended_badly = past.ended_by.map_or(!past.transferred, EndedBy::is_failure);
        ended_badly || !past.tally.failed().is_empty() || self.undelivered().is_some()
    }
}
