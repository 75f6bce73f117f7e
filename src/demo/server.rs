//! The real server as a child process, known only from outside.
//!
//! Settings go in through the environment, the log comes out of stderr, and all else goes over
//! sockets. [`Server`] starts the program, learns from its log where it listens, and kills it
//! in the end. [`ChildLog`] keeps every line that a child has written: who has to complain
//! takes the last ones along.
//!
//! It never looks into the server's memory or files, and no environment variable of this
//! process reaches the child but `PATH`.

use std::io::{self, BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use tempfile::TempDir;

use crate::demo::PATIENCE;
use crate::demo::backstage::{Board, lock, moot, spawn};
use crate::demo::trouble::Trouble;

#[cfg(test)]
mod for_tests;

/// So much of the bridge's log stands under a failure.
const LAST_WORDS: usize = 20;

/// The child process, its settings and its log.
pub struct Server {
    program: PathBuf,
    /// Its working directory, gone when dropped.
    pub(super) home: TempDir,
    settings: Vec<(String, String)>,
    log: ChildLog,
    port: AtomicU16,
    running: Mutex<Option<Running>>,
}

pub(super) struct Running {
    pub(super) child: Child,
    pub(super) listener: JoinHandle<()>,
    #[cfg(test)]
    pub(super) _limit: for_tests::Limit,
}

impl Server {
    pub(super) fn new(
        program: PathBuf,
        home: TempDir,
        settings: Vec<(String, String)>,
        log: &ChildLog,
    ) -> Server {
        Server {
            program,
            home,
            settings,
            log: log.clone(),
            port: AtomicU16::new(0),
            running: Mutex::new(None),
        }
    }

    #[track_caller]
    pub(super) fn launch(&self, port: u16) -> Result<(), Trouble> {
        let seen = self.log.len();
        let mut command = self.command();
        command.env("PORT", port.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let running = self.log.begin(command);
        let running = match running {
            Ok(running) => running,
            Err(error) => {
                let program = self.program.display();
                return Err(self.log.trouble(format!("cannot start {program}: {error}")));
            }
        };
        *lock(&self.running) = Some(running);
        let line = self.wait_for_log_since(seen, "listening on 127.0.0.1:")?;
        let port = line.split("listening on 127.0.0.1:").nth(1).unwrap_or_default();
        let digits: String = port.chars().take_while(char::is_ascii_digit).collect();
        let Ok(port) = digits.parse() else {
            return Err(self.log.trouble(format!("no port in the line {line:?}")));
        };
        self.port.store(port, Ordering::Release);
        Ok(())
    }

    /// Where the bridge listens.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port.load(Ordering::Acquire)))
    }

    /// Ends the process as a power cut would, and waits until it is gone.
    pub fn kill(&self) {
        let Some(mut running) = lock(&self.running).take() else {
            return;
        };
        // It may have ended by itself: then there is nothing to kill.
        moot(running.child.kill());
        moot(running.child.wait());
        moot(running.listener.join());
    }

    fn command(&self) -> Command {
        self.surround(Command::new(&self.program))
    }

    fn surround(&self, mut command: Command) -> Command {
        command.env_clear().current_dir(self.home.path());
        command.envs(self.settings.iter().filter(|(name, _)| name != "PORT").cloned());
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        command
    }

    /// Waits for a line that contains this and is not one of the first `seen`.
    #[track_caller]
    pub fn wait_for_log_since(&self, seen: usize, fragment: &str) -> Result<String, Trouble> {
        let found = self.log.book.wait(PATIENCE, |book| {
            let line = book.lines.iter().skip(seen).find(|line| line.contains(fragment));
            match line {
                Some(line) => Some(Some(line.clone())),
                None if book.ended => Some(None),
                None => None,
            }
        });
        match found {
            Some(Some(line)) => Ok(line),
            Some(None) => Err(self.log.trouble(format!("the bridge ended without {fragment:?}"))),
            None => Err(self.log.trouble(format!("no log line has {fragment:?}"))),
        }
    }
}

/// What the child wrote to stderr, shared by all who may have to complain.
#[derive(Clone, Default)]
pub(super) struct ChildLog {
    pub(super) book: Arc<Board<LogBook>>,
}

#[derive(Default)]
pub(super) struct LogBook {
    pub(super) lines: Vec<String>,
    pub(super) ended: bool,
}

impl ChildLog {
    /// Starts the child, and a thread that listens to it.
    pub(super) fn begin(&self, mut command: Command) -> io::Result<Running> {
        self.book.change(|book| book.ended = false);
        let mut child = command.spawn()?;
        let stderr = child.stderr.take();
        let book = Arc::clone(&self.book);
        let listener = spawn("bridge's log", move || {
            let Some(stderr) = stderr else { return };
            for line in BufReader::new(stderr).split(b'\n') {
                let Ok(line) = line else { break };
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                book.change(|book| book.lines.push(line));
            }
            book.change(|book| book.ended = true);
        })?;
        Ok(Running {
            #[cfg(test)]
            _limit: for_tests::Limit::new(child.id())?,
            child,
            listener,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.book.look(|book| book.lines.len())
    }

    #[track_caller]
    pub(super) fn trouble(&self, what: impl Into<String>) -> Trouble {
        let log = self.book.look(|book| {
            let skipped = book.lines.len().saturating_sub(LAST_WORDS);
            book.lines.iter().skip(skipped).cloned().collect()
        });
        Trouble::new(what.into(), log)
    }
}
