//! callbridge answers a phone number with a voice agent.
//!
//! Read this file from top to bottom: it is the story of one phone call, told in the order in
//! which it happens.
//!
//! # The four parties
//!
//! * the **caller**, a person with a phone;
//! * **Twilio**, which owns the phone number, asks us what to do with a call (a *webhook*, that
//!   is an HTTP request) and then sends us its sound over a WebSocket (a *Media Stream*);
//! * **Ultravox**, where the *agent* lives: it hears, thinks and speaks, over a WebSocket too;
//! * **n8n**, the owner's business logic: who is calling, book a meeting, keep the transcript.
//!
//! # The call, in nine steps
//!
//! 1. **Ring** - Twilio posts `/incoming-call`; its signature is checked.
//! 2. **Greeting** - n8n is asked, by the caller's number, for a first message, and who takes it.
//! 3. **Agent** - an Ultravox call is created with the first stage's prompt, voice and tools,
//!    and joined at once.
//! 4. **Answer** - `TwiML` goes back: "connect this call to our Media Stream", with a token that
//!    opens it once.
//! 5. **Stream** - Twilio opens `/media-stream/<token>`; the token finds the call that waits.
//! 6. **Talk** - two threads relay the sound: caller to agent, agent to caller.
//! 7. **Act** - the agent invokes tools: change stage, book through n8n, transfer, hang up.
//! 8. **Goodbye** - either side ends; what the agent has said is heard to the end first.
//! 9. **After** - the transcript goes to n8n, and stays on disk until n8n has it.
//!
//! While it rings (1 to 4) the caller hears ringing and pays nothing, so everything that takes
//! time is done there. Between the answer and the first word nothing is left to wait for.
//!
//! # Sockets and threads
//!
//! ```text
//!   Twilio --HTTP, WebSocket--> front door (PORT), one thread a connection
//!                                 |                       |
//!                       GET /media-stream          anything else
//!                                 |                       |
//!                       thread T: caller -> agent    tiny_http, one thread a request
//!                       thread U: agent -> caller         |
//!                                 |                  1 Ring, 2 Greeting, 3 Agent, 4 Answer
//!   Ultravox <---- WebSocket -----+                       |
//!   Ultravox, n8n <---- HTTP -----------------------------+
//! ```
//!
//! Threads and blocking sockets only, no async runtime. A call has two threads of its own, one for
//! each direction, on sockets that both of them use: a thread waits for bytes without holding the
//! socket's lock, and takes it only to look at what came. `toolbox/socket.rs` is the one clever
//! thing here. Tools that ask n8n, and transcripts on their way to it, have threads beside these.
//!
//! # When something breaks
//!
//! The caller is to notice as little as possible. If the connection to the agent breaks, a new
//! agent takes over that knows what was said; a broken stream is followed by the next one; and a
//! process that was killed has left a journal, by which the next one goes on (`around/resume.rs`).
//!
//! # The rooms
//!
//! What the story leans on stands in rooms of its own, each behind a door of a few names. Reading
//! them is optional. A room uses only rooms that are drawn below it:
//!
//! ```text
//! main.rs       the call: serve, route, Bridge, Call, steps 1 to 9
//! around/       answer, placeholders, ready, resume, shutdown, webhook
//! owner/        access, calls, health, lines, metrics, orders, outgoing,
//!               page, phone
//! check/  demo/  diagram.rs  forget.rs  init.rs  outbox.rs  workflow.rs   other commands
//! usage.rs      the command line
//! ------------------- below this line nobody names `Bridge` or `Call`
//! parties/      twilio, ultravox, n8n, standing
//! records/      delivery, ended_by, event, index, journal, outbox, past, report, tally, tap,
//!               transcript, writer
//! setup/        settings, values, dot_env, agent, agent_files, agent_in_force, agent_links,
//!               start_lines, stop
//! door/         head, health, inner, lobby, reply, request
//! toolbox/      socket, dial, sound, http, log, metrics, failure, text, random, threads, time,
//!               waiting
//! ```
//!
//! # What does not flow downwards
//!
//! Two things travel against the reading direction: the **token** (step 5 finds what step 4
//! left in the [`Call`]) and the **line** (step 9 gives back the one that step 1 took).
//!
//! # Glossary
//!
//! * *call leg*: one of the two sockets of a call, the caller's or the agent's.
//! * *frame*: 20 ms of sound. 160 bytes from Twilio, 320 for Ultravox.
//! * *mu-law*: ITU-T G.711, the telephone's way to put a 16-bit sample into 8 bits.
//! * *PCM*: plain 16-bit samples, little-endian; what Ultravox speaks and hears.
//! * *`TwiML`*: the XML in which Twilio is told what to do with a call.
//! * *mark*: a bookmark in the sound we send; Twilio returns it once the caller has heard so far.
//! * *clear*: tells Twilio to forget what it has not played yet.
//! * *barge-in*: the caller speaks while the agent does; the agent falls silent (a *clear*).
//! * *line*: a telephone line, one of `MAX_CALLS`; taken by a call while it lasts.
//! * *stage*: a part of the conversation with its own prompt, voice and tools.
//! * *journal*: a call's file on disk, one line an event.
//! * *outbox*: the transcripts that n8n has not taken yet.
//! * *tap*: what shows the messages of a call to the live page; it changes none of them.
//!
//! # Left out
//!
//! No recording, no resampling (both sides speak 8 kHz). Where a step leaves something out, the
//! word *Simplification* says so.

use std::collections::HashSet;
use std::io;
use std::net::TcpListener;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use serde_json::{Map, Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use subtle::ConstantTimeEq as _;
use tiny_http::Method;
use tungstenite::protocol::frame::coding::CloseCode;

use crate::around::ready::{Readiness, keep_ready, ready};
use crate::around::resume::{another_stream, has_taken_it, note_accepted, resume_agent};
use crate::around::resume::{rings_again, take_up};
use crate::around::shutdown::{Phase, await_end};
use crate::around::webhook::from_twilio;
use crate::door::health::Identity;
use crate::door::reply::Reply;
use crate::door::{Hall, Visitor};
use crate::owner::lines::{Admission, Calls, LineInUse, NoLine};
use crate::owner::outgoing::{Order, Ringing};
use crate::parties::n8n::answered::Answered;
use crate::parties::n8n::decision::Decision;
use crate::parties::n8n::{N8n, Question, Ring};
use crate::parties::twilio::keys::Keys;
use crate::parties::twilio::messages::FromTwilio;
use crate::parties::twilio::stream::{self, CallerLeg};
use crate::parties::twilio::{Form, OUTGOING, REASON, TWILIO_WEBHOOK, caller, is_final, twiml};
use crate::parties::ultravox::body::{self, NewCall, Opening};
use crate::parties::ultravox::leg::{AgentLeg, FromAgent, GOODBYE};
use crate::parties::ultravox::tool::{Invocation, ToolResult};
use crate::parties::ultravox::{AGENT_WITHIN, AgentCall, Ultravox};
use crate::records::delivery::{DELIVER_WITHIN, Delivery};
use crate::records::ended_by::EndedBy;
use crate::records::event::{Direction, Event, ToolAsked, Transfer};
use crate::records::journal::{Journal, Journals, WIRE_CHARS_MAX};
use crate::records::outbox::Outbox;
use crate::records::tap::{Exhibit, Tap};
use crate::records::transcript::{Heard, Transcript};
use crate::setup::agent::{Agent, Tool, ToolAction};
use crate::setup::agent_in_force::AgentInForce;
use crate::setup::settings::Config;
use crate::setup::start_lines::introduce;
use crate::setup::stop::{Stop, cannot_listen, needs_attention};
use crate::toolbox::failure::{Failure, Party};
use crate::toolbox::http::{Http, tls_config, trusted_roots};
use crate::toolbox::log::{Sid, Step, log, log_as, log_aside, log_refusal};
use crate::toolbox::metrics::{
    ANSWER_TIME, BROKEN_LINES, CALLS, DEAD_AIR, Relayed, TOOL_TIME, TOOLS, refused,
};
use crate::toolbox::random::{random_hex, random_number};
use crate::toolbox::socket::SocketEnd;
use crate::toolbox::sound::{FRAME, FRAME_BYTES, PcmStream, Tone, to_pcm};
use crate::toolbox::text::{cut, fill, is_e164, shorten, shorten_number};
use crate::toolbox::threads::{lock, outlive, spawn, spawn_for_call, wait};
use crate::toolbox::time::millis;

mod toolbox;

mod around;
mod check;
#[cfg(any(feature = "demo", test))]
pub(crate) mod demo;
mod diagram;
mod door;
#[cfg(test)]
#[path = "../tests/fuzz/feed.rs"]
mod feed;
mod forget;
mod init;
mod outbox;
mod owner;
mod parties;
mod records;
mod setup;
#[cfg(any(test, fuzzing))]
mod testing;
#[cfg(test)]
mod tests;
mod usage;
mod workflow;

// ============================================================================
// 0. Before the call: a server that waits for one
// ============================================================================
//
// In:       the command line; `.env` and the agent's files, through `setup`.
// Out:      a listening server; every request has found the function that answers it.
// Fails:    at start-up only, with all complaints at once and exit status 2.
// Not here: anything about a particular call.

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words = usage::words(&arguments);
    usage::exit_code(match words.as_slice() {
        [] => serve(),
        ["check", options @ ..] => check::run(options),
        ["diagram", options @ ..] => diagram::run(options),
        ["forget", options @ ..] => forget::run(options),
        ["init", options @ ..] => init::run(options),
        ["outbox", options @ ..] => outbox::run(options),
        ["workflow", options @ ..] => workflow::run(options),
        #[cfg(feature = "demo")]
        ["demo", ..] => demo::run(&arguments[1..]).map_err(|flop| {
            if flop.misused { Stop::Misused(flop.text) } else { Stop::Failed(flop.text) }
        }),
        other => usage::answer(other),
    })
}

fn serve() -> Result<(), Stop> {
    let mut config =
        Config::load().map_err(|complaints| needs_attention("setting", &complaints))?;
    log_as(config.log_level, config.log_format);
    log_aside();
    let (agent, roots) = Bridge::needs(&config)?;
    let listener = TcpListener::bind((config.bind, config.port))
        .map_err(|error| cannot_listen(&config, &error))?;
    config.public_url = check::address_in_force(&config, &listener)?;
    // Threads of calls hold on to it until the process ends, so nobody could ever free it.
    let bridge: &'static Bridge = Box::leak(Box::new(Bridge::build(config, agent, &roots)));
    run(bridge, listener).map_err(|error| Stop::Failed(format!("callbridge: {error}")))
}

/// Everything that outlives a call. One per process, never freed.
struct Bridge {
    config: Arc<Config>,
    agent: AgentInForce,
    http: Http,
    tls: Arc<ClientConfig>,
    ultravox: Ultravox,
    n8n: N8n,
    calls: Calls,
    journals: Journals,
    outbox: Outbox,
    ringing: Ringing,
    /// When this process began. A page that is open sees by it that there is another one.
    began: Timestamp,
    readiness: Readiness,
    phase: Mutex<Phase>,
    identity: Identity,
}

impl Bridge {
    /// What a server needs beside its settings: its agent, and whom it trusts.
    fn needs(config: &Config) -> Result<(AgentInForce, Vec<CertificateDer<'static>>), Stop> {
        let agent = AgentInForce::load(config)
            .map_err(|mistakes| needs_attention("agent file mistake", &mistakes))?;
        let roots = trusted_roots(config.ssl_cert_file.as_deref())
            .map_err(|complaint| needs_attention("setting", &[complaint]))?;
        Ok((agent, roots))
    }

    fn build(config: Config, agent: AgentInForce, roots: &[CertificateDer<'static>]) -> Bridge {
        let (config, http, tls) = (Arc::new(config), Http::new(roots), tls_config(roots));
        Bridge {
            ultravox: Ultravox::new(http.clone(), Arc::clone(&tls), Arc::clone(&config)),
            n8n: N8n::new(http.clone(), Arc::clone(&config)),
            calls: Calls::default(),
            journals: Journals::new(&config.data_dir),
            outbox: Outbox::new(&config),
            ringing: Ringing::default(),
            began: Timestamp::now(),
            readiness: Readiness::default(),
            phase: Mutex::new(Phase::Serving),
            identity: Identity::new(),
            config,
            agent,
            http,
            tls,
        }
    }
}

fn run(bridge: &'static Bridge, listener: TcpListener) -> io::Result<()> {
    let address = listener.local_addr()?;
    // Before anybody is told that we are there: a signal that nobody awaits ends the process.
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    introduce(&bridge.config, &bridge.agent.get(), address);
    keep_ready(bridge)?;
    door::open(listener, bridge, || bridge.config.max_calls.get())?;
    // Thousands of journals take a while to read. Neither a caller nor a signal waits for them.
    spawn("journals".into(), move || {
        let ask = |id: &str, within| bridge.ultravox.summary(id, within);
        let file = |delivery: &mut Delivery| file_transcript(bridge, delivery);
        bridge.outbox.start(&bridge.journals, ask, file);
    })?;
    await_end(bridge, signals)
}

impl Hall for Bridge {
    fn answer(&'static self, request: &mut tiny_http::Request) -> Reply {
        route(self, request)
    }

    fn take_stream(&'static self, token: &str, visitor: &Visitor, head: Vec<u8>) -> bool {
        let Some(call) = self.calls.with_token(token) else {
            return stream::opens_for_check(token, &visitor.socket, head, &self.config);
        };
        media_stream(&call, visitor, head);
        true
    }
}

fn route(bridge: &'static Bridge, request: &mut tiny_http::Request) -> Reply {
    let url = request.url().to_owned();
    let path = url.split('?').next().unwrap_or_default();
    match (request.method(), path) {
        (Method::Get | Method::Head, "/health") => {
            bridge.identity.health(&bridge.config.public_url, &url)
        }
        (Method::Post, "/incoming-call") => from_twilio(bridge, request, incoming_call),
        (Method::Post, "/stream-ended") => from_twilio(bridge, request, stream_ended),
        (Method::Post, "/whisper") => from_twilio(bridge, request, whisper),
        (Method::Post, "/call-status") => from_twilio(bridge, request, call_status),
        (Method::Get | Method::Head, "/ready") => ready(bridge),
        (_, "/incoming-call" | "/stream-ended" | "/whisper" | "/call-status") => {
            let method = request.method();
            let hint = "Twilio's webhook must be set to HTTP POST";
            log_refusal("method", format_args!("{method} {path}: {hint}"));
            Reply::text(405, "use POST (in Twilio's console: \"HTTP POST\" beside the webhook)")
        }
        _ => owner::answer(bridge, request, path),
    }
}

// ============================================================================
// 1. Ring: Twilio asks what to do with a call
// ============================================================================
//
// In:       POST /incoming-call    X-Twilio-Signature: base64 of HMAC-SHA1
//           CallSid=CA9f3c…&From=%2B4930123456&To=%2B49…&CallStatus=ringing&…
// Out:      a `Call` with a line of its own, and the XML that steps 2 to 4 make of it.
// Fails:    403 without Twilio's signature, 400 without a call's id; all lines busy is a sentence.
// Not here: trust in the caller's number. It is text from outside: a name, a word, or nothing.

fn incoming_call(bridge: &'static Bridge, form: &Form) -> Reply {
    let sid = form.get("CallSid");
    let order = bridge.ringing.take(form.get(OUTGOING));
    // In a call that we have made ourselves, the person is at the other end. Twilio knows it even
    // if we have forgotten.
    let is_ours = order.is_some() || form.get("Direction").starts_with("outbound");
    let (direction, number) = if is_ours {
        (Direction::Out, form.get("To"))
    } else {
        (Direction::In, caller(form.get("From")))
    };
    let wire = format!("POST /incoming-call\nX-Twilio-Signature: ***\n\n{}", form.redacted());
    let (to, stir_verstat) = (form.get("To"), form.get("StirVerstat"));
    let incoming = IncomingCall { sid, number, to, stir_verstat, direction, order, wire };
    Reply::twiml(take_call(bridge, &incoming).twiml(bridge))
}

/// A call that rings, wherever it comes from.
struct IncomingCall<'a> {
    sid: &'a str,
    /// As Twilio gave it: a number, `anonymous`, `client:name`, anything.
    number: &'a str,
    /// The number that was called.
    to: &'a str,
    stir_verstat: &'a str,
    direction: Direction,
    /// Of a call that goes out, unless an earlier process has made it.
    order: Option<Order>,
    /// The request, for the journal.
    wire: String,
}

/// Steps 1 to 4 of a new call.
fn take_call(bridge: &'static Bridge, incoming: &IncomingCall) -> Answer {
    let IncomingCall { sid, number, direction, wire, .. } = incoming;
    if let Some(answer) = rings_again(bridge, incoming) {
        return answer;
    }
    let agent = bridge.agent.latest(&bridge.config);
    let phrases = &agent.phrases;
    if !bridge.takes_calls() {
        log!(Sid { sid }, Info, Ring, "not taken, this process is about to end");
        refused("stopping");
        incoming.comes_to_nothing();
        return cannot_serve(bridge, sid, &phrases.closing);
    }
    let (call, line) = match bridge.calls.ring(incoming, || Call::new(bridge, incoming)) {
        Admission::Yours(call, line) => (call, line),
        Admission::Known(call) => return call.await_answer(),
        Admission::None(NoLine { reason, why }) => {
            log!(Sid { sid }, Warn, Ring, "{why}");
            refused(reason);
            incoming.comes_to_nothing();
            // Who takes too many lines does not get the person instead.
            return match reason {
                NoLine::BUSY => cannot_serve(bridge, sid, &phrases.busy),
                _ => Answer::Sentence(phrases.busy.clone()),
            };
        }
    };
    let does = if *direction == Direction::Out { "has picked up" } else { "is calling" };
    log!(call, Info, Ring, "{} {does}", shorten_number(number));
    let (call_sid, number, to) = (call.sid.clone(), call.number.clone(), call.to.clone());
    call.journal.note(&Event::Ring { call_sid, number, direction: *direction, to });
    call.tap.show(Exhibit::Ring, || wire.clone());
    begin(&call, line, incoming.first_message())
}

/// One call, from ring to transcript. Its two threads and its tools share it.
struct Call {
    bridge: &'static Bridge,
    /// The agent's files as they were when it rang.
    files: Arc<Agent>,
    sid: String,
    number: String,
    to: String,
    stir_verstat: String,
    direction: Direction,
    rang: Instant,
    /// The same moment, by the calendar.
    began: Timestamp,
    state: Mutex<CallState>,
    changed: Condvar,
    transcript: Mutex<Transcript>,
    journal: Journal,
    tap: Arc<Tap>,
    /// What n8n has answered, so that asking twice does not book twice.
    answered: Answered,
    tools_running: AtomicUsize,
}

#[derive(Default)]
struct CallState {
    /// What `/incoming-call` was answered with, for a repeat of it.
    answer: Option<Answer>,
    /// Opens one stream until the time that stands beside it.
    token: Option<(String, Instant)>,
    /// Streams that this call has been given a token for.
    streams: u32,
    /// Missing while it is being created, and while a new one takes over.
    agent: Option<Arc<AgentLeg>>,
    /// Ultravox's id of the latest agent, to go on from.
    agent_id: String,
    /// How many agents there have been. Their transcripts count from 0 each.
    agents: u64,
    /// When the latest agent's time is up, and some more.
    ends_by: Option<Instant>,
    caller: Option<Arc<CallerLeg>>,
    stage: String,
    /// What n8n knows about the caller, for the prompts.
    facts: String,
    /// Since its first stream opened, until the agent's first sound.
    silent_since: Option<Instant>,
    /// The mark behind the agent's last word came back.
    heard_last_word: bool,
    /// Why we have asked the agent to say something and go.
    told_to_leave: Option<EndedBy>,
    /// Whom the agent has asked to put the caller through to.
    transfer: Option<Transfer>,
    hang_up: Option<EndedBy>,
    /// Twilio has said `stop` before we have closed the stream: there is no caller any more.
    stopped: bool,
    /// We have closed the stream, or are about to.
    said_goodbye: bool,
}

impl CallState {
    /// `None` while the call lasts. A transfer whose caller has left counts as `CallerLeft`.
    fn how_it_ended(&self) -> Option<EndedBy> {
        match self.hang_up {
            Some(EndedBy::Transferred) if self.stopped => Some(EndedBy::CallerLeft),
            how => how,
        }
    }
}

impl Call {
    fn new(bridge: &'static Bridge, incoming: &IncomingCall) -> Call {
        let files = bridge.agent.get();
        let by_number =
            files.numbers.get(incoming.to).filter(|_| incoming.direction == Direction::In);
        let begins_in = by_number.unwrap_or(&files.first_stage).clone();
        let state = CallState { stage: begins_in, ..CallState::default() };
        let journal = incoming.journal(bridge);
        Call {
            bridge,
            files,
            sid: incoming.sid.to_owned(),
            number: incoming.number.to_owned(),
            to: incoming.to.to_owned(),
            stir_verstat: incoming.stir_verstat.to_owned(),
            direction: incoming.direction,
            rang: Instant::now(),
            began: Timestamp::now(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            transcript: Mutex::default(),
            tap: Arc::new(Tap::new(journal.clone(), Arc::clone(&bridge.config))),
            journal,
            answered: Answered::default(),
            tools_running: AtomicUsize::new(0),
        }
    }

    fn await_answer(&self) -> Answer {
        let state = lock(&self.state);
        let within = LOOKUP_WITHIN + AGENT_WITHIN;
        let state = wait(&self.changed, state, within, |state| state.answer.is_none());
        let answer = state.answer.clone();
        drop(state);
        answer.unwrap_or_else(|| cannot_serve(self.bridge, &self.sid, &self.files.phrases.apology))
    }

    fn settle_answer(&self, answer: Answer) -> Answer {
        let ms = millis(self.rang.elapsed());
        self.journal.note(&Event::Answer { what: answer.word().into(), ms });
        self.tap.show(Exhibit::Answer, || answer.redacted(self.bridge));
        lock(&self.state).answer = Some(answer.clone());
        self.changed.notify_all();
        answer
    }
}

// ============================================================================
// 2. Greeting: n8n is asked who is calling
// ============================================================================
//
// In:       the caller's number, and the one that was called.
// Wire:     {"route":"1","number":"+4930123456","to":"+442079460000","callSid":"CA9f3c…",…} to n8n
//           {"firstMessage":"Hello Anna, it is good to hear from you again."}        and back
// Out:      the agent's first sentence, word for word, and its stage; or a person, or a refusal.
// Fails:    never. Whatever n8n answers, or does not, the default greeting is there after 2 s,
//           and one line in the log says what came back and what to do about it.
// Not here: waiting on the caller's time. The phone still rings.

/// Step 2 in all. Then the default greeting is used.
const LOOKUP_WITHIN: Duration = Duration::from_secs(2);

const _: () = assert!(
    LOOKUP_WITHIN.as_secs() + AGENT_WITHIN.as_secs() < TWILIO_WEBHOOK.as_secs(),
    "the webhook must be answered before Twilio gives up"
);

/// Steps 2 to 4. `ordered` is empty unless the call goes out, and whoever ordered it has said what
/// to open with.
fn begin(call: &Arc<Call>, line: LineInUse, ordered: &str) -> Answer {
    let opening = match call.direction {
        Direction::In | Direction::Browser => greeting(call).map(Opening::Greet),
        Direction::Out => Ok(Opening::WeCalled(ordered_greeting(call, ordered))),
    };
    match opening {
        Ok(opening) => connect_to_agent(call, line, &opening),
        Err(how) => without_agent(call, how),
    }
}

/// An error: n8n wants no agent to take this call. It ends like that.
fn greeting(call: &Call) -> Result<String, EndedBy> {
    let Call { sid, number, to, direction, stir_verstat, .. } = call;
    let began = Instant::now();
    let found = call.bridge.config.n8n_webhook_url.is_some().then(|| {
        let ring = Ring { sid, number, to, direction: *direction, stir_verstat };
        call.bridge.n8n.ring(&ring, &call.files, LOOKUP_WITHIN, &call.tap)
    });
    let ms = millis(began.elapsed());
    let (decision, why) = match found {
        None => {
            log!(call, Info, Greeting, "the default greeting (no n8n)");
            (Decision::default(), "N8N_WEBHOOK_URL is not set".to_owned())
        }
        Some(Ok(decision)) => {
            let has_words = decision.first_message.is_some();
            let rest = if has_words { "" } else { ", and leaves the greeting to the agent" };
            log!(call, Info, Greeting, "n8n answered after {ms} ms{rest}"; ms);
            (decision, "n8n leaves it to the agent".to_owned())
        }
        Some(Err(failure)) => {
            log!(call, Warn, Greeting, "{failure}; the default greeting is used");
            call.journal.note_failure(Step::Greeting, &failure, "");
            (Decision::default(), failure.to_string())
        }
    };
    decide(call, &decision)?;
    let from = if decision.first_message.is_some() { ("n8n", "") } else { ("default", &*why) };
    note_greeting(call, from.0, ms, from.1);
    Ok(decision.first_message.unwrap_or_else(|| call.default_greeting()))
}

/// To refuse comes before a person, and a person before an agent. n8n's stage comes before the one
/// of the number that was called, in which the call is from its beginning.
fn decide(call: &Call, decision: &Decision) -> Result<(), EndedBy> {
    let note = |what: &str, by: &str, stage: &str, facts: &str| {
        log!(call, Info, Greeting, "{by} decides: {what} {stage}"; by, what, stage);
        let (what, by, stage) = (what.into(), by.into(), stage.into());
        call.journal.note(&Event::Decided { what, by, stage, facts: facts.into() });
    };
    if decision.refuse {
        note("refuse", "n8n", "", "");
        return Err(EndedBy::Refused);
    }
    if decision.transfer {
        let config = &call.bridge.config;
        let number = config.fallback_number.clone().filter(|_| call.direction == Direction::In);
        if let Some(number) = number.filter(|_| call.bridge.calls.put_through(config, &call.sid)) {
            lock(&call.state).transfer = Some(Transfer { number, ..Transfer::default() });
            note("transfer", "n8n", "", &decision.facts);
            return Err(EndedBy::Transferred);
        }
        log!(call, Warn, Greeting, "n8n: transfer, but nobody can be rung (FALLBACK_NUMBER)");
    }
    let mut state = lock(&call.state);
    let by = match &decision.stage {
        Some(_) => "n8n",
        None if call.files.numbers.get(&call.to) == Some(&state.stage) => "numbers",
        None => "default",
    };
    decision.stage.iter().for_each(|stage| state.stage.clone_from(stage));
    if !decision.facts.is_empty() {
        state.facts.clone_from(&decision.facts);
    }
    if by != "default" || !state.facts.is_empty() {
        note("agent", by, &state.stage, &state.facts);
    }
    Ok(())
}

fn ordered_greeting(call: &Call, first_message: &str) -> String {
    if first_message.is_empty() {
        note_greeting(call, "default", 0, "n8n is not asked for calls that go out");
        return call.default_greeting();
    }
    note_greeting(call, "order", 0, "");
    first_message.to_owned()
}

fn note_greeting(call: &Call, from: &str, ms: u64, why: &str) {
    call.journal.note(&Event::Greeting { from: from.into(), ms, why: why.into() });
}

// ============================================================================
// 3. Agent: an Ultravox call is created, and joined at once
// ============================================================================
//
// In:       the greeting, and the first stage of the agent's files.
// Wire:     POST /api/calls  {"systemPrompt":"You are Sara…","voice":"Tanya-English",
//           "selectedTools":[…],"firstSpeakerSettings":{"agent":{"text":"Hello Anna…"}},…}
//           201 {"callId":"7c21…","joinUrl":"wss://…",…}     then GET joinUrl, a WebSocket
// Out:      a joined agent: thread U runs, holds its socket, and feeds it silence.
// Fails:    when Ultravox refuses or is not there in time. Busy (429, 503) is tried once more.
// Not here: the caller. Nobody has picked up yet.

/// Steps 3 and 4, for a new call and for one that is taken up again.
fn connect_to_agent(call: &Arc<Call>, line: LineInUse, opening: &Opening) -> Answer {
    let began = Instant::now();
    let ready = match join_agent(call, opening, began + AGENT_WITHIN) {
        Ok(agent) => start_conversation(call, line, &agent, began).map_err(|why| (why, None)),
        // The line is given back when the call is filed: until then a repeat finds the call.
        Err(failure) => Err((failure, Some(line))),
    };
    if let Err((failure, _line)) = ready {
        if call.is_over() {
            after(call);
            return call.settle_answer(Answer::HangUp);
        }
        log!(call, Error, Agent, "{failure}");
        call.journal.note_failure(Step::Agent, failure, "");
        return without_agent(call, EndedBy::NoAgent);
    }
    let ms = millis(call.rang.elapsed());
    if !matches!(opening, Opening::GoOn(_)) {
        ANSWER_TIME.of(&[]).observe(call.rang.elapsed());
    }
    log!(call, Info, Answer, "connecting to our Media Stream, {ms} ms after it rang"; ms);
    call.settle_answer(Answer::Stream { token: call.new_token() })
}

/// There is none to be had, or there shall be none. The call ends here.
fn without_agent(call: &Call, how: EndedBy) -> Answer {
    call.hang_up(how);
    let transfer = lock(&call.state).transfer.clone();
    let answer = call.settle_answer(after_the_agent(call.bridge, &call.sid, how, transfer));
    after(call);
    answer
}

/// Gives the agent to thread U, which owns the line from here: it is the one that sees the call to
/// its end.
fn start_conversation(
    call: &Arc<Call>,
    line: LineInUse,
    agent: &Arc<AgentLeg>,
    began: Instant,
) -> Result<(), Failure> {
    let short_id: String = lock(&call.state).agent_id.chars().take(4).collect();
    let (the_call, the_agent) = (Arc::clone(call), Arc::clone(agent));
    spawn_for_call(format!("{} agent", shorten(&call.sid)), move || {
        agent_thread(&the_call, line, || converse(&the_call, the_agent));
    })
    .map_err(|error| {
        agent.close("nobody can take this call");
        agent.cut();
        Failure::new(Party::Ultravox, "no thread for the agent").caused_by(error)
    })?;
    let ms = began.elapsed().as_millis();
    log!(call, Info, Agent, "Ultravox call {short_id} ready after {ms} ms"; ms);
    Ok(())
}

/// Added to `MAX_CALL_SECONDS`, so that Ultravox can say its own "time is up" first.
const TOO_LONG_GRACE: Duration = Duration::from_secs(15);

/// Creates the agent's call and joins it. Only an agent that is there counts: the next one goes on
/// from it.
fn join_agent(call: &Call, opening: &Opening, deadline: Instant) -> Result<Arc<AgentLeg>, Failure> {
    let created = create_agent_call(call, opening, deadline)?;
    let call_id = created.id.clone();
    let agent = Arc::new(call.bridge.ultravox.join(&call.sid, created, deadline, &call.tap)?);
    let mut state = lock(&call.state);
    if state.hang_up.is_some() {
        drop(state);
        agent.close("the call is over");
        return Err(Failure::new(Party::Ultravox, "the call has ended meanwhile"));
    }
    state.agent = Some(Arc::clone(&agent));
    state.agent_id.clone_from(&call_id);
    // It may come from a journal that somebody has edited.
    state.agents = state.agents.saturating_add(1);
    state.ends_by = Some(Instant::now() + max_duration(call, opening) + TOO_LONG_GRACE);
    let (number, entered) = (state.agents, state.stage.clone());
    drop(state);
    call.journal.note(&Event::Agent { call_id, agent: number, stage: entered });
    Ok(agent)
}

/// An agent that goes on gets the conversation so far: Ultravox's own record of it if it can
/// (`priorCallId`), else ours.
fn create_agent_call(
    call: &Call,
    opening: &Opening,
    deadline: Instant,
) -> Result<AgentCall, Failure> {
    let (bridge, lasts) = (call.bridge, max_duration(call, opening));
    let (first_stage, prior) = {
        let state = lock(&call.state);
        (state.stage.clone(), state.agent_id.clone())
    };
    let new = NewCall { stage: call.stage_body(&first_stage), opening, lasts, sid: &call.sid };
    let mut order = body::call_body(&bridge.config, &call.files, new);
    let goes_on = matches!(opening, Opening::GoOn(_)) && !prior.is_empty();
    let prior = goes_on.then_some(prior.as_str());
    match bridge.ultravox.create(&order, prior, deadline, &call.tap) {
        Err(failure) if failure.refused && goes_on => {
            log!(call, Warn, Agent, "{failure}; going on from our own transcript");
            order["initialMessages"] = lock(&call.transcript).as_messages();
            bridge.ultravox.create(&order, None, deadline, &call.tap)
        }
        other => other,
    }
}

/// An agent that takes over late in a call gets at least this much of it.
const LAST_WORDS_MIN: Duration = Duration::from_secs(30);

fn max_duration(call: &Call, opening: &Opening) -> Duration {
    let max_call = call.bridge.config.max_call;
    match opening {
        Opening::Greet(_) | Opening::WeCalled(_) => max_call,
        Opening::GoOn(_) => max_call.saturating_sub(call.rang.elapsed()).max(LAST_WORDS_MIN),
    }
}

impl Call {
    /// What a stage sends to Ultravox: its prompt, voice and tools.
    fn stage_body(&self, stage: &str) -> Value {
        let Some(stage) = self.files.stages.get(stage) else { return json!({}) };
        let prompt = fill(&stage.prompt, |name| self.placeholder(name));
        body::stage_body(&self.bridge.config, &self.files, stage, &prompt)
    }
}

/// What a new agent is told that takes over from one whose connection broke.
const INTERRUPTED: &str = "(The line was interrupted for a moment and is back. Say so briefly, \
    do not greet again, and go on exactly where the conversation was.)";
/// What it is told when a transfer came to nothing.
const NOBODY_ANSWERED: &str = "(The caller was to be put through to a person, but nobody answered. \
    Tell them so, apologise, do not greet again, and offer to help or to take a note.)";
/// What it is told when the telephone was picked up, perhaps by a mailbox.
const NOT_TAKEN: &str = "(The caller was to be put through to a person, who did not take the \
    call. Tell them so, apologise, do not greet again, and offer to help or to take a note.)";

/// Thread U: keeps the agent company until the caller is there, relays its voice, says goodbye,
/// files the transcript, even after a panic.
fn agent_thread(call: &Call, line: LineInUse, conversation: impl FnOnce() -> EndedBy) {
    let why = outlive(conversation).unwrap_or(EndedBy::AgentLost);
    say_goodbye(call, why);
    after(call);
    // Not before: a process that drains leaves when no line is taken and the outbox is empty.
    drop(line);
}

/// From the answer to Twilio's stream, which takes it a second or two. Then the waiting agent is
/// sent home and the token is void. After a broken stream, another one may take as long.
const STREAM_WITHIN: Duration = Duration::from_secs(15);
/// Connections to the agent that may break in one call. Then the caller hears the apology.
const RESUMES_MAX: u32 = 2;

/// Steps 5 to 7 on thread U. If the connection to the agent breaks, the caller stays, and a new
/// agent goes on where the old one was; twice at most, and never two at once.
fn converse(call: &Arc<Call>, mut agent: Arc<AgentLeg>) -> EndedBy {
    let mut resumes = 0;
    loop {
        if !await_caller(call, STREAM_WITHIN) && call.has_never_streamed() {
            agent.close("nobody came");
            return EndedBy::NeverStreamed;
        }
        // Also if it is over already: what the agent has said by then belongs to the transcript.
        let why = relay_agent_to_caller(call, &agent);
        if why != EndedBy::AgentLost {
            // Without a goodbye, Ultravox would take it for a broken connection.
            agent.close("the call is over");
        }
        agent.cut();
        if why != EndedBy::AgentLost || call.is_over() || resumes == RESUMES_MAX {
            return why;
        }
        resumes += 1;
        let Some(next) = resume_agent(call) else { return why };
        agent = next;
    }
}

/// Feeds the agent silence, a frame every 20 ms, until there is a stream: it wants unbroken sound.
/// What it says meanwhile waits in the kernel's buffer for the socket. A connection that breaks now
/// is found broken when it is read. False: nobody came, or the call is over.
fn await_caller(call: &Call, within: Duration) -> bool {
    const SILENCE: &[u8] = &[0; FRAME_BYTES];
    let deadline = Instant::now() + within;
    let mut next = Instant::now();
    let mut is_broken = false;
    let mut state = lock(&call.state);
    loop {
        if state.caller.is_some() {
            return true;
        }
        if state.hang_up.is_some() || Instant::now() > deadline {
            return false;
        }
        let agent = state.agent.clone();
        drop(state);
        if let Some(agent) = agent
            && let Err(error) = agent.send_silence(SILENCE)
        {
            if !is_broken {
                log!(call, Warn, Stream, "the agent takes no sound: {error}");
            }
            is_broken = true;
        }
        next += FRAME;
        state = lock(&call.state);
        let until_next = next.saturating_duration_since(Instant::now());
        state = wait(&call.changed, state, until_next, |state| {
            state.caller.is_none() && state.hang_up.is_none()
        });
    }
}

// ============================================================================
// 4. Answer: TwiML tells Twilio to open a Media Stream
// ============================================================================
//
// In:       a joined agent, and the call's one-time token.
// Out:      <Response><Connect action="https://…/stream-ended#…">
//           <Stream url="wss://…/media-stream/CA9f3c…/5d8e…"/></Connect><Hangup/></Response>
//           Step 5 finds the waiting call by the token at its end.
// Fails:    never. If 3 failed, the caller hears one sentence, or is put through to a person.
// Not here: <Say> as a greeting. The agent greets the caller itself, in its own voice.

/// What is to be done with a call. Twilio gets it as `TwiML`, the page's phone as JSON.
#[derive(Clone)]
enum Answer {
    /// Connect it to our Media Stream, which the token opens once.
    Stream {
        token: String,
    },
    /// Say so, and ring this number instead of the agent.
    Person(String),
    /// Ring this person; `/stream-ended` is to hear how that went.
    Transfer(Transfer),
    /// Say this, then hang up.
    Sentence(String),
    /// Do not answer it.
    Refuse,
    HangUp,
}

/// A person if there is one to be had, else a sentence and the end.
fn cannot_serve(bridge: &Bridge, sid: &str, sentence: &str) -> Answer {
    match &bridge.config.fallback_number {
        Some(number) if bridge.calls.put_through(&bridge.config, sid) => {
            Answer::Person(number.clone())
        }
        _ => Answer::Sentence(sentence.to_owned()),
    }
}

impl Call {
    /// A token for the next stream: the one before, if nobody has shown it yet. Then Twilio has
    /// asked twice, and may go by either answer.
    fn new_token(&self) -> String {
        let mut state = lock(&self.state);
        let unused = state.token.take().filter(|(_, until)| Instant::now() < *until);
        let (token, until) = unused.unwrap_or_else(|| {
            state.streams += 1;
            (format!("{}/{}", self.sid, random_hex()), Instant::now() + STREAM_WITHIN)
        });
        if state.hang_up.is_none() {
            state.token = Some((token.clone(), until));
        }
        token
    }
}

// ============================================================================
// 5. Stream: Twilio opens the Media Stream
// ============================================================================
//
// In:       GET /media-stream/CA9f3c…/5d8e…, upgraded to a WebSocket; then
//           {"event":"connected","protocol":"Call","version":"1.0.0"}
//           {"event":"start","streamSid":"MZ…","start":{"callSid":"CA9f3c…","mediaFormat":
//            {"encoding":"audio/x-mulaw","sampleRate":8000},"customParameters":{}}}
// Out:      the caller's leg, in the hands of the call that waits for exactly this token.
// Fails:    at the door, with 403, for everyone who has no token; nothing is created for them. With
//           close code 1002, 1003, 1007, 1008 or 1009 if no `start` of this call follows.
// Not here: a second chance. A token opens one stream.

/// Thread T: the connection's own thread. The call is found; now it relays the caller's voice.
fn media_stream(call: &Arc<Call>, visitor: &Visitor, head: Vec<u8>) {
    visitor.is_decided();
    let socket = match stream::accept(&visitor.socket, head, &call.bridge.config) {
        Ok(socket) => socket,
        Err(why) => return log!(call, Warn, Stream, "/media-stream was refused: {why}"),
    };
    let refuse = |reason: &str, why: &str| {
        refused(reason);
        log!(call, Warn, Stream, "a media stream was closed: {why}");
        socket.close(CloseCode::Policy, why);
        socket.await_close();
    };
    let (start, wire) = match stream::await_start(&socket) {
        Ok(Some(start)) => start,
        Ok(None) => return refuse("no_start", "it said goodbye before its start"),
        Err(why) => return refuse("no_start", &why),
    };
    if !start.has_our_sound() {
        return refuse("media_format", "its sound is not mu-law at 8000 Hz");
    }
    if start.call_sid != call.sid {
        return refuse("call_sid", "it is another call's");
    }
    let caller = Arc::new(CallerLeg::new(socket, start.stream_sid, Arc::clone(&call.tap)));
    call.journal.note(&Event::Stream { stream_sid: caller.stream_sid.clone() });
    call.tap.show(Exhibit::Start, || wire.to_string());
    if !call.has_stream(&caller) {
        return caller.close(CloseCode::Normal, "the call is over");
    }
    let ms = call.rang.elapsed().as_millis();
    log!(call, Info, Stream, "the Media Stream is open, {ms} ms after it rang"; ms);

    let end = outlive(|| relay_caller_to_agent(call, &caller))
        .unwrap_or_else(|| StreamEnd::Broken("a fault of ours".into()));
    let was_the_latest = call.forget_stream(&caller);
    match end {
        _ if call.is_over() || !was_the_latest => {}
        StreamEnd::Stopped => call.hang_up(EndedBy::CallerLeft),
        StreamEnd::Broken(why) => {
            BROKEN_LINES.of(&["caller"]).add();
            log!(call, Warn, Stream, "the stream ended without a stop ({why}); another may come");
            let broke = format_args!("the stream ended without a stop ({why})");
            call.journal.note_failure(Step::Stream, broke, "");
            caller.say_goodbye(CloseCode::Protocol, &why);
            caller.cut();
            if !await_caller(call, STREAM_WITHIN) {
                call.hang_up(EndedBy::CallerLost);
            }
        }
    }
    caller.close(CloseCode::Normal, "the call is over");
}

impl Call {
    /// Once, in time, and only with the right token, compared in constant time.
    fn take_token(&self, shown: &str) -> bool {
        let mut state = lock(&self.state);
        let right = state.token.as_ref().is_some_and(|(token, until)| {
            bool::from(token.as_bytes().ct_eq(shown.as_bytes())) && Instant::now() < *until
        });
        if right {
            state.token = None;
        }
        right
    }

    /// False: the call has ended in the same moment.
    fn has_stream(&self, caller: &Arc<CallerLeg>) -> bool {
        let mut state = lock(&self.state);
        if state.hang_up.is_some() {
            return false;
        }
        state.caller = Some(Arc::clone(caller));
        if state.streams == 1 {
            state.silent_since = Some(Instant::now());
        }
        drop(state);
        self.changed.notify_all();
        true
    }

    /// False: another stream had taken its place already.
    fn forget_stream(&self, ended: &Arc<CallerLeg>) -> bool {
        let mut state = lock(&self.state);
        let latest = match &state.caller {
            Some(caller) => Arc::ptr_eq(caller, ended),
            // Taken out by `/stream-ended`, which is about to be answered with another one.
            None => true,
        };
        if latest {
            state.caller = None;
        }
        drop(state);
        self.changed.notify_all();
        latest
    }
}

// ============================================================================
// 6. Talk: two threads relay the sound
// ============================================================================
//
// In:       two open legs.
// Wire:     Twilio   {"event":"media","media":{"payload":"<base64 mu-law, 160 bytes>"},…}
//           Ultravox PCM, 320 bytes in a binary message; and as text
//                    {"type":"transcript","role":"user","text":"Hello?","final":true,"ordinal":2}
// Out:      the same sound on the other side, in order, at once; a word on why it stopped.
// Fails:    when a leg breaks or falls silent. The other leg is then ended in an orderly way.
// Not here: a clock. The caller's frames come fifty times a second: a key's pause and the longest
//           call are looked at when one comes in.

// --- 6a. Caller to agent (thread T) --------------------------------------------

/// Twilio sends 50 messages a second. After this much of nothing the stream is lost.
const CALLER_SILENCE_MAX: Duration = Duration::from_secs(10);

/// How a stream ended.
enum StreamEnd {
    /// Twilio said `stop`: the caller has left, or was taken elsewhere.
    Stopped,
    /// Without `stop`. Twilio may ask `/stream-ended` and open another one.
    Broken(String),
}

fn relay_caller_to_agent(call: &Arc<Call>, caller: &CallerLeg) -> StreamEnd {
    let mut mulaw = Vec::new();
    let mut keys = Keys::default();
    let mut tone = Tone::default();
    let relayed = Relayed::of("to_agent");
    loop {
        let (message, arrived) = match caller.next(&mut mulaw, CALLER_SILENCE_MAX) {
            Ok(message) => message,
            Err(why) => return StreamEnd::Broken(why),
        };
        match message {
            FromTwilio::Media => {
                if let Some(agent) = call.agent() {
                    relayed.note(hand_to_agent(call, &agent, &mulaw), arrived);
                } else {
                    relayed.note(false, arrived);
                    // What the agent said before may still play, and its last word does.
                    if caller.unheard() < 2 * FRAME && !call.is_over() {
                        tone.next_frame().map(|frame| caller.play(frame));
                    }
                }
            }
            FromTwilio::Dtmf(digit) => {
                if let Some(many) = keys.press(&digit) {
                    type_keys(call, &many);
                }
            }
            FromTwilio::Mark(name) => {
                lock(&call.state).heard_last_word |= name == LAST_WORD;
                call.changed.notify_all();
            }
            FromTwilio::Stop => {
                let mut state = lock(&call.state);
                state.stopped = !state.said_goodbye;
                return StreamEnd::Stopped;
            }
            FromTwilio::Unknown(event) => {
                log!(call, Debug, Talk, "Twilio sent \"{event}\", which is new to us");
            }
            FromTwilio::Connected | FromTwilio::Start(_) => {
                return StreamEnd::Broken("a second start".into());
            }
        }
        if let Some(number) = keys.after_pause() {
            type_keys(call, &number);
        }
        if lock(&call.state).ends_by.is_some_and(|ends_by| Instant::now() > ends_by) {
            call.hang_up(EndedBy::TooLong);
        }
    }
}

/// Every frame goes on, the silent ones too: Ultravox hears time by them.
/// Simplification: if Twilio stalls, the gap is not filled with silence.
///
/// False: it was lost.
fn hand_to_agent(call: &Call, agent: &AgentLeg, mulaw: &[u8]) -> bool {
    if mulaw.is_empty() {
        return true;
    }
    if let Err(end) = agent.send_pcm(to_pcm(mulaw)) {
        // Thread U reads from this leg; it decides what its end means for the call.
        log!(call, Debug, Talk, "a frame did not reach the agent: {end}");
        return false;
    }
    true
}

impl Call {
    fn agent(&self) -> Option<Arc<AgentLeg>> {
        lock(&self.state).agent.clone()
    }
}

// --- 6b. Agent to caller (thread U) --------------------------------------------

/// Nothing from the agent for this long: we ping. Nothing for as long again: it is lost.
const PING_AFTER: Duration = Duration::from_secs(3);
/// From the agent's goodbye to Ultravox closing its socket. Then we close it.
const AGENT_LEAVES_WITHIN: Duration = Duration::from_secs(20);
/// From the end of a call to Ultravox closing its socket. Then we cut it.
const AGENT_GONE_WITHIN: Duration = Duration::from_secs(5);
/// An agent that breaks off this near the end of `MAX_CALL_SECONDS` has reached its limit.
const LAST_SECONDS: Duration = Duration::from_secs(5);

/// Until the agent is gone, or the call is over. Returns why.
fn relay_agent_to_caller(call: &Arc<Call>, agent: &Arc<AgentLeg>) -> EndedBy {
    let mut voice = Voice::default();
    let mut act = Act::new(call, agent);
    let relayed = Relayed::of("to_caller");
    let mut quiet = 0;
    let mut over_since = None;
    loop {
        let received = agent.next(PING_AFTER);
        // It was told so by `Call::hang_up`, and may talk on.
        if call.is_over()
            && over_since.get_or_insert_with(Instant::now).elapsed() > AGENT_GONE_WITHIN
        {
            return act.reason();
        }
        if act.leaving.is_some_and(|(_, since)| since.elapsed() > AGENT_LEAVES_WITHIN) {
            return act.reason();
        }
        let (message, arrived) = match received {
            Ok(message) => message,
            Err(SocketEnd::Quiet) if call.is_over() => return EndedBy::CallerLeft,
            Err(SocketEnd::Quiet) if quiet == 0 => {
                quiet += 1;
                agent.ping();
                continue;
            }
            Err(SocketEnd::Closed(Some(GOODBYE))) => return act.reason(),
            Err(end) => {
                // At its time limit Ultravox cuts the connection; after a goodbye it may, too.
                let nearly = Instant::now() + LAST_SECONDS + TOO_LONG_GRACE;
                let time_is_up = lock(&call.state).ends_by.is_some_and(|by| by < nearly);
                let ends = call.is_over() || call.bridge.is_ending() || act.leaving.is_some();
                if ends || time_is_up {
                    return act.reason();
                }
                log!(call, Error, Talk, "Ultravox: {end}");
                call.journal.note_failure(Step::Talk, format_args!("Ultravox: {end}"), "");
                BROKEN_LINES.of(&["agent"]).add();
                return EndedBy::AgentLost;
            }
        };
        quiet = 0;
        match message {
            Ok(FromAgent::Voice(pcm)) => relayed.note(voice.pass_on(call, &pcm), arrived),
            Ok(FromAgent::Transcript(heard)) => note_transcript(call, &heard),
            Ok(FromAgent::Invocation(invocation)) => act.run(invocation),
            Ok(FromAgent::ClearBuffer) => clear(call),
            Ok(FromAgent::State(state)) => log!(call, Debug, Talk, "the agent is {state}"),
            Ok(FromAgent::Other(kind)) => log!(call, Debug, Talk, "the agent sent \"{kind}\""),
            Err(why) => log!(call, Warn, Talk, "Ultravox sent what cannot be read: {why}"),
        }
    }
}

fn note_transcript(call: &Call, heard: &Heard) {
    let agent = lock(&call.state).agents;
    // Whoever looks at the call does not wait for the disk.
    let said = lock(&call.transcript).hear(agent, heard).cloned();
    if let Some(said) = said {
        call.journal.note(&Event::Said(said));
    }
}

/// The agent's voice on its way to the caller.
#[derive(Default)]
struct Voice {
    pcm: PcmStream,
    spoke: bool,
}

impl Voice {
    /// At once, however much it is: Twilio keeps it and keeps the time.
    ///
    /// Between two streams it waits for the next one, and the agent's voice with it. False: it
    /// was lost.
    fn pass_on(&mut self, call: &Call, pcm: &[u8]) -> bool {
        let Some(caller) = call.await_stream() else { return false };
        let mulaw = self.pcm.encode(pcm);
        let arrives = caller.play(&mulaw);
        if let Some(after) = caller.answered_after(&mulaw) {
            call.journal.note(&Event::Turn { ms: millis(after) });
        }
        if !self.spoke && !mulaw.is_empty() {
            self.spoke = true;
            if let Some(silent_since) = lock(&call.state).silent_since.take() {
                let silent = silent_since.elapsed();
                call.journal.note(&Event::FirstWord { ms: millis(silent) });
                DEAD_AIR.of(&[]).observe(silent);
            }
            let ms = call.rang.elapsed().as_millis();
            log!(call, Info, Talk, "the agent's first sound, {ms} ms after it rang"; ms);
        }
        arrives
    }
}

impl Call {
    /// Thread T sees to it that this ends: with a new stream, or with the call.
    fn await_stream(&self) -> Option<Arc<CallerLeg>> {
        let state = lock(&self.state);
        let waiting = |state: &mut CallState| state.caller.is_none() && state.hang_up.is_none();
        wait(&self.changed, state, 2 * STREAM_WITHIN, waiting).caller.clone()
    }
}

// --- 6c. Barge-in ----------------------------------------------------------------

/// Twilio still holds seconds of the agent's voice. Without this, the caller is talked over by a
/// sentence that the agent has already given up.
fn clear(call: &Call) {
    let Some(caller) = call.caller() else { return };
    let ms = caller.clear().as_millis();
    log!(call, Info, Talk, "barge-in: {ms} ms of the agent's voice were not played"; ms);
}

impl Call {
    fn caller(&self) -> Option<Arc<CallerLeg>> {
        lock(&self.state).caller.clone()
    }
}

// --- 6d. Keys --------------------------------------------------------------------

/// Typed for the agent as one text, however many keys it was.
fn type_keys(call: &Call, keys: &str) {
    log!(call, Info, Talk, "{} keys were pressed", keys.len());
    if let Some(agent) = call.agent()
        && let Err(end) = agent.type_text(keys)
    {
        log!(call, Warn, Talk, "the keys did not reach the agent: {end}");
    }
}

// ============================================================================
// 7. Act: the agent invokes tools
// ============================================================================
//
// In:       {"type":"client_tool_invocation","toolName":"verify","invocationId":"i1",
//            "parameters":{…}}
// Out:      exactly one result for that id:
//           {"type":"client_tool_result","invocationId":"i1","result":"Verified.",
//            "responseType":"tool-response"}
//           A new stage ("new-stage") brings its prompt, voice and tools; "hang-up" ends the call.
// Fails:    in words that the agent can say. A tool's failure never ends a call.
// Not here: waiting on thread U. A slow n8n has a thread of its own, and the sound flows on.

/// Tools of one call that run on threads of their own. The next is told to wait.
const TOOLS_AT_ONCE_MAX: usize = 8;
/// Different invocations answered to one agent. More is a storm, and gets an error each.
const INVOCATIONS_MAX: usize = 500;
/// A tool's name in a journal. The model may make up a name of any length.
const TOOL_NAME_CHARS_MAX: usize = 100;

/// The agent's hands, on thread U.
struct Act<'a> {
    call: &'a Arc<Call>,
    agent: &'a Arc<AgentLeg>,
    /// One result each, even if an invocation should be repeated to the letter.
    answered: HashSet<String>,
    /// What the agent leaves for, and since when.
    leaving: Option<(EndedBy, Instant)>,
}

/// One invocation, until it has its result.
struct ToolRun {
    call: Arc<Call>,
    agent: Arc<AgentLeg>,
    invocation: Invocation,
    /// The agent's stage when it asked.
    stage: String,
    began: Instant,
}

impl<'a> Act<'a> {
    fn new(call: &'a Arc<Call>, agent: &'a Arc<AgentLeg>) -> Act<'a> {
        Act { call, agent, answered: HashSet::new(), leaving: None }
    }

    /// Why the agent is gone, when it has gone in an orderly way.
    fn reason(&self) -> EndedBy {
        match self.leaving {
            Some((why, _)) => why,
            None if self.call.bridge.is_ending() => EndedBy::ShuttingDown,
            None => lock(&self.call.state).told_to_leave.unwrap_or(EndedBy::AgentLeft),
        }
    }

    fn run(&mut self, invocation: Invocation) {
        if self.answered.len() >= INVOCATIONS_MAX {
            log!(self.call, Debug, Act, "{}: too many invocations", invocation.tool);
            count_tool(self.call, &invocation, "refused");
            let storm = ToolResult::Failed("too many invocations in one call".into());
            return tell_result(self.call, self.agent, &invocation, &storm);
        }
        if !self.answered.insert(invocation.id.clone()) {
            count_tool(self.call, &invocation, "repeated");
            return log!(self.call, Warn, Act, "{}: asked twice with one id", invocation.tool);
        }
        let files = &self.call.files;
        let stage = lock(&self.call.state).stage.clone();
        let run = ToolRun {
            call: Arc::clone(self.call),
            agent: Arc::clone(self.agent),
            invocation,
            stage,
            began: Instant::now(),
        };
        let (invocation, stage) = (&run.invocation, &run.stage);
        let offered =
            files.stages.get(stage).is_some_and(|stage| stage.tools.contains(&invocation.tool));
        let Some(tool) = files.tools.get(&invocation.tool).filter(|_| offered) else {
            log!(self.call, Warn, Act, "{} is not a tool of stage {stage}", invocation.tool);
            return run.settle(&ToolResult::NoSuchTool, "no such tool");
        };
        let is_busy = self.call.tools_running.load(Ordering::SeqCst) > 0;
        if matches!(tool.action, ToolAction::Transfer(_)) && is_busy {
            return run.settle(&ToolResult::Say(NOT_YET.into()), "incomplete");
        }
        if let Some(lack) = invocation.lacks(tool, files) {
            log!(self.call, Info, Act, "{}: {lack}", invocation.tool);
            return run.settle(&ToolResult::Say(lack), "incomplete");
        }
        let result = match &tool.action {
            ToolAction::Reply(text) => ToolResult::Say(self.fill(text, invocation)),
            ToolAction::EnterStage { stage, message } => {
                self.enter_stage(stage, &self.fill(message, invocation))
            }
            ToolAction::HangUp(_) => {
                self.leaving = Some((EndedBy::AgentHungUp, run.began));
                ToolResult::HangUp
            }
            // The agent leaves; step 8 lets Twilio ring the person.
            ToolAction::Transfer(_) => {
                lock(&self.call.state).transfer =
                    invocation.transfer(tool, &self.call.files, &self.call.bridge.config);
                self.leaving = Some((EndedBy::Transferred, run.began));
                ToolResult::HangUp
            }
            ToolAction::N8n { .. } => return ask_n8n_aside(run),
            ToolAction::Ultravox { .. } => ToolResult::NoSuchTool,
        };
        run.finish(&result, "done");
    }

    fn fill(&self, text: &str, invocation: &Invocation) -> String {
        fill(text, |name| match name {
            "random_number" => Some(random_number()),
            name => invocation.text(name).or_else(|| self.call.placeholder(name)),
        })
    }

    /// Same socket, same call: only prompt, voice and tools change.
    fn enter_stage(&self, stage: &str, message: &str) -> ToolResult {
        stage.clone_into(&mut lock(&self.call.state).stage);
        let mut body = self.call.stage_body(stage);
        body["toolResultText"] = json!(message);
        log!(self.call, Info, Act, "the agent enters stage {stage}");
        self.call.journal.note(&Event::Stage { stage: stage.to_owned() });
        ToolResult::NewStage(body)
    }
}

fn ask_n8n_aside(run: ToolRun) {
    let (call, run) = (Arc::clone(&run.call), Arc::new(run));
    let decline = |why: &str| {
        call.tools_running.fetch_sub(1, Ordering::SeqCst);
        log!(call, Warn, Act, "{}: {why}", run.invocation.tool);
        run.settle(&ToolResult::Failed(why.to_owned()), "declined");
    };
    if call.tools_running.fetch_add(1, Ordering::SeqCst) >= TOOLS_AT_ONCE_MAX {
        return decline("too many things at once; ask again when these are done");
    }
    let aside = Arc::clone(&run);
    let started = spawn(format!("{} tool", shorten(&call.sid)), move || {
        aside.call.journal.note(&Event::ToolBegins(aside.asked()));
        let (result, outcome) = outlive(|| n8n_tool(&aside.call, &aside.invocation))
            .unwrap_or_else(|| (ToolResult::Say(PERHAPS_DONE.into()), "uncertain"));
        aside.call.tools_running.fetch_sub(1, Ordering::SeqCst);
        aside.finish(&result, outcome);
    });
    if let Err(error) = started {
        decline(&error.to_string());
    }
}

/// Asks n8n, once for each different question. A repeat waits for the first and gets its answer,
/// because the model does repeat itself, and nobody wants two meetings.
fn n8n_tool(call: &Call, invocation: &Invocation) -> (ToolResult, &'static str) {
    let tool = call.files.tools.get(&invocation.tool);
    let Some(tool @ Tool { action: ToolAction::N8n { route, .. }, .. }) = tool else {
        return (ToolResult::NoSuchTool, "no such tool");
    };
    let data = invocation.n8n_data(tool, &call.files);
    let Some((fingerprint, slot)) = call.answered.slot(&format!("{route} {data}")) else {
        return (ToolResult::Failed("too many different requests in one call".into()), "refused");
    };
    let mut answer = lock(&slot);
    if let Some(text) = answer.as_ref() {
        return (ToolResult::Say(text.clone()), "answered from memory");
    }
    let key = format!("{}-{route}-{fingerprint}", call.sid);
    let (sid, number) = (call.sid.as_str(), call.number.as_str());
    let question = Question { sid, number, route, data: &data, key, report: Map::new() };
    match call.bridge.n8n.tool(&question, tool.within, &call.tap) {
        Ok(text) => {
            *answer = Some(text.clone());
            (ToolResult::Say(text), "done")
        }
        Err(failure) => {
            log!(call, Warn, Act, "{}: {failure}", invocation.tool);
            call.journal.note_failure(Step::Act, &failure, &invocation.id);
            if failure.certainly_not_done {
                return (ToolResult::Say(NOT_DONE.into()), "failed");
            }
            *answer = Some(PERHAPS_DONE.into());
            (ToolResult::Say(PERHAPS_DONE.into()), "uncertain")
        }
    }
}

/// What the agent is told when it asks for a person while n8n is still at work. Its answer would
/// come to nobody, and until then the caller could not come back.
const NOT_YET: &str = "Not yet: another tool is still at work. Tell the caller, wait for its \
    result, and then ask again.";

/// What the agent is told when n8n was certainly not reached.
const NOT_DONE: &str = "That did not work: the system cannot be reached. Nothing was done. \
    Apologise, and offer to take a note instead.";

/// What the agent is told when n8n may or may not have done it.
const PERHAPS_DONE: &str = "It is not certain whether that worked: the system did not answer \
    clearly. Do not try again. Tell the caller that a colleague will check and confirm.";

impl ToolRun {
    /// For a tool that has been at work, and so has a time to measure.
    fn finish(&self, result: &ToolResult, outcome: &str) {
        TOOL_TIME.of(&[&self.invocation.tool]).observe(self.began.elapsed());
        self.settle(result, outcome);
    }

    /// The result goes to the agent first, and then into the journal.
    fn settle(&self, result: &ToolResult, outcome: &str) {
        let (call, invocation) = (&self.call, &self.invocation);
        count_tool(call, invocation, outcome);
        tell_result(call, &self.agent, invocation, result);
        let ms = millis(self.began.elapsed());
        let tool = &invocation.tool;
        log!(call, Info, Act, "{tool}: {outcome} after {ms} ms"; tool, outcome, ms);
        let told = call.bridge.config.hide_secrets(result.text().to_owned());
        call.journal.note(&Event::Tool {
            asked: self.asked(),
            result: cut(&told, WIRE_CHARS_MAX),
            outcome: outcome.into(),
            ms,
        });
    }

    fn asked(&self) -> ToolAsked {
        ToolAsked {
            id: self.invocation.id.clone(),
            tool: cut(&self.invocation.tool, TOOL_NAME_CHARS_MAX),
            stage: self.stage.clone(),
            arguments: self.invocation.arguments(),
        }
    }
}

/// A name that the model has made up is not a label: there is no end to such names.
fn count_tool(call: &Call, invocation: &Invocation, outcome: &str) {
    let known = call.files.tools.contains_key(&invocation.tool);
    let tool = if known { &invocation.tool } else { "unknown" };
    TOOLS.of(&[tool, outcome]).add();
}

fn tell_result(call: &Call, agent: &AgentLeg, invocation: &Invocation, result: &ToolResult) {
    if let Err(end) = agent.result(invocation, result) {
        log!(call, Warn, Act, "{}: the result did not reach the agent: {end}", invocation.tool);
    }
}

// ============================================================================
// 8. Goodbye: either side ends the call
// ============================================================================
//
// In:       thread U's reason to stop.
// Wire:     {"event":"mark","streamSid":"MZ…","mark":{"name":"goodbye"}}    to Twilio, and back
//           once the caller has heard all before it; then POST /stream-ended: what comes next?
// Out:      a caller who has heard the last word, and two closed sockets.
// Fails:    never for long: the mark has a deadline of its own.
// Not here: the caller who hangs up while the stream is open. Thread T sees that in step 6.

fn say_goodbye(call: &Call, why: EndedBy) {
    call.hang_up(why);
    let Some(caller) = call.caller() else { return };
    if why != EndedBy::AgentLost {
        await_last_word(call, &caller);
    }
    lock(&call.state).said_goodbye = true;
    caller.say_goodbye(CloseCode::Normal, "goodbye");
}

impl Call {
    /// Every call ends through here. The first reason counts; the agent's socket is closed at once,
    /// so that nobody is listened to, or billed, after the end.
    fn hang_up(&self, why: EndedBy) {
        let agent = {
            let mut state = lock(&self.state);
            if state.hang_up.is_some() {
                return;
            }
            state.hang_up = Some(why);
            state.token = None;
            state.agent.take()
        };
        let (ended_by, ms) = (why, millis(self.rang.elapsed()));
        let seconds = ms / 1_000;
        log!(self, Info, Goodbye, "{ended_by}, {seconds} s after it rang"; ended_by, seconds);
        self.journal.note(&Event::Goodbye { ended_by, ms });
        if let Some(agent) = agent {
            agent.close("the call is over");
        }
        self.changed.notify_all();
    }

    fn is_over(&self) -> bool {
        lock(&self.state).hang_up.is_some()
    }
}

/// The name of the one mark that we send.
const LAST_WORD: &str = "goodbye";
/// Added to the playing time of what the caller has yet to hear. Then the stream is closed.
const MARK_GRACE: Duration = Duration::from_secs(2);

/// All of the agent's voice is with Twilio, but not yet with the caller. A mark after it comes back
/// when it has been played. Closing now would cut the goodbye off.
fn await_last_word(call: &Call, caller: &CallerLeg) {
    let began = Instant::now();
    let unheard = caller.unheard();
    if !caller.mark(LAST_WORD) {
        log!(call, Debug, Goodbye, "the mark did not reach Twilio");
    }
    let state = lock(&call.state);
    let state = wait(&call.changed, state, unheard + MARK_GRACE, |state| {
        !state.heard_last_word && state.caller.is_some()
    });
    let how = match (state.heard_last_word, state.caller.is_some()) {
        (true, _) => "the caller heard the last word",
        (false, false) => "the caller left during the goodbye",
        (false, true) => "no mark came back; the playing time has passed",
    };
    drop(state);
    let ms = began.elapsed().as_millis();
    log!(call, Info, Goodbye, "{how}, {ms} ms later"; ms);
}

/// `POST /stream-ended`: a stream is over, or a person we have rung for the caller is; Twilio asks
/// what comes next.
fn stream_ended(bridge: &'static Bridge, form: &Form) -> Reply {
    let sid = form.get("CallSid");
    Reply::twiml(what_comes_next(bridge, sid, form).twiml(bridge))
}

/// The form has a `DialCallStatus` if a person was rung for the caller. That somebody picked up
/// (`completed`) says nothing, mailboxes do that.
fn what_comes_next(bridge: &'static Bridge, sid: &str, form: &Form) -> Answer {
    bridge.calls.await_filed(sid);
    bridge.calls.left_person(sid);
    let call = bridge.calls.find(sid);
    let dial_status = form.get("DialCallStatus");
    let is_accepted = has_taken_it(bridge, sid, form);
    if is_accepted {
        note_accepted(bridge, sid);
    }
    if is_final(form.get("CallStatus")) || is_accepted {
        if let Some(call) = call.filter(|_| dial_status.is_empty()) {
            call.hang_up(EndedBy::CallerLeft);
        }
        bridge.outbox.file_now(sid);
        return Answer::HangUp;
    }
    if !dial_status.is_empty() {
        log!(Sid { sid }, Info, Goodbye, "nobody took the transferred call ({dial_status})");
        let is_picked_up = matches!(dial_status, "completed" | "answered");
        return take_up(bridge, sid, if is_picked_up { NOT_TAKEN } else { NOBODY_ANSWERED });
    }
    match (call.filter(|call| !call.is_over()), bridge.calls.how_it_ended(sid)) {
        (Some(call), _) => another_stream(&call),
        (None, Some((how, transfer))) => after_the_agent(bridge, sid, how, transfer),
        (None, None) => take_up(bridge, sid, INTERRUPTED),
    }
}

fn after_the_agent(bridge: &Bridge, sid: &str, how: EndedBy, transfer: Option<Transfer>) -> Answer {
    let agent = bridge.agent.get();
    let apology = &agent.phrases.apology;
    match how {
        EndedBy::Refused => Answer::Refuse,
        EndedBy::Transferred => match transfer.filter(|transfer| is_e164(&transfer.number)) {
            Some(transfer) if bridge.calls.put_through(&bridge.config, sid) => {
                Answer::Transfer(transfer)
            }
            Some(_) => Answer::Sentence(apology.clone()),
            // A journal need not know whom it was to be.
            None => cannot_serve(bridge, sid, apology),
        },
        EndedBy::AgentLost | EndedBy::NoAgent | EndedBy::NeverStreamed => {
            cannot_serve(bridge, sid, apology)
        }
        EndedBy::CallerLeft
        | EndedBy::CallerLost
        | EndedBy::AgentHungUp
        | EndedBy::AgentLeft
        | EndedBy::TooLong
        | EndedBy::Machine
        | EndedBy::ShuttingDown
        | EndedBy::ProcessDied => Answer::HangUp,
    }
}

/// The key with which a person takes a call. Every other one refuses it.
const TAKES_IT: &str = "1";

/// `POST /whisper`: the person whom we ring for the caller has picked up, and hears who calls and
/// why; and once more for the key that they press. Whoever presses none is hung up on.
fn whisper(bridge: &'static Bridge, form: &Form) -> Reply {
    let (config, agent) = (&bridge.config, bridge.agent.get());
    Reply::twiml(match form.get("Digits") {
        "" => {
            let sentence = agent.whisper(form.get(REASON));
            twiml::whisper(config.own_url(), &agent.language, &sentence)
        }
        TAKES_IT => {
            note_accepted(bridge, form.get("ParentCallSid"));
            twiml::take_the_call()
        }
        _ => twiml::hang_up(),
    })
}

/// `POST /call-status`: optional for calls that come in, asked for by us for calls that go out. It
/// tells of a caller who went away while it still rang, whom no stream will ever announce, and of
/// answering machines.
fn call_status(bridge: &'static Bridge, form: &Form) -> Reply {
    let (sid, status) = (form.get("CallSid"), form.get("CallStatus"));
    let answered_by = form.get("AnsweredBy");
    bridge.calls.await_filed(sid);
    if let Some(call) = bridge.calls.find(sid) {
        let (reported, by) = (status.to_owned(), answered_by.to_owned());
        call.journal.note(&Event::Status { status: reported, answered_by: by });
        if is_final(status) {
            log!(call, Info, Goodbye, "Twilio reports the call as {status}");
            call.hang_up(EndedBy::CallerLeft);
        } else if answered_by.starts_with("machine") || answered_by == "fax" {
            leave_to_machine(&call, answered_by);
        }
    }
    if is_final(status) {
        bridge.calls.left_person(sid);
        bridge.ringing.is_over(form.get(OUTGOING));
        bridge.outbox.file_now(sid);
    }
    Reply::new(204, "text/plain", String::new())
}

/// A machine has picked up the call that we made: it gets the message, if there is one, and no
/// conversation at the owner's expense.
fn leave_to_machine(call: &Arc<Call>, answered_by: &str) {
    log!(call, Info, Talk, "an answering machine has picked up ({answered_by})");
    let message = call.bridge.config.answering_machine_message.as_ref();
    let told = message.filter(|_| answered_by != "fax").zip(call.agent());
    let Some((message, agent)) = told else {
        return call.hang_up(EndedBy::Machine);
    };
    lock(&call.state).told_to_leave = Some(EndedBy::Machine);
    if agent.hang_up(message).is_err() {
        call.hang_up(EndedBy::Machine);
    }
}

// ============================================================================
// 9. After: the transcript is filed
// ============================================================================
//
// In:       what was said, gathered as it was said.
// Wire:     GET /api/calls/7c21…  {"summary":"Anna wants…","billedDuration":"72s",…}   Ultravox
//           {"route":"2","number":"+4930123456","data":"Agent: Hello Anna…\nUser: …",
//            "endedBy":"CallerLeft","seconds":71,"summary":…,…}    to n8n; any 2xx: it has it
// Out:      the transcript at n8n, and a journal that says so.
// Fails:    never for good: what n8n does not take stays on disk and is tried again.
// Not here: the caller's line. Nobody is on it any more.

fn after(call: &Call) {
    let how = lock(&call.state).how_it_ended().unwrap_or(EndedBy::NoAgent);
    let transcript = {
        let mut transcript = lock(&call.transcript);
        for unfinished in transcript.finish() {
            call.journal.note(&Event::Said(unfinished.clone()));
        }
        std::mem::take(&mut *transcript)
    };
    if how == EndedBy::Transferred {
        // The caller may come back. Until that is decided, the call has no end.
        let transfer = lock(&call.state).transfer.clone().unwrap_or_default();
        call.journal.note(&Event::Transfer(transfer));
    } else {
        call.journal.note(&Event::End { ended_by: how });
        CALLS.of(&[&how.to_string()]).add();
    }
    let who = (&*call.sid, &*call.number, call.direction);
    call.bridge.outbox.add(Delivery::new(who, transcript, how, &call.journal));
}

/// One try, on a thread of the outbox. An error: there is to be another.
fn file_transcript(bridge: &Bridge, delivery: &mut Delivery) -> Result<(), Failure> {
    if delivery.is_unfinished() {
        // Nobody has taken it up again.
        delivery.finish();
        CALLS.of(&[&delivery.ended_by.to_string()]).add();
    }
    if delivery.transcript.text().is_empty() {
        log!(delivery, Info, After, "nothing was said, so there is no transcript to file");
        delivery.note(&Event::Delivered);
        return Ok(());
    }
    if bridge.config.n8n_webhook_url.is_none() {
        log!(delivery, Info, After, "the transcript is in {}", delivery.path().display());
        return Ok(());
    }
    offer(&bridge.n8n, &bridge.config, delivery)?;
    delivery.note(&Event::Delivered);
    let lines = delivery.transcript.count();
    log!(delivery, Info, After, "n8n has the transcript of {lines} lines"; lines);
    Ok(())
}

fn offer(n8n: &N8n, config: &Arc<Config>, delivery: &Delivery) -> Result<(), Failure> {
    let question = Question {
        sid: &delivery.sid,
        number: &delivery.number,
        route: "2",
        data: &delivery.transcript.text(),
        key: format!("{}-2", delivery.sid),
        report: delivery.report(),
    };
    n8n.file(&question, DELIVER_WITHIN, &delivery.tap(config))
}
