//! Servers and clients that run in the pods of the test cluster.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    tests::app::run(tests::app::Cli::parse())
}
