//! `cargo xtask cluster`: builds what a real Kubernetes cluster needs, then hands over to `culvert-cluster`.

use std::path::Path;
use std::process::Command;

use crate::build::{self, Profile};
use crate::{Failure, call, kubernetes, prerequisites};

/// Runs `culvert-cluster` with the arguments, or with `programs` prints the folder of Kubernetes' programs.
///
/// # Errors
/// A missing prerequisite, a failed build, or what the program could not do.
pub fn run(root: &Path, args: &[String]) -> Result<(), Failure> {
    let action = args.first().map_or("", String::as_str);
    if action == "programs" {
        println!("{}", kubernetes::programs(root)?.display());
        return Ok(());
    }
    let starts = action == "up" && !args.iter().any(|arg| arg == "--help" || arg == "-h");
    // What is missing is said before anything is built.
    let kubernetes = if starts {
        prerequisites::check()?;
        Some(kubernetes::programs(root)?)
    } else {
        None
    };
    // What leaves this machine is as it is shipped.
    let asks_for_help = args.iter().any(|arg| arg == "--help" || arg == "-h");
    let profile = if action == "images" && !asks_for_help { Profile::Release } else { Profile::Dev };
    let built = build::folder(root, profile);
    // What takes a cluster down must not depend on whether the checkout compiles.
    let needs_build = !["down", "status"].contains(&action) || !built.join("culvert-cluster").exists();
    let programs = if needs_build { build::programs(root, profile)? } else { built };
    let mut command = Command::new(programs.join("culvert-cluster"));
    command.args(args);
    if !args.iter().any(|arg| arg == "--bin-dir" || arg.starts_with("--bin-dir=")) {
        command.arg("--bin-dir").arg(&programs);
    }
    command.envs(kubernetes.map(|folder| (kubernetes::VARIABLE, folder)));
    call(&mut command)
}
