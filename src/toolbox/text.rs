//! Small things done to texts.

use std::fmt::Write as _;
use std::time::Duration;

use jiff::Timestamp;

pub(crate) fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

pub(crate) fn starts_with_word(text: &str, word: &str) -> bool {
    text.split(' ').next().is_some_and(|first| first.eq_ignore_ascii_case(word))
}

/// RFC 3339, to the millisecond.
pub(crate) fn by_the_calendar(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()
}

pub(crate) fn since(at: Timestamp) -> Duration {
    Timestamp::now().duration_since(at).try_into().unwrap_or_default()
}

/// `+` and 7 to 15 digits (ITU-T E.164).
pub(crate) fn is_e164(text: &str) -> bool {
    text.strip_prefix('+').is_some_and(|digits| {
        (7..=15).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit())
    })
}

/// `CA9f3c…` is enough to tell calls apart by eye.
pub(crate) fn shorten(sid: &str) -> &str {
    sid.get(..6).unwrap_or(sid)
}

/// `+49…4521`: enough to recognise, too little to call.
pub(crate) fn shorten_number(number: &str) -> String {
    match (number.get(..3), number.len().checked_sub(4).and_then(|at| number.get(at..))) {
        (Some(first), Some(last)) if number.len() > 8 && number.starts_with('+') => {
            format!("{first}…{last}")
        }
        _ if number.starts_with('+') => "a short number".into(),
        _ if number.chars().all(|c| c.is_ascii_alphabetic())
            && number.len() <= 16
            && !number.is_empty() =>
        {
            number.to_owned()
        }
        _ => "a caller without a number".into(),
    }
}

/// Replaces `{name}` by what `value_of` knows for it, and leaves the rest as it is.
pub(crate) fn fill(text: &str, value_of: impl Fn(&str) -> Option<String>) -> String {
    let mut filled = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('{') {
        filled.push_str(before);
        let known = after.split_once('}').and_then(|(name, rest)| Some((value_of(name)?, rest)));
        rest = if let Some((value, behind)) = known {
            filled.push_str(&value);
            behind
        } else {
            filled.push('{');
            after
        };
    }
    filled.push_str(rest);
    filled
}

/// Every `{name}` in a text, with its line. Braces around anything else are just braces.
pub(crate) fn placeholders(text: &str) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        for part in line.split('{').skip(1) {
            if let Some((name, _)) = part.split_once('}')
                && !name.is_empty()
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            {
                found.push((name.to_owned(), index + 1));
            }
        }
    }
    found
}

/// The beginning of a text, with a sign that it is no more than that.
pub(crate) fn cut(text: &str, chars: usize) -> String {
    match text.char_indices().nth(chars) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        if write!(text, "{byte:02x}").is_err() {
            // Writing to a String does not fail.
        }
        text
    })
}

#[cfg(test)]
mod tests;
