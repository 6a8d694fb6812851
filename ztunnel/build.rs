//! Chooses the eBPF object that the agent embeds: the committed one, which needs nothing but this checkout, or, with
//! `CULVERT_BUILD_EBPF=1`, one built now from the sources by `cargo xtask ebpf`.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-env-changed=CULVERT_BUILD_EBPF");
    let manifest = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| String::from("."));
    let root = Path::new(&manifest).join("..");
    let committed = root.join("ztunnel-ebpf/object/capture.bpf.o");
    let object = if std::env::var_os("CULVERT_BUILD_EBPF").is_some_and(|value| value == "1") {
        println!("cargo::rerun-if-changed={}", root.join("ztunnel-ebpf").display());
        match build(&root) {
            Ok(object) => object,
            Err(why) => {
                println!("cargo::error=CULVERT_BUILD_EBPF=1: {why}");
                return;
            }
        }
    } else {
        committed
    };
    println!("cargo::rerun-if-changed={}", object.display());
    println!("cargo::rustc-env=CULVERT_EBPF_OBJECT={}", object.display());
}

/// Runs the task in a target folder of its own: the one of this build is locked.
fn build(root: &Path) -> Result<std::path::PathBuf, String> {
    let output = std::env::var("OUT_DIR").map_err(|error| error.to_string())?;
    let object = Path::new(&output).join("capture.bpf.o");
    let status = Command::new(std::env::var("CARGO").unwrap_or_else(|_| String::from("cargo")))
        .current_dir(root)
        .args(["run", "--quiet", "--package", "xtask", "--target-dir"])
        .arg(Path::new(&output).join("xtask"))
        .args(["--", "ebpf", "--output"])
        .arg(&object)
        .status()
        .map_err(|error| format!("cannot start cargo: {error}"))?;
    if status.success() { Ok(object) } else { Err(format!("`cargo xtask ebpf` failed ({status})")) }
}
