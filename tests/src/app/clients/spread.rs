//! Connections one after the other: which endpoints took them.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;

use clap::Args;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};

use super::bound;
use crate::app::net;

/// `culvert-app spread`, against `echo --mode banner`.
#[derive(Debug, Args)]
pub struct Options {
    /// `host:port`.
    #[arg(long)]
    to: String,
    /// How many.
    #[arg(long, default_value_t = 20)]
    times: usize,
    /// Bound of each in milliseconds.
    #[arg(long, default_value_t = 5000)]
    timeout: u64,
}

/// What `culvert-app spread` prints.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// True if all were answered.
    pub ok: bool,
    /// Connections by the pod that says to have taken them.
    pub pods: BTreeMap<String, usize>,
    /// The others, by kind as [`net::kind`] names it.
    pub failures: BTreeMap<String, usize>,
}

/// Connects and reads the line that each server begins with.
///
/// # Errors
/// The name cannot be resolved.
pub async fn run(options: Options) -> io::Result<bool> {
    let target = net::resolve_one(&options.to).await?;
    let mut report = Report::default();
    for _ in 0..options.times {
        match net::within(bound(options.timeout), pod_behind(target)).await {
            Ok(pod) => *report.pods.entry(pod).or_default() += 1,
            Err(error) => *report.failures.entry(net::kind(&error).to_owned()).or_default() += 1,
        }
    }
    report.ok = report.failures.is_empty();
    net::emit(&report);
    Ok(report.ok)
}

async fn pod_behind(target: SocketAddr) -> io::Result<String> {
    let stream = tokio::net::TcpStream::connect(target).await?;
    let mut line = String::new();
    if BufReader::new(stream).read_line(&mut line).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let said: serde_json::Value = serde_json::from_str(&line)?;
    Ok(said["pod"].as_str().unwrap_or("unnamed").to_owned())
}
