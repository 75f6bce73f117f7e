//! `PUBLIC_URL`, from the outside in: does the address that Twilio would call lead to the port that
//! callbridge has on this machine?
//!
//! Each way to miss is named: name, port, certificate, tunnel, proxy, another program, another
//! callbridge. If it leads here, the audio socket is tried, and whether Twilio could reach and
//! trust what this machine reaches and trusts.
//!
//! What the internet sees of this machine's name is not known here: a name may mean something else
//! there.

use super::audio_socket::audio_socket;
use super::http::{Answer, NoAnswer, get, shown_url};
use super::report::{Finding, Topic};
use super::setup::Setup;
use super::{Question, STEP_WITHIN, all_at_once, port, reach};
use crate::setup::settings::Config;
use crate::toolbox::random::random_hex;

const HEALTH: Topic = Topic::new("PUBLIC_URL", "health");
const COPY: Topic = Topic::new("COPY_URL", "health");

pub(super) fn look(setup: &'static Setup) -> Vec<Finding> {
    let (config, nonce) = (&setup.bridge.config, random_hex());
    let (home, proof) = port::look(setup, &nonce);
    let Some(url) = &setup.public_url else {
        let what = "not tried: there is no address yet";
        return vec![home, HEALTH.skipped(what, setup.towards_an_address())];
    };
    let mut findings = vec![home, from_outside(&HEALTH, setup, url, &nonce, proof.as_deref())];
    let mut url = url;
    if let Some(own) = &config.copy_url {
        // The stream of a call goes there.
        url = own;
        findings.push(from_outside(&COPY, setup, url, &nonce, proof.as_deref()));
    }
    if findings.iter().skip(1).all(Finding::is_ok) {
        let mut questions: Vec<Question> = vec![Box::new(move || audio_socket(setup, url))];
        if config.ssl_cert_file.is_some() {
            questions.push(Box::new(move || reach::certificate(config, url)));
        }
        findings.extend(all_at_once("PUBLIC_URL", questions));
    }
    findings.extend(reach::address(config, url));
    findings
}

fn from_outside(
    topic: &Topic,
    setup: &Setup,
    url: &str,
    nonce: &str,
    proof: Option<&str>,
) -> Finding {
    let port = setup.bridge.config.port;
    let shown = shown_url(url);
    let address = format!("{url}/health?nonce={nonce}");
    let answer = match get(&setup.bridge.http, &address, &[], STEP_WITHIN) {
        Ok(answer) => answer,
        Err(why) => return topic.wrong(format!("{shown}: {why}"), unreached(&why)),
    };
    match (port::proof(&answer), proof) {
        (Some(theirs), Some(ours)) if theirs == ours => {
            let took = answer.took.as_millis();
            topic.ok(format!("{shown} leads to this callbridge, in {took} ms"))
        }
        (Some(_), _) if *topic == HEALTH && setup.bridge.config.copy_url.is_some() => {
            topic.ok(format!("{shown} leads to one of the copies"))
        }
        (Some(_), _) => topic.wrong(
            format!("{shown} leads to another callbridge, not to port {port} here"),
            format!(
                "stop the other one, or forward the tunnel or proxy to 127.0.0.1:{port} on this \
                 machine (if it is one of several copies behind one address: set COPY_URL)"
            ),
        ),
        (None, _) => {
            let (what, cure) = explain(&setup.bridge.config, &answer, url);
            topic.wrong(format!("{shown}{what}"), cure)
        }
    }
}

fn unreached(why: &NoAnswer) -> &'static str {
    match why {
        NoAnswer::UnknownName => {
            "correct the host's name in PUBLIC_URL; a tunnel's name is gone when the tunnel is"
        }
        NoAnswer::Refused => "start the tunnel or the proxy that has this address",
        NoAnswer::TooSlow => {
            "open the port in the firewall and router, or use a tunnel (ngrok http)"
        }
        _ => why.cure().unwrap_or("check the tunnel or proxy in front of callbridge"),
    }
}

/// What stands in front, or in the place, of callbridge: what follows the address, and the cure.
fn explain(config: &Config, answer: &Answer, url: &str) -> (String, String) {
    let port = config.port;
    let header = |name: &str| answer.headers.get(name).and_then(|value| value.to_str().ok());
    let code = header("ngrok-error-code").map(str::to_owned);
    if let Some(code) = code.or_else(|| ngrok_error(&answer.body)) {
        return explain_ngrok(&code, port);
    }
    let brief = answer.brief(config);
    match answer.status {
        530 => (
            ": Cloudflare's tunnel is down (530)".to_owned(),
            format!("start it: cloudflared tunnel run (or --url http://localhost:{port})"),
        ),
        502..=504 | 520..=527 => (
            format!(": the proxy answers {}: it reaches nothing behind it", answer.status),
            if header("cf-ray").is_some() {
                format!("point the tunnel's service at http://localhost:{port}")
            } else {
                format!(
                    "forward the proxy to 127.0.0.1:{port} (Caddy: reverse_proxy 127.0.0.1:{port})"
                )
            },
        ),
        300..=399 => {
            let to = header("location").unwrap_or("nowhere");
            let cure = match to.split_once("/health").map(|(origin, _)| origin) {
                Some(origin) if origin.starts_with("https://") && origin != url => {
                    format!("set PUBLIC_URL={origin}")
                }
                _ => "remove the redirect or login in front of PUBLIC_URL".to_owned(),
            };
            (format!(" redirects to {}", shown_url(to)), cure)
        }
        401 | 403 => (
            format!(": something in front asks for a login or refuses ({brief})"),
            "let every request through: Twilio cannot log in, and callbridge checks its signature"
                .to_owned(),
        ),
        _ if port::is_older_callbridge(answer) => (
            " leads to an older callbridge, or a proxy drops what follows the ?".to_owned(),
            "stop the older one and start this one; let the proxy pass on the whole address"
                .to_owned(),
        ),
        _ => (
            format!(" leads to another program, which answered {brief}"),
            format!("forward the tunnel or proxy, with all paths, to port {port} of this machine"),
        ),
    }
}

fn explain_ngrok(code: &str, port: u16) -> (String, String) {
    match code {
        "ERR_NGROK_3200" => (
            format!(": the ngrok tunnel is down ({code})"),
            format!("start it: ngrok http {port}; then set PUBLIC_URL to its address, or to ngrok"),
        ),
        "ERR_NGROK_8012" => (
            format!(": ngrok forwards to a port where nothing listens ({code})"),
            format!("start it with this port: ngrok http {port}"),
        ),
        _ => (
            format!(": ngrok reports {code}"),
            format!("see ngrok.com/docs/errors/{}", code.to_lowercase()),
        ),
    }
}

/// `ERR_NGROK_3200` in one of its pages.
fn ngrok_error(page: &str) -> Option<String> {
    const SIGN: &str = "ERR_NGROK_";
    let (_, behind) = page.split_once(SIGN)?;
    let digits: String = behind.chars().take_while(char::is_ascii_digit).collect();
    Some(format!("{SIGN}{digits}"))
}
