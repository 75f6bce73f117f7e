//! Pretend Twilio's REST API: orders to ring somebody, and the set-up of the number.
//!
//! Only the tests need it, so the shipped program does not contain this file: the demo's server
//! is called, and never calls.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::demo::backstage::{Backstage, Board, random_hex};
use crate::demo::http::{HttpRequest, Reply, serve_http};
use crate::demo::server::ChildLog;
use crate::demo::trouble::Trouble;
use crate::demo::{ACCOUNT_SID, OUR_NUMBER, PATIENCE};

/// Twilio's REST API: takes orders to ring somebody, and hands them to the
/// test.
pub struct Twilio {
    address: SocketAddr,
    shared: Arc<Board<Orders>>,
    log: ChildLog,
}

#[derive(Default)]
struct Orders {
    taken: Vec<Order>,
    next: VecDeque<Reply>,
    auth_token: String,
    account: Value,
    numbers: Vec<Value>,
    /// Answers every GET in the place of the standing ones.
    told: Option<Reply>,
    /// How often a number's set-up was written.
    changes: usize,
}

impl Orders {
    fn begin() -> Orders {
        Orders {
            account: json!({"sid": ACCOUNT_SID, "status": "active", "type": "Full"}),
            numbers: vec![
                // The filter finds this one as well: it contains the other.
                json!({"sid": format!("PN{}", "1".repeat(32)), "phone_number": "+4420794600001"}),
                json!({
                    "sid": format!("PN{}", "2".repeat(32)),
                    "phone_number": OUR_NUMBER,
                    "voice_url": "https://demo.twilio.com/welcome/voice/",
                    "voice_method": "POST",
                    "status_callback": "",
                    "status_callback_method": "POST",
                    "voice_application_sid": "",
                    "trunk_sid": null,
                    "capabilities": {"voice": true, "sms": true},
                }),
            ],
            ..Orders::default()
        }
    }

    /// GET of the account and its numbers; POST to one of the numbers.
    fn set_up(&mut self, request: &HttpRequest) -> Reply {
        if let Some(reply) = self.told.clone() {
            return reply;
        }
        let login = request.header("authorization").and_then(basic_login);
        if login != Some((ACCOUNT_SID.to_owned(), self.auth_token.clone())) {
            let what = json!({"status": 401, "code": 20003, "message": "Authenticate"});
            return Reply::json(401, &what);
        }
        let base = format!("/2010-04-01/Accounts/{ACCOUNT_SID}");
        let path = request.path().strip_prefix(&base).unwrap_or_default();
        if path == ".json" {
            let mut account = self.account.clone();
            // As the real one does, in clear.
            if account["auth_token"].is_null() {
                account["auth_token"] = json!(self.auth_token);
            }
            return Reply::json(200, &account);
        }
        if path == "/IncomingPhoneNumbers.json" {
            return self.list(request);
        }
        let sid = path.strip_prefix("/IncomingPhoneNumbers/");
        let sid = sid.and_then(|sid| sid.strip_suffix(".json")).unwrap_or_default();
        let Some(number) = self.numbers.iter_mut().find(|number| number["sid"] == sid) else {
            return Reply::json(404, &json!({"status": 404, "code": 20404}));
        };
        if request.method == "POST" {
            self.changes += 1;
            for (name, value) in form_urlencoded::parse(&request.body) {
                // `VoiceUrl` is read as `voice_url`.
                let mut field = String::new();
                for letter in name.chars() {
                    if letter.is_ascii_uppercase() && !field.is_empty() {
                        field.push('_');
                    }
                    field.push(letter.to_ascii_lowercase());
                }
                number[field] = json!(value);
            }
        }
        Reply::json(200, number)
    }

    /// A number a page: whoever looks for one must turn pages.
    fn list(&self, request: &HttpRequest) -> Reply {
        let wanted = request.parameter("PhoneNumber").unwrap_or_default();
        let fits = |number: &&Value| {
            number["phone_number"].as_str().is_some_and(|text| text.contains(&wanted))
        };
        let at = request.parameter("Page").and_then(|page| page.parse().ok()).unwrap_or(0);
        let found: Vec<&Value> = self.numbers.iter().filter(fits).collect();
        let next = (at + 1 < found.len()).then(|| {
            let wanted = wanted.replace('+', "%2B");
            format!("{}?PhoneNumber={wanted}&Page={}", request.path(), at + 1)
        });
        let page: Vec<&Value> = found.into_iter().skip(at).take(1).collect();
        Reply::json(200, &json!({"incoming_phone_numbers": page, "next_page_uri": next}))
    }
}

/// One request to make a call, refused ones included.
#[derive(Clone, Debug)]
pub struct Order {
    pub at: Instant,
    /// The call that it became, or would have become.
    pub sid: String,
    pub path: String,
    /// User and password of Basic authentication.
    pub login: Option<(String, String)>,
    /// The form's fields in order; some names come more than once.
    pub form: Vec<(String, String)>,
}

impl Order {
    /// The first field of that name.
    pub fn field(&self, name: &str) -> Option<&str> {
        let found = self.form.iter().find(|(present, _)| present == name);
        found.map(|(_, value)| value.as_str())
    }

    /// All fields of that name.
    pub fn fields(&self, name: &str) -> Vec<&str> {
        let found = self.form.iter().filter(|(present, _)| present == name);
        found.map(|(_, value)| value.as_str()).collect()
    }
}

impl Twilio {
    pub(super) fn open(backstage: &Arc<Backstage>, log: &ChildLog) -> io::Result<Twilio> {
        let shared = Arc::new(Board::new(Orders::begin()));
        let board = Arc::clone(&shared);
        let address = serve_http(backstage, "twilio", move |request| {
            if request.method != "POST" || request.path().contains("/IncomingPhoneNumbers") {
                return board.change(|orders| orders.set_up(&request));
            }
            let order = Order {
                at: request.at,
                sid: format!("CA{}", random_hex(16)),
                path: request.path().to_owned(),
                login: request.header("authorization").and_then(basic_login),
                form: form_urlencoded::parse(&request.body).into_owned().collect(),
            };
            let made = json!({"sid": order.sid, "status": "queued", "aFieldOfTheFuture": null});
            board.change(|orders| {
                orders.taken.push(order);
                orders.next.pop_front().unwrap_or_else(|| Reply::json(201, &made))
            })
        })?;
        Ok(Twilio { address, shared, log: log.clone() })
    }

    /// What `TWILIO_API_URL` should be.
    pub(super) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// This is the answer to one more order. Several queue up.
    pub fn reply_next(&self, reply: Reply) {
        self.shared.change(|orders| orders.next.push_back(reply));
    }

    /// The account's primary Auth Token.
    pub(super) fn set_auth_token(&self, token: &str) {
        self.shared.change(|orders| token.clone_into(&mut orders.auth_token));
    }

    /// Changes a field of the account's description.
    pub fn set_account(&self, field: &str, value: Value) {
        self.shared.change(|orders| orders.account[field] = value);
    }

    /// Changes a field of [`OUR_NUMBER`], such as `voice_url`.
    pub fn set_number(&self, field: &str, value: Value) {
        self.shared.change(|orders| {
            let ours = orders.numbers.iter_mut().find(|one| one["phone_number"] == OUR_NUMBER);
            if let Some(ours) = ours {
                ours[field] = value;
            }
        });
    }

    /// A field of [`OUR_NUMBER`] as it is now.
    pub fn number(&self, field: &str) -> Value {
        self.shared.look(|orders| {
            let ours = orders.numbers.iter().find(|one| one["phone_number"] == OUR_NUMBER);
            ours.map(|ours| ours[field].clone()).unwrap_or_default()
        })
    }

    /// From now on this is the answer to everything but orders; with nothing,
    /// all is as before.
    pub fn set_answer(&self, reply: Option<Reply>) {
        self.shared.change(|orders| orders.told = reply);
    }

    /// How often a number's set-up was written.
    pub fn changes(&self) -> usize {
        self.shared.look(|orders| orders.changes)
    }

    /// All orders so far.
    pub fn orders(&self) -> Vec<Order> {
        self.shared.look(|orders| orders.taken.clone())
    }

    /// Waits until so many orders have come, and gives them.
    #[track_caller]
    pub fn wait_orders(&self, count: usize) -> Result<Vec<Order>, Trouble> {
        let come = |orders: &mut Orders| (orders.taken.len() >= count).then_some(());
        match self.shared.wait(PATIENCE, come) {
            Some(()) => Ok(self.orders()),
            None => Err(self.log.trouble(format!("Twilio was not asked {count} times"))),
        }
    }
}

fn basic_login(header: &str) -> Option<(String, String)> {
    let login = BASE64.decode(header.strip_prefix("Basic ")?).ok()?;
    let login = String::from_utf8(login).ok()?;
    login.split_once(':').map(|(user, password)| (user.to_owned(), password.to_owned()))
}
