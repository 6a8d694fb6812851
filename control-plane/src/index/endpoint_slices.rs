//! EndpointSlices of services without a selector, and the workloads of endpoints that are no pods.
//!
//! Slices of a service with a selector are the cluster's own copy of what the selector already says, and are not read.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_proto::workload as wire;

use super::multimap::MultiMap;
use super::resource::{Changes, Resource};
use super::services::slice_ports;
use super::workload::Health;
use super::{Dirty, Index, encode, names, workload};
use crate::api::{Endpoint, EndpointSlice, Name, Pod, Service};

/// The slices, with what finds them.
#[derive(Debug, Default)]
pub(super) struct Slices {
    all: HashMap<Name, Arc<EndpointSlice>>,
    by_service: MultiMap<Name, Name>,
    by_address: MultiMap<IpAddr, Name>,
    by_node: MultiMap<Arc<str>, Name>,
}

impl Slices {
    /// Returns what was there before.
    pub(super) fn insert(&mut self, slice: Arc<EndpointSlice>) -> Option<Arc<EndpointSlice>> {
        let old = self.remove(&slice.name);
        let name = &slice.name;
        if let Some(service) = &slice.service {
            self.by_service.insert(service.clone(), name.clone());
        }
        for endpoint in &slice.endpoints {
            self.by_node.insert(endpoint.node.clone(), name.clone());
            for address in &endpoint.addresses {
                self.by_address.insert(*address, name.clone());
            }
        }
        self.all.insert(name.clone(), slice);
        old
    }

    /// Returns what was there.
    pub(super) fn remove(&mut self, name: &Name) -> Option<Arc<EndpointSlice>> {
        let slice = self.all.remove(name)?;
        if let Some(service) = &slice.service {
            self.by_service.remove(service, name);
        }
        for endpoint in &slice.endpoints {
            self.by_node.remove(&endpoint.node, name);
            for address in &endpoint.addresses {
                self.by_address.remove(address, name);
            }
        }
        Some(slice)
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn at(&self, address: IpAddr) -> impl Iterator<Item = &Name> {
        self.by_address.get(&address)
    }

    pub(super) fn on_node(&self, node: &str) -> impl Iterator<Item = &Name> {
        self.by_node.get(node)
    }

    pub(super) fn of_service(&self, service: &Name) -> impl Iterator<Item = &Arc<EndpointSlice>> {
        self.by_service.get(service).filter_map(|name| self.all.get(name))
    }
}

impl Index {
    pub(super) fn touch_slice(&self, name: &Name, old: Option<&EndpointSlice>, dirty: &mut Dirty) {
        let new = self.slices.all.get(name).map(Arc::as_ref);
        if old == new {
            return;
        }
        dirty.slices.insert(name.clone());
        let endpoints = old.into_iter().chain(new).flat_map(|slice| &slice.endpoints);
        let pods = endpoints.flat_map(|endpoint| &endpoint.addresses).flat_map(|address| self.pods.at(*address));
        dirty.pods.extend(pods.map(|pod| pod.name.clone()));
    }

    /// The slices that name this pod as an endpoint, each with its service.
    pub(super) fn slices_of_pod(&self, pod: &Pod) -> Vec<(&EndpointSlice, &Service)> {
        let mut found: BTreeMap<&Name, (&EndpointSlice, &Service)> = BTreeMap::new();
        for address in &pod.addresses {
            for slice in self.slices.at(*address).filter_map(|name| self.slices.all.get(name)) {
                let Some(service) = self.services.of_slice(slice) else { continue };
                // What is said of the endpoint counts beside what the pod says of itself: a controller may take one out.
                let names_pod = |endpoint: &Endpoint| {
                    (endpoint.ready || endpoint.serving)
                        && endpoint.addresses.contains(address)
                        && self.pods_of(endpoint, *address).iter().any(|found| found.name == pod.name)
                };
                if slice.endpoints.iter().any(names_pod) {
                    found.insert(&slice.name, (slice, service));
                }
            }
        }
        found.into_values().collect()
    }

    /// The pods that an endpoint is at one of its addresses. One that refers to a pod is that pod, if it has the address, or
    /// nobody yet; without a reference a host-network pod is not meant, because the address is the node's.
    fn pods_of(&self, endpoint: &Endpoint, address: IpAddr) -> Vec<&Arc<Pod>> {
        let is_meant = |pod: &&Arc<Pod>| match &endpoint.pod {
            Some(referred) => referred.name == pod.name,
            None => !pod.host_network,
        };
        self.pods.at(address).filter(is_meant).collect()
    }

    pub(super) fn recompute_slice(&mut self, name: &Name, changes: &mut Changes) {
        let resources = self.slices.all.get(name).map(|slice| self.endpoint_workloads(slice)).unwrap_or_default();
        let current: BTreeSet<Arc<str>> = resources.keys().cloned().collect();
        for gone in self.endpoints.remove(name).unwrap_or_default().difference(&current) {
            self.addresses.withdraw(gone, changes);
        }
        for resource in resources.into_values() {
            self.addresses.publish(resource, changes);
        }
        if !current.is_empty() {
            self.endpoints.insert(name.clone(), current);
        }
    }

    /// One workload for each address of the slice that no pod has, or is said to have: of a pod that is not known yet it is
    /// not known either whether it is enrolled.
    fn endpoint_workloads(&self, slice: &EndpointSlice) -> BTreeMap<Arc<str>, Resource> {
        let mut resources = BTreeMap::new();
        let Some(service) = self.services.of_slice(slice) else { return resources };
        let services = BTreeMap::from([(
            self.options.service_key(&service.name),
            wire::PortList { ports: slice_ports(slice, service) },
        )]);
        for endpoint in slice.endpoints.iter().filter(|endpoint| endpoint.pod.is_none()) {
            for address in &endpoint.addresses {
                if !self.pods_of(endpoint, *address).is_empty() {
                    continue;
                }
                let message = self.endpoint_workload(slice, endpoint, *address);
                let resource = encode::workload(&message, services.clone(), vec![names::alias(*address)]);
                resources.entry(resource.name.clone()).or_insert(resource);
            }
        }
        resources
    }

    fn endpoint_workload(&self, slice: &EndpointSlice, endpoint: &Endpoint, address: IpAddr) -> wire::Workload {
        let name = slice.service.as_ref().map_or(&slice.name.name, |service| &service.name);
        let zone =
            (!endpoint.zone.is_empty()).then(|| wire::Locality { zone: endpoint.zone.clone(), ..Default::default() });
        // What is ready is so whatever else is said of it, as with `publishNotReadyAddresses`.
        let health = if endpoint.ready { Health::Healthy } else { Health::of(endpoint.serving, true) };
        wire::Workload {
            uid: self.options.endpoint_uid(&slice.name, address),
            name: slice.name.name.to_string(),
            namespace: slice.name.namespace.to_string(),
            addresses: vec![names::address_bytes(address)],
            trust_domain: workload::trust_domain(&self.options),
            node: endpoint.node.to_string(),
            canonical_name: name.to_string(),
            canonical_revision: "latest".to_owned(),
            workload_type: wire::WorkloadType::Pod.into(),
            workload_name: slice.name.name.to_string(),
            status: health.status().into(),
            extensions: health.extension().into_iter().collect(),
            cluster_id: self.options.cluster_id.clone(),
            locality: self.nodes.locality(&endpoint.node).or(zone),
            ..Default::default()
        }
    }
}
