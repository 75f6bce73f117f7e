//! The text that a scraper reads.

use crate::owner::metrics::MetricsPage;

#[test]
fn odd_characters_in_a_label_do_not_end_it() {
    let mut page = MetricsPage(String::new());
    page.sample("name", &[("route", "a\"b\\c\nd}"), ("outcome", "ü")], 1);
    assert_eq!(page.0, "name{route=\"a\\\"b\\\\c\\nd}\",outcome=\"ü\"} 1\n");
}
