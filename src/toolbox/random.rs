//! Random bits, and what is made of them: tokens that open a stream, and numbers to read out.
//!
//! Everything here comes from the system's own source, so a token cannot be guessed from others.
//! Without that source the process ends at once: there is nothing it could safely do.

use data_encoding::HEXLOWER;
use ring::rand::SecureRandom as _;

/// 128 random bits.
pub(crate) fn random_hex() -> String {
    HEXLOWER.encode(&random_bytes::<16>())
}

pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if ring::rand::SystemRandom::new().fill(&mut bytes).is_err() {
        // Without randomness there is no token that is safe to give out, and no TLS either.
        std::process::abort();
    }
    bytes
}

/// Six digits, as a claim number is read out.
pub(crate) fn random_number() -> String {
    format!("{:06}", u32::from_le_bytes(random_bytes()) % 1_000_000)
}

#[cfg(test)]
mod tests;
