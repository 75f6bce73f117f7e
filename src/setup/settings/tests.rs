//! The settings: what is enough, what each value means, and what is said of a wrong one.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::json;

use crate::setup::settings::{Config, SETTINGS};
use crate::testing::settings;
use crate::toolbox::log::{Level, LogFormat};
use crate::toolbox::random::random_hex;

fn complaints(pairs: &[(&str, &str)]) -> Vec<String> {
    settings(pairs).err().unwrap_or_default()
}

#[test]
fn two_settings_are_enough() {
    let config = settings(&[]).ok().unwrap();
    assert_eq!(config.ultravox_api_key.reveal(), "key-1");
    assert_eq!(config.public_url, "https://bridge.example");
    assert_eq!(config.port, 8_000);
    assert_eq!(config.bind, IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    assert_eq!(config.data_dir, Path::new("data"));
    assert_eq!(config.keep, Duration::from_hours(30 * 24));
    assert_eq!(config.ultravox_model, "ultravox-v0.7");
    assert_eq!(config.ultravox_api_url, "https://api.ultravox.ai");
    assert_eq!((config.max_calls.get(), config.withheld_calls_max), (50, None));
    assert_eq!(config.calls_per_number_per_hour, 20);
    assert_eq!(config.max_call, Duration::from_mins(30));
    assert_eq!((config.log_level, config.log_format), (Level::Info, LogFormat::Text));
    assert!(config.n8n_webhook_url.is_none());
    assert!(config.twilio_auth_token.is_none());
    assert!(config.first_message.is_none());
    assert!(config.agent_dir.is_none());
    assert!(config.ultravox_corpus_id.is_none());
    assert!(config.n8n_hmac_secret.is_none());
    assert!(config.n8n_auth_header.is_none());
    assert!(config.fallback_number.is_none());
    assert!(config.api_token.is_none());
    assert!(config.outgoing_allow.is_empty(), "no outgoing calls unless they are wanted");
    assert!(config.ssl_cert_file.is_none());
}

#[test]
fn without_an_address_it_is_local_mode() {
    let local = |bind| settings(&[("PUBLIC_URL", " "), ("BIND", bind)]);
    let config = local("").ok().unwrap();
    assert!(config.is_local);
    assert_eq!(config.bind, IpAddr::V4(Ipv4Addr::LOCALHOST));
    assert_eq!(local("::1").ok().unwrap().bind.to_string(), "::1");
    assert!(!settings(&[]).ok().unwrap().is_local);
    let complaints = local("0.0.0.0").err().unwrap();
    assert!(complaints[0].starts_with("BIND  is \"0.0.0.0\": must be 127.0.0.1"), "{complaints:?}");
}

#[test]
fn an_empty_value_means_not_set() {
    let blank: Vec<(&str, &str)> = SETTINGS
        .into_iter()
        .filter(|name| !["ULTRAVOX_API_KEY", "PUBLIC_URL"].contains(name))
        .flat_map(|name| [(name, ""), (name, "  \t")])
        .collect();
    let config = settings(&blank).ok().unwrap();
    assert_eq!(config.port, 8_000);
    assert!(config.twilio_auth_token.is_none(), "an empty token would be a known key");
    assert!(config.n8n_hmac_secret.is_none());
    assert_eq!(config.data_dir, Path::new("data"));
}

#[test]
fn values_are_read_as_they_were_meant() {
    let config = settings(&[
        ("PUBLIC_URL", " https://bridge.example/phone// "),
        ("ULTRAVOX_API_URL", "http://127.0.0.1:9000/"),
        ("N8N_WEBHOOK_URL", "https://n8n.example/webhook/call?x=1"),
        ("PORT", " 0 "),
        ("BIND", "::1"),
        ("KEEP_DAYS", "0"),
        ("MAX_CALLS", "1"),
        ("MAX_CALL_SECONDS", "14400"),
        ("N8N_AUTH_HEADER", "X-Agent-Key: s3cret: with a colon "),
        ("FALLBACK_NUMBER", "+4930123456"),
        ("TWILIO_ACCOUNT_SID", "AC0123456789abcdef0123456789abcdef"),
        ("API_TOKEN", "c0ffee-51d3ba94-7"),
        ("METRICS_TOKEN", "97c1f04be2a8d635"),
        ("OUTGOING_ALLOW", " +49, ,+4420 "),
        ("LOG_LEVEL", "debug"),
        ("LOG_FORMAT", "json"),
    ]);
    let config = config.ok().unwrap();
    assert_eq!(config.public_url, "https://bridge.example/phone");
    assert_eq!(config.ultravox_api_url, "http://127.0.0.1:9000");
    assert_eq!(config.n8n_webhook_url.unwrap(), "https://n8n.example/webhook/call?x=1");
    assert_eq!((config.port, config.bind.to_string()), (0, "::1".to_owned()));
    assert_eq!((config.keep, config.max_calls.get()), (Duration::ZERO, 1));
    assert_eq!(config.max_call, Duration::from_hours(4));
    let (name, value) = config.n8n_auth_header.unwrap();
    assert_eq!((name.as_str(), value.reveal()), ("X-Agent-Key", "s3cret: with a colon"));
    assert_eq!(config.fallback_number.unwrap(), "+4930123456");
    assert_eq!(config.api_token.unwrap().reveal(), "c0ffee-51d3ba94-7");
    assert_eq!(config.metrics_token.unwrap().reveal(), "97c1f04be2a8d635");
    assert_eq!(config.outgoing_allow, ["+49", "+4420"]);
    assert_eq!((config.log_level, config.log_format), (Level::Debug, LogFormat::Json));
}

#[test]
fn a_wrong_setting_is_named_with_what_it_must_be() {
    let number = |least, most| format!("must be a whole number from {least} to {most}");
    let cases = [
        ("ULTRAVOX_API_KEY", "", "is missing (".to_owned()),
        ("PUBLIC_URL", "http://pbx.example", "is \"http://pbx.example\": must be https".to_owned()),
        ("PUBLIC_URL", "pbx.example", "must be an address that starts with https://".to_owned()),
        ("PUBLIC_URL", "https://", "must be an address that starts with https://".to_owned()),
        ("PUBLIC_URL", "wss://pbx.example", "must be an address that starts".to_owned()),
        ("PUBLIC_URL", "https://pbx.example/a b", "must be an address that starts".to_owned()),
        ("PUBLIC_URL", "https://pbx.example/?x=1", "must not have a ? or #".to_owned()),
        ("PUBLIC_URL", "https://pbx.example/#rc=2", "must not have a ? or #".to_owned()),
        ("PUBLIC_URL", "https://me:hush@pbx.example/x", "must not have a user name".to_owned()),
        ("PUBLIC_URL", "http://me@pbx.example", "must not have a user name".to_owned()),
        ("COPY_URL", "http://pbx.example", "is \"http://pbx.example\": must be https".to_owned()),
        ("COPY_URL", "https://me@pbx.example", "must not have a user name".to_owned()),
        ("N8N_WEBHOOK_URL", "n8n.example/webhook/x", "must be an address that starts".to_owned()),
        ("ULTRAVOX_API_URL", "ftp://ultravox.example", "must be an address that".to_owned()),
        ("TWILIO_API_URL", "api.twilio.com", "must be an address that starts".to_owned()),
        ("PORT", "65536", number(0, 65_535)),
        ("PORT", "-1", number(0, 65_535)),
        ("PORT", "http", number(0, 65_535)),
        ("BIND", "localhost", "must be an IP address such as 0.0.0.0".to_owned()),
        ("KEEP_DAYS", "36501", number(0, 36_500)),
        ("MAX_CALLS", "0", number(1, 10_000)),
        ("MAX_CALLS", "10001", number(1, 10_000)),
        ("MAX_CALLS", "1.5", number(1, 10_000)),
        ("MAX_CALL_SECONDS", "9", number(10, 14_400)),
        ("MAX_CALL_SECONDS", "30m", number(10, 14_400)),
        ("TWILIO_ACCOUNT_SID", "SK0123456789abcdef0123456789abcdef", "must be AC and".to_owned()),
        ("TWILIO_ACCOUNT_SID", "AC123", "must be AC and 32 more characters".to_owned()),
        ("TWILIO_PHONE_NUMBER", "030 123456", "must be a number such as +4930123456".to_owned()),
        ("FALLBACK_NUMBER", "+49 30 123456", "must be a number such as +4930123456".to_owned()),
        ("N8N_AUTH_HEADER", "X-Agent-Key", "must be \"Name: value\"".to_owned()),
        ("N8N_AUTH_HEADER", "X-Agent-Key:", "must be \"Name: value\"".to_owned()),
        ("N8N_AUTH_HEADER", ": value", "must be \"Name: value\"".to_owned()),
        ("N8N_AUTH_HEADER", "two words: value", "must be \"Name: value\"".to_owned()),
        ("N8N_AUTH_HEADER", "X-Agent-Key: a\nX-Other: b", "must be \"Name: value\"".to_owned()),
        ("API_TOKEN", "97c1f04be2a8d63", "is too short: at least 16".to_owned()),
        ("METRICS_TOKEN", "97c1f04be2a8d63", "is too short: at least 16".to_owned()),
        ("API_TOKEN", "aaaaaaaaaaaaaaaaaaaab", "is too easy to guess".to_owned()),
        ("API_TOKEN", "abababcbcbabcacbabcbc", "is too easy to guess".to_owned()),
        ("API_TOKEN", "passwordpassword", "is too easy to guess".to_owned()),
        ("API_TOKEN", "Password-password1", "is too easy to guess".to_owned()),
        ("API_TOKEN", "receptionistreceptionist", "is too easy to guess".to_owned()),
        ("API_TOKEN", "0123456789abcdef", "is too easy to guess".to_owned()),
        ("METRICS_TOKEN", "password12345678", "is too easy to guess".to_owned()),
        ("OUTGOING_ALLOW", "+49,0044", "has \"0044\": must be like +49,+4420".to_owned()),
        ("OUTGOING_ALLOW", "+", "has \"+\": must be like +49,+4420".to_owned()),
        ("LOG_LEVEL", "INFO", "must be one of error, warn, info, debug".to_owned()),
        ("LOG_FORMAT", "xml", "is \"xml\": must be one of text, json".to_owned()),
    ];
    for (name, value, wanted) in cases {
        let found = complaints(&[(name, value)]);
        let [complaint] = found.as_slice() else {
            assert_eq!(found.len(), 1, "{name}={value}: {found:?}");
            continue;
        };
        assert!(complaint.starts_with(&format!("{name}  ")), "{name}={value}: {complaint}");
        assert!(complaint.contains(&wanted), "{name}={value}: {complaint}");
    }
}

#[test]
fn all_complaints_come_at_once_and_hold_no_secret() {
    let earlier = vec![".env  has a line that is not NAME=value".to_owned()];
    let values: HashMap<String, String> = [
        ("PUBLIC_URL", "http://pbx.example"),
        ("PORT", "many"),
        ("TWILIO_AUTH_TOKEN", "hush-1"),
        ("TWILIO_ACCOUNT_SID", "hush-2"),
        ("API_TOKEN", "hush-3"),
        ("METRICS_TOKEN", "hush-hush-hush-hush"),
        ("N8N_HMAC_SECRET", "hush-4"),
        ("N8N_AUTH_HEADER", "hush-5 without a colon"),
        ("LOG_LEVEL", "loud"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    let found = Config::from_values(values, earlier).err().unwrap();
    let names: Vec<&str> = found.iter().filter_map(|text| text.split("  ").next()).collect();
    let wanted = [
        ".env",
        "ULTRAVOX_API_KEY",
        "PUBLIC_URL",
        "PORT",
        "TWILIO_ACCOUNT_SID",
        "API_TOKEN",
        "METRICS_TOKEN",
        "N8N_AUTH_HEADER",
        "LOG_LEVEL",
    ];
    assert_eq!(names, wanted, "{found:?}");
    assert!(!found.concat().contains("hush"), "{found:?}");
}

#[test]
fn a_secret_is_hidden_however_it_is_quoted() {
    let config = settings(&[
        ("API_TOKEN", "hush-97c1f04be2a8"),
        ("METRICS_TOKEN", "d635-figures-1b2c"),
        // It begins with the token.
        ("N8N_HMAC_SECRET", "hush-97c1f04be2a8-and-more"),
        ("N8N_AUTH_HEADER", "X-Key: hush\"\\tail"),
        ("N8N_WEBHOOK_URL", "https://me:pass@n8n.example/webhook/x"),
    ])
    .unwrap();
    let login = BASE64.encode("me:pass");
    let cases = [
        ("hush-97c1f04be2a8, hush-97c1f04be2a8-and-more".to_owned(), "***, ***".to_owned()),
        ("d635-figures-1b2c".to_owned(), "***".to_owned()),
        ("hush\"\\tail".to_owned(), "***".to_owned()),
        (
            json!({"key": "hush\"\\tail", "authorization": format!("Basic {login}")}).to_string(),
            json!({"key": "***", "authorization": "Basic ***"}).to_string(),
        ),
        ("nothing to hide".to_owned(), "nothing to hide".to_owned()),
    ];
    for (text, wanted) in cases {
        assert_eq!(config.hide_secrets(text), wanted);
    }
}

#[test]
fn what_is_random_is_no_easy_guess_and_two_tokens_are_two() {
    for _ in 0..100 {
        let token = &random_hex();
        assert!(settings(&[("API_TOKEN", token)]).is_ok(), "{token}");
    }
    let both = "97c1f04be2a8d635";
    assert_eq!(
        complaints(&[("API_TOKEN", both), ("METRICS_TOKEN", both)]),
        ["METRICS_TOKEN  is the same as API_TOKEN (take another one)"]
    );
}
