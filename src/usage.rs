//! The command line: how options are read, and what is said of a word that nobody knows.
//!
//! `main` knows the verbs; what is none goes to [`answer`]. Each verb has its own help, and reads
//! its options with [`options`], so that `--help` and a slip are answered alike everywhere:
//!
//! ```text
//! let given = options("outbox", HELP, &["--retry"], words)?;
//! ```
//!
//! A question to a person is asked with [`ask_person`], and only at a terminal. How a verb has
//! ended is said, and made a status of, by [`exit_code`]. Nothing here does anything.

use std::io::{self, BufRead as _, IsTerminal as _};
use std::process::ExitCode;

use crate::setup::stop::Stop;
use crate::toolbox::log::{complain, say};
use crate::toolbox::text::nearest;

const USAGE: &str = if cfg!(feature = "demo") {
    concat!(include_str!("usage.txt"), include_str!("demo/usage.txt"))
} else {
    include_str!("usage.txt")
};

/// As in `main`, and what `answer` knows.
const WORDS: [&str; 10] = [
    "check",
    "demo",
    "diagram",
    "forget",
    "init",
    "outbox",
    "workflow",
    "help",
    "--help",
    "--version",
];

/// What the shell is told, after the person has been.
pub(crate) fn exit_code(outcome: Result<(), Stop>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Stop::Failed(text)) => {
            complain(&text);
            ExitCode::FAILURE
        }
        Err(Stop::Misused(text)) => {
            complain(&text);
            ExitCode::from(2)
        }
    }
}

/// The words of a command line, `help check` in the order in which `check` knows it.
pub(crate) fn words(arguments: &[String]) -> Vec<&str> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["help", verb] => vec![*verb, "--help"],
        _ => words,
    }
}

/// The words of a command line that names no verb.
pub(crate) fn answer(words: &[&str]) -> Result<(), Stop> {
    match words {
        ["--help" | "-h" | "help"] => say(USAGE),
        ["--version" | "-V"] => say(concat!("callbridge ", env!("CARGO_PKG_VERSION"), "\n")),
        ["demo", ..] => {
            return Err(Stop::Misused(
                "callbridge: this program was built without the demo (cargo feature `demo`)".into(),
            ));
        }
        _ => {
            let first = words.first().copied().unwrap_or_default();
            let meant = match nearest(first, WORDS) {
                Some(word) if word != first => format!(" (did you mean callbridge {word}?)"),
                _ => String::new(),
            };
            let what = words.join(" ");
            return Err(Stop::Misused(format!(
                "callbridge: what is \"{what}\"?{meant}\n\n{USAGE}"
            )));
        }
    }
    Ok(())
}

/// The options that were given, all of them known. None: help was asked for, and has been given.
pub(crate) fn options<'a>(
    verb: &str,
    help: &str,
    known: &[&str],
    words: &[&'a str],
) -> Result<Option<Vec<&'a str>>, Stop> {
    if words.iter().any(|word| matches!(*word, "--help" | "-h")) {
        say(help);
        return Ok(None);
    }
    match words.iter().find(|word| !known.contains(word)) {
        None => Ok(Some(words.to_vec())),
        Some(word) => {
            let meant = nearest(word, known.iter().copied())
                .map(|meant| format!(" (did you mean {meant}?)"));
            let what = format!("unknown option \"{word}\"{}", meant.unwrap_or_default());
            Err(misused(verb, help, &what))
        }
    }
}

pub(crate) fn misused(verb: &str, help: &str, what: &str) -> Stop {
    Stop::Misused(format!("callbridge {verb}: {what}\n\n{help}"))
}

/// What a person answers. None: there is no terminal to ask at.
pub(crate) fn ask_person(question: &str) -> Option<String> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return None;
    }
    say(question);
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).ok()?;
    Some(answer.trim().to_owned())
}

/// Only a clear yes is one.
pub(crate) fn is_yes(answer: &str) -> bool {
    matches!(answer, "y" | "Y" | "yes")
}
