//! How often one caller may ask.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::token::Caller;

/// Most callers that are remembered at one time; those that have been quiet are forgotten first.
const MAX_CALLERS: usize = 16 * 1024;

/// A bucket per caller (generic cell rate algorithm): `burst` requests at once, then one per `interval`.
#[derive(Debug)]
pub(super) struct Limiter {
    interval: Duration,
    burst: u32,
    /// When each caller's bucket will be full again.
    callers: Mutex<HashMap<String, Instant>>,
}

impl Limiter {
    pub(super) fn new(interval: Duration, burst: u32) -> Self {
        Self { interval, burst, callers: Mutex::default() }
    }

    /// Counts one request of `caller`; false if it is one too many.
    pub(super) fn admit(&self, caller: &Caller, now: Instant) -> bool {
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if callers.len() >= MAX_CALLERS {
            callers.retain(|_, full| *full > now);
            if callers.len() >= MAX_CALLERS {
                return false;
            }
        }
        let full = callers.entry(caller.to_string()).or_insert(now);
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

    fn caller(name: &str) -> Caller {
        Caller { namespace: "a".to_owned(), service_account: name.to_owned(), pod: None, node: None }
    }

    #[test]
    fn a_burst_then_one_per_interval_for_each_caller() {
        let limiter = Limiter::new(Duration::from_secs(1), 3);
        let now = Instant::now();
        let admitted = (0..5).filter(|_| limiter.admit(&caller("b"), now)).count();
        assert_eq!(admitted, 3);
        assert!(limiter.admit(&caller("c"), now));
        assert!(!limiter.admit(&caller("b"), now + Duration::from_millis(999)));
        assert!(limiter.admit(&caller("b"), now + Duration::from_secs(1)));
        assert!(!limiter.admit(&caller("b"), now + Duration::from_secs(1)));
    }
}
