//! Work that outlives its own panics.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::sync::mpsc;

use crate::testing::DEADLINE;
use crate::toolbox::threads::{join, outlive, spawn_for_good};

#[test]
fn what_lasts_for_good_is_begun_again_after_a_panic_and_ends_by_itself() {
    let (begun, begins) = mpsc::channel();
    let mut times = 0;
    let thread = spawn_for_good("for good".into(), move || {
        times += 1;
        begun.send(times).unwrap();
        assert!(times > 1, "the first time");
    });
    for wanted in [1, 2] {
        assert_eq!(begins.recv_timeout(DEADLINE), Ok(wanted));
    }
    join(thread.unwrap());
    assert!(begins.recv().is_err(), "begun again, although it was over");
}

#[test]
fn whoever_outlives_a_panic_knows_of_it() {
    assert_eq!(outlive(|| 1), Some(1));
    assert_eq!(outlive(|| -> u8 { panic!("on purpose") }), None);
}
