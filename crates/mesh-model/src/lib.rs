//! What the wire means.
//!
//! Validated types made from discovery resources ([`Workload`], [`Service`], [`Authorization`]), an immutable
//! [`Snapshot`] of all of them that clones in constant time and takes one change in microseconds, and the decisions
//! that are functions of a snapshot: which endpoint ([`Snapshot::select`]), which waypoint ([`Snapshot::gateway`]),
//! and whether a connection may be ([`Snapshot::authorize`]).
//!
//! No I/O, no async, no clock. Randomness is passed in.

pub mod address;
pub mod authorize;
mod blocks;
pub mod draining;
mod endpoints;
#[cfg(test)]
mod fixture;
pub mod gateway;
pub mod identity;
mod intern;
pub mod invalid;
pub mod policy;
pub mod port_names;
pub mod resolve;
pub mod service;
pub mod snapshot;
pub mod unusable;
mod weighted;
pub mod workload;

pub use address::{Cidr, InvalidAddress, NetworkAddress, Reach};
pub use authorize::{Allowed, ConnectionFacts, Denied, DenyReason, Noted};
pub use gateway::{GatewayAddress, GatewayInstance, HBONE_PORT, InvalidGateway, UnresolvedGateway};
pub use identity::{InvalidSpiffeId, SpiffeId};
pub use policy::{Action, Authorization, InvalidAuthorization, Scope};
pub use resolve::{Destination, Endpoint, Viewpoint};
pub use service::{AppProtocol, InvalidService, LoadBalancing, Service, ServicePort};
pub use snapshot::{Change, InvalidChange, Snapshot};
pub use unusable::Unusable;
pub use workload::{Health, InvalidWorkload, Locality, TunnelProtocol, Workload, WorkloadType};
