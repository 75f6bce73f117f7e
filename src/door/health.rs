//! `GET /health`: that a callbridge lives here, and if asked, which one.
//!
//! Without more it says `ok`, to whoever asks. A `nonce` comes back signed twice: with a key that
//! only this process has, and with its `PUBLIC_URL`. By that `callbridge check` knows whether an
//! address leads to this very process, and whether both were started with the same address:
//!
//! ```text
//! GET /health?nonce=5d8e…    ->    200 ok <64 hex digits> <64 hex digits>
//! ```
//!
//! It says nothing about calls; whether the next caller would be served is asked at `/ready`.

use data_encoding::HEXLOWER;
use ring::hmac;

use crate::door::reply::Reply;
use crate::toolbox::random::random_bytes;

/// Known to nobody else: what is signed with it comes from this process.
pub(crate) struct Identity(hmac::Key);

impl Identity {
    pub(crate) fn new() -> Identity {
        Identity(hmac::Key::new(hmac::HMAC_SHA256, &random_bytes::<32>()))
    }

    pub(crate) fn health(&self, public_url: &str, url: &str) -> Reply {
        let query = url.split_once('?').map(|(_, query)| query).unwrap_or_default();
        let nonce = form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "nonce");
        match nonce.filter(|(_, nonce)| !nonce.is_empty()) {
            None => Reply::text(200, "ok"),
            Some((_, nonce)) => Reply::text(200, &format!("ok {}", self.prove(public_url, &nonce))),
        }
    }

    pub(crate) fn prove(&self, public_url: &str, nonce: &str) -> String {
        let address = hmac::Key::new(hmac::HMAC_SHA256, public_url.as_bytes());
        [&self.0, &address]
            .map(|key| HEXLOWER.encode(hmac::sign(key, nonce.as_bytes()).as_ref()))
            .join(" ")
    }
}
