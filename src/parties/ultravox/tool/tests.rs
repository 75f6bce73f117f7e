//! What an invocation says, and what it lacks.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use serde_json::{Map, Value, json};

use crate::testing::{full_agent, invocation};

#[test]
fn what_a_booking_lacks_is_told_in_words() {
    let agent = full_agent();
    let ask = |parameters: &Value| {
        let tool = &agent.tools["schedule_meeting"];
        invocation("schedule_meeting", parameters).lacks(tool, &agent)
    };
    let whole = json!({
        "name": "Ada Lovelace", "email": "ada@example.com", "purpose": "a policy",
        "datetime": "2027-03-09T14:30", "location": "London",
    });
    assert_eq!(ask(&whole), None);

    let again = ". Ask the caller, then try again.";
    let one = |field: &str, value: Value| {
        let mut parameters = whole.clone();
        parameters[field] = value;
        ask(&parameters)
    };
    for blank in [Value::Null, json!(""), json!("  ")] {
        let wanted = format!("Not done yet: email is missing{again}");
        assert_eq!(one("email", blank).as_deref(), Some(wanted.as_str()));
    }
    let all = format!("Not done yet: name, email, purpose, datetime, location are missing{again}");
    assert_eq!(ask(&json!({})).as_deref(), Some(all.as_str()));

    for good in ["new york", " NEW YORK ", "New York"] {
        assert_eq!(one("location", json!(good)), None, "{good}");
    }
    let told = one("location", json!("Paris")).unwrap();
    assert_eq!(
        told,
        "Not done yet: \"Paris\" is not a location we have. Valid are: Chicago, London, \
         Manchester, New York. Ask the caller which one."
    );

    let hang_up = &agent.tools["hangUp"];
    assert_eq!(invocation("hangUp", &json!({})).lacks(hang_up, &agent), None);
    let summary = &agent.tools["move_to_call_summary"];
    let given = invocation("move_to_call_summary", &json!({"summary": "All is well."}));
    assert_eq!(given.lacks(summary, &agent), None);
}

#[test]
fn a_parameter_is_a_text_or_nothing() {
    let parameters = json!({
        "name": " Ada ", "blank": " \n", "none": null, "count": 3, "yes": true, "list": ["a"],
    });
    let found = invocation("x", &parameters);
    let cases = [
        ("name", Some("Ada")),
        ("blank", None),
        ("none", None),
        ("absent", None),
        ("count", Some("3")),
        ("yes", Some("true")),
        ("list", Some("[\"a\"]")),
    ];
    for (name, wanted) in cases {
        assert_eq!(found.text(name).as_deref(), wanted, "{name}");
    }
    for odd in [Value::Null, json!("a text"), json!([1])] {
        assert_eq!(invocation("x", &odd).parameters, Map::new(), "{odd}");
    }
}
