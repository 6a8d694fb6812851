//! Addresses of load balancers. A service has one to itself, or not at all: where nodes have it as well (as small load
//! balancers give it, k3s' among them), or several services share it, other ports than the service's lead elsewhere, and the
//! mesh leaves the address alone.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use super::multimap::MultiMap;
use crate::api::{Name, Node, Service};

/// Who says to have which address.
#[derive(Debug, Default)]
pub(super) struct Ingress {
    wanted: HashMap<Name, Vec<IpAddr>>,
    services: MultiMap<IpAddr, Name>,
    nodes: MultiMap<IpAddr, Arc<str>>,
}

impl Ingress {
    /// The service is new or has changed. Returns the services whose addresses may have changed.
    pub(super) fn set(&mut self, service: &Service) -> BTreeSet<Name> {
        let now = &service.ingress;
        if self.wanted.get(&service.name).map(Vec::as_slice).unwrap_or_default() == now.as_slice() {
            return BTreeSet::new();
        }
        let mut touched = self.remove(&service.name);
        for address in now {
            self.services.insert(*address, service.name.clone());
        }
        touched.extend(self.at(now));
        if !now.is_empty() {
            self.wanted.insert(service.name.clone(), now.clone());
        }
        touched
    }

    /// The service is gone. Returns the services whose addresses may have changed.
    pub(super) fn remove(&mut self, service: &Name) -> BTreeSet<Name> {
        let before = self.wanted.remove(service).unwrap_or_default();
        let touched = self.at(&before);
        for address in &before {
            self.services.remove(address, service);
        }
        touched
    }

    /// A node was `before`, and is `now`. Returns the services whose addresses may have changed.
    pub(super) fn set_node(&mut self, before: Option<&Node>, now: Option<&Node>) -> BTreeSet<Name> {
        let mut touched = BTreeSet::new();
        if before.map(|node| &node.addresses) == now.map(|node| &node.addresses) {
            return touched;
        }
        if let Some(node) = before {
            for address in &node.addresses {
                self.nodes.remove(address, &*node.name);
            }
            touched.extend(self.at(&node.addresses));
        }
        if let Some(node) = now {
            for address in &node.addresses {
                self.nodes.insert(*address, node.name.clone());
            }
            touched.extend(self.at(&node.addresses));
        }
        touched
    }

    /// The addresses that the service has to itself.
    pub(super) fn of(&self, service: &Name) -> Vec<IpAddr> {
        let wanted = self.wanted.get(service).map(Vec::as_slice).unwrap_or_default();
        let is_own = |address: &IpAddr| self.services.count(address) == 1 && self.nodes.count(address) == 0;
        wanted.iter().copied().filter(is_own).collect()
    }

    fn at(&self, addresses: &[IpAddr]) -> BTreeSet<Name> {
        addresses.iter().flat_map(|address| self.services.get(address)).cloned().collect()
    }
}
