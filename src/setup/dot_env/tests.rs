//! What is wrong in a `.env`, by line, and what is right there.

use crate::setup::dot_env::understand;

#[test]
fn what_is_wrong_has_a_line_and_no_value() {
    let dollar = |name: &str, line| {
        format!(
            "{name}  in line {line} of .env has a $ outside single quotes: must be written as \
             {name}='…', or what follows the $ is lost"
        )
    };
    let not_a_setting =
        |line| format!(".env  line {line} is not NAME=value (with spaces: in quotes)");
    let cases = [
        ("A=hush$hush-2", vec![dollar("A", 1)]),
        ("# a $ in a comment\n\nA=1\nB=\"hush$2\"\n", vec![dollar("B", 4)]),
        ("export A=hush${B}", vec![dollar("A", 1)]),
        ("A='two\nlines'\r\nB=$C\r\n", vec![dollar("B", 3)]),
        ("A=\"two\n$lines\"\n", vec![not_a_setting(2)]),
        ("A=1\nhush hush\nB=2\n", vec![not_a_setting(2)]),
        ("A=hush hush", vec![not_a_setting(1)]),
        ("A=1\n\nB='open", vec![not_a_setting(3)]),
        ("hush!\nA=$B\n=\n", vec![not_a_setting(1), dollar("A", 2), not_a_setting(3)]),
        ("A='hush$hush'\nB=a\\$b\nC=\"a\\$b\"\nD=1 # $\nE=a#b", vec![]),
        ("", vec![]),
    ];
    for (text, wanted) in cases {
        assert_eq!(understand(text).1, wanted, "{text:?}");
    }
}

#[test]
fn values_are_as_they_are_written() {
    let text = "A=1\n  B = two # words\nC='th$ree'\nD=\"fo\\\"ur\"\nexport E=5\nA=last\nF=\n";
    let (values, complaints) = understand(text);
    assert!(complaints.is_empty(), "{complaints:?}");
    let cases =
        [("A", "last"), ("B", "two"), ("C", "th$ree"), ("D", "fo\"ur"), ("E", "5"), ("F", "")];
    for (name, wanted) in cases {
        assert_eq!(values.get(name).map(String::as_str), Some(wanted), "{name}");
    }
    assert_eq!(values.len(), cases.len());
}
