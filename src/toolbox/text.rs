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

/// The word that is meant by one with a slip of the pen in it: a letter or two more, less, other,
/// or a last part that is missing.
pub(crate) fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let slips_max = (word.len() / 2).min(2);
    let close = known.into_iter().filter_map(|known| {
        let begins = word.contains('_') && known.starts_with(&format!("{word}_"));
        let slips = if begins { slips_max } else { slips_between(word, known) };
        (slips <= slips_max).then_some((slips, known))
    });
    close.min_by_key(|(slips, _)| *slips).map(|(_, known)| known)
}

/// Letters to put in, take out or change (Levenshtein's distance).
fn slips_between(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.chars().count()).collect();
    for (line, letter) in one.chars().enumerate() {
        let mut before = line;
        let mut left = line + 1;
        row.iter_mut().take(1).for_each(|first| *first = left);
        for (place, wanted) in row.iter_mut().skip(1).zip(other.chars()) {
            let changed = before + usize::from(letter != wanted);
            before = *place;
            left = changed.min(left + 1).min(*place + 1);
            *place = left;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests;
