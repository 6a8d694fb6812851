//! Which pods there are, as whom and where: what the certificate authority asks before it signs.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use super::Event;
use super::multimap::MultiMap;
use crate::api::{Kind, Name, Object, Pod};

/// The pods that have not ended, shared between the one who follows changes and those who ask.
///
/// The lock is held for a look-up or for the pods of one batch, never across an await.
#[derive(Debug, Default)]
pub struct Roster(RwLock<Pods>);

#[derive(Debug, Default)]
struct Pods {
    all: HashMap<Name, Entry>,
    /// Pods by node and by the identity they run as.
    by_node: MultiMap<Place, Name>,
}

type Place = (Arc<str>, Arc<str>, Arc<str>);

/// A pod that has not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Kubernetes' unique id of this very pod; empty when its object has none.
    pub uid: Arc<str>,
    /// The service account it runs as.
    pub service_account: Arc<str>,
    /// The node it runs on; empty until it is scheduled.
    pub node: Arc<str>,
}

impl Roster {
    /// Takes in what `events` say of pods.
    pub fn apply(&self, events: &[Event]) {
        let mut pods = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for event in events {
            match event {
                Event::Apply(Object::Pod(pod)) => pods.insert(pod),
                Event::Delete(id) if id.kind == Kind::Pod => pods.remove(&id.to_name()),
                Event::Apply(_) | Event::Delete(_) => {}
            }
        }
    }

    /// The pod of this name, unless it has ended.
    pub fn pod(&self, name: &Name) -> Option<Entry> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).all.get(name).cloned()
    }

    /// Whether a pod of this namespace and service account runs on the node.
    pub fn runs_on(&self, node: &str, namespace: &str, service_account: &str) -> bool {
        let place: Place = (node.into(), namespace.into(), service_account.into());
        self.0.read().unwrap_or_else(PoisonError::into_inner).by_node.count(&place) > 0
    }
}

impl Pods {
    fn insert(&mut self, pod: &Pod) {
        self.remove(&pod.name);
        if pod.phase.is_over() {
            return;
        }
        let entry =
            Entry { uid: pod.uid.clone(), service_account: pod.service_account.clone(), node: pod.node.clone() };
        if !entry.node.is_empty() {
            self.by_node.insert(place(&pod.name, &entry), pod.name.clone());
        }
        self.all.insert(pod.name.clone(), entry);
    }

    fn remove(&mut self, name: &Name) {
        if let Some(entry) = self.all.remove(name) {
            self.by_node.remove(&place(name, &entry), name);
        }
    }
}

fn place(name: &Name, entry: &Entry) -> Place {
    (entry.node.clone(), name.namespace.clone(), entry.service_account.clone())
}
