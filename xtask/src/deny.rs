//! `cargo xtask deny`: licences, bans and sources of the dependencies, by cargo-deny.

use std::path::Path;
use std::process::Command;

use crate::build::QUICK;
use crate::{Failure, cache, call, cargo};

const VERSION: &str = "0.20.2";

/// Installs cargo-deny into the cache folder if it is not there, then checks `deny.toml`.
///
/// # Errors
/// The tool could not be built, or found something; it has printed what.
pub fn run(root: &Path) -> Result<(), Failure> {
    let folder = cache().join(format!("cargo-deny-{VERSION}"));
    let tool = folder.join("bin/cargo-deny");
    if !tool.exists() {
        println!("setting up cargo-deny {VERSION} in {} (once, a few minutes)", folder.display());
        let mut install = cargo();
        install.args(["install", "cargo-deny", "--locked", "--version", VERSION, "--root"]).arg(&folder).envs(QUICK);
        call(&mut install)?;
    }
    // `advisories` is left out: its database is fetched from outside the package registry.
    call(Command::new(tool).args(["--locked", "check", "bans", "licenses", "sources"]).current_dir(root))
}
