//! Settings, marks, lines and reasons: what is written beside the code and must agree with it.

use syn::{Expr, Item, Lit};

use crate::source::Source;
use crate::{
    Findings, Untidy, files_under, first_difference, has_extension, has_phrase, numbered, read,
    read_if_there, sources, texts_under,
};

/// Columns of a line, in comments and in code.
const COLUMNS_MAX: usize = 100;

#[test]
fn settings_are_listed_alike_in_code_example_and_docs() -> Result<(), Untidy> {
    let in_code = settings_of_code(&sources()?)?;
    let in_example = settings_of_example(&read(".env.example")?);
    let (place, in_docs) = if let Some(text) = read_if_there("docs/settings.md")? {
        ("docs/settings.md", settings_of_table(&text))
    } else {
        let readme = read("README.md")?;
        let section = readme.split("\n## Settings\n").nth(1).unwrap_or_default();
        let section = section.split("\n## ").next().unwrap_or_default();
        ("README.md, table under \"## Settings\"", settings_of_table(section))
    };
    let mut found = Findings::default();
    if in_code.is_empty() {
        found.add("`const SETTINGS` has no names".to_owned());
    }
    if in_example != in_code {
        found.add(format!(".env.example: {}", first_difference(&in_code, &in_example)));
    }
    if in_docs != in_code {
        found.add(format!("{place}: {}", first_difference(&in_code, &in_docs)));
    }
    found.verdict("settings differ; the names and order of `const SETTINGS` are right")
}

#[test]
fn lines_fit_the_page() -> Result<(), Untidy> {
    let mut found = Findings::default();
    for (path, text) in texts_under("src", "rs")? {
        for (number, line) in numbered(&text) {
            let columns = line.chars().count();
            if columns > COLUMNS_MAX {
                let cure = if line.trim_start().starts_with("//") {
                    "wrap the comment"
                } else {
                    "break the line (cargo fmt leaves long strings alone)"
                };
                found.add(format!("{path}:{number}: {columns} columns: {cure}"));
            }
        }
    }
    found.verdict(&format!("lines of at most {COLUMNS_MAX} columns"))
}

#[test]
fn nothing_is_left_to_do() -> Result<(), Untidy> {
    // In pieces, so that this file does not accuse itself.
    let marks =
        [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X"), concat!("HA", "CK")];
    let placeholder = concat!("DEMO_OUTPUT", "_HERE");
    let mut files = vec![
        "Cargo.toml".to_owned(),
        "README.md".to_owned(),
        ".env.example".to_owned(),
        ".ci/run".to_owned(),
    ];
    for directory in ["src", "tests", "docs"] {
        files.extend(files_under(directory)?);
    }
    // The rest of what lies there is data and pictures.
    let kinds = ["rs", "md", "toml", "json", "html", "example"];
    files.retain(|path| path == ".ci/run" || kinds.iter().any(|kind| has_extension(path, kind)));
    let mut found = Findings::default();
    for path in files {
        for (number, line) in numbered(&read(&path)?) {
            for mark in marks {
                if has_phrase(line, mark) {
                    found.add(format!("{path}:{number}: {mark}: do it, or say why not"));
                }
            }
            if line.contains(placeholder) {
                found.add(format!("{path}:{number}: paste what the demo prints here"));
            }
        }
    }
    found.verdict("to-do marks are left")
}

#[test]
fn every_dependency_says_what_it_is_for() -> Result<(), Untidy> {
    let manifest = read("Cargo.toml")?;
    let mut found = Findings::default();
    let mut in_dependencies = false;
    let mut previous = "";
    for (number, line) in numbered(&manifest) {
        let trimmed = line.trim();
        if trimmed.starts_with('[') && !trimmed.ends_with("],") {
            let header = trimmed.trim_matches(['[', ']']);
            in_dependencies = header.ends_with("dependencies");
            // The long form: `[dependencies.name]`.
            if header.contains("dependencies.") && !previous.trim_start().starts_with('#') {
                found.add(format!("Cargo.toml:{number}: `{header}` has no comment above it"));
            }
        } else if in_dependencies && is_dependency_line(line) {
            let commented = previous.trim_start().starts_with('#') || line.contains(" #");
            if !commented {
                found.add(format!(
                    "Cargo.toml:{number}: `{trimmed}` needs a comment, directly above or beside \
                     it: what it does for us, and why these features"
                ));
            }
        }
        previous = line;
    }
    found.verdict("a dependency without a reason")
}

/// The names in `const SETTINGS`, wherever in `src/` it stands. An entry may be a name, or a tuple
/// or call with the name in front.
pub fn settings_of_code(sources: &[Source]) -> Result<Vec<String>, Untidy> {
    let mut lists = Vec::new();
    for file in sources {
        for item in file.items() {
            if let Item::Const(item) = item
                && item.ident == "SETTINGS"
            {
                lists.push((file.path.as_str(), &*item.expr));
            }
        }
    }
    let [(path, list)] = lists.as_slice() else {
        return Err(Untidy(format!("`const SETTINGS` is there {} times", lists.len())));
    };
    let list = match list {
        Expr::Reference(reference) => &*reference.expr,
        list => list,
    };
    let Expr::Array(array) = list else {
        return Err(Untidy(format!("{path}: `const SETTINGS` is not a list")));
    };
    let mut names = Vec::new();
    for entry in &array.elems {
        let name = first_string(entry);
        names.push(name.ok_or_else(|| {
            Untidy(format!("{path}: an entry of `const SETTINGS` does not begin with its name"))
        })?);
    }
    Ok(names)
}

fn first_string(entry: &Expr) -> Option<String> {
    match entry {
        Expr::Lit(literal) => match &literal.lit {
            Lit::Str(text) => Some(text.value()),
            _ => None,
        },
        Expr::Tuple(tuple) => tuple.elems.first().and_then(first_string),
        Expr::Call(call) => call.args.first().and_then(first_string),
        _ => None,
    }
}

/// `NAME=` and `# NAME=default` lines.
fn settings_of_example(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    for line in text.lines() {
        let Some((name, _)) = line.strip_prefix("# ").unwrap_or(line).split_once('=') else {
            continue;
        };
        if is_setting_name(name) {
            names.push(name.to_owned());
        }
    }
    names
}

/// The first cells of a table's rows.
fn settings_of_table(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    for line in text.lines() {
        let Some(row) = line.strip_prefix("| `") else {
            continue;
        };
        let name = row.split('`').next().unwrap_or_default();
        if is_setting_name(name) {
            names.push(name.to_owned());
        }
    }
    names
}

fn is_setting_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_uppercase())
        && name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
}

/// `name = ...` or `name.workspace = ...` at the beginning of a line.
fn is_dependency_line(line: &str) -> bool {
    let Some((key, _)) = line.split_once('=') else {
        return false;
    };
    let key = key.trim_end();
    key.starts_with(|c: char| c.is_ascii_alphabetic())
        && key.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}
