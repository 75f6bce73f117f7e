//! What n8n is still to get, and when it is offered the next time.
//!
//! Calls that end `add` their [`Delivery`]. Several threads take out what is due, the oldest first,
//! and give it to the function with which the outbox was started: that one knows n8n, and decides
//! what becomes of a transcript (`file_transcript`, step 9). What could not be delivered is kept
//! here and tried again after a pause that grows, also by the next process, from the journals.
//!
//! ```text
//! outbox.start(&bridge.journals, ask, |delivery| file_transcript(bridge, delivery))?;
//! ```
//!
//! Before its first try, Ultravox is asked for a summary with `ask`, by threads of their own: one
//! that hangs holds up no transcript for longer than `SUMMARY_WITHIN`.
//!
//! A journal that somebody has is left alone, and looked at again: its call goes on, here or in
//! another process on the same directory, or its transcript is just being delivered. The outbox
//! never speaks to anybody itself, and never gives a transcript up: what is not taken for
//! [`DELIVER_FOR`] stays on disk and is reported.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{fs, io};

use jiff::Timestamp;

use crate::records::delivery::{Claim, DELIVER_AGAIN_MAX, DELIVER_FOR, DELIVER_WITHIN, Delivery};
use crate::records::event::Event;
use crate::records::journal::{Journals, journals, sid_of};
use crate::records::past::{PastCall, delivered_at};
use crate::setup::settings::Config;
use crate::toolbox::failure::{Failure, Party};
use crate::toolbox::log::log;
use crate::toolbox::threads::{lock, outlive, spawn_for_good, wait};
use crate::toolbox::time::since;

/// Deliveries at the same time, so that a hanging one does not hold up the others.
const DELIVERIES_AT_ONCE: usize = 4;
/// Questions for summaries at the same time. What cannot be asked in time goes without one.
const ASKS_AT_ONCE: usize = 4;
/// How often journals are looked at again that somebody had.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// How often the journals are looked through for those that are older than `KEEP_DAYS`.
const TIDY_EVERY: Duration = Duration::from_hours(24);
/// A clock that is about to be set right is set right by then. Nothing is removed before.
const CLOCK_STEADY_FOR: Duration = Duration::from_hours(1);
/// By more than this a clock does not go wrong by itself between two looks: it was set.
const CLOCK_JUMP: Duration = Duration::from_mins(1);

pub(crate) struct Outbox {
    data_dir: PathBuf,
    keep: Duration,
    has_n8n: bool,
    deliveries: Mutex<Deliveries>,
    changed: Condvar,
    /// Transcripts that are kept and no longer tried.
    given_up: AtomicUsize,
}

#[derive(Default)]
struct Deliveries {
    waiting: Vec<Delivery>,
    /// Those that are being delivered now, and since when they have been waiting.
    on_the_way: Vec<(String, Instant)>,
    /// Journals that somebody had.
    held: Vec<PathBuf>,
    /// What earlier processes have left behind is complete, but for those.
    all_read: bool,
    /// Calls of which nothing more will come, and that are still to be filed.
    over: HashSet<String>,
    /// The process is about to end, and nobody waits for a summary any more.
    is_ending: bool,
}

impl Deliveries {
    fn is_held(&self, sid: &str) -> bool {
        self.held.iter().any(|path| sid_of(path) == sid)
    }

    fn take_in(&mut self, mut delivery: Delivery) {
        if self.is_ending {
            delivery.no_more_asks();
        }
        self.waiting.push(delivery);
    }

    fn is_back(&mut self, sid: &str) {
        if let Some(at) = self.on_the_way.iter().position(|(other, _)| other == sid) {
            self.on_the_way.swap_remove(at);
        }
    }
}

/// What a look at a journal finds.
enum Found {
    Held,
    Delivered(Duration),
    TooOld,
    Waits,
    Nothing,
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
    /// oldest goes first. `file` makes one try, and fails if there is to be another. `ask` gets
    /// Ultravox's id of a call, and gives its summary as an event.
    pub(crate) fn start(
        &'static self,
        journals: &'static Journals,
        ask: impl Fn(&str, Duration) -> Result<Event, Failure> + Send + Sync + 'static,
        file: impl Fn(&mut Delivery) -> Result<(), Failure> + Send + Sync + 'static,
    ) {
        journals.start_writer();
        journals.read_names();
        let began = Instant::now();
        let count = self.look_through(journals, false);
        self.is_all_read();
        let (given_up, ms) = (self.given_up(), began.elapsed().as_millis());
        log!(Debug, "{count} journals of calls that are not filed, read in {ms} ms"; count, ms);
        if given_up > 0 {
            let were = if given_up == 1 { "transcript was" } else { "transcripts were" };
            log!(
                Error,
                "{given_up} {were} never delivered: see callbridge outbox"; given_up
            );
        }
        let file = Arc::new(file);
        for _ in 0..DELIVERIES_AT_ONCE {
            insist(|| {
                let file = Arc::clone(&file);
                spawn_for_good("outbox".into(), move || {
                    loop {
                        let delivery = self.next(|delivery| Some(delivery.due()));
                        let sid = delivery.sid.clone();
                        self.done(&sid, self.try_one(journals, delivery, &*file));
                    }
                })
            });
        }
        let ask = Arc::new(ask);
        for _ in 0..ASKS_AT_ONCE {
            insist(|| {
                let ask = Arc::clone(&ask);
                spawn_for_good("summaries".into(), move || {
                    loop {
                        let mut delivery = self.next(Delivery::next_ask);
                        delivery.ask(journals, &*ask);
                        self.asked(delivery);
                    }
                })
            });
        }
        insist(|| spawn_for_good("outbox looks".into(), move || self.keep_looking(journals)));
    }

    /// Gives the delivery back if there is to be another try.
    fn try_one(
        &self,
        journals: &Journals,
        mut delivery: Delivery,
        file: impl Fn(&mut Delivery) -> Result<(), Failure>,
    ) -> Option<Delivery> {
        delivery.no_more_asks();
        match delivery.claim(journals) {
            Claim::Delivered => None,
            Claim::Held if delivery.is_unfinished() => {
                // It was taken up again, and whoever has it files it.
                lock(&self.deliveries).held.push(delivery.path().to_owned());
                None
            }
            Claim::Held => {
                delivery.is_due_in(LOOK_AGAIN_AFTER);
                Some(delivery)
            }
            Claim::Ours => {
                let failure = match outlive(|| file(&mut delivery)) {
                    Some(Ok(())) => return None,
                    Some(Err(failure)) => failure,
                    None => Failure::new(Party::N8n, "the try ended by a fault"),
                };
                let again = delivery.try_again(&failure);
                self.given_up.fetch_add(usize::from(again.is_none()), Ordering::Relaxed);
                again
            }
        }
    }

    fn keep_looking(&self, journals: &Journals) {
        let mut clock = Clock::new();
        let mut tidied: Option<Instant> = None;
        loop {
            thread::sleep(LOOK_AGAIN_AFTER);
            let held = std::mem::take(&mut lock(&self.deliveries).held);
            for path in held {
                if matches!(self.look_at(journals, &path, DELIVER_FOR), Found::Held) {
                    lock(&self.deliveries).held.push(path);
                }
            }
            let is_steady = clock.steady_for(Timestamp::now()) > CLOCK_STEADY_FOR;
            if is_steady && tidied.is_none_or(|tidied| tidied.elapsed() > TIDY_EVERY) {
                self.look_through(journals, true);
                tidied = Some(Instant::now());
            }
        }
    }

    /// Takes in all whose transcript n8n is still to get, the oldest first, and counts them.
    fn look_through(&self, journals: &Journals, removes: bool) -> usize {
        let (mut count, mut too_old) = (0, 0);
        for path in self::journals(&self.data_dir) {
            let found = match delivered_at(&path) {
                Some(at) => Found::Delivered(since(at)),
                None => self.look_at(journals, &path, DELIVER_FOR),
            };
            match found {
                Found::Held => self.is_held(path),
                Found::Delivered(quiet_for) if removes => self.remove_if_old(&path, quiet_for),
                Found::TooOld => too_old += 1,
                Found::Waits => count += 1,
                Found::Delivered(_) | Found::Nothing => {}
            }
        }
        // Without n8n they are where their owner wants them.
        self.given_up.store(if self.has_n8n { too_old } else { 0 }, Ordering::Relaxed);
        count
    }

    fn look_at(&self, journals: &Journals, path: &Path, quiet_max: Duration) -> Found {
        let past = {
            let Ok(_journal) = journals.claim(path) else { return Found::Held };
            PastCall::read(path)
        };
        match past {
            Ok(past) if past.delivered => Found::Delivered(past.quiet_for),
            Ok(past) if past.quiet_for > quiet_max => Found::TooOld,
            Ok(past) => {
                self.add_left_behind(Delivery::left_behind(past, path.to_owned()));
                Found::Waits
            }
            Err(error) => {
                log!(Warn, "{}: cannot be read: {error}", path.display());
                Found::Nothing
            }
        }
    }

    fn is_held(&self, path: PathBuf) {
        let held = &mut lock(&self.deliveries).held;
        if !held.contains(&path) {
            held.push(path);
        }
    }

    fn remove_if_old(&self, path: &Path, quiet_for: Duration) {
        if quiet_for > self.keep
            && let Err(error) = fs::remove_file(path)
        {
            log!(Warn, "{}: cannot be removed: {error}", path.display());
        }
    }

    pub(crate) fn add(&self, delivery: Delivery) {
        lock(&self.deliveries).take_in(delivery);
        self.changed.notify_all();
    }

    /// Calls come in and end while the journals are being read, so it may be here already.
    fn add_left_behind(&self, mut delivery: Delivery) {
        let mut deliveries = lock(&self.deliveries);
        if deliveries.over.contains(&delivery.sid) {
            delivery.is_due_now();
        }
        let is_its = |sid: &str| sid == delivery.sid;
        let is_here = deliveries.waiting.iter().any(|other| is_its(&other.sid))
            || deliveries.on_the_way.iter().any(|(sid, _)| is_its(sid));
        if !is_here {
            deliveries.take_in(delivery);
        }
        drop(deliveries);
        self.changed.notify_all();
    }

    fn is_all_read(&self) {
        let deliveries = &mut *lock(&self.deliveries);
        deliveries.all_read = true;
        let mut over = std::mem::take(&mut deliveries.over);
        let waits = |sid: &str| deliveries.waiting.iter().any(|delivery| delivery.sid == sid);
        over.retain(|sid| deliveries.is_held(sid) || waits(sid));
        deliveries.over = over;
    }

    /// A call of which nothing more will come.
    pub(crate) fn file_now(&self, sid: &str) {
        let mut deliveries = lock(&self.deliveries);
        let mut is_here =
            deliveries.is_held(sid) || deliveries.on_the_way.iter().any(|(other, _)| other == sid);
        for delivery in deliveries.waiting.iter_mut().filter(|delivery| delivery.sid == sid) {
            delivery.is_due_now();
            is_here = true;
        }
        // Also of those that are due now: somebody may just have the journal.
        if is_here || !deliveries.all_read {
            deliveries.over.insert(sid.to_owned());
        }
        drop(deliveries);
        self.changed.notify_all();
    }

    /// All that n8n is still to get is due now, also what it has not taken for [`DELIVER_FOR`].
    /// Gives how much that is.
    pub(crate) fn offer_again(&self, journals: &Journals) -> usize {
        if self.given_up.swap(0, Ordering::Relaxed) > 0 {
            for path in self::journals(&self.data_dir) {
                if delivered_at(&path).is_none() {
                    self.look_at(journals, &path, Duration::MAX);
                }
            }
        }
        let mut deliveries = lock(&self.deliveries);
        for delivery in deliveries.waiting.iter_mut().filter(|one| !one.is_unfinished()) {
            delivery.is_due_in(Duration::ZERO);
        }
        drop(deliveries);
        self.changed.notify_all();
        self.waiting()
    }

    /// Its journal is about to be removed.
    pub(crate) fn drop_delivery(&self, sid: &str) {
        lock(&self.deliveries).waiting.retain(|delivery| delivery.sid != sid);
    }

    /// A call that goes on after all. It files itself when it ends, and then has more to tell.
    pub(crate) fn forget(&self, sid: &str) {
        let mut deliveries = lock(&self.deliveries);
        deliveries.waiting.retain(|delivery| !(delivery.is_unfinished() && delivery.sid == sid));
        deliveries.over.remove(sid);
    }

    /// Sleeps until something is due, and takes it out. The oldest first.
    fn next(&self, due: impl Fn(&Delivery) -> Option<Instant>) -> Delivery {
        let mut deliveries = lock(&self.deliveries);
        loop {
            let now = Instant::now();
            let is_due = |delivery: &Delivery| due(delivery).is_some_and(|due| due <= now);
            if let Some(at) = deliveries.waiting.iter().position(is_due) {
                let delivery = deliveries.waiting.remove(at);
                deliveries.on_the_way.push((delivery.sid.clone(), delivery.since()));
                return delivery;
            }
            let earliest = deliveries.waiting.iter().filter_map(&due).min();
            let pause =
                earliest.map_or(DELIVER_AGAIN_MAX, |due| due.saturating_duration_since(now));
            let waited = self.changed.wait_timeout(deliveries, pause);
            deliveries = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn done(&self, sid: &str, again: Option<Delivery>) {
        let mut deliveries = lock(&self.deliveries);
        deliveries.is_back(sid);
        if !deliveries.is_held(sid) {
            deliveries.over.remove(sid);
        }
        deliveries.waiting.extend(again);
        drop(deliveries);
        self.changed.notify_all();
    }

    /// It is still to be filed.
    fn asked(&self, delivery: Delivery) {
        let mut deliveries = lock(&self.deliveries);
        deliveries.is_back(&delivery.sid);
        deliveries.take_in(delivery);
        drop(deliveries);
        self.changed.notify_all();
    }

    /// Before the process ends: every transcript has been offered to n8n once. What was not taken
    /// is on disk.
    pub(crate) fn await_first_tries(&self) {
        let mut deliveries = lock(&self.deliveries);
        deliveries.is_ending = true;
        deliveries.waiting.iter_mut().for_each(Delivery::no_more_asks);
        self.changed.notify_all();
        let untried = |deliveries: &mut Deliveries| {
            let fresh = |delivery: &Delivery| delivery.is_first_try() && !delivery.is_unfinished();
            !deliveries.on_the_way.is_empty() || deliveries.waiting.iter().any(fresh)
        };
        drop(wait(&self.changed, deliveries, 2 * DELIVER_WITHIN, untried));
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting_since().len()
    }

    /// How long the oldest of them has been waiting.
    pub(crate) fn oldest(&self) -> Duration {
        self.waiting_since().iter().min().map_or(Duration::ZERO, Instant::elapsed)
    }

    /// Since when the transcripts have been waiting that n8n does not have yet. A call that may
    /// still go on has none, and one that waits for its summary is not n8n's matter yet.
    fn waiting_since(&self) -> Vec<Instant> {
        let deliveries = lock(&self.deliveries);
        let is_n8ns = |one: &&Delivery| !one.is_unfinished() && one.next_ask().is_none();
        let finished = deliveries.waiting.iter().filter(is_n8ns);
        let on_the_way = deliveries.on_the_way.iter().map(|(_, since)| *since);
        finished.map(Delivery::since).chain(on_the_way).collect()
    }

    pub(crate) fn given_up(&self) -> usize {
        self.given_up.load(Ordering::Relaxed)
    }
}

/// Where no thread is to be had now, there may be one later.
fn insist(start: impl Fn() -> io::Result<JoinHandle<()>>) {
    let mut is_said = false;
    while let Err(error) = start() {
        if !std::mem::replace(&mut is_said, true) {
            log!(Error, "no thread to deliver transcripts: {error}; trying on");
        }
        thread::sleep(LOOK_AGAIN_AFTER);
    }
}

/// Whether the calendar can be believed. A machine that begins with a wrong one is set right soon
/// after, and until then every journal may look old enough to go.
struct Clock {
    steady_since: Instant,
    looked: (Instant, Timestamp),
}

impl Clock {
    fn new() -> Clock {
        Clock { steady_since: Instant::now(), looked: (Instant::now(), Timestamp::now()) }
    }

    fn steady_for(&mut self, calendar: Timestamp) -> Duration {
        let (then, calendar_then) = std::mem::replace(&mut self.looked, (Instant::now(), calendar));
        let passed = then.elapsed();
        let by_the_calendar = calendar.duration_since(calendar_then);
        let jump = by_the_calendar.unsigned_abs().abs_diff(passed);
        if by_the_calendar.is_negative() || jump > CLOCK_JUMP {
            self.steady_since = Instant::now();
        }
        self.steady_since.elapsed()
    }
}

#[cfg(test)]
mod tests;
