//! How many queries a pod may send.

use std::time::Duration;

use tokio::time::Instant;

/// Queries that a pod may send per second for long.
const RATE: f64 = 1000.0;

/// Queries that it may send at once after a pause.
const BURST: f64 = 2000.0;

/// A token bucket of one pod.
#[derive(Debug)]
pub struct Bucket {
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    /// A full one.
    pub fn new(now: Instant) -> Self {
        Self { tokens: BURST, filled: now }
    }

    /// Whether one more query is within bounds.
    pub fn take(&mut self, now: Instant) -> bool {
        let passed: Duration = now.saturating_duration_since(self.filled);
        self.tokens = (self.tokens + passed.as_secs_f64() * RATE).min(BURST);
        self.filled = now;
        let has = self.tokens >= 1.0;
        if has {
            self.tokens -= 1.0;
        }
        has
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_the_rate() {
        let begin = Instant::now();
        let mut bucket = Bucket::new(begin);
        let taken = |bucket: &mut Bucket, at| (0..5000).filter(|_| bucket.take(begin + at)).count();
        assert_eq!(taken(&mut bucket, Duration::ZERO), 2000);
        assert_eq!(taken(&mut bucket, Duration::from_millis(500)), 500);
        assert_eq!(taken(&mut bucket, Duration::from_secs(60)), 2000);
        assert_eq!(taken(&mut bucket, Duration::from_secs(59)), 0, "a clock that stands still");
    }
}
