use std::time::{Duration, Instant};

use crate::parties::twilio::turn::Turn;

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[test]
fn an_answer_is_measured_from_the_callers_last_loud_frame() {
    let (mut turn, start) = (Turn::default(), Instant::now());
    turn.caller_is_loud(start);
    assert_eq!(turn.agent_is_loud(start, start + ms(500)), None, "the greeting answers nobody");
    for at in [1_000, 1_020, 1_400] {
        turn.caller_is_loud(start + ms(at));
    }
    let at = start + ms(2_240);
    assert_eq!(turn.agent_is_loud(at, at + ms(20)), Some(ms(840)));
    assert_eq!(turn.agent_is_loud(at + ms(20), at + ms(40)), None, "one answer, however long");
}

#[test]
fn what_is_said_into_the_agents_sentence_is_a_turn_only_if_the_agent_stops() {
    let (mut turn, start) = (Turn::default(), Instant::now());
    turn.agent_is_loud(start, start + ms(5_000));
    turn.caller_is_loud(start + ms(1_000));
    assert_eq!(turn.agent_is_loud(start + ms(1_100), start + ms(6_000)), None, "mm-hm");
    turn.caller_is_loud(start + ms(2_000));
    turn.agent_stops(start + ms(2_300));
    let at = start + ms(3_000);
    assert_eq!(turn.agent_is_loud(at, at + ms(20)), Some(ms(1_000)));
}

#[test]
fn an_agent_that_speaks_up_by_itself_answers_nobody() {
    let (mut turn, start) = (Turn::default(), Instant::now());
    turn.agent_is_loud(start, start);
    turn.caller_is_loud(start);
    let at = start + ms(31_000);
    assert_eq!(turn.agent_is_loud(at, at + ms(2_000)), None);
    // It stops, but not for anything that the caller has said.
    turn.agent_stops(at + ms(1_000));
    assert_eq!(turn.agent_is_loud(at + ms(1_500), at + ms(2_000)), None);
}
