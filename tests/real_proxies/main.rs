//! Webhooks and whole calls through the proxies that people put in front (caddy, nginx with kept
//! connections, haproxy, as Debian packages them), between the pretend Twilio and the real program.
//! What it shows that a raw client cannot: that none of them sends a webhook into a connection that
//! is about to close, and that the sound gets through.
//!
//! Not a part of plain `cargo test`, because the proxies have to be there:
//!
//! ```sh
//! cargo test --test real_proxies -- --ignored --nocapture
//! ```
//!
//! As root on Debian or Ubuntu it installs what is missing. `CADDY`, `NGINX` and `HAPROXY` name
//! other programs than those in the path. They run on loopback as children of the test, with
//! settings of their own; the services of these names stay as they are.

mod copies;
#[path = "../../src/demo/mod.rs"]
mod demo;
mod proxies;

use std::error::Error;
use std::io::{self, Write as _};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use demo::{FIRST_MESSAGE, PATIENCE, Trouble, World, pcm_of, voice};
use proxies::{KINDS, Kind, Proxy};

type Failed = Box<dyn Error + Send + Sync>;
type Outcome = Result<(), Failed>;

const CALLER: &str = "+4930901820";
/// Webhooks through each proxy, and how many at the same time. Without `Connection: close` in the
/// answers some in a hundred failed.
const POSTS: usize = 2_400;
const AT_ONCE: usize = 20;
/// Twilio gives up on a webhook after this long.
const WEBHOOK_WITHIN: Duration = Duration::from_secs(15);

/// One after the other, so that each has the machine for itself.
#[test]
#[ignore = "needs Caddy, nginx and HAProxy, and installs what is missing: see the module's doc"]
fn proxies_lose_no_webhook_and_carry_calls() -> Outcome {
    proxies::install_missing()?;
    let mut complaints = Vec::new();
    for kind in KINDS {
        let world = World::builder(env!("CARGO_BIN_EXE_callbridge"))
            .setting("LOG_LEVEL", "info")
            .start()?;
        let proxy = Proxy::start(kind, world.bridge.address().port())?;
        let name = proxy.name();
        world.bridge.is_behind(proxy.port());
        let began = Instant::now();
        let lost = posts(&world, &proxy);
        let seconds = began.elapsed().as_secs_f64();
        tell(&format!("{name}: {} of {POSTS} posts failed, in {seconds:.1} s", lost.len()));
        if let Some(example) = lost.first() {
            complaints.push(format!("{name}: {} posts failed, such as: {example}", lost.len()));
        }
        match a_whole_call(&world, kind) {
            Ok(()) => tell(&format!("{name}: a whole call went through")),
            Err(error) => complaints.push(format!("{name}: {error:?}")),
        }
    }
    if complaints.is_empty() { Ok(()) } else { Err(complaints.join("\n").into()) }
}

/// Behind the two whose configuration is in `docs/copies.md`.
#[test]
#[ignore = "needs Caddy and HAProxy, and installs what is missing: see the module's doc"]
fn copies_behind_a_balancer_lose_no_call() -> Outcome {
    proxies::install_missing()?;
    for kind in [Kind::HaProxy, Kind::Caddy] {
        copies::calls_survive_what_one_machine_survives(kind)?;
    }
    Ok(())
}

/// What Twilio sends when a call has ended elsewhere: a webhook that costs nothing. Each sender
/// keeps its connection to the proxy, as Twilio does. Gives what went wrong.
fn posts(world: &World, proxy: &Proxy) -> Vec<String> {
    let form = [("CallSid", "CA00000000000000000000000000000001"), ("CallStatus", "ringing")];
    let signature = world.signature("/call-status", &form);
    let body = form.map(|(name, value)| format!("{name}={value}")).join("&");
    let url = format!("http://127.0.0.1:{}/call-status", proxy.port());
    let (left, lost) = (AtomicUsize::new(POSTS), Mutex::new(Vec::new()));
    let count_down = || {
        left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    };
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                let config = ureq::Agent::config_builder()
                    .timeout_global(Some(WEBHOOK_WITHIN))
                    .http_status_as_error(false);
                let twilio = ureq::Agent::new_with_config(config.build());
                while count_down() {
                    let posted = twilio
                        .post(&url)
                        .header("Host", "bridge.example")
                        .header("X-Twilio-Signature", &signature)
                        .content_type("application/x-www-form-urlencoded")
                        .send(&body);
                    let wrong = match posted {
                        Ok(mut answer) => {
                            let text = answer.body_mut().read_to_string();
                            match (answer.status().as_u16(), text) {
                                (200..=299, Ok(_)) => continue,
                                (status, text) => format!("{status} {text:?}"),
                            }
                        }
                        Err(error) => error.to_string(),
                    };
                    lost.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(wrong);
                }
            });
        }
    });
    lost.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// From the ring to the filed transcript, all that is Twilio's through the proxy.
fn a_whole_call(world: &World, kind: Kind) -> Result<(), Trouble> {
    let ringing = world.ring(CALLER)?;
    let agent = world.ultravox.next_call(PATIENCE)?;
    let phone = ringing.open_stream(world)?;
    let greeting = voice(1, 700);
    agent.say(FIRST_MESSAGE, &pcm_of(&greeting))?;
    phone.expect_audio(&greeting)?;
    let request = voice(2, 500);
    phone.speak(&request)?;
    agent.expect_audio(&pcm_of(&request))?;
    agent.user_said("I hear you through a proxy.")?;
    // What the agent has sent is read in order: behind the result, all that was said has arrived.
    let question = agent.invoke("are_you_there", &json!({}))?;
    agent.wait_result(&question)?;
    phone.hang_up()?;
    phone.wait_closed()?;
    agent.wait_closed()?;
    let filed = world.n8n.wait_for("2", 1, PATIENCE)?;
    let wanted = format!("Agent: {FIRST_MESSAGE}\nUser: I hear you through a proxy.");
    if filed[0].json["data"] != wanted.as_str() || filed[0].json["endedBy"] != "CallerLeft" {
        return Err(world.trouble(format!("through {kind:?} it was filed as {}", filed[0].json)));
    }
    Ok(())
}

/// Past the harness's capture: without `--nocapture` the install would look like a hang.
fn tell(line: &str) {
    if writeln!(io::stderr(), "{line}").is_err() {
        // Nobody listens.
    }
}
