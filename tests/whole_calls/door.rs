//! The front door as a proxy sees it, which keeps its connections and sends the next webhook over
//! one of them unless it is told that there will be no next one.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use crate::Outcome;
use crate::demo::{PATIENCE, World, WorldBuilder};

const API_TOKEN: &str = "the-owners-own-token-0123456789";

fn builder() -> WorldBuilder {
    World::builder(env!("CARGO_BIN_EXE_callbridge"))
}

/// A status line and headers, up to and with the empty line.
fn read_head(reader: &mut impl BufRead) -> io::Result<String> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(head)
}

fn header<'a>(head: &'a str, name: &str) -> Vec<&'a str> {
    let lines = head.lines().filter_map(|line| line.split_once(':'));
    lines
        .filter(|(present, _)| present.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim())
        .collect()
}

fn connect(address: SocketAddr) -> io::Result<BufReader<TcpStream>> {
    let socket = TcpStream::connect_timeout(&address, PATIENCE)?;
    socket.set_nodelay(true)?;
    // Longer than the door gives the head of a request.
    socket.set_read_timeout(Some(2 * PATIENCE))?;
    Ok(BufReader::new(socket))
}

/// A webhook as Twilio sends it.
fn webhook(world: &World, path: &str, form: &[(&str, &str)], extra: &str) -> (String, String) {
    let body = form.iter().map(|(name, value)| format!("{name}={value}"));
    let body = body.collect::<Vec<_>>().join("&");
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: bridge.example\r\nX-Twilio-Signature: {}\r\n{extra}\
         Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n\r\n",
        world.signature(path, form),
        body.len()
    );
    (head, body)
}

/// What a proxy with kept connections does: it sends over the old one, unless it was told that
/// this one ends.
#[test]
fn a_proxy_that_keeps_its_connections_loses_no_webhook() -> Outcome {
    let world = builder().start()?;
    let status = [("CallSid", "CA00000000000000000000000000000001"), ("CallStatus", "ringing")];
    let (head, body) = webhook(&world, "/call-status", &status, "");
    let request = head + &body;
    let mut kept: Option<BufReader<TcpStream>> = None;
    for number in 1..=50 {
        let mut line = match kept.take() {
            Some(line) => line,
            None => connect(world.bridge.address())?,
        };
        let answered = line.get_mut().write_all(request.as_bytes());
        let answer = answered.and_then(|()| read_head(&mut line));
        let answer =
            answer.map_err(|error| world.trouble(format!("webhook {number} was lost: {error}")))?;
        assert!(answer.starts_with("HTTP/1.1 2"), "{answer}");
        let length = header(&answer, "content-length").first().and_then(|text| text.parse().ok());
        io::copy(&mut line.by_ref().take(length.unwrap_or(0)), &mut io::sink())?;
        if header(&answer, "connection") != ["close"] {
            kept = Some(line);
        }
    }
    Ok(())
}

#[test]
fn every_answer_says_that_the_connection_ends() -> Outcome {
    let world = builder().setting("API_TOKEN", API_TOKEN).start()?;
    let get = |path: &str, extra: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\n{extra}\r\n");
    let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let ring = [("CallSid", "CA00000000000000000000000000000002"), ("From", "anonymous")];
    let (head, body) = webhook(&world, "/incoming-call", &ring, "");
    let post = |extra: &str| format!("POST /incoming-call HTTP/1.1\r\nHost: x\r\n{extra}\r\n");
    let authorized = format!("Authorization: Bearer {API_TOKEN}\r\n");
    let cases = [
        // From the handlers.
        (200, head.clone() + &body),
        (200, get("/health", "")),
        (200, get("/health", "").replace("HTTP/1.1", "HTTP/1.0")),
        (200, get("/health", "").replace("GET", "HEAD")),
        (200, get("/health", "Connection: keep-alive\r\n")),
        (200, get("/health", "Connection: Upgrade\r\nUpgrade: h2c\r\n")),
        // Longer than any buffer on its way.
        (200, get("/", &authorized)),
        (401, get("/", "")),
        (403, post("Content-Length: 0\r\n")),
        (404, get("/nowhere", "")),
        (405, get("/incoming-call", "")),
        (413, post("Content-Length: 100000\r\n") + &"a".repeat(100_000)),
        // From tiny_http itself.
        (400, get("/health", "no header\r\n")),
        (417, get("/health", "Expect: a miracle\r\n")),
        // From the door.
        (400, "\u{16}\u{3}\u{1}".to_owned()),
        (400, "get / HTTP/1.1\r\n\r\n".to_owned()),
        (408, "GET / HTTP/1.1\r\n".to_owned()),
        (413, post("Content-Length: 10000000\r\n")),
        (431, get("/", &format!("X: {}\r\n", "x".repeat(20_000)))),
        // From the media stream.
        (400, get("/media-stream", "")),
        (400, get("/media-stream", "no header\r\n")),
        (403, get("/media-stream", &format!("{upgrade}X-Twilio-Signature: wrong\r\n"))),
    ];
    for (status, request) in cases {
        let mut line = connect(world.bridge.address())?;
        line.get_mut().write_all(request.as_bytes())?;
        if status != 408 {
            // Slow is who still could go on.
            line.get_mut().shutdown(Shutdown::Write)?;
        }
        let begin: String = request.chars().take(60).collect();
        let head = read_head(&mut line);
        let head = head.map_err(|error| world.trouble(format!("{begin:?}: {error}")))?;
        assert_eq!(head.split(' ').nth(1), Some(status.to_string().as_str()), "{begin:?}: {head}");
        assert_eq!(header(&head, "connection"), ["close"], "{begin:?}: {head}");
        // And it does end, with all that was announced.
        let mut rest = Vec::new();
        line.read_to_end(&mut rest)?;
        if !request.starts_with("HEAD") {
            let length = rest.len().to_string();
            assert_eq!(header(&head, "content-length"), [length], "{begin:?}");
        }
    }
    // What becomes a stream goes on.
    let mut line = connect(world.bridge.address())?;
    line.get_mut().write_all(get("/media-stream", upgrade).as_bytes())?;
    let head = read_head(&mut line)?;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert_eq!(header(&head, "connection").join(" ").to_lowercase(), "upgrade");
    Ok(())
}

/// curl and some proxies ask before they send a body. The go-ahead is not the answer.
#[test]
fn only_the_answer_itself_ends_the_connection() -> Outcome {
    let world = builder().start()?;
    let ring = [("CallSid", "CA00000000000000000000000000000003"), ("From", "anonymous")];
    let (head, body) = webhook(&world, "/incoming-call", &ring, "Expect: 100-continue\r\n");
    let mut line = connect(world.bridge.address())?;
    line.get_mut().write_all(head.as_bytes())?;
    let go_ahead = read_head(&mut line)?;
    assert!(go_ahead.starts_with("HTTP/1.1 100 Continue\r\n"), "{go_ahead}");
    assert!(header(&go_ahead, "connection").is_empty(), "{go_ahead}");
    line.get_mut().write_all(body.as_bytes())?;
    let mut answer = String::new();
    line.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("no head")?;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\nConnection: close\r\n"), "{answer}");
    assert_eq!(header(head, "connection"), ["close"], "{answer}");
    assert!(body.trim_end().ends_with("</Response>"), "{answer}");
    Ok(())
}
