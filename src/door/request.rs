//! What of a request's head goes on behind the door: written anew, and clear to every reader.
//!
//! [`passed_on`] keeps the request line, the headers that a route reads and those that say where
//! the body ends, each once, and puts `Connection: close` before them, so that nothing can hide
//! behind the request. What is unclear is refused. It looks at nothing but the head.
//!
//! `tiny_http` 0.12 makes this necessary. To one byte that is not ASCII, in whatever header, it
//! gives no answer at all. Any `Transfer-Encoding` is chunks to it, so that a proxy in front may
//! see another end of the request (CVE-2026-66752); and it lets a bare CR or LF stand in a header
//! (CVE-2026-66753). Neither is fixed there. On the way out no header of ours has text from outside
//! in it, but for the `Host` in the live page's policy, which is looked at there.

use crate::door::head::{Refusal, find, stream_token};

/// What somebody behind the door reads: the routes, `tiny_http`, the WebSocket's handshake.
const NEEDED: [&str; 12] = [
    "Host",
    "Content-Length",
    "Content-Type",
    "Transfer-Encoding",
    "Expect",
    "Authorization",
    "Origin",
    "Sec-Fetch-Site",
    "X-Twilio-Signature",
    "X-Twilio-Webhooks-Signature-Settings",
    "Sec-WebSocket-Key",
    "Sec-WebSocket-Version",
];

/// What proxies add. Of these only goes on that there is one: several proxies may each add theirs.
const OF_PROXIES: [&str; 4] = ["Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host"];

/// The head as it goes on, and whatever came along behind it.
pub(crate) fn passed_on(head: &[u8]) -> Result<Vec<u8>, Refusal> {
    let end = find(head, b"\r\n\r\n").ok_or(Refusal::NotHttp)?;
    let (text, rest) = (head.get(..end).unwrap_or_default(), head.get(end..).unwrap_or_default());
    // Only ASCII is compared and kept, and no byte of it comes out of any other.
    let text = String::from_utf8_lossy(text);
    let mut lines = text.split("\r\n");
    let line = request_line(lines.next().unwrap_or_default())?;
    let headers = lines.map(header).collect::<Result<Vec<_>, _>>()?;

    let mut passed = format!("{line}\r\n");
    let wants = |name: &str, wanted: &str| {
        let lists = headers.iter().filter(|(present, _)| present.eq_ignore_ascii_case(name));
        lists.flat_map(|(_, list)| list.split(',')).any(|it| it.trim().eq_ignore_ascii_case(wanted))
    };
    let upgrades = wants("Connection", "Upgrade") && wants("Upgrade", "websocket");
    passed.push_str(if upgrades && stream_token(line.as_bytes()).is_some() {
        "Connection: Upgrade\r\nUpgrade: websocket\r\n"
    } else {
        "Connection: close\r\n"
    });
    for name in NEEDED {
        if let Some(value) = the_one(&headers, name)? {
            passed.extend([name, ": ", value, "\r\n"]);
        }
    }
    let is_proxys = |name: &str| OF_PROXIES.iter().any(|its| its.eq_ignore_ascii_case(name));
    if headers.iter().any(|(name, _)| is_proxys(name)) {
        passed.push_str("Via: a proxy\r\n");
    }
    check_framing(&headers, line.ends_with("1.1"))?;
    // What came along begins with the last line's end.
    let mut passed = passed.into_bytes();
    passed.extend_from_slice(rest.strip_prefix(b"\r\n").unwrap_or(rest));
    Ok(passed)
}

/// An absolute address, as a client writes it to a proxy, means its path.
fn request_line(line: &str) -> Result<String, Refusal> {
    let mut words = line.split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(Refusal::Unclear("the request line is not three words"));
    };
    if !is_token(method)
        || !target.bytes().all(|byte| byte.is_ascii_graphic())
        || !["HTTP/1.1", "HTTP/1.0"].contains(&version)
    {
        return Err(Refusal::Unclear("the request line is not plain text"));
    }
    let target = match target.split_once("://") {
        Some((scheme, rest))
            if ["http", "https"].iter().any(|it| it.eq_ignore_ascii_case(scheme)) =>
        {
            rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/")
        }
        _ => target,
    };
    Ok(format!("{method} {target} {version}"))
}

fn header(line: &str) -> Result<(&str, &str), Refusal> {
    match line.split_once(':') {
        Some((name, value)) if is_token(name) && !value.contains(['\r', '\n', '\0']) => {
            Ok((name, value.trim_matches([' ', '\t'])))
        }
        _ => Err(Refusal::Unclear("a line of the head is no header")),
    }
}

fn is_token(word: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !word.is_empty() && word.bytes().all(is_plain)
}

/// Where there are two, one reader would take the first, another the last.
fn the_one<'a>(headers: &[(&str, &'a str)], name: &str) -> Result<Option<&'a str>, Refusal> {
    let mut values = headers.iter().filter(|(present, _)| present.eq_ignore_ascii_case(name));
    let Some((_, value)) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(Refusal::Unclear("a header that matters is there twice"));
    }
    if !value.bytes().all(|byte| matches!(byte, b' '..=b'~' | b'\t')) {
        return Err(Refusal::Unclear("a header that matters is not plain text"));
    }
    Ok(Some(value))
}

/// Where the body ends is said once, in one way.
fn check_framing(headers: &[(&str, &str)], has_chunks: bool) -> Result<(), Refusal> {
    let length = the_one(headers, "Content-Length")?;
    let coding = the_one(headers, "Transfer-Encoding")?;
    let is_clear = match (length, coding) {
        (None, None) => true,
        (Some(length), None) => !length.is_empty() && length.bytes().all(|it| it.is_ascii_digit()),
        (None, Some(coding)) => has_chunks && coding.eq_ignore_ascii_case("chunked"),
        (Some(_), Some(_)) => false,
    };
    if is_clear { Ok(()) } else { Err(Refusal::Unclear("where the body ends is not clear")) }
}

#[cfg(test)]
mod tests;
