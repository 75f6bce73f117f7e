//! What only the tests ask of [`Ultravox`]: to refuse, to be slow, to count.
//!
//! The shipped program does not contain this file.

use std::time::Duration;

use crate::demo::PATIENCE;
use crate::demo::agent_call::AgentCall;
use crate::demo::backstage::lock;
use crate::demo::http::Reply;
use crate::demo::trouble::Trouble;
use crate::demo::ultravox::{Calls, Ultravox};

impl Ultravox {
    /// All calls created so far, in order.
    pub fn created(&self) -> Vec<AgentCall> {
        self.shared.board.look(|calls| calls.created.clone())
    }

    /// The ids of the calls that were deleted, in order.
    pub fn deleted(&self) -> Vec<String> {
        self.shared.board.look(|calls| calls.deleted.clone())
    }

    /// Answers every wish to delete a call with this, until it may be again.
    pub fn refuse_deletes(&self, reply: &Reply) {
        self.shared.board.change(|calls| calls.refuse_deletes = Some(reply.clone()));
    }

    pub fn allow_deletes(&self) {
        self.shared.board.change(|calls| calls.refuse_deletes = None);
    }

    /// How many requests for a call have come, refused ones included.
    pub fn requests(&self) -> usize {
        self.shared.board.look(|calls| calls.requests)
    }

    /// Waits until so many requests for a call have come.
    #[track_caller]
    pub fn wait_requests(&self, count: usize) -> Result<(), Trouble> {
        let come = |calls: &mut Calls| (calls.requests >= count).then_some(());
        match self.shared.board.wait(PATIENCE, come) {
            Some(()) => Ok(()),
            None => Err(self.log.trouble(format!("Ultravox was not asked {count} times"))),
        }
    }

    /// Answers the next so many requests for a call with this instead.
    pub fn refuse_next(&self, count: usize, reply: &Reply) {
        let refusals = std::iter::repeat_n(reply.clone(), count);
        self.shared.board.change(|calls| calls.refusals.extend(refusals));
    }

    /// Answers every request with this, until the world ends.
    pub fn refuse_always(&self, reply: &Reply) {
        self.shared.board.change(|calls| calls.refuse_always = Some(reply.clone()));
    }

    /// Creates calls only after this long.
    pub fn take_time(&self, slow: Duration) {
        self.shared.board.change(|calls| calls.slow = slow);
    }

    /// From now on this is the answer about the account.
    pub fn set_account(&self, reply: Reply) {
        self.set_answer("/api/accounts/me", reply);
    }

    /// Waits until somebody has asked about the account so often.
    #[track_caller]
    pub fn wait_account_asked(&self, count: usize) -> Result<(), Trouble> {
        let asked =
            self.shared.board.wait(PATIENCE, |calls| (calls.account_asked >= count).then_some(()));
        asked.ok_or_else(|| self.log.trouble("nobody has asked about the account"))
    }

    /// Waits until somebody has asked so often about this call.
    #[track_caller]
    pub fn wait_looked_up(&self, id: &str, count: usize) -> Result<(), Trouble> {
        let often = |calls: &mut Calls| (calls.times_looked_up(id) >= count).then_some(());
        let asked = self.shared.board.wait(PATIENCE, often);
        asked.ok_or_else(|| self.log.trouble(format!("{id} was not asked about {count} times")))
    }

    /// How often somebody has asked about this call.
    pub fn looked_up(&self, id: &str) -> usize {
        self.shared.board.look(|calls| calls.times_looked_up(id))
    }

    /// From now on this is the answer to a GET of that path, such as
    /// `/api/accounts/me`. Of lists, whatever the query.
    pub fn set_answer(&self, path: &str, reply: Reply) {
        self.shared.board.change(|calls| calls.told.insert(path.to_owned(), reply));
    }

    /// From now on calls are joined at this port of the same machine. Gives the one at which they
    /// are expected.
    pub fn join_at(&self, port: u16) -> Option<u16> {
        let mut prefix = lock(&self.shared.join_prefix);
        let (place, own) = prefix.rsplit_once(':')?;
        let (changed, own) = (format!("{place}:{port}"), own.parse().ok());
        *prefix = changed;
        own
    }
}

impl Calls {
    fn times_looked_up(&self, id: &str) -> usize {
        self.looked_up.iter().filter(|one| *one == id).count()
    }
}
