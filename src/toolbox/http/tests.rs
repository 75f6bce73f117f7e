//! The certificates that are trusted.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use tempfile::tempdir;

use crate::testing::file_in;
use crate::toolbox::http::trusted_roots;

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
