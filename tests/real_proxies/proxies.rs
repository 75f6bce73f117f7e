//! Real proxies on loopback: installed by apt where that is possible, each with a configuration in
//! a directory of its own, stopped when dropped.

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::demo::closed_port;
use crate::{Failed, tell};

/// From its start until it takes connections.
const START_WITHIN: Duration = Duration::from_secs(20);
/// Between two looks at something that cannot tell by itself that it has changed.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Asked before a package starts its service. 101: do not.
const POLICY: &str = "/usr/sbin/policy-rc.d";
/// The line of our Caddyfile that Caddy knows from 2.7 on. Debian 12 has 2.6.
const NEW_IN_CADDY: &str = "stream_close_delay";

#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Caddy,
    Nginx,
    HaProxy,
}

pub const KINDS: [Kind; 3] = [Kind::Caddy, Kind::Nginx, Kind::HaProxy];

impl Kind {
    /// The package, and the program in it.
    fn package(self) -> &'static str {
        match self {
            Kind::Caddy => "caddy",
            Kind::Nginx => "nginx",
            Kind::HaProxy => "haproxy",
        }
    }

    /// Some are where only root looks.
    fn program(self) -> Option<PathBuf> {
        let name = self.package();
        if let Some(path) = std::env::var_os(name.to_uppercase()) {
            return Some(path.into());
        }
        let path = std::env::var("PATH").unwrap_or_default() + ":/usr/local/sbin:/usr/sbin";
        path.split(':').map(|directory| Path::new(directory).join(name)).find(|path| path.is_file())
    }

    fn version(self) -> Result<String, Failed> {
        let argument = if matches!(self, Kind::Caddy) { "version" } else { "-v" };
        let said = self.command()?.arg(argument).output()?;
        // nginx says it on stderr.
        let said = [said.stdout, said.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        let is_version = |word: &&str| word.contains('.') && word.contains(char::is_numeric);
        let version = said.split(['/', ' ', '\n']).find(is_version);
        Ok(version.unwrap_or(said.as_str()).trim_start_matches('v').to_owned())
    }

    fn command(self) -> Result<Command, Failed> {
        let name = self.package();
        let program = self.program().ok_or_else(|| format!("{name} is not there"))?;
        Ok(Command::new(program))
    }

    fn configuration(self, port: u16, bridge: u16, home: &Path) -> Result<String, Failed> {
        match self {
            Kind::Caddy => caddyfile(port, bridge),
            Kind::Nginx => Ok(nginx_conf(port, bridge, home)),
            Kind::HaProxy => Ok(haproxy_cfg(port, bridge)),
        }
    }

    fn arguments(self, file: &Path, home: &Path) -> Vec<PathBuf> {
        let words: &[&Path] = match self {
            Kind::Caddy => {
                &[Path::new("run"), "--adapter".as_ref(), "caddyfile".as_ref(), "--config".as_ref()]
            }
            // Where it writes until it has read the file, and in spite of it.
            Kind::Nginx => &["-p".as_ref(), home, "-e".as_ref(), "stderr".as_ref(), "-c".as_ref()],
            Kind::HaProxy => &["-db".as_ref(), "-f".as_ref()],
        };
        words.iter().copied().chain([file]).map(Path::to_owned).collect()
    }
}

/// Those that are missing. Their services are not to start, now that they are here.
pub fn install_missing() -> Result<(), Failed> {
    let missing: Vec<&str> =
        KINDS.iter().filter(|kind| kind.program().is_none()).map(|kind| kind.package()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let what = missing.join(" ");
    let is_root = Command::new("id").arg("-u").output().is_ok_and(|id| id.stdout == b"0\n");
    if !is_root || !Path::new("/usr/bin/apt-get").exists() {
        return Err(format!("install {what} first (on Debian: apt-get install {what})").into());
    }
    tell(&format!("installing {what}"));
    let policy = Policy::set()?;
    let install = ["-o", "Acquire::Retries=5", "install", "-y", "-qq", "--no-install-recommends"];
    for arguments in [&["update", "-qq"], install.as_slice()] {
        let mut apt = Command::new("apt-get");
        apt.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
        if arguments.contains(&"install") {
            apt.args(&missing);
        }
        let output = apt.output()?;
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            return Err(format!("apt-get {arguments:?}: {why}").into());
        }
    }
    drop(policy);
    Ok(())
}

/// Whoever has a policy already has decided; ours is gone when dropped.
struct Policy {
    is_ours: bool,
}

impl Policy {
    fn set() -> io::Result<Policy> {
        let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(POLICY);
        match file {
            Ok(mut file) => {
                io::Write::write_all(&mut file, b"#!/bin/sh\nexit 101\n")?;
                Ok(Policy { is_ours: true })
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Ok(Policy { is_ours: false })
            }
            Err(error) => Err(error),
        }
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        if self.is_ours && fs::remove_file(POLICY).is_err() {
            tell(&format!("{POLICY} is left over: remove it"));
        }
    }
}

/// One of them, running.
pub struct Proxy {
    name: String,
    port: u16,
    child: Child,
    home: PathBuf,
}

impl Proxy {
    pub fn start(kind: Kind, bridge: u16) -> Result<Proxy, Failed> {
        Proxy::run(kind, |port, home| kind.configuration(port, bridge, home))
    }

    /// A load balancer in front of copies that listen at these ports.
    pub fn before_copies(kind: Kind, copies: &[u16]) -> Result<Proxy, Failed> {
        Proxy::run(kind, |port, _| balancer(kind, port, copies))
    }

    fn run(
        kind: Kind,
        configuration: impl Fn(u16, &Path) -> Result<String, Failed>,
    ) -> Result<Proxy, Failed> {
        let port = closed_port();
        let home = std::env::temp_dir().join(format!("callbridge-{port}-{}", kind.package()));
        fs::create_dir_all(&home)?;
        let file = home.join("configuration");
        fs::write(&file, configuration(port, &home)?)?;
        let log = File::create(home.join("log"))?;
        let mut command = kind.command()?;
        command.args(kind.arguments(&file, &home)).current_dir(&home);
        // Caddy keeps files beside those of whoever starts it.
        command.env("HOME", &home).env_remove("XDG_CONFIG_HOME").env_remove("XDG_DATA_HOME");
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let name = format!("{} {}", kind.package(), kind.version()?);
        let mut proxy = Proxy { name, port, child: command.spawn()?, home };
        proxy.wait_ready()?;
        Ok(proxy)
    }

    fn wait_ready(&mut self) -> Result<(), Failed> {
        let deadline = Instant::now() + START_WITHIN;
        while TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_err() {
            let ended = self.child.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(self.home.join("log"))?;
                return Err(format!("{} does not start: {log}", self.name).into());
            }
            thread::sleep(LOOK_AGAIN);
        }
        Ok(())
    }

    /// With its version.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // It may have ended by itself, and a left-over directory is a nuisance, not a failure.
        drop(self.child.kill());
        drop(self.child.wait());
        drop(fs::remove_dir_all(&self.home));
    }
}

/// The one that we give to our users, but for the addresses, and without a certificate.
fn caddyfile(port: u16, bridge: u16) -> Result<String, Failed> {
    let ours = documented("caddyfile")?;
    let (site, rest) = ours.split_once(" {").ok_or("the Caddyfile has no site")?;
    let mut block = rest.replace("127.0.0.1:8000", &format!("127.0.0.1:{bridge}"));
    if block == rest {
        return Err(format!("the Caddyfile of {site} does not lead to 127.0.0.1:8000").into());
    }
    let is_new = |line: &&str| line.trim_start().starts_with(NEW_IN_CADDY);
    if block.lines().any(|line| is_new(&line)) && is_older_than(&Kind::Caddy.version()?, (2, 7)) {
        tell(&format!("caddy: without {NEW_IN_CADDY}, which it does not know"));
        block = block.lines().filter(|line| !is_new(line)).collect::<Vec<_>>().join("\n");
    }
    let options = "{\n    admin off\n    auto_https off\n}\n";
    Ok(format!("{options}http://:{port} {{\n    bind 127.0.0.1{block}\n"))
}

/// The one of `docs/copies.md`, but for the addresses, and without a certificate.
fn balancer(kind: Kind, port: u16, copies: &[u16]) -> Result<String, Failed> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/copies.md");
    let language = if matches!(kind, Kind::Caddy) { "caddyfile" } else { "haproxy" };
    let mut text = block(&fs::read_to_string(page)?, language).ok_or("docs/copies.md has none")?;
    for (at, copy) in copies.iter().enumerate() {
        text = text.replace(&format!("10.0.0.{}:8000", at + 1), &format!("127.0.0.1:{copy}"));
    }
    if matches!(kind, Kind::HaProxy) {
        let (before, rest) = text.split_once("    bind ").ok_or("no bind")?;
        let (_, rest) = rest.split_once('\n').ok_or("no line")?;
        return Ok(format!("{before}    bind 127.0.0.1:{port}\n{rest}"));
    }
    if !is_older_than(&Kind::Caddy.version()?, (2, 7)) {
        text = text.replace("buffer_requests", "request_buffers 64KiB");
    }
    let (_, rest) = text.split_once(" {").ok_or("the Caddyfile has no site")?;
    let options = "{\n    admin off\n    auto_https off\n}\n";
    Ok(format!("{options}http://:{port} {{\n    bind 127.0.0.1{rest}\n"))
}

fn is_older_than(version: &str, than: (u32, u32)) -> bool {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) < than
}

/// The first block of that language in what we give our users to read.
fn documented(language: &str) -> Result<String, Failed> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut pages = vec![root.join("README.md")];
    let docs = fs::read_dir(root.join("docs")).into_iter().flatten().filter_map(Result::ok);
    pages.extend(docs.map(|entry| entry.path()));
    for page in pages.iter().filter(|page| page.extension().is_some_and(|name| name == "md")) {
        let text = fs::read_to_string(page)?;
        if let Some(block) = block(&text, language) {
            return Ok(block);
        }
    }
    Err(format!("no page has a block of {language}").into())
}

fn block(page: &str, language: &str) -> Option<String> {
    let (_, rest) = page.split_once(&format!("```{language}\n"))?;
    rest.split_once("```").map(|(block, _)| block.to_owned())
}

/// One process, so that killing it ends it. Connections to us are kept.
fn nginx_conf(port: u16, bridge: u16, home: &Path) -> String {
    let home = home.display();
    format!(
        "daemon off;
master_process off;
pid {home}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    upstream callbridge {{
        server 127.0.0.1:{bridge};
        keepalive 32;
    }}
    map $http_upgrade $connection_upgrade {{
        default upgrade;
        '' '';
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://callbridge;
            proxy_http_version 1.1;
            proxy_set_header Host $host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_read_timeout 1h;
        }}
    }}
}}
"
    )
}

fn haproxy_cfg(port: u16, bridge: u16) -> String {
    format!(
        "defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    timeout tunnel 1h
frontend twilio
    bind 127.0.0.1:{port}
    default_backend callbridge
backend callbridge
    server callbridge 127.0.0.1:{bridge}
"
    )
}
