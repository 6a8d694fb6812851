//! Namespaces: what they decide for the pods and services in them.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Dirty, Index, Note};
use crate::api::{DataplaneMode, Kind, Namespace, ObjectId, Pod, WaypointBinding};

/// The namespaces by name.
#[derive(Debug, Default)]
pub(super) struct Namespaces(HashMap<Arc<str>, Arc<Namespace>>);

impl Namespaces {
    /// Returns whether anything changed.
    pub(super) fn insert(&mut self, namespace: &Arc<Namespace>) -> bool {
        let old = self.0.insert(namespace.name.clone(), namespace.clone());
        old.is_none_or(|old| old != *namespace)
    }

    /// Returns whether it was there.
    pub(super) fn remove(&mut self, name: &str) -> bool {
        self.0.remove(name).is_some()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nobody knows if the mesh is to carry the pod's traffic: what decides is not valid, and says nothing else.
    pub(super) fn is_in_doubt(&self, pod: &Pod) -> bool {
        let is_stand_in = || self.0.get(&pod.name.namespace).is_some_and(|namespace| namespace.is_stand_in);
        let is_of_one = || pod.mode == DataplaneMode::Unset && is_stand_in();
        !pod.host_network && (is_of_one() || pod.is_stand_in && self.enrols(pod))
    }

    /// What to tell people, by name.
    pub(super) fn notes(&self) -> Vec<Note> {
        let stand_ins = self.0.values().filter(|namespace| namespace.is_stand_in);
        let note = |namespace: &Arc<Namespace>| Note {
            object: ObjectId::cluster(Kind::Namespace, namespace.name.clone()).to_string(),
            reason:
                "is not valid, and has no earlier version: its pods count as enrolled, and none of them is reached in \
                     plaintext"
                    .to_owned(),
        };
        let mut notes: Vec<Note> = stand_ins.map(note).collect();
        notes.sort_by(|a, b| a.object.cmp(&b.object));
        notes
    }

    /// Whether the mesh is to carry the pod's traffic. The pod's own label wins; host-network pods never are.
    pub(super) fn enrols(&self, pod: &Pod) -> bool {
        if pod.host_network {
            return false;
        }
        match pod.mode {
            DataplaneMode::Ambient => true,
            DataplaneMode::Off => false,
            DataplaneMode::Unset => {
                self.0.get(&pod.name.namespace).is_some_and(|namespace| namespace.mode == DataplaneMode::Ambient)
            }
        }
    }

    /// The binding of the namespace itself.
    pub(super) fn waypoint(&self, namespace: &str) -> &WaypointBinding {
        self.0.get(namespace).map_or(&WaypointBinding::Unset, |namespace| &namespace.waypoint)
    }
}

impl Index {
    pub(super) fn touch_namespace(&mut self, namespace: &Arc<str>, dirty: &mut Dirty) {
        self.touch_entries_in(namespace, dirty);
        dirty.workload_entries.extend(self.workload_entries.in_namespace(namespace).cloned());
        dirty.pods.extend(self.pods.in_namespace(namespace).cloned());
        dirty.services.extend(self.services.in_namespace(namespace).cloned());
    }
}
