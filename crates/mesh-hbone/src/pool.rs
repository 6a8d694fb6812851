//! Tunnels kept for reuse, per key.
//!
//! Streams share a tunnel until it is full, so that small messages travel together. A tunnel that carries bulk data is shared
//! only while there is no other: the next caller still gets it, at once, and another tunnel is dialled beside it for those who
//! come after. So a few bulk streams spread over connections of their own, and nobody new waits behind a slow reader who
//! holds a connection's window. What is too much is closed again when it has been idle.

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
/// Tunnels of one key up to which another one is dialled because all of them carry bulk data.
const MAX_SPREAD: usize = 8;
/// Time without such dials after one has failed.
const SPREAD_PAUSE: Duration = Duration::from_secs(5);
/// The share of the idle time after which a tunnel is closed that is not its key's last.
const SPARE_SHARE: u32 = 4;

/// Tunnels by key. Cheap to clone; clones share the tunnels. The key is opaque: whoever may share a tunnel has the same key.
/// `T` is what the dial has learnt of the tunnel, `E` the error of a failed dial.
pub struct Pool<K, T, E> {
    inner: Arc<Inner<K, T, E>>,
}

/// Room for one stream on a tunnel of the pool.
#[derive(Debug)]
pub struct Place<T> {
    /// The room.
    pub slot: Slot,
    /// What the dial has learnt of the tunnel.
    pub about: T,
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

struct Inner<K, T, E> {
    idle: Duration,
    state: Mutex<State<K, T, E>>,
}

struct State<K, T, E> {
    entries: HashMap<K, Entry<T, E>>,
    /// A task closes idle tunnels while there are any.
    reaping: bool,
}

struct Entry<T, E> {
    tunnels: Vec<Kept<T>>,
    dials: Vec<Dial<E>>,
    /// No dial only for more room before this.
    spread_after: Option<Instant>,
}

impl<T, E> Default for Entry<T, E> {
    fn default() -> Self {
        Entry { tunnels: Vec::new(), dials: Vec::new(), spread_after: None }
    }
}

struct Kept<T> {
    tunnel: Tunnel,
    about: T,
    /// When it was last seen in use.
    used: Instant,
}

/// A dial that is under way.
struct Dial<E> {
    done: watch::Receiver<Option<Result<(), Arc<E>>>>,
    waiters: usize,
}

/// Tells those who wait how a dial has ended.
type Done<E> = watch::Sender<Option<Result<(), Arc<E>>>>;

/// What a caller does.
enum Next<T, E> {
    Take(Place<T>),
    /// Takes the place, and dials another tunnel for those who come after.
    Spread(Place<T>, Done<E>),
    Wait(watch::Receiver<Option<Result<(), Arc<E>>>>),
    Dial(Done<E>),
}

impl<K, T, E> Pool<K, T, E>
where
    K: Hash + Eq + Clone + Send + 'static,
    T: Clone + Send + 'static,
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
    pub async fn get<D, F>(&self, key: &K, dial: D) -> Result<Place<T>, PoolError<E>>
    where
        D: FnOnce() -> F,
        F: Future<Output = Result<(Tunnel, T), E>> + Send + 'static,
    {
        loop {
            let next = self.inner.next(key);
            match next {
                Next::Take(place) => return Ok(place),
                Next::Spread(place, done) => {
                    drop(self.start(key.clone(), dial(), done));
                    return Ok(place);
                }
                Next::Wait(mut done) => {
                    // An error means that the dial was dropped: look again.
                    if let Ok(done) = done.wait_for(Option::is_some).await
                        && let Some(Err(error)) = &*done
                    {
                        return Err(PoolError::Dial(Arc::clone(error)));
                    }
                }
                Next::Dial(done) => {
                    let place = self.start(key.clone(), dial(), done);
                    return place.await.unwrap_or(Err(PoolError::Unusable));
                }
            }
        }
    }

    /// Dials in a task of its own. The place is for the caller; it may be given up.
    fn start(
        &self,
        key: K,
        dial: impl Future<Output = Result<(Tunnel, T), E>> + Send + 'static,
        done: Done<E>,
    ) -> oneshot::Receiver<Result<Place<T>, PoolError<E>>> {
        let (give, place) = oneshot::channel();
        let inner = Arc::clone(&self.inner);
        tokio::spawn(async move {
            let result = dial.await.map_err(Arc::new);
            // The caller that dialled is served first: the others may fill the tunnel.
            let first = match &result {
                Ok((tunnel, about)) => {
                    let slot = tunnel.reserve().ok_or(PoolError::Unusable);
                    slot.map(|slot| Place { slot, about: about.clone() })
                }
                Err(error) => Err(PoolError::Dial(Arc::clone(error))),
            };
            let _ = give.send(first);
            let published = inner.dialled(key, &done, result);
            let _ = done.send(Some(published));
        });
        place
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

impl<K, T, E> Inner<K, T, E>
where
    K: Hash + Eq + Clone + Send + 'static,
    T: Clone + Send + 'static,
    E: Send + Sync + 'static,
{
    fn lock(&self) -> MutexGuard<'_, State<K, T, E>> {
        // No code that can panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self, key: &K) -> Next<T, E> {
        let mut state = self.lock();
        let entry = match state.entries.get_mut(key) {
            Some(entry) => entry,
            None => state.entries.entry(key.clone()).or_default(),
        };
        if let Some((place, bulk)) = entry.take() {
            return if bulk > 0 && entry.may_spread() {
                Next::Spread(place, entry.begin_dial(0))
            } else {
                Next::Take(place)
            };
        }
        entry.tunnels.retain(|kept| kept.tunnel.is_usable());
        // A dial whose task was dropped has a closed channel.
        entry.dials.retain(|dial| dial.done.has_changed().is_ok());
        if let Some(dial) = entry.dials.iter_mut().find(|dial| dial.waiters < WAITERS_PER_DIAL) {
            dial.waiters += 1;
            return Next::Wait(dial.done.clone());
        }
        Next::Dial(entry.begin_dial(1))
    }

    /// Puts a dialled tunnel into the pool and ends the dial.
    fn dialled(self: &Arc<Self>, key: K, done: &Done<E>, result: Result<(Tunnel, T), Arc<E>>) -> Result<(), Arc<E>> {
        let mut state = self.lock();
        if let Some(entry) = state.entries.get_mut(&key) {
            entry.dials.retain(|dial| !dial.done.same_channel(&done.subscribe()));
            if result.is_err() {
                entry.spread_after = Some(Instant::now() + SPREAD_PAUSE);
            }
            if result.is_err() && entry.tunnels.is_empty() && entry.dials.is_empty() {
                state.entries.remove(&key);
            }
        }
        let (tunnel, about) = result?;
        let kept = Kept { tunnel, about, used: Instant::now() };
        state.entries.entry(key).or_default().tunnels.push(kept);
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
            let mut last = true;
            let (keep, drop): (Vec<_>, Vec<_>) = std::mem::take(&mut entry.tunnels).into_iter().partition(|kept| {
                let bound = if last { self.idle } else { self.idle / SPARE_SHARE };
                let idle = kept.tunnel.streams() == 0 && now.duration_since(kept.used) >= bound;
                let keep = !idle && kept.tunnel.is_usable();
                last &= !keep;
                keep
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

impl<T: Clone, E> Entry<T, E> {
    /// A place on the tunnel with the fewest bulk streams, and how many those are; of equals the oldest, so that small
    /// messages share one and the others become idle.
    fn take(&mut self) -> Option<(Place<T>, usize)> {
        // Nearly always the first has room and carries none.
        let quiet = self.tunnels.first_mut().filter(|kept| kept.tunnel.bulk_streams() == 0);
        if let Some(kept) = quiet
            && let Some(slot) = kept.tunnel.reserve()
        {
            kept.used = Instant::now();
            return Some((Place { slot, about: kept.about.clone() }, 0));
        }
        let mut order: Vec<_> = self.tunnels.iter_mut().collect();
        order.sort_by_key(|kept| kept.tunnel.bulk_streams());
        order.into_iter().find_map(|kept| {
            let bulk = kept.tunnel.bulk_streams();
            let slot = kept.tunnel.reserve()?;
            kept.used = Instant::now();
            Some((Place { slot, about: kept.about.clone() }, bulk))
        })
    }

    /// Whether another tunnel is to be dialled although there is room.
    fn may_spread(&self) -> bool {
        self.tunnels.len() < MAX_SPREAD
            && self.dials.is_empty()
            && self.spread_after.is_none_or(|after| Instant::now() >= after)
    }

    fn begin_dial(&mut self, waiters: usize) -> Done<E> {
        let (done, receiver) = watch::channel(None);
        self.dials.push(Dial { done: receiver, waiters });
        done
    }
}

/// The reaping task's hold on the pool. If the task is dropped, the next tunnel starts another one.
struct Reaper<K, T, E>(Option<Weak<Inner<K, T, E>>>);

impl<K, T, E> Drop for Reaper<K, T, E> {
    fn drop(&mut self) {
        if let Some(inner) = self.0.as_ref().and_then(Weak::upgrade) {
            inner.state.lock().unwrap_or_else(PoisonError::into_inner).reaping = false;
        }
    }
}

async fn reap<K, T, E>(mut reaper: Reaper<K, T, E>, idle: Duration)
where
    K: Hash + Eq + Clone + Send + 'static,
    T: Clone + Send + 'static,
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

impl<K, T, E> Clone for Pool<K, T, E> {
    fn clone(&self) -> Self {
        Pool { inner: Arc::clone(&self.inner) }
    }
}

impl<K, T, E> fmt::Debug for Pool<K, T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("idle", &self.inner.idle).finish_non_exhaustive()
    }
}
