//! A workload: one pod, VM or WorkloadEntry.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_proto::workload as wire;
use thiserror::Error;

use crate::address::{InvalidAddress, Reach, ip_from_bytes};
use crate::draining;
use crate::gateway::{GatewayAddress, InvalidGateway};
use crate::identity::{InvalidSpiffeId, SpiffeId};
use crate::service::{InvalidPort, Service, ServicePort, find_port, ports_from_wire};

/// A workload as discovery describes it, validated.
///
/// A snapshot holds very many of them, most of them replicas of one another: what replicas have in common is held once for
/// all of them, see [`crate::Snapshot::upsert_workload`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Workload {
    /// Unique in the mesh; the primary name in discovery.
    pub uid: Arc<str>,
    /// Name of the pod, or of what else it is.
    pub name: Arc<str>,
    /// Whose it is.
    pub origin: Arc<Origin>,
    /// Where it runs.
    pub location: Arc<Location>,
    /// Addresses in the workload's network, the primary one first. May be empty.
    pub addresses: Box<[IpAddr]>,
    /// Host name, where the workload has no address but a name.
    pub hostname: Arc<str>,
    /// The services it belongs to, by key, each once.
    pub services: Arc<[Membership]>,
    /// Keys `<namespace>/<name>` of the policies that select it.
    pub authorization_policies: Arc<[Arc<str>]>,
    /// The gateways on the way to it, if there are any.
    gateways: Option<Arc<Gateways>>,
    /// Share of a service's traffic in proportion to the other endpoints; 0 takes none.
    pub capacity: u32,
    /// A tunnel protocol that the application itself speaks.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// How the workload is reached.
    pub tunnel_protocol: TunnelProtocol,
    /// Whether the workload itself terminates HBONE.
    pub native_tunnel: bool,
    /// Whether it takes traffic of services.
    pub health: Health,
    /// Whether it shares its node's network namespace, and so its address.
    pub host_network: bool,
}

/// Whose a workload is: the same for all replicas.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Origin {
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    identity: SpiffeId,
    /// What made the workload.
    pub workload_type: WorkloadType,
    /// Name of what made the workload.
    pub workload_name: Arc<str>,
    /// Name for metrics: the canonical service.
    pub canonical_name: Arc<str>,
    /// Revision for metrics.
    pub canonical_revision: Arc<str>,
}

/// Where a workload runs: the same for all of a node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Location {
    /// Network that the addresses belong to.
    pub network: Arc<str>,
    /// Kubernetes node.
    pub node: Arc<str>,
    /// Kubernetes cluster.
    pub cluster_id: Arc<str>,
    /// Region and zone.
    pub locality: Locality,
}

/// What lies on the way to a workload.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Gateways {
    waypoint: Option<GatewayAddress>,
    network_gateway: Option<GatewayAddress>,
}

/// Whether a workload takes traffic of services. Connections to its own address are its own affair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It does.
    Healthy,
    /// It is being deleted and still serves: it takes connections where nobody else does.
    Draining,
    /// It does not.
    Unhealthy,
}

/// How a workload is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunnelProtocol {
    /// Plain TCP.
    None,
    /// HBONE.
    Hbone,
    /// A sidecar of Istio's older kind. It takes plain TCP as well unless its own policy says otherwise.
    LegacyIstioMtls,
}

/// What made a workload, for labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WorkloadType {
    /// A Deployment, or anything like it.
    Deployment,
    /// A CronJob.
    CronJob,
    /// A bare pod, or a kind that this version does not know.
    Pod,
    /// A Job.
    Job,
}

/// A tunnel that the application speaks by itself: PROXY protocol version 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApplicationTunnel {
    /// Port on which the application takes it. 0: the port asked for.
    pub port: u16,
}

/// The part of a cloud that a workload runs in. Empty: not known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Locality {
    /// Cloud region.
    pub region: Arc<str>,
    /// Availability zone.
    pub zone: Arc<str>,
    /// Part of a zone.
    pub subzone: Arc<str>,
}

/// A workload's place in one service.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Membership {
    /// Key of the service, `<namespace>/<hostname>`.
    pub service: Arc<str>,
    /// The service's ports as this endpoint serves them, by service port.
    pub ports: Box<[ServicePort]>,
}

/// See [`Workload::shared`].
pub(crate) struct Shared<'a> {
    pub(crate) origin: &'a mut Arc<Origin>,
    pub(crate) location: &'a mut Arc<Location>,
    pub(crate) services: &'a mut Arc<[Membership]>,
    pub(crate) policies: &'a mut Arc<[Arc<str>]>,
    pub(crate) gateways: Option<&'a mut Arc<Gateways>>,
}

impl Origin {
    /// Those of its texts that others may have as well.
    pub(crate) fn texts(&mut self) -> [&mut Arc<str>; 4] {
        [&mut self.namespace, &mut self.workload_name, &mut self.canonical_name, &mut self.canonical_revision]
    }
}

impl Location {
    /// Its texts.
    pub(crate) fn texts(&mut self) -> [&mut Arc<str>; 6] {
        let Locality { region, zone, subzone } = &mut self.locality;
        [&mut self.network, &mut self.node, &mut self.cluster_id, region, zone, subzone]
    }
}

impl Workload {
    /// The identity that the workload's certificate carries.
    pub fn spiffe_id(&self) -> &SpiffeId {
        &self.origin.identity
    }

    /// The waypoint that traffic addressed to this workload goes through.
    pub fn waypoint(&self) -> Option<&GatewayAddress> {
        self.gateways.as_ref()?.waypoint.as_ref()
    }

    /// The gateway through which other networks reach the workload.
    pub fn network_gateway(&self) -> Option<&GatewayAddress> {
        self.gateways.as_ref()?.network_gateway.as_ref()
    }

    /// What it has in common with others, to put shared copies in its place.
    pub(crate) fn shared(&mut self) -> Shared<'_> {
        let Self { origin, location, services, authorization_policies: policies, gateways, .. } = self;
        Shared { origin, location, services, policies, gateways: gateways.as_mut() }
    }

    /// The workload's place in the service of that key.
    pub fn membership(&self, service: &str) -> Option<&Membership> {
        let at = self.services.binary_search_by(|membership| (*membership.service).cmp(service)).ok()?;
        self.services.get(at)
    }

    /// Whether the workload is an endpoint of the service of that key, ready or not.
    pub fn in_service(&self, service: &str) -> bool {
        self.membership(service).is_some()
    }

    /// The port on which the application serves `service_port` of `service`: the endpoint's own target port, else
    /// the service's. None: the endpoint does not serve that port.
    pub fn target_port(&self, service: &Service, service_port: u16) -> Option<u16> {
        let membership = self.membership(service.key())?;
        let own = find_port(&membership.ports, service_port).and_then(|port| port.target_port);
        own.or_else(|| service.port(service_port)?.target_port)
    }

    /// The address that a client connects to. None: the workload has none, or none of a family that the client has.
    pub fn address_for(&self, reach: &Reach) -> Option<IpAddr> {
        reach.choose(&self.addresses)
    }
}

impl TryFrom<&wire::Workload> for Workload {
    type Error = InvalidWorkload;

    fn try_from(wire: &wire::Workload) -> Result<Self, Self::Error> {
        if wire.uid.is_empty() {
            return Err(InvalidWorkload::NoUid);
        }
        let (health, host_network) = (health(wire)?, network_mode(wire.network_mode)?);
        Ok(Self {
            uid: wire.uid.as_str().into(),
            name: wire.name.as_str().into(),
            origin: Arc::new(Origin::try_from(wire)?),
            location: Arc::new(Location::from(wire)),
            addresses: addresses(&wire.addresses)?,
            hostname: wire.hostname.as_str().into(),
            services: memberships(wire)?,
            authorization_policies: sorted(wire.authorization_policies.iter().map(|key| key.as_str().into())),
            gateways: gateways(wire)?.map(Arc::new),
            capacity: wire.capacity.unwrap_or(1),
            application_tunnel: wire.application_tunnel.as_ref().map_or(Ok(None), application_tunnel)?,
            tunnel_protocol: tunnel_protocol(wire.tunnel_protocol)?,
            native_tunnel: wire.native_tunnel,
            health,
            host_network,
        })
    }
}

impl TryFrom<&wire::Workload> for Origin {
    type Error = InvalidWorkload;

    fn try_from(wire: &wire::Workload) -> Result<Self, Self::Error> {
        Ok(Self {
            namespace: wire.namespace.as_str().into(),
            identity: SpiffeId::new(
                or_default(&wire.trust_domain, "cluster.local"),
                &wire.namespace,
                or_default(&wire.service_account, "default"),
            )?,
            workload_type: match wire::WorkloadType::try_from(wire.workload_type) {
                Ok(wire::WorkloadType::Deployment) => WorkloadType::Deployment,
                Ok(wire::WorkloadType::Cronjob) => WorkloadType::CronJob,
                Ok(wire::WorkloadType::Job) => WorkloadType::Job,
                // Only a label depends on it: a newer kind is no reason to lose the workload.
                Ok(wire::WorkloadType::Pod) | Err(_) => WorkloadType::Pod,
            },
            workload_name: wire.workload_name.as_str().into(),
            canonical_name: wire.canonical_name.as_str().into(),
            canonical_revision: wire.canonical_revision.as_str().into(),
        })
    }
}

impl From<&wire::Workload> for Location {
    fn from(wire: &wire::Workload) -> Self {
        Self {
            network: wire.network.as_str().into(),
            node: wire.node.as_str().into(),
            cluster_id: or_default(&wire.cluster_id, "Kubernetes").into(),
            locality: wire.locality.as_ref().map(Locality::from).unwrap_or_default(),
        }
    }
}

impl From<&wire::Locality> for Locality {
    fn from(wire: &wire::Locality) -> Self {
        Self {
            region: wire.region.as_str().into(),
            zone: wire.zone.as_str().into(),
            subzone: wire.subzone.as_str().into(),
        }
    }
}

/// Why a workload cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidWorkload {
    /// No uid.
    #[error("the workload has no uid")]
    NoUid,
    /// Trust domain, namespace and service account make no identity.
    #[error("the identity of the workload: {0}")]
    Identity(#[from] InvalidSpiffeId),
    /// An address.
    #[error(transparent)]
    Address(#[from] InvalidAddress),
    /// The waypoint or the network gateway.
    #[error("{field}: {source}")]
    Gateway {
        /// Which of the two.
        field: &'static str,
        /// What is wrong with it.
        source: InvalidGateway,
    },
    /// A key of the services map that is not `<namespace>/<hostname>`.
    #[error("{key:?} is no service: it must be <namespace>/<hostname>")]
    ServiceKey {
        /// The key as given.
        key: String,
    },
    /// A port of a service.
    #[error("service {key}: {source}")]
    Port {
        /// Key of the service.
        key: String,
        /// What is wrong with the port.
        source: InvalidPort,
    },
    /// The application tunnel's port.
    #[error("the application tunnel's port {port} is more than 65535")]
    ApplicationTunnelPort {
        /// The port as given.
        port: u32,
    },
    /// An enumeration value that this version does not know.
    #[error("{field} has the unknown value {value}")]
    Unknown {
        /// Which field.
        field: &'static str,
        /// The number on the wire.
        value: i32,
    },
}

fn or_default<'a>(value: &'a str, default: &'a str) -> &'a str {
    if value.is_empty() { default } else { value }
}

fn addresses(wire: &[bytes::Bytes]) -> Result<Box<[IpAddr]>, InvalidAddress> {
    let mut addresses = Vec::with_capacity(wire.len());
    for bytes in wire {
        let ip = ip_from_bytes(bytes)?;
        if !addresses.contains(&ip) {
            addresses.push(ip);
        }
    }
    Ok(addresses.into())
}

fn health(wire: &wire::Workload) -> Result<Health, InvalidWorkload> {
    match wire::WorkloadStatus::try_from(wire.status) {
        Ok(wire::WorkloadStatus::Healthy) => Ok(Health::Healthy),
        Ok(wire::WorkloadStatus::Unhealthy) if draining::is_said(&wire.extensions) => Ok(Health::Draining),
        Ok(wire::WorkloadStatus::Unhealthy) => Ok(Health::Unhealthy),
        Err(_) => Err(InvalidWorkload::Unknown { field: "status", value: wire.status }),
    }
}

fn network_mode(value: i32) -> Result<bool, InvalidWorkload> {
    match wire::NetworkMode::try_from(value) {
        Ok(wire::NetworkMode::Standard) => Ok(false),
        Ok(wire::NetworkMode::HostNetwork) => Ok(true),
        Err(_) => Err(InvalidWorkload::Unknown { field: "network_mode", value }),
    }
}

fn tunnel_protocol(value: i32) -> Result<TunnelProtocol, InvalidWorkload> {
    match wire::TunnelProtocol::try_from(value) {
        Ok(wire::TunnelProtocol::None) => Ok(TunnelProtocol::None),
        Ok(wire::TunnelProtocol::Hbone) => Ok(TunnelProtocol::Hbone),
        Ok(wire::TunnelProtocol::LegacyIstioMtls) => Ok(TunnelProtocol::LegacyIstioMtls),
        Err(_) => Err(InvalidWorkload::Unknown { field: "tunnel_protocol", value }),
    }
}

fn gateway(
    field: &'static str,
    wire: Option<&wire::GatewayAddress>,
) -> Result<Option<GatewayAddress>, InvalidWorkload> {
    wire.map(GatewayAddress::try_from).transpose().map_err(|source| InvalidWorkload::Gateway { field, source })
}

fn gateways(wire: &wire::Workload) -> Result<Option<Gateways>, InvalidWorkload> {
    let waypoint = gateway("waypoint", wire.waypoint.as_ref())?;
    let network_gateway = gateway("network gateway", wire.network_gateway.as_ref())?;
    let some = waypoint.is_some() || network_gateway.is_some();
    Ok(some.then_some(Gateways { waypoint, network_gateway }))
}

fn application_tunnel(wire: &wire::ApplicationTunnel) -> Result<Option<ApplicationTunnel>, InvalidWorkload> {
    use wire::application_tunnel::Protocol;
    let port = u16::try_from(wire.port).map_err(|_| InvalidWorkload::ApplicationTunnelPort { port: wire.port })?;
    match Protocol::try_from(wire.protocol) {
        Ok(Protocol::None) => Ok(None),
        Ok(Protocol::Proxy) => Ok(Some(ApplicationTunnel { port })),
        Err(_) => Err(InvalidWorkload::Unknown { field: "application_tunnel.protocol", value: wire.protocol }),
    }
}

fn memberships(wire: &wire::Workload) -> Result<Arc<[Membership]>, InvalidWorkload> {
    let mut services = Vec::with_capacity(wire.services.len());
    for (key, list) in &wire.services {
        if key.split_once('/').is_none_or(|(namespace, hostname)| namespace.is_empty() || hostname.is_empty()) {
            return Err(InvalidWorkload::ServiceKey { key: key.clone() });
        }
        let ports = ports_from_wire(&list.ports);
        let ports = ports.map_err(|source| InvalidWorkload::Port { key: key.clone(), source })?;
        services.push(Membership { service: key.as_str().into(), ports });
    }
    services.sort_unstable_by(|a, b| a.service.cmp(&b.service));
    Ok(services.into())
}

/// Sorted, each once.
fn sorted(items: impl Iterator<Item = Arc<str>>) -> Arc<[Arc<str>]> {
    let mut items: Vec<_> = items.collect();
    items.sort_unstable();
    items.dedup();
    items.into()
}

#[cfg(test)]
mod tests;
