//! The audio socket: opens `/media-stream/check` at `PUBLIC_URL` as Twilio would open a call's,
//! signed as Twilio signs, and lets it go.
//!
//! It tells a proxy that passes no WebSocket upgrades from a callbridge that was started with
//! another Auth Token or address. No call waits for this stream, so no call begins and no agent is
//! created; a running server opens it and closes it again.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::hmac;
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};
use tungstenite::client::IntoClientRequest as _;
use tungstenite::http::HeaderValue;
use tungstenite::{Error as SocketError, HandshakeError};

use super::http::shown_url;
use super::report::{Finding, Topic};
use super::setup::Setup;
use crate::parties::twilio::stream::CHECK;
use crate::parties::twilio::twiml::stream_url;
use crate::toolbox::dial::{InTime, connect};
use crate::toolbox::failure::Secret;

/// The upgrade of the audio socket, once the address is known to lead here.
pub(super) const UPGRADE_WITHIN: Duration = Duration::from_millis(2_100);

const WEBSOCKET: Topic = Topic::new("PUBLIC_URL", "websocket");

pub(super) fn audio_socket(setup: &Setup, url: &str) -> Finding {
    let what = match upgrade(setup, url) {
        Ok(()) => return WEBSOCKET.ok("the audio socket opens (WebSocket upgrade)"),
        Err(SocketError::Http(answer)) => match answer.status().as_u16() {
            403 => {
                return WEBSOCKET.wrong(
                    format!(
                        "{}: the running callbridge refuses our signature (403): it was \
                         started with other settings",
                        shown_url(&address(url))
                    ),
                    "restart it, so that it uses TWILIO_AUTH_TOKEN and PUBLIC_URL as they \
                     are now",
                );
            }
            status @ (200 | 400 | 404 | 405 | 426) => {
                format!("a proxy does not pass on the WebSocket upgrade ({status})")
            }
            status => format!("no WebSocket upgrade, status {status}"),
        },
        Err(error) => format!("no WebSocket upgrade: {error}"),
    };
    WEBSOCKET.wrong(
        format!("{}: {what}", shown_url(&address(url))),
        "turn on WebSocket upgrades in the proxy (nginx: proxy_http_version 1.1, and the \
         headers Upgrade and Connection; Caddy, ngrok and cloudflared need nothing)",
    )
}

fn address(url: &str) -> String {
    stream_url(url, CHECK)
}

fn upgrade(setup: &Setup, url: &str) -> Result<(), SocketError> {
    let bridge = setup.bridge;
    let address = address(url);
    let mut request = address.as_str().into_client_request()?;
    if let Some(token) = &bridge.config.twilio_auth_token {
        let signature = HeaderValue::from_str(&sign_as_twilio(token, &address))
            .map_err(|error| SocketError::Io(io::Error::other(error)))?;
        request.headers_mut().insert("X-Twilio-Signature", signature);
    }
    let uri = request.uri().clone();
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    let socket = connect(&host, uri.port_u16().unwrap_or(443))?;
    let name = ServerName::try_from(host).map_err(io::Error::other)?;
    let tls = ClientConnection::new(Arc::clone(&bridge.tls), name).map_err(io::Error::other)?;
    let deadline = Instant::now() + UPGRADE_WITHIN;
    let stream = StreamOwned::new(tls, InTime { socket: &socket, deadline });
    match tungstenite::client::client(request, stream) {
        Ok((mut socket, _)) => {
            // Said in order, so that nobody warns of it.
            if socket.close(None).and_then(|()| socket.flush()).is_err() {
                // It opened, and that was the question.
            }
            Ok(())
        }
        Err(HandshakeError::Failure(error)) => Err(error),
        Err(HandshakeError::Interrupted(_)) => Err(SocketError::Io(io::ErrorKind::TimedOut.into())),
    }
}

fn sign_as_twilio(token: &Secret, address: &str) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, token.reveal().as_bytes());
    BASE64.encode(hmac::sign(&key, address.as_bytes()).as_ref())
}
