//! The certificates that are trusted, and what a missing answer means.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io;
use std::time::Duration;

use tempfile::tempdir;

use crate::testing::file_in;
use crate::toolbox::failure::Party;
use crate::toolbox::http::{Ask, Http, no_answer, trusted_roots};

#[test]
fn further_roots_come_from_a_pem_file() {
    let scratch = tempdir().unwrap();
    let known = trusted_roots(None).unwrap().len();
    assert!(known > 50, "Mozilla's roots are there: {known}");

    let home_made = rcgen::generate_simple_self_signed(["n8n.example".to_owned()]).unwrap();
    let good = file_in(&scratch, "good.pem", home_made.cert.pem());
    assert_eq!(trusted_roots(Some(&good)).unwrap().len(), known + 1);

    let empty = file_in(&scratch, "empty.pem", "no certificate at all");
    let broken = file_in(&scratch, "broken.pem", "-----BEGIN CERTIFICATE-----\n!!\n");
    for path in [empty, broken, scratch.path().join("nowhere.pem")] {
        let complaint = trusted_roots(Some(&path)).unwrap_err();
        assert!(complaint.starts_with("SSL_CERT_FILE  "), "{complaint}");
        assert!(complaint.contains(&path.display().to_string()), "{complaint}");
    }
}

#[test]
fn what_never_reached_n8n_was_certainly_not_done() {
    use ureq::{Error, Timeout};
    let refused = || Error::Io(io::ErrorKind::ConnectionRefused.into());
    let reset = || Error::Io(io::ErrorKind::ConnectionReset.into());
    let cases = [
        (Error::Timeout(Timeout::Resolve), true, "no connection in time"),
        (Error::Timeout(Timeout::Connect), true, "no connection in time"),
        (Error::Timeout(Timeout::Global), false, "no answer within 1500 ms"),
        (Error::Timeout(Timeout::RecvResponse), false, "no answer within 1500 ms"),
        (
            Error::HostNotFound,
            true,
            "its name does not resolve (correct the host's name in the address)",
        ),
        (Error::Other("no thread to look up its name".into()), true, "no thread to look up"),
        (Error::ConnectionFailed, true, "no connection (is it running"),
        (refused(), true, "it refuses the connection (is it running"),
        (reset(), false, "the request failed: "),
        (Error::BodyExceedsLimit(65_536), false, "an answer of more than 65536 bytes"),
    ];
    for (error, not_done, wanted) in cases {
        let failure = no_answer(Party::N8n, error, Duration::from_millis(1_500));
        let line = failure.to_string();
        assert!(line.starts_with(&format!("n8n: {wanted}")), "{line}");
        assert_eq!(failure.certainly_not_done, not_done, "{line}");
    }
}

/// Names that end so are never known (RFC 6761).
#[test]
fn a_name_that_nobody_knows_is_certainly_not_done() {
    let http = Http::new(&[]);
    let asked = Ask { url: "http://n8n.invalid/webhook", ..Ask::default() };
    let failure = http.ask(Party::N8n, &asked).err().unwrap();
    assert!(failure.certainly_not_done, "{failure}");
}
