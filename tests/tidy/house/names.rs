//! What a file names: the paths of its `use` lists, those in its code, and those inside macros.

use proc_macro2::LineColumn;
use syn::UseTree;
use syn::visit::{self, Visit};

use crate::source::{Flat, Source, flat};

pub struct Named {
    pub line: usize,
    /// As it is written.
    path: Vec<String>,
    /// The same from the crate's root, if the path says that it is inside the crate: it begins
    /// with `crate`, `self` or `super`.
    pub inside_the_crate: Option<Vec<String>>,
}

impl Named {
    /// The first of these types in the path. `Step::Bridge` is a variant, and not the type.
    pub fn type_among(&self, types: &[&str]) -> Option<&str> {
        let is_type = |name: &str| name.starts_with(|c: char| c.is_uppercase());
        let mut before = "";
        for name in &self.path {
            if types.contains(&name.as_str()) && !is_type(before) {
                return Some(name);
            }
            before = name;
        }
        None
    }
}

/// Without test code.
pub fn names_in(file: &Source) -> Vec<Named> {
    let mut collector = Collector::of(file);
    collector.visit_file(&file.syntax);
    collector.named
}

/// Line and path of each `use path::*`, in test code too.
pub fn globs_in(file: &Source) -> Vec<(usize, String)> {
    let mut collector = Collector::of(file);
    collector.visit_file(&file.syntax);
    collector.globs
}

struct Collector<'a> {
    file: &'a Source,
    /// Where in the tree of modules we are.
    module: Vec<String>,
    named: Vec<Named>,
    globs: Vec<(usize, String)>,
}

impl<'a> Collector<'a> {
    fn of(file: &'a Source) -> Collector<'a> {
        Collector { file, module: file.module(), named: Vec::new(), globs: Vec::new() }
    }

    fn add(&mut self, path: Vec<String>, place: LineColumn) {
        if self.file.is_test_code(place) {
            return;
        }
        let inside_the_crate = self.path_from_root(&path);
        self.named.push(Named { line: place.line, path, inside_the_crate });
    }

    fn path_from_root(&self, path: &[String]) -> Option<Vec<String>> {
        let mut rest = path;
        let mut root = match path.first()?.as_str() {
            "crate" => Vec::new(),
            "self" | "super" => self.module.clone(),
            _ => return None,
        };
        while let [first, behind @ ..] = rest {
            match first.as_str() {
                "crate" | "self" => {}
                "super" => {
                    root.pop();
                }
                _ => break,
            }
            rest = behind;
        }
        root.extend(rest.iter().filter(|name| *name != "self").cloned());
        Some(root)
    }

    fn add_tree(&mut self, before: &[String], tree: &UseTree) {
        let with = |name: &syn::Ident| {
            let mut path = before.to_vec();
            path.push(name.to_string());
            path
        };
        match tree {
            UseTree::Path(path) => self.add_tree(&with(&path.ident), &path.tree),
            UseTree::Name(name) => self.add(with(&name.ident), name.ident.span().start()),
            UseTree::Rename(name) => self.add(with(&name.ident), name.ident.span().start()),
            UseTree::Glob(glob) => {
                let place = glob.star_token.spans[0].start();
                self.globs.push((place.line, before.join("::")));
                self.add(before.to_vec(), place);
            }
            UseTree::Group(group) => {
                for tree in &group.items {
                    self.add_tree(before, tree);
                }
            }
        }
    }

    /// `a::b::c` in a row of tokens.
    fn add_from_tokens(&mut self, tokens: &[Flat]) {
        let is_name = |text: &str| text.starts_with(|c: char| c.is_alphabetic() || c == '_');
        let mut at = 0;
        while let Some(first) = tokens.get(at) {
            at += 1;
            if !is_name(&first.text) {
                continue;
            }
            let mut path = vec![first.text.clone()];
            while let (Some(colons), Some(name)) = (tokens.get(at), tokens.get(at + 1))
                && colons.text == "::"
                && is_name(&name.text)
            {
                path.push(name.text.clone());
                at += 2;
            }
            // Alone, `self` and `crate` are no paths.
            if path.len() > 1 || !["self", "crate", "super"].contains(&first.text.as_str()) {
                self.add(path, first.at);
            }
        }
    }
}

impl<'a> Visit<'a> for Collector<'_> {
    fn visit_item_mod(&mut self, module: &'a syn::ItemMod) {
        self.module.push(module.ident.to_string());
        visit::visit_item_mod(self, module);
        self.module.pop();
    }

    fn visit_item_use(&mut self, item: &'a syn::ItemUse) {
        self.add_tree(&[], &item.tree);
    }

    fn visit_vis_restricted(&mut self, _: &'a syn::VisRestricted) {
        // `pub(super)` says who may look in, and uses nothing.
    }

    fn visit_path(&mut self, path: &'a syn::Path) {
        let names: Vec<String> =
            path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        // `self` alone is a value.
        if (names.len() > 1 || names != ["self"])
            && let Some(first) = path.segments.first()
        {
            self.add(names, first.ident.span().start());
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'a syn::Macro) {
        self.add_from_tokens(&flat(call.tokens.clone()));
        visit::visit_macro(self, call);
    }
}
