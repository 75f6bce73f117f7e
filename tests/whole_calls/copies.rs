//! One copy among several behind a load balancer (`COPY_URL`): what belongs to a call names this
//! very copy, and Twilio's signature is good for either address. With real load balancers in front:
//! `tests/real_proxies`.

use serde_json::json;

use crate::demo::{
    ACCOUNT_SID, AUTH_TOKEN, FIRST_MESSAGE, HttpAnswer, OUR_NUMBER, PATIENCE, PUBLIC_URL, Trouble,
    World, WorldBuilder, pcm_of, twilio_signature, voice,
};
use crate::{Outcome, connect};

const COPY_URL: &str = "https://copy1.example";
const PERSON: &str = "+4930777888";
const TOKEN: &str = "mosaic-lantern-27-api";

fn builder() -> WorldBuilder {
    World::builder(env!("CARGO_BIN_EXE_callbridge"))
        .setting("COPY_URL", COPY_URL)
        .setting("FALLBACK_NUMBER", PERSON)
}

/// Posts as Twilio does that has called this address.
#[track_caller]
fn post_to(
    world: &World,
    address: &str,
    path: &str,
    form: &[(&str, &str)],
) -> Result<HttpAnswer, Trouble> {
    let signature = twilio_signature(AUTH_TOKEN, &format!("{address}{path}"), form);
    let headers = [
        ("Content-Type", "application/x-www-form-urlencoded"),
        ("X-Twilio-Signature", signature.as_str()),
    ];
    let pairs: Vec<String> = form.iter().map(|(name, value)| format!("{name}={value}")).collect();
    world.request("POST", path, &headers, pairs.join("&").as_bytes())
}

#[test]
fn what_belongs_to_a_call_comes_back_to_its_copy() -> Outcome {
    let world = builder().start()?;
    // Rung at the balancer's address, as World does.
    let call = connect(&world)?;
    let stream = call.ringing.twiml.stream_url.clone().unwrap_or_default();
    assert!(stream.starts_with("wss://copy1.example/media-stream"), "{stream}");
    let action = call.ringing.twiml.action.clone().unwrap_or_default();
    assert!(action.starts_with("https://copy1.example/stream-ended#"), "{action}");
    let greeting = voice(1, 200);
    call.agent.say(FIRST_MESSAGE, &pcm_of(&greeting))?;
    call.phone.expect_audio(&greeting)?;

    // The stream breaks, and Twilio asks the copy.
    call.phone.drop_line();
    let form = [("CallSid", call.ringing.call_sid.as_str()), ("CallStatus", "in-progress")];
    let answer = post_to(&world, COPY_URL, "/stream-ended", &form)?;
    assert!(answer.text().contains("wss://copy1.example/media-stream"), "{}", answer.text());
    // Either address is ours, and no other one is.
    for (address, status) in
        [(PUBLIC_URL, 204), (COPY_URL, 204), ("https://copy2.example", 403), ("", 403)]
    {
        let form = [("CallSid", "CA00000000000000000000000000000001"), ("CallStatus", "ringing")];
        let answer = post_to(&world, address, "/call-status", &form)?;
        assert_eq!(answer.status, status, "signed for {address:?}");
    }
    Ok(())
}

#[test]
fn what_became_of_a_transfer_is_told_to_the_copy() -> Outcome {
    let world = builder().start()?;
    let call = connect(&world)?;
    call.act("transfer_to_person", &json!({"reason": "A claim."}))?;
    call.agent.close()?;
    call.phone.wait_closed()?;
    let form = [("CallSid", call.ringing.call_sid.as_str()), ("CallStatus", "in-progress")];
    let answer = post_to(&world, COPY_URL, "/stream-ended", &form)?.text();
    assert!(answer.contains("<Dial action=\"https://copy1.example/stream-ended#"), "{answer}");
    Ok(())
}

#[test]
fn a_call_that_goes_out_comes_back_to_the_copy_that_has_made_it() -> Outcome {
    let world = builder()
        .setting("TWILIO_ACCOUNT_SID", ACCOUNT_SID)
        .setting("TWILIO_PHONE_NUMBER", OUR_NUMBER)
        .setting("API_TOKEN", TOKEN)
        .setting("OUTGOING_ALLOW", "+49")
        .start()?;
    let bearer = format!("Bearer {TOKEN}");
    let headers = [("Authorization", bearer.as_str()), ("Content-Type", "application/json")];
    let order = json!({"phoneNumber": PERSON, "firstMessage": "It is us."}).to_string();
    world.request("POST", "/outgoing-call", &headers, order.as_bytes())?;
    let orders = world.twilio.wait_orders(1)?;
    let order = orders.first().ok_or("no order")?;
    let url = order.field("Url").unwrap_or_default();
    assert!(url.starts_with(&format!("{COPY_URL}/incoming-call?outgoing=")), "{url}");
    for field in ["StatusCallback", "AsyncAmdStatusCallback"] {
        let url = order.field(field).unwrap_or_default();
        assert!(url.starts_with(&format!("{COPY_URL}/call-status")), "{field}: {url}");
    }

    // Twilio calls that address, and the copy knows what was ordered.
    let path = url.strip_prefix(COPY_URL).unwrap_or_default();
    let number = PERSON.replace('+', "%2B");
    let form = [("CallSid", order.sid.as_str()), ("From", OUR_NUMBER), ("To", PERSON)];
    let signature = twilio_signature(AUTH_TOKEN, url, &form);
    let body = format!("CallSid={}&From={}&To={number}", order.sid, OUR_NUMBER.replace('+', "%2B"));
    let headers = [
        ("Content-Type", "application/x-www-form-urlencoded"),
        ("X-Twilio-Signature", signature.as_str()),
    ];
    let answer = world.request("POST", path, &headers, body.as_bytes())?;
    assert!(answer.text().contains("wss://copy1.example/"), "{}", answer.text());
    let agent = world.ultravox.next_call(PATIENCE)?;
    let said = &agent.request()["firstSpeakerSettings"]["user"]["fallback"]["text"];
    assert_eq!(said, "It is us.");
    Ok(())
}
