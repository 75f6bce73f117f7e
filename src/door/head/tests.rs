//! The head of a request: what is read of it, what is refused, and where it leads.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::{Read as _, Write as _};

use crate::door::head::{HEAD_BYTES_MAX, find, read_head, stream_token};
use crate::testing::sockets;

#[test]
fn only_a_get_of_the_media_stream_goes_to_step_5() {
    let yes = [
        ("/media-stream/CA1/5d8e", "CA1/5d8e"),
        ("/media-stream/CA1/5d8e/", "CA1/5d8e"),
        ("/media-stream/CA1/5d8e?x=1/2", "CA1/5d8e"),
        ("/media-stream/check", "check"),
        ("/media-stream/", ""),
        ("/media-stream/../health", "../health"),
    ];
    for (path, token) in yes {
        let head = format!("GET {path} HTTP/1.1\r\nHost: h\r\n\r\n");
        assert_eq!(stream_token(head.as_bytes()).as_deref(), Some(token), "{path}");
    }
    let no = [
        "GET /media-streams HTTP/1.1\r\n\r\n",
        "GET /media-stream HTTP/1.1\r\n\r\n",
        "GET /Media-Stream HTTP/1.1\r\n\r\n",
        "GET //media-stream HTTP/1.1\r\n\r\n",
        "GET /media-stream",
        "GET /health?/media-stream/CA1 HTTP/1.1\r\n\r\n",
        "POST /media-stream/CA1/5d8e HTTP/1.1\r\n\r\n",
        "POST /incoming-call HTTP/1.1\r\n\r\nGET /media-stream/CA1/5d8e HTTP/1.1\r\n\r\n",
        "",
    ];
    for head in no {
        assert_eq!(stream_token(head.as_bytes()), None, "{head}");
    }
}

#[test]
fn a_head_is_read_to_its_empty_line_with_what_came_along() {
    let request = "POST /incoming-call HTTP/1.1\r\nHost: h\r\nX: \u{e9}\r\n\r\nFrom=%2B49";
    // An empty line before it is none of it.
    for (before, pieces) in [("", 1), ("\r\n", 1), ("\r\n", 100)] {
        let (near, mut far) = sockets();
        for piece in [before, request].concat().as_bytes().chunks(pieces) {
            far.write_all(piece).unwrap();
        }
        drop(far);
        let head = read_head(&near).unwrap();
        let end = find(&head, b"\r\n\r\n").unwrap() + 4;
        assert!(request.as_bytes().starts_with(&head), "nothing is lost or made up");
        let mut rest = head[end..].to_vec();
        (&*near).read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"From=%2B49", "what was not read with the head is still there");
    }
}

#[test]
fn what_is_not_a_request_is_refused_at_the_door() {
    let long = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(2 * HEAD_BYTES_MAX));
    let cases: [(&[u8], &str); 12] = [
        (b"", "Left"),
        (b"GET / HTTP/1.1\r\nHost: h\r\n", "Left"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "Tls"),
        (b"get / HTTP/1.1\r\n\r\n", "NotHttp"),
        (b"\r\n\r\nGET / HTTP/1.1\r\n\r\n", "NotHttp"),
        (b"\rGET / HTTP/1.1\r\n\r\n", "NotHttp"),
        (b"\r\n", "Left"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "NotHttp"),
        (b"GET /\r\n\r\n", "NotHttp"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "NotHttp"),
        (b"\xff\xff\xff\xff", "NotHttp"),
        (long.as_bytes(), "TooLong"),
    ];
    for (bytes, wanted) in cases {
        let (near, mut far) = sockets();
        far.write_all(bytes).unwrap();
        drop(far);
        let refusal = read_head(&near).unwrap_err();
        let begin = String::from_utf8_lossy(&bytes[..bytes.len().min(30)]).into_owned();
        assert_eq!(format!("{refusal:?}"), wanted, "{begin:?}");
    }
}

#[test]
fn bytes_are_found_in_bytes() {
    assert_eq!(find(b"one\r\n\r\ntwo", b"\r\n\r\n"), Some(3));
    assert_eq!((find(b"", b"\r\n"), find(b"\r", b"\r\n")), (None, None));
}
