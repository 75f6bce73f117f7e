//! Reads the drawing in the doc of main.rs.

use std::collections::{BTreeMap, BTreeSet};

use crate::has_extension;

const HEADING: &str = "# The rooms";
const BLOCK: &str = "```text";
const LINE: &str = "below this line nobody names `Bridge` or `Call`";

#[derive(Default)]
pub struct Drawing {
    /// By name, without `/` and `.rs`. Without main.rs.
    pub rooms: BTreeMap<String, Room>,
}

pub struct Room {
    /// Counted from the top. A room uses rooms of a higher number.
    pub row: usize,
    pub is_folder: bool,
    pub is_below_the_line: bool,
    /// None: the drawing does not say.
    pub files: Option<BTreeSet<String>>,
}

/// A row with its rooms as they are spelled, and all that stands behind them.
#[derive(Default)]
struct Row {
    rooms: Vec<String>,
    text: String,
    is_below_the_line: bool,
}

impl Drawing {
    pub fn of(main: &str, found: &mut Vec<String>) -> Drawing {
        let rows = rows(main, found);
        let mut drawing = Drawing::default();
        for (number, row) in rows.into_iter().enumerate() {
            let files = files_of(&row, found);
            for spelled in &row.rooms {
                let name = spelled.trim_end_matches('/').trim_end_matches(".rs");
                if name == "main" {
                    continue;
                }
                let room = Room {
                    row: number,
                    is_folder: spelled.ends_with('/'),
                    is_below_the_line: row.is_below_the_line,
                    files: files.clone(),
                };
                if drawing.rooms.insert(name.to_owned(), room).is_some() {
                    found.push(format!("the room `{name}` is drawn twice"));
                }
            }
        }
        drawing
    }
}

fn rows(main: &str, found: &mut Vec<String>) -> Vec<Row> {
    let mut lines = doc(main).skip_while(|line| *line != HEADING).skip(1);
    let is_other = |line: &str| line != BLOCK && !line.starts_with("# ");
    let block = lines.by_ref().find(|line| !is_other(line));
    if block != Some(BLOCK) {
        found.push(format!("`{HEADING}` in main.rs has no block {BLOCK}"));
        return Vec::new();
    }
    let mut rows: Vec<Row> = Vec::new();
    let mut lines_drawn = 0;
    for line in lines.take_while(|line| *line != "```").filter(|line| !line.is_empty()) {
        if line.starts_with("---") {
            lines_drawn += 1;
            if !line.ends_with(LINE) {
                found.push(format!("behind the dashes of the drawing stands: {LINE}"));
            }
            continue;
        }
        let is_room = |word: &&str| word.ends_with('/') || has_extension(word, "rs");
        let words = line.split_whitespace().map(|word| word.trim_end_matches(','));
        let rooms: Vec<String> = words.take_while(is_room).map(str::to_owned).collect();
        let text = line.split_whitespace().skip(rooms.len()).collect::<Vec<_>>().join(" ");
        if !rooms.is_empty() {
            rows.push(Row { rooms, text, is_below_the_line: lines_drawn > 0 });
        } else if let Some(row) = rows.last_mut() {
            row.text.push(' ');
            row.text.push_str(&text);
        }
    }
    if lines_drawn != 1 {
        found.push(format!("the drawing has {lines_drawn} lines of dashes: one is right"));
    }
    if rows.first().is_none_or(|row| row.rooms != ["main.rs"]) {
        found.push("the first row of the drawing is main.rs, alone".to_owned());
    }
    rows
}

/// The files that stand behind a single folder.
fn files_of(row: &Row, found: &mut Vec<String>) -> Option<BTreeSet<String>> {
    let [room] = row.rooms.as_slice() else { return None };
    if !room.ends_with('/') {
        return None;
    }
    let mut depth = 0_usize;
    let mut list = String::new();
    for letter in row.text.chars() {
        match letter {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            letter if depth == 0 => list.push(letter),
            _ => {}
        }
    }
    let mut files = BTreeSet::new();
    for name in list.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        let name = name.trim_end_matches(['/']).trim_end_matches(".rs");
        if name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_') {
            files.insert(name.to_owned());
        } else {
            found.push(format!(
                "behind `{room}` the drawing says `{name}`, which is no file: remarks stand in \
                 parentheses"
            ));
        }
    }
    (!files.is_empty()).then_some(files)
}

fn doc(main: &str) -> impl Iterator<Item = &str> {
    main.lines().map_while(|line| line.strip_prefix("//!")).map(str::trim)
}
