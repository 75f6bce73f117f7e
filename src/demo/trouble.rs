//! [`Trouble`]: what went wrong in the pretend world, where it was asked for, and what the
//! server said.
//!
//! `Debug` is written for people, because `unwrap` and `?` in a test print that: it brings the
//! server's last log lines along, and the place in the test.

use std::fmt::{self, Display};
use std::panic::Location;

/// What went wrong, where in the test, and the bridge's last log lines.
/// `Debug` is written for people, because `unwrap` and `?` print that.
pub struct Trouble {
    what: String,
    place: &'static Location<'static>,
    log: Vec<String>,
}

impl Trouble {
    #[track_caller]
    pub(super) fn bare(what: String) -> Trouble {
        Trouble::new(what, Vec::new())
    }

    #[track_caller]
    pub(super) fn new(what: String, log: Vec<String>) -> Trouble {
        Trouble { what, place: Location::caller(), log }
    }

    /// The words and the log, without the place in the source.
    pub(super) fn with_log(&self) -> String {
        let mut text = self.what.clone();
        if !self.log.is_empty() {
            text.push_str("\n  the bridge's last words:");
        }
        for line in &self.log {
            text.push_str("\n    ");
            text.push_str(line);
        }
        text
    }
}

impl Display for Trouble {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.what)
    }
}

impl fmt::Debug for Trouble {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}\n  asked for at {}", self.with_log(), self.place)
    }
}

impl std::error::Error for Trouble {}
