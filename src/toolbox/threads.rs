//! Threads with names and stacks, locks that outlive a panic, and waits that end.
//!
//! Everybody who starts a thread, takes a lock or waits on a condition does it through here, so
//! that each thread has a name and a stack of a known size, no panic of one call locks out the
//! others, and no wait is without an end:
//!
//! ```text
//! let state = wait(&call.changed, state, AGENT_WITHIN, |state| state.answer.is_none());
//! ```
//!
//! What lasts as long as the process is begun again after a panic: [`spawn_for_good`]. Nothing
//! here decides what to do when a time is over: the caller looks at what the lock guards.

use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// The stack of a thread that may stay with a call. Only what is touched takes memory.
const CALL_STACK_BYTES: usize = 256 * 1_024;
/// The stack of any other thread. An HTTP request or a TLS handshake touches much of it, and the C
/// library hands it on, touched as it is, to a later thread that asks for at least a quarter of it.
const STACK_BYTES: usize = 2 * 1_024 * 1_024;

/// From a panic of what lasts for good to its next beginning. A fault that comes again at once is
/// not to keep a processor busy.
const BEGIN_AGAIN_AFTER: Duration = Duration::from_secs(1);

const _: () = assert!(STACK_BYTES > 4 * CALL_STACK_BYTES, "calls do not inherit touched stacks");

/// Whoever panicked while holding it has been reported by Rust itself; the data behind it is whole,
/// because nothing here leaves it half-changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sleeps while that holds, but no longer than `within`. The lock is free meanwhile.
pub(crate) fn wait<'a, T>(
    changed: &Condvar,
    guard: MutexGuard<'a, T>,
    within: Duration,
    still_waiting: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'a, T> {
    let waited = changed.wait_timeout_while(guard, within, still_waiting);
    waited.unwrap_or_else(PoisonError::into_inner).0
}

/// For work that lasts as long as the process. After a panic it is begun again, on the same thread:
/// there may be no other one to be had. If it returns, it is over.
pub(crate) fn spawn_for_good(
    name: String,
    mut work: impl FnMut() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    spawn(name, move || {
        while outlive(&mut work).is_none() {
            thread::sleep(BEGIN_AGAIN_AFTER);
        }
    })
}

/// For work that does not stay with a call.
pub(crate) fn spawn(
    name: String,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(work)
}

/// None: it panicked, and the hook has said so. Whoever calls this puts in order what the work has
/// left behind.
pub(crate) fn outlive<T>(work: impl FnOnce() -> T) -> Option<T> {
    panic::catch_unwind(AssertUnwindSafe(work)).ok()
}

/// For a thread that a call keeps for as long as it lasts.
pub(crate) fn spawn_for_call(
    name: String,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name).stack_size(CALL_STACK_BYTES).spawn(work)
}

pub(crate) fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        // It panicked, which Rust has reported; there is nothing of it left to wait for.
    }
}

#[cfg(test)]
mod tests;
