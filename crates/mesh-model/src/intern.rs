//! One copy of each text that many workloads share: nodes, namespaces, services, zones.
//!
//! At 100,000 workloads the same few thousand texts would otherwise be held a million times.

use std::sync::Arc;

use imbl::HashMap;

use crate::workload::Workload;

/// Below this many texts there is nothing to gain from looking for unused ones.
const SWEEP_FLOOR: usize = 4096;

/// The texts in use, and some that no longer are.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interner {
    texts: HashMap<Arc<str>, ()>,
    /// How many were in use when that was last looked at.
    in_use: usize,
}

impl Interner {
    /// Puts the shared copies in place of a workload's own, where others are likely to have the same.
    pub(crate) fn share(&mut self, workload: &mut Workload) {
        let Workload { namespace, network, node, hostname, cluster_id, locality, .. } = workload;
        let Workload { canonical_name, canonical_revision, workload_name, .. } = workload;
        let place = [namespace, network, node, hostname, cluster_id];
        let names = [canonical_name, canonical_revision, workload_name];
        let locality = [&mut locality.region, &mut locality.zone, &mut locality.subzone];
        let services = workload.services.iter_mut().map(|membership| &mut membership.service);
        let policies = workload.authorization_policies.iter_mut();
        let all = place.into_iter().chain(names).chain(locality).chain(services).chain(policies);
        all.for_each(|text| self.share_one(text));
        self.sweep();
    }

    fn share_one(&mut self, text: &mut Arc<str>) {
        match self.texts.get_key_value(&**text) {
            Some((shared, ())) => *text = Arc::clone(shared),
            None => {
                self.texts.insert(Arc::clone(text), ());
            }
        }
    }

    /// Forgets what nothing else holds, once as much again has come as was in use: constant time on average. A copy
    /// of the snapshot may keep some for longer, which costs a little memory and nothing else.
    fn sweep(&mut self) {
        if self.texts.len() < SWEEP_FLOOR.max(self.in_use * 2) {
            return;
        }
        // Counted before anything is removed: removing copies nodes, and with them the counts.
        let unused = self.texts.keys().filter(|text| Arc::strong_count(text) == 1);
        let unused: Vec<_> = unused.cloned().collect();
        for text in unused {
            self.texts.remove(&text);
        }
        self.in_use = self.texts.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{in_service, pod};

    fn workload(name: &str, node: &str) -> Workload {
        let wire = mesh_proto::workload::Workload { node: node.into(), ..in_service(pod(name, &[]), "web", &[]) };
        Workload::try_from(&wire).unwrap()
    }

    #[test]
    fn equal_texts_become_one() {
        let mut interner = Interner::default();
        let (mut a, mut b) = (workload("a", "node-1"), workload("b", "node-1"));
        let (before_a, before_b) = (a.clone(), b.clone());
        interner.share(&mut a);
        interner.share(&mut b);
        assert_eq!((&a, &b), (&before_a, &before_b));
        assert!(Arc::ptr_eq(&a.node, &b.node) && Arc::ptr_eq(&a.namespace, &b.namespace));
        assert!(Arc::ptr_eq(&a.services[0].service, &b.services[0].service));
    }

    #[test]
    fn what_is_not_used_is_forgotten() {
        let mut interner = Interner::default();
        let mut kept = workload("kept", "node-kept");
        interner.share(&mut kept);
        for number in 0..3 * SWEEP_FLOOR {
            interner.share(&mut workload("gone", &format!("node-{number}")));
            // One workload brings a handful at a time.
            assert!(interner.texts.len() < SWEEP_FLOOR + 16, "{}", interner.texts.len());
        }
        let mut again = workload("again", "node-kept");
        interner.share(&mut again);
        assert!(Arc::ptr_eq(&kept.node, &again.node));
    }
}
