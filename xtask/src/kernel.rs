//! `cargo xtask test --kernel <version>`: the kernel tests and a short end-to-end suite on another kernel, in a virtual
//! machine. Kernel and emulator come from Debian's packages and lie in the cache folder; the machine needs neither KVM nor
//! root here, and nothing of the system is changed.

mod cpio;
pub mod debian;
mod image;
mod judge;
mod machine;
pub mod store;
mod suite;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::build;
use crate::{Failure, cache};
use debian::{Debian, Kernel, failed};
use image::Image;
use judge::Judge;
use machine::Machine;

/// The first process of the virtual machine.
const INIT: &str = "tests/kernels/init";
/// Modules that the tests need, where they are not built in.
const MODULES: &str = "tests/kernels/modules";
const USAGE: &str = "usage: cargo xtask test --kernel <version | list> [--short] [<part> ...]";
/// How long the virtual machine may run.
const LIMIT: Duration = Duration::from_mins(20);
const LIMIT_SHORT: Duration = Duration::from_mins(12);

/// Runs the suite on the newest kernel of that version, or with `list` shows the kernels that can be had.
///
/// # Errors
/// No such kernel, a download or build that failed, or a failure on that kernel; the end of its console has been shown.
pub fn run(root: &Path, version: &str, args: &[String]) -> Result<(), Failure> {
    if version.is_empty() || version.starts_with('-') {
        return Err(Failure(USAGE.to_owned()));
    }
    let (options, named): (Vec<_>, Vec<_>) = args.iter().cloned().partition(|arg| arg.starts_with('-'));
    let short = options.iter().any(|option| option == "--short");
    if options.iter().any(|option| option != "--short") {
        return Err(Failure(USAGE.to_owned()));
    }
    if std::env::consts::ARCH != "x86_64" {
        return Err(Failure(format!(
            "test programs of {} cannot run on Debian's kernels for amd64",
            std::env::consts::ARCH
        )));
    }
    let started = Instant::now();
    let cache = cache().join("kernels");
    let debian = Debian::open(&cache, "amd64")?;
    let kernels = debian.kernels()?;
    if version == "list" {
        return list(&kernels);
    }
    let asked = kernels.iter().rfind(|kernel| kernel.is(version));
    let kernel =
        asked.ok_or_else(|| Failure(format!("Debian has no kernel {version}: `cargo xtask test --kernel list`")))?;
    let text = fs::read_to_string(root.join(MODULES)).map_err(|error| failed(Path::new(MODULES), &error))?;
    let modules: Vec<&str> = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    let tools = store::tools(&cache, &debian)?;
    let folder = store::kernel(&cache, &debian, &tools, kernel, &modules)?;
    // Others may download while this machine runs.
    drop(debian);

    let programs = build::programs_and_tests(root)?;
    let suite = suite::build(root, &programs, short, &named)?;
    let work = programs.join("kernels").join(format!("{}-{}", kernel.version, std::process::id()));
    fs::create_dir_all(&work).map_err(|error| failed(&work, &error))?;
    let limit = if short { LIMIT_SHORT } else { LIMIT };
    let image = Image {
        tools: &tools,
        kernel: &folder,
        programs: &suite.programs,
        init: &root.join(INIT),
        texts: &[
            ("culvert/suite", suite.script),
            ("culvert/modules", modules.join("\n") + "\n"),
            ("culvert/limit", format!("{}\n", limit.as_secs())),
        ],
        scratch: &work,
    };
    let initramfs = work.join("initramfs");
    let size = image.write(&initramfs)?;
    println!("Linux {}: booting with an image of {} MiB", kernel.version, size >> 20);
    let console = programs.join("kernels").join(format!("console-{}.log", kernel.version));
    let machine = Machine { tools, kernel: folder.join("vmlinuz"), initramfs, console, limit };
    let mut judge = Judge::default();
    let verdict = machine.run(&mut judge);
    // What is left is only litter.
    let _ = fs::remove_dir_all(&work);
    let took = started.elapsed().as_secs();
    verdict.map_err(|Failure(why)| Failure(format!("Linux {}: {why} (after {took} s)", kernel.version)))?;
    println!("Linux {}: passed, {} tests, {took} s", kernel.version, judge.total());
    Ok(())
}

fn list(kernels: &[Kernel]) -> Result<(), Failure> {
    for kernel in kernels {
        println!("{:24} {}", kernel.version, kernel.suite);
    }
    Ok(())
}
