//! Telephone sound: 8,000 samples a second, mono, in frames of 20 ms.
//!
//! Twilio speaks mu-law (ITU-T G.711, table 2: one byte a sample), Ultravox plain PCM (16 bits a
//! sample, little-endian). Both ways are a look-up in a table that the compiler has made. Decoding
//! and encoding again gives the same byte, but for the second of the two codes for zero. Nothing is
//! resampled, mixed or made louder here: both sides speak 8 kHz.
//!
//! ```text
//! let pcm = to_pcm(&mulaw);              // caller to agent
//! let mulaw = from_agent.encode(&pcm); // agent to caller
//! ```

use std::sync::LazyLock;
use std::time::Duration;

use data_encoding::HEXLOWER;

/// Telephone sound, both legs (Media Streams: 8000 Hz, mono, mu-law only).
pub(crate) const SAMPLE_RATE_HZ: usize = 8_000;
/// Twilio sends a frame this often (observed everywhere, promised nowhere), and Ultravox wants one
/// this often, silence included.
const FRAME_MS: usize = 20;
pub(crate) const FRAME: Duration = Duration::from_millis(FRAME_MS as u64);
/// Bytes of PCM in a frame for Ultravox.
pub(crate) const FRAME_BYTES: usize = SAMPLE_RATE_HZ * FRAME_MS / 1_000 * SAMPLE_BYTES;
pub(crate) const SAMPLE_BYTES: usize = 2;

const _: () = assert!(FRAME_BYTES == 320);

/// Mu-law bytes become PCM.
pub(crate) fn to_pcm(mulaw: &[u8]) -> Vec<u8> {
    let mut pcm = Vec::with_capacity(mulaw.len() * SAMPLE_BYTES);
    for &code in mulaw {
        pcm.extend_from_slice(&mulaw_to_pcm(code).to_le_bytes());
    }
    pcm
}

/// PCM in messages of any length becomes mu-law.
#[derive(Default)]
pub(crate) struct PcmStream {
    /// Half a sample, if a message ever ended in the middle of one.
    odd_byte: Option<u8>,
}

impl PcmStream {
    pub(crate) fn encode(&mut self, pcm: &[u8]) -> Vec<u8> {
        let mut mulaw = Vec::with_capacity(pcm.len() / SAMPLE_BYTES + 1);
        let mut rest = pcm;
        if let (Some(low), Some((&high, after))) = (self.odd_byte, pcm.split_first()) {
            mulaw.push(pcm_to_mulaw(i16::from_le_bytes([low, high])));
            self.odd_byte = None;
            rest = after;
        }
        let samples = rest.chunks_exact(SAMPLE_BYTES);
        if let Some(&byte) = samples.remainder().first() {
            self.odd_byte = Some(byte);
        }
        mulaw
            .extend(samples.map(|sample| pcm_to_mulaw(i16::from_le_bytes([sample[0], sample[1]]))));
        mulaw
    }
}

/// How long that many bytes of mu-law sound.
pub(crate) fn playing_time(mulaw_bytes: usize) -> Duration {
    Duration::from_micros((mulaw_bytes * 1_000_000 / SAMPLE_RATE_HZ) as u64)
}

/// A tenth of it above -30 dB: somebody is speaking.
pub(crate) fn is_loud(mulaw: &[u8]) -> bool {
    const LOUD: u8 = 0x4F;
    mulaw.iter().filter(|&&code| code & 0x7F < LOUD).count() * 10 > mulaw.len()
}

/// 160 ms of a soft 400 Hz every two seconds: "the line lives", it says, and no more.
#[derive(Default)]
pub(crate) struct Tone {
    frames: usize,
}

impl Tone {
    const SOUNDING_FRAMES: usize = 8;
    const PERIOD_FRAMES: usize = 100;
    /// About -24 dB of full scale.
    const AMPLITUDE: f32 = 2_000.0;
    const PITCH_HZ: f32 = 400.0;

    /// The next frame in mu-law, or nothing while it is silent.
    pub(crate) fn next_frame(&mut self) -> Option<&'static [u8]> {
        let sounding = self.frames % Tone::PERIOD_FRAMES < Tone::SOUNDING_FRAMES;
        self.frames += 1;
        sounding.then_some(&TONE_FRAME)
    }
}

static TONE_FRAME: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let per_sample = std::f32::consts::TAU * Tone::PITCH_HZ / 8_000.0;
    let sample = |index: u16| (f32::from(index) * per_sample).sin() * Tone::AMPLITUDE;
    #[expect(clippy::cast_possible_truncation, reason = "2000 fits into 16 bits")]
    let samples = (0..160).map(|index| pcm_to_mulaw(sample(index) as i16));
    samples.collect()
});

/// The beginning of it, for the eye.
pub(crate) fn pcm_in_short(pcm: &[u8]) -> String {
    let beginning = HEXLOWER.encode(pcm.get(..16).unwrap_or(pcm));
    format!("{} bytes of PCM, binary: {beginning}…", pcm.len())
}

pub(crate) fn mulaw_to_pcm(code: u8) -> i16 {
    MULAW_TO_PCM[usize::from(code)]
}

pub(crate) fn pcm_to_mulaw(sample: i16) -> u8 {
    // From -32768..=32767 to 0..=65535, then without the two lowest bits.
    PCM_TO_MULAW[usize::from(sample.cast_unsigned() ^ 0x8000) >> 2]
}

static MULAW_TO_PCM: [i16; 256] = {
    let mut table = [0; 256];
    let mut code = 0;
    while code < table.len() {
        table[code] = mulaw_decoded(code.to_le_bytes()[0]);
        code += 1;
    }
    table
};

static PCM_TO_MULAW: [u8; 1 << 14] = {
    let mut table = [0; 1 << 14];
    let mut index = 0;
    while index < table.len() {
        let [low, high, ..] = index.to_le_bytes();
        table[index] = mulaw_encoded(i16::from_le_bytes([low, high]) - (1 << 13));
        index += 1;
    }
    table
};

const fn mulaw_decoded(code: u8) -> i16 {
    let code = !code;
    let segment = (code >> 4) & 0x07;
    let magnitude = (((((code & 0x0F) as i16) << 3) + 0x84) << segment) - 0x84;
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// `linear` has 14 bits, as G.711 has it: a 16-bit sample without its two lowest.
const fn mulaw_encoded(linear: i16) -> u8 {
    const BIAS: i16 = 33;
    const CLIP: i16 = 8_159;
    let (sign, magnitude) = if linear < 0 { (0x7F, -linear) } else { (0xFF, linear) };
    let biased = if magnitude > CLIP - BIAS { CLIP } else { magnitude + BIAS };
    // The segment is where the highest bit stands above the sixth.
    let segment = 10 - biased.leading_zeros();
    let step = (biased >> (segment + 1)) & 0x0F;
    ((segment << 4).to_le_bytes()[0] | step.to_le_bytes()[0]) ^ sign
}

#[cfg(test)]
mod tests;
