//! What goes on of a head, and what is refused because two readers could differ over it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use crate::door::request::passed_on;

fn text_of(head: &str) -> String {
    String::from_utf8(passed_on(head.as_bytes()).unwrap()).unwrap()
}

#[test]
fn a_head_goes_on_with_what_is_needed_and_nothing_else() {
    let cases = [
        ("GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\nConnection: close\r\n\r\n"),
        (
            "POST /incoming-call HTTP/1.0\r\nX: \u{e9}\r\nhost:h\r\nUpgrade: h2c\r\n\
             Connection: keep-alive, Upgrade\r\nContent-length:\t4 \r\n\r\na=\u{e9}\r\n\r\n",
            "POST /incoming-call HTTP/1.0\r\nConnection: close\r\nHost: h\r\n\
             Content-Length: 4\r\n\r\na=\u{e9}\r\n\r\n",
        ),
        (
            "GET HTTP://user@x:80/media-stream/x?a HTTP/1.1\r\nupgrade: h2c, WebSocket\r\n\
             Connection: keep-alive\r\nConnection: upgrade\r\nSec-WebSocket-Key: k\r\n\r\n",
            "GET /media-stream/x?a HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Key: k\r\n\r\n",
        ),
        (
            "GET https://x HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            "GET / HTTP/1.1\r\nConnection: close\r\n\r\n",
        ),
        (
            "GET / HTTP/1.1\r\nx-forwarded-for: 1\r\nX-Forwarded-For: 2\r\nVia: v\r\n\r\n",
            "GET / HTTP/1.1\r\nConnection: close\r\nVia: a proxy\r\n\r\n",
        ),
        ("OPTIONS * HTTP/1.1\r\n\r\n", "OPTIONS * HTTP/1.1\r\nConnection: close\r\n\r\n"),
        ("GET /a://b/c HTTP/1.1\r\n\r\n", "GET /a://b/c HTTP/1.1\r\nConnection: close\r\n\r\n"),
    ];
    for (head, wanted) in cases {
        assert_eq!(text_of(head), wanted);
        assert_eq!(text_of(wanted), wanted, "it is as it is to be");
    }
    let long = format!("GET / HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(2_000));
    assert_eq!(text_of(&long), "GET / HTTP/1.1\r\nConnection: close\r\n\r\n");
}

#[test]
fn what_two_readers_could_understand_differently_is_refused() {
    let lines = "the request line is not ";
    let (twice, plain) = ("a header that matters is there twice", "matters is not plain text");
    let (no_header, framing) =
        ("a line of the head is no header", "where the body ends is not clear");
    for (head, wanted) in [
        ("GET  / HTTP/1.1\r\n", lines),
        ("GET / / HTTP/1.1\r\n", lines),
        ("GET\t/ HTTP/1.1\r\n", lines),
        ("G\"T / HTTP/1.1\r\n", lines),
        ("GET /\u{e9} HTTP/1.1\r\n", lines),
        ("GET /\nX: HTTP/1.1\r\n", lines),
        ("GET / HTTP/1.1\rX: \u{e9}\r\n", lines),
        ("GET / HTTP/1.1\rX:y\r\n", lines),
        ("GET / HTTP/1.1\r\nno header\r\n", no_header),
        ("GET / HTTP/1.1\r\n: x\r\n", no_header),
        ("GET / HTTP/1.1\r\nHost : x\r\n", no_header),
        ("GET / HTTP/1.1\r\nX: y\r\n z\r\n", no_header),
        ("GET / HTTP/1.1\r\nX: y\nHost: z\r\n", no_header),
        ("GET / HTTP/1.1\r\nX: y\rz\r\n", no_header),
        ("GET / HTTP/1.1\r\nX: y\0\r\n", no_header),
        ("GET / HTTP/1.1\r\nX\u{e9}: y\r\n", no_header),
        ("GET / HTTP/1.1\r\nHost: x\r\nhost: x\r\n", twice),
        ("GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n", twice),
        ("GET / HTTP/1.1\r\nOrigin: \u{e9}\r\n", plain),
        ("GET / HTTP/1.1\r\nTransfer-Encoding: \u{b}chunked\r\n", plain),
        ("GET / HTTP/1.1\r\nContent-Length:\r\n", framing),
        ("GET / HTTP/1.1\r\nContent-Length: +1\r\n", framing),
        ("GET / HTTP/1.1\r\nContent-Length: 1 1\r\n", framing),
        ("GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n", framing),
        ("GET / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n", framing),
        ("GET / HTTP/1.1\r\nTransfer-Encoding: identity\r\n", framing),
        ("GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n", framing),
        ("GET / HTTP/1.1\r\n", "NotHttp"),
    ] {
        let end = if wanted == "NotHttp" { "" } else { "\r\n" };
        let refusal = passed_on(format!("{head}{end}").as_bytes()).unwrap_err();
        assert!(format!("{refusal:?}").contains(wanted), "{head:?}: {refusal:?}");
    }
}
