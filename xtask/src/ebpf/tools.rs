//! The tools that build eBPF with a stable compiler, each set up once in the cache folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::output;
use crate::build::QUICK;
use crate::{Failure, cache, cargo};

/// Links eBPF with the compiler's own LLVM.
pub const LINKER_VERSION: &str = "0.10.4";
/// Debian suites that may have the source of the core library in the compiler's version, likeliest first.
const SUITES: [&str; 3] = ["trixie-backports", "sid", "trixie"];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Everything that a build needs.
pub struct Tools {
    /// `rustc --version`.
    pub compiler: String,
    /// Where the compiler's own libraries lie.
    pub sysroot: PathBuf,
    /// The source of the core library, where it is not in the sysroot.
    pub library: Option<PathBuf>,
    linker: PathBuf,
}

impl Tools {
    /// `PATH` with the linker in front.
    pub fn path(&self) -> Result<std::ffi::OsString, Failure> {
        let old = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::iter::once(self.linker.clone()).chain(std::env::split_paths(&old));
        std::env::join_paths(folders).map_err(|error| Failure(error.to_string()))
    }
}

/// Installs what is missing.
///
/// # Errors
/// In one line, what cannot be had.
pub fn set_up(root: &Path) -> Result<Tools, String> {
    let compiler = output(rustc().arg("--version").current_dir(root))?;
    let sysroot = PathBuf::from(output(rustc().args(["--print", "sysroot"]).current_dir(root))?);
    let version = compiler.split(' ').nth(1).unwrap_or_default().to_owned();
    let library = library(&sysroot, &version)?;
    let linker = linker(&sysroot)?;
    Ok(Tools { compiler, sysroot, library, linker })
}

/// Where the source of the core library lies in a sysroot that has it.
pub fn library_of(sysroot: &Path) -> PathBuf {
    sysroot.join("lib/rustlib/src/rust/library")
}

/// Where cargo keeps what it downloads.
pub fn cargo_home() -> PathBuf {
    if let Some(folder) = std::env::var_os("CARGO_HOME") {
        return folder.into();
    }
    let home = std::env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from);
    home.join(".cargo")
}

fn rustc() -> Command {
    Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
}

fn linker(sysroot: &Path) -> Result<PathBuf, String> {
    let folder = cache().join(format!("bpf-linker-{LINKER_VERSION}"));
    let binaries = folder.join("bin");
    if !binaries.join("bpf-linker").exists() {
        println!("setting up bpf-linker {LINKER_VERSION} in {} (once, a few minutes)", folder.display());
        let mut install = cargo();
        install
            .args(["install", "bpf-linker", "--locked", "--version", LINKER_VERSION, "--no-default-features"])
            .args(["--features", "rust-llvm-22", "--root"])
            .arg(&folder)
            .envs(QUICK)
            .env("LD_LIBRARY_PATH", sysroot.join("lib"));
        crate::call(&mut install).map_err(|Failure(why)| format!("bpf-linker cannot be installed ({why})"))?;
    }
    Ok(binaries)
}

/// The source of the core library: the sysroot's own, or a copy in the cache folder.
fn library(sysroot: &Path, version: &str) -> Result<Option<PathBuf>, String> {
    if library_of(sysroot).join("core").exists() {
        return Ok(None);
    }
    let cached = cache().join(format!("rust-src-{version}")).join("library");
    if cached.join("core").exists() {
        return Ok(Some(cached));
    }
    println!("setting up the source of Rust's core library {version} (once)");
    let by_rustup = output(Command::new("rustup").args(["component", "add", "rust-src"]));
    if by_rustup.is_ok() && library_of(sysroot).join("core").exists() {
        return Ok(None);
    }
    let by_debian = from_debian(version, &cached);
    match (by_rustup, by_debian) {
        (_, Ok(())) => Ok(Some(cached)),
        (rustup, Err(debian)) => {
            let rustup = rustup.err().unwrap_or_else(|| String::from("rustup installed it elsewhere"));
            Err(format!("the source of Rust's core library cannot be had (rustup: {rustup}; Debian: {debian})"))
        }
    }
}

/// Takes it out of Debian's package `rust-src` of exactly the compiler's version, with package lists of our own, so
/// that nothing of the system is changed.
fn from_debian(version: &str, library: &Path) -> Result<(), String> {
    if !Path::new(KEYRING).exists() {
        return Err(format!("there is no {KEYRING}"));
    }
    let scratch = cache().join(format!("rust-src-{version}.{}", std::process::id()));
    let result = SUITES.iter().map(|suite| from_suite(suite, version, &scratch)).reduce(Result::or);
    let unpacked = result.unwrap_or_else(|| Err(String::from("no suite")));
    let placed = unpacked.and_then(|found| {
        let parent = library.parent().unwrap_or(library);
        let io = |error: std::io::Error| format!("{}: {error}", library.display());
        fs::create_dir_all(parent).map_err(io)?;
        match fs::rename(&found, library) {
            // Another build was quicker.
            Err(_) if library.join("core").exists() => Ok(()),
            other => other.map_err(io),
        }
    });
    // What is left is only litter.
    let _ = fs::remove_dir_all(&scratch);
    placed
}

fn from_suite(suite: &str, version: &str, scratch: &Path) -> Result<PathBuf, String> {
    let folder = scratch.join(suite);
    let io = |error: std::io::Error| format!("{}: {error}", folder.display());
    for part in ["state/lists/partial", "cache/archives/partial", "out"] {
        fs::create_dir_all(folder.join(part)).map_err(io)?;
    }
    let sources = folder.join("sources.list");
    fs::write(&sources, format!("deb [signed-by={KEYRING}] http://deb.debian.org/debian {suite} main\n"))
        .map_err(io)?;
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        for (name, value) in [
            ("Dir::Etc::sourcelist", sources.clone()),
            ("Dir::Etc::sourceparts", PathBuf::from("/dev/null")),
            ("Dir::State", folder.join("state")),
            ("Dir::Cache", folder.join("cache")),
        ] {
            command.arg("-o").arg(format!("{name}={}", value.display()));
        }
        command.args(["-q", "-o", "APT::Sandbox::User=root"]).args(arguments).current_dir(folder.join("out"));
        output(&mut command)
    };
    apt(&["update"])?;
    apt(&["download", &format!("rust-src={version}+*")])?;
    let package = fs::read_dir(folder.join("out")).map_err(io)?.filter_map(Result::ok).map(|entry| entry.path()).next();
    let package = package.ok_or_else(|| String::from("apt-get download left no file"))?;
    unpack(&package, &format!("./usr/src/rustc-{version}/library"), &folder)?;
    let library = folder.join(format!("usr/src/rustc-{version}/library"));
    if library.join("core").exists() { Ok(library) } else { Err(String::from("the package has no library/core")) }
}

/// Unpacks one folder of a Debian package.
fn unpack(package: &Path, member: &str, into: &Path) -> Result<(), String> {
    let mut files = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("dpkg-deb: {error}"))?;
    let input = files.stdout.take().map_or_else(Stdio::null, Stdio::from);
    let unpacked = output(Command::new("tar").args(["-x", "-C"]).arg(into).arg(member).stdin(input));
    // `tar` says what matters; here only the process is reaped.
    let _ = files.wait();
    unpacked.map(drop)
}
