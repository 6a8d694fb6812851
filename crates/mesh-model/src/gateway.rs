//! Where a waypoint or a gateway is, as the wire names it, and which of its instances takes a connection.

use std::net::SocketAddr;
use std::sync::Arc;

use mesh_proto::workload as wire;
use thiserror::Error;

use crate::address::{InvalidAddress, NetworkAddress, Reach, ip_from_bytes};
use crate::identity::SpiffeId;
use crate::resolve::Viewpoint;
use crate::service::{Service, service_key};
use crate::snapshot::Snapshot;
use crate::workload::{Health, Workload};

/// Port of HBONE where nothing else is said.
pub const HBONE_PORT: u16 = 15008;

/// The name of a waypoint or network gateway.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct GatewayAddress {
    /// What to look up.
    pub destination: GatewayDestination,
    /// Port on which the gateway takes HBONE.
    pub hbone_port: u16,
}

/// The two ways to name a gateway.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    /// A service, by its key `<namespace>/<hostname>`.
    Service(Arc<str>),
    /// An address of a service or of a workload.
    Address(NetworkAddress),
}

impl TryFrom<&wire::GatewayAddress> for GatewayAddress {
    type Error = InvalidGateway;

    fn try_from(wire: &wire::GatewayAddress) -> Result<Self, Self::Error> {
        let destination = match &wire.destination {
            None => return Err(InvalidGateway::NoDestination),
            Some(wire::gateway_address::Destination::Hostname(name)) => {
                if name.namespace.is_empty() || name.hostname.is_empty() {
                    return Err(InvalidGateway::EmptyHostname);
                }
                GatewayDestination::Service(service_key(&name.namespace, &name.hostname))
            }
            Some(wire::gateway_address::Destination::Address(address)) => {
                let ip = ip_from_bytes(&address.address)?;
                GatewayDestination::Address(NetworkAddress { network: address.network.as_str().into(), ip })
            }
        };
        let hbone_port = match wire.hbone_mtls_port {
            0 => HBONE_PORT,
            port => u16::try_from(port).map_err(|_| InvalidGateway::Port { port })?,
        };
        Ok(Self { destination, hbone_port })
    }
}

/// Why a gateway's name cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidGateway {
    /// Neither a host name nor an address.
    #[error("the gateway has neither a host name nor an address")]
    NoDestination,
    /// A host name without namespace or name.
    #[error("the gateway's host name or namespace is empty")]
    EmptyHostname,
    /// The address is no address.
    #[error("the gateway's address: {0}")]
    Address(#[from] InvalidAddress),
    /// The port is out of range.
    #[error("the gateway's port {port} is more than 65535")]
    Port {
        /// The port as given.
        port: u32,
    },
}

/// One instance of a gateway, chosen for one connection.
#[derive(Debug, Clone)]
pub struct GatewayInstance {
    /// The gateway's workload.
    pub workload: Arc<Workload>,
    /// The gateway's service, when it was found through one.
    pub service: Option<Arc<Service>>,
    /// Where to open the HBONE tunnel.
    pub address: SocketAddr,
    /// The identities that the instance may present.
    pub expected: Vec<SpiffeId>,
}

/// Why a gateway that configuration names cannot be used. Traffic bound to it is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum UnresolvedGateway {
    /// Nothing of that name or address is known.
    #[error("the gateway is not known")]
    Unknown,
    /// It is known, but no instance is ready.
    #[error("no instance of the gateway is ready")]
    NoReadyInstance,
    /// The instance has no address of a family that the client has.
    #[error("the gateway has no address of a family that the client has")]
    NoCommonFamily,
}

impl Snapshot {
    /// Chooses an instance of the gateway that `address` names, none of `tried`, as [`Snapshot::select`] does.
    ///
    /// A gateway that is a service keeps to the service's own load balancing; its HBONE port is looked up among the
    /// service's ports, and taken as it is when the service does not list it.
    ///
    /// # Errors
    /// When nothing of that name is known or no instance is ready.
    pub fn gateway(
        &self,
        address: &GatewayAddress,
        from: &Viewpoint<'_>,
        reach: &Reach,
        random: &mut fastrand::Rng,
        tried: &[Arc<str>],
    ) -> Result<GatewayInstance, UnresolvedGateway> {
        let service = match &address.destination {
            GatewayDestination::Service(key) => Some(self.service_by_name(key).ok_or(UnresolvedGateway::Unknown)?),
            GatewayDestination::Address(at) => self.service_by_vip(&at.network, at.ip),
        };
        if let Some(service) = service {
            return self.gateway_of_service(service, address.hbone_port, from, reach, random, tried);
        }
        let GatewayDestination::Address(at) = &address.destination else {
            return Err(UnresolvedGateway::Unknown);
        };
        let workload = self.workload_by_ip(&at.network, at.ip).ok_or(UnresolvedGateway::Unknown)?;
        if workload.health == Health::Unhealthy || tried.contains(&workload.uid) {
            return Err(UnresolvedGateway::NoReadyInstance);
        }
        // The very address that was configured where it can be reached, else another one of the same workload.
        let ip = Some(at.ip).filter(|ip| reach.can(*ip)).or_else(|| workload.address_for(reach));
        let ip = ip.ok_or(UnresolvedGateway::NoCommonFamily)?;
        Ok(GatewayInstance {
            expected: vec![workload.spiffe_id().clone()],
            workload: Arc::clone(workload),
            service: None,
            address: SocketAddr::new(ip, address.hbone_port),
        })
    }

    fn gateway_of_service(
        &self,
        service: &Arc<Service>,
        port: u16,
        from: &Viewpoint<'_>,
        reach: &Reach,
        random: &mut fastrand::Rng,
        tried: &[Arc<str>],
    ) -> Result<GatewayInstance, UnresolvedGateway> {
        let workload = self.select_any(service, from, random, tried).ok_or(UnresolvedGateway::NoReadyInstance)?;
        let ip = workload.address_for(reach).ok_or(UnresolvedGateway::NoCommonFamily)?;
        let target = workload.target_port(service, port).unwrap_or(port);
        Ok(GatewayInstance {
            expected: service.expected_identities(workload),
            workload: Arc::clone(workload),
            service: Some(Arc::clone(service)),
            address: SocketAddr::new(ip, target),
        })
    }

    /// Whether `workload` is itself an instance of the gateway that `address` names. Its own traffic does not go
    /// through itself.
    pub fn is_instance(&self, address: &GatewayAddress, workload: &Workload) -> bool {
        match &address.destination {
            GatewayDestination::Service(key) => workload.in_service(key),
            GatewayDestination::Address(at) => {
                (at.network == workload.location.network && workload.addresses.contains(&at.ip))
                    || self.service_by_vip(&at.network, at.ip).is_some_and(|service| workload.in_service(service.key()))
            }
        }
    }
}
