//! What only the tests ask of a [`World`]: settings that differ, and a look into the data
//! directory.
//!
//! The shipped program does not contain this file.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::demo::backstage::lock;
use crate::demo::http::HttpAnswer;
use crate::demo::phone::Phone;
use crate::demo::rest::Order;
use crate::demo::trouble::Trouble;
use crate::demo::twilio::{Ringing, incoming_call_form, twilio_signature};
use crate::demo::world::{World, WorldBuilder};
use crate::demo::{OUR_NUMBER, PATIENCE};

impl World {
    /// The person whom the bridge has rung picks up: Twilio posts to the `Url`
    /// that the order named.
    #[track_caller]
    pub fn picks_up(&self, order: &Order) -> Result<Ringing, Trouble> {
        let person = order.field("To").unwrap_or_default();
        let mut form = incoming_call_form(OUR_NUMBER);
        for (name, value) in &mut form {
            match name.as_str() {
                "CallSid" => order.sid.clone_into(value),
                "To" | "Called" => person.clone_into(value),
                "Direction" => "outbound-api".clone_into(value),
                "CallStatus" => "in-progress".clone_into(value),
                _ => {}
            }
        }
        let url = order.field("Url").unwrap_or_default();
        let path = url.strip_prefix(&self.public_url).unwrap_or(url);
        self.ask_for_twiml(path, person, &form)
    }

    /// A GET without credentials.
    #[track_caller]
    pub fn get(&self, path: &str) -> Result<HttpAnswer, Trouble> {
        self.request("GET", path, &[], &[])
    }

    /// A call that rings, and its media stream, on which nothing has been sent yet: for tests that
    /// want to send something else than Twilio would.
    #[track_caller]
    pub fn open_socket(&self) -> Result<Phone, Trouble> {
        let ringing = self.ring("anonymous")?;
        // Whoever connects next shall not take this one's agent for theirs.
        self.ultravox.next_call(PATIENCE)?;
        let url = ringing.twiml.stream_url.as_deref().unwrap_or_default();
        let signature = twilio_signature(&self.auth_token, url, &[]);
        self.upgrade(&ringing.twiml.stream_path(), Some(&signature))
    }

    /// `wss://…/media-stream/`, before the token.
    pub fn stream_url(&self) -> String {
        format!("{}/media-stream/", self.public_url.replacen("http", "ws", 1))
    }

    /// The signature that Twilio would send with this form to this path.
    pub fn signature(&self, path: &str, form: &[(&str, &str)]) -> String {
        twilio_signature(&self.auth_token, &format!("{}{path}", self.public_url), form)
    }

    /// Where the bridge keeps its journals.
    pub fn data_dir(&self) -> PathBuf {
        self.bridge.home.path().join("data")
    }

    /// The journals in it, oldest first.
    pub fn journals(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.data_dir().join("calls")).into_iter().flatten();
        let mut paths: Vec<PathBuf> =
            entries.filter_map(Result::ok).map(|entry| entry.path()).collect();
        paths.sort();
        paths
    }

    /// The events in the journal of that call, lines that are no JSON left out.
    pub fn journal(&self, call_sid: &str) -> Vec<Value> {
        let is_its = |path: &PathBuf| path.to_string_lossy().contains(call_sid);
        let text = self.journals().into_iter().find(is_its).map(std::fs::read_to_string);
        let text = text.and_then(Result::ok).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// The bridge's working directory.
    pub fn home(&self) -> &Path {
        self.bridge.home.path()
    }
}

impl WorldBuilder {
    /// Opens all doors, but does not start the bridge.
    #[must_use]
    pub fn asleep(mut self) -> WorldBuilder {
        self.asleep = true;
        self
    }

    /// Takes a setting of the bridge away.
    #[must_use]
    pub fn without(mut self, name: &str) -> WorldBuilder {
        self.changes.push((name.to_owned(), None));
        self
    }
}

/// A loopback port that the system gives to nobody for as long as this is held. It is bound, so no
/// other program is handed it, and not listened at, so whoever knocks is refused; a server that
/// asks for it by number gets it, again and again.
pub(super) struct HeldPort {
    pub(super) port: u16,
    _bound: Socket,
}

impl HeldPort {
    pub(super) fn new() -> io::Result<HeldPort> {
        let bound = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        // As std's listeners do: two sockets may share a port while at most one of them listens.
        bound.set_reuse_address(true)?;
        bound.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
        let address = bound.local_addr()?.as_socket();
        let port = address.ok_or(io::ErrorKind::AddrNotAvailable)?.port();
        Ok(HeldPort { port, _bound: bound })
    }
}

/// A loopback port on which nobody listens: "connection refused" on demand. It is held until the
/// test program ends, so nobody will, but for a server that is told to.
pub fn closed_port() -> u16 {
    static HELD: Mutex<Vec<HeldPort>> = Mutex::new(Vec::new());
    match HeldPort::new() {
        Ok(held) => {
            let port = held.port;
            lock(&HELD).push(held);
            port
        }
        // "Discard", which is nobody's either.
        Err(_) => 9,
    }
}
