//! `culvert-cluster`: a cluster that stays up until it is taken down. `up` starts a process that holds it, and waits until
//! it is ready; that process ends everything when it is told to, and the kernel and [`cleanup::sweep`] do if it is killed.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]

mod state;

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use state::{Node, Part, Place, State};

use super::image::{Images, Recipe};
use super::programs::{CLUSTER, CONTROL, Programs};
use super::{Kubernetes, node};
use crate::cluster::bin_dir;
use crate::error::Context;
use crate::{Error, cleanup, demo, process, wait};

/// How long `up` waits. Each step has a bound of its own.
const UP: Duration = Duration::from_secs(600);
/// How long a cluster may take to end before it is killed.
const DOWN: Duration = Duration::from_secs(60);

/// `culvert-cluster`.
#[derive(Debug, Parser)]
#[command(
    name = "culvert-cluster",
    bin_name = "cargo xtask cluster",
    about = "A real Kubernetes on this machine: control plane and nodes with kubelet and containerd in namespaces",
    after_help = EXAMPLES
)]
pub struct Options {
    #[command(subcommand)]
    command: Action,
    /// Name of the cluster; several may be up at once.
    #[arg(long, default_value = "culvert", global = true, value_parser = name)]
    name: String,
    /// Folder of Kubernetes' programs. Default: $KUBERNETES_BIN_DIR.
    #[arg(long, global = true)]
    programs: Option<PathBuf>,
    /// Folder of our own programs, of which images are made. Default: where this one lies.
    #[arg(long, global = true)]
    bin_dir: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  cargo xtask cluster up --nodes 3
  export KUBECONFIG=/run/culvert-cluster/culvert/kubeconfig
  cargo xtask cluster load-images
  cargo xtask cluster images --output culvert-images.tar
  kubectl run echo --image culvert/app:dev --image-pull-policy Never -- echo --listen 0.0.0.0:7000
  cargo xtask cluster down";

#[derive(Debug, Subcommand)]
enum Action {
    /// Starts a cluster, waits until its nodes are Ready, and prints its KUBECONFIG. One that is up is left as it is
    Up {
        /// Nodes.
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=99))]
        nodes: u8,
    },
    /// Ends a cluster and removes all that it made, also after a crash
    Down,
    /// Shows nodes, components with their process ids, and the KUBECONFIG; exit code 1 if none is up
    Status,
    /// Makes images of the programs that were built (culvert/app:dev, culvert/ztunnel:dev, culvert/culvertd:dev, and those of
    /// manifests/samples) and gives them to every node
    LoadImages,
    /// Writes the same images into one OCI archive, for a cluster of your own: `kind load image-archive`, `k3s ctr images import`,
    /// `ctr -n k8s.io images import`, or `skopeo copy oci-archive:FILE:NAME docker://...` take it
    Images {
        /// The archive; a file that is there is replaced.
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
    },
    /// Holds a cluster.
    #[command(hide = true)]
    Serve {
        #[arg(long)]
        nodes: u8,
    },
}

fn name(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    match text.len() {
        1..=40 if text.bytes().all(plain) => Ok(text.to_owned()),
        _ => Err("1 to 40 of a-z, 0-9 and -".to_owned()),
    }
}

/// Runs the command. 0: done; 1: not.
pub fn run(options: &Options) -> ExitCode {
    let place = Place::of(&options.name);
    let done = match &options.command {
        Action::Up { nodes } => up(options, &place, *nodes),
        Action::Down => down(&place),
        Action::Status => status(&place),
        Action::LoadImages => load_images(options, &place),
        Action::Images { output } => write_images(options, output),
        Action::Serve { nodes } => serve(options, &place, *nodes),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn programs(options: &Options) -> Result<Programs, Error> {
    let needed = [CONTROL, CLUSTER];
    options.programs.as_ref().map_or_else(|| Programs::from_env(&needed), |folder| Programs::at(folder, &needed))
}

fn bins(options: &Options) -> Result<PathBuf, Error> {
    options.bin_dir.clone().map_or_else(bin_dir, Ok)
}

fn up(options: &Options, place: &Place, nodes: u8) -> Result<(), Error> {
    if let Some(state) = place.read()? {
        println!("the cluster is up");
        show_kubeconfig(place, &state);
        return Ok(());
    }
    if let Some(pid) = place.holder() {
        return Err(Error::Absent(format!("process {pid} is starting it; `cargo xtask cluster down` ends that")));
    }
    let start = Instant::now();
    let programs = programs(options)?;
    for id in cleanup::sweep()? {
        println!("· removed what the dead run {id} had left");
    }
    place.make()?;
    let log = place.log();
    let output = File::create(&log).during(|| format!("making {}", log.display()))?;
    let errors = output.try_clone().during(|| "duplicating a log".to_owned())?;
    let own = std::env::current_exe().during(|| "finding the running program".to_owned())?;
    let mut command = Command::new(own);
    command.args(["serve", "--name", place.name(), "--nodes", &nodes.to_string()]);
    command.arg("--programs").arg(programs.folder()).arg("--bin-dir").arg(bins(options)?);
    // It outlives this terminal.
    command.stdin(Stdio::null()).stdout(output).stderr(errors).process_group(0).current_dir("/");
    let mut child = command.spawn().during(|| "starting the cluster".to_owned())?;
    let mut shown = 0;
    let state = wait::try_until("the cluster to be up", UP, || {
        shown = show_more(&log, shown);
        if let Some(state) = place.read()? {
            return Ok(Some(state));
        }
        match child.try_wait().during(|| "waiting for the cluster".to_owned())? {
            Some(status) => {
                show_more(&log, shown);
                Err(Error::Exited { name: "the cluster".to_owned(), status, log: format!("; see {}", log.display()) })
            }
            None => Ok(None),
        }
    })?;
    show_more(&log, shown);
    println!("up after {:.1} s; `cargo xtask cluster down` ends it", start.elapsed().as_secs_f64());
    show_kubeconfig(place, &state);
    Ok(())
}

/// Prints what a log has more than was shown; gives how much that is.
fn show_more(log: &Path, shown: usize) -> usize {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    print!("{}", text.get(shown..whole).unwrap_or_default());
    whole.max(shown)
}

fn show_kubeconfig(place: &Place, state: &State) {
    println!(
        "\nexport KUBECONFIG={}\nexport PATH={}:$PATH   # kubectl",
        place.kubeconfig().display(),
        state.programs.display()
    );
}

/// Holds the cluster until it is told to end.
fn serve(options: &Options, place: &Place, nodes: u8) -> Result<(), Error> {
    place.hold()?;
    let interrupted = demo::interrupts()?;
    let programs = programs(options)?;
    let told = |what: &str, took: Duration| println!("· {what}: {:.1} s", took.as_secs_f64());
    let builder = Kubernetes::builder().nodes(nodes).programs(programs.folder()).bin_dir(bins(options)?).progress(told);
    let cluster = builder.start()?;
    place.write(&cluster)?;
    while !interrupted.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(cluster);
    Ok(())
}

fn down(place: &Place) -> Result<(), Error> {
    let start = Instant::now();
    let holder = place.holder();
    if let Some(pid) = holder {
        let pid = Pid::from_raw(pid.cast_signed());
        kill(pid, Signal::SIGTERM).during(|| "telling the cluster to end".to_owned())?;
        let gone = || place.holder().is_none().then_some(());
        if wait::until("the cluster to end", DOWN, gone).is_err() {
            kill(pid, Signal::SIGKILL).during(|| "killing the cluster".to_owned())?;
            wait::until("the cluster to end", DOWN, gone)?;
        }
    }
    let left = cleanup::sweep()?;
    place.remove()?;
    match (holder, left.is_empty()) {
        (Some(_), _) => println!("the cluster is down after {:.1} s", start.elapsed().as_secs_f64()),
        (None, false) => println!("no cluster was up; removed what {} had left", left.join(", ")),
        (None, true) => println!("no cluster was up"),
    }
    Ok(())
}

fn status(place: &Place) -> Result<(), Error> {
    let state = up_state(place)?;
    println!("cluster {}, held by process {}", place.name(), state.pid);
    for Part { name, pid, log } in &state.parts {
        let memory = pid.and_then(|pid| crate::cgroup::resident(pid.cast_signed()));
        match (pid, memory) {
            (Some(pid), Some(memory)) => println!("  {name:<24} pid {pid:<8} {:>5} MiB", memory >> 20),
            _ => println!("  {name:<24} ended; {}", process::tail(log, 1)),
        }
    }
    let kubectl = Command::new(state.programs.join("kubectl"))
        .args(["get", "nodes", "--output", "wide", "--request-timeout", "10s"])
        .env("KUBECONFIG", place.kubeconfig())
        .env("HOME", place.folder())
        .output()
        .during(|| "running kubectl".to_owned())?;
    println!("\n{}{}", String::from_utf8_lossy(&kubectl.stdout), String::from_utf8_lossy(&kubectl.stderr));
    println!("logs: {}", state.logs.display());
    show_kubeconfig(place, &state);
    Ok(())
}

fn up_state(place: &Place) -> Result<State, Error> {
    let none = || Error::Absent(format!("no cluster {} is up; `cargo xtask cluster up` starts one", place.name()));
    place.read()?.ok_or_else(none)
}

fn recipes(bins: &Path) -> Vec<Recipe> {
    [Recipe::basic(bins), Recipe::mesh(bins), Recipe::samples(bins)].concat()
}

fn write_images(options: &Options, output: &Path) -> Result<(), Error> {
    let recipes = recipes(&bins(options)?);
    let images = Images::build(&recipes)?;
    // Beside it first: nobody takes a half for the whole.
    let beside = output.with_extension("part");
    let written = File::create(&beside).and_then(|file| images.write(file)).and_then(|()| fs::rename(&beside, output));
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written.during(|| format!("writing {}", output.display()))?;
    for recipe in recipes {
        println!("{}", recipe.name);
    }
    println!("written to {}", output.display());
    Ok(())
}

fn load_images(options: &Options, place: &Place) -> Result<(), Error> {
    let state = up_state(place)?;
    let bins = bins(options)?;
    let recipes = recipes(&bins);
    let start = Instant::now();
    let images = Images::build(&recipes)?;
    let programs = Programs::at(&state.programs, &[CLUSTER])?;
    std::thread::scope(|scope| {
        let load = |Node { containerd, .. }: &Node| node::load(&programs, *containerd, &images);
        let running: Vec<_> = state.nodes.iter().map(|node| scope.spawn(move || load(node))).collect();
        running.into_iter().try_for_each(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    let names: Vec<&str> = recipes.iter().map(|recipe| recipe.name.as_str()).collect();
    println!("loaded {} onto {} nodes in {:.1} s", names.join(", "), state.nodes.len(), start.elapsed().as_secs_f64());
    Ok(())
}
