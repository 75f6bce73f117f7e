//! The wait for the signal that ends the process.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::around::shutdown::await_news;
use crate::testing::DEADLINE;

/// What comes of a wait, or that it has no end.
fn in_time<T: Send + 'static>(wait: impl FnOnce() -> T + Send + 'static) -> T {
    let (ended, end) = mpsc::channel();
    thread::spawn(move || ended.send(wait()));
    end.recv_timeout(DEADLINE).expect("the wait has an end")
}

#[test]
fn what_is_to_be_done_every_day_is_done_until_there_is_news() {
    let found = in_time(|| {
        let (news, next_news) = mpsc::channel();
        let mut days = 0;
        let found = await_news(&next_news, Duration::ZERO, || {
            days += 1;
            if days == 3 {
                news.send("stop").unwrap();
            }
        });
        (found, days)
    });
    assert_eq!(found, (Some("stop"), 3));
    let found = in_time(|| {
        let (news, next_news) = mpsc::channel::<()>();
        drop(news);
        await_news(&next_news, Duration::ZERO, || ())
    });
    assert_eq!(found, None);
}
