//! The live page's policy.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::owner::page::hashes;

#[test]
fn the_hashes_in_the_policy_are_those_of_the_page() {
    let page = "<style>a</style><script>b\n</script>\n<script></script><script src=x></script>";
    let hash = |text: &str| {
        let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
        format!("'sha256-{}'", BASE64.encode(digest))
    };
    assert_eq!(hashes(page, "style"), hash("a"));
    assert_eq!(hashes(page, "script"), format!("{} {}", hash("b\n"), hash("")));
    assert_eq!(hashes("", "script"), "");
}
