//! `cargo xtask bench` as a user runs it: the shape of its JSON, its comparison, its exit codes.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tests::cluster::bin_dir;

fn bench(args: &[&str]) -> Output {
    let bins = bin_dir().unwrap();
    Command::new(bins.join("culvert-bench")).arg("--bin-dir").arg(&bins).args(args).output().unwrap()
}

fn figure<'r>(report: &'r Value, measurement: &str, name: &str) -> &'r Value {
    let of = |list: &'r Value, name: &str| {
        let found = list.as_array().unwrap().iter().find(|one| one["name"] == name);
        found.unwrap_or_else(|| panic!("no {name} in {list}"))
    };
    of(&of(&report["measurements"], measurement)["figures"], name)
}

/// A side of a figure that ran once: its value is the median and all the rest.
fn once(side: &Value) -> f64 {
    let value = side["median"].as_f64().unwrap_or_else(|| panic!("{side}"));
    assert_eq!(*side, json!({"median": value, "min": value, "max": value, "runs": [value]}));
    value
}

fn compared(result: &Path, earlier: &Path) -> (Option<i32>, String) {
    let output = bench(&["--read", result.to_str().unwrap(), "--compare", earlier.to_str().unwrap()]);
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn a_quick_bench_and_its_comparison() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.json");
    let output = bench(&["--quick", "--only", "bulk-1,keepalive-1", "--output", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");

    let text = std::fs::read_to_string(&path).unwrap();
    let mut report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["schema"], 1);
    assert_eq!(report["settings"], json!({"runs": 1, "seconds": 1.0, "mesh": "culvert", "peer": null}));
    assert!(report["machine"]["cpus"].as_u64() > Some(0), "{report}");
    assert_eq!(report["measurements"].as_array().map(Vec::len), Some(2), "{report}");
    for (measurement, name, unit) in [("bulk-1", "throughput", "bytes/s"), ("keepalive-1", "requests", "1/s")] {
        let found = figure(&report, measurement, name);
        assert_eq!((&found["unit"], &found["better"]), (&json!(unit), &json!("higher")));
        let (plain, mesh) = (once(&found["plain"]), once(&found["mesh"]));
        assert!(mesh > 0.0 && plain > 0.0, "{found}");
        // The parser may be off by the last bit.
        let off = found["ratio"].as_f64().unwrap() * plain / mesh - 1.0;
        assert!(off.abs() < 1e-9, "{found}");
    }
    for measurement in ["bulk-1", "keepalive-1"] {
        let cpu = figure(&report, measurement, "cpu.proxies");
        assert_eq!(cpu["plain"], Value::Null);
        assert!(once(&cpu["mesh"]) > 0.0, "the proxies carried it: {cpu}");
    }

    let (code, said) = compared(&path, &path);
    assert_eq!(code, Some(0), "{said}");
    let against = said.split_once("Against ").unwrap().1;
    let changes: Vec<&str> = against.lines().filter(|l| l.trim_start().starts_with(['b', 'k'])).collect();
    assert!(changes.len() >= 6 && changes.iter().all(|l| l.trim_end().ends_with("none")), "{against}");
    assert!(against.contains("No ratio got worse"), "{against}");

    // The same, but earlier the ratio was twice as good.
    let ratio = report["measurements"][0]["figures"][0]["ratio"].as_f64().unwrap();
    report["measurements"][0]["figures"][0]["ratio"] = json!(ratio * 2.0);
    let better = folder.path().join("better.json");
    std::fs::write(&better, report.to_string()).unwrap();
    let (code, said) = compared(&path, &better);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("WORSE") && said.contains("1 ratio got worse"), "{said}");
}

#[test]
fn wrong_usage_is_told_apart_from_a_bad_result() {
    assert_eq!(bench(&["--only", "bulk-99"]).status.code(), Some(2));
    assert_eq!(bench(&["--read", "/nonexistent.json"]).status.code(), Some(2));
    let list = bench(&["--list"]);
    assert_eq!(list.status.code(), Some(0));
    assert!(String::from_utf8(list.stdout).unwrap().lines().any(|l| l.starts_with("memory-workloads ")));
    let help = String::from_utf8(bench(&["--help"]).stdout).unwrap();
    assert!(help.contains("Exit codes:") && help.contains("--compare before.json"), "{help}");
}

#[test]
fn a_small_bench_of_the_control_plane() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.json");
    // More clients than one may have streams.
    let size = ["--pods", "200", "--services", "20", "--nodes", "4", "--clients", "20", "--changes", "10"];
    let output = bench(&[&["control"], &size[..], &["--output", path.to_str().unwrap()]].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("one change to all clients, median"), "{said}");

    let report: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let runs = report["runs"].as_array().unwrap();
    let sizes: Vec<_> = runs.iter().map(|run| (run["pods"].as_u64(), run["clients"].as_u64())).collect();
    assert_eq!(sizes, [(Some(20), Some(20)), (Some(200), Some(20))], "{report}");
    for run in runs {
        let figure = |path: &str| run.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("{path}: {run}"));
        // Each of the clients was sent all of it, with at least the names.
        assert!(figure("/synced/bytes") > figure("/pods") * figure("/clients") * 50.0, "{run}");
        assert!(figure("/loaded/resident") > 1e6 && figure("/synced/peak") >= figure("/loaded/resident"), "{run}");
        assert!(figure("/changed/p50_ms") > 0.0 && figure("/changed/p50_ms") <= figure("/changed/p99_ms"), "{run}");
        assert!(figure("/changed/p99_ms") <= figure("/changed/max_ms"), "{run}");
    }
}

#[test]
fn a_bench_of_the_control_plane_without_one_fails() {
    let nowhere = tempfile::tempdir().unwrap();
    let bins = bin_dir().unwrap();
    let mut command = Command::new(bins.join("culvert-bench"));
    let output = command.arg("--bin-dir").arg(nowhere.path()).args(["control", "--pods", "100"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8(output.stderr).unwrap().contains("culvertd"), "it is named");
}

#[test]
fn goals_of_the_control_plane_need_both_runs() {
    // With one run nothing says what a change costs with more pods.
    let output = bench(&["control", "--goals", "--once"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}
