//! `cargo xtask tidy`: the rules of the house that no compiler checks, as a command and as a test.
//!
//! Dependencies point one way, files stay short, every file says what it is for, `unsafe` and the kernel stay in the
//! modules that are named for them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Failure;

/// Longest source file, in lines.
const MAX_LINES: usize = 700;

/// Which workspace packages each package may depend on. `mesh-runtime` is everybody's; no component knows another.
const MAY_DEPEND_ON: &[(&str, &[&str])] = &[
    ("crates/fake-kubernetes", &[]),
    ("crates/mesh-proto", &[]),
    ("crates/mesh-model", &["mesh-proto"]),
    ("crates/mesh-xds", &["mesh-proto", "mesh-model", "mesh-runtime"]),
    ("crates/mesh-identity", &["mesh-proto", "mesh-model", "mesh-runtime"]),
    ("crates/mesh-hbone", &["mesh-runtime"]),
    ("crates/mesh-runtime", &[]),
    ("ztunnel-ebpf", &[]),
    (
        "ztunnel",
        &[
            "fake-kubernetes",
            "mesh-proto",
            "mesh-model",
            "mesh-xds",
            "mesh-identity",
            "mesh-hbone",
            "mesh-runtime",
            "ztunnel-ebpf",
        ],
    ),
    ("control-plane", &["fake-kubernetes", "mesh-proto", "mesh-model", "mesh-xds", "mesh-identity", "mesh-runtime"]),
    // The end-to-end tests see the mesh from outside, as its users do; only the wire is shared.
    ("tests", &["mesh-proto"]),
    (
        "fuzz",
        &[
            "mesh-proto",
            "mesh-model",
            "mesh-xds",
            "mesh-identity",
            "mesh-hbone",
            "mesh-runtime",
            "control-plane",
            "ztunnel",
        ],
    ),
    ("xtask", &[]),
];

/// Text that may stand only below certain paths, and why.
const CONFINED: &[(&[&str], &[&str], &str)] = &[
    (&["aya::", "aya_log::"], &["ztunnel/src/agent/capture", "ztunnel-ebpf/"], "only the capture module talks to eBPF"),
    (
        &["kube::"],
        &[
            "control-plane/src/ingest",
            "control-plane/src/status",
            "control-plane/src/admission",
            "control-plane/src/deploy",
            "control-plane/src/ca/kubernetes",
            "control-plane/src/cli/cluster.rs",
            "ztunnel/src/agent/enrolment",
        ],
        "only the edges talk to the Kubernetes API",
    ),
    (&["crate::agent"], &["ztunnel/src/agent", "ztunnel/src/main.rs"], "agent and proxy are two processes"),
    (&["crate::proxy"], &["ztunnel/src/proxy", "ztunnel/src/main.rs"], "agent and proxy are two processes"),
    (&["tokio::", "async fn"], NOT_THE_MODEL, "mesh-model is pure: no I/O and no async"),
    (&["anyhow"], &["xtask/"], "errors are enums of their module"),
];

/// Everything but `crates/mesh-model`.
const NOT_THE_MODEL: &[&str] = &[
    "crates/fake-kubernetes",
    "crates/mesh-hbone",
    "crates/mesh-identity",
    "crates/mesh-proto",
    "crates/mesh-runtime",
    "crates/mesh-xds",
    "ztunnel",
    "waypoint",
    "control-plane",
    "fuzz",
    "tests",
    "xtask",
];

/// The only places where `unsafe` may stand: eBPF, sockets and processes, each block with its SAFETY comment.
const UNSAFE: &[&str] = &[
    "ztunnel-ebpf/",
    "ztunnel/src/agent/capture/",
    "ztunnel/src/agent/sys.rs",
    "ztunnel/src/proxy/jail.rs",
    "ztunnel/src/proxy/jail/",
    "ztunnel/src/proxy/sys.rs",
    "crates/mesh-runtime/src/memory.rs",
    "crates/mesh-runtime/src/seqpacket.rs",
    "crates/mesh-runtime/src/seqpacket/",
    "tests/src/bpf.rs",
    "tests/src/capture/socket.rs",
    "tests/src/seccomp.rs",
    "tests/src/spawn.rs",
];

/// Checks the checkout at `root`; prints each breach and fails if there is one.
///
/// # Errors
/// The number of breaches, or a file that cannot be read.
pub fn run(root: &Path) -> Result<(), Failure> {
    let breaches = check(root)?;
    for breach in &breaches {
        println!("{breach}");
    }
    if breaches.is_empty() {
        println!("tidy: nothing to say");
        return Ok(());
    }
    Err(Failure(format!("tidy: {} breaches of the house rules", breaches.len())))
}

fn check(root: &Path) -> Result<Vec<String>, Failure> {
    let mut breaches = Vec::new();
    for (package, allowed) in MAY_DEPEND_ON {
        dependencies(root, package, allowed, &mut breaches)?;
    }
    for file in tracked(root)? {
        let Some(name) = file.to_str() else { continue };
        if file.extension().is_some_and(|e| e == "rs") {
            let Ok(text) = fs::read_to_string(root.join(&file)) else { continue };
            source(name, &text, &mut breaches);
        }
        if name.starts_with("target/") || name.ends_with(".orig") || name.ends_with(".rej") {
            breaches.push(format!("{name}: build output or a leftover is committed"));
        }
    }
    Ok(breaches)
}

/// The files that git knows or would add.
fn tracked(root: &Path) -> Result<Vec<PathBuf>, Failure> {
    let out = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .map_err(|e| Failure(format!("git ls-files: {e}; install git")))?;
    Ok(String::from_utf8_lossy(&out.stdout).lines().map(PathBuf::from).collect())
}

fn dependencies(root: &Path, package: &str, allowed: &[&str], breaches: &mut Vec<String>) -> Result<(), Failure> {
    let path = root.join(package).join("Cargo.toml");
    let text = fs::read_to_string(&path).map_err(|e| Failure(format!("{}: {e}", path.display())))?;
    let ours: Vec<&str> = MAY_DEPEND_ON.iter().map(|(p, _)| p.rsplit('/').next().unwrap_or(p)).collect();
    let mut table = "";
    for line in text.lines().map(str::trim) {
        if line.starts_with('[') {
            table = line;
            continue;
        }
        if !table.contains("dependencies") {
            continue;
        }
        let name = line.split(['.', '=', ' ']).next().unwrap_or("");
        if ours.contains(&name) && !allowed.contains(&name) {
            breaches.push(format!("{package}/Cargo.toml: must not depend on {name}; allowed are {allowed:?}"));
        }
    }
    if !text.contains("[lints]") && !["crates/mesh-proto", "ztunnel-ebpf"].contains(&package) {
        breaches.push(format!("{package}/Cargo.toml: add [lints] workspace = true"));
    }
    Ok(())
}

fn source(name: &str, text: &str, breaches: &mut Vec<String>) {
    let lines = text.lines().count();
    if lines > MAX_LINES {
        breaches.push(format!("{name}: {lines} lines, more than {MAX_LINES}; split it where it has two subjects"));
    }
    let first = text.lines().find(|l| !l.trim().is_empty() && !l.starts_with("#!")).unwrap_or("");
    // A module's tests in a file of their own are described by the module.
    if !first.starts_with("//!") && !name.ends_with("/tests.rs") {
        breaches.push(format!("{name}: say in a //! line at the top what the file is for"));
    }
    if text.lines().any(|l| l.ends_with([' ', '\t'])) {
        breaches.push(format!("{name}: white space at the end of a line"));
    }
    let code: Vec<&str> = text.lines().map(without_comment).collect();
    if name != "xtask/src/tidy.rs" {
        for (words, homes, why) in CONFINED {
            let at_home = homes.iter().any(|home| name.starts_with(home));
            if let Some(word) = words.iter().find(|w| !at_home && code.iter().any(|l| contains_word(l, w))) {
                breaches.push(format!("{name}: `{word}` does not belong here: {why}"));
            }
        }
        let safe = !UNSAFE.iter().any(|home| name.starts_with(home));
        if safe && code.iter().any(|l| ["unsafe {", "unsafe fn", "unsafe impl"].iter().any(|w| contains_word(l, w))) {
            breaches.push(format!("{name}: `unsafe` outside the modules named for it; allowed are {UNSAFE:?}"));
        }
    }
}

fn without_comment(line: &str) -> &str {
    line.split_once("//").map_or(line, |(code, _)| code)
}

/// Whether `word` stands in `line` and is not the tail of a longer name or path.
fn contains_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        !line[..at].chars().next_back().is_some_and(|before| before.is_alphanumeric() || "_:".contains(before))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checkout_is_tidy() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let breaches = check(root).unwrap();
        assert!(breaches.is_empty(), "{}", breaches.join("\n"));
    }

    #[test]
    fn a_breach_is_found() {
        let mut found = Vec::new();
        source("ztunnel/src/proxy/outbound.rs", "//! Doc.\nuse aya::Ebpf;\nunsafe { f() }\n", &mut found);
        assert_eq!(found.len(), 2, "{found:?}");
        found.clear();
        source("crates/mesh-model/src/lib.rs", "fn x() { tokio::spawn(y) } \n", &mut found);
        assert_eq!(found.len(), 3, "{found:?}");
        found.clear();
        source("crates/mesh-xds/src/lib.rs", "//! Uses tokio::spawn; `maya::x`.\nlet a = maya::b;\n", &mut found);
        assert!(found.is_empty(), "{found:?}");
    }
}
