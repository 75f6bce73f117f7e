//! The index tells the same as the directory, whoever has changed that, and reads little of it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use tempfile::tempdir;

use crate::records::ended_by::EndedBy;
use crate::records::event::{Direction, Event};
use crate::records::index::Index;
use crate::records::journal::Journals;
use crate::testing::{DEADLINE, JOURNAL};

fn ring(sid: &str) -> Event {
    let (call_sid, number) = (sid.into(), "+4930123456".into());
    Event::Ring { call_sid, number, direction: Direction::In, to: String::new() }
}

fn names(journals: &Journals) -> Vec<String> {
    let past = journals.past(|_| false);
    past.calls.iter().map(|call| super::sid_of(&call.path).to_owned()).collect()
}

/// What we do ourselves in one tick with others is seen a minute later.
fn settled(journals: &Journals) {
    let deadline = Instant::now() + DEADLINE;
    let calls = journals.find("CA1").unwrap();
    let changed = || super::time_of(calls.parent().unwrap()).unwrap().elapsed().unwrap();
    while changed() < super::TICK {
        assert!(Instant::now() < deadline);
        names(journals);
    }
}

#[test]
fn what_this_process_and_others_do_is_in_the_list() {
    let scratch = tempdir().unwrap();
    let calls = scratch.path().join("calls");
    fs::create_dir_all(&calls).unwrap();
    let stranger = |name: &str| fs::write(calls.join(name), JOURNAL).unwrap();
    stranger("20200101T000000Z-CA1.jsonl");
    let journals = Journals::new(scratch.path());
    assert_eq!(names(&journals), ["CA1"]);
    let ours = journals.begin("CA3");
    ours.note(&ring("CA3"));
    assert_eq!(names(&journals), ["CA3", "CA1"], "at once");
    assert_eq!(journals.find("CA3").as_deref(), Some(ours.path()));
    assert_eq!(journals.find("A3"), None);

    settled(&journals);
    stranger("20210101T000000Z-CA2.jsonl");
    assert_eq!(names(&journals), ["CA3", "CA2", "CA1"]);
    fs::remove_file(calls.join("20200101T000000Z-CA1.jsonl")).unwrap();
    assert_eq!(names(&journals), ["CA3", "CA2"], "in the same tick, perhaps");

    let past = journals.past(|name| super::sid_in(name) == "CA3");
    assert_eq!((past.calls.len(), past.is_complete), (1, true));
}

#[test]
fn a_brief_is_kept_until_a_line_is_added_by_whomever() {
    let scratch = tempdir().unwrap();
    let journals = Journals::new(scratch.path());
    let ours = journals.begin("CA1");
    ours.note(&ring("CA1"));
    let brief = |path: &Path| {
        journals.settle();
        journals.brief(path)
    };
    assert_eq!(names(&journals), ["CA1"]);
    assert_eq!(
        (brief(ours.path()).past.ended_by, brief(ours.path()).past.delivered),
        (None, false)
    );
    ours.note(&Event::End { ended_by: EndedBy::CallerLeft });
    assert_eq!(brief(ours.path()).past.ended_by, Some(EndedBy::CallerLeft));
    ours.note(&Event::Delivered);
    assert!(brief(ours.path()).past.delivered);

    let path = scratch.path().join("calls/20200101T000000Z-CA0.jsonl");
    fs::write(&path, JOURNAL).unwrap();
    names(&journals);
    assert_eq!((brief(&path).lines, brief(&path).past.delivered), (2, false));
    fs::write(&path, format!("{JOURNAL}{}\n", r#"{"event":"delivered"}"#)).unwrap();
    assert!(brief(&path).past.delivered);
    // Nothing comes after that, so the file is not even looked at.
    fs::write(&path, "").unwrap();
    assert_eq!(brief(&path).lines, 2);
    assert_eq!(journals.brief(&scratch.path().join("calls/nothing.jsonl")).lines, 0);
}

/// The page asks every second.
#[test]
fn a_directory_in_which_nothing_happens_is_read_once() {
    let scratch = tempdir().unwrap();
    let calls = scratch.path().join("calls");
    fs::create_dir_all(&calls).unwrap();
    for number in 0..3 {
        fs::write(calls.join(format!("2020010{number}T000000Z-CA{number}.jsonl")), JOURNAL)
            .unwrap();
    }
    let index = Index::default();
    let deadline = Instant::now() + DEADLINE;
    let listed = loop {
        assert_eq!(index.past(scratch.path(), |_| false).calls.len(), 3);
        assert!(Instant::now() < deadline);
        // It has changed just now, and is read until that is certainly over.
        if let Some((listed, Some(_))) = super::lock(&index.0).listed {
            break listed;
        }
    };
    for _ in 0..9 {
        assert_eq!(index.past(scratch.path(), |_| false).calls.len(), 3);
        assert!(index.find(scratch.path(), "CA1").is_some());
    }
    let made = calls.join("20210101T000000Z-CA9.jsonl");
    index.make(&made, || fs::write(&made, JOURNAL)).unwrap();
    assert_eq!(index.past(scratch.path(), |_| false).calls.len(), 4);
    assert_eq!(super::lock(&index.0).listed.unwrap().0, listed, "not once more");
    assert!(listed.elapsed() < Duration::from_mins(1), "or it would have been");
}
