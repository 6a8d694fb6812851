//! Whether the mesh is being taken off the cluster. That is said by the deletion of its own namespace, and by nothing else:
//! an agent that ends for any other reason leaves the pods' capture in force, which then drops what no proxy carries.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use k8s_openapi::api::core::v1::Namespace;
use kube::api::PartialObjectMeta;
use kube::runtime::watcher::Event;

/// What the source last saw of it, for whoever ends the agent. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Removal(Arc<AtomicBool>);

impl Removal {
    /// Whether the mesh's namespace is being deleted, or is gone after it was there.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn set(&self, wanted: bool) {
        match (self.0.swap(wanted, Ordering::Relaxed), wanted) {
            (false, true) => {
                tracing::warn!("the mesh's namespace is being deleted: this agent's end releases all pods")
            }
            (true, false) => tracing::info!("the mesh's namespace is there again: this agent's end releases no pod"),
            (true, true) | (false, false) => {}
        }
    }
}

/// The mesh's own namespace, as a watch of namespaces tells of it.
#[derive(Debug)]
pub(super) struct OwnNamespace {
    name: String,
    /// In the list that is under way.
    is_listed: bool,
    /// It was there once; what was never there is not gone.
    was_there: bool,
    removal: Removal,
}

impl OwnNamespace {
    pub(super) const fn new(name: String, removal: Removal) -> Self {
        Self { name, is_listed: false, was_there: false, removal }
    }

    pub(super) fn take(&mut self, event: &Event<PartialObjectMeta<Namespace>>) {
        let is_own = |object: &PartialObjectMeta<Namespace>| object.metadata.name.as_ref() == Some(&self.name);
        match event {
            Event::Init => self.is_listed = false,
            Event::InitDone if self.was_there && !self.is_listed => self.removal.set(true),
            Event::InitDone => {}
            Event::Delete(object) if is_own(object) => self.removal.set(true),
            Event::Apply(object) | Event::InitApply(object) if is_own(object) => {
                (self.is_listed, self.was_there) = (true, true);
                self.removal.set(object.metadata.deletion_timestamp.is_some());
            }
            Event::Delete(_) | Event::Apply(_) | Event::InitApply(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn namespace(name: &str, ends: bool) -> PartialObjectMeta<Namespace> {
        let mut metadata = json!({ "name": name });
        if ends {
            metadata["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        serde_json::from_value(json!({ "metadata": metadata })).unwrap()
    }

    fn after(events: Vec<Event<PartialObjectMeta<Namespace>>>) -> bool {
        let removal = Removal::default();
        let mut own = OwnNamespace::new("culvert-system".into(), removal.clone());
        events.iter().for_each(|event| own.take(event));
        removal.is_wanted()
    }

    #[test]
    fn the_deletion_of_the_meshs_namespace_alone_counts() {
        let own = |ends| namespace("culvert-system", ends);
        let listed = |objects: Vec<_>| {
            let objects = objects.into_iter().map(Event::InitApply);
            [Event::Init].into_iter().chain(objects).chain([Event::InitDone])
        };
        assert!(!after(listed(vec![own(false), namespace("shop", true)]).collect()));
        assert!(after(listed(vec![own(true)]).collect()));
        assert!(after(listed(vec![own(false)]).chain([Event::Apply(own(true))]).collect()));
        assert!(after(listed(vec![own(false)]).chain([Event::Delete(own(false))]).collect()));
        assert!(!after(listed(vec![own(false)]).chain([Event::Delete(namespace("shop", false))]).collect()));
    }

    #[test]
    fn it_was_there_and_is_in_no_whole_list_any_more() {
        let list = |object: Option<_>| {
            let object = object.map(Event::InitApply);
            [Event::Init].into_iter().chain(object).chain([Event::InitDone])
        };
        let own = || Some(namespace("culvert-system", false));
        assert!(after(list(own()).chain(list(None)).collect()));
        assert!(!after(list(own()).chain([Event::Init]).collect()), "the list is not whole yet");
        assert!(!after(list(None).collect()), "an agent whose mesh has no namespace of its own");
        assert!(!after(list(own()).chain(list(None)).chain(list(own())).collect()), "it is there again");
    }
}
