//! The pretend outside world: Twilio, Ultravox and n8n on one machine.
//!
//! callbridge stands between three parties that cost money, need accounts and
//! live far away. This file plays all three on loopback sockets, so that a
//! whole phone call happens on a machine that has nothing but Rust.
//!
//! ```text
//!   Phone           --- POST, WebSocket --->  +------------+
//!   (Twilio's end)  <-- TwiML, WebSocket ---  | callbridge |
//!                                             |  the real  |
//!   Ultravox, AgentCall  <-- POST, ws(s) ---  |   server,  |
//!   (the voice agent)    --- ws(s) -------->  |  as child  |
//!                                             |  process   |
//!   N8n  <------------------------- POST ---  +------------+
//!   (the business logic)
//! ```
//!
//! Four users share it:
//!
//! - `callbridge demo --page` keeps it up for a person at the live page ([`mod@live`]);
//! - the verb `callbridge demo` plays one scripted call and prints the nine steps ([`script`]);
//! - `callbridge demo --calls N` plays many at once and measures ([`mod@bench`]);
//! - the tests in `tests/` mount this folder and write calls of their own, happy ones and sad ones
//!   ([`World`](world::World)).
//!
//! What only the tests need is marked `cfg(test)`, most of it in files called `for_tests`. So the
//! shipped program holds what the two verbs use and nothing else, and the compiler sees to that: it
//! is built without any leave for dead code.
//!
//! It knows the bridge only from outside: settings go in through the environment, the log comes out
//! of stderr, all else goes over sockets. So nothing here can accidentally agree with a mistake in
//! the bridge: even the mu-law arithmetic and Twilio's signature are written a second time.
//!
//! How it behaves:
//!
//! - Nobody here acts on their own. A test (or the script) rings, speaks, invokes tools, hangs up.
//!   Three small things happen by themselves: a phone returns marks as Twilio would, an agent says
//!   `call_started` when joined, and n8n answers each route with a standing reply.
//! - Every wait has an end and says what it waited for. What went wrong is a
//!   [`Trouble`](trouble::Trouble); printed, it brings the bridge's last log lines along, so that
//!   `?` and `unwrap` in a test explain themselves.
//! - What the bridge sends is judged as strictly as the real party would, or more so: the
//!   `violations` of [`phone`] and [`ultravox`].
//! - When a world is dropped its bridge is killed, its threads have ended and its directory is
//!   gone.

#![cfg_attr(
    test,
    expect(dead_code, reason = "each test program uses another part of the pretend world")
)]
#![expect(clippy::doc_markdown, reason = "TwiML is a word here, not a name in the code")]

pub mod bench;

mod agent_call;
mod backstage;
mod certificate;
#[cfg(test)]
mod front;
mod http;
mod live;
mod microphone;
mod n8n;
pub mod objections;
#[cfg(test)]
mod person;
mod phone;
#[cfg(test)]
mod rest;
pub mod screen;
pub mod script;
mod server;
mod socket;
mod sound;
mod tls;
mod trouble;
mod twilio;
pub mod twiml;
mod ultravox;
mod world;

use std::io::{self, Write as _};
use std::time::Duration;

use crate::demo::screen::Show;
use crate::demo::script::perform;

/// What the tests take from here.
#[cfg(test)]
#[expect(unused_imports, reason = "as above: each test program uses another part")]
pub use self::{
    agent_call::AgentCall,
    certificate::Certificate,
    front::{Front, Manner, Ngrok},
    http::{HttpAnswer, Reply},
    microphone::Talking,
    n8n::{BOOKED, FIRST_MESSAGE, N8nRequest},
    objections::{tool_names, tools_objection},
    person::Person,
    phone::{Heard, HeardAt, Marks, Phone},
    rest::Order,
    socket::Ending,
    sound::{FRAME_BYTES, FRAME_TIME, mulaw_to_pcm, pcm_of, voice},
    trouble::Trouble,
    twilio::{Ringing, twilio_signature},
    twiml::Twiml,
    ultravox::SUMMARY,
    ultravox::{VOICES, account},
    world::{World, WorldBuilder, closed_port},
};

/// The number that is called.
pub const OUR_NUMBER: &str = "+442079460000";

/// The address Twilio believes to be calling.
pub const PUBLIC_URL: &str = "https://bridge.example";

/// The key under which pretend Twilio signs.
pub const AUTH_TOKEN: &str = "12345";

/// Pretend Ultravox knows this one key, in the real ones' shape.
pub const API_KEY: &str = "Pretend0.0123456789abcdefABCDEF0123456789";

/// The knowledge base that the bridge is told to offer.
pub const CORPUS_ID: &str = "5f1f7a1e-2b0c-4a53-9d0b-8a3c1e7d9b42";

/// Pretend Twilio's account.
pub const ACCOUNT_SID: &str = "AC0123456789abcdef0123456789abcdef";

/// How long a wait without a limit of its own lasts before it is a failure.
/// Long, because test machines stumble; no wait that succeeds pays for it.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A bridge that does not read for this long is taken for dead.
pub(super) const WRITE_WITHIN: Duration = Duration::from_secs(10);

const HELP: &str = "\
callbridge demo: one whole call on this machine. No account, no network.

  Starts the real server, rings it as Twilio would, stands in for the voice
  agent (Ultravox) and the business logic (n8n), and prints the nine steps of
  the call as they happen. The audio that arrives at either end is compared
  with what was sent, sample by sample.

usage: callbridge demo [--help]
       callbridge demo --page
       callbridge demo --calls N [--seconds S] [--plain] [--churn] [--json]

  With --page the pretend world stays up, and the live page opens over it, at
  http://localhost:8000/ (or PORT), without a password: scripted calls come in,
  and the page's own phone reaches an agent that says back what it hears.
  Ctrl-C ends it all.

  With --calls it is a benchmark instead: N calls at once for S seconds (10),
  and what they cost, beside what bare copying costs on this machine.
  --plain    no TLS between the server and the agents
  --churn    calls end and others begin all the time; what is left behind?
  --json     the same report for programs

Exit status 0 if every step came out right, 1 with the reason if one did not,
2 for arguments that are not known.
Colours appear in a terminal only, and not when NO_COLOR is set.
";

/// Why the verb `callbridge demo` did not come to its end. The text names the
/// step that failed, or what is wrong with the arguments.
#[derive(Debug)]
pub struct Flop {
    pub misused: bool,
    pub text: String,
}

/// The verb `callbridge demo`.
pub fn run(arguments: &[String]) -> Result<(), Flop> {
    let failed = |text| Flop { misused: false, text };
    match arguments {
        [] => {}
        [help] if help == "--help" || help == "-h" => {
            return write!(io::stdout(), "{HELP}").map_err(|error| failed(error.to_string()));
        }
        [page] if page == "--page" => {}
        _ => return bench::run(arguments),
    }
    let program = std::env::current_exe()
        .map_err(|error| failed(format!("demo cannot find its own program file: {error}")))?;
    if !arguments.is_empty() {
        return live::run(&program).map_err(failed);
    }
    let mut show = Show::new();
    perform(&program, &mut show).map_err(|trouble| failed(show.failure(&trouble)))
}
