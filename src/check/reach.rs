//! Whether Twilio can reach and trust what this machine reaches and trusts.
//!
//! An address may lead here from here and from nowhere else: `localhost`, a private range, a name
//! of the house. And a certificate may be trusted here through `SSL_CERT_FILE` only. With a number
//! to be rung no call would come in, so that is wrong; without one it is worth knowing. A public
//! name that is private here is a warning at most: outside it may well mean something else.

use std::net::{IpAddr, Ipv4Addr, ToSocketAddrs as _};

use super::audio_socket::UPGRADE_WITHIN;
use super::http::{NoAnswer, get, host_of};
use super::report::{Finding, Level, Topic};
use crate::setup::settings::Config;
use crate::toolbox::http::{Http, trusted_roots};

const CERTIFICATE: Topic = Topic::new("PUBLIC_URL", "certificate");
const ADDRESS: Topic = Topic::new("PUBLIC_URL", "address");

/// Names that no public server of names knows (RFC 6761, 6762, 8375, and custom).
const HOUSE_NAMES: [&str; 5] = [".localhost", ".local", ".internal", ".home.arpa", ".lan"];

/// Twilio does not know the roots in `SSL_CERT_FILE`.
pub(super) fn certificate(config: &Config, url: &str) -> Finding {
    let public = Http::new(&trusted_roots(None).unwrap_or_default());
    match get(&public, &format!("{url}/health"), &[], UPGRADE_WITHIN) {
        Err(NoAnswer::UnknownIssuer) => CERTIFICATE.at(
            level(config),
            "its certificate is trusted here through SSL_CERT_FILE, but not by Twilio",
            "use a public certificate: Caddy gets one by itself, tunnels have one",
        ),
        _ => CERTIFICATE.ok("its certificate needs no SSL_CERT_FILE"),
    }
}

/// A Twilio in the same house, as in a test, reaches what is in the house.
fn level(config: &Config) -> Level {
    let is_at_home = leads_nowhere_outside(&host_of(&config.twilio_api_url));
    if config.twilio_phone_number.is_some() && !is_at_home { Level::Wrong } else { Level::Warning }
}

/// Whatever the answer of a server of names.
fn leads_nowhere_outside(host: &str) -> bool {
    if let Ok(address) = host.trim_matches(['[', ']']).parse() {
        return is_private(address);
    }
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    !name.contains('.') || HOUSE_NAMES.iter().any(|ending| name.ends_with(ending))
}

pub(super) fn address(config: &Config, url: &str) -> Option<Finding> {
    let host = host_of(url);
    if leads_nowhere_outside(&host) {
        let what = format!("{host} is known in this house only, so Twilio cannot reach it");
        return Some(ADDRESS.at(level(config), what, "use a tunnel or a public name"));
    }
    let address = (host.as_str(), 443).to_socket_addrs().ok()?.next()?.ip();
    is_private(address).then(|| {
        ADDRESS.warning(
            format!("{host} is {address} here, an address that Twilio cannot reach"),
            "if the name has another address outside, all is well; if not, use a tunnel or a \
             public name",
        )
    })
}

fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            v4.is_loopback() || v4.is_private() || v4.is_link_local() || is_shared(v4)
        }
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => is_private(v4.into()),
            None => v6.is_loopback() || v6.is_unique_local() || v6.is_unicast_link_local(),
        },
    }
}

/// 100.64.0.0/10: behind a provider's own translation of addresses (RFC 6598).
fn is_shared(address: Ipv4Addr) -> bool {
    matches!(address.octets(), [100, 64..=127, ..])
}

#[cfg(test)]
mod tests;
