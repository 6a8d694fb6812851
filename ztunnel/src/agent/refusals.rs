//! Pods that a proxy does not serve although it was told to: why, and when to tell it again.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

/// Wait before the first repetition; it doubles.
const FIRST: Duration = Duration::from_secs(1);
/// Longest wait.
const LONGEST: Duration = Duration::from_secs(60);

/// Refusals by proxy and UID of the pod.
#[derive(Debug, Default)]
pub struct Refusals(HashMap<(u64, String), Refusal>);

#[derive(Debug)]
struct Refusal {
    error: String,
    wait: Duration,
    next: Instant,
}

impl Refusals {
    /// A proxy answered: an empty error says that it serves the pod.
    pub fn note(&mut self, proxy: u64, uid: String, error: String, now: Instant) {
        let key = (proxy, uid);
        if error.is_empty() {
            self.0.remove(&key);
            return;
        }
        let wait = self.0.get(&key).map_or(FIRST, |refusal| (refusal.wait * 2).min(LONGEST));
        self.0.insert(key, Refusal { error, wait, next: now + wait });
    }

    /// Whom to tell again of which pod. Each is due again only later, whether an answer comes or not.
    pub fn due(&mut self, now: Instant) -> Vec<(u64, String)> {
        let due = self.0.iter_mut().filter(|(_, refusal)| refusal.next <= now);
        due.map(|(key, refusal)| {
            refusal.next = now + LONGEST;
            key.clone()
        })
        .collect()
    }

    /// Why a pod is not served: by the proxy that connected last, of those given.
    pub fn reason(&self, proxies: impl Iterator<Item = u64>, uid: &str) -> Option<&str> {
        let refusal = self.0.get(&(proxies.max()?, uid.to_owned()))?;
        Some(&refusal.error)
    }

    /// A pod is gone.
    pub fn forget_pod(&mut self, uid: &str) {
        self.0.retain(|(_, pod), _| pod != uid);
    }

    /// A proxy is gone.
    pub fn forget_proxy(&mut self, id: u64) {
        self.0.retain(|(proxy, _), _| *proxy != id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_pod_is_told_again_after_growing_waits() {
        let mut refusals = Refusals::default();
        let mut now = Instant::now();
        let mut waits = Vec::new();
        for _ in 0..8 {
            refusals.note(1, "a".into(), "full".into(), now);
            let told = now;
            while refusals.due(now).is_empty() {
                now += Duration::from_secs(1);
            }
            waits.push((now - told).as_secs());
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        refusals.note(1, "a".into(), String::new(), now);
        assert_eq!(refusals.due(now + LONGEST * 2), []);
    }

    #[test]
    fn reason_is_that_of_the_latest_proxy() {
        let mut refusals = Refusals::default();
        refusals.note(1, "a".into(), "draining".into(), Instant::now());
        assert_eq!(refusals.reason([1].into_iter(), "a"), Some("draining"));
        assert_eq!(refusals.reason([2, 1].into_iter(), "a"), None);
        refusals.forget_proxy(1);
        assert_eq!(refusals.reason([1].into_iter(), "a"), None);
    }
}
