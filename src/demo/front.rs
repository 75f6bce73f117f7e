//! What stands in front of a server: a proxy or tunnel with https ([`Front`]), and ngrok's
//! local API.
//!
//! `callbridge check` looks at these. Only the tests need them, so the shipped program does not
//! contain this file.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::demo::backstage::{Backstage, lock, moot};
use crate::demo::certificate::Certificate;
use crate::demo::http::{Reply, http_exchange, serve_http};
use crate::demo::tls::Plug;

/// What a [`Front`] does with a request.
#[derive(Clone, Debug)]
pub enum Manner {
    /// Carries the connection to this address.
    Pass(SocketAddr),
    /// Carries requests there, but answers an upgrade itself.
    PassNoUpgrade(SocketAddr, Reply),
    Always(Reply),
}

/// A proxy with https in front of the bridge, as Caddy or a tunnel is.
pub struct Front {
    /// Its address: what `PUBLIC_URL` should be.
    pub url: String,
    manner: Arc<Mutex<Manner>>,
    backstage: Arc<Backstage>,
    home: TempDir,
}

impl Front {
    /// Until it is told more, nobody is behind it.
    pub fn open(certificate: Certificate) -> io::Result<Front> {
        let backstage = Arc::new(Backstage::default());
        let home = tempfile::tempdir()?;
        let (pem, tls) = certificate.make()?;
        std::fs::write(home.path().join("front.pem"), pem)?;
        let nobody = Reply::text(502, None, "Bad Gateway");
        let manner = Arc::new(Mutex::new(Manner::Always(nobody)));
        let told = Arc::clone(&manner);
        let speaks = serve_http(&backstage, "front", move |request| {
            match (lock(&told).clone(), request.header("upgrade")) {
                (Manner::Always(reply), _) | (Manner::PassNoUpgrade(_, reply), Some(_)) => reply,
                (Manner::Pass(behind) | Manner::PassNoUpgrade(behind, _), _) => {
                    let (method, path) = (&request.method, &request.target);
                    match http_exchange(behind, method, path, &[], &request.body) {
                        Ok(answer) => Reply::text(answer.status, None, &answer.text()),
                        Err(_) => Reply::text(502, None, "Bad Gateway"),
                    }
                }
            }
        })?;
        let told = Arc::clone(&manner);
        let doors = backstage.listen("front", move |tcp| {
            let behind = match *lock(&told) {
                Manner::Pass(address) => address,
                Manner::PassNoUpgrade(..) | Manner::Always(_) => speaks,
            };
            // Whoever refuses the certificate says so itself.
            moot(Plug::from_tls_to(tcp, &tls, behind));
        })?;
        let url = format!("https://localhost:{}", doors.port());
        Ok(Front { url, manner, backstage, home })
    }

    /// From now on it does this.
    pub fn set(&self, manner: Manner) {
        *lock(&self.manner) = manner;
    }

    /// The authority that has signed its certificate, for `SSL_CERT_FILE`.
    pub fn pem(&self) -> PathBuf {
        self.home.path().join("front.pem")
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.backstage.stop();
    }
}

/// ngrok's local API.
pub struct Ngrok {
    /// What `NGROK_API_URL` should be.
    pub url: String,
    reply: Arc<Mutex<Reply>>,
    backstage: Arc<Backstage>,
}

impl Ngrok {
    /// Without a tunnel at first.
    pub fn open() -> io::Result<Ngrok> {
        let backstage = Arc::new(Backstage::default());
        let reply = Arc::new(Mutex::new(Reply::json(200, &json!({"tunnels": []}))));
        let told = Arc::clone(&reply);
        let address = serve_http(&backstage, "ngrok", move |request| match request.path() {
            "/api/tunnels" => lock(&told).clone(),
            _ => Reply::json(404, &json!({"status_code": 404})),
        })?;
        Ok(Ngrok { url: format!("http://{address}"), reply, backstage })
    }

    /// Its tunnels from now on: public address, and where each leads.
    pub fn set_tunnels(&self, tunnels: &[(&str, &str)]) {
        let list: Vec<Value> = tunnels
            .iter()
            .map(|(url, to)| json!({"public_url": url, "config": {"addr": to, "inspect": true}}))
            .collect();
        self.set_answer(Reply::json(200, &json!({"tunnels": list, "uri": "/api/tunnels"})));
    }

    /// Any answer to the question for tunnels.
    pub fn set_answer(&self, reply: Reply) {
        *lock(&self.reply) = reply;
    }
}

impl Drop for Ngrok {
    fn drop(&mut self) {
        self.backstage.stop();
    }
}
