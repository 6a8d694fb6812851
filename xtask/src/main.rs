//! The project's tasks, `cargo xtask <task>`: each calls the tools and the programs of the checkout and links none of
//! its components, so that it is built in seconds on a fresh machine.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command for people")]

mod build;
mod cluster;
mod demo;
mod deny;
mod ebpf;
mod kernel;
mod kubernetes;
mod prerequisites;
mod soak;
mod test;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const HELP: &str = "\
The project's tasks.

Usage: cargo xtask <task> [options]

Tasks:
  demo    Build everything, start the mesh with the Bookinfo application on two nodes made of network namespaces
          --once            200 page requests, checks and a summary, then exit 0 or 1
          --output json     the summary as JSON
  test    Build everything and run every test: unit, property, kernel and namespace tests (needs root)
          <filter>          only the tests whose name contains it
          --kernel <version> [--short] [<part> ...]
                            instead, the kernel tests and some end-to-end tests on that kernel (6.1, 6.12, ...), booted
                            in QEMU without KVM; both come from Debian's packages and need no root
          --kernel list     the kernels that can be had
  bench   Compare the mesh with plain TCP on this machine, in release build
          --help            its own options: --output, --compare, --peer, --only, --quick
          control [--full]  instead, culvertd with a generated cluster of 10,000 pods (100,000) and 100 clients (1,000)
  cluster A real Kubernetes on this machine: etcd, control plane, nodes with kubelet and containerd in namespaces
          up [--nodes N]    starts it and prints its KUBECONFIG
          load-images       images of the programs in the checkout, onto every node
          status            nodes, components, process ids
          down              ends it and removes everything, also after a crash
          programs          prints the folder of Kubernetes' programs, built once with Go ($KUBERNETES_BIN_DIR instead)
  soak    Run the fuzz targets for long (needs g++)
          --minutes N       for all of them together (default 10)
          --target T        only this one
          --keep            put what was found worth keeping into fuzz/corpus
  ebpf    Rebuild the committed eBPF object; sets its tools up in the cache folder
          --check           compare the object with its sources instead
  deny    Licences, bans and sources of the dependencies (cargo-deny, set up in the cache folder)
  tidy    The rules of the house: dependency directions, file sizes, module docs, where `unsafe` may stand
  help    This text

Examples:
  cargo xtask demo
  cargo xtask demo --once --output json
  cargo xtask test two_nodes
  cargo xtask bench --output bench.json
  cargo xtask cluster up && export KUBECONFIG=/run/culvert-cluster/culvert/kubeconfig

Tools are kept in $CULVERT_CACHE (default ~/.cache/culvert). Exit codes: 0 done, 1 failed, 2 wrong usage.
";

/// Why a task failed: the text for the user.
#[derive(Debug)]
pub struct Failure(pub String);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (task, rest) = args.split_first().map_or(("help", &[][..]), |(t, r)| (t.as_str(), r));
    let root = root();
    let done = match task {
        "demo" => demo::run(&root, rest),
        "test" => test::run(&root, rest),
        "bench" => demo::bench(&root, rest),
        "cluster" => cluster::run(&root, rest),
        "soak" => soak::run(&root, rest),
        "ebpf" => ebpf::run(&root, rest),
        "deny" => deny::run(&root),
        "tidy" => tidy::run(&root),
        "help" | "--help" | "-h" => {
            print!("{HELP}");
            Ok(())
        }
        other => {
            eprintln!("xtask: there is no task `{other}`\n\n{HELP}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(why)) => {
            eprintln!("xtask {task}: {why}");
            ExitCode::FAILURE
        }
    }
}

/// The checkout, wherever the command was started.
fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

/// Where tools that are built once are kept, by name and version.
fn cache() -> PathBuf {
    if let Some(folder) = std::env::var_os("CULVERT_CACHE") {
        return folder.into();
    }
    let home = std::env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from);
    home.join(".cache/culvert")
}

/// Runs a command in the foreground, its output shown.
///
/// # Errors
/// The command could not be started, or failed; the text names it.
fn call(command: &mut Command) -> Result<(), Failure> {
    let shown = format!("{command:?}").replace('"', "");
    let status = command.status().map_err(|e| Failure(format!("{shown}: {e}")))?;
    if status.success() { Ok(()) } else { Err(Failure(format!("{shown}: {status}"))) }
}

/// The cargo that runs this program.
fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}
