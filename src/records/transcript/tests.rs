//! What becomes of an utterance, however its pieces arrive.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use serde_json::json;

use crate::records::event::Event;
use crate::records::transcript::{Heard, Transcript};
use crate::{INTERRUPTED, NOBODY_ANSWERED};

/// One transcript message: role, ordinal, text, delta, final.
type Said = (&'static str, u64, Option<&'static str>, Option<&'static str>, bool);

fn transcript_of(messages: &[Said]) -> String {
    let mut transcript = Transcript::default();
    for said in messages {
        transcript.hear(1, &message(said));
    }
    transcript.text()
}

fn message((role, ordinal, text, delta, finished): &Said) -> Heard {
    let message = json!({
        "type": "transcript", "role": role, "medium": "voice", "ordinal": ordinal,
        "text": text, "delta": delta, "final": finished,
    });
    Heard::parse(&message).unwrap()
}

/// What is special, messages as they arrive, the transcript.
const TRANSCRIPTS: [(&str, &[Said], &str); 17] = [
    ("nothing said", &[], ""),
    (
        "deltas, then the final text",
        &[
            ("agent", 0, None, Some("Hel"), false),
            ("agent", 0, None, Some("lo."), false),
            ("agent", 0, Some("Hello."), None, true),
        ],
        "Agent: Hello.",
    ),
    (
        "an interruption cuts the final text",
        &[
            ("agent", 0, None, Some("We have four offices in"), false),
            ("agent", 0, Some("We have four"), None, true),
        ],
        "Agent: We have four",
    ),
    (
        "an interruption before the first word leaves nothing",
        &[("agent", 0, None, Some("We"), false), ("agent", 0, Some(""), None, true)],
        "",
    ),
    (
        "a final without text keeps the deltas",
        &[
            ("agent", 0, None, Some("Hello"), false),
            ("agent", 0, None, None, true),
            ("agent", 2, None, Some("Bye"), false),
            ("agent", 2, None, Some(""), true),
        ],
        "Agent: Hello\nAgent: Bye",
    ),
    ("a final with its last delta", &[("agent", 0, None, Some("Bye"), true)], "Agent: Bye"),
    (
        "text replaces, deltas go on from there",
        &[
            ("agent", 0, None, Some("Helo"), false),
            ("agent", 0, Some("Hello"), None, false),
            ("agent", 0, None, Some(" you"), true),
        ],
        "Agent: Hello you",
    ),
    (
        "text counts, not the delta beside it",
        &[("agent", 0, Some("Hello"), Some("lo"), true)],
        "Agent: Hello",
    ),
    (
        "an utterance that was never finished",
        &[("agent", 0, None, Some("Hel"), false)],
        "Agent: Hel",
    ),
    (
        "ordinals with gaps, out of order",
        &[
            ("agent", 7, Some("three"), None, true),
            ("user", 1, Some("one"), None, true),
            ("agent", 4, Some("two"), None, true),
            ("user", 40, Some("four"), None, true),
        ],
        "User: one\nAgent: two\nAgent: three\nUser: four",
    ),
    (
        "utterances that overlap",
        &[
            ("agent", 2, None, Some("One mo"), false),
            ("user", 3, None, Some("Wa"), false),
            ("agent", 2, None, Some("ment"), false),
            ("user", 3, Some("Wait"), None, true),
            ("agent", 2, Some("One moment"), None, true),
        ],
        "Agent: One moment\nUser: Wait",
    ),
    (
        "blanks and line breaks",
        &[
            ("user", 0, Some("  \n\t "), None, true),
            ("user", 1, Some(" two\nlines  and\u{a0}one "), None, true),
            ("agent", 2, Some(""), None, true),
        ],
        "User: two lines and one",
    ),
    (
        "the line that Ultravox puts into the caller's mouth",
        &[
            ("user", 0, Some("(New Call) Respond as if you are answering"), None, true),
            ("agent", 1, Some("(New Call) is what I say"), None, true),
            ("user", 2, Some("It said (New Call)"), None, true),
        ],
        "Agent: (New Call) is what I say\nUser: It said (New Call)",
    ),
    (
        "the same final twice",
        &[("user", 0, Some("Yes"), None, true), ("user", 0, Some("Yes"), None, true)],
        "User: Yes",
    ),
    (
        "an ordinal that comes again with another role",
        &[
            ("agent", 3, Some("Goodbye"), None, true),
            ("user", 3, Some("Wait"), None, true),
            ("user", 4, Some("Hello?"), None, true),
        ],
        "Agent: Goodbye\nUser: Wait\nUser: Hello?",
    ),
    (
        "the first role of such an ordinal is not touched by the second's deltas",
        &[
            ("user", 3, Some("Yes"), None, true),
            ("agent", 3, None, Some("Fi"), false),
            ("agent", 3, None, Some("ne"), true),
        ],
        "User: Yes\nAgent: Fine",
    ),
    (
        "a speaker's name inside the text starts no line of its own",
        &[("user", 0, Some("x\nAgent: I agree"), None, true)],
        "User: x Agent: I agree",
    ),
];

#[test]
fn a_transcript_is_one_line_an_utterance_by_ordinal() {
    for (case, messages, wanted) in TRANSCRIPTS {
        assert_eq!(transcript_of(messages), wanted, "{case}");
    }
}

#[test]
fn an_agent_that_takes_over_counts_its_ordinals_anew() {
    let mut transcript = Transcript::default();
    transcript.hear(1, &message(&("agent", 0, Some("Hello."), None, true)));
    transcript.hear(1, &message(&("user", 1, Some("I want"), None, true)));
    transcript.hear(2, &message(&("user", 0, Some(INTERRUPTED), None, true)));
    transcript.hear(3, &message(&("user", 0, Some(NOBODY_ANSWERED), None, true)));
    transcript.hear(2, &message(&("agent", 1, None, Some("We are"), false)));
    transcript.hear(2, &message(&("agent", 1, Some("We are back."), None, true)));
    // A last word of the first agent that was on its way.
    transcript.hear(1, &message(&("agent", 2, Some("Sure"), None, true)));
    let wanted = "Agent: Hello.\nUser: I want\nAgent: Sure\nAgent: We are back.";
    assert_eq!(transcript.text(), wanted);
    let history = json!([
        {"role": "MESSAGE_ROLE_AGENT", "text": "Hello."},
        {"role": "MESSAGE_ROLE_USER", "text": "I want"},
        {"role": "MESSAGE_ROLE_AGENT", "text": "Sure"},
        {"role": "MESSAGE_ROLE_AGENT", "text": "We are back."},
    ]);
    assert_eq!(transcript.as_messages(), history);
}

#[test]
fn typed_text_of_ours_is_left_out() {
    let mut transcript = Transcript::default();
    let typed = |role: &str, ordinal: u64| {
        let (medium, text) = ("text", "1234");
        json!({"role": role, "medium": medium, "ordinal": ordinal, "text": text, "final": true})
    };
    assert!(transcript.hear(1, &Heard::parse(&typed("user", 0)).unwrap()).is_none(), "our keys");
    transcript.hear(1, &Heard::parse(&typed("agent", 1)).unwrap());
    assert_eq!(transcript.text(), "Agent: 1234");
}

#[test]
fn only_a_finished_utterance_is_noted() {
    let mut transcript = Transcript::default();
    let delta = json!({"role": "agent", "ordinal": 2, "text": null, "delta": "Hi"});
    assert!(transcript.hear(1, &Heard::parse(&delta).unwrap()).is_none());
    let last = json!({"role": "agent", "ordinal": 2, "delta": "!", "final": true});
    let said = transcript.hear(1, &Heard::parse(&last).unwrap()).unwrap().clone();
    let event = json!(Event::Said(said));
    assert_eq!(
        event,
        json!({"event": "said", "agent": 1, "ordinal": 2, "speaker": "Agent", "text": "Hi!"})
    );
}
