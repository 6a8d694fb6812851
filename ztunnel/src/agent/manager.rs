//! The pods of the node: one task that owns them, enrols them one after the other, withdraws each in a task of its own, and
//! tells the proxies.

mod leaving;
mod rounds;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_proto::node;
use tokio::sync::{mpsc, oneshot};

use leaving::Leaving;
use rounds::Schedule;

use super::adopt::{self, Stranded};
use super::host::Host;
use super::netns::{Netns, NetnsError, inode_at, is_without_processes};
use super::pod::{self, EnrolError, NotEnrolled, Pod, PodInfo, Sandbox};
use super::refusals::Refusals;
use super::sockets::ListenerSet;
use super::state::{Saved, State, StateError};

/// How long a proxy may take to end the sockets of a pod that is gone: longer than it gives itself, and less than the plugin
/// waits for an answer.
const ACK_PATIENCE: Duration = Duration::from_secs(8);
/// Commands that wait.
const QUEUE: usize = 256;
/// Notices that wait for one proxy: more than all pods of a node. A proxy that lets them pile up is cut off.
const NOTICES: usize = 2 * ztunnel_ebpf::PODS_CAPACITY;

/// The way to the task. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Manager {
    commands: mpsc::Sender<Command>,
    pods: Shared,
    stranded: Arc<Mutex<Vec<Held>>>,
}

/// Pods by UID, for those who only look.
type Shared = Arc<Mutex<HashMap<String, Arc<Pod>>>>;

/// A pod that is captured, whether it can be served or not.
#[derive(Clone, Debug)]
pub struct Held {
    /// The pod. Of one whose file is lost only the UID is known; the rest is empty.
    pub info: PodInfo,
    /// Where it runs.
    pub sandbox: Sandbox,
    /// Its namespace.
    pub netns_inode: u64,
}

impl Held {
    fn of(pod: &Pod) -> Self {
        Self { info: pod.info.clone(), sandbox: pod.sandbox(), netns_inode: pod.netns().inode() }
    }

    fn of_stranded(Stranded { saved, .. }: &Stranded) -> Self {
        let sandbox = Sandbox { id: saved.sandbox.clone(), path: saved.netns_path.clone() };
        Self { info: saved.pod.clone(), sandbox, netns_inode: saved.netns_inode }
    }
}

/// What a proxy's connection has to tell it.
#[derive(Debug)]
pub enum Notice {
    /// A pod, with listeners that the proxy gets duplicates of.
    Added(PodInfo, Arc<ListenerSet>),
    /// A pod is gone; the sender fires when the proxy has closed its sockets.
    Removed(String, oneshot::Sender<()>),
    /// Everything known at connect time has been told.
    SnapshotSent,
}

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    /// The pod could not be enrolled, or not wholly released.
    #[error(transparent)]
    Pod(#[from] EnrolError),
    /// The agent shuts down.
    #[error("the agent is shutting down")]
    Stopping,
    /// The check of the pods failed as a whole.
    #[error("the pods could not be checked; see the agent's log")]
    Unchecked,
}

/// One pod, as `ListPods` shows it.
#[derive(Debug)]
pub struct Listed {
    /// The pod.
    pub info: PodInfo,
    /// Empty: enrolled, as checked in the kernel.
    pub reason: String,
    /// Enrolled, but held less firmly than others: why. Empty: nothing to say.
    pub weaker: String,
    /// The runtime's id of the sandbox; empty if it gave none.
    pub sandbox: String,
}

/// A proxy that connects.
#[derive(Debug)]
pub struct Joining {
    /// Listeners that it kept from an earlier agent.
    pub kept: HashMap<String, ListenerSet>,
    /// Whether it answers DNS.
    pub dns: bool,
}

/// A proxy that is connected.
struct Connected {
    notices: mpsc::Sender<Notice>,
    dns: bool,
}

/// What became of an announcement.
enum Enrolling {
    /// Its pod is in force.
    Ended,
    /// What is there of the pod has to leave first.
    AfterWithdrawal,
}

enum Command {
    Enrol { info: PodInfo, netns: OwnedFd, sandbox: Sandbox, done: oneshot::Sender<Result<(), ManagerError>> },
    Withdraw { uid: String, sandbox: String, done: oneshot::Sender<Result<(), ManagerError>> },
    Listed { uids: HashSet<String> },
    List { done: oneshot::Sender<Option<Vec<Listed>>> },
    Join { id: u64, joining: Joining, notices: oneshot::Sender<mpsc::Receiver<Notice>> },
    Leave { id: u64 },
    Answered { proxy: u64, uid: String, error: String },
}

impl Manager {
    /// Adopts what an earlier agent left, then starts the task. It ends when all clones are dropped, and leaves capture
    /// in place.
    ///
    /// # Errors
    /// When the state cannot be read.
    pub fn start(host: Arc<Host>, state: State) -> Result<Self, StateError> {
        let pods = Shared::default();
        let (adopted, stranded, complete) = adopt::all(&host, &state)?;
        // They were there before any list that this agent will see.
        let listed = adopted.keys().chain(stranded.keys()).cloned().collect();
        *pods.lock().unwrap_or_else(PoisonError::into_inner) = adopted;
        let shown = Arc::default();
        let (commands, queue) = mpsc::channel(QUEUE);
        let task = Task {
            host,
            state,
            pods: Arc::clone(&pods),
            stranded,
            shown: Arc::clone(&shown),
            proxies: HashMap::new(),
            refusals: Refusals::default(),
            schedule: Schedule::default(),
            leaving: Leaving::default(),
            listed,
            complete,
        };
        task.show_stranded();
        tokio::spawn(task.run(queue));
        Ok(Self { commands, pods, stranded: shown })
    }

    /// Enrols a pod; when this returns it is in force, as checked in the kernel.
    ///
    /// # Errors
    /// When it is not.
    pub async fn enrol(&self, info: PodInfo, netns: OwnedFd, sandbox: Sandbox) -> Result<(), ManagerError> {
        self.ask(|done| Command::Enrol { info, netns, sandbox, done }).await?
    }

    /// Withdraws a pod from the sandbox with this id (empty: from any). A pod that is not enrolled there is withdrawn
    /// already: it keeps its UID when it gets another sandbox.
    ///
    /// # Errors
    /// When something of it stays.
    pub async fn withdraw(&self, uid: String, sandbox: String) -> Result<(), ManagerError> {
        self.ask(|done| Command::Withdraw { uid, sandbox, done }).await?
    }

    /// All pods that exist on this node, by UID. Those that an earlier list would have shown and this one does not are
    /// withdrawn, unless something of them runs here.
    pub async fn listed(&self, uids: HashSet<String>) {
        // The task may be gone too.
        let _ = self.commands.send(Command::Listed { uids }).await;
    }

    /// All pods, each checked in the kernel now.
    ///
    /// # Errors
    /// When the agent stops.
    pub async fn list(&self) -> Result<Vec<Listed>, ManagerError> {
        self.ask(|done| Command::List { done }).await?.ok_or(ManagerError::Unchecked)
    }

    /// A proxy connected: what it has to be told from now on.
    ///
    /// # Errors
    /// When the agent stops.
    pub async fn join(&self, id: u64, joining: Joining) -> Result<mpsc::Receiver<Notice>, ManagerError> {
        self.ask(|notices| Command::Join { id, joining, notices }).await
    }

    /// A proxy is gone.
    pub async fn leave(&self, id: u64) {
        // The task may be gone too.
        let _ = self.commands.send(Command::Leave { id }).await;
    }

    /// A proxy answered what it was told of a pod; an empty error says that it serves it. Waits for its turn, which comes: the
    /// task itself waits for no proxy.
    pub async fn answered(&self, proxy: u64, uid: String, error: String) {
        // The task may be gone too.
        let _ = self.commands.send(Command::Answered { proxy, uid, error }).await;
    }

    /// An enrolled pod.
    #[must_use]
    pub fn pod(&self, uid: &str) -> Option<Arc<Pod>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).get(uid).cloned()
    }

    /// All enrolled pods.
    #[must_use]
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// All pods that are captured and are to be: those that are enrolled, and those that cannot be served.
    #[must_use]
    pub fn held(&self) -> Vec<Held> {
        let stranded = self.stranded.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.pods().iter().map(|pod| Held::of(pod)).chain(stranded).collect()
    }

    /// How many pods are enrolled and held less firmly than others.
    #[must_use]
    pub fn count_weaker(&self) -> usize {
        self.pods().iter().filter(|pod| pod.weaker().is_some()).count()
    }

    /// How many pods are enrolled.
    #[must_use]
    pub fn count(&self) -> usize {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, ManagerError> {
        let (done, answer) = oneshot::channel();
        self.commands.send(command(done)).await.map_err(|_| ManagerError::Stopping)?;
        answer.await.map_err(|_| ManagerError::Stopping)
    }
}

struct Task {
    host: Arc<Host>,
    state: State,
    pods: Shared,
    stranded: BTreeMap<String, Stranded>,
    /// Those of them that do not leave, for those who only look.
    shown: Arc<Mutex<Vec<Held>>>,
    proxies: HashMap<u64, Connected>,
    refusals: Refusals,
    schedule: Schedule,
    leaving: Leaving,
    /// UIDs of pods that a list of all that exist would show if they still existed: those of the last list, and those that were
    /// there before the first. A pod that starts may be enrolled before it is in a list.
    listed: HashSet<String>,
    /// Whether no pod is captured that the agent does not know.
    complete: bool,
}

impl Task {
    async fn run(mut self, mut queue: mpsc::Receiver<Command>) {
        let mut rounds = tokio::time::interval(rounds::ROUND);
        rounds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut ticks = tokio::time::interval(rounds::TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                command = queue.recv() => match command {
                    Some(command) => self.carry_out(command).await,
                    None => return,
                },
                Some(left) = self.leaving.next() => self.left(left).await,
                _ = rounds.tick() => self.round().await,
                _ = ticks.tick(), if self.has_pods() => self.tick().await,
            }
            self.show_stranded();
        }
    }

    fn show_stranded(&self) {
        let stranded = self.stranded.values().filter(|stranded| !stranded.leaving).map(Held::of_stranded).collect();
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = stranded;
    }

    /// An answer that nobody waits for any more is dropped: the work is done all the same.
    async fn carry_out(&mut self, command: Command) {
        match self.leaving.defer(command) {
            Some(Command::Enrol { info, netns, sandbox, done }) => match self.enrol(&info, &netns, &sandbox).await {
                Ok(Enrolling::Ended) => drop(done.send(Ok(()))),
                Ok(Enrolling::AfterWithdrawal) => {
                    let uid = info.uid.clone();
                    self.withdraw(&uid, None, Some(Command::Enrol { info, netns, sandbox, done }));
                }
                Err(error) => drop(done.send(Err(error))),
            },
            Some(Command::Withdraw { uid, sandbox, done }) => self.withdraw_from(&uid, &sandbox, done).await,
            Some(Command::Listed { uids }) => self.take_list(uids).await,
            Some(Command::List { done }) => drop(done.send(self.list().await)),
            Some(Command::Join { id, joining, notices }) => drop(notices.send(self.join(id, joining).await)),
            Some(Command::Leave { id }) => {
                self.proxies.remove(&id);
                self.refusals.forget_proxy(id);
                self.follow_proxies().await;
            }
            Some(Command::Answered { proxy, uid, error }) => {
                self.refusals.note(proxy, uid, error, tokio::time::Instant::now());
            }
            // It comes again.
            None => {}
        }
    }

    async fn enrol(&mut self, info: &PodInfo, netns: &OwnedFd, sandbox: &Sandbox) -> Result<Enrolling, ManagerError> {
        let (info, mut sandbox, uid) = (info.clone(), sandbox.clone(), info.uid.clone());
        let netns = netns.try_clone().map_err(|error| EnrolError::from(NetnsError::Enter(error)))?;
        let netns = blocking(move || Ok(Netns::new(netns)?)).await?;
        let inode = netns.inode();
        // A path that means something else here (another mount namespace) would make the pod look gone.
        if inode_at(&sandbox.path) != Some(inode) {
            sandbox.path.clear();
        }
        let in_it = |pod: &Arc<Pod>| pod.netns().inode() == inode;
        if let Some(other) = self.all().into_iter().find(|pod| in_it(pod) && pod.info.uid != uid) {
            return Err(EnrolError::SameNamespace(other.info.uid.clone()).into());
        }
        let of_it =
            |(other, stranded): &(&String, &Stranded)| stranded.saved.netns_cookie == netns.cookie() && **other != uid;
        if let Some((other, _)) = self.stranded.iter().find(of_it) {
            return Err(EnrolError::SameNamespace(other.clone()).into());
        }
        if self.get(&uid).is_none() {
            self.rediscover(&info, &netns, &sandbox).await?;
        }
        if let Some(Stranded { saved, listeners, leaving, .. }) = self.stranded.get(&uid) {
            // Another by now, or withdrawn and not wholly released, which comes first.
            if *leaving || saved.netns_cookie != netns.cookie() {
                return Ok(Enrolling::AfterWithdrawal);
            }
            let known = (saved.clone(), listeners.clone());
            let pod = self.adopt_as(known, &info, &netns, &sandbox).await?;
            tracing::info!(pod = uid, "adopted after all");
            self.adopted(pod);
        }
        if let Some(pod) = self.get(&uid) {
            if in_it(&pod) && pod.info == info {
                self.enrol_again(pod, sandbox).await?;
                return Ok(Enrolling::Ended);
            }
            if !in_it(&pod) {
                return Ok(Enrolling::AfterWithdrawal);
            }
            // It runs: whatever it is now, it stays captured.
            let listeners = pod.listeners().ok_or(EnrolError::NoListeners)?;
            let changed = self.adopt_as((pod.saved(), Some(listeners)), &info, &netns, &sandbox).await?;
            tracing::info!(pod = uid, before = ?pod.info, now = ?info, "announced as another than it was");
            self.adopted(changed);
            return Ok(Enrolling::Ended);
        }
        let (host, state) = (Arc::clone(&self.host), self.state.clone());
        let enrolled = blocking(move || Ok(Pod::enrol(&host, &state, info, netns, sandbox))).await?;
        let pod = match enrolled {
            Ok(pod) => Arc::new(pod),
            Err(failed) => {
                let NotEnrolled { error, left } = *failed;
                tracing::error!(pod = uid, %error, "not enrolled");
                self.stranded.extend(left.map(|left| (uid, left)));
                return Err(error.into());
            }
        };
        tracing::info!(pod = uid, name = pod.info.name, namespace = pod.info.namespace, "enrolled");
        self.lock().insert(uid, Arc::clone(&pod));
        self.announce(&pod);
        Ok(Enrolling::Ended)
    }

    /// A pod that is captured and of which nothing is known, or nothing but its UID, is stranded from now on under what it was
    /// announced as: enrolling it like one that is not captured would take its capture back where it fails, as it does while a
    /// proxy has its ports.
    async fn rediscover(&mut self, info: &PodInfo, netns: &Netns, sandbox: &Sandbox) -> Result<(), ManagerError> {
        let is_held = match self.stranded.get(&info.uid) {
            // In another namespace it leaves first.
            Some(known) if !known.unnamed || known.leaving || known.saved.netns_cookie != netns.cookie() => {
                return Ok(());
            }
            known => known.is_some(),
        };
        let (host, state) = (Arc::clone(&self.host), self.state.clone());
        let (of, sandbox) = (info.clone(), sandbox.clone());
        let netns = netns.try_clone().map_err(EnrolError::from)?;
        let found = blocking(move || pod::rediscover(&host, &state, &of, &netns, &sandbox, is_held)).await?;
        if let Some(saved) = found {
            tracing::warn!(pod = info.uid, "captured by an earlier agent whose word of it is lost; it is taken over");
            let reason = String::from("captured, and not served yet: an earlier agent's word of it is lost");
            let listeners = self.stranded.remove(&info.uid).and_then(|unnamed| unnamed.listeners);
            self.stranded.insert(info.uid.clone(), Stranded { reason, listeners, ..Stranded::new(saved) });
        }
        Ok(())
    }

    /// A pod that is enrolled was announced once more. Whatever is missing, its capture is never given up here.
    async fn enrol_again(&self, pod: Arc<Pod>, sandbox: Sandbox) -> Result<(), ManagerError> {
        let (host, state, mending) = (Arc::clone(&self.host), self.state.clone(), Arc::clone(&pod));
        let had_listeners = pod.has_listeners(&self.host).is_ok();
        let done = blocking(move || {
            mending.announced(&state, sandbox)?;
            mending.mend(&host)
        })
        .await;
        if !had_listeners {
            self.announce(&pod);
        }
        if let Err(error) = &done {
            tracing::warn!(pod = pod.info.uid, %error, "announced again; not wholly in force");
        }
        Ok(done?)
    }

    async fn adopt_as(
        &self,
        (saved, listeners): (Saved, Option<Arc<ListenerSet>>),
        info: &PodInfo,
        netns: &Netns,
        sandbox: &Sandbox,
    ) -> Result<Pod, ManagerError> {
        let (host, state, info, sandbox) = (Arc::clone(&self.host), self.state.clone(), info.clone(), sandbox.clone());
        let netns = netns.try_clone().map_err(EnrolError::from)?;
        let adopted =
            blocking(move || pod::adopt_as(&host, &state, (&saved, listeners), (&info, netns, sandbox))).await?;
        Ok(adopted)
    }

    /// A pod is in force from now on, as this.
    fn adopted(&mut self, pod: Pod) {
        self.stranded.remove(&pod.info.uid);
        let pod = Arc::new(pod);
        self.lock().insert(pod.info.uid.clone(), Arc::clone(&pod));
        self.announce(&pod);
    }

    /// Withdraws a pod unless it is enrolled in another sandbox than this one by now. Of a pod that nobody announced the
    /// sandbox is not known; runtimes end what runs in one before they say that it ends.
    async fn withdraw_from(&mut self, uid: &str, sandbox: &str, done: leaving::Done) {
        let held = self.get(uid).map(|pod| Held::of(&pod));
        let held = held.or_else(|| self.stranded.get(uid).filter(|pod| !pod.leaving).map(Held::of_stranded));
        let is_former = match held {
            Some(held) if !sandbox.is_empty() && held.sandbox.id.is_empty() => {
                let is_empty = tokio::task::spawn_blocking(move || is_without_processes(held.netns_inode));
                !is_empty.await.unwrap_or_default()
            }
            Some(held) => !sandbox.is_empty() && held.sandbox.id != sandbox,
            None => false,
        };
        if is_former {
            tracing::info!(pod = uid, sandbox, "a former sandbox ended; the pod stays enrolled");
            let _ = done.send(Ok(()));
        } else {
            self.withdraw(uid, Some(done), None);
        }
    }

    /// `None`: they could not be checked, which says nothing about any of them.
    async fn list(&self) -> Option<Vec<Listed>> {
        let (host, pods) = (Arc::clone(&self.host), self.all());
        let checked = tokio::task::spawn_blocking(move || {
            pods.into_iter()
                .map(|pod| {
                    let reason = pod.verify(&host).err().map(|error| error.to_string()).unwrap_or_default();
                    let weaker = pod.weaker().unwrap_or_default().to_owned();
                    Listed { info: pod.info.clone(), reason, weaker, sandbox: pod.sandbox().id }
                })
                .collect::<Vec<_>>()
        });
        let Ok(mut listed) = checked.await else { return None };
        for listed in listed.iter_mut().filter(|listed| listed.reason.is_empty()) {
            if let Some(error) = self.refusals.reason(self.proxies.keys().copied(), &listed.info.uid) {
                listed.reason = format!("captured, but the proxy does not serve it: {error}");
            }
        }
        listed.extend(self.stranded.values().map(|Stranded { saved, reason, .. }| Listed {
            info: saved.pod.clone(),
            reason: reason.clone(),
            weaker: String::new(),
            sandbox: saved.sandbox.clone(),
        }));
        listed.extend(self.leaving.list());
        Some(listed)
    }

    async fn join(&mut self, id: u64, Joining { kept, dns }: Joining) -> mpsc::Receiver<Notice> {
        for (uid, listeners) in kept {
            if let Some(pod) = self.get(&uid) {
                if pod.take_listeners(listeners) {
                    tracing::info!(pod = uid, "listeners returned by the proxy");
                    let (host, opening) = (Arc::clone(&self.host), Arc::clone(&pod));
                    // A proxy of a former version had none for DNS.
                    if let Err(error) = blocking(move || opening.open_listeners(&host)).await {
                        tracing::warn!(pod = uid, %error, "no listeners for DNS yet");
                    }
                    // Other proxies, if any, had to do without.
                    self.announce(&pod);
                }
            } else if let Some(stranded) = self.stranded.get_mut(&uid) {
                stranded.take_listeners(listeners);
            }
        }
        let (notices, receiver) = mpsc::channel(NOTICES);
        let pods = self.all().into_iter().map(|pod| (pod.info.clone(), pod.listeners()));
        // A proxy that kept a stranded pod goes on serving it; left out here, it would be dropped.
        let stranded = self.stranded.values().filter(|stranded| !stranded.unnamed);
        let stranded = stranded.map(|stranded| (stranded.saved.pod.clone(), stranded.listeners.clone()));
        for (info, listeners) in pods.chain(stranded) {
            if let Some(listeners) = listeners {
                // The channel holds more than all pods.
                let _ = notices.try_send(Notice::Added(info, listeners));
            }
        }
        let _ = notices.try_send(Notice::SnapshotSent);
        self.proxies.insert(id, Connected { notices, dns });
        self.follow_proxies().await;
        receiver
    }

    /// Captures the pods' queries while a proxy is connected that answers them, and not while all that are do not. While
    /// none is, what was stays: the next one is about to come.
    async fn follow_proxies(&self) {
        if self.proxies.is_empty() {
            return;
        }
        let served = self.proxies.values().any(|proxy| proxy.dns);
        if !self.host.set_dns_served(served) {
            return;
        }
        if served {
            tracing::info!("a proxy that answers DNS is connected: the pods' queries go to it");
        } else {
            tracing::warn!("no proxy is connected that answers DNS: the pods' queries go to their resolvers");
        }
        let (host, pods) = (Arc::clone(&self.host), self.all());
        let told = blocking(move || {
            for pod in pods {
                if let Err(error) = pod.follow(&host) {
                    // Looked after with everything else that is missing.
                    tracing::warn!(pod = pod.info.uid, %error, "cannot tell the kernel where its queries go");
                }
            }
            Ok(())
        });
        if let Err(error) = told.await {
            tracing::warn!(%error, "cannot tell the kernel where queries go");
        }
    }

    fn announce(&self, pod: &Arc<Pod>) {
        let Some(listeners) = pod.listeners() else { return };
        for Connected { notices, .. } in self.proxies.values() {
            // A full or closed channel: the connection is about to end, and the next one gets a snapshot.
            let _ = notices.try_send(Notice::Added(pod.info.clone(), Arc::clone(&listeners)));
        }
    }

    fn has_pods(&self) -> bool {
        !self.lock().is_empty()
    }

    fn get(&self, uid: &str) -> Option<Arc<Pod>> {
        self.lock().get(uid).cloned()
    }

    fn all(&self) -> Vec<Arc<Pod>> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Pod>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<Listed> for node::PodState {
    fn from(listed: Listed) -> Self {
        Self {
            pod: Some(listed.info.to_wire()),
            not_enrolled_reason: listed.reason,
            container_id: listed.sandbox,
            weaker_reason: listed.weaker,
        }
    }
}

/// Runs system calls that block shortly, away from the runtime's threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EnrolError> + Send + 'static,
) -> Result<T, EnrolError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(EnrolError::Netns(super::netns::NetnsError::Thread(error.to_string()))))
}
