//! The list of calls, and the story of one.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::door::reply::{Reply, path_of, query_of};
use crate::parties::twilio::is_sid;
use crate::records::ended_by::EndedBy;
use crate::records::event::Direction;
use crate::records::journal::{journals, sid_of};
use crate::records::past::{JournalSlice, PastCall};
use crate::records::transcript::Utterance;
use crate::setup::agent::{Agent, ToolAction};
use crate::toolbox::text::by_the_calendar;
use crate::toolbox::threads::lock;
use crate::toolbox::time::in_seconds;
use crate::{Bridge, Call};

/// Past calls on one page of `/calls`, and how many it has unless told.
pub(crate) const CALLS_A_PAGE_MAX: usize = 200;
pub(crate) const CALLS_A_PAGE: usize = 50;
/// A caller is speaking until this long after the last loud frame.
pub(crate) const SPEAKS_ON: Duration = Duration::from_millis(300);

/// A call in a word or two: in the list, and above its story.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Summary {
    pub(crate) sid: String,
    pub(crate) number: String,
    pub(crate) direction: Direction,
    pub(crate) began: Option<String>,
    pub(crate) ended: Option<String>,
    pub(crate) seconds: f64,
    pub(crate) stage: String,
    pub(crate) ended_by: Option<EndedBy>,
    pub(crate) live: bool,
    pub(crate) speaking: Option<&'static str>,
    /// Utterances.
    pub(crate) lines: usize,
    /// None: there is no n8n to deliver to.
    pub(crate) delivered: Option<bool>,
    pub(crate) transferred: bool,
}

impl Call {
    /// One word on who is heard. The caller hears the agent for as long as Twilio plays it.
    pub(crate) fn speaking(&self) -> Option<&'static str> {
        let caller = self.caller()?;
        if *lock(&caller.plays_until) > Instant::now() {
            return Some("agent");
        }
        let loud_at = Duration::from_millis(self.loud_at_ms.load(Ordering::Relaxed));
        let speaks = !loud_at.is_zero() && self.rang.elapsed() < loud_at + SPEAKS_ON;
        speaks.then_some("user")
    }
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
        "draining": bridge.draining.load(Ordering::SeqCst),
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

/// Only the journals of this page are read, however many there are.
pub(crate) fn past_calls(
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
    pub(crate) fn of_live(call: &Call) -> Summary {
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
            speaking: call.speaking(),
            lines: lock(&call.transcript).count(),
            delivered: call.bridge.config.n8n_webhook_url.as_ref().map(|_| false),
            transferred: how == Some(EndedBy::Transferred),
        }
    }

    /// Also of a journal that cannot be read: its name tells that there was a call.
    pub(crate) fn of_past(bridge: &Bridge, path: &Path) -> Summary {
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
pub(crate) fn agent_in_short(agent: &Agent) -> Value {
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
        }),
    )
}

impl Call {
    /// What was said and is not in the journal yet, or, if there is none, all of it.
    pub(crate) fn words_in_memory(&self, all: bool) -> Vec<Utterance> {
        let transcript = lock(&self.transcript);
        transcript.utterances().iter().filter(|one| all || !one.finished).cloned().collect()
    }
}
