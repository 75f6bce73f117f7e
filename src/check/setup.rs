//! What there is to look at: settings, agent files and the address, right or wrong.
//!
//! [`Setup::read`] reads them as the server does, but never gives up: each mistake is a finding,
//! and what is wrong stands at its default for the rest, so that one look names everything. It
//! gives a `Bridge` to look with, one for the whole command. That bridge only looks: it has no
//! outbox and takes no call; where no server runs it may listen in its place
//! (`door::Hall`), so that the way from outside can be tried before the first start.

use std::path::Path;

use super::report::{Finding, Topic};
use super::tunnel::public_url;
use crate::Bridge;
use crate::parties::ultravox::body::LONGEST_CALL;
use crate::setup::agent::{Agent, Tool, ToolAction, TransferTo};
use crate::setup::agent_in_force::AgentInForce;
use crate::setup::settings::{Config, set_twice, settings_in_force};
use crate::setup::stop::Stop;
use crate::toolbox::http::trusted_roots;
use crate::toolbox::text::counted;

/// The paths that Twilio, n8n and people ask for here.
const ENDPOINTS: [&str; 11] = [
    "/incoming-call",
    "/media-stream",
    "/stream-ended",
    "/whisper",
    "/call-status",
    "/outgoing-call",
    "/browser-call",
    "/calls",
    "/health",
    "/ready",
    "/metrics",
];

/// One for the whole command; its threads keep it.
pub(super) struct Setup {
    /// With the built-in agent if the owner's has mistakes.
    pub(super) bridge: &'static Bridge,
    /// The owner's agent files are right, so their voices can be looked up.
    pub(super) agent_is_right: bool,
    complaints: Vec<String>,
    /// `PUBLIC_URL`, or the tunnel's address, with `https`. None: there is nothing to try.
    pub(super) public_url: Option<String>,
}

impl Setup {
    pub(super) fn prove(&self, nonce: &str) -> String {
        self.bridge.identity.prove(&self.bridge.config.public_url, nonce)
    }

    pub(super) fn read() -> Result<(&'static Setup, Vec<Finding>), Stop> {
        let (values, complaints) = settings_in_force();
        let (mut config, mut complaints) = Config::understand(values, complaints);
        let is_unusable = complains_of(&complaints, "PUBLIC_URL");
        complaints.extend(take_off_endpoint(&mut config.public_url));
        let mut findings: Vec<Finding> =
            complaints.iter().map(|complaint| bad_setting(complaint)).collect();
        let roots = trusted_roots(config.ssl_cert_file.as_deref()).unwrap_or_else(|complaint| {
            findings.push(bad_setting(&complaint));
            trusted_roots(None).unwrap_or_default()
        });
        if findings.is_empty() {
            findings.push(Topic::new("settings", "settings").ok("complete and well-formed"));
        }
        findings.extend(two_sources());
        findings.extend(local_mode(&config));
        findings.extend(long_calls(&config));
        let (agent, agent_is_right) = look_at_agent(&mut config, &mut findings)?;
        let (public_url, about_ngrok) = public_url(&mut config, is_unusable);
        findings.extend(about_ngrok);
        let bridge = Bridge::build(config, AgentInForce::of(agent), &roots);
        // The threads that ask may outlive their time limit, and so must what they look at.
        let bridge: &'static Bridge = Box::leak(Box::new(bridge));
        let setup = Setup { bridge, agent_is_right, complaints, public_url };
        Ok((Box::leak(Box::new(setup)), findings))
    }

    /// What has to be done before there is an address to try.
    pub(super) fn towards_an_address(&self) -> &'static str {
        let config = &self.bridge.config;
        if self.is_malformed("PUBLIC_URL") {
            "correct PUBLIC_URL first"
        } else if !config.is_local {
            "start ngrok first"
        } else if config.has_telephone() {
            "set PUBLIC_URL first"
        } else {
            "nothing: in local mode there is none to try"
        }
    }

    pub(super) fn is_malformed(&self, setting: &str) -> bool {
        complains_of(&self.complaints, setting)
    }
}

/// With one of our own paths behind it, everything would look like a mistake of the proxy's.
fn take_off_endpoint(url: &mut String) -> Option<String> {
    let (meant, path) = ENDPOINTS.iter().find_map(|path| Some((url.strip_suffix(path)?, path)))?;
    let meant = meant.to_owned();
    let https = meant.replacen("http://", "https://", 1);
    let complaint = format!(
        "PUBLIC_URL  is \"{url}\": must be {https}, without {path}, which callbridge adds itself"
    );
    *url = meant;
    Some(complaint)
}

/// What stands in `.env` and does not count is a surprise.
fn two_sources() -> Option<Finding> {
    let twice = set_twice();
    (!twice.is_empty()).then(|| {
        let names = twice.join(", ");
        Topic::new("settings", "sources").ok(format!("the environment overrides .env for {names}"))
    })
}

/// Without an address only the live page's phone can call, which is enough for whoever has no
/// number.
fn local_mode(config: &Config) -> Option<Finding> {
    let topic = Topic::new("settings", "PUBLIC_URL");
    let is = "the https:// address under which Twilio reaches this machine (your host or tunnel)";
    if !config.is_local {
        None
    } else if config.has_telephone() {
        let cure = format!("set PUBLIC_URL in .env: {is}");
        Some(topic.wrong("PUBLIC_URL is missing, so no telephone call comes in", cure))
    } else {
        let what = "local mode: PUBLIC_URL is not set, so only the live page's phone can call";
        Some(topic.skipped(what, format!("for a telephone, set it to {is}")))
    }
}

fn long_calls(config: &Config) -> Option<Finding> {
    (config.max_call > LONGEST_CALL).then(|| {
        let (ours, most) = (config.max_call.as_secs(), LONGEST_CALL.as_secs());
        Topic::new("settings", "MAX_CALL_SECONDS").warning(
            format!(
                "MAX_CALL_SECONDS is {ours}, but Ultravox documents {most} at most and may \
                     refuse more: each call is then tried again with {most}"
            ),
            format!("set MAX_CALL_SECONDS={most} or less"),
        )
    })
}

fn complains_of(complaints: &[String], setting: &str) -> bool {
    complaints.iter().any(|complaint| complaint.split(' ').next() == Some(setting))
}

/// The owner's agent, or the built-in one if the owner's has mistakes.
fn look_at_agent(config: &mut Config, findings: &mut Vec<Finding>) -> Result<(Agent, bool), Stop> {
    let mistakes = match Agent::load(config) {
        Ok(agent) => {
            let stages = counted(agent.stages.len(), "stage");
            let tools = counted(agent.tools.len(), "tool");
            let what = format!("{}: {stages}, {tools}", agent.name);
            findings.push(Topic::new("agent", "files").ok(what));
            findings.extend(nobody_to_put_through_to(config, &agent));
            return Ok((agent, true));
        }
        Err(mistakes) => mistakes,
    };
    let place = config.agent_dir.take().unwrap_or_default();
    findings.extend(mistakes.iter().map(|mistake| agent_mistake(&place, mistake)));
    let agent = Agent::load(config).map_err(|mistakes| Stop::Failed(mistakes.join("\n")))?;
    Ok((agent, false))
}

fn nobody_to_put_through_to(config: &Config, agent: &Agent) -> Option<Finding> {
    let to_fallback =
        |tool: &Tool| matches!(tool.action, ToolAction::Transfer(TransferTo::Fallback(_)));
    let (name, _) = agent.tools.iter().find(|(_, tool)| to_fallback(tool))?;
    config.fallback_number.is_none().then(|| {
        Topic::new("agent", "transfer").skipped(
            format!("FALLBACK_NUMBER is not set, so {name} is not offered"),
            "set it if there is somebody to put callers through to",
        )
    })
}

/// `NAME  is "x": must be y`, `NAME  must be y`, `NAME  is missing (where it comes from)`,
/// `NAME  is too short: what is wanted`.
fn bad_setting(complaint: &str) -> Finding {
    if complaint.starts_with(".env cannot be read") {
        return Topic::new("settings", ".env")
            .wrong(complaint, "make .env a file that callbridge may read, or remove it");
    }
    let (name, what) = complaint.split_once("  ").unwrap_or((complaint, ""));
    let (what, cure) = if let Some((what, must)) = what.split_once(": must ") {
        (what, format!("it must {must}"))
    } else if what.starts_with("must ") {
        ("is malformed", format!("it {what}"))
    } else if let Some((what, source)) = what.split_once(" (") {
        (what, source.trim_end_matches(')').to_owned())
    } else if let Some((what, wanted)) = what.split_once(": ") {
        (what, wanted.to_owned())
    } else {
        (what, "correct it".to_owned())
    };
    let cure = if name == ".env" { cure } else { format!("set {name} in .env: {cure}") };
    Topic::named("settings", name).wrong(format!("{name} {what}"), cure)
}

fn agent_mistake(place: &Path, mistake: &str) -> Finding {
    let (file, what) = mistake.split_once("  ").unwrap_or((mistake, ""));
    let cure = format!("correct {file} in {} (AGENT_DIR)", place.display());
    Topic::named("agent", file).wrong(format!("{file}: {what}"), cure)
}
