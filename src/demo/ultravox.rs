//! Pretend Ultravox: calls are created over REST, and joined over a WebSocket.
//!
//! [`Ultravox`] takes requests for a call as the real one does: with the right key, and with a
//! body that it has no [objection](super::objections) to. Each call becomes an [`AgentCall`],
//! which is handed out with [`Ultravox::next_call`]. Whether its door speaks TLS is decided
//! when it is opened.
//!
//! It also answers questions about the account, models, voices and corpora, in pages of two,
//! since a list may be longer than a page. It never acts on its own, but for three messages
//! after a join.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tungstenite::http;
use tungstenite::http::Uri;
use tungstenite::protocol::Role;

use crate::demo::agent_call::{AgentCall, AgentMouth};
use crate::demo::backstage::{Backstage, Board, lock, moot};
use crate::demo::http::{HttpRequest, Reply, serve_http};
use crate::demo::objections::objection;
use crate::demo::server::ChildLog;
use crate::demo::socket::{Ear, small_buffers, split_socket};
use crate::demo::tls::Plug;
use crate::demo::trouble::Trouble;
use crate::demo::{API_KEY, CORPUS_ID};

#[cfg(test)]
mod for_tests;

/// The models that pretend Ultravox has.
const MODELS: [&str; 3] = ["ultravox-v0.6", "ultravox-v0.6-gemma3-27b", "ultravox-v0.7"];

/// The voices that it has. Two people share a name.
pub const VOICES: [(&str, &str); 6] = [
    ("Emily-English", "00000000-0000-4000-8000-000000000001"),
    ("Mark", "00000000-0000-4000-8000-000000000002"),
    ("Mark-Slow", "00000000-0000-4000-8000-000000000003"),
    ("Sam", "00000000-0000-4000-8000-000000000004"),
    ("Sam", "00000000-0000-4000-8000-000000000005"),
    ("Tanya-English", "00000000-0000-4000-8000-000000000006"),
];

/// What it says of every call, once it is asked.
pub const SUMMARY: &str = "The caller asked for advice, and got it.";

/// The agent's side: it lets calls be created, and hands them to the test.
pub struct Ultravox {
    /// Where its REST API is: `https` if the agents are behind TLS.
    pub(super) api: String,
    shared: Arc<UltravoxState>,
    log: ChildLog,
}

pub(super) struct UltravoxState {
    board: Board<Calls>,
    pub(super) join_prefix: Mutex<String>,
    /// Whether a `ping` gets its `pong`.
    pub(super) pongs: Arc<AtomicBool>,
    pub(super) log: ChildLog,
}

#[derive(Default)]
pub(super) struct Calls {
    created: Vec<AgentCall>,
    /// How many of them `next_call` has handed out.
    handed_out: usize,
    /// Requests with any answer, good and bad.
    requests: usize,
    refusals: VecDeque<Reply>,
    refuse_always: Option<Reply>,
    slow: Duration,
    violations: Vec<String>,
    /// Calls that are gone for good, by their ids.
    deleted: Vec<String>,
    account_asked: usize,
    #[cfg(test)]
    refuse_deletes: Option<Reply>,
    /// Ids of calls that were asked about.
    looked_up: Vec<String>,
    /// Answers to GET by path, in the place of the standing ones.
    told: HashMap<String, Reply>,
}

impl Ultravox {
    pub(super) fn open(
        backstage: &Arc<Backstage>,
        tls: Option<Arc<rustls::ServerConfig>>,
        log: &ChildLog,
    ) -> io::Result<Ultravox> {
        let shared = Arc::new(UltravoxState {
            board: Board::default(),
            join_prefix: Mutex::default(),
            pongs: Arc::default(),
            log: log.clone(),
        });
        let prefix = if tls.is_some() { "wss://localhost" } else { "ws://127.0.0.1" };
        let state = Arc::clone(&shared);
        let agent_tls = tls.clone();
        let doors = backstage.listen("agent socket", move |tcp| {
            // A broken join is seen by the test as a call that is not joined.
            moot(state.join(tcp, agent_tls.as_ref()));
        })?;
        *lock(&shared.join_prefix) = format!("{prefix}:{}", doors.port());
        let state = Arc::clone(&shared);
        let address = serve_http(backstage, "ultravox", move |request| state.answer(request))?;
        let api = match tls {
            None => format!("http://{address}"),
            Some(tls) => {
                let doors = backstage.listen("ultravox over tls", move |tcp| {
                    // The bridge says what is wrong with a connection that does not come about.
                    moot(Plug::from_tls_to(tcp, &tls, address));
                })?;
                format!("https://localhost:{}", doors.port())
            }
        };
        Ok(Ultravox { api, shared, log: log.clone() })
    }

    /// Waits for the next call to be created, in order of creation.
    #[track_caller]
    pub fn next_call(&self, within: Duration) -> Result<AgentCall, Trouble> {
        let next = self.shared.board.wait(within, |calls| {
            let call = calls.created.get(calls.handed_out).cloned()?;
            calls.handed_out += 1;
            Some(call)
        });
        match next {
            Some(call) => Ok(call),
            None => Err(self.log.trouble(format!("no agent call was created within {within:?}"))),
        }
    }

    /// Whether agents answer the bridge's `ping`, as the real one does. At
    /// first they do not: an agent of which a test says nothing is silent.
    pub fn answer_pings(&self, answer: bool) {
        self.shared.pongs.store(answer, Ordering::Release);
    }

    /// What Ultravox would have complained about. Tests want this empty.
    pub fn violations(&self) -> Vec<String> {
        self.shared.board.look(|calls| calls.violations.clone())
    }
}

impl UltravoxState {
    fn answer(&self, request: HttpRequest) -> Reply {
        if request.method == "GET" {
            return self.look_up(&request);
        }
        if request.method == "DELETE" {
            return self.delete(&request);
        }
        if request.method != "POST" || request.path() != "/api/calls" {
            return Reply::json(404, &json!({"detail": "Not found."}));
        }
        let (refusal, slow) = self.board.change(|calls| {
            calls.requests += 1;
            let refusal = calls.refusals.pop_front().or_else(|| calls.refuse_always.clone());
            (refusal, calls.slow)
        });
        if let Some(refusal) = refusal {
            return refusal;
        }
        if request.header("x-api-key") != Some(API_KEY) {
            return Reply::json(403, &json!({"detail": "Invalid API key"}));
        }
        let body = serde_json::from_slice(&request.body).unwrap_or(Value::Null);
        if let Some(objection) = objection(&body) {
            self.board.change(|calls| calls.violations.push(objection.clone()));
            return Reply::json(400, &json!({"detail": objection}));
        }
        let call = AgentCall::new(self, request, body);
        let reply = call.description();
        self.board.change(|calls| calls.created.push(call));
        Reply::json(201, &reply).after(slow)
    }

    /// Gone is gone: a second time it is not found.
    fn delete(&self, request: &HttpRequest) -> Reply {
        if request.header("x-api-key") != Some(API_KEY) {
            return Reply::json(403, &json!({"detail": "Invalid API key"}));
        }
        #[cfg(test)]
        if let Some(refusal) = self.board.look(|calls| calls.refuse_deletes.clone()) {
            return refusal;
        }
        let id = request.path().strip_prefix("/api/calls/").unwrap_or_default().to_owned();
        self.board.change(|calls| {
            let is_there = calls.created.iter().any(|call| call.id() == id);
            if !is_there || calls.deleted.contains(&id) {
                return Reply::json(404, &json!({"detail": "Not found."}));
            }
            calls.deleted.push(id);
            Reply::text(204, None, "")
        })
    }

    /// What may be asked for without a call. Lists come in pages of two.
    fn look_up(&self, request: &HttpRequest) -> Reply {
        let told = self.board.change(|calls| {
            calls.account_asked += usize::from(request.path() == "/api/accounts/me");
            let call = request.path().strip_prefix("/api/calls/").map(str::to_owned);
            calls.looked_up.extend(call);
            calls.told.get(request.path()).cloned()
        });
        if request.header("x-api-key") != Some(API_KEY) {
            return Reply::json(403, &json!({"detail": "Invalid API key"}));
        }
        if let Some(reply) = told {
            return reply;
        }
        let voices = VOICES.map(|(name, id)| json!({"voiceId": id, "name": name}));
        let unknown = || Reply::json(404, &json!({"detail": "Not found."}));
        match request.path() {
            "/api/accounts/me" => Reply::json(200, &account()),
            "/api/models" => {
                page(request, &MODELS.map(|name| json!({"name": name, "aFieldOfTheFuture": 1})))
            }
            "/api/voices" => {
                let wanted = request.parameter("search").unwrap_or_default().to_lowercase();
                let named = |voice: &Value| {
                    voice["name"].as_str().is_some_and(|name| name.to_lowercase().contains(&wanted))
                };
                page(request, &voices.into_iter().filter(named).collect::<Vec<Value>>())
            }
            path => match path.rsplit_once('/') {
                Some(("/api/corpora", CORPUS_ID)) => Reply::json(
                    200,
                    &json!({"corpusId": CORPUS_ID, "name": "Handbook", "stats": {"numDocs": 3}}),
                ),
                Some(("/api/calls", id)) => self.summary(id).unwrap_or_else(unknown),
                Some(("/api/voices", id)) => {
                    let found = voices.iter().find(|voice| voice["voiceId"] == id);
                    found.map_or_else(unknown, |voice| Reply::json(200, voice))
                }
                _ => unknown(),
            },
        }
    }

    /// The real one takes some seconds for it.
    fn summary(&self, id: &str) -> Option<Reply> {
        let is_its = |call: &Value| call["callId"] == id;
        let mut call = self
            .board
            .look(|calls| calls.created.iter().map(AgentCall::description).find(is_its))?;
        call["ended"] = json!("2026-11-22T10:01:12.000000Z");
        call["summary"] = json!(SUMMARY);
        call["shortSummary"] = json!("A call.");
        call["billedDuration"] = json!("72s");
        call["billingStatus"] = json!("BILLING_STATUS_BILLED");
        Some(Reply::json(200, &call))
    }

    /// One connection to the agent's socket, from accept to end.
    fn join(&self, tcp: TcpStream, tls: Option<&Arc<rustls::ServerConfig>>) -> io::Result<()> {
        let plug = match tls {
            None => Plug::bare(tcp),
            Some(tls) => {
                let connection =
                    rustls::ServerConnection::new(Arc::clone(tls)).map_err(io::Error::other)?;
                Plug::behind_tls(tcp, connection.into())?
            }
        };
        let ear = Ear::of(&plug.socket)?;
        let mut claimed = None;
        #[expect(clippy::result_large_err, reason = "the type of tungstenite's callback")]
        let check = |request: &Request, response: Response| {
            claimed = self.claim(request.uri());
            if claimed.is_some() { Ok(response) } else { Err(not_found()) }
        };
        let socket = tungstenite::accept_hdr_with_config(ear, check, Some(small_buffers()))
            .map_err(|error| io::Error::other(error.to_string()))?;
        let Some(call) = claimed else { return Ok(()) };
        let (mut reader, writer) = split_socket(socket, Role::Server)?;
        let mouth = AgentMouth {
            socket: writer,
            #[cfg(test)]
            scissors: plug.scissors()?,
        };
        call.attend(&mut reader, mouth);
        Ok(())
    }

    /// Finds the call that this joinUrl was made for, and lets it be joined once.
    fn claim(&self, uri: &Uri) -> Option<AgentCall> {
        self.board.look(|calls| {
            let call = calls.created.iter().find(|call| call.is_meant_by(uri));
            call.filter(|call| call.is_joined_first()).cloned()
        })
    }
}

/// The account behind the one key: a plan that allows a hundred calls at once.
pub fn account() -> Value {
    json!({
        "accountId": "6f0f2a7e-3b1c-4d5e-8f90-a1b2c3d4e5f6",
        "name": "Anna's insurance",
        "activeCalls": 0,
        "allowedConcurrentCalls": 100,
        "hasActiveSubscription": true,
        "subscriptionTier": "PRO",
        "freeTimeUsed": "1800s",
        "freeTimeRemaining": "0s",
    })
}

/// Two entries of a list, and where the next two are.
fn page(request: &HttpRequest, all: &[Value]) -> Reply {
    let from = request.parameter("cursor").and_then(|at| at.parse().ok()).unwrap_or(0);
    let results: Vec<&Value> = all.iter().skip(from).take(2).collect();
    let search = request.parameter("search").unwrap_or_default();
    let next = (from + 2 < all.len()).then(|| {
        // Somewhere else on purpose: the key must not be carried there.
        format!("http://elsewhere.invalid{}?search={search}&cursor={}", request.path(), from + 2)
    });
    Reply::json(200, &json!({"results": results, "next": next, "total": all.len()}))
}

fn not_found() -> ErrorResponse {
    let mut response = ErrorResponse::new(Some("no such call".to_owned()));
    *response.status_mut() = http::StatusCode::NOT_FOUND;
    response
}
