//! Builds the programs that tests, demo and bench start.

use std::path::{Path, PathBuf};

use crate::{Failure, call, cargo};

/// How the programs are built.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Profile {
    /// Quick to compile; tests and demo.
    Dev,
    /// Optimised as shipped; benchmarks.
    Release,
}

/// For `cargo install` of a tool that runs for seconds: quick to build, whatever its authors chose for theirs.
pub const QUICK: [(&str, &str); 3] = [
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0"),
    ("CARGO_PROFILE_RELEASE_LTO", "off"),
    ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16"),
];

/// Builds every program of the workspace and returns the folder that they are in.
///
/// # Errors
/// The build failed; cargo has printed why.
pub fn programs(root: &Path, profile: Profile) -> Result<PathBuf, Failure> {
    build(root, profile, &[])
}

/// Builds every program for development, and the tests with them: these want more of some libraries (tokio's clock that can be
/// set), and all that is built on those would be built once without and once with it.
///
/// # Errors
/// As [`programs`].
pub fn programs_and_tests(root: &Path) -> Result<PathBuf, Failure> {
    build(root, Profile::Dev, &["--bins", "--tests"])
}

fn build(root: &Path, profile: Profile, targets: &[&str]) -> Result<PathBuf, Failure> {
    let mut command = cargo();
    // All of it, whatever is wanted: what is chosen decides about features, and so about what is built anew.
    command.args(["build", "--workspace", "--locked"]).args(targets).current_dir(root);
    if profile == Profile::Release {
        command.arg("--release");
    }
    call(&mut command)?;
    Ok(folder(root, profile))
}

/// The folder that programs are built into.
pub fn folder(root: &Path, profile: Profile) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    target.join(if profile == Profile::Release { "release" } else { "debug" })
}
