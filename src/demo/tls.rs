//! TLS in front of a stand-in: a socket in plain text on this side, records on the other.
//!
//! [`Plug`] is either a bare socket or one end of a loopback pair, whose other end two pump
//! threads carry into TLS and out of it. Both block on a bare socket and hold no lock
//! meanwhile. When a plug is dropped, what is still under way (a close frame) is sent before
//! the pumps end.
//!
//! The certificates are made in [`certificate`](super::certificate).

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::demo::WRITE_WITHIN;
use crate::demo::backstage::{lock, moot, spawn};
use crate::demo::http::connect;

/// A socket in plain text, be there TLS in front of it or not.
pub(super) struct Plug {
    pub(super) socket: TcpStream,
    /// The socket in TLS, and the same `rude` as below.
    #[cfg(test)]
    behind_tls: Option<(TcpStream, Arc<AtomicBool>)>,
    pumps: Vec<JoinHandle<()>>,
}

/// What the tests cut a line with.
#[cfg(test)]
pub(super) struct Scissors {
    /// The socket in plain text.
    pub(super) socket: TcpStream,
    /// The same socket, or the one in TLS.
    pub(super) wire: TcpStream,
    /// Set to end TLS without saying goodbye.
    pub(super) rude: Arc<AtomicBool>,
}

/// TLS between the outer socket and an inner one in plain text.
struct Terminator {
    tls: Mutex<rustls::Connection>,
    /// Records must leave in the order in which they were made: whoever wants
    /// to send takes this lock first, then makes them, then writes.
    outer: Mutex<TcpStream>,
    /// Whether TLS ends without saying goodbye, which only the tests ask for.
    rude: Arc<AtomicBool>,
}

impl Plug {
    pub(super) fn bare(socket: TcpStream) -> Plug {
        Plug {
            socket,
            #[cfg(test)]
            behind_tls: None,
            pumps: Vec::new(),
        }
    }

    /// One connection in TLS, carried to a plain listener for as long as it lasts.
    pub(super) fn from_tls_to(
        outer: TcpStream,
        tls: &Arc<rustls::ServerConfig>,
        plain: SocketAddr,
    ) -> io::Result<()> {
        let tls = rustls::ServerConnection::new(Arc::clone(tls)).map_err(io::Error::other)?;
        let inner = TcpStream::connect(plain)?;
        let mut plug = Plug::with_pumps(outer, tls.into(), inner.try_clone()?, inner)?;
        for pump in plug.pumps.drain(..) {
            moot(pump.join());
        }
        Ok(())
    }

    pub(super) fn behind_tls(outer: TcpStream, tls: rustls::Connection) -> io::Result<Plug> {
        let (socket, inner) = socket_pair()?;
        Plug::with_pumps(outer, tls, socket, inner)
    }

    /// Two pumps, one each way. Both block on a bare socket, with no lock.
    fn with_pumps(
        outer: TcpStream,
        mut tls: rustls::Connection,
        socket: TcpStream,
        inner: TcpStream,
    ) -> io::Result<Plug> {
        tls.set_buffer_limit(None);
        let rude = Arc::<AtomicBool>::default();
        let terminator = Arc::new(Terminator {
            tls: Mutex::new(tls),
            outer: Mutex::new(outer.try_clone()?),
            rude: Arc::clone(&rude),
        });
        let (from, to) = (outer.try_clone()?, inner.try_clone()?);
        #[cfg(test)]
        let behind_tls = Some((outer.try_clone()?, Arc::clone(&rude)));
        let inward = Arc::clone(&terminator);
        let inward = spawn("tls inward", move || {
            moot(inward.pump_in(&from, &to));
            moot(to.shutdown(Shutdown::Both));
        })?;
        let outward = spawn("tls outward", move || {
            moot(terminator.pump_out(&inner));
            moot(outer.shutdown(Shutdown::Both));
        })?;
        Ok(Plug {
            socket,
            #[cfg(test)]
            behind_tls,
            pumps: vec![outward, inward],
        })
    }

    #[cfg(test)]
    pub(super) fn scissors(&self) -> io::Result<Scissors> {
        let (wire, rude) = match &self.behind_tls {
            Some((wire, rude)) => (wire.try_clone()?, Arc::clone(rude)),
            None => (self.socket.try_clone()?, Arc::default()),
        };
        Ok(Scissors { socket: self.socket.try_clone()?, wire, rude })
    }
}

impl Drop for Plug {
    fn drop(&mut self) {
        moot(self.socket.shutdown(if self.pumps.is_empty() {
            Shutdown::Both
        } else {
            Shutdown::Write
        }));
        // What is still under way (a close frame) is sent before this returns.
        for pump in self.pumps.drain(..) {
            moot(pump.join());
        }
    }
}

impl Terminator {
    fn pump_in(&self, mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
        let mut buffer = [0; 16 * 1024];
        loop {
            let count = from.read(&mut buffer)?;
            let mut sealed = buffer.get(..count).unwrap_or_default();
            if sealed.is_empty() {
                return Ok(());
            }
            let mut plain = Vec::new();
            let mut state = Ok(());
            while !sealed.is_empty() && state.is_ok() {
                let mut tls = lock(&self.tls);
                tls.read_tls(&mut sealed)?;
                state = tls.process_new_packets().map(|_| ()).map_err(io::Error::other);
                // Reading stops with an error when there is no more for now.
                moot(tls.reader().read_to_end(&mut plain));
            }
            // Even a failed handshake has something to say: why.
            self.flush()?;
            to.write_all(&plain)?;
            state?;
        }
    }

    fn pump_out(&self, mut inner: &TcpStream) -> io::Result<()> {
        let mut buffer = [0; 16 * 1024];
        loop {
            let count = inner.read(&mut buffer).unwrap_or(0);
            if count == 0 {
                if !self.rude.load(Ordering::Acquire) {
                    lock(&self.tls).send_close_notify();
                    self.flush()?;
                }
                return Ok(());
            }
            lock(&self.tls).writer().write_all(buffer.get(..count).unwrap_or_default())?;
            self.flush()?;
        }
    }

    fn flush(&self) -> io::Result<()> {
        let mut outer = lock(&self.outer);
        let mut sealed = Vec::new();
        let mut tls = lock(&self.tls);
        while tls.wants_write() {
            tls.write_tls(&mut sealed)?;
        }
        drop(tls);
        outer.write_all(&sealed)
    }
}

/// Two ends of one loopback connection.
fn socket_pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let near = connect(listener.local_addr()?)?;
    loop {
        let (far, from) = listener.accept()?;
        // Anybody on this machine may knock. Only the one we called counts.
        if from == near.local_addr()? {
            far.set_nodelay(true)?;
            far.set_write_timeout(Some(WRITE_WITHIN))?;
            return Ok((near, far));
        }
    }
}
