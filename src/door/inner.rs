//! The way through the door to `tiny_http`, and back.
//!
//! `tiny_http` cannot be given a connection that somebody else has accepted, so it listens on
//! loopback and each request is carried there, one a connection, under limits of time and length
//! that it does not have itself. It may stop for good when threads or file descriptors run out;
//! then another one takes its place. What is in a request is none of this file's business.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::door::head::{HEAD_BYTES_MAX, announced_body, find};
use crate::door::reply::BODY_BYTES_MAX;
use crate::door::{ACCEPT_PAUSE, Door, Visitor};
use crate::toolbox::log::{log, log_stranger};
use crate::toolbox::socket::{READ_BYTES, WRITE_WITHIN, is_timeout, shut};
use crate::toolbox::threads::{join, lock, spawn};

/// A whole request, from its head to the end of our answer.
pub(crate) const REQUEST_WITHIN: Duration = Duration::from_secs(20);

/// From the end of a `tiny_http` to the next one. A dead one may leave a few sleeping threads
/// behind, so there are not to be many.
const HTTP_PAUSE: Duration = Duration::from_millis(500);

const _: () = assert!(2 * HTTP_PAUSE.as_millis() < WRITE_WITHIN.as_millis());

/// Carries one request to `tiny_http` and its answer back.
pub(super) fn pass_to_http(door: &Door, visitor: &Arc<Visitor>, head: &[u8]) -> io::Result<()> {
    let socket = &visitor.socket;
    let inner = Arc::new(connect_to_http(door)?);
    inner.set_nodelay(true)?;
    inner.set_write_timeout(Some(WRITE_WITHIN))?;
    for side in [&**socket, &*inner] {
        side.set_read_timeout(Some(REQUEST_WITHIN))?;
    }
    (&*inner).write_all(head)?;

    let head_end = find(head, b"\r\n\r\n").map_or(head.len(), |end| end + 4);
    let to_come = announced_body(head).map(|bytes| bytes.saturating_sub(head.len() - head_end));
    if to_come == Some(0) {
        visitor.is_decided();
    }
    let (sender, to) = (Arc::clone(visitor), Arc::clone(&inner));
    let body = spawn("request body".into(), move || pass_body(&sender, &to, to_come))?;
    let answered = pass_answer(&inner, socket);
    shut(&inner);
    shut(socket);
    join(body);
    match answered {
        Err(error) if is_timeout(&error) => {
            Err(io::Error::other(format!("it took over {} s", REQUEST_WITHIN.as_secs())))
        }
        answered => answered,
    }
}

/// The connection is closed after this answer, so the answer says so (RFC 9112, 9.6): a proxy that
/// is not told sends its next request into the closing connection. `tiny_http` drops such a header
/// of ours, so it is put in here, behind the status line. Not behind that of an interim answer,
/// which more follows. An answer without a body (1xx, 204) has no length of one (RFC 9110, 8.6),
/// but `tiny_http` gives it one.
fn pass_answer(from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
    // The limit is for what comes before the answer's own headers, and for a head without a body.
    let mut answer = BufReader::with_capacity(READ_BYTES, from).take(HEAD_BYTES_MAX as u64);
    let mut head = Vec::new();
    loop {
        read_line(&mut answer, &mut head)?;
        let status = head.split(|&byte| byte == b' ').nth(1).unwrap_or_default();
        let is_interim = status.starts_with(b"1");
        let has_body = !is_interim && status != b"204";
        if !is_interim {
            head.extend_from_slice(b"Connection: close\r\n");
        }
        while !has_body && !head.ends_with(b"\r\n\r\n") {
            let line = head.len();
            read_line(&mut answer, &mut head)?;
            if head[line..].to_ascii_lowercase().starts_with(b"content-length:") {
                head.truncate(line);
            }
        }
        if !is_interim {
            break;
        }
        to.write_all(&head)?;
        head.clear();
    }
    // With what is here already, which is mostly all of it, in one write.
    let mut answer = answer.into_inner();
    head.extend_from_slice(answer.buffer());
    answer.consume(answer.buffer().len());
    to.write_all(&head)?;
    io::copy(&mut answer, &mut to).map(drop)
}

fn read_line(answer: &mut impl BufRead, head: &mut Vec<u8>) -> io::Result<()> {
    answer.read_until(b'\n', head)?;
    if head.ends_with(b"\n") { Ok(()) } else { Err(io::Error::other("it was not understood")) }
}

/// Waits for a file descriptor, and for `tiny_http` while it is being started again.
fn connect_to_http(door: &Door) -> io::Result<TcpStream> {
    let deadline = Instant::now() + WRITE_WITHIN;
    loop {
        let http = lock(&door.http).clone().ok_or(io::ErrorKind::NotConnected)?;
        let address = http.server_addr().to_ip().ok_or(io::ErrorKind::AddrNotAvailable)?;
        match TcpStream::connect_timeout(&address, WRITE_WITHIN) {
            Err(error) if Instant::now() < deadline => {
                if error.kind() == io::ErrorKind::ConnectionRefused {
                    // Its accepting thread has ended, and nobody has told `recv`.
                    http.unblock();
                }
                // Nothing announces that a file descriptor is free.
                thread::sleep(ACCEPT_PAUSE);
            }
            connected => return connected,
        }
    }
}

/// What comes after the head, as far as the limits allow. The limit is a little above the one at
/// which the handler answers 413, so that the answer is said before the line is cut.
fn pass_body(visitor: &Visitor, mut to: &TcpStream, to_come: Option<usize>) {
    let deadline = Instant::now() + REQUEST_WITHIN;
    let mut chunk = [0; READ_BYTES];
    let mut total = 0;
    while total <= 2 * BODY_BYTES_MAX && Instant::now() < deadline {
        match (&*visitor.socket).read(&mut chunk) {
            Ok(count) if count > 0 && to.write_all(&chunk[..count]).is_ok() => total += count,
            _ => break,
        }
        if to_come.is_some_and(|bytes| total >= bytes) {
            visitor.is_decided();
        }
    }
    if to.shutdown(Shutdown::Write).is_err() {
        // The other side has closed already, which is where this was going.
    }
}

/// `tiny_http` stops accepting for good when file descriptors run out: with an error from `recv`,
/// or with a panic that only `connect_to_http` notices. So a new one takes its place, on a new
/// port.
pub(super) fn start_http(door: &'static Door) -> io::Result<()> {
    let server = open_http(door)?;
    spawn("http".into(), move || serve_http(door, &server)).map(drop)
}

fn serve_http(door: &'static Door, server: &tiny_http::Server) {
    let error = loop {
        match server.recv() {
            Ok(request) => answer_aside(door, request),
            Err(error) => break error,
        }
    };
    log!(Error, "the web server stopped ({error}) and is started again");
    loop {
        thread::sleep(HTTP_PAUSE);
        if start_http(door).is_ok() {
            break;
        }
    }
    // What it has taken in is still answered: nobody else would, and its threads would wait for
    // that for ever.
    let deadline = Instant::now() + REQUEST_WITHIN;
    while Instant::now() < deadline {
        let left = deadline.saturating_duration_since(Instant::now());
        if let Ok(Some(request)) = server.recv_timeout(left) {
            answer_aside(door, request);
        }
    }
}

fn open_http(door: &Door) -> io::Result<Arc<tiny_http::Server>> {
    // It panics where no thread can be started.
    let opened = std::panic::catch_unwind(|| tiny_http::Server::http((Ipv4Addr::LOCALHOST, 0)));
    let server = opened.map_err(|_| io::Error::other("no thread"))?.map_err(io::Error::other)?;
    let server = Arc::new(server);
    *lock(&door.http) = Some(Arc::clone(&server));
    Ok(server)
}

fn answer_aside(door: &'static Door, mut request: tiny_http::Request) {
    let answer = move || door.hall.answer(&mut request).send(request);
    if let Err(error) = spawn("request".into(), answer) {
        log_stranger(format_args!("a request was dropped: {error}"));
    }
}

#[cfg(test)]
mod tests;
