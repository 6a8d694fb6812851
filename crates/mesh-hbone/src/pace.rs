//! How much one poll may move on this thread. Whoever waits for its turn waits for polls that nobody interrupts; short ones cost a
//! little throughput, so they are short only while somebody waits.

use std::cell::Cell;

thread_local! {
    static SHORT: Cell<bool> = const { Cell::new(false) };
}

/// Bytes that one poll moves at most while polls are short: with TLS some 20 microseconds.
const LITTLE: usize = 32 << 10;

/// From now on the polls of this thread's connections are short, or not any more.
pub fn set_short(short: bool) {
    SHORT.set(short);
}

/// At most `usual` bytes for one poll.
pub(crate) fn limit(usual: usize) -> usize {
    if SHORT.get() { usual.min(LITTLE) } else { usual }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_polls_are_those_of_the_thread_that_says_so() {
        set_short(true);
        assert_eq!((limit(128 << 10), limit(100)), (LITTLE, 100));
        assert_eq!(std::thread::spawn(|| limit(128 << 10)).join().unwrap(), 128 << 10);
        set_short(false);
        assert_eq!(limit(128 << 10), 128 << 10);
    }
}
