//! A caller who is put through: whoever picks up is told who calls and why, and is connected only
//! with a 1. Whatever else happens, the caller comes back to an agent who knows it. The real
//! program, and the pretend world of `src/demo/` around it; `src/demo/person.rs` is the person.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::demo::{AgentCall, Marks, PATIENCE, Phone, Reply, Ringing, Trouble, World};
use crate::faults::{
    COLLEAGUE, TALK, TRANSFERRED, ask_for_a_person, assert_dials, assert_hangup,
    assert_no_rule_broken, builder, caller_hears, connect_and_talk, on_a_full_disk, the_transcript,
    wait_for_event,
};
use crate::{Call, Outcome, wishes};

/// So long takes n8n for a booking.
const SLOW: Duration = Duration::from_secs(2);
/// What the person hears from the built-in agent.
const WHISPER: &str = "A call for SecureLife Insurance. Anna Berg, about a broken window. To take \
    it, press 1.";

/// A call whose caller is about to be put through, and what Twilio is told to do.
fn put_through(world: &World) -> Result<(Call, Ringing), Box<dyn std::error::Error + Send + Sync>> {
    let call = ask_for_a_person(world)?;
    let dial = call.ringing.next(world, &[])?;
    assert_dials(&dial);
    Ok((call, dial))
}

/// The caller is with an agent again.
#[track_caller]
fn is_back(world: &World, back: &Ringing, knows: &str) -> Result<(AgentCall, Phone), Trouble> {
    let agent = world.ultravox.next_call(PATIENCE)?;
    let first = &agent.request()["firstSpeakerSettings"]["agent"];
    let told = first["prompt"].as_str().unwrap_or_default();
    assert!(told.contains(knows) && told.contains("Tell them so"), "{first}");
    let phone = back.open_stream(world)?;
    caller_hears(&phone, &agent, "Sorry.", 8)?;
    Ok((agent, phone))
}

#[track_caller]
fn is_filed(world: &World, more: &str, ended_by: &str) -> Result<(), Trouble> {
    let text = format!("{TALK}{TRANSFERRED}{more}");
    assert_eq!(the_transcript(world)?, (text, ended_by.to_owned()));
    Ok(())
}

#[test]
fn a_person_hears_who_calls_and_why_and_takes_the_call() -> Outcome {
    let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    let (call, dial) = put_through(&world)?;
    assert!(dial.twiml.answer_on_bridge, "the caller hears ringing: {}", dial.twiml.xml);
    let mut person = dial.person_picks_up(&world)?;
    assert_eq!(person.hears(), WHISPER);
    let xml = &person.twiml().xml;
    assert_eq!(person.twiml().elements, ["Response", "Gather", "Say", "Hangup"], "{xml}");
    assert!(xml.contains("numDigits=\"1\"") && xml.contains("timeout=\"8\""), "{xml}");
    assert!(!person.is_connected());
    person.presses("1")?;
    assert!(person.is_connected(), "{}", person.twiml().xml);
    wait_for_event(&world, &call.ringing.call_sid, "accepted")?;
    assert!(world.n8n.requests_of("2").is_empty(), "filed while they talk");
    assert_hangup(&person.leaves()?);
    is_filed(&world, "", "Transferred")?;
    assert_eq!(world.ultravox.requests(), 1);
    assert_no_rule_broken(&world, &[&call.phone]);
    Ok(())
}

#[test]
fn whoever_does_not_press_1_has_not_taken_the_call() -> Outcome {
    // A mailbox presses nothing, and neither does somebody who hangs up.
    for key in ["2", "0", "*", "#", ""] {
        let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
        let (call, dial) = put_through(&world)?;
        let mut person = dial.person_picks_up(&world)?;
        if !key.is_empty() {
            person.presses(key)?;
        }
        assert!(!person.is_connected() && person.twiml().hangs_up, "{}", person.twiml().xml);
        let (agent, phone) = is_back(&world, &person.leaves()?, "did not take the call")?;
        assert_eq!(agent.query(), format!("priorCallId={}", call.agent.id()), "{key}");
        assert!(world.n8n.requests_of("2").is_empty(), "filed before it is decided");
        phone.hang_up()?;
        is_filed(&world, "\nAgent: Sorry.", "CallerLeft")?;
        let journal = world.journal(&call.ringing.call_sid);
        assert!(journal.iter().all(|event| event["event"] != "accepted"), "{key}");
        assert_no_rule_broken(&world, &[&call.phone, &phone]);
    }
    Ok(())
}

#[test]
fn a_second_person_takes_the_call_that_the_first_did_not() -> Outcome {
    let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    let (_call, dial) = put_through(&world)?;
    let back = dial.nobody_picks_up(&world, "busy")?;
    let (agent, phone) = is_back(&world, &back, "nobody answered")?;
    let other = json!({"reason": "Anna Berg, again!"});
    agent.wait_result(&agent.invoke("transfer_to_person", &other)?)?;
    agent.close()?;
    phone.wait_closed()?;
    let dial = back.next(&world, &[])?;
    assert_dials(&dial);
    let mut person = dial.person_picks_up(&world)?;
    assert_eq!(
        person.hears(),
        "A call for SecureLife Insurance. Anna Berg, again! To take it, press 1."
    );
    person.presses("1")?;
    assert_hangup(&person.leaves()?);
    is_filed(&world, "\nAgent: Sorry.", "Transferred").map_err(Into::into)
}

#[test]
fn the_caller_leaves_before_and_after_a_person_takes_the_call() -> Outcome {
    for (picked_up, key, told_first, ended_by) in [
        (false, "", false, "CallerLeft"),
        (false, "", true, "CallerLeft"),
        (true, "", false, "CallerLeft"),
        (true, "1", false, "Transferred"),
        (true, "1", true, "Transferred"),
    ] {
        let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
        let (_call, dial) = put_through(&world)?;
        let mut person = if picked_up { Some(dial.person_picks_up(&world)?) } else { None };
        if let Some(person) = person.as_mut().filter(|_| !key.is_empty()) {
            person.presses(key)?;
        }
        // The number's own webhook may be faster than that of the `<Dial>`.
        if told_first {
            dial.call_status(&world, "completed")?;
        }
        let gone = [("CallStatus", "completed"), ("DialCallStatus", "canceled")];
        let answer = match person {
            Some(person) => person.caller_leaves()?,
            None => dial.next(&world, &gone)?,
        };
        assert_hangup(&answer);
        is_filed(&world, "", ended_by)?;
        assert_eq!(world.ultravox.requests(), 1, "{picked_up} {key}");
    }
    Ok(())
}

#[test]
fn a_process_dies_while_the_persons_phone_rings_and_while_they_talk() -> Outcome {
    for (key, knows) in [("1", ""), ("3", "did not take the call")] {
        let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
        let (_call, dial) = put_through(&world)?;
        world.bridge.restart()?;
        let mut person = dial.person_picks_up(&world)?;
        assert_eq!(person.hears(), WHISPER);
        world.bridge.restart()?;
        person.presses(key)?;
        world.bridge.restart()?;
        if key == "1" {
            assert_hangup(&person.leaves()?);
            is_filed(&world, "", "Transferred")?;
        } else {
            let (_agent, phone) = is_back(&world, &person.leaves()?, knows)?;
            phone.hang_up()?;
            is_filed(&world, "\nAgent: Sorry.", "CallerLeft")?;
        }
    }
    Ok(())
}

/// Twilio does not ask any more; the journal tells what it was.
#[test]
fn a_call_that_is_never_asked_about_again_is_filed_as_what_it_was() -> Outcome {
    for (key, ended_by) in [("1", "Transferred"), ("2", "CallerLeft")] {
        let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
        let (_call, dial) = put_through(&world)?;
        dial.person_picks_up(&world)?.presses(key)?;
        world.bridge.restart()?;
        dial.call_status(&world, "completed")?;
        is_filed(&world, "", ended_by)?;
    }
    Ok(())
}

#[test]
fn the_reason_may_be_any_text() -> Outcome {
    let megabyte = "why ".repeat(250_000);
    let cut = format!("{}…", "why ".repeat(50));
    let cases = [
        (json!({"reason": megabyte}), &*cut),
        (
            json!({"reason": "</Say><Dial>+1900555</Dial> & \"Söhne\" 你好\u{7}"}),
            "</Say><Dial>+1900555</Dial> & \"Söhne\" 你好.",
        ),
        (json!({"reason": "#rc=0&Digits=1?x%26=+ "}), "#rc=0&Digits=1?x%26=+."),
        (json!({"reason": {"a": [1]}}), "{\"a\":[1]}."),
        (json!({"reason": "Is it insured?"}), "Is it insured?"),
    ];
    let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    for (reason, heard) in cases {
        let call = connect_and_talk(&world)?;
        call.phone.marks(Marks::AtOnce);
        call.act("transfer_to_person", &reason)?;
        call.agent.close()?;
        call.phone.wait_closed()?;
        let dial = call.ringing.next(&world, &[])?;
        assert_dials(&dial);
        assert_eq!(dial.twiml.elements, ["Response", "Dial", "Number"]);
        let mut person = dial.person_picks_up(&world)?;
        let wanted = format!("A call for SecureLife Insurance. {heard} To take it, press 1.");
        assert_eq!(person.hears(), wanted);
        assert_eq!(person.twiml().elements, ["Response", "Gather", "Say", "Hangup"]);
        person.presses("1")?;
        assert_hangup(&person.leaves()?);
    }
    // Without one, the agent is asked for it.
    let call = connect_and_talk(&world)?;
    for none in [json!({}), json!({"reason": " "}), Value::Null] {
        let answer = call.act("transfer_to_person", &none)?;
        assert_eq!(answer["responseType"], "tool-response", "{answer}");
        assert!(answer["result"].as_str().is_some_and(|text| text.contains("reason is missing")));
    }
    Ok(())
}

/// The built-in agent with people, and tools that put through to them in every way there is.
fn agent_with_people(directory: &Path) -> Outcome {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/agent");
    for name in ["greeting.md", "main_convo.md", "call_summary.md"] {
        fs::copy(format!("{source}/{name}"), directory.join(name))?;
    }
    let text = fs::read_to_string(format!("{source}/agent.json"))?;
    let mut agent: Value = serde_json::from_str(&text)?;
    agent["people"] = json!({"Claims": "+4930555001", "Sales": "+4930555002"});
    agent["phrases"]["whisper"] = json!("{company_name} ruft: {reason} Mit 1 nehmen Sie an.");
    agent["language"] = json!("de-DE");
    let department = json!({"type": "object", "required": ["department"],
        "properties": {"department": {"type": "string"}, "reason": {"type": "string"}}});
    agent["tools"]["to_department"] = json!({"description": "To one of ours.",
        "parameters": department, "transfer": {"person": "department"}});
    agent["tools"]["to_claims"] = json!({"description": "To claims.", "transfer": "claims"});
    agent["tools"]["to_number"] = json!({"description": "Out.", "transfer": "+4930555003"});
    let tools = json!(["transfer_to_person", "to_department", "to_claims", "to_number"]);
    agent["stages"]["call_summary"]["tools"] = tools.clone();
    agent["stages"]["greeting"]["tools"] = json!([
        "move_to_main_convo",
        "transfer_to_person",
        "to_department",
        "to_claims",
        "to_number"
    ]);
    fs::write(directory.join("agent.json"), agent.to_string())?;
    Ok(())
}

#[test]
fn callers_are_put_through_to_different_people() -> Outcome {
    let scratch = tempfile::tempdir()?;
    agent_with_people(scratch.path())?;
    // Nobody stands behind `transfer: true`, so that one tool is not offered.
    let world = builder().setting("AGENT_DIR", scratch.path().display()).start()?;
    let anna = "Anna Berg.";
    for (tool, parameters, number, person, said) in [
        (
            "to_department",
            json!({"department": "Sales", "reason": anna}),
            "+4930555002",
            "Sales",
            "Anna Berg. ",
        ),
        ("to_department", json!({"department": " claims "}), "+4930555001", "Claims", ""),
        (
            "to_claims",
            json!({"reason": anna, "department": "Sales"}),
            "+4930555001",
            "Claims",
            "Anna Berg. ",
        ),
        ("to_number", json!({}), "+4930555003", "", ""),
    ] {
        let call = connect_and_talk(&world)?;
        call.phone.marks(Marks::AtOnce);
        let tools = call.agent.request()["selectedTools"].clone();
        let offered = tools.as_array().ok_or("no tools")?;
        let of =
            |name: &str| offered.iter().find(|tool| tool["temporaryTool"]["modelToolName"] == name);
        assert!(of("transfer_to_person").is_none(), "{tools}");
        let choice = of("to_department").map(|tool| &tool["temporaryTool"]["dynamicParameters"][0]);
        assert_eq!(choice.map(|one| &one["schema"]["enum"]), Some(&json!(["Claims", "Sales"])));
        assert!(
            !tools.to_string().contains("+49"),
            "numbers are not the model's business: {tools}"
        );

        assert_eq!(call.act(tool, &parameters)?["responseType"], "hang-up");
        call.agent.close()?;
        call.phone.wait_closed()?;
        let dial = call.ringing.next(&world, &[])?;
        assert_eq!(dial.twiml.dial.as_deref(), Some(number), "{}", dial.twiml.xml);
        let mut whoever = dial.person_picks_up(&world)?;
        assert!(whoever.twiml().xml.contains("<Say language=\"de-DE\">"));
        let wanted = format!("SecureLife Insurance ruft: {said}");
        assert!(whoever.hears().starts_with(&wanted), "{}", whoever.hears());
        whoever.presses("1")?;
        assert_hangup(&whoever.leaves()?);
        let journal = world.journal(&call.ringing.call_sid);
        let noted = journal.iter().find(|event| event["event"] == "transfer");
        assert_eq!(noted.map(|event| &event["person"]), Some(&json!(person)));
    }
    // A name that nobody has.
    let call = connect_and_talk(&world)?;
    for (wanted, lack) in [
        (json!({"department": "Legal"}), "\"Legal\" is not a department we have"),
        (json!({"department": "+4930999999"}), "Valid are: Claims, Sales"),
        (json!({"reason": anna}), "department is missing"),
    ] {
        let answer = call.act("to_department", &wanted)?;
        assert!(answer["result"].as_str().is_some_and(|text| text.contains(lack)), "{answer}");
    }
    call.phone.hang_up()?;
    Ok(())
}

/// Somebody who is not Twilio cannot take a call, nor be read what a caller wants.
#[test]
fn only_twilio_may_ask_what_to_whisper() -> Outcome {
    let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    let (call, dial) = put_through(&world)?;
    let sid = &*call.ringing.call_sid;
    let taken = format!("Digits=1&ParentCallSid={sid}");
    let kind = [("Content-Type", "application/x-www-form-urlencoded")];
    assert_eq!(world.request("POST", "/whisper", &kind, taken.as_bytes())?.status, 403);
    let told = "/whisper?reason=Anna%20Berg,%20%2B4930901820";
    assert_eq!(world.request("POST", told, &kind, taken.as_bytes())?.status, 403);
    assert_eq!(world.get("/whisper?reason=x")?.status, 405);
    // Neither can a key without a call, or for a call that is none of a person's.
    for parent in ["", "CA00", "../../etc/passwd"] {
        let form = [
            ("CallSid", "CA00000000000000000000000000000077"),
            ("Digits", "1"),
            ("ParentCallSid", parent),
        ];
        assert_eq!(world.webhook("/whisper", &form)?.status, 200, "{parent}");
    }
    let (_agent, phone) =
        is_back(&world, &dial.person_picks_up(&world)?.leaves()?, "did not take the call")?;
    phone.hang_up()?;
    is_filed(&world, "\nAgent: Sorry.", "CallerLeft")?;
    let log = world.bridge.log().concat();
    assert!(log.contains("/whisper: ") && !log.contains("Anna"), "what a caller said: {log}");
    Ok(())
}

/// Twilio repeats what got lost on the way.
#[test]
fn a_key_and_an_end_that_come_twice_count_once() -> Outcome {
    let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    let (call, dial) = put_through(&world)?;
    let mut person = dial.person_picks_up(&world)?;
    let sid = &*call.ringing.call_sid;
    let key = [
        ("CallSid", "CA00000000000000000000000000000077"),
        ("Digits", "1"),
        ("ParentCallSid", sid),
    ];
    world.webhook("/whisper", &key)?;
    person.presses("1")?;
    assert_hangup(&person.leaves()?);
    assert_hangup(&dial.next(&world, &crate::faults::CONNECTED)?);
    is_filed(&world, "", "Transferred")?;
    let journal = world.journal(sid);
    let accepted = journal.iter().filter(|event| event["event"] == "accepted");
    assert_eq!(accepted.count(), 1, "{journal:#?}");
    Ok(())
}

#[test]
fn a_transfer_needs_no_disk() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let world = on_a_full_disk(&scratch, 0)?.setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    let (_call, dial) = put_through(&world)?;
    let mut person = dial.person_picks_up(&world)?;
    assert_eq!(person.hears(), WHISPER);
    person.presses("1")?;
    assert!(person.is_connected());
    assert_hangup(&person.leaves()?);
    let filed = world.n8n.wait_for("2", 1, PATIENCE)?;
    assert_eq!(filed[0].json["endedBy"], "Transferred");
    Ok(())
}

/// What is being booked would come to nobody, and the caller could not come back meanwhile.
#[test]
fn nobody_is_put_through_while_a_tool_is_at_work() -> Outcome {
    let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
    let call = connect_and_talk(&world)?;
    call.act(
        "move_to_main_convo",
        &json!({"issue_type": "meeting", "issue_details": "Advice",
        "customer_name": "Anna Berg"}),
    )?;
    world.n8n.reply_next("3", Reply::json(200, &json!({"message": "Booked."})).after(SLOW));
    let booking = call.agent.invoke("schedule_meeting", &wishes("London"))?;
    world.n8n.wait_for("3", 1, PATIENCE)?;
    let told = call.act("transfer_to_person", &json!({"reason": "A claim."}))?;
    assert!(told["result"].as_str().unwrap_or_default().contains("wait for its result"), "{told}");
    assert_ne!(told["responseType"], "hang-up", "{told}");
    call.agent.wait_result(&booking)?;
    // Then it is done, and whom nobody answers comes back at once.
    let told = call.act("transfer_to_person", &json!({"reason": "A claim."}))?;
    assert_eq!(told["responseType"], "hang-up", "{told}");
    call.agent.close()?;
    call.phone.wait_closed()?;
    let dial = call.ringing.next(&world, &[])?;
    assert_dials(&dial);
    let back = dial.next(&world, &[("DialCallStatus", "busy")])?;
    assert!(back.twiml.stream_url.is_some(), "{}", back.twiml.xml);
    Ok(())
}

/// Twilio's word on it is documented and has not been seen. Without it, the key tells.
#[test]
fn who_has_taken_the_call_is_known_without_twilios_word() -> Outcome {
    for (key, knows) in [("1", ""), ("2", "did not take the call")] {
        let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).start()?;
        let (_call, dial) = put_through(&world)?;
        dial.person_picks_up(&world)?.presses(key)?;
        let answer = dial.next(&world, &[("DialCallStatus", "completed")])?;
        if key == "1" {
            assert_hangup(&answer);
            is_filed(&world, "", "Transferred")?;
        } else {
            let (_agent, phone) = is_back(&world, &answer, knows)?;
            phone.hang_up()?;
            is_filed(&world, "\nAgent: Sorry.", "CallerLeft")?;
        }
    }
    // A number that is rung in the agent's place has nothing to press.
    let world = builder().setting("FALLBACK_NUMBER", COLLEAGUE).setting("MAX_CALLS", 1).start()?;
    let _busy = connect_and_talk(&world)?;
    let instead = world.ring("+4930901821")?;
    assert_eq!(instead.twiml.dial.as_deref(), Some(COLLEAGUE));
    assert_hangup(&instead.next(&world, &[("DialCallStatus", "completed")])?);
    Ok(())
}
