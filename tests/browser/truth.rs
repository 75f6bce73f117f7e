//! The page tells the truth: what failed is red and says why, in the list, the steps, the stages and
//! the conversation, and what did not fail is not. What is asserted is what a person reads.

use std::fs;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::demo::{
    AgentCall, BOOKED, FIRST_MESSAGE, OUR_NUMBER, PATIENCE, Phone, Reply, SUMMARY, World, pcm_of,
    voice,
};
use crate::{
    Browser, CALLER, DESKTOP, Fallible, Outcome, TELEPHONE, builder, file_past_call, number_of,
    world,
};

/// What n8n answers when a node of the workflow fails.
fn broken() -> Reply {
    Reply::json(500, &json!({"message": "Error in workflow"}))
}

const BROKEN: &str = "500 {\"message\":\"Error in workflow\"} (the workflow failed: see n8n's \
    Executions)";

fn enter_main_convo(agent: &AgentCall) -> Outcome {
    let details = json!({"issue_type": "meeting", "issue_details": "Life insurance.",
        "customer_name": "Anna Berg"});
    agent.wait_result(&agent.invoke("move_to_main_convo", &details)?)?;
    Ok(())
}

/// The agent speaks for so long, and is heard to the end.
fn speaks(agent: &AgentCall, phone: &Phone, text: &str, ms: u64) -> Outcome {
    let (so_far, sound) = (phone.heard_audio().len(), voice(3, ms));
    agent.say(text, &pcm_of(&sound))?;
    phone.wait_audio(so_far + sound.len())?;
    phone.wait_played();
    Ok(())
}

fn wishes(purpose: &str) -> Value {
    json!({"name": "Anna Berg", "email": "anna.berg@example.com", "purpose": purpose,
        "datetime": "2027-03-09T14:30", "location": "London"})
}

#[test]
fn a_wrong_key_is_said_to_be_one() -> Outcome {
    const WHY: &str = "Ultravox: could not create the agent's call: 403 {\"detail\":\"Invalid API \
        key\"} (check ULTRAVOX_API_KEY)";
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder().setting("ULTRAVOX_API_KEY", "not-the-key"))?;
    let ringing = world.ring(CALLER)?;
    browser.open(&world, &format!("#{}", ringing.call_sid))?;
    browser.wait("text('.badge') === 'no agent'")?;
    assert_eq!(browser.read("#failures li")?, [format!("3 agent{WHY}")]);
    browser.wait("[4, 8].every((step) => stepClass(step) === 'done')")?;
    assert_eq!(browser.run("stepClass(3)")?, "failed");
    assert_eq!(browser.run("taleOf(3)")?, format!("{WHY}\nThe caller heard an apology."));
    for step in [5, 6, 7] {
        assert_eq!(browser.run(&format!("stepClass({step})"))?, "skipped", "step {step}");
        let tale = browser.run(&format!("taleOf({step})"))?;
        assert_eq!(tale, "The call ended before this step.", "step {step}");
    }
    // Nothing was said, so nothing was delivered, and nothing is missing.
    browser.wait("text('.fate').endsWith('Nothing was said, so there is no transcript.')")?;
    assert_eq!(browser.run("stepClass(9)")?, "skipped");
    assert_eq!(browser.run("taleOf(9)")?, "Nothing was said, so there is no transcript.");
    assert_eq!(browser.run("document.body.innerText.includes('n8n has the')")?, false);
    assert_eq!(browser.run("$('waiting').hidden")?, true);
    browser.wait("document.querySelector('#past .row.failed')")?;
    assert_eq!(browser.read("#past .row .how")?, ["no agent"]);
    assert_eq!(browser.read("#past .row .failures")?, ["agent failed"]);
    browser.wait("text('#parties .trouble').includes('check ULTRAVOX_API_KEY')")?;
    // A click on what failed opens its step.
    browser.click("#failures button")?;
    browser.wait("!$('step-3').hidden && $('step-3').checkVisibility()")?;
    browser.look_over("wrong key", DESKTOP, "light")?;
    browser.emulate(TELEPHONE, "dark")?;
    browser.look_over("wrong key dark", TELEPHONE, "dark")?;
    browser.check_rules(&world)
}

#[test]
fn what_n8n_does_not_do_is_red_everywhere_until_it_is_done() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder())?;
    for route in ["1", "2", "3"] {
        world.n8n.set_reply(route, broken());
    }
    let ringing = world.ring(CALLER)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(&world)?;
    browser.open(&world, &format!("#{}", ringing.call_sid))?;
    browser.wait("stepClass(2) === 'failed'")?;
    assert_eq!(browser.run("taleOf(2)")?, format!("n8n: {BROKEN}\nThe default greeting was used."));
    agent.say("How can I help you?", &pcm_of(&voice(1, 100)))?;
    enter_main_convo(&agent)?;
    agent.wait_result(&agent.invoke("schedule_meeting", &wishes("Life insurance"))?)?;

    // While the call goes on.
    browser.wait("document.querySelector('.tool.failed')")?;
    browser
        .wait("text('#live .row.failed .failures') === 'greeting and schedule_meeting failed'")?;
    assert_eq!(browser.run("stepClass(7)")?, "failed");
    assert_eq!(browser.read(".tool.failed code")?, ["schedule_meeting"]);
    assert_eq!(browser.read(".tool.failed .why")?, [format!("n8n: {BROKEN}")]);
    let outcome = browser.read(".tool.failed .outcome")?;
    let is_honest =
        outcome[0].starts_with("failed after") && outcome[0].contains("perhaps done all the same");
    assert!(is_honest, "{outcome:?}");
    browser.wait("text('.tools-here .failed') === 'schedule_meeting ✗'")?;
    browser.wait("stageClass('main_convo').includes('failed')")?;
    browser.wait("!stageClass('greeting').includes('failed')")?;
    browser.wait("text('#parties li:nth-child(2).trouble').includes('the workflow failed')")?;
    browser.shoot("live call with failing n8n", DESKTOP)?;
    agent.user_said("Well, then not.")?;
    phone.send_stop()?;

    browser.wait(
        "text('#past .row .failures') === 'greeting, schedule_meeting and delivery failed'",
    )?;
    browser.wait("stepClass(9) === 'failed' && taleOf(9).includes('will be offered again')")?;
    browser.wait("text('.fate').includes('n8n has not taken the transcript yet')")?;
    assert_eq!(browser.read("#failures button")?, ["2 greeting", "7 schedule_meeting", "9 after"]);
    let states = browser.run("[1, 3, 4, 5, 6, 8].map((step) => stepClass(step))")?;
    assert_eq!(states, json!(vec!["done"; 6]), "what did not fail is not red");
    browser.look_over("failing n8n", DESKTOP, "light")?;
    browser.emulate(TELEPHONE, "light")?;
    browser.look_over("failing n8n", TELEPHONE, "light")?;
    browser.emulate(DESKTOP, "light")?;

    // n8n is well again, and does not have to wait for its next turn.
    browser.wait("text('#waiting').includes('1 transcript waits for n8n.')")?;
    world.n8n.set_reply("2", Reply::json(200, &json!({})));
    browser.click("#offer")?;
    browser.wait("stepClass(9) === 'done' && $('waiting').hidden")?;
    browser.wait("text('.fate').endsWith('n8n has the transcript.')")?;
    browser.wait("text('#past .row .failures') === 'greeting and schedule_meeting failed'")?;
    browser.wait("text('#parties li:nth-child(2).well').includes('works')")?;
    browser.check_rules(&world)
}

#[test]
fn the_page_says_which_number_was_called_and_who_decided() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder().setting("FALLBACK_NUMBER", "+4930111222"))?;
    for (answer, tale, badge, answered) in [
        (
            json!({"firstMessage": "Hi.", "stage": "main_convo", "facts": "Owes 12 euros."}),
            "n8n chose the stage main_convo. n8n sent what it knows about the caller.",
            "live",
            "TwiML went back",
        ),
        (
            json!({"transfer": true}),
            "n8n wanted a person to take the call.",
            "put through",
            "The caller was put through to a person.",
        ),
        (json!({"refuse": true}), "n8n refused the call.", "refused", "Twilio was told to refuse"),
    ] {
        world.n8n.set_reply("1", Reply::json(200, &answer));
        let ringing = world.ring(CALLER)?;
        browser.open(&world, &format!("#{}", ringing.call_sid))?;
        browser.wait(&format!("text('.badge') === {}", json!(badge)))?;
        let called = json!(format!("incoming · called {OUR_NUMBER} · "));
        browser.wait(&format!("text('.facts').startsWith({called})"))?;
        browser.wait(&format!("taleOf(1).includes({})", json!(OUR_NUMBER)))?;
        browser.wait(&format!("taleOf(2).endsWith({})", json!(tale)))?;
        browser.wait(&format!("taleOf(4).startsWith({})", json!(answered)))?;
        if badge == "live" {
            browser.wait("stageClass('main_convo').includes('here')")?;
        }
        ringing.call_status(&world, "completed")?;
    }
    browser.check_rules(&world)
}

#[test]
fn a_journal_of_an_older_version_is_red_where_its_end_says_so() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder())?;
    let at = "2026-11-01T10:00:00.000Z";
    let sid = format!("CA{:032x}", 7);
    let events = [
        json!({"at": at, "event": "ring", "callSid": sid, "number": CALLER, "direction": "in"}),
        json!({"at": at, "event": "greeting", "from": "default", "ms": 2_000, "why": "too late"}),
        json!({"at": at, "event": "answer", "what": "apology", "ms": 5}),
        json!({"at": at, "event": "tool", "id": "i", "tool": "verify", "stage": "greeting",
            "arguments": {}, "result": "It failed.", "outcome": "failed", "ms": 5}),
        json!({"at": at, "event": "goodbye", "endedBy": "NoAgent", "ms": 5}),
        json!({"at": at, "event": "end", "endedBy": "NoAgent"}),
        json!({"at": at, "event": "delivered"}),
    ];
    let lines: Vec<String> = events.iter().map(|event| format!("{event}\n")).collect();
    let directory = world.data_dir().join("calls");
    fs::create_dir_all(&directory)?;
    fs::write(directory.join(format!("20261101T100000Z-{sid}.jsonl")), lines.concat())?;
    browser.open(&world, &format!("#{sid}"))?;
    browser.wait("stepClass(3) === 'failed' && stepClass(7) === 'failed'")?;
    let words = browser.read("#failures li")?;
    assert_eq!(
        words,
        [
            "3 agentNobody could answer: Ultravox refused the call or could not be reached.",
            "7 verifyIt failed."
        ]
    );
    browser.check_rules(&world)
}

#[test]
fn each_answer_is_timed_from_the_callers_last_word() -> Outcome {
    const PAUSE_MS: u64 = 400;
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder())?;
    let ringing = world.ring(CALLER)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(&world)?;
    browser.open(&world, &format!("#{}", ringing.call_sid))?;
    speaks(&agent, &phone, FIRST_MESSAGE, 200)?;
    enter_main_convo(&agent)?;
    let words = voice(2, 300);
    let mut longest = 0;
    for turn in 1..=2 {
        let began = Instant::now();
        phone.speak(&words)?;
        agent.wait_caller_audio(turn * 2 * words.len())?;
        agent.user_said(&format!("Question {turn}?"))?;
        // It takes the agent so long to find out.
        let booked = Reply::json(200, &json!({"message": BOOKED}));
        world.n8n.reply_next("3", booked.after(Duration::from_millis(PAUSE_MS)));
        agent.wait_result(&agent.invoke("schedule_meeting", &wishes(&format!("{turn}")))?)?;
        speaks(&agent, &phone, &format!("Answer {turn}."), 200)?;
        browser.wait(&format!("document.querySelectorAll('#said .answer').length === {turn}"))?;
        longest = u64::try_from(began.elapsed().as_millis())?.max(longest);
    }
    let shown = browser.run(
        "[...document.querySelectorAll('#said .agent')].map((said) =>
        [said.querySelector('p').textContent, said.querySelector('.answer')?.textContent ?? ''])",
    )?;
    assert_eq!(shown[0], json!([FIRST_MESSAGE, ""]), "the greeting answers nobody");
    for turn in 1..=2 {
        let words = shown[turn][1].as_str().unwrap_or_default();
        let ms = words.strip_prefix("after ").and_then(|words| words.strip_suffix(" ms"));
        let ms: u64 = ms.ok_or(words.to_owned())?.parse()?;
        assert!((PAUSE_MS..=longest).contains(&ms), "{ms}, not from {PAUSE_MS} to {longest}");
    }
    browser.wait("/median answer \\d+ ms/.test(text('.facts'))")?;
    phone.send_stop()?;
    browser.wait("text('.badge') === 'caller hung up'")?;
    browser.wait("document.querySelector('.picture .medians')")?;
    browser.check_rules(&world)
}

#[test]
fn the_list_is_filtered_and_searched_and_a_call_taken_along_or_deleted() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder())?;
    for index in 0..120 {
        file_past_call(&world, index)?;
    }
    let ringing = world.ring(CALLER)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(&world)?;
    agent.say(FIRST_MESSAGE, &pcm_of(&voice(1, 100)))?;
    agent.user_said("Ich brauche ein Entgeltfortzahlungsgesetz.")?;
    agent.wait_result(&agent.invoke("no_such_thing", &json!({}))?)?;
    phone.send_stop()?;
    world.n8n.wait_for("2", 1, PATIENCE)?;
    browser.open(&world, "")?;
    browser.wait("document.querySelectorAll('#past .row').length >= 50")?;

    // By outcome, on the server: what fits is found however far down it is.
    browser.choose("by-end", "failed")?;
    browser.wait("document.querySelectorAll('#past .row').length === 1")?;
    assert_eq!(browser.read("#past .failures")?, ["no_such_thing failed"]);
    browser.choose("by-end", "AgentLost")?;
    browser.wait("text('#no-past') === 'No call matches.' && !text('#past')")?;
    browser.choose("by-end", "")?;
    browser.wait("document.querySelectorAll('#past .row').length >= 50")?;

    // By what was said.
    browser.run("$('by-words').focus()")?;
    browser.insert_text("entgeltfort")?;
    browser.wait("document.querySelectorAll('#past .row').length === 1")?;
    assert_eq!(browser.read("#past .who")?, [CALLER]);
    browser.run("document.querySelector('#past .row').click()")?;
    browser.wait("text('#said').includes('Entgeltfortzahlungsgesetz')")?;

    let saved = browser.downloads()?;
    browser.click("[aria-label=\\\"Save this call as text\\\"]")?;
    let text = saved.wait(".txt")?;
    for wanted in [
        CALLER,
        "The caller hung up. n8n has the transcript.",
        "Failed: 7 no_such_thing: ",
        &format!("Agent: {FIRST_MESSAGE}"),
        "Caller: Ich brauche ein Entgeltfortzahlungsgesetz.",
    ] {
        assert!(text.contains(wanted), "no {wanted} in {text}");
    }
    browser.click("[aria-label=\\\"Save this call as JSON\\\"]")?;
    let call: Value = serde_json::from_str(&saved.wait(".json")?)?;
    assert_eq!(call["summary"]["endedBy"], "CallerLeft");
    assert_eq!(call["events"][0]["event"], "ring");

    // Away it goes, here and at Ultravox, but not before one has said so twice.
    let row = "document.querySelectorAll('#past .row').length";
    browser.click("[aria-label=\\\"Delete this call\\\"]")?;
    browser
        .wait("$('confirm').open && text('#confirm-words').includes('and the call at Ultravox')")?;
    browser.look_over("delete", DESKTOP, "light")?;
    browser.press("Escape")?;
    browser.wait("!$('confirm').open && text('#call-title')")?;
    assert_eq!(world.ultravox.deleted(), [""; 0]);
    browser.click("[aria-label=\\\"Delete this call\\\"]")?;
    browser.click("#confirm-yes")?;
    browser.wait(&format!("!$('confirm').open && text('.welcome') && {row} === 0"))?;
    assert_eq!(world.ultravox.deleted(), [agent.id()]);
    assert_eq!(world.journal(&ringing.call_sid), [Value::Null; 0]);

    // Without a filter all are there again, down to the oldest.
    browser.run("$('by-words').value = ''; filterChanged()")?;
    browser.wait(&format!("(() => {{ $('list').scrollTo(0, 1e9); return {row} === 120; }})()"))?;
    browser.wait(&format!("text('#past li:last-child .who') === '{}'", number_of(0)))?;
    browser.check_rules(&world)
}

#[test]
fn a_transcript_that_n8n_does_not_have_is_not_deleted_by_accident() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder())?;
    world.n8n.set_reply("2", broken());
    let ringing = world.ring(CALLER)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(&world)?;
    agent.user_said("Do not forget me.")?;
    browser.open(&world, &format!("#{}", ringing.call_sid))?;
    browser.wait("text('#said').includes('Do not forget me.')")?;
    assert_eq!(browser.run("view.nodes.remove.hidden")?, true, "not while the call goes on");
    phone.send_stop()?;
    browser.wait("stepClass(9) === 'failed'")?;
    browser.click("[aria-label=\\\"Delete this call\\\"]")?;
    browser.wait("text('#confirm-words.bad').includes('it will be lost')")?;
    browser.click("#confirm-yes")?;
    browser.wait("text('.welcome') && text('#no-past') === 'No calls yet.'")?;
    // Nothing is left that would be offered, or that would write the journal anew.
    browser.wait("overview.outbox.waiting === 0 && $('waiting').hidden")?;
    assert_eq!(world.journal(&ringing.call_sid), [Value::Null; 0]);
    browser.check_rules(&world)
}

#[test]
fn the_health_line_says_how_the_day_went() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder())?;
    // A day's calls: one every minute until now, every fourth of them with an agent that was lost.
    for index in (0..60).map(|minute| 1_999 - minute) {
        file_past_call(&world, index)?;
    }
    for path in world.journals().iter().step_by(4) {
        let text = fs::read_to_string(path)?.replace("CallerLeft", "AgentLost");
        fs::write(path, text)?;
    }
    browser.open(&world, "")?;
    browser.wait("document.querySelectorAll('#today dd').length === 5")?;
    browser.wait("text('#parties li:nth-child(1).well').includes('Ultravox')")?;
    browser.wait("text('#parties li:nth-child(2).well').includes('n8n')")?;
    assert_eq!(browser.read("#parties li:nth-child(3) .words")?, ["has not called yet"]);
    let sum = |browser: &mut Browser, what: &str| -> Fallible<Value> {
        browser.run(&format!("overview.health.days.reduce((all, day) => all + day.{what}, 0)"))
    };
    browser.wait("overview.health.isComplete")?;
    assert_eq!(sum(&mut browser, "calls")?, 60);
    assert_eq!(sum(&mut browser, "failed")?, 15);
    let words = browser.read(".picture figcaption")?;
    assert!(words[1].starts_with("30 days: 60 calls"), "{words:?}");
    let label = "document.querySelectorAll('.picture svg')[1].getAttribute('aria-label')";
    assert_eq!(browser.run(label)?, "Last 30 days: 60 calls, 15 failed");
    browser.wait("document.querySelectorAll('.picture svg')[0].childElementCount >= 24")?;
    // Just after midnight, few of them are today's, or none.
    let today = browser.run("overview.health.today")?;
    let [calls, failed] = ["calls", "failed"].map(|what| today[what].as_f64().unwrap_or_default());
    let percent = (100.0 * failed / calls.max(1.0)).round();
    assert_eq!(browser.read("#today dd")?[2], format!("{percent} %"));

    let ringing = world.ring(CALLER)?;
    browser.wait("text('#parties li:nth-child(3).well').includes('called last at')")?;
    browser.wait("text('#today').includes('call now')")?;
    ringing.call_status(&world, "completed")?;
    for (size, scheme) in [(DESKTOP, "light"), (DESKTOP, "dark"), (TELEPHONE, "light")] {
        browser.emulate(size, scheme)?;
        browser.look_over("health", size, scheme)?;
    }
    browser.check_rules(&world)
}

#[test]
fn on_a_telephone_the_conversation_comes_first_and_the_phone_covers_nothing() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder())?;
    browser.emulate((390, 844), "light")?;
    browser.open(&world, "")?;
    browser.run("document.documentElement.click(); $('talk-to-it').click()")?;
    browser.click("#dial")?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    browser.wait("phone.state === 'talking' && text('#call-title') === 'Test call'")?;
    agent.say(FIRST_MESSAGE, &pcm_of(&voice(1, 200)))?;
    for words in ["Hello?", "I would like to book a meeting.", "Next Tuesday, if you can."] {
        agent.user_said(words)?;
        agent.say("Of course. One moment, please, while I look.", &pcm_of(&voice(4, 50)))?;
    }
    browser.wait("document.querySelectorAll('#said li').length === 7")?;
    // The strip is above it and low, the stages are below it.
    browser.wait(
        "(() => { const box = (id) => $(id).getBoundingClientRect();
        return box('steps').height < 60 && box('steps').bottom <= box('talk').top
            && box('talk').bottom <= box('flow').top; })()",
    )?;
    // Nothing of the page lies below the phone.
    browser.wait(
        "document.querySelector('.page').getBoundingClientRect().bottom
            <= $('phone').getBoundingClientRect().top + 1 && innerHeight >=
            $('phone').getBoundingClientRect().bottom",
    )?;
    browser.look_over("phone and conversation", (390, 844), "light")?;
    let last = "[...document.querySelectorAll('#said li')].at(-1)";
    browser.run(&format!("{last}.scrollIntoView({{ block: 'end' }})"))?;
    browser.wait(&format!(
        "(() => {{ const box = {last}.getBoundingClientRect();
        const hit = document.elementFromPoint(box.x + 20, box.bottom - 8);
        return {last}.contains(hit); }})()"
    ))?;
    browser.emulate((390, 844), "dark")?;
    browser.look_over("phone and conversation", (390, 844), "dark")?;
    browser.click("#hang-up")?;
    browser.wait("phone.state === 'idle'")?;
    browser.check_rules(&world)
}

/// Some calls a day, as a small office has them, with one now and then that went wrong.
fn file_a_month(world: &World) -> Outcome {
    let directory = world.data_dir().join("calls");
    fs::create_dir_all(&directory)?;
    for index in 0..170_u32 {
        let ago = SignedDuration::from_mins(40 + i64::from(index * index) * 43_000 / 170 / 170);
        let began = Timestamp::now() - ago;
        let at = |seconds: u32| {
            let at = began + SignedDuration::from_secs(seconds.into());
            at.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()
        };
        let sid = format!("CA{index:032x}");
        let number = format!("+4930{}", 5_550_000 + index * 7_919 % 9_999);
        let lasts = 40 + index * 37 % 150;
        let mut events = vec![
            json!({"at": at(0), "event": "ring", "callSid": sid, "number": number,
                "direction": "in"}),
            json!({"at": at(1), "event": "agent", "callId": "a", "agent": 1}),
            json!({"at": at(9), "event": "turn", "ms": 620 + index * 97 % 480}),
            json!({"at": at(9), "event": "said", "agent": 1, "ordinal": 1, "speaker": "User",
                "text": "Good morning."}),
        ];
        let end = if index % 3 == 0 { "CallerLeft" } else { "AgentHungUp" };
        if index % 11 == 3 {
            events.push(json!({"at": at(30), "event": "failed", "step": 2, "why": "n8n: 500"}));
        }
        if index % 17 == 5 {
            events.push(json!({"at": at(31), "event": "tool", "id": "i", "stage": "main_convo",
                "tool": "schedule_meeting", "arguments": {}, "result": "", "outcome": "failed",
                "ms": 9}));
        }
        events.push(json!({"at": at(lasts), "event": "end", "endedBy": end}));
        events.push(json!({"at": at(lasts), "event": "delivered"}));
        let lines: Vec<String> = events.iter().map(|event| format!("{event}\n")).collect();
        let name = format!("{}-{sid}.jsonl", began.strftime("%Y%m%dT%H%M%SZ"));
        fs::write(directory.join(name), lines.concat())?;
    }
    Ok(())
}

/// A good call and a live one, as they stand in the README and in front of whoever changes the page.
#[test]
fn a_good_call_is_nowhere_red() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder())?;
    file_a_month(&world)?;
    let ringing = world.ring(CALLER)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(&world)?;
    browser.open(&world, &format!("#{}", ringing.call_sid))?;
    speaks(&agent, &phone, FIRST_MESSAGE, 100)?;
    for (asked, (question, answer)) in [
        ("I would like to talk about life insurance.", "With pleasure. May I have your name?"),
        ("Anna Berg.", "Thank you, Anna. I am putting you through to Mark."),
    ]
    .into_iter()
    .enumerate()
    {
        phone.speak(&voice(2, 200))?;
        agent.wait_caller_audio((asked + 1) * 2 * 1_600)?;
        agent.user_said(question)?;
        speaks(&agent, &phone, answer, 100)?;
    }
    enter_main_convo(&agent)?;
    agent.wait_result(&agent.invoke("schedule_meeting", &wishes("Life insurance"))?)?;
    agent.say(BOOKED, &pcm_of(&voice(4, 100)))?;
    browser.wait(&format!("text('#said').includes('{BOOKED}')"))?;
    browser.wait("document.querySelectorAll('#said .answer').length === 2")?;
    browser.look_over("good live call", DESKTOP, "light")?;
    browser.emulate(DESKTOP, "dark")?;
    browser.look_over("good live call", DESKTOP, "dark")?;
    browser.emulate((390, 844), "light")?;
    browser.look_over("good live call", (390, 844), "light")?;
    browser.emulate(DESKTOP, "light")?;
    agent.wait_result(&agent.invoke("hangUp", &json!({"reason": "done"}))?)?;
    agent.say("Goodbye, Anna.", &pcm_of(&voice(2, 100)))?;
    agent.close()?;
    phone.wait_closed()?;
    browser.wait("text('.fate').endsWith('n8n has the transcript.')")?;
    browser.wait("[1, 2, 3, 4, 5, 6, 7, 8, 9].every((step) => stepClass(step) === 'done')")?;
    browser.wait("text('#past .row .how') === 'agent hung up'")?;
    let red = "document.querySelectorAll('#call .failed, #call .bad, [aria-current].failed, \
        #parties .trouble').length";
    assert_eq!(browser.run(red)?, 0);
    assert_eq!(browser.run("$('failures').hidden")?, true);
    browser.look_over("good call", DESKTOP, "light")?;
    browser.check_rules(&world)
}

#[test]
fn mistakes_in_the_agents_files_are_on_the_page_until_they_are_corrected() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let files = tempfile::tempdir()?;
    for entry in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src/agent"))? {
        let entry = entry?;
        fs::copy(entry.path(), files.path().join(entry.file_name()))?;
    }
    let world = world(builder().setting("AGENT_DIR", files.path().display()))?;
    browser.open(&world, "")?;
    browser.wait("text('#parties li:nth-child(4).well').includes('as its files have it since')")?;
    let path = files.path().join("agent.json");
    let right = fs::read_to_string(&path)?;
    fs::write(&path, right.replacen("\"first_stage\"", "\"first_stag\"", 1))?;
    browser.wait("text('#parties li:nth-child(4).trouble').includes('`first_stage` is meant')")?;
    fs::write(&path, right)?;
    browser.wait("text('#parties li:nth-child(4).well').includes('as its files have it since')")?;
    Ok(())
}

#[test]
fn what_ultravox_says_of_a_call_is_read_there() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder())?;
    let ringing = world.ring(CALLER)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(&world)?;
    speaks(&agent, &phone, "Good morning.", 200)?;
    phone.hang_up()?;
    world.n8n.wait_for("2", 1, 2 * PATIENCE)?;
    browser.open(&world, &format!("#{}", ringing.call_sid))?;
    browser.wait(&format!("text('.told') === '{SUMMARY} Ultravox bills 72 s.'"))?;
    Ok(())
}
