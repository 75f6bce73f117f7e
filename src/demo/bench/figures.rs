//! What was measured, as numbers: of one child process, one direction of the sound, the
//! machine.
//!
//! Plain values that [`stage`](super::stage) fills in and [`report`](super::report) prints.
//! Times are microseconds where nothing else is said.

use std::time::Duration;

use serde_json::{Value, json};

use crate::demo::bench::vitals::Vitals;

/// What one child process did with the sound, and what it cost.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Caller to agent, agent to caller.
    pub ways: [WayFigures; 2],
    /// The child's CPU time, over the seconds that were measured.
    pub cpu: Duration,
    pub user_share: f64,
    /// Seconds of calls in that time.
    pub call_seconds: f64,
    pub rest: Vitals,
    pub standing: Vitals,
    /// From the start of the process to the first answer.
    pub start: Spread,
    pub webhook: Spread,
    pub first_audio: Spread,
    pub clear: Spread,
    pub machine: Machine,
    /// How late the world's own senders were.
    pub lateness: Spread,
    /// Calls whose transcript pretend n8n has got.
    pub filed: usize,
    pub calls: usize,
    /// The first things that went wrong.
    pub troubles: Vec<String>,
}

/// One direction of the sound.
#[derive(Clone, Copy, Debug, Default)]
pub struct WayFigures {
    pub sent: u64,
    pub lost: u64,
    pub damaged: u64,
    pub out_of_order: u64,
    pub late: u64,
    pub delay: Spread,
}

/// How the machine was while it was measured, as shares of all its cores.
#[derive(Clone, Copy, Debug, Default)]
pub struct Machine {
    pub cores: usize,
    pub busy: f64,
    pub child: f64,
    pub world: f64,
    /// How long a thread of the child waited for a core, on average for each frame.
    pub queue_us: f64,
}

impl Machine {
    pub(super) fn others(&self) -> f64 {
        (self.busy - self.child - self.world).max(0.0)
    }
}

impl Figures {
    pub(super) fn cpu_ms(&self) -> f64 {
        self.cpu.as_secs_f64() * 1_000.0 / self.call_seconds.max(0.001)
    }

    pub(super) fn json(&self) -> Value {
        let [up, down] = self.ways.map(|way| {
            json!({"sent": way.sent, "lost": way.lost, "damaged": way.damaged,
                "outOfOrder": way.out_of_order, "late": way.late, "delay": way.delay.json()})
        });
        let per_call = |with: f64, without: f64| (with - without) / self.calls.max(1) as f64;
        let Figures { rest, standing, machine, .. } = self;
        json!({
            "up": up,
            "down": down,
            "cpuMsPerCallSecond": self.cpu_ms(),
            "callsPerCore": 1_000.0 / self.cpu_ms(),
            "userShare": self.user_share,
            "memoryKib": {
                "rest": rest.rss_kib,
                "standing": standing.rss_kib,
                "perCall": per_call(standing.rss_kib as f64, rest.rss_kib as f64),
            },
            "threadsPerCall": per_call(standing.threads as f64, rest.threads as f64),
            "descriptorsPerCall": per_call(standing.descriptors as f64, rest.descriptors as f64),
            "start": self.start.json(),
            "webhook": self.webhook.json(),
            "firstAudio": self.first_audio.json(),
            "clear": self.clear.json(),
            "transcripts": self.filed,
            "worldLate": self.lateness.json(),
            "machine": {"cores": machine.cores, "busy": machine.busy, "child": machine.child,
                "world": machine.world, "others": machine.others(),
                "queueUsPerFrame": machine.queue_us},
        })
    }
}

/// What a histogram says, in microseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spread {
    pub count: u64,
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

impl Spread {
    fn json(&self) -> Value {
        json!({"count": self.count, "p50": self.p50, "p99": self.p99, "p999": self.p999,
            "max": self.max})
    }
}
