//! What was taken out of Debian's packages and is kept: a kernel with the modules that the tests need, and the emulator.
//! Each lies in a folder that is named by the hash of what went into it and is complete when it is there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest as _, Sha256};

use super::debian::{Debian, Kernel, clean, failed, output};
use crate::Failure;

/// The suite of the emulator.
const TOOLS_SUITE: &str = "trixie";
/// The emulator, what sorts modules, and the shell of the virtual machine.
const TOOLS: [&str; 3] = ["qemu-system-x86", "kmod", "busybox-static"];

/// The folder of a kernel: `vmlinuz`, and `lib/modules/<release>`.
///
/// # Errors
/// It cannot be had.
pub fn kernel(
    cache: &Path,
    debian: &Debian,
    tools: &Path,
    kernel: &Kernel,
    wanted: &[&str],
) -> Result<PathBuf, Failure> {
    let (packages, hashes) = debian.parts(kernel)?;
    let folder = cache.join(format!("linux-{}-{}", kernel.version, short(&format!("{hashes}{wanted:?}"))));
    if folder.exists() {
        return Ok(folder);
    }
    println!("taking Linux {} from {} into {}", kernel.version, kernel.suite, folder.display());
    let scratch = cache.join("kernel.new");
    let (whole, kept) = (scratch.join("whole"), scratch.join("kept"));
    clean(&scratch)?;
    clean(&whole)?;
    debian.unpack(&packages, &whole)?;
    let release = kernel.release();
    let places = [whole.join("lib/modules"), whole.join("usr/lib/modules")].map(|place| place.join(release));
    let modules = places.iter().find(|place| place.join("kernel").is_dir());
    let modules = modules.ok_or_else(|| Failure(format!("{packages:?} have no modules")))?;
    let images = [whole.join(format!("boot/vmlinuz-{release}")), modules.join("vmlinuz")];
    let image = images.iter().find(|place| place.is_file());
    let image = image.ok_or_else(|| Failure(format!("{packages:?} have no kernel")))?;
    select(tools, modules, release, wanted, &kept)?;
    copy(image, &kept.join("vmlinuz"))?;
    fs::rename(&kept, &folder).map_err(|error| failed(&folder, &error))?;
    clean(&scratch)?;
    Ok(folder)
}

/// The folder of the emulator's packages.
///
/// # Errors
/// They cannot be had.
pub fn tools(cache: &Path, debian: &Debian) -> Result<PathBuf, Failure> {
    let folder = cache.join(format!("tools-{}", short(&debian.set(TOOLS_SUITE, &TOOLS)?)));
    if folder.exists() {
        return Ok(folder);
    }
    println!("taking QEMU and what it needs into {}", folder.display());
    let scratch = cache.join("tools.new");
    clean(&scratch)?;
    debian.unpack_set(TOOLS_SUITE, &TOOLS, &scratch)?;
    fs::rename(&scratch, &folder).map_err(|error| failed(&folder, &error))?;
    Ok(folder)
}

/// Copies the wanted modules with those that they need, uncompressed, so that the virtual machine need not do it.
fn select(tools: &Path, modules: &Path, release: &str, wanted: &[&str], kept: &Path) -> Result<(), Failure> {
    let whole = modules.ancestors().nth(3).unwrap_or(modules);
    depmod(tools, whole, release)?;
    let list = modules.join("modules.dep");
    let list = fs::read_to_string(&list).map_err(|error| failed(&list, &error))?;
    let builtin = fs::read_to_string(modules.join("modules.builtin")).unwrap_or_default();
    let mut paths = BTreeSet::new();
    for wanted in wanted {
        let line = list.lines().find(|line| line.split(':').next().is_some_and(|path| name(path) == *wanted));
        match line {
            Some(line) => paths.extend(line.split([':', ' ']).filter(|path| !path.is_empty())),
            None if builtin.lines().any(|path| name(path) == *wanted) => {}
            None => println!("{release} has no module {wanted}"),
        }
    }
    let target = kept.join("lib/modules").join(release);
    clean(&target)?;
    for list in ["modules.builtin", "modules.order", "modules.builtin.modinfo"] {
        if modules.join(list).exists() {
            copy(&modules.join(list), &target.join(list))?;
        }
    }
    for path in paths {
        let plain = path.find(".ko").map_or(path, |at| &path[..at + 3]);
        let (from, to) = (modules.join(path), target.join(plain));
        let parent = to.parent().unwrap_or(&target);
        fs::create_dir_all(parent).map_err(|error| failed(parent, &error))?;
        if plain == path {
            copy(&from, &to)?;
            continue;
        }
        let applet = match path.rsplit('.').next() {
            Some("xz") => "xzcat",
            Some("gz") => "zcat",
            _ => return Err(Failure(format!("{path}: an unknown kind of compression"))),
        };
        let out = fs::File::create(&to).map_err(|error| failed(&to, &error))?;
        let mut unpack = Command::new(tools.join("usr/bin/busybox"));
        crate::call(unpack.arg(applet).arg(&from).stdout(Stdio::from(out)))?;
    }
    depmod(tools, kept, release)
}

/// The name of a module as the kernel says it, from its path.
fn name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

fn depmod(tools: &Path, base: &Path, release: &str) -> Result<(), Failure> {
    let usr = tools.join("usr");
    let mut command = Command::new(usr.join("lib64/ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(usr.join("lib/x86_64-linux-gnu")).arg(usr.join("sbin/depmod"));
    output(command.arg("-b").arg(base).arg(release)).map(drop)
}

fn copy(from: &Path, to: &Path) -> Result<(), Failure> {
    fs::copy(from, to).map(drop).map_err(|error| failed(from, &error))
}

/// A short name for a content.
pub fn short(text: &str) -> String {
    Sha256::digest(text).iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_named_as_the_kernel_names_them() {
        assert_eq!(name("kernel/net/sched/cls_bpf.ko.xz"), "cls_bpf");
        assert_eq!(name("kernel/crypto/aesni-intel.ko"), "aesni_intel");
        assert_ne!(short("a"), short("b"));
    }
}
