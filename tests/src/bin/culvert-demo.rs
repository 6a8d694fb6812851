//! Bookinfo on two nodes made of network namespaces, carried by the mesh.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    tests::demo::run(&tests::demo::Options::parse())
}
