//! The process that reads what pods and peers send holds no privilege: as the kernel reports it of the live process,
//! and as attempts inside its system-call filter show.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::Deserialize;
use tests::Error;
use tests::cluster::{Cluster, bin_dir};
use tests::seccomp;

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

/// The probe's filter is the live proxy's, instruction by instruction, as the kernel has both.
#[test]
fn inside_the_live_filter_every_attempt_fails() -> Result<(), Error> {
    let cluster = Cluster::builder().nodes(1).start()?;
    let live = seccomp::filters(cluster.node(1)?.proxy()?.pid().expect("the proxy runs"))?;
    assert!(!live.is_empty(), "the live proxy has no filter");

    let mut command = Command::new(bin_dir()?.join("ztunnel"));
    command.args(["jail-probe", "--after-stdin"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    tests::wait::until("the probe is in its jail", Duration::from_secs(20), || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
        status.contains(&format!("Seccomp_filters:\t{}\n", live.len())).then_some(())
    })
    .unwrap();
    let probed = seccomp::filters(child.id()).unwrap();
    drop(child.stdin.take());
    let inside: Probe = serde_json::from_slice(&child.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(probed, live);
    assert!(inside.jailed);
    for attempt in ATTEMPTS {
        assert_eq!(inside.attempts[attempt], "EPERM", "{inside:?}");
    }
    Ok(())
}

#[test]
fn outside_the_filter_root_succeeds() {
    let outside = probe(&["--unjailed"]);
    assert!(!outside.jailed);
    for attempt in ATTEMPTS {
        assert_eq!(outside.attempts[attempt], "ok", "positive control of {attempt}: {outside:?}");
    }
}
