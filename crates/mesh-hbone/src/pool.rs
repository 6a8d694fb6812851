//! Tunnels kept for reuse, per key.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use crate::{Slot, Tunnel};

/// How long a tunnel without streams is kept by default.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
/// Callers that wait for one dial before another one is started beside it.
const WAITERS_PER_DIAL: usize = 100;

/// Tunnels by key. Cheap to clone; clones share the tunnels. The key is opaque: whoever may share a tunnel has the same key.
/// `E` is the error of a failed dial.
pub struct Pool<K, E> {
    inner: Arc<Inner<K, E>>,
}

/// Why [`Pool::get`] has no tunnel to give.
#[derive(Debug, Error)]
pub enum PoolError<E> {
    /// The dial failed. All callers that waited for it get the same error.
    #[error("{0}")]
    Dial(Arc<E>),
    /// The dial ended without a result (its task was dropped), or its tunnel takes no stream.
    #[error("no usable tunnel")]
    Unusable,
}

struct Inner<K, E> {
    idle: Duration,
    state: Mutex<State<K, E>>,
}

struct State<K, E> {
    entries: HashMap<K, Entry<E>>,
    /// A task closes idle tunnels while there are any.
    reaping: bool,
}

struct Entry<E> {
    tunnels: Vec<Kept>,
    dials: Vec<Dial<E>>,
}

struct Kept {
    tunnel: Tunnel,
    /// When it was last seen in use.
    used: Instant,
}

/// A dial that is under way.
struct Dial<E> {
    done: watch::Receiver<Option<Result<(), Arc<E>>>>,
    waiters: usize,
}

/// What a caller does who found no room.
enum Next<E> {
    Take(Slot),
    Wait(watch::Receiver<Option<Result<(), Arc<E>>>>),
    Dial(watch::Sender<Option<Result<(), Arc<E>>>>),
}

impl<K, E> Pool<K, E>
where
    K: Hash + Eq + Clone + Send + 'static,
    E: Send + Sync + 'static,
{
    /// An empty pool that closes tunnels when they have had no stream for `idle`.
    pub fn new(idle: Duration) -> Self {
        let state = State { entries: HashMap::new(), reaping: false };
        Pool { inner: Arc::new(Inner { idle, state: Mutex::new(state) }) }
    }

    /// Room for one stream on a tunnel of this key; `dial` makes a tunnel if there is none with room. Concurrent callers share
    /// one dial, and its error. The dial runs as a task of its own, so that a caller who gives up does not stop it for the
    /// others: it must bound its time itself, and it must have spawned the tunnel's driver.
    ///
    /// # Errors
    /// If the dial failed.
    pub async fn get<D, F>(&self, key: &K, dial: D) -> Result<Slot, PoolError<E>>
    where
        D: FnOnce() -> F,
        F: Future<Output = Result<Tunnel, E>> + Send + 'static,
    {
        loop {
            let next = self.inner.next(key);
            match next {
                Next::Take(slot) => return Ok(slot),
                Next::Wait(mut done) => {
                    // An error means that the dial was dropped: look again.
                    if let Ok(done) = done.wait_for(Option::is_some).await
                        && let Some(Err(error)) = &*done
                    {
                        return Err(PoolError::Dial(Arc::clone(error)));
                    }
                }
                Next::Dial(done) => return self.dial(key.clone(), dial(), done).await,
            }
        }
    }

    async fn dial(
        &self,
        key: K,
        dial: impl Future<Output = Result<Tunnel, E>> + Send + 'static,
        done: watch::Sender<Option<Result<(), Arc<E>>>>,
    ) -> Result<Slot, PoolError<E>> {
        let (give, slot) = oneshot::channel();
        let inner = Arc::clone(&self.inner);
        tokio::spawn(async move {
            let result = dial.await.map_err(Arc::new);
            // The caller that dialled is served first: the others may fill the tunnel.
            let (first, result) = match result {
                Ok(tunnel) => (tunnel.reserve().ok_or(PoolError::Unusable), Ok(tunnel)),
                Err(error) => (Err(PoolError::Dial(Arc::clone(&error))), Err(error)),
            };
            let _ = give.send(first);
            let published = inner.dialled(key, &done, result);
            let _ = done.send(Some(published));
        });
        slot.await.unwrap_or(Err(PoolError::Unusable))
    }

    /// Drops the tunnels whose key does not match; streams on them go on until they end.
    pub fn retain(&self, mut keep: impl FnMut(&K) -> bool) {
        let removed: Vec<_> = {
            let mut state = self.inner.lock();
            state.entries.iter_mut().filter(|(k, _)| !keep(k)).map(|(_, e)| std::mem::take(&mut e.tunnels)).collect()
        };
        drop(removed);
    }

    /// Tunnels in the pool.
    pub fn tunnels(&self) -> usize {
        self.inner.lock().entries.values().map(|entry| entry.tunnels.len()).sum()
    }
}

impl<K, E> Inner<K, E>
where
    K: Hash + Eq + Clone + Send + 'static,
    E: Send + Sync + 'static,
{
    fn lock(&self) -> MutexGuard<'_, State<K, E>> {
        // No code that can panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self, key: &K) -> Next<E> {
        let mut state = self.lock();
        let entry = match state.entries.get_mut(key) {
            Some(entry) => entry,
            None => state.entries.entry(key.clone()).or_insert(Entry { tunnels: Vec::new(), dials: Vec::new() }),
        };
        for kept in &mut entry.tunnels {
            if let Some(slot) = kept.tunnel.reserve() {
                kept.used = Instant::now();
                return Next::Take(slot);
            }
        }
        entry.tunnels.retain(|kept| kept.tunnel.is_usable());
        // A dial whose task was dropped has a closed channel.
        entry.dials.retain(|dial| dial.done.has_changed().is_ok());
        if let Some(dial) = entry.dials.iter_mut().find(|dial| dial.waiters < WAITERS_PER_DIAL) {
            dial.waiters += 1;
            return Next::Wait(dial.done.clone());
        }
        let (tx, rx) = watch::channel(None);
        entry.dials.push(Dial { done: rx, waiters: 1 });
        Next::Dial(tx)
    }

    /// Puts a dialled tunnel into the pool and ends the dial.
    fn dialled(
        self: &Arc<Self>,
        key: K,
        done: &watch::Sender<Option<Result<(), Arc<E>>>>,
        result: Result<Tunnel, Arc<E>>,
    ) -> Result<(), Arc<E>> {
        let mut state = self.lock();
        if let Some(entry) = state.entries.get_mut(&key) {
            entry.dials.retain(|dial| !dial.done.same_channel(&done.subscribe()));
            if result.is_err() && entry.tunnels.is_empty() && entry.dials.is_empty() {
                state.entries.remove(&key);
            }
        }
        let tunnel = result?;
        let kept = Kept { tunnel, used: Instant::now() };
        state.entries.entry(key).or_insert(Entry { tunnels: Vec::new(), dials: Vec::new() }).tunnels.push(kept);
        if !std::mem::replace(&mut state.reaping, true) {
            tokio::spawn(reap(Reaper(Some(Arc::downgrade(self))), self.idle));
        }
        Ok(())
    }

    /// Drops tunnels that are closed or have had no stream for the idle time. Whether any are left.
    fn sweep(&self) -> bool {
        let mut dropped = Vec::new();
        let mut state = self.lock();
        let now = Instant::now();
        state.entries.retain(|_, entry| {
            let (keep, drop): (Vec<_>, Vec<_>) = std::mem::take(&mut entry.tunnels).into_iter().partition(|kept| {
                let idle = kept.tunnel.streams() == 0 && now.duration_since(kept.used) >= self.idle;
                !idle && kept.tunnel.is_usable()
            });
            entry.tunnels = keep;
            dropped.extend(drop);
            for kept in entry.tunnels.iter_mut().filter(|kept| kept.tunnel.streams() > 0) {
                kept.used = now;
            }
            entry.dials.retain(|dial| dial.done.has_changed().is_ok());
            !entry.tunnels.is_empty() || !entry.dials.is_empty()
        });
        let any = !state.entries.is_empty();
        state.reaping = any;
        // Closing tunnels wakes their drivers: not under the lock.
        std::mem::drop(state);
        any
    }
}

/// The reaping task's hold on the pool. If the task is dropped, the next tunnel starts another one.
struct Reaper<K, E>(Option<Weak<Inner<K, E>>>);

impl<K, E> Drop for Reaper<K, E> {
    fn drop(&mut self) {
        if let Some(inner) = self.0.as_ref().and_then(Weak::upgrade) {
            inner.state.lock().unwrap_or_else(PoisonError::into_inner).reaping = false;
        }
    }
}

async fn reap<K, E>(mut reaper: Reaper<K, E>, idle: Duration)
where
    K: Hash + Eq + Clone + Send + 'static,
    E: Send + Sync + 'static,
{
    let tick = (idle / 4).max(Duration::from_millis(10));
    loop {
        tokio::time::sleep(tick).await;
        let Some(inner) = reaper.0.as_ref().and_then(Weak::upgrade) else { return };
        if !inner.sweep() {
            // The sweep has noted that nobody reaps; another task may have started since.
            reaper.0 = None;
            return;
        }
    }
}

impl<K, E> Clone for Pool<K, E> {
    fn clone(&self) -> Self {
        Pool { inner: Arc::clone(&self.inner) }
    }
}

impl<K, E> fmt::Debug for Pool<K, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("idle", &self.inner.idle).finish_non_exhaustive()
    }
}
