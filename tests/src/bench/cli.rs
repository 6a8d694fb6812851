//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use super::control;
use super::plan::{ALL, Measurement};

/// Shown below the options.
const EXAMPLES: &str = "\
Examples:
  cargo xtask bench                                    everything: about fifteen minutes
  cargo xtask bench --quick --only bulk-1,keepalive-1  a first impression
  cargo xtask bench --output before.json               keep the result ...
  cargo xtask bench --compare before.json              ... and see what a change did
  cargo xtask bench --read after.json --compare before.json
  cargo xtask bench --only memory-connections --runs 1
  cargo xtask bench --peer 'exec ./run-other-proxy.sh' --output peer.json
  cargo xtask bench --list
  cargo xtask bench control                            the control plane: 10,000 pods, 100 clients; --full for ten times that

A peer's command is run by the shell once per node, in the node's network namespace and control group, \
in the place of ztunnel's agent and proxy. It must serve the announcements of pods at $CULVERT_CNI_SOCKET, \
and finds $NODE_NAME, $NODE_IP, $CULVERT_XDS_ADDRESS, $CULVERT_CA_ROOTS, $CULVERT_TOKEN, $CULVERT_RUN_DIR, \
$POD_NAME, $POD_NAMESPACE, $POD_IP.

Exit codes: 0 measured, and no ratio got worse; 1 a measurement failed, or a ratio got worse by more than the \
tolerance; 2 wrong usage.";

/// Measures the mesh against plain TCP, on one machine, in a cluster of two nodes made of network namespaces.
///
/// Plain pods and mesh pods live in the same cluster and are measured in turn; a figure is the median of the runs, with
/// the smallest and the largest beside it. Needs root.
#[derive(Debug, Parser)]
#[command(name = "culvert-bench", version, after_long_help = EXAMPLES, after_help = "--help shows examples.")]
pub struct Cli {
    /// Runs of each measurement
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub runs: u16,
    /// Seconds of each run
    #[arg(long, value_name = "S", default_value_t = 3.0, value_parser = seconds)]
    pub seconds: f64,
    /// One run of one second each
    #[arg(long, conflicts_with_all = ["runs", "seconds"])]
    pub quick: bool,
    /// Takes only these measurements; --list names them
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', value_parser = measurement)]
    pub only: Vec<&'static Measurement>,
    /// Names the measurements and ends
    #[arg(long)]
    pub list: bool,
    /// Writes the result as JSON
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Compares the result with an earlier one
    #[arg(long, value_name = "FILE")]
    pub compare: Option<PathBuf>,
    /// How much worse a ratio may be than the earlier one, in percent
    #[arg(long, value_name = "PERCENT", default_value = "10", value_parser = percent, requires = "compare")]
    pub tolerance: f64,
    /// Measures nothing and takes the result from this file instead
    #[arg(long, value_name = "FILE", conflicts_with_all = ["quick", "runs", "seconds", "only", "peer", "plain_only"])]
    pub read: Option<PathBuf>,
    /// Measures another node proxy, started by this shell command on each node
    #[arg(long, value_name = "COMMAND")]
    pub peer: Option<String>,
    /// Measures plain TCP alone, without any mesh
    #[arg(long, conflicts_with = "peer")]
    pub plain_only: bool,
    /// Folder of the programs [default: $CULVERT_BIN_DIR, or where this program lies]
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
    /// Taken for the sake of those who start the demo and the bench alike; there is no manifest to read
    #[arg(long, value_name = "DIR", hide = true)]
    pub manifests: Option<PathBuf>,
    /// What to measure instead
    #[command(subcommand)]
    pub what: Option<What>,
}

/// What can be measured beside the mesh's data path.
#[derive(Debug, Clone, Subcommand)]
pub enum What {
    /// Measures culvertd with a generated cluster: memory, and the time and cost of a change
    Control(control::Args),
}

impl Cli {
    /// Runs of each measurement.
    pub fn runs(&self) -> usize {
        if self.quick { 1 } else { self.runs.into() }
    }

    /// Seconds of each run.
    pub fn seconds(&self) -> f64 {
        if self.quick { 1.0 } else { self.seconds }
    }

    /// The measurements asked for, in the order in which they are taken.
    pub fn measurements(&self) -> Vec<&'static Measurement> {
        let wanted = |m: &Measurement| if self.only.is_empty() { !m.on_request } else { self.only.contains(&m) };
        ALL.iter().filter(|m| wanted(m)).collect()
    }
}

fn measurement(name: &str) -> Result<&'static Measurement, String> {
    let known = || ALL.iter().map(|m| m.name).collect::<Vec<_>>().join(", ");
    ALL.iter().find(|m| m.name == name).ok_or_else(|| format!("there are: {}", known()))
}

fn seconds(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.1..=60.0).contains(&value) { Ok(value) } else { Err("a run takes 0.1 to 60 seconds".to_owned()) }
}

/// Percent as a share.
fn percent(text: &str) -> Result<f64, String> {
    let value: f64 = text.trim_end_matches('%').parse().map_err(|_| "not a number".to_owned())?;
    if (0.0..=100.0).contains(&value) { Ok(value / 100.0) } else { Err("from 0 to 100".to_owned()) }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once(&"culvert-bench").chain(args))
    }

    #[test]
    fn defaults_and_quick() {
        Cli::command().debug_assert();
        let cli = parse(&[]).unwrap();
        assert_eq!((cli.runs(), cli.seconds(), cli.tolerance), (5, 3.0, 0.1));
        assert_eq!(cli.measurements().len(), ALL.iter().filter(|m| !m.on_request).count());
        let quick = parse(&["--quick", "--only", "keepalive-1,bulk-1"]).unwrap();
        assert_eq!((quick.runs(), quick.seconds()), (1, 1.0));
        assert_eq!(quick.measurements().iter().map(|m| m.name).collect::<Vec<_>>(), ["bulk-1", "keepalive-1"]);
        let long = parse(&["--only", "memory-100k"]).unwrap();
        assert!(long.measurements().iter().all(|m| m.name == "memory-100k") && long.measurements().len() == 1);
        assert_eq!(parse(&["--compare", "x", "--tolerance", "5"]).unwrap().tolerance, 0.05);
    }

    #[test]
    fn wrong_usage() {
        for args in [
            &["--only", "bulk-2"][..],
            &["--runs", "0"],
            &["--seconds", "1000"],
            &["--quick", "--runs", "2"],
            &["--compare", "x", "--tolerance", "-1"],
            &["--peer", "x", "--plain-only"],
            &["--read", "x", "--quick"],
        ] {
            assert_eq!(parse(args).unwrap_err().exit_code(), 2, "{args:?}");
        }
    }
}
