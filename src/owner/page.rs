//! The live page: `GET /`, one file with all that it needs in it.
//!
//! The page itself is `page.html`, compiled in. Here are the headers that keep it safe in a
//! browser: nothing is loaded from anywhere else, no script runs that was not in it when it was
//! compiled, and no other site may frame it. What it shows, it asks for at `/calls`.

use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::digest;

use crate::Bridge;
use crate::door::reply::{Reply, header};

const PAGE: &str = include_str!("page.html");

/// `GET /`. The policy allows what is in the page and this server, and nothing else: no address of
/// anybody else's, no script or style that was not in it when it was compiled in. The sound
/// worklet of its phone is made by the page itself (`blob:`).
pub(crate) fn page(_: &'static Bridge, request: &tiny_http::Request) -> Reply {
    static HASHES: LazyLock<[String; 2]> =
        LazyLock::new(|| ["script", "style"].map(|element| hashes(PAGE, element)));
    let [scripts, styles] = &*HASHES;
    // Not every browser counts `ws:` and `wss:` among 'self'.
    let host = header(request, "Host");
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-:[]".contains(&byte);
    let sockets = if !host.is_empty() && host.bytes().all(is_plain) {
        format!(" ws://{host} wss://{host}")
    } else {
        String::new()
    };
    let policy = format!(
        "default-src 'none'; script-src {scripts} blob:; worker-src blob:; style-src {styles}; \
         img-src data:; connect-src 'self'{sockets}; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'"
    );
    Reply::new(200, "text/html; charset=utf-8", PAGE.to_owned()).with([
        ("Content-Security-Policy", policy),
        ("X-Frame-Options", "DENY".to_owned()),
        ("Permissions-Policy", "microphone=(self)".to_owned()),
    ])
}

/// `'sha256-…'` for each element of that kind, as a Content-Security-Policy wants it.
fn hashes(page: &str, element: &str) -> String {
    let (open, close) = (format!("<{element}>"), format!("</{element}>"));
    let contents = page.split(&open).skip(1).filter_map(|rest| rest.split(&close).next());
    let hash = |content: &str| BASE64.encode(digest::digest(&digest::SHA256, content.as_bytes()));
    let hashes: Vec<String> =
        contents.map(|content| format!("'sha256-{}'", hash(content))).collect();
    hashes.join(" ")
}

#[cfg(test)]
mod tests;
