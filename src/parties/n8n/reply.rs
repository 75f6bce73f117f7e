//! What n8n's replies mean, and what to do about those that mean nothing.
//!
//! Whoever builds a workflow sees n8n through these answers, so each mistake that n8n was seen to
//! report (2.8 and 2.40, see the table in the tests) becomes one sentence with its cure. Nothing
//! that looks like JSON or HTML is ever taken for a text to speak, whatever marks and blanks stand
//! before it. Whether a refused question may
//! have been acted on is told by [`Failure::certainly_not_done`]: who books a meeting has to know.

use serde_json::Value;

use crate::toolbox::failure::{Failure, Party};

/// What n8n answered. Even a 2xx may mean that the workflow failed.
pub(crate) struct N8nReply {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl N8nReply {
    pub(crate) fn redacted(&self) -> String {
        format!("{}\n\n{}", self.status, self.body)
    }

    /// Without what nobody sees before and after it, such as a byte-order mark.
    fn text(&self) -> &str {
        const UNSEEN: [char; 5] = ['\0', '\u{feff}', '\u{200b}', '\u{200e}', '\u{2060}'];
        self.body.trim_matches(|c: char| c.is_whitespace() || UNSEEN.contains(&c))
    }

    /// Also of a workflow that has made a text of its JSON before n8n did so again.
    pub(super) fn value(&self) -> serde_json::Result<Value> {
        match serde_json::from_str(self.text())? {
            Value::String(text) if looks_like_json(text.trim()) => serde_json::from_str(&text),
            value => Ok(value),
        }
    }
}

fn looks_like_json(text: &str) -> bool {
    text.starts_with(['{', '['])
}

/// Finds the text in a reply: an object, a list with one object (n8n's "All Entries"), or plain
/// text. Everything else is explained, with what to do about it.
pub(crate) fn understand_reply(reply: &N8nReply, field: &str) -> Result<String, Failure> {
    if let Some(refusal) = n8n_refusal(reply) {
        return Err(refusal);
    }
    let odd = |what: &str, advice: &'static str| {
        Err(Failure::new(Party::N8n, format!("{} with {what}", reply.status)).advise(advice))
    };
    let text = reply.text();
    if text.is_empty() {
        return odd(
            "an empty body",
            "the workflow failed, or took a branch without a Respond node: see n8n's Executions",
        );
    }
    let value = match reply.value() {
        Ok(Value::Array(items)) => items.into_iter().next().unwrap_or_default(),
        Ok(value) => value,
        // Never to be read out: the caller would hear brackets and quotes.
        Err(_) if looks_like_json(text.trim_start_matches(['"', ' '])) => {
            return odd(
                "broken JSON",
                "a quote or line break in a template: use JSON.stringify in the workflow",
            );
        }
        Err(_) if text.starts_with('<') => {
            return odd("HTML", "N8N_WEBHOOK_URL must be the webhook's production URL");
        }
        Err(_) if text.contains(|c: char| c.is_control() && !c.is_whitespace()) => {
            return odd("what is no text", "answer in UTF-8 and without compression");
        }
        Err(_) => Value::String(text.to_owned()),
    };
    let found = match &value {
        Value::String(text) => Some(text.as_str()),
        Value::Object(fields) => fields.get(field).and_then(Value::as_str),
        _ => None,
    };
    match found.map(str::trim) {
        Some("Workflow was started" | "Workflow got started") => immediately(reply),
        Some("") => odd(&format!("an empty {field}"), "give it a text in the workflow"),
        Some(text) => Ok(text.to_owned()),
        None if value["message"].as_str().is_some_and(|text| text.starts_with("Workflow ")) => {
            immediately(reply)
        }
        None if value.get("webhookUrl").is_some() => odd(
            "its own input",
            "the workflow echoes the Webhook node: answer with a Respond to Webhook node",
        ),
        None => odd(
            &format!("no text named {field}"),
            "answer {\"firstMessage\": …} to route 1 and {\"message\": …} to tools",
        ),
    }
}

const RESPOND_BY_NODE: &str =
    "set the Webhook node's Respond to \"Using 'Respond to Webhook' Node\"";

fn immediately(reply: &N8nReply) -> Result<String, Failure> {
    let what = format!("{} before the workflow ran", reply.status);
    Err(Failure::new(Party::N8n, what).advise(RESPOND_BY_NODE))
}

/// The refusals of n8n, told apart by what n8n 2.8 and 2.40 were seen to answer.
pub(crate) fn n8n_refusal(reply: &N8nReply) -> Option<Failure> {
    let has = |words: &str| reply.body.contains(words);
    let (advice, done) = match reply.status {
        200..=299 => return None,
        // A proxy redirects before the workflow has run, a Respond node after it.
        300..=399 => ("it redirects: set N8N_WEBHOOK_URL to the address it leads to", true),
        404 if has("Execute workflow") => {
            ("N8N_WEBHOOK_URL is the test URL: use the production URL, /webhook/…", false)
        }
        404 if has("must be active") => {
            ("activate (publish) the workflow, or correct the path in N8N_WEBHOOK_URL", false)
        }
        404 if has("Did you mean to make a") => {
            ("set the Webhook node's HTTP method to POST", false)
        }
        404 if has("Cannot POST") => {
            ("not a webhook's address, or n8n is still starting: check N8N_WEBHOOK_URL", false)
        }
        // Anything else may be a workflow's own 404.
        404 => ("there is no webhook, or the workflow says so: check N8N_WEBHOOK_URL", true),
        401 | 403 if has("IP is not allowed") => {
            ("add this server to the Webhook node's IP allowlist", false)
        }
        // These two are what the workflow of `callbridge workflow` answers.
        400 if has("unknown route") => {
            ("no branch for this route: callbridge workflow prints one for each tool", false)
        }
        401 if has("the signature is") => {
            ("N8N_HMAC_SECRET and the field of the workflow's node Secret must be the same", false)
        }
        401 | 403 => (
            "the Webhook node wants authentication: set N8N_AUTH_HEADER as in its Header Auth",
            false,
        ),
        422 if has("Failed to parse request body") => {
            ("n8n could not read the body: is the URL an n8n webhook?", false)
        }
        500 if has("Unused Respond to Webhook node") => (RESPOND_BY_NODE, true),
        500 if has("No Respond to Webhook node") => {
            ("let each branch of the workflow end in a Respond to Webhook node", true)
        }
        429 | 502 | 503 => ("n8n is busy or down", reply.status != 429),
        _ => ("the workflow failed: see n8n's Executions", true),
    };
    let hint: String = reply.body.chars().filter(|c| !c.is_control()).take(120).collect();
    let failure = Failure::new(Party::N8n, format!("{} {hint}", reply.status).trim().to_owned())
        .advise(advice);
    Some(if done { failure } else { failure.certainly_not_done() })
}

#[cfg(test)]
mod tests;
