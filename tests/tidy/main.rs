//! The text is tested too: callbridge is read as much as it is run, so what a reader relies on must
//! hold. These tests read the files of the repository; they start nothing.
//!
//! * `story`: the numbers and words of a call are the same everywhere, and the code runs downwards;
//! * `code`: what no function of the server may do, and how long one may be;
//! * `house`: the rooms of `src/` use each other as main.rs draws them;
//! * `words`: settings, to-do marks, width of lines, reasons for dependencies;
//! * `links`: what README and docs point at is there;
//! * `agent`: the built-in agent and the workflow that goes with it.
//!
//! Rust is read with syn (`source`). Each test collects all that it finds and says where it is and
//! what to do about it.

mod agent;
mod code;
mod house;
mod links;
mod source;
mod story;
mod words;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use source::{Source, parse_all};

/// Why a test fails. Printed as it is, so that the lines stay lines.
struct Untidy(String);

impl fmt::Debug for Untidy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Default)]
struct Findings(Vec<String>);

impl Findings {
    fn add(&mut self, finding: String) {
        self.0.push(finding);
    }

    fn verdict(&self, rule: &str) -> Result<(), Untidy> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(Untidy(format!("{rule}\n  {}", self.0.join("\n  "))))
    }
}

fn first_difference<T: PartialEq + fmt::Debug>(wanted: &[T], found: &[T]) -> String {
    for place in 0..wanted.len().max(found.len()) {
        match (wanted.get(place), found.get(place)) {
            (Some(wanted), Some(found)) if wanted == found => {}
            (Some(wanted), Some(found)) => {
                return format!("Number {}: {wanted:?} is wanted, {found:?} is there", place + 1);
            }
            (Some(wanted), None) => return format!("{wanted:?} is missing at the end"),
            (None, found) => return format!("{found:?} at the end is too much"),
        }
    }
    "no difference".to_owned()
}

/// Every file of `src/`, read by syn.
fn sources() -> Result<Vec<Source>, Untidy> {
    parse_all(&texts_under("src", "rs")?).map_err(Untidy)
}

fn read(path: &str) -> Result<String, Untidy> {
    fs::read_to_string(root().join(path))
        .map_err(|error| Untidy(format!("cannot read {path}: {error}")))
}

/// Files that are there on some days only.
fn read_if_there(path: &str) -> Result<Option<String>, Untidy> {
    if root().join(path).exists() { read(path).map(Some) } else { Ok(None) }
}

/// The texts of all such files below a directory, by their paths from the root. Empty if there is
/// no such directory.
fn texts_under(directory: &str, extension: &str) -> Result<BTreeMap<String, String>, Untidy> {
    let mut texts = BTreeMap::new();
    for path in files_under(directory)? {
        if has_extension(&path, extension) {
            let text = read(&path)?;
            texts.insert(path, text);
        }
    }
    Ok(texts)
}

/// All files below a directory, as paths from the root, in order of name.
fn files_under(directory: &str) -> Result<Vec<String>, Untidy> {
    let mut files = Vec::new();
    let mut to_visit = vec![PathBuf::from(directory)];
    while let Some(directory) = to_visit.pop() {
        let cannot = |error: io::Error| {
            Untidy(format!("cannot list {}: {error}", directory.to_string_lossy()))
        };
        let entries = match fs::read_dir(root().join(&directory)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(cannot(error)),
        };
        for entry in entries {
            let entry = entry.map_err(cannot)?;
            let path = directory.join(entry.file_name());
            // Cargo's and cargo-fuzz's own: not part of the repository.
            let is_built = path.ends_with("target") || path.ends_with("corpus");
            if entry.file_type().map_err(cannot)?.is_dir() {
                if !is_built {
                    to_visit.push(path);
                }
            } else {
                files.push(path.to_string_lossy().into_owned());
            }
        }
    }
    files.sort();
    Ok(files)
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn has_extension(path: &str, extension: &str) -> bool {
    Path::new(path).extension().is_some_and(|found| found == extension)
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    (1..).zip(text.lines())
}

/// Whether `phrase` stands in the line as words of its own.
fn has_phrase(line: &str, phrase: &str) -> bool {
    line.match_indices(phrase).any(|(at, _)| {
        let before = line[..at].ends_with(is_word) && phrase.starts_with(is_word);
        let after = line[at + phrase.len()..].starts_with(is_word) && phrase.ends_with(is_word);
        !before && !after
    })
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// All lines inside the fenced blocks of a Markdown text.
fn code_blocks(markdown: &str) -> Vec<&str> {
    let mut inside = false;
    let mut lines = Vec::new();
    for line in markdown.lines() {
        if line.trim_start().starts_with("```") {
            inside = !inside;
        } else if inside {
            lines.push(line);
        }
    }
    lines
}
