//! `cargo xtask demo` and `cargo xtask bench`: build, then hand over to the program of that name.

use std::path::Path;
use std::process::Command;

use crate::build::{self, Profile};
use crate::{Failure, call, prerequisites};

/// Builds everything and runs `culvert-demo` with the remaining arguments.
///
/// # Errors
/// A missing prerequisite, a failed build, or a failed check of the demo.
pub fn run(root: &Path, args: &[String]) -> Result<(), Failure> {
    program(root, "culvert-demo", Profile::Dev, args)
}

/// Builds everything for release and runs `culvert-bench` with the remaining arguments.
///
/// # Errors
/// A missing prerequisite, a failed build, or a measurement that could not be taken.
pub fn bench(root: &Path, args: &[String]) -> Result<(), Failure> {
    program(root, "culvert-bench", Profile::Release, args)
}

fn program(root: &Path, name: &str, profile: Profile, args: &[String]) -> Result<(), Failure> {
    if !args.iter().any(|a| a == "--help" || a == "-h") {
        prerequisites::check()?;
    }
    let programs = build::programs(root, profile)?;
    let mut command = Command::new(programs.join(name));
    command.arg("--bin-dir").arg(&programs).arg("--manifests").arg(root.join("manifests")).args(args);
    call(&mut command)
}
