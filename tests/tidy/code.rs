//! What no function of the server may do, and how long a function may be.
//!
//! clippy forbids `unwrap`, `expect` and `panic!` too. It does not see `unreachable!` and its
//! kin, nor what an attribute has silenced.

use std::collections::BTreeSet;

use syn::{Item, ItemImpl, ItemStruct};

use crate::source::{Flat, Source, flat};
use crate::words::settings_of_code;
use crate::{Findings, Untidy, numbered, read, sources};

/// Lines of code between a function's first line and its closing brace.
const FUNCTION_LINES_MAX: usize = 60;

/// Room and name of functions that are longer. None is to be added; one that has become short is
/// to be struck out.
const LONG_FUNCTIONS: [(&str, &str); 1] = [("demo", "measure_churn")];

#[test]
fn functions_fit_a_screen() -> Result<(), Untidy> {
    let mut found = Findings::default();
    let mut excepted = BTreeSet::new();
    for file in sources()? {
        for function in file.functions() {
            let (first, last) = (function.start.line, function.end.line);
            let lines = file.text.lines().skip(first).take(last.saturating_sub(first + 1));
            let count = lines
                .map(str::trim)
                .filter(|line| !line.is_empty() && !line.starts_with("//"))
                .count();
            if count <= FUNCTION_LINES_MAX {
                continue;
            }
            let room = file.room();
            let exception = (room.as_str(), function.name.as_str());
            if let Some(exception) = LONG_FUNCTIONS.iter().find(|known| **known == exception) {
                excepted.insert(*exception);
                continue;
            }
            found.add(format!(
                "{}:{first}: `{}` has {count} lines of code: give a part of it a name",
                file.path, function.name
            ));
        }
    }
    for exception in LONG_FUNCTIONS {
        if !excepted.contains(&exception) {
            found.add(format!("{exception:?} is not too long any more: strike it out"));
        }
    }
    found.verdict(&format!("functions of at most {FUNCTION_LINES_MAX} lines of code"))
}

#[test]
fn a_live_call_has_no_panic_path() -> Result<(), Untidy> {
    let methods = ["unwrap", "expect", "unwrap_err", "expect_err"];
    let macros = ["panic", "unreachable", "unimplemented", concat!("to", "do")];
    let mut found = Findings::default();
    for file in sources()?.iter().filter(|file| file.is_server()) {
        // As tokens, because the arguments of a macro are nothing else.
        let code: Vec<&Flat> = file.code().collect();
        for window in code.windows(3) {
            let [before, name, after] = window else { continue };
            let is_method = [".", "::"].contains(&before.text.as_str())
                && methods.contains(&name.text.as_str());
            let is_macro = macros.contains(&name.text.as_str()) && after.text == "!";
            if is_method || is_macro {
                found.add(format!(
                    "{}:{}: `{}`: return a Failure, or use let-else",
                    file.path, name.at.line, name.text
                ));
            }
        }
    }
    found.verdict("nothing in the server may panic")
}

#[test]
fn the_server_knows_the_demo_only_by_one_call() -> Result<(), Untidy> {
    let mut places = Vec::new();
    for file in sources()?.iter().filter(|file| file.is_server()) {
        let code: Vec<&Flat> = file.code().collect();
        for pair in code.windows(2) {
            let [name, after] = pair else { continue };
            if name.text == "demo" && after.text == "::" {
                places.push(format!("{}:{}", file.path, name.at.line));
            }
        }
    }
    let mut found = Findings::default();
    if places.len() != 1 || !places.iter().all(|place| place.starts_with("src/main.rs:")) {
        found.add(format!("`demo::` is at {places:?}: once, in `main` of src/main.rs, is right"));
    }
    found.verdict("the pretend world must stay out of the server")
}

#[test]
fn no_async_runtime_is_named() -> Result<(), Untidy> {
    let words = ["async", "await", "tokio", "async_std", "smol", "async_io", "futures"];
    let mut found = Findings::default();
    for file in sources()? {
        for token in file.tokens.iter().filter(|token| words.contains(&token.text.as_str())) {
            found.add(format!(
                "{}:{}: `{}`: block on a thread instead",
                file.path, token.at.line, token.text
            ));
        }
    }
    // That no dependency of a dependency is one is looked at by `.ci/run`.
    for (number, line) in numbered(&read("Cargo.toml")?) {
        let name = line.split(['=', '.', ' ']).next().unwrap_or_default();
        if ["tokio", "async-std", "smol", "async-io", "futures"].contains(&name) {
            found.add(format!("Cargo.toml:{number}: `{name}` is an async runtime or brings one"));
        }
    }
    found.verdict("callbridge has blocking sockets and threads, and no async runtime")
}

/// Whoever prints a whole struct prints its fields. So a secret has a type that shows stars, and
/// each setting that is one has that type. (That the stars are what is printed, and that nobody
/// logs what `reveal` gives, is seen by tests that look at the log.)
#[test]
fn a_secret_shows_stars() -> Result<(), Untidy> {
    let mut found = Findings::default();
    let sources = sources()?;
    let mut structs: Vec<(&Source, &ItemStruct)> = Vec::new();
    let mut shows_stars = false;
    for file in sources.iter().filter(|file| file.is_server()) {
        for item in file.items() {
            match item {
                Item::Struct(item) => structs.push((file, item)),
                Item::Impl(item) if is_for_secret(item) => {
                    let Some((path, _)) = &item.trait_ else { continue };
                    let name = path.segments.last().map(|last| last.ident.to_string());
                    match name.as_deref() {
                        Some("Debug" | "Display") if is_blind(file, item) => shows_stars = true,
                        Some("Debug" | "Display" | "Serialize" | "Deref" | "AsRef") => {
                            found.add(format!(
                                "{}:{}: {} of `Secret` gives it away",
                                file.path,
                                item.impl_token.span.start().line,
                                name.unwrap_or_default()
                            ));
                        }
                        _ => {}
                    }
                }
                _ => {}
            }
        }
    }
    if !shows_stars {
        found.add("no `impl Debug for Secret` that shows \"***\"".to_owned());
    }
    for (file, secret) in structs.iter().filter(|(_, item)| item.ident == "Secret") {
        for derive in secret.attrs.iter().filter(|attribute| attribute.path().is_ident("derive")) {
            let syn::Meta::List(list) = &derive.meta else { continue };
            for name in flat(list.tokens.clone()) {
                if ["Debug", "Serialize"].contains(&name.text.as_str()) {
                    found.add(format!(
                        "{}:{}: a derived {} of `Secret` gives it away",
                        file.path, name.at.line, name.text
                    ));
                }
            }
        }
    }
    let secret_settings = settings_of_code(&sources)?
        .into_iter()
        .filter(|name| {
            ["_KEY", "_TOKEN", "_SECRET", "_HEADER"].iter().any(|end| name.ends_with(end))
        })
        .map(|name| name.to_lowercase());
    for setting in secret_settings {
        let field = structs
            .iter()
            .filter(|(_, item)| item.ident == "Config")
            .flat_map(|(file, item)| item.fields.iter().map(move |field| (file, field)))
            .find(|(_, field)| field.ident.as_ref().is_some_and(|name| *name == setting));
        match field {
            None => found.add(format!("`struct Config` has no field `{setting}`")),
            Some((file, field)) => {
                let line = field.ident.as_ref().map_or(0, |name| name.span().start().line);
                let names_it =
                    file.code().any(|token| token.at.line == line && token.text == "Secret");
                if !names_it {
                    found.add(format!("{}:{line}: `{setting}` is not a `Secret`", file.path));
                }
            }
        }
    }
    found.verdict("a secret could be printed")
}

fn is_for_secret(item: &ItemImpl) -> bool {
    matches!(&*item.self_ty, syn::Type::Path(path) if path.path.is_ident("Secret"))
}

/// Shows stars, and does not look at what is inside.
fn is_blind(file: &Source, item: &ItemImpl) -> bool {
    let braces = item.brace_token.span;
    let inside =
        |token: &&Flat| (braces.open().start()..braces.close().start()).contains(&token.at);
    let stars = file.code().filter(inside).any(|token| token.text == "\"***\"");
    let looks_inside = file
        .code()
        .zip(file.code().skip(1))
        .any(|(token, after)| inside(&token) && token.text == "self" && after.text == ".");
    stars && !looks_inside
}
