//! `callbridge demo --page`: the pretend world stays up, for a person to look at the live page and
//! to talk through it.
//!
//! ```text
//!   browser --- http://localhost:8000/ ---> front --- with the token ---> the real server
//!                                                                          |  |  |
//!   calls: scripted callers, one after the other ----- as Twilio would ----+  |  |
//!   echo:  the agent of the page's phone, says back what it hears ------------+  |
//!   calls: the agents of the scripted callers -----------------------------------+
//! ```
//!
//! Ctrl-C ends all of it, and leaves nothing behind. Nothing here reaches anybody but this machine.

mod calls;
mod echo;
mod front;
mod voice;

use std::io::{self, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::demo::backstage::{moot, random_hex, spawn};
use crate::demo::trouble::Trouble;
use crate::demo::world::World;

/// How often it is looked whether the world has ended.
const LOOK_EVERY: Duration = Duration::from_secs(1);

pub(super) fn run(program: &Path) -> Result<(), String> {
    // Before there is anything that would have to be cleared away.
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(|error| error.to_string())?;
    let port = std::env::var("PORT").ok().filter(|port| !port.is_empty());
    let port = port.map_or(Ok(8_000), |port| port.parse()).map_err(|_| "PORT must be a number")?;
    let token = random_hex(16);
    let world = start(program, &token).map_err(|trouble| trouble.with_log())?;
    let address = front::open(&world, port, token).map_err(|error| {
        format!("demo cannot listen on port {port}: {error} (PORT=8001 callbridge demo --page)")
    })?;
    tell(&format!(
        "The live page, over a pretend world. No account, no network.\n\n  \
         Open http://localhost:{}/, press \"Test call\", then \"Call\": the agent says back\n  \
         what it hears. Use headphones. Other calls come in by themselves. Ctrl-C ends it all.\n",
        address.port()
    ));
    let world = Arc::new(world);
    perform(&world).map_err(|error| error.to_string())?;
    signals.forever().next();
    world.end();
    // Threads of the play still hold the world, and end with the process.
    moot(std::fs::remove_dir_all(world.bridge.home.path()));
    Ok(())
}

fn start(program: &Path, token: &str) -> Result<World, Trouble> {
    let world = World::builder(program)
        .setting("API_TOKEN", token)
        .setting("LOG_LEVEL", "info")
        // The same few callers, all day.
        .setting("CALLS_PER_NUMBER_PER_HOUR", 100_000)
        .start()?;
    world.ultravox.answer_pings(true);
    world.n8n.answer_by(calls::n8n);
    Ok(world)
}

/// Starts the callers, and whoever hands each agent to its play.
fn perform(world: &Arc<World>) -> io::Result<()> {
    let cast = Arc::new(calls::Cast::default());
    let (theirs, its) = (Arc::clone(world), Arc::clone(&cast));
    spawn("callers", move || {
        calls::keep_calling(&theirs, &its, |what| tell(&format!("  {what}")));
    })?;
    let theirs = Arc::clone(world);
    spawn("agents", move || {
        while !theirs.backstage.is_over() {
            let Ok(agent) = theirs.ultravox.next_call(LOOK_EVERY) else { continue };
            if let Some(agent) = cast.take(agent) {
                // Its line ends when the caller hangs up, which is no trouble here.
                moot(spawn("echo", move || moot(echo::answer(&agent))));
            }
        }
    })?;
    Ok(())
}

fn tell(line: &str) {
    // Nobody has to listen.
    moot(writeln!(io::stdout(), "{line}"));
}
