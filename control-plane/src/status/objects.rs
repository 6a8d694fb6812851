//! What is written about objects: the conditions in their status, and events about those that are not valid.
//!
//! Everything is looked at again whenever something has changed, at most once a second; what is written is what differs from
//! what an object says. The API server is asked to apply it, so that what others write there stays; where another writes the
//! same, it is left to them.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{Patch, PatchParams};
use kube::core::DynamicObject;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use mesh_xds::server::{ClientStatus, Service};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::conditions::{self, All, Condition, Told};
use super::leader::Leading;
use super::pace::Pace;
use super::refusals::{Board, Others};
use crate::api::ObjectId;
use crate::ca::ServiceAccount;
use crate::ingest::kubernetes::{Verdict, Verdicts, describe, resource};
use crate::ingest::{Cluster, Source};
use crate::serve::View;

/// Who writes, for the API server.
const MANAGER: &str = "culvertd-status";
/// Who tells, in events.
const REPORTER: &str = "culvertd";
/// Writes at once, and then one in each interval.
const BURST: u32 = 50;
const INTERVAL: Duration = Duration::from_millis(100);
/// The shortest pause between two looks, and the longest: nobody says when a proxy refuses something.
const PAUSE: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_secs(5);
/// Pause before something is tried again that failed.
const RETRY: Duration = Duration::from_secs(30);
/// Time for one request.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest note of an event, in bytes (`events.k8s.io/v1`).
const MAX_NOTE: usize = 1024;

/// What is known of objects.
#[derive(Clone, Debug)]
pub struct Facts {
    verdicts: Verdicts,
    /// Whether everything is listed.
    view: watch::Receiver<Arc<View>>,
    /// Knows who is connected here, and what they refuse.
    discovery: Service,
    /// Who of them is a node's proxy.
    node_proxies: Vec<ServiceAccount>,
}

impl Facts {
    /// What `source` finds out, once `view` says that all is listed, and what the clients of `discovery` refuse that have one
    /// of the accounts `node_proxies`.
    pub fn new(
        source: &Source,
        view: watch::Receiver<Arc<View>>,
        discovery: Service,
        node_proxies: Vec<ServiceAccount>,
    ) -> Self {
        let verdicts = match source {
            Source::Kubernetes(kubernetes) => kubernetes.verdicts(),
            Source::Directory(_) => Verdicts::default(),
        };
        Self { verdicts, view, discovery, node_proxies }
    }

    /// Who is connected to this replica.
    pub(super) fn clients(&self) -> Vec<ClientStatus> {
        self.discovery.clients()
    }

    /// Who of them is a node's proxy.
    pub(super) fn node_proxies(&self) -> &[ServiceAccount] {
        &self.node_proxies
    }
}

/// Something to write.
#[derive(Clone, Debug, PartialEq)]
enum Task {
    /// These conditions.
    Conditions(ObjectId, Vec<Value>),
    /// An event with this note.
    Event(ObjectId, String),
}

impl Task {
    fn id(&self) -> &ObjectId {
        match self {
            Self::Conditions(id, _) | Self::Event(id, _) => id,
        }
    }
}

/// Writes while this replica leads, also what the clients of other replicas refuse, which is on the board. Never ends.
pub(super) async fn run(cluster: &Cluster, leading: &Leading, facts: &Facts, mut board: Board) {
    if facts.view.clone().wait_for(|view| view.synced).await.is_err() {
        // There is no pipeline any more.
        std::future::pending::<()>().await;
    }
    let mut changed = facts.verdicts.changed();
    let mut done = Done::default();
    let mut others = Others::default();
    let mut pace = Pace::new(INTERVAL, BURST, Instant::now());
    loop {
        changed.borrow_and_update();
        let all = facts.verdicts.all();
        let mut nacks = conditions::nacks(&facts.clients(), facts.node_proxies());
        board.read(&mut others).await;
        others.add_to(&mut nacks, Instant::now());
        let told = Told::new(nacks, &facts.view.borrow().notes);
        for task in done.tasks(&all, &told) {
            sleep_until(pace.take(Instant::now())).await;
            if !leading.leads() {
                return;
            }
            let Some(verdict) = all.get(task.id()) else { continue };
            if !write(cluster, &task, verdict).await {
                done.failed.insert(task.id().clone(), Instant::now() + RETRY);
                break;
            }
            done.add(task, verdict);
        }
        sleep(PAUSE).await;
        // That nobody says so any more is no change.
        let _ = timeout(LOOK, changed.changed()).await;
    }
}

/// What was written already. What an object says follows a moment later, or never, where another has the say.
#[derive(Debug, Default)]
struct Done {
    /// By object: the version that it was written to, and what.
    conditions: HashMap<ObjectId, (Box<str>, Vec<Condition>)>,
    /// By object: its unique id, and the note.
    events: HashMap<ObjectId, (Box<str>, String)>,
    /// Objects that could not be written about, and when to try again.
    failed: HashMap<ObjectId, Instant>,
    /// What was desired by the last look.
    desired: BTreeMap<ObjectId, Vec<Condition>>,
    /// Where the last look ended early: the next one begins behind it, so that some that change all the time hold up no others.
    last: Option<ObjectId>,
}

impl Done {
    /// What is to be written, as many as may be at once.
    fn tasks(&mut self, all: &All, told: &Told) -> Vec<Task> {
        self.conditions.retain(|id, _| all.contains_key(id));
        self.events.retain(|id, _| all.contains_key(id));
        let began = Instant::now();
        self.failed.retain(|_, until| began < *until);
        self.desired.clear();
        let now = Timestamp::now();
        let now = Timestamp::from_second(now.as_second()).unwrap_or(now).to_string();
        let mut tasks = Vec::new();
        let begin = self.last.take();
        let behind = begin.as_ref().map_or(Bound::Unbounded, Bound::Excluded);
        let rest = begin.iter().flat_map(|last| all.range(..=last));
        let known = all.range((behind, Bound::Unbounded)).chain(rest);
        for (id, verdict) in known {
            if self.failed.contains_key(id) {
                continue;
            }
            if tasks.len() >= BURST as usize {
                break;
            }
            self.last = Some(id.clone());
            let mut says_so = false;
            if let Some(desired) = conditions::desired(id, verdict, all, told) {
                let is_done = self
                    .conditions
                    .get(id)
                    .is_some_and(|(version, written)| *version == verdict.version && *written == desired);
                match conditions::change(id.kind, &verdict.conditions, &desired, &now) {
                    Some(_) if is_done => {}
                    Some(change) => {
                        self.desired.insert(id.clone(), desired);
                        tasks.push(Task::Conditions(id.clone(), change));
                    }
                    // An earlier leader wrote it, and told of it.
                    None => says_so = true,
                }
            }
            if let Some(note) = conditions::mistakes(id.kind, verdict) {
                let note = conditions::bounded(note, MAX_NOTE);
                let told = (verdict.uid.clone(), note);
                if self.events.get(id) != Some(&told) {
                    if says_so {
                        self.events.insert(id.clone(), told);
                    } else {
                        tasks.push(Task::Event(id.clone(), told.1));
                    }
                }
            } else {
                self.events.remove(id);
            }
        }
        if tasks.len() < BURST as usize {
            self.last = None;
        }
        tasks
    }

    fn add(&mut self, task: Task, verdict: &Verdict) {
        match task {
            Task::Conditions(id, _) => {
                if let Some(desired) = self.desired.remove(&id) {
                    self.conditions.insert(id, (verdict.version.clone(), desired));
                }
            }
            Task::Event(id, note) => {
                self.events.insert(id, (verdict.uid.clone(), note));
            }
        }
    }
}

/// Whether that is done with, also where it is not to be.
async fn write(cluster: &Cluster, task: &Task, verdict: &Verdict) -> bool {
    let (what, id) = match task {
        Task::Conditions(id, _) => ("status", id),
        Task::Event(id, _) => ("event", id),
    };
    let written = async {
        match task {
            Task::Conditions(_, change) => apply(cluster, id, verdict, change).await,
            Task::Event(_, note) => publish(cluster, id, verdict, note).await,
        }
    };
    match timeout(TIMEOUT, written).await {
        Ok(Ok(())) => true,
        // Gone, another one by now, or another writes the same: what it is now is about to be told.
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409 | 422) => {
            tracing::info!(object = %id, what, error = status.message, "is not written");
            true
        }
        Ok(Err(error)) => {
            tracing::warn!(object = %id, what, error = describe(&error), "is not written; trying again");
            false
        }
        Err(_) => {
            tracing::warn!(object = %id, what, "is not written: no answer within {TIMEOUT:?}; trying again");
            false
        }
    }
}

async fn apply(cluster: &Cluster, id: &ObjectId, verdict: &Verdict, conditions: &[Value]) -> kube::Result<()> {
    let resource = resource(id.kind, version(&verdict.api_version));
    let objects: Api<DynamicObject> = if id.kind.is_cluster_scoped() {
        Api::all_with(cluster.client(), &resource)
    } else {
        Api::namespaced_with(cluster.client(), &id.namespace, &resource)
    };
    let mut body = json!({
        "apiVersion": resource.api_version, "kind": resource.kind,
        // With the unique id nothing is written to another object of the name.
        "metadata": {"name": &*id.name, "uid": &*verdict.uid},
        "status": {"conditions": conditions},
    });
    if !id.kind.is_cluster_scoped() {
        body["metadata"]["namespace"] = Value::from(&*id.namespace);
    }
    objects.patch_status(&id.name, &PatchParams::apply(MANAGER), &Patch::Apply(&body)).await?;
    Ok(())
}

async fn publish(cluster: &Cluster, id: &ObjectId, verdict: &Verdict, note: &str) -> kube::Result<()> {
    // A new one for each: it would take another note of the same object for the same event.
    let recorder = Recorder::new(cluster.client(), Reporter { controller: REPORTER.to_owned(), instance: None });
    let event = Event {
        type_: EventType::Warning,
        reason: "Invalid".to_owned(),
        note: Some(note.to_owned()),
        action: "Validate".to_owned(),
        secondary: None,
    };
    let reference = ObjectReference {
        api_version: Some(verdict.api_version.to_string()),
        kind: Some(id.kind.to_string()),
        name: Some(id.name.to_string()),
        namespace: Some(id.namespace.to_string()).filter(|namespace| !namespace.is_empty()),
        uid: Some(verdict.uid.to_string()),
        ..ObjectReference::default()
    };
    recorder.publish(&event, &reference).await
}

/// Of `group/version`.
fn version(api_version: &str) -> &str {
    api_version.rsplit('/').next().unwrap_or(api_version)
}

#[cfg(test)]
mod tests;
