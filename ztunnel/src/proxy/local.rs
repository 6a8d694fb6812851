//! A pod of this node as the decisions know it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};

use mesh_model::{Snapshot, SpiffeId, Viewpoint, Workload};

/// Ports that the mesh itself listens on in every enrolled pod: no connection is carried to them.
const FORBIDDEN_PORTS: [u16; 4] = [15001, 15006, 15008, 15053];

/// Whether `port` of an enrolled pod belongs to the mesh itself.
pub fn is_forbidden(port: u16) -> bool {
    FORBIDDEN_PORTS.contains(&port)
}

/// A pod of this node. All of it is known from the agent and the configuration, so that a pod whose workload
/// discovery has not brought yet is served all the same.
#[derive(Debug, Clone, Copy)]
pub struct LocalPod<'a> {
    /// Kubernetes name.
    pub name: &'a str,
    /// Kubernetes namespace.
    pub namespace: &'a str,
    /// Who the pod is.
    pub identity: &'a SpiffeId,
    /// The pod's addresses, the primary one first.
    pub addresses: &'a [IpAddr],
    /// Network of this node.
    pub network: &'a str,
    /// Kubernetes node.
    pub node: &'a str,
    /// Kubernetes cluster.
    pub cluster_id: &'a str,
}

impl LocalPod<'_> {
    /// What discovery knows of the pod. A workload that has the pod's address but is another pod, because the address
    /// was given anew and discovery is behind, does not count.
    pub fn workload<'s>(&self, snapshot: &'s Snapshot) -> Option<&'s Arc<Workload>> {
        let at_address = self.addresses.iter().filter_map(|ip| snapshot.workload_by_ip(self.network, *ip));
        at_address.into_iter().find(|workload| {
            *workload.name == *self.name
                && *workload.origin.namespace == *self.namespace
                && workload.spiffe_id().service_account() == self.identity.service_account()
        })
    }

    /// Where the pod is, as far as is known.
    pub fn viewpoint<'a>(&'a self, workload: Option<&'a Arc<Workload>>) -> Viewpoint<'a> {
        let own = Viewpoint {
            network: self.network,
            namespace: self.namespace,
            node: self.node,
            cluster_id: self.cluster_id,
            ..Viewpoint::default()
        };
        workload.map_or(own, |workload| Viewpoint::of(workload))
    }
}

/// The addresses of the pods that this proxy serves, whether or not discovery has brought them.
#[derive(Debug, Default)]
pub struct LocalAddresses(RwLock<HashMap<IpAddr, usize>>);

impl LocalAddresses {
    /// Lists a pod's addresses until what is returned is dropped.
    pub fn list(self: &Arc<Self>, addresses: &[IpAddr]) -> Listed {
        // Counting leaves nothing half done.
        let mut listed = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for ip in addresses {
            *listed.entry(*ip).or_default() += 1;
        }
        drop(listed);
        Listed { of: Arc::clone(self), addresses: addresses.into() }
    }

    /// Whether a pod has the address.
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).contains_key(&ip)
    }
}

/// Keeps a pod's addresses in the list.
#[derive(Debug)]
pub struct Listed {
    of: Arc<LocalAddresses>,
    addresses: Box<[IpAddr]>,
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut listed = self.of.0.write().unwrap_or_else(PoisonError::into_inner);
        for ip in &self.addresses {
            if let Some(count) = listed.get_mut(ip) {
                *count -= 1;
                if *count == 0 {
                    listed.remove(ip);
                }
            }
        }
    }
}

#[cfg(test)]
pub(super) mod fixture;
