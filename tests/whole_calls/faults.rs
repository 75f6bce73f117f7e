//! Calls that outlive faults, and transcripts that nothing loses: lines that break, a process that
//! is killed, asked to stop, or has no disk; n8n that is down; money limits; outgoing calls and
//! transfers. The real program as a child process, the pretend world of `src/demo/` around it,
//! faults injected through real sockets, files and signals.
//!
//! The last section is a harness that kills the bridge at random moments and counts what n8n never
//! got. `KILL_ROUNDS=300 cargo test --test whole_calls kill` runs it for long, `KILL_SEED=…` again.

use std::error::Error;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::demo::{
    self, ACCOUNT_SID, AUTH_TOKEN, AgentCall, FIRST_MESSAGE, Heard, HttpAnswer, Marks, N8nRequest,
    OUR_NUMBER, PATIENCE, PUBLIC_URL, Phone, Reply, Ringing, Trouble, World, WorldBuilder,
    closed_port, pcm_of, tool_names, voice,
};

use crate::{Call, at_the_same_time, connect, written};

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

const CALLER: &str = "+4930901820";
/// Where callers go whom no agent serves.
pub(crate) const COLLEAGUE: &str = "+4930555666";
/// The bridge gives up on a stream that does not come back after this long.
const NEXT_STREAM_WITHIN: Duration = Duration::from_secs(15);
/// For what takes that long by itself: enough even for a machine that stumbles.
const LONG_PATIENCE: Duration = Duration::from_mins(1);
/// The tone is wanted within 300 ms of the break; it repeats after two seconds.
const TONE_WITHIN: Duration = Duration::from_secs(1);
/// A process that may go needs no longer than its own deadlines to do so.
const EXIT_WITHIN: Duration = Duration::from_secs(30);
const TOKEN: &str = "mosaic-lantern-27-api";

pub(crate) fn builder() -> WorldBuilder {
    World::builder(env!("CARGO_BIN_EXE_callbridge"))
}

/// A sentence of the built-in agent's file.
fn phrase(name: &str) -> String {
    let file: Value =
        serde_json::from_str(include_str!("../../src/agent/agent.json")).unwrap_or_default();
    file["phrases"][name].as_str().unwrap_or("no such phrase").to_owned()
}

/// One exchange of words, so that there is something to file.
#[track_caller]
pub(crate) fn connect_and_talk(world: &World) -> Result<Call, Trouble> {
    let call = connect(world)?;
    call.agent.say(FIRST_MESSAGE, &pcm_of(&voice(1, 100)))?;
    call.agent.user_said("My window is broken.")?;
    caught_up(&call.agent)?;
    Ok(call)
}

pub(crate) const TALK: &str = "Agent: Hello Anna, this is Sara from SecureLife Insurance. How can I help you \
    today?\nUser: My window is broken.";

/// When this is through, the bridge has dealt with all that the agent has sent before.
#[track_caller]
fn caught_up(agent: &AgentCall) -> Result<(), Trouble> {
    let question = agent.invoke("are_you_there", &json!({}))?;
    agent.wait_result(&question).map(drop)
}

#[track_caller]
fn enter_main_stage(agent: &AgentCall) -> Result<Value, Trouble> {
    let details = json!({"issue_type": "claim", "issue_details": "A broken window.",
        "customer_name": "Anna Berg"});
    let invocation = agent.invoke("move_to_main_convo", &details)?;
    agent.wait_result(&invocation)
}

fn contains(all: &[u8], part: &[u8]) -> bool {
    all.windows(part.len()).any(|window| window == part)
}

/// The agent hears the caller, sample by sample, whatever came before.
#[track_caller]
fn agent_hears(agent: &AgentCall, phone: &Phone, speaker: u64) -> Result<(), Trouble> {
    let words = voice(speaker, 200);
    phone.speak(&words)?;
    let pcm = pcm_of(&words);
    agent.wait_sound(&format!("the caller's voice {speaker}"), |audio| {
        let voiced = audio.iter().filter(|(_, pcm)| pcm.iter().any(|byte| *byte != 0));
        contains(&voiced.map(|(_, pcm)| pcm.as_slice()).collect::<Vec<_>>().concat(), &pcm)
    })
}

/// The caller hears the agent, sample by sample, whatever came before.
#[track_caller]
pub(crate) fn caller_hears(
    phone: &Phone,
    agent: &AgentCall,
    text: &str,
    speaker: u64,
) -> Result<(), Trouble> {
    let words = voice(speaker, 200);
    agent.say(text, &pcm_of(&words))?;
    wait_voice(phone, &words)
}

#[track_caller]
fn wait_voice(phone: &Phone, words: &[u8]) -> Result<(), Trouble> {
    phone.wait_until("the agent's voice", PATIENCE, |heard| {
        let pieces = heard.iter().filter_map(|one| match &one.what {
            Heard::Audio(mulaw) => Some(mulaw.as_slice()),
            _ => None,
        });
        contains(&pieces.collect::<Vec<_>>().concat(), words)
    })
}

/// All transcripts that n8n got for a world, once there are so many.
#[track_caller]
fn filed(world: &World, count: usize) -> Result<Vec<N8nRequest>, Trouble> {
    let posts = world.n8n.wait_for("2", count, LONG_PATIENCE)?;
    if posts.len() == count {
        return Ok(posts);
    }
    Err(world.trouble(format!("{} transcripts were filed, not {count}", posts.len())))
}

/// The one transcript of a world: its text and how the call ended. By then its journal knows that
/// n8n has it.
#[track_caller]
pub(crate) fn the_transcript(world: &World) -> Result<(String, String), Trouble> {
    let posts = filed(world, 1)?;
    let text = |key: &str| posts[0].json[key].as_str().unwrap_or_default().to_owned();
    wait_for_event(world, &text("callSid"), "delivered")?;
    Ok((text("data"), text("endedBy")))
}

/// The journal tells the bridge of tomorrow; a test reads it in place of that one.
#[track_caller]
pub(crate) fn wait_for_event(world: &World, sid: &str, name: &str) -> Result<(), Trouble> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if world.journal(sid).iter().any(|event| event["event"] == name) {
            return Ok(());
        }
        // Nothing announces that a file has grown.
        thread::yield_now();
    }
    Err(world.trouble(format!("{name} is not in the journal")))
}

#[track_caller]
pub(crate) fn assert_no_rule_broken(world: &World, phones: &[&Phone]) {
    assert_eq!(world.ultravox.violations(), [""; 0]);
    for phone in phones {
        assert_eq!(phone.violations(), [""; 0]);
    }
}

#[track_caller]
fn assert_apology(answer: &Ringing) {
    assert_eq!(answer.twiml.said, [phrase("apology")], "{}", answer.twiml.xml);
    assert!(answer.twiml.hangs_up && answer.twiml.stream_url.is_none(), "{}", answer.twiml.xml);
}

#[track_caller]
pub(crate) fn assert_hangup(answer: &Ringing) {
    assert_eq!(answer.twiml.elements, ["Response", "Hangup"], "{}", answer.twiml.xml);
}

/// All that take their time. The name puts it first, so that the rest runs beside it.
#[test]
fn a_bundle_of_cases_that_take_their_time() -> Outcome {
    at_the_same_time(&[
        ("silence", an_agent_that_falls_silent_is_replaced),
        ("pongs", an_agent_that_only_answers_pings_is_alive),
        ("time limit", a_line_cut_at_the_time_limit_is_no_break),
        ("too long", a_call_that_nobody_ends_is_ended_by_us),
        ("nobody", a_caller_who_does_not_come_back_is_lost),
        ("stalled stream", a_stream_that_falls_silent_is_replaced),
        ("goodbye, and stays", an_agent_that_says_goodbye_and_stays_is_left),
        ("kept warm", ultravox_is_asked_again_so_that_its_connection_stays_warm),
        ("stubborn agent", an_agent_that_will_not_go_does_not_keep_the_process),
        ("back-off", tries_to_deliver_come_ever_later),
        ("hanging n8n", a_hanging_delivery_holds_up_nobody),
    ])
}

// ============================================================================
// The agent's line breaks
// ============================================================================

/// The new agent is the old one's successor, as far as Ultravox can know.
#[track_caller]
fn assert_goes_on(next: &AgentCall, before: &AgentCall, sid: &str) {
    assert_eq!(next.query(), format!("priorCallId={}", before.id()));
    let body = next.request();
    let first = &body["firstSpeakerSettings"];
    let prompt = first["agent"]["prompt"].as_str().unwrap_or_default();
    assert!(prompt.contains("interrupted") && prompt.contains("not greet"), "{first}");
    assert_eq!(first["agent"]["text"], Value::Null, "a second greeting: {first}");
    assert_eq!(body.get("initialMessages"), None, "not allowed beside priorCallId");
    assert_eq!(body["metadata"]["callSid"], sid);
    assert_eq!(body["medium"], before.request()["medium"]);
}

/// Prompts hold the time of day, so only their beginnings are alike.
fn prompt_begins(body: &Value) -> String {
    body["systemPrompt"].as_str().unwrap_or_default().chars().take(60).collect()
}

fn the_conversation_goes_on(tls: bool, break_line: fn(&AgentCall)) -> Outcome {
    let world = builder().tls(tls).start()?;
    let call = connect_and_talk(&world)?;
    let stage = enter_main_stage(&call.agent)?;
    let stage: Value = serde_json::from_str(stage["result"].as_str().unwrap_or_default())?;
    let microphone = call.phone.keep_talking();
    call.phone.wait_audio(voice(1, 100).len())?;
    call.phone.wait_played();

    // Time enough to listen to the gap.
    world.ultravox.take_time(Duration::from_millis(700));
    let heard_before = call.phone.heard_audio().len();
    let broken_at = Instant::now();
    break_line(&call.agent);
    let next = world.ultravox.next_call(PATIENCE)?;
    call.phone.wait_audio(heard_before + 160)?;
    let tone = call.phone.heard();
    let tone = tone.iter().find(|one| one.at > broken_at).ok_or("no tone")?;
    let after = tone.at - broken_at;
    assert!(after < TONE_WITHIN, "the tone came {after:?} after the break");
    assert!(!next.is_over() && next.texts().is_empty(), "joined before it was created");

    next.wait_joined()?;
    microphone.stop();
    let gone = call.agent.ended_at().ok_or("the first agent is still there")?;
    assert!(gone < next.joined_at(), "two agents at once");
    assert_goes_on(&next, &call.agent, &call.ringing.call_sid);
    let body = next.request();
    assert_eq!(body["voice"], "Mark");
    assert_eq!(body["selectedTools"], stage["selectedTools"]);
    assert_eq!(prompt_begins(body), prompt_begins(&stage));

    caller_hears(&call.phone, &next, "I am back. When did it break?", 8)?;
    agent_hears(&next, &call.phone, 7)?;
    next.user_said("Yesterday.")?;
    call.phone.hang_up()?;
    assert_eq!(call.phone.wait_closed()?, Heard::Closed(Some(1000)));
    let (text, ended_by) = the_transcript(&world)?;
    assert_eq!(text, format!("{TALK}\nAgent: I am back. When did it break?\nUser: Yesterday."));
    assert_eq!(ended_by, "CallerLeft");
    assert_eq!(world.ultravox.requests(), 2);
    assert_eq!(world.n8n.requests_of("1").len(), 1, "greeted twice");
    world.bridge.wait_for_log("3 agent    warning: the agent's connection broke")?;
    assert_no_rule_broken(&world, &[&call.phone]);
    Ok(())
}

#[test]
fn the_agents_line_ends_without_a_goodbye() -> Outcome {
    the_conversation_goes_on(false, AgentCall::drop_line)
}

#[test]
fn the_agents_tls_line_ends_without_a_goodbye() -> Outcome {
    the_conversation_goes_on(true, AgentCall::drop_line)
}

/// `fatal, internal_error`: what a load balancer that restarts sends.
#[test]
fn the_agents_tls_line_ends_with_an_alert() -> Outcome {
    the_conversation_goes_on(true, |agent| agent.send_junk(&[21, 3, 3, 0, 2, 2, 80]))
}

/// What servers say that restart (1001, 1012), fail (1011), or drop the line with a close frame of
/// no code at all.
#[test]
fn only_1000_is_a_goodbye_of_the_agents() -> Outcome {
    fn with<const CODE: u16>() -> Outcome {
        the_conversation_goes_on(CODE == 1_011, |agent| {
            // If it cannot be sent, the line is broken anyway.
            drop(agent.close_with((CODE > 0).then_some(CODE)));
        })
    }
    at_the_same_time(&[
        ("1001", with::<1_001>),
        ("1011", with::<1_011>),
        ("1012", with::<1_012>),
        ("no code", with::<0>),
    ])
}

/// A restart at the other end: the line is closed, and for about a second nobody is there. Twice,
/// for it is broken lines that are counted, and not tries.
#[test]
fn the_agents_server_may_take_a_second_to_restart() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    call.phone.wait_audio(voice(1, 100).len())?;
    call.phone.wait_played();
    let microphone = call.phone.keep_talking();
    let closed = closed_port();
    let mut before = call.agent.clone();
    for round in 1..=2 {
        let tries = world.ultravox.requests();
        let own = if round == 1 {
            world.ultravox.join_at(closed)
        } else {
            world.ultravox.refuse_next(3, &Reply::Reset);
            None
        };
        let heard_before = call.phone.heard_audio().len();
        let broken_at = Instant::now();
        before.close_with(Some(1_012))?;
        world.ultravox.wait_requests(tries + 3)?;
        let pauses = broken_at.elapsed();
        assert!(pauses > Duration::from_millis(700), "three tries in {pauses:?}");
        call.phone.wait_audio(heard_before + 160)?;
        own.map(|own| world.ultravox.join_at(own));
        let next = loop {
            let next = world.ultravox.next_call(PATIENCE)?;
            if !next.join_url().contains(&format!(":{closed}/")) {
                break next;
            }
        };
        assert_goes_on(&next, &before, &call.ringing.call_sid);
        caller_hears(&call.phone, &next, &format!("Back again, {round}."), 10 + round)?;
        before = next;
    }
    microphone.stop();
    agent_hears(&before, &call.phone, 7)?;
    call.phone.hang_up()?;
    let (text, ended_by) = the_transcript(&world)?;
    assert_eq!(text, format!("{TALK}\nAgent: Back again, 1.\nAgent: Back again, 2."));
    assert_eq!(ended_by, "CallerLeft");
    assert_no_rule_broken(&world, &[&call.phone]);
    Ok(())
}

#[test]
fn the_agents_tls_line_carries_garbage() -> Outcome {
    the_conversation_goes_on(true, |agent| agent.send_junk(&[0xA5; 4_096]))
}

#[test]
fn the_agents_line_carries_garbage() -> Outcome {
    the_conversation_goes_on(false, |agent| agent.send_junk(&[0xFF; 512]))
}

#[test]
fn the_agent_sends_a_message_without_end() -> Outcome {
    the_conversation_goes_on(false, |agent| {
        // The bridge may hang up in the middle of it, as it should.
        drop(agent.send_audio(&vec![1; 2 << 20]));
    })
}

fn an_agent_that_falls_silent_is_replaced() -> Outcome {
    let world = builder().tls(true).start()?;
    let call = connect_and_talk(&world)?;
    let microphone = call.phone.keep_talking();
    call.agent.wait_text("a ping", |text| text["type"] == "ping")?;
    world.ultravox.take_time(Duration::from_millis(700));
    let heard_before = call.phone.heard_audio().len();
    let next = world.ultravox.next_call(PATIENCE)?;
    call.phone.wait_audio(heard_before + 160)?;
    let tone = call.phone.heard().last().map(|one| one.at).ok_or("no tone")?;
    let after = tone.saturating_duration_since(next.created_at());
    assert!(after < TONE_WITHIN, "the tone came {after:?} after the break");
    next.wait_joined()?;
    let gone = call.agent.ended_at().ok_or("the first agent is still there")?;
    assert!(gone < next.joined_at(), "two agents at once");
    microphone.stop();
    assert_goes_on(&next, &call.agent, &call.ringing.call_sid);
    caller_hears(&call.phone, &next, "I am back.", 8)?;
    agent_hears(&next, &call.phone, 7)?;
    Ok(())
}

/// Between two turns of a caller who thinks, an agent may say nothing for long.
fn an_agent_that_only_answers_pings_is_alive() -> Outcome {
    let world = builder().start()?;
    world.ultravox.answer_pings(true);
    let call = connect(&world)?;
    // Three of them, three seconds apart: together longer than the deadline.
    let mut last = 0.0;
    for _ in 0..3 {
        let ping = call.agent.wait_text("one more ping", |text| {
            text["type"] == "ping" && text["timestamp"].as_f64().unwrap_or_default() > last
        })?;
        last = ping["timestamp"].as_f64().unwrap_or_default();
    }
    assert_eq!(world.ultravox.requests(), 1);
    caller_hears(&call.phone, &call.agent, "Yes?", 8)?;
    agent_hears(&call.agent, &call.phone, 7)?;
    Ok(())
}

/// Ultravox cuts the line when `maxDuration` is over. Nobody wants that call back.
fn a_line_cut_at_the_time_limit_is_no_break() -> Outcome {
    let world = builder().setting("MAX_CALL_SECONDS", 10).start()?;
    world.ultravox.answer_pings(true);
    let call = connect_and_talk(&world)?;
    let microphone = call.phone.keep_talking();
    microphone.say(&voice(2, 6_000));
    microphone.wait_said()?;
    call.agent.drop_line();
    assert_eq!(call.phone.wait_closed()?, Heard::Closed(Some(1000)));
    assert_hangup(&call.ringing.next(&world, &[])?);
    assert_eq!(the_transcript(&world)?, (TALK.to_owned(), "AgentLeft".to_owned()));
    assert_eq!(world.ultravox.requests(), 1);
    Ok(())
}

fn a_call_that_nobody_ends_is_ended_by_us() -> Outcome {
    let world = builder().setting("MAX_CALL_SECONDS", 10).start()?;
    world.ultravox.answer_pings(true);
    let call = connect_and_talk(&world)?;
    assert_eq!(call.agent.request()["maxDuration"], "10s");
    let rang_at = call.ringing.answered_at;
    let microphone = call.phone.keep_talking();
    let posts = world.n8n.wait_for("2", 1, LONG_PATIENCE)?;
    let lasted = posts[0].at.saturating_duration_since(rang_at);
    assert!(lasted > Duration::from_secs(20), "ended after {lasted:?}, before Ultravox could");
    assert_eq!(posts[0].json["endedBy"], "TooLong");
    call.agent.wait_closed()?;
    call.phone.wait_closed()?;
    microphone.stop();
    assert_hangup(&call.ringing.next(&world, &[])?);
    Ok(())
}

#[test]
fn what_ultravox_will_not_continue_goes_on_from_our_own_transcript() -> Outcome {
    let refused = json!({"detail": "priorCallId: this call cannot be resumed."});
    for status in [400, 404, 409, 422] {
        let world = builder().start()?;
        let call = connect_and_talk(&world)?;
        // A sentence cut off in the middle was said as far as it went.
        call.agent.begin_saying("Let me see", &[])?;
        caught_up(&call.agent)?;
        world.ultravox.refuse_next(1, &Reply::json(status, &refused));
        call.agent.drop_line();
        let next = world.ultravox.next_call(PATIENCE)?;
        next.wait_joined()?;
        assert_eq!(world.ultravox.requests(), 3);
        assert_eq!(next.query(), "");
        let history = json!([
            {"role": "MESSAGE_ROLE_AGENT", "text": FIRST_MESSAGE},
            {"role": "MESSAGE_ROLE_USER", "text": "My window is broken."},
            {"role": "MESSAGE_ROLE_AGENT", "text": "Let me see"},
        ]);
        assert_eq!(next.request()["initialMessages"], history);
        assert!(next.request()["firstSpeakerSettings"]["agent"]["prompt"].is_string());
        caller_hears(&call.phone, &next, "I am back.", 8)?;
        agent_hears(&next, &call.phone, 7)?;
        world.bridge.wait_for_log("going on from our own transcript")?;
        call.phone.hang_up()?;
        let (text, _) = the_transcript(&world)?;
        assert_eq!(text, format!("{TALK}\nAgent: Let me see\nAgent: I am back."));
    }
    Ok(())
}

/// The first agent and the two that may follow it, all lost.
fn three_breaks(world: &World) -> Result<Call, Box<dyn Error + Send + Sync>> {
    let call = connect_and_talk(world)?;
    let mut agent = call.agent.clone();
    for round in 1..=2 {
        agent.drop_line();
        let next = world.ultravox.next_call(PATIENCE)?;
        next.wait_joined()?;
        assert_goes_on(&next, &agent, &call.ringing.call_sid);
        caller_hears(&call.phone, &next, &format!("Back again, {round}."), 10 + round)?;
        agent = next;
    }
    agent.drop_line();
    assert_eq!(call.phone.wait_closed()?, Heard::Closed(Some(1000)));
    Ok(call)
}

#[test]
fn the_third_break_is_one_too_many() -> Outcome {
    let world = builder().start()?;
    let call = three_breaks(&world)?;
    assert_apology(&call.ringing.next(&world, &[])?);
    let (text, ended_by) = the_transcript(&world)?;
    assert_eq!(text, format!("{TALK}\nAgent: Back again, 1.\nAgent: Back again, 2."));
    assert_eq!(ended_by, "AgentLost");
    assert_eq!(world.ultravox.requests(), 3);
    assert_no_rule_broken(&world, &[&call.phone]);
    Ok(())
}

#[test]
fn after_the_third_break_a_person_is_better_than_an_apology() -> Outcome {
    let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    let call = three_breaks(&world)?;
    let answer = call.ringing.next(&world, &[])?;
    assert_eq!(answer.twiml.dial.as_deref(), Some(COLLEAGUE));
    assert_eq!(answer.twiml.said, [phrase("putting_through")]);
    Ok(())
}

/// What the agent has said before its line broke still plays, and no tone in it.
#[test]
fn the_tone_waits_until_the_agents_words_have_been_heard() -> Outcome {
    /// Less than 2 s by the two frames in which they may overlap, and some more.
    const WORDS_LAST: Duration = Duration::from_millis(1_900);
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    call.phone.wait_audio(voice(1, 100).len())?;
    call.phone.wait_played();
    let microphone = call.phone.keep_talking();
    let words = voice(3, 2_000);
    let before = Instant::now();
    call.agent.say("My last words.", &pcm_of(&words))?;
    wait_voice(&call.phone, &words)?;
    world.ultravox.refuse_always(&Reply::Hang);
    let heard = call.phone.heard_audio().len();
    call.agent.drop_line();
    call.phone.wait_audio(heard + 160)?;
    let tone = call.phone.heard().last().map(|one| one.at).ok_or("no tone")?;
    let after = tone.saturating_duration_since(before);
    assert!(after > WORDS_LAST, "a tone {after:?} after the first word");
    microphone.stop();
    Ok(())
}

/// Words that were cleared are not waited for: neither by the tone nor by the goodbye.
#[test]
fn after_a_barge_in_the_tone_comes_at_once() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    let microphone = call.phone.keep_talking();
    let words = voice(3, 60_000);
    call.agent.say("A very long story.", &pcm_of(&words))?;
    wait_voice(&call.phone, &words)?;
    call.agent.send(&json!({"type": "playback_clear_buffer"}))?;
    caught_up(&call.agent)?;
    world.ultravox.refuse_always(&Reply::Hang);
    let heard = call.phone.heard_audio().len();
    call.agent.drop_line();
    call.phone.wait_audio(heard + 160)?;
    microphone.stop();
    Ok(())
}

/// It has said goodbye, answers pings, and stays. The caller does not stay with it.
fn an_agent_that_says_goodbye_and_stays_is_left() -> Outcome {
    let world = builder().start()?;
    world.ultravox.answer_pings(true);
    let call = connect_and_talk(&world)?;
    let microphone = call.phone.keep_talking();
    let farewell = call.agent.invoke("hangUp", &json!({"reason": "done"}))?;
    call.agent.wait_result(&farewell)?;
    let posts = world.n8n.wait_for("2", 1, LONG_PATIENCE)?;
    assert_eq!(posts[0].json["endedBy"], "AgentHungUp");
    assert_eq!(call.phone.wait_closed()?, Heard::Closed(Some(1000)));
    call.agent.wait_closed()?;
    microphone.stop();
    Ok(())
}

/// From the first question to the second one there are 25 s.
fn ultravox_is_asked_again_so_that_its_connection_stays_warm() -> Outcome {
    let world = builder().start()?;
    let mut asked = world.ultravox.wait_account_asked(2);
    for _ in 0..5 {
        asked = asked.or_else(|_| world.ultravox.wait_account_asked(2));
    }
    Ok(asked?)
}

#[test]
fn no_new_agent_is_to_be_had() -> Outcome {
    fn with(refusal: &Reply, in_log: &str) -> Outcome {
        let world = builder().start()?;
        let call = connect_and_talk(&world)?;
        world.ultravox.refuse_always(refusal);
        call.agent.drop_line();
        assert_eq!(call.phone.wait_closed()?, Heard::Closed(Some(1000)));
        assert_apology(&call.ringing.next(&world, &[])?);
        world.bridge.wait_for_log(in_log)?;
        assert_eq!(the_transcript(&world)?, (TALK.to_owned(), "AgentLost".to_owned()));
        Ok(())
    }
    let nowhere = format!("ws://127.0.0.1:{}/join/1", closed_port());
    let unreachable = json!({"callId": "c1", "joinUrl": nowhere});
    let refusals = [
        (Reply::json(402, &json!({"detail": "no minutes"})), "402"),
        (Reply::json(500, &json!({"detail": "sorry"})), "500"),
        (Reply::Reset, "no new agent: Ultravox: the request failed"),
        (Reply::json(201, &unreachable), "could not join"),
    ];
    // Each takes all the time there is for a new agent.
    thread::scope(|scope| {
        let cases = refusals.map(|(refusal, in_log)| scope.spawn(move || with(&refusal, in_log)));
        for case in cases {
            case.join().map_err(|_| "an assertion failed, see above")??;
        }
        Ok(())
    })
}

#[test]
fn an_ordinary_end_is_no_break() -> Outcome {
    let world = builder().start()?;
    // A goodbye in due form.
    let call = connect_and_talk(&world)?;
    call.agent.close()?;
    assert_eq!(call.phone.wait_closed()?, Heard::Closed(Some(1000)));
    assert_hangup(&call.ringing.next(&world, &[])?);
    // After its hang-up tool an agent may just be gone.
    let call = connect_and_talk(&world)?;
    let farewell = call.agent.invoke("hangUp", &json!({"reason": "done"}))?;
    assert_eq!(call.agent.wait_result(&farewell)?["responseType"], "hang-up");
    call.agent.drop_line();
    assert_eq!(call.phone.wait_closed()?, Heard::Closed(Some(1000)));
    assert_hangup(&call.ringing.next(&world, &[])?);
    // The caller leaves.
    let call = connect_and_talk(&world)?;
    call.phone.hang_up()?;
    call.agent.wait_closed()?;
    assert_hangup(&call.ringing.next(&world, &[])?);

    let posts = filed(&world, 3)?;
    let mut ends: Vec<_> = posts.iter().map(|post| post.json["endedBy"].to_string()).collect();
    ends.sort();
    assert_eq!(ends, ["\"AgentHungUp\"", "\"AgentLeft\"", "\"CallerLeft\""]);
    assert_eq!(world.ultravox.requests(), 3, "somebody was called back");
    Ok(())
}

#[test]
fn the_caller_leaves_while_a_new_agent_is_on_its_way() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    world.ultravox.take_time(Duration::from_millis(500));
    call.agent.drop_line();
    let next = world.ultravox.next_call(PATIENCE)?;
    call.phone.hang_up()?;
    // Joined and sent home: an agent that is never joined is billed until its joinTimeout. However
    // much it has to say, nobody listens to it any more.
    let deadline = Instant::now() + PATIENCE;
    while !next.is_over() {
        assert!(Instant::now() < deadline, "the new agent is kept, although nobody is there");
        // It ends in between.
        drop(next.send_audio(&[0; 320]));
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(the_transcript(&world)?, (TALK.to_owned(), "CallerLeft".to_owned()));
    assert_hangup(&call.ringing.next(&world, &[])?);
    assert_eq!(world.ultravox.requests(), 2);
    Ok(())
}

#[test]
fn a_second_try_for_a_new_agent_may_succeed() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    world.ultravox.refuse_next(1, &Reply::json(500, &json!({"detail": "sorry"})));
    call.agent.drop_line();
    let next = world.ultravox.next_call(PATIENCE)?;
    assert_goes_on(&next, &call.agent, &call.ringing.call_sid);
    caller_hears(&call.phone, &next, "I am back.", 8)?;
    agent_hears(&next, &call.phone, 7)?;
    // That was one broken line, however many tries it took. There may be another.
    next.drop_line();
    world.ultravox.next_call(PATIENCE)?.wait_joined()?;
    assert_eq!(world.ultravox.requests(), 4);
    Ok(())
}

#[test]
fn the_agents_line_breaks_before_the_caller_is_there() -> Outcome {
    let world = builder().start()?;
    let ringing = world.ring(CALLER)?;
    let first = world.ultravox.next_call(PATIENCE)?;
    first.wait_joined()?;
    first.drop_line();
    let phone = ringing.open_stream(&world)?;
    let next = world.ultravox.next_call(PATIENCE)?;
    next.wait_joined()?;
    assert_goes_on(&next, &first, &ringing.call_sid);
    caller_hears(&phone, &next, "Hello?", 8)?;
    agent_hears(&next, &phone, 7)?;
    Ok(())
}

#[test]
fn other_calls_do_not_notice_that_an_agents_line_breaks() -> Outcome {
    let world = builder().start()?;
    let bystander = connect(&world)?;
    let call = connect_and_talk(&world)?;
    let words = voice(20, 3_000);
    let microphone = bystander.phone.keep_talking();
    microphone.say(&words);
    let mut agent = call.agent.clone();
    for speaker in 30..32 {
        agent.drop_line();
        agent = world.ultravox.next_call(PATIENCE)?;
        caller_hears(&call.phone, &agent, "Back.", speaker)?;
        caller_hears(&bystander.phone, &bystander.agent, "Still here.", speaker + 10)?;
    }
    microphone.wait_said()?;
    microphone.stop();
    bystander.agent.expect_audio(&pcm_of(&bystander.phone.said().0))?;
    assert_eq!(world.ultravox.requests(), 4);
    Ok(())
}

// ============================================================================
// The caller's stream breaks
// ============================================================================

#[test]
fn a_stream_that_breaks_is_followed_by_another_with_the_same_agent() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    call.phone.wait_audio(voice(1, 100).len())?;
    agent_hears(&call.agent, &call.phone, 7)?;
    call.phone.drop_line();
    let from = call.agent.audio().len();
    call.agent.wait_sound("half a second of silence", |audio| {
        let gap = audio.get(from..).unwrap_or_default();
        gap.iter().filter(|(_, pcm)| pcm.iter().all(|byte| *byte == 0)).count() >= 25
    })?;
    // What the agent says now is heard when there is somebody to hear it.
    let words = voice(9, 300);
    call.agent.say("Are you still there?", &pcm_of(&words))?;

    let next = call.ringing.next(&world, &[])?;
    let action = next.twiml.action.clone().unwrap_or_default();
    assert!(action.starts_with(&format!("{PUBLIC_URL}/stream-ended#")), "{action}");
    assert!(action.contains("rc=5") && action.contains("rp=ct,5xx"), "no retries: {action}");
    assert_ne!(next.twiml.stream_url, call.ringing.twiml.stream_url);
    let phone = next.open_stream(&world)?;
    wait_voice(&phone, &words)?;
    caller_hears(&phone, &call.agent, "There you are.", 11)?;
    agent_hears(&call.agent, &phone, 10)?;
    // The old token opens nothing any more, nor the new one twice.
    for used in [&call.ringing, &next] {
        assert!(used.stream_is_refused(&world));
    }
    caller_hears(&phone, &call.agent, "Go on.", 12)?;

    phone.hang_up()?;
    let (text, ended_by) = the_transcript(&world)?;
    assert_eq!(
        text,
        format!("{TALK}\nAgent: Are you still there?\nAgent: There you are.\nAgent: Go on.")
    );
    assert_eq!(ended_by, "CallerLeft");
    assert_eq!(world.ultravox.requests(), 1);
    assert_no_rule_broken(&world, &[&call.phone, &phone]);
    Ok(())
}

fn a_caller_who_does_not_come_back_is_lost() -> Outcome {
    let world = builder().start()?;
    world.ultravox.answer_pings(true);
    let call = connect_and_talk(&world)?;
    let broken_at = Instant::now();
    call.phone.drop_line();
    let posts = world.n8n.wait_for("2", 1, LONG_PATIENCE)?;
    let after = posts[0].at.saturating_duration_since(broken_at);
    assert!(after >= NEXT_STREAM_WITHIN, "given up after {after:?}");
    assert!(after < 2 * NEXT_STREAM_WITHIN, "given up only after {after:?}");
    assert_eq!(posts[0].json["endedBy"], "CallerLost");
    assert_eq!(posts[0].json["data"], TALK);
    call.agent.wait_closed()?;
    assert_hangup(&call.ringing.next(&world, &[])?);
    assert_eq!(world.ultravox.requests(), 1);
    Ok(())
}

/// Twilio sends fifty messages a second. A stream without any is dead, be its socket open or not.
fn a_stream_that_falls_silent_is_replaced() -> Outcome {
    let world = builder().start()?;
    world.ultravox.answer_pings(true);
    let call = connect_and_talk(&world)?;
    call.phone.wait_until("the bridge to give up the stream", LONG_PATIENCE, |heard| {
        heard.iter().any(|one| matches!(one.what, Heard::Closed(_) | Heard::Broken(_)))
    })?;
    let next = call.ringing.next(&world, &[])?;
    let phone = next.open_stream(&world)?;
    caller_hears(&phone, &call.agent, "There you are.", 11)?;
    agent_hears(&call.agent, &phone, 10)?;
    assert_eq!(world.ultravox.requests(), 1);
    Ok(())
}

/// A proxy in between may hold the dead socket open: then Twilio knows before the bridge does.
#[test]
fn twilio_asks_for_another_stream_before_the_bridge_has_missed_the_first() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    let next = call.ringing.next(&world, &[])?;
    call.phone.wait_closed()?;
    let phone = next.open_stream(&world)?;
    caller_hears(&phone, &call.agent, "There you are.", 11)?;
    agent_hears(&call.agent, &phone, 10)?;
    phone.hang_up()?;
    let (text, ended_by) = the_transcript(&world)?;
    assert_eq!((text, &*ended_by), (format!("{TALK}\nAgent: There you are."), "CallerLeft"));
    assert_eq!(world.ultravox.requests(), 1);
    Ok(())
}

#[test]
fn both_lines_break_and_the_conversation_goes_on() -> Outcome {
    for speaks_into_the_gap in [false, true] {
        let world = builder().start()?;
        let call = connect_and_talk(&world)?;
        call.phone.drop_line();
        world.bridge.wait_for_log("another may come")?;
        let words = voice(9, 300);
        if speaks_into_the_gap {
            // Until somebody can hear this, the bridge does not read on and see the line's end.
            call.agent.say("Hello?", &pcm_of(&words))?;
        }
        call.agent.drop_line();
        if !speaks_into_the_gap {
            world.ultravox.wait_requests(2)?;
        }
        let phone = call.ringing.next(&world, &[])?.open_stream(&world)?;
        let second = world.ultravox.next_call(PATIENCE)?;
        assert_goes_on(&second, &call.agent, &call.ringing.call_sid);
        second.wait_joined()?;
        caller_hears(&phone, &second, "There you are.", 11)?;
        agent_hears(&second, &phone, 10)?;
        phone.hang_up()?;
        let (text, ended_by) = the_transcript(&world)?;
        let gap = if speaks_into_the_gap { "\nAgent: Hello?" } else { "" };
        let wanted = format!("{TALK}{gap}\nAgent: There you are.");
        assert_eq!((text, &*ended_by), (wanted, "CallerLeft"));
        if speaks_into_the_gap {
            wait_voice(&phone, &words).or_else(|error| {
                if contains(&phone.heard_audio(), &words) { Ok(()) } else { Err(error) }
            })?;
        }
    }
    Ok(())
}

#[test]
fn nothing_is_created_for_calls_that_are_over() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    call.phone.hang_up()?;
    the_transcript(&world)?;
    for extra in [[("CallStatus", "in-progress")], [("CallStatus", "completed")]] {
        assert_hangup(&call.ringing.next(&world, &extra)?);
    }
    // So after a restart, when only the journal knows.
    world.bridge.restart()?;
    for extra in [[("CallStatus", "in-progress")], [("CallStatus", "completed")]] {
        assert_hangup(&call.ringing.next(&world, &extra)?);
    }
    // A call that nobody knows is none of ours, but its caller gets a word.
    let mut unknown = call.ringing.clone();
    unknown.call_sid = "CAffffffffffffffffffffffffffffffff".to_owned();
    assert_apology(&unknown.next(&world, &[])?);
    assert_hangup(&unknown.next(&world, &[("CallStatus", "completed")])?);
    assert_eq!(world.ultravox.requests(), 1);
    assert_eq!(world.n8n.requests_of("2").len(), 1);
    Ok(())
}

#[test]
fn the_seventh_stream_is_one_too_many() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    let mut ringing = call.ringing.clone();
    let mut phone = call.phone;
    for speaker in 20..25 {
        phone.drop_line();
        ringing = ringing.next(&world, &[])?;
        phone = ringing.open_stream(&world)?;
        caller_hears(&phone, &call.agent, "Go on.", speaker)?;
    }
    phone.drop_line();
    assert_apology(&ringing.next(&world, &[])?);
    call.agent.wait_closed()?;
    assert_eq!(the_transcript(&world)?.1, "CallerLost");
    assert_eq!(world.ultravox.requests(), 1);
    Ok(())
}

#[test]
fn twilio_says_that_the_call_is_over() -> Outcome {
    let world = builder().start()?;
    for status in ["completed", "failed", "canceled"] {
        let call = connect_and_talk(&world)?;
        assert_hangup(&call.ringing.next(&world, &[("CallStatus", status)])?);
        call.agent.wait_closed()?;
        call.phone.wait_closed()?;
    }
    // And by the other way.
    let call = connect_and_talk(&world)?;
    assert_eq!(call.ringing.call_status(&world, "completed")?.status, 204);
    call.agent.wait_closed()?;
    for post in filed(&world, 4)? {
        assert_eq!(post.json["endedBy"], "CallerLeft");
    }
    assert_eq!(world.ultravox.requests(), 4);
    Ok(())
}

// ============================================================================
// The process dies
// ============================================================================

/// The call goes on after the process that carried it was killed.
#[track_caller]
fn take_up(world: &World, ringing: &Ringing) -> Result<Call, Trouble> {
    let ringing = ringing.next(world, &[])?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(world)?;
    Ok(Call { ringing, agent, phone })
}

#[test]
fn a_killed_process_is_replaced_in_the_middle_of_a_call() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    enter_main_stage(&call.agent)?;
    call.agent.say("I am Mark.", &pcm_of(&voice(2, 100)))?;
    caught_up(&call.agent)?;
    written(&world, &call.ringing.call_sid, &call.agent)?;
    world.bridge.restart()?;
    call.agent.wait_closed()?;
    call.phone.wait_closed()?;

    let again = take_up(&world, &call.ringing)?;
    world.bridge.wait_for_log("the call is taken up from its journal")?;
    assert_goes_on(&again.agent, &call.agent, &call.ringing.call_sid);
    let body = again.agent.request();
    assert_eq!(body["voice"], "Mark");
    assert!(tool_names(&body["selectedTools"]).contains(&"schedule_meeting".to_owned()));
    let prompt = body["systemPrompt"].as_str().unwrap_or_default();
    assert!(prompt.contains(CALLER), "the caller's number is forgotten: {prompt}");
    caller_hears(&again.phone, &again.agent, "Where were we?", 8)?;
    agent_hears(&again.agent, &again.phone, 7)?;
    let wishes = json!({"name": "Anna Berg", "email": "anna.berg@example.com",
        "purpose": "Window", "datetime": "2027-03-09T14:30", "location": "London"});
    let booking = again.agent.invoke("schedule_meeting", &wishes)?;
    assert_eq!(again.agent.wait_result(&booking)?["result"], demo::BOOKED);
    assert_eq!(world.n8n.requests_of("3")[0].json["number"], CALLER);
    again.agent.user_said("At the window.")?;
    caught_up(&again.agent)?;

    again.phone.hang_up()?;
    let (text, ended_by) = the_transcript(&world)?;
    let wanted = format!("{TALK}\nAgent: I am Mark.\nAgent: Where were we?\nUser: At the window.");
    assert_eq!((text, &*ended_by), (wanted, "CallerLeft"));
    let post = &world.n8n.requests_of("2")[0];
    assert_eq!(post.json["number"], CALLER);
    assert_eq!(post.json["callSid"], call.ringing.call_sid);
    assert_eq!(world.n8n.requests_of("1").len(), 1, "greeted twice");
    assert_eq!(world.ultravox.requests(), 2);
    // What is over stays over.
    again.ringing.call_status(&world, "completed")?;
    world.bridge.restart()?;
    again.ringing.call_status(&world, "completed")?;
    assert_hangup(&again.ringing.next(&world, &[])?);
    assert_eq!(world.n8n.requests_of("2").len(), 1, "filed twice");
    assert_no_rule_broken(&world, &[&again.phone]);
    Ok(())
}

#[test]
fn a_process_may_be_killed_again_and_again() -> Outcome {
    let world = builder().start()?;
    let mut call = connect_and_talk(&world)?;
    let mut lines = vec![TALK.to_owned()];
    for round in 1..=3 {
        written(&world, &call.ringing.call_sid, &call.agent)?;
        world.bridge.restart()?;
        let before = call.agent.clone();
        call = take_up(&world, &call.ringing)?;
        assert_goes_on(&call.agent, &before, &call.ringing.call_sid);
        let line = format!("Back again, {round}.");
        caller_hears(&call.phone, &call.agent, &line, 10 + round)?;
        caught_up(&call.agent)?;
        lines.push(format!("Agent: {line}"));
    }
    written(&world, &call.ringing.call_sid, &call.agent)?;
    world.bridge.restart()?;
    call.ringing.call_status(&world, "completed")?;
    assert_eq!(the_transcript(&world)?, (lines.join("\n"), "ProcessDied".to_owned()));
    Ok(())
}

#[test]
fn after_a_kill_ultravox_may_refuse_to_continue() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    written(&world, &call.ringing.call_sid, &call.agent)?;
    world.bridge.restart()?;
    world.ultravox.refuse_next(1, &Reply::json(404, &json!({"detail": "Not found."})));
    let again = take_up(&world, &call.ringing)?;
    assert_eq!(again.agent.query(), "");
    let history = json!([
        {"role": "MESSAGE_ROLE_AGENT", "text": FIRST_MESSAGE},
        {"role": "MESSAGE_ROLE_USER", "text": "My window is broken."},
    ]);
    assert_eq!(again.agent.request()["initialMessages"], history);
    caller_hears(&again.phone, &again.agent, "Where were we?", 8)?;
    Ok(())
}

#[test]
fn after_a_kill_no_agent_is_to_be_had() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    written(&world, &call.ringing.call_sid, &call.agent)?;
    world.bridge.restart()?;
    world.ultravox.refuse_always(&Reply::json(402, &json!({"detail": "no minutes"})));
    assert_apology(&call.ringing.next(&world, &[])?);
    assert_eq!(the_transcript(&world)?, (TALK.to_owned(), "NoAgent".to_owned()));
    Ok(())
}

/// A line that was final, and answered for, a moment before the kill.
#[test]
fn what_was_final_before_a_kill_is_filed_when_the_caller_is_gone() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    written(&world, &call.ringing.call_sid, &call.agent)?;
    world.bridge.restart()?;
    assert_hangup(&call.ringing.next(&world, &[("CallStatus", "completed")])?);
    assert_eq!(the_transcript(&world)?, (TALK.to_owned(), "ProcessDied".to_owned()));
    assert_eq!(world.ultravox.requests(), 1);
    Ok(())
}

#[test]
fn a_call_that_nobody_takes_up_is_filed_as_it_is() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    written(&world, &call.ringing.call_sid, &call.agent)?;
    world.bridge.kill();
    // As if two minutes had passed since.
    shift_journal(&only_journal(&world)?, 120)?;
    world.bridge.restart()?;
    assert_eq!(the_transcript(&world)?, (TALK.to_owned(), "ProcessDied".to_owned()));
    assert_hangup(&call.ringing.next(&world, &[])?);
    assert_eq!(world.ultravox.requests(), 1);
    Ok(())
}

/// Taken up, ended while n8n was down: what the restart has found in the journal is an older
/// version by then, and must not be filed instead.
#[test]
fn a_call_taken_up_is_not_filed_without_its_second_half() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    written(&world, &call.ringing.call_sid, &call.agent)?;
    world.bridge.restart()?;
    let again = take_up(&world, &call.ringing)?;
    caller_hears(&again.phone, &again.agent, "Where were we?", 8)?;
    caught_up(&again.agent)?;
    world.n8n.set_reply("2", Reply::json(503, &json!({})));
    again.phone.hang_up()?;
    world.bridge.wait_for_log("next try in")?;
    world.n8n.set_reply("2", Reply::json(200, &json!({})));
    again.ringing.call_status(&world, "completed")?;
    world.bridge.wait_for_log("n8n has the transcript")?;
    let wanted = format!("{TALK}\nAgent: Where were we?");
    for post in world.n8n.requests_of("2") {
        assert_eq!(post.json["data"], wanted);
        assert_eq!(post.json["endedBy"], "CallerLeft");
    }
    let ends = world.journal(&call.ringing.call_sid);
    assert_eq!(ends.iter().filter(|event| event["event"] == "end").count(), 1, "{ends:#?}");
    Ok(())
}

/// A first journal that takes its time: a pipe, which can be read when the test has written it.
/// Until then the bridge is to serve, and to mix nothing up.
#[test]
fn calls_are_served_while_the_journals_are_still_being_read() -> Outcome {
    let world = builder().start()?;
    let left = connect_and_talk(&world)?;
    let stayed = connect_and_talk(&world)?;
    written(&world, &left.ringing.call_sid, &left.agent)?;
    written(&world, &stayed.ringing.call_sid, &stayed.agent)?;
    world.bridge.kill();
    let seen = world.bridge.log().len();
    let slow = world.data_dir().join("calls").join("20200101T000000Z-CAslow.jsonl");
    assert!(Command::new("mkfifo").arg(&slow).status()?.success());
    world.bridge.restart()?;
    assert_eq!(world.get("/health")?.status, 200);

    // One caller has left meanwhile, one comes back, and a new one rings.
    left.ringing.call_status(&world, "completed")?;
    let again = take_up(&world, &stayed.ringing)?;
    caller_hears(&again.phone, &again.agent, "Where were we?", 8)?;
    let new = connect_and_talk(&world)?;
    for call in [&again, &new] {
        caught_up(&call.agent)?;
        call.phone.hang_up()?;
        wait_for_event(&world, &call.ringing.call_sid, "end")?;
    }
    assert!(!world.bridge.log().iter().skip(seen).any(|line| line.contains("not filed, read")));

    // Slow, so that a transcript that is filed twice would be seen twice.
    world.n8n.set_reply("2", Reply::json(200, &json!({})).after(Duration::from_millis(300)));
    // Under another name first: nobody is to open it again, and wait once more.
    let aside = world.data_dir().join("slow");
    fs::rename(&slow, &aside)?;
    fs::write(&aside, "")?;
    for call in [&left, &again, &new] {
        wait_for_event(&world, &call.ringing.call_sid, "delivered")?;
    }
    let posts = filed(&world, 3)?;
    let mut found: Vec<(&str, &str, &str)> = posts
        .iter()
        .map(|post| {
            let field = |name: &str| post.json[name].as_str().unwrap_or_default();
            (field("callSid"), field("data"), field("endedBy"))
        })
        .collect();
    let more = format!("{TALK}\nAgent: Where were we?");
    let mut wanted = vec![
        (left.ringing.call_sid.as_str(), TALK, "ProcessDied"),
        (new.ringing.call_sid.as_str(), TALK, "CallerLeft"),
        (stayed.ringing.call_sid.as_str(), more.as_str(), "CallerLeft"),
    ];
    found.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(found, wanted);
    Ok(())
}

#[test]
fn a_signal_does_not_wait_for_the_journals() -> Outcome {
    let world = builder().start()?;
    world.bridge.kill();
    let calls = world.data_dir().join("calls");
    fs::create_dir_all(&calls)?;
    let slow = calls.join("20200101T000000Z-CAslow.jsonl");
    assert!(Command::new("mkfifo").arg(&slow).status()?.success());
    world.bridge.restart()?;
    assert_eq!(world.get("/health")?.status, 200);
    world.bridge.ask_to_stop()?;
    assert!(world.bridge.wait_exit(PATIENCE)?.success());
    Ok(())
}

/// Near the end of `MAX_CALL_SECONDS` the caller still gets the last words that Ultravox allows.
#[test]
fn a_call_taken_up_late_is_not_cut_off_at_once() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    written(&world, &call.ringing.call_sid, &call.agent)?;
    world.bridge.kill();
    let journal = only_journal(&world)?;
    let text = fs::read_to_string(&journal)?;
    let (ring, rest) = text.split_once('\n').ok_or("a journal of one line")?;
    fs::write(&journal, format!("{}\n{rest}", shifted(ring, 3_600)?))?;
    world.bridge.restart()?;
    let again = take_up(&world, &call.ringing)?;
    assert_eq!(again.agent.request()["maxDuration"], "30s");
    caller_hears(&again.phone, &again.agent, "Where were we?", 8)?;
    agent_hears(&again.agent, &again.phone, 7)?;
    agent_hears(&again.agent, &again.phone, 9)?;
    assert!(!again.agent.is_over());
    Ok(())
}

#[test]
fn a_missing_journal_leads_to_an_apology() -> Outcome {
    for (fallback, dial) in [("", None), (COLLEAGUE, Some(COLLEAGUE))] {
        let world = builder().setting("FALLBACK_NUMBER", fallback).start()?;
        let call = connect_and_talk(&world)?;
        world.bridge.kill();
        fs::remove_dir_all(world.data_dir())?;
        world.bridge.restart()?;
        let answer = call.ringing.next(&world, &[])?;
        assert_eq!(answer.twiml.dial.as_deref(), dial);
        if dial.is_none() {
            assert_apology(&answer);
        }
        assert_eq!(world.ultravox.requests(), 1);
        world.bridge.wait_for_log("asked about a call of which there is no journal")?;
    }
    Ok(())
}

type Damage = (&'static str, fn(&Path) -> std::io::Result<()>);

fn edit(path: &Path, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> std::io::Result<()> {
    fs::write(path, change(fs::read(path)?))
}

/// What may have become of a journal, and whether the call can be taken up from it even so.
const DAMAGES: [(bool, Damage); 12] = [
    (false, ("nothing in it", |path| fs::write(path, ""))),
    (false, ("noise", |path| fs::write(path, voice(77, 8_000)))),
    (
        false,
        ("a directory in its place", |path| {
            fs::remove_file(path).and_then(|()| fs::create_dir(path))
        }),
    ),
    (
        false,
        ("the first line is spoilt", |path| {
            edit(path, |text| [b"{\"at\":".to_vec(), text].concat())
        }),
    ),
    (
        false,
        ("JSON of other kinds", |path| {
            fs::write(path, "null\n[]\n7\n{\"event\":7}\n{\"event\":\"ring\",\"callSid\":{}}\n{}\n")
        }),
    ),
    (
        false,
        ("another call's", |path| {
            edit(path, |text| String::from_utf8_lossy(&text).replace("\"CA", "\"CB").into_bytes())
        }),
    ),
    (
        true,
        ("half a last line", |path| {
            edit(path, |text| [text, b"{\"at\":\"2026-11-23T01:50:00Z\",\"ev".to_vec()].concat())
        }),
    ),
    (
        true,
        ("zeros at the end, as after a power cut", |path| {
            edit(path, |text| [text, vec![0; 4_096]].concat())
        }),
    ),
    (
        true,
        ("garbage between the lines", |path| {
            edit(path, |text| {
                let text = String::from_utf8_lossy(&text).replace('\n', "\n\u{FFFD}{{]\n\n");
                [text.as_bytes(), b"\xFF\xFE\n"].concat()
            })
        }),
    ),
    (
        true,
        ("every line twice", |path| {
            edit(path, |text| {
                let lines = text.split_inclusive(|byte| *byte == b'\n');
                lines.flat_map(|line| [line, line]).collect::<Vec<_>>().concat()
            })
        }),
    ),
    (
        true,
        ("numbers beyond all bounds", |path| {
            edit(path, |text| {
                let odd = format!(
                    "{{\"at\":\"9999-12-30T00:00:00Z\",\"event\":\"agent\",\"agent\":{},\
                 \"callId\":\"c\"}}\n{{\"at\":\"-009999-01-02T00:00:00Z\",\"event\":\"said\",\
                 \"agent\":-1,\"ordinal\":1e300}}\n{{\"event\":\"stage\",\"stage\":\"../..\"}}\n",
                    u64::MAX
                );
                [text, odd.into_bytes()].concat()
            })
        }),
    ),
    (
        true,
        ("no read permission, and a very long line", |path| {
            edit(path, |text| [text, vec![b'{'; 4 << 20]].concat())?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o644))
        }),
    ),
];

#[test]
fn a_damaged_journal_leads_to_an_apology_or_to_the_agent_and_never_to_a_crash() -> Outcome {
    for (usable, (name, damage)) in DAMAGES {
        let world = builder().start()?;
        let bystander = connect_and_talk(&world)?;
        let call = connect_and_talk(&world)?;
        written(&world, &bystander.ringing.call_sid, &bystander.agent)?;
        written(&world, &call.ringing.call_sid, &call.agent)?;
        world.bridge.kill();
        let sid = &call.ringing.call_sid;
        let journals = world.journals();
        let its = |path: &&PathBuf| path.to_string_lossy().contains(sid.as_str());
        let journal = journals.iter().find(its).ok_or("no journal")?;
        damage(journal).map_err(|error| format!("{name}: {error}"))?;
        world.bridge.restart()?;
        let answer = call.ringing.next(&world, &[])?;
        if usable {
            let agent = world.ultravox.next_call(PATIENCE)?;
            let phone = answer.open_stream(&world)?;
            caller_hears(&phone, &agent, "Where were we?", 8)
                .map_err(|error| format!("{name}: {error:?}"))?;
            phone.hang_up()?;
            let post = filed(&world, 1)?.swap_remove(0);
            assert_eq!(post.json["callSid"], *sid, "{name}");
            let text = post.json["data"].as_str().unwrap_or_default();
            assert!(text.contains("Agent: Where were we?"), "{name}: {text}");
        } else {
            assert_eq!(answer.twiml.said, [phrase("apology")], "{name}: {}", answer.twiml.xml);
        }
        // The next journal is not affected.
        let again = take_up(&world, &bystander.ringing)?;
        caller_hears(&again.phone, &again.agent, "Where were we?", 9)?;
    }
    Ok(())
}

/// Whoever reads n8n's list must find what was said, and to which call it belongs.
#[test]
fn what_is_left_of_a_journal_without_its_first_line_is_filed_under_its_call() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    written(&world, &call.ringing.call_sid, &call.agent)?;
    world.bridge.kill();
    let journal = only_journal(&world)?;
    edit(&journal, |text| [b"###".to_vec(), text].concat())?;
    shift_journal(&journal, 120)?;
    world.bridge.restart()?;
    let post = filed(&world, 1)?.swap_remove(0);
    assert_eq!(post.json["data"], TALK);
    assert_eq!(post.json["callSid"], call.ringing.call_sid);
    assert_eq!(post.header("idempotency-key"), Some(&*format!("{}-2", call.ringing.call_sid)));
    Ok(())
}

#[track_caller]
fn only_journal(world: &World) -> Result<PathBuf, Trouble> {
    match <[PathBuf; 1]>::try_from(world.journals()) {
        Ok([journal]) => Ok(journal),
        Err(journals) => Err(world.trouble(format!("not one journal: {journals:?}"))),
    }
}

/// The same line, so many seconds earlier.
fn shifted(line: &str, secs: i64) -> Result<String, Box<dyn Error + Send + Sync>> {
    let Ok(mut event) = serde_json::from_str::<Value>(line) else {
        return Ok(line.to_owned());
    };
    if let Some(at) = event["at"].as_str() {
        let at: jiff::Timestamp = at.parse()?;
        event["at"] = json!(at.checked_sub(jiff::SignedDuration::from_secs(secs))?.to_string());
    }
    Ok(event.to_string())
}

/// As if all in it had happened so many seconds earlier.
fn shift_journal(path: &Path, secs: i64) -> Outcome {
    let text = String::from_utf8_lossy(&fs::read(path)?).into_owned();
    let lines = text.lines().map(|line| shifted(line, secs)).collect::<Result<Vec<_>, _>>()?;
    fs::write(path, lines.join("\n") + "\n")?;
    Ok(())
}

// ============================================================================
// The process is asked to stop
// ============================================================================

#[test]
fn a_process_without_calls_stops_at_once() -> Outcome {
    for signal in ["TERM", "INT"] {
        let world = builder().start()?;
        world.bridge.signal(signal)?;
        world.bridge.wait_for_log("told to stop: no new calls; none is in progress")?;
        assert_eq!(world.bridge.wait_exit(EXIT_WITHIN)?.code(), Some(0), "{signal}");
    }
    Ok(())
}

/// Whoever has read the line may rely on it. Here nobody reads it, so that it cannot be said at
/// all, and yet no call is taken any more.
#[test]
fn a_process_told_to_stop_takes_no_call_before_it_says_so() -> Outcome {
    let world = builder().setting("LOG_LEVEL", "info").asleep().start()?;
    let (mut log, stderr) = io::pipe()?;
    let mut command = world.bridge.command_in(env!("CARGO_BIN_EXE_callbridge"), &[]);
    command.env("PORT", "0").stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
    let bridge = Reaped(command.spawn()?);
    // No other copy of the writing end: should the process die, the log ends.
    drop(command);
    let mut said = BufReader::new(&mut log);
    let address = loop {
        let mut line = String::new();
        assert!(said.read_line(&mut line)? > 0, "it ended before it listened");
        if let Some((_, address)) = line.split_once("listening on ") {
            break address.trim_end().to_owned();
        }
    };
    let status = |path: &str| -> io::Result<String> {
        let mut socket = TcpStream::connect(&address)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        write!(socket, "GET {path} HTTP/1.1\r\nHost: bridge.example\r\n\r\n")?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        Ok(answer.split(' ').nth(1).unwrap_or_default().to_owned())
    };
    let becomes = |wanted: &str| {
        let deadline = Instant::now() + PATIENCE;
        while status("/ready")? != wanted {
            if Instant::now() > deadline {
                return Err(format!("/ready does not become {wanted}").into());
            }
        }
        Ok::<(), Box<dyn Error + Send + Sync>>(())
    };
    becomes("200")?;
    fill(&format!("/proc/{}/fd/2", bridge.0.id()))?;
    Command::new("kill").args(["-TERM", &bridge.0.id().to_string()]).status()?;
    becomes("503")
}

/// Writes into a pipe that nobody reads until nothing fits in.
fn fill(pipe: &str) -> io::Result<()> {
    const O_NONBLOCK: i32 = 0o4000;
    let mut pipe = fs::OpenOptions::new().write(true).custom_flags(O_NONBLOCK).open(pipe)?;
    for size in [4_096, 1] {
        loop {
            match pipe.write(&vec![b' '; size]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                written => written?,
            };
        }
    }
    Ok(())
}

/// A process that does not outlive its test.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn a_process_told_to_stop_sees_its_calls_to_their_end() -> Outcome {
    for (signal, fallback) in [("TERM", ""), ("INT", COLLEAGUE)] {
        let world = builder().setting("FALLBACK_NUMBER", fallback).start()?;
        let call = connect_and_talk(&world)?;
        world.bridge.signal(signal)?;
        world.bridge.wait_for_log("told to stop: no new calls; 1 call may go on for 300 s")?;

        let refused = world.ring("+4930111222")?;
        if fallback.is_empty() {
            assert_eq!(refused.twiml.said, [phrase("closing")]);
            assert!(refused.twiml.hangs_up);
        } else {
            assert_eq!(refused.twiml.dial.as_deref(), Some(COLLEAGUE));
        }
        caller_hears(&call.phone, &call.agent, "Go on.", 8)?;
        agent_hears(&call.agent, &call.phone, 7)?;
        // Faults do not end it either.
        call.agent.drop_line();
        let next = world.ultravox.next_call(PATIENCE)?;
        caller_hears(&call.phone, &next, "Sorry, go on.", 9)?;
        let told = call.agent.texts().into_iter().chain(next.texts());
        let hang_ups = told.filter(|text| text["type"] == "hang_up").count();
        assert_eq!(hang_ups, 0, "told to hang up, although there was time");
        let farewell = next.invoke("hangUp", &json!({"reason": "done"}))?;
        next.wait_result(&farewell)?;
        // The last words are not final when the agent leaves.
        next.begin_saying("Goodbye.", &pcm_of(&voice(10, 100)))?;
        next.close()?;
        assert_eq!(world.bridge.wait_exit(EXIT_WITHIN)?.code(), Some(0));
        wait_voice(&call.phone, &voice(10, 100)).or_else(|error| {
            if contains(&call.phone.heard_audio(), &voice(10, 100)) { Ok(()) } else { Err(error) }
        })?;
        let post = filed(&world, 1)?.swap_remove(0);
        let wanted = format!("{TALK}\nAgent: Go on.\nAgent: Sorry, go on.\nAgent: Goodbye.");
        assert_eq!(post.json["data"], wanted);
        assert_eq!(post.json["endedBy"], "AgentHungUp");
        let events = world.journal(&call.ringing.call_sid);
        assert_eq!(events.last().map(|event| &event["event"]), Some(&json!("delivered")));
        assert_eq!(world.ultravox.requests(), 2);
    }
    Ok(())
}

#[test]
fn a_stopping_process_leaves_what_n8n_does_not_take_on_disk() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    world.n8n.set_reply("2", Reply::Reset);
    world.bridge.ask_to_stop()?;
    world.bridge.wait_for_log("told to stop")?;
    call.agent.begin_saying("Goodbye.", &[])?;
    caught_up(&call.agent)?;
    call.phone.hang_up()?;
    assert_eq!(world.bridge.wait_exit(EXIT_WITHIN)?.code(), Some(0));
    assert_eq!(world.n8n.requests_of("2").len(), 1, "not even tried");
    world.n8n.set_reply("2", Reply::json(200, &json!({})));
    world.bridge.restart()?;
    let posts = filed(&world, 2)?;
    assert_eq!(posts[1].json["data"], format!("{TALK}\nAgent: Goodbye."));
    assert_eq!(posts[1].header("idempotency-key"), posts[0].header("idempotency-key"));
    Ok(())
}

/// Twilio asks what comes next when the stream of the last call is over.
#[test]
fn a_stopping_process_stays_for_the_last_question() -> Outcome {
    let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    let call = connect_and_talk(&world)?;
    world.bridge.ask_to_stop()?;
    world.bridge.wait_for_log("told to stop")?;
    let wish = call.agent.invoke("transfer_to_person", &reason())?;
    call.agent.wait_result(&wish)?;
    call.agent.close()?;
    call.phone.wait_closed()?;
    // Twilio takes its time.
    wait_for_event(&world, &call.ringing.call_sid, "transfer")?;
    assert_dials(&call.ringing.next(&world, &[])?);
    assert_eq!(world.bridge.wait_exit(EXIT_WITHIN)?.code(), Some(0));
    // How the transfer went is another process's business.
    world.bridge.restart()?;
    assert_hangup(&call.ringing.next(&world, &CONNECTED)?);
    assert_eq!(the_transcript(&world)?, (TALK.to_owned(), "Transferred".to_owned()));
    Ok(())
}

#[test]
fn when_the_time_to_drain_is_over_the_agent_says_goodbye() -> Outcome {
    let world = builder().setting("DRAIN_SECONDS", 1).start()?;
    let call = connect_and_talk(&world)?;
    world.bridge.ask_to_stop()?;
    let told = call.agent.wait_text("hang_up", |text| text["type"] == "hang_up")?;
    assert_eq!(told["message"], phrase("cut_short"));
    let farewell = voice(9, 400);
    call.agent.say(&phrase("cut_short"), &pcm_of(&farewell))?;
    call.agent.close()?;
    assert_eq!(call.phone.wait_closed()?, Heard::Closed(Some(1000)));
    assert!(contains(&call.phone.heard_audio(), &farewell), "cut off in the middle of goodbye");
    let heard = call.phone.echoes().last().map(|(at, _)| *at).ok_or("no mark came back")?;
    assert!(call.phone.heard().last().is_some_and(|end| end.at >= heard), "cut off");
    assert_eq!(world.bridge.wait_exit(EXIT_WITHIN)?.code(), Some(0));
    let post = filed(&world, 1)?.swap_remove(0);
    assert_eq!(post.json["data"], format!("{TALK}\nAgent: {}", phrase("cut_short")));
    assert_eq!(post.json["endedBy"], "ShuttingDown");
    Ok(())
}

fn an_agent_that_will_not_go_does_not_keep_the_process() -> Outcome {
    let world = builder().setting("DRAIN_SECONDS", 0).start()?;
    world.ultravox.answer_pings(true);
    let call = connect_and_talk(&world)?;
    world.bridge.ask_to_stop()?;
    call.agent.wait_text("hang_up", |text| text["type"] == "hang_up")?;
    assert_eq!(world.bridge.wait_exit(LONG_PATIENCE)?.code(), Some(0));
    call.agent.wait_closed()?;
    assert!(call.phone.wait_closed().is_ok());
    let post = filed(&world, 1)?.swap_remove(0);
    assert_eq!((&post.json["data"], &post.json["endedBy"]), (&json!(TALK), &json!("ShuttingDown")));
    Ok(())
}

#[test]
fn a_second_signal_ends_the_process_at_once_and_loses_nothing() -> Outcome {
    for signals in [["TERM", "TERM"], ["INT", "INT"], ["TERM", "INT"]] {
        let world = builder().start()?;
        let call = connect_and_talk(&world)?;
        world.bridge.signal(signals[0])?;
        world.bridge.wait_for_log("told to stop")?;
        caller_hears(&call.phone, &call.agent, "Go on.", 8)?;
        caught_up(&call.agent)?;
        let begun = Instant::now();
        world.bridge.signal(signals[1])?;
        assert_eq!(world.bridge.wait_exit(EXIT_WITHIN)?.code(), Some(0));
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(5), "{signals:?} took {took:?}");
        // And with another process the call even goes on.
        world.bridge.restart()?;
        let again = take_up(&world, &call.ringing)?;
        assert_goes_on(&again.agent, &call.agent, &call.ringing.call_sid);
        again.phone.hang_up()?;
        assert_eq!(the_transcript(&world)?.0, format!("{TALK}\nAgent: Go on."));
    }
    Ok(())
}

// ============================================================================
// The outbox
// ============================================================================

fn text_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn what_n8n_does_not_take_waits_is_listed_and_can_be_sent_by_hand() -> Outcome {
    let world = builder().start()?;
    world.n8n.set_reply("2", Reply::json(503, &json!({"message": "no room"})));
    let call = connect_and_talk(&world)?;
    let running = connect_and_talk(&world)?;
    call.phone.hang_up()?;
    world.bridge.wait_for_log("n8n: 503")?;
    written(&world, &running.ringing.call_sid, &running.agent)?;
    world.bridge.kill();

    let list = world.bridge.run(&["outbox"])?;
    let text = text_of(&list);
    assert_eq!(list.status.code(), Some(0), "{text}");
    assert!(text.contains(&call.ringing.call_sid) && text.contains("+49…1820, 2 lines"), "{text}");
    assert!(text.contains("n8n: 503") && text.contains("no room"), "without a reason: {text}");
    assert!(text.ends_with("\n1 transcript waits for n8n\n"), "{text}");
    assert!(!text.contains(&running.ringing.call_sid), "that one may be taken up: {text}");

    let failed = world.bridge.run(&["outbox", "--retry"])?;
    assert_eq!(failed.status.code(), Some(1), "{}", text_of(&failed));
    assert!(text_of(&failed).contains("tried now: n8n: 503"), "{}", text_of(&failed));
    let complaint = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(complaint.contains("n8n has not taken them all"), "{complaint}");

    world.n8n.set_reply("2", Reply::json(200, &json!({})));
    let sent = world.bridge.run(&["outbox", "--retry"])?;
    assert_eq!(sent.status.code(), Some(0), "{}", text_of(&sent));
    assert!(text_of(&sent).contains("delivered now"), "{}", text_of(&sent));
    assert!(text_of(&sent).ends_with("0 transcripts wait for n8n\n"), "{}", text_of(&sent));
    assert_eq!(text_of(&world.bridge.run(&["outbox"])?), "0 transcripts wait for n8n\n");

    let posts = filed(&world, 3)?;
    let key = format!("{}-2", call.ringing.call_sid);
    for post in &posts {
        assert_eq!(post.header("idempotency-key"), Some(&*key));
        assert_eq!(post.raw, posts[0].raw, "not the same transcript at every try");
    }
    assert_eq!(posts[2].json["data"], TALK);
    // The server knows it as well.
    world.bridge.restart()?;
    running.ringing.call_status(&world, "completed")?;
    assert_eq!(filed(&world, 4)?[3].json["callSid"], running.ringing.call_sid);
    Ok(())
}

#[test]
fn what_waits_is_delivered_after_a_restart() -> Outcome {
    let world = builder().start()?;
    for reply in [
        Reply::Reset,
        Reply::json(500, &json!({})),
        Reply::json(404, &json!({"message": "The requested webhook is not registered."})),
        Reply::text(302, None, ""),
    ] {
        world.n8n.set_reply("2", reply);
        let seen = world.bridge.log().len();
        let call = connect_and_talk(&world)?;
        call.phone.hang_up()?;
        world.bridge.wait_for_log_since(seen, "next try in")?;
        world.n8n.set_reply("2", Reply::text(200, Some("text/html"), "thank you"));
        let before = world.n8n.requests_of("2").len();
        world.bridge.restart()?;
        let posts = filed(&world, before + 1)?;
        let [.., failed, taken] = posts.as_slice() else { return Err("two tries".into()) };
        assert_eq!(failed.raw, taken.raw);
        assert_eq!(failed.header("idempotency-key"), taken.header("idempotency-key"));
        wait_for_event(&world, &call.ringing.call_sid, "delivered")?;
    }
    // Delivered is delivered.
    let delivered = world.n8n.requests_of("2").len();
    world.bridge.restart()?;
    let call = connect_and_talk(&world)?;
    call.phone.hang_up()?;
    assert_eq!(filed(&world, delivered + 1)?[delivered].json["callSid"], call.ringing.call_sid);
    Ok(())
}

/// Two things in one, since both wait for the same: the pauses double, and what was sent by hand
/// in the meantime is not sent again.
fn tries_to_deliver_come_ever_later() -> Outcome {
    let world = builder().start()?;
    world.n8n.set_reply("2", Reply::json(503, &json!({})));
    let by_hand = connect_and_talk(&world)?;
    by_hand.phone.hang_up()?;
    world.bridge.wait_for_log("next try in")?;
    world.n8n.reply_next("2", Reply::json(200, &json!({})));
    let sent = world.bridge.run(&["outbox", "--retry"])?;
    assert!(text_of(&sent).contains("delivered now"), "{}", text_of(&sent));

    let call = connect_and_talk(&world)?;
    let seen = world.bridge.log().len();
    call.phone.hang_up()?;
    world.n8n.wait_for("2", 5, LONG_PATIENCE)?;
    world
        .bridge
        .wait_for_log_since(seen, "next try in 2")
        .or_else(|_| world.bridge.wait_for_log_since(seen, "next try in 1"))?;
    let posts = filed(&world, 5)?;
    let its: Vec<_> =
        posts.iter().filter(|post| post.json["callSid"] == call.ringing.call_sid).collect();
    assert_eq!(its.len(), 3, "what was sent by hand was sent again");
    for (pair, pause) in its.windows(2).zip([5.0, 10.0]) {
        let took = (pair[1].at - pair[0].at).as_secs_f64();
        // A quarter more or less, and a machine that stumbles.
        assert!(took >= 0.75 * pause - 0.1 && took < 1.25 * pause + 5.0, "{pause} s: {took}");
    }
    let log = world.bridge.log();
    let pauses = log.iter().skip(seen).filter_map(|line| line.split_once("next try in "));
    let pauses: Vec<u64> =
        pauses.filter_map(|(_, pause)| pause.trim_end_matches(" s").parse().ok()).collect();
    let [first, second, third] = pauses.as_slice() else {
        return Err(format!("not three pauses: {pauses:?}").into());
    };
    assert!((3..=6).contains(first) && (7..=12).contains(second), "{pauses:?}");
    assert!((15..=25).contains(third), "{pauses:?}");
    Ok(())
}

fn a_hanging_delivery_holds_up_nobody() -> Outcome {
    let world = builder().start()?;
    let calls = [connect_and_talk(&world)?, connect_and_talk(&world)?, connect_and_talk(&world)?];
    world.n8n.reply_next("2", Reply::Hang);
    let [hanging, others @ ..] = &calls;
    hanging.phone.hang_up()?;
    world.n8n.wait_for("2", 1, PATIENCE)?;
    let begun = Instant::now();
    for call in others {
        call.phone.hang_up()?;
    }
    world.n8n.wait_for("2", 3, PATIENCE)?;
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(5), "held up for {took:?}");
    // New calls are not held up either, and the hanging one gets its second try.
    let call = connect_and_talk(&world)?;
    caller_hears(&call.phone, &call.agent, "Yes?", 8)?;
    let posts = world.n8n.wait_for("2", 4, LONG_PATIENCE)?;
    assert_eq!(posts[3].json["callSid"], hanging.ringing.call_sid);
    world.bridge.wait_for_log("no answer within 10000 ms; the transcript stays")?;
    Ok(())
}

/// A journal as an earlier process has left it, with an end or without.
fn write_journal(world: &World, sid: &str, age_secs: i64, ended: bool) -> Outcome {
    let then = jiff::Timestamp::now().checked_sub(jiff::SignedDuration::from_secs(age_secs))?;
    let name = format!("{}-{sid}.jsonl", then.strftime("%Y%m%dT%H%M%SZ"));
    let mut events = vec![
        json!({"event": "ring", "callSid": sid, "number": CALLER}),
        json!({"event": "agent", "callId": "c1", "agent": 1}),
        json!({"event": "said", "agent": 1, "ordinal": 0, "speaker": "Agent", "text": "Hello."}),
    ];
    if ended {
        events.push(json!({"event": "end", "endedBy": "CallerLeft"}));
    }
    let lines = events.into_iter().map(|mut event| {
        event["at"] = json!(then.to_string());
        event.to_string() + "\n"
    });
    fs::create_dir_all(world.data_dir().join("calls"))?;
    fs::write(world.data_dir().join("calls").join(name), lines.collect::<String>())?;
    Ok(())
}

fn made_up_sid(number: usize) -> String {
    format!("CA{number:032x}")
}

#[test]
fn the_oldest_transcripts_go_first() -> Outcome {
    // Four wait for their summaries, and four are being delivered.
    const ON_THE_WAY: usize = 8;
    let world = builder().start()?;
    world.bridge.kill();
    for number in 0..40_usize {
        let age = i64::try_from(4_000 - 10 * number)?;
        write_journal(&world, &made_up_sid(number), age, true)?;
    }
    world.bridge.restart()?;
    for (place, post) in filed(&world, 40)?.into_iter().enumerate() {
        let sid = post.json["callSid"].as_str().unwrap_or_default().to_owned();
        let number = usize::from_str_radix(sid.trim_start_matches("CA"), 16)?;
        // It may be overtaken by any, but only by so many while it is on its way itself.
        assert!(number < place + ON_THE_WAY, "{number} came as number {place}");
    }
    Ok(())
}

#[test]
fn after_three_days_a_transcript_is_kept_and_reported() -> Outcome {
    const HOUR: i64 = 3_600;
    let world = builder().start()?;
    world.bridge.kill();
    // One with an end, one whose process died and never came back.
    let (ended, died, young) = (made_up_sid(1), made_up_sid(2), made_up_sid(3));
    write_journal(&world, &ended, 73 * HOUR, true)?;
    write_journal(&world, &died, 74 * HOUR, false)?;
    write_journal(&world, &young, 71 * HOUR, true)?;
    world.bridge.restart()?;
    world.bridge.wait_for_log("2 transcripts were never delivered: see callbridge outbox")?;
    let post = filed(&world, 1)?.swap_remove(0);
    assert_eq!(post.json["callSid"], young);
    world.bridge.wait_for_log("n8n has the transcript")?;
    world.bridge.kill();
    assert_eq!(world.journals().len(), 3, "deleted");

    let list = text_of(&world.bridge.run(&["outbox"])?);
    assert!(list.contains(&format!("{ended} +49…1820, 1 line, 3 days old")), "{list}");
    assert!(list.contains(&format!("{died} +49…1820, 1 line, 3 days old")), "{list}");
    assert!(list.ends_with("2 transcripts wait for n8n\n"), "{list}");
    // A failed try makes it no younger.
    world.n8n.reply_next("2", Reply::Reset);
    world.n8n.reply_next("2", Reply::Reset);
    assert_eq!(world.bridge.run(&["outbox", "--retry"])?.status.code(), Some(1));
    let list = text_of(&world.bridge.run(&["outbox"])?);
    assert!(list.matches("3 days old: n8n: ").count() == 2, "{list}");
    assert_eq!(world.bridge.run(&["outbox", "--retry"])?.status.code(), Some(0));
    let posts = filed(&world, 5)?;
    assert_eq!(posts[3].json["endedBy"], "ProcessDied");
    assert_eq!(posts[4].json["endedBy"], "CallerLeft");
    Ok(())
}

/// Its clock may be wrong, and is set right soon. A unit test sees them go in their time.
#[test]
fn a_start_removes_no_journal_however_old() -> Outcome {
    const DAY: i64 = 86_400;
    let world = builder().setting("KEEP_DAYS", 2).start()?;
    world.bridge.wait_for_log("journals of calls that are not filed")?;
    world.bridge.kill();
    let seen = world.bridge.log().len();
    for (number, days) in [(1, 3), (2, 3), (3, 1)] {
        write_journal(&world, &made_up_sid(number), days * DAY + 60, true)?;
    }
    for path in world.journals() {
        // All but the second have been delivered, when they were young.
        if !path.to_string_lossy().contains(&made_up_sid(2)) {
            let text = fs::read_to_string(&path)?;
            let last = text.lines().last().ok_or("an empty journal")?;
            fs::write(&path, format!("{text}{}\n", last.replace("\"end\"", "\"delivered\"")))?;
        }
    }
    world.bridge.restart()?;
    world.bridge.wait_for_log_since(seen, "journals of calls that are not filed")?;
    assert_eq!(world.journals().len(), 3, "deleted");
    Ok(())
}

#[test]
fn without_n8n_transcripts_stay_on_disk() -> Outcome {
    let world = builder().without("N8N_WEBHOOK_URL").start()?;
    let call = connect(&world)?;
    call.agent.user_said("My window is broken.")?;
    caught_up(&call.agent)?;
    call.phone.hang_up()?;
    world.bridge.wait_for_log("9 after    the transcript is in ")?;
    wait_for_event(&world, &call.ringing.call_sid, "end")?;
    world.bridge.restart()?;
    world.bridge.wait_for_log("9 after    the transcript is in ")?;
    let events = world.journal(&call.ringing.call_sid);
    assert!(events.iter().any(|event| event["text"] == "My window is broken."), "{events:?}");
    Ok(())
}

// ============================================================================
// The disk
// ============================================================================

/// The whole call, on a disk that does not take it. There is one error, and all else is as ever.
#[track_caller]
fn served_without_a_disk(world: &World) -> Result<(), Trouble> {
    for round in 0..2 {
        let call = connect_and_talk(world)?;
        caller_hears(&call.phone, &call.agent, "Go on.", 8)?;
        agent_hears(&call.agent, &call.phone, 7)?;
        call.phone.hang_up()?;
        let posts = filed(world, round + 1)?;
        assert_eq!(posts[round].json["data"], format!("{TALK}\nAgent: Go on."));
    }
    let log = world.bridge.log();
    let errors: Vec<_> = log.iter().filter(|line| line.contains("error: ")).collect();
    assert_eq!(errors.len(), 1, "{errors:#?}");
    assert!(errors[0].contains("calls go on, transcripts wait in memory only"), "{errors:?}");
    Ok(())
}

#[test]
fn there_is_a_file_where_the_data_should_be() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let path = scratch.path().join("data");
    fs::write(&path, "in the way")?;
    let world = builder().setting("DATA_DIR", path.display()).start()?;
    served_without_a_disk(&world)?;
    assert_eq!(fs::read_to_string(&path)?, "in the way");
    Ok(())
}

#[test]
fn the_data_directory_cannot_be_made() -> Outcome {
    // Nobody, not even root, makes directories there.
    let world = builder().setting("DATA_DIR", "/proc/callbridge").start()?;
    served_without_a_disk(&world)?;
    Ok(())
}

/// The bridge behind a limit on the size of files: writes fail in the middle of a line, as they do
/// on a full disk.
pub(crate) fn on_a_full_disk(
    scratch: &TempDir,
    half_kibibytes: u32,
) -> std::io::Result<WorldBuilder> {
    let script = scratch.path().join("callbridge");
    let text = format!(
        "#!/bin/sh\ntrap '' XFSZ\nulimit -f {half_kibibytes}\nexec '{}' \"$@\"\n",
        env!("CARGO_BIN_EXE_callbridge")
    );
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(World::builder(script))
}

#[test]
fn the_disk_is_full() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let world = on_a_full_disk(&scratch, 0)?.start()?;
    served_without_a_disk(&world)?;
    Ok(())
}

#[test]
fn the_disk_fills_up_in_the_middle_of_a_call() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let world = on_a_full_disk(&scratch, 2)?.start()?;
    let call = connect_and_talk(&world)?;
    let mut lines = vec![TALK.to_owned()];
    for round in 0..20 {
        let line = format!("Sentence {round} of a story that is longer than the disk is large.");
        call.agent.user_said(&line)?;
        lines.push(format!("User: {line}"));
    }
    caller_hears(&call.phone, &call.agent, "Go on.", 8)?;
    lines.push("Agent: Go on.".to_owned());
    call.phone.hang_up()?;
    assert_eq!(filed(&world, 1)?[0].json["data"], lines.join("\n"));
    let size = fs::metadata(only_journal(&world)?)?.len();
    assert_eq!(size, 1_024, "the disk was not full");
    let errors = world.bridge.log();
    let errors: Vec<_> = errors.iter().filter(|line| line.contains("error: ")).collect();
    assert_eq!(errors.len(), 1, "{errors:#?}");
    Ok(())
}

#[test]
fn the_journals_are_deleted_in_the_middle_of_a_call() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    fs::remove_dir_all(world.data_dir())?;
    caller_hears(&call.phone, &call.agent, "Go on.", 8)?;
    agent_hears(&call.agent, &call.phone, 7)?;
    call.agent.user_said("Never mind.")?;
    caught_up(&call.agent)?;
    world.n8n.set_reply("2", Reply::json(503, &json!({})));
    call.phone.hang_up()?;
    world.bridge.wait_for_log("next try in")?;
    let log = world.bridge.log();
    let errors: Vec<_> = log.iter().filter(|line| line.contains("error: ")).collect();
    assert_eq!(errors.len(), 1, "{errors:#?}");
    // What n8n has not taken is on disk again: even a kill does not lose it now.
    world.n8n.set_reply("2", Reply::json(200, &json!({})));
    world.bridge.restart()?;
    let posts = filed(&world, 2)?;
    assert_eq!(posts[1].json["data"], format!("{TALK}\nAgent: Go on.\nUser: Never mind."));
    assert_eq!(posts[1].json["number"], CALLER);
    Ok(())
}

// ============================================================================
// Money
// ============================================================================

#[test]
fn the_lines_are_counted_exactly_however_many_ring_at_once() -> Outcome {
    let world = builder().setting("MAX_CALLS", 5).start()?;
    // All of them ring before the first is answered.
    world.ultravox.take_time(Duration::from_millis(700));
    let ring = |number: usize| world.ring(&format!("+49309018{number:02}"));
    let answers = thread::scope(|scope| {
        let rings: Vec<_> = (0..20).map(|number| scope.spawn(move || ring(number))).collect();
        rings.into_iter().map(thread::ScopedJoinHandle::join).collect::<Result<Vec<_>, _>>()
    });
    let answers = answers.map_err(|_| "a ringing thread panicked")?;
    let answers = answers.into_iter().collect::<Result<Vec<_>, _>>()?;
    let (served, busy): (Vec<_>, Vec<_>) =
        answers.into_iter().partition(|ringing| ringing.twiml.stream_url.is_some());
    assert_eq!((served.len(), busy.len()), (5, 15));
    for ringing in &busy {
        assert_eq!(ringing.twiml.said, [phrase("busy")]);
        assert!(ringing.twiml.hangs_up);
        assert!(ringing.answer.took < Duration::from_secs(5), "{:?}", ringing.answer.took);
    }
    assert_eq!(world.ultravox.requests(), 5);
    // A line that is given back is given out again, once.
    let phone = served[0].open_stream(&world)?;
    phone.hang_up()?;
    world.bridge.wait_for_log("nothing was said")?;
    let deadline = Instant::now() + PATIENCE;
    while world.ring(CALLER)?.twiml.stream_url.is_none() {
        // It is given back right after the log has said so.
        assert!(Instant::now() < deadline, "the line was not given back");
    }
    assert!(world.ring(CALLER)?.twiml.stream_url.is_none());
    assert_eq!(world.ultravox.requests(), 6);
    Ok(())
}

#[test]
fn a_number_that_calls_too_often_hears_that_all_lines_are_busy() -> Outcome {
    let world = builder().setting("CALLS_PER_NUMBER_PER_HOUR", 2).start()?;
    for _ in 0..2 {
        assert!(world.ring(CALLER)?.twiml.stream_url.is_some());
    }
    for _ in 0..2 {
        let refused = world.ring(CALLER)?;
        assert_eq!(refused.twiml.said, [phrase("busy")]);
        assert!(refused.twiml.hangs_up && refused.twiml.stream_url.is_none());
    }
    world.bridge.wait_for_log("+49…1820 calls too often")?;
    // Others are not meant, nor those who may be anybody.
    assert!(world.ring("+4930901821")?.twiml.stream_url.is_some());
    for _ in 0..4 {
        assert!(world.ring("anonymous")?.twiml.stream_url.is_some());
    }
    assert_eq!(world.ultravox.requests(), 7);
    // A refused call takes no line and leaves no journal.
    assert_eq!(world.journals().len(), 7);
    Ok(())
}

#[test]
fn ultravox_is_told_how_long_a_call_may_last() -> Outcome {
    for (setting, wanted) in [("", "1800s"), ("90", "90s")] {
        let world = builder().setting("MAX_CALL_SECONDS", setting).start()?;
        let call = connect(&world)?;
        assert_eq!(call.agent.request()["maxDuration"], wanted);
        // A second agent gets the rest, not all of it again.
        call.agent.drop_line();
        let next = world.ultravox.next_call(PATIENCE)?;
        let rest = next.request()["maxDuration"].as_str().unwrap_or_default().to_owned();
        let secs = |text: &str| text.trim_end_matches('s').parse::<u64>().unwrap_or_default();
        assert!(secs(&rest) <= secs(wanted) && secs(&rest) + 20 > secs(wanted), "{rest}");
    }
    Ok(())
}

// ============================================================================
// What belongs to the owner, and calls that go out
// ============================================================================

const PERSON: &str = "+4930777888";

fn calling_out() -> WorldBuilder {
    builder()
        .setting("API_TOKEN", TOKEN)
        .setting("OUTGOING_ALLOW", "+4930,+4420")
        .setting("TWILIO_ACCOUNT_SID", ACCOUNT_SID)
        .setting("TWILIO_PHONE_NUMBER", OUR_NUMBER)
}

#[track_caller]
fn order_as(world: &World, authorization: &str, body: &Value) -> Result<HttpAnswer, Trouble> {
    let headers = [("Authorization", authorization), ("Content-Type", "application/json")];
    let headers = if authorization.is_empty() { &headers[1..] } else { &headers[..] };
    world.request("POST", "/outgoing-call", headers, body.to_string().as_bytes())
}

#[track_caller]
fn order(world: &World, body: &Value) -> Result<HttpAnswer, Trouble> {
    order_as(world, &format!("Bearer {TOKEN}"), body)
}

/// Somebody was rung, and has picked up.
#[track_caller]
fn ring_somebody(world: &World, first_message: &str) -> Result<Call, Trouble> {
    let answer = order(world, &json!({"phoneNumber": PERSON, "firstMessage": first_message}))?;
    let orders = world.twilio.wait_orders(1)?;
    let [placed] = orders.as_slice() else {
        return Err(world.trouble(format!("not one order: {orders:?}")));
    };
    assert_eq!((answer.status, &answer.json()), (201, &json!({"callSid": placed.sid})));
    let ringing = world.picks_up(placed)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(world)?;
    Ok(Call { ringing, agent, phone })
}

#[test]
fn without_a_token_of_its_owners_there_is_nothing_to_find() -> Outcome {
    let world = calling_out().without("API_TOKEN").start()?;
    let wish = json!({"phoneNumber": PERSON});
    for authorization in ["", "Bearer ", &format!("Bearer {TOKEN}"), "Basic Og=="] {
        let answer = order_as(&world, authorization, &wish)?;
        assert_eq!(answer.status, 404, "{authorization}");
        assert_eq!(answer.body, world.get("/no-such-thing")?.body, "{authorization}");
    }
    assert!(world.twilio.orders().is_empty());
    Ok(())
}

#[test]
fn only_the_owners_token_opens() -> Outcome {
    let world = calling_out().start()?;
    let wish = json!({"phoneNumber": PERSON});
    let basic = |login: &str| format!("Basic {}", BASE64.encode(login));
    let wrong = [
        String::new(),
        "Bearer".to_owned(),
        "Bearer ".to_owned(),
        "Bearer wrong".to_owned(),
        format!("Bearer {TOKEN}x"),
        format!("Bearer {}", TOKEN.to_uppercase()),
        format!("Bearer {}", &TOKEN[..TOKEN.len() - 1]),
        format!("Bearer{TOKEN}"),
        format!("Digest {TOKEN}"),
        TOKEN.to_owned(),
        "Basic !!!".to_owned(),
        basic(TOKEN),
        basic(&format!("{TOKEN}:")),
        basic(&format!("owner:{TOKEN}:more")),
        format!("Bearer {AUTH_TOKEN}"),
    ];
    for authorization in &wrong {
        let answer = order_as(&world, authorization, &wish)?;
        assert_eq!(answer.status, 401, "{authorization}: {}", answer.text());
        assert!(answer.json()["error"].is_string(), "{}", answer.text());
    }
    assert!(world.twilio.orders().is_empty());
    let right = [
        format!("Bearer {TOKEN}"),
        format!("bearer {TOKEN}"),
        basic(&format!("owner:{TOKEN}")),
        basic(&format!(":{TOKEN}")),
    ];
    for authorization in &right {
        let answer = order_as(&world, authorization, &wish)?;
        assert_eq!(answer.status, 201, "{authorization}: {}", answer.text());
    }
    assert_eq!(world.twilio.orders().len(), right.len());
    let log = world.bridge.log().join("\n");
    assert!(log.contains("API_TOKEN is missing or wrong") && !log.contains(TOKEN), "{log}");
    Ok(())
}

#[test]
fn nobody_is_rung_whom_the_owner_does_not_allow() -> Outcome {
    let world = calling_out().start()?;
    let long = "a".repeat(2_001);
    let refused = [
        (403, json!({"phoneNumber": "+4940777888"})),
        (403, json!({"phoneNumber": "+14155550123"})),
        (403, json!({"phoneNumber": "+88213777888"})),
        (400, json!({"phoneNumber": "4930777888"})),
        (400, json!({"phoneNumber": "+4930"})),
        (400, json!({"phoneNumber": "+4930777888,+14155550123"})),
        (400, json!({"phoneNumber": "+4930 777 888"})),
        (400, json!({"phoneNumber": "sip:+4930777888@example.com"})),
        (400, json!({"phoneNumber": 4_930_777_888_u64})),
        (400, json!({"phoneNumber": null})),
        (400, json!({})),
        (400, json!([])),
        (400, json!("+4930777888")),
        (400, json!({"phoneNumber": PERSON, "firstMessage": long})),
    ];
    for (status, wish) in refused {
        let answer = order(&world, &wish)?;
        assert_eq!(answer.status, status, "{wish}: {}", answer.text());
        assert!(answer.json()["error"].is_string(), "{}", answer.text());
    }
    let bearer = format!("Bearer {TOKEN}");
    let answer =
        world.request("POST", "/outgoing-call", &[("Authorization", &bearer)], b"{\"phone")?;
    assert_eq!(answer.status, 400, "{}", answer.text());
    assert!(world.twilio.orders().is_empty());

    // Without the setting, nobody at all.
    let world = calling_out().without("OUTGOING_ALLOW").start()?;
    assert_eq!(order(&world, &json!({"phoneNumber": PERSON}))?.status, 403);
    assert!(world.twilio.orders().is_empty());
    Ok(())
}

#[test]
fn what_calls_cannot_go_out_without() -> Outcome {
    for missing in ["TWILIO_ACCOUNT_SID", "TWILIO_AUTH_TOKEN", "TWILIO_PHONE_NUMBER"] {
        let world = calling_out().without(missing).start()?;
        let answer = order(&world, &json!({"phoneNumber": PERSON}))?;
        assert_eq!(answer.status, 503, "{missing}: {}", answer.text());
        assert!(answer.text().contains(missing), "{}", answer.text());
        assert!(world.twilio.orders().is_empty());
    }
    Ok(())
}

#[test]
fn what_twilio_objects_to_is_passed_on() -> Outcome {
    let world = calling_out().start()?;
    let cases = [
        (400, 400, 21_211, "The 'To' number is not a valid phone number."),
        (400, 400, 21_215, "Account not authorized to call +4930777888."),
        (429, 429, 20_429, "Too Many Requests"),
        (401, 502, 20_003, "Authenticate"),
        (403, 502, 20_003, "Forbidden"),
        (500, 502, 20_500, "Internal Server Error"),
    ];
    for (status, told, code, message) in cases {
        let refusal = json!({"code": code, "message": message, "status": status,
            "more_info": "https://www.twilio.com/docs/errors"});
        world.twilio.reply_next(Reply::json(status, &refusal));
        let answer = order(&world, &json!({"phoneNumber": PERSON}))?;
        assert_eq!(answer.status, told, "{}", answer.text());
        assert_eq!(answer.json()["code"], code, "{}", answer.text());
        let error = answer.json()["error"].as_str().unwrap_or_default().to_owned();
        assert!(error.contains(message), "{error}");
    }
    for odd in [Reply::Reset, Reply::text(200, None, "<html>"), Reply::json(201, &json!({}))] {
        world.twilio.reply_next(odd);
        let answer = order(&world, &json!({"phoneNumber": PERSON}))?;
        assert_eq!(answer.status, 502, "{}", answer.text());
        assert!(answer.json()["error"].is_string(), "{}", answer.text());
    }
    world.bridge.wait_for_log("Twilio did not make the call: 400, code Some(21211)")?;
    assert_eq!(world.ultravox.requests(), 0);
    let log = world.bridge.log().join("\n");
    assert!(!log.contains(PERSON), "a whole number in the log:\n{log}");
    Ok(())
}

#[test]
fn a_person_is_rung_and_talks_to_the_agent() -> Outcome {
    let world = calling_out().setting("MAX_CALL_SECONDS", 600).start()?;
    let wanted = "Hello, this is Sara about your claim.";
    let call = ring_somebody(&world, wanted)?;

    let placed = world.twilio.orders().swap_remove(0);
    assert_eq!(placed.path, format!("/2010-04-01/Accounts/{ACCOUNT_SID}/Calls.json"));
    assert_eq!(placed.login, Some((ACCOUNT_SID.to_owned(), AUTH_TOKEN.to_owned())));
    for (name, value) in [
        ("To", PERSON),
        ("From", OUR_NUMBER),
        ("TimeLimit", "600"),
        ("MachineDetection", "Enable"),
        ("AsyncAmd", "true"),
    ] {
        assert_eq!(placed.fields(name), [value], "{name}");
    }
    let events = ["initiated", "ringing", "answered", "completed"];
    assert_eq!(placed.fields("StatusCallbackEvent"), events);
    let url = placed.field("Url").unwrap_or_default();
    assert!(url.starts_with(&format!("{PUBLIC_URL}/incoming-call?outgoing=")), "{url}");
    // What Twilio tells of the call is told of this order.
    let status = url.replace("/incoming-call?", "/call-status?");
    for name in ["StatusCallback", "AsyncAmdStatusCallback"] {
        assert_eq!(placed.fields(name), [status.as_str()], "{name}");
    }

    // Who picks up speaks first, and is not asked about at n8n.
    let first = &call.agent.request()["firstSpeakerSettings"];
    assert_eq!(first["user"]["fallback"]["text"], wanted);
    assert_eq!(first.get("agent"), None, "{first}");
    assert!(world.n8n.requests_of("1").is_empty());
    let prompt = call.agent.request()["systemPrompt"].as_str().unwrap_or_default();
    assert!(prompt.contains(PERSON) && prompt.contains(wanted), "{prompt}");
    caller_hears(&call.phone, &call.agent, wanted, 8)?;
    agent_hears(&call.agent, &call.phone, 7)?;
    world.webhook("/call-status", &[("CallSid", &placed.sid), ("AnsweredBy", "human")])?;
    agent_hears(&call.agent, &call.phone, 9)?;
    call.phone.hang_up()?;
    let post = filed(&world, 1)?.swap_remove(0);
    assert_eq!(post.json["number"], PERSON);
    assert_eq!(post.json["callSid"], placed.sid);
    assert_eq!(post.json["data"], format!("Agent: {wanted}"));
    assert_no_rule_broken(&world, &[&call.phone]);
    Ok(())
}

#[test]
fn a_person_who_is_rung_without_a_message_gets_the_usual_one() -> Outcome {
    let world = calling_out().setting("FIRST_MESSAGE", "Good day, Sara speaking.").start()?;
    let call = ring_somebody(&world, "")?;
    let fallback = &call.agent.request()["firstSpeakerSettings"]["user"]["fallback"];
    assert_eq!(fallback["text"], "Good day, Sara speaking.");
    // The id in the webhook's address serves once: who calls with it later is a caller like others.
    let placed = world.twilio.orders().swap_remove(0);
    let url = placed.field("Url").unwrap_or_default();
    let id = url.split_once('?').map(|(_, query)| query.to_owned()).unwrap_or_default();
    let form = [("CallSid", "CA00000000000000000000000000000009"), ("From", CALLER)];
    world.webhook(&format!("/incoming-call?{id}"), &form)?;
    let other = world.ultravox.next_call(PATIENCE)?;
    assert_eq!(other.request()["firstSpeakerSettings"]["agent"]["text"], FIRST_MESSAGE);
    Ok(())
}

#[test]
fn an_answering_machine_is_hung_up_on() -> Outcome {
    for answered_by in ["machine_start", "fax"] {
        let world = calling_out().start()?;
        let call = ring_somebody(&world, "Hello.")?;
        call.agent.say("Hello.", &pcm_of(&voice(1, 100)))?;
        caught_up(&call.agent)?;
        let form = [("CallSid", &*call.ringing.call_sid), ("AnsweredBy", answered_by)];
        assert_eq!(world.webhook("/call-status", &form)?.status, 204);
        call.agent.wait_closed()?;
        call.phone.wait_closed()?;
        assert_hangup(&call.ringing.next(&world, &[])?);
        assert_eq!(the_transcript(&world)?.1, "Machine");
        let events = world.journal(&call.ringing.call_sid);
        assert!(events.iter().any(|event| event["answeredBy"] == answered_by), "{events:#?}");
    }
    Ok(())
}

#[test]
fn an_answering_machine_is_given_the_message() -> Outcome {
    let message = "This is SecureLife. Please call us back.";
    let world = calling_out().setting("ANSWERING_MACHINE_MESSAGE", message).start()?;
    let call = ring_somebody(&world, "Hello.")?;
    let placed = world.twilio.orders().swap_remove(0);
    assert_eq!(placed.field("MachineDetection"), Some("DetectMessageEnd"));
    let form = [("CallSid", &*placed.sid), ("AnsweredBy", "machine_end_beep")];
    world.webhook("/call-status", &form)?;
    let told = call.agent.wait_text("hang_up", |text| text["type"] == "hang_up")?;
    assert_eq!(told["message"], message);
    let words = voice(3, 300);
    call.agent.say(message, &pcm_of(&words))?;
    call.agent.close()?;
    assert_eq!(call.phone.wait_closed()?, Heard::Closed(Some(1000)));
    assert!(contains(&call.phone.heard_audio(), &words), "cut off in the message");
    assert_eq!(the_transcript(&world)?, (format!("Agent: {message}"), "Machine".to_owned()));
    Ok(())
}

#[test]
fn what_twilio_reports_of_a_call_is_in_its_journal() -> Outcome {
    let world = builder().start()?;
    let call = connect_and_talk(&world)?;
    for status in ["ringing", "in-progress", "a-status-of-the-future"] {
        assert_eq!(call.ringing.call_status(&world, status)?.status, 204);
    }
    agent_hears(&call.agent, &call.phone, 7)?;
    call.ringing.call_status(&world, "completed")?;
    call.agent.wait_closed()?;
    the_transcript(&world)?;
    // For calls that are gone or were never there it is taken and means nothing.
    assert_eq!(call.ringing.call_status(&world, "completed")?.status, 204);
    let unknown = [
        ("CallSid", "CA00000000000000000000000000000aaa"),
        ("CallStatus", "completed"),
        ("AnsweredBy", "fax"),
    ];
    assert_eq!(world.webhook("/call-status", &unknown)?.status, 204);
    let events = world.journal(&call.ringing.call_sid);
    let statuses: Vec<_> = events.iter().filter(|event| event["event"] == "status").collect();
    let statuses: Vec<_> = statuses.iter().filter_map(|event| event["status"].as_str()).collect();
    assert_eq!(statuses, ["ringing", "in-progress", "a-status-of-the-future", "completed"]);
    assert_eq!(world.n8n.requests_of("2").len(), 1);
    Ok(())
}

#[test]
fn a_caller_who_gives_up_while_it_rings_costs_nothing_more() -> Outcome {
    let world = builder().start()?;
    let ringing = world.ring(CALLER)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    agent.wait_joined()?;
    ringing.call_status(&world, "no-answer")?;
    agent.wait_closed()?;
    assert!(ringing.stream_is_refused(&world));
    Ok(())
}

// ============================================================================
// Transfer
// ============================================================================

/// The caller has asked for a person, and the agent has left.
pub(crate) fn ask_for_a_person(world: &World) -> Result<Call, Box<dyn Error + Send + Sync>> {
    let call = connect_and_talk(world)?;
    call.phone.marks(Marks::WhenPlayed);
    let wish = call.agent.invoke("transfer_to_person", &reason())?;
    assert_eq!(call.agent.wait_result(&wish)?["responseType"], "hang-up");
    let words = voice(3, 400);
    call.agent.say("I am putting you through.", &pcm_of(&words))?;
    call.agent.close()?;
    assert_eq!(call.phone.wait_closed()?, Heard::Closed(Some(1000)));
    assert!(contains(&call.phone.heard_audio(), &words), "cut off in the last words");
    let heard = call.phone.echoes().last().map(|(at, _)| *at).ok_or("no mark came back")?;
    assert!(call.phone.heard().last().is_some_and(|end| end.at >= heard), "cut off");
    Ok(call)
}

pub(crate) fn assert_dials(answer: &Ringing) {
    assert_eq!(answer.twiml.elements[..2], ["Response", "Dial"], "{}", answer.twiml.xml);
    assert_eq!(answer.twiml.dial.as_deref(), Some(COLLEAGUE));
    let action = answer.twiml.dial_action.as_deref().unwrap_or_default();
    assert_eq!(action.split('#').next(), Some(&*format!("{PUBLIC_URL}/stream-ended")));
}

/// What the built-in agent is to tell the person.
fn reason() -> Value {
    json!({"reason": "Anna Berg, about a broken window"})
}

/// How Twilio tells that a person took the call, when it is over.
pub(crate) const CONNECTED: [(&str, &str); 2] =
    [("DialCallStatus", "completed"), ("DialBridged", "true")];

pub(crate) const TRANSFERRED: &str = "\nAgent: I am putting you through.";

#[test]
fn a_person_is_offered_only_if_there_is_one() -> Outcome {
    for (fallback, offered) in [("", false), (COLLEAGUE, true)] {
        let world = builder().setting("FALLBACK_NUMBER", fallback).start()?;
        let call = connect(&world)?;
        let mut stages = vec![call.agent.request()["selectedTools"].clone()];
        if !offered {
            let wish = call.agent.invoke("transfer_to_person", &reason())?;
            let answer = call.agent.wait_result(&wish)?;
            assert_eq!(answer["errorType"], "undefined", "{answer}");
        }
        let summary = json!({"summary": "Done."});
        stages.push(enter_main_stage(&call.agent)?);
        let last = call.agent.invoke("move_to_call_summary", &summary)?;
        stages.push(call.agent.wait_result(&last)?);
        for stage in stages {
            let stage = match stage["result"].as_str() {
                Some(result) => serde_json::from_str::<Value>(result)?["selectedTools"].clone(),
                None => stage,
            };
            let tools = tool_names(&stage);
            assert_eq!(tools.iter().any(|tool| tool == "transfer_to_person"), offered, "{tools:?}");
        }
    }
    Ok(())
}

#[test]
fn the_caller_is_put_through_to_a_person_who_answers() -> Outcome {
    let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    let call = ask_for_a_person(&world)?;
    let dial = call.ringing.next(&world, &[])?;
    assert_dials(&dial);
    assert!(world.n8n.requests_of("2").is_empty(), "filed before it is decided");
    let mut person = dial.person_picks_up(&world)?;
    person.presses("1")?;
    assert!(person.is_connected(), "{:?}", person.twiml());
    assert_hangup(&person.leaves()?);
    let (text, ended_by) = the_transcript(&world)?;
    assert_eq!((text, &*ended_by), (format!("{TALK}{TRANSFERRED}"), "Transferred"));
    assert_eq!(world.ultravox.requests(), 1);
    assert_no_rule_broken(&world, &[&call.phone]);
    Ok(())
}

#[test]
fn the_caller_comes_back_if_nobody_answers() -> Outcome {
    for status in ["no-answer", "busy", "failed"] {
        let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
        let call = ask_for_a_person(&world)?;
        let dial = call.ringing.next(&world, &[])?;
        assert_dials(&dial);
        let back = dial.nobody_picks_up(&world, status)?;
        let agent = world.ultravox.next_call(PATIENCE)?;
        assert_eq!(agent.query(), format!("priorCallId={}", call.agent.id()), "{status}");
        let first = &agent.request()["firstSpeakerSettings"]["agent"];
        let prompt = first["prompt"].as_str().unwrap_or_default();
        assert!(prompt.contains("nobody answered"), "{first}");
        assert_eq!(first.get("text"), None, "{first}");
        let phone = back.open_stream(&world)?;
        caller_hears(&phone, &agent, "Sorry, nobody is there.", 8)?;
        agent_hears(&agent, &phone, 7)?;
        // And once more: a second try is allowed.
        let wish = agent.invoke("transfer_to_person", &reason())?;
        agent.wait_result(&wish)?;
        agent.close()?;
        phone.wait_closed()?;
        let dial = back.next(&world, &[])?;
        assert_dials(&dial);
        assert!(world.n8n.requests_of("2").is_empty(), "filed before it is decided");
        assert_hangup(&dial.next(&world, &CONNECTED)?);
        let (text, ended_by) = the_transcript(&world)?;
        assert_eq!(text, format!("{TALK}{TRANSFERRED}\nAgent: Sorry, nobody is there."));
        assert_eq!(ended_by, "Transferred");
    }
    Ok(())
}

#[test]
fn a_caller_who_came_back_leaves_and_is_filed_once() -> Outcome {
    let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    let call = ask_for_a_person(&world)?;
    let dial = call.ringing.next(&world, &[])?;
    let back = dial.nobody_picks_up(&world, "no-answer")?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = back.open_stream(&world)?;
    caller_hears(&phone, &agent, "Sorry, nobody is there.", 8)?;
    caught_up(&agent)?;
    // n8n takes its time, so that whatever else wants to be filed has the time for it.
    world.n8n.reply_next("2", Reply::json(200, &json!({})).after(Duration::from_millis(500)));
    phone.hang_up()?;
    world.n8n.wait_for("2", 1, PATIENCE)?;
    back.call_status(&world, "completed")?;
    let (text, ended_by) = the_transcript(&world)?;
    assert_eq!(text, format!("{TALK}{TRANSFERRED}\nAgent: Sorry, nobody is there."));
    assert_eq!(ended_by, "CallerLeft");
    world.bridge.restart()?;
    back.call_status(&world, "completed")?;
    let other = connect_and_talk(&world)?;
    other.phone.hang_up()?;
    assert_eq!(filed(&world, 2)?[1].json["callSid"], other.ringing.call_sid);
    Ok(())
}

#[test]
fn the_caller_leaves_while_being_put_through() -> Outcome {
    // While the person's phone rings; or before it does.
    for rings in [true, false] {
        let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
        let call = ask_for_a_person(&world)?;
        let gone = ("CallStatus", "completed");
        if rings {
            let dial = call.ringing.next(&world, &[])?;
            assert_dials(&dial);
            assert_hangup(&dial.next(&world, &[("DialCallStatus", "canceled"), gone])?);
        } else {
            assert_hangup(&call.ringing.next(&world, &[gone])?);
        }
        let (text, ended_by) = the_transcript(&world)?;
        assert_eq!((text, &*ended_by), (format!("{TALK}{TRANSFERRED}"), "CallerLeft"));
        assert_eq!(world.ultravox.requests(), 1);
    }
    Ok(())
}

/// Nobody is left to be put through. Twilio need not say so again: the stream's `stop` did.
#[test]
fn the_caller_leaves_before_the_last_words_are_over() -> Outcome {
    let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    let call = connect_and_talk(&world)?;
    let wish = call.agent.invoke("transfer_to_person", &reason())?;
    call.agent.wait_result(&wish)?;
    call.agent.say("I am putting you through.", &pcm_of(&voice(3, 5_000)))?;
    call.agent.close()?;
    call.phone.wait_mark()?;
    call.phone.hang_up()?;
    let (text, ended_by) = the_transcript(&world)?;
    assert_eq!((text, &*ended_by), (format!("{TALK}{TRANSFERRED}"), "CallerLeft"));
    assert_hangup(&call.ringing.next(&world, &[("CallStatus", "completed")])?);
    assert_hangup(&call.ringing.next(&world, &[])?);
    Ok(())
}

/// Twilio's report comes while the last words are still being waited for.
#[test]
fn a_report_of_the_end_waits_until_the_call_can_be_filed() -> Outcome {
    let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    let call = connect_and_talk(&world)?;
    call.phone.marks(Marks::Never);
    let wish = call.agent.invoke("transfer_to_person", &json!({}))?;
    call.agent.wait_result(&wish)?;
    call.agent.close()?;
    call.phone.wait_mark()?;
    assert_eq!(call.ringing.call_status(&world, "completed")?.status, 204);
    // Else it would wait for hours: the caller might still come back.
    the_transcript(&world)?;
    Ok(())
}

#[test]
fn a_transfer_survives_the_death_of_the_process() -> Outcome {
    for killed_before_it_rings in [true, false] {
        for answered in [true, false] {
            let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
            let call = ask_for_a_person(&world)?;
            if killed_before_it_rings {
                world.bridge.wait_for_log("Transferred")?;
                wait_for_event(&world, &call.ringing.call_sid, "transfer")?;
                world.bridge.restart()?;
            }
            let dial = call.ringing.next(&world, &[])?;
            assert_dials(&dial);
            if !killed_before_it_rings {
                world.bridge.restart()?;
            }
            if answered {
                assert_hangup(&dial.next(&world, &CONNECTED)?);
            } else {
                let back = dial.nobody_picks_up(&world, "no-answer")?;
                let agent = world.ultravox.next_call(PATIENCE)?;
                let phone = back.open_stream(&world)?;
                caller_hears(&phone, &agent, "Sorry, nobody is there.", 8)?;
                phone.hang_up()?;
            }
            let (text, ended_by) = the_transcript(&world)?;
            let (more, end) = if answered {
                ("", "Transferred")
            } else {
                ("\nAgent: Sorry, nobody is there.", "CallerLeft")
            };
            assert_eq!(text, format!("{TALK}{TRANSFERRED}{more}"));
            assert_eq!(ended_by, end);
        }
    }
    Ok(())
}

// ============================================================================
// The kill harness
// ============================================================================

/// What was said this shortly before a kill may be lost: it is milliseconds until it is on disk,
/// or more on a machine that does many things at once.
const UNWRITTEN: Duration = Duration::from_millis(100);

/// Random numbers that come again with the same seed (splitmix64).
#[derive(Clone)]
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.roll() % limit
    }

    fn one_in(&mut self, limit: u64) -> bool {
        self.below(limit) == 0
    }
}

/// What became of one call in a round.
#[derive(Default)]
struct Told {
    ringing: Option<Ringing>,
    /// Lines that were final, and of which the agent knew that the bridge had them, and when.
    lines: Vec<(Instant, String)>,
}

/// Talks until the bridge dies or the plan is done. A line counts when a later question was
/// answered: the bridge deals with an agent's messages in order.
fn talk(agent: &AgentCall, told: &mut Told, planned: u64, name: &str) -> Result<(), Trouble> {
    for number in 0..planned {
        let text = format!("{name} sentence {number}");
        if number % 2 == 0 {
            agent.user_said(&text)?;
            caught_up(agent)?;
            told.lines.push((Instant::now(), format!("User: {text}")));
        } else {
            agent.say(&text, &pcm_of(&voice(number, 20)))?;
            caught_up(agent)?;
            told.lines.push((Instant::now(), format!("Agent: {text}")));
        }
    }
    Ok(())
}

/// From ring to goodbye, as far as it gets.
fn live(world: &World, number: u64, mut dice: Dice, told: &mut Told) -> Result<(), Trouble> {
    let ringing = told.ringing.insert(world.ring(&format!("+49309{number:06}"))?).clone();
    let Some(agent) = agent_of(world, &ringing) else { return Ok(()) };
    let phone = ringing.open_stream(world)?;
    let planned = dice.below(120);
    talk(&agent, told, planned, &format!("first {number}"))?;
    if dice.one_in(2) {
        phone.hang_up()?;
    } else {
        let farewell = agent.invoke("hangUp", &json!({"reason": "done"}))?;
        agent.wait_result(&farewell)?;
        agent.close()?;
    }
    phone.wait_closed().map(drop)
}

/// The latest agent of a call.
fn agent_of(world: &World, ringing: &Ringing) -> Option<AgentCall> {
    let sid = &ringing.call_sid;
    world
        .ultravox
        .created()
        .into_iter()
        .rfind(|agent| agent.request()["metadata"]["callSid"] == sid.as_str())
}

/// After the restart: Twilio asks what comes next, or says that the caller has gone. Gives what
/// may be tried again should the bridge be killed once more.
fn go_on(world: &World, number: u64, mut dice: Dice, told: &mut Told) -> Result<(), Trouble> {
    let Some(ringing) = told.ringing.clone() else { return Ok(()) };
    if dice.one_in(3) {
        return ringing.call_status(world, "completed").map(drop);
    }
    let next = ringing.next(world, &[])?;
    if next.twiml.stream_url.is_none() {
        return Ok(());
    }
    let Some(agent) = agent_of(world, &next) else { return Ok(()) };
    let phone = next.open_stream(world)?;
    let planned = dice.below(12);
    talk(&agent, told, planned, &format!("then {number}.{}", agent.id()))?;
    phone.hang_up()?;
    phone.wait_closed().map(drop)
}

/// Runs all calls at once, and pulls the plug in the middle of it.
fn until_killed(
    world: &World,
    told: &mut [Told],
    dice: &mut Dice,
    act: fn(&World, u64, Dice, &mut Told) -> Result<(), Trouble>,
    base: u64,
) {
    let pause = Duration::from_micros(dice.below(500_000));
    let mut killed = Instant::now();
    thread::scope(|scope| {
        for (number, told) in (base..).zip(told.iter_mut()) {
            let dice = Dice(dice.roll());
            scope.spawn(move || {
                // The bridge dies in the middle of it: any end will do.
                drop(act(world, number, dice, told));
            });
        }
        // The one nap in this file: the moment of the kill is the point of it.
        thread::sleep(pause);
        killed = Instant::now();
        world.bridge.kill();
    });
    for told in told {
        told.lines.retain(|(at, _)| *at + UNWRITTEN < killed);
    }
}

/// Lines that n8n's last word on a call does not have, or not in their order.
fn lost(world: &World, told: &Told) -> Vec<String> {
    let Some(ringing) = &told.ringing else { return Vec::new() };
    let posts = world.n8n.requests_of("2");
    let last = posts.iter().rfind(|post| post.json["callSid"] == ringing.call_sid.as_str());
    let text = last.and_then(|post| post.json["data"].as_str()).unwrap_or_default();
    let mut there = text.lines();
    let lines = told.lines.iter().map(|(_, line)| line);
    lines.filter(|line| !there.any(|one| one == line.as_str())).cloned().collect()
}

/// One round: calls, a kill, perhaps another one, and then peace. Gives lines told and lost.
fn round(
    world: &World,
    number: u64,
    dice: &mut Dice,
) -> Result<(usize, Vec<String>), Box<dyn Error + Send + Sync>> {
    let count = usize::try_from(1 + dice.below(3))?;
    let mut told: Vec<Told> = std::iter::repeat_with(Told::default).take(count).collect();
    let base = 10 * number;
    // Sometimes n8n is down, so that there is something to deliver after the restart.
    if dice.one_in(3) {
        world.n8n.set_reply("2", Reply::json(503, &json!({})));
    }
    until_killed(world, &mut told, dice, live, base);
    world.bridge.restart()?;
    if dice.one_in(3) {
        until_killed(world, &mut told, dice, go_on, base);
        world.bridge.restart()?;
    }
    world.n8n.set_reply("2", Reply::json(200, &json!({})));
    let delivered = |told: &[Told]| told.iter().all(|told| lost(world, told).is_empty());
    for (number, told) in (base..).zip(told.iter_mut()) {
        go_on(world, number, Dice(dice.roll()), told)?;
        if let Some(ringing) = &told.ringing {
            ringing.call_status(world, "completed")?;
        }
    }
    // As many posts as it takes, but not for ever.
    let deadline = Instant::now() + PATIENCE;
    while !delivered(&told) && Instant::now() < deadline {
        let seen = world.n8n.requests_of("2").len();
        drop(world.n8n.wait_for("2", seen + 1, Duration::from_millis(500)));
    }
    let lines = told.iter().map(|told| told.lines.len()).sum();
    Ok((lines, told.iter().flat_map(|told| lost(world, told)).collect()))
}

/// The bridge reads all journals when it starts, and the pretend world remembers everything.
const ROUNDS_A_WORLD: u64 = 20;

#[test]
fn a_kill_at_any_moment_loses_nothing() -> Outcome {
    let setting = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let rounds = setting("KILL_ROUNDS").unwrap_or(15);
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let seed = setting("KILL_SEED").unwrap_or(u64::from(clock.subsec_nanos()));
    let mut dice = Dice(seed);
    let (mut lines, mut lost) = (0, Vec::new());
    let mut world = builder().start()?;
    for number in 0..rounds {
        if number % ROUNDS_A_WORLD == ROUNDS_A_WORLD - 1 {
            world = builder().start()?;
        }
        let (told, missing) =
            round(&world, number, &mut dice).map_err(|error| format!("seed {seed}: {error:?}"))?;
        lines += told;
        lost.extend(missing);
    }
    let summary =
        format!("kill harness: {rounds} rounds, {lines} lines, {} lost (seed {seed})", lost.len());
    // Not `println!`, which a passing test would swallow.
    writeln!(std::io::stderr(), "{summary}")?;
    assert!(lost.is_empty(), "{summary}\n{lost:#?}\n{}", world.bridge.log().join("\n"));
    assert!(lines > 0, "nothing was said in any round: {summary}");
    Ok(())
}
