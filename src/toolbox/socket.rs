//! A WebSocket that two threads use at once: one reads, any may write.
//!
//! A WebSocket's state, and TLS's below it, want exclusive access for reading and for writing. A
//! call does both all the time, from two threads. The way out is to *wait outside the lock and
//! think inside it*: the reading thread waits in `read` on the bare TCP socket and holds nothing.
//! What it got is fed, under one short lock, into TLS and then into the protocol, which finds the
//! end of its food as `WouldBlock`. Writers take the same lock, write, and let go. So pings, closes
//! and TLS's own messages stay in order, and nothing polls.
//!
//! ```text
//! thread T:  loop { match socket.read(patience)? { (message, arrived) => … } }
//! thread U:  socket.send(Message::text(…))?;
//! ```
//!
//! It never opens a connection (`dial` does) and never answers an upgrade (the caller's leg does).

use std::collections::VecDeque;
use std::fmt::{self, Display};
use std::io::{self, BufRead as _, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::ClientConnection;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::protocol::{CloseFrame, Message, Role, WebSocketConfig, WebSocketContext};
use tungstenite::{Bytes, Utf8Bytes};

use crate::toolbox::threads::lock;

/// A peer that takes nothing for this long is dead, not a reason to hang.
pub(crate) const WRITE_WITHIN: Duration = Duration::from_secs(5);
/// One message from Twilio. A frame takes 300 bytes.
const TWILIO_MESSAGE_BYTES_MAX: usize = 64 * 1_024;
/// One message from Ultravox. Thirty seconds of PCM take 480,000 bytes.
pub(crate) const AGENT_MESSAGE_BYTES_MAX: usize = 1_024 * 1_024;
/// What one `read` takes from a socket.
pub(crate) const READ_BYTES: usize = 2 * 1_024;
/// What each leg keeps for messages to come: a few frames. Longer ones get their own.
const MESSAGE_BUFFER_BYTES: usize = 1_024;

/// One leg of a call: a WebSocket over TCP or TLS, read by one thread and written by any.
pub(crate) struct Socket {
    pub(super) socket: Arc<TcpStream>,
    pub(super) state: Mutex<SocketState>,
}

pub(super) struct SocketState {
    websocket: WebSocketContext,
    pub(super) tls: Option<Box<ClientConnection>>,
    /// Plain bytes that have arrived and were not understood yet.
    pub(super) arrived: Arrived,
    /// The socket's read timeout, remembered to save the system call.
    patience: Duration,
}

pub(super) struct Arrived {
    pub(super) bytes: VecDeque<u8>,
    /// When the latest of them were read off the socket.
    at: Instant,
    pub(super) ended: bool,
}

/// A whole message. Pings and pongs are dealt with further down.
pub(crate) enum Received {
    Text(Utf8Bytes),
    Binary(Bytes),
}

/// Why nothing more comes.
#[derive(Debug)]
pub(crate) enum SocketEnd {
    /// Nothing within the reader's patience. The connection may still be good.
    Quiet,
    /// The peer said goodbye, with this code if any.
    Closed(Option<u16>),
    /// The connection broke without a goodbye.
    Broken(String),
    /// The peer sent what is not WebSocket, or too much of it. It has been told.
    Nonsense(String),
}

impl Display for SocketEnd {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            SocketEnd::Quiet => f.write_str("nothing came for too long"),
            SocketEnd::Closed(Some(code)) => write!(f, "closed with code {code}"),
            SocketEnd::Closed(None) => f.write_str("closed"),
            SocketEnd::Broken(why) => write!(f, "the connection broke: {why}"),
            SocketEnd::Nonsense(why) => write!(f, "nonsense on the connection: {why}"),
        }
    }
}

impl Socket {
    /// `early` is what came together with the end of the handshake.
    pub(crate) fn new(
        socket: Arc<TcpStream>,
        tls: Option<Box<ClientConnection>>,
        early: Vec<u8>,
        role: Role,
    ) -> Socket {
        let limit = match role {
            Role::Server => TWILIO_MESSAGE_BYTES_MAX,
            Role::Client => AGENT_MESSAGE_BYTES_MAX,
        };
        let config = WebSocketConfig::default()
            .read_buffer_size(MESSAGE_BUFFER_BYTES)
            // Every message goes out at once, with one write.
            .write_buffer_size(0)
            .max_message_size(Some(limit))
            .max_frame_size(Some(limit));
        let state = SocketState {
            websocket: WebSocketContext::new(role, Some(config)),
            tls,
            arrived: Arrived { bytes: early.into(), at: Instant::now(), ended: false },
            patience: Duration::ZERO,
        };
        Socket { socket, state: Mutex::new(state) }
    }

    /// The next message, and when the last of it was read off the socket. Only one thread may call
    /// this. `patience` is how long a message may take, give or take as much again for one that
    /// arrives in small pieces.
    pub(crate) fn read(&self, patience: Duration) -> Result<(Received, Instant), SocketEnd> {
        let began = Instant::now();
        let mut chunk = [0; READ_BYTES];
        let (mut count, mut at) = (0, began);
        loop {
            {
                let mut state = lock(&self.state);
                if count > 0 {
                    state.arrived.at = at;
                    state
                        .feed(&chunk[..count], &self.socket)
                        .map_err(|error| SocketEnd::Broken(error.to_string()))?;
                }
                if let Some(received) = state.next_message(&self.socket) {
                    return received.map(|received| (received, state.arrived.at));
                }
                if began.elapsed() >= patience {
                    return Err(SocketEnd::Quiet);
                }
                if state.patience != patience {
                    self.socket
                        .set_read_timeout(Some(patience))
                        .map_err(|error| SocketEnd::Broken(error.to_string()))?;
                    state.patience = patience;
                }
            }
            // Here, and only here, the thread waits. It holds no lock.
            let read = (&*self.socket).read(&mut chunk);
            at = Instant::now();
            count = match read {
                Ok(0) => {
                    lock(&self.state).arrived.ended = true;
                    0
                }
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) if is_timeout(&error) => return Err(SocketEnd::Quiet),
                Err(error) => return Err(SocketEnd::Broken(error.to_string())),
            };
        }
    }

    pub(crate) fn send(&self, message: Message) -> Result<(), SocketEnd> {
        let mut state = lock(&self.state);
        let SocketState { websocket, tls, arrived, .. } = &mut *state;
        let mut wire = Wire { socket: &self.socket, tls: tls.as_deref_mut(), arrived };
        websocket.write(&mut wire, message).and_then(|()| websocket.flush(&mut wire)).map_err(
            |error| {
                let end = socket_end(error);
                if let SocketEnd::Broken(_) = end {
                    // The reader is to hear of it at once, and nobody is to wait here again.
                    self.shut();
                }
                end
            },
        )
    }

    /// Says goodbye. What the peer still sends can be read until its own goodbye comes.
    pub(crate) fn close(&self, code: CloseCode, why: &str) {
        let mut state = lock(&self.state);
        let SocketState { websocket, tls, arrived, .. } = &mut *state;
        let mut wire = Wire { socket: &self.socket, tls: tls.as_deref_mut(), arrived };
        // A control frame holds 125 bytes, two of them the code (RFC 6455, 5.5).
        let reason: String = why.chars().filter(char::is_ascii).take(120).collect();
        if websocket.close(&mut wire, Some(CloseFrame { code, reason: reason.into() })).is_err() {
            // It was closed or broken before: there is nobody to say goodbye to.
        }
    }

    /// Gives the peer a moment to answer our goodbye, so that it is not cut off by a reset.
    pub(crate) fn await_close(&self) {
        const CLOSE_WITHIN: Duration = Duration::from_secs(1);
        let deadline = Instant::now() + CLOSE_WITHIN;
        while Instant::now() < deadline && self.read(CLOSE_WITHIN).is_ok() {}
        self.shut();
    }

    pub(crate) fn shut(&self) {
        shut(&self.socket);
    }
}

impl SocketState {
    /// A message, an end, or `None`: more bytes are needed.
    fn next_message(&mut self, socket: &TcpStream) -> Option<Result<Received, SocketEnd>> {
        let mut wire = Wire { socket, tls: self.tls.as_deref_mut(), arrived: &mut self.arrived };
        loop {
            return match self.websocket.read(&mut wire) {
                Ok(Message::Text(text)) => Some(Ok(Received::Text(text))),
                Ok(Message::Binary(bytes)) => Some(Ok(Received::Binary(bytes))),
                Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => continue,
                Ok(Message::Close(frame)) => {
                    if self.websocket.flush(&mut wire).is_err() {
                        // Our answer to the goodbye; the peer need not wait for it.
                    }
                    Some(Err(SocketEnd::Closed(frame.map(|frame| frame.code.into()))))
                }
                Err(tungstenite::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    None
                }
                Err(error) => {
                    // RFC 6455, 7.4.1.
                    let code = match &error {
                        tungstenite::Error::Utf8(_) => CloseCode::Invalid,
                        tungstenite::Error::Capacity(_) => CloseCode::Size,
                        _ => CloseCode::Protocol,
                    };
                    let end = socket_end(error);
                    if let SocketEnd::Nonsense(why) = &end {
                        let reason =
                            why.chars().filter(char::is_ascii).take(120).collect::<String>();
                        let frame = CloseFrame { code, reason: reason.into() };
                        if self.websocket.close(&mut wire, Some(frame)).is_err() {
                            // It does not speak the protocol anyway.
                        }
                    }
                    Some(Err(end))
                }
            };
        }
    }

    /// Bytes off the wire become plain bytes. TLS may have something to say in return.
    pub(super) fn feed(&mut self, mut bytes: &[u8], socket: &TcpStream) -> io::Result<()> {
        let Some(tls) = &mut self.tls else {
            self.arrived.bytes.extend(bytes);
            return Ok(());
        };
        while !bytes.is_empty() {
            if tls.read_tls(&mut bytes)? == 0 {
                // The peer has ended TLS; what it sends behind that counts for nothing.
                self.arrived.ended = true;
                return Ok(());
            }
            let progress = tls.process_new_packets().map_err(io::Error::other);
            while tls.wants_write() {
                tls.write_tls(&mut &*socket).map_err(dead_peer)?;
            }
            let progress = progress?;
            self.arrived.ended |= progress.peer_has_closed();
            let mut left = progress.plaintext_bytes_to_read();
            let mut reader = tls.reader();
            while left > 0 {
                let plain = reader.fill_buf()?;
                let count = plain.len();
                if count == 0 {
                    // Less than announced: without this the thread would turn here for ever.
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                self.arrived.bytes.extend(plain);
                reader.consume(count);
                left -= count;
            }
        }
        Ok(())
    }
}

/// The stream that tungstenite sees: reads what has arrived, writes to the peer.
pub(super) struct Wire<'a> {
    pub(super) socket: &'a TcpStream,
    pub(super) tls: Option<&'a mut ClientConnection>,
    pub(super) arrived: &'a mut Arrived,
}

impl Read for Wire<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.arrived.bytes.is_empty() && !self.arrived.ended {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.arrived.bytes.read(buffer)
    }
}

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else {
            return (&*self.socket).write(bytes).map_err(dead_peer);
        };
        let count = tls.writer().write(bytes)?;
        while tls.wants_write() {
            tls.write_tls(&mut &*self.socket).map_err(dead_peer)?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A write that ran out of time is the end of the connection. tungstenite would take the
/// `WouldBlock` by which the system reports it for "later".
fn dead_peer(error: io::Error) -> io::Error {
    if is_timeout(&error) { io::Error::other("the peer takes nothing any more") } else { error }
}

pub(crate) fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn socket_end(error: tungstenite::Error) -> SocketEnd {
    use tungstenite::error::ProtocolError;
    match error {
        tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed => {
            SocketEnd::Closed(None)
        }
        tungstenite::Error::Protocol(ProtocolError::SendAfterClosing) => SocketEnd::Closed(None),
        tungstenite::Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => {
            SocketEnd::Broken("no goodbye".into())
        }
        tungstenite::Error::Io(error) => SocketEnd::Broken(error.to_string()),
        other => SocketEnd::Nonsense(other.to_string()),
    }
}

pub(crate) fn shut(socket: &TcpStream) {
    if socket.shutdown(Shutdown::Both).is_err() {
        // The peer was faster.
    }
}

#[cfg(test)]
mod tests;
