//! What n8n is still to get, and when it is offered the next time.
//!
//! Calls that end `add` their [`Delivery`]. Several threads take out what is due, the oldest first,
//! and give it to the function with which the outbox was started: that one knows n8n, and decides
//! what becomes of a transcript (`file_transcript`, step 9). What could not be delivered is kept
//! here and tried again after a pause that grows, also by the next process, from the journals.
//!
//! ```text
//! outbox.start(|sid| calls.knows(sid), |delivery| file_transcript(bridge, delivery))?;
//! ```
//!
//! The outbox never speaks to anybody itself, and never gives a transcript up: what is not taken
//! for [`DELIVER_FOR`] stays on disk and is reported.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{fs, io};

use crate::records::ended_by::EndedBy;
use crate::records::event::{Direction, Event};
use crate::records::journal::{Journal, journals, sid_of};
use crate::records::past::{PastCall, delivered_at};
use crate::records::tap::Tap;
use crate::records::transcript::Transcript;
use crate::setup::settings::Config;
use crate::toolbox::failure::Failure;
use crate::toolbox::log::log;
use crate::toolbox::random::random_bytes;
use crate::toolbox::text::since;
use crate::toolbox::threads::{lock, spawn};

/// A call whose process died may be taken up for this long. Then its transcript is filed as it is.
const TAKE_UP_WITHIN: Duration = Duration::from_mins(1);
/// The longest that Twilio lets a transferred call last. Then its transcript is filed.
pub(crate) const TRANSFER_MAX: Duration = Duration::from_hours(4);
/// A transcript's delivery to n8n.
pub(crate) const DELIVER_WITHIN: Duration = Duration::from_secs(10);
/// The first pause after a failed delivery; it doubles up to the second figure.
const DELIVER_AGAIN_MIN: Duration = Duration::from_secs(5);
const DELIVER_AGAIN_MAX: Duration = Duration::from_mins(15);
/// A transcript that n8n has not taken for this long is kept and reported, and not tried again
/// unless `callbridge outbox --retry` says so.
const DELIVER_FOR: Duration = Duration::from_hours(72);
/// Deliveries at the same time, so that a hanging one does not hold up the others.
const DELIVERIES_AT_ONCE: usize = 4;

/// How long a call that was put through to a person may come back. The page's phone rings nobody:
/// whoever tries a transfer with it says within a minute what came of it, or has closed the page.
fn transfer_max(direction: Direction) -> Duration {
    match direction {
        Direction::In | Direction::Out => TRANSFER_MAX,
        Direction::Browser => TAKE_UP_WITHIN,
    }
}

pub(crate) struct Outbox {
    data_dir: PathBuf,
    keep: Duration,
    has_n8n: bool,
    deliveries: Mutex<Deliveries>,
    changed: Condvar,
    /// Transcripts that are kept and no longer tried, when the journals were last looked through.
    given_up: AtomicUsize,
}

#[derive(Default)]
struct Deliveries {
    waiting: Vec<Delivery>,
    /// Since when each of those has been waiting that are being delivered now.
    on_the_way: Vec<Instant>,
    /// What earlier processes have left behind is complete.
    all_read: bool,
    /// Until then: calls of which nothing more will come.
    over: HashSet<String>,
}

impl Outbox {
    pub(crate) fn new(config: &Config) -> Outbox {
        Outbox {
            data_dir: config.data_dir.clone(),
            keep: config.keep,
            has_n8n: config.n8n_webhook_url.is_some(),
            deliveries: Mutex::default(),
            changed: Condvar::new(),
            given_up: AtomicUsize::new(0),
        }
    }

    /// Reads what earlier processes have left behind, all of it before the first delivery: so the
    /// oldest goes first. `is_ours` tells whether a call is, or was, one of this process: calls come
    /// in while the journals are still being read. `file` makes one try, and fails if there is to be
    /// another.
    pub(crate) fn start(
        &'static self,
        is_ours: impl Fn(&str) -> bool,
        file: impl Fn(&mut Delivery) -> Result<(), Failure> + Send + Sync + 'static,
    ) -> io::Result<()> {
        let began = Instant::now();
        let mut journals = 0;
        self.tidy(|past, path| {
            journals += 1;
            self.add_left_behind(Delivery::left_behind(past, path), &is_ours);
        });
        self.is_all_read();
        let (given_up, ms) = (self.given_up(), began.elapsed().as_millis());
        log!(Debug, "{journals} journals of calls that are not filed, read in {ms} ms"; journals, ms);
        if given_up > 0 {
            log!(
                Error,
                "{given_up} transcripts were never delivered: see callbridge outbox"; given_up
            );
        }
        let file = Arc::new(file);
        for _ in 0..DELIVERIES_AT_ONCE {
            let file = Arc::clone(&file);
            spawn("outbox".into(), move || {
                loop {
                    let mut delivery = self.next();
                    let since = delivery.since;
                    let again = match file(&mut delivery) {
                        Ok(()) => None,
                        Err(failure) => delivery.try_again(&failure),
                    };
                    self.done(since, again);
                }
            })?;
        }
        Ok(())
    }

    /// At the start, and once a day: journals that nobody needs any more are removed. `waits` is
    /// given those whose transcript n8n is still to get, the oldest first.
    pub(crate) fn tidy(&self, mut waits: impl FnMut(PastCall, PathBuf)) {
        let mut too_old = 0;
        for path in journals(&self.data_dir) {
            if let Some(at) = delivered_at(&path) {
                self.remove_if_old(&path, since(at));
                continue;
            }
            match PastCall::read(&path) {
                Ok(past) if past.delivered => self.remove_if_old(&path, past.quiet_for),
                Ok(past) if past.quiet_for > DELIVER_FOR => too_old += 1,
                Ok(past) => waits(past, path),
                Err(error) => log!(Warn, "{}: cannot be read: {error}", path.display()),
            }
        }
        // Without n8n they are where their owner wants them.
        self.given_up.store(if self.has_n8n { too_old } else { 0 }, Ordering::Relaxed);
    }

    fn remove_if_old(&self, path: &Path, quiet_for: Duration) {
        if quiet_for > self.keep
            && let Err(error) = fs::remove_file(path)
        {
            log!(Warn, "{}: cannot be removed: {error}", path.display());
        }
    }

    pub(crate) fn add(&self, delivery: Delivery) {
        lock(&self.deliveries).waiting.push(delivery);
        self.changed.notify_all();
    }

    /// A call of this process files itself. Asked under the lock, because whoever takes a call up
    /// takes its slot first and calls `forget` then.
    fn add_left_behind(&self, mut delivery: Delivery, is_ours: impl Fn(&str) -> bool) {
        let mut deliveries = lock(&self.deliveries);
        if deliveries.over.contains(&delivery.sid) {
            delivery.due = Instant::now();
        }
        if !is_ours(&delivery.sid) {
            deliveries.waiting.push(delivery);
        }
    }

    fn is_all_read(&self) {
        let mut deliveries = lock(&self.deliveries);
        deliveries.all_read = true;
        deliveries.over = HashSet::new();
    }

    /// A call of which nothing more will come.
    pub(crate) fn file_now(&self, sid: &str) {
        let mut deliveries = lock(&self.deliveries);
        if !deliveries.all_read {
            deliveries.over.insert(sid.to_owned());
        }
        for delivery in deliveries.waiting.iter_mut().filter(|delivery| delivery.sid == sid) {
            delivery.due = Instant::now();
        }
        drop(deliveries);
        self.changed.notify_all();
    }

    /// A call that goes on after all. It files itself when it ends, and then has more to tell.
    pub(crate) fn forget(&self, sid: &str) {
        let mut deliveries = lock(&self.deliveries);
        deliveries.waiting.retain(|delivery| !(delivery.unfinished && delivery.sid == sid));
    }

    /// Sleeps until something is due, and takes it out. The oldest first.
    fn next(&self) -> Delivery {
        let mut deliveries = lock(&self.deliveries);
        loop {
            let now = Instant::now();
            if let Some(due) = deliveries.waiting.iter().position(|delivery| delivery.due <= now) {
                let delivery = deliveries.waiting.remove(due);
                deliveries.on_the_way.push(delivery.since);
                return delivery;
            }
            let earliest = deliveries.waiting.iter().map(|delivery| delivery.due).min();
            let pause =
                earliest.map_or(DELIVER_AGAIN_MAX, |due| due.saturating_duration_since(now));
            let waited = self.changed.wait_timeout(deliveries, pause);
            deliveries = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn done(&self, since: Instant, again: Option<Delivery>) {
        let mut deliveries = lock(&self.deliveries);
        if let Some(at) = deliveries.on_the_way.iter().position(|other| *other == since) {
            deliveries.on_the_way.swap_remove(at);
        }
        deliveries.waiting.extend(again);
        drop(deliveries);
        self.changed.notify_all();
    }

    /// Before the process ends: every transcript has been offered to n8n once. What was not taken
    /// is on disk.
    pub(crate) fn await_first_tries(&self) {
        let deliveries = lock(&self.deliveries);
        let untried = |deliveries: &mut Deliveries| {
            let fresh = |delivery: &Delivery| delivery.tries == 0 && !delivery.unfinished;
            !deliveries.on_the_way.is_empty() || deliveries.waiting.iter().any(fresh)
        };
        let waited = self.changed.wait_timeout_while(deliveries, 2 * DELIVER_WITHIN, untried);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Since when the transcripts have been waiting that n8n does not have yet. A call that may
    /// still go on has none.
    fn waiting_since(&self) -> Vec<Instant> {
        let deliveries = lock(&self.deliveries);
        let finished = deliveries.waiting.iter().filter(|delivery| !delivery.unfinished);
        finished.map(|delivery| delivery.since).chain(deliveries.on_the_way.clone()).collect()
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting_since().len()
    }

    /// How long the oldest of them has been waiting.
    pub(crate) fn oldest(&self) -> Duration {
        self.waiting_since().iter().min().map_or(Duration::ZERO, Instant::elapsed)
    }

    pub(crate) fn given_up(&self) -> usize {
        self.given_up.load(Ordering::Relaxed)
    }
}

/// A transcript to deliver.
pub(crate) struct Delivery {
    pub(crate) sid: String,
    pub(crate) number: String,
    direction: Direction,
    pub(crate) transcript: Transcript,
    pub(crate) ended_by: EndedBy,
    journal: PathBuf,
    /// The call may still go on: its process died, or its caller is being put through.
    unfinished: bool,
    tries: u32,
    due: Instant,
    since: Instant,
}

impl Delivery {
    /// Of a call that has just ended. Unless its caller is being put through: they may come back.
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
            journal: journal.path().to_owned(),
            unfinished,
            tries: 0,
            due: Instant::now() + wait,
            since: Instant::now(),
        }
    }

    /// What an earlier process has not delivered. A call without an end may be taken up again first.
    pub(crate) fn left_behind(past: PastCall, journal: PathBuf) -> Delivery {
        let (ended_by, may_go_on_for) = match (past.ended_by, past.transferred) {
            (None, true) => (EndedBy::Transferred, transfer_max(past.direction)),
            (None, false) => (EndedBy::ProcessDied, TAKE_UP_WITHIN),
            (Some(ended_by), _) => (ended_by, Duration::ZERO),
        };
        // A journal whose first line is spoilt still has a name.
        let sid = if past.sid.is_empty() { sid_of(&journal).to_owned() } else { past.sid };
        Delivery {
            sid,
            number: past.number,
            direction: past.direction,
            transcript: past.transcript,
            ended_by,
            journal,
            unfinished: past.ended_by.is_none(),
            tries: 0,
            due: Instant::now() + may_go_on_for.saturating_sub(past.quiet_for),
            since: Instant::now().checked_sub(past.quiet_for).unwrap_or_else(Instant::now),
        }
    }

    pub(crate) fn journal(&self) -> &Path {
        &self.journal
    }

    /// Of many tries the page is shown the first one.
    pub(crate) fn tap(&self, config: &Arc<Config>) -> Tap {
        if self.tries > 0 {
            return Tap::closed();
        }
        Tap::new(Arc::new(Journal::at(self.journal.clone())), Arc::clone(config))
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

    /// A journal that was deleted under our feet, or could not be written, is completed with all
    /// that is known.
    pub(crate) fn note(&self, event: &Event) {
        let journal = Journal::at(self.journal.clone());
        if !PastCall::read(&self.journal).is_ok_and(|past| past.sid == self.sid) {
            let (call_sid, number) = (self.sid.clone(), self.number.clone());
            journal.note(&Event::Ring { call_sid, number, direction: self.direction });
            for utterance in self.transcript.utterances() {
                journal.note(&Event::Said(utterance.clone()));
            }
            journal.note(&Event::End { ended_by: self.ended_by });
        }
        journal.note(event);
    }

    fn try_again(mut self, failure: &Failure) -> Option<Delivery> {
        self.tries += 1;
        self.note(&Event::Undelivered { why: failure.to_string() });
        let path = self.journal.display();
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
        self.due = Instant::now() + pause;
        Some(self)
    }
}

#[cfg(test)]
mod tests;
