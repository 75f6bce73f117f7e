//! Sound with a stamp: every frame says which it is and when it was sent.
//!
//! [`Stamp::sound`] writes a leg, a number and a time into mu-law codes that survive the way to
//! PCM and back; the rest of the frame is sound that its number determines. [`Ear`] reads such
//! frames off a stream, however it is cut into messages, and counts what is damaged or out of
//! order.

use std::sync::LazyLock;

use crate::demo::sound::{FRAME_BYTES, mulaw_to_pcm, voice};

/// What a frame says of itself, in digits of six bits. As mu-law codes they are 0x80 to 0xBF, which
/// come back from PCM as they went; 0x7F does not (it is a second zero), and 0xFF is silence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) leg: u32,
    pub(super) sequence: u32,
    pub(super) sent_ns: u64,
}

const LEG_DIGITS: usize = 4;

const SEQUENCE_DIGITS: usize = 5;

const TIME_DIGITS: usize = 10;

const CHECK_DIGITS: usize = 3;

const STAMP_BYTES: usize = LEG_DIGITS + SEQUENCE_DIGITS + TIME_DIGITS + CHECK_DIGITS;

const FILL_BYTES: usize = FRAME_BYTES - STAMP_BYTES;

pub(super) const LEG_MAX: u32 = (1 << (6 * LEG_DIGITS)) - 1;

const FILL_FROM: usize = 8_000;

/// The sound behind the stamps. Where a frame's begins depends on its number.
static FILL: LazyLock<Vec<u8>> = LazyLock::new(|| voice(7, 1_100));

/// From a PCM sample to its mu-law code; 0x7F for those that no code stands for.
pub(super) static CODES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut codes = vec![0x7F; 1 << 16];
    for code in 0..=u8::MAX {
        let sample = mulaw_to_pcm(code);
        if let Some(place) = codes.get_mut(usize::from(sample.cast_unsigned())) {
            *place = code;
        }
    }
    codes
});

impl Stamp {
    pub(super) fn sound(&self) -> [u8; FRAME_BYTES] {
        let mut frame = [0; FRAME_BYTES];
        let fields = [
            (u64::from(self.leg), LEG_DIGITS),
            (u64::from(self.sequence), SEQUENCE_DIGITS),
            (self.sent_ns, TIME_DIGITS),
            (self.check(), CHECK_DIGITS),
        ];
        let (stamp, fill) = frame.split_at_mut(STAMP_BYTES);
        let mut digits = stamp.iter_mut();
        for (mut value, count) in fields {
            for digit in digits.by_ref().take(count) {
                *digit = 0x80 | (value & 0x3F) as u8;
                value >>= 6;
            }
        }
        fill.copy_from_slice(self.fill());
        frame
    }

    /// The stamp, if there is one.
    fn read(frame: &[u8]) -> Option<Stamp> {
        let mut digits = frame.get(..STAMP_BYTES)?.iter();
        if frame.iter().take(STAMP_BYTES).any(|digit| digit & 0xC0 != 0x80) {
            return None;
        }
        let mut field = |count: usize| {
            let places = (0..count).map(|place| 6 * place);
            let digits = digits.by_ref().zip(places);
            digits.fold(0, |value, (digit, place)| value | u64::from(digit & 0x3F) << place)
        };
        let stamp = Stamp {
            leg: u32::try_from(field(LEG_DIGITS)).ok()?,
            sequence: u32::try_from(field(SEQUENCE_DIGITS)).ok()?,
            sent_ns: field(TIME_DIGITS),
        };
        (field(CHECK_DIGITS) == stamp.check()).then_some(stamp)
    }

    fn check(&self) -> u64 {
        let mixed = (u64::from(self.leg) << 32 | u64::from(self.sequence)) ^ self.sent_ns;
        mixed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - 6 * CHECK_DIGITS)
    }

    fn fill(&self) -> &'static [u8] {
        let number = self.leg as usize * 7_919 + self.sequence as usize * 131;
        let from = number % FILL_FROM;
        &FILL[from..from + FILL_BYTES]
    }
}

/// Judges the frames of one direction of one call. They come as a stream: how they are cut into
/// messages is the bridge's affair.
#[derive(Default)]
pub(super) struct Ear {
    pub(super) leg: u32,
    next: u32,
    pub(super) heard: u64,
    pub(super) damaged: u64,
    pub(super) out_of_order: u64,
    /// The beginning of a frame.
    pending: Vec<u8>,
    /// The place where a frame begins is not known.
    is_lost: bool,
}

impl Ear {
    pub(super) fn hear(&mut self, mulaw: &[u8], mut note: impl FnMut(&Stamp)) {
        let mut pending = std::mem::take(&mut self.pending);
        let mut rest = if pending.is_empty() {
            mulaw
        } else {
            pending.extend_from_slice(mulaw);
            &pending
        };
        loop {
            // The bridge's own silence, for an agent who must not be left without sound.
            let silence = rest.iter().take_while(|code| **code == 0xFF).count();
            rest = &rest[silence..];
            let Some((frame, behind)) = rest.split_at_checked(FRAME_BYTES) else { break };
            if let Some(stamp) = Stamp::read(frame).filter(|stamp| stamp.leg == self.leg) {
                self.is_lost = false;
                self.judge(&stamp, frame);
                note(&stamp);
                rest = behind;
            } else {
                self.damaged += u64::from(!self.is_lost);
                self.is_lost = true;
                let found = (1..rest.len()).find(|at| Stamp::read(&rest[*at..]).is_some());
                rest = &rest[found.unwrap_or(rest.len() - STAMP_BYTES + 1)..];
            }
        }
        self.pending = rest.to_vec();
    }

    fn judge(&mut self, stamp: &Stamp, frame: &[u8]) {
        self.heard += 1;
        self.damaged += u64::from(&frame[STAMP_BYTES..] != stamp.fill());
        self.out_of_order += u64::from(stamp.sequence < self.next);
        self.next = self.next.max(stamp.sequence + 1);
    }
}
