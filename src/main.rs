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
//! 2. **Greeting** - n8n is asked, by the caller's number, for a personal first message.
//! 3. **Agent** - an Ultravox call is created with the first stage's prompt, voice and tools,
//!    and joined at once.
//! 4. **Answer** - `TwiML` goes back: "connect this call to our Media Stream", with a token that
//!    opens it once.
//! 5. **Stream** - Twilio opens `/media-stream`; its token finds the call that waits.
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
//!   n8n <--------- HTTP ----------------------------------+
//! ```
//!
//! Threads and blocking sockets only, no async runtime. A call has two threads of its own. Each
//! *waits outside the lock and thinks inside it*: see [`Duplex`], the one clever thing here.
//!
//! # When something breaks
//!
//! The caller is to notice as little as possible. A broken line to the agent is mended by a new
//! agent that knows what was said (step 3, `resume_agent`). A broken stream is replaced by the
//! next one (step 8, `another_stream`). And a process that was killed has left a journal, from
//! which the next one takes the call up (step 8, `take_up`).
//!
//! # Beside the call
//!
//! The owner sees the calls on the live page (`page.html`), its figures at `/metrics`, and what n8n
//! has not taken with `callbridge outbox`. Some threads belong to no call: they keep Ultravox and
//! n8n ready, offer transcripts again, and remove old journals. `check`, `demo`, `diagram` and
//! `workflow` are commands with a file each.
//!
//! # What does not flow downwards
//!
//! Two things travel against the reading direction: the **token** (step 5 finds what step 4
//! left in the [`Call`]) and the **slot** (step 9 gives back the place that step 1 took).
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
//! * *stage*: a part of the conversation with its own prompt, voice and tools.
//! * *journal*: a call's file on disk, one line an event.
//!
//! # Left out
//!
//! One agent for every number, one machine, no recording, no resampling (both sides speak
//! 8 kHz). Such places are marked with the word *Simplification* below.

use std::collections::{HashMap, HashSet};
use std::net::TcpListener;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};
use std::{io, thread};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use jiff::Timestamp;
use ring::{digest, hmac};
use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use serde_json::{Map, Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use subtle::ConstantTimeEq as _;
use tiny_http::Method;
use tungstenite::Bytes;
use tungstenite::protocol::Message;
use tungstenite::protocol::frame::coding::CloseCode;

use crate::around::lines::{CallSlot, Calls, Slot};
use crate::around::mend::{another_stream, take_up};
use crate::around::ready::{health, keep_ready, ready};
use crate::around::shutdown::await_end;
use crate::door::inner::start_http;
use crate::door::reply::{Reply, header, read_body};
use crate::door::{Lobby, Visit, front_door};
use crate::owner::access::{from_owner, order_from_owner};
use crate::owner::calls::{call_list, call_story};
use crate::owner::metrics::metrics;
use crate::owner::outgoing::{Ringing, outgoing_call};
use crate::owner::page::page;
use crate::owner::phone::{browser_call, browser_stream, browser_stream_ended};
use crate::parties::n8n::reply::{n8n_refusal, read_greeting, understand_reply};
use crate::parties::n8n::{N8nReply, ToN8n, ask_n8n};
use crate::parties::twilio::stream::{
    CallerLeg, FromTwilio, TO_TWILIO_BYTES_MAX, accept_stream, await_start, media_for_the_eye,
};
use crate::parties::twilio::twiml::{
    twiml, twiml_connect_stream, twiml_say, twiml_transfer, xml_escape,
};
use crate::parties::twilio::{Form, TWILIO_WEBHOOK, is_final, is_sid, signature_is_valid};
use crate::parties::ultravox::leg::{FromAgent, Invocation, ToolResult, ping, tell_result};
use crate::parties::ultravox::{
    AGENT_AHEAD_MS, AgentCall, agent_call_for_the_eye, host_only, post_agent_call, selected_tools,
};
use crate::records::delivery::{DELIVER_WITHIN, Delivery};
use crate::records::ended_by::EndedBy;
use crate::records::event::{Direction, Event, ToolAsked};
use crate::records::exhibit::Exhibit;
use crate::records::journal::{Journal, Journals, WIRE_CHARS_MAX};
use crate::records::outbox::Outbox;
use crate::records::past::PastCall;
use crate::records::transcript::{Heard, Transcript};
use crate::setup::agent::{Agent, Tool, ToolAction, find_calendar};
use crate::setup::settings::Config;
use crate::setup::start_lines::introduce;
use crate::toolbox::dial::dial;
use crate::toolbox::failure::{Failure, Party, Secret, Stop, needs_attention};
use crate::toolbox::http::{http_agent, tls_config, trusted_roots};
use crate::toolbox::log::{Sid, complain, log, log_as, say};
use crate::toolbox::metrics::Metrics;
use crate::toolbox::random::{random_bytes, random_hex, random_number};
use crate::toolbox::socket::{Duplex, LineEnd, Received};
use crate::toolbox::sound::{
    FRAME, FRAME_BYTES, SAMPLE_BYTES, SAMPLE_RATE_HZ, mulaw_to_pcm, pcm_for_the_eye, pcm_to_mulaw,
};
use crate::toolbox::text::{cut, fill, hex, hidden, is_e164, listed, shorten, shorten_number};
use crate::toolbox::threads::{lock, spawn, spawn_for_call};
use crate::toolbox::time::millis;

mod toolbox;

mod around;
mod check;
mod demo;
mod diagram;
mod door;
#[cfg(test)]
#[path = "../tests/fuzz/feed.rs"]
mod feed;
mod outbox;
mod owner;
mod parties;
mod records;
mod setup;
#[cfg(any(test, fuzzing))]
mod testing;
#[cfg(test)]
mod tests;
mod workflow;

// ============================================================================
// 0. Before the call: facts, limits, settings, the agent, the front door
// ============================================================================
//
// In:       the command line, the environment, `.env`, the agent's files.
// Out:      a listening server; every request has found the function that answers it.
// Fails:    at start-up only, with all complaints at once and exit status 2.
// Not here: anything about a particular call.

/// Step 2 in all. Then the default greeting is used.
const LOOKUP_WITHIN: Duration = Duration::from_secs(2);

/// Step 3 in all: create and join. Then the caller hears the apology.
const AGENT_WITHIN: Duration = Duration::from_secs(10);

const _: () = assert!(
    LOOKUP_WITHIN.as_secs() + AGENT_WITHIN.as_secs() < TWILIO_WEBHOOK.as_secs(),
    "the webhook must be answered before Twilio gives up"
);

/// From the answer to Twilio's stream. Then the waiting agent is sent home and the token is void.
const STREAM_WITHIN: Duration = Duration::from_mins(1);

/// From a broken stream of Twilio's to the next one. Then the caller counts as lost.
const NEXT_STREAM_WITHIN: Duration = Duration::from_secs(15);

/// Broken agent lines that are mended in one call. At the next the caller hears the apology.
const RESUMES_MAX: u32 = 2;

/// Twilio sends 50 messages a second. After this much of nothing the line is lost.
const CALLER_SILENCE_MAX: Duration = Duration::from_secs(10);

/// Nothing from the agent for this long: we ping. Nothing for as long again: the line is lost.
const PING_AFTER: Duration = Duration::from_secs(3);

/// From the agent's goodbye to Ultravox closing its socket. Then we close it.
const AGENT_LEAVES_WITHIN: Duration = Duration::from_secs(20);

/// Added to the playing time of what the caller has yet to hear. Then the line drops.
const MARK_GRACE: Duration = Duration::from_secs(2);

/// An agent's line that breaks this near the end of `MAX_CALL_SECONDS` has reached its limit.
const LAST_SECONDS: Duration = Duration::from_secs(5);

/// Added to `MAX_CALL_SECONDS`, so that Ultravox can say its own "time is up" first.
const TOO_LONG_GRACE: Duration = Duration::from_secs(15);

/// An agent that takes over late in a call gets at least this much of it.
const LAST_WORDS_MIN: Duration = Duration::from_secs(30);

/// What a new agent is told that takes over from one whose line broke.
const LINE_BROKE: &str = "(The line was interrupted for a moment and is back. Say so briefly, \
    do not greet again, and go on exactly where the conversation was.)";

/// What it is told when a transfer came to nothing.
const NOBODY_ANSWERED: &str = "(The caller was to be put through to a person, but nobody answered. \
    Tell them so, apologise, do not greet again, and offer to help or to take a note.)";

/// A pause this long after a key ends a number being keyed in.
const KEYS_PAUSE: Duration = Duration::from_secs(1);

/// Keys kept until the pause. More are sent on in portions.
const KEYS_MAX: usize = 32;

/// Tools of one call that run on threads of their own. The next is told to wait.
const TOOLS_AT_ONCE_MAX: usize = 8;

/// Different n8n tool invocations remembered in one call, so that none is done twice. The next
/// is refused in words.
const TOOL_ANSWERS_MAX: usize = 100;

/// Different invocations answered on one agent line. More is a storm, and gets an error each.
const INVOCATIONS_MAX: usize = 500;

/// A greeting from n8n. A longer one is a mistake in the workflow, and the default is used.
const GREETING_CHARS_MAX: usize = 2_000;

/// A tool's name in a journal. Whoever invents one may invent a long one.
const TOOL_NAME_CHARS_MAX: usize = 100;

const USAGE: &str = "\
callbridge answers a phone number with a voice agent.

  callbridge              serve (settings: see .env.example)
  callbridge demo         play one whole call on this machine, no account needed
  callbridge demo --calls 100
                          play a hundred at once, and say what they cost
  callbridge check        look at the set-up: what is wrong, and what to do about it
                          (--fix sets up the Twilio number, --json is for scripts)
  callbridge outbox       list the transcripts that n8n has not taken, and why
  callbridge outbox --retry
                          offer them to n8n now
  callbridge workflow     print the n8n workflow that goes with the agent files, to import
  callbridge diagram      print the agent's stages and tools as a Mermaid diagram
  callbridge diagram --plain
                          print them as text
  callbridge --version
  callbridge --help
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        [] => serve(),
        ["check", options @ ..] => check::run(options),
        ["outbox"] => outbox::run(false),
        ["outbox", "--retry"] => outbox::run(true),
        ["workflow"] => workflow::run(),
        ["diagram"] => diagram::run(diagram::Form::Mermaid),
        ["diagram", "--plain"] => diagram::run(diagram::Form::Plain),
        ["demo", ..] => demo::run(&arguments[1..]).map_err(|flop| {
            if flop.misused { Stop::Misused(flop.text) } else { Stop::Failed(flop.text) }
        }),
        ["--help" | "-h" | "help"] | ["outbox" | "workflow" | "diagram", "--help" | "-h"] => {
            say(USAGE);
            Ok(())
        }
        ["--version" | "-V"] => {
            say(concat!("callbridge ", env!("CARGO_PKG_VERSION"), "\n"));
            Ok(())
        }
        _ => Err(Stop::Misused(format!("callbridge: what is \"{}\"?\n\n{USAGE}", words.join(" ")))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Stop::Failed(text)) => {
            complain(&text);
            ExitCode::FAILURE
        }
        Err(Stop::Misused(text)) => {
            complain(&text);
            ExitCode::from(2)
        }
    }
}

/// Everything that outlives a call. One per process, never freed.
struct Bridge {
    config: Config,
    agent: Agent,
    /// Requests to Ultravox, n8n and Twilio.
    web: ureq::Agent,
    tls: Arc<ClientConfig>,
    calls: Calls,
    lobby: Lobby,
    journals: Journals,
    outbox: Outbox,
    ringing: Ringing,
    metrics: Metrics,
    /// When this process began. A page that is open sees by it that there is another one.
    began: Timestamp,
    /// Whether Ultravox would take a call, as far as it has been asked.
    agent_is_ready: AtomicBool,
    /// No new calls any more.
    draining: AtomicBool,
    /// And the last ones are being ended.
    stopping: AtomicBool,
    /// `tiny_http`, listening on loopback.
    http: Mutex<Option<Arc<tiny_http::Server>>>,
    /// Known to nobody else: what is signed with it comes from this process.
    identity: hmac::Key,
    /// `callbridge check` listens where the server would, and takes no calls.
    stands_in: bool,
}

fn serve() -> Result<(), Stop> {
    let config = Config::load().map_err(|complaints| needs_attention("setting", &complaints))?;
    log_as(config.log_level, config.log_format);
    std::panic::set_hook(Box::new(|panic| {
        let thread = thread::current();
        log!(Error, "thread {} {panic}", thread.name().unwrap_or("without a name"));
    }));
    let mut bridge = Box::new(Bridge::new(config)?);
    let config = &mut bridge.config;
    let listener = TcpListener::bind((config.bind, config.port)).map_err(|error| {
        let (bind, port) = (config.bind, config.port);
        Stop::Failed(format!("callbridge: cannot listen on {bind}:{port}: {error}"))
    })?;
    if config.public_url == check::NGROK {
        let port = listener.local_addr().map_or(config.port, |address| address.port());
        config.public_url = check::ngrok_address(&config.ngrok_api_url, port)
            .map_err(|why| Stop::Failed(format!("callbridge: PUBLIC_URL=ngrok: {why}")))?;
    }
    // Threads of calls hold on to it until the process ends, so nobody could ever free it.
    let bridge: &'static Bridge = Box::leak(bridge);
    run(bridge, listener).map_err(|error| Stop::Failed(format!("callbridge: {error}")))
}

fn run(bridge: &'static Bridge, listener: TcpListener) -> io::Result<()> {
    let address = listener.local_addr()?;
    // Before anybody is told that we are there: a signal that nobody awaits ends the process.
    let signals = Signals::new([SIGTERM, SIGINT])?;
    start_http(bridge)?;
    introduce(bridge, address);
    keep_ready(bridge)?;
    spawn("front door".into(), move || front_door(bridge, &listener))?;
    // Thousands of journals take a while to read. Neither a caller nor a signal waits for them.
    spawn("journals".into(), move || {
        let file = |delivery: &mut Delivery| file_transcript(bridge, delivery);
        if let Err(error) = bridge.outbox.start(&bridge.journals, file) {
            log!(Error, "transcripts stay on disk until the next start: {error}");
        }
    })?;
    await_end(bridge, signals)
}

impl Bridge {
    fn new(config: Config) -> Result<Bridge, Stop> {
        let agent = Agent::load(&config)
            .map_err(|mistakes| needs_attention("agent file mistake", &mistakes))?;
        let roots = trusted_roots(config.ssl_cert_file.as_deref())
            .map_err(|complaint| needs_attention("setting", &[complaint]))?;
        Ok(Bridge::build(config, agent, &roots))
    }

    fn build(config: Config, agent: Agent, roots: &[CertificateDer<'static>]) -> Bridge {
        Bridge {
            tls: tls_config(roots),
            web: http_agent(roots),
            calls: Calls::default(),
            lobby: Lobby::default(),
            journals: Journals::new(&config.data_dir),
            outbox: Outbox::new(&config),
            ringing: Ringing::default(),
            metrics: Metrics::new(&agent),
            began: Timestamp::now(),
            agent_is_ready: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            http: Mutex::default(),
            identity: hmac::Key::new(hmac::HMAC_SHA256, &random_bytes::<32>()),
            stands_in: false,
            config,
            agent,
        }
    }
}

/// Finds the function that answers.
fn answer(bridge: &'static Bridge, mut request: tiny_http::Request) {
    let url = request.url().to_owned();
    let path = url.split('?').next().unwrap_or_default();
    let reply = match (request.method(), path) {
        (Method::Get | Method::Head, "/health") => health(bridge, &url),
        // As a proxy that finds nobody at home would say: Twilio may try again.
        _ if bridge.stands_in => Reply::text(503, "callbridge is not running, only its check"),
        (Method::Post, "/incoming-call") => from_twilio(bridge, &mut request, incoming_call),
        (Method::Post, "/stream-ended") => from_twilio(bridge, &mut request, stream_ended),
        (Method::Post, "/call-status") => from_twilio(bridge, &mut request, call_status),
        (Method::Post, "/outgoing-call") => order_from_owner(bridge, &mut request, outgoing_call),
        (Method::Post, "/browser-call") => order_from_owner(bridge, &mut request, browser_call),
        (Method::Post, _) if browser_stream(path).is_some() => {
            order_from_owner(bridge, &mut request, browser_stream_ended)
        }
        (Method::Get | Method::Head, "/") => from_owner(bridge, &request, page),
        (Method::Get | Method::Head, "/calls") => from_owner(bridge, &request, call_list),
        (Method::Get | Method::Head, _) if path.starts_with("/calls/") => {
            from_owner(bridge, &request, call_story)
        }
        (Method::Get | Method::Head, "/metrics") => from_owner(bridge, &request, metrics),
        (Method::Get | Method::Head, "/ready") => ready(bridge),
        (_, "/incoming-call" | "/stream-ended" | "/call-status") => {
            log!(Warn, "{} {path}: Twilio's webhook must be set to HTTP POST", request.method());
            bridge.metrics.refused("method");
            Reply::text(405, "use POST (in Twilio's console: \"HTTP POST\" beside the webhook)")
        }
        _ => Reply::text(404, "there is nothing here"),
    };
    let content_type = [("Content-Type", reply.content_type.to_owned())];
    let headers = content_type
        .iter()
        .chain(&reply.headers)
        .filter_map(|(name, value)| tiny_http::Header::from_bytes(*name, value.as_bytes()).ok());
    let response = tiny_http::Response::from_data(reply.body)
        .with_status_code(reply.status)
        // Told to be small enough, tiny_http would otherwise send longer answers in chunks.
        .with_chunked_threshold(usize::MAX);
    if let Err(error) = request.respond(headers.fold(response, tiny_http::Response::with_header)) {
        log!(Debug, "{path}: the answer was not taken: {error}");
    }
}

// ============================================================================
// 1. Ring: Twilio asks what to do with a call
// ============================================================================
//
// In:       `POST /incoming-call`, a form with the caller's number; its signature.
// Out:      a `Call` with a slot of its own, and the XML that steps 2 to 4 make of it.
// Fails:    403 without Twilio's signature, 400 without a call's id; all lines busy is a sentence.
// Not here: trust in the caller's number. It is text from outside: a name, a word, or nothing.

/// A call that rings, wherever it comes from.
struct IncomingCall<'a> {
    sid: &'a str,
    /// As Twilio gave it: a number, `anonymous`, `client:name`, anything.
    number: &'a str,
    direction: Direction,
    /// Asked for by whoever ordered the call. Empty: as usual.
    first_message: String,
    /// The request, for the journal.
    wire: String,
}

fn incoming_call(bridge: &'static Bridge, form: &Form) -> Reply {
    let sid = form.get("CallSid");
    if !is_sid(sid) {
        log!(Warn, "/incoming-call without a usable CallSid");
        bridge.metrics.refused("call_sid");
        return Reply::text(400, "CallSid is missing or malformed");
    }
    let ringing = bridge.ringing.take(form.get("outgoing"));
    // Of a call that we have made ourselves, the person is at the other end.
    let (direction, number) = match ringing {
        Some(_) => (Direction::Out, form.get("To")),
        None => (Direction::In, form.get("From")),
    };
    let first_message = ringing.unwrap_or_default();
    let wire = format!("POST /incoming-call\nX-Twilio-Signature: ***\n\n{}", form.for_the_eye());
    let incoming = IncomingCall { sid, number, direction, first_message, wire };
    Reply::twiml(take_call(bridge, &incoming).twiml(bridge))
}

/// Steps 1 to 4 of a new call.
fn take_call(bridge: &'static Bridge, incoming: &IncomingCall) -> Answer {
    let IncomingCall { sid, number, direction, first_message, wire } = incoming;
    let phrases = &bridge.agent.phrases;
    if bridge.draining.load(Ordering::SeqCst) {
        log!(Sid { sid }, Info, Ring, "not taken, this process is about to end");
        bridge.metrics.refused("stopping");
        return cannot_serve(bridge, &phrases.closing);
    }
    let (call, slot) = match bridge.calls.take_slot(sid, || Call::new(bridge, incoming)) {
        Slot::Yours(call, slot) => (call, slot),
        // Twilio repeats a webhook whose answer got lost. One call is one agent, so the repeat
        // waits for the first one's answer.
        Slot::Known(call) => return call.await_answer(),
        Slot::None => {
            log!(Sid { sid }, Warn, Ring, "all {} lines are busy", bridge.config.max_calls);
            bridge.metrics.refused("busy");
            return cannot_serve(bridge, &phrases.busy);
        }
    };
    // The owner, who has called for it, may call as often as there are lines.
    if *direction == Direction::In && bridge.calls.is_too_often(bridge, number) {
        log!(call, Warn, Ring, "{} calls too often", shorten_number(number));
        bridge.metrics.refused("too_often");
        return Answer::Sentence(phrases.busy.clone());
    }
    let does = if *direction == Direction::Out { "has picked up" } else { "is calling" };
    log!(call, Info, Ring, "{} {does}", shorten_number(number));
    let (call_sid, number) = (call.sid.clone(), call.number.clone());
    call.journal.note(&Event::Ring { call_sid, number, direction: *direction });
    call.show(Exhibit::Ring, || wire.clone());
    let opening = match direction {
        Direction::In | Direction::Browser => Opening::Greet(greeting(&call)),
        Direction::Out => Opening::WeCalled(ordered_greeting(&call, first_message)),
    };
    connect_to_agent(&call, slot, &opening)
}

/// Steps 3 and 4, for a new call and for one that is taken up again.
fn connect_to_agent(call: &Arc<Call>, slot: CallSlot, opening: &Opening) -> Answer {
    let ready = ready_agent(call, slot, opening);
    let rang_for = call.rang.elapsed();
    let ms = millis(rang_for);
    let answer = match &ready {
        Ok(()) => {
            if !matches!(opening, Opening::GoOn(_)) {
                call.bridge.metrics.answer_time.of(&[]).observe(rang_for);
            }
            log!(call, Info, Answer, "connecting to our Media Stream, {ms} ms after it rang"; ms);
            Answer::Stream { token: call.new_token() }
        }
        Err(failure) => {
            log!(call, Error, Agent, "{failure}");
            call.hang_up(EndedBy::NoAgent);
            cannot_serve(call.bridge, &call.bridge.agent.phrases.apology)
        }
    };
    call.journal.note(&Event::Answer { what: answer.word().into(), ms });
    call.show(Exhibit::Answer, || answer.for_the_eye(call.bridge));
    if ready.is_err() {
        after(call);
    }
    call.settle_answer(&answer);
    answer
}

/// Every request of Twilio's comes through here: a form, signed.
fn from_twilio(
    bridge: &'static Bridge,
    request: &mut tiny_http::Request,
    handle: fn(&'static Bridge, &Form) -> Reply,
) -> Reply {
    let body = match read_body(bridge, request) {
        Ok(body) => body,
        Err(reply) => return reply,
    };
    let mut form = Form::parse(&body);
    if let Some(token) = &bridge.config.twilio_auth_token {
        let signature = header(request, "X-Twilio-Signature");
        let url = format!("{}{}", bridge.config.public_url, request.url());
        if !signature_is_valid(token, &url, &form, signature) {
            log!(
                Warn,
                "{url}: Twilio's signature is {}: check TWILIO_AUTH_TOKEN, and that PUBLIC_URL is \
                 the address Twilio calls",
                if signature.is_empty() { "missing" } else { "wrong" }
            );
            bridge.metrics.refused("signature");
            return Reply::text(403, "the signature is missing or wrong");
        }
    }
    // What we have put into the address ourselves comes behind what Twilio says.
    let query = request.url().split_once('?').map(|(_, query)| query).unwrap_or_default();
    form.0.extend(Form::parse(query.as_bytes()).0);
    handle(bridge, &form)
}

/// One call, from ring to transcript. Its two threads and its tools share it.
struct Call {
    bridge: &'static Bridge,
    sid: String,
    number: String,
    direction: Direction,
    rang: Instant,
    /// The same moment, by the calendar.
    began: Timestamp,
    state: Mutex<CallState>,
    changed: Condvar,
    transcript: Mutex<Transcript>,
    journal: Journal,
    /// A bit for each [`Exhibit`] that the journal has.
    shown: AtomicU64,
    /// When the caller was last loud enough to be speaking, in milliseconds after `rang`.
    loud_at_ms: AtomicU64,
    /// Answers of n8n tools by a hash of what was asked, so that asking twice does not book twice.
    tool_answers: Mutex<HashMap<String, Arc<Mutex<Option<String>>>>>,
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
    /// Missing while it is being created, and while a broken line is being mended.
    agent: Option<Arc<Duplex>>,
    /// Ultravox's id of the latest agent, to go on from.
    agent_id: String,
    /// How many agents there have been. Their transcripts count from 0 each.
    agents: u64,
    /// When the latest agent's time is up, and some more.
    ends_by: Option<Instant>,
    caller: Option<Arc<CallerLeg>>,
    stage: String,
    /// Since its first stream opened, until the agent's first sound.
    silent_since: Option<Instant>,
    /// The mark that came back last.
    mark: String,
    hang_up: Option<EndedBy>,
    /// Twilio has said `stop` before we have closed the stream: there is no caller any more.
    stopped: bool,
    /// We have closed the stream, or are about to.
    said_goodbye: bool,
}

impl CallState {
    /// Missing until it has ended. Of a caller who has left, nobody is there to be put through.
    fn how_it_ended(&self) -> Option<EndedBy> {
        match self.hang_up {
            Some(EndedBy::Transferred) if self.stopped => Some(EndedBy::CallerLeft),
            how => how,
        }
    }
}

impl Call {
    fn new(bridge: &'static Bridge, incoming: &IncomingCall) -> Call {
        let state = CallState { stage: bridge.agent.first_stage.clone(), ..CallState::default() };
        Call {
            bridge,
            sid: incoming.sid.to_owned(),
            number: incoming.number.to_owned(),
            direction: incoming.direction,
            rang: Instant::now(),
            began: Timestamp::now(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            transcript: Mutex::default(),
            journal: bridge.journals.begin(incoming.sid),
            shown: AtomicU64::new(0),
            loud_at_ms: AtomicU64::new(0),
            tool_answers: Mutex::default(),
            tools_running: AtomicUsize::new(0),
        }
    }

    /// The same call, from what a process that is gone (or a transfer that failed) has left of it.
    fn from_journal(bridge: &'static Bridge, journal: Journal, past: PastCall) -> Call {
        let incoming = IncomingCall {
            sid: &past.sid,
            number: &past.number,
            direction: past.direction,
            first_message: String::new(),
            wire: String::new(),
        };
        let mut call = Call::new(bridge, &incoming);
        call.began = past.began.unwrap_or(call.began);
        {
            let mut state = lock(&call.state);
            if bridge.agent.stages.contains_key(&past.stage) {
                state.stage = past.stage;
            }
            state.agent_id = past.agent_id;
            state.agents = past.agents;
        }
        call.rang = Instant::now().checked_sub(past.age).unwrap_or(call.rang);
        call.transcript = Mutex::new(past.transcript);
        call.journal = journal;
        call
    }

    /// The one way down. The first reason counts; the agent's socket is closed at once, so that
    /// nobody is listened to, or billed, after the end.
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
            agent.close(CloseCode::Normal, "the call is over");
        }
        self.changed.notify_all();
    }

    fn is_over(&self) -> bool {
        lock(&self.state).hang_up.is_some()
    }

    /// A token for the next stream. An older one that was never shown is void from now on.
    fn new_token(&self) -> String {
        let token = random_hex();
        let mut state = lock(&self.state);
        state.streams += 1;
        if state.hang_up.is_none() {
            state.token = Some((token.clone(), Instant::now() + STREAM_WITHIN));
        }
        token
    }

    fn caller(&self) -> Option<Arc<CallerLeg>> {
        lock(&self.state).caller.clone()
    }

    /// Thread T sees to it that this ends: with a new stream, or with the call.
    fn await_stream(&self) -> Option<Arc<CallerLeg>> {
        let state = lock(&self.state);
        let waiting = |state: &mut CallState| state.caller.is_none() && state.hang_up.is_none();
        let waited = self.changed.wait_timeout_while(state, 2 * NEXT_STREAM_WITHIN, waiting);
        waited.unwrap_or_else(PoisonError::into_inner).0.caller.clone()
    }

    fn agent(&self) -> Option<Arc<Duplex>> {
        lock(&self.state).agent.clone()
    }

    fn default_greeting(&self) -> String {
        fill(&self.bridge.agent.first_message, |name| self.placeholder(name))
    }

    fn settle_answer(&self, answer: &Answer) {
        lock(&self.state).answer = Some(answer.clone());
        self.changed.notify_all();
    }

    fn await_answer(&self) -> Answer {
        let state = lock(&self.state);
        let waited =
            self.changed.wait_timeout_while(state, AGENT_WITHIN, |state| state.answer.is_none());
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let answer = state.answer.clone();
        answer.unwrap_or_else(|| cannot_serve(self.bridge, &self.bridge.agent.phrases.apology))
    }

    /// What a placeholder stands for in this call's texts.
    fn placeholder(&self, name: &str) -> Option<String> {
        let agent = &self.bridge.agent;
        match name {
            "agent_name" => {
                let stage = lock(&self.state).stage.clone();
                let own = agent.stages.get(&stage).and_then(|stage| stage.agent_name.clone());
                Some(own.unwrap_or_else(|| agent.name.clone()))
            }
            "company_name" => Some(agent.company.clone()),
            "now" => Some(jiff::Zoned::now().strftime("%A, %-d %B %Y, %H:%M (%Z)").to_string()),
            // A caller's "number" may be any text; what is not a number must not talk to the model.
            "caller_number" if is_e164(&self.number) => Some(self.number.clone()),
            "caller_number" => Some("withheld".into()),
            _ => None,
        }
    }
}

// ============================================================================
// 2. Greeting: n8n is asked who is calling
// ============================================================================
//
// In:       the caller's number.
// Out:      the agent's first sentence, word for word.
// Fails:    never. Whatever n8n answers, or does not, the default greeting is there after 2 s,
//           and one line in the log says what came back and what to do about it.
// Not here: waiting on the caller's time. The phone still rings.

fn greeting(call: &Call) -> String {
    if call.bridge.config.n8n_webhook_url.is_none() {
        log!(call, Info, Greeting, "the default greeting (no n8n)");
        note_greeting(call, "default", 0, "N8N_WEBHOOK_URL is not set");
        return call.default_greeting();
    }
    let began = Instant::now();
    let found = ask_for_greeting(call);
    let ms = millis(began.elapsed());
    match found {
        Ok(None) => {
            log!(call, Info, Greeting, "n8n leaves the greeting to the agent (firstMessage: null)");
            note_greeting(call, "default", ms, "n8n leaves it to the agent");
            call.default_greeting()
        }
        Ok(Some(text)) => {
            log!(call, Info, Greeting, "n8n answered after {ms} ms"; ms);
            note_greeting(call, "n8n", ms, "");
            text
        }
        Err(failure) => {
            log!(call, Warn, Greeting, "{failure}; the default greeting is used");
            note_greeting(call, "default", ms, &failure.to_string());
            call.default_greeting()
        }
    }
}

/// Of a call that goes out, whoever ordered it may have said what to open with.
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

fn ask_for_greeting(call: &Call) -> Result<Option<String>, Failure> {
    let question = ToN8n {
        sid: &call.sid,
        number: &call.number,
        route: "1",
        data: "empty",
        key: format!("{}-1", call.sid),
        ended_by: None,
    };
    call.show(Exhibit::Lookup, || question.for_the_eye());
    let understand = |reply: &N8nReply| {
        call.show(Exhibit::LookedUp, || reply.for_the_eye());
        read_greeting(reply)
    };
    let text = ask_n8n(call.bridge, &question, LOOKUP_WITHIN, understand)?;
    if text.as_ref().is_some_and(|text| text.chars().count() > GREETING_CHARS_MAX) {
        let what = format!("a greeting of more than {GREETING_CHARS_MAX} characters");
        return Err(Failure::new(Party::N8n, what));
    }
    Ok(text)
}

// ============================================================================
// 3. Agent: an Ultravox call is created, and joined at once
// ============================================================================
//
// In:       the greeting, and the first stage of the agent's files.
// Out:      a joined agent: thread U runs, holds its socket, and feeds it silence.
// Fails:    when Ultravox refuses or is not there in time. Busy (429, 503) is tried once more.
// Not here: the caller. Nobody has picked up yet.

/// Creates the agent's call, joins it, and gives it to thread U, which owns the slot from here: it
/// is the one that sees the call to its end.
fn ready_agent(call: &Arc<Call>, slot: CallSlot, opening: &Opening) -> Result<(), Failure> {
    let began = Instant::now();
    let created = create_agent_call(call, opening, began + AGENT_WITHIN)?;
    let short_id = created.id.chars().take(4).collect::<String>();
    let agent = Arc::new(join_in_time(call, created.join_url, began + AGENT_WITHIN)?);
    lock(&call.state).agent = Some(Arc::clone(&agent));
    let (the_call, the_agent) = (Arc::clone(call), Arc::clone(&agent));
    spawn_for_call(format!("{} agent", shorten(&call.sid)), move || {
        agent_thread(&the_call, slot, the_agent);
    })
    .map_err(|error| {
        agent.close(CloseCode::Normal, "nobody can take this call");
        agent.shut();
        Failure::new(Party::Ultravox, "no thread for the agent").caused_by(error)
    })?;
    let ms = began.elapsed().as_millis();
    log!(call, Info, Agent, "Ultravox call {short_id} ready after {ms} ms"; ms);
    Ok(())
}

/// On a thread of its own, which ends with it: a name may take any time to be resolved, and what a
/// TLS handshake takes of stack and memory is not to stay with the call.
fn join_in_time(call: &Call, join_url: Secret, deadline: Instant) -> Result<Duplex, Failure> {
    let (joined, has_joined) = mpsc::sync_channel(0);
    let tls = Arc::clone(&call.bridge.tls);
    spawn(format!("{} join", shorten(&call.sid)), move || {
        if let Err(mpsc::SendError(Ok(agent))) = joined.send(dial(&join_url, &tls)) {
            // The webhook has stopped waiting and said so to the caller.
            agent.close(CloseCode::Normal, "nobody waits for this call");
            agent.shut();
        }
    })
    .map_err(|error| Failure::new(Party::Ultravox, "no thread to join on").caused_by(error))?;
    let left = deadline.saturating_duration_since(Instant::now());
    has_joined.recv_timeout(left).unwrap_or_else(|_| {
        let within = AGENT_WITHIN.as_secs();
        Err(Failure::new(Party::Ultravox, format!("the agent was not ready within {within} s")))
    })
}

/// How the agent begins.
enum Opening {
    /// Word for word, and not to be cut off by the caller's first "hello?".
    Greet(String),
    /// We have rung a person: they speak first. If they do not, these words are said.
    WeCalled(String),
    /// Not a beginning: an agent before has said hello, and this one is told what has happened.
    GoOn(&'static str),
}

/// An agent that goes on gets the conversation so far: Ultravox's own record of it if it can
/// (`priorCallId`), else ours.
fn create_agent_call(
    call: &Call,
    opening: &Opening,
    deadline: Instant,
) -> Result<AgentCall, Failure> {
    let mut body = agent_call_body(call, opening);
    let prior = lock(&call.state).agent_id.clone();
    let created = if prior.is_empty() || !matches!(opening, Opening::GoOn(_)) {
        post_agent_call(call, "", &body, deadline)?
    } else {
        match post_agent_call(call, &format!("?priorCallId={prior}"), &body, deadline) {
            Err(failure) if failure.refused => {
                log!(call, Warn, Agent, "{failure}; going on from our own transcript");
                body["initialMessages"] = lock(&call.transcript).as_messages();
                post_agent_call(call, "", &body, deadline)?
            }
            other => other?,
        }
    };
    let mut state = lock(&call.state);
    state.agent_id.clone_from(&created.id);
    // What a journal says is only text.
    state.agents = state.agents.saturating_add(1);
    state.ends_by = Some(Instant::now() + max_duration(call, opening) + TOO_LONG_GRACE);
    let number = state.agents;
    drop(state);
    call.journal.note(&Event::Agent { call_id: created.id.clone(), agent: number });
    call.show(Exhibit::Create, || agent_call_for_the_eye(&body));
    call.show(Exhibit::Created, || {
        let join_url = host_only(created.join_url.reveal());
        format!("201\n\n{}", json!({"callId": created.id, "joinUrl": join_url}))
    });
    Ok(created)
}

/// The body of `POST /api/calls`.
fn agent_call_body(call: &Call, opening: &Opening) -> Value {
    let config = &call.bridge.config;
    let phrases = &call.bridge.agent.phrases;
    let stage = lock(&call.state).stage.clone();
    let mut body = stage_body(call, &stage);
    let first_speaker = match opening {
        Opening::Greet(text) => json!({"agent": {"text": text, "uninterruptible": true}}),
        Opening::GoOn(prompt) => json!({"agent": {"prompt": prompt}}),
        Opening::WeCalled(text) => {
            let prompt = body["systemPrompt"].as_str().unwrap_or_default();
            body["systemPrompt"] = json!(format!(
                "{prompt}\n\nYou have called this person. When they answer, open with: {text}"
            ));
            json!({"user": {"fallback": {"delay": "2s", "text": text}}})
        }
    };
    let rest = json!({
        "model": config.ultravox_model,
        "languageHint": call.bridge.agent.language,
        "firstSpeakerSettings": first_speaker,
        "medium": {"serverWebSocket": {
            "inputSampleRate": SAMPLE_RATE_HZ,
            "outputSampleRate": SAMPLE_RATE_HZ,
            "clientBufferSizeMs": AGENT_AHEAD_MS,
            // If this process dies, the agent does not wait for us at the owner's expense.
            "mediaIdleTimeout": "30s",
        }},
        "joinTimeout": "15s",
        "maxDuration": format!("{}s", max_duration(call, opening).as_secs()),
        "timeExceededMessage": phrases.time_is_up,
        // Without these, a caller who put the phone down beside the cradle is billed to the end.
        "inactivityMessages": [
            {"duration": "30s", "message": phrases.still_there},
            {
                "duration": "15s",
                "message": phrases.silence_goodbye,
                "endBehavior": "END_BEHAVIOR_HANG_UP_SOFT",
            },
        ],
        // The default of 90 ms lets a breath or a crackle cut the agent off.
        "vadSettings": {"minimumInterruptionDuration": "0.384s"},
        "metadata": {"callSid": call.sid},
    });
    if let (Value::Object(body), Value::Object(rest)) = (&mut body, rest) {
        body.extend(rest);
    }
    body
}

fn max_duration(call: &Call, opening: &Opening) -> Duration {
    let max_call = call.bridge.config.max_call;
    match opening {
        Opening::Greet(_) | Opening::WeCalled(_) => max_call,
        Opening::GoOn(_) => max_call.saturating_sub(call.rang.elapsed()).max(LAST_WORDS_MIN),
    }
}

/// The part of the body that a change of stage sends again: prompt, voice **and** tools, because
/// Ultravox keeps whatever is left out.
fn stage_body(call: &Call, stage_name: &str) -> Value {
    let Some(stage) = call.bridge.agent.stages.get(stage_name) else {
        return json!({});
    };
    json!({
        "systemPrompt": fill(&stage.prompt, |name| call.placeholder(name)),
        "voice": stage.voice,
        "selectedTools": selected_tools(call.bridge, stage),
    })
}

/// Thread U: keeps the agent company until the caller is there, relays its voice, says goodbye,
/// files the transcript. Steps 4 to 9 of one call, in one function.
fn agent_thread(call: &Arc<Call>, slot: CallSlot, agent: Arc<Duplex>) {
    let why = converse(call, agent);
    say_goodbye(call, why);
    after(call);
    // Not before: a process that drains leaves when no slot is taken and the outbox is empty.
    drop(slot);
}

/// Steps 5 to 7 on thread U. A broken line to the agent is mended, twice at most: the caller stays,
/// and a new agent goes on where the old one was. Never two at once.
fn converse(call: &Arc<Call>, mut agent: Arc<Duplex>) -> EndedBy {
    let mut resumes = 0;
    'conversation: loop {
        if !await_caller(call, STREAM_WITHIN) && !call.is_over() {
            agent.close(CloseCode::Normal, "nobody came");
            return EndedBy::NeverStreamed;
        }
        // Also if it is over already: what the agent has said by then belongs to the transcript.
        let why = relay_agent_to_caller(call, &agent);
        if why != EndedBy::AgentLost {
            // A cut without a goodbye would be a fault of the line in Ultravox's eyes.
            agent.close(CloseCode::Normal, "the call is over");
        }
        agent.shut();
        while why == EndedBy::AgentLost && !call.is_over() && resumes < RESUMES_MAX {
            resumes += 1;
            match resume_agent(call) {
                Ok(next) => {
                    agent = next;
                    continue 'conversation;
                }
                Err(failure) => log!(call, Error, Agent, "no new agent: {failure}"),
            }
        }
        return why;
    }
}

/// Meanwhile thread T finds no agent, and lets the caller hear a tone.
fn resume_agent(call: &Arc<Call>) -> Result<Arc<Duplex>, Failure> {
    let began = Instant::now();
    lock(&call.state).agent = None;
    log!(call, Warn, Agent, "the agent's line broke; a new one goes on from here");
    let opening = Opening::GoOn(LINE_BROKE);
    let created = create_agent_call(call, &opening, began + AGENT_WITHIN)?;
    let agent = Arc::new(join_in_time(call, created.join_url, began + AGENT_WITHIN)?);
    let mut state = lock(&call.state);
    if state.hang_up.is_some() {
        drop(state);
        agent.close(CloseCode::Normal, "the call is over");
        return Err(Failure::new(Party::Ultravox, "the caller has left meanwhile"));
    }
    state.agent = Some(Arc::clone(&agent));
    drop(state);
    call.bridge.metrics.resumes.of(&["agent_line"]).add();
    let ms = began.elapsed().as_millis();
    log!(call, Info, Agent, "a new agent is there after {ms} ms"; ms);
    Ok(agent)
}

/// Feeds the agent silence, a frame every 20 ms, until there is a stream: it wants unbroken sound.
/// What it says meanwhile waits in the kernel's buffer for the socket. A line to the agent that
/// breaks now is found broken when it is read. False: nobody came, or the call is over.
fn await_caller(call: &Call, within: Duration) -> bool {
    let silence = Bytes::from_static(&[0; FRAME_BYTES]);
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
            && let Err(error) = agent.send(Message::Binary(silence.clone()))
        {
            if !is_broken {
                log!(call, Warn, Stream, "the agent takes no sound: {error}");
            }
            is_broken = true;
        }
        next += FRAME;
        state = lock(&call.state);
        let until_next = next.saturating_duration_since(Instant::now());
        let waited = call.changed.wait_timeout_while(state, until_next, |state| {
            state.caller.is_none() && state.hang_up.is_none()
        });
        state = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

// ============================================================================
// 4. Answer: TwiML tells Twilio to open a Media Stream
// ============================================================================
//
// In:       a joined agent, and the call's one-time token.
// Out:      a few lines of XML. Step 5 finds the waiting call by the token in it.
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
    /// Ring this number; `/stream-ended` is to hear how that went.
    Transfer(String),
    /// Say this, then hang up.
    Sentence(String),
    HangUp,
}

impl Answer {
    fn twiml(&self, bridge: &Bridge) -> String {
        match self {
            Answer::Stream { token } => twiml_connect_stream(&bridge.config.public_url, token),
            Answer::Person(number) => {
                let say = twiml_say(bridge, &bridge.agent.phrases.putting_through);
                twiml(&format!("{say}<Dial>{}</Dial>", xml_escape(number)))
            }
            Answer::Transfer(number) => twiml_transfer(bridge, number),
            Answer::Sentence(sentence) => {
                twiml(&format!("{}<Hangup/>", twiml_say(bridge, sentence)))
            }
            Answer::HangUp => twiml("<Hangup/>"),
        }
    }

    fn for_the_eye(&self, bridge: &Bridge) -> String {
        match self {
            Answer::Stream { .. } => Answer::Stream { token: "***".into() }.twiml(bridge),
            Answer::Person(_) | Answer::Transfer(_) | Answer::Sentence(_) | Answer::HangUp => {
                self.twiml(bridge)
            }
        }
    }

    /// For the journal.
    fn word(&self) -> &'static str {
        match self {
            Answer::Stream { .. } => "stream",
            Answer::Person(_) | Answer::Transfer(_) => "transfer",
            Answer::Sentence(_) => "apology",
            Answer::HangUp => "hangup",
        }
    }
}

/// A person if there is one, else a sentence and the end.
fn cannot_serve(bridge: &Bridge, sentence: &str) -> Answer {
    match &bridge.config.fallback_number {
        Some(number) => Answer::Person(number.clone()),
        None => Answer::Sentence(sentence.to_owned()),
    }
}

// ============================================================================
// 5. Stream: Twilio opens the Media Stream
// ============================================================================
//
// In:       `GET /media-stream` from the front door; then `connected` and `start`.
// Out:      the caller's leg, in the hands of the call that waits for exactly this token.
// Fails:    with close code 1008 for everyone who has no token; nothing is created for them.
// Not here: a second chance. A token opens one stream.

/// Thread T: the connection's own thread. Finds its call, then relays the caller's voice.
fn media_stream(bridge: &'static Bridge, visit: &Visit, head: Vec<u8>) {
    let line = match accept_stream(bridge, &visit.socket, head) {
        Ok(line) => line,
        Err(why) => {
            return log!(Warn, "/media-stream was refused: {why}");
        }
    };
    let refuse = |reason: &str, why: &str| {
        bridge.metrics.refused(reason);
        log!(Warn, "a media stream was closed: {why}");
        line.close(CloseCode::Policy, why);
        line.await_close();
    };
    let (start, wire) = match await_start(&line) {
        Ok(Some(start)) => start,
        Ok(None) => return log!(Info, "a media stream said goodbye before its start"),
        Err(why) => return refuse("no_start", &why),
    };
    if start.media_format.encoding != "audio/x-mulaw"
        || start.media_format.sample_rate != SAMPLE_RATE_HZ
    {
        return refuse("media_format", "its sound is not mu-law at 8000 Hz");
    }
    // Anything may stand in `callSid`; it finds a call or it does not.
    let token = start.custom_parameters.get("token").map(String::as_str).unwrap_or_default();
    let Some(call) = bridge.calls.find(&start.call_sid).filter(|call| call.take_token(token))
    else {
        return refuse("stream_token", "it has no valid token");
    };
    visit.is_decided();
    let caller = Arc::new(CallerLeg::new(line, start.stream_sid));
    call.journal.note(&Event::Stream { stream_sid: caller.stream_sid.clone() });
    call.show(Exhibit::Start, || hidden(&wire, "/start/customParameters/token"));
    if !call.has_stream(&caller) {
        caller.socket.close(CloseCode::Normal, "the call is over");
        return caller.socket.await_close();
    }
    let ms = call.rang.elapsed().as_millis();
    log!(call, Info, Stream, "the Media Stream is open, {ms} ms after it rang"; ms);

    let end = relay_caller_to_agent(&call, &caller);
    let was_the_latest = call.forget_stream(&caller);
    match end {
        _ if call.is_over() || !was_the_latest => {}
        StreamEnd::Stopped => call.hang_up(EndedBy::CallerLeft),
        StreamEnd::Broken(why) => {
            bridge.metrics.broken_lines.of(&["caller"]).add();
            log!(call, Warn, Stream, "the stream ended without a stop ({why}); another may come");
            caller.socket.close(CloseCode::Protocol, &why);
            caller.socket.shut();
            if !await_caller(&call, NEXT_STREAM_WITHIN) {
                call.hang_up(EndedBy::CallerLost);
            }
        }
    }
    caller.socket.close(CloseCode::Normal, "the call is over");
    caller.socket.await_close();
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
// Out:      the same sound on the other side, in order, at once; a word on why it stopped.
// Fails:    when a leg breaks or falls silent. The other leg is then ended in an orderly way.
// Not here: a clock. The caller's frames come fifty times a second, and are the only clock there
//           is: a key's pause and the longest call are looked at when a frame comes in.

/// How a stream ended.
enum StreamEnd {
    /// Twilio said `stop`: the caller has left, or was taken elsewhere.
    Stopped,
    /// Without `stop`. Twilio may ask `/stream-ended` and open another one.
    Broken(String),
}

fn relay_caller_to_agent(call: &Arc<Call>, caller: &CallerLeg) -> StreamEnd {
    let broken = |why: &str| StreamEnd::Broken(why.to_owned());
    let mut mulaw = Vec::new();
    let mut keys = Keys::default();
    let mut tone = Tone::default();
    let relayed = call.bridge.metrics.relayed("to_agent");
    loop {
        let (text, arrived) = match caller.socket.read(CALLER_SILENCE_MAX) {
            Ok((Received::Text(text), arrived)) => (text, arrived),
            Ok((Received::Binary(_), _)) => return broken("a binary message"),
            Err(end) => return broken(&end.to_string()),
        };
        match FromTwilio::parse(&text, &caller.stream_sid) {
            Ok(FromTwilio::Media(payload)) => {
                mulaw.clear();
                if BASE64.decode_vec(payload.as_bytes(), &mut mulaw).is_err() {
                    return broken("a payload that is not base64");
                }
                if let Some(agent) = call.agent() {
                    relayed.note(hand_to_agent(call, &agent, &mulaw), arrived);
                } else {
                    relayed.note(false, arrived);
                    tone.play(call, caller);
                }
                call.hears(&mulaw);
                call.show(Exhibit::CallerFrame, || media_for_the_eye(&text));
            }
            Ok(FromTwilio::Dtmf(digit)) => {
                keys.press(call, &digit);
                // What is keyed in may be a secret of the caller's.
                call.show(Exhibit::Key, || hidden(&text, "/dtmf/digit"));
            }
            Ok(FromTwilio::Mark(name)) => {
                lock(&call.state).mark = name;
                call.changed.notify_all();
                call.show(Exhibit::MarkBack, || text.to_string());
            }
            Ok(FromTwilio::Stop) => {
                call.show(Exhibit::Stop, || text.to_string());
                let mut state = lock(&call.state);
                state.stopped = !state.said_goodbye;
                return StreamEnd::Stopped;
            }
            Ok(FromTwilio::Unknown(event)) => {
                log!(call, Debug, Talk, "Twilio sent \"{event}\", which is new to us");
            }
            Ok(FromTwilio::Connected | FromTwilio::Start(_)) => return broken("a second start"),
            Err(why) => return broken(&why),
        }
        keys.send_after_pause(call);
        if lock(&call.state).ends_by.is_some_and(|ends_by| Instant::now() > ends_by) {
            call.hang_up(EndedBy::TooLong);
        }
    }
}

/// Every frame goes on, the silent ones too: Ultravox hears time by them.
/// Simplification: if Twilio stalls, the gap is not filled with silence.
///
/// False: it was lost.
fn hand_to_agent(call: &Call, agent: &Duplex, mulaw: &[u8]) -> bool {
    if mulaw.is_empty() {
        return true;
    }
    let mut pcm = Vec::with_capacity(mulaw.len() * SAMPLE_BYTES);
    for &code in mulaw {
        pcm.extend_from_slice(&mulaw_to_pcm(code).to_le_bytes());
    }
    let shown = (!call.has_shown(Exhibit::CallerPcm)).then(|| pcm_for_the_eye(&pcm));
    if let Err(end) = agent.send(Message::Binary(pcm.into())) {
        // Thread U reads from this line; it decides what its end means for the call.
        log!(call, Debug, Talk, "a frame did not reach the agent: {end}");
        return false;
    }
    if let Some(shown) = shown {
        call.show(Exhibit::CallerPcm, || shown);
    }
    true
}

/// What the caller hears while there is no agent: 160 ms of a soft 400 Hz every two seconds. "The
/// line lives", it says, and no more. A frame for each of theirs, so it needs no clock.
#[derive(Default)]
struct Tone {
    frames: usize,
}

impl Tone {
    const SOUNDING_FRAMES: usize = 8;
    const PERIOD_FRAMES: usize = 100;
    /// About -24 dB of full scale.
    const AMPLITUDE: f32 = 2_000.0;
    const PITCH_HZ: f32 = 400.0;

    fn play(&mut self, call: &Call, caller: &CallerLeg) {
        // What the agent said before still plays, or the call is over and its last word does.
        let busy = *lock(&caller.plays_until) > Instant::now() + 2 * FRAME;
        if busy || call.is_over() {
            return;
        }
        let sounding = self.frames % Tone::PERIOD_FRAMES < Tone::SOUNDING_FRAMES;
        self.frames += 1;
        if sounding {
            caller.play(call, &TONE_FRAME);
        }
    }
}

static TONE_FRAME: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let per_sample = std::f32::consts::TAU * Tone::PITCH_HZ / 8_000.0;
    let sample = |index: u16| (f32::from(index) * per_sample).sin() * Tone::AMPLITUDE;
    #[expect(clippy::cast_possible_truncation, reason = "2000 fits into 16 bits")]
    let samples = (0..160).map(|index| pcm_to_mulaw(sample(index) as i16));
    samples.collect()
});

/// Until the agent is gone, or the call is over. Returns why.
fn relay_agent_to_caller(call: &Arc<Call>, agent: &Arc<Duplex>) -> EndedBy {
    let mut voice = Voice::default();
    let mut act = Act::new(call, agent);
    let relayed = call.bridge.metrics.relayed("to_caller");
    let mut quiet = 0;
    loop {
        let received = agent.read(PING_AFTER);
        if act.leaving.is_some_and(|(_, since)| since.elapsed() > AGENT_LEAVES_WITHIN) {
            return act.reason();
        }
        let (message, arrived) = match received {
            Ok(message) => message,
            Err(LineEnd::Quiet) if call.is_over() => return EndedBy::CallerLeft,
            Err(LineEnd::Quiet) if quiet == 0 => {
                quiet += 1;
                ping(agent);
                continue;
            }
            Err(LineEnd::Closed(_)) => return act.reason(),
            Err(end @ (LineEnd::Quiet | LineEnd::Broken(_) | LineEnd::Nonsense(_))) => {
                // At its time limit Ultravox cuts the line, and after a goodbye it may do so too.
                let time_is_up = call.rang.elapsed() + LAST_SECONDS > call.bridge.config.max_call;
                if call.is_over() || act.leaving.is_some() || time_is_up {
                    return act.reason();
                }
                log!(call, Error, Talk, "Ultravox: {end}");
                call.bridge.metrics.broken_lines.of(&["agent"]).add();
                return EndedBy::AgentLost;
            }
        };
        quiet = 0;
        let text = match message {
            Received::Binary(pcm) => {
                relayed.note(voice.pass_on(call, &pcm), arrived);
                call.show(Exhibit::AgentPcm, || pcm_for_the_eye(&pcm));
                continue;
            }
            Received::Text(text) => text,
        };
        match FromAgent::parse(&text) {
            Ok(FromAgent::Transcript(heard)) => {
                note_transcript(call, &heard);
                call.show(Exhibit::Transcript, || text.to_string());
            }
            Ok(FromAgent::Invocation(invocation)) => {
                call.show(Exhibit::Invocation, || text.to_string());
                act.run(invocation);
            }
            Ok(FromAgent::ClearBuffer) => {
                clear(call);
                call.show(Exhibit::ClearBuffer, || text.to_string());
            }
            Ok(FromAgent::State(state)) => {
                log!(call, Debug, Talk, "the agent is {state}");
                call.show(Exhibit::State, || text.to_string());
            }
            Ok(FromAgent::Other(kind)) => {
                log!(call, Debug, Talk, "the agent sent \"{kind}\"");
            }
            Err(why) => log!(call, Warn, Talk, "Ultravox sent what cannot be read: {why}"),
        }
    }
}

/// The agent's voice on its way to the caller.
#[derive(Default)]
struct Voice {
    /// Half a sample, if a message ever ended in the middle of one.
    odd_byte: Option<u8>,
    spoke: bool,
}

impl Voice {
    /// At once, however much it is: Twilio keeps it and keeps the time.
    ///
    /// Between two streams it waits for the next one, and the agent's voice with it. False: it
    /// was lost.
    fn pass_on(&mut self, call: &Call, pcm: &[u8]) -> bool {
        let Some(caller) = call.await_stream() else { return false };
        let mut mulaw = Vec::with_capacity(pcm.len() / SAMPLE_BYTES + 1);
        let mut rest = pcm;
        if let (Some(low), Some((&high, after))) = (self.odd_byte, pcm.split_first()) {
            mulaw.push(pcm_to_mulaw(i16::from_le_bytes([low, high])));
            self.odd_byte = None;
            rest = after;
        }
        let samples = rest.chunks_exact(SAMPLE_BYTES);
        if let Some(&byte) = samples.remainder().first() {
            self.odd_byte = Some(byte);
        }
        mulaw
            .extend(samples.map(|sample| pcm_to_mulaw(i16::from_le_bytes([sample[0], sample[1]]))));
        let mut heard = true;
        for second in mulaw.chunks(TO_TWILIO_BYTES_MAX) {
            heard &= caller.play(call, second);
        }
        if !self.spoke && !mulaw.is_empty() {
            self.spoke = true;
            if !call.has_shown(Exhibit::AgentFrame) {
                call.journal.note(&Event::FirstWord { ms: millis(caller.since.elapsed()) });
            }
            call.show(Exhibit::AgentFrame, || {
                let payload = cut(&BASE64.encode(&mulaw), 24);
                let media = json!({"payload": payload});
                json!({"event": "media", "streamSid": caller.stream_sid, "media": media})
                    .to_string()
            });
            if let Some(silent_since) = lock(&call.state).silent_since.take() {
                call.bridge.metrics.dead_air.of(&[]).observe(silent_since.elapsed());
            }
            let ms = call.rang.elapsed().as_millis();
            log!(call, Info, Talk, "the agent's first sound, {ms} ms after it rang"; ms);
        }
        heard
    }
}

/// Twilio still holds seconds of the agent's voice. Without this, the caller is talked over by a
/// sentence that the agent has already given up.
fn clear(call: &Call) {
    let Some(caller) = call.caller() else { return };
    let unheard = lock(&caller.plays_until).saturating_duration_since(Instant::now());
    caller.clear(call);
    let ms = unheard.as_millis();
    log!(call, Info, Talk, "barge-in: {ms} ms of the agent's voice were not played"; ms);
}

/// Keys the caller presses, gathered until a pause: the agent is to read a number, not digits.
#[derive(Default)]
struct Keys {
    pressed: String,
    last: Option<Instant>,
}

impl Keys {
    fn press(&mut self, call: &Call, digit: &str) {
        let keys = digit.chars().take(KEYS_MAX);
        if self.pressed.len() + digit.len() > KEYS_MAX {
            self.send(call);
        }
        self.pressed.extend(keys.filter(|key| key.is_ascii_digit() || "*#".contains(*key)));
        self.last = Some(Instant::now());
    }

    fn send_after_pause(&mut self, call: &Call) {
        if self.last.is_some_and(|last| last.elapsed() >= KEYS_PAUSE) {
            self.send(call);
        }
    }

    fn send(&mut self, call: &Call) {
        self.last = None;
        if self.pressed.is_empty() {
            return;
        }
        let text = std::mem::take(&mut self.pressed);
        log!(call, Info, Talk, "{} keys were pressed", text.len());
        let message = json!({"type": "user_text_message", "text": text, "urgency": "immediate"});
        if let Some(agent) = call.agent()
            && let Err(end) = agent.send(Message::text(message.to_string()))
        {
            log!(call, Warn, Talk, "the keys did not reach the agent: {end}");
        }
        call.show(Exhibit::Keys, || hidden(&message.to_string(), "/text"));
    }
}

// ============================================================================
// 7. Act: the agent invokes tools
// ============================================================================
//
// In:       an invocation by the agent: a tool's name, an id, parameters.
// Out:      exactly one `client_tool_result` for that id.
// Fails:    in words that the agent can say. A tool's failure never ends a call.
// Not here: waiting on thread U. A slow n8n has a thread of its own, and the sound flows on.

/// An invocation that is being seen to.
struct Errand {
    call: Arc<Call>,
    agent: Arc<Duplex>,
    invocation: Invocation,
    /// In which the agent was when it asked.
    stage: String,
    began: Instant,
}

/// The agent's hands, on thread U.
struct Act<'a> {
    call: &'a Arc<Call>,
    agent: &'a Arc<Duplex>,
    /// One result each, even if an invocation should be repeated to the letter.
    answered: HashSet<String>,
    /// What the agent leaves for, and since when.
    leaving: Option<(EndedBy, Instant)>,
}

impl<'a> Act<'a> {
    fn new(call: &'a Arc<Call>, agent: &'a Arc<Duplex>) -> Act<'a> {
        Act { call, agent, answered: HashSet::new(), leaving: None }
    }

    /// Why the agent is gone, when it has gone in an orderly way.
    fn reason(&self) -> EndedBy {
        let shutting_down = self.call.bridge.stopping.load(Ordering::SeqCst);
        match self.leaving {
            Some((why, _)) => why,
            None if shutting_down => EndedBy::ShuttingDown,
            None => EndedBy::AgentLeft,
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
        let bridge = self.call.bridge;
        let stage = lock(&self.call.state).stage.clone();
        let errand = Errand {
            call: Arc::clone(self.call),
            agent: Arc::clone(self.agent),
            invocation,
            stage,
            began: Instant::now(),
        };
        let (invocation, stage) = (&errand.invocation, &errand.stage);
        let offered = bridge
            .agent
            .stages
            .get(stage)
            .is_some_and(|stage| stage.tools.contains(&invocation.tool));
        let Some(tool) = bridge.agent.tools.get(&invocation.tool).filter(|_| offered) else {
            log!(self.call, Warn, Act, "{} is not a tool of stage {stage}", invocation.tool);
            return errand.settle(&ToolResult::NoSuchTool, "no such tool");
        };
        if let Some(what_is_missing) = missing(bridge, tool, invocation) {
            log!(self.call, Info, Act, "{}: {what_is_missing}", invocation.tool);
            return errand.settle(&ToolResult::Say(what_is_missing), "incomplete");
        }
        let result = match &tool.action {
            ToolAction::Reply(text) => ToolResult::Say(self.fill(text, invocation)),
            ToolAction::EnterStage { stage, message } => {
                self.enter_stage(stage, &self.fill(message, invocation))
            }
            ToolAction::HangUp(_) => {
                self.leaving = Some((EndedBy::AgentHungUp, errand.began));
                ToolResult::HangUp
            }
            // The agent leaves; step 8 lets Twilio ring the person.
            ToolAction::Transfer(_) => {
                self.leaving = Some((EndedBy::Transferred, errand.began));
                ToolResult::HangUp
            }
            ToolAction::N8n { .. } => return ask_n8n_aside(tool, errand),
            ToolAction::Ultravox { .. } => ToolResult::NoSuchTool,
        };
        errand.is_done(&result, "done");
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
        let mut body = stage_body(self.call, stage);
        body["toolResultText"] = json!(message);
        log!(self.call, Info, Act, "the agent enters stage {stage}");
        self.call.journal.note(&Event::Stage { stage: stage.to_owned() });
        ToolResult::NewStage(body)
    }
}

fn ask_n8n_aside(tool: &'static Tool, errand: Errand) {
    let errand = Arc::new(errand);
    let running = errand.call.tools_running.fetch_add(1, Ordering::SeqCst);
    let aside = Arc::clone(&errand);
    let started = if running < TOOLS_AT_ONCE_MAX {
        spawn(format!("{} tool", shorten(&errand.call.sid)), move || {
            aside.call.journal.note(&Event::ToolBegins(aside.asked()));
            let (result, outcome) = n8n_tool(&aside.call, tool, &aside.invocation);
            aside.is_done(&result, outcome);
            aside.call.tools_running.fetch_sub(1, Ordering::SeqCst);
        })
        .map(drop)
    } else {
        Err(io::Error::other("too many things at once; ask again when these are done"))
    };
    if let Err(error) = started {
        errand.call.tools_running.fetch_sub(1, Ordering::SeqCst);
        log!(errand.call, Warn, Act, "{}: {error}", errand.invocation.tool);
        errand.settle(&ToolResult::Failed(error.to_string()), "refused");
    }
}

impl Errand {
    /// Of a tool that has been at work.
    fn is_done(&self, result: &ToolResult, outcome: &str) {
        let took = &self.call.bridge.metrics.tool_time;
        took.of(&[&self.invocation.tool]).observe(self.began.elapsed());
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
            arguments: self.arguments(),
        }
    }

    /// Only the beginning of arguments without end is written out at all.
    fn arguments(&self) -> Value {
        let mut text = [0; WIRE_CHARS_MAX];
        match serde_json::to_writer(text.as_mut_slice(), &self.invocation.parameters) {
            Ok(()) => json!(self.invocation.parameters),
            Err(_) => json!(format!("{}…", String::from_utf8_lossy(&text))),
        }
    }
}

/// A name that the model has made up is not a label: there is no end to such names.
fn count_tool(call: &Call, invocation: &Invocation, outcome: &str) {
    let known = call.bridge.agent.tools.contains_key(&invocation.tool);
    let tool = if known { &invocation.tool } else { "unknown" };
    call.bridge.metrics.tools.of(&[tool, outcome]).add();
}

/// What the model left out or made up, as an instruction to it. Nothing has been done yet.
fn missing(bridge: &Bridge, tool: &Tool, invocation: &Invocation) -> Option<String> {
    let required = tool.parameters.required.iter().map(String::as_str);
    let missing: Vec<&str> = required.filter(|name| invocation.text(name).is_none()).collect();
    if !missing.is_empty() {
        return Some(format!(
            "Not done yet: {} missing. Ask the caller, then try again.",
            listed(&missing, "is", "are")
        ));
    }
    let calendar = tool.calendar_parameter()?;
    let location = invocation.text(calendar)?;
    if find_calendar(bridge, &location).is_some() {
        return None;
    }
    let locations: Vec<&str> = bridge.agent.calendars.keys().map(String::as_str).collect();
    Some(format!(
        "Not done yet: \"{location}\" is not a {calendar} we have. Valid are: {}. Ask the caller \
         which one.",
        locations.join(", ")
    ))
}

/// What the agent is told when n8n was certainly not reached.
const NOT_DONE: &str = "That did not work: the system cannot be reached. Nothing was done. \
    Apologise, and offer to take a note instead.";

/// What the agent is told when n8n may or may not have done it.
const PERHAPS_DONE: &str = "It is not certain whether that worked: the system did not answer \
    clearly. Do not try again. Tell the caller that a colleague will check and confirm.";

/// Asks n8n, once for each different question. A repeat waits for the first and gets its answer,
/// because the model does repeat itself, and nobody wants two meetings.
fn n8n_tool(call: &Call, tool: &Tool, invocation: &Invocation) -> (ToolResult, &'static str) {
    let ToolAction::N8n { route, calendar } = &tool.action else {
        return (ToolResult::NoSuchTool, "no such tool");
    };
    let mut fields = Map::new();
    for name in tool.parameters.properties.keys() {
        let Some(value) = invocation.parameters.get(name) else {
            continue;
        };
        let email =
            calendar.as_ref().filter(|calendar| *calendar == name).and(invocation.text(name));
        match email.and_then(|location| find_calendar(call.bridge, &location)) {
            Some(email) => fields.insert("calendar_id".into(), json!(email)),
            None => fields.insert(name.clone(), value.clone()),
        };
    }
    let data = Value::Object(fields).to_string();
    let question = format!("{route} {data}");
    let fingerprint = hex(digest::digest(&digest::SHA256, question.as_bytes()).as_ref());
    let answer = {
        let mut answers = lock(&call.tool_answers);
        if answers.len() >= TOOL_ANSWERS_MAX && !answers.contains_key(&fingerprint) {
            return (
                ToolResult::Failed("too many different requests in one call".into()),
                "refused",
            );
        }
        Arc::clone(answers.entry(fingerprint.clone()).or_default())
    };
    let mut answer = lock(&answer);
    if let Some(text) = answer.as_ref() {
        return (ToolResult::Say(text.clone()), "answered from memory");
    }
    let key = format!("{}-{route}-{}", call.sid, fingerprint.get(..16).unwrap_or_default());
    let question =
        ToN8n { sid: &call.sid, number: &call.number, route, data: &data, key, ended_by: None };
    call.show(Exhibit::ToolQuestion, || question.for_the_eye());
    let message = |reply: &N8nReply| {
        call.show(Exhibit::ToolReply, || reply.for_the_eye());
        understand_reply(reply, "message")
    };
    match ask_n8n(call.bridge, &question, tool.within, message) {
        Ok(text) => {
            *answer = Some(text.clone());
            (ToolResult::Say(text), "done")
        }
        Err(failure) => {
            log!(call, Warn, Act, "{}: {failure}", invocation.tool);
            if failure.certainly_not_done {
                return (ToolResult::Say(NOT_DONE.into()), "failed");
            }
            *answer = Some(PERHAPS_DONE.into());
            (ToolResult::Say(PERHAPS_DONE.into()), "uncertain")
        }
    }
}

// ============================================================================
// 8. Goodbye: either side ends the call
// ============================================================================
//
// In:       thread U's reason to stop.
// Out:      a caller who has heard the last word, and a closed line.
// Fails:    never for long: the mark has a deadline of its own.
// Not here: the caller's hang-up. Thread T sees it, and `Call::hang_up` closes the agent's leg.

fn say_goodbye(call: &Call, why: EndedBy) {
    call.hang_up(why);
    let Some(caller) = call.caller() else { return };
    if why != EndedBy::AgentLost {
        await_last_word(call, &caller);
    }
    lock(&call.state).said_goodbye = true;
    caller.socket.close(CloseCode::Normal, "goodbye");
}

/// All of the agent's voice is with Twilio, but not yet with the caller. A mark after it comes back
/// when it has been played. Closing now would cut the goodbye off.
fn await_last_word(call: &Call, caller: &CallerLeg) {
    const LAST_WORD: &str = "goodbye";
    let began = Instant::now();
    caller.mark(call, LAST_WORD);
    let unheard = lock(&caller.plays_until).saturating_duration_since(began);
    let state = lock(&call.state);
    let waited = call.changed.wait_timeout_while(state, unheard + MARK_GRACE, |state| {
        state.mark != LAST_WORD && state.caller.is_some()
    });
    let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
    let how = match (state.mark == LAST_WORD, state.caller.is_some()) {
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
    if !is_sid(sid) {
        log!(Warn, "/stream-ended without a usable CallSid");
        bridge.metrics.refused("call_sid");
        return Reply::text(400, "CallSid is missing or malformed");
    }
    let (status, dial_status) = (form.get("CallStatus"), form.get("DialCallStatus"));
    Reply::twiml(what_comes_next(bridge, sid, status, dial_status).twiml(bridge))
}

/// `dial_status` is empty unless a person was rung for the caller.
fn what_comes_next(
    bridge: &'static Bridge,
    sid: &str,
    call_status: &str,
    dial_status: &str,
) -> Answer {
    bridge.calls.await_filed(sid);
    let has_left = is_final(call_status);
    match (dial_status, bridge.calls.find(sid)) {
        ("", Some(call)) if has_left => {
            call.hang_up(EndedBy::CallerLeft);
            hang_up_for_good(bridge, sid)
        }
        ("", Some(call)) if !call.is_over() => another_stream(&call),
        ("", _) if has_left => hang_up_for_good(bridge, sid),
        ("", _) => match bridge.calls.how_it_ended(sid) {
            Some(how) => after_the_agent(bridge, how),
            None => take_up(bridge, sid, LINE_BROKE),
        },
        ("completed" | "answered", _) => hang_up_for_good(bridge, sid),
        (_, _) if has_left => hang_up_for_good(bridge, sid),
        (status, _) => {
            log!(Sid { sid }, Info, Goodbye, "nobody answered the transfer ({status})");
            take_up(bridge, sid, NOBODY_ANSWERED)
        }
    }
}

fn after_the_agent(bridge: &Bridge, how: EndedBy) -> Answer {
    match (how, &bridge.config.fallback_number) {
        (EndedBy::Transferred, Some(number)) => Answer::Transfer(number.clone()),
        (EndedBy::AgentLost | EndedBy::NoAgent | EndedBy::NeverStreamed, _) => {
            cannot_serve(bridge, &bridge.agent.phrases.apology)
        }
        (
            EndedBy::Transferred
            | EndedBy::CallerLeft
            | EndedBy::CallerLost
            | EndedBy::AgentHungUp
            | EndedBy::AgentLeft
            | EndedBy::TooLong
            | EndedBy::Machine
            | EndedBy::ShuttingDown
            | EndedBy::ProcessDied,
            _,
        ) => Answer::HangUp,
    }
}

fn hang_up_for_good(bridge: &Bridge, sid: &str) -> Answer {
    bridge.outbox.file_now(sid);
    Answer::HangUp
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
    let hang_up = json!({"type": "hang_up", "message": message}).to_string();
    if agent.send(Message::text(hang_up)).is_err() {
        call.hang_up(EndedBy::Machine);
    }
}

// ============================================================================
// 9. After: the transcript is filed
// ============================================================================
//
// In:       what was said, gathered as it was said.
// Out:      the transcript at n8n (route 2), and a journal that says so.
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
        call.journal.note(&Event::Transfer);
    } else {
        call.journal.note(&Event::End { ended_by: how });
        call.bridge.metrics.calls.of(&[&how.to_string()]).add();
    }
    let who = (&*call.sid, &*call.number, call.direction);
    call.bridge.outbox.add(Delivery::new(who, transcript, how, &call.journal));
}

/// One try, on a thread of the outbox. An error: there is to be another.
fn file_transcript(bridge: &Bridge, delivery: &mut Delivery) -> Result<(), Failure> {
    if delivery.is_unfinished() {
        // Nobody has taken it up again.
        delivery.finish();
        bridge.metrics.calls.of(&[&delivery.ended_by.to_string()]).add();
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
    offer(bridge, delivery)?;
    delivery.note(&Event::Delivered);
    let lines = delivery.transcript.count();
    log!(delivery, Info, After, "n8n has the transcript of {lines} lines"; lines);
    Ok(())
}

fn offer(bridge: &Bridge, delivery: &Delivery) -> Result<(), Failure> {
    let ended_by = delivery.ended_by.to_string();
    let question = ToN8n {
        sid: &delivery.sid,
        number: &delivery.number,
        route: "2",
        data: &delivery.transcript.text(),
        key: format!("{}-2", delivery.sid),
        ended_by: Some(&ended_by),
    };
    let show = |exhibit: Exhibit, text: &str| {
        // Of many tries the first one.
        if delivery.is_first_try() {
            delivery.note(&exhibit.event(&bridge.config, text));
        }
    };
    show(Exhibit::Filing, &question.for_the_eye());
    // Every 2xx will do.
    let taken = |reply: &N8nReply| {
        show(Exhibit::Taken, &reply.for_the_eye());
        n8n_refusal(reply).map_or(Ok(()), Err)
    };
    ask_n8n(bridge, &question, DELIVER_WITHIN, taken)
}

fn note_transcript(call: &Call, heard: &Heard) {
    let agent = lock(&call.state).agents;
    // Whoever looks at the call does not wait for the disk.
    let said = lock(&call.transcript).hear(agent, heard).cloned();
    if let Some(said) = said {
        call.journal.note(&Event::Said(said));
    }
}

impl Call {
    fn has_shown(&self, exhibit: Exhibit) -> bool {
        self.shown.load(Ordering::Relaxed) & (1 << exhibit as u8) != 0
    }

    /// For every message but the first of its kind this is one look at a number.
    fn show(&self, exhibit: Exhibit, text: impl FnOnce() -> String) {
        let bit = 1 << exhibit as u8;
        if self.has_shown(exhibit) || self.shown.fetch_or(bit, Ordering::Relaxed) & bit != 0 {
            return;
        }
        self.journal.note(&exhibit.event(&self.bridge.config, &text()));
    }

    /// Remembers when the caller was last loud: a tenth of the frame above -30 dB.
    fn hears(&self, mulaw: &[u8]) {
        const LOUD: u8 = 0x4F;
        let loud = mulaw.iter().filter(|&&code| code & 0x7F < LOUD).count();
        if loud * 10 > mulaw.len() {
            self.loud_at_ms.store(millis(self.rang.elapsed()), Ordering::Relaxed);
        }
    }
}
