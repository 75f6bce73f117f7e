//! Reads a setting's text, and complains of what it cannot be.
//!
//! One function a kind of value: a number within bounds, an address, a telephone number. Each
//! returns a default or nothing where the text is wrong, and adds a complaint, so that reading goes
//! on and all complaints come together. A complaint quotes what was set, but never a secret, nor an
//! address, which may hold a password. Only `settings` and `agent` ask.

use std::collections::HashMap;
use std::fmt::Display;

use crate::setup::settings::{API_TOKEN_CHARS_MIN, login_in};
use crate::toolbox::failure::Secret;
use crate::toolbox::text::is_e164;

/// `PUBLIC_URL` may be this word: the address of the ngrok tunnel that leads here.
pub(crate) const NGROK: &str = "ngrok";

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
        self.complaints.push(format!("{name}  {what}"));
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

    pub(super) fn parsed<T: std::str::FromStr>(&mut self, name: &str, wanted: &str) -> Option<T> {
        let text = self.text(name)?;
        let value = text.parse().ok();
        if value.is_none() {
            self.complain(name, format_args!("is \"{text}\": must be {wanted}"));
        }
        value
    }

    pub(super) fn one_of<T: Copy>(&mut self, name: &str, choices: &[(&str, T)]) -> T {
        let text = self.text(name);
        let chosen =
            choices.iter().find(|(word, _)| text.as_deref().is_none_or(|text| text == *word));
        if let Some((_, value)) = chosen {
            return *value;
        }
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        self.complain(
            name,
            format_args!(
                "is \"{}\": must be one of {}",
                text.unwrap_or_default(),
                words.join(", ")
            ),
        );
        choices[0].1
    }

    pub(super) fn public_url(&mut self) -> String {
        if self.text("PUBLIC_URL").as_deref() == Some(NGROK) {
            // The tunnel is asked for its address once the port is known.
            return NGROK.into();
        }
        if self.text("PUBLIC_URL").is_none() {
            let where_from =
                "the https:// address of your host or tunnel, where Twilio reaches this";
            self.complain("PUBLIC_URL", format_args!("is missing ({where_from})"));
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

    pub(super) fn api_token(&mut self, name: &str) -> Option<Secret> {
        let text = self.text(name)?;
        if text.len() >= API_TOKEN_CHARS_MIN {
            return Some(Secret(text));
        }
        let least = API_TOKEN_CHARS_MIN;
        self.complain(name, format_args!("is too short: at least {least} random characters"));
        None
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
