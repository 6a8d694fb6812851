//! How often one caller, or one address, may ask.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Most who are remembered at one time; those that have been quiet are forgotten first.
const MAX_KEYS: usize = 16 * 1024;

/// A bucket per key, which is who asks (generic cell rate algorithm): `burst` requests at once, then one per `interval`.
#[derive(Debug)]
pub(super) struct Limiter<K> {
    interval: Duration,
    burst: u32,
    /// When each bucket will be full again.
    full: Mutex<HashMap<K, Instant>>,
}

impl<K: Eq + Hash> Limiter<K> {
    pub(super) fn new(interval: Duration, burst: u32) -> Self {
        Self { interval, burst, full: Mutex::default() }
    }

    /// Counts one request of `key`; false if it is one too many.
    pub(super) fn admit(&self, key: K, now: Instant) -> bool {
        let mut buckets = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= MAX_KEYS {
            buckets.retain(|_, full| *full > now);
            if buckets.len() >= MAX_KEYS && !buckets.contains_key(&key) {
                return false;
            }
        }
        let full = buckets.entry(key).or_insert(now);
        let next = (*full).max(now) + self.interval;
        if next.duration_since(now) > self.interval * self.burst {
            return false;
        }
        *full = next;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_one_per_interval_for_each_key() {
        let limiter = Limiter::new(Duration::from_secs(1), 3);
        let now = Instant::now();
        let admitted = (0..5).filter(|_| limiter.admit("b", now)).count();
        assert_eq!(admitted, 3);
        assert!(limiter.admit("c", now));
        assert!(!limiter.admit("b", now + Duration::from_millis(999)));
        assert!(limiter.admit("b", now + Duration::from_secs(1)));
        assert!(!limiter.admit("b", now + Duration::from_secs(1)));
    }
}
