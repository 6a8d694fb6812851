//! What is shipped in `manifests/`: how the mesh's pods are held, and what their accounts may do.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod pods;
mod rights;

use std::fs;
use std::path::Path;

use serde_json::Value;

/// The objects of a folder, in the order in which they are applied.
fn objects(folder: &str) -> Vec<Value> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests").join(folder);
    let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let read = |path: &Path| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        tests::kube::parse(&name, &fs::read_to_string(path).unwrap()).unwrap()
    };
    paths.iter().flat_map(|path| read(path)).collect()
}

fn text<'o>(object: &'o Value, at: &str) -> &'o str {
    object.pointer(at).and_then(Value::as_str).unwrap_or_else(|| panic!("no {at} in {object:#}"))
}
