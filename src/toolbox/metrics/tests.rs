//! What is counted, and under which names.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::toolbox::metrics::{Counter, FRAME_BOUNDS_US, Histogram, REFUSALS, WAIT_BOUNDS_US};

/// The main file and all rooms, without their tests.
fn bridge_source(directory: &Path) -> String {
    let mut source = String::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        if ["tests", "testing", "check", "demo", "bench"].contains(&name) {
            continue;
        }
        if path.is_dir() {
            source += &bridge_source(&path);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            source += &fs::read_to_string(&path).unwrap();
        }
    }
    source
}

#[test]
fn every_reason_to_turn_somebody_away_is_in_the_metrics() {
    let source = bridge_source(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    for call in ["refused(\"", "refuse(\""] {
        for after in source.split(call).skip(1) {
            let reason = after.split('"').next().unwrap();
            assert!(REFUSALS.contains(&reason), "{reason} is not in REFUSALS");
        }
    }
    for reason in REFUSALS {
        let uses = source.matches(&format!("\"{reason}\"")).count();
        assert!(uses > 1, "nobody is turned away for {reason}");
    }
}

#[test]
fn a_histogram_puts_each_time_where_it_belongs() {
    let histogram = Histogram::of_frames();
    for us in [0, 10, 11, 100_000, 100_001, 3_000_000] {
        histogram.observe(Duration::from_micros(us));
    }
    let counts: Vec<u64> = histogram.counts.iter().map(Counter::value).collect();
    assert_eq!(counts, [2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2]);
    assert_eq!(histogram.sum_ns.load(Ordering::Relaxed), 3_200_022_000);
    assert!(FRAME_BOUNDS_US.is_sorted() && WAIT_BOUNDS_US.is_sorted());
}
