#![no_main]
#![allow(unused, reason = "the whole bridge is in here, and one door of it is used")]

#[path = "../../../src/main.rs"]
mod callbridge;
use callbridge::demo;

libfuzzer_sys::fuzz_target!(|data: &[u8]| callbridge::tests::feed("head", data));
