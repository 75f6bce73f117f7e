//! The first lines of the log: what is in force, and what its owner may not have meant.
//!
//! They are there for the moment after the first start, when nobody knows yet whether the settings
//! were read as they were meant. No secret is in them.

use std::net::SocketAddr;

use crate::setup::agent::Agent;
use crate::setup::settings::Config;
use crate::toolbox::log::log;
use crate::toolbox::text::counted;

pub(crate) fn introduce(config: &Config, agent: &Agent, address: SocketAddr) {
    log!(Info, "callbridge {} listening on {address}", env!("CARGO_PKG_VERSION"));
    if config.is_local {
        introduce_local_mode(config);
    } else {
        log!(Info, "Twilio's Voice webhook is {}/incoming-call (POST)", config.public_url);
        if let Some(own) = &config.copy_url {
            log!(Info, "one of several copies: what belongs to its calls comes back to {own}");
        }
    }
    log!(
        Info,
        "agent {} of {}: {}, {}, model {}",
        agent.name,
        agent.company,
        counted(agent.stages.len(), "stage"),
        counted(agent.tools.len(), "tool"),
        config.ultravox_model
    );
    let whose =
        if config.max_calls.is_set() { "" } else { ", or what the Ultravox account allows," };
    log!(
        Info,
        "at most {}{whose} of {} s each; data in {}",
        counted(config.max_calls.get(), "call"),
        config.max_call.as_secs(),
        config.data_dir.display()
    );
    match config.api_token {
        _ if config.is_local => {}
        Some(_) => log!(Info, "live page: {}/ (password: API_TOKEN)", config.public_url),
        None => log!(Info, "API_TOKEN is not set: no live page, no outgoing calls"),
    }
    if config.n8n_webhook_url.is_none() {
        log!(
            Warn,
            "N8N_WEBHOOK_URL is not set: default greeting, no n8n tools, transcripts stay on disk"
        );
    }
    if config.ultravox_corpus_id.is_none() {
        log!(Info, "ULTRAVOX_CORPUS_ID is not set: the agent cannot look things up (queryCorpus)");
    }
    if config.twilio_auth_token.is_none() && !config.is_local {
        log!(Warn, "TWILIO_AUTH_TOKEN is not set: anyone can start calls here that you pay for");
    }
}

fn introduce_local_mode(config: &Config) {
    let url = &config.public_url;
    log!(
        Info,
        "local mode: open {url}/ on this machine, press \"Test call\", then \"Call\" (no password)"
    );
    let settings = [
        ("PUBLIC_URL", false),
        ("TWILIO_AUTH_TOKEN", config.twilio_auth_token.is_some()),
        ("TWILIO_ACCOUNT_SID", config.twilio_account_sid.is_some()),
        ("TWILIO_PHONE_NUMBER", config.twilio_phone_number.is_some()),
    ];
    let missing: Vec<&str> =
        settings.iter().filter(|(_, is_set)| !is_set).map(|(name, _)| *name).collect();
    log!(Info, "for a telephone, set {}; then run callbridge check --fix", missing.join(", "));
}
