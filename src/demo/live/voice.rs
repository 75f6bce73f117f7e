//! A few sentences in a real voice, for the agent that the page's phone reaches.
//!
//! They are 8 kHz mu-law, 126 KB in all, made once with espeak-ng 1.51 (voice en-us+f3, 160 words a
//! minute, pitch 55) and reduced from 22 kHz. espeak-ng's own licence, the GPL, does not extend to
//! what it says; the recordings are under this project's licence (MIT).

use crate::demo::sound::pcm_of;

pub(super) const GREETING: &[u8] = include_bytes!("voice/greeting.ulaw");
/// What [`GREETING`] says.
pub(super) const GREETING_WORDS: &str = "Hello, this is the demo. Say something, and I will say it \
    back. Press the hash key to end the call.";
pub(super) const HEARD: &[u8] = include_bytes!("voice/heard.ulaw");
pub(super) const PRESSED: &[u8] = include_bytes!("voice/pressed.ulaw");
pub(super) const GOODBYE: &[u8] = include_bytes!("voice/goodbye.ulaw");

const DIGITS: [&[u8]; 10] = [
    include_bytes!("voice/0.ulaw"),
    include_bytes!("voice/1.ulaw"),
    include_bytes!("voice/2.ulaw"),
    include_bytes!("voice/3.ulaw"),
    include_bytes!("voice/4.ulaw"),
    include_bytes!("voice/5.ulaw"),
    include_bytes!("voice/6.ulaw"),
    include_bytes!("voice/7.ulaw"),
    include_bytes!("voice/8.ulaw"),
    include_bytes!("voice/9.ulaw"),
];

/// "You pressed:" and each digit, as s16le.
pub(super) fn pressed(keys: &str) -> Vec<u8> {
    let digits = keys.chars().filter_map(|key| key.to_digit(10));
    let digits = digits.filter_map(|digit| DIGITS.get(usize::try_from(digit).ok()?));
    let spoken: Vec<&[u8]> = std::iter::once(PRESSED).chain(digits.copied()).collect();
    pcm_of(&spoken.concat())
}
