//! The fuzz target `xds_server`; its body is in the library.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::xds_server::run(input));
