//! Tables of cases for the small functions on text.

use std::time::Duration;

use crate::records::tap::hidden;
use crate::toolbox::text::{
    age, counted, cut, fill, is_e164, nearest, placeholders, shorten, shorten_number,
};

#[test]
fn a_phone_number_is_a_plus_and_7_to_15_digits() {
    for good in ["+1234567", "+4930123456", "+123456789012345"] {
        assert!(is_e164(good), "{good}");
    }
    let bad = ["", "+", "+123456", "+1234567890123456", "4930123456", "++4930123", "+49 30 123456"];
    for bad in bad.into_iter().chain(["+49-30-123", "+٤٩٣٠١٢٣٤", "+4930123456\n", "anonymous"])
    {
        assert!(!is_e164(bad), "{bad:?}");
    }
}

#[test]
fn placeholders_are_filled_and_other_braces_stay() {
    let value_of = |name: &str| match name {
        "name" => Some("Ada".to_owned()),
        "braces" => Some("{name}".to_owned()),
        "empty" => Some(String::new()),
        _ => None,
    };
    let cases = [
        ("", ""),
        ("no braces", "no braces"),
        ("{name}", "Ada"),
        ("Hello {name}, {name}!", "Hello Ada, Ada!"),
        ("{empty}{name}{empty}", "Ada"),
        ("{unknown} {name}", "{unknown} Ada"),
        ("{braces}", "{name}"),
        ("{{name}}", "{Ada}"),
        ("{ name } {}", "{ name } {}"),
        ("{\"json\": {name}}", "{\"json\": Ada}"),
        ("open { and {name", "open { and {name"),
        ("} closed {name}", "} closed Ada"),
        ("ü{name}👋{x", "üAda👋{x"),
    ];
    for (text, wanted) in cases {
        assert_eq!(fill(text, value_of), wanted, "{text}");
    }
}

#[test]
fn placeholders_are_found_with_their_lines() {
    let cases: [(&str, &[(&str, usize)]); 7] = [
        ("", &[]),
        ("{a}", &[("a", 1)]),
        ("{a} {b_2}\n\n{a}", &[("a", 1), ("b_2", 1), ("a", 3)]),
        ("{ a } {} {a-b} {ä} {a", &[]),
        ("{\"json\": {a}}", &[("a", 1)]),
        ("{{a}}", &[("a", 1)]),
        ("{a\n} }{", &[]),
    ];
    for (text, wanted) in cases {
        let found = placeholders(text);
        let found: Vec<(&str, usize)> =
            found.iter().map(|(name, line)| (name.as_str(), *line)).collect();
        assert_eq!(found, wanted, "{text:?}");
    }
}

#[test]
fn a_logged_number_can_be_recognised_but_not_called() {
    let cases = [
        ("+4930123456", "+49…3456"),
        ("+12025550123", "+12…0123"),
        ("+1234567", "a short number"),
        ("+", "a short number"),
        ("anonymous", "anonymous"),
        ("Restricted", "Restricted"),
        ("", "a caller without a number"),
        ("030123456", "a caller without a number"),
        ("client:alice", "a caller without a number"),
        ("sip:alice@example.com", "a caller without a number"),
        ("averyveryverylongword", "a caller without a number"),
        ("two\nlines", "a caller without a number"),
    ];
    for (number, wanted) in cases {
        assert_eq!(shorten_number(number), wanted, "{number:?}");
    }
    assert_eq!(shorten("CA9f3c0123456789"), "CA9f3c");
    assert_eq!((shorten("CA1"), shorten(""), shorten("CALL👋")), ("CA1", "", "CALL👋"));
}

#[test]
fn small_texts_are_as_they_should_be() {}

#[test]
fn what_is_cut_or_hidden_is_seen_to_be_so() {
    assert_eq!((cut("grüße", 3), cut("grüße", 5)), ("grü…".to_owned(), "grüße".to_owned()));
    let start = r#"{"start":{"customParameters":{"token":"s3cret"}}}"#;
    assert_eq!(hidden(start, "/start/customParameters/token"), start.replace("s3cret", "***"));
    for odd in ["[1,2]", "7", "null", "{\"media\":7}", "{\"media\":{\"payload\":{}}}", "{"] {
        assert!(hidden(odd, "/media/payload").len() < 40, "{odd}");
    }
}

#[test]
fn a_slip_finds_the_word_that_was_meant() {
    let known = ["check", "demo", "diagram", "--retry", "API_TOKEN"];
    let cases = [
        ("chek", Some("check")),
        ("cehck", Some("check")),
        ("check", Some("check")),
        ("dem", Some("demo")),
        ("digram", Some("diagram")),
        ("--rety", Some("--retry")),
        ("API_TOKE", Some("API_TOKEN")),
        ("serve", None),
        ("d", None),
        ("", None),
        ("größe", None),
    ];
    for (word, wanted) in cases {
        assert_eq!(nearest(word, known), wanted, "{word}");
    }
}

#[test]
fn figures_and_their_words_agree() {
    let cases = [
        (59, "less than a minute"),
        (60, "1 minute"),
        (3_599, "59 minutes"),
        (3_600, "1 hour"),
        (7_200, "2 hours"),
        (172_799, "47 hours"),
        (172_800, "2 days"),
    ];
    for (seconds, wanted) in cases {
        assert_eq!(age(Duration::from_secs(seconds)), wanted);
    }
    assert_eq!((counted(0, "line"), counted(1, "line")), ("0 lines".into(), "1 line".into()));
}
