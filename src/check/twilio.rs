//! Twilio: is the account active, is our Auth Token the one it signs with, and where do the
//! number's calls go? They must go to `PUBLIC_URL`, letter for letter, or every signature is wrong.
//!
//! Only records are read here; what `--fix` changes is in `fix`, which asks and judges with the
//! same functions. The account's record holds its Auth Token in clear, so nothing of a record is
//! shown but the fields that are named here.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;
use subtle::ConstantTimeEq as _;

use super::http::{Answer, NoAnswer, Trouble, all_pages, get, shown_url};
use super::report::{Finding, Level, Topic};
use super::setup::Setup;
use super::{STEP_WITHIN, offered};
use crate::setup::settings::Config;
use crate::toolbox::failure::Secret;
use crate::toolbox::http::Ask;

const ACCOUNT: Topic = Topic::new("Twilio", "account");
const TOKEN: Topic = Topic::new("Twilio", "token");
const NUMBER: Topic = Topic::new("Twilio", "number");
const HANDLED_BY: Topic = Topic::new("Twilio", "handled by");
pub(super) const VOICE: Topic = Topic::new("Twilio", "voice");
const METHOD: Topic = Topic::new("Twilio", "method");
const STATUS_CALLBACK: Topic = Topic::new("Twilio", "status callback");
/// What `--fix` can change, and looks at again.
pub(super) const FIXABLE: [Topic; 4] = [VOICE, METHOD, STATUS_CALLBACK, HANDLED_BY];

pub(super) fn look(setup: &'static Setup) -> Vec<Finding> {
    let config = &setup.bridge.config;
    let mut findings = Vec::new();
    if config.is_local && !config.has_telephone() {
        let what = "not asked: in local mode there is no telephone";
        return vec![NUMBER.skipped(what, "buy a number with voice if you want one")];
    }
    if config.twilio_auth_token.is_none() {
        findings.push(TOKEN.warning(
            "TWILIO_AUTH_TOKEN is not set: anyone can start calls here that you pay for",
            "copy the Auth Token from the first page of the Twilio console",
        ));
    }
    if config.twilio_auth_token.is_none() || config.twilio_account_sid.is_none() {
        let what = "the number is not checked: that takes TWILIO_ACCOUNT_SID and TWILIO_AUTH_TOKEN";
        let voice = voice_url(setup).unwrap_or_else(|| "PUBLIC_URL/incoming-call".into());
        let cure = format!(
            "set both; or, in the console, set \"A call comes in\" to Webhook, {voice}, HTTP POST, \
             and \"Call status changes\" to {}, HTTP POST",
            status_url(&voice)
        );
        findings.push(NUMBER.skipped(what, cure));
        return findings;
    }
    match ask(setup, ".json", Instant::now() + STEP_WITHIN) {
        Ok(account) => {
            findings.extend(judge_account(config, &account));
            match find_number(setup, Instant::now() + STEP_WITHIN) {
                Ok(number) => {
                    let whose = number["phone_number"].as_str().unwrap_or("?");
                    findings.push(NUMBER.ok(format!("{whose} belongs to this account")));
                    findings.extend(judge_number(setup, &number));
                }
                Err(finding) => findings.push(finding),
            }
        }
        Err(trouble) => {
            findings.push(trouble.finding(&ACCOUNT, Level::Wrong));
            let what = "the number is not checked, for the reason above";
            findings.push(NUMBER.skipped(what, "fix that first"));
        }
    }
    findings
}

fn judge_account(config: &Config, account: &Value) -> Vec<Finding> {
    let status = account["status"].as_str().unwrap_or("active");
    let mut findings = vec![match (status, account["type"].as_str()) {
        ("active", Some("Trial")) => ACCOUNT.warning(
            "a trial account: it plays an announcement, takes calls only from numbers that you \
             have verified, and ends them after 10 minutes",
            "upgrade it in the console",
        ),
        ("active", _) => ACCOUNT.ok("the account is active"),
        (status, _) => ACCOUNT.wrong(
            format!("the account is {status}"),
            "see the console's first page: billing, or a question from Twilio",
        ),
    }];
    let primary = account["auth_token"].as_str().filter(|token| !token.is_empty());
    if let (Some(primary), Some(ours)) = (primary, &config.twilio_auth_token)
        && !bool::from(primary.as_bytes().ct_eq(ours.reveal().as_bytes()))
    {
        findings.push(TOKEN.wrong(
            "TWILIO_AUTH_TOKEN is not the primary Auth Token, which Twilio signs with",
            "copy the primary Auth Token, from the first page of the console",
        ));
    }
    findings
}

/// Twilio's filter finds parts of numbers as well, so the comparison is ours.
pub(super) fn find_number(setup: &Setup, deadline: Instant) -> Result<Value, Finding> {
    let wanted = setup.bridge.config.twilio_phone_number.as_deref();
    let numbers = list_numbers(setup, wanted, deadline)
        .map_err(|trouble| trouble.finding(&NUMBER, Level::Wrong))?;
    if let Some(wanted) = wanted {
        if let Some(number) = numbers.into_iter().find(|number| number["phone_number"] == wanted) {
            return Ok(number);
        }
        let all = list_numbers(setup, None, deadline).unwrap_or_default();
        let what = format!("{wanted} is not a number of this account");
        let cure = format!("set TWILIO_PHONE_NUMBER to one of: {}", offered(phone_numbers(&all)));
        return Err(NUMBER.wrong(what, cure));
    }
    let what = if setup.is_malformed("TWILIO_PHONE_NUMBER") {
        "not checked: TWILIO_PHONE_NUMBER is malformed"
    } else {
        "TWILIO_PHONE_NUMBER is not set, so no number is checked"
    };
    let cure = match offered(phone_numbers(&numbers)).as_str() {
        "(none)" => {
            "buy a number with voice in the console, and set TWILIO_PHONE_NUMBER".to_owned()
        }
        numbers => format!("set TWILIO_PHONE_NUMBER to one of: {numbers}"),
    };
    Err(NUMBER.skipped(what, cure))
}

fn phone_numbers(numbers: &[Value]) -> impl Iterator<Item = &str> {
    numbers.iter().filter_map(|number| number["phone_number"].as_str())
}

fn list_numbers(
    setup: &Setup,
    wanted: Option<&str>,
    deadline: Instant,
) -> Result<Vec<Value>, Trouble> {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("PageSize", "100");
    if let Some(wanted) = wanted {
        query.append_pair("PhoneNumber", wanted);
    }
    let names = ("incoming_phone_numbers", "next_page_uri", "TWILIO_API_URL");
    all_pages("/IncomingPhoneNumbers.json", &query.finish(), names, |path| {
        ask(setup, path, deadline)
    })
}

pub(super) fn voice_url(setup: &Setup) -> Option<String> {
    setup.public_url.as_ref().map(|url| format!("{url}/incoming-call"))
}

pub(super) fn status_url(voice_url: &str) -> String {
    voice_url.replacen("/incoming-call", "/call-status", 1)
}

/// Where the number's calls go, letter for letter.
pub(super) fn judge_number(setup: &Setup, number: &Value) -> Vec<Finding> {
    let text = |name: &str| number[name].as_str().unwrap_or_default();
    let mut findings = Vec::new();
    if number["capabilities"]["voice"].as_bool() == Some(false) {
        let what = "the number has no voice, so it cannot be called";
        findings.push(HANDLED_BY.wrong(what, "buy a number with voice"));
    }
    for (field, handler) in [("voice_application_sid", "a TwiML app"), ("trunk_sid", "a SIP trunk")]
    {
        let sid = text(field);
        if !sid.is_empty() {
            findings.push(HANDLED_BY.wrong(
                format!("the number's calls go to {handler} ({sid}): its Voice URL is ignored"),
                "in the console, set \"Configure with\" to Webhook, TwiML Bin, Function, …",
            ));
        }
    }
    match voice_url(setup) {
        Some(wanted) => findings.extend(judge_webhooks(number, &wanted)),
        None => findings.push(VOICE.skipped(
            "the number's Voice URL is not compared: there is no address yet",
            setup.towards_an_address(),
        )),
    }
    findings
}

fn judge_webhooks(number: &Value, wanted: &str) -> Vec<Finding> {
    let text = |name: &str| number[name].as_str().unwrap_or_default();
    let fix = "callbridge check --fix sets it";
    let mut findings = vec![if is_set(number, "voice_url", wanted) {
        VOICE.ok(format!("the number's Voice URL is {wanted}"))
    } else {
        let what = match text("voice_url") {
            "" => "the number has no Voice URL".to_owned(),
            url => format!("the number's Voice URL is {}", shown_url(url)),
        };
        VOICE.wrong(what, format!("it must be {wanted}: {fix}"))
    }];
    if text("voice_method") == "GET" {
        let what = "Twilio asks the number's Voice URL with GET, which callbridge refuses (405)";
        findings.push(METHOD.wrong(what, format!("it must be HTTP POST: {fix}")));
    }
    let (status, method) = (status_url(wanted), text("status_callback_method"));
    if !is_set(number, "status_callback", &status) || method == "GET" {
        let what = match text("status_callback") {
            "" => {
                "the number has no status callback: the line of a caller who hangs up early stays \
                 busy"
                    .to_owned()
            }
            url => format!("the number's status callback is {} ({method})", shown_url(url)),
        };
        findings.push(
            STATUS_CALLBACK.warning(what, format!("it should be {status}, HTTP POST: {fix}")),
        );
    }
    findings
}

/// Twilio sends nothing of what stands behind a `#`: those are its own connection overrides.
pub(super) fn is_set(number: &Value, field: &str, wish: &str) -> bool {
    number[field].as_str().is_some_and(|text| text.split('#').next() == Some(wish))
}

pub(super) fn ask(setup: &Setup, path: &str, deadline: Instant) -> Result<Value, Trouble> {
    let within = deadline.saturating_duration_since(Instant::now());
    let (url, login) = address(setup, path);
    let answered = get(&setup.bridge.http, &url, &[("Authorization", &login)], within);
    understand(&url, answered)
}

/// Changes a record, and gives what Twilio says of it.
pub(super) fn post(
    setup: &Setup,
    path: &str,
    form: &str,
    within: Duration,
) -> Result<Value, Trouble> {
    let (url, login) = address(setup, path);
    let kind = "application/x-www-form-urlencoded";
    let ask = Ask {
        method: "POST",
        url: &url,
        headers: &[("Authorization", &login), ("Content-Type", kind)],
        body: Some(form),
        within,
        ..Ask::default()
    };
    understand(&url, Answer::to(&setup.bridge.http, &ask))
}

fn address(setup: &Setup, path: &str) -> (String, String) {
    let config = &setup.bridge.config;
    let account = config.twilio_account_sid.as_deref().unwrap_or_default();
    let token = config.twilio_auth_token.as_ref().map(Secret::reveal).unwrap_or_default();
    let url = format!("{}/2010-04-01/Accounts/{account}{path}", config.twilio_api_url);
    (url, format!("Basic {}", BASE64.encode(format!("{account}:{token}"))))
}

fn understand(url: &str, answered: Result<Answer, NoAnswer>) -> Result<Value, Trouble> {
    let answer = answered.map_err(|why| Trouble::no_answer(url, &why, "TWILIO_API_URL"))?;
    let body = answer.json();
    if answer.status == 200 && body.is_object() {
        return Ok(body);
    }
    let code = body["code"].as_u64().unwrap_or_default();
    let message = body["message"].as_str().unwrap_or("an answer that cannot be read");
    let (what, cure) = match (answer.status, code) {
        (_, 20_008) => (
            "these are test credentials, which have no numbers".to_owned(),
            "use the live Account SID and Auth Token, from the first page of the console",
        ),
        (401, _) | (_, 20_003) => (
            "does not accept this Account SID with this Auth Token (401)".to_owned(),
            "copy both from the first page of the console; an API key's secret does not work",
        ),
        (429, _) => ("gets too many requests (429)".to_owned(), "try again in a minute"),
        (404, _) => (
            format!("knows no such account ({message})"),
            "copy TWILIO_ACCOUNT_SID again; check TWILIO_API_URL if it is set",
        ),
        (status @ 500.., _) => (format!("has a problem ({status})"), "try again later"),
        (status, code) => (
            format!("answered {status}, code {code}: {message}"),
            "look the code up at twilio.com/docs/api/errors",
        ),
    };
    Err(Trouble { status: answer.status, ..Trouble::new(what, cure) })
}
