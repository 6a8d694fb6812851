//! `cargo xtask test`: every test of the workspace. None is skipped for want of a privilege: what is missing is named
//! before the first one runs.

use std::path::Path;

use crate::build::{self, Profile};
use crate::{Failure, call, cargo, kernel, kubernetes, prerequisites};

/// Builds the programs, then runs the tests with the remaining arguments as filter; with `--kernel`, on another kernel.
///
/// # Errors
/// A missing prerequisite, a failed build, or a failed test.
pub fn run(root: &Path, args: &[String]) -> Result<(), Failure> {
    if let [first, rest @ ..] = args
        && first == "--kernel"
    {
        let (version, rest) = rest.split_first().map_or(("", &[][..]), |(version, rest)| (version.as_str(), rest));
        return kernel::run(root, version, rest);
    }
    prerequisites::check()?;
    // The tests on a real cluster need it. Who asks for some tests by name may do without.
    let kubernetes = match kubernetes::programs(root) {
        Err(Failure(why)) if !args.is_empty() => {
            println!("tests on a real Kubernetes cluster will fail: {why}");
            None
        }
        programs => Some(programs?),
    };
    let programs = build::programs(root, Profile::Dev)?;
    let mut command = cargo();
    // A failure does not hide the next one.
    command.args(["test", "--workspace", "--locked", "--no-fail-fast"]).args(args);
    // The end-to-end tests start the programs that were just built.
    command.env("CULVERT_BIN_DIR", programs).current_dir(root);
    command.envs(kubernetes.map(|folder| (kubernetes::VARIABLE, folder)));
    call(&mut command)
}
