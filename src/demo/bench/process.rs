//! A child process that says on stderr where it listens: the bridge or the floor.
//!
//! It is killed when dropped, so that no run of the benchmark leaves one behind.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::demo::PATIENCE;
use crate::demo::backstage::moot;
use crate::demo::server::{ChildLog, Running};

/// A child process that says on stderr where it listens. Killed when dropped.
pub(super) struct Process {
    running: Option<Running>,
    pub(super) pid: u32,
    pub(super) started: Instant,
    pub(super) address: SocketAddr,
    log: ChildLog,
}

impl Process {
    pub(super) fn launch(mut command: Command, log: &ChildLog) -> Result<Process, String> {
        const LISTENING: &str = "listening on 127.0.0.1:";
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let seen = log.len();
        let started = Instant::now();
        let running = log
            .begin(command)
            .map_err(|error| format!("the program cannot be started again: {error}"))?;
        let mut child = Process {
            pid: running.child.id(),
            running: Some(running),
            started,
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            log: log.clone(),
        };
        let port = log.book.wait(PATIENCE, |book| {
            let mut lines = book.lines.iter().skip(seen);
            let line = lines.find_map(|line| line.split_once(LISTENING));
            let digits = line
                .map(|(_, port)| port.chars().take_while(char::is_ascii_digit).collect::<String>());
            digits.map(Ok).or_else(|| book.ended.then_some(Err(())))
        });
        match port {
            Some(Ok(port)) => child.address.set_port(port.parse().unwrap_or(0)),
            Some(Err(())) => return Err(child.trouble("it ended before it listened")),
            None => return Err(child.trouble("it does not say where it listens")),
        }
        Ok(child)
    }

    /// What went wrong, with the last lines of the child's log.
    pub(super) fn trouble(&self, what: &str) -> String {
        self.log.trouble(what).with_log()
    }

    pub(super) fn end(&mut self) {
        let Some(mut running) = self.running.take() else { return };
        // It may have ended by itself.
        moot(running.child.kill());
        moot(running.child.wait());
        moot(running.listener.join());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}
