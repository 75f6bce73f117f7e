//! The pretend world as a whole: three stand-ins and one real server between them.
//!
//! [`World::builder`] says which program is the server and how the world shall be;
//! [`WorldBuilder::start`] opens all doors, starts the server with settings that lead to them,
//! and waits until it listens. From then on a caller can be played: [`World::ring`] posts what
//! Twilio posts and reads the TwiML.
//!
//! When a world is dropped its server is killed, its threads have ended and its directory is
//! gone. It never touches anything of this machine but loopback sockets and one temporary
//! directory.
//!
//! `for_tests` holds what only the tests ask of a world: other settings, the data directory,
//! the journals.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use crate::demo::backstage::{Backstage, random_uuid};
use crate::demo::certificate::make_certificate;
use crate::demo::http::{HttpAnswer, http_exchange};
use crate::demo::n8n::N8n;
use crate::demo::phone::Phone;
#[cfg(test)]
use crate::demo::rest::Twilio;
use crate::demo::server::{ChildLog, Server};
use crate::demo::trouble::Trouble;
use crate::demo::twilio::{
    Ringing, form_body, incoming_call_form, twilio_signature, without_fragment,
};
use crate::demo::twiml::Twiml;
use crate::demo::ultravox::Ultravox;
use crate::demo::{API_KEY, AUTH_TOKEN, CORPUS_ID, PUBLIC_URL};

#[cfg(test)]
mod for_tests;
#[cfg(test)]
pub use self::for_tests::closed_port;

/// The three pretend parties and one real bridge between them.
pub struct World {
    pub n8n: N8n,
    pub ultravox: Ultravox,
    #[cfg(test)]
    pub twilio: Twilio,
    pub bridge: Server,
    /// The bridge's port stays its own while it is down, so that it can be started again there.
    #[cfg(test)]
    _held: for_tests::HeldPort,
    pub(super) backstage: Arc<Backstage>,
    pub(super) public_url: String,
    pub(super) auth_token: String,
    log: ChildLog,
}

/// Says how a [`World`] shall be before it starts.
pub struct WorldBuilder {
    program: PathBuf,
    tls: bool,
    asleep: bool,
    changes: Vec<(String, Option<String>)>,
}

impl World {
    /// A world around the bridge whose program file this is: in a test
    /// `env!("CARGO_BIN_EXE_callbridge")`.
    pub fn builder(program: impl AsRef<Path>) -> WorldBuilder {
        let program = program.as_ref().to_owned();
        WorldBuilder { program, tls: false, asleep: false, changes: Vec::new() }
    }

    /// The number rings: Twilio posts `/incoming-call` and reads the TwiML.
    /// Any other answer than 200 with good TwiML is a trouble; a test that
    /// wants to be refused uses [`World::webhook`].
    #[track_caller]
    pub fn ring(&self, number: &str) -> Result<Ringing, Trouble> {
        self.ring_with(number, &[])
    }

    /// As [`World::ring`], with form fields changed or added, such as
    /// `CallSid` for a webhook that Twilio sends twice.
    #[track_caller]
    pub fn ring_with(&self, number: &str, extra: &[(&str, &str)]) -> Result<Ringing, Trouble> {
        let mut form = incoming_call_form(number);
        for (name, value) in extra {
            form.retain(|(present, _)| present != name);
            form.push(((*name).to_owned(), (*value).to_owned()));
        }
        self.ask_for_twiml("/incoming-call", number, &form)
    }

    #[track_caller]
    pub(super) fn ask_for_twiml(
        &self,
        path: &str,
        number: &str,
        form: &[(String, String)],
    ) -> Result<Ringing, Trouble> {
        let pairs: Vec<(&str, &str)> =
            form.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let answer = self.webhook(path, &pairs)?;
        let answered_at = Instant::now();
        if answer.status != 200 {
            let text = answer.text();
            return Err(self.trouble(format!("{path} was answered {}: {text}", answer.status)));
        }
        let content_type = answer.header("content-type").unwrap_or_default();
        if !content_type.starts_with("text/xml") && !content_type.starts_with("application/xml") {
            return Err(self.trouble(format!("the TwiML has the content type {content_type:?}")));
        }
        let twiml = match Twiml::read(&answer.text()) {
            Ok(twiml) => twiml,
            Err(what) => {
                return Err(
                    self.trouble(format!("Twilio refuses the TwiML: {what}: {}", answer.text()))
                );
            }
        };
        let call_sid = form.iter().find(|(name, _)| name == "CallSid");
        let call_sid = call_sid.map(|(_, value)| value.clone()).unwrap_or_default();
        Ok(Ringing {
            call_sid,
            from: number.to_owned(),
            twiml,
            answered_at,
            #[cfg(test)]
            answer,
        })
    }

    /// Posts a form as Twilio does, with a good `X-Twilio-Signature`. The path
    /// may have a query; a `#fragment` is not sent and not signed.
    #[track_caller]
    pub fn webhook(&self, path: &str, form: &[(&str, &str)]) -> Result<HttpAnswer, Trouble> {
        let path = without_fragment(path);
        let signature =
            twilio_signature(&self.auth_token, &format!("{}{path}", self.public_url), form);
        let headers = [
            ("User-Agent", "TwilioProxy/1.1"),
            ("Accept", "*/*"),
            ("I-Twilio-Idempotency-Token", &random_uuid()),
            ("Content-Type", "application/x-www-form-urlencoded; charset=UTF-8"),
            ("X-Twilio-Signature", signature.as_str()),
        ];
        self.request("POST", path, &headers, form_body(form).as_bytes())
    }

    /// Any request at all: only `Host` and `Content-Length` are added.
    #[track_caller]
    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<HttpAnswer, Trouble> {
        match http_exchange(self.bridge.address(), method, path, headers, body) {
            Ok(answer) => Ok(answer),
            Err(error) => Err(self.trouble(format!("{method} {path}: {error}"))),
        }
    }

    /// Opens a WebSocket on any path, with any signature or none. A refusal is
    /// a trouble that names the status.
    #[track_caller]
    pub fn upgrade(&self, path: &str, signature: Option<&str>) -> Result<Phone, Trouble> {
        match Phone::connect(self.bridge.address(), path, signature, &self.log) {
            Ok(phone) => Ok(phone),
            Err(what) => Err(self.trouble(format!("the upgrade of {path} failed: {what}"))),
        }
    }

    /// A failure that carries the bridge's log.
    #[track_caller]
    pub fn trouble(&self, what: impl Into<String>) -> Trouble {
        self.log.trouble(what)
    }

    #[track_caller]
    pub(super) fn check(&self, right: bool, otherwise: &str) -> Result<(), Trouble> {
        if right { Ok(()) } else { Err(self.trouble(otherwise)) }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.end();
    }
}

impl World {
    /// Ends all of it now, whoever still looks on.
    pub(super) fn end(&self) {
        // The bridge first: what it holds open then ends by itself.
        self.bridge.kill();
        self.backstage.stop();
    }
}

impl WorldBuilder {
    /// Whether the agent's WebSocket is `wss` with a home-made certificate.
    #[must_use]
    pub fn tls(mut self, tls: bool) -> WorldBuilder {
        self.tls = tls;
        self
    }

    /// Adds or changes a setting of the bridge.
    #[must_use]
    pub fn setting(mut self, name: &str, value: impl Display) -> WorldBuilder {
        self.changes.push((name.to_owned(), Some(value.to_string())));
        self
    }

    /// Opens all doors, starts the bridge and waits until it listens.
    #[track_caller]
    pub fn start(self) -> Result<World, Trouble> {
        let log = ChildLog::default();
        let asleep = self.asleep;
        let prepared = self.prepare(&log);
        let (world, port) = prepared.map_err(|error| log.trouble(format!("no world: {error}")))?;
        if !asleep {
            world.bridge.launch(port)?;
        }
        Ok(world)
    }

    fn prepare(self, log: &ChildLog) -> io::Result<(World, u16)> {
        let home = tempfile::tempdir()?;
        let backstage = Arc::new(Backstage::default());
        let certificate = if self.tls { Some(make_certificate()?) } else { None };
        let pem = certificate.as_ref().map(|(pem, _)| pem.clone());
        let ultravox = Ultravox::open(&backstage, certificate.map(|(_, tls)| tls), log)?;
        let n8n = N8n::open(&backstage, log)?;
        #[cfg(test)]
        let twilio = Twilio::open(&backstage, log)?;
        let mut settings: Vec<(String, String)> = [
            ("BIND", "127.0.0.1"),
            ("PUBLIC_URL", PUBLIC_URL),
            ("ULTRAVOX_API_KEY", API_KEY),
            ("ULTRAVOX_API_URL", &ultravox.api),
            ("N8N_WEBHOOK_URL", &n8n.url()),
            ("TWILIO_AUTH_TOKEN", AUTH_TOKEN),
            ("DATA_DIR", &home.path().join("data").to_string_lossy()),
            ("ULTRAVOX_CORPUS_ID", CORPUS_ID),
            ("LOG_LEVEL", "debug"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
        if let Some(pem) = pem {
            let path = home.path().join("world.pem");
            std::fs::write(&path, pem)?;
            settings.push(("SSL_CERT_FILE".to_owned(), path.to_string_lossy().into_owned()));
        }
        #[cfg(test)]
        settings.push(("TWILIO_API_URL".to_owned(), twilio.url()));
        for (name, value) in self.changes {
            settings.retain(|(present, _)| *present != name);
            settings.extend(value.map(|value| (name, value)));
        }
        let look = |wanted: &str, otherwise: &str| {
            let found = settings.iter().find(|(name, _)| name == wanted);
            found.map_or(otherwise, |(_, value)| value).to_owned()
        };
        let port = look("PORT", "0").parse().unwrap_or(0);
        #[cfg(test)]
        let held = for_tests::HeldPort::new()?;
        #[cfg(test)]
        let port = if port == 0 { held.port } else { port };
        #[cfg(test)]
        twilio.set_auth_token(&look("TWILIO_AUTH_TOKEN", AUTH_TOKEN));
        let world = World {
            public_url: look("PUBLIC_URL", PUBLIC_URL).trim_end_matches('/').to_owned(),
            auth_token: look("TWILIO_AUTH_TOKEN", AUTH_TOKEN),
            bridge: Server::new(self.program, home, settings, log),
            n8n,
            ultravox,
            #[cfg(test)]
            twilio,
            #[cfg(test)]
            _held: held,
            backstage,
            log: log.clone(),
        };
        Ok((world, port))
    }
}
