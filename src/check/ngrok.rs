//! ngrok's local API: which address on the internet leads to a port of this machine.
//!
//! For the server, which asks once it has its port, if `PUBLIC_URL=ngrok`; and for `check`, which
//! compares. Nothing at ngrok is changed, no tunnel is started, and nobody but the ngrok of this
//! machine is asked.
//!
//! ```text
//! GET NGROK_API_URL/api/tunnels
//! {"tunnels":[{"name":"command_line","public_url":"https://ab12.ngrok-free.app","proto":"https",
//!  "config":{"addr":"http://localhost:8000","inspect":true}, …}],"uri":"/api/tunnels"}
//! ```

use std::fmt;
use std::time::Duration;

use serde_json::Value;

use super::http::get;
use crate::toolbox::http::Http;

/// ngrok's own address, on this machine, is asked before all else.
pub(super) const NGROK_WITHIN: Duration = Duration::from_millis(800);

/// `PUBLIC_URL=ngrok`: the https address of the tunnel that leads to this port.
pub(super) fn ngrok_address(api: &str, port: u16) -> Result<String, NoTunnel> {
    tunnel_to(&list_tunnels(api, port)?, port)
}

pub(super) struct Tunnel {
    pub(super) public_url: String,
    /// `http://localhost:8000`, `localhost:8000` or `8000`.
    pub(super) leads_to: String,
}

/// Why there is no address from ngrok, and what to do.
pub(crate) struct NoTunnel {
    pub(super) what: String,
    pub(super) cure: String,
}

impl fmt::Display for NoTunnel {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} ({})", self.what, self.cure)
    }
}

pub(super) fn list_tunnels(api: &str, port: u16) -> Result<Vec<Tunnel>, NoTunnel> {
    let trouble = |what: String| NoTunnel { what, cure: start(port) };
    // It speaks plain HTTP, so no roots are needed.
    let answer = get(&Http::new(&[]), &format!("{api}/api/tunnels"), &[], NGROK_WITHIN)
        .map_err(|why| trouble(format!("ngrok's local API at {api} cannot be reached: {why}")))?;
    let list = answer.json();
    let Some(list) = list["tunnels"].as_array() else {
        return Err(trouble(format!("what answers at {api} is not ngrok")));
    };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let tunnels = list.iter().map(|tunnel| Tunnel {
        public_url: text(&tunnel["public_url"]).trim_end_matches('/').to_owned(),
        leads_to: text(&tunnel["config"]["addr"]),
    });
    Ok(tunnels.collect())
}

pub(super) fn tunnel_to(tunnels: &[Tunnel], port: u16) -> Result<String, NoTunnel> {
    let is_https = |tunnel: &&Tunnel| tunnel.public_url.starts_with("https://");
    let mut here = tunnels.iter().filter(|tunnel| tunnel.port() == port);
    if let Some(tunnel) = here.clone().find(is_https) {
        return Ok(tunnel.public_url.clone());
    }
    let mut cure = start(port);
    let what = if let Some(tunnel) = here.next() {
        format!("ngrok's tunnel {} is not https", tunnel.public_url)
    } else if let Some(tunnel) = tunnels.iter().find(is_https) {
        cure = start_or_set(port, tunnel);
        let (url, leads_to) = (&tunnel.public_url, &tunnel.leads_to);
        format!("ngrok forwards {url} to {leads_to}, but callbridge is on port {port}")
    } else if let Some(tunnel) = tunnels.first() {
        format!("ngrok only has {}, which is not https", tunnel.public_url)
    } else {
        "ngrok is running, but has no tunnel".to_owned()
    };
    Err(NoTunnel { what, cure })
}

impl Tunnel {
    pub(super) fn port(&self) -> u16 {
        let (secure, rest) = match self.leads_to.split_once("://") {
            Some((scheme, rest)) => (scheme == "https", rest),
            None => (false, self.leads_to.as_str()),
        };
        let authority = rest.split('/').next().unwrap_or_default();
        let port = authority.rsplit(':').next().unwrap_or_default();
        port.parse().unwrap_or(if secure { 443 } else { 80 })
    }
}

fn start(port: u16) -> String {
    format!("start it with: ngrok http {port}")
}

/// For a tunnel that leads to another port.
pub(super) fn start_or_set(port: u16, tunnel: &Tunnel) -> String {
    format!("{} (or set PORT={})", start(port), tunnel.port())
}
