//! What a request is answered with.

use std::io::Read;

use serde_json::{Value, json};

use crate::parties::twilio::Form;
use crate::toolbox::log::log;
use crate::toolbox::metrics::refused;

/// The body of a webhook. Twilio's are under 4 KiB; a longer one is refused with 413.
pub(crate) const BODY_BYTES_MAX: usize = 64 * 1_024;

pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) content_type: &'static str,
    /// Beside the content type.
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn new(status: u16, content_type: &'static str, body: String) -> Reply {
        Reply { status, content_type, headers: Vec::new(), body: body.into_bytes() }
    }

    pub(crate) fn text(status: u16, text: &str) -> Reply {
        Reply::new(status, "text/plain; charset=utf-8", format!("{text}\n"))
    }

    pub(crate) fn json(status: u16, body: &Value) -> Reply {
        Reply::new(status, "application/json", format!("{body}\n"))
    }

    pub(crate) fn error(status: u16, what: &str) -> Reply {
        Reply::json(status, &json!({"error": what}))
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
}

pub(crate) fn read_body(request: &mut tiny_http::Request) -> Result<Vec<u8>, Reply> {
    let mut body = Vec::new();
    let limit = BODY_BYTES_MAX as u64 + 1;
    if let Err(error) = request.as_reader().take(limit).read_to_end(&mut body) {
        log!(Warn, "{}: the body did not arrive: {error}", request.url());
        refused("no_body");
        return Err(Reply::error(400, "the body did not arrive"));
    }
    if body.len() > BODY_BYTES_MAX {
        log!(Warn, "{}: the body is longer than {BODY_BYTES_MAX} bytes", request.url());
        refused("long_body");
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

pub(crate) fn query_of(request: &tiny_http::Request) -> Form {
    let query = request.url().split_once('?').map(|(_, query)| query).unwrap_or_default();
    Form::parse(query.as_bytes())
}
