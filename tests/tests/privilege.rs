//! The process that reads what pods and peers send holds no privilege: as the kernel reports it of the live process,
//! and as attempts inside its system-call filter show.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::process::Command;

use serde::Deserialize;
use tests::Error;
use tests::cluster::{Cluster, bin_dir};

/// What `ztunnel jail-probe` prints.
#[derive(Debug, Deserialize)]
struct Probe {
    /// Whether the attempts were made inside the filter.
    jailed: bool,
    /// For each attempt, what came of it: `ok`, or the error's name.
    attempts: BTreeMap<String, String>,
}

/// The attempts that must be made, each refused inside the filter.
const ATTEMPTS: [&str; 9] =
    ["setns", "unshare", "bpf", "ptrace", "execve", "mount", "af_packet", "af_netlink", "raw_socket"];

fn probe(args: &[&str]) -> Probe {
    let output = Command::new(bin_dir().unwrap().join("ztunnel")).arg("jail-probe").args(args).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
}

#[test]
fn the_live_proxy_holds_nothing() -> Result<(), Error> {
    let cluster = Cluster::builder().nodes(1).start()?;
    let pid = cluster.node(1)?.proxy()?.pid().expect("the proxy runs");
    let mut threads = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_else(|| panic!("{name}: {status}"));
            line.trim().to_owned()
        };
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(field(set), "0000000000000000", "{set}");
        }
        assert_eq!(field("NoNewPrivs:"), "1");
        assert_eq!(field("Seccomp:"), "2");
        assert_eq!(field("Uid:"), "1337\t1337\t1337\t1337");
        assert_eq!(field("Groups:"), "");
        threads += 1;
    }
    assert!(threads > 1, "every thread was looked at, {threads}");
    let agent = cluster.node(1)?.agent()?.pid().expect("the agent runs");
    let status = std::fs::read_to_string(format!("/proc/{agent}/status")).unwrap();
    assert!(!status.contains("CapEff:\t0000000000000000"), "positive control: the agent does hold capabilities");
    Ok(())
}

#[test]
fn inside_the_filter_every_attempt_fails() {
    let inside = probe(&[]);
    assert!(inside.jailed);
    for attempt in ATTEMPTS {
        assert_ne!(inside.attempts[attempt], "ok", "{inside:?}");
    }
}

#[test]
fn outside_the_filter_root_succeeds() {
    let outside = probe(&["--unjailed"]);
    assert!(!outside.jailed);
    for attempt in ATTEMPTS {
        assert_eq!(outside.attempts[attempt], "ok", "positive control of {attempt}: {outside:?}");
    }
}
