//! What is told of a failure, and what is certain after one.

use std::error::Error as _;
use std::io;

use crate::toolbox::failure::{Failure, Party, Secret};

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
