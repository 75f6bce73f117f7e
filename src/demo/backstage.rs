//! Backstage: threads, doors and waiting, for all stand-ins.
//!
//! [`Board`] is a value that threads wait for changes of. [`Backstage`] keeps record of all
//! threads and sockets of a world, so that none outlives it: [`Backstage::stop`] shuts every
//! socket, knocks at every door and joins every thread. [`lock`], [`moot`] and [`spawn`] are
//! the three small habits that the whole folder shares.
//!
//! Nothing here knows what is said on those sockets.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use data_encoding::HEXLOWER;
use ring::rand::SecureRandom as _;

use crate::demo::WRITE_WITHIN;

/// A value that threads wait for changes of.
#[derive(Default)]
pub(super) struct Board<T> {
    value: Mutex<T>,
    changed: Condvar,
    version: AtomicU64,
}

impl<T> Board<T> {
    pub(super) fn new(value: T) -> Board<T> {
        Board { value: Mutex::new(value), changed: Condvar::new(), version: AtomicU64::new(0) }
    }

    pub(super) fn look<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&lock(&self.value))
    }

    pub(super) fn change<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let mut value = lock(&self.value);
        let result = change(&mut value);
        self.version.fetch_add(1, Ordering::AcqRel);
        self.changed.notify_all();
        result
    }

    /// Waits until `ready` gives something, or the time is up.
    pub(super) fn wait<R>(
        &self,
        within: Duration,
        mut ready: impl FnMut(&mut T) -> Option<R>,
    ) -> Option<R> {
        let deadline = Instant::now() + within;
        let mut value = lock(&self.value);
        loop {
            if let Some(found) = ready(&mut value) {
                return Some(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let waited = self.changed.wait_timeout(value, left);
            value = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// How often the value has changed.
    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Waits for a change after that version, or until the time is up.
    pub(super) fn wait_change(&self, version: u64, within: Duration) {
        self.wait(within, |_| (self.version() != version).then_some(()));
    }
}

/// All threads and sockets of the stand-ins, so that none outlives the world.
#[derive(Default)]
pub(super) struct Backstage {
    pub(super) board: Board<Stagehands>,
}

#[derive(Default)]
pub(super) struct Stagehands {
    over: bool,
    next: u64,
    sockets: HashMap<u64, TcpStream>,
    pub(super) doors: Vec<SocketAddr>,
    threads: Vec<JoinHandle<()>>,
}

impl Backstage {
    /// Opens a door on a free loopback port. Each visitor gets a thread.
    pub(super) fn listen(
        self: &Arc<Backstage>,
        name: &'static str,
        receive: impl Fn(TcpStream) + Send + Sync + 'static,
    ) -> io::Result<SocketAddr> {
        self.listen_at(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?, name, receive)
    }

    /// The same at a door of one's own choice.
    pub(super) fn listen_at(
        self: &Arc<Backstage>,
        listener: TcpListener,
        name: &'static str,
        receive: impl Fn(TcpStream) + Send + Sync + 'static,
    ) -> io::Result<SocketAddr> {
        let address = listener.local_addr()?;
        self.board.change(|hands| hands.doors.push(address));
        let backstage = Arc::clone(self);
        let receive = Arc::new(receive);
        self.employ(name, move || {
            for tcp in listener.incoming() {
                if backstage.board.look(|hands| hands.over) {
                    return;
                }
                let Ok(tcp) = tcp else { continue };
                let receive = Arc::clone(&receive);
                // Out of threads or sockets: the visitor sees a closed door.
                moot(backstage.attend(name, tcp, move |tcp| receive(tcp)));
            }
        })?;
        Ok(address)
    }

    /// One visitor. The socket is on record as long as he is here, and is
    /// shut when he leaves: a clone kept open elsewhere would hold it open.
    fn attend(
        self: &Arc<Backstage>,
        name: &'static str,
        tcp: TcpStream,
        receive: impl FnOnce(TcpStream) + Send + 'static,
    ) -> io::Result<()> {
        tcp.set_nodelay(true)?;
        tcp.set_write_timeout(Some(WRITE_WITHIN))?;
        let kept = tcp.try_clone()?;
        let number = self.board.change(|hands| {
            hands.next += 1;
            hands.sockets.insert(hands.next, kept);
            hands.next
        });
        let backstage = Arc::clone(self);
        self.employ(name, move || {
            if !backstage.board.look(|hands| hands.over) {
                receive(tcp);
            }
            let kept = backstage.board.change(|hands| hands.sockets.remove(&number));
            moot(kept.map_or(Ok(()), |kept| kept.shutdown(Shutdown::Both)));
        })
    }

    pub(super) fn employ(
        &self,
        name: &str,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let thread = spawn(name, work)?;
        self.board.change(|hands| {
            hands.threads.retain(|thread| !thread.is_finished());
            hands.threads.push(thread);
        });
        Ok(())
    }

    /// Waits, unless the world ends before.
    pub(super) fn pause(&self, duration: Duration) {
        self.board.wait(duration, |hands| hands.over.then_some(()));
    }

    pub(super) fn is_over(&self) -> bool {
        self.board.look(|hands| hands.over)
    }

    /// Ends everything and waits until it has ended.
    pub(super) fn stop(&self) {
        let doors = self.board.change(|hands| {
            hands.over = true;
            for tcp in hands.sockets.values() {
                moot(tcp.shutdown(Shutdown::Both));
            }
            std::mem::take(&mut hands.doors)
        });
        for door in doors {
            // A knock wakes the thread that waits in accept.
            moot(TcpStream::connect(door));
        }
        while let Some(thread) = self.board.change(|hands| hands.threads.pop()) {
            moot(thread.join());
        }
    }
}

pub(super) fn spawn(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).spawn(work)
}

/// A panic elsewhere shall not make this thread's complaint unreadable.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// For results that do not matter because the thing acted on is gone or about
/// to go: a socket at its end, a process that has died, a thread that is done.
pub(super) fn moot<T, E>(_: Result<T, E>) {}

pub(super) fn random_uuid() -> String {
    let hex = random_hex(16);
    let cut = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    format!("{}-{}-4{}-a{}-{}", cut(0, 8), cut(8, 12), cut(13, 16), cut(17, 20), cut(20, 32))
}

pub(super) fn random_hex(bytes: usize) -> String {
    let mut random = vec![0; bytes];
    // The system's random numbers fail only where nothing works. Names that
    // collide would show at once.
    moot(ring::rand::SystemRandom::new().fill(&mut random));
    HEXLOWER.encode(&random)
}
