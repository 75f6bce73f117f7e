//! What journals there are, in memory: for the page's list, and to find a call's.
//!
//! A directory of a hundred thousand files takes long to read, and the page asks every second. So
//! the names are kept here, and of the journals that were asked for what they tell in
//! [brief](Brief). The [writer](super::writer) tells of every file that it makes and every line
//! that it adds. What others do is noticed: another process on the same directory, or its owner
//! who deletes, changes the directory's time.
//!
//! ```text
//! let past = bridge.journals.past(|name| live.contains(sid_in(name)));
//! let brief = bridge.journals.brief(&path);
//! ```
//!
//! It reads journals and never writes one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};
use std::{io, mem};

use crate::records::ended_by::EndedBy;
use crate::records::journal::{journals, sid_of};
use crate::records::past::PastCall;
use crate::records::report::Report;
use crate::toolbox::threads::lock;
use crate::toolbox::time::in_seconds;

/// A directory's time has ticks of some milliseconds, and what happens twice within one looks like
/// once. So a directory that has just changed is read again the next time.
const TICK: Duration = Duration::from_millis(50);
/// And so is any other after this long, whatever its time says: we may have changed it in the same
/// tick as somebody else.
const LIST_AGAIN_AFTER: Duration = Duration::from_mins(1);

/// Journals that one look reads at most, and how much of them.
const READ_AT_ONCE_MAX: usize = 500;
const READ_BYTES_AT_ONCE_MAX: u64 = 16 * 1_024 * 1_024;

#[derive(Default)]
pub(super) struct Index(Mutex<Names>);

#[derive(Default)]
struct Names {
    /// By name without its ending: the oldest first.
    journals: BTreeMap<String, Entry>,
    /// When they were read, and the directory's time then, if that can be relied on. None: not yet.
    listed: Option<(Instant, Option<SystemTime>)>,
}

#[derive(Default)]
struct Entry {
    brief: Option<Arc<Brief>>,
    /// Grows with every line that this process adds.
    version: u64,
}

/// What a journal tells of its call, but for the words.
#[derive(Default)]
pub(crate) struct Brief {
    pub(crate) path: PathBuf,
    /// Its transcript and its report are empty here.
    pub(crate) past: PastCall,
    /// Utterances.
    pub(crate) lines: usize,
    /// The file's length. Another process may be at it.
    bytes: u64,
}

/// The calls of the past, newest first.
pub(crate) struct Past {
    pub(crate) calls: Vec<Arc<Brief>>,
    /// False: older ones are still to be read.
    pub(crate) is_complete: bool,
}

impl Brief {
    /// Also of a journal that cannot be read: its name tells that there was a call.
    fn read(path: &Path) -> Brief {
        // Before it is read: what is added meanwhile is read the next time.
        let bytes = path.metadata().map_or(0, |file| file.len());
        let mut past = PastCall::read(path).unwrap_or_default();
        let lines = mem::take(&mut past.transcript).count();
        past.report = Report::default();
        Brief { path: path.to_owned(), past, lines, bytes }
    }

    fn is_current(&self) -> bool {
        self.past.delivered || self.path.metadata().is_ok_and(|file| file.len() == self.bytes)
    }

    /// The journal's name without its ending: by it, calls are older and newer.
    pub(crate) fn cursor(&self) -> &str {
        self.path.file_stem().and_then(|name| name.to_str()).unwrap_or_default()
    }

    pub(crate) fn seconds(&self) -> f64 {
        let times = self.past.began.zip(self.past.ended);
        times.map_or(0.0, |(began, ended)| {
            in_seconds(ended.duration_since(began).try_into().unwrap_or_default())
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
        let ended_badly = past.ended_by.map_or(past.transfer.is_none(), EndedBy::is_failure);
        ended_badly || !past.tally.failed().is_empty() || self.undelivered().is_some()
    }
}

impl Index {
    /// All but those whose names are left out. A journal is read when it is new or has grown, and
    /// never again; of thousands that nobody has looked at yet, each look reads some, so that no
    /// answer waits for all of them.
    pub(super) fn past(&self, directory: &Path, is_left_out: impl Fn(&str) -> bool) -> Past {
        self.list(directory);
        let known: Vec<(Option<Arc<Brief>>, PathBuf)> = {
            let names = lock(&self.0);
            let wanted = names.journals.iter().rev().filter(|(name, _)| !is_left_out(name));
            let path = |name, it: &Entry| match it.brief {
                Some(_) => PathBuf::new(),
                None => path_of(directory, name),
            };
            wanted.map(|(name, it)| (it.brief.clone(), path(name, it))).collect()
        };
        let (mut files_left, mut bytes_left) = (READ_AT_ONCE_MAX, READ_BYTES_AT_ONCE_MAX);
        let mut past = Past { calls: Vec::with_capacity(known.len()), is_complete: true };
        for (brief, path) in known {
            let call = match brief {
                Some(brief) if brief.is_current() => brief,
                _ if files_left == 0 || bytes_left == 0 => {
                    past.is_complete = false;
                    break;
                }
                brief => {
                    let call = self.brief(brief.as_ref().map_or(&path, |brief| &brief.path));
                    files_left -= 1;
                    bytes_left = bytes_left.saturating_sub(call.bytes);
                    call
                }
            };
            if !call.past.is_forgotten() {
                past.calls.push(call);
            }
        }
        past
    }

    /// The latest of this call.
    pub(super) fn find(&self, directory: &Path, sid: &str) -> Option<PathBuf> {
        self.list(directory);
        let names = lock(&self.0);
        let is_its = |name: &str| name.strip_suffix(sid).is_some_and(|rest| rest.ends_with('-'));
        let name = names.journals.keys().rfind(|name| is_its(name))?;
        Some(path_of(directory, name))
    }

    pub(super) fn brief(&self, path: &Path) -> Arc<Brief> {
        let name = name_of(path);
        let known = lock(&self.0).journals.get(&name).map(|it| (it.version, it.brief.clone()));
        let (version, brief) = known.unwrap_or_default();
        if let Some(brief) = brief.filter(|brief| brief.is_current()) {
            return brief;
        }
        let brief = Arc::new(Brief::read(path));
        let mut names = lock(&self.0);
        if let Some(entry) = names.journals.get_mut(&name).filter(|it| it.version == version) {
            entry.brief = Some(Arc::clone(&brief));
        }
        brief
    }

    /// Told by the writer, around the making of a file.
    pub(super) fn make<T>(
        &self,
        path: &Path,
        make: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let directory = path.parent().unwrap_or(path);
        let before = time_of(directory);
        let file = make()?;
        let now = time_of(directory);
        let names = &mut *lock(&self.0);
        names.journals.entry(name_of(path)).or_default();
        if let Some((_, listed)) = &mut names.listed
            && *listed == before
        {
            // It is known why the directory has changed.
            *listed = now;
        }
        Ok(file)
    }

    /// Told by the writer, of lines that are on disk.
    pub(super) fn has_grown(&self, path: &Path) {
        if let Some(entry) = lock(&self.0).journals.get_mut(&name_of(path)) {
            entry.version += 1;
            entry.brief = None;
        }
    }

    /// Reads the names again if somebody else has changed the directory.
    fn list(&self, directory: &Path) {
        let now = time_of(&directory.join("calls"));
        let is_current = |(when, time): (Instant, Option<SystemTime>)| {
            time == now && when.elapsed() < LIST_AGAIN_AFTER
        };
        if lock(&self.0).listed.is_some_and(is_current) {
            return;
        }
        let found: Vec<String> = journals(directory).iter().map(|path| name_of(path)).collect();
        let names = &mut *lock(&self.0);
        let mut known = std::mem::take(&mut names.journals);
        let entry = |name: String| {
            let entry = known.remove(&name).unwrap_or_default();
            (name, entry)
        };
        names.journals = found.into_iter().map(entry).collect();
        let is_settled = |time: &SystemTime| time.elapsed().is_ok_and(|age| age > TICK);
        names.listed = Some((Instant::now(), now.filter(is_settled)));
    }
}

fn time_of(directory: &Path) -> Option<SystemTime> {
    directory.metadata().and_then(|directory| directory.modified()).ok()
}

pub(crate) fn name_of(path: &Path) -> String {
    path.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

pub(crate) fn sid_in(name: &str) -> &str {
    sid_of(Path::new(name))
}

fn path_of(directory: &Path, name: &str) -> PathBuf {
    directory.join("calls").join(format!("{name}.jsonl"))
}

#[cfg(test)]
mod tests;
