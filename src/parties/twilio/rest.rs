//! Twilio's REST API, of which one request is used: make a call.
//!
//! `POST /2010-04-01/Accounts/{AccountSid}/Calls.json`, a form, signed with the account's id and
//! token as Basic authentication. When the person picks up, Twilio asks `/incoming-call`, and from
//! there on the call is one like any other. Nothing is tried twice: a phone would ring twice.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::door::reply::Reply;
use crate::parties::twilio::OUTGOING;
use crate::setup::settings::Config;
use crate::toolbox::failure::Party;
use crate::toolbox::http::{Ask, Http};
use crate::toolbox::log::log;

/// Twilio's answer. Later, whoever ordered the call is told that there was none.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Twilio's description of a call it makes takes 2 KiB.
const ANSWER_BYTES_MAX: u64 = 64 * 1_024;

/// Rings the number. `id` comes back with the webhook, by which step 1 knows the call. Returns the
/// call's `CallSid`, or what whoever ordered it is told, and whether it may ring all the same.
pub(crate) fn ring(
    http: &Http,
    config: &Config,
    number: &str,
    id: &str,
) -> Result<String, (Reply, bool)> {
    let (Some(account), Some(token), Some(from)) =
        (&config.twilio_account_sid, &config.twilio_auth_token, &config.twilio_phone_number)
    else {
        let needed = "TWILIO_ACCOUNT_SID, TWILIO_AUTH_TOKEN and TWILIO_PHONE_NUMBER must be set";
        return Err((Reply::error(503, needed), false));
    };
    let url = format!("{}/2010-04-01/Accounts/{account}/Calls.json", config.twilio_api_url);
    let login = format!("Basic {}", BASE64.encode(format!("{account}:{}", token.reveal())));
    let kind = "application/x-www-form-urlencoded";
    let ask = Ask {
        method: "POST",
        url: &url,
        headers: &[("Authorization", &login), ("Content-Type", kind)],
        body: Some(&form(config, number, from, id)),
        within: ANSWER_WITHIN,
        answer_bytes_max: ANSWER_BYTES_MAX,
        ..Ask::default()
    };
    let answered = http.ask(Party::Twilio, &ask).map_err(|failure| {
        log!(Error, "{failure}");
        (Reply::error(502, &failure.to_string()), !failure.certainly_not_done)
    })?;
    let (status, answer) = (answered.status, serde_json::from_str::<Value>(&answered.body));
    let answer = answer.unwrap_or_default();
    if let (200 | 201, Some(sid)) = (status, answer["sid"].as_str()) {
        return Ok(sid.to_owned());
    }
    let message = answer["message"].as_str().unwrap_or("an answer that cannot be read");
    let message = config.hide_secrets(message.to_owned());
    let code = answer["code"].as_u64();
    log!(Error, "Twilio did not make the call: {status}, code {code:?}: {message}");
    // The orderer's mistakes keep their status; ours and Twilio's are a bad gateway to them.
    let told = if matches!(status, 400 | 429) { status } else { 502 };
    let error = format!("Twilio: {message}");
    let reply = Reply::json(told, &json!({"error": error, "code": code, "status": status}));
    Err((reply, !(400..500).contains(&status)))
}

fn form(config: &Config, number: &str, from: &str, id: &str) -> String {
    // Only this copy knows what was ordered.
    let own = config.own_url();
    let webhook = format!("{own}/incoming-call?{OUTGOING}={id}");
    let status = format!("{own}/call-status?{OUTGOING}={id}");
    let limit = config.max_call.as_secs().to_string();
    // With a message to leave, the machine's greeting must be over first.
    let leaves_message = config.answering_machine_message.is_some();
    let detection = if leaves_message { "DetectMessageEnd" } else { "Enable" };
    let mut form = form_urlencoded::Serializer::new(String::new());
    form.extend_pairs([("To", number), ("From", from), ("Url", &webhook), ("TimeLimit", &limit)]);
    form.append_pair("StatusCallback", &status);
    // Repeated, not joined: that is how Twilio wants a list.
    for event in ["initiated", "ringing", "answered", "completed"] {
        form.append_pair("StatusCallbackEvent", event);
    }
    form.append_pair("MachineDetection", detection);
    // Asynchronous, because a human would otherwise hear seconds of nothing.
    form.extend_pairs([("AsyncAmd", "true"), ("AsyncAmdStatusCallback", &status)]);
    form.finish()
}
