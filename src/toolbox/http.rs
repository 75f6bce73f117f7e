//! Blocking HTTP to the three parties, and the certificates that it trusts.
//!
//! One [`Http`] serves the whole process and keeps connections open between requests. Every request
//! has a time limit for all of it, name look-up to last byte, and a limit on the length of the
//! answer. Every status is an answer: what it means is for the party's own room to say. It follows
//! no redirect, guesses no proxy and retries nothing.
//!
//! ```text
//! let answer = http.ask(Party::N8n, &Ask { method: "OPTIONS", url, within, ..Ask::default() })?;
//! ```

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};
use ureq::Timeout;
use ureq::http::{HeaderMap, Request};
use ureq::unversioned::transport::DefaultConnector;

use crate::toolbox::failure::{Failure, Party};
use crate::toolbox::http::names::Names;

/// A connection that was idle for longer is not used again.
pub(crate) const IDLE_MAX: Duration = Duration::from_secs(30);
/// What a request takes for a buffer each way. ureq would take 128 KiB, and an allocator does not
/// give them back after a busy minute.
const BUFFER_BYTES: usize = 16 * 1_024;
/// The answer to a request. Ultravox's echoes the prompt; the others' take a few KiB.
const ANSWER_BYTES_MAX: u64 = 1_024 * 1_024;

/// The connections of this process to the parties' HTTP servers.
#[derive(Clone)]
pub(crate) struct Http(ureq::Agent);

/// One request.
pub(crate) struct Ask<'a> {
    pub(crate) method: &'a str,
    pub(crate) url: &'a str,
    pub(crate) headers: &'a [(&'a str, &'a str)],
    pub(crate) body: Option<&'a str>,
    /// For the whole of it.
    pub(crate) within: Duration,
    /// An answer with a longer body is none.
    pub(crate) answer_bytes_max: u64,
    /// But one of which the status tells all: then a body that is too long, or broken, is none.
    pub(crate) status_decides: bool,
}

impl Default for Ask<'_> {
    fn default() -> Self {
        Ask {
            method: "GET",
            url: "",
            headers: &[],
            body: None,
            within: IDLE_MAX,
            answer_bytes_max: ANSWER_BYTES_MAX,
            status_decides: false,
        }
    }
}

/// What came back, whatever the status.
pub(crate) struct Answered {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    /// In whatever encoding it came.
    pub(crate) body: String,
}

impl Http {
    pub(crate) fn new(roots: &[CertificateDer<'static>]) -> Http {
        let roots: Vec<ureq::tls::Certificate> =
            roots.iter().map(|root| ureq::tls::Certificate::from_der(root).to_owned()).collect();
        let tls = ureq::tls::TlsConfig::builder()
            .root_certs(ureq::tls::RootCerts::Specific(Arc::new(roots)))
            .build();
        let agent = ureq::Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .user_agent(concat!("callbridge/", env!("CARGO_PKG_VERSION")))
            // A connection that the other side has closed meanwhile is noticed and left alone.
            .max_idle_age(IDLE_MAX)
            .input_buffer_size(BUFFER_BYTES)
            .output_buffer_size(BUFFER_BYTES)
            .build();
        Http(ureq::Agent::with_parts(agent, DefaultConnector::default(), Names))
    }

    /// Blocks until the answer has been read to its end: only then is the connection free for the
    /// next request. An error is a request that got no answer at all.
    pub(crate) fn ask(&self, party: Party, ask: &Ask) -> Result<Answered, Failure> {
        self.send(ask).map_err(|error| no_answer(party, error, ask.within))
    }

    /// The same for `check`, which explains a missing answer in its own words.
    pub(crate) fn send(&self, ask: &Ask) -> Result<Answered, ureq::Error> {
        let mut request = Request::builder().method(ask.method).uri(ask.url);
        for (name, value) in ask.headers {
            request = request.header(*name, *value);
        }
        // A limit of nothing would be none at all.
        let within = Some(ask.within.max(Duration::from_millis(1)));
        let answered = if let Some(body) = ask.body {
            let request = self.0.configure_request(request.body(body)?);
            self.0.run(request.timeout_global(within).build())
        } else {
            let request = self.0.configure_request(request.body(())?);
            self.0.run(request.timeout_global(within).build())
        };
        let mut response = answered?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let read = response.body_mut().with_config().limit(ask.answer_bytes_max).read_to_vec();
        let body = if ask.status_decides { read.unwrap_or_default() } else { read? };
        let kind = headers.get("Content-Type").and_then(|kind| kind.to_str().ok());
        let body = decode(&body, kind.unwrap_or_default());
        Ok(Answered { status, headers, body })
    }
}

/// UTF-8, or what a mark at the beginning or the content type says; else every byte is a letter of
/// ISO 8859-1. A charset that is named but not true does no harm.
fn decode(bytes: &[u8], content_type: &str) -> String {
    let says = |charset: &str| content_type.to_ascii_lowercase().contains(charset);
    let utf_16 = |bytes: &[u8], unit: fn([u8; 2]) -> u16| {
        let (units, _) = bytes.as_chunks::<2>();
        char::decode_utf16(units.iter().map(|pair| unit(*pair)))
            .map(|letter| letter.unwrap_or(char::REPLACEMENT_CHARACTER))
            .collect()
    };
    match bytes {
        [0xFF, 0xFE, rest @ ..] => utf_16(rest, u16::from_le_bytes),
        [0xFE, 0xFF, rest @ ..] => utf_16(rest, u16::from_be_bytes),
        _ if says("utf-16le") => utf_16(bytes, u16::from_le_bytes),
        _ if says("utf-16") => utf_16(bytes, u16::from_be_bytes),
        _ => match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().map(|byte| char::from(*byte)).collect(),
        },
    }
}

/// A request that got no answer, and whether anything can have happened at the other end.
fn no_answer(party: Party, error: ureq::Error, within: Duration) -> Failure {
    use ureq::Error;
    let refused = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    match error {
        Error::Timeout(Timeout::Resolve | Timeout::Connect) => {
            Failure::new(party, "no connection in time").certainly_not_done()
        }
        Error::Timeout(_) => {
            // To the tenth of a second: what is left of a deadline is a little less than the whole.
            let ms = (within.as_millis() + 50) / 100 * 100;
            Failure::new(party, format!("no answer within {ms} ms"))
        }
        Error::HostNotFound => Failure::new(party, "its name does not resolve")
            .advise("correct the host's name in the address")
            .certainly_not_done(),
        // Nobody else uses this variant.
        Error::Other(look_up) => Failure::new(party, look_up.to_string()).certainly_not_done(),
        Error::Io(error) if refused(&error) => Failure::new(party, "it refuses the connection")
            .advise("is it running, and is the address right?")
            .certainly_not_done(),
        Error::ConnectionFailed => Failure::new(party, "no connection")
            .advise("is it running, and is the address right?")
            .certainly_not_done(),
        Error::BodyExceedsLimit(limit) => {
            Failure::new(party, format!("an answer of more than {limit} bytes"))
        }
        other => Failure::new(party, "the request failed").caused_by(other),
    }
}

/// Mozilla's roots, and those of the owner's own file.
pub(crate) fn trusted_roots(extra: Option<&Path>) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut roots: Vec<CertificateDer> = webpki_root_certs::TLS_SERVER_ROOT_CERTS.to_vec();
    if let Some(path) = extra {
        let complain = |why: String| format!("SSL_CERT_FILE  {}: {why}", path.display());
        let certificates =
            CertificateDer::pem_file_iter(path).map_err(|error| complain(error.to_string()))?;
        let before = roots.len();
        for certificate in certificates {
            roots.push(certificate.map_err(|error| complain(error.to_string()))?);
        }
        if roots.len() == before {
            return Err(complain("has no certificate in it (it must be PEM)".into()));
        }
    }
    Ok(roots)
}

pub(crate) fn tls_config(roots: &[CertificateDer<'static>]) -> Arc<ClientConfig> {
    // ureq looks for the process's default as well; `outbox --retry` may have set it already.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        // There is one, and there is no other one in this program.
    }
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(roots.iter().cloned());
    Arc::new(ClientConfig::builder().with_root_certificates(store).with_no_client_auth())
}

mod names;
#[cfg(test)]
mod tests;
