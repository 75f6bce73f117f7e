//! A socket of the benchmark, plain or behind TLS: read by one thread, written by several.
//!
//! Unlike the demo's it takes no pump threads and remembers nothing: the way of a frame costs
//! no allocation, so that the world is cheaper than what it measures.

use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};

use crate::demo::PATIENCE;
use crate::demo::backstage::{lock, moot};
use crate::demo::http::connect;

/// A socket, plain or behind TLS: read by one thread, written by several. Clones are the same line.
#[derive(Clone)]
pub(super) struct Line {
    shared: Arc<LineState>,
}

struct LineState {
    tcp: TcpStream,
    tls: Option<Mutex<rustls::ServerConnection>>,
    /// Messages leave in one piece.
    turn: Mutex<()>,
}

impl Line {
    pub(super) fn new(tcp: TcpStream, tls: Option<&Arc<rustls::ServerConfig>>) -> io::Result<Line> {
        let tls = match tls {
            None => None,
            Some(config) => Some(Mutex::new(
                rustls::ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?,
            )),
        };
        Ok(Line { shared: Arc::new(LineState { tcp, tls, turn: Mutex::default() }) })
    }

    /// A phone's. There is always sound on it, so silence is its end.
    pub(super) fn to(address: SocketAddr) -> io::Result<Line> {
        let tcp = connect(address)?;
        tcp.set_read_timeout(Some(PATIENCE))?;
        Line::new(tcp, None)
    }

    pub(super) fn reader(&self) -> BufReader<Line> {
        BufReader::with_capacity(4 * 1_024, self.clone())
    }

    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let LineState { tcp, tls, turn } = &*self.shared;
        let turn = lock(turn);
        if let Some(tls) = tls {
            let mut tls = lock(tls);
            tls.writer().write_all(bytes)?;
            return say_in_tls(&mut tls, tcp);
        }
        let written = (&mut &*tcp).write_all(bytes);
        drop(turn);
        written
    }

    pub(super) fn stop_waiting(&self) -> io::Result<()> {
        self.shared.tcp.set_nonblocking(true)
    }

    pub(super) fn shut(&self) {
        moot(self.shared.tcp.shutdown(Shutdown::Both));
    }
}

impl Read for Line {
    /// Waits on the bare socket, with no lock held.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let LineState { tcp, tls, .. } = &*self.shared;
        let Some(tls) = tls else { return (&mut &*tcp).read(buffer) };
        let mut chunk = [0; 4 * 1_024];
        loop {
            match lock(tls).reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read,
            }
            let count = (&mut &*tcp).read(&mut chunk)?;
            let mut sealed = chunk.get(..count).unwrap_or_default();
            if sealed.is_empty() {
                return Ok(0);
            }
            let mut tls = lock(tls);
            while !sealed.is_empty() {
                tls.read_tls(&mut sealed)?;
                let state = tls.process_new_packets();
                // Even a failed handshake has something to say: why.
                say_in_tls(&mut tls, tcp)?;
                state.map_err(io::Error::other)?;
            }
        }
    }
}

fn say_in_tls(tls: &mut rustls::ServerConnection, tcp: &TcpStream) -> io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(&mut &*tcp)?;
    }
    Ok(())
}
