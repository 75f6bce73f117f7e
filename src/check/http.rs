//! Asking over HTTP, and why there is no answer.
//!
//! [`get`] asks once and gives what came, with any status; [`NoAnswer`] names each way in which
//! nothing comes, from a name that does not resolve to a certificate that has expired, with what
//! helps. [`all_pages`] reads a list to its end. [`Trouble`] is a party that answers, but not what
//! it should. Addresses are shown without what may be a secret in them ([`shown_url`]).
//!
//! Nothing is tried twice here, and nothing knows which party is asked.

use std::time::{Duration, Instant};
use std::{fmt, io};

use rustls::CertificateError;
use serde_json::Value;
use tungstenite::http::{HeaderMap, Uri};

use super::report::{Finding, Level, Topic};
use crate::setup::settings::Config;
use crate::toolbox::http::{Answered, Ask, Http};

/// Pages of a list. A list that is longer has no end.
const PAGES_MAX: usize = 50;

pub(super) fn get(
    http: &Http,
    url: &str,
    headers: &[(&str, &str)],
    within: Duration,
) -> Result<Answer, NoAnswer> {
    Answer::to(http, &Ask { url, headers, within, ..Ask::default() })
}

/// An answer with any status.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) body: String,
    pub(super) took: Duration,
}

impl Answer {
    pub(super) fn to(http: &Http, ask: &Ask) -> Result<Answer, NoAnswer> {
        let began = Instant::now();
        let answered = http.send(ask).map_err(|error| NoAnswer::of(&error))?;
        let Answered { status, headers, body } = answered;
        Ok(Answer { status, headers, body, took: began.elapsed() })
    }

    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }

    /// Half a secret could not be found in it any more.
    pub(super) fn brief(&self, config: &Config) -> String {
        let body = config.hide_secrets(self.body.clone());
        let words: String = body.chars().filter(|c| !c.is_control()).take(60).collect();
        format!("{} {words}", self.status).trim().to_owned()
    }
}

/// All pages of a list. `next` names the next page's address, whole or not; only its query is used,
/// so that a key goes nowhere else. `setting` is where the party's own address stands.
pub(super) fn all_pages(
    path: &str,
    query: &str,
    (items, next, setting): (&str, &str, &str),
    ask: impl Fn(&str) -> Result<Value, Trouble>,
) -> Result<Vec<Value>, Trouble> {
    let mut all = Vec::new();
    let mut query = query.to_owned();
    for _ in 0..PAGES_MAX {
        let page = ask(&format!("{path}?{query}"))?;
        all.extend(page[items].as_array().cloned().unwrap_or_default());
        match page[next].as_str().and_then(|next| next.split_once('?')) {
            Some((_, next)) => next.clone_into(&mut query),
            None => return Ok(all),
        }
    }
    Err(Trouble::new(format!("its list {path} does not end"), format!("check {setting}")))
}

/// A party that does not answer as it should.
pub(super) struct Trouble {
    pub(super) what: String,
    pub(super) cure: String,
    /// 0: there was none.
    pub(super) status: u16,
}

impl Trouble {
    pub(super) fn new(what: impl Into<String>, cure: impl Into<String>) -> Trouble {
        Trouble { what: what.into(), cure: cure.into(), status: 0 }
    }

    /// `setting` may name another address.
    pub(super) fn no_answer(url: &str, why: &NoAnswer, setting: &str) -> Trouble {
        let cure = format!("check this machine's network, and {setting} if it is set");
        Trouble::new(format!("{}: {why}", host_of(url)), cure)
    }

    pub(super) fn finding(self, topic: &Topic, level: Level) -> Finding {
        topic.at(level, self.what, self.cure)
    }
}

/// Why a request has got no answer.
#[derive(Debug, PartialEq)]
pub(super) enum NoAnswer {
    UnknownName,
    Refused,
    TooSlow,
    Expired,
    NotYetValid,
    WrongName,
    UnknownIssuer,
    /// TLS was spoken to something that does not.
    NotTls,
    /// It took the connection, and ended it without a word.
    Closed,
    Broken(String),
}

impl NoAnswer {
    pub(super) fn of(error: &ureq::Error) -> NoAnswer {
        match error {
            ureq::Error::HostNotFound => NoAnswer::UnknownName,
            ureq::Error::Timeout(_) => NoAnswer::TooSlow,
            ureq::Error::Rustls(error) => NoAnswer::of_tls(error),
            ureq::Error::Io(error) => NoAnswer::of_io(error),
            other => NoAnswer::Broken(other.to_string()),
        }
    }

    fn of_io(error: &io::Error) -> NoAnswer {
        use io::ErrorKind as Kind;
        if let Some(tls) = error.get_ref().and_then(|inside| inside.downcast_ref()) {
            return NoAnswer::of_tls(tls);
        }
        match error.kind() {
            Kind::ConnectionRefused => NoAnswer::Refused,
            Kind::TimedOut => NoAnswer::TooSlow,
            // std has no kind for it.
            _ if error.to_string().contains("lookup address") => NoAnswer::UnknownName,
            Kind::UnexpectedEof | Kind::ConnectionReset | Kind::ConnectionAborted => {
                NoAnswer::Closed
            }
            _ => NoAnswer::Broken(error.to_string()),
        }
    }

    fn of_tls(error: &rustls::Error) -> NoAnswer {
        use CertificateError as Bad;
        match error {
            rustls::Error::InvalidCertificate(bad) => match bad {
                Bad::Expired | Bad::ExpiredContext { .. } => NoAnswer::Expired,
                Bad::NotValidYet | Bad::NotValidYetContext { .. } => NoAnswer::NotYetValid,
                Bad::NotValidForName | Bad::NotValidForNameContext { .. } => NoAnswer::WrongName,
                Bad::UnknownIssuer => NoAnswer::UnknownIssuer,
                other => NoAnswer::Broken(format!("its certificate: {other}")),
            },
            rustls::Error::InvalidMessage(_) => NoAnswer::NotTls,
            other => NoAnswer::Broken(format!("TLS: {other}")),
        }
    }

    /// What helps whoever it is, if anything does.
    pub(super) fn cure(&self) -> Option<&'static str> {
        match self {
            NoAnswer::Expired => {
                Some("renew the certificate of the proxy there (Caddy does that by itself)")
            }
            NoAnswer::NotYetValid => Some("set the clocks right, on this machine and on the other"),
            NoAnswer::WrongName => Some("use the name that its certificate is for"),
            NoAnswer::UnknownIssuer => Some(
                "use a public certificate with its whole chain; for n8n behind a CA of your own, \
                 put that CA into SSL_CERT_FILE",
            ),
            NoAnswer::NotTls => {
                Some("use an address that speaks https: a tunnel for HTTP, not for TCP, or Caddy")
            }
            NoAnswer::UnknownName => Some("correct the host's name in the address"),
            NoAnswer::Refused | NoAnswer::TooSlow | NoAnswer::Closed | NoAnswer::Broken(_) => None,
        }
    }
}

impl fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            NoAnswer::UnknownName => "its name does not resolve",
            NoAnswer::Refused => "it refuses the connection",
            NoAnswer::TooSlow => "no answer in time",
            NoAnswer::Expired => "its certificate has expired",
            NoAnswer::NotYetValid => "its certificate is not valid yet",
            NoAnswer::WrongName => "its certificate is for another name",
            NoAnswer::UnknownIssuer => "its certificate's issuer is not known",
            NoAnswer::NotTls => "it does not speak TLS (https)",
            NoAnswer::Closed => "it closes the connection without an answer",
            NoAnswer::Broken(why) => why,
        })
    }
}

pub(super) fn host_of(url: &str) -> String {
    let uri = url.parse::<Uri>().ok();
    uri.and_then(|uri| uri.host().map(str::to_owned)).unwrap_or_default()
}

/// Without a password, and without what stands behind a `?`: there may be keys in either.
pub(super) fn shown_url(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    without_logins(url)
}

/// No address in a text keeps its `user:password@`.
pub(super) fn without_logins(text: &str) -> String {
    let mut parts = text.split("://");
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        // A comma may stand in a password.
        let ends = |c: char| c.is_whitespace() || matches!(c, '/' | '"');
        let authority = part.split(ends).next().unwrap_or_default();
        let host = authority.rfind('@').map_or(0, |at| at + 1);
        kept.extend(["://", &part[host..]]);
    }
    kept
}
