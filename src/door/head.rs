//! A request's head, within limits of length and time.
//!
//! Only as much of it is understood as the door has to know: where it ends, whether it is HTTP at
//! all, how long a body it announces, and whose media stream it asks for. Whoever is refused here
//! is told why in a short answer, and counted. The head goes on as it came, byte for byte.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use crate::toolbox::log::{log, log_refusal};
use crate::toolbox::socket::{READ_BYTES, is_timeout, shut};

/// The head of a request. A longer one is refused with 431.
pub(crate) const HEAD_BYTES_MAX: usize = 16 * 1_024;
/// From accepting a connection to the end of its head. Then it is closed.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// The body that a head may announce. `tiny_http` sets aside as much memory as was announced when
/// it throws away what nobody has read; without room for it, the process would end.
pub(crate) const ANNOUNCED_BYTES_MAX: usize = 1_024 * 1_024;
/// A peer that is refused while it still sends is listened to for this long, so that it gets to
/// read why.
const LINGER: Duration = Duration::from_secs(1);

/// Why a connection got no further than the door.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// It went away, or had to make room, before it had said anything of use.
    Left,
    Slow,
    TooLong,
    /// The head announces a body that nobody here would read.
    TooMuch,
    Tls,
    NotHttp,
    /// It wants the media stream, and no call waits for it.
    Stranger,
    /// Its readers could understand it in different ways.
    Unclear(&'static str),
}

impl Refusal {
    pub(super) fn tell(&self, mut socket: &TcpStream) {
        let (reason, status, why) = match self {
            Refusal::Left => {
                log!(Debug, "a connection ended before it had said what it wants");
                return shut(socket);
            }
            Refusal::Slow => {
                ("slow_head", "408 Request Timeout", "the head of the request took too long")
            }
            Refusal::TooLong => (
                "long_head",
                "431 Request Header Fields Too Large",
                "the head of the request is too long",
            ),
            Refusal::TooMuch => {
                ("long_body", "413 Content Too Large", "the announced body is too long")
            }
            Refusal::Tls => {
                ("tls", "400 Bad Request", "TLS on the plain port: put Caddy or a tunnel in front")
            }
            Refusal::NotHttp => ("not_http", "400 Bad Request", "this is not HTTP/1.1"),
            Refusal::Stranger => ("stream_token", "403 Forbidden", "no call waits for this stream"),
            Refusal::Unclear(why) => ("not_http", "400 Bad Request", *why),
        };
        log_refusal(reason, format_args!("a connection was closed: {why}"));
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nConnection: close\r\n\
             Content-Length: {}\r\n\r\n{why}\n",
            why.len() + 1
        );
        if let Err(error) = socket.write_all(answer.as_bytes()) {
            log!(Debug, "and did not wait to hear it: {error}");
        }
        if matches!(self, Refusal::Stranger) {
            // It has said all that there was to say.
            return shut(socket);
        }
        linger(socket);
    }
}

/// Were the line closed while the peer still sends, the system would cut it, and our answer with
/// it. So what comes is thrown away for a moment.
fn linger(mut socket: &TcpStream) {
    let deadline = Instant::now() + LINGER;
    let mut chunk = [0; READ_BYTES];
    if socket.shutdown(Shutdown::Write).is_ok() && socket.set_read_timeout(Some(LINGER)).is_ok() {
        while Instant::now() < deadline && socket.read(&mut chunk).is_ok_and(|count| count > 0) {}
    }
    shut(socket);
}

/// Reads up to the empty line, and perhaps a little more.
pub(crate) fn read_head(mut socket: &TcpStream) -> Result<Vec<u8>, Refusal> {
    let deadline = Instant::now() + HEAD_WITHIN;
    let mut head = Vec::new();
    let mut chunk = [0; READ_BYTES];
    // Looked through once, also when it comes byte by byte.
    let mut seen = 0;
    // An empty line before the request is no part of it (RFC 9112, 2.2).
    let mut may_be_empty = true;
    while find(&head[seen..], b"\r\n\r\n").is_none() {
        seen = head.len().saturating_sub(3);
        if head.len() > HEAD_BYTES_MAX {
            return Err(Refusal::TooLong);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || socket.set_read_timeout(Some(left)).is_err() {
            return Err(Refusal::Slow);
        }
        match socket.read(&mut chunk) {
            Ok(0) => return Err(Refusal::Left),
            Ok(count) => head.extend_from_slice(&chunk[..count]),
            Err(error) if is_timeout(&error) => return Err(Refusal::Slow),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(Refusal::Left),
        }
        if may_be_empty && head.starts_with(b"\r\n") {
            head.drain(..2);
            may_be_empty = false;
        }
        match head.first() {
            Some(0x16) => return Err(Refusal::Tls),
            Some(b'\r') if may_be_empty && head.len() == 1 => {}
            Some(first) if !first.is_ascii_uppercase() => return Err(Refusal::NotHttp),
            _ => {}
        }
    }
    if find(&head, b"\r\n\r\n").is_some_and(|end| end > HEAD_BYTES_MAX) {
        return Err(Refusal::TooLong);
    }
    let line = head.split(|&byte| byte == b'\r').next().unwrap_or_default();
    if !line.ends_with(b" HTTP/1.1") && !line.ends_with(b" HTTP/1.0") {
        return Err(Refusal::NotHttp);
    }
    match announced_body(&head) {
        Some(bytes) if bytes > ANNOUNCED_BYTES_MAX => Err(Refusal::TooMuch),
        _ => Ok(head),
    }
}

/// The length of the body by its head, or none if the head does not tell. Of lengths that
/// contradict each other the largest, and one that is no number counts as the largest there is:
/// whoever reads on may take any of them.
pub(crate) fn announced_body(head: &[u8]) -> Option<usize> {
    let end = find(head, b"\r\n\r\n").unwrap_or(head.len());
    let text = String::from_utf8_lossy(&head[..end]);
    let (mut bytes, mut in_chunks) = (0, false);
    for line in text.split("\r\n").skip(1) {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        in_chunks |= name.trim().eq_ignore_ascii_case("Transfer-Encoding");
        if name.trim().eq_ignore_ascii_case("Content-Length") {
            bytes = bytes.max(value.trim().parse().unwrap_or(usize::MAX));
        }
    }
    (!in_chunks || bytes > ANNOUNCED_BYTES_MAX).then_some(bytes)
}

/// The token in `GET /media-stream/<token>`, if it is this that is wanted. A slash behind it is as
/// good as none.
pub(crate) fn stream_token(head: &[u8]) -> Option<String> {
    let path = head.strip_prefix(b"GET /media-stream/")?;
    let end = path.iter().position(|byte| matches!(byte, b' ' | b'?' | b'\r'))?;
    let token = String::from_utf8_lossy(path.get(..end)?);
    Some(token.strip_suffix('/').unwrap_or(&token).to_owned())
}

pub(crate) fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

#[cfg(test)]
mod tests;
