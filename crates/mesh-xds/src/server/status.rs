//! What the server shows of its clients.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

/// One connected client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientStatus {
    /// Number of the stream, unique in this process.
    pub id: u64,
    /// Who it is, as authenticated.
    pub client: String,
    /// What it calls itself.
    pub node_id: String,
    /// Where it connects from, if the transport knows.
    pub address: Option<SocketAddr>,
    /// Since when.
    pub connected_since: SystemTime,
    /// Responses that it has refused since then.
    pub nacks: u64,
    /// The types that it asked for.
    pub types: Vec<TypeStatus>,
}

/// One type of one client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypeStatus {
    /// The type.
    pub type_url: Arc<str>,
    /// Whether everything was asked for.
    pub wildcard: bool,
    /// Names asked for.
    pub names: usize,
    /// Version of the catalog of the last response.
    pub sent: u64,
    /// Version of the catalog of the last response that was accepted.
    pub acked: u64,
    /// Version of the catalog up to which changes were sent, or do not concern it: later ones are pending.
    pub considered: u64,
    /// Whether a response waits for its ACK.
    pub in_flight: bool,
    /// Resources whose last content was refused.
    pub nacks: Vec<Nack>,
}

/// A refusal by a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nack {
    /// Primary name of the resource; empty if the client named none.
    pub resource: String,
    /// Why, as the client says.
    pub reason: String,
    /// When.
    pub at: SystemTime,
}
