//! The list of calls, and the story of one, as the page shows them.
//!
//! `GET /calls` is a page of it, the calls in progress first; `GET /calls/{sid}` is a call's
//! journal from some byte on, so that whoever looks on gets each event once. The past comes from
//! the journals' index; from memory comes only what a journal does not have yet. A filter looks at
//! what is known of each call in sum; a search for words reads the journals, so many at a time, and
//! says where to go on. Nothing here changes a call.

use std::collections::HashSet;
use std::fs;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::door::reply::{Reply, path_of};
use crate::owner::health::health;
use crate::parties::twilio::{Form, is_sid};
use crate::records::ended_by::EndedBy;
use crate::records::event::Direction;
use crate::records::index::{Brief, Past, sid_in};
use crate::records::journal::sid_of;
use crate::records::past::{JournalSlice, PastCall};
use crate::records::tally::{Decided, Failed};
use crate::records::transcript::Utterance;
use crate::setup::agent::ToolAction;
use crate::toolbox::threads::lock;
use crate::toolbox::time::{by_the_calendar, in_seconds};
use crate::{Bridge, Call};

/// Past calls on one page of `/calls`, and how many it has unless told.
const CALLS_A_PAGE_MAX: usize = 200;
const CALLS_A_PAGE: usize = 50;
/// A transcript that waits for longer was not just sent off.
const ON_ITS_WAY: Duration = Duration::from_secs(2);
/// Of journals that are read for one answer to a search.
const SEARCH_BYTES_MAX: u64 = 32 * 1_024 * 1_024;

/// A call in a word or two: in the list, and above its story.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Summary {
    sid: String,
    number: String,
    /// The number that was called.
    to: String,
    direction: Direction,
    /// None: the call begins in the first stage.
    decided: Option<Decided>,
    began: Option<String>,
    ended: Option<String>,
    seconds: f64,
    stage: String,
    ended_by: Option<EndedBy>,
    live: bool,
    speaking: Option<&'static str>,
    /// Utterances.
    lines: usize,
    /// None: there is no n8n to deliver to, or nothing to deliver.
    delivered: Option<bool>,
    transferred: bool,
    /// Something went wrong: how it ended, or one of these.
    failed: bool,
    failures: Vec<Failed>,
    /// The median of the agent's answers.
    turn_ms: Option<u64>,
}

/// What a call must be like to be in the list.
#[derive(Default)]
struct Filter {
    /// `failed`, `undelivered`, or how it ended.
    outcome: String,
    /// A part of the number.
    number: String,
    /// Words that were said.
    words: String,
}

/// `GET /calls?before=<cursor>&limit=<number>&outcome=…&number=…&words=…`: the calls in progress,
/// and the past ones, newest first. A cursor is a journal's name without its ending.
pub(crate) fn call_list(bridge: &'static Bridge, request: &tiny_http::Request) -> Reply {
    let query = query_of(request);
    let before = query.get("before");
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if before.len() > 100 || !before.bytes().all(is_name) {
        return Reply::error(400, "before must be what an answer of /calls had as next");
    }
    let limit = match query.get("limit") {
        "" => CALLS_A_PAGE,
        limit => limit.parse().unwrap_or_default(),
    };
    if !(1..=CALLS_A_PAGE_MAX).contains(&limit) {
        let error = format!("limit must be a whole number from 1 to {CALLS_A_PAGE_MAX}");
        return Reply::error(400, &error);
    }
    let mut live = bridge.calls.all();
    live.sort_by_key(|call| std::cmp::Reverse(call.began));
    let sids: HashSet<&str> = live.iter().map(|call| call.sid.as_str()).collect();
    let known =
        bridge.journals.past(|name| sids.contains(sid_in(name)) || bridge.ringing.has(name));
    let (past, next) = Filter::of(&query).page(bridge, &known, before, limit);
    // For whoever edits them: what is wrong shows before the next call.
    bridge.agent.look(&bridge.config, false);
    let mut answer = json!({
        "now": by_the_calendar(Timestamp::now()),
        "started": by_the_calendar(bridge.began),
        "version": env!("CARGO_PKG_VERSION"),
        "publicUrl": bridge.config.public_url,
        "maxCalls": bridge.config.max_calls.get(),
        "draining": !bridge.takes_calls(),
        "outbox": {
            "waiting": bridge.outbox.waiting(),
            "givenUp": bridge.outbox.given_up(),
            "isLate": bridge.outbox.oldest() > ON_ITS_WAY,
        },
        "agent": agent_in_short(bridge),
        "past": past,
        "next": next,
    });
    if before.is_empty() {
        answer["live"] = live.iter().map(|call| json!(Summary::of_live(call))).collect();
        answer["health"] = health(&bridge.config, &known.calls, known.is_complete);
    }
    Reply::json(200, &answer)
}

fn query_of(request: &tiny_http::Request) -> Form {
    let query = request.url().split_once('?').map(|(_, query)| query).unwrap_or_default();
    Form::parse(query.as_bytes())
}

impl Filter {
    fn of(query: &Form) -> Filter {
        Filter {
            outcome: query.get("outcome").to_owned(),
            number: plain(query.get("number")),
            words: query.get("words").trim().to_lowercase(),
        }
    }

    /// So many calls that fit, and where to go on. A search may find none for a while, and then
    /// still has a place to go on from.
    fn page(
        &self,
        bridge: &Bridge,
        known: &Past,
        before: &str,
        limit: usize,
    ) -> (Vec<Summary>, Option<String>) {
        let (mut page, mut bytes) = (Vec::new(), 0);
        let mut last = None;
        for call in &known.calls {
            if !before.is_empty() && call.cursor() >= before {
                continue;
            }
            if page.len() == limit || bytes > SEARCH_BYTES_MAX {
                return (page, last.map(str::to_owned));
            }
            last = Some(call.cursor());
            if self.fits(call) && self.was_said(call, &mut bytes) {
                page.push(Summary::of_past(bridge, call));
            }
        }
        // What is not known yet is asked for again.
        let next = (!known.is_complete).then(|| last.unwrap_or(before).to_owned());
        (page, next)
    }

    fn fits(&self, call: &Brief) -> bool {
        let past = &call.past;
        let has_outcome = match self.outcome.as_str() {
            "" => true,
            "failed" => call.is_failure(),
            "undelivered" => call.undelivered().is_some(),
            outcome => past.ended_by.is_some_and(|how| how.to_string() == outcome),
        };
        let who = match (past.direction, past.number.as_str()) {
            (Direction::Browser, _) => "test call",
            (_, "") => "number withheld",
            (_, number) => number,
        };
        has_outcome && (self.number.is_empty() || plain(who).contains(&self.number))
    }

    fn was_said(&self, call: &Brief, bytes: &mut u64) -> bool {
        if self.words.is_empty() {
            return true;
        }
        *bytes += fs::metadata(&call.path).map_or(0, |file| file.len());
        PastCall::read(&call.path)
            .is_ok_and(|past| past.transcript.text().to_lowercase().contains(&self.words))
    }
}

/// As people write numbers: with blanks, hyphens and brackets, or without.
fn plain(number: &str) -> String {
    number.to_lowercase().chars().filter(|c| !c.is_whitespace() && !"()-".contains(*c)).collect()
}

impl Summary {
    fn of_live(call: &Call) -> Summary {
        let (stage, how) = {
            let state = lock(&call.state);
            (state.stage.clone(), state.hang_up)
        };
        let (lines, tally) = (lock(&call.transcript).count(), call.journal.tally());
        let has_n8n = call.bridge.config.n8n_webhook_url.is_some();
        Summary {
            sid: call.sid.clone(),
            number: call.number.clone(),
            to: call.to.clone(),
            direction: call.direction,
            decided: tally.decided().cloned(),
            began: Some(by_the_calendar(call.began)),
            ended: None,
            seconds: in_seconds(call.rang.elapsed()),
            stage,
            ended_by: how,
            live: true,
            speaking: call.caller().and_then(|caller| caller.speaking()),
            lines,
            delivered: (has_n8n && lines > 0).then_some(false),
            transferred: how == Some(EndedBy::Transferred),
            failed: !tally.failed().is_empty() || how.is_some_and(EndedBy::is_failure),
            failures: tally.failed().to_vec(),
            turn_ms: tally.median_turn_ms(),
        }
    }

    fn of_past(bridge: &Bridge, call: &Brief) -> Summary {
        let past = &call.past;
        let first = || bridge.agent.get().first_stage.clone();
        let has_n8n = bridge.config.n8n_webhook_url.is_some();
        let undelivered = call.undelivered().filter(|_| has_n8n);
        let filing = undelivered.map(|why| Failed { step: 9, tool: None, why: why.to_owned() });
        Summary {
            sid: sid_of(&call.path).to_owned(),
            number: past.number.clone(),
            to: past.to.clone(),
            direction: past.direction,
            decided: past.tally.decided().cloned(),
            began: past.began.map(by_the_calendar),
            ended: past.ended.map(by_the_calendar),
            seconds: call.seconds(),
            stage: if past.stage.is_empty() { first() } else { past.stage.clone() },
            ended_by: past.ended_by,
            live: false,
            speaking: None,
            lines: call.lines,
            delivered: (has_n8n && call.lines > 0).then_some(past.delivered),
            transferred: past.transfer.is_some(),
            failed: call.is_failure(),
            failures: past.tally.failed().iter().cloned().chain(filing).collect(),
            turn_ms: past.tally.median_turn_ms(),
        }
    }
}

/// What the page draws the flow chart from, since when that counts, and what is wrong with the
/// files that were read after it.
fn agent_in_short(bridge: &Bridge) -> Value {
    let (agent, read, mistakes) = bridge.agent.story();
    let stages = agent.stages.iter().map(|(name, stage)| {
        json!({
            "name": name,
            "agentName": stage.agent_name.as_ref().unwrap_or(&agent.name),
            "voice": stage.voice,
            "tools": stage.tools,
        })
    });
    let tools = agent.tools.iter().map(|(name, tool)| {
        let (kind, stage) = match &tool.action {
            ToolAction::EnterStage { stage, .. } => ("enter_stage", Some(stage)),
            ToolAction::N8n { .. } => ("n8n", None),
            ToolAction::Reply(_) => ("reply", None),
            ToolAction::HangUp(_) => ("hang_up", None),
            ToolAction::Transfer(_) => ("transfer", None),
            ToolAction::Ultravox { .. } => ("ultravox", None),
        };
        let tool = json!({"kind": kind, "stage": stage, "description": tool.description});
        (name.clone(), tool)
    });
    json!({
        "name": agent.name,
        "company": agent.company,
        "read": by_the_calendar(read),
        "mistakes": mistakes,
        "firstStage": agent.first_stage,
        "stages": stages.collect::<Vec<_>>(),
        "tools": tools.collect::<Map<_, _>>(),
    })
}

/// `GET /calls/{sid}?from=<byte>`: a call's journal from there on, and what only memory knows.
pub(crate) fn call_story(bridge: &'static Bridge, request: &tiny_http::Request) -> Reply {
    let sid = path_of(request).trim_start_matches("/calls/");
    let from = match query_of(request).get("from") {
        "" => Ok(0),
        from => from.parse(),
    };
    let Ok(from) = from else {
        return Reply::error(400, "from must be what an answer of /calls/{sid} had as next");
    };
    let call = bridge.calls.find(sid);
    let path = match &call {
        Some(call) => Some(call.journal.path().to_owned()),
        None if is_sid("CA", sid) => bridge.journals.find(sid),
        None => None,
    };
    let Some(path) = path else {
        return Reply::error(404, "there is no journal of such a call");
    };
    bridge.journals.settle();
    let live = call.as_deref();
    let (slice, trouble) = match JournalSlice::read(&path, from) {
        Ok(slice) => (slice, None),
        Err(error) if live.is_some() => {
            (JournalSlice::default(), Some(format!("the journal cannot be read: {error}")))
        }
        Err(error) => {
            return Reply::error(500, &format!("the journal cannot be read: {error}"));
        }
    };
    let summary = live
        .map_or_else(|| Summary::of_past(bridge, &bridge.journals.brief(&path)), Summary::of_live);
    let report = match live {
        Some(call) => call.journal.report(),
        None => PastCall::read(&path).unwrap_or_default().report,
    };
    // Without a journal, memory is all there is.
    let all = trouble.is_some();
    Reply::json(
        200,
        &json!({
            "from": slice.from,
            "next": slice.next,
            "more": slice.more,
            "events": slice.events,
            "partial": live.map(|call| call.words_in_memory(all)).unwrap_or_default(),
            "speaking": summary.speaking,
            "live": summary.live,
            "trouble": trouble,
            "summary": summary,
            "report": report.fields(),
        }),
    )
}

impl Call {
    /// What was said and is not in the journal yet, or, if there is none, all of it.
    fn words_in_memory(&self, all: bool) -> Vec<Utterance> {
        let transcript = lock(&self.transcript);
        transcript.utterances().iter().filter(|one| all || !one.finished).cloned().collect()
    }
}
