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

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::fmt::{self, Display, Write as _};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read, Seek as _, SeekFrom, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use jiff::Timestamp;
use ring::{digest, hmac, rand::SecureRandom as _};
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use subtle::ConstantTimeEq as _;
use tiny_http::Method;
use tungstenite::client::IntoClientRequest as _;
use tungstenite::handshake::machine::TryParse as _;
use tungstenite::handshake::{client as ws_client, derive_accept_key, server as ws_server};
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::protocol::{CloseFrame, Message, Role, WebSocketConfig, WebSocketContext};
use tungstenite::{Bytes, Utf8Bytes};

mod check;
#[cfg(any(feature = "demo", test))]
pub(crate) mod demo;
mod diagram;
#[cfg(any(test, fuzzing))]
pub(crate) mod tests;
mod workflow;

// ============================================================================
// 0. Before the call: facts, limits, settings, the agent, the front door
// ============================================================================
//
// In:       the command line, the environment, `.env`, the agent's files.
// Out:      a listening server; every request has found the function that answers it.
// Fails:    at start-up only, with all complaints at once and exit status 2.
// Not here: anything about a particular call.

/// The nine steps. The log, the banners below, the README and the demo use the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Bridge = 0,
    Ring = 1,
    Greeting = 2,
    Agent = 3,
    Answer = 4,
    Stream = 5,
    Talk = 6,
    Act = 7,
    Goodbye = 8,
    After = 9,
}

/// One line in the log: `log!(Warn, "…")` for the bridge, `log!(call, Warn, Talk, "…")` for a
/// call. Behind a semicolon stand the variables that `LOG_FORMAT=json` shows as fields as well. It
/// stands here because Rust wants a macro before its first use.
macro_rules! log {
    ($level:ident, $text:literal $(, $value:expr)* $(,)? $(; $($fact:ident),+)?) => {
        write_log(
            Level::$level,
            &About { sid: None, step: Step::Bridge },
            format_args!($text $(, $value)*),
            &[$($((stringify!($fact), &$fact as &dyn Display)),+)?],
        )
    };
    (
        $call:expr, $level:ident, $step:ident,
        $text:literal $(, $value:expr)* $(,)? $(; $($fact:ident),+)?
    ) => {
        write_log(
            Level::$level,
            &About { sid: Some(&*$call.sid), step: Step::$step },
            format_args!($text $(, $value)*),
            &[$($((stringify!($fact), &$fact as &dyn Display)),+)?],
        )
    };
}

// --- Facts: decided by others ------------------------------------------------

/// Telephone sound, both legs (Media Streams: 8000 Hz, mono, mu-law only).
const SAMPLE_RATE_HZ: usize = 8_000;
/// Twilio sends a frame this often (observed everywhere, promised nowhere), and Ultravox wants one
/// this often, silence included.
const FRAME_MS: usize = 20;
const FRAME: Duration = Duration::from_millis(FRAME_MS as u64);
/// Bytes of PCM in a frame for Ultravox.
const FRAME_BYTES: usize = SAMPLE_RATE_HZ * FRAME_MS / 1_000 * SAMPLE_BYTES;
const SAMPLE_BYTES: usize = 2;
const _: () = assert!(FRAME_BYTES == 320);
/// Ultravox may run this far ahead of the caller's ear. Safe only because we pass its
/// `playback_clear_buffer` on as `clear` at once.
const AGENT_AHEAD_MS: usize = 30_000;
/// Twilio drops a webhook's answer after this long.
const TWILIO_WEBHOOK: Duration = Duration::from_secs(15);
/// Ultravox fails a tool whose result takes longer.
const ULTRAVOX_TOOL_MAX: Duration = Duration::from_secs(40);

// --- Limits: ours, and what happens at each ----------------------------------

/// Step 2 in all. Then the default greeting is used.
const LOOKUP_WITHIN: Duration = Duration::from_secs(2);
/// How often an unused connection to Ultravox is used, so that it is still there for the next call.
const ULTRAVOX_WARM_EVERY: Duration = Duration::from_secs(25);
/// The same for n8n, which closes a connection that was idle for 5 s.
const N8N_WARM_EVERY: Duration = Duration::from_secs(4);
/// The answer to such a request. A later one counts as none.
const WARM_WITHIN: Duration = Duration::from_secs(5);
/// A connection that was idle for longer is not used again.
const IDLE_MAX: Duration = Duration::from_secs(30);
const _: () = assert!(ULTRAVOX_WARM_EVERY.as_secs() < IDLE_MAX.as_secs());
/// Step 3 in all: create and join. Then the caller hears the apology.
const AGENT_WITHIN: Duration = Duration::from_secs(10);
/// Joining the agent's WebSocket: connect, TLS, upgrade, each.
const JOIN_WITHIN: Duration = Duration::from_secs(5);
/// The longest `Retry-After` of a busy Ultravox that is waited for, once.
const BUSY_RETRY_WITHIN: Duration = Duration::from_secs(1);
const _: () = assert!(
    LOOKUP_WITHIN.as_secs() + AGENT_WITHIN.as_secs() < TWILIO_WEBHOOK.as_secs(),
    "the webhook must be answered before Twilio gives up"
);
/// From the answer to Twilio's stream. Then the waiting agent is sent home and the token is void.
const STREAM_WITHIN: Duration = Duration::from_mins(1);
/// From a broken stream of Twilio's to the next one. Then the caller counts as lost.
const NEXT_STREAM_WITHIN: Duration = Duration::from_secs(15);
/// Streams of one call. One more, and the caller hears the apology: something cuts them all.
const STREAMS_MAX: u32 = 6;
/// Broken agent lines that are mended in one call. At the next the caller hears the apology.
const RESUMES_MAX: u32 = 2;
/// A call whose process died may be taken up for this long. Then its transcript is filed as it is.
const TAKE_UP_WITHIN: Duration = Duration::from_mins(1);
/// From a call's last word to the last line of its journal. Then Twilio is answered all the same.
const FILED_WITHIN: Duration = Duration::from_secs(5);
/// A process that ends stays this long after its last call. Twilio asks what comes next when a
/// stream is over; unanswered, the caller hears of an application error instead of a person.
const LAST_QUESTION_WITHIN: Duration = Duration::from_secs(2);
/// How long a person's phone rings when a caller is put through.
const TRANSFER_RINGS: Duration = Duration::from_secs(25);
/// The longest that Twilio lets a transferred call last. Then its transcript is filed.
const TRANSFER_MAX: Duration = Duration::from_hours(4);
/// From the upgrade to `start`. Then the stream is closed with 1008.
const START_WITHIN: Duration = Duration::from_secs(10);
/// Twilio sends 50 messages a second. After this much of nothing the line is lost.
const CALLER_SILENCE_MAX: Duration = Duration::from_secs(10);
/// Nothing from the agent for this long: we ping. Nothing for as long again: the line is lost.
const PING_AFTER: Duration = Duration::from_secs(3);
/// A peer that takes nothing for this long is dead, not a reason to hang.
const WRITE_WITHIN: Duration = Duration::from_secs(5);
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
/// A pause this long after a key ends a number being keyed in.
const KEYS_PAUSE: Duration = Duration::from_secs(1);
/// Keys kept until the pause. More are sent on in portions.
const KEYS_MAX: usize = 32;
/// Time for a tool of the agent's own file that does not name one.
const TOOL_WITHIN: Duration = Duration::from_secs(10);
/// Added to a tool's own time to get the time Ultravox allows: our answer must come first.
const TOOL_MARGIN: Duration = Duration::from_secs(5);
/// The longest `timeout_s` in the agent's file.
const TOOL_WITHIN_MAX: Duration = Duration::from_secs(30);
const _: () = assert!(
    TOOL_WITHIN_MAX.as_secs() + TOOL_MARGIN.as_secs() <= ULTRAVOX_TOOL_MAX.as_secs(),
    "a late tool result is thrown away by Ultravox"
);
/// Tools of one call that run on threads of their own. The next is told to wait.
const TOOLS_AT_ONCE_MAX: usize = 8;
/// Different n8n tool invocations remembered in one call, so that none is done twice. The next
/// is refused in words.
const TOOL_ANSWERS_MAX: usize = 100;
/// Different invocations answered on one agent line. More is a storm, and gets an error each.
const INVOCATIONS_MAX: usize = 500;
/// An invocation's id. Ultravox's are 36 characters long; a longer one counts as none.
const INVOCATION_ID_BYTES_MAX: usize = 256;
/// What is remembered of one call's words. More is not speech, and is not kept.
const TRANSCRIPT_BYTES_MAX: usize = 1_024 * 1_024;
/// A transcript's delivery to n8n.
const DELIVER_WITHIN: Duration = Duration::from_secs(10);
/// The first pause after a failed delivery; it doubles up to the second figure.
const DELIVER_AGAIN_MIN: Duration = Duration::from_secs(5);
const DELIVER_AGAIN_MAX: Duration = Duration::from_mins(15);
/// A transcript that n8n has not taken for this long is kept and reported, and not tried again
/// unless `callbridge outbox --retry` says so.
const DELIVER_FOR: Duration = Duration::from_hours(72);
/// How often the journals are looked through for those that are older than `KEEP_DAYS`.
const TIDY_EVERY: Duration = Duration::from_hours(24);
/// Deliveries at the same time, so that a hanging one does not hold up the others.
const DELIVERIES_AT_ONCE: usize = 4;
/// An n8n reply. A longer one counts as nonsense.
const N8N_REPLY_BYTES_MAX: u64 = 64 * 1_024;
/// Twilio's answer to an outgoing call.
const TWILIO_WITHIN: Duration = Duration::from_secs(10);
/// An outgoing call's greeting is remembered for this long while the phone rings.
const RINGING_MAX: Duration = Duration::from_mins(11);
/// Outgoing calls that ring at the same time. The next is refused with 503.
const RINGING_AT_ONCE_MAX: usize = 100;
/// Twilio's description of a call it makes takes 2 KiB.
const TWILIO_REPLY_BYTES_MAX: u64 = 64 * 1_024;
/// An Ultravox REST reply. It echoes the prompt, so it is roomier.
const ULTRAVOX_REPLY_BYTES_MAX: u64 = 1_024 * 1_024;
/// A greeting from n8n. A longer one is a mistake in the workflow, and the default is used.
const GREETING_CHARS_MAX: usize = 2_000;
/// The head of a request. A longer one is refused with 431.
const HEAD_BYTES_MAX: usize = 16 * 1_024;
/// From accepting a connection to the end of its head. Then it is closed.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// Connections that have not said yet what they want: a whole head, the body it announces, a
/// stream's token. One more closes the oldest: whoever means it has said so within milliseconds,
/// whoever idles is the one to lose.
const UNDECIDED_MAX: usize = 256;
/// Connections beside one for each of `MAX_CALLS`. The next is closed at once.
const CONNECTIONS_MAX: usize = 2_048;
/// The body of a webhook. Twilio's are under 4 KiB; a longer one is refused with 413.
const BODY_BYTES_MAX: usize = 64 * 1_024;
/// The body that a head may announce. `tiny_http` sets aside as much memory as was announced when
/// it throws away what nobody has read; without room for it, the process would end.
const ANNOUNCED_BYTES_MAX: usize = 1_024 * 1_024;
/// A peer that is refused while it still sends is listened to for this long, so that it gets to
/// read why.
const LINGER: Duration = Duration::from_secs(1);
/// A whole request, from its head to the end of our answer.
const REQUEST_WITHIN: Duration = Duration::from_secs(20);
const _: () = assert!(REQUEST_WITHIN.as_secs() > TWILIO_WEBHOOK.as_secs());
/// One message from Twilio. A frame takes 300 bytes.
const TWILIO_MESSAGE_BYTES_MAX: usize = 64 * 1_024;
/// One message from Ultravox. Thirty seconds of PCM take 480,000 bytes.
const AGENT_MESSAGE_BYTES_MAX: usize = 1_024 * 1_024;
const _: () =
    assert!(AGENT_MESSAGE_BYTES_MAX > AGENT_AHEAD_MS * SAMPLE_RATE_HZ / 1_000 * SAMPLE_BYTES);
/// Mu-law bytes in one message to Twilio: a second of sound.
const TO_TWILIO_BYTES_MAX: usize = SAMPLE_RATE_HZ;
/// What one `read` takes from a socket.
const READ_BYTES: usize = 2 * 1_024;
/// What each leg keeps for messages to come: a few frames. Longer ones get their own.
const MESSAGE_BUFFER_BYTES: usize = 1_024;
/// What a request to Ultravox, n8n or Twilio takes for a buffer each way. ureq would take 128 KiB,
/// and an allocator does not give them back after a busy minute.
const HTTP_BUFFER_BYTES: usize = 16 * 1_024;
/// A message in a journal, and a tool's arguments and result there. What is longer is cut.
const WIRE_CHARS_MAX: usize = 2_000;
/// A tool's name in a journal. Whoever invents one may invent a long one.
const TOOL_NAME_CHARS_MAX: usize = 100;
/// Past calls on one page of `/calls`, and how many it has unless told.
const CALLS_A_PAGE_MAX: usize = 200;
const CALLS_A_PAGE: usize = 50;
/// Of a journal in one answer of `/calls/{sid}`, give or take a line. The page asks for the rest.
const STORY_BYTES_MAX: u64 = 512 * 1_024;
/// A caller is speaking until this long after the last loud frame.
const SPEAKS_ON: Duration = Duration::from_millis(300);
/// The stack of a thread that may stay with a call. Only what is touched takes memory.
const CALL_STACK_BYTES: usize = 256 * 1_024;
/// The stack of any other thread. An HTTP request or a TLS handshake touches much of it, and the C
/// library hands it on, touched as it is, to a later thread that asks for at least a quarter of it.
const STACK_BYTES: usize = 2 * 1_024 * 1_024;
const _: () = assert!(STACK_BYTES > 4 * CALL_STACK_BYTES, "calls do not inherit touched stacks");
/// Pause after a failed `accept` (out of file descriptors: nothing announces that one is free).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// From the end of a `tiny_http` to the next one. A dead one may leave a few sleeping threads
/// behind, so there are not to be many.
const HTTP_PAUSE: Duration = Duration::from_millis(500);
const _: () = assert!(2 * HTTP_PAUSE.as_millis() < WRITE_WITHIN.as_millis());
/// `API_TOKEN`. A shorter one could be guessed.
const API_TOKEN_CHARS_MIN: usize = 16;
/// A line in the log. What is longer is cut.
const LOG_CHARS_MAX: usize = 1_000;
/// Calls remembered after their end, so that a late `/stream-ended` gets the right words.
const ENDED_CALLS_MAX: usize = 1_024;

/// Every setting, in the order of `.env.example` and the README.
const SETTINGS: [&str; 30] = [
    "ULTRAVOX_API_KEY",
    "PUBLIC_URL",
    "N8N_WEBHOOK_URL",
    "PORT",
    "BIND",
    "TWILIO_AUTH_TOKEN",
    "TWILIO_ACCOUNT_SID",
    "TWILIO_PHONE_NUMBER",
    "API_TOKEN",
    "OUTGOING_ALLOW",
    "ANSWERING_MACHINE_MESSAGE",
    "FIRST_MESSAGE",
    "AGENT_DIR",
    "DATA_DIR",
    "KEEP_DAYS",
    "ULTRAVOX_MODEL",
    "ULTRAVOX_CORPUS_ID",
    "N8N_HMAC_SECRET",
    "N8N_AUTH_HEADER",
    "FALLBACK_NUMBER",
    "MAX_CALLS",
    "MAX_CALL_SECONDS",
    "CALLS_PER_NUMBER_PER_HOUR",
    "DRAIN_SECONDS",
    "LOG_LEVEL",
    "LOG_FORMAT",
    "ULTRAVOX_API_URL",
    "TWILIO_API_URL",
    "NGROK_API_URL",
    "SSL_CERT_FILE",
];

const USAGE: &str = "\
callbridge answers a phone number with a voice agent.

  callbridge              serve (settings: see .env.example)
{demo}  callbridge check        look at the set-up: what is wrong, and what to do about it
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

/// The lines about the demo, which a program that was built without it does not promise.
const USAGE_OF_DEMO: &str = if cfg!(feature = "demo") {
    "\
  callbridge demo         play one whole call on this machine, no account needed
  callbridge demo --calls 100
                          play a hundred at once, and say what they cost
"
} else {
    ""
};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        [] => serve(),
        ["check", options @ ..] => check::run(options),
        ["outbox"] => outbox_command(false),
        ["outbox", "--retry"] => outbox_command(true),
        ["workflow"] => workflow::run(),
        ["diagram"] => diagram::run(diagram::Form::Mermaid),
        ["diagram", "--plain"] => diagram::run(diagram::Form::Plain),
        ["demo", ..] => demo_command(&arguments[1..]),
        ["--help" | "-h" | "help"] | ["outbox" | "workflow" | "diagram", "--help" | "-h"] => {
            say(&usage());
            Ok(())
        }
        ["--version" | "-V"] => {
            say(concat!("callbridge ", env!("CARGO_PKG_VERSION"), "\n"));
            Ok(())
        }
        _ => Err(Stop::Misused(format!(
            "callbridge: what is \"{}\"?\n\n{}",
            words.join(" "),
            usage()
        ))),
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

fn usage() -> String {
    USAGE.replace("{demo}", USAGE_OF_DEMO)
}

#[cfg(feature = "demo")]
fn demo_command(arguments: &[String]) -> Result<(), Stop> {
    demo::run(arguments).map_err(|flop| {
        if flop.misused { Stop::Misused(flop.text) } else { Stop::Failed(flop.text) }
    })
}

#[cfg(not(feature = "demo"))]
fn demo_command(_: &[String]) -> Result<(), Stop> {
    let what = "callbridge: this program was built without the demo (cargo feature `demo`)";
    Err(Stop::Misused(what.to_owned()))
}

/// Why the program ends without having done what it was asked for.
enum Stop {
    /// Exit status 2: a wrong command line, settings or agent file. Mend it and start again.
    Misused(String),
    /// Exit status 1: something outside did not work.
    Failed(String),
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
        if let Err(error) = start_outbox(bridge) {
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
            outbox: Outbox::default(),
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

fn needs_attention(what: &str, complaints: &[String]) -> Stop {
    let (count, plural) =
        (complaints.len(), if complaints.len() == 1 { " needs" } else { "s need" });
    let mut text = format!("callbridge: {count} {what}{plural} attention");
    for complaint in complaints {
        text.push_str("\n  ");
        text.push_str(complaint);
    }
    Stop::Misused(text)
}

/// The start lines: what is in force, and what its owner may not have meant.
fn introduce(bridge: &Bridge, address: SocketAddr) {
    let config = &bridge.config;
    log!(Info, "callbridge {} listening on {address}", env!("CARGO_PKG_VERSION"));
    log!(Info, "Twilio's Voice webhook is {}/incoming-call (POST)", config.public_url);
    let agent = &bridge.agent;
    log!(
        Info,
        "agent {} of {}: {} stages, {} tools, model {}",
        agent.name,
        agent.company,
        agent.stages.len(),
        agent.tools.len(),
        config.ultravox_model
    );
    log!(
        Info,
        "at most {} calls of {} s each; data in {}",
        config.max_calls,
        config.max_call.as_secs(),
        config.data_dir.display()
    );
    match config.api_token {
        Some(_) => log!(Info, "live page: {}/ (password: API_TOKEN)", config.public_url),
        None => log!(Info, "API_TOKEN is not set: no live page, no outgoing calls"),
    }
    if config.n8n_webhook_url.is_none() {
        log!(
            Warn,
            "N8N_WEBHOOK_URL is not set: default greeting, no n8n tools, transcripts stay on disk"
        );
    }
    if config.ultravox_corpus_id.is_none() {
        log!(Info, "ULTRAVOX_CORPUS_ID is not set: the agent cannot look things up (queryCorpus)");
    }
    if config.twilio_auth_token.is_none() {
        log!(Warn, "TWILIO_AUTH_TOKEN is not set: anyone can start calls here that you pay for");
    }
}

// --- Settings ----------------------------------------------------------------

/// What the owner has set. Read once; behind this door nothing looks at the environment.
struct Config {
    ultravox_api_key: Secret,
    /// Without a trailing slash: `https://host[:port][/path]`.
    public_url: String,
    n8n_webhook_url: Option<String>,
    port: u16,
    bind: IpAddr,
    twilio_auth_token: Option<Secret>,
    twilio_account_sid: Option<String>,
    twilio_phone_number: Option<String>,
    api_token: Option<Secret>,
    /// Beginnings of the numbers that may be rung. None: no outgoing calls.
    outgoing_allow: Vec<String>,
    /// What an answering machine is told. None: it is hung up on.
    answering_machine_message: Option<String>,
    first_message: Option<String>,
    agent_dir: Option<PathBuf>,
    data_dir: PathBuf,
    keep: Duration,
    ultravox_model: String,
    ultravox_corpus_id: Option<String>,
    n8n_hmac_secret: Option<Secret>,
    n8n_auth_header: Option<(String, Secret)>,
    fallback_number: Option<String>,
    max_calls: usize,
    max_call: Duration,
    calls_per_number_per_hour: usize,
    drain: Duration,
    log_level: Level,
    log_format: LogFormat,
    ultravox_api_url: String,
    twilio_api_url: String,
    ngrok_api_url: String,
    ssl_cert_file: Option<PathBuf>,
}

impl Config {
    /// All complaints at once.
    fn load() -> Result<Config, Vec<String>> {
        let (values, complaints) = settings_in_force();
        Config::from_values(values, complaints)
    }

    fn from_values(
        values: HashMap<String, String>,
        complaints: Vec<String>,
    ) -> Result<Config, Vec<String>> {
        let (config, complaints) = Config::understand(values, complaints);
        if complaints.is_empty() { Ok(config) } else { Err(complaints) }
    }

    /// What is missing or malformed is complained of, and stands at its default.
    fn understand(
        values: HashMap<String, String>,
        complaints: Vec<String>,
    ) -> (Config, Vec<String>) {
        let mut settings = Settings { values, complaints };
        let config = Config {
            ultravox_api_key: Secret(
                settings
                    .required("ULTRAVOX_API_KEY", "get one at app.ultravox.ai, Settings, API keys"),
            ),
            public_url: settings.public_url(),
            n8n_webhook_url: settings.url("N8N_WEBHOOK_URL"),
            port: settings.number("PORT", 8_000, 0, u16::MAX),
            bind: settings
                .parsed("BIND", "an IP address such as 0.0.0.0")
                .unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            twilio_auth_token: settings.text("TWILIO_AUTH_TOKEN").map(Secret),
            twilio_account_sid: settings.account_sid("TWILIO_ACCOUNT_SID"),
            twilio_phone_number: settings.phone_number("TWILIO_PHONE_NUMBER"),
            api_token: settings.api_token("API_TOKEN"),
            outgoing_allow: settings.prefixes("OUTGOING_ALLOW"),
            answering_machine_message: settings.text("ANSWERING_MACHINE_MESSAGE"),
            first_message: settings.text("FIRST_MESSAGE"),
            agent_dir: settings.text("AGENT_DIR").map(PathBuf::from),
            data_dir: PathBuf::from(settings.text("DATA_DIR").unwrap_or_else(|| "data".into())),
            keep: Duration::from_secs(86_400 * settings.number("KEEP_DAYS", 30, 0, 36_500)),
            ultravox_model: settings
                .text("ULTRAVOX_MODEL")
                .unwrap_or_else(|| "ultravox-v0.7".into()),
            ultravox_corpus_id: settings.text("ULTRAVOX_CORPUS_ID"),
            n8n_hmac_secret: settings.text("N8N_HMAC_SECRET").map(Secret),
            n8n_auth_header: settings.header("N8N_AUTH_HEADER"),
            fallback_number: settings.phone_number("FALLBACK_NUMBER"),
            max_calls: settings.number("MAX_CALLS", 50, 1, 10_000),
            max_call: Duration::from_secs(settings.number("MAX_CALL_SECONDS", 1_800, 10, 14_400)),
            calls_per_number_per_hour: settings.number("CALLS_PER_NUMBER_PER_HOUR", 20, 1, 100_000),
            drain: Duration::from_secs(settings.number("DRAIN_SECONDS", 300, 0, 14_400)),
            log_level: settings.one_of(
                "LOG_LEVEL",
                &[
                    ("info", Level::Info),
                    ("error", Level::Error),
                    ("warn", Level::Warn),
                    ("debug", Level::Debug),
                ],
            ),
            log_format: settings
                .one_of("LOG_FORMAT", &[("text", LogFormat::Text), ("json", LogFormat::Json)]),
            ultravox_api_url: settings
                .url("ULTRAVOX_API_URL")
                .unwrap_or_else(|| "https://api.ultravox.ai".into()),
            twilio_api_url: settings
                .url("TWILIO_API_URL")
                .unwrap_or_else(|| "https://api.twilio.com".into()),
            ngrok_api_url: settings
                .url("NGROK_API_URL")
                .unwrap_or_else(|| "http://127.0.0.1:4040".into()),
            ssl_cert_file: settings.text("SSL_CERT_FILE").map(PathBuf::from),
        };
        (config, settings.complaints)
    }
}

/// The environment first, then `.env`. With it, what could not be read.
fn settings_in_force() -> (HashMap<String, String>, Vec<String>) {
    let mut values: HashMap<String, String> = HashMap::new();
    let mut complaints = Vec::new();
    match dotenvy::from_path_iter(".env") {
        Ok(lines) => {
            for line in lines {
                match line {
                    Ok((name, value)) => drop(values.insert(name, value)),
                    // The error quotes the line, which may hold a secret; its name may not.
                    Err(_) => complaints.push(
                        ".env  has a line that is not NAME=value (with spaces: in quotes)".into(),
                    ),
                }
            }
        }
        Err(dotenvy::Error::Io(error)) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => complaints.push(format!(".env cannot be read: {error}")),
    }
    for name in SETTINGS {
        match std::env::var(name) {
            Ok(value) => drop(values.insert(name.to_owned(), value)),
            Err(std::env::VarError::NotPresent) => {}
            Err(std::env::VarError::NotUnicode(_)) => {
                complaints.push(format!("{name}  is not readable text"));
            }
        }
    }
    (values, complaints)
}

// --- The agent is data -------------------------------------------------------

/// Who answers: stages, tools, calendars and phrases, from `agent.json` and the prompts it names.
struct Agent {
    name: String,
    company: String,
    language: String,
    first_message: String,
    phrases: Phrases,
    first_stage: String,
    stages: BTreeMap<String, Stage>,
    tools: BTreeMap<String, Tool>,
    /// Location -> calendar e-mail.
    calendars: BTreeMap<String, String>,
}

/// Sentences that are said for the agent, in the agent's language.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Phrases {
    busy: String,
    apology: String,
    putting_through: String,
    still_there: String,
    silence_goodbye: String,
    time_is_up: String,
    closing: String,
    cut_short: String,
}

/// A part of the conversation. Entering it replaces prompt, voice and the set of tools.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Stage {
    voice: String,
    agent_name: Option<String>,
    /// In the file: the name of a Markdown file. Once loaded: its text.
    prompt: String,
    tools: Vec<String>,
}

struct Tool {
    description: String,
    /// A JSON Schema object: what the model has to fill in.
    parameters: Schema,
    within: Duration,
    action: ToolAction,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Schema {
    #[serde(rename = "type")]
    kind: String,
    properties: Map<String, Value>,
    #[serde(default)]
    required: Vec<String>,
}

/// The one thing a tool does.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum ToolAction {
    /// Goes on in another stage. `message` is what the model reads first there.
    EnterStage {
        stage: String,
        message: String,
    },
    /// Posts to n8n and tells the agent the reply's `message`. The parameter that `calendar` names
    /// is chosen among the calendars.
    N8n {
        route: String,
        calendar: Option<String>,
    },
    /// Answers from here, with `{param}` filled in.
    Reply(String),
    HangUp(bool),
    /// Puts the caller through to `FALLBACK_NUMBER`.
    Transfer(bool),
    /// A tool that Ultravox runs itself; we only offer it.
    Ultravox {
        tool: String,
        #[serde(default)]
        parameter_overrides: Map<String, Value>,
    },
}

/// The agent that is compiled in: the receptionist of an insurance company.
const BUILT_IN_AGENT: [(&str, &str); 4] = [
    ("agent.json", include_str!("agent/agent.json")),
    ("greeting.md", include_str!("agent/greeting.md")),
    ("main_convo.md", include_str!("agent/main_convo.md")),
    ("call_summary.md", include_str!("agent/call_summary.md")),
];

/// What prompts, the first message and tools may hold in braces. Tools add their own parameters.
const PLACEHOLDERS: [&str; 4] = ["agent_name", "company_name", "now", "caller_number"];

impl Agent {
    fn load(config: &Config) -> Result<Agent, Vec<String>> {
        let mut agent = Agent::read(config.agent_dir.as_deref())?;
        if let Some(first_message) = &config.first_message {
            agent.first_message.clone_from(first_message);
        }
        agent.offer_only_what_works(config);
        Ok(agent)
    }

    /// From the owner's directory, or else the one that is built in.
    fn read(directory: Option<&Path>) -> Result<Agent, Vec<String>> {
        Agent::from_files(&|name| match directory {
            None => {
                let file = BUILT_IN_AGENT.iter().find(|(built_in, _)| *built_in == name);
                file.map(|(_, text)| (*text).to_owned()).ok_or_else(|| "is not built in".to_owned())
            }
            Some(directory) => fs::read_to_string(directory.join(name))
                .map_err(|error| format!("cannot be read from {}: {error}", directory.display())),
        })
    }

    /// For the commands that need nothing but the agent: of all settings only `AGENT_DIR`.
    fn alone() -> Result<Agent, Stop> {
        let (values, complaints) = settings_in_force();
        if !complaints.is_empty() {
            return Err(needs_attention("setting", &complaints));
        }
        let settings = Settings { values, complaints };
        let directory = settings.text("AGENT_DIR").map(PathBuf::from);
        Agent::read(directory.as_deref())
            .map_err(|mistakes| needs_attention("agent file mistake", &mistakes))
    }

    /// Reads `agent.json` and the prompts it names. All mistakes at once, each with its place.
    fn from_files(read: &dyn Fn(&str) -> Result<String, String>) -> Result<Agent, Vec<String>> {
        let text = read("agent.json").map_err(|why| vec![format!("agent.json  {why}")])?;
        let file: AgentFile =
            serde_json::from_str(&text).map_err(|error| vec![format!("agent.json  {error}")])?;
        let entries = (file.stages.len(), file.tools.len());
        let mut mistakes = Mistakes(Vec::new());
        let mut agent = Agent {
            name: file.agent_name,
            company: file.company_name,
            language: file.language,
            first_message: file.first_message,
            phrases: file.phrases,
            first_stage: file.first_stage,
            stages: mistakes.entries("stages", file.stages),
            tools: BTreeMap::new(),
            calendars: file.calendars,
        };
        for (name, tool) in mistakes.entries("tools", file.tools) {
            if let Some(tool) = mistakes.tool(&name, tool) {
                agent.tools.insert(name, tool);
            }
        }
        for (name, stage) in &mut agent.stages {
            mistakes.prompt(name, stage, read);
        }
        mistakes.fixed_texts(&agent);
        if (agent.stages.len(), agent.tools.len()) == entries {
            // An entry that could not be read would be missed everywhere, which helps nobody.
            mistakes.names_that_lead_nowhere(&agent);
            mistakes.stages_nobody_enters(&agent);
        }
        if mistakes.0.is_empty() { Ok(agent) } else { Err(mistakes.0) }
    }

    /// A tool that could only fail is not offered: the model would try it, and apologise.
    fn offer_only_what_works(&mut self, config: &Config) {
        let tools = &self.tools;
        for stage in self.stages.values_mut() {
            stage.tools.retain(|name| match tools.get(name).map(|tool| &tool.action) {
                Some(ToolAction::N8n { .. }) => config.n8n_webhook_url.is_some(),
                Some(ToolAction::Ultravox { tool, .. }) => {
                    tool != "queryCorpus" || config.ultravox_corpus_id.is_some()
                }
                Some(ToolAction::Transfer(_)) => config.fallback_number.is_some(),
                Some(
                    ToolAction::EnterStage { .. } | ToolAction::Reply(_) | ToolAction::HangUp(_),
                )
                | None => true,
            });
        }
    }
}

// --- The front door ----------------------------------------------------------
//
// Everything from outside comes in here, on one port. Why not tiny_http alone? It hands over an
// upgraded socket as one object that cannot be read and written at the same time, and a phone
// call does both all the time. It has no time limit for a request's head and no limit on its
// size, lets a new connection wait behind an idle one, and stops accepting for good when file
// descriptors run out. So this door reads a request's head, within limits, and then hands the
// whole connection on: the media stream to step 5, everything else to tiny_http on loopback.
// It routes. It does not parse HTTP.

fn front_door(bridge: &'static Bridge, listener: &TcpListener) -> ! {
    let mut said = false;
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                said = false;
                if let Err(error) = admit(bridge, socket) {
                    log!(Warn, "a connection was turned away: {error}");
                }
            }
            Err(error) => {
                if !said {
                    log!(Error, "cannot accept connections: {error}; trying on");
                    said = true;
                }
                thread::sleep(ACCEPT_PAUSE);
            }
        }
    }
}

fn admit(bridge: &'static Bridge, socket: TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    socket.set_write_timeout(Some(WRITE_WITHIN))?;
    let socket = Arc::new(socket);
    let visit = Arc::new(Lobby::enter(bridge, &socket)?);
    // It becomes thread T if a media stream is wanted.
    spawn_for_call("front door".into(), move || {
        let head = match read_head(&socket) {
            Ok(head) => head,
            Err(refusal) => return refusal.tell(bridge, &socket),
        };
        if wants_media_stream(&head) {
            media_stream(bridge, &visit, head);
        } else if let Err(error) = pass_to_http(bridge, &visit, &head) {
            log!(Debug, "a request ended early: {error}");
        }
    })
    .map(drop)
}

/// Who is inside, and who has not yet said what they want.
#[derive(Default)]
struct Lobby {
    inside: AtomicUsize,
    undecided: Mutex<VecDeque<Arc<TcpStream>>>,
    /// Said once for each time that it fills up.
    crowded: AtomicBool,
}

/// One connection's stay. Dropping it makes room.
struct Visit {
    lobby: &'static Lobby,
    socket: Arc<TcpStream>,
}

impl Lobby {
    fn enter(bridge: &'static Bridge, socket: &Arc<TcpStream>) -> io::Result<Visit> {
        let lobby = &bridge.lobby;
        let most = CONNECTIONS_MAX + bridge.config.max_calls;
        let inside = lobby.inside.fetch_add(1, Ordering::SeqCst);
        let visit = Visit { lobby, socket: Arc::clone(socket) };
        if inside >= most {
            bridge.metrics.refused("too_many_connections");
            return Err(io::Error::other(format!("{most} connections are open")));
        }
        let mut undecided = lock(&lobby.undecided);
        undecided.push_back(Arc::clone(socket));
        if undecided.len() > UNDECIDED_MAX
            && let Some(oldest) = undecided.pop_front()
        {
            // Its thread wakes up with an end of file.
            shut(&oldest);
            bridge.metrics.refused("idle_connection");
            if !lobby.crowded.swap(true, Ordering::SeqCst) {
                log!(Warn, "more than {UNDECIDED_MAX} connections idle; the oldest make room");
            }
        }
        Ok(visit)
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.is_decided();
        self.lobby.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Visit {
    fn is_decided(&self) {
        let mut undecided = lock(&self.lobby.undecided);
        undecided.retain(|socket| !Arc::ptr_eq(socket, &self.socket));
        if undecided.len() < UNDECIDED_MAX / 2 {
            self.lobby.crowded.store(false, Ordering::SeqCst);
        }
    }
}

/// Why a connection got no further than the door.
#[derive(Debug)]
enum Refusal {
    /// It went away, or had to make room, before it had said anything of use.
    Left,
    Slow,
    TooLong,
    /// The head announces a body that nobody here would read.
    TooMuch,
    Tls,
    NotHttp,
}

impl Refusal {
    fn tell(&self, bridge: &Bridge, mut socket: &TcpStream) {
        let (reason, status, why) = match self {
            Refusal::Left => {
                log!(Debug, "a connection ended before it had said what it wants");
                return shut(socket);
            }
            Refusal::Slow => {
                ("slow_head", "408 Request Timeout", "the head of the request took too long")
            }
            Refusal::TooLong => (
                "long_head",
                "431 Request Header Fields Too Large",
                "the head of the request is too long",
            ),
            Refusal::TooMuch => {
                ("long_body", "413 Content Too Large", "the announced body is too long")
            }
            Refusal::Tls => {
                ("tls", "400 Bad Request", "TLS on the plain port: put Caddy or a tunnel in front")
            }
            Refusal::NotHttp => ("not_http", "400 Bad Request", "this is not HTTP/1.1"),
        };
        bridge.metrics.refused(reason);
        log!(Warn, "a connection was closed: {why}");
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nConnection: close\r\n\
             Content-Length: {}\r\n\r\n{why}\n",
            why.len() + 1
        );
        if let Err(error) = socket.write_all(answer.as_bytes()) {
            log!(Debug, "and did not wait to hear it: {error}");
        }
        linger(socket);
    }
}

/// Were the line closed while the peer still sends, the system would cut it, and our answer with
/// it. So what comes is thrown away for a moment.
fn linger(mut socket: &TcpStream) {
    let deadline = Instant::now() + LINGER;
    let mut chunk = [0; READ_BYTES];
    if socket.shutdown(Shutdown::Write).is_ok() && socket.set_read_timeout(Some(LINGER)).is_ok() {
        while Instant::now() < deadline && socket.read(&mut chunk).is_ok_and(|count| count > 0) {}
    }
    shut(socket);
}

/// Reads up to the empty line, and perhaps a little more.
fn read_head(mut socket: &TcpStream) -> Result<Vec<u8>, Refusal> {
    let deadline = Instant::now() + HEAD_WITHIN;
    let mut head = Vec::new();
    let mut chunk = [0; READ_BYTES];
    // Looked through once, also when it comes byte by byte.
    let mut seen = 0;
    while find(&head[seen..], b"\r\n\r\n").is_none() {
        seen = head.len().saturating_sub(3);
        if head.len() > HEAD_BYTES_MAX {
            return Err(Refusal::TooLong);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || socket.set_read_timeout(Some(left)).is_err() {
            return Err(Refusal::Slow);
        }
        match socket.read(&mut chunk) {
            Ok(0) => return Err(Refusal::Left),
            Ok(count) => head.extend_from_slice(&chunk[..count]),
            Err(error) if is_timeout(&error) => return Err(Refusal::Slow),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(Refusal::Left),
        }
        match head.first() {
            Some(0x16) => return Err(Refusal::Tls),
            Some(first) if !first.is_ascii_uppercase() => return Err(Refusal::NotHttp),
            _ => {}
        }
    }
    if find(&head, b"\r\n\r\n").is_some_and(|end| end > HEAD_BYTES_MAX) {
        return Err(Refusal::TooLong);
    }
    let line = head.split(|&byte| byte == b'\r').next().unwrap_or_default();
    if !line.ends_with(b" HTTP/1.1") && !line.ends_with(b" HTTP/1.0") {
        return Err(Refusal::NotHttp);
    }
    match announced_body(&head) {
        Some(bytes) if bytes > ANNOUNCED_BYTES_MAX => Err(Refusal::TooMuch),
        _ => Ok(head),
    }
}

/// The length of the body by its head, or none if the head does not tell. Of lengths that
/// contradict each other the largest, and one that is no number counts as the largest there is:
/// whoever reads on may take any of them.
fn announced_body(head: &[u8]) -> Option<usize> {
    let end = find(head, b"\r\n\r\n").unwrap_or(head.len());
    let text = String::from_utf8_lossy(&head[..end]);
    let (mut bytes, mut in_chunks) = (0, false);
    for line in text.split("\r\n").skip(1) {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        in_chunks |= name.trim().eq_ignore_ascii_case("Transfer-Encoding");
        if name.trim().eq_ignore_ascii_case("Content-Length") {
            bytes = bytes.max(value.trim().parse().unwrap_or(usize::MAX));
        }
    }
    (!in_chunks || bytes > ANNOUNCED_BYTES_MAX).then_some(bytes)
}

fn wants_media_stream(head: &[u8]) -> bool {
    let path = head.strip_prefix(b"GET /media-stream").unwrap_or_default();
    [b" ".as_slice(), b"?", b"/ ", b"/?"].iter().any(|end| path.starts_with(end))
}

/// Carries one request to `tiny_http` and its answer back. `Connection: close`, put in as the
/// first header, keeps the next request from hiding behind this one.
fn pass_to_http(bridge: &Bridge, visit: &Arc<Visit>, head: &[u8]) -> io::Result<()> {
    let socket = &visit.socket;
    let inner = Arc::new(connect_to_http(bridge)?);
    inner.set_nodelay(true)?;
    for side in [&**socket, &*inner] {
        side.set_read_timeout(Some(REQUEST_WITHIN))?;
        side.set_write_timeout(Some(WRITE_WITHIN))?;
    }
    let line_end = find(head, b"\r\n").unwrap_or_default() + 2;
    let mut request = Vec::with_capacity(head.len() + 32);
    request.extend_from_slice(&head[..line_end]);
    request.extend_from_slice(b"Connection: close\r\n");
    request.extend_from_slice(&head[line_end..]);
    (&*inner).write_all(&request)?;

    let head_end = find(head, b"\r\n\r\n").map_or(head.len(), |end| end + 4);
    let to_come = announced_body(head).map(|bytes| bytes.saturating_sub(head.len() - head_end));
    if to_come == Some(0) {
        visit.is_decided();
    }
    let (visitor, to) = (Arc::clone(visit), Arc::clone(&inner));
    let body = spawn("request body".into(), move || pass_body(&visitor, &to, to_come))?;
    let answered = io::copy(&mut &*inner, &mut &**socket);
    shut(&inner);
    shut(socket);
    join(body);
    match answered {
        Ok(0) => Err(io::Error::other("it was not understood")),
        Err(error) if is_timeout(&error) => {
            Err(io::Error::other(format!("it took over {} s", REQUEST_WITHIN.as_secs())))
        }
        answered => answered.map(drop),
    }
}

/// Waits for a file descriptor, and for `tiny_http` while it is being started again.
fn connect_to_http(bridge: &Bridge) -> io::Result<TcpStream> {
    let deadline = Instant::now() + WRITE_WITHIN;
    loop {
        let http = lock(&bridge.http).clone().ok_or(io::ErrorKind::NotConnected)?;
        let address = http.server_addr().to_ip().ok_or(io::ErrorKind::AddrNotAvailable)?;
        match TcpStream::connect_timeout(&address, WRITE_WITHIN) {
            Err(error) if Instant::now() < deadline => {
                if error.kind() == io::ErrorKind::ConnectionRefused {
                    // Its accepting thread has ended, and nobody has told `recv`.
                    http.unblock();
                }
                // Nothing announces that a file descriptor is free.
                thread::sleep(ACCEPT_PAUSE);
            }
            connected => return connected,
        }
    }
}

/// What comes after the head, as far as the limits allow. The limit is a little above the one at
/// which the handler answers 413, so that the answer is said before the line is cut.
fn pass_body(visit: &Visit, mut to: &TcpStream, to_come: Option<usize>) {
    let deadline = Instant::now() + REQUEST_WITHIN;
    let mut chunk = [0; READ_BYTES];
    let mut total = 0;
    while total <= 2 * BODY_BYTES_MAX && Instant::now() < deadline {
        match (&*visit.socket).read(&mut chunk) {
            Ok(count) if count > 0 && to.write_all(&chunk[..count]).is_ok() => total += count,
            _ => break,
        }
        if to_come.is_some_and(|bytes| total >= bytes) {
            visit.is_decided();
        }
    }
    if to.shutdown(Shutdown::Write).is_err() {
        // The other side has closed already, which is where this was going.
    }
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

/// `tiny_http` stops accepting for good when file descriptors run out: with an error from `recv`,
/// or with a panic that only `connect_to_http` notices. So a new one takes its place, on a new
/// port.
fn start_http(bridge: &'static Bridge) -> io::Result<()> {
    let server = open_http(bridge)?;
    spawn("http".into(), move || serve_http(bridge, &server)).map(drop)
}

fn serve_http(bridge: &'static Bridge, server: &tiny_http::Server) {
    let error = loop {
        match server.recv() {
            Ok(request) => answer_aside(bridge, request),
            Err(error) => break error,
        }
    };
    log!(Error, "the web server stopped ({error}) and is started again");
    loop {
        thread::sleep(HTTP_PAUSE);
        if start_http(bridge).is_ok() {
            break;
        }
    }
    // What it has taken in is still answered: nobody else would, and its threads would wait for
    // that for ever.
    let deadline = Instant::now() + REQUEST_WITHIN;
    while Instant::now() < deadline {
        let left = deadline.saturating_duration_since(Instant::now());
        if let Ok(Some(request)) = server.recv_timeout(left) {
            answer_aside(bridge, request);
        }
    }
}

fn open_http(bridge: &Bridge) -> io::Result<Arc<tiny_http::Server>> {
    // It panics where no thread can be started.
    let opened = std::panic::catch_unwind(|| tiny_http::Server::http((Ipv4Addr::LOCALHOST, 0)));
    let server = opened.map_err(|_| io::Error::other("no thread"))?.map_err(io::Error::other)?;
    let server = Arc::new(server);
    *lock(&bridge.http) = Some(Arc::clone(&server));
    Ok(server)
}

fn answer_aside(bridge: &'static Bridge, request: tiny_http::Request) {
    if let Err(error) = spawn("request".into(), move || answer(bridge, request)) {
        log!(Error, "a request was dropped: {error}");
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

/// Tells that we live, and nothing else. A `nonce` comes back signed twice, by which `callbridge
/// check` knows whether an address leads to this process, and whether both have the same
/// `PUBLIC_URL`.
fn health(bridge: &Bridge, url: &str) -> Reply {
    let query = url.split_once('?').map(|(_, query)| query).unwrap_or_default();
    match Form::parse(query.as_bytes()).get("nonce") {
        "" => Reply::text(200, "ok"),
        nonce => Reply::text(200, &format!("ok {}", bridge.prove(nonce))),
    }
}

impl Bridge {
    fn prove(&self, nonce: &str) -> String {
        let address = hmac::Key::new(hmac::HMAC_SHA256, self.config.public_url.as_bytes());
        [&self.identity, &address]
            .map(|key| hex(hmac::sign(key, nonce.as_bytes()).as_ref()))
            .join(" ")
    }
}

struct Reply {
    status: u16,
    content_type: &'static str,
    /// Beside the content type.
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Reply {
    fn new(status: u16, content_type: &'static str, body: String) -> Reply {
        Reply { status, content_type, headers: Vec::new(), body: body.into_bytes() }
    }

    fn text(status: u16, text: &str) -> Reply {
        Reply::new(status, "text/plain; charset=utf-8", format!("{text}\n"))
    }

    fn json(status: u16, body: &Value) -> Reply {
        Reply::new(status, "application/json", format!("{body}\n"))
    }

    fn error(status: u16, what: &str) -> Reply {
        Reply::json(status, &json!({"error": what}))
    }

    fn twiml(body: String) -> Reply {
        Reply::new(200, "text/xml; charset=utf-8", body)
    }

    fn with(mut self, headers: impl IntoIterator<Item = (&'static str, String)>) -> Reply {
        self.headers.extend(headers);
        self
    }
}

// --- Ready for the next call -------------------------------------------------------
//
// A caller waits for the requests of steps 2 and 3, and a new connection would add a look-up and
// two handshakes to each. So every now and then each of the two parties is asked something small,
// over the connection that the next call will use. Ultravox's answer also tells whether it would
// take that call.

fn keep_ready(bridge: &'static Bridge) -> io::Result<()> {
    spawn("ultravox ready".into(), move || {
        let mut complaint = None;
        loop {
            let found = ask_ultravox_for_room(bridge).err().map(|failure| failure.to_string());
            bridge.agent_is_ready.store(found.is_none(), Ordering::Relaxed);
            match &found {
                Some(found) if complaint.as_ref() != Some(found) => {
                    log!(Warn, "a call could not be served now: {found}");
                }
                None if complaint.is_some() => log!(Info, "Ultravox would take a call again"),
                _ => {}
            }
            complaint = found;
            thread::sleep(ULTRAVOX_WARM_EVERY);
        }
    })?;
    if let Some(url) = &bridge.config.n8n_webhook_url {
        spawn("n8n ready".into(), move || {
            loop {
                if let Err(failure) = greet_n8n(bridge, url) {
                    // The call that meets it says what to do.
                    log!(Debug, "{failure}");
                }
                thread::sleep(N8N_WARM_EVERY);
            }
        })?;
    }
    Ok(())
}

/// `GET /api/accounts/me`: is the key right, and may one more call be created?
fn ask_ultravox_for_room(bridge: &Bridge) -> Result<(), Failure> {
    let config = &bridge.config;
    let answered = bridge
        .web
        .get(format!("{}/api/accounts/me", config.ultravox_api_url))
        .header("X-API-Key", config.ultravox_api_key.reveal())
        .config()
        .timeout_global(Some(WARM_WITHIN))
        .build()
        .call();
    let unreachable = |error| unreachable_party(Party::Ultravox, error, WARM_WITHIN);
    let mut response = answered.map_err(unreachable)?;
    let status = response.status().as_u16();
    let text = response
        .body_mut()
        .with_config()
        .limit(ULTRAVOX_REPLY_BYTES_MAX)
        .lossy_utf8(true)
        .read_to_string()
        .map_err(unreachable)?;
    if !(200..300).contains(&status) {
        let what = format!("{status} to a question about the account");
        return Err(Failure::new(Party::Ultravox, what).advise(ultravox_advice(status)));
    }
    let account: Value = serde_json::from_str(&text).unwrap_or_default();
    match (account["activeCalls"].as_u64(), account["allowedConcurrentCalls"].as_u64()) {
        (Some(active), Some(allowed)) if active >= allowed => {
            let what = format!("all {allowed} calls that the account allows at once are in use");
            Err(Failure::new(Party::Ultravox, what).advise("set MAX_CALLS to fit"))
        }
        _ => Ok(()),
    }
}

/// A preflight request of CORS: n8n answers it without running the workflow.
fn greet_n8n(bridge: &Bridge, url: &str) -> Result<(), Failure> {
    let answered = bridge
        .web
        .options(url)
        .header("Origin", &bridge.config.public_url)
        .config()
        .timeout_global(Some(WARM_WITHIN))
        .build()
        .call();
    let unreachable = |error| unreachable_party(Party::N8n, error, WARM_WITHIN);
    // Only an answer that was read to its end leaves the connection free for the next request.
    let mut response = answered.map_err(unreachable)?;
    let body = response.body_mut().with_config().limit(N8N_REPLY_BYTES_MAX).read_to_vec();
    body.map(drop).map_err(unreachable)
}

/// For a load balancer, or whoever watches: would the next caller be served? The log says why not.
fn ready(bridge: &Bridge) -> Reply {
    let is_full = bridge.calls.all().len() >= bridge.config.max_calls;
    let is_draining = bridge.draining.load(Ordering::SeqCst);
    if is_full || is_draining || !bridge.agent_is_ready.load(Ordering::Relaxed) {
        return Reply::text(503, "not ready");
    }
    Reply::text(200, "ready")
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

/// Who has called whom. The same word goes to the journal and to the page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum Direction {
    /// Somebody our number.
    #[default]
    In,
    /// We somebody.
    Out,
    /// The owner us, with the phone in the live page.
    Browser,
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
    call.journal.note(&json!({
        "event": "ring",
        "callSid": call.sid,
        "number": call.number,
        "direction": direction,
    }));
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
            call.hang_up(HangUp::NoAgent);
            cannot_serve(call.bridge, &call.bridge.agent.phrases.apology)
        }
    };
    call.journal.note(&json!({"event": "answer", "ms": ms, "what": answer.word()}));
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

fn read_body(bridge: &Bridge, request: &mut tiny_http::Request) -> Result<Vec<u8>, Reply> {
    let mut body = Vec::new();
    let limit = BODY_BYTES_MAX as u64 + 1;
    if let Err(error) = request.as_reader().take(limit).read_to_end(&mut body) {
        log!(Warn, "{}: the body did not arrive: {error}", request.url());
        bridge.metrics.refused("no_body");
        return Err(Reply::error(400, "the body did not arrive"));
    }
    if body.len() > BODY_BYTES_MAX {
        log!(Warn, "{}: the body is longer than {BODY_BYTES_MAX} bytes", request.url());
        bridge.metrics.refused("long_body");
        return Err(Reply::error(413, "the body is too long"));
    }
    Ok(body)
}

/// A form body: name and value pairs, decoded, in the order in which they came.
struct Form(Vec<(String, String)>);

impl Form {
    fn parse(body: &[u8]) -> Form {
        Form(form_urlencoded::parse(body).into_owned().collect())
    }

    /// The first value of that name, or nothing: fields may be missing or empty.
    fn get(&self, name: &str) -> &str {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
            .unwrap_or_default()
    }

    /// What tells of the call, for the eye. Among the rest there is a token of Twilio's.
    fn for_the_eye(&self) -> String {
        const SHOWN: [&str; 5] = ["CallSid", "From", "To", "CallStatus", "Direction"];
        let lines = self.0.iter().filter(|(name, _)| SHOWN.contains(&name.as_str()));
        let lines: Vec<String> = lines.map(|(name, value)| format!("{name}={value}")).collect();
        format!("{}\n… and {} more", lines.join("\n"), self.0.len() - lines.len())
    }
}

/// Twilio's signature: base64 of HMAC-SHA1, keyed with the account's Auth Token, over the URL it
/// called and, for a form, every name and value, sorted by name and put together without anything
/// between. Twilio leaves the port out of what it signs; its own libraries accept both ways, and
/// so does this (twilio.com/docs/usage/security#validating-requests).
fn signature_is_valid(token: &Secret, url: &str, form: &Form, signature: &str) -> bool {
    let Ok(signature) = BASE64.decode(signature) else {
        return false;
    };
    let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, token.reveal().as_bytes());
    // A name that comes twice is signed once for each different value.
    let mut pairs: Vec<(&str, &str)> =
        form.0.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    pairs.sort_unstable();
    pairs.dedup();
    let rest: String = pairs.into_iter().flat_map(|(name, value)| [name, value]).collect();
    url_with_and_without_port(url).iter().any(|url| {
        // `verify` compares in constant time.
        hmac::verify(&key, format!("{url}{rest}").as_bytes(), &signature).is_ok()
    })
}

fn url_with_and_without_port(url: &str) -> [String; 2] {
    let Some((scheme, rest)) = url.split_once("://") else {
        return [url.to_owned(), url.to_owned()];
    };
    let host_end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(host_end);
    let host_start = authority.rfind('@').map_or(0, |at| at + 1);
    let (user, host_and_port) = authority.split_at(host_start);
    let has_port = |colon: usize| host_and_port[colon + 1..].bytes().all(|b| b.is_ascii_digit());
    let (host, port) = match host_and_port.rfind(':').filter(|&colon| has_port(colon)) {
        Some(colon) => (&host_and_port[..colon], &host_and_port[colon + 1..]),
        None => (host_and_port, if matches!(scheme, "https" | "wss") { "443" } else { "80" }),
    };
    [format!("{scheme}://{user}{host}{path}"), format!("{scheme}://{user}{host}:{port}{path}")]
}

/// A call's id becomes part of a file's name, so it is letters and digits and nothing else.
fn is_sid(text: &str) -> bool {
    (2..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

/// All calls there are. Its length is the number of lines in use.
#[derive(Default)]
struct Calls {
    list: Mutex<CallList>,
    one_less: Condvar,
}

#[derive(Default)]
struct CallList {
    live: HashMap<String, Arc<Call>>,
    /// The latest ends, oldest first: a `/stream-ended` may come after its call is gone.
    ended: VecDeque<(String, HangUp)>,
    last_end: Option<Instant>,
    /// When each number has called within the last hour.
    recent: HashMap<String, Vec<Instant>>,
}

enum Slot {
    Yours(Arc<Call>, CallSlot),
    Known(Arc<Call>),
    None,
}

/// A place among `MAX_CALLS`. Dropping it gives the place back.
struct CallSlot(Arc<Call>);

impl Calls {
    /// Counted and taken under one lock, so that `MAX_CALLS` is exact however many ring at once.
    fn take_slot(&self, sid: &str, new_call: impl FnOnce() -> Call) -> Slot {
        let mut list = lock(&self.list);
        if let Some(call) = list.live.get(sid) {
            return Slot::Known(Arc::clone(call));
        }
        let call = new_call();
        if list.live.len() >= call.bridge.config.max_calls {
            return Slot::None;
        }
        let call = Arc::new(call);
        list.live.insert(sid.to_owned(), Arc::clone(&call));
        Slot::Yours(Arc::clone(&call), CallSlot(call))
    }

    /// Counts this call. Only real numbers: the anonymous are not one caller.
    fn is_too_often(&self, bridge: &Bridge, number: &str) -> bool {
        const HOUR: Duration = Duration::from_hours(1);
        if !is_e164(number) {
            return false;
        }
        let recent = &mut lock(&self.list).recent;
        recent.retain(|_, times| {
            times.retain(|time| time.elapsed() < HOUR);
            !times.is_empty()
        });
        let times = recent.entry(number.to_owned()).or_default();
        let too_often = times.len() >= bridge.config.calls_per_number_per_hour;
        if !too_often {
            times.push(Instant::now());
        }
        too_often
    }

    fn await_none(&self, within: Duration) {
        let list = lock(&self.list);
        let waited = self.one_less.wait_timeout_while(list, within, |list| !list.live.is_empty());
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// A call that has ended may still be filing itself. What Twilio has to say of it waits.
    fn await_filed(&self, sid: &str) {
        let list = lock(&self.list);
        let filing = |list: &mut CallList| list.live.get(sid).is_some_and(|call| call.is_over());
        let waited = self.one_less.wait_timeout_while(list, FILED_WITHIN, filing);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn since_last_end(&self) -> Duration {
        lock(&self.list).last_end.map_or(Duration::MAX, |last_end| last_end.elapsed())
    }

    fn all(&self) -> Vec<Arc<Call>> {
        lock(&self.list).live.values().cloned().collect()
    }

    fn find(&self, sid: &str) -> Option<Arc<Call>> {
        lock(&self.list).live.get(sid).cloned()
    }

    /// Is, or was, this a call of this process?
    fn knows(&self, sid: &str) -> bool {
        let list = lock(&self.list);
        list.live.contains_key(sid) || list.ended.iter().any(|(ended, _)| ended == sid)
    }

    fn how_it_ended(&self, sid: &str) -> Option<HangUp> {
        let list = lock(&self.list);
        let live = list.live.get(sid).and_then(|call| lock(&call.state).hang_up);
        live.or_else(|| {
            list.ended.iter().rev().find(|(ended, _)| ended == sid).map(|(_, how)| *how)
        })
    }
}

impl Drop for CallSlot {
    fn drop(&mut self) {
        let how = lock(&self.0.state).hang_up.unwrap_or(HangUp::NoAgent);
        let calls = &self.0.bridge.calls;
        let mut list = lock(&calls.list);
        list.live.remove(&self.0.sid);
        if list.ended.len() >= ENDED_CALLS_MAX {
            list.ended.pop_front();
        }
        list.ended.push_back((self.0.sid.clone(), how));
        list.last_end = Some(Instant::now());
        drop(list);
        calls.one_less.notify_all();
    }
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
    hang_up: Option<HangUp>,
    /// Twilio has said `stop` before we have closed the stream: there is no caller any more.
    stopped: bool,
    /// We have closed the stream, or are about to.
    said_goodbye: bool,
}

/// How a call ended. The same word goes to the log, the journal and n8n.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HangUp {
    /// There was nobody to answer: Ultravox refused, or could not be reached.
    NoAgent,
    /// The caller went away while it rang, or Twilio never opened the stream.
    NeverStreamed,
    CallerLeft,
    /// The caller's socket broke, or fell silent.
    CallerLost,
    /// The agent said goodbye and used its hang-up tool.
    AgentHungUp,
    /// Ultravox closed in an orderly way: nobody spoke for long, or its time limit.
    AgentLeft,
    /// Ultravox's socket broke.
    AgentLost,
    /// `MAX_CALL_SECONDS`.
    TooLong,
    /// The caller was put through to a person.
    Transferred,
    /// An answering machine has picked up our call.
    Machine,
    /// This process was told to stop, and the call did not end by itself in time.
    ShuttingDown,
    /// The process that carried it died, and nobody took the call up again.
    ProcessDied,
}

impl HangUp {
    const ALL: [HangUp; 12] = [
        HangUp::NoAgent,
        HangUp::NeverStreamed,
        HangUp::CallerLeft,
        HangUp::CallerLost,
        HangUp::AgentHungUp,
        HangUp::AgentLeft,
        HangUp::AgentLost,
        HangUp::TooLong,
        HangUp::Transferred,
        HangUp::Machine,
        HangUp::ShuttingDown,
        HangUp::ProcessDied,
    ];
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
            journal: Journal::at(Journal::path(&bridge.config.data_dir, incoming.sid)),
            shown: AtomicU64::new(0),
            loud_at_ms: AtomicU64::new(0),
            tool_answers: Mutex::default(),
            tools_running: AtomicUsize::new(0),
        }
    }

    /// The same call, from what a process that is gone (or a transfer that failed) has left of it.
    fn from_journal(bridge: &'static Bridge, path: PathBuf, filed: Filed) -> Call {
        let incoming = IncomingCall {
            sid: &filed.sid,
            number: &filed.number,
            direction: filed.direction,
            first_message: String::new(),
            wire: String::new(),
        };
        let mut call = Call::new(bridge, &incoming);
        call.began = filed.began.unwrap_or(call.began);
        {
            let mut state = lock(&call.state);
            if bridge.agent.stages.contains_key(&filed.stage) {
                state.stage = filed.stage;
            }
            state.agent_id = filed.agent_id;
            state.agents = filed.agents;
        }
        call.rang = Instant::now().checked_sub(filed.age).unwrap_or(call.rang);
        call.transcript = Mutex::new(filed.transcript);
        call.journal = Journal::at(path);
        call
    }

    /// The one way down. The first reason counts; the agent's socket is closed at once, so that
    /// nobody is listened to, or billed, after the end.
    fn hang_up(&self, why: HangUp) {
        let agent = {
            let mut state = lock(&self.state);
            if state.hang_up.is_some() {
                return;
            }
            state.hang_up = Some(why);
            state.token = None;
            state.agent.take()
        };
        let (ended_by, ms) = (format!("{why:?}"), millis(self.rang.elapsed()));
        let seconds = ms / 1_000;
        log!(self, Info, Goodbye, "{ended_by}, {seconds} s after it rang"; ended_by, seconds);
        let event = json!({"event": "goodbye", "endedBy": ended_by, "ms": ms});
        self.journal.note(&event);
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

// --- 1b. A call that goes out -------------------------------------------------------
//
// `POST /outgoing-call` rings a person through Twilio's REST API. When they pick up, Twilio asks
// `/incoming-call` as it does for every call, and from there on all is the same.

/// Outgoing calls that ring, by the id we have put into their webhook's address, each with the
/// greeting that was asked for.
#[derive(Default)]
struct Ringing(Mutex<HashMap<String, (Instant, String)>>);

impl Ringing {
    fn add(&self, first_message: &str) -> Option<String> {
        let mut ringing = lock(&self.0);
        ringing.retain(|_, (since, _)| since.elapsed() < RINGING_MAX);
        if ringing.len() >= RINGING_AT_ONCE_MAX {
            return None;
        }
        let id = random_hex();
        ringing.insert(id.clone(), (Instant::now(), first_message.to_owned()));
        Some(id)
    }

    /// Is this call one of ours, and what is it to be greeted with? Empty: as usual.
    fn take(&self, id: &str) -> Option<String> {
        lock(&self.0).remove(id).map(|(_, first_message)| first_message)
    }
}

/// `{"phoneNumber":"+49…","firstMessage":"…"}`, the second one optional. 201 with `callSid`, or an
/// error with `error`, and Twilio's `code` where Twilio has refused.
fn outgoing_call(bridge: &'static Bridge, _url: &str, order: &Value) -> Reply {
    let number = order["phoneNumber"].as_str().unwrap_or_default();
    let first_message = order["firstMessage"].as_str().unwrap_or_default().trim();
    if !is_e164(number) {
        return Reply::error(400, "phoneNumber must be like +4930123456");
    }
    if first_message.chars().count() > GREETING_CHARS_MAX {
        return Reply::error(400, &format!("firstMessage is over {GREETING_CHARS_MAX} characters"));
    }
    if !bridge.config.outgoing_allow.iter().any(|prefix| number.starts_with(prefix)) {
        log!(Warn, "an outgoing call to {} was refused", shorten_number(number));
        bridge.metrics.refused("not_allowed");
        return Reply::error(403, "OUTGOING_ALLOW has no beginning of this number");
    }
    if bridge.draining.load(Ordering::SeqCst) {
        return Reply::error(503, "this process is about to end");
    }
    if bridge.calls.all().len() >= bridge.config.max_calls {
        return Reply::error(503, "all lines are busy (MAX_CALLS)");
    }
    let Some(id) = bridge.ringing.add(first_message) else {
        return Reply::error(503, "too many outgoing calls ring already");
    };
    match ring_through_twilio(bridge, number, &id) {
        Ok(sid) => {
            log!(Sid { sid: &sid }, Info, Ring, "ringing {}", shorten_number(number));
            Reply::json(201, &json!({"callSid": sid}))
        }
        Err(reply) => {
            bridge.ringing.take(&id);
            reply
        }
    }
}

fn ring_through_twilio(bridge: &Bridge, number: &str, id: &str) -> Result<String, Reply> {
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

fn read_twilio_answer(
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

/// What belongs to the owner alone asks for `API_TOKEN`: as `Bearer`, or as the password of
/// `Basic`, which browsers can. Without the setting there is nothing here.
fn from_owner(
    bridge: &'static Bridge,
    request: &tiny_http::Request,
    handle: fn(&'static Bridge, &tiny_http::Request) -> Reply,
) -> Reply {
    match refusal_of_stranger(bridge, request) {
        Some(refusal) => refusal,
        None => handle(bridge, request).with(private()),
    }
}

/// The same with a JSON body, for all that costs money: it must come from nowhere but our page or
/// a program of the owner's.
fn order_from_owner(
    bridge: &'static Bridge,
    request: &mut tiny_http::Request,
    handle: fn(&'static Bridge, &str, &Value) -> Reply,
) -> Reply {
    if let Some(refusal) =
        refusal_of_stranger(bridge, request).or_else(|| refusal_of_other_site(bridge, request))
    {
        return refusal;
    }
    let body = match read_body(bridge, request) {
        Ok(body) => body,
        Err(reply) => return reply,
    };
    match serde_json::from_slice(&body) {
        Ok(order) => handle(bridge, request.url(), &order).with(private()),
        Err(error) => {
            log!(Warn, "{}: the body is not JSON: {error}", request.url());
            bridge.metrics.refused("not_json");
            Reply::error(400, &format!("the body is not JSON: {error}"))
        }
    }
}

fn refusal_of_stranger(bridge: &Bridge, request: &tiny_http::Request) -> Option<Reply> {
    let Some(token) = &bridge.config.api_token else {
        return Some(Reply::text(404, "there is nothing here"));
    };
    let shown = shown_token(header(request, "Authorization")).unwrap_or_default();
    if bool::from(token.reveal().as_bytes().ct_eq(shown.as_bytes())) {
        return None;
    }
    bridge.metrics.refused("api_token");
    if header(request, "Authorization").is_empty() {
        // So every browser begins.
        log!(Debug, "{}: API_TOKEN is asked for", path_of(request));
    } else {
        log!(Warn, "{}: API_TOKEN is missing or wrong", path_of(request));
    }
    let ask = ("WWW-Authenticate", "Basic realm=\"callbridge\", charset=\"UTF-8\"".to_owned());
    let error = "send API_TOKEN as Authorization: Bearer … (a browser: as password, any user name)";
    Some(Reply::error(401, error).with([ask]))
}

/// A browser adds the password that it has stored to whatever any site makes it send here. So what
/// another site has sent is refused, and so is a body that a mere form could send: for JSON a
/// browser asks us first, and we say nothing. A Bearer token is never added by itself.
fn refusal_of_other_site(bridge: &Bridge, request: &tiny_http::Request) -> Option<Reply> {
    let origin = header(request, "Origin");
    let authority = |url: &str| {
        let (_, rest) = url.split_once("://")?;
        rest.split('/').next().map(str::to_ascii_lowercase)
    };
    let ours = [
        authority(&bridge.config.public_url),
        authority(&format!("://{}", header(request, "Host"))),
    ];
    let same_origin = match header(request, "Sec-Fetch-Site") {
        "same-origin" | "none" => true,
        "" => {
            origin.is_empty()
                || authority(origin).is_some_and(|origin| ours.contains(&Some(origin)))
        }
        _ => false,
    };
    if !same_origin {
        log!(Warn, "{}: refused, another site has sent it", path_of(request));
        bridge.metrics.refused("other_site");
        return Some(Reply::error(403, "another site may not do that"));
    }
    let by_password = !starts_with_word(header(request, "Authorization"), "bearer");
    let kind = header(request, "Content-Type").split(';').next().unwrap_or_default().trim();
    if by_password && !kind.eq_ignore_ascii_case("application/json") {
        bridge.metrics.refused("not_json");
        return Some(Reply::error(415, "send Content-Type: application/json"));
    }
    None
}

/// For all that only the owner may see.
fn private() -> [(&'static str, String); 4] {
    [
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
    ]
    .map(|(name, value)| (name, value.to_owned()))
}

fn header<'a>(request: &'a tiny_http::Request, name: &'static str) -> &'a str {
    let found = request.headers().iter().find(|header| header.field.equiv(name));
    found.map(|header| header.value.as_str()).unwrap_or_default()
}

fn path_of(request: &tiny_http::Request) -> &str {
    request.url().split('?').next().unwrap_or_default()
}

fn starts_with_word(text: &str, word: &str) -> bool {
    text.split(' ').next().is_some_and(|first| first.eq_ignore_ascii_case(word))
}

fn shown_token(header: &str) -> Option<String> {
    let (scheme, rest) = header.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(rest.trim().to_owned());
    }
    let login = BASE64.decode(rest.trim()).ok().filter(|_| scheme.eq_ignore_ascii_case("basic"))?;
    let login = String::from_utf8(login).ok()?;
    login.split_once(':').map(|(_, password)| password.to_owned())
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
    call.journal.note(&json!({"event": "greeting", "from": from, "ms": ms, "why": why}));
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

/// A question to n8n. On the wire:
///
/// ```text
/// POST N8N_WEBHOOK_URL
/// Content-Type: application/json
/// Idempotency-Key: CA9f3c…-1
/// X-Callbridge-Signature: sha256=<hex HMAC-SHA256 of the body>     (with N8N_HMAC_SECRET)
///
/// {"route":"1","number":"+4930123456","data":"empty","callSid":"CA9f3c…"}
/// ```
struct ToN8n<'a> {
    sid: &'a str,
    number: &'a str,
    /// `1` greeting, `2` transcript, `3` booking, or a tool's own.
    route: &'a str,
    data: &'a str,
    /// The same for every try at the same thing: delivery is at least once.
    key: String,
    /// With a transcript: how the call ended.
    ended_by: Option<&'a str>,
}

impl ToN8n<'_> {
    fn for_the_eye(&self) -> String {
        format!("POST N8N_WEBHOOK_URL\nIdempotency-Key: {}\n\n{}", self.key, self.body())
    }

    fn body(&self) -> Value {
        let mut body = json!({
            "route": self.route,
            "number": self.number,
            "data": self.data,
            "callSid": self.sid,
        });
        if let Some(ended_by) = self.ended_by {
            body["endedBy"] = json!(ended_by);
        }
        body
    }
}

/// What n8n answered. Even a 2xx may mean that the workflow failed.
struct N8nReply {
    status: u16,
    body: String,
}

impl N8nReply {
    fn for_the_eye(&self) -> String {
        format!("{}\n\n{}", self.status, self.body)
    }
}

/// What `understand` makes of n8n's answer.
fn ask_n8n<T>(
    bridge: &Bridge,
    question: &ToN8n,
    within: Duration,
    understand: impl Fn(&N8nReply) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let began = Instant::now();
    let posted = post_to_n8n(bridge, question, within);
    let took = began.elapsed();
    let (outcome, answer) = match posted {
        Err(failure) => (if took >= within { "late" } else { "failed" }, Err(failure)),
        Ok(reply) => match understand(&reply) {
            Ok(answer) => ("answered", Ok(answer)),
            Err(why) if (200..300).contains(&reply.status) => ("nonsense", Err(why)),
            Err(why) => ("refused", Err(why)),
        },
    };
    bridge.metrics.n8n_requests.of(&[question.route, outcome]).add();
    bridge.metrics.n8n_time.of(&[question.route]).observe(took);
    answer
}

fn post_to_n8n(bridge: &Bridge, question: &ToN8n, within: Duration) -> Result<N8nReply, Failure> {
    let Some(url) = &bridge.config.n8n_webhook_url else {
        return Err(Failure::new(Party::N8n, "N8N_WEBHOOK_URL is not set").certainly_not_done());
    };
    let body = question.body().to_string();
    let mut request = bridge
        .web
        .post(url)
        .header("Content-Type", "application/json")
        .header("Idempotency-Key", &question.key);
    if let Some(secret) = &bridge.config.n8n_hmac_secret {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret.reveal().as_bytes());
        let signature = format!("sha256={}", hex(hmac::sign(&key, body.as_bytes()).as_ref()));
        request = request.header("X-Callbridge-Signature", signature);
    }
    if let Some((name, value)) = &bridge.config.n8n_auth_header {
        request = request.header(name, value.reveal());
    }
    let answered = request.config().timeout_global(Some(within)).build().send(body);
    let mut response = answered.map_err(|error| unreachable_party(Party::N8n, error, within))?;
    let status = response.status().as_u16();
    let limited = response
        .body_mut()
        .with_config()
        .limit(N8N_REPLY_BYTES_MAX)
        .lossy_utf8(true)
        .read_to_string();
    match limited {
        // An answer that is used is taken as it is; one that is refused will be quoted.
        Ok(body) if (200..300).contains(&status) => Ok(N8nReply { status, body }),
        Ok(body) => Ok(N8nReply { status, body: bridge.config.hide_secrets(body) }),
        Err(error) => Err(unreachable_party(Party::N8n, error, within)),
    }
}

/// `null` is an answer too: nothing is known about this caller, so that the agent's own first
/// message need not be repeated in n8n.
fn read_greeting(reply: &N8nReply) -> Result<Option<String>, Failure> {
    let body = serde_json::from_str::<Value>(&reply.body).unwrap_or_default();
    let answer = body.get(0).unwrap_or(&body);
    if n8n_refusal(reply).is_none() && answer.get("firstMessage").is_some_and(Value::is_null) {
        return Ok(None);
    }
    understand_reply(reply, "firstMessage").map(Some)
}

/// Finds the text in a reply: an object, a list with one object (n8n's "All Entries"), or plain
/// text. Everything else is explained, with what to do about it.
fn understand_reply(reply: &N8nReply, field: &str) -> Result<String, Failure> {
    if let Some(refusal) = n8n_refusal(reply) {
        return Err(refusal);
    }
    let odd = |what: &str, advice: &'static str| {
        Err(Failure::new(Party::N8n, format!("{} with {what}", reply.status)).advise(advice))
    };
    let text = reply.body.trim();
    if text.is_empty() {
        return odd(
            "an empty body",
            "the workflow failed, or took a branch without a Respond node: see n8n's Executions",
        );
    }
    let value = match serde_json::from_str::<Value>(text) {
        Ok(Value::Array(items)) => items.into_iter().next().unwrap_or_default(),
        Ok(value) => value,
        // Never to be read out: the caller would hear brackets and quotes.
        Err(_) if text.starts_with(['{', '[']) => {
            return odd(
                "broken JSON",
                "a quote or line break in a template: use JSON.stringify in the workflow",
            );
        }
        Err(_) if text.starts_with('<') => {
            return odd("HTML", "N8N_WEBHOOK_URL must be the webhook's production URL");
        }
        Err(_) => Value::String(text.to_owned()),
    };
    let found = match &value {
        Value::String(text) => Some(text.as_str()),
        Value::Object(fields) => fields.get(field).and_then(Value::as_str),
        _ => None,
    };
    match found.map(str::trim) {
        Some("Workflow was started" | "Workflow got started") => immediately(reply),
        Some("") => odd(&format!("an empty {field}"), "give it a text in the workflow"),
        Some(text) => Ok(text.to_owned()),
        None if value["message"].as_str().is_some_and(|text| text.starts_with("Workflow ")) => {
            immediately(reply)
        }
        None if value.get("webhookUrl").is_some() => odd(
            "its own input",
            "the workflow echoes the Webhook node: answer with a Respond to Webhook node",
        ),
        None => odd(
            &format!("no text named {field}"),
            "answer {\"firstMessage\": …} to route 1 and {\"message\": …} to tools",
        ),
    }
}

const RESPOND_BY_NODE: &str =
    "set the Webhook node's Respond to \"Using 'Respond to Webhook' Node\"";

fn immediately(reply: &N8nReply) -> Result<String, Failure> {
    let what = format!("{} before the workflow ran", reply.status);
    Err(Failure::new(Party::N8n, what).advise(RESPOND_BY_NODE))
}

/// The refusals of n8n, told apart by what n8n 2.8 and 2.40 were seen to answer.
fn n8n_refusal(reply: &N8nReply) -> Option<Failure> {
    let has = |words: &str| reply.body.contains(words);
    let (advice, done) = match reply.status {
        200..=299 => return None,
        // A proxy redirects before the workflow has run, a Respond node after it.
        300..=399 => ("it redirects: set N8N_WEBHOOK_URL to the address it leads to", true),
        404 if has("Execute workflow") => {
            ("N8N_WEBHOOK_URL is the test URL: use the production URL, /webhook/…", false)
        }
        404 if has("must be active") => {
            ("activate (publish) the workflow, or correct the path in N8N_WEBHOOK_URL", false)
        }
        404 if has("Did you mean to make a") => {
            ("set the Webhook node's HTTP method to POST", false)
        }
        404 if has("Cannot POST") => {
            ("not a webhook's address, or n8n is still starting: check N8N_WEBHOOK_URL", false)
        }
        // Anything else may be a workflow's own 404.
        404 => ("there is no webhook, or the workflow says so: check N8N_WEBHOOK_URL", true),
        401 | 403 if has("IP is not allowed") => {
            ("add this server to the Webhook node's IP allowlist", false)
        }
        // These two are what the workflow of `callbridge workflow` answers.
        400 if has("unknown route") => {
            ("no branch for this route: callbridge workflow prints one for each tool", false)
        }
        401 if has("the signature is") => {
            ("N8N_HMAC_SECRET and the field of the workflow's node Secret must be the same", false)
        }
        401 | 403 => (
            "the Webhook node wants authentication: set N8N_AUTH_HEADER as in its Header Auth",
            false,
        ),
        422 if has("Failed to parse request body") => {
            ("n8n could not read the body: is the URL an n8n webhook?", false)
        }
        500 if has("Unused Respond to Webhook node") => (RESPOND_BY_NODE, true),
        500 if has("No Respond to Webhook node") => {
            ("let each branch of the workflow end in a Respond to Webhook node", true)
        }
        429 | 502 | 503 => ("n8n is busy or down", reply.status != 429),
        _ => ("the workflow failed: see n8n's Executions", true),
    };
    let hint: String = reply.body.chars().filter(|c| !c.is_control()).take(120).collect();
    let failure = Failure::new(Party::N8n, format!("{} {hint}", reply.status).trim().to_owned())
        .advise(advice);
    Some(if done { failure } else { failure.certainly_not_done() })
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

/// What a new agent is told that takes over from one whose line broke.
const LINE_BROKE: &str = "(The line was interrupted for a moment and is back. Say so briefly, \
    do not greet again, and go on exactly where the conversation was.)";
/// What it is told when a transfer came to nothing.
const NOBODY_ANSWERED: &str = "(The caller was to be put through to a person, but nobody answered. \
    Tell them so, apologise, do not greet again, and offer to help or to take a note.)";

/// What we keep of the 201: `{"callId":"7c21…","joinUrl":"wss://…", …}`.
struct AgentCall {
    id: String,
    /// Whoever holds it may join the call.
    join_url: Secret,
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
    call.journal.note(&json!({"event": "agent", "callId": created.id, "agent": number}));
    call.show(Exhibit::Create, || agent_call_for_the_eye(&body));
    call.show(Exhibit::Created, || {
        let join_url = host_only(created.join_url.reveal());
        format!("201\n\n{}", json!({"callId": created.id, "joinUrl": join_url}))
    });
    Ok(created)
}

fn post_agent_call(
    call: &Call,
    query: &str,
    body: &Value,
    deadline: Instant,
) -> Result<AgentCall, Failure> {
    let body = body.to_string();
    let mut first_try = true;
    loop {
        let reply = ask_ultravox(call.bridge, query, &body, deadline)?;
        let status = reply.status;
        let pause = reply.retry_after.unwrap_or(BUSY_RETRY_WITHIN / 2);
        if matches!(status, 429 | 503) && first_try && pause <= BUSY_RETRY_WITHIN {
            first_try = false;
            let ms = pause.as_millis();
            log!(call, Warn, Agent, "Ultravox is busy ({status}); trying once more in {ms} ms");
            // The only thing that could be waited for is the time Ultravox itself has named.
            thread::sleep(pause);
            continue;
        }
        return if status == 201 || status == 200 {
            read_agent_call(&reply.text)
        } else {
            Err(ultravox_refusal(status, &call.bridge.config.hide_secrets(reply.text)))
        };
    }
}

struct UltravoxReply {
    status: u16,
    retry_after: Option<Duration>,
    text: String,
}

fn ask_ultravox(
    bridge: &Bridge,
    query: &str,
    body: &str,
    deadline: Instant,
) -> Result<UltravoxReply, Failure> {
    let began = Instant::now();
    let posted = post_to_ultravox(bridge, query, body, deadline);
    let outcome = match &posted {
        Ok(UltravoxReply { status: 200 | 201, .. }) => "created",
        Ok(UltravoxReply { status: 429 | 503, .. }) => "busy",
        Ok(_) => "refused",
        Err(_) if Instant::now() >= deadline => "late",
        Err(_) => "failed",
    };
    bridge.metrics.ultravox_creates.of(&[outcome]).add();
    bridge.metrics.ultravox_time.of(&[]).observe(began.elapsed());
    posted
}

fn post_to_ultravox(
    bridge: &Bridge,
    query: &str,
    body: &str,
    deadline: Instant,
) -> Result<UltravoxReply, Failure> {
    let config = &bridge.config;
    let unreachable = |error| unreachable_party(Party::Ultravox, error, AGENT_WITHIN);
    let answered = bridge
        .web
        .post(format!("{}/api/calls{query}", config.ultravox_api_url))
        .header("X-API-Key", config.ultravox_api_key.reveal())
        .header("Content-Type", "application/json")
        .config()
        .timeout_global(Some(deadline.saturating_duration_since(Instant::now())))
        .build()
        .send(body);
    let mut response = answered.map_err(unreachable)?;
    let retry_after = response.headers().get("Retry-After").and_then(|value| value.to_str().ok());
    let retry_after = retry_after.and_then(|text| text.trim().parse().ok());
    let text = response
        .body_mut()
        .with_config()
        .limit(ULTRAVOX_REPLY_BYTES_MAX)
        .lossy_utf8(true)
        .read_to_string()
        .map_err(unreachable)?;
    Ok(UltravoxReply {
        status: response.status().as_u16(),
        retry_after: retry_after.map(Duration::from_secs),
        text,
    })
}

/// The long texts of the body are cut short, and of the tools the first one stands for all.
fn agent_call_for_the_eye(body: &Value) -> String {
    format!("POST /api/calls\nX-API-Key: ***\n\n{:#}", in_short(body.clone()))
}

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

fn read_agent_call(text: &str) -> Result<AgentCall, Failure> {
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

fn ultravox_refusal(status: u16, text: &str) -> Failure {
    // The shape of an error's body is not documented, so its beginning is shown as it is.
    let hint: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
    let what = format!("could not create the agent's call: {status} {hint}");
    let failure = Failure::new(Party::Ultravox, what.trim_end()).advise(ultravox_advice(status));
    Failure { refused: matches!(status, 400 | 404 | 409 | 422), ..failure }
}

fn ultravox_advice(status: u16) -> &'static str {
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

fn selected_tools(bridge: &Bridge, stage: &Stage) -> Vec<Value> {
    let tools = stage.tools.iter().filter_map(|name| Some((name, bridge.agent.tools.get(name)?)));
    tools.map(|(name, tool)| selected_tool(bridge, name, tool)).collect()
}

fn selected_tool(bridge: &Bridge, name: &str, tool: &Tool) -> Value {
    if let ToolAction::Ultravox { tool: built_in, parameter_overrides } = &tool.action {
        let mut overrides = parameter_overrides.clone();
        if let Some(corpus) =
            bridge.config.ultravox_corpus_id.as_ref().filter(|_| built_in == "queryCorpus")
        {
            overrides.insert("corpus_id".into(), json!(corpus));
        }
        return json!({
            "toolName": built_in,
            "nameOverride": name,
            "descriptionOverride": tool.description,
            "parameterOverrides": overrides,
        });
    }
    let required = &tool.parameters.required;
    let parameters = tool.parameters.properties.iter().map(|(parameter, schema)| {
        let mut schema = schema.clone();
        if tool.calendar_parameter() == Some(parameter) {
            schema["enum"] = bridge.agent.calendars.keys().cloned().collect();
        }
        json!({
            "name": parameter,
            "location": "PARAMETER_LOCATION_BODY",
            "schema": schema,
            "required": required.contains(parameter),
        })
    });
    json!({"temporaryTool": {
        "modelToolName": name,
        "description": tool.description,
        "dynamicParameters": parameters.collect::<Vec<_>>(),
        // Longer than we ever take: a result that comes too late is thrown away, and the model
        // asks again.
        "timeout": format!("{}s", (tool.within + TOOL_MARGIN).as_secs()),
        "client": {},
    }})
}

impl Tool {
    /// The parameter that names a calendar, if this tool has one.
    fn calendar_parameter(&self) -> Option<&String> {
        match &self.action {
            ToolAction::N8n { calendar, .. } => calendar.as_ref(),
            ToolAction::EnterStage { .. }
            | ToolAction::Reply(_)
            | ToolAction::HangUp(_)
            | ToolAction::Transfer(_)
            | ToolAction::Ultravox { .. } => None,
        }
    }
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
fn converse(call: &Arc<Call>, mut agent: Arc<Duplex>) -> HangUp {
    let mut resumes = 0;
    'conversation: loop {
        if !await_caller(call, STREAM_WITHIN) && !call.is_over() {
            agent.close(CloseCode::Normal, "nobody came");
            return HangUp::NeverStreamed;
        }
        // Also if it is over already: what the agent has said by then belongs to the transcript.
        let why = relay_agent_to_caller(call, &agent);
        if why != HangUp::AgentLost {
            // A cut without a goodbye would be a fault of the line in Ultravox's eyes.
            agent.close(CloseCode::Normal, "the call is over");
        }
        agent.shut();
        while why == HangUp::AgentLost && !call.is_over() && resumes < RESUMES_MAX {
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

/// When the stream ends, Twilio asks `/stream-ended` what comes next; `<Hangup/>` stands behind it
/// in case that fails. `<Parameter>` allows 500 characters; the token takes 37.
///
/// The `action` carries Twilio's connection overrides behind the `#`: five more tries when nobody
/// accepts or a proxy reports a failure, which bridges our restart of a second or two.
fn twiml_connect_stream(public_url: &str, token: &str) -> String {
    let action = format!("{public_url}/stream-ended#rc=5&rp=ct,5xx&ct=2000&tt=15000");
    let stream = stream_url(public_url);
    twiml(&format!(
        "<Connect action=\"{}\"><Stream url=\"{}\">\
         <Parameter name=\"token\" value=\"{}\"/></Stream></Connect><Hangup/>",
        xml_escape(&action),
        xml_escape(&stream),
        xml_escape(token)
    ))
}

fn twiml_say(bridge: &Bridge, text: &str) -> String {
    let language = xml_escape(&bridge.agent.language);
    format!("<Say language=\"{language}\">{}</Say>", xml_escape(text))
}

fn stream_url(public_url: &str) -> String {
    format!("{}/media-stream", public_url.replacen("http", "ws", 1))
}

/// Rings the person. Twilio tells `/stream-ended` how that went.
fn twiml_transfer(bridge: &Bridge, number: &str) -> String {
    let action = format!("{}/stream-ended", bridge.config.public_url);
    twiml(&format!(
        "<Dial action=\"{}\" timeout=\"{}\" timeLimit=\"{}\">{}</Dial>",
        xml_escape(&action),
        TRANSFER_RINGS.as_secs(),
        TRANSFER_MAX.as_secs(),
        xml_escape(number)
    ))
}

/// Not even an empty line may stand before `<?xml` (Twilio error 12100).
fn twiml(verbs: &str) -> String {
    format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Response>{verbs}</Response>\n")
}

fn xml_escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&apos;"),
            // XML 1.0 has no way at all to write the other control characters.
            '\u{fffe}' | '\u{ffff}' => {}
            character if character.is_control() && !matches!(character, '\n' | '\t' | '\r') => {}
            character => escaped.push(character),
        }
    }
    escaped
}

// ============================================================================
// 5. Stream: Twilio opens the Media Stream
// ============================================================================
//
// In:       `GET /media-stream` from the front door; then `connected` and `start`.
// Out:      the caller's leg, in the hands of the call that waits for exactly this token.
// Fails:    with close code 1008 for everyone who has no token; nothing is created for them.
// Not here: a second chance. A token opens one stream.

/// What Twilio sends. One real message of each kind:
///
/// ```text
/// {"event":"connected","protocol":"Call","version":"1.0.0"}
/// {"event":"start","sequenceNumber":"1","streamSid":"MZ…","start":{"accountSid":"AC…",
///  "streamSid":"MZ…","callSid":"CA…","tracks":["inbound"],"mediaFormat":{"encoding":
///  "audio/x-mulaw","sampleRate":8000,"channels":1},"customParameters":{"token":"…"}}}
/// {"event":"media","sequenceNumber":"2","streamSid":"MZ…","media":{"track":"inbound",
///  "chunk":"1","timestamp":"155","payload":"<base64>"}}
/// {"event":"dtmf","sequenceNumber":"5","streamSid":"MZ…","dtmf":{"track":"inbound_track",
///  "digit":"1"}}
/// {"event":"mark","sequenceNumber":"4","streamSid":"MZ…","mark":{"name":"goodbye"}}
/// {"event":"stop","sequenceNumber":"50","streamSid":"MZ…","stop":{"accountSid":"AC…",
///  "callSid":"CA…"}}
/// ```
///
/// The order of keys varies, numbers are texts, and events nobody has heard of may be added.
#[derive(Debug, PartialEq)]
enum FromTwilio<'a> {
    Connected,
    Start(Start),
    /// Base64 of mu-law bytes, borrowed from the message.
    Media(Cow<'a, str>),
    Dtmf(String),
    Mark(String),
    Stop,
    Unknown(String),
}

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase")]
struct Start {
    stream_sid: String,
    call_sid: String,
    media_format: MediaFormat,
    #[serde(default)]
    custom_parameters: HashMap<String, String>,
}

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase")]
struct MediaFormat {
    encoding: String,
    sample_rate: usize,
}

/// The envelope of them all. `borrow` works on a bare `Cow` only, hence the empty texts for "none".
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    event: Cow<'a, str>,
    #[serde(borrow, default, rename = "streamSid")]
    stream_sid: Cow<'a, str>,
    #[serde(borrow)]
    media: Option<Media<'a>>,
    start: Option<Start>,
    dtmf: Option<Dtmf>,
    mark: Option<Mark>,
}

#[derive(Deserialize)]
struct Media<'a> {
    #[serde(borrow)]
    payload: Cow<'a, str>,
}

#[derive(Deserialize)]
struct Dtmf {
    digit: String,
}

#[derive(Deserialize)]
struct Mark {
    name: String,
}

impl<'a> FromTwilio<'a> {
    /// `stream_sid` is the stream this socket carries, or empty before `start` has said so.
    fn parse(text: &'a str, stream_sid: &str) -> Result<FromTwilio<'a>, String> {
        let envelope: Envelope = serde_json::from_str(text)
            .map_err(|error| format!("not a message of Twilio's: {error}"))?;
        let known = ["connected", "start", "media", "dtmf", "mark", "stop"];
        let other_stream = !stream_sid.is_empty() && envelope.stream_sid != stream_sid;
        if other_stream && known.contains(&envelope.event.as_ref()) {
            return Err(format!("a {} message for another stream", envelope.event));
        }
        let missing = || format!("a {} message without its content", envelope.event);
        Ok(match envelope.event.as_ref() {
            "connected" => FromTwilio::Connected,
            "start" => FromTwilio::Start(envelope.start.ok_or_else(missing)?),
            "media" => FromTwilio::Media(envelope.media.ok_or_else(missing)?.payload),
            "dtmf" => FromTwilio::Dtmf(envelope.dtmf.ok_or_else(missing)?.digit),
            "mark" => FromTwilio::Mark(envelope.mark.ok_or_else(missing)?.name),
            "stop" => FromTwilio::Stop,
            unknown => FromTwilio::Unknown(unknown.to_owned()),
        })
    }
}

/// The caller's leg: the socket and what we know of Twilio's play-out at its other end.
struct CallerLeg {
    socket: Duplex,
    stream_sid: String,
    since: Instant,
    /// What stands before the sound in each message of it.
    media_head: String,
    /// When Twilio will have played all that it was sent.
    plays_until: Mutex<Instant>,
}

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
    call.journal.note(&json!({"event": "stream", "streamSid": caller.stream_sid}));
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
        StreamEnd::Stopped => call.hang_up(HangUp::CallerLeft),
        StreamEnd::Broken(why) => {
            bridge.metrics.broken_lines.of(&["caller"]).add();
            log!(call, Warn, Stream, "the stream ended without a stop ({why}); another may come");
            caller.socket.close(CloseCode::Protocol, &why);
            caller.socket.shut();
            if !await_caller(&call, NEXT_STREAM_WITHIN) {
                call.hang_up(HangUp::CallerLost);
            }
        }
    }
    caller.socket.close(CloseCode::Normal, "the call is over");
    caller.socket.await_close();
}

/// The WebSocket upgrade. Twilio signs it like a webhook, with the `wss://` address and no form;
/// its documentation leaves open whether a slash is added at the end.
fn accept_stream(
    bridge: &Bridge,
    socket: &Arc<TcpStream>,
    mut head: Vec<u8>,
) -> Result<Duplex, String> {
    let parsed = ws_server::Request::try_parse(&head).map_err(|error| {
        bridge.metrics.refused("upgrade");
        plain_answer(socket, "400 Bad Request");
        error.to_string()
    })?;
    let (length, request) = parsed.ok_or("an incomplete head")?;
    if let Some(token) = &bridge.config.twilio_auth_token
        && let Some(signature) = request.headers().get("X-Twilio-Signature")
    {
        let signature = signature.to_str().unwrap_or_default();
        let url = stream_url(&bridge.config.public_url);
        let nothing = Form(Vec::new());
        if ![&url, &format!("{url}/")]
            .iter()
            .any(|url| signature_is_valid(token, url, &nothing, signature))
        {
            bridge.metrics.refused("signature");
            plain_answer(socket, "403 Forbidden");
            return Err("Twilio's signature is wrong".into());
        }
    }
    let response = ws_server::create_response(&request).map_err(|error| {
        bridge.metrics.refused("upgrade");
        plain_answer(socket, "400 Bad Request");
        error.to_string()
    })?;
    let mut bytes = Vec::new();
    ws_server::write_response(&mut bytes, &response).map_err(|error| error.to_string())?;
    (&**socket).write_all(&bytes).map_err(|error| error.to_string())?;
    let early = head.split_off(length);
    Ok(Duplex::new(Arc::clone(socket), None, early, Role::Server))
}

fn plain_answer(mut socket: &TcpStream, status: &str) {
    let answer = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    if socket.write_all(answer.as_bytes()).is_err() {
        // Whoever it was has gone; the log has the reason anyway.
    }
    shut(socket);
}

/// The message and its text. None: the other side said goodbye before it began, as `callbridge
/// check` does.
fn await_start(line: &Duplex) -> Result<Option<(Start, Utf8Bytes)>, String> {
    let deadline = Instant::now() + START_WITHIN;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("no start within {} s", START_WITHIN.as_secs()));
        }
        let text = match line.read(left) {
            Ok((Received::Text(text), _)) => text,
            Ok((Received::Binary(_), _)) => return Err("a binary message before start".into()),
            Err(LineEnd::Quiet) => continue,
            Err(LineEnd::Closed(_)) => return Ok(None),
            Err(end) => return Err(format!("before start: {end}")),
        };
        match FromTwilio::parse(&text, "")? {
            FromTwilio::Start(start) => return Ok(Some((start, text))),
            FromTwilio::Connected | FromTwilio::Unknown(_) => {}
            FromTwilio::Media(_) | FromTwilio::Dtmf(_) | FromTwilio::Mark(_) | FromTwilio::Stop => {
                return Err("another message before start".into());
            }
        }
    }
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

// --- 6a. Caller to agent (thread T) --------------------------------------------

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
            call.hang_up(HangUp::TooLong);
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

/// A message with sound in it, most of which is left out.
fn media_for_the_eye(text: &str) -> String {
    let mut message: Value = serde_json::from_str(text).unwrap_or_default();
    if let Some(payload) = message.pointer_mut("/media/payload") {
        *payload = json!(cut(payload.as_str().unwrap_or_default(), 24));
    }
    cut(&message.to_string(), WIRE_CHARS_MAX)
}

fn pcm_for_the_eye(pcm: &[u8]) -> String {
    let beginning = hex(pcm.get(..16).unwrap_or(pcm));
    format!("{} bytes of PCM, binary: {beginning}…", pcm.len())
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

// --- 6b. Agent to caller (thread U) --------------------------------------------

/// What Ultravox sends as text. One real message of each kind:
///
/// ```text
/// {"type":"call_started","callId":"7c21…"}
/// {"type":"state","state":"listening"}
/// {"type":"transcript","role":"agent","medium":"voice","text":null,"delta":" help?",
///  "final":false,"ordinal":3}
/// {"type":"client_tool_invocation","toolName":"verify","invocationId":"i1","parameters":{}}
/// {"type":"playback_clear_buffer"}
/// {"type":"pong","timestamp":1234567890.123}
/// ```
enum FromAgent {
    Transcript(Heard),
    Invocation(Invocation),
    ClearBuffer,
    State(String),
    Other(String),
}

impl FromAgent {
    fn parse(text: &str) -> Result<FromAgent, String> {
        let message: Value =
            serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))?;
        let kind = message["type"].as_str().unwrap_or_default();
        Ok(match kind {
            "transcript" => FromAgent::Transcript(
                Heard::parse(&message).ok_or("a transcript without role or ordinal")?,
            ),
            "client_tool_invocation" => FromAgent::Invocation(
                Invocation::parse(&message).ok_or("an invocation without name or id")?,
            ),
            "playback_clear_buffer" => FromAgent::ClearBuffer,
            "state" => FromAgent::State(message["state"].as_str().unwrap_or_default().to_owned()),
            other => FromAgent::Other(other.to_owned()),
        })
    }
}

/// Until the agent is gone, or the call is over. Returns why.
fn relay_agent_to_caller(call: &Arc<Call>, agent: &Arc<Duplex>) -> HangUp {
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
            Err(LineEnd::Quiet) if call.is_over() => return HangUp::CallerLeft,
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
                return HangUp::AgentLost;
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

/// Ultravox answers with a `pong`; anything else it says will do as well.
fn ping(agent: &Duplex) {
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let ping = json!({"type": "ping", "timestamp": now.as_secs_f64()});
    if agent.send(Message::text(ping.to_string())).is_err() {
        // The next read on this line tells the same, and knows what to do.
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
                let event = json!({"event": "first_word", "ms": millis(caller.since.elapsed())});
                call.journal.note(&event);
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

/// What Twilio takes. Exactly these keys: one more, and the message counts
/// for nothing.
///
/// ```text
/// {"event":"media","streamSid":"MZ…","media":{"payload":"<base64 mu-law>"}}
/// {"event":"mark","streamSid":"MZ…","mark":{"name":"goodbye"}}
/// {"event":"clear","streamSid":"MZ…"}
/// ```
impl CallerLeg {
    fn new(socket: Duplex, stream_sid: String) -> CallerLeg {
        // A streamSid from outside may hold a quote, so it is written by the JSON writer.
        let sid = json!(stream_sid);
        let media_head =
            format!("{{\"event\":\"media\",\"streamSid\":{sid},\"media\":{{\"payload\":\"");
        let now = Instant::now();
        CallerLeg { socket, stream_sid, since: now, media_head, plays_until: Mutex::new(now) }
    }

    fn play(&self, call: &Call, mulaw: &[u8]) -> bool {
        const MEDIA_TAIL: &str = "\"}}";
        let payload_bytes = mulaw.len().div_ceil(3) * 4;
        let mut text =
            String::with_capacity(self.media_head.len() + payload_bytes + MEDIA_TAIL.len());
        text.push_str(&self.media_head);
        BASE64.encode_string(mulaw, &mut text);
        text.push_str(MEDIA_TAIL);
        {
            let mut plays_until = lock(&self.plays_until);
            *plays_until = (*plays_until).max(Instant::now()) + playing_time(mulaw.len());
        }
        self.tell(call, text)
    }

    fn mark(&self, call: &Call, name: &str) {
        let mark = json!({"event": "mark", "streamSid": self.stream_sid, "mark": {"name": name}});
        self.tell(call, mark.to_string());
        call.show(Exhibit::Mark, || mark.to_string());
    }

    fn clear(&self, call: &Call) {
        let clear = json!({"event": "clear", "streamSid": self.stream_sid});
        *lock(&self.plays_until) = Instant::now();
        self.tell(call, clear.to_string());
        call.show(Exhibit::Clear, || clear.to_string());
    }

    /// False: it did not reach Twilio.
    fn tell(&self, call: &Call, text: String) -> bool {
        if let Err(end) = self.socket.send(Message::text(text)) {
            // Thread T reads from this line; it decides what its end means for the call.
            log!(call, Debug, Talk, "a message did not reach Twilio: {end}");
            return false;
        }
        true
    }
}

fn playing_time(mulaw_bytes: usize) -> Duration {
    Duration::from_micros((mulaw_bytes * 1_000_000 / SAMPLE_RATE_HZ) as u64)
}

// --- 6c. Barge-in ----------------------------------------------------------------

/// Twilio still holds seconds of the agent's voice. Without this, the caller is talked over by a
/// sentence that the agent has already given up.
fn clear(call: &Call) {
    let Some(caller) = call.caller() else { return };
    let unheard = lock(&caller.plays_until).saturating_duration_since(Instant::now());
    caller.clear(call);
    let ms = unheard.as_millis();
    log!(call, Info, Talk, "barge-in: {ms} ms of the agent's voice were not played"; ms);
}

// --- 6d. Keys --------------------------------------------------------------------

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

#[derive(Clone)]
struct Invocation {
    tool: String,
    id: String,
    parameters: Map<String, Value>,
}

impl Invocation {
    fn parse(message: &Value) -> Option<Invocation> {
        let is_usable = |id: &&str| id.len() <= INVOCATION_ID_BYTES_MAX;
        Some(Invocation {
            tool: message["toolName"].as_str()?.to_owned(),
            id: message["invocationId"].as_str().filter(is_usable)?.to_owned(),
            parameters: message["parameters"].as_object().cloned().unwrap_or_default(),
        })
    }

    /// A parameter as text, blank ones as none.
    fn text(&self, name: &str) -> Option<String> {
        match self.parameters.get(name)? {
            Value::Null => None,
            Value::String(text) if text.trim().is_empty() => None,
            Value::String(text) => Some(text.trim().to_owned()),
            other => Some(other.to_string()),
        }
    }
}

/// What the agent is told. On the wire, with camelCase keys:
///
/// ```text
/// {"type":"client_tool_result","invocationId":"i1","result":"Booked.",
///  "responseType":"tool-response"}
/// {"type":"client_tool_result","invocationId":"i2","result":"{\"systemPrompt\":…}",
///  "responseType":"new-stage"}
/// {"type":"client_tool_result","invocationId":"i3","errorType":"undefined","errorMessage":"…"}
/// ```
enum ToolResult {
    Say(String),
    NewStage(Value),
    HangUp,
    NoSuchTool,
    Failed(String),
}

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
    leaving: Option<(HangUp, Instant)>,
}

impl<'a> Act<'a> {
    fn new(call: &'a Arc<Call>, agent: &'a Arc<Duplex>) -> Act<'a> {
        Act { call, agent, answered: HashSet::new(), leaving: None }
    }

    /// Why the agent is gone, when it has gone in an orderly way.
    fn reason(&self) -> HangUp {
        let shutting_down = self.call.bridge.stopping.load(Ordering::SeqCst);
        match self.leaving {
            Some((why, _)) => why,
            None if shutting_down => HangUp::ShuttingDown,
            None => HangUp::AgentLeft,
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
                self.leaving = Some((HangUp::AgentHungUp, errand.began));
                ToolResult::HangUp
            }
            // The agent leaves; step 8 lets Twilio ring the person.
            ToolAction::Transfer(_) => {
                self.leaving = Some((HangUp::Transferred, errand.began));
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
        self.call.journal.note(&json!({"event": "stage", "stage": stage}));
        ToolResult::NewStage(body)
    }
}

fn ask_n8n_aside(tool: &'static Tool, errand: Errand) {
    let errand = Arc::new(errand);
    let running = errand.call.tools_running.fetch_add(1, Ordering::SeqCst);
    let aside = Arc::clone(&errand);
    let started = if running < TOOLS_AT_ONCE_MAX {
        spawn(format!("{} tool", shorten(&errand.call.sid)), move || {
            aside.call.journal.note(&Value::Object(aside.event("tool_begins")));
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
        let mut event = self.event("tool");
        let result = call.bridge.config.hide_secrets(result.text().to_owned());
        event.extend([
            ("result".to_owned(), json!(cut(&result, WIRE_CHARS_MAX))),
            ("outcome".to_owned(), json!(outcome)),
            ("ms".to_owned(), json!(ms)),
        ]);
        call.journal.note(&Value::Object(event));
    }

    fn event(&self, name: &str) -> Map<String, Value> {
        Map::from_iter([
            ("event".to_owned(), json!(name)),
            ("id".to_owned(), json!(self.invocation.id)),
            ("tool".to_owned(), json!(cut(&self.invocation.tool, TOOL_NAME_CHARS_MAX))),
            ("stage".to_owned(), json!(self.stage)),
            ("arguments".to_owned(), self.arguments()),
        ])
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

fn tell_result(call: &Call, agent: &Duplex, invocation: &Invocation, result: &ToolResult) {
    let mut message = json!({"type": "client_tool_result", "invocationId": invocation.id});
    let fields = match result {
        ToolResult::Say(text) => json!({"result": text, "responseType": "tool-response"}),
        ToolResult::NewStage(stage) => {
            json!({"result": stage.to_string(), "responseType": "new-stage"})
        }
        ToolResult::HangUp => json!({"result": result.text(), "responseType": "hang-up"}),
        ToolResult::NoSuchTool => {
            let why = format!("there is no tool {} here", invocation.tool);
            json!({"errorType": "undefined", "errorMessage": why})
        }
        ToolResult::Failed(why) => {
            json!({"errorType": "implementation-error", "errorMessage": why})
        }
    };
    if let (Value::Object(message), Value::Object(fields)) = (&mut message, fields) {
        message.extend(fields);
    }
    let message = message.to_string();
    if let Err(end) = agent.send(Message::text(message.clone())) {
        log!(call, Warn, Act, "{}: the result did not reach the agent: {end}", invocation.tool);
    }
    call.show(Exhibit::Result, || result_for_the_eye(&message));
}

/// A stage that is entered is as long as one that a call begins with.
fn result_for_the_eye(text: &str) -> String {
    let mut message: Value = serde_json::from_str(text).unwrap_or_default();
    if message["responseType"] == "new-stage"
        && let Some(result) = message.pointer_mut("/result")
    {
        let stage = serde_json::from_str(result.as_str().unwrap_or_default());
        *result = json!(in_short(stage.unwrap_or_default()).to_string());
    }
    message.to_string()
}

impl ToolResult {
    /// What the model reads, for the journal.
    fn text(&self) -> &str {
        match self {
            ToolResult::Say(text) | ToolResult::Failed(text) => text,
            ToolResult::NewStage(stage) => stage["toolResultText"].as_str().unwrap_or_default(),
            ToolResult::HangUp => "The call ends now.",
            ToolResult::NoSuchTool => "There is no such tool here.",
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

fn listed(names: &[&str], one: &str, many: &str) -> String {
    format!("{} {}", names.join(", "), if names.len() == 1 { one } else { many })
}

fn find_calendar<'a>(bridge: &'a Bridge, location: &str) -> Option<&'a str> {
    let found = bridge.agent.calendars.iter().find(|(name, _)| name.eq_ignore_ascii_case(location));
    found.map(|(_, email)| email.as_str())
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

fn say_goodbye(call: &Call, why: HangUp) {
    call.hang_up(why);
    let Some(caller) = call.caller() else { return };
    if why != HangUp::AgentLost {
        await_last_word(call, &caller);
    }
    let mut state = lock(&call.state);
    if state.stopped && state.hang_up == Some(HangUp::Transferred) {
        // Nobody is left to be put through.
        state.hang_up = Some(HangUp::CallerLeft);
    }
    drop(state);
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
            call.hang_up(HangUp::CallerLeft);
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

/// The stream broke, the call did not: the agent is still there and waits.
fn another_stream(call: &Arc<Call>) -> Answer {
    if lock(&call.state).streams >= STREAMS_MAX {
        log!(call, Error, Stream, "{STREAMS_MAX} streams were cut; giving up");
        call.hang_up(HangUp::CallerLost);
        return cannot_serve(call.bridge, &call.bridge.agent.phrases.apology);
    }
    // Thread T may not have noticed yet.
    if let Some(cut) = lock(&call.state).caller.take() {
        cut.socket.shut();
    }
    call.bridge.metrics.resumes.of(&["stream"]).add();
    log!(call, Info, Stream, "Twilio asks for another stream");
    let answer = Answer::Stream { token: call.new_token() };
    call.show(Exhibit::StreamEnded, || "POST /stream-ended".to_owned());
    call.show(Exhibit::NextStream, || answer.for_the_eye(call.bridge));
    answer
}

fn after_the_agent(bridge: &Bridge, how: HangUp) -> Answer {
    match (how, &bridge.config.fallback_number) {
        (HangUp::Transferred, Some(number)) => Answer::Transfer(number.clone()),
        (HangUp::AgentLost | HangUp::NoAgent | HangUp::NeverStreamed, _) => {
            cannot_serve(bridge, &bridge.agent.phrases.apology)
        }
        (
            HangUp::Transferred
            | HangUp::CallerLeft
            | HangUp::CallerLost
            | HangUp::AgentHungUp
            | HangUp::AgentLeft
            | HangUp::TooLong
            | HangUp::Machine
            | HangUp::ShuttingDown
            | HangUp::ProcessDied,
            _,
        ) => Answer::HangUp,
    }
}

/// A call that no thread of this process knows, but whose journal says that it is not over: a
/// process has died with it, or a person did not answer. It goes on with a new agent, in the same
/// stage, with all that was said.
fn take_up(bridge: &'static Bridge, sid: &str, what_happened: &'static str) -> Answer {
    let apology = &bridge.agent.phrases.apology;
    let read = journal_of(&bridge.config.data_dir, sid)
        .and_then(|path| Filed::read(&path).ok().map(|filed| (path, filed)));
    let Some((path, filed)) = read.filter(|(_, filed)| filed.sid == sid) else {
        log!(Sid { sid }, Error, Goodbye, "asked about a call of which there is no journal");
        return cannot_serve(bridge, apology);
    };
    if !filed.ended_by.is_empty() {
        return Answer::HangUp;
    }
    if filed.transferred && what_happened == LINE_BROKE {
        return after_the_agent(bridge, HangUp::Transferred);
    }
    match bridge.calls.take_slot(sid, || Call::from_journal(bridge, path, filed)) {
        Slot::Yours(call, slot) => {
            log!(call, Warn, Ring, "the call is taken up from its journal");
            bridge.outbox.forget(sid);
            let after = if what_happened == LINE_BROKE { "process" } else { "transfer" };
            bridge.metrics.resumes.of(&[after]).add();
            connect_to_agent(&call, slot, &Opening::GoOn(what_happened))
        }
        Slot::Known(call) => call.await_answer(),
        Slot::None => {
            bridge.metrics.refused("busy");
            cannot_serve(bridge, &bridge.agent.phrases.busy)
        }
    }
}

fn hang_up_for_good(bridge: &Bridge, sid: &str) -> Answer {
    bridge.outbox.file_now(sid);
    Answer::HangUp
}

/// The last word on a call, as Twilio spells it (one l in "canceled").
fn is_final(call_status: &str) -> bool {
    matches!(call_status, "completed" | "busy" | "failed" | "no-answer" | "canceled")
}

/// `POST /call-status`: optional for calls that come in, asked for by us for calls that go out. It
/// tells of a caller who went away while it still rang, whom no stream will ever announce, and of
/// answering machines.
fn call_status(bridge: &'static Bridge, form: &Form) -> Reply {
    let (sid, status) = (form.get("CallSid"), form.get("CallStatus"));
    let answered_by = form.get("AnsweredBy");
    bridge.calls.await_filed(sid);
    if let Some(call) = bridge.calls.find(sid) {
        let event = json!({"event": "status", "status": status, "answeredBy": answered_by});
        call.journal.note(&event);
        if is_final(status) {
            log!(call, Info, Goodbye, "Twilio reports the call as {status}");
            call.hang_up(HangUp::CallerLeft);
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
        return call.hang_up(HangUp::Machine);
    };
    let hang_up = json!({"type": "hang_up", "message": message}).to_string();
    if agent.send(Message::text(hang_up)).is_err() {
        call.hang_up(HangUp::Machine);
    }
}

// --- 8b. The whole process ends ---------------------------------------------------

/// Waits for SIGTERM or SIGINT, then for the calls to end by themselves. A second signal ends at
/// once; what has been said is on disk by then, as always.
fn await_end(bridge: &'static Bridge, mut signals: Signals) -> io::Result<()> {
    let (news, next_news) = mpsc::channel();
    let drained = news.clone();
    spawn("signals".into(), move || {
        for _ in signals.forever() {
            if news.send("a second signal").is_err() {
                return;
            }
        }
    })?;
    let tidy = || tidy_journals(bridge, |_, _| {});
    if await_news(&next_news, TIDY_EVERY, tidy).is_none() {
        return Ok(());
    }
    let calls = bridge.calls.all().len();
    let drain = bridge.config.drain;
    let seconds = drain.as_secs();
    log!(
        Info,
        "told to stop: no new calls; {calls} may go on for {seconds} s";
        calls, seconds
    );
    bridge.draining.store(true, Ordering::SeqCst);
    spawn("drain".into(), move || {
        drain_calls(bridge);
        if drained.send("all calls are over").is_err() {
            // A second signal was faster.
        }
    })?;
    if let Ok(why) = next_news.recv() {
        log!(Info, "stopped: {why}");
    }
    Ok(())
}

/// The thread that waits is the main one, which has nothing else to do.
fn await_news<T>(
    news: &mpsc::Receiver<T>,
    tidy_every: Duration,
    mut tidy: impl FnMut(),
) -> Option<T> {
    loop {
        match news.recv_timeout(tidy_every) {
            Ok(news) => return Some(news),
            Err(mpsc::RecvTimeoutError::Timeout) => tidy(),
            Err(mpsc::RecvTimeoutError::Disconnected) => return None,
        }
    }
}

fn drain_calls(bridge: &'static Bridge) {
    bridge.calls.await_none(bridge.config.drain);
    bridge.stopping.store(true, Ordering::SeqCst);
    let goodbye = json!({"type": "hang_up", "message": bridge.agent.phrases.cut_short}).to_string();
    for call in bridge.calls.all() {
        log!(call, Info, Goodbye, "this process ends, and the call with it");
        let told = call.agent().map(|agent| agent.send(Message::text(goodbye.clone())));
        if !matches!(told, Some(Ok(()))) {
            call.hang_up(HangUp::ShuttingDown);
        }
    }
    bridge.calls.await_none(AGENT_LEAVES_WITHIN);
    for call in bridge.calls.all() {
        call.hang_up(HangUp::ShuttingDown);
    }
    bridge.calls.await_none(AGENT_LEAVES_WITHIN);
    bridge.outbox.await_first_tries();
    // Nothing announces that Twilio will not ask.
    thread::sleep(LAST_QUESTION_WITHIN.saturating_sub(bridge.calls.since_last_end()));
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
    let mut state = lock(&call.state);
    if state.stopped && state.hang_up == Some(HangUp::Transferred) {
        // Nobody is left to be put through.
        state.hang_up = Some(HangUp::CallerLeft);
    }
    let how = state.hang_up.unwrap_or(HangUp::NoAgent);
    drop(state);
    let transcript = {
        let mut transcript = lock(&call.transcript);
        for unfinished in transcript.lines.iter_mut().filter(|line| !line.finished) {
            unfinished.finished = true;
            call.journal.note(&unfinished.event());
        }
        std::mem::take(&mut *transcript)
    };
    // A transferred caller may come back. Until that is decided, the call has no end.
    let transferred = how == HangUp::Transferred;
    if transferred {
        call.journal.note(&json!({"event": "transfer"}));
    } else {
        call.journal.note(&end_event(how));
        call.bridge.metrics.calls.of(&[&format!("{how:?}")]).add();
    }
    call.bridge.outbox.add(Parcel {
        sid: call.sid.clone(),
        number: call.number.clone(),
        transcript,
        ended_by: format!("{how:?}"),
        journal: call.journal.path.clone(),
        unfinished: transferred,
        tries: 0,
        due: Instant::now()
            + if transferred { transfer_max(call.direction) } else { Duration::ZERO },
        since: Instant::now(),
    });
}

/// The page's phone rings nobody. Whoever tries a transfer with it says within a minute what came
/// of it, or has closed the page.
fn transfer_max(direction: Direction) -> Duration {
    match direction {
        Direction::In | Direction::Out => TRANSFER_MAX,
        Direction::Browser => TAKE_UP_WITHIN,
    }
}

fn end_event(ended_by: HangUp) -> Value {
    json!({"event": "end", "endedBy": format!("{ended_by:?}")})
}

/// A transcript message of Ultravox's.
#[derive(Debug)]
struct Heard {
    speaker: Speaker,
    ordinal: u64,
    text: Option<String>,
    delta: Option<String>,
    finished: bool,
    /// Typed, not spoken: an echo of our own `user_text_message`.
    typed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speaker {
    Agent,
    User,
}

impl Heard {
    fn parse(message: &Value) -> Option<Heard> {
        let speaker = match message["role"].as_str()? {
            "agent" => Speaker::Agent,
            "user" => Speaker::User,
            _ => return None,
        };
        let text = |key: &str| message[key].as_str().map(str::to_owned);
        Some(Heard {
            speaker,
            ordinal: message["ordinal"].as_u64()?,
            text: text("text"),
            delta: text("delta"),
            finished: message["final"].as_bool().unwrap_or(false),
            typed: message["medium"].as_str() == Some("text"),
        })
    }
}

/// One utterance, as far as it is known.
struct Line {
    /// Which agent of the call, from 1: each counts its ordinals from 0.
    agent: u64,
    ordinal: u64,
    speaker: Speaker,
    text: String,
    finished: bool,
}

impl Line {
    /// The journal's line for it. The last one for an agent, ordinal and speaker counts.
    fn event(&self) -> Value {
        let mut event = self.as_json();
        event["event"] = json!("said");
        event
    }

    fn as_json(&self) -> Value {
        json!({
            "agent": self.agent,
            "ordinal": self.ordinal,
            "speaker": format!("{:?}", self.speaker),
            "text": self.text,
        })
    }

    /// On one line. Ultravox itself puts "(New Call) Respond as if …" into the caller's mouth, and
    /// we a word in brackets into that of a call that goes on: that is nothing anybody said.
    fn words(&self) -> Option<String> {
        let words = self.text.split_whitespace().collect::<Vec<_>>().join(" ");
        let injected =
            words.starts_with("(New Call)") || [LINE_BROKE, NOBODY_ANSWERED].contains(&&*words);
        let injected = injected && self.speaker == Speaker::User;
        (!words.is_empty() && !injected).then_some(words)
    }
}

/// What was said, by agent and ordinal.
#[derive(Default)]
struct Transcript {
    lines: Vec<Line>,
    bytes: usize,
}

impl Transcript {
    /// `text` replaces what was there (an interrupted sentence gets shorter), `delta` adds to it.
    fn hear(&mut self, agent: u64, heard: &Heard) -> Option<&Line> {
        self.bytes += heard.text.as_ref().or(heard.delta.as_ref()).map_or(0, String::len) + 1;
        let injected = heard.typed && heard.speaker == Speaker::User;
        if injected || self.bytes > TRANSCRIPT_BYTES_MAX {
            return None;
        }
        let (ordinal, speaker) = (heard.ordinal, heard.speaker);
        let key = (agent, ordinal, speaker);
        let known = |line: &Line| (line.agent, line.ordinal, line.speaker) == key;
        let at = self.lines.iter().rposition(known).unwrap_or_else(|| {
            // Empty lines take memory too.
            self.bytes += size_of::<Line>();
            self.lines.push(Line { agent, ordinal, speaker, text: String::new(), finished: false });
            self.lines.len() - 1
        });
        let line = self.lines.get_mut(at)?;
        if line.finished {
            // It goes into the journal once more, as a whole.
            self.bytes += line.text.len();
        }
        if let Some(text) = &heard.text {
            line.text.clone_from(text);
        } else if let Some(delta) = &heard.delta {
            line.text.push_str(delta);
        }
        line.finished |= heard.finished;
        line.finished.then_some(&*line)
    }

    /// How many utterances it has.
    fn count(&self) -> usize {
        self.lines.iter().filter(|line| line.words().is_some()).count()
    }

    fn in_order(&self) -> impl Iterator<Item = (Speaker, String)> {
        let mut lines: Vec<&Line> = self.lines.iter().collect();
        lines.sort_by_key(|line| (line.agent, line.ordinal));
        lines.into_iter().filter_map(|line| Some((line.speaker, line.words()?)))
    }

    /// `Agent: …` and `User: …`, one line an utterance.
    fn text(&self) -> String {
        let lines = self.in_order().map(|(speaker, words)| format!("{speaker:?}: {words}"));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// As history for an agent that goes on (`initialMessages`).
    fn as_messages(&self) -> Value {
        let messages = self.in_order().map(|(speaker, words)| match speaker {
            Speaker::Agent => json!({"role": "MESSAGE_ROLE_AGENT", "text": words}),
            Speaker::User => json!({"role": "MESSAGE_ROLE_USER", "text": words}),
        });
        messages.collect()
    }
}

fn note_transcript(call: &Call, heard: &Heard) {
    let agent = lock(&call.state).agents;
    // Whoever looks at the call does not wait for the disk.
    let event = lock(&call.transcript).hear(agent, heard).map(Line::event);
    if let Some(event) = event {
        call.journal.note(&event);
    }
}

/// A call's file: `DATA_DIR/calls/<start time>-<CallSid>.jsonl`, one line an event, written as it
/// happens. The transcript's home until n8n has it, all that a restarted process knows, and what
/// the live page shows.
///
/// Each line is a JSON object with `at`, the time, and `event`:
///
/// | event | step | with it comes |
/// |---|---|---|
/// | `ring` | 1 | `callSid`, `number`, `direction` (`in`, `out`, `browser`) |
/// | `greeting` | 2 | `from` (`n8n`, `default`, `order`), `ms`, `why` when not n8n's |
/// | `agent` | 3 | `callId` (Ultravox's), `agent`: which one of this call, from 1 |
/// | `answer` | 4 | `what` (`stream`, `apology`, `transfer`), `ms` since the ring |
/// | `stream` | 5 | `streamSid`; once more for each further stream |
/// | `first_word` | 6 | `ms` from the stream's start to the agent's first sound |
/// | `said` | 6 | `agent`, `ordinal`, `speaker`, `text`; of the same three the last one counts |
/// | `tool_begins` | 7 | as for `tool`, of a tool that takes its time |
/// | `tool` | 7 | `id`, `tool`, `stage`, `arguments`, `result`, `outcome`, `ms` |
/// | `stage` | 7 | `stage`, which has been entered |
/// | `status` | - | `status`, `answeredBy`: what Twilio reports |
/// | `goodbye` | 8 | `endedBy` (a [`HangUp`]), `ms` since the ring |
/// | `transfer` | 8 | the caller is being put through to a person |
/// | `end` | 9 | `endedBy`, which is final |
/// | `undelivered` | 9 | `why`: n8n did not take the transcript |
/// | `delivered` | 9 | n8n has it, or there was nothing to deliver |
/// | `wire` | any | `step`, `way` (`in`, `out`), `with`, `text`: the first message of a kind |
struct Journal {
    path: PathBuf,
    file: Mutex<Option<File>>,
}

/// Said once, not once a line: a full disk is full for everybody.
static DISK_FAILED: AtomicBool = AtomicBool::new(false);

impl Journal {
    fn path(data_dir: &Path, sid: &str) -> PathBuf {
        let start = Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
        data_dir.join("calls").join(format!("{start}-{sid}.jsonl"))
    }

    /// The file is made with the first line.
    fn at(path: PathBuf) -> Journal {
        Journal { path, file: Mutex::new(None) }
    }

    /// Calls go on when the disk does not: the transcript is in memory as well.
    fn note(&self, event: &Value) {
        let mut file = lock(&self.file);
        let written = match file.as_mut() {
            // The system would take the line, and nobody could ever read it.
            Some(_) if !self.path.exists() => Err(io::Error::other("it was deleted")),
            Some(opened) => append(opened, event),
            None => {
                open_to_append(&self.path).and_then(|opened| append(file.insert(opened), event))
            }
        };
        if written.is_err() {
            // Half the line may be there: opening the file again ends it.
            *file = None;
        }
        match written {
            Ok(()) => DISK_FAILED.store(false, Ordering::SeqCst),
            Err(error) if !DISK_FAILED.swap(true, Ordering::SeqCst) => {
                let path = self.path.display();
                log!(Error, "{path}: {error}; calls go on, transcripts wait in memory only");
            }
            Err(_) => {}
        }
    }
}

fn open_to_append(path: &Path) -> io::Result<File> {
    // What was said is nobody's business but the owner's.
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    let mut file =
        OpenOptions::new().create(true).append(true).read(true).mode(0o600).open(path)?;
    // A process that died in the middle of a line must not spoil ours.
    let mut last = [b'\n'];
    if file.seek(SeekFrom::End(-1)).is_ok() {
        file.read_exact(&mut last)?;
    }
    if last != *b"\n" {
        file.write_all(b"\n")?;
    }
    Ok(file)
}

/// One `write` for the whole line, so that a death in between leaves half a line at the end and
/// nothing else.
fn append(file: &mut File, event: &Value) -> io::Result<()> {
    let mut line = json!({"at": by_the_calendar(Timestamp::now())});
    if let (Value::Object(line), Value::Object(event)) = (&mut line, event) {
        line.extend(event.clone());
    }
    file.write_all(format!("{line}\n").as_bytes())
}

/// A message with one of its fields made unreadable.
fn hidden(text: &str, field: &str) -> String {
    let mut message: Value = serde_json::from_str(text).unwrap_or_default();
    if let Some(value) = message.pointer_mut(field) {
        *value = json!("***");
    }
    message.to_string()
}

/// RFC 3339, to the millisecond.
fn by_the_calendar(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()
}

/// A journal, read back.
#[derive(Default)]
struct Filed {
    sid: String,
    number: String,
    direction: Direction,
    began: Option<Timestamp>,
    ended: Option<Timestamp>,
    stage: String,
    agent_id: String,
    agents: u64,
    ended_by: String,
    /// The caller was put through to a person, and what came of it is not known yet.
    transferred: bool,
    transcript: Transcript,
    delivered: bool,
    /// Why n8n has not taken it, at the last try.
    trouble: String,
    /// Since the first line, and since the last.
    age: Duration,
    quiet_for: Duration,
}

impl Filed {
    /// A half-written last line is what a sudden end leaves behind. It is skipped, and so is any
    /// other line that cannot be read.
    fn read(path: &Path) -> io::Result<Filed> {
        let text = String::from_utf8_lossy(&fs::read(path)?).into_owned();
        let mut filed = Filed::default();
        // A journal's bulk, and nothing that anybody has to know again. In a text of another
        // event these quotes would have backslashes before them; a tool's arguments may hold them
        // as they are, and such a line is nothing to go on from either.
        let lines = text.lines().filter(|line| !line.contains("\"event\":\"wire\""));
        for event in lines.filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let what = event["event"].as_str().unwrap_or_default();
            // A try to deliver is nothing that happened in the call, and makes it no younger.
            if let Some(at) = event["at"].as_str().and_then(|at| at.parse().ok())
                && what != "undelivered"
            {
                filed.quiet_for = since(at);
                filed.age = since(*filed.began.get_or_insert(at));
                if what != "delivered" {
                    filed.ended = Some(at);
                }
            }
            filed.apply(&event);
        }
        Ok(filed)
    }

    fn apply(&mut self, event: &Value) {
        let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
        let number = |key: &str| event[key].as_u64().unwrap_or_default();
        match event["event"].as_str().unwrap_or_default() {
            "ring" => {
                (self.sid, self.number) = (text("callSid"), text("number"));
                self.direction = Direction::deserialize(&event["direction"]).unwrap_or_default();
            }
            "agent" => {
                (self.agent_id, self.agents) = (text("callId"), number("agent"));
                self.transferred = false;
            }
            "stage" => self.stage = text("stage"),
            "said" => {
                let heard = Heard {
                    speaker: if text("speaker") == "Agent" {
                        Speaker::Agent
                    } else {
                        Speaker::User
                    },
                    ordinal: number("ordinal"),
                    text: Some(text("text")),
                    delta: None,
                    finished: true,
                    typed: false,
                };
                self.transcript.hear(number("agent"), &heard);
            }
            "transfer" => self.transferred = true,
            "end" => self.ended_by = text("endedBy"),
            "undelivered" => self.trouble = text("why"),
            "delivered" => self.delivered = true,
            _ => {}
        }
    }
}

fn since(at: Timestamp) -> Duration {
    Timestamp::now().duration_since(at).try_into().unwrap_or_default()
}

fn journal_of(data_dir: &Path, sid: &str) -> Option<PathBuf> {
    journals(data_dir).into_iter().rfind(|path| sid_of(path) == sid)
}

/// All journals, the oldest first: their names begin with the time.
fn journals(data_dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(data_dir.join("calls")).into_iter().flatten();
    let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
    let mut journals: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|end| end == "jsonl")).collect();
    journals.sort();
    journals
}

fn sid_of(journal: &Path) -> &str {
    let name = journal.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
    name.rsplit_once('-').map(|(_, sid)| sid).unwrap_or_default()
}

// --- 9b. The outbox ----------------------------------------------------------------

/// What waits for n8n. Several threads deliver, so that one that hangs does not hold up the rest.
#[derive(Default)]
struct Outbox {
    parcels: Mutex<Parcels>,
    changed: Condvar,
    /// Transcripts that are kept and no longer tried, when the journals were last looked through.
    given_up: AtomicUsize,
}

#[derive(Default)]
struct Parcels {
    waiting: Vec<Parcel>,
    /// Since when each of those has been waiting that are being delivered now.
    on_the_way: Vec<Instant>,
    /// What earlier processes have left behind is complete.
    all_read: bool,
    /// Until then: calls of which nothing more will come.
    over: HashSet<String>,
}

/// A transcript to deliver.
struct Parcel {
    sid: String,
    number: String,
    transcript: Transcript,
    ended_by: String,
    journal: PathBuf,
    /// The call may still go on: its process died, or its caller is being put through.
    unfinished: bool,
    tries: u32,
    due: Instant,
    since: Instant,
}

impl Outbox {
    fn add(&self, parcel: Parcel) {
        lock(&self.parcels).waiting.push(parcel);
        self.changed.notify_all();
    }

    /// From an earlier process. Calls come in while the journals are still being read, so this
    /// process may have made the journal itself, or have taken the call up: then it files it. Asked
    /// under the lock, because `take_up` takes the slot first and calls `forget` then.
    fn add_left_behind(&self, calls: &Calls, mut parcel: Parcel) {
        let mut parcels = lock(&self.parcels);
        if parcels.over.contains(&parcel.sid) {
            parcel.due = Instant::now();
        }
        if !calls.knows(&parcel.sid) {
            parcels.waiting.push(parcel);
        }
    }

    fn is_all_read(&self) {
        let mut parcels = lock(&self.parcels);
        parcels.all_read = true;
        parcels.over = HashSet::new();
    }

    /// A call of which nothing more will come.
    fn file_now(&self, sid: &str) {
        let mut parcels = lock(&self.parcels);
        if !parcels.all_read {
            parcels.over.insert(sid.to_owned());
        }
        for parcel in parcels.waiting.iter_mut().filter(|parcel| parcel.sid == sid) {
            parcel.due = Instant::now();
        }
        drop(parcels);
        self.changed.notify_all();
    }

    /// A call that goes on after all. It files itself when it ends, and then has more to tell.
    fn forget(&self, sid: &str) {
        lock(&self.parcels).waiting.retain(|parcel| !(parcel.unfinished && parcel.sid == sid));
    }

    /// Sleeps until something is due, and takes it out. The oldest first.
    fn next(&self) -> Parcel {
        let mut parcels = lock(&self.parcels);
        loop {
            let now = Instant::now();
            if let Some(due) = parcels.waiting.iter().position(|parcel| parcel.due <= now) {
                let parcel = parcels.waiting.remove(due);
                parcels.on_the_way.push(parcel.since);
                return parcel;
            }
            let earliest = parcels.waiting.iter().map(|parcel| parcel.due).min();
            let pause =
                earliest.map_or(DELIVER_AGAIN_MAX, |due| due.saturating_duration_since(now));
            let waited = self.changed.wait_timeout(parcels, pause);
            parcels = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Transcripts that n8n does not have yet.
    fn waiting(&self) -> usize {
        let parcels = lock(&self.parcels);
        let finished = parcels.waiting.iter().filter(|parcel| !parcel.unfinished).count();
        finished + parcels.on_the_way.len()
    }

    fn done(&self, since: Instant, again: Option<Parcel>) {
        let mut parcels = lock(&self.parcels);
        if let Some(at) = parcels.on_the_way.iter().position(|other| *other == since) {
            parcels.on_the_way.swap_remove(at);
        }
        parcels.waiting.extend(again);
        drop(parcels);
        self.changed.notify_all();
    }

    /// Before the process ends: every transcript has been offered to n8n once. What was not taken
    /// is on disk.
    fn await_first_tries(&self) {
        let parcels = lock(&self.parcels);
        let untried = |parcels: &mut Parcels| {
            let fresh = |parcel: &Parcel| parcel.tries == 0 && !parcel.unfinished;
            !parcels.on_the_way.is_empty() || parcels.waiting.iter().any(fresh)
        };
        let waited = self.changed.wait_timeout_while(parcels, 2 * DELIVER_WITHIN, untried);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Reads what earlier processes have left behind, all of it before the first delivery: so the
/// oldest goes first.
fn start_outbox(bridge: &'static Bridge) -> io::Result<()> {
    let began = Instant::now();
    let mut journals = 0;
    tidy_journals(bridge, |filed, path| {
        journals += 1;
        bridge.outbox.add_left_behind(&bridge.calls, left_behind(filed, path));
    });
    bridge.outbox.is_all_read();
    let (given_up, ms) =
        (bridge.outbox.given_up.load(Ordering::Relaxed), began.elapsed().as_millis());
    log!(Debug, "{journals} journals of calls that are not filed, read in {ms} ms"; journals, ms);
    if given_up > 0 {
        log!(Error, "{given_up} transcripts were never delivered: see callbridge outbox"; given_up);
    }
    for _ in 0..DELIVERIES_AT_ONCE {
        spawn("outbox".into(), move || {
            loop {
                let parcel = bridge.outbox.next();
                let since = parcel.since;
                let again = deliver(bridge, parcel);
                bridge.outbox.done(since, again);
            }
        })?;
    }
    Ok(())
}

/// At the start, and once a day: journals that nobody needs any more are removed. `waits` is given
/// those whose transcript n8n is still to get, the oldest first.
fn tidy_journals(bridge: &Bridge, mut waits: impl FnMut(Filed, PathBuf)) {
    let mut too_old = 0;
    for path in journals(&bridge.config.data_dir) {
        if let Some(at) = delivered_at(&path) {
            remove_if_old(bridge, &path, since(at));
            continue;
        }
        match Filed::read(&path) {
            Ok(filed) if filed.delivered => remove_if_old(bridge, &path, filed.quiet_for),
            Ok(filed) if filed.quiet_for > DELIVER_FOR => too_old += 1,
            Ok(filed) => waits(filed, path),
            Err(error) => log!(Warn, "{}: cannot be read: {error}", path.display()),
        }
    }
    // Without n8n they are where their owner wants them.
    let given_up = if bridge.config.n8n_webhook_url.is_some() { too_old } else { 0 };
    bridge.outbox.given_up.store(given_up, Ordering::Relaxed);
}

/// What an earlier process has not delivered. A call without an end may be taken up again first.
fn left_behind(filed: Filed, journal: PathBuf) -> Parcel {
    let (ended_by, wait) = match (filed.ended_by.as_str(), filed.transferred) {
        ("", true) => {
            let most = transfer_max(filed.direction);
            (format!("{:?}", HangUp::Transferred), most.saturating_sub(filed.quiet_for))
        }
        ("", false) => {
            (format!("{:?}", HangUp::ProcessDied), TAKE_UP_WITHIN.saturating_sub(filed.quiet_for))
        }
        (ended_by, _) => (ended_by.to_owned(), Duration::ZERO),
    };
    // A journal whose first line is spoilt still has a name.
    let sid = if filed.sid.is_empty() { sid_of(&journal).to_owned() } else { filed.sid };
    Parcel {
        ended_by,
        unfinished: filed.ended_by.is_empty(),
        sid,
        number: filed.number,
        transcript: filed.transcript,
        journal,
        tries: 0,
        due: Instant::now() + wait,
        since: Instant::now().checked_sub(filed.quiet_for).unwrap_or_else(Instant::now),
    }
}

/// Of nearly all journals the last line is all that has to be read again.
fn delivered_at(path: &Path) -> Option<Timestamp> {
    const LINE_BYTES_MAX: u64 = 256;
    let mut file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LINE_BYTES_MAX))).ok()?;
    let mut end = Vec::new();
    file.take(LINE_BYTES_MAX).read_to_end(&mut end).ok()?;
    let line = end.strip_suffix(b"\n")?.rsplit(|&byte| byte == b'\n').next()?;
    let event: Value = serde_json::from_slice(line).ok()?;
    if event["event"] != "delivered" {
        return None;
    }
    event["at"].as_str()?.parse().ok()
}

fn remove_if_old(bridge: &Bridge, path: &Path, quiet_for: Duration) {
    if quiet_for > bridge.config.keep
        && let Err(error) = fs::remove_file(path)
    {
        log!(Warn, "{}: cannot be removed: {error}", path.display());
    }
}

/// One try. Gives the parcel back if there is to be another.
fn deliver(bridge: &Bridge, mut parcel: Parcel) -> Option<Parcel> {
    if parcel.unfinished {
        if bridge.calls.find(&parcel.sid).is_some_and(|call| !call.is_over()) {
            // It was taken up again, and files itself when it ends.
            return None;
        }
        parcel.unfinished = false;
        parcel.note(&json!({"event": "end", "endedBy": parcel.ended_by}));
        bridge.metrics.calls.of(&[&parcel.ended_by]).add();
    }
    if parcel.transcript.text().is_empty() {
        log!(parcel, Info, After, "nothing was said, so there is no transcript to file");
        parcel.note(&json!({"event": "delivered"}));
        return None;
    }
    if bridge.config.n8n_webhook_url.is_none() {
        log!(parcel, Info, After, "the transcript is in {}", parcel.journal.display());
        return None;
    }
    if Filed::read(&parcel.journal).is_ok_and(|filed| filed.delivered) {
        // `callbridge outbox --retry` was faster.
        return None;
    }
    match offer(bridge, &parcel) {
        Ok(()) => {
            parcel.note(&json!({"event": "delivered"}));
            let lines = parcel.transcript.count();
            log!(parcel, Info, After, "n8n has the transcript of {lines} lines"; lines);
            None
        }
        Err(failure) => keep(parcel, &failure),
    }
}

fn offer(bridge: &Bridge, parcel: &Parcel) -> Result<(), Failure> {
    let question = ToN8n {
        sid: &parcel.sid,
        number: &parcel.number,
        route: "2",
        data: &parcel.transcript.text(),
        key: format!("{}-2", parcel.sid),
        ended_by: Some(&parcel.ended_by),
    };
    parcel.show(bridge, Exhibit::Filing, &question.for_the_eye());
    // Every 2xx will do.
    let taken = |reply: &N8nReply| {
        parcel.show(bridge, Exhibit::Taken, &reply.for_the_eye());
        n8n_refusal(reply).map_or(Ok(()), Err)
    };
    ask_n8n(bridge, &question, DELIVER_WITHIN, taken)
}

fn keep(mut parcel: Parcel, failure: &Failure) -> Option<Parcel> {
    parcel.tries += 1;
    parcel.note(&json!({"event": "undelivered", "why": failure.to_string()}));
    let path = parcel.journal.display();
    if parcel.since.elapsed() > DELIVER_FOR {
        log!(parcel, Error, After, "{failure}; the transcript stays in {path} (callbridge outbox)");
        return None;
    }
    let doubled = DELIVER_AGAIN_MIN * 2_u32.saturating_pow((parcel.tries - 1).min(16));
    // A quarter more or less, so that many do not come back in the same moment.
    let [dice] = random_bytes();
    let pause = doubled.min(DELIVER_AGAIN_MAX) * (192 + u32::from(dice) / 2) / 256;
    let seconds = pause.as_secs();
    log!(
        parcel,
        Warn,
        After,
        "{failure}; the transcript stays in {path}, next try in {seconds} s";
        seconds
    );
    parcel.due = Instant::now() + pause;
    Some(parcel)
}

impl Parcel {
    /// Of many tries the first one.
    fn show(&self, bridge: &Bridge, exhibit: Exhibit, text: &str) {
        if self.tries == 0 {
            self.note(&exhibit.event(&bridge.config, text));
        }
    }

    /// A journal that was deleted under our feet, or could not be written, is completed with all
    /// that is known.
    fn note(&self, event: &Value) {
        let journal = Journal::at(self.journal.clone());
        if !Filed::read(&self.journal).is_ok_and(|filed| filed.sid == self.sid) {
            let ring = json!({"event": "ring", "callSid": self.sid, "number": self.number});
            let end = json!({"event": "end", "endedBy": self.ended_by});
            let said = self.transcript.lines.iter().map(Line::event);
            for event in [ring].into_iter().chain(said).chain([end]) {
                journal.note(&event);
            }
        }
        journal.note(event);
    }
}

/// `callbridge outbox [--retry]`: what n8n has not taken, and why; and one more try now.
fn outbox_command(retry: bool) -> Result<(), Stop> {
    let config = Config::load().map_err(|complaints| needs_attention("setting", &complaints))?;
    let bridge = Bridge::new(config)?;
    let mut waiting = 0;
    for path in journals(&bridge.config.data_dir) {
        let Ok(filed) = Filed::read(&path) else {
            complain(&format!("{}: cannot be read", path.display()));
            continue;
        };
        let lines = filed.transcript.count();
        // No call and no transfer lasts longer: without an end, its process has died.
        let goes_on = filed.ended_by.is_empty() && filed.quiet_for <= TRANSFER_MAX;
        if filed.delivered || goes_on || lines == 0 {
            continue;
        }
        let hours = filed.quiet_for.as_secs() / 3_600;
        let number = shorten_number(&filed.number);
        let why = if filed.trouble.is_empty() { "not tried yet" } else { &filed.trouble };
        let about = format!("{} {number}, {lines} lines, {hours} h old: {why}", filed.sid);
        let parcel = left_behind(filed, path);
        match retry.then(|| offer(&bridge, &parcel)) {
            Some(Ok(())) => {
                parcel.note(&json!({"event": "delivered"}));
                say(&format!("{about}\n  delivered now\n"));
            }
            Some(Err(failure)) => {
                waiting += 1;
                parcel.note(&json!({"event": "undelivered", "why": failure.to_string()}));
                say(&format!("{about}\n  tried now: {failure}\n"));
            }
            None => {
                waiting += 1;
                say(&format!("{about}\n"));
            }
        }
    }
    say(&format!("{waiting} transcripts wait for n8n\n"));
    match (retry, waiting) {
        (true, 1..) => Err(Stop::Failed("callbridge: n8n has not taken them all".into())),
        _ => Ok(()),
    }
}

// --- 9c. What the owner sees ---------------------------------------------------------
//
// The live page (`src/page.html`), and the JSON behind it. The journals are the one source, so
// that it does not matter to the page whether a call goes on, is over, or was taken up by another
// process. Memory adds what is not worth a line on disk: words that are not final yet, and who is
// speaking. The page is a phone as well: it plays Twilio's part, and the call takes the same way
// as every other.

const PAGE: &str = include_str!("page.html");

/// `GET /`. The policy allows what is in the page and this server, and nothing else: no address of
/// anybody else's, no script or style that was not in it when it was compiled in. The sound
/// worklet of its phone is made by the page itself (`blob:`).
fn page(_: &'static Bridge, request: &tiny_http::Request) -> Reply {
    static HASHES: LazyLock<[String; 2]> =
        LazyLock::new(|| ["script", "style"].map(|element| hashes(PAGE, element)));
    let [scripts, styles] = &*HASHES;
    // Not every browser counts `ws:` and `wss:` among 'self'.
    let host = header(request, "Host");
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-:[]".contains(&byte);
    let sockets = if !host.is_empty() && host.bytes().all(is_plain) {
        format!(" ws://{host} wss://{host}")
    } else {
        String::new()
    };
    let policy = format!(
        "default-src 'none'; script-src {scripts} blob:; worker-src blob:; style-src {styles}; \
         img-src data:; connect-src 'self'{sockets}; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'"
    );
    Reply::new(200, "text/html; charset=utf-8", PAGE.to_owned()).with([
        ("Content-Security-Policy", policy),
        ("X-Frame-Options", "DENY".to_owned()),
        ("Permissions-Policy", "microphone=(self)".to_owned()),
    ])
}

/// `'sha256-…'` for each element of that kind, as a Content-Security-Policy wants it.
fn hashes(page: &str, element: &str) -> String {
    let (open, close) = (format!("<{element}>"), format!("</{element}>"));
    let contents = page.split(&open).skip(1).filter_map(|rest| rest.split(&close).next());
    let hash = |content: &str| BASE64.encode(digest::digest(&digest::SHA256, content.as_bytes()));
    let hashes: Vec<String> =
        contents.map(|content| format!("'sha256-{}'", hash(content))).collect();
    hashes.join(" ")
}

/// A call in a word or two: in the list, and above its story.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Summary {
    sid: String,
    number: String,
    direction: Direction,
    began: Option<String>,
    ended: Option<String>,
    seconds: f64,
    stage: String,
    ended_by: Option<String>,
    live: bool,
    speaking: Option<&'static str>,
    /// Utterances.
    lines: usize,
    /// None: there is no n8n to deliver to.
    delivered: Option<bool>,
    transferred: bool,
}

impl Call {
    /// One word on who is heard. The caller hears the agent for as long as Twilio plays it.
    fn speaking(&self) -> Option<&'static str> {
        let caller = self.caller()?;
        if *lock(&caller.plays_until) > Instant::now() {
            return Some("agent");
        }
        let loud_at = Duration::from_millis(self.loud_at_ms.load(Ordering::Relaxed));
        let speaks = !loud_at.is_zero() && self.rang.elapsed() < loud_at + SPEAKS_ON;
        speaks.then_some("user")
    }
}

/// `GET /calls?before=<cursor>&limit=<number>`: the calls in progress, and the past ones, newest
/// first. A cursor is a journal's name without its ending.
fn call_list(bridge: &'static Bridge, request: &tiny_http::Request) -> Reply {
    let query = query_of(request);
    let before = query.get("before");
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if before.len() > 100 || !before.bytes().all(is_name) {
        return Reply::error(400, "before must be what an answer of /calls had as next");
    }
    let limit = match query.get("limit") {
        "" => CALLS_A_PAGE,
        limit => limit.parse().unwrap_or_default(),
    };
    if !(1..=CALLS_A_PAGE_MAX).contains(&limit) {
        let error = format!("limit must be a whole number from 1 to {CALLS_A_PAGE_MAX}");
        return Reply::error(400, &error);
    }
    let mut live = bridge.calls.all();
    live.sort_by_key(|call| std::cmp::Reverse(call.began));
    let (past, next) = past_calls(bridge, &live, before, limit);
    let mut answer = json!({
        "now": by_the_calendar(Timestamp::now()),
        "started": by_the_calendar(bridge.began),
        "version": env!("CARGO_PKG_VERSION"),
        "publicUrl": bridge.config.public_url,
        "maxCalls": bridge.config.max_calls,
        "draining": bridge.draining.load(Ordering::SeqCst),
        "outbox": {"waiting": bridge.outbox.waiting()},
        "agent": agent_in_short(&bridge.agent),
        "past": past,
        "next": next,
    });
    if before.is_empty() {
        answer["live"] = live.iter().map(|call| json!(Summary::of_live(call))).collect();
    }
    Reply::json(200, &answer)
}

fn query_of(request: &tiny_http::Request) -> Form {
    let query = request.url().split_once('?').map(|(_, query)| query).unwrap_or_default();
    Form::parse(query.as_bytes())
}

/// Only the journals of this page are read, however many there are.
fn past_calls(
    bridge: &Bridge,
    live: &[Arc<Call>],
    before: &str,
    limit: usize,
) -> (Vec<Summary>, Option<String>) {
    let mut paths = journals(&bridge.config.data_dir);
    let stem = |path: &Path| path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    paths.retain(|path| {
        let is_live = live.iter().any(|call| call.sid == sid_of(path));
        let is_older = before.is_empty() || stem(path).is_some_and(|stem| stem.as_str() < before);
        is_older && !is_live
    });
    let first = paths.len().saturating_sub(limit);
    let past = paths[first..].iter().rev().map(|path| Summary::of_past(bridge, path)).collect();
    let next = paths.get(first).filter(|_| first > 0).and_then(|path| stem(path));
    (past, next)
}

impl Summary {
    fn of_live(call: &Call) -> Summary {
        let (stage, how) = {
            let state = lock(&call.state);
            (state.stage.clone(), state.hang_up)
        };
        Summary {
            sid: call.sid.clone(),
            number: call.number.clone(),
            direction: call.direction,
            began: Some(by_the_calendar(call.began)),
            ended: None,
            seconds: in_seconds(call.rang.elapsed()),
            stage,
            ended_by: how.map(|how| format!("{how:?}")),
            live: true,
            speaking: call.speaking(),
            lines: lock(&call.transcript).count(),
            delivered: call.bridge.config.n8n_webhook_url.as_ref().map(|_| false),
            transferred: how == Some(HangUp::Transferred),
        }
    }

    /// Also of a journal that cannot be read: its name tells that there was a call.
    fn of_past(bridge: &Bridge, path: &Path) -> Summary {
        let filed = Filed::read(path).unwrap_or_default();
        let first = &bridge.agent.first_stage;
        Summary {
            sid: sid_of(path).to_owned(),
            number: filed.number,
            direction: filed.direction,
            began: filed.began.map(by_the_calendar),
            ended: filed.ended.map(by_the_calendar),
            seconds: filed.began.zip(filed.ended).map_or(0.0, |(began, ended)| {
                in_seconds(ended.duration_since(began).try_into().unwrap_or_default())
            }),
            stage: if filed.stage.is_empty() { first.clone() } else { filed.stage },
            ended_by: Some(filed.ended_by).filter(|ended_by| !ended_by.is_empty()),
            live: false,
            speaking: None,
            lines: filed.transcript.count(),
            delivered: bridge.config.n8n_webhook_url.as_ref().map(|_| filed.delivered),
            transferred: filed.transferred,
        }
    }
}

/// What the page draws the flow chart from.
fn agent_in_short(agent: &Agent) -> Value {
    let stages = agent.stages.iter().map(|(name, stage)| {
        json!({
            "name": name,
            "agentName": stage.agent_name.as_ref().unwrap_or(&agent.name),
            "voice": stage.voice,
            "tools": stage.tools,
        })
    });
    let tools = agent.tools.iter().map(|(name, tool)| {
        let (kind, stage) = match &tool.action {
            ToolAction::EnterStage { stage, .. } => ("enter_stage", Some(stage)),
            ToolAction::N8n { .. } => ("n8n", None),
            ToolAction::Reply(_) => ("reply", None),
            ToolAction::HangUp(_) => ("hang_up", None),
            ToolAction::Transfer(_) => ("transfer", None),
            ToolAction::Ultravox { .. } => ("ultravox", None),
        };
        let tool = json!({"kind": kind, "stage": stage, "description": tool.description});
        (name.clone(), tool)
    });
    json!({
        "name": agent.name,
        "company": agent.company,
        "firstStage": agent.first_stage,
        "stages": stages.collect::<Vec<_>>(),
        "tools": tools.collect::<Map<_, _>>(),
    })
}

/// `GET /calls/{sid}?from=<byte>`: a call's journal from there on, and what only memory knows.
fn call_story(bridge: &'static Bridge, request: &tiny_http::Request) -> Reply {
    let sid = path_of(request).trim_start_matches("/calls/");
    let from = match query_of(request).get("from") {
        "" => Ok(0),
        from => from.parse(),
    };
    let Ok(from) = from else {
        return Reply::error(400, "from must be what an answer of /calls/{sid} had as next");
    };
    let call = bridge.calls.find(sid);
    let path = match &call {
        Some(call) => Some(call.journal.path.clone()),
        None if is_sid(sid) => journal_of(&bridge.config.data_dir, sid),
        None => None,
    };
    let Some(path) = path else {
        return Reply::error(404, "there is no journal of such a call");
    };
    let live = call.as_deref();
    let (chapter, trouble) = match Chapter::read(&path, from) {
        Ok(chapter) => (chapter, None),
        Err(error) if live.is_some() => {
            (Chapter::default(), Some(format!("the journal cannot be read: {error}")))
        }
        Err(error) => {
            return Reply::error(500, &format!("the journal cannot be read: {error}"));
        }
    };
    let summary = live.map_or_else(|| Summary::of_past(bridge, &path), Summary::of_live);
    // Without a journal, memory is all there is.
    let all = trouble.is_some();
    Reply::json(
        200,
        &json!({
            "from": chapter.from,
            "next": chapter.next,
            "more": chapter.more,
            "events": chapter.events,
            "partial": live.map(|call| call.words_in_memory(all)).unwrap_or_default(),
            "speaking": summary.speaking,
            "live": summary.live,
            "trouble": trouble,
            "summary": summary,
        }),
    )
}

/// A piece of a journal: whole lines only.
#[derive(Default)]
struct Chapter {
    from: u64,
    next: u64,
    more: bool,
    events: Vec<Value>,
}

impl Chapter {
    /// An offset that is not the beginning of a line here belongs to another file, such as one
    /// that was deleted since: the story then begins anew.
    fn read(path: &Path, from: u64) -> io::Result<Chapter> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut file = BufReader::new(file);
        let mut before = [b'\n'];
        if from > 0 && from <= length {
            file.seek(SeekFrom::Start(from - 1))?;
            file.read_exact(&mut before)?;
        }
        let from = if from > length || before != *b"\n" { 0 } else { from };
        file.seek(SeekFrom::Start(from))?;
        let mut chapter = Chapter { from, next: from, ..Chapter::default() };
        let mut line = Vec::new();
        while chapter.next - from < STORY_BYTES_MAX {
            line.clear();
            let count = file.read_until(b'\n', &mut line)?;
            if line.last() != Some(&b'\n') {
                // The rest of it is still being written.
                return Ok(chapter);
            }
            chapter.next += count as u64;
            chapter.events.extend(serde_json::from_slice::<Value>(&line).ok());
        }
        chapter.more = chapter.next < length;
        Ok(chapter)
    }
}

impl Call {
    /// What was said and is not in the journal yet, or, if there is none, all of it.
    fn words_in_memory(&self, all: bool) -> Vec<Value> {
        let transcript = lock(&self.transcript);
        let lines = transcript.lines.iter().filter(|line| all || !line.finished);
        lines.map(Line::as_json).collect()
    }
}

/// The number of whoever calls through the page. No number of a telephone's looks like it.
const BROWSER: &str = "browser";

/// `POST /browser-call`: the page's phone has been picked up. Behind this it does what Twilio
/// would: opens the media stream with the token, and talks.
fn browser_call(bridge: &'static Bridge, _url: &str, _order: &Value) -> Reply {
    let sid = format!("CA{}", random_hex());
    let incoming = IncomingCall {
        sid: &sid,
        number: BROWSER,
        direction: Direction::Browser,
        first_message: String::new(),
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
            "streamPath": "/media-stream",
            "streamUrl": stream_url(&bridge.config.public_url),
            "parameters": answer.parameters(),
            "twiml": answer.twiml(bridge),
        }),
    )
}

impl Answer {
    /// What the caller would be told.
    fn sentence(&self, bridge: &Bridge) -> String {
        match self {
            Answer::Sentence(sentence) => sentence.clone(),
            Answer::Person(_) => bridge.agent.phrases.putting_through.clone(),
            Answer::Stream { .. } | Answer::Transfer(_) | Answer::HangUp => String::new(),
        }
    }

    /// What the `<Parameter>`s of a stream hold.
    fn parameters(&self) -> Value {
        match self {
            Answer::Stream { token } => json!({"token": token}),
            Answer::Person(_) | Answer::Transfer(_) | Answer::Sentence(_) | Answer::HangUp => {
                Value::Null
            }
        }
    }
}

/// The call in `/browser-call/{sid}/stream-ended`.
fn browser_stream(path: &str) -> Option<&str> {
    path.strip_prefix("/browser-call/")?.strip_suffix("/stream-ended").filter(|sid| is_sid(sid))
}

/// `POST /browser-call/{sid}/stream-ended`: what Twilio asks at `/stream-ended`, asked by the page.
/// `callStatus` and `dialCallStatus` in the body mean what they mean in Twilio's form: the page
/// rings nobody, but it can tell that nobody has answered.
fn browser_stream_ended(bridge: &'static Bridge, url: &str, order: &Value) -> Reply {
    let sid = browser_stream(url.split('?').next().unwrap_or_default()).unwrap_or_default();
    // With the number of a call of Twilio's, this would cut it.
    let direction = match bridge.calls.find(sid) {
        Some(call) => Some(call.direction),
        None => journal_of(&bridge.config.data_dir, sid)
            .and_then(|path| Filed::read(&path).ok())
            .map(|filed| filed.direction),
    };
    if direction != Some(Direction::Browser) {
        return Reply::error(404, "this is no call of the page's phone");
    }
    let status = order["callStatus"].as_str().unwrap_or_default();
    let dial_status = order["dialCallStatus"].as_str().unwrap_or_default();
    let answer = what_comes_next(bridge, sid, status, dial_status);
    let (twiml, parameters) = (answer.twiml(bridge), answer.parameters());
    Reply::json(200, &json!({"twiml": twiml, "parameters": parameters}))
}

/// The kinds of messages of which a journal gets the first one, so that the page can show what
/// goes over the wire. Sound goes on its way first, and is shown then.
#[derive(Clone, Copy)]
enum Exhibit {
    Ring,
    Lookup,
    LookedUp,
    Create,
    Created,
    Answer,
    Start,
    CallerFrame,
    CallerPcm,
    AgentPcm,
    AgentFrame,
    State,
    Transcript,
    ClearBuffer,
    Clear,
    Key,
    Keys,
    Invocation,
    ToolQuestion,
    ToolReply,
    Result,
    Mark,
    MarkBack,
    Stop,
    StreamEnded,
    NextStream,
    Filing,
    Taken,
}

impl Exhibit {
    fn event(self, config: &Config, text: &str) -> Value {
        let (step, way, party) = self.about();
        let text = cut(&config.hide_secrets(text.to_owned()), WIRE_CHARS_MAX);
        json!({
            "event": "wire",
            "step": step as u8,
            "way": way,
            "with": party.name(),
            "text": text,
        })
    }

    /// Step, direction, and who is at the other end.
    fn about(self) -> (Step, &'static str, Party) {
        match self {
            Exhibit::Ring => (Step::Ring, "in", Party::Twilio),
            Exhibit::Lookup => (Step::Greeting, "out", Party::N8n),
            Exhibit::LookedUp => (Step::Greeting, "in", Party::N8n),
            Exhibit::Create => (Step::Agent, "out", Party::Ultravox),
            Exhibit::Created => (Step::Agent, "in", Party::Ultravox),
            Exhibit::Answer => (Step::Answer, "out", Party::Twilio),
            Exhibit::Start => (Step::Stream, "in", Party::Twilio),
            Exhibit::CallerFrame | Exhibit::Key => (Step::Talk, "in", Party::Twilio),
            Exhibit::AgentFrame | Exhibit::Clear => (Step::Talk, "out", Party::Twilio),
            Exhibit::CallerPcm | Exhibit::Keys => (Step::Talk, "out", Party::Ultravox),
            Exhibit::AgentPcm | Exhibit::State | Exhibit::Transcript | Exhibit::ClearBuffer => {
                (Step::Talk, "in", Party::Ultravox)
            }
            Exhibit::Invocation => (Step::Act, "in", Party::Ultravox),
            Exhibit::ToolQuestion => (Step::Act, "out", Party::N8n),
            Exhibit::ToolReply => (Step::Act, "in", Party::N8n),
            Exhibit::Result => (Step::Act, "out", Party::Ultravox),
            Exhibit::Mark | Exhibit::NextStream => (Step::Goodbye, "out", Party::Twilio),
            Exhibit::MarkBack | Exhibit::Stop | Exhibit::StreamEnded => {
                (Step::Goodbye, "in", Party::Twilio)
            }
            Exhibit::Filing => (Step::After, "out", Party::N8n),
            Exhibit::Taken => (Step::After, "in", Party::N8n),
        }
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

fn in_seconds(duration: Duration) -> f64 {
    // To the tenth: nobody reads more.
    (duration.as_secs_f64() * 10.0).round() / 10.0
}

// ============================================================================
// 10. Toolbox
// ============================================================================
//
// What the story above uses and a reader can take on trust: the full-duplex socket, G.711,
// failures, secrets, the log, the metrics, a few texts and threads.

// --- A WebSocket that two threads use at once ------------------------------------
//
// A WebSocket's state, and TLS's below it, want exclusive access for reading and for writing. A
// call does both all the time, from two threads. The way out is to *wait outside the lock and
// think inside it*: the reading thread waits in `read` on the bare socket and holds nothing. What
// it got is fed, under one short lock, into TLS and then into the protocol, which finds the end
// of its food as `WouldBlock`. Writers take the same lock, write, and let go. So pings, closes
// and TLS's own messages stay in order, and nothing polls.

/// One leg of a call: a WebSocket over TCP or TLS, read by one thread and written by any.
struct Duplex {
    socket: Arc<TcpStream>,
    state: Mutex<DuplexState>,
}

struct DuplexState {
    websocket: WebSocketContext,
    tls: Option<Box<ClientConnection>>,
    /// Plain bytes that have arrived and were not understood yet.
    arrived: Arrived,
    /// The socket's read timeout, remembered to save the system call.
    patience: Duration,
}

struct Arrived {
    bytes: VecDeque<u8>,
    /// When the latest of them were read off the socket.
    at: Instant,
    ended: bool,
}

/// A whole message. Pings and pongs are dealt with further down.
enum Received {
    Text(Utf8Bytes),
    Binary(Bytes),
}

/// Why nothing more comes.
#[derive(Debug)]
enum LineEnd {
    /// Nothing within the reader's patience. The line may still be good.
    Quiet,
    /// The peer said goodbye, with this code if any.
    Closed(Option<u16>),
    /// The line broke without a goodbye.
    Broken(String),
    /// The peer sent what is not WebSocket, or too much of it. It has been told.
    Nonsense(String),
}

impl Display for LineEnd {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            LineEnd::Quiet => f.write_str("nothing came for too long"),
            LineEnd::Closed(Some(code)) => write!(f, "closed with code {code}"),
            LineEnd::Closed(None) => f.write_str("closed"),
            LineEnd::Broken(why) => write!(f, "the line broke: {why}"),
            LineEnd::Nonsense(why) => write!(f, "nonsense on the line: {why}"),
        }
    }
}

impl Duplex {
    /// `early` is what came together with the end of the handshake.
    fn new(
        socket: Arc<TcpStream>,
        tls: Option<Box<ClientConnection>>,
        early: Vec<u8>,
        role: Role,
    ) -> Duplex {
        let limit = match role {
            Role::Server => TWILIO_MESSAGE_BYTES_MAX,
            Role::Client => AGENT_MESSAGE_BYTES_MAX,
        };
        let config = WebSocketConfig::default()
            .read_buffer_size(MESSAGE_BUFFER_BYTES)
            // Every message goes out at once, with one write.
            .write_buffer_size(0)
            .max_message_size(Some(limit))
            .max_frame_size(Some(limit));
        let state = DuplexState {
            websocket: WebSocketContext::new(role, Some(config)),
            tls,
            arrived: Arrived { bytes: early.into(), at: Instant::now(), ended: false },
            patience: Duration::ZERO,
        };
        Duplex { socket, state: Mutex::new(state) }
    }

    /// The next message, and when the last of it was read off the socket. Only one thread may call
    /// this. `patience` is how long a message may take, give or take as much again for one that
    /// arrives in small pieces.
    fn read(&self, patience: Duration) -> Result<(Received, Instant), LineEnd> {
        let began = Instant::now();
        let mut chunk = [0; READ_BYTES];
        loop {
            {
                let mut state = lock(&self.state);
                if let Some(received) = state.next_message(&self.socket) {
                    return received.map(|received| (received, state.arrived.at));
                }
                if began.elapsed() >= patience {
                    return Err(LineEnd::Quiet);
                }
                if state.patience != patience {
                    self.socket
                        .set_read_timeout(Some(patience))
                        .map_err(|error| LineEnd::Broken(error.to_string()))?;
                    state.patience = patience;
                }
            }
            // Here, and only here, the thread waits. It holds no lock.
            match (&*self.socket).read(&mut chunk) {
                Ok(0) => lock(&self.state).arrived.ended = true,
                Ok(count) => {
                    let at = Instant::now();
                    let mut state = lock(&self.state);
                    state.arrived.at = at;
                    state
                        .feed(&chunk[..count], &self.socket)
                        .map_err(|error| LineEnd::Broken(error.to_string()))?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_timeout(&error) => return Err(LineEnd::Quiet),
                Err(error) => return Err(LineEnd::Broken(error.to_string())),
            }
        }
    }

    fn send(&self, message: Message) -> Result<(), LineEnd> {
        let mut state = lock(&self.state);
        let DuplexState { websocket, tls, arrived, .. } = &mut *state;
        let mut wire = Wire { socket: &self.socket, tls: tls.as_deref_mut(), arrived };
        websocket.write(&mut wire, message).and_then(|()| websocket.flush(&mut wire)).map_err(
            |error| {
                let end = line_end(error);
                if let LineEnd::Broken(_) = end {
                    // The reader is to hear of it at once, and nobody is to wait here again.
                    self.shut();
                }
                end
            },
        )
    }

    /// Says goodbye. What the peer still sends can be read until its own goodbye comes.
    fn close(&self, code: CloseCode, why: &str) {
        let mut state = lock(&self.state);
        let DuplexState { websocket, tls, arrived, .. } = &mut *state;
        let mut wire = Wire { socket: &self.socket, tls: tls.as_deref_mut(), arrived };
        // A control frame holds 125 bytes, two of them the code (RFC 6455, 5.5).
        let reason: String = why.chars().filter(char::is_ascii).take(120).collect();
        if websocket.close(&mut wire, Some(CloseFrame { code, reason: reason.into() })).is_err() {
            // It was closed or broken before: there is nobody to say goodbye to.
        }
    }

    /// Gives the peer a moment to answer our goodbye, so that it is not cut off by a reset.
    fn await_close(&self) {
        const CLOSE_WITHIN: Duration = Duration::from_secs(1);
        let deadline = Instant::now() + CLOSE_WITHIN;
        while Instant::now() < deadline && self.read(CLOSE_WITHIN).is_ok() {}
        self.shut();
    }

    fn shut(&self) {
        shut(&self.socket);
    }
}

impl DuplexState {
    /// A message, an end, or `None`: more bytes are needed.
    fn next_message(&mut self, socket: &TcpStream) -> Option<Result<Received, LineEnd>> {
        let mut wire = Wire { socket, tls: self.tls.as_deref_mut(), arrived: &mut self.arrived };
        loop {
            return match self.websocket.read(&mut wire) {
                Ok(Message::Text(text)) => Some(Ok(Received::Text(text))),
                Ok(Message::Binary(bytes)) => Some(Ok(Received::Binary(bytes))),
                Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => continue,
                Ok(Message::Close(frame)) => {
                    if self.websocket.flush(&mut wire).is_err() {
                        // Our answer to the goodbye; the peer need not wait for it.
                    }
                    Some(Err(LineEnd::Closed(frame.map(|frame| frame.code.into()))))
                }
                Err(tungstenite::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    None
                }
                Err(error) => {
                    let end = line_end(error);
                    if let LineEnd::Nonsense(why) = &end {
                        let reason =
                            why.chars().filter(char::is_ascii).take(120).collect::<String>();
                        let frame = CloseFrame { code: CloseCode::Protocol, reason: reason.into() };
                        if self.websocket.close(&mut wire, Some(frame)).is_err() {
                            // It does not speak the protocol anyway.
                        }
                    }
                    Some(Err(end))
                }
            };
        }
    }

    /// Bytes off the wire become plain bytes. TLS may have something to say in return.
    fn feed(&mut self, mut bytes: &[u8], socket: &TcpStream) -> io::Result<()> {
        let Some(tls) = &mut self.tls else {
            self.arrived.bytes.extend(bytes);
            return Ok(());
        };
        while !bytes.is_empty() {
            if tls.read_tls(&mut bytes)? == 0 {
                // The peer has ended TLS; what it sends behind that counts for nothing.
                self.arrived.ended = true;
                return Ok(());
            }
            let progress = tls.process_new_packets().map_err(io::Error::other);
            while tls.wants_write() {
                tls.write_tls(&mut &*socket).map_err(dead_line)?;
            }
            let progress = progress?;
            self.arrived.ended |= progress.peer_has_closed();
            let mut left = progress.plaintext_bytes_to_read();
            let mut reader = tls.reader();
            while left > 0 {
                let plain = reader.fill_buf()?;
                let count = plain.len();
                if count == 0 {
                    // Less than announced: without this the thread would turn here for ever.
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                self.arrived.bytes.extend(plain);
                reader.consume(count);
                left -= count;
            }
        }
        Ok(())
    }
}

/// The stream that tungstenite sees: reads what has arrived, writes to the peer.
struct Wire<'a> {
    socket: &'a TcpStream,
    tls: Option<&'a mut ClientConnection>,
    arrived: &'a mut Arrived,
}

impl Read for Wire<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.arrived.bytes.is_empty() && !self.arrived.ended {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.arrived.bytes.read(buffer)
    }
}

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else {
            return (&*self.socket).write(bytes).map_err(dead_line);
        };
        let count = tls.writer().write(bytes)?;
        while tls.wants_write() {
            tls.write_tls(&mut &*self.socket).map_err(dead_line)?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A write that ran out of time is the end of the line. tungstenite would take the `WouldBlock` by
/// which the system reports it for "later".
fn dead_line(error: io::Error) -> io::Error {
    if is_timeout(&error) { io::Error::other("the peer takes nothing any more") } else { error }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn line_end(error: tungstenite::Error) -> LineEnd {
    use tungstenite::error::ProtocolError;
    match error {
        tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed => {
            LineEnd::Closed(None)
        }
        tungstenite::Error::Protocol(ProtocolError::SendAfterClosing) => LineEnd::Closed(None),
        tungstenite::Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => {
            LineEnd::Broken("no goodbye".into())
        }
        tungstenite::Error::Io(error) => LineEnd::Broken(error.to_string()),
        other => LineEnd::Nonsense(other.to_string()),
    }
}

/// Opens the agent's leg: TCP, TLS for `wss`, WebSocket upgrade.
fn dial(url: &Secret, tls: &Arc<ClientConfig>) -> Result<Duplex, Failure> {
    let failed =
        |what: &str| Failure::new(Party::Ultravox, format!("could not join the call: {what}"));
    let request =
        url.reveal().into_client_request().map_err(|_| failed("its join URL cannot be read"))?;
    let uri = request.uri().clone();
    let secure = uri.scheme_str() == Some("wss");
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let socket =
        Arc::new(connect(&host, port).map_err(|error| failed("no connection").caused_by(error))?);
    let tls = if secure {
        let name = ServerName::try_from(host)
            .map_err(|error| failed("its host's name").caused_by(error))?;
        let connection = ClientConnection::new(Arc::clone(tls), name)
            .map_err(|error| failed("TLS").caused_by(error))?;
        let mut connection = Box::new(connection);
        let mut in_time = InTime { socket: &socket, deadline: Instant::now() + JOIN_WITHIN };
        while connection.is_handshaking() {
            connection.complete_io(&mut in_time).map_err(|error| failed("TLS").caused_by(error))?;
        }
        Some(connection)
    } else {
        None
    };
    let (bytes, key) = ws_client::generate_request(request)
        .map_err(|error| failed("its join URL").caused_by(error))?;
    let line = Duplex::new(socket, tls, Vec::new(), Role::Client);
    line.upgrade(&bytes, &key).map_err(|error| failed("no upgrade").caused_by(error))?;
    Ok(line)
}

fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, JOIN_WITHIN) {
            Ok(socket) => {
                socket.set_nodelay(true)?;
                socket.set_read_timeout(Some(JOIN_WITHIN))?;
                socket.set_write_timeout(Some(WRITE_WITHIN))?;
                return Ok(socket);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

impl Duplex {
    /// The client's half of the upgrade (RFC 6455, 4.1). What comes behind the answer's head stays
    /// in `arrived`: the agent may speak in the same breath.
    fn upgrade(&self, request: &[u8], key: &str) -> io::Result<()> {
        let mut state = lock(&self.state);
        let DuplexState { tls, arrived, .. } = &mut *state;
        Wire { socket: &self.socket, tls: tls.as_deref_mut(), arrived }.write_all(request)?;
        let mut in_time = InTime { socket: &self.socket, deadline: Instant::now() + JOIN_WITHIN };
        let mut chunk = [0; READ_BYTES];
        loop {
            let parsed = ws_client::Response::try_parse(state.arrived.bytes.make_contiguous())
                .map_err(io::Error::other)?;
            if let Some((length, response)) = parsed {
                let accepted = response
                    .headers()
                    .get("Sec-WebSocket-Accept")
                    .is_some_and(|accept| *accept == derive_accept_key(key.as_bytes()));
                state.arrived.bytes.drain(..length);
                return match response.status().as_u16() {
                    101 if accepted => Ok(()),
                    101 => Err(io::Error::other("the upgrade's answer is not for us")),
                    status => Err(io::Error::other(format!("HTTP status {status}"))),
                };
            }
            if state.arrived.bytes.len() > HEAD_BYTES_MAX {
                return Err(io::Error::other("the upgrade's answer is too long"));
            }
            match in_time.read(&mut chunk)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => state.feed(&chunk[..count], &self.socket)?,
            }
        }
    }
}

/// A socket with one deadline for all that is read from it. With a time limit for each `read`, a
/// peer that sends a byte now and then would never run out of time.
struct InTime<'a> {
    socket: &'a TcpStream,
    deadline: Instant,
}

impl Read for InTime<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let late = || io::Error::new(io::ErrorKind::TimedOut, "not in time");
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        self.socket.set_read_timeout(Some(left))?;
        let read = (&*self.socket).read(buffer);
        read.map_err(|error| if is_timeout(&error) { late() } else { error })
    }
}

impl Write for InTime<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self.socket).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn shut(socket: &TcpStream) {
    if socket.shutdown(Shutdown::Both).is_err() {
        // The peer was faster.
    }
}

// --- G.711 mu-law (ITU-T G.711, table 2) -----------------------------------------

const fn mulaw_decoded(code: u8) -> i16 {
    let code = !code;
    let segment = (code >> 4) & 0x07;
    let magnitude = (((((code & 0x0F) as i16) << 3) + 0x84) << segment) - 0x84;
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// `linear` has 14 bits, as G.711 has it: a 16-bit sample without its two lowest.
const fn mulaw_encoded(linear: i16) -> u8 {
    const BIAS: i16 = 33;
    const CLIP: i16 = 8_159;
    let (sign, magnitude) = if linear < 0 { (0x7F, -linear) } else { (0xFF, linear) };
    let biased = if magnitude > CLIP - BIAS { CLIP } else { magnitude + BIAS };
    // The segment is where the highest bit stands above the sixth.
    let segment = 10 - biased.leading_zeros();
    let step = (biased >> (segment + 1)) & 0x0F;
    ((segment << 4).to_le_bytes()[0] | step.to_le_bytes()[0]) ^ sign
}

static MULAW_TO_PCM: [i16; 256] = {
    let mut table = [0; 256];
    let mut code = 0;
    while code < table.len() {
        table[code] = mulaw_decoded(code.to_le_bytes()[0]);
        code += 1;
    }
    table
};

static PCM_TO_MULAW: [u8; 1 << 14] = {
    let mut table = [0; 1 << 14];
    let mut index = 0;
    while index < table.len() {
        let [low, high, ..] = index.to_le_bytes();
        table[index] = mulaw_encoded(i16::from_le_bytes([low, high]) - (1 << 13));
        index += 1;
    }
    table
};

fn mulaw_to_pcm(code: u8) -> i16 {
    MULAW_TO_PCM[usize::from(code)]
}

fn pcm_to_mulaw(sample: i16) -> u8 {
    // From -32768..=32767 to 0..=65535, then without the two lowest bits.
    PCM_TO_MULAW[usize::from(sample.cast_unsigned() ^ 0x8000) >> 2]
}

// --- What settings and agent files must look like ------------------------------------

/// The raw texts of the settings, and what is wrong with them so far.
struct Settings {
    values: HashMap<String, String>,
    complaints: Vec<String>,
}

impl Settings {
    /// `NAME=` in `.env.example` means "not set", so an empty value is none.
    fn text(&self, name: &str) -> Option<String> {
        self.values.get(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    fn complain(&mut self, name: &str, what: impl Display) {
        self.complaints.push(format!("{name}  {what}"));
    }

    fn required(&mut self, name: &str, where_from: &str) -> String {
        let text = self.text(name).unwrap_or_default();
        if text.is_empty() {
            self.complain(name, format_args!("is missing ({where_from})"));
        } else if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            self.complain(name, format_args!("has a character that no key has ({where_from})"));
        }
        text
    }

    fn parsed<T: std::str::FromStr>(&mut self, name: &str, wanted: &str) -> Option<T> {
        let text = self.text(name)?;
        let value = text.parse().ok();
        if value.is_none() {
            self.complain(name, format_args!("is \"{text}\": must be {wanted}"));
        }
        value
    }

    fn number<T>(&mut self, name: &str, default: T, least: T, most: T) -> T
    where
        T: std::str::FromStr + PartialOrd + Display + Copy,
    {
        let wanted = format!("a whole number from {least} to {most}");
        match self.parsed(name, &wanted) {
            None => default,
            Some(number) if number >= least && number <= most => number,
            Some(number) => {
                self.complain(name, format_args!("is {number}: must be {wanted}"));
                default
            }
        }
    }

    fn one_of<T: Copy>(&mut self, name: &str, choices: &[(&str, T)]) -> T {
        let text = self.text(name);
        let chosen =
            choices.iter().find(|(word, _)| text.as_deref().is_none_or(|text| text == *word));
        if let Some((_, value)) = chosen {
            return *value;
        }
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        self.complain(
            name,
            format_args!(
                "is \"{}\": must be one of {}",
                text.unwrap_or_default(),
                words.join(", ")
            ),
        );
        choices[0].1
    }

    fn url(&mut self, name: &str) -> Option<String> {
        let text = self.text(name)?;
        let web = text.starts_with("https://") || text.starts_with("http://");
        match text.parse::<tungstenite::http::Uri>() {
            Ok(uri) if web && uri.host().is_some_and(|host| !host.is_empty()) => {
                Some(text.trim_end_matches('/').to_owned())
            }
            // Not quoted: it may hold a password.
            _ => {
                self.complain(name, "must be an address that starts with https:// or http://");
                None
            }
        }
    }

    fn public_url(&mut self) -> String {
        if self.text("PUBLIC_URL").as_deref() == Some(check::NGROK) {
            // The tunnel is asked for its address once the port is known.
            return check::NGROK.into();
        }
        if self.text("PUBLIC_URL").is_none() {
            let where_from =
                "the https:// address of your host or tunnel, where Twilio reaches this";
            self.complain("PUBLIC_URL", format_args!("is missing ({where_from})"));
        }
        let url = self.url("PUBLIC_URL").unwrap_or_default();
        if login_in(&url).is_some() {
            // It would be printed, and strangers could try out what `/health` signs with it.
            self.complain(
                "PUBLIC_URL",
                "must not have a user name or password: Twilio signs the address without them",
            );
            return String::new();
        }
        if url.starts_with("http://") {
            self.complain(
                "PUBLIC_URL",
                format_args!("is \"{url}\": must be https, or Twilio cannot open the audio socket"),
            );
        }
        if url.contains(['?', '#']) {
            self.complain("PUBLIC_URL", format_args!("is \"{url}\": must not have a ? or #"));
        }
        url
    }

    fn header(&mut self, name: &str) -> Option<(String, Secret)> {
        let text = self.text(name)?;
        let pair = text
            .split_once(':')
            .map(|(header, value)| (header.trim().to_owned(), value.trim().to_owned()));
        match pair {
            Some((header, value))
                if tungstenite::http::HeaderName::from_bytes(header.as_bytes()).is_ok()
                    && tungstenite::http::HeaderValue::from_str(&value).is_ok()
                    && !value.is_empty() =>
            {
                Some((header, Secret(value)))
            }
            _ => {
                self.complain(name, "must be \"Name: value\", as in n8n's Header Auth");
                None
            }
        }
    }

    fn phone_number(&mut self, name: &str) -> Option<String> {
        let text = self.text(name)?;
        if is_e164(&text) {
            return Some(text);
        }
        self.complain(name, format_args!("is \"{text}\": must be a number such as +4930123456"));
        None
    }

    fn account_sid(&mut self, name: &str) -> Option<String> {
        let text = self.text(name)?;
        let plain = text.len() == 34 && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if plain && text.starts_with("AC") {
            return Some(text);
        }
        self.complain(name, "must be AC and 32 more characters (Twilio's console shows it)");
        None
    }

    fn api_token(&mut self, name: &str) -> Option<Secret> {
        let text = self.text(name)?;
        if text.len() >= API_TOKEN_CHARS_MIN {
            return Some(Secret(text));
        }
        let least = API_TOKEN_CHARS_MIN;
        self.complain(name, format_args!("is too short: at least {least} random characters"));
        None
    }

    fn prefixes(&mut self, name: &str) -> Vec<String> {
        let text = self.text(name).unwrap_or_default();
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let (good, bad): (Vec<&str>, Vec<&str>) = parts.partition(|part| {
            let digits = part.strip_prefix('+').unwrap_or_default();
            !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
        });
        for part in bad {
            self.complain(name, format_args!("has \"{part}\": must be like +49,+4420"));
        }
        good.into_iter().map(str::to_owned).collect()
    }
}

/// `agent.json` as it is written. Stages and tools are read one by one, so that a slip in one does
/// not hide a slip in the next.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AgentFile {
    agent_name: String,
    company_name: String,
    language: String,
    first_message: String,
    phrases: Phrases,
    first_stage: String,
    stages: Map<String, Value>,
    tools: Map<String, Value>,
    #[serde(default)]
    calendars: BTreeMap<String, String>,
}

/// A tool as it is written: beside its action it has these, and no other key.
#[derive(Deserialize)]
struct ToolFile {
    description: String,
    parameters: Option<Schema>,
    timeout_s: Option<u64>,
    #[serde(flatten)]
    action: Map<String, Value>,
}

/// What is wrong with the agent's files: file, place, what.
struct Mistakes(Vec<String>);

impl Mistakes {
    fn add(&mut self, place: impl Display, what: impl Display) {
        self.0.push(format!("agent.json  {place} {what}"));
    }

    fn entries<T: serde::de::DeserializeOwned>(
        &mut self,
        place: &str,
        values: Map<String, Value>,
    ) -> BTreeMap<String, T> {
        let mut entries = BTreeMap::new();
        for (name, value) in values {
            match serde_json::from_value(value) {
                Ok(entry) => drop(entries.insert(name, entry)),
                Err(error) => self.add(format_args!("{place}.{name}"), error),
            }
        }
        entries
    }

    fn tool(&mut self, name: &str, file: ToolFile) -> Option<Tool> {
        let place = format!("tools.{name}");
        // What Ultravox accepts as a name for the model.
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) {
            self.add(&place, "must be named with 1 to 64 letters, digits, _ and -");
        }
        let action: ToolAction = match serde_json::from_value(Value::Object(file.action)) {
            Ok(action) => action,
            Err(error) => {
                let kinds = "enter_stage, n8n, reply, hang_up, transfer, ultravox";
                self.add(&place, format_args!("must do exactly one of {kinds}: {error}"));
                return None;
            }
        };
        let within = Duration::from_secs(file.timeout_s.unwrap_or(TOOL_WITHIN.as_secs()));
        if within.is_zero() || within > TOOL_WITHIN_MAX {
            let most = TOOL_WITHIN_MAX.as_secs();
            self.add(format_args!("{place}.timeout_s"), format_args!("must be from 1 to {most}"));
        }
        let parameters = file
            .parameters
            .unwrap_or_else(|| Schema { kind: "object".into(), ..Schema::default() });
        self.schema(&place, &parameters);
        self.texts(&place, &action, &parameters);
        Some(Tool { description: file.description, parameters, within, action })
    }

    /// The part of JSON Schema that Ultravox is given, checked as far as a slip of the pen goes.
    fn schema(&mut self, place: &str, schema: &Schema) {
        const TYPES: &str = "string, number, integer, boolean, array, object";
        if schema.kind != "object" {
            self.add(format_args!("{place}.parameters.type"), "must be \"object\"");
        }
        for (name, property) in &schema.properties {
            let kind = property.get("type").and_then(Value::as_str).unwrap_or_default();
            if !TYPES.split(", ").any(|known| known == kind) {
                let place = format!("{place}.parameters.properties.{name}.type");
                self.add(place, format_args!("must be one of {TYPES}"));
            }
        }
        for name in schema.required.iter().filter(|name| !schema.properties.contains_key(*name)) {
            let place = format!("{place}.parameters.required");
            self.add(place, format_args!("names \"{name}\", which is not among the properties"));
        }
    }

    /// A text of a tool may use the tool's own parameters as well.
    fn texts(&mut self, place: &str, action: &ToolAction, parameters: &Schema) {
        let text = match action {
            ToolAction::EnterStage { message: text, .. } | ToolAction::Reply(text) => text,
            ToolAction::N8n { calendar: Some(calendar), .. } => {
                if !parameters.properties.contains_key(calendar) {
                    self.add(
                        place,
                        format_args!("has no parameter \"{calendar}\" for n8n.calendar"),
                    );
                }
                return;
            }
            ToolAction::HangUp(false) | ToolAction::Transfer(false) => {
                return self.add(place, "must say true behind hang_up or transfer");
            }
            ToolAction::N8n { .. }
            | ToolAction::HangUp(true)
            | ToolAction::Transfer(true)
            | ToolAction::Ultravox { .. } => return,
        };
        for (name, _) in placeholders(text) {
            let known = parameters.properties.contains_key(&name) || name == "random_number";
            if !known && !PLACEHOLDERS.contains(&name.as_str()) {
                self.add(
                    place,
                    format_args!("uses {{{name}}}, which is not one of its parameters"),
                );
            }
        }
    }

    fn prompt(
        &mut self,
        name: &str,
        stage: &mut Stage,
        read: &dyn Fn(&str) -> Result<String, String>,
    ) {
        let place = format!("stages.{name}");
        if stage.voice.is_empty() || stage.voice.chars().count() > 40 {
            self.add(
                format_args!("{place}.voice"),
                "must be a voice's name or id, 1 to 40 characters",
            );
        }
        let file = std::mem::take(&mut stage.prompt);
        match read(&file) {
            Ok(text) if text.trim().is_empty() => {
                self.0.push(format!("{file}  is empty ({place})"));
            }
            Ok(text) => stage.prompt = text,
            Err(why) => self.0.push(format!("{file}  {why} ({place}.prompt)")),
        }
        for (name, line) in placeholders(&stage.prompt) {
            if !PLACEHOLDERS.contains(&name.as_str()) {
                let known = PLACEHOLDERS.join(", ");
                self.0.push(format!("{file}:{line}  {{{name}}} is not known: use one of {known}"));
            }
        }
    }

    /// Said by Twilio or by Ultravox itself as they are, but for the first message.
    fn fixed_texts(&mut self, agent: &Agent) {
        for (name, _) in placeholders(&agent.first_message) {
            if !PLACEHOLDERS.contains(&name.as_str()) {
                self.add("first_message", format_args!("uses {{{name}}}, which is not known"));
            }
        }
    }

    fn names_that_lead_nowhere(&mut self, agent: &Agent) {
        for (name, stage) in &agent.stages {
            for tool in stage.tools.iter().filter(|tool| !agent.tools.contains_key(*tool)) {
                self.add(
                    format_args!("stages.{name}.tools"),
                    format_args!("names \"{tool}\", which is no tool"),
                );
            }
            let mut named = HashSet::new();
            for tool in stage.tools.iter().filter(|tool| !named.insert(tool.as_str())) {
                self.add(
                    format_args!("stages.{name}.tools"),
                    format_args!("names \"{tool}\" twice, which Ultravox refuses"),
                );
            }
        }
        for (name, tool) in &agent.tools {
            match &tool.action {
                ToolAction::EnterStage { stage, .. } if !agent.stages.contains_key(stage) => {
                    self.add(
                        format_args!("tools.{name}"),
                        format_args!("enters \"{stage}\", which is no stage"),
                    );
                }
                ToolAction::N8n { calendar: Some(_), .. } if agent.calendars.is_empty() => {
                    self.add(format_args!("tools.{name}"), "needs calendars, and there are none");
                }
                ToolAction::EnterStage { .. }
                | ToolAction::N8n { .. }
                | ToolAction::Reply(_)
                | ToolAction::HangUp(_)
                | ToolAction::Transfer(_)
                | ToolAction::Ultravox { .. } => {}
            }
        }
        for (location, _) in agent.calendars.iter().filter(|(_, email)| !email.contains('@')) {
            self.add(format_args!("calendars.{location}"), "must be an e-mail address");
        }
        if !agent.stages.contains_key(&agent.first_stage) {
            self.add(
                "first_stage",
                format_args!("is \"{}\", which is no stage", agent.first_stage),
            );
        }
    }

    fn stages_nobody_enters(&mut self, agent: &Agent) {
        let mut reached = HashSet::from([agent.first_stage.as_str()]);
        let mut to_visit = vec![agent.first_stage.as_str()];
        while let Some(stage) = to_visit.pop() {
            let tools =
                agent.stages.get(stage).map(|stage| stage.tools.as_slice()).unwrap_or_default();
            for tool in tools.iter().filter_map(|name| agent.tools.get(name)) {
                if let ToolAction::EnterStage { stage, .. } = &tool.action
                    && reached.insert(stage)
                {
                    to_visit.push(stage);
                }
            }
        }
        for name in agent.stages.keys().filter(|name| !reached.contains(name.as_str())) {
            self.add(
                format_args!("stages.{name}"),
                "is entered by no tool of a stage that is entered",
            );
        }
    }
}

/// `+` and 7 to 15 digits (ITU-T E.164).
fn is_e164(text: &str) -> bool {
    text.strip_prefix('+').is_some_and(|digits| {
        (7..=15).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit())
    })
}

// --- Failures ----------------------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Party {
    Twilio,
    Ultravox,
    N8n,
}

impl Party {
    fn name(self) -> &'static str {
        match self {
            Party::Twilio => "Twilio",
            Party::Ultravox => "Ultravox",
            Party::N8n => "n8n",
        }
    }
}

/// Who failed, at what, why, and what to do about it, in one line.
#[derive(Debug)]
struct Failure {
    party: Party,
    what: String,
    advice: Option<&'static str>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
    /// Nothing can have happened at the other end: it is safe to try again.
    certainly_not_done: bool,
    /// The request was understood and not wanted in this form.
    refused: bool,
}

impl Failure {
    fn new(party: Party, what: impl Into<String>) -> Failure {
        Failure {
            party,
            what: what.into(),
            advice: None,
            source: None,
            certainly_not_done: false,
            refused: false,
        }
    }

    fn advise(self, advice: &'static str) -> Failure {
        Failure { advice: Some(advice), ..self }
    }

    fn caused_by(self, source: impl std::error::Error + Send + Sync + 'static) -> Failure {
        Failure { source: Some(Box::new(source)), ..self }
    }

    fn certainly_not_done(self) -> Failure {
        Failure { certainly_not_done: true, ..self }
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {}", self.party.name(), self.what)?;
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        match self.advice {
            Some(advice) => write!(f, " ({advice})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn std::error::Error + 'static))
    }
}

/// An HTTP request that got no answer at all.
fn unreachable_party(party: Party, error: ureq::Error, within: Duration) -> Failure {
    use ureq::{Error, Timeout};
    let refused = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    match error {
        Error::Timeout(Timeout::Resolve | Timeout::Connect) => {
            Failure::new(party, "no connection in time").certainly_not_done()
        }
        Error::Timeout(_) => {
            Failure::new(party, format!("no answer within {} ms", within.as_millis()))
        }
        Error::HostNotFound => Failure::new(party, "its host name is not known")
            .advise("check the address")
            .certainly_not_done(),
        Error::Io(error) if refused(&error) => Failure::new(party, "it refuses the connection")
            .advise("is it running, and is the address right?")
            .certainly_not_done(),
        Error::ConnectionFailed => Failure::new(party, "no connection")
            .advise("is it running, and is the address right?")
            .certainly_not_done(),
        Error::BodyExceedsLimit(limit) => {
            Failure::new(party, format!("an answer of more than {limit} bytes"))
        }
        other => Failure::new(party, "the request failed").caused_by(other),
    }
}

/// A text that must not be seen. Printing it shows `***`.
#[derive(Clone)]
struct Secret(String);

impl Secret {
    fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("***")
    }
}

impl Config {
    /// What others answer may quote what we have sent them, as it is or in JSON.
    fn hide_secrets(&self, text: String) -> String {
        let header = self.n8n_auth_header.as_ref().map(|(_, value)| value);
        let optional =
            [&self.twilio_auth_token, &self.api_token, &self.n8n_hmac_secret].map(Option::as_ref);
        let secrets = optional.into_iter().chain([header, Some(&self.ultravox_api_key)]).flatten();
        let mut forms: Vec<String> = secrets.map(|secret| secret.reveal().to_owned()).collect();
        // The user and password of an address are sent as Basic authentication.
        let login = self.n8n_webhook_url.as_deref().and_then(login_in);
        forms.extend(login.map(|login| BASE64.encode(login)));
        let in_json = |form: &String| {
            let quoted = json!(form).to_string();
            quoted.get(1..quoted.len() - 1).map(str::to_owned)
        };
        forms.extend(forms.iter().filter_map(in_json).collect::<Vec<_>>());
        // A key that is missing, which only `check` goes on from, stands everywhere in a text.
        forms.retain(|form| !form.is_empty() && text.contains(form));
        // One secret may be the beginning of another.
        forms.sort_by_key(|form| std::cmp::Reverse(form.len()));
        forms.iter().fold(text, |text, form| text.replace(form, "***"))
    }
}

/// `user:password` of an address, if it has one.
fn login_in(url: &str) -> Option<&str> {
    url.split('/').nth(2)?.rsplit_once('@').map(|(login, _)| login)
}

// --- The log -------------------------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LogFormat {
    Text,
    Json,
}

static LOG: OnceLock<(Level, LogFormat)> = OnceLock::new();

fn log_as(level: Level, format: LogFormat) {
    if LOG.set((level, format)).is_err() {
        // Settings are read once.
    }
}

/// What a line is about: a call, if any, and the step it is in.
struct About<'a> {
    sid: Option<&'a str>,
    step: Step,
}

/// Stands in for a call in `log!`, where there is no call, or not yet.
struct Sid<'a> {
    sid: &'a str,
}

/// Warnings and errors, said or not.
static WARNINGS: Counter = Counter::new();
static ERRORS: Counter = Counter::new();

/// One line: `12:04:31.207 CA9f3c 3 agent    Ultravox call 7c21 ready after 412 ms`.
fn write_log(level: Level, about: &About, what: fmt::Arguments, facts: &[(&str, &dyn Display)]) {
    match level {
        Level::Error => ERRORS.add(),
        Level::Warn => WARNINGS.add(),
        Level::Info | Level::Debug => {}
    }
    let (most, format) = LOG.get().copied().unwrap_or((Level::Info, LogFormat::Text));
    if level > most {
        return;
    }
    let now = jiff::Zoned::now();
    let (number, word) = (about.step as u8, format!("{:?}", about.step).to_lowercase());
    let what = presentable(&what.to_string());
    let line = match format {
        LogFormat::Text => {
            let label = match level {
                Level::Error => "error: ",
                Level::Warn => "warning: ",
                Level::Info | Level::Debug => "",
            };
            format!(
                "{} {:<6} {number} {word:<8} {label}{what}\n",
                now.strftime("%H:%M:%S%.3f"),
                about.sid.map_or("-", shorten)
            )
        }
        LogFormat::Json => {
            let mut line = json!({
                "time": now.strftime("%Y-%m-%dT%H:%M:%S%.3f%:z").to_string(),
                "level": format!("{level:?}").to_lowercase(),
                "call": about.sid,
                "step": number,
                "stepName": word,
                "message": what,
            });
            for (name, fact) in facts {
                let fact = presentable(&fact.to_string());
                line[name] =
                    fact.parse::<u64>().map_or_else(|_| json!(fact), |number| json!(number));
            }
            format!("{line}\n")
        }
    };
    complain_raw(&line);
}

/// What others have sent may be quoted in a line. It must not begin a line of its own, steer the
/// reader's terminal, hold a number that somebody could call, or go on for ever.
fn presentable(text: &str) -> String {
    let mut presentable = String::with_capacity(text.len().min(LOG_CHARS_MAX));
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('+') {
        let digits = after.bytes().take_while(u8::is_ascii_digit).count();
        let (number, behind) = after.split_at(digits);
        let number = format!("+{number}");
        presentable.push_str(before);
        presentable.push_str(&if is_e164(&number) { shorten_number(&number) } else { number });
        rest = behind;
    }
    presentable.push_str(rest);
    presentable.chars().map(harmless).take(LOG_CHARS_MAX).collect()
}

/// Unicode has line ends and changes of direction that do not count as control characters.
fn harmless(c: char) -> char {
    let steers = matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    if c.is_control() || steers { ' ' } else { c }
}

/// `CA9f3c…` is enough to tell calls apart by eye.
fn shorten(sid: &str) -> &str {
    sid.get(..6).unwrap_or(sid)
}

/// `+49…4521`: enough to recognise, too little to call.
fn shorten_number(number: &str) -> String {
    match (number.get(..3), number.len().checked_sub(4).and_then(|at| number.get(at..))) {
        (Some(first), Some(last)) if number.len() > 8 && number.starts_with('+') => {
            format!("{first}…{last}")
        }
        _ if number.starts_with('+') => "a short number".into(),
        _ if number.chars().all(|c| c.is_ascii_alphabetic())
            && number.len() <= 16
            && !number.is_empty() =>
        {
            number.to_owned()
        }
        _ => "a caller without a number".into(),
    }
}

/// For `--help` and `--version`: what was asked for goes to standard output.
fn say(text: &str) {
    if io::stdout().write_all(text.as_bytes()).is_err() {
        // Nobody listens.
    }
}

fn complain(text: &str) {
    complain_raw(&format!("{}\n", text.trim_end()));
}

fn complain_raw(text: &str) {
    if io::stderr().write_all(text.as_bytes()).is_err() {
        // A log that cannot be written must not end a call.
    }
}

// --- Metrics ---------------------------------------------------------------------------
//
// What `GET /metrics` tells, in Prometheus' text format 0.0.4. Each fact is counted where it comes
// to be known. What is a state (lines in use, the outbox) is looked up when somebody asks.

/// All that is counted since the process began. What it means to an operator stands in the README.
struct Metrics {
    calls: Family<Counter>,
    refusals: Family<Counter>,
    answer_time: Family<Histogram>,
    dead_air: Family<Histogram>,
    relay_delay: Family<Histogram>,
    frames_dropped: Family<Counter>,
    broken_lines: Family<Counter>,
    resumes: Family<Counter>,
    tools: Family<Counter>,
    tool_time: Family<Histogram>,
    n8n_requests: Family<Counter>,
    n8n_time: Family<Histogram>,
    ultravox_creates: Family<Counter>,
    ultravox_time: Family<Histogram>,
}

/// Why connections, requests and calls are turned away.
const REFUSALS: [&str; 22] = [
    "too_many_connections",
    "idle_connection",
    "slow_head",
    "long_head",
    "long_body",
    "no_body",
    "tls",
    "not_http",
    "method",
    "signature",
    "call_sid",
    "api_token",
    "other_site",
    "not_json",
    "not_allowed",
    "stopping",
    "busy",
    "too_often",
    "upgrade",
    "no_start",
    "media_format",
    "stream_token",
];

impl Metrics {
    fn new(agent: &Agent) -> Metrics {
        let metrics = Metrics {
            calls: Family::new("callbridge_calls_total", &["ended_by"], Counter::new),
            refusals: Family::new("callbridge_refusals_total", &["reason"], Counter::new),
            answer_time: Family::new("callbridge_answer_seconds", &[], Histogram::of_waits),
            dead_air: Family::new("callbridge_dead_air_seconds", &[], Histogram::of_waits),
            relay_delay: Family::new(
                "callbridge_relay_delay_seconds",
                &["direction"],
                Histogram::of_frames,
            ),
            frames_dropped: Family::new(
                "callbridge_frames_dropped_total",
                &["direction"],
                Counter::new,
            ),
            broken_lines: Family::new("callbridge_broken_lines_total", &["leg"], Counter::new),
            resumes: Family::new("callbridge_resumes_total", &["after"], Counter::new),
            tools: Family::new(
                "callbridge_tool_invocations_total",
                &["tool", "outcome"],
                Counter::new,
            ),
            tool_time: Family::new("callbridge_tool_seconds", &["tool"], Histogram::of_waits),
            n8n_requests: Family::new(
                "callbridge_n8n_requests_total",
                &["route", "outcome"],
                Counter::new,
            ),
            n8n_time: Family::new("callbridge_n8n_seconds", &["route"], Histogram::of_waits),
            ultravox_creates: Family::new(
                "callbridge_ultravox_creates_total",
                &["outcome"],
                Counter::new,
            ),
            ultravox_time: Family::new(
                "callbridge_ultravox_create_seconds",
                &[],
                Histogram::of_waits,
            ),
        };
        metrics.begin(agent);
        metrics
    }

    /// Every series is there from the start, at zero: Prometheus sees no increase in one that
    /// appears with its first event.
    fn begin(&self, agent: &Agent) {
        self.calls.begin(&HangUp::ALL.map(|how| format!("{how:?}")));
        self.refusals.begin(&REFUSALS);
        self.frames_dropped.begin(&["to_agent", "to_caller"]);
        self.relay_delay.begin(&["to_agent", "to_caller"]);
        self.broken_lines.begin(&["agent", "caller"]);
        self.resumes.begin(&["agent_line", "stream", "process", "transfer"]);
        self.ultravox_creates.begin(&["created", "busy", "refused", "late", "failed"]);
        for single in [&self.answer_time, &self.dead_air, &self.ultravox_time] {
            single.of(&[]);
        }
        let mut routes = BTreeSet::from(["1", "2"]);
        for (name, tool) in &agent.tools {
            let outcomes: &[&str] = match &tool.action {
                // Ultravox does not tell us.
                ToolAction::Ultravox { .. } => continue,
                ToolAction::N8n { route, .. } => {
                    routes.insert(route);
                    &["done", "answered from memory", "failed", "uncertain", "refused"]
                }
                ToolAction::EnterStage { .. }
                | ToolAction::Reply(_)
                | ToolAction::HangUp(_)
                | ToolAction::Transfer(_) => &["done"],
            };
            self.tool_time.of(&[name]);
            for outcome in outcomes.iter().chain(&["incomplete", "no such tool"]) {
                self.tools.of(&[name, outcome]);
            }
        }
        self.tools.of(&["unknown", "no such tool"]);
        for route in routes {
            self.n8n_time.of(&[route]);
            for outcome in ["answered", "nonsense", "refused", "late", "failed"] {
                self.n8n_requests.of(&[route, outcome]);
            }
        }
    }

    fn refused(&self, reason: &str) {
        self.refusals.of(&[reason]).add();
    }

    fn relayed(&self, direction: &str) -> Relayed {
        Relayed {
            delay: self.relay_delay.of(&[direction]),
            dropped: self.frames_dropped.of(&[direction]),
        }
    }
}

/// One direction of a call, so that a frame costs no look-up.
struct Relayed {
    delay: Arc<Histogram>,
    dropped: Arc<Counter>,
}

impl Relayed {
    fn note(&self, passed_on: bool, arrived: Instant) {
        if passed_on {
            self.delay.observe(arrived.elapsed());
        } else {
            self.dropped.add();
        }
    }
}

/// Series that share a name and differ in the values of their labels. The values come from us or
/// from the agent's files, never from outside: nobody can make the list long.
struct Family<T> {
    name: &'static str,
    labels: &'static [&'static str],
    fresh: fn() -> T,
    series: Mutex<BTreeMap<Vec<String>, Arc<T>>>,
}

impl<T> Family<T> {
    fn new(name: &'static str, labels: &'static [&'static str], fresh: fn() -> T) -> Family<T> {
        Family { name, labels, fresh, series: Mutex::default() }
    }

    fn begin(&self, values: &[impl AsRef<str>]) {
        for value in values {
            self.of(&[value.as_ref()]);
        }
    }

    /// The series with these values of the labels.
    fn of(&self, values: &[&str]) -> Arc<T> {
        let values = values.iter().map(|value| (*value).to_owned()).collect();
        Arc::clone(lock(&self.series).entry(values).or_insert_with(|| Arc::new((self.fresh)())))
    }
}

/// Relaxed, here and below: each is a number for itself, and orders nothing.
struct Counter(AtomicU64);

impl Counter {
    const fn new() -> Counter {
        Counter(AtomicU64::new(0))
    }

    fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How often something took how long.
struct Histogram {
    bounds_us: &'static [u64; BUCKETS],
    /// One for each bound, and one for what is beyond.
    counts: [Counter; BUCKETS + 1],
    sum_ns: AtomicU64,
}

const BUCKETS: usize = 12;
/// For a frame, which is to take as good as no time: 10 us to 100 ms.
const FRAME_BOUNDS_US: [u64; BUCKETS] =
    [10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 100_000];
/// For what a caller may have to wait for: 5 ms to 30 s.
const WAIT_BOUNDS_US: [u64; BUCKETS] = [
    5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_000_000, 5_000_000,
    10_000_000, 30_000_000,
];

impl Histogram {
    fn of_frames() -> Histogram {
        Histogram::new(&FRAME_BOUNDS_US)
    }

    fn of_waits() -> Histogram {
        Histogram::new(&WAIT_BOUNDS_US)
    }

    fn new(bounds_us: &'static [u64; BUCKETS]) -> Histogram {
        Histogram {
            bounds_us,
            counts: [const { Counter::new() }; BUCKETS + 1],
            sum_ns: AtomicU64::new(0),
        }
    }

    fn observe(&self, time: Duration) {
        // Five centuries fit.
        let ns = u64::try_from(time.as_nanos()).unwrap_or_default();
        let beyond = self.bounds_us.iter().filter(|bound| ns > **bound * 1_000).count();
        self.counts[beyond].add();
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }
}

/// `GET /metrics`.
fn metrics(bridge: &'static Bridge, _: &tiny_http::Request) -> Reply {
    let counted = &bridge.metrics;
    let mut page = MetricsPage(String::new());
    page.counters("Calls that have ended, by how they ended.", &counted.calls);
    let calls = bridge.calls.all().len();
    page.gauge("callbridge_calls_in_progress", "Lines in use.", calls);
    page.gauge("callbridge_calls_max", "The lines there are, MAX_CALLS.", bridge.config.max_calls);
    page.counters("Connections, requests and calls turned away.", &counted.refusals);
    page.histograms("From the ring to our answer.", &counted.answer_time);
    page.histograms("From the first stream to the agent's first sound.", &counted.dead_air);
    page.histograms("From reading a message with sound to its being sent.", &counted.relay_delay);
    page.counters("Messages with sound that reached nobody.", &counted.frames_dropped);
    page.counters("Lines that broke in a call.", &counted.broken_lines);
    page.counters("Calls that went on after a break.", &counted.resumes);
    page.counters("Tools that the agent has asked for.", &counted.tools);
    page.histograms("Time until the agent had a tool's result.", &counted.tool_time);
    page.counters("Requests to n8n.", &counted.n8n_requests);
    page.histograms("Time that n8n took.", &counted.n8n_time);
    page.counters("Requests to create an agent's call.", &counted.ultravox_creates);
    page.histograms("Time that creating an agent's call took.", &counted.ultravox_time);
    page.outbox(&bridge.outbox);
    page.head("callbridge_log_lines_total", "counter", "Warnings and errors, logged or not.");
    page.sample("callbridge_log_lines_total", &[("level", "warn")], WARNINGS.value());
    page.sample("callbridge_log_lines_total", &[("level", "error")], ERRORS.value());
    page.head("callbridge_build_info", "gauge", "The version that runs.");
    page.sample("callbridge_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    let began = bridge.began.as_millisecond();
    let seconds = format!("{}.{:03}", began / 1_000, began % 1_000);
    page.gauge("process_start_time_seconds", "When the process began, since 1970.", seconds);
    Reply::new(200, "text/plain; version=0.0.4; charset=utf-8", page.0)
}

struct MetricsPage(String);

impl MetricsPage {
    fn counters(&mut self, help: &str, family: &Family<Counter>) {
        self.head(family.name, "counter", help);
        for (values, counter) in &*lock(&family.series) {
            let labels: Vec<_> = labelled(family.labels, values).collect();
            self.sample(family.name, &labels, counter.value());
        }
    }

    fn histograms(&mut self, help: &str, family: &Family<Histogram>) {
        let name = family.name;
        self.head(name, "histogram", help);
        let (buckets, sum, count) =
            (format!("{name}_bucket"), format!("{name}_sum"), format!("{name}_count"));
        for (values, histogram) in &*lock(&family.series) {
            let labels: Vec<_> = labelled(family.labels, values).collect();
            let bounds = histogram.bounds_us.iter().map(|&us| seconds(Duration::from_micros(us)));
            let mut so_far = 0;
            for (bound, counter) in bounds.chain(["+Inf".into()]).zip(&histogram.counts) {
                so_far += counter.value();
                self.sample(&buckets, &[&labels[..], &[("le", &*bound)]].concat(), so_far);
            }
            let total = Duration::from_nanos(histogram.sum_ns.load(Ordering::Relaxed));
            self.sample(&sum, &labels, seconds(total));
            self.sample(&count, &labels, so_far);
        }
    }

    fn outbox(&mut self, outbox: &Outbox) {
        let oldest = {
            let parcels = lock(&outbox.parcels);
            // A call that may still go on has no transcript to deliver yet.
            let waiting = parcels.waiting.iter().filter(|parcel| !parcel.unfinished);
            let since = waiting.map(|parcel| parcel.since).chain(parcels.on_the_way.clone());
            since.collect::<Vec<_>>()
        };
        let count = oldest.len();
        let age = oldest.into_iter().min().map_or(Duration::ZERO, |since| since.elapsed());
        let given_up = outbox.given_up.load(Ordering::Relaxed);
        self.gauge("callbridge_outbox_transcripts", "Transcripts that wait for n8n.", count);
        self.gauge("callbridge_outbox_oldest_seconds", "Age of the oldest of them.", seconds(age));
        let help = "Transcripts that n8n has not taken in time, see callbridge outbox.";
        self.gauge("callbridge_outbox_given_up", help, given_up);
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, "gauge", help);
        self.sample(name, &[], value);
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        self.line(&format!("# HELP {name} {help}"));
        self.line(&format!("# TYPE {name} {kind}"));
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let escape =
            |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let labels = labels.iter().map(|(label, value)| format!("{label}=\"{}\"", escape(value)));
        let labels = labels.collect::<Vec<_>>().join(",");
        let labels = if labels.is_empty() { labels } else { format!("{{{labels}}}") };
        self.line(&format!("{name}{labels} {value}"));
    }

    fn line(&mut self, text: &str) {
        self.0.push_str(text);
        self.0.push('\n');
    }
}

fn labelled<'a>(
    labels: &'a [&'a str],
    values: &'a [String],
) -> impl Iterator<Item = (&'a str, &'a str)> {
    labels.iter().copied().zip(values.iter().map(String::as_str))
}

fn seconds(time: Duration) -> String {
    time.as_secs_f64().to_string()
}

// --- Texts, threads, certificates ------------------------------------------------------

/// Replaces `{name}` by what `value_of` knows for it, and leaves the rest as it is.
fn fill(text: &str, value_of: impl Fn(&str) -> Option<String>) -> String {
    let mut filled = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('{') {
        filled.push_str(before);
        let known = after.split_once('}').and_then(|(name, rest)| Some((value_of(name)?, rest)));
        rest = if let Some((value, behind)) = known {
            filled.push_str(&value);
            behind
        } else {
            filled.push('{');
            after
        };
    }
    filled.push_str(rest);
    filled
}

/// Every `{name}` in a text, with its line. Braces around anything else are just braces.
fn placeholders(text: &str) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        for part in line.split('{').skip(1) {
            if let Some((name, _)) = part.split_once('}')
                && !name.is_empty()
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            {
                found.push((name.to_owned(), index + 1));
            }
        }
    }
    found
}

/// The beginning of a text, with a sign that it is no more than that.
fn cut(text: &str, chars: usize) -> String {
    match text.char_indices().nth(chars) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        if write!(text, "{byte:02x}").is_err() {
            // Writing to a String does not fail.
        }
        text
    })
}

fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if ring::rand::SystemRandom::new().fill(&mut bytes).is_err() {
        // Without randomness there is no token that is safe to give out, and no TLS either.
        std::process::abort();
    }
    bytes
}

/// 128 random bits.
fn random_hex() -> String {
    hex(&random_bytes::<16>())
}

/// Six digits, as a claim number is read out.
fn random_number() -> String {
    format!("{:06}", u32::from_le_bytes(random_bytes()) % 1_000_000)
}

/// Whoever panicked while holding it has been reported by Rust itself; the data behind it is whole,
/// because nothing here leaves it half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(work)
}

fn spawn_for_call(
    name: String,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name).stack_size(CALL_STACK_BYTES).spawn(work)
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        // It panicked, which Rust has reported; there is nothing of it left to wait for.
    }
}

/// Mozilla's roots, and those of the owner's own file.
fn trusted_roots(extra: Option<&Path>) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut roots: Vec<CertificateDer> = webpki_root_certs::TLS_SERVER_ROOT_CERTS.to_vec();
    if let Some(path) = extra {
        let complain = |why: String| format!("SSL_CERT_FILE  {}: {why}", path.display());
        let certificates =
            CertificateDer::pem_file_iter(path).map_err(|error| complain(error.to_string()))?;
        let before = roots.len();
        for certificate in certificates {
            roots.push(certificate.map_err(|error| complain(error.to_string()))?);
        }
        if roots.len() == before {
            return Err(complain("has no certificate in it (it must be PEM)".into()));
        }
    }
    Ok(roots)
}

fn tls_config(roots: &[CertificateDer<'static>]) -> Arc<ClientConfig> {
    // ureq looks for the process's default as well; `outbox --retry` may have set it already.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        // There is one, and there is no other one in this program.
    }
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(roots.iter().cloned());
    Arc::new(ClientConfig::builder().with_root_certificates(store).with_no_client_auth())
}

/// Blocking HTTP: every status is an answer, redirects are not followed, no proxy is guessed.
fn http_agent(roots: &[CertificateDer<'static>]) -> ureq::Agent {
    let roots: Vec<ureq::tls::Certificate> =
        roots.iter().map(|root| ureq::tls::Certificate::from_der(root).to_owned()).collect();
    let tls = ureq::tls::TlsConfig::builder()
        .root_certs(ureq::tls::RootCerts::Specific(Arc::new(roots)))
        .build();
    ureq::Agent::config_builder()
        .tls_config(tls)
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .proxy(None)
        .user_agent(concat!("callbridge/", env!("CARGO_PKG_VERSION")))
        // A connection that the other side has closed meanwhile is noticed and left alone.
        .max_idle_age(IDLE_MAX)
        .input_buffer_size(HTTP_BUFFER_BYTES)
        .output_buffer_size(HTTP_BUFFER_BYTES)
        .build()
        .into()
}
