//! Looks up host names for ureq, within a request's time and without a panic.
//!
//! The system has no look-up with a time limit, so each is done on a thread of its own, which is
//! left to itself when the time is over. ureq would do the same, but panics where no thread can be
//! started. Nothing is remembered here: the system keeps names for as long as they are valid.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::vec;

use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;
use ureq::{Error, Timeout};

use crate::toolbox::threads::spawn;

/// As many as ureq has room for.
const ADDRESSES_MAX: usize = 16;

#[derive(Debug)]
pub(super) struct Names;

impl Resolver for Names {
    fn resolve(
        &self,
        uri: &Uri,
        _config: &ureq::config::Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, Error> {
        let host = uri.host().ok_or_else(|| Error::BadUri("no host in it".into()))?;
        let is_plain = uri.scheme_str() == Some("http");
        let place = (host.to_owned(), uri.port_u16().unwrap_or(if is_plain { 80 } else { 443 }));
        let (found, finding) = mpsc::sync_channel::<Option<vec::IntoIter<SocketAddr>>>(1);
        spawn("name look-up".into(), move || {
            let (host, port) = &place;
            let host = host.trim_matches(['[', ']']);
            if found.send((host, *port).to_socket_addrs().ok()).is_err() {
                // It took too long, and whoever has asked has said so.
            }
        })
        .map_err(|error| Error::Other(format!("no thread to look up its name: {error}").into()))?;
        let addresses = finding.recv_timeout(*timeout.after).map_err(|error| match error {
            RecvTimeoutError::Timeout => Error::Timeout(Timeout::Resolve),
            RecvTimeoutError::Disconnected => Error::Other("the look-up of its name ended".into()),
        })?;
        let mut kept = self.empty();
        for address in addresses.into_iter().flatten().take(ADDRESSES_MAX) {
            kept.push(address);
        }
        if kept.is_empty() { Err(Error::HostNotFound) } else { Ok(kept) }
    }
}
