//! A service: a name, its virtual addresses and ports, and how connections are spread over its endpoints.

use std::sync::Arc;

use mesh_proto::workload as wire;
use thiserror::Error;

use crate::address::{Cidr, InvalidAddress};
use crate::gateway::{GatewayAddress, InvalidGateway};
use crate::identity::SpiffeId;
use crate::port_names::PortNames;
use crate::workload::Workload;

/// A further name in discovery of every service that has a block of addresses: who asks on demand for single addresses would
/// not find it by them. An extension of ours; to a control plane that does not know it, it is a name that is absent.
pub const BLOCKS: &str = "culvert.dev/blocks";

/// The key of a service, `<namespace>/<hostname>`, which is also its primary name in discovery.
pub fn service_key(namespace: &str, hostname: &str) -> Arc<str> {
    format!("{namespace}/{hostname}").into()
}

/// A service as discovery describes it, validated.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Service {
    key: Arc<str>,
    /// Short name.
    pub name: Arc<str>,
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Fully qualified host name.
    pub hostname: Arc<str>,
    /// Virtual addresses; a block of more than one address comes from a ServiceEntry.
    pub addresses: Box<[Vip]>,
    /// Ports, by service port, each once.
    pub ports: Box<[ServicePort]>,
    /// Names of the ports, as far as the control plane tells them.
    pub port_names: PortNames,
    /// Further identities that endpoints may present. Names that no workload of the mesh can have are left out.
    pub subject_alt_names: Box<[SpiffeId]>,
    /// The waypoint that traffic to this service goes through.
    pub waypoint: Option<GatewayAddress>,
    /// Several waypoints that share the traffic by weight; where there are some, they take the place of `waypoint`.
    pub weighted_waypoints: Box<[(GatewayAddress, u32)]>,
    /// How connections are spread.
    pub load_balancing: LoadBalancing,
    /// Whether this service wins where several have the same address.
    pub canonical: bool,
    /// Whether ingress gateways send traffic through the waypoint, too.
    pub ingress_use_waypoint: bool,
    /// Whether only clients of the same namespace see the service.
    pub private: bool,
}

/// A virtual address, or a block of them, in a network.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vip {
    /// Name of the network.
    pub network: Arc<str>,
    /// The addresses.
    pub block: Cidr,
}

/// A port of a service, as the service or one of its endpoints lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// The port that clients ask for.
    pub service_port: u16,
    /// The port that the application listens on. None: the service leaves it to each endpoint (a named port), or
    /// the endpoint leaves it to the service.
    pub target_port: Option<u16>,
    /// What is spoken there.
    pub app_protocol: AppProtocol,
}

/// What an application speaks on a port, as far as its owner said so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AppProtocol {
    /// Not said.
    Unknown,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2.
    Http2,
    /// gRPC.
    Grpc,
    /// Plain TCP.
    Tcp,
    /// TLS.
    Tls,
}

/// How connections are spread over a service's endpoints.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoadBalancing {
    /// What client and endpoint should have in common, the most important first. Only used by
    /// [`LoadBalancingMode::Strict`] and [`LoadBalancingMode::Failover`].
    pub preference: Box<[LocalityScope]>,
    /// What to do with the preference.
    pub mode: LoadBalancingMode,
    /// Whether endpoints that are not healthy are used like the others.
    pub allow_unhealthy: bool,
}

/// What to do with a routing preference.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LoadBalancingMode {
    /// Nothing: every ready endpoint takes its share.
    #[default]
    Spread,
    /// Only endpoints that match the whole preference.
    Strict,
    /// The endpoints that match most of the preference, counted from its front.
    Failover,
    /// No load balancing: connections go to the address that the client asked for.
    Passthrough,
}

/// What a client and an endpoint can have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LocalityScope {
    /// Cloud region.
    Region,
    /// Availability zone.
    Zone,
    /// Part of a zone.
    Subzone,
    /// Kubernetes node.
    Node,
    /// Kubernetes cluster.
    Cluster,
    /// Network.
    Network,
}

impl Service {
    /// `<namespace>/<hostname>`.
    pub fn key(&self) -> &Arc<str> {
        &self.key
    }

    /// The port that clients know as `service_port`.
    pub fn port(&self, service_port: u16) -> Option<&ServicePort> {
        find_port(&self.ports, service_port)
    }

    /// Whether a client in `namespace` sees the service.
    pub fn visible_from(&self, namespace: &str) -> bool {
        !self.private || *self.namespace == *namespace
    }

    /// Whether traffic to the service goes through a waypoint.
    pub fn has_waypoint(&self) -> bool {
        self.waypoint.is_some() || !self.weighted_waypoints.is_empty()
    }

    /// The waypoint for one connection: by weight where there are several. None when no waypoint is bound; a service
    /// whose waypoints all weigh nothing gives the first of them, so that it never counts as unbound.
    pub fn choose_waypoint(&self, random: &mut fastrand::Rng) -> Option<&GatewayAddress> {
        let total: u64 = self.weighted_waypoints.iter().map(|(_, weight)| u64::from(*weight)).sum();
        if total == 0 {
            return self.weighted_waypoints.first().map(|(waypoint, _)| waypoint).or(self.waypoint.as_ref());
        }
        let mut left = random.u64(0..total);
        for (waypoint, weight) in &self.weighted_waypoints {
            match left.checked_sub(u64::from(*weight)) {
                Some(rest) => left = rest,
                None => return Some(waypoint),
            }
        }
        None
    }

    /// The identities that `endpoint` may present when it is reached through this service: its own and the service's.
    pub fn expected_identities(&self, endpoint: &Workload) -> Vec<SpiffeId> {
        let mut expected = Vec::with_capacity(1 + self.subject_alt_names.len());
        expected.push(endpoint.spiffe_id().clone());
        expected.extend(self.subject_alt_names.iter().filter(|id| *id != endpoint.spiffe_id()).cloned());
        expected
    }
}

impl TryFrom<&wire::Service> for Service {
    type Error = InvalidService;

    fn try_from(wire: &wire::Service) -> Result<Self, Self::Error> {
        if wire.namespace.is_empty() || wire.hostname.is_empty() {
            return Err(InvalidService::Unnamed);
        }
        let mut weighted_waypoints = Vec::with_capacity(wire.weighted_waypoints.len());
        for waypoint in &wire.weighted_waypoints {
            let address = waypoint.destination.as_ref().ok_or(InvalidGateway::NoDestination)?;
            weighted_waypoints.push((GatewayAddress::try_from(address)?, waypoint.weight));
        }
        let ports = ports_from_wire(&wire.ports)?;
        Ok(Self {
            key: service_key(&wire.namespace, &wire.hostname),
            name: wire.name.as_str().into(),
            namespace: wire.namespace.as_str().into(),
            hostname: wire.hostname.as_str().into(),
            addresses: wire.addresses.iter().map(Vip::try_from).collect::<Result<_, _>>()?,
            port_names: PortNames::from_wire(&wire.extensions, &ports),
            ports,
            subject_alt_names: wire.subject_alt_names.iter().filter_map(|name| name.parse().ok()).collect(),
            waypoint: wire.waypoint.as_ref().map(GatewayAddress::try_from).transpose()?,
            weighted_waypoints: weighted_waypoints.into(),
            load_balancing: wire.load_balancing.as_ref().map(LoadBalancing::try_from).transpose()?.unwrap_or_default(),
            canonical: wire.canonical,
            ingress_use_waypoint: wire.ingress_use_waypoint,
            private: match wire::service::Visibility::try_from(wire.visibility) {
                Ok(wire::service::Visibility::Public) => false,
                Ok(wire::service::Visibility::Namespace) => true,
                Err(_) => return Err(InvalidService::Unknown { field: "visibility", value: wire.visibility }),
            },
        })
    }
}

impl TryFrom<&wire::NetworkAddress> for Vip {
    type Error = InvalidAddress;

    fn try_from(wire: &wire::NetworkAddress) -> Result<Self, Self::Error> {
        let whole = u32::try_from(wire.address.len().saturating_mul(8)).unwrap_or(u32::MAX);
        let block = Cidr::from_bytes(&wire.address, wire.length.unwrap_or(whole))?;
        Ok(Self { network: wire.network.as_str().into(), block })
    }
}

impl TryFrom<&wire::LoadBalancing> for LoadBalancing {
    type Error = InvalidService;

    fn try_from(wire: &wire::LoadBalancing) -> Result<Self, Self::Error> {
        use wire::load_balancing::{HealthPolicy, Mode, Scope};
        let mut preference = Vec::with_capacity(wire.routing_preference.len());
        for scope in &wire.routing_preference {
            preference.push(match Scope::try_from(*scope) {
                Ok(Scope::Region) => LocalityScope::Region,
                Ok(Scope::Zone) => LocalityScope::Zone,
                Ok(Scope::Subzone) => LocalityScope::Subzone,
                Ok(Scope::Node) => LocalityScope::Node,
                Ok(Scope::Cluster) => LocalityScope::Cluster,
                Ok(Scope::Network) => LocalityScope::Network,
                Ok(Scope::UnspecifiedScope) | Err(_) => {
                    return Err(InvalidService::Unknown { field: "routing_preference", value: *scope });
                }
            });
        }
        if preference.len() > MAX_PREFERENCE {
            return Err(InvalidService::LongPreference { length: preference.len() });
        }
        Ok(Self {
            preference: preference.into(),
            mode: match Mode::try_from(wire.mode) {
                Ok(Mode::UnspecifiedMode) => LoadBalancingMode::Spread,
                Ok(Mode::Strict) => LoadBalancingMode::Strict,
                Ok(Mode::Failover) => LoadBalancingMode::Failover,
                Ok(Mode::Passthrough) => LoadBalancingMode::Passthrough,
                Err(_) => return Err(InvalidService::Unknown { field: "load balancing mode", value: wire.mode }),
            },
            allow_unhealthy: match HealthPolicy::try_from(wire.health_policy) {
                Ok(HealthPolicy::OnlyHealthy) => false,
                Ok(HealthPolicy::AllowAll) => true,
                Err(_) => return Err(InvalidService::Unknown { field: "health_policy", value: wire.health_policy }),
            },
        })
    }
}

/// Why a service cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidService {
    /// No namespace or no host name.
    #[error("the service has no namespace or no host name")]
    Unnamed,
    /// A virtual address.
    #[error("virtual address: {0}")]
    Address(#[from] InvalidAddress),
    /// A port.
    #[error(transparent)]
    Port(#[from] InvalidPort),
    /// A waypoint.
    #[error("waypoint: {0}")]
    Waypoint(#[from] InvalidGateway),
    /// An enumeration value that this version does not know.
    #[error("{field} has the unknown value {value}")]
    Unknown {
        /// Which field.
        field: &'static str,
        /// The number on the wire.
        value: i32,
    },
    /// More scopes than there are.
    #[error("{length} routing preferences are more than there are scopes")]
    LongPreference {
        /// How many were given.
        length: usize,
    },
}

/// Why a port cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidPort {
    /// More than 65535, or a service port of 0.
    #[error("{0} is not a port")]
    Range(u32),
    /// An application protocol that this version does not know.
    #[error("app_protocol has the unknown value {0}")]
    AppProtocol(i32),
}

/// Each scope once is all that makes sense, and bounds the groups that an endpoint is in.
const MAX_PREFERENCE: usize = 6;

/// Reads a list of ports; the result is sorted by service port, each once. Where the list has one twice, as for a
/// service that has it for TCP and for UDP, the first that says its target port counts, else the first.
pub(crate) fn ports_from_wire(wire: &[wire::Port]) -> Result<Box<[ServicePort]>, InvalidPort> {
    let mut ports = Vec::with_capacity(wire.len());
    for port in wire {
        let service_port = u16::try_from(port.service_port).ok().filter(|port| *port != 0);
        let target_port = u16::try_from(port.target_port).map_err(|_| InvalidPort::Range(port.target_port))?;
        ports.push(ServicePort {
            service_port: service_port.ok_or(InvalidPort::Range(port.service_port))?,
            target_port: Some(target_port).filter(|port| *port != 0),
            app_protocol: match wire::AppProtocol::try_from(port.app_protocol) {
                Ok(wire::AppProtocol::Unknown) => AppProtocol::Unknown,
                Ok(wire::AppProtocol::Http11) => AppProtocol::Http11,
                Ok(wire::AppProtocol::Http2) => AppProtocol::Http2,
                Ok(wire::AppProtocol::Grpc) => AppProtocol::Grpc,
                Ok(wire::AppProtocol::Tcp) => AppProtocol::Tcp,
                Ok(wire::AppProtocol::Tls) => AppProtocol::Tls,
                Err(_) => return Err(InvalidPort::AppProtocol(port.app_protocol)),
            },
        });
    }
    // Stable: what is said first stays first.
    ports.sort_by_key(|port: &ServicePort| (port.service_port, port.target_port.is_none()));
    ports.dedup_by_key(|port| port.service_port);
    Ok(ports.into())
}

/// Finds a port in a list sorted by service port.
pub(crate) fn find_port(ports: &[ServicePort], service_port: u16) -> Option<&ServicePort> {
    ports.binary_search_by_key(&service_port, |port| port.service_port).ok().and_then(|at| ports.get(at))
}

#[cfg(test)]
mod tests;
