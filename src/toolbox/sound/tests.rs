//! G.711 against a reference that others made: Python's audioop.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use crate::toolbox::sound::{mulaw_to_pcm, pcm_to_mulaw, playing_time};

/// Code, decoded sample, the first and the last sample that are encoded as it.
type Code = (u8, i16, Option<(i16, i16)>);

/// The file says how it was made.
fn g711_reference() -> Vec<Code> {
    let lines = include_str!("../../../tests/data/g711-mulaw.txt").lines();
    let rows = lines.filter(|line| !line.starts_with('#')).map(|line| {
        let columns: Vec<&str> = line.split(' ').collect();
        let [code, decoded, first, last] = columns[..] else {
            return (0, 0, None);
        };
        let samples = first.parse().ok().zip(last.parse().ok());
        (u8::from_str_radix(code, 16).unwrap(), decoded.parse().unwrap(), samples)
    });
    rows.collect()
}

#[test]
fn all_256_codes_sound_as_in_the_reference() {
    let reference = g711_reference();
    assert_eq!(reference.len(), 256);
    for (place, (code, decoded, _)) in reference.into_iter().enumerate() {
        assert_eq!(usize::from(code), place, "the reference has each code once");
        assert_eq!(mulaw_to_pcm(code), decoded, "code {code:02X}");
    }
}

#[test]
fn all_65536_samples_are_encoded_as_in_the_reference() {
    let mut samples_seen = 0;
    for (code, _, samples) in g711_reference() {
        let Some((first, last)) = samples else {
            assert_eq!(code, 0x7F, "only \"minus zero\" is never made");
            continue;
        };
        for sample in first..=last {
            assert_eq!(pcm_to_mulaw(sample), code, "sample {sample}");
            samples_seen += 1;
        }
    }
    assert_eq!(samples_seen, 65_536);
}

#[test]
fn sound_that_is_passed_on_twice_is_the_same() {
    for code in 0..=u8::MAX {
        let again = pcm_to_mulaw(mulaw_to_pcm(code));
        let wanted = if code == 0x7F { 0xFF } else { code };
        assert_eq!(again, wanted, "code {code:02X}");
    }
    assert_eq!((mulaw_to_pcm(0xFF), pcm_to_mulaw(0)), (0, 0xFF), "silence is silence");
}

#[test]
fn a_second_of_sound_plays_for_a_second() {
    let cases = [(0, 0), (1, 125), (160, 20_000), (8_000, 1_000_000), (240_000, 30_000_000)];
    for (bytes, micros) in cases {
        assert_eq!(playing_time(bytes), Duration::from_micros(micros), "{bytes} bytes");
    }
}
