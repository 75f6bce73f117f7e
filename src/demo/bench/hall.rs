//! The hall: everything that the calls of one stage share, and those who speak in it.
//!
//! It opens the doors of the stand-ins and keeps the pacers: threads that speak for all calls
//! of their slots, each call at its own point of the 20 ms. The tallies of both directions are
//! kept here.
//!
//! Who listens is in [`listener`](super::listener), what a call lives through in
//! [`call`](super::call).

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use std::{fs, io};

use crate::demo::backstage::{Backstage, lock, moot};
use crate::demo::bench::call::Call;
use crate::demo::bench::figures::WayFigures;
use crate::demo::bench::histogram::Histogram;
use crate::demo::bench::line::Line;
use crate::demo::bench::listener::Listener;
use crate::demo::bench::message::{
    BINARY, pcm_frame, write_media_of_bridge, write_media_of_twilio, write_message,
};
use crate::demo::bench::stage::sleep_until;
use crate::demo::bench::stamp::Stamp;
use crate::demo::bench::vitals::now_ns;
use crate::demo::bench::{CALLS_MAX, Plan};
use crate::demo::certificate::make_certificate;
use crate::demo::sound::FRAME_TIME;
use crate::demo::{API_KEY, AUTH_TOKEN, PATIENCE, PUBLIC_URL, WRITE_WITHIN};

/// A frame that takes longer is late: the next one has been sent in the meantime.
const LATE: Duration = FRAME_TIME;

/// The calls of all phones are spread over so many points of the 20 ms.
const SLOTS: usize = 100;

/// One thread speaks for so many, in one direction.
const CALLS_PER_PACER: usize = 100;

/// A speaker who is so far behind does not catch up: sound from a phone never comes in floods.
const BEHIND_MAX: Duration = Duration::from_millis(100);

/// One direction of the sound, in the order of [`Hall::ways`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Caller to agent.
    Up = 0,
    /// Agent to caller.
    Down = 1,
}

/// Everything that the calls of one stage share.
pub(super) struct Hall {
    pub(super) plan: Plan,
    pub(super) is_floor: bool,
    pub(super) backstage: Arc<Backstage>,
    /// Where the agents' join URLs lead.
    pub(super) agents: OnceLock<String>,
    pub(super) by_sid: Mutex<HashMap<String, Arc<Call>>>,
    /// The floor's next call, whose agent's leg is about to be opened.
    pub(super) next_join: Mutex<Option<Arc<Call>>>,
    /// Who speaks when.
    slots: Vec<Mutex<Vec<Arc<Call>>>>,
    /// Legs on their way to the sweeper.
    pub(super) swept: Mutex<Vec<Listener>>,
    pub(super) standing_calls: AtomicUsize,
    pub(super) window: Window,
    pub(super) ways: [WayTally; 2],
    pub(super) webhook: Histogram,
    pub(super) first_audio: Histogram,
    pub(super) clear: Histogram,
    pub(super) lateness: Histogram,
    pub(super) filed: AtomicUsize,
    /// HTTP connections that the bridge keeps for its next question.
    pub(super) kept: AtomicUsize,
    pub(super) troubles: Mutex<Vec<String>>,
    pub(super) over: AtomicBool,
}

/// Frames sent in this time count for the delay, in nanoseconds of [`now_ns`].
pub(super) struct Window {
    pub(super) from_ns: AtomicU64,
    pub(super) until_ns: AtomicU64,
}

impl Window {
    pub(super) fn has(&self, at_ns: u64) -> bool {
        (self.from_ns.load(Relaxed)..self.until_ns.load(Relaxed)).contains(&at_ns)
    }
}

/// What became of the frames of one direction, over all calls.
#[derive(Default)]
pub(super) struct WayTally {
    delay: Histogram,
    pub(super) in_window: AtomicU64,
    late: AtomicU64,
    pub(super) sent: AtomicU64,
    pub(super) lost: AtomicU64,
    pub(super) damaged: AtomicU64,
    pub(super) out_of_order: AtomicU64,
}

impl WayTally {
    pub(super) fn figures(&self) -> WayFigures {
        WayFigures {
            sent: self.sent.load(Relaxed),
            lost: self.lost.load(Relaxed),
            damaged: self.damaged.load(Relaxed),
            out_of_order: self.out_of_order.load(Relaxed),
            late: self.late.load(Relaxed),
            delay: self.delay.spread(),
        }
    }
}

type Settings = Vec<(String, String)>;

impl Hall {
    fn new(plan: &Plan, is_floor: bool) -> Hall {
        Hall {
            plan: plan.clone(),
            is_floor,
            backstage: Arc::default(),
            agents: OnceLock::new(),
            by_sid: Mutex::default(),
            next_join: Mutex::default(),
            slots: (0..SLOTS).map(|_| Mutex::default()).collect(),
            swept: Mutex::default(),
            standing_calls: AtomicUsize::new(0),
            window: Window {
                from_ns: AtomicU64::new(u64::MAX),
                until_ns: AtomicU64::new(u64::MAX),
            },
            ways: Default::default(),
            webhook: Histogram::default(),
            first_audio: Histogram::default(),
            clear: Histogram::default(),
            lateness: Histogram::default(),
            filed: AtomicUsize::new(0),
            kept: AtomicUsize::new(0),
            troubles: Mutex::default(),
            over: AtomicBool::new(false),
        }
    }

    /// Opens all doors, and gives the settings by which the bridge finds them.
    pub(super) fn open(plan: &Plan, home: &Path) -> io::Result<(Arc<Hall>, Settings)> {
        let hall = Arc::new(Hall::new(plan, false));
        let certificate = if plan.tls { Some(make_certificate()?) } else { None };
        let (pem, tls) = certificate.unzip();
        let secure = if tls.is_some() { "s" } else { "" };

        let agents = hall.let_agents_in(tls.clone())?;
        moot(hall.agents.set(format!("ws{secure}://{agents}/join")));
        let n8n = hall.serve("n8n", None, Hall::n8n)?;
        let ultravox = hall.serve("ultravox", tls, Hall::ultravox)?;
        hall.start_speakers_and_sweeper()?;

        let mut settings: Settings = [
            ("BIND", "127.0.0.1"),
            ("PORT", "0"),
            ("PUBLIC_URL", PUBLIC_URL),
            ("ULTRAVOX_API_KEY", API_KEY),
            ("ULTRAVOX_API_URL", &format!("http{secure}://{ultravox}")),
            ("N8N_WEBHOOK_URL", &format!("http://{n8n}/webhook/call")),
            ("TWILIO_AUTH_TOKEN", AUTH_TOKEN),
            ("DATA_DIR", &home.join("data").to_string_lossy()),
            // While one call still files its transcript, the next may take its place.
            ("MAX_CALLS", &(plan.calls + plan.calls / 4 + 8).min(CALLS_MAX).to_string()),
            ("CALLS_PER_NUMBER_PER_HOUR", "100000"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
        if let Some(pem) = pem {
            let path = home.join("world.pem");
            fs::write(&path, pem)?;
            settings.push(("SSL_CERT_FILE".to_owned(), path.to_string_lossy().into_owned()));
        }
        Ok((hall, settings))
    }

    /// The floor needs to know only where the agents are.
    pub(super) fn open_for_floor(plan: &Plan) -> io::Result<(Arc<Hall>, SocketAddr)> {
        let hall = Arc::new(Hall::new(plan, true));
        let agents = hall.let_agents_in(None)?;
        hall.start_speakers_and_sweeper()?;
        Ok((hall, agents))
    }

    /// The agents' door. Unlike [`Backstage::listen`] it does not end a line when its first thread
    /// leaves.
    fn let_agents_in(
        self: &Arc<Hall>,
        tls: Option<Arc<rustls::ServerConfig>>,
    ) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        self.backstage.board.change(|hands| hands.doors.push(address));
        let hall = Arc::clone(self);
        self.backstage.employ("agents", move || {
            for tcp in listener.incoming() {
                if hall.over.load(Relaxed) {
                    return;
                }
                // A line that does not come about is missed by the phone at its other end.
                let line = tcp.and_then(|tcp| {
                    tcp.set_nodelay(true)?;
                    tcp.set_write_timeout(Some(WRITE_WITHIN))?;
                    // Whoever knocks and says nothing is not waited for.
                    tcp.set_read_timeout(Some(PATIENCE))?;
                    Line::new(tcp, tls.as_ref())
                });
                let room = Arc::clone(&hall);
                moot(line.and_then(|line| {
                    hall.backstage.employ("agent", move || moot(room.join(line)))
                }));
            }
        })?;
        Ok(address)
    }

    fn start_speakers_and_sweeper(self: &Arc<Hall>) -> io::Result<()> {
        let hall = Arc::clone(self);
        self.backstage.employ("sweeper", move || hall.sweep())?;
        let pacers = self.plan.calls.div_ceil(CALLS_PER_PACER).min(SLOTS);
        for pacer in 0..pacers {
            for (way, name) in [(Way::Up, "pacer up"), (Way::Down, "pacer down")] {
                let hall = Arc::clone(self);
                let slots: Vec<usize> = (pacer..SLOTS).step_by(pacers).collect();
                self.backstage.employ(name, move || hall.pace(way, &slots))?;
            }
        }
        Ok(())
    }

    /// Speaks for the calls of these slots, each at its own point of the 20 ms.
    fn pace(&self, way: Way, slots: &[usize]) {
        let step = FRAME_TIME / u32::try_from(SLOTS).unwrap_or(1);
        // Fifty barge-ins a second in all, and not more than one in each call.
        let barge_in_every = self.plan.calls.min(self.plan.timed).max(50) as u64;
        let mut out = Vec::with_capacity(1_024);
        let mut round_begins = Instant::now();
        for round in 0_u64.. {
            sleep_until(round_begins);
            if self.over.load(Relaxed) {
                return;
            }
            if round_begins.elapsed() > BEHIND_MAX {
                round_begins = Instant::now();
            }
            for &slot in slots {
                // Both directions of a call at different times.
                let place = if way == Way::Up { slot } else { (slot + SLOTS / 2) % SLOTS };
                let Some(calls) = self.slots.get(place).filter(|calls| !lock(calls).is_empty())
                else {
                    continue;
                };
                let due = round_begins + step * u32::try_from(slot).unwrap_or(0);
                sleep_until(due);
                for call in lock(calls).iter() {
                    if self.window.has(now_ns()) {
                        self.lateness.note(due.elapsed());
                    }
                    let mut sent = self.speak(call, way, &mut out);
                    let barges_in = (round + u64::from(call.number)).is_multiple_of(barge_in_every);
                    let barges_in = barges_in && self.is_timed(call) && !self.is_floor;
                    if way == Way::Down && barges_in && sent.is_ok() {
                        sent = call.barge_in(&mut out);
                    }
                    if let Err(error) = sent {
                        self.trouble(format!("call {} cannot speak {way:?}: {error}", call.number));
                    }
                }
            }
            round_begins += FRAME_TIME;
        }
    }

    /// One frame: stamped, wrapped as the other side expects it, and written at once.
    pub(super) fn speak(&self, call: &Call, way: Way, out: &mut Vec<u8>) -> io::Result<()> {
        let (route, line) = match way {
            Way::Up => (&call.up, call.phone.get()),
            Way::Down => (&call.down, call.agent.get()),
        };
        let Some(line) = line else { return Err(io::ErrorKind::NotConnected.into()) };
        let number = route.sent.fetch_add(1, Relaxed);
        let stamp = Stamp { leg: call.leg(way), sequence: number, sent_ns: now_ns() };
        #[cfg(not(test))]
        let mulaw = stamp.sound();
        #[cfg(test)]
        let Some(mulaw) = self.plan.spoil(way, stamp) else { return Ok(()) };
        out.clear();
        match (way, self.is_floor) {
            (Way::Up, false) => write_media_of_twilio(out, call, number, &mulaw),
            (Way::Down, false) => write_message(out, BINARY, false, &pcm_frame(&mulaw)),
            // What the bridge would write: the floor reads it and writes it again.
            (Way::Up, true) => write_message(out, BINARY, true, &pcm_frame(&mulaw)),
            (Way::Down, true) => write_media_of_bridge(out, call, &mulaw),
        }
        line.write(out)
    }

    pub(super) fn begin_talking(&self, call: &Arc<Call>) {
        self.standing_calls.fetch_add(1, Relaxed);
        lock(self.slot(call)).push(Arc::clone(call));
    }

    /// With a stride, so that a few calls are spread as evenly as many.
    pub(super) fn slot(&self, call: &Call) -> &Mutex<Vec<Arc<Call>>> {
        let slot = (call.number as usize).wrapping_mul(37) % SLOTS;
        &self.slots[slot]
    }

    pub(super) fn note_frame(&self, way: Way, stamp: &Stamp, at_ns: Option<u64>) {
        let tally = &self.ways[way as usize];
        // The greeting has waited for the phone, and on purpose.
        if stamp.sequence == 0 || !self.window.has(stamp.sent_ns) {
            return;
        }
        tally.in_window.fetch_add(1, Relaxed);
        let Some(at_ns) = at_ns else { return };
        let delay = Duration::from_nanos(at_ns.saturating_sub(stamp.sent_ns));
        tally.delay.note(delay);
        if delay > LATE {
            tally.late.fetch_add(1, Relaxed);
        }
    }

    pub(super) fn trouble(&self, what: String) {
        let mut troubles = lock(&self.troubles);
        if troubles.len() < 10 && !self.over.load(Relaxed) {
            troubles.push(what);
        }
    }
}
