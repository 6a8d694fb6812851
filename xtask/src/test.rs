//! `cargo xtask test`: every test of the workspace. None is skipped for want of a privilege: what is missing is named
//! before the first one runs.

use std::path::Path;
use std::thread;

use crate::build;
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
    // The tests on a real cluster need it. Who asks for others by name does without, if it would have to be built.
    let (kubernetes, programs) = match kubernetes::existing(root)? {
        // Beside each other: either leaves a core idle while it links.
        None if asks_for_kubernetes(args) => thread::scope(|both| {
            let kubernetes = both.spawn(|| kubernetes::programs(root));
            let programs = build::programs_and_tests(root);
            let kubernetes = kubernetes.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            Ok::<_, Failure>((Some(kubernetes), programs?))
        })?,
        None => {
            println!(
                "Kubernetes' programs are not there, and tests that need them will fail: `cargo xtask cluster programs` \
                 builds them, once"
            );
            (None, build::programs_and_tests(root)?)
        }
        there => (there, build::programs_and_tests(root)?),
    };
    let mut command = cargo();
    // A failure does not hide the next one.
    command.args(["test", "--workspace", "--locked", "--no-fail-fast"]).args(args);
    // The end-to-end tests start the programs that were just built.
    command.env("CULVERT_BIN_DIR", programs).current_dir(root);
    command.envs(kubernetes.map(|folder| (kubernetes::VARIABLE, folder)));
    call(&mut command)
}

/// True of all tests, and of a filter that names those on a real cluster.
fn asks_for_kubernetes(args: &[String]) -> bool {
    args.is_empty() || args.iter().any(|arg| arg.contains("kubernetes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubernetes_is_built_for_who_asks_for_it() {
        let asks = |args: &[&str]| asks_for_kubernetes(&args.iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>());
        assert!(asks(&[]) && asks(&["kubernetes_api"]) && asks(&["-p", "tests", "--test", "kubernetes"]));
        assert!(!asks(&["two_nodes"]) && !asks(&["-p", "tests", "--test", "dns"]));
    }
}
