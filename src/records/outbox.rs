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

mod clock;

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
use crate::records::journal::{Journal, Journals, journals, sid_of};
use crate::records::outbox::clock::{CLOCK_STEADY_FOR, Clock};
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
    on_the_way: Vec<OnTheWay>,
    /// Journals that somebody had.
    held: Vec<PathBuf>,
    /// What earlier processes have left behind is complete, but for those.
    all_read: bool,
    /// Calls of which nothing more will come, and that are still to be filed.
    over: HashSet<String>,
    /// The process is about to end, and nobody waits for a summary any more.
    is_ending: bool,
}

/// A delivery that a thread has: to deliver it, or to ask for its summary.
struct OnTheWay {
    sid: String,
    since: Instant,
    asks: bool,
    /// Its journal was removed meanwhile, so it is not put back.
    is_dropped: bool,
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

    fn is_on_the_way(&self, sid: &str) -> bool {
        self.on_the_way.iter().any(|other| other.sid == sid)
    }

    /// False: it was dropped meanwhile.
    fn is_back(&mut self, sid: &str) -> bool {
        let at = self.on_the_way.iter().position(|other| other.sid == sid);
        let is_dropped = at.is_some_and(|at| self.on_the_way.swap_remove(at).is_dropped);
        if is_dropped {
            self.remove(sid);
        }
        !is_dropped
    }

    fn remove(&mut self, sid: &str) {
        self.waiting.retain(|delivery| delivery.sid != sid);
        self.held.retain(|path| sid_of(path) != sid);
        self.over.remove(sid);
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
                        let delivery = self.next(false);
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
                        let delivery = self.next(true);
                        self.asked(self.ask_one(journals, delivery, &*ask));
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
            // What was removed before it was ours would be written anew.
            Claim::Ours if self.is_dropped(&delivery.sid) => None,
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

    fn ask_one(
        &self,
        journals: &Journals,
        mut delivery: Delivery,
        ask: impl Fn(&str, Duration) -> Result<Event, Failure>,
    ) -> Delivery {
        let sid = delivery.sid.clone();
        delivery.ask(journals, |id, within| {
            if self.is_dropped(&sid) {
                return Err(Failure::new(Party::Ultravox, "the call was deleted"));
            }
            ask(id, within)
        });
        delivery
    }

    /// Asked with its journal in hand: nobody can remove that any more.
    fn is_dropped(&self, sid: &str) -> bool {
        lock(&self.deliveries).on_the_way.iter().any(|other| other.sid == sid && other.is_dropped)
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
        let Ok(journal) = journals.claim(path) else { return Found::Held };
        match PastCall::read(path) {
            Ok(past) if past.delivered => Found::Delivered(past.quiet_for),
            Ok(past) if past.quiet_for > quiet_max => Found::TooOld,
            Ok(past) => {
                self.add_left_behind(Delivery::left_behind(past, path.to_owned()), journal);
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

    /// Calls come in and end while the journals are being read, so it may be here already. Its
    /// journal is let go of when it is here: so nobody removes it in between, or finds it held.
    fn add_left_behind(&self, mut delivery: Delivery, journal: Journal) {
        let mut deliveries = lock(&self.deliveries);
        if deliveries.over.contains(&delivery.sid) {
            delivery.is_due_now();
        }
        let is_here = deliveries.waiting.iter().any(|other| other.sid == delivery.sid)
            || deliveries.is_on_the_way(&delivery.sid);
        if !is_here {
            deliveries.take_in(delivery);
        }
        drop(journal);
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
        let mut is_here = deliveries.is_held(sid) || deliveries.is_on_the_way(sid);
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
    /// Gives how much that is, with what goes when its summary is there.
    pub(crate) fn offer_again(&self, journals: &Journals) -> usize {
        if self.given_up.swap(0, Ordering::Relaxed) > 0 {
            for path in self::journals(&self.data_dir) {
                if delivered_at(&path).is_none() {
                    self.look_at(journals, &path, Duration::MAX);
                }
            }
        }
        let mut deliveries = lock(&self.deliveries);
        let mut offered = deliveries.on_the_way.len();
        for delivery in deliveries.waiting.iter_mut().filter(|one| !one.is_unfinished()) {
            delivery.is_due_now();
            offered += 1;
        }
        drop(deliveries);
        self.changed.notify_all();
        offered
    }

    /// By whoever has its journal, and has removed it. What is on its way is not put back.
    pub(crate) fn drop_delivery(&self, sid: &str) {
        let mut deliveries = lock(&self.deliveries);
        deliveries.remove(sid);
        for other in deliveries.on_the_way.iter_mut().filter(|other| other.sid == sid) {
            other.is_dropped = true;
        }
    }

    /// A call that goes on after all. It files itself when it ends, and then has more to tell.
    pub(crate) fn forget(&self, sid: &str) {
        let mut deliveries = lock(&self.deliveries);
        deliveries.waiting.retain(|delivery| !(delivery.is_unfinished() && delivery.sid == sid));
        deliveries.over.remove(sid);
    }

    /// Sleeps until something is due, or is to be asked for, and takes it out. The oldest first.
    fn next(&self, asks: bool) -> Delivery {
        let due = |one: &Delivery| if asks { one.next_ask() } else { Some(one.due()) };
        let mut deliveries = lock(&self.deliveries);
        loop {
            let now = Instant::now();
            let is_due = |delivery: &Delivery| due(delivery).is_some_and(|due| due <= now);
            if let Some(at) = deliveries.waiting.iter().position(is_due) {
                let delivery = deliveries.waiting.remove(at);
                let (sid, since) = (delivery.sid.clone(), delivery.since());
                deliveries.on_the_way.push(OnTheWay { sid, since, asks, is_dropped: false });
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
        if deliveries.is_back(sid) {
            if !deliveries.is_held(sid) {
                deliveries.over.remove(sid);
            }
            deliveries.waiting.extend(again);
        }
        drop(deliveries);
        self.changed.notify_all();
    }

    /// It is still to be filed.
    fn asked(&self, delivery: Delivery) {
        let mut deliveries = lock(&self.deliveries);
        if deliveries.is_back(&delivery.sid) {
            deliveries.take_in(delivery);
        }
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
        let on_the_way = deliveries.on_the_way.iter().filter(|one| !one.asks).map(|one| one.since);
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

#[cfg(test)]
mod tests;
