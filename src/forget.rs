//! The verb `callbridge forget`: deletes what is kept of a telephone number.
//!
//! That is the journals of its calls in `DATA_DIR`, and the calls at Ultravox, each agent of them.
//! It lists them first, and asks. A journal that somebody has is left alone: its call goes on, or
//! its transcript is just being delivered. So is what n8n has not got yet, unless that is asked for
//! too.
//!
//! A running server remembers what it is still to deliver, and would write a journal anew that is
//! gone. So of an undelivered one a single line stays, without a number or a word, that tells it to
//! leave the transcript alone. What n8n, Twilio and the log have is theirs.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;

use crate::parties::ultravox::{DELETE_WITHIN, delete_call};
use crate::records::delivery::TRANSFER_MAX;
use crate::records::event::Event;
use crate::records::journal::{Journals, journals, sid_of};
use crate::records::past::PastCall;
use crate::setup::settings::Config;
use crate::setup::stop::{Stop, existing, needs_attention};
use crate::toolbox::http::{Http, trusted_roots};
use crate::toolbox::log::say;
use crate::toolbox::text::{counted, is_e164};
use crate::toolbox::waiting::Waiting;
use crate::usage::{ask_person, is_yes, misused, options};

const HELP: &str = "\
callbridge forget: deletes what is kept of a telephone number.

  Lists the calls from and to that number, asks, and deletes their journals in
  DATA_DIR and the calls at Ultravox. A call that goes on is left alone, and so is
  a transcript that n8n has not got yet. What n8n, Twilio and the log have is not
  callbridge's to delete.

usage: callbridge forget +15551234567 [--yes] [--even-undelivered]

  --yes                does not ask
  --even-undelivered   also what n8n has not got yet

Exit status 0 if nothing was left that should go, 1 if something was, 2 for a
wrong command line.
";
/// For the line that stays of an undelivered journal.
const FLUSH_WITHIN: Duration = Duration::from_secs(10);

pub(crate) fn run(words: &[&str]) -> Result<(), Stop> {
    let (flags, number): (Vec<&str>, Vec<&str>) =
        words.iter().partition(|word| word.starts_with('-'));
    let known = ["--yes", "--even-undelivered"];
    let Some(given) = options("forget", HELP, &known, &flags)? else { return Ok(()) };
    // As it may stand in an address book.
    let number: String = number.concat().chars().filter(|c| !" -/().".contains(*c)).collect();
    if !is_e164(&number) {
        return Err(misused("forget", HELP, "which number? Write it as +15551234567"));
    }
    let config = Config::load().map_err(|complaints| needs_attention("setting", &complaints))?;
    let roots = trusted_roots(config.ssl_cert_file.as_deref())
        .map_err(|complaint| needs_attention("setting", &[complaint]))?;
    existing(&config.data_dir)?;
    let shredder = Shredder {
        http: Http::new(&roots),
        journals: Journals::new(&config.data_dir),
        takes_undelivered: given.contains(&"--even-undelivered"),
        config: Arc::new(config),
    };
    let calls = shredder.list(&number);
    if calls.is_empty() {
        return Ok(());
    }
    if !given.contains(&"--yes") {
        let what = counted(calls.len(), "call");
        match ask_person(&format!("Delete {what} here and at Ultravox? [y/N] ")) {
            Some(answer) if is_yes(&answer) => {}
            Some(_) => return Err(Stop::Failed("callbridge: nothing was deleted".into())),
            None => {
                let what = "there is no terminal to ask at: add --yes to delete without asking";
                return Err(misused("forget", HELP, what));
            }
        }
    }
    let mut left = 0;
    for path in &calls {
        let sid = sid_of(path);
        match shredder.delete(path, &number) {
            Ok(()) => say(&format!("  {sid}  deleted\n")),
            Err(why) => {
                left += 1;
                say(&format!("  {sid}  not deleted: {why}\n"));
            }
        }
    }
    shredder.journals.flush(FLUSH_WITHIN);
    match left {
        0 => Ok(()),
        _ => Err(Stop::Failed(format!("callbridge: {} not deleted", counted(left, "call")))),
    }
}

struct Shredder {
    config: Arc<Config>,
    http: Http,
    journals: Journals,
    takes_undelivered: bool,
}

impl Shredder {
    /// Shows all that is kept of this number, and gives what can go.
    fn list(&self, number: &str) -> Vec<PathBuf> {
        let (mut kept, mut can_go) = (0, Vec::new());
        for path in journals(&self.config.data_dir) {
            let Ok(past) = PastCall::read(&path) else { continue };
            if past.number != number {
                continue;
            }
            kept += 1;
            let began = past.began.map(|began| began.to_zoned(TimeZone::system()));
            let began = began.map(|began| began.strftime("%Y-%m-%d %H:%M").to_string());
            let mut line = format!(
                "  {}  {}  {}",
                past.sid,
                began.unwrap_or_default(),
                counted(past.transcript.count(), "line")
            );
            let is_free = self.journals.claim(&path).is_ok();
            match self.objection(&past) {
                _ if !is_free => line.push_str(", in use by a running callbridge: left alone"),
                Some(why) => line.extend([", ", why, ": left alone"]),
                None => can_go.push(path),
            }
            say(&format!("{line}\n"));
        }
        say(&format!("{} of {number}\n", counted(kept, "call")));
        can_go
    }

    /// Why it is to stay.
    fn objection(&self, past: &PastCall) -> Option<&'static str> {
        if past.ended_by.is_none() && !past.delivered && past.quiet_for <= TRANSFER_MAX {
            return Some("it may still go on");
        }
        if self.is_waited_for(past) && !self.takes_undelivered {
            return Some("n8n has not got it yet (--even-undelivered)");
        }
        None
    }

    /// Without n8n, what stays on disk waits for nobody.
    fn is_waited_for(&self, past: &PastCall) -> bool {
        self.config.n8n_webhook_url.is_some() && !past.delivered && past.transcript.count() > 0
    }

    /// Ultravox first: the journal has the ids.
    fn delete(&self, path: &Path, number: &str) -> Result<(), String> {
        let journal = self.journals.claim(path).map_err(|_| "a running callbridge has it")?;
        let past = PastCall::read(path).map_err(|error| error.to_string())?;
        if past.number != number {
            return Err("it has changed meanwhile".into());
        }
        if let Some(why) = self.objection(&past) {
            return Err(why.into());
        }
        let shown = Waiting::for_parties(vec!["Ultravox"], DELETE_WITHIN);
        for id in &past.agent_ids {
            delete_call(&self.http, &self.config, id).map_err(|failure| failure.to_string())?;
        }
        drop(shown);
        if past.delivered || self.config.n8n_webhook_url.is_none() {
            return fs::remove_file(path).map_err(|error| error.to_string());
        }
        let emptied = fs::File::options().write(true).truncate(true).open(path);
        emptied.map_err(|error| error.to_string())?;
        journal.note(&Event::Delivered);
        self.journals.settle();
        Ok(())
    }
}
