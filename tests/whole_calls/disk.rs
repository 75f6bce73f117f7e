//! What a disk can do to calls, and two processes to one directory: calls go on, nothing is lost,
//! and nothing is filed twice. Faults are injected through real files: a limit on their size stands
//! for a full disk, a pipe that nobody reads for one that hangs.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::demo::{PATIENCE, Reply, World, WorldBuilder, pcm_of, voice};
use crate::{CALLER, Call, Outcome, connect};

/// For what takes a while by itself, such as another look at what another process had.
const LONG_PATIENCE: Duration = Duration::from_mins(1);
/// A caller who gets no answer by then has noticed.
const UNNOTICED: Duration = Duration::from_secs(3);
/// `O_NONBLOCK` on Linux.
const NONBLOCK: i32 = 0o4000;

fn builder() -> WorldBuilder {
    World::builder(env!("CARGO_BIN_EXE_callbridge"))
}

/// Comes back once it is so.
#[track_caller]
fn wait_until(world: &World, what: &str, is_so: impl Fn() -> bool) -> Outcome {
    let deadline = Instant::now() + LONG_PATIENCE;
    while !is_so() {
        if Instant::now() > deadline {
            return Err(world.trouble(format!("waited in vain: {what}")).into());
        }
        // Nothing announces that a file has grown.
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn has_event(world: &World, sid: &str, name: &str) -> bool {
    world.journal(sid).iter().any(|event| event["event"] == name)
}

fn has_words(world: &World, sid: &str, words: &str) -> bool {
    world.journal(sid).iter().any(|event| event["text"] == words)
}

/// What n8n got: which call, its words, how it ended.
fn filed(world: &World, count: usize) -> Result<Vec<(String, String, String)>, crate::Trouble> {
    let posts = world.n8n.wait_for("2", count, LONG_PATIENCE)?;
    let field = |post: &Value, name: &str| post[name].as_str().unwrap_or_default().to_owned();
    let three =
        |post: &Value| (field(post, "callSid"), field(post, "data"), field(post, "endedBy"));
    Ok(posts.iter().map(|post| three(&post.json)).collect())
}

#[track_caller]
fn talk(world: &World) -> Result<Call, Box<dyn std::error::Error + Send + Sync>> {
    let call = connect(world)?;
    call.agent.user_said("My window is broken.")?;
    let sid = &call.ringing.call_sid;
    wait_until(world, "the first words", || has_words(world, sid, "My window is broken."))?;
    Ok(call)
}

// --- A disk that is full --------------------------------------------------------------

/// The disk is full until the test says otherwise: no file grows beyond one KiB.
fn on_a_full_disk(scratch: &TempDir) -> std::io::Result<WorldBuilder> {
    let script = scratch.path().join("callbridge");
    let program = env!("CARGO_BIN_EXE_callbridge");
    // The soft limit only, so that it can be lifted again.
    let text = format!("#!/bin/sh\ntrap '' XFSZ\nulimit -Sf 2\nexec '{program}' \"$@\"\n");
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(World::builder(script))
}

fn make_room(world: &World) -> Outcome {
    set_room(world, "unlimited")
}

fn set_room(world: &World, bytes: &str) -> Outcome {
    let pid = world.bridge.pid().ok_or("the bridge does not run")?;
    let limit = format!("--fsize={bytes}:unlimited");
    let set = Command::new("prlimit").args(["--pid", &pid.to_string(), &limit]).status()?;
    assert!(set.success());
    Ok(())
}

/// Once a line would be noise, and once for ever would hide the second night.
#[test]
fn each_time_the_disk_is_full_it_is_said_and_so_is_each_recovery() -> Outcome {
    let scratch = tempdir()?;
    let world = on_a_full_disk(&scratch)?.start()?;
    make_room(&world)?;
    let call = connect(&world)?;
    let sid = call.ringing.call_sid.clone();
    for round in 0..2 {
        let seen = world.bridge.log().len();
        set_room(&world, "64")?;
        call.agent.user_said(&format!("Sentence {round}."))?;
        world.bridge.wait_for_log_since(seen, "calls go on, transcripts wait in memory only")?;
        make_room(&world)?;
        world.bridge.wait_for_log_since(seen, "journals are written again")?;
        wait_until(&world, "the words", || has_words(&world, &sid, &format!("Sentence {round}.")))?;
    }
    Ok(())
}

#[test]
fn what_was_said_while_the_disk_was_full_is_written_when_there_is_room() -> Outcome {
    let scratch = tempdir()?;
    let world = on_a_full_disk(&scratch)?.start()?;
    let call = connect(&world)?;
    let sid = call.ringing.call_sid.clone();
    let sentences: Vec<String> =
        (0..20).map(|round| format!("Sentence {round}, longer than the disk is large.")).collect();
    for sentence in &sentences {
        call.agent.user_said(sentence)?;
    }
    world.bridge.wait_for_log("calls go on, transcripts wait in memory only")?;
    // When this is through, the bridge has dealt with all that the agent has sent before.
    call.act("are_you_there", &json!({}))?;
    make_room(&world)?;
    wait_until(&world, "what was said before", || has_words(&world, &sid, &sentences[19]))?;
    // The next process finds everything, once, and in order.
    world.bridge.restart()?;
    let events = world.journal(&sid);
    let texts = events.iter().filter(|event| event["event"] == "said").map(|said| &said["text"]);
    assert_eq!(texts.collect::<Vec<_>>(), sentences.iter().collect::<Vec<_>>());
    call.ringing.call_status(&world, "completed")?;
    let wanted: Vec<String> = sentences.iter().map(|one| format!("User: {one}")).collect();
    assert_eq!(filed(&world, 1)?, [(sid, wanted.join("\n"), "ProcessDied".to_owned())]);
    Ok(())
}

#[test]
fn a_call_that_ended_on_a_full_disk_is_written_down_as_well() -> Outcome {
    let scratch = tempdir()?;
    let world = on_a_full_disk(&scratch)?.start()?;
    let call = connect(&world)?;
    let sid = call.ringing.call_sid.clone();
    for round in 0..20 {
        call.agent.user_said(&format!("Sentence {round}, longer than the disk is large."))?;
    }
    call.phone.hang_up()?;
    filed(&world, 1)?;
    make_room(&world)?;
    wait_until(&world, "the last line", || has_event(&world, &sid, "delivered"))?;
    let events = world.journal(&sid);
    assert_eq!(events.iter().filter(|event| event["event"] == "said").count(), 20);
    Ok(())
}

// --- A disk that hangs ----------------------------------------------------------------

/// Pipes under all names that the journal of this call may get soon, as full as they can be: who
/// writes to one waits until the test reads.
struct Hanging(Vec<(PathBuf, File)>);

impl Hanging {
    fn journal_of(world: &World, sid: &str) -> std::io::Result<Hanging> {
        let calls = world.data_dir().join("calls");
        fs::create_dir_all(&calls)?;
        let now = jiff::Timestamp::now();
        let pipe = |second: i64| {
            let at = now + jiff::SignedDuration::from_secs(second);
            let path = calls.join(format!("{}-{sid}.jsonl", at.strftime("%Y%m%dT%H%M%SZ")));
            assert!(Command::new("mkfifo").arg(&path).status()?.success());
            let mut options = File::options();
            let mut file = options.read(true).write(true).custom_flags(NONBLOCK).open(&path)?;
            while file.write(&[b' '; 4_096]).is_ok() {}
            // What is smaller than a page may still go in.
            while file.write(b" ").is_ok() {}
            Ok((path, file))
        };
        Ok(Hanging((0..15).map(pipe).collect::<std::io::Result<_>>()?))
    }

    /// The disk is back. Gives all that was written until a line has this.
    fn read_until(
        mut self,
        fragment: &str,
    ) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
        let deadline = Instant::now() + LONG_PATIENCE;
        let (mut all, mut piece) = (Vec::new(), vec![0; 65_536]);
        while Instant::now() < deadline {
            for (_, pipe) in &mut self.0 {
                match pipe.read(&mut piece) {
                    Ok(count) => all.extend_from_slice(&piece[..count]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error.into()),
                }
            }
            let text = String::from_utf8_lossy(&all);
            if text.contains(fragment) {
                return Ok(text.trim_start().to_owned());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Err(format!("{fragment} was never written").into())
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        for (path, _) in &self.0 {
            // Nobody is to wait for it any more.
            drop(fs::remove_file(path));
        }
    }
}

/// A caller is heard and hears within this time.
#[track_caller]
fn both_are_heard(call: &Call, speaker: u64) -> Outcome {
    let words = voice(speaker, 200);
    let began = Instant::now();
    call.agent.say(&format!("Voice {speaker}."), &pcm_of(&words))?;
    call.phone.wait_audio(words.len())?;
    call.phone.speak(&words)?;
    call.agent.wait_caller_audio(words.len())?;
    assert!(began.elapsed() < UNNOTICED, "it took {:?}", began.elapsed());
    Ok(())
}

#[test]
fn nobody_notices_a_disk_that_hangs() -> Outcome {
    const HANGS: &str = "CA0000000000000000000000000000d15c";
    let world = builder().start()?;
    let before = talk(&world)?;
    let pipes = Hanging::journal_of(&world, HANGS)?;
    let began = Instant::now();
    let ringing = world.ring_with(CALLER, &[("CallSid", HANGS)])?;
    assert!(began.elapsed() < UNNOTICED, "the webhook took {:?}", began.elapsed());
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(&world)?;
    let hanging = Call { ringing, agent, phone };
    // The disk hangs for everybody: for those who were there, and for those who come.
    let after = connect(&world)?;
    for (speaker, call) in [&before, &hanging, &after].into_iter().enumerate() {
        call.agent.user_said("Can you hear me?")?;
        both_are_heard(call, speaker as u64 + 1)?;
    }
    world.bridge.wait_for_log("the disk has taken nothing for")?;
    assert_eq!(world.get("/health")?.status, 200);
    before.phone.hang_up()?;
    assert_eq!(filed(&world, 1)?[0].2, "CallerLeft", "n8n does not wait for the disk either");

    let text = pipes.read_until("Can you hear me?")?;
    let first: Value = serde_json::from_str(text.lines().next().unwrap_or_default())?;
    assert_eq!((&first["event"], &first["version"]), (&json!("ring"), &json!(1)));
    let (sid, question) = (&after.ringing.call_sid, "Can you hear me?");
    wait_until(&world, "the other's words", || has_words(&world, sid, question))?;
    Ok(())
}

#[test]
fn a_signal_does_not_wait_for_a_disk_that_hangs() -> Outcome {
    const HANGS: &str = "CA0000000000000000000000000000d15d";
    let world = builder().start()?;
    // It reads what is there when it starts, and that is not what this is about.
    world.bridge.wait_for_log("journals of calls that are not filed, read")?;
    let pipes = Hanging::journal_of(&world, HANGS)?;
    let ringing = world.ring_with(CALLER, &[("CallSid", HANGS)])?;
    let _agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(&world)?;
    world.bridge.ask_to_stop()?;
    world.bridge.wait_for_log("told to stop")?;
    phone.hang_up()?;
    assert!(world.bridge.wait_exit(LONG_PATIENCE)?.success());
    drop(pipes);
    Ok(())
}

// --- An orderly stop ------------------------------------------------------------------

#[test]
fn an_orderly_stop_writes_everything() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    world.bridge.ask_to_stop()?;
    world.bridge.wait_for_log("told to stop")?;
    call.agent.user_said("One last word.")?;
    call.phone.hang_up()?;
    assert!(world.bridge.wait_exit(LONG_PATIENCE)?.success());
    let events = world.journal(&call.ringing.call_sid);
    let last: Vec<_> = events.iter().rev().take(3).map(|event| &event["event"]).collect();
    assert_eq!(last[0], "delivered", "{events:?}");
    assert_eq!(events[0]["version"], 1);
    assert!(events.iter().skip(1).all(|event| event.get("version").is_none()));
    Ok(())
}

// --- Two processes, one directory -----------------------------------------------------

/// As if all in it had happened so much earlier. The file stays the same one.
fn age_journal(world: &World, sid: &str, secs: i64) -> Outcome {
    let path = world.journals().into_iter().find(|path| path.to_string_lossy().contains(sid));
    let path = path.ok_or("no journal")?;
    let mut text = String::new();
    for mut event in world.journal(sid) {
        let at: jiff::Timestamp = event["at"].as_str().unwrap_or_default().parse()?;
        let earlier = at - jiff::SignedDuration::from_secs(secs);
        event["at"] = json!(earlier.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string());
        text += &(event.to_string() + "\n");
    }
    fs::write(path, text)?;
    Ok(())
}

/// A second process on the first one's directory. It has a world of its own around it.
fn beside(first: &World) -> Result<World, crate::Trouble> {
    let second = builder().setting("DATA_DIR", first.data_dir().display()).start()?;
    second.bridge.wait_for_log("journals of calls that are not filed, read")?;
    Ok(second)
}

#[test]
fn a_second_process_leaves_a_live_call_alone() -> Outcome {
    let first = builder().start()?;
    let call = talk(&first)?;
    let sid = call.ringing.call_sid.clone();
    // Nothing was said for so long that a call without a process would be filed at once.
    age_journal(&first, &sid, 120)?;
    // There is something to do for the second process, so that one can see it at work.
    let left = "CA00000000000000000000000000001eff";
    let old = [
        json!({"event": "ring", "callSid": left, "number": CALLER}),
        json!({"event": "said", "agent": 1, "ordinal": 0, "speaker": "User", "text": "Hello?"}),
        json!({"event": "end", "endedBy": "CallerLeft"}),
    ];
    let name = format!("calls/29990101T000000Z-{left}.jsonl");
    let now = jiff::Timestamp::now().to_string();
    let lines = old.map(|mut event| {
        event["at"] = json!(now);
        format!("{event}\n")
    });
    fs::write(first.data_dir().join(name), lines.concat())?;
    let second = beside(&first)?;
    let post = ("User: Hello?".to_owned(), "CallerLeft".to_owned());
    assert_eq!(filed(&second, 1)?, [(left.to_owned(), post.0, post.1)]);

    let listed = first.bridge.run(&["outbox"])?;
    assert_eq!(String::from_utf8_lossy(&listed.stdout), "0 transcripts wait for n8n\n");
    call.agent.user_said("And it rains.")?;
    wait_until(&first, "the words", || has_words(&first, &sid, "And it rains."))?;
    call.phone.hang_up()?;
    let words = "User: My window is broken.\nUser: And it rains.";
    let wanted = (sid.clone(), words.to_owned(), "CallerLeft".to_owned());
    assert_eq!(filed(&first, 1)?, [wanted]);
    wait_until(&first, "the end", || has_event(&first, &sid, "delivered"))?;
    assert_eq!(second.n8n.requests_of("2").len(), 1, "filed twice");
    Ok(())
}

#[test]
fn what_a_process_leaves_is_found_by_the_one_beside_it() -> Outcome {
    let first = builder().start()?;
    let (again, gone) = (talk(&first)?, talk(&first)?);
    let second = beside(&first)?;
    first.bridge.kill();
    // One caller is still there: Twilio asks the second process what comes next.
    let ringing = again.ringing.next(&second, &[])?;
    let agent = second.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(&second)?;
    second.bridge.wait_for_log("the call is taken up from its journal")?;
    agent.user_said("There you are.")?;
    let sid = again.ringing.call_sid.clone();
    wait_until(&first, "the words", || has_words(&first, &sid, "There you are."))?;
    phone.hang_up()?;
    let taken_up = filed(&second, 1)?;
    let words = "User: My window is broken.\nUser: There you are.";
    assert_eq!(taken_up, [(sid, words.to_owned(), "CallerLeft".to_owned())]);
    // The other one has left.
    gone.ringing.call_status(&second, "completed")?;
    let all = filed(&second, 2)?;
    let words = "User: My window is broken.".to_owned();
    assert_eq!(all[1], (gone.ringing.call_sid.clone(), words, "ProcessDied".to_owned()));
    Ok(())
}

#[test]
fn an_old_process_drains_beside_a_new_one() -> Outcome {
    let old = builder().setting("FALLBACK_NUMBER", "+4930555666").start()?;
    let (leaves, transferred) = (talk(&old)?, talk(&old)?);
    let new = builder()
        .setting("DATA_DIR", old.data_dir().display())
        .setting("FALLBACK_NUMBER", "+4930555666");
    let new = new.start()?;
    new.bridge.wait_for_log("journals of calls that are not filed, read")?;
    old.bridge.ask_to_stop()?;
    old.bridge.wait_for_log("told to stop")?;

    // One ends as ever, but n8n does not take it from the old process.
    old.n8n.set_reply("2", Reply::json(503, &json!({})));
    leaves.phone.hang_up()?;
    old.bridge.wait_for_log("next try in")?;
    // The line of the other one breaks, and the old process ends with it.
    transferred.phone.hang_up()?;
    assert!(old.bridge.wait_exit(LONG_PATIENCE)?.success());
    let mut found = filed(&new, 2)?;
    found.sort();
    let words = "User: My window is broken.";
    let post =
        |call: &Call| (call.ringing.call_sid.clone(), words.to_owned(), "CallerLeft".to_owned());
    let mut wanted = vec![post(&leaves), post(&transferred)];
    wanted.sort();
    assert_eq!(found, wanted);
    Ok(())
}

// --- The wrong directory --------------------------------------------------------------

#[test]
fn an_outbox_that_is_not_there_is_an_error() -> Outcome {
    let world = builder().start()?;
    for retry in [&["outbox"][..], &["outbox", "--retry"]] {
        let output = world.bridge.run_with(retry, &[("DATA_DIR", Some("elsewhere"))])?;
        assert_eq!(output.status.code(), Some(1));
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        let missing = world.home().join("elsewhere");
        assert!(complaint.contains(&*missing.to_string_lossy()), "{complaint}");
        assert!(complaint.contains("it is made with the first call"), "{complaint}");
        assert!(output.stdout.is_empty());
    }
    Ok(())
}
