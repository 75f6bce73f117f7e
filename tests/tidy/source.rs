//! A file of Rust, as the guards see it: what syn makes of it, and the same once more as a flat row
//! of tokens with their places, which also shows what stands inside macros.
//!
//! *Test code* is what no ordinary build compiles: an item whose `cfg` needs `test` (or `fuzzing`),
//! and a file that only such a `mod` declares. Most guards leave it alone.

use std::collections::BTreeMap;

use proc_macro2::{Delimiter, LineColumn, Spacing, TokenStream, TokenTree};
use syn::punctuated::Punctuated;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{Attribute, ImplItem, Item, Meta, Token};

pub struct Source {
    /// From the root of the repository.
    pub path: String,
    pub text: String,
    pub syntax: syn::File,
    pub tokens: Vec<Flat>,
    /// Declared by a `mod` of test code, or below such a file.
    pub is_test_file: bool,
    test_code: Vec<(LineColumn, LineColumn)>,
}

/// A token outside of its tree. A delimiter is a token too, and so is `::`.
pub struct Flat {
    pub text: String,
    pub at: LineColumn,
}

pub struct Function {
    pub name: String,
    pub owner: Owner,
    /// Of the word `fn`, and of the closing brace.
    pub start: LineColumn,
    pub end: LineColumn,
}

#[derive(Clone, PartialEq)]
pub enum Owner {
    Nobody,
    Type(String),
    /// A trait, or a type on behalf of a trait.
    Trait,
}

/// Reads all files of a crate: what is test code is said in one file of another.
pub fn parse_all(texts: &BTreeMap<String, String>) -> Result<Vec<Source>, String> {
    let mut sources = Vec::new();
    let mut test_modules = Vec::new();
    for (path, text) in texts {
        let source = parse(path, text)?;
        test_modules.extend(source.declared_test_modules());
        sources.push(source);
    }
    for source in &mut sources {
        let module = source.module();
        source.is_test_file = test_modules.iter().any(|test| module.starts_with(test));
    }
    Ok(sources)
}

fn parse(path: &str, text: &str) -> Result<Source, String> {
    let complaint = |error: &dyn std::fmt::Display| format!("{path} is not Rust: {error}");
    let stream: TokenStream = text.parse().map_err(|error| complaint(&error))?;
    let syntax = syn::parse2(stream.clone()).map_err(|error| complaint(&error))?;
    let mut test_code = TestCode(Vec::new());
    test_code.visit_file(&syntax);
    Ok(Source {
        path: path.to_owned(),
        text: text.to_owned(),
        syntax,
        tokens: flat(stream),
        is_test_file: false,
        test_code: test_code.0,
    })
}

impl Source {
    /// The path of its module: none for `src/main.rs`, `["door", "limits"]` for
    /// `src/door/limits.rs`.
    pub fn module(&self) -> Vec<String> {
        module_of(&self.path)
    }

    pub fn is_test_code(&self, place: LineColumn) -> bool {
        self.is_test_file
            || self.test_code.iter().any(|(start, end)| (start..end).contains(&&place))
    }

    /// The demo and the benchmark play the outside world. All other files are the server and its
    /// verbs.
    pub fn is_server(&self) -> bool {
        let room = self.room();
        !self.is_test_file && room != "demo" && room != "bench"
    }

    /// The first name of its module, or `main`.
    pub fn room(&self) -> String {
        self.module().into_iter().next().unwrap_or_else(|| "main".to_owned())
    }

    /// Without those of test code.
    pub fn code(&self) -> impl Iterator<Item = &Flat> {
        self.tokens.iter().filter(|token| !self.is_test_code(token.at))
    }

    /// All functions with a body, without those of test code.
    pub fn functions(&self) -> Vec<Function> {
        let mut collector = Functions { owner: Owner::Nobody, found: Vec::new() };
        collector.visit_file(&self.syntax);
        collector.found.retain(|function| !self.is_test_code(function.start));
        collector.found
    }

    /// Everywhere, in modules inside the file as well, without test code.
    pub fn items(&self) -> Vec<&Item> {
        let mut collector = Items(Vec::new());
        collector.visit_file(&self.syntax);
        collector.0.retain(|item| !self.is_test_code(item.span().start()));
        collector.0
    }

    fn declared_test_modules(&self) -> Vec<Vec<String>> {
        let mut collector = Items(Vec::new());
        collector.visit_file(&self.syntax);
        let mut modules = Vec::new();
        for item in collector.0 {
            let Item::Mod(module) = item else { continue };
            if module.content.is_none() && self.is_test_code(item.span().start()) {
                let mut path = self.module();
                path.push(module.ident.to_string());
                modules.push(path);
            }
        }
        modules
    }
}

pub fn module_of(path: &str) -> Vec<String> {
    let inside = path.strip_prefix("src/").unwrap_or(path);
    let inside = inside.strip_suffix(".rs").unwrap_or(inside);
    let mut module: Vec<String> = inside.split('/').map(str::to_owned).collect();
    if inside == "main" || module.last().is_some_and(|name| name == "mod") {
        module.pop();
    }
    module
}

/// The tokens of a stream, those inside its groups too.
pub fn flat(stream: TokenStream) -> Vec<Flat> {
    let mut all = Vec::new();
    flatten(stream, &mut all);
    all
}

fn flatten(stream: TokenStream, all: &mut Vec<Flat>) {
    let mut half_open = false;
    for tree in stream {
        let at = tree.span().start();
        let was_half_open = std::mem::take(&mut half_open);
        match tree {
            TokenTree::Group(group) => {
                let (open, close) = match group.delimiter() {
                    Delimiter::Parenthesis => ("(", ")"),
                    Delimiter::Brace => ("{", "}"),
                    Delimiter::Bracket => ("[", "]"),
                    Delimiter::None => ("", ""),
                };
                all.push(Flat { text: open.to_owned(), at });
                let end = group.span_close().start();
                flatten(group.stream(), all);
                all.push(Flat { text: close.to_owned(), at: end });
            }
            TokenTree::Punct(punct) if punct.as_char() == ':' && was_half_open => {
                if let Some(colon) = all.last_mut() {
                    "::".clone_into(&mut colon.text);
                }
            }
            TokenTree::Punct(punct) => {
                half_open = punct.as_char() == ':' && punct.spacing() == Spacing::Joint;
                all.push(Flat { text: punct.as_char().to_string(), at });
            }
            other => all.push(Flat { text: other.to_string(), at }),
        }
    }
}

struct Items<'a>(Vec<&'a Item>);

impl<'a> Visit<'a> for Items<'a> {
    fn visit_item(&mut self, item: &'a Item) {
        self.0.push(item);
        visit::visit_item(self, item);
    }
}

struct Functions {
    owner: Owner,
    found: Vec<Function>,
}

impl Functions {
    fn add(&mut self, owner: Owner, signature: &syn::Signature, body: &syn::Block) {
        self.found.push(Function {
            name: signature.ident.to_string(),
            owner,
            start: signature.fn_token.span.start(),
            end: body.brace_token.span.close().start(),
        });
    }
}

impl<'a> Visit<'a> for Functions {
    fn visit_item_fn(&mut self, function: &'a syn::ItemFn) {
        self.add(Owner::Nobody, &function.sig, &function.block);
        visit::visit_item_fn(self, function);
    }

    fn visit_item_impl(&mut self, item: &'a syn::ItemImpl) {
        let owner = match (&item.trait_, &*item.self_ty) {
            (None, syn::Type::Path(path)) => path.path.segments.last(),
            _ => None,
        };
        let owner = owner.map_or(Owner::Trait, |name| Owner::Type(name.ident.to_string()));
        let outside = std::mem::replace(&mut self.owner, owner);
        visit::visit_item_impl(self, item);
        self.owner = outside;
    }

    fn visit_impl_item_fn(&mut self, function: &'a syn::ImplItemFn) {
        self.add(self.owner.clone(), &function.sig, &function.block);
        visit::visit_impl_item_fn(self, function);
    }

    fn visit_trait_item_fn(&mut self, function: &'a syn::TraitItemFn) {
        if let Some(body) = &function.default {
            self.add(Owner::Trait, &function.sig, body);
        }
        visit::visit_trait_item_fn(self, function);
    }
}

// ============================================================================
// What is test code
// ============================================================================

struct TestCode(Vec<(LineColumn, LineColumn)>);

impl TestCode {
    fn look_at(&mut self, attributes: &[Attribute], whole: &impl Spanned) {
        if attributes.iter().any(is_for_tests_only) {
            self.0.push((whole.span().start(), whole.span().end()));
        }
    }
}

impl<'a> Visit<'a> for TestCode {
    fn visit_item(&mut self, item: &'a Item) {
        self.look_at(attributes_of(item), item);
        visit::visit_item(self, item);
    }

    fn visit_impl_item(&mut self, item: &'a ImplItem) {
        let attributes: &[Attribute] = match item {
            ImplItem::Const(item) => &item.attrs,
            ImplItem::Fn(item) => &item.attrs,
            ImplItem::Type(item) => &item.attrs,
            ImplItem::Macro(item) => &item.attrs,
            _ => &[],
        };
        self.look_at(attributes, item);
        visit::visit_impl_item(self, item);
    }

    fn visit_local(&mut self, local: &'a syn::Local) {
        self.look_at(&local.attrs, local);
        visit::visit_local(self, local);
    }

    fn visit_expr_block(&mut self, block: &'a syn::ExprBlock) {
        self.look_at(&block.attrs, block);
        visit::visit_expr_block(self, block);
    }

    fn visit_arm(&mut self, arm: &'a syn::Arm) {
        self.look_at(&arm.attrs, arm);
        visit::visit_arm(self, arm);
    }

    fn visit_variant(&mut self, variant: &'a syn::Variant) {
        self.look_at(&variant.attrs, variant);
        visit::visit_variant(self, variant);
    }

    fn visit_field(&mut self, field: &'a syn::Field) {
        self.look_at(&field.attrs, field);
        visit::visit_field(self, field);
    }

    fn visit_field_value(&mut self, field: &'a syn::FieldValue) {
        self.look_at(&field.attrs, field);
        visit::visit_field_value(self, field);
    }
}

fn attributes_of(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

fn is_for_tests_only(attribute: &Attribute) -> bool {
    attribute.path().is_ident("cfg")
        && attribute.parse_args::<Meta>().is_ok_and(|meta| !possible(&meta).0)
}

/// Whether a `cfg` can be true in an ordinary build, and whether it can be false.
fn possible(meta: &Meta) -> (bool, bool) {
    let Meta::List(list) = meta else {
        let only_in_tests = meta.path().is_ident("test") || meta.path().is_ident("fuzzing");
        return (!only_in_tests, true);
    };
    let inner = list
        .parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated)
        .map(|metas| metas.iter().map(possible).collect::<Vec<_>>())
        .unwrap_or_default();
    let all_true = inner.iter().all(|(yes, _)| *yes);
    let any_true = inner.iter().any(|(yes, _)| *yes);
    let all_false = inner.iter().all(|(_, no)| *no);
    let any_false = inner.iter().any(|(_, no)| *no);
    if list.path.is_ident("all") {
        (all_true, any_false)
    } else if list.path.is_ident("any") {
        (any_true, all_false)
    } else {
        (all_false, all_true)
    }
}

#[test]
fn test_code_is_what_no_ordinary_build_compiles() -> Result<(), String> {
    let main = "
        #[cfg(test)] mod tests;
        #[cfg(any(test, fuzzing))] mod more_tests;
        #[cfg(any(test, feature = \"demo\"))] fn kept() {}
        #[cfg(not(test))] fn kept_too() { if cfg!(test) {} }
        #[cfg(all(test, feature = \"demo\"))] fn gone() {}
        mod inside { #[cfg(test)] mod tests { fn gone() {} } fn kept_three() {} }
        struct A { #[cfg(test)] gone: u8 }
        impl A { #[cfg(test)] fn gone() {} fn kept_four() { #[cfg(test)] let gone = 1; } }
        #[cfg(feature = \"demo\")] mod demo;
    ";
    let mut texts = BTreeMap::from([("src/main.rs".to_owned(), main.to_owned())]);
    for file in ["tests", "more_tests", "more_tests/deep", "demo"] {
        texts.insert(format!("src/{file}.rs"), String::new());
    }
    let sources = parse_all(&texts)?;
    let test_files: Vec<&str> =
        sources.iter().filter(|file| file.is_test_file).map(|file| file.path.as_str()).collect();
    assert_eq!(test_files, ["src/more_tests.rs", "src/more_tests/deep.rs", "src/tests.rs"]);
    let main = sources.iter().find(|file| file.path == "src/main.rs").ok_or("main.rs")?;
    let kept: Vec<String> = main.functions().into_iter().map(|function| function.name).collect();
    assert_eq!(kept, ["kept", "kept_too", "kept_three", "kept_four"]);
    assert!(main.code().all(|token| token.text != "gone"));
    assert!(main.code().any(|token| token.text == "::" || token.text == "kept_four"));
    Ok(())
}
