//! Texts that go to people: telephone numbers, placeholders, and what is too long.
//!
//! What is a number, and how much of one may be shown; how an agent's texts get their `{values}`;
//! where a long text is cut. Several rooms share these; what only one of them needs stands there.

use std::time::Duration;

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

/// `less than a minute`, `12 minutes`, `1 hour`, `3 days`.
pub(crate) fn age(of: Duration) -> String {
    let minutes = usize::try_from(of.as_secs() / 60).unwrap_or(usize::MAX);
    match minutes {
        0 => "less than a minute".to_owned(),
        1..60 => counted(minutes, "minute"),
        60..2_880 => counted(minutes / 60, "hour"),
        _ => counted(minutes / 1_440, "day"),
    }
}

/// `1 thing`, `2 things`.
pub(crate) fn counted(count: usize, one: &str) -> String {
    format!("{count} {one}{}", if count == 1 { "" } else { "s" })
}

/// The one that was probably meant: two letters may be wrong, missing or too much, but not half of
/// them.
pub(crate) fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let nearest = known.iter().map(|known| (distance(word, known), *known)).min();
    nearest.filter(|(slips, known)| *slips <= 2 && 2 * slips < known.len()).map(|(_, known)| known)
}

/// Letters to change, to add or to leave out until they are the same (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut above: Vec<usize> = (0..=to.len()).collect();
    for (row, letter) in from.chars().enumerate() {
        let mut line = vec![row + 1];
        for (other, over) in to.iter().zip(above.windows(2)) {
            let (&[diagonal, above], Some(&left)) = (over, line.last()) else { continue };
            let changed = diagonal + usize::from(letter != *other);
            line.push(changed.min(above + 1).min(left + 1));
        }
        above = line;
    }
    above.pop().unwrap_or_default()
}

#[cfg(test)]
mod tests;
