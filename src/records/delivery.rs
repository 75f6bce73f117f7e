//! One transcript on its way to n8n, and what is told of it in its journal.
//!
//! A [`Delivery`] is made when a call ends, or from a journal that an earlier process has left
//! behind. Each try begins with a [claim](Delivery::claim) on the journal, so that no two processes
//! deliver the same, and ends in a line of the journal that says what came of it. After a failed
//! one, `try_again` knows when the next is due. When that is, the [outbox](super::outbox) sees to.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::records::ended_by::EndedBy;
use crate::records::event::{Direction, Event};
use crate::records::journal::{Journal, Journals, sid_of};
use crate::records::past::PastCall;
use crate::records::tap::Tap;
use crate::records::transcript::Transcript;
use crate::setup::settings::Config;
use crate::toolbox::failure::Failure;
use crate::toolbox::log::log;
use crate::toolbox::random::random_bytes;

/// A call whose process died may be taken up for this long. Then its transcript is filed as it is.
const TAKE_UP_WITHIN: Duration = Duration::from_mins(1);
/// The longest that Twilio lets a transferred call last. Then its transcript is filed.
pub(crate) const TRANSFER_MAX: Duration = Duration::from_hours(4);
/// A transcript's delivery to n8n.
pub(crate) const DELIVER_WITHIN: Duration = Duration::from_secs(10);
/// The first pause after a failed delivery; it doubles up to the second figure.
const DELIVER_AGAIN_MIN: Duration = Duration::from_secs(5);
pub(super) const DELIVER_AGAIN_MAX: Duration = Duration::from_mins(15);
/// A transcript that n8n has not taken for this long is kept and reported, and not tried again
/// unless `callbridge outbox --retry` says so.
pub(super) const DELIVER_FOR: Duration = Duration::from_hours(72);

/// How long a call that was put through to a person may come back. The page's phone rings nobody:
/// whoever tries a transfer with it says within a minute what came of it, or has closed the page.
fn transfer_max(direction: Direction) -> Duration {
    match direction {
        Direction::In | Direction::Out => TRANSFER_MAX,
        Direction::Browser => TAKE_UP_WITHIN,
    }
}

/// Whose journal it is at the moment.
pub(crate) enum Claim {
    Ours,
    /// Somebody has it: its call goes on, or it is just being delivered.
    Held,
    /// Somebody was faster.
    Delivered,
}

/// A transcript to deliver.
pub(crate) struct Delivery {
    pub(crate) sid: String,
    pub(crate) number: String,
    direction: Direction,
    pub(crate) transcript: Transcript,
    pub(crate) ended_by: EndedBy,
    path: PathBuf,
    /// Only while it is being delivered: there may be more to deliver than files can be open.
    journal: Option<Journal>,
    /// The call may still go on: its process died, or its caller is being put through.
    unfinished: bool,
    tries: u32,
    due: Instant,
    since: Instant,
}

impl Delivery {
    /// For a call that has just ended, unless its caller is being put through: they may come back.
    pub(crate) fn new(
        (sid, number, direction): (&str, &str, Direction),
        transcript: Transcript,
        ended_by: EndedBy,
        journal: &Journal,
    ) -> Delivery {
        let unfinished = ended_by == EndedBy::Transferred;
        let wait = if unfinished { transfer_max(direction) } else { Duration::ZERO };
        Delivery {
            sid: sid.to_owned(),
            number: number.to_owned(),
            direction,
            transcript,
            ended_by,
            path: journal.path().to_owned(),
            // A transferred call is nobody's until it comes back.
            journal: (!unfinished).then(|| journal.clone()),
            unfinished,
            tries: 0,
            due: Instant::now() + wait,
            since: Instant::now(),
        }
    }

    /// What an earlier process has not delivered. A call without an end may be taken up first.
    pub(crate) fn left_behind(past: PastCall, path: PathBuf) -> Delivery {
        let (ended_by, may_go_on_for) = match (past.ended_by, past.transferred) {
            (None, true) => (EndedBy::Transferred, transfer_max(past.direction)),
            (None, false) => (EndedBy::ProcessDied, TAKE_UP_WITHIN),
            (Some(ended_by), _) => (ended_by, Duration::ZERO),
        };
        // A journal whose first line is spoilt still has a name.
        let sid = if past.sid.is_empty() { sid_of(&path).to_owned() } else { past.sid };
        Delivery {
            sid,
            number: past.number,
            direction: past.direction,
            transcript: past.transcript,
            ended_by,
            path,
            journal: None,
            unfinished: past.ended_by.is_none(),
            tries: 0,
            due: Instant::now() + may_go_on_for.saturating_sub(past.quiet_for),
            since: Instant::now().checked_sub(past.quiet_for).unwrap_or_else(Instant::now),
        }
    }

    /// Before a try. Whatever another process has written meanwhile counts.
    pub(crate) fn claim(&mut self, journals: &Journals) -> Claim {
        if self.journal.is_some() {
            return Claim::Ours;
        }
        let Ok(journal) = journals.claim(&self.path) else { return Claim::Held };
        match PastCall::read(&self.path) {
            Ok(past) if past.delivered => return Claim::Delivered,
            Ok(past) if past.sid == self.sid => {
                self.unfinished &= past.ended_by.is_none();
                self.ended_by = past.ended_by.unwrap_or(self.ended_by);
                if past.transcript.utterances().len() >= self.transcript.utterances().len() {
                    self.transcript = past.transcript;
                }
            }
            Ok(_) | Err(_) => journal.lacks_something(),
        }
        self.journal = Some(journal);
        Claim::Ours
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn due(&self) -> Instant {
        self.due
    }

    pub(super) fn is_due_in(&mut self, pause: Duration) {
        self.due = Instant::now() + pause;
    }

    pub(super) fn since(&self) -> Instant {
        self.since
    }

    /// The page is shown only the first of many tries.
    pub(crate) fn tap(&self, config: &Arc<Config>) -> Tap {
        match &self.journal {
            Some(journal) if self.is_first_try() => Tap::new(journal.clone(), Arc::clone(config)),
            Some(_) | None => Tap::closed(),
        }
    }

    pub(super) fn is_first_try(&self) -> bool {
        self.tries == 0
    }

    /// Nothing was known of an end of this call until now.
    pub(crate) fn is_unfinished(&self) -> bool {
        self.unfinished
    }

    /// The call has come to its end.
    pub(crate) fn finish(&mut self) {
        self.unfinished = false;
        self.note(&Event::End { ended_by: self.ended_by });
    }

    /// A journal that was deleted under our feet, or has lost lines, is completed with all that is
    /// known.
    pub(crate) fn note(&self, event: &Event) {
        let Some(journal) = &self.journal else { return };
        if journal.is_to_be_completed() {
            let (call_sid, number) = (self.sid.clone(), self.number.clone());
            let (direction, to) = (self.direction, String::new());
            journal.note(&Event::Ring { call_sid, number, direction, to });
            for utterance in self.transcript.utterances() {
                journal.note(&Event::Said(utterance.clone()));
            }
            journal.note(&Event::End { ended_by: self.ended_by });
        }
        journal.note(event);
        // What is said of it in the log is on disk by then.
        journal.settle();
    }

    pub(super) fn try_again(mut self, failure: &Failure) -> Option<Delivery> {
        self.tries += 1;
        self.note(&Event::Undelivered { why: failure.to_string() });
        self.journal = None;
        let path = self.path.display();
        if self.since.elapsed() > DELIVER_FOR {
            log!(
                self,
                Error,
                After,
                "{failure}; the transcript stays in {path} (callbridge outbox)"
            );
            return None;
        }
        let doubled = DELIVER_AGAIN_MIN * 2_u32.saturating_pow((self.tries - 1).min(16));
        // A quarter more or less, so that many do not come back in the same moment.
        let [dice] = random_bytes();
        let pause = doubled.min(DELIVER_AGAIN_MAX) * (192 + u32::from(dice) / 2) / 256;
        let seconds = pause.as_secs();
        log!(
            self,
            Warn,
            After,
            "{failure}; the transcript stays in {path}, next try in {seconds} s";
            seconds
        );
        self.is_due_in(pause);
        Some(self)
    }
}

#[cfg(test)]
mod tests;
