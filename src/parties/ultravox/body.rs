//! What Ultravox is asked for: the body of `POST /api/calls`, and the part of it that a change of
//! stage sends again.
//!
//! Pure functions from the agent's files and the settings to JSON; nothing is sent here. The
//! shapes are those of docs.ultravox.ai/api-reference/calls/calls-post. What Ultravox does not get
//! it takes from its own defaults or, in a new stage, from the stage before: so a stage always
//! sends its prompt, its voice **and** its tools.

use std::time::Duration;

use serde_json::{Value, json};

use crate::setup::agent::{Agent, Stage, TOOL_WITHIN_MAX, Tool, ToolAction};
use crate::setup::settings::Config;
use crate::toolbox::socket::AGENT_MESSAGE_BYTES_MAX;
use crate::toolbox::sound::{SAMPLE_BYTES, SAMPLE_RATE_HZ};

/// Ultravox documents no longer `maxDuration` than this, and may refuse one.
pub(crate) const LONGEST_CALL: Duration = Duration::from_hours(1);
/// Ultravox may run this far ahead of the caller's ear. Safe only because we pass its
/// `playback_clear_buffer` on as `clear` at once.
const AGENT_AHEAD_MS: usize = 30_000;
/// Ultravox fails a tool whose result takes longer.
const ULTRAVOX_TOOL_MAX: Duration = Duration::from_secs(40);
/// Added to a tool's own time to get the time Ultravox allows: our answer must come first.
const TOOL_MARGIN: Duration = Duration::from_secs(5);
const _: () = assert!(
    TOOL_WITHIN_MAX.as_secs() + TOOL_MARGIN.as_secs() <= ULTRAVOX_TOOL_MAX.as_secs(),
    "a late tool result is thrown away by Ultravox"
);
const _: () =
    assert!(AGENT_MESSAGE_BYTES_MAX > AGENT_AHEAD_MS * SAMPLE_RATE_HZ / 1_000 * SAMPLE_BYTES);

/// How the agent begins.
pub(crate) enum Opening {
    /// Word for word, and not to be cut off by the caller's first "hello?".
    Greet(String),
    /// We have rung a person: they speak first. If they do not, these words are said.
    WeCalled(String),
    /// Not a beginning: an agent before has said hello, and this one is told what has happened.
    GoOn(&'static str),
}

/// What differs from call to call.
pub(crate) struct NewCall<'a> {
    /// What [`stage_body`] has made of the first stage.
    pub(crate) stage: Value,
    pub(crate) opening: &'a Opening,
    /// Then Ultravox says that time is up.
    pub(crate) lasts: Duration,
    pub(crate) sid: &'a str,
}

/// The body of `POST /api/calls`.
pub(crate) fn call_body(config: &Config, agent: &Agent, new: NewCall) -> Value {
    let phrases = &agent.phrases;
    let mut body = new.stage;
    let first_speaker = match new.opening {
        Opening::Greet(text) => json!({"agent": {"text": text, "uninterruptible": true}}),
        Opening::GoOn(prompt) => json!({"agent": {"prompt": prompt}}),
        Opening::WeCalled(text) => {
            let prompt = body["systemPrompt"].as_str().unwrap_or_default();
            body["systemPrompt"] = json!(format!(
                "{prompt}\n\nYou have called this person. When they answer, open with: {text}"
            ));
            json!({"user": {"fallback": {"delay": "2s", "text": text}}})
        }
    };
    let rest = json!({
        "model": config.ultravox_model,
        "firstSpeakerSettings": first_speaker,
        "medium": {"serverWebSocket": {
            "inputSampleRate": SAMPLE_RATE_HZ,
            "outputSampleRate": SAMPLE_RATE_HZ,
            "clientBufferSizeMs": AGENT_AHEAD_MS,
            // If this process dies, the agent does not wait for us at the owner's expense.
            "mediaIdleTimeout": "30s",
        }},
        "joinTimeout": "15s",
        "maxDuration": format!("{}s", new.lasts.as_secs()),
        "timeExceededMessage": phrases.time_is_up,
        // Without these, a caller who put the phone down beside the cradle is billed to the end.
        "inactivityMessages": [
            {"duration": "30s", "message": phrases.still_there},
            {
                "duration": "15s",
                "message": phrases.silence_goodbye,
                "endBehavior": "END_BEHAVIOR_HANG_UP_SOFT",
            },
        ],
        // The default of 90 ms lets a breath or a crackle cut the agent off.
        "vadSettings": {"minimumInterruptionDuration": "0.384s"},
        "metadata": {"callSid": new.sid},
    });
    if let (Value::Object(body), Value::Object(rest)) = (&mut body, rest) {
        body.extend(rest);
    }
    body
}

/// None: it is no longer as it is.
pub(super) fn no_longer_than_documented(body: &Value) -> Option<Value> {
    let lasts = body["maxDuration"].as_str()?.strip_suffix('s')?.parse().ok()?;
    let mut shorter = body.clone();
    shorter["maxDuration"] = json!(format!("{}s", LONGEST_CALL.as_secs()));
    (Duration::from_secs(lasts) > LONGEST_CALL).then_some(shorter)
}

/// Prompt, voice and tools of a stage. `prompt` has its placeholders filled in.
pub(crate) fn stage_body(config: &Config, agent: &Agent, stage: &Stage, prompt: &str) -> Value {
    json!({
        "systemPrompt": prompt,
        "voice": stage.voice,
        "languageHint": stage.language.as_ref().unwrap_or(&agent.language),
        "selectedTools": selected_tools(config, agent, stage),
    })
}

pub(crate) fn selected_tools(config: &Config, agent: &Agent, stage: &Stage) -> Vec<Value> {
    let tools = stage.tools.iter().filter_map(|name| Some((name, agent.tools.get(name)?)));
    tools.map(|(name, tool)| selected_tool(config, agent, name, tool)).collect()
}

fn selected_tool(config: &Config, agent: &Agent, name: &str, tool: &Tool) -> Value {
    if let ToolAction::Ultravox { tool: built_in, parameter_overrides } = &tool.action {
        let mut overrides = parameter_overrides.clone();
        if let Some(corpus) =
            config.ultravox_corpus_id.as_ref().filter(|_| built_in == "queryCorpus")
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
        if let Some((_, names)) = tool.choice(agent).filter(|(chosen, _)| *chosen == parameter) {
            schema["enum"] = names.keys().cloned().collect();
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
