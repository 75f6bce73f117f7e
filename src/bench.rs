//! The benchmark: `callbridge demo --calls N --seconds S`.
//!
//! Many calls at once through the real server, which runs as a child process as in the demo. The
//! pretend world rings, answers the server's questions as n8n and Ultravox would, and then speaks
//! on both ends of every call, fifty frames a second, until the time is up:
//!
//! ```text
//!   pacers "up"   --- frames --->  +------------+  --- frames --->  those who listen
//!   (all callers)                  | callbridge |                   as agents
//!   those who listen               |  as child  |                   pacers "down"
//!   at phones     <--- frames ---  +------------+  <--- frames ---  (all agents)
//! ```
//!
//! Up to fifty calls are listened to by threads of their own, which see when a frame arrives. The
//! legs of the others are emptied twenty times a second by one thread: it looks at every frame as
//! closely, only not at the clock.
//!
//! Every frame carries the time at which it was sent and its number, written in mu-law codes that
//! survive the way to PCM and back ([`Stamp`]), and sound that its number determines. So whoever
//! hears it knows how long it was under way, and whether it is the right one and undamaged.
//!
//! What a machine's figures mean is shown by the **floor**: another child process in the server's
//! place, in which bare threads copy the same bytes between the same kinds of sockets, for the
//! same number of calls, right before and right after. It is plain text on both sides even when the
//! agent's side of the bridge speaks TLS: whatever TLS costs belongs to the bridge's figure.
//!
//! It uses the demo's certificates, forms, signatures, TwiML reader and HTTP. What it does not use
//! is the demo's `Phone` and `AgentCall`: they remember all that they have heard. Here the
//! way of a frame takes no allocation, and what the world itself costs is measured and reported.

#![expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counts become figures, and six bits of a number become a digit"
)]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::io::{self, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use serde::Deserialize;
use serde_json::{Value, json};
use tungstenite::handshake::derive_accept_key;

use super::{
    API_KEY, AUTH_TOKEN, BASE64, Backstage, Board, Certificate, ChildLog, FIRST_MESSAGE,
    FRAME_BYTES, FRAME_TIME, Flop, OUR_NUMBER, PATIENCE, PUBLIC_URL, Reply, Running, TempDir,
    Twiml, WRITE_WITHIN, connect, find_header, form_body, http_exchange, incoming_call_form, lock,
    make_certificate, moot, mulaw_to_pcm, random_hex, random_uuid, read_body, read_head, spawn,
    transcript, twilio_signature, voice,
};

/// A frame that takes longer is late: the next one has been sent in the meantime.
const LATE: Duration = FRAME_TIME;
/// How long pretend n8n takes for step 2, and pretend Ultravox for step 3.
const N8N_TAKES: Duration = Duration::from_millis(20);
const ULTRAVOX_TAKES: Duration = Duration::from_millis(40);
/// Calls do not come all at once. This long lies between two.
const BETWEEN_CALLS: Duration = Duration::from_millis(20);
/// Threads that ring and hang up.
const DIALLERS: usize = 16;
/// From the last call's answer to the first frame that counts.
const WARM_UP: Duration = Duration::from_secs(1);
/// For the next frame under way when the pacers have stopped. Then those missing are lost.
const DRAIN_WITHIN: Duration = Duration::from_secs(2);
/// For threads and descriptors to come back. `tiny_http` lets a thread sleep for 5 s.
const SETTLE_WITHIN: Duration = Duration::from_secs(30);
/// The calls of all phones are spread over so many points of the 20 ms.
const SLOTS: usize = 100;
/// Calls whose frames are timed on arrival, each leg by a thread of its own.
const TIMED_CALLS: usize = 50;
/// How often the legs of the others are read.
const SWEEP_EVERY: Duration = Duration::from_millis(50);
/// One thread speaks for so many, in one direction.
const CALLS_PER_PACER: usize = 100;
/// A speaker who is so far behind does not catch up: sound from a phone never comes in floods.
const BEHIND_MAX: Duration = Duration::from_millis(100);
/// The world counts as late from here on (99th percentile of its own senders).
const WORLD_LATE_US: f64 = 5_000.0;
/// Open files that both processes need besides those of the calls.
const FILES_AT_REST: usize = 200;
/// In each of them: two legs, one of them twice on record here; a webhook while it rings there.
const FILES_PER_CALL: usize = 4;
/// As many as `MAX_CALLS` allows.
const CALLS_MAX: usize = 10_000;
/// A fault in the tests' hands comes once in so many frames.
const FAULT_EVERY: u32 = 50;

// ============================================================================
// The verb
// ============================================================================

/// What shall be measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The program whose server is measured.
    pub program: PathBuf,
    pub calls: usize,
    pub seconds: u64,
    /// Whether the agent's side speaks TLS.
    pub tls: bool,
    /// Whether calls end and others begin all the time.
    pub churn: bool,
    pub json: bool,
    /// Of so many calls every frame is timed, on arrival.
    pub timed: usize,
    /// What the tests do to the sound, to see that it is noticed.
    pub fault: Option<Fault>,
}

/// Done to every fiftieth frame of each caller, after it was counted as sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// One sample is changed.
    Damage,
    /// It is not sent.
    Lose,
    /// It is sent after the one that follows it.
    Swap,
}

/// `callbridge demo` with arguments. The report goes to stdout; an error says what was wrong.
pub fn run(arguments: &[String]) -> Result<(), Flop> {
    let failed = |text| Flop { misused: false, text };
    if let [floor, agents] = arguments
        && floor == "--floor"
    {
        return be_the_floor(agents).map_err(|error| failed(format!("the floor: {error}")));
    }
    let program = std::env::current_exe()
        .map_err(|error| failed(format!("demo cannot find its own program file: {error}")))?;
    let plan = Plan::read(program, arguments).map_err(|what| Flop {
        misused: true,
        text: format!("{what} (see callbridge demo --help)"),
    })?;
    let report = measure(&plan).map_err(failed)?;
    let text = if plan.json { format!("{:#}\n", report.json()) } else { report.text() };
    write!(io::stdout(), "{text}").map_err(|error| failed(format!("stdout: {error}")))?;
    report.verdict().map_err(failed)
}

impl Plan {
    fn read(program: PathBuf, arguments: &[String]) -> Result<Plan, String> {
        let mut plan = Plan {
            program,
            calls: 0,
            seconds: 10,
            tls: true,
            churn: false,
            json: false,
            timed: TIMED_CALLS,
            fault: None,
        };
        let mut words = arguments.iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--calls" => plan.calls = number(word, words.next(), CALLS_MAX)?,
                "--seconds" => plan.seconds = number(word, words.next(), 86_400)? as u64,
                "--plain" => plan.tls = false,
                "--churn" => plan.churn = true,
                "--json" => plan.json = true,
                unknown => return Err(format!("demo does not know \"{unknown}\"")),
            }
        }
        if plan.calls == 0 {
            return Err("how many calls? --calls N".to_owned());
        }
        Ok(plan)
    }
}

fn number(option: &str, word: Option<&String>, most: usize) -> Result<usize, String> {
    let number = word.and_then(|word| word.parse().ok());
    number
        .filter(|number| (1..=most).contains(number))
        .ok_or_else(|| format!("{option} wants a number from 1 to {most}"))
}

/// The whole benchmark: the floor, the bridge, the floor again.
pub fn measure(plan: &Plan) -> Result<Report, String> {
    check_the_machine(plan)?;
    if plan.churn {
        let (bridge, churn) = measure_churn(plan)?;
        return Ok(Report { plan: plan.clone(), bridge, floors: Vec::new(), churn: Some(churn) });
    }
    let half = Duration::from_secs(plan.seconds).div_f64(2.0).max(Duration::from_secs(1));
    let before = measure_floor(plan, half)?;
    let bridge = measure_bridge(plan)?;
    let after = measure_floor(plan, half)?;
    Ok(Report { plan: plan.clone(), bridge, floors: vec![before, after], churn: None })
}

/// Says in words what would otherwise fail in the middle with an error number.
fn check_the_machine(plan: &Plan) -> Result<(), String> {
    let limits = fs::read_to_string("/proc/self/limits").map_err(|error| {
        format!("the benchmark reads its figures from /proc, as Linux has it: {error}")
    })?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let limit = line.and_then(|line| line.split_whitespace().next()).unwrap_or_default();
    let wanted = plan.calls * FILES_PER_CALL + FILES_AT_REST;
    match limit.parse::<usize>() {
        Ok(limit) if limit < wanted => Err(format!(
            "{} calls take up to {wanted} open files in a process, and the limit here is {limit}. \
             Raise it in this shell: ulimit -n {wanted}",
            plan.calls
        )),
        // "unlimited"
        _ => Ok(()),
    }
}

// ============================================================================
// The two stages: the bridge, and the floor
// ============================================================================

/// What one child process did with the sound, and what it cost.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Caller to agent, agent to caller.
    pub ways: [WayFigures; 2],
    /// The child's CPU time, over the seconds that were measured.
    pub cpu: Duration,
    pub user_share: f64,
    /// Seconds of calls in that time.
    pub call_seconds: f64,
    pub rest: Vitals,
    pub standing: Vitals,
    /// From the start of the process to the first answer.
    pub start: Spread,
    pub webhook: Spread,
    pub first_audio: Spread,
    pub clear: Spread,
    pub machine: Machine,
    /// How late the world's own senders were.
    pub lateness: Spread,
    /// Calls whose transcript pretend n8n has got.
    pub filed: usize,
    pub calls: usize,
    /// The first things that went wrong.
    pub troubles: Vec<String>,
}

/// One direction of the sound.
#[derive(Clone, Copy, Debug, Default)]
pub struct WayFigures {
    pub sent: u64,
    pub lost: u64,
    pub damaged: u64,
    pub out_of_order: u64,
    pub late: u64,
    pub delay: Spread,
}

/// How the machine was while it was measured, as shares of all its cores.
#[derive(Clone, Copy, Debug, Default)]
pub struct Machine {
    pub cores: usize,
    pub busy: f64,
    pub child: f64,
    pub world: f64,
    /// How long a thread of the child waited for a core, on average for each frame.
    pub queue_us: f64,
}

impl Machine {
    fn others(&self) -> f64 {
        (self.busy - self.child - self.world).max(0.0)
    }
}

fn measure_bridge(plan: &Plan) -> Result<Figures, String> {
    let stage = Stage::bridge(plan)?;
    let calls = stage.dial_all()?;
    let mut figures = stage.talk(&calls, Duration::from_secs(plan.seconds), || {})?;
    stage.hang_up_all(calls)?;
    stage.settle_parcels(plan.calls);
    stage.conclude(&mut figures);
    Ok(figures)
}

fn measure_floor(plan: &Plan, within: Duration) -> Result<Figures, String> {
    let stage = Stage::floor(plan)?;
    let calls = stage.dial_all()?;
    let mut figures = stage.talk(&calls, within, || {})?;
    stage.hang_up_all(calls)?;
    stage.conclude(&mut figures);
    Ok(figures)
}

/// One child process, and the world around it.
struct Stage {
    hall: Arc<Hall>,
    child: Process,
    start: Histogram,
    rest: Vitals,
    /// Holds the server's data and certificate.
    _home: TempDir,
}

impl Stage {
    fn bridge(plan: &Plan) -> Result<Stage, String> {
        let broken = |error: io::Error| format!("no world: {error}");
        let home = TempDir::new().map_err(broken)?;
        let (hall, settings) = Hall::open(plan, &home.path).map_err(broken)?;
        let start = Histogram::default();
        let log = ChildLog::default();
        let launch = || -> Result<Process, String> {
            let mut command = Command::new(&plan.program);
            command.env_clear().current_dir(&home.path).envs(settings.iter().cloned());
            let child = Process::launch(command, &log)?;
            let health = http_exchange(child.address, "GET", "/health", &[], &[]);
            match health {
                Ok(answer) if answer.status == 200 => {
                    start.note(child.started.elapsed());
                    Ok(child)
                }
                Ok(answer) => Err(child.trouble(&format!("/health answers {}", answer.status))),
                Err(error) => Err(child.trouble(&format!("/health: {error}"))),
            }
        };
        // One start says little.
        for _ in 0..4 {
            drop(launch()?);
        }
        Stage { hall, child: launch()?, start, rest: Vitals::default(), _home: home }.settled()
    }

    fn floor(plan: &Plan) -> Result<Stage, String> {
        let broken = |error: io::Error| format!("no floor: {error}");
        let home = TempDir::new().map_err(broken)?;
        let plan = Plan { tls: false, fault: None, ..plan.clone() };
        let (hall, agents) = Hall::open_for_floor(&plan).map_err(broken)?;
        let mut command = Command::new(&plan.program);
        command.args(["demo", "--floor", &agents.to_string()]).current_dir(&home.path);
        let child = Process::launch(command, &ChildLog::default())?;
        let start = Histogram::default();
        Stage { hall, child, start, rest: Vitals::default(), _home: home }.settled()
    }

    /// When what is still ending (the connection of the first `/health`) has ended.
    fn settled(mut self) -> Result<Stage, String> {
        self.rest = self.vitals()?;
        for _ in 0..20 {
            thread::sleep(Duration::from_millis(250));
            let last = self.rest;
            self.rest = self.vitals()?;
            if (last.threads, last.descriptors) == (self.rest.threads, self.rest.descriptors) {
                break;
            }
        }
        Ok(self)
    }

    /// What the child holds. Connections that it keeps for the next call are not its calls'.
    fn vitals(&self) -> Result<Vitals, String> {
        let mut vitals = Vitals::of(self.child.pid).map_err(|error| self.gone(&error))?;
        let kept = self.hall.kept.load(Relaxed);
        vitals.descriptors = vitals.descriptors.saturating_sub(kept);
        Ok(vitals)
    }

    fn moment(&self) -> Result<Moment, String> {
        Moment::now(self.child.pid).map_err(|error| self.gone(&error))
    }

    fn gone(&self, error: &str) -> String {
        self.child.trouble(&format!("the process that is measured has ended ({error})"))
    }

    fn dial(&self, number: u32) -> Result<Arc<Call>, String> {
        let dialled = if self.hall.is_floor {
            self.hall.connect_through_floor(self.child.address, number)
        } else {
            self.hall.ring(self.child.address, number)
        };
        dialled.map_err(|why| {
            let stood = self.hall.standing_calls.load(Relaxed);
            self.child.trouble(&format!("with {stood} calls standing, one more failed: {why}"))
        })
    }

    fn dial_all(&self) -> Result<Vec<Arc<Call>>, String> {
        let began = Instant::now();
        // The floor's legs find each other by their order.
        let diallers = if self.hall.is_floor { 1 } else { DIALLERS };
        let calls = in_parallel(diallers, self.hall.plan.calls, |index| {
            if !self.hall.is_floor {
                let due = began + BETWEEN_CALLS * u32::try_from(index).unwrap_or(u32::MAX);
                sleep_until(due);
            }
            let call = self.dial(u32::try_from(index).unwrap_or(u32::MAX))?;
            self.hall.begin_talking(&call);
            Ok(call)
        })?;
        Ok(calls)
    }

    fn hang_up_all(&self, calls: Vec<Arc<Call>>) -> Result<(), String> {
        let calls: Vec<Mutex<Option<Arc<Call>>>> =
            calls.into_iter().map(|call| Mutex::new(Some(call))).collect();
        in_parallel(DIALLERS, calls.len(), |index| {
            let call = calls.get(index).and_then(|call| lock(call).take());
            call.map_or(Ok(()), |call| self.hang_up(&call))
        })?;
        Ok(())
    }

    fn hang_up(&self, call: &Arc<Call>) -> Result<(), String> {
        let ended = self.hall.hang_up(self.child.address, call);
        ended.map_err(|why| self.child.trouble(&format!("call {}: {why}", call.number)))
    }

    /// All stand. Measures for so long, while `meanwhile` runs.
    fn talk(
        &self,
        calls: &[Arc<Call>],
        within: Duration,
        meanwhile: impl FnOnce(),
    ) -> Result<Figures, String> {
        thread::sleep(WARM_UP);
        let before = self.moment()?;
        self.hall.window.from_ns.store(now_ns(), Relaxed);
        let until = Instant::now() + within;
        meanwhile();
        sleep_until(until);
        self.hall.window.until_ns.store(now_ns(), Relaxed);
        let after = self.moment()?;
        let standing = self.vitals()?;
        let mut figures = self.figures(&before, &after, standing);
        figures.calls = calls.len();
        Ok(figures)
    }

    fn figures(&self, before: &Moment, after: &Moment, standing: Vitals) -> Figures {
        let hall = &self.hall;
        let passed = after.at.duration_since(before.at).as_secs_f64();
        // The sum over the threads is exact to the nanosecond, but knows only those that lived all
        // the time. Where they come and go, the kernel's sum over all counts, in steps of 10 ms.
        let cpu = if hall.plan.churn {
            after.cpu.saturating_sub(before.cpu)
        } else {
            after.ran_since(before)
        };
        let frames: u64 = hall.ways.iter().map(|way| way.in_window.load(Relaxed)).sum();
        let share = |cpu: Duration| cpu.as_secs_f64() / passed / after.cores as f64;
        let machine = Machine {
            cores: after.cores,
            busy: after.busy.saturating_sub(before.busy) as f64
                / after.total.saturating_sub(before.total).max(1) as f64,
            child: share(cpu),
            world: share(after.world.saturating_sub(before.world)),
            queue_us: after.waited_since(before).as_secs_f64() * 1e6 / frames.max(1) as f64,
        };
        Figures {
            ways: [WayFigures::default(); 2],
            cpu,
            user_share: (after.user.saturating_sub(before.user)).as_secs_f64()
                / after.cpu.saturating_sub(before.cpu).as_secs_f64().max(0.01),
            call_seconds: frames as f64 / 2.0 * FRAME_TIME.as_secs_f64(),
            rest: self.rest,
            standing,
            start: self.start.spread(),
            webhook: Spread::default(),
            first_audio: Spread::default(),
            clear: Spread::default(),
            machine,
            lateness: Spread::default(),
            filed: 0,
            calls: 0,
            troubles: Vec::new(),
        }
    }

    /// What is known only when all calls have ended.
    fn conclude(&self, figures: &mut Figures) {
        let hall = &self.hall;
        for (figures, way) in figures.ways.iter_mut().zip(&hall.ways) {
            *figures = way.figures();
        }
        figures.webhook = hall.webhook.spread();
        figures.first_audio = hall.first_audio.spread();
        figures.clear = hall.clear.spread();
        figures.lateness = hall.lateness.spread();
        figures.filed = hall.filed.load(Relaxed);
        figures.troubles.clone_from(&lock(&hall.troubles));
    }

    /// Waits until n8n has got the transcripts of so many calls.
    fn settle_parcels(&self, calls: usize) {
        wait_until(PATIENCE, || self.hall.filed.load(Relaxed) >= calls);
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.hall.over.store(true, Relaxed);
        // The child first: what it holds open then ends by itself.
        self.child.end();
        self.hall.backstage.stop();
    }
}

/// Does so many things with a few threads. The first error ends it.
fn in_parallel<T: Send>(
    threads: usize,
    count: usize,
    work: impl Fn(usize) -> Result<T, String> + Sync,
) -> Result<Vec<T>, String> {
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<T>> = Mutex::new(Vec::with_capacity(count));
    let failed: Mutex<Option<String>> = Mutex::new(None);
    thread::scope(|scope| {
        for _ in 0..threads.min(count) {
            scope.spawn(|| {
                while lock(&failed).is_none() {
                    let index = next.fetch_add(1, Relaxed);
                    if index >= count {
                        return;
                    }
                    match work(index) {
                        Ok(result) => lock(&done).push(result),
                        Err(why) => drop(lock(&failed).get_or_insert(why)),
                    }
                }
            });
        }
    });
    match lock(&failed).take() {
        Some(why) => Err(why),
        None => Ok(std::mem::take(&mut *lock(&done))),
    }
}

fn sleep_until(due: Instant) {
    thread::sleep(due.saturating_duration_since(Instant::now()));
}

/// For what announces itself to nobody: another process's figures, frames under way.
fn wait_until(within: Duration, mut ready: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + within;
    loop {
        if ready() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

// ============================================================================
// The hall: all calls, and those who speak and listen
// ============================================================================

/// One direction of the sound, in the order of [`Hall::ways`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Caller to agent.
    Up = 0,
    /// Agent to caller.
    Down = 1,
}

/// Everything that the calls of one stage share.
struct Hall {
    plan: Plan,
    is_floor: bool,
    backstage: Arc<Backstage>,
    /// Where the agents' join URLs lead.
    agents: OnceLock<String>,
    by_sid: Mutex<HashMap<String, Arc<Call>>>,
    /// The floor's next call, whose agent's leg is about to be opened.
    next_join: Mutex<Option<Arc<Call>>>,
    /// Who speaks when.
    slots: Vec<Mutex<Vec<Arc<Call>>>>,
    /// Legs on their way to the sweeper.
    swept: Mutex<Vec<Listener>>,
    standing_calls: AtomicUsize,
    window: Window,
    ways: [WayTally; 2],
    webhook: Histogram,
    first_audio: Histogram,
    clear: Histogram,
    lateness: Histogram,
    filed: AtomicUsize,
    /// HTTP connections that the bridge keeps for its next question.
    kept: AtomicUsize,
    troubles: Mutex<Vec<String>>,
    over: AtomicBool,
}

/// Frames sent in this time count for the delay, in nanoseconds of [`now_ns`].
struct Window {
    from_ns: AtomicU64,
    until_ns: AtomicU64,
}

impl Window {
    fn has(&self, at_ns: u64) -> bool {
        (self.from_ns.load(Relaxed)..self.until_ns.load(Relaxed)).contains(&at_ns)
    }
}

/// What became of the frames of one direction, over all calls.
#[derive(Default)]
struct WayTally {
    delay: Histogram,
    in_window: AtomicU64,
    late: AtomicU64,
    sent: AtomicU64,
    lost: AtomicU64,
    damaged: AtomicU64,
    out_of_order: AtomicU64,
}

impl WayTally {
    fn figures(&self) -> WayFigures {
        WayFigures {
            sent: self.sent.load(Relaxed),
            lost: self.lost.load(Relaxed),
            damaged: self.damaged.load(Relaxed),
            out_of_order: self.out_of_order.load(Relaxed),
            late: self.late.load(Relaxed),
            delay: self.delay.spread(),
        }
    }
}

type Settings = Vec<(String, String)>;

impl Hall {
    fn new(plan: &Plan, is_floor: bool) -> Hall {
        Hall {
            plan: plan.clone(),
            is_floor,
            backstage: Arc::default(),
            agents: OnceLock::new(),
            by_sid: Mutex::default(),
            next_join: Mutex::default(),
            slots: (0..SLOTS).map(|_| Mutex::default()).collect(),
            swept: Mutex::default(),
            standing_calls: AtomicUsize::new(0),
            window: Window {
                from_ns: AtomicU64::new(u64::MAX),
                until_ns: AtomicU64::new(u64::MAX),
            },
            ways: Default::default(),
            webhook: Histogram::default(),
            first_audio: Histogram::default(),
            clear: Histogram::default(),
            lateness: Histogram::default(),
            filed: AtomicUsize::new(0),
            kept: AtomicUsize::new(0),
            troubles: Mutex::default(),
            over: AtomicBool::new(false),
        }
    }

    /// Opens all doors, and gives the settings by which the bridge finds them.
    fn open(plan: &Plan, home: &Path) -> io::Result<(Arc<Hall>, Settings)> {
        let hall = Arc::new(Hall::new(plan, false));
        let certificate = if plan.tls { Some(make_certificate(Certificate::Good)?) } else { None };
        let (pem, tls) = certificate.unzip();
        let secure = if tls.is_some() { "s" } else { "" };

        let agents = hall.let_agents_in(tls.clone())?;
        moot(hall.agents.set(format!("ws{secure}://{agents}/join")));
        let n8n = hall.serve("n8n", None, Hall::n8n)?;
        let ultravox = hall.serve("ultravox", tls, Hall::ultravox)?;
        hall.start_speakers_and_sweeper()?;

        let mut settings: Settings = [
            ("BIND", "127.0.0.1"),
            ("PORT", "0"),
            ("PUBLIC_URL", PUBLIC_URL),
            ("ULTRAVOX_API_KEY", API_KEY),
            ("ULTRAVOX_API_URL", &format!("http{secure}://{ultravox}")),
            ("N8N_WEBHOOK_URL", &format!("http://{n8n}/webhook/call")),
            ("TWILIO_AUTH_TOKEN", AUTH_TOKEN),
            ("DATA_DIR", &home.join("data").to_string_lossy()),
            // While one call still files its transcript, the next may take its place.
            ("MAX_CALLS", &(plan.calls + plan.calls / 4 + 8).min(CALLS_MAX).to_string()),
            ("CALLS_PER_NUMBER_PER_HOUR", "100000"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
        if let Some(pem) = pem {
            let path = home.join("world.pem");
            fs::write(&path, pem)?;
            settings.push(("SSL_CERT_FILE".to_owned(), path.to_string_lossy().into_owned()));
        }
        Ok((hall, settings))
    }

    /// The floor needs to know only where the agents are.
    fn open_for_floor(plan: &Plan) -> io::Result<(Arc<Hall>, SocketAddr)> {
        let hall = Arc::new(Hall::new(plan, true));
        let agents = hall.let_agents_in(None)?;
        hall.start_speakers_and_sweeper()?;
        Ok((hall, agents))
    }

    /// The agents' door. Unlike [`Backstage::listen`] it does not end a line when its first thread
    /// leaves.
    fn let_agents_in(
        self: &Arc<Hall>,
        tls: Option<Arc<rustls::ServerConfig>>,
    ) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        self.backstage.board.change(|hands| hands.doors.push(address));
        let hall = Arc::clone(self);
        self.backstage.employ("agents", move || {
            for tcp in listener.incoming() {
                if hall.over.load(Relaxed) {
                    return;
                }
                // A line that does not come about is missed by the phone at its other end.
                let line = tcp.and_then(|tcp| {
                    tcp.set_nodelay(true)?;
                    tcp.set_write_timeout(Some(WRITE_WITHIN))?;
                    // Whoever knocks and says nothing is not waited for.
                    tcp.set_read_timeout(Some(PATIENCE))?;
                    Line::new(tcp, tls.as_ref())
                });
                let room = Arc::clone(&hall);
                moot(line.and_then(|line| {
                    hall.backstage.employ("agent", move || moot(room.join(line)))
                }));
            }
        })?;
        Ok(address)
    }

    fn start_speakers_and_sweeper(self: &Arc<Hall>) -> io::Result<()> {
        let hall = Arc::clone(self);
        self.backstage.employ("sweeper", move || hall.sweep())?;
        let pacers = self.plan.calls.div_ceil(CALLS_PER_PACER).min(SLOTS);
        for pacer in 0..pacers {
            for (way, name) in [(Way::Up, "pacer up"), (Way::Down, "pacer down")] {
                let hall = Arc::clone(self);
                let slots: Vec<usize> = (pacer..SLOTS).step_by(pacers).collect();
                self.backstage.employ(name, move || hall.pace(way, &slots))?;
            }
        }
        Ok(())
    }

    /// Speaks for the calls of these slots, each at its own point of the 20 ms.
    fn pace(&self, way: Way, slots: &[usize]) {
        let step = FRAME_TIME / u32::try_from(SLOTS).unwrap_or(1);
        // Fifty barge-ins a second in all, and not more than one in each call.
        let barge_in_every = self.plan.calls.min(self.plan.timed).max(50) as u64;
        let mut out = Vec::with_capacity(1_024);
        let mut round_begins = Instant::now();
        for round in 0_u64.. {
            sleep_until(round_begins);
            if self.over.load(Relaxed) {
                return;
            }
            if round_begins.elapsed() > BEHIND_MAX {
                round_begins = Instant::now();
            }
            for &slot in slots {
                // Both directions of a call at different times.
                let place = if way == Way::Up { slot } else { (slot + SLOTS / 2) % SLOTS };
                let Some(calls) = self.slots.get(place).filter(|calls| !lock(calls).is_empty())
                else {
                    continue;
                };
                let due = round_begins + step * u32::try_from(slot).unwrap_or(0);
                sleep_until(due);
                for call in lock(calls).iter() {
                    if self.window.has(now_ns()) {
                        self.lateness.note(due.elapsed());
                    }
                    let mut sent = self.speak(call, way, &mut out);
                    let barges_in = (round + u64::from(call.number)).is_multiple_of(barge_in_every);
                    let barges_in = barges_in && self.is_timed(call) && !self.is_floor;
                    if way == Way::Down && barges_in && sent.is_ok() {
                        sent = call.barge_in(&mut out);
                    }
                    if let Err(error) = sent {
                        self.trouble(format!("call {} cannot speak {way:?}: {error}", call.number));
                    }
                }
            }
            round_begins += FRAME_TIME;
        }
    }

    /// One frame: stamped, wrapped as the other side expects it, and written at once.
    fn speak(&self, call: &Call, way: Way, out: &mut Vec<u8>) -> io::Result<()> {
        let (route, line) = match way {
            Way::Up => (&call.up, call.phone.get()),
            Way::Down => (&call.down, call.agent.get()),
        };
        let Some(line) = line else { return Err(io::ErrorKind::NotConnected.into()) };
        let number = route.sent.fetch_add(1, Relaxed);
        let fault = self.plan.fault.filter(|_| way == Way::Up && number >= FAULT_EVERY);
        let phase = number % FAULT_EVERY;
        let sequence = match fault {
            Some(Fault::Lose) if phase == 0 => return Ok(()),
            Some(Fault::Swap) if phase < 2 => number ^ 1,
            _ => number,
        };
        let stamp = Stamp { leg: call.leg(way), sequence, sent_ns: now_ns() };
        let mut mulaw = stamp.sound();
        if fault == Some(Fault::Damage) && phase == 0 {
            mulaw[FRAME_BYTES / 2] ^= 0x10;
        }
        out.clear();
        match (way, self.is_floor) {
            (Way::Up, false) => write_media_of_twilio(out, call, number, &mulaw),
            (Way::Down, false) => write_message(out, BINARY, false, &pcm_frame(&mulaw)),
            // What the bridge would write: the floor reads it and writes it again.
            (Way::Up, true) => write_message(out, BINARY, true, &pcm_frame(&mulaw)),
            (Way::Down, true) => write_media_of_bridge(out, call, &mulaw),
        }
        line.write(out)
    }

    fn begin_talking(&self, call: &Arc<Call>) {
        self.standing_calls.fetch_add(1, Relaxed);
        lock(self.slot(call)).push(Arc::clone(call));
    }

    /// With a stride, so that a few calls are spread as evenly as many.
    fn slot(&self, call: &Call) -> &Mutex<Vec<Arc<Call>>> {
        let slot = (call.number as usize).wrapping_mul(37) % SLOTS;
        &self.slots[slot]
    }

    fn note_frame(&self, way: Way, stamp: &Stamp, at_ns: Option<u64>) {
        let tally = &self.ways[way as usize];
        // The greeting has waited for the phone, and on purpose.
        if stamp.sequence == 0 || !self.window.has(stamp.sent_ns) {
            return;
        }
        tally.in_window.fetch_add(1, Relaxed);
        let Some(at_ns) = at_ns else { return };
        let delay = Duration::from_nanos(at_ns.saturating_sub(stamp.sent_ns));
        tally.delay.note(delay);
        if delay > LATE {
            tally.late.fetch_add(1, Relaxed);
        }
    }

    fn trouble(&self, what: String) {
        let mut troubles = lock(&self.troubles);
        if troubles.len() < 10 && !self.over.load(Relaxed) {
            troubles.push(what);
        }
    }
}

/// One call, with its two lines.
struct Call {
    number: u32,
    sid: String,
    stream_sid: String,
    phone: OnceLock<Line>,
    agent: OnceLock<Line>,
    up: Route,
    down: Route,
    /// What n8n and Ultravox took for its questions, by their own clocks.
    stand_ins_ns: AtomicU64,
    start_sent_ns: AtomicU64,
    clear_sent_ns: AtomicU64,
    state: Board<CallState>,
}

#[derive(Default)]
struct Route {
    sent: AtomicU32,
    ear: Mutex<Ear>,
}

#[derive(Default)]
struct CallState {
    first_heard: bool,
    phone_over: bool,
    agent_over: bool,
}

impl Call {
    fn new(number: u32) -> Call {
        let call = Call {
            number,
            sid: format!("CA{}", random_hex(16)),
            stream_sid: format!("MZ{}", random_hex(16)),
            phone: OnceLock::new(),
            agent: OnceLock::new(),
            up: Route::default(),
            down: Route::default(),
            stand_ins_ns: AtomicU64::new(0),
            start_sent_ns: AtomicU64::new(0),
            clear_sent_ns: AtomicU64::new(0),
            state: Board::default(),
        };
        lock(&call.up.ear).leg = call.leg(Way::Up);
        lock(&call.down.ear).leg = call.leg(Way::Down);
        call
    }

    /// Tells the frames of all calls and directions apart.
    fn leg(&self, way: Way) -> u32 {
        (self.number << 1 | way as u32) & LEG_MAX
    }

    fn barge_in(&self, out: &mut Vec<u8>) -> io::Result<()> {
        let Some(agent) = self.agent.get() else { return Ok(()) };
        out.clear();
        write_message(out, TEXT, false, br#"{"type":"playback_clear_buffer"}"#);
        self.clear_sent_ns.store(now_ns(), Relaxed);
        agent.write(out)
    }
}

// ============================================================================
// A call's life
// ============================================================================

impl Hall {
    /// Rings the bridge as Twilio, and opens the stream. When this returns the caller has heard the
    /// agent's first frame.
    fn ring(self: &Arc<Hall>, bridge: SocketAddr, number: u32) -> Result<Arc<Call>, String> {
        let call = Arc::new(Call::new(number));
        lock(&self.by_sid).insert(call.sid.clone(), Arc::clone(&call));
        let outcome = self.ring_for(bridge, &call);
        if outcome.is_err() {
            lock(&self.by_sid).remove(&call.sid);
        }
        outcome.map(|()| call)
    }

    fn ring_for(self: &Arc<Hall>, bridge: SocketAddr, call: &Arc<Call>) -> Result<(), String> {
        // A thousand people call again and again, as in real life.
        let caller = format!("+4930{:06}", 100_000 + call.number % 1_000);
        let mut form = incoming_call_form(&caller);
        for (name, value) in &mut form {
            if name == "CallSid" {
                value.clone_from(&call.sid);
            }
        }
        let pairs: Vec<(&str, &str)> =
            form.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let answer = webhook(bridge, "/incoming-call", &pairs)?;
        let own = Duration::from_nanos(call.stand_ins_ns.load(Relaxed));
        self.webhook.note(answer.took.saturating_sub(own));
        let twiml = Twiml::read(&answer.text())?;
        if twiml.stream_url.is_none() {
            return Err(format!("the TwiML has no stream: {}", twiml.xml));
        }

        let line = Line::to(bridge).map_err(|error| format!("/media-stream: {error}"))?;
        let reader = upgrade_as_twilio(&line).map_err(|error| format!("upgrade: {error}"))?;
        let opening = opening_of_stream(call, &twiml);
        call.start_sent_ns.store(now_ns(), Relaxed);
        line.write(&opening).map_err(|error| format!("start: {error}"))?;
        self.listen_at_phone(call, line, reader.buffer())
    }

    /// The floor's calls have no beginning: a socket here, a socket there.
    fn connect_through_floor(
        self: &Arc<Hall>,
        floor: SocketAddr,
        number: u32,
    ) -> Result<Arc<Call>, String> {
        let call = Arc::new(Call::new(number));
        *lock(&self.next_join) = Some(Arc::clone(&call));
        let line = Line::to(floor).map_err(|error| error.to_string())?;
        self.listen_at_phone(&call, line, &[])?;
        Ok(call)
    }

    fn listen_at_phone(
        self: &Arc<Hall>,
        call: &Arc<Call>,
        line: Line,
        early: &[u8],
    ) -> Result<(), String> {
        moot(call.phone.set(line.clone()));
        let listener = Listener::new(call, Way::Down, line, early, self.is_timed(call));
        let hall = Arc::clone(self);
        self.backstage.employ("phone", move || hall.listen(listener)).map_err(|error| {
            format!("no thread ({error}): memory or processes (ulimit -u) ran out")
        })?;
        let heard = call
            .state
            .wait(PATIENCE, |state| (state.first_heard || state.phone_over).then_some(()));
        match heard {
            Some(()) if call.state.look(|state| !state.phone_over) => Ok(()),
            Some(()) => Err("the bridge closed the stream".to_owned()),
            None => Err(format!("the agent's first frame was not heard within {PATIENCE:?}")),
        }
    }

    /// A leg's own thread. It leaves when the line ends; a leg that is not timed it leaves to the
    /// sweeper, as soon as the first frame has been heard.
    fn listen(&self, mut listener: Listener) {
        loop {
            if !self.hear(&mut listener, now_ns()) {
                return listener.end();
            }
            let begun = listener.way == Way::Up || lock(&listener.call.down.ear).heard > 0;
            if !listener.is_timed && begun && listener.line.shared.tcp.set_nonblocking(true).is_ok()
            {
                return lock(&self.swept).push(listener);
            }
            if listener.inbox.fill(&mut listener.line).is_err() {
                return listener.end();
            }
        }
    }

    /// Reads for all legs that are not timed, several frames with one `read`. A thread that wakes
    /// for each frame, on both ends of each call, would cost as much as the bridge itself.
    fn sweep(&self) {
        let mut listeners = Vec::new();
        while !self.over.load(Relaxed) {
            listeners.append(&mut lock(&self.swept));
            listeners.retain_mut(|listener: &mut Listener| {
                let is_there = match listener.inbox.fill(&mut listener.line) {
                    Ok(()) => self.hear(listener, now_ns()),
                    Err(error) => error.kind() == io::ErrorKind::WouldBlock,
                };
                if !is_there {
                    listener.end();
                }
                is_there
            });
            thread::sleep(SWEEP_EVERY);
        }
    }

    /// All messages that have arrived. False: the last one was a goodbye, or nonsense.
    fn hear(&self, listener: &mut Listener, at_ns: u64) -> bool {
        let Listener { call, way, line, inbox, message, mulaw, is_timed } = listener;
        loop {
            let opcode = match inbox.next(message) {
                Ok(Some(opcode)) => opcode,
                Ok(None) => return true,
                Err(error) => {
                    self.trouble(format!("call {}: {way:?}: {error}", call.number));
                    return false;
                }
            };
            let at_ns = is_timed.then_some(at_ns);
            let masked = *way == Way::Down;
            let known = match (opcode, *way) {
                (TEXT, Way::Down) => self.hear_twilio_message(call, line, message, mulaw, at_ns),
                (BINARY, Way::Up) => {
                    self.hear_pcm(call, message, mulaw, at_ns);
                    Ok(())
                }
                (TEXT, Way::Up) => answer_ping(line, message),
                (PING, _) => answer(line, PONG, masked, message),
                (CLOSE, _) => {
                    moot(answer(line, CLOSE, masked, message));
                    return false;
                }
                _ => Err(format!("opcode {opcode}")),
            };
            if let Err(what) = known {
                self.trouble(format!("call {}: {way:?}: {what}", call.number));
            }
        }
    }

    fn hear_pcm(&self, call: &Call, pcm: &[u8], mulaw: &mut Vec<u8>, at_ns: Option<u64>) {
        mulaw.clear();
        let samples = pcm.chunks_exact(2);
        mulaw.extend(
            samples.map(|bytes| CODES[usize::from(u16::from_le_bytes([bytes[0], bytes[1]]))]),
        );
        lock(&call.up.ear).hear(mulaw, |stamp| self.note_frame(Way::Up, stamp, at_ns));
    }

    fn hear_twilio_message(
        &self,
        call: &Call,
        line: &Line,
        message: &[u8],
        mulaw: &mut Vec<u8>,
        at_ns: Option<u64>,
    ) -> Result<(), String> {
        let message: ToTwilio =
            serde_json::from_slice(message).map_err(|error| format!("no such message: {error}"))?;
        if message.stream_sid != call.stream_sid {
            return Err(format!("the streamSid {}", message.stream_sid));
        }
        match (message.event, message.media, message.mark) {
            ("media", Some(media), None) => {
                mulaw.clear();
                BASE64.decode_vec(media.payload, mulaw).map_err(|error| error.to_string())?;
                let mut ear = lock(&call.down.ear);
                ear.hear(mulaw, |stamp| self.note_frame(Way::Down, stamp, at_ns));
                let is_first = ear.heard == 1;
                drop(ear);
                if is_first {
                    self.first_frame(call);
                }
                Ok(())
            }
            ("clear", None, None) => {
                let sent = call.clear_sent_ns.swap(0, Relaxed);
                if let Some(at_ns) = at_ns.filter(|_| self.window.has(sent)) {
                    self.clear.note(Duration::from_nanos(at_ns.saturating_sub(sent)));
                }
                Ok(())
            }
            // Played out it is at once: these agents do not speak ahead.
            ("mark", None, Some(mark)) => {
                let echo = json!({"event": "mark", "streamSid": call.stream_sid,
                    "sequenceNumber": "0", "mark": {"name": mark.name}});
                answer(line, TEXT, true, echo.to_string().as_bytes())
            }
            (event, _, _) => Err(format!("the event {event:?}")),
        }
    }

    fn first_frame(&self, call: &Call) {
        let waited = now_ns().saturating_sub(call.start_sent_ns.load(Relaxed));
        if !self.is_floor {
            self.first_audio.note(Duration::from_nanos(waited));
        }
        call.state.change(|state| state.first_heard = true);
    }

    /// One connection to the agents' door, from the upgrade to the end.
    fn join(&self, line: Line) -> io::Result<()> {
        if self.is_floor {
            return self.join_floor(line);
        }
        let mut reader = line.reader();
        let (request, headers) = read_head(&mut reader)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let sid = request.split(['/', '?', ' ']).find(|word| word.starts_with("CA"));
        let call = lock(&self.by_sid).get(sid.unwrap_or_default()).cloned();
        let key = find_header(&headers, "sec-websocket-key").unwrap_or_default();
        let Some(call) = call.filter(|call| call.agent.get().is_none()) else {
            return line.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
        };
        let upgrade = format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Accept: {}\r\n\r\n",
            derive_accept_key(key.as_bytes())
        );
        line.write(upgrade.as_bytes())?;
        let mut out = Vec::new();
        let heard = transcript("agent", 0, &json!(FIRST_MESSAGE), &json!(null), true);
        for data in [json!({"type": "call_started", "callId": call.sid}), heard] {
            write_message(&mut out, TEXT, false, data.to_string().as_bytes());
        }
        line.write(&out)?;
        self.greet_and_listen(&call, line, reader.buffer())
    }

    fn join_floor(&self, line: Line) -> io::Result<()> {
        let call = lock(&self.next_join).take().ok_or(io::ErrorKind::NotConnected)?;
        self.greet_and_listen(&call, line, &[])
    }

    fn greet_and_listen(&self, call: &Arc<Call>, line: Line, early: &[u8]) -> io::Result<()> {
        moot(call.agent.set(line.clone()));
        // The greeting. It waits in a socket until the stream is open.
        self.speak(call, Way::Down, &mut Vec::new())?;
        self.listen(Listener::new(call, Way::Up, line, early, self.is_timed(call)));
        Ok(())
    }

    /// Calls of which every frame is timed, and which barge in. Of the others every frame is
    /// looked at, but later.
    fn is_timed(&self, call: &Call) -> bool {
        let stride = self.plan.calls.div_ceil(self.plan.timed.max(1));
        (call.number as usize).is_multiple_of(stride.max(1))
    }

    /// Ends a call: by turns the caller and the agent hang up. What is under way arrives before.
    fn hang_up(&self, bridge: SocketAddr, call: &Arc<Call>) -> Result<(), String> {
        lock(self.slot(call)).retain(|other| !Arc::ptr_eq(other, call));
        let routes = [&call.up, &call.down];
        // Late is not lost: as long as something comes, there is more.
        let missing = || {
            let missing = routes.iter().map(|route| {
                u64::from(route.sent.load(Relaxed)).saturating_sub(lock(&route.ear).heard)
            });
            missing.sum::<u64>()
        };
        let mut left = missing();
        while left > 0 {
            if !wait_until(DRAIN_WITHIN, || missing() < left) {
                break;
            }
            left = missing();
        }
        for (route, tally) in routes.into_iter().zip(&self.ways) {
            let ear = lock(&route.ear);
            let sent = u64::from(route.sent.load(Relaxed));
            tally.sent.fetch_add(sent, Relaxed);
            tally.lost.fetch_add(sent.saturating_sub(ear.heard), Relaxed);
            tally.damaged.fetch_add(ear.damaged, Relaxed);
            tally.out_of_order.fetch_add(ear.out_of_order, Relaxed);
        }
        let (Some(phone), Some(agent)) = (call.phone.get(), call.agent.get()) else {
            return Err("it has no lines".to_owned());
        };
        let by_caller = call.number.is_multiple_of(2);
        if self.is_floor {
            phone.shut();
        } else if by_caller {
            let stop = json!({"event": "stop", "streamSid": call.stream_sid,
                "sequenceNumber": "0", "stop": {"callSid": call.sid}});
            moot(answer(phone, TEXT, true, stop.to_string().as_bytes()));
            moot(answer(phone, CLOSE, true, &NORMAL_CLOSE));
        } else {
            moot(answer(agent, CLOSE, false, &NORMAL_CLOSE));
        }
        let over =
            call.state.wait(PATIENCE, |state| (state.phone_over && state.agent_over).then_some(()));
        lock(&self.by_sid).remove(&call.sid);
        self.standing_calls.fetch_sub(1, Relaxed);
        if over.is_none() {
            return Err(format!("its lines did not end within {PATIENCE:?}"));
        }
        if self.is_floor {
            return Ok(());
        }
        let status = if by_caller { "completed" } else { "in-progress" };
        let form = [
            ("CallSid", call.sid.as_str()),
            ("To", OUR_NUMBER),
            ("CallStatus", status),
            ("Direction", "inbound"),
        ];
        webhook(bridge, "/stream-ended", &form).map(drop)
    }
}

fn webhook(
    bridge: SocketAddr,
    path: &str,
    form: &[(&str, &str)],
) -> Result<super::HttpAnswer, String> {
    let signature = twilio_signature(AUTH_TOKEN, &format!("{PUBLIC_URL}{path}"), form);
    let headers = [
        ("User-Agent", "TwilioProxy/1.1"),
        ("I-Twilio-Idempotency-Token", &random_uuid()),
        ("Content-Type", "application/x-www-form-urlencoded; charset=UTF-8"),
        ("X-Twilio-Signature", signature.as_str()),
    ];
    let answer = http_exchange(bridge, "POST", path, &headers, form_body(form).as_bytes())
        .map_err(|error| format!("{path}: {error}"))?;
    match answer.status {
        200 => Ok(answer),
        status => Err(format!("{path} was answered {status}: {}", answer.text())),
    }
}

/// The upgrade, and a reader that has not lost what came right behind it.
fn upgrade_as_twilio(line: &Line) -> io::Result<BufReader<Line>> {
    let url = format!("{}/media-stream", PUBLIC_URL.replacen("http", "ws", 1));
    let request = format!(
        "GET /media-stream HTTP/1.1\r\nHost: bridge.example\r\nUser-Agent: Twilio.TmeWs/1.0\r\n\
         Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: {}\r\nX-Twilio-Signature: {}\r\n\r\n",
        tungstenite::handshake::client::generate_key(),
        twilio_signature(AUTH_TOKEN, &url, &[]),
    );
    line.write(request.as_bytes())?;
    let mut reader = line.reader();
    let (status, _) = read_head(&mut reader)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    if status.split(' ').nth(1) == Some("101") {
        Ok(reader)
    } else {
        Err(io::Error::other(format!("answered {status:?}")))
    }
}

fn opening_of_stream(call: &Call, twiml: &Twiml) -> Vec<u8> {
    let parameters: serde_json::Map<String, Value> =
        twiml.parameters.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
    let start = json!({
        "event": "start",
        "sequenceNumber": "1",
        "start": {
            "accountSid": super::ACCOUNT_SID,
            "streamSid": call.stream_sid,
            "callSid": call.sid,
            "tracks": ["inbound"],
            "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1},
            "customParameters": parameters,
        },
        "streamSid": call.stream_sid,
    });
    let connected = br#"{"event":"connected","protocol":"Call","version":"1.0.0"}"#;
    let mut out = Vec::new();
    write_message(&mut out, TEXT, true, connected);
    write_message(&mut out, TEXT, true, start.to_string().as_bytes());
    out
}

// ============================================================================
// n8n and Ultravox's REST API
// ============================================================================

/// A request of the bridge, as far as anybody here looks at it.
struct Question {
    at: Instant,
    is_post: bool,
    body: Vec<u8>,
}

impl Hall {
    /// Opens a door for HTTP, a thread per connection, kept alive until the bridge lets go.
    fn serve(
        self: &Arc<Hall>,
        name: &'static str,
        tls: Option<Arc<rustls::ServerConfig>>,
        answer: fn(&Hall, &Question) -> Reply,
    ) -> io::Result<SocketAddr> {
        let hall = Arc::clone(self);
        self.backstage.listen(name, move |tcp| {
            hall.kept.fetch_add(1, Relaxed);
            let served = Line::new(tcp, tls.as_ref()).and_then(|line| hall.converse(&line, answer));
            // A connection that ends between two requests, or in one, is the bridge's right.
            moot(served);
            hall.kept.fetch_sub(1, Relaxed);
        })
    }

    fn converse(&self, line: &Line, answer: fn(&Hall, &Question) -> Reply) -> io::Result<()> {
        let mut reader = line.reader();
        while let Some((first, headers)) = read_head(&mut reader)? {
            let body = read_body(&mut reader, &headers, false)?;
            let is_post = first.starts_with("POST ");
            let question = Question { at: Instant::now(), is_post, body };
            match answer(self, &question) {
                Reply::Answer(answer) => line.write(&answer.bytes())?,
                Reply::Hang | Reply::Reset => return Ok(()),
            }
        }
        Ok(())
    }

    fn n8n(&self, question: &Question) -> Reply {
        let body: Value = serde_json::from_slice(&question.body).unwrap_or_default();
        if !question.is_post {
            // The bridge only keeps its connection warm.
            return Reply::json(200, &json!({}));
        }
        if body["route"] == "2" {
            self.filed.fetch_add(1, Relaxed);
            return Reply::json(200, &json!({}));
        }
        thread::sleep(N8N_TAKES);
        self.note_own_time(&body["callSid"], question);
        Reply::json(200, &json!({"firstMessage": FIRST_MESSAGE}))
    }

    fn ultravox(&self, question: &Question) -> Reply {
        let body: Value = serde_json::from_slice(&question.body).unwrap_or_default();
        let sid = &body["metadata"]["callSid"];
        if !question.is_post {
            // Is there room for a call? There always is.
            return Reply::json(200, &json!({"allowedConcurrentCalls": null}));
        }
        thread::sleep(ULTRAVOX_TAKES);
        let agents = self.agents.get().map(String::as_str).unwrap_or_default();
        let join_url = format!("{agents}/{}?token={}", sid.as_str().unwrap_or("?"), random_hex(16));
        let reply = json!({"callId": random_uuid(), "created": "2026-11-22T10:00:00.000000Z",
            "joinUrl": join_url, "metadata": body["metadata"]});
        self.note_own_time(sid, question);
        Reply::json(201, &reply)
    }

    fn note_own_time(&self, sid: &Value, question: &Question) {
        if let Some(call) = lock(&self.by_sid).get(sid.as_str().unwrap_or_default()) {
            let own = u64::try_from(question.at.elapsed().as_nanos()).unwrap_or(u64::MAX);
            call.stand_ins_ns.fetch_add(own, Relaxed);
        }
    }
}

// ============================================================================
// Sound with a stamp
// ============================================================================

/// What a frame says of itself, in digits of six bits. As mu-law codes they are 0x80 to 0xBF, which
/// come back from PCM as they went; 0x7F does not (it is a second zero), and 0xFF is silence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    leg: u32,
    sequence: u32,
    sent_ns: u64,
}

const LEG_DIGITS: usize = 4;
const SEQUENCE_DIGITS: usize = 5;
const TIME_DIGITS: usize = 10;
const CHECK_DIGITS: usize = 3;
const STAMP_BYTES: usize = LEG_DIGITS + SEQUENCE_DIGITS + TIME_DIGITS + CHECK_DIGITS;
const FILL_BYTES: usize = FRAME_BYTES - STAMP_BYTES;
const LEG_MAX: u32 = (1 << (6 * LEG_DIGITS)) - 1;
const FILL_FROM: usize = 8_000;

/// The sound behind the stamps. Where a frame's begins depends on its number.
static FILL: LazyLock<Vec<u8>> = LazyLock::new(|| voice(7, 1_100));

/// From a PCM sample to its mu-law code; 0x7F for those that no code stands for.
static CODES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut codes = vec![0x7F; 1 << 16];
    for code in 0..=u8::MAX {
        let sample = mulaw_to_pcm(code);
        if let Some(place) = codes.get_mut(usize::from(sample.cast_unsigned())) {
            *place = code;
        }
    }
    codes
});

impl Stamp {
    fn sound(&self) -> [u8; FRAME_BYTES] {
        let mut frame = [0; FRAME_BYTES];
        let fields = [
            (u64::from(self.leg), LEG_DIGITS),
            (u64::from(self.sequence), SEQUENCE_DIGITS),
            (self.sent_ns, TIME_DIGITS),
            (self.check(), CHECK_DIGITS),
        ];
        let (stamp, fill) = frame.split_at_mut(STAMP_BYTES);
        let mut digits = stamp.iter_mut();
        for (mut value, count) in fields {
            for digit in digits.by_ref().take(count) {
                *digit = 0x80 | (value & 0x3F) as u8;
                value >>= 6;
            }
        }
        fill.copy_from_slice(self.fill());
        frame
    }

    /// The stamp, if there is one.
    fn read(frame: &[u8]) -> Option<Stamp> {
        let mut digits = frame.get(..STAMP_BYTES)?.iter();
        if frame.iter().take(STAMP_BYTES).any(|digit| digit & 0xC0 != 0x80) {
            return None;
        }
        let mut field = |count: usize| {
            let places = (0..count).map(|place| 6 * place);
            let digits = digits.by_ref().zip(places);
            digits.fold(0, |value, (digit, place)| value | u64::from(digit & 0x3F) << place)
        };
        let stamp = Stamp {
            leg: u32::try_from(field(LEG_DIGITS)).ok()?,
            sequence: u32::try_from(field(SEQUENCE_DIGITS)).ok()?,
            sent_ns: field(TIME_DIGITS),
        };
        (field(CHECK_DIGITS) == stamp.check()).then_some(stamp)
    }

    fn check(&self) -> u64 {
        let mixed = (u64::from(self.leg) << 32 | u64::from(self.sequence)) ^ self.sent_ns;
        mixed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - 6 * CHECK_DIGITS)
    }

    fn fill(&self) -> &'static [u8] {
        let number = self.leg as usize * 7_919 + self.sequence as usize * 131;
        let from = number % FILL_FROM;
        &FILL[from..from + FILL_BYTES]
    }
}

/// Judges the frames of one direction of one call. They come as a stream: how they are cut into
/// messages is the bridge's affair.
#[derive(Default)]
struct Ear {
    leg: u32,
    next: u32,
    heard: u64,
    damaged: u64,
    out_of_order: u64,
    /// The beginning of a frame.
    pending: Vec<u8>,
    /// The place where a frame begins is not known.
    is_lost: bool,
}

impl Ear {
    fn hear(&mut self, mulaw: &[u8], mut note: impl FnMut(&Stamp)) {
        let mut pending = std::mem::take(&mut self.pending);
        let mut rest = if pending.is_empty() {
            mulaw
        } else {
            pending.extend_from_slice(mulaw);
            &pending
        };
        loop {
            // The bridge's own silence, for an agent who must not be left without sound.
            let silence = rest.iter().take_while(|code| **code == 0xFF).count();
            rest = &rest[silence..];
            let Some((frame, behind)) = rest.split_at_checked(FRAME_BYTES) else { break };
            if let Some(stamp) = Stamp::read(frame).filter(|stamp| stamp.leg == self.leg) {
                self.is_lost = false;
                self.judge(&stamp, frame);
                note(&stamp);
                rest = behind;
            } else {
                self.damaged += u64::from(!self.is_lost);
                self.is_lost = true;
                let found = (1..rest.len()).find(|at| Stamp::read(&rest[*at..]).is_some());
                rest = &rest[found.unwrap_or(rest.len() - STAMP_BYTES + 1)..];
            }
        }
        self.pending = rest.to_vec();
    }

    fn judge(&mut self, stamp: &Stamp, frame: &[u8]) {
        self.heard += 1;
        self.damaged += u64::from(&frame[STAMP_BYTES..] != stamp.fill());
        self.out_of_order += u64::from(stamp.sequence < self.next);
        self.next = self.next.max(stamp.sequence + 1);
    }
}

// ============================================================================
// Lines and messages
// ============================================================================

/// A socket, plain or behind TLS: read by one thread, written by several. Clones are the same line.
#[derive(Clone)]
struct Line {
    shared: Arc<LineState>,
}

struct LineState {
    tcp: TcpStream,
    tls: Option<Mutex<rustls::ServerConnection>>,
    /// Messages leave in one piece.
    turn: Mutex<()>,
}

impl Line {
    fn new(tcp: TcpStream, tls: Option<&Arc<rustls::ServerConfig>>) -> io::Result<Line> {
        let tls = match tls {
            None => None,
            Some(config) => Some(Mutex::new(
                rustls::ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?,
            )),
        };
        Ok(Line { shared: Arc::new(LineState { tcp, tls, turn: Mutex::default() }) })
    }

    /// A phone's. There is always sound on it, so silence is its end.
    fn to(address: SocketAddr) -> io::Result<Line> {
        let tcp = connect(address)?;
        tcp.set_read_timeout(Some(PATIENCE))?;
        Line::new(tcp, None)
    }

    fn reader(&self) -> BufReader<Line> {
        BufReader::with_capacity(4 * 1_024, self.clone())
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let LineState { tcp, tls, turn } = &*self.shared;
        let turn = lock(turn);
        if let Some(tls) = tls {
            let mut tls = lock(tls);
            tls.writer().write_all(bytes)?;
            return say_in_tls(&mut tls, tcp);
        }
        let written = (&mut &*tcp).write_all(bytes);
        drop(turn);
        written
    }

    fn shut(&self) {
        moot(self.shared.tcp.shutdown(Shutdown::Both));
    }
}

impl Read for Line {
    /// Waits on the bare socket, with no lock held.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let LineState { tcp, tls, .. } = &*self.shared;
        let Some(tls) = tls else { return (&mut &*tcp).read(buffer) };
        let mut chunk = [0; 4 * 1_024];
        loop {
            match lock(tls).reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read,
            }
            let count = (&mut &*tcp).read(&mut chunk)?;
            let mut sealed = chunk.get(..count).unwrap_or_default();
            if sealed.is_empty() {
                return Ok(0);
            }
            let mut tls = lock(tls);
            while !sealed.is_empty() {
                tls.read_tls(&mut sealed)?;
                let state = tls.process_new_packets();
                // Even a failed handshake has something to say: why.
                say_in_tls(&mut tls, tcp)?;
                state.map_err(io::Error::other)?;
            }
        }
    }
}

fn say_in_tls(tls: &mut rustls::ServerConnection, tcp: &TcpStream) -> io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(&mut &*tcp)?;
    }
    Ok(())
}

const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;
const NORMAL_CLOSE: [u8; 2] = 1_000_u16.to_be_bytes();
/// Whoever called masks what it sends. With what, is its affair.
const MASK: [u8; 4] = [0x37, 0xFA, 0x21, 0x3D];

/// One WebSocket message (RFC 6455, 5.2), appended.
fn write_message(out: &mut Vec<u8>, opcode: u8, masked: bool, payload: &[u8]) {
    let mask_bit = if masked { 0x80 } else { 0 };
    out.push(0x80 | opcode);
    match (u8::try_from(payload.len()), u16::try_from(payload.len())) {
        (Ok(length), _) if length < 126 => out.push(mask_bit | length),
        (_, Ok(length)) => {
            out.push(mask_bit | 0x7E);
            out.extend_from_slice(&length.to_be_bytes());
        }
        _ => {
            out.push(mask_bit | 0x7F);
            out.extend_from_slice(&(payload.len() as u64).to_be_bytes());
        }
    }
    if masked {
        out.extend_from_slice(&MASK);
        out.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    } else {
        out.extend_from_slice(payload);
    }
}

/// One leg of a call, as far as it is listened to.
struct Listener {
    call: Arc<Call>,
    way: Way,
    line: Line,
    inbox: Inbox,
    message: Vec<u8>,
    mulaw: Vec<u8>,
    is_timed: bool,
}

impl Listener {
    /// `early` is what came right behind the upgrade.
    fn new(call: &Arc<Call>, way: Way, line: Line, early: &[u8], is_timed: bool) -> Listener {
        let inbox = Inbox { bytes: early.to_vec(), understood: 0 };
        let call = Arc::clone(call);
        Listener { call, way, line, inbox, message: Vec::new(), mulaw: Vec::new(), is_timed }
    }

    fn end(&mut self) {
        self.line.shut();
        self.call.state.change(|state| match self.way {
            Way::Up => state.agent_over = true,
            Way::Down => state.phone_over = true,
        });
    }
}

/// Bytes off a line, and the messages in them.
struct Inbox {
    bytes: Vec<u8>,
    understood: usize,
}

impl Inbox {
    /// One `read`. The end of the line is an error.
    fn fill(&mut self, line: &mut Line) -> io::Result<()> {
        let mut chunk = [0; 4 * 1_024];
        let count = line.read(&mut chunk)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.bytes.drain(..self.understood);
        self.understood = 0;
        self.bytes.extend_from_slice(&chunk[..count]);
        Ok(())
    }

    /// The next whole message and its opcode. The bridge sends every message in one piece.
    fn next(&mut self, payload: &mut Vec<u8>) -> io::Result<Option<u8>> {
        let rest = &self.bytes[self.understood..];
        let Some((&[first, second], behind)) = rest.split_first_chunk() else { return Ok(None) };
        let (length, behind) = match second & 0x7F {
            126 => match behind.split_first_chunk() {
                Some((length, behind)) => (u64::from(u16::from_be_bytes(*length)), behind),
                None => return Ok(None),
            },
            127 => match behind.split_first_chunk() {
                Some((length, behind)) => (u64::from_be_bytes(*length), behind),
                None => return Ok(None),
            },
            length => (u64::from(length), behind),
        };
        let (mask, behind) = match (second & 0x80, behind.split_first_chunk()) {
            (0, _) => ([0; 4], behind),
            (_, Some((mask, behind))) => (*mask, behind),
            (_, None) => return Ok(None),
        };
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > 1 << 20 || first & 0x80 == 0 {
            return Err(io::Error::other("a message of more than 1 MiB, or in pieces"));
        }
        let Some((body, behind)) = behind.split_at_checked(length) else { return Ok(None) };
        payload.clear();
        payload.extend(body.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        self.understood = self.bytes.len() - behind.len();
        Ok(Some(first & 0x0F))
    }
}

/// A `ping`, if the machine has kept the agent from speaking for seconds.
fn answer_ping(line: &Line, text: &[u8]) -> Result<(), String> {
    let text: Value = serde_json::from_slice(text).unwrap_or_default();
    let pong = json!({"type": "pong", "timestamp": text["timestamp"]});
    answer(line, TEXT, false, pong.to_string().as_bytes())
}

fn answer(line: &Line, opcode: u8, masked: bool, payload: &[u8]) -> Result<(), String> {
    let mut out = Vec::with_capacity(payload.len() + 14);
    write_message(&mut out, opcode, masked, payload);
    line.write(&out).map_err(|error| error.to_string())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ToTwilio<'a> {
    event: &'a str,
    #[serde(rename = "streamSid")]
    stream_sid: &'a str,
    #[serde(borrow)]
    media: Option<Media<'a>>,
    #[serde(borrow)]
    mark: Option<Mark<'a>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Media<'a> {
    payload: &'a str,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mark<'a> {
    name: &'a str,
}

fn write_media_of_twilio(out: &mut Vec<u8>, call: &Call, number: u32, mulaw: &[u8]) {
    let mut text = String::with_capacity(512);
    let (sequence, chunk, timestamp) = (number + 2, number + 1, 155 + 20 * u64::from(number));
    // A String takes all that is written to it.
    moot(write!(
        text,
        "{{\"event\":\"media\",\"sequenceNumber\":\"{sequence}\",\"media\":{{\
         \"track\":\"inbound\",\"chunk\":\"{chunk}\",\"timestamp\":\"{timestamp}\",\
         \"payload\":\""
    ));
    BASE64.encode_string(mulaw, &mut text);
    moot(write!(text, "\"}},\"streamSid\":\"{}\"}}", call.stream_sid));
    write_message(out, TEXT, true, text.as_bytes());
}

fn write_media_of_bridge(out: &mut Vec<u8>, call: &Call, mulaw: &[u8]) {
    let mut text = String::with_capacity(512);
    moot(write!(
        text,
        "{{\"event\":\"media\",\"streamSid\":\"{}\",\"media\":{{\"payload\":\"",
        call.stream_sid
    ));
    BASE64.encode_string(mulaw, &mut text);
    text.push_str("\"}}");
    write_message(out, TEXT, false, text.as_bytes());
}

fn pcm_frame(mulaw: &[u8]) -> [u8; 2 * FRAME_BYTES] {
    let mut pcm = [0; 2 * FRAME_BYTES];
    for (sample, code) in pcm.chunks_exact_mut(2).zip(mulaw) {
        sample.copy_from_slice(&mulaw_to_pcm(*code).to_le_bytes());
    }
    pcm
}

// ============================================================================
// The floor
// ============================================================================

/// The child process of [`Stage::floor`]: for every connection one to the agents, and two threads
/// that copy. It ends when nobody holds its stdin any more.
fn be_the_floor(agents: &str) -> io::Result<()> {
    let agents: SocketAddr = agents.parse().map_err(io::Error::other)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    writeln!(io::stderr(), "listening on {}", listener.local_addr()?)?;
    spawn("floor", move || {
        for caller in listener.incoming() {
            // A leg that does not come about is missed at the phone.
            moot(caller.and_then(|caller| copy_both_ways(caller, agents)));
        }
    })?;
    io::copy(&mut io::stdin(), &mut io::sink()).map(drop)
}

fn copy_both_ways(caller: TcpStream, agents: SocketAddr) -> io::Result<()> {
    caller.set_nodelay(true)?;
    let caller = Arc::new(caller);
    let agent = Arc::new(connect(agents)?);
    for (from, to) in [(&caller, &agent), (&agent, &caller)] {
        let (from, to) = (Arc::clone(from), Arc::clone(to));
        thread::Builder::new().stack_size(64 * 1_024).spawn(move || {
            let mut chunk = [0; 4 * 1_024];
            while let Ok(count) = (&*from).read(&mut chunk)
                && count > 0
                && (&*to).write_all(chunk.get(..count).unwrap_or_default()).is_ok()
            {}
            for socket in [&from, &to] {
                moot(socket.shutdown(Shutdown::Both));
            }
        })?;
    }
    Ok(())
}

/// A child process that says on stderr where it listens. Killed when dropped.
struct Process {
    running: Option<Running>,
    pid: u32,
    started: Instant,
    address: SocketAddr,
    log: ChildLog,
}

impl Process {
    fn launch(mut command: Command, log: &ChildLog) -> Result<Process, String> {
        const LISTENING: &str = "listening on 127.0.0.1:";
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let seen = log.len();
        let started = Instant::now();
        let running = log
            .begin(command)
            .map_err(|error| format!("the program cannot be started again: {error}"))?;
        let mut child = Process {
            pid: running.child.id(),
            running: Some(running),
            started,
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            log: log.clone(),
        };
        let port = log.book.wait(PATIENCE, |book| {
            let mut lines = book.lines.iter().skip(seen);
            let line = lines.find_map(|line| line.split_once(LISTENING));
            let digits = line
                .map(|(_, port)| port.chars().take_while(char::is_ascii_digit).collect::<String>());
            digits.map(Ok).or_else(|| book.ended.then_some(Err(())))
        });
        match port {
            Some(Ok(port)) => child.address.set_port(port.parse().unwrap_or(0)),
            Some(Err(())) => return Err(child.trouble("it ended before it listened")),
            None => return Err(child.trouble("it does not say where it listens")),
        }
        Ok(child)
    }

    /// What went wrong, with the last lines of the child's log.
    fn trouble(&self, what: &str) -> String {
        self.log.trouble(what).with_log()
    }

    fn end(&mut self) {
        let Some(mut running) = self.running.take() else { return };
        // It may have ended by itself.
        moot(running.child.kill());
        moot(running.child.wait());
        moot(running.listener.join());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

// ============================================================================
// Churn: calls come and go
// ============================================================================

/// What was left of all the calls that had come and gone.
#[derive(Clone, Debug)]
pub struct Churn {
    pub calls: usize,
    pub call_lasts: Duration,
    /// Memory over the time at full house, KiB a minute by least squares, and its standard error.
    pub slope: f64,
    pub slope_error: f64,
    pub samples: usize,
    pub before: Vitals,
    pub after: Vitals,
    /// HTTP connections to n8n and Ultravox that the server keeps for its next call.
    pub kept: usize,
}

impl Churn {
    /// Descriptors that belong to nobody any more.
    fn descriptors_left(&self) -> i64 {
        difference(self.after.descriptors, self.before.descriptors)
    }

    fn threads_left(&self) -> i64 {
        difference(self.after.threads, self.before.threads)
    }
}

fn difference(after: usize, before: usize) -> i64 {
    i64::try_from(after).unwrap_or(i64::MAX) - i64::try_from(before).unwrap_or(i64::MAX)
}

fn measure_churn(plan: &Plan) -> Result<(Figures, Churn), String> {
    let stage = Stage::bridge(plan)?;
    // At most twenty a second begin: the machine is to carry calls, not only to answer them.
    let call_lasts = Duration::from_millis(3_000.max(plan.calls as u64 * 1_000 / 20));
    let lines: Vec<Mutex<Option<Arc<Call>>>> =
        stage.dial_all()?.into_iter().map(|call| Mutex::new(Some(call))).collect();
    let dialled = AtomicU32::new(u32::try_from(lines.len()).unwrap_or(u32::MAX));
    let began = Instant::now();
    let until = began + WARM_UP + Duration::from_secs(plan.seconds);
    let due = |line: usize| began + call_lasts.mul_f64((line + 1) as f64 / lines.len() as f64);
    let agenda: BinaryHeap<_> = (0..lines.len()).map(|line| Reverse((due(line), line))).collect();
    let agenda = Mutex::new(agenda);

    let replace_calls = || -> Result<(), String> {
        loop {
            let next = lock(&agenda).pop();
            let Some(Reverse((due, line))) = next.filter(|Reverse((due, _))| *due < until) else {
                return Ok(());
            };
            sleep_until(due);
            let Some(place) = lines.get(line) else { return Ok(()) };
            let ended = lock(place).take();
            ended.map_or(Ok(()), |call| stage.hang_up(&call))?;
            let call = stage.dial(dialled.fetch_add(1, Relaxed))?;
            stage.hall.begin_talking(&call);
            *lock(place) = Some(call);
            lock(&agenda).push(Reverse((due + call_lasts, line)));
        }
    };
    let mut samples = Vec::new();
    let (mut figures, replaced) = thread::scope(|scope| {
        let diallers: Vec<_> = (0..DIALLERS).map(|_| scope.spawn(replace_calls)).collect();
        let standing: Vec<Arc<Call>> = Vec::new();
        let figures = stage.talk(&standing, Duration::from_secs(plan.seconds), || {
            while Instant::now() + Duration::from_secs(1) < until {
                thread::sleep(Duration::from_secs(1));
                // The first generation still fills caches and pools.
                if began.elapsed() > call_lasts
                    && let Ok(vitals) = stage.vitals()
                {
                    samples.push((began.elapsed().as_secs_f64() / 60.0, vitals.rss_kib as f64));
                }
            }
        });
        let ended = diallers.into_iter().map(|dialler| match dialler.join() {
            Ok(outcome) => outcome,
            Err(_) => Err("a dialler has panicked".to_owned()),
        });
        (figures, ended.collect::<Result<Vec<()>, String>>())
    });
    replaced?;
    let standing = lines.iter().filter_map(|line| lock(line).take()).collect();
    stage.hang_up_all(standing)?;
    let calls = dialled.load(Relaxed) as usize;
    stage.settle_parcels(calls);
    if let Ok(figures) = &mut figures {
        figures.calls = plan.calls;
        stage.conclude(figures);
    }
    let (slope, slope_error) = least_squares(&samples);
    let mut churn = Churn {
        calls,
        call_lasts,
        slope,
        slope_error,
        samples: samples.len(),
        before: stage.rest,
        after: stage.rest,
        kept: 0,
    };
    wait_until(SETTLE_WITHIN, || {
        churn.kept = stage.hall.kept.load(Relaxed);
        churn.after = stage.vitals().unwrap_or(churn.after);
        churn.descriptors_left() == 0 && churn.threads_left() == 0
    });
    Ok((figures?, churn))
}

/// The slope of a line through these points, and its standard error.
fn least_squares(points: &[(f64, f64)]) -> (f64, f64) {
    let count = points.len() as f64;
    if points.len() < 3 {
        return (0.0, f64::INFINITY);
    }
    let mean_x = points.iter().map(|(x, _)| x).sum::<f64>() / count;
    let mean_y = points.iter().map(|(_, y)| y).sum::<f64>() / count;
    let spread: f64 = points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    let common: f64 = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    let slope = common / spread;
    let residue = |(x, y): &(f64, f64)| (y - mean_y - slope * (x - mean_x)).powi(2);
    let error = points.iter().map(residue).sum::<f64>() / (count - 2.0) / spread;
    (slope, error.sqrt())
}

// ============================================================================
// What /proc tells
// ============================================================================

/// What a process holds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Vitals {
    pub rss_kib: u64,
    pub threads: usize,
    pub descriptors: usize,
}

impl Vitals {
    fn of(pid: u32) -> Result<Vitals, String> {
        // The sum over all mappings: `status` and `statm` may be off by a page or hundred.
        let rollup = read_proc(pid, "smaps_rollup")?;
        let count = |name: &str| -> Result<usize, String> {
            let entries = fs::read_dir(format!("/proc/{pid}/{name}"));
            entries.map(Iterator::count).map_err(|error| format!("/proc/{pid}/{name}: {error}"))
        };
        Ok(Vitals {
            rss_kib: field_of(&rollup, "Rss:"),
            threads: count("task")?,
            descriptors: count("fd")?,
        })
    }
}

fn read_proc(pid: u32, name: &str) -> Result<String, String> {
    let path = format!("/proc/{pid}/{name}");
    fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))
}

fn field_of(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let word = line.and_then(|line| line.split_whitespace().next());
    word.and_then(|word| word.parse().ok()).unwrap_or(0)
}

/// All clocks at one moment.
struct Moment {
    at: Instant,
    /// The child's, threads that have ended included. In steps of 10 ms.
    cpu: Duration,
    user: Duration,
    world: Duration,
    /// The child's threads that live: time on a core, time spent waiting for one.
    threads: BTreeMap<String, (Duration, Duration)>,
    cores: usize,
    /// The machine's, in ticks.
    busy: u64,
    total: u64,
}

impl Moment {
    fn now(pid: u32) -> Result<Moment, String> {
        let (user, system) = cpu_of(&read_proc(pid, "stat")?);
        let (own_user, own_system) = cpu_of(&read_proc(std::process::id(), "stat")?);
        let mut threads = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            // A thread that ends between two looks is not there any more.
            let text = fs::read_to_string(entry.path().join("schedstat")).unwrap_or_default();
            let mut times = text
                .split_whitespace()
                .map(|word| word.parse().map(Duration::from_nanos).unwrap_or_default());
            if let (Some(ran), Some(waited)) = (times.next(), times.next()) {
                threads.insert(entry.file_name().to_string_lossy().into_owned(), (ran, waited));
            }
        }
        let machine = fs::read_to_string("/proc/stat").map_err(|error| error.to_string())?;
        let cores = machine.lines().filter(|line| line.starts_with("cpu")).count();
        let words = machine.lines().next().unwrap_or_default().split_whitespace().skip(1);
        // user, nice, system, idle, iowait, irq, softirq, steal; the rest is in them already.
        let ticks: Vec<u64> = words.take(8).filter_map(|word| word.parse().ok()).collect();
        let total: u64 = ticks.iter().sum();
        let idle: u64 = ticks.iter().skip(3).take(2).sum();
        Ok(Moment {
            at: Instant::now(),
            cpu: user + system,
            user,
            world: own_user + own_system,
            threads,
            // The first line is the sum of the others.
            cores: cores.saturating_sub(1).max(1),
            busy: total - idle,
            total,
        })
    }

    fn ran_since(&self, before: &Moment) -> Duration {
        self.since(before, |(ran, _)| ran)
    }

    fn waited_since(&self, before: &Moment) -> Duration {
        self.since(before, |(_, waited)| waited)
    }

    fn since(&self, before: &Moment, which: fn((Duration, Duration)) -> Duration) -> Duration {
        let times = self.threads.iter().map(|(thread, times)| {
            let began = before.threads.get(thread).copied().unwrap_or_default();
            which(*times).saturating_sub(which(began))
        });
        times.sum()
    }
}

/// User and system time in a `/proc/…/stat`. The name in it may hold blanks and brackets.
fn cpu_of(stat: &str) -> (Duration, Duration) {
    /// `USER_HZ`, which is 100 on every machine this runs on.
    const TICK: Duration = Duration::from_millis(10);
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let mut fields = fields.split_whitespace().skip(11).map(|word| word.parse().unwrap_or(0));
    let mut time = || TICK * fields.next().unwrap_or(0);
    (time(), time())
}

/// The one clock of all stamps.
fn now_ns() -> u64 {
    static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(ORIGIN.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

// ============================================================================
// Many durations, in little room
// ============================================================================

/// Counts durations in steps of 1.6 %. Many threads note at once.
struct Histogram {
    steps: Vec<AtomicU64>,
    max_ns: AtomicU64,
}

/// Steps between one power of two and the next.
const FINENESS: u64 = 64;

/// What a histogram says, in microseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spread {
    pub count: u64,
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

impl Default for Histogram {
    fn default() -> Histogram {
        let steps = (64 - 6 + 1) * FINENESS;
        Histogram {
            steps: (0..steps).map(|_| AtomicU64::new(0)).collect(),
            max_ns: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    fn note(&self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        if let Some(step) = self.steps.get(step_of(ns)) {
            step.fetch_add(1, Relaxed);
        }
        self.max_ns.fetch_max(ns, Relaxed);
    }

    fn spread(&self) -> Spread {
        let counts: Vec<u64> = self.steps.iter().map(|step| step.load(Relaxed)).collect();
        let count: u64 = counts.iter().sum();
        let max = self.max_ns.load(Relaxed);
        let quantile = |share: f64| {
            let wanted = (count as f64 * share).ceil() as u64;
            let mut seen = 0;
            let step = counts.iter().position(|count| {
                seen += count;
                seen >= wanted.max(1)
            });
            step.map_or(0.0, |step| middle_of(step).min(max) as f64 / 1_000.0)
        };
        Spread {
            count,
            p50: quantile(0.5),
            p99: quantile(0.99),
            p999: quantile(0.999),
            max: max as f64 / 1_000.0,
        }
    }
}

fn step_of(ns: u64) -> usize {
    let doublings = u64::from((ns / FINENESS).checked_ilog2().map_or(0, |log| log + 1));
    let width = doublings.saturating_sub(1);
    (doublings * FINENESS + (ns >> width) % FINENESS) as usize
}

fn middle_of(step: usize) -> u64 {
    let (doublings, place) = (step as u64 / FINENESS, step as u64 % FINENESS);
    match doublings.checked_sub(1) {
        None => place,
        Some(width) => ((FINENESS + place) << width) + (1 << width) / 2,
    }
}

// ============================================================================
// The report
// ============================================================================

/// All that was measured.
#[derive(Clone, Debug)]
pub struct Report {
    pub plan: Plan,
    pub bridge: Figures,
    /// Right before and right after; none with churn.
    pub floors: Vec<Figures>,
    pub churn: Option<Churn>,
}

impl Report {
    /// The bridge's CPU time for a second of a call, in milliseconds.
    fn cpu_ms(&self) -> f64 {
        self.bridge.cpu_ms()
    }

    fn floor_of(&self, figure: impl Fn(&Figures) -> f64) -> Option<f64> {
        let count = self.floors.len();
        (count > 0).then(|| self.floors.iter().map(figure).sum::<f64>() / count as f64)
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut page = Page::default();
        let Report { plan, bridge, .. } = self;
        let tls = if plan.tls { "TLS to the agent" } else { "no TLS" };
        page.line(&format!(
            "\ncallbridge demo: {} at once for {} s, {tls}, {} cores.",
            counted(plan.calls, "call"),
            plan.seconds,
            bridge.machine.cores
        ));
        self.sound(&mut page);
        self.cost(&mut page);
        self.waits(&mut page);
        if let Some(churn) = &self.churn {
            churn.text(&mut page, bridge);
        }
        let machine = &bridge.machine;
        page.line(&format!(
            "\n  The machine was {:.0} % busy: the bridge {:.0} %, this world {:.0} %, others \
             {:.0} %.\n  The world's own frames left {:.0} us late at the median, {:.0} us at the \
             99th percentile.",
            100.0 * machine.busy,
            100.0 * machine.child,
            100.0 * machine.world,
            100.0 * machine.others(),
            bridge.lateness.p50,
            bridge.lateness.p99,
        ));
        for remark in self.remarks() {
            page.line(&format!("  ! {remark}"));
        }
        page.text
    }

    fn sound(&self, page: &mut Page) {
        let [up, down] = &self.bridge.ways;
        page.head("sound", ["to agent", "to caller", ""]);
        for (name, figure) in [
            ("frames", (|way| way.sent) as fn(&WayFigures) -> u64),
            ("lost", |way| way.lost),
            ("damaged", |way| way.damaged),
            ("out of order", |way| way.out_of_order),
            ("timed on arrival", |way| way.delay.count),
            ("  late (over 20 ms)", |way| way.late),
        ] {
            page.row(name, [figure(up).to_string(), figure(down).to_string(), String::new()]);
        }
        for (name, figure) in QUANTILES {
            page.row(
                &format!("  delay {name}, us"),
                [up, down].map(|way| format!("{:.0}", figure(&way.delay))),
            );
        }
        if self.floors.is_empty() {
            return;
        }
        for (name, figure) in QUANTILES {
            let floor = |way: usize| self.floor_of(|floor| figure(&floor.ways[way].delay));
            page.row(
                &format!("the floor's {name}, us"),
                [0, 1].map(|way| format!("{:.0}", floor(way).unwrap_or_default())),
            );
        }
    }

    fn cost(&self, page: &mut Page) {
        let Figures { rest, standing, calls, .. } = &self.bridge;
        let per_call = |with: f64, without: f64| (with - without) / (*calls).max(1) as f64;
        page.head("cost", ["bridge", "floor", "ratio"]);
        let ours = self.cpu_ms();
        let floor = self.floor_of(Figures::cpu_ms);
        page.row(
            "CPU ms per call-second",
            [
                format!("{ours:.2}"),
                floor.map_or_else(String::new, |floor| format!("{floor:.2}")),
                floor.map_or_else(String::new, |floor| format!("{:.2} x", ours / floor)),
            ],
        );
        if let [before, after] = self.floors.as_slice() {
            let (before, after) = (before.cpu_ms(), after.cpu_ms());
            page.row(
                "  the floor before, after",
                [String::new(), format!("{before:.2}, {after:.2}")],
            );
        }
        page.row("calls a core can carry", [format!("{:.0}", 1_000.0 / ours)]);
        page.row("share spent in user code", [percent(self.bridge.user_share)]);
        page.row(
            "waiting for a core, us/frame",
            [
                format!("{:.0}", self.bridge.machine.queue_us),
                self.floor_of(|floor| floor.machine.queue_us)
                    .map_or_else(String::new, |floor| format!("{floor:.0}")),
            ],
        );
        page.row("memory at rest, MiB", [mib(rest.rss_kib)]);
        page.row("memory with all calls, MiB", [mib(standing.rss_kib)]);
        let memory = per_call(standing.rss_kib as f64, rest.rss_kib as f64);
        page.row("memory per call, KiB", [format!("{memory:.1}")]);
        let threads = per_call(standing.threads as f64, rest.threads as f64);
        page.row("threads per call", [format!("{threads:.2}")]);
        let descriptors = per_call(standing.descriptors as f64, rest.descriptors as f64);
        page.row("file descriptors per call", [format!("{descriptors:.2}")]);
    }

    fn waits(&self, page: &mut Page) {
        let bridge = &self.bridge;
        page.head("waits, ms", ["p50", "p99", "max"]);
        for (name, spread) in [
            ("webhook to answer *", &bridge.webhook),
            ("stream start to first sound *", &bridge.first_audio),
            ("barge-in to clear", &bridge.clear),
            ("process start to listening", &bridge.start),
        ] {
            page.row(
                name,
                [spread.p50, spread.p99, spread.max].map(|us| format!("{:.2}", us / 1_000.0)),
            );
        }
        page.line(&format!(
            "  * beyond what the stand-ins take; {} webhooks, {} clears, {} starts",
            bridge.webhook.count, bridge.clear.count, bridge.start.count
        ));
    }

    /// What makes the figures doubtful, in words.
    fn remarks(&self) -> Vec<String> {
        let mut remarks = Vec::new();
        let Machine { busy, world, .. } = self.bridge.machine;
        if cfg!(debug_assertions) {
            remarks.push("This is a debug build: times and CPU mean nothing.".to_owned());
        }
        let sent = self.bridge.call_seconds / (self.plan.calls as f64 * self.plan.seconds as f64);
        if sent < 0.98 && self.churn.is_none() {
            remarks.push(format!(
                "The pretend world is the limit: it sent only {:.0} % of the frames in time, with \
                 {:.0} % of the machine. Fewer calls, or a bigger machine.",
                100.0 * sent,
                100.0 * world
            ));
        } else if self.bridge.lateness.p99 > WORLD_LATE_US {
            remarks.push(
                "The pretend world was late itself, so its frames came in bunches: the delays are \
                 longer for it."
                    .to_owned(),
            );
        }
        if busy > 0.95 {
            remarks.push(
                "The machine had nothing left: the delays are waits for a free core.".to_owned(),
            );
        }
        if self.bridge.machine.others() > 0.1 {
            remarks.push(format!(
                "Others took {:.0} % of the machine meanwhile.",
                100.0 * self.bridge.machine.others()
            ));
        }
        if let [before, after] = self.floors.as_slice() {
            let (before, after) = (before.cpu_ms(), after.cpu_ms());
            if (before - after).abs() > 0.15 * before.max(after) {
                remarks.push(format!(
                    "The floor changed in the course of the run, from {before:.2} to {after:.2}: \
                     the ratio is no better than that."
                ));
            }
        }
        remarks.extend(self.bridge.troubles.iter().cloned());
        remarks
    }

    /// An error if the sound did not arrive as it was sent, or something was left behind.
    pub fn verdict(&self) -> Result<(), String> {
        let mut wrong = Vec::new();
        for (way, name) in self.bridge.ways.iter().zip(["to the agent", "to the caller"]) {
            let WayFigures { lost, damaged, out_of_order, .. } = way;
            if lost + damaged + out_of_order > 0 {
                wrong.push(format!(
                    "{name}: {lost} frames lost, {damaged} damaged, {out_of_order} out of order"
                ));
            }
        }
        let calls = self.churn.as_ref().map_or(self.plan.calls, |churn| churn.calls);
        if self.bridge.filed < calls {
            wrong.push(format!("n8n got {} transcripts of {calls}", self.bridge.filed));
        }
        if let Some(churn) = &self.churn {
            let (threads, descriptors) = (churn.threads_left(), churn.descriptors_left());
            if threads != 0 || descriptors != 0 {
                wrong.push(format!(
                    "left behind: {threads} threads, {descriptors} file descriptors"
                ));
            }
        }
        wrong.extend(self.bridge.troubles.first().cloned());
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n")) }
    }

    /// For programs. Times in microseconds where nothing else is said.
    pub fn json(&self) -> Value {
        let figures = &self.bridge;
        json!({
            "calls": self.plan.calls,
            "seconds": self.plan.seconds,
            "tls": self.plan.tls,
            "debugBuild": cfg!(debug_assertions),
            "bridge": figures.json(),
            "floorBefore": self.floors.first().map(Figures::json),
            "floorAfter": self.floors.get(1).map(Figures::json),
            "ratio": {
                "cpu": self.floor_of(Figures::cpu_ms).map(|floor| self.cpu_ms() / floor),
                "delayUp": self.delay_ratio(Way::Up),
                "delayDown": self.delay_ratio(Way::Down),
            },
            "churn": self.churn.as_ref().map(Churn::json),
            "remarks": self.remarks(),
            "verdict": self.verdict().err(),
        })
    }

    fn delay_ratio(&self, way: Way) -> Option<f64> {
        let p50 = |figures: &Figures| figures.ways[way as usize].delay.p50;
        self.floor_of(p50).map(|floor| p50(&self.bridge) / floor)
    }
}

type Quantile = fn(&Spread) -> f64;
const QUANTILES: [(&str, Quantile); 4] = [
    ("p50", |spread| spread.p50),
    ("p99", |spread| spread.p99),
    ("p99.9", |spread| spread.p999),
    ("max", |spread| spread.max),
];

impl Figures {
    fn cpu_ms(&self) -> f64 {
        self.cpu.as_secs_f64() * 1_000.0 / self.call_seconds.max(0.001)
    }

    fn json(&self) -> Value {
        let [up, down] = self.ways.map(|way| {
            json!({"sent": way.sent, "lost": way.lost, "damaged": way.damaged,
                "outOfOrder": way.out_of_order, "late": way.late, "delay": way.delay.json()})
        });
        let per_call = |with: f64, without: f64| (with - without) / self.calls.max(1) as f64;
        let Figures { rest, standing, machine, .. } = self;
        json!({
            "up": up,
            "down": down,
            "cpuMsPerCallSecond": self.cpu_ms(),
            "callsPerCore": 1_000.0 / self.cpu_ms(),
            "userShare": self.user_share,
            "memoryKib": {
                "rest": rest.rss_kib,
                "standing": standing.rss_kib,
                "perCall": per_call(standing.rss_kib as f64, rest.rss_kib as f64),
            },
            "threadsPerCall": per_call(standing.threads as f64, rest.threads as f64),
            "descriptorsPerCall": per_call(standing.descriptors as f64, rest.descriptors as f64),
            "start": self.start.json(),
            "webhook": self.webhook.json(),
            "firstAudio": self.first_audio.json(),
            "clear": self.clear.json(),
            "transcripts": self.filed,
            "worldLate": self.lateness.json(),
            "machine": {"cores": machine.cores, "busy": machine.busy, "child": machine.child,
                "world": machine.world, "others": machine.others(),
                "queueUsPerFrame": machine.queue_us},
        })
    }
}

impl Spread {
    fn json(&self) -> Value {
        json!({"count": self.count, "p50": self.p50, "p99": self.p99, "p999": self.p999,
            "max": self.max})
    }
}

impl Churn {
    fn text(&self, page: &mut Page, figures: &Figures) {
        page.head("churn", ["at rest", "after all", "left"]);
        let counts = [
            ("threads", self.before.threads, self.after.threads, self.threads_left()),
            (
                "file descriptors",
                self.before.descriptors,
                self.after.descriptors,
                self.descriptors_left(),
            ),
        ];
        for (name, before, after, left) in counts {
            page.row(name, [before.to_string(), after.to_string(), left.to_string()]);
        }
        let (before, after) = (mib(self.before.rss_kib), mib(self.after.rss_kib));
        page.row("memory, MiB", [before, after]);
        page.line(&format!(
            "  {} calls of about {:.0} s each, {} transcripts. {} connections are kept for the \
             next call.\n  Memory grew by {:.0} KiB a minute, give or take {:.0}, at {:.0} calls a \
             minute ({} samples).",
            self.calls,
            self.call_lasts.as_secs_f64(),
            figures.filed,
            self.kept,
            self.slope,
            2.0 * self.slope_error,
            60.0 * figures.calls as f64 / self.call_lasts.as_secs_f64(),
            self.samples,
        ));
    }

    fn json(&self) -> Value {
        let vitals = |vitals: &Vitals| {
            json!({"rssKib": vitals.rss_kib, "threads": vitals.threads,
                "descriptors": vitals.descriptors})
        };
        json!({
            "calls": self.calls,
            "callSeconds": self.call_lasts.as_secs_f64(),
            "before": vitals(&self.before),
            "after": vitals(&self.after),
            "keptConnections": self.kept,
            "threadsLeft": self.threads_left(),
            "descriptorsLeft": self.descriptors_left(),
            "memoryKibPerMinute": self.slope,
            "memoryKibPerMinuteError": self.slope_error.is_finite().then_some(self.slope_error),
            "samples": self.samples,
        })
    }
}

/// A table of words and figures.
#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn head(&mut self, title: &str, columns: [&str; 3]) {
        self.line("");
        self.row(title, columns.map(str::to_owned));
    }

    fn row(&mut self, name: &str, cells: impl IntoIterator<Item = String>) {
        let mut line = format!("  {name:<30}");
        for cell in cells {
            // A String takes all that is written to it.
            moot(write!(line, "{cell:>14}"));
        }
        self.line(line.trim_end());
    }

    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }
}

fn counted(count: usize, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

fn mib(kib: u64) -> String {
    format!("{:.1}", kib as f64 / 1_024.0)
}

fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}
