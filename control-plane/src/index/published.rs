//! The resources in force, of one type.

use std::collections::HashMap;
use std::sync::Arc;

use super::resource::{Changes, Resource};

/// By name.
#[derive(Debug, Default)]
pub(super) struct Published(HashMap<Arc<str>, Arc<Resource>>);

impl Published {
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.0.values()
    }

    /// Puts an address in force.
    pub(super) fn publish(&mut self, resource: Resource, changes: &mut Changes) {
        if let Some((resource, _)) = self.put(resource) {
            changes.set(resource);
        }
    }

    pub(super) fn withdraw(&mut self, name: &str, changes: &mut Changes) {
        if let Some((name, _)) = self.0.remove_entry(name) {
            changes.remove(name);
        }
    }

    /// Puts a policy in force.
    pub(super) fn publish_policy(&mut self, resource: Resource, changes: &mut Changes) {
        if let Some((resource, old)) = self.put(resource) {
            // What held for all must not give way to what holds for those that name it, before they do.
            let is_narrower = resource.is_named && old.is_some_and(|old| !old.is_named);
            changes.policy(resource.name.clone(), Some(resource), is_narrower);
        }
    }

    pub(super) fn withdraw_policy(&mut self, name: &str, changes: &mut Changes) {
        if let Some((name, old)) = self.0.remove_entry(name) {
            changes.policy(name, None, old.is_named);
        }
    }

    /// The resource with the one it replaces; none if it is no news.
    fn put(&mut self, resource: Resource) -> Option<(Arc<Resource>, Option<Arc<Resource>>)> {
        if self.0.get(&resource.name).is_some_and(|current| **current == resource) {
            return None;
        }
        let resource = Arc::new(resource);
        let old = self.0.insert(resource.name.clone(), resource.clone());
        Some((resource, old))
    }
}
