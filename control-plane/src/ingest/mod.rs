//! Sources of objects. Each turns what it sees into batches of typed events; nothing behind it knows where they came
//! from. One source is a Kubernetes cluster, the other a directory of the same YAML that `kubectl apply` takes.

mod directory;
mod files;
pub mod kubernetes;
mod scan;

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::sync::Arc;

use tokio::sync::mpsc;
use tracing::warn;

use crate::index::Event;

pub use directory::{Directory, DirectoryError, Timing};
pub use files::{Files, Refusal, Report};
pub use kubernetes::{Cluster, ClusterError, Credentials, Kubernetes, Watches};
pub use scan::{Limits, ScanError};

/// Events that belong together, with the source's own account of itself.
///
/// The first batch of a source is everything it found at start, and is sent even if that is nothing.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The events, in order.
    pub events: Vec<Event>,
    /// What the source has accepted and refused by now.
    pub report: Arc<Report>,
}

/// Where objects come from.
#[derive(Debug)]
pub enum Source {
    /// A directory of manifests.
    Directory(Directory),
    /// A cluster's API server.
    Kubernetes(Kubernetes),
}

impl Source {
    /// Sends everything found, then every change, until the receiver is gone.
    ///
    /// # Errors
    /// A directory cannot be read at start. An API server that cannot be reached is tried again.
    pub async fn run(self, batches: mpsc::Sender<Batch>) -> Result<(), DirectoryError> {
        match self {
            Self::Directory(directory) => directory.run(batches).await,
            Self::Kubernetes(kubernetes) => {
                kubernetes.run(batches).await;
                Ok(())
            }
        }
    }

    /// How its watches are doing; none for a directory.
    pub fn watches(&self) -> Watches {
        match self {
            Self::Directory(_) => Watches::default(),
            Self::Kubernetes(kubernetes) => kubernetes.watches(),
        }
    }
}

/// Logs what is refused now and was not before.
fn log_refusals(before: Option<&Report>, now: &Report) {
    /// Lines at a time; the rest is in the status.
    const MAX_LINES: usize = 50;
    if before.is_some_and(|before| Arc::ptr_eq(&before.refused, &now.refused)) {
        return;
    }
    let known: HashSet<&Refusal> = before.iter().flat_map(|before| before.refused.iter()).collect();
    let is_new = |refusal: &&Refusal| !known.contains(*refusal);
    for refusal in now.refused.iter().filter(is_new).take(MAX_LINES) {
        warn!(keeps_last_good = refusal.keeps_last_good, "refused: {refusal}");
    }
}
