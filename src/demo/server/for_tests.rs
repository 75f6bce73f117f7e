//! What only the tests do to a [`Server`]: signals, other verbs, restarts, a look at its log.
//!
//! The shipped program does not contain this file.

use std::io::{self, Write as _};
use std::process::{Command, ExitStatus, Output};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;
use std::{process, thread};

use crate::demo::backstage::{lock, moot, spawn};
use crate::demo::server::Server;
use crate::demo::trouble::Trouble;

impl Server {
    /// From now on the world comes in through a proxy that listens here, until
    /// the next [`Server::restart`], which would take the proxy's port.
    pub fn is_behind(&self, port: u16) {
        self.port.store(port, Ordering::Release);
    }

    /// The process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        lock(&self.running).as_ref().map(|running| running.child.id())
    }

    /// Asks the process to end (SIGTERM) and does not wait.
    #[track_caller]
    pub fn ask_to_stop(&self) -> Result<(), Trouble> {
        self.signal("TERM")
    }

    /// Sends a signal, such as `INT`, and does not wait.
    #[track_caller]
    pub fn signal(&self, name: &str) -> Result<(), Trouble> {
        let Some(pid) = self.pid() else {
            return Err(self.log.trouble("the bridge is not running"));
        };
        // std can only kill. The program `kill` saves an unsafe call here.
        match Command::new("kill").arg(format!("-{name}")).arg(pid.to_string()).status() {
            Ok(status) if status.success() => Ok(()),
            other => Err(self.log.trouble(format!("kill -{name} {pid}: {other:?}"))),
        }
    }

    /// Runs the program beside the server: same settings, same data, another
    /// verb.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> Result<Output, Trouble> {
        self.run_with(arguments, &[])
    }

    /// As [`Server::run`], with settings changed or, where there is nothing,
    /// taken away.
    #[track_caller]
    pub fn run_with(
        &self,
        arguments: &[&str],
        changes: &[(&str, Option<&str>)],
    ) -> Result<Output, Trouble> {
        let mut command = self.command();
        for (name, value) in changes {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let output = command.args(arguments).output();
        output.map_err(|error| self.log.trouble(format!("cannot run {arguments:?}: {error}")))
    }

    /// The settings of the bridge around another program, for `script` and the
    /// like.
    pub fn command_in(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = self.surround(Command::new(program));
        command.args(arguments);
        command
    }

    /// Waits until the process has ended, and says how.
    #[track_caller]
    pub fn wait_exit(&self, within: Duration) -> Result<ExitStatus, Trouble> {
        // A process that ends closes its stderr, which the log notices. That
        // spares us asking again and again.
        if self.log.book.wait(within, |book| book.ended.then_some(())).is_none() {
            return Err(self.log.trouble(format!("the bridge did not end within {within:?}")));
        }
        let Some(mut running) = lock(&self.running).take() else {
            return Err(self.log.trouble("the bridge is not running"));
        };
        moot(running.listener.join());
        running.child.wait().map_err(|error| self.log.trouble(error.to_string()))
    }

    /// Starts the bridge again: same settings, same data, same port.
    #[track_caller]
    pub fn restart(&self) -> Result<(), Trouble> {
        self.kill();
        self.launch(self.port.load(Ordering::Acquire))
    }

    /// Every line the bridge has written to stderr, over all its lives.
    pub fn log(&self) -> Vec<String> {
        self.log.book.look(|book| book.lines.clone())
    }

    /// Waits for a line that contains this, be it old or new.
    #[track_caller]
    pub fn wait_for_log(&self, fragment: &str) -> Result<String, Trouble> {
        self.wait_for_log_since(0, fragment)
    }

    /// From now on whoever calls the bridge reaches this port instead, and somebody there who
    /// passes things on.
    pub fn stand_behind(&self, port: u16) {
        self.port.store(port, Ordering::Release);
    }
}

/// No test keeps one server process for longer. The slowest takes half a minute, so this is a test
/// that hangs.
const TEST_WITHIN: Duration = Duration::from_mins(5);

/// Ends the test program, and names the test, if it is not dropped in time. A thread that hangs
/// cannot be made to fail, and a run that never ends says nothing.
pub(in crate::demo) struct Limit(Sender<()>);

impl Limit {
    pub(super) fn new(child: u32) -> io::Result<Limit> {
        let (held, dropped) = channel();
        let test = thread::current().name().unwrap_or("a test").to_owned();
        spawn("limit of a test", move || {
            if dropped.recv_timeout(TEST_WITHIN) == Err(RecvTimeoutError::Timeout) {
                let why = format!("{test} has hung for {} s", TEST_WITHIN.as_secs());
                // Not `eprintln!`: what a test prints is kept until it ends.
                moot(writeln!(io::stderr(), "{why}"));
                moot(Command::new("kill").arg("-KILL").arg(child.to_string()).status());
                process::exit(101);
            }
        })?;
        Ok(Limit(held))
    }
}
