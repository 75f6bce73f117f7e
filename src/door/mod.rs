//! The front door: one port for everything from outside.

pub(crate) mod head;
pub(crate) mod inner;
pub(crate) mod reply;
pub(crate) mod request;

use std::collections::VecDeque;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use std::{io, thread};

use crate::door::head::{read_head, wants_media_stream};
use crate::door::inner::pass_to_http;
use crate::door::request::passed_on;
use crate::toolbox::log::log;
use crate::toolbox::metrics::refused;
use crate::toolbox::socket::{WRITE_WITHIN, shut};
use crate::toolbox::threads::{lock, spawn_for_call};
use crate::{Bridge, media_stream};

/// Connections that have not said yet what they want: a whole head, the body it announces, a
/// stream's token. One more closes the oldest: whoever means it has said so within milliseconds,
/// whoever idles is the one to lose.
pub(crate) const UNDECIDED_MAX: usize = 256;
/// Connections beside one for each of `MAX_CALLS`. The next is closed at once.
pub(crate) const CONNECTIONS_MAX: usize = 2_048;
/// Pause after a failed `accept` (out of file descriptors: nothing announces that one is free).
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

pub(crate) fn front_door(bridge: &'static Bridge, listener: &TcpListener) -> ! {
    let mut said = false;
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                said = false;
                if let Err(error) = admit(bridge, socket) {
                    log!(Warn, "a connection was turned away: {error}");
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

pub(crate) fn admit(bridge: &'static Bridge, socket: TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    socket.set_write_timeout(Some(WRITE_WITHIN))?;
    let socket = Arc::new(socket);
    let visit = Arc::new(Lobby::enter(bridge, &socket)?);
    // It becomes thread T if a media stream is wanted.
    spawn_for_call("front door".into(), move || {
        let head = match read_head(&socket).and_then(|head| passed_on(&head)) {
            Ok(head) => head,
            Err(refusal) => return refusal.tell(&socket),
        };
        if wants_media_stream(&head) {
            media_stream(bridge, &visit, head);
        } else if let Err(error) = pass_to_http(bridge, &visit, &head) {
            log!(Debug, "a request ended early: {error}");
        }
    })
    .map(drop)
}

/// Who is inside, and who has not yet said what they want.
#[derive(Default)]
pub(crate) struct Lobby {
    pub(crate) inside: AtomicUsize,
    pub(crate) undecided: Mutex<VecDeque<Arc<TcpStream>>>,
    /// Said once for each time that it fills up.
    pub(crate) crowded: AtomicBool,
}

/// One connection's stay. Dropping it makes room.
pub(crate) struct Visit {
    pub(crate) lobby: &'static Lobby,
    pub(crate) socket: Arc<TcpStream>,
}

impl Lobby {
    pub(crate) fn enter(bridge: &'static Bridge, socket: &Arc<TcpStream>) -> io::Result<Visit> {
        let lobby = &bridge.lobby;
        let most = CONNECTIONS_MAX + bridge.config.max_calls;
        let inside = lobby.inside.fetch_add(1, Ordering::SeqCst);
        let visit = Visit { lobby, socket: Arc::clone(socket) };
        if inside >= most {
            refused("too_many_connections");
            return Err(io::Error::other(format!("{most} connections are open")));
        }
        let mut undecided = lock(&lobby.undecided);
        undecided.push_back(Arc::clone(socket));
        if undecided.len() > UNDECIDED_MAX
            && let Some(oldest) = undecided.pop_front()
        {
            // Its thread wakes up with an end of file.
            shut(&oldest);
            refused("idle_connection");
            if !lobby.crowded.swap(true, Ordering::SeqCst) {
                log!(Warn, "more than {UNDECIDED_MAX} connections idle; the oldest make room");
            }
        }
        Ok(visit)
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.is_decided();
        self.lobby.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Visit {
    pub(crate) fn is_decided(&self) {
        let mut undecided = lock(&self.lobby.undecided);
        undecided.retain(|socket| !Arc::ptr_eq(socket, &self.socket));
        if undecided.len() < UNDECIDED_MAX / 2 {
            self.lobby.crowded.store(false, Ordering::SeqCst);
        }
    }
}
