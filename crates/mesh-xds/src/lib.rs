//! Delta discovery (`envoy.service.discovery.v3`, aggregated), both ends.
//!
//! The protocol is in two state machines without I/O, [`client::Machine`] and [`server::Machine`]; [`client::Driver`]
//! and [`server::Service`] put gRPC around them. Resource bodies are opaque bytes here: what they mean, and whether they
//! are valid, is for the [`client::Sink`] to say.
//!
//! ```text
//! Catalog --snapshot--> server::Machine --response--> client::Machine --Update--> Sink
//!                             ^----------- ACK, NACK, subscriptions -----'
//! ```

pub mod client;
pub mod server;

use std::sync::Arc;

use bytes::Bytes;

/// Type of workloads and services.
pub const WORKLOAD_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// Type of L4 authorization policies.
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";

/// Ends `system_version_info` of a response that is followed by more of the same state. Of use between Culvert's own
/// ends only: a client knows by it that its first answer is not complete yet. Others ignore the field.
const MORE: &str = "+more";

/// One named resource of one type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Primary name.
    pub name: Arc<str>,
    /// Other names under which it may be asked for.
    pub aliases: Vec<Arc<str>>,
    /// Differs whenever the body or the aliases do; may be empty, which means unknown.
    pub version: Arc<str>,
    /// The message of the resource's type, encoded.
    pub body: Bytes,
}

/// What one response changes, of one type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Update {
    /// The type of the resources.
    pub type_url: Arc<str>,
    /// New or changed resources; no name twice.
    pub set: Vec<Resource>,
    /// Names that do not exist (any more), to be taken out before `set` is put in; none of them is in `set`. May hold
    /// names that were never known, and aliases that were asked for.
    pub removed: Vec<String>,
}

/// A resource that could not be accepted. The rest of its update stays in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// Primary name of the resource.
    pub name: String,
    /// Why, for whoever wrote the configuration.
    pub reason: String,
}
