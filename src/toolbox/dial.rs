//! Opens a WebSocket to somebody else: TCP, TLS for `wss`, the client's half of the upgrade (RFC
//! 6455, 4.1).
//!
//! Each of the three has [`JOIN_WITHIN`] as a whole, however slowly the other side drips its bytes.
//! What the other side says in the same breath as its upgrade is kept for the first `read`.
//! Nothing is retried here, and no certificate is trusted that `http::trusted_roots` does not name.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};
use tungstenite::client::IntoClientRequest as _;
use tungstenite::handshake::machine::TryParse as _;
use tungstenite::handshake::{client as ws_client, derive_accept_key};
use tungstenite::protocol::Role;

use crate::toolbox::failure::{Failure, Party, Secret};
use crate::toolbox::socket::{READ_BYTES, Socket, SocketState, WRITE_WITHIN, Wire, is_timeout};
use crate::toolbox::threads::lock;

/// Joining the agent's WebSocket: connect, TLS, upgrade, each.
const JOIN_WITHIN: Duration = Duration::from_secs(5);
/// The head of the answer to an upgrade.
const HEAD_BYTES_MAX: usize = 16 * 1_024;

/// Opens the agent's leg: TCP, TLS for `wss`, WebSocket upgrade.
pub(crate) fn dial(url: &Secret, tls: &Arc<ClientConfig>) -> Result<Socket, Failure> {
    let failed =
        |what: &str| Failure::new(Party::Ultravox, format!("could not join the call: {what}"));
    let request =
        url.reveal().into_client_request().map_err(|_| failed("its join URL cannot be read"))?;
    let uri = request.uri().clone();
    let secure = uri.scheme_str() == Some("wss");
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let socket =
        Arc::new(connect(&host, port).map_err(|error| failed("no connection").caused_by(error))?);
    let tls = if secure {
        let name = ServerName::try_from(host)
            .map_err(|error| failed("its host's name").caused_by(error))?;
        let connection = ClientConnection::new(Arc::clone(tls), name)
            .map_err(|error| failed("TLS").caused_by(error))?;
        let mut connection = Box::new(connection);
        let mut in_time = InTime { socket: &socket, deadline: Instant::now() + JOIN_WITHIN };
        while connection.is_handshaking() {
            connection.complete_io(&mut in_time).map_err(|error| failed("TLS").caused_by(error))?;
        }
        Some(connection)
    } else {
        None
    };
    let (bytes, key) = ws_client::generate_request(request)
        .map_err(|error| failed("its join URL").caused_by(error))?;
    let line = Socket::new(socket, tls, Vec::new(), Role::Client);
    line.upgrade(&bytes, &key).map_err(|error| failed("no upgrade").caused_by(error))?;
    Ok(line)
}

pub(crate) fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, JOIN_WITHIN) {
            Ok(socket) => {
                socket.set_nodelay(true)?;
                socket.set_read_timeout(Some(JOIN_WITHIN))?;
                socket.set_write_timeout(Some(WRITE_WITHIN))?;
                return Ok(socket);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

impl Socket {
    /// The client's half of the upgrade (RFC 6455, 4.1). What comes behind the answer's head stays
    /// in `arrived`: the agent may speak in the same breath.
    pub(crate) fn upgrade(&self, request: &[u8], key: &str) -> io::Result<()> {
        let mut state = lock(&self.state);
        let SocketState { tls, arrived, .. } = &mut *state;
        Wire { socket: &self.socket, tls: tls.as_deref_mut(), arrived }.write_all(request)?;
        let mut in_time = InTime { socket: &self.socket, deadline: Instant::now() + JOIN_WITHIN };
        let mut chunk = [0; READ_BYTES];
        loop {
            let parsed = ws_client::Response::try_parse(state.arrived.bytes.make_contiguous())
                .map_err(io::Error::other)?;
            if let Some((length, response)) = parsed {
                let accepted = response
                    .headers()
                    .get("Sec-WebSocket-Accept")
                    .is_some_and(|accept| *accept == derive_accept_key(key.as_bytes()));
                state.arrived.bytes.drain(..length);
                return match response.status().as_u16() {
                    101 if accepted => Ok(()),
                    101 => Err(io::Error::other("the upgrade's answer is not for us")),
                    status => Err(io::Error::other(format!("HTTP status {status}"))),
                };
            }
            if state.arrived.bytes.len() > HEAD_BYTES_MAX {
                return Err(io::Error::other("the upgrade's answer is too long"));
            }
            match in_time.read(&mut chunk)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => state.feed(&chunk[..count], &self.socket)?,
            }
        }
    }
}

/// A socket with one deadline for all that is read from it. With a time limit for each `read`, a
/// peer that sends a byte now and then would never run out of time.
pub(crate) struct InTime<'a> {
    pub(crate) socket: &'a TcpStream,
    pub(crate) deadline: Instant,
}

impl Read for InTime<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let late = || io::Error::new(io::ErrorKind::TimedOut, "not in time");
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        self.socket.set_read_timeout(Some(left))?;
        let read = (&*self.socket).read(buffer);
        read.map_err(|error| if is_timeout(&error) { late() } else { error })
    }
}

impl Write for InTime<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self.socket).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
