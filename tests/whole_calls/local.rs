//! Local mode: without `PUBLIC_URL` there is no telephone, and the live page's phone calls from this
//! machine. No password is asked for, so nobody else may get in.

use serde_json::{Value, json};

use crate::demo::{
    AgentCall, HttpAnswer, PATIENCE, Reply, Trouble, World, WorldBuilder, account, closed_port,
    pcm_of, voice,
};
use crate::{CALLER, DEFAULT_GREETING, Outcome, greeting_of};

const JSON: (&str, &str) = ("Content-Type", "application/json");

/// With the one key, and what only the pretend world needs.
fn builder() -> WorldBuilder {
    ["PUBLIC_URL", "BIND", "N8N_WEBHOOK_URL", "TWILIO_AUTH_TOKEN", "ULTRAVOX_CORPUS_ID"]
        .into_iter()
        .fold(World::builder(env!("CARGO_BIN_EXE_callbridge")), WorldBuilder::without)
}

/// As a browser asks that has opened the address of the start lines.
#[track_caller]
fn ask(world: &World, method: &str, path: &str, extra: &[(&str, &str)]) -> Result<u16, Trouble> {
    Ok(answer(world, method, path, extra)?.status)
}

#[track_caller]
fn answer(
    world: &World,
    method: &str,
    path: &str,
    extra: &[(&str, &str)],
) -> Result<HttpAnswer, Trouble> {
    let host = format!("localhost:{}", world.bridge.address().port());
    let mut headers = vec![("Host", host.as_str()), JSON];
    for (name, value) in extra {
        headers.retain(|(present, _)| present != name);
        headers.push((name, value));
    }
    world.request(method, path, &headers, b"{}")
}

#[test]
fn one_key_is_enough_to_talk_to_the_agent() -> Outcome {
    let world = builder().setting("MAX_CALLS", 1).start()?;
    let port = world.bridge.address().port();
    let start = world.bridge.wait_for_log("local mode")?;
    assert!(start.contains(&format!("open http://localhost:{port}/ ")), "{start}");
    world.bridge.wait_for_log("at most 1 call of ")?;
    let missing = world.bridge.wait_for_log("for a telephone")?;
    for name in ["PUBLIC_URL", "TWILIO_AUTH_TOKEN", "TWILIO_ACCOUNT_SID", "TWILIO_PHONE_NUMBER"] {
        assert!(missing.contains(name), "{missing}");
    }
    let log = world.bridge.log().concat();
    for untrue in ["anyone can start calls", "no live page", "/incoming-call"] {
        assert!(!log.contains(untrue), "{log}");
    }

    let page = answer(&world, "GET", "/", &[])?;
    assert_eq!((page.status, page.text().contains("<title>")), (200, true));
    let origin = format!("http://localhost:{port}");
    let order = [("Origin", origin.as_str()), ("Sec-Fetch-Site", "same-origin")];
    let order = answer(&world, "POST", "/browser-call", &order)?.json();
    let agent: AgentCall = world.ultravox.next_call(PATIENCE)?;
    assert_eq!(greeting_of(&agent), DEFAULT_GREETING);
    let phone = world.upgrade(order["streamPath"].as_str().unwrap_or_default(), None)?;
    phone.send_connected()?;
    phone.send_start(order["callSid"].as_str().unwrap_or_default())?;
    let greeting = voice(1, 200);
    agent.say(DEFAULT_GREETING, &pcm_of(&greeting))?;
    phone.expect_audio(&greeting)?;
    let mouth = phone.keep_talking();
    mouth.say(&voice(2, 200));
    agent.wait_caller_audio(2 * 1_600)?;
    let list = answer(&world, "GET", "/calls", &[])?.json();
    assert_eq!(list["live"][0]["number"], "browser", "{list}");
    // Nobody waits for Twilio here.
    assert_eq!(list["health"]["parties"][2]["state"], "off", "{list}");
    Ok(())
}

/// A page from elsewhere can send requests here, and a name of its owner's can lead here.
#[test]
fn nobody_from_elsewhere_gets_in_without_a_password() -> Outcome {
    let world = builder().start()?;
    let port = world.bridge.address().port();
    let own = [format!("127.0.0.1:{port}"), format!("[::1]:{port}"), "LOCALHOST:9000".to_owned()];
    for host in &own {
        assert_eq!(ask(&world, "GET", "/calls", &[("Host", host)])?, 200, "{host}");
    }
    let rebound = format!("evil.example:{port}");
    let strangers: [&[(&str, &str)]; 8] = [
        &[("Host", &rebound)],
        &[("Host", "localhost.evil.example")],
        &[("Host", "127.0.0.1.evil.example")],
        &[("Host", "[::1].evil.example")],
        &[("Host", "10.0.0.7:8000")],
        &[("Origin", "https://evil.example")],
        &[("Origin", "null")],
        &[("X-Forwarded-For", "198.51.100.7")],
    ];
    for headers in strangers {
        for (method, path) in [("GET", "/"), ("GET", "/calls"), ("POST", "/browser-call")] {
            let refused = answer(&world, method, path, headers)?;
            assert_eq!(refused.status, 403, "{method} {path} {headers:?}");
            assert!(refused.text().contains("local mode"), "{}", refused.text());
        }
    }
    let another_port = [("Origin", "http://localhost:3000"), ("Sec-Fetch-Site", "same-site")];
    assert_eq!(ask(&world, "POST", "/browser-call", &another_port)?, 403);
    let form = [("Content-Type", "text/plain")];
    assert_eq!(ask(&world, "POST", "/browser-call", &form)?, 415);
    assert!(world.ultravox.next_call(std::time::Duration::ZERO).is_err(), "nothing was billed");
    Ok(())
}

#[test]
fn what_is_for_a_telephone_says_that_it_is_not_in_use() -> Outcome {
    let world = builder().setting("OUTGOING_ALLOW", "+49").start()?;
    for path in ["/incoming-call", "/stream-ended", "/call-status"] {
        let answer = world.webhook(path, &[("CallSid", "CA0123"), ("From", CALLER)])?;
        assert_eq!(answer.status, 404, "{path}");
        assert!(answer.text().contains("not in use"), "{path}: {}", answer.text());
        assert!(answer.text().contains("PUBLIC_URL"), "{path}: {}", answer.text());
    }
    let logged = world.bridge.wait_for_log("/incoming-call: ")?;
    assert!(logged.contains("not in use"), "{logged}");
    let host = format!("localhost:{}", world.bridge.address().port());
    let order = json!({"phoneNumber": CALLER}).to_string();
    let headers = [("Host", host.as_str()), JSON];
    let answer = world.request("POST", "/outgoing-call", &headers, order.as_bytes())?;
    assert_eq!(answer.status, 503, "{}", answer.text());
    assert!(answer.json()["error"].to_string().contains("PUBLIC_URL"), "{}", answer.text());
    assert!(world.ultravox.next_call(std::time::Duration::ZERO).is_err(), "nothing was billed");
    Ok(())
}

#[test]
fn it_listens_on_this_machine_alone() -> Outcome {
    let world = builder().start()?;
    let changes = [("BIND", Some("0.0.0.0")), ("PORT", Some("0"))];
    let output = world.bridge.run_with(&[], &changes)?;
    let text = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("BIND  is \"0.0.0.0\": must be 127.0.0.1 or ::1"), "{text}");
    assert!(text.contains("PUBLIC_URL"), "{text}");
    Ok(())
}

/// With an address the password counts, on this machine too.
#[test]
fn with_a_public_address_nothing_is_open() -> Outcome {
    let world =
        builder().setting("PUBLIC_URL", "https://bridge.example").setting("BIND", "127.0.0.1");
    let world = world.setting("API_TOKEN", "mosaic-lantern-27-owner").start()?;
    assert_eq!(ask(&world, "GET", "/", &[])?, 401);
    assert_eq!(ask(&world, "POST", "/browser-call", &[])?, 401);
    Ok(())
}

#[test]
fn check_knows_local_mode() -> Outcome {
    let world = builder().start()?;
    let port = world.bridge.address().port().to_string();
    let ngrok = format!("http://127.0.0.1:{}", closed_port());
    let own = [("PORT", Some(port.as_str())), ("NGROK_API_URL", Some(ngrok.as_str()))];
    let output = world.bridge.run_with(&["check", "--json"], &own)?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(report["ok"], true, "{report:#}");
    let text = report.to_string();
    assert!(text.contains("local mode"), "{report:#}");
    assert!(!text.contains("set PUBLIC_URL first"), "{report:#}");
    assert!(!text.contains("anyone can start calls"), "{report:#}");
    let output = world.bridge.run_with(&["check"], &own)?;
    let text = String::from_utf8(output.stdout)?;
    assert!(text.contains("A call from the live page would work."), "{text}");

    // Whoever has a number wants it to ring.
    let number = [own[0], own[1], ("TWILIO_PHONE_NUMBER", Some("+442079460000"))];
    let output = world.bridge.run_with(&["check", "--json"], &number)?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(report["ok"], false, "{report:#}");
    assert!(report.to_string().contains("PUBLIC_URL is missing"), "{report:#}");
    Ok(())
}

/// A new account begins with five, and whoever has set nothing is not to be told of fifty.
#[test]
fn without_max_calls_there_are_as_many_lines_as_the_account_allows() -> Outcome {
    let world = builder().asleep().start()?;
    let mut account = account();
    account["allowedConcurrentCalls"] = json!(1);
    world.ultravox.set_account(Reply::json(200, &account));
    world.bridge.restart()?;
    world.bridge.wait_for_log("the Ultravox account allows 1 call at once")?;
    assert_eq!(answer(&world, "POST", "/browser-call", &[])?.status, 200);
    let busy = answer(&world, "POST", "/browser-call", &[])?;
    assert_eq!(busy.status, 503, "{}", busy.text());
    let page = answer(&world, "GET", "/calls", &[])?.json();
    assert_eq!(page["maxCalls"], 1, "{page}");
    Ok(())
}
