//! A call's file on disk, one line an event.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek as _, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::toolbox::log::log;
use crate::toolbox::threads::lock;
use crate::toolbox::time::by_the_calendar;

/// A message in a journal, and a tool's arguments and result there. What is longer is cut.
pub(crate) const WIRE_CHARS_MAX: usize = 2_000;

/// Who has called whom. The same word goes to the journal and to the page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Direction {
    /// Somebody our number.
    #[default]
    In,
    /// We somebody.
    Out,
    /// The owner us, with the phone in the live page.
    Browser,
}

/// How a call ended. The same word goes to the log, the journal and n8n.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HangUp {
    /// There was nobody to answer: Ultravox refused, or could not be reached.
    NoAgent,
    /// The caller went away while it rang, or Twilio never opened the stream.
    NeverStreamed,
    CallerLeft,
    /// The caller's socket broke, or fell silent.
    CallerLost,
    /// The agent said goodbye and used its hang-up tool.
    AgentHungUp,
    /// Ultravox closed in an orderly way: nobody spoke for long, or its time limit.
    AgentLeft,
    /// Ultravox's socket broke.
    AgentLost,
    /// `MAX_CALL_SECONDS`.
    TooLong,
    /// The caller was put through to a person.
    Transferred,
    /// An answering machine has picked up our call.
    Machine,
    /// This process was told to stop, and the call did not end by itself in time.
    ShuttingDown,
    /// The process that carried it died, and nobody took the call up again.
    ProcessDied,
}

#[cfg(test)]
impl HangUp {
    pub(crate) const ALL: [HangUp; 12] = [
        HangUp::NoAgent,
        HangUp::NeverStreamed,
        HangUp::CallerLeft,
        HangUp::CallerLost,
        HangUp::AgentHungUp,
        HangUp::AgentLeft,
        HangUp::AgentLost,
        HangUp::TooLong,
        HangUp::Transferred,
        HangUp::Machine,
        HangUp::ShuttingDown,
        HangUp::ProcessDied,
    ];
}

pub(crate) fn end_event(ended_by: HangUp) -> Value {
    json!({"event": "end", "endedBy": format!("{ended_by:?}")})
}

/// A call's file: `DATA_DIR/calls/<start time>-<CallSid>.jsonl`, one line an event, written as it
/// happens. The transcript's home until n8n has it, all that a restarted process knows, and what
/// the live page shows.
///
/// Each line is a JSON object with `at`, the time, and `event`:
///
/// | event | step | with it comes |
/// |---|---|---|
/// | `ring` | 1 | `callSid`, `number`, `direction` (`in`, `out`, `browser`) |
/// | `greeting` | 2 | `from` (`n8n`, `default`, `order`), `ms`, `why` when not n8n's |
/// | `agent` | 3 | `callId` (Ultravox's), `agent`: which one of this call, from 1 |
/// | `answer` | 4 | `what` (`stream`, `apology`, `transfer`), `ms` since the ring |
/// | `stream` | 5 | `streamSid`; once more for each further stream |
/// | `first_word` | 6 | `ms` from the stream's start to the agent's first sound |
/// | `said` | 6 | `agent`, `ordinal`, `speaker`, `text`; of the same three the last one counts |
/// | `tool_begins` | 7 | as for `tool`, of a tool that takes its time |
/// | `tool` | 7 | `id`, `tool`, `stage`, `arguments`, `result`, `outcome`, `ms` |
/// | `stage` | 7 | `stage`, which has been entered |
/// | `status` | - | `status`, `answeredBy`: what Twilio reports |
/// | `goodbye` | 8 | `endedBy` (a [`HangUp`]), `ms` since the ring |
/// | `transfer` | 8 | the caller is being put through to a person |
/// | `end` | 9 | `endedBy`, which is final |
/// | `undelivered` | 9 | `why`: n8n did not take the transcript |
/// | `delivered` | 9 | n8n has it, or there was nothing to deliver |
/// | `wire` | any | `step`, `way` (`in`, `out`), `with`, `text`: the first message of a kind |
pub(crate) struct Journal {
    pub(crate) path: PathBuf,
    pub(crate) file: Mutex<Option<File>>,
}

/// Said once, not once a line: a full disk is full for everybody.
pub(crate) static DISK_FAILED: AtomicBool = AtomicBool::new(false);

impl Journal {
    pub(crate) fn path(data_dir: &Path, sid: &str) -> PathBuf {
        let start = Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
        data_dir.join("calls").join(format!("{start}-{sid}.jsonl"))
    }

    /// The file is made with the first line.
    pub(crate) fn at(path: PathBuf) -> Journal {
        Journal { path, file: Mutex::new(None) }
    }

    /// Calls go on when the disk does not: the transcript is in memory as well.
    pub(crate) fn note(&self, event: &Value) {
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

pub(crate) fn open_to_append(path: &Path) -> io::Result<File> {
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
pub(crate) fn append(file: &mut File, event: &Value) -> io::Result<()> {
    let mut line = json!({"at": by_the_calendar(Timestamp::now())});
    if let (Value::Object(line), Value::Object(event)) = (&mut line, event) {
        line.extend(event.clone());
    }
    file.write_all(format!("{line}\n").as_bytes())
}

#[cfg(test)]
mod tests;
