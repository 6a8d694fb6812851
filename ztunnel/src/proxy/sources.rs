//! What each address may take of a pod's tunnels in one thread, so that one peer cannot take what all peers share.
//!
//! A peer's proxy opens a few tunnels from the address of each of its pods, a gateway some more. Somebody who opens
//! connections and says nothing, or begins handshakes and does not go on, gets as far as these limits.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Connections from one address whose handshake is not done; more are closed.
pub const BEGUN: usize = 64;

/// Handshakes of one address that run at a time; more of them wait.
pub const HANDSHAKES: usize = 16;

/// Tunnels from one address, those that are not established included; more are closed.
pub const TUNNELS: usize = 256;

/// The addresses that have connections to one listening socket of one thread.
#[derive(Clone, Debug, Default)]
pub struct Sources(Arc<Mutex<HashMap<IpAddr, Entry>>>);

#[derive(Debug)]
struct Entry {
    tunnels: usize,
    begun: usize,
    handshakes: Arc<Semaphore>,
}

impl Sources {
    /// A new connection from `address`; None if it has as many as it may.
    pub fn enter(&self, address: IpAddr) -> Option<Source> {
        let mut entries = self.entries();
        let entry = entries.entry(address).or_insert_with(|| Entry {
            tunnels: 0,
            begun: 0,
            handshakes: Arc::new(Semaphore::new(HANDSHAKES)),
        });
        if entry.begun >= BEGUN || entry.tunnels >= TUNNELS {
            return None;
        }
        entry.begun += 1;
        entry.tunnels += 1;
        let handshakes = Arc::clone(&entry.handshakes);
        Some(Source { sources: self.clone(), address, handshakes, begun: true })
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<IpAddr, Entry>> {
        // Counting leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection, counted until it is dropped.
#[derive(Debug)]
pub struct Source {
    sources: Sources,
    address: IpAddr,
    handshakes: Arc<Semaphore>,
    /// Whether its handshake is not done.
    begun: bool,
}

impl Source {
    /// Waits until this address may run another handshake. None: never, the semaphore is not closed.
    pub async fn handshake(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.handshakes).acquire_owned().await.ok()
    }

    /// The handshake is done: the connection counts as a tunnel alone.
    pub fn established(&mut self) {
        if std::mem::take(&mut self.begun)
            && let Some(entry) = self.sources.entries().get_mut(&self.address)
        {
            entry.begun -= 1;
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.established();
        let mut entries = self.sources.entries();
        if let Some(entry) = entries.get_mut(&self.address) {
            entry.tunnels -= 1;
            if entry.tunnels == 0 {
                entries.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const ONE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
    const OTHER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));

    #[test]
    fn an_address_has_its_own_limit_and_leaves_nothing_behind() {
        let sources = Sources::default();
        let mut begun: Vec<Source> = (0..BEGUN).map(|_| sources.enter(ONE).unwrap()).collect();
        assert!(sources.enter(ONE).is_none());
        let other = sources.enter(OTHER).unwrap();
        begun.pop();
        begun.push(sources.enter(ONE).expect("one has ended"));
        for source in &mut begun {
            source.established();
            source.established();
        }
        let mut tunnels = begun;
        while let Some(mut source) = sources.enter(ONE) {
            source.established();
            tunnels.push(source);
        }
        assert_eq!(tunnels.len(), TUNNELS);
        drop((tunnels, other));
        assert!(sources.entries().is_empty());
    }

    #[tokio::test]
    async fn handshakes_of_one_address_wait_for_each_other_alone() {
        let sources = Sources::default();
        let all: Vec<Source> = (0..=HANDSHAKES).map(|_| sources.enter(ONE).unwrap()).collect();
        let mut running = Vec::new();
        for source in all.iter().take(HANDSHAKES) {
            running.push(source.handshake().await.unwrap());
        }
        let next = is_pending(all[HANDSHAKES].handshake());
        assert!(next, "one more waits");
        assert!(sources.enter(OTHER).unwrap().handshake().await.is_some());
        running.pop();
        assert!(all[HANDSHAKES].handshake().await.is_some());
    }

    /// Whether a future is not ready at once.
    fn is_pending(future: impl Future) -> bool {
        let future = std::pin::pin!(future);
        future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop())).is_pending()
    }
}
