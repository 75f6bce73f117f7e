//! The verb `callbridge outbox`: what n8n has not taken, and why.

use serde_json::json;

use crate::Bridge;
use crate::parties::twilio::twiml::TRANSFER_MAX;
use crate::records::outbox::{left_behind, offer};
use crate::records::past::{Filed, journals};
use crate::setup::settings::Config;
use crate::setup::stop::{Stop, needs_attention};
use crate::toolbox::log::{complain, say};
use crate::toolbox::text::shorten_number;

/// `callbridge outbox [--retry]`: what n8n has not taken, and why; and one more try now.
pub(crate) fn outbox_command(retry: bool) -> Result<(), Stop> {
    let config = Config::load().map_err(|complaints| needs_attention("setting", &complaints))?;
    let bridge = Bridge::new(config)?;
    let mut waiting = 0;
    for path in journals(&bridge.config.data_dir) {
        let Ok(filed) = Filed::read(&path) else {
            complain(&format!("{}: cannot be read", path.display()));
            continue;
        };
        let lines = filed.transcript.count();
        // No call and no transfer lasts longer: without an end, its process has died.
        let goes_on = filed.ended_by.is_empty() && filed.quiet_for <= TRANSFER_MAX;
        if filed.delivered || goes_on || lines == 0 {
            continue;
        }
        let hours = filed.quiet_for.as_secs() / 3_600;
        let number = shorten_number(&filed.number);
        let why = if filed.trouble.is_empty() { "not tried yet" } else { &filed.trouble };
        let about = format!("{} {number}, {lines} lines, {hours} h old: {why}", filed.sid);
        let parcel = left_behind(filed, path);
        match retry.then(|| offer(&bridge, &parcel)) {
            Some(Ok(())) => {
                parcel.note(&json!({"event": "delivered"}));
                say(&format!("{about}\n  delivered now\n"));
            }
            Some(Err(failure)) => {
                waiting += 1;
                parcel.note(&json!({"event": "undelivered", "why": failure.to_string()}));
                say(&format!("{about}\n  tried now: {failure}\n"));
            }
            None => {
                waiting += 1;
                say(&format!("{about}\n"));
            }
        }
    }
    say(&format!("{waiting} transcripts wait for n8n\n"));
    match (retry, waiting) {
        (true, 1..) => Err(Stop::Failed("callbridge: n8n has not taken them all".into())),
        _ => Ok(()),
    }
}
