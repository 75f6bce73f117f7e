//! The screen of `callbridge demo`: steps, quotes, the transcript and the totals, as they
//! happen.
//!
//! Colours and a picture in a terminal (unless `NO_COLOR` is set), plain lines elsewhere, so
//! that the output can be kept in a file. It prints what [`script`](super::script) tells it and
//! decides nothing, but it remembers which step is in progress: a failure is blamed on that.
//!
//! It never panics when the reader of a pipe has left; that is a [`Trouble`] like any other.

use std::io::{self, IsTerminal as _, Write};
use std::time::{Duration, Instant};

use crate::demo::trouble::Trouble;

/// The nine steps of a call, as everywhere in this project.
const STEPS: [&str; 9] =
    ["ring", "greeting", "agent", "answer", "stream", "talk", "act", "goodbye", "after"];

pub(super) struct Totals {
    pub(super) up: usize,
    pub(super) down: usize,
    pub(super) first_audio: Duration,
    pub(super) clear: Duration,
    pub(super) relay: Duration,
}

/// The screen. Colours and frames in a terminal, plain lines elsewhere.
pub struct Show {
    out: Box<dyn Write + Send>,
    colours: bool,
    /// Time zero: the ring.
    curtain: Instant,
    /// The step in progress, which a failure is blamed on.
    step: usize,
}

impl Show {
    pub(super) fn new() -> Show {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let colours = io::stdout().is_terminal() && wanted;
        Show { out: Box::new(io::stdout()), colours, curtain: Instant::now(), step: 0 }
    }

    /// For the tests, which read the verdict and not the screen.
    #[cfg(test)]
    pub fn unseen() -> Show {
        Show { out: Box::new(io::sink()), colours: false, curtain: Instant::now(), step: 0 }
    }

    pub(super) fn title(&mut self) -> Result<(), Trouble> {
        let title = self.paint("1", "callbridge demo");
        self.print(&format!(
            "\n  {title}  one whole call. The bridge is real, the world is pretended."
        ))?;
        if self.colours {
            let bridge = self.paint("1;36", "callbridge");
            self.print(&format!("\n  caller ─── Twilio ═══ {bridge} ═══ Ultravox"))?;
            self.print("                            │\n                           n8n")?;
        }
        let head = self.paint("2", "\n      ms  step");
        self.print(&head)
    }

    /// The curtain rises: the clock starts.
    pub(super) fn begin(&mut self) {
        self.curtain = Instant::now();
    }

    /// From here on a failure belongs to this step.
    pub(super) fn now(&mut self, step: usize) {
        self.step = step;
    }

    pub(super) fn step(&mut self, step: usize, at: Instant, sentence: &str) -> Result<(), Trouble> {
        self.step = step;
        let millis = at.saturating_duration_since(self.curtain).as_millis();
        let millis = self.paint("2", &format!("{millis:>8}"));
        let label = format!("{step} {:<8}", step_name(step));
        // Each group of steps in one colour: answering, talking, ending.
        let colour = ["1;33", "1;36", "1;35"].get(usize::from(step > 4) + usize::from(step > 7));
        let label = self.paint(colour.copied().unwrap_or_default(), &label);
        self.print(&format!("{millis}  {label}  {sentence}"))
    }

    pub(super) fn quote(&mut self, name: &str, text: &str) -> Result<(), Trouble> {
        let text = self.paint("32", &format!("{name}: \"{text}\""));
        self.print(&format!("{:22}{text}", ""))
    }

    pub(super) fn transcript(&mut self, transcript: &str) -> Result<(), Trouble> {
        let title = self.paint("1", "Transcript, as n8n has it");
        self.print(&format!("\n  {title}"))?;
        for line in transcript.lines() {
            let (speaker, text) = line.split_once(": ").unwrap_or(("", line));
            let speaker = self.paint("1", &format!("{speaker:<6}"));
            self.print(&format!("  {speaker} {text}"))?;
        }
        Ok(())
    }

    pub(super) fn totals(&mut self, totals: &Totals) -> Result<(), Trouble> {
        let Totals { up, down, first_audio, clear, relay } = totals;
        let verdict = self.paint("1;32", "All nine steps came out right.");
        self.print(&format!("\n  {verdict}"))?;
        self.print(&format!(
            "  {up} frames from the caller, {down} from the agent, lost 0, every sample as sent."
        ))?;
        self.print(&format!(
            "  First word {:.1} ms after the stream opened; barge-in cleared in {:.1} ms; \
             relay {:.2} ms a frame.\n",
            millis(*first_audio),
            millis(*clear),
            millis(*relay),
        ))
    }

    pub fn failure(&self, trouble: &Trouble) -> String {
        match self.step {
            0 => format!("the demo could not begin: {}", trouble.with_log()),
            step => {
                let name = step_name(step);
                format!("step {step} {name} did not come out right: {}", trouble.with_log())
            }
        }
    }

    /// By hand and not by `println!`, which panics when stdout is a pipe whose
    /// reader has left.
    fn print(&mut self, text: &str) -> Result<(), Trouble> {
        writeln!(self.out, "{text}").map_err(|error| Trouble::bare(format!("stdout: {error}")))
    }

    fn paint(&self, colour: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

fn step_name(step: usize) -> &'static str {
    step.checked_sub(1).and_then(|index| STEPS.get(index)).copied().unwrap_or("?")
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1_000.0
}
