//! The live page and its phone, in a real browser: headless Chromium, driven over its `DevTools`
//! protocol, against the real server with the pretend world of `src/demo/` around it. What is
//! asserted is what a person at the page sees and hears.
//!
//! Without a Chromium these tests say that they are skipped. `CHROMIUM=path` names one, and
//! `BROWSER_TESTS=required`, as `.ci/run` has it, makes its absence a failure. `PAGE_SHOTS=directory`
//! leaves pictures of the page there.

#![expect(clippy::print_stdout, reason = "a skipped test says so, and figures are for people")]

#[path = "../src/demo/mod.rs"]
mod demo;
#[path = "browser/truth.rs"]
mod truth;

use std::error::Error;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use tempfile::TempDir;
use tungstenite::{Message, WebSocket};

use demo::{
    AgentCall, BOOKED, FIRST_MESSAGE, PATIENCE, Reply, Trouble, World, WorldBuilder, mulaw_to_pcm,
    pcm_of, voice,
};

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;
type Fallible<T> = Result<T, Box<dyn Error + Send + Sync>>;

const TOKEN: &str = "a-token-of-the-owner";
const CALLER: &str = "+4930901820";
/// A condition on the page that does not come true within this is a failure. Test machines stumble,
/// and a browser stumbles with them; no wait that succeeds pays for it.
const PAGE_WITHIN: Duration = Duration::from_secs(30);
const DESKTOP: (u32, u32) = (1440, 900);
const TELEPHONE: (u32, u32) = (360, 740);

/// What the microphone hears: two tones, the second above what a telephone carries. Folded down
/// by careless resampling it would be heard at 2 kHz.
const TONE_HZ: f64 = 1_000.0;
const TOO_HIGH_HZ: f64 = 6_000.0;
const TONE_LEVEL: f64 = 8_000.0;

// ============================================================================
// The page follows a call
// ============================================================================

#[test]
fn the_page_follows_a_call_from_the_ring_to_its_end() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder())?;
    browser.open(&world, "")?;
    browser.wait("text('#no-live').includes('No calls right now') && overview")?;

    let ringing = world.ring(CALLER)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    browser.wait(&format!(
        "document.querySelectorAll('#live .row').length === 1 &&
        text('#live .row').includes('{CALLER}')"
    ))?;
    browser.wait("!$('live-now').hidden")?;
    browser.run("document.querySelector('#live-now a').click()")?;
    browser.wait("stepClass(4) === 'now' && stepClass(5) === 'todo'")?;
    browser.watch_steps()?;
    browser.wait(
        "timeOf(2).endsWith(' ms') && taleOf(2).startsWith('n8n sent the first message after')",
    )?;

    let phone = ringing.open_stream(&world)?;
    let ordinal = agent.begin_saying(FIRST_MESSAGE, &pcm_of(&voice(1, 3_000)))?;
    browser.wait(&format!("text('#partial').includes('{FIRST_MESSAGE}')"))?;
    browser.wait("text('#speaking').includes('the agent is speaking')")?;
    agent.finish_saying(ordinal, FIRST_MESSAGE)?;
    browser
        .wait(&format!("text('#said li.agent p') === '{FIRST_MESSAGE}' && !text('#partial')"))?;
    browser.wait("stepClass(6) === 'now' && taleOf(6).includes('first word came')")?;
    phone.wait_played();
    agent.user_said("I want a meeting.")?;
    browser.wait("text('#said li.user p') === 'I want a meeting.'")?;
    browser.wait("stageClass('greeting').includes('here')")?;
    // Whoever hears the page meets the stages in the order in which they are drawn.
    browser.wait(
        "[...document.querySelectorAll('[data-stage]')].map((node) => node.dataset.stage)
        .join() === 'greeting,main_convo,call_summary'",
    )?;

    let details = json!({"issue_type": "meeting", "issue_details": "Life insurance.",
        "customer_name": "Anna Berg"});
    agent.wait_result(&agent.invoke("move_to_main_convo", &details)?)?;
    browser.wait("stageClass('main_convo').includes('here')")?;
    browser.wait("stageClass('greeting').includes('seen')")?;
    browser.wait("text('#said .turn') === 'Stage main_convo, Mark'")?;

    world.n8n.reply_next("3", Reply::json(200, &json!({"message": BOOKED})).after(PATIENCE / 4));
    let wishes = json!({"name": "Anna Berg", "email": "anna.berg@example.com",
        "purpose": "Life insurance", "datetime": "2027-03-09T14:30", "location": "London"});
    let booking = agent.invoke("schedule_meeting", &wishes)?;
    browser
        .wait("stepClass(7) === 'now' && taleOf(7).includes('is waiting for schedule_meeting')")?;
    browser.wait("text('.tool.running').includes('anna.berg@example.com')")?;
    agent.wait_result(&booking)?;
    browser.wait(&format!(
        "[...document.querySelectorAll('.tool.fine')].some((tool) =>
        tool.textContent.includes('schedule_meeting') && tool.textContent.includes('{BOOKED}')
        && /done after \\d+ ms/.test(tool.textContent))"
    ))?;
    browser.shoot("live call", DESKTOP)?;

    agent.wait_result(&agent.invoke("hangUp", &json!({"reason": "done"}))?)?;
    agent.say("Goodbye, Anna.", &pcm_of(&voice(2, 300)))?;
    agent.close()?;
    phone.wait_closed()?;
    browser.wait("text('.fate').startsWith('The agent said goodbye and ended the call')")?;
    browser.wait("text('.fate').includes('n8n has the transcript')")?;
    browser.wait("[1, 2, 3, 4, 5, 6, 7, 8, 9].every((step) => stepClass(step) === 'done')")?;
    browser.wait("text('#past .row').includes('agent hung up') && !text('#live')")?;
    browser.check_steps_came_in_order()?;
    // The words of the log and of n8n are for programs.
    let words = "Object.keys(ENDS).filter((word) => document.body.innerText.includes(word))";
    assert_eq!(browser.run(words)?, json!([]));

    // What the wire showed, without what opens doors.
    let wires = browser.run(
        "[...document.querySelectorAll('#steps li')].map((step) =>
        [...step.querySelectorAll('pre')].map((wire) => wire.textContent).join('\\n'))",
    )?;
    for (step, wanted) in [
        (1, "CallSid="),
        (2, "\"route\": \"1\""),
        (3, "\"voice\""),
        (4, "<Stream"),
        (5, "\"start\""),
        (6, "\"media\""),
        (7, "responseType"),
    ] {
        let wire = wires[step - 1].as_str().unwrap_or_default();
        assert!(wire.contains(wanted), "step {step} shows no {wanted}: {wire}");
    }
    let path = ringing.twiml.stream_path();
    for secret in
        [path.rsplit('/').next().unwrap_or_default(), demo::API_KEY, demo::AUTH_TOKEN, TOKEN]
    {
        assert!(!wires.to_string().contains(secret), "{secret} is on the page");
    }
    browser.shoot("ended call", DESKTOP)?;
    browser.check_rules(&world)
}

#[test]
fn the_page_outlives_a_restart_of_the_server() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder())?;
    let ringing = world.ring(CALLER)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(&world)?;
    agent.say(FIRST_MESSAGE, &pcm_of(&voice(1, 100)))?;
    // A link to the call itself, as it stands in a bookmark.
    browser.open(&world, &format!("#{}", ringing.call_sid))?;
    browser.wait(&format!("text('#said li.agent p') === '{FIRST_MESSAGE}'"))?;
    browser.run("window.sameDocument = true")?;

    world.bridge.kill();
    browser.wait("!$('trouble').hidden && text('#trouble').includes('Trying again')")?;
    drop(phone);
    world.bridge.restart()?;
    browser.wait("$('trouble').hidden && text('.badge') !== 'live'")?;
    assert_eq!(browser.run("window.sameDocument")?, true, "nothing was loaded anew");

    // It asks less often while it gets no answer, and while nobody looks.
    let pauses = browser.run(
        "(() => { const pauses = [listPoller.pause()];
            for (listPoller.failures of [1, 3, 30]) pauses.push(listPoller.pause());
            listPoller.failures = 0;
            Object.defineProperty(document, 'hidden', { value: true, configurable: true });
            pauses.push(listPoller.pause());
            delete document.hidden;
            return [...pauses, document.hidden]; })()",
    )?;
    assert_eq!(pauses, json!([1_000, 500, 2_000, 5_000, 15_000, false]));

    // Twilio asks what comes next, and the call goes on: the page with it.
    let again = ringing.next(&world, &[])?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = again.open_stream(&world)?;
    agent.say("I am back.", &pcm_of(&voice(2, 100)))?;
    browser.wait("text('.badge') === 'live' && text('#said').includes('I am back.')")?;
    browser.wait("text('#said').includes('A new agent carries on')")?;
    phone.send_stop()?;
    browser.wait("text('.fate').startsWith('The caller hung up.')")?;
    browser.forgive_the_network();
    browser.check_rules(&world)
}

#[test]
fn two_thousand_past_calls_are_no_burden() -> Outcome {
    const CALLS: usize = 2_000;
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder())?;
    world.bridge.kill();
    for index in 0..CALLS {
        file_past_call(&world, index)?;
    }
    world.bridge.restart()?;
    let began = Instant::now();
    browser.open(&world, "")?;
    browser.wait("document.querySelectorAll('#past .row').length >= 50")?;
    let first = began.elapsed();

    // Whoever scrolls gets more, until there is no more.
    browser.wait(&format!(
        "(() => {{ $('list').scrollTo(0, 1e9);
        return document.querySelectorAll('#past .row').length === {CALLS}; }})()"
    ))?;
    let all = began.elapsed();
    let draw = browser.run(
        "(() => { const from = performance.now();
        for (let time = 0; time < 10; time += 1) drawList();
        return (performance.now() - from) / 10; })()",
    )?;
    println!(
        "{CALLS} calls: the first page after {first:.1?}, all after {all:.1?}, then {draw} ms \
        to look them through"
    );
    let order = browser.run(
        "[...document.querySelectorAll('#past .row')].map((row) =>
        row.querySelector('.who').textContent)",
    )?;
    let wanted: Vec<String> = (0..CALLS).rev().map(number_of).collect();
    assert_eq!(order, json!(wanted), "newest first, none missing, none twice");

    browser.run("$('by-number').focus()")?;
    browser.insert_text("49301001234")?;
    browser.wait("document.querySelectorAll('#past .row').length === 1")?;
    browser.run("document.querySelector('#past .row').click()")?;
    browser.wait(&format!("text('#call-title') === '{}'", number_of(1_234)))?;
    // A new call comes to the top, whatever has been loaded below.
    browser.run("$('by-number').value = ''; filterChanged()")?;
    let ringing = world.ring(CALLER)?;
    browser.wait(&format!("text('#live').includes('{CALLER}')"))?;
    ringing.call_status(&world, "completed")?;
    browser.wait(&format!(
        "text('#past .row').includes('{CALLER}') &&
        document.querySelectorAll('#past .row').length > 50"
    ))?;
    browser.check_rules(&world)
}

fn number_of(index: usize) -> String {
    format!("+4930100{index:04}")
}

/// A call of some time ago, as its journal tells it: one a minute, the last one just now.
fn file_past_call(world: &World, index: usize) -> Outcome {
    let ago = jiff::SignedDuration::from_mins(2_000 - i64::try_from(index)?);
    let began = jiff::Timestamp::now() - ago;
    let at = began.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string();
    let sid = format!("CA{index:032x}");
    let events = [
        json!({"at": at, "event": "ring", "callSid": sid, "number": number_of(index),
            "direction": "in"}),
        json!({"at": at, "event": "agent", "callId": "a", "agent": 1}),
        json!({"at": at, "event": "said", "agent": 1, "ordinal": 1, "speaker": "Agent",
            "text": "Hello."}),
        json!({"at": at, "event": "end", "endedBy": "CallerLeft"}),
        json!({"at": at, "event": "delivered"}),
    ];
    let lines: Vec<String> = events.iter().map(|event| format!("{event}\n")).collect();
    let directory = world.data_dir().join("calls");
    fs::create_dir_all(&directory)?;
    let name = format!("{}-{sid}.jsonl", began.strftime("%Y%m%dT%H%M%SZ"));
    fs::write(directory.join(name), lines.concat())?;
    Ok(())
}

// ============================================================================
// Everybody's page
// ============================================================================

#[test]
fn it_is_good_on_a_telephone_in_the_dark_and_by_keyboard_alone() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder())?;
    for index in 0..3 {
        file_past_call(&world, index)?;
    }
    let ringing = world.ring(CALLER)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(&world)?;
    agent.say(FIRST_MESSAGE, &pcm_of(&voice(1, 100)))?;
    agent.user_said("Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamten")?;

    browser.open(&world, "")?;
    browser.wait("document.querySelectorAll('.row').length === 4")?;
    for size in [TELEPHONE, DESKTOP] {
        for scheme in ["light", "dark"] {
            browser.emulate(size, scheme)?;
            browser.run("location.hash = ''")?;
            browser.wait("text('.welcome')")?;
            browser.look_over("list", size, scheme)?;
            browser.run(&format!("location.hash = '{}'", ringing.call_sid))?;
            browser.wait("text('#said').includes('Donau')")?;
            browser.run("openStep(3)")?;
            browser.look_over("call with its wire", size, scheme)?;
            browser.run("openStep(null)")?;
            browser.look_over("call", size, scheme)?;
            browser.run("showPhone(true)")?;
            browser.look_over("phone", size, scheme)?;
            browser.run("showPhone(false)")?;
        }
    }

    // By keyboard: to the list, down it, into a call, and back to where one was.
    browser.emulate(DESKTOP, "light")?;
    browser.ask("Page.navigate", &json!({"url": "about:blank"}))?;
    browser.open(&world, "")?;
    browser.wait("document.querySelectorAll('.row').length === 4")?;
    let mut reached = Vec::new();
    for _ in 0..6 {
        browser.press("Tab")?;
        reached.push(browser.run("document.activeElement.id || document.activeElement.className")?);
        let outline = browser.run("getComputedStyle(document.activeElement).outlineStyle")?;
        assert_ne!(outline, "none", "no focus to be seen on {reached:?}");
    }
    assert_eq!(
        json!(reached),
        json!(["skip", "talk-to-it", "by-number", "by-end", "by-words", "row live"])
    );
    browser.run("document.querySelector('.row').focus()")?;
    browser.press("ArrowDown")?;
    browser.press("ArrowDown")?;
    browser.press("Enter")?;
    let second = number_of(1);
    browser.wait(&format!("text('#call-title') === '{second}'"))?;
    browser.wait("document.activeElement.id === 'call-title'")?;
    browser.press("Escape")?;
    browser.wait(&format!(
        "text('.welcome') && document.activeElement.textContent
        .includes('{second}')"
    ))?;
    browser.press("Home")?;
    browser.press("Enter")?;
    browser.wait(&format!("text('#call-title') === '{CALLER}'"))?;
    assert_eq!(browser.run("$('said').getAttribute('aria-live')")?, "polite");
    phone.send_stop()?;
    browser.check_rules(&world)
}

#[test]
fn every_line_of_the_flow_chart_stays_inside_its_picture() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder())?;
    let ringing = world.ring(CALLER)?;
    browser.open(&world, &format!("#{}", ringing.call_sid))?;
    browser.wait("document.querySelector('#flow svg')")?;
    // Forward, back, to itself, past a layer, and to a neighbour and a stranger in the same layer.
    browser.run(
        "window.drawn = (width) => {
            const stages = { first: 'bcde', b: 'bce', c: 'be', d: 'b', e: ['first', 'f'],
                f: ['first', 'c'] };
            const agent = { firstStage: 'first', stages: [], tools: {} };
            for (const [name, ways] of Object.entries(stages)) {
                agent.stages.push({ name, tools: [...ways] });
                agent.tools[name] = { kind: 'enter_stage', stage: name };
            }
            overview.agent = agent;
            $('flow').style.width = `${width}px`;
            drawFlow();
            const picture = document.querySelector('#flow svg');
            const { width: right, height: low } = picture.viewBox.baseVal;
            return [...picture.querySelectorAll('path')].map((path) => path.getBBox())
                .map(({ x, y, width, height }) =>
                    x >= 0 && y >= 0 && x + width <= right && y + height <= low);
        }",
    )?;
    for width in [300, 900] {
        let inside = browser.run(&format!("drawn({width})"))?;
        let inside = inside.as_array().ok_or("no lines")?;
        assert_eq!(inside.len(), 2 * 14, "an edge and its tip for each way: {inside:?}");
        assert!(inside.iter().all(|inside| inside == true), "{width}: {inside:?}");
    }
    browser.check_rules(&world)
}

#[test]
fn what_callers_and_agents_say_is_shown_and_never_run() -> Outcome {
    const ODD: &str = "<script>window.hacked = 1</script><img src=x onerror=\"hacked=1\">';--";
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder())?;
    world.n8n.reply_next("1", Reply::json(200, &json!({"firstMessage": ODD})));
    let number = format!("client:{ODD}");
    let ringing = world.ring(&number)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(&world)?;
    agent.say(ODD, &pcm_of(&voice(1, 100)))?;
    agent.user_said("\u{202e}\u{0000}{{constructor}} javascript:hacked=1 <svg onload=hacked=1>")?;
    agent.begin_saying(ODD, &[])?;
    let sayings = json!({"full_name": ODD, "<b>": {"__proto__": ODD}});
    agent.wait_result(&agent.invoke("verify", &sayings)?)?;
    agent.wait_result(&agent.invoke(ODD, &sayings)?)?;

    browser.open(&world, &format!("#{}", ringing.call_sid))?;
    browser.wait("text('#said .tool:last-of-type') && text('#said li.user')")?;
    let shown = |browser: &mut Browser, part: &str| browser.run(&format!("text('{part}')"));
    for part in ["#call-title", "#live .row", "#said li.agent p", "#partial", "#said", "#steps"] {
        let text = shown(&mut browser, part)?;
        assert!(text.as_str().is_some_and(|text| text.contains(ODD)), "{part}: {text}");
    }
    browser.run(&format!("$('by-number').value = {}; filterChanged()", json!(ODD)))?;
    phone.send_stop()?;
    browser.wait("text('.fate').startsWith('The caller hung up.')")?;
    browser.run("location.hash = '#%E0%A4%A'; openFromAddress()")?;
    browser.run("location.hash = '#<img src=x onerror=hacked=1>'")?;
    browser.wait("text('#call').includes('Call not found')")?;
    let elements = browser.run("document.querySelectorAll('script, img, svg[onload]').length")?;
    assert_eq!(elements, 1, "the page's own script and nothing else");
    assert_eq!(browser.run("window.hacked ?? null")?, Value::Null);
    browser.forgive_the_network();
    browser.check_rules(&world)
}

// ============================================================================
// The phone in the page
// ============================================================================

#[test]
fn somebody_talks_to_the_agent_through_the_page() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    talk(&mut browser, 8_000)
}

/// Firefox cannot connect a microphone to a context of another rate than the machine's: then the
/// page converts by itself.
#[test]
fn the_page_changes_sampling_rates_by_itself_where_the_browser_does_not() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    browser.before_the_page(
        "const Real = AudioContext; window.AudioContext = class extends Real {
            constructor(options) {
                if (options?.sampleRate) throw new DOMException('not here', 'NotSupportedError');
                super({ ...options, sampleRate: 44100 });
            } };",
    )?;
    talk(&mut browser, 44_100)
}

fn talk(browser: &mut Browser, rate: u32) -> Outcome {
    let world = world(builder())?;
    browser.hear_the_microphone_as_it_is()?;
    browser.open(&world, "")?;
    browser.run("document.documentElement.click(); $('talk-to-it').click()")?;
    browser.click("#dial")?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let asked = world.n8n.wait_for("1", 1, PATIENCE)?;
    assert_eq!(asked.first().map(|asked| &asked.json["number"]), Some(&json!("browser")));
    browser.wait("phone.state === 'talking' && text('#phone-words').includes('connected')")?;
    assert_eq!(browser.run("phone.sound.context.sampleRate")?, rate);
    // One sees the call that one is in.
    browser.wait("text('#call-title') === 'Test call' && stepClass(5) !== 'todo'")?;

    // Down: to the loudspeaker goes what the agent said, sample by sample.
    let greeting = voice(1, 1_200);
    agent.say(FIRST_MESSAGE, &pcm_of(&greeting))?;
    browser.heard(&greeting)?;
    browser.wait(&format!("text('#said').includes('{FIRST_MESSAGE}')"))?;
    browser.shoot("phone in a call", DESKTOP)?;
    browser.emulate(TELEPHONE, "dark")?;
    browser.wait("document.documentElement.scrollWidth <= 360")?;
    browser.shoot("phone in a call", TELEPHONE)?;
    browser.emulate(DESKTOP, "light")?;

    // Up: the agent hears the microphone.
    hears_the_tone(&agent)?;
    browser.wait("$('level-you').value > 0.5")?;

    interrupt(browser, &agent, &greeting)?;

    // Marks, as Twilio returns them. callbridge asks for one at a goodbye only.
    let before = browser.sent_frames().len();
    let half_a_second = BASE64.encode(voice(4, 500));
    let told = |event: &str, more: &Value| {
        let mut message = json!({"event": event});
        if let (Some(message), Some(more)) = (message.as_object_mut(), more.as_object()) {
            message.extend(more.clone());
        }
        format!(
            "fromBridge(phone.leg, JSON.stringify({{...{message}, \
            streamSid: phone.leg.streamSid}}));"
        )
    };
    let named = |name: &str| told("mark", &json!({"mark": {"name": name}}));
    let sound = told("media", &json!({"media": {"payload": half_a_second}}));
    let at_once = named("at once");
    browser.run(&format!("{at_once}{sound}{}", named("played")))?;
    browser.wait("phone.figures.marks === 2")?;
    let clear = told("clear", &json!({}));
    browser.run(&format!("{sound}{}{sound}{}{clear}", named("cleared 1"), named("cleared 2")))?;
    browser.wait("phone.figures.marks === 4 && phone.figures.clears === 2")?;
    let frames = browser.sent_frames().split_off(before);
    let order: Vec<&str> =
        frames.iter().filter_map(|frame| frame["mark"]["name"].as_str()).collect();
    assert_eq!(order, ["at once", "played", "cleared 1", "cleared 2"]);
    let place = |name| frames.iter().position(|frame| frame["mark"]["name"] == name).unwrap_or(0);
    let between = place("played") - place("at once");
    assert!((24..100).contains(&between), "500 ms are 25 frames, not {between}");
    let between = place("cleared 2") - place("cleared 1");
    assert!(between == 1, "a clear returns all marks at once, not {between} messages later");

    // Keys, on the page and on the keyboard.
    browser.click("#keypad")?;
    browser.click("#keys button:nth-child(4)")?;
    browser.click("#keys button:nth-child(2)")?;
    browser.press("#")?;
    agent.wait_text("the keys", |text| text["text"] == "42#")?;

    browser.click("#mute")?;
    let count = agent.audio().len();
    agent.wait_sound("silence", |audio| {
        let silent = |(_, pcm): &(Instant, Vec<u8>)| pcm.iter().all(|byte| *byte == 0);
        audio.get(count..).is_some_and(|audio| audio.windows(10).any(|ten| ten.iter().all(silent)))
    })?;
    browser.click("#mute")?;

    say_goodbye(browser, &agent)?;
    check_frames(browser, &agent)?;
    browser.wait("text('.fate').startsWith('The agent said goodbye and ended the call')")?;
    assert_eq!(world.ultravox.violations(), [""; 0]);
    browser.check_rules(&world)
}

/// Nobody has set anything but the key, and the address is the one of the start lines.
#[test]
fn in_local_mode_the_page_asks_for_no_password() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let builder = World::builder(env!("CARGO_BIN_EXE_callbridge"));
    let world = world(builder.without("PUBLIC_URL").without("TWILIO_AUTH_TOKEN"))?;
    browser.hear_the_microphone_as_it_is()?;
    browser.microphone(&world, "granted")?;
    browser.go_to(&format!("http://{}/", world.bridge.address()))?;
    browser.run("document.documentElement.click(); $('talk-to-it').click()")?;
    browser.click("#dial")?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    browser.wait("phone.state === 'talking'")?;
    let greeting = voice(1, 600);
    agent.say(FIRST_MESSAGE, &pcm_of(&greeting))?;
    browser.heard(&greeting)?;
    hears_the_tone(&agent)?;
    browser.check_rules(&world)
}

/// The phone reaches an agent that says back what it hears: here two thirds of a second of sound, and
/// a pause, again and again.
#[test]
fn in_the_demo_one_hears_ones_own_voice_again() -> Outcome {
    let Some(mut browser) = Browser::start_with(&spoken())? else { return Ok(()) };
    let mut demo = Command::new(env!("CARGO_BIN_EXE_callbridge"))
        .args(["demo", "--page"])
        .env("PORT", "0")
        .stdout(Stdio::piped())
        .spawn()?;
    let outcome = talk_to_the_echo(&mut browser, &mut demo);
    let interrupted = Command::new("kill").arg("-INT").arg(demo.id().to_string()).status()?;
    assert!(interrupted.success() && demo.wait()?.success());
    outcome
}

fn talk_to_the_echo(browser: &mut Browser, demo: &mut Child) -> Outcome {
    let mut lines = BufReader::new(demo.stdout.take().ok_or("no stdout")?).lines();
    let line = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("localhost:")));
    let line = line.ok_or("it printed no address")??;
    let port = line.split("localhost:").nth(1).and_then(|rest| rest.split('/').next());
    let host = format!("127.0.0.1:{}", port.ok_or("no port")?);
    host.clone_into(&mut browser.host);
    browser.hear_the_microphone_as_it_is()?;
    browser.allow_the_microphone(&host, "granted")?;
    browser.go_to(&format!("http://{host}/"))?;
    browser.run("document.documentElement.click(); $('talk-to-it').click()")?;
    browser.click("#dial")?;
    browser.wait("phone.state === 'talking'")?;
    // The sound interrupts the greeting, and comes back in the pause.
    browser.wait("text('#said li.agent p').startsWith('Hello,')")?;
    browser.wait("phone.figures.clears > 0")?;
    browser.wait("/You said: \\(0\\.[5-9] seconds of your voice\\)/.test(text('#said'))")?;
    // Or the sound would cut the answer short.
    browser.click("#mute")?;
    browser.click("#keypad")?;
    browser.click("#keys button:nth-child(4)")?;
    browser.wait("text('#said').includes('You pressed: 4')")?;
    browser.press("#")?;
    browser.wait("text('.fate').startsWith('The agent said goodbye and ended the call')")?;
    browser.wait("text('#said').includes('Thank you for calling')")?;
    Ok(())
}

/// Barge-in: what has not been played yet is dropped, and what comes next is played at once.
fn interrupt(browser: &mut Browser, agent: &AgentCall, greeting: &[u8]) -> Outcome {
    let speech = voice(2, 20_000);
    let planned = agent.begin_saying("There is a great deal to say.", &pcm_of(&speech))?;
    browser.wait(&format!("phone.figures.heard > {}", greeting.len() + 1_600))?;
    agent.send(&json!({"type": "playback_clear_buffer"}))?;
    browser.wait("phone.figures.clears === 1")?;
    agent.finish_saying(planned, "There is")?;
    let answer = voice(3, 300);
    agent.say("Yes?", &pcm_of(&answer))?;
    let sent = browser.wait("phone.figures.frames")?;
    // Twice as long as the answer takes.
    browser.wait(&format!("phone.figures.frames > {sent} + 30"))?;
    let heard = browser.run("phone.figures.heard")?.as_u64().unwrap_or_default();
    let cut = usize::try_from(heard)?.saturating_sub(greeting.len() + answer.len());
    assert!((1_600..150_000).contains(&cut), "{cut} samples of the speech were played");
    browser.heard(&[greeting, speech.get(..cut).unwrap_or_default(), &answer].concat())
}

fn say_goodbye(browser: &mut Browser, agent: &AgentCall) -> Outcome {
    let (heard, hash) = (browser.run("phone.figures.heard")?, browser.run("phone.figures.hash")?);
    agent.wait_result(&agent.invoke("hangUp", &json!({"reason": "done"}))?)?;
    let farewell = voice(5, 700);
    agent.say("Goodbye.", &pcm_of(&farewell))?;
    agent.close()?;
    browser.wait("phone.state === 'idle' && text('#phone-words').includes('over')")?;
    let wanted = checksum(hash.as_u64().unwrap_or_default(), &farewell);
    let (all, after) = (browser.run("phone.figures.heard")?, browser.run("phone.figures.hash")?);
    let farewell = farewell.len() as u64;
    assert_eq!(all.as_u64(), heard.as_u64().map(|heard| heard + farewell), "heard to the end");
    assert_eq!(after.as_u64(), Some(wanted));
    let frames = browser.sent_frames();
    let marks = frames.iter().filter(|frame| frame["mark"]["name"] == "goodbye").count();
    assert_eq!(marks, 1, "the mark came back when it had been heard");
    Ok(())
}

/// Everything that has gone up, message by message: the shapes of Twilio's, none missing, and the
/// agent has got every sample of it.
fn check_frames(browser: &mut Browser, agent: &AgentCall) -> Outcome {
    let frames = browser.sent_frames();
    assert_eq!(
        frames.first(),
        Some(&json!({"event": "connected", "protocol": "Call", "version": "1.0.0"}))
    );
    let start = frames.get(1).ok_or("no start")?;
    let sid = start["streamSid"].as_str().unwrap_or_default();
    assert!(sid.starts_with("MZ") && sid.len() == 34, "{sid}");
    assert_eq!(
        start["start"]["mediaFormat"],
        json!({"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1})
    );
    assert_eq!(start["start"]["tracks"], json!(["inbound"]));
    let (mut sound, mut chunk, mut last) = (Vec::new(), 0, None);
    for (index, frame) in frames.iter().enumerate().skip(1) {
        assert_eq!(frame["sequenceNumber"], index.to_string(), "{frame}");
        assert_eq!(frame["streamSid"], sid);
        if frame["event"] == "media" {
            chunk += 1;
            let media = &frame["media"];
            assert_eq!(
                (&media["track"], &media["chunk"]),
                (&json!("inbound"), &json!(chunk.to_string()))
            );
            let timestamp: u64 = media["timestamp"].as_str().unwrap_or_default().parse()?;
            assert!(last.is_none_or(|last| timestamp == last + 20), "{last:?}, {timestamp}");
            last = Some(timestamp);
            let payload = BASE64.decode(media["payload"].as_str().unwrap_or_default())?;
            assert_eq!(payload.len(), 160);
            sound.extend(payload);
        }
    }
    // After its close the agent is deaf.
    assert!(agent.audio().iter().all(|(_, pcm)| pcm.len() == 320), "a message for each frame");
    // Of silence there may be more or less: before the stream the agent was fed it by callbridge.
    let mut sent = pcm_of(&sound);
    sent = sent
        .chunks(320)
        .filter(|pcm| pcm.iter().any(|byte| *byte != 0))
        .collect::<Vec<_>>()
        .concat();
    let heard = agent.heard_caller();
    assert!(heard.len() > 320 * 100 && sent.starts_with(&heard), "the agent heard something else");
    Ok(())
}

/// The tone at its own frequency and level, and hardly anything else: for a quarter of a second, in
/// which a busy machine has not lost anything on its side of the microphone.
fn hears_the_tone(agent: &AgentCall) -> Outcome {
    const FRAMES: usize = 13;
    let mut latest = (0.0, 0.0);
    let mut looked_at = 0;
    let found = agent.wait_sound("the tone", |audio| {
        while looked_at + FRAMES <= audio.len() {
            let pcm = audio[looked_at..looked_at + FRAMES].iter().flat_map(|(_, pcm)| pcm);
            let pcm: Vec<u8> = pcm.copied().collect();
            latest = tone_and_noise(&pcm[..4_000]);
            let (level, loudest) = latest;
            if (level / TONE_LEVEL - 1.0).abs() < 0.05 && loudest < level / 50.0 {
                return true;
            }
            looked_at += 1;
        }
        false
    });
    let (level, loudest) = latest;
    println!("{TONE_HZ} Hz heard with {level:.0} of {TONE_LEVEL}, elsewhere at most {loudest:.0}");
    Ok(found?)
}

/// The tone's amplitude, and the greatest elsewhere.
fn tone_and_noise(pcm: &[u8]) -> (f64, f64) {
    let samples = pcm.chunks_exact(2).map(|two| f64::from(i16::from_le_bytes([two[0], two[1]])));
    let samples: Vec<f64> = samples.collect();
    let others = [500.0, 980.0, 1_020.0, 1_500.0, 8_000.0 - TOO_HIGH_HZ, 3_000.0];
    let loudest = others.map(|hertz| amplitude(&samples, hertz)).into_iter().fold(0.0, f64::max);
    (amplitude(&samples, TONE_HZ), loudest)
}

/// Of one frequency in a sound (Goertzel's sum, written out).
fn amplitude(samples: &[f64], hertz: f64) -> f64 {
    let turn = std::f64::consts::TAU * hertz / 8_000.0;
    let (mut re, mut im, mut at) = (0.0, 0.0, 0.0);
    for sample in samples {
        re += sample * f64::cos(at);
        im += sample * f64::sin(at);
        at += turn;
    }
    2.0 * f64::hypot(re, im) / f64::from(u32::try_from(samples.len()).unwrap_or(u32::MAX))
}

#[test]
fn a_broken_stream_is_followed_by_the_next_and_hanging_up_ends_it() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder())?;
    browser.open(&world, "")?;
    browser.run("$('talk-to-it').click()")?;
    browser.click("#dial")?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    browser.wait("phone.state === 'talking'")?;
    agent.user_said("Do you hear me?")?;
    browser.wait("text('#said').includes('Do you hear me?')")?;
    world.bridge.kill();
    browser.wait("text('#phone-words').includes('Trying again')")?;
    world.bridge.restart()?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    browser.wait("phone.state === 'talking' && text('#phone-words').includes('connected')")?;
    let words = voice(9, 400);
    agent.say("I am back.", &pcm_of(&words))?;
    browser.heard(&words)?;
    browser.click("#hang-up")?;
    browser.wait("phone.state === 'idle' && text('#phone-words') === 'You hung up.'")?;
    browser.wait("text('.fate').startsWith('The caller hung up.')")?;
    let frames = browser.sent_frames();
    assert_eq!(frames.last().map(|frame| &frame["event"]), Some(&json!("stop")));
    // The microphone is given back.
    assert_eq!(browser.run("phone.sound")?, Value::Null);
    browser.forgive_the_network();
    browser.check_rules(&world)
}

#[test]
fn a_caller_is_put_through_and_comes_back_until_a_person_takes_the_call() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder().setting("FALLBACK_NUMBER", "+442079461111"))?;
    browser.open(&world, "")?;
    browser.run("$('talk-to-it').click()")?;
    browser.click("#dial")?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    browser.wait("phone.state === 'talking'")?;
    let reason = json!({"reason": "Anna Berg, about \"Söhne\" & <b>"});
    agent.wait_result(&agent.invoke("transfer_to_person", &reason)?)?;
    agent.close()?;
    browser.wait("text('#phone-words').includes('+442079461111')")?;
    browser
        .wait("text('#phone-words').includes('Anna Berg, about \"Söhne\" & <b>. To take it')")?;
    browser.wait("text('#said').includes('They are told: “Anna Berg, about')")?;
    for (button, knows) in [("#no-answer", "nobody answered"), ("#declines", "did not take the")] {
        browser.click(button)?;
        let agent = world.ultravox.next_call(PATIENCE)?;
        assert!(agent.request().to_string().contains(knows), "{}", agent.request());
        browser.wait("phone.state === 'talking'")?;
        agent.wait_result(&agent.invoke("transfer_to_person", &reason)?)?;
        agent.close()?;
        browser.wait("phone.state === 'transferred'")?;
    }
    browser.click("#accepts")?;
    browser.wait("text('#said').includes('The person took the call.')")?;
    browser.wait(
        "phone.state === 'idle' && view.ended && text('.fate').startsWith(
        'The caller was put through to a person, who took the call.')",
    )?;
    browser.check_rules(&world)
}

#[test]
fn what_stands_in_the_way_of_a_call_is_said_in_words() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder().setting("MAX_CALLS", "1"))?;
    browser.open(&world, "")?;
    browser.run("$('talk-to-it').click()")?;

    browser.microphone(&world, "denied")?;
    browser.click("#dial")?;
    browser.wait("text('#phone-words').includes('did not allow the microphone')")?;
    assert_eq!(world.ultravox.requests(), 0, "nothing is created, nothing is billed");
    browser.microphone(&world, "granted")?;

    let ringing = world.ring(CALLER)?;
    browser.click("#dial")?;
    browser.wait("text('#phone-words').includes('All our lines are busy')")?;
    ringing.call_status(&world, "completed")?;
    browser.wait("text('#past').includes('caller hung up')")?;

    browser.run(
        "window.honest = tell; window.tell = async (...all) => {
        window.tell = honest;
        return { ...await honest(...all), streamPath: '/media-stream/somebody-elses' }; }",
    )?;
    // A stream that the door refuses is followed by the next one.
    browser.click("#dial")?;
    browser.wait("text('#phone-words').includes('You are connected')")?;
    browser.click("#hang-up")?;
    browser.wait("text('#phone-words').includes('You hung up')")?;

    browser.forgive_the_network();
    browser.check_rules(&world)?;
    let mut elsewhere = world.bridge.address().to_string();
    elsewhere = elsewhere.replace("127.0.0.1", "phone.example");
    browser.open_at(&elsewhere, "")?;
    browser.run("$('talk-to-it').click()")?;
    browser.click("#dial")?;
    browser.wait("text('#phone-words').includes('only on pages opened over https')")?;
    browser.wait(&format!("text('#phone-words').includes('{}')", demo::PUBLIC_URL))?;
    Ok(())
}

/// ITU-T G.711, code by code and sample by sample, against the same table as the server.
#[test]
fn the_page_speaks_the_same_mu_law_as_the_server() -> Outcome {
    let Some(mut browser) = Browser::start()? else { return Ok(()) };
    let world = world(builder())?;
    browser.open(&world, "")?;
    let decoded = browser.run("Array.from({ length: 256 }, (_, code) => mulawDecoded(code))")?;
    let wanted: Vec<i16> = (0..=u8::MAX).map(mulaw_to_pcm).collect();
    assert_eq!(decoded, json!(wanted));
    let encoded =
        browser.run("Array.from({ length: 65536 }, (_, at) => mulawEncoded(at - 32768))")?;
    let table = include_str!("data/g711-mulaw.txt");
    let mut seen = 0;
    for line in table.lines().filter(|line| !line.starts_with('#')) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [code, _, first, last] = fields[..] else { return Err(line.into()) };
        if let (Ok(first), Ok(last)) = (first.parse::<i32>(), last.parse::<i32>()) {
            for sample in first..=last {
                let at = usize::try_from(sample + 32_768)?;
                assert_eq!(encoded[at], u8::from_str_radix(code, 16)?, "sample {sample}");
                seen += 1;
            }
        }
    }
    assert_eq!(seen, 65_536);
    browser.check_rules(&world)
}

// ============================================================================
// The browser
// ============================================================================

/// A browser may take its time, so the agent shows that it is still there.
fn world(builder: WorldBuilder) -> Result<World, Trouble> {
    let world = builder.start()?;
    world.ultravox.answer_pings(true);
    Ok(world)
}

fn builder() -> WorldBuilder {
    World::builder(env!("CARGO_BIN_EXE_callbridge")).setting("API_TOKEN", TOKEN)
}

/// One at a time: sound is played in real time, and a test machine has few cores.
static STAGE: Mutex<()> = Mutex::new(());

/// A Chromium of the test's own, with one tab.
struct Browser {
    child: Child,
    tab: WebSocket<TcpStream>,
    session: String,
    last_id: u64,
    /// What it has told by itself.
    events: Vec<Value>,
    network_forgiven: bool,
    host: String,
    _profile: TempDir,
    _stage: MutexGuard<'static, ()>,
}

/// Small words for the conditions of the tests, put into every page.
const WORDS: &str = "
    window.text = (where) => document.querySelector(where)?.textContent ?? '';
    window.stepOf = (number) => document.querySelector(`#steps li:nth-child(${number})`);
    window.stepClass = (number) => stepOf(number)?.className;
    window.timeOf = (number) => stepOf(number).querySelector('.time').textContent;
    window.taleOf = (number) => stepOf(number).querySelector('.tale').textContent;
    window.stageClass = (name) =>
        document.querySelector(`[data-stage='${name}']`)?.getAttribute('class') ?? '';
    window.broken = [];
    addEventListener('securitypolicyviolation', (event) => broken.push(event.blockedURI));";

impl Browser {
    /// None: there is no Chromium here, and none is required.
    fn start() -> Fallible<Option<Browser>> {
        Browser::start_with(&wav())
    }

    /// With that in its microphone, a file of sound.
    fn start_with(microphone_sound: &[u8]) -> Fallible<Option<Browser>> {
        let Some(program) = chromium()? else { return Ok(None) };
        let stage = STAGE.lock().unwrap_or_else(PoisonError::into_inner);
        let profile = tempfile::tempdir()?;
        let microphone = profile.path().join("microphone.wav");
        fs::write(&microphone, microphone_sound)?;
        let mut child = Command::new(program)
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"])
            .args(["--no-first-run", "--disable-background-networking", "--disable-sync"])
            .args(["--disable-component-update", "--disable-dev-shm-usage", "--mute-audio"])
            .args(["--use-fake-device-for-media-stream", "--remote-debugging-port=0"])
            .args(["--autoplay-policy=no-user-gesture-required"])
            .arg("--host-resolver-rules=MAP phone.example 127.0.0.1")
            .arg(format!("--use-file-for-fake-audio-capture={}", microphone.display()))
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let address = devtools(&mut child);
        let (host, path) = match address {
            Ok(address) => address,
            Err(error) => {
                drop(child.kill());
                drop(child.wait());
                return Err(error);
            }
        };
        let socket = TcpStream::connect(&host)?;
        socket.set_read_timeout(Some(PAGE_WITHIN + PATIENCE))?;
        let (tab, _) = tungstenite::client(format!("ws://{host}{path}"), socket)?;
        let mut browser = Browser {
            child,
            tab,
            session: String::new(),
            last_id: 0,
            events: Vec::new(),
            network_forgiven: false,
            host: String::new(),
            _profile: profile,
            _stage: stage,
        };
        let target = browser.ask("Target.createTarget", &json!({"url": "about:blank"}))?;
        let target = json!({"targetId": target["targetId"], "flatten": true});
        let session = browser.ask("Target.attachToTarget", &target)?;
        session["sessionId"].as_str().unwrap_or_default().clone_into(&mut browser.session);
        for domain in ["Runtime", "Log", "Network", "Page"] {
            browser.ask(&format!("{domain}.enable"), &json!({}))?;
        }
        browser.before_the_page(WORDS)?;
        browser.emulate(DESKTOP, "light")?;
        Ok(Some(browser))
    }

    fn ask(&mut self, method: &str, params: &Value) -> Fallible<Value> {
        self.last_id += 1;
        let mut order = json!({"id": self.last_id, "method": method, "params": params});
        if !self.session.is_empty() {
            order["sessionId"] = json!(self.session);
        }
        self.tab.send(Message::text(order.to_string()))?;
        loop {
            let message: Value = match self.tab.read()? {
                Message::Text(text) => serde_json::from_str(&text)?,
                _ => continue,
            };
            if message["id"] != self.last_id {
                self.events.push(message);
            } else if message.get("error").is_some() {
                return Err(format!("{method}: {}", message["error"]).into());
            } else {
                return Ok(message["result"].clone());
            }
        }
    }

    fn before_the_page(&mut self, script: &str) -> Outcome {
        self.ask("Page.addScriptToEvaluateOnNewDocument", &json!({"source": script}))?;
        Ok(())
    }

    /// People want their echo cancelled; whoever measures a tone does not.
    fn hear_the_microphone_as_it_is(&mut self) -> Outcome {
        self.before_the_page(
            "const devices = navigator.mediaDevices;
            const getUserMedia = devices.getUserMedia.bind(devices);
            devices.getUserMedia = () => getUserMedia({ audio: { channelCount: 1,
                echoCancellation: false, noiseSuppression: false, autoGainControl: false } });",
        )
    }

    fn open(&mut self, world: &World, hash: &str) -> Outcome {
        self.microphone(world, "granted")?;
        let address = world.bridge.address().to_string();
        self.open_at(&address, hash)
    }

    /// With the token as a password in the address, which the browser keeps to itself.
    fn open_at(&mut self, host: &str, hash: &str) -> Outcome {
        host.clone_into(&mut self.host);
        self.go_to(&format!("http://owner:{TOKEN}@{host}/{hash}"))
    }

    fn go_to(&mut self, url: &str) -> Outcome {
        self.ask("Page.navigate", &json!({"url": url}))?;
        self.wait(
            "document.readyState === 'complete' && typeof overview !== 'undefined' && overview",
        )?;
        Ok(())
    }

    /// `granted` or `denied`.
    fn microphone(&mut self, world: &World, setting: &str) -> Outcome {
        self.allow_the_microphone(&world.bridge.address().to_string(), setting)
    }

    fn allow_the_microphone(&mut self, host: &str, setting: &str) -> Outcome {
        let origin = format!("http://{host}");
        let permission = json!({"permission": {"name": "microphone"}, "setting": setting,
            "origin": origin});
        let session = std::mem::take(&mut self.session);
        let set = self.ask("Browser.setPermission", &permission);
        self.session = session;
        set.map(drop)
    }

    fn emulate(&mut self, (width, height): (u32, u32), scheme: &str) -> Outcome {
        let mobile = width < 500;
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            &json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}),
        )?;
        let feature = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.ask("Emulation.setEmulatedMedia", &json!({"features": feature}))?;
        Ok(())
    }

    fn run(&mut self, script: &str) -> Fallible<Value> {
        let order = json!({"expression": script, "returnByValue": true, "awaitPromise": true,
            "userGesture": true});
        let answer = self.ask("Runtime.evaluate", &order)?;
        match answer.get("exceptionDetails") {
            Some(exception) => Err(format!("{script}: {exception}").into()),
            None => Ok(answer["result"]["value"].clone()),
        }
    }

    /// Waits in the page until the expression is true, and gives its value.
    #[track_caller]
    fn wait(&mut self, condition: &str) -> Fallible<Value> {
        let place = std::panic::Location::caller();
        let until = PAGE_WITHIN.as_millis();
        let script = format!(
            "new Promise((done) => {{
                const until = performance.now() + {until};
                const look = () => {{
                    let value;
                    try {{ value = ({condition}); }} catch (error) {{ value = false; }}
                    if (value || performance.now() > until) done(value || null);
                    else setTimeout(look, 30);
                }};
                look();
            }})"
        );
        let found = self.run(&script)?;
        if !found.is_null() {
            return Ok(found);
        }
        let page = self.run("document.body.innerText")?;
        let page = page.as_str().unwrap_or_default().to_owned();
        Err(format!("{place}: never came true: {condition}\n--- the page:\n{page}").into())
    }

    /// A click where a person would click, at the middle of what is to be seen.
    #[track_caller]
    fn click(&mut self, selector: &str) -> Outcome {
        self.wait(&format!("document.querySelector('{selector}').checkVisibility()"))?;
        let middle = self.run(&format!(
            "(() => {{
            const target = document.querySelector('{selector}');
            target.scrollIntoView({{ block: 'nearest' }});
            const box = target.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2]; }})()"
        ))?;
        for event in ["mousePressed", "mouseReleased"] {
            self.ask(
                "Input.dispatchMouseEvent",
                &json!({"type": event, "x": middle[0],
                "y": middle[1], "button": "left", "clickCount": 1}),
            )?;
        }
        Ok(())
    }

    /// The texts of all that fits, as a person reads them.
    fn read(&mut self, selector: &str) -> Fallible<Vec<String>> {
        let texts = self.run(&format!(
            "[...document.querySelectorAll('{selector}')].filter((one) => one.checkVisibility())
            .map((one) => one.textContent)"
        ))?;
        Ok(serde_json::from_value(texts)?)
    }

    /// From a list of options.
    fn choose(&mut self, id: &str, value: &str) -> Outcome {
        let chosen = self.run(&format!(
            "$('{id}').value = '{value}';
            $('{id}').dispatchEvent(new Event('input', {{ bubbles: true }}));
            $('{id}').value === '{value}'"
        ))?;
        if chosen == true { Ok(()) } else { Err(format!("{id} has no {value}").into()) }
    }

    /// What is saved from now on goes into a directory of its own.
    fn downloads(&mut self) -> Fallible<Downloads> {
        let directory = tempfile::tempdir()?;
        let order = json!({"behavior": "allow", "downloadPath": directory.path()});
        let session = std::mem::take(&mut self.session);
        let set = self.ask("Browser.setDownloadBehavior", &order);
        self.session = session;
        set.map(|_| Downloads(directory))
    }

    fn press(&mut self, key: &str) -> Outcome {
        let code = match key {
            "Tab" => 9,
            "Enter" => 13,
            "Escape" => 27,
            "End" => 35,
            "Home" => 36,
            "ArrowDown" => 40,
            _ => 0,
        };
        let mut order = json!({"type": "keyDown", "key": key, "windowsVirtualKeyCode": code});
        if key == "Enter" {
            order["text"] = json!("\r");
        } else if code == 0 {
            order["text"] = json!(key);
        }
        self.ask("Input.dispatchKeyEvent", &order)?;
        self.ask("Input.dispatchKeyEvent", &json!({"type": "keyUp", "key": key}))?;
        Ok(())
    }

    fn insert_text(&mut self, text: &str) -> Outcome {
        self.ask("Input.insertText", &json!({"text": text}))?;
        Ok(())
    }

    // --- What was seen -----------------------------------------------------------

    /// Notes each step the first time that it is reached.
    fn watch_steps(&mut self) -> Outcome {
        self.run(
            "window.reached = [];
            window.noteSteps = () => { for (let number = 1; number <= 9; number += 1) {
                const state = stepClass(number);
                if ((state === 'now' || state === 'done') && !reached.includes(number)) {
                    reached.push(number);
                } } };
            noteSteps();
            new MutationObserver(noteSteps).observe($('steps'),
                { subtree: true, attributes: true }) && true",
        )?;
        Ok(())
    }

    fn check_steps_came_in_order(&mut self) -> Outcome {
        assert_eq!(self.run("reached")?, json!([1, 2, 3, 4, 5, 6, 7, 8, 9]));
        let times = self.run("view.steps.map((step) => step.at)")?;
        let times: Vec<i64> =
            times.as_array().into_iter().flatten().filter_map(Value::as_i64).collect();
        assert!(times.len() == 9 && times.is_sorted(), "{times:?}");
        Ok(())
    }

    /// Whatever is shown can be read: nothing is cut off, all of it has enough contrast, and what
    /// can be used has a name.
    fn look_over(&mut self, what: &str, size: (u32, u32), scheme: &str) -> Outcome {
        let place = format!("{what}, {size:?}, {scheme}");
        let width = self.run("document.documentElement.scrollWidth")?;
        assert!(width.as_u64() <= Some(size.0.into()), "{place}: {width} pixels wide");
        assert_eq!(self.run(CONTRAST)?, json!([]), "{place}: too little contrast");
        let tree = self.ask("Accessibility.getFullAXTree", &json!({}))?;
        for node in tree["nodes"].as_array().into_iter().flatten() {
            let role = node["role"]["value"].as_str().unwrap_or_default();
            let used = ["button", "link", "textbox", "searchbox", "combobox", "meter", "list"];
            let named = node["name"]["value"].as_str().is_some_and(|name| !name.trim().is_empty());
            let needs_name = used.contains(&role) && role != "list";
            assert!(named || !needs_name || node["ignored"] == true, "{place}: no name: {node}");
        }
        self.shoot(&format!("{what} {scheme}"), size)
    }

    /// A picture for people, if they have asked for it.
    fn shoot(&mut self, what: &str, (width, _): (u32, u32)) -> Outcome {
        let Some(directory) = env::var_os("PAGE_SHOTS") else { return Ok(()) };
        let picture = self.ask("Page.captureScreenshot", &json!({"format": "png"}))?;
        let picture = BASE64.decode(picture["data"].as_str().unwrap_or_default())?;
        fs::create_dir_all(&directory)?;
        let name = format!("{what} {width}.png").replace(' ', "-");
        Ok(fs::write(Path::new(&directory).join(name), picture)?)
    }

    /// Waits until so much has gone to the loudspeaker, and it was exactly this.
    #[track_caller]
    fn heard(&mut self, mulaw: &[u8]) -> Outcome {
        let place = std::panic::Location::caller();
        self.wait(&format!("phone.figures.heard >= {}", mulaw.len()))?;
        let (heard, hash) = (self.run("phone.figures.heard")?, self.run("phone.figures.hash")?);
        assert_eq!(heard, mulaw.len(), "{place}: samples played");
        assert_eq!(hash, checksum(0x811c_9dc5, mulaw), "{place}: other samples than were sent");
        Ok(())
    }

    /// What the phone has sent on its latest stream.
    fn sent_frames(&mut self) -> Vec<Value> {
        let sent =
            self.events.iter().filter(|event| event["method"] == "Network.webSocketFrameSent");
        let frames: Vec<Value> = sent
            .filter_map(|event| event["params"]["response"]["payloadData"].as_str())
            .filter_map(|text| serde_json::from_str(text).ok())
            .collect();
        let from = frames.iter().rposition(|frame: &Value| frame["event"] == "connected");
        frames.get(from.unwrap_or_default()..).unwrap_or_default().to_vec()
    }

    /// The server was away, or has refused, because the test wanted it so: the browser complains of
    /// that by itself.
    fn forgive_the_network(&mut self) {
        self.network_forgiven = true;
    }

    /// No error, nothing that the policy had to forbid, nobody asked but our own server.
    fn check_rules(&mut self, world: &World) -> Outcome {
        assert_eq!(self.run("broken")?, json!([]), "against the Content-Security-Policy");
        let host = world.bridge.address().to_string();
        for event in &self.events {
            let params = &event["params"];
            match event["method"].as_str().unwrap_or_default() {
                "Runtime.exceptionThrown" => return Err(format!("uncaught: {params}").into()),
                "Runtime.consoleAPICalled" if params["type"] != "log" => {
                    return Err(format!("on the console: {params}").into());
                }
                "Log.entryAdded" => {
                    let source = params["entry"]["source"].as_str().unwrap_or_default();
                    let forgiven =
                        self.network_forgiven && ["network", "javascript"].contains(&source);
                    if !forgiven && params["entry"]["level"] == "error" {
                        return Err(format!("in the browser's log: {params}").into());
                    }
                }
                "Network.requestWillBeSent" | "Network.webSocketCreated" => {
                    let url = params["url"].as_str().or(params["request"]["url"].as_str());
                    let url = url.unwrap_or_default();
                    let url = url.replace(&format!("owner:{TOKEN}@"), "");
                    let ours = ["http://", "ws://"].map(|scheme| format!("{scheme}{host}/"));
                    let inside =
                        ["data:", "blob:", "about:"].iter().any(|kind| url.starts_with(kind));
                    let allowed = inside || ours.iter().any(|ours| url.starts_with(ours.as_str()));
                    assert!(allowed, "somebody else was asked: {url}");
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Files that the browser has saved.
struct Downloads(TempDir);

impl Downloads {
    /// The file with that ending, once it is whole.
    fn wait(&self, ending: &str) -> Fallible<String> {
        let until = Instant::now() + PAGE_WITHIN;
        while Instant::now() < until {
            for entry in fs::read_dir(self.0.path())? {
                let path = entry?.path();
                let text = fs::read_to_string(&path).unwrap_or_default();
                if path.to_string_lossy().ends_with(ending) && text.ends_with('\n') {
                    return Ok(text);
                }
            }
            // Nothing announces that a file is there.
            thread::sleep(Duration::from_millis(20));
        }
        Err(format!("no file {ending} was saved").into())
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Asked to close, it takes its own children along, and nobody writes into the profile while
        // that is removed. Its socket ends with it.
        self.session.clear();
        if self.ask("Browser.close", &json!({})).is_ok() {
            while self.tab.read().is_ok() {}
        }
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            println!("Chromium did not end: {error}");
        }
    }
}

/// Each text that is to be seen, against what is behind it: 4.5 to 1 (WCAG, AA).
const CONTRAST: &str = "(() => {
    const light = (colour) => {
        const [red, green, blue] = colour.map((part) => part / 255).map((part) =>
            part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const behind = (element) => {
        if (element.ownerSVGElement) {
            const box = element.parentElement.querySelector('rect');
            return parts(getComputedStyle(box).fill);
        }
        for (let at = element; at; at = at.parentElement) {
            const colour = parts(getComputedStyle(at).backgroundColor);
            if (colour.length === 3) return colour;
        }
        return [255, 255, 255];
    };
    const bad = [];
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let text = texts.nextNode(); text; text = texts.nextNode()) {
        const element = text.parentElement;
        const silent = element.closest('script, noscript, title');
        if (!text.data.trim() || silent || !element.checkVisibility()) continue;
        const style = getComputedStyle(element);
        const ours = light(parts(element.ownerSVGElement ? style.fill : style.color));
        const theirs = light(behind(element));
        const ratio = (Math.max(ours, theirs) + 0.05) / (Math.min(ours, theirs) + 0.05);
        if (ratio < 4.5) bad.push(`${ratio.toFixed(2)}: ${text.data.slice(0, 40)}`);
    }
    return bad;
})()";

/// Where a Chromium is: `CHROMIUM`, or by its usual names.
fn chromium() -> Fallible<Option<PathBuf>> {
    static SAID: Once = Once::new();
    if let Some(path) = env::var_os("CHROMIUM") {
        return Ok(Some(path.into()));
    }
    let directories: Vec<PathBuf> =
        env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    for name in ["chromium", "chromium-browser", "google-chrome"] {
        if let Some(found) =
            directories.iter().map(|one| one.join(name)).find(|path| path.is_file())
        {
            return Ok(Some(found));
        }
    }
    if env::var("BROWSER_TESTS").is_ok_and(|tests| tests == "required") {
        return Err("no Chromium, but BROWSER_TESTS=required (apt-get install chromium)".into());
    }
    // Past the test harness, which keeps to itself what a test that passes has printed.
    SAID.call_once(|| {
        let words = "SKIPPED: no Chromium here (apt-get install chromium, or CHROMIUM=path)\n";
        drop(io::stderr().write_all(words.as_bytes()));
    });
    Ok(None)
}

/// The address of its `DevTools`, which it prints when it is ready. All else it prints is read too,
/// so that it never waits for a reader.
fn devtools(child: &mut Child) -> Fallible<(String, String)> {
    let stderr = child.stderr.take().ok_or("no stderr")?;
    let (told, address) = std::sync::mpsc::channel();
    thread::Builder::new().name("chromium".into()).spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            if let Some((_, url)) = line.split_once("DevTools listening on ws://") {
                // Nobody waits any more when it came too late.
                drop(told.send(url.to_owned()));
            }
        }
    })?;
    let url = address.recv_timeout(PAGE_WITHIN)?;
    let (host, path) = url.trim().split_once('/').ok_or("an odd address")?;
    Ok((host.to_owned(), format!("/{path}")))
}

/// Both tones, without an end.
fn wav() -> Vec<u8> {
    wav_of(|_| true)
}

/// Both tones for two thirds of a second in every three.
fn spoken() -> Vec<u8> {
    wav_of(|index| index % 144_000 < 32_000)
}

/// Both tones at 48 kHz, where they sound. Chromium plays it again and again, with a jump at the
/// seam: so it is long.
fn wav_of(sounds: impl Fn(u32) -> bool) -> Vec<u8> {
    const RATE: u32 = 48_000;
    const BYTES: u32 = 60 * RATE * 2;
    let sample = |index: u32| {
        if !sounds(index) {
            return [0, 0];
        }
        let turn = std::f64::consts::TAU * f64::from(index) / f64::from(RATE);
        let sum = TONE_LEVEL * (f64::sin(turn * TONE_HZ) + f64::sin(turn * TOO_HIGH_HZ));
        #[expect(clippy::cast_possible_truncation, reason = "twice 8000 fits into 16 bits")]
        let sample = sum as i16;
        sample.to_le_bytes()
    };
    let samples: Vec<u8> = (0..BYTES / 2).flat_map(sample).collect();
    let mut file = Vec::new();
    file.extend(b"RIFF");
    file.extend((BYTES + 36).to_le_bytes());
    file.extend(b"WAVEfmt \x10\0\0\0\x01\0\x01\0");
    file.extend(RATE.to_le_bytes());
    file.extend((2 * RATE).to_le_bytes());
    file.extend(b"\x02\0\x10\0data");
    file.extend(BYTES.to_le_bytes());
    file.extend(samples);
    file
}

/// FNV-1a over the decoded samples, as the page's worklet counts what it has played.
fn checksum(from: u64, mulaw: &[u8]) -> u64 {
    let fold = |hash: u64, byte: u8| ((hash ^ u64::from(byte)) * 0x0100_0193) & 0xffff_ffff;
    pcm_of(mulaw).into_iter().fold(from, fold)
}
