//! Names for the pods' applications. Every query that a pod sends to any resolver comes here (port 53, UDP and TCP). Names
//! of services of the mesh are answered from the snapshot; everything else is forwarded to the very resolver that was asked,
//! from the pod's namespace, so that DNS is never worse than without the mesh.
//!
//! | query | what becomes of it |
//! |---|---|
//! | A, AAAA of a service that the pod sees | answered: virtual addresses, or those of the ready endpoints; NODATA for the other family |
//! | A, AAAA of an endpoint of a headless service | answered |
//! | SRV of a service that the pod sees, for a port whose name culvertd told | answered: the service, or its ready endpoints |
//! | any other type or name, or discovery has not told all yet | forwarded as it is |
//! | an answer, or what is shorter than a header | dropped |
//!
//! A name that is not known is never denied here: who knows everything about a name is the resolver that was asked.
//! [`resolve`] and [`answer`] are pure; [`udp`], [`tcp`] and [`forward`] are thin around them.

pub mod answer;
mod bucket;
pub mod cache;
pub mod forward;
pub mod message;
pub mod metrics;
pub mod resolve;
pub mod tcp;
pub mod udp;

pub use metrics::DnsMetrics;

use std::sync::{Mutex, PoisonError};

use tokio::sync::Semaphore;
use tokio::time::Instant;

use bucket::Bucket;

/// The port that resolvers answer on, and the only one that is captured for names.
pub const DNS_PORT: u16 = 53;

/// See [`PodBounds::connections`].
const CONNECTIONS: usize = 256;

/// What the DNS servers of all pods share.
#[derive(Debug)]
pub struct Dns {
    /// The cluster's domain, in lower case, without dots at its ends.
    pub domain: String,
    /// Where queries are sent to that are captured: [`DNS_PORT`].
    pub port: u16,
    /// Where resolvers are asked: [`DNS_PORT`].
    pub upstream_port: u16,
    /// Counts.
    pub metrics: DnsMetrics,
}

impl Dns {
    /// For a cluster whose names end in `domain`.
    pub fn new(domain: &str, metrics: DnsMetrics) -> Self {
        Self { domain: domain.trim_matches('.').to_ascii_lowercase(), port: DNS_PORT, upstream_port: DNS_PORT, metrics }
    }
}

/// What bounds one pod's queries, on all threads together.
#[derive(Debug)]
pub struct PodBounds {
    /// Connections whose queries are looked at; more are carried as they are.
    pub connections: Semaphore,
    bucket: Mutex<Bucket>,
}

impl Default for PodBounds {
    fn default() -> Self {
        Self { connections: Semaphore::new(CONNECTIONS), bucket: Mutex::new(Bucket::new(Instant::now())) }
    }
}

impl PodBounds {
    /// Whether the pod may ask once more, by UDP or TCP.
    pub fn take(&self) -> bool {
        // A bucket is never half done.
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now())
    }
}

#[cfg(test)]
mod tests;
