//! The fuzz target `forwarded`; its body is in the library.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::forwarded::run(input));
