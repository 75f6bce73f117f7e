//! What Ultravox would refuse about a request for a call, as far as its published schema tells.
//!
//! Unknown fields are refused here even so: they are misspelt ones. Knows only JSON, no
//! sockets. [`tools_objection`] is also asked about the tools of any agent file, by the
//! server's unit tests.

use serde_json::Value;

/// What Ultravox would refuse about a request for a call, as far as its
/// published schema tells. Unknown fields are refused here even so: they are
/// misspelt ones.
pub(super) fn objection(body: &Value) -> Option<String> {
    const KNOWN: [&str; 27] = [
        "systemPrompt",
        "model",
        "voice",
        "externalVoice",
        "voiceOverrides",
        "temperature",
        "languageHint",
        "initialMessages",
        "medium",
        "joinTimeout",
        "maxDuration",
        "timeExceededMessage",
        "inactivityMessages",
        "selectedTools",
        "recordingEnabled",
        "firstSpeakerSettings",
        "initialOutputMedium",
        "vadSettings",
        "metadata",
        "initialState",
        "experimentalSettings",
        "dataConnection",
        "callbacks",
        "retentionPolicy",
        "sharedSecrets",
        "transcriptOptional",
        "firstSpeaker",
    ];
    let Some(object) = body.as_object() else {
        return Some("the body is not a JSON object".to_owned());
    };
    if let Some(unknown) = object.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        return Some(format!("unknown field {unknown}"));
    }
    let vad = body["vadSettings"].as_object().into_iter().flatten();
    let vad = vad.filter(|(name, _)| *name != "frameActivationThreshold").map(|(_, value)| value);
    let messages = body["inactivityMessages"].as_array().into_iter().flatten();
    let mut durations: Vec<&Value> =
        messages.map(|message| &message["duration"]).chain(vad).collect();
    durations.extend(["joinTimeout", "maxDuration"].into_iter().filter_map(|name| body.get(name)));
    if let Some(wrong) = durations.into_iter().find(|value| !is_duration(value)) {
        return Some(format!("{wrong} is not a duration such as \"30s\""));
    }
    let metadata = body["metadata"].as_object().into_iter().flatten();
    if let Some((name, _)) = metadata.into_iter().find(|(_, value)| !value.is_string()) {
        return Some(format!("metadata {name} is not a string"));
    }
    if body["medium"]["serverWebSocket"]["inputSampleRate"].as_u64().is_none() {
        return Some("medium.serverWebSocket.inputSampleRate is missing".to_owned());
    }
    tools_objection(&body["selectedTools"])
}

/// The names by which the model knows the tools of a `selectedTools` list.
pub fn tool_names(selected: &Value) -> Vec<String> {
    let tools = selected.as_array().map(Vec::as_slice).unwrap_or_default();
    let names = tools.iter().map(|tool| {
        let name = ["nameOverride", "toolName"].iter().find_map(|key| tool[*key].as_str());
        name.or_else(|| tool["temporaryTool"]["modelToolName"].as_str()).unwrap_or("?").to_owned()
    });
    names.collect()
}

/// What Ultravox would refuse about a `selectedTools` list.
pub fn tools_objection(selected: &Value) -> Option<String> {
    let names = tool_names(selected);
    for (index, name) in names.iter().enumerate() {
        let legal = |letter: char| letter.is_ascii_alphanumeric() || letter == '_' || letter == '-';
        if name.is_empty() || name.len() > 64 || !name.chars().all(legal) {
            return Some(format!("{name:?} cannot be the name of a tool"));
        }
        if names.iter().take(index).any(|other| other == name) {
            return Some(format!("two tools are called {name}"));
        }
    }
    for tool in selected.as_array().into_iter().flatten() {
        let ways = ["toolId", "toolName", "temporaryTool"];
        if ways.iter().filter(|way| tool.get(**way).is_some()).count() != 1 {
            return Some(format!("not exactly one of {ways:?}: {tool}"));
        }
        let Some(temporary) = tool.get("temporaryTool") else {
            continue;
        };
        let timeout = temporary.get("timeout");
        if timeout.is_some_and(|timeout| !is_duration(timeout) || seconds(timeout) > 40.0) {
            return Some(format!("{timeout:?} is not a timeout up to 40 s"));
        }
        for parameter in temporary["dynamicParameters"].as_array().into_iter().flatten() {
            if parameter["location"] != "PARAMETER_LOCATION_BODY"
                || !parameter["schema"].is_object()
            {
                return Some(format!("wrong location or schema: {parameter}"));
            }
        }
    }
    None
}

fn is_duration(value: &Value) -> bool {
    let number = value.as_str().and_then(|text| text.strip_suffix('s'));
    number.is_some_and(|number| {
        number.chars().all(|letter| letter.is_ascii_digit() || letter == '.')
            && number.parse::<f64>().is_ok()
    })
}

fn seconds(duration: &Value) -> f64 {
    let number = duration.as_str().and_then(|text| text.strip_suffix('s'));
    number.and_then(|number| number.parse().ok()).unwrap_or(f64::INFINITY)
}
