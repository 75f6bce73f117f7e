//! The house: `src/main.rs` tells the call, and the rooms (modules) are what it leans on. Under
//! `# The rooms` its module doc draws them, and these checks hold the code to the drawing.
//!
//! ```text
//! main.rs            the call
//!   around/          lines, shutdown (drain, signals), ready
//!   check/  demo/  diagram.rs
//!   ---------------- below this line nobody names `Bridge` or `Call`
//!   parties/         twilio, ultravox, n8n
//!   toolbox/         log, text
//! ```
//!
//! How a drawing is read: a row begins with its rooms, `name/` for a folder and `name.rs` for a
//! file. Behind a single folder stand its files, with commas between them; remarks stand in
//! parentheses. A row may go on in the next line. Behind several rooms, or behind a file, anything
//! may stand. Files of unit tests are not drawn.
//!
//! The rules: a room uses rooms of lower rows, and what is in its own folder. main.rs uses all.
//! What stands in main.rs is used only by rooms above the dashes, and below them no path names
//! `Bridge` or `Call`. Unit tests are free in what they use.

mod drawing;
mod names;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use crate::source::{Source, parse_all};
use crate::story::section_banners;
use crate::{Findings, Untidy, sources, texts_under};
use drawing::Drawing;
use names::{Named, names_in};

const MAIN: &str = "src/main.rs";
const MAIN_LINES_MAX: usize = 1_900;
/// The banner of step 1 stands above it.
const CALL_BEGINS_BEFORE_LINE: usize = 400;
const ROOM_LINES_MAX: usize = 500;
const DOC_LINES_MIN: usize = 3;
/// Long, because each plays a world. Only their length is forgiven.
const LONG_ROOMS: [&str; 2] = ["demo", "bench"];
/// The story's own types.
const OF_THE_STORY: [&str; 2] = ["Bridge", "Call"];

#[test]
fn the_house_stands_as_it_is_drawn() -> Result<(), Untidy> {
    let found = Findings(check(&texts_under("src", "rs")?).map_err(Untidy)?);
    found.verdict("the house is not the one that src/main.rs draws under `# The rooms`")
}

#[test]
fn whatever_is_used_is_named() -> Result<(), Untidy> {
    Findings(globs(&sources()?)).verdict("no glob imports, in unit tests neither")
}

/// Holds the files of a house, main.rs among them, to the drawing that main.rs has.
fn check(files: &BTreeMap<String, String>) -> Result<Vec<String>, String> {
    let main = files.get(MAIN).ok_or("there is no src/main.rs")?;
    let mut found = Vec::new();
    let drawing = Drawing::of(main, &mut found);
    let mut sources = parse_all(files)?;
    sources.retain(|file| !file.is_test_file);
    compare_with_drawing(&drawing, &sources, &mut found);
    for file in &sources {
        for named in names_in(file) {
            found.extend(complaint_about(&named, file, &drawing));
        }
        check_size_and_doc(file, &mut found);
    }
    Ok(found)
}

/// Everything that is there is drawn, and the other way round.
fn compare_with_drawing(drawing: &Drawing, sources: &[Source], found: &mut Vec<String>) {
    // By room: is it a folder, and which files does that have?
    let mut rooms: BTreeMap<String, (bool, BTreeSet<String>)> = BTreeMap::new();
    for file in sources.iter().filter(|file| file.path != MAIN) {
        let (is_folder, inside) = rooms.entry(file.room()).or_default();
        *is_folder |= file.path.matches('/').count() > 1;
        inside.extend(file.module().get(1).cloned());
    }
    for (name, (is_folder, inside)) in &rooms {
        let what = if *is_folder { format!("{name}/") } else { format!("{name}.rs") };
        let Some(drawn) = drawing.rooms.get(name) else {
            found.push(format!("src/{what} is not in the drawing"));
            continue;
        };
        if drawn.is_folder != *is_folder {
            found.push(format!("src/{what} is drawn as something else, a file or a folder"));
        }
        let Some(listed) = &drawn.files else { continue };
        for file in inside.difference(listed) {
            found.push(format!("`{file}` of src/{what} is not in the drawing"));
        }
        for file in listed.difference(inside) {
            found.push(format!("`{file}` is drawn in src/{what} and not there"));
        }
    }
    for name in drawing.rooms.keys().filter(|name| !rooms.contains_key(*name)) {
        found.push(format!("the room `{name}` is drawn and not there"));
    }
}

/// Whether a file may name what it names.
fn complaint_about(named: &Named, file: &Source, drawing: &Drawing) -> Option<String> {
    if file.path == MAIN {
        return None;
    }
    let room = file.room();
    // A room that is not drawn has got its own complaint.
    let own = drawing.rooms.get(&room)?;
    let place = format!("{}:{}", file.path, named.line);
    if own.is_below_the_line
        && let Some(name) = named.type_among(&OF_THE_STORY)
    {
        return Some(format!("{place}: names `{name}`, which only the rooms above the dashes do"));
    }
    let inside = named.inside_the_crate.as_ref()?;
    let Some(target) = inside.first() else {
        return Some(format!("{place}: names the whole of main.rs"));
    };
    if *target == room {
        return None;
    }
    match drawing.rooms.get(target) {
        Some(other) if other.row > own.row => None,
        Some(_) => Some(format!("{place}: uses `{target}`, which is not drawn below `{room}`")),
        None if own.is_below_the_line => {
            Some(format!("{place}: uses `{target}` of main.rs, from below the dashes"))
        }
        None => None,
    }
}

fn check_size_and_doc(file: &Source, found: &mut Vec<String>) {
    let path = &file.path;
    let lines = file.text.lines().count();
    let lines_max = if path == MAIN { MAIN_LINES_MAX } else { ROOM_LINES_MAX };
    if lines > lines_max && !LONG_ROOMS.contains(&file.room().as_str()) {
        found.push(format!("{path}: {lines} lines, at most {lines_max} are right"));
    }
    let doc_lines = file.text.lines().take_while(|line| line.starts_with("//!")).count();
    if doc_lines < DOC_LINES_MIN {
        found.push(format!(
            "{path}: begins with {doc_lines} lines of `//!`: what it gives, to whom, and what it \
             never does"
        ));
    }
    if path == MAIN {
        let ring = section_banners(&file.text).into_iter().find(|banner| banner.number == 1);
        match ring {
            Some(ring) if ring.line < CALL_BEGINS_BEFORE_LINE => {}
            Some(ring) => found.push(format!(
                "{path}:{}: the call begins too late: before line {CALL_BEGINS_BEFORE_LINE} is \
                 right",
                ring.line
            )),
            None => found.push(format!("{path}: no banner of step 1")),
        }
    }
}

/// `use x::*`, in unit tests too.
fn globs(sources: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    for file in sources {
        for (line, path) in names::globs_in(file) {
            found.push(format!("{}:{line}: `use {path}::*`: name what is used", file.path));
        }
    }
    found
}
