//! What runs in the virtual machine, and where the test programs for it are.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::{Failure, cargo};

/// Where programs are in the virtual machine.
const BIN: &str = "culvert/bin";
const TESTS: &str = "culvert/tests";
/// What the end-to-end tests start.
const PROGRAMS: [&str; 3] = ["ztunnel", "culvertd", "culvert-app"];

/// A test program with arguments.
struct Part {
    name: &'static str,
    /// The source of the test program, as cargo names it.
    source: &'static str,
    arguments: &'static str,
    /// Whether it runs in CI too.
    short: bool,
}

const PARTS: &[Part] = &[
    Part { name: "capture", source: "ztunnel/src/lib.rs", arguments: "agent::capture::", short: true },
    Part {
        name: "agent",
        source: "ztunnel/src/lib.rs",
        // What is said with an API server asks nothing of the kernel, and wants certificates that the image does not have.
        arguments: "agent:: --skip agent::capture:: --skip no_number_of_connections --skip fault_tests",
        short: true,
    },
    Part { name: "in-clear", source: "tests/tests/in_clear.rs", arguments: "", short: true },
    Part { name: "restart", source: "tests/tests/restart.rs", arguments: "the_proxy_dies", short: true },
    Part { name: "restarts", source: "tests/tests/restart.rs", arguments: "--skip the_proxy_dies", short: false },
    // Without those whose point is load: an emulated processor carries little.
    Part {
        name: "connections",
        source: "tests/tests/connections.rs",
        arguments: "--skip wide_range_of_ports --skip gibibyte --skip five_hundred",
        short: false,
    },
    Part { name: "privilege", source: "tests/tests/privilege.rs", arguments: "", short: false },
];

/// What is to run.
pub struct Suite {
    /// Programs, each with its place in the virtual machine.
    pub programs: Vec<(String, PathBuf)>,
    /// The commands, for the script.
    pub script: String,
}

/// Builds the test programs and puts the suite together: the parts that are named; else all, or the short ones.
///
/// # Errors
/// There is no such part, or the build failed; cargo has printed why.
pub fn build(root: &Path, bins: &Path, short: bool, named: &[String]) -> Result<Suite, Failure> {
    if let Some(unknown) = named.iter().find(|name| !PARTS.iter().any(|part| part.name == **name)) {
        let parts: Vec<&str> = PARTS.iter().map(|part| part.name).collect();
        return Err(Failure(format!("there is no part `{unknown}`; parts are {}", parts.join(", "))));
    }
    let chosen = |part: &&Part| {
        if named.is_empty() { part.short || !short } else { named.iter().any(|name| name == part.name) }
    };
    let parts: Vec<&Part> = PARTS.iter().filter(chosen).collect();
    let tests = test_programs(root)?;
    let mut programs: Vec<(String, PathBuf)> =
        PROGRAMS.iter().map(|name| (format!("{BIN}/{name}"), bins.join(name))).collect();
    let mut script = String::new();
    for part in parts {
        let source = root.join(part.source);
        let (_, program) = tests
            .iter()
            .find(|(from, _)| *from == source)
            .ok_or_else(|| Failure(format!("cargo built no test program of {}", part.source)))?;
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        let place = format!("{TESTS}/{name}");
        if !programs.iter().any(|(there, _)| *there == place) {
            programs.push((place.clone(), program.clone()));
        }
        script += &format!("part {} /{place} --test-threads=1 {}\n", part.name, part.arguments);
    }
    Ok(Suite { programs, script })
}

/// The test programs that cargo has built, each with the source that it was built from. The selection is that of
/// `cargo test --workspace`, so that features unify alike and nothing is built twice.
fn test_programs(root: &Path) -> Result<Vec<(PathBuf, PathBuf)>, Failure> {
    let mut command = cargo();
    command.args(["test", "--workspace", "--locked", "--no-run", "--lib", "--bins"]);
    let files = PARTS.iter().filter_map(|part| part.source.strip_prefix("tests/tests/")?.strip_suffix(".rs"));
    for file in files {
        command.args(["--test", file]);
    }
    command.args(["--message-format", "json-render-diagnostics"]).current_dir(root);
    let done = command.stderr(Stdio::inherit()).output().map_err(|error| Failure(format!("cargo: {error}")))?;
    if !done.status.success() {
        return Err(Failure(format!("cargo test --no-run: {}", done.status)));
    }
    Ok(String::from_utf8_lossy(&done.stdout).lines().filter_map(artifact).collect())
}

/// One message of cargo: source and program of a test. Paths with characters that JSON escapes are not understood.
fn artifact(line: &str) -> Option<(PathBuf, PathBuf)> {
    let value = |key: &str| {
        let rest = line.split_once(&format!("\"{key}\":\""))?.1;
        rest.split('"').next().map(PathBuf::from)
    };
    let profile = line.split_once("\"profile\":{")?.1.split('}').next()?;
    let test = line.contains("\"reason\":\"compiler-artifact\"") && profile.contains("\"test\":true");
    if test { Some((value("src_path")?, value("executable")?)) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_cargo_are_read() {
        let line = concat!(
            r#"{"reason":"compiler-artifact","package_id":"p","manifest_path":"/c/Cargo.toml","target":{"kind":["lib"],"#,
            r#""name":"ztunnel","src_path":"/c/src/lib.rs","test":true},"profile":{"opt_level":"1","test":true},"#,
            r#""features":[],"filenames":["/t/ztunnel-1"],"executable":"/t/ztunnel-1","fresh":true}"#
        );
        assert_eq!(artifact(line), Some((PathBuf::from("/c/src/lib.rs"), PathBuf::from("/t/ztunnel-1"))));
        assert_eq!(artifact(&line.replace(r#""executable":"/t/ztunnel-1""#, r#""executable":null"#)), None);
        assert_eq!(artifact(&line.replace(r#""1","test":true"#, r#""1","test":false"#)), None);
    }
}
