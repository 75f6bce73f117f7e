//! What whoever reads the log can do to calls, and strangers to the log. The log of these servers
//! goes into a real pipe of the test's, which is read when the test says so: nothing may wait for
//! it, what is lost is counted, and what a stranger can write into it is little.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::demo::{Heard, World, WorldBuilder, pcm_of, voice};
use crate::{CALLER, Call, Outcome, connect};

const PROGRAM: &str = env!("CARGO_BIN_EXE_callbridge");
const TOKEN: &str = "mosaic-lantern-27-owner";
const LONG_PATIENCE: Duration = Duration::from_mins(1);
/// `O_NONBLOCK` on Linux.
const NONBLOCK: i32 = 0o4000;
/// More than wait to be written, those included that the writer has taken.
const FLOOD: usize = 6_000;

/// A server whose log goes into a pipe. The world around it is one without a server of its own.
struct Piped {
    world: World,
    child: Child,
    pipe: File,
    log: String,
}

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

impl Piped {
    fn start(builder: WorldBuilder) -> Result<Piped> {
        let world = builder.asleep().start()?;
        let path = world.home().join("log");
        assert!(Command::new("mkfifo").arg(&path).status()?.success());
        // This end never waits; the server's does.
        let pipe = File::options().read(true).write(true).custom_flags(NONBLOCK).open(&path)?;
        let stderr = File::options().write(true).open(&path)?;
        let mut command = world.bridge.command_in(PROGRAM, &[]);
        command.env("PORT", "0").stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        let child = command.spawn()?;
        let mut piped = Piped { world, child, pipe, log: String::new() };
        let line = piped.read_until("listening on 127.0.0.1:")?;
        let port = line.rsplit(':').next().unwrap_or_default().trim().parse()?;
        piped.world.bridge.is_behind(port);
        Ok(piped)
    }

    /// From now on the log is read by nobody, and whoever writes to it would wait.
    fn ignore_log(&mut self) {
        while self.pipe.write(&[b' '; 4_096]).is_ok() {}
        // What is smaller than a page may still go in.
        while self.pipe.write(b" ").is_ok() {}
    }

    /// The first whole line that has this and has not been read before.
    fn read_until(&mut self, fragment: &str) -> Result<String> {
        let deadline = Instant::now() + LONG_PATIENCE;
        let mut seen = self.log.len();
        let mut piece = vec![0; 65_536];
        loop {
            let new = self.log.get(seen..).unwrap_or_default();
            if let Some((whole, _)) = new.rsplit_once('\n') {
                if let Some(line) = whole.lines().find(|line| line.contains(fragment)) {
                    return Ok(line.to_owned());
                }
                seen += whole.len() + 1;
            }
            assert!(Instant::now() < deadline, "no line has {fragment:?}: {:.2000}", self.log);
            match self.pipe.read(&mut piece) {
                Ok(count) => self.log.push_str(&String::from_utf8_lossy(&piece[..count])),
                // Nothing announces that there is more.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    thread::sleep(Duration::from_millis(5));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn signal(&self, name: &str) -> Outcome {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status()?.success());
        Ok(())
    }

    /// Comes back when the signal has been heard.
    fn ask_to_stop(&self) -> Outcome {
        self.signal("-TERM")?;
        let deadline = Instant::now() + LONG_PATIENCE;
        while self.world.ring(CALLER)?.twiml.stream_url.is_some() {
            assert!(Instant::now() < deadline, "calls are taken after SIGTERM");
        }
        Ok(())
    }

    fn wait_exit(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + LONG_PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err("the server did not end".into());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn lost(&self) -> Result<usize> {
        let page = metrics_of(&self.world)?;
        let mut lines = page.lines();
        let value = lines.find_map(|line| line.strip_prefix("callbridge_log_lines_dropped_total "));
        Ok(value.ok_or("there is no such metric")?.parse()?)
    }
}

impl Drop for Piped {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn metrics_of(world: &World) -> Result<String> {
    let authorization = format!("Bearer {TOKEN}");
    let headers = [("Authorization", authorization.as_str())];
    Ok(world.request("GET", "/metrics", &headers, &[])?.text())
}

/// Lines in the log, one for each of these events, which are new to the bridge. All of them have
/// been dealt with when this is over.
fn log_events(call: &Call, name: &str, count: usize) -> Outcome {
    for number in 0..count {
        call.phone.send_text(&json!({"event": format!("{name}-{number}")}).to_string())?;
    }
    let (said, _) = call.phone.said();
    let words = voice(9, 60);
    call.phone.speak(&words)?;
    call.agent.wait_caller_audio(2 * (said.len() + words.len()))?;
    Ok(())
}

fn builder() -> WorldBuilder {
    World::builder(PROGRAM).setting("API_TOKEN", TOKEN)
}

// --- A log that nobody reads ----------------------------------------------------------

/// A bystander's part of a conversation, in both directions.
struct Talk {
    call: Call,
    said: Vec<u8>,
    heard: Vec<u8>,
}

impl Talk {
    fn begin(world: &World) -> Result<Talk> {
        Ok(Talk { call: connect(world)?, said: Vec::new(), heard: Vec::new() })
    }

    /// Both say something, and every sample that was ever said has arrived.
    fn goes_on(&mut self, seed: u64) -> Outcome {
        let (up, down) = (voice(seed, 300), voice(seed + 100, 300));
        self.call.phone.speak(&up)?;
        self.call.agent.say("A few words.", &pcm_of(&down))?;
        self.said.extend(up);
        self.heard.extend(down);
        self.call.agent.expect_audio(&pcm_of(&self.said))?;
        self.call.phone.expect_audio(&self.heard)?;
        Ok(())
    }
}

#[test]
fn a_log_that_nobody_reads_stops_nothing() -> Outcome {
    let mut server = Piped::start(builder())?;
    let mut before = Talk::begin(&server.world)?;
    before.goes_on(1)?;
    server.ignore_log();
    before.goes_on(2)?;

    // Webhooks are answered, also the refused ones.
    let mut after = Talk::begin(&server.world)?;
    let signed_by_nobody = server.world.request("POST", "/call-status", &[], b"")?;
    assert_eq!(signed_by_nobody.status, 403);
    assert_eq!(server.world.get("/health")?.status, 200);
    after.goes_on(3)?;
    // A barge-in silences the agent, and not the call.
    after.call.agent.send(&json!({"type": "playback_clear_buffer"}))?;
    after.call.phone.wait_clear()?;
    after.goes_on(4)?;
    after.call.enter_main_stage()?;
    // With more lines than wait to be written, too.
    log_events(&after.call, "flood", FLOOD)?;
    after.said.extend(voice(9, 60));
    before.goes_on(5)?;
    after.goes_on(6)?;
    let clears = after.call.phone.heard();
    let clears = clears.iter().filter(|heard| matches!(heard.what, Heard::Clear)).count();
    assert_eq!(clears, 1);

    // A caller who leaves is filed, and a signal is heard.
    before.call.phone.hang_up()?;
    server.world.n8n.wait_for("2", 1, LONG_PATIENCE)?;
    server.ask_to_stop()?;
    after.goes_on(7)?;
    after.call.phone.hang_up()?;
    assert!(server.wait_exit()?.success());
    assert_eq!(server.world.n8n.requests_of("2").len(), 2);
    Ok(())
}

#[test]
fn lines_that_nobody_read_are_counted_and_the_log_says_how_many() -> Outcome {
    let mut server = Piped::start(builder())?;
    let call = connect(&server.world)?;
    assert_eq!(server.lost()?, 0);
    server.ignore_log();
    log_events(&call, "flood", FLOOD)?;
    let lost = server.lost()?;
    assert!((1..FLOOD).contains(&lost), "{lost}");
    let said = server.read_until("lines of this log are missing: nobody read it in time")?;
    assert!(said.contains(" warning: "), "{said}");
    // The same number, but for what was logged since it was asked for.
    let number = |line: &str| line.split("warning: ").nth(1)?.split(' ').next()?.parse().ok();
    let number: usize = number(&said).ok_or("no number")?;
    assert!(number >= lost, "{number} {lost}");
    assert_eq!(server.lost()?, number);
    // What was not lost is there, whole and in order, and the gap is where the word about it is.
    let flood: Vec<&str> = server.log.lines().filter(|line| line.contains("flood-")).collect();
    for (place, line) in flood.iter().enumerate() {
        let wanted = format!("Twilio sent \"flood-{place}\", which is new to us");
        assert!(line.ends_with(&wanted), "{place}: {line}");
    }
    assert!(flood.len() + number >= FLOOD, "{} {number}", flood.len());
    let missing = server.log.matches("lines of this log are missing").count();
    assert_eq!(missing, 1);
    // And it goes on.
    log_events(&call, "later", 3)?;
    server.read_until("\"later-2\", which is new to us")?;
    Ok(())
}

/// The pipe is full when the process is told to end at once, and it is read again only then.
#[test]
fn the_last_lines_of_an_orderly_stop_come_out() -> Outcome {
    let mut server = Piped::start(builder())?;
    let call = connect(&server.world)?;
    server.ignore_log();
    log_events(&call, "last", 1_000)?;
    server.ask_to_stop()?;
    server.signal("-INT")?;
    server.read_until("stopped: a second signal")?;
    assert!(server.wait_exit()?.success());
    assert_eq!(server.log.matches("which is new to us").count(), 1_000);
    assert!(!server.log.contains("are missing"), "nothing was lost");
    Ok(())
}

/// The reason for which a server does not start is its last word, behind what was logged.
#[test]
fn a_stop_that_is_none_is_explained() -> Outcome {
    let world = builder().start()?;
    let port = world.bridge.address().port().to_string();
    let output = world.bridge.run_with(&[], &[("PORT", Some(&port))])?;
    assert_eq!(output.status.code(), Some(1));
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(complaint.starts_with("callbridge: cannot listen on 127.0.0.1:"), "{complaint}");
    Ok(())
}

// --- A line -----------------------------------------------------------------------------

/// What others have sent may be quoted, but not for ever, and it steers nobody's terminal.
#[test]
fn a_line_is_one_line_and_has_an_end() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    let event = format!("+4930123456\n\u{1b}[2J\u{202e}{}", "long".repeat(2_000));
    call.phone.send_text(&json!({"event": event}).to_string())?;
    let line = world.bridge.wait_for_log("Twilio sent \"+49")?;
    assert!(line.contains("Twilio sent \"+49…3456  [2J longlong"), "{line:.200}");
    // The text, and what stands before each.
    assert!((1_000..1_100).contains(&line.chars().count()), "{}", line.chars().count());
    Ok(())
}

// --- What strangers cause -------------------------------------------------------------

/// Of most kinds. A stranger could send thousands a second.
const MANY: usize = 60;
/// Of the kind that has a text of its own each time.
const VARIED: usize = 1_200;
/// The same refusal is logged once in this time, and once more with a count.
const REPEATED_WITHIN_SECS: u64 = 5;
/// In that time: twenty texts, the counts of all of them, and that of those beyond.
const LINES_MAX: u64 = 41;

/// How often, what is sent, its reason in the metrics. The number makes it new each time.
type Nuisance = (usize, fn(usize) -> Vec<u8>, &'static str);

const NUISANCES: [Nuisance; 11] = [
    (MANY, |_| b"nonsense".to_vec(), "not_http"),
    (MANY, |_| b"\x16\x03\x01".to_vec(), "tls"),
    (MANY, |n| request("GET /", &format!("Content-Length: {n}x\r\n"), b""), "long_body"),
    (MANY, |n| request("GET /", &format!("Host: {n}\r\n"), b""), "not_http"),
    (MANY, |n| request("GET /", &format!("X: {n}{}\r\n", "x".repeat(17_000)), b""), "long_head"),
    (
        MANY,
        |n| request("POST /call-status", &format!("Content-Length: 9{n:06}\r\n"), b""),
        "long_body",
    ),
    (MANY, |n| posted(&format!("/call-status?{n}"), "a".repeat(70_000).as_bytes()), "long_body"),
    (MANY, |n| request(&format!("GET /incoming-call?{n}"), "", b""), "method"),
    (VARIED, |n| posted(&format!("/incoming-call?{n}-{}", "x".repeat(15_000)), b""), "signature"),
    (MANY, |n| request("GET /", &format!("Authorization: Bearer {n}\r\n"), b""), "api_token"),
    (MANY, upgrade, "stream_token"),
];

fn request(line: &str, headers: &str, behind: &[u8]) -> Vec<u8> {
    [format!("{line} HTTP/1.1\r\nHost: x\r\n{headers}\r\n").as_bytes(), behind].concat()
}

fn posted(path: &str, body: &[u8]) -> Vec<u8> {
    request(&format!("POST {path}"), &format!("Content-Length: {}\r\n", body.len()), body)
}

fn upgrade(number: usize) -> Vec<u8> {
    let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    request(&format!("GET /media-stream/{number}"), upgrade, b"")
}

/// How many refusals these lines speak of.
fn refusals_in(lines: &[String]) -> u64 {
    let count_of = |line: &String| {
        let text = line.split(" warning: ").nth(1)?;
        let more = text.strip_suffix(" more)").and_then(|text| text.rsplit_once('('));
        match text.split_once(" other refusals, see callbridge_refusals_total") {
            Some((others, _)) => others.parse().ok(),
            None => more.map_or(Some(1), |(_, count)| count.parse().ok()),
        }
    };
    lines.iter().filter_map(count_of).sum()
}

#[test]
fn strangers_cannot_fill_the_log() -> Outcome {
    let world = builder().setting("LOG_LEVEL", "info").start()?;
    let mut bystanders = Talk::begin(&world)?;
    let (seen, began) = (world.bridge.log().len(), Instant::now());
    let address = world.bridge.address();
    thread::scope(|scope| {
        let flood = NUISANCES.map(|(times, bytes, _)| {
            scope.spawn(move || {
                for number in 0..times {
                    let Ok(mut line) = TcpStream::connect(address) else { continue };
                    // It may be refused before all of it is sent; a reset is an end as well.
                    drop(line.write_all(&bytes(number)));
                    drop(line.shutdown(Shutdown::Write));
                    drop(line.read_to_end(&mut Vec::new()));
                }
            })
        });
        let mut rounds = 1..;
        while flood.iter().any(|thread| !thread.is_finished()) {
            bystanders.goes_on(rounds.next().unwrap_or_default())?;
        }
        Outcome::Ok(())
    })?;
    let page = metrics_of(&world)?;
    for (.., reason) in NUISANCES {
        let same = NUISANCES.iter().filter(|(.., other)| *other == reason);
        let times: usize = same.map(|(times, ..)| times).sum();
        let wanted = format!("callbridge_refusals_total{{reason=\"{reason}\"}} {times}");
        assert!(page.lines().any(|line| line == wanted), "{wanted}\n{page}");
    }
    // What was left out is said as well, after a while.
    let all = NUISANCES.iter().map(|(times, ..)| *times as u64).sum::<u64>();
    let deadline = Instant::now() + LONG_PATIENCE;
    let lines = loop {
        let lines = world.bridge.log().split_off(seen);
        if refusals_in(&lines) >= all {
            break lines;
        }
        assert!(Instant::now() < deadline, "{all} refusals, and in the log {lines:#?}");
        thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(refusals_in(&lines), all, "{lines:#?}");
    let most = LINES_MAX * (began.elapsed().as_secs() / REPEATED_WITHIN_SECS + 2);
    assert!(lines.len() as u64 <= most, "{} lines, at most {most}", lines.len());
    // Much of a line may be the stranger's own.
    let longest = lines.iter().map(|line| line.chars().count()).max().unwrap_or_default();
    assert!(longest < 400, "{longest}");
    Ok(())
}
