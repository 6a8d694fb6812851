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
    /// Returns whether anything changed.
    pub(super) fn insert(&mut self, node: &Arc<Node>) -> bool {
        let old = self.0.insert(node.name.clone(), node.clone());
        old.is_none_or(|old| old != *node)
    }

    /// Returns whether it was there.
    pub(super) fn remove(&mut self, name: &str) -> bool {
        self.0.remove(name).is_some()
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
    pub(super) fn touch_node(&self, node: &str, dirty: &mut Dirty) {
        dirty.pods.extend(self.pods.on_node(node).cloned());
        dirty.slices.extend(self.slices.on_node(node).cloned());
    }
}
