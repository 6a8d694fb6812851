//! `cargo xtask soak`: runs the fuzz targets for long, each for its share of the time, and says how to see a failure again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::{Failure, call, cargo};

/// What is instrumented, as `cargo fuzz` has it, but for the sanitizer, which the stable compiler lacks: the coverage that
/// libFuzzer steers by. All of these are stable options.
const INSTRUMENTED: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing";
/// With `--target` the build scripts, which run on this machine, are built without the above.
fn triple() -> String {
    format!("{}-unknown-linux-gnu", std::env::consts::ARCH)
}

/// Memory that a target may use, in MiB, and seconds that one input may take: more is a failure.
const LIMITS: [&str; 2] = ["-rss_limit_mb=1024", "-timeout=25"];
/// Longest input that is tried, in bytes.
const LONGEST: &str = "-max_len=8192";

const USAGE: &str = "usage: cargo xtask soak [--minutes N] [--target T] [--keep]
  --minutes N   for all targets together (default 10)
  --target T    only this one; may be given several times
  --keep        puts what was found worth keeping into fuzz/corpus (inputs of at most 512 bytes)";

/// What the command line says.
struct Options {
    minutes: u32,
    targets: Vec<String>,
    keep: bool,
}

/// Builds the targets and runs them.
///
/// # Errors
/// Wrong usage, a failed build, or an input that breaks a target; the text says how to run it again.
pub fn run(root: &Path, args: &[String]) -> Result<(), Failure> {
    let folder = root.join("fuzz");
    let options = parse(args, &targets(&folder)?)?;
    let programs = build(root)?;
    let share =
        Duration::from_secs(u64::from(options.minutes) * 60) / u32::try_from(options.targets.len()).unwrap_or(1);
    let begun = Instant::now();
    for (done, target) in options.targets.iter().enumerate() {
        let all = options.targets.len();
        println!(
            "\n=== {target} ({} of {all}, {} s after the start, for {} s)",
            done + 1,
            begun.elapsed().as_secs(),
            share.as_secs()
        );
        fuzz(root, &programs.join(target), target, share)?;
        if options.keep {
            keep(root, &programs.join(target), target)?;
        }
    }
    println!("\nsoak: {} targets in {} s, nothing broke", options.targets.len(), begun.elapsed().as_secs());
    Ok(())
}

/// The names of all targets.
fn targets(folder: &Path) -> Result<Vec<String>, Failure> {
    let entries = fs::read_dir(folder.join("fuzz_targets")).map_err(|e| Failure(format!("fuzz/fuzz_targets: {e}")))?;
    let stem = |entry: fs::DirEntry| Some(entry.path().file_stem()?.to_str()?.to_owned());
    let mut names: Vec<String> = entries.flatten().filter_map(stem).collect();
    names.sort();
    Ok(names)
}

fn parse(args: &[String], all: &[String]) -> Result<Options, Failure> {
    let mut options = Options { minutes: 10, targets: Vec::new(), keep: false };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--minutes" => {
                let minutes = args.next().and_then(|text| text.parse().ok()).filter(|minutes| *minutes > 0);
                options.minutes = minutes.ok_or_else(|| Failure(USAGE.to_owned()))?;
            }
            "--target" => match args.next() {
                Some(target) if all.contains(target) => options.targets.push(target.clone()),
                Some(_) | None => return Err(Failure(format!("the targets are {}\n{USAGE}", all.join(", ")))),
            },
            "--keep" => options.keep = true,
            _ => return Err(Failure(USAGE.to_owned())),
        }
    }
    if options.targets.is_empty() {
        options.targets = all.to_vec();
    }
    Ok(options)
}

/// Builds all targets; the folder that they are in.
fn build(root: &Path) -> Result<PathBuf, Failure> {
    let mut command = cargo();
    command.args(["build", "--locked", "-p", "fuzz", "--bins", "--features", "libfuzzer", "--profile", "fuzz"]);
    command.args(["--target", &triple()]).env("RUSTFLAGS", INSTRUMENTED).current_dir(root);
    call(&mut command)
        .map_err(|Failure(why)| Failure(format!("{why}; libFuzzer needs a C++ compiler (apt-get install g++)")))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    Ok(target.join(triple()).join("fuzz"))
}

/// Where a target's own findings are kept between runs.
fn found(root: &Path, target: &str) -> PathBuf {
    root.join("target/fuzz-corpus").join(target)
}

fn fuzz(root: &Path, program: &Path, target: &str, share: Duration) -> Result<(), Failure> {
    let (found, broken) = (found(root, target), root.join("target/fuzz-artifacts").join(target));
    for folder in [&found, &broken] {
        fs::create_dir_all(folder).map_err(|e| Failure(format!("{}: {e}", folder.display())))?;
    }
    let mut command = Command::new(program);
    command.arg(format!("-max_total_time={}", share.as_secs().max(1))).args(LIMITS).arg(LONGEST);
    command.args(["-print_final_stats=1", "-verbosity=0"]);
    command.arg(format!("-artifact_prefix={}/", broken.display()));
    // New inputs go to the first folder; the committed ones are read.
    command.arg(&found).arg(root.join("fuzz/corpus").join(target));
    call(&mut command).map_err(|Failure(why)| {
        Failure(format!(
            "{target} is broken by an input in {}\n  ({why})\n\
             again:    {} <that file>\n\
             smaller:  {} -minimize_crash=1 -runs=10000 <that file>\n\
             to keep:  copy it to fuzz/corpus/{target}/; `cargo test -p fuzz` then fails until it is mended",
            broken.display(),
            program.display(),
            program.display(),
        ))
    })
}

/// Puts small inputs that reach what no committed one does into the committed corpus.
fn keep(root: &Path, program: &Path, target: &str) -> Result<(), Failure> {
    let mut command = Command::new(program);
    command.args(["-merge=1", "-max_len=512", "-verbosity=0"]).args(LIMITS);
    command.arg(root.join("fuzz/corpus").join(target)).arg(found(root, target));
    call(&mut command)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(args: &[&str]) -> Result<Options, Failure> {
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        parse(&args, &["a".to_owned(), "b".to_owned()])
    }

    #[test]
    fn the_command_line_is_read() {
        let all = options(&[]).unwrap();
        assert_eq!((all.minutes, all.targets.len(), all.keep), (10, 2, false));
        let some = options(&["--minutes", "3", "--target", "b", "--keep"]).unwrap();
        assert_eq!((some.minutes, some.targets, some.keep), (3, vec!["b".to_owned()], true));
        for wrong in [&["--minutes"][..], &["--minutes", "0"], &["--target", "c"], &["x"]] {
            assert!(options(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn there_are_targets() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        assert!(targets(&root.join("fuzz")).unwrap().len() > 10);
    }
}
