//! What goes through the door, and how it comes out on the other side.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::{Read as _, Write as _};
use std::thread;

use crate::door::head::HEAD_BYTES_MAX;
use crate::door::inner::pass_answer;
use crate::testing::sockets;

/// Whatever the pieces in which it comes, and whatever comes before it.
#[test]
fn the_answer_says_once_that_the_line_is_closed_after_it() {
    let go_ahead = "HTTP/1.1 100 Continue\r\nServer: s\r\n\r\n";
    let body = "HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n".repeat(200);
    for interim in [String::new(), go_ahead.to_owned(), go_ahead.repeat(3)] {
        for status in ["HTTP/1.1 200 OK\r\n", "HTTP/1.0 404 Not Found\r\n"] {
            let rest = format!("Content-Length: {}\r\n\r\n{body}", body.len());
            let answer = format!("{interim}{status}{rest}");
            for pieces in [1, 7, 1_000, answer.len()] {
                let ((from, http), (to, mut peer)) = (sockets(), sockets());
                let sending = answer.clone();
                let sender = thread::spawn(move || {
                    for piece in sending.as_bytes().chunks(pieces) {
                        (&http).write_all(piece).unwrap();
                    }
                });
                let passing = thread::spawn(move || pass_answer(&from, &to));
                let mut passed = String::new();
                peer.read_to_string(&mut passed).unwrap();
                sender.join().unwrap();
                passing.join().unwrap().unwrap();
                let wanted = format!("{interim}{status}Connection: close\r\n{rest}");
                assert!(passed == wanted, "in pieces of {pieces}: {passed:.200}");
            }
        }
    }
    // Without a body there is no length of one.
    for (status, says) in [("204 No Content", "Connection: close\r\n"), ("100 Continue", "")] {
        let ((from, mut http), (to, mut peer)) = (sockets(), sockets());
        let answer =
            format!("HTTP/1.1 {status}\r\nServer: s\r\ncontent-length: 0\r\nDate: d\r\n\r\n");
        http.write_all(answer.as_bytes()).unwrap();
        drop(http);
        // An interim answer is none: there would have to be another.
        assert_eq!(pass_answer(&from, &to).is_ok(), !says.is_empty());
        drop((from, to));
        let mut passed = String::new();
        peer.read_to_string(&mut passed).unwrap();
        assert_eq!(passed, format!("HTTP/1.1 {status}\r\n{says}Server: s\r\nDate: d\r\n\r\n"));
    }
    // What is no answer does not become one, and does not fill the memory.
    let endless = "x".repeat(2 * HEAD_BYTES_MAX);
    for broken in ["", "HTTP/1.1 200 OK", go_ahead, &go_ahead.repeat(1_000), &endless] {
        let ((from, http), (to, peer)) = (sockets(), sockets());
        let sending = broken.to_owned();
        let sender = thread::spawn(move || (&http).write_all(sending.as_bytes()));
        assert!(pass_answer(&from, &to).is_err(), "{broken:.60}");
        drop((from, to, peer));
        sender.join().unwrap().ok();
    }
}
