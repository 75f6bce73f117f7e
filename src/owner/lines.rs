//! The telephone lines: who is on one, and who gets one.
//!
//! Step 1 asks for a line with [`Calls::admit`] and gets a [`LineInUse`], which step 9 drops. In
//! between the call is found by its id, from every webhook, stream and page; for a while after its
//! end, what Twilio asks late still gets the right answer. Whoever sees to the end of the process
//! waits here until nobody is on a line any more.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::records::ended_by::EndedBy;
use crate::records::event::Transfer;
use crate::toolbox::text::is_e164;
use crate::toolbox::threads::{lock, wait};
use crate::{Bridge, Call};

/// From a call's last word to the last line of its journal. Then Twilio is answered all the same.
const FILED_WITHIN: Duration = Duration::from_secs(5);
/// Calls remembered after their end, so that a late `/stream-ended` gets the right words.
const ENDED_CALLS_MAX: usize = 1_024;

/// All calls there are. Its length is the number of lines in use.
#[derive(Default)]
pub(crate) struct Calls {
    list: Mutex<CallList>,
    one_less: Condvar,
}

#[derive(Default)]
struct CallList {
    live: HashMap<String, Arc<Call>>,
    /// The latest ends, oldest first: a `/stream-ended` may come after its call is gone.
    ended: VecDeque<(String, HowItEnded)>,
    last_end: Option<Instant>,
    /// When each number has called within the last hour.
    recent: HashMap<String, Vec<Instant>>,
}

/// And, if the caller is being put through, to whom.
pub(crate) type HowItEnded = (EndedBy, Option<Transfer>);

/// What becomes of a call that wants a line.
pub(crate) enum Admission {
    Yours(Arc<Call>, LineInUse),
    /// It has one already.
    Known(Arc<Call>),
    /// All are in use.
    None,
}

/// A place among `MAX_CALLS`. Dropping it gives the place back.
pub(crate) struct LineInUse(Arc<Call>);

impl Calls {
    /// Counted and taken under one lock, so that `MAX_CALLS` is exact however many ring at once.
    pub(crate) fn admit(&self, sid: &str, new_call: impl FnOnce() -> Call) -> Admission {
        let mut list = lock(&self.list);
        if let Some(call) = list.live.get(sid) {
            return Admission::Known(Arc::clone(call));
        }
        let call = new_call();
        if list.live.len() >= call.bridge.config.max_calls {
            return Admission::None;
        }
        let call = Arc::new(call);
        list.live.insert(sid.to_owned(), Arc::clone(&call));
        Admission::Yours(Arc::clone(&call), LineInUse(call))
    }

    /// Counts this call. Only real numbers: the anonymous are not one caller.
    pub(crate) fn is_too_often(&self, bridge: &Bridge, number: &str) -> bool {
        const HOUR: Duration = Duration::from_hours(1);
        if !is_e164(number) {
            return false;
        }
        let recent = &mut lock(&self.list).recent;
        recent.retain(|_, times| {
            times.retain(|time| time.elapsed() < HOUR);
            !times.is_empty()
        });
        let times = recent.entry(number.to_owned()).or_default();
        let too_often = times.len() >= bridge.config.calls_per_number_per_hour;
        if !too_often {
            times.push(Instant::now());
        }
        too_often
    }

    /// Until the last call has given its line back.
    pub(crate) fn await_none(&self, within: Duration) {
        let list = lock(&self.list);
        drop(wait(&self.one_less, list, within, |list| !list.live.is_empty()));
    }

    /// A call that has ended may still be filing itself. What Twilio has to say of it waits.
    pub(crate) fn await_filed(&self, sid: &str) {
        let list = lock(&self.list);
        let filing = |list: &mut CallList| list.live.get(sid).is_some_and(|call| call.is_over());
        drop(wait(&self.one_less, list, FILED_WITHIN, filing));
    }

    pub(crate) fn since_last_end(&self) -> Duration {
        lock(&self.list).last_end.map_or(Duration::MAX, |last_end| last_end.elapsed())
    }

    pub(crate) fn all(&self) -> Vec<Arc<Call>> {
        lock(&self.list).live.values().cloned().collect()
    }

    pub(crate) fn how_it_ended(&self, sid: &str) -> Option<HowItEnded> {
        let list = lock(&self.list);
        let live = list.live.get(sid).and_then(|call| {
            let state = lock(&call.state);
            Some((state.how_it_ended()?, state.transfer.clone()))
        });
        live.or_else(|| {
            list.ended.iter().rev().find(|(ended, _)| ended == sid).map(|(_, how)| how.clone())
        })
    }

    pub(crate) fn find(&self, sid: &str) -> Option<Arc<Call>> {
        lock(&self.list).live.get(sid).cloned()
    }
}

impl Drop for LineInUse {
    fn drop(&mut self) {
        let how = {
            let state = lock(&self.0.state);
            (state.how_it_ended().unwrap_or(EndedBy::NoAgent), state.transfer.clone())
        };
        let calls = &self.0.bridge.calls;
        let mut list = lock(&calls.list);
        list.live.remove(&self.0.sid);
        if list.ended.len() >= ENDED_CALLS_MAX {
            list.ended.pop_front();
        }
        list.ended.push_back((self.0.sid.clone(), how));
        list.last_end = Some(Instant::now());
        drop(list);
        calls.one_less.notify_all();
    }
}
