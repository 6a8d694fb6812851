//! Whether a thread is shared by a pod that takes little and others that keep it busy.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What was used is counted for so long, then anew.
const WINDOW: Duration = Duration::from_millis(4);

/// A thread is busy that works for so many of [`PARTS`] of a window.
const BUSY: u64 = 5;
/// A pod takes little that has used less than one of so many parts of a window.
const PARTS: u64 = 8;

/// Windows without a pod that takes little, after which the thread is not shared any more.
const LONG: u64 = 4;

/// What is used of one thread. Only the thread itself writes it.
#[derive(Debug)]
pub(super) struct Load {
    since: Instant,
    used: Used,
    /// The window in which a pod that takes little was seen last on the busy thread.
    seen: AtomicU64,
    shared: AtomicBool,
}

/// What is used in this window, and was in the one before: of a thread, or of a thread by one pod, in nanoseconds.
#[derive(Debug, Default)]
pub(super) struct Used {
    window: AtomicU64,
    now: AtomicU64,
    before: AtomicU64,
}

impl Default for Load {
    fn default() -> Self {
        let (used, seen, shared) = Default::default();
        Self { since: Instant::now(), used, seen, shared }
    }
}

impl Load {
    /// Whether it is shared by a pod that takes little and others that keep it busy.
    pub(super) fn is_shared(&self) -> bool {
        self.shared.load(Ordering::Relaxed)
    }

    /// A task of the pod that uses `pod` ran for `used` nanoseconds, until `now`. Whether the thread is shared, if that
    /// has changed.
    pub(super) fn note(&self, pod: &Used, now: Instant, used: u64) -> Option<bool> {
        let window = WINDOW.as_nanos() as u64;
        // The first is 1, so that 0 is long ago.
        let at = u64::try_from((now - self.since).as_nanos()).unwrap_or(u64::MAX) / window + LONG + 1;
        let all = self.used.add(at, used);
        let own = pod.add(at, used);
        if all >= window / PARTS * BUSY && own < window / PARTS {
            self.seen.store(at, Ordering::Relaxed);
        }
        let shared = at - self.seen.load(Ordering::Relaxed) <= LONG;
        (self.shared.swap(shared, Ordering::Relaxed) != shared).then_some(shared)
    }
}

impl Used {
    /// Adds to the window `at`. What was used in this window or in the one before, whichever is more.
    fn add(&self, at: u64, used: u64) -> u64 {
        let window = self.window.swap(at, Ordering::Relaxed);
        if window != at {
            let last = if at - window == 1 { self.now.load(Ordering::Relaxed) } else { 0 };
            self.before.store(last, Ordering::Relaxed);
            self.now.store(0, Ordering::Relaxed);
        }
        let now = self.now.load(Ordering::Relaxed).saturating_add(used);
        self.now.store(now, Ordering::Relaxed);
        now.max(self.before.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Time passes as it is told; each of the pods runs for so many microseconds of each millisecond.
    fn run(load: &Load, from: u64, pods: &[(&Used, u64)], millis: u64) -> u64 {
        for at in from..from + millis {
            for (pod, micros) in pods {
                load.note(pod, load.since + Duration::from_millis(at), micros * 1000);
            }
        }
        from + millis
    }

    #[test]
    fn thread_is_shared_while_a_pod_that_takes_little_is_on_a_busy_one() {
        let load = Load::default();
        let [flood, other, quiet] = [(); 3].map(|()| Used::default());
        let at = run(&load, 0, &[(&flood, 900)], 100);
        assert!(!load.is_shared(), "alone");
        let at = run(&load, at, &[(&flood, 900), (&quiet, 20)], 12);
        assert!(load.is_shared());
        let at = run(&load, at, &[(&flood, 900)], 8);
        assert!(load.is_shared(), "there was one just now");
        let at = run(&load, at, &[(&flood, 900)], 20);
        assert!(!load.is_shared());
        let at = run(&load, at, &[(&flood, 450), (&other, 450)], 100);
        assert!(!load.is_shared(), "both take much");
        let at = run(&load, at, &[(&flood, 200), (&quiet, 20)], 100);
        assert!(!load.is_shared(), "there is time for everybody");
        run(&load, at, &[(&flood, 450), (&other, 450), (&quiet, 20)], 12);
        assert!(load.is_shared());
    }
}
