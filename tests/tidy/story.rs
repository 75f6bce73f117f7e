//! A call is told with the same numbers and words everywhere, and the code runs downwards.

use std::collections::BTreeMap;

use syn::{Expr, ExprLit, Item, ItemEnum, Lit};

use crate::source::{Flat, Function, Owner, Source, parse_all};
use crate::{
    Findings, Untidy, code_blocks, first_difference, has_phrase, numbered, read, sources,
    texts_under,
};

/// Names of methods that many types share. The tokens cannot tell whose method is meant.
const COMMON_METHODS: [&str; 29] = [
    "new", "fmt", "from", "into", "drop", "default", "read", "write", "send", "recv", "flush",
    "close", "next", "get", "set", "take", "push", "insert", "remove", "len", "is_empty", "clone",
    "eq", "as_str", "parse", "join", "lock", "start", "run",
];

#[test]
fn steps_have_the_same_numbers_and_words_everywhere() -> Result<(), Untidy> {
    let sources = sources()?;
    let steps = steps_of_enum(the_enum(&sources, &["Step"])?);
    let mut found = Findings::default();
    if steps.len() != 9 {
        found.add(format!("`enum Step` has {} variants, a call has nine", steps.len()));
    }

    let mut wanted_banners = vec![(0, "Before the call".to_owned())];
    wanted_banners.extend(steps.iter().cloned());
    let banners: Vec<(usize, String)> = section_banners(&read("src/main.rs")?)
        .into_iter()
        .map(|banner| (banner.number, banner.word))
        .collect();
    if banners != wanted_banners {
        found.add(format!(
            "src/main.rs: the section banners are not those of `enum Step`, with 0 before. {}",
            first_difference(&wanted_banners, &banners)
        ));
    }

    let readme = read("README.md")?;
    for (number, word) in &steps {
        let list_item = format!("{number}. **{word}**");
        if !readme.lines().any(|line| line.starts_with(&list_item)) {
            found.add(format!("README.md: no list item begins with `{list_item}`"));
        }
        let in_picture = format!("{number} {}", word.to_lowercase());
        if !code_blocks(&readme).iter().any(|line| has_phrase(line, &in_picture)) {
            found.add(format!("README.md: the picture of a call does not show `{in_picture}`"));
        }
    }
    let words: Vec<String> = steps.iter().map(|(_, word)| word.to_lowercase()).collect();
    let (path, page) = the_page()?;
    let on_page = first_words(&page, "const STEPS = [", "];");
    if on_page != words {
        found.add(format!("{path}: STEPS. {}", first_difference(&words, &on_page)));
    }
    found.verdict("step numbers and words differ; the ones in `enum Step` are right")
}

#[test]
fn the_page_knows_every_way_in_which_a_call_ends() -> Result<(), Untidy> {
    let sources = sources()?;
    let ends = the_enum(&sources, &["EndedBy"])?;
    let ends: Vec<String> = ends.variants.iter().map(|end| end.ident.to_string()).collect();
    let (path, page) = the_page()?;
    let on_page = first_words(&page, "const ENDS = {", "};");
    let mut found = Findings::default();
    if ends.is_empty() || on_page != ends {
        found.add(format!("{path}: ENDS. {}", first_difference(&ends, &on_page)));
    }
    found.verdict("the ends of a call differ; the ones in `enum EndedBy` are right")
}

/// A reader goes from top to bottom, so a function stands below the place that first needs it.
///
/// The rule, file by file: take each function that is used in its own file (what only other files
/// use is that file's door, and its place says nothing). Its first use is its first call, or, if
/// the file never calls it, the first place that names it. A method counts as used by
/// `.name(...)`, `Self::name` and `Type::name`. Not judged are functions of traits, names that a
/// file defines twice, and methods with names that std's types have too.
///
/// Nine of ten stand below their first use: in main.rs, and in all of `src/` taken together.
#[test]
fn the_story_runs_downwards() -> Result<(), Untidy> {
    let mut in_main = (0, Findings::default());
    let mut in_all = (0, Findings::default());
    for file in sources()? {
        let (judged, above) = functions_above_their_first_use(&file);
        in_all.0 += judged;
        in_all.1.0.extend(above.iter().cloned());
        if file.path == "src/main.rs" {
            in_main = (judged, Findings(above));
        }
    }
    for (place, (judged, above)) in [("src/main.rs", in_main), ("src/", in_all)] {
        if above.0.len() * 10 > judged {
            above.verdict(&format!(
                "{place}: of {judged} functions at most a tenth may stand above its first use, \
                 and {} do",
                above.0.len()
            ))?;
        }
    }
    Ok(())
}

/// How many functions of the file are judged, and what is to be said about those that stand too
/// high.
fn functions_above_their_first_use(file: &Source) -> (usize, Vec<String>) {
    let functions = file.functions();
    let mut inside_use = false;
    let mut code: Vec<&Flat> = file.code().collect();
    code.retain(|token| {
        inside_use = token.text == "use" || (inside_use && token.text != ";");
        !inside_use
    });
    let mut judged = 0;
    let mut above = Vec::new();
    for function in &functions {
        let defined_often = functions.iter().filter(|f| f.name == function.name).count() > 1;
        let is_common =
            function.owner != Owner::Nobody && COMMON_METHODS.contains(&function.name.as_str());
        if function.owner == Owner::Trait || defined_often || is_common {
            continue;
        }
        let Some(line) = line_of_first_use(&code, function) else {
            continue;
        };
        judged += 1;
        if line > function.start.line {
            above.push(format!(
                "{}:{}: `{}` stands above its first use in line {line}: move it below",
                file.path, function.start.line, function.name
            ));
        }
    }
    (judged, above)
}

/// Where a function is first called; if it never is, where its name is first mentioned. Takes the
/// code of a file without its `use` lists.
fn line_of_first_use(code: &[&Flat], function: &Function) -> Option<usize> {
    let text =
        |at: Option<usize>| at.and_then(|at| code.get(at)).map_or("", |token| token.text.as_str());
    let mut mentioned = None;
    let named = code.iter().enumerate().filter(|(_, token)| token.text == function.name);
    for (at, token) in named {
        if (function.start..function.end).contains(&token.at) {
            continue;
        }
        let next = text(at.checked_add(1));
        let is_called = next == "(" || (next == "::" && text(at.checked_add(2)) == "<");
        let before = text(at.checked_sub(1));
        let before_that = text(at.checked_sub(2));
        let is_meant = match (&function.owner, before) {
            (_, "fn" | "'") | (Owner::Nobody, ".") => false,
            (Owner::Nobody, "::") => before_that.starts_with(|c: char| c.is_lowercase()),
            // `name: value` is a field.
            (Owner::Nobody, _) => next != ":",
            (Owner::Type(owner), "::") => before_that == "Self" || before_that == owner,
            (_, before) => before == "." && is_called,
        };
        if is_meant && is_called {
            return Some(token.at.line);
        }
        if is_meant {
            mentioned = mentioned.or(Some(token.at.line));
        }
    }
    mentioned
}

#[test]
fn the_first_use_of_a_function_is_found() -> Result<(), String> {
    let source = "
        use inside::high;
        fn high() {}
        fn recursive() { recursive() }
        impl Leg { fn method(&self) {} fn made() -> Leg {} fn close(&self) {} fn unused() {} }
        impl Drop for Leg { fn drop(&mut self) {} }
        fn main() { log!(\"{}\", high()); leg.method(); Leg::made(); leg.close(); }
        fn story() { let low = Low { low: self.low }; others.map(passed); Other::low(); low(); }
        fn low() {}
        fn passed() {}
        impl Low { fn late() {} fn later(&self) { Self::late(); } }
        #[cfg(test)] fn test() { Low::later(); Leg::unused(); }
    ";
    let files = BTreeMap::from([("src/x.rs".to_owned(), source.to_owned())]);
    let file = parse_all(&files)?.pop().ok_or("no file")?;
    let (judged, above) = functions_above_their_first_use(&file);
    let names: Vec<&str> = above.iter().filter_map(|line| line.split('`').nth(1)).collect();
    assert_eq!(names, ["high", "method", "made"], "{above:#?}");
    assert_eq!(judged, 6, "those, `low`, `passed` and `late`");
    Ok(())
}

// ============================================================================
// What the files say
// ============================================================================

/// The one enum with such a name, wherever in `src/` it stands.
fn the_enum<'a>(sources: &'a [Source], names: &[&str]) -> Result<&'a ItemEnum, Untidy> {
    let mut enums = Vec::new();
    for file in sources {
        for item in file.items() {
            if let Item::Enum(item) = item
                && names.iter().any(|name| item.ident == name)
            {
                enums.push((file.path.as_str(), item));
            }
        }
    }
    match enums.as_slice() {
        [(_, item)] => Ok(item),
        [] => Err(Untidy(format!("no file of src/ has an enum {names:?}"))),
        more => {
            let places: Vec<&str> = more.iter().map(|(path, _)| *path).collect();
            Err(Untidy(format!("an enum {names:?} is there more than once: {places:?}")))
        }
    }
}

/// The variants of `enum Step` with their numbers. Without `= n` they count from one. Number 0, if
/// there is one, is not a step of a call.
fn steps_of_enum(steps: &ItemEnum) -> Vec<(usize, String)> {
    let mut numbered = Vec::new();
    for variant in &steps.variants {
        let number = match &variant.discriminant {
            Some((_, Expr::Lit(ExprLit { lit: Lit::Int(number), .. }))) => {
                number.base10_parse().ok()
            }
            _ => None,
        };
        let number = number.unwrap_or(numbered.len() + 1);
        if number > 0 {
            numbered.push((number, variant.ident.to_string()));
        }
    }
    numbered
}

/// The owner's live page and where it is.
fn the_page() -> Result<(String, String), Untidy> {
    let pages = texts_under("src", "html")?;
    let page = pages.into_iter().find(|(path, _)| path.ends_with("/page.html"));
    page.ok_or_else(|| Untidy("there is no page.html in src/".to_owned()))
}

/// The word with which each entry of a list in the page begins, whichever way it is wrapped: the
/// entries themselves stand two columns in.
fn first_words(page: &str, from: &str, to: &str) -> Vec<String> {
    let list = page.split(from).nth(1).and_then(|rest| rest.split(to).next()).unwrap_or_default();
    let word = |text: &str| {
        let letters = text.chars().skip_while(|letter| !letter.is_alphabetic());
        letters.take_while(|letter| letter.is_alphabetic()).collect::<String>()
    };
    let entries = list.split("\n  ").filter(|line| !line.starts_with([' ', ']']));
    entries.map(word).filter(|word| !word.is_empty()).collect()
}

pub struct Banner {
    pub number: usize,
    pub word: String,
    pub line: usize,
}

/// The numbered banners: `// 4. Answer: ...` between two lines of `// ====`.
pub fn section_banners(source: &str) -> Vec<Banner> {
    let lines: Vec<(usize, &str)> = numbered(source).collect();
    let is_rule = |line: &str| line.trim_end().starts_with("// ====");
    let mut banners = Vec::new();
    for window in lines.windows(3) {
        let [(_, above), (line, title), (_, below)] = window else {
            continue;
        };
        let Some((number, rest)) = title.trim_start_matches("// ").split_once(". ") else {
            continue;
        };
        // `6a` and the like are parts of a section and not counted.
        let Ok(number) = number.parse() else {
            continue;
        };
        if is_rule(above) && is_rule(below) {
            let word = rest.split(':').next().unwrap_or(rest).trim().to_owned();
            banners.push(Banner { number, word, line: *line });
        }
    }
    banners
}
