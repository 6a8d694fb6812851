//! Pods that are on their way in or out, each in a task of its own: a pod that takes its time holds up none of the others.
//! What is asked of one meanwhile waits until it has arrived, so that no decision about it overtakes another.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::{Id, JoinSet};

use super::{Command, Task};

/// Searches through all processes that are under way at a time: each has a thread that it blocks.
const SEARCHES: usize = 2;

/// What is to be noted when a pod has arrived.
pub(super) type Then = Box<dyn FnOnce(&mut Task) + Send>;

/// The pods on their way.
pub(super) struct Moving {
    tasks: JoinSet<Then>,
    /// By UID.
    pods: HashMap<String, One>,
    searches: Arc<Semaphore>,
}

struct One {
    task: Id,
    deferred: VecDeque<Command>,
}

impl Default for Moving {
    fn default() -> Self {
        Self { tasks: JoinSet::new(), pods: HashMap::new(), searches: Arc::new(Semaphore::new(SEARCHES)) }
    }
}

impl Moving {
    pub(super) fn is_empty(&self) -> bool {
        self.pods.is_empty()
    }

    pub(super) fn contains(&self, uid: &str) -> bool {
        self.pods.contains_key(uid)
    }

    /// Begins to move a pod, which is not moving already.
    pub(super) fn begin(&mut self, uid: String, way: impl Future<Output = Then> + Send + 'static) {
        let task = self.tasks.spawn(way).id();
        self.pods.insert(uid, One { task, deferred: VecDeque::new() });
    }

    /// Puts a command off that is about a pod on its way; gives back any other.
    pub(super) fn defer(&mut self, command: Command) -> Option<Command> {
        let uid = match &command {
            Command::Admit { admission, .. } => &admission.pod.uid,
            Command::Delete { uid, .. } => uid,
            Command::Check { .. } | Command::Prune { .. } => return Some(command),
        };
        match self.pods.get_mut(uid) {
            Some(one) => {
                one.deferred.push_back(command);
                None
            }
            None => Some(command),
        }
    }

    /// The next pod that has arrived: what is to be noted, and what was put off. `None`: none is on its way.
    pub(super) async fn next(&mut self) -> Option<(Option<Then>, VecDeque<Command>)> {
        let arrived = self.tasks.join_next_with_id().await?;
        let (id, then) = match arrived {
            Ok((id, then)) => (id, Some(then)),
            Err(error) => {
                tracing::error!(%error, "a pod did not arrive");
                (error.id(), None)
            }
        };
        let uid = self.pods.iter().find(|(_, one)| one.task == id).map(|(uid, _)| uid.clone());
        let one = uid.and_then(|uid| self.pods.remove(&uid));
        Some((then, one.map(|one| one.deferred).unwrap_or_default()))
    }

    /// Runs a search that blocks when it is its turn.
    pub(super) fn search<T, S>(&self, search: S) -> impl Future<Output = Result<T, String>> + Send + use<T, S>
    where
        T: Send + 'static,
        S: FnOnce() -> Result<T, String> + Send + 'static,
    {
        let searches = Arc::clone(&self.searches);
        async move {
            // The semaphore is never closed.
            let _permit = searches.acquire_owned().await;
            tokio::task::spawn_blocking(search).await.unwrap_or_else(|error| Err(error.to_string()))
        }
    }
}
