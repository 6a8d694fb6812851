//! Nodes: where their pods stand.

use std::collections::HashMap;
use std::sync::Arc;

use mesh_proto::workload as wire;

use super::{Dirty, Index};
use crate::api::Node;

/// The nodes by name.
#[derive(Debug, Default)]
pub(super) struct Nodes(HashMap<Arc<str>, Arc<Node>>);

impl Nodes {
    /// Returns what was there before.
    pub(super) fn insert(&mut self, node: &Arc<Node>) -> Option<Arc<Node>> {
        self.0.insert(node.name.clone(), node.clone())
    }

    /// Returns what was there.
    pub(super) fn remove(&mut self, name: &str) -> Option<Arc<Node>> {
        self.0.remove(name)
    }

    pub(super) fn get(&self, name: &str) -> Option<&Arc<Node>> {
        self.0.get(name)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Where a node stands, if it is known and says so.
    pub(super) fn locality(&self, node: &str) -> Option<wire::Locality> {
        let locality = &self.0.get(node)?.locality;
        let is_empty = locality.region.is_empty() && locality.zone.is_empty() && locality.subzone.is_empty();
        (!is_empty).then(|| wire::Locality {
            region: locality.region.clone(),
            zone: locality.zone.clone(),
            subzone: locality.subzone.clone(),
        })
    }
}

impl Index {
    pub(super) fn touch_node(&mut self, node: &str, old: Option<&Node>, dirty: &mut Dirty) {
        let new = self.nodes.get(node).map(Arc::as_ref);
        dirty.services.extend(self.ingress.set_node(old, new));
        if old.map(|node| &node.locality) == new.map(|node| &node.locality) {
            return;
        }
        dirty.pods.extend(self.pods.on_node(node).cloned());
        dirty.slices.extend(self.slices.on_node(node).cloned());
    }
}
