//! The fuzz target `certificate_request`; its body is in the library.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::certificate_request::run(input));
