//! The demo is tested too: its script must not call right what is wrong. Each test shows it a world
//! with one fault, and reads what it says.
//!
//! Where the fault is in what the bridge is told (agent files, n8n's answers), the bridge is told
//! so. Where the bridge itself would have to be broken, a [`Meddler`] stands in between and changes
//! what passes.

#[path = "../../src/demo/mod.rs"]
mod demo;
mod meddler;

use std::error::Error;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use tempfile::TempDir;

use demo::screen::Show;
use demo::script::play;
use demo::{PATIENCE, Reply, Twiml, World, WorldBuilder};
use meddler::{Edit, Edits, Meddler};

type Failed = Box<dyn Error + Send + Sync>;
type Outcome = Result<(), Failed>;

fn builder() -> WorldBuilder {
    World::builder(env!("CARGO_BIN_EXE_callbridge"))
}

/// What the demo would say about this world.
fn verdict(world: World) -> Result<(), String> {
    let mut show = Show::unseen();
    play(world, &mut show).map_err(|trouble| show.failure(&trouble))
}

/// A world in which something is wrong, and the words that say where and what.
type Case = (&'static str, fn() -> Result<World, Failed>);

/// Each call takes five seconds, most of them spent waiting for what is heard.
fn assert_each_is_noticed(cases: &[Case]) {
    let complaints: Vec<String> = thread::scope(|scope| {
        let playing: Vec<_> = cases
            .iter()
            .map(|(words, world)| {
                let verdict = scope.spawn(move || world().map(verdict));
                (words, verdict)
            })
            .collect();
        let said = playing.into_iter().filter_map(|(words, verdict)| match verdict.join() {
            Ok(Ok(Err(said))) if said.contains(words) => None,
            Ok(Ok(Err(said))) => Some(format!("not {words:?}, but: {said}")),
            Ok(Ok(Ok(()))) => Some(format!("nobody minds: {words:?}")),
            Ok(Err(error)) => Some(format!("{words:?}: {error}")),
            Err(_) => Some(format!("{words:?}: see the panic above")),
        });
        said.collect()
    });
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn nothing_is_minded_where_nothing_is_wrong() -> Outcome {
    // Behind somebody who passes everything on, so that what he changes is what is minded below.
    verdict(behind(Edits::default())?)?;
    Ok(())
}

// ============================================================================
// An agent that is another than the script thinks
// ============================================================================

/// The bridge with its own agent files, changed in one place.
fn with_agent(change: fn(&mut Value)) -> Result<World, Failed> {
    let files = concat!(env!("CARGO_MANIFEST_DIR"), "/src/agent");
    let home = TempDir::new()?;
    for entry in fs::read_dir(files)? {
        let entry = entry?;
        fs::copy(entry.path(), home.path().join(entry.file_name()))?;
    }
    let mut agent: Value = serde_json::from_str(include_str!("../../src/agent/agent.json"))?;
    change(&mut agent);
    fs::write(home.path().join("agent.json"), agent.to_string())?;
    // The bridge reads the files before it listens.
    Ok(builder().setting("AGENT_DIR", home.path().display()).start()?)
}

#[test]
fn another_agent_is_noticed() {
    assert_each_is_noticed(&[
        ("step 3 agent did not come out right: the first stage has another voice", || {
            with_agent(|agent| agent["stages"]["greeting"]["voice"] = json!("Sam"))
        }),
        ("the tool verify is not offered in this stage", || {
            with_agent(|agent| {
                agent["stages"]["greeting"]["tools"] = json!(["move_to_main_convo", "hangUp"]);
                agent["stages"]["call_summary"]["tools"] = json!(["verify", "hangUp"]);
            })
        }),
        ("step 7 act did not come out right: verify did not confirm Anna Berg", || {
            with_agent(|agent| agent["tools"]["verify"]["reply"] = json!("Nobody knows her."))
        }),
        ("step 7 act did not come out right: the second stage has another voice than Mark", || {
            with_agent(|agent| agent["stages"]["main_convo"]["voice"] = json!("Sam"))
        }),
        ("the tool schedule_meeting is not offered in this stage", || {
            with_agent(|agent| {
                let tools = json!(["move_to_call_summary", "hangUp"]);
                agent["stages"]["main_convo"]["tools"] = tools;
            })
        }),
        ("step 7 act did not come out right: the last stage is not Sara's", || {
            with_agent(|agent| agent["stages"]["call_summary"]["voice"] = json!("Mark"))
        }),
        ("step 8 goodbye did not come out right: hangUp was answered otherwise", || {
            with_agent(|agent| {
                let tool = &mut agent["tools"]["hangUp"];
                tool["reply"] = json!("Fine.");
                tool.as_object_mut().map(|tool| tool.remove("hang_up"));
            })
        }),
    ]);
}

// ============================================================================
// An n8n that says something else
// ============================================================================

#[test]
fn another_answer_of_n8n_is_noticed() {
    assert_each_is_noticed(&[
        ("step 3 agent did not come out right: the agent was not given n8n's greeting", || {
            let world = builder().start()?;
            world.n8n.set_reply("1", Reply::json(200, &json!({"firstMessage": "Hello."})));
            Ok(world)
        }),
        ("step 7 act did not come out right: the agent was not told n8n's answer", || {
            let world = builder().start()?;
            world.n8n.set_reply("3", Reply::json(200, &json!({"message": "Not booked."})));
            Ok(world)
        }),
    ]);
}

// ============================================================================
// A bridge that is broken
// ============================================================================

fn as_it_was(text: &str) -> Vec<String> {
    vec![text.to_owned()]
}

/// The meddler stands between Twilio and the bridge.
fn behind(edits: Edits) -> Result<World, Failed> {
    let world = builder().start()?;
    let meddler = Meddler::open(edits)?;
    meddler.leads_to(world.bridge.address().port());
    world.bridge.stand_behind(meddler.port);
    Ok(world)
}

fn to_twilio(edit: Edit) -> Result<World, Failed> {
    behind(Edits { back: Some(edit), ..Edits::default() })
}

/// The meddler stands between the bridge and n8n.
fn to_n8n(edit: Edit) -> Result<World, Failed> {
    let meddler = Meddler::open(Edits { there: Some(edit), ..Edits::default() })?;
    let url = format!("http://127.0.0.1:{}/webhook/call", meddler.port);
    let builder = builder().setting("N8N_WEBHOOK_URL", url).asleep();
    let world = builder.start()?;
    let own = world.n8n.url();
    let port = own.rsplit_once(':').and_then(|(_, rest)| rest.split('/').next()?.parse().ok());
    meddler.leads_to(port.ok_or("n8n has no port")?);
    world.bridge.restart()?;
    Ok(world)
}

/// The meddler stands between the bridge and the agent.
fn to_agent(edit: Edit) -> Result<World, Failed> {
    let world = builder().start()?;
    let meddler = Meddler::open(Edits { there: Some(edit), ..Edits::default() })?;
    meddler.leads_to(world.ultravox.join_at(meddler.port).ok_or("Ultravox has no port")?);
    Ok(world)
}

/// A message of sound with another first sample.
fn out_of_tune(text: &str) -> Vec<String> {
    let changed = || {
        let mut message: Value = serde_json::from_str(text).ok()?;
        let mut mulaw = BASE64.decode(message["media"]["payload"].as_str()?).ok()?;
        *mulaw.first_mut()? ^= 0x10;
        message["media"]["payload"] = json!(BASE64.encode(mulaw));
        Some(vec![message.to_string()])
    };
    changed().unwrap_or_else(|| as_it_was(text))
}

#[test]
fn a_bridge_that_does_wrong_at_the_phone_is_noticed() {
    assert_each_is_noticed(&[
        ("step 8 goodbye did not come out right: no mark followed the agent's last word", || {
            to_twilio(
                |text| if text.contains(r#""event":"mark""#) { vec![] } else { as_it_was(text) },
            )
        }),
        ("step 8 goodbye did not come out right: the line was cut", || {
            behind(Edits { close_code: Some(1011), ..Edits::default() })
        }),
        ("step 8 goodbye did not come out right: /stream-ended was not answered with", || {
            to_twilio(|text| vec![text.replace("<Hangup/>", "<Pause />")])
        }),
        ("step 6 talk did not come out right: the phone heard something else", || {
            to_twilio(out_of_tune)
        }),
        ("step 6 talk did not come out right: the agent heard something else", || {
            behind(Edits { there: Some(out_of_tune), ..Edits::default() })
        }),
        ("step 6 talk did not come out right: against the rules", || {
            to_twilio(|text| {
                let mut texts = as_it_was(text);
                if text.contains(r#""event":"clear""#) {
                    texts.insert(0, r#"{"event":"hello"}"#.to_owned());
                }
                texts
            })
        }),
    ]);
}

#[test]
fn a_bridge_that_does_wrong_elsewhere_is_noticed() {
    assert_each_is_noticed(&[
        ("step 2 greeting did not come out right: n8n was asked about another number", || {
            to_n8n(|text| vec![text.replace("+4930901820", "+4930901821")])
        }),
        ("step 7 act did not come out right: n8n got another booking", || {
            to_n8n(|text| vec![text.replace("anna.berg@example.com", "anna.borg@example.com")])
        }),
        ("step 9 after did not come out right: the transcript differs", || {
            to_n8n(|text| vec![text.replace("Thank you, Anna.", "Thank you, Emma.")])
        }),
        ("step 7 act did not come out right: no new stage was entered", || {
            to_agent(|text| vec![text.replace("new-stage", "old-stage")])
        }),
        ("step 7 act did not come out right: the new stage has no voice", || {
            to_agent(|text| vec![text.replace(r#"\"voice\":"#, r#"\"sound\":"#)])
        }),
        ("step 7 act did not come out right: the tool verify failed", || {
            to_agent(|text| {
                vec![text.replace(r#""result":"Confirmed"#, r#""errorType":"x","result":""#)]
            })
        }),
    ]);
}

// ============================================================================
// TwiML that Twilio would not take
// ============================================================================

#[test]
fn twiml_is_read_as_strictly_as_twilio_reads_it() -> Outcome {
    let good = "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Response><!-- so --><Say>A &amp; B \
        &#x2013; C</Say><Connect action=\"/over?a=1&amp;b=2\"><Stream \
        url=\"wss://b/media-stream/&quot;7&quot;\"/></Connect></Response>";
    let twiml = Twiml::read(good)?;
    assert_eq!(twiml.said, ["A & B \u{2013} C"]);
    assert_eq!(twiml.action.as_deref(), Some("/over?a=1&b=2"));
    assert_eq!(twiml.stream_path(), "/media-stream/\"7\"");
    assert_eq!(twiml.elements, ["Response", "Say", "Connect", "Stream"]);
    for bad in [
        "",
        "Hello",
        "<Say>Hello</Say>",
        "<Response><Say>Hello</Response>",
        "<Response><Say>Hello</Say>",
        "<Response/>more",
        "<Response/><Response/>",
        "<Response><Say>A & B</Say></Response>",
        "<Response><Say>A &nbsp; B</Say></Response>",
        "<Response><Say voice=Sara>Hello</Say></Response>",
        "<Response><Say voice=\"a<b\">Hello</Say></Response>",
        "<Response><Say>\u{7}</Say></Response>",
        "<!DOCTYPE Response [<!ENTITY a \"b\">]><Response><Say>&a;</Say></Response>",
        "<Response><Connect><Stream url=\"ws://b/m\"/></Connect></Response>",
        "<Response><Connect><Stream url=\"wss://b/m?token=1\"/></Connect></Response>",
    ] {
        assert!(Twiml::read(bad).is_err(), "{bad}");
    }
    Ok(())
}

// ============================================================================
// The page over a pretend world
// ============================================================================

/// What a person does who has read the two lines that it prints.
#[test]
fn the_page_opens_over_a_world_that_lives_until_ctrl_c() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let mut child = Command::new(env!("CARGO_BIN_EXE_callbridge"))
        .args(["demo", "--page"])
        .env("PORT", "0")
        .env("TMPDIR", scratch.path())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(child.stdout.take().ok_or("no stdout")?).lines();
    let mut line_with = |words: &str| -> Result<String, Failed> {
        for line in lines.by_ref() {
            let line = line?;
            if line.contains(words) {
                return Ok(line);
            }
        }
        Err(format!("it ended without {words:?}").into())
    };
    let line = line_with("http://localhost:")?;
    let port = line.split("localhost:").nth(1).and_then(|rest| rest.split('/').next());
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.unwrap_or_default().parse()?));
    line_with("calls, and books a meeting")?;

    let host = format!("localhost:{}", address.port());
    let page = ask(address, "/", &[("Host", &host)])?;
    assert!(page.starts_with("HTTP/1.1 200") && page.contains("<title>"), "{page}");
    let strangers: [&[(&str, &str)]; 3] = [
        &[("Host", "evil.example")],
        &[("Host", "localhost.evil.example:80")],
        &[("Host", &host), ("Origin", "https://evil.example")],
    ];
    for headers in strangers {
        let answer = ask(address, "/calls", headers)?;
        assert!(answer.starts_with("HTTP/1.1 403"), "{headers:?}: {answer}");
    }
    // The call that it has told of comes, and is seen.
    let deadline = Instant::now() + 3 * PATIENCE;
    loop {
        let calls = ask(address, "/calls", &[("Host", &host)])?;
        if calls.contains("\"number\":\"+4930901820\"") {
            break;
        }
        assert!(Instant::now() < deadline, "no call is on the page: {calls}");
        thread::sleep(Duration::from_millis(50));
    }

    let interrupt = Command::new("kill").arg("-INT").arg(child.id().to_string()).status()?;
    assert!(interrupt.success());
    assert_eq!(child.wait()?.code(), Some(0), "Ctrl-C is how it is meant to end");
    assert_eq!(fs::read_dir(scratch.path())?.count(), 0, "nothing is left behind");
    assert!(TcpStream::connect(address).is_err(), "nobody listens any more");
    Ok(())
}

fn ask(address: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Result<String, Failed> {
    let mut head = format!("GET {path} HTTP/1.1\r\n");
    for (name, value) in headers {
        head.extend([name, ": ", value, "\r\n"]);
    }
    let mut socket = TcpStream::connect(address)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.write_all(format!("{head}\r\n").as_bytes())?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    Ok(answer)
}
