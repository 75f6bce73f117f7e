//! Random bits, and what is made of them.

use ring::rand::SecureRandom as _;

use crate::toolbox::text::hex;

pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if ring::rand::SystemRandom::new().fill(&mut bytes).is_err() {
        // Without randomness there is no token that is safe to give out, and no TLS either.
        std::process::abort();
    }
    bytes
}

/// 128 random bits.
pub(crate) fn random_hex() -> String {
    hex(&random_bytes::<16>())
}

/// Six digits, as a claim number is read out.
pub(crate) fn random_number() -> String {
    format!("{:06}", u32::from_le_bytes(random_bytes()) % 1_000_000)
}

#[cfg(test)]
mod tests;
