//! Where an outbound connection goes: a pure decision over a snapshot.
//!
//! | destination | plan |
//! |---|---|
//! | service with a waypoint | tunnel to an instance of the waypoint, which is told the virtual address |
//! | service | a ready endpoint: by tunnel where it speaks HBONE, else plain |
//! | workload with a waypoint | tunnel to an instance of the waypoint, which is told the workload's address |
//! | workload | by tunnel where it speaks HBONE, else plain |
//! | what discovery sent and cannot be taken | refused: how it wants to be reached is not known |
//! | a pod of this node that discovery has not brought yet | refused, for the same reason |
//! | anything else | passed through to the address that the application asked for |
//!
//! A waypoint's own connections do not go through itself. What is bound to a waypoint that cannot be had is refused.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_hbone::Authority;
use mesh_model::gateway::{GatewayAddress, UnresolvedGateway};
use mesh_model::service::{LoadBalancingMode, Service};
use mesh_model::{Destination, HBONE_PORT, Reach, Snapshot, SpiffeId, TunnelProtocol, Viewpoint, Workload};
use thiserror::Error;

use super::local::{LocalPod, is_forbidden};

/// Where the application believes it connects to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OriginalDst(pub SocketAddr);

/// Where the proxy's own TCP connection goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextHop(pub SocketAddr);

/// What the far end of a tunnel is asked to connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target(pub SocketAddr);

impl Target {
    /// The target as a CONNECT names it.
    pub fn authority(self) -> Authority {
        Authority::from(self.0)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What to do with one outbound connection.
#[derive(Debug, Clone)]
pub enum Plan {
    /// Through an HBONE tunnel.
    Tunnel {
        /// Where the tunnel's connection goes.
        next_hop: NextHop,
        /// What the CONNECT asks for.
        authority: Target,
        /// The identities of which the far end must present one.
        expected: Vec<SpiffeId>,
        /// For the record.
        destination: Planned,
        /// Who is at the far end.
        kind: TunnelKind,
    },
    /// In plain TCP, to something that the mesh knows.
    Plain {
        /// Where the connection goes.
        next_hop: NextHop,
        /// For the record.
        destination: Planned,
    },
    /// In plain TCP, to what the application asked for; the mesh does not know it, or is asked to leave it alone.
    PassThrough {
        /// Where the connection goes: the original destination.
        next_hop: NextHop,
        /// For the record.
        destination: Planned,
    },
}

/// Who is at the far end of a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunnelKind {
    /// The destination itself.
    Direct,
    /// The waypoint of the destination service.
    ServiceWaypoint,
    /// The waypoint of the destination workload.
    WorkloadWaypoint,
}

/// What is known of a destination, for the record.
#[derive(Debug, Clone, Default)]
pub struct Planned {
    /// The workload at the far end; a waypoint's where there is one.
    pub workload: Option<Arc<Workload>>,
    /// The service that the application asked for.
    pub service: Option<Arc<Service>>,
}

/// The connection is not carried.
#[derive(Debug, Clone, Error)]
#[error("{why}")]
pub struct Refusal {
    /// Why.
    pub why: RefusalReason,
    /// For the record.
    pub destination: Planned,
}

/// Why a connection is not carried.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RefusalReason {
    /// A port that belongs to the mesh itself.
    #[error("port {port} of {to} belongs to the mesh itself")]
    ForbiddenPort {
        /// The port.
        port: u16,
        /// Service or workload.
        to: Arc<str>,
    },
    /// The service does not have that port.
    #[error("service {service} has no port {port}")]
    NoSuchPort {
        /// Key of the service.
        service: Arc<str>,
        /// The port asked for.
        port: u16,
    },
    /// No endpoint of the service can take the connection.
    #[error("service {service} has no ready endpoint for port {port}")]
    NoReadyEndpoint {
        /// Key of the service.
        service: Arc<str>,
        /// The port asked for.
        port: u16,
    },
    /// Discovery sent something for the destination that cannot be taken.
    #[error(
        "{resource}, which has this address, is invalid: {reason}; it is refused until its configuration is repaired"
    )]
    InvalidDestination {
        /// The resource's name in discovery.
        resource: Arc<str>,
        /// What is wrong with it.
        reason: Arc<str>,
    },
    /// The destination is a pod of this node that is in the mesh, and discovery has not brought it yet.
    #[error("{ip} is a pod of this node that the control plane has not told of yet")]
    NotDiscovered {
        /// The pod's address.
        ip: IpAddr,
    },
    /// The destination has no address of a family that the source has.
    #[error("{to} has no address of a family that the pod has")]
    NoCommonFamily {
        /// Key of the service, or uid of the workload; the waypoint's where there is one.
        to: Arc<str>,
    },
    /// The destination is bound to a waypoint that is not known.
    #[error("{of} is bound to a waypoint that is not known")]
    WaypointUnknown {
        /// Service or workload.
        of: Arc<str>,
    },
    /// The destination is bound to a waypoint of which no instance is ready.
    #[error("no instance of the waypoint of {of} is ready")]
    WaypointNotReady {
        /// Service or workload.
        of: Arc<str>,
    },
}

impl Refusal {
    /// Whether what is missing may come any moment.
    pub fn is_early(&self) -> bool {
        matches!(self.why, RefusalReason::NotDiscovered { .. })
    }

    /// A label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self.why {
            RefusalReason::ForbiddenPort { .. } => "forbidden_port",
            RefusalReason::NoSuchPort { .. } => "no_such_port",
            RefusalReason::NoReadyEndpoint { .. } => "no_ready_endpoint",
            RefusalReason::InvalidDestination { .. } => "invalid_destination",
            RefusalReason::NotDiscovered { .. } => "not_discovered",
            RefusalReason::NoCommonFamily { .. } => "address_family",
            RefusalReason::WaypointUnknown { .. } => "waypoint_unknown",
            RefusalReason::WaypointNotReady { .. } => "waypoint_not_ready",
        }
    }
}

/// Decides where a connection that an application in `source` opened to `dst` goes. `is_local` tells the addresses of the
/// pods of this node that are in the mesh, whether or not discovery has brought them.
///
/// # Errors
/// When the connection must not or cannot be carried.
pub fn plan(
    snapshot: &Snapshot,
    source: &LocalPod<'_>,
    dst: OriginalDst,
    is_local: &dyn Fn(IpAddr) -> bool,
    random: &mut fastrand::Rng,
) -> Result<Plan, Refusal> {
    plan_without(snapshot, source, dst, is_local, random, &[])
}

/// Times that [`plan_other`] decides where a service has several waypoints: of two that are left and one that was tried, all
/// of the same weight, it misses them once in 10^7 times.
const DRAWS: usize = 16;

/// Decides as [`plan`] does, but for a far end that is none of `tried`, which are uids of workloads. None: there is no other
/// that may be tried, or the destination is not one of several.
pub fn plan_other(
    snapshot: &Snapshot,
    source: &LocalPod<'_>,
    dst: OriginalDst,
    is_local: &dyn Fn(IpAddr) -> bool,
    random: &mut fastrand::Rng,
    tried: &[Arc<str>],
) -> Option<Plan> {
    for _ in 0..DRAWS {
        match plan_without(snapshot, source, dst, is_local, random, tried) {
            Ok(plan) => {
                let (workload, several) = match &plan {
                    Plan::Tunnel { destination, kind, .. } => {
                        (&destination.workload, destination.service.is_some() || *kind != TunnelKind::Direct)
                    }
                    Plan::Plain { destination, .. } => (&destination.workload, destination.service.is_some()),
                    Plan::PassThrough { .. } => return None,
                };
                let is_other = workload.as_ref().is_some_and(|workload| !tried.contains(&workload.uid));
                return Some(plan).filter(|_| several && is_other);
            }
            Err(refusal) => {
                let service = refusal.destination.service?;
                // Another waypoint may be drawn.
                if service.weighted_waypoints.len() < 2 {
                    return None;
                }
            }
        }
    }
    None
}

fn plan_without(
    snapshot: &Snapshot,
    source: &LocalPod<'_>,
    dst: OriginalDst,
    is_local: &dyn Fn(IpAddr) -> bool,
    random: &mut fastrand::Rng,
    tried: &[Arc<str>],
) -> Result<Plan, Refusal> {
    // An IPv4 address mapped into IPv6 is the IPv4 address, for look-ups and on the wire.
    let dst = OriginalDst(SocketAddr::new(dst.0.ip().to_canonical(), dst.0.port()));
    let workload = source.workload(snapshot);
    let reach = Reach::new(dst.0.ip(), source.addresses);
    let from = source.viewpoint(workload);
    let mut planner = Planner { snapshot, source: workload, from, dst, reach, is_local, random, tried };
    let destination = snapshot.destination(&planner.from, dst.0.ip());
    planner.plan(destination, None)
}

/// What every step of one decision needs.
struct Planner<'a> {
    snapshot: &'a Snapshot,
    /// The source, if discovery has brought it.
    source: Option<&'a Arc<Workload>>,
    from: Viewpoint<'a>,
    dst: OriginalDst,
    /// The families that the source has.
    reach: Reach,
    is_local: &'a dyn Fn(IpAddr) -> bool,
    random: &'a mut fastrand::Rng,
    /// Workloads that are not to be the far end of a service, by uid.
    tried: &'a [Arc<str>],
}

impl<'a> Planner<'a> {
    /// `through` is the service that was asked for and leaves the way to the address.
    fn plan(&mut self, to: Destination<'a>, through: Option<&Arc<Service>>) -> Result<Plan, Refusal> {
        let ip = self.dst.0.ip();
        let why = match to {
            Destination::Service(service) => return self.plan_service(service),
            Destination::Workload(workload) => return self.plan_workload(workload),
            Destination::Unusable(unusable) => RefusalReason::InvalidDestination {
                resource: Arc::clone(&unusable.name),
                reason: Arc::clone(&unusable.reason),
            },
            Destination::Unknown if (self.is_local)(ip) => RefusalReason::NotDiscovered { ip },
            Destination::Unknown => return Ok(self.pass_through(through)),
        };
        Err(Refusal { why, destination: Planned { workload: None, service: through.cloned() } })
    }

    fn plan_service(&mut self, service: &Arc<Service>) -> Result<Plan, Refusal> {
        let OriginalDst(dst) = self.dst;
        let key = service.key();
        let destination = Planned { workload: None, service: Some(Arc::clone(service)) };
        let refuse = |why| Err(Refusal { why, destination: destination.clone() });
        if is_forbidden(dst.port()) {
            return refuse(RefusalReason::ForbiddenPort { port: dst.port(), to: Arc::clone(key) });
        }
        if service.port(dst.port()).is_none() {
            return refuse(RefusalReason::NoSuchPort { service: Arc::clone(key), port: dst.port() });
        }
        let weighted = service.weighted_waypoints.iter().map(|(waypoint, _)| waypoint);
        if service.has_waypoint() && !self.source_is_any_of(weighted.chain(&service.waypoint)) {
            // `choose_waypoint` has one to give whenever the service is bound.
            let waypoint = service.choose_waypoint(self.random);
            return self.plan_waypoint(waypoint, key, destination, TunnelKind::ServiceWaypoint);
        }
        if service.load_balancing.mode == LoadBalancingMode::Passthrough {
            return self.plan(self.snapshot.workload_destination(self.from.network, dst.ip()), Some(service));
        }
        let endpoint = self.snapshot.select(service, dst.port(), &self.from, self.random, self.tried);
        let Some(endpoint) = endpoint else {
            return refuse(RefusalReason::NoReadyEndpoint { service: Arc::clone(key), port: dst.port() });
        };
        let Some(ip) = endpoint.workload.address_for(&self.reach) else {
            return refuse(RefusalReason::NoCommonFamily { to: Arc::clone(&endpoint.workload.uid) });
        };
        let address = SocketAddr::new(ip, endpoint.target_port);
        let destination = Planned { workload: Some(Arc::clone(endpoint.workload)), service: Some(Arc::clone(service)) };
        carry(endpoint.workload, address, service.expected_identities(endpoint.workload), destination)
    }

    fn plan_workload(&mut self, workload: &Arc<Workload>) -> Result<Plan, Refusal> {
        let OriginalDst(dst) = self.dst;
        let destination = Planned { workload: Some(Arc::clone(workload)), service: None };
        if is_forbidden(dst.port()) && workload.waypoint().is_some() {
            let why = RefusalReason::ForbiddenPort { port: dst.port(), to: Arc::clone(&workload.uid) };
            return Err(Refusal { why, destination });
        }
        if workload.waypoint().is_some() && !self.source_is_any_of(workload.waypoint()) {
            let kind = TunnelKind::WorkloadWaypoint;
            return self.plan_waypoint(workload.waypoint(), &workload.uid, destination, kind);
        }
        // The very address that was asked for, unless it is of a family that only the destination has.
        let asked = Some(dst.ip()).filter(|ip| self.reach.can(*ip));
        let Some(ip) = asked.or_else(|| workload.address_for(&self.reach)) else {
            return Err(Refusal { why: RefusalReason::NoCommonFamily { to: Arc::clone(&workload.uid) }, destination });
        };
        let address = SocketAddr::new(ip, dst.port());
        carry(workload, address, vec![workload.spiffe_id().clone()], destination)
    }

    /// `of` and `bound` are what is bound to the waypoint.
    fn plan_waypoint(
        &mut self,
        waypoint: Option<&GatewayAddress>,
        of: &Arc<str>,
        bound: Planned,
        kind: TunnelKind,
    ) -> Result<Plan, Refusal> {
        let OriginalDst(dst) = self.dst;
        let instance = waypoint.ok_or(UnresolvedGateway::Unknown);
        let instance =
            instance.and_then(|at| self.snapshot.gateway(at, &self.from, &self.reach, self.random, self.tried));
        match instance {
            Ok(instance) => Ok(Plan::Tunnel {
                next_hop: NextHop(instance.address),
                authority: Target(dst),
                expected: instance.expected,
                destination: Planned { workload: Some(instance.workload), service: bound.service },
                kind,
            }),
            Err(UnresolvedGateway::Unknown) => {
                Err(Refusal { why: RefusalReason::WaypointUnknown { of: Arc::clone(of) }, destination: bound })
            }
            Err(UnresolvedGateway::NoReadyInstance) => {
                Err(Refusal { why: RefusalReason::WaypointNotReady { of: Arc::clone(of) }, destination: bound })
            }
            Err(UnresolvedGateway::NoCommonFamily) => {
                Err(Refusal { why: RefusalReason::NoCommonFamily { to: Arc::clone(of) }, destination: bound })
            }
        }
    }

    fn source_is_any_of<'g>(&self, waypoints: impl IntoIterator<Item = &'g GatewayAddress>) -> bool {
        let Some(source) = self.source else { return false };
        waypoints.into_iter().any(|waypoint| self.snapshot.is_instance(waypoint, source))
    }

    fn pass_through(&self, service: Option<&Arc<Service>>) -> Plan {
        let destination = Planned { workload: None, service: service.cloned() };
        Plan::PassThrough { next_hop: NextHop(self.dst.0), destination }
    }
}

/// To `workload` itself, whose application listens on `address`.
fn carry(
    workload: &Arc<Workload>,
    address: SocketAddr,
    expected: Vec<SpiffeId>,
    destination: Planned,
) -> Result<Plan, Refusal> {
    match workload.tunnel_protocol {
        TunnelProtocol::Hbone if is_forbidden(address.port()) => {
            let why = RefusalReason::ForbiddenPort { port: address.port(), to: Arc::clone(&workload.uid) };
            Err(Refusal { why, destination })
        }
        TunnelProtocol::Hbone => Ok(Plan::Tunnel {
            next_hop: NextHop(SocketAddr::new(address.ip(), HBONE_PORT)),
            authority: Target(address),
            expected,
            destination,
            kind: TunnelKind::Direct,
        }),
        // A sidecar of the older kind takes plain TCP unless its own policy forbids it, and its mutual TLS is nothing
        // that a node proxy speaks: it then refuses by itself, where the reason can be seen.
        TunnelProtocol::None | TunnelProtocol::LegacyIstioMtls => {
            Ok(Plan::Plain { next_hop: NextHop(address), destination })
        }
    }
}

#[cfg(test)]
mod amid_tests;
#[cfg(test)]
mod tests;
