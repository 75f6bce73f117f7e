//! The page's own phone: a call without Twilio, for the owner to hear the agent.
//!
//! To the story it is a call like any other. Where Twilio gets `TwiML`, the page gets JSON that
//! says the same, and behind that it does what Twilio would: opens the media stream with the
//! token, talks, and asks what comes next when the stream is over. It rings nobody and costs no
//! telephone minute; the agent's time is billed as always.

use serde_json::{Value, json};

use crate::door::reply::Reply;
use crate::parties::twilio::{Form, is_sid};
use crate::records::event::Direction;
use crate::records::past::PastCall;
use crate::toolbox::random::random_hex;
use crate::{Answer, Bridge, IncomingCall, take_call, what_comes_next};

/// The number of whoever calls through the page. No number of a telephone's looks like it.
const BROWSER: &str = "browser";

/// `POST /browser-call`: the page's phone has been picked up. Behind this it does what Twilio
/// would: opens the media stream with the token, and talks.
pub(crate) fn browser_call(bridge: &'static Bridge, _url: &str, _order: &Value) -> Reply {
    let sid = format!("CA{}", random_hex());
    let incoming = IncomingCall {
        sid: &sid,
        number: BROWSER,
        to: "",
        stir_verstat: "",
        direction: Direction::Browser,
        order: None,
        wire: "POST /browser-call\nAuthorization: ***\n\n{}".into(),
    };
    let answer = take_call(bridge, &incoming);
    let Answer::Stream { .. } = &answer else {
        let error = json!({"error": answer.sentence(bridge), "twiml": answer.twiml(bridge)});
        return Reply::json(503, &error);
    };
    Reply::json(
        200,
        &json!({
            "callSid": sid,
            "streamPath": answer.stream_path(),
            "twiml": answer.twiml(bridge),
        }),
    )
}

impl Answer {
    /// What the caller would be told.
    fn sentence(&self, bridge: &Bridge) -> String {
        match self {
            Answer::Sentence(sentence) => sentence.clone(),
            Answer::Person(_) => bridge.agent.get().phrases.putting_through.clone(),
            Answer::Refuse => "n8n refuses this call.".to_owned(),
            Answer::Stream { .. } | Answer::Transfer(_) | Answer::HangUp => String::new(),
        }
    }

    /// What the person would be told.
    fn whisper(&self, bridge: &Bridge) -> Option<String> {
        match self {
            Answer::Transfer(transfer) => Some(bridge.agent.get().whisper(&transfer.reason)),
            Answer::Stream { .. }
            | Answer::Person(_)
            | Answer::Sentence(_)
            | Answer::Refuse
            | Answer::HangUp => None,
        }
    }

    /// Where the stream opens, at the address that the page came from.
    fn stream_path(&self) -> Option<String> {
        match self {
            Answer::Stream { token } => Some(format!("/media-stream/{token}")),
            Answer::Person(_)
            | Answer::Transfer(_)
            | Answer::Sentence(_)
            | Answer::Refuse
            | Answer::HangUp => None,
        }
    }
}

/// `POST /browser-call/{sid}/stream-ended`: what Twilio asks at `/stream-ended`, asked by the page.
/// `callStatus`, `dialCallStatus` and `dialBridged` in the body mean what they mean in Twilio's
/// form: the page rings nobody, but it can tell what came of it.
pub(crate) fn browser_stream_ended(bridge: &'static Bridge, url: &str, order: &Value) -> Reply {
    let sid = browser_stream(url.split('?').next().unwrap_or_default()).unwrap_or_default();
    // With the number of a call of Twilio's, this would cut it.
    let direction = match bridge.calls.find(sid) {
        Some(call) => Some(call.direction),
        None => bridge
            .journals
            .find(sid)
            .and_then(|path| PastCall::read(&path).ok())
            .map(|past| past.direction),
    };
    if direction != Some(Direction::Browser) {
        return Reply::error(404, "this is no call of the page's phone");
    }
    let fields = [
        ("callStatus", "CallStatus"),
        ("dialCallStatus", "DialCallStatus"),
        ("dialBridged", "DialBridged"),
    ];
    let field = |(ours, twilios)| Some((String::from(twilios), order[ours].as_str()?.to_owned()));
    let form = Form(fields.into_iter().filter_map(field).collect());
    let answer = what_comes_next(bridge, sid, &form);
    let (twiml, path) = (answer.twiml(bridge), answer.stream_path());
    let whisper = answer.whisper(bridge);
    Reply::json(200, &json!({"twiml": twiml, "streamPath": path, "whisper": whisper}))
}

/// The call in `/browser-call/{sid}/stream-ended`.
pub(crate) fn browser_stream(path: &str) -> Option<&str> {
    path.strip_prefix("/browser-call/")?
        .strip_suffix("/stream-ended")
        .filter(|sid| is_sid("CA", sid))
}
