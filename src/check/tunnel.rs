//! Which address is to be tried, and what ngrok on this machine has to do with it.
//!
//! ngrok is asked even where `PUBLIC_URL` names an address by itself: the commonest mistake of a
//! second day is an address that ngrok has given up, or a tunnel to another port. An ngrok that
//! does not run is nobody's mistake, unless `PUBLIC_URL=ngrok` asks for it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};

use super::http::host_of;
use super::ngrok::{Tunnel, list_tunnels, ngrok_address, start_or_set, tunnel_to};
use super::report::{Finding, Level, Topic};
use crate::setup::settings::Config;
use crate::setup::stop::Stop;
use crate::setup::values::NGROK;

const TUNNEL: Topic = Topic::new("ngrok", "tunnel");

/// The address to try, and what there is to say of ngrok. Puts the tunnel's address into the
/// settings where `PUBLIC_URL=ngrok` asks for it.
pub(super) fn public_url(
    config: &mut Config,
    is_unusable: bool,
) -> (Option<String>, Option<Finding>) {
    let tunnels = list_tunnels(&config.ngrok_api_url, config.port);
    if config.public_url == NGROK {
        let found = tunnels.and_then(|tunnels| tunnel_to(&tunnels, config.port));
        return match found {
            Ok(url) => {
                let what = format!("PUBLIC_URL=ngrok is {url} at the moment");
                config.public_url.clone_from(&url);
                (Some(url), Some(TUNNEL.ok(what)))
            }
            Err(why) => {
                config.public_url.clear();
                let what = format!("PUBLIC_URL=ngrok, but {}", why.what);
                (None, Some(TUNNEL.wrong(what, why.cure)))
            }
        };
    }
    let is_usable =
        !config.public_url.is_empty() && (!is_unusable || config.public_url.starts_with("http://"));
    // Of an address with http the setting has been complained of; with https it may be right.
    let url = is_usable.then(|| config.public_url.replacen("http://", "https://", 1));
    let finding = tunnels.ok().and_then(|list| compare(&list, config.port, url.as_deref()));
    (url, finding)
}

/// What the server calls itself, once it knows its port: in local mode the address to open on this
/// machine, with `PUBLIC_URL=ngrok` the tunnel's.
pub(crate) fn address_in_force(config: &Config, listener: &TcpListener) -> Result<String, Stop> {
    let port = listener.local_addr().map_or(config.port, |address| address.port());
    if config.is_local {
        let at = SocketAddr::new(config.bind, port);
        let is_usual = config.bind == IpAddr::V4(Ipv4Addr::LOCALHOST);
        let host = if is_usual { format!("localhost:{port}") } else { at.to_string() };
        return Ok(format!("http://{host}"));
    }
    if config.public_url != NGROK {
        return Ok(config.public_url.clone());
    }
    ngrok_address(&config.ngrok_api_url, port)
        .map_err(|why| Stop::Failed(format!("callbridge: PUBLIC_URL=ngrok: {why}")))
}

fn compare(tunnels: &[Tunnel], port: u16, url: Option<&str>) -> Option<Finding> {
    let found = tunnel_to(tunnels, port);
    let Some(url) = url else {
        let url = found.ok()?;
        let what = format!("ngrok is running, and forwards {url} to port {port}");
        let cure = format!("set PUBLIC_URL=ngrok, or PUBLIC_URL={url}");
        return Some(TUNNEL.warning(what, cure));
    };
    let same = |tunnel: &&Tunnel| tunnel.public_url.eq_ignore_ascii_case(url);
    if let Some(tunnel) = tunnels.iter().find(same) {
        if tunnel.port() == port {
            return Some(TUNNEL.ok(format!("forwards {url} to port {port}")));
        }
        let what = format!("forwards {url} to {}, not to port {port}", tunnel.leads_to);
        return Some(TUNNEL.wrong(what, start_or_set(port, tunnel)));
    }
    let new = found.ok()?;
    let what = format!("PUBLIC_URL is {url}, but ngrok's address is now {new}");
    let cure = format!(
        "set PUBLIC_URL={new} (or PUBLIC_URL=ngrok), restart callbridge, then run: \
         callbridge check --fix"
    );
    // A domain of one's own may lead here beside ngrok.
    let is_ngroks = host_of(url).contains("ngrok");
    Some(TUNNEL.at(if is_ngroks { Level::Wrong } else { Level::Warning }, what, cure))
}
