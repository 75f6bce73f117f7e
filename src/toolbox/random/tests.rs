//! What is made of random bits.

use crate::toolbox::random::random_number;

#[test]
fn a_claim_number_has_six_digits() {
    for _ in 0..100 {
        let number = random_number();
        assert!(number.len() == 6 && number.bytes().all(|byte| byte.is_ascii_digit()), "{number}");
    }
}
