//! The one thread that writes journals, and the desk between it and all who note events.
//!
//! Whoever notes an event puts a line on the desk, under a lock that is never held while a disk is
//! waited for. The writer takes all that lies there, writes it file by file, and keeps what a disk
//! did not take until it does: tried again every [`AGAIN_AFTER`] and with every new line, so that
//! nothing is missing when the disk is back. It also syncs what must outlive a power cut (the end
//! of a call, its delivery), one file at a time with writing in between.
//!
//! What `kill -9` may cost is what lies on the desk: a few milliseconds of lines, or as long as one
//! sync takes. A power cut may cost what the system had not written by itself, some 30 s of a call
//! in progress. An orderly stop costs nothing that the disk takes in time.
//!
//! The thread begins with the first line. If it cannot begin, or ends by a fault, the next line
//! tries again; the open files outlive it.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek as _, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::records::index::Index;
use crate::toolbox::log::log;
use crate::toolbox::threads::{lock, spawn, wait};

/// Lines that no disk has taken yet, of all calls: a thousand hours of talk. More is not kept; a
/// journal that lacks something is completed from memory when its transcript is filed.
const UNWRITTEN_BYTES_MAX: usize = 64 * 1_024 * 1_024;
/// How often a disk that takes nothing is tried again.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// A disk that is busy with the same lines for this long hangs, and that is worth a word.
const HANGS_AFTER: Duration = Duration::from_secs(3);
/// Whoever wants a file that is just being closed waits this long.
const CLOSES_WITHIN: Duration = Duration::from_millis(500);
/// What the first line of a new file says. Files without it are older, and read all the same.
const VERSION: &[u8] = b"\"version\":1,";

/// A line for a journal.
pub(super) struct Note {
    pub(super) path: Arc<Path>,
    pub(super) line: Vec<u8>,
    /// Is to outlive a power cut.
    pub(super) sync: bool,
    /// Set when the file turns out to lack something.
    pub(super) is_incomplete: Arc<AtomicBool>,
}

#[derive(Default)]
pub(super) struct Desk {
    paper: Mutex<Paper>,
    changed: Condvar,
    /// The writer's own. Nobody else may wait for it.
    files: Mutex<Files>,
    /// What the writer does is told here.
    pub(super) index: Index,
}

#[derive(Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
struct Paper {
    notes: Vec<Note>,
    /// Of the lines on the desk, and of those that the writer has.
    bytes: usize,
    writers_bytes: usize,
    /// Journals that somebody has, or that the writer has not put away yet.
    in_use: HashMap<Arc<Path>, Use>,
    /// Journals that are put away, but whose locks we may still have.
    closing: Vec<Arc<Path>>,
    noted: u64,
    written: u64,
    /// Since when the writer has been at the same lines.
    busy_since: Option<Instant>,
    hang_was_said: bool,
    writer_runs: bool,
    /// Something is to be put away.
    is_untidy: bool,
    /// Nobody will claim or begin a journal any more.
    is_closed: bool,
}

#[derive(Default)]
struct Use {
    handles: usize,
    /// Opened and locked by whoever has claimed it.
    claimed: Option<File>,
    /// The writer has it, locked.
    is_open: bool,
}

impl Paper {
    fn hangs(&self) -> bool {
        self.busy_since.is_some_and(|since| since.elapsed() > HANGS_AFTER)
    }
}

impl Desk {
    pub(super) fn add_handle(&self, path: &Arc<Path>) {
        lock(&self.paper).in_use.entry(Arc::clone(path)).or_default().handles += 1;
    }

    /// None: somebody else here has it. False: it is not open, and not locked by us.
    pub(super) fn add_sole_handle(&self, path: &Arc<Path>) -> Option<bool> {
        let is_closing = |paper: &mut Paper| paper.closing.contains(path);
        let mut paper = wait(&self.changed, lock(&self.paper), CLOSES_WITHIN, is_closing);
        let its_use = paper.in_use.entry(Arc::clone(path)).or_default();
        if its_use.handles > 0 {
            return None;
        }
        its_use.handles = 1;
        Some(its_use.is_open || its_use.claimed.is_some())
    }

    pub(super) fn hand_over(&self, path: &Arc<Path>, file: File) {
        lock(&self.paper).in_use.entry(Arc::clone(path)).or_default().claimed = Some(file);
    }

    pub(super) fn drop_handle(self: &Arc<Desk>, path: &Arc<Path>) {
        let mut paper = lock(&self.paper);
        let Some(its_use) = paper.in_use.get_mut(path) else { return };
        its_use.handles = its_use.handles.saturating_sub(1);
        if its_use.handles > 0 {
            return;
        }
        if !its_use.is_open && its_use.claimed.is_none() {
            // If the writer is about to open it, it finds that nobody has it.
            paper.in_use.remove(path);
            return;
        }
        paper.is_untidy = true;
        self.wake_writer(paper);
    }

    /// The thread ends when all is put away.
    pub(super) fn close(self: &Arc<Desk>) {
        let mut paper = lock(&self.paper);
        paper.is_closed = true;
        drop(paper);
        self.changed.notify_all();
    }

    pub(super) fn note(self: &Arc<Desk>, note: Note) {
        let mut paper = lock(&self.paper);
        if paper.bytes + paper.writers_bytes + note.line.len() > UNWRITTEN_BYTES_MAX {
            drop(paper);
            note.is_incomplete.store(true, Ordering::SeqCst);
            return;
        }
        paper.bytes += note.line.len();
        paper.noted += 1;
        paper.notes.push(note);
        let hangs = paper.hangs();
        let is_news = hangs && !std::mem::replace(&mut paper.hang_was_said, hangs);
        self.wake_writer(paper);
        if is_news {
            let seconds = HANGS_AFTER.as_secs();
            log!(
                Error,
                "the disk has taken nothing for {seconds} s; calls go on, transcripts wait in \
                 memory only"
            );
        }
    }

    /// Starts the writer before there is anything to write. A thread that could not be started is
    /// tried again with the next line.
    pub(super) fn start_writer(self: &Arc<Desk>) {
        self.wake_writer(lock(&self.paper));
    }

    fn wake_writer(self: &Arc<Desk>, mut paper: MutexGuard<Paper>) {
        let is_first = !std::mem::replace(&mut paper.writer_runs, true);
        drop(paper);
        self.changed.notify_all();
        if !is_first {
            return;
        }
        let desk = Arc::clone(self);
        if let Err(error) = spawn("journals".into(), move || Writer { desk: &desk }.work()) {
            lock(&self.paper).writer_runs = false;
            log!(Error, "no thread to write journals: {error}");
        }
    }

    /// Until all that has been noted by now was written, or could not be. For a disk that has hung
    /// for a while already nobody waits.
    pub(super) fn await_written(&self, within: Duration) {
        let paper = lock(&self.paper);
        let by_now = paper.noted;
        let pending = |paper: &mut Paper| paper.written < by_now && !paper.hangs();
        drop(wait(&self.changed, paper, within, pending));
    }

    /// Until the writer has nothing to do, or can do nothing.
    pub(super) fn await_idle(&self, within: Duration) {
        let paper = lock(&self.paper);
        let is_busy = |paper: &mut Paper| !paper.notes.is_empty() || paper.busy_since.is_some();
        drop(wait(&self.changed, paper, within, is_busy));
    }
}

/// The files that the writer has open.
#[derive(Default)]
struct Files {
    open: HashMap<Arc<Path>, OpenFile>,
    /// Said once, not once a line: a full disk is full for everybody.
    has_failed: bool,
}

#[derive(Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
struct OpenFile {
    file: Option<File>,
    is_locked: bool,
    /// Whole lines.
    unwritten: Vec<u8>,
    /// The last try ended in the middle of a line.
    ends_in_half: bool,
    to_sync: bool,
    /// Its name has not been synced yet.
    is_new: bool,
    is_incomplete: Option<Arc<AtomicBool>>,
}

/// Lines, files that somebody has claimed, and how many lines have been noted until then.
type Taken = (Vec<Note>, Vec<(Arc<Path>, File)>, u64);

struct Writer<'a> {
    desk: &'a Arc<Desk>,
}

/// Also of a writer that ends by a fault: the next line begins another one.
impl Drop for Writer<'_> {
    fn drop(&mut self) {
        let mut paper = lock(&self.desk.paper);
        (paper.writer_runs, paper.busy_since) = (false, None);
        paper.closing.clear();
    }
}

impl Writer<'_> {
    fn work(self) {
        loop {
            let Some((notes, claimed, count)) = self.next() else { return };
            let mut files = lock(&self.desk.files);
            for (path, file) in claimed {
                let open = files.open.entry(path).or_default();
                (open.file, open.is_locked) = (Some(file), true);
                open.ends_in_half = true;
            }
            for note in notes {
                let open = files.open.entry(note.path).or_default();
                open.unwritten.extend_from_slice(&note.line);
                open.to_sync |= note.sync;
                open.is_incomplete = Some(note.is_incomplete);
            }
            files.write(&self.desk.index);
            self.has_written(&files, count);
            files.sync_one();
            let away = self.put_away(&mut files);
            drop(files);
            // Closing may take its time too, and lets go of the locks.
            if !away.is_empty() {
                drop(away);
                lock(&self.desk.paper).closing.clear();
                self.desk.changed.notify_all();
            }
        }
    }

    /// Waits until there is something to do, and takes it from the desk.
    fn next(&self) -> Option<Taken> {
        let (has_unwritten, to_sync) = {
            let files = lock(&self.desk.files);
            let any = |is: fn(&OpenFile) -> bool| files.open.values().any(is);
            (any(|open| !open.unwritten.is_empty()), any(OpenFile::is_to_be_synced))
        };
        let mut paper = lock(&self.desk.paper);
        let pause = match (to_sync, has_unwritten) {
            (true, _) => Duration::ZERO,
            (false, true) => AGAIN_AFTER,
            (false, false) => Duration::MAX,
        };
        if !to_sync && paper.notes.is_empty() && !paper.is_untidy {
            (paper.busy_since, paper.hang_was_said) = (None, false);
            self.desk.changed.notify_all();
            let is_over = |paper: &Paper| paper.is_closed && paper.in_use.is_empty();
            let idle =
                |paper: &mut Paper| paper.notes.is_empty() && !paper.is_untidy && !is_over(paper);
            paper = wait(&self.desk.changed, paper, pause, idle);
            if is_over(&paper) && paper.notes.is_empty() {
                return None;
            }
        }
        paper.busy_since = Some(Instant::now());
        paper.is_untidy = false;
        paper.writers_bytes += std::mem::take(&mut paper.bytes);
        let claimed = paper.in_use.iter_mut();
        let claimed =
            claimed.filter_map(|(path, its)| Some((Arc::clone(path), its.claimed.take()?)));
        let claimed: Vec<_> = claimed.collect();
        let notes = std::mem::take(&mut paper.notes);
        // From now on it may be locked, and whoever claims it must not mistake us for others.
        for path in notes.iter().map(|note| &note.path).chain(claimed.iter().map(|(path, _)| path))
        {
            paper.in_use.entry(Arc::clone(path)).or_default().is_open = true;
        }
        Some((notes, claimed, paper.noted))
    }

    fn has_written(&self, files: &Files, noted: u64) {
        let mut paper = lock(&self.desk.paper);
        for (path, open) in &files.open {
            if let Some(its_use) = paper.in_use.get_mut(path) {
                its_use.is_open = open.file.is_some();
            }
        }
        paper.written = noted;
        paper.writers_bytes = files.open.values().map(|open| open.unwritten.len()).sum();
        // A sync that hangs is a disk that hangs.
        paper.busy_since = Some(Instant::now());
        drop(paper);
        self.desk.changed.notify_all();
    }

    /// Takes out the files that nobody has any more and that are complete.
    fn put_away(&self, files: &mut Files) -> Vec<OpenFile> {
        let mut paper = lock(&self.desk.paper);
        let is_done = |path: &Arc<Path>, open: &OpenFile| {
            let its_use = paper.in_use.get(path);
            let is_wanted = its_use.is_some_and(|its| its.handles > 0 || its.claimed.is_some());
            let is_noted = paper.notes.iter().any(|note| note.path == *path);
            open.unwritten.is_empty() && !open.to_sync && !is_wanted && !is_noted
        };
        let done = files.open.iter().filter(|(path, open)| is_done(path, open));
        let done: Vec<Arc<Path>> = done.map(|(path, _)| Arc::clone(path)).collect();
        for path in &done {
            paper.in_use.remove(path);
        }
        paper.closing.clone_from(&done);
        done.iter().filter_map(|path| files.open.remove(path)).collect()
    }
}

impl Files {
    fn write(&mut self, index: &Index) {
        let mut wrote = false;
        let mut failed = None;
        for (path, open) in &mut self.open {
            if open.unwritten.is_empty() {
                continue;
            }
            match open.write(path, index) {
                Ok(()) => wrote = true,
                Err(error) => failed = Some((path, error)),
            }
        }
        if let Some((path, error)) = failed {
            if !std::mem::replace(&mut self.has_failed, true) {
                let path = path.display();
                log!(Error, "{path}: {error}; calls go on, transcripts wait in memory only");
            }
        } else if wrote && std::mem::take(&mut self.has_failed) {
            log!(Info, "journals are written again, and what was missing in them too");
        }
    }

    fn sync_one(&mut self) {
        let Some((path, open)) = self.open.iter_mut().find(|(_, open)| open.is_to_be_synced())
        else {
            return;
        };
        open.to_sync = false;
        let synced = open.file.as_ref().map_or(Ok(()), File::sync_data);
        let directory = path.parent().filter(|_| std::mem::take(&mut open.is_new));
        let synced = synced
            .and_then(|()| directory.map_or(Ok(()), |directory| File::open(directory)?.sync_all()));
        match synced {
            // A pipe cannot be synced, and what was deleted need not be.
            Err(error)
                if !matches!(
                    error.kind(),
                    io::ErrorKind::InvalidInput | io::ErrorKind::NotFound
                ) =>
            {
                log!(Error, "{}: not certain to outlive a power cut: {error}", path.display());
            }
            Ok(()) | Err(_) => {}
        }
    }
}

impl OpenFile {
    fn is_to_be_synced(&self) -> bool {
        self.to_sync && self.unwritten.is_empty()
    }

    fn write(&mut self, path: &Path, index: &Index) -> io::Result<()> {
        // The system would take the lines, and nobody could ever read them.
        let was_deleted = self.file.is_some() && !path.exists();
        if was_deleted {
            self.file = None;
            if let Some(is_incomplete) = &self.is_incomplete {
                is_incomplete.store(true, Ordering::SeqCst);
            }
        }
        let appended = self.append(path, index);
        index.has_grown(path);
        appended?;
        if was_deleted { Err(io::Error::other("it was deleted")) } else { Ok(()) }
    }

    fn append(&mut self, path: &Path, index: &Index) -> io::Result<()> {
        if self.file.is_none() {
            self.file = Some(index.make(path, || open_to_append(path))?);
            (self.is_locked, self.ends_in_half) = (false, true);
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        if !self.is_locked {
            // Whoever has just looked at it lets go of it at once.
            self.is_locked = !matches!(file.try_lock(), Err(TryLockError::WouldBlock));
        }
        if self.ends_in_half {
            let ending = ending(file)?;
            if ending == Ending::Empty {
                self.is_new = true;
                if !self.unwritten.get(1..).is_some_and(|rest| rest.starts_with(VERSION)) {
                    self.unwritten.splice(1..1, VERSION.iter().copied());
                }
            } else if ending == Ending::HalfALine {
                file.write_all(b"\n")?;
            }
            self.ends_in_half = false;
        }
        let mut count = 0;
        let mut written = Ok(());
        while let Some(rest) = self.unwritten.get(count..).filter(|rest| !rest.is_empty())
            && written.is_ok()
        {
            match file.write(rest) {
                Ok(0) => written = Err(io::ErrorKind::WriteZero.into()),
                Ok(more) => count += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => written = Err(error),
            }
        }
        // The lines that are there whole are done with.
        let done = self.unwritten.get(..count).unwrap_or_default();
        let whole = done.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        self.ends_in_half = whole < count;
        self.unwritten.drain(..whole);
        written
    }
}

fn open_to_append(path: &Path) -> io::Result<File> {
    // What was said is nobody's business but the owner's.
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    OpenOptions::new().create(true).append(true).read(true).mode(0o600).open(path)
}

#[derive(PartialEq, Eq)]
enum Ending {
    Empty,
    WholeLine,
    /// A process died in the middle of a line, or a disk was full. It must not spoil the next one.
    HalfALine,
}

fn ending(file: &mut File) -> io::Result<Ending> {
    let mut last = [b'\n'];
    if file.metadata()?.len() == 0 {
        return Ok(Ending::Empty);
    }
    if file.seek(SeekFrom::End(-1)).is_ok() {
        file.read_exact(&mut last)?;
    }
    Ok(if last == *b"\n" { Ending::WholeLine } else { Ending::HalfALine })
}
