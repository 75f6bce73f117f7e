//! What n8n may answer. The replies were taken from a real n8n, not from its documentation.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use crate::parties::n8n::N8nReply;
use crate::parties::n8n::reply::{n8n_refusal, understand_reply};

/// What comes of a reply. The word for certainty matters to bookings: what was certainly not done
/// may be tried again.
#[derive(Clone, Copy)]
enum Understood {
    Says(&'static str),
    /// Advice begins so; the workflow may have done its work.
    PerhapsDone(&'static str),
    /// Advice begins so; the workflow has not run.
    NotDone(&'static str),
}

use Understood::{NotDone, PerhapsDone, Says};

const NOT_ACTIVE: &str = "{\"code\":404,\"message\":\"The requested webhook \\\"POST nope\\\" is \
    not registered.\",\"hint\":\"The workflow must be active for a production URL to run \
    successfully. You can activate the workflow using the toggle in the top-right of the editor. \
    Note that unlike test URL calls, production URL calls aren't shown on the canvas (only in the \
    executions list)\"}";

const TEST_URL: &str = "{\"code\":404,\"message\":\"The requested webhook \\\"call\\\" is not \
    registered.\",\"hint\":\"Click the 'Execute workflow' button on the canvas, then try again. \
    (In test mode, the webhook only works for one call after you click this button)\"}";

const OTHER_METHOD: &str = "{\"code\":404,\"message\":\"This webhook is not registered for GET \
    requests. Did you mean to make a POST request?\"}";

const CANNOT_POST: &str = "<!DOCTYPE html>\n<html lang=\"en\">\n<body>\n<pre>Cannot POST \
    /webhook</pre>\n</body>\n</html>\n";

const BAD_BODY: &str = "{\"code\":422,\"message\":\"Failed to parse request body\",\"hint\":\
    \"Expected double-quoted property name in JSON at position 13\"}";

const NO_ITEM: &str = "{\"code\":0,\"message\":\"No item to return was found\"}";
const UNUSED_NODE: &str =
    "{\"code\":0,\"message\":\"Unused Respond to Webhook node found in the workflow\"}";

const NO_NODE: &str =
    "{\"code\":0,\"message\":\"No Respond to Webhook node found in the workflow\"}";

const PROBLEM: &str = "{\"code\":0,\"message\":\"There was a problem executing the workflow\"}";
const TIMED_OUT: &str =
    "{\"code\":0,\"message\":\"The execution was cancelled because it timed out\"}";

const ECHO: &str = "{\"headers\":{},\"params\":{},\"query\":{},\"body\":{\"route\":\"1\"},\
    \"webhookUrl\":\"http://127.0.0.1:5678/webhook/call\",\"executionMode\":\"production\"}";

const ACTIVATE: &str = "activate (publish) the workflow";
const EXECUTIONS: &str = "the workflow failed: see n8n's Executions";
const EMPTY: &str = "the workflow failed, or took a branch without a Respond node";
const AUTHENTICATE: &str = "the Webhook node wants authentication: set N8N_AUTH_HEADER";
const RESPOND: &str = "set the Webhook node's Respond to";
const NO_TEXT: &str = "answer {\"firstMessage\": …} to route 1";
const SAME_SECRET: &str = "N8N_HMAC_SECRET and the field of the workflow's node Secret";
const NO_BRANCH: &str = "no branch for this route: callbridge workflow prints one";
const HELLO_JSON: &str = "{\"firstMessage\":\"Hello\"}";

/// What n8n 2.8.4 and 2.40.7 were seen to answer: case, status, body, what comes of it.
type Observed = (&'static str, u16, &'static str, Understood);

const OBSERVED: [Observed; 43] = [
    ("not active, or no such path", 404, NOT_ACTIVE, NotDone(ACTIVATE)),
    ("test URL", 404, TEST_URL, NotDone("N8N_WEBHOOK_URL is the test URL")),
    ("wrong method", 404, OTHER_METHOD, NotDone("set the Webhook node's HTTP method to POST")),
    ("not a webhook URL", 404, CANNOT_POST, NotDone("not a webhook's address, or n8n is still")),
    ("body is not JSON", 422, BAD_BODY, NotDone("n8n could not read the body")),
    ("body over the limit", 500, PROBLEM, PerhapsDone(EXECUTIONS)),
    ("Immediately", 200, "{\"message\":\"Workflow was started\"}", PerhapsDone(RESPOND)),
    ("as documented", 200, "{\"message\":\"Workflow got started\"}", PerhapsDone(RESPOND)),
    ("Immediately, Response Data (text/html)", 200, "{\"firstMessage\":\"x\"}", Says("x")),
    ("Immediately, No Response Body", 200, "", PerhapsDone(EMPTY)),
    ("Last Node, First Entry JSON", 200, HELLO_JSON, Says("Hello")),
    ("Last Node, All Entries, 1 item", 200, "[{\"firstMessage\":\"Hello\"}]", Says("Hello")),
    ("Last Node, All Entries, n items", 200, "[{\"n\":1},{\"n\":2}]", PerhapsDone(NO_TEXT)),
    ("Last Node, All Entries, no item", 200, "[]", PerhapsDone(NO_TEXT)),
    ("Last Node, First Entry JSON, no item", 500, NO_ITEM, PerhapsDone(EXECUTIONS)),
    ("a node throws", 500, "{\"message\":\"Error in workflow\"}", PerhapsDone(EXECUTIONS)),
    ("unused Respond node", 500, UNUSED_NODE, PerhapsDone(RESPOND)),
    ("no Respond node", 500, NO_NODE, PerhapsDone("let each branch of the workflow end in")),
    ("branch without a Respond node, or 2.8.4 and a node throws", 200, "", PerhapsDone(EMPTY)),
    ("Respond With: No Data", 200, "\r\n", PerhapsDone(EMPTY)),
    ("Respond With: Text", 200, "Hello caller", Says("Hello caller")),
    ("Respond With: Text, JSON in it", 200, HELLO_JSON, Says("Hello")),
    ("Respond With: All Incoming Items", 200, "[{\"firstMessage\":\"Hello\"}]", Says("Hello")),
    ("Timeout Workflow, Respond node", 500, TIMED_OUT, PerhapsDone(EXECUTIONS)),
    ("Timeout Workflow, Last Node", 500, PROBLEM, PerhapsDone(EXECUTIONS)),
    ("Header Auth", 403, "Authorization data is wrong!", NotDone(AUTHENTICATE)),
    ("Basic Auth missing", 401, "Authorization is required!", NotDone(AUTHENTICATE)),
    ("JWT Auth missing", 401, "No token provided", NotDone(AUTHENTICATE)),
    ("JWT Auth wrong", 403, "jwt malformed", NotDone(AUTHENTICATE)),
    ("no credential", 500, "No authentication data defined on node!", PerhapsDone(EXECUTIONS)),
    (
        "IP allowlist",
        403,
        "IP is not allowed to access the webhook!",
        NotDone("add this server to the Webhook node's IP allowlist"),
    ),
    ("the Webhook item itself", 200, ECHO, PerhapsDone("the workflow echoes the Webhook node")),
    ("workflow answers with an error", 500, "{\"error\":\"x\"}", PerhapsDone(EXECUTIONS)),
    ("a proxy without n8n behind it", 502, "<html>Bad Gateway</html>", PerhapsDone("n8n is busy")),
    ("a proxy that limits", 429, "", NotDone("n8n is busy or down")),
    ("HTML", 200, " <!DOCTYPE html><p>Sign in</p>", PerhapsDone("N8N_WEBHOOK_URL must be the")),
    ("an empty text", 200, "{\"firstMessage\":\" \"}", PerhapsDone("give it a text in the")),
    ("a number for a text", 200, "{\"firstMessage\":7}", PerhapsDone(NO_TEXT)),
    ("null", 200, "null", PerhapsDone(NO_TEXT)),
    ("another key, created", 201, "{\"greeting\":\"Hello\"}", PerhapsDone(NO_TEXT)),
    (
        "our workflow: signature",
        401,
        "{\"error\":\"the signature is wrong\"}",
        NotDone(SAME_SECRET),
    ),
    (
        "our workflow: route",
        400,
        "{\"error\":\"unknown route\",\"route\":\"9\"}",
        NotDone(NO_BRANCH),
    ),
    ("a workflow's own 400", 400, "{\"error\":\"no such day\"}", PerhapsDone(EXECUTIONS)),
];

fn reply(status: u16, body: &str) -> N8nReply {
    N8nReply { status, body: body.to_owned() }
}

#[test]
fn every_observed_reply_of_n8n_becomes_a_text_or_advice() {
    for (case, status, body, wanted) in OBSERVED {
        let found = understand_reply(&reply(status, body), "firstMessage");
        let (advice, not_done) = match (found, wanted) {
            (Ok(text), Says(wanted)) => {
                assert_eq!(text, wanted, "{case}");
                continue;
            }
            (Ok(text), PerhapsDone(_) | NotDone(_)) => {
                assert_eq!(text, "", "{case}: taken for a text");
                continue;
            }
            (Err(failure), Says(wanted)) => {
                assert_eq!(failure.to_string(), wanted, "{case}: refused");
                continue;
            }
            (Err(failure), PerhapsDone(advice)) => {
                assert!(!failure.certainly_not_done, "{case}: it may have been done");
                (advice, failure)
            }
            (Err(failure), NotDone(advice)) => {
                assert!(failure.certainly_not_done, "{case}: it was not done");
                (advice, failure)
            }
        };
        let line = not_done.to_string();
        assert!(line.starts_with(&format!("n8n: {status}")), "{case}: {line}");
        assert!(line.contains(&format!(" ({advice}")), "{case}: {line}");
        assert!(line.lines().count() == 1 && line.len() < 300, "{case}: {line}");
    }
}

/// Respond With: Redirect, and Respond With: JSON with a Response Code. The workflow has run, and
/// may have booked before it said so.
#[test]
fn a_status_that_the_workflow_has_set_is_a_refusal() {
    let cases = [
        (307, "", "it redirects: set N8N_WEBHOOK_URL to the address it leads to"),
        (422, "{\"error\":\"no such day\"}", "the workflow failed: see n8n's Executions"),
        (404, "{\"error\":\"no such day\"}", "there is no webhook, or the workflow says so"),
    ];
    for (status, body, advice) in cases {
        let failure = understand_reply(&reply(status, body), "message").unwrap_err();
        assert!(failure.to_string().starts_with(&format!("n8n: {status}")), "{failure}");
        assert!(failure.to_string().contains(advice), "{failure}");
        assert!(!failure.certainly_not_done, "the workflow has run: {failure}");
    }
}

#[test]
fn greetings_and_tool_answers_come_in_many_shapes() {
    let cases = [
        ("firstMessage", " {\"firstMessage\": \" Hello, Ada. \"} \n", "Hello, Ada."),
        ("firstMessage", "\"Hello\"", "Hello"),
        ("firstMessage", "[\"Hello\"]", "Hello"),
        ("firstMessage", "Hello {name}, \"you\"", "Hello {name}, \"you\""),
        ("firstMessage", "Grüß Gott 👋", "Grüß Gott 👋"),
        ("firstMessage", "{\"firstMessage\":\"Hello\",\"message\":\"Booked\"}", "Hello"),
        ("message", "{\"firstMessage\":\"Hello\",\"message\":\"Booked\"}", "Booked"),
        ("message", "[{\"message\":\"Booked\"},{\"message\":\"Twice\"}]", "Booked"),
        ("message", "{\"message\":\"Workflow is not what we do.\"}", "Workflow is not what we do."),
        ("message", "[not JSON but] words", ""),
        ("firstMessage", "\u{feff}{\"firstMessage\":\"Hello\"}", "Hello"),
        ("firstMessage", "\u{feff}\u{a0}\0 Hello \u{200b}", "Hello"),
        ("firstMessage", "\"{\\\"firstMessage\\\":\\\"Hello\\\"}\"", "Hello"),
    ];
    for (field, body, wanted) in cases {
        let found = understand_reply(&reply(200, body), field);
        assert_eq!(found.ok().unwrap_or_default(), wanted, "{body}");
    }
    for body in ["{\"message\":\"Workflow was started\"}", "Workflow was started"] {
        let failure = understand_reply(&reply(200, body), "message").unwrap_err().to_string();
        assert!(failure.contains(RESPOND), "a tool's answer it is not: {failure}");
    }
}

/// A workflow that knows some callers leaves the others to the agent, whose words it need not know.
#[test]
fn any_2xx_takes_a_transcript() {
    for (status, body) in [(200, ""), (200, "<p>"), (204, ""), (299, "x")] {
        assert!(n8n_refusal(&reply(status, body)).is_none(), "{status}");
    }
    for status in [300, 404, 500] {
        assert!(n8n_refusal(&reply(status, "")).is_some(), "{status}");
    }
}

#[test]
fn a_quoted_reply_stays_one_short_line() {
    let body = format!("line\r\nline\u{1b}[31m{}", "é".repeat(500));
    let line = n8n_refusal(&reply(500, &body)).unwrap().to_string();
    assert!(line.starts_with("n8n: 500 lineline[31mé"), "{line}");
    assert!(line.chars().count() < 200 && !line.contains(char::is_control), "{line}");
}
