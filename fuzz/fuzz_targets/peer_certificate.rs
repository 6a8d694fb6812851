//! The fuzz target `peer_certificate`; its body is in the library.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::peer_certificate::run(input));
