//! `callbridge check` against the pretend world: one mistake after another is made in a set-up that
//! is otherwise right. Each must be named with its own cause and its own cure, and nobody else may
//! be blamed for it.

#[path = "../src/demo/mod.rs"]
mod demo;

use std::env;
use std::error::Error;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use demo::{
    ACCOUNT_SID, API_KEY, Certificate, Front, Manner, Ngrok, OUR_NUMBER, Reply, VOICES, World,
    WorldBuilder, account, closed_port,
};

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

const PROGRAM: &str = env!("CARGO_BIN_EXE_callbridge");
const AUTH_TOKEN: &str = "the-auth-token-of-the-pretend-account";
const API_TOKEN: &str = "the-owners-own-token-0123456789";
const HMAC_SECRET: &str = "the-secret-that-signs-for-n8n";
const HEADER_VALUE: &str = "the-value-that-n8n-wants-to-see";
const PASSWORD: &str = "a-password-in-an-address";
/// What must never be printed.
const SECRETS: [&str; 6] = [API_KEY, AUTH_TOKEN, API_TOKEN, HMAC_SECRET, HEADER_VALUE, PASSWORD];
/// The command's own limit is 10 s. The rest is for a test machine that is out of breath.
const TEN_SECONDS: Duration = Duration::from_secs(14);

/// A set-up in which all is right: the bridge runs, a proxy with https stands in front of it, and
/// the number leads to it.
struct House {
    world: World,
    front: Front,
    ngrok: Ngrok,
    port: String,
}

impl House {
    fn new() -> Result<House, Box<dyn Error + Send + Sync>> {
        House::build(|builder| builder)
    }

    fn build(
        change: impl FnOnce(WorldBuilder) -> WorldBuilder,
    ) -> Result<House, Box<dyn Error + Send + Sync>> {
        let front = Front::open(Certificate::Good)?;
        let ngrok = Ngrok::open()?;
        let builder = World::builder(PROGRAM)
            .setting("PUBLIC_URL", &front.url)
            .setting("SSL_CERT_FILE", front.pem().display())
            .setting("TWILIO_AUTH_TOKEN", AUTH_TOKEN)
            .setting("TWILIO_ACCOUNT_SID", ACCOUNT_SID)
            .setting("TWILIO_PHONE_NUMBER", OUR_NUMBER)
            .setting("FALLBACK_NUMBER", "+442079461111")
            .setting("API_TOKEN", API_TOKEN)
            .setting("N8N_HMAC_SECRET", HMAC_SECRET)
            .setting("N8N_AUTH_HEADER", format!("X-Agent-Key: {HEADER_VALUE}"))
            .setting("NGROK_API_URL", format!("http://127.0.0.1:{}", closed_port()));
        let world = change(builder).start()?;
        front.set(Manner::Pass(world.bridge.address()));
        world.twilio.set_number("voice_url", json!(format!("{}/incoming-call", front.url)));
        world.twilio.set_number("status_callback", json!(format!("{}/call-status", front.url)));
        let port = world.bridge.address().port().to_string();
        Ok(House { world, front, ngrok, port })
    }

    /// Looks at the house with these settings changed.
    fn look(&self, changes: &[(&str, &str)]) -> Result<Report, Box<dyn Error + Send + Sync>> {
        let changes: Vec<(&str, Option<&str>)> =
            changes.iter().map(|(name, value)| (*name, Some(*value))).collect();
        self.look_with(&["check", "--json"], &changes)
    }

    fn look_with(
        &self,
        words: &[&str],
        changes: &[(&str, Option<&str>)],
    ) -> Result<Report, Box<dyn Error + Send + Sync>> {
        let mut all = vec![("PORT", Some(self.port.as_str()))];
        all.extend_from_slice(changes);
        let began = Instant::now();
        let output = self.world.bridge.run_with(words, &all)?;
        Report::of(output, began.elapsed())
    }
}

/// What `check` has said.
struct Report {
    status: Option<i32>,
    text: String,
    errors: String,
    findings: Vec<Value>,
    took: Duration,
}

impl Report {
    fn of(output: Output, took: Duration) -> Result<Report, Box<dyn Error + Send + Sync>> {
        let text = String::from_utf8(output.stdout)?;
        let errors = String::from_utf8(output.stderr)?;
        for secret in SECRETS {
            assert!(!text.contains(secret), "{secret} is printed: {text}");
            assert!(!errors.contains(secret), "{secret} is printed: {errors}");
        }
        let said: Value = serde_json::from_str(&text).unwrap_or_default();
        let findings = said["findings"].as_array().cloned().unwrap_or_default();
        let report = Report { status: output.status.code(), text, errors, findings, took };
        if !said.is_null() {
            let ok = said["ok"] == true;
            assert_eq!(ok, report.status == Some(0), "{}{}", report.text, report.errors);
            assert_eq!(ok, report.of_level("wrong").is_empty(), "{}", report.text);
        }
        Ok(report)
    }

    fn of_level(&self, level: &str) -> Vec<&Value> {
        self.findings.iter().filter(|finding| finding["level"] == level).collect()
    }

    /// The finding about this, if there is one.
    fn about(&self, party: &str, check: &str) -> Option<&Value> {
        let is_it = |finding: &&Value| finding["party"] == party && finding["check"] == check;
        self.findings.iter().find(is_it)
    }

    /// This is wrong, for this cause and with this cure; and nothing else is.
    #[track_caller]
    fn blames(&self, party: &str, check: &str, what: &str, cure: &str) {
        let wrong = self.of_level("wrong");
        assert_eq!(wrong.len(), 1, "one thing is wrong here: {wrong:#?}");
        assert_eq!(self.status, Some(1), "{}", self.errors);
        self.names("wrong", party, check, what, cure);
    }

    /// This is said at that level.
    #[track_caller]
    fn names(&self, level: &str, party: &str, check: &str, what: &str, cure: &str) {
        let finding = self.about(party, check);
        assert!(finding.is_some(), "nothing is said of {party}, {check}: {:#?}", self.findings);
        let finding = finding.cloned().unwrap_or_default();
        let said = |field: &str| finding[field].as_str().unwrap_or_default().to_owned();
        assert_eq!(said("level"), level, "{finding:#}");
        assert!(said("what").contains(what), "{what:?} is not the cause in {finding:#}");
        assert!(said("cure").contains(cure), "{cure:?} is not the cure in {finding:#}");
    }

    /// Everything that was right before and has nothing to do with these parties still is.
    #[track_caller]
    fn leaves_the_others_alone(&self, before: &Report, but: &[&str]) {
        for finding in &before.findings {
            let (party, check) = (&finding["party"], &finding["check"]);
            let (party, check) =
                (party.as_str().unwrap_or_default(), check.as_str().unwrap_or_default());
            if !but.contains(&party) {
                let now = self.about(party, check).map(|now| &now["level"]);
                assert_eq!(now, Some(&finding["level"]), "{party}, {check}: {}", self.text);
            }
        }
    }
}

// ============================================================================
// All is right
// ============================================================================

#[test]
fn a_set_up_that_is_right_is_called_right() -> Outcome {
    let house = House::new()?;
    let report = house.look(&[])?;
    assert_eq!(report.status, Some(0), "{}{}", report.text, report.errors);
    // The pretend proxy is on this machine, with a home-made certificate: Twilio could not use it.
    let warnings: Vec<&Value> =
        report.of_level("warning").iter().map(|finding| &finding["check"]).collect();
    assert_eq!(warnings, ["certificate", "address"], "{}", report.text);
    assert!(report.of_level("skipped").is_empty(), "{}", report.text);
    for (party, check, what) in [
        ("settings", "settings", "complete"),
        ("agent", "files", "3 stages"),
        ("Ultravox", "account", "Anna's insurance"),
        ("Ultravox", "calls", "100 calls at once"),
        ("Ultravox", "model", "ultravox-v0.7"),
        ("Ultravox", "voice Mark", "Mark"),
        ("Ultravox", "voice Tanya-English", "Tanya-English"),
        ("Ultravox", "corpus", "Handbook"),
        ("n8n", "webhook", "greets with \"Hello Anna"),
        ("callbridge", "port", &house.port),
        ("PUBLIC_URL", "health", "leads to this callbridge"),
        ("PUBLIC_URL", "websocket", "audio socket opens"),
        ("Twilio", "account", "active"),
        ("Twilio", "number", OUR_NUMBER),
        ("Twilio", "voice", "/incoming-call"),
    ] {
        report.names("ok", party, check, what, "");
    }
    // n8n is asked as a call asks, once, about a number that nobody has.
    let asked = house.world.n8n.requests_of("1");
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].json["number"], "+12025550123");
    assert_eq!(asked[0].json["data"], "empty");
    assert_eq!(asked[0].header("x-agent-key"), Some(HEADER_VALUE));
    assert!(asked[0].header("x-callbridge-signature").is_some());
    // Nothing was ordered, created or changed.
    assert_eq!(house.world.ultravox.requests(), 0);
    assert!(house.world.twilio.orders().is_empty());
    assert_eq!(house.world.twilio.changes(), 0);
    Ok(())
}

#[test]
fn a_person_reads_a_line_and_below_it_what_to_do() -> Outcome {
    let house = House::new()?;
    let gone = format!("http://127.0.0.1:{}/webhook/call", closed_port());
    let report = house.look_with(&["check"], &[("N8N_WEBHOOK_URL", Some(&gone))])?;
    assert_eq!(report.status, Some(1));
    assert!(!report.text.contains('\x1b'), "colours in a pipe: {:?}", report.text);
    let lines: Vec<&str> = report.text.lines().collect();
    let place = lines.iter().position(|line| line.starts_with("  wrong    n8n         "));
    let place = place.ok_or_else(|| format!("n8n is not blamed:\n{}", report.text))?;
    assert!(lines[place].contains("refuses the connection"), "{}", lines[place]);
    assert!(lines[place + 1].trim_start().starts_with("-> "), "{}", lines[place + 1]);
    assert!(report.text.contains("\n  ok       Ultravox    "), "{}", report.text);
    assert!(report.errors.contains("a call would not work: 1 thing to fix"), "{}", report.errors);
    let report = house.look_with(&["check"], &[])?;
    assert_eq!(report.status, Some(0));
    assert!(report.text.ends_with("A call would work. 2 warnings.\n"), "{}", report.text);
    Ok(())
}

#[test]
fn a_wrong_command_line_is_status_2() -> Outcome {
    let house = House::new()?;
    for (words, what) in [
        (["check", "--mend"].as_slice(), "unknown option \"--mend\""),
        (&["check", "--yes"], "--yes only makes sense with --fix"),
    ] {
        let report = house.look_with(words, &[])?;
        assert_eq!(report.status, Some(2));
        assert!(report.errors.contains(what), "{}", report.errors);
        assert!(report.errors.contains("usage: callbridge check"), "{}", report.errors);
    }
    let report = house.look_with(&["check", "--help"], &[])?;
    assert_eq!(report.status, Some(0));
    assert!(report.text.contains("usage: callbridge check"), "{}", report.text);
    Ok(())
}

// ============================================================================
// Settings and agent files
// ============================================================================

#[test]
fn mistakes_in_settings_are_all_named_and_the_rest_is_looked_at() -> Outcome {
    let house = House::new()?;
    let before = house.look(&[])?;

    let report = house.look(&[("PUBLIC_URL", ""), ("MAX_CALLS", "many"), ("LOG_LEVEL", "loud")])?;
    report.names(
        "wrong",
        "settings",
        "PUBLIC_URL",
        "is missing",
        "https:// address under which Twilio",
    );
    report.names("wrong", "settings", "MAX_CALLS", "is \"many\"", "whole number from 1");
    report.names(
        "wrong",
        "settings",
        "LOG_LEVEL",
        "is \"loud\"",
        "must be one of error, warn, info, debug",
    );
    report.names("skipped", "PUBLIC_URL", "health", "no address yet", "set PUBLIC_URL first");
    report.leaves_the_others_alone(&before, &["settings", "PUBLIC_URL", "Twilio"]);

    let report = house.look(&[("API_TOKEN", "passwordpassword")])?;
    report.blames("settings", "API_TOKEN", "is too easy to guess", "openssl rand -hex 16");
    report.leaves_the_others_alone(&before, &["settings"]);
    let report = house.look(&[("API_TOKEN", "short")])?;
    report.blames(
        "settings",
        "API_TOKEN",
        "is too short",
        "in .env: at least 16 random characters",
    );
    let report = house.look(&[("PUBLIC_URL", ""), ("BIND", "0.0.0.0")])?;
    report.names("wrong", "settings", "BIND", "is \"0.0.0.0\"", "it must be 127.0.0.1 or ::1");
    let report = house.look(&[("METRICS_TOKEN", API_TOKEN)])?;
    report.blames("settings", "METRICS_TOKEN", "the same as API_TOKEN", "another one");

    let plain = house.front.url.replacen("https", "http", 1);
    let report = house.look(&[("PUBLIC_URL", &plain)])?;
    report.blames("settings", "PUBLIC_URL", "is \"http://", "must be https");
    // And it is said whether https would do.
    report.names("ok", "PUBLIC_URL", "health", "https://localhost", "");

    // One of our own paths behind the address: the proxy is not to blame.
    for path in ["/incoming-call", "/incoming-call/", "/media-stream", "/health"] {
        let report = house.look(&[("PUBLIC_URL", &format!("{}{path}", house.front.url))])?;
        let meant =
            format!("it must be {}, without {}", house.front.url, path.trim_end_matches('/'));
        report.blames("settings", "PUBLIC_URL", path.trim_end_matches('/'), &meant);
        report.names("ok", "PUBLIC_URL", "health", "leads to this callbridge", "");
        report.leaves_the_others_alone(&before, &["settings"]);
    }

    for scheme in ["http", "https"] {
        let login = format!("{scheme}://me:x,{PASSWORD}@pbx.example");
        let report = house.look(&[("PUBLIC_URL", &login)])?;
        report.blames("settings", "PUBLIC_URL", "is malformed", "must not have a user name");
        report.names(
            "skipped",
            "PUBLIC_URL",
            "health",
            "no address yet",
            "correct PUBLIC_URL first",
        );
    }
    let report =
        house.look(&[("N8N_WEBHOOK_URL", &format!("https://me:{PASSWORD}@n8n.invalid/"))])?;
    report.blames("n8n", "webhook", "its name does not resolve", "");

    let report = house.look(&[("MAX_CALL_SECONDS", "3600")])?;
    assert!(report.about("settings", "MAX_CALL_SECONDS").is_none(), "{}", report.text);
    let report = house.look(&[("MAX_CALL_SECONDS", "3601")])?;
    assert_eq!(report.status, Some(0), "{}", report.text);
    let (what, cure) = ("MAX_CALL_SECONDS is 3601", "set MAX_CALL_SECONDS=3600 or less");
    report.names("warning", "settings", "MAX_CALL_SECONDS", what, cure);

    let report = house.look(&[("ULTRAVOX_API_KEY", "")])?;
    report.blames("settings", "ULTRAVOX_API_KEY", "is missing", "app.ultravox.ai");
    report.names("skipped", "Ultravox", "account", "not asked", "fix the settings");
    report.leaves_the_others_alone(&before, &["settings", "Ultravox"]);

    let report = house.look(&[("N8N_WEBHOOK_URL", "n8n.example/webhook/call")])?;
    report.blames("settings", "N8N_WEBHOOK_URL", "is malformed", "starts with https://");
    report.names("skipped", "n8n", "webhook", "malformed", "fix the setting");

    fs::write(house.world.home().join(".env"), format!("API_TOKEN={API_TOKEN}\nsome words\n"))?;
    let report = house.look(&[])?;
    report.blames("settings", ".env", "line 2 is not NAME=value", "in quotes");
    fs::remove_file(house.world.home().join(".env"))?;
    // A link to itself cannot be read, not even by root.
    std::os::unix::fs::symlink(".env", house.world.home().join(".env"))?;
    let report = house.look(&[])?;
    report.blames("settings", ".env", ".env cannot be read: ", "a file that callbridge may read");
    fs::remove_file(house.world.home().join(".env"))?;

    let report = house.look(&[("SSL_CERT_FILE", "/nowhere/at.all")])?;
    report.names("wrong", "settings", "SSL_CERT_FILE", "/nowhere/at.all", "SSL_CERT_FILE");
    Ok(())
}

/// What a person would look for in vain: a value that was replaced, a line, a setting that wins.
#[test]
fn slips_in_the_file_of_settings_have_their_line() -> Outcome {
    let house = House::new()?;
    let env = house.world.home().join(".env");
    let text =
        "# mine\nN8N_HMAC_SECRET=correct$horse\nhush hush\nDATA_DIR=elsewhere\nMETRICS_TOKEN=a$b\n";
    fs::write(&env, text)?;
    let report = house.look(&[])?;
    let cure = "it must be written as N8N_HMAC_SECRET='…'";
    let what = "N8N_HMAC_SECRET in line 2 of .env has a $ outside single quotes";
    report.names("wrong", "settings", "N8N_HMAC_SECRET", what, cure);
    report.names("wrong", "settings", ".env", "line 3 is not NAME=value", "in quotes");
    // What is left of its value is too short as well, which is no second mistake.
    report.names("wrong", "settings", "METRICS_TOKEN", "in line 5 of .env has a $", "'…'");
    assert!(!report.text.contains("too short"), "{}", report.text);
    let what = "the environment overrides .env for DATA_DIR, N8N_HMAC_SECRET";
    report.names("ok", "settings", "sources", what, "");
    assert!(!report.text.contains("horse") && !report.text.contains("hush"), "{}", report.text);
    Ok(())
}

#[test]
fn mistakes_in_agent_files_come_with_file_and_place() -> Outcome {
    let house = House::new()?;
    let before = house.look(&[])?;
    let directory = house.world.home().join("agent");
    fs::create_dir_all(&directory)?;
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/agent");
    for name in ["agent.json", "greeting.md", "main_convo.md"] {
        fs::copy(format!("{source}/{name}"), directory.join(name))?;
    }
    let file = directory.join("agent.json");
    let right = fs::read_to_string(&file)?;
    fs::write(&file, right.replace("This is Sara, your", "This is {nobody}, your"))?;
    let place = directory.to_string_lossy().into_owned();
    let report = house.look(&[("AGENT_DIR", &place)])?;
    assert_eq!(report.of_level("wrong").len(), 2, "{}", report.text);
    report.names("wrong", "agent", "call_summary.md", "stages.call_summary.prompt", "AGENT_DIR");
    report.names(
        "wrong",
        "agent",
        "agent.json",
        "first_message uses {nobody}",
        "correct agent.json",
    );
    report.names("skipped", "Ultravox", "voices", "agent files have mistakes", "fix the agent");
    report.leaves_the_others_alone(&before, &["agent", "Ultravox"]);
    report.names("ok", "Ultravox", "account", "", "");

    fs::copy(format!("{source}/call_summary.md"), directory.join("call_summary.md"))?;
    // A person whom nobody knows.
    fs::write(&file, right.replace("\"transfer\": true", "\"transfer\": \"claims\""))?;
    let report = house.look(&[("AGENT_DIR", &place)])?;
    let mistake = "tools.transfer_to_person transfers to \"claims\", who is not among people";
    report.names("wrong", "agent", "agent.json", mistake, "correct agent.json");
    let report = house.look(&[("FALLBACK_NUMBER", "")])?;
    assert_eq!(report.status, Some(0), "{}", report.text);
    report.names("skipped", "agent", "transfer", "transfer_to_person is not offered", "set it if");

    // Voices: a name that nobody has, one that two have, and two ids.
    let voice =
        |name: &str| right.replace("\"voice\": \"Mark\"", &format!("\"voice\": \"{name}\""));
    fs::write(&file, voice("mark"))?;
    let report = house.look(&[("AGENT_DIR", &place)])?;
    let cure = "correct stages.main_convo.voice in agent.json; similar names: Mark, Mark-Slow";
    report.blames("Ultravox", "voice mark", "no voice named \"mark\"", cure);
    report.names("ok", "Ultravox", "voice Tanya-English", "", "");
    fs::write(&file, voice("Sam"))?;
    let report = house.look(&[("AGENT_DIR", &place)])?;
    report.blames("Ultravox", "voice Sam", "2 voices named \"Sam\"", VOICES[3].1);
    report.names("wrong", "Ultravox", "voice Sam", "", VOICES[4].1);
    fs::write(&file, voice(VOICES[3].1))?;
    let report = house.look(&[("AGENT_DIR", &place)])?;
    assert_eq!(report.status, Some(0), "{}", report.text);
    let unknown = "00000000-0000-4000-8000-0000000000ff";
    fs::write(&file, voice(unknown))?;
    let report = house.look(&[("AGENT_DIR", &place)])?;
    report.blames("Ultravox", &format!("voice {unknown}"), "no voice with the id", "by name or id");
    Ok(())
}

// ============================================================================
// Ultravox
// ============================================================================

#[test]
fn what_is_wrong_at_ultravox() -> Outcome {
    let house = House::new()?;
    let before = house.look(&[])?;
    let ultravox = &house.world.ultravox;

    let report =
        house.look(&[("ULTRAVOX_API_KEY", "Another0.0123456789abcdefABCDEF0123456789")])?;
    report.blames("Ultravox", "account", "does not know the key (403)", "ULTRAVOX_API_KEY");
    report.leaves_the_others_alone(&before, &["Ultravox"]);
    report.names("skipped", "Ultravox", "model", "not looked up", "");

    let report = house.look(&[("ULTRAVOX_MODEL", "ultravox-v9")])?;
    report.blames("Ultravox", "model", "no model \"ultravox-v9\"", "ultravox-v0.7");
    report.leaves_the_others_alone(&before, &["Ultravox"]);

    let corpus = "11111111-2222-4333-8444-555555555555";
    let report = house.look(&[("ULTRAVOX_CORPUS_ID", corpus)])?;
    report.blames("Ultravox", "corpus", corpus, "set ULTRAVOX_CORPUS_ID");
    let report = house.look(&[("ULTRAVOX_CORPUS_ID", "../accounts/me")])?;
    report.blames("Ultravox", "corpus", "no corpus", "set ULTRAVOX_CORPUS_ID");

    let empty = json!({"name": "Handbook", "stats": {"numDocs": 0}});
    ultravox.set_answer(&format!("/api/corpora/{corpus}"), Reply::json(200, &empty));
    let report = house.look(&[("ULTRAVOX_CORPUS_ID", corpus)])?;
    assert_eq!(report.status, Some(0), "{}", report.text);
    report.names("warning", "Ultravox", "corpus", "Handbook is empty", "add a source to it");

    let report = house.look(&[("MAX_CALLS", "500")])?;
    assert_eq!(report.status, Some(0), "{}", report.text);
    report.names(
        "warning",
        "Ultravox",
        "calls",
        "100 calls at once, but MAX_CALLS is 500",
        "MAX_CALLS=100",
    );

    // Who has not set it is not told of a figure of ours.
    let mut small = account();
    small["allowedConcurrentCalls"] = json!(5);
    ultravox.set_answer("/api/accounts/me", Reply::json(200, &small));
    let report = house.look(&[])?;
    report.names("ok", "Ultravox", "calls", "the plan allows 5 calls at once", "");
    ultravox.set_answer("/api/accounts/me", Reply::json(200, &account()));

    let gone = format!("http://127.0.0.1:{}", closed_port());
    let report = house.look(&[("ULTRAVOX_API_URL", &gone)])?;
    report.blames("Ultravox", "account", "it refuses the connection", "ULTRAVOX_API_URL");
    let report = house.look(&[("ULTRAVOX_API_URL", "http://nobody.invalid")])?;
    report.blames("Ultravox", "account", "its name does not resolve", "ULTRAVOX_API_URL");

    let free = |left: &str| {
        let mut account = account();
        account["hasActiveSubscription"] = json!(false);
        account["freeTimeRemaining"] = json!(left);
        ultravox.set_answer("/api/accounts/me", Reply::json(200, &account));
    };
    // It may pay as it goes. Nobody says so here.
    free("0s");
    let report = house.look(&[])?;
    assert_eq!(report.status, Some(0), "{}", report.text);
    let cure = "add a payment method at app.ultravox.ai";
    report.names("warning", "Ultravox", "minutes", "no free minutes are left", cure);
    let billing = |body: &Value| {
        ultravox.set_answer("/api/accounts/me/billing", Reply::json(200, body));
        house.look(&[])
    };
    let report = billing(&json!({"paymentMethod": null}))?;
    report.names("warning", "Ultravox", "minutes", "no free minutes are left", cure);
    let report = billing(&json!({"paymentMethod": {"type": "card"}}))?;
    report.names("ok", "Ultravox", "minutes", "pays as it goes", "");
    ultravox.set_answer("/api/accounts/me/billing", Reply::json(404, &json!({})));
    free("60.5s");
    house.look(&[])?.names("warning", "Ultravox", "minutes", "1 free minute is left", "");
    free("600.5s");
    let report = house.look(&[])?;
    report.names("warning", "Ultravox", "minutes", "10 free minutes", "MAX_CALL_SECONDS=600");
    free("7200s");
    house.look(&[])?.names("ok", "Ultravox", "minutes", "120 free minutes", "");

    let answer = |status, body: &Value| {
        ultravox.set_answer("/api/accounts/me", Reply::json(status, body));
        house.look(&[])
    };
    answer(402, &json!({}))?.blames("Ultravox", "account", "answered 402", "add billing");
    answer(500, &json!({}))?.blames("Ultravox", "account", "answered 500", "try again later");
    // The end of what is quoted falls into the middle of the key.
    let report = answer(500, &json!(format!("{}{API_KEY}", " ".repeat(40))))?;
    report.blames("Ultravox", "account", "answered 500", "try again later");
    assert!(!report.text.contains(&API_KEY[..8]), "{}", report.text);
    answer(404, &json!({}))?.blames(
        "Ultravox",
        "account",
        "answered 404",
        "check ULTRAVOX_API_URL",
    );
    Ok(())
}

// ============================================================================
// n8n
// ============================================================================

#[test]
fn what_is_wrong_at_n8n() -> Outcome {
    let house = House::new()?;
    let before = house.look(&[])?;
    let inactive = json!({"code": 404, "hint": "The workflow must be active for a production URL \
        to run successfully.",
        "message": "The requested webhook \"POST call\" is not registered."});
    let listening = json!({"code": 404, "hint": "Click the 'Execute workflow' button on the canvas",
        "message": "The requested webhook \"call\" is not registered."});
    let method = json!({"code": 404, "message": "This webhook is not registered for POST requests. \
        Did you mean to make a GET request?"});
    let echo = json!({"headers": {}, "params": {}, "query": {}, "body": {}, "webhookUrl": "x"});
    let text = |status, body: &str| Reply::text(status, None, body);
    let cases = [
        (Reply::json(404, &inactive), "404 ", "activate (publish) the workflow"),
        (Reply::json(404, &listening), "404 ", "is the test URL: use the production URL"),
        (Reply::json(404, &method), "404 ", "HTTP method to POST"),
        (text(404, "<pre>Cannot POST /webhook</pre>"), "404 ", "not a webhook's address"),
        (text(403, "Authorization data is wrong!"), "403 ", "set N8N_AUTH_HEADER"),
        (text(403, "IP is not allowed to access the webhook!"), "403 ", "IP allowlist"),
        (text(200, ""), "200 with an empty body", "n8n's Executions"),
        (
            Reply::json(200, &json!({"message": "Workflow was started"})),
            "before the workflow ran",
            "Using 'Respond to Webhook' Node",
        ),
        (Reply::json(200, &echo), "its own input", "Respond to Webhook node"),
        (
            Reply::json(200, &json!({"greeting": "hi"})),
            "no text named firstMessage",
            "firstMessage",
        ),
        (text(200, "{\"firstMessage\":\"a\"b\"}"), "broken JSON", "JSON.stringify"),
        (Reply::json(500, &json!({"message": "Error in workflow"})), "500 ", "Executions"),
        (text(502, "Bad Gateway"), "502 ", "busy or down"),
        (text(301, "").header("Location", "https://other.example"), "301", "it redirects"),
        (Reply::Reset, "", "N8N_WEBHOOK_URL"),
    ];
    for (reply, what, cure) in cases {
        house.world.n8n.set_reply("1", reply);
        let report = house.look(&[])?;
        report.blames("n8n", "webhook", what, cure);
        report.leaves_the_others_alone(&before, &["n8n"]);
    }
    let echo = json!({"firstMessage": format!("Hello, {HEADER_VALUE}.")});
    house.world.n8n.set_reply("1", Reply::json(200, &echo));
    house.look(&[])?.names("ok", "n8n", "webhook", "greets with \"Hello, ***.", "");
    house.world.n8n.set_reply("1", Reply::json(200, &json!({"firstMessage": null})));
    house.look(&[])?.names("ok", "n8n", "webhook", "leaves the greeting to the agent", "");
    // 2,000 characters are the most, whatever they take in bytes.
    let of_length = |length| {
        house
            .world
            .n8n
            .set_reply("1", Reply::json(200, &json!({"firstMessage": "ä".repeat(length)})));
        house.look(&[])
    };
    of_length(2_000)?.names("ok", "n8n", "webhook", "greets with", "");
    let report = of_length(2_001)?;
    assert_eq!(report.status, Some(0), "{}", report.text);
    report.names("warning", "n8n", "webhook", "firstMessage has 2001 characters", "route 1");
    for (answer, what) in [
        (json!({"stage": "bok", "transfer": 1}), "transfer is 1, which is neither true nor false"),
        (json!({"stage": "bok"}), "the agent has no stage \"bok\""),
        (json!({"refuse": true, "stage": "main_convo"}), "stage counts for nothing beside refuse"),
    ] {
        house.world.n8n.set_reply("1", Reply::json(200, &answer));
        let report = house.look(&[])?;
        assert_eq!(report.status, Some(0), "{}", report.text);
        report.names("warning", "n8n", "webhook", what, "correct the answer to route 1");
    }
    for (answer, what) in [
        (json!({"refuse": true}), "refuses the call"),
        (json!({"transfer": true}), "wants a person"),
        (json!({"stage": "main_convo"}), "leaves the greeting to the agent"),
    ] {
        house.world.n8n.set_reply("1", Reply::json(200, &answer));
        house.look(&[])?.names("ok", "n8n", "webhook", what, "");
    }
    let late =
        Reply::json(200, &json!({"firstMessage": "Hello."})).after(Duration::from_millis(2_100));
    house.world.n8n.set_reply("1", late);
    let report = house.look(&[])?;
    assert_eq!(report.status, Some(0), "{}", report.text);
    report.names("warning", "n8n", "webhook", "a caller waits 2000 ms", "make route 1");

    let report = house.look(&[("N8N_WEBHOOK_URL", "http://nobody.invalid/webhook/call")])?;
    report.blames("n8n", "webhook", "its name does not resolve", "host's name");
    let listening = house.world.n8n.url().replace("/webhook/", "/webhook-test/");
    let report = house.look(&[("N8N_WEBHOOK_URL", &listening)])?;
    report.blames("n8n", "webhook", "is the test URL", "put /webhook/ in place of /webhook-test/");
    let report = house.look_with(&["check", "--json"], &[("N8N_WEBHOOK_URL", None)])?;
    assert_eq!(report.status, Some(0), "{}", report.text);
    report.names("skipped", "n8n", "webhook", "is not set", "");
    // TLS: a certificate that nobody here knows, and none at all.
    let strange = Front::open(Certificate::Strange)?;
    let report = house.look(&[("N8N_WEBHOOK_URL", &format!("{}/webhook/call", strange.url))])?;
    report.blames("n8n", "webhook", "issuer is not known", "SSL_CERT_FILE");
    let plain = format!("https://localhost:{}/webhook/call", house.port);
    let report = house.look(&[("N8N_WEBHOOK_URL", &plain)])?;
    report.blames("n8n", "webhook", "does not speak TLS", "address that speaks https");
    Ok(())
}

// ============================================================================
// PUBLIC_URL
// ============================================================================

#[test]
fn the_way_from_outside_ends_before_it_is_here() -> Outcome {
    let house = House::new()?;
    let before = house.look(&[])?;
    let html = |status, body: &str| Reply::text(status, Some("text/html"), body);
    let offline = html(404, "The endpoint is offline.<br>ERR_NGROK_3200");
    let no_upstream = html(502, "<p>ERR_NGROK_8012</p>");
    let other = html(403, "").header("ngrok-error-code", "ERR_NGROK_727");
    let cloudflare = |reply: Reply| reply.header("CF-RAY", "8a1b2c3d4e5f6a7b-FRA");
    let forward = format!("127.0.0.1:{}", house.port);
    let elsewhere = "https://www.elsewhere.example/health?nonce=1";
    let cases = [
        (offline, "tunnel is down (ERR_NGROK_3200)", "ngrok http "),
        (no_upstream, "a port where nothing listens (ERR_NGROK_8012)", "ngrok http "),
        (other, "ERR_NGROK_727", "ngrok.com/docs/errors/err_ngrok_727"),
        (cloudflare(html(530, "error code: 1033")), "Cloudflare's tunnel is down", "cloudflared"),
        (
            cloudflare(html(502, "")),
            "reaches nothing behind it",
            "tunnel's service at http://localhost",
        ),
        (html(502, ""), "the proxy answers 502", forward.as_str()),
        (
            html(301, "").header("Location", elsewhere),
            "redirects to https://www.elsewhere.example",
            "set PUBLIC_URL=https://www.elsewhere.example",
        ),
        (
            html(302, "").header("Location", "https://login.example/?to=x"),
            "redirects to",
            "remove the redirect or login in front",
        ),
        (html(401, "Who are you?"), "asks for a login", "Twilio cannot log in"),
        (html(200, "<h1>It works!</h1>"), "another program, which answered 200 <h1>", "to port "),
        (html(404, "Not Found"), "another program, which answered 404", "to port "),
        (html(200, "ok\n"), "an older callbridge", "stop the older one"),
    ];
    for (reply, what, cure) in cases {
        house.front.set(Manner::Always(reply));
        let report = house.look(&[])?;
        report.blames("PUBLIC_URL", "health", what, cure);
        report.leaves_the_others_alone(&before, &["PUBLIC_URL"]);
    }
    Ok(())
}

#[test]
fn the_way_from_outside_leads_to_another_callbridge() -> Outcome {
    let house = House::new()?;
    let neighbour = World::builder(PROGRAM).start()?;
    house.front.set(Manner::Pass(neighbour.bridge.address()));
    let report = house.look(&[])?;
    report.blames("PUBLIC_URL", "health", "another callbridge", "stop the other one");
    Ok(())
}

/// Behind a load balancer the public address may lead to any copy, and this one's own only here.
#[test]
fn one_of_several_copies_has_an_address_of_its_own() -> Outcome {
    let own = Front::open(Certificate::Good)?;
    let house = House::build(|builder| builder.setting("COPY_URL", &own.url))?;
    own.set(Manner::Pass(house.world.bridge.address()));
    let neighbour = World::builder(PROGRAM).start()?;
    house.front.set(Manner::Pass(neighbour.bridge.address()));
    let both = [house.front.pem(), own.pem()].map(std::fs::read_to_string);
    let both = both.into_iter().collect::<Result<String, _>>()?;
    let roots = house.world.home().join("both.pem");
    std::fs::write(&roots, both)?;
    let roots = roots.to_string_lossy();
    let report = house.look(&[("SSL_CERT_FILE", &roots)])?;
    report.names("ok", "PUBLIC_URL", "health", "leads to one of the copies", "");
    report.names("ok", "COPY_URL", "health", "leads to this callbridge", "");
    report.names("ok", "PUBLIC_URL", "websocket", "audio socket opens", "");

    own.set(Manner::Pass(neighbour.bridge.address()));
    let report = house.look(&[("SSL_CERT_FILE", &roots)])?;
    report.blames("COPY_URL", "health", "another callbridge", "stop the other one");
    Ok(())
}

#[test]
fn the_running_server_has_an_older_address() -> Outcome {
    let house = House::new()?;
    let front = Front::open(Certificate::Good)?;
    front.set(Manner::Pass(house.world.bridge.address()));
    let url = format!("{}/incoming-call", front.url);
    house.world.twilio.set_number("voice_url", json!(url));
    let pem = front.pem().to_string_lossy().into_owned();
    let report = house.look_with(
        &["check", "--json"],
        &[
            ("PUBLIC_URL", Some(&front.url)),
            ("SSL_CERT_FILE", Some(&pem)),
            ("TWILIO_AUTH_TOKEN", None),
        ],
    )?;
    report.blames("callbridge", "port", "started with another PUBLIC_URL", "restart it");
    report.names("ok", "PUBLIC_URL", "health", "leads to this callbridge", "");
    Ok(())
}

#[test]
fn no_connection_from_outside() -> Outcome {
    let house = House::new()?;
    let before = house.look(&[])?;
    // The number is compared with these addresses, too, which is not what this is about.
    let without_number = |url: &str, pem: Option<&str>| {
        let mut changes = vec![("PUBLIC_URL", Some(url)), ("TWILIO_PHONE_NUMBER", None)];
        changes.extend(pem.map(|pem| ("SSL_CERT_FILE", Some(pem))));
        house.look_with(&["check", "--json"], &changes)
    };
    let gone = format!("https://localhost:{}", closed_port());
    let report = without_number(&gone, None)?;
    report.names("wrong", "PUBLIC_URL", "health", "refuses the connection", "start the tunnel");
    report.leaves_the_others_alone(&before, &["PUBLIC_URL", "Twilio", "callbridge"]);
    let report = without_number("https://nobody.invalid", None)?;
    report.names(
        "wrong",
        "PUBLIC_URL",
        "health",
        "its name does not resolve",
        "correct the host's name",
    );
    // A tunnel for TCP: the connection comes in, but nobody speaks TLS.
    let report = without_number(&format!("https://localhost:{}", house.port), None)?;
    report.names(
        "wrong",
        "PUBLIC_URL",
        "health",
        "does not speak TLS",
        "a tunnel for HTTP, not for TCP",
    );
    for (certificate, what, cure) in [
        (Certificate::Expired, "has expired", "renew the certificate"),
        (Certificate::WrongName, "is for another name", "the name that its certificate is for"),
        (Certificate::Strange, "issuer is not known", "use a public certificate"),
    ] {
        let front = Front::open(certificate)?;
        front.set(Manner::Pass(house.world.bridge.address()));
        let report = without_number(&front.url, Some(&front.pem().to_string_lossy()))?;
        report.names("wrong", "PUBLIC_URL", "health", what, cure);
    }
    Ok(())
}

/// The pretend Twilio is on this machine and reaches what is here. The real one does not.
#[test]
fn twilio_can_neither_reach_nor_trust_the_address() -> Outcome {
    let house = House::new()?;
    let look = |public_url: &str, number: Option<&str>| {
        // Anywhere but here, and nobody's.
        let elsewhere = [
            ("TWILIO_API_URL", Some("http://twilio.invalid")),
            ("TWILIO_PHONE_NUMBER", number),
            ("PUBLIC_URL", Some(public_url)),
        ];
        house.look_with(&["check", "--json"], &elsewhere)
    };
    let cure = "use a tunnel or a public name";
    let report = look(&house.front.url, Some(OUR_NUMBER))?;
    report.names("wrong", "PUBLIC_URL", "address", "localhost is known in this house only", cure);
    report.names("wrong", "PUBLIC_URL", "certificate", "not by Twilio", "a public certificate");
    // Nobody rings: it may be for the browser alone.
    let report = look(&house.front.url, None)?;
    report.names("warning", "PUBLIC_URL", "address", "localhost is known in this house only", cure);
    report.names("warning", "PUBLIC_URL", "certificate", "not by Twilio", "");
    // Also where nobody answers there.
    let report = look(&format!("https://127.0.0.1:{}", closed_port()), Some(OUR_NUMBER))?;
    report.names("wrong", "PUBLIC_URL", "address", "127.0.0.1 is known in this house only", cure);
    // A public name may mean something else outside.
    let report = look("https://nobody.invalid", Some(OUR_NUMBER))?;
    assert!(report.about("PUBLIC_URL", "address").is_none(), "{}", report.text);
    Ok(())
}

#[test]
fn the_audio_socket_is_in_the_way() -> Outcome {
    let house = House::new()?;
    let before = house.look(&[])?;
    let behind = house.world.bridge.address();
    for status in [400, 426, 200, 404, 501] {
        let refusal = Reply::text(status, None, "no upgrades here");
        house.front.set(Manner::PassNoUpgrade(behind, refusal));
        let report = house.look(&[])?;
        let cure = "turn on WebSocket upgrades";
        report.blames("PUBLIC_URL", "websocket", &status.to_string(), cure);
        report.names("ok", "PUBLIC_URL", "health", "leads to this callbridge", "");
        report.leaves_the_others_alone(&before, &["PUBLIC_URL"]);
    }
    house.front.set(Manner::Pass(behind));
    // The server was started with another Auth Token than the one that stands in `.env` now.
    let token = "a-new-auth-token-that-the-server-has-not-read";
    let report = house.look_with(
        &["check", "--json"],
        &[("TWILIO_AUTH_TOKEN", Some(token)), ("TWILIO_ACCOUNT_SID", None)],
    )?;
    report.blames("PUBLIC_URL", "websocket", "refuses our signature (403)", "restart it");
    Ok(())
}

#[test]
fn the_port_on_this_machine() -> Outcome {
    let house = House::new()?;
    let before = house.look(&[])?;
    // Another program answers there.
    let n8n = house.world.n8n.url();
    let port = n8n.split(['/', ':']).nth(4).unwrap_or_default();
    let report = house.look(&[("PORT", port)])?;
    report.names("wrong", "callbridge", "port", "in use by another program", "set another PORT");
    report.names("wrong", "PUBLIC_URL", "health", "another callbridge", "forward the tunnel");
    report.leaves_the_others_alone(&before, &["callbridge", "PUBLIC_URL", "n8n"]);
    // One that takes the connection and says nothing.
    let mute = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let report = house.look(&[("PORT", &mute.local_addr()?.port().to_string())])?;
    report.names("wrong", "callbridge", "port", "no answer in time", "stop that program");
    let report = house.look(&[("PORT", "0")])?;
    report.names("wrong", "callbridge", "port", "PORT=0", "set PORT=8000");
    // An address that this machine does not have (TEST-NET-3).
    let free = closed_port().to_string();
    let report = house.look(&[("PORT", &free), ("BIND", "203.0.113.7")])?;
    report.names("wrong", "callbridge", "port", "", "BIND");
    Ok(())
}

#[test]
fn before_the_first_start_the_check_listens_itself() -> Outcome {
    let house = House::build(WorldBuilder::asleep)?;
    let port = closed_port();
    house.front.set(Manner::Pass((Ipv4Addr::LOCALHOST, port).into()));
    let report = house.look(&[("PORT", &port.to_string())])?;
    assert_eq!(report.status, Some(0), "{}", report.text);
    report.names("warning", "callbridge", "port", "is not running yet", "start callbridge");
    report.names("ok", "PUBLIC_URL", "health", "leads to this callbridge", "");
    report.names("ok", "PUBLIC_URL", "websocket", "audio socket opens", "");
    assert!(report.errors.is_empty(), "{}", report.errors);
    assert!(house.world.journals().is_empty());
    Ok(())
}

/// A call that comes in meanwhile is not half-answered: Twilio hears what it would hear of a proxy
/// with nobody behind it.
#[test]
fn the_check_takes_no_calls() -> Outcome {
    let house = House::build(WorldBuilder::asleep)?;
    // It listens for as long as it waits for n8n.
    house.world.n8n.set_reply("1", Reply::Hang);
    let port = closed_port();
    let mut child = house
        .world
        .bridge
        .command_in(PROGRAM, &["check"])
        .env("PORT", port.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + TEN_SECONDS;
    let mut line = loop {
        match TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
            Ok(line) => break line,
            Err(error) => assert!(Instant::now() < deadline, "nobody listens: {error}"),
        }
        thread::yield_now();
    };
    let form = "CallSid=CA0123456789abcdef&From=%2B4930901820";
    let head = "POST /incoming-call HTTP/1.1\r\nHost: bridge.example\r\nContent-Length";
    write!(line, "{head}: {}\r\n\r\n{form}", form.len())?;
    let mut answer = String::new();
    line.read_to_string(&mut answer)?;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    child.wait()?;
    assert_eq!(house.world.ultravox.requests(), 0);
    assert!(house.world.journals().is_empty());
    Ok(())
}

#[test]
fn health_tells_life_and_a_proof_and_no_more() -> Outcome {
    let world = World::builder(PROGRAM).start()?;
    assert_eq!(world.get("/health")?.text(), "ok\n");
    let first = world.get("/health?nonce=abc")?.text();
    assert_eq!(first, world.get("/health?nonce=abc")?.text(), "the same process, the same proof");
    assert_ne!(first, world.get("/health?nonce=abd")?.text());
    assert_eq!(first.trim().len(), "ok ".len() + 64 + " ".len() + 64);
    world.bridge.restart()?;
    assert_ne!(first, world.get("/health?nonce=abc")?.text(), "another process, another proof");
    Ok(())
}

// ============================================================================
// Twilio
// ============================================================================

#[test]
fn what_is_wrong_at_twilio() -> Outcome {
    let house = House::new()?;
    let before = house.look(&[])?;
    let twilio = &house.world.twilio;
    let right = twilio.number("voice_url");
    let look_at_voice = |url: &str, what: &str| -> Outcome {
        twilio.set_number("voice_url", json!(url));
        let report = house.look(&[])?;
        let cure = format!("it must be {}/incoming-call: callbridge check --fix", house.front.url);
        report.blames("Twilio", "voice", what, &cure);
        report.leaves_the_others_alone(&before, &["Twilio"]);
        report.names("ok", "Twilio", "number", OUR_NUMBER, "");
        Ok(())
    };
    look_at_voice("", "has no Voice URL")?;
    look_at_voice("https://old.ngrok-free.app/incoming-call", "https://old.ngrok-free.app/incom")?;
    look_at_voice(&format!("{}/incoming-call/", house.front.url), "/incoming-call/")?;
    let with_secret = format!("https://me:{PASSWORD}@host.example/x?key={PASSWORD}");
    look_at_voice(&with_secret, "is https://host.example/x")?;
    look_at_voice("https://x.example/\u{202e}\u{1b}[2J", "is https://x.example/  [2J")?;
    let with_comma = format!("https://me:a,{PASSWORD}@host.example/x");
    look_at_voice(&with_comma, "is https://host.example/x")?;
    twilio.set_number("voice_url", json!(format!("{}#rc=3", right.as_str().unwrap_or_default())));
    assert_eq!(house.look(&[])?.status, Some(0), "overrides behind the # are no difference");
    twilio.set_number("voice_url", right);

    let set = |field: &str, value: Value, what: &str, cure: &str| -> Outcome {
        let old = twilio.number(field);
        twilio.set_number(field, value);
        let report = house.look(&[])?;
        let check = if field == "voice_method" { "method" } else { "handled by" };
        report.blames("Twilio", check, what, cure);
        twilio.set_number(field, old);
        Ok(())
    };
    set(
        "voice_method",
        json!("GET"),
        "Voice URL with GET",
        "it must be HTTP POST: callbridge check --fix",
    )?;
    set("voice_application_sid", json!("AP123"), "a TwiML app (AP123)", "Configure with")?;
    set("trunk_sid", json!("TK123"), "a SIP trunk (TK123)", "Configure with")?;
    set("capabilities", json!({"voice": false}), "has no voice", "buy a number with voice")?;

    let looks_at_status = |what: &str| -> Outcome {
        let report = house.look(&[])?;
        assert_eq!(report.status, Some(0), "{}", report.text);
        let cure = format!("it should be {}/call-status, HTTP POST: callb", house.front.url);
        report.names("warning", "Twilio", "status callback", what, &cure);
        Ok(())
    };
    twilio.set_number("status_callback_method", json!("GET"));
    looks_at_status("/call-status (GET)")?;
    twilio.set_number("status_callback_method", json!("POST"));
    assert!(house.look(&[])?.about("Twilio", "status callback").is_none());
    twilio.set_number("status_callback", json!("https://old.example/call-status"));
    looks_at_status("is https://old.example/call-status (POST)")?;
    twilio.set_number("status_callback", json!(""));
    looks_at_status("no status callback")?;
    Ok(())
}

#[test]
fn whose_account_and_whose_number() -> Outcome {
    let house = House::new()?;
    let before = house.look(&[])?;
    let twilio = &house.world.twilio;
    let another = format!("AC{}", "9".repeat(32));
    let report = house.look(&[("TWILIO_ACCOUNT_SID", &another)])?;
    report.blames("Twilio", "account", "does not accept this Account SID", "API key's secret");
    report.leaves_the_others_alone(&before, &["Twilio"]);
    report.names("skipped", "Twilio", "number", "not checked", "");

    let report = house.look(&[("TWILIO_PHONE_NUMBER", "+442079460099")])?;
    report.blames("Twilio", "number", "+442079460099 is not a number of this account", OUR_NUMBER);
    // Its filter finds this one, which only contains the number.
    let report = house.look(&[("TWILIO_PHONE_NUMBER", "+44207946000")])?;
    report.blames("Twilio", "number", "+44207946000 is not a number", OUR_NUMBER);

    let without = |name: &str| house.look_with(&["check", "--json"], &[(name, None)]);
    let report = without("TWILIO_PHONE_NUMBER")?;
    assert_eq!(report.status, Some(0), "{}", report.text);
    report.names("skipped", "Twilio", "number", "is not set", OUR_NUMBER);
    let report = without("TWILIO_ACCOUNT_SID")?;
    assert_eq!(report.status, Some(0), "{}", report.text);
    report.names("skipped", "Twilio", "number", "that takes TWILIO_ACCOUNT_SID", "/incoming-call");
    report.names("skipped", "Twilio", "number", "", "\"Call status changes\" to");
    report.names("skipped", "Twilio", "number", "", "/call-status");
    let report = without("TWILIO_AUTH_TOKEN")?;
    assert_eq!(report.status, Some(0), "{}", report.text);
    report.names("warning", "Twilio", "token", "anyone can start calls", "Auth Token");

    twilio.set_account("type", json!("Trial"));
    house.look(&[])?.names("warning", "Twilio", "account", "trial account", "upgrade");
    twilio.set_account("type", json!("Full"));
    twilio.set_account("status", json!("suspended"));
    house.look(&[])?.blames("Twilio", "account", "is suspended", "console's first page");
    twilio.set_account("status", json!("active"));
    twilio.set_account("auth_token", json!("the-primary-one-which-is-another"));
    let report = house.look(&[])?;
    report.blames("Twilio", "token", "not the primary Auth Token", "copy the primary");
    assert!(!report.text.contains("the-primary-one-which-is-another"), "{}", report.text);
    twilio.set_account("auth_token", Value::Null);

    let refusal = json!({"status": 403, "code": 20008, "message": "Test Account Credentials"});
    twilio.set_answer(Some(Reply::json(403, &refusal)));
    house.look(&[])?.blames("Twilio", "account", "test credentials", "the live Account SID");
    twilio.set_answer(Some(Reply::json(503, &json!({}))));
    house.look(&[])?.blames("Twilio", "account", "has a problem (503)", "try again later");
    twilio.set_answer(Some(Reply::Reset));
    house.look(&[])?.blames("Twilio", "account", "127.0.0.1", "TWILIO_API_URL");
    Ok(())
}

// ============================================================================
// --fix
// ============================================================================

#[test]
fn fix_sets_the_number_and_reads_it_back() -> Outcome {
    let house = House::new()?;
    let twilio = &house.world.twilio;
    let mess = || {
        twilio.set_number("voice_url", json!("https://old.example/incoming-call"));
        twilio.set_number("voice_method", json!("GET"));
        twilio.set_number("status_callback", json!(""));
    };
    mess();
    // Nobody to ask: nothing is done.
    for words in [["check", "--fix"].as_slice(), &["check", "--fix", "--json"]] {
        let report = house.look_with(words, &[])?;
        assert_eq!(report.status, Some(1));
        assert!(report.text.contains("nothing was changed"), "{}", report.text);
        assert!(report.text.contains("--yes"), "{}", report.text);
        assert_eq!(twilio.changes(), 0);
    }
    let report = house.look_with(&["check", "--fix", "--yes"], &[])?;
    assert_eq!(report.status, Some(0), "{}{}", report.text, report.errors);
    assert_eq!(twilio.changes(), 1);
    assert_eq!(twilio.number("voice_url"), format!("{}/incoming-call", house.front.url));
    assert_eq!(twilio.number("voice_method"), "POST");
    assert_eq!(twilio.number("status_callback"), format!("{}/call-status", house.front.url));
    let old_and_new =
        format!("https://old.example/incoming-call -> {}/incoming-call", house.front.url);
    assert!(report.text.contains(&old_and_new), "{}", report.text);
    assert!(report.text.contains("confirms it when asked again"), "{}", report.text);

    mess();
    let report = house.look_with(&["check", "--json", "--yes", "--fix"], &[])?;
    assert_eq!(report.status, Some(0), "{}{}", report.text, report.errors);
    report.names("ok", "fix", "fix", "Twilio took the change", "");
    report.names("ok", "Twilio", "voice", "/incoming-call", "");
    assert!(report.about("Twilio", "method").is_none(), "{}", report.text);

    let report = house.look_with(&["check", "--json", "--yes", "--fix"], &[])?;
    report.names("ok", "fix", "fix", "nothing to change", "");
    assert_eq!(twilio.changes(), 2, "what is right is not written again");
    let with_overrides = format!("{}/incoming-call#rc=3", house.front.url);
    twilio.set_number("voice_url", json!(with_overrides));
    let report = house.look_with(&["check", "--json", "--yes", "--fix"], &[])?;
    report.names("ok", "fix", "fix", "nothing to change", "");
    Ok(())
}

#[test]
fn fix_does_nothing_that_would_not_help() -> Outcome {
    let house = House::new()?;
    let twilio = &house.world.twilio;
    twilio.set_number("voice_url", json!(""));
    let fix = ["check", "--json", "--yes", "--fix"];
    let plain = house.front.url.replacen("https", "http", 1);
    for (changes, what) in [
        ([("PUBLIC_URL", None)], "there is no address yet"),
        ([("PUBLIC_URL", Some(plain.as_str()))], "there is no address yet"),
        ([("TWILIO_PHONE_NUMBER", None)], "the number is not known"),
        ([("TWILIO_PHONE_NUMBER", Some("+442079460099"))], "is not a number of this account"),
    ] {
        let report = house.look_with(&fix, &changes)?;
        report.names("warning", "fix", "fix", what, "");
        assert_eq!(twilio.changes(), 0);
    }
    // Behind a TwiML app it is set, and still said to be of no use.
    twilio.set_number("voice_application_sid", json!("AP123"));
    let report = house.look_with(&fix, &[])?;
    report.blames("Twilio", "handled by", "its Voice URL is ignored", "Configure with");
    assert_eq!(twilio.changes(), 1);
    Ok(())
}

/// `script` (util-linux) pretends to be a terminal. In CI, which sets one of these two, its absence
/// is a failure.
fn has_script() -> Result<bool, Box<dyn Error + Send + Sync>> {
    let is_here = Command::new("script").arg("--version").output().is_ok();
    if !is_here && (env::var_os("CI").is_some() || env::var_os("BROWSER_TESTS").is_some()) {
        return Err("there is no program `script` here: install util-linux (bsdutils)".into());
    }
    if !is_here {
        writeln!(io::stderr(), "not tried: there is no program `script` here")?;
    }
    Ok(is_here)
}

/// The question is asked at a terminal, which `script` pretends to be.
#[test]
fn fix_asks_at_a_terminal() -> Outcome {
    if !has_script()? {
        return Ok(());
    }
    let house = House::new()?;
    let twilio = &house.world.twilio;
    twilio.set_number("voice_url", json!("https://old.example/incoming-call"));
    for (answer, changes) in [("n\n", 0), ("\n", 0), ("y\n", 1)] {
        let mut child = house
            .world
            .bridge
            .command_in("script", &["-qec", &format!("{PROGRAM} check --fix"), "/dev/null"])
            .env("PORT", &house.port)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut input = child.stdin.take().ok_or("no stdin")?;
        input.write_all(answer.as_bytes())?;
        let mut text = String::new();
        child.stdout.take().ok_or("no stdout")?.read_to_string(&mut text)?;
        let status = child.wait()?;
        drop(input);
        assert!(text.contains("Change this? [y/N]"), "{text}");
        assert!(text.contains("\x1b[1;31mwrong"), "colours in a terminal: {text:?}");
        assert_eq!(twilio.changes(), changes, "{text}");
        assert_eq!(status.success(), changes == 1, "{text}");
    }
    Ok(())
}

// ============================================================================
// ngrok
// ============================================================================

#[test]
fn what_ngrok_says_about_the_address() -> Outcome {
    let house = House::new()?;
    let (front, port, api) = (house.front.url.as_str(), &house.port, house.ngrok.url.as_str());
    let here = format!("http://localhost:{port}");
    let look = |public_url: &str, tunnels: &[(&str, &str)]| {
        house.ngrok.set_tunnels(tunnels);
        house.look(&[("NGROK_API_URL", api), ("PUBLIC_URL", public_url)])
    };
    let report = look(front, &[(front, &here)])?;
    report.names("ok", "ngrok", "tunnel", "forwards https://localhost", "");

    let report = look("", &[("tcp://1.tcp.ngrok.io:1", &here), (front, &here)])?;
    report.blames("settings", "PUBLIC_URL", "is missing", "");
    report.names(
        "warning",
        "ngrok",
        "tunnel",
        "ngrok is running",
        "set PUBLIC_URL=ngrok, or PUBLIC_URL=",
    );

    let report = look("https://yesterday.ngrok-free.invalid", &[(front, &here)])?;
    let what = format!("ngrok's address is now {front}");
    report.names("wrong", "ngrok", "tunnel", &what, "callbridge check --fix");

    let report = look(front, &[(front, "http://localhost:3000")])?;
    report.blames("ngrok", "tunnel", "to http://localhost:3000", &format!("ngrok http {port}"));

    let report = look("ngrok", &[(front, port)])?;
    assert_eq!(report.status, Some(0), "{}", report.text);
    report.names("ok", "ngrok", "tunnel", "PUBLIC_URL=ngrok is https://localhost", "");
    report.names("ok", "PUBLIC_URL", "health", "leads to this callbridge", "");
    report.names("ok", "Twilio", "voice", front, "");
    for (tunnels, what) in [
        ([("tcp://2.tcp.ngrok.io:17", here.as_str())].as_slice(), "tcp.ngrok.io:17 is not https"),
        (&[], "is running, but has no tunnel"),
        (&[(front, "http://localhost:3000")], "to http://localhost:3000"),
    ] {
        let report = look("ngrok", tunnels)?;
        report.blames("ngrok", "tunnel", what, &format!("ngrok http {port}"));
        report.names("skipped", "PUBLIC_URL", "health", "no address yet", "start ngrok first");
    }
    let gone = format!("http://127.0.0.1:{}", closed_port());
    let report = house.look(&[("NGROK_API_URL", &gone), ("PUBLIC_URL", "ngrok")])?;
    report.blames("ngrok", "tunnel", "refuses the connection", &format!("ngrok http {port}"));
    Ok(())
}

#[test]
fn the_server_takes_the_address_of_the_tunnel() -> Outcome {
    let ngrok = Ngrok::open()?;
    let port = closed_port();
    let builder = || {
        World::builder(PROGRAM)
            .setting("PUBLIC_URL", "ngrok")
            .setting("NGROK_API_URL", &ngrok.url)
            .setting("PORT", port)
    };
    let world = builder().asleep().start()?;
    let begin = |what: &str| -> Outcome {
        let output = world.bridge.run_with(&[], &[("PORT", Some(&port.to_string()))])?;
        let errors = String::from_utf8(output.stderr)?;
        assert_eq!(output.status.code(), Some(1), "{errors}");
        assert!(errors.contains("PUBLIC_URL=ngrok: "), "{errors}");
        assert!(errors.contains(what), "{errors}");
        assert!(errors.contains(&format!("ngrok http {port}")), "{errors}");
        Ok(())
    };
    begin("is running, but has no tunnel")?;
    ngrok.set_tunnels(&[("tcp://1.tcp.ngrok.io:1", &format!("localhost:{port}"))]);
    begin("tcp://1.tcp.ngrok.io:1 is not https")?;
    ngrok.set_tunnels(&[("https://a.ngrok.app", "http://localhost:1")]);
    begin("https://a.ngrok.app to http://localhost:1")?;
    ngrok.set_answer(Reply::text(200, None, "<html>"));
    begin("is not ngrok")?;
    ngrok.set_answer(Reply::Hang);
    begin("no answer in time")?;

    ngrok.set_tunnels(&[
        ("https://other.ngrok.app", "http://localhost:1"),
        ("https://ours.ngrok.app", &format!("http://localhost:{port}")),
    ]);
    let world = builder().start()?;
    world.bridge.wait_for_log("webhook is https://ours.ngrok.app/incoming-call")?;
    Ok(())
}

// ============================================================================
// Time
// ============================================================================

#[test]
fn it_ends_within_ten_seconds_when_everybody_hangs() -> Outcome {
    let house = House::new()?;
    for path in ["/api/accounts/me", "/api/models", "/api/voices"] {
        house.world.ultravox.set_answer(path, Reply::Hang);
    }
    house.world.n8n.set_reply("1", Reply::Hang);
    house.world.twilio.set_answer(Some(Reply::Hang));
    house.front.set(Manner::Always(Reply::Hang));
    house.ngrok.set_answer(Reply::Hang);
    // The port as well: it takes the connection and says nothing.
    let mute = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = mute.local_addr()?.port().to_string();
    let report = house.look(&[("NGROK_API_URL", house.ngrok.url.as_str()), ("PORT", &port)])?;
    assert!(report.took < TEN_SECONDS, "it took {:?}", report.took);
    assert_eq!(report.status, Some(1));
    for (party, check) in [
        ("Ultravox", "account"),
        ("n8n", "webhook"),
        ("callbridge", "port"),
        ("PUBLIC_URL", "health"),
        ("Twilio", "account"),
    ] {
        report.names("wrong", party, check, "no answer", "");
    }
    Ok(())
}

/// A party that hangs: whoever looks on sees who it is, and that something goes on.
#[test]
fn a_terminal_shows_who_is_waited_for() -> Outcome {
    if !has_script()? {
        return Ok(());
    }
    let house = House::new()?;
    let look_on = || -> Result<String, Box<dyn Error + Send + Sync>> {
        let output = house
            .world
            .bridge
            .command_in("script", &["-qec", &format!("{PROGRAM} check"), "/dev/null"])
            .env("PORT", &house.port)
            .stdin(Stdio::null())
            .output()?;
        Ok(String::from_utf8(output.stdout)?)
    };
    let text = look_on()?;
    assert!(!text.contains("waiting for"), "nobody hangs: {text:?}");
    house.world.n8n.set_reply("1", Reply::Hang);
    let text = look_on()?;
    assert!(text.contains("\r  waiting for n8n: 2 s of at most 9 s"), "{text:?}");
    assert!(text.contains("\r  waiting for n8n: 3 s of at most 9 s"), "{text:?}");
    // It is gone before the report begins.
    let (before, report) = text.split_once("  \x1b[32mok").ok_or("no report")?;
    assert!(before.ends_with(" \r"), "{before:?}");
    assert!(!report.contains("waiting for"), "{report:?}");
    // No terminal, no progress.
    let report = house.look_with(&["check"], &[])?;
    assert!(!report.errors.contains("waiting for"), "{}", report.errors);
    Ok(())
}
