//! The proxy's jail, tried from inside: every way out is refused; and from outside, where they work for root.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::process::Command;

fn probe(arguments: &[&str]) -> (bool, BTreeMap<String, String>) {
    let output = Command::new(env!("CARGO_BIN_EXE_ztunnel")).arg("jail-probe").args(arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let attempts =
        serde_json::from_value(answer["attempts"].clone()).unwrap_or_else(|error| panic!("{error}: {answer}"));
    (answer["jailed"].as_bool().unwrap(), attempts)
}

#[test]
fn every_way_out_is_refused() {
    let (jailed, attempts) = probe(&[]);
    assert!(jailed);
    assert_eq!(attempts.len(), 11);
    for (attempt, answer) in attempts {
        assert_eq!(answer, "EPERM", "{attempt}");
    }
}

/// Meaningful for root only: others may do next to nothing outside either.
#[test]
fn outside_they_work_for_root() {
    let (jailed, attempts) = probe(&["--unjailed"]);
    assert!(!jailed);
    // Needs no privilege, so it shows that a refusal inside is the filter's doing.
    assert_eq!(attempts["af_netlink"], "ok");
    assert_eq!(attempts["fork"], "ok");
    assert_eq!(attempts["execve"], "ok");
    if std::env::var("USER").is_ok_and(|user| user == "root") || std::fs::read("/proc/1/environ").is_ok() {
        for attempt in ["setns", "unshare", "bpf", "ptrace", "mount", "af_packet", "raw_socket"] {
            assert_eq!(attempts[attempt], "ok", "{attempt}");
        }
    }
}
