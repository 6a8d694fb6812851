//! What lives in one pod: its accept loops, tunnels and connections. Each holds a token, so that a pod that is gone can be
//! waited out; each connection is listed, so that it can be shown, judged again, and closed with a reason.

use std::collections::HashMap;
use std::fmt;
use std::future::poll_fn;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Poll;

use futures_util::task::AtomicWaker;
use tokio::sync::{Notify, watch};

/// Why a connection was closed by the proxy itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The pod is gone.
    PodGone,
    /// A policy that was changed meanwhile denies it; the policy's name, if one denied it.
    Denied(Option<Arc<str>>),
    /// The pod holds too much for receivers that do not take it, and this connection's had waited longest.
    TooMuchHeld,
    /// The proxy ends and the connection did not, in the time it was given.
    Drained,
}

/// Why a connection may not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// The pod has as many as it may.
    TooMany,
    /// The pod is gone.
    PodGone,
}

/// Everything of one pod. `T` is what is known of a connection.
#[derive(Debug)]
pub struct Live<T> {
    max: usize,
    next: AtomicU64,
    open: Mutex<HashMap<u64, Arc<Connection<T>>>>,
    closed: watch::Sender<bool>,
    tokens: Arc<Tokens>,
}

#[derive(Debug, Default)]
struct Tokens {
    count: AtomicUsize,
    emptied: Notify,
}

/// A connection in the list.
#[derive(Debug)]
pub struct Connection<T> {
    /// What is known of it.
    pub facts: T,
    reason: OnceLock<CloseReason>,
    /// The task that carries it.
    task: AtomicWaker,
}

impl<T> Connection<T> {
    /// Tells the connection to end. The first reason counts.
    pub fn close(&self, reason: CloseReason) {
        // A second reason changes nothing.
        let _ = self.reason.set(reason);
        self.task.wake();
    }

    /// Whether the connection was told to end.
    pub fn is_told(&self) -> bool {
        self.reason.get().is_some()
    }

    /// Resolves once the connection was told to end. For the one task that carries it.
    pub async fn told_to_close(&self) -> CloseReason {
        poll_fn(|cx| {
            // Polled with every chunk of data: the look comes first, and again after the registration.
            if self.reason.get().is_none() {
                self.task.register(cx.waker());
            }
            self.reason.get().cloned().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}

impl<T> Live<T> {
    /// Nothing yet; at most `max` connections at a time.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            max,
            next: AtomicU64::new(0),
            open: Mutex::default(),
            closed: watch::Sender::new(false),
            tokens: Arc::default(),
        })
    }

    /// Holds up [`Live::ended`] until it is dropped.
    pub fn token(&self) -> Token {
        self.tokens.count.fetch_add(1, Ordering::AcqRel);
        Token(Arc::clone(&self.tokens))
    }

    /// Lists a connection.
    ///
    /// # Errors
    /// When there are too many, or the pod is gone; `facts` come back.
    pub fn open(self: &Arc<Self>, facts: T) -> Result<Guard<T>, (Full, T)> {
        let token = self.token();
        if self.is_closed() {
            return Err((Full::PodGone, facts));
        }
        let mut open = self.list();
        if open.len() >= self.max {
            drop(open);
            return Err((Full::TooMany, facts));
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection { facts, reason: OnceLock::new(), task: AtomicWaker::new() });
        open.insert(id, Arc::clone(&connection));
        drop(open);
        // Closed between the look and the listing: `close` may not have seen it.
        if self.is_closed() {
            connection.close(CloseReason::PodGone);
        }
        Ok(Guard { id, connection, live: Arc::clone(self), _token: token })
    }

    /// The connections that are open now.
    pub fn connections(&self) -> Vec<Arc<Connection<T>>> {
        self.list().values().cloned().collect()
    }

    /// How many connections are open now.
    pub fn count(&self) -> usize {
        self.list().len()
    }

    /// Tells every connection to end.
    pub fn close_all(&self, reason: &CloseReason) {
        for connection in self.connections() {
            connection.close(reason.clone());
        }
    }

    /// The pod is gone: everything of it must end, and nothing may begin.
    pub fn end(&self) {
        self.closed.send_replace(true);
        self.close_all(&CloseReason::PodGone);
    }

    /// Resolves when all tokens are dropped.
    pub async fn ended(&self) {
        loop {
            let emptied = self.tokens.emptied.notified();
            if self.tokens.count.load(Ordering::Acquire) == 0 {
                return;
            }
            emptied.await;
        }
    }

    /// [`Live::end`], and what that leads to.
    #[cfg(test)]
    pub async fn close(&self) {
        self.end();
        self.ended().await;
    }

    /// Whether the pod is gone.
    pub fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    /// Resolves once the pod is gone.
    pub async fn closed(&self) {
        let mut closed = self.closed.subscribe();
        // The sender lives in `self`: this cannot fail.
        let _ = closed.wait_for(|closed| *closed).await;
    }

    fn list(&self) -> MutexGuard<'_, HashMap<u64, Arc<Connection<T>>>> {
        // Inserting and removing leave nothing half done.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Holds up [`Live::ended`].
#[derive(Debug)]
pub struct Token(Arc<Tokens>);

impl Drop for Token {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.emptied.notify_waiters();
        }
    }
}

/// Keeps a connection in the list while it lives.
pub struct Guard<T> {
    id: u64,
    connection: Arc<Connection<T>>,
    live: Arc<Live<T>>,
    _token: Token,
}

impl<T> Deref for Guard<T> {
    type Target = Connection<T>;

    fn deref(&self) -> &Connection<T> {
        &self.connection
    }
}

impl<T> Drop for Guard<T> {
    fn drop(&mut self) {
        self.live.list().remove(&self.id);
    }
}

impl<T: fmt::Debug> fmt::Debug for Guard<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.connection.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_is_listed_while_it_lives() {
        let live = Live::new(1);
        let guard = live.open("a").unwrap();
        assert_eq!(live.connections()[0].facts, "a");
        assert_eq!(live.open("b").unwrap_err(), (Full::TooMany, "b"));
        drop(guard);
        assert_eq!(live.count(), 0);
        live.open("c").unwrap();
    }

    #[tokio::test]
    async fn the_first_reason_to_close_counts() {
        let live = Live::new(9);
        let guard = live.open(()).unwrap();
        guard.close(CloseReason::Denied(None));
        live.close_all(&CloseReason::Drained);
        assert_eq!(guard.told_to_close().await, CloseReason::Denied(None));
    }

    #[tokio::test]
    async fn closing_waits_for_every_token_and_lets_nothing_begin() {
        let live = Live::new(9);
        let (guard, token) = (live.open(()).unwrap(), live.token());
        let closing = tokio::spawn({
            let live = Arc::clone(&live);
            async move { live.close().await }
        });
        live.closed().await;
        assert_eq!(guard.told_to_close().await, CloseReason::PodGone);
        assert_eq!(live.open(()).unwrap_err().0, Full::PodGone);
        drop(guard);
        tokio::task::yield_now().await;
        assert!(!closing.is_finished(), "a token is still held");
        drop(token);
        closing.await.unwrap();
    }
}
