//! Transcripts on their way to n8n.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{fs, io};

use serde_json::{Value, json};

use crate::Bridge;
use crate::owner::lines::Calls;
use crate::parties::n8n::reply::n8n_refusal;
use crate::parties::n8n::{N8nReply, ToN8n, ask_n8n};
use crate::parties::twilio::twiml::TRANSFER_MAX;
use crate::records::exhibit::Exhibit;
use crate::records::journal::{Direction, HangUp, Journal};
use crate::records::past::{Filed, delivered_at, journals, sid_of};
use crate::records::transcript::{Line, Transcript};
use crate::toolbox::failure::Failure;
use crate::toolbox::log::log;
use crate::toolbox::metrics::CALLS;
use crate::toolbox::random::random_bytes;
use crate::toolbox::threads::{lock, spawn, wait};
use crate::toolbox::time::since;

/// A call whose process died may be taken up for this long. Then its transcript is filed as it is.
pub(crate) const TAKE_UP_WITHIN: Duration = Duration::from_mins(1);
/// A transcript's delivery to n8n.
pub(crate) const DELIVER_WITHIN: Duration = Duration::from_secs(10);
/// The first pause after a failed delivery; it doubles up to the second figure.
pub(crate) const DELIVER_AGAIN_MIN: Duration = Duration::from_secs(5);
pub(crate) const DELIVER_AGAIN_MAX: Duration = Duration::from_mins(15);
/// A transcript that n8n has not taken for this long is kept and reported, and not tried again
/// unless `callbridge outbox --retry` says so.
pub(crate) const DELIVER_FOR: Duration = Duration::from_hours(72);
/// Deliveries at the same time, so that a hanging one does not hold up the others.
pub(crate) const DELIVERIES_AT_ONCE: usize = 4;

/// The page's phone rings nobody. Whoever tries a transfer with it says within a minute what came
/// of it, or has closed the page.
pub(crate) fn transfer_max(direction: Direction) -> Duration {
    match direction {
        Direction::In | Direction::Out => TRANSFER_MAX,
        Direction::Browser => TAKE_UP_WITHIN,
    }
}

/// What waits for n8n. Several threads deliver, so that one that hangs does not hold up the rest.
#[derive(Default)]
pub(crate) struct Outbox {
    pub(crate) parcels: Mutex<Parcels>,
    pub(crate) changed: Condvar,
    /// Transcripts that are kept and no longer tried, when the journals were last looked through.
    pub(crate) given_up: AtomicUsize,
}

#[derive(Default)]
pub(crate) struct Parcels {
    pub(crate) waiting: Vec<Parcel>,
    /// Since when each of those has been waiting that are being delivered now.
    pub(crate) on_the_way: Vec<Instant>,
    /// What earlier processes have left behind is complete.
    pub(crate) all_read: bool,
    /// Until then: calls of which nothing more will come.
    pub(crate) over: HashSet<String>,
}

/// A transcript to deliver.
pub(crate) struct Parcel {
    pub(crate) sid: String,
    pub(crate) number: String,
    pub(crate) transcript: Transcript,
    pub(crate) ended_by: String,
    pub(crate) journal: PathBuf,
    /// The call may still go on: its process died, or its caller is being put through.
    pub(crate) unfinished: bool,
    pub(crate) tries: u32,
    pub(crate) due: Instant,
    pub(crate) since: Instant,
}

impl Outbox {
    pub(crate) fn add(&self, parcel: Parcel) {
        lock(&self.parcels).waiting.push(parcel);
        self.changed.notify_all();
    }

    /// From an earlier process. Calls come in while the journals are still being read, so this
    /// process may have made the journal itself, or have taken the call up: then it files it. Asked
    /// under the lock, because `take_up` takes the line first and calls `forget` then.
    pub(crate) fn add_left_behind(&self, calls: &Calls, mut parcel: Parcel) {
        let mut parcels = lock(&self.parcels);
        if parcels.over.contains(&parcel.sid) {
            parcel.due = Instant::now();
        }
        if !calls.knows(&parcel.sid) {
            parcels.waiting.push(parcel);
        }
    }

    pub(crate) fn is_all_read(&self) {
        let mut parcels = lock(&self.parcels);
        parcels.all_read = true;
        parcels.over = HashSet::new();
    }

    /// A call of which nothing more will come.
    pub(crate) fn file_now(&self, sid: &str) {
        let mut parcels = lock(&self.parcels);
        if !parcels.all_read {
            parcels.over.insert(sid.to_owned());
        }
        for parcel in parcels.waiting.iter_mut().filter(|parcel| parcel.sid == sid) {
            parcel.due = Instant::now();
        }
        drop(parcels);
        self.changed.notify_all();
    }

    /// A call that goes on after all. It files itself when it ends, and then has more to tell.
    pub(crate) fn forget(&self, sid: &str) {
        lock(&self.parcels).waiting.retain(|parcel| !(parcel.unfinished && parcel.sid == sid));
    }

    /// Sleeps until something is due, and takes it out. The oldest first.
    pub(crate) fn next(&self) -> Parcel {
        let mut parcels = lock(&self.parcels);
        loop {
            let now = Instant::now();
            if let Some(due) = parcels.waiting.iter().position(|parcel| parcel.due <= now) {
                let parcel = parcels.waiting.remove(due);
                parcels.on_the_way.push(parcel.since);
                return parcel;
            }
            let earliest = parcels.waiting.iter().map(|parcel| parcel.due).min();
            let pause =
                earliest.map_or(DELIVER_AGAIN_MAX, |due| due.saturating_duration_since(now));
            let waited = self.changed.wait_timeout(parcels, pause);
            parcels = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Transcripts that n8n does not have yet.
    pub(crate) fn waiting(&self) -> usize {
        let parcels = lock(&self.parcels);
        let finished = parcels.waiting.iter().filter(|parcel| !parcel.unfinished).count();
        finished + parcels.on_the_way.len()
    }

    pub(crate) fn done(&self, since: Instant, again: Option<Parcel>) {
        let mut parcels = lock(&self.parcels);
        if let Some(at) = parcels.on_the_way.iter().position(|other| *other == since) {
            parcels.on_the_way.swap_remove(at);
        }
        parcels.waiting.extend(again);
        drop(parcels);
        self.changed.notify_all();
    }

    /// Before the process ends: every transcript has been offered to n8n once. What was not taken
    /// is on disk.
    pub(crate) fn await_first_tries(&self) {
        let parcels = lock(&self.parcels);
        let untried = |parcels: &mut Parcels| {
            let fresh = |parcel: &Parcel| parcel.tries == 0 && !parcel.unfinished;
            !parcels.on_the_way.is_empty() || parcels.waiting.iter().any(fresh)
        };
        drop(wait(&self.changed, parcels, 2 * DELIVER_WITHIN, untried));
    }
}

/// Reads what earlier processes have left behind, all of it before the first delivery: so the
/// oldest goes first.
pub(crate) fn start_outbox(bridge: &'static Bridge) -> io::Result<()> {
    let began = Instant::now();
    let mut journals = 0;
    tidy_journals(bridge, |filed, path| {
        journals += 1;
        bridge.outbox.add_left_behind(&bridge.calls, left_behind(filed, path));
    });
    bridge.outbox.is_all_read();
    let (given_up, ms) =
        (bridge.outbox.given_up.load(Ordering::Relaxed), began.elapsed().as_millis());
    log!(Debug, "{journals} journals of calls that are not filed, read in {ms} ms"; journals, ms);
    if given_up > 0 {
        log!(Error, "{given_up} transcripts were never delivered: see callbridge outbox"; given_up);
    }
    for _ in 0..DELIVERIES_AT_ONCE {
        spawn("outbox".into(), move || {
            loop {
                let parcel = bridge.outbox.next();
                let since = parcel.since;
                let again = deliver(bridge, parcel);
                bridge.outbox.done(since, again);
            }
        })?;
    }
    Ok(())
}

/// At the start, and once a day: journals that nobody needs any more are removed. `waits` is given
/// those whose transcript n8n is still to get, the oldest first.
pub(crate) fn tidy_journals(bridge: &Bridge, mut waits: impl FnMut(Filed, PathBuf)) {
    let mut too_old = 0;
    for path in journals(&bridge.config.data_dir) {
        if let Some(at) = delivered_at(&path) {
            remove_if_old(bridge, &path, since(at));
            continue;
        }
        match Filed::read(&path) {
            Ok(filed) if filed.delivered => remove_if_old(bridge, &path, filed.quiet_for),
            Ok(filed) if filed.quiet_for > DELIVER_FOR => too_old += 1,
            Ok(filed) => waits(filed, path),
            Err(error) => log!(Warn, "{}: cannot be read: {error}", path.display()),
        }
    }
    // Without n8n they are where their owner wants them.
    let given_up = if bridge.config.n8n_webhook_url.is_some() { too_old } else { 0 };
    bridge.outbox.given_up.store(given_up, Ordering::Relaxed);
}

/// What an earlier process has not delivered. A call without an end may be taken up again first.
pub(crate) fn left_behind(filed: Filed, journal: PathBuf) -> Parcel {
    let (ended_by, wait) = match (filed.ended_by.as_str(), filed.transferred) {
        ("", true) => {
            let most = transfer_max(filed.direction);
            (format!("{:?}", HangUp::Transferred), most.saturating_sub(filed.quiet_for))
        }
        ("", false) => {
            (format!("{:?}", HangUp::ProcessDied), TAKE_UP_WITHIN.saturating_sub(filed.quiet_for))
        }
        (ended_by, _) => (ended_by.to_owned(), Duration::ZERO),
    };
    // A journal whose first line is spoilt still has a name.
    let sid = if filed.sid.is_empty() { sid_of(&journal).to_owned() } else { filed.sid };
    Parcel {
        ended_by,
        unfinished: filed.ended_by.is_empty(),
        sid,
        number: filed.number,
        transcript: filed.transcript,
        journal,
        tries: 0,
        due: Instant::now() + wait,
        since: Instant::now().checked_sub(filed.quiet_for).unwrap_or_else(Instant::now),
    }
}

pub(crate) fn remove_if_old(bridge: &Bridge, path: &Path, quiet_for: Duration) {
    if quiet_for > bridge.config.keep
        && let Err(error) = fs::remove_file(path)
    {
        log!(Warn, "{}: cannot be removed: {error}", path.display());
    }
}

/// One try. Gives the parcel back if there is to be another.
pub(crate) fn deliver(bridge: &Bridge, mut parcel: Parcel) -> Option<Parcel> {
    if parcel.unfinished {
        if bridge.calls.find(&parcel.sid).is_some_and(|call| !call.is_over()) {
            // It was taken up again, and files itself when it ends.
            return None;
        }
        parcel.unfinished = false;
        parcel.note(&json!({"event": "end", "endedBy": parcel.ended_by}));
        CALLS.of(&[&parcel.ended_by]).add();
    }
    if parcel.transcript.text().is_empty() {
        log!(parcel, Info, After, "nothing was said, so there is no transcript to file");
        parcel.note(&json!({"event": "delivered"}));
        return None;
    }
    if bridge.config.n8n_webhook_url.is_none() {
        log!(parcel, Info, After, "the transcript is in {}", parcel.journal.display());
        return None;
    }
    if Filed::read(&parcel.journal).is_ok_and(|filed| filed.delivered) {
        // `callbridge outbox --retry` was faster.
        return None;
    }
    match offer(bridge, &parcel) {
        Ok(()) => {
            parcel.note(&json!({"event": "delivered"}));
            let lines = parcel.transcript.count();
            log!(parcel, Info, After, "n8n has the transcript of {lines} lines"; lines);
            None
        }
        Err(failure) => keep(parcel, &failure),
    }
}

pub(crate) fn offer(bridge: &Bridge, parcel: &Parcel) -> Result<(), Failure> {
    let question = ToN8n {
        sid: &parcel.sid,
        number: &parcel.number,
        route: "2",
        data: &parcel.transcript.text(),
        key: format!("{}-2", parcel.sid),
        ended_by: Some(&parcel.ended_by),
    };
    parcel.show(bridge, Exhibit::Filing, &question.for_the_eye());
    // Every 2xx will do.
    let taken = |reply: &N8nReply| {
        parcel.show(bridge, Exhibit::Taken, &reply.for_the_eye());
        n8n_refusal(reply).map_or(Ok(()), Err)
    };
    ask_n8n(bridge, &question, DELIVER_WITHIN, taken)
}

pub(crate) fn keep(mut parcel: Parcel, failure: &Failure) -> Option<Parcel> {
    parcel.tries += 1;
    parcel.note(&json!({"event": "undelivered", "why": failure.to_string()}));
    let path = parcel.journal.display();
    if parcel.since.elapsed() > DELIVER_FOR {
        log!(parcel, Error, After, "{failure}; the transcript stays in {path} (callbridge outbox)");
        return None;
    }
    let doubled = DELIVER_AGAIN_MIN * 2_u32.saturating_pow((parcel.tries - 1).min(16));
    // A quarter more or less, so that many do not come back in the same moment.
    let [dice] = random_bytes();
    let pause = doubled.min(DELIVER_AGAIN_MAX) * (192 + u32::from(dice) / 2) / 256;
    let seconds = pause.as_secs();
    log!(
        parcel,
        Warn,
        After,
        "{failure}; the transcript stays in {path}, next try in {seconds} s";
        seconds
    );
    parcel.due = Instant::now() + pause;
    Some(parcel)
}

impl Parcel {
    /// Of many tries the first one.
    pub(crate) fn show(&self, bridge: &Bridge, exhibit: Exhibit, text: &str) {
        if self.tries == 0 {
            self.note(&exhibit.event(&bridge.config, text));
        }
    }

    /// A journal that was deleted under our feet, or could not be written, is completed with all
    /// that is known.
    pub(crate) fn note(&self, event: &Value) {
        let journal = Journal::at(self.journal.clone());
        if !Filed::read(&self.journal).is_ok_and(|filed| filed.sid == self.sid) {
            let ring = json!({"event": "ring", "callSid": self.sid, "number": self.number});
            let end = json!({"event": "end", "endedBy": self.ended_by});
            let said = self.transcript.lines.iter().map(Line::event);
            for event in [ring].into_iter().chain(said).chain([end]) {
                journal.note(&event);
            }
        }
        journal.note(event);
    }
}

#[cfg(test)]
mod tests;
