//! What a destination address is, and which endpoint of a service takes a connection.

use std::cmp::Reverse;
use std::net::IpAddr;
use std::sync::Arc;

use crate::address::Cidr;
use crate::service::{LocalityScope, Service};
use crate::snapshot::Snapshot;
use crate::unusable::{Unusable, workload_rank};
use crate::workload::{Location, TunnelProtocol, Workload};

/// Where the client is, which decides what it sees and what is near to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Viewpoint<'a> {
    /// Network.
    pub network: &'a str,
    /// Kubernetes namespace.
    pub namespace: &'a str,
    /// Kubernetes node.
    pub node: &'a str,
    /// Kubernetes cluster.
    pub cluster_id: &'a str,
    /// Cloud region.
    pub region: &'a str,
    /// Availability zone.
    pub zone: &'a str,
    /// Part of a zone.
    pub subzone: &'a str,
}

impl<'a> Viewpoint<'a> {
    /// Where `workload` is.
    pub fn of(workload: &'a Workload) -> Self {
        let Location { network, node, cluster_id, locality } = &*workload.location;
        Self {
            network,
            namespace: &workload.origin.namespace,
            node,
            cluster_id,
            region: &locality.region,
            zone: &locality.zone,
            subzone: &locality.subzone,
        }
    }

    /// What this place has for `scope`.
    pub(crate) fn scope(&self, scope: LocalityScope) -> &'a str {
        match scope {
            LocalityScope::Region => self.region,
            LocalityScope::Zone => self.zone,
            LocalityScope::Subzone => self.subzone,
            LocalityScope::Node => self.node,
            LocalityScope::Cluster => self.cluster_id,
            LocalityScope::Network => self.network,
        }
    }
}

/// What an address is.
#[derive(Debug, Clone, Copy)]
pub enum Destination<'a> {
    /// A virtual address of a service.
    Service(&'a Arc<Service>),
    /// An address of a workload.
    Workload(&'a Arc<Workload>),
    /// An address of something that cannot be taken: how its traffic is to be carried is not known.
    Unusable(&'a Arc<Unusable>),
    /// Nothing that the mesh knows.
    Unknown,
}

/// One endpoint of a service, chosen for one connection.
#[derive(Debug, Clone, Copy)]
pub struct Endpoint<'a> {
    /// The workload.
    pub workload: &'a Arc<Workload>,
    /// The port on which its application serves what was asked for.
    pub target_port: u16,
}

impl Snapshot {
    /// What `ip` is for a client at `from`. A service that the client does not see does not count. The narrowest wins: a
    /// service that has the address itself counts before a workload of that address, and the workload before a service
    /// that has a wider block of addresses. What cannot be taken counts where it would if it could be.
    pub fn destination(&self, from: &Viewpoint<'_>, ip: IpAddr) -> Destination<'_> {
        let Some((length, service)) = self.service_destination(from, ip) else {
            return self.workload_destination(from.network, ip);
        };
        if length == Cidr::host(ip).length() {
            return service;
        }
        match self.workload_destination(from.network, ip) {
            Destination::Unknown => service,
            workload => workload,
        }
    }

    /// The service that `ip` is for a client at `from`, and how many leading bits of it the service names.
    fn service_destination(&self, from: &Viewpoint<'_>, ip: IpAddr) -> Option<(u8, Destination<'_>)> {
        let mut services = self.services_by_vip(from.network, ip);
        let usable = services.find(|service| service.visible_from(from.namespace)).map(|service| {
            let here = service.addresses.iter().filter(|vip| *vip.network == *from.network && vip.block.contains(ip));
            let length = here.map(|vip| vip.block.length()).max().unwrap_or(0);
            ((Reverse(length), !service.canonical, &**service.key()), service)
        });
        match (usable, self.unusable_set().service(from, ip)) {
            (Some((usable, _)), Some((rank, unusable))) if rank < usable => {
                Some((rank.0.0, Destination::Unusable(unusable)))
            }
            (Some((rank, service)), _) => Some((rank.0.0, Destination::Service(service))),
            (None, Some((rank, unusable))) => Some((rank.0.0, Destination::Unusable(unusable))),
            (None, None) => None,
        }
    }

    /// What `ip` is in `network` apart from services.
    pub fn workload_destination(&self, network: &str, ip: IpAddr) -> Destination<'_> {
        match (self.workload_by_ip(network, ip), self.unusable_set().workload(network, ip)) {
            (Some(workload), Some((rank, unusable))) => {
                let hbone = workload.tunnel_protocol == TunnelProtocol::Hbone;
                let usable = workload_rank(&workload.uid, hbone);
                if rank < usable { Destination::Unusable(unusable) } else { Destination::Workload(workload) }
            }
            (Some(workload), None) => Destination::Workload(workload),
            (None, Some((_, unusable))) => Destination::Unusable(unusable),
            (None, None) => Destination::Unknown,
        }
    }

    /// Chooses a ready endpoint in the client's network that serves `service_port`: at random in proportion to
    /// capacity, within what the service's load balancing prefers. None: there is none.
    ///
    /// `tried` are the uids of endpoints that the connection has failed to reach: another one is chosen, as near if there
    /// are such and not too many of them have failed, else the next nearest that the load balancing allows.
    pub fn select(
        &self,
        service: &Service,
        service_port: u16,
        from: &Viewpoint<'_>,
        random: &mut fastrand::Rng,
        tried: &[Arc<str>],
    ) -> Option<Endpoint<'_>> {
        // An endpoint may list more ports than the service has.
        service.port(service_port)?;
        let workload = self.endpoints_of(service.key())?.pick(Some(service_port), from, random, tried)?;
        let target_port = workload.target_port(service, service_port)?;
        Some(Endpoint { workload, target_port })
    }

    /// As [`Self::select`], whatever the endpoint's ports are.
    pub fn select_any(
        &self,
        service: &Service,
        from: &Viewpoint<'_>,
        random: &mut fastrand::Rng,
        tried: &[Arc<str>],
    ) -> Option<&Arc<Workload>> {
        self.endpoints_of(service.key())?.pick(None, from, random, tried)
    }

    /// Endpoints of the service of that key that are ready for anything, in any network; at most `limit`, of each network
    /// the first by uid.
    pub fn some_ready_endpoints(&self, service: &str, limit: usize) -> Vec<&Arc<Workload>> {
        self.endpoints_of(service).map_or_else(Vec::new, |endpoints| endpoints.some_ready(limit))
    }

    /// Every endpoint of the service of that key that is ready for `service_port`, in any network; ready for anything
    /// with None. For listings: it walks all of them.
    pub fn ready_endpoints(&self, service: &str, service_port: Option<u16>) -> Vec<&Arc<Workload>> {
        let Some(known) = self.service_by_name(service) else { return Vec::new() };
        if service_port.is_some_and(|port| known.port(port).is_none()) {
            return Vec::new();
        }
        self.endpoints_of(service).map_or_else(Vec::new, |endpoints| endpoints.ready(service_port))
    }
}

#[cfg(test)]
mod tests;
