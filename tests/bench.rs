//! The benchmark is tested too: that it counts right, that it notices what it is there to notice,
//! and that the server loses nothing and leaves nothing behind. Few calls, few seconds, and not a
//! word about how long anything took: that depends on the machine.

#![cfg(feature = "demo")]

#[path = "../src/demo/mod.rs"]
mod demo;

use std::error::Error;
use std::process::{Command, Output};

use serde_json::Value;

use demo::bench::figures::Figures;
use demo::bench::{Fault, Plan, measure};

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

const PROGRAM: &str = env!("CARGO_BIN_EXE_callbridge");

fn plan(calls: usize, tls: bool) -> Plan {
    Plan {
        program: PROGRAM.into(),
        calls,
        seconds: 1,
        tls,
        churn: false,
        json: false,
        // The others are listened to in the other way.
        timed: calls.div_ceil(2),
        fault: None,
    }
}

/// `script` (util-linux) pretends to be a terminal; `tests/check.rs` sees to it that CI has it.
#[test]
fn a_terminal_shows_that_it_is_still_measuring() -> Outcome {
    if Command::new("script").arg("--version").output().is_err() {
        return Ok(());
    }
    let demo = format!("{PROGRAM} demo --calls 1 --seconds 3 --churn");
    let output = Command::new("script").args(["-qec", &demo, "/dev/null"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("measuring: 2 s of about 5 s"), "{text}");
    Ok(())
}

#[test]
fn every_frame_of_every_call_arrives_as_it_was_sent() -> Outcome {
    for tls in [true, false] {
        let report = measure(&plan(5, tls))?;
        report.verdict()?;
        assert_nothing_amiss(&report.bridge);
        let Figures { rest, standing, webhook, first_audio, clear, start, filed, .. } =
            &report.bridge;
        assert_eq!(webhook.count, 5, "webhooks");
        assert_eq!(first_audio.count, 5, "first sounds");
        assert!(clear.count > 0, "nobody barged in");
        assert!(start.count > 0, "no start was timed");
        assert_eq!(*filed, 5, "transcripts");
        assert!(standing.threads >= rest.threads + 2 * 5, "{rest:?}, then {standing:?}");
        assert!(standing.descriptors >= rest.descriptors + 2 * 5, "{rest:?}, then {standing:?}");
        assert!(!report.bridge.cpu.is_zero(), "a server that takes no time");

        let [before, after] = report.floors.as_slice() else {
            return Err("the floor was not measured twice".into());
        };
        for floor in [before, after] {
            assert_nothing_amiss(floor);
            assert!(!floor.cpu.is_zero(), "a floor that takes no time");
            // Two threads and two sockets a call, and nothing else.
            assert_eq!(floor.standing.threads, floor.rest.threads + 2 * 5);
            assert_eq!(floor.standing.descriptors, floor.rest.descriptors + 2 * 5);
        }
    }
    Ok(())
}

fn assert_nothing_amiss(figures: &Figures) {
    assert_eq!(figures.troubles, Vec::<String>::new());
    for way in &figures.ways {
        assert_eq!((way.lost, way.damaged, way.out_of_order), (0, 0, 0), "{way:?}");
        // A second's frames count, and some are sent before and behind it.
        assert!(way.delay.count > 0 && way.delay.count < way.sent, "{way:?}");
    }
}

#[test]
fn what_happens_to_the_sound_is_noticed_and_named() -> Outcome {
    for (fault, words) in
        [(Fault::Damage, "damaged"), (Fault::Lose, "frames lost"), (Fault::Swap, "out of order")]
    {
        let report = measure(&Plan { fault: Some(fault), seconds: 2, ..plan(2, true) })?;
        let [up, down] = &report.bridge.ways;
        let counts = [up.damaged, up.lost, up.out_of_order];
        for (count, counted) in counts.iter().zip([Fault::Damage, Fault::Lose, Fault::Swap]) {
            assert_eq!(*count > 0, counted == fault, "{fault:?}: {up:?}");
        }
        assert_eq!((down.lost, down.damaged, down.out_of_order), (0, 0, 0), "{down:?}");
        let Err(verdict) = report.verdict() else {
            return Err(format!("nobody minds {fault:?}").into());
        };
        assert!(verdict.contains("to the agent") && verdict.contains(words), "{verdict}");
        assert!(!verdict.contains("to the caller"), "{verdict}");
        // The floor is left alone: it would measure the fault.
        report.floors.iter().for_each(assert_nothing_amiss);
    }
    Ok(())
}

#[test]
fn calls_that_come_and_go_leave_nothing_behind() -> Outcome {
    let report = measure(&Plan { churn: true, seconds: 5, ..plan(4, true) })?;
    report.verdict()?;
    assert_nothing_amiss(&report.bridge);
    let churn = report.churn.as_ref().ok_or("no word on churn")?;
    assert!(churn.calls > 4, "no call was replaced: {churn:?}");
    assert_eq!(report.bridge.filed, churn.calls, "transcripts");
    assert_eq!(churn.after.threads, churn.before.threads, "{churn:?}");
    assert_eq!(churn.after.descriptors, churn.before.descriptors, "{churn:?}");
    assert_eq!(report.json()["churn"]["descriptorsLeft"], 0);
    assert!(report.text().contains("4 calls at once"), "{}", report.text());
    Ok(())
}

#[test]
fn the_report_is_a_table_for_people_and_json_for_programs() -> Outcome {
    let output = demo(&["--calls", "2", "--seconds", "1", "--json", "--plain"])?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout)?;
    for (pointer, wanted) in [
        ("/calls", 2),
        ("/seconds", 1),
        ("/bridge/up/lost", 0),
        ("/bridge/down/damaged", 0),
        ("/bridge/webhook/count", 2),
        ("/bridge/transcripts", 2),
    ] {
        assert_eq!(report.pointer(pointer), Some(&Value::from(wanted)), "{pointer}: {report:#}");
    }
    assert_eq!(report["tls"], false);
    assert_eq!(report["verdict"], Value::Null);
    for pointer in [
        "/bridge/up/delay/p50",
        "/bridge/down/delay/p999",
        "/bridge/cpuMsPerCallSecond",
        "/bridge/callsPerCore",
        "/bridge/memoryKib/rest",
        "/bridge/memoryKib/perCall",
        "/bridge/threadsPerCall",
        "/bridge/descriptorsPerCall",
        "/bridge/firstAudio/p99",
        "/bridge/clear/p99",
        "/bridge/start/p50",
        "/bridge/worldLate/p99",
        "/bridge/machine/others",
        "/floorBefore/cpuMsPerCallSecond",
        "/floorAfter/up/delay/p50",
        "/ratio/cpu",
        "/ratio/delayUp",
    ] {
        let figure = report.pointer(pointer).and_then(Value::as_f64);
        assert!(figure.is_some_and(|figure| figure >= 0.0), "{pointer}: {report:#}");
    }

    let table = measure(&plan(1, false))?.text();
    for row in ["lost", "delay p99.9, us", "CPU ms per call-second", "memory per call", "webhook"] {
        assert!(table.contains(row), "no {row} in:\n{table}");
    }
    assert!(!table.lines().any(|line| line.len() > 100), "a line too long in:\n{table}");
    Ok(())
}

#[test]
fn what_cannot_be_measured_is_said_in_words() -> Outcome {
    for (arguments, words) in [
        (["--calls"].as_slice(), "--calls wants a number from 1 to 10000"),
        (&["--calls", "0"], "--calls wants a number from 1 to 10000"),
        (&["--calls", "many"], "--calls wants a number from 1 to 10000"),
        (&["--calls", "1", "--seconds", "-1"], "--seconds wants a number"),
        (&["--seconds", "5"], "how many calls?"),
        (&["--calls", "1", "--loud"], "callbridge demo: unknown option \"--loud\" (see"),
        (&["--call", "1"], "unknown option \"--call\" (did you mean --calls?)"),
    ] {
        let output = demo(arguments)?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {complaint}");
        assert!(complaint.contains(words), "{arguments:?}: {complaint}");
        assert!(complaint.contains("--help"), "{arguments:?}: {complaint}");
    }

    let script = format!("ulimit -n 256; exec '{PROGRAM}' demo --calls 100");
    let output = Command::new("sh").args(["-c", &script]).output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(complaint.contains("256") && complaint.contains("ulimit -n 600"), "{complaint}");
    Ok(())
}

fn demo(arguments: &[&str]) -> Result<Output, Box<dyn Error + Send + Sync>> {
    Ok(Command::new(PROGRAM).arg("demo").args(arguments).output()?)
}
