//! Telephone sound: frames, and G.711 mu-law.

use std::time::Duration;

use data_encoding::HEXLOWER;

/// Telephone sound, both legs (Media Streams: 8000 Hz, mono, mu-law only).
pub(crate) const SAMPLE_RATE_HZ: usize = 8_000;
/// Twilio sends a frame this often (observed everywhere, promised nowhere), and Ultravox wants one
/// this often, silence included.
pub(crate) const FRAME_MS: usize = 20;
pub(crate) const FRAME: Duration = Duration::from_millis(FRAME_MS as u64);
/// Bytes of PCM in a frame for Ultravox.
pub(crate) const FRAME_BYTES: usize = SAMPLE_RATE_HZ * FRAME_MS / 1_000 * SAMPLE_BYTES;
pub(crate) const SAMPLE_BYTES: usize = 2;

const _: () = assert!(FRAME_BYTES == 320);

pub(crate) fn pcm_for_the_eye(pcm: &[u8]) -> String {
    let beginning = HEXLOWER.encode(pcm.get(..16).unwrap_or(pcm));
    format!("{} bytes of PCM, binary: {beginning}…", pcm.len())
}

pub(crate) fn playing_time(mulaw_bytes: usize) -> Duration {
    Duration::from_micros((mulaw_bytes * 1_000_000 / SAMPLE_RATE_HZ) as u64)
}

pub(crate) const fn mulaw_decoded(code: u8) -> i16 {
    let code = !code;
    let segment = (code >> 4) & 0x07;
    let magnitude = (((((code & 0x0F) as i16) << 3) + 0x84) << segment) - 0x84;
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// `linear` has 14 bits, as G.711 has it: a 16-bit sample without its two lowest.
pub(crate) const fn mulaw_encoded(linear: i16) -> u8 {
    const BIAS: i16 = 33;
    const CLIP: i16 = 8_159;
    let (sign, magnitude) = if linear < 0 { (0x7F, -linear) } else { (0xFF, linear) };
    let biased = if magnitude > CLIP - BIAS { CLIP } else { magnitude + BIAS };
    // The segment is where the highest bit stands above the sixth.
    let segment = 10 - biased.leading_zeros();
    let step = (biased >> (segment + 1)) & 0x0F;
    ((segment << 4).to_le_bytes()[0] | step.to_le_bytes()[0]) ^ sign
}

pub(crate) static MULAW_TO_PCM: [i16; 256] = {
    let mut table = [0; 256];
    let mut code = 0;
    while code < table.len() {
        table[code] = mulaw_decoded(code.to_le_bytes()[0]);
        code += 1;
    }
    table
};

pub(crate) static PCM_TO_MULAW: [u8; 1 << 14] = {
    let mut table = [0; 1 << 14];
    let mut index = 0;
    while index < table.len() {
        let [low, high, ..] = index.to_le_bytes();
        table[index] = mulaw_encoded(i16::from_le_bytes([low, high]) - (1 << 13));
        index += 1;
    }
    table
};

pub(crate) fn mulaw_to_pcm(code: u8) -> i16 {
    MULAW_TO_PCM[usize::from(code)]
}

pub(crate) fn pcm_to_mulaw(sample: i16) -> u8 {
    // From -32768..=32767 to 0..=65535, then without the two lowest bits.
    PCM_TO_MULAW[usize::from(sample.cast_unsigned() ^ 0x8000) >> 2]
}

#[cfg(test)]
mod tests;
