//! `--fix`: sets the number's Voice URL and status callback at Twilio, and reads them back.
//!
//! It shows old and new, and asks at the terminal; with `--yes` it does not ask, and without a
//! terminal and without `--yes` nothing is changed. What is set right already is not written again.
//! `TwiML` apps and SIP trunks are left alone: who has set one up knows why.

use std::time::Instant;

use serde_json::Value;

use super::http::shown_url;
use super::report::{Finding, Topic, printable};
use super::setup::Setup;
use super::twilio::{ask, find_number, is_set, judge_number, post, status_url, voice_url};
use super::{Options, STEP_WITHIN};
use crate::parties::twilio::is_sid;
use crate::toolbox::log::say;
use crate::toolbox::waiting::Waiting;
use crate::usage::{ask_person, is_yes};

const FIX: Topic = Topic::new("fix", "fix");

/// What Twilio calls it when it is set, when it is read, and what it shall be.
type Wish = (&'static str, &'static str, String);

/// What was changed, as it reads afterwards; or why nothing was.
pub(super) fn fix(setup: &Setup, options: &Options) -> Vec<Finding> {
    plan(setup, options).unwrap_or_else(|finding| vec![finding])
}

fn plan(setup: &Setup, options: &Options) -> Result<Vec<Finding>, Finding> {
    let config = &setup.bridge.config;
    if config.twilio_auth_token.is_none()
        || config.twilio_account_sid.is_none()
        || config.twilio_phone_number.is_none()
    {
        let needed = "set TWILIO_ACCOUNT_SID, TWILIO_AUTH_TOKEN and TWILIO_PHONE_NUMBER";
        return Err(unchanged("the number is not known", needed));
    }
    let Some(voice) = voice_url(setup).filter(|_| !setup.is_malformed("PUBLIC_URL")) else {
        return Err(unchanged("there is no address yet", "set PUBLIC_URL right first"));
    };
    let waiting = Waiting::for_parties(vec!["Twilio"], STEP_WITHIN);
    let found = find_number(setup, Instant::now() + STEP_WITHIN);
    drop(waiting);
    let number = found.map_err(|finding| unchanged(&finding.what, &finding.cure))?;
    let status = status_url(&voice);
    let wishes: [Wish; 4] = [
        ("VoiceUrl", "voice_url", voice),
        ("VoiceMethod", "voice_method", "POST".into()),
        ("StatusCallback", "status_callback", status),
        ("StatusCallbackMethod", "status_callback_method", "POST".into()),
    ];
    let changes: Vec<Wish> =
        wishes.into_iter().filter(|(_, read, wish)| !is_set(&number, read, wish)).collect();
    if changes.is_empty() {
        return Err(FIX.ok("nothing to change at Twilio"));
    }
    ask_first(setup, options, &number, &changes)?;
    change(setup, &number, &changes)
}

fn unchanged(why: &str, cure: &str) -> Finding {
    FIX.warning(format!("nothing was changed: {why}"), cure)
}

/// Shows what would change. Ok: go ahead.
fn ask_first(
    setup: &Setup,
    options: &Options,
    number: &Value,
    changes: &[Wish],
) -> Result<(), Finding> {
    let whose = number["phone_number"].as_str().unwrap_or_default();
    let mut text = format!("\n  At Twilio, for {whose}:\n");
    for (name, read, wish) in changes {
        let old = match number[*read].as_str().unwrap_or_default() {
            "" => "(not set)".to_owned(),
            old => shown_url(old),
        };
        let line = format!("    {name:<21} {old} -> {wish}");
        text.push_str(&printable(&setup.bridge.config, &line));
        text.push('\n');
    }
    if !options.json {
        say(&text);
    }
    if options.yes {
        return Ok(());
    }
    let answer = if options.json { None } else { ask_person("  Change this? [y/N] ") };
    match answer {
        Some(answer) if is_yes(&answer) => Ok(()),
        Some(_) => {
            let cure = "answer y, or set it in the console by hand";
            Err(FIX.warning("nothing was changed", cure))
        }
        None => {
            Err(unchanged("there is no terminal to ask at", "add --yes to do it without asking"))
        }
    }
}

fn change(setup: &Setup, number: &Value, changes: &[Wish]) -> Result<Vec<Finding>, Finding> {
    let Some(sid) = number["sid"].as_str().filter(|sid| is_sid("PN", sid)) else {
        let cure = "set it in the console by hand";
        return Err(FIX.wrong("the number has no id at Twilio", cure));
    };
    let _waiting = Waiting::for_parties(vec!["Twilio"], 2 * STEP_WITHIN);
    let path = format!("/IncomingPhoneNumbers/{sid}.json");
    let mut form = form_urlencoded::Serializer::new(String::new());
    form.extend_pairs(changes.iter().map(|(name, _, wish)| (*name, wish.as_str())));
    post(setup, &path, &form.finish(), STEP_WITHIN).map_err(|trouble| {
        FIX.wrong(format!("Twilio did not take the change: {}", trouble.what), trouble.cure)
    })?;
    // Not what Twilio said it has done, but what it says when it is asked.
    let number = ask(setup, &path, Instant::now() + STEP_WITHIN).map_err(|trouble| {
        let what = format!("changed, but the number cannot be read back: {}", trouble.what);
        FIX.wrong(what, "run callbridge check again")
    })?;
    let is_done = changes.iter().all(|(_, read, wish)| is_set(&number, read, wish));
    let mut findings = vec![if is_done {
        FIX.ok("Twilio took the change, and confirms it when asked again")
    } else {
        FIX.wrong(
            "Twilio took the change, but still shows something else",
            "look at the number in the console",
        )
    }];
    findings.extend(judge_number(setup, &number));
    Ok(findings)
}
