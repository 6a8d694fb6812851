//! The API server of a Kubernetes cluster as a source of objects: one watch for each kind.
//!
//! Nothing is told before every kind was listed completely, so that nothing is missing that something else refers to.
//! From then on changes are told as they come, whatever happens to the API server meanwhile: a watch goes on where it
//! was, or, where that is not possible any more, with a list, and what the list does not show is gone.

mod cluster;
mod objects;
mod raw;
mod status;
mod verdicts;
mod watch;

#[cfg(test)]
mod fault_tests;
#[cfg(test)]
mod property_tests;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{SelectAll, Stream, StreamExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tracing::info;

use super::{Batch, Report, log_refusals};
use crate::api::Kind;
use crate::index::Event;
use objects::Objects;
use watch::{Step, follow};

pub(crate) use cluster::describe;
pub use cluster::{Cluster, ClusterError, Credentials};
pub use status::{KindReport, WatchState, Watches};
pub(crate) use verdicts::{Outcome, Verdict, Verdicts};
pub(crate) use watch::resource;

/// Changes are gathered for this long, so that those of one cause are told together.
const GATHER: Duration = Duration::from_millis(10);
/// Changes that may wait for the receiver; with more, the watches wait as well.
const MAX_PENDING: usize = 100_000;

/// The kinds that are followed.
const WATCHED: [Kind; 12] = [
    Kind::Namespace,
    Kind::Node,
    Kind::ServiceAccount,
    Kind::Service,
    Kind::EndpointSlice,
    Kind::Pod,
    Kind::AuthorizationPolicy,
    Kind::PeerAuthentication,
    Kind::ServiceEntry,
    Kind::WorkloadEntry,
    Kind::Gateway,
    Kind::GatewayClass,
];

/// The source.
#[derive(Debug)]
pub struct Kubernetes {
    cluster: Cluster,
    watches: Watches,
    verdicts: Verdicts,
}

impl Kubernetes {
    /// A source that follows the objects of `cluster`.
    pub fn new(cluster: Cluster) -> Self {
        Self { cluster, watches: Watches::new(WATCHED), verdicts: Verdicts::default() }
    }

    /// How the watches are doing.
    pub fn watches(&self) -> Watches {
        self.watches.clone()
    }

    /// What became of objects, for whoever tells their authors.
    pub(crate) fn verdicts(&self) -> Verdicts {
        self.verdicts.clone()
    }

    /// Sends everything found, then every change, until the receiver is gone. Trouble is logged and tried again for
    /// ever; what was read stays in force.
    pub async fn run(self, batches: mpsc::Sender<Batch>) {
        let steps = WATCHED.into_iter().map(|kind| {
            follow(self.cluster.client(), kind, self.watches.of(kind)).map(move |step| (kind, step)).boxed()
        });
        let gathered = Gathered { verdicts: self.verdicts, ..Gathered::new(WATCHED) };
        gather(steps.collect::<SelectAll<_>>(), gathered, &batches).await;
    }
}

/// Turns steps into batches.
async fn gather(
    mut steps: impl Stream<Item = (Kind, Step)> + Unpin,
    mut gathered: Gathered,
    batches: &mpsc::Sender<Batch>,
) {
    let mut due: Option<Instant> = None;
    loop {
        let is_full = gathered.pending.len() >= MAX_PENDING;
        let ready = async {
            if let Some(due) = due {
                sleep_until(due).await;
            }
            batches.reserve().await
        };
        tokio::select! {
            step = steps.next(), if !is_full => {
                let Some((kind, step)) = step else { return };
                if gathered.take(kind, &step) && due.is_none() {
                    due = Some(Instant::now() + GATHER);
                }
            }
            permit = ready, if due.is_some() => {
                let Ok(permit) = permit else { return };
                due = None;
                if let Some(batch) = gathered.batch() {
                    permit.send(batch);
                }
            }
            () = batches.closed() => return,
        }
    }
}

/// What is known of every kind, and what of it has not been told.
#[derive(Debug)]
struct Gathered {
    kinds: Vec<(Kind, Objects)>,
    /// Kinds without a complete list.
    unlisted: BTreeSet<Kind>,
    /// Empty before every kind is listed: that some kind cannot be listed for long must not fill the memory.
    pending: Vec<Event>,
    /// None before the first batch.
    told: Option<Arc<Report>>,
    verdicts: Verdicts,
}

impl Gathered {
    fn new(kinds: impl IntoIterator<Item = Kind>) -> Self {
        let kinds: Vec<(Kind, Objects)> = kinds.into_iter().map(|kind| (kind, Objects::new(kind))).collect();
        let unlisted = kinds.iter().map(|(kind, _)| *kind).collect();
        Self { kinds, unlisted, pending: Vec::new(), told: None, verdicts: Verdicts::default() }
    }

    fn is_synced(&self) -> bool {
        self.unlisted.is_empty()
    }

    /// Takes in one step. Returns whether there is something to tell by now.
    fn take(&mut self, kind: Kind, step: &Step) -> bool {
        let Some((_, objects)) = self.kinds.iter_mut().find(|(known, _)| *known == kind) else { return false };
        let was_synced = self.unlisted.is_empty();
        let events = match step {
            Step::Listing => {
                objects.begin_list();
                Vec::new()
            }
            Step::Present(raw) => objects.apply(raw).into_iter().collect(),
            Step::Gone(raw) => objects.delete(raw).into_iter().collect(),
            Step::Listed => {
                self.unlisted.remove(&kind);
                objects.end_list()
            }
            Step::Absent => {
                self.unlisted.remove(&kind);
                objects.begin_list();
                objects.end_list()
            }
        };
        self.verdicts.update(objects.take_verdicts());
        if was_synced {
            self.pending.extend(events);
        } else if self.is_synced() {
            let in_force = self.kinds.iter().flat_map(|(_, objects)| objects.in_force());
            self.pending = in_force.cloned().map(Event::Apply).collect();
        }
        // Also without an event: what is refused may have changed.
        self.is_synced() && !matches!(step, Step::Listing)
    }

    /// What has not been told yet; none if that is nothing.
    fn batch(&mut self) -> Option<Batch> {
        let report = self.report();
        if self.pending.is_empty() && self.told.as_ref().is_some_and(|told| Arc::ptr_eq(told, &report)) {
            return None;
        }
        if self.told.is_none() {
            info!(accepted = report.accepted, refused = report.refused.len(), "the cluster is read");
        }
        self.told = Some(report.clone());
        Some(Batch { events: std::mem::take(&mut self.pending), report })
    }

    /// The account of now. What was told is taken from as far as nothing has changed: refusals are few that change, but may
    /// be many that stay.
    fn report(&mut self) -> Arc<Report> {
        let accepted = self.kinds.iter().map(|(_, objects)| objects.accepted()).sum();
        // Each is asked, so that each starts anew.
        let changed =
            self.kinds.iter_mut().filter_map(|(_, objects)| objects.take_refused_changed().then_some(())).count();
        let refused = match &self.told {
            Some(told) if changed == 0 && told.accepted == accepted => return told.clone(),
            Some(told) if changed == 0 => told.refused.clone(),
            Some(_) | None => Arc::new(self.kinds.iter().flat_map(|(_, objects)| objects.refusals()).collect()),
        };
        let report = Report { files: 0, accepted, ignored: 0, refused };
        log_refusals(self.told.as_deref(), &report);
        Arc::new(report)
    }
}

#[cfg(test)]
mod tests;
