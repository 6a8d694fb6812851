//! Which pods there are, as whom and where: what the certificate authority asks before it signs.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use mesh_model::SpiffeId;

use super::Event;
use super::multimap::MultiMap;
use crate::api::{Kind, Name, Object, Pod};
use crate::ca::{Directory, NodeIdentity, PodRecord};

/// The pods, shared between the one who follows changes and those who ask.
///
/// The lock is held for one look-up, or while the pods of one batch are taken in; never across an await.
#[derive(Debug, Default)]
pub struct Roster {
    pods: RwLock<Pods>,
    is_synced: AtomicBool,
}

#[derive(Debug, Default)]
struct Pods {
    all: HashMap<Name, Arc<Pod>>,
    by_identity: MultiMap<Identity, Name>,
    /// Pods that have not ended, by node; those that are not scheduled yet under the empty name.
    by_node: MultiMap<(Arc<str>, Identity), Name>,
}

/// Namespace and service account.
type Identity = (Arc<str>, Arc<str>);

impl Roster {
    /// Takes in what `events` say of pods. The first call makes the roster complete.
    pub fn apply(&self, events: &[Event]) {
        let mut pods = self.pods.write().unwrap_or_else(PoisonError::into_inner);
        for event in events {
            match event {
                Event::Apply(Object::Pod(pod)) => pods.insert(pod),
                Event::Delete(id) if id.kind == Kind::Pod => pods.remove(&id.to_name()),
                Event::Apply(_) | Event::Delete(_) => {}
            }
        }
        drop(pods);
        self.is_synced.store(true, Ordering::Release);
    }
}

impl Directory for Roster {
    fn is_synced(&self) -> bool {
        self.is_synced.load(Ordering::Acquire)
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<PodRecord> {
        let pods = self.pods.read().unwrap_or_else(PoisonError::into_inner);
        let pod = pods.all.get(&Name::new(namespace, name))?;
        Some(PodRecord {
            uid: pod.uid.to_string(),
            service_account: pod.service_account.to_string(),
            node: pod.node.to_string(),
            is_over: pod.phase.is_over(),
        })
    }

    fn identity_on_node(&self, node: &str, id: &SpiffeId) -> NodeIdentity {
        let identity: Identity = (id.namespace().into(), id.service_account().into());
        let pods = self.pods.read().unwrap_or_else(PoisonError::into_inner);
        let on = |node: &str| pods.by_node.count(&(Arc::from(node), identity.clone())) > 0;
        if !node.is_empty() && on(node) {
            NodeIdentity::Present
        } else if on("") || pods.by_identity.count(&identity) == 0 {
            // A pod that is not scheduled yet, as far as is known here, may by now run on that node.
            NodeIdentity::UnknownYet
        } else {
            NodeIdentity::Absent
        }
    }
}

impl Pods {
    fn insert(&mut self, pod: &Arc<Pod>) {
        self.remove(&pod.name);
        // Nobody gets a certificate.
        if &*pod.service_account != Pod::NOBODY {
            self.by_identity.insert(identity(pod), pod.name.clone());
            if !pod.phase.is_over() {
                self.by_node.insert((pod.node.clone(), identity(pod)), pod.name.clone());
            }
        }
        self.all.insert(pod.name.clone(), pod.clone());
    }

    fn remove(&mut self, name: &Name) {
        if let Some(pod) = self.all.remove(name) {
            self.by_identity.remove(&identity(&pod), name);
            self.by_node.remove(&(pod.node.clone(), identity(&pod)), name);
        }
    }
}

fn identity(pod: &Pod) -> Identity {
    (pod.name.namespace.clone(), pod.service_account.clone())
}
