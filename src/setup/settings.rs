//! The settings: names, defaults, and what they become.
//!
//! They are read once, from the environment and then from `.env`, and all that is missing or
//! malformed is complained of at once. Behind this a time is a `Duration`, a secret is a `Secret`,
//! and nothing is checked again. A new setting is a name in `SETTINGS`, a field in [`Config`] and a
//! line in `Config::understand`; how a text becomes a value is `values`.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::json;

use crate::setup::dot_env::{self, DOT_ENV};
use crate::setup::values::{MaxCalls, Settings};
use crate::toolbox::failure::Secret;
use crate::toolbox::log::{Level, LogFormat};
use crate::toolbox::text::nearest;

/// `API_TOKEN` and `METRICS_TOKEN`. A shorter one could be guessed.
pub(super) const TOKEN_CHARS_MIN: usize = 16;
const LOG_LEVELS: [(&str, Level); 4] = [
    ("error", Level::Error),
    ("warn", Level::Warn),
    ("info", Level::Info),
    ("debug", Level::Debug),
];
const LOG_FORMATS: [(&str, LogFormat); 2] = [("text", LogFormat::Text), ("json", LogFormat::Json)];
/// Every setting, in the order of `.env.example` and the README.
const SETTINGS: [&str; 33] = [
    "ULTRAVOX_API_KEY",
    "PUBLIC_URL",
    "N8N_WEBHOOK_URL",
    "PORT",
    "COPY_URL",
    "BIND",
    "TWILIO_AUTH_TOKEN",
    "TWILIO_ACCOUNT_SID",
    "TWILIO_PHONE_NUMBER",
    "API_TOKEN",
    "METRICS_TOKEN",
    "OUTGOING_ALLOW",
    "ANSWERING_MACHINE_MESSAGE",
    "FIRST_MESSAGE",
    "AGENT_DIR",
    "DATA_DIR",
    "KEEP_DAYS",
    "ULTRAVOX_MODEL",
    "ULTRAVOX_CORPUS_ID",
    "N8N_HMAC_SECRET",
    "N8N_AUTH_HEADER",
    "FALLBACK_NUMBER",
    "MAX_CALLS",
    "WITHHELD_CALLS_MAX",
    "MAX_CALL_SECONDS",
    "CALLS_PER_NUMBER_PER_HOUR",
    "DRAIN_SECONDS",
    "LOG_LEVEL",
    "LOG_FORMAT",
    "ULTRAVOX_API_URL",
    "TWILIO_API_URL",
    "NGROK_API_URL",
    "SSL_CERT_FILE",
];

/// What the owner has set. Read once; behind this door nothing looks at the environment.
pub(crate) struct Config {
    pub(crate) ultravox_api_key: Secret,
    /// Without a trailing slash: `https://host[:port][/path]`. In local mode the address on this
    /// machine, once that is known.
    pub(crate) public_url: String,
    /// `PUBLIC_URL` is not set: no telephone, only the live page's phone, from this machine.
    pub(crate) is_local: bool,
    pub(crate) n8n_webhook_url: Option<String>,
    pub(crate) port: u16,
    /// Of one copy among several. None: `public_url` leads to this process.
    pub(crate) copy_url: Option<String>,
    pub(crate) bind: IpAddr,
    pub(crate) twilio_auth_token: Option<Secret>,
    pub(crate) twilio_account_sid: Option<String>,
    pub(crate) twilio_phone_number: Option<String>,
    pub(crate) api_token: Option<Secret>,
    /// Reads the figures, and nothing else.
    pub(crate) metrics_token: Option<Secret>,
    /// Beginnings of the numbers that may be rung. None: no outgoing calls.
    pub(crate) outgoing_allow: Vec<String>,
    /// What an answering machine is told. None: it is hung up on.
    pub(crate) answering_machine_message: Option<String>,
    pub(crate) first_message: Option<String>,
    pub(crate) agent_dir: Option<PathBuf>,
    pub(crate) data_dir: PathBuf,
    pub(crate) keep: Duration,
    pub(crate) ultravox_model: String,
    pub(crate) ultravox_corpus_id: Option<String>,
    pub(crate) n8n_hmac_secret: Option<Secret>,
    pub(crate) n8n_auth_header: Option<(String, Secret)>,
    pub(crate) fallback_number: Option<String>,
    pub(crate) max_calls: MaxCalls,
    /// Of these, for callers without a number. None: half of them.
    pub(crate) withheld_calls_max: Option<usize>,
    pub(crate) max_call: Duration,
    pub(crate) calls_per_number_per_hour: usize,
    pub(crate) drain: Duration,
    pub(crate) log_level: Level,
    pub(crate) log_format: LogFormat,
    pub(crate) ultravox_api_url: String,
    pub(crate) twilio_api_url: String,
    pub(crate) ngrok_api_url: String,
    pub(crate) ssl_cert_file: Option<PathBuf>,
}

impl Config {
    /// All complaints at once.
    pub(crate) fn load() -> Result<Config, Vec<String>> {
        let (values, complaints) = settings_in_force();
        Config::from_values(values, complaints)
    }

    pub(crate) fn from_values(
        values: HashMap<String, String>,
        complaints: Vec<String>,
    ) -> Result<Config, Vec<String>> {
        let (config, complaints) = Config::understand(values, complaints);
        if complaints.is_empty() { Ok(config) } else { Err(complaints) }
    }

    /// What is missing or malformed is complained of, and stands at its default.
    pub(crate) fn understand(
        values: HashMap<String, String>,
        complaints: Vec<String>,
    ) -> (Config, Vec<String>) {
        let mut settings = Settings { values, complaints };
        let config = Config {
            ultravox_api_key: Secret(
                settings
                    .required("ULTRAVOX_API_KEY", "get one at app.ultravox.ai, Settings, API keys"),
            ),
            public_url: settings.public_url(),
            is_local: settings.is_local(),
            n8n_webhook_url: settings.url("N8N_WEBHOOK_URL"),
            port: settings.number("PORT", 8_000, 0, u16::MAX),
            copy_url: settings.copy_url(),
            bind: settings.bind(),
            twilio_auth_token: settings.text("TWILIO_AUTH_TOKEN").map(Secret),
            twilio_account_sid: settings.account_sid("TWILIO_ACCOUNT_SID"),
            twilio_phone_number: settings.phone_number("TWILIO_PHONE_NUMBER"),
            api_token: settings.token("API_TOKEN"),
            metrics_token: settings.token_beside("METRICS_TOKEN", "API_TOKEN"),
            outgoing_allow: settings.prefixes("OUTGOING_ALLOW"),
            answering_machine_message: settings.text("ANSWERING_MACHINE_MESSAGE"),
            first_message: settings.text("FIRST_MESSAGE"),
            agent_dir: settings.text("AGENT_DIR").map(PathBuf::from),
            data_dir: PathBuf::from(settings.text("DATA_DIR").unwrap_or_else(|| "data".into())),
            keep: Duration::from_secs(86_400 * settings.number("KEEP_DAYS", 30, 0, 36_500)),
            ultravox_model: settings
                .text("ULTRAVOX_MODEL")
                .unwrap_or_else(|| "ultravox-v0.7".into()),
            ultravox_corpus_id: settings.text("ULTRAVOX_CORPUS_ID"),
            n8n_hmac_secret: settings.text("N8N_HMAC_SECRET").map(Secret),
            n8n_auth_header: settings.header("N8N_AUTH_HEADER"),
            fallback_number: settings.phone_number("FALLBACK_NUMBER"),
            max_calls: settings.max_calls(),
            withheld_calls_max: settings.withheld_calls_max(),
            max_call: Duration::from_secs(settings.number("MAX_CALL_SECONDS", 1_800, 10, 14_400)),
            calls_per_number_per_hour: settings.number("CALLS_PER_NUMBER_PER_HOUR", 20, 1, 100_000),
            drain: Duration::from_secs(settings.number("DRAIN_SECONDS", 300, 0, 14_400)),
            log_level: settings.one_of("LOG_LEVEL", &LOG_LEVELS, Level::Info),
            log_format: settings.one_of("LOG_FORMAT", &LOG_FORMATS, LogFormat::Text),
            ultravox_api_url: settings
                .url("ULTRAVOX_API_URL")
                .unwrap_or_else(|| "https://api.ultravox.ai".into()),
            twilio_api_url: settings
                .url("TWILIO_API_URL")
                .unwrap_or_else(|| "https://api.twilio.com".into()),
            ngrok_api_url: settings
                .url("NGROK_API_URL")
                .unwrap_or_else(|| "http://127.0.0.1:4040".into()),
            ssl_cert_file: settings.text("SSL_CERT_FILE").map(PathBuf::from),
        };
        (config, settings.complaints)
    }
}

/// The environment first, then `.env`. With it, what could not be read.
pub(crate) fn settings_in_force() -> (HashMap<String, String>, Vec<String>) {
    let (mut values, mut complaints) = dot_env::read(Path::new(DOT_ENV));
    for name in SETTINGS {
        match std::env::var(name) {
            Ok(value) => drop(values.insert(name.to_owned(), value)),
            Err(std::env::VarError::NotPresent) => {}
            Err(std::env::VarError::NotUnicode(_)) => {
                complaints.push(format!("{name}  is not readable text"));
            }
        }
    }
    complaints.extend(misspelt(&values));
    (values, complaints)
}

/// Names in `.env` that are nearly ours. Others may be there for other programs, and so may one
/// that is nearly ours if the right one is there too.
fn misspelt(values: &HashMap<String, String>) -> Vec<String> {
    let unknown = values.keys().filter(|name| !SETTINGS.contains(&name.as_str()));
    let mut complaints: Vec<String> = unknown
        .filter_map(|name| {
            let meant = nearest(name, SETTINGS).filter(|meant| !values.contains_key(*meant))?;
            Some(format!(".env  has {name}, which is no setting ({meant} is meant)"))
        })
        .collect();
    complaints.sort();
    complaints
}

/// Names that are set differently in the environment, which wins, and in `.env`.
pub(crate) fn set_twice() -> Vec<&'static str> {
    let (values, _) = dot_env::read(Path::new(DOT_ENV));
    let differs = |name: &&str| {
        let outside = std::env::var(name);
        outside.is_ok_and(|outside| values.get(*name).is_some_and(|inside| *inside != outside))
    };
    SETTINGS.into_iter().filter(differs).collect()
}

impl Config {
    /// `WITHHELD_CALLS_MAX`, or half of `MAX_CALLS` as it is now.
    pub(crate) fn withheld_calls(&self) -> usize {
        self.withheld_calls_max.unwrap_or(self.max_calls.get().div_ceil(2))
    }

    /// Where what belongs to a call of this process must come back to.
    pub(crate) fn own_url(&self) -> &str {
        self.copy_url.as_deref().unwrap_or(&self.public_url)
    }

    /// A setting of Twilio's is there, so a number is meant to ring.
    pub(crate) fn has_telephone(&self) -> bool {
        self.twilio_auth_token.is_some()
            || self.twilio_account_sid.is_some()
            || self.twilio_phone_number.is_some()
    }

    /// What others answer may quote what we have sent them, as it is or in JSON.
    pub(crate) fn hide_secrets(&self, text: String) -> String {
        let header = self.n8n_auth_header.as_ref().map(|(_, value)| value);
        let optional =
            [&self.twilio_auth_token, &self.api_token, &self.metrics_token, &self.n8n_hmac_secret]
                .map(Option::as_ref);
        let secrets = optional.into_iter().chain([header, Some(&self.ultravox_api_key)]).flatten();
        let mut forms: Vec<String> = secrets.map(|secret| secret.reveal().to_owned()).collect();
        // The user and password of an address are sent as Basic authentication.
        let login = self.n8n_webhook_url.as_deref().and_then(login_in);
        forms.extend(login.map(|login| BASE64.encode(login)));
        let in_json = |form: &String| {
            let quoted = json!(form).to_string();
            quoted.get(1..quoted.len() - 1).map(str::to_owned)
        };
        forms.extend(forms.iter().filter_map(in_json).collect::<Vec<_>>());
        // A key that is missing, which only `check` goes on from, stands everywhere in a text.
        forms.retain(|form| !form.is_empty() && text.contains(form));
        // One secret may be the beginning of another.
        forms.sort_by_key(|form| std::cmp::Reverse(form.len()));
        forms.iter().fold(text, |text, form| text.replace(form, "***"))
    }
}

/// `user:password` of an address, if it has one.
pub(super) fn login_in(url: &str) -> Option<&str> {
    url.split('/').nth(2)?.rsplit_once('@').map(|(login, _)| login)
}

#[cfg(test)]
mod tests;
