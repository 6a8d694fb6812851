//! Peers that refused a tunnel's certificate after the handshake, which TLS 1.3 allows. The tunnel is lost then, and so is
//! every stream on it; what is kept here tells those apart from streams on a tunnel that was lost otherwise.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::proxy::error::ConnectionError;
use crate::proxy::worker::TunnelKey;

/// How long a refusal explains the loss of a stream. Both come from the same connection, one right after the other.
const KEPT: Duration = Duration::from_secs(5);

/// Refusals that are kept at a time.
const LIMIT: usize = 1024;

/// Why peers did not take tunnels, until the connection that asked for the tunnel has taken it.
#[derive(Debug, Default)]
pub struct Refusals(Mutex<HashMap<TunnelKey, (Instant, Arc<ConnectionError>)>>);

impl Refusals {
    /// Keeps why the peer did not take a tunnel.
    pub fn note(&self, key: TunnelKey, error: ConnectionError) {
        let now = Instant::now();
        let mut refusals = self.lock();
        // Nobody may come for it; the list must not grow.
        if refusals.len() >= LIMIT {
            refusals.retain(|_, (noted, _)| now.duration_since(*noted) < KEPT);
        }
        if refusals.len() >= LIMIT {
            refusals.clear();
        }
        refusals.insert(key, (now, Arc::new(error)));
    }

    /// Why the peer did not take the tunnel, if it said so just now.
    pub fn take(&self, key: &TunnelKey) -> Option<Arc<ConnectionError>> {
        let (noted, error) = self.lock().remove(key)?;
        (noted.elapsed() < KEPT).then_some(error)
    }

    /// The peer has taken a tunnel.
    pub fn forget(&self, key: &TunnelKey) {
        let mut refusals = self.lock();
        // Nearly always there are none, and nothing is hashed for each connection.
        if !refusals.is_empty() {
            refusals.remove(key);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TunnelKey, (Instant, Arc<ConnectionError>)>> {
        // Nothing is left half done under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(port: u16) -> TunnelKey {
        TunnelKey {
            source: "spiffe://cluster.local/ns/a/sa/b".parse().unwrap(),
            source_ip: [10, 0, 0, 1].into(),
            next_hop: ([10, 0, 0, 2], port).into(),
            expected: Vec::new(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_explains_only_what_is_lost_with_it() {
        let refusals = Refusals::default();
        refusals.note(key(1), ConnectionError::NoTunnel);
        assert!(refusals.take(&key(2)).is_none());
        assert!(refusals.take(&key(1)).is_some());
        assert!(refusals.take(&key(1)).is_none(), "taken once");
        refusals.note(key(1), ConnectionError::NoTunnel);
        tokio::time::advance(KEPT).await;
        assert!(refusals.take(&key(1)).is_none(), "too old");
        refusals.note(key(1), ConnectionError::NoTunnel);
        refusals.forget(&key(1));
        assert!(refusals.take(&key(1)).is_none(), "the peer has taken a tunnel since");
    }

    #[tokio::test(start_paused = true)]
    async fn refusals_that_nobody_takes_do_not_grow() {
        let refusals = Refusals::default();
        for port in 0..5000 {
            refusals.note(key(port), ConnectionError::NoTunnel);
        }
        assert!(refusals.lock().len() <= LIMIT);
        assert!(refusals.take(&key(4999)).is_some());
    }
}
