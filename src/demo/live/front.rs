//! The address that a person opens: it leads to the server, and shows it the password.
//!
//! The server in the pretend world is one that is reachable from outside, as Twilio must reach it,
//! so its page asks for `API_TOKEN`. Whoever is at this machine need not: this door, on loopback
//! only, adds the token to what comes from here. A page from elsewhere does not get in, under a
//! name that was made to lead here (DNS rebinding) neither.

use std::io::{self, BufReader, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

use crate::demo::backstage::moot;
use crate::demo::http::{connect, find_header, read_head};
use crate::demo::world::World;

const NOT_FROM_HERE: &[u8] = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 27\r\n\
    Connection: close\r\n\r\nopen it as http://localhost";

pub(super) fn open(world: &World, port: u16, token: String) -> io::Result<SocketAddr> {
    let bridge = world.bridge.address();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    world.backstage.listen_at(listener, "live page", move |tcp| {
        // A browser that leaves in the middle of something may do so.
        moot(pass(&tcp, bridge, &token));
    })
}

/// One request, and all that follows if it opens a WebSocket: the server closes after each.
fn pass(tcp: &TcpStream, bridge: SocketAddr, token: &str) -> io::Result<()> {
    let mut reader = BufReader::new(tcp.try_clone()?);
    let Some((first, headers)) = read_head(&mut reader)? else { return Ok(()) };
    if !is_from_here(&headers) {
        return (&*tcp).write_all(NOT_FROM_HERE);
    }
    let mut head = format!("{first}\r\n");
    for (name, value) in &headers {
        if !name.eq_ignore_ascii_case("authorization") {
            head.extend([name, ": ", value, "\r\n"]);
        }
    }
    head.extend(["Authorization: Bearer ", token, "\r\n\r\n"]);
    let behind = connect(bridge)?;
    (&behind).write_all(head.as_bytes())?;
    thread::scope(|scope| {
        let inwards = || {
            moot(io::copy(&mut reader, &mut &behind));
            moot(behind.shutdown(Shutdown::Write));
        };
        thread::Builder::new().name("live page in".into()).spawn_scoped(scope, inwards)?;
        moot(io::copy(&mut &behind, &mut &*tcp));
        tcp.shutdown(Shutdown::Both)
    })
}

fn is_from_here(headers: &[(String, String)]) -> bool {
    let host = find_header(headers, "host").unwrap_or_default();
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    let is_ours = name.eq_ignore_ascii_case("localhost") || name == "127.0.0.1";
    let origin = find_header(headers, "origin");
    is_ours && origin.is_none_or(|origin| origin == format!("http://{host}"))
}
