//! The verb `callbridge check`: looks at a real set-up, and says line by line what is right, what
//! is wrong and what to do about it.
//!
//! ```text
//!   settings, agent files      read as the server reads them
//!   ngrok, if it runs here     has it the address that PUBLIC_URL names?
//!   Ultravox                   key, minutes, calls at once; then model, voices, corpus
//!   n8n                        the question of step 2, exactly as a call would ask it
//!   PORT, then PUBLIC_URL      /health from inside and from outside: is it the same process?
//!                              then the audio socket, opened as Twilio would
//!   Twilio                     account; then the number, and where its calls go
//! ```
//!
//! The parties are asked at the same time, a thread each. Nobody is asked for anything that costs
//! or changes something; only `--fix` does, at Twilio, and it asks before.
//!
//! If no server runs yet, this process listens in its place for the moment
//! (`door::Hall`), so that the way from outside to here can be tried before the first start.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufRead as _, IsTerminal as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs as _};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::hmac;
use rustls::pki_types::ServerName;
use rustls::{CertificateError, ClientConnection, StreamOwned};
use serde_json::{Value, json};
use subtle::ConstantTimeEq as _;
use tiny_http::Method;
use tungstenite::client::IntoClientRequest as _;
use tungstenite::http::{HeaderMap, HeaderValue, Uri};
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::{Error as SocketError, HandshakeError};

use crate::door::reply::{Reply, path_of};
use crate::door::{self, Hall, Visitor};
use crate::parties::n8n::reply::read_greeting;
use crate::parties::n8n::{ToN8n, ask_n8n};
use crate::parties::twilio::is_sid;
use crate::parties::twilio::stream::{accept_stream, await_start};
use crate::parties::ultravox::ULTRAVOX_REPLY_BYTES_MAX;
use crate::setup::agent::Agent;
use crate::setup::settings::{Config, settings_in_force};
use crate::setup::stop::Stop;
use crate::setup::values::NGROK;
use crate::toolbox::dial::{InTime, connect};
use crate::toolbox::failure::{Failure, Secret};
use crate::toolbox::http::{http_agent, trusted_roots};
use crate::toolbox::log::{Level as LogLevel, LogFormat, harmless, log, log_as, say};
use crate::toolbox::random::random_hex;
use crate::toolbox::threads::spawn;
use crate::{Bridge, GREETING_CHARS_MAX, LOOKUP_WITHIN};

// ============================================================================
// The verb
// ============================================================================
//
// In:       settings and agent files, as the server would read them, also when they are wrong.
// Out:      a list of findings, and an exit status: 0 if a call would work, 1 if not.
// Fails:    never for what it finds; with status 2 for a wrong command line.
// Not here: trust in anybody. Each party has a time limit, and so has the whole.

/// From the first question to the last answer. Who has not answered by then is named.
const CHECK_WITHIN: Duration = Duration::from_secs(9);
/// One step with a party. Each has at most two of them.
const STEP_WITHIN: Duration = Duration::from_secs(4);
const _: () = assert!(2 * STEP_WITHIN.as_secs() < CHECK_WITHIN.as_secs());
/// ngrok's own address, on this machine, is asked before all else.
const NGROK_WITHIN: Duration = Duration::from_millis(800);
/// The server on this machine.
const HOME_WITHIN: Duration = Duration::from_secs(2);
/// The upgrade of the audio socket, once the address is known to lead here.
const UPGRADE_WITHIN: Duration = Duration::from_millis(2_100);
const _: () = assert!(
    NGROK_WITHIN.as_millis()
        + HOME_WITHIN.as_millis()
        + STEP_WITHIN.as_millis()
        + UPGRADE_WITHIN.as_millis()
        < CHECK_WITHIN.as_millis()
);
/// Pages of a list. A list that is longer has no end.
const PAGES_MAX: usize = 50;
/// What stands in a line of the report. What is longer is cut.
const LINE_CHARS_MAX: usize = 400;
/// Names that are offered in the place of a wrong one.
const OFFERED_MAX: usize = 8;
/// Nobody has this number (North American numbers 555-0100 to 555-0199 are set aside for fiction).
const NOBODYS_NUMBER: &str = "+12025550123";

const HELP: &str = "\
callbridge check: looks at the set-up, and says what is wrong and what to do.

  Reads the settings and agent files, asks Ultravox, n8n and Twilio once each,
  and tries the way from PUBLIC_URL to this machine. It takes at most 10 s,
  costs nothing and changes nothing (n8n sees one question for a greeting).

usage: callbridge check [--fix [--yes]] [--json]

  --fix    sets the Twilio number's Voice URL and status callback; asks before
  --yes    does not ask
  --json   one JSON object, for scripts

Exit status 0 if a call would work, 1 if not, 2 for a wrong command line.
Colours appear in a terminal only, and not when NO_COLOR is set.
";

#[derive(Default)]
struct Options {
    fix: bool,
    yes: bool,
    json: bool,
}

/// The verb `callbridge check`.
pub(crate) fn run(words: &[&str]) -> Result<(), Stop> {
    let mut options = Options::default();
    for word in words {
        match *word {
            "--fix" => options.fix = true,
            "--yes" => options.yes = true,
            "--json" => options.json = true,
            "--help" | "-h" => {
                say(HELP);
                return Ok(());
            }
            other => return Err(misused(&format!("what is \"{other}\"?"))),
        }
    }
    if options.yes && !options.fix {
        return Err(misused("--yes goes with --fix"));
    }
    // The server that this process stands in for has nothing to say here.
    log_as(LogLevel::Error, LogFormat::Text);
    let began = Instant::now();
    let (setup, mut findings) = Setup::read()?;
    findings.extend(ask_everybody(setup, began + CHECK_WITHIN));
    let paint = Paint::new(&options);
    paint.report(setup, &findings);
    if options.fix {
        let mended = fix(setup, &options);
        paint.report(setup, &mended);
        // What has been mended counts as it is now.
        if mended.iter().any(|finding| finding.check == "voice") {
            findings.retain(|finding| !NUMBER_CHECKS.contains(&finding.check.as_str()));
        }
        findings.extend(mended);
    }
    paint.conclude(setup, &findings)
}

fn misused(what: &str) -> Stop {
    Stop::Misused(format!("callbridge check: {what}\n\n{HELP}"))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Ok,
    /// A call would work, but not as well as it could.
    Warning,
    /// A call would not work.
    Wrong,
    /// Not looked at, and why.
    Skipped,
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Wrong => "wrong",
            Level::Skipped => "skipped",
        }
    }
}

/// One line of the report, and what to do about it.
struct Finding {
    party: &'static str,
    /// What was looked at, for scripts.
    check: String,
    level: Level,
    what: String,
    cure: String,
}

impl Finding {
    fn new(party: &'static str, check: &str, level: Level, what: impl Into<String>) -> Finding {
        let (check, cure) = (check.to_owned(), String::new());
        Finding { party, check, level, what: what.into(), cure }
    }

    fn ok(party: &'static str, check: &str, what: impl Into<String>) -> Finding {
        Finding::new(party, check, Level::Ok, what)
    }

    fn warning(party: &'static str, check: &str, what: impl Into<String>) -> Finding {
        Finding::new(party, check, Level::Warning, what)
    }

    fn wrong(party: &'static str, check: &str, what: impl Into<String>) -> Finding {
        Finding::new(party, check, Level::Wrong, what)
    }

    fn skipped(party: &'static str, check: &str, what: impl Into<String>) -> Finding {
        Finding::new(party, check, Level::Skipped, what)
    }

    fn cure(self, cure: impl Into<String>) -> Finding {
        Finding { cure: cure.into(), ..self }
    }
}

/// How the report is written.
struct Paint {
    colour: bool,
    json: bool,
}

impl Paint {
    fn new(options: &Options) -> Paint {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Paint { colour: io::stdout().is_terminal() && !plain, json: options.json }
    }

    fn report(&self, setup: &Setup, findings: &[Finding]) {
        if self.json {
            return;
        }
        for finding in findings {
            let colour = match finding.level {
                Level::Ok => "32",
                Level::Warning => "33",
                Level::Wrong => "1;31",
                Level::Skipped => "2",
            };
            let word = format!("{:<8}", finding.level.word());
            let word = if self.colour { format!("\x1b[{colour}m{word}\x1b[0m") } else { word };
            let mut text =
                format!("  {word} {:<11} {}\n", finding.party, setup.printable(&finding.what));
            if !finding.cure.is_empty() {
                text = format!("{text}{:23}-> {}\n", "", setup.printable(&finding.cure));
            }
            say(&text);
        }
    }

    fn conclude(&self, setup: &Setup, findings: &[Finding]) -> Result<(), Stop> {
        let count = |level| findings.iter().filter(|finding| finding.level == level).count();
        let (wrong, warnings) = (count(Level::Wrong), count(Level::Warning));
        if self.json {
            let findings: Vec<Value> = findings.iter().map(|found| setup.as_json(found)).collect();
            say(&format!("{}\n", json!({"ok": wrong == 0, "findings": findings})));
        }
        let things = |count: usize, one: &str| match count {
            1 => format!("1 {one}"),
            count => format!("{count} {one}s"),
        };
        match (wrong, warnings) {
            (0, _) if self.json => Ok(()),
            (0, 0) => {
                say("\nA call would work.\n");
                Ok(())
            }
            (0, _) => {
                say(&format!("\nA call would work. {}.\n", things(warnings, "warning")));
                Ok(())
            }
            (wrong, _) => {
                if !self.json {
                    say("\n");
                }
                let things = things(wrong, "thing");
                Err(Stop::Failed(format!("callbridge: a call would not work: {things} to mend")))
            }
        }
    }
}

// ============================================================================
// What is set, right or wrong
// ============================================================================
//
// In:       the environment, `.env`, the agent's files, ngrok's list of tunnels.
// Out:      a `Bridge` to look with, and the findings so far.
// Fails:    never: what is wrong is a finding, and stands at its default for the rest.
// Not here: the outbox, and any call. This bridge only looks.

/// What there is to look at. One for the whole command; its threads keep it.
struct Setup {
    /// With the built-in agent if the owner's has mistakes.
    bridge: &'static Bridge,
    /// The owner's agent files are right, so their voices can be looked up.
    agent_is_right: bool,
    complaints: Vec<String>,
    /// `PUBLIC_URL`, or the tunnel's address, with `https`. None: there is nothing to try.
    public_url: Option<String>,
}

impl Setup {
    fn read() -> Result<(&'static Setup, Vec<Finding>), Stop> {
        let (values, complaints) = settings_in_force();
        let (mut config, complaints) = Config::understand(values, complaints);
        let mut findings: Vec<Finding> =
            complaints.iter().map(|complaint| bad_setting(complaint)).collect();
        let roots = trusted_roots(config.ssl_cert_file.as_deref()).unwrap_or_else(|complaint| {
            findings.push(bad_setting(&complaint));
            trusted_roots(None).unwrap_or_default()
        });
        if findings.is_empty() {
            findings.push(Finding::ok("settings", "settings", "complete and well-formed"));
        }
        let (agent, agent_is_right) = look_at_agent(&mut config, &mut findings)?;
        let (public_url, at_ngrok) = public_url(&mut config, &complaints);
        findings.extend(at_ngrok);
        let bridge = Bridge::build(config, agent, &roots);
        // The threads that ask may outlive their time limit, and so must what they look at.
        let bridge: &'static Bridge = Box::leak(Box::new(bridge));
        let setup = Setup { bridge, agent_is_right, complaints, public_url };
        Ok((Box::leak(Box::new(setup)), findings))
    }

    fn prove(&self, nonce: &str) -> String {
        self.bridge.identity.prove(&self.bridge.config.public_url, nonce)
    }

    fn is_malformed(&self, setting: &str) -> bool {
        complains_of(&self.complaints, setting)
    }

    /// Others' words are quoted here. None may hold a secret, or steer the reader's terminal.
    fn printable(&self, text: &str) -> String {
        let text = self.bridge.config.hide_secrets(without_logins(text));
        text.chars().map(harmless).take(LINE_CHARS_MAX).collect()
    }

    fn as_json(&self, finding: &Finding) -> Value {
        json!({
            "party": finding.party,
            "check": finding.check,
            "level": finding.level.word(),
            "what": self.printable(&finding.what),
            "cure": self.printable(&finding.cure),
        })
    }
}

/// The owner's agent, or the built-in one if the owner's has mistakes.
fn look_at_agent(config: &mut Config, findings: &mut Vec<Finding>) -> Result<(Agent, bool), Stop> {
    let mistakes = match Agent::load(config) {
        Ok(agent) => {
            let (stages, tools) = (agent.stages.len(), agent.tools.len());
            let what = format!("{}: {stages} stages, {tools} tools", agent.name);
            findings.push(Finding::ok("agent", "files", what));
            return Ok((agent, true));
        }
        Err(mistakes) => mistakes,
    };
    let place = config.agent_dir.take().unwrap_or_default();
    findings.extend(mistakes.iter().map(|mistake| agent_mistake(&place, mistake)));
    let agent = Agent::load(config).map_err(|mistakes| Stop::Failed(mistakes.join("\n")))?;
    Ok((agent, false))
}

/// `NAME  is missing (where it comes from)`, `NAME  is "x": must be y`, `NAME  must be y`.
fn bad_setting(complaint: &str) -> Finding {
    let (name, what) = complaint.split_once("  ").unwrap_or((complaint, ""));
    let (what, cure) = if let Some((what, source)) = what.split_once(" (") {
        (what, source.trim_end_matches(')').to_owned())
    } else if let Some((what, must)) = what.split_once(": must ") {
        (what, format!("it must {must}"))
    } else if what.starts_with("must ") {
        ("is malformed", format!("it {what}"))
    } else {
        (what, "correct it".to_owned())
    };
    let cure = if name == ".env" { cure } else { format!("set {name} in .env: {cure}") };
    Finding::wrong("settings", name, format!("{name} {what}")).cure(cure)
}

fn agent_mistake(place: &Path, mistake: &str) -> Finding {
    let (file, what) = mistake.split_once("  ").unwrap_or((mistake, ""));
    Finding::wrong("agent", file, format!("{file}: {what}"))
        .cure(format!("correct {file} in {} (AGENT_DIR)", place.display()))
}

fn complains_of(complaints: &[String], setting: &str) -> bool {
    complaints.iter().any(|complaint| complaint.split(' ').next() == Some(setting))
}

/// The address to try, and what ngrok has to do with it. Puts the tunnel's address into the
/// settings where `PUBLIC_URL=ngrok` asks for it.
fn public_url(config: &mut Config, complaints: &[String]) -> (Option<String>, Option<Finding>) {
    let tunnels = list_tunnels(&config.ngrok_api_url, config.port);
    if config.public_url == NGROK {
        let found = tunnels.and_then(|tunnels| tunnel_to(&tunnels, config.port));
        return match found {
            Ok(url) => {
                let what = format!("PUBLIC_URL=ngrok is {url} at the moment");
                config.public_url.clone_from(&url);
                (Some(url), Some(Finding::ok("ngrok", "tunnel", what)))
            }
            Err(why) => {
                config.public_url.clear();
                let what = format!("PUBLIC_URL=ngrok, but {}", why.what);
                (None, Some(Finding::wrong("ngrok", "tunnel", what).cure(why.cure)))
            }
        };
    }
    let is_usable = !config.public_url.is_empty()
        && (!complains_of(complaints, "PUBLIC_URL") || config.public_url.starts_with("http://"));
    // Of an address with http the setting has been complained of; with https it may be right.
    let url = is_usable.then(|| config.public_url.replacen("http://", "https://", 1));
    let finding =
        tunnels.ok().and_then(|list| compare_with_ngrok(&list, config.port, url.as_deref()));
    (url, finding)
}

// --- ngrok ---------------------------------------------------------------------------

/// What ngrok's local API lists:
///
/// ```text
/// GET NGROK_API_URL/api/tunnels
/// {"tunnels":[{"name":"command_line","public_url":"https://ab12.ngrok-free.app","proto":"https",
///  "config":{"addr":"http://localhost:8000","inspect":true}, …}],"uri":"/api/tunnels"}
/// ```
struct Tunnel {
    public_url: String,
    /// `http://localhost:8000`, `localhost:8000` or `8000`.
    leads_to: String,
}

impl Tunnel {
    fn port(&self) -> u16 {
        let (secure, rest) = match self.leads_to.split_once("://") {
            Some((scheme, rest)) => (scheme == "https", rest),
            None => (false, self.leads_to.as_str()),
        };
        let authority = rest.split('/').next().unwrap_or_default();
        let port = authority.rsplit(':').next().unwrap_or_default();
        port.parse().unwrap_or(if secure { 443 } else { 80 })
    }
}

/// Why there is no address from ngrok, and what to do.
pub(crate) struct NoTunnel {
    what: String,
    cure: String,
}

impl std::fmt::Display for NoTunnel {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} ({})", self.what, self.cure)
    }
}

/// `PUBLIC_URL=ngrok`: the https address of the tunnel that leads to this port.
pub(crate) fn ngrok_address(api: &str, port: u16) -> Result<String, NoTunnel> {
    tunnel_to(&list_tunnels(api, port)?, port)
}

fn list_tunnels(api: &str, port: u16) -> Result<Vec<Tunnel>, NoTunnel> {
    let trouble =
        |what: String| NoTunnel { what, cure: format!("start it with: ngrok http {port}") };
    // It speaks plain HTTP, so no roots are needed.
    let answer = get(&http_agent(&[]), &format!("{api}/api/tunnels"), &[], NGROK_WITHIN)
        .map_err(|why| trouble(format!("ngrok's local API at {api} cannot be asked: {why}")))?;
    let list = answer.json();
    let Some(list) = list["tunnels"].as_array() else {
        return Err(trouble(format!("what answers at {api} is not ngrok")));
    };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let tunnels = list.iter().map(|tunnel| Tunnel {
        public_url: text(&tunnel["public_url"]).trim_end_matches('/').to_owned(),
        leads_to: text(&tunnel["config"]["addr"]),
    });
    Ok(tunnels.collect())
}

fn tunnel_to(tunnels: &[Tunnel], port: u16) -> Result<String, NoTunnel> {
    let is_https = |tunnel: &&Tunnel| tunnel.public_url.starts_with("https://");
    let here = tunnels.iter().filter(|tunnel| tunnel.port() == port);
    if let Some(tunnel) = here.clone().find(is_https) {
        return Ok(tunnel.public_url.clone());
    }
    let cure = format!("start it with: ngrok http {port}");
    if let Some(tunnel) = here.clone().next() {
        let what = format!("ngrok's tunnel {} has no https", tunnel.public_url);
        return Err(NoTunnel { what, cure });
    }
    if let Some(tunnel) = tunnels.iter().find(is_https) {
        let (url, leads_to) = (&tunnel.public_url, &tunnel.leads_to);
        let what = format!("ngrok forwards {url} to {leads_to}, and callbridge is on port {port}");
        return Err(NoTunnel { what, cure: format!("{cure} (or set PORT={})", tunnel.port()) });
    }
    let what = match tunnels.first() {
        Some(tunnel) => format!("ngrok has only {}, which has no https", tunnel.public_url),
        None => "ngrok runs without any tunnel".to_owned(),
    };
    Err(NoTunnel { what, cure })
}

fn compare_with_ngrok(tunnels: &[Tunnel], port: u16, url: Option<&str>) -> Option<Finding> {
    let found = tunnel_to(tunnels, port);
    let Some(url) = url else {
        let url = found.ok()?;
        let what = format!("ngrok runs, and forwards {url} to port {port}");
        let cure = format!("set PUBLIC_URL=ngrok, or PUBLIC_URL={url}");
        return Some(Finding::warning("ngrok", "tunnel", what).cure(cure));
    };
    let same = |tunnel: &&Tunnel| tunnel.public_url.eq_ignore_ascii_case(url);
    if let Some(tunnel) = tunnels.iter().find(same) {
        if tunnel.port() == port {
            return Some(Finding::ok("ngrok", "tunnel", format!("forwards {url} to port {port}")));
        }
        let what = format!("forwards {url} to {}, not to port {port}", tunnel.leads_to);
        let cure = format!("start it with: ngrok http {port} (or set PORT={})", tunnel.port());
        return Some(Finding::wrong("ngrok", "tunnel", what).cure(cure));
    }
    let new = found.ok()?;
    let what = format!("PUBLIC_URL is {url}, but ngrok's address is now {new}");
    let cure = format!(
        "set PUBLIC_URL={new} (or PUBLIC_URL=ngrok), start callbridge again, then: \
         callbridge check --fix"
    );
    // A domain of one's own may lead here beside ngrok.
    let is_ngroks = host_of(url).contains("ngrok");
    let level = if is_ngroks { Level::Wrong } else { Level::Warning };
    Some(Finding::new("ngrok", "tunnel", level, what).cure(cure))
}

// ============================================================================
// Everybody is asked at once
// ============================================================================
//
// In:       the set-up.
// Out:      what each party's thread has found, in the order of the parties.
// Fails:    never. Who takes too long is a finding.
// Not here: waiting for a thread that hangs. It ends with the process.

type Check = fn(&'static Setup) -> Vec<Finding>;
type Question = Box<dyn FnOnce() -> Finding + Send>;

const CHECKS: [(&str, Check); 4] =
    [("Ultravox", ultravox), ("n8n", n8n), ("PUBLIC_URL", outside), ("Twilio", twilio)];

fn ask_everybody(setup: &'static Setup, deadline: Instant) -> Vec<Finding> {
    let (told, hear) = mpsc::channel();
    for (place, (party, check)) in CHECKS.into_iter().enumerate() {
        let told = told.clone();
        let asking = move || {
            if told.send((place, check(setup))).is_err() {
                // It came too late, which has been said.
            }
        };
        if spawn(format!("check {party}"), asking).is_err() {
            // Its sender is gone, so nobody waits for it, and it is reported as unanswered.
        }
    }
    drop(told);
    let mut found: HashMap<usize, Vec<Finding>> = HashMap::new();
    while let Ok((place, findings)) =
        hear.recv_timeout(deadline.saturating_duration_since(Instant::now()))
    {
        found.insert(place, findings);
    }
    let mut all = Vec::new();
    for (place, (party, _)) in CHECKS.into_iter().enumerate() {
        all.extend(found.remove(&place).unwrap_or_else(|| {
            let what = format!("no answer within {} s", CHECK_WITHIN.as_secs());
            vec![Finding::wrong(party, "all", what).cure("check this machine's network and DNS")]
        }));
    }
    all
}

// ============================================================================
// Ultravox: the key, then model, voices and corpus
// ============================================================================

fn ultravox(setup: &'static Setup) -> Vec<Finding> {
    let config = &setup.bridge.config;
    if setup.is_malformed("ULTRAVOX_API_KEY") || setup.is_malformed("ULTRAVOX_API_URL") {
        let what = "not asked: the key or its address is not set right";
        return vec![Finding::skipped("Ultravox", "account", what).cure("mend the settings first")];
    }
    let account = match ask_ultravox(setup, "/api/accounts/me", Instant::now() + STEP_WITHIN) {
        Ok(account) => account,
        Err(trouble) => {
            let finding = trouble.finding("Ultravox", "account", Level::Wrong);
            let what = "model, voices and corpus not looked up, for the reason above";
            let rest = Finding::skipped("Ultravox", "model", what);
            return vec![finding, rest.cure("mend that first")];
        }
    };
    let mut findings = judge_account(config, &account);
    let deadline = Instant::now() + STEP_WITHIN;
    let mut questions: Vec<Question> = vec![Box::new(move || find_model(setup, deadline))];
    for (voice, stages) in voices(setup) {
        questions.push(Box::new(move || find_voice(setup, &voice, &stages, deadline)));
    }
    questions.push(Box::new(move || find_corpus(setup, deadline)));
    findings.extend(all_at_once("Ultravox", questions));
    if !setup.agent_is_right {
        let what = "voices not looked up: the agent files have mistakes";
        let finding = Finding::skipped("Ultravox", "voices", what);
        findings.push(finding.cure("mend the agent files first"));
    }
    findings
}

fn all_at_once(party: &'static str, questions: Vec<Question>) -> Vec<Finding> {
    thread::scope(|scope| {
        let asked: Vec<_> = questions
            .into_iter()
            .map(|ask| {
                thread::Builder::new().name(format!("check {party}")).spawn_scoped(scope, ask)
            })
            .collect();
        let mut findings = Vec::new();
        for thread in asked {
            findings.push(match thread.map(thread::ScopedJoinHandle::join) {
                Ok(Ok(finding)) => finding,
                Ok(Err(_)) | Err(_) => {
                    Finding::warning(party, "thread", "a question was not asked")
                        .cure("try again; this machine is out of threads")
                }
            });
        }
        findings
    })
}

fn judge_account(config: &Config, account: &Value) -> Vec<Finding> {
    let name = account["name"].as_str().filter(|name| !name.is_empty()).unwrap_or("no name");
    let mut findings =
        vec![Finding::ok("Ultravox", "account", format!("the key is good ({name})"))];
    let subscribed = account["hasActiveSubscription"].as_bool().unwrap_or(false);
    let left = account["freeTimeRemaining"].as_str().and_then(seconds);
    if let Some(left) = left.filter(|_| !subscribed) {
        let minutes = left.as_secs() / 60;
        let add = "add billing at app.ultravox.ai";
        findings.push(if left < Duration::from_mins(1) {
            Finding::wrong("Ultravox", "minutes", "no free minutes are left, and there is no plan")
                .cure(add)
        } else if left < config.max_call {
            // An unjoined or running call holds back its maximum duration.
            let (longest, most) = (config.max_call.as_secs(), left.as_secs());
            let what = format!(
                "{minutes} free minutes are left, fewer than one call may take ({longest} s)"
            );
            let cure = format!("{add}, or set MAX_CALL_SECONDS={most} or less");
            Finding::warning("Ultravox", "minutes", what).cure(cure)
        } else {
            Finding::ok("Ultravox", "minutes", format!("{minutes} free minutes are left"))
        });
    }
    let at_once = account["allowedConcurrentCalls"].as_u64();
    match at_once.map(|most| usize::try_from(most).unwrap_or(usize::MAX)) {
        Some(most) if most < config.max_calls => {
            let what =
                format!("the plan allows {most} calls at once, MAX_CALLS is {}", config.max_calls);
            let cure =
                format!("set MAX_CALLS={most}: one more caller then hears that lines are busy");
            findings.push(Finding::warning("Ultravox", "calls", what).cure(cure));
        }
        Some(most) => {
            let what = format!("the plan allows {most} calls at once");
            findings.push(Finding::ok("Ultravox", "calls", what));
        }
        None => {}
    }
    findings
}

/// `"1800s"`, `"0.5s"`.
fn seconds(text: &str) -> Option<Duration> {
    let seconds = text.strip_suffix('s')?.parse::<f64>().ok()?;
    Duration::try_from_secs_f64(seconds.max(0.0)).ok()
}

fn find_model(setup: &Setup, deadline: Instant) -> Finding {
    let wanted = &setup.bridge.config.ultravox_model;
    match ultravox_list(setup, "/api/models", "", deadline) {
        Ok(models) => {
            let names = models.iter().filter_map(|model| model["name"].as_str());
            if names.clone().any(|name| name == wanted) {
                return Finding::ok("Ultravox", "model", format!("knows the model {wanted}"));
            }
            let what = format!("has no model \"{wanted}\"");
            let cure = format!("set ULTRAVOX_MODEL to one of: {}", offered(names));
            Finding::wrong("Ultravox", "model", what).cure(cure)
        }
        Err(trouble) => trouble.finding("Ultravox", "model", Level::Warning),
    }
}

fn offered<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.take(OFFERED_MAX).collect();
    if names.is_empty() { "(none)".to_owned() } else { names.join(", ") }
}

/// Each voice once, with the stages that speak with it.
fn voices(setup: &Setup) -> BTreeMap<String, Vec<String>> {
    let mut voices: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let stages = setup.bridge.agent.stages.iter().filter(|_| setup.agent_is_right);
    for (name, stage) in stages {
        voices.entry(stage.voice.clone()).or_default().push(name.clone());
    }
    voices
}

/// Ultravox takes an id, or a name if no other voice has it.
fn find_voice(setup: &Setup, voice: &str, stages: &[String], deadline: Instant) -> Finding {
    let check = format!("voice {voice}");
    let place = format!("stages.{}.voice", stages.join(", "));
    if is_uuid(voice) {
        return match ask_ultravox(setup, &format!("/api/voices/{voice}"), deadline) {
            Ok(found) => {
                let name = found["name"].as_str().unwrap_or("no name");
                Finding::ok("Ultravox", &check, format!("knows the voice {voice} ({name})"))
            }
            Err(trouble) if trouble.status == 404 => {
                Finding::wrong("Ultravox", &check, format!("has no voice with the id {voice}"))
                    .cure(format!("correct {place} in agent.json, by name or id"))
            }
            Err(trouble) => trouble.finding("Ultravox", &check, Level::Warning),
        };
    }
    let search: String =
        form_urlencoded::Serializer::new(String::new()).append_pair("search", voice).finish();
    let found = match ultravox_list(setup, "/api/voices", &search, deadline) {
        Ok(found) => found,
        Err(trouble) => return trouble.finding("Ultravox", &check, Level::Warning),
    };
    let named = found.iter().filter(|found| found["name"] == voice);
    let ids: Vec<&str> = named.filter_map(|found| found["voiceId"].as_str()).collect();
    match ids.as_slice() {
        [_] => Finding::ok("Ultravox", &check, format!("knows the voice {voice}")),
        [] => {
            let alike = found.iter().filter_map(|found| found["name"].as_str());
            let what = format!("has no voice named \"{voice}\"");
            let cure = format!("correct {place} in agent.json; similar names: {}", offered(alike));
            Finding::wrong("Ultravox", &check, what).cure(cure)
        }
        ids => {
            let what = format!("has {} voices named \"{voice}\"", ids.len());
            let ids = offered(ids.iter().copied());
            let cure = format!("put an id into {place} in agent.json: {ids}");
            Finding::wrong("Ultravox", &check, what).cure(cure)
        }
    }
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36 && text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
}

fn find_corpus(setup: &Setup, deadline: Instant) -> Finding {
    let Some(id) = &setup.bridge.config.ultravox_corpus_id else {
        let what = "ULTRAVOX_CORPUS_ID is not set: the agent looks nothing up";
        return Finding::skipped("Ultravox", "corpus", what)
            .cure("set it if you have a corpus at app.ultravox.ai");
    };
    let unknown = || {
        Finding::wrong("Ultravox", "corpus", format!("has no corpus \"{id}\""))
            .cure("set ULTRAVOX_CORPUS_ID to the id that app.ultravox.ai shows, or take it out")
    };
    if !is_uuid(id) {
        return unknown();
    }
    match ask_ultravox(setup, &format!("/api/corpora/{id}"), deadline) {
        Ok(corpus) => {
            let name = corpus["name"].as_str().unwrap_or("no name");
            if corpus["stats"]["numDocs"].as_u64() == Some(0) {
                return Finding::warning(
                    "Ultravox",
                    "corpus",
                    format!("the corpus {name} is empty"),
                )
                .cure("add a source to it at app.ultravox.ai: the agent finds nothing there");
            }
            Finding::ok("Ultravox", "corpus", format!("knows the corpus {name}"))
        }
        Err(trouble) if trouble.status == 404 => unknown(),
        Err(trouble) => trouble.finding("Ultravox", "corpus", Level::Warning),
    }
}

/// All pages of a list. `next` names the next page's whole address; only its query is used, so that
/// the key goes nowhere else.
fn ultravox_list(
    setup: &Setup,
    path: &str,
    query: &str,
    deadline: Instant,
) -> Result<Vec<Value>, Trouble> {
    let mut all = Vec::new();
    let mut query = query.to_owned();
    for _ in 0..PAGES_MAX {
        let page = ask_ultravox(setup, &format!("{path}?{query}"), deadline)?;
        all.extend(page["results"].as_array().cloned().unwrap_or_default());
        match page["next"].as_str().and_then(|next| next.split_once('?')) {
            Some((_, next)) => next.clone_into(&mut query),
            None => return Ok(all),
        }
    }
    Err(Trouble::new(format!("its list {path} does not end"), "check ULTRAVOX_API_URL"))
}

fn ask_ultravox(setup: &Setup, path: &str, deadline: Instant) -> Result<Value, Trouble> {
    let config = &setup.bridge.config;
    let url = format!("{}{path}", config.ultravox_api_url);
    let within = deadline.saturating_duration_since(Instant::now());
    let headers = [("X-API-Key", config.ultravox_api_key.reveal())];
    let answer = get(&setup.bridge.web, &url, &headers, within).map_err(|why| {
        let what = format!("{}: {why}", host_of(&url));
        Trouble::new(what, "check this machine's network, and ULTRAVOX_API_URL if it is set")
    })?;
    let cure = match answer.status {
        200 if answer.json().is_object() => return Ok(answer.json()),
        401 | 403 => {
            let what = format!("does not know the key ({})", answer.status);
            let cure = "copy it again to ULTRAVOX_API_KEY: app.ultravox.ai, Settings, API keys";
            return Err(Trouble { status: answer.status, ..Trouble::new(what, cure) });
        }
        402 => "the account has no minutes left: add billing at app.ultravox.ai",
        429 => "too many requests at the moment: try again",
        500.. => "Ultravox is in trouble: try again later",
        _ => "this is not what Ultravox answers: check ULTRAVOX_API_URL",
    };
    let what = format!("{} answered {}", host_of(&url), answer.brief(config));
    Err(Trouble { status: answer.status, ..Trouble::new(what, cure) })
}

// ============================================================================
// n8n: the question of step 2
// ============================================================================

fn n8n(setup: &'static Setup) -> Vec<Finding> {
    let config = &setup.bridge.config;
    let Some(url) = &config.n8n_webhook_url else {
        let finding = if setup.is_malformed("N8N_WEBHOOK_URL") {
            Finding::skipped("n8n", "webhook", "not asked: N8N_WEBHOOK_URL is malformed")
                .cure("mend the setting first")
        } else {
            let what = "N8N_WEBHOOK_URL is not set: default greeting, no bookings, transcripts \
                        stay on disk";
            Finding::skipped("n8n", "webhook", what).cure("set it if you have a workflow")
        };
        return vec![finding];
    };
    if url.contains("/webhook-test/") {
        let what = "N8N_WEBHOOK_URL is the test URL, which answers once and only while you listen";
        let cure =
            "activate the workflow, and write /webhook/ for /webhook-test/ in N8N_WEBHOOK_URL";
        return vec![Finding::wrong("n8n", "webhook", what).cure(cure)];
    }
    let sid = format!("CAcheck{}", random_hex());
    let key = format!("{sid}-1");
    let question =
        ToN8n { sid: &sid, number: NOBODYS_NUMBER, route: "1", data: "empty", key, ended_by: None };
    let began = Instant::now();
    let reply = ask_n8n(setup.bridge, &question, STEP_WITHIN, read_greeting);
    let took = began.elapsed();
    match reply {
        Ok(greeting) => judge_greeting(greeting.as_deref(), took),
        Err(failure) => vec![no_greeting(&failure)],
    }
}

/// No greeting: n8n leaves it to the agent, as the workflow that comes along does for strangers.
fn judge_greeting(greeting: Option<&str>, took: Duration) -> Vec<Finding> {
    let (took, limit) = (took.as_millis(), LOOKUP_WITHIN.as_millis());
    let length = greeting.map_or(0, |greeting| greeting.chars().count());
    if length > GREETING_CHARS_MAX {
        let what = format!("its greeting has {length} characters, and the default is used instead");
        let cure =
            format!("make firstMessage shorter in the workflow: {GREETING_CHARS_MAX} at most");
        return vec![Finding::warning("n8n", "webhook", what).cure(cure)];
    }
    if took > limit {
        let what =
            format!("answered after {took} ms: a caller waits {limit} ms, then hears the default");
        let cure = "make route 1 of the workflow faster (the first call after n8n's start is slow)";
        return vec![Finding::warning("n8n", "webhook", what).cure(cure)];
    }
    let what = match greeting {
        Some(greeting) => {
            let begins: String = greeting.chars().take(40).collect();
            let dots = if length > 40 { "…" } else { "" };
            format!("greets with \"{begins}{dots}\", after {took} ms")
        }
        None => format!("answers after {took} ms, and leaves the greeting to the agent"),
    };
    vec![Finding::ok("n8n", "webhook", what)]
}

fn no_greeting(failure: &Failure) -> Finding {
    let source = failure.source.as_deref();
    if let Some(why) = source.and_then(|source| source.downcast_ref::<ureq::Error>()) {
        let why = NoAnswer::of(why);
        let cure = why.cure().unwrap_or("check N8N_WEBHOOK_URL, and that n8n runs");
        return Finding::wrong("n8n", "webhook", why.to_string()).cure(cure);
    }
    let cure = failure.advice.unwrap_or("is n8n overloaded? See its Executions");
    Finding::wrong("n8n", "webhook", failure.what.clone()).cure(cure)
}

// ============================================================================
// PUBLIC_URL: from the outside in
// ============================================================================
//
// In:       the address that Twilio would call, and the port that callbridge has on this machine.
// Out:      does the one lead to the other, and does it pass the audio socket?
// Fails:    each way to miss is named: name, port, certificate, tunnel, proxy, another program.
// Not here: what the internet sees of this machine's name. A name may mean something else there.

fn outside(setup: &'static Setup) -> Vec<Finding> {
    let nonce = random_hex();
    let (home, proof) = at_home(setup, &nonce);
    let mut findings = vec![home];
    let Some(url) = &setup.public_url else {
        let what = "not tried: there is no address yet";
        findings.push(Finding::skipped("PUBLIC_URL", "health", what).cure("set PUBLIC_URL first"));
        return findings;
    };
    let reached = from_outside(setup, url, &nonce, proof.as_deref());
    let is_reached = reached.level == Level::Ok;
    findings.push(reached);
    if is_reached {
        let mut questions: Vec<Question> = vec![Box::new(move || audio_socket(setup, url))];
        if setup.bridge.config.ssl_cert_file.is_some() {
            questions.push(Box::new(move || certificate_for_twilio(url)));
        }
        findings.extend(all_at_once("PUBLIC_URL", questions));
        findings.extend(address_for_twilio(url));
    }
    findings
}

/// The server on this machine, or this process in its place; and how it signs the nonce.
fn at_home(setup: &'static Setup, nonce: &str) -> (Finding, Option<String>) {
    let config = &setup.bridge.config;
    let port = config.port;
    if port == 0 {
        let what = "PORT=0 takes another port at each start, which no tunnel can know";
        return (Finding::wrong("callbridge", "port", what).cure("set PORT=8000"), None);
    }
    let url = format!("http://{}/health?nonce={nonce}", SocketAddr::new(near(config.bind), port));
    let another = |what: &str| {
        let what = format!("port {port} on this machine is held by another program: {what}");
        let cure = "end that program, or set another PORT (and forward the tunnel to it)";
        (Finding::wrong("callbridge", "port", what).cure(cure), None)
    };
    match get(&http_agent(&[]), &url, &[], HOME_WITHIN) {
        Ok(answer) => match answer.proof() {
            Some(proof) => (judge_server(setup, &proof, nonce), Some(proof)),
            None if answer.status == 200 && answer.body.trim() == "ok" => {
                let what = format!("an older callbridge runs on port {port}");
                let cure = "stop it and start this one";
                (Finding::wrong("callbridge", "port", what).cure(cure), None)
            }
            None => another(&format!("it answered {}", answer.brief(config))),
        },
        Err(NoAnswer::Refused) => stand_in(setup, nonce),
        Err(why) => another(&why.to_string()),
    }
}

/// The running server has read its settings when it was started, and may know an older address.
fn judge_server(setup: &Setup, proof: &str, nonce: &str) -> Finding {
    let port = setup.bridge.config.port;
    let address = |proof: &str| proof.rsplit(' ').next().map(str::to_owned);
    let is_same = address(proof) == address(&setup.prove(nonce));
    if is_same || setup.public_url.is_none() || setup.is_malformed("PUBLIC_URL") {
        return Finding::ok("callbridge", "port", format!("runs on port {port}"));
    }
    let what = format!("the one that runs on port {port} was started with another PUBLIC_URL");
    Finding::wrong("callbridge", "port", what)
        .cure("start it again, so that Twilio is told the address as it is now")
}

/// Where a listener on this address is reached from the same machine.
fn near(bind: IpAddr) -> IpAddr {
    match bind {
        IpAddr::V4(address) if address.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(address) if address.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        other => other,
    }
}

/// Behind the same front door there is nobody to take a call.
impl Hall for Setup {
    fn answer(&'static self, request: &mut tiny_http::Request) -> Reply {
        if path_of(request) == "/health" && matches!(request.method(), Method::Get | Method::Head) {
            let (bridge, url) = (self.bridge, request.url());
            return bridge.identity.health(&bridge.config.public_url, url);
        }
        // As a proxy that finds nobody at home would say: Twilio may try again.
        Reply::text(503, "callbridge is not running, only its check")
    }

    fn take_stream(&'static self, visitor: &Visitor, head: Vec<u8>) {
        let line = match accept_stream(self.bridge, &visitor.socket, head) {
            Ok(line) => line,
            Err(why) => return log!(Warn, "/media-stream was refused: {why}"),
        };
        // Our own question whether it opens says goodbye before a start.
        if !matches!(await_start(&line), Ok(None)) {
            line.close(CloseCode::Policy, "callbridge is not running, only its check");
            line.await_close();
        }
    }
}

/// The same front door as the server's, for the moment, and without calls.
fn stand_in(setup: &'static Setup, nonce: &str) -> (Finding, Option<String>) {
    let (bridge, port) = (setup.bridge, setup.bridge.config.port);
    let opened = TcpListener::bind((bridge.config.bind, port))
        .and_then(|listener| door::open(listener, setup, bridge.config.max_calls));
    match opened {
        Ok(()) => {
            let what = format!("does not run yet; this check listens on port {port} in its place");
            let cure = "start callbridge before you call";
            let finding = Finding::warning("callbridge", "port", what).cure(cure);
            (finding, Some(setup.prove(nonce)))
        }
        Err(error) => {
            let what = format!("cannot listen on {}:{port}: {error}", bridge.config.bind);
            let cure = if error.kind() == io::ErrorKind::PermissionDenied {
                "set PORT=8000: ports under 1024 belong to root"
            } else {
                "set BIND to an address of this machine (0.0.0.0 is all of them), or another PORT"
            };
            (Finding::wrong("callbridge", "port", what).cure(cure), None)
        }
    }
}

fn from_outside(setup: &Setup, url: &str, nonce: &str, proof: Option<&str>) -> Finding {
    let port = setup.bridge.config.port;
    let address = format!("{url}/health?nonce={nonce}");
    let wrong =
        |what: String, cure: String| Finding::wrong("PUBLIC_URL", "health", what).cure(cure);
    let answer = match get(&setup.bridge.web, &address, &[], STEP_WITHIN) {
        Ok(answer) => answer,
        Err(why) => {
            let cure = match why {
                NoAnswer::UnknownName => {
                    "correct the host's name in PUBLIC_URL; a tunnel's name ends with the tunnel"
                }
                NoAnswer::Refused => "start the tunnel or the proxy that has this address",
                NoAnswer::TooSlow => {
                    "open the port in the firewall and router, or use a tunnel (ngrok http)"
                }
                _ => why.cure().unwrap_or("check the tunnel or proxy in front of callbridge"),
            };
            return wrong(format!("{}: {why}", shown_url(url)), cure.to_owned());
        }
    };
    match (answer.proof(), proof) {
        (Some(theirs), Some(ours)) if theirs == ours => {
            let took = answer.took.as_millis();
            let what = format!("{} leads to this callbridge, in {took} ms", shown_url(url));
            return Finding::ok("PUBLIC_URL", "health", what);
        }
        (Some(_), _) => {
            let what =
                format!("{} leads to another callbridge, not to port {port} here", shown_url(url));
            let cure = format!(
                "end the other one, or forward the tunnel or proxy to 127.0.0.1:{port} on this \
                 machine (unless it is one of several copies behind one address)"
            );
            return wrong(what, cure);
        }
        (None, _) => {}
    }
    let (what, cure) = explain(&setup.bridge.config, &answer, url);
    wrong(what, cure)
}

/// What stands in front, or in the place, of callbridge.
fn explain(config: &Config, answer: &Answer, url: &str) -> (String, String) {
    let port = config.port;
    let header = |name: &str| answer.headers.get(name).and_then(|value| value.to_str().ok());
    let code = header("ngrok-error-code").map(str::to_owned);
    if let Some(code) = code.or_else(|| ngrok_error(&answer.body)) {
        return explain_ngrok(&code, url, port);
    }
    let shown = shown_url(url);
    let cloudflare = header("cf-ray").is_some();
    let brief = answer.brief(config);
    match answer.status {
        530 => (
            format!("{shown}: Cloudflare's tunnel is down (530)"),
            format!("start it: cloudflared tunnel run (or --url http://localhost:{port})"),
        ),
        502..=504 | 520..=527 => (
            format!("{shown}: the proxy answers {}, it reaches nobody behind it", answer.status),
            if cloudflare {
                format!("point the tunnel's service to http://localhost:{port}")
            } else {
                format!(
                    "forward the proxy to 127.0.0.1:{port} (Caddy: reverse_proxy 127.0.0.1:{port})"
                )
            },
        ),
        300..=399 => {
            let to = header("location").unwrap_or("nowhere");
            let cure = match to.split_once("/health").map(|(origin, _)| origin) {
                Some(origin) if origin.starts_with("https://") && origin != url => {
                    format!("set PUBLIC_URL={origin}")
                }
                _ => "take the redirect or login out of the way of PUBLIC_URL".to_owned(),
            };
            (format!("{shown} redirects to {}", shown_url(to)), cure)
        }
        401 | 403 => (
            format!("{shown}: something in front asks for a login or refuses ({brief})"),
            "let everybody pass: Twilio cannot log in; callbridge checks its signature".to_owned(),
        ),
        200 if answer.body.trim() == "ok" => (
            format!("{shown} leads to an older callbridge, or loses what stands behind the ?"),
            "stop the older one and start this one; let the proxy pass the whole address"
                .to_owned(),
        ),
        _ => (
            format!("{shown} leads to another program, which answered {brief}"),
            format!("forward the tunnel or proxy to port {port} of this machine, all paths of it"),
        ),
    }
}

fn explain_ngrok(code: &str, url: &str, port: u16) -> (String, String) {
    let shown = shown_url(url);
    match code {
        "ERR_NGROK_3200" => (
            format!("{shown}: the ngrok tunnel is down ({code})"),
            format!("start it: ngrok http {port}, and put its address into PUBLIC_URL (or ngrok)"),
        ),
        "ERR_NGROK_8012" => (
            format!("{shown}: ngrok forwards to a port where nothing listens ({code})"),
            format!("start it with this port: ngrok http {port}"),
        ),
        _ => (
            format!("{shown}: ngrok reports {code}"),
            format!("see ngrok.com/docs/errors/{}", code.to_lowercase()),
        ),
    }
}

/// `ERR_NGROK_3200` in one of its pages.
fn ngrok_error(page: &str) -> Option<String> {
    const SIGN: &str = "ERR_NGROK_";
    let (_, behind) = page.split_once(SIGN)?;
    let digits: String = behind.chars().take_while(char::is_ascii_digit).collect();
    Some(format!("{SIGN}{digits}"))
}

/// Opens `/media-stream` as Twilio would, and lets it go.
fn audio_socket(setup: &Setup, url: &str) -> Finding {
    let shown = format!("{}/media-stream", shown_url(url).replacen("http", "ws", 1));
    let wrong = |what: &str, cure: &str| {
        Finding::wrong("PUBLIC_URL", "websocket", format!("{shown}: {what}")).cure(cure)
    };
    let proxy = "switch WebSocket upgrades on in the proxy (nginx: proxy_http_version 1.1, and the \
                 headers Upgrade and Connection; Caddy, ngrok and cloudflared pass them on)";
    match upgrade(setup, url) {
        Ok(()) => {
            Finding::ok("PUBLIC_URL", "websocket", "the audio socket opens (WebSocket upgrade)")
        }
        Err(SocketError::Http(answer)) => match answer.status().as_u16() {
            403 => wrong(
                "the running callbridge refuses our signature (403): it has other settings",
                "start it again, so that it takes TWILIO_AUTH_TOKEN and PUBLIC_URL as they are now",
            ),
            status @ (200 | 400 | 404 | 405 | 426) => {
                wrong(&format!("a proxy does not pass the WebSocket upgrade ({status})"), proxy)
            }
            status => wrong(&format!("no WebSocket upgrade, status {status}"), proxy),
        },
        Err(error) => wrong(&format!("no WebSocket upgrade: {error}"), proxy),
    }
}

fn upgrade(setup: &Setup, url: &str) -> Result<(), SocketError> {
    let bridge = setup.bridge;
    let address = format!("{}/media-stream", url.replacen("http", "ws", 1));
    let mut request = address.as_str().into_client_request()?;
    if let Some(token) = &bridge.config.twilio_auth_token {
        let signature = HeaderValue::from_str(&sign_as_twilio(token, &address))
            .map_err(|error| SocketError::Io(io::Error::other(error)))?;
        request.headers_mut().insert("X-Twilio-Signature", signature);
    }
    let uri = request.uri().clone();
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    let socket = connect(&host, uri.port_u16().unwrap_or(443))?;
    let name = ServerName::try_from(host).map_err(io::Error::other)?;
    let tls = ClientConnection::new(Arc::clone(&bridge.tls), name).map_err(io::Error::other)?;
    let deadline = Instant::now() + UPGRADE_WITHIN;
    let stream = StreamOwned::new(tls, InTime { socket: &socket, deadline });
    match tungstenite::client::client(request, stream) {
        Ok((mut socket, _)) => {
            // Without a `start` there is no call. Said in order, so that nobody warns of it.
            if socket.close(None).and_then(|()| socket.flush()).is_err() {
                // It opened, and that was the question.
            }
            Ok(())
        }
        Err(HandshakeError::Failure(error)) => Err(error),
        Err(HandshakeError::Interrupted(_)) => Err(SocketError::Io(io::ErrorKind::TimedOut.into())),
    }
}

fn sign_as_twilio(token: &Secret, address: &str) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, token.reveal().as_bytes());
    BASE64.encode(hmac::sign(&key, address.as_bytes()).as_ref())
}

/// Twilio does not know the roots in `SSL_CERT_FILE`.
fn certificate_for_twilio(url: &str) -> Finding {
    let public = http_agent(&trusted_roots(None).unwrap_or_default());
    match get(&public, &format!("{url}/health"), &[], UPGRADE_WITHIN) {
        Err(NoAnswer::UnknownIssuer) => {
            let what = "its certificate is trusted here through SSL_CERT_FILE, but not by Twilio";
            let cure = "use a public certificate: Caddy gets one by itself, tunnels have one";
            Finding::warning("PUBLIC_URL", "certificate", what).cure(cure)
        }
        _ => Finding::ok("PUBLIC_URL", "certificate", "its certificate needs no SSL_CERT_FILE"),
    }
}

/// A name that leads to this machine only from here, or from the same house.
fn address_for_twilio(url: &str) -> Option<Finding> {
    let uri: Uri = url.parse().ok()?;
    let host = uri.host()?.trim_matches(['[', ']']);
    let mut addresses = (host, uri.port_u16().unwrap_or(443)).to_socket_addrs().ok()?;
    let address = addresses.next()?.ip();
    let is_private = match address {
        IpAddr::V4(address) => address.is_loopback() || address.is_private(),
        IpAddr::V6(address) => address.is_loopback() || address.is_unique_local(),
    };
    is_private.then(|| {
        let what = format!("{host} is {address} here, an address that Twilio cannot reach");
        let cure = "if it is another one outside, all is well; else use a public name or a tunnel";
        Finding::warning("PUBLIC_URL", "address", what).cure(cure)
    })
}

// ============================================================================
// Twilio: the account, then the number
// ============================================================================

/// What `--fix` can change, and looks at again.
const NUMBER_CHECKS: [&str; 4] = ["voice", "method", "status callback", "handled by"];

fn twilio(setup: &'static Setup) -> Vec<Finding> {
    let config = &setup.bridge.config;
    let mut findings = Vec::new();
    if config.twilio_auth_token.is_none() {
        let what = "TWILIO_AUTH_TOKEN is not set: anyone can start calls here that you pay for";
        let cure = "copy the Auth Token from the first page of the Twilio console";
        findings.push(Finding::warning("Twilio", "token", what).cure(cure));
    }
    if config.twilio_auth_token.is_none() || config.twilio_account_sid.is_none() {
        let what = "the number is not looked at: it takes TWILIO_ACCOUNT_SID and TWILIO_AUTH_TOKEN";
        let by_hand = voice_url(setup).unwrap_or_else(|| "PUBLIC_URL/incoming-call".into());
        let cure = format!(
            "set both; or set \"A call comes in\" in the console to Webhook, {by_hand}, HTTP POST"
        );
        findings.push(Finding::skipped("Twilio", "number", what).cure(cure));
        return findings;
    }
    match ask_twilio(setup, ".json", Instant::now() + STEP_WITHIN) {
        Ok(account) => {
            findings.extend(judge_twilio_account(config, &account));
            findings.extend(twilio_number(setup));
        }
        Err(trouble) => {
            findings.push(trouble.finding("Twilio", "account", Level::Wrong));
            let what = "the number is not looked at, for the reason above";
            findings.push(Finding::skipped("Twilio", "number", what).cure("mend that first"));
        }
    }
    findings
}

/// The answer holds the account's Auth Token in clear: nothing of it is shown but these fields.
fn judge_twilio_account(config: &Config, account: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    let status = account["status"].as_str().unwrap_or("active");
    findings.push(match (status, account["type"].as_str()) {
        ("active", Some("Trial")) => {
            let what = "a trial account: it plays an announcement, takes calls only from numbers \
                        that you have verified, and ends them after 10 minutes";
            Finding::warning("Twilio", "account", what).cure("upgrade it in the console")
        }
        ("active", _) => Finding::ok("Twilio", "account", "the account is active"),
        (status, _) => Finding::wrong("Twilio", "account", format!("the account is {status}"))
            .cure("see the console's first page: billing, or a question of Twilio's to answer"),
    });
    let primary = account["auth_token"].as_str().filter(|token| !token.is_empty());
    if let (Some(primary), Some(ours)) = (primary, &config.twilio_auth_token)
        && !bool::from(primary.as_bytes().ct_eq(ours.reveal().as_bytes()))
    {
        let what = "TWILIO_AUTH_TOKEN is not the primary Auth Token, with which Twilio signs";
        let cure = "copy the primary Auth Token, from the first page of the console";
        findings.push(Finding::wrong("Twilio", "token", what).cure(cure));
    }
    findings
}

fn twilio_number(setup: &Setup) -> Vec<Finding> {
    match find_number(setup, Instant::now() + STEP_WITHIN) {
        Ok(number) => {
            let what =
                format!("{} is in this account", number["phone_number"].as_str().unwrap_or("?"));
            let mut findings = vec![Finding::ok("Twilio", "number", what)];
            findings.extend(judge_number(setup, &number));
            findings
        }
        Err(finding) => vec![finding],
    }
}

/// Twilio's filter finds parts of numbers as well, so the comparison is ours.
fn find_number(setup: &Setup, deadline: Instant) -> Result<Value, Finding> {
    let wanted = setup.bridge.config.twilio_phone_number.as_deref();
    let numbers = twilio_numbers(setup, wanted, deadline)
        .map_err(|trouble| trouble.finding("Twilio", "number", Level::Wrong))?;
    if let Some(wanted) = wanted {
        if let Some(number) = numbers.into_iter().find(|number| number["phone_number"] == wanted) {
            return Ok(number);
        }
        let all = twilio_numbers(setup, None, deadline).unwrap_or_default();
        let what = format!("{wanted} is not a number of this account");
        let cure = format!("set TWILIO_PHONE_NUMBER to one of: {}", offered(phone_numbers(&all)));
        return Err(Finding::wrong("Twilio", "number", what).cure(cure));
    }
    let what = "TWILIO_PHONE_NUMBER is not set, so no number is looked at";
    let finding = if setup.is_malformed("TWILIO_PHONE_NUMBER") {
        Finding::skipped("Twilio", "number", "not looked at: TWILIO_PHONE_NUMBER is malformed")
    } else {
        Finding::skipped("Twilio", "number", what)
    };
    Err(finding.cure(match offered(phone_numbers(&numbers)).as_str() {
        "(none)" => {
            "buy a number with voice in the console, and set TWILIO_PHONE_NUMBER".to_owned()
        }
        numbers => format!("set TWILIO_PHONE_NUMBER to one of: {numbers}"),
    }))
}

fn phone_numbers(numbers: &[Value]) -> impl Iterator<Item = &str> {
    numbers.iter().filter_map(|number| number["phone_number"].as_str())
}

fn twilio_numbers(
    setup: &Setup,
    wanted: Option<&str>,
    deadline: Instant,
) -> Result<Vec<Value>, Trouble> {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("PageSize", "100");
    if let Some(wanted) = wanted {
        query.append_pair("PhoneNumber", wanted);
    }
    let mut path = format!("/IncomingPhoneNumbers.json?{}", query.finish());
    let mut all = Vec::new();
    for _ in 0..PAGES_MAX {
        let page = ask_twilio(setup, &path, deadline)?;
        all.extend(page["incoming_phone_numbers"].as_array().cloned().unwrap_or_default());
        match page["next_page_uri"].as_str().and_then(|next| next.split_once('?')) {
            Some((_, next)) => path = format!("/IncomingPhoneNumbers.json?{next}"),
            None => return Ok(all),
        }
    }
    Err(Trouble::new("its list of numbers does not end", "check TWILIO_API_URL"))
}

fn voice_url(setup: &Setup) -> Option<String> {
    setup.public_url.as_ref().map(|url| format!("{url}/incoming-call"))
}

/// Where the number's calls go, letter for letter.
fn judge_number(setup: &Setup, number: &Value) -> Vec<Finding> {
    let text = |name: &str| number[name].as_str().unwrap_or_default();
    let fix = "callbridge check --fix sets it";
    let mut findings = Vec::new();
    if number["capabilities"]["voice"].as_bool() == Some(false) {
        let what = "the number has no voice: it cannot be called";
        findings.push(Finding::wrong("Twilio", "handled by", what).cure("buy one with voice"));
    }
    let others = [("voice_application_sid", "a TwiML app"), ("trunk_sid", "a SIP trunk")];
    for (field, handler) in others.into_iter().filter(|(field, _)| !text(field).is_empty()) {
        let what = format!(
            "the number's calls go to {handler} ({}): its Voice URL is ignored",
            text(field)
        );
        let cure = "in the console, set \"Configure with\" to Webhook, TwiML Bin, Function, …";
        findings.push(Finding::wrong("Twilio", "handled by", what).cure(cure));
    }
    let Some(wanted) = voice_url(setup) else {
        let what = "the number's Voice URL is not compared: there is no address yet";
        findings.push(Finding::skipped("Twilio", "voice", what).cure("set PUBLIC_URL first"));
        return findings;
    };
    findings.push(if is_set(number, "voice_url", &wanted) {
        Finding::ok("Twilio", "voice", format!("the number's Voice URL is {wanted}"))
    } else {
        let what = match text("voice_url") {
            "" => "the number has no Voice URL".to_owned(),
            url => format!("the number's Voice URL is {}", shown_url(url)),
        };
        Finding::wrong("Twilio", "voice", what).cure(format!("it must be {wanted}: {fix}"))
    });
    if text("voice_method") == "GET" {
        let what = "the number's Voice URL is asked with GET, which callbridge answers 405";
        findings.push(Finding::wrong("Twilio", "method", what).cure(format!("HTTP POST: {fix}")));
    }
    let status = wanted.replacen("/incoming-call", "/call-status", 1);
    let status_is_right =
        is_set(number, "status_callback", &status) && text("status_callback_method") != "GET";
    if !status_is_right {
        let what = match text("status_callback") {
            "" => "the number has no status callback: a caller who hangs up early is noticed late"
                .to_owned(),
            url => format!(
                "the number's status callback is {} ({})",
                shown_url(url),
                text("status_callback_method")
            ),
        };
        let cure = format!("{status}, HTTP POST: {fix}");
        findings.push(Finding::warning("Twilio", "status callback", what).cure(cure));
    }
    findings
}

/// Twilio sends nothing of what stands behind a `#`: those are its own connection overrides.
fn is_set(number: &Value, field: &str, wish: &str) -> bool {
    number[field].as_str().is_some_and(|text| text.split('#').next() == Some(wish))
}

fn ask_twilio(setup: &Setup, path: &str, deadline: Instant) -> Result<Value, Trouble> {
    let within = deadline.saturating_duration_since(Instant::now());
    let (url, login) = twilio_request(setup, path);
    let answered = get(&setup.bridge.web, &url, &[("Authorization", &login)], within);
    read_twilio(&url, answered)
}

fn twilio_request(setup: &Setup, path: &str) -> (String, String) {
    let config = &setup.bridge.config;
    let account = config.twilio_account_sid.as_deref().unwrap_or_default();
    let token = config.twilio_auth_token.as_ref().map(Secret::reveal).unwrap_or_default();
    let url = format!("{}/2010-04-01/Accounts/{account}{path}", config.twilio_api_url);
    (url, format!("Basic {}", BASE64.encode(format!("{account}:{token}"))))
}

fn read_twilio(url: &str, answered: Result<Answer, NoAnswer>) -> Result<Value, Trouble> {
    let answer = answered.map_err(|why| {
        let what = format!("{}: {why}", host_of(url));
        Trouble::new(what, "check this machine's network, and TWILIO_API_URL if it is set")
    })?;
    let body = answer.json();
    if answer.status == 200 && body.is_object() {
        return Ok(body);
    }
    let code = body["code"].as_u64().unwrap_or_default();
    let message = body["message"].as_str().unwrap_or("an answer that cannot be read");
    let (what, cure) = match (answer.status, code) {
        (_, 20_008) => (
            "these are test credentials, which know no numbers".to_owned(),
            "use the live Account SID and Auth Token, from the first page of the console",
        ),
        (401, _) | (_, 20_003) => (
            "does not know this Account SID and Auth Token together (401)".to_owned(),
            "copy both from the first page of the console; an API key's secret does not work",
        ),
        (429, _) => ("is asked too often (429)".to_owned(), "try again in a minute"),
        (404, _) => (
            format!("knows no such account ({message})"),
            "copy TWILIO_ACCOUNT_SID again; check TWILIO_API_URL if it is set",
        ),
        (status @ 500.., _) => (format!("is in trouble ({status})"), "try again later"),
        (status, code) => (
            format!("answered {status}, code {code}: {message}"),
            "look the code up at twilio.com/docs/api/errors",
        ),
    };
    Err(Trouble { status: answer.status, ..Trouble::new(what, cure) })
}

// ============================================================================
// --fix: the number's Voice URL and status callback
// ============================================================================
//
// In:       credentials, the number, PUBLIC_URL.
// Out:      what was changed, as it reads afterwards.
// Fails:    in words, with nothing changed. Without a terminal and without --yes, always.
// Not here: TwiML apps and SIP trunks. Who has set one up knows why.

/// What Twilio calls it when it is set, when it is read, and what it shall be.
type Wish = (&'static str, &'static str, String);

fn fix(setup: &Setup, options: &Options) -> Vec<Finding> {
    let unable = |what: &str, cure: &str| vec![Finding::warning("fix", "fix", what).cure(cure)];
    let config = &setup.bridge.config;
    if config.twilio_auth_token.is_none()
        || config.twilio_account_sid.is_none()
        || config.twilio_phone_number.is_none()
    {
        let needed = "set TWILIO_ACCOUNT_SID, TWILIO_AUTH_TOKEN and TWILIO_PHONE_NUMBER";
        return unable("nothing was changed: the number is not known", needed);
    }
    let Some(voice) = voice_url(setup).filter(|_| !setup.is_malformed("PUBLIC_URL")) else {
        return unable("nothing was changed: there is no address yet", "set PUBLIC_URL first");
    };
    let number = match find_number(setup, Instant::now() + STEP_WITHIN) {
        Ok(number) => number,
        Err(finding) => {
            let what = format!("nothing was changed: {}", finding.what);
            return unable(&what, &finding.cure);
        }
    };
    let status = voice.replacen("/incoming-call", "/call-status", 1);
    let wishes: [Wish; 4] = [
        ("VoiceUrl", "voice_url", voice),
        ("VoiceMethod", "voice_method", "POST".into()),
        ("StatusCallback", "status_callback", status),
        ("StatusCallbackMethod", "status_callback_method", "POST".into()),
    ];
    let changes: Vec<Wish> =
        wishes.into_iter().filter(|(_, read, wish)| !is_set(&number, read, wish)).collect();
    if changes.is_empty() {
        return vec![Finding::ok("fix", "fix", "nothing to change at Twilio")];
    }
    if let Some(refusal) = ask_first(setup, options, &number, &changes) {
        return vec![refusal];
    }
    change(setup, &number, &changes)
}

/// Shows what would change. None: go ahead.
fn ask_first(
    setup: &Setup,
    options: &Options,
    number: &Value,
    changes: &[Wish],
) -> Option<Finding> {
    let whose = number["phone_number"].as_str().unwrap_or_default();
    let mut text = format!("\n  At Twilio, of {whose}:\n");
    for (name, read, wish) in changes {
        let old = match number[*read].as_str().unwrap_or_default() {
            "" => "(nothing)".to_owned(),
            old => shown_url(old),
        };
        text.push_str(&setup.printable(&format!("    {name:<21} {old} -> {wish}")));
        text.push('\n');
    }
    if !options.json {
        say(&text);
    }
    if options.yes {
        return None;
    }
    let unchanged = Finding::warning("fix", "fix", "nothing was changed");
    if options.json || !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        let what = "nothing was changed: there is no terminal to ask at";
        return Some(Finding { what: what.into(), ..unchanged }.cure("add --yes to do it unasked"));
    }
    say("  Change this? [y/N] ");
    let mut word = String::new();
    let is_read = io::stdin().lock().read_line(&mut word).is_ok();
    let is_wanted = is_read && matches!(word.trim(), "y" | "Y" | "yes");
    (!is_wanted).then(|| unchanged.cure("answer y, or set it in the console by hand"))
}

fn change(setup: &Setup, number: &Value, changes: &[Wish]) -> Vec<Finding> {
    let failed = |what: &str, cure: &str| vec![Finding::wrong("fix", "fix", what).cure(cure)];
    let sid = number["sid"].as_str().filter(|sid| is_sid(sid)).unwrap_or_default();
    if sid.is_empty() {
        return failed("Twilio gave the number no id", "set it in the console by hand");
    }
    let mut form = form_urlencoded::Serializer::new(String::new());
    form.extend_pairs(changes.iter().map(|(name, _, wish)| (*name, wish.as_str())));
    let path = format!("/IncomingPhoneNumbers/{sid}.json");
    let (url, login) = twilio_request(setup, &path);
    let request = setup
        .bridge
        .web
        .post(&url)
        .header("Authorization", &login)
        .header("Content-Type", "application/x-www-form-urlencoded");
    let began = Instant::now();
    let sent = request.config().timeout_global(Some(STEP_WITHIN)).build().send(form.finish());
    let answered =
        sent.map_err(|error| NoAnswer::of(&error)).and_then(|sent| Answer::read(sent, began));
    if let Err(trouble) = read_twilio(&url, answered) {
        return failed(&format!("Twilio was not changed: {}", trouble.what), trouble.cure);
    }
    // Not what Twilio said it has done, but what it says when it is asked.
    match ask_twilio(setup, &path, Instant::now() + STEP_WITHIN) {
        Ok(number) => {
            let is_done = changes.iter().all(|(_, read, wish)| is_set(&number, read, wish));
            let mut findings = if is_done {
                vec![Finding::ok("fix", "fix", "Twilio has taken it, and says so when asked again")]
            } else {
                failed("Twilio took it, and still says something else", "look at the console")
            };
            findings.extend(judge_number(setup, &number));
            findings
        }
        Err(trouble) => {
            let what = format!("changed, but it cannot be read back: {}", trouble.what);
            failed(&what, "try callbridge check again")
        }
    }
}

// ============================================================================
// Asking over HTTP, and why there is no answer
// ============================================================================

/// An answer with any status.
struct Answer {
    status: u16,
    headers: HeaderMap,
    body: String,
    took: Duration,
}

fn get(
    agent: &ureq::Agent,
    url: &str,
    headers: &[(&str, &str)],
    within: Duration,
) -> Result<Answer, NoAnswer> {
    let began = Instant::now();
    let mut request = agent.get(url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    // A limit of nothing would be none at all.
    let within = within.max(Duration::from_millis(1));
    let answered = request.config().timeout_global(Some(within)).build().call();
    Answer::read(answered.map_err(|error| NoAnswer::of(&error))?, began)
}

impl Answer {
    fn read(
        mut response: ureq::http::Response<ureq::Body>,
        began: Instant,
    ) -> Result<Answer, NoAnswer> {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let body = response.body_mut().with_config().limit(ULTRAVOX_REPLY_BYTES_MAX);
        let body = body.lossy_utf8(true).read_to_string();
        let body = body.map_err(|error| NoAnswer::of(&error))?;
        Ok(Answer { status, headers, body, took: began.elapsed() })
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }

    /// `ok` and twice 64 hexadecimal digits: a callbridge, which one, and with which `PUBLIC_URL`.
    fn proof(&self) -> Option<String> {
        let proof = self.body.trim().strip_prefix("ok ")?;
        let (process, address) = proof.split_once(' ')?;
        let is_proof = [process, address]
            .iter()
            .all(|word| word.len() == 64 && word.bytes().all(|byte| byte.is_ascii_hexdigit()));
        (self.status == 200 && is_proof).then(|| proof.to_owned())
    }

    /// Half a secret could not be found in it any more.
    fn brief(&self, config: &Config) -> String {
        let body = config.hide_secrets(self.body.clone());
        let words: String = body.chars().filter(|c| !c.is_control()).take(60).collect();
        format!("{} {words}", self.status).trim().to_owned()
    }
}

/// A party that answers, but not what it should.
struct Trouble {
    what: String,
    cure: &'static str,
    /// 0: there was none.
    status: u16,
}

impl Trouble {
    fn new(what: impl Into<String>, cure: &'static str) -> Trouble {
        Trouble { what: what.into(), cure, status: 0 }
    }

    fn finding(self, party: &'static str, check: &str, level: Level) -> Finding {
        Finding::new(party, check, level, self.what).cure(self.cure)
    }
}

/// Why a request has got no answer.
#[derive(Debug, PartialEq)]
enum NoAnswer {
    UnknownName,
    Refused,
    TooSlow,
    Expired,
    NotYetValid,
    WrongName,
    UnknownIssuer,
    /// TLS was spoken to something that does not.
    NotTls,
    /// It took the connection, and ended it without a word.
    Closed,
    Broken(String),
}

impl NoAnswer {
    fn of(error: &ureq::Error) -> NoAnswer {
        match error {
            ureq::Error::HostNotFound => NoAnswer::UnknownName,
            ureq::Error::Timeout(_) => NoAnswer::TooSlow,
            ureq::Error::Rustls(error) => NoAnswer::of_tls(error),
            ureq::Error::Io(error) => {
                let inside = error.get_ref().and_then(|inside| inside.downcast_ref());
                match (inside, error.kind()) {
                    (Some(tls), _) => NoAnswer::of_tls(tls),
                    (None, io::ErrorKind::ConnectionRefused) => NoAnswer::Refused,
                    (None, io::ErrorKind::TimedOut) => NoAnswer::TooSlow,
                    // std has no kind for it.
                    (None, _) if error.to_string().contains("lookup address") => {
                        NoAnswer::UnknownName
                    }
                    (
                        None,
                        io::ErrorKind::UnexpectedEof
                        | io::ErrorKind::ConnectionReset
                        | io::ErrorKind::ConnectionAborted,
                    ) => NoAnswer::Closed,
                    (None, _) => NoAnswer::Broken(error.to_string()),
                }
            }
            other => NoAnswer::Broken(other.to_string()),
        }
    }

    fn of_tls(error: &rustls::Error) -> NoAnswer {
        use CertificateError as Bad;
        match error {
            rustls::Error::InvalidCertificate(bad) => match bad {
                Bad::Expired | Bad::ExpiredContext { .. } => NoAnswer::Expired,
                Bad::NotValidYet | Bad::NotValidYetContext { .. } => NoAnswer::NotYetValid,
                Bad::NotValidForName | Bad::NotValidForNameContext { .. } => NoAnswer::WrongName,
                Bad::UnknownIssuer => NoAnswer::UnknownIssuer,
                other => NoAnswer::Broken(format!("its certificate: {other}")),
            },
            rustls::Error::InvalidMessage(_) => NoAnswer::NotTls,
            other => NoAnswer::Broken(format!("TLS: {other}")),
        }
    }

    /// What helps whoever it is, if anything does.
    fn cure(&self) -> Option<&'static str> {
        match self {
            NoAnswer::Expired => {
                Some("renew the certificate of the proxy there (Caddy does it alone)")
            }
            NoAnswer::NotYetValid => Some("set the clocks right, here and there"),
            NoAnswer::WrongName => Some("use the name that its certificate is made for"),
            NoAnswer::UnknownIssuer => Some(
                "use a public certificate with its whole chain; a home-made CA before n8n goes \
                 into SSL_CERT_FILE",
            ),
            NoAnswer::NotTls => {
                Some("use an address that speaks https: a tunnel for HTTP, not for TCP, or Caddy")
            }
            NoAnswer::UnknownName => Some("correct the host's name in the address"),
            NoAnswer::Refused | NoAnswer::TooSlow | NoAnswer::Closed | NoAnswer::Broken(_) => None,
        }
    }
}

impl std::fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            NoAnswer::UnknownName => "its name does not resolve",
            NoAnswer::Refused => "it refuses the connection",
            NoAnswer::TooSlow => "no answer in time",
            NoAnswer::Expired => "its certificate has expired",
            NoAnswer::NotYetValid => "its certificate is not valid yet",
            NoAnswer::WrongName => "its certificate is for another name",
            NoAnswer::UnknownIssuer => "its certificate's issuer is not known",
            NoAnswer::NotTls => "it speaks no TLS (https)",
            NoAnswer::Closed => "it ends the connection without an answer",
            NoAnswer::Broken(why) => why,
        })
    }
}

fn host_of(url: &str) -> String {
    let uri = url.parse::<Uri>().ok();
    uri.and_then(|uri| uri.host().map(str::to_owned)).unwrap_or_default()
}

/// No address in a text keeps its `user:password@`.
fn without_logins(text: &str) -> String {
    let mut parts = text.split("://");
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        // A comma may stand in a password.
        let ends = |c: char| c.is_whitespace() || matches!(c, '/' | '"');
        let authority = part.split(ends).next().unwrap_or_default();
        let host = authority.rfind('@').map_or(0, |at| at + 1);
        kept.extend(["://", &part[host..]]);
    }
    kept
}

/// Without a password, and without what stands behind a `?`: there may be keys in either.
fn shown_url(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    without_logins(url)
}
