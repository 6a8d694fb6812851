//! Namespaces: what they decide for the pods and services in them.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Dirty, Index};
use crate::api::{DataplaneMode, Namespace, Pod, WaypointBinding};

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
    pub(super) fn touch_namespace(&self, namespace: &Arc<str>, dirty: &mut Dirty) {
        dirty.pods.extend(self.pods.in_namespace(namespace).cloned());
        dirty.services.extend(self.services.in_namespace(namespace).cloned());
    }
}
