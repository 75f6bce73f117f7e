#![no_main]
#![allow(dead_code, reason = "of each room that is mounted, only the doors that `feed` uses")]

include!("rooms.rs");

libfuzzer_sys::fuzz_target!(|data: &[u8]| feed::feed("twilio", data));
