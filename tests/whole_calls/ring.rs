//! Who gets an agent when it rings, and who does not: calls that are over, calls that Twilio asks
//! about again, callers without a number, numbers that want every line, and the calls that we make.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::demo::{
    HttpAnswer, Order, PATIENCE, Reply, Ringing, Trouble, Twiml, World, WorldBuilder, pcm_of, voice,
};
use crate::{CALLER, Call, Outcome, connect, greeting_of, written};

const TOKEN: &str = "mosaic-lantern-27-api";
/// Somebody whom the owner may ring.
const PERSON: &str = "+4930777888";
/// Whom callers are put through to.
const COLLEAGUE: &str = "+4930111222";

fn builder() -> WorldBuilder {
    World::builder(env!("CARGO_BIN_EXE_callbridge"))
}

/// A sentence of the built-in agent's file.
fn phrase(name: &str) -> String {
    let file: Value =
        serde_json::from_str(include_str!("../../src/agent/agent.json")).unwrap_or_default();
    file["phrases"][name].as_str().unwrap_or("no such phrase").to_owned()
}

/// Nothing announces it.
#[track_caller]
fn eventually(world: &World, what: &str, mut is_so: impl FnMut() -> bool) -> Result<(), Trouble> {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        if Instant::now() > deadline {
            return Err(world.trouble(format!("it never was so: {what}")));
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn is_served(ringing: &Ringing) -> bool {
    ringing.twiml.stream_url.is_some()
}

#[track_caller]
fn assert_busy(ringing: &Ringing) {
    assert_eq!(ringing.twiml.said, [phrase("busy")]);
    assert_eq!(ringing.twiml.elements, ["Response", "Say", "Hangup"]);
}

// ============================================================================
// A call that rings again
// ============================================================================

#[track_caller]
fn rings_again(world: &World, sid: &str) -> Result<Twiml, Trouble> {
    Ok(world.ring_with(CALLER, &[("CallSid", sid)])?.twiml)
}

#[test]
fn a_call_that_is_over_gets_no_agent_however_often_it_rings() -> Outcome {
    // With a person to put callers through to, that would be the next best thing to get.
    let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    let call = connect(&world)?;
    call.agent.user_said("Hello?")?;
    let sid = call.ringing.call_sid.clone();
    call.phone.hang_up()?;
    // Before it is filed, and after.
    call.agent.wait_closed()?;
    assert_eq!(rings_again(&world, &sid)?.elements, ["Response", "Hangup"]);
    world.n8n.wait_for("2", 1, PATIENCE)?;
    world.bridge.wait_for_log("n8n has the transcript")?;
    assert_eq!(rings_again(&world, &sid)?.elements, ["Response", "Hangup"]);
    world.bridge.wait_for_log("it rings again, but is over")?;
    // The next process has only the journals, and the first to ring may be faster than they.
    world.bridge.kill();
    world.bridge.restart()?;
    for _ in 0..3 {
        assert_eq!(rings_again(&world, &sid)?.elements, ["Response", "Hangup"]);
    }
    assert_eq!((world.ultravox.requests(), world.n8n.requests_of("1").len()), (1, 1));
    assert_eq!(world.n8n.requests_of("2").len(), 1);
    assert_eq!(world.journals().len(), 1);
    connect(&world)?;
    Ok(())
}

/// Twilio signs names and values with nothing between them.
#[test]
fn one_signature_is_good_for_one_call() -> Outcome {
    let world = builder().start()?;
    let sid = "CA0a1b2c3d4e5f60718293a4b5c6d7e8f9";
    let form = [("CallSid", sid), ("CallStatus", "ringing"), ("From", CALLER)];
    let signature = world.signature("/incoming-call", &form);
    let headers = [
        ("X-Twilio-Signature", signature.as_str()),
        ("Content-Type", "application/x-www-form-urlencoded"),
    ];
    let post = |fields: &[(&str, &str)]| -> Result<HttpAnswer, Trouble> {
        let mut body = form_urlencoded::Serializer::new(String::new());
        body.extend_pairs(fields);
        world.request("POST", "/incoming-call", &headers, body.finish().as_bytes())
    };
    let all: String = form.iter().flat_map(|(name, value)| [*name, *value]).collect();
    let values = all.strip_prefix("CallSid").ok_or("it begins otherwise")?;
    let mut signed = 0;
    for cut in 0..=values.len() {
        let (value, rest) = values.split_at(cut);
        // Names and values are taken together, sorted by the names.
        let shifted = [("CallSid", value), (rest, "")];
        let again = [("CallSid", value), ("CallSid", value), (rest, "")];
        for fields in [&shifted[..], &again[..]] {
            let answer = post(fields)?;
            signed += usize::from(answer.status != 403);
            let is_it = value == sid;
            let got = answer.status == 200 && Twiml::read(&answer.text())?.stream_url.is_some();
            assert!(is_it || !got, "{value} is taken for a call's id");
        }
    }
    assert!(signed > 20, "what is shifted is signed all the same: {signed}");
    assert!(Twiml::read(&post(&form)?.text())?.stream_url.is_some());
    assert_eq!(world.ultravox.requests(), 1);
    Ok(())
}

#[test]
fn a_call_whose_answer_got_lost_in_a_restart_begins_once_more() -> Outcome {
    let world = builder().start()?;
    let first = world.ring(CALLER)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    agent.wait_joined()?;
    eventually(&world, "the answer is in the journal", || {
        world.journal(&first.call_sid).iter().any(|event| event["event"] == "answer")
    })?;
    world.bridge.kill();
    world.bridge.restart()?;
    let ringing = world.ring_with(CALLER, &[("CallSid", &first.call_sid)])?;
    assert!(is_served(&ringing), "{}", ringing.twiml.xml);
    assert!(first.stream_is_refused(&world), "the old token is void");
    let agent = world.ultravox.next_call(PATIENCE)?;
    // Nobody has greeted the caller yet.
    assert_eq!(greeting_of(&agent), crate::demo::FIRST_MESSAGE);
    // Once more changes nothing.
    let again = world.ring_with(CALLER, &[("CallSid", &first.call_sid)])?;
    assert_eq!(again.twiml.xml, ringing.twiml.xml);
    let phone = ringing.open_stream(&world)?;
    agent.say("Hello.", &pcm_of(&voice(1, 100)))?;
    phone.expect_audio(&voice(1, 100))?;
    phone.hang_up()?;
    let filed = world.n8n.wait_for("2", 1, PATIENCE)?;
    assert_eq!(filed[0].json["data"], "Agent: Hello.");
    assert_eq!(filed[0].json["number"], CALLER);
    assert_eq!((world.journals().len(), world.ultravox.requests()), (1, 2));
    Ok(())
}

#[test]
fn a_caller_whom_nobody_could_serve_hears_why_once_more() -> Outcome {
    let world = builder().start()?;
    world.ultravox.refuse_next(1, &Reply::json(500, &json!({"detail": "no"})));
    let ringing = world.ring(CALLER)?;
    assert_eq!(ringing.twiml.said, [phrase("apology")]);
    let again = rings_again(&world, &ringing.call_sid)?;
    assert_eq!(again.xml, ringing.twiml.xml);
    assert_eq!(world.ultravox.requests(), 1);
    Ok(())
}

#[test]
fn a_ring_that_never_streams_gives_back_its_line_and_its_agent() -> Outcome {
    let world = builder().setting("MAX_CALLS", 1).start()?;
    let ringing = world.ring(CALLER)?;
    let began = Instant::now();
    let agent = world.ultravox.next_call(PATIENCE)?;
    while !agent.is_over() && began.elapsed() < 5 * PATIENCE {
        thread::sleep(Duration::from_millis(20));
    }
    // Twilio takes a second or two, and a minute of an agent is billed.
    assert!((10..50).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    world.bridge.wait_for_log("NeverStreamed")?;
    assert!(ringing.stream_is_refused(&world), "the token outlives the line");
    assert!(is_served(&world.ring("+4930901821")?));
    Ok(())
}

// ============================================================================
// Callers without a number, and numbers that want every line
// ============================================================================

#[test]
fn callers_without_a_number_cannot_take_every_line() -> Outcome {
    // Half of them, unless set otherwise.
    let world = builder().setting("MAX_CALLS", 6).start()?;
    for (number, word) in [("anonymous", "anonymous"), ("+266696687", "anonymous"), ("", "")] {
        assert!(is_served(&world.ring(number)?), "{number:?}");
        let agent = world.ultravox.next_call(PATIENCE)?;
        let prompt = agent.request()["systemPrompt"].as_str().unwrap_or_default().to_owned();
        assert!(prompt.contains("withheld") && !prompt.contains("266696687"), "{prompt}");
        let asked = world.n8n.requests_of("1");
        assert_eq!(asked.last().ok_or("n8n was not asked")?.json["number"], word);
    }
    for number in ["+7378742833", "+86282452253", "sip:anna@example.com", "unknown", "anonymous"] {
        assert_busy(&world.ring(number)?);
    }
    world.bridge.wait_for_log("all 3 lines for callers without a number are busy")?;
    let calls: Vec<Ringing> = (0..3)
        .map(|number| world.ring(&format!("+493090182{number}")))
        .collect::<Result<_, _>>()?;
    assert!(calls.iter().all(is_served), "the others are for those who have one");
    assert_eq!(world.ultravox.requests(), 6);

    let world = builder().setting("WITHHELD_CALLS_MAX", 0).start()?;
    assert_busy(&world.ring("anonymous")?);
    assert!(is_served(&world.ring(CALLER)?));
    Ok(())
}

#[test]
fn one_number_gets_a_few_lines_at_once() -> Outcome {
    let world = builder().start()?;
    let calls: Vec<Ringing> = (0..4).map(|_| world.ring(CALLER)).collect::<Result<_, _>>()?;
    assert!(calls.iter().all(is_served));
    assert_busy(&world.ring(CALLER)?);
    world.bridge.wait_for_log("+49…1820 is on 4 lines already")?;
    assert!(is_served(&world.ring("+4930901821")?), "nobody else is meant");
    // A line that is given back is one that the number may have again.
    calls[0].call_status(&world, "completed")?;
    eventually(&world, "the number has a line again", || {
        world.ring(CALLER).is_ok_and(|ringing| is_served(&ringing))
    })?;
    Ok(())
}

// ============================================================================
// Put through to a person
// ============================================================================

#[test]
fn a_person_is_rung_for_so_long_and_for_so_many() -> Outcome {
    let world = builder().setting("MAX_CALLS", 1).setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    let call = connect(&world)?;
    // The line is busy, so this one is put through, and the next one cannot be.
    let first = world.ring("+4930901821")?;
    assert_eq!(first.twiml.elements, ["Response", "Say", "Dial"]);
    assert_eq!(first.twiml.dial.as_deref(), Some(COLLEAGUE));
    assert!(first.twiml.xml.contains("timeout=\"25\" timeLimit=\"14400\""), "{}", first.twiml.xml);
    let second = world.ring("+4930901822")?;
    assert_busy(&second);
    // Nobody answers: the caller hears so, is not put through again, and makes room.
    let back = first.next(&world, &[("DialCallStatus", "no-answer")])?;
    assert_eq!(back.twiml.said, [phrase("apology")]);
    assert_eq!(back.twiml.elements, ["Response", "Say", "Hangup"]);
    let third = world.ring("+4930901823")?;
    assert_eq!(third.twiml.dial.as_deref(), Some(COLLEAGUE));
    // Twilio asks about the same call once more.
    let again = world.ring_with("+4930901823", &[("CallSid", &third.call_sid)])?;
    assert_eq!(again.twiml.xml, third.twiml.xml);
    // The caller hangs up, or the person does.
    third.call_status(&world, "completed")?;
    let fourth = world.ring("+4930901824")?;
    assert_eq!(fourth.twiml.dial.as_deref(), Some(COLLEAGUE));
    let over = fourth.next(&world, &[("DialCallStatus", "completed"), ("DialBridged", "true")])?;
    assert_eq!(over.twiml.elements, ["Response", "Hangup"]);
    // What the agent transfers counts as well.
    let fifth = world.ring("+4930901825")?;
    assert_eq!(fifth.twiml.dial.as_deref(), Some(COLLEAGUE));
    let wish = call.agent.invoke("transfer_to_person", &json!({"reason": "A claim."}))?;
    call.agent.wait_result(&wish)?;
    call.agent.close()?;
    call.phone.wait_closed()?;
    let sorry = call.ringing.next(&world, &[])?;
    assert_eq!(sorry.twiml.said, [phrase("apology")]);
    Ok(())
}

// ============================================================================
// Calls that go out
// ============================================================================

fn calling_out() -> WorldBuilder {
    builder()
        .setting("API_TOKEN", TOKEN)
        .setting("TWILIO_ACCOUNT_SID", crate::demo::ACCOUNT_SID)
        .setting("TWILIO_PHONE_NUMBER", crate::demo::OUR_NUMBER)
        .setting("OUTGOING_ALLOW", "+4930")
}

fn order(world: &World, number: &str, first_message: &str) -> Result<HttpAnswer, Trouble> {
    let headers = [("Authorization", &*format!("Bearer {TOKEN}"))];
    let wish = json!({"phoneNumber": number, "firstMessage": first_message}).to_string();
    world.request("POST", "/outgoing-call", &headers, wish.as_bytes())
}

/// What Twilio tells of an outgoing call at the address that the order named.
fn report(world: &World, order: &Order, status: &str) -> Result<(), Trouble> {
    let url = order.field("StatusCallback").unwrap_or_default();
    let path = url.strip_prefix(crate::demo::PUBLIC_URL).unwrap_or_default();
    let form = [("CallSid", &*order.sid), ("CallStatus", status), ("To", PERSON)];
    let answer = world.webhook(path, &form)?;
    if answer.status == 204 { Ok(()) } else { Err(world.trouble(answer.text())) }
}

fn calls(world: &World) -> Result<Value, Trouble> {
    let headers = [("Authorization", &*format!("Bearer {TOKEN}"))];
    Ok(world.request("GET", "/calls", &headers, &[])?.json())
}

#[test]
fn whoever_does_not_answer_makes_room_at_once() -> Outcome {
    const AT_ONCE: usize = 100;
    let world = calling_out().start()?;
    // An order that Twilio refuses takes no room.
    for _ in 0..5 {
        world.twilio.reply_next(Reply::json(400, &json!({"code": 21_211, "message": "no"})));
        assert_eq!(order(&world, PERSON, "")?.status, 400);
    }
    for number in 0..AT_ONCE {
        assert_eq!(order(&world, PERSON, "")?.status, 201, "{number}");
    }
    let orders = world.twilio.orders();
    let orders = orders.get(5..).unwrap_or_default();
    for (order_at, status) in ["no-answer", "busy", "failed", "canceled"].iter().enumerate() {
        let full = order(&world, PERSON, "")?;
        assert_eq!(full.status, 503, "{}", full.text());
        assert!(full.text().contains("ring already"), "{}", full.text());
        // Nothing else that Twilio tells makes room.
        report(&world, &orders[order_at], "ringing")?;
        assert_eq!(order(&world, PERSON, "")?.status, 503);
        report(&world, &orders[order_at], status)?;
        assert_eq!(order(&world, PERSON, "")?.status, 201, "{status}");
    }
    assert_eq!(
        calls(&world)?["past"].as_array().map(Vec::len),
        Some(4),
        "those that came to nothing"
    );
    eventually(&world, "the journal says so", || {
        world.journal(&orders[0].sid).last().is_some_and(|event| event["event"] == "delivered")
    })?;
    let events = world.journal(&orders[0].sid);
    let kinds: Vec<_> = events.iter().filter_map(|event| event["event"].as_str()).collect();
    assert_eq!(kinds, ["ordered", "end", "delivered"]);
    assert_eq!(world.ultravox.requests(), 0);
    Ok(())
}

#[test]
fn an_outgoing_call_that_rings_while_the_process_dies_is_still_one() -> Outcome {
    let world = calling_out().start()?;
    let wanted = "Hello, this is Sara about your claim.";
    assert_eq!(order(&world, PERSON, wanted)?.status, 201);
    let placed = world.twilio.wait_orders(1)?.swap_remove(0);
    eventually(&world, "the order is in a journal", || !world.journal(&placed.sid).is_empty())?;
    world.bridge.kill();
    world.bridge.restart()?;
    let ringing = world.picks_up(&placed)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let first = &agent.request()["firstSpeakerSettings"];
    assert_eq!(first["user"]["fallback"]["text"], wanted);
    assert!(world.n8n.requests_of("1").is_empty(), "n8n is not asked who calls");
    let prompt = agent.request()["systemPrompt"].as_str().unwrap_or_default();
    assert!(prompt.contains(PERSON) && prompt.contains(wanted), "{prompt}");
    let phone = ringing.open_stream(&world)?;
    agent.say(wanted, &pcm_of(&voice(1, 100)))?;
    phone.expect_audio(&voice(1, 100))?;
    phone.hang_up()?;
    let filed = world.n8n.wait_for("2", 1, PATIENCE)?;
    assert_eq!(filed[0].json["number"], PERSON);
    let told = (&filed[0].json["to"], &filed[0].json["direction"]);
    assert_eq!(told, (&json!(PERSON), &json!("out")));
    assert_eq!(world.journals().len(), 1);
    eventually(&world, "the list has it", || {
        calls(&world).is_ok_and(|list| list["past"][0]["direction"] == "out")
    })?;
    Ok(())
}

#[test]
fn the_owner_may_call_one_number_as_often_as_there_are_lines() -> Outcome {
    let world = calling_out().setting("CALLS_PER_NUMBER_PER_HOUR", 1).start()?;
    for count in 1..=6 {
        assert_eq!(order(&world, PERSON, "")?.status, 201);
        let placed = world.twilio.wait_orders(count)?.swap_remove(count - 1);
        assert!(is_served(&world.picks_up(&placed)?), "{count}");
    }
    Ok(())
}

#[test]
fn no_order_is_taken_when_it_could_not_be_served() -> Outcome {
    let world = calling_out().setting("MAX_CALLS", 1).setting("DRAIN_SECONDS", 60).start()?;
    // The allowed beginning stands in it, but not at its beginning.
    for number in ["+14930777888", "+1234930777"] {
        assert_eq!(order(&world, number, "")?.status, 403, "{number}");
    }
    let call: Call = connect(&world)?;
    let refused = order(&world, PERSON, "")?;
    assert_eq!(refused.status, 503, "all lines are busy: {}", refused.text());
    world.bridge.ask_to_stop()?;
    world.bridge.wait_for_log("told to stop")?;
    let refused = order(&world, PERSON, "")?;
    assert!(refused.text().contains("about to end"), "{}", refused.text());
    assert_eq!(refused.status, 503);
    assert!(world.twilio.orders().is_empty());
    call.phone.hang_up()?;
    Ok(())
}

// ============================================================================
// What comes twice, and what comes too late
// ============================================================================

/// The caller hangs up while Ultravox still takes its time.
#[test]
fn a_caller_who_leaves_while_the_agent_is_made_gets_none() -> Outcome {
    let world = builder().start()?;
    world.ultravox.take_time(Duration::from_millis(500));
    let sid = "CA0000000000000000000000000000000a";
    let answer = thread::scope(|scope| {
        let ring = scope.spawn(|| world.ring_with(CALLER, &[("CallSid", sid)]));
        world.ultravox.wait_requests(1)?;
        let form = [("CallSid", sid), ("CallStatus", "canceled")];
        assert_eq!(world.webhook("/call-status", &form)?.status, 204);
        ring.join().map_err(|_| world.trouble("the ring panicked"))?
    })?;
    assert_eq!(answer.twiml.elements, ["Response", "Hangup"], "{}", answer.twiml.xml);
    let agent = world.ultravox.next_call(PATIENCE)?;
    agent.wait_closed()?;
    assert!(agent.audio().is_empty(), "it was kept waiting for a caller");
    eventually(&world, "the call has its end", || {
        world.journal(sid).iter().any(|event| event["endedBy"] == "CallerLeft")
    })?;
    Ok(())
}

/// Twilio asks again when the answer got lost on its way.
#[test]
fn a_question_that_is_repeated_gets_the_same_stream() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.phone.drop_line();
    let (first, again) = (call.ringing.next(&world, &[])?, call.ringing.next(&world, &[])?);
    assert_eq!(first.twiml.xml, again.twiml.xml);
    let phone = first.open_stream(&world)?;
    call.agent.say("There you are.", &pcm_of(&voice(1, 100)))?;
    phone.expect_audio(&voice(1, 100))?;
    assert!(again.stream_is_refused(&world), "it opens one stream");
    phone.hang_up()?;
    Ok(())
}

/// The same while a process that is new takes the call up.
#[test]
fn a_call_is_taken_up_once_however_often_twilio_asks() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    written(&world, &call.ringing.call_sid, &call.agent)?;
    world.bridge.restart()?;
    world.ultravox.take_time(Duration::from_millis(500));
    let (first, again) = thread::scope(|scope| {
        let first = scope.spawn(|| call.ringing.next(&world, &[]));
        world.ultravox.wait_requests(2)?;
        let again = call.ringing.next(&world, &[])?;
        let first = first.join().map_err(|_| world.trouble("the question panicked"))??;
        Ok::<_, Trouble>((first, again))
    })?;
    assert_eq!(first.twiml.xml, again.twiml.xml);
    assert_eq!(world.ultravox.requests(), 2);
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = first.open_stream(&world)?;
    agent.say("There you are.", &pcm_of(&voice(1, 100)))?;
    phone.expect_audio(&voice(1, 100))?;
    phone.hang_up()?;
    Ok(())
}

/// The stream of one break, however often it is asked about.
#[test]
fn a_question_that_is_repeated_is_no_further_stream() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.phone.drop_line();
    let mut next = call.ringing.next(&world, &[])?;
    for _ in 0..9 {
        next = call.ringing.next(&world, &[])?;
    }
    let phone = next.open_stream(&world)?;
    call.agent.say("There you are.", &pcm_of(&voice(1, 100)))?;
    phone.expect_audio(&voice(1, 100))?;
    phone.hang_up()?;
    Ok(())
}

#[test]
fn a_first_stream_that_opens_at_the_second_try_is_the_first() -> Outcome {
    let world = builder().start()?;
    let ringing = world.ring(CALLER)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.next(&world, &[])?.open_stream(&world)?;
    agent.say("Hello.", &pcm_of(&voice(1, 100)))?;
    phone.expect_audio(&voice(1, 100))?;
    eventually(&world, "the first word is in the journal", || {
        world.journal(&ringing.call_sid).iter().any(|event| event["event"] == "first_word")
    })?;
    phone.hang_up()?;
    Ok(())
}

/// A lost answer is likely just then: the new process stands beside the old one.
#[test]
fn a_process_that_takes_no_new_calls_answers_for_those_it_has() -> Outcome {
    let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    let first = world.ring(CALLER)?;
    world.bridge.ask_to_stop()?;
    world.bridge.wait_for_log("told to stop")?;
    let again = world.ring_with(CALLER, &[("CallSid", &first.call_sid)])?;
    assert_eq!(again.twiml.xml, first.twiml.xml);
    first.call_status(&world, "completed")?;
    world.bridge.wait_exit(PATIENCE)?;
    Ok(())
}

/// The ordered words are said if the person's phone rings after all.
#[test]
fn an_order_that_twilio_was_unclear_about_is_not_forgotten() -> Outcome {
    let world = calling_out().start()?;
    let wanted = "Hello, this is Sara about your claim.";
    world.twilio.reply_next(Reply::text(503, None, "later"));
    assert_eq!(order(&world, PERSON, wanted)?.status, 502);
    let placed = world.twilio.wait_orders(1)?.swap_remove(0);
    world.picks_up(&placed)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    assert_eq!(agent.request()["firstSpeakerSettings"]["user"]["fallback"]["text"], wanted);
    Ok(())
}

/// However little we know of it, it is not somebody who calls from our own number.
#[test]
fn a_call_of_ours_that_nobody_remembers_is_still_one_of_ours() -> Outcome {
    let world = calling_out().start()?;
    let form = [
        ("CallSid", "CA0000000000000000000000000000000b"),
        ("From", crate::demo::OUR_NUMBER),
        ("To", PERSON),
        ("Direction", "outbound-api"),
        ("CallStatus", "in-progress"),
    ];
    world.webhook("/incoming-call?outgoing=forgotten", &form)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    assert!(agent.request()["firstSpeakerSettings"]["user"].is_object(), "they speak first");
    assert!(world.n8n.requests_of("1").is_empty(), "n8n is not asked about ourselves");
    eventually(&world, "the journal says so", || {
        world
            .journal(form[0].1)
            .iter()
            .any(|event| (&event["direction"], &event["number"]) == (&json!("out"), &json!(PERSON)))
    })?;
    Ok(())
}

#[test]
fn a_person_who_picks_up_when_all_lines_are_busy_leaves_no_open_end() -> Outcome {
    let world = calling_out().setting("MAX_CALLS", 1).start()?;
    assert_eq!(order(&world, PERSON, "Hello.")?.status, 201);
    let placed = world.twilio.wait_orders(1)?.swap_remove(0);
    eventually(&world, "the order is in a journal", || !world.journal(&placed.sid).is_empty())?;
    let _caller = connect(&world)?;
    assert_busy(&world.picks_up(&placed)?);
    eventually(&world, "the call has its end", || {
        let events = world.journal(&placed.sid);
        let kinds: Vec<_> = events.iter().filter_map(|event| event["event"].as_str()).collect();
        kinds == ["ordered", "end", "delivered"]
    })?;
    assert!(world.n8n.requests_of("2").is_empty());
    Ok(())
}
