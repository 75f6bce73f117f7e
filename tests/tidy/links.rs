//! What README and docs point at is there: files beside them, and headings.

use std::collections::{BTreeMap, BTreeSet};

use crate::{Findings, Untidy, numbered, read, root, texts_under};

/// Links to the web are not followed: a test must not depend on the weather.
const ELSEWHERE: [&str; 4] = ["http://", "https://", "mailto:", "tel:"];

#[test]
fn relative_links_lead_somewhere() -> Result<(), Untidy> {
    let mut pages = texts_under("docs", "md")?;
    pages.insert("README.md".to_owned(), read("README.md")?);
    let mut found = Findings::default();
    for (page, text) in &pages {
        for (line, target) in links(text) {
            if let Some(complaint) = complaint(page, &target, &pages) {
                found.add(format!("{page}:{line}: `{target}`: {complaint}"));
            }
        }
    }
    found.verdict("links that lead nowhere")
}

fn complaint(page: &str, target: &str, pages: &BTreeMap<String, String>) -> Option<String> {
    if ELSEWHERE.iter().any(|scheme| target.starts_with(scheme)) {
        return None;
    }
    let (file, anchor) = target.split_once('#').map_or((target, None), |(f, a)| (f, Some(a)));
    let path = if file.is_empty() { page.to_owned() } else { resolved(page, file) };
    if !root().join(&path).exists() {
        return Some(format!("there is no {path}"));
    }
    let anchor = anchor?;
    let Some(text) = pages.get(&path) else {
        return Some(format!("only README.md and docs have headings, {path} has none"));
    };
    let is_there = anchors(text).contains(anchor);
    (!is_there).then(|| format!("{path} has no heading that GitHub calls #{anchor}"))
}

/// A path in a link begins beside the page; with `/` in front, at the root.
fn resolved(page: &str, file: &str) -> String {
    let mut parts: Vec<&str> = match file.strip_prefix('/') {
        Some(_) => Vec::new(),
        None => page.split('/').collect(),
    };
    parts.pop();
    for part in file.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            name => parts.push(name),
        }
    }
    parts.join("/")
}

/// The targets of `[text](target)`, `![text](target)`, `[name]: target`, `href` and `src`, with
/// their lines. What is code is no link.
fn links(markdown: &str) -> Vec<(usize, String)> {
    let mut links = Vec::new();
    for (number, line) in prose(markdown) {
        let mut add = |rest: &str, end: &[char]| {
            let target = rest.split(end).next().unwrap_or_default();
            // `(target "title")`, `(<target>)`
            let target = target.split_whitespace().next().unwrap_or_default();
            links.push((number, target.trim_matches(['<', '>']).to_owned()));
        };
        for (at, mark) in line.match_indices("](") {
            add(&line[at + mark.len()..], &[')']);
        }
        for attribute in ["href=\"", "src=\""] {
            for (at, mark) in line.match_indices(attribute) {
                add(&line[at + mark.len()..], &['"']);
            }
        }
        if line.starts_with('[')
            && let Some((_, target)) = line.split_once("]: ")
        {
            add(target, &[]);
        }
    }
    links
}

/// What may follow `#`: each heading as GitHub makes an anchor of it, and the ids given by hand.
fn anchors(markdown: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let mut inside_code = false;
    for line in markdown.lines() {
        inside_code ^= is_fence(line);
        let text = line.trim_start_matches('#');
        let depth = line.len() - text.len();
        if !inside_code && (1..=6).contains(&depth) && text.starts_with(' ') {
            let anchor = anchor_of(text.trim());
            let before = seen.entry(anchor.clone()).or_default();
            anchors.insert(if *before == 0 { anchor } else { format!("{anchor}-{before}") });
            *before += 1;
        }
        for (at, mark) in line.match_indices("id=\"") {
            let id = line[at + mark.len()..].split('"').next().unwrap_or_default();
            anchors.insert(id.to_owned());
        }
    }
    anchors
}

/// Small letters; spaces become hyphens; letters, digits, `-` and `_` stay; all else goes. Of a
/// link only its text counts.
fn anchor_of(heading: &str) -> String {
    let mut text = String::new();
    let mut rest = heading;
    while let Some((before, link)) = rest.split_once("](") {
        text.push_str(before);
        rest = link.split_once(')').map_or("", |(_, after)| after);
    }
    text.push_str(rest);
    let kept = |c: &char| c.is_alphanumeric() || "-_ ".contains(*c);
    text.to_lowercase().chars().filter(kept).map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// The lines outside of fences, with `code` blanked out.
fn prose(markdown: &str) -> Vec<(usize, String)> {
    let mut inside_code = false;
    let mut lines = Vec::new();
    for (number, line) in numbered(markdown) {
        let is_fence = is_fence(line);
        inside_code ^= is_fence;
        if inside_code || is_fence {
            continue;
        }
        // Every second piece between backticks is code. Its brackets are not ours.
        let pieces = line.split('`').enumerate();
        lines.push((number, pieces.map(|(n, text)| if n % 2 == 0 { text } else { "" }).collect()));
    }
    lines
}

fn is_fence(line: &str) -> bool {
    let line = line.trim_start();
    line.starts_with("```") || line.starts_with("~~~")
}

#[test]
fn links_and_anchors_are_read_as_github_does() {
    let page = concat!(
        "# The [`n8n`](docs/n8n.md) contract, v1.0\n",
        "see [a](#b), ![c](d/e.png \"title\"), `[no](link)` and [`x`](<y.md#z>)\n",
        "```\n# no heading\n[no](link)\n```\n",
        "## What it costs?\n## What it costs\n<a id=\"hand\"></a> <img src=\"shot.png\">\n",
        "[name]: ../name.md\n",
    );
    let targets: Vec<String> = links(page).into_iter().map(|(_, target)| target).collect();
    assert_eq!(targets, ["docs/n8n.md", "#b", "d/e.png", "y.md#z", "shot.png", "../name.md"]);
    let wanted = ["hand", "the-n8n-contract-v10", "what-it-costs", "what-it-costs-1"];
    assert_eq!(anchors(page).into_iter().collect::<Vec<_>>(), wanted);

    assert_eq!(resolved("docs/deep/a.md", "../b.md"), "docs/b.md");
    assert_eq!(resolved("docs/a.md", "/src/main.rs"), "src/main.rs");
    assert_eq!(resolved("README.md", "./docs/a.md"), "docs/a.md");

    let pages = BTreeMap::from([("README.md".to_owned(), page.to_owned())]);
    assert_eq!(complaint("README.md", "#what-it-costs-1", &pages), None);
    assert_eq!(complaint("README.md", "https://example.com/#x", &pages), None);
    assert!(complaint("README.md", "#elsewhere", &pages).is_some());
    assert!(complaint("README.md", "no/such/file.md", &pages).is_some());
}
