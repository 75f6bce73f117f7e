//! What is told of a failure, and what is certain after one.

use std::error::Error as _;
use std::io;
use std::time::Duration;

use crate::toolbox::failure::{Failure, Party, Secret, unreachable_party};

#[test]
fn a_failure_reads_as_who_what_why_and_what_now() {
    let cause = || io::Error::other("connection reset");
    let cases = [
        (Failure::new(Party::N8n, "404"), "n8n: 404"),
        (
            Failure::new(Party::Ultravox, "401").advise("check the key"),
            "Ultravox: 401 (check the key)",
        ),
        (
            Failure::new(Party::N8n, "no answer").caused_by(cause()),
            "n8n: no answer: connection reset",
        ),
        (
            Failure::new(Party::Ultravox, "no upgrade").caused_by(cause()).advise("try later"),
            "Ultravox: no upgrade: connection reset (try later)",
        ),
    ];
    for (failure, wanted) in cases {
        assert_eq!(failure.to_string(), wanted);
        assert!(!failure.certainly_not_done, "{wanted}: nobody has said so");
    }
    let failure = Failure::new(Party::N8n, "x").certainly_not_done().advise("y").caused_by(cause());
    assert!(failure.certainly_not_done, "it is kept when more is said");
    assert_eq!(failure.source().map(ToString::to_string).as_deref(), Some("connection reset"));
    assert!(Failure::new(Party::N8n, "x").source().is_none());
}

#[test]
fn a_secret_cannot_be_printed() {
    let secret = Secret("hush".to_owned());
    let copy = secret.clone();
    assert_eq!(copy.reveal(), "hush");
    for printed in [format!("{secret:?}"), format!("{secret:#?}"), format!("{:?}", Some(&secret))] {
        assert!(printed.contains("***") && !printed.contains("hush"), "{printed}");
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
        (Error::HostNotFound, true, "its host name is not known (check the address)"),
        (Error::ConnectionFailed, true, "no connection (is it running"),
        (refused(), true, "it refuses the connection (is it running"),
        (reset(), false, "the request failed: "),
        (Error::BodyExceedsLimit(65_536), false, "an answer of more than 65536 bytes"),
    ];
    for (error, not_done, wanted) in cases {
        let failure = unreachable_party(Party::N8n, error, Duration::from_millis(1_500));
        let line = failure.to_string();
        assert!(line.starts_with(&format!("n8n: {wanted}")), "{line}");
        assert_eq!(failure.certainly_not_done, not_done, "{line}");
    }
}
