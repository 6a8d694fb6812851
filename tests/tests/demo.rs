//! `cargo xtask demo --once` as a user runs it, also after a run that was killed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tests::cluster::bin_dir;

fn demo(args: &[&str]) -> Command {
    let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("manifests");
    let mut command = Command::new(bin_dir().unwrap().join("culvert-demo"));
    command.arg("--bin-dir").arg(bin_dir().unwrap()).arg("--manifests").arg(manifests).args(args);
    command
}

#[test]
fn two_hundred_pages_also_after_a_killed_run() {
    let log = tempfile::tempdir().unwrap();
    let out = log.path().join("killed");
    let file = std::fs::File::create(&out).unwrap();
    let mut killed = demo(&[]).stdout(file.try_clone().unwrap()).stderr(file).stdin(Stdio::null()).spawn().unwrap();
    let page = tests::wait::until("the demo prints the page's URL", Duration::from_secs(120), || {
        let text = std::fs::read_to_string(&out).ok()?;
        text.contains("http://127.0.0.1:").then_some(())
    });
    killed.kill().unwrap();
    killed.wait().unwrap();
    page.unwrap_or_else(|e| panic!("{e}: {}", std::fs::read_to_string(&out).unwrap()));

    let output = demo(&["--once", "--output", "json"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    let summary: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert_eq!(summary["requests"], 200, "{summary}");
    assert_eq!(summary["ok"], true, "{summary}");
}
