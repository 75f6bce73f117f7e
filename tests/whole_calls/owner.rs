//! What the owner sees: the live page's server side, the JSON behind it, and the phone in the
//! browser, whose part is played here by the same pretend phone as Twilio's. The page itself is
//! tested in a browser elsewhere.

use std::collections::BTreeSet;
use std::error::Error;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::demo::{
    API_KEY, AgentCall, FIRST_MESSAGE, Heard, HttpAnswer, Marks, PATIENCE, Phone, Reply, Trouble,
    Twiml, World, WorldBuilder, pcm_of, voice,
};
use crate::{CALLER, Outcome, at_the_same_time, connect, wishes};

pub const TOKEN: &str = "mosaic-lantern-27-owner";
const JSON: (&str, &str) = ("Content-Type", "application/json");
const COLLEAGUE: &str = "+4930555666";
/// For what takes a quarter of a minute by itself.
const LONG_PATIENCE: Duration = Duration::from_mins(1);

pub fn builder() -> WorldBuilder {
    World::builder(env!("CARGO_BIN_EXE_callbridge")).setting("API_TOKEN", TOKEN)
}

fn bearer() -> String {
    format!("Bearer {TOKEN}")
}

/// As the page asks: with the password that the browser has been given.
fn basic() -> String {
    format!("Basic {}", BASE64.encode(format!("owner:{TOKEN}")))
}

#[track_caller]
fn look(world: &World, path: &str) -> Result<HttpAnswer, Trouble> {
    world.request("GET", path, &[("Authorization", &bearer())], &[])
}

#[track_caller]
pub fn look_json(world: &World, path: &str) -> Result<Value, Trouble> {
    let answer = look(world, path)?;
    assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    Ok(answer.json())
}

/// As the page posts.
#[track_caller]
pub fn post(world: &World, path: &str, body: &Value) -> Result<HttpAnswer, Trouble> {
    let basic = basic();
    let headers = [
        ("Authorization", basic.as_str()),
        JSON,
        ("Origin", "https://bridge.example"),
        ("Sec-Fetch-Site", "same-origin"),
    ];
    world.request("POST", path, &headers, body.to_string().as_bytes())
}

fn of<'a>(events: &'a [Value], name: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["event"] == name).collect()
}

fn names(events: &[Value]) -> Vec<&str> {
    let all = events.iter().filter_map(|event| event["event"].as_str());
    all.filter(|name| *name != "wire").collect()
}

/// Somebody who has a call's page open.
struct Onlooker<'a> {
    world: &'a World,
    sid: String,
    next: u64,
    events: Vec<Value>,
    latest: Value,
}

impl<'a> Onlooker<'a> {
    fn new(world: &'a World, sid: &str) -> Onlooker<'a> {
        let sid = sid.to_owned();
        Onlooker { world, sid, next: 0, events: Vec::new(), latest: Value::Null }
    }

    #[track_caller]
    fn look(&mut self) -> Result<(), Trouble> {
        let path = format!("/calls/{}?from={}", self.sid, self.next);
        self.latest = look_json(self.world, &path)?;
        assert_eq!(self.latest["from"], self.next, "{}", self.latest);
        self.next = self.latest["next"].as_u64().unwrap_or_default();
        let events = self.latest["events"].as_array();
        self.events.extend(events.into_iter().flatten().cloned());
        Ok(())
    }

    #[track_caller]
    fn wait(&mut self, what: &str, seen: impl Fn(&Onlooker) -> bool) -> Result<(), Trouble> {
        let deadline = Instant::now() + LONG_PATIENCE;
        loop {
            self.look()?;
            if seen(self) {
                return Ok(());
            }
            if Instant::now() > deadline {
                let seen = format!("{} {:?}", self.latest, names(&self.events));
                return Err(self.world.trouble(format!("waited for {what}: {seen}")));
            }
            thread::yield_now();
        }
    }

    #[track_caller]
    fn wait_event(&mut self, name: &str) -> Result<Value, Trouble> {
        self.wait(name, |eye| !of(&eye.events, name).is_empty())?;
        Ok(of(&self.events, name).first().map_or(Value::Null, |event| (*event).clone()))
    }
}

// ============================================================================
// Who gets in
// ============================================================================

const ROUTES: [(&str, &str); 5] = [
    ("GET", "/"),
    ("GET", "/calls"),
    ("GET", "/calls/CA0123"),
    ("POST", "/browser-call"),
    ("POST", "/browser-call/CA00000000000000000000000000000123/stream-ended"),
];

#[test]
fn without_the_setting_there_is_nothing_to_see() -> Outcome {
    let world = builder().without("API_TOKEN").start()?;
    let nothing = world.get("/no-such-thing")?;
    for (method, path) in ROUTES {
        for authorization in ["", &bearer(), &basic(), "Bearer ", "Basic Og=="] {
            let headers = [("Authorization", authorization), JSON];
            let answer = world.request(method, path, &headers, b"{}")?;
            assert_eq!((answer.status, &answer.body), (404, &nothing.body), "{method} {path}");
            assert_eq!(answer.header("WWW-Authenticate"), None, "{method} {path}");
        }
    }
    assert_eq!(world.ultravox.requests(), 0);
    Ok(())
}

#[test]
fn only_the_owner_is_let_in_and_a_browser_is_told_to_ask() -> Outcome {
    let world = builder().start()?;
    let wrong =
        ["", "Bearer", "Bearer wrong", "Basic !!!", "Basic Og==", &format!("Token {TOKEN}")];
    for (method, path) in ROUTES {
        for authorization in wrong {
            let headers = [("Authorization", authorization), JSON];
            let answer = world.request(method, path, &headers, b"{}")?;
            assert_eq!(answer.status, 401, "{method} {path} {authorization}");
            let ask = answer.header("WWW-Authenticate").unwrap_or_default();
            assert!(ask.starts_with("Basic realm="), "{ask}");
            assert!(!answer.text().contains(TOKEN), "{}", answer.text());
        }
    }
    assert_eq!(world.ultravox.requests(), 0);
    let wanted = [200, 200, 404, 200, 404];
    for ((method, path), wanted) in ROUTES.into_iter().zip(wanted) {
        for authorization in [bearer(), basic()] {
            let headers = [("Authorization", authorization.as_str()), JSON];
            let answer = world.request(method, path, &headers, b"{}")?;
            assert_eq!(answer.status, wanted, "{method} {path}: {}", answer.text());
            assert_eq!(answer.header("Cache-Control"), Some("no-store"), "{method} {path}");
            assert_eq!(answer.header("X-Content-Type-Options"), Some("nosniff"));
            assert_eq!(answer.header("Referrer-Policy"), Some("no-referrer"));
            // No other site may load it as an image or a script either.
            assert_eq!(answer.header("Cross-Origin-Resource-Policy"), Some("same-origin"));
        }
    }
    Ok(())
}

/// A guesser with many connections gets no more answers than one with a few, and the owner is not
/// made to wait with it.
#[test]
fn guessing_takes_its_time_and_the_owner_waits_for_nothing() -> Outcome {
    /// More than may wait.
    const GUESSES: usize = 160;
    const EACH: Duration = Duration::from_millis(100);
    let world = builder().start()?;
    let guess = || {
        let token = format!("Bearer {TOKEN}-almost");
        world.request("GET", "/calls", &[("Authorization", token.as_str())], b"")
    };
    let began = Instant::now();
    let answers = thread::scope(|scope| {
        let flood = [(); GUESSES].map(|()| scope.spawn(guess));
        while flood.iter().any(|guesser| !guesser.is_finished()) {
            assert_eq!(look(&world, "/calls")?.status, 200);
        }
        let mut answers = Vec::new();
        for guesser in flood {
            answers.push(guesser.join().map_err(|_| "a guesser panicked")??);
        }
        Ok::<_, Box<dyn Error + Send + Sync>>(answers)
    })?;
    let took = began.elapsed();
    let (late, beyond): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer.status == 401);
    let turns = u32::try_from(late.len())?;
    assert!(took >= EACH * turns, "{turns} guesses were answered within {took:?}");
    // Waiting takes threads, so not everybody may.
    assert!(!beyond.is_empty(), "all of {GUESSES} guesses waited");
    for answer in beyond {
        assert_eq!(answer.status, 429, "{}", answer.text());
        assert!(answer.header("Retry-After").is_some(), "no word on when to come again");
    }
    // One by one it is no faster.
    let began = Instant::now();
    assert_eq!(guess()?.status, 401);
    assert!(began.elapsed() >= EACH);
    Ok(())
}

/// A browser adds its stored password to what any site makes it send.
#[test]
fn another_site_can_spend_nothing() -> Outcome {
    let world = builder().setting("OUTGOING_ALLOW", "+49").start()?;
    let sites: [&[(&str, &str)]; 8] = [
        &[("Origin", "https://evil.example"), JSON],
        &[("Origin", "https://bridge.example.evil.example"), JSON],
        &[("Origin", "https://evil.example/bridge.example"), JSON],
        &[("Origin", "null"), JSON],
        &[("Sec-Fetch-Site", "cross-site"), JSON],
        &[("Sec-Fetch-Site", "same-site"), JSON],
        &[("Sec-Fetch-Site", "cross-site"), ("Origin", "https://bridge.example"), JSON],
        &[("Sec-Fetch-Site", "nonsense"), JSON],
    ];
    let paths = [
        "/browser-call",
        "/browser-call/CA00000000000000000000000000000123/stream-ended",
        "/outgoing-call",
    ];
    let order = json!({"phoneNumber": "+4930777888"}).to_string();
    for path in paths {
        for site in sites {
            let basic = basic();
            let headers = [&[("Authorization", basic.as_str())], site].concat();
            let answer = world.request("POST", path, &headers, order.as_bytes())?;
            assert_eq!(answer.status, 403, "{path} {site:?}: {}", answer.text());
        }
        // What a form on another site can send, without anybody being asked.
        for kind in ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"] {
            let basic = basic();
            let headers = [("Authorization", basic.as_str()), ("Content-Type", kind)];
            let answer = world.request("POST", path, &headers, order.as_bytes())?;
            assert_eq!(answer.status, 415, "{path} {kind}: {}", answer.text());
        }
    }
    world.bridge.wait_for_log("another site has sent it")?;
    assert_eq!((world.ultravox.requests(), world.twilio.orders().len()), (0, 0));

    // The page itself, older browsers, and programs of the owner's.
    let (basic, bearer) = (basic(), bearer());
    let ours: [&[(&str, &str)]; 5] = [
        &[("Authorization", &basic), JSON, ("Sec-Fetch-Site", "same-origin")],
        &[("Authorization", &basic), JSON, ("Origin", "https://bridge.example")],
        &[("Authorization", &basic), ("Content-Type", "Application/JSON; charset=utf-8")],
        &[("Authorization", &bearer)],
        &[("Authorization", &bearer), ("Content-Type", "application/x-www-form-urlencoded")],
    ];
    for headers in ours {
        let answer = world.request("POST", "/browser-call", headers, b"{}")?;
        assert_eq!(answer.status, 200, "{headers:?}: {}", answer.text());
        // Twilio's settings are missing, which is as far as an order gets here.
        let answer = world.request("POST", "/outgoing-call", headers, order.as_bytes())?;
        assert_eq!(answer.status, 503, "{headers:?}: {}", answer.text());
    }
    Ok(())
}

#[test]
fn the_page_may_do_what_is_in_it_and_no_more() -> Outcome {
    let world = builder().start()?;
    let answer = look(&world, "/")?;
    assert_eq!(answer.header("Content-Type"), Some("text/html; charset=utf-8"));
    assert_eq!(answer.text(), include_str!("../../src/owner/page.html"));
    let policy = answer.header("Content-Security-Policy").unwrap_or_default();
    let rules: Vec<&str> = policy.split("; ").collect();
    let wanted = [
        "default-src 'none'",
        "worker-src blob:",
        "connect-src 'self' ws://bridge.example wss://bridge.example",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ];
    for rule in wanted {
        assert!(rules.contains(&rule), "{rule} is not in {policy}");
    }
    for (element, rule) in [("script", "script-src "), ("style", "style-src ")] {
        let rule = rules.iter().find(|one| one.starts_with(rule)).ok_or("no such rule")?;
        assert!(!rule.contains("unsafe"), "{policy}");
        let count = answer.text().matches(&format!("<{element}")).count();
        assert!(count > 0, "there is no <{element}>");
        let hashes = rule.matches("'sha256-").count();
        assert_eq!(hashes, count, "a <{element}> must be written without attributes: {policy}");
    }
    assert_eq!(answer.header("X-Frame-Options"), Some("DENY"));
    assert_eq!(answer.header("Referrer-Policy"), Some("no-referrer"));

    // A name that is none is not written into the policy.
    let mut socket = TcpStream::connect(world.bridge.address())?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let request = format!(
        "GET / HTTP/1.1\r\nHost: evil.example; script-src *\r\nAuthorization: {}\r\n\r\n",
        bearer()
    );
    socket.write_all(request.as_bytes())?;
    let mut text = String::new();
    socket.read_to_string(&mut text)?;
    assert!(text.contains("connect-src 'self';") && !text.contains("evil"), "{text}");
    Ok(())
}

#[test]
fn what_makes_no_sense_is_refused_in_words() -> Outcome {
    let world = builder().start()?;
    let bad = [
        "/calls?limit=0",
        "/calls?limit=201",
        "/calls?limit=-1",
        "/calls?limit=ten",
        "/calls?before=../../etc",
        "/calls?before=a/b",
        "/calls?before=%00",
        "/calls/CA0123?from=-1",
        "/calls/CA0123?from=x",
        "/calls/CA0123?from=1e3",
        "/calls/CA0123?from=99999999999999999999",
    ];
    for path in bad {
        let answer = look(&world, path)?;
        assert_eq!(answer.status, 400, "{path}: {}", answer.text());
        assert!(answer.json()["error"].is_string(), "{path}: {}", answer.text());
    }
    assert_eq!(look(&world, &format!("/calls?before={}", "a".repeat(101)))?.status, 400);
    fs::create_dir_all(world.data_dir().join("calls"))?;
    fs::write(world.data_dir().join("secret.jsonl"), "{}\n")?;
    fs::write(world.data_dir().join("calls/x-.jsonl"), "{}\n")?;
    let nowhere = [
        "/calls/",
        "/calls/CA0123",
        "/calls/../secret",
        "/calls/..%2fsecret",
        "/calls/CA/0123",
        "/calls/%43A0123",
        "/calls/CA0123/",
        "/calls/-secret",
        "/calls//",
    ];
    for path in nowhere {
        assert_eq!(look(&world, path)?.status, 404, "{path}");
    }
    Ok(())
}

// ============================================================================
// A call is watched
// ============================================================================

#[test]
fn a_call_is_followed_step_by_step() -> Outcome {
    let world = builder().start()?;
    let empty = look_json(&world, "/calls")?;
    assert_eq!((&empty["live"], &empty["past"]), (&json!([]), &json!([])));
    let (agent, tools) = (&empty["agent"], &empty["agent"]["tools"]);
    assert_eq!((&agent["name"], &agent["firstStage"]), (&json!("Sara"), &json!("greeting")));
    assert_eq!(tools["move_to_main_convo"]["stage"], "main_convo");
    let kinds = ["verify", "move_to_main_convo", "schedule_meeting", "hangUp", "queryCorpus"]
        .map(|tool| tools[tool]["kind"].as_str().unwrap_or_default());
    assert_eq!(kinds, ["reply", "enter_stage", "n8n", "hang_up", "ultravox"]);

    let call = connect(&world)?;
    let sid = &call.ringing.call_sid;
    let mut eye = Onlooker::new(&world, sid);
    eye.wait_event("stream")?;
    let first = ["ring", "greeting", "agent", "answer", "stream"];
    assert_eq!(names(&eye.events), first);
    assert_eq!(of(&eye.events, "ring")[0]["direction"], "in");
    assert_eq!(of(&eye.events, "greeting")[0]["from"], "n8n");
    assert_eq!(of(&eye.events, "answer")[0]["what"], "stream");
    assert_eq!(eye.latest["speaking"], json!(null));
    let calls = look_json(&world, "/calls")?;
    assert_eq!(calls["live"][0]["sid"], *sid);
    assert_eq!((&calls["live"][0]["live"], &calls["past"]), (&json!(true), &json!([])));

    // Words that are not final yet, and who speaks.
    let words = voice(1, 1_500);
    let ordinal = call.agent.begin_saying("I see you would like", &pcm_of(&words))?;
    eye.wait("partial words", |eye| {
        eye.latest["partial"]
            == json!([{"agent": 1, "ordinal": ordinal, "speaker": "Agent",
            "text": "I see you would like"}])
            && eye.latest["speaking"] == "agent"
    })?;
    eye.wait_event("first_word")?;
    assert_eq!(look_json(&world, "/calls")?["live"][0]["speaking"], "agent");
    call.agent.finish_saying(ordinal, "I see.")?;
    call.agent.send(&json!({"type": "playback_clear_buffer"}))?;
    call.phone.wait_clear()?;
    let talking = call.phone.keep_talking();
    talking.say(&voice(2, 3_000));
    eye.wait("the caller's turn", |eye| {
        eye.latest["speaking"] == "user" && eye.latest["partial"] == json!([])
    })?;
    talking.stop();
    assert_eq!(of(&eye.events, "said")[0]["text"], "I see.");

    // Tools, in stages.
    let member = json!({"full_name": "Anna Berg", "date_of_birth": "1990-01-01",
        "policy_number": "7"});
    call.act("verify", &member)?;
    call.enter_main_stage()?;
    world.n8n.set_reply("3", Reply::json(200, &json!({"message": "Booked."})));
    call.act("schedule_meeting", &wishes("London"))?;
    call.act("no_such_tool", &json!({}))?;
    eye.wait("four results", |eye| of(&eye.events, "tool").len() == 4)?;
    let tool = |name: &str| {
        let all = of(&eye.events, "tool");
        all.into_iter().find(|event| event["tool"] == name).cloned().unwrap_or_default()
    };
    let verify = tool("verify");
    assert_eq!((&verify["arguments"], &verify["stage"]), (&member, &json!("greeting")));
    assert!(verify["result"].as_str().is_some_and(|text| text.contains("Anna Berg")), "{verify}");
    let meeting = tool("schedule_meeting");
    assert_eq!((&meeting["outcome"], &meeting["result"]), (&json!("done"), &json!("Booked.")));
    assert_eq!(
        (&meeting["stage"], &meeting["arguments"]),
        (&json!("main_convo"), &wishes("London"))
    );
    assert_eq!(of(&eye.events, "tool_begins")[0]["id"], meeting["id"]);
    assert_eq!(tool("no_such_tool")["outcome"], "no such tool");
    assert_eq!(eye.latest["summary"]["stage"], "main_convo");

    call.act("hangUp", &json!({"reason": "done"}))?;
    call.agent.close()?;
    call.phone.wait_closed()?;
    eye.wait_event("delivered")?;
    // Each line once, and as it is on disk, whatever the onlooker came in between.
    assert_eq!(eye.events, world.journal(sid));
    let last: Vec<&str> = names(&eye.events).into_iter().rev().take(4).collect();
    assert_eq!(last, ["delivered", "summary", "end", "goodbye"]);
    eye.wait("the end", |eye| eye.latest["live"] == false)?;
    let summary = &eye.latest["summary"];
    assert_eq!(summary["endedBy"], "AgentHungUp");
    assert_eq!((&summary["delivered"], &summary["number"]), (&json!(true), &json!(CALLER)));
    assert_eq!(look_json(&world, "/calls")?["past"], json!([summary]));
    Ok(())
}

#[test]
fn every_kind_of_message_is_shown_once() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.phone.marks(Marks::WhenPlayed);
    let talking = call.phone.keep_talking();
    for round in 0..3 {
        talking.say(&voice(1, 100));
        call.agent.say("Hello.", &pcm_of(&voice(2, 100)))?;
        call.agent.user_said("Hello?")?;
        call.phone.press("1234#")?;
        call.agent.wait_text("the keys", |text| text["type"] == "user_text_message")?;
        call.agent.send(&json!({"type": "playback_clear_buffer"}))?;
        call.enter_main_stage()?;
        let mut wishes = wishes("London");
        wishes["name"] = json!(format!("Anna the {round}."));
        call.act("schedule_meeting", &wishes)?;
    }
    call.act("hangUp", &json!({"reason": "done"}))?;
    call.agent.close()?;
    call.phone.wait_closed()?;
    talking.stop();
    let mut eye = Onlooker::new(&world, &call.ringing.call_sid);
    eye.wait_event("delivered")?;
    let wires = of(&eye.events, "wire");
    let shown: Vec<(u64, &str, &str)> = wires
        .iter()
        .map(|wire| {
            let text = |key: &str| wire[key].as_str().unwrap_or_default();
            (wire["step"].as_u64().unwrap_or_default(), text("way"), text("with"))
        })
        .collect();
    let kinds: BTreeSet<_> = shown.iter().copied().collect();
    let wanted = BTreeSet::from([
        (1, "in", "Twilio"),
        (2, "out", "n8n"),
        (2, "in", "n8n"),
        (3, "out", "Ultravox"),
        (3, "in", "Ultravox"),
        (4, "out", "Twilio"),
        (5, "in", "Twilio"),
        (6, "in", "Twilio"),
        (6, "out", "Ultravox"),
        (6, "in", "Ultravox"),
        (6, "out", "Twilio"),
        (7, "in", "Ultravox"),
        (7, "out", "n8n"),
        (7, "in", "n8n"),
        (7, "out", "Ultravox"),
        (8, "out", "Twilio"),
        (8, "in", "Twilio"),
        (9, "out", "n8n"),
        (9, "in", "n8n"),
    ]);
    assert_eq!(kinds, wanted);
    assert!(wires.len() <= 28, "{}", wires.len());
    let media = wires
        .iter()
        .filter(|wire| wire["text"].as_str().is_some_and(|text| text.contains("\"media\"")));
    assert_eq!(media.count(), 2, "one each way");
    for wire in &wires {
        let chars = wire["text"].as_str().unwrap_or_default().chars().count();
        assert!((1..=2_001).contains(&chars), "{wire}");
        assert!(!wire["text"].as_str().unwrap_or_default().contains("1234"), "keys: {wire}");
    }
    // The result that brought another stage: short, and whole.
    let mut texts = wires.iter().filter_map(|wire| wire["text"].as_str());
    let stage = texts.find(|text| text.contains("new-stage")).ok_or("no stage")?;
    let stage: Value = serde_json::from_str(stage)?;
    let stage: Value = serde_json::from_str(stage["result"].as_str().unwrap_or_default())?;
    assert_eq!(stage["selectedTools"].as_array().map(Vec::len), Some(2), "{stage}");
    assert!(stage["toolResultText"].is_string(), "{stage}");
    Ok(())
}

#[test]
fn nothing_secret_is_shown_to_anybody() -> Outcome {
    const SECRETS: [&str; 4] =
        ["twilio-auth-token-9f3c", "hmac-secret-77ab", "header-secret\"1b\\2d", API_KEY];
    let world = builder()
        .setting("TWILIO_AUTH_TOKEN", SECRETS[0])
        .setting("N8N_HMAC_SECRET", SECRETS[1])
        .setting("N8N_AUTH_HEADER", format!("X-Agent-Key: {}", SECRETS[2]))
        .start()?;
    // A workflow that sends back all that it was sent.
    let echo = format!("Hello. {}", SECRETS.join(" "));
    world.n8n.set_reply("1", Reply::json(200, &json!({"firstMessage": echo, "all": SECRETS})));
    world.n8n.set_reply("3", Reply::json(200, &json!({"message": echo})));
    let call = connect(&world)?;
    call.enter_main_stage()?;
    call.act("schedule_meeting", &wishes("London"))?;
    call.phone.speak(&voice(1, 60))?;
    let broken = call.ringing.next(&world, &[])?;
    let again = broken.open_stream(&world)?;
    let browser = post(&world, "/browser-call", &json!({}))?.json();
    let mut hidden: Vec<String> = SECRETS.map(str::to_owned).to_vec();
    // In JSON it reads differently from here on.
    hidden.push("header-secret".to_owned());
    hidden.push(TOKEN.to_owned());
    let browsers = browser["streamPath"].as_str().ok_or("no stream")?.to_owned();
    for path in [call.ringing.twiml.stream_path(), broken.twiml.stream_path(), browsers] {
        hidden.push(path.rsplit('/').next().ok_or("no token")?.to_owned());
    }
    for agent in world.ultravox.created() {
        let url = agent.join_url();
        hidden.push(url.split_once("/join/").ok_or("another address")?.1.to_owned());
        hidden.push(url.split_once("token=").ok_or("another address")?.1.to_owned());
    }
    for request in world.n8n.requests() {
        let signature = request.header("X-Callbridge-Signature").ok_or("not signed")?;
        hidden.push(signature.trim_start_matches("sha256=").to_owned());
    }
    let form = [("CallSid", call.ringing.call_sid.as_str()), ("From", CALLER)];
    hidden.push(world.signature("/incoming-call", &form));
    again.hang_up()?;
    let mut eye = Onlooker::new(&world, &call.ringing.call_sid);
    eye.wait_event("delivered")?;
    let browser_sid = browser["callSid"].as_str().unwrap_or_default();
    let paths = [
        "/".to_owned(),
        "/calls".to_owned(),
        format!("/calls/{browser_sid}"),
        format!("/calls/{}", call.ringing.call_sid),
    ];
    for path in paths {
        let text = look(&world, &path)?.text();
        for secret in &hidden {
            assert!(!text.contains(secret.as_str()), "{path} shows {secret}: {text}");
        }
    }
    // Nor in the files, nor on the screen; and nobody else may read the files.
    let log = world.bridge.log().join("\n");
    for path in world.journals() {
        let text = fs::read_to_string(&path)?;
        assert!(text.contains("***"), "{text}");
        for secret in &hidden {
            assert!(!text.contains(secret.as_str()), "{path:?} holds {secret}: {text}");
            assert!(!log.contains(secret.as_str()), "the log shows {secret}");
        }
        assert_eq!(fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
    }
    assert_eq!(fs::metadata(world.data_dir().join("calls"))?.permissions().mode() & 0o777, 0o700);
    assert_eq!(fs::metadata(world.data_dir())?.permissions().mode() & 0o777, 0o700);
    Ok(())
}

#[test]
fn the_bridge_starts_again_while_a_call_is_watched() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    let mut eye = Onlooker::new(&world, &call.ringing.call_sid);
    call.agent.user_said("Before.")?;
    eye.wait_event("said")?;
    let started = look_json(&world, "/calls")?["started"].clone();
    world.bridge.kill();
    world.bridge.restart()?;
    let calls = look_json(&world, "/calls")?;
    assert_ne!(calls["started"], started, "the page cannot tell");
    assert_eq!(calls["past"][0]["sid"], call.ringing.call_sid);
    assert_eq!(
        (&calls["past"][0]["endedBy"], &calls["past"][0]["live"]),
        (&json!(null), &json!(false))
    );
    eye.look()?;
    assert_eq!(eye.latest["live"], false);

    let ringing = call.ringing.next(&world, &[])?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(&world)?;
    eye.wait("the call to go on", |eye| eye.latest["live"] == true)?;
    agent.user_said("After.")?;
    agent.say("And on.", &pcm_of(&voice(1, 60)))?;
    eye.wait("two words", |eye| of(&eye.events, "said").len() == 3)?;
    phone.hang_up()?;
    eye.wait_event("delivered")?;
    assert_eq!(eye.events, world.journal(&call.ringing.call_sid));
    let began = eye.events[0]["at"].clone();
    eye.wait("the end", |eye| eye.latest["live"] == false)?;
    assert_eq!(eye.latest["summary"]["began"], began);
    assert_eq!(of(&eye.events, "answer").len(), 2);
    Ok(())
}

#[test]
fn a_journal_that_was_deleted_begins_anew() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    let mut eye = Onlooker::new(&world, &call.ringing.call_sid);
    eye.wait_event("stream")?;
    fs::remove_dir_all(world.data_dir())?;
    let path = format!("/calls/{}?from={}", call.ringing.call_sid, eye.next);
    call.agent.send(&json!({"type": "transcript", "role": "agent", "medium": "voice",
        "text": null, "delta": "Half a", "final": false, "ordinal": 0}))?;
    let deadline = Instant::now() + PATIENCE;
    // What is left is told from memory, and that it is.
    while look_json(&world, &path)?["partial"][0]["text"] != "Half a" {
        assert!(Instant::now() < deadline, "{}", look_json(&world, &path)?);
    }
    let answer = look_json(&world, &path)?;
    if answer["trouble"].is_null() {
        assert_eq!((&answer["from"], &answer["live"]), (&json!(0), &json!(true)), "{answer}");
    } else {
        assert_eq!((&answer["events"], &answer["live"]), (&json!([]), &json!(true)), "{answer}");
    }
    call.agent.user_said("Go on.")?;
    eye.next = 0;
    eye.events.clear();
    eye.wait_event("said")?;
    call.phone.hang_up()?;
    Ok(())
}

#[test]
fn a_call_without_a_disk_is_told_from_memory() -> Outcome {
    let world = builder().setting("DATA_DIR", "/proc/callbridge").start()?;
    let call = connect(&world)?;
    call.agent.user_said("Is this on?")?;
    call.agent.say("It is.", &pcm_of(&voice(1, 60)))?;
    let path = format!("/calls/{}", call.ringing.call_sid);
    let deadline = Instant::now() + PATIENCE;
    while look_json(&world, &path)?["partial"].as_array().is_none_or(|words| words.len() < 2) {
        assert!(Instant::now() < deadline, "{}", look_json(&world, &path)?);
    }
    let answer = look_json(&world, &path)?;
    assert_eq!((&answer["live"], &answer["events"]), (&json!(true), &json!([])));
    assert_eq!(answer["partial"][0]["text"], "Is this on?");
    assert!(answer["trouble"].as_str().is_some_and(|text| text.contains("journal")), "{answer}");
    let calls = look_json(&world, "/calls")?;
    assert_eq!(
        (&calls["live"][0]["sid"], &calls["live"][0]["lines"]),
        (&json!(call.ringing.call_sid), &json!(2))
    );
    call.phone.hang_up()?;
    Ok(())
}

/// A journal as an earlier process has left it.
fn past_call(number: u32) -> (String, String) {
    let second = jiff::Timestamp::UNIX_EPOCH + jiff::SignedDuration::from_secs(number.into());
    let sid = format!("CA{number:032x}");
    let name = format!("{}-{sid}.jsonl", second.strftime("%Y%m%dT%H%M%SZ"));
    let events = [
        json!({"event": "ring", "callSid": sid, "number": CALLER}),
        json!({"event": "said", "agent": 1, "ordinal": 0, "speaker": "Agent", "text": "Hello."}),
        json!({"event": "wire", "step": 1, "way": "in", "with": "Twilio", "text": "x".repeat(2_000)}),
        json!({"event": "end", "endedBy": "CallerLeft"}),
        json!({"event": "delivered"}),
    ];
    let lines = events.into_iter().map(|mut event| {
        event["at"] = json!(second.to_string());
        event.to_string() + "\n"
    });
    (name, lines.collect())
}

#[test]
fn two_thousand_past_calls_are_paged() -> Outcome {
    const CALLS: u32 = 2_000;
    let world = builder().setting("KEEP_DAYS", 36_500).start()?;
    let directory = world.data_dir().join("calls");
    fs::create_dir_all(&directory)?;
    for number in 0..CALLS {
        let (name, text) = past_call(number);
        fs::write(directory.join(name), text)?;
    }
    // Not only calls lie around in directories.
    fs::write(directory.join("notes.txt"), "Buy milk.")?;
    fs::write(directory.join("19700101T000000Z-CAempty.jsonl"), "")?;
    let call = connect(&world)?;
    let mut seen = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = look_json(&world, &format!("/calls?limit=150&before={cursor}"))?;
        assert_eq!(page["live"].is_array(), cursor.is_empty());
        let past = page["past"].as_array().ok_or("no past")?;
        assert!(past.len() <= 150);
        seen.extend(past.iter().filter_map(|call| call["sid"].as_str().map(str::to_owned)));
        match page["next"].as_str() {
            Some(next) => next.clone_into(&mut cursor),
            None => break,
        }
    }
    let mut wanted: Vec<String> =
        (0..CALLS).rev().map(|number| format!("CA{number:032x}")).collect();
    // Of the same second: by name.
    wanted.push("CAempty".to_owned());
    assert_eq!(seen.len(), wanted.len());
    assert_eq!(seen.iter().collect::<BTreeSet<_>>(), wanted.iter().collect::<BTreeSet<_>>());
    let dated = wanted.len() - 2;
    assert_eq!(seen[..dated], wanted[..dated], "newest first");
    let page = look_json(&world, "/calls")?;
    assert_eq!(page["past"].as_array().map(Vec::len), Some(50));
    let newest = &page["past"][0];
    assert_eq!((&newest["number"], &newest["lines"]), (&json!(CALLER), &json!(1)));
    assert_eq!((&newest["endedBy"], &newest["delivered"]), (&json!("CallerLeft"), &json!(true)));
    assert_eq!(page["live"][0]["sid"], call.ringing.call_sid);
    let old = look_json(&world, &format!("/calls/CA{:032x}", 7))?;
    assert_eq!(old["events"].as_array().map(Vec::len), Some(5));
    Ok(())
}

#[test]
fn the_documented_command_deletes_a_caller_and_nobody_else() -> Outcome {
    let page = include_str!("../../docs/operation.md");
    assert!(page.contains("`callbridge forget +4930123456`"), "the command is another one");
    let world = builder().start()?;
    let mut sids = Vec::new();
    for number in [CALLER, "+4930901821", "+49309018201", CALLER] {
        let ringing = world.ring(number)?;
        let agent = world.ultravox.next_call(PATIENCE)?;
        let phone = ringing.open_stream(&world)?;
        agent.user_said(&format!("I am not {CALLER}."))?;
        phone.hang_up()?;
        Onlooker::new(&world, &ringing.call_sid).wait_event("delivered")?;
        sids.push(ringing.call_sid);
    }
    // The server lets go of a journal some moments after n8n has it.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let done = world.bridge.run(&["forget", CALLER, "--yes"])?;
        assert!(done.status.success(), "{done:?}");
        if done.stdout.starts_with(b"0 calls") {
            break;
        }
        assert!(Instant::now() < deadline, "{done:?}");
        thread::sleep(Duration::from_millis(50));
    }
    let left = look_json(&world, "/calls")?["past"].clone();
    let mut left: Vec<&str> =
        left.as_array().into_iter().flatten().filter_map(|call| call["sid"].as_str()).collect();
    left.sort_unstable();
    let mut wanted = vec![sids[1].as_str(), sids[2].as_str()];
    wanted.sort_unstable();
    assert_eq!(left, wanted);
    Ok(())
}

#[test]
fn a_long_story_comes_in_chapters() -> Outcome {
    let world = builder().setting("KEEP_DAYS", 36_500).start()?;
    world.bridge.kill();
    let (name, mut text) = past_call(1);
    for ordinal in 1..2_000 {
        let words = "word ".repeat(100);
        let said = json!({"at": "1970-01-01T00:00:01Z", "event": "said", "agent": 1,
            "ordinal": ordinal, "speaker": "User", "text": words});
        text.push_str(&said.to_string());
        text.push('\n');
    }
    // Half a line of a process that died, and a line that is no JSON.
    text += "{\"at\":\"1970-\n";
    let whole = text.lines().count() - 1;
    text += "{\"half";
    fs::create_dir_all(world.data_dir().join("calls"))?;
    fs::write(world.data_dir().join("calls").join(name), &text)?;
    world.bridge.restart()?;
    let sid = format!("CA{:032x}", 1);
    let mut eye = Onlooker::new(&world, &sid);
    let mut chapters = 0;
    loop {
        eye.look()?;
        chapters += 1;
        assert!(eye.latest.to_string().len() < 600 * 1_024);
        if eye.latest["more"] == false {
            break;
        }
    }
    assert!(chapters > 1, "{} bytes in one answer", text.len());
    assert_eq!(eye.events.len(), whole);
    assert_eq!(eye.next, text.rfind('\n').ok_or("no line")? as u64 + 1);
    // Neither the middle of a line nor a place behind the end is a place to go on from.
    for from in [1, text.len() + 10] {
        let answer = look_json(&world, &format!("/calls/{sid}?from={from}"))?;
        assert_eq!(answer["from"], 0, "{from}");
        assert_eq!(answer["events"][0]["event"], "ring");
    }
    Ok(())
}

// ============================================================================
// The browser is a phone
// ============================================================================

/// A call that the page has begun.
struct BrowserCall {
    sid: String,
    agent: AgentCall,
    phone: Phone,
}

/// Does what the page does with the answer: opens the socket, says which call it is.
#[track_caller]
fn open_stream(world: &World, sid: &str, answer: &Value) -> Result<Phone, Trouble> {
    let phone = world.upgrade(answer["streamPath"].as_str().unwrap_or_default(), None)?;
    phone.send_connected()?;
    phone.send_start(sid)?;
    Ok(phone)
}

#[track_caller]
fn call_from_page(world: &World) -> Result<BrowserCall, Trouble> {
    let answer = post(world, "/browser-call", &json!({}))?;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let answer = answer.json();
    let sid = answer["callSid"].as_str().unwrap_or_default().to_owned();
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = open_stream(world, &sid, &answer)?;
    Ok(BrowserCall { sid, agent, phone })
}

impl BrowserCall {
    #[track_caller]
    fn stream_ended(&self, world: &World, body: &Value) -> Result<Value, Trouble> {
        let answer = post(world, &format!("/browser-call/{}/stream-ended", self.sid), body)?;
        assert_eq!(answer.status, 200, "{}", answer.text());
        Ok(answer.json())
    }
}

#[test]
fn the_owner_talks_to_the_agent_from_the_page() -> Outcome {
    let world = builder().setting("CALLS_PER_NUMBER_PER_HOUR", 1).start()?;
    let answer = post(&world, "/browser-call", &json!({}))?.json();
    let sid = answer["callSid"].as_str().unwrap_or_default();
    assert!(sid.len() == 34 && sid.starts_with("CA"), "{sid}");
    let twiml = Twiml::read(answer["twiml"].as_str().unwrap_or_default())?;
    assert_eq!(answer["streamPath"], twiml.stream_path());
    // n8n is asked for a greeting as for any call.
    assert_eq!(world.n8n.requests_of("1")[0].json["number"], "browser");
    let agent = world.ultravox.next_call(PATIENCE)?;
    assert_eq!(crate::greeting_of(&agent), FIRST_MESSAGE);
    let phone = open_stream(&world, sid, &answer)?;
    phone.marks(Marks::WhenPlayed);
    let (up, down, bye) = (voice(1, 400), voice(2, 3_000), voice(3, 200));
    phone.speak(&up)?;
    agent.expect_audio(&pcm_of(&up))?;
    // A token opens one stream.
    assert!(open_stream(&world, sid, &answer).is_err());
    agent.say("Three seconds of speech.", &pcm_of(&down))?;
    phone.expect_audio(&down)?;
    agent.send(&json!({"type": "playback_clear_buffer"}))?;
    phone.wait_clear()?;
    agent.user_said("Goodbye.")?;
    agent.invoke("hangUp", &json!({"reason": "done"}))?;
    agent.say("Goodbye.", &pcm_of(&bye))?;
    agent.close()?;
    assert_eq!(phone.wait_mark()?, "goodbye");
    assert_eq!(phone.wait_closed()?, Heard::Closed(Some(1000)));
    assert_eq!(phone.heard_audio(), [down, bye].concat());
    let call = BrowserCall { sid: sid.to_owned(), agent, phone };
    let ended = call.stream_ended(&world, &json!({}))?;
    assert_eq!(ended["streamPath"], json!(null));
    assert!(Twiml::read(ended["twiml"].as_str().unwrap_or_default())?.hangs_up);
    let filed = world.n8n.wait_for("2", 1, PATIENCE)?;
    assert_eq!(filed[0].json["number"], "browser");
    assert_eq!(filed[0].json["endedBy"], "AgentHungUp");
    let mut eye = Onlooker::new(&world, sid);
    eye.wait("the end", |eye| eye.latest["live"] == false)?;
    assert_eq!(eye.latest["summary"]["direction"], "browser");
    assert_eq!(of(&eye.events, "ring")[0]["number"], "browser");
    assert_eq!((call.phone.violations(), world.ultravox.violations()), (vec![], vec![]));

    // The owner may call as often as there are lines; the page's hanging up ends a call at once.
    let again = call_from_page(&world)?;
    again.phone.send_stop()?;
    again.stream_ended(&world, &json!({"callStatus": "completed"}))?;
    again.agent.wait_closed()?;
    Ok(())
}

#[test]
fn a_page_that_loses_its_stream_gets_another_one() -> Outcome {
    let world = builder().start()?;
    let call = call_from_page(&world)?;
    call.agent.user_said("Before the break.")?;
    call.phone.drop_line();
    let ended = call.stream_ended(&world, &json!({}))?;
    let phone = open_stream(&world, &call.sid, &ended)?;
    let words = voice(5, 100);
    call.agent.say("Still here.", &pcm_of(&words))?;
    phone.expect_audio(&words)?;
    let mut eye = Onlooker::new(&world, &call.sid);
    eye.wait("what was said", |eye| of(&eye.events, "said").len() == 2)?;

    // And so does one whose bridge was killed under it.
    world.bridge.kill();
    world.bridge.restart()?;
    let ended = call.stream_ended(&world, &json!({}))?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = open_stream(&world, &call.sid, &ended)?;
    agent.say("Here again.", &pcm_of(&words))?;
    phone.expect_audio(&words)?;
    eye.wait("what was said", |eye| of(&eye.events, "said").len() == 3)?;
    phone.hang_up()?;
    let filed = world.n8n.wait_for("2", 1, PATIENCE)?;
    let text = filed[0].json["data"].as_str().unwrap_or_default();
    assert_eq!(text, "User: Before the break.\nAgent: Still here.\nAgent: Here again.");
    assert_eq!(
        look_json(&world, &format!("/calls/{}", call.sid))?["summary"]["direction"],
        "browser"
    );
    Ok(())
}

/// The agent has asked for a person, and has left.
#[track_caller]
fn put_through(world: &World) -> Result<BrowserCall, Trouble> {
    let call = call_from_page(world)?;
    call.phone.marks(Marks::AtOnce);
    call.agent.user_said("A person, please.")?;
    let wish = call.agent.invoke("transfer_to_person", &json!({"reason": "Anna Berg."}))?;
    call.agent.wait_result(&wish)?;
    call.agent.close()?;
    call.phone.wait_closed()?;
    let ended = call.stream_ended(world, &json!({}))?;
    let twiml = ended["twiml"].as_str().unwrap_or_default();
    assert_eq!(ended["streamPath"], json!(null), "{ended}");
    assert!(twiml.contains(COLLEAGUE), "{twiml}");
    let whisper = ended["whisper"].as_str().unwrap_or_default();
    assert_eq!(whisper, "A call for SecureLife Insurance. Anna Berg. To take it, press 1.");
    Ok(call)
}

#[test]
fn a_transfer_is_tried_out_from_the_page() -> Outcome {
    let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    let call = put_through(&world)?;
    // Nobody answers: the caller is back with an agent.
    let ended = call.stream_ended(&world, &json!({"dialCallStatus": "no-answer"}))?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = open_stream(&world, &call.sid, &ended)?;
    agent.say("Nobody is there.", &pcm_of(&voice(1, 60)))?;
    phone.expect_audio(&voice(1, 60))?;
    phone.hang_up()?;
    let filed = world.n8n.wait_for("2", 1, PATIENCE)?;
    assert_eq!(filed[0].json["endedBy"], "CallerLeft");

    // Somebody answers and presses another key, or none; then they press 1.
    let call = put_through(&world)?;
    let ended = call.stream_ended(&world, &json!({"dialCallStatus": "completed"}))?;
    assert!(ended["streamPath"].is_string(), "{ended}");
    let agent = world.ultravox.next_call(PATIENCE)?;
    let first = &agent.request()["firstSpeakerSettings"]["agent"]["prompt"];
    assert!(first.to_string().contains("did not take the call"), "{first}");
    let path = format!("/browser-call/{}/stream-ended", call.sid);
    post(&world, &path, &json!({"callStatus": "completed"}))?;
    world.n8n.wait_for("2", 2, PATIENCE)?;

    let call = put_through(&world)?;
    call.stream_ended(&world, &json!({"dialCallStatus": "completed", "dialBridged": "true"}))?;
    let filed = world.n8n.wait_for("2", 3, PATIENCE)?;
    assert_eq!(filed[2].json["endedBy"], "Transferred");
    Ok(())
}

#[test]
fn a_page_that_is_closed_ends_its_call() -> Outcome {
    at_the_same_time(&[
        ("in the middle of the talk", || {
            let world = builder().start()?;
            let call = call_from_page(&world)?;
            call.agent.user_said("Hello?")?;
            call.phone.drop_line();
            let filed = world.n8n.wait_for("2", 1, LONG_PATIENCE)?;
            assert_eq!(filed[0].json["endedBy"], "CallerLost");
            call.agent.wait_closed()?;
            Ok(())
        }),
        ("before its stream", || {
            let world = builder().start()?;
            let answer = post(&world, "/browser-call", &json!({}))?.json();
            let agent = world.ultravox.next_call(PATIENCE)?;
            let sid = answer["callSid"].as_str().unwrap_or_default();
            let path = format!("/browser-call/{sid}/stream-ended");
            post(&world, &path, &json!({"callStatus": "completed"}))?;
            agent.wait_closed()?;
            Ok(())
        }),
    ])
}

#[test]
fn a_page_that_cannot_be_served_is_told_what_the_caller_would_hear() -> Outcome {
    let world = builder().setting("MAX_CALLS", 1).start()?;
    let call = connect(&world)?;
    let busy = post(&world, "/browser-call", &json!({}))?;
    assert_eq!(busy.status, 503);
    let sentence = busy.json()["error"].as_str().unwrap_or_default().to_owned();
    assert!(sentence.contains("All our lines are busy"), "{sentence}");
    let twiml = Twiml::read(busy.json()["twiml"].as_str().unwrap_or_default())?;
    assert_eq!(twiml.said, [sentence]);
    call.phone.hang_up()?;
    let mut eye = Onlooker::new(&world, &call.ringing.call_sid);
    eye.wait("a free line", |eye| eye.latest["live"] == false)?;

    world.ultravox.refuse_next(1, &Reply::json(402, &json!({"detail": "no minutes"})));
    let refused = post(&world, "/browser-call", &json!({}))?;
    assert_eq!(refused.status, 503, "{}", refused.text());
    let sentence = refused.json()["error"].as_str().unwrap_or_default().to_owned();
    assert!(sentence.starts_with("We are sorry."), "{sentence}");
    let calls = look_json(&world, "/calls")?;
    let refused = calls["past"].as_array().into_iter().flatten();
    let refused = refused.into_iter().find(|call| call["direction"] == "browser");
    let refused = refused.ok_or("the call is not in the list")?;
    assert_eq!(refused["endedBy"], "NoAgent");
    let sid = refused["sid"].as_str().unwrap_or_default();
    let events = look_json(&world, &format!("/calls/{sid}"))?["events"].clone();
    let answer = events.as_array().and_then(|all| all.iter().find(|one| one["event"] == "answer"));
    assert_eq!(answer.map(|answer| &answer["what"]), Some(&json!("apology")));
    Ok(())
}

/// With the number of a caller's call, the page's question would cut it.
#[test]
fn the_page_has_no_hold_of_other_peoples_calls() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    for sid in [call.ringing.call_sid.as_str(), "CA0123", "CA..", "CA%2f"] {
        let path = format!("/browser-call/{sid}/stream-ended");
        for body in [json!({}), json!({"callStatus": "completed"})] {
            assert_eq!(post(&world, &path, &body)?.status, 404, "{sid}");
        }
    }
    let words = voice(1, 100);
    call.agent.say("Go on.", &pcm_of(&words))?;
    call.phone.expect_audio(&words)?;
    Ok(())
}
