//! The front door as a proxy sees it, which keeps its connections and sends the next webhook over
//! one of them unless it is told that there will be no next one.

use std::error::Error;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

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
        (400, get(&stream_path(&world)?, "")),
        (400, get(&stream_path(&world)?, "no header\r\n")),
        (403, get(&stream_path(&world)?, &format!("{upgrade}X-Twilio-Signature: wrong\r\n"))),
        // From the door, for want of a token.
        (403, get("/media-stream/x", upgrade)),
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
    line.get_mut().write_all(get(&stream_path(&world)?, upgrade).as_bytes())?;
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

/// Whoever still sends would lose our answer if the line were cut under it.
#[test]
fn whoever_is_refused_in_the_middle_of_sending_gets_to_read_why() -> Outcome {
    let world = builder().start()?;
    for (status, begin) in [("431", "GET / HTTP/1.1\r\nX: "), ("400", "nonsense")] {
        let began = Instant::now();
        let mut line = connect(world.bridge.address())?;
        // More than the door reads of it.
        line.get_mut().write_all((begin.to_owned() + &"x".repeat(200_000)).as_bytes())?;
        let mut answer = String::new();
        line.read_to_string(&mut answer)?;
        assert_eq!(self::status(&answer), status, "{answer}");
        // It may go on for a second. A line cut at once would take the answer with it, but for a
        // reader as quick as this one.
        while line.get_mut().write_all(b"x").is_ok() {
            assert!(began.elapsed() < 2 * PATIENCE, "it may go on for ever");
            thread::sleep(Duration::from_millis(10));
        }
        assert!(began.elapsed() >= Duration::from_secs(1), "{:?}", began.elapsed());
    }
    Ok(())
}

#[test]
fn a_head_may_be_as_long_as_it_may_and_no_longer() -> Outcome {
    const HEAD_BYTES_MAX: usize = 16 * 1_024;
    let world = builder().start()?;
    for (length, status) in [(HEAD_BYTES_MAX, "200"), (HEAD_BYTES_MAX + 1, "431")] {
        let begin = "GET /health HTTP/1.1\r\nX: ";
        let request = format!("{begin}{}\r\n\r\n", "x".repeat(length - begin.len()));
        assert_eq!(self::status(&says(&world, request.as_bytes())?), status, "{length}");
    }
    Ok(())
}

/// Ten seconds each: for the head of a request, and for the first message of a stream. A slow
/// machine may take some longer to notice.
#[test]
fn whoever_says_nothing_is_shown_out_in_time() -> Outcome {
    const AT_LEAST: Duration = Duration::from_secs(9);
    const AT_MOST: Duration = Duration::from_secs(25);
    let world = builder().start()?;
    let head = || -> Outcome {
        let mut line = connect(world.bridge.address())?;
        line.get_mut().set_read_timeout(Some(2 * AT_MOST))?;
        let began = Instant::now();
        line.get_mut().write_all(b"GET /health HTTP/1.1\r\n")?;
        assert_eq!(status(&read_head(&mut line)?), "408");
        assert!((AT_LEAST..AT_MOST).contains(&began.elapsed()), "{:?}", began.elapsed());
        Ok(())
    };
    let path = stream_path(&world)?;
    let stream = || -> Outcome {
        let began = Instant::now();
        let mut line = connect(world.bridge.address())?;
        line.get_mut().set_read_timeout(Some(2 * AT_MOST))?;
        line.get_mut()
            .write_all(&upgrade(&path, "Connection: Upgrade\r\nUpgrade: websocket\r\n"))?;
        assert_eq!(status(&read_head(&mut line)?), "101");
        let mut goodbye = [0; 4];
        line.read_exact(&mut goodbye)?;
        assert_eq!((goodbye[0], &goodbye[2..]), (0x88, 1_008_u16.to_be_bytes().as_slice()));
        assert!((AT_LEAST..AT_MOST).contains(&began.elapsed()), "{:?}", began.elapsed());
        Ok(())
    };
    thread::scope(|scope| {
        let both = [scope.spawn(head), scope.spawn(stream)];
        both.into_iter().try_for_each(|one| one.join().map_err(|_| "see the assertion above")?)
    })
}

// ============================================================================
// What goes on behind the door
// ============================================================================

/// All that comes back, from a line that the other side closes.
fn says(world: &World, request: &[u8]) -> io::Result<String> {
    let mut line = connect(world.bridge.address())?;
    // It may be refused, and closed, before all of it is sent.
    drop(line.get_mut().write_all(request));
    let mut answer = Vec::new();
    // A reset behind the answer is an end as well.
    drop(line.read_to_end(&mut answer));
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or_default()
}

/// The path of a stream that a call waits for.
fn stream_path(world: &World) -> Result<String, Box<dyn Error + Send + Sync>> {
    Ok(world.ring("anonymous")?.twiml.stream_path())
}

fn upgrade(path: &str, extra: &str) -> Vec<u8> {
    let head = format!(
        "GET {path} HTTP/1.1\r\nHost: bridge.example\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{extra}\r\n"
    );
    head.into_bytes()
}

/// The status of the answer, without waiting for the end of the stream that may follow.
fn upgraded(world: &World, extra: &str) -> Result<String, Box<dyn Error + Send + Sync>> {
    let mut line = connect(world.bridge.address())?;
    line.get_mut().write_all(&upgrade(&stream_path(world)?, extra))?;
    Ok(status(&read_head(&mut line)?).to_owned())
}

/// Cloudflare adds the caller's city, in whatever letters it has.
#[test]
fn a_header_that_no_route_reads_may_hold_anything() -> Outcome {
    let world = builder().start()?;
    let ring = [("CallSid", "CA00000000000000000000000000000004"), ("From", "anonymous")];
    let many = "X-Forwarded-Server: proxy.example\r\n".repeat(200);
    for city in
        [&b"S\xc3\xa3o Paulo"[..], b"S\xe3o Paulo", b"\x01\x7f\t", b"", many.trim_end().as_bytes()]
    {
        let (head, body) = webhook(&world, "/incoming-call", &ring, "");
        let (line, rest) = head.split_once("\r\n").ok_or("no request line")?;
        let added = [b"\r\nCF-IPCity: ", city, b"\r\n"].concat();
        let request = [line.as_bytes(), &added, rest.as_bytes(), body.as_bytes()].concat();
        let answer = says(&world, &request)?;
        assert_eq!(status(&answer), "200", "{}: {answer}", city.escape_ascii());
        let mut line = connect(world.bridge.address())?;
        let wish = upgrade(&stream_path(&world)?, "Connection: Upgrade\r\nUpgrade: websocket\r\n");
        let at = wish.windows(2).position(|end| end == b"\r\n").ok_or("no request line")?;
        line.get_mut().write_all(&[&wish[..at], &added, &wish[at + 2..]].concat())?;
        assert_eq!(status(&read_head(&mut line)?), "101", "{}", city.escape_ascii());
    }
    // In what a route reads, or what says where the request ends, nothing is guessed.
    for unclear in [
        b"GET /calls/\xc3\xa9 HTTP/1.1\r\n\r\n".as_slice(),
        b"GET /health?\xff HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nOrigin: https://caf\xc3\xa9.example\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\nX-Frame-Options: none\r\n\r\n",
        b"GET /health HTTP/1.1\r\nCaf\xc3\xa9: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n",
    ] {
        let answer = says(&world, unclear)?;
        assert_eq!(status(&answer), "400", "{}: {answer}", String::from_utf8_lossy(unclear));
    }
    world.bridge.wait_for_log("a connection was closed: a header that matters is there twice")?;
    Ok(())
}

#[test]
fn unusual_requests_are_understood_as_they_are_meant() -> Outcome {
    let world = builder().start()?;
    // Proxies add to the list, or add a line.
    for wish in [
        "Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n",
        "Connection: Upgrade\r\nUpgrade: h2c, WebSocket\r\n",
        "Connection: keep-alive\r\nConnection: upgrade\r\nUpgrade: websocket\r\n",
        "Connection: keep-alive, Upgrade\r\nUpgrade: h2c\r\nUpgrade: websocket\r\n",
    ] {
        assert_eq!(upgraded(&world, wish)?, "101", "{wish}");
    }
    for wish in [
        "Connection: keep-alive\r\nUpgrade: websocket\r\n",
        "Connection: Upgrade\r\nUpgrade: websockets\r\n",
        "Connection: Upgrade\r\n",
        "Upgrade: websocket\r\n",
    ] {
        assert_eq!(upgraded(&world, wish)?, "400", "{wish}");
    }
    // As a client writes it to whom it takes for a proxy.
    for target in ["http://bridge.example/health", "HTTPS://x:8000/health?a=/b", "/health"] {
        let answer = says(&world, format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes())?;
        assert!(answer.ends_with("\r\n\r\nok\n"), "{target}: {answer}");
    }
    let nowhere = says(&world, b"GET http://bridge.example HTTP/1.1\r\nHost: x\r\n\r\n")?;
    assert_eq!(status(&nowhere), "404", "the live page is not on: {nowhere}");
    let wish = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
    let absolute = String::from_utf8(upgrade(&stream_path(&world)?, wish))?
        .replace(" /", " http://bridge.example/");
    let mut line = connect(world.bridge.address())?;
    line.get_mut().write_all(absolute.as_bytes())?;
    assert_eq!(status(&read_head(&mut line)?), "101");
    // An empty line is what old clients leave behind a body.
    let late = says(&world, b"\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n")?;
    assert_eq!(status(&late), "200", "{late}");
    let later = says(&world, b"\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n")?;
    assert_eq!(status(&later), "400", "{later}");
    // An answer that has no body has no length of one.
    let over = [("CallSid", "CA00000000000000000000000000000005"), ("CallStatus", "ringing")];
    let (head, body) = webhook(&world, "/call-status", &over, "Expect: 100-continue\r\n");
    let answer = says(&world, (head + &body).as_bytes())?;
    let (interim, answer) = answer.split_once("\r\n\r\n").ok_or("no interim answer")?;
    assert!(interim.starts_with("HTTP/1.1 100 Continue"), "{interim}");
    assert!(answer.starts_with("HTTP/1.1 204 No Content\r\nConnection: close\r\n"), "{answer}");
    assert!(answer.ends_with("\r\n\r\n"), "{answer}");
    for head in [interim, answer] {
        assert!(header(head, "content-length").is_empty(), "{head}");
        assert!(header(head, "transfer-encoding").is_empty(), "{head}");
    }
    Ok(())
}

/// The shapes of a request with another one inside, or behind it, that the two sides of a proxy
/// understand differently. What hides is a call that would cost money.
fn smuggled(hidden: &str) -> Vec<(&'static str, String)> {
    let post = |headers: &str, body: &str| {
        format!("POST /call-status HTTP/1.1\r\nHost: x\r\n{headers}\r\n{body}")
    };
    let all = hidden.len();
    let chunk = format!("{all:x}\r\n{hidden}\r\n0\r\n\r\n");
    let last = format!("0\r\n\r\n{hidden}");
    let whole = |headers: &str| post(headers, hidden);
    let chunked = |headers: &str| post(headers, &last);
    let get = |line: &str, headers: &str| format!("GET {line}\r\nHost: x\r\n{headers}\r\n{hidden}");
    let ok = "/health HTTP/1.1";
    vec![
        ("behind a GET", get(ok, "")),
        ("behind a GET that asks to keep the line", get(ok, "Connection: keep-alive\r\n")),
        ("behind a GET that asks for another protocol", get(ok, "Connection: Upgrade\r\n")),
        ("behind an empty line", format!("\r\n{}", get(ok, ""))),
        ("behind an absolute address", get("http://x/health HTTP/1.1", "")),
        ("behind a media stream", get("/media-stream/x HTTP/1.1", "")),
        ("behind a GET of HTTP/1.0", get("/health HTTP/1.0", "Connection: keep-alive\r\n")),
        ("as the body of a GET", get(ok, &format!("Content-Length: {all}\r\n"))),
        ("behind no body", whole("Content-Length: 0\r\n")),
        ("behind a short body", post("Content-Length: 5\r\n", &format!("a=b&c{hidden}"))),
        ("behind chunks", chunked("Transfer-Encoding: chunked\r\n")),
        ("in a chunk", post("Transfer-Encoding: chunked\r\n", &chunk)),
        (
            "behind trailers",
            post("Transfer-Encoding: chunked\r\n", &format!("0\r\nX: y\r\n\r\n{hidden}")),
        ),
        (
            "in a chunk's extension",
            post("Transfer-Encoding: chunked\r\n", &format!("0;\n{hidden}\r\n\r\n")),
        ),
        (
            "a length and chunks",
            chunked(&format!("Content-Length: {}\r\nTransfer-Encoding: chunked\r\n", all + 5)),
        ),
        (
            "chunks and a length",
            post("Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", &chunk),
        ),
        // CVE-2026-66752.
        ("as identity", chunked("Transfer-Encoding: identity\r\nContent-Length: 0\r\n")),
        ("as an unknown coding", chunked("Transfer-Encoding: xchunked\r\n")),
        ("as chunks and more", chunked("Transfer-Encoding: chunked, identity\r\n")),
        ("as chunks by another name", chunked("Transfer-Encoding: \"chunked\"\r\n")),
        ("with two codings", chunked("Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n")),
        (
            "with chunks in HTTP/1.0",
            chunked("Transfer-Encoding: chunked\r\n").replace(" HTTP/1.1\r\nHost: x", " HTTP/1.0"),
        ),
        ("with a blank before the colon", chunked("Transfer-Encoding : chunked\r\n")),
        ("with a folded line", chunked("Transfer-Encoding:\r\n chunked\r\n")),
        ("with an odd blank", chunked("Transfer-Encoding:\u{b}chunked\r\n")),
        ("with two lengths", whole(&format!("Content-Length: 0\r\nContent-Length: {all}\r\n"))),
        ("with a signed length", whole("Content-Length: +0\r\n")),
        ("with a negative length", whole("Content-Length: -1\r\n")),
        ("with a list of lengths", whole("Content-Length: 0, 0\r\n")),
        ("with a length in hexadecimal", whole("Content-Length: 0x0\r\n")),
        ("with an underscore", whole(&format!("Content_Length: {all}\r\nContent-Length: 0\r\n"))),
        // CVE-2026-66753, on the way in.
        ("with a bare line feed", chunked("X: y\nTransfer-Encoding: chunked\r\n")),
        ("with a bare carriage return", whole("X: y\rContent-Length: 0\r\n")),
        ("with a zero byte", whole("Content-Length: 0\0\r\n")),
        ("within a header", get(ok, &format!("X: y\n\n{hidden}")).replacen("\n\n\n", "\n\n", 1)),
        ("that waits to be asked", chunked("Expect: 100-continue\r\nContent-Length: 0\r\n")),
        ("behind a line that is no header", whole("GET / HTTP/1.1\r\n")),
        ("in the request line", get(&format!("/health\n{hidden}"), "")),
    ]
}

#[test]
fn no_request_hides_behind_another() -> Outcome {
    let world = builder().start()?;
    let ring = [("CallSid", "CA00000000000000000000000000000006"), ("From", "anonymous")];
    let (head, body) = webhook(&world, "/incoming-call", &ring, "");
    let hidden = head + &body;
    for (name, request) in smuggled(&hidden) {
        let answer = says(&world, request.as_bytes())?;
        let answers = answer
            .lines()
            .filter(|line| line.starts_with("HTTP/1.") && !line.ends_with("100 Continue"));
        assert_eq!(answers.count(), 1, "{name}: {answer}");
        assert_eq!(world.ultravox.requests(), 0, "{name}: {answer}");
        assert!(!answer.contains("<Response>"), "{name}: {answer}");
    }
    // It would have been understood, had it got in.
    let answer = says(&world, hidden.as_bytes())?;
    assert_eq!(status(&answer), "200", "{answer}");
    assert!(answer.contains("<Connect"), "{answer}");
    assert_eq!(world.ultravox.requests(), 1);
    Ok(())
}
