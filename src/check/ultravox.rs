//! Ultravox: is the key good, and what does the account allow? Then, at the same time: does it know
//! the model, each voice of the agent files, and the corpus?
//!
//! Only lists and records are read (`GET`); no call is created, so nothing is billed. A key that
//! does not work ends the look, because everything else would only repeat it. A question that gets
//! no usable answer after the key was good is a warning: a call may well work.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::http::{Trouble, all_pages, get, host_of};
use super::report::{Finding, Level, Topic};
use super::setup::Setup;
use super::{Question, STEP_WITHIN, all_at_once, offered};
use crate::setup::settings::Config;

const ACCOUNT: Topic = Topic::new("Ultravox", "account");
const MINUTES: Topic = Topic::new("Ultravox", "minutes");
const CALLS: Topic = Topic::new("Ultravox", "calls");
const MODEL: Topic = Topic::new("Ultravox", "model");
const VOICES: Topic = Topic::new("Ultravox", "voices");
const CORPUS: Topic = Topic::new("Ultravox", "corpus");

pub(super) fn look(setup: &'static Setup) -> Vec<Finding> {
    let config = &setup.bridge.config;
    if setup.is_malformed("ULTRAVOX_API_KEY") || setup.is_malformed("ULTRAVOX_API_URL") {
        let what = "not asked: ULTRAVOX_API_KEY or ULTRAVOX_API_URL is not valid";
        return vec![ACCOUNT.skipped(what, "fix the settings first")];
    }
    let account = match ask(setup, "/api/accounts/me", Instant::now() + STEP_WITHIN) {
        Ok(account) => account,
        Err(trouble) => {
            let what = "model, voices and corpus are not looked up, for the reason above";
            let rest = MODEL.skipped(what, "fix that first");
            return vec![trouble.finding(&ACCOUNT, Level::Wrong), rest];
        }
    };
    let mut findings = judge_account(config, &account);
    let deadline = Instant::now() + STEP_WITHIN;
    let mut questions: Vec<Question> = Vec::new();
    if let Some(left) = free_time(&account) {
        questions.push(Box::new(move || judge_minutes(setup, left, deadline)));
    }
    questions.push(Box::new(move || or_warning(&MODEL, find_model(setup, deadline))));
    for (voice, stages) in voices(setup) {
        questions.push(Box::new(move || {
            let topic = Topic::named("Ultravox", format!("voice {voice}"));
            or_warning(&topic, find_voice(setup, &topic, &voice, &stages, deadline))
        }));
    }
    questions.push(Box::new(move || or_warning(&CORPUS, find_corpus(setup, deadline))));
    findings.extend(all_at_once("Ultravox", questions));
    if !setup.agent_is_right {
        let what = "voices are not looked up: the agent files have mistakes";
        findings.push(VOICES.skipped(what, "fix the agent files first"));
    }
    findings
}

fn or_warning(topic: &Topic, found: Result<Finding, Trouble>) -> Finding {
    found.unwrap_or_else(|trouble| trouble.finding(topic, Level::Warning))
}

fn judge_account(config: &Config, account: &Value) -> Vec<Finding> {
    let name = account["name"].as_str().filter(|name| !name.is_empty()).unwrap_or("no name");
    let mut findings = vec![ACCOUNT.ok(format!("the key works ({name})"))];
    if let Some(most) = account["allowedConcurrentCalls"].as_u64() {
        let what = format!("the plan allows {most} calls at once");
        let is_less = usize::try_from(most).is_ok_and(|most| most < config.max_calls.get());
        findings.push(if config.max_calls.is_set() && is_less {
            let what = format!("{what}, but MAX_CALLS is {}", config.max_calls.get());
            let cure =
                format!("set MAX_CALLS={most}: the next caller then hears that all lines are busy");
            CALLS.warning(what, cure)
        } else {
            CALLS.ok(what)
        });
    }
    findings
}

/// None: there is a plan, and free time does not matter.
fn free_time(account: &Value) -> Option<Duration> {
    let subscribed = account["hasActiveSubscription"].as_bool().unwrap_or(false);
    account["freeTimeRemaining"].as_str().and_then(seconds).filter(|_| !subscribed)
}

/// Who pays as he goes has neither a plan nor free minutes; the account's billing shows it. Where
/// it shows nothing, a call may still work.
fn judge_minutes(setup: &Setup, left: Duration, deadline: Instant) -> Finding {
    let max_call = setup.bridge.config.max_call;
    let minutes = left.as_secs() / 60;
    let plural = if minutes == 1 { " is" } else { "s are" };
    if left >= max_call {
        return MINUTES.ok(format!("{minutes} free minute{plural} left"));
    }
    let billing = ask(setup, "/api/accounts/me/billing", deadline);
    if billing.is_ok_and(|billing| !billing["paymentMethod"].is_null()) {
        return MINUTES.ok("the account pays as it goes");
    }
    let cure = "add a payment method at app.ultravox.ai";
    if minutes == 0 {
        let what = "no free minutes are left, and there is no plan: calls work only if you pay as \
                    you go";
        return MINUTES.warning(what, format!("{cure}, or ignore this if you have one"));
    }
    // An unjoined or running call holds back its maximum duration.
    let longest = max_call.as_secs();
    let what =
        format!("{minutes} free minute{plural} left, less than one call may take ({longest} s)");
    MINUTES.warning(what, format!("{cure}, or set MAX_CALL_SECONDS={} or less", left.as_secs()))
}

/// `"1800s"`, `"0.5s"`.
fn seconds(text: &str) -> Option<Duration> {
    let seconds = text.strip_suffix('s')?.parse::<f64>().ok()?;
    Duration::try_from_secs_f64(seconds.max(0.0)).ok()
}

fn find_model(setup: &Setup, deadline: Instant) -> Result<Finding, Trouble> {
    let wanted = &setup.bridge.config.ultravox_model;
    let models = list(setup, "/api/models", "", deadline)?;
    let names = models.iter().filter_map(|model| model["name"].as_str());
    if names.clone().any(|name| name == wanted) {
        return Ok(MODEL.ok(format!("knows the model {wanted}")));
    }
    let cure = format!("set ULTRAVOX_MODEL to one of: {}", offered(names));
    Ok(MODEL.wrong(format!("has no model \"{wanted}\""), cure))
}

/// Each voice once, with the stages that speak with it.
fn voices(setup: &Setup) -> BTreeMap<String, Vec<String>> {
    let mut voices: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let agent = setup.bridge.agent.get();
    let stages = agent.stages.iter().filter(|_| setup.agent_is_right);
    for (name, stage) in stages {
        voices.entry(stage.voice.clone()).or_default().push(name.clone());
    }
    voices
}

/// Ultravox takes an id, or a name if no other voice has it.
fn find_voice(
    setup: &Setup,
    topic: &Topic,
    voice: &str,
    stages: &[String],
    deadline: Instant,
) -> Result<Finding, Trouble> {
    let place = format!("stages.{}.voice", stages.join(", "));
    if is_uuid(voice) {
        return Ok(match find_by_id(setup, "/api/voices", voice, deadline)? {
            Some(found) => topic.ok(format!("knows the voice {voice} ({})", name_of(&found))),
            None => topic.wrong(
                format!("has no voice with the id {voice}"),
                format!("correct {place} in agent.json, by name or id"),
            ),
        });
    }
    let search: String =
        form_urlencoded::Serializer::new(String::new()).append_pair("search", voice).finish();
    let found = list(setup, "/api/voices", &search, deadline)?;
    let named = found.iter().filter(|found| found["name"] == voice);
    let ids: Vec<&str> = named.filter_map(|found| found["voiceId"].as_str()).collect();
    Ok(match ids.as_slice() {
        [_] => topic.ok(format!("knows the voice {voice}")),
        [] => {
            let alike = offered(found.iter().filter_map(|found| found["name"].as_str()));
            topic.wrong(
                format!("has no voice named \"{voice}\""),
                format!("correct {place} in agent.json; similar names: {alike}"),
            )
        }
        ids => topic.wrong(
            format!("has {} voices named \"{voice}\"", ids.len()),
            format!(
                "put one of these ids into {place} in agent.json: {}",
                offered(ids.iter().copied())
            ),
        ),
    })
}

fn find_corpus(setup: &Setup, deadline: Instant) -> Result<Finding, Trouble> {
    let Some(id) = &setup.bridge.config.ultravox_corpus_id else {
        let what = "ULTRAVOX_CORPUS_ID is not set, so the agent cannot look anything up";
        return Ok(CORPUS.skipped(what, "set it if you have a corpus at app.ultravox.ai"));
    };
    let Some(corpus) = find_by_id(setup, "/api/corpora", id, deadline)? else {
        let cure = "set ULTRAVOX_CORPUS_ID to the id that app.ultravox.ai shows, or remove it";
        return Ok(CORPUS.wrong(format!("has no corpus \"{id}\""), cure));
    };
    let name = name_of(&corpus);
    if corpus["stats"]["numDocs"].as_u64() == Some(0) {
        let cure =
            "add a source to it at app.ultravox.ai: until then the agent finds nothing in it";
        return Ok(CORPUS.warning(format!("the corpus {name} is empty"), cure));
    }
    Ok(CORPUS.ok(format!("knows the corpus {name}")))
}

fn name_of(found: &Value) -> &str {
    found["name"].as_str().unwrap_or("no name")
}

/// None: it does not exist. What is no id is not asked for: it could name another path.
fn find_by_id(
    setup: &Setup,
    path: &str,
    id: &str,
    deadline: Instant,
) -> Result<Option<Value>, Trouble> {
    if !is_uuid(id) {
        return Ok(None);
    }
    match ask(setup, &format!("{path}/{id}"), deadline) {
        Err(trouble) if trouble.status == 404 => Ok(None),
        found => found.map(Some),
    }
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36 && text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
}

fn list(setup: &Setup, path: &str, query: &str, deadline: Instant) -> Result<Vec<Value>, Trouble> {
    let names = ("results", "next", "ULTRAVOX_API_URL");
    all_pages(path, query, names, |path| ask(setup, path, deadline))
}

fn ask(setup: &Setup, path: &str, deadline: Instant) -> Result<Value, Trouble> {
    let config = &setup.bridge.config;
    let url = format!("{}{path}", config.ultravox_api_url);
    let within = deadline.saturating_duration_since(Instant::now());
    let headers = [("X-API-Key", config.ultravox_api_key.reveal())];
    let answer = get(&setup.bridge.http, &url, &headers, within)
        .map_err(|why| Trouble::no_answer(&url, &why, "ULTRAVOX_API_URL"))?;
    let status = answer.status;
    let mut what = format!("{} answered {}", host_of(&url), answer.brief(config));
    let cure = match status {
        200 if answer.json().is_object() => return Ok(answer.json()),
        401 | 403 => {
            what = format!("does not know the key ({status})");
            "copy it into ULTRAVOX_API_KEY again: app.ultravox.ai, Settings, API keys"
        }
        402 => "the account has no minutes left: add billing at app.ultravox.ai",
        429 => "too many requests at the moment: try again in a minute",
        500.. => "Ultravox has a problem: try again later",
        _ => "Ultravox does not answer like this: check ULTRAVOX_API_URL",
    };
    Err(Trouble { status, ..Trouble::new(what, cure) })
}
