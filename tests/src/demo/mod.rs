//! The demo: Bookinfo on two nodes made of network namespaces, carried by the mesh, with what a newcomer wants to see.

mod checks;
mod live;
mod print;
mod talkers;

use std::net::TcpStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use clap::{Parser, ValueEnum};

use crate::cluster::{Cluster, bin_dir};
use crate::error::Context;
use crate::forward::Forward;
use crate::pod::Pod;
use crate::{Error, cleanup, http, prerequisites};

use checks::Summary;
pub(crate) use live::interrupts;
use print::Progress;

/// What the applications send and the capture looks for.
const MARKER: &str = "bookinfo-page-in-clear";
/// The port of the product page on the machine, if it is free.
const PORT: u16 = 9080;

/// `culvert-demo`.
#[derive(Debug, Parser)]
#[command(name = "culvert-demo", about = "Bookinfo on two nodes made of network namespaces, carried by the mesh")]
pub struct Options {
    /// Requests the page 200 times, checks what happened, prints a summary, and ends with 0 or 1.
    #[arg(long)]
    once: bool,
    /// How the summary of --once is printed.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    output: Format,
    /// Folder of the programs. Default: where this one lies.
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// Folder of the manifests.
    #[arg(long, default_value = "manifests")]
    manifests: PathBuf,
    /// Page requests of --once.
    #[arg(long, default_value_t = 200)]
    requests: u32,
    /// Nodes.
    #[arg(long, default_value_t = 2)]
    nodes: usize,
    /// Port of the product page on this machine. Default: 9080, or any if that is taken.
    #[arg(long)]
    port: Option<u16>,
}

/// How the summary is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// One object, on standard output; progress goes to standard error.
    Json,
}

/// The running sample.
struct Sample {
    cluster: Cluster,
    pods: Vec<Arc<Pod>>,
    page: Arc<Pod>,
    forward: Forward,
}

impl Sample {
    fn url(&self) -> String {
        format!("http://{}/productpage", self.forward.local())
    }

    /// One request as a browser on the machine makes it.
    fn request(&self) -> Result<http::Answer, Error> {
        let at = self.forward.local();
        let stream = TcpStream::connect(at).during(|| format!("connecting to {at}"))?;
        http::exchange(stream, "GET", &at.to_string(), "/productpage")
    }
}

/// Runs the demo. 0: all went well; 1: it did not, or something is missing.
pub fn run(options: &Options) -> ExitCode {
    let progress = Progress::new(options.output);
    let outcome = match start_and_watch(options, &progress) {
        Ok(good) => good,
        Err(error) => {
            progress.error(&error.to_string());
            false
        }
    };
    if outcome { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn start_and_watch(options: &Options, progress: &Progress) -> Result<bool, Error> {
    let bins = options.bin_dir.clone().map_or_else(bin_dir, Ok)?;
    let missing = prerequisites::missing(&bins);
    if !missing.is_empty() {
        progress.missing(&missing);
        return Ok(false);
    }
    let interrupted = interrupts()?;
    let start = Instant::now();
    for id in cleanup::sweep()? {
        progress.step(&format!("removed what the dead run {id} had left"));
    }
    let sample = start_sample(options, bins, progress, &interrupted)?;
    let Some(sample) = sample else {
        progress.step("interrupted; everything is taken down");
        return Ok(false);
    };
    progress.step(&format!("ready after {:.1} s", start.elapsed().as_secs_f64()));
    let good = if options.once {
        let summary = checks::check(&sample, options.requests, &interrupted)?;
        finish(&sample, &summary, options.output);
        summary.ok
    } else {
        live::watch(&sample, &interrupted)?;
        progress.step("taking everything down");
        true
    };
    drop(sample.forward);
    drop(sample.cluster);
    Ok(good)
}

/// None when interrupted meanwhile.
fn start_sample(
    options: &Options,
    bins: PathBuf,
    progress: &Progress,
    interrupted: &AtomicBool,
) -> Result<Option<Sample>, Error> {
    progress.step(&format!("making {} nodes and starting culvertd, agents and proxies", options.nodes));
    let mut builder = Cluster::builder().nodes(options.nodes).bin_dir(bins);
    if options.once {
        builder = builder.capture(MARKER);
    }
    let cluster = builder.start()?;
    if interrupted.load(Ordering::Relaxed) {
        return Ok(None);
    }
    progress.step("starting Bookinfo");
    let pods = cluster.deploy(&options.manifests.join("samples/bookinfo"))?;
    let is_page = |pod: &&Arc<Pod>| pod.record().labels.get("app").is_some_and(|app| app == "productpage");
    let page = pods.iter().find(is_page).ok_or_else(|| Error::Absent("no pod of the product page".to_owned()))?;
    let target = page.at(9080);
    let forward = match options.port {
        Some(port) => cluster.forward(port, target)?,
        None => cluster.forward(PORT, target).or_else(|_taken| cluster.forward(0, target))?,
    };
    if interrupted.load(Ordering::Relaxed) {
        return Ok(None);
    }
    Ok(Some(Sample { page: Arc::clone(page), cluster, pods, forward }))
}

fn finish(sample: &Sample, summary: &Summary, format: Format) {
    match format {
        Format::Json => print::json(summary),
        Format::Table => print::summary(summary),
    }
    if !summary.ok {
        print::logs(&sample.cluster.logs(15));
    }
}
