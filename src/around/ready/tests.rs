//! What is known of Ultravox, and for how long.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::time::{Duration, Instant};

use crate::around::ready::{KNOWN_FOR, Readiness};
use crate::toolbox::threads::lock;

#[test]
fn an_old_answer_is_none() {
    let readiness = Readiness::default();
    assert!(!readiness.is_ready(), "nobody has been asked yet");
    readiness.learn(None);
    assert!(readiness.is_ready());
    let long_ago = KNOWN_FOR + Duration::from_secs(1);
    lock(&readiness.0).ready_at = Some(Instant::now().checked_sub(long_ago).unwrap());
    assert!(!readiness.is_ready());
    assert!(lock(&readiness.0).complaint.is_some(), "the log does not say why");
    readiness.learn(None);
    assert!(readiness.is_ready());
    readiness.learn(Some("no minutes left".into()));
    assert!(!readiness.is_ready());
}
