//! Journals, read back: by the process that comes after, and by the live page.
//!
//! A [`PastCall`] is what a journal says of its call in sum: enough to take the call up again, to
//! file its transcript, and for a line in the page's list. A [`JournalSlice`] is a piece of a
//! journal, event by event, for the page's story of one call.
//!
//! Reading never fails for what stands in a file. A half-written last line is what a sudden end
//! leaves behind; it is skipped, and so is any other line that cannot be read.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read, Seek as _, SeekFrom};
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use serde::Deserialize as _;
use serde_json::Value;

use crate::records::ended_by::EndedBy;
use crate::records::event::{Direction, Event, Transfer};
use crate::records::report::Report;
use crate::records::tally::Tally;
use crate::records::transcript::Transcript;
use crate::toolbox::time::since;

/// Of a journal in one answer of `/calls/{sid}`, give or take a line. The page asks for the rest.
const STORY_BYTES_MAX: u64 = 512 * 1_024;

/// A journal, read back.
#[derive(Default)]
pub(crate) struct PastCall {
    pub(crate) sid: String,
    pub(crate) number: String,
    /// The number that was called.
    pub(crate) to: String,
    pub(crate) direction: Direction,
    pub(crate) began: Option<Timestamp>,
    pub(crate) ended: Option<Timestamp>,
    pub(crate) stage: String,
    /// What n8n knew when it rang.
    pub(crate) facts: String,
    /// Ordered for a call that goes out.
    pub(crate) first_message: String,
    /// There was a stream, so the agent has said hello.
    pub(crate) was_answered: bool,
    pub(crate) agent_id: String,
    pub(crate) agents: u64,
    /// Ultravox's ids of all of them.
    pub(crate) agent_ids: Vec<String>,
    /// None: it did not end, as far as the journal knows.
    pub(crate) ended_by: Option<EndedBy>,
    /// The caller is being put through to this person, and nobody has taken the call up since.
    pub(crate) transfer: Option<Transfer>,
    /// That person has taken the call.
    pub(crate) accepted: bool,
    pub(crate) transcript: Transcript,
    pub(crate) tally: Tally,
    pub(crate) report: Report,
    pub(crate) delivered: bool,
    /// Why n8n has not taken it, at the last try.
    pub(crate) trouble: String,
    /// Since the first line, and since the last.
    pub(crate) age: Duration,
    pub(crate) quiet_for: Duration,
    /// The last that happened before its end was noted.
    last_event: Option<Timestamp>,
}

impl PastCall {
    pub(crate) fn read(path: &Path) -> io::Result<PastCall> {
        let text = String::from_utf8_lossy(&fs::read(path)?).into_owned();
        let mut past = PastCall::default();
        // A journal's bulk, and nothing that anybody has to know again. In a text of another
        // event these quotes would have backslashes before them; a tool's arguments may hold them
        // as they are, and such a line is nothing to go on from either.
        let lines = text.lines().filter(|line| !line.contains("\"event\":\"wire\""));
        for line in lines.filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let event = Event::deserialize(&line).ok();
            past.note_time(&line, event.as_ref());
            if let Some(event) = event {
                past.apply(event);
            }
        }
        if let Some((began, last)) = past.began.zip(past.last_event) {
            past.report.lasted_until(last.duration_since(began).try_into().unwrap_or_default());
        }
        Ok(past)
    }

    fn note_time(&mut self, line: &Value, event: Option<&Event>) {
        // A try to deliver is nothing that happened in the call, and makes it no younger.
        if matches!(event, Some(Event::Undelivered { .. } | Event::Summary { .. })) {
            return;
        }
        if let Some(at) = line["at"].as_str().and_then(|at| at.parse().ok()) {
            self.quiet_for = since(at);
            self.age = since(*self.began.get_or_insert(at));
            if !matches!(event, Some(Event::Delivered)) {
                self.ended = Some(at);
            }
            if !matches!(event, Some(Event::Transfer(_) | Event::End { .. } | Event::Delivered)) {
                self.last_event = Some(at);
            }
        }
    }

    /// Emptied by `callbridge forget`, so that a running server does not deliver it.
    pub(crate) fn is_forgotten(&self) -> bool {
        self.sid.is_empty() && self.delivered
    }

    /// What becomes of a call that nobody takes up again.
    pub(crate) fn came_to(&self) -> EndedBy {
        match (self.ended_by, &self.transfer) {
            (Some(ended_by), _) => ended_by,
            (None, Some(_)) if self.accepted => EndedBy::Transferred,
            (None, Some(_)) => EndedBy::CallerLeft,
            (None, None) => EndedBy::ProcessDied,
        }
    }

    pub(crate) fn apply(&mut self, event: Event) {
        self.tally.apply(&event);
        self.report.apply(&event);
        match event {
            Event::Ring { call_sid, number, direction, to } => {
                (self.sid, self.number, self.direction) = (call_sid, number, direction);
                self.to = to;
            }
            Event::Decided { stage, facts, .. } => (self.stage, self.facts) = (stage, facts),
            Event::Ordered { call_sid, number, first_message } => {
                (self.sid, self.number, self.direction) = (call_sid, number, Direction::Out);
                self.first_message = first_message;
            }
            Event::Agent { call_id, agent, .. } => {
                self.agent_ids.push(call_id.clone());
                (self.agent_id, self.agents) = (call_id, agent);
                (self.transfer, self.accepted) = (None, false);
            }
            Event::Stream { .. } => self.was_answered = true,
            Event::Stage { stage } => self.stage = stage,
            Event::Said(utterance) => self.transcript.remember(utterance),
            Event::Transfer(transfer) => self.transfer = Some(transfer),
            Event::Accepted => self.accepted = true,
            Event::End { ended_by } => self.ended_by = Some(ended_by),
            Event::Undelivered { why } => self.trouble = why,
            Event::Delivered => self.delivered = true,
            Event::Greeting { .. }
            | Event::Answer { .. }
            | Event::FirstWord { .. }
            | Event::Turn { .. }
            | Event::ToolBegins { .. }
            | Event::Tool { .. }
            | Event::Failed { .. }
            | Event::Status { .. }
            | Event::Goodbye { .. }
            | Event::Summary { .. }
            | Event::Wire { .. } => {}
        }
    }
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
pub(crate) struct JournalSlice {
    pub(crate) from: u64,
    pub(crate) next: u64,
    pub(crate) more: bool,
    pub(crate) events: Vec<Value>,
}

impl JournalSlice {
    /// An offset that is not the beginning of a line here belongs to another file, such as one
    /// that was deleted since: the story then begins anew.
    pub(crate) fn read(path: &Path, from: u64) -> io::Result<JournalSlice> {
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
        let mut slice = JournalSlice { from, next: from, ..JournalSlice::default() };
        let mut line = Vec::new();
        while slice.next - from < STORY_BYTES_MAX {
            line.clear();
            let count = file.read_until(b'\n', &mut line)?;
            if line.last() != Some(&b'\n') {
                // The rest of it is still being written.
                return Ok(slice);
            }
            slice.next += count as u64;
            slice.events.extend(serde_json::from_slice::<Value>(&line).ok());
        }
        slice.more = slice.next < length;
        Ok(slice)
    }
}

#[cfg(test)]
mod tests;
