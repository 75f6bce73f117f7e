//! A call's life: the ring, the upgrade, the first sound, and the hang-up.
//!
//! [`Call`] holds the two lines and what is known of them. The hall rings the bridge as Twilio
//! and opens the stream, lets the agent's line in, and ends a call by turns from either side,
//! after what is under way has arrived.

use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use std::{io, thread};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::json;
use tungstenite::handshake::derive_accept_key;

use crate::demo::agent_call::transcript;
use crate::demo::backstage::{Board, lock, moot, random_hex};
use crate::demo::bench::caller::{opening_of_stream, upgrade_as_twilio, webhook};
use crate::demo::bench::hall::{Hall, Way};
use crate::demo::bench::line::Line;
use crate::demo::bench::listener::Listener;
use crate::demo::bench::message::{
    BINARY, CLOSE, NORMAL_CLOSE, PING, PONG, TEXT, ToTwilio, answer, answer_ping, write_message,
};
use crate::demo::bench::stage::wait_until;
use crate::demo::bench::stamp::{CODES, Ear, LEG_MAX};
use crate::demo::bench::vitals::now_ns;
use crate::demo::http::{find_header, read_head};
use crate::demo::n8n::FIRST_MESSAGE;
use crate::demo::twilio::incoming_call_form;
use crate::demo::twiml::Twiml;
use crate::demo::{OUR_NUMBER, PATIENCE};

/// One call, with its two lines.
pub(super) struct Call {
    pub(super) number: u32,
    pub(super) sid: String,
    pub(super) stream_sid: String,
    pub(super) phone: OnceLock<Line>,
    pub(super) agent: OnceLock<Line>,
    pub(super) up: Route,
    pub(super) down: Route,
    /// What n8n and Ultravox took for its questions, by their own clocks.
    pub(super) stand_ins_ns: AtomicU64,
    start_sent_ns: AtomicU64,
    clear_sent_ns: AtomicU64,
    pub(super) state: Board<CallState>,
}

#[derive(Default)]
pub(super) struct Route {
    pub(super) sent: AtomicU32,
    ear: Mutex<Ear>,
}

#[derive(Default)]
pub(super) struct CallState {
    first_heard: bool,
    pub(super) phone_over: bool,
    pub(super) agent_over: bool,
}

impl Call {
    fn new(number: u32) -> Call {
        let call = Call {
            number,
            sid: format!("CA{}", random_hex(16)),
            stream_sid: format!("MZ{}", random_hex(16)),
            phone: OnceLock::new(),
            agent: OnceLock::new(),
            up: Route::default(),
            down: Route::default(),
            stand_ins_ns: AtomicU64::new(0),
            start_sent_ns: AtomicU64::new(0),
            clear_sent_ns: AtomicU64::new(0),
            state: Board::default(),
        };
        lock(&call.up.ear).leg = call.leg(Way::Up);
        lock(&call.down.ear).leg = call.leg(Way::Down);
        call
    }

    /// Tells the frames of all calls and directions apart.
    pub(super) fn leg(&self, way: Way) -> u32 {
        (self.number << 1 | way as u32) & LEG_MAX
    }

    pub(super) fn barge_in(&self, out: &mut Vec<u8>) -> io::Result<()> {
        let Some(agent) = self.agent.get() else { return Ok(()) };
        out.clear();
        write_message(out, TEXT, false, br#"{"type":"playback_clear_buffer"}"#);
        self.clear_sent_ns.store(now_ns(), Relaxed);
        agent.write(out)
    }
}

/// For the next frame under way when the pacers have stopped. Then those missing are lost.
const DRAIN_WITHIN: Duration = Duration::from_secs(2);

/// How often the legs of the others are read.
const SWEEP_EVERY: Duration = Duration::from_millis(50);

impl Hall {
    /// Rings the bridge as Twilio, and opens the stream. When this returns the caller has heard the
    /// agent's first frame.
    pub(super) fn ring(
        self: &Arc<Hall>,
        bridge: SocketAddr,
        number: u32,
    ) -> Result<Arc<Call>, String> {
        let call = Arc::new(Call::new(number));
        lock(&self.by_sid).insert(call.sid.clone(), Arc::clone(&call));
        let outcome = self.ring_for(bridge, &call);
        if outcome.is_err() {
            lock(&self.by_sid).remove(&call.sid);
        }
        outcome.map(|()| call)
    }

    fn ring_for(self: &Arc<Hall>, bridge: SocketAddr, call: &Arc<Call>) -> Result<(), String> {
        // A thousand people call again and again, as in real life.
        let caller = format!("+4930{:06}", 100_000 + call.number % 1_000);
        let mut form = incoming_call_form(&caller);
        for (name, value) in &mut form {
            if name == "CallSid" {
                value.clone_from(&call.sid);
            }
        }
        let pairs: Vec<(&str, &str)> =
            form.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let answer = webhook(bridge, "/incoming-call", &pairs)?;
        let own = Duration::from_nanos(call.stand_ins_ns.load(Relaxed));
        self.webhook.note(answer.took.saturating_sub(own));
        let twiml = Twiml::read(&answer.text())?;
        let Some(url) = &twiml.stream_url else {
            return Err(format!("the TwiML has no stream: {}", twiml.xml));
        };

        let line = Line::to(bridge).map_err(|error| format!("/media-stream: {error}"))?;
        let reader = upgrade_as_twilio(&line, url).map_err(|error| format!("upgrade: {error}"))?;
        let opening = opening_of_stream(call);
        call.start_sent_ns.store(now_ns(), Relaxed);
        line.write(&opening).map_err(|error| format!("start: {error}"))?;
        self.listen_at_phone(call, line, reader.buffer())
    }

    /// The floor's calls have no beginning: a socket here, a socket there.
    pub(super) fn connect_through_floor(
        self: &Arc<Hall>,
        floor: SocketAddr,
        number: u32,
    ) -> Result<Arc<Call>, String> {
        let call = Arc::new(Call::new(number));
        *lock(&self.next_join) = Some(Arc::clone(&call));
        let line = Line::to(floor).map_err(|error| error.to_string())?;
        self.listen_at_phone(&call, line, &[])?;
        Ok(call)
    }

    fn listen_at_phone(
        self: &Arc<Hall>,
        call: &Arc<Call>,
        line: Line,
        early: &[u8],
    ) -> Result<(), String> {
        moot(call.phone.set(line.clone()));
        let listener = Listener::new(call, Way::Down, line, early, self.is_timed(call));
        let hall = Arc::clone(self);
        self.backstage.employ("phone", move || hall.listen(listener)).map_err(|error| {
            format!("no thread ({error}): memory or processes (ulimit -u) ran out")
        })?;
        let heard = call
            .state
            .wait(PATIENCE, |state| (state.first_heard || state.phone_over).then_some(()));
        match heard {
            Some(()) if call.state.look(|state| !state.phone_over) => Ok(()),
            Some(()) => Err("the bridge closed the stream".to_owned()),
            None => Err(format!("the agent's first frame was not heard within {PATIENCE:?}")),
        }
    }

    /// A leg's own thread. It leaves when the line ends; a leg that is not timed it leaves to the
    /// sweeper, as soon as the first frame has been heard.
    fn listen(&self, mut listener: Listener) {
        loop {
            if !self.hear(&mut listener, now_ns()) {
                return listener.end();
            }
            let begun = listener.way == Way::Up || lock(&listener.call.down.ear).heard > 0;
            if !listener.is_timed && begun && listener.line.stop_waiting().is_ok() {
                return lock(&self.swept).push(listener);
            }
            if listener.inbox.fill(&mut listener.line).is_err() {
                return listener.end();
            }
        }
    }

    /// Reads for all legs that are not timed, several frames with one `read`. A thread that wakes
    /// for each frame, on both ends of each call, would cost as much as the bridge itself.
    pub(super) fn sweep(&self) {
        let mut listeners = Vec::new();
        while !self.over.load(Relaxed) {
            listeners.append(&mut lock(&self.swept));
            listeners.retain_mut(|listener: &mut Listener| {
                let is_there = match listener.inbox.fill(&mut listener.line) {
                    Ok(()) => self.hear(listener, now_ns()),
                    Err(error) => error.kind() == io::ErrorKind::WouldBlock,
                };
                if !is_there {
                    listener.end();
                }
                is_there
            });
            thread::sleep(SWEEP_EVERY);
        }
    }

    /// All messages that have arrived. False: the last one was a goodbye, or nonsense.
    fn hear(&self, listener: &mut Listener, at_ns: u64) -> bool {
        let Listener { call, way, line, inbox, message, mulaw, is_timed } = listener;
        loop {
            let opcode = match inbox.next(message) {
                Ok(Some(opcode)) => opcode,
                Ok(None) => return true,
                Err(error) => {
                    self.trouble(format!("call {}: {way:?}: {error}", call.number));
                    return false;
                }
            };
            let at_ns = is_timed.then_some(at_ns);
            let masked = *way == Way::Down;
            let known = match (opcode, *way) {
                (TEXT, Way::Down) => self.hear_twilio_message(call, line, message, mulaw, at_ns),
                (BINARY, Way::Up) => {
                    self.hear_pcm(call, message, mulaw, at_ns);
                    Ok(())
                }
                (TEXT, Way::Up) => answer_ping(line, message),
                (PING, _) => answer(line, PONG, masked, message),
                (CLOSE, _) => {
                    moot(answer(line, CLOSE, masked, message));
                    return false;
                }
                _ => Err(format!("opcode {opcode}")),
            };
            if let Err(what) = known {
                self.trouble(format!("call {}: {way:?}: {what}", call.number));
            }
        }
    }

    fn hear_pcm(&self, call: &Call, pcm: &[u8], mulaw: &mut Vec<u8>, at_ns: Option<u64>) {
        mulaw.clear();
        let samples = pcm.chunks_exact(2);
        mulaw.extend(
            samples.map(|bytes| CODES[usize::from(u16::from_le_bytes([bytes[0], bytes[1]]))]),
        );
        lock(&call.up.ear).hear(mulaw, |stamp| self.note_frame(Way::Up, stamp, at_ns));
    }

    fn hear_twilio_message(
        &self,
        call: &Call,
        line: &Line,
        message: &[u8],
        mulaw: &mut Vec<u8>,
        at_ns: Option<u64>,
    ) -> Result<(), String> {
        let message: ToTwilio =
            serde_json::from_slice(message).map_err(|error| format!("no such message: {error}"))?;
        if message.stream_sid != call.stream_sid {
            return Err(format!("the streamSid {}", message.stream_sid));
        }
        match (message.event, message.media, message.mark) {
            ("media", Some(media), None) => {
                mulaw.clear();
                BASE64.decode_vec(media.payload, mulaw).map_err(|error| error.to_string())?;
                let mut ear = lock(&call.down.ear);
                ear.hear(mulaw, |stamp| self.note_frame(Way::Down, stamp, at_ns));
                let is_first = ear.heard == 1;
                drop(ear);
                if is_first {
                    self.first_frame(call);
                }
                Ok(())
            }
            ("clear", None, None) => {
                let sent = call.clear_sent_ns.swap(0, Relaxed);
                if let Some(at_ns) = at_ns.filter(|_| self.window.has(sent)) {
                    self.clear.note(Duration::from_nanos(at_ns.saturating_sub(sent)));
                }
                Ok(())
            }
            // Played out it is at once: these agents do not speak ahead.
            ("mark", None, Some(mark)) => {
                let echo = json!({"event": "mark", "streamSid": call.stream_sid,
                    "sequenceNumber": "0", "mark": {"name": mark.name}});
                answer(line, TEXT, true, echo.to_string().as_bytes())
            }
            (event, _, _) => Err(format!("the event {event:?}")),
        }
    }

    fn first_frame(&self, call: &Call) {
        let waited = now_ns().saturating_sub(call.start_sent_ns.load(Relaxed));
        if !self.is_floor {
            self.first_audio.note(Duration::from_nanos(waited));
        }
        call.state.change(|state| state.first_heard = true);
    }

    /// One connection to the agents' door, from the upgrade to the end.
    pub(super) fn join(&self, line: Line) -> io::Result<()> {
        if self.is_floor {
            return self.join_floor(line);
        }
        let mut reader = line.reader();
        let (request, headers) = read_head(&mut reader)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let sid = request.split(['/', '?', ' ']).find(|word| word.starts_with("CA"));
        let call = lock(&self.by_sid).get(sid.unwrap_or_default()).cloned();
        let key = find_header(&headers, "sec-websocket-key").unwrap_or_default();
        let Some(call) = call.filter(|call| call.agent.get().is_none()) else {
            return line.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
        };
        let upgrade = format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Accept: {}\r\n\r\n",
            derive_accept_key(key.as_bytes())
        );
        line.write(upgrade.as_bytes())?;
        let mut out = Vec::new();
        let heard = transcript("agent", 0, &json!(FIRST_MESSAGE), &json!(null), true);
        for data in [json!({"type": "call_started", "callId": call.sid}), heard] {
            write_message(&mut out, TEXT, false, data.to_string().as_bytes());
        }
        line.write(&out)?;
        self.greet_and_listen(&call, line, reader.buffer())
    }

    fn join_floor(&self, line: Line) -> io::Result<()> {
        let call = lock(&self.next_join).take().ok_or(io::ErrorKind::NotConnected)?;
        self.greet_and_listen(&call, line, &[])
    }

    fn greet_and_listen(&self, call: &Arc<Call>, line: Line, early: &[u8]) -> io::Result<()> {
        moot(call.agent.set(line.clone()));
        // The greeting. It waits in a socket until the stream is open.
        self.speak(call, Way::Down, &mut Vec::new())?;
        self.listen(Listener::new(call, Way::Up, line, early, self.is_timed(call)));
        Ok(())
    }

    /// Calls of which every frame is timed, and which barge in. Of the others every frame is
    /// looked at, but later.
    pub(super) fn is_timed(&self, call: &Call) -> bool {
        let stride = self.plan.calls.div_ceil(self.plan.timed.max(1));
        (call.number as usize).is_multiple_of(stride.max(1))
    }

    /// Ends a call: by turns the caller and the agent hang up. What is under way arrives before.
    pub(super) fn hang_up(&self, bridge: SocketAddr, call: &Arc<Call>) -> Result<(), String> {
        lock(self.slot(call)).retain(|other| !Arc::ptr_eq(other, call));
        let routes = [&call.up, &call.down];
        // Late is not lost: as long as something comes, there is more.
        let missing = || {
            let missing = routes.iter().map(|route| {
                u64::from(route.sent.load(Relaxed)).saturating_sub(lock(&route.ear).heard)
            });
            missing.sum::<u64>()
        };
        let mut left = missing();
        while left > 0 {
            if !wait_until(DRAIN_WITHIN, || missing() < left) {
                break;
            }
            left = missing();
        }
        for (route, tally) in routes.into_iter().zip(&self.ways) {
            let ear = lock(&route.ear);
            let sent = u64::from(route.sent.load(Relaxed));
            tally.sent.fetch_add(sent, Relaxed);
            tally.lost.fetch_add(sent.saturating_sub(ear.heard), Relaxed);
            tally.damaged.fetch_add(ear.damaged, Relaxed);
            tally.out_of_order.fetch_add(ear.out_of_order, Relaxed);
        }
        let (Some(phone), Some(agent)) = (call.phone.get(), call.agent.get()) else {
            return Err("it has no lines".to_owned());
        };
        let by_caller = call.number.is_multiple_of(2);
        if self.is_floor {
            phone.shut();
        } else if by_caller {
            let stop = json!({"event": "stop", "streamSid": call.stream_sid,
                "sequenceNumber": "0", "stop": {"callSid": call.sid}});
            moot(answer(phone, TEXT, true, stop.to_string().as_bytes()));
            moot(answer(phone, CLOSE, true, &NORMAL_CLOSE));
        } else {
            moot(answer(agent, CLOSE, false, &NORMAL_CLOSE));
        }
        let over =
            call.state.wait(PATIENCE, |state| (state.phone_over && state.agent_over).then_some(()));
        lock(&self.by_sid).remove(&call.sid);
        self.standing_calls.fetch_sub(1, Relaxed);
        if over.is_none() {
            return Err(format!("its lines did not end within {PATIENCE:?}"));
        }
        if self.is_floor {
            return Ok(());
        }
        let status = if by_caller { "completed" } else { "in-progress" };
        let form = [
            ("CallSid", call.sid.as_str()),
            ("To", OUR_NUMBER),
            ("CallStatus", status),
            ("Direction", "inbound"),
        ];
        webhook(bridge, "/stream-ended", &form).map(drop)
    }
}
