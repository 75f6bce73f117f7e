//! What is wrong is named all at once.

use crate::setup::stop::{Stop, needs_attention};

#[test]
fn what_needs_attention_is_counted_and_listed() {
    let text = |complaints: &[&str]| {
        let complaints: Vec<String> = complaints.iter().map(|text| (*text).to_owned()).collect();
        match needs_attention("setting", &complaints) {
            Stop::Misused(text) => text,
            Stop::Failed(text) => format!("as a failure: {text}"),
        }
    };
    assert_eq!(text(&["A  is x"]), "callbridge: 1 setting needs attention\n  A  is x");
    assert_eq!(
        text(&["A  is x", "B  is y"]),
        "callbridge: 2 settings need attention\n  A  is x\n  B  is y"
    );
}
