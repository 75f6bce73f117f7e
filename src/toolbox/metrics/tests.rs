#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::series::{FRAME_BOUNDS_US, Histogram, WAIT_BOUNDS_US, sample};
use super::{ALL, ENDS, Family, REASONS, exposition};
use crate::records::ended_by::EndedBy;

#[test]
fn every_way_a_call_can_end_is_in_the_metrics() {
    assert_eq!(EndedBy::ALL.map(|how| format!("{how:?}")), ENDS);
}

#[test]
fn every_reason_to_turn_somebody_away_is_in_the_metrics() {
    let mut source = String::new();
    let mut directories = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(directory) = directories.pop() {
        for path in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") && !path.ends_with("tests.rs")
            {
                source += &fs::read_to_string(path).unwrap();
            }
        }
    }
    for call in ["refused(\"", "refuse(\"", "log_refusal(\""] {
        for after in source.split(call).skip(1) {
            let reason = after.split('"').next().unwrap();
            assert!(REASONS.contains(&reason), "{reason} is not in REASONS");
        }
    }
    for reason in REASONS {
        let uses = source.matches(&format!("\"{reason}\"")).count();
        assert!(uses > 1, "nobody is turned away for {reason}");
    }
}

#[test]
fn what_the_table_knows_is_there_before_it_happens() {
    let page = exposition();
    assert_eq!(page.matches("# TYPE ").count(), ALL.len());
    for series in [
        "callbridge_refusals_total{reason=\"media_format\"} ",
        "callbridge_n8n_requests_total{route=\"2\",outcome=\"late\"} ",
        "callbridge_tool_invocations_total{tool=\"unknown\",outcome=\"no such tool\"} ",
        "callbridge_dead_air_seconds_count ",
    ] {
        assert_eq!(page.matches(series).count(), 1, "{series}");
    }
    // Only the agent's files know the tools.
    assert!(!page.contains("callbridge_tool_seconds_count"));
}

#[test]
fn series_differ_in_the_values_of_their_labels() {
    let family = Family::counters("name", "Help.", &[("route", &["1"])]);
    family.of(&["1"]).add();
    family.of(&["1"]).add();
    assert_eq!((family.of(&["1"]).value(), family.of(&["2"]).value()), (2, 0));
}

#[test]
fn a_histogram_puts_each_time_where_it_belongs() {
    let histogram = Histogram::of_frames();
    for us in [0, 10, 11, 100_000, 100_001, 3_000_000] {
        histogram.observe(Duration::from_micros(us));
    }
    let counts: Vec<u64> = histogram.counts.iter().map(super::Counter::value).collect();
    assert_eq!(counts, [2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2]);
    assert_eq!(histogram.sum_ns.load(Ordering::Relaxed), 3_200_022_000);
    assert!(FRAME_BOUNDS_US.is_sorted() && WAIT_BOUNDS_US.is_sorted());
}

#[test]
fn odd_characters_in_a_label_do_not_end_it() {
    let mut page = String::new();
    sample(&mut page, "name", &[("route", "a\"b\\c\nd}"), ("outcome", "ü")], 1);
    assert_eq!(page, "name{route=\"a\\\"b\\\\c\\nd}\",outcome=\"ü\"} 1\n");
}
