//! `culvert-bench`: the mesh against plain TCP.
//!
//! One cluster of two nodes holds plain pods and mesh pods; the client is on node 1, the servers are on node 2. Each
//! load runs on both in turn, several times; a figure is the median, with the smallest and the largest beside it. Both
//! sides cross the same links and share the same processors, so the ratio means more than the absolute value. A failed
//! operation fails its measurement: it never disappears in a median. After each run of the mesh it is checked that the
//! tunnel is there, so that nothing measured as mesh went past it.
//!
//! # JSON
//! `--output` writes one object, schema 1:
//!
//! - `schema`: 1.
//! - `version`: of Culvert. `build`: `release` or `debug`.
//! - `machine`: `kernel`, `arch`, `cpus`, `cpu_model`, `memory` (bytes).
//! - `settings`: `runs`, `seconds`, `mesh` (`culvert`, `peer` or `off`), `peer` (the command, or null).
//! - `measurements`: a list, each with `name`, `title`, `failures` (texts; empty if all went well) and `figures` (empty
//!   if it failed), each with
//!   - `name`, `unit` (`bytes/s`, `1/s`, `us`, `s`, `cpu-s/GB`, `cpu-s/10000`, `1/op`, `bytes`,
//!     `share`), `better` (`higher` or
//!     `lower`);
//!   - `plain` and `mesh`: null, or `median`, `min`, `max` and `runs` (every value, in the order taken);
//!   - `ratio`: `mesh.median / plain.median`, or null.
//!
//! The figures of two pods are called `<beside>.<what>`: beside nothing (`alone`), another pod's `bytes` or its
//! `connections`; what is `requests` and `p99` of the quiet pod, `share` of the requests that it makes alone, and `flood`,
//! what the other pod got at the same time.
//!
//! A minute's figures are `slice-1` to `slice-6`, the rate of each ten seconds; it is taken once, whatever `runs` says, with
//! the kernel's own settings.
//!
//! A GB is 10^9 bytes. `cpu.proxies` and `cpu.agents` are those of both nodes together, from the control groups' clock,
//! over the whole run; for a peer everything that it runs on a node counts as its proxy. `switches.proxies` are context
//! switches of the proxies' threads. Memory figures are called `<part>.<kind>.<state>`: the part is `proxy-out` (node
//! 1, the clients'), `proxy-in` (node 2, the servers'), `agents` (both) or `culvertd`; the kind `cgroup` (what the
//! memory controller charges: also buffers and pages of files) or `rss`; the state `idle`, `open` or `loaded`, `after`,
//! or the growth `per-connection` or `per-workload`. Each run of them is a cluster of its own.

mod cli;
mod compare;
mod control;
mod memory;
mod mesh_usage;
mod plan;
mod report;
mod rig;
mod runner;
mod stats;
mod synthetic;
mod table;
mod two_pods;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

pub use cli::Cli;
pub use report::{Figure, Measured, Report};

use crate::cluster::{Mesh, bin_dir};
use crate::{Error, prerequisites};
use report::{Machine, ReportError, SCHEMA, Settings};

/// Why a measurement has no figures.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The cluster.
    #[error(transparent)]
    Harness(#[from] Error),
    /// Operations of a load failed.
    #[error("{0}")]
    Load(String),
    /// No tunnel was open after a run of the mesh.
    #[error("no tunnel to {0} is open after the run: its traffic went past the mesh")]
    PastTheMesh(String),
    /// The mesh's memory was asked for without a mesh.
    #[error("there is no mesh to measure")]
    NoMesh,
    /// The user ended it.
    #[error("interrupted")]
    Interrupted,
    /// One of these, with the run that it happened in.
    #[error("{at}: {failure}")]
    At {
        /// The side and the run.
        at: String,
        /// What.
        failure: Box<Failure>,
    },
}

impl Failure {
    fn of(self, at: &str) -> Self {
        Self::At { at: at.to_owned(), failure: Box::new(self) }
    }
}

/// Why there is no result at all.
#[derive(Debug, thiserror::Error)]
enum BenchError {
    #[error(transparent)]
    Report(#[from] ReportError),
    #[error(transparent)]
    Harness(#[from] Error),
    #[error("this machine lacks:\n{0}")]
    Missing(String),
    #[error("{0}")]
    Machine(String),
}

/// Runs the bench. The exit code is 0 if everything was measured and no ratio got worse, 1 if not, 2 for wrong usage.
pub fn run(cli: &Cli) -> ExitCode {
    if let Some(cli::What::Control(args)) = &cli.what {
        return control::run(args, cli.bin_dir.as_deref());
    }
    match bench(cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // A file that was named and is not there, or is something else.
        Err(error @ BenchError::Report(_)) => {
            progress(&format!("culvert-bench: {error}"));
            ExitCode::from(2)
        }
        Err(error) => {
            progress(&format!("culvert-bench: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn bench(cli: &Cli) -> Result<bool, BenchError> {
    if cli.list {
        print(&table::list());
        return Ok(true);
    }
    // Before minutes are spent: what it will be compared with.
    let earlier = cli.compare.as_deref().map(Report::read).transpose()?;
    let report = match &cli.read {
        Some(path) => Report::read(path)?,
        None => measure(cli)?,
    };
    print(&table::report(&report));
    if let Some(path) = &cli.output {
        report.write(path)?;
    }
    let mut good = report.complete();
    if let (Some(earlier), Some(path)) = (&earlier, &cli.compare) {
        let comparison = compare::compare(earlier, &report, cli.tolerance);
        print(&format!("\nAgainst {}:\n{}", path.display(), table::comparison(&comparison, cli.tolerance)));
        good &= comparison.holds();
    }
    Ok(good)
}

fn measure(cli: &Cli) -> Result<Report, BenchError> {
    let bins = cli.bin_dir.clone().map_or_else(bin_dir, Ok)?;
    let missing = prerequisites::missing(&bins);
    if !missing.is_empty() {
        let lines: Vec<String> = missing.iter().map(|m| format!("  - {}: {}", m.what, m.remedy)).collect();
        return Err(BenchError::Missing(lines.join("\n")));
    }
    let mesh = match (&cli.peer, cli.plain_only) {
        (Some(command), _) => Mesh::Peer(command.clone()),
        (None, true) => Mesh::Off,
        (None, false) => Mesh::Culvert,
    };
    let build = if cfg!(debug_assertions) { "debug" } else { "release" };
    if cfg!(debug_assertions) {
        progress("This is a debug build: its figures mean nothing. `cargo xtask bench` builds for release.");
    }
    raise_limits()?;
    let stop = stop_on_signal()?;
    let setup = rig::Setup { mesh: mesh.clone(), bins, workers: None };
    let (runs, seconds) = (cli.runs(), cli.seconds());
    let runner = runner::Runner { setup: &setup, runs, seconds, stop: &stop, progress };
    let measurements = runner.all(&cli.measurements());
    if stop.load(Ordering::Relaxed) {
        return Err(BenchError::Machine("interrupted; everything was taken down".to_owned()));
    }
    let (mesh, peer) = match mesh {
        Mesh::Off => ("off", None),
        Mesh::Culvert => ("culvert", None),
        Mesh::Peer(command) => ("peer", Some(command)),
    };
    Ok(Report {
        schema: SCHEMA,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        build: build.to_owned(),
        machine: Machine::this(),
        settings: Settings { runs, seconds, mesh: mesh.to_owned(), peer },
        measurements,
    })
}

/// As many open files as the machine lets a process have: clients and servers hold thousands of sockets, and a
/// container runtime gives that many as well.
fn raise_limits() -> Result<(), BenchError> {
    let failed = |e: nix::Error| BenchError::Machine(format!("the limit of open files: {e}"));
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(failed)
}

/// A flag that Ctrl-C or SIGTERM sets; the second of them ends the process at once.
fn stop_on_signal() -> Result<Arc<AtomicBool>, BenchError> {
    let failed = |e: std::io::Error| BenchError::Machine(format!("waiting for signals: {e}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    let wait = async move {
        use tokio::signal::unix::{SignalKind, signal};
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if told.swap(true, Ordering::Relaxed) {
                std::process::exit(1);
            }
            progress("ending after this run; once more ends at once");
        }
    };
    let run = move || {
        let done: std::io::Result<()> = runtime.block_on(wait);
        if let Err(error) = done {
            progress(&format!("culvert-bench: no signals are heard: {error}"));
        }
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(run).map_err(failed)?;
    Ok(stop)
}

#[expect(clippy::print_stderr, reason = "progress is for the user at the terminal")]
fn progress(text: &str) {
    eprintln!("{text}");
}

#[expect(clippy::print_stdout, reason = "the result")]
fn print(text: &str) {
    print!("{text}");
}
