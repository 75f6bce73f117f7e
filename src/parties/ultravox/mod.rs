//! Ultravox: creates the agent's call.

pub(crate) mod leg;

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::setup::agent::{Stage, TOOL_WITHIN_MAX, Tool, ToolAction};
use crate::toolbox::failure::{Failure, Party, Secret, unreachable_party};
use crate::toolbox::log::log;
use crate::toolbox::metrics::{ULTRAVOX_CREATES, ULTRAVOX_TIME};
use crate::toolbox::socket::AGENT_MESSAGE_BYTES_MAX;
use crate::toolbox::sound::{SAMPLE_BYTES, SAMPLE_RATE_HZ};
use crate::toolbox::text::cut;
use crate::{AGENT_WITHIN, Bridge, Call};

/// Ultravox may run this far ahead of the caller's ear. Safe only because we pass its
/// `playback_clear_buffer` on as `clear` at once.
pub(crate) const AGENT_AHEAD_MS: usize = 30_000;
/// Ultravox fails a tool whose result takes longer.
pub(crate) const ULTRAVOX_TOOL_MAX: Duration = Duration::from_secs(40);
/// The longest `Retry-After` of a busy Ultravox that is waited for, once.
pub(crate) const BUSY_RETRY_WITHIN: Duration = Duration::from_secs(1);
/// Added to a tool's own time to get the time Ultravox allows: our answer must come first.
pub(crate) const TOOL_MARGIN: Duration = Duration::from_secs(5);

const _: () = assert!(
    TOOL_WITHIN_MAX.as_secs() + TOOL_MARGIN.as_secs() <= ULTRAVOX_TOOL_MAX.as_secs(),
    "a late tool result is thrown away by Ultravox"
);

/// An Ultravox REST reply. It echoes the prompt, so it is roomier.
pub(crate) const ULTRAVOX_REPLY_BYTES_MAX: u64 = 1_024 * 1_024;

const _: () =
    assert!(AGENT_MESSAGE_BYTES_MAX > AGENT_AHEAD_MS * SAMPLE_RATE_HZ / 1_000 * SAMPLE_BYTES);

/// What we keep of the 201: `{"callId":"7c21…","joinUrl":"wss://…", …}`.
pub(crate) struct AgentCall {
    pub(crate) id: String,
    /// Whoever holds it may join the call.
    pub(crate) join_url: Secret,
}

pub(crate) fn post_agent_call(
    call: &Call,
    query: &str,
    body: &Value,
    deadline: Instant,
) -> Result<AgentCall, Failure> {
    let body = body.to_string();
    let mut first_try = true;
    loop {
        let reply = ask_ultravox(call.bridge, query, &body, deadline)?;
        let status = reply.status;
        let pause = reply.retry_after.unwrap_or(BUSY_RETRY_WITHIN / 2);
        if matches!(status, 429 | 503) && first_try && pause <= BUSY_RETRY_WITHIN {
            first_try = false;
            let ms = pause.as_millis();
            log!(call, Warn, Agent, "Ultravox is busy ({status}); trying once more in {ms} ms");
            // The only thing that could be waited for is the time Ultravox itself has named.
            thread::sleep(pause);
            continue;
        }
        return if status == 201 || status == 200 {
            read_agent_call(&reply.text)
        } else {
            Err(ultravox_refusal(status, &call.bridge.config.hide_secrets(reply.text)))
        };
    }
}

pub(crate) struct UltravoxReply {
    pub(crate) status: u16,
    pub(crate) retry_after: Option<Duration>,
    pub(crate) text: String,
}

pub(crate) fn ask_ultravox(
    bridge: &Bridge,
    query: &str,
    body: &str,
    deadline: Instant,
) -> Result<UltravoxReply, Failure> {
    let began = Instant::now();
    let posted = post_to_ultravox(bridge, query, body, deadline);
    let outcome = match &posted {
        Ok(UltravoxReply { status: 200 | 201, .. }) => "created",
        Ok(UltravoxReply { status: 429 | 503, .. }) => "busy",
        Ok(_) => "refused",
        Err(_) if Instant::now() >= deadline => "late",
        Err(_) => "failed",
    };
    ULTRAVOX_CREATES.of(&[outcome]).add();
    ULTRAVOX_TIME.of(&[]).observe(began.elapsed());
    posted
}

pub(crate) fn post_to_ultravox(
    bridge: &Bridge,
    query: &str,
    body: &str,
    deadline: Instant,
) -> Result<UltravoxReply, Failure> {
    let config = &bridge.config;
    let unreachable = |error| unreachable_party(Party::Ultravox, error, AGENT_WITHIN);
    let answered = bridge
        .web
        .post(format!("{}/api/calls{query}", config.ultravox_api_url))
        .header("X-API-Key", config.ultravox_api_key.reveal())
        .header("Content-Type", "application/json")
        .config()
        .timeout_global(Some(deadline.saturating_duration_since(Instant::now())))
        .build()
        .send(body);
    let mut response = answered.map_err(unreachable)?;
    let retry_after = response.headers().get("Retry-After").and_then(|value| value.to_str().ok());
    let retry_after = retry_after.and_then(|text| text.trim().parse().ok());
    let text = response
        .body_mut()
        .with_config()
        .limit(ULTRAVOX_REPLY_BYTES_MAX)
        .lossy_utf8(true)
        .read_to_string()
        .map_err(unreachable)?;
    Ok(UltravoxReply {
        status: response.status().as_u16(),
        retry_after: retry_after.map(Duration::from_secs),
        text,
    })
}

/// The long texts of the body are cut short, and of the tools the first one stands for all.
pub(crate) fn agent_call_for_the_eye(body: &Value) -> String {
    format!("POST /api/calls\nX-API-Key: ***\n\n{:#}", in_short(body.clone()))
}

pub(crate) fn in_short(mut body: Value) -> Value {
    let prompt = body["systemPrompt"].as_str().unwrap_or_default();
    body["systemPrompt"] = json!(cut(prompt, 160));
    if let Some(tools) = body["selectedTools"].as_array_mut()
        && tools.len() > 1
    {
        let more = json!(format!("… and {} more", tools.len() - 1));
        tools.splice(1.., [more]);
    }
    body
}

/// Whoever holds the whole address may join the call.
pub(crate) fn host_only(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
    format!("{scheme}://{}/***", host.rsplit('@').next().unwrap_or_default())
}

pub(crate) fn read_agent_call(text: &str) -> Result<AgentCall, Failure> {
    let created: Value = serde_json::from_str(text).map_err(|error| {
        Failure::new(Party::Ultravox, "created the call, but its answer is not JSON")
            .caused_by(error)
    })?;
    match (created["callId"].as_str(), created["joinUrl"].as_str()) {
        (Some(id), Some(join_url)) => {
            Ok(AgentCall { id: id.to_owned(), join_url: Secret(join_url.to_owned()) })
        }
        _ => Err(Failure::new(Party::Ultravox, "created the call, but gave no callId or joinUrl")),
    }
}

pub(crate) fn ultravox_refusal(status: u16, text: &str) -> Failure {
    // The shape of an error's body is not documented, so its beginning is shown as it is.
    let hint: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
    let what = format!("could not create the agent's call: {status} {hint}");
    let failure = Failure::new(Party::Ultravox, what.trim_end()).advise(ultravox_advice(status));
    Failure { refused: matches!(status, 400 | 404 | 409 | 422), ..failure }
}

pub(crate) fn ultravox_advice(status: u16) -> &'static str {
    match status {
        401 | 403 => "check ULTRAVOX_API_KEY",
        402 => "the account has no minutes left: add billing at app.ultravox.ai",
        400 => "check ULTRAVOX_MODEL and the voices in the agent files",
        404 => "check ULTRAVOX_API_URL",
        429 => "too many calls at once for the account, or too fast",
        503 => "Ultravox has no room at the moment",
        _ => "try again later",
    }
}

pub(crate) fn selected_tools(bridge: &Bridge, stage: &Stage) -> Vec<Value> {
    let tools = stage.tools.iter().filter_map(|name| Some((name, bridge.agent.tools.get(name)?)));
    tools.map(|(name, tool)| selected_tool(bridge, name, tool)).collect()
}

pub(crate) fn selected_tool(bridge: &Bridge, name: &str, tool: &Tool) -> Value {
    if let ToolAction::Ultravox { tool: built_in, parameter_overrides } = &tool.action {
        let mut overrides = parameter_overrides.clone();
        if let Some(corpus) =
            bridge.config.ultravox_corpus_id.as_ref().filter(|_| built_in == "queryCorpus")
        {
            overrides.insert("corpus_id".into(), json!(corpus));
        }
        return json!({
            "toolName": built_in,
            "nameOverride": name,
            "descriptionOverride": tool.description,
            "parameterOverrides": overrides,
        });
    }
    let required = &tool.parameters.required;
    let parameters = tool.parameters.properties.iter().map(|(parameter, schema)| {
        let mut schema = schema.clone();
        if tool.calendar_parameter() == Some(parameter) {
            schema["enum"] = bridge.agent.calendars.keys().cloned().collect();
        }
        json!({
            "name": parameter,
            "location": "PARAMETER_LOCATION_BODY",
            "schema": schema,
            "required": required.contains(parameter),
        })
    });
    json!({"temporaryTool": {
        "modelToolName": name,
        "description": tool.description,
        "dynamicParameters": parameters.collect::<Vec<_>>(),
        // Longer than we ever take: a result that comes too late is thrown away, and the model
        // asks again.
        "timeout": format!("{}s", (tool.within + TOOL_MARGIN).as_secs()),
        "client": {},
    }})
}

#[cfg(test)]
mod tests;
