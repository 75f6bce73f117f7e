//! The front door: one port for everything from outside, with a [`Hall`] behind it.
//!
//! Why not `tiny_http` alone? It hands over an upgraded socket as one object that cannot be read
//! and written at the same time, and a phone call does both all the time. It has no time limit for
//! a request's head and no limit on its size, lets a new connection wait behind an idle one, and
//! stops accepting for good when file descriptors run out. It also has two known holes that nobody
//! closes (CVE-2026-66752, CVE-2026-66753: see [`request`]). So this door reads a request's head,
//! within limits, writes it anew with what is needed of it, and then hands the whole connection on:
//! the media stream to the hall, on the connection's own thread; everything else to `tiny_http` on
//! loopback, and its request to the hall, on a thread of its own.
//!
//! It routes. It reads no bodies, and knows neither calls nor who may do what.
//!
//! ```text
//! door::open(listener, bridge, || bridge.config.max_calls.get())?;
//! ```

pub(crate) mod head;
pub(crate) mod health;
mod inner;
mod lobby;
pub(crate) mod reply;
pub(crate) mod request;

use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use std::{io, thread};

use crate::door::head::{Refusal, read_head, stream_token};
use crate::door::inner::{pass_to_http, start_http};
use crate::door::lobby::Lobby;
use crate::door::reply::Reply;
use crate::door::request::passed_on;
use crate::toolbox::log::{log, log_stranger};
use crate::toolbox::socket::WRITE_WITHIN;
use crate::toolbox::threads::{spawn_for_call, spawn_for_good};

pub(crate) use inner::REQUEST_WITHIN;
pub(crate) use lobby::Visitor;

/// Connections beside one for each of `MAX_CALLS`. The next is closed at once.
const CONNECTIONS_MAX: usize = 2_048;
/// Pause after a failed `accept` (out of file descriptors: nothing announces that one is free).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What is behind the door: the server, or what `callbridge check` puts in its place.
pub(crate) trait Hall: Sync {
    /// A request whose head is complete; its body may still be on the way.
    fn answer(&'static self, request: &mut tiny_http::Request) -> Reply;

    /// `GET /media-stream/<token>`, on a thread of its own. `head` is what has been read of it, and
    /// perhaps a little more. False, and at once: nobody waits for a stream with this token.
    fn take_stream(&'static self, token: &str, visitor: &Visitor, head: Vec<u8>) -> bool;
}

struct Door {
    hall: &'static dyn Hall,
    lobby: Lobby,
    /// `tiny_http`, listening on loopback.
    http: Mutex<Option<Arc<tiny_http::Server>>>,
}

/// From here on the hall is asked, for as long as the process lives.
pub(crate) fn open(
    listener: TcpListener,
    hall: &'static dyn Hall,
    max_calls: impl Fn() -> usize + Send + Sync + 'static,
) -> io::Result<()> {
    let lobby = Lobby::for_at_most(move || CONNECTIONS_MAX + max_calls());
    // Connections hold on to it until the process ends, so nobody could ever free it.
    let door: &'static Door = Box::leak(Box::new(Door { hall, lobby, http: Mutex::default() }));
    start_http(door)?;
    spawn_for_good("front door".into(), move || accept_all(door, &listener)).map(drop)
}

fn accept_all(door: &'static Door, listener: &TcpListener) -> ! {
    let mut said = false;
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                said = false;
                if let Err(error) = admit(door, socket) {
                    log_stranger(format_args!("a connection was turned away: {error}"));
                }
            }
            Err(error) => {
                if !said {
                    log!(Error, "cannot accept connections: {error}; trying on");
                    said = true;
                }
                thread::sleep(ACCEPT_PAUSE);
            }
        }
    }
}

fn admit(door: &'static Door, socket: TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    socket.set_write_timeout(Some(WRITE_WITHIN))?;
    let socket = Arc::new(socket);
    let visitor = Arc::new(door.lobby.enter(&socket)?);
    // It becomes thread T if a media stream is wanted.
    spawn_for_call("front door".into(), move || {
        let head = match read_head(&socket).and_then(|head| passed_on(&head)) {
            Ok(head) => head,
            Err(refusal) => return refusal.tell(&socket),
        };
        if let Some(token) = stream_token(&head) {
            if !door.hall.take_stream(&token, &visitor, head) {
                Refusal::Stranger.tell(&socket);
            }
        } else if let Err(error) = pass_to_http(door, &visitor, &head) {
            log!(Debug, "a request ended early: {error}");
        }
    })
    .map(drop)
}

#[cfg(test)]
mod tests;
