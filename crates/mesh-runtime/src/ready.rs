//! Readiness: the process is ready when no named task is pending.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use ::http::StatusCode;
use tokio::sync::watch;

use crate::http::{Reply, Router};

/// The set of pending tasks. Cheap to clone; clones share the set.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Inner>);

impl Readiness {
    /// Ready until a task is registered.
    pub fn new() -> Self {
        Self::default()
    }

    /// Not ready until the returned guard is finished or dropped. `name` is shown to operators.
    pub fn register(&self, name: impl Into<String>) -> Pending {
        let mut tasks = self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        let id = tasks.next;
        tasks.next += 1;
        tasks.names.insert(id, name.into());
        self.0.count.send_replace(tasks.names.len());
        Pending { readiness: self.clone(), id }
    }

    /// Names of the pending tasks, oldest first.
    pub fn pending(&self) -> Vec<String> {
        self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner).names.values().cloned().collect()
    }

    /// Whether nothing is pending.
    pub fn is_ready(&self) -> bool {
        *self.0.count.borrow() == 0
    }

    /// Resolves when nothing is pending.
    pub async fn ready(&self) {
        let mut count = self.0.count.subscribe();
        // The sender lives in `self`: this cannot fail.
        let _ = count.wait_for(|pending| *pending == 0).await;
    }

    /// Adds `GET /healthz/ready`: 200, or 500 with one pending task per line; and `GET /healthz/live`: 200, as long as the
    /// process answers at all.
    pub fn mount(&self, router: &mut Router) {
        router.get("/healthz/live", "whether the process answers", |_| async { Reply::text("alive\n") });
        let readiness = self.clone();
        router.get("/healthz/ready", "readiness, or what is pending", move |_| {
            let pending = readiness.pending();
            async move {
                if pending.is_empty() {
                    Reply::text("ready\n")
                } else {
                    let body = format!("not ready, pending:\n- {}\n", pending.join("\n- "));
                    Reply::text(body).with_status(StatusCode::INTERNAL_SERVER_ERROR)
                }
            }
        });
    }

    fn finish(&self, id: u64) {
        let mut tasks = self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(name) = tasks.names.remove(&id) {
            let left = tasks.names.len();
            self.0.count.send_replace(left);
            tracing::info!(task = name, left, "task finished");
        }
    }
}

/// One pending task. Dropping it marks the task as finished; a task that failed must therefore keep it.
#[must_use = "dropping it marks the task as finished"]
pub struct Pending {
    readiness: Readiness,
    id: u64,
}

impl Pending {
    /// Marks the task as finished.
    pub fn done(self) {}
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.readiness.finish(self.id);
    }
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pending").field(&self.id).finish()
    }
}

#[derive(Debug, Default)]
struct Inner {
    tasks: Mutex<Tasks>,
    count: watch::Sender<usize>,
}

#[derive(Debug, Default)]
struct Tasks {
    next: u64,
    names: BTreeMap<u64, String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::tests::get;

    #[tokio::test]
    async fn ready_when_the_last_guard_is_gone() {
        let readiness = Readiness::new();
        assert!(readiness.is_ready());
        let (first, second) = (readiness.register("discovery"), readiness.register("pods"));
        assert_eq!(readiness.pending(), ["discovery", "pods"]);
        let waiting = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.ready().await }
        });
        first.done();
        assert!(!readiness.is_ready());
        drop(second);
        waiting.await.unwrap();
        assert!(readiness.is_ready());
    }

    #[tokio::test]
    async fn tells_what_is_pending() {
        let readiness = Readiness::new();
        let mut router = Router::new();
        readiness.mount(&mut router);
        let pending = readiness.register("discovery");
        let (status, body) = get(&router, "/healthz/ready").await;
        assert_eq!(status, 500);
        assert!(body.contains("discovery"), "{body}");
        assert_eq!(get(&router, "/healthz/live").await.0, 200);
        pending.done();
        assert_eq!(get(&router, "/healthz/ready").await.0, 200);
    }
}
