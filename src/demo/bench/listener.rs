//! Those who listen: up to fifty calls by threads of their own, the others by one sweeper.
//!
//! A thread that wakes for each frame, on both ends of each call, would cost as much as the
//! bridge itself. So the sweeper empties most legs twenty times a second, and looks at every
//! frame as closely, only not at the clock.

use std::sync::Arc;

use crate::demo::bench::call::Call;
use crate::demo::bench::hall::Way;
use crate::demo::bench::line::Line;
use crate::demo::bench::message::Inbox;

/// One leg of a call, as far as it is listened to.
pub(super) struct Listener {
    pub(super) call: Arc<Call>,
    pub(super) way: Way,
    pub(super) line: Line,
    pub(super) inbox: Inbox,
    pub(super) message: Vec<u8>,
    pub(super) mulaw: Vec<u8>,
    pub(super) is_timed: bool,
}

impl Listener {
    /// `early` is what came right behind the upgrade.
    pub(super) fn new(
        call: &Arc<Call>,
        way: Way,
        line: Line,
        early: &[u8],
        is_timed: bool,
    ) -> Listener {
        let inbox = Inbox::new(early);
        let call = Arc::clone(call);
        Listener { call, way, line, inbox, message: Vec::new(), mulaw: Vec::new(), is_timed }
    }

    pub(super) fn end(&mut self) {
        self.line.shut();
        self.call.state.change(|state| match self.way {
            Way::Up => state.agent_over = true,
            Way::Down => state.phone_over = true,
        });
    }
}
