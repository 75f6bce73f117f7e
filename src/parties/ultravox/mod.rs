//! Ultravox, where the agent lives: its calls are created over REST, and joined over a WebSocket.
//!
//! ```text
//! POST /api/calls                        the body is in `body`
//! X-API-Key: ***
//! <- 201 {"callId":"7c21…","joinUrl":"wss://…", …}
//! ```
//!
//! [`Ultravox::create`] and [`Ultravox::join`] block until a deadline; what is said afterwards
//! goes over the agent's leg (`leg`). Busy (429, 503) is tried once more, if Ultravox names a time
//! that a caller can wait for; a refused call that was to last long, once as a shorter one. Nothing
//! else is: a second call would be billed as well.

pub(crate) mod body;
pub(crate) mod leg;
pub(crate) mod tool;

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustls::ClientConfig;
use serde_json::{Value, json};

use crate::parties::standing;
use crate::parties::ultravox::body::LONGEST_CALL;
use crate::parties::ultravox::leg::AgentLeg;
use crate::records::event::Event;
use crate::records::tap::{Exhibit, Tap};
use crate::setup::settings::Config;
use crate::toolbox::dial::dial;
use crate::toolbox::failure::{Failure, Party, Secret};
use crate::toolbox::http::{Answered, Ask, Http};
use crate::toolbox::log::{Sid, log};
use crate::toolbox::metrics;
use crate::toolbox::text::{cut, shorten};
use crate::toolbox::threads::spawn;

/// To create the agent's call and join it. Then the caller hears the apology.
pub(crate) const AGENT_WITHIN: Duration = Duration::from_secs(10);
/// The longest `Retry-After` of a busy Ultravox that is waited for, once.
const BUSY_RETRY_WITHIN: Duration = Duration::from_secs(1);
/// Of a call's summary, which takes a paragraph.
const SUMMARY_CHARS_MAX: usize = 4_000;

/// To delete a call, while the owner waits.
pub(crate) const DELETE_WITHIN: Duration = Duration::from_secs(10);

/// The owner's account at Ultravox.
pub(crate) struct Ultravox {
    http: Http,
    tls: Arc<ClientConfig>,
    config: Arc<Config>,
}

/// What we keep of the 201.
pub(crate) struct AgentCall {
    pub(crate) id: String,
    /// Whoever holds it may join the call.
    pub(crate) join_url: Secret,
}

impl Ultravox {
    pub(crate) fn new(http: Http, tls: Arc<ClientConfig>, config: Arc<Config>) -> Ultravox {
        Ultravox { http, tls, config }
    }

    /// Creates the agent's call. With `prior`, the id of an earlier one, the new agent knows what
    /// was said to that one.
    pub(crate) fn create(
        &self,
        body: &Value,
        prior: Option<&str>,
        deadline: Instant,
        tap: &Tap,
    ) -> Result<AgentCall, Failure> {
        let created = self.try_to_create(body, prior, deadline, tap);
        standing::after_use(Party::Ultravox, &created);
        created
    }

    fn try_to_create(
        &self,
        body: &Value,
        prior: Option<&str>,
        deadline: Instant,
        tap: &Tap,
    ) -> Result<AgentCall, Failure> {
        let sid = body["metadata"]["callSid"].as_str().unwrap_or_default();
        let query = prior.map(|prior| format!("?priorCallId={prior}")).unwrap_or_default();
        tap.show(Exhibit::Create, || {
            format!("POST /api/calls\nX-API-Key: ***\n\n{:#}", in_short(body.clone()))
        });
        let mut answered = self.post_unless_busy(sid, &query, body, deadline)?;
        if answered.status == 400
            && let Some(shorter) = body::no_longer_than_documented(body)
        {
            let most = LONGEST_CALL.as_secs();
            log!(
                Sid { sid },
                Warn,
                Agent,
                "Ultravox refuses a call of {} (400); trying once with {most} s (set \
                 MAX_CALL_SECONDS={most} or less)",
                body["maxDuration"]
            );
            answered = self.post_unless_busy(sid, &query, &shorter, deadline)?;
        }
        if !matches!(answered.status, 200 | 201) {
            return Err(refusal(answered.status, &self.config.hide_secrets(answered.body)));
        }
        let created = read_agent_call(&answered.body)?;
        tap.show(Exhibit::Created, || {
            let join_url = host_only(created.join_url.reveal());
            format!("201\n\n{}", json!({"callId": created.id, "joinUrl": join_url}))
        });
        Ok(created)
    }

    /// Once more if Ultravox is busy, and says so in a way that a caller can wait for.
    fn post_unless_busy(
        &self,
        sid: &str,
        query: &str,
        body: &Value,
        deadline: Instant,
    ) -> Result<Answered, Failure> {
        let body = body.to_string();
        let answered = self.post(query, &body, deadline)?;
        let status = answered.status;
        let pause = retry_after(&answered).unwrap_or(BUSY_RETRY_WITHIN / 2);
        if !matches!(status, 429 | 503) || pause > BUSY_RETRY_WITHIN {
            return Ok(answered);
        }
        let ms = pause.as_millis();
        log!(Sid { sid }, Warn, Agent, "Ultravox is busy ({status}); trying once more in {ms} ms");
        // The only thing that could be waited for is the time Ultravox itself has named.
        thread::sleep(pause);
        self.post(query, &body, deadline)
    }

    fn post(&self, query: &str, body: &str, deadline: Instant) -> Result<Answered, Failure> {
        let began = Instant::now();
        let url = format!("{}/api/calls{query}", self.config.ultravox_api_url);
        let key = self.config.ultravox_api_key.reveal();
        let ask = Ask {
            method: "POST",
            url: &url,
            headers: &[("X-API-Key", key), ("Content-Type", "application/json")],
            body: Some(body),
            within: deadline.saturating_duration_since(began),
            ..Ask::default()
        };
        let posted = self.http.ask(Party::Ultravox, &ask);
        let outcome = match &posted {
            Ok(Answered { status: 200 | 201, .. }) => "created",
            Ok(Answered { status: 429 | 503, .. }) => "busy",
            Ok(_) => "refused",
            Err(_) if Instant::now() >= deadline => "late",
            Err(_) => "failed",
        };
        metrics::ULTRAVOX_CREATES.of(&[outcome]).add();
        metrics::ULTRAVOX_TIME.of(&[]).observe(began.elapsed());
        posted
    }

    /// On a thread of its own, which ends with it: a name may take any time to be resolved, and
    /// what a TLS handshake takes of stack and memory is not to stay with the call.
    pub(crate) fn join(
        &self,
        sid: &str,
        created: AgentCall,
        deadline: Instant,
        tap: &Arc<Tap>,
    ) -> Result<AgentLeg, Failure> {
        let (joined, has_joined) = mpsc::sync_channel(0);
        let (tls, tap) = (Arc::clone(&self.tls), Arc::clone(tap));
        spawn(format!("{} join", shorten(sid)), move || {
            let agent = dial(&created.join_url, &tls).map(|socket| AgentLeg::new(socket, tap));
            if let Err(mpsc::SendError(Ok(agent))) = joined.send(agent) {
                // The webhook has stopped waiting and said so to the caller.
                agent.close("nobody waits for this call");
                agent.cut();
            }
        })
        .map_err(|error| Failure::new(Party::Ultravox, "no thread to join on").caused_by(error))?;
        let left = deadline.saturating_duration_since(Instant::now());
        has_joined.recv_timeout(left).unwrap_or_else(|_| {
            let within = AGENT_WITHIN.as_secs();
            Err(Failure::new(Party::Ultravox, format!("the agent was not ready within {within} s")))
        })
    }

    /// `GET /api/calls/{id}`: what Ultravox says of a call that has ended, as far as it has it. A
    /// failure that counts as refused will not get better.
    pub(crate) fn summary(&self, id: &str, within: Duration) -> Result<Event, Failure> {
        let is_id = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        if !id.bytes().all(is_id) {
            // From a journal that somebody has edited.
            let what = "a call's id that is none";
            return Err(Failure { refused: true, ..Failure::new(Party::Ultravox, what) });
        }
        let url = format!("{}/api/calls/{id}", self.config.ultravox_api_url);
        let headers = [("X-API-Key", self.config.ultravox_api_key.reveal())];
        let ask = Ask { url: &url, headers: &headers, within, ..Ask::default() };
        let answered = self.http.ask(Party::Ultravox, &ask)?;
        match answered.status {
            200 => Ok(read_summary(&answered.body)),
            status => {
                let what = format!("{status} to a question about a call");
                let refused = (400..500).contains(&status) && status != 429;
                Err(Failure { refused, ..Failure::new(Party::Ultravox, what) })
            }
        }
    }

    /// `GET /api/accounts/me`: is the key right, and may one more call be created? It keeps a
    /// connection ready for that call, too.
    pub(crate) fn has_room(&self, within: Duration) -> Result<(), Failure> {
        let found = self.look_for_room(within);
        standing::after_look(Party::Ultravox, &found);
        found
    }

    fn look_for_room(&self, within: Duration) -> Result<(), Failure> {
        let url = format!("{}/api/accounts/me", self.config.ultravox_api_url);
        let headers = [("X-API-Key", self.config.ultravox_api_key.reveal())];
        let ask = Ask { url: &url, headers: &headers, within, ..Ask::default() };
        let answered = self.http.ask(Party::Ultravox, &ask)?;
        let status = answered.status;
        if !(200..300).contains(&status) {
            let what = format!("{status} to a question about the account");
            return Err(Failure::new(Party::Ultravox, what).advise(advice(status)));
        }
        let account: Value = serde_json::from_str(&answered.body).unwrap_or_default();
        let allowed = account["allowedConcurrentCalls"].as_u64();
        if let Some(allowed) = allowed
            && self.config.max_calls.account_allows(allowed)
        {
            let calls = if allowed == 1 { "call" } else { "calls" };
            log!(Info, "the Ultravox account allows {allowed} {calls} at once, and so do we");
        }
        match (account["activeCalls"].as_u64(), allowed) {
            (Some(active), Some(allowed)) if active >= allowed => {
                let what =
                    format!("all {allowed} calls that the account allows at once are in use");
                Err(Failure::new(Party::Ultravox, what).advise("set MAX_CALLS to fit"))
            }
            _ => Ok(()),
        }
    }
}

/// `DELETE /api/calls/{id}`: the call and all that was said in it, for good. One that is not there
/// any more is as good as deleted.
pub(crate) fn delete_call(http: &Http, config: &Config, id: &str) -> Result<(), Failure> {
    if !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        // It would name another path.
        return Err(Failure::new(Party::Ultravox, "the journal has no usable id of the call"));
    }
    let url = format!("{}/api/calls/{id}", config.ultravox_api_url);
    let headers = [("X-API-Key", config.ultravox_api_key.reveal())];
    let within = DELETE_WITHIN;
    let ask = Ask { method: "DELETE", url: &url, headers: &headers, within, ..Ask::default() };
    match http.ask(Party::Ultravox, &ask)?.status {
        200..=299 | 404 => Ok(()),
        status => {
            let what = format!("could not delete the call {id}: {status}");
            Err(Failure::new(Party::Ultravox, what).advise(advice(status)))
        }
    }
}

fn retry_after(answered: &Answered) -> Option<Duration> {
    let seconds = answered.headers.get("Retry-After")?.to_str().ok()?;
    seconds.trim().parse().ok().map(Duration::from_secs)
}

pub(crate) fn read_agent_call(text: &str) -> Result<AgentCall, Failure> {
    let created: Value = serde_json::from_str(text).map_err(|error| {
        Failure::new(Party::Ultravox, "created the call, but its answer is not JSON")
            .caused_by(error)
    })?;
    match (created["callId"].as_str(), created["joinUrl"].as_str()) {
        (Some(id), Some(join_url)) => {
            Ok(AgentCall { id: id.to_owned(), join_url: Secret(join_url.to_owned()) })
        }
        _ => Err(Failure::new(Party::Ultravox, "created the call, but gave no callId or joinUrl")),
    }
}

/// Both are `null` for some seconds. A length that may still change is none.
fn read_summary(text: &str) -> Event {
    let call: Value = serde_json::from_str(text).unwrap_or_default();
    let words = |key: &str| call[key].as_str().map(str::trim).filter(|words| !words.is_empty());
    let summary = words("summary").or_else(|| words("shortSummary")).unwrap_or_default();
    let is_billed = call["billingStatus"] != "BILLING_STATUS_PENDING";
    let seconds = words("billedDuration").filter(|_| is_billed);
    let whole = |length: &str| length.strip_suffix('s')?.split('.').next()?.parse().ok();
    Event::Summary {
        text: cut(summary, SUMMARY_CHARS_MAX),
        billed_seconds: seconds.and_then(whole),
    }
}

pub(crate) fn refusal(status: u16, text: &str) -> Failure {
    // The shape of an error's body is not documented, so its beginning is shown as it is.
    let hint: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
    let what = format!("could not create the agent's call: {status} {hint}");
    let failure = Failure::new(Party::Ultravox, what.trim_end()).advise(advice(status));
    Failure { refused: matches!(status, 400 | 404 | 409 | 422), ..failure }
}

fn advice(status: u16) -> &'static str {
    match status {
        401 | 403 => "check ULTRAVOX_API_KEY",
        402 => "the account has no minutes left: add billing at app.ultravox.ai",
        400 => "check ULTRAVOX_MODEL and the voices in the agent files",
        404 => "check ULTRAVOX_API_URL",
        429 => "too many calls at once for the account, or too fast",
        503 => "Ultravox has no room at the moment",
        _ => "try again later",
    }
}

/// A call's or a stage's body for the page: the prompt is cut short, and of the tools the first one
/// stands for all.
fn in_short(mut body: Value) -> Value {
    let prompt = body["systemPrompt"].as_str().unwrap_or_default();
    body["systemPrompt"] = json!(cut(prompt, 160));
    if let Some(tools) = body["selectedTools"].as_array_mut()
        && tools.len() > 1
    {
        let more = json!(format!("… and {} more", tools.len() - 1));
        tools.splice(1.., [more]);
    }
    body
}

/// Whoever holds the whole address may join the call.
fn host_only(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
    format!("{scheme}://{}/***", host.rsplit('@').next().unwrap_or_default())
}

#[cfg(test)]
mod tests;
