//! Pods that leave, each in a task of its own: a pod that takes its time holds up none of the others. What is asked of one
//! meanwhile waits until it has left.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::{Id, JoinError, JoinSet};

use super::super::adopt::Stranded;
use super::super::host::Host;
use super::super::netns::Netns;
use super::super::pod::{self, EnrolError};
use super::super::state::{Saved, State};
use super::{ACK_PATIENCE, Command, Connected, Listed, ManagerError, Notice, Task, blocking};

/// Pods whose system calls are under way at a time: each has a thread that it blocks.
const AT_A_TIME: usize = 2;
/// Pods that the proxies are told of at a time: ending what lives in them is work for a proxy, which serves other pods meanwhile.
const TOLD_AT_A_TIME: usize = 4;
/// What a list says of a pod that leaves.
const REASON: &str = "it is being withdrawn";

/// Who waits for a pod's withdrawal.
pub(super) type Done = oneshot::Sender<Result<(), ManagerError>>;

/// The pods that leave.
pub(super) struct Leaving {
    tasks: JoinSet<Left>,
    /// By UID.
    pods: HashMap<String, One>,
    permits: Permits,
}

/// Turns of those that leave.
#[derive(Clone)]
struct Permits {
    blocking: Arc<Semaphore>,
    telling: Arc<Semaphore>,
}

/// One of them.
struct One {
    task: Id,
    saved: Saved,
    done: Option<Done>,
    deferred: VecDeque<Command>,
}

/// How it ended.
pub(super) struct Left {
    stranded: Stranded,
    result: Result<(), EnrolError>,
    /// Proxies that did not let go of the pod in time.
    slow: Vec<u64>,
}

impl Default for Leaving {
    fn default() -> Self {
        let [blocking, telling] = [AT_A_TIME, TOLD_AT_A_TIME].map(|most| Arc::new(Semaphore::new(most)));
        Self { tasks: JoinSet::new(), pods: HashMap::new(), permits: Permits { blocking, telling } }
    }
}

impl Leaving {
    /// Whether no pod leaves.
    pub(super) fn is_empty(&self) -> bool {
        self.pods.is_empty()
    }

    /// Their UIDs.
    pub(super) fn uids(&self) -> impl Iterator<Item = &str> {
        self.pods.keys().map(String::as_str)
    }

    /// The next pod that has left, or not wholly; `None`: none leaves.
    pub(super) async fn next(&mut self) -> Option<Result<(Id, Left), JoinError>> {
        self.tasks.join_next_with_id().await
    }

    /// Puts a command off that is about a pod that leaves, or about the namespace of one: what is taken down there must not
    /// be what another pod was given meanwhile. Gives back any other.
    pub(super) fn defer(&mut self, command: Command) -> Option<Command> {
        let one = match &command {
            Command::Enrol { info, netns, .. } => {
                let inode = inode_of(netns);
                let is_in_the_way =
                    |one: &&mut One| one.saved.pod.uid == info.uid || Some(one.saved.netns_inode) == inode;
                self.pods.values_mut().find(is_in_the_way)
            }
            Command::Withdraw { uid, .. } => self.pods.get_mut(uid),
            Command::Listed { .. }
            | Command::List { .. }
            | Command::Join { .. }
            | Command::Leave { .. }
            | Command::Answered { .. } => None,
        };
        match one {
            Some(one) => {
                one.deferred.push_back(command);
                None
            }
            None => Some(command),
        }
    }

    /// As a list shows them.
    pub(super) fn list(&self) -> impl Iterator<Item = Listed> {
        self.pods.values().map(|One { saved, .. }| Listed {
            info: saved.pod.clone(),
            reason: String::from(REASON),
            weaker: String::new(),
            sandbox: saved.sandbox.clone(),
        })
    }
}

/// `None`: the descriptor is none of a namespace, which is found out later.
fn inode_of(netns: &OwnedFd) -> Option<u64> {
    Some(File::from(netns.try_clone().ok()?).metadata().ok()?.ino())
}

impl Task {
    /// Begins to withdraw a pod, if it is there: from now on it is not among the pods. `first` is what it is withdrawn for.
    pub(super) fn withdraw(&mut self, uid: &str, done: Option<Done>, first: Option<Command>) {
        self.refusals.forget_pod(uid);
        self.schedule.forget(uid);
        let stranded = self.stranded.remove(uid);
        let Some(mut stranded) = stranded.or_else(|| self.lock().remove(uid).map(|pod| pod.leave())) else {
            if let Some(done) = done {
                // Whoever asked may have lost patience.
                let _ = done.send(Ok(()));
            }
            return;
        };
        stranded.leaving = true;
        stranded.saved.leaving = true;
        let saved = stranded.saved.clone();
        let proxies = self.proxies.iter().map(|(id, Connected { notices, .. })| (*id, notices.downgrade())).collect();
        let (host, state, permits) = (Arc::clone(&self.host), self.state.clone(), self.leaving.permits.clone());
        let steps = Steps { host, state, permits, proxies };
        let task = self.leaving.tasks.spawn(steps.take(stranded)).id();
        let deferred = first.into_iter().collect();
        self.leaving.pods.insert(uid.to_owned(), One { task, saved, done, deferred });
    }

    /// A pod has left. When something failed it is stranded, its file stays, and it is tried again. Then comes what was put
    /// off.
    pub(super) async fn left(&mut self, left: Result<(Id, Left), JoinError>) {
        let id = left.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let is_it = |one: &One| one.task == id;
        let Some(uid) = self.leaving.pods.iter().find(|(_, one)| is_it(one)).map(|(uid, _)| uid.clone()) else {
            return;
        };
        let Some(One { saved, done, deferred, .. }) = self.leaving.pods.remove(&uid) else { return };
        let Left { mut stranded, result, slow } =
            left.map_or_else(|error| Left::failed(saved, &error), |(_, left)| left);
        for proxy in slow {
            tracing::error!(proxy, pod = uid, "the proxy did not close a pod's sockets in time; it is cut off");
            self.proxies.remove(&proxy);
        }
        let failure = result.as_ref().err().map(ToString::to_string);
        if let Some(error) = &failure {
            let reason = format!("withdrawn, but not wholly released: {error}");
            if stranded.reason != reason {
                tracing::warn!(pod = uid, error, "cannot withdraw yet");
            }
            stranded.reason = reason;
            self.stranded.insert(uid, stranded);
        } else {
            tracing::info!(pod = uid, "withdrawn");
        }
        if let Some(done) = done {
            let _ = done.send(result.map_err(ManagerError::from));
        }
        for command in deferred {
            match (command, &failure) {
                (Command::Enrol { done, .. }, Some(error)) => {
                    let _ = done.send(Err(EnrolError::NotReleased(error.clone()).into()));
                }
                (command, _) => self.carry_out(command).await,
            }
        }
    }
}

impl Left {
    fn failed(saved: Saved, error: &JoinError) -> Self {
        let error = EnrolError::Netns(super::super::netns::NetnsError::Thread(error.to_string()));
        Self { stranded: Stranded::new(saved), result: Err(error), slow: Vec::new() }
    }
}

/// What withdrawing takes.
struct Steps {
    host: Arc<Host>,
    state: State,
    permits: Permits,
    /// Those that were told of the pod. Whoever connects later is not told of it.
    proxies: Vec<(u64, mpsc::WeakSender<Notice>)>,
}

impl Steps {
    async fn take(self, mut stranded: Stranded) -> Left {
        let mut slow = Vec::new();
        let result = self.release(&mut stranded, &mut slow).await;
        Left { stranded, result, slow }
    }

    /// Releases a pod and restores its namespace, if it is to be found by now; without it there are no rules to remove.
    async fn release(&self, stranded: &mut Stranded, slow: &mut Vec<u64>) -> Result<(), EnrolError> {
        let (host, saved, state) = (Arc::clone(&self.host), stranded.saved.clone(), self.state.clone());
        let known = stranded.netns.as_ref().and_then(|netns| netns.try_clone().ok());
        let netns = self.alone(move || {
            // First of all: an agent that is started meanwhile must finish it, and not take the pod over.
            if let Err(error) = state.save(&saved) {
                tracing::warn!(pod = saved.pod.uid, %error, "cannot write down that a pod is withdrawn");
            }
            // Held, so that it stays to be restored when the proxy closes its sockets.
            let find = || Netns::find(&saved.netns_path, saved.netns_inode, saved.netns_cookie);
            let netns = known.or_else(find);
            pod::release(&host, &saved, netns.as_ref())?;
            Ok(netns)
        });
        let netns = netns.await?;
        stranded.listeners = None;
        *slow = self.tell(&stranded.saved.pod.uid).await;
        let (host, state, saved) = (Arc::clone(&self.host), self.state.clone(), stranded.saved.clone());
        let restored = self.alone(move || {
            if let Some(netns) = netns {
                pod::end_proxied(&host, &netns)?;
                pod::restore(&netns, saved.before)?;
            } else {
                tracing::warn!(pod = saved.pod.uid, "withdrawn without its network namespace, which was not found");
            }
            Ok(state.remove(&saved.pod.uid)?)
        });
        restored.await
    }

    /// Waits until every proxy has closed the pod's sockets. Returns those that have not in time.
    async fn tell(&self, uid: &str) -> Vec<u64> {
        // The semaphores are never closed.
        let _permit = self.permits.telling.acquire().await;
        let mut acks = Vec::new();
        for (id, notices) in &self.proxies {
            let Some(notices) = notices.upgrade() else { continue };
            let (acked, ack) = oneshot::channel();
            if notices.try_send(Notice::Removed(uid.to_owned(), acked)).is_ok() {
                acks.push((*id, ack));
            }
        }
        let deadline = tokio::time::Instant::now() + ACK_PATIENCE;
        let mut slow = Vec::new();
        for (id, ack) in acks {
            // An error says that the connection ended: then the proxy is gone, or will be told again when it is back.
            if tokio::time::timeout_at(deadline, ack).await.is_err() {
                slow.push(id);
            }
        }
        slow
    }

    /// Runs system calls that block when it is their turn.
    async fn alone<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, EnrolError> + Send + 'static,
    ) -> Result<T, EnrolError> {
        let _permit = self.permits.blocking.acquire().await;
        blocking(work).await
    }
}
