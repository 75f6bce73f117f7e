//! What the owner sees and orders: the lines and who is on them, the page, the calls that go out.
//!
//! Each endpoint has a file; `access` stands before all of them and knows who the owner is. What
//! is shown comes from the calls in progress (`lines`) and from the journals. Nothing here takes
//! part in a call, except that the page's phone begins one, as Twilio does.

use tiny_http::Method;

use crate::Bridge;
use crate::door::reply::Reply;
use crate::owner::access::{from_owner, from_prometheus, order_from_owner};
use crate::owner::calls::{call_list, call_story};
use crate::owner::metrics::metrics;
use crate::owner::orders::{delete_journal, offer_again};
use crate::owner::outgoing::outgoing_call;
use crate::owner::page::page;
use crate::owner::phone::{browser_call, browser_stream, browser_stream_ended};

pub(crate) mod access;
pub(crate) mod calls;
pub(crate) mod health;
pub(crate) mod lines;
pub(crate) mod metrics;
pub(crate) mod orders;
pub(crate) mod outgoing;
pub(crate) mod page;
pub(crate) mod phone;

/// Whatever is none of Twilio's, and not for everybody.
pub(crate) fn answer(
    bridge: &'static Bridge,
    request: &mut tiny_http::Request,
    path: &str,
) -> Reply {
    match (request.method(), path) {
        (Method::Get | Method::Head, "/") => from_owner(bridge, request, page),
        (Method::Get | Method::Head, "/calls") => from_owner(bridge, request, call_list),
        (Method::Get | Method::Head, _) if path.starts_with("/calls/") => {
            from_owner(bridge, request, call_story)
        }
        (Method::Delete, _) if path.starts_with("/calls/") => {
            order_from_owner(bridge, request, delete_journal)
        }
        (Method::Get | Method::Head, "/metrics") => from_prometheus(bridge, request, metrics),
        (Method::Post, "/outbox") => order_from_owner(bridge, request, offer_again),
        (Method::Post, "/outgoing-call") => order_from_owner(bridge, request, outgoing_call),
        (Method::Post, "/browser-call") => order_from_owner(bridge, request, browser_call),
        (Method::Post, _) if browser_stream(path).is_some() => {
            order_from_owner(bridge, request, browser_stream_ended)
        }
        _ => Reply::text(404, "there is nothing here"),
    }
}
