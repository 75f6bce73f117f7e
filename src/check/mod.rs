//! The verb `callbridge check`: looks at a real set-up, and says line by line what is right, what
//! is wrong and what to do about it.
//!
//! ```text
//!   setup       settings and agent files, read as the server reads them
//!   tunnel      ngrok, if it runs here: has it the address that PUBLIC_URL names?
//!   ultravox    key, minutes, calls at once; then model, voices, corpus
//!   n8n         the question of step 2, exactly as a call would ask it
//!   port        the server on this machine, or this process in its place
//!   public_url  /health from outside: is it the same process? Then the audio socket, and whether
//!               Twilio could reach and trust the address
//!   twilio      account; then the number, and where its calls go; fix sets them
//! ```
//!
//! The parties are asked at the same time, a thread each. Nobody is asked for anything that costs
//! or changes something; only `--fix` does, at Twilio, and it asks before.

use std::collections::HashMap;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use report::{Finding, Printer, Topic};
use setup::Setup;

use crate::setup::stop::Stop;
use crate::toolbox::log::{Level as LogLevel, LogFormat, log_as};
use crate::toolbox::threads::spawn;
use crate::toolbox::waiting::Waiting;
use crate::usage::{misused, options};

mod audio_socket;
mod fix;
mod http;
mod n8n;
mod ngrok;
mod port;
mod public_url;
mod reach;
mod report;
mod setup;
mod tunnel;
mod twilio;
mod ultravox;

pub(crate) use tunnel::address_in_force;

/// From the first question to the last answer. Who has not answered by then is named.
const CHECK_WITHIN: Duration = Duration::from_secs(9);
/// One step with a party. Each has at most two of them.
const STEP_WITHIN: Duration = Duration::from_secs(4);
const _: () = assert!(2 * STEP_WITHIN.as_secs() < CHECK_WITHIN.as_secs());
const _: () = assert!(
    ngrok::NGROK_WITHIN.as_millis()
        + port::HOME_WITHIN.as_millis()
        + STEP_WITHIN.as_millis()
        + audio_socket::UPGRADE_WITHIN.as_millis()
        < CHECK_WITHIN.as_millis()
);
/// Names that are offered in the place of a wrong one.
const OFFERED_MAX: usize = 8;

const HELP: &str = "\
callbridge check: looks at the set-up and says what is wrong and what to do about it.

  Reads the settings and agent files, asks Ultravox, n8n and Twilio once each,
  and tries the way from PUBLIC_URL to this machine. It takes at most 10 s,
  costs nothing and changes nothing (n8n gets one request for a greeting).

usage: callbridge check [--fix [--yes]] [--json]

  --fix    sets the Twilio number's Voice URL and status callback; asks first
  --yes    with --fix: does not ask
  --json   one JSON object, for scripts

Exit status 0 if a call would work, 1 if not, 2 for a wrong command line.
Colours appear in a terminal only, and not when NO_COLOR is set.
";

struct Options {
    fix: bool,
    yes: bool,
    json: bool,
}

/// The verb `callbridge check`. Ok only if a call would work.
pub(crate) fn run(words: &[&str]) -> Result<(), Stop> {
    let Some(given) = options("check", HELP, &["--fix", "--yes", "--json"], words)? else {
        return Ok(());
    };
    let has = |option| given.contains(&option);
    let options = Options { fix: has("--fix"), yes: has("--yes"), json: has("--json") };
    if options.yes && !options.fix {
        return Err(misused("check", HELP, "--yes only makes sense with --fix"));
    }
    // The server that this process stands in for has nothing to say here.
    log_as(LogLevel::Error, LogFormat::Text);
    let began = Instant::now();
    let (setup, mut findings) = Setup::read()?;
    findings.extend(ask_everybody(setup, began + CHECK_WITHIN));
    let printer = Printer::new(&setup.bridge.config, options.json);
    printer.lines(&findings);
    if options.fix {
        let fixed = fix::fix(setup, &options);
        printer.lines(&fixed);
        // What has been fixed counts as it is now.
        if fixed.iter().any(|finding| finding.is_about(&twilio::VOICE)) {
            findings.retain(|finding| !twilio::FIXABLE.iter().any(|topic| finding.is_about(topic)));
        }
        findings.extend(fixed);
    }
    printer.conclude(&findings)
}

// --- Everybody is asked at once ------------------------------------------------------

type Check = fn(&'static Setup) -> Vec<Finding>;
type Question = Box<dyn FnOnce() -> Finding + Send>;

const CHECKS: [(&str, Check); 4] = [
    ("Ultravox", ultravox::look),
    ("n8n", n8n::look),
    ("PUBLIC_URL", public_url::look),
    ("Twilio", twilio::look),
];

/// What each party's thread has found, in the order of the parties. Nobody waits for a thread that
/// hangs: it ends with the process.
fn ask_everybody(setup: &'static Setup, deadline: Instant) -> Vec<Finding> {
    let (told, hear) = mpsc::channel();
    for (party, check) in CHECKS {
        let told = told.clone();
        let asking = move || {
            if told.send((party, check(setup))).is_err() {
                // It came too late, which has been said.
            }
        };
        if spawn(format!("check {party}"), asking).is_err() {
            // Its sender is gone, so nobody waits for it, and it is reported as unanswered.
        }
    }
    drop(told);
    let waiting = Waiting::for_parties(CHECKS.map(|(party, _)| party).to_vec(), CHECK_WITHIN);
    let mut found: HashMap<&str, Vec<Finding>> = HashMap::new();
    while let Ok((party, findings)) =
        hear.recv_timeout(deadline.saturating_duration_since(Instant::now()))
    {
        waiting.answered(party);
        found.insert(party, findings);
    }
    drop(waiting);
    let unanswered = |party| {
        let what = format!("no answer within {} s", CHECK_WITHIN.as_secs());
        vec![Topic::new(party, "all").wrong(what, "check this machine's network and DNS")]
    };
    let all = CHECKS.map(|(party, _)| found.remove(party).unwrap_or_else(|| unanswered(party)));
    all.into_iter().flatten().collect()
}

/// What one party is asked at the same time, a thread for each question.
fn all_at_once(party: &'static str, questions: Vec<Question>) -> Vec<Finding> {
    thread::scope(|scope| {
        let ask = |question| {
            thread::Builder::new().name(format!("check {party}")).spawn_scoped(scope, question)
        };
        let asked: Vec<_> = questions.into_iter().map(ask).collect();
        let answer = |thread: Result<thread::ScopedJoinHandle<Finding>, _>| {
            thread.ok().and_then(|thread| thread.join().ok()).unwrap_or_else(|| {
                Topic::new(party, "thread").warning(
                    "a question could not be asked: this machine is out of threads",
                    "end programs that are not needed, and try again",
                )
            })
        };
        asked.into_iter().map(answer).collect()
    })
}

fn offered<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.take(OFFERED_MAX).collect();
    if names.is_empty() { "(none)".to_owned() } else { names.join(", ") }
}
