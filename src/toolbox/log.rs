//! The log: one line an event, on standard error, in text or as JSON.
//!
//! A line names the call it is about, the step in which it happens, and how long that took:
//!
//! ```text
//! 12:04:31.207 CA9f3c 3 agent    Ultravox call 7c21 ready after 412 ms
//! ```
//!
//! Everybody writes it with `log!`. No line holds what was said in a call or a whole telephone
//! number, none can be continued or coloured by what others have sent, and a log that cannot be
//! written, or that nobody reads, stops no call (`writer`).

mod strangers;
mod writer;

use std::fmt::{self, Display};
use std::io::{self, Write as _};
use std::sync::OnceLock;
use std::{panic, thread};

use serde_json::json;

pub(crate) use strangers::{log_refusal, log_stranger};
pub(crate) use writer::flush;

use crate::toolbox::metrics::LOG_LINES;
use crate::toolbox::text::{is_e164, shorten, shorten_number};

/// The nine steps. The log, the banners of main.rs, the README and the demo use the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Bridge = 0,
    Ring = 1,
    Greeting = 2,
    Agent = 3,
    Answer = 4,
    Stream = 5,
    Talk = 6,
    Act = 7,
    Goodbye = 8,
    After = 9,
}

/// One line in the log: `log!(Warn, "…")` for the bridge, `log!(call, Warn, Talk, "…")` for a
/// call. Behind a semicolon stand the variables that `LOG_FORMAT=json` shows as fields as well. It
/// stands here because Rust wants a macro before its first use.
macro_rules! log {
    ($level:ident, $text:literal $(, $value:expr)* $(,)? $(; $($fact:ident),+)?) => {
        $crate::toolbox::log::write_log(
            $crate::toolbox::log::Level::$level,
            &$crate::toolbox::log::About { sid: None, step: $crate::toolbox::log::Step::Bridge },
            format_args!($text $(, $value)*),
            &[$($((stringify!($fact), &$fact as &dyn ::std::fmt::Display)),+)?],
        )
    };
    (
        $call:expr, $level:ident, $step:ident,
        $text:literal $(, $value:expr)* $(,)? $(; $($fact:ident),+)?
    ) => {
        $crate::toolbox::log::write_log(
            $crate::toolbox::log::Level::$level,
            &$crate::toolbox::log::About {
                sid: Some(&*$call.sid),
                step: $crate::toolbox::log::Step::$step,
            },
            format_args!($text $(, $value)*),
            &[$($((stringify!($fact), &$fact as &dyn ::std::fmt::Display)),+)?],
        )
    };
}
pub(crate) use log;

/// A line in the log. What is longer is cut.
pub(crate) const LOG_CHARS_MAX: usize = 1_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub(crate) enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

static LOG: OnceLock<(Level, LogFormat)> = OnceLock::new();

pub(crate) fn log_as(level: Level, format: LogFormat) {
    if LOG.set((level, format)).is_err() {
        // Settings are read once.
    }
}

/// For a server: nobody waits for the log any more, and a panic gets a line in it.
pub(crate) fn log_aside() {
    writer::start();
    panic::set_hook(Box::new(|panic| {
        let thread = thread::current();
        log!(Error, "thread {} {panic}", thread.name().unwrap_or("without a name"));
    }));
}

/// What a line is about: a call, if any, and the step it is in.
pub(crate) struct About<'a> {
    pub(crate) sid: Option<&'a str>,
    pub(crate) step: Step,
}

/// Stands in for a call in `log!`, where there is no call, or not yet.
pub(crate) struct Sid<'a> {
    pub(crate) sid: &'a str,
}

pub(crate) fn write_log(
    level: Level,
    about: &About,
    what: fmt::Arguments,
    facts: &[(&str, &dyn Display)],
) {
    if let Some(line) = line(level, about, what, facts) {
        writer::put(line);
    }
}

/// `12:04:31.207 CA9f3c 3 agent    Ultravox call 7c21 ready after 412 ms`, if it is wanted.
fn line(
    level: Level,
    about: &About,
    what: fmt::Arguments,
    facts: &[(&str, &dyn Display)],
) -> Option<String> {
    match level {
        Level::Error => LOG_LINES.of(&["error"]).add(),
        Level::Warn => LOG_LINES.of(&["warn"]).add(),
        Level::Info | Level::Debug => {}
    }
    let (most, format) = LOG.get().copied().unwrap_or((Level::Info, LogFormat::Text));
    if level > most {
        return None;
    }
    let now = jiff::Zoned::now();
    let (number, word) = (about.step as u8, format!("{:?}", about.step).to_lowercase());
    let what = presentable(&what.to_string());
    Some(match format {
        LogFormat::Text => {
            let label = match level {
                Level::Error => "error: ",
                Level::Warn => "warning: ",
                Level::Info | Level::Debug => "",
            };
            format!(
                "{} {:<6} {number} {word:<8} {label}{what}\n",
                now.strftime("%H:%M:%S%.3f"),
                about.sid.map_or("-", shorten)
            )
        }
        LogFormat::Json => {
            let mut line = json!({
                "time": now.strftime("%Y-%m-%dT%H:%M:%S%.3f%:z").to_string(),
                "level": format!("{level:?}").to_lowercase(),
                "call": about.sid,
                "step": number,
                "stepName": word,
                "message": what,
            });
            for (name, fact) in facts {
                let fact = presentable(&fact.to_string());
                line[name] =
                    fact.parse::<u64>().map_or_else(|_| json!(fact), |number| json!(number));
            }
            format!("{line}\n")
        }
    })
}

/// What others have sent may be quoted in a line. It must not begin a line of its own, steer the
/// reader's terminal, hold a number that somebody could call, or go on for ever.
pub(crate) fn presentable(text: &str) -> String {
    let mut presentable = String::with_capacity(text.len().min(LOG_CHARS_MAX));
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('+') {
        let digits = after.bytes().take_while(u8::is_ascii_digit).count();
        let (number, behind) = after.split_at(digits);
        let number = format!("+{number}");
        presentable.push_str(before);
        presentable.push_str(&if is_e164(&number) { shorten_number(&number) } else { number });
        rest = behind;
    }
    presentable.push_str(rest);
    presentable.chars().map(harmless).take(LOG_CHARS_MAX).collect()
}

/// Unicode has line ends and changes of direction that do not count as control characters.
pub(crate) fn harmless(c: char) -> char {
    let steers = matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    if c.is_control() || steers { ' ' } else { c }
}

/// For `--help` and `--version`: what was asked for goes to standard output.
pub(crate) fn say(text: &str) {
    if io::stdout().write_all(text.as_bytes()).is_err() {
        // Nobody listens.
    }
}

/// Behind what has been logged, and for a server its last word.
pub(crate) fn complain(text: &str) {
    complain_raw(&format!("{}\n", text.trim_end()));
    flush();
}

pub(crate) fn complain_raw(text: &str) {
    writer::put(text.to_owned());
}
