//! n8n and Ultravox's REST API, as the benchmark needs them: quick, and the same for every
//! call.
//!
//! What they take for an answer is noted for the call that asked, and is not the bridge's time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use std::{io, thread};

use serde_json::{Value, json};

use crate::demo::backstage::{lock, moot, random_hex, random_uuid};
use crate::demo::bench::hall::Hall;
use crate::demo::bench::line::Line;
use crate::demo::http::{Reply, read_body, read_head};
use crate::demo::n8n::FIRST_MESSAGE;

/// How long pretend n8n takes for step 2, and pretend Ultravox for step 3.
const N8N_TAKES: Duration = Duration::from_millis(20);

const ULTRAVOX_TAKES: Duration = Duration::from_millis(40);

/// A request of the bridge, as far as anybody here looks at it.
pub(super) struct Question {
    at: Instant,
    is_post: bool,
    body: Vec<u8>,
}

impl Hall {
    /// Opens a door for HTTP, a thread per connection, kept alive until the bridge lets go.
    pub(super) fn serve(
        self: &Arc<Hall>,
        name: &'static str,
        tls: Option<Arc<rustls::ServerConfig>>,
        answer: fn(&Hall, &Question) -> Reply,
    ) -> io::Result<SocketAddr> {
        let hall = Arc::clone(self);
        self.backstage.listen(name, move |tcp| {
            hall.kept.fetch_add(1, Relaxed);
            let served = Line::new(tcp, tls.as_ref()).and_then(|line| hall.converse(&line, answer));
            // A connection that ends between two requests, or in one, is the bridge's right.
            moot(served);
            hall.kept.fetch_sub(1, Relaxed);
        })
    }

    fn converse(&self, line: &Line, answer: fn(&Hall, &Question) -> Reply) -> io::Result<()> {
        let mut reader = line.reader();
        while let Some((first, headers)) = read_head(&mut reader)? {
            let body = read_body(&mut reader, &headers, false)?;
            let is_post = first.starts_with("POST ");
            let question = Question { at: Instant::now(), is_post, body };
            match answer(self, &question) {
                Reply::Answer(answer) => line.write(&answer.bytes())?,
                #[cfg(test)]
                Reply::Hang | Reply::Reset | Reply::Raw(_) => return Ok(()),
            }
        }
        Ok(())
    }

    pub(super) fn n8n(&self, question: &Question) -> Reply {
        let body: Value = serde_json::from_slice(&question.body).unwrap_or_default();
        if !question.is_post {
            // The bridge only keeps its connection warm.
            return Reply::json(200, &json!({}));
        }
        if body["route"] == "2" {
            self.filed.fetch_add(1, Relaxed);
            return Reply::json(200, &json!({}));
        }
        thread::sleep(N8N_TAKES);
        self.note_own_time(&body["callSid"], question);
        Reply::json(200, &json!({"firstMessage": FIRST_MESSAGE}))
    }

    pub(super) fn ultravox(&self, question: &Question) -> Reply {
        let body: Value = serde_json::from_slice(&question.body).unwrap_or_default();
        let sid = &body["metadata"]["callSid"];
        if !question.is_post {
            // Is there room for a call? There always is.
            return Reply::json(200, &json!({"allowedConcurrentCalls": null}));
        }
        thread::sleep(ULTRAVOX_TAKES);
        let agents = self.agents.get().map(String::as_str).unwrap_or_default();
        let join_url = format!("{agents}/{}?token={}", sid.as_str().unwrap_or("?"), random_hex(16));
        let reply = json!({"callId": random_uuid(), "created": "2026-11-22T10:00:00.000000Z",
            "joinUrl": join_url, "metadata": body["metadata"]});
        self.note_own_time(sid, question);
        Reply::json(201, &reply)
    }

    fn note_own_time(&self, sid: &Value, question: &Question) {
        if let Some(call) = lock(&self.by_sid).get(sid.as_str().unwrap_or_default()) {
            let own = u64::try_from(question.at.elapsed().as_nanos()).unwrap_or(u64::MAX);
            call.stand_ins_ns.fetch_add(own, Relaxed);
        }
    }
}
