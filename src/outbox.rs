//! The verb `callbridge outbox`: what n8n has not taken, and why.
//!
//! It reads the journals in `DATA_DIR`, beside a server that may be running, and lists those whose
//! transcript is still to be delivered. With `--retry` each is offered to n8n once more, however
//! old it is, and its journal says what came of it, so that the server leaves it alone. A call that
//! may still go on is none of its business.

use std::sync::Arc;
use std::time::Duration;

use crate::offer;
use crate::parties::n8n::N8n;
use crate::records::delivery::{Claim, DELIVER_WITHIN, Delivery, TRANSFER_MAX};
use crate::records::event::Event;
use crate::records::journal::{Journals, journals};
use crate::records::past::PastCall;
use crate::setup::settings::Config;
use crate::setup::stop::{Stop, existing, needs_attention};
use crate::toolbox::http::{Http, trusted_roots};
use crate::toolbox::log::{complain, say};
use crate::toolbox::text::{age, counted, shorten_number};
use crate::toolbox::waiting::Waiting;
use crate::usage::options;

/// For what was noted in the journals.
const FLUSH_WITHIN: Duration = Duration::from_secs(10);

const HELP: &str = "\
callbridge outbox: lists the transcripts that n8n has not taken, and why.

  Reads the journals in DATA_DIR, beside a server that may be running. It changes
  nothing. A call that goes on is not listed.

usage: callbridge outbox [--retry]

  --retry   offers each to n8n once more, however old it is

Exit status 0, or with --retry 1 if n8n has not taken them all; 2 for a wrong
command line.
";

pub(crate) fn run(words: &[&str]) -> Result<(), Stop> {
    let Some(given) = options("outbox", HELP, &["--retry"], words)? else { return Ok(()) };
    let retry = !given.is_empty();
    let config = Config::load().map_err(|complaints| needs_attention("setting", &complaints))?;
    let roots = trusted_roots(config.ssl_cert_file.as_deref())
        .map_err(|complaint| needs_attention("setting", &[complaint]))?;
    let config = Arc::new(config);
    let n8n = N8n::new(Http::new(&roots), Arc::clone(&config));
    let data_dir = existing(&config.data_dir)?;
    let own = Journals::new(data_dir);
    let mut waiting = 0;
    for path in journals(data_dir) {
        let Ok(past) = PastCall::read(&path) else {
            complain(&format!("{}: cannot be read", path.display()));
            continue;
        };
        let lines = past.transcript.count();
        // No call and no transfer lasts longer: without an end, its process has died.
        let goes_on = past.ended_by.is_none() && past.quiet_for <= TRANSFER_MAX;
        if past.delivered || goes_on || lines == 0 {
            continue;
        }
        let number = shorten_number(&past.number);
        let why = if past.trouble.is_empty() { "not tried yet" } else { &past.trouble };
        let (lines, old) = (counted(lines, "line"), age(past.quiet_for));
        let about = format!("{} {number}, {lines}, {old} old: {why}", past.sid);
        let mut delivery = Delivery::left_behind(past, path);
        match delivery.claim(&own) {
            Claim::Ours => {}
            // The server has it: the call goes on, or is just being filed.
            Claim::Held | Claim::Delivered => continue,
        }
        let offered = retry.then(|| {
            let _shown = Waiting::for_parties(vec!["n8n"], DELIVER_WITHIN);
            offer(&n8n, &config, &delivery)
        });
        match offered {
            Some(Ok(())) => {
                delivery.note(&Event::Delivered);
                say(&format!("{about}\n  delivered now\n"));
            }
            Some(Err(failure)) => {
                waiting += 1;
                delivery.note(&Event::Undelivered { why: failure.to_string() });
                say(&format!("{about}\n  tried now: {failure}\n"));
            }
            None => {
                waiting += 1;
                say(&format!("{about}\n"));
            }
        }
    }
    own.flush(FLUSH_WITHIN);
    let verb = if waiting == 1 { "waits" } else { "wait" };
    say(&format!("{} {verb} for n8n\n", counted(waiting, "transcript")));
    match (retry, waiting) {
        (true, 1..) => Err(Stop::Failed("callbridge: n8n has not taken them all".into())),
        _ => Ok(()),
    }
}
