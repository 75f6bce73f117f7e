//! Every request of Twilio's comes through here: a form, signed.
//!
//! A webhook is signed for the address that Twilio has called, which may be that of all copies
//! (`PUBLIC_URL`) or that of this one (`COPY_URL`). What we have put into the address ourselves is
//! added to the form, and nothing else that stands there. Whoever is refused learns no more than
//! that, and cannot fill the log.

use crate::Bridge;
use crate::door::reply::{Reply, header, path_of, read_body};
use crate::parties::standing::twilio_has_called;
use crate::parties::twilio::{Form, SHARED_KEY, is_sid, not_in_use};
use crate::parties::twilio::{signature_is_valid, why_invalid};
use crate::toolbox::log::log_refusal;

/// 403 without Twilio's signature, 400 without a call's id; what else, `handle` answers.
pub(crate) fn from_twilio(
    bridge: &'static Bridge,
    request: &mut tiny_http::Request,
    handle: fn(&'static Bridge, &Form) -> Reply,
) -> Reply {
    if bridge.config.is_local {
        return not_in_use(request.url());
    }
    let body = match read_body(request) {
        Ok(body) => body,
        Err(reply) => return reply,
    };
    let mut form = Form::parse(&body);
    if let Some(token) = &bridge.config.twilio_auth_token {
        let signature = header(request, "X-Twilio-Signature");
        let url = format!("{}{}", bridge.config.public_url, request.url());
        let own = format!("{}{}", bridge.config.own_url(), request.url());
        if ![&url, &own].iter().any(|url| signature_is_valid(token, url, &form, signature)) {
            let why = why_invalid(signature, header(request, SHARED_KEY));
            // Behind the question mark may stand why a caller wants to be put through.
            let shown = url.split('?').next().unwrap_or_default();
            log_refusal("signature", format_args!("{shown}: {why}"));
            twilio_has_called(signature, false);
            return Reply::text(403, "the signature is missing or wrong");
        }
    }
    form.add_our_own(request.url());
    if !is_sid("CA", form.get("CallSid")) {
        let why = "CallSid is missing or malformed";
        log_refusal("call_sid", format_args!("{}: {why}", path_of(request)));
        return Reply::text(400, why);
    }
    twilio_has_called("", true);
    handle(bridge, &form)
}
