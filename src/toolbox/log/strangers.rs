//! What strangers cause to be logged: who is refused may come again a thousand times a second.
//!
//! Each text is logged once within [`REPEATED_WITHIN`]; how often it would have been is said at the
//! end of that time, and so is how many texts did not get a line at all. The metrics count all:
//!
//! ```text
//! 12:04:31.207 -      0 bridge   warning: a connection was closed: this is not HTTP/1.1
//! 12:04:36.208 -      0 bridge   warning: a connection was closed: this is not HTTP/1.1 (412 more)
//! ```

use std::fmt::Display;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::toolbox::log::log;
use crate::toolbox::metrics::refused;
use crate::toolbox::text::cut;
use crate::toolbox::threads::lock;

/// A text that a stranger has caused is logged again after this time.
const REPEATED_WITHIN: Duration = Duration::from_secs(5);
/// Different texts in that time. More are counted only.
const TEXTS_MAX: usize = 20;
/// Of such a text. Much of it may be the stranger's own.
const TEXT_CHARS_MAX: usize = 300;

static RECENT: Mutex<Recent> = Mutex::new(Recent { since: None, texts: Vec::new(), others: 0 });

struct Recent {
    since: Option<Instant>,
    /// Each has been logged once; how often it has not been.
    texts: Vec<(String, u64)>,
    others: u64,
}

/// Counts a refusal, and says so in the log as often as is good for it.
pub(crate) fn log_refusal(reason: &str, what: impl Display) {
    refused(reason);
    log_stranger(what);
}

/// The same for what is counted already, or not at all.
pub(crate) fn log_stranger(what: impl Display) {
    sum_up();
    let text = cut(&what.to_string(), TEXT_CHARS_MAX);
    let mut recent = lock(&RECENT);
    recent.since.get_or_insert_with(Instant::now);
    if let Some((_, more)) = recent.texts.iter_mut().find(|(said, _)| *said == text) {
        *more += 1;
    } else if recent.texts.len() >= TEXTS_MAX {
        recent.others += 1;
    } else {
        recent.texts.push((text.clone(), 0));
        drop(recent);
        log!(Warn, "{text}");
    }
}

/// Says what was left unsaid, once it is time. Until then it is this long.
pub(super) fn sum_up() -> Duration {
    let mut recent = lock(&RECENT);
    let Some(since) = recent.since else { return Duration::MAX };
    let left = REPEATED_WITHIN.saturating_sub(since.elapsed());
    if !left.is_zero() {
        return left;
    }
    recent.since = None;
    let texts = std::mem::take(&mut recent.texts);
    let others = std::mem::take(&mut recent.others);
    drop(recent);
    for (text, more) in texts.into_iter().filter(|(_, more)| *more > 0) {
        log!(Warn, "{text} ({more} more)"; more);
    }
    if others > 0 {
        log!(Warn, "{others} other refusals, see callbridge_refusals_total"; others);
    }
    Duration::MAX
}
