//! Who is inside, and who has not yet said what they want.
//!
//! Everybody who comes in is a [`Visitor`] until they leave. Their number is bounded, and so is
//! the number of those who only stand there: the oldest of these make room. Whoever has given a
//! whole request has decided and is never sent away for that; of a media stream, whoever has shown
//! a token that a call waits for.

use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::toolbox::log::log_refusal;
use crate::toolbox::metrics::refused;
use crate::toolbox::socket::shut;
use crate::toolbox::threads::lock;

/// Connections that have not said yet what they want: a whole head, and the body it announces. One
/// more closes the oldest: whoever means it has said so within milliseconds,
/// whoever idles is the one to lose.
const UNDECIDED_MAX: usize = 256;

pub(super) struct Lobby {
    /// Asked whenever somebody enters: an account may come to allow more calls.
    most: Box<dyn Fn() -> usize + Send + Sync>,
    inside: AtomicUsize,
    undecided: Mutex<VecDeque<Arc<TcpStream>>>,
}

/// One connection's stay. Dropping it makes room.
pub(crate) struct Visitor {
    pub(crate) socket: Arc<TcpStream>,
    lobby: &'static Lobby,
}

impl Lobby {
    pub(super) fn for_at_most(most: impl Fn() -> usize + Send + Sync + 'static) -> Lobby {
        Lobby { most: Box::new(most), inside: AtomicUsize::new(0), undecided: Mutex::default() }
    }

    pub(super) fn enter(&'static self, socket: &Arc<TcpStream>) -> io::Result<Visitor> {
        let inside = self.inside.fetch_add(1, Ordering::SeqCst);
        let visitor = Visitor { socket: Arc::clone(socket), lobby: self };
        let most = (self.most)();
        if inside >= most {
            refused("too_many_connections");
            return Err(io::Error::other(format!("{most} connections are open")));
        }
        let mut undecided = lock(&self.undecided);
        undecided.push_back(Arc::clone(socket));
        if undecided.len() > UNDECIDED_MAX
            && let Some(oldest) = undecided.pop_front()
        {
            // Its thread wakes up with an end of file.
            shut(&oldest);
            log_refusal(
                "idle_connection",
                format_args!("more than {UNDECIDED_MAX} connections idle; the oldest make room"),
            );
        }
        Ok(visitor)
    }
}

impl Drop for Visitor {
    fn drop(&mut self) {
        self.is_decided();
        self.lobby.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Visitor {
    pub(crate) fn is_decided(&self) {
        let mut undecided = lock(&self.lobby.undecided);
        undecided.retain(|socket| !Arc::ptr_eq(socket, &self.socket));
    }
}

#[cfg(test)]
mod tests;
