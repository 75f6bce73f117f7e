//! What `check` has found, and how it is printed: a line each for a person, one JSON object for a
//! script.
//!
//! A [`Topic`] is the only way to a [`Finding`], and it asks for a cure with everything that is not
//! right, so that no line names a mistake without saying what to do:
//!
//! ```text
//!   const VOICE: Topic = Topic::new("Twilio", "voice");
//!   VOICE.wrong("the number has no Voice URL", "set it: callbridge check --fix")
//! ```
//!
//! Others' words are quoted in findings. None may hold a secret, or steer the reader's terminal;
//! that is seen to here, at the one place where they are printed.

use std::borrow::Cow;
use std::io::{self, IsTerminal as _};

use serde_json::{Value, json};

use super::http::without_logins;
use crate::setup::settings::Config;
use crate::setup::stop::Stop;
use crate::toolbox::log::{harmless, say};
use crate::toolbox::text::counted;

/// What stands in a line of the report. What is longer is cut.
const LINE_CHARS_MAX: usize = 400;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    Ok,
    /// A call would work, but not as well as it could.
    Warning,
    /// A call would not work.
    Wrong,
    /// Not looked at, and why.
    Skipped,
}

/// Whom a line is about, and what was looked at, for scripts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Topic {
    party: &'static str,
    check: Cow<'static, str>,
}

impl Topic {
    pub(super) const fn new(party: &'static str, check: &'static str) -> Topic {
        Topic { party, check: Cow::Borrowed(check) }
    }

    /// One of several of the same kind, such as a voice.
    pub(super) fn named(party: &'static str, check: impl Into<String>) -> Topic {
        Topic { party, check: Cow::Owned(check.into()) }
    }

    pub(super) fn ok(&self, what: impl Into<String>) -> Finding {
        self.at(Level::Ok, what, "")
    }

    pub(super) fn warning(&self, what: impl Into<String>, cure: impl Into<String>) -> Finding {
        self.at(Level::Warning, what, cure)
    }

    pub(super) fn wrong(&self, what: impl Into<String>, cure: impl Into<String>) -> Finding {
        self.at(Level::Wrong, what, cure)
    }

    pub(super) fn skipped(&self, what: impl Into<String>, cure: impl Into<String>) -> Finding {
        self.at(Level::Skipped, what, cure)
    }

    pub(super) fn at(
        &self,
        level: Level,
        what: impl Into<String>,
        cure: impl Into<String>,
    ) -> Finding {
        Finding { topic: self.clone(), level, what: what.into(), cure: cure.into() }
    }
}

/// One line of the report, and what to do about it.
pub(super) struct Finding {
    topic: Topic,
    level: Level,
    pub(super) what: String,
    pub(super) cure: String,
}

impl Finding {
    pub(super) fn is_ok(&self) -> bool {
        self.level == Level::Ok
    }

    pub(super) fn is_about(&self, topic: &Topic) -> bool {
        self.topic == *topic
    }
}

/// How the report is written.
pub(super) struct Printer {
    config: &'static Config,
    colour: bool,
    json: bool,
}

impl Printer {
    pub(super) fn new(config: &'static Config, json: bool) -> Printer {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Printer { config, colour: io::stdout().is_terminal() && !plain, json }
    }

    pub(super) fn lines(&self, findings: &[Finding]) {
        for finding in findings.iter().filter(|_| !self.json) {
            let mut word = format!("{:<8}", finding.level.word());
            if self.colour {
                word = format!("\x1b[{}m{word}\x1b[0m", finding.level.colour());
            }
            let what = printable(self.config, &finding.what);
            say(&format!("  {word} {:<11} {what}\n", finding.topic.party));
            if !finding.cure.is_empty() {
                say(&format!("{:23}-> {}\n", "", printable(self.config, &finding.cure)));
            }
        }
    }

    /// The last word, and with `--json` the only one.
    pub(super) fn conclude(&self, findings: &[Finding]) -> Result<(), Stop> {
        let count = |level| findings.iter().filter(|finding| finding.level == level).count();
        let (wrong, warnings) = (count(Level::Wrong), count(Level::Warning));
        if self.json {
            let findings: Vec<Value> = findings.iter().map(|found| self.as_json(found)).collect();
            say(&format!("{}\n", json!({"ok": wrong == 0, "findings": findings})));
        } else {
            let from = if self.config.is_local { " from the live page" } else { "" };
            say(&match (wrong, warnings) {
                (0, 0) => format!("\nA call{from} would work.\n"),
                (0, _) => {
                    format!("\nA call{from} would work. {}.\n", counted(warnings, "warning"))
                }
                (_, _) => "\n".to_owned(),
            });
        }
        if wrong == 0 {
            return Ok(());
        }
        let things = counted(wrong, "thing");
        Err(Stop::Failed(format!("callbridge: a call would not work: {things} to fix")))
    }

    fn as_json(&self, finding: &Finding) -> Value {
        json!({
            "party": finding.topic.party,
            "check": finding.topic.check,
            "level": finding.level.word(),
            "what": printable(self.config, &finding.what),
            "cure": printable(self.config, &finding.cure),
        })
    }
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Wrong => "wrong",
            Level::Skipped => "skipped",
        }
    }

    /// As terminals number them.
    fn colour(self) -> &'static str {
        match self {
            Level::Ok => "32",
            Level::Warning => "33",
            Level::Wrong => "1;31",
            Level::Skipped => "2",
        }
    }
}

/// Without secrets, in one line of bearable length.
pub(super) fn printable(config: &Config, text: &str) -> String {
    let text = config.hide_secrets(without_logins(text));
    text.chars().map(harmless).take(LINE_CHARS_MAX).collect()
}
