//! Somebody on the line who changes what passes: with him in between, the real bridge looks like a
//! broken one.
//!
//! A [`Meddler`] takes connections at a port of his own and carries each to where it was meant to
//! go. HTTP he changes as it comes, WebSocket message by message (he takes the masks off and puts
//! them on again). He does not speak TLS.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, OnceLock};
use std::thread;

/// What becomes of a text: of a message, or of a piece of HTTP. Often the same, sometimes two.
pub type Edit = fn(&str) -> Vec<String>;

const TEXT: u8 = 0x81;
const CLOSE: u8 = 0x88;

pub struct Meddler {
    pub port: u16,
    target: Arc<OnceLock<u16>>,
}

/// What is changed on the way to the target, and on the way back.
#[derive(Clone, Copy, Default)]
pub struct Edits {
    pub there: Option<Edit>,
    pub back: Option<Edit>,
    /// The code of a close frame on the way back.
    pub close_code: Option<u16>,
}

impl Meddler {
    /// His connections wait until he knows where they go.
    pub fn open(edits: Edits) -> io::Result<Meddler> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let target = Arc::new(OnceLock::new());
        let known = Arc::clone(&target);
        // Ends with the test program.
        thread::Builder::new().name("meddler".to_owned()).spawn(move || {
            for near in listener.incoming().flatten() {
                let known = Arc::clone(&known);
                // A connection that breaks is missed by those at its ends.
                thread::spawn(move || carry(near, *known.wait(), edits));
            }
        })?;
        Ok(Meddler { port, target })
    }

    pub fn leads_to(&self, port: u16) {
        self.target.get_or_init(|| port);
    }
}

fn carry(mut near: TcpStream, port: u16, edits: Edits) -> io::Result<()> {
    let mut far = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let head = read_head(&mut near)?;
    let is_upgrade = String::from_utf8_lossy(&head).to_lowercase().contains("upgrade: websocket");
    far.write_all(&head)?;
    if is_upgrade {
        let answer = read_head(&mut far)?;
        near.write_all(&answer)?;
    }
    let (back_from, back_to) = (far.try_clone()?, near.try_clone()?);
    let back = thread::spawn(move || pass(back_from, back_to, is_upgrade, edits));
    // Whoever calls also closes, and is left alone in that.
    let there = pass(near, far, is_upgrade, Edits { back: edits.there, ..Edits::default() });
    drop(back.join());
    there
}

fn pass(mut from: TcpStream, mut to: TcpStream, framed: bool, edits: Edits) -> io::Result<()> {
    let passed = loop {
        let next = if framed { frame(&mut from, edits) } else { piece(&mut from, edits.back) };
        match next {
            // The end; of messages that is an error, and none may be left out.
            Ok(bytes) if bytes.is_empty() && !framed => break Ok(()),
            Ok(bytes) => {
                if let Err(error) = to.write_all(&bytes) {
                    break Err(error);
                }
            }
            Err(error) => break Err(error),
        }
    };
    // Gone already, perhaps.
    drop(to.shutdown(Shutdown::Write));
    passed
}

fn read_head(from: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        from.read_exact(&mut byte)?;
        head.extend_from_slice(&byte);
    }
    Ok(head)
}

fn piece(from: &mut TcpStream, edit: Option<Edit>) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; 64 * 1024];
    let count = from.read(&mut buffer)?;
    buffer.truncate(count);
    Ok(match edit {
        Some(edit) => edit(&String::from_utf8_lossy(&buffer)).concat().into_bytes(),
        None => buffer,
    })
}

/// The next WebSocket frame, or those in its place (RFC 6455, 5.2).
fn frame(from: &mut TcpStream, edits: Edits) -> io::Result<Vec<u8>> {
    let mut head = [0; 2];
    from.read_exact(&mut head)?;
    let [opcode, length] = head;
    let mut exact = |count: usize| -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        from.read_exact(&mut bytes)?;
        Ok(bytes)
    };
    let big_endian =
        |bytes: Vec<u8>| bytes.iter().fold(0, |sum: usize, byte| sum << 8 | usize::from(*byte));
    let count = match length & 0x7F {
        126 => big_endian(exact(2)?),
        127 => big_endian(exact(8)?),
        short => usize::from(short),
    };
    let mask = if length & 0x80 == 0 { Vec::new() } else { exact(4)? };
    let mut payload = exact(count)?;
    apply(&mask, &mut payload);
    if let (CLOSE, Some(code)) = (opcode, edits.close_code) {
        payload = code.to_be_bytes().to_vec();
    }
    let payloads = match (opcode, edits.back, String::from_utf8(payload.clone())) {
        (TEXT, Some(edit), Ok(text)) => edit(&text).into_iter().map(String::into_bytes).collect(),
        _ => vec![payload],
    };
    let mut frames = Vec::new();
    for mut payload in payloads {
        let length = u64::try_from(payload.len()).map_err(io::Error::other)?;
        frames.extend([opcode, if mask.is_empty() { 0x7F } else { 0xFF }]);
        frames.extend(length.to_be_bytes());
        frames.extend_from_slice(&mask);
        apply(&mask, &mut payload);
        frames.append(&mut payload);
    }
    Ok(frames)
}

fn apply(mask: &[u8], payload: &mut [u8]) {
    for (byte, mask) in payload.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}
