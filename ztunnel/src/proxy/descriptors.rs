//! How many descriptors the process may have open, and how the pods of the node share them.
//!
//! A pod may have as many sockets as are free: one that takes all it can get has half of them in the end, and leaves the other
//! half; two leave a third, and so on. So there is always something left for a pod that has few, and nobody is given a share
//! that lies idle.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Most that are kept free for what is not counted here, between two looks at how many there are: twice what one message of the
/// agent brings, discovery, pages about the process.
const MAX_RESERVE: usize = 1024;

/// The process's descriptors. Counted are those of the pods' connections; of all others it is told how many there are.
#[derive(Debug)]
pub struct Descriptors {
    limit: usize,
    used: AtomicUsize,
    others: AtomicUsize,
}

impl Descriptors {
    /// Of a process that may have `limit` of them (`RLIMIT_NOFILE`).
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicUsize::new(0), others: AtomicUsize::new(0) })
    }

    /// How many the process may have.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Takes note of how many the process has open, whatever for.
    pub fn saw(&self, open: usize) {
        self.others.store(open.saturating_sub(self.used.load(Ordering::Relaxed)), Ordering::Relaxed);
    }

    /// Counts one more of a pod that has `own`. False: it may have none, as no more than that are free.
    #[must_use]
    pub fn take(&self, own: usize) -> bool {
        let reserve = (self.limit / 8).min(MAX_RESERVE);
        let room = self.limit.saturating_sub(reserve).saturating_sub(self.others.load(Ordering::Relaxed));
        let more = |used: usize| (own < room.saturating_sub(used)).then_some(used + 1);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// One that was taken is closed.
    pub fn give_back(&self) {
        self.used.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes for a pod that has `own` until it gets no more; what it has then.
    fn fill(descriptors: &Descriptors, mut own: usize) -> usize {
        while descriptors.take(own) {
            own += 1;
        }
        own
    }

    #[test]
    fn who_takes_all_leaves_as_much_to_each_other() {
        let descriptors = Descriptors::new(8000);
        // A reserve of 1000.
        let greedy = fill(&descriptors, 0);
        assert_eq!(greedy, 3500);
        let second = fill(&descriptors, 0);
        assert_eq!(second, 1750);
        assert!(!descriptors.take(greedy), "it has more than is free");
        assert!(descriptors.take(0), "one that has none gets some");
    }

    #[test]
    fn what_is_open_otherwise_is_not_given_out_and_what_is_closed_is_again() {
        let descriptors = Descriptors::new(80_000);
        descriptors.saw(80_000 - MAX_RESERVE - 10);
        assert_eq!(fill(&descriptors, 0), 5);
        // The same others, and the five.
        descriptors.saw(80_000 - MAX_RESERVE - 5);
        assert!(!descriptors.take(5));
        descriptors.give_back();
        assert!(descriptors.take(4));
        descriptors.saw(100_000);
        assert!(!descriptors.take(0), "there is nothing, and less than nothing");
        descriptors.saw(5);
        assert!(descriptors.take(5));
    }
}
