//! Compiles the `.proto` files with protox, so that no `protoc` is needed.

use std::error::Error;

const FILES: [&str; 6] = [
    "istio/workload.proto",
    "istio/authorization.proto",
    "istio/ca.proto",
    "envoy/discovery.proto",
    "culvert/discovery.proto",
    "culvert/node.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    tonic_prost_build::configure()
        // Addresses stay slices of the received message.
        .bytes(".istio")
        .include_file("wire.rs")
        .compile_fds(descriptors)?;
    Ok(())
}
