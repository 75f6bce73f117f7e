//! `.env`: its names and values, and what is wrong in it, by line.
//!
//! Quotes and escapes are dotenvy's; it gets the file line by line, so that a line that it cannot
//! read has a number. It also replaces `$NAME` by a value, which in a password nobody means: a `$`
//! outside single quotes is complained of, with its line and its cure, and not a letter of the
//! value.
//!
//! ```text
//! API_TOKEN  in line 7 of .env has a $ outside single quotes: must be written as API_TOKEN='…'
//! ```
//!
//! Only `settings` asks. A file that is not there is an empty one.

use std::cell::Cell;
use std::collections::HashMap;
use std::io::{self, Read};
use std::path::Path;

pub(super) const DOT_ENV: &str = ".env";

pub(super) fn read(path: &Path) -> (HashMap<String, String>, Vec<String>) {
    match std::fs::read_to_string(path) {
        Ok(text) => understand(text.strip_prefix('\u{feff}').unwrap_or(&text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Default::default(),
        Err(error) => (HashMap::new(), vec![format!(".env cannot be read: {error}")]),
    }
}

pub(super) fn understand(text: &str) -> (HashMap<String, String>, Vec<String>) {
    let (mut values, mut complaints) = (HashMap::new(), Vec::new());
    let lines: Vec<&str> = text.lines().collect();
    let (count, mut seen) = (Cell::new(0), 0);
    for entry in dotenvy::from_read_iter(LineByLine { rest: text.as_bytes(), count: &count }) {
        let line = count.get();
        // Comments before it are among these.
        let its = lines.get(seen..line).unwrap_or_default();
        let name = match &entry {
            Ok((name, _)) => Some(name.as_str()),
            // A $ can be the reason as well.
            Err(_) => its.last().and_then(|line| name_in(line)),
        };
        match (dollar(its), name) {
            (Some(at), Some(name)) => complaints.push(format!(
                "{name}  in line {} of .env has a $ outside single quotes: must be written as \
                 {name}='…', or what follows the $ is lost",
                seen + at + 1
            )),
            // The error quotes the line, which may hold a secret; its number may not.
            _ if entry.is_err() => complaints
                .push(format!(".env  line {line} is not NAME=value (with spaces: in quotes)")),
            _ => {}
        }
        values.extend(entry.ok());
        seen = line;
    }
    (values, complaints)
}

/// Gives no more than a line at a time, and counts them.
struct LineByLine<'a> {
    rest: &'a [u8],
    count: &'a Cell<usize>,
}

impl Read for LineByLine<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let line = self.rest.iter().position(|byte| *byte == b'\n').map(|end| end + 1);
        let length = line.unwrap_or(self.rest.len()).min(buffer.len());
        let (given, rest) = self.rest.split_at(length);
        buffer.iter_mut().zip(given).for_each(|(place, byte)| *place = *byte);
        self.rest = rest;
        let is_whole = given.ends_with(b"\n") || (!given.is_empty() && rest.is_empty());
        self.count.set(self.count.get() + usize::from(is_whole));
        Ok(length)
    }
}

fn name_in(line: &str) -> Option<&str> {
    let (name, _) = line.split_once('=')?;
    let name = name.trim().trim_start_matches("export ").trim();
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    (!name.is_empty() && name.bytes().all(is_name)).then_some(name)
}

/// The first of these lines that has a `$` outside single quotes and comments.
fn dollar(lines: &[&str]) -> Option<usize> {
    let (mut quote, mut is_escaped) = (None, false);
    for (number, line) in lines.iter().enumerate() {
        if quote.is_none() && line.trim_start().starts_with('#') {
            continue;
        }
        let mut is_after_space = false;
        for c in line.chars() {
            match (quote, c) {
                _ if is_escaped => is_escaped = false,
                (_, '\\') => is_escaped = true,
                (None, '#') if is_after_space => break,
                (None, '\'' | '"') => quote = Some(c),
                (Some(open), c) if open == c => quote = None,
                (None | Some('"'), '$') => return Some(number),
                _ => {}
            }
            is_after_space = c.is_whitespace();
        }
    }
    None
}

#[cfg(test)]
mod tests;
