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
//! survive the way to PCM and back ([`stamp`]), and sound that its number determines. So whoever
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

#![expect(clippy::cast_precision_loss, reason = "counts become figures")]

mod call;
mod caller;
mod churn;
#[cfg(test)]
mod fault;
pub mod figures;
mod floor;
mod hall;
mod histogram;
mod line;
mod listener;
mod message;
mod page;
mod process;
mod progress;
mod report;
mod stage;
mod stamp;
mod stand_ins;
mod vitals;

use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use crate::demo::Flop;
use crate::demo::bench::churn::measure_churn;
use crate::demo::bench::floor::be_the_floor;
use crate::demo::bench::progress::Progress;
use crate::demo::bench::report::Report;
use crate::demo::bench::stage::{measure_bridge, measure_floor};

#[cfg(test)]
pub use self::fault::Fault;

/// Open files that both processes need besides those of the calls.
const FILES_AT_REST: usize = 200;

/// In each of them: two legs, one of them twice on record here; a webhook while it rings there.
const FILES_PER_CALL: usize = 4;

/// As many as `MAX_CALLS` allows.
const CALLS_MAX: usize = 10_000;

/// Calls whose frames are timed on arrival, each leg by a thread of its own.
const TIMED_CALLS: usize = 50;

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
    #[cfg(test)]
    pub fault: Option<Fault>,
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
        text: format!("callbridge demo: {what} (see callbridge demo --help)"),
    })?;
    // The floor before and after takes as long as the bridge, and each of them has to begin.
    let progress = Progress::of_about(if plan.churn { 1 } else { 2 } * plan.seconds + 2);
    let report = measure(&plan);
    drop(progress);
    let report = report.map_err(failed)?;
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
            #[cfg(test)]
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
                unknown => return Err(objection_to(unknown)),
            }
        }
        if plan.calls == 0 {
            return Err("how many calls? --calls N".to_owned());
        }
        Ok(plan)
    }
}

fn objection_to(unknown: &str) -> String {
    const KNOWN: [&str; 6] = ["--page", "--calls", "--seconds", "--plain", "--churn", "--json"];
    let alike = |known: &str| {
        known.bytes().zip(unknown.bytes()).take_while(|(one, other)| one == other).count()
    };
    // Two letters behind the dashes.
    let nearest =
        KNOWN.into_iter().filter(|known| alike(known) >= 4).max_by_key(|known| alike(known));
    let meant = nearest.map(|known| format!(" (did you mean {known}?)")).unwrap_or_default();
    format!("unknown option \"{unknown}\"{meant}")
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
