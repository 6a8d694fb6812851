//! What the clients tell the bench.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// One change, as clients recognise it.
#[derive(Debug)]
pub struct Mark {
    /// Counts them, from 1; 0 is none.
    pub number: u64,
    /// What is in the resource that changed, and in no other.
    pub text: String,
}

/// Shared by all clients.
#[derive(Debug)]
pub struct Board {
    /// Clients that have the first state.
    pub synced: AtomicUsize,
    /// Bytes that came, of gRPC.
    pub bytes: AtomicU64,
    /// Streams that ended and were opened again.
    pub again: AtomicU64,
    /// Resources of the first state of each client that were not as many as there should be.
    pub wrong: AtomicU64,
    mark: RwLock<Arc<Mark>>,
    seen: AtomicUsize,
    /// When the last of them was told, in nanoseconds since `begun`.
    last: AtomicU64,
    begun: Instant,
    news: Notify,
    trouble: Mutex<Option<String>>,
}

impl Default for Board {
    fn default() -> Self {
        Self {
            synced: AtomicUsize::new(0),
            bytes: AtomicU64::new(0),
            again: AtomicU64::new(0),
            wrong: AtomicU64::new(0),
            mark: RwLock::new(Arc::new(Mark { number: 0, text: String::new() })),
            seen: AtomicUsize::new(0),
            last: AtomicU64::new(0),
            begun: Instant::now(),
            news: Notify::new(),
            trouble: Mutex::new(None),
        }
    }
}

impl Board {
    /// The change that is waited for.
    pub fn mark(&self) -> Arc<Mark> {
        self.mark.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A client has the change.
    pub fn seen(&self) {
        let now = u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.last.fetch_max(now, Ordering::SeqCst);
        self.seen.fetch_add(1, Ordering::SeqCst);
        self.news.notify_one();
    }

    /// A client has the first state.
    pub fn synced(&self) {
        self.synced.fetch_add(1, Ordering::SeqCst);
        self.news.notify_one();
    }

    /// What a client had to say last when it was cut off.
    pub fn trouble(&self, text: String) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
    }

    /// What a client had to say last.
    pub fn last_trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for every client's first state.
    ///
    /// # Errors
    /// Not within the bound.
    pub async fn all_synced(&self, clients: usize, bound: Duration) -> Result<(), String> {
        let what = || format!("{} of {clients} clients have the first state", self.synced.load(Ordering::SeqCst));
        self.until(bound, || self.synced.load(Ordering::SeqCst) >= clients, what).await
    }

    /// Makes a change with `change` and waits until every client has it; the time from before the change until the last.
    ///
    /// # Errors
    /// Not within the bound.
    pub async fn change(
        &self,
        mark: Mark,
        clients: usize,
        bound: Duration,
        change: impl FnOnce(&str),
    ) -> Result<Duration, String> {
        self.seen.store(0, Ordering::SeqCst);
        let mark = Arc::new(mark);
        *self.mark.write().unwrap_or_else(PoisonError::into_inner) = mark.clone();
        let begun = self.begun.elapsed();
        change(&mark.text);
        let what = || format!("{} of {clients} clients have change {}", self.seen.load(Ordering::SeqCst), mark.number);
        self.until(bound, || self.seen.load(Ordering::SeqCst) >= clients, what).await?;
        Ok(Duration::from_nanos(self.last.load(Ordering::SeqCst)).saturating_sub(begun))
    }

    async fn until(
        &self,
        bound: Duration,
        condition: impl Fn() -> bool,
        what: impl Fn() -> String,
    ) -> Result<(), String> {
        let wait = async {
            while !condition() {
                self.news.notified().await;
            }
        };
        if tokio::time::timeout(bound, wait).await.is_ok() {
            return Ok(());
        }
        Err(format!("{} after {bound:?}; {}", what(), self.last_trouble().unwrap_or_default()))
    }
}
