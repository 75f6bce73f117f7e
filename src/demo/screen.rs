//! The screen of `callbridge demo`: steps, quotes, the transcript and the totals, as they
//! happen.
//!
//! Colours and a picture in a terminal (unless `NO_COLOR` is set), plain lines elsewhere, so
//! that the output can be kept in a file. It prints what [`script`](super::script) tells it and
//! decides nothing, but it remembers which step is in progress: a failure is blamed on that.
//!
//! It never panics when the reader of a pipe has left; that is a [`Trouble`] like any other.

use std::io::{self, IsTerminal as _, Write as _};
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
pub(super) struct Show {
    colours: bool,
    /// Time zero: the ring.
    curtain: Instant,
    /// The step in progress, which a failure is blamed on.
    step: usize,
}

impl Show {
    pub(super) fn new() -> Show {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Show { colours: io::stdout().is_terminal() && wanted, curtain: Instant::now(), step: 0 }
    }

    pub(super) fn title(&self) -> Result<(), Trouble> {
        let title = self.paint("1", "callbridge demo");
        print_line(&format!(
            "\n  {title}  one whole call. The bridge is real, the world is pretended."
        ))?;
        if self.colours {
            let bridge = self.paint("1;36", "callbridge");
            print_line(&format!("\n  caller ─── Twilio ═══ {bridge} ═══ Ultravox"))?;
            print_line("                            │\n                           n8n")?;
        }
        print_line(&self.paint("2", "\n      ms  step"))
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
        print_line(&format!("{millis}  {label}  {sentence}"))
    }

    pub(super) fn quote(&self, name: &str, text: &str) -> Result<(), Trouble> {
        let text = self.paint("32", &format!("{name}: \"{text}\""));
        print_line(&format!("{:22}{text}", ""))
    }

    pub(super) fn transcript(&self, transcript: &str) -> Result<(), Trouble> {
        print_line(&format!("\n  {}", self.paint("1", "Transcript, as n8n has it")))?;
        for line in transcript.lines() {
            let (speaker, text) = line.split_once(": ").unwrap_or(("", line));
            let speaker = self.paint("1", &format!("{speaker:<6}"));
            print_line(&format!("  {speaker} {text}"))?;
        }
        Ok(())
    }

    pub(super) fn totals(&self, totals: &Totals) -> Result<(), Trouble> {
        let Totals { up, down, first_audio, clear, relay } = totals;
        let verdict = self.paint("1;32", "All nine steps came out right.");
        print_line(&format!("\n  {verdict}"))?;
        print_line(&format!(
            "  {up} frames from the caller, {down} from the agent, lost 0, every sample as sent."
        ))?;
        print_line(&format!(
            "  First word {:.1} ms after the stream opened; barge-in cleared in {:.1} ms; \
             relay {:.2} ms a frame.\n",
            millis(*first_audio),
            millis(*clear),
            millis(*relay),
        ))
    }

    pub(super) fn failure(&self, trouble: &Trouble) -> String {
        match self.step {
            0 => format!("the demo could not begin: {}", trouble.with_log()),
            step => {
                let name = step_name(step);
                format!("step {step} {name} did not come out right: {}", trouble.with_log())
            }
        }
    }

    fn paint(&self, colour: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// By hand and not by `println!`, which panics when stdout is a pipe whose
/// reader has left.
fn print_line(text: &str) -> Result<(), Trouble> {
    writeln!(io::stdout(), "{text}").map_err(|error| Trouble::bare(format!("stdout: {error}")))
}

fn step_name(step: usize) -> &'static str {
    step.checked_sub(1).and_then(|index| STEPS.get(index)).copied().unwrap_or("?")
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1_000.0
}
