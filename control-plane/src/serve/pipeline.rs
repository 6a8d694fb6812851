//! Batches in, catalog out: the one task that owns the index.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_runtime::drain;
use mesh_runtime::ready::Pending;
use mesh_xds::server::{Catalog, Entry};
use mesh_xds::{AUTHORIZATION_TYPE, WORKLOAD_TYPE};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::Metrics;
use crate::api::Kind;
use crate::index::{Changes, Event, Index, Note, Resource, Roster};
use crate::ingest::{Batch, Report};

/// The task's parts.
#[derive(Debug)]
pub struct Pipeline {
    /// Works out the resources.
    pub index: Box<Index>,
    /// Is told of pods, for the certificate authority.
    pub roster: Arc<Roster>,
    /// Is given the resources.
    pub catalog: Arc<Catalog>,
    /// Is told what people may want to know.
    pub view: watch::Sender<Arc<View>>,
    /// Counts.
    pub metrics: Metrics,
}

/// The state of the pipeline, for people.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// The source has been read once.
    pub synced: bool,
    /// What the source says of itself.
    pub report: Arc<Report>,
    /// Objects in force, by kind.
    pub counts: BTreeMap<Kind, usize>,
    /// Objects whose effect differs from what their author may expect.
    pub notes: Vec<Note>,
}

impl Pipeline {
    /// Follows `batches` until the drain begins or the source ends. `synced` is finished once the first batch is served.
    pub async fn run(mut self, mut batches: mpsc::Receiver<Batch>, synced: Pending, watcher: drain::Watcher) {
        // Held while nothing is served: dropping it would report ready.
        let mut synced = Some(synced);
        let mut late = Late::default();
        loop {
            let batch = tokio::select! {
                batch = batches.recv() => match batch {
                    Some(batch) => Some(batch),
                    None => break,
                },
                () = due(self.index.next_deadline()) => None,
                policies = late.due() => {
                    self.publish_policies(&policies);
                    continue;
                }
                () = watcher.draining() => break,
            };
            let (events, report) = match batch {
                Some(Batch { events, report }) => (events, Some(report)),
                None => (Vec::new(), None),
            };
            self.roster_apply(report.is_some(), &events);
            let Some((back, changes)) = apply(self.index, events).await else {
                tracing::error!("the index failed; what is served stays as it is");
                return;
            };
            self.index = back;
            self.publish(&changes);
            late.take(&changes, Instant::now());
            self.show(report);
            if let Some(synced) = synced.take() {
                synced.done();
            }
        }
    }

    fn roster_apply(&self, is_batch: bool, events: &[Event]) {
        if is_batch {
            self.roster.apply(events);
        }
    }

    fn publish(&self, changes: &Changes) {
        self.publish_policies(changes.policies());
        let set = changes.changed().map(|resource| entry(resource));
        let changed = self.catalog.update(WORKLOAD_TYPE, set, changes.removed());
        if changed > 0 {
            tracing::debug!(changed, "resources changed");
            self.metrics.changed(WORKLOAD_TYPE, changed);
        }
    }

    /// Also if there are none: who asks for the type is told so.
    fn publish_policies(&self, policies: &Policies) {
        let set = policies.values().flatten().map(|resource| entry(resource));
        let removed = policies.iter().filter_map(|(name, policy)| policy.is_none().then_some(name));
        let changed = self.catalog.update(AUTHORIZATION_TYPE, set, removed);
        if changed > 0 {
            tracing::debug!(changed, "policies changed");
            self.metrics.changed(AUTHORIZATION_TYPE, changed);
        }
    }

    fn show(&self, report: Option<Arc<Report>>) {
        let report = report.unwrap_or_else(|| self.view.borrow().report.clone());
        let counts = self.index.counts();
        self.metrics.source(counts.clone(), report.files, report.refused.len());
        self.view.send_replace(Arc::new(View { synced: true, report, counts, notes: self.index.notes() }));
    }
}

/// Policies by name, none for one that is gone.
type Policies = BTreeMap<Arc<str>, Option<Arc<Resource>>>;

/// Changes of policies that are told when every client has had time for the workloads that were told before them. That a
/// client was slower closes connections, and opens none.
#[derive(Debug, Default)]
struct Late(BTreeMap<Arc<str>, (Instant, Option<Arc<Resource>>)>);

/// Time for a change of workloads to reach every client.
const LATE: Duration = Duration::from_secs(3);

impl Late {
    fn take(&mut self, changes: &Changes, now: Instant) {
        self.0.retain(|name, _| !changes.policies().contains_key(name));
        let late = changes.late_policies().iter();
        self.0.extend(late.map(|(name, policy)| (name.clone(), (now + LATE, policy.clone()))));
    }

    /// Waits for the next ones, and takes them out.
    async fn due(&mut self) -> Policies {
        let Some(first) = self.0.values().map(|(due, _)| *due).min() else { return std::future::pending().await };
        tokio::time::sleep_until(first).await;
        self.0.extract_if(.., |_, (due, _)| *due <= first).map(|(name, (_, policy))| (name, policy)).collect()
    }
}

/// Off the runtime's threads: the first batch of a large cluster takes a while.
async fn apply(mut index: Box<Index>, events: Vec<Event>) -> Option<(Box<Index>, Changes)> {
    let work = tokio::task::spawn_blocking(move || {
        let changes = index.apply(events, SystemTime::now());
        (index, changes)
    });
    work.await.ok()
}

fn entry(resource: &Resource) -> Entry {
    Entry {
        resource: mesh_xds::Resource {
            name: resource.name.clone(),
            aliases: resource.aliases.clone(),
            version: resource.version.clone(),
            body: resource.body.clone(),
        },
        member_of: resource.member_of.clone(),
        refers: resource.is_bound,
    }
}

/// Waits for a time of the wall clock, which may be set meanwhile: so it looks again every now and then.
async fn due(deadline: Option<SystemTime>) {
    const LOOK: Duration = Duration::from_secs(1);
    let Some(deadline) = deadline else { return std::future::pending().await };
    while let Ok(left) = deadline.duration_since(SystemTime::now()) {
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left.min(LOOK)).await;
    }
}
