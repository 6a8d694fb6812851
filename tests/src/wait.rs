//! Waiting for a condition, with a bound.

use std::time::{Duration, Instant};

use crate::Error;

/// How long a part of the mesh may take to become ready.
pub const READY: Duration = Duration::from_secs(30);

/// Polls `condition` until it gives a value.
///
/// # Errors
/// [`Error::Timeout`] with `what` after `bound`.
pub fn until<T>(what: &str, bound: Duration, mut condition: impl FnMut() -> Option<T>) -> Result<T, Error> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(value) = condition() {
            return Ok(value);
        }
        if start.elapsed() >= bound {
            return Err(Error::Timeout { what: what.to_owned(), waited: bound, log: String::new() });
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// As [`until`], for a condition that can fail for good.
///
/// # Errors
/// The condition's error, or [`Error::Timeout`].
pub fn try_until<T>(
    what: &str,
    bound: Duration,
    mut condition: impl FnMut() -> Result<Option<T>, Error>,
) -> Result<T, Error> {
    until(what, bound, || condition().transpose())?
}
