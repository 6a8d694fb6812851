//! Every input that is kept in `corpus/` goes through its target again: seeds, and what the fuzzer found worth keeping.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use fuzz::TARGETS;

fn here(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)
}

/// The names in a folder, without their ending.
fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

#[test]
fn every_target_has_a_program_and_a_corpus() {
    let targets: BTreeSet<String> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    assert_eq!(targets.len(), TARGETS.len());
    assert_eq!(names(&here("fuzz_targets")), targets);
    assert_eq!(names(&here("corpus")), targets);
}

#[test]
fn every_kept_input_is_taken_or_refused_in_order() {
    let mut failed = Vec::new();
    for target in TARGETS {
        let mut inputs: Vec<_> =
            fs::read_dir(here("corpus").join(target.name)).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(inputs.len() > 1, "{} has no corpus", target.name);
        inputs.sort();
        for path in inputs {
            let input = fs::read(&path).unwrap();
            assert!(input.len() <= 8 << 10, "{} is too large to be kept", path.display());
            if catch_unwind(AssertUnwindSafe(|| (target.run)(&input))).is_err() {
                failed.push(path);
            }
        }
        (target.run)(&[]);
    }
    assert!(failed.is_empty(), "these inputs break their target: {failed:#?}");
}
