//! Which journals are kept, offered again and removed.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::PathBuf;

use serde_json::json;
use tempfile::tempdir;

use crate::records::journal::{journals, sid_of};
use crate::records::outbox::Outbox;
use crate::testing::{file_in, settings};

#[test]
fn journals_are_removed_while_the_process_runs() {
    const HOUR: i64 = 3_600;
    let scratch = tempdir().unwrap();
    let data_dir = scratch.path().to_str().unwrap();
    let config = settings(&[
        ("DATA_DIR", data_dir),
        ("KEEP_DAYS", "2"),
        ("N8N_WEBHOOK_URL", "https://n8n.example/webhook/call"),
    ]);
    let outbox = Outbox::new(&config.ok().unwrap());
    fs::create_dir_all(scratch.path().join("calls")).unwrap();
    for (sid, hours, last) in [
        ("CAold", 49, "delivered"),
        ("CAyoung", 47, "delivered"),
        ("CAlate", 100, "end"),
        ("CAnew", 1, "end"),
    ] {
        let at = jiff::Timestamp::now() - jiff::SignedDuration::from_secs(hours * HOUR);
        let ring = json!({"at": at.to_string(), "event": "ring", "callSid": sid});
        let last = json!({"at": at.to_string(), "event": last, "endedBy": "CallerLeft"});
        file_in(
            &scratch,
            &format!("calls/{}-{sid}.jsonl", 1_000 - hours),
            format!("{ring}\n{last}\n"),
        );
    }
    let mut waiting = Vec::new();
    outbox.tidy(|past, _| waiting.push(past.sid));
    let left: Vec<PathBuf> = journals(scratch.path());
    assert_eq!(
        left.iter().map(|path| sid_of(path)).collect::<Vec<_>>(),
        ["CAlate", "CAyoung", "CAnew"]
    );
    assert_eq!(waiting, ["CAnew"]);
    assert_eq!(outbox.given_up(), 1);
}
