//! Journals, read back.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde::Deserialize as _;
use serde_json::Value;

use crate::records::journal::Direction;
use crate::records::transcript::{Heard, Speaker, Transcript};
use crate::toolbox::time::since;

/// Of a journal in one answer of `/calls/{sid}`, give or take a line. The page asks for the rest.
pub(crate) const STORY_BYTES_MAX: u64 = 512 * 1_024;

/// A journal, read back.
#[derive(Default)]
pub(crate) struct Filed {
    pub(crate) sid: String,
    pub(crate) number: String,
    pub(crate) direction: Direction,
    pub(crate) began: Option<Timestamp>,
    pub(crate) ended: Option<Timestamp>,
    pub(crate) stage: String,
    pub(crate) agent_id: String,
    pub(crate) agents: u64,
    pub(crate) ended_by: String,
    /// The caller was put through to a person, and what came of it is not known yet.
    pub(crate) transferred: bool,
    pub(crate) transcript: Transcript,
    pub(crate) delivered: bool,
    /// Why n8n has not taken it, at the last try.
    pub(crate) trouble: String,
    /// Since the first line, and since the last.
    pub(crate) age: Duration,
    pub(crate) quiet_for: Duration,
}

impl Filed {
    /// A half-written last line is what a sudden end leaves behind. It is skipped, and so is any
    /// other line that cannot be read.
    pub(crate) fn read(path: &Path) -> io::Result<Filed> {
        let text = String::from_utf8_lossy(&fs::read(path)?).into_owned();
        let mut filed = Filed::default();
        // A journal's bulk, and nothing that anybody has to know again. In a text of another
        // event these quotes would have backslashes before them; a tool's arguments may hold them
        // as they are, and such a line is nothing to go on from either.
        let lines = text.lines().filter(|line| !line.contains("\"event\":\"wire\""));
        for event in lines.filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let what = event["event"].as_str().unwrap_or_default();
            // A try to deliver is nothing that happened in the call, and makes it no younger.
            if let Some(at) = event["at"].as_str().and_then(|at| at.parse().ok())
                && what != "undelivered"
            {
                filed.quiet_for = since(at);
                filed.age = since(*filed.began.get_or_insert(at));
                if what != "delivered" {
                    filed.ended = Some(at);
                }
            }
            filed.apply(&event);
        }
        Ok(filed)
    }

    pub(crate) fn apply(&mut self, event: &Value) {
        let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
        let number = |key: &str| event[key].as_u64().unwrap_or_default();
        match event["event"].as_str().unwrap_or_default() {
            "ring" => {
                (self.sid, self.number) = (text("callSid"), text("number"));
                self.direction = Direction::deserialize(&event["direction"]).unwrap_or_default();
            }
            "agent" => {
                (self.agent_id, self.agents) = (text("callId"), number("agent"));
                self.transferred = false;
            }
            "stage" => self.stage = text("stage"),
            "said" => {
                let heard = Heard {
                    speaker: if text("speaker") == "Agent" {
                        Speaker::Agent
                    } else {
                        Speaker::User
                    },
                    ordinal: number("ordinal"),
                    text: Some(text("text")),
                    delta: None,
                    finished: true,
                    typed: false,
                };
                self.transcript.hear(number("agent"), &heard);
            }
            "transfer" => self.transferred = true,
            "end" => self.ended_by = text("endedBy"),
            "undelivered" => self.trouble = text("why"),
            "delivered" => self.delivered = true,
            _ => {}
        }
    }
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

/// Of nearly all journals the last line is all that has to be read again.
pub(crate) fn delivered_at(path: &Path) -> Option<Timestamp> {
    const LINE_BYTES_MAX: u64 = 256;
    let mut file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LINE_BYTES_MAX))).ok()?;
    let mut end = Vec::new();
    file.take(LINE_BYTES_MAX).read_to_end(&mut end).ok()?;
    let line = end.strip_suffix(b"\n")?.rsplit(|&byte| byte == b'\n').next()?;
    let event: Value = serde_json::from_slice(line).ok()?;
    if event["event"] != "delivered" {
        return None;
    }
    event["at"].as_str()?.parse().ok()
}

/// A piece of a journal: whole lines only.
#[derive(Default)]
pub(crate) struct Chapter {
    pub(crate) from: u64,
    pub(crate) next: u64,
    pub(crate) more: bool,
    pub(crate) events: Vec<Value>,
}

impl Chapter {
    /// An offset that is not the beginning of a line here belongs to another file, such as one
    /// that was deleted since: the story then begins anew.
    pub(crate) fn read(path: &Path, from: u64) -> io::Result<Chapter> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut file = BufReader::new(file);
        let mut before = [b'\n'];
        if from > 0 && from <= length {
            file.seek(SeekFrom::Start(from - 1))?;
            file.read_exact(&mut before)?;
        }
        let from = if from > length || before != *b"\n" { 0 } else { from };
        file.seek(SeekFrom::Start(from))?;
        let mut chapter = Chapter { from, next: from, ..Chapter::default() };
        let mut line = Vec::new();
        while chapter.next - from < STORY_BYTES_MAX {
            line.clear();
            let count = file.read_until(b'\n', &mut line)?;
            if line.last() != Some(&b'\n') {
                // The rest of it is still being written.
                return Ok(chapter);
            }
            chapter.next += count as u64;
            chapter.events.extend(serde_json::from_slice::<Value>(&line).ok());
        }
        chapter.more = chapter.next < length;
        Ok(chapter)
    }
}

#[cfg(test)]
mod tests;
