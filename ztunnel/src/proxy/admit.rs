//! Whether an inbound connection is taken, and what becomes of it: a pure decision over a snapshot.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_hbone::Authority;
use mesh_model::{Allowed, ConnectionFacts, Denied, Destination, Snapshot, SpiffeId, Workload};
use thiserror::Error;

use super::local::{LocalPod, is_forbidden};
use super::plan::Target;

/// The two ends of the TCP connection that something came in by.
#[derive(Debug, Clone, Copy)]
pub struct Connection {
    /// The address in the pod that was connected to.
    pub local: SocketAddr,
    /// The peer's address.
    pub peer: SocketAddr,
}

/// What a peer asks for through its tunnel.
#[derive(Debug, Clone, Copy)]
pub struct Connect<'a> {
    /// What it wants to connect to.
    pub authority: &'a Authority,
}

/// The connection is taken.
#[derive(Debug, Clone)]
pub struct Admission {
    /// Where the application listens.
    pub target: Target,
    /// The address that the application is to see as its client.
    pub source_ip: IpAddr,
    /// What decided.
    pub allowed: Allowed,
    /// For the record: the pod.
    pub destination: Arc<Workload>,
    /// For the record: the peer, if discovery has brought it.
    pub source: Option<Arc<Workload>>,
}

/// The connection is not taken.
#[derive(Debug, Clone)]
pub struct Denial {
    /// Why.
    pub why: DenialReason,
    /// For the record: the pod, if discovery has brought it.
    pub destination: Option<Arc<Workload>>,
    /// For the record: the peer, if discovery has brought it.
    pub source: Option<Arc<Workload>>,
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.why.fmt(f)
    }
}

impl std::error::Error for Denial {}

/// Why a connection is not taken.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DenialReason {
    /// The authority is a name. Only tunnels between networks carry names.
    #[error("the authority {authority} is not an address")]
    NotAnAddress {
        /// The authority as sent.
        authority: String,
    },
    /// The authority's address is not the one that the tunnel came to.
    #[error("the authority {authority} is not at {local}, where the tunnel came to")]
    OtherAddress {
        /// The authority as sent.
        authority: String,
        /// The address that the tunnel came to.
        local: IpAddr,
    },
    /// A port that belongs to the mesh itself.
    #[error("port {port} belongs to the mesh itself")]
    ForbiddenPort {
        /// The port.
        port: u16,
    },
    /// Discovery has not brought the pod, so that its policies are not known.
    #[error("the pod is not known to discovery yet, nor its policies")]
    UnknownDestination,
    /// What discovery sent for the pod cannot be taken, so that its policies are not known.
    #[error("{resource}, the pod's own resource, is invalid: {reason}; nothing is let in until it is repaired")]
    InvalidDestination {
        /// The resource's name in discovery.
        resource: Arc<str>,
        /// What is wrong with it.
        reason: Arc<str>,
    },
    /// The application wants to be spoken to in a tunnel of its own.
    #[error("the pod asks for PROXY protocol, which is not spoken here")]
    ApplicationTunnel,
    /// A policy denies.
    #[error(transparent)]
    Policy(#[from] Denied),
}

impl Denial {
    /// The status that answers the CONNECT.
    pub fn reply(&self) -> u16 {
        match self.why {
            DenialReason::NotAnAddress { .. } | DenialReason::OtherAddress { .. } => 400,
            DenialReason::Policy(_) => 401,
            DenialReason::ForbiddenPort { .. }
            | DenialReason::UnknownDestination
            | DenialReason::InvalidDestination { .. }
            | DenialReason::ApplicationTunnel => 503,
        }
    }

    /// A label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self.why {
            DenialReason::NotAnAddress { .. } => "authority_not_an_address",
            DenialReason::OtherAddress { .. } => "authority_mismatch",
            DenialReason::ForbiddenPort { .. } => "forbidden_port",
            DenialReason::UnknownDestination => "unknown_destination",
            DenialReason::InvalidDestination { .. } => "invalid_destination",
            DenialReason::ApplicationTunnel => "application_tunnel",
            DenialReason::Policy(_) => "policy_denied",
        }
    }

    /// Key of the policy that denied.
    pub fn policy(&self) -> Option<&Arc<str>> {
        match &self.why {
            DenialReason::Policy(denied) => Some(denied.policy()),
            DenialReason::NotAnAddress { .. }
            | DenialReason::OtherAddress { .. }
            | DenialReason::ForbiddenPort { .. }
            | DenialReason::UnknownDestination
            | DenialReason::InvalidDestination { .. }
            | DenialReason::ApplicationTunnel => None,
        }
    }
}

/// Decides on one CONNECT that `peer`, as its certificate proved it, sent to the pod `local`.
///
/// # Errors
/// When the connection is not taken.
pub fn admit(
    snapshot: &Snapshot,
    local: &LocalPod<'_>,
    peer: &SpiffeId,
    connection: Connection,
    connect: &Connect<'_>,
) -> Result<Admission, Denial> {
    let door = Door { snapshot, local, identity: Some(peer), connection };
    let at = connection.local.ip().to_canonical();
    let authority = || connect.authority.as_str().to_owned();
    let Some(target) = connect.authority.socket_addr() else {
        return Err(door.denial(DenialReason::NotAnAddress { authority: authority() }));
    };
    if target.ip().to_canonical() != at {
        return Err(door.denial(DenialReason::OtherAddress { authority: authority(), local: at }));
    }
    door.admit(SocketAddr::new(at, target.port()))
}

/// Decides on a connection that came in plain to the pod `local`, for the address that it came to.
///
/// # Errors
/// When the connection is not taken.
pub fn admit_plaintext(snapshot: &Snapshot, local: &LocalPod<'_>, connection: Connection) -> Result<Admission, Denial> {
    let target = SocketAddr::new(connection.local.ip().to_canonical(), connection.local.port());
    Door { snapshot, local, identity: None, connection }.admit(target)
}

/// What both kinds of connection are decided by.
struct Door<'a> {
    snapshot: &'a Snapshot,
    local: &'a LocalPod<'a>,
    identity: Option<&'a SpiffeId>,
    connection: Connection,
}

impl Door<'_> {
    fn admit(&self, target: SocketAddr) -> Result<Admission, Denial> {
        if is_forbidden(target.port()) {
            return Err(self.denial(DenialReason::ForbiddenPort { port: target.port() }));
        }
        let Some(destination) = self.local.workload(self.snapshot) else {
            return Err(self.denial(self.unknown()));
        };
        if destination.application_tunnel.is_some() {
            return Err(self.denial(DenialReason::ApplicationTunnel));
        }
        let source_ip = self.connection.peer.ip().to_canonical();
        let facts = ConnectionFacts {
            destination,
            identity: self.identity,
            source_ip,
            destination_ip: target.ip(),
            destination_port: target.port(),
        };
        let allowed = self.snapshot.authorize(&facts).map_err(|denied| self.denial(denied.into()))?;
        Ok(Admission {
            target: Target(target),
            source_ip,
            allowed,
            destination: Arc::clone(destination),
            source: self.source(),
        })
    }

    /// Why the pod is not known.
    fn unknown(&self) -> DenialReason {
        let at = |ip| self.snapshot.workload_destination(self.local.network, ip);
        let invalid = self.local.addresses.iter().find_map(|ip| match at(*ip) {
            Destination::Unusable(unusable) => Some(unusable),
            Destination::Workload(_) | Destination::Service(_) | Destination::Unknown => None,
        });
        invalid.map_or(DenialReason::UnknownDestination, |unusable| DenialReason::InvalidDestination {
            resource: Arc::clone(&unusable.name),
            reason: Arc::clone(&unusable.reason),
        })
    }

    /// The workload at the peer's address. One whose identity is not the peer's is somebody else: an address given
    /// anew, or a waypoint's.
    fn source(&self) -> Option<Arc<Workload>> {
        let workload = self.snapshot.workload_by_ip(self.local.network, self.connection.peer.ip())?;
        let is_peer = self.identity.is_none_or(|id| id == workload.spiffe_id());
        is_peer.then(|| Arc::clone(workload))
    }

    fn denial(&self, why: DenialReason) -> Denial {
        Denial { why, destination: self.local.workload(self.snapshot).cloned(), source: self.source() }
    }
}

#[cfg(test)]
mod tests;
