//! The list of calls, and the story of one, as the page shows them.
//!
//! `GET /calls` is a page of it, the calls in progress first; `GET /calls/{sid}` is a call's
//! journal from some byte on, so that whoever looks on gets each event once. The past comes from
//! the journals, and only those are read that are asked for; from memory comes only what a journal
//! does not have yet. Nothing here changes a call.

use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::door::reply::{Reply, path_of};
use crate::parties::twilio::{Form, is_sid};
use crate::records::ended_by::EndedBy;
use crate::records::event::Direction;
use crate::records::journal::{journals, sid_of};
use crate::records::past::{JournalSlice, PastCall};
use crate::records::transcript::Utterance;
use crate::setup::agent::{Agent, ToolAction};
use crate::toolbox::threads::lock;
use crate::toolbox::time::{by_the_calendar, in_seconds};
use crate::{Bridge, Call};

/// Past calls on one page of `/calls`, and how many it has unless told.
const CALLS_A_PAGE_MAX: usize = 200;
const CALLS_A_PAGE: usize = 50;

/// A call in a word or two: in the list, and above its story.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Summary {
    sid: String,
    number: String,
    direction: Direction,
    began: Option<String>,
    ended: Option<String>,
    seconds: f64,
    stage: String,
    ended_by: Option<EndedBy>,
    live: bool,
    speaking: Option<&'static str>,
    /// Utterances.
    lines: usize,
    /// None: there is no n8n to deliver to.
    delivered: Option<bool>,
    transferred: bool,
}

/// `GET /calls?before=<cursor>&limit=<number>`: the calls in progress, and the past ones, newest
/// first. A cursor is a journal's name without its ending.
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
    let (past, next) = past_calls(bridge, &live, before, limit);
    let mut answer = json!({
        "now": by_the_calendar(Timestamp::now()),
        "started": by_the_calendar(bridge.began),
        "version": env!("CARGO_PKG_VERSION"),
        "publicUrl": bridge.config.public_url,
        "maxCalls": bridge.config.max_calls,
        "draining": !bridge.takes_calls(),
        "outbox": {"waiting": bridge.outbox.waiting()},
        "agent": agent_in_short(&bridge.agent),
        "past": past,
        "next": next,
    });
    if before.is_empty() {
        answer["live"] = live.iter().map(|call| json!(Summary::of_live(call))).collect();
    }
    Reply::json(200, &answer)
}

fn query_of(request: &tiny_http::Request) -> Form {
    let query = request.url().split_once('?').map(|(_, query)| query).unwrap_or_default();
    Form::parse(query.as_bytes())
}

/// Only the journals of this page are read, however many there are.
fn past_calls(
    bridge: &Bridge,
    live: &[Arc<Call>],
    before: &str,
    limit: usize,
) -> (Vec<Summary>, Option<String>) {
    bridge.journals.settle();
    let mut paths = journals(&bridge.config.data_dir);
    let stem = |path: &Path| path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    paths.retain(|path| {
        let is_live = live.iter().any(|call| call.sid == sid_of(path));
        let is_older = before.is_empty() || stem(path).is_some_and(|stem| stem.as_str() < before);
        is_older && !is_live
    });
    let first = paths.len().saturating_sub(limit);
    let past = paths[first..].iter().rev().map(|path| Summary::of_past(bridge, path)).collect();
    let next = paths.get(first).filter(|_| first > 0).and_then(|path| stem(path));
    (past, next)
}

impl Summary {
    fn of_live(call: &Call) -> Summary {
        let (stage, how) = {
            let state = lock(&call.state);
            (state.stage.clone(), state.hang_up)
        };
        Summary {
            sid: call.sid.clone(),
            number: call.number.clone(),
            direction: call.direction,
            began: Some(by_the_calendar(call.began)),
            ended: None,
            seconds: in_seconds(call.rang.elapsed()),
            stage,
            ended_by: how,
            live: true,
            speaking: call.caller().and_then(|caller| caller.speaking()),
            lines: lock(&call.transcript).count(),
            delivered: call.bridge.config.n8n_webhook_url.as_ref().map(|_| false),
            transferred: how == Some(EndedBy::Transferred),
        }
    }

    /// Also of a journal that cannot be read: its name tells that there was a call.
    fn of_past(bridge: &Bridge, path: &Path) -> Summary {
        let past = PastCall::read(path).unwrap_or_default();
        let first = &bridge.agent.first_stage;
        Summary {
            sid: sid_of(path).to_owned(),
            number: past.number,
            direction: past.direction,
            began: past.began.map(by_the_calendar),
            ended: past.ended.map(by_the_calendar),
            seconds: past.began.zip(past.ended).map_or(0.0, |(began, ended)| {
                in_seconds(ended.duration_since(began).try_into().unwrap_or_default())
            }),
            stage: if past.stage.is_empty() { first.clone() } else { past.stage },
            ended_by: past.ended_by,
            live: false,
            speaking: None,
            lines: past.transcript.count(),
            delivered: bridge.config.n8n_webhook_url.as_ref().map(|_| past.delivered),
            transferred: past.transferred,
        }
    }
}

/// What the page draws the flow chart from.
fn agent_in_short(agent: &Agent) -> Value {
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
        None if is_sid(sid) => bridge.journals.find(sid),
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
    let summary = live.map_or_else(|| Summary::of_past(bridge, &path), Summary::of_live);
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
