//! The verbs beside the server, as somebody types them: help, slips, the first files, and a number that
//! is to be forgotten.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::demo::{PATIENCE, Reply, Trouble, World, pcm_of, voice};
use crate::{CALLER, Call, Outcome, connect};

const PROGRAM: &str = env!("CARGO_BIN_EXE_callbridge");
const TOKEN: &str = "mosaic-lantern-27-owner";

/// In that directory, without a setting and without a terminal.
fn run(words: &[&str], place: &Path) -> std::io::Result<Output> {
    let mut command = Command::new(PROGRAM);
    command.args(words).env_clear().current_dir(place).stdin(Stdio::null()).output()
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat()
}

#[test]
fn every_verb_explains_itself_and_does_nothing_else() -> Outcome {
    let scratch = tempfile::tempdir()?;
    for verb in ["check", "demo", "diagram", "forget", "init", "outbox", "workflow"] {
        for help in ["--help", "-h"] {
            let output = run(&[verb, help], scratch.path())?;
            let text = said(&output);
            assert_eq!(output.status.code(), Some(0), "{verb}: {text}");
            assert!(text.starts_with(&format!("callbridge {verb}: ")), "{verb}: {text}");
            assert!(text.contains(&format!("usage: callbridge {verb}")), "{verb}: {text}");
        }
        let slip = run(&[verb, "--hlp"], scratch.path())?;
        assert_eq!(slip.status.code(), Some(2), "{verb}: {}", said(&slip));
        assert!(said(&slip).contains("--hlp"), "{verb}: {}", said(&slip));
    }
    assert_eq!(fs::read_dir(scratch.path())?.count(), 0, "nothing was written");
    Ok(())
}

#[test]
fn a_slip_is_told_what_was_probably_meant() -> Outcome {
    let scratch = tempfile::tempdir()?;
    for (words, wanted) in [
        (["chekc"].as_slice(), "what is \"chekc\"? (did you mean callbridge check?)"),
        (&["outbx", "--retry"], "what is \"outbx --retry\"? (did you mean callbridge outbox?)"),
        (&["--hepl"], "(did you mean callbridge --help?)"),
        (&["outbox", "--retyr"], "unknown option \"--retyr\" (did you mean --retry?)"),
        (&["outbox", "now"], "unknown option \"now\"\n"),
        (&["diagram", "--plan"], "(did you mean --plain?)"),
        (&["serve"], "what is \"serve\"?\n\n"),
    ] {
        let output = run(words, scratch.path())?;
        assert_eq!(output.status.code(), Some(2), "{words:?}");
        assert!(said(&output).contains(wanted), "{words:?}: {}", said(&output));
        assert!(said(&output).contains("usage: callbridge"), "{words:?}: {}", said(&output));
    }
    Ok(())
}

/// The files of `init` are enough to start with, once the key is there.
#[test]
fn who_has_nothing_gets_files_that_work() -> Outcome {
    let world = World::builder(PROGRAM).without("PUBLIC_URL").without("AGENT_DIR").start()?;
    let scratch = tempfile::tempdir()?;
    let first = run(&["init", "--yes"], scratch.path())?;
    let text = said(&first);
    assert_eq!(first.status.code(), Some(0), "{text}");
    for wanted in
        [".env ", "my-agent/ ", "1. put your key after ULTRAVOX_API_KEY=", "localhost:8000"]
    {
        assert!(text.contains(wanted), "{wanted:?} is missing: {text}");
    }
    let env = scratch.path().join(".env");
    assert_eq!(fs::metadata(&env)?.permissions().mode() & 0o777, 0o600);
    let settings = fs::read_to_string(&env)?;

    let again = run(&["init"], scratch.path())?;
    assert_eq!(again.status.code(), Some(0), "{}", said(&again));
    assert_eq!(said(&again).matches("is there already").count(), 2, "{}", said(&again));
    assert_eq!(fs::read_to_string(&env)?, settings, "nothing was overwritten");

    // The server, as it is started there.
    fs::copy(&env, world.home().join(".env"))?;
    fs::create_dir(world.home().join("my-agent"))?;
    for name in ["agent.json", "shop.md"] {
        let from = scratch.path().join("my-agent").join(name);
        fs::copy(from, world.home().join("my-agent").join(name))?;
    }
    let seen = world.bridge.log().len();
    world.bridge.restart()?;
    let line = world.bridge.wait_for_log_since(seen, "agent Robin of Two Wheels")?;
    assert!(line.contains("1 stage"), "{line}");
    Ok(())
}

/// `script` (util-linux) pretends to be a terminal; `tests/check.rs` sees to it that CI has it.
#[test]
fn at_a_terminal_the_key_is_asked_for() -> Outcome {
    if Command::new("script").arg("--version").output().is_err() {
        return Ok(());
    }
    let scratch = tempfile::tempdir()?;
    let mut child = Command::new("script")
        .args(["-qec", &format!("{PROGRAM} init"), "/dev/null"])
        .current_dir(scratch.path())
        .env_remove("ULTRAVOX_API_KEY")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut input = child.stdin.take().ok_or("no stdin")?;
    input.write_all(b"no key$at all\nAb12cd34.key-1\n")?;
    let mut text = String::new();
    child.stdout.take().ok_or("no stdout")?.read_to_string(&mut text)?;
    assert!(child.wait()?.success(), "{text}");
    drop(input);
    assert!(text.contains("Ultravox API key (from app.ultravox.ai"), "{text}");
    assert!(text.contains("Once more"), "{text}");
    assert!(!text.contains("put your key"), "{text}");
    let settings = fs::read_to_string(scratch.path().join(".env"))?;
    assert!(settings.contains("\nULTRAVOX_API_KEY=Ab12cd34.key-1\n"), "{settings}");
    Ok(())
}

/// A call in which something was said, as far as its end.
fn talk(world: &World) -> Result<Call, Trouble> {
    let call = connect(world)?;
    call.agent.say("Hello Anna.", &pcm_of(&voice(1, 60)))?;
    call.agent.user_said("My secret is safe here.")?;
    Ok(call)
}

fn end(world: &World, call: &Call, filed: usize) -> Result<(), Trouble> {
    call.ringing.call_status(world, "completed")?;
    world.n8n.wait_for("2", filed, PATIENCE).map(drop)
}

/// `forget`, once the server has let go of that call's journal: some moments after n8n was asked.
fn forget(
    world: &World,
    words: &[&str],
    settings: &[(&str, Option<&str>)],
    call: &Call,
) -> Result<(Option<i32>, String), Trouble> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let output = world.bridge.run_with(&[&["forget"], words].concat(), settings)?;
        let text = said(&output);
        let lines = text.lines().filter(|line| line.contains(&call.ringing.call_sid));
        if !lines.clone().any(|line| line.contains("in use by a running callbridge")) {
            return Ok((output.status.code(), text));
        }
        if Instant::now() > deadline {
            return Err(world.trouble(format!("the server has it still: {text}")));
        }
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_number_is_forgotten_here_and_at_ultravox() -> Outcome {
    let world = World::builder(PROGRAM).start()?;
    let first = talk(&world)?;
    end(&world, &first, 1)?;
    let other = world.ring("+4930555666")?;
    let of_other = world.ultravox.next_call(PATIENCE)?;
    other.call_status(&world, "completed")?;
    // One goes on.
    let live = talk(&world)?;
    world.bridge.wait_for_log("nothing was said")?;

    let unasked = world.bridge.run(&["forget", CALLER])?;
    assert_eq!(unasked.status.code(), Some(2), "{}", said(&unasked));
    assert!(said(&unasked).contains("add --yes"), "{}", said(&unasked));
    assert!(world.ultravox.deleted().is_empty(), "nobody has said yes");

    world.bridge.wait_for_log("n8n has the transcript")?;
    let (status, text) = forget(&world, &["+49 (30) 90-1820", "--yes"], &[], &first)?;
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains(&format!("{}  deleted", first.ringing.call_sid)), "{text}");
    assert!(text.contains("2 calls of +4930901820"), "{text}");
    assert!(text.contains("in use by a running callbridge: left alone"), "{text}");
    assert_eq!(world.ultravox.deleted(), [first.agent.id().to_owned()]);
    assert!(!world.ultravox.deleted().contains(&of_other.id().to_owned()));
    let names: Vec<String> =
        world.journals().iter().map(|path| path.to_string_lossy().into_owned()).collect();
    assert!(!names.iter().any(|name| name.contains(&first.ringing.call_sid)), "{names:?}");
    assert!(names.iter().any(|name| name.contains(&other.call_sid)), "{names:?}");
    assert!(!world.journal(&live.ringing.call_sid).is_empty(), "{names:?}");

    let seen = world.bridge.log().len();
    end(&world, &live, 2)?;
    world.bridge.wait_for_log_since(seen, "n8n has the transcript")?;
    let (_, again) = forget(&world, &[CALLER, "--yes"], &[], &live)?;
    assert!(again.contains("1 call of +4930901820"), "{again}");
    assert!(again.contains(&format!("{}  deleted", live.ringing.call_sid)), "{again}");
    let nothing = world.bridge.run(&["forget", CALLER, "--yes"])?;
    assert_eq!(nothing.status.code(), Some(0));
    assert_eq!(said(&nothing), "0 calls of +4930901820\n");
    let what = world.bridge.run(&["forget", "Anna"])?;
    assert_eq!(what.status.code(), Some(2), "{}", said(&what));
    Ok(())
}

/// A running server remembers it, and must neither deliver it nor write it down again.
#[test]
fn what_n8n_has_not_got_goes_only_if_that_is_wanted() -> Outcome {
    let world = World::builder(PROGRAM).setting("API_TOKEN", TOKEN).start()?;
    let failed = Reply::json(500, &json!({"message": "Error in workflow"}));
    world.n8n.set_reply("2", failed);
    let call = talk(&world)?;
    end(&world, &call, 1)?;
    world.bridge.wait_for_log("next try in")?;
    let sid = &call.ringing.call_sid;

    let (status, kept) = forget(&world, &[CALLER, "--yes"], &[], &call)?;
    assert_eq!(status, Some(0), "{kept}");
    assert!(kept.contains("n8n has not got it yet (--even-undelivered)"), "{kept}");
    assert!(world.journal(sid).len() > 3, "it is still there");
    assert!(world.ultravox.deleted().is_empty());

    let (status, text) = forget(&world, &[CALLER, "--yes", "--even-undelivered"], &[], &call)?;
    assert_eq!(status, Some(0), "{text}");
    assert_eq!(world.ultravox.deleted(), [call.agent.id().to_owned()]);
    world.n8n.set_reply("2", Reply::json(200, &json!({})));
    // The server looks at it again, and then knows of nothing that waits.
    let deadline = Instant::now() + 3 * PATIENCE;
    let waits = || -> Result<bool, Trouble> {
        let authorization = format!("Bearer {TOKEN}");
        let headers = [("Authorization", authorization.as_str())];
        let metrics = world.request("GET", "/metrics", &headers, &[])?;
        Ok(!metrics.text().contains("\ncallbridge_outbox_transcripts 0\n"))
    };
    while waits()? {
        assert!(Instant::now() < deadline, "the server still waits for n8n");
        // Nothing announces that it has looked.
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(world.n8n.requests_of("2").len(), 1, "it was not delivered after all");
    let left: String = world.journals().iter().map(fs::read_to_string).collect::<Result<_, _>>()?;
    assert!(!left.contains("secret") && !left.contains(CALLER), "{left}");
    let authorization = format!("Bearer {TOKEN}");
    let headers = [("Authorization", authorization.as_str())];
    let list = world.request("GET", "/calls", &headers, &[])?.json();
    assert_eq!(list["past"], json!([]), "it is no call any more");
    assert_eq!(list["health"]["today"]["failed"], 0, "{list}");
    // Also when nobody remembers it but that line.
    world.bridge.restart()?;
    let late = call.ringing.next(&world, &[])?;
    assert_eq!(late.twiml.elements, ["Response", "Hangup"], "{}", late.twiml.xml);
    Ok(())
}

#[test]
fn what_ultravox_does_not_delete_stays_here_too() -> Outcome {
    let world = World::builder(PROGRAM).start()?;
    let call = talk(&world)?;
    end(&world, &call, 1)?;
    let wrong_key = [("ULTRAVOX_API_KEY", Some("Another0.key"))];
    world.bridge.wait_for_log("n8n has the transcript")?;
    let (status, text) = forget(&world, &[CALLER, "--yes"], &wrong_key, &call)?;
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("not deleted: Ultravox: "), "{text}");
    assert!(text.contains("403 (check ULTRAVOX_API_KEY)"), "{text}");
    assert!(!world.journal(&call.ringing.call_sid).is_empty());
    Ok(())
}
