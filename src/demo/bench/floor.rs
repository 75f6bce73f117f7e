//! The floor: bare threads that copy the same bytes between the same kinds of sockets.
//!
//! It runs as a child process in the bridge's place (`callbridge demo --floor`), so that its
//! cost is measured in the same way. It does nothing with the sound: less cannot be done.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use crate::demo::backstage::{moot, spawn};
use crate::demo::http::connect;

/// The child process of [`stage`](super::stage): for every connection one to the agents, and two
/// threads that copy. It ends when nobody holds its stdin any more.
pub(super) fn be_the_floor(agents: &str) -> io::Result<()> {
    let agents: SocketAddr = agents.parse().map_err(io::Error::other)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    writeln!(io::stderr(), "listening on {}", listener.local_addr()?)?;
    spawn("floor", move || {
        for caller in listener.incoming() {
            // A leg that does not come about is missed at the phone.
            moot(caller.and_then(|caller| copy_both_ways(caller, agents)));
        }
    })?;
    io::copy(&mut io::stdin(), &mut io::sink()).map(drop)
}

fn copy_both_ways(caller: TcpStream, agents: SocketAddr) -> io::Result<()> {
    caller.set_nodelay(true)?;
    let caller = Arc::new(caller);
    let agent = Arc::new(connect(agents)?);
    for (from, to) in [(&caller, &agent), (&agent, &caller)] {
        let (from, to) = (Arc::clone(from), Arc::clone(to));
        thread::Builder::new().stack_size(64 * 1_024).spawn(move || {
            let mut chunk = [0; 4 * 1_024];
            while let Ok(count) = (&*from).read(&mut chunk)
                && count > 0
                && (&*to).write_all(chunk.get(..count).unwrap_or_default()).is_ok()
            {}
            for socket in [&from, &to] {
                moot(socket.shutdown(Shutdown::Both));
            }
        })?;
    }
    Ok(())
}
