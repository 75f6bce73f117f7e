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
//! Three users share it:
//!
//! - the verb `callbridge demo` plays one scripted call and prints the nine
//!   steps ([`run`]);
//! - `callbridge demo --calls N` plays many at once and measures ([`mod@bench`],
//!   a file of its own);
//! - the tests in `tests/` include this file and write calls of their own,
//!   happy ones and sad ones ([`World`]).
//!
//! It knows the bridge only from outside: settings go in through the
//! environment, the log comes out of stderr, all else goes over sockets. So
//! nothing here can accidentally agree with a mistake in the bridge: even the
//! mu-law arithmetic and Twilio's signature are written a second time.
//!
//! How it behaves:
//!
//! - Nobody here acts on their own. A test (or the script) rings, speaks,
//!   invokes tools, hangs up. Three small things happen by themselves: a phone
//!   returns marks as Twilio would, an agent says `call_started` when joined,
//!   and n8n answers each route with a standing reply.
//! - Every wait has an end and says what it waited for. What went wrong is a
//!   [`Trouble`]; printed, it brings the bridge's last log lines along, so
//!   that `?` and `unwrap` in a test explain themselves.
//! - What the bridge sends is judged as strictly as the real party would, or
//!   more so: [`Phone::violations`], [`Ultravox::violations`].
//! - When a [`World`] is dropped its bridge is killed, its threads have ended
//!   and its directory is gone.

#![allow(
    dead_code,
    reason = "the demo uses one part of this file and each test another; nobody uses all of it"
)]
#![expect(clippy::doc_markdown, reason = "TwiML is a word here, not a name in the code")]
#![expect(
    clippy::indexing_slicing,
    reason = "all of it indexes into JSON values, where what is missing is null"
)]

use std::collections::{HashMap, VecDeque};
use std::fmt::{self, Display};
use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::panic::Location;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::rand::SecureRandom as _;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tungstenite::error::ProtocolError;
use tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tungstenite::http::{self, Uri};
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tungstenite::{HandshakeError, Message, WebSocket};

#[path = "bench.rs"]
pub mod bench;

/// One Twilio media message: 20 ms of mu-law at 8000 samples a second.
pub const FRAME_BYTES: usize = 160;
/// Twilio sends a frame this often, silence included.
pub const FRAME_TIME: Duration = Duration::from_millis(20);
/// One mu-law byte is an eighth of a millisecond.
const SAMPLE_TIME: Duration = Duration::from_micros(125);
/// How long a wait without a limit of its own lasts before it is a failure.
/// Long, because test machines stumble; no wait that succeeds pays for it.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Twilio gives a webhook this long, connect included.
const WEBHOOK_WITHIN: Duration = Duration::from_secs(15);
/// A bridge that does not read for this long is taken for dead.
const WRITE_WITHIN: Duration = Duration::from_secs(10);
/// n8n closes a kept connection that has been idle this long.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// So much of the bridge's log stands under a failure.
const LAST_WORDS: usize = 20;

/// The address Twilio believes to be calling.
pub const PUBLIC_URL: &str = "https://bridge.example";
/// The key under which pretend Twilio signs.
pub const AUTH_TOKEN: &str = "12345";
/// Pretend Ultravox knows this one key, in the real ones' shape.
pub const API_KEY: &str = "Pretend0.0123456789abcdefABCDEF0123456789";
/// The knowledge base that the bridge is told to offer.
pub const CORPUS_ID: &str = "5f1f7a1e-2b0c-4a53-9d0b-8a3c1e7d9b42";
/// The number that is called.
pub const OUR_NUMBER: &str = "+442079460000";
/// Pretend Twilio's account.
pub const ACCOUNT_SID: &str = "AC0123456789abcdef0123456789abcdef";
/// The models that pretend Ultravox has.
const MODELS: [&str; 3] = ["ultravox-v0.6", "ultravox-v0.6-gemma3-27b", "ultravox-v0.7"];
/// The voices that it has. Two people share a name.
pub const VOICES: [(&str, &str); 6] = [
    ("Emily-English", "00000000-0000-4000-8000-000000000001"),
    ("Mark", "00000000-0000-4000-8000-000000000002"),
    ("Mark-Slow", "00000000-0000-4000-8000-000000000003"),
    ("Sam", "00000000-0000-4000-8000-000000000004"),
    ("Sam", "00000000-0000-4000-8000-000000000005"),
    ("Tanya-English", "00000000-0000-4000-8000-000000000006"),
];
/// What n8n answers at step 2 unless told otherwise.
pub const FIRST_MESSAGE: &str =
    "Hello Anna, this is Sara from SecureLife Insurance. How can I help you today?";
/// What n8n answers to a booking unless told otherwise.
pub const BOOKED: &str =
    "Booked: Anna Berg, Tuesday the ninth of March at half past two, at our London office.";

// ============================================================================
// The verb `demo`: one scripted call
// ============================================================================

/// The nine steps of a call, as everywhere in this project.
const STEPS: [&str; 9] =
    ["ring", "greeting", "agent", "answer", "stream", "talk", "act", "goodbye", "after"];

const HELP: &str = "\
callbridge demo: one whole call on this machine. No account, no network.

  Starts the real server, rings it as Twilio would, stands in for the voice
  agent (Ultravox) and the business logic (n8n), and prints the nine steps of
  the call as they happen. The audio that arrives at either end is compared
  with what was sent, sample by sample.

usage: callbridge demo [--help]
       callbridge demo --calls N [--seconds S] [--plain] [--churn] [--json]

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
        _ => return bench::run(arguments),
    }
    let program = std::env::current_exe()
        .map_err(|error| failed(format!("demo cannot find its own program file: {error}")))?;
    let mut show = Show::new();
    perform(&program, &mut show).map_err(|trouble| failed(show.failure(&trouble)))
}

fn perform(program: &Path, show: &mut Show) -> Result<(), Trouble> {
    show.title()?;
    // The agent's side speaks TLS here, since the real one does.
    let world = World::builder(program).tls(true).start()?;
    show.curtain = Instant::now();
    let (ringing, agent) = ring_until_answered(&world, show)?;
    let mut scene = open_the_stream(world, ringing, agent, show)?;
    scene.hear_the_greeting(show)?;
    scene.identify_the_caller(show)?;
    scene.interrupt_the_agent(show)?;
    scene.book_a_meeting(show)?;
    scene.say_goodbye(show)?;
    scene.file_the_transcript(show)?;
    scene.add_up(show)
}

/// Steps 1 to 4: they all happen inside one webhook, while it still rings.
fn ring_until_answered(world: &World, show: &mut Show) -> Result<(Ringing, AgentCall), Trouble> {
    show.step(
        1,
        Instant::now(),
        "+49 30 901820 calls. Twilio posts a signed form to /incoming-call.",
    )?;
    let ringing = world.ring("+4930901820")?;
    show.now(2);
    let asked = world.n8n.wait_for("1", 1, PATIENCE)?;
    let asked = asked.first().ok_or_else(|| world.trouble("n8n was not asked"))?;
    world.check(asked.json["number"] == "+4930901820", "n8n was asked about another number")?;
    show.step(2, asked.at, "callbridge asks n8n who that is. n8n knows her: \"Hello Anna, …\"")?;
    show.now(3);
    let agent = world.ultravox.next_call(PATIENCE)?;
    let body = agent.request();
    let greeting = &body["firstSpeakerSettings"]["agent"]["text"];
    world.check(*greeting == FIRST_MESSAGE, "the agent was not given n8n's greeting to say")?;
    world.check(body["voice"] == "Tanya-English", "the first stage has another voice")?;
    offers(world, &body["selectedTools"], &["verify", "move_to_main_convo", "hangUp"])?;
    let sentence =
        "An Ultravox call is created: Sara's prompt, voice and tools, and that greeting.";
    show.step(3, agent.created_at(), sentence)?;
    agent.wait_joined()?;
    show.step(
        3,
        agent.joined_at(),
        "callbridge joins it at once, over wss, and feeds it silence.",
    )?;
    let sentence = "TwiML goes back: connect the call to a Media Stream, with a token used once.";
    show.step(4, ringing.answered_at, sentence)?;
    Ok((ringing, agent))
}

/// The tools on offer must be those that the script is about to use.
fn offers(world: &World, selected: &Value, wanted: &[&str]) -> Result<(), Trouble> {
    let offered = tool_names(selected);
    for name in wanted {
        let message = format!("the tool {name} is not offered in this stage, only {offered:?}");
        world.check(offered.iter().any(|offer| offer == name), &message)?;
    }
    Ok(())
}

/// Step 5, and the first audio.
fn open_the_stream(
    world: World,
    ringing: Ringing,
    agent: AgentCall,
    show: &mut Show,
) -> Result<Scene, Trouble> {
    show.now(5);
    // The agent starts speaking when it is joined, not when the caller can
    // hear it. Its first words wait in a socket until the stream is open.
    let spoken = voice(1, 1_300);
    agent.say(FIRST_MESSAGE, &pcm_of(&spoken))?;
    let phone = ringing.open_stream(&world)?;
    let opened_at = Instant::now();
    show.step(
        5,
        opened_at,
        "The caller hears a click: Twilio opens /media-stream and shows the token.",
    )?;
    let microphone = phone.keep_talking();
    Ok(Scene {
        lines: vec![format!("Agent: {FIRST_MESSAGE}")],
        world,
        ringing,
        agent,
        phone,
        microphone,
        spoken,
        opened_at,
        utterances: 1,
        clear_took: Duration::ZERO,
    })
}

/// Everything a call in progress consists of, seen from outside.
struct Scene {
    world: World,
    ringing: Ringing,
    agent: AgentCall,
    phone: Phone,
    microphone: Talking,
    /// All that the agent has said, in mu-law: what the phone must have heard.
    spoken: Vec<u8>,
    /// The transcript as it ought to be filed.
    lines: Vec<String>,
    opened_at: Instant,
    utterances: u64,
    clear_took: Duration,
}

impl Scene {
    fn hear_the_greeting(&mut self, show: &mut Show) -> Result<(), Trouble> {
        show.now(6);
        self.phone.wait_audio(self.spoken.len())?;
        let heard_at = self.phone.first_audio_at().unwrap_or_else(Instant::now);
        show.step(6, heard_at, "Sara is heard: 8 kHz PCM from the agent, mu-law to the phone.")?;
        show.quote("Sara", FIRST_MESSAGE)?;
        self.phone.wait_played();
        let wish = "I want to talk to somebody about my life insurance.";
        self.caller_says(show, wish, 600)?;
        let now = Instant::now();
        show.step(6, now, "Her 20 ms frames reach the agent as PCM. It decides what to do.")
    }

    fn identify_the_caller(&mut self, show: &mut Show) -> Result<(), Trouble> {
        show.now(7);
        let details = json!({"full_name": "Anna Berg", "date_of_birth": "1985-04-12",
            "policy_number": "SL20471"});
        let result = self.act("verify", &details)?;
        let known = result["result"].as_str().is_some_and(|text| text.contains("Anna Berg"));
        self.world.check(known, &format!("verify did not confirm Anna Berg: {result}"))?;
        show.step(
            7,
            Instant::now(),
            "Tool verify: answered by callbridge itself, from its agent file.",
        )?;
        self.agent_says(show, "Sara", "Thank you, Anna.", 300)?;

        let reason = json!({"issue_type": "meeting", "customer_name": "Anna Berg",
            "issue_details": "Wants to talk to somebody about her life insurance. Confirmed."});
        let result = self.act("move_to_main_convo", &reason)?;
        let stage = self.new_stage(&result)?;
        self.world
            .check(stage["voice"] == "Mark", "the second stage has another voice than Mark")?;
        offers(
            &self.world,
            &stage["selectedTools"],
            &["schedule_meeting", "move_to_call_summary", "hangUp"],
        )?;
        let sentence =
            "Tool move_to_main_convo: a new prompt, voice and tool list. Now Mark speaks.";
        show.step(7, Instant::now(), sentence)
    }

    /// Invokes a tool and waits for its one result.
    fn act(&self, tool: &str, parameters: &Value) -> Result<Value, Trouble> {
        let invocation = self.agent.invoke(tool, parameters)?;
        let result = self.agent.wait_result(&invocation)?;
        let clean = result.get("errorType").is_none();
        self.world.check(clean, &format!("the tool {tool} failed: {result}"))?;
        Ok(result)
    }

    /// A stage change travels as JSON inside a string.
    fn new_stage(&self, result: &Value) -> Result<Value, Trouble> {
        let wanted = result["responseType"] == "new-stage";
        self.world.check(wanted, &format!("no new stage was entered: {result}"))?;
        let body = result["result"].as_str().unwrap_or_default();
        let stage: Value = serde_json::from_str(body)
            .map_err(|error| self.world.trouble(format!("the new stage is not JSON: {error}")))?;
        for field in ["systemPrompt", "voice", "selectedTools", "toolResultText"] {
            let there = stage.get(field).is_some();
            self.world.check(there, &format!("the new stage has no {field}"))?;
        }
        Ok(stage)
    }

    fn interrupt_the_agent(&mut self, show: &mut Show) -> Result<(), Trouble> {
        show.now(6);
        let planned = "I am Mark. I see you would like to talk about your life insurance, and \
            there is a great deal to say about it, so let me begin at the beginning.";
        let cut = "I am Mark. I see you would like to talk";
        let speech = voice(90, 6_000);
        let turn = self.agent.begin_saying(planned, &pcm_of(&speech))?;
        self.spoken.extend_from_slice(&speech);
        self.phone.wait_audio(self.spoken.len())?;
        show.quote("Mark", "I am Mark. I see you would like to talk about your life …")?;
        let sentence = "Six seconds of speech reach Twilio at once; it plays them in real time.";
        show.step(6, Instant::now(), sentence)?;

        self.microphone.say(&voice(91, 500));
        self.microphone.wait_said()?;
        let interrupted_at = Instant::now();
        self.agent.send(&json!({"type": "playback_clear_buffer"}))?;
        let cleared_at = self.phone.wait_clear()?;
        self.clear_took = cleared_at.saturating_duration_since(interrupted_at);
        self.agent.finish_saying(turn, cut)?;
        self.lines.push(format!("Agent: {cut}"));
        let text = "Just book me a meeting, please.";
        self.agent.user_said(text)?;
        self.lines.push(format!("User: {text}"));
        show.quote("Anna", text)?;
        let sentence = "Barge-in: she interrupts, and \"clear\" drops what Twilio has not played.";
        show.step(6, cleared_at, sentence)
    }

    fn book_a_meeting(&mut self, show: &mut Show) -> Result<(), Trouble> {
        show.now(7);
        let wishes = json!({"name": "Anna Berg", "email": "anna.berg@example.com",
            "purpose": "Life insurance", "datetime": "2027-03-09T14:30", "location": "London"});
        let result = self.act("schedule_meeting", &wishes)?;
        let posts = self.world.n8n.wait_for("3", 1, PATIENCE)?;
        let post = posts.first().map(|post| post.json["data"].clone()).unwrap_or_default();
        let booking: Value =
            serde_json::from_str(post.as_str().unwrap_or_default()).map_err(|error| {
                self.world.trouble(format!("the booking's data is not JSON: {error}"))
            })?;
        let complete = booking["email"] == "anna.berg@example.com"
            && booking["datetime"] == "2027-03-09T14:30"
            && booking["calendar_id"].as_str().is_some_and(|calendar| calendar.contains('@'));
        self.world.check(complete, &format!("n8n got another booking: {booking}"))?;
        let told = result["result"].as_str().is_some_and(|text| text.contains(BOOKED));
        self.world.check(told, &format!("the agent was not told n8n's answer: {result}"))?;
        let sentence =
            "Tool schedule_meeting: n8n books (route 3), and its answer goes to the agent.";
        show.step(7, Instant::now(), sentence)?;
        self.agent_says(show, "Mark", "You are booked: Tuesday the ninth, half past two.", 700)
    }

    fn say_goodbye(&mut self, show: &mut Show) -> Result<(), Trouble> {
        show.now(7);
        let result =
            self.act("move_to_call_summary", &json!({"summary": "Meeting booked in London."}))?;
        let stage = self.new_stage(&result)?;
        self.world.check(stage["voice"] == "Tanya-English", "the last stage is not Sara's")?;
        let sentence = "Tool move_to_call_summary: the third stage. Sara is back, to sum up.";
        show.step(7, Instant::now(), sentence)?;
        self.caller_says(show, "That is all. Thank you, goodbye.", 400)?;

        show.now(8);
        let result = self.act("hangUp", &json!({"reason": "the caller said goodbye"}))?;
        let wanted = result["responseType"] == "hang-up";
        self.world.check(wanted, &format!("hangUp was answered otherwise: {result}"))?;
        show.step(8, Instant::now(), "Tool hangUp: the agent may go. It still says goodbye.")?;
        let farewell = voice(99, 600);
        let text = "Goodbye, Anna.";
        self.agent.say(text, &pcm_of(&farewell))?;
        // Her microphone stays open, but after its close the agent is deaf.
        self.agent.wait_caller_audio(2 * self.phone.said().0.len())?;
        self.agent.close()?;
        self.spoken.extend_from_slice(&farewell);
        self.lines.push(format!("Agent: {text}"));
        show.quote("Sara", text)?;
        self.wait_for_the_end(show)
    }

    /// The line may drop only after the last word has been heard.
    fn wait_for_the_end(&mut self, show: &mut Show) -> Result<(), Trouble> {
        let ending = self.phone.wait_closed()?;
        let heard = self.phone.heard();
        let last_audio = heard.iter().rposition(|one| matches!(one.what, Heard::Audio(_)));
        let last_mark = heard.iter().rposition(|one| matches!(one.what, Heard::Mark(_)));
        self.world.check(last_mark > last_audio, "no mark followed the agent's last word")?;
        let echo = self.phone.echoes().last().map(|(at, _)| *at);
        let closed = heard.last().map(|one| one.at);
        let in_time = echo.is_some() && echo <= closed && ending == Heard::Closed(Some(1000));
        self.world.check(
            in_time,
            &format!("the line was cut before the goodbye was heard: {ending:?}"),
        )?;
        let sentence = "Twilio returns the mark: all has been heard. Only now callbridge hangs up.";
        show.step(8, closed.unwrap_or_else(Instant::now), sentence)?;
        let answer = self.ringing.stream_ended(&self.world)?;
        let done = Twiml::read(&answer.text()).is_ok_and(|twiml| twiml.hangs_up);
        self.world.check(
            done,
            &format!("/stream-ended was not answered with <Hangup/>: {}", answer.text()),
        )
    }

    fn file_the_transcript(&mut self, show: &mut Show) -> Result<(), Trouble> {
        show.now(9);
        let filed = self.world.n8n.wait_for("2", 1, PATIENCE)?;
        let filed = filed.first().ok_or_else(|| self.world.trouble("nothing was filed"))?;
        show.step(9, filed.at, "The transcript is posted to n8n (route 2). The call is over.")?;
        let transcript = filed.json["data"].as_str().unwrap_or_default();
        let wanted = self.lines.join("\n");
        let message =
            format!("the transcript differs.\n--- said:\n{wanted}\n--- filed:\n{transcript}");
        self.world.check(transcript.trim_end() == wanted, &message)?;
        show.transcript(transcript)
    }

    /// The last word: was every sample the one that was sent?
    fn add_up(&mut self, show: &mut Show) -> Result<(), Trouble> {
        show.now(6);
        self.phone.expect_audio(&self.spoken)?;
        let (said, said_at) = self.phone.said();
        let (said, heard) = (pcm_of(&said), self.agent.heard_caller());
        let told = said.get(..heard.len()).unwrap_or(&said);
        if let Some(what) = difference(told, &heard) {
            return Err(self.world.trouble(format!("the agent heard something else: {what}")));
        }
        let mut violations = self.phone.violations();
        violations.extend(self.world.ultravox.violations());
        self.world.check(violations.is_empty(), &format!("against the rules: {violations:?}"))?;
        let first = self.phone.first_audio_at().unwrap_or(self.opened_at);
        show.totals(&Totals {
            up: heard.len() / 2 / FRAME_BYTES,
            down: self.spoken.len().div_ceil(FRAME_BYTES),
            first_audio: first.saturating_duration_since(self.opened_at),
            clear: self.clear_took,
            relay: median_relay(&said_at, &self.agent.audio_at()),
        })
    }

    fn caller_says(&mut self, show: &mut Show, text: &str, millis: u64) -> Result<(), Trouble> {
        show.now(6);
        self.utterances += 1;
        show.quote("Anna", text)?;
        self.microphone.say(&voice(self.utterances, millis));
        self.microphone.wait_said()?;
        self.agent.wait_caller_audio(2 * self.phone.said().0.len())?;
        self.lines.push(format!("User: {text}"));
        self.agent.user_said(text)
    }

    fn agent_says(
        &mut self,
        show: &mut Show,
        name: &str,
        text: &str,
        millis: u64,
    ) -> Result<(), Trouble> {
        show.now(6);
        self.utterances += 1;
        show.quote(name, text)?;
        let speech = voice(1_000 + self.utterances, millis);
        self.agent.say(text, &pcm_of(&speech))?;
        self.spoken.extend_from_slice(&speech);
        self.lines.push(format!("Agent: {text}"));
        self.phone.wait_audio(self.spoken.len())?;
        self.phone.wait_played();
        Ok(())
    }
}

/// From "Twilio wrote the frame" to "the agent read it", the median.
fn median_relay(said_at: &[Instant], heard_at: &[Instant]) -> Duration {
    // A frame is one message on either side, so the two lists run in step.
    let mut took: Vec<Duration> = said_at
        .iter()
        .zip(heard_at)
        .map(|(said, heard)| heard.saturating_duration_since(*said))
        .collect();
    took.sort_unstable();
    took.get(took.len() / 2).copied().unwrap_or_default()
}

struct Totals {
    up: usize,
    down: usize,
    first_audio: Duration,
    clear: Duration,
    relay: Duration,
}

/// The screen. Colours and frames in a terminal, plain lines elsewhere.
struct Show {
    colours: bool,
    /// Time zero: the ring.
    curtain: Instant,
    /// The step in progress, which a failure is blamed on.
    step: usize,
}

impl Show {
    fn new() -> Show {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Show { colours: io::stdout().is_terminal() && wanted, curtain: Instant::now(), step: 0 }
    }

    fn title(&self) -> Result<(), Trouble> {
        let title = self.paint("1", "callbridge demo");
        print_line(&format!(
            "\n  {title}  one whole call. The bridge is real, the world is pretended."
        ))?;
        if self.colours {
            let bridge = self.paint("1;36", "callbridge");
            print_line(&format!("\n  caller ─── Twilio ═══ {bridge} ═══ Ultravox"))?;
            print_line("                            │\n                           n8n")?;
        }
        print_line(&self.paint("2", "\n      ms  step"))
    }

    /// From here on a failure belongs to this step.
    fn now(&mut self, step: usize) {
        self.step = step;
    }

    fn step(&mut self, step: usize, at: Instant, sentence: &str) -> Result<(), Trouble> {
        self.step = step;
        let millis = at.saturating_duration_since(self.curtain).as_millis();
        let millis = self.paint("2", &format!("{millis:>8}"));
        let label = format!("{step} {:<8}", step_name(step));
        // Each group of steps in one colour: answering, talking, ending.
        let colour = ["1;33", "1;36", "1;35"].get(usize::from(step > 4) + usize::from(step > 7));
        let label = self.paint(colour.copied().unwrap_or_default(), &label);
        print_line(&format!("{millis}  {label}  {sentence}"))
    }

    fn quote(&self, name: &str, text: &str) -> Result<(), Trouble> {
        let text = self.paint("32", &format!("{name}: \"{text}\""));
        print_line(&format!("{:22}{text}", ""))
    }

    fn transcript(&self, transcript: &str) -> Result<(), Trouble> {
        print_line(&format!("\n  {}", self.paint("1", "Transcript, as n8n has it")))?;
        for line in transcript.lines() {
            let (speaker, text) = line.split_once(": ").unwrap_or(("", line));
            let speaker = self.paint("1", &format!("{speaker:<6}"));
            print_line(&format!("  {speaker} {text}"))?;
        }
        Ok(())
    }

    fn totals(&self, totals: &Totals) -> Result<(), Trouble> {
        let Totals { up, down, first_audio, clear, relay } = totals;
        let verdict = self.paint("1;32", "All nine steps came out right.");
        print_line(&format!("\n  {verdict}"))?;
        print_line(&format!(
            "  {up} frames from the caller, {down} from the agent, lost 0, every sample as sent."
        ))?;
        print_line(&format!(
            "  First word {:.1} ms after the stream opened; barge-in cleared in {:.1} ms; \
             relay {:.2} ms a frame.\n",
            millis(*first_audio),
            millis(*clear),
            millis(*relay),
        ))
    }

    fn failure(&self, trouble: &Trouble) -> String {
        match self.step {
            0 => format!("the demo could not begin: {}", trouble.with_log()),
            step => {
                let name = step_name(step);
                format!("step {step} {name} did not come out right: {}", trouble.with_log())
            }
        }
    }

    fn paint(&self, colour: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// By hand and not by `println!`, which panics when stdout is a pipe whose
/// reader has left.
fn print_line(text: &str) -> Result<(), Trouble> {
    writeln!(io::stdout(), "{text}").map_err(|error| Trouble::bare(format!("stdout: {error}")))
}

fn step_name(step: usize) -> &'static str {
    step.checked_sub(1).and_then(|index| STEPS.get(index)).copied().unwrap_or("?")
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1_000.0
}

// ============================================================================
// The world
// ============================================================================

/// The three pretend parties and one real bridge between them.
pub struct World {
    pub n8n: N8n,
    pub ultravox: Ultravox,
    pub twilio: Twilio,
    pub bridge: Bridge,
    backstage: Arc<Backstage>,
    home: TempDir,
    public_url: String,
    auth_token: String,
    log: ChildLog,
}

/// Says how a [`World`] shall be before it starts.
pub struct WorldBuilder {
    program: PathBuf,
    tls: bool,
    asleep: bool,
    changes: Vec<(String, Option<String>)>,
}

impl World {
    /// A world around the bridge whose program file this is: in a test
    /// `env!("CARGO_BIN_EXE_callbridge")`.
    pub fn builder(program: impl AsRef<Path>) -> WorldBuilder {
        let program = program.as_ref().to_owned();
        WorldBuilder { program, tls: false, asleep: false, changes: Vec::new() }
    }

    /// The number rings: Twilio posts `/incoming-call` and reads the TwiML.
    /// Any other answer than 200 with good TwiML is a trouble; a test that
    /// wants to be refused uses [`World::webhook`].
    #[track_caller]
    pub fn ring(&self, number: &str) -> Result<Ringing, Trouble> {
        self.ring_with(number, &[])
    }

    /// As [`World::ring`], with form fields changed or added, such as
    /// `CallSid` for a webhook that Twilio sends twice.
    #[track_caller]
    pub fn ring_with(&self, number: &str, extra: &[(&str, &str)]) -> Result<Ringing, Trouble> {
        let mut form = incoming_call_form(number);
        for (name, value) in extra {
            form.retain(|(present, _)| present != name);
            form.push(((*name).to_owned(), (*value).to_owned()));
        }
        self.ask_for_twiml("/incoming-call", number, &form)
    }

    /// The person whom the bridge has rung picks up: Twilio posts to the `Url`
    /// that the order named.
    #[track_caller]
    pub fn picks_up(&self, order: &Order) -> Result<Ringing, Trouble> {
        let person = order.field("To").unwrap_or_default();
        let mut form = incoming_call_form(OUR_NUMBER);
        for (name, value) in &mut form {
            match name.as_str() {
                "CallSid" => order.sid.clone_into(value),
                "To" | "Called" => person.clone_into(value),
                "Direction" => "outbound-api".clone_into(value),
                "CallStatus" => "in-progress".clone_into(value),
                _ => {}
            }
        }
        let url = order.field("Url").unwrap_or_default();
        let path = url.strip_prefix(&self.public_url).unwrap_or(url);
        self.ask_for_twiml(path, person, &form)
    }

    #[track_caller]
    fn ask_for_twiml(
        &self,
        path: &str,
        number: &str,
        form: &[(String, String)],
    ) -> Result<Ringing, Trouble> {
        let pairs: Vec<(&str, &str)> =
            form.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let answer = self.webhook(path, &pairs)?;
        let answered_at = Instant::now();
        if answer.status != 200 {
            let text = answer.text();
            return Err(self.trouble(format!("{path} was answered {}: {text}", answer.status)));
        }
        let content_type = answer.header("content-type").unwrap_or_default();
        if !content_type.starts_with("text/xml") && !content_type.starts_with("application/xml") {
            return Err(self.trouble(format!("the TwiML has the content type {content_type:?}")));
        }
        let twiml = match Twiml::read(&answer.text()) {
            Ok(twiml) => twiml,
            Err(what) => {
                return Err(
                    self.trouble(format!("Twilio refuses the TwiML: {what}: {}", answer.text()))
                );
            }
        };
        let call_sid = form.iter().find(|(name, _)| name == "CallSid");
        let call_sid = call_sid.map(|(_, value)| value.clone()).unwrap_or_default();
        Ok(Ringing { call_sid, from: number.to_owned(), answer, twiml, answered_at })
    }

    /// Posts a form as Twilio does, with a good `X-Twilio-Signature`. The path
    /// may have a query; a `#fragment` is not sent and not signed.
    #[track_caller]
    pub fn webhook(&self, path: &str, form: &[(&str, &str)]) -> Result<HttpAnswer, Trouble> {
        let path = without_fragment(path);
        let signature =
            twilio_signature(&self.auth_token, &format!("{}{path}", self.public_url), form);
        let headers = [
            ("User-Agent", "TwilioProxy/1.1"),
            ("Accept", "*/*"),
            ("I-Twilio-Idempotency-Token", &random_uuid()),
            ("Content-Type", "application/x-www-form-urlencoded; charset=UTF-8"),
            ("X-Twilio-Signature", signature.as_str()),
        ];
        self.request("POST", path, &headers, form_body(form).as_bytes())
    }

    /// A GET without credentials.
    #[track_caller]
    pub fn get(&self, path: &str) -> Result<HttpAnswer, Trouble> {
        self.request("GET", path, &[], &[])
    }

    /// Any request at all: only `Host` and `Content-Length` are added.
    #[track_caller]
    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<HttpAnswer, Trouble> {
        match http_exchange(self.bridge.address(), method, path, headers, body) {
            Ok(answer) => Ok(answer),
            Err(error) => Err(self.trouble(format!("{method} {path}: {error}"))),
        }
    }

    /// Opens `/media-stream` with a good signature and sends nothing yet: for
    /// tests that want to send something else than Twilio would.
    #[track_caller]
    pub fn open_socket(&self) -> Result<Phone, Trouble> {
        let url = format!("{}/media-stream", self.public_url.replacen("http", "ws", 1));
        let signature = twilio_signature(&self.auth_token, &url, &[]);
        self.upgrade("/media-stream", Some(&signature))
    }

    /// Opens a WebSocket on any path, with any signature or none. A refusal is
    /// a trouble that names the status.
    #[track_caller]
    pub fn upgrade(&self, path: &str, signature: Option<&str>) -> Result<Phone, Trouble> {
        match Phone::connect(self.bridge.address(), path, signature, &self.log) {
            Ok(phone) => Ok(phone),
            Err(what) => Err(self.trouble(format!("the upgrade of {path} failed: {what}"))),
        }
    }

    /// `wss://…/media-stream`, as the TwiML should have it.
    pub fn stream_url(&self) -> String {
        format!("{}/media-stream", self.public_url.replacen("http", "ws", 1))
    }

    /// The signature that Twilio would send with this form to this path.
    pub fn signature(&self, path: &str, form: &[(&str, &str)]) -> String {
        twilio_signature(&self.auth_token, &format!("{}{path}", self.public_url), form)
    }

    /// Where the bridge keeps its journals.
    pub fn data_dir(&self) -> PathBuf {
        self.home.path.join("data")
    }

    /// The journals in it, oldest first.
    pub fn journals(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.data_dir().join("calls")).into_iter().flatten();
        let mut paths: Vec<PathBuf> =
            entries.filter_map(Result::ok).map(|entry| entry.path()).collect();
        paths.sort();
        paths
    }

    /// The events in the journal of that call, lines that are no JSON left out.
    pub fn journal(&self, call_sid: &str) -> Vec<Value> {
        let is_its = |path: &PathBuf| path.to_string_lossy().contains(call_sid);
        let text = self.journals().into_iter().find(is_its).map(std::fs::read_to_string);
        let text = text.and_then(Result::ok).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// The bridge's working directory.
    pub fn home(&self) -> &Path {
        &self.home.path
    }

    /// A failure that carries the bridge's log.
    #[track_caller]
    pub fn trouble(&self, what: impl Into<String>) -> Trouble {
        self.log.trouble(what)
    }

    #[track_caller]
    fn check(&self, right: bool, otherwise: &str) -> Result<(), Trouble> {
        if right { Ok(()) } else { Err(self.trouble(otherwise)) }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // The bridge first: what it holds open then ends by itself.
        self.bridge.kill();
        self.backstage.stop();
    }
}

impl WorldBuilder {
    /// Whether the agent's WebSocket is `wss` with a home-made certificate.
    #[must_use]
    pub fn tls(mut self, tls: bool) -> WorldBuilder {
        self.tls = tls;
        self
    }

    /// Opens all doors, but does not start the bridge.
    #[must_use]
    pub fn asleep(mut self) -> WorldBuilder {
        self.asleep = true;
        self
    }

    /// Adds or changes a setting of the bridge.
    #[must_use]
    pub fn setting(mut self, name: &str, value: impl Display) -> WorldBuilder {
        self.changes.push((name.to_owned(), Some(value.to_string())));
        self
    }

    /// Takes a setting of the bridge away.
    #[must_use]
    pub fn without(mut self, name: &str) -> WorldBuilder {
        self.changes.push((name.to_owned(), None));
        self
    }

    /// Opens all doors, starts the bridge and waits until it listens.
    #[track_caller]
    pub fn start(self) -> Result<World, Trouble> {
        let log = ChildLog::default();
        let asleep = self.asleep;
        let prepared = self.prepare(&log);
        let (world, port) = prepared.map_err(|error| log.trouble(format!("no world: {error}")))?;
        if !asleep {
            world.bridge.launch(port)?;
        }
        Ok(world)
    }

    fn prepare(self, log: &ChildLog) -> io::Result<(World, u16)> {
        let home = TempDir::new()?;
        let backstage = Arc::new(Backstage::default());
        let certificate = if self.tls { Some(make_certificate(Certificate::Good)?) } else { None };
        let pem = certificate.as_ref().map(|(pem, _)| pem.clone());
        let ultravox = Ultravox::open(&backstage, certificate.map(|(_, tls)| tls), log)?;
        let n8n = N8n::open(&backstage, log)?;
        let twilio = Twilio::open(&backstage, log)?;
        let mut settings: Vec<(String, String)> = [
            ("BIND", "127.0.0.1"),
            ("PUBLIC_URL", PUBLIC_URL),
            ("ULTRAVOX_API_KEY", API_KEY),
            ("ULTRAVOX_API_URL", &ultravox.api),
            ("N8N_WEBHOOK_URL", &n8n.url()),
            ("TWILIO_AUTH_TOKEN", AUTH_TOKEN),
            ("TWILIO_API_URL", &format!("http://{}", twilio.address)),
            ("DATA_DIR", &home.path.join("data").to_string_lossy()),
            ("ULTRAVOX_CORPUS_ID", CORPUS_ID),
            ("LOG_LEVEL", "debug"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
        if let Some(pem) = pem {
            let path = home.path.join("world.pem");
            std::fs::write(&path, pem)?;
            settings.push(("SSL_CERT_FILE".to_owned(), path.to_string_lossy().into_owned()));
        }
        for (name, value) in self.changes {
            settings.retain(|(present, _)| *present != name);
            settings.extend(value.map(|value| (name, value)));
        }
        let look = |wanted: &str, otherwise: &str| {
            let found = settings.iter().find(|(name, _)| name == wanted);
            found.map_or(otherwise, |(_, value)| value).to_owned()
        };
        let port = look("PORT", "0").parse().unwrap_or(0);
        twilio.set_auth_token(&look("TWILIO_AUTH_TOKEN", AUTH_TOKEN));
        let world = World {
            public_url: look("PUBLIC_URL", PUBLIC_URL).trim_end_matches('/').to_owned(),
            auth_token: look("TWILIO_AUTH_TOKEN", AUTH_TOKEN),
            bridge: Bridge::new(self.program, &home.path, settings, log),
            n8n,
            ultravox,
            twilio,
            backstage,
            home,
            log: log.clone(),
        };
        Ok((world, port))
    }
}

/// A loopback port on which nobody listens: "connection refused" on demand.
pub fn closed_port() -> u16 {
    // The listener is gone when this returns; for a while nobody else gets it.
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .map_or(9, |address| address.port())
}

// ============================================================================
// The bridge: the real server as a child process
// ============================================================================

/// The child process, its settings and its log.
pub struct Bridge {
    program: PathBuf,
    home: PathBuf,
    settings: Vec<(String, String)>,
    log: ChildLog,
    port: AtomicU16,
    running: Mutex<Option<Running>>,
}

struct Running {
    child: Child,
    listener: JoinHandle<()>,
}

impl Bridge {
    fn new(
        program: PathBuf,
        home: &Path,
        settings: Vec<(String, String)>,
        log: &ChildLog,
    ) -> Bridge {
        Bridge {
            program,
            home: home.to_owned(),
            settings,
            log: log.clone(),
            port: AtomicU16::new(0),
            running: Mutex::new(None),
        }
    }

    #[track_caller]
    fn launch(&self, port: u16) -> Result<(), Trouble> {
        let seen = self.log.len();
        let mut command = self.command();
        command.env("PORT", port.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let running = self.log.begin(command);
        let running = match running {
            Ok(running) => running,
            Err(error) => {
                let program = self.program.display();
                return Err(self.log.trouble(format!("cannot start {program}: {error}")));
            }
        };
        *lock(&self.running) = Some(running);
        let line = self.wait_for_log_since(seen, "listening on 127.0.0.1:")?;
        let port = line.split("listening on 127.0.0.1:").nth(1).unwrap_or_default();
        let digits: String = port.chars().take_while(char::is_ascii_digit).collect();
        let Ok(port) = digits.parse() else {
            return Err(self.log.trouble(format!("no port in the line {line:?}")));
        };
        self.port.store(port, Ordering::Release);
        Ok(())
    }

    /// Where the bridge listens.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port.load(Ordering::Acquire)))
    }

    /// From now on the world comes in through a proxy that listens here, until
    /// the next [`Bridge::restart`], which would take the proxy's port.
    pub fn is_behind(&self, port: u16) {
        self.port.store(port, Ordering::Release);
    }

    /// The process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        lock(&self.running).as_ref().map(|running| running.child.id())
    }

    /// Ends the process as a power cut would, and waits until it is gone.
    pub fn kill(&self) {
        let Some(mut running) = lock(&self.running).take() else {
            return;
        };
        // It may have ended by itself: then there is nothing to kill.
        moot(running.child.kill());
        moot(running.child.wait());
        moot(running.listener.join());
    }

    /// Asks the process to end (SIGTERM) and does not wait.
    #[track_caller]
    pub fn ask_to_stop(&self) -> Result<(), Trouble> {
        self.signal("TERM")
    }

    /// Sends a signal, such as `INT`, and does not wait.
    #[track_caller]
    pub fn signal(&self, name: &str) -> Result<(), Trouble> {
        let Some(pid) = self.pid() else {
            return Err(self.log.trouble("the bridge is not running"));
        };
        // std can only kill. The program `kill` saves an unsafe call here.
        match Command::new("kill").arg(format!("-{name}")).arg(pid.to_string()).status() {
            Ok(status) if status.success() => Ok(()),
            other => Err(self.log.trouble(format!("kill -{name} {pid}: {other:?}"))),
        }
    }

    /// Runs the program beside the server: same settings, same data, another
    /// verb.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> Result<Output, Trouble> {
        self.run_with(arguments, &[])
    }

    /// As [`Bridge::run`], with settings changed or, where there is nothing,
    /// taken away.
    #[track_caller]
    pub fn run_with(
        &self,
        arguments: &[&str],
        changes: &[(&str, Option<&str>)],
    ) -> Result<Output, Trouble> {
        let mut command = self.command();
        for (name, value) in changes {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let output = command.args(arguments).output();
        output.map_err(|error| self.log.trouble(format!("cannot run {arguments:?}: {error}")))
    }

    /// The settings of the bridge around another program, for `script` and the
    /// like.
    pub fn command_in(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = self.surround(Command::new(program));
        command.args(arguments);
        command
    }

    fn command(&self) -> Command {
        self.surround(Command::new(&self.program))
    }

    fn surround(&self, mut command: Command) -> Command {
        command.env_clear().current_dir(&self.home);
        command.envs(self.settings.iter().filter(|(name, _)| name != "PORT").cloned());
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        command
    }

    /// Waits until the process has ended, and says how.
    #[track_caller]
    pub fn wait_exit(&self, within: Duration) -> Result<ExitStatus, Trouble> {
        // A process that ends closes its stderr, which the log notices. That
        // spares us asking again and again.
        if self.log.book.wait(within, |book| book.ended.then_some(())).is_none() {
            return Err(self.log.trouble(format!("the bridge did not end within {within:?}")));
        }
        let Some(mut running) = lock(&self.running).take() else {
            return Err(self.log.trouble("the bridge is not running"));
        };
        moot(running.listener.join());
        running.child.wait().map_err(|error| self.log.trouble(error.to_string()))
    }

    /// Starts the bridge again: same settings, same data, same port.
    #[track_caller]
    pub fn restart(&self) -> Result<(), Trouble> {
        self.kill();
        self.launch(self.port.load(Ordering::Acquire))
    }

    /// Every line the bridge has written to stderr, over all its lives.
    pub fn log(&self) -> Vec<String> {
        self.log.book.look(|book| book.lines.clone())
    }

    /// Waits for a line that contains this, be it old or new.
    #[track_caller]
    pub fn wait_for_log(&self, fragment: &str) -> Result<String, Trouble> {
        self.wait_for_log_since(0, fragment)
    }

    /// As [`Bridge::wait_for_log`], ignoring the first `seen` lines.
    #[track_caller]
    pub fn wait_for_log_since(&self, seen: usize, fragment: &str) -> Result<String, Trouble> {
        let found = self.log.book.wait(PATIENCE, |book| {
            let line = book.lines.iter().skip(seen).find(|line| line.contains(fragment));
            match line {
                Some(line) => Some(Some(line.clone())),
                None if book.ended => Some(None),
                None => None,
            }
        });
        match found {
            Some(Some(line)) => Ok(line),
            Some(None) => Err(self.log.trouble(format!("the bridge ended without {fragment:?}"))),
            None => Err(self.log.trouble(format!("no log line has {fragment:?}"))),
        }
    }
}

/// What the child wrote to stderr, shared by all who may have to complain.
#[derive(Clone, Default)]
struct ChildLog {
    book: Arc<Board<LogBook>>,
}

#[derive(Default)]
struct LogBook {
    lines: Vec<String>,
    ended: bool,
}

impl ChildLog {
    /// Starts the child, and a thread that listens to it.
    fn begin(&self, mut command: Command) -> io::Result<Running> {
        self.book.change(|book| book.ended = false);
        let mut child = command.spawn()?;
        let stderr = child.stderr.take();
        let book = Arc::clone(&self.book);
        let listener = spawn("bridge's log", move || {
            let Some(stderr) = stderr else { return };
            for line in BufReader::new(stderr).split(b'\n') {
                let Ok(line) = line else { break };
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                book.change(|book| book.lines.push(line));
            }
            book.change(|book| book.ended = true);
        })?;
        Ok(Running { child, listener })
    }

    fn len(&self) -> usize {
        self.book.look(|book| book.lines.len())
    }

    #[track_caller]
    fn trouble(&self, what: impl Into<String>) -> Trouble {
        let log = self.book.look(|book| {
            let skipped = book.lines.len().saturating_sub(LAST_WORDS);
            book.lines.iter().skip(skipped).cloned().collect()
        });
        Trouble { log, ..Trouble::bare(what.into()) }
    }
}

// ============================================================================
// Pretend Twilio: webhooks and TwiML
// ============================================================================

/// A call that has been answered with TwiML.
#[derive(Clone, Debug)]
pub struct Ringing {
    pub call_sid: String,
    pub from: String,
    pub answer: HttpAnswer,
    pub twiml: Twiml,
    pub answered_at: Instant,
}

impl Ringing {
    /// Does what the TwiML says: opens the stream, sends `connected` and
    /// `start`. From then on it is a phone.
    #[track_caller]
    pub fn open_stream(&self, world: &World) -> Result<Phone, Trouble> {
        let Some(url) = &self.twiml.stream_url else {
            return Err(world.trouble(format!("the TwiML has no stream: {}", self.twiml.xml)));
        };
        let path = url
            .strip_prefix("wss://")
            .and_then(|rest| rest.find('/').and_then(|at| rest.get(at..)));
        let signature = twilio_signature(&world.auth_token, url, &[]);
        let phone = world.upgrade(path.unwrap_or("/"), Some(&signature))?;
        phone.send_connected()?;
        phone.send_start(&self.call_sid, &self.twiml.parameters)?;
        Ok(phone)
    }

    /// Posts to the `action` of `<Connect>`, as Twilio does when a stream is
    /// over while the call is not.
    #[track_caller]
    pub fn stream_ended(&self, world: &World) -> Result<HttpAnswer, Trouble> {
        let action = self.twiml.action.clone().unwrap_or_default();
        let path = action.strip_prefix(&world.public_url).unwrap_or(&action);
        world.webhook(path, &self.status_form("in-progress"))
    }

    /// As [`Ringing::stream_ended`], with further form fields, and with the
    /// TwiML of the answer: the same call, one step on.
    #[track_caller]
    pub fn next(&self, world: &World, extra: &[(&str, &str)]) -> Result<Ringing, Trouble> {
        let action = self.twiml.action.as_ref().or(self.twiml.dial_action.as_ref());
        let action = action.map_or("/stream-ended", String::as_str);
        let path = action.strip_prefix(&world.public_url).unwrap_or(action);
        let mut form = self.status_form("in-progress");
        for (name, value) in extra {
            form.retain(|(present, _)| present != name);
            form.push((*name, *value));
        }
        let form: Vec<(String, String)> =
            form.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        world.ask_for_twiml(path, &self.from, &form)
    }

    /// Posts `/call-status`: how Twilio tells that the call is over.
    #[track_caller]
    pub fn call_status(&self, world: &World, status: &str) -> Result<HttpAnswer, Trouble> {
        world.webhook("/call-status", &self.status_form(status))
    }

    fn status_form<'a>(&'a self, status: &'a str) -> Vec<(&'a str, &'a str)> {
        vec![
            ("CallSid", &self.call_sid),
            ("AccountSid", ACCOUNT_SID),
            ("From", &self.from),
            ("To", OUR_NUMBER),
            ("CallStatus", status),
            ("ApiVersion", "2010-04-01"),
            ("Direction", "inbound"),
        ]
    }
}

/// TwiML as far as this server uses it, read as strictly as Twilio reads it.
#[derive(Clone, Debug, Default)]
pub struct Twiml {
    pub xml: String,
    /// `<Stream url>`
    pub stream_url: Option<String>,
    /// `<Parameter name value>` in order.
    pub parameters: Vec<(String, String)>,
    /// `<Connect action>`
    pub action: Option<String>,
    /// The text of each `<Say>`.
    pub said: Vec<String>,
    /// The number in `<Dial>`.
    pub dial: Option<String>,
    /// `<Dial action>`
    pub dial_action: Option<String>,
    /// Whether there is a `<Hangup/>`.
    pub hangs_up: bool,
    /// The names of all elements in order, `Response` first.
    pub elements: Vec<String>,
}

impl Twiml {
    /// Twilio's error numbers 12100 (not well-formed) and 12200 (misused) are
    /// errors here as well.
    pub fn read(xml: &str) -> Result<Twiml, String> {
        let mut twiml = Twiml { xml: xml.to_owned(), ..Twiml::default() };
        for element in read_xml(xml)? {
            let text = element.text.trim().to_owned();
            if element.name == "Dial" {
                twiml.dial_action = element.attribute("action");
            }
            match element.name.as_str() {
                "Connect" => twiml.action = element.attribute("action"),
                "Stream" => twiml.stream_url = element.attribute("url"),
                "Parameter" => {
                    let name = element.attribute("name").ok_or("a <Parameter> without a name")?;
                    let value =
                        element.attribute("value").ok_or("a <Parameter> without a value")?;
                    if name.chars().count() + value.chars().count() >= 500 {
                        return Err(format!("<Parameter> {name} is longer than 500 characters"));
                    }
                    twiml.parameters.push((name, value));
                }
                "Say" => twiml.said.push(text),
                "Dial" | "Number" if !text.is_empty() => twiml.dial = Some(text),
                "Hangup" => twiml.hangs_up = true,
                _ => {}
            }
            twiml.elements.push(element.name);
        }
        match &twiml.stream_url {
            Some(url) if !url.starts_with("wss://") => {
                Err(format!("the stream's url is {url}, not wss"))
            }
            Some(url) if url.contains('?') => Err(format!("the stream's url has a query: {url}")),
            _ => Ok(twiml),
        }
    }

    /// The value of a `<Parameter>`.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(present, _)| present == name).map(|(_, value)| value.as_str())
    }
}

struct Element {
    name: String,
    attributes: Vec<(String, String)>,
    text: String,
}

impl Element {
    fn attribute(&self, name: &str) -> Option<String> {
        self.attributes.iter().find(|(present, _)| present == name).map(|(_, value)| value.clone())
    }
}

/// All elements in order of their start tags. Small, but it forgives nothing:
/// every start tag is ended, every attribute quoted, every `&` an entity.
fn read_xml(xml: &str) -> Result<Vec<Element>, String> {
    let mut rest = match xml.strip_prefix("<?xml") {
        Some(declared) => declared.split_once("?>").ok_or("the XML declaration does not end")?.1,
        None => xml,
    };
    let mut elements: Vec<Element> = Vec::new();
    let mut open: Vec<usize> = Vec::new();
    while let Some((text, tail)) = rest.split_once('<') {
        match open.last().and_then(|index| elements.get_mut(*index)) {
            Some(element) => element.text.push_str(&unescape(text)?),
            None if text.trim().is_empty() => {}
            None => return Err(format!("text outside of <Response>: {text:?}")),
        }
        let (tag, tail) = cut_tag(tail)?;
        rest = tail;
        if tag.starts_with("!--") {
            continue;
        }
        if let Some(name) = tag.strip_prefix('/') {
            let started = open.pop().and_then(|index| elements.get(index));
            if started.is_none_or(|element| element.name != name.trim()) {
                return Err(format!("</{name}> ends what was not begun"));
            }
            continue;
        }
        let empty = tag.strip_suffix('/');
        elements.push(read_tag(empty.unwrap_or(tag))?);
        if empty.is_none() {
            open.push(elements.len() - 1);
        }
    }
    if !open.is_empty() || !rest.trim().is_empty() {
        return Err("the document ends too early, or text follows it".to_owned());
    }
    match elements.first() {
        Some(root) if root.name == "Response" => Ok(elements),
        _ => Err("the root is not <Response>".to_owned()),
    }
}

/// Splits behind the `>` that ends the tag; one inside quotes does not.
fn cut_tag(text: &str) -> Result<(&str, &str), String> {
    let mut quoted = false;
    for (at, character) in text.char_indices() {
        match character {
            '"' => quoted = !quoted,
            '>' if !quoted => {
                let (tag, tail) = text.split_at(at);
                return Ok((tag, tail.strip_prefix('>').unwrap_or(tail)));
            }
            _ => {}
        }
    }
    Err(format!("a tag does not end: <{text}"))
}

fn read_tag(tag: &str) -> Result<Element, String> {
    let (name, mut rest) = tag.split_once(char::is_whitespace).unwrap_or((tag, ""));
    let mut attributes = Vec::new();
    while !rest.trim().is_empty() {
        let (name, tail) =
            rest.split_once("=\"").ok_or(format!("an attribute without quotes: <{tag}>"))?;
        let (value, tail) = tail.split_once('"').ok_or(format!("quotes do not end: <{tag}>"))?;
        if value.contains('<') {
            return Err(format!("a raw < in an attribute: <{tag}>"));
        }
        attributes.push((name.trim().to_owned(), unescape(value)?));
        rest = tail;
    }
    Ok(Element { name: name.to_owned(), attributes, text: String::new() })
}

fn unescape(text: &str) -> Result<String, String> {
    let mut parts = text.split('&');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (entity, tail) = part.split_once(';').ok_or(format!("a raw & in {text:?}"))?;
        let character = match entity {
            "amp" => '&',
            "lt" => '<',
            "gt" => '>',
            "quot" => '"',
            "apos" => '\'',
            _ => {
                let number = entity.strip_prefix("#x").map(|hex| u32::from_str_radix(hex, 16));
                let number = number.or_else(|| entity.strip_prefix('#').map(str::parse));
                let character = number.and_then(Result::ok).and_then(char::from_u32);
                character.ok_or(format!("unknown entity &{entity};"))?
            }
        };
        plain.push(character);
        plain.push_str(tail);
    }
    Ok(plain)
}

/// What Twilio posts when a number is called: the usual fields, empty ones, a
/// name with umlauts, and one that nobody has heard of yet.
fn incoming_call_form(number: &str) -> Vec<(String, String)> {
    let call_sid = format!("CA{}", random_hex(16));
    [
        ("CallSid", call_sid.as_str()),
        ("AccountSid", ACCOUNT_SID),
        ("From", number),
        ("To", OUR_NUMBER),
        ("CallStatus", "ringing"),
        ("ApiVersion", "2010-04-01"),
        ("Direction", "inbound"),
        ("CallerName", "Jürgen Größe & Söhne"),
        ("CallToken", "%7B%22parentCallInfoToken%22%3A%22eyJhbGciOi+JFUzI1NiJ9%22%7D"),
        ("StirVerstat", "TN-Validation-Passed-A"),
        ("FromCity", ""),
        ("FromState", ""),
        ("FromZip", ""),
        ("FromCountry", "DE"),
        ("ToCity", "LONDON"),
        ("ToState", ""),
        ("ToZip", ""),
        ("ToCountry", "GB"),
        ("Caller", number),
        ("CallerCity", ""),
        ("CallerState", ""),
        ("CallerZip", ""),
        ("CallerCountry", "DE"),
        ("Called", OUR_NUMBER),
        ("CalledCity", "LONDON"),
        ("CalledState", ""),
        ("CalledZip", ""),
        ("CalledCountry", "GB"),
        ("FieldOfTheFuture", "a=1&b=2"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec()
}

/// `X-Twilio-Signature`: HMAC-SHA1 over the URL and, for a form, over each
/// name and decoded value in the byte order of the names.
pub fn twilio_signature(auth_token: &str, url: &str, form: &[(&str, &str)]) -> String {
    let mut sorted = form.to_vec();
    sorted.sort_unstable();
    let mut text = without_fragment(url).to_owned();
    for (name, value) in sorted {
        text.push_str(name);
        text.push_str(value);
    }
    let key =
        ring::hmac::Key::new(ring::hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, auth_token.as_bytes());
    BASE64.encode(ring::hmac::sign(&key, text.as_bytes()))
}

fn form_body(form: &[(&str, &str)]) -> String {
    form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish()
}

fn without_fragment(url: &str) -> &str {
    url.split('#').next().unwrap_or(url)
}

// ============================================================================
// Pretend Twilio: the Media Stream, seen from the phone
// ============================================================================

/// What the bridge sends on a Media Stream, and how that ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// `media`: mu-law.
    Audio(Vec<u8>),
    /// `mark`, by name.
    Mark(String),
    /// `clear`
    Clear,
    /// What Twilio would not understand; it also is in the violations.
    Other(String),
    /// A close frame, with its code.
    Closed(Option<u16>),
    /// The end without a close frame.
    Broken(String),
}

/// Something heard, and when.
#[derive(Clone, Debug)]
pub struct HeardAt {
    pub at: Instant,
    pub what: Heard,
}

/// When a phone returns the marks that it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marks {
    /// As Twilio: when the audio before it has been played in real time.
    WhenPlayed,
    AtOnce,
    Never,
}

/// One call leg, seen from Twilio.
pub struct Phone {
    line: Arc<PhoneLine>,
    threads: Vec<JoinHandle<()>>,
}

struct PhoneLine {
    stream_sid: String,
    /// For cutting only; all reading and writing goes through the others.
    tcp: TcpStream,
    mouth: Mutex<PhoneMouth>,
    ear: Board<PhoneEar>,
    deck: Board<Deck>,
    log: ChildLog,
}

struct PhoneMouth {
    socket: WebSocket<TcpStream>,
    call_sid: String,
    /// One counter for all messages but `connected`.
    sequence: u64,
    chunk: u64,
    said: Vec<u8>,
    said_at: Vec<Instant>,
}

#[derive(Default)]
struct PhoneEar {
    heard: Vec<HeardAt>,
    audio_bytes: usize,
    violations: Vec<String>,
    echoes: Vec<(Instant, String)>,
    ended: Option<Heard>,
}

/// Twilio's play-out: audio is played one after the other in real time, and a
/// mark comes back when all before it has been played.
struct Deck {
    marks: Marks,
    silent_from: Instant,
    pending: VecDeque<(Instant, String)>,
    over: bool,
}

impl Phone {
    fn connect(
        bridge: SocketAddr,
        path: &str,
        signature: Option<&str>,
        log: &ChildLog,
    ) -> Result<Phone, String> {
        let tcp = connect(bridge).map_err(|error| error.to_string())?;
        let socket = upgrade_as_twilio(&tcp, path, signature)?;
        let (mut reader, writer) =
            split_socket(socket, Role::Client).map_err(|error| error.to_string())?;
        let now = Instant::now();
        let line = Arc::new(PhoneLine {
            stream_sid: format!("MZ{}", random_hex(16)),
            tcp,
            mouth: Mutex::new(PhoneMouth {
                socket: writer,
                call_sid: String::new(),
                sequence: 0,
                chunk: 0,
                said: Vec::new(),
                said_at: Vec::new(),
            }),
            ear: Board::default(),
            deck: Board::new(Deck {
                marks: Marks::WhenPlayed,
                silent_from: now,
                pending: VecDeque::new(),
                over: false,
            }),
            log: log.clone(),
        });
        let listening = Arc::clone(&line);
        let playing = Arc::clone(&line);
        let reader = spawn("phone ear", move || listening.listen(&mut reader));
        let player = spawn("phone deck", move || playing.play());
        let threads = [reader, player].into_iter().collect::<io::Result<Vec<_>>>();
        Ok(Phone { line, threads: threads.map_err(|error| error.to_string())? })
    }

    /// The id that Twilio has given this stream.
    pub fn stream_sid(&self) -> &str {
        &self.line.stream_sid
    }

    /// How marks are returned from now on.
    pub fn marks(&self, policy: Marks) {
        self.line.deck.change(|deck| deck.marks = policy);
    }

    /// The first message of a stream.
    pub fn send_connected(&self) -> Result<(), Trouble> {
        self.send_text(r#"{"event":"connected","protocol":"Call","version":"1.0.0"}"#)
    }

    /// The second message: which call this is, and the TwiML's parameters.
    pub fn send_start(
        &self,
        call_sid: &str,
        parameters: &[(String, String)],
    ) -> Result<(), Trouble> {
        let parameters: serde_json::Map<String, Value> =
            parameters.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
        let mut mouth = lock(&self.line.mouth);
        call_sid.clone_into(&mut mouth.call_sid);
        mouth.sequence += 1;
        let start = json!({
            "event": "start",
            "sequenceNumber": mouth.sequence.to_string(),
            "start": {
                "accountSid": ACCOUNT_SID,
                "streamSid": self.line.stream_sid,
                "callSid": call_sid,
                "tracks": ["inbound"],
                "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1},
                "customParameters": parameters,
            },
            "streamSid": self.line.stream_sid,
        });
        let sent = mouth.socket.send(Message::text(start.to_string()));
        sent.map_err(|error| self.line.broken(&error))
    }

    /// Says this at once: in messages of 160 bytes, without waiting 20 ms
    /// between them. The last one may be shorter.
    pub fn speak(&self, mulaw: &[u8]) -> Result<(), Trouble> {
        let frames = mulaw.chunks(FRAME_BYTES);
        frames.into_iter().try_for_each(|frame| self.line.send_frame(frame))
    }

    /// From now on a frame goes out every 20 ms, as from a real phone: what
    /// is given to [`Talking::say`], else the quietest noise there is. Not
    /// plain silence, since that could not be told from the bridge's own.
    pub fn keep_talking(&self) -> Talking {
        self.keep_talking_with(&[0xFE, 0x7E])
    }

    /// As [`Phone::keep_talking`], with this mu-law sound again and again.
    pub fn keep_talking_with(&self, background: &[u8]) -> Talking {
        Talking::start(Arc::clone(&self.line), background)
    }

    /// Presses keys, one `dtmf` message each.
    pub fn press(&self, keys: &str) -> Result<(), Trouble> {
        for key in keys.chars() {
            self.line.send_numbered(|sequence, stream_sid, _| {
                let dtmf = json!({"track": "inbound_track", "digit": key.to_string()});
                let number = sequence.to_string();
                json!({
                    "event": "dtmf", "streamSid": stream_sid, "sequenceNumber": number,
                    "dtmf": dtmf,
                })
                .to_string()
            })?;
        }
        Ok(())
    }

    /// The caller hangs up: `stop`, then a close frame.
    pub fn hang_up(&self) -> Result<(), Trouble> {
        self.send_stop()?;
        let mut mouth = lock(&self.line.mouth);
        match mouth.socket.send(normal_close()) {
            // The bridge may have answered the `stop` with a goodbye of its own already.
            Ok(()) | Err(tungstenite::Error::Protocol(ProtocolError::SendAfterClosing)) => Ok(()),
            Err(error) => Err(self.line.broken(&error)),
        }
    }

    /// `stop` alone.
    pub fn send_stop(&self) -> Result<(), Trouble> {
        self.line.send_numbered(|sequence, stream_sid, call_sid| {
            let stop = json!({"accountSid": ACCOUNT_SID, "callSid": call_sid});
            let number = sequence.to_string();
            json!({
                "event": "stop", "streamSid": stream_sid, "sequenceNumber": number, "stop": stop,
            })
            .to_string()
        })
    }

    /// The line breaks: neither `stop` nor a close frame, TCP just ends.
    pub fn drop_line(&self) {
        moot(self.line.tcp.shutdown(Shutdown::Both));
    }

    /// Sends any text message.
    pub fn send_text(&self, text: &str) -> Result<(), Trouble> {
        let mut mouth = lock(&self.line.mouth);
        mouth.socket.send(Message::text(text)).map_err(|error| self.line.broken(&error))
    }

    /// Sends a binary message, which Twilio never does.
    pub fn send_binary(&self, bytes: &[u8]) -> Result<(), Trouble> {
        let mut mouth = lock(&self.line.mouth);
        let sent = mouth.socket.send(Message::binary(bytes.to_vec()));
        sent.map_err(|error| self.line.broken(&error))
    }

    /// Sends bytes that need not be WebSocket at all.
    pub fn send_raw(&self, bytes: &[u8]) -> Result<(), Trouble> {
        let mut mouth = lock(&self.line.mouth);
        let sent = mouth.socket.get_mut().write_all(bytes);
        sent.map_err(|error| self.line.broken(&error))
    }

    /// All mu-law said in media messages so far, and when each was sent.
    pub fn said(&self) -> (Vec<u8>, Vec<Instant>) {
        let mouth = lock(&self.line.mouth);
        (mouth.said.clone(), mouth.said_at.clone())
    }

    /// Everything heard so far, in order; the end of the line comes last.
    pub fn heard(&self) -> Vec<HeardAt> {
        self.line.ear.look(|ear| ear.heard.clone())
    }

    /// All audio heard so far.
    pub fn heard_audio(&self) -> Vec<u8> {
        let audio = |ear: &PhoneEar| {
            let pieces = ear.heard.iter().filter_map(|one| match &one.what {
                Heard::Audio(mulaw) => Some(mulaw.as_slice()),
                _ => None,
            });
            pieces.collect::<Vec<_>>().concat()
        };
        self.line.ear.look(audio)
    }

    /// When the agent's voice first arrived.
    pub fn first_audio_at(&self) -> Option<Instant> {
        self.line.ear.look(|ear| {
            let first = ear.heard.iter().find(|one| matches!(one.what, Heard::Audio(_)));
            first.map(|one| one.at)
        })
    }

    /// What Twilio would have complained about. Tests want this to be empty.
    pub fn violations(&self) -> Vec<String> {
        self.line.ear.look(|ear| ear.violations.clone())
    }

    /// The marks that have been returned, and when.
    pub fn echoes(&self) -> Vec<(Instant, String)> {
        self.line.ear.look(|ear| ear.echoes.clone())
    }

    /// Waits until what has been heard makes `ready` true.
    #[track_caller]
    pub fn wait_until(
        &self,
        what: &str,
        within: Duration,
        mut ready: impl FnMut(&[HeardAt]) -> bool,
    ) -> Result<(), Trouble> {
        self.wait(what, within, |ear| ready(&ear.heard).then_some(()))
    }

    /// Waits until so many bytes of audio have been heard in all.
    #[track_caller]
    pub fn wait_audio(&self, bytes: usize) -> Result<(), Trouble> {
        let what = format!("{bytes} bytes of audio in all");
        self.wait(&what, PATIENCE, |ear| (ear.audio_bytes >= bytes).then_some(()))
    }

    /// Waits until the audio heard since the beginning is exactly this.
    #[track_caller]
    pub fn expect_audio(&self, mulaw: &[u8]) -> Result<(), Trouble> {
        self.wait_audio(mulaw.len())?;
        match difference(mulaw, &self.heard_audio()) {
            None => Ok(()),
            Some(what) => {
                Err(self.line.log.trouble(format!("the phone heard something else: {what}")))
            }
        }
    }

    /// Waits for a `clear`, old or new, and says when the last one came.
    #[track_caller]
    pub fn wait_clear(&self) -> Result<Instant, Trouble> {
        self.wait("a clear", PATIENCE, |ear| {
            let clear = ear.heard.iter().rfind(|one| one.what == Heard::Clear);
            clear.map(|one| one.at)
        })
    }

    /// Waits for a mark and gives its name.
    #[track_caller]
    pub fn wait_mark(&self) -> Result<String, Trouble> {
        self.wait("a mark", PATIENCE, |ear| {
            ear.heard.iter().find_map(|one| match &one.what {
                Heard::Mark(name) => Some(name.clone()),
                _ => None,
            })
        })
    }

    /// Waits until the line has ended: [`Heard::Closed`] or [`Heard::Broken`].
    #[track_caller]
    pub fn wait_closed(&self) -> Result<Heard, Trouble> {
        self.wait("the end of the line", PATIENCE, |ear| ear.ended.clone())
    }

    /// Waits until all audio received so far has been played.
    pub fn wait_played(&self) {
        let left = || {
            self.line.deck.look(|deck| deck.silent_from).saturating_duration_since(Instant::now())
        };
        while !left().is_zero() {
            self.line.deck.wait(left(), |deck| (deck.silent_from <= Instant::now()).then_some(()));
        }
    }

    #[track_caller]
    fn wait<R>(
        &self,
        what: &str,
        within: Duration,
        mut ready: impl FnMut(&PhoneEar) -> Option<R>,
    ) -> Result<R, Trouble> {
        let found = self.line.ear.wait(within, |ear| match ready(ear) {
            Some(found) => Some(Ok(found)),
            // After the end nothing can come any more.
            None => ear.ended.clone().map(Err),
        });
        let events = || self.line.ear.look(PhoneEar::summary);
        match found {
            Some(Ok(found)) => Ok(found),
            Some(Err(ending)) => Err(self
                .line
                .log
                .trouble(format!("the phone waited for {what}, but: {ending:?}; {}", events()))),
            None => Err(self
                .line
                .log
                .trouble(format!("the phone waited {within:?} for {what}; {}", events()))),
        }
    }
}

impl Drop for Phone {
    fn drop(&mut self) {
        self.line.deck.change(|deck| deck.over = true);
        moot(self.line.tcp.shutdown(Shutdown::Both));
        for thread in self.threads.drain(..) {
            moot(thread.join());
        }
    }
}

impl PhoneEar {
    fn summary(&self) -> String {
        let kinds: Vec<String> = self.heard.iter().map(|one| one.what.brief()).collect();
        let skipped = kinds.len().saturating_sub(12);
        let last: Vec<&str> = kinds.iter().skip(skipped).map(String::as_str).collect();
        format!("heard {} messages, the last: {}", kinds.len(), last.join(", "))
    }
}

impl Heard {
    fn brief(&self) -> String {
        match self {
            Heard::Audio(mulaw) => format!("audio {}", mulaw.len()),
            other => format!("{other:?}"),
        }
    }
}

impl PhoneLine {
    fn send_frame(&self, mulaw: &[u8]) -> Result<(), Trouble> {
        let mut mouth = lock(&self.mouth);
        mouth.sequence += 1;
        mouth.chunk += 1;
        // Twilio's clock does not start at 0 either; 155 was seen.
        let timestamp = 155 + 20 * (mouth.chunk - 1);
        let text = format!(
            "{{\"event\":\"media\",\"sequenceNumber\":\"{}\",\"media\":{{\"track\":\"inbound\",\
             \"chunk\":\"{}\",\"timestamp\":\"{timestamp}\",\"payload\":\"{}\"}},\
             \"streamSid\":\"{}\"}}",
            mouth.sequence,
            mouth.chunk,
            BASE64.encode(mulaw),
            self.stream_sid,
        );
        // Noted before it is sent: the agent may have it before we are back.
        mouth.said.extend_from_slice(mulaw);
        mouth.said_at.push(Instant::now());
        mouth.socket.send(Message::text(text)).map_err(|error| self.broken(&error))
    }

    /// Sends a message that needs the next sequence number. `write` gets that
    /// number, the stream's id and the call's id.
    fn send_numbered(&self, write: impl FnOnce(u64, &str, &str) -> String) -> Result<(), Trouble> {
        let mut mouth = lock(&self.mouth);
        mouth.sequence += 1;
        let text = write(mouth.sequence, &self.stream_sid, &mouth.call_sid);
        mouth.socket.send(Message::text(text)).map_err(|error| self.broken(&error))
    }

    fn broken(&self, error: &impl Display) -> Trouble {
        self.log.trouble(format!("the phone cannot send: {error}"))
    }

    /// The reading thread: it notes everything and never waits for anybody.
    fn listen(&self, reader: &mut WebSocket<Ear>) {
        let ending = listen(reader, |message| {
            let at = Instant::now();
            let what = match message {
                Incoming::Reply(reply) => {
                    moot(lock(&self.mouth).socket.send(reply));
                    return;
                }
                Incoming::Text(text) => judge(&text, &self.stream_sid),
                Incoming::Binary(bytes) => {
                    Err(format!("a binary message of {} bytes (31950)", bytes.len()))
                }
            };
            self.note(at, what);
        });
        let ending = match ending {
            Ending::Closed(code) => Heard::Closed(code),
            Ending::Broken(why) => Heard::Broken(why),
        };
        moot(self.tcp.shutdown(Shutdown::Both));
        self.deck.change(|deck| deck.over = true);
        self.ear.change(|ear| {
            ear.heard.push(HeardAt { at: Instant::now(), what: ending.clone() });
            ear.ended = Some(ending);
        });
    }

    fn note(&self, at: Instant, what: Result<Heard, String>) {
        let what = match what {
            Ok(what) => what,
            Err(violation) => {
                self.ear.change(|ear| ear.violations.push(violation.clone()));
                Heard::Other(violation)
            }
        };
        let due = self.deck.change(|deck| deck.take(at, &what));
        self.ear.change(|ear| {
            if let Heard::Audio(mulaw) = &what {
                ear.audio_bytes += mulaw.len();
            }
            ear.heard.push(HeardAt { at, what });
        });
        for name in due {
            self.echo(&name);
        }
    }

    /// The playing thread: it returns each mark at its time.
    fn play(&self) {
        let first_due = |deck: &Deck| deck.pending.front().map(|(at, _)| *at);
        loop {
            let now = Instant::now();
            let next = self.deck.look(first_due);
            if self.deck.look(|deck| deck.over) {
                return;
            }
            if next.is_some_and(|at| at <= now) {
                // A clear may have returned it in the meantime.
                let due = self.deck.change(|deck| deck.pending.pop_front_if(|(at, _)| *at <= now));
                if let Some((_, name)) = due {
                    self.echo(&name);
                }
                continue;
            }
            let wait = next.map_or(PATIENCE, |at| at.saturating_duration_since(now));
            self.deck.wait(wait, |deck| (deck.over || first_due(deck) != next).then_some(()));
        }
    }

    fn echo(&self, name: &str) {
        self.ear.change(|ear| ear.echoes.push((Instant::now(), name.to_owned())));
        let name = json!(name);
        let sent = self.send_numbered(|sequence, stream_sid, _| {
            let number = sequence.to_string();
            json!({
                "event": "mark", "streamSid": stream_sid, "sequenceNumber": number,
                "mark": {"name": name},
            })
            .to_string()
        });
        // If the line is gone the reading thread says so.
        moot(sent);
    }
}

impl Deck {
    /// Takes in what was heard, and says which marks are to be returned now.
    fn take(&mut self, at: Instant, what: &Heard) -> Vec<String> {
        match what {
            Heard::Audio(mulaw) => {
                let samples = u32::try_from(mulaw.len()).unwrap_or(u32::MAX);
                self.silent_from = self.silent_from.max(at) + SAMPLE_TIME * samples;
                Vec::new()
            }
            Heard::Mark(name) => match self.marks {
                Marks::Never => Vec::new(),
                Marks::AtOnce => vec![name.clone()],
                Marks::WhenPlayed if self.silent_from <= at && self.pending.is_empty() => {
                    vec![name.clone()]
                }
                Marks::WhenPlayed => {
                    self.pending.push_back((self.silent_from, name.clone()));
                    Vec::new()
                }
            },
            // Twilio drops what is buffered, and all marks come back.
            Heard::Clear => {
                self.silent_from = at;
                self.pending.drain(..).map(|(_, name)| name).collect()
            }
            Heard::Other(_) | Heard::Closed(_) | Heard::Broken(_) => Vec::new(),
        }
    }
}

/// One message of the bridge, by Twilio's rules: exactly these keys.
fn judge(text: &str, stream_sid: &str) -> Result<Heard, String> {
    let wrong =
        |why: &str| format!("{why} (31951): {}", text.chars().take(200).collect::<String>());
    let message: Value = serde_json::from_str(text).map_err(|error| wrong(&error.to_string()))?;
    if message["streamSid"] != stream_sid {
        return Err(wrong("wrong streamSid"));
    }
    let event = message["event"].as_str().unwrap_or_default();
    let keys = |value: &Value| {
        let keys = value.as_object().map(|object| object.keys().cloned().collect::<Vec<_>>());
        keys.unwrap_or_default().join(" ")
    };
    let inner = &message[event];
    match (event, keys(&message).as_str(), keys(inner).as_str()) {
        ("media", "event media streamSid", "payload") => {
            let payload = inner["payload"].as_str().ok_or_else(|| wrong("payload is no text"))?;
            let mulaw = BASE64.decode(payload).map_err(|error| wrong(&error.to_string()))?;
            if mulaw.is_empty() { Err(wrong("an empty payload")) } else { Ok(Heard::Audio(mulaw)) }
        }
        ("mark", "event mark streamSid", "name") => {
            let name = inner["name"].as_str().ok_or_else(|| wrong("name is no text"))?;
            Ok(Heard::Mark(name.to_owned()))
        }
        ("clear", "event streamSid", "") => Ok(Heard::Clear),
        _ => Err(wrong("wrong event or keys")),
    }
}

/// A caller with an open microphone: one frame every 20 ms until dropped, or
/// until the line ends.
pub struct Talking {
    state: Arc<Board<Speech>>,
    log: ChildLog,
    thread: Option<JoinHandle<()>>,
}

struct Speech {
    over: bool,
    words: VecDeque<u8>,
    background: Vec<u8>,
}

impl Talking {
    fn start(line: Arc<PhoneLine>, background: &[u8]) -> Talking {
        let speech =
            Speech { over: false, words: VecDeque::new(), background: background.to_vec() };
        let state = Arc::new(Board::new(speech));
        let log = line.log.clone();
        let shared = Arc::clone(&state);
        let thread = spawn("microphone", move || {
            let mut due = Instant::now();
            loop {
                let frame = shared.change(Speech::next_frame);
                if line.send_frame(&frame).is_err() {
                    shared.change(|speech| speech.over = true);
                    return;
                }
                due += FRAME_TIME;
                let wait = due.saturating_duration_since(Instant::now());
                if shared.wait(wait, |speech| speech.over.then_some(())).is_some() {
                    return;
                }
            }
        });
        // No thread is the same as a microphone that has failed.
        if thread.is_err() {
            state.change(|speech| speech.over = true);
        }
        Talking { state, log, thread: thread.ok() }
    }

    /// Says this after what is still to be said, 160 bytes every 20 ms.
    pub fn say(&self, mulaw: &[u8]) {
        self.state.change(|speech| speech.words.extend(mulaw));
    }

    /// Waits until all words have been sent. It takes as long as they last.
    #[track_caller]
    pub fn wait_said(&self) -> Result<(), Trouble> {
        let left = self.state.look(|speech| speech.words.len());
        let samples = u32::try_from(left).unwrap_or(u32::MAX);
        let within = PATIENCE + SAMPLE_TIME * samples;
        match self
            .state
            .wait(within, |speech| (speech.over || speech.words.is_empty()).then_some(speech.over))
        {
            Some(false) => Ok(()),
            _ => Err(self.log.trouble("the line ended before the caller had finished speaking")),
        }
    }

    /// Closes the microphone.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.state.change(|speech| speech.over = true);
        if let Some(thread) = self.thread.take() {
            moot(thread.join());
        }
    }
}

impl Drop for Talking {
    fn drop(&mut self) {
        self.end();
    }
}

impl Speech {
    fn next_frame(&mut self) -> Vec<u8> {
        let words = self.words.len().min(FRAME_BYTES);
        let mut frame: Vec<u8> = self.words.drain(..words).collect();
        let silence = self.background.iter().cycle().take(FRAME_BYTES - words);
        frame.extend(silence);
        frame
    }
}

/// The upgrade as Twilio asks for it: no Origin, no subprotocol.
fn upgrade_as_twilio(
    tcp: &TcpStream,
    path: &str,
    signature: Option<&str>,
) -> Result<WebSocket<Ear>, String> {
    let mut request = http::Request::builder()
        .uri(format!("ws://bridge.example{path}"))
        .header("host", "bridge.example")
        .header("user-agent", "Twilio.TmeWs/1.0")
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", tungstenite::handshake::client::generate_key());
    if let Some(signature) = signature {
        request = request.header("x-twilio-signature", signature);
    }
    let request = request.body(()).map_err(|error| error.to_string())?;
    let ear = Ear { tcp: tcp.try_clone().map_err(|error| error.to_string())?, mute: false };
    match tungstenite::client::client_with_config(request, ear, Some(small_buffers())) {
        Ok((socket, _)) => Ok(socket),
        Err(HandshakeError::Failure(tungstenite::Error::Http(answer))) => {
            Err(format!("answered {}", answer.status()))
        }
        Err(error) => Err(error.to_string()),
    }
}

// ============================================================================
// Pretend Ultravox: calls over REST, the agent over a WebSocket
// ============================================================================

/// The agent's side: it lets calls be created, and hands them to the test.
pub struct Ultravox {
    /// Where its REST API is: `https` if the agents are behind TLS.
    api: String,
    shared: Arc<UltravoxState>,
    log: ChildLog,
}

struct UltravoxState {
    board: Board<Calls>,
    join_prefix: Mutex<String>,
    /// Whether a `ping` gets its `pong`.
    pongs: Arc<AtomicBool>,
    log: ChildLog,
}

#[derive(Default)]
struct Calls {
    created: Vec<AgentCall>,
    /// How many of them `next_call` has handed out.
    handed_out: usize,
    /// Requests with any answer, good and bad.
    requests: usize,
    refused_joins: usize,
    refusals: VecDeque<Reply>,
    refuse_always: Option<Reply>,
    slow: Duration,
    silent_on_join: bool,
    violations: Vec<String>,
    account_asked: usize,
    /// Answers to GET by path, in the place of the standing ones.
    told: HashMap<String, Reply>,
}

/// One call, in which the test plays the agent. Clones are the same call.
#[derive(Clone)]
pub struct AgentCall {
    line: Arc<AgentLine>,
}

struct AgentLine {
    call_id: String,
    join_url: String,
    request: HttpRequest,
    body: Value,
    state: Board<AgentEar>,
    mouth: Mutex<Option<AgentMouth>>,
    pongs: Arc<AtomicBool>,
    log: ChildLog,
}

struct AgentMouth {
    socket: WebSocket<TcpStream>,
    tcp: TcpStream,
    /// What is below TLS, if there is TLS.
    wire: TcpStream,
    /// Set to end TLS without saying goodbye.
    rude: Arc<AtomicBool>,
}

#[derive(Default)]
struct AgentEar {
    joined_at: Option<Instant>,
    audio: Vec<(Instant, Vec<u8>)>,
    caller_bytes: usize,
    texts: Vec<(Instant, Value)>,
    ended: Option<Ending>,
    ended_at: Option<Instant>,
    next_ordinal: u64,
}

/// How a socket ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With a close frame; 1000 is an ordinary one.
    Closed(Option<u16>),
    /// Without.
    Broken(String),
}

impl Ultravox {
    fn open(
        backstage: &Arc<Backstage>,
        tls: Option<Arc<rustls::ServerConfig>>,
        log: &ChildLog,
    ) -> io::Result<Ultravox> {
        let shared = Arc::new(UltravoxState {
            board: Board::default(),
            join_prefix: Mutex::default(),
            pongs: Arc::default(),
            log: log.clone(),
        });
        let prefix = if tls.is_some() { "wss://localhost" } else { "ws://127.0.0.1" };
        let state = Arc::clone(&shared);
        let agent_tls = tls.clone();
        let doors = backstage.listen("agent socket", move |tcp| {
            // A broken join is seen by the test as a call that is not joined.
            moot(state.join(tcp, agent_tls.as_ref()));
        })?;
        *lock(&shared.join_prefix) = format!("{prefix}:{}", doors.port());
        let state = Arc::clone(&shared);
        let address = serve_http(backstage, "ultravox", move |request| state.answer(request))?;
        let api = match tls {
            None => format!("http://{address}"),
            Some(tls) => {
                let doors = backstage.listen("ultravox over tls", move |tcp| {
                    // The bridge says what is wrong with a connection that does not come about.
                    moot(Plug::from_tls_to(tcp, &tls, address));
                })?;
                format!("https://localhost:{}", doors.port())
            }
        };
        Ok(Ultravox { api, shared, log: log.clone() })
    }

    /// Waits for the next call to be created, in order of creation.
    #[track_caller]
    pub fn next_call(&self, within: Duration) -> Result<AgentCall, Trouble> {
        let next = self.shared.board.wait(within, |calls| {
            let call = calls.created.get(calls.handed_out).cloned()?;
            calls.handed_out += 1;
            Some(call)
        });
        match next {
            Some(call) => Ok(call),
            None => Err(self.log.trouble(format!("no agent call was created within {within:?}"))),
        }
    }

    /// All calls created so far, in order.
    pub fn created(&self) -> Vec<AgentCall> {
        self.shared.board.look(|calls| calls.created.clone())
    }

    /// How many requests for a call have come, refused ones included.
    pub fn requests(&self) -> usize {
        self.shared.board.look(|calls| calls.requests)
    }

    /// Waits until so many requests for a call have come.
    #[track_caller]
    pub fn wait_requests(&self, count: usize) -> Result<(), Trouble> {
        let come = |calls: &mut Calls| (calls.requests >= count).then_some(());
        match self.shared.board.wait(PATIENCE, come) {
            Some(()) => Ok(()),
            None => Err(self.log.trouble(format!("Ultravox was not asked {count} times"))),
        }
    }

    /// Answers the next so many requests for a call with this instead.
    pub fn refuse_next(&self, count: usize, reply: &Reply) {
        let refusals = std::iter::repeat_n(reply.clone(), count);
        self.shared.board.change(|calls| calls.refusals.extend(refusals));
    }

    /// Answers every request with this, until [`Ultravox::accept_again`].
    pub fn refuse_always(&self, reply: &Reply) {
        self.shared.board.change(|calls| calls.refuse_always = Some(reply.clone()));
    }

    /// Takes the next request and never answers it.
    pub fn hang_next(&self) {
        self.refuse_next(1, &Reply::Hang);
    }

    /// Ends all refusing.
    pub fn accept_again(&self) {
        self.shared.board.change(|calls| {
            calls.refuse_always = None;
            calls.refusals.clear();
        });
    }

    /// Creates calls only after this long.
    pub fn take_time(&self, slow: Duration) {
        self.shared.board.change(|calls| calls.slow = slow);
    }

    /// When true, a join is not followed by `call_started` and `state`; the
    /// test sends them (or not) with [`AgentCall::send`].
    pub fn silent_on_join(&self, silent: bool) {
        self.shared.board.change(|calls| calls.silent_on_join = silent);
    }

    /// Whether agents answer the bridge's `ping`, as the real one does. At
    /// first they do not: an agent of which a test says nothing is silent.
    pub fn answer_pings(&self, answer: bool) {
        self.shared.pongs.store(answer, Ordering::Release);
    }

    /// From now on this is the answer about the account.
    pub fn set_account(&self, reply: Reply) {
        self.set_answer("/api/accounts/me", reply);
    }

    /// Waits until somebody has asked about the account so often.
    #[track_caller]
    pub fn wait_account_asked(&self, count: usize) -> Result<(), Trouble> {
        let asked =
            self.shared.board.wait(PATIENCE, |calls| (calls.account_asked >= count).then_some(()));
        asked.ok_or_else(|| self.log.trouble("nobody has asked about the account"))
    }

    /// From now on this is the answer to a GET of that path, such as
    /// `/api/accounts/me`. Of lists, whatever the query.
    pub fn set_answer(&self, path: &str, reply: Reply) {
        self.shared.board.change(|calls| calls.told.insert(path.to_owned(), reply));
    }

    /// Joins that were refused: unknown, or for the second time.
    pub fn refused_joins(&self) -> usize {
        self.shared.board.look(|calls| calls.refused_joins)
    }

    /// What Ultravox would have complained about. Tests want this empty.
    pub fn violations(&self) -> Vec<String> {
        self.shared.board.look(|calls| calls.violations.clone())
    }
}

impl UltravoxState {
    fn answer(&self, request: HttpRequest) -> Reply {
        if request.method == "GET" {
            return self.look_up(&request);
        }
        if request.method != "POST" || request.path() != "/api/calls" {
            return Reply::json(404, &json!({"detail": "Not found."}));
        }
        let (refusal, slow) = self.board.change(|calls| {
            calls.requests += 1;
            let refusal = calls.refusals.pop_front().or_else(|| calls.refuse_always.clone());
            (refusal, calls.slow)
        });
        if let Some(refusal) = refusal {
            return refusal;
        }
        if request.header("x-api-key") != Some(API_KEY) {
            return Reply::json(403, &json!({"detail": "Invalid API key"}));
        }
        let body = serde_json::from_slice(&request.body).unwrap_or(Value::Null);
        if let Some(objection) = objection(&body) {
            self.board.change(|calls| calls.violations.push(objection.clone()));
            return Reply::json(400, &json!({"detail": objection}));
        }
        let call = AgentCall::new(self, request, body);
        let reply = json!({
            "callId": call.line.call_id,
            "created": "2026-11-22T10:00:00.000000Z",
            "joined": null,
            "ended": null,
            "endReason": null,
            "joinUrl": call.line.join_url,
            "metadata": call.line.body["metadata"],
            "aFieldOfTheFuture": [1, 2, 3],
        });
        self.board.change(|calls| calls.created.push(call));
        Reply::json(201, &reply).after(slow)
    }

    /// What may be asked for without a call. Lists come in pages of two.
    fn look_up(&self, request: &HttpRequest) -> Reply {
        let told = self.board.change(|calls| {
            calls.account_asked += usize::from(request.path() == "/api/accounts/me");
            calls.told.get(request.path()).cloned()
        });
        if request.header("x-api-key") != Some(API_KEY) {
            return Reply::json(403, &json!({"detail": "Invalid API key"}));
        }
        if let Some(reply) = told {
            return reply;
        }
        let voices = VOICES.map(|(name, id)| json!({"voiceId": id, "name": name}));
        let unknown = || Reply::json(404, &json!({"detail": "Not found."}));
        match request.path() {
            "/api/accounts/me" => Reply::json(200, &account()),
            "/api/models" => {
                page(request, &MODELS.map(|name| json!({"name": name, "aFieldOfTheFuture": 1})))
            }
            "/api/voices" => {
                let wanted = request.parameter("search").unwrap_or_default().to_lowercase();
                let named = |voice: &Value| {
                    voice["name"].as_str().is_some_and(|name| name.to_lowercase().contains(&wanted))
                };
                page(request, &voices.into_iter().filter(named).collect::<Vec<Value>>())
            }
            path => match path.rsplit_once('/') {
                Some(("/api/corpora", CORPUS_ID)) => Reply::json(
                    200,
                    &json!({"corpusId": CORPUS_ID, "name": "Handbook", "stats": {"numDocs": 3}}),
                ),
                Some(("/api/voices", id)) => {
                    let found = voices.iter().find(|voice| voice["voiceId"] == id);
                    found.map_or_else(unknown, |voice| Reply::json(200, voice))
                }
                _ => unknown(),
            },
        }
    }

    /// One connection to the agent's socket, from accept to end.
    fn join(&self, tcp: TcpStream, tls: Option<&Arc<rustls::ServerConfig>>) -> io::Result<()> {
        let plug = match tls {
            None => Plug::bare(tcp)?,
            Some(tls) => {
                let connection =
                    rustls::ServerConnection::new(Arc::clone(tls)).map_err(io::Error::other)?;
                Plug::behind_tls(tcp, connection.into())?
            }
        };
        let ear = Ear { tcp: plug.socket.try_clone()?, mute: false };
        let mut claimed = None;
        #[expect(clippy::result_large_err, reason = "the type of tungstenite's callback")]
        let check = |request: &Request, response: Response| {
            claimed = self.claim(request.uri());
            if claimed.is_some() { Ok(response) } else { Err(not_found()) }
        };
        let socket = tungstenite::accept_hdr_with_config(ear, check, Some(small_buffers()))
            .map_err(|error| io::Error::other(error.to_string()))?;
        let Some(call) = claimed else { return Ok(()) };
        let (mut reader, writer) = split_socket(socket, Role::Server)?;
        call.line.begin(writer, &plug)?;
        if !self.board.look(|calls| calls.silent_on_join) {
            call.greet();
        }
        let ending = call.line.listen(&mut reader);
        *lock(&call.line.mouth) = None;
        call.line.state.change(|ear| {
            ear.ended_at = Some(Instant::now());
            ear.ended = Some(ending);
        });
        Ok(())
    }

    /// Finds the call that this joinUrl was made for, and lets it be joined
    /// once. The bridge may add parameters; ours must still be there.
    fn claim(&self, uri: &Uri) -> Option<AgentCall> {
        let query = uri.query().unwrap_or_default();
        self.board.change(|calls| {
            let call = calls.created.iter().find(|call| {
                let Some((_, ours)) = call.line.join_url.split_once("/join/") else {
                    return false;
                };
                let (id, token) = ours.split_once('?').unwrap_or((ours, ""));
                uri.path() == format!("/join/{id}") && query.split('&').any(|one| one == token)
            });
            let fresh = call.filter(|call| {
                call.line.state.change(|ear| {
                    let fresh = ear.joined_at.is_none();
                    ear.joined_at.get_or_insert_with(Instant::now);
                    fresh
                })
            });
            let fresh = fresh.cloned();
            calls.refused_joins += usize::from(fresh.is_none());
            fresh
        })
    }
}

/// The account behind the one key: a plan that allows a hundred calls at once.
pub fn account() -> Value {
    json!({
        "accountId": "6f0f2a7e-3b1c-4d5e-8f90-a1b2c3d4e5f6",
        "name": "Anna's insurance",
        "activeCalls": 0,
        "allowedConcurrentCalls": 100,
        "hasActiveSubscription": true,
        "subscriptionTier": "PRO",
        "freeTimeUsed": "1800s",
        "freeTimeRemaining": "0s",
    })
}

/// Two entries of a list, and where the next two are.
fn page(request: &HttpRequest, all: &[Value]) -> Reply {
    let from = request.parameter("cursor").and_then(|at| at.parse().ok()).unwrap_or(0);
    let results: Vec<&Value> = all.iter().skip(from).take(2).collect();
    let search = request.parameter("search").unwrap_or_default();
    let next = (from + 2 < all.len()).then(|| {
        // Somewhere else on purpose: the key must not be carried there.
        format!("http://elsewhere.invalid{}?search={search}&cursor={}", request.path(), from + 2)
    });
    Reply::json(200, &json!({"results": results, "next": next, "total": all.len()}))
}

fn not_found() -> ErrorResponse {
    let mut response = ErrorResponse::new(Some("no such call".to_owned()));
    *response.status_mut() = http::StatusCode::NOT_FOUND;
    response
}

impl AgentCall {
    fn new(ultravox: &UltravoxState, request: HttpRequest, body: Value) -> AgentCall {
        let call_id = random_uuid();
        let prefix = lock(&ultravox.join_prefix).clone();
        let line = AgentLine {
            // With a query already, as real ones may have.
            join_url: format!("{prefix}/join/{call_id}?token={}", random_hex(16)),
            call_id,
            request,
            body,
            state: Board::default(),
            mouth: Mutex::new(None),
            pongs: Arc::clone(&ultravox.pongs),
            log: ultravox.log.clone(),
        };
        AgentCall { line: Arc::new(line) }
    }

    /// Ultravox's id of the call.
    pub fn id(&self) -> &str {
        &self.line.call_id
    }

    /// The body of the request that created it.
    pub fn request(&self) -> &Value {
        &self.line.body
    }

    /// The query string of that request, such as `priorCallId=…`.
    pub fn query(&self) -> &str {
        self.line.request.target.split_once('?').map_or("", |(_, query)| query)
    }

    /// A header of that request.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.line.request.header(name)
    }

    /// When the connection was accepted on which it was asked for.
    pub fn connected_at(&self) -> Instant {
        self.line.request.connected_at
    }

    /// When that request came.
    pub fn created_at(&self) -> Instant {
        self.line.request.at
    }

    /// When the bridge joined; now, if it has not.
    pub fn joined_at(&self) -> Instant {
        self.line.state.look(|ear| ear.joined_at).unwrap_or_else(Instant::now)
    }

    /// Where it is joined: nobody but the bridge is to know.
    pub fn join_url(&self) -> &str {
        &self.line.join_url
    }

    /// Waits until the bridge has opened the joinUrl.
    #[track_caller]
    pub fn wait_joined(&self) -> Result<(), Trouble> {
        self.wait("a join", |_| true, |line| lock(&line.mouth).is_some().then_some(()))
    }

    /// Sends one data message, after the join.
    #[track_caller]
    pub fn send(&self, message: &Value) -> Result<(), Trouble> {
        self.send_message(Message::text(message.to_string()))
    }

    /// Sends any text message.
    #[track_caller]
    pub fn send_text(&self, text: &str) -> Result<(), Trouble> {
        self.send_message(Message::text(text))
    }

    /// Sends audio as one message, of any length, be it odd.
    #[track_caller]
    pub fn send_audio(&self, pcm: &[u8]) -> Result<(), Trouble> {
        self.send_message(Message::binary(pcm.to_vec()))
    }

    /// A whole turn of the agent: `state` speaking, transcript deltas, audio
    /// (s16le, 8 kHz) in messages of odd sizes, the final transcript.
    #[track_caller]
    pub fn say(&self, text: &str, pcm: &[u8]) -> Result<(), Trouble> {
        let ordinal = self.begin_saying(text, pcm)?;
        self.finish_saying(ordinal, text)
    }

    /// The first half of a turn: all audio is sent, the text not yet final.
    #[track_caller]
    pub fn begin_saying(&self, text: &str, pcm: &[u8]) -> Result<u64, Trouble> {
        self.send(&json!({"type": "state", "state": "speaking"}))?;
        let ordinal = self.next_ordinal();
        for word in text.split_inclusive(' ') {
            self.send(&transcript("agent", ordinal, &json!(null), &json!(word), false))?;
        }
        // Lengths as uneven as those of real speech synthesis.
        let mut rest = pcm;
        for length in [640, 3_202, 2, 9_600, 318].into_iter().cycle() {
            let (piece, tail) = rest.split_at(rest.len().min(length));
            if piece.is_empty() {
                break;
            }
            self.send_audio(piece)?;
            rest = tail;
        }
        Ok(ordinal)
    }

    /// The second half: the final text, which an interruption makes shorter.
    #[track_caller]
    pub fn finish_saying(&self, ordinal: u64, text: &str) -> Result<(), Trouble> {
        self.send(&transcript("agent", ordinal, &json!(text), &json!(null), true))?;
        self.send(&json!({"type": "state", "state": "listening"}))
    }

    /// What the agent has understood: one final transcript of the user.
    #[track_caller]
    pub fn user_said(&self, text: &str) -> Result<(), Trouble> {
        let ordinal = self.next_ordinal();
        self.send(&transcript("user", ordinal, &json!(text), &json!(null), true))
    }

    /// Invokes a tool and gives the invocation's id.
    #[track_caller]
    pub fn invoke(&self, tool: &str, parameters: &Value) -> Result<String, Trouble> {
        let id = random_uuid();
        self.invoke_as(&id, tool, parameters)?;
        Ok(id)
    }

    /// As [`AgentCall::invoke`], with an id of the test's choice.
    #[track_caller]
    pub fn invoke_as(&self, id: &str, tool: &str, parameters: &Value) -> Result<(), Trouble> {
        self.send(&json!({"type": "client_tool_invocation", "toolName": tool,
            "invocationId": id, "parameters": parameters}))
    }

    /// Waits for the `client_tool_result` of an invocation.
    #[track_caller]
    pub fn wait_result(&self, invocation: &str) -> Result<Value, Trouble> {
        let what = format!("the result of {invocation}");
        self.wait_text(&what, |text| is_result_of(text, invocation))
    }

    /// All results of an invocation. There must never be two.
    pub fn results(&self, invocation: &str) -> Vec<Value> {
        let mut texts = self.texts();
        texts.retain(|text| is_result_of(text, invocation));
        texts
    }

    /// Waits for a data message that `wanted` accepts, old or new.
    #[track_caller]
    pub fn wait_text(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value, Trouble> {
        self.wait(
            what,
            |_| true,
            |line| {
                line.state.look(|ear| {
                    let found = ear.texts.iter().find(|(_, text)| wanted(text));
                    found.map(|(_, text)| text.clone())
                })
            },
        )
    }

    /// All data messages of the bridge so far.
    pub fn texts(&self) -> Vec<Value> {
        self.line.state.look(|ear| ear.texts.iter().map(|(_, text)| text.clone()).collect())
    }

    /// All audio so far, in the bridge's own messages, with their times.
    pub fn audio(&self) -> Vec<(Instant, Vec<u8>)> {
        self.line.state.look(|ear| ear.audio.clone())
    }

    /// All audio so far, silence included.
    pub fn heard_audio(&self) -> Vec<u8> {
        self.line.state.look(|ear| {
            let pieces = ear.audio.iter().map(|(_, pcm)| pcm.as_slice());
            pieces.collect::<Vec<_>>().concat()
        })
    }

    /// The audio without the messages that are all zero: those are the
    /// bridge's own silence, if the caller's voice has no silent frame.
    pub fn heard_caller(&self) -> Vec<u8> {
        self.line.state.look(|ear| {
            let pieces = ear.audio.iter().map(|(_, pcm)| pcm.as_slice());
            pieces.filter(|pcm| !is_silent(pcm)).collect::<Vec<_>>().concat()
        })
    }

    /// When each message with the caller's voice arrived.
    pub fn audio_at(&self) -> Vec<Instant> {
        self.line.state.look(|ear| {
            let voiced = ear.audio.iter().filter(|(_, pcm)| !is_silent(pcm));
            voiced.map(|(at, _)| *at).collect()
        })
    }

    /// Waits until so many bytes of the caller's voice have arrived.
    #[track_caller]
    pub fn wait_caller_audio(&self, bytes: usize) -> Result<(), Trouble> {
        let what = format!("{bytes} bytes of the caller's voice");
        self.wait(
            &what,
            |_| true,
            |line| line.state.look(|ear| (ear.caller_bytes >= bytes).then_some(())),
        )
    }

    /// Waits until the caller's voice since the beginning is exactly this
    /// (s16le), nothing lost, nothing doubled, nothing mixed in.
    #[track_caller]
    pub fn expect_audio(&self, pcm: &[u8]) -> Result<(), Trouble> {
        self.wait_caller_audio(pcm.len())?;
        match difference(pcm, &self.heard_caller()) {
            None => Ok(()),
            Some(what) => {
                Err(self.line.log.trouble(format!("the agent heard something else: {what}")))
            }
        }
    }

    /// Waits until what the bridge has sent makes `ready` true: its messages
    /// of sound in order, silence included.
    #[track_caller]
    pub fn wait_sound(
        &self,
        what: &str,
        mut ready: impl FnMut(&[(Instant, Vec<u8>)]) -> bool,
    ) -> Result<(), Trouble> {
        self.wait(what, |_| true, |line| line.state.look(|ear| ready(&ear.audio).then_some(())))
    }

    /// Ultravox ends the call: an ordinary close frame.
    #[track_caller]
    pub fn close(&self) -> Result<(), Trouble> {
        self.send_message(normal_close())
    }

    /// The line breaks: TCP ends, without a close frame and (with TLS)
    /// without `close_notify`. What was sent before still arrives.
    pub fn drop_line(&self) {
        if let Some(mouth) = lock(&self.line.mouth).as_ref() {
            mouth.rude.store(true, Ordering::Release);
            moot(mouth.tcp.shutdown(Shutdown::Both));
        }
    }

    /// Sends bytes that are no WebSocket and, with TLS, no TLS either.
    pub fn send_junk(&self, bytes: &[u8]) {
        if let Some(mouth) = lock(&self.line.mouth).as_mut() {
            moot(mouth.wire.write_all(bytes));
        }
    }

    /// When the line ended.
    pub fn ended_at(&self) -> Option<Instant> {
        self.line.state.look(|ear| ear.ended_at)
    }

    /// Whether the line has ended.
    pub fn is_over(&self) -> bool {
        self.line.state.look(|ear| ear.ended.is_some())
    }

    /// Waits until the line has ended, and says how the bridge ended it (or
    /// how it answered our own close).
    #[track_caller]
    pub fn wait_closed(&self) -> Result<Ending, Trouble> {
        self.wait("the end of the line", |_| false, |line| line.state.look(|ear| ear.ended.clone()))
    }

    fn greet(&self) {
        // If these do not arrive the line is gone, and its end is recorded.
        moot(self.send(&json!({"type": "call_started", "callId": self.line.call_id})));
        moot(self.send(&json!({"type": "state", "state": "idle"})));
        moot(self.send(&json!({"type": "state", "state": "listening"})));
    }

    fn next_ordinal(&self) -> u64 {
        self.line.state.change(|ear| {
            ear.next_ordinal += 1;
            ear.next_ordinal
        })
    }

    #[track_caller]
    fn send_message(&self, message: Message) -> Result<(), Trouble> {
        self.wait_joined()?;
        let sent = match lock(&self.line.mouth).as_mut() {
            Some(mouth) => mouth.socket.send(message).map_err(|error| error.to_string()),
            None => Err("the line has ended".to_owned()),
        };
        match sent {
            Ok(()) => Ok(()),
            Err(error) => Err(self.line.log.trouble(format!("the agent cannot send: {error}"))),
        }
    }

    /// Waits on the line's state. `spoiled` says whether the line's end makes
    /// further waiting useless.
    #[track_caller]
    fn wait<R>(
        &self,
        what: &str,
        spoiled: impl Fn(&Ending) -> bool,
        mut ready: impl FnMut(&AgentLine) -> Option<R>,
    ) -> Result<R, Trouble> {
        let deadline = Instant::now() + PATIENCE;
        let mut ended = None;
        loop {
            // Asked outside the lock of the state, since `ready` takes it.
            let version = self.line.state.version();
            if let Some(found) = ready(&self.line) {
                return Ok(found);
            }
            if let Some(ending) = ended {
                return Err(self
                    .line
                    .log
                    .trouble(format!("the agent waited for {what}, but: {ending:?}")));
            }
            ended = self.line.state.look(|ear| ear.ended.clone()).filter(&spoiled);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self
                    .line
                    .log
                    .trouble(format!("the agent waited {PATIENCE:?} for {what}")));
            }
            if ended.is_none() {
                self.line.state.wait_change(version, left);
            }
        }
    }
}

impl AgentLine {
    fn begin(&self, writer: WebSocket<TcpStream>, plug: &Plug) -> io::Result<()> {
        let (tcp, wire) = (plug.socket.try_clone()?, plug.wire.try_clone()?);
        let mouth = AgentMouth { socket: writer, tcp, wire, rude: Arc::clone(&plug.rude) };
        *lock(&self.mouth) = Some(mouth);
        // Wakes those who wait for the join.
        self.state.change(|ear| ear.joined_at = Some(Instant::now()));
        Ok(())
    }

    fn listen(&self, reader: &mut WebSocket<Ear>) -> Ending {
        listen(reader, |message| {
            let at = Instant::now();
            match message {
                Incoming::Reply(reply) => {
                    if let Some(mouth) = lock(&self.mouth).as_mut() {
                        moot(mouth.socket.send(reply));
                    }
                }
                Incoming::Text(text) => {
                    let text = serde_json::from_str(&text).unwrap_or(Value::String(text));
                    if text["type"] == "ping" && self.pongs.load(Ordering::Acquire) {
                        self.pong(&text);
                    }
                    self.state.change(|ear| ear.texts.push((at, text)));
                }
                Incoming::Binary(pcm) => self.state.change(|ear| {
                    ear.caller_bytes += if is_silent(&pcm) { 0 } else { pcm.len() };
                    ear.audio.push((at, pcm));
                }),
            }
        })
    }

    fn pong(&self, ping: &Value) {
        let answer = json!({"type": "pong", "timestamp": ping["timestamp"]});
        if let Some(mouth) = lock(&self.mouth).as_mut() {
            moot(mouth.socket.send(Message::text(answer.to_string())));
        }
    }
}

fn transcript(role: &str, ordinal: u64, text: &Value, delta: &Value, last: bool) -> Value {
    json!({"type": "transcript", "role": role, "medium": "voice", "text": text, "delta": delta,
        "final": last, "ordinal": ordinal})
}

fn is_result_of(text: &Value, invocation: &str) -> bool {
    text["type"] == "client_tool_result" && text["invocationId"] == invocation
}

fn is_silent(pcm: &[u8]) -> bool {
    pcm.iter().all(|byte| *byte == 0)
}

/// The names by which the model knows the tools of a `selectedTools` list.
pub fn tool_names(selected: &Value) -> Vec<String> {
    let tools = selected.as_array().map(Vec::as_slice).unwrap_or_default();
    let names = tools.iter().map(|tool| {
        let name = ["nameOverride", "toolName"].iter().find_map(|key| tool[*key].as_str());
        name.or_else(|| tool["temporaryTool"]["modelToolName"].as_str()).unwrap_or("?").to_owned()
    });
    names.collect()
}

/// What Ultravox would refuse about a request for a call, as far as its
/// published schema tells. Unknown fields are refused here even so: they are
/// misspelt ones.
fn objection(body: &Value) -> Option<String> {
    const KNOWN: [&str; 27] = [
        "systemPrompt",
        "model",
        "voice",
        "externalVoice",
        "voiceOverrides",
        "temperature",
        "languageHint",
        "initialMessages",
        "medium",
        "joinTimeout",
        "maxDuration",
        "timeExceededMessage",
        "inactivityMessages",
        "selectedTools",
        "recordingEnabled",
        "firstSpeakerSettings",
        "initialOutputMedium",
        "vadSettings",
        "metadata",
        "initialState",
        "experimentalSettings",
        "dataConnection",
        "callbacks",
        "retentionPolicy",
        "sharedSecrets",
        "transcriptOptional",
        "firstSpeaker",
    ];
    let Some(object) = body.as_object() else {
        return Some("the body is not a JSON object".to_owned());
    };
    if let Some(unknown) = object.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        return Some(format!("unknown field {unknown}"));
    }
    let vad = body["vadSettings"].as_object().into_iter().flatten();
    let vad = vad.filter(|(name, _)| *name != "frameActivationThreshold").map(|(_, value)| value);
    let messages = body["inactivityMessages"].as_array().into_iter().flatten();
    let mut durations: Vec<&Value> =
        messages.map(|message| &message["duration"]).chain(vad).collect();
    durations.extend(["joinTimeout", "maxDuration"].into_iter().filter_map(|name| body.get(name)));
    if let Some(wrong) = durations.into_iter().find(|value| !is_duration(value)) {
        return Some(format!("{wrong} is not a duration such as \"30s\""));
    }
    let metadata = body["metadata"].as_object().into_iter().flatten();
    if let Some((name, _)) = metadata.into_iter().find(|(_, value)| !value.is_string()) {
        return Some(format!("metadata {name} is not a string"));
    }
    if body["medium"]["serverWebSocket"]["inputSampleRate"].as_u64().is_none() {
        return Some("medium.serverWebSocket.inputSampleRate is missing".to_owned());
    }
    tools_objection(&body["selectedTools"])
}

/// What Ultravox would refuse about a `selectedTools` list.
pub fn tools_objection(selected: &Value) -> Option<String> {
    let names = tool_names(selected);
    for (index, name) in names.iter().enumerate() {
        let legal = |letter: char| letter.is_ascii_alphanumeric() || letter == '_' || letter == '-';
        if name.is_empty() || name.len() > 64 || !name.chars().all(legal) {
            return Some(format!("{name:?} cannot be the name of a tool"));
        }
        if names.iter().take(index).any(|other| other == name) {
            return Some(format!("two tools are called {name}"));
        }
    }
    for tool in selected.as_array().into_iter().flatten() {
        let ways = ["toolId", "toolName", "temporaryTool"];
        if ways.iter().filter(|way| tool.get(**way).is_some()).count() != 1 {
            return Some(format!("not exactly one of {ways:?}: {tool}"));
        }
        let Some(temporary) = tool.get("temporaryTool") else {
            continue;
        };
        let timeout = temporary.get("timeout");
        if timeout.is_some_and(|timeout| !is_duration(timeout) || seconds(timeout) > 40.0) {
            return Some(format!("{timeout:?} is not a timeout up to 40 s"));
        }
        for parameter in temporary["dynamicParameters"].as_array().into_iter().flatten() {
            if parameter["location"] != "PARAMETER_LOCATION_BODY"
                || !parameter["schema"].is_object()
            {
                return Some(format!("wrong location or schema: {parameter}"));
            }
        }
    }
    None
}

fn is_duration(value: &Value) -> bool {
    let number = value.as_str().and_then(|text| text.strip_suffix('s'));
    number.is_some_and(|number| {
        number.chars().all(|letter| letter.is_ascii_digit() || letter == '.')
            && number.parse::<f64>().is_ok()
    })
}

fn seconds(duration: &Value) -> f64 {
    let number = duration.as_str().and_then(|text| text.strip_suffix('s'));
    number.and_then(|number| number.parse().ok()).unwrap_or(f64::INFINITY)
}

// ============================================================================
// Pretend n8n
// ============================================================================

/// The business logic: answers each route with a standing reply.
pub struct N8n {
    address: SocketAddr,
    shared: Arc<Board<Workflow>>,
    log: ChildLog,
}

#[derive(Default)]
struct Workflow {
    requests: Vec<N8nRequest>,
    /// Preflight requests.
    greeted: usize,
    standing: HashMap<String, Reply>,
    next: HashMap<String, VecDeque<Reply>>,
}

/// What the bridge has posted to n8n.
#[derive(Clone, Debug)]
pub struct N8nRequest {
    pub at: Instant,
    /// When the connection on which it came was accepted.
    pub connected_at: Instant,
    /// The field `route` of the body; empty if there is none.
    pub route: String,
    pub json: Value,
    pub raw: Vec<u8>,
    pub headers: Vec<(String, String)>,
}

impl N8nRequest {
    /// A header, whatever the case of its name.
    pub fn header(&self, name: &str) -> Option<&str> {
        find_header(&self.headers, name)
    }
}

impl N8n {
    fn open(backstage: &Arc<Backstage>, log: &ChildLog) -> io::Result<N8n> {
        let workflow = Workflow {
            standing: HashMap::from([
                ("1".to_owned(), Reply::json(200, &json!({"firstMessage": FIRST_MESSAGE}))),
                ("2".to_owned(), Reply::json(200, &json!({}))),
                ("3".to_owned(), Reply::json(200, &json!({"message": BOOKED}))),
            ]),
            ..Workflow::default()
        };
        let shared = Arc::new(Board::new(workflow));
        let board = Arc::clone(&shared);
        let address = serve_http(backstage, "n8n", move |request| {
            let json: Value = serde_json::from_slice(&request.body).unwrap_or(Value::Null);
            let route = json["route"].as_str().unwrap_or_default().to_owned();
            if request.method == "OPTIONS" {
                board.change(|workflow| workflow.greeted += 1);
                let allowed = "OPTIONS, POST";
                return Reply::text(204, None, "").header("Access-Control-Allow-Methods", allowed);
            }
            let is_webhook = request.method == "POST" && request.path() == "/webhook/call";
            board.change(|workflow| {
                let (at, connected_at) = (request.at, request.connected_at);
                let (raw, headers) = (request.body, request.headers);
                workflow.requests.push(N8nRequest {
                    at,
                    connected_at,
                    route: route.clone(),
                    json,
                    raw,
                    headers,
                });
                if !is_webhook {
                    return Reply::text(404, Some("text/html"), "<pre>Cannot POST</pre>");
                }
                let next = workflow.next.get_mut(&route).and_then(VecDeque::pop_front);
                let reply = next.or_else(|| workflow.standing.get(&route).cloned());
                reply.unwrap_or_else(|| Reply::json(200, &json!({"message": "Done."})))
            })
        })?;
        Ok(N8n { address, shared, log: log.clone() })
    }

    /// The address of the one webhook.
    pub fn url(&self) -> String {
        format!("http://{}/webhook/call", self.address)
    }

    /// From now on this is the answer to that route.
    pub fn set_reply(&self, route: &str, reply: Reply) {
        self.shared.change(|workflow| workflow.standing.insert(route.to_owned(), reply));
    }

    /// This is the answer to one more request of that route. Several queue up.
    pub fn reply_next(&self, route: &str, reply: Reply) {
        self.shared
            .change(|workflow| workflow.next.entry(route.to_owned()).or_default().push_back(reply));
    }

    /// Waits until a preflight request was answered so often.
    #[track_caller]
    pub fn wait_greeted(&self, count: usize) -> Result<(), Trouble> {
        let greeted =
            self.shared.wait(PATIENCE, |workflow| (workflow.greeted >= count).then_some(()));
        greeted.ok_or_else(|| self.log.trouble("nobody has greeted n8n"))
    }

    /// Everything posted so far, in order.
    pub fn requests(&self) -> Vec<N8nRequest> {
        self.shared.look(|workflow| workflow.requests.clone())
    }

    /// Everything posted to one route so far.
    pub fn requests_of(&self, route: &str) -> Vec<N8nRequest> {
        let mut requests = self.requests();
        requests.retain(|request| request.route == route);
        requests
    }

    /// Waits until that route has been posted to so often, and gives those
    /// requests.
    #[track_caller]
    pub fn wait_for(
        &self,
        route: &str,
        count: usize,
        within: Duration,
    ) -> Result<Vec<N8nRequest>, Trouble> {
        let enough = self.shared.wait(within, |workflow| {
            let posts = workflow.requests.iter().filter(|request| request.route == route);
            (posts.count() >= count).then_some(())
        });
        let found = self.requests_of(route);
        if enough.is_some() {
            return Ok(found);
        }
        let found = found.len();
        Err(self.log.trouble(format!(
            "n8n got {found} of {count} posts to route {route} within {within:?}"
        )))
    }
}

// ============================================================================
// Pretend Twilio: the REST API, for outgoing calls and the number's set-up
// ============================================================================

/// Twilio's REST API: takes orders to ring somebody, and hands them to the
/// test.
pub struct Twilio {
    address: SocketAddr,
    shared: Arc<Board<Orders>>,
    log: ChildLog,
}

#[derive(Default)]
struct Orders {
    taken: Vec<Order>,
    next: VecDeque<Reply>,
    auth_token: String,
    account: Value,
    numbers: Vec<Value>,
    /// Answers every GET in the place of the standing ones.
    told: Option<Reply>,
    /// How often a number's set-up was written.
    changes: usize,
}

impl Orders {
    fn begin() -> Orders {
        Orders {
            account: json!({"sid": ACCOUNT_SID, "status": "active", "type": "Full"}),
            numbers: vec![
                // The filter finds this one as well: it contains the other.
                json!({"sid": format!("PN{}", "1".repeat(32)), "phone_number": "+4420794600001"}),
                json!({
                    "sid": format!("PN{}", "2".repeat(32)),
                    "phone_number": OUR_NUMBER,
                    "voice_url": "https://demo.twilio.com/welcome/voice/",
                    "voice_method": "POST",
                    "status_callback": "",
                    "status_callback_method": "POST",
                    "voice_application_sid": "",
                    "trunk_sid": null,
                    "capabilities": {"voice": true, "sms": true},
                }),
            ],
            ..Orders::default()
        }
    }

    /// GET of the account and its numbers; POST to one of the numbers.
    fn set_up(&mut self, request: &HttpRequest) -> Reply {
        if let Some(reply) = self.told.clone() {
            return reply;
        }
        let login = request.header("authorization").and_then(basic_login);
        if login != Some((ACCOUNT_SID.to_owned(), self.auth_token.clone())) {
            let what = json!({"status": 401, "code": 20003, "message": "Authenticate"});
            return Reply::json(401, &what);
        }
        let base = format!("/2010-04-01/Accounts/{ACCOUNT_SID}");
        let path = request.path().strip_prefix(&base).unwrap_or_default();
        if path == ".json" {
            let mut account = self.account.clone();
            // As the real one does, in clear.
            if account["auth_token"].is_null() {
                account["auth_token"] = json!(self.auth_token);
            }
            return Reply::json(200, &account);
        }
        if path == "/IncomingPhoneNumbers.json" {
            return self.list(request);
        }
        let sid = path.strip_prefix("/IncomingPhoneNumbers/");
        let sid = sid.and_then(|sid| sid.strip_suffix(".json")).unwrap_or_default();
        let Some(number) = self.numbers.iter_mut().find(|number| number["sid"] == sid) else {
            return Reply::json(404, &json!({"status": 404, "code": 20404}));
        };
        if request.method == "POST" {
            self.changes += 1;
            for (name, value) in form_urlencoded::parse(&request.body) {
                // `VoiceUrl` is read as `voice_url`.
                let mut field = String::new();
                for letter in name.chars() {
                    if letter.is_ascii_uppercase() && !field.is_empty() {
                        field.push('_');
                    }
                    field.push(letter.to_ascii_lowercase());
                }
                number[field] = json!(value);
            }
        }
        Reply::json(200, number)
    }

    /// A number a page: whoever looks for one must turn pages.
    fn list(&self, request: &HttpRequest) -> Reply {
        let wanted = request.parameter("PhoneNumber").unwrap_or_default();
        let fits = |number: &&Value| {
            number["phone_number"].as_str().is_some_and(|text| text.contains(&wanted))
        };
        let at = request.parameter("Page").and_then(|page| page.parse().ok()).unwrap_or(0);
        let found: Vec<&Value> = self.numbers.iter().filter(fits).collect();
        let next = (at + 1 < found.len()).then(|| {
            let wanted = wanted.replace('+', "%2B");
            format!("{}?PhoneNumber={wanted}&Page={}", request.path(), at + 1)
        });
        let page: Vec<&Value> = found.into_iter().skip(at).take(1).collect();
        Reply::json(200, &json!({"incoming_phone_numbers": page, "next_page_uri": next}))
    }
}

/// One request to make a call, refused ones included.
#[derive(Clone, Debug)]
pub struct Order {
    pub at: Instant,
    /// The call that it became, or would have become.
    pub sid: String,
    pub path: String,
    /// User and password of Basic authentication.
    pub login: Option<(String, String)>,
    /// The form's fields in order; some names come more than once.
    pub form: Vec<(String, String)>,
}

impl Order {
    /// The first field of that name.
    pub fn field(&self, name: &str) -> Option<&str> {
        let found = self.form.iter().find(|(present, _)| present == name);
        found.map(|(_, value)| value.as_str())
    }

    /// All fields of that name.
    pub fn fields(&self, name: &str) -> Vec<&str> {
        let found = self.form.iter().filter(|(present, _)| present == name);
        found.map(|(_, value)| value.as_str()).collect()
    }
}

impl Twilio {
    fn open(backstage: &Arc<Backstage>, log: &ChildLog) -> io::Result<Twilio> {
        let shared = Arc::new(Board::new(Orders::begin()));
        let board = Arc::clone(&shared);
        let address = serve_http(backstage, "twilio", move |request| {
            if request.method != "POST" || request.path().contains("/IncomingPhoneNumbers") {
                return board.change(|orders| orders.set_up(&request));
            }
            let order = Order {
                at: request.at,
                sid: format!("CA{}", random_hex(16)),
                path: request.path().to_owned(),
                login: request.header("authorization").and_then(basic_login),
                form: form_urlencoded::parse(&request.body).into_owned().collect(),
            };
            let made = json!({"sid": order.sid, "status": "queued", "aFieldOfTheFuture": null});
            board.change(|orders| {
                orders.taken.push(order);
                orders.next.pop_front().unwrap_or_else(|| Reply::json(201, &made))
            })
        })?;
        Ok(Twilio { address, shared, log: log.clone() })
    }

    /// This is the answer to one more order. Several queue up.
    pub fn reply_next(&self, reply: Reply) {
        self.shared.change(|orders| orders.next.push_back(reply));
    }

    /// The account's primary Auth Token.
    fn set_auth_token(&self, token: &str) {
        self.shared.change(|orders| token.clone_into(&mut orders.auth_token));
    }

    /// Changes a field of the account's description.
    pub fn set_account(&self, field: &str, value: Value) {
        self.shared.change(|orders| orders.account[field] = value);
    }

    /// Changes a field of [`OUR_NUMBER`], such as `voice_url`.
    pub fn set_number(&self, field: &str, value: Value) {
        self.shared.change(|orders| {
            let ours = orders.numbers.iter_mut().find(|one| one["phone_number"] == OUR_NUMBER);
            if let Some(ours) = ours {
                ours[field] = value;
            }
        });
    }

    /// A field of [`OUR_NUMBER`] as it is now.
    pub fn number(&self, field: &str) -> Value {
        self.shared.look(|orders| {
            let ours = orders.numbers.iter().find(|one| one["phone_number"] == OUR_NUMBER);
            ours.map(|ours| ours[field].clone()).unwrap_or_default()
        })
    }

    /// From now on this is the answer to everything but orders; with nothing,
    /// all is as before.
    pub fn set_answer(&self, reply: Option<Reply>) {
        self.shared.change(|orders| orders.told = reply);
    }

    /// How often a number's set-up was written.
    pub fn changes(&self) -> usize {
        self.shared.look(|orders| orders.changes)
    }

    /// All orders so far.
    pub fn orders(&self) -> Vec<Order> {
        self.shared.look(|orders| orders.taken.clone())
    }

    /// Waits until so many orders have come, and gives them.
    #[track_caller]
    pub fn wait_orders(&self, count: usize) -> Result<Vec<Order>, Trouble> {
        let come = |orders: &mut Orders| (orders.taken.len() >= count).then_some(());
        match self.shared.wait(PATIENCE, come) {
            Some(()) => Ok(self.orders()),
            None => Err(self.log.trouble(format!("Twilio was not asked {count} times"))),
        }
    }
}

// ============================================================================
// What stands in front of the bridge: a proxy or tunnel, and ngrok's own API
// ============================================================================

/// The certificate that a [`Front`] shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Certificate {
    Good,
    Expired,
    WrongName,
    /// Signed by nobody whom the bridge is told to trust.
    Strange,
}

/// What a [`Front`] does with a request.
#[derive(Clone, Debug)]
pub enum Manner {
    /// Carries the connection to this address.
    Pass(SocketAddr),
    /// Carries requests there, but answers an upgrade itself.
    PassNoUpgrade(SocketAddr, Reply),
    Always(Reply),
}

/// A proxy with https in front of the bridge, as Caddy or a tunnel is.
pub struct Front {
    /// Its address: what `PUBLIC_URL` should be.
    pub url: String,
    manner: Arc<Mutex<Manner>>,
    backstage: Arc<Backstage>,
    home: TempDir,
}

impl Front {
    /// Until it is told more, nobody is behind it.
    pub fn open(certificate: Certificate) -> io::Result<Front> {
        let backstage = Arc::new(Backstage::default());
        let home = TempDir::new()?;
        let (pem, tls) = make_certificate(certificate)?;
        std::fs::write(home.path.join("front.pem"), pem)?;
        let nobody = Reply::text(502, None, "Bad Gateway");
        let manner = Arc::new(Mutex::new(Manner::Always(nobody)));
        let told = Arc::clone(&manner);
        let speaks = serve_http(&backstage, "front", move |request| {
            match (lock(&told).clone(), request.header("upgrade")) {
                (Manner::Always(reply), _) | (Manner::PassNoUpgrade(_, reply), Some(_)) => reply,
                (Manner::Pass(behind) | Manner::PassNoUpgrade(behind, _), _) => {
                    let (method, path) = (&request.method, &request.target);
                    match http_exchange(behind, method, path, &[], &request.body) {
                        Ok(answer) => Reply::text(answer.status, None, &answer.text()),
                        Err(_) => Reply::text(502, None, "Bad Gateway"),
                    }
                }
            }
        })?;
        let told = Arc::clone(&manner);
        let doors = backstage.listen("front", move |tcp| {
            let behind = match *lock(&told) {
                Manner::Pass(address) => address,
                Manner::PassNoUpgrade(..) | Manner::Always(_) => speaks,
            };
            // Whoever refuses the certificate says so itself.
            moot(Plug::from_tls_to(tcp, &tls, behind));
        })?;
        let url = format!("https://localhost:{}", doors.port());
        Ok(Front { url, manner, backstage, home })
    }

    /// From now on it does this.
    pub fn set(&self, manner: Manner) {
        *lock(&self.manner) = manner;
    }

    /// The authority that has signed its certificate, for `SSL_CERT_FILE`.
    pub fn pem(&self) -> PathBuf {
        self.home.path.join("front.pem")
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.backstage.stop();
    }
}

/// ngrok's local API.
pub struct Ngrok {
    /// What `NGROK_API_URL` should be.
    pub url: String,
    reply: Arc<Mutex<Reply>>,
    backstage: Arc<Backstage>,
}

impl Ngrok {
    /// Without a tunnel at first.
    pub fn open() -> io::Result<Ngrok> {
        let backstage = Arc::new(Backstage::default());
        let reply = Arc::new(Mutex::new(Reply::json(200, &json!({"tunnels": []}))));
        let told = Arc::clone(&reply);
        let address = serve_http(&backstage, "ngrok", move |request| match request.path() {
            "/api/tunnels" => lock(&told).clone(),
            _ => Reply::json(404, &json!({"status_code": 404})),
        })?;
        Ok(Ngrok { url: format!("http://{address}"), reply, backstage })
    }

    /// Its tunnels from now on: public address, and where each leads.
    pub fn set_tunnels(&self, tunnels: &[(&str, &str)]) {
        let list: Vec<Value> = tunnels
            .iter()
            .map(|(url, to)| json!({"public_url": url, "config": {"addr": to, "inspect": true}}))
            .collect();
        self.set_answer(Reply::json(200, &json!({"tunnels": list, "uri": "/api/tunnels"})));
    }

    /// Any answer to the question for tunnels.
    pub fn set_answer(&self, reply: Reply) {
        *lock(&self.reply) = reply;
    }
}

impl Drop for Ngrok {
    fn drop(&mut self) {
        self.backstage.stop();
    }
}

fn basic_login(header: &str) -> Option<(String, String)> {
    let login = BASE64.decode(header.strip_prefix("Basic ")?).ok()?;
    let login = String::from_utf8(login).ok()?;
    login.split_once(':').map(|(user, password)| (user.to_owned(), password.to_owned()))
}

// ============================================================================
// HTTP for both stand-ins, and Twilio's requests
// ============================================================================

/// How a stand-in answers a request.
#[derive(Clone, Debug)]
pub enum Reply {
    Answer(Answer),
    /// Takes the request and never answers, until the other side leaves.
    Hang,
    /// Drops the connection without a word.
    Reset,
}

/// An ordinary HTTP answer.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub delay: Duration,
}

impl Reply {
    /// JSON, as n8n and Ultravox label it.
    pub fn json(status: u16, body: &Value) -> Reply {
        Reply::text(status, Some("application/json; charset=utf-8"), &body.to_string())
    }

    /// Any text with any content type, or none.
    pub fn text(status: u16, content_type: Option<&str>, body: &str) -> Reply {
        let reply = Reply::Answer(Answer {
            status,
            headers: Vec::new(),
            body: body.as_bytes().to_vec(),
            delay: Duration::ZERO,
        });
        match content_type {
            Some(content_type) => reply.header("Content-Type", content_type),
            None => reply,
        }
    }

    /// With one more header, such as `Retry-After`.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Reply {
        if let Reply::Answer(answer) = &mut self {
            answer.headers.push((name.to_owned(), value.to_owned()));
        }
        self
    }

    /// Only after this long.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Reply {
        if let Reply::Answer(answer) = &mut self {
            answer.delay = delay;
        }
        self
    }
}

#[derive(Clone, Debug)]
struct HttpRequest {
    at: Instant,
    /// When its connection was accepted.
    connected_at: Instant,
    method: String,
    target: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl HttpRequest {
    fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    fn header(&self, name: &str) -> Option<&str> {
        find_header(&self.headers, name)
    }

    /// A value of the query, decoded.
    fn parameter(&self, name: &str) -> Option<String> {
        let (_, query) = self.target.split_once('?')?;
        let mut pairs = form_urlencoded::parse(query.as_bytes());
        pairs.find(|(present, _)| present == name).map(|(_, value)| value.into_owned())
    }
}

/// What the bridge answered over HTTP.
#[derive(Clone, Debug)]
pub struct HttpAnswer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub took: Duration,
}

impl HttpAnswer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// A header, whatever the case of its name.
    pub fn header(&self, name: &str) -> Option<&str> {
        find_header(&self.headers, name)
    }
}

/// A small HTTP/1.1 server: a thread per connection, so that an idle or slow
/// one is in nobody's way, and keep-alive, as the real ones have it.
fn serve_http(
    backstage: &Arc<Backstage>,
    name: &'static str,
    answer: impl Fn(HttpRequest) -> Reply + Send + Sync + 'static,
) -> io::Result<SocketAddr> {
    let pause = Arc::clone(backstage);
    backstage.listen(name, move |tcp| {
        // A connection that ends in the middle of a request is the bridge's
        // right, and what came before it is on record.
        moot(converse(&pause, &tcp, &answer));
    })
}

fn converse(
    backstage: &Backstage,
    tcp: &TcpStream,
    answer: &impl Fn(HttpRequest) -> Reply,
) -> io::Result<()> {
    let connected_at = Instant::now();
    let mut reader = BufReader::new(tcp.try_clone()?);
    tcp.set_read_timeout(Some(KEEP_ALIVE))?;
    while let Some((first, headers)) = read_head(&mut reader)? {
        let body = read_body(&mut reader, &headers, false)?;
        let mut words = first.split(' ').map(str::to_owned);
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let close = find_header(&headers, "connection")
            .is_some_and(|value| value.eq_ignore_ascii_case("close"));
        let at = Instant::now();
        match answer(HttpRequest { at, connected_at, method, target, headers, body }) {
            Reply::Answer(answer) => {
                backstage.pause(answer.delay);
                (&mut &*tcp).write_all(&answer.bytes())?;
            }
            Reply::Hang => {
                tcp.set_read_timeout(None)?;
                // Ends when the bridge gives up, or the world ends.
                reader.read_until(b'\0', &mut Vec::new())?;
                return Ok(());
            }
            Reply::Reset => return Ok(()),
        }
        if close {
            break;
        }
    }
    Ok(())
}

impl Answer {
    fn bytes(&self) -> Vec<u8> {
        let mut head = format!("HTTP/1.1 {} Pretended\r\n", self.status);
        for (name, value) in &self.headers {
            head.extend([name, ": ", value, "\r\n"]);
        }
        head.push_str("Connection: keep-alive\r\nKeep-Alive: timeout=5\r\n");
        if self.status == 204 {
            return [head.as_bytes(), b"\r\n"].concat();
        }
        // n8n sends an empty body as chunks, of which there are none.
        let (framing, tail) = match self.body.len() {
            0 => ("Transfer-Encoding: chunked".to_owned(), b"0\r\n\r\n".as_slice()),
            length => (format!("Content-Length: {length}"), self.body.as_slice()),
        };
        [head.as_bytes(), framing.as_bytes(), b"\r\n\r\n", tail].concat()
    }
}

fn http_exchange(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> io::Result<HttpAnswer> {
    let begun = Instant::now();
    let mut tcp = connect(address)?;
    tcp.set_read_timeout(Some(WEBHOOK_WITHIN))?;
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: bridge.example\r\n");
    for (name, value) in headers {
        head.extend([name, ": ", value, "\r\n"]);
    }
    head.extend(["Content-Length: ", &body.len().to_string(), "\r\n\r\n"]);
    tcp.write_all(&[head.as_bytes(), body].concat())?;
    let mut reader = BufReader::new(tcp);
    let (first, headers) = read_head(&mut reader)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    let status = first.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| io::Error::other(format!("no status in {first:?}")))?;
    let body = read_body(&mut reader, &headers, true)?;
    Ok(HttpAnswer { status, headers, body, took: begun.elapsed() })
}

type Head = (String, Vec<(String, String)>);

/// The first line and the headers; nothing if the other side has left.
fn read_head(reader: &mut impl BufRead) -> io::Result<Option<Head>> {
    let mut first = String::new();
    if reader.read_line(&mut first)? == 0 {
        return Ok(None);
    }
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end();
        if line.is_empty() {
            return Ok(Some((first.trim_end().to_owned(), headers)));
        }
        let (name, value) = line.split_once(':').ok_or(io::ErrorKind::InvalidData)?;
        headers.push((name.to_owned(), value.trim().to_owned()));
    }
}

/// The body by length, by chunks, or (of an answer) up to the end.
fn read_body(
    reader: &mut impl BufRead,
    headers: &[(String, String)],
    answer: bool,
) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    let chunked =
        find_header(headers, "transfer-encoding").is_some_and(|value| value.contains("chunked"));
    let length = find_header(headers, "content-length").and_then(|length| length.parse().ok());
    if chunked {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size)?;
            let size = u64::from_str_radix(size.trim(), 16).map_err(io::Error::other)?;
            reader.by_ref().take(size).read_to_end(&mut body)?;
            reader.read_line(&mut String::new())?;
            if size == 0 {
                return Ok(body);
            }
        }
    }
    match length {
        Some(length) => {
            reader.by_ref().take(length).read_to_end(&mut body)?;
        }
        None if answer => {
            reader.read_to_end(&mut body)?;
        }
        None => {}
    }
    Ok(body)
}

fn find_header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let found = headers.iter().find(|(present, _)| present.eq_ignore_ascii_case(name));
    found.map(|(_, value)| value.as_str())
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let tcp = TcpStream::connect_timeout(&address, PATIENCE)?;
    tcp.set_nodelay(true)?;
    tcp.set_write_timeout(Some(WRITE_WITHIN))?;
    Ok(tcp)
}

// ============================================================================
// Full-duplex WebSockets, plain and behind TLS
// ============================================================================
//
// One thread reads while others write. tungstenite wants `&mut` for both, so
// each direction gets a protocol object of its own over the same TCP socket:
// one that only reads and is mute, one that only writes, under a lock. What
// the reading one would like to answer (pong, close) the writing one sends.
//
// Simplification: the bridge itself does it differently (one state, fed under
// one lock). The pretend world takes the shorter way on purpose, so that both
// do not share a mistake.

/// The reading half of a socket. Once mute, it swallows what is written.
struct Ear {
    tcp: TcpStream,
    mute: bool,
}

impl Read for Ear {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.tcp.read(buffer)
    }
}

impl Write for Ear {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.mute { Ok(bytes.len()) } else { self.tcp.write(bytes) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

enum Incoming {
    Text(String),
    Binary(Vec<u8>),
    /// What the writing half shall answer.
    Reply(Message),
}

/// After the handshake: one object to read, one to write.
fn split_socket(
    mut socket: WebSocket<Ear>,
    role: Role,
) -> io::Result<(WebSocket<Ear>, WebSocket<TcpStream>)> {
    socket.get_mut().mute = true;
    let tcp = socket.get_ref().tcp.try_clone()?;
    Ok((socket, WebSocket::from_raw_socket(tcp, role, Some(small_buffers()))))
}

/// Reads until the end and hands everything to `hear`.
fn listen(reader: &mut WebSocket<Ear>, mut hear: impl FnMut(Incoming)) -> Ending {
    loop {
        match reader.read() {
            Ok(Message::Text(text)) => hear(Incoming::Text(text.as_str().to_owned())),
            Ok(Message::Binary(bytes)) => hear(Incoming::Binary(bytes.to_vec())),
            Ok(Message::Ping(payload)) => hear(Incoming::Reply(Message::Pong(payload))),
            Ok(Message::Pong(_) | Message::Frame(_)) => {}
            Ok(Message::Close(frame)) => {
                let code = frame.as_ref().map(|frame| u16::from(frame.code));
                // If we have closed first this is refused, which is right.
                hear(Incoming::Reply(Message::Close(frame)));
                return Ending::Closed(code);
            }
            Err(error) => return Ending::Broken(error.to_string()),
        }
    }
}

fn normal_close() -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }))
}

fn small_buffers() -> WebSocketConfig {
    WebSocketConfig::default().read_buffer_size(8 * 1024).write_buffer_size(0)
}

/// A socket in plain text, be there TLS in front of it or not.
struct Plug {
    socket: TcpStream,
    /// The same socket, or the one in TLS.
    wire: TcpStream,
    rude: Arc<AtomicBool>,
    pumps: Vec<JoinHandle<()>>,
}

/// TLS between the outer socket and an inner one in plain text.
struct Terminator {
    tls: Mutex<rustls::Connection>,
    /// Records must leave in the order in which they were made: whoever wants
    /// to send takes this lock first, then makes them, then writes.
    outer: Mutex<TcpStream>,
    rude: Arc<AtomicBool>,
}

impl Plug {
    fn bare(socket: TcpStream) -> io::Result<Plug> {
        let wire = socket.try_clone()?;
        Ok(Plug { socket, wire, rude: Arc::default(), pumps: Vec::new() })
    }

    /// One connection in TLS, carried to a plain listener for as long as it lasts.
    fn from_tls_to(
        outer: TcpStream,
        tls: &Arc<rustls::ServerConfig>,
        plain: SocketAddr,
    ) -> io::Result<()> {
        let tls = rustls::ServerConnection::new(Arc::clone(tls)).map_err(io::Error::other)?;
        let inner = TcpStream::connect(plain)?;
        let mut plug = Plug::with_pumps(outer, tls.into(), inner.try_clone()?, inner)?;
        for pump in plug.pumps.drain(..) {
            moot(pump.join());
        }
        Ok(())
    }

    fn behind_tls(outer: TcpStream, tls: rustls::Connection) -> io::Result<Plug> {
        let (socket, inner) = socket_pair()?;
        Plug::with_pumps(outer, tls, socket, inner)
    }

    /// Two pumps, one each way. Both block on a bare socket, with no lock.
    fn with_pumps(
        outer: TcpStream,
        mut tls: rustls::Connection,
        socket: TcpStream,
        inner: TcpStream,
    ) -> io::Result<Plug> {
        tls.set_buffer_limit(None);
        let rude = Arc::<AtomicBool>::default();
        let terminator = Arc::new(Terminator {
            tls: Mutex::new(tls),
            outer: Mutex::new(outer.try_clone()?),
            rude: Arc::clone(&rude),
        });
        let (from, to) = (outer.try_clone()?, inner.try_clone()?);
        let wire = outer.try_clone()?;
        let inward = Arc::clone(&terminator);
        let inward = spawn("tls inward", move || {
            moot(inward.pump_in(&from, &to));
            moot(to.shutdown(Shutdown::Both));
        })?;
        let outward = spawn("tls outward", move || {
            moot(terminator.pump_out(&inner));
            moot(outer.shutdown(Shutdown::Both));
        })?;
        Ok(Plug { socket, wire, rude, pumps: vec![outward, inward] })
    }
}

impl Drop for Plug {
    fn drop(&mut self) {
        moot(self.socket.shutdown(if self.pumps.is_empty() {
            Shutdown::Both
        } else {
            Shutdown::Write
        }));
        // What is still under way (a close frame) is sent before this returns.
        for pump in self.pumps.drain(..) {
            moot(pump.join());
        }
    }
}

impl Terminator {
    fn pump_in(&self, mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
        let mut buffer = [0; 16 * 1024];
        loop {
            let count = from.read(&mut buffer)?;
            let mut sealed = buffer.get(..count).unwrap_or_default();
            if sealed.is_empty() {
                return Ok(());
            }
            let mut plain = Vec::new();
            let mut state = Ok(());
            while !sealed.is_empty() && state.is_ok() {
                let mut tls = lock(&self.tls);
                tls.read_tls(&mut sealed)?;
                state = tls.process_new_packets().map(|_| ()).map_err(io::Error::other);
                // Reading stops with an error when there is no more for now.
                moot(tls.reader().read_to_end(&mut plain));
            }
            // Even a failed handshake has something to say: why.
            self.flush()?;
            to.write_all(&plain)?;
            state?;
        }
    }

    fn pump_out(&self, mut inner: &TcpStream) -> io::Result<()> {
        let mut buffer = [0; 16 * 1024];
        loop {
            let count = inner.read(&mut buffer).unwrap_or(0);
            if count == 0 {
                if !self.rude.load(Ordering::Acquire) {
                    lock(&self.tls).send_close_notify();
                    self.flush()?;
                }
                return Ok(());
            }
            lock(&self.tls).writer().write_all(buffer.get(..count).unwrap_or_default())?;
            self.flush()?;
        }
    }

    fn flush(&self) -> io::Result<()> {
        let mut outer = lock(&self.outer);
        let mut sealed = Vec::new();
        let mut tls = lock(&self.tls);
        while tls.wants_write() {
            tls.write_tls(&mut sealed)?;
        }
        drop(tls);
        outer.write_all(&sealed)
    }
}

/// Two ends of one loopback connection.
fn socket_pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let near = connect(listener.local_addr()?)?;
    loop {
        let (far, from) = listener.accept()?;
        // Anybody on this machine may knock. Only the one we called counts.
        if from == near.local_addr()? {
            far.set_nodelay(true)?;
            far.set_write_timeout(Some(WRITE_WITHIN))?;
            return Ok((near, far));
        }
    }
}

/// A certificate authority and a server certificate for `localhost`, made for
/// this one run. Gives the authority in PEM, which the bridge shall trust.
fn make_certificate(kind: Certificate) -> io::Result<(String, Arc<rustls::ServerConfig>)> {
    let mut authority = rcgen::CertificateParams::new(Vec::new()).map_err(io::Error::other)?;
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let name = match kind {
        Certificate::Strange => "somebody else's pretend world",
        _ => "callbridge's pretend world",
    };
    authority.distinguished_name.push(rcgen::DnType::CommonName, name);
    let authority_key = rcgen::KeyPair::generate().map_err(io::Error::other)?;
    let authority =
        rcgen::CertifiedIssuer::self_signed(authority, authority_key).map_err(io::Error::other)?;
    let names = match kind {
        Certificate::WrongName => vec!["other.example".to_owned()],
        _ => vec!["localhost".to_owned(), "127.0.0.1".to_owned()],
    };
    let mut server = rcgen::CertificateParams::new(names).map_err(io::Error::other)?;
    if kind == Certificate::Expired {
        server.not_before = rcgen::date_time_ymd(2020, 1, 1);
        server.not_after = rcgen::date_time_ymd(2020, 3, 31);
    }
    let server_key = rcgen::KeyPair::generate().map_err(io::Error::other)?;
    let certificate = server.signed_by(&server_key, &authority).map_err(io::Error::other)?;

    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(server_key.serialize_der()));
    let chain = vec![certificate.der().clone()];
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(io::Error::other)?;
    let pem = match kind {
        // The authority of another run.
        Certificate::Strange => make_certificate(Certificate::Good)?.0,
        _ => authority.pem(),
    };
    Ok((pem, Arc::new(config)))
}

// ============================================================================
// Sound: G.711 mu-law, written a second time
// ============================================================================

/// One mu-law code as a linear sample. The standard's words, no table: the
/// bits are stored inverted; sign, three bits of segment, four of step.
pub fn mulaw_to_pcm(code: u8) -> i16 {
    let bits = !code;
    let step = i16::from(bits & 0x0F);
    let segment = (bits >> 4) & 0x07;
    // Each segment begins where the last one ended, with steps twice as wide.
    let magnitude = ((step * 8 + 132) << segment) - 132;
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The code whose sample is nearest. Slow, and as such beyond doubt, except
/// for a sample half-way between two codes: do not ask about those.
pub fn pcm_to_mulaw(sample: i16) -> u8 {
    let distance = |code: &u8| (i32::from(mulaw_to_pcm(*code)) - i32::from(sample)).abs();
    // From above, so that zero is 0xFF, as Twilio has it, and not 0x7F.
    (0..=u8::MAX).rev().min_by_key(distance).unwrap_or(0xFF)
}

/// Mu-law as s16le.
pub fn pcm_of(mulaw: &[u8]) -> Vec<u8> {
    mulaw.iter().flat_map(|code| mulaw_to_pcm(*code).to_le_bytes()).collect()
}

/// So many milliseconds of a voice in mu-law: noise in which no two frames are
/// alike and no sample is zero, so that any loss, swap or doubling shows.
pub fn voice(speaker: u64, millis: u64) -> Vec<u8> {
    let mut state = speaker.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let codes = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_be_bytes()[0]
    });
    let bytes = usize::try_from(millis * 8).unwrap_or(usize::MAX);
    codes.filter(|code| *code != 0xFF && *code != 0x7F).take(bytes).collect()
}

/// Where two sounds differ, in words.
fn difference(wanted: &[u8], got: &[u8]) -> Option<String> {
    if wanted == got {
        return None;
    }
    let same = wanted.iter().zip(got).take_while(|(wanted, got)| wanted == got).count();
    Some(format!("{} bytes for {}, different from byte {same} on", got.len(), wanted.len()))
}

// ============================================================================
// Backstage: threads, waiting, troubles
// ============================================================================

/// What went wrong, where in the test, and the bridge's last log lines.
/// `Debug` is written for people, because `unwrap` and `?` print that.
pub struct Trouble {
    what: String,
    place: &'static Location<'static>,
    log: Vec<String>,
}

impl Trouble {
    #[track_caller]
    fn bare(what: String) -> Trouble {
        Trouble { what, place: Location::caller(), log: Vec::new() }
    }

    /// The words and the log, without the place in the source.
    fn with_log(&self) -> String {
        let mut text = self.what.clone();
        if !self.log.is_empty() {
            text.push_str("\n  the bridge's last words:");
        }
        for line in &self.log {
            text.push_str("\n    ");
            text.push_str(line);
        }
        text
    }
}

impl Display for Trouble {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.what)
    }
}

impl fmt::Debug for Trouble {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}\n  asked for at {}", self.with_log(), self.place)
    }
}

impl std::error::Error for Trouble {}

/// A value that threads wait for changes of.
#[derive(Default)]
struct Board<T> {
    value: Mutex<T>,
    changed: Condvar,
    version: AtomicU64,
}

impl<T> Board<T> {
    fn new(value: T) -> Board<T> {
        Board { value: Mutex::new(value), changed: Condvar::new(), version: AtomicU64::new(0) }
    }

    fn look<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&lock(&self.value))
    }

    fn change<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let mut value = lock(&self.value);
        let result = change(&mut value);
        self.version.fetch_add(1, Ordering::AcqRel);
        self.changed.notify_all();
        result
    }

    /// Waits until `ready` gives something, or the time is up.
    fn wait<R>(&self, within: Duration, mut ready: impl FnMut(&mut T) -> Option<R>) -> Option<R> {
        let deadline = Instant::now() + within;
        let mut value = lock(&self.value);
        loop {
            if let Some(found) = ready(&mut value) {
                return Some(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let waited = self.changed.wait_timeout(value, left);
            value = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// How often the value has changed.
    fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Waits for a change after that version, or until the time is up.
    fn wait_change(&self, version: u64, within: Duration) {
        self.wait(within, |_| (self.version() != version).then_some(()));
    }
}

/// All threads and sockets of the stand-ins, so that none outlives the world.
#[derive(Default)]
struct Backstage {
    board: Board<Stagehands>,
}

#[derive(Default)]
struct Stagehands {
    over: bool,
    next: u64,
    sockets: HashMap<u64, TcpStream>,
    doors: Vec<SocketAddr>,
    threads: Vec<JoinHandle<()>>,
}

impl Backstage {
    /// Opens a door on a free loopback port. Each visitor gets a thread.
    fn listen(
        self: &Arc<Backstage>,
        name: &'static str,
        receive: impl Fn(TcpStream) + Send + Sync + 'static,
    ) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        self.board.change(|hands| hands.doors.push(address));
        let backstage = Arc::clone(self);
        let receive = Arc::new(receive);
        self.employ(name, move || {
            for tcp in listener.incoming() {
                if backstage.board.look(|hands| hands.over) {
                    return;
                }
                let Ok(tcp) = tcp else { continue };
                let receive = Arc::clone(&receive);
                // Out of threads or sockets: the visitor sees a closed door.
                moot(backstage.attend(name, tcp, move |tcp| receive(tcp)));
            }
        })?;
        Ok(address)
    }

    /// One visitor. The socket is on record as long as he is here, and is
    /// shut when he leaves: a clone kept open elsewhere would hold it open.
    fn attend(
        self: &Arc<Backstage>,
        name: &'static str,
        tcp: TcpStream,
        receive: impl FnOnce(TcpStream) + Send + 'static,
    ) -> io::Result<()> {
        tcp.set_nodelay(true)?;
        tcp.set_write_timeout(Some(WRITE_WITHIN))?;
        let kept = tcp.try_clone()?;
        let number = self.board.change(|hands| {
            hands.next += 1;
            hands.sockets.insert(hands.next, kept);
            hands.next
        });
        let backstage = Arc::clone(self);
        self.employ(name, move || {
            if !backstage.board.look(|hands| hands.over) {
                receive(tcp);
            }
            let kept = backstage.board.change(|hands| hands.sockets.remove(&number));
            moot(kept.map_or(Ok(()), |kept| kept.shutdown(Shutdown::Both)));
        })
    }

    fn employ(&self, name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let thread = spawn(name, work)?;
        self.board.change(|hands| {
            hands.threads.retain(|thread| !thread.is_finished());
            hands.threads.push(thread);
        });
        Ok(())
    }

    /// Waits, unless the world ends before.
    fn pause(&self, duration: Duration) {
        self.board.wait(duration, |hands| hands.over.then_some(()));
    }

    /// Ends everything and waits until it has ended.
    fn stop(&self) {
        let doors = self.board.change(|hands| {
            hands.over = true;
            for tcp in hands.sockets.values() {
                moot(tcp.shutdown(Shutdown::Both));
            }
            std::mem::take(&mut hands.doors)
        });
        for door in doors {
            // A knock wakes the thread that waits in accept.
            moot(TcpStream::connect(door));
        }
        while let Some(thread) = self.board.change(|hands| hands.threads.pop()) {
            moot(thread.join());
        }
    }
}

/// A directory of its own, gone when dropped.
struct TempDir {
    path: PathBuf,
}

impl TempDir {
    fn new() -> io::Result<TempDir> {
        let path = std::env::temp_dir().join(format!("callbridge-world-{}", random_hex(8)));
        std::fs::create_dir(&path)?;
        Ok(TempDir { path })
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        // Left-overs in the temporary directory are a nuisance, not a failure.
        moot(std::fs::remove_dir_all(&self.path));
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).spawn(work)
}

/// A panic elsewhere shall not make this thread's complaint unreadable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// For results that do not matter because the thing acted on is gone or about
/// to go: a socket at its end, a process that has died, a thread that is done.
fn moot<T, E>(_: Result<T, E>) {}

fn random_hex(bytes: usize) -> String {
    let mut random = vec![0; bytes];
    // The system's random numbers fail only where nothing works. Names that
    // collide would show at once.
    moot(ring::rand::SystemRandom::new().fill(&mut random));
    random.iter().flat_map(|byte| [byte >> 4, byte & 0x0F]).map(hex_digit).collect()
}

fn hex_digit(value: u8) -> char {
    char::from_digit(u32::from(value), 16).unwrap_or('0')
}

fn random_uuid() -> String {
    let hex = random_hex(16);
    let cut = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    format!("{}-{}-4{}-a{}-{}", cut(0, 8), cut(8, 12), cut(13, 16), cut(17, 20), cut(20, 32))
}
