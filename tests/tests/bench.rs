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
