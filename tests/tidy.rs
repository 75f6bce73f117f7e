//! The text is tested too: callbridge is read as much as it is run, so what a reader relies on must
//! hold. These tests read the files of the repository; they start nothing.
//!
//! Each test collects all that it finds and says where it is and what to do about it.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Columns of a line, in comments and in code.
const COLUMNS_MAX: usize = 100;
/// Lines of code between a function's first line and its closing brace.
const FUNCTION_LINES_MAX: usize = 60;
/// What Ultravox may be sent for one stage. Beyond about 15 KB its messages can time out.
const STAGE_BYTES_MAX: usize = 14_000;
/// The placeholders that a prompt may hold.
const PLACEHOLDERS: [&str; 4] = ["agent_name", "company_name", "now", "caller_number"];
/// Names that many types share. A textual search cannot tell whose method is meant.
const COMMON_NAMES: [&str; 32] = [
    "main", "new", "fmt", "from", "into", "drop", "default", "read", "write", "send", "recv",
    "flush", "close", "next", "get", "set", "take", "push", "insert", "remove", "len", "is_empty",
    "clone", "eq", "as_str", "parse", "join", "lock", "start", "run", "text", "name",
];

// ============================================================================
// The tests
// ============================================================================

#[test]
fn steps_have_the_same_numbers_and_words_everywhere() -> Result<(), Untidy> {
    let source = read("src/main.rs")?;
    let steps = steps_of_enum(&source);
    let mut found = Findings::default();
    if steps.len() != 9 {
        found
            .add(format!("src/main.rs: `enum Step` has {} variants, a call has nine", steps.len()));
    }

    let mut wanted_banners = vec![(0, "Before the call".to_owned())];
    wanted_banners.extend(steps.iter().cloned());
    wanted_banners.push((10, "Toolbox".to_owned()));
    let banners = section_banners(&source);
    if banners != wanted_banners {
        found.add(format!(
            "src/main.rs: the section banners are not those of `enum Step`, with 0 before and 10 \
             after. {}",
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
    let on_page = first_words(&read("src/page.html")?, "const STEPS = [", "];");
    if on_page != words {
        found.add(format!("src/page.html: STEPS. {}", first_difference(&words, &on_page)));
    }
    found.verdict("step numbers and words differ; the ones in `enum Step` are right")
}

#[test]
fn the_page_knows_every_way_in_which_a_call_ends() -> Result<(), Untidy> {
    let source = code_only(&read("src/main.rs")?);
    let body = source.split("enum HangUp {").nth(1).and_then(|rest| rest.split('}').next());
    let ends: Vec<String> = body
        .unwrap_or_default()
        .split(',')
        .filter_map(|variant| variant.trim().lines().last())
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .collect();
    let on_page = first_words(&read("src/page.html")?, "const ENDS = {", "};");
    let mut found = Findings::default();
    if ends.is_empty() || on_page != ends {
        found.add(format!("src/page.html: ENDS. {}", first_difference(&ends, &on_page)));
    }
    found.verdict("the ends of a call differ; the ones in `enum HangUp` are right")
}

#[test]
fn settings_are_listed_alike_in_code_example_and_readme() -> Result<(), Untidy> {
    let in_code = settings_of_code(&read("src/main.rs")?);
    let in_example = settings_of_example(&read(".env.example")?);
    let in_readme = settings_of_readme(&read("README.md")?);
    let mut found = Findings::default();
    if in_code.is_empty() {
        found.add("src/main.rs: no `const SETTINGS: [&str; N] = [...];` found".to_owned());
    }
    if in_example != in_code {
        found.add(format!(".env.example: {}", first_difference(&in_code, &in_example)));
    }
    if in_readme != in_code {
        found.add(format!(
            "README.md, table under \"## Settings\": {}",
            first_difference(&in_code, &in_readme)
        ));
    }
    found.verdict("settings differ; the names and order of SETTINGS in src/main.rs are right")
}

#[test]
fn lines_fit_the_page() -> Result<(), Untidy> {
    let mut found = Findings::default();
    for path in rust_files("src")? {
        for (number, line) in numbered(&read(&path)?) {
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
fn the_story_runs_downwards() -> Result<(), Untidy> {
    let code = without_tests(&code_only(&read("src/main.rs")?));
    let functions = functions_of(&code);
    let mut judged = 0;
    let mut found = Findings::default();
    for function in &functions {
        let defined_often = functions.iter().filter(|f| f.name == function.name).count() > 1;
        if function.in_trait_impl || defined_often || COMMON_NAMES.contains(&function.name.as_str())
        {
            continue;
        }
        let Some(first_use) = first_use(&code, function) else {
            continue;
        };
        judged += 1;
        if first_use > function.all.start {
            found.add(format!(
                "src/main.rs:{}: `{}` stands above its first use in line {}: move it below",
                line_of(&code, function.all.start),
                function.name,
                line_of(&code, first_use)
            ));
        }
    }
    // Nine of ten. Few functions are allowed few exceptions.
    if found.0.len() * 10 <= judged {
        return Ok(());
    }
    found.verdict(&format!("of {judged} functions at most a tenth may stand above its first use"))
}

#[test]
fn functions_fit_a_screen() -> Result<(), Untidy> {
    let source = read("src/main.rs")?;
    let code = without_tests(&code_only(&source));
    let mut found = Findings::default();
    for function in functions_of(&code) {
        let first = line_of(&code, function.all.start);
        let last = line_of(&code, function.all.end - 1);
        let lines = source.lines().skip(first).take(last.saturating_sub(first + 1));
        let count =
            lines.map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//")).count();
        if count > FUNCTION_LINES_MAX {
            found.add(format!(
                "src/main.rs:{first}: `{}` has {count} lines of code: give a part of it a name",
                function.name
            ));
        }
    }
    found.verdict(&format!("functions of at most {FUNCTION_LINES_MAX} lines of code"))
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
    files.extend(rust_files("src")?);
    files.extend(rust_files("tests")?);
    files.extend(files_in("src/agent")?);
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
fn the_bridge_knows_the_demo_only_by_one_call() -> Result<(), Untidy> {
    let code = without_tests(&code_only(&read("src/main.rs")?));
    let lines: Vec<usize> = code
        .match_indices("demo::")
        .filter(|(at, _)| !code[..*at].ends_with(is_word))
        .map(|(at, _)| line_of(&code, at))
        .collect();
    let mut found = Findings::default();
    if lines.len() != 1 {
        found.add(format!(
            "src/main.rs: `demo::` occurs {} times (lines {lines:?}): once, in `main`, is right",
            lines.len()
        ));
    }
    found.verdict("the pretend world must stay out of the bridge")
}

#[test]
fn a_live_call_has_no_panic_path() -> Result<(), Untidy> {
    let code = without_tests(&code_only(&read("src/main.rs")?));
    let forbidden = [
        ".unwrap()",
        ".expect(",
        ".unwrap_err()",
        ".expect_err(",
        "panic!",
        "unreachable!",
        "unimplemented!",
        concat!("to", "do!"),
    ];
    let mut found = Findings::default();
    for (number, line) in numbered(&code) {
        for what in forbidden {
            if line.contains(what) {
                found.add(format!(
                    "src/main.rs:{number}: `{what}`: return a Failure, or use let-else"
                ));
            }
        }
    }
    found.verdict("nothing in src/main.rs may panic")
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

#[test]
fn no_async_runtime_is_named() -> Result<(), Untidy> {
    let code = code_only(&read("src/main.rs")?);
    let phrases =
        ["tokio", "async_std", "smol", "async_io", "async fn", "async move", "async {", ".await"];
    let mut found = Findings::default();
    for (number, line) in numbered(&code) {
        for phrase in phrases {
            if has_phrase(line, phrase) {
                found.add(format!("src/main.rs:{number}: `{phrase}`: block on a thread instead"));
            }
        }
    }
    for (number, line) in numbered(&read("Cargo.toml")?) {
        let name = line.split(['=', '.', ' ']).next().unwrap_or_default();
        if ["tokio", "async-std", "smol", "async-io", "futures"].contains(&name) {
            found.add(format!("Cargo.toml:{number}: `{name}` is an async runtime or brings one"));
        }
    }
    found.verdict("callbridge has blocking sockets and threads, and no async runtime")
}

/// The fuzz targets hold the whole bridge as a module, so its root is not the crate's.
#[test]
fn no_file_names_the_crates_root() -> Result<(), Untidy> {
    let mut found = Findings::default();
    let files = ["main", "check", "workflow", "diagram", "demo", "bench", "tests"];
    for file in files.map(|name| format!("src/{name}.rs")) {
        for (number, line) in numbered(&code_only(&read(&file)?)) {
            if has_phrase(line, "crate::") {
                found.add(format!("{file}:{number}: `crate::`: write `super::`"));
            }
        }
    }
    found.verdict("tests/fuzz would not compile")
}

#[test]
fn the_built_in_agent_is_complete() -> Result<(), Untidy> {
    let text = read("src/agent/agent.json")?;
    let agent: serde_json::Value = serde_json::from_str(&text)
        .map_err(|error| Untidy(format!("src/agent/agent.json is not JSON: {error}")))?;
    let mut found = Findings::default();
    let mut prompts_in_use = BTreeSet::new();
    for (stage_name, stage) in members(&agent, "stages") {
        let place = format!("src/agent/agent.json, stage {stage_name}");
        let Some(prompt) = stage.get("prompt").and_then(serde_json::Value::as_str) else {
            found.add(format!("{place}: no \"prompt\""));
            continue;
        };
        prompts_in_use.insert(prompt.to_owned());
        let Ok(body) = read(&format!("src/agent/{prompt}")) else {
            found.add(format!("{place}: there is no file src/agent/{prompt}"));
            continue;
        };
        let mut stage_bytes = body.len();
        for tool in stage.get("tools").and_then(serde_json::Value::as_array).into_iter().flatten() {
            let name = tool.as_str().unwrap_or_default();
            match agent.get("tools").and_then(|tools| tools.get(name)) {
                Some(definition) => stage_bytes += definition.to_string().len(),
                None => found.add(format!("{place}: there is no tool `{name}`")),
            }
        }
        if stage_bytes > STAGE_BYTES_MAX {
            found.add(format!(
                "{place}: prompt and tools are {stage_bytes} bytes: shorten them to \
                 {STAGE_BYTES_MAX}"
            ));
        }
    }
    for path in files_in("src/agent")? {
        let name = path.rsplit('/').next().unwrap_or_default();
        if !has_extension(name, "md") {
            if !["agent.json", "n8n-workflow.json"].contains(&name) {
                found.add(format!("{path}: neither a prompt, nor the agent, nor its workflow"));
            }
            continue;
        }
        if !prompts_in_use.contains(name) {
            found.add(format!("{path}: no stage of agent.json uses it"));
        }
        for (line, placeholder) in placeholders(&read(&path)?) {
            if !PLACEHOLDERS.contains(&placeholder.as_str()) {
                found.add(format!(
                    "{path}:{line}: {{{placeholder}}}: a prompt knows only {PLACEHOLDERS:?}"
                ));
            }
        }
    }
    found.verdict("the default agent has mistakes")
}

/// What a stranger imports must be safe and clear as it is. That its lines lead somewhere and that
/// `callbridge workflow` prints it is tested in `src/workflow/tests.rs`; that it works, with a
/// real n8n.
#[test]
fn the_built_in_workflow_can_be_handed_out() -> Result<(), Untidy> {
    const PATH: &str = "src/agent/n8n-workflow.json";
    let workflow: serde_json::Value = serde_json::from_str(&read(PATH)?)
        .map_err(|error| Untidy(format!("{PATH} is not JSON: {error}")))?;
    let mut found = Findings::default();
    if workflow.get("active") != Some(&serde_json::Value::Bool(false)) {
        found.add(format!("{PATH}: its owner switches it on, not the import"));
    }
    let nodes = workflow.get("nodes").and_then(serde_json::Value::as_array);
    let text = |node: &serde_json::Value, pointer: &str| {
        node.pointer(pointer).and_then(serde_json::Value::as_str).unwrap_or_default().to_owned()
    };
    let mut advice = String::new();
    for node in nodes.into_iter().flatten() {
        let place = format!("{PATH}, node {}", text(node, "/name"));
        let kind = text(node, "/type");
        if !kind.starts_with("n8n-nodes-base.") {
            found.add(format!("{place}: `{kind}` does not come with n8n"));
        }
        if node.get("credentials").is_some() {
            found.add(format!("{place}: names a credential, which nobody else has"));
        }
        if text(node, "/name").starts_with("Tool ") {
            found.add(format!("{place}: this word is kept for the agent's own tools"));
        }
        match kind.as_str() {
            "n8n-nodes-base.stickyNote" => advice.push_str(&text(node, "/parameters/content")),
            "n8n-nodes-base.webhook" => {
                if text(node, "/parameters/responseMode") != "responseNode" {
                    found.add(format!("{place}: must be answered by a Respond to Webhook node"));
                }
                if node.pointer("/parameters/options/rawBody").is_none() {
                    found.add(format!("{place}: without Raw Body no signature can be checked"));
                }
            }
            _ => {}
        }
        if text(node, "/name") == "Secret"
            && node.pointer("/parameters/assignments/assignments/0/value")
                != Some(&serde_json::Value::String(String::new()))
        {
            found.add(format!("{place}: holds somebody's secret"));
        }
    }
    for what in [
        "N8N_WEBHOOK_URL",
        "N8N_HMAC_SECRET",
        "CRM",
        "sheet",
        "calendar",
        "Route 1",
        "Route 2",
        "Route 3",
        "callbridge workflow",
    ] {
        if !advice.contains(what) {
            found.add(format!("{PATH}: no note says {what}"));
        }
    }
    found.verdict("the workflow is not ready to be imported by others")
}

// ============================================================================
// What the files say
// ============================================================================

/// The variants of `enum Step` with their numbers. Without `= n` they count from one. Number 0, if
/// there is one, is not a step of a call.
fn steps_of_enum(source: &str) -> Vec<(usize, String)> {
    let code = code_only(source);
    let Some(body) = code.split("enum Step {").nth(1).and_then(|rest| rest.split('}').next())
    else {
        return Vec::new();
    };
    let mut steps = Vec::new();
    for variant in body.split(',') {
        // Attributes stand on lines of their own; the variant is the last line.
        let Some(variant) = variant.trim().lines().last() else {
            continue;
        };
        let (name, number) = variant.split_once('=').unwrap_or((variant, ""));
        let number = number.trim().parse().unwrap_or(steps.len() + 1);
        if number > 0 {
            steps.push((number, name.trim().to_owned()));
        }
    }
    steps
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

/// The numbered banners: `// 4. Answer: ...` between two lines of `// ====`.
fn section_banners(source: &str) -> Vec<(usize, String)> {
    let lines: Vec<&str> = source.lines().collect();
    let is_rule = |line: &str| line.trim_end().starts_with("// ====");
    let mut banners = Vec::new();
    for window in lines.windows(3) {
        let [above, title, below] = window else {
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
            let word = rest.split(':').next().unwrap_or(rest).trim();
            banners.push((number, word.to_owned()));
        }
    }
    banners
}

/// The strings of `const SETTINGS: [&str; N] = [...];`.
fn settings_of_code(source: &str) -> Vec<String> {
    let Some(rest) = source.split("const SETTINGS:").nth(1) else {
        return Vec::new();
    };
    let list = rest.split("];").next().unwrap_or_default();
    let mut names = Vec::new();
    for line in list.lines() {
        let line = line.split("//").next().unwrap_or_default();
        names.extend(line.split('"').skip(1).step_by(2).map(str::to_owned));
    }
    names
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

/// The first cells of the table in section "Settings".
fn settings_of_readme(text: &str) -> Vec<String> {
    let section = text.split("\n## Settings\n").nth(1).unwrap_or_default();
    let section = section.split("\n## ").next().unwrap_or_default();
    let mut names = Vec::new();
    for line in section.lines() {
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

/// Everything in braces, with its line. A brace without a partner counts as a wrong placeholder.
fn placeholders(text: &str) -> Vec<(usize, String)> {
    let mut all = Vec::new();
    for (number, line) in numbered(text) {
        let mut rest = line;
        while let Some(at) = rest.find(['{', '}']) {
            let after = &rest[at + 1..];
            let end = after.find(['{', '}']).unwrap_or(after.len());
            all.push((number, after[..end].to_owned()));
            rest = after.get(end + 1..).unwrap_or_default();
        }
    }
    all
}

fn members<'a>(
    value: &'a serde_json::Value,
    key: &str,
) -> impl Iterator<Item = (&'a String, &'a serde_json::Value)> {
    value.get(key).and_then(serde_json::Value::as_object).into_iter().flatten()
}

// ============================================================================
// Reading Rust, just well enough
// ============================================================================

struct Function {
    name: String,
    /// From `fn` to behind the closing brace, in bytes.
    all: Range<usize>,
    /// Methods of a trait are called by others; their place says nothing.
    in_trait_impl: bool,
}

/// All functions with a body. Takes the output of [`code_only`].
fn functions_of(code: &str) -> Vec<Function> {
    let trait_impls = trait_impls(code);
    let mut functions = Vec::new();
    for (start, _) in code.match_indices("fn ") {
        if code[..start].ends_with(is_word) {
            continue;
        }
        let name: String = code[start + 3..].chars().take_while(|c| is_word(*c)).collect();
        let Some(body) = block_after(code, start) else {
            continue;
        };
        if name.is_empty() {
            continue;
        }
        functions.push(Function {
            name,
            all: start..body.end,
            in_trait_impl: trait_impls.iter().any(|range| range.contains(&start)),
        });
    }
    functions
}

/// The bodies of `impl Trait for Type`.
fn trait_impls(code: &str) -> Vec<Range<usize>> {
    let mut bodies = Vec::new();
    for (start, _) in code.match_indices("impl") {
        let begins_line = code[..start].rsplit('\n').next().unwrap_or_default().trim().is_empty();
        if !begins_line {
            continue;
        }
        let Some(body) = block_after(code, start) else {
            continue;
        };
        if code[start..body.start].contains(" for ") {
            bodies.push(body);
        }
    }
    bodies
}

/// The next `{...}` behind `start`, unless a `;` outside brackets comes first.
fn block_after(code: &str, start: usize) -> Option<Range<usize>> {
    let mut depth = 0_usize;
    let mut open = None;
    for (at, c) in code[start..].char_indices().map(|(at, c)| (start + at, c)) {
        match c {
            '(' | '[' => depth += 1,
            ')' | ']' => depth = depth.saturating_sub(1),
            ';' if depth == 0 && open.is_none() => return None,
            '{' => {
                if open.is_none() {
                    open = Some(at);
                    depth = 0;
                }
                depth += 1;
            }
            '}' => {
                depth = depth.saturating_sub(1);
                match open {
                    Some(open) if depth == 0 => return Some(open..at + 1),
                    _ => {}
                }
            }
            _ => {}
        }
    }
    None
}

/// Where a function is first called; if it never is, where its name is first mentioned.
fn first_use(code: &str, function: &Function) -> Option<usize> {
    let name = function.name.as_str();
    let mut mentioned = None;
    for (at, _) in code.match_indices(name) {
        let after = &code[at + name.len()..];
        let is_part = code[..at].ends_with(is_word) || after.starts_with(is_word);
        if is_part || function.all.contains(&at) || code[..at].ends_with("fn ") {
            continue;
        }
        if after.starts_with('(') || after.starts_with("::<") {
            return Some(at);
        }
        mentioned = mentioned.or(Some(at));
    }
    mentioned
}

/// The same text with comments and the insides of literals blanked out. Every byte that is not
/// blanked stays where it was, line by line.
fn code_only(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let previous_is_word = code.ends_with(is_word);
        let blank = match first {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => block_comment_length(rest),
            '"' => string_length(rest),
            '\'' => char_length(rest),
            'r' | 'b' | 'c' if !previous_is_word => prefixed_string_length(rest),
            _ => 0,
        };
        if blank == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        }
        let (literal, behind) = rest.split_at(blank);
        for byte in literal.bytes() {
            code.push(if byte == b'\n' { '\n' } else { ' ' });
        }
        rest = behind;
    }
    code
}

fn block_comment_length(text: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < text.len() {
        let here = text.as_bytes().get(at..).unwrap_or_default();
        if here.starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if here.starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    text.len()
}

/// The length of a string literal that begins with its quote.
fn string_length(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// `b"…"`, `c"…"`, `r"…"`, `r#"…"#`, `br#"…"#`: the whole length, or 0 if it is none of these.
fn prefixed_string_length(text: &str) -> usize {
    let marker = text.trim_start_matches(['b', 'c']);
    let raw = marker.strip_prefix('r');
    let after_letters = raw.unwrap_or(marker);
    let body = after_letters.trim_start_matches('#');
    let hashes = after_letters.len() - body.len();
    let prefix = text.len() - body.len();
    if !body.starts_with('"') || prefix - hashes > 2 || (raw.is_none() && hashes > 0) {
        return 0;
    }
    if raw.is_none() {
        return prefix + string_length(body);
    }
    let end = format!("\"{}", "#".repeat(hashes));
    body[1..].find(&end).map_or(text.len(), |at| prefix + 1 + at + end.len())
}

/// The length of a character literal, or 0 for a lifetime.
fn char_length(text: &str) -> usize {
    let mut inside = text[1..].chars();
    match inside.next() {
        Some('\\') => text[3..].find('\'').map_or(0, |at| at + 4),
        Some(c) if inside.next() == Some('\'') => c.len_utf8() + 2,
        _ => 0,
    }
}

/// The same code with everything under `#[cfg(test)]` blanked out.
fn without_tests(code: &str) -> String {
    let attribute = "#[cfg(test)]";
    let mut kept = code.to_owned();
    while let Some(start) = kept.find(attribute) {
        let behind = start + attribute.len();
        let end = match block_after(&kept, behind) {
            Some(block) => block.end,
            None => kept[behind..].find(';').map_or(kept.len(), |at| behind + at + 1),
        };
        let blank: String =
            kept[start..end].bytes().map(|b| if b == b'\n' { '\n' } else { ' ' }).collect();
        kept.replace_range(start..end, &blank);
    }
    kept
}

// ============================================================================
// Toolbox
// ============================================================================

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

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> Result<String, Untidy> {
    fs::read_to_string(root().join(path))
        .map_err(|error| Untidy(format!("cannot read {path}: {error}")))
}

/// The files directly in a directory, as paths from the root, in order of name.
fn files_in(directory: &str) -> Result<Vec<String>, Untidy> {
    let cannot = |error: std::io::Error| Untidy(format!("cannot list {directory}: {error}"));
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(root().join(directory)).map_err(cannot)? {
        let path = entry.map_err(cannot)?.path();
        if path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    let names = paths.iter().filter_map(|path| path.file_name());
    Ok(names.map(|name| format!("{directory}/{}", name.to_string_lossy())).collect())
}

fn rust_files(directory: &str) -> Result<Vec<String>, Untidy> {
    let mut files = files_in(directory)?;
    files.retain(|path| has_extension(path, "rs"));
    Ok(files)
}

fn has_extension(path: &str, extension: &str) -> bool {
    Path::new(path).extension().is_some_and(|found| found == extension)
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    (1..).zip(text.lines())
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
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

#[test]
fn code_only_blanks_what_is_not_code() {
    let source = concat!(
        "let a = \"fn x() { // no\\\" }\"; // fn y() {\n",
        "let b = r#\"a \" fn z() {\"#; let c = '{'; let d: &'static str = b\"{\"; /* { /* } */\n",
        "{ */ let e = '\\''; let f = bc; let g = 'ä'; fn h<'a>() {}\n",
    );
    let code = code_only(source);
    assert_eq!(code.lines().count(), 3, "lines are kept");
    assert_eq!(code.len(), source.len(), "places are kept");
    assert_eq!(code.matches('{').count(), 1, "{code}");
    assert_eq!(code.matches("fn ").count(), 1, "{code}");
    assert!(code.contains("&'static str") && code.contains("bc;") && code.contains("fn h<'a>"));
}
