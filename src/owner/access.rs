//! Who may see and order it: whoever shows `API_TOKEN`; in local mode, whoever is at this machine.
//!
//! [`from_owner`] is for looking, [`order_from_owner`] for all that costs money: an order must also
//! come from our own page, or from a program of the owner's, and never from another site in the
//! owner's browser. [`from_prometheus`] takes `METRICS_TOKEN` as well, for figures only. Whoever is
//! refused learns no more than that; each refusal is counted.
//!
//! A wrong token is answered late, one after the other, so that guessing takes its time. The right
//! one never waits for that. The tokens themselves are long enough (`setup::values`).

use std::net::Ipv4Addr;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;
use subtle::ConstantTimeEq as _;

use crate::Bridge;
use crate::door::reply::{Reply, header, path_of, private, read_body};
use crate::toolbox::failure::Secret;
use crate::toolbox::log::{log, log_refusal};
use crate::toolbox::metrics::refused;
use crate::toolbox::threads::lock;

/// Of wrong tokens, one is answered in this time, over however many connections they come.
const WRONG_TOKEN_EVERY: Duration = Duration::from_millis(100);
/// Wrong tokens that wait for their answer at once, each with its threads. One more gets 429.
const WRONG_TOKENS_MAX: u32 = 64;

/// What belongs to the owner alone asks for `API_TOKEN`: as `Bearer`, or as the password of
/// `Basic`, which browsers can. Without the setting there is nothing here.
pub(crate) fn from_owner(
    bridge: &'static Bridge,
    request: &tiny_http::Request,
    handle: fn(&'static Bridge, &tiny_http::Request) -> Reply,
) -> Reply {
    match refusal_of_stranger(bridge, request, "API_TOKEN", &[&bridge.config.api_token]) {
        Some(refusal) => refusal,
        None => handle(bridge, request).with(private()),
    }
}

/// The same for figures, which have a token of their own beside.
pub(crate) fn from_prometheus(
    bridge: &'static Bridge,
    request: &tiny_http::Request,
    handle: fn(&'static Bridge, &tiny_http::Request) -> Reply,
) -> Reply {
    let tokens = [&bridge.config.api_token, &bridge.config.metrics_token];
    match refusal_of_stranger(bridge, request, "METRICS_TOKEN or API_TOKEN", &tokens) {
        Some(refusal) => refusal,
        None => handle(bridge, request).with(private()),
    }
}

/// The same with a JSON body, for all that costs money: it must come from nowhere but our page or
/// a program of the owner's.
pub(crate) fn order_from_owner(
    bridge: &'static Bridge,
    request: &mut tiny_http::Request,
    handle: fn(&'static Bridge, &str, &Value) -> Reply,
) -> Reply {
    let refusal = refusal_of_stranger(bridge, request, "API_TOKEN", &[&bridge.config.api_token]);
    if let Some(refusal) = refusal.or_else(|| refusal_of_other_site(bridge, request)) {
        return refusal;
    }
    let body = match read_body(request) {
        Ok(body) => body,
        Err(reply) => return reply,
    };
    match serde_json::from_slice(&body) {
        Ok(order) => handle(bridge, request.url(), &order).with(private()),
        Err(error) => {
            log!(Warn, "{}: the body is not JSON: {error}", request.url());
            refused("not_json");
            Reply::error(400, &format!("the body is not JSON: {error}"))
        }
    }
}

fn refusal_of_stranger(
    bridge: &Bridge,
    request: &tiny_http::Request,
    wanted: &str,
    tokens: &[&Option<Secret>],
) -> Option<Reply> {
    if bridge.config.is_local {
        return refusal_of_outsider(request);
    }
    let mut tokens = tokens.iter().copied().flatten().peekable();
    if tokens.peek().is_none() {
        return Some(Reply::text(404, "there is nothing here"));
    }
    let shown = shown_token(header(request, "Authorization")).unwrap_or_default();
    if tokens.any(|token| bool::from(token.reveal().as_bytes().ct_eq(shown.as_bytes()))) {
        return None;
    }
    let path = path_of(request);
    if header(request, "Authorization").is_empty() {
        // So every browser begins.
        log!(Debug, "{path}: {wanted} is asked for");
        refused("api_token");
    } else {
        log_refusal("api_token", format_args!("{path}: {wanted} is missing or wrong"));
        if !await_turn() {
            let later = ("Retry-After", "10".to_owned());
            return Some(Reply::error(429, "too many wrong tokens at once").with([later]));
        }
    }
    let ask = ("WWW-Authenticate", "Basic realm=\"callbridge\", charset=\"UTF-8\"".to_owned());
    let how = "as Authorization: Bearer … (a browser: as password, any user name)";
    Some(Reply::error(401, &format!("send {wanted} {how}")).with([ask]))
}

/// False: there are too many before this one.
fn await_turn() -> bool {
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    let now = Instant::now();
    let mut last = lock(&LAST);
    let turn = last.map_or(now, |last| last.max(now)) + WRONG_TOKEN_EVERY;
    if turn > now + WRONG_TOKENS_MAX * WRONG_TOKEN_EVERY {
        return false;
    }
    *last = Some(turn);
    drop(last);
    thread::sleep(turn - now);
    true
}

/// Local mode listens on this machine alone and asks for no password. A browser here may still have
/// been told to send something by a page from elsewhere, perhaps under a name that its owner has
/// made lead here (DNS rebinding); and a proxy here may let others in.
fn refusal_of_outsider(request: &tiny_http::Request) -> Option<Reply> {
    let (host, origin) = (header(request, "Host"), header(request, "Origin"));
    let is_from_here = origin.is_empty()
        || origin.split_once("://").is_some_and(|(_, from)| from.eq_ignore_ascii_case(host));
    let is_passed_on = !header(request, "Via").is_empty();
    if is_this_machine(host) && is_from_here && !is_passed_on {
        return None;
    }
    let path = path_of(request);
    let why = "refused, local mode is for this machine's browser alone";
    log_refusal("other_site", format_args!("{path}: {why}"));
    let error = "callbridge is in local mode: open it on its own machine, as http://localhost:PORT";
    Some(Reply::error(403, error))
}

fn is_this_machine(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let is_name = ["localhost", "[::1]"].iter().any(|own| name.eq_ignore_ascii_case(own));
    is_name || name.parse().is_ok_and(|address: Ipv4Addr| address.is_loopback())
}

/// A browser adds the password that it has stored to whatever any site makes it send here. So what
/// another site has sent is refused, and so is a body that a mere form could send: for JSON a
/// browser asks us first, and we say nothing. A Bearer token is never added by itself.
fn refusal_of_other_site(bridge: &Bridge, request: &tiny_http::Request) -> Option<Reply> {
    let origin = header(request, "Origin");
    let authority = |url: &str| {
        let (_, rest) = url.split_once("://")?;
        rest.split('/').next().map(str::to_ascii_lowercase)
    };
    let ours = [
        authority(&bridge.config.public_url),
        authority(&format!("://{}", header(request, "Host"))),
    ];
    let same_origin = match header(request, "Sec-Fetch-Site") {
        "same-origin" | "none" => true,
        "" => {
            origin.is_empty()
                || authority(origin).is_some_and(|origin| ours.contains(&Some(origin)))
        }
        _ => false,
    };
    if !same_origin {
        log!(Warn, "{}: refused, another site has sent it", path_of(request));
        refused("other_site");
        return Some(Reply::error(403, "another site may not do that"));
    }
    let by_password = !starts_with_word(header(request, "Authorization"), "bearer");
    let kind = header(request, "Content-Type").split(';').next().unwrap_or_default().trim();
    if by_password && !kind.eq_ignore_ascii_case("application/json") {
        refused("not_json");
        return Some(Reply::error(415, "send Content-Type: application/json"));
    }
    None
}

fn starts_with_word(text: &str, word: &str) -> bool {
    text.split(' ').next().is_some_and(|first| first.eq_ignore_ascii_case(word))
}

fn shown_token(header: &str) -> Option<String> {
    let (scheme, rest) = header.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(rest.trim().to_owned());
    }
    let login = BASE64.decode(rest.trim()).ok().filter(|_| scheme.eq_ignore_ascii_case("basic"))?;
    let login = String::from_utf8(login).ok()?;
    login.split_once(':').map(|(_, password)| password.to_owned())
}

#[cfg(test)]
mod tests;
