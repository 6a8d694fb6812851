//! Pods, found by name, label, address, node and namespace; and the workload that each becomes.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use super::multimap::MultiMap;
use super::resource::Changes;
use super::{Dirty, Index, Note, encode, names, workload};
use crate::api::{Kind, Labels, Name, ObjectId, Pod};

type Pair = (Arc<str>, String, String);

/// The pods, with what finds them.
#[derive(Debug, Default)]
pub(super) struct Pods {
    all: HashMap<Name, Arc<Pod>>,
    by_namespace: MultiMap<Arc<str>, Name>,
    by_label: MultiMap<Pair, Name>,
    by_node: MultiMap<Arc<str>, Name>,
    /// Live pods only: an address may be given to a new pod once the old one has ended.
    by_address: MultiMap<IpAddr, Name>,
    /// Those that stand for pods that are not valid.
    stand_ins: BTreeSet<Name>,
}

impl Pods {
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Pod>> {
        self.all.values()
    }

    /// The pod of this name.
    pub(super) fn get(&self, name: &Name) -> Option<&Arc<Pod>> {
        self.all.get(name)
    }

    /// The names of the pods on a node, in order.
    pub(super) fn on_node(&self, node: &str) -> impl Iterator<Item = &Name> {
        self.by_node.get(node)
    }

    /// Returns what was there before.
    pub(super) fn insert(&mut self, pod: Arc<Pod>) -> Option<Arc<Pod>> {
        let old = self.remove(&pod.name);
        let name = &pod.name;
        self.by_namespace.insert(name.namespace.clone(), name.clone());
        for (key, value) in &pod.labels {
            self.by_label.insert((name.namespace.clone(), key.clone(), value.clone()), name.clone());
        }
        self.by_node.insert(pod.node.clone(), name.clone());
        for address in live_addresses(&pod) {
            self.by_address.insert(*address, name.clone());
        }
        if pod.is_stand_in {
            self.stand_ins.insert(name.clone());
        }
        self.all.insert(name.clone(), pod);
        old
    }

    /// Returns what was there.
    pub(super) fn remove(&mut self, name: &Name) -> Option<Arc<Pod>> {
        let pod = self.all.remove(name)?;
        self.by_namespace.remove(&name.namespace, name);
        for (key, value) in &pod.labels {
            self.by_label.remove(&(name.namespace.clone(), key.clone(), value.clone()), name);
        }
        self.by_node.remove(&pod.node, name);
        for address in live_addresses(&pod) {
            self.by_address.remove(address, name);
        }
        self.stand_ins.remove(name);
        Some(pod)
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn in_namespace(&self, namespace: &str) -> impl Iterator<Item = &Name> {
        self.by_namespace.get(namespace)
    }

    /// The namespaces that have pods.
    pub(super) fn namespaces(&self) -> impl Iterator<Item = &Arc<str>> {
        self.by_namespace.keys()
    }

    /// What to tell people, by name.
    pub(super) fn notes(&self) -> impl Iterator<Item = Note> {
        let stand_ins = self.stand_ins.iter().filter_map(|name| self.all.get(name));
        stand_ins.filter(|pod| !pod.phase.is_over()).map(|pod| Note {
            object: ObjectId::namespaced(Kind::Pod, &pod.name).to_string(),
            reason: if pod.addresses.is_empty() {
                "is not valid, and has no earlier version; it has no address that can be read, and is not known to proxies"
            } else {
                "is not valid, and has no earlier version: it counts as enrolled unless it or its namespace says otherwise, \
                 and is then not reached in plaintext"
            }
            .to_owned(),
        })
    }

    /// Live pods that have this address.
    pub(super) fn at(&self, address: IpAddr) -> impl Iterator<Item = &Arc<Pod>> {
        self.by_address.get(&address).filter_map(|name| self.all.get(name))
    }

    /// The pods of a namespace that carry every label of `selector`. An empty selector selects nothing.
    pub(super) fn selected<'a>(&'a self, namespace: &Arc<str>, selector: &'a Labels) -> Vec<Name> {
        // The rarest of the labels leaves the fewest pods to look at.
        let pairs = selector.iter().map(|(key, value)| (namespace.clone(), key.clone(), value.clone()));
        let Some(rarest) = pairs.min_by_key(|pair| self.by_label.count(pair)) else { return Vec::new() };
        let carries_all = |name: &&Name| {
            let labels = self.all.get(*name).map(|pod| &pod.labels);
            labels.is_some_and(|labels| selects(selector, labels))
        };
        self.by_label.get(&rarest).filter(carries_all).cloned().collect()
    }
}

/// Whether `labels` has every label of `selector`; an empty selector selects nothing.
pub(super) fn selects(selector: &Labels, labels: &Labels) -> bool {
    !selector.is_empty() && selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// The addresses of a pod that takes part; a pod that has ended has none.
fn live_addresses(pod: &Pod) -> &[IpAddr] {
    if pod.phase.is_over() { &[] } else { &pod.addresses }
}

impl Index {
    pub(super) fn touch_pod(&self, name: &Name, old: Option<&Pod>, dirty: &mut Dirty) {
        let new = self.pods.get(name).map(Arc::as_ref);
        if old == new {
            return;
        }
        dirty.pods.insert(name.clone());
        let before = old.map_or(&[][..], live_addresses);
        let after = new.map_or(&[][..], live_addresses);
        let same_host = old.map(|pod| pod.host_network) == new.map(|pod| pod.host_network);
        if before == after && same_host {
            return;
        }
        // Endpoints at these addresses may become this pod, or stop being it.
        for address in before.iter().chain(after) {
            let mut slices = self.slices.at(*address).peekable();
            if slices.peek().is_some() {
                dirty.slices.extend(slices.cloned());
                dirty.pods.extend(self.pods.at(*address).map(|pod| pod.name.clone()));
            }
        }
    }

    pub(super) fn recompute_pod(&mut self, name: &Name, now: SystemTime, changes: &mut Changes) {
        let uid = self.options.pod_uid(name);
        let bound = self.options.confirmation;
        let known = self.pods.get(name).cloned();
        let Some(pod) = known.clone().filter(|pod| !live_addresses(pod).is_empty()) else {
            self.waiting.forget(name, bound);
            let is_enrolled = known.is_some_and(|pod| !pod.phase.is_over() && self.namespaces.enrols(&pod));
            self.waiting.start(name, is_enrolled);
            self.addresses.withdraw(&uid, changes);
            return;
        };
        let is_in_doubt = self.namespaces.is_in_doubt(&pod);
        let is_unconfirmed = self.namespaces.enrols(&pod) && !is_in_doubt && !pod.captured && !pod.native_tunnel;
        let is_waiting = if is_unconfirmed {
            let began = if self.synced { now } else { pod.created.map_or(now, |created| created.min(now)) };
            self.waiting.wait(name, began, bound, now)
        } else {
            self.waiting.forget(name, bound);
            false
        };
        let message = workload::of_pod(
            &self.options,
            &pod,
            workload::Surroundings {
                uid,
                waypoint: self.pod_waypoint(&pod),
                locality: self.nodes.locality(&pod.node),
                policies: self.policies_of(&pod.name.namespace, &pod.labels),
                is_waiting,
                is_from_start: is_unconfirmed && self.waiting.is_from_start(name),
                is_in_doubt,
                is_refused: false,
            },
        );
        // The address of a host-network pod is the node's: whoever asks for it does not mean the pod.
        let aliases =
            if pod.host_network { Vec::new() } else { pod.addresses.iter().copied().map(names::alias).collect() };
        let resource = encode::workload(&message, self.services_of_pod(&pod), aliases);
        self.addresses.publish(resource, changes);
    }
}
