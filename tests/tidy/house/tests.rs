//! Small made-up houses: a good one, and the same with one thing wrong.

use std::collections::BTreeMap;

use super::{CALL_BEGINS_BEFORE_LINE, MAIN_LINES_MAX, ROOM_LINES_MAX, check, globs};
use crate::source::parse_all;

const DRAWING: &str = "
main.rs            the call: serve, route
  around/          lines (admission,
                   limits), ready
  check/  demo/  diagram.rs    the verbs, one and all
  ---------------- below this line nobody names `Bridge` or `Call`
  parties/         twilio, n8n
  toolbox/         log, text
";

const GOOD: [(&str, &str); 13] = [
    (
        "src/main.rs",
        "mod around; use around::lines::Line; use toolbox::log; struct Bridge; struct Call;
        fn main() { crate::demo::run(); parties::twilio::ring(); }",
    ),
    ("src/around.rs", "pub mod lines; pub mod ready; use crate::Bridge; use ready::is_ready;"),
    ("src/around/lines.rs", "use super::ready::is_ready; use crate::{Call, parties::n8n};"),
    ("src/around/ready.rs", "fn is_ready() { println!(\"{}\", crate::toolbox::log::LINE); }"),
    ("src/check/mod.rs", "use crate::Bridge; use crate::parties::twilio::{self, ring};"),
    ("src/check/ask.rs", "use super::super::toolbox::text;"),
    ("src/demo.rs", "mod world; use crate::toolbox::log;"),
    ("src/demo/world.rs", "use std::fmt;"),
    ("src/diagram.rs", "use crate::toolbox::text;"),
    ("src/parties/twilio.rs", "use super::n8n; use crate::toolbox::{log, text}; use std::io;"),
    (
        "src/parties/n8n.rs",
        "#[cfg(test)] mod tests; fn f() { Step::Bridge; m!(Step::Bridge, $call.sid); }",
    ),
    ("src/toolbox/log.rs", "enum Step { Bridge = 0 } pub(in crate::toolbox) fn f(self) { self.x }"),
    (
        "src/toolbox/text.rs",
        "#[cfg(test)] mod tests { use crate::{Bridge, around::lines}; } use super::log;",
    ),
];

/// The good house with its docs, its drawing and its first banner.
fn house(drawing: &str) -> BTreeMap<String, String> {
    let doc = "//! What it gives.\n//!\n//! What it never does.\n";
    let mut files: BTreeMap<String, String> =
        GOOD.iter().map(|(path, text)| ((*path).to_owned(), format!("{doc}{text}\n"))).collect();
    // Unit tests have no doc, and use what they like.
    let tests = "use crate::around::lines; use crate::Bridge;";
    files.insert("src/parties/n8n/tests.rs".to_owned(), tests.to_owned());
    if let Some(main) = files.get_mut("src/main.rs") {
        let drawing = drawing.trim_end().replace('\n', "\n//! ");
        let rule = "// =====\n";
        *main = format!(
            "{doc}//!\n//! # The rooms\n//!\n//! ```text\n//! {drawing}\n//! ```\n{rule}// 1. Ring: it \
             rings\n{rule}{}",
            main.strip_prefix(doc).unwrap_or_default()
        );
    }
    files
}

#[test]
fn a_good_house_is_good() -> Result<(), String> {
    assert_eq!(check(&house(DRAWING))?, Vec::<String>::new());
    Ok(())
}

#[test]
fn what_a_room_may_not_use_is_found() -> Result<(), String> {
    let cases = [
        // Upwards, in every way of writing it.
        ("src/toolbox/log.rs", "use crate::parties::n8n;", "log.rs:6: uses `parties`"),
        ("src/toolbox/log.rs", "use crate::{toolbox::text, parties};", "uses `parties`"),
        ("src/toolbox/log.rs", "use super::super::parties::n8n as x;", "uses `parties`"),
        ("src/toolbox/log.rs", "fn g() { crate::parties::n8n::ask() }", "uses `parties`"),
        ("src/toolbox/log.rs", "fn g(x: &[crate::parties::A]) {}", "uses `parties`"),
        ("src/toolbox/log.rs", "fn g() { w!(\"{}\", [crate::parties::A]) }", "uses `parties`"),
        ("src/toolbox/log.rs", "macro_rules! m { () => { $crate::parties::A } }", "uses `parties`"),
        ("src/toolbox/log.rs", "mod x { use super::super::super::parties; }", "uses `parties`"),
        ("src/toolbox/log.rs", "#[cfg(not(test))] use crate::parties;", "uses `parties`"),
        ("src/parties/n8n.rs", "pub use crate::around::ready;", "uses `around`"),
        // In the same row.
        ("src/diagram.rs", "use crate::check::ask;", "uses `check`, which is not drawn below"),
        ("src/demo/world.rs", "use crate::diagram;", "uses `diagram`"),
        // What stands in main.rs, from below the line.
        ("src/parties/n8n.rs", "use crate::Step;", "uses `Step` of main.rs"),
        ("src/parties/n8n.rs", "use super::super::serve;", "uses `serve` of main.rs"),
        ("src/parties/n8n.rs", "use crate as root;", "names the whole of main.rs"),
        ("src/parties/n8n.rs", "use crate::*;", "names the whole of main.rs"),
        // The story's types, wherever they come from.
        ("src/toolbox/log.rs", "use super::text::Bridge;", "names `Bridge`"),
        ("src/toolbox/log.rs", "fn g(call: &Call) {}", "names `Call`"),
        ("src/toolbox/log.rs", "impl Tap for Call {}", "names `Call`"),
        ("src/toolbox/log.rs", "fn g() { m!(Call::new()) }", "names `Call`"),
        ("src/parties/n8n.rs", "fn g<T: Into<Vec<Bridge>>>() {}", "names `Bridge`"),
    ];
    for (path, wrong, complaint) in cases {
        let mut files = house(DRAWING);
        let text = files.entry(path.to_owned()).or_default();
        text.push('\n');
        text.push_str(wrong);
        expect_one(&files, complaint, wrong)?;
    }
    Ok(())
}

#[test]
fn what_is_drawn_wrongly_is_found() -> Result<(), String> {
    let cases = [
        ("  toolbox/         log, text\n", "", "src/toolbox/ is not in the drawing"),
        ("diagram.rs", "", "src/diagram.rs is not in the drawing"),
        ("diagram.rs", "diagram/", "src/diagram.rs is drawn as something else"),
        ("diagram.rs", "diagram.rs outbox.rs", "the room `outbox` is drawn and not there"),
        ("log, text", "log, text\n  toolbox/", "the room `toolbox` is drawn twice"),
        ("log, text", "log", "`text` of src/toolbox/ is not in the drawing"),
        ("log, text", "log, text, sound", "`sound` is drawn in src/toolbox/ and not there"),
        ("log, text", "log, text, and more", "`and more`, which is no file"),
        ("main.rs", "", "the first row of the drawing is main.rs"),
        ("  ---------------- below", "  ---------------- above", "behind the dashes"),
        ("  ----------------", "  --------- --\n  ----------------", "2 lines of dashes"),
    ];
    for (right, wrong, complaint) in cases {
        let found = check(&house(&DRAWING.replace(right, wrong)))?;
        assert!(found.iter().any(|line| line.contains(complaint)), "{wrong:?}: {found:#?}");
    }
    let mut files = house(DRAWING);
    for text in files.values_mut() {
        *text = text.replace("//! ```text", "//! ```");
    }
    let found = check(&files)?;
    assert!(found.iter().any(|line| line.contains("has no block")), "{found:#?}");
    Ok(())
}

#[test]
fn what_is_too_long_or_says_nothing_is_found() -> Result<(), String> {
    let lines = |count: usize| "//\n".repeat(count);
    let mut files = house(DRAWING);
    files.entry("src/demo/world.rs".to_owned()).or_default().push_str(&lines(ROOM_LINES_MAX));
    let tests = "src/parties/n8n/tests.rs".to_owned();
    files.entry(tests).or_default().push_str(&lines(ROOM_LINES_MAX));
    assert_eq!(check(&files)?, Vec::<String>::new(), "demo and unit tests may be long");

    for (path, count) in [("src/check/ask.rs", ROOM_LINES_MAX), ("src/main.rs", MAIN_LINES_MAX)] {
        let mut files = house(DRAWING);
        files.entry(path.to_owned()).or_default().push_str(&lines(count));
        expect_one(&files, &format!("at most {count} are right"), path)?;
    }

    let mut files = house(DRAWING);
    files.insert("src/check/ask.rs".to_owned(), "//! One.\n//! Two.\nfn f() {}\n".to_owned());
    expect_one(&files, "begins with 2 lines of `//!`", "a short doc")?;
    files.insert("src/check/ask.rs".to_owned(), "\n//! 1\n//! 2\n//! 3\n".to_owned());
    expect_one(&files, "begins with 0 lines of `//!`", "a doc that is not first")?;

    let mut files = house(DRAWING);
    for text in files.values_mut() {
        let late = format!("{}// =====\n// 1. ", lines(CALL_BEGINS_BEFORE_LINE));
        *text = text.replace("// =====\n// 1. ", &late);
    }
    expect_one(&files, "the call begins too late", "a late call")?;
    for text in files.values_mut() {
        *text = text.replace("// 1. ", "// 2. ");
    }
    expect_one(&files, "no banner of step 1", "no call")
}

#[test]
fn globs_are_found_everywhere() -> Result<(), String> {
    let text = "use a::b::{c, d::*};\n#[cfg(test)] mod tests {\nuse super::*;\n}\nuse e::f;";
    let files = BTreeMap::from([("src/x.rs".to_owned(), text.to_owned())]);
    let found = globs(&parse_all(&files)?);
    assert_eq!(found.len(), 2, "{found:#?}");
    assert!(found[0].starts_with("src/x.rs:1: `use a::b::d::*`"), "{found:#?}");
    assert!(found[1].starts_with("src/x.rs:3: `use super::*`"), "{found:#?}");
    Ok(())
}

fn expect_one(
    files: &BTreeMap<String, String>,
    complaint: &str,
    wrong: &str,
) -> Result<(), String> {
    let found = check(files)?;
    assert!(found.len() == 1 && found[0].contains(complaint), "{wrong:?}: {found:#?}");
    Ok(())
}
