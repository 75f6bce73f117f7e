//! How a connection is when it comes through the door.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::Duration;

use crate::door::reply::Reply;
use crate::door::{Hall, Visitor, open};
use crate::testing::DEADLINE;
use crate::toolbox::socket::WRITE_WITHIN;

/// Says of each stream whether it is sent without delay, and how long a write may take.
struct Watching(mpsc::Sender<(bool, Option<Duration>)>);

impl Hall for Watching {
    fn answer(&'static self, _: &mut tiny_http::Request) -> Reply {
        Reply::text(404, "there is nothing here")
    }

    fn take_stream(&'static self, _: &str, visitor: &Visitor, _: Vec<u8>) -> bool {
        let socket = &visitor.socket;
        self.0.send((socket.nodelay().unwrap(), socket.write_timeout().unwrap())).unwrap();
        true
    }
}

/// Sound is not held back to fill a packet, and a caller's side that takes nothing holds nobody up.
#[test]
fn a_stream_is_sent_at_once_or_given_up() {
    let (sender, streams) = mpsc::channel();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    open(listener, Box::leak(Box::new(Watching(sender))), || 1).unwrap();
    let mut far = TcpStream::connect(address).unwrap();
    far.write_all(b"GET /media-stream/token HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
    assert_eq!(streams.recv_timeout(DEADLINE).unwrap(), (true, Some(WRITE_WITHIN)));
}
