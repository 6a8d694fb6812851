//! Sources of objects. Each turns what it sees into batches of typed events; nothing behind it knows where they came
//! from. The embedded source is a directory of the same YAML that `kubectl apply` takes.

mod directory;
mod files;
mod scan;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::index::Event;

pub use directory::{Directory, DirectoryError, Timing};
pub use files::{Files, Refusal, Report};
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
