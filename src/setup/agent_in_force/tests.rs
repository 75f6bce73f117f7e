//! One looks at the files at a time.

use crate::setup::agent_in_force::{AgentInForce, Looking};
use crate::testing::{built_in_agent, full_settings};
use crate::toolbox::threads::lock;

#[test]
fn whoever_is_done_does_not_speak_for_the_next() {
    let config = full_settings();
    let agent: &'static AgentInForce = Box::leak(Box::new(AgentInForce::of(built_in_agent())));
    let begin = || {
        lock(&agent.latest).is_looking = true;
        Looking { agent, is_over: false }
    };
    let is_looking = || lock(&agent.latest).is_looking;
    let mut first = begin();
    assert!(!first.once_more(&config), "nobody has asked");
    assert!(!is_looking());
    let next = begin();
    drop(first);
    assert!(is_looking(), "two may read the files at once");
    // One that ends by a fault is not waited for.
    drop(next);
    assert!(!is_looking());
}
