//! The top of the page: how the three parties are, and how the calls of late went.
//!
//! All of it is known anyway: the parties' standing from what was asked of them, the figures from
//! the calls of the past in sum. Days are those of the server's own time zone. What a call costs
//! is a rough figure, Ultravox's price for the time; Twilio's depends on the country.

use std::sync::Arc;

use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, ToSpan as _};
use serde_json::{Value, json};

use crate::parties::standing::Standing;
use crate::records::index::Brief;
use crate::records::tally::median;
use crate::setup::settings::Config;
use crate::toolbox::failure::Party;
use crate::toolbox::time::by_the_calendar;

/// Ultravox bills by the tenth of a minute, half a cent each, pay as you go.
const BILLED_SECONDS: f64 = 6.0;
const DOLLARS_EACH: f64 = 0.005;

const HOURS: usize = 24;
const DAYS: usize = 30;

/// `calls` are newest first.
pub(crate) fn health(config: &Config, calls: &[Arc<Brief>], is_complete: bool) -> Value {
    let now = Timestamp::now();
    let hours = starts(now, HOURS, jiff::Zoned::hour, 1.hour());
    let days = starts(now, DAYS, |_| 0, 1.day());
    let midnight = *days.last().unwrap_or(&now);
    let has_begun = |call: &&Arc<Brief>| call.past.began.is_some_and(|began| began >= midnight);
    let today: Vec<&Arc<Brief>> = calls.iter().take_while(has_begun).collect();
    let parties = [Party::Ultravox, Party::N8n, Party::Twilio].map(|party| state(config, party));
    json!({
        "parties": parties,
        "today": {
            "calls": today.len(),
            "failed": today.iter().filter(|call| call.is_failure()).count(),
            "seconds": today.iter().map(|call| call.seconds()).sum::<f64>(),
            "dollars": today.iter().map(|call| dollars(call)).sum::<f64>(),
        },
        "hours": pillars(&hours, calls),
        "days": pillars(&days, calls),
        "isComplete": is_complete,
    })
}

/// `off`: there is none. `unknown`: it has not been met yet.
fn state(config: &Config, party: Party) -> Value {
    let standing = Standing::of(party);
    let is_off = match party {
        Party::N8n => config.n8n_webhook_url.is_none(),
        Party::Twilio => config.is_local,
        Party::Ultravox => false,
    };
    let state = match (&standing.trouble, standing.last) {
        _ if is_off => "off",
        (_, None) => "unknown",
        (None, _) => "well",
        (Some(_), _) => "trouble",
    };
    json!({
        "name": party.name(),
        "state": state,
        "since": standing.since.map(by_the_calendar),
        "last": standing.last.map(by_the_calendar),
        "why": standing.trouble.map(|trouble| trouble.why),
    })
}

/// When each of the last so many hours or days began, the oldest first.
fn starts(
    now: Timestamp,
    count: usize,
    hour: impl Fn(&jiff::Zoned) -> i8,
    step: Span,
) -> Vec<Timestamp> {
    let now = now.to_zoned(TimeZone::system());
    let latest = now.date().at(hour(&now), 0, 0, 0).to_zoned(now.time_zone().clone());
    let mut start = latest.unwrap_or(now);
    let mut starts = vec![start.timestamp()];
    while starts.len() < count {
        let Ok(earlier) = start.checked_sub(step) else { break };
        starts.push(earlier.timestamp());
        start = earlier;
    }
    starts.reverse();
    starts
}

fn pillars(starts: &[Timestamp], calls: &[Arc<Brief>]) -> Value {
    #[derive(Clone, Default)]
    struct Pillar {
        calls: usize,
        failed: usize,
        turns_ms: Vec<u64>,
    }
    let mut pillars = vec![Pillar::default(); starts.len()];
    for call in calls {
        let Some(began) = call.past.began else { continue };
        let at = starts.partition_point(|start| *start <= began);
        let Some(pillar) = at.checked_sub(1).and_then(|at| pillars.get_mut(at)) else { break };
        pillar.calls += 1;
        pillar.failed += usize::from(call.is_failure());
        pillar.turns_ms.extend(call.past.tally.median_turn_ms());
    }
    let told = starts.iter().zip(&mut pillars).map(|(start, pillar)| {
        json!({
            "at": by_the_calendar(*start),
            "calls": pillar.calls,
            "failed": pillar.failed,
            "turnMs": median(&mut pillar.turns_ms),
        })
    });
    told.collect()
}

fn dollars(call: &Brief) -> f64 {
    if call.past.agent_id.is_empty() {
        return 0.0;
    }
    (call.seconds() / BILLED_SECONDS).ceil() * DOLLARS_EACH
}
