//! What a request is answered with, and what the handlers of all requests read of it.
//!
//! A handler gives back a [`Reply`]; the door sends it. Who may ask for what is not decided here.

use std::io::Read;

use serde_json::{Value, json};

use crate::toolbox::log::{log, log_refusal};

/// The body of a webhook. Twilio's are under 4 KiB; a longer one is refused with 413.
pub(super) const BODY_BYTES_MAX: usize = 64 * 1_024;

pub(crate) struct Reply {
    status: u16,
    content_type: &'static str,
    /// Beside the content type.
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Reply {
    pub(crate) fn new(status: u16, content_type: &'static str, body: String) -> Reply {
        Reply { status, content_type, headers: Vec::new(), body: body.into_bytes() }
    }

    pub(crate) fn text(status: u16, text: &str) -> Reply {
        Reply::new(status, "text/plain; charset=utf-8", format!("{text}\n"))
    }

    pub(crate) fn error(status: u16, what: &str) -> Reply {
        Reply::json(status, &json!({"error": what}))
    }

    pub(crate) fn json(status: u16, body: &Value) -> Reply {
        Reply::new(status, "application/json", format!("{body}\n"))
    }

    pub(crate) fn twiml(body: String) -> Reply {
        Reply::new(200, "text/xml; charset=utf-8", body)
    }

    pub(crate) fn with(
        mut self,
        headers: impl IntoIterator<Item = (&'static str, String)>,
    ) -> Reply {
        self.headers.extend(headers);
        self
    }

    pub(super) fn send(self, request: tiny_http::Request) {
        let path = path_of(&request).to_owned();
        let content_type = [("Content-Type", self.content_type.to_owned())];
        let headers = content_type.iter().chain(&self.headers).filter_map(|(name, value)| {
            tiny_http::Header::from_bytes(*name, value.as_bytes()).ok()
        });
        let response = tiny_http::Response::from_data(self.body)
            .with_status_code(self.status)
            // Told to be small enough, tiny_http would otherwise send longer answers in chunks.
            .with_chunked_threshold(usize::MAX);
        let response = headers.fold(response, tiny_http::Response::with_header);
        if let Err(error) = request.respond(response) {
            log!(Debug, "{path}: the answer was not taken: {error}");
        }
    }
}

pub(crate) fn read_body(request: &mut tiny_http::Request) -> Result<Vec<u8>, Reply> {
    let mut body = Vec::new();
    let limit = BODY_BYTES_MAX as u64 + 1;
    if let Err(error) = request.as_reader().take(limit).read_to_end(&mut body) {
        let path = path_of(request);
        log_refusal("no_body", format_args!("{path}: the body did not arrive: {error}"));
        return Err(Reply::error(400, "the body did not arrive"));
    }
    if body.len() > BODY_BYTES_MAX {
        let path = path_of(request);
        log_refusal(
            "long_body",
            format_args!("{path}: the body is longer than {BODY_BYTES_MAX} bytes"),
        );
        return Err(Reply::error(413, "the body is too long"));
    }
    Ok(body)
}

/// For all that only the owner may see.
pub(crate) fn private() -> [(&'static str, String); 4] {
    [
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
    ]
    .map(|(name, value)| (name, value.to_owned()))
}

pub(crate) fn header<'a>(request: &'a tiny_http::Request, name: &'static str) -> &'a str {
    let found = request.headers().iter().find(|header| header.field.equiv(name));
    found.map(|header| header.value.as_str()).unwrap_or_default()
}

pub(crate) fn path_of(request: &tiny_http::Request) -> &str {
    request.url().split('?').next().unwrap_or_default()
}
