//! Full-duplex WebSockets for the stand-ins: one thread reads while others write.
//!
//! tungstenite wants `&mut` for both, so each direction gets a protocol object of its own over
//! the same TCP socket: one that only reads and is mute, one that only writes, under a lock.
//! What the reading one would like to answer (pong, close) the writing one sends.
//!
//! Simplification: the server itself does it differently (one state, fed under one lock). The
//! pretend world takes the shorter way on purpose, so that both do not share a mistake.

use std::io::{self, Read, Write};
use std::net::TcpStream;

use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tungstenite::{Message, WebSocket};

/// How a socket ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With a close frame; 1000 is an ordinary one.
    Closed(Option<u16>),
    /// Without.
    Broken(String),
}

/// The reading half of a socket. Once mute, it swallows what is written.
pub(super) struct Ear {
    tcp: TcpStream,
    mute: bool,
}

impl Ear {
    pub(super) fn of(tcp: &TcpStream) -> io::Result<Ear> {
        Ok(Ear { tcp: tcp.try_clone()?, mute: false })
    }
}

impl Read for Ear {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.tcp.read(buffer)
    }
}

impl Write for Ear {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.mute { Ok(bytes.len()) } else { self.tcp.write(bytes) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(super) enum Incoming {
    Text(String),
    Binary(Vec<u8>),
    /// What the writing half shall answer.
    Reply(Message),
}

/// After the handshake: one object to read, one to write.
pub(super) fn split_socket(
    mut socket: WebSocket<Ear>,
    role: Role,
) -> io::Result<(WebSocket<Ear>, WebSocket<TcpStream>)> {
    socket.get_mut().mute = true;
    let tcp = socket.get_ref().tcp.try_clone()?;
    Ok((socket, WebSocket::from_raw_socket(tcp, role, Some(small_buffers()))))
}

/// Reads until the end and hands everything to `hear`.
pub(super) fn listen(reader: &mut WebSocket<Ear>, mut hear: impl FnMut(Incoming)) -> Ending {
    loop {
        match reader.read() {
            Ok(Message::Text(text)) => hear(Incoming::Text(text.as_str().to_owned())),
            Ok(Message::Binary(bytes)) => hear(Incoming::Binary(bytes.to_vec())),
            Ok(Message::Ping(payload)) => hear(Incoming::Reply(Message::Pong(payload))),
            Ok(Message::Pong(_) | Message::Frame(_)) => {}
            Ok(Message::Close(frame)) => {
                let code = frame.as_ref().map(|frame| u16::from(frame.code));
                // If we have closed first this is refused, which is right.
                hear(Incoming::Reply(Message::Close(frame)));
                return Ending::Closed(code);
            }
            Err(error) => return Ending::Broken(error.to_string()),
        }
    }
}

pub(super) fn normal_close() -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }))
}

pub(super) fn small_buffers() -> WebSocketConfig {
    WebSocketConfig::default().read_buffer_size(8 * 1024).write_buffer_size(0)
}
