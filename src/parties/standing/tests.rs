use jiff::{SignedDuration, Timestamp};

use crate::parties::standing::{Standing, Trouble};

#[test]
fn since_when_counts_from_the_change_and_not_from_the_latest_news() {
    let mut standing = Standing::default();
    let start = Timestamp::UNIX_EPOCH;
    let at = |second: i64| start + SignedDuration::from_secs(second);
    let trouble = |why: &str, is_plain| Some(Trouble { why: why.into(), is_plain });
    standing.note(None, at(1));
    standing.note(None, at(2));
    assert_eq!((standing.since, standing.last), (Some(at(1)), Some(at(2))));
    standing.note(trouble("500", false), at(3));
    standing.note(trouble("502", false), at(4));
    assert_eq!((standing.since, standing.last), (Some(at(3)), Some(at(4))));
    assert_eq!(standing.trouble.map(|trouble| trouble.why).as_deref(), Some("502"));
}

#[test]
fn a_look_that_goes_well_clears_only_what_a_look_has_found() {
    let mut standing = Standing::default();
    let at = Timestamp::UNIX_EPOCH;
    let trouble = |why: &str, is_plain| Some(Trouble { why: why.into(), is_plain });
    standing.note_look(trouble("connection refused", true), at);
    standing.note_look(None, at);
    assert!(standing.trouble.is_none());
    standing.note(trouble("the workflow failed", false), at);
    standing.note_look(None, at);
    assert!(standing.trouble.is_some(), "it answers, and its workflow fails all the same");
    standing.note(None, at);
    assert!(standing.trouble.is_none());
}
