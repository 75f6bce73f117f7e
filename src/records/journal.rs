//! A call's file on disk: `DATA_DIR/calls/<start time>-<CallSid>.jsonl`, one [`Event`] a line.
//!
//! It is written as the call happens, and is the transcript's home until n8n has it, all that a
//! restarted process knows, and what the live page shows. Whoever has a [`Journal`] notes events
//! in it:
//!
//! ```text
//! call.journal.note(&Event::Stage { stage: "main_convo".into() });
//! ```
//!
//! Noting never fails for the caller of it: a disk that takes nothing is reported once, and the
//! call goes on. The files are readable by their owner only. Reading is [`past`](super::past)'s.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek as _, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::Timestamp;
use serde::Serialize;

use crate::records::event::Event;
use crate::toolbox::log::log;
use crate::toolbox::text::by_the_calendar;
use crate::toolbox::threads::lock;

/// A message in a journal, and a tool's arguments and result there. What is longer is cut.
pub(crate) const WIRE_CHARS_MAX: usize = 2_000;

pub(crate) struct Journal {
    path: PathBuf,
    file: Mutex<Option<File>>,
}

/// Said once, not once a line: a full disk is full for everybody.
static DISK_FAILED: AtomicBool = AtomicBool::new(false);

impl Journal {
    /// Of a call that begins now.
    pub(crate) fn begin(data_dir: &Path, sid: &str) -> Journal {
        let start = Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
        Journal::at(data_dir.join("calls").join(format!("{start}-{sid}.jsonl")))
    }

    /// The file is made with the first line.
    pub(crate) fn at(path: PathBuf) -> Journal {
        Journal { path, file: Mutex::new(None) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Calls go on when the disk does not: the transcript is in memory as well.
    pub(crate) fn note(&self, event: &Event) {
        let mut file = lock(&self.file);
        let written = match file.as_mut() {
            // The system would take the line, and nobody could ever read it.
            Some(_) if !self.path.exists() => Err(io::Error::other("it was deleted")),
            Some(opened) => append(opened, event),
            None => {
                open_to_append(&self.path).and_then(|opened| append(file.insert(opened), event))
            }
        };
        if written.is_err() {
            // Half the line may be there: opening the file again ends it.
            *file = None;
        }
        match written {
            Ok(()) => DISK_FAILED.store(false, Ordering::SeqCst),
            Err(error) if !DISK_FAILED.swap(true, Ordering::SeqCst) => {
                let path = self.path.display();
                log!(Error, "{path}: {error}; calls go on, transcripts wait in memory only");
            }
            Err(_) => {}
        }
    }
}

fn open_to_append(path: &Path) -> io::Result<File> {
    // What was said is nobody's business but the owner's.
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    let mut file =
        OpenOptions::new().create(true).append(true).read(true).mode(0o600).open(path)?;
    // A process that died in the middle of a line must not spoil ours.
    let mut last = [b'\n'];
    if file.seek(SeekFrom::End(-1)).is_ok() {
        file.read_exact(&mut last)?;
    }
    if last != *b"\n" {
        file.write_all(b"\n")?;
    }
    Ok(file)
}

/// One `write` for the whole line, so that a death in between leaves half a line at the end and
/// nothing else.
fn append(file: &mut File, event: &Event) -> io::Result<()> {
    #[derive(Serialize)]
    struct Line<'a> {
        at: String,
        #[serde(flatten)]
        event: &'a Event,
    }
    let mut line = serde_json::to_vec(&Line { at: by_the_calendar(Timestamp::now()), event })?;
    line.push(b'\n');
    file.write_all(&line)
}

pub(crate) fn journal_of(data_dir: &Path, sid: &str) -> Option<PathBuf> {
    journals(data_dir).into_iter().rfind(|path| sid_of(path) == sid)
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

pub(crate) fn sid_of(journal: &Path) -> &str {
    let name = journal.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
    name.rsplit_once('-').map(|(_, sid)| sid).unwrap_or_default()
}

#[cfg(test)]
mod tests;
