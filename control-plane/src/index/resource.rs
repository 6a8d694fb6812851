//! A discovery resource and a set of changes to resources.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

/// One resource as it goes on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Its primary name: a workload's uid, or `namespace/hostname` of a service.
    pub name: Arc<str>,
    /// The other names under which it may be asked for: `network/address`.
    pub aliases: Vec<Arc<str>>,
    /// Changes if and only if the body does, and is the same on every replica.
    pub version: Arc<str>,
    /// The encoded `istio.workload.Address`.
    pub body: Bytes,
    /// The services that a workload stands behind, by primary name: whoever asks for one of them gets it too.
    pub member_of: Vec<Arc<str>>,
}

/// Resources that are new or different, and names of resources that are gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    set: BTreeMap<Arc<str>, Arc<Resource>>,
    removed: BTreeSet<Arc<str>>,
}

impl Changes {
    /// Nothing changed.
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.removed.is_empty()
    }

    /// New or different resources, by name.
    pub fn changed(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.set.values()
    }

    /// Names of resources that are gone.
    pub fn removed(&self) -> impl Iterator<Item = &Arc<str>> {
        self.removed.iter()
    }

    pub(super) fn set(&mut self, resource: Arc<Resource>) {
        self.removed.remove(&resource.name);
        self.set.insert(resource.name.clone(), resource);
    }

    pub(super) fn remove(&mut self, name: Arc<str>) {
        self.set.remove(&name);
        self.removed.insert(name);
    }
}
