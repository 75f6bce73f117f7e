//! Sound: G.711 mu-law, written a second time, and voices that nothing can imitate.
//!
//! The server decodes with a table; here the standard's words are followed bit by bit, so that
//! a wrong table does not agree with itself. [`voice`] is noise in which any loss, swap or
//! doubling shows.

use std::time::Duration;

/// One Twilio media message: 20 ms of mu-law at 8000 samples a second.
pub const FRAME_BYTES: usize = 160;

/// Twilio sends a frame this often, silence included.
pub const FRAME_TIME: Duration = Duration::from_millis(20);

/// One mu-law byte is an eighth of a millisecond.
pub(super) const SAMPLE_TIME: Duration = Duration::from_micros(125);

/// One mu-law code as a linear sample. The standard's words, no table: the
/// bits are stored inverted; sign, three bits of segment, four of step.
pub fn mulaw_to_pcm(code: u8) -> i16 {
    let bits = !code;
    let step = i16::from(bits & 0x0F);
    let segment = (bits >> 4) & 0x07;
    // Each segment begins where the last one ended, with steps twice as wide.
    let magnitude = ((step * 8 + 132) << segment) - 132;
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Mu-law as s16le.
pub fn pcm_of(mulaw: &[u8]) -> Vec<u8> {
    mulaw.iter().flat_map(|code| mulaw_to_pcm(*code).to_le_bytes()).collect()
}

/// So many milliseconds of a voice in mu-law: noise in which no two frames are
/// alike and no sample is zero, so that any loss, swap or doubling shows.
pub fn voice(speaker: u64, millis: u64) -> Vec<u8> {
    let mut state = speaker.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let codes = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_be_bytes()[0]
    });
    let bytes = usize::try_from(millis * 8).unwrap_or(usize::MAX);
    codes.filter(|code| *code != 0xFF && *code != 0x7F).take(bytes).collect()
}

/// Where two sounds differ, in words.
pub(super) fn difference(wanted: &[u8], got: &[u8]) -> Option<String> {
    if wanted == got {
        return None;
    }
    let same = wanted.iter().zip(got).take_while(|(wanted, got)| wanted == got).count();
    Some(format!("{} bytes for {}, different from byte {same} on", got.len(), wanted.len()))
}
