//! What the operator sees: `/metrics`, read as strictly as Prometheus reads it, and the log as
//! JSON. The figures are compared with what the pretend world has seen.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::demo::{FIRST_MESSAGE, PATIENCE, Reply, Trouble, World, WorldBuilder, pcm_of, voice};
use crate::{CALLER, Call, Outcome, connect, wishes};

const TOKEN: &str = "mosaic-lantern-27-api";

fn builder() -> WorldBuilder {
    World::builder(env!("CARGO_BIN_EXE_callbridge")).setting("API_TOKEN", TOKEN)
}

// --- The text format ---------------------------------------------------------------------------

/// One answer, checked: kind of each family, and value of each series.
#[derive(Debug, Default)]
struct Page {
    kinds: BTreeMap<String, String>,
    series: BTreeMap<String, f64>,
}

#[track_caller]
fn scrape(world: &World) -> Result<Page, Trouble> {
    let authorization = format!("Bearer {TOKEN}");
    let answer = world.request("GET", "/metrics", &[("Authorization", &authorization)], &[])?;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.header("Content-Type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    Page::read(&answer.text()).map_err(|why| world.trouble(format!("{why}\n{}", answer.text())))
}

impl Page {
    /// The format's rules, and promtool's about names: HELP and TYPE before the samples and once
    /// each, families not mixed, nothing twice, counters `_total`, histograms cumulative.
    fn read(text: &str) -> Result<Page, String> {
        let mut page = Page::default();
        let (mut helped, mut family) = (BTreeSet::new(), String::new());
        if !text.ends_with('\n') {
            return Err("the last line has no end".into());
        }
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, words) = help.split_once(' ').ok_or("HELP without words")?;
                if words.is_empty() || !helped.insert(name.to_owned()) {
                    return Err(format!("HELP of {name} is empty or there twice"));
                }
                name.clone_into(&mut family);
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').ok_or("TYPE without a kind")?;
                if name != family || page.kinds.insert(name.into(), kind.into()).is_some() {
                    return Err(format!("TYPE of {name} stands in the wrong place"));
                }
                check_name(name, kind)?;
            } else {
                let kind = page.kinds.get(&family).ok_or("a sample before its TYPE")?;
                let (series, value) = read_sample(line, &family, kind)?;
                if page.series.insert(series, value).is_some() {
                    return Err(format!("twice: {line}"));
                }
            }
        }
        page.check_histograms()?;
        Ok(page)
    }

    fn check_histograms(&self) -> Result<(), String> {
        let kinds = self.kinds.iter().filter(|(_, kind)| *kind == "histogram");
        for name in kinds.map(|(name, _)| name) {
            let counts = self.series.keys().filter(|key| {
                key.split('{').next().is_some_and(|begin| begin == format!("{name}_count"))
            });
            for count in counts {
                let labels = count.trim_start_matches(&format!("{name}_count"));
                let inside = labels.trim_start_matches('{').trim_end_matches('}');
                let begin = if inside.is_empty() { String::new() } else { format!("{inside},") };
                let begin = format!("{name}_bucket{{{begin}le=\"");
                let mut buckets: Vec<(f64, f64)> = Vec::new();
                for (key, value) in &self.series {
                    if let Some(bound) = key.strip_prefix(&begin) {
                        let bound = bound.trim_end_matches("\"}").replace("+Inf", "inf");
                        buckets.push((bound.parse().map_err(|_| key.clone())?, *value));
                    }
                }
                buckets.sort_by(|one, other| one.0.total_cmp(&other.0));
                let cumulative = buckets.is_sorted_by(|one, next| one.1 <= next.1);
                let last = buckets.last().copied().unwrap_or_default();
                if !cumulative || !last.0.is_infinite() || last.1.to_bits() != self.bits(count) {
                    return Err(format!("{count}: {buckets:?}"));
                }
                if !self.series.contains_key(&format!("{name}_sum{labels}")) {
                    return Err(format!("{count} has no sum"));
                }
            }
        }
        Ok(())
    }

    fn bits(&self, series: &str) -> u64 {
        self.series.get(series).copied().unwrap_or_default().to_bits()
    }

    /// As a whole number; what is not there is -1.
    #[expect(clippy::cast_possible_truncation, reason = "counts of a short test")]
    fn count(&self, series: &str) -> i64 {
        let series = if series.contains("callbridge_") {
            series.into()
        } else {
            format!("callbridge_{series}")
        };
        self.series.get(&series).map_or(-1, |value| *value as i64)
    }

    /// Every counter and every bucket has grown or stayed since `before`.
    fn has_not_shrunk_since(&self, before: &Page) -> Result<(), String> {
        for (series, value) in &before.series {
            let name = series.split('{').next().unwrap_or_default();
            let is_gauge = self.kinds.get(name).is_some_and(|kind| kind == "gauge");
            let now = self.series.get(series).ok_or(format!("{series} is gone"))?;
            if !is_gauge && now < value {
                return Err(format!("{series} was {value} and is {now}"));
            }
        }
        Ok(())
    }
}

fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

fn check_name(name: &str, kind: &str) -> Result<(), String> {
    let ends = |end: &str| name.ends_with(end);
    let right = match kind {
        "counter" => ends("_total"),
        "histogram" => ends("_seconds"),
        "gauge" => !ends("_total") && !ends("_count") && !ends("_sum") && !ends("_bucket"),
        _ => false,
    };
    let ours = name.starts_with("callbridge_") || name == "process_start_time_seconds";
    if right && ours && is_name(name) { Ok(()) } else { Err(format!("{kind} {name}")) }
}

/// The series, as it stands there, and its value.
fn read_sample(line: &str, family: &str, kind: &str) -> Result<(String, f64), String> {
    let wrong = || format!("not a sample of the {kind} {family}: {line}");
    let (series, value) = line.rsplit_once(' ').ok_or_else(wrong)?;
    let value: f64 = value.parse().map_err(|_| wrong())?;
    let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
    let ends: &[&str] = if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
    let belongs = ends.iter().any(|end| name == format!("{family}{end}"));
    let whole = kind != "counter" && !name.ends_with("_bucket") || value.fract() == 0.0;
    if !belongs || !whole || !value.is_finite() || value < 0.0 {
        return Err(wrong());
    }
    let mut rest = labels.strip_suffix('}').ok_or_else(wrong)?;
    let mut names = BTreeSet::new();
    while !rest.is_empty() {
        let (label, after) = rest.split_once("=\"").ok_or_else(wrong)?;
        let reserved = label == "le" && !name.ends_with("_bucket") || label.starts_with("__");
        if !is_name(label) || reserved || !names.insert(label) {
            return Err(wrong());
        }
        let mut escaped = false;
        let end = after.find(|c| {
            let is_end = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            is_end
        });
        let behind = &after[end.ok_or_else(wrong)? + 1..];
        rest = match behind.strip_prefix(',') {
            Some(next) if !next.is_empty() => next,
            None if behind.is_empty() => behind,
            _ => return Err(wrong()),
        };
    }
    Ok((series.to_owned(), value))
}

// --- What is counted ---------------------------------------------------------------------------

/// Scrapes until this series has come to its value: what a call leaves behind is counted a moment
/// after the world has seen its end.
#[track_caller]
fn scrape_until(world: &World, series: &str, value: i64) -> Result<Page, Trouble> {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let page = scrape(world)?;
        if page.count(series) == value {
            return Ok(page);
        }
        if std::time::Instant::now() > deadline {
            return Err(world.trouble(format!("{series} is {}, not {value}", page.count(series))));
        }
        std::thread::yield_now();
    }
}

#[track_caller]
fn assert_counts(page: &Page, wanted: &[(&str, i64)]) {
    for (series, value) in wanted {
        assert_eq!(page.count(series), *value, "{series}");
    }
}

#[test]
fn only_the_owner_reads_the_metrics() -> Outcome {
    let world = builder().without("API_TOKEN").start()?;
    assert_eq!(world.get("/metrics")?.status, 404);
    assert_eq!(world.get("/metrics")?.body, world.get("/no-such-thing")?.body);
    let world = builder().start()?;
    assert_eq!(world.get("/metrics")?.status, 401);
    let wrong = [("Authorization", "Bearer mosaic-lantern-27-apx")];
    assert_eq!(world.request("GET", "/metrics", &wrong, &[])?.status, 401);
    let right = [("Authorization", format!("Bearer {TOKEN}"))];
    let right = right.each_ref().map(|(name, value)| (*name, value.as_str()));
    assert_eq!(world.request("POST", "/metrics", &right, b"{}")?.status, 404);
    assert_eq!(scrape(&world)?.count("refusals_total{reason=\"api_token\"}"), 2);
    Ok(())
}

/// What Prometheus holds is no key to the conversations.
#[test]
fn the_token_for_figures_opens_nothing_else() -> Outcome {
    const FIGURES: &str = "harbour-quartz-58-figures";
    let show = |token: &str| format!("Bearer {token}");
    for owner in [None, Some(TOKEN)] {
        let world = builder().setting("METRICS_TOKEN", FIGURES);
        let world = if owner.is_none() { world.without("API_TOKEN") } else { world }.start()?;
        let look = |method: &str, path: &str, token: &str| {
            world.request(method, path, &[("Authorization", &show(token))], b"{}")
        };
        let answer = look("GET", "/metrics", FIGURES)?;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.header("Cache-Control"), Some("no-store"));
        assert_eq!(look("GET", "/metrics", "harbour-quartz-58-figurez")?.status, 401);
        assert_eq!(world.get("/metrics")?.status, 401);
        assert_eq!(look("GET", "/metrics", TOKEN)?.status, if owner.is_none() { 401 } else { 200 });
        for (method, path) in
            [("GET", "/"), ("GET", "/calls"), ("POST", "/outgoing-call"), ("POST", "/browser-call")]
        {
            let refused = if owner.is_none() { 404 } else { 401 };
            assert_eq!(look(method, path, FIGURES)?.status, refused, "{method} {path}");
        }
        assert_eq!(world.ultravox.requests(), 0);
    }
    Ok(())
}

#[test]
fn every_series_is_there_from_the_start() -> Outcome {
    let world = builder().setting("MAX_CALLS", 7).start()?;
    let page = scrape(&world)?;
    for word in [
        "NoAgent",
        "NeverStreamed",
        "CallerLeft",
        "CallerLost",
        "AgentHungUp",
        "AgentLeft",
        "AgentLost",
        "TooLong",
        "Transferred",
        "Machine",
        "Refused",
        "ShuttingDown",
        "ProcessDied",
    ] {
        assert_eq!(page.count(&format!("calls_total{{ended_by=\"{word}\"}}")), 0, "{word}");
    }
    assert_counts(
        &page,
        &[
            ("calls_in_progress", 0),
            ("calls_max", 7),
            ("refusals_total{reason=\"signature\"}", 0),
            ("answer_seconds_count", 0),
            ("dead_air_seconds_count", 0),
            ("relay_delay_seconds_bucket{direction=\"to_agent\",le=\"0.00001\"}", 0),
            ("relay_delay_seconds_bucket{direction=\"to_caller\",le=\"0.1\"}", 0),
            ("tool_invocations_total{tool=\"schedule_meeting\",outcome=\"uncertain\"}", 0),
            ("n8n_requests_total{route=\"3\",outcome=\"late\"}", 0),
            ("resumes_total{after=\"process\"}", 0),
            ("outbox_transcripts", 0),
            ("outbox_oldest_seconds", 0),
            ("log_lines_total{level=\"error\"}", 0),
            ("log_lines_dropped_total", 0),
            (&format!("callbridge_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION")), 1),
        ],
    );
    let began = page.series["process_start_time_seconds"];
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs_f64();
    assert!(began <= now && now - began < 600.0, "{began} {now}");
    Ok(())
}

/// A call with words from both sides, a booking that works and one that does not.
fn a_full_call(world: &World) -> Result<Call, Trouble> {
    let call = connect(world)?;
    call.agent.say(FIRST_MESSAGE, &pcm_of(&voice(1, 200)))?;
    call.phone.wait_audio(1_600)?;
    call.phone.speak(&voice(2, 200))?;
    call.agent.wait_caller_audio(3_200)?;
    call.agent.user_said("A meeting, please.")?;
    call.enter_main_stage()?;
    call.act("schedule_meeting", &wishes("London"))?;
    world.n8n.reply_next("3", Reply::text(500, None, "no"));
    call.act("schedule_meeting", &wishes("Chicago"))?;
    call.act("schedule_meeting", &wishes("Atlantis"))?;
    call.act("no_such_tool", &json!({}))?;
    Ok(call)
}

#[test]
fn the_figures_are_those_of_the_calls() -> Outcome {
    let world = builder().start()?;
    let empty = scrape(&world)?;
    let call = a_full_call(&world)?;
    let during = scrape(&world)?;
    during.has_not_shrunk_since(&empty)?;
    assert_counts(
        &during,
        &[
            ("calls_in_progress", 1),
            ("answer_seconds_count", 1),
            ("dead_air_seconds_count", 1),
            ("relay_delay_seconds_count{direction=\"to_agent\"}", 10),
            ("ultravox_creates_total{outcome=\"created\"}", 1),
            ("ultravox_create_seconds_count", 1),
            ("n8n_requests_total{route=\"1\",outcome=\"answered\"}", 1),
            ("n8n_requests_total{route=\"3\",outcome=\"answered\"}", 1),
            ("n8n_requests_total{route=\"3\",outcome=\"refused\"}", 1),
            ("n8n_seconds_count{route=\"3\"}", 2),
            ("tool_invocations_total{tool=\"move_to_main_convo\",outcome=\"done\"}", 1),
            ("tool_invocations_total{tool=\"schedule_meeting\",outcome=\"done\"}", 1),
            ("tool_invocations_total{tool=\"schedule_meeting\",outcome=\"uncertain\"}", 1),
            ("tool_invocations_total{tool=\"schedule_meeting\",outcome=\"incomplete\"}", 1),
            ("tool_invocations_total{tool=\"unknown\",outcome=\"no such tool\"}", 1),
            ("tool_seconds_count{tool=\"schedule_meeting\"}", 2),
        ],
    );
    assert!(during.count("relay_delay_seconds_count{direction=\"to_caller\"}") > 0);

    // The same caller, while things go wrong around them.
    call.agent.drop_line();
    let next = world.ultravox.next_call(PATIENCE)?;
    scrape_until(&world, "resumes_total{after=\"agent_line\"}", 1)?;
    call.phone.drop_line();
    let ringing = call.ringing.next(&world, &[])?;
    let phone = ringing.open_stream(&world)?;
    next.say("There you are.", &pcm_of(&voice(3, 100)))?;
    phone.wait_audio(800)?;
    world.n8n.reply_next("2", Reply::Reset);
    phone.hang_up()?;
    let waiting = scrape_until(&world, "n8n_requests_total{route=\"2\",outcome=\"failed\"}", 1)?;
    waiting.has_not_shrunk_since(&during)?;
    let after = scrape_until(&world, "outbox_transcripts", 0)?;
    after.has_not_shrunk_since(&waiting)?;
    assert_counts(
        &after,
        &[
            ("calls_in_progress", 0),
            ("calls_total{ended_by=\"CallerLeft\"}", 1),
            ("broken_lines_total{leg=\"agent\"}", 1),
            ("resumes_total{after=\"agent_line\"}", 1),
            ("resumes_total{after=\"stream\"}", 1),
            ("resumes_total{after=\"process\"}", 0),
            ("dead_air_seconds_count", 1),
            ("answer_seconds_count", 1),
            ("n8n_requests_total{route=\"2\",outcome=\"answered\"}", 1),
            ("ultravox_creates_total{outcome=\"created\"}", 2),
        ],
    );
    assert!(after.count("log_lines_total{level=\"warn\"}") > 0);
    Ok(())
}

/// While a new agent is being looked for, nobody hears the caller.
#[test]
fn sound_that_reaches_nobody_is_counted() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    world.ultravox.refuse_always(&Reply::Hang);
    call.agent.drop_line();
    world.bridge.wait_for_log("the agent's connection broke")?;
    call.phone.speak(&voice(3, 200))?;
    let dropped = "callbridge_frames_dropped_total{direction=\"to_agent\"}";
    scrape_until(&world, dropped, 10)?;
    Ok(())
}

#[test]
fn the_outbox_gauge_counts_what_waits() -> Outcome {
    let world = builder().start()?;
    world.n8n.set_reply("2", Reply::json(500, &json!({})));
    for count in 1..=2 {
        let call = connect(&world)?;
        call.agent.user_said("Remember this.")?;
        call.act("are_you_there", &json!({}))?;
        call.phone.hang_up()?;
        scrape_until(&world, "outbox_transcripts", count)?;
    }
    Ok(())
}

#[test]
fn what_is_turned_away_is_counted_by_its_reason() -> Outcome {
    let world = builder().setting("MAX_CALLS", 1).start()?;
    let form = b"CallSid=CA00000000000000000000000000000001&From=%2B4930901820";
    let form_type = ("Content-Type", "application/x-www-form-urlencoded");
    assert_eq!(world.request("POST", "/incoming-call", &[form_type], form)?.status, 403);
    assert_eq!(world.request("GET", "/incoming-call", &[], &[])?.status, 405);
    assert_eq!(world.webhook("/incoming-call", &[("CallSid", "../etc")])?.status, 400);
    let long = "x".repeat(20_000);
    assert_eq!(world.request("GET", "/health", &[("X-Long", &long)], &[])?.status, 431);
    let call = connect(&world)?;
    world.ring_with(CALLER, &[("CallSid", "CA00000000000000000000000000000002")])?;
    assert!(call.ringing.stream_is_refused(&world), "its token is used up");
    assert_counts(
        &scrape(&world)?,
        &[
            ("refusals_total{reason=\"signature\"}", 1),
            ("refusals_total{reason=\"method\"}", 1),
            ("refusals_total{reason=\"call_sid\"}", 1),
            ("refusals_total{reason=\"long_head\"}", 1),
            ("refusals_total{reason=\"busy\"}", 1),
            ("refusals_total{reason=\"stream_token\"}", 1),
        ],
    );
    call.phone.hang_up()?;
    world.ultravox.refuse_next(1, &Reply::json(402, &json!({})));
    scrape_until(&world, "calls_in_progress", 0)?;
    world.n8n.reply_next("1", Reply::text(200, None, ""));
    world.ring(CALLER)?;
    assert_counts(
        &scrape_until(&world, "calls_total{ended_by=\"NoAgent\"}", 1)?,
        &[
            ("ultravox_creates_total{outcome=\"refused\"}", 1),
            ("n8n_requests_total{route=\"1\",outcome=\"nonsense\"}", 1),
            ("calls_total{ended_by=\"CallerLeft\"}", 1),
        ],
    );
    Ok(())
}

// --- The log as JSON ---------------------------------------------------------------------------

/// `2027-03-09T14:30:00.123+01:00`
fn is_rfc3339_with_milliseconds(text: &str) -> bool {
    let shape: String = text.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    ["0000-00-00T00:00:00.000+00:00", "0000-00-00T00:00:00.000-00:00"].contains(&shape.as_str())
}

#[test]
fn every_line_of_the_json_log_is_an_object_with_its_facts() -> Outcome {
    const STEPS: [&str; 10] = [
        "bridge", "ring", "greeting", "agent", "answer", "stream", "talk", "act", "goodbye",
        "after",
    ];
    let world = builder().setting("LOG_FORMAT", "json").start()?;
    world.n8n.reply_next("1", Reply::text(500, None, "a \"quote\", a \\ and \u{2028}\u{7}ümläut"));
    let call = a_full_call(&world)?;
    call.act("hangUp", &json!({"reason": "done"}))?;
    call.agent.close()?;
    call.phone.wait_closed()?;
    world.bridge.wait_for_log("n8n has the transcript")?;
    let mut lines = Vec::new();
    for line in world.bridge.log() {
        let line: Value = serde_json::from_str(&line)?;
        let step = usize::try_from(line["step"].as_u64().ok_or("no step")?)?;
        assert_eq!(line["stepName"], STEPS[step], "{line}");
        assert!(is_rfc3339_with_milliseconds(line["time"].as_str().unwrap_or_default()), "{line}");
        let level = line["level"].as_str().unwrap_or_default();
        assert!(["error", "warn", "info", "debug"].contains(&level), "{line}");
        let call_of_line = if step == 0 { Value::Null } else { json!(call.ringing.call_sid) };
        assert_eq!(line["call"], call_of_line, "{line}");
        lines.push(line);
    }
    let find = |words: &str| {
        let has = |line: &&Value| line["message"].as_str().is_some_and(|text| text.contains(words));
        lines.iter().find(has).cloned().unwrap_or_default()
    };
    let quoted = find("a \"quote\", a \\ and  ümläut");
    assert_eq!((&quoted["level"], &quoted["step"]), (&json!("warn"), &json!(2)));
    for (words, field) in [
        ("ready after", "ms"),
        ("connecting to our Media Stream", "ms"),
        ("the Media Stream is open", "ms"),
        ("the agent's first sound", "ms"),
        ("s after it rang", "ms"),
        ("n8n has the transcript", "lines"),
    ] {
        let line = find(words);
        let number = line[field].as_u64().ok_or(format!("no {field} in {line}"))?;
        let message = line["message"].as_str().unwrap_or_default();
        assert!(message.contains(&format!(" {number} ")), "{line}");
    }
    let tool = find("schedule_meeting: uncertain");
    assert_eq!(
        (&tool["tool"], &tool["outcome"]),
        (&json!("schedule_meeting"), &json!("uncertain"))
    );
    assert_eq!(find("AgentHungUp, ")["ended_by"], "AgentHungUp");
    Ok(())
}
