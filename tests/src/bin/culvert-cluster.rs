//! A real Kubernetes on this machine, for trying things out: `cargo xtask cluster`.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    tests::kubernetes::cli::run(&tests::kubernetes::cli::Options::parse())
}
