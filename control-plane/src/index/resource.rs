//! A discovery resource and a set of changes to resources.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

/// One resource as it goes on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Its primary name: a workload's uid, `namespace/hostname` of a service, or `namespace/name` of a policy.
    pub name: Arc<str>,
    /// The other names under which it may be asked for: `network/address`.
    pub aliases: Vec<Arc<str>>,
    /// Changes if and only if the body does, and is the same on every replica.
    pub version: Arc<str>,
    /// The encoded `istio.workload.Address` or `istio.security.Authorization`.
    pub body: Bytes,
    /// The services that a workload stands behind, by primary name: whoever asks for one of them gets it too.
    pub member_of: Vec<Arc<str>>,
    /// A policy that holds only for workloads that name it.
    pub is_named: bool,
    /// A workload or service that is bound to a waypoint, which must be known before it: what is bound to one that is not
    /// known is refused.
    pub is_bound: bool,
}

/// Resources that are new or different, and names of resources that are gone: workloads and services, and policies.
///
/// A client is sent policies before workloads. So a policy that workloads name is known before they name it; but one that
/// none of them names any more must be told to be gone only when they all know that: until then a workload names what is
/// not there, and is refused its connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    set: BTreeMap<Arc<str>, Arc<Resource>>,
    removed: BTreeSet<Arc<str>>,
    policies: BTreeMap<Arc<str>, Option<Arc<Resource>>>,
    late: BTreeMap<Arc<str>, Option<Arc<Resource>>>,
}

impl Changes {
    /// Nothing changed.
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.removed.is_empty() && self.policies.is_empty() && self.late.is_empty()
    }

    /// New or different workloads and services, by name.
    pub fn changed(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.set.values()
    }

    /// Names of workloads and services that are gone.
    pub fn removed(&self) -> impl Iterator<Item = &Arc<str>> {
        self.removed.iter()
    }

    /// Policies by name, none for one that is gone: to be told before the workloads, or with them.
    pub fn policies(&self) -> &BTreeMap<Arc<str>, Option<Arc<Resource>>> {
        &self.policies
    }

    /// Policies by name, none for one that is gone: to be told once the workloads are known.
    pub fn late_policies(&self) -> &BTreeMap<Arc<str>, Option<Arc<Resource>>> {
        &self.late
    }

    pub(super) fn set(&mut self, resource: Arc<Resource>) {
        self.removed.remove(&resource.name);
        self.set.insert(resource.name.clone(), resource);
    }

    pub(super) fn remove(&mut self, name: Arc<str>) {
        self.set.remove(&name);
        self.removed.insert(name);
    }

    pub(super) fn policy(&mut self, name: Arc<str>, policy: Option<Arc<Resource>>, is_late: bool) {
        let (there, other) =
            if is_late { (&mut self.late, &mut self.policies) } else { (&mut self.policies, &mut self.late) };
        other.remove(&name);
        there.insert(name, policy);
    }
}
