//! Services, found by name and by the pods they select; and the resource that each becomes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use mesh_model::{invalid, port_names};
use mesh_proto::extension;
use mesh_proto::workload as wire;
use prost::Message as _;

use super::multimap::MultiMap;
use super::pods::selects;
use super::resource::Changes;
use super::waypoint::{self, Addressed};
use super::{Dirty, Index, Note, encode, names};
use crate::api::{
    AppProtocol, EndpointSlice, Families, Kind, Labels, Name, ObjectId, Pod, Service, ServiceAddresses, ServicePort,
    TargetPort, Topology,
};

/// The services, with what finds them.
#[derive(Debug, Default)]
pub(super) struct Services {
    all: HashMap<Name, Arc<Service>>,
    /// How many of them are hosts of ServiceEntries.
    hosts: usize,
    by_namespace: MultiMap<Arc<str>, Name>,
    /// By the first label of their selector: a pod that is selected carries it.
    by_label: MultiMap<(Arc<str>, String, String), Name>,
    /// Those that stand for services that are not valid.
    stand_ins: BTreeSet<Name>,
}

impl Services {
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.all.values()
    }

    pub(super) fn get(&self, name: &Name) -> Option<&Arc<Service>> {
        self.all.get(name)
    }

    /// Returns what was there before.
    pub(super) fn insert(&mut self, service: Arc<Service>) -> Option<Arc<Service>> {
        let old = self.remove(&service.name);
        let name = &service.name;
        self.by_namespace.insert(name.namespace.clone(), name.clone());
        if let Some((key, value)) = service.selector.first_key_value() {
            self.by_label.insert((name.namespace.clone(), key.clone(), value.clone()), name.clone());
        }
        self.hosts += usize::from(service.entry.is_some());
        // Of entries it is said of the entry.
        if service.is_stand_in && service.entry.is_none() {
            self.stand_ins.insert(name.clone());
        }
        self.all.insert(name.clone(), service);
        old
    }

    /// Returns what was there.
    pub(super) fn remove(&mut self, name: &Name) -> Option<Arc<Service>> {
        let service = self.all.remove(name)?;
        self.hosts -= usize::from(service.entry.is_some());
        self.stand_ins.remove(name);
        self.by_namespace.remove(&name.namespace, name);
        if let Some((key, value)) = service.selector.first_key_value() {
            self.by_label.remove(&(name.namespace.clone(), key.clone(), value.clone()), name);
        }
        Some(service)
    }

    /// How many there are, without the hosts of ServiceEntries.
    pub(super) fn len(&self) -> usize {
        self.all.len() - self.hosts
    }

    pub(super) fn in_namespace(&self, namespace: &str) -> impl Iterator<Item = &Name> {
        self.by_namespace.get(namespace)
    }

    /// The services of a namespace that select a pod with these labels.
    pub(super) fn selecting(&self, namespace: &Arc<str>, labels: &Labels) -> Vec<&Arc<Service>> {
        let candidates = labels.iter().flat_map(|(key, value)| {
            self.by_label.get(&(namespace.clone(), key.clone(), value.clone())).filter_map(|name| self.all.get(name))
        });
        candidates.filter(|service| selects(&service.selector, labels)).collect()
    }

    /// The service of a slice, if the slice says something of its endpoints: a selector finds the same as the slices that are
    /// derived from it, and finds it sooner. Others add to what it finds. An alias has no endpoints.
    pub(super) fn of_slice(&self, slice: &EndpointSlice) -> Option<&Arc<Service>> {
        let service = self.all.get(slice.service.as_ref()?)?;
        let counts = service.selector.is_empty() || !slice.is_derived;
        (counts && is_carried(service) && !service.is_stand_in).then_some(service)
    }

    /// What to tell people, by name.
    pub(super) fn notes(&self) -> impl Iterator<Item = Note> {
        self.stand_ins.iter().map(|name| Note {
            object: ObjectId::namespaced(Kind::Service, name).to_string(),
            reason:
                "is not valid, and has no earlier version: connections to those of its addresses that can be read are \
                     refused"
                    .to_owned(),
        })
    }
}

/// Whether the data plane hears of the service at all.
pub(super) fn is_carried(service: &Service) -> bool {
    match service.addresses {
        ServiceAddresses::Given(_) | ServiceAddresses::Allocate | ServiceAddresses::Headless => true,
        ServiceAddresses::External => false,
    }
}

impl Index {
    pub(super) fn touch_service(&self, name: &Name, old: Option<&Service>, dirty: &mut Dirty) {
        let new = self.services.get(name).map(Arc::as_ref);
        if old == new {
            return;
        }
        dirty.services.insert(name.clone());
        let relevant = |service: &Service| {
            (is_carried(service), service.is_stand_in, service.selector.clone(), service.ports.clone())
        };
        if old.map(relevant) == new.map(relevant) {
            return;
        }
        for service in old.into_iter().chain(new) {
            self.touch_selected_in(&name.namespace, &service.selector, dirty);
        }
        for slice in self.slices.of_service(name) {
            dirty.slices.insert(slice.name.clone());
            let addresses = slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses);
            dirty.pods.extend(addresses.flat_map(|address| self.pods.at(*address)).map(|pod| pod.name.clone()));
        }
    }

    pub(super) fn recompute_service(&mut self, name: &Name, changes: &mut Changes) {
        let key = self.options.service_key(name);
        let Some(service) = self.services.get(name).filter(|service| is_carried(service)).cloned() else {
            self.addresses.withdraw(&key, changes);
            return;
        };
        let vips = if service.entry.is_some() { &self.entry_vips } else { &self.vips };
        let mut addresses = vips.of(name);
        let ingress = self.ingress.of(name);
        addresses.extend(ingress.into_iter().filter(|address| !addresses.contains(address)).collect::<Vec<_>>());
        let entry = service.entry.as_ref();
        let (mut blocks, mut aliases) = (Vec::new(), Vec::new());
        let given = entry.into_iter().flat_map(|entry| entry.blocks.iter().copied());
        let hosts = addresses.into_iter().map(|address| (address, if address.is_ipv4() { 32 } else { 128 }));
        for (address, length) in hosts.chain(given) {
            let is_host = length == if address.is_ipv4() { 32 } else { 128 };
            blocks.push(wire::NetworkAddress {
                address: names::address_bytes(address),
                length: (!is_host).then(|| length.into()),
                ..Default::default()
            });
            aliases.extend(is_host.then(|| names::alias(address)));
        }
        let visibility = match entry {
            Some(entry) if entry.is_private => wire::service::Visibility::Namespace,
            Some(_) | None => wire::service::Visibility::Public,
        };
        // Who is looked up by name must be found, or the name leads out of the mesh.
        let is_found = entry.is_some_and(|entry| !entry.is_made_up);
        let message = wire::Service {
            name: service.entry.as_ref().map_or(&name.name, |entry| &entry.name).to_string(),
            namespace: name.namespace.to_string(),
            hostname: self.options.hostname(name),
            addresses: blocks,
            ports: service.ports.iter().map(port_on_wire).collect(),
            waypoint: if service.is_stand_in {
                Some(waypoint::nowhere(name))
            } else {
                self.waypoint(&name.namespace, &service.waypoint, Addressed::Service)
            },
            load_balancing: load_balancing(&service),
            ip_families: families(service.families).into(),
            extensions: named_ports(&service.ports)
                .into_iter()
                .chain((service.is_stand_in && !is_found).then(not_valid))
                .collect(),
            subject_alt_names: entry.map(|entry| entry.subject_alt_names.clone()).unwrap_or_default(),
            // Kubernetes' own services are the definition of their host names.
            canonical: entry.is_none(),
            visibility: visibility.into(),
            ..Default::default()
        };
        self.addresses.publish(encode::service(key.into(), &message, aliases), changes);
    }

    /// The services that a pod stands behind, with the pod's own port for each of theirs.
    pub(super) fn services_of_pod(&self, pod: &Pod) -> BTreeMap<String, wire::PortList> {
        let mut found = BTreeMap::new();
        for service in self.services.selecting(&pod.name.namespace, &pod.labels) {
            if is_carried(service) {
                let ports = service.ports.iter().filter_map(|port| pod_port(pod, port)).collect();
                found.insert(self.options.service_key(&service.name), wire::PortList { ports });
            }
        }
        for (slice, service) in self.slices_of_pod(pod) {
            // Several slices add up.
            let list: &mut wire::PortList = found.entry(self.options.service_key(&service.name)).or_default();
            for port in slice_ports(slice, service) {
                if list.ports.iter().all(|known| known.service_port != port.service_port) {
                    list.ports.push(port);
                }
            }
        }
        found
    }
}

/// A service port on one pod; a name is looked up among the pod's own, and a pod without it does not serve the port.
fn pod_port(pod: &Pod, port: &ServicePort) -> Option<wire::Port> {
    let target = match &port.target {
        TargetPort::Number(number) => *number,
        TargetPort::Named(name) => pod.ports.iter().find(|declared| declared.name == *name)?.port,
    };
    Some(wire::Port { target_port: target.into(), ..port_on_wire(port) })
}

/// The ports of a service as the endpoints of one slice serve them, joined by name.
pub(super) fn slice_ports(slice: &EndpointSlice, service: &Service) -> Vec<wire::Port> {
    let target = |port: &ServicePort| slice.ports.iter().find(|candidate| candidate.name == port.name);
    let on_wire = |port: &ServicePort| {
        target(port).map(|found| wire::Port { target_port: found.port.into(), ..port_on_wire(port) })
    };
    service.ports.iter().filter_map(on_wire).collect()
}

/// A named target port differs from pod to pod, and is 0 here.
pub(super) fn port_on_wire(port: &ServicePort) -> wire::Port {
    let target_port = match port.target {
        TargetPort::Number(number) => number.into(),
        TargetPort::Named(_) => 0,
    };
    let app_protocol = match port.app_protocol {
        AppProtocol::Unknown => wire::AppProtocol::Unknown,
        AppProtocol::Http11 => wire::AppProtocol::Http11,
        AppProtocol::Http2 => wire::AppProtocol::Http2,
        AppProtocol::Grpc => wire::AppProtocol::Grpc,
        AppProtocol::Tcp => wire::AppProtocol::Tcp,
        AppProtocol::Tls => wire::AppProtocol::Tls,
    };
    wire::Port { service_port: port.port.into(), target_port, app_protocol: app_protocol.into() }
}

/// The extension that names the ports, for a service that has names.
fn named_ports(ports: &[ServicePort]) -> Option<wire::Extension> {
    let named = ports.iter().filter(|port| !port.name.is_empty());
    let named = named.map(|port| extension::PortName { service_port: port.port.into(), name: port.name.clone() });
    let message = extension::PortNames { ports: named.collect() };
    let config = prost_types::Any { type_url: port_names::PAYLOAD_TYPE.to_owned(), value: message.encode_to_vec() };
    (!message.ports.is_empty())
        .then(|| wire::Extension { name: port_names::EXTENSION.to_owned(), config: Some(config) })
}

/// The extension that says that an object is not valid.
pub(super) fn not_valid() -> wire::Extension {
    let value = extension::Invalid {}.encode_to_vec();
    let config = prost_types::Any { type_url: invalid::PAYLOAD_TYPE.to_owned(), value };
    wire::Extension { name: invalid::EXTENSION.to_owned(), config: Some(config) }
}

fn load_balancing(service: &Service) -> Option<wire::LoadBalancing> {
    use wire::load_balancing::{HealthPolicy, Mode, Scope};
    let near = [Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node];
    let (mode, preference) = match service.topology {
        Topology::Anywhere => (Mode::UnspecifiedMode, &[][..]),
        Topology::OnlyNode => (Mode::Strict, &near[4..]),
        Topology::PreferClose => (Mode::Failover, &near[..4]),
        Topology::PreferZone => (Mode::Failover, &near[..3]),
        Topology::PreferNode => (Mode::Failover, &near[..]),
    };
    let (mode, preference) = match &service.entry {
        Some(entry) if entry.is_passthrough => (Mode::Passthrough, &[][..]),
        Some(_) | None => (mode, preference),
    };
    let health = if service.publish_not_ready { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
    if mode == Mode::UnspecifiedMode && health == HealthPolicy::OnlyHealthy {
        return None;
    }
    Some(wire::LoadBalancing {
        routing_preference: preference.iter().map(|scope| (*scope).into()).collect(),
        mode: mode.into(),
        health_policy: health.into(),
    })
}

fn families(families: Families) -> wire::IpFamilies {
    match families {
        Families::Automatic => wire::IpFamilies::Automatic,
        Families::Ipv4 => wire::IpFamilies::Ipv4Only,
        Families::Ipv6 => wire::IpFamilies::Ipv6Only,
        Families::Dual => wire::IpFamilies::Dual,
    }
}
