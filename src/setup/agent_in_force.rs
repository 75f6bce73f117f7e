//! The agent in force: what its files said when they were last right.
//!
//! An edited prompt counts from the next call on. Whoever has a call that rings asks for the
//! [latest](AgentInForce::latest): the files are looked at, and read again if they have changed.
//! What is wrong with them is named in the log and on the page, and the agent stays as it was. A
//! call keeps the agent that it has begun with.
//!
//! ```text
//! let agent = bridge.agent.latest(&bridge.config);
//! ```
//!
//! No call waits for the disk: the look has a thread of its own, and a call takes what there is if
//! that is not back in time. Nothing is read that the files do not name.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;

use crate::setup::agent::Agent;
use crate::setup::settings::Config;
use crate::toolbox::log::log;
use crate::toolbox::text::counted;
use crate::toolbox::threads::{lock, spawn, wait};

/// A look at a few files takes a millisecond. A call that rings waits no longer than this for one.
const LOOK_WITHIN: Duration = Duration::from_millis(250);

/// A file, when it was written and how long it was. None: there was none.
pub(super) type Seen = (PathBuf, Option<(SystemTime, u64)>);

pub(super) fn look_at(path: PathBuf) -> Seen {
    let written = fs::metadata(&path).and_then(|file| Ok((file.modified()?, file.len())));
    (path, written.ok())
}

pub(crate) struct AgentInForce {
    latest: Mutex<Latest>,
    changed: Condvar,
}

struct Latest {
    agent: Arc<Agent>,
    /// Since when it has been in force.
    read: Timestamp,
    /// What is wrong with the files that were read after it.
    mistakes: Vec<String>,
    seen: Vec<Seen>,
    /// Looks that were asked for, and those of them that are done.
    asked: u64,
    done: u64,
    is_looking: bool,
    /// Whether the files have changed or not.
    is_ordered: bool,
}

impl AgentInForce {
    pub(crate) fn load(config: &Config) -> Result<AgentInForce, Vec<String>> {
        let mut seen = Vec::new();
        Ok(AgentInForce::new(Agent::load_noting(config, &mut seen)?, seen))
    }

    /// Of an agent that nobody will edit.
    pub(crate) fn of(agent: Agent) -> AgentInForce {
        AgentInForce::new(agent, Vec::new())
    }

    fn new(agent: Agent, seen: Vec<Seen>) -> AgentInForce {
        let latest = Latest {
            agent: Arc::new(agent),
            read: Timestamp::now(),
            mistakes: Vec::new(),
            seen,
            asked: 0,
            done: 0,
            is_looking: false,
            is_ordered: false,
        };
        AgentInForce { latest: Mutex::new(latest), changed: Condvar::new() }
    }

    pub(crate) fn get(&self) -> Arc<Agent> {
        Arc::clone(&lock(&self.latest).agent)
    }

    /// With it, since when it has been in force, and what is wrong with the files since then.
    pub(crate) fn story(&self) -> (Arc<Agent>, Timestamp, Vec<String>) {
        let latest = lock(&self.latest);
        (Arc::clone(&latest.agent), latest.read, latest.mistakes.clone())
    }

    /// For a call that rings: with all that was edited before.
    pub(crate) fn latest(&'static self, config: &'static Config) -> Arc<Agent> {
        let wanted = self.look(config, false);
        let is_coming = |latest: &mut Latest| latest.is_looking && latest.done < wanted;
        let latest = wait(&self.changed, lock(&self.latest), LOOK_WITHIN, is_coming);
        Arc::clone(&latest.agent)
    }

    /// Ordered by SIGHUP.
    pub(crate) fn read_again(&'static self, config: &'static Config) {
        if config.agent_dir.is_none() {
            log!(Info, "SIGHUP: the agent is built in (AGENT_DIR is not set), nothing to read");
        }
        self.look(config, true);
    }

    /// Soon, on a thread of its own. Gives the number of the look.
    pub(crate) fn look(&'static self, config: &'static Config, is_ordered: bool) -> u64 {
        let mut latest = lock(&self.latest);
        if config.agent_dir.is_none() {
            return latest.done;
        }
        latest.asked += 1;
        latest.is_ordered |= is_ordered;
        let wanted = latest.asked;
        if std::mem::replace(&mut latest.is_looking, true) {
            return wanted;
        }
        drop(latest);
        let mut looking = Looking { agent: self, is_over: false };
        let started = spawn("agent files".into(), move || while looking.once_more(config) {});
        if let Err(error) = started {
            log!(Warn, "no thread to look at the agent files: {error}");
        }
        wanted
    }

    fn read(&self, config: &Config) {
        let mut seen = Vec::new();
        let read = Agent::load_noting(config, &mut seen);
        let mut latest = lock(&self.latest);
        latest.seen = seen;
        match read {
            Ok(agent) => {
                let (name, company) = (&agent.name, &agent.company);
                let stages = counted(agent.stages.len(), "stage");
                let tools = counted(agent.tools.len(), "tool");
                log!(
                    Info,
                    "agent files read again: {name} of {company}, {stages}, {tools}, from the next \
                     call on"
                );
                latest.agent = Arc::new(agent);
                latest.read = Timestamp::now();
                latest.mistakes.clear();
            }
            Err(mistakes) => {
                let count = counted(mistakes.len(), "mistake");
                log!(Error, "agent files: {count}; the agent stays as it was");
                for mistake in &mistakes {
                    log!(Error, "agent files: {mistake}");
                }
                latest.mistakes = mistakes;
            }
        }
    }
}

/// Whoever looks at the files now. Dropped, they do not.
struct Looking {
    agent: &'static AgentInForce,
    /// From then on somebody else may look.
    is_over: bool,
}

impl Looking {
    /// False: all who have asked are served.
    fn once_more(&mut self, config: &Config) -> bool {
        let mut latest = lock(&self.agent.latest);
        if latest.done == latest.asked {
            latest.is_looking = false;
            self.is_over = true;
            return false;
        }
        let asked = latest.asked;
        let is_ordered = std::mem::take(&mut latest.is_ordered);
        let seen = latest.seen.clone();
        drop(latest);
        if is_ordered || seen.into_iter().any(|seen| look_at(seen.0.clone()) != seen) {
            self.agent.read(config);
        }
        lock(&self.agent.latest).done = asked;
        self.agent.changed.notify_all();
        true
    }
}

/// Also of a thread that could not begin, or has ended by a fault.
impl Drop for Looking {
    fn drop(&mut self) {
        if !self.is_over {
            lock(&self.agent.latest).is_looking = false;
            self.agent.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests;
