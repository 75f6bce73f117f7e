//! Calls that do not go well, and visitors who mean no good: everybody and everything outside fails
//! in turn. A test asserts what the caller hears instead of dead air, what the operator reads, and
//! that nobody else notices. The calls that go well are in `happy.rs`.

use std::collections::BTreeSet;
use std::error::Error;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::demo::{
    self, AgentCall, BOOKED, Ending, Heard, PATIENCE, Phone, Reply, Ringing, Trouble, Twiml, World,
    WorldBuilder, closed_port, pcm_of, voice,
};
use crate::{
    CALLER, Call, DEFAULT_GREETING, Outcome, at_the_same_time, connect, greeting_of, wishes,
    written,
};

const APOLOGY: &str = "We are sorry. Our assistant cannot speak with you right now. Please call \
    again a little later. Goodbye.";
const BUSY: &str = "Thank you for calling SecureLife Insurance. All our lines are busy right now. \
    Please call again in a few minutes. Goodbye.";
/// Far beyond every limit of the bridge: whoever waits so long waits for ever.
const AGES: Duration = Duration::from_secs(40);

fn builder() -> WorldBuilder {
    // Tables of mishaps are played with one number, which calls more often than people do.
    World::builder(env!("CARGO_BIN_EXE_callbridge")).setting("CALLS_PER_NUMBER_PER_HOUR", 1_000)
}

impl Call {
    /// Whether both can still hear each other, to the sample. What the agent has sent is read in
    /// order: behind this, all that it said before has arrived.
    #[track_caller]
    fn goes_on(&self) -> Result<(), Trouble> {
        let (up, down) = (voice(71, 60), voice(72, 60));
        let (said, heard) = (self.phone.said().0, self.phone.heard_audio());
        self.phone.speak(&up)?;
        self.agent.send_audio(&pcm_of(&down))?;
        self.phone.expect_audio(&[heard, down].concat())?;
        self.agent.expect_audio(&pcm_of(&[said, up].concat()))
    }
}

/// The caller hears one sentence, and then the line drops.
#[track_caller]
fn hears_only(ringing: &Ringing, sentence: &str) {
    assert_eq!(ringing.twiml.elements, ["Response", "Say", "Hangup"], "{}", ringing.twiml.xml);
    assert_eq!(ringing.twiml.said, [sentence]);
}

/// The one transcript that n8n got for a world with one call: text, and how the call ended.
#[track_caller]
fn filed(world: &World) -> Result<(String, String), Trouble> {
    let posts = world.n8n.wait_for("2", 1, PATIENCE)?;
    let text = |name: &str| {
        let text = posts.first().and_then(|post| post.json[name].as_str());
        text.unwrap_or_default().to_owned()
    };
    Ok((text("data"), text("endedBy")))
}

/// The text of a world's only journal.
fn journal(world: &World) -> Result<(PathBuf, String), Box<dyn Error + Send + Sync>> {
    let mut files = fs::read_dir(world.data_dir().join("calls"))?;
    let path = files.next().ok_or("there is no journal")??.path();
    let text = fs::read_to_string(&path)?;
    Ok((path, text))
}

/// Comes back once `ready` is true.
#[track_caller]
fn wait_until(what: &str, mut ready: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !ready() {
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        thread::yield_now();
    }
}

/// Starts the program with exactly these settings, and gives exit status and stderr. For starts
/// that shall fail: one that does not is ended.
fn fails_to_start(
    settings: &[(&str, &str)],
    directory: &Path,
) -> Result<(Option<i32>, String), Box<dyn Error + Send + Sync>> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_callbridge"))
        .env_clear()
        .envs(settings.iter().copied())
        .current_dir(directory)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stderr = child.stderr.take().ok_or("no stderr")?;
    let (sender, receiver) = mpsc::channel();
    let reader = thread::spawn(move || {
        let mut text = String::new();
        let read = stderr.read_to_string(&mut text).map(|_| text);
        sender.send(read)
    });
    let text = receiver.recv_timeout(PATIENCE);
    if text.is_err() {
        child.kill()?;
    }
    let status = child.wait()?;
    // Its only failure is that nobody waits for the text any more.
    drop(reader.join());
    Ok((status.code(), text.map_err(|_| "it started")??))
}

/// An agent of one's own: one stage, phrases full of what XML reserves, a tool with little time.
fn own_agent() -> serde_json::Result<Value> {
    let mut agent: Value = serde_json::from_str(include_str!("../../src/agent/agent.json"))?;
    agent["agent_name"] = json!("Max");
    agent["language"] = json!("de-DE");
    agent["phrases"]["apology"] = json!("Der \"Chef\" & <ich> – 's tut uns leid >>> \u{7}");
    agent["first_stage"] = json!("order");
    agent["stages"] =
        json!({"order": {"voice": "Hans", "prompt": "order.md", "tools": ["order_pizza"]}});
    agent["tools"] = json!({"order_pizza": {
        "description": "Orders.", "timeout_s": 1, "n8n": {"route": "pizza"},
        "parameters": {"type": "object", "required": ["kind"],
            "properties": {"kind": {"type": "string"}}}}});
    Ok(agent)
}

fn write_agent(directory: &Path, agent: &Value) -> io::Result<()> {
    fs::write(directory.join("agent.json"), agent.to_string())?;
    fs::write(directory.join("order.md"), "Du bist {agent_name}.\n")
}

// ============================================================================
// 1. Ring
// ============================================================================

/// Of a call that nobody knows.
const SID: &str = "CA00000000000000000000000000000aaa";

#[test]
fn whoever_is_not_twilio_starts_no_call() -> Outcome {
    let world = builder().start()?;
    let form = [("CallSid", SID), ("From", CALLER)];
    let body = format!("CallSid={SID}&From=%2B4930901820");
    let body = body.as_bytes();
    let good = world.signature("/incoming-call", &form);
    let other_form = world.signature("/incoming-call", &[("CallSid", SID), ("From", "+1")]);
    let other_path = world.signature("/stream-ended", &form);
    let other_token =
        demo::twilio_signature("54321", "https://bridge.example/incoming-call", &form);
    let not_good = format!("NOT{good}");
    let wrong = ["", "=", "nonsense", &not_good, &other_form, &other_path, &other_token];
    let content_type = ("Content-Type", "application/x-www-form-urlencoded");
    for path in ["/incoming-call", "/stream-ended", "/call-status"] {
        assert_eq!(world.request("POST", path, &[content_type], body)?.status, 403, "{path}");
    }
    for signature in wrong {
        let headers = [content_type, ("X-Twilio-Signature", signature)];
        let answer = world.request("POST", "/incoming-call", &headers, body)?;
        assert_eq!(answer.status, 403, "{signature}");
        assert!(!answer.text().contains(&good), "it must not tell what it expected");
    }
    world.bridge.wait_for_log("Twilio's signature is missing")?;
    world.bridge.wait_for_log("Twilio's signature is wrong")?;
    let shared = ("X-Twilio-Webhooks-Signature-Settings", "keyId=1;alg=hmac-sha256");
    let headers = [content_type, ("X-Twilio-Signature", other_token.as_str()), shared];
    assert_eq!(world.request("POST", "/incoming-call", &headers, body)?.status, 403);
    let why = world.bridge.wait_for_log("Twilio has signed with a Shared Key")?;
    assert!(!why.contains("TWILIO_AUTH_TOKEN"), "{why}");
    assert_eq!((world.ultravox.requests(), world.n8n.requests().len()), (0, 0));
    let headers = [content_type, ("X-Twilio-Signature", good.as_str())];
    assert_eq!(world.request("POST", "/incoming-call", &headers, body)?.status, 200);
    Ok(())
}

#[test]
fn without_an_auth_token_everybody_is_let_in_and_the_operator_is_warned() -> Outcome {
    let world = builder().without("TWILIO_AUTH_TOKEN").start()?;
    world.bridge.wait_for_log("TWILIO_AUTH_TOKEN is not set")?;
    let body = format!("CallSid={SID}&From=%2B4930901820");
    let answer = world.request("POST", "/incoming-call", &[], body.as_bytes())?;
    assert!(Twiml::read(&answer.text())?.stream_url.is_some());
    Ok(())
}

#[test]
fn a_webhook_set_to_get_is_told_to_use_post() -> Outcome {
    let world = builder().start()?;
    for path in ["/incoming-call", "/incoming-call?CallSid=CA1", "/stream-ended", "/call-status"] {
        let answer = world.get(path)?;
        assert_eq!(answer.status, 405, "{path}");
        assert!(answer.text().contains("HTTP POST"), "{}", answer.text());
    }
    world.bridge.wait_for_log("must be set to HTTP POST")?;
    assert_eq!(world.ultravox.requests(), 0);
    Ok(())
}

#[test]
fn a_call_without_a_proper_id_is_refused_and_writes_no_file() -> Outcome {
    let world = builder().start()?;
    let long = "A".repeat(65);
    for sid in ["", "../../etc/x", "CA/1", "CA 1", "CAé", "C", "CA\u{0}1", "CA.1", &long] {
        let answer = world.webhook("/incoming-call", &[("CallSid", sid), ("From", CALLER)])?;
        assert_eq!(answer.status, 400, "{sid:?}");
    }
    assert_eq!(world.webhook("/incoming-call", &[("From", CALLER)])?.status, 400);
    assert_eq!(world.webhook("/incoming-call", &[])?.status, 400);
    assert_eq!(world.ultravox.requests(), 0);
    let files = fs::read_dir(world.home())?.count();
    assert_eq!(files, 0, "there is something in the bridge's directory");
    Ok(())
}

#[test]
fn the_caller_after_the_last_free_line_hears_that_all_are_busy() -> Outcome {
    let world = builder().setting("MAX_CALLS", 2).start()?;
    let calls = [connect(&world)?, connect(&world)?];
    hears_only(&world.ring(CALLER)?, BUSY);
    world.bridge.wait_for_log("all 2 lines are busy")?;
    assert_eq!(world.ultravox.requests(), 2, "a busy line costs nothing");
    for call in &calls {
        call.goes_on()?;
    }
    // A line that becomes free is given to the next caller.
    calls[0].phone.send_stop()?;
    calls[0].agent.wait_closed()?;
    wait_until("a free line", || {
        world.ring(CALLER).is_ok_and(|ringing| ringing.twiml.stream_url.is_some())
    });
    calls[1].goes_on()?;
    Ok(())
}

// ============================================================================
// 2. Greeting
// ============================================================================

/// All that n8n 2.8 and 2.40 have been seen to answer when a workflow is not in order, and more;
/// and the words by which its owner shall know what to mend.
fn odd_replies_of_n8n() -> Vec<(Reply, &'static str)> {
    let json = |status, body: Value| Reply::json(status, &body);
    let text = |status, body: &str| Reply::text(status, None, body);
    let html = |status, body: &str| Reply::text(status, Some("text/html; charset=utf-8"), body);
    let inactive = json!({"code": 404, "message": "The requested webhook \"POST nope\" is not \
        registered.", "hint": "The workflow must be active for a production URL to run \
        successfully. You can activate the workflow using the toggle in the top-right."});
    let test_url = json!({"code": 404, "message": "The requested webhook \"call\" is not \
        registered.", "hint": "Click the 'Execute workflow' button on the canvas, then try again."});
    let method = json!({"code": 404, "message": "This webhook is not registered for POST \
        requests. Did you mean to make a GET request?"});
    let echo = json!([{"headers": {}, "params": {}, "query": {}, "body": {"route": "1"},
        "webhookUrl": "http://n8n/webhook/call", "executionMode": "production"}]);
    vec![
        (text(200, ""), "an empty body"),
        (text(200, " \n "), "an empty body"),
        (html(200, "<!DOCTYPE html><html><body>Sign in</body></html>"), "HTML"),
        (html(404, "<pre>Cannot POST /webhook</pre>"), "not a webhook's address"),
        (json(404, inactive), "activate"),
        (json(404, test_url), "the test URL"),
        (json(404, method), "to POST"),
        (text(403, "Authorization data is wrong!"), "N8N_AUTH_HEADER"),
        (text(401, "Authorization is required!"), "N8N_AUTH_HEADER"),
        (text(403, "IP is not allowed to access the webhook!"), "allowlist"),
        (json(500, json!({"message": "Error in workflow"})), "500 {\"message\":\"Error in"),
        (json(500, json!({"firstMessage": "It failed."})), "500"),
        (json(503, json!({})), "busy or down"),
        (json(200, json!({"message": "Workflow was started"})), "Respond"),
        (text(200, "Workflow got started"), "Respond"),
        (json(200, echo), "its own input"),
        (json(200, json!([])), "no text named firstMessage"),
        (json(200, json!({"message": "Hello"})), "no text named firstMessage"),
        (json(200, json!({"firstMessage": 7})), "no text named firstMessage"),
        (json(200, json!(null)), "no text named firstMessage"),
        (json(200, json!({"firstMessage": "  "})), "an empty firstMessage"),
        (json(307, json!({})).header("Location", "https://elsewhere.example/"), "redirects"),
        (json(200, json!({"firstMessage": "x".repeat(2_001)})), "more than 2000 characters"),
        (text(200, &"y".repeat(100_000)), "more than 65536 bytes"),
        // Quotes in a template: read out loud it would be gibberish.
        (html(200, r#"{"firstMessage":"Hello "Anna"!"}"#), "JSON"),
        // Nor with a mark before it, or written twice over.
        (text(200, "\u{feff}{\"firstMessage\":\"Hello \"Anna\"!\"}"), "broken JSON"),
        (text(200, "\u{feff} \0\u{200b}[{\"firstMessage\":"), "broken JSON"),
        (json(200, json!("{\"firstMessage\": \"Hello")), "broken JSON"),
        (raw("200 OK", "", b"\x1F\x8B\x08\0\0\0\0\0\xFF", 0), "no text"),
        (Reply::Reset, "n8n: "),
    ]
}

#[test]
fn whatever_n8n_answers_the_caller_hears_the_default_greeting_and_the_log_says_why() -> Outcome {
    let world = builder().start()?;
    let mut complaints = Vec::new();
    for (reply, cause) in odd_replies_of_n8n() {
        let seen = world.bridge.log().len();
        world.n8n.set_reply("1", reply.clone());
        let ringing = world.ring(CALLER)?;
        let agent = world.ultravox.next_call(PATIENCE)?;
        world.bridge.wait_for_log_since(seen, "4 answer")?;
        let log = world.bridge.log();
        let warnings: Vec<&String> =
            log.iter().skip(seen).filter(|line| line.contains("warning: ")).collect();
        let right = matches!(warnings.as_slice(), [one] if one.contains(cause));
        if greeting_of(&agent) != DEFAULT_GREETING || !right {
            let greeting = greeting_of(&agent);
            complaints.push(format!("{reply:?}: {greeting:?}, {warnings:#?} for {cause:?}"));
        }
        ringing.call_status(&world, "completed")?;
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(())
}

/// Rings with an n8n at that address, and checks that the caller does not wait for it.
#[track_caller]
fn rings_on_without_n8n(url: &str, cause: &str) -> Outcome {
    let world = builder().setting("N8N_WEBHOOK_URL", url).start()?;
    let ringing = world.ring(CALLER)?;
    assert!(ringing.answer.took < Duration::from_secs(6), "it took {:?}", ringing.answer.took);
    assert_eq!(greeting_of(&world.ultravox.next_call(PATIENCE)?), DEFAULT_GREETING);
    let warning = world.bridge.wait_for_log("the default greeting is used")?;
    assert!(warning.contains("warning: n8n: ") && warning.contains(cause), "{warning}");
    Ok(())
}

/// An n8n whose connections are treated like this. It ends with the test's process.
fn strange_n8n(treat: fn(TcpStream) -> io::Result<()>) -> io::Result<String> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let url = format!("http://{}/webhook/call", listener.local_addr()?);
    thread::spawn(move || {
        for visitor in listener.incoming() {
            // It ends with an error: the bridge has had enough and is gone.
            drop(visitor.and_then(treat));
        }
    });
    Ok(url)
}

/// Sends one byte after the other, far too slowly.
fn trickle(mut visitor: &TcpStream, text: &[u8]) -> io::Result<()> {
    for byte in text.iter().cycle() {
        visitor.write_all(&[*byte])?;
        // The pace is the point: a deadline for each read would never run out.
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

#[test]
fn the_caller_does_not_wait_for_an_n8n_that_is_slow_or_gone() -> Outcome {
    at_the_same_time(&[
        ("nobody listens", || {
            let url = format!("http://127.0.0.1:{}/webhook/call", closed_port());
            rings_on_without_n8n(&url, "refuses the connection")
        }),
        ("no answer at all", || {
            let url = strange_n8n(|mut visitor| visitor.read_to_end(&mut Vec::new()).map(drop))?;
            rings_on_without_n8n(&url, "no answer within 2000 ms")
        }),
        ("a head byte by byte", || {
            let url = strange_n8n(|visitor| trickle(&visitor, b"HTTP/1.1 200 OK"))?;
            rings_on_without_n8n(&url, "no answer within 2000 ms")
        }),
        ("a body byte by byte", || {
            let url = strange_n8n(|mut visitor| {
                visitor.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")?;
                trickle(&visitor, b"{\"firstMessage\": \"")
            })?;
            rings_on_without_n8n(&url, "no answer within 2000 ms")
        }),
        ("a connection that breaks in the middle", || {
            let url = strange_n8n(|mut visitor| {
                visitor.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{\"first")
            })?;
            rings_on_without_n8n(&url, "n8n: ")
        }),
        ("another protocol", || {
            let url = strange_n8n(|mut visitor| visitor.write_all(b"SSH-2.0-OpenSSH_9.2\r\n"))?;
            rings_on_without_n8n(&url, "n8n: ")
        }),
        ("a host that does not exist", || {
            rings_on_without_n8n("http://n8n.invalid/webhook/call", "n8n: ")
        }),
    ])
}

// ============================================================================
// 3. Agent, and 4. Answer
// ============================================================================

#[test]
fn a_refusal_of_ultravox_is_an_apology_and_is_not_tried_again() -> Outcome {
    // With one line only, a call that kept its line would make the next caller hear "busy".
    let world = builder().setting("MAX_CALLS", 1).start()?;
    let detail = |status| Reply::json(status, &json!({"detail": "No, because of \"that\"."}));
    let no_url = json!({"callId": "1", "joinUrl": null});
    let cases = [
        (detail(401), "check ULTRAVOX_API_KEY"),
        (detail(403), "check ULTRAVOX_API_KEY"),
        (detail(402), "no minutes left"),
        (detail(400), "check ULTRAVOX_MODEL"),
        (detail(404), "check ULTRAVOX_API_URL"),
        (detail(500), "500"),
        (Reply::Reset, "Ultravox: "),
        (Reply::json(201, &no_url), "no callId or joinUrl"),
        (Reply::json(201, &json!({"joinUrl": "ws://127.0.0.1/"})), "no callId or joinUrl"),
        (Reply::text(201, None, "<html>"), "not JSON"),
        (Reply::text(200, None, ""), "not JSON"),
        (detail(429).header("Retry-After", "30"), "too many calls"),
        (detail(503).header("Retry-After", "2"), "no room"),
    ];
    for (index, (reply, cause)) in cases.into_iter().enumerate() {
        world.ultravox.refuse_next(1, &reply);
        let seen = world.bridge.log().len();
        hears_only(&world.ring(CALLER)?, APOLOGY);
        let error = world.bridge.wait_for_log_since(seen, "error: Ultravox: ")?;
        assert!(error.contains(cause), "{error} for {cause:?}");
        assert_eq!(world.ultravox.requests(), index + 1, "{cause}");
    }
    assert!(world.ring(CALLER)?.twiml.stream_url.is_some(), "now all is well again");
    Ok(())
}

#[test]
fn a_call_longer_than_ultravox_documents_is_tried_once_as_a_shorter_one() -> Outcome {
    let world = builder().setting("MAX_CALL_SECONDS", 7_200).start()?;
    let no = Reply::json(400, &json!({"maxDuration": ["must not be more than 3600s"]}));
    world.ultravox.refuse_next(1, &no);
    let ringing = world.ring(CALLER)?;
    assert!(ringing.twiml.stream_url.is_some(), "{}", ringing.twiml.xml);
    let agent = world.ultravox.next_call(PATIENCE)?;
    assert_eq!(agent.request()["maxDuration"], "3600s");
    world.bridge.wait_for_log("set MAX_CALL_SECONDS=3600")?;

    world.ring(CALLER)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    assert_eq!(agent.request()["maxDuration"], "7200s", "where it is taken it stays as it is");

    let before = world.ultravox.requests();
    world.ultravox.refuse_always(&no);
    hears_only(&world.ring(CALLER)?, APOLOGY);
    assert_eq!(world.ultravox.requests(), before + 2, "once, whatever was wrong");
    Ok(())
}

#[test]
fn a_busy_ultravox_is_asked_once_more_within_a_second() -> Outcome {
    let world = builder().start()?;
    let busy = |status, retry_after: Option<&str>| {
        let reply = Reply::json(status, &json!({"detail": "busy"}));
        match retry_after {
            Some(seconds) => reply.header("Retry-After", seconds),
            None => reply,
        }
    };
    let cases = [
        (busy(429, None), Duration::ZERO),
        (busy(429, Some("0")), Duration::ZERO),
        (busy(429, Some("1")), Duration::from_secs(1)),
        (busy(503, Some("1")), Duration::from_secs(1)),
        (busy(503, None), Duration::ZERO),
    ];
    for (index, (reply, at_least)) in cases.into_iter().enumerate() {
        world.ultravox.refuse_next(1, &reply);
        let ringing = world.ring(&format!("+493090182{index}"))?;
        assert!(ringing.twiml.stream_url.is_some(), "{reply:?}: {}", ringing.twiml.xml);
        assert!(ringing.answer.took >= at_least, "{reply:?}: {:?}", ringing.answer.took);
        assert_eq!(world.ultravox.requests(), 2 * (index + 1), "{reply:?}");
    }
    world.ultravox.refuse_always(&busy(429, Some("0")));
    hears_only(&world.ring(CALLER)?, APOLOGY);
    assert_eq!(world.ultravox.requests(), 12, "twice, and no third time");
    Ok(())
}

#[test]
fn an_agent_that_cannot_be_joined_is_an_apology() -> Outcome {
    let world = builder().start()?;
    let join = |url: &str| Reply::json(201, &json!({"callId": "1", "joinUrl": url}));
    let n8n = world.n8n.url();
    let (_, n8n) = n8n.split_once("//").ok_or("an odd address")?;
    let urls = [
        format!("ws://127.0.0.1:{}/join", closed_port()),
        // There is a web server, but nobody who speaks WebSocket or TLS.
        format!("ws://{n8n}"),
        format!("wss://{n8n}"),
        "wss://no-such-host.invalid/join".to_owned(),
        "not an address".to_owned(),
        String::new(),
    ];
    for url in urls {
        world.ultravox.refuse_next(1, &join(&url));
        let seen = world.bridge.log().len();
        hears_only(&world.ring(CALLER)?, APOLOGY);
        let error = world.bridge.wait_for_log_since(seen, "could not join the call")?;
        assert!(error.contains("error: Ultravox: "), "{url}: {error}");
    }
    assert!(world.ring(CALLER)?.twiml.stream_url.is_some(), "now all is well again");
    Ok(())
}

/// The certificate authority of the pretend Ultravox is not among the trusted ones here.
#[test]
fn an_ultravox_with_an_untrusted_certificate_is_not_talked_to() -> Outcome {
    let world = builder().tls(true).without("SSL_CERT_FILE").start()?;
    hears_only(&world.ring(CALLER)?, APOLOGY);
    world.bridge.wait_for_log("invalid peer certificate")?;
    assert_eq!(world.ultravox.requests(), 0, "the key stays with us");
    Ok(())
}

#[test]
fn a_caller_who_cannot_be_served_is_put_through_to_a_person() -> Outcome {
    let world =
        builder().setting("FALLBACK_NUMBER", "+4930123456").setting("MAX_CALLS", 1).start()?;
    world.ultravox.refuse_next(1, &Reply::json(500, &json!({})));
    let refused = world.ring(CALLER)?;
    // One of them at a time.
    refused.call_status(&world, "completed")?;
    let _call = connect(&world)?;
    let busy = world.ring(CALLER)?;
    for ringing in [refused, busy] {
        assert_eq!(ringing.twiml.elements, ["Response", "Say", "Dial"]);
        assert_eq!(ringing.twiml.dial.as_deref(), Some("+4930123456"));
        assert!(ringing.twiml.said.concat().contains("putting you through"));
    }
    Ok(())
}

#[test]
fn phrases_with_what_xml_reserves_are_spoken_as_written() -> Outcome {
    let scratch = tempfile::tempdir()?;
    write_agent(scratch.path(), &own_agent()?)?;
    let world = builder().setting("AGENT_DIR", scratch.path().display()).start()?;
    world.ultravox.refuse_always(&Reply::json(500, &json!({})));
    let ringing = world.ring(CALLER)?;
    hears_only(&ringing, "Der \"Chef\" & <ich> – 's tut uns leid >>>");
    assert!(ringing.twiml.xml.contains("<Say language=\"de-DE\">"), "{}", ringing.twiml.xml);
    assert!(!ringing.twiml.xml.contains('\u{7}'), "XML cannot hold a bell");
    Ok(())
}

#[test]
fn a_caller_who_is_gone_while_it_rings_sends_the_agent_home_and_frees_the_line() -> Outcome {
    let world = builder().setting("MAX_CALLS", 1).start()?;
    for status in ["completed", "no-answer", "canceled", "busy", "failed"] {
        let mut ringing = world.ring(CALLER);
        // The line is free a moment after the last agent has been sent home.
        wait_until("a free line", || {
            if ringing.as_ref().is_ok_and(|ringing| ringing.twiml.stream_url.is_none()) {
                ringing = world.ring(CALLER);
            }
            ringing.as_ref().is_ok_and(|ringing| ringing.twiml.stream_url.is_some())
        });
        let ringing = ringing?;
        let agent = world.ultravox.next_call(PATIENCE)?;
        assert_eq!(ringing.call_status(&world, "ringing")?.status, 204);
        assert!(!agent.is_over(), "it still rings");
        assert_eq!(ringing.call_status(&world, status)?.status, 204);
        assert_eq!(agent.wait_closed()?, Ending::Closed(Some(1000)), "{status}");
        assert!(ringing.stream_is_refused(&world), "the token is void");
    }
    Ok(())
}

#[test]
fn a_caller_who_is_gone_before_the_agent_is_there_leaves_no_agent_behind() -> Outcome {
    let world = builder().start()?;
    world.ultravox.take_time(Duration::from_millis(500));
    let sid = "CA00000000000000000000000000000002";
    thread::scope(|scope| {
        let ringing = scope.spawn(|| world.ring_with(CALLER, &[("CallSid", sid)]));
        world.ultravox.wait_requests(1)?;
        world.webhook("/call-status", &[("CallSid", sid), ("CallStatus", "completed")])?;
        let agent = world.ultravox.next_call(PATIENCE)?;
        agent.wait_closed()?;
        // Nobody reads the answer. It shall be one all the same.
        let answer = ringing.join().map_err(|_| "the ringing thread panicked")?;
        assert!(answer.is_ok(), "{answer:?}");
        Ok(())
    })
}

// ============================================================================
// 5. Stream
// ============================================================================

#[test]
fn a_stream_without_its_own_calls_token_is_refused_at_the_door_and_nobody_notices() -> Outcome {
    let world = builder().start()?;
    let (one, other) = (world.ring(CALLER)?, world.ring("+15550100")?);
    let (agent, other_agent) =
        (world.ultravox.next_call(PATIENCE)?, world.ultravox.next_call(PATIENCE)?);
    let right = one.twiml.stream_path();
    let (base, token) = right.rsplit_once('/').ok_or("no token")?;
    let others = other.twiml.stream_path();
    let other_token = others.rsplit('/').next().unwrap_or_default();
    let attempts = [
        "/media-stream/".to_owned(),
        format!("{base}/"),
        format!("{base}/0123456789abcdef0123456789abcdef"),
        format!("{base}/{}", token.get(..31).unwrap_or_default()),
        format!("{right}0"),
        format!("{right}/0"),
        format!("{base}//{token}"),
        format!("{base}/{}", token.to_uppercase()),
        format!("{base}/{other_token}"),
        format!("/media-stream/CA00000000000000000000000000000003/{token}"),
        format!("/media-stream/{token}"),
    ];
    for path in attempts {
        let url = format!("{}{path}", demo::PUBLIC_URL).replacen("http", "ws", 1);
        let signature = demo::twilio_signature(demo::AUTH_TOKEN, &url, &[]);
        let refused = world.upgrade(&path, Some(&signature)).err().ok_or("it was let in")?;
        assert!(refused.to_string().contains("answered 403"), "{path}: {refused}");
    }
    // What was the token's place.
    assert_eq!(world.get("/media-stream")?.status, 404);
    world.bridge.wait_for_log("a connection was closed: no call waits for this stream")?;
    assert_eq!(world.ultravox.requests(), 2, "nothing is created for strangers");
    // Failed attempts have used up nobody's token.
    let phone = one.open_stream(&world)?;
    Call { ringing: one, agent, phone }.goes_on()?;
    let phone = other.open_stream(&world)?;
    Call { ringing: other, agent: other_agent, phone }.goes_on()?;
    Ok(())
}

#[test]
fn a_token_opens_one_stream_and_the_second_does_not_disturb_the_first() -> Outcome {
    let world = builder().tls(true).start()?;
    let call = connect(&world)?;
    call.goes_on()?;
    assert!(call.ringing.stream_is_refused(&world));
    call.goes_on()?;
    Ok(())
}

#[test]
fn a_stream_that_begins_with_anything_but_start_is_closed() -> Outcome {
    let world = builder().start()?;
    let media = json!({"event": "media", "streamSid": "MZ1", "media": {"payload": "fn5+fg=="}});
    let no_sid = json!({"event": "start", "start": {"callSid": "CA1"}});
    let linear = json!({"event": "start", "streamSid": "MZ1", "start": {"streamSid": "MZ1",
        "callSid": "CA1", "mediaFormat": {"encoding": "audio/l16", "sampleRate": 16000}}});
    let long = format!("{{\"event\":\"connected\",\"x\":\"{}\"}}", "x".repeat(70_000));
    let texts = [
        media.to_string(),
        no_sid.to_string(),
        linear.to_string(),
        r#"{"event":"stop","streamSid":"MZ1","stop":{}}"#.to_owned(),
        r#"{"event":"start"}"#.to_owned(),
        "not JSON".to_owned(),
        "{}".to_owned(),
        String::new(),
        "[".repeat(10_000),
        long,
    ];
    for text in texts {
        let stranger = world.open_socket()?;
        stranger.send_text(&text)?;
        let ending = stranger.wait_closed()?;
        let text = text.get(..text.len().min(60)).unwrap_or_default();
        assert!(matches!(ending, Heard::Closed(Some(_))), "{text}: {ending:?}");
    }
    let stranger = world.open_socket()?;
    stranger.send_binary(&[0; 320])?;
    assert_eq!(stranger.wait_closed()?, Heard::Closed(Some(1003)));
    let stranger = world.open_socket()?;
    stranger.send_raw(b"\xFF\xFF no WebSocket at all \xFF")?;
    assert!(matches!(stranger.wait_closed()?, Heard::Closed(_) | Heard::Broken(_)));
    connect(&world)?.goes_on()?;
    Ok(())
}

#[test]
fn an_upgrade_that_is_signed_wrongly_or_is_none_is_refused() -> Outcome {
    let world = builder().start()?;
    let refused = world.upgrade(&world.ring(CALLER)?.twiml.stream_path(), Some("bm90IHNpZ25lZA=="));
    let why = refused.err().map(|why| why.to_string()).unwrap_or_default();
    assert!(why.contains("403"), "{why}");
    world.bridge.wait_for_log("/media-stream was refused: Twilio's signature is wrong")?;
    assert_eq!(world.get(&world.ring(CALLER)?.twiml.stream_path())?.status, 400);
    // Twilio adds a slash to what it signs, or does not.
    let twiml = world.ring(CALLER)?.twiml;
    let url = format!("{}/", twiml.stream_url.as_deref().unwrap_or_default());
    let slash = demo::twilio_signature(demo::AUTH_TOKEN, &url, &[]);
    world.upgrade(&twiml.stream_path(), Some(&slash))?;
    Ok(())
}

// ============================================================================
// 6. Talk
// ============================================================================

#[test]
fn messages_nobody_has_heard_of_are_passed_over_by_both_sides() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    let sid = call.phone.stream_sid();
    let from_twilio = json!({"event": "weather", "streamSid": sid, "weather": {"rain": true}});
    call.phone.send_text(&from_twilio.to_string())?;
    let odd = [
        json!({"type": "weather", "rain": true}),
        json!({"type": "pong", "timestamp": "soon"}),
        json!({"type": "transcript", "role": "agent"}),
        json!({"type": "transcript", "role": "choir", "ordinal": 1, "text": "la", "final": true}),
        json!({"type": "client_tool_invocation", "toolName": "verify"}),
        json!({"type": 7}),
        json!([1, 2]),
        json!("text"),
    ];
    for message in odd {
        call.agent.send(&message)?;
    }
    call.agent.send_text("not JSON")?;
    call.agent.send_audio(&[])?;
    call.goes_on()?;
    assert_eq!(call.phone.violations(), [""; 0]);
    Ok(())
}

// ============================================================================
// 7. Act
// ============================================================================

#[test]
fn a_tool_that_is_not_of_this_stage_does_not_exist() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    let invocations = [
        ("make_coffee", json!({})),
        ("", json!({})),
        // These are tools of a later stage, and one that Ultravox runs itself.
        ("schedule_meeting", wishes("London")),
        ("submit_claim", json!({"full_name": "Anna Berg"})),
        ("queryCorpus", json!({"query": "prices"})),
    ];
    for (tool, parameters) in invocations {
        let result = call.act(tool, &parameters)?;
        assert_eq!(result["errorType"], "undefined", "{tool}: {result}");
        assert!(result.get("result").is_none(), "{tool}: {result}");
    }
    call.enter_main_stage()?;
    let result = call.act("verify", &json!({}))?;
    assert_eq!(result["errorType"], "undefined", "the first stage is over: {result}");
    assert_eq!(world.n8n.requests_of("3").len(), 0);
    call.goes_on()?;
    Ok(())
}

#[test]
fn what_a_booking_lacks_is_named_and_nothing_is_posted() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.enter_main_stage()?;
    let told = |parameters: &Value| -> Result<String, Trouble> {
        let result = call.act("schedule_meeting", parameters)?;
        assert_eq!(result["responseType"], "tool-response", "{result}");
        Ok(result["result"].as_str().unwrap_or_default().to_owned())
    };
    let text = told(&json!({}))?;
    for name in ["name", "email", "purpose", "datetime", "location"] {
        assert!(text.contains(name), "{text}");
    }
    let blank = json!({"name": "Anna Berg", "email": "  ", "purpose": null,
        "datetime": "2027-03-09T14:30", "location": "London"});
    let text = told(&blank)?;
    assert!(text.contains("email, purpose") && !text.contains("datetime"), "{text}");

    let text = told(&wishes("Paris"))?;
    for name in ["Paris", "London", "Manchester", "New York", "Chicago"] {
        assert!(text.contains(name), "{text}");
    }
    assert!(!text.contains('@'), "addresses of calendars are nobody's business: {text}");
    assert_eq!(world.n8n.requests_of("3").len(), 0);
    assert_eq!(told(&wishes("London"))?, BOOKED);
    Ok(())
}

#[test]
fn a_booking_that_was_certainly_not_made_may_be_tried_again() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.enter_main_stage()?;
    let inactive = json!({"code": 404, "hint": "The workflow must be active for a production URL"});
    world.n8n.reply_next("3", Reply::json(404, &inactive));
    let result = call.act("schedule_meeting", &wishes("London"))?;
    let text = result["result"].as_str().unwrap_or_default();
    assert!(text.contains("Nothing was done"), "{result}");
    world.bridge.wait_for_log("schedule_meeting: n8n: 404")?;
    assert_eq!(call.act("schedule_meeting", &wishes("London"))?["result"], BOOKED);
    let posts = world.n8n.requests_of("3");
    let keys: Vec<_> = posts.iter().map(|post| post.header("idempotency-key")).collect();
    assert!(matches!(keys.as_slice(), [Some(one), Some(two)] if one == two), "{keys:?}");
    Ok(())
}

#[test]
fn a_booking_that_was_perhaps_made_is_never_tried_again() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.enter_main_stage()?;
    let started = json!({"message": "Workflow was started"});
    let replies = [
        Reply::json(500, &json!({"message": "Error in workflow"})),
        Reply::text(200, None, ""),
        Reply::json(200, &json!({"note": "no message"})),
        Reply::json(200, &started),
        Reply::Reset,
    ];
    for (index, reply) in replies.into_iter().enumerate() {
        world.n8n.reply_next("3", reply.clone());
        let mut wish = wishes("London");
        wish["purpose"] = json!(format!("Purpose {index}"));
        let first = call.act("schedule_meeting", &wish)?;
        let text = first["result"].as_str().unwrap_or_default();
        assert!(text.contains("not certain"), "{reply:?}: {first}");
        let second = call.act("schedule_meeting", &wish)?;
        assert_eq!(first["result"], second["result"], "{reply:?}");
        assert_eq!(world.n8n.requests_of("3").len(), index + 1, "{reply:?}");
    }
    call.goes_on()?;
    Ok(())
}

/// The booking is made, and the caller is to hear so, whatever n8n or a proxy has made of letters.
#[test]
fn a_booking_is_read_in_whatever_encoding_it_is_answered() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.enter_main_stage()?;
    let booked = "Gebucht für Jürgen: 14:30 Uhr.";
    let json = json!({"message": booked}).to_string();
    let latin_1: Vec<u8> =
        json.chars().map(|c| u8::try_from(u32::from(c)).unwrap_or(b'?')).collect();
    let little: Vec<u8> = json.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let big: Vec<u8> = json.encode_utf16().flat_map(u16::to_be_bytes).collect();
    let typed = |charset: &str| format!("Content-Type: application/json; charset={charset}\r\n");
    let replies = [
        raw("200 OK", &typed("utf-8"), json.as_bytes(), 0),
        raw("200 OK", "", &[b"\xEF\xBB\xBF\r\n", json.as_bytes()].concat(), 0),
        raw("200 OK", &typed("ISO-8859-1"), &latin_1, 0),
        raw("200 OK", &typed("utf-8"), &latin_1, 0),
        raw("200 OK", "", &[b"\xFF\xFE", little.as_slice()].concat(), 0),
        raw("200 OK", "", &[b"\xFE\xFF", big.as_slice()].concat(), 0),
        raw("200 OK", &typed("UTF-16LE"), &little, 0),
        raw("200 OK", &typed("\"utf-16be\""), &big, 0),
    ];
    for (index, reply) in replies.into_iter().enumerate() {
        world.n8n.reply_next("3", reply);
        let mut wish = wishes("London");
        wish["purpose"] = json!(format!("Purpose {index}"));
        assert_eq!(call.act("schedule_meeting", &wish)?["result"], booked, "answer {index}");
    }
    Ok(())
}

#[test]
fn an_n8n_that_hangs_in_a_tool_is_told_to_the_agent_within_the_tools_own_time() -> Outcome {
    let scratch = tempfile::tempdir()?;
    write_agent(scratch.path(), &own_agent()?)?;
    let world = builder().setting("AGENT_DIR", scratch.path().display()).start()?;
    world.n8n.set_reply("pizza", Reply::Hang);
    let call = connect(&world)?;
    let timeout = &call.agent.request()["selectedTools"][0]["temporaryTool"]["timeout"];
    assert_eq!(timeout, "6s", "its own second, and five more for Ultravox");
    let began = Instant::now();
    let invocation = call.agent.invoke("order_pizza", &json!({"kind": "Funghi"}))?;
    let result = call.agent.wait_result(&invocation)?;
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    assert!(result["result"].as_str().is_some_and(|text| text.contains("not certain")), "{result}");
    world.bridge.wait_for_log("no answer within 1000 ms")?;
    call.goes_on()?;
    assert_eq!(call.agent.results(&invocation).len(), 1);
    Ok(())
}

#[test]
fn an_invocation_repeated_with_its_id_is_answered_once() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.enter_main_stage()?;
    call.agent.invoke_as("same", "schedule_meeting", &wishes("London"))?;
    call.agent.invoke_as("same", "schedule_meeting", &wishes("London"))?;
    call.agent.wait_result("same")?;
    // Behind this, an answer to the second would have come.
    call.act("make_coffee", &json!({}))?;
    call.act("schedule_meeting", &wishes("London"))?;
    assert_eq!(call.agent.results("same").len(), 1);
    assert_eq!(world.n8n.requests_of("3").len(), 1);
    Ok(())
}

#[test]
fn a_model_that_asks_for_everything_at_once_gets_one_result_for_each() -> Outcome {
    let world = builder().start()?;
    let slow = Reply::json(200, &json!({"message": "Done."})).after(Duration::from_millis(500));
    world.n8n.set_reply("3", slow);
    let call = connect(&world)?;
    call.enter_main_stage()?;
    let mut invocations = Vec::new();
    for index in 0..20 {
        let mut wish = wishes("London");
        wish["purpose"] = json!(format!("Purpose {index}"));
        invocations.push(call.agent.invoke("schedule_meeting", &wish)?);
    }
    let mut refused = 0;
    for invocation in &invocations {
        let result = call.agent.wait_result(invocation)?;
        refused += usize::from(result["errorType"] == "implementation-error");
        assert!(result["result"] == "Done." || result["errorMessage"].is_string(), "{result}");
    }
    assert_eq!(world.n8n.requests_of("3").len() + refused, 20);
    assert!(refused > 0, "threads without end");
    call.goes_on()?;
    for invocation in &invocations {
        assert_eq!(call.agent.results(invocation).len(), 1);
    }
    Ok(())
}

/// Whoever was refused because eight tools were at work is no reason to refuse the next.
#[test]
fn after_many_refused_tools_the_next_one_works() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let mut agent = own_agent()?;
    agent["tools"]["order_pizza"]["timeout_s"] = json!(4);
    write_agent(scratch.path(), &agent)?;
    let world = builder().setting("AGENT_DIR", scratch.path().display()).start()?;
    let call = connect(&world)?;
    let ask = |number: usize| {
        call.agent.invoke("order_pizza", &json!({"kind": format!("Number {number}")}))
    };
    world.n8n.set_reply("pizza", Reply::Hang);
    // Eight are at work, and the others (unless the machine stumbles for seconds) are refused.
    let asked = (0..18).map(ask).collect::<Result<Vec<_>, _>>()?;
    for invocation in asked {
        call.agent.wait_result(&invocation)?;
    }
    world.n8n.set_reply("pizza", Reply::json(200, &json!({"message": "Done."})));
    // The last one's thread may still be on its way out.
    let deadline = Instant::now() + PATIENCE;
    while call.agent.wait_result(&ask(99)?)?["result"] != "Done." {
        assert!(Instant::now() < deadline, "tools are off for the rest of the call");
    }
    Ok(())
}

#[test]
fn one_call_asks_n8n_no_more_than_a_hundred_different_things() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.enter_main_stage()?;
    let ask = |number: usize| {
        let mut wish = wishes("London");
        wish["purpose"] = json!(format!("Purpose {number}"));
        call.act("schedule_meeting", &wish)
    };
    for number in 0..100 {
        assert_eq!(ask(number)?["result"], BOOKED, "{number}");
    }
    let refused = ask(100)?;
    let why = refused["errorMessage"].as_str().unwrap_or_default();
    assert!(why.contains("too many different requests"), "{refused}");
    assert_eq!(ask(7)?["result"], BOOKED, "a repeat is answered from memory");
    assert_eq!(world.n8n.requests_of("3").len(), 100);
    Ok(())
}

#[test]
fn a_caller_who_leaves_in_the_middle_of_a_tool_still_gets_what_was_asked_for() -> Outcome {
    let world = builder().setting("MAX_CALLS", 1).start()?;
    let slow = Reply::json(200, &json!({"message": BOOKED})).after(Duration::from_millis(700));
    world.n8n.set_reply("3", slow);
    let call = connect(&world)?;
    call.enter_main_stage()?;
    call.agent.user_said("Book it, I have to run.")?;
    call.agent.invoke("schedule_meeting", &wishes("London"))?;
    world.n8n.wait_for("3", 1, PATIENCE)?;
    call.phone.send_stop()?;
    assert_eq!(call.agent.wait_closed()?, Ending::Closed(Some(1000)));
    let (text, ended_by) = filed(&world)?;
    assert_eq!(text, "User: Book it, I have to run.");
    assert_eq!(ended_by, "CallerLeft");
    assert_eq!(world.n8n.requests_of("3").len(), 1);
    world.bridge.wait_for_log("schedule_meeting: ")?;
    assert!(world.ring(CALLER)?.twiml.stream_url.is_some(), "the line is free again");
    Ok(())
}

// ============================================================================
// 8. Goodbye
// ============================================================================

#[test]
fn a_caller_who_leaves_during_the_goodbye_is_not_waited_for() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.act("hangUp", &json!({"reason": "done"}))?;
    call.agent.say("Goodbye, and by the way …", &pcm_of(&voice(1, 60_000)))?;
    call.agent.close()?;
    call.phone.wait_mark()?;
    call.phone.send_stop()?;
    call.phone.wait_closed()?;
    world.bridge.wait_for_log("the caller left during the goodbye")?;
    assert_eq!(filed(&world)?.1, "AgentHungUp");
    Ok(())
}

#[test]
fn a_caller_of_whom_nothing_is_known_is_not_left_in_dead_air() -> Outcome {
    let world = builder().start()?;
    let answer = world.webhook("/stream-ended", &[("CallSid", SID)])?;
    let twiml = Twiml::read(&answer.text())?;
    assert_eq!(twiml.said, [APOLOGY]);
    assert!(twiml.hangs_up);
    for sid in ["", "../x"] {
        assert_eq!(world.webhook("/stream-ended", &[("CallSid", sid)])?.status, 400, "{sid}");
    }
    let status = [("CallSid", SID), ("CallStatus", "completed")];
    assert_eq!(world.webhook("/call-status", &status)?.status, 204);
    assert_eq!(world.webhook("/call-status", &status[1..])?.status, 400);
    assert_eq!(world.ultravox.requests(), 0);
    Ok(())
}

// ============================================================================
// When a line breaks
// ============================================================================

/// The agent that takes over from one whose line broke, once the bridge is through to it.
#[track_caller]
fn next_agent(world: &World, seen: usize) -> Result<AgentCall, Trouble> {
    let agent = world.ultravox.next_call(PATIENCE)?;
    world.bridge.wait_for_log_since(seen, "a new agent is there")?;
    Ok(agent)
}

/// Whether a caller and a new agent hear each other, to the sample.
#[track_caller]
fn they_hear_each_other(phone: &Phone, agent: &AgentCall) -> Result<(), Trouble> {
    let (up, down) = (voice(81, 60), voice(82, 60));
    let heard = [phone.heard_audio(), down.clone()].concat();
    agent.send_audio(&pcm_of(&down))?;
    phone.expect_audio(&heard)?;
    phone.speak(&up)?;
    agent.expect_audio(&pcm_of(&up))
}

/// What Twilio does next is what this answer says.
fn follow(ringing: &Ringing, answer: demo::HttpAnswer) -> Result<Ringing, String> {
    Ok(Ringing { twiml: Twiml::read(&answer.text())?, answer, ..ringing.clone() })
}

/// The agent's line ends without a goodbye, in the middle of a sentence.
fn the_agents_line_breaks(tls: bool) -> Outcome {
    let world = builder().tls(tls).start()?;
    let call = connect(&world)?;
    call.enter_main_stage()?;
    let speech = voice(1, 400);
    call.agent.begin_saying("I was just about to", &pcm_of(&speech))?;
    call.phone.expect_audio(&speech)?;
    let seen = world.bridge.log().len();
    call.agent.drop_line();
    let agent = next_agent(&world, seen)?;
    assert_eq!(agent.query(), format!("priorCallId={}", call.agent.id()));
    assert_eq!(agent.request()["voice"], "Mark", "it goes on in the stage it was in");
    let opening = &agent.request()["firstSpeakerSettings"]["agent"];
    assert!(opening["prompt"].as_str().is_some_and(|text| text.contains("interrupted")));
    assert_eq!(opening.get("text"), None, "nobody greets twice");
    they_hear_each_other(&call.phone, &agent)?;

    agent.user_said("Go on.")?;
    let goodbye = agent.invoke("hangUp", &json!({"reason": "done"}))?;
    agent.wait_result(&goodbye)?;
    agent.close()?;
    assert_eq!(call.phone.wait_closed()?, Heard::Closed(Some(1000)));
    let (text, ended_by) = filed(&world)?;
    assert_eq!(text, "Agent: I was just about to\nUser: Go on.");
    assert_eq!(ended_by, "AgentHungUp");
    assert_eq!(call.phone.violations(), [""; 0]);
    assert_eq!(world.ultravox.violations(), [""; 0]);
    Ok(())
}

#[test]
fn an_agent_gone_without_a_close_frame_is_replaced_over_plain_ws() -> Outcome {
    the_agents_line_breaks(false)
}

#[test]
fn an_agent_gone_without_a_close_frame_is_replaced_over_tls() -> Outcome {
    the_agents_line_breaks(true)
}

#[test]
fn an_agent_gone_before_the_caller_came_is_replaced_too() -> Outcome {
    let world = builder().start()?;
    let ringing = world.ring(CALLER)?;
    let seen = world.bridge.log().len();
    let gone = world.ultravox.next_call(PATIENCE)?;
    gone.wait_joined()?;
    gone.drop_line();
    let phone = ringing.open_stream(&world)?;
    let agent = next_agent(&world, seen)?;
    they_hear_each_other(&phone, &agent)?;
    Ok(())
}

#[test]
fn an_agent_that_may_not_refer_to_the_last_one_is_told_what_was_said() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.agent.say("Who is there?", &[])?;
    call.agent.user_said("It is me.")?;
    call.goes_on()?;
    world.ultravox.refuse_next(1, &Reply::json(400, &json!({"detail": "no such prior call"})));
    let seen = world.bridge.log().len();
    call.agent.drop_line();
    let agent = next_agent(&world, seen)?;
    assert_eq!(agent.query(), "");
    let history = json!([
        {"role": "MESSAGE_ROLE_AGENT", "text": "Who is there?"},
        {"role": "MESSAGE_ROLE_USER", "text": "It is me."},
    ]);
    assert_eq!(agent.request()["initialMessages"], history);
    they_hear_each_other(&call.phone, &agent)?;
    Ok(())
}

#[test]
fn an_agent_that_breaks_again_and_again_is_an_apology_in_the_end() -> Outcome {
    let world = builder().setting("MAX_CALLS", 1).start()?;
    let call = connect(&world)?;
    call.agent.user_said("Hello?")?;
    call.goes_on()?;
    let mut agent = call.agent.clone();
    for _ in 0..2 {
        let seen = world.bridge.log().len();
        agent.drop_line();
        agent = next_agent(&world, seen)?;
    }
    agent.drop_line();
    assert_eq!(call.phone.wait_closed()?, Heard::Closed(Some(1000)), "dead air");
    let answer = call.ringing.stream_ended(&world)?;
    assert_eq!(Twiml::read(&answer.text())?.said, [APOLOGY]);
    assert_eq!(filed(&world)?, ("User: Hello?".to_owned(), "AgentLost".to_owned()));
    assert_eq!(world.ultravox.requests(), 3);
    assert!(world.ring(CALLER)?.twiml.stream_url.is_some(), "the line is free again");
    Ok(())
}

#[test]
fn an_agent_that_cannot_be_replaced_is_an_apology() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.goes_on()?;
    world.ultravox.refuse_always(&Reply::json(500, &json!({})));
    call.agent.drop_line();
    assert_eq!(call.phone.wait_closed()?, Heard::Closed(Some(1000)), "dead air");
    let answer = call.ringing.stream_ended(&world)?;
    assert_eq!(Twiml::read(&answer.text())?.said, [APOLOGY]);
    world.bridge.wait_for_log("could not create the agent's call: 500")?;
    Ok(())
}

/// A caller who leaves while the agent is being replaced leaves no agent behind.
#[test]
fn a_caller_who_leaves_while_the_agent_is_replaced_leaves_nobody_behind() -> Outcome {
    let world = builder().setting("MAX_CALLS", 1).start()?;
    let call = connect(&world)?;
    call.goes_on()?;
    world.ultravox.take_time(Duration::from_millis(500));
    call.agent.drop_line();
    world.ultravox.wait_requests(2)?;
    call.phone.send_stop()?;
    call.phone.wait_closed()?;
    let late = world.ultravox.next_call(PATIENCE)?;
    late.wait_closed()?;
    world.bridge.wait_for_log("CallerLeft")?;
    wait_until("a free line", || {
        world.ring(CALLER).is_ok_and(|ringing| ringing.twiml.stream_url.is_some())
    });
    Ok(())
}

/// A way in which the caller's line ends, and its name.
type Break = (&'static str, fn(&Phone) -> Result<(), Trouble>);

#[test]
fn a_callers_stream_that_breaks_or_talks_nonsense_is_followed_by_another() -> Outcome {
    let world = builder().start()?;
    let other = connect(&world)?;
    let breaks: [Break; 7] = [
        ("TCP ends", |phone| {
            phone.drop_line();
            Ok(())
        }),
        ("not JSON", |phone| phone.send_text("not JSON")),
        ("binary", |phone| phone.send_binary(&[1; 160])),
        ("no WebSocket", |phone| phone.send_raw(&[0xFF; 40])),
        ("a second start", |phone| phone.send_start(SID)),
        ("another's stream", |phone| {
            let media = json!({"event": "media", "streamSid": "MZ1", "media": {"payload": "AAAA"}});
            phone.send_text(&media.to_string())
        }),
        ("no base64", |phone| {
            let media = json!({"event": "media", "streamSid": phone.stream_sid(),
                "media": {"payload": "&&&&"}});
            phone.send_text(&media.to_string())
        }),
    ];
    for (index, (what, breaks)) in breaks.into_iter().enumerate() {
        let call = connect(&world)?;
        call.agent.user_said("Hello?")?;
        call.goes_on()?;
        breaks(&call.phone)?;
        call.phone.wait_closed()?;
        assert!(!call.agent.is_over(), "{what}: the agent waits");
        let again = follow(&call.ringing, call.ringing.stream_ended(&world)?)?;
        assert!(call.ringing.stream_is_refused(&world), "{what}: the old token is void");

        let phone = again.open_stream(&world)?;
        let (up, down) = (voice(83, 60), voice(84, 60));
        let said = [call.phone.said().0, up.clone()].concat();
        phone.speak(&up)?;
        call.agent.expect_audio(&pcm_of(&said))?;
        call.agent.send_audio(&pcm_of(&down))?;
        phone.expect_audio(&down)?;
        phone.send_stop()?;
        assert_eq!(call.agent.wait_closed()?, Ending::Closed(Some(1000)), "{what}");
        let posts = world.n8n.wait_for("2", index + 1, PATIENCE)?;
        let post = posts.last().ok_or("nothing was filed")?;
        assert_eq!(post.json["callSid"], call.ringing.call_sid, "{what}");
        assert_eq!(post.json["endedBy"], "CallerLeft", "{what}");
        other.goes_on()?;
    }
    Ok(())
}

#[test]
fn a_stream_that_is_cut_again_and_again_is_an_apology_in_the_end() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.agent.user_said("Hello?")?;
    call.goes_on()?;
    call.phone.drop_line();
    let mut ringing = follow(&call.ringing, call.ringing.stream_ended(&world)?)?;
    let mut cuts = 1;
    while ringing.twiml.stream_url.is_some() {
        ringing.open_stream(&world)?.drop_line();
        ringing = follow(&ringing, ringing.stream_ended(&world)?)?;
        cuts += 1;
        assert!(cuts < 20, "it goes on for ever");
    }
    assert!(cuts > 1, "one cut is no reason");
    hears_only(&ringing, APOLOGY);
    assert_eq!(call.agent.wait_closed()?, Ending::Closed(Some(1000)));
    assert_eq!(filed(&world)?, ("User: Hello?".to_owned(), "CallerLost".to_owned()));
    Ok(())
}

#[test]
fn a_caller_gone_without_a_stop_is_gone_once_twilio_says_so() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.agent.user_said("Hello?")?;
    call.goes_on()?;
    call.phone.drop_line();
    call.ringing.call_status(&world, "completed")?;
    assert_eq!(call.agent.wait_closed()?, Ending::Closed(Some(1000)));
    assert_eq!(filed(&world)?, ("User: Hello?".to_owned(), "CallerLeft".to_owned()));
    let answer = call.ringing.stream_ended(&world)?;
    assert_eq!(Twiml::read(&answer.text())?.elements, ["Response", "Hangup"]);
    Ok(())
}

#[test]
fn a_bridge_that_dies_in_a_call_takes_it_up_again_when_it_is_back() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.enter_main_stage()?;
    call.agent.user_said("Before the power cut.")?;
    call.goes_on()?;
    written(&world, &call.ringing.call_sid, &call.agent)?;
    world.bridge.restart()?;
    let again = follow(&call.ringing, call.ringing.stream_ended(&world)?)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    assert_eq!(agent.query(), format!("priorCallId={}", call.agent.id()));
    assert_eq!(agent.request()["voice"], "Mark", "it goes on in the stage it was in");
    let phone = again.open_stream(&world)?;
    they_hear_each_other(&phone, &agent)?;
    agent.user_said("After it.")?;
    they_have_been_read(&agent)?;
    phone.send_stop()?;
    agent.wait_closed()?;
    let wanted = "User: Before the power cut.\nUser: After it.";
    assert_eq!(filed(&world)?, (wanted.to_owned(), "CallerLeft".to_owned()));
    Ok(())
}

/// What the agent has sent is read in order, and an unknown tool has an answer too.
#[track_caller]
fn they_have_been_read(agent: &AgentCall) -> Result<(), Trouble> {
    let invocation = agent.invoke("are_you_there", &json!({}))?;
    agent.wait_result(&invocation).map(drop)
}

#[test]
fn a_bridge_that_dies_with_the_last_word_files_the_transcript_once() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.agent.user_said("Before the power cut.")?;
    call.goes_on()?;
    written(&world, &call.ringing.call_sid, &call.agent)?;
    world.bridge.kill();
    // The cut came in the middle of a line.
    let (path, text) = journal(&world)?;
    fs::write(&path, format!("{text}{{\"at\":\"2026-11-22T10:00:00.000Z\",\"event\":\"sa"))?;
    world.bridge.restart()?;
    call.ringing.call_status(&world, "completed")?;
    let wanted = ("User: Before the power cut.".to_owned(), "ProcessDied".to_owned());
    assert_eq!(filed(&world)?, wanted);
    world.bridge.wait_for_log("n8n has the transcript")?;
    wait_until("the note of the delivery", || {
        journal(&world)
            .is_ok_and(|(_, text)| text.contains("\n{\"at\"") && text.contains("\"delivered\""))
    });
    let seen = world.bridge.log().len();
    world.bridge.restart()?;
    // It offers what is left at once, and by the end of another call it would have done so.
    let call = connect(&world)?;
    call.agent.user_said("After it.")?;
    call.goes_on()?;
    call.phone.send_stop()?;
    world.bridge.wait_for_log_since(seen, "n8n has the transcript")?;
    let posts = world.n8n.requests_of("2");
    let texts: Vec<&Value> = posts.iter().map(|post| &post.json["data"]).collect();
    assert_eq!(texts, ["User: Before the power cut.", "User: After it."]);
    Ok(())
}

// ============================================================================
// 9. After
// ============================================================================

/// A call with one line of transcript, over and done.
#[track_caller]
fn a_short_call(world: &World) -> Result<Call, Trouble> {
    let call = connect(world)?;
    call.agent.user_said("Remember this.")?;
    call.goes_on()?;
    call.phone.send_stop()?;
    call.agent.wait_closed()?;
    Ok(call)
}

#[test]
fn a_transcript_that_n8n_does_not_take_stays_on_disk_and_is_tried_again() -> Outcome {
    let world = builder().start()?;
    world.n8n.reply_next("2", Reply::json(500, &json!({"message": "Error in workflow"})));
    a_short_call(&world)?;
    let warning = world.bridge.wait_for_log("the transcript stays in ")?;
    assert!(warning.contains("500") && warning.contains("next try in "), "{warning}");
    let (_, text) = journal(&world)?;
    assert!(text.contains("Remember this.") && !text.contains("\"delivered\""), "{text}");
    let posts = world.n8n.wait_for("2", 2, AGES)?;
    assert_eq!(posts.first().map(|post| &post.raw), posts.get(1).map(|post| &post.raw));
    let keys: BTreeSet<_> = posts.iter().map(|post| post.header("idempotency-key")).collect();
    assert_eq!(keys.len(), 1, "one thing, one key: {keys:?}");
    world.bridge.wait_for_log("n8n has the transcript")?;
    wait_until("the note of the delivery", || {
        journal(&world).is_ok_and(|(_, text)| text.contains("\"delivered\""))
    });
    Ok(())
}

/// An answer with this body, whatever else it says; `cut` leaves out the end.
fn raw(status: &str, headers: &str, body: &[u8], cut: usize) -> Reply {
    let head = format!(
        "HTTP/1.1 {status}\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n",
        body.len()
    );
    Reply::Raw([head.as_bytes(), &body[..body.len() - cut]].concat())
}

/// n8n has it. Offered again for what the answer looks like, it would come for three days.
#[test]
fn a_transcript_is_delivered_by_the_status_whatever_the_answer_holds() -> Outcome {
    let world = builder().start()?;
    let replies = [
        raw("200 OK", "", "x".repeat(100_000).as_bytes(), 0),
        raw("200 OK", "", b"{\"message\": \"it was cut off", 9),
        raw("200 OK", "Content-Encoding: gzip\r\n", b"\x1F\x8B\x08\0\xFF\xFE\0\0", 0),
        raw("201 Created", "Content-Type: text/plain; charset=iso-8859-1\r\n", b"Gr\xFC\xDFe", 0),
        Reply::Raw(b"HTTP/1.1 202 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".to_vec()),
        raw("299 Odd", "", b"", 0),
    ];
    for (index, reply) in replies.into_iter().enumerate() {
        world.n8n.reply_next("2", reply);
        let call = a_short_call(&world)?;
        wait_until("what came of it", || {
            let journal = world.journal(&call.ringing.call_sid);
            journal
                .iter()
                .any(|line| ["delivered", "undelivered"].iter().any(|it| line["event"] == *it))
        });
        let journal = world.journal(&call.ringing.call_sid);
        let is_delivered = journal.iter().any(|line| line["event"] == "delivered");
        assert!(is_delivered, "answer {index}: {journal:#?}");
        assert_eq!(world.n8n.requests_of("2").len(), index + 1, "answer {index}");
    }
    Ok(())
}

#[test]
fn a_transcript_that_n8n_did_not_take_is_delivered_after_a_restart() -> Outcome {
    let world = builder().start()?;
    world.n8n.set_reply("2", Reply::json(503, &json!({})));
    let call = a_short_call(&world)?;
    world.bridge.wait_for_log("the transcript stays in ")?;
    world.bridge.kill();
    world.n8n.set_reply("2", Reply::json(200, &json!({})));
    world.bridge.restart()?;
    let posts = world.n8n.wait_for("2", 2, PATIENCE)?;
    let wanted = json!({"route": "2", "number": CALLER, "data": "User: Remember this.",
        "callSid": call.ringing.call_sid, "endedBy": "CallerLeft"});
    let filed = &posts.last().ok_or("nothing was filed")?.json;
    for (name, value) in wanted.as_object().ok_or("no object")? {
        assert_eq!(&filed[name], value, "{name}");
    }
    Ok(())
}

#[test]
fn a_disk_that_takes_nothing_costs_one_complaint_and_no_transcript() -> Outcome {
    let world = builder().setting("DATA_DIR", "/dev/null/data").start()?;
    a_short_call(&world)?;
    assert_eq!(filed(&world)?.0, "User: Remember this.");
    world.bridge.wait_for_log("n8n has the transcript")?;
    let log = world.bridge.log();
    let complaints = log.iter().filter(|line| line.contains("calls go on")).count();
    assert_eq!(complaints, 1, "{log:#?}");
    Ok(())
}

// ============================================================================
// Settings and agent files
// ============================================================================

#[test]
fn all_that_is_missing_is_named_at_once() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let (status, text) = fails_to_start(&[], scratch.path())?;
    assert_eq!(status, Some(2), "{text}");
    assert!(text.contains("callbridge: 1 setting needs attention"), "{text}");
    assert!(text.contains("ULTRAVOX_API_KEY  is missing"), "{text}");
    Ok(())
}

#[test]
fn every_malformed_setting_is_named_and_no_secret_is_shown() -> Outcome {
    let scratch = tempfile::tempdir()?;
    fs::write(scratch.path().join(".env"), "N8N_HMAC_SECRET=hush hush hush\n")?;
    let settings = [
        ("ULTRAVOX_API_KEY", "top-secret-key"),
        ("PUBLIC_URL", "http://pbx.example"),
        ("N8N_WEBHOOK_URL", "n8n.example/webhook"),
        ("PORT", "eighty"),
        ("BIND", "localhost"),
        ("TWILIO_AUTH_TOKEN", "top-secret-token"),
        ("TWILIO_ACCOUNT_SID", "AC1"),
        ("TWILIO_PHONE_NUMBER", "030 901820"),
        ("KEEP_DAYS", "-1"),
        ("N8N_AUTH_HEADER", "top-secret-header"),
        ("FALLBACK_NUMBER", "a person"),
        ("MAX_CALLS", "0"),
        ("MAX_CALL_SECONDS", "9"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"),
        ("ULTRAVOX_API_URL", "ftp://api"),
        ("TWILIO_API_URL", "https://"),
    ];
    let (status, text) = fails_to_start(&settings, scratch.path())?;
    assert_eq!(status, Some(2), "{text}");
    let fine = ["ULTRAVOX_API_KEY", "TWILIO_AUTH_TOKEN"];
    for (name, _) in settings.iter().filter(|(name, _)| !fine.contains(name)) {
        assert!(text.lines().any(|line| line.trim_start().starts_with(name)), "{name}: {text}");
    }
    assert!(text.contains(".env "), "{text}");
    assert!(text.contains("must be https"), "{text}");
    for secret in ["top-secret", "hush"] {
        assert!(!text.contains(secret), "{text}");
    }
    Ok(())
}

#[test]
fn a_name_in_dot_env_that_is_nearly_one_of_ours_is_named_with_the_one_that_is_meant() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let lines = "API_TOKE=0123456789abcdef-top-secret\nN8N_WEBHOOK=https://n8n.example/\n\
        PUBLIC_URLS=https://other.example\nWEBHOOK_URL=https://n8n.example/\nN8N_PORT=5678\n\
        POSTGRES_PASSWORD=top-secret\n";
    fs::write(scratch.path().join(".env"), lines)?;
    let (status, text) = fails_to_start(&ENOUGH, scratch.path())?;
    assert_eq!(status, Some(2), "{text}");
    assert!(
        text.contains("2 settings need attention"),
        "what is another program's is fine: {text}"
    );
    for (name, meant) in [("API_TOKE", "API_TOKEN"), ("N8N_WEBHOOK", "N8N_WEBHOOK_URL")] {
        let wanted = format!(".env  has {name}, which is no setting ({meant} is meant)");
        assert!(text.lines().any(|line| line.trim() == wanted), "{wanted}: {text}");
    }
    assert!(!text.contains("top-secret"), "{text}");
    Ok(())
}

const ENOUGH: [(&str, &str); 4] = [
    ("ULTRAVOX_API_KEY", "key"),
    ("PUBLIC_URL", "https://bridge.example"),
    ("PORT", "0"),
    ("BIND", "127.0.0.1"),
];

#[test]
fn all_mistakes_in_the_agent_files_are_named_with_file_and_place() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let mut agent = own_agent()?;
    agent["first_stage"] = json!("order");
    agent["stages"]["order"]["tools"] = json!(["order_pizza", "fly", "bad name", "away"]);
    agent["stages"]["island"] = json!({"voice": "Eva", "prompt": "gone.md", "tools": []});
    agent["tools"]["bad name"] = json!({"description": "D", "reply": "R"});
    agent["tools"]["away"] =
        json!({"description": "D", "enter_stage": {"stage": "nowhere", "message": "Hi {who}."}});
    agent["tools"]["order_pizza"]["timeout_s"] = json!(600);
    agent["tools"]["order_pizza"]["parameters"]["required"] = json!(["size"]);
    agent["tools"]["order_pizza"]["parameters"]["properties"]["kind"]["type"] = json!("text");
    write_agent(scratch.path(), &agent)?;
    fs::write(scratch.path().join("order.md"), "Fine.\nDu bist {agentname}.\n")?;
    complains_about_the_agent(
        &scratch,
        &[
            "stages.order.tools names \"fly\"",
            "stages.island is entered by no tool",
            "gone.md",
            "tools.bad name must be named with",
            "tools.away enters \"nowhere\"",
            "tools.away uses {who}",
            "tools.order_pizza.timeout_s must be",
            "tools.order_pizza.parameters.required names \"size\"",
            "tools.order_pizza.parameters.properties.kind.type",
            "order.md:2  {agentname} is not known",
        ],
    )
}

/// A slip in one entry does not hide a slip in the next.
#[test]
fn every_entry_of_the_agent_file_that_cannot_be_read_is_named() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let mut agent = own_agent()?;
    agent["stages"]["typo"] = json!({"voise": "Eva", "prompt": "order.md", "tools": []});
    agent["tools"]["bye"] = json!({"description": "D", "hang_up": true, "reply": "both"});
    agent["tools"]["idle"] = json!({"description": "D"});
    agent["tools"]["order_pizza"]["timeout_s"] = json!("long");
    write_agent(scratch.path(), &agent)?;
    complains_about_the_agent(
        &scratch,
        &[
            "stages.typo unknown field `voise`",
            "tools.bye must do exactly one",
            "tools.idle must do exactly one",
            "tools.order_pizza.timeout_s invalid type",
        ],
    )
}

fn complains_about_the_agent(scratch: &TempDir, mistakes: &[&str]) -> Outcome {
    let directory = scratch.path().to_string_lossy().into_owned();
    let settings = [ENOUGH.as_slice(), &[("AGENT_DIR", directory.as_str())]].concat();
    let (status, text) = fails_to_start(&settings, scratch.path())?;
    assert_eq!(status, Some(2), "{text}");
    for mistake in mistakes {
        assert!(text.contains(mistake), "{mistake:?} is not named in:\n{text}");
    }
    Ok(())
}

#[test]
fn an_agent_directory_or_file_that_cannot_be_read_is_named() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let here = scratch.path().to_string_lossy().into_owned();
    let start = || {
        let settings = [ENOUGH.as_slice(), &[("AGENT_DIR", here.as_str())]].concat();
        fails_to_start(&settings, scratch.path())
    };
    let (status, text) = start()?;
    assert_eq!(status, Some(2), "{text}");
    assert!(text.contains("agent.json") && text.contains(&here), "{text}");
    fs::write(scratch.path().join("agent.json"), "{\n  \"agent_name\": \"Max\",\n  oops\n}")?;
    let (status, text) = start()?;
    assert_eq!(status, Some(2), "{text}");
    assert!(text.contains("agent.json") && text.contains("line 3"), "{text}");
    Ok(())
}

#[test]
fn a_start_that_fails_for_reasons_outside_says_which() -> Outcome {
    let world = builder().start()?;
    let scratch = tempfile::tempdir()?;
    let port = world.bridge.address().port().to_string();
    let mut settings = ENOUGH.to_vec();
    settings.retain(|(name, _)| *name != "PORT");
    settings.push(("PORT", &port));
    let (status, text) = fails_to_start(&settings, scratch.path())?;
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains(&format!("cannot listen on 127.0.0.1:{port}")), "{text}");
    assert!(text.contains("another program has the port") && text.contains("set PORT"), "{text}");

    fs::write(scratch.path().join("no.pem"), "nothing in it")?;
    for file in ["no.pem", "missing.pem"] {
        let settings = [ENOUGH.as_slice(), &[("SSL_CERT_FILE", file)]].concat();
        let (status, text) = fails_to_start(&settings, scratch.path())?;
        assert_eq!(status, Some(2), "{text}");
        assert!(text.contains("SSL_CERT_FILE") && text.contains(file), "{text}");
    }
    Ok(())
}

#[test]
fn a_command_nobody_knows_is_answered_with_those_there_are() -> Outcome {
    const DEMO_KNOWS: &str =
        if cfg!(feature = "demo") { "unknown option \"--loud\"" } else { "without the demo" };
    let scratch = tempfile::tempdir()?;
    let program = env!("CARGO_BIN_EXE_callbridge");
    for (arguments, status, wanted) in [
        (["dmeo"].as_slice(), 2, "callbridge check"),
        (&["demo", "--loud"], 2, DEMO_KNOWS),
        (&["help", "chek"], 2, "did you mean callbridge check?"),
    ] {
        let output = Command::new(program)
            .args(arguments)
            .env_clear()
            .current_dir(scratch.path())
            .output()?;
        let text = String::from_utf8(output.stderr)?;
        assert_eq!(output.status.code(), Some(status), "{text}");
        assert!(text.contains(wanted), "{text}");
        assert!(output.stdout.is_empty(), "a complaint is no output");
    }
    let help = |words: [&str; 2]| Command::new(program).args(words).env_clear().output();
    let (asked, one) = (help(["help", "check"])?, help(["check", "--help"])?);
    assert_eq!((asked.status.code(), &asked.stdout), (Some(0), &one.stdout));
    assert!(asked.stdout.starts_with(b"callbridge check"), "its own help");
    Ok(())
}

// ============================================================================
// The front door
// ============================================================================

/// Sends this, and reads what comes until the bridge closes.
fn says(world: &World, bytes: &[u8]) -> io::Result<String> {
    let mut socket = TcpStream::connect(world.bridge.address())?;
    socket.set_read_timeout(Some(AGES))?;
    socket.write_all(bytes)?;
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[test]
fn visitors_who_do_not_speak_http_are_told_so_and_nobody_notices() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    let hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS hello";
    let answer = says(&world, hello)?;
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("TLS"), "{answer}");
    for bytes in [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(),
        b"\x00\x01\x02\x03",
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/3\r\n\r\n",
    ] {
        let answer = says(&world, bytes)?;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{bytes:?}: {answer}");
    }
    world.bridge.wait_for_log("this is not HTTP/1.1")?;
    call.goes_on()?;
    Ok(())
}

#[test]
fn a_request_that_is_too_big_is_refused() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    let head = format!("GET /health HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "x".repeat(40_000));
    let answer = says(&world, head.as_bytes())?;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");

    // Larger than the limit, and far larger than all buffers on the way.
    for length in [66_000, 4_000_000] {
        let mut socket = TcpStream::connect(world.bridge.address())?;
        socket.set_read_timeout(Some(AGES))?;
        write!(
            socket,
            "POST /incoming-call HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
        )?;
        // The bridge may have answered and closed before all of it is sent.
        drop(socket.write_all(&vec![b'x'; length]));
        let mut answer = [0; 12];
        socket.read_exact(&mut answer).map_err(|error| format!("{length} bytes: {error}"))?;
        assert_eq!(String::from_utf8_lossy(&answer), "HTTP/1.1 413", "{length} bytes");
    }
    assert_eq!(world.ultravox.requests(), 1);
    call.goes_on()?;
    Ok(())
}

#[test]
fn three_hundred_idle_connections_do_not_keep_a_caller_out() -> Outcome {
    let world = builder().start()?;
    let mut idle = Vec::new();
    for _ in 0..300 {
        idle.push(TcpStream::connect(world.bridge.address())?);
    }
    let call = connect(&world)?;
    call.goes_on()?;
    drop(idle);
    call.goes_on()?;
    Ok(())
}

#[test]
fn two_hundred_connections_that_stay_open_are_all_answered() -> Outcome {
    let world = builder().start()?;
    let mut sockets = Vec::new();
    for _ in 0..200 {
        let mut socket = TcpStream::connect(world.bridge.address())?;
        socket.set_read_timeout(Some(AGES))?;
        socket.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n")?;
        sockets.push(socket);
    }
    for mut socket in sockets {
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("\r\n\r\nok"), "{answer}");
    }
    Ok(())
}

// ============================================================================
// Every wait has an end
// ============================================================================
//
// The limits are ten seconds and more, so all of these wait at the same time.

#[test]
fn a_bad_partner_does_not_hold_anybody_up_for_ever() -> Outcome {
    at_the_same_time(&[
        ("a stream that never says start", a_stream_never_says_start),
        ("a request's head that comes byte by byte", a_head_trickles),
        ("a request's body that never comes", a_body_never_comes),
        ("a connection that says nothing", a_connection_says_nothing),
        ("n8n and Ultravox that hang", n8n_and_ultravox_hang),
        ("an agent's socket that never answers", a_join_hangs),
        ("a caller who falls silent", a_caller_falls_silent),
        ("an agent who falls silent", an_agent_falls_silent),
        ("a caller who never ends", a_caller_never_ends),
        ("an agent who says goodbye and stays", an_agent_says_goodbye_and_stays),
    ])
}

#[track_caller]
fn wait_for_the_end_of(phone: &Phone) -> Result<Heard, Trouble> {
    let over = |heard: &Heard| matches!(heard, Heard::Closed(_) | Heard::Broken(_));
    phone.wait_until("its end", AGES, |heard| heard.iter().any(|one| over(&one.what)))?;
    phone.wait_closed()
}

fn an_agent_says_goodbye_and_stays() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.agent.invoke("hangUp", &json!({"reason": "done"}))?;
    let began = Instant::now();
    // It is not silent either: that would be noticed sooner.
    while call.agent.user_said("Hello?").is_ok() && !call.agent.is_over() {
        assert!(began.elapsed() < AGES, "it is listened to, and billed, for ever");
        thread::sleep(Duration::from_millis(200));
    }
    assert!(began.elapsed() > Duration::from_secs(15), "a long goodbye is no offence");
    assert_eq!(filed(&world)?.1, "AgentHungUp");
    Ok(())
}

fn a_stream_never_says_start() -> Outcome {
    let world = builder().start()?;
    let began = Instant::now();
    let stranger = world.open_socket()?;
    stranger.send_connected()?;
    assert_eq!(wait_for_the_end_of(&stranger)?, Heard::Closed(Some(1008)));
    assert!(began.elapsed() > Duration::from_secs(9), "Twilio may take a while");
    world.bridge.wait_for_log("no start within 10 s")?;
    Ok(())
}

fn a_head_trickles() -> Outcome {
    let world = builder().start()?;
    let mut socket = TcpStream::connect(world.bridge.address())?;
    // The pace is the point: a deadline for each read would never run out.
    socket.set_read_timeout(Some(Duration::from_millis(300)))?;
    let deadline = Instant::now() + AGES;
    let mut answer = [0; 12];
    loop {
        assert!(Instant::now() < deadline, "it is read from for ever");
        if socket.write_all(b"G").is_err() {
            return Err("it was cut without a word".into());
        }
        match socket.read_exact(&mut answer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => break other?,
        }
    }
    assert_eq!(String::from_utf8_lossy(&answer), "HTTP/1.1 408");
    Ok(())
}

fn a_body_never_comes() -> Outcome {
    let world = builder().start()?;
    let mut socket = TcpStream::connect(world.bridge.address())?;
    socket.set_read_timeout(Some(AGES))?;
    socket
        .write_all(b"POST /incoming-call HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nCall")?;
    // An answer or a cut, whichever; but an end.
    socket.read_to_end(&mut Vec::new())?;
    assert_eq!(world.ultravox.requests(), 0);
    Ok(())
}

fn a_connection_says_nothing() -> Outcome {
    let world = builder().start()?;
    let socket = TcpStream::connect(world.bridge.address())?;
    socket.set_read_timeout(Some(AGES))?;
    let mut answer = String::new();
    (&socket).read_to_string(&mut answer)?;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408 "), "{answer}");
    Ok(())
}

/// Twilio gives a webhook 15 s, and so does `World::ring`.
fn n8n_and_ultravox_hang() -> Outcome {
    let world = builder().start()?;
    world.n8n.set_reply("1", Reply::Hang);
    world.ultravox.refuse_always(&Reply::Hang);
    hears_only(&world.ring(CALLER)?, APOLOGY);
    assert_eq!(world.ultravox.requests(), 1);
    world.bridge.wait_for_log("Ultravox: no answer within ")?;
    Ok(())
}

fn a_join_hangs() -> Outcome {
    let world = builder().start()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    for scheme in ["ws", "wss"] {
        let url = format!("{scheme}://{}/join", listener.local_addr()?);
        world.ultravox.refuse_next(1, &Reply::json(201, &json!({"callId": "1", "joinUrl": url})));
        hears_only(&world.ring(CALLER)?, APOLOGY);
    }
    Ok(())
}

/// Answers pings as Ultravox does, until both lines have ended.
fn answer_pings_to_the_end(call: &Call) {
    let deadline = Instant::now() + AGES;
    let over = |heard: &demo::HeardAt| matches!(heard.what, Heard::Closed(_) | Heard::Broken(_));
    while !call.agent.is_over() || !call.phone.heard().iter().any(over) {
        assert!(Instant::now() < deadline, "the call goes on for ever");
        if !call.agent.is_over() {
            // The bridge may end the line just now.
            drop(call.agent.send(&json!({"type": "pong", "timestamp": 1})));
        }
        // The pace of the pongs; all that matters is that they are not too rare.
        thread::sleep(Duration::from_millis(500));
    }
}

/// Twilio sends a frame every 20 ms, silence included.
fn a_caller_falls_silent() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.agent.user_said("Are you there?")?;
    call.goes_on()?;
    answer_pings_to_the_end(&call);
    world.bridge.wait_for_log("the stream ended without a stop")?;
    assert_eq!(call.agent.wait_closed()?, Ending::Closed(Some(1000)));
    assert_eq!(filed(&world)?.1, "CallerLost");
    Ok(())
}

fn an_agent_falls_silent() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.agent.user_said("Are you there?")?;
    let _microphone = call.phone.keep_talking();
    let ending = wait_for_the_end_of(&call.phone)?;
    assert!(matches!(ending, Heard::Closed(Some(_))), "{ending:?}");
    let texts = call.agent.texts();
    assert!(texts.iter().any(|text| text["type"] == "ping"), "nobody asked it: {texts:?}");
    let answer = call.ringing.stream_ended(&world)?;
    assert_eq!(Twiml::read(&answer.text())?.said, [APOLOGY]);
    assert_eq!(filed(&world)?.1, "AgentLost");
    Ok(())
}

/// Neither side ever ends, and Ultravox forgets its own `maxDuration`.
fn a_caller_never_ends() -> Outcome {
    let world = builder().setting("MAX_CALL_SECONDS", 10).start()?;
    let call = connect(&world)?;
    call.agent.user_said("And another thing …")?;
    let _microphone = call.phone.keep_talking();
    answer_pings_to_the_end(&call);
    assert_eq!(filed(&world)?.1, "TooLong");
    let answer = call.ringing.stream_ended(&world)?;
    assert!(Twiml::read(&answer.text())?.hangs_up);
    Ok(())
}
