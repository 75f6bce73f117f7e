//! Pretend n8n: the business logic, which answers each route with a standing reply.
//!
//! [`N8n`] keeps every request with its time. It knows Anna, books what it is asked to book and
//! takes the transcript. A test gives other replies, once or from then on.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::demo::backstage::{Backstage, Board};
use crate::demo::http::{Reply, serve_http};
use crate::demo::server::ChildLog;
use crate::demo::trouble::Trouble;

/// What n8n answers at step 2 unless told otherwise.
pub const FIRST_MESSAGE: &str =
    "Hello Anna, this is Sara from SecureLife Insurance. How can I help you today?";

/// What n8n answers to a booking unless told otherwise.
pub const BOOKED: &str =
    "Booked: Anna Berg, Tuesday the ninth of March at half past two, at our London office.";

/// The business logic: answers each route with a standing reply.
pub struct N8n {
    address: SocketAddr,
    shared: Arc<Board<Workflow>>,
    log: ChildLog,
}

#[derive(Default)]
struct Workflow {
    requests: Vec<N8nRequest>,
    /// Preflight requests.
    greeted: usize,
    standing: HashMap<String, Reply>,
    next: HashMap<String, VecDeque<Reply>>,
    /// Comes before all others, where it has an answer.
    judge: Option<Judge>,
}

/// Answers by what is asked, and by how often the same call has asked that route before.
pub(super) type Judge = fn(&Value, usize) -> Option<Reply>;

/// What the bridge has posted to n8n.
#[derive(Clone, Debug)]
pub struct N8nRequest {
    pub at: Instant,
    /// When the connection on which it came was accepted.
    #[cfg(test)]
    pub connected_at: Instant,
    /// The field `route` of the body; empty if there is none.
    pub route: String,
    pub json: Value,
    #[cfg(test)]
    pub raw: Vec<u8>,
    #[cfg(test)]
    pub headers: Vec<(String, String)>,
}

#[cfg(test)]
impl N8nRequest {
    /// A header, whatever the case of its name.
    pub fn header(&self, name: &str) -> Option<&str> {
        crate::demo::http::find_header(&self.headers, name)
    }
}

impl N8n {
    pub(super) fn open(backstage: &Arc<Backstage>, log: &ChildLog) -> io::Result<N8n> {
        let workflow = Workflow {
            standing: HashMap::from([
                ("1".to_owned(), Reply::json(200, &json!({"firstMessage": FIRST_MESSAGE}))),
                ("2".to_owned(), Reply::json(200, &json!({}))),
                ("3".to_owned(), Reply::json(200, &json!({"message": BOOKED}))),
            ]),
            ..Workflow::default()
        };
        let shared = Arc::new(Board::new(workflow));
        let board = Arc::clone(&shared);
        let address = serve_http(backstage, "n8n", move |request| {
            let json: Value = serde_json::from_slice(&request.body).unwrap_or(Value::Null);
            let route = json["route"].as_str().unwrap_or_default().to_owned();
            if request.method == "OPTIONS" {
                board.change(|workflow| workflow.greeted += 1);
                let allowed = "OPTIONS, POST";
                return Reply::text(204, None, "").header("Access-Control-Allow-Methods", allowed);
            }
            let is_webhook = request.method == "POST" && request.path() == "/webhook/call";
            board.change(|workflow| {
                let judged = workflow.judge.and_then(|judge| judge(&json, workflow.before(&json)));
                workflow.requests.push(N8nRequest {
                    at: request.at,
                    route: route.clone(),
                    json,
                    #[cfg(test)]
                    connected_at: request.connected_at,
                    #[cfg(test)]
                    raw: request.body,
                    #[cfg(test)]
                    headers: request.headers,
                });
                if !is_webhook {
                    return Reply::text(404, Some("text/html"), "<pre>Cannot POST</pre>");
                }
                if let Some(reply) = judged {
                    return reply;
                }
                let next = workflow.next.get_mut(&route).and_then(VecDeque::pop_front);
                let reply = next.or_else(|| workflow.standing.get(&route).cloned());
                reply.unwrap_or_else(|| Reply::json(200, &json!({"message": "Done."})))
            })
        })?;
        Ok(N8n { address, shared, log: log.clone() })
    }

    /// The address of the one webhook.
    pub fn url(&self) -> String {
        format!("http://{}/webhook/call", self.address)
    }

    pub(super) fn answer_by(&self, judge: Judge) {
        self.shared.change(|workflow| workflow.judge = Some(judge));
    }

    /// Waits until that route has been posted to so often, and gives those
    /// requests.
    #[track_caller]
    pub fn wait_for(
        &self,
        route: &str,
        count: usize,
        within: Duration,
    ) -> Result<Vec<N8nRequest>, Trouble> {
        let enough = self.shared.wait(within, |workflow| {
            let posts = workflow.requests.iter().filter(|request| request.route == route);
            (posts.count() >= count).then_some(())
        });
        let found = self.requests_of(route);
        if enough.is_some() {
            return Ok(found);
        }
        let found = found.len();
        Err(self.log.trouble(format!(
            "n8n got {found} of {count} posts to route {route} within {within:?}"
        )))
    }

    /// Everything posted to one route so far.
    pub fn requests_of(&self, route: &str) -> Vec<N8nRequest> {
        let mut requests = self.requests();
        requests.retain(|request| request.route == route);
        requests
    }

    /// Everything posted so far, in order.
    pub fn requests(&self) -> Vec<N8nRequest> {
        self.shared.look(|workflow| workflow.requests.clone())
    }
}

impl Workflow {
    fn before(&self, asked: &Value) -> usize {
        let is_alike = |request: &&N8nRequest| {
            request.json["route"] == asked["route"] && request.json["callSid"] == asked["callSid"]
        };
        self.requests.iter().filter(is_alike).count()
    }
}

#[cfg(test)]
impl N8n {
    /// From now on this is the answer to that route.
    pub fn set_reply(&self, route: &str, reply: Reply) {
        self.shared.change(|workflow| workflow.standing.insert(route.to_owned(), reply));
    }

    /// This is the answer to one more request of that route. Several queue up.
    pub fn reply_next(&self, route: &str, reply: Reply) {
        self.shared
            .change(|workflow| workflow.next.entry(route.to_owned()).or_default().push_back(reply));
    }

    /// Waits until a preflight request was answered so often.
    #[track_caller]
    pub fn wait_greeted(&self, count: usize) -> Result<(), Trouble> {
        let greeted = self
            .shared
            .wait(crate::demo::PATIENCE, |workflow| (workflow.greeted >= count).then_some(()));
        greeted.ok_or_else(|| self.log.trouble("nobody has greeted n8n"))
    }
}
