//! Clients that try one thing and say what they saw.

pub mod connect;
pub mod dial;
pub mod half_close;
pub mod hold;
pub mod parallel;
pub mod raw;
pub mod restless;
pub mod scan;
pub mod spread;

use std::time::Duration;

/// A bound from milliseconds of the command line.
fn bound(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// Milliseconds for the report.
fn millis(elapsed: Duration) -> f64 {
    elapsed.as_secs_f64() * 1000.0
}
