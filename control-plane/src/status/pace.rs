//! How fast is written: a token bucket. The API server is everybody's.

use std::time::Duration;

use tokio::time::Instant;

/// Writes at most `burst` at once, and then one in each `interval`.
#[derive(Debug)]
pub(super) struct Pace {
    interval: Duration,
    burst: u32,
    /// When the bucket would be full again.
    full_at: Instant,
}

impl Pace {
    /// A full bucket.
    pub(super) fn new(interval: Duration, burst: u32, now: Instant) -> Self {
        Self { interval, burst, full_at: now }
    }

    /// Takes a token; returns when it may be used.
    pub(super) fn take(&mut self, now: Instant) -> Instant {
        self.full_at = self.full_at.max(now) + self.interval;
        (self.full_at - self.interval * self.burst).max(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_free_and_then_it_is_paced() {
        let (begun, interval) = (Instant::now() + Duration::from_secs(100), Duration::from_secs(1));
        let mut pace = Pace::new(interval, 3, begun);
        let taken: Vec<_> = (0..6).map(|_| (pace.take(begun) - begun).as_secs()).collect();
        assert_eq!(taken, [0, 0, 0, 1, 2, 3]);
        // After a pause the burst is there again, and not more than that.
        let later = begun + Duration::from_secs(1000);
        let taken: Vec<_> = (0..5).map(|_| (pace.take(later) - later).as_secs()).collect();
        assert_eq!(taken, [0, 0, 0, 1, 2]);
    }
}
