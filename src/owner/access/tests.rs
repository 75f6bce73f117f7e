//! How the owner shows who they are.

use crate::owner::access::shown_token;

#[test]
fn the_owner_shows_a_token_as_bearer_or_as_a_password() {
    let cases = [
        ("Bearer abc", Some("abc")),
        ("bearer  abc ", Some("abc")),
        ("Basic dXNlcjphYmM=", Some("abc")),
        ("BASIC OmE6Yg==", Some("a:b")),
        ("Basic bm8gY29sb24=", None),
        ("Basic !!", None),
        ("Basic /zr/", None),
        ("Digest abc", None),
        ("abc", None),
        ("", None),
    ];
    for (header, wanted) in cases {
        assert_eq!(shown_token(header).as_deref(), wanted, "{header}");
    }
}
