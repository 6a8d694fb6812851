//! `cargo xtask ebpf`: rebuilds the committed eBPF object, or with `--check` compares it with its sources.
//!
//! Users need none of this: `cargo build` embeds the committed object. Rebuilding takes bpf-linker and the source of Rust's core
//! library; both are kept in the cache folder, the second comes from rustup or, where rustup cannot download, from Debian.

mod elf;
mod tools;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest as _, Sha256};

use crate::{Failure, call, cargo};
use tools::Tools;

/// The package of the programs.
const PACKAGE: &str = "ztunnel-ebpf/program";
/// The committed object.
const OBJECT: &str = "ztunnel-ebpf/object/capture.bpf.o";
/// What it was built from.
const RECORD: &str = "ztunnel-ebpf/object/capture.bpf.o.txt";
/// What goes into the object: folders are taken with everything below them.
const SOURCES: &[&str] = &[
    "ztunnel-ebpf/src",
    "ztunnel-ebpf/program/src",
    "ztunnel-ebpf/program/Cargo.toml",
    "ztunnel-ebpf/program/Cargo.lock",
];
const TARGET: &str = "bpfel-unknown-none";
/// Compiler flags, beside those that take paths out of the object.
const FLAGS: &[&str] = &["-Clinker=bpf-linker", "-Cdebuginfo=2", "-Clink-arg=--btf"];

/// Rebuilds (no arguments, or `--output FILE` to leave the committed object alone), or checks (`--check`).
///
/// # Errors
/// A tool could not be set up, the build failed, or the object is not what its sources say.
pub fn run(root: &Path, args: &[String]) -> Result<(), Failure> {
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => rebuild(root),
        ["--check"] => check(root),
        ["--output", file] => {
            let object = build(root, &tools::set_up(root).map_err(Failure)?)?;
            write(Path::new(file), &object)
        }
        _ => Err(Failure(String::from("usage: cargo xtask ebpf [--check | --output FILE]"))),
    }
}

fn rebuild(root: &Path) -> Result<(), Failure> {
    let tools = tools::set_up(root).map_err(Failure)?;
    let object = build(root, &tools)?;
    let record = Record { sources: hash_of_sources(root)?, compiler: tools.compiler, object: hash(&object) };
    write(&root.join(OBJECT), &object)?;
    write(&root.join(RECORD), record.to_text().as_bytes())?;
    println!("{OBJECT}: {} bytes", object.len());
    Ok(())
}

fn check(root: &Path) -> Result<(), Failure> {
    let record = Record::parse(&read_text(&root.join(RECORD))?)?;
    let object = read(&root.join(OBJECT))?;
    if record.object != hash(&object) {
        return Err(Failure(format!("{OBJECT} is not the object that {RECORD} describes; run `cargo xtask ebpf`")));
    }
    if record.sources != hash_of_sources(root)? {
        return Err(Failure(format!("{OBJECT} was built from other sources; run `cargo xtask ebpf`")));
    }
    println!("{OBJECT} is recorded as built from these sources");
    let tools = match tools::set_up(root) {
        Ok(tools) if tools.compiler == record.compiler => tools,
        Ok(tools) => {
            println!("not rebuilt: it was built by {}, this is {}", record.compiler, tools.compiler);
            return Ok(());
        }
        Err(why) => {
            println!("not rebuilt: {why}");
            return Ok(());
        }
    };
    let rebuilt = build(root, &tools)?;
    if rebuilt == object {
        println!("rebuilt: the same, byte for byte");
        return Ok(());
    }
    let differing = elf::difference(&object, &rebuilt).unwrap_or_else(|error| error.to_string());
    Err(Failure(format!("{OBJECT} differs from what its sources give ({differing}); run `cargo xtask ebpf`")))
}

/// Builds the programs and strips them. The result depends on sources and compiler alone, not on where they lie.
fn build(root: &Path, tools: &Tools) -> Result<Vec<u8>, Failure> {
    let package = root.join(PACKAGE);
    let target = root.join("target/ebpf");
    // The registry must be there before its paths can be mapped.
    call(cargo().args(["fetch", "--quiet", "--locked"]).current_dir(&package))?;
    let mut command = cargo();
    command
        .args(["build", "--release", "--locked", "--target", TARGET, "-Zbuild-std=core", "--target-dir"])
        .arg(&target)
        .current_dir(&package)
        .env("CARGO_ENCODED_RUSTFLAGS", flags(root, tools)?.join("\x1f"))
        .env("RUSTC_BOOTSTRAP", "1")
        .env("PATH", tools.path()?)
        .env("LD_LIBRARY_PATH", tools.sysroot.join("lib"));
    for variable in ["RUSTFLAGS", "CARGO_TARGET_DIR", "CARGO_BUILD_TARGET", "RUSTC_WRAPPER"] {
        command.env_remove(variable);
    }
    if let Some(library) = &tools.library {
        command.env("__CARGO_TESTS_ONLY_SRC_ROOT", library);
    }
    call(&mut command)?;
    let linked = read(&target.join(TARGET).join("release/capture"))?;
    elf::strip(&linked).map_err(|error| Failure(format!("cannot strip the object: {error}")))
}

/// The compiler flags: paths of this machine are replaced, since line information carries them.
fn flags(root: &Path, tools: &Tools) -> Result<Vec<String>, Failure> {
    let mut flags: Vec<String> = FLAGS.iter().map(|&flag| flag.to_owned()).collect();
    let mut map = |from: &Path, to: &str| flags.push(format!("--remap-path-prefix={}={to}", from.display()));
    map(root, "/culvert");
    map(&tools.library.clone().unwrap_or_else(|| tools::library_of(&tools.sysroot)), "/rust/library");
    let registry = tools::cargo_home().join("registry/src");
    for entry in fs::read_dir(&registry).map_err(|error| failed(&registry, &error))? {
        map(&entry.map_err(|error| failed(&registry, &error))?.path(), "/registry");
    }
    Ok(flags)
}

/// What is written beside the object.
struct Record {
    sources: String,
    compiler: String,
    object: String,
}

impl Record {
    fn to_text(&self) -> String {
        format!(
            "What capture.bpf.o was built from. Written by `cargo xtask ebpf`, compared by `cargo xtask ebpf --check`.\n\
             sources: {}\ncompiler: {}\nobject: {}\n",
            self.sources, self.compiler, self.object
        )
    }

    fn parse(text: &str) -> Result<Self, Failure> {
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            line.map(str::to_owned).ok_or_else(|| Failure(format!("{RECORD} has no line `{name}: `")))
        };
        Ok(Self { sources: field("sources")?, compiler: field("compiler")?, object: field("object")? })
    }
}

/// The hash of everything that goes into the object: names and contents of the sources, and how they are built.
fn hash_of_sources(root: &Path) -> Result<String, Failure> {
    let mut files = Vec::new();
    for source in SOURCES {
        collect(&root.join(source), &mut files)?;
    }
    files.sort();
    let mut digest = Sha256::new();
    digest.update(format!("{TARGET} {FLAGS:?} {}\n", tools::LINKER_VERSION));
    for file in files {
        let content = read(&file)?;
        let name = file.strip_prefix(root).unwrap_or(&file);
        digest.update(format!("{} {}\n", name.display(), content.len()));
        digest.update(content);
    }
    Ok(hex(&digest.finalize()))
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> Result<(), Failure> {
    if path.is_dir() {
        for entry in fs::read_dir(path).map_err(|error| failed(path, &error))? {
            collect(&entry.map_err(|error| failed(path, &error))?.path(), files)?;
        }
    } else {
        files.push(path.to_owned());
    }
    Ok(())
}

fn hash(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    fs::read(path).map_err(|error| failed(path, &error))
}

fn read_text(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|error| failed(path, &error))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    fs::write(path, bytes).map_err(|error| failed(path, &error))
}

fn failed(path: &Path, error: &std::io::Error) -> Failure {
    Failure(format!("{}: {error}", path.display()))
}

/// The standard output of a command, if it succeeds.
fn output(command: &mut Command) -> Result<String, String> {
    let shown = format!("{command:?}").replace('"', "");
    let done = command.output().map_err(|error| format!("{shown}: {error}"))?;
    if done.status.success() {
        Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned())
    } else {
        let why = String::from_utf8_lossy(&done.stderr);
        Err(format!("{shown}: {}", why.lines().last().unwrap_or("failed")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_object_is_recorded_as_built_from_these_sources() {
        let root = crate::root();
        let record = Record::parse(&read_text(&root.join(RECORD)).unwrap()).unwrap();
        assert_eq!(record.object, hash(&read(&root.join(OBJECT)).unwrap()), "another object than recorded");
        assert_eq!(record.sources, hash_of_sources(&root).unwrap(), "run `cargo xtask ebpf`");
    }

    #[test]
    fn record_round_trips() {
        let record = Record { sources: "aa".into(), compiler: "rustc 1.95.0 (x)".into(), object: "bb".into() };
        let parsed = Record::parse(&record.to_text()).unwrap();
        assert_eq!((parsed.sources, parsed.compiler, parsed.object), (record.sources, record.compiler, record.object));
        assert!(Record::parse("sources: aa\n").is_err());
    }
}
