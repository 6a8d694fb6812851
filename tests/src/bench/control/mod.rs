//! `cargo xtask bench control`: how large a cluster culvertd bears.
//!
//! culvertd runs as shipped, in a process of its own, against an API server of the bench that shows a generated cluster;
//! clients speak discovery over TLS from addresses of their own, all in the bench's process. Both share the machine's
//! processors, so times are those of a control plane that has its clients beside it. Each run is done with a tenth of the
//! pods first: what a change costs must not depend on their number.
//!
//! - **loaded**: from culvertd's start until it is ready, and its memory then.
//! - **synced**: all clients connect at once; until the last one has everything, and the memory after that and at most.
//! - **changes**: one pod's label changes at a time. From before the API server tells it until the last client has it: of
//!   all changes the median, the 99th percentile and the largest. culvertd's processor time is divided by the changes.
//!
//! `--goals` holds the figures against what culvertd is to keep to on two processors with everything that `--full` has.
//!
//! A client that does not get exactly the resources that there are, or a change that does not reach every client, is a
//! failure, never a figure.
//!
//! # JSON
//! `--output` writes one object, schema 1: `schema`, `version`, `build`, `machine` as in [`super`]; `runs`, a list, each with
//! `pods`, `services`, `nodes`, `clients`, `changes`; `loaded` (`seconds`, `resident`), `synced` (`seconds`, `cpu_seconds`,
//! `bytes`, `resident`, `peak`, `reconnects`), `changed` (`p50_ms`, `p99_ms`, `max_ms`, `cpu_ms`, `resident`). Memory is in
//! bytes.

mod api;
mod board;
mod client;
mod measure;
mod population;
mod server;
mod skim;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;

pub use measure::Run;
use population::Population;

use super::report::Machine;
use super::{print, progress};
use crate::cluster::bin_dir;

/// Options of `bench control`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// 100,000 pods, 10,000 services, 1,000 nodes and 1,000 clients
    #[arg(long)]
    pub full: bool,
    /// Pods [default: 10,000]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(10..=1_000_000))]
    pub pods: Option<u32>,
    /// Services [default: a tenth of the pods]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub services: Option<u32>,
    /// Nodes [default: a hundredth of the pods]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub nodes: Option<u32>,
    /// Clients [default: 100]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4_000))]
    pub clients: Option<u32>,
    /// Changes that are measured
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub changes: u32,
    /// Leaves out the run with a tenth of the pods
    #[arg(long)]
    pub once: bool,
    /// Fails if a goal is missed: at most 1 GiB, the 99th percentile of changes within 100 ms, and with ten times the pods a
    /// change that costs no more than one and a half times as much
    #[arg(long, conflicts_with = "once")]
    pub goals: bool,
    /// Writes the result as JSON
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

impl Args {
    fn population(&self) -> Population {
        let pods = self.pods.unwrap_or(if self.full { 100_000 } else { 10_000 });
        let number = |given: Option<u32>, otherwise: u32| given.unwrap_or(otherwise.max(1)) as usize;
        Population {
            pods: pods as usize,
            services: number(self.services, pods / 10),
            nodes: number(self.nodes, pods / 100),
        }
    }

    fn clients(&self) -> usize {
        self.clients.unwrap_or(if self.full { 1_000 } else { 100 }) as usize
    }
}

/// The result.
#[derive(Debug, Serialize)]
struct Report {
    schema: u32,
    version: &'static str,
    build: &'static str,
    machine: Machine,
    runs: Vec<Run>,
}

/// Runs the bench. The exit code is 0 if everything was measured, and every goal met if that was asked for, 1 if not.
pub fn run(args: &Args, bins: Option<&Path>) -> ExitCode {
    match bench(args, bins) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            progress(&format!("culvert-bench: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn bench(args: &Args, bins: Option<&Path>) -> Result<(), Box<dyn std::error::Error>> {
    let program = bins.map_or_else(bin_dir, |bins| Ok(bins.to_owned()))?.join("culvertd");
    let build = if cfg!(debug_assertions) { "debug" } else { "release" };
    if cfg!(debug_assertions) {
        progress("This is a debug build: its figures mean nothing. `cargo xtask bench` builds for release.");
    }
    super::raise_limits()?;
    let whole = args.population();
    let tenth = |count: usize| (count / 10).max(1);
    let part = Population { pods: tenth(whole.pods), services: tenth(whole.services), nodes: tenth(whole.nodes) };
    let populations = if args.once { vec![whole] } else { vec![part, whole] };
    let mut runs = Vec::new();
    for population in populations {
        let Population { pods, services, nodes } = population;
        let clients = args.clients();
        progress(&format!("{pods} pods, {services} services, {nodes} nodes, {clients} clients"));
        // A runtime of its own: nothing of one run is left in the next.
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        runs.push(runtime.block_on(measure::run(&program, population, clients, args.changes as usize))?);
        runtime.shutdown_background();
    }
    print(&measure::table(&runs));
    if let Some(path) = &args.output {
        let version = env!("CARGO_PKG_VERSION");
        let report = Report { schema: 1, version, build, machine: Machine::this(), runs };
        std::fs::write(path, serde_json::to_string_pretty(&report)?)?;
        runs = report.runs;
    }
    if !args.goals {
        return Ok(());
    }
    let missed = measure::missed(&runs);
    if missed.is_empty() {
        print("Every goal is met.\n");
        return Ok(());
    }
    Err(missed.join("; ").into())
}
