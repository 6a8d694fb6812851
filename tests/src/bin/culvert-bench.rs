//! The mesh against plain TCP, on one machine.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    tests::bench::run(&tests::bench::Cli::parse())
}
