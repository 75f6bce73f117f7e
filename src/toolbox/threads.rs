//! Threads with names and stacks, and locks that outlive a panic.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// The stack of a thread that may stay with a call. Only what is touched takes memory.
pub(crate) const CALL_STACK_BYTES: usize = 256 * 1_024;
/// The stack of any other thread. An HTTP request or a TLS handshake touches much of it, and the C
/// library hands it on, touched as it is, to a later thread that asks for at least a quarter of it.
pub(crate) const STACK_BYTES: usize = 2 * 1_024 * 1_024;

const _: () = assert!(STACK_BYTES > 4 * CALL_STACK_BYTES, "calls do not inherit touched stacks");

/// Whoever panicked while holding it has been reported by Rust itself; the data behind it is whole,
/// because nothing here leaves it half-changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn spawn(
    name: String,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(work)
}

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
