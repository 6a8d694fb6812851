//! What every node must know, worked out from objects: events in, changed discovery resources out.
//!
//! Pure and incremental: no I/O, no clock (time is an argument), and an event recomputes only the resources that depend
//! on what changed. After any sequence of events the resources are those that a fresh index would compute from the
//! surviving objects; a property test holds it to that.
//!
//! ```text
//! Namespace ─┐                       ┌─> workload (one per pod)
//! Node ──────┼─> pod ────────────────┤
//! Service ───┼─> selector, addresses ┼─> service
//! Slice ─────┘                       └─> workload (one per endpoint that is no pod)
//! ServiceEntry ──> service (one per host), and workload (one per endpoint that it lists)
//! WorkloadEntry ─> workload
//! AuthorizationPolicy, PeerAuthentication ─> policy, and the names of policies in workloads
//! ```

mod authentications;
mod encode;
mod endpoint_slices;
mod enrolment;
mod entries;
mod ingress;
mod multimap;
mod names;
mod namespaces;
mod nodes;
mod pods;
mod policies;
mod published;
mod resource;
mod roster;
mod services;
mod vip;
mod waypoint;
mod workload;
mod workload_entries;

#[cfg(test)]
mod entry_tests;
#[cfg(test)]
mod policy_tests;
#[cfg(test)]
mod property_tests;
#[cfg(test)]
mod stand_in_entry_tests;
#[cfg(test)]
mod stand_in_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod waypoint_tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::api::{Kind, Name, Object, ObjectId};

pub(crate) use authentications::key as authentication_key;
pub(crate) use names::policy_key;
pub(crate) use policies::note as policy_note;
use published::Published;
pub use resource::{Changes, Resource};
pub use roster::Roster;

/// What is the same for every resource.
#[derive(Clone, Debug)]
pub struct Options {
    /// The cluster's id, which begins every workload's uid.
    pub cluster_id: String,
    /// The DNS domain of services.
    pub cluster_domain: String,
    /// The trust domain of every identity.
    pub trust_domain: String,
    /// The namespace whose policies hold in the whole mesh.
    pub root_namespace: Arc<str>,
    /// How long a pod that is enrolled, but whose capture nobody has confirmed, is kept from traffic. After that it is
    /// served in plaintext, as a pod that is not enrolled.
    pub confirmation: Duration,
}

/// A change of one object.
#[derive(Clone, Debug)]
pub enum Event {
    /// The object is new or has changed.
    Apply(Object),
    /// The object is gone.
    Delete(ObjectId),
}

/// An object that is in force, but not in the way its author may expect.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Note {
    /// The object, as `Kind namespace/name`.
    pub object: String,
    /// What to know about it.
    pub reason: String,
}

/// The index.
#[derive(Debug)]
pub struct Index {
    options: Options,
    namespaces: namespaces::Namespaces,
    nodes: nodes::Nodes,
    pods: pods::Pods,
    services: services::Services,
    slices: endpoint_slices::Slices,
    vips: vip::Vips,
    ingress: ingress::Ingress,
    entries: entries::Entries,
    /// Addresses of the hosts of entries.
    entry_vips: vip::Vips,
    workload_entries: workload_entries::WorkloadEntries,
    gateways: waypoint::Gateways,
    waiting: enrolment::Waiting,
    /// Objects that only count.
    others: BTreeSet<ObjectId>,
    policies: policies::Policies,
    authentications: authentications::Authentications,
    addresses: Published,
    published_policies: Published,
    /// The workloads that each slice's endpoints became.
    endpoints: HashMap<Name, BTreeSet<Arc<str>>>,
    synced: bool,
}

/// What an event touched and must be computed again.
#[derive(Debug, Default)]
struct Dirty {
    pods: BTreeSet<Name>,
    services: BTreeSet<Name>,
    slices: BTreeSet<Name>,
    entries: BTreeSet<Name>,
    workload_entries: BTreeSet<Name>,
    policies: BTreeSet<Name>,
    authentications: BTreeSet<Name>,
}

impl Index {
    /// An empty index.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            namespaces: namespaces::Namespaces::default(),
            nodes: nodes::Nodes::default(),
            pods: pods::Pods::default(),
            services: services::Services::default(),
            slices: endpoint_slices::Slices::default(),
            vips: vip::Vips::of_services(),
            ingress: ingress::Ingress::default(),
            entries: entries::Entries::default(),
            entry_vips: vip::Vips::of_entries(),
            workload_entries: workload_entries::WorkloadEntries::default(),
            gateways: waypoint::Gateways::default(),
            waiting: enrolment::Waiting::default(),
            others: BTreeSet::new(),
            policies: policies::Policies::default(),
            authentications: authentications::Authentications::default(),
            addresses: Published::default(),
            published_policies: Published::default(),
            endpoints: HashMap::new(),
            synced: false,
        }
    }

    /// Takes in `events` and whatever became due by `now`, and returns the resources that changed.
    ///
    /// The first call is taken for the state found at start: pods in it that wait for their capture to be confirmed have
    /// waited since they were created, not since the control plane happened to start.
    pub fn apply(&mut self, events: impl IntoIterator<Item = Event>, now: SystemTime) -> Changes {
        let mut dirty = Dirty::default();
        for event in events {
            match event {
                Event::Apply(object) => self.upsert(object, &mut dirty),
                Event::Delete(id) => self.remove(&id, &mut dirty),
            }
        }
        dirty.pods.extend(self.waiting.due(now));
        let mut changes = Changes::default();
        for name in &dirty.pods {
            self.recompute_pod(name, now, &mut changes);
        }
        for name in &dirty.services {
            self.recompute_service(name, &mut changes);
        }
        for name in &dirty.slices {
            self.recompute_slice(name, &mut changes);
        }
        for name in &dirty.entries {
            self.recompute_entry(name, &mut changes);
        }
        for name in &dirty.workload_entries {
            self.recompute_workload_entry(name, &mut changes);
        }
        for name in &dirty.policies {
            self.recompute_policy(name, &mut changes);
        }
        for name in &dirty.authentications {
            self.recompute_authentication(name, &mut changes);
        }
        if !dirty.authentications.is_empty() {
            self.recompute_static_strict(&mut changes);
        }
        self.synced = true;
        changes
    }

    /// When [`Index::apply`] should be called next even without an event.
    pub fn next_deadline(&self) -> Option<SystemTime> {
        self.waiting.next_deadline()
    }

    /// Every workload and service in force.
    pub fn resources(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.addresses.all()
    }

    /// Every policy in force.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.published_policies.all()
    }

    /// How many objects of each kind are in force.
    pub fn counts(&self) -> BTreeMap<Kind, usize> {
        let others = |kind: Kind| self.others.iter().filter(|id| id.kind == kind).count();
        Kind::ALL
            .into_iter()
            .map(|kind| {
                let count = match kind {
                    Kind::Namespace => self.namespaces.len(),
                    Kind::Node => self.nodes.len(),
                    Kind::Pod => self.pods.len(),
                    Kind::Service => self.services.len(),
                    Kind::EndpointSlice => self.slices.len(),
                    Kind::AuthorizationPolicy => self.policies.len(),
                    Kind::PeerAuthentication => self.authentications.len(),
                    Kind::ServiceEntry => self.entries.len(),
                    Kind::WorkloadEntry => self.workload_entries.len(),
                    Kind::Gateway => self.gateways.len(),
                    Kind::GatewayClass => self.gateways.class_count(),
                    Kind::ServiceAccount | Kind::Deployment => others(kind),
                };
                (kind, count)
            })
            .collect()
    }

    /// Objects whose effect differs from what their author may expect, and why.
    pub fn notes(&self) -> Vec<Note> {
        let mut notes = self.waiting.notes(self.options.confirmation);
        notes.extend(self.conflicts());
        notes
    }

    /// The part of [`Index::notes`] that only editing objects can mend.
    pub fn conflicts(&self) -> Vec<Note> {
        let mut notes = self.namespaces.notes();
        notes.extend(self.pods.notes());
        notes.extend(self.services.notes());
        notes.extend(self.vips.notes());
        notes.extend(self.hosts_without_address());
        notes.extend(self.entries.notes());
        notes.extend(self.workload_entries.notes());
        notes.extend(self.gateways.notes());
        notes.extend(self.policies.notes());
        notes.extend(self.authentications.notes());
        notes
    }

    fn upsert(&mut self, object: Object, dirty: &mut Dirty) {
        match object {
            Object::Namespace(namespace) => {
                if self.namespaces.insert(&namespace) {
                    self.touch_namespace(&namespace.name, dirty);
                }
            }
            Object::Node(node) => {
                let old = self.nodes.insert(&node);
                self.touch_node(&node.name, old.as_deref(), dirty);
            }
            Object::Pod(pod) => {
                let name = pod.name.clone();
                let old = self.pods.insert(pod);
                self.touch_pod(&name, old.as_deref(), dirty);
            }
            Object::Service(service) => {
                let name = service.name.clone();
                dirty.services.extend(self.vips.set(&service));
                dirty.services.extend(self.ingress.set(&service));
                let old = self.services.insert(service);
                self.touch_service(&name, old.as_deref(), dirty);
            }
            Object::EndpointSlice(slice) => {
                let name = slice.name.clone();
                let old = self.slices.insert(slice);
                self.touch_slice(&name, old.as_deref(), dirty);
            }
            Object::AuthorizationPolicy(policy) => {
                let name = policy.name.clone();
                let old = self.policies.insert(policy);
                self.touch_policy(&name, old.as_deref(), dirty);
            }
            Object::PeerAuthentication(policy) => {
                let name = policy.name.clone();
                let old = self.authentications.insert(policy);
                self.touch_authentication(&name, old.as_deref(), dirty);
            }
            Object::ServiceEntry(entry) => {
                let name = entry.name.clone();
                let old = self.entries.insert(entry);
                self.touch_entry(&name, old.as_deref(), dirty);
            }
            Object::WorkloadEntry(entry) => {
                let name = entry.name.clone();
                let old = self.workload_entries.insert(entry);
                self.touch_workload_entry(&name, old.as_deref(), dirty);
            }
            Object::Gateway(gateway) => {
                let name = gateway.name.clone();
                let old = self.gateways.insert(gateway);
                self.touch_gateway(&name, old.as_deref(), dirty);
            }
            Object::GatewayClass(class) => {
                let name = class.name.clone();
                let old = self.gateways.insert_class(class);
                self.touch_gateway_class(&name, old.as_deref(), dirty);
            }
            other @ (Object::ServiceAccount(_) | Object::Deployment(_)) => {
                self.others.insert(other.id());
            }
        }
    }

    fn remove(&mut self, id: &ObjectId, dirty: &mut Dirty) {
        let name = id.to_name();
        match id.kind {
            Kind::Namespace => {
                if self.namespaces.remove(&id.name) {
                    self.touch_namespace(&id.name, dirty);
                }
            }
            Kind::Node => {
                let old = self.nodes.remove(&id.name);
                self.touch_node(&id.name, old.as_deref(), dirty);
            }
            Kind::Pod => {
                let old = self.pods.remove(&name);
                self.touch_pod(&name, old.as_deref(), dirty);
            }
            Kind::Service => {
                dirty.services.extend(self.vips.remove(&name));
                dirty.services.extend(self.ingress.remove(&name));
                let old = self.services.remove(&name);
                self.touch_service(&name, old.as_deref(), dirty);
            }
            Kind::EndpointSlice => {
                let old = self.slices.remove(&name);
                self.touch_slice(&name, old.as_deref(), dirty);
            }
            Kind::AuthorizationPolicy => {
                let old = self.policies.remove(&name);
                self.touch_policy(&name, old.as_deref(), dirty);
            }
            Kind::PeerAuthentication => {
                let old = self.authentications.remove(&name);
                self.touch_authentication(&name, old.as_deref(), dirty);
            }
            Kind::ServiceEntry => {
                let old = self.entries.remove(&name);
                self.touch_entry(&name, old.as_deref(), dirty);
            }
            Kind::WorkloadEntry => {
                let old = self.workload_entries.remove(&name);
                self.touch_workload_entry(&name, old.as_deref(), dirty);
            }
            Kind::Gateway => {
                let old = self.gateways.remove(&name);
                self.touch_gateway(&name, old.as_deref(), dirty);
            }
            Kind::GatewayClass => {
                let old = self.gateways.remove_class(&id.name);
                self.touch_gateway_class(&id.name, old.as_deref(), dirty);
            }
            Kind::ServiceAccount | Kind::Deployment => {
                self.others.remove(id);
            }
        }
    }
}
