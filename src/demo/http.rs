//! HTTP/1.1 as small as the pretend world needs it, for both directions.
//!
//! [`serve_http`] is the server of all stand-ins: a thread a connection, so that an idle or
//! slow one is in nobody's way, and keep-alive, as the real ones have it. A [`Reply`] says what
//! to answer. [`http_exchange`] is the client: one request, one answer.
//!
//! Written by hand and not with the server's crates, so that both do not share a mistake. It
//! knows nothing of TLS; [`tls`](super::tls) puts that in front.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::demo::backstage::{Backstage, moot};
use crate::demo::{PATIENCE, WRITE_WITHIN};

/// Twilio gives a webhook this long, connect included.
const WEBHOOK_WITHIN: Duration = Duration::from_secs(15);

/// n8n closes a kept connection that has been idle this long.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// How a stand-in answers a request.
#[derive(Clone, Debug)]
pub enum Reply {
    Answer(Answer),
    /// Takes the request and never answers, until the other side leaves.
    #[cfg(test)]
    Hang,
    /// Drops the connection without a word.
    #[cfg(test)]
    Reset,
    /// These bytes, be they an answer or not; then the connection ends.
    #[cfg(test)]
    Raw(Vec<u8>),
}

/// An ordinary HTTP answer.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub delay: Duration,
}

impl Reply {
    /// JSON, as n8n and Ultravox label it.
    pub fn json(status: u16, body: &Value) -> Reply {
        Reply::text(status, Some("application/json; charset=utf-8"), &body.to_string())
    }

    /// Any text with any content type, or none.
    pub fn text(status: u16, content_type: Option<&str>, body: &str) -> Reply {
        let reply = Reply::Answer(Answer {
            status,
            headers: Vec::new(),
            body: body.as_bytes().to_vec(),
            delay: Duration::ZERO,
        });
        match content_type {
            Some(content_type) => reply.header("Content-Type", content_type),
            None => reply,
        }
    }

    /// With one more header, such as `Retry-After`.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Reply {
        match &mut self {
            Reply::Answer(answer) => answer.headers.push((name.to_owned(), value.to_owned())),
            #[cfg(test)]
            Reply::Hang | Reply::Reset | Reply::Raw(_) => {}
        }
        self
    }

    /// Only after this long.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Reply {
        match &mut self {
            Reply::Answer(answer) => answer.delay = delay,
            #[cfg(test)]
            Reply::Hang | Reply::Reset | Reply::Raw(_) => {}
        }
        self
    }
}

#[derive(Clone, Debug)]
pub(super) struct HttpRequest {
    pub(super) at: Instant,
    /// When its connection was accepted.
    #[cfg(test)]
    pub(super) connected_at: Instant,
    pub(super) method: String,
    pub(super) target: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

impl HttpRequest {
    pub(super) fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        find_header(&self.headers, name)
    }

    /// A value of the query, decoded.
    pub(super) fn parameter(&self, name: &str) -> Option<String> {
        let (_, query) = self.target.split_once('?')?;
        let mut pairs = form_urlencoded::parse(query.as_bytes());
        pairs.find(|(present, _)| present == name).map(|(_, value)| value.into_owned())
    }
}

/// What the bridge answered over HTTP.
#[derive(Clone, Debug)]
pub struct HttpAnswer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub took: Duration,
}

impl HttpAnswer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// A header, whatever the case of its name.
    pub fn header(&self, name: &str) -> Option<&str> {
        find_header(&self.headers, name)
    }
}

#[cfg(test)]
impl HttpAnswer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }
}

/// A small HTTP/1.1 server: a thread per connection, so that an idle or slow
/// one is in nobody's way, and keep-alive, as the real ones have it.
pub(super) fn serve_http(
    backstage: &Arc<Backstage>,
    name: &'static str,
    answer: impl Fn(HttpRequest) -> Reply + Send + Sync + 'static,
) -> io::Result<SocketAddr> {
    let pause = Arc::clone(backstage);
    backstage.listen(name, move |tcp| {
        // A connection that ends in the middle of a request is the bridge's
        // right, and what came before it is on record.
        moot(converse(&pause, &tcp, &answer));
    })
}

fn converse(
    backstage: &Backstage,
    tcp: &TcpStream,
    answer: &impl Fn(HttpRequest) -> Reply,
) -> io::Result<()> {
    #[cfg(test)]
    let connected_at = Instant::now();
    let mut reader = BufReader::new(tcp.try_clone()?);
    tcp.set_read_timeout(Some(KEEP_ALIVE))?;
    while let Some((first, headers)) = read_head(&mut reader)? {
        let body = read_body(&mut reader, &headers, false)?;
        let mut words = first.split(' ').map(str::to_owned);
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let close = find_header(&headers, "connection")
            .is_some_and(|value| value.eq_ignore_ascii_case("close"));
        let at = Instant::now();
        let request = HttpRequest {
            at,
            #[cfg(test)]
            connected_at,
            method,
            target,
            headers,
            body,
        };
        match answer(request) {
            Reply::Answer(answer) => {
                backstage.pause(answer.delay);
                (&mut &*tcp).write_all(&answer.bytes())?;
            }
            #[cfg(test)]
            Reply::Hang => {
                tcp.set_read_timeout(None)?;
                // Ends when the bridge gives up, or the world ends.
                reader.read_until(b'\0', &mut Vec::new())?;
                return Ok(());
            }
            #[cfg(test)]
            Reply::Reset => return Ok(()),
            #[cfg(test)]
            Reply::Raw(bytes) => return (&mut &*tcp).write_all(&bytes),
        }
        if close {
            break;
        }
    }
    Ok(())
}

impl Answer {
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut head = format!("HTTP/1.1 {} Pretended\r\n", self.status);
        for (name, value) in &self.headers {
            head.extend([name, ": ", value, "\r\n"]);
        }
        head.push_str("Connection: keep-alive\r\nKeep-Alive: timeout=5\r\n");
        if self.status == 204 {
            return [head.as_bytes(), b"\r\n"].concat();
        }
        // n8n sends an empty body as chunks, of which there are none.
        let (framing, tail) = match self.body.len() {
            0 => ("Transfer-Encoding: chunked".to_owned(), b"0\r\n\r\n".as_slice()),
            length => (format!("Content-Length: {length}"), self.body.as_slice()),
        };
        [head.as_bytes(), framing.as_bytes(), b"\r\n\r\n", tail].concat()
    }
}

pub(super) fn http_exchange(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> io::Result<HttpAnswer> {
    let begun = Instant::now();
    let mut tcp = connect(address)?;
    tcp.set_read_timeout(Some(WEBHOOK_WITHIN))?;
    let mut head = format!("{method} {path} HTTP/1.1\r\n");
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
        head.push_str("Host: bridge.example\r\n");
    }
    for (name, value) in headers {
        head.extend([name, ": ", value, "\r\n"]);
    }
    head.extend(["Content-Length: ", &body.len().to_string(), "\r\n\r\n"]);
    tcp.write_all(&[head.as_bytes(), body].concat())?;
    let mut reader = BufReader::new(tcp);
    let (first, headers) = read_head(&mut reader)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    let status = first.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| io::Error::other(format!("no status in {first:?}")))?;
    let body = read_body(&mut reader, &headers, true)?;
    Ok(HttpAnswer { status, headers, body, took: begun.elapsed() })
}

type Head = (String, Vec<(String, String)>);

/// The first line and the headers; nothing if the other side has left.
pub(super) fn read_head(reader: &mut impl BufRead) -> io::Result<Option<Head>> {
    let mut first = String::new();
    if reader.read_line(&mut first)? == 0 {
        return Ok(None);
    }
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end();
        if line.is_empty() {
            return Ok(Some((first.trim_end().to_owned(), headers)));
        }
        let (name, value) = line.split_once(':').ok_or(io::ErrorKind::InvalidData)?;
        headers.push((name.to_owned(), value.trim().to_owned()));
    }
}

/// The body by length, by chunks, or (of an answer) up to the end.
pub(super) fn read_body(
    reader: &mut impl BufRead,
    headers: &[(String, String)],
    answer: bool,
) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    let chunked =
        find_header(headers, "transfer-encoding").is_some_and(|value| value.contains("chunked"));
    let length = find_header(headers, "content-length").and_then(|length| length.parse().ok());
    if chunked {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size)?;
            let size = u64::from_str_radix(size.trim(), 16).map_err(io::Error::other)?;
            reader.by_ref().take(size).read_to_end(&mut body)?;
            reader.read_line(&mut String::new())?;
            if size == 0 {
                return Ok(body);
            }
        }
    }
    match length {
        Some(length) => {
            reader.by_ref().take(length).read_to_end(&mut body)?;
        }
        None if answer => {
            reader.read_to_end(&mut body)?;
        }
        None => {}
    }
    Ok(body)
}

pub(super) fn find_header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let found = headers.iter().find(|(present, _)| present.eq_ignore_ascii_case(name));
    found.map(|(_, value)| value.as_str())
}

pub(super) fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let tcp = TcpStream::connect_timeout(&address, PATIENCE)?;
    tcp.set_nodelay(true)?;
    tcp.set_write_timeout(Some(WRITE_WITHIN))?;
    Ok(tcp)
}
