//! The script of `callbridge demo`: one call, told in the nine steps of every call.
//!
//! It plays all three parties at once: it rings and speaks as the caller, answers as the voice
//! agent, and reads what n8n has been told. Each step is printed when it has happened, and
//! judged: what the server did must be what it ought to have done, and at the end every sample
//! of sound must have arrived as it was sent.
//!
//! [`perform`] plays it in a [`World`] of its own, [`play`] in one that is given; the latter is
//! how the tests show it a world in which something is wrong. It gives up at the first wrong
//! thing, with a [`Trouble`], and [`Show`] knows in which step that was.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::demo::PATIENCE;
use crate::demo::agent_call::AgentCall;
use crate::demo::microphone::Talking;
use crate::demo::n8n::{BOOKED, FIRST_MESSAGE};
use crate::demo::objections::tool_names;
use crate::demo::phone::{Heard, Phone};
use crate::demo::screen::{Show, Totals};
use crate::demo::sound::{FRAME_BYTES, difference, pcm_of, voice};
use crate::demo::trouble::Trouble;
use crate::demo::twilio::Ringing;
use crate::demo::twiml::Twiml;
use crate::demo::world::World;

pub(super) fn perform(program: &Path, show: &mut Show) -> Result<(), Trouble> {
    show.title()?;
    // The agent's side speaks TLS here, since the real one does.
    play(World::builder(program).tls(true).start()?, show)
}

/// The call, from the ring to the verdict.
pub fn play(world: World, show: &mut Show) -> Result<(), Trouble> {
    show.begin();
    let (ringing, agent) = ring_until_answered(&world, show)?;
    let mut scene = open_the_stream(world, ringing, agent, show)?;
    scene.hear_the_greeting(show)?;
    scene.identify_the_caller(show)?;
    scene.interrupt_the_agent(show)?;
    scene.book_a_meeting(show)?;
    scene.say_goodbye(show)?;
    scene.file_the_transcript(show)?;
    scene.add_up(show)
}

/// Steps 1 to 4: they all happen inside one webhook, while it still rings.
fn ring_until_answered(world: &World, show: &mut Show) -> Result<(Ringing, AgentCall), Trouble> {
    show.step(
        1,
        Instant::now(),
        "+49 30 901820 calls. Twilio posts a signed form to /incoming-call.",
    )?;
    let ringing = world.ring("+4930901820")?;
    show.now(2);
    let asked = world.n8n.wait_for("1", 1, PATIENCE)?;
    let asked = asked.first().ok_or_else(|| world.trouble("n8n was not asked"))?;
    world.check(asked.json["number"] == "+4930901820", "n8n was asked about another number")?;
    show.step(2, asked.at, "callbridge asks n8n who that is. n8n knows her: \"Hello Anna, …\"")?;
    show.now(3);
    let agent = world.ultravox.next_call(PATIENCE)?;
    let body = agent.request();
    let greeting = &body["firstSpeakerSettings"]["agent"]["text"];
    world.check(*greeting == FIRST_MESSAGE, "the agent was not given n8n's greeting to say")?;
    world.check(body["voice"] == "Tanya-English", "the first stage has another voice")?;
    offers(world, &body["selectedTools"], &["verify", "move_to_main_convo", "hangUp"])?;
    let sentence =
        "An Ultravox call is created: Sara's prompt, voice and tools, and that greeting.";
    show.step(3, agent.created_at(), sentence)?;
    agent.wait_joined()?;
    show.step(
        3,
        agent.joined_at(),
        "callbridge joins it at once, over wss, and feeds it silence.",
    )?;
    let sentence = "TwiML goes back: connect the call to a Media Stream, with a token used once.";
    show.step(4, ringing.answered_at, sentence)?;
    Ok((ringing, agent))
}

/// The tools on offer must be those that the script is about to use.
fn offers(world: &World, selected: &Value, wanted: &[&str]) -> Result<(), Trouble> {
    let offered = tool_names(selected);
    for name in wanted {
        let message = format!("the tool {name} is not offered in this stage, only {offered:?}");
        world.check(offered.iter().any(|offer| offer == name), &message)?;
    }
    Ok(())
}

/// Step 5, and the first audio.
fn open_the_stream(
    world: World,
    ringing: Ringing,
    agent: AgentCall,
    show: &mut Show,
) -> Result<Scene, Trouble> {
    show.now(5);
    // The agent starts speaking when it is joined, not when the caller can
    // hear it. Its first words wait in a socket until the stream is open.
    let spoken = voice(1, 1_300);
    agent.say(FIRST_MESSAGE, &pcm_of(&spoken))?;
    let phone = ringing.open_stream(&world)?;
    let opened_at = Instant::now();
    show.step(
        5,
        opened_at,
        "The caller hears a click: Twilio opens /media-stream and shows the token.",
    )?;
    let microphone = phone.keep_talking();
    Ok(Scene {
        lines: vec![format!("Agent: {FIRST_MESSAGE}")],
        world,
        ringing,
        agent,
        phone,
        microphone,
        spoken,
        opened_at,
        utterances: 1,
        clear_took: Duration::ZERO,
    })
}

/// Everything a call in progress consists of, seen from outside.
struct Scene {
    world: World,
    ringing: Ringing,
    agent: AgentCall,
    phone: Phone,
    microphone: Talking,
    /// All that the agent has said, in mu-law: what the phone must have heard.
    spoken: Vec<u8>,
    /// The transcript as it ought to be filed.
    lines: Vec<String>,
    opened_at: Instant,
    utterances: u64,
    clear_took: Duration,
}

impl Scene {
    fn hear_the_greeting(&mut self, show: &mut Show) -> Result<(), Trouble> {
        show.now(6);
        self.phone.wait_audio(self.spoken.len())?;
        let heard_at = self.phone.first_audio_at().unwrap_or_else(Instant::now);
        show.step(6, heard_at, "Sara is heard: 8 kHz PCM from the agent, mu-law to the phone.")?;
        show.quote("Sara", FIRST_MESSAGE)?;
        self.phone.wait_played();
        let wish = "I want to talk to somebody about my life insurance.";
        self.caller_says(show, wish, 600)?;
        let now = Instant::now();
        show.step(6, now, "Her 20 ms frames reach the agent as PCM. It decides what to do.")
    }

    fn identify_the_caller(&mut self, show: &mut Show) -> Result<(), Trouble> {
        show.now(7);
        let details = json!({"full_name": "Anna Berg", "date_of_birth": "1985-04-12",
            "policy_number": "SL20471"});
        let result = self.act("verify", &details)?;
        let known = result["result"].as_str().is_some_and(|text| text.contains("Anna Berg"));
        self.world.check(known, &format!("verify did not confirm Anna Berg: {result}"))?;
        show.step(
            7,
            Instant::now(),
            "Tool verify: answered by callbridge itself, from its agent file.",
        )?;
        self.agent_says(show, "Sara", "Thank you, Anna.", 300)?;

        show.now(7);
        let reason = json!({"issue_type": "meeting", "customer_name": "Anna Berg",
            "issue_details": "Wants to talk to somebody about her life insurance. Confirmed."});
        let result = self.act("move_to_main_convo", &reason)?;
        let stage = self.new_stage(&result)?;
        self.world
            .check(stage["voice"] == "Mark", "the second stage has another voice than Mark")?;
        offers(
            &self.world,
            &stage["selectedTools"],
            &["schedule_meeting", "move_to_call_summary", "hangUp"],
        )?;
        let sentence =
            "Tool move_to_main_convo: a new prompt, voice and tool list. Now Mark speaks.";
        show.step(7, Instant::now(), sentence)
    }

    /// Invokes a tool and waits for its one result.
    fn act(&self, tool: &str, parameters: &Value) -> Result<Value, Trouble> {
        let invocation = self.agent.invoke(tool, parameters)?;
        let result = self.agent.wait_result(&invocation)?;
        let clean = result.get("errorType").is_none();
        self.world.check(clean, &format!("the tool {tool} failed: {result}"))?;
        Ok(result)
    }

    /// A stage change travels as JSON inside a string.
    fn new_stage(&self, result: &Value) -> Result<Value, Trouble> {
        let wanted = result["responseType"] == "new-stage";
        self.world.check(wanted, &format!("no new stage was entered: {result}"))?;
        let body = result["result"].as_str().unwrap_or_default();
        let stage: Value = serde_json::from_str(body)
            .map_err(|error| self.world.trouble(format!("the new stage is not JSON: {error}")))?;
        for field in ["systemPrompt", "voice", "selectedTools", "toolResultText"] {
            let there = stage.get(field).is_some();
            self.world.check(there, &format!("the new stage has no {field}"))?;
        }
        Ok(stage)
    }

    fn interrupt_the_agent(&mut self, show: &mut Show) -> Result<(), Trouble> {
        show.now(6);
        let planned = "I am Mark. I see you would like to talk about your life insurance, and \
            there is a great deal to say about it, so let me begin at the beginning.";
        let cut = "I am Mark. I see you would like to talk";
        let speech = voice(90, 6_000);
        let turn = self.agent.begin_saying(planned, &pcm_of(&speech))?;
        self.spoken.extend_from_slice(&speech);
        self.phone.wait_audio(self.spoken.len())?;
        show.quote("Mark", "I am Mark. I see you would like to talk about your life …")?;
        let sentence = "Six seconds of speech reach Twilio at once; it plays them in real time.";
        show.step(6, Instant::now(), sentence)?;

        self.microphone.say(&voice(91, 500));
        self.microphone.wait_said()?;
        let interrupted_at = Instant::now();
        self.agent.send(&json!({"type": "playback_clear_buffer"}))?;
        let cleared_at = self.phone.wait_clear()?;
        self.clear_took = cleared_at.saturating_duration_since(interrupted_at);
        self.agent.finish_saying(turn, cut)?;
        self.lines.push(format!("Agent: {cut}"));
        let text = "Just book me a meeting, please.";
        self.agent.user_said(text)?;
        self.lines.push(format!("User: {text}"));
        show.quote("Anna", text)?;
        let sentence = "Barge-in: she interrupts, and \"clear\" drops what Twilio has not played.";
        show.step(6, cleared_at, sentence)
    }

    fn book_a_meeting(&mut self, show: &mut Show) -> Result<(), Trouble> {
        show.now(7);
        let wishes = json!({"name": "Anna Berg", "email": "anna.berg@example.com",
            "purpose": "Life insurance", "datetime": "2027-03-09T14:30", "location": "London"});
        let result = self.act("schedule_meeting", &wishes)?;
        let posts = self.world.n8n.wait_for("3", 1, PATIENCE)?;
        let post = posts.first().map(|post| post.json["data"].clone()).unwrap_or_default();
        let booking: Value =
            serde_json::from_str(post.as_str().unwrap_or_default()).map_err(|error| {
                self.world.trouble(format!("the booking's data is not JSON: {error}"))
            })?;
        let complete = booking["email"] == "anna.berg@example.com"
            && booking["datetime"] == "2027-03-09T14:30"
            && booking["calendar_id"].as_str().is_some_and(|calendar| calendar.contains('@'));
        self.world.check(complete, &format!("n8n got another booking: {booking}"))?;
        let told = result["result"].as_str().is_some_and(|text| text.contains(BOOKED));
        self.world.check(told, &format!("the agent was not told n8n's answer: {result}"))?;
        let sentence =
            "Tool schedule_meeting: n8n books (route 3), and its answer goes to the agent.";
        show.step(7, Instant::now(), sentence)?;
        self.agent_says(show, "Mark", "You are booked: Tuesday the ninth, half past two.", 700)
    }

    fn say_goodbye(&mut self, show: &mut Show) -> Result<(), Trouble> {
        show.now(7);
        let result =
            self.act("move_to_call_summary", &json!({"summary": "Meeting booked in London."}))?;
        let stage = self.new_stage(&result)?;
        self.world.check(stage["voice"] == "Tanya-English", "the last stage is not Sara's")?;
        let sentence = "Tool move_to_call_summary: the third stage. Sara is back, to sum up.";
        show.step(7, Instant::now(), sentence)?;
        self.caller_says(show, "That is all. Thank you, goodbye.", 400)?;

        show.now(8);
        let result = self.act("hangUp", &json!({"reason": "the caller said goodbye"}))?;
        let wanted = result["responseType"] == "hang-up";
        self.world.check(wanted, &format!("hangUp was answered otherwise: {result}"))?;
        show.step(8, Instant::now(), "Tool hangUp: the agent may go. It still says goodbye.")?;
        let farewell = voice(99, 600);
        let text = "Goodbye, Anna.";
        self.agent.say(text, &pcm_of(&farewell))?;
        // Her microphone stays open, but after its close the agent is deaf.
        self.agent.wait_caller_audio(2 * self.phone.said().0.len())?;
        self.agent.close()?;
        self.spoken.extend_from_slice(&farewell);
        self.lines.push(format!("Agent: {text}"));
        show.quote("Sara", text)?;
        self.wait_for_the_end(show)
    }

    /// The line may drop only after the last word has been heard.
    fn wait_for_the_end(&mut self, show: &mut Show) -> Result<(), Trouble> {
        let ending = self.phone.wait_closed()?;
        let heard = self.phone.heard();
        let last_audio = heard.iter().rposition(|one| matches!(one.what, Heard::Audio(_)));
        let last_mark = heard.iter().rposition(|one| matches!(one.what, Heard::Mark(_)));
        self.world.check(last_mark > last_audio, "no mark followed the agent's last word")?;
        let echo = self.phone.echoes().last().map(|(at, _)| *at);
        let closed = heard.last().map(|one| one.at);
        let in_time = echo.is_some() && echo <= closed && ending == Heard::Closed(Some(1000));
        self.world.check(
            in_time,
            &format!("the line was cut before the goodbye was heard: {ending:?}"),
        )?;
        let sentence = "Twilio returns the mark: all has been heard. Only now callbridge hangs up.";
        show.step(8, closed.unwrap_or_else(Instant::now), sentence)?;
        let answer = self.ringing.stream_ended(&self.world)?;
        let done = Twiml::read(&answer.text()).is_ok_and(|twiml| twiml.hangs_up);
        self.world.check(
            done,
            &format!("/stream-ended was not answered with <Hangup/>: {}", answer.text()),
        )
    }

    fn file_the_transcript(&mut self, show: &mut Show) -> Result<(), Trouble> {
        show.now(9);
        let filed = self.world.n8n.wait_for("2", 1, PATIENCE)?;
        let filed = filed.first().ok_or_else(|| self.world.trouble("nothing was filed"))?;
        show.step(9, filed.at, "The transcript is posted to n8n (route 2). The call is over.")?;
        let transcript = filed.json["data"].as_str().unwrap_or_default();
        let wanted = self.lines.join("\n");
        let message =
            format!("the transcript differs.\n--- said:\n{wanted}\n--- filed:\n{transcript}");
        self.world.check(transcript.trim_end() == wanted, &message)?;
        show.transcript(transcript)
    }

    /// The last word: was every sample the one that was sent?
    fn add_up(&mut self, show: &mut Show) -> Result<(), Trouble> {
        show.now(6);
        self.phone.expect_audio(&self.spoken)?;
        let (said, said_at) = self.phone.said();
        let (said, heard) = (pcm_of(&said), self.agent.heard_caller());
        let told = said.get(..heard.len()).unwrap_or(&said);
        if let Some(what) = difference(told, &heard) {
            return Err(self.world.trouble(format!("the agent heard something else: {what}")));
        }
        let mut violations = self.phone.violations();
        violations.extend(self.world.ultravox.violations());
        self.world.check(violations.is_empty(), &format!("against the rules: {violations:?}"))?;
        let first = self.phone.first_audio_at().unwrap_or(self.opened_at);
        show.totals(&Totals {
            up: heard.len() / 2 / FRAME_BYTES,
            down: self.spoken.len().div_ceil(FRAME_BYTES),
            first_audio: first.saturating_duration_since(self.opened_at),
            clear: self.clear_took,
            relay: median_relay(&said_at, &self.agent.audio_at()),
        })
    }

    fn caller_says(&mut self, show: &mut Show, text: &str, millis: u64) -> Result<(), Trouble> {
        show.now(6);
        self.utterances += 1;
        show.quote("Anna", text)?;
        self.microphone.say(&voice(self.utterances, millis));
        self.microphone.wait_said()?;
        self.agent.wait_caller_audio(2 * self.phone.said().0.len())?;
        self.lines.push(format!("User: {text}"));
        self.agent.user_said(text)
    }

    fn agent_says(
        &mut self,
        show: &mut Show,
        name: &str,
        text: &str,
        millis: u64,
    ) -> Result<(), Trouble> {
        show.now(6);
        self.utterances += 1;
        show.quote(name, text)?;
        let speech = voice(1_000 + self.utterances, millis);
        self.agent.say(text, &pcm_of(&speech))?;
        self.spoken.extend_from_slice(&speech);
        self.lines.push(format!("Agent: {text}"));
        self.phone.wait_audio(self.spoken.len())?;
        self.phone.wait_played();
        Ok(())
    }
}

/// From "Twilio wrote the frame" to "the agent read it", the median.
fn median_relay(said_at: &[Instant], heard_at: &[Instant]) -> Duration {
    // A frame is one message on either side, so the two lists run in step.
    let mut took: Vec<Duration> = said_at
        .iter()
        .zip(heard_at)
        .map(|(said, heard)| heard.saturating_duration_since(*said))
        .collect();
    took.sort_unstable();
    took.get(took.len() / 2).copied().unwrap_or_default()
}
