//! The server on this machine: does callbridge answer on its port, and is it this one, as it is set
//! up now?
//!
//! A random word goes to `/health`, and comes back signed by the process that has the port; with
//! that proof `public_url` knows later whether the address from outside leads to the same process.
//! Where no server runs, this process listens in its place for the moment, with the same front
//! door and without calls. No program that holds the port is touched.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::Duration;

use tiny_http::Method;

use super::http::{Answer, NoAnswer, get};
use super::report::{Finding, Topic};
use super::setup::Setup;
use crate::door::reply::{Reply, path_of};
use crate::door::{self, Hall, Visitor};
use crate::parties::twilio::stream;
use crate::toolbox::http::Http;

/// The server on this machine.
pub(super) const HOME_WITHIN: Duration = Duration::from_secs(2);

const PORT: Topic = Topic::new("callbridge", "port");

/// What holds the port, and how it signs the nonce.
pub(super) fn look(setup: &'static Setup, nonce: &str) -> (Finding, Option<String>) {
    let config = &setup.bridge.config;
    let port = config.port;
    if port == 0 {
        let what = "PORT=0 takes another port at each start, so no tunnel can forward to it";
        return (PORT.wrong(what, "set PORT=8000"), None);
    }
    let url = format!("http://{}/health?nonce={nonce}", SocketAddr::new(near(config.bind), port));
    let used_by_another = |what: &str| {
        PORT.wrong(
            format!("port {port} on this machine is in use by another program: {what}"),
            "stop that program, or set another PORT (and forward the tunnel to it)",
        )
    };
    let finding = match get(&Http::new(&[]), &url, &[], HOME_WITHIN) {
        Ok(answer) => match proof(&answer) {
            Some(proof) => return (judge_server(setup, &proof, nonce), Some(proof)),
            None if is_older_callbridge(&answer) => PORT.wrong(
                format!("an older callbridge is running on port {port}"),
                "stop it and start this one",
            ),
            None => used_by_another(&format!("it answered {}", answer.brief(config))),
        },
        Err(NoAnswer::Refused) => return stand_in(setup, nonce),
        Err(why) => used_by_another(&why.to_string()),
    };
    (finding, None)
}

/// `ok` and twice 64 hexadecimal digits: a callbridge, which one, and with which `PUBLIC_URL`.
pub(super) fn proof(answer: &Answer) -> Option<String> {
    let proof = answer.body.trim().strip_prefix("ok ")?;
    let (process, address) = proof.split_once(' ')?;
    let is_proof = [process, address]
        .iter()
        .all(|word| word.len() == 64 && word.bytes().all(|byte| byte.is_ascii_hexdigit()));
    (answer.status == 200 && is_proof).then(|| proof.to_owned())
}

/// From before `/health` signed anything.
pub(super) fn is_older_callbridge(answer: &Answer) -> bool {
    answer.status == 200 && answer.body.trim() == "ok"
}

/// The running server has read its settings when it was started, and may know an older address.
fn judge_server(setup: &Setup, proof: &str, nonce: &str) -> Finding {
    let port = setup.bridge.config.port;
    let address = |proof: &str| proof.rsplit(' ').next().map(str::to_owned);
    let is_same = address(proof) == address(&setup.prove(nonce));
    if is_same || setup.public_url.is_none() || setup.is_malformed("PUBLIC_URL") {
        return PORT.ok(format!("is running on port {port}"));
    }
    PORT.wrong(
        format!("the callbridge on port {port} was started with another PUBLIC_URL"),
        "restart it, so that it uses the address as it is now",
    )
}

/// Where a listener on this address is reached from the same machine.
fn near(bind: IpAddr) -> IpAddr {
    match bind {
        IpAddr::V4(address) if address.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(address) if address.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        other => other,
    }
}

/// The same front door as the server's, for the moment, and without calls.
fn stand_in(setup: &'static Setup, nonce: &str) -> (Finding, Option<String>) {
    let (bridge, port) = (setup.bridge, setup.bridge.config.port);
    let opened = TcpListener::bind((bridge.config.bind, port))
        .and_then(|listener| door::open(listener, setup, || bridge.config.max_calls.get()));
    match opened {
        Ok(()) => {
            let what =
                format!("is not running yet; this check listens on port {port} in its place");
            (PORT.warning(what, "start callbridge before you call"), Some(setup.prove(nonce)))
        }
        Err(error) => {
            let what = format!("cannot listen on {}:{port}: {error}", bridge.config.bind);
            let cure = if error.kind() == io::ErrorKind::PermissionDenied {
                "set PORT=8000: ports below 1024 are reserved for root"
            } else {
                "set BIND to an address of this machine (0.0.0.0 is all of them), or set another \
                 PORT"
            };
            (PORT.wrong(what, cure), None)
        }
    }
}

/// Behind the same front door there is nobody to take a call.
impl Hall for Setup {
    fn answer(&'static self, request: &mut tiny_http::Request) -> Reply {
        if path_of(request) == "/health" && matches!(request.method(), Method::Get | Method::Head) {
            let (bridge, url) = (self.bridge, request.url());
            return bridge.identity.health(&bridge.config.public_url, url);
        }
        // As a proxy that finds nobody at home would say: Twilio may try again.
        Reply::text(503, "callbridge is not running, only its check")
    }

    fn take_stream(&'static self, token: &str, visitor: &Visitor, head: Vec<u8>) -> bool {
        stream::opens_for_check(token, &visitor.socket, head, &self.bridge.config)
    }
}
