//! A real n8n on loopback: installed once by npm, a fresh database for each, stopped when dropped.

use std::error::Error;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::demo::closed_port;
use crate::{Failed, tell};

/// The newest that runs on Node 20; it runs on Node 22 and 24 too.
const VERSION: &str = "2.8.4";
/// npm on a slow line: 2,090 packages, 560 MB.
const INSTALL_WITHIN: Duration = Duration::from_mins(40);
/// One command of n8n's own command line. The first one also sets the database up.
const COMMAND_WITHIN: Duration = Duration::from_mins(5);
/// From its start until every webhook is there.
const START_WITHIN: Duration = Duration::from_mins(5);
/// n8n ends the runs that are going on; then it is made to end.
const STOP_WITHIN: Duration = Duration::from_secs(20);
/// Between two looks at something that cannot tell by itself that it has changed.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Runs the words behind it, and ends them and all that they have started when its standard input
/// ends: when [`Running`] is dropped, and also when the test is killed and cannot drop anything.
/// It asks the whole group to end, of which it is a part: hence the trap, and the second wait.
const MINDER: &str = "exec 3<&0
\"$@\" </dev/null & program=$!
trap : TERM
{ read -r _ <&3; kill -TERM 0; } 2>/dev/null & minder=$!
wait $program; status=$?
while kill -0 $program 2>/dev/null; do wait $program; status=$?; done
kill $minder 2>/dev/null
exit $status";

/// Asks a database file, by the library that n8n brings: nothing more to install.
const QUERY: &str = "const [library, file, sql] = process.argv.slice(1);
const sqlite = require(library);
new sqlite.Database(file, sqlite.OPEN_READONLY).all(sql, (error, rows) => {
  if (error) { console.error(error.message); process.exit(1); }
  console.log(JSON.stringify(rows));
});";

/// The program, installed.
pub struct N8nProgram {
    directory: PathBuf,
}

impl N8nProgram {
    /// In `CALLBRIDGE_N8N_DIR`, or under `target`. Installed if it is not there.
    pub fn get() -> Result<N8nProgram, Failed> {
        let cache = std::env::var_os("CALLBRIDGE_N8N_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
        let directory = cache.join(format!("n8n-{VERSION}"));
        let program = N8nProgram { directory };
        if program.script().is_file() {
            return Ok(program);
        }
        let new = cache.join(format!("n8n-{VERSION}.new"));
        tell(&format!(
            "installing n8n {VERSION} in {} (once, some minutes, 2.4 GB)",
            program.directory.display()
        ));
        let began = Instant::now();
        // What an earlier try has left is no use.
        if new.exists() {
            fs::remove_dir_all(&new)?;
        }
        install(&new)?;
        fs::rename(&new, &program.directory)?;
        tell(&format!("installed in {} s", began.elapsed().as_secs()));
        Ok(program)
    }

    fn script(&self) -> PathBuf {
        self.directory.join("node_modules/n8n/bin/n8n")
    }
}

fn install(directory: &Path) -> Result<(), Failed> {
    fs::create_dir_all(directory)?;
    // n8n names a spreadsheet library by an address outside the npm registry. The registry has
    // one too, and no spreadsheet is read here.
    let package = json!({
        "name": "callbridge-test-n8n",
        "private": true,
        "dependencies": {"n8n": VERSION},
        "overrides": {"xlsx": "0.18.5"},
    });
    fs::write(directory.join("package.json"), package.to_string())?;
    let log = directory.join("install.log");
    // Of all install scripts only that of sqlite3 is needed. Where there is nothing prebuilt for
    // it to fetch, it compiles, and then Node's own headers spare it a download.
    let npm = "npm install --ignore-scripts --no-audit --no-fund --loglevel=error && \
        headers=$(node -p 'require(\"path\").resolve(process.execPath, \"../..\")') && \
        if [ -e \"$headers/include/node/node.h\" ]; then export npm_config_nodedir=$headers; fi && \
        npm rebuild sqlite3 --ignore-scripts=false --loglevel=error && \
        node -e 'require(\"sqlite3\")'";
    let mut command = minded(&["sh", "-c", npm]);
    command.current_dir(directory);
    let mut npm = Running::begin(command, &log)?;
    if npm.wait(INSTALL_WITHIN)?.success() {
        return Ok(());
    }
    Err(format!("npm could not install n8n {VERSION} (needs Node 20.19 to 24):\n{}", end_of(&log))
        .into())
}

/// A database with workflows, and a server on it that can be stopped and started.
pub struct N8n {
    program: N8nProgram,
    data: PathBuf,
    port: u16,
    broker_port: u16,
    server: Option<Running>,
    /// What must be there before it counts as started.
    paths: Vec<String>,
}

impl N8n {
    /// Imports them all and publishes those that shall be active, which n8n does one at a time.
    pub fn load(
        program: N8nProgram,
        data: &Path,
        workflows: &[(Value, bool)],
        credentials: &Value,
    ) -> Result<N8n, Failed> {
        let mut n8n = N8n {
            program,
            data: data.to_owned(),
            port: closed_port(),
            broker_port: closed_port(),
            server: None,
            paths: Vec::new(),
        };
        let all: Vec<&Value> = workflows.iter().map(|(workflow, _)| workflow).collect();
        let files = [("credentials", credentials.clone()), ("workflow", json!(all))];
        for (kind, content) in files {
            let file = n8n.data.join(format!("{kind}.json"));
            fs::write(&file, content.to_string())?;
            n8n.command(&[&format!("import:{kind}"), &format!("--input={}", file.display())])?;
        }
        for (workflow, _) in workflows.iter().filter(|(_, active)| *active) {
            let id = workflow["id"].as_str().unwrap_or_default();
            n8n.command(&["publish:workflow", &format!("--id={id}")])?;
            n8n.paths.extend(webhook_path(workflow));
        }
        Ok(n8n)
    }

    fn command(&self, words: &[&str]) -> Result<(), Failed> {
        let log = self.data.join("command.log");
        let mut running = Running::begin(self.n8n(words), &log)?;
        if running.wait(COMMAND_WITHIN)?.success() {
            return Ok(());
        }
        Err(format!("n8n {words:?} failed:\n{}", end_of(&log)).into())
    }

    /// On this machine only, and talking to nobody.
    fn n8n(&self, words: &[&str]) -> Command {
        let script = self.program.script();
        let mut command = minded(&["node", &script.to_string_lossy()]);
        command.args(words).env("N8N_USER_FOLDER", &self.data).env("TMPDIR", &self.data);
        for (name, value) in [
            ("NODE_ENV", "production"),
            ("DB_TYPE", "sqlite"),
            ("N8N_ENCRYPTION_KEY", "for this test only"),
            ("N8N_HOST", "127.0.0.1"),
            ("N8N_LISTEN_ADDRESS", "127.0.0.1"),
            ("N8N_PORT", &self.port.to_string()),
            ("N8N_RUNNERS_BROKER_LISTEN_ADDRESS", "127.0.0.1"),
            ("N8N_RUNNERS_BROKER_PORT", &self.broker_port.to_string()),
            ("WEBHOOK_URL", &self.url("")),
            ("N8N_DISABLE_UI", "true"),
            ("N8N_PUBLIC_API_DISABLED", "true"),
        ] {
            command.env(name, value);
        }
        for name in [
            "DIAGNOSTICS",
            "VERSION_NOTIFICATIONS",
            "VERSION_NOTIFICATIONS_WHATS_NEW",
            "DYNAMIC_BANNERS",
            "TEMPLATES",
            "PERSONALIZATION",
            "LICENSE_AUTO_RENEW",
            "COMMUNITY_PACKAGES",
            "PYTHON",
        ] {
            command.env(format!("N8N_{name}_ENABLED"), "false");
        }
        command
    }

    /// Until every webhook is there. `/healthz` is no help: it says yes before that.
    pub fn start(&mut self) -> Result<(), Failed> {
        let log = self.data.join("n8n.log");
        self.server = Some(Running::begin(self.n8n(&["start"]), &log)?);
        let patient = until(START_WITHIN, || {
            if let Some(server) = &mut self.server
                && let Some(status) = server.child.try_wait()?
            {
                return Err(format!("n8n ended by itself ({status})").into());
            }
            // The question a browser asks first. It runs no workflow.
            let there = self.paths.iter().all(|path| {
                let url = format!("http://{}:{}/webhook/{path}", Ipv4Addr::LOCALHOST, self.port);
                let answer = ureq::options(url).header("Origin", "http://localhost").call();
                answer.is_ok_and(|answer| {
                    let allowed = answer.headers().get("access-control-allow-methods");
                    allowed.is_some_and(|methods| methods.as_bytes().ends_with(b"POST"))
                })
            });
            Ok(there.then_some(()))
        });
        patient.map_err(|error| format!("n8n did not start: {error}\n{}", end_of(&log)).into())
    }

    pub fn stop(&mut self) -> Result<(), Failed> {
        match self.server.take() {
            Some(mut server) => server.end().map(drop),
            None => Ok(()),
        }
    }

    /// The production URL of a webhook, whether there is one or not.
    pub fn url(&self, path: &str) -> String {
        let separator = if path.is_empty() { "" } else { "webhook/" };
        format!("http://127.0.0.1:{}/{separator}{path}", self.port)
    }

    /// What n8n has stored.
    pub fn query(&self, sql: &str) -> Result<Vec<Value>, Failed> {
        let library = self.program.directory.join("node_modules/sqlite3");
        let output = Command::new("node")
            .args(["-e", QUERY])
            .arg(library)
            .arg(self.data.join(".n8n/database.sqlite"))
            .arg(sql)
            .output()?;
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{sql}: {why}").into());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// The rows of one of n8n's data tables. None as long as nothing has made it.
    pub fn data_table(&self, name: &str) -> Result<Vec<Value>, Failed> {
        let tables = self.query(&format!("SELECT id FROM data_table WHERE name = '{name}'"))?;
        let Some(id) = tables.first().and_then(|table| table["id"].as_str()) else {
            return Ok(Vec::new());
        };
        self.query(&format!("SELECT * FROM data_table_user_{id} ORDER BY id"))
    }
}

fn webhook_path(workflow: &Value) -> Option<String> {
    let nodes = workflow["nodes"].as_array()?;
    let webhook = nodes.iter().find(|node| node["type"] == "n8n-nodes-base.webhook")?;
    webhook["parameters"]["path"].as_str().map(str::to_owned)
}

/// A program and all that it has started: a group of processes of its own.
struct Running {
    child: Child,
}

impl Running {
    fn begin(mut command: Command, log: &Path) -> Result<Running, Failed> {
        let log = File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::piped()).stdout(log.try_clone()?).stderr(log).process_group(0);
        Ok(Running { child: command.spawn()? })
    }

    fn wait(&mut self, within: Duration) -> Result<ExitStatus, Failed> {
        until(within, || Ok(self.child.try_wait()?))
    }

    fn end(&mut self) -> Result<ExitStatus, Failed> {
        // Its minder notices.
        drop(self.child.stdin.take());
        self.wait(STOP_WITHIN)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.end().is_err() {
            let group = format!("-{}", self.child.id());
            // It would not end when asked to, and there is nobody to tell if this fails too.
            drop(Command::new("kill").args(["-KILL", "--", &group]).status());
            drop(self.child.wait());
        }
    }
}

/// `words`, to be ended by [`MINDER`].
fn minded(words: &[&str]) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", MINDER, "minder"]).args(words);
    command
}

/// Looks again and again until there is something, for parties that cannot call back.
pub fn until<T>(
    within: Duration,
    mut look: impl FnMut() -> Result<Option<T>, Box<dyn Error + Send + Sync>>,
) -> Result<T, Failed> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            return Err(format!("nothing within {within:?}").into());
        }
        thread::sleep(LOOK_AGAIN);
    }
}

fn end_of(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let skipped = lines.len().saturating_sub(20);
    lines.iter().skip(skipped).fold(String::new(), |mut end, line| {
        if writeln!(end, "  {line}").is_err() {
            // Writing to a String does not fail.
        }
        end
    })
}
