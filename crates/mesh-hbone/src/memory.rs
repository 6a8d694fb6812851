//! What is held for receivers that do not take it: an account over the process, and in it one for each share (a pod's, in
//! the proxy), so that whoever makes the process hold more than fits can be told from the others.
//!
//! The account is changed where something begins or ceases to wait, not where bytes flow: a copy and a tunnel each note what
//! they hold when their turn is over, and a turn that leaves nothing behind touches only their own note.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use tokio::sync::Notify;

/// How much may be held, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// By all shares together.
    pub total: usize,
    /// By one share before it is served sparingly.
    pub soft: usize,
    /// By one share before some of what it holds is given up.
    pub hard: usize,
}

impl Limits {
    /// For `total` bytes in all: half of them for one share, which is served sparingly from half of that on.
    pub const fn of(total: usize) -> Self {
        Limits { total, soft: total / 4, hard: total / 2 }
    }
}

/// How a share is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pressure {
    /// As fast as it goes.
    Low,
    /// With as little memory as goes.
    High,
}

impl Pressure {
    /// Of a share that holds this much, where all hold so much together. One that was high stays so until half of what made
    /// it so is gone. Where much is held in all, a quarter of the soft limit is enough.
    pub const fn next(self, share: usize, total: usize, limits: &Limits) -> Self {
        let soft = if total > limits.total / 2 { limits.soft / 4 } else { limits.soft };
        let begins_at = match self {
            Pressure::Low => soft,
            Pressure::High => soft / 2,
        };
        if share > begins_at { Pressure::High } else { Pressure::Low }
    }
}

/// Whether something must be given up.
const fn is_exceeded(share: usize, total: usize, limits: &Limits) -> bool {
    share > limits.hard || total > limits.total
}

/// The account over the process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Memory(Arc<Total>);

#[derive(Debug)]
struct Total {
    limits: Limits,
    held: AtomicUsize,
    /// Whether `alarm` was given and not heard yet.
    told: AtomicBool,
    alarm: Notify,
}

impl Memory {
    /// Nothing is held yet.
    pub fn new(limits: Limits) -> Self {
        let (held, told, alarm) = Default::default();
        Memory(Arc::new(Total { limits, held, told, alarm }))
    }

    /// A share of it, which holds nothing yet.
    pub fn share(&self) -> Share {
        Share(Arc::new(Owned { held: AtomicUsize::new(0), total: Arc::clone(&self.0) }))
    }

    /// How much may be held.
    pub fn limits(&self) -> &Limits {
        &self.0.limits
    }

    /// Bytes that are held, by all shares.
    pub fn held(&self) -> usize {
        self.0.held.load(Ordering::Relaxed)
    }

    /// Resolves when a share holds more than its limit, or all together do. For one task.
    pub async fn exceeded(&self) {
        self.0.alarm.notified().await;
        self.0.told.store(false, Ordering::Relaxed);
    }
}

/// One share's account. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Share(Arc<Owned>);

#[derive(Debug)]
struct Owned {
    held: AtomicUsize,
    total: Arc<Total>,
}

impl Share {
    /// Bytes that it holds.
    pub fn held(&self) -> usize {
        self.0.held.load(Ordering::Relaxed)
    }

    /// How it is served, where it was served like `before`.
    pub fn pressure(&self, before: Pressure) -> Pressure {
        let total = &self.0.total;
        before.next(self.held(), total.held.load(Ordering::Relaxed), &total.limits)
    }

    /// Whether both are the same account.
    pub fn is(&self, other: &Share) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn change(&self, before: usize, after: usize) {
        let Owned { held, total } = &*self.0;
        if after <= before {
            held.fetch_sub(before - after, Ordering::Relaxed);
            total.held.fetch_sub(before - after, Ordering::Relaxed);
            return;
        }
        let more = after - before;
        let share = held.fetch_add(more, Ordering::Relaxed) + more;
        let all = total.held.fetch_add(more, Ordering::Relaxed) + more;
        if is_exceeded(share, all, &total.limits)
            && !total.told.load(Ordering::Relaxed)
            && !total.told.swap(true, Ordering::Relaxed)
        {
            total.alarm.notify_one();
        }
    }
}

/// What one copy or one tunnel holds, noted in a share; given back when it is dropped. Without a share it is noted here alone.
#[derive(Debug, Default)]
pub struct Hold {
    share: Option<Share>,
    bytes: AtomicUsize,
    /// Milliseconds of this process, see [`now`], at which something of it went on last; 0 while nothing is held.
    since: AtomicU64,
}

impl Hold {
    /// Nothing is held yet.
    pub fn of(share: Share) -> Self {
        Hold { share: Some(share), bytes: AtomicUsize::new(0), since: AtomicU64::new(0) }
    }

    /// The share that it is noted in.
    pub fn share(&self) -> Option<&Share> {
        self.share.as_ref()
    }

    /// Bytes that are held.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// When what is held began to wait, or some of it was taken last, in milliseconds of this process. To be compared only.
    pub fn since(&self) -> u64 {
        self.since.load(Ordering::Relaxed)
    }

    /// How its share is served, where it was served like `before`.
    pub(crate) fn pressure(&self, before: Pressure) -> Pressure {
        self.share.as_ref().map_or(Pressure::Low, |share| share.pressure(before))
    }

    /// Notes what is held now, and whether some of it was taken since the last time.
    pub(crate) fn note(&self, bytes: usize, went_on: bool) {
        let before = self.bytes.load(Ordering::Relaxed);
        // Nearly always: nothing waited, and nothing waits.
        if before == 0 && bytes == 0 {
            return;
        }
        if bytes == 0 {
            self.since.store(0, Ordering::Relaxed);
        } else if went_on || before == 0 {
            self.since.store(now(), Ordering::Relaxed);
        }
        if before == bytes {
            return;
        }
        let before = self.bytes.swap(bytes, Ordering::Relaxed);
        if let Some(share) = &self.share {
            share.change(before, bytes);
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.note(0, false);
    }
}

/// Milliseconds since this was asked for the first time, and one.
fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let passed = START.get_or_init(Instant::now).elapsed();
    u64::try_from(passed.as_millis()).unwrap_or(u64::MAX - 1) + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits::of(800);

    #[test]
    fn a_share_is_served_sparingly_from_its_soft_limit_on_and_until_it_has_eased() {
        let cases = [
            (Pressure::Low, 200, 200, Pressure::Low),
            (Pressure::Low, 201, 201, Pressure::High),
            (Pressure::High, 101, 101, Pressure::High),
            (Pressure::High, 100, 100, Pressure::Low),
            // Others hold much.
            (Pressure::Low, 50, 401, Pressure::Low),
            (Pressure::Low, 51, 401, Pressure::High),
            (Pressure::Low, 51, 400, Pressure::Low),
            (Pressure::High, 25, 401, Pressure::Low),
        ];
        for (before, share, total, expected) in cases {
            assert_eq!(before.next(share, total, &LIMITS), expected, "{before:?} {share} {total}");
        }
    }

    #[test]
    fn what_is_held_is_given_back() {
        let memory = Memory::new(LIMITS);
        let (one, other) = (memory.share(), memory.share());
        let (first, second, third) = (Hold::of(one.clone()), Hold::of(one.clone()), Hold::of(other.clone()));
        for (hold, bytes) in [(&first, 10), (&second, 5), (&third, 7), (&first, 3), (&second, 6)] {
            hold.note(bytes, false);
        }
        assert_eq!((one.held(), other.held(), memory.held()), (9, 7, 16));
        drop((first, second));
        assert_eq!((one.held(), other.held(), memory.held()), (0, 7, 7));
        assert!(one.is(&one.clone()) && !one.is(&other));
    }

    #[test]
    fn the_time_is_that_of_the_last_that_went_on() {
        let hold = Hold::default();
        assert_eq!(hold.since(), 0);
        hold.note(5, false);
        let begun = hold.since();
        assert!(begun > 0);
        std::thread::sleep(std::time::Duration::from_millis(3));
        hold.note(6, false);
        assert_eq!(hold.since(), begun, "more came, and nothing was taken");
        hold.note(6, true);
        assert!(hold.since() > begun);
        hold.note(0, true);
        assert_eq!(hold.since(), 0);
    }

    #[tokio::test]
    async fn what_is_too_much_is_told_once() {
        let is_told = |memory: &Memory| {
            let exceeded = std::pin::pin!(memory.exceeded());
            exceeded.poll(&mut std::task::Context::from_waker(std::task::Waker::noop())).is_ready()
        };
        let memory = Memory::new(LIMITS);
        let (one, other) = (Hold::of(memory.share()), Hold::of(memory.share()));
        one.note(400, false);
        other.note(400, false);
        assert!(!is_told(&memory));
        one.note(401, false);
        one.note(402, false);
        assert!(is_told(&memory), "the share has too much, and all together");
        assert!(!is_told(&memory));
        one.note(300, false);
        assert!(!is_told(&memory));
        other.note(401, false);
        assert!(is_told(&memory), "the other share");
    }
}
