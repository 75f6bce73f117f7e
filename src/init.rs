//! The verb `callbridge init`: the first minute of whoever has nothing yet.
//!
//! It writes `.env`, which is `.env.example` with a random `API_TOKEN` and, if somebody types it at
//! the terminal, the Ultravox key; and `my-agent/`, a small agent of an invented shop, to be
//! changed. Then it says what to do next.
//!
//! What is there already is never overwritten, not even partly: it is named and left as it is. Only
//! the owner can read `.env`. Nobody is asked over the network.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use crate::setup::stop::Stop;
use crate::toolbox::log::say;
use crate::toolbox::random::random_hex;
use crate::usage::{ask_person, options};

const HELP: &str = "\
callbridge init: writes the files to begin with, in this directory.

  .env        the settings, with a comment each; asks for the Ultravox key
  my-agent/   an agent of your own to change: agent.json and a prompt

  What is there already is left as it is.

usage: callbridge init [--yes]

  --yes   does not ask; the key is to be filled in afterwards
";
const ENV: &str = ".env";
const ENV_EXAMPLE: &str = include_str!("../.env.example");
const ENV_TITLE: &str = "\
# Settings of callbridge, read from the directory in which it is started. A variable of the
# environment wins over the same name here.
";
const AGENT_DIR: &str = "my-agent";
const AGENT_FILES: [(&str, &str); 2] =
    [("agent.json", include_str!("init/agent.json")), ("shop.md", include_str!("init/shop.md"))];

pub(crate) fn run(words: &[&str]) -> Result<(), Stop> {
    let Some(given) = options("init", HELP, &["--yes"], words)? else { return Ok(()) };
    let place = Path::new("");
    let is_new = !place.join(ENV).exists();
    let key = if is_new && given.is_empty() { ask_for_key() } else { String::new() };
    let written = write_env(place, &key)
        .and_then(|env| Ok((env, write_agent(place)?)))
        .map_err(|error| Stop::Failed(format!("callbridge: {error}")))?;
    say(&what_next(written, !key.is_empty() || std::env::var_os("ULTRAVOX_API_KEY").is_some()));
    Ok(())
}

/// Nothing, if there is no terminal or it is to be filled in later.
fn ask_for_key() -> String {
    let mut question =
        "Ultravox API key (from app.ultravox.ai, Settings, API keys; Enter: later): ";
    loop {
        let key = ask_person(question).unwrap_or_default();
        if key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte)) {
            return key;
        }
        question = "That has a character that no key has. Once more (Enter: later): ";
    }
}

/// Whether it was written: not if there is one.
fn write_env(place: &Path, key: &str) -> io::Result<bool> {
    let token = random_hex();
    let mut text = ENV_TITLE.to_owned();
    // Its first two lines say how to copy it.
    for line in ENV_EXAMPLE.lines().skip(2) {
        match line {
            "ULTRAVOX_API_KEY=" => text.extend([line, key]),
            "# API_TOKEN=" => text.extend(["API_TOKEN=", &token]),
            "# AGENT_DIR=" => text.extend(["AGENT_DIR=", AGENT_DIR]),
            line => text.push_str(line),
        }
        text.push('\n');
    }
    let mut options = File::options();
    match options.write(true).create_new(true).mode(0o600).open(place.join(ENV)) {
        Ok(mut file) => file.write_all(text.as_bytes()).map(|()| true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(io::Error::other(format!("{ENV} cannot be written: {error}"))),
    }
}

/// The same for the directory, which is written as a whole or not at all.
fn write_agent(place: &Path) -> io::Result<bool> {
    let directory = place.join(AGENT_DIR);
    match fs::create_dir(&directory) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
        Err(error) => {
            return Err(io::Error::other(format!("{AGENT_DIR} cannot be made: {error}")));
        }
    }
    for (name, text) in AGENT_FILES {
        fs::write(directory.join(name), text)?;
    }
    Ok(true)
}

fn what_next((env, agent): (bool, bool), has_key: bool) -> String {
    let mut text = String::new();
    text.push_str(if env {
        "  .env        written; only you can read it, and API_TOKEN in it is random\n"
    } else {
        "  .env        is there already: left as it is\n"
    });
    text.push_str(if agent {
        "  my-agent/   written: Robin, the assistant of an invented bicycle shop\n"
    } else {
        "  my-agent/   is there already: left as it is\n"
    });
    text.push_str("\nWhat to do next:\n");
    let mut steps = Vec::new();
    if env && !has_key {
        steps.push(
            "put your key after ULTRAVOX_API_KEY= in .env (app.ultravox.ai, Settings, API keys)",
        );
    }
    if agent && !env {
        steps.push("set AGENT_DIR=my-agent in .env");
    }
    steps.extend([
        "start callbridge with no command (from a checkout: cargo run --release), and open \
         http://localhost:8000/",
        "change my-agent/shop.md: what the agent knows and how it speaks",
        "for a telephone, see \"Ring a phone\" in the README",
    ]);
    for (number, step) in (1..).zip(steps) {
        text.extend(["  ", &number.to_string(), ". ", step, "\n"]);
    }
    text
}

#[cfg(test)]
mod tests;
