//! The fuzz target `hbone_client`; its body is in the library.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::hbone_client::run(input));
