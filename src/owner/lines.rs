//! The telephone lines: who is on one, and who gets one.
//!
//! Step 1 asks for a line with [`Calls::ring`] and gets a [`LineInUse`], which step 9 drops. In
//! between the call is found by its id, from every webhook, stream and page; for a while after its
//! end, what Twilio asks late still gets the right answer. Neither one number nor all who withhold
//! theirs can take every line. Those who talk to a person are counted here too. Whoever sees to the
//! end of the process waits here until nobody is on a line any more.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::parties::twilio::twiml::TRANSFER_RINGS;
use crate::records::delivery::TRANSFER_MAX;
use crate::records::ended_by::EndedBy;
use crate::records::event::{Direction, Transfer};
use crate::setup::settings::Config;
use crate::toolbox::text::{is_e164, shorten_number};
use crate::toolbox::threads::{lock, wait};
use crate::{Call, IncomingCall};

/// From a call's last word to the last line of its journal. Then Twilio is answered all the same.
const FILED_WITHIN: Duration = Duration::from_secs(5);
/// Calls remembered after their end, so that a late `/stream-ended` gets the right words.
const ENDED_CALLS_MAX: usize = 1_024;
/// Lines of one number at once: enough for an office that has one number for all. The next caller
/// from there hears the busy sentence.
const LINES_PER_NUMBER_MAX: usize = 4;

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
    /// Calls that a person has, or is rung for, and when that is over at the latest.
    with_person: HashMap<String, Instant>,
}

/// And, if the caller is being put through, to whom.
pub(crate) type HowItEnded = (EndedBy, Option<Transfer>);

/// What becomes of a call that wants a line.
pub(crate) enum Admission {
    Yours(Arc<Call>, LineInUse),
    /// It has one already.
    Known(Arc<Call>),
    /// There is none for it.
    None(NoLine),
}

/// Why not, in a word for the metrics and in a few for the log.
pub(crate) struct NoLine {
    pub(crate) reason: &'static str,
    pub(crate) why: String,
}

impl NoLine {
    pub(crate) const BUSY: &str = "busy";
}

/// A place among `MAX_CALLS`. Dropping it gives the place back.
pub(crate) struct LineInUse(Arc<Call>);

impl Calls {
    /// A line for a call that rings. Counted and taken under one lock, so that each bound is exact
    /// however many ring at once.
    pub(crate) fn ring(
        &self,
        incoming: &IncomingCall,
        new_call: impl FnOnce() -> Call,
    ) -> Admission {
        self.admit_if(incoming.sid, new_call, |list, config| match incoming.direction {
            Direction::In => list.has_line_for(incoming.number, config),
            // The owner has called for it, and may as often as there are lines.
            Direction::Out | Direction::Browser => Ok(()),
        })
    }

    /// A line for a call that goes on.
    pub(crate) fn admit(&self, sid: &str, call: impl FnOnce() -> Call) -> Admission {
        self.admit_if(sid, call, |_, _| Ok(()))
    }

    fn admit_if(
        &self,
        sid: &str,
        new_call: impl FnOnce() -> Call,
        may: impl FnOnce(&mut CallList, &Config) -> Result<(), NoLine>,
    ) -> Admission {
        let mut list = lock(&self.list);
        if let Some(call) = list.live.get(sid) {
            return Admission::Known(Arc::clone(call));
        }
        let call = new_call();
        let config = &call.bridge.config;
        if list.live.len() >= config.max_calls.get() {
            let why = format!("all {} lines are busy", config.max_calls.get());
            return Admission::None(NoLine { reason: NoLine::BUSY, why });
        }
        if let Err(none) = may(&mut list, config) {
            return Admission::None(none);
        }
        let call = Arc::new(call);
        list.live.insert(sid.to_owned(), Arc::clone(&call));
        Admission::Yours(Arc::clone(&call), LineInUse(call))
    }

    /// Whether this call may be put through to a person. As many may as there are lines.
    pub(crate) fn put_through(&self, config: &Config, sid: &str) -> bool {
        let with_person = &mut lock(&self.list).with_person;
        with_person.retain(|_, until| Instant::now() < *until);
        let may = with_person.len() < config.max_calls.get() || with_person.contains_key(sid);
        if may {
            with_person.insert(sid.to_owned(), Instant::now() + TRANSFER_RINGS + TRANSFER_MAX);
        }
        may
    }

    /// The person has hung up, or never answered; or the caller has left.
    pub(crate) fn left_person(&self, sid: &str) {
        lock(&self.list).with_person.remove(sid);
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

    /// The call that waits for a stream with this token, which is used up by that.
    pub(crate) fn with_token(&self, token: &str) -> Option<Arc<Call>> {
        let (sid, _) = token.split_once('/')?;
        self.find(sid).filter(|call| call.take_token(token))
    }

    pub(crate) fn find(&self, sid: &str) -> Option<Arc<Call>> {
        lock(&self.list).live.get(sid).cloned()
    }
}

impl CallList {
    /// Counts the call if there is.
    fn has_line_for(&mut self, number: &str, config: &Config) -> Result<(), NoLine> {
        const HOUR: Duration = Duration::from_hours(1);
        let has_number = is_e164(number);
        // Who withholds the number may be any other who does.
        let is_theirs =
            |call: &&Arc<Call>| call.number == number || !has_number && !is_e164(&call.number);
        let calls_us = |call: &&Arc<Call>| call.direction == Direction::In;
        let lines = self.live.values().filter(calls_us).filter(is_theirs).count();
        if !has_number {
            let most = config.withheld_calls();
            let why = || format!("all {most} lines for callers without a number are busy");
            return if lines < most {
                Ok(())
            } else {
                Err(NoLine { reason: "withheld", why: why() })
            };
        }
        let shown = shorten_number(number);
        if lines >= LINES_PER_NUMBER_MAX {
            let why = format!("{shown} is on {lines} lines already");
            return Err(NoLine { reason: "many_at_once", why });
        }
        self.recent.retain(|_, times| {
            times.retain(|time| time.elapsed() < HOUR);
            !times.is_empty()
        });
        let times = self.recent.entry(number.to_owned()).or_default();
        if times.len() >= config.calls_per_number_per_hour {
            return Err(NoLine { reason: "too_often", why: format!("{shown} calls too often") });
        }
        times.push(Instant::now());
        Ok(())
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

#[cfg(test)]
mod tests;
