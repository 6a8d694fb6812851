//! The fuzz target `port_names`; its body is in the library.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::port_names::run(input));
