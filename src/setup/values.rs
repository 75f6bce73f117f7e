//! Reads a setting's text, and complains of what it cannot be.
//!
//! One function a kind of value: a number within bounds, an address, a telephone number. Each
//! returns a default or nothing where the text is wrong, and adds a complaint, so that reading goes
//! on and all complaints come together. A complaint quotes what was set, but never a secret, nor an
//! address, which may hold a password. Only `settings` and `agent` ask.

use std::collections::HashMap;
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::setup::settings::{TOKEN_CHARS_MIN, login_in};
use crate::toolbox::failure::Secret;
use crate::toolbox::text::is_e164;

/// `PUBLIC_URL` may be this word: the address of the ngrok tunnel that leads here.
pub(crate) const NGROK: &str = "ngrok";

/// Lines, where neither `MAX_CALLS` nor the account says otherwise.
const MAX_CALLS: usize = 50;
const MAX_CALLS_MOST: usize = 10_000;

/// Calls at the same time: `MAX_CALLS`, or else what the Ultravox account allows, once it is asked.
pub(crate) struct MaxCalls {
    set: Option<usize>,
    allowed: AtomicUsize,
}

impl MaxCalls {
    pub(crate) fn get(&self) -> usize {
        self.set.unwrap_or_else(|| self.allowed.load(Ordering::Relaxed))
    }

    pub(crate) fn is_set(&self) -> bool {
        self.set.is_some()
    }

    /// Whether that is news, and counts.
    pub(crate) fn account_allows(&self, calls: u64) -> bool {
        let calls = usize::try_from(calls).unwrap_or(MAX_CALLS_MOST).clamp(1, MAX_CALLS_MOST);
        self.allowed.swap(calls, Ordering::Relaxed) != calls && self.set.is_none()
    }
}

/// The raw texts of the settings, and what is wrong with them so far.
pub(super) struct Settings {
    pub(super) values: HashMap<String, String>,
    pub(super) complaints: Vec<String>,
}

impl Settings {
    pub(super) fn required(&mut self, name: &str, where_from: &str) -> String {
        let text = self.text(name).unwrap_or_default();
        if text.is_empty() {
            self.complain(name, format_args!("is missing ({where_from})"));
        } else if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            self.complain(name, format_args!("has a character that no key has ({where_from})"));
        }
        text
    }

    fn complain(&mut self, name: &str, what: impl Display) {
        // What a line of `.env` says to nobody is not its value either.
        let is_lost = format!("{name}  in line ");
        if !self.complaints.iter().any(|complaint| complaint.starts_with(&is_lost)) {
            self.complaints.push(format!("{name}  {what}"));
        }
    }

    /// `NAME=` in `.env.example` means "not set", so an empty value is none.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        self.values.get(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    pub(super) fn number<T>(&mut self, name: &str, default: T, least: T, most: T) -> T
    where
        T: std::str::FromStr + PartialOrd + Display + Copy,
    {
        let wanted = format!("a whole number from {least} to {most}");
        match self.parsed(name, &wanted) {
            None => default,
            Some(number) if number >= least && number <= most => number,
            Some(number) => {
                self.complain(name, format_args!("is {number}: must be {wanted}"));
                default
            }
        }
    }

    pub(super) fn max_calls(&mut self) -> MaxCalls {
        let is_set = self.text("MAX_CALLS").is_some();
        let number = self.number("MAX_CALLS", MAX_CALLS, 1, MAX_CALLS_MOST);
        MaxCalls { set: is_set.then_some(number), allowed: AtomicUsize::new(MAX_CALLS) }
    }

    pub(super) fn parsed<T: std::str::FromStr>(&mut self, name: &str, wanted: &str) -> Option<T> {
        let text = self.text(name)?;
        let value = text.parse().ok();
        if value.is_none() {
            self.complain(name, format_args!("is \"{text}\": must be {wanted}"));
        }
        value
    }

    pub(super) fn one_of<T: Copy>(&mut self, name: &str, choices: &[(&str, T)], default: T) -> T {
        let Some(text) = self.text(name) else { return default };
        if let Some((_, value)) = choices.iter().find(|(word, _)| text == *word) {
            return *value;
        }
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        self.complain(name, format_args!("is \"{text}\": must be one of {}", words.join(", ")));
        default
    }

    pub(super) fn public_url(&mut self) -> String {
        if self.text("PUBLIC_URL").as_deref() == Some(NGROK) {
            // The tunnel is asked for its address once the port is known.
            return NGROK.into();
        }
        self.address_of_ours("PUBLIC_URL").unwrap_or_default()
    }

    pub(super) fn copy_url(&mut self) -> Option<String> {
        self.address_of_ours("COPY_URL")
    }

    /// An address that Twilio calls.
    fn address_of_ours(&mut self, name: &str) -> Option<String> {
        let url = self.url(name)?;
        if login_in(&url).is_some() {
            // It would be printed, and strangers could try out what `/health` signs with it.
            self.complain(
                name,
                "must not have a user name or password: Twilio signs the address without them",
            );
            return None;
        }
        if url.starts_with("http://") {
            self.complain(
                name,
                format_args!("is \"{url}\": must be https, or Twilio cannot open the audio socket"),
            );
        }
        if url.contains(['?', '#']) {
            self.complain(name, format_args!("is \"{url}\": must not have a ? or #"));
        }
        Some(url)
    }

    /// Local mode asks nobody for a password, so it listens on this machine alone.
    pub(super) fn bind(&mut self) -> IpAddr {
        let address = self.parsed("BIND", "an IP address such as 0.0.0.0");
        if !self.is_local() {
            return address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        }
        match address {
            Some(address) if !address.is_loopback() => {
                let must = "must be 127.0.0.1 or ::1 while PUBLIC_URL is not set (local mode)";
                self.complain("BIND", format_args!("is \"{address}\": {must}"));
            }
            Some(address) => return address,
            None => {}
        }
        IpAddr::V4(Ipv4Addr::LOCALHOST)
    }

    pub(super) fn is_local(&self) -> bool {
        self.text("PUBLIC_URL").is_none()
    }

    pub(super) fn url(&mut self, name: &str) -> Option<String> {
        let text = self.text(name)?;
        let web = text.starts_with("https://") || text.starts_with("http://");
        match text.parse::<tungstenite::http::Uri>() {
            Ok(uri) if web && uri.host().is_some_and(|host| !host.is_empty()) => {
                Some(text.trim_end_matches('/').to_owned())
            }
            // Not quoted: it may hold a password.
            _ => {
                self.complain(name, "must be an address that starts with https:// or http://");
                None
            }
        }
    }

    pub(super) fn header(&mut self, name: &str) -> Option<(String, Secret)> {
        let text = self.text(name)?;
        let pair = text
            .split_once(':')
            .map(|(header, value)| (header.trim().to_owned(), value.trim().to_owned()));
        match pair {
            Some((header, value))
                if tungstenite::http::HeaderName::from_bytes(header.as_bytes()).is_ok()
                    && tungstenite::http::HeaderValue::from_str(&value).is_ok()
                    && !value.is_empty() =>
            {
                Some((header, Secret(value)))
            }
            _ => {
                self.complain(name, "must be \"Name: value\", as in n8n's Header Auth");
                None
            }
        }
    }

    pub(super) fn withheld_calls_max(&mut self) -> Option<usize> {
        const NAME: &str = "WITHHELD_CALLS_MAX";
        let is_set = self.text(NAME).is_some();
        is_set.then(|| self.number(NAME, 0, 0, MAX_CALLS_MOST))
    }

    pub(super) fn phone_number(&mut self, name: &str) -> Option<String> {
        let text = self.text(name)?;
        if is_e164(&text) {
            return Some(text);
        }
        self.complain(name, format_args!("is \"{text}\": must be a number such as +4930123456"));
        None
    }

    pub(super) fn account_sid(&mut self, name: &str) -> Option<String> {
        let text = self.text(name)?;
        let plain = text.len() == 34 && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if plain && text.starts_with("AC") {
            return Some(text);
        }
        self.complain(name, "must be AC and 32 more characters (Twilio's console shows it)");
        None
    }

    pub(super) fn token(&mut self, name: &str) -> Option<Secret> {
        let text = self.text(name)?;
        if text.len() < TOKEN_CHARS_MIN {
            let least = TOKEN_CHARS_MIN;
            self.complain(name, format_args!("is too short: at least {least} random characters"));
            return None;
        }
        if is_easily_guessed(&text) {
            self.complain(
                name,
                "is too easy to guess: it repeats or counts (openssl rand -hex 16 makes one)",
            );
            return None;
        }
        Some(Secret(text))
    }

    /// Whoever has this one is not to have the other.
    pub(super) fn token_beside(&mut self, name: &str, other: &str) -> Option<Secret> {
        let token = self.token(name)?;
        if self.text(other).is_some_and(|other| other == token.reveal()) {
            self.complain(name, format_args!("is the same as {other} (take another one)"));
            return None;
        }
        Some(token)
    }

    pub(super) fn prefixes(&mut self, name: &str) -> Vec<String> {
        let text = self.text(name).unwrap_or_default();
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let (good, bad): (Vec<&str>, Vec<&str>) = parts.partition(|part| {
            let digits = part.strip_prefix('+').unwrap_or_default();
            !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
        });
        for part in bad {
            self.complain(name, format_args!("has \"{part}\": must be like +49,+4420"));
        }
        good.into_iter().map(str::to_owned).collect()
    }
}

/// Few different characters, words that come again, or counting.
fn is_easily_guessed(token: &str) -> bool {
    /// Of 16 random digits as good as all have this many surprises.
    const SURPRISES_MIN: usize = 12;
    let text = token.to_lowercase().into_bytes();
    let repeats = (1..=text.len() / 2).any(|length| text.ends_with(&text[..text.len() - length]));
    let step = |at: usize| i16::from(text[at]) - i16::from(text[at - 1]);
    let comes_as_expected = |at: usize| {
        let was_there = at > 0 && text[..at].windows(2).any(|pair| pair == &text[at - 1..=at]);
        let goes_on = at > 1 && step(at).abs() <= 1 && step(at) == step(at - 1);
        was_there || goes_on
    };
    let surprises = (0..text.len()).filter(|&at| !comes_as_expected(at)).count();
    repeats || surprises < SURPRISES_MIN
}
