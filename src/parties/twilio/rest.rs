//! Twilio's REST API: a call that goes out.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::Bridge;
use crate::door::reply::Reply;
use crate::toolbox::failure::{Party, unreachable_party};
use crate::toolbox::log::log;

/// Twilio's answer to an outgoing call.
pub(crate) const TWILIO_WITHIN: Duration = Duration::from_secs(10);
/// Twilio's description of a call it makes takes 2 KiB.
pub(crate) const TWILIO_REPLY_BYTES_MAX: u64 = 64 * 1_024;

pub(crate) fn ring_through_twilio(
    bridge: &Bridge,
    number: &str,
    id: &str,
) -> Result<String, Reply> {
    let config = &bridge.config;
    let (Some(account), Some(token), Some(from)) =
        (&config.twilio_account_sid, &config.twilio_auth_token, &config.twilio_phone_number)
    else {
        let needed = "TWILIO_ACCOUNT_SID, TWILIO_AUTH_TOKEN and TWILIO_PHONE_NUMBER must be set";
        return Err(Reply::error(503, needed));
    };
    let public = &config.public_url;
    let webhook = format!("{public}/incoming-call?outgoing={id}");
    let status = format!("{public}/call-status");
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
    let url = format!("{}/2010-04-01/Accounts/{account}/Calls.json", config.twilio_api_url);
    let login = BASE64.encode(format!("{account}:{}", token.reveal()));
    let request = bridge.web.post(url).header("Authorization", format!("Basic {login}"));
    let request = request.header("Content-Type", "application/x-www-form-urlencoded");
    let answered = request.config().timeout_global(Some(TWILIO_WITHIN)).build().send(form.finish());
    read_twilio_answer(bridge, answered)
}

pub(crate) fn read_twilio_answer(
    bridge: &Bridge,
    answered: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
) -> Result<String, Reply> {
    let unreachable = |error| {
        let failure = unreachable_party(Party::Twilio, error, TWILIO_WITHIN);
        log!(Error, "{failure}");
        Reply::error(502, &failure.to_string())
    };
    let mut response = answered.map_err(unreachable)?;
    let status = response.status().as_u16();
    let body = response.body_mut().with_config().limit(TWILIO_REPLY_BYTES_MAX).read_to_string();
    let answer: Value = serde_json::from_str(&body.map_err(unreachable)?).unwrap_or_default();
    if let (200 | 201, Some(sid)) = (status, answer["sid"].as_str()) {
        return Ok(sid.to_owned());
    }
    let message = answer["message"].as_str().unwrap_or("an answer that cannot be read");
    let message = bridge.config.hide_secrets(message.to_owned());
    let code = answer["code"].as_u64();
    log!(Error, "Twilio did not make the call: {status}, code {code:?}: {message}");
    // The caller's mistakes keep their status; ours and Twilio's are a bad gateway to them.
    let told = if matches!(status, 400 | 429) { status } else { 502 };
    let error = format!("Twilio: {message}");
    Err(Reply::json(told, &json!({"error": error, "code": code, "status": status})))
}
