//! What journals there are, in memory: for the page's list, and to find a call's.
//!
//! A directory of a hundred thousand files takes long to read, and the page asks every second. So
//! the names are kept here, and of the journals that were asked for what they tell in
//! [brief](Brief). The [writer](super::writer) tells of every file that it makes and every line
//! that it adds. What others do is noticed: another process on the same directory, or its owner
//! who deletes, changes the directory's time.
//!
//! ```text
//! let (paths, next) = bridge.journals.page(before, limit, &live);
//! let brief = bridge.journals.brief(&paths[0]);
//! ```
//!
//! It reads journals and never writes one.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use jiff::Timestamp;

use crate::records::ended_by::EndedBy;
use crate::records::event::Direction;
use crate::records::journal::{journals, sid_of};
use crate::records::past::PastCall;
use crate::toolbox::threads::lock;

/// A directory's time has ticks of some milliseconds, and what happens twice within one looks like
/// once. So a directory that has just changed is read again the next time.
const TICK: Duration = Duration::from_millis(50);
/// And so is any other after this long, whatever its time says: we may have changed it in the same
/// tick as somebody else.
const LIST_AGAIN_AFTER: Duration = Duration::from_mins(1);

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
    pub(crate) number: String,
    pub(crate) direction: Direction,
    pub(crate) began: Option<Timestamp>,
    pub(crate) ended: Option<Timestamp>,
    pub(crate) stage: String,
    pub(crate) ended_by: Option<EndedBy>,
    pub(crate) transferred: bool,
    /// Utterances.
    pub(crate) lines: usize,
    pub(crate) delivered: bool,
    /// The file's length. Another process may be at it.
    bytes: u64,
}

impl Brief {
    fn read(path: &Path) -> io::Result<Brief> {
        // Before it is read: what is added meanwhile is read the next time.
        let bytes = path.metadata()?.len();
        let past = PastCall::read(path)?;
        Ok(Brief {
            number: past.number,
            direction: past.direction,
            began: past.began,
            ended: past.ended,
            stage: past.stage,
            ended_by: past.ended_by,
            transferred: past.transferred,
            lines: past.transcript.count(),
            delivered: past.delivered,
            bytes,
        })
    }

    fn is_current(&self, path: &Path) -> bool {
        self.delivered || path.metadata().is_ok_and(|file| file.len() == self.bytes)
    }
}

impl Index {
    /// At most so many, the newest first, that are older than `before` (if that is not empty) and
    /// not of these calls. With it, what to ask for those that are older still.
    pub(super) fn page(
        &self,
        directory: &Path,
        before: &str,
        limit: usize,
        without: &HashSet<&str>,
    ) -> (Vec<PathBuf>, Option<String>) {
        self.list(directory);
        let names = lock(&self.0);
        // The journal of a cursor may be deleted since.
        let end = if before.is_empty() { Bound::Unbounded } else { Bound::Excluded(before) };
        let older = names.journals.range::<str, _>((Bound::Unbounded, end)).rev();
        let mut older = older.map(|(name, _)| name).filter(|name| !without.contains(sid_in(name)));
        let page: Vec<&String> = older.by_ref().take(limit).collect();
        let next = older.next().and_then(|_| page.last().map(ToString::to_string));
        (page.into_iter().map(|name| path_of(directory, name)).collect(), next)
    }

    /// The latest of this call.
    pub(super) fn find(&self, directory: &Path, sid: &str) -> Option<PathBuf> {
        self.list(directory);
        let names = lock(&self.0);
        let is_its = |name: &str| name.strip_suffix(sid).is_some_and(|rest| rest.ends_with('-'));
        let name = names.journals.keys().rfind(|name| is_its(name))?;
        Some(path_of(directory, name))
    }

    /// None: it cannot be read.
    pub(super) fn brief(&self, path: &Path) -> Option<Arc<Brief>> {
        let name = name_of(path);
        let known = lock(&self.0).journals.get(&name).map(|it| (it.version, it.brief.clone()));
        let (version, brief) = known.unwrap_or_default();
        if let Some(brief) = brief.filter(|brief| brief.is_current(path)) {
            return Some(brief);
        }
        let brief = Arc::new(Brief::read(path).ok()?);
        let mut names = lock(&self.0);
        if let Some(entry) = names.journals.get_mut(&name).filter(|it| it.version == version) {
            entry.brief = Some(Arc::clone(&brief));
        }
        Some(brief)
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

fn name_of(path: &Path) -> String {
    path.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn sid_in(name: &str) -> &str {
    sid_of(Path::new(name))
}

fn path_of(directory: &Path, name: &str) -> PathBuf {
    directory.join("calls").join(format!("{name}.jsonl"))
}

#[cfg(test)]
mod tests;
