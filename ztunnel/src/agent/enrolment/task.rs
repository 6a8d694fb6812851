//! The one task that decides: pods as they start, pods as their labels change, and sandboxes as they end. Each pod is moved by
//! a task of its own, one thing after the other, so that no decision overtakes another.

mod moving;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mesh_proto::node;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};

use self::moving::{Moving, Then};
use super::found::{self, Found};
use super::{Admission, AdmissionError, Admitted, Checked, Known, NOBODY, Origin, Problems, Running, name};
use crate::agent::manager::{Held, Manager, ManagerError};
use crate::agent::netns::{inode_at, is_gone};
use crate::agent::pod::{EnrolError, PodInfo, Sandbox};
use crate::cni::decide::{Decision, Pass};
use crate::cni::knowledge::{self, ForeignKernel, PodName};
use crate::cni::passed::{Folder, Passed, PassedPod};

/// How often what failed is tried again, and namespaces that are gone are forgotten.
const ROUND: Duration = Duration::from_secs(5);
/// Longest wait before something that failed is tried again.
const LONGEST: Duration = Duration::from_secs(60);
/// How often the file for the plugin is written although nothing changed: the plugin does not believe an old one.
const REFRESH: Duration = Duration::from_mins(15);
/// Ends of sandboxes that are remembered.
const MAX_ENDED: usize = 1024;

/// What the task is asked.
pub enum Command {
    /// A pod is about to start.
    Admit { admission: Box<Admission>, netns: OwnedFd, done: oneshot::Sender<Result<Admitted, AdmissionError>> },
    /// A sandbox ends.
    Delete { uid: String, sandbox: String, asked_at_ms: u64, done: oneshot::Sender<Result<(), ManagerError>> },
    /// What is known of a pod that is not enrolled.
    Check { sandbox: String, done: oneshot::Sender<Option<Checked>> },
    /// All sandboxes but these have ended.
    Prune { valid: Vec<String>, asked_at_ms: u64, done: oneshot::Sender<usize> },
}

/// Who waits for an answer.
type Done<T> = oneshot::Sender<T>;

/// The task's state.
pub struct Task {
    manager: Manager,
    known: watch::Receiver<Arc<Known>>,
    file: PathBuf,
    written: Option<Instant>,
    folder: Folder,
    has_source: bool,
    /// By sandbox.
    passed: BTreeMap<String, Passed>,
    /// Sandboxes that ended, and when the runtime said so.
    ended: VecDeque<(String, u64)>,
    /// When the runtime asked for the sandboxes that this agent admitted.
    asked: HashMap<String, u64>,
    /// By UID.
    failures: HashMap<String, Failure>,
    moving: Moving,
    tell: Tell,
}

/// Who wants to know what became of pods.
pub struct Tell {
    /// Why pods are not where their labels say.
    pub problems: watch::Sender<Problems>,
    /// Told after every change.
    pub changed: Arc<Notify>,
}

/// Why labels could not be followed, and when it is tried again.
struct Failure {
    reason: String,
    wait: Duration,
    next: Instant,
}

impl Task {
    pub(super) fn new(
        manager: Manager,
        known: watch::Receiver<Arc<Known>>,
        file: PathBuf,
        folder: Folder,
        has_source: bool,
        tell: Tell,
    ) -> Self {
        Self {
            manager,
            known,
            file,
            written: None,
            folder,
            has_source,
            passed: BTreeMap::new(),
            ended: VecDeque::new(),
            asked: HashMap::new(),
            failures: HashMap::new(),
            moving: Moving::default(),
            tell,
        }
    }

    pub(super) async fn run(mut self, mut queue: mpsc::Receiver<Command>) {
        let mut rounds = tokio::time::interval(ROUND);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut followed = self.has_source;
        loop {
            tokio::select! {
                command = queue.recv() => match command {
                    Some(command) => self.carry_out(command).await,
                    None => return,
                },
                Some((then, deferred)) = self.moving.next() => {
                    if let Some(then) = then {
                        then(&mut self);
                    }
                    for command in deferred {
                        self.carry_out(command).await;
                    }
                }
                changed = self.known.changed(), if followed => {
                    if changed.is_err() {
                        tracing::error!("the source of labels ended; what it said last stays in force");
                        followed = false;
                    }
                    self.write().await;
                    self.follow().await;
                }
                _ = rounds.tick() => {
                    self.look_after_passed().await;
                    self.write_if_old().await;
                    self.follow().await;
                }
            }
            self.tell();
        }
    }

    fn tell(&self) {
        let problems: Problems =
            self.failures.iter().map(|(uid, failure)| (uid.clone(), failure.reason.clone())).collect();
        self.tell.problems.send_if_modified(|before| {
            let is_news = *before != problems;
            if is_news {
                *before = problems;
            }
            is_news
        });
        self.tell.changed.notify_one();
    }

    /// An answer that nobody waits for any more is dropped: the work is done all the same.
    async fn carry_out(&mut self, command: Command) {
        match self.moving.defer(command) {
            Some(Command::Admit { admission, netns, done }) => self.admit(*admission, netns, done),
            Some(Command::Delete { uid, sandbox, asked_at_ms, done }) => self.delete(uid, sandbox, asked_at_ms, done),
            Some(Command::Check { sandbox, done }) => drop(done.send(self.check(&sandbox))),
            Some(Command::Prune { valid, asked_at_ms, done }) => self.prune(&valid, asked_at_ms, done).await,
            // It comes again.
            None => {}
        }
    }

    fn known(&self) -> Arc<Known> {
        Arc::clone(&self.known.borrow())
    }

    fn admit(&mut self, admission: Admission, netns: OwnedFd, done: Done<Result<Admitted, AdmissionError>>) {
        let (uid, sandbox) = (admission.pod.uid.clone(), admission.sandbox.clone());
        let answer = move |admitted: Result<Admitted, AdmissionError>| {
            match &admitted {
                Ok(Admitted::Enrolled(why)) => tracing::info!(pod = uid, sandbox, why, "admitted: enrolled"),
                Ok(Admitted::Passed(why)) => tracing::info!(pod = uid, sandbox, %why, "admitted: passes"),
                Err(error) => tracing::warn!(pod = uid, sandbox, %error, "not admitted"),
            }
            let _ = done.send(admitted);
        };
        if self.ended.iter().any(|(ended, at)| *ended == admission.sandbox && *at > admission.asked_at_ms) {
            return answer(Err(AdmissionError::Ended));
        }
        self.asked.insert(admission.sandbox.clone(), admission.asked_at_ms);
        let known = self.known();
        match known.knowledge.decide(name(&admission), &NOBODY) {
            Decision::Pass(pass) => self.pass(admission, netns, pass, answer),
            Decision::Enrol(why) => {
                if let Some(foreign) = known.knowledge.foreign_kernel(name(&admission)) {
                    return answer(Err(foreign.into()));
                }
                let account = known.knowledge.pod(name(&admission)).map(|known| known.service_account.clone());
                let account = account.unwrap_or(admission.pod.service_account);
                if account.is_empty() {
                    return answer(Err(AdmissionError::NoIdentity(self.has_source)));
                }
                let pod = node::Pod { service_account: account, ..admission.pod };
                let info = match PodInfo::try_from(Some(pod)) {
                    Ok(info) => info,
                    Err(error) => return answer(Err(ManagerError::from(EnrolError::from(error)).into())),
                };
                let (uid, manager) = (info.uid.clone(), self.manager.clone());
                let sandbox = Sandbox { id: admission.sandbox, path: admission.netns_path };
                self.moving.begin(uid.clone(), async move {
                    let enrolled = manager.enrol(info, netns, sandbox).await;
                    Box::new(move |task: &mut Self| {
                        if enrolled.is_ok() {
                            task.forget_passed(&uid);
                        }
                        answer(enrolled.map(|()| Admitted::Enrolled(why.to_string())).map_err(AdmissionError::from));
                    }) as Then
                });
            }
        }
    }

    /// Remembered before it starts: an agent that is ended here finds it again.
    fn pass(
        &mut self,
        admission: Admission,
        netns: OwnedFd,
        pass: Pass,
        answer: impl FnOnce(Result<Admitted, AdmissionError>) + Send + 'static,
    ) {
        let inode = match File::from(netns).metadata() {
            Ok(found) => found.ino(),
            Err(error) => return answer(Err(AdmissionError::Netns(error))),
        };
        let Admission { pod, mut netns_path, sandbox, .. } = admission;
        if inode_at(&netns_path) != Some(inode) {
            tracing::warn!(
                pod = pod.uid,
                "its network namespace is not at the path given; a later label needs a restart"
            );
            netns_path = PathBuf::new();
        }
        let (uid, manager) = (pod.uid.clone(), self.manager.clone());
        self.moving.begin(uid.clone(), async move {
            // It may have been enrolled in an earlier sandbox, under earlier labels.
            let withdrawn = manager.withdraw(uid.clone(), String::new()).await;
            Box::new(move |task: &mut Self| {
                if let Err(error) = withdrawn {
                    return answer(Err(error.into()));
                }
                task.forget_passed(&uid);
                let addresses = pod.addresses.iter().filter_map(|bytes| address(bytes)).collect();
                let remembered = PassedPod {
                    uid,
                    name: pod.name,
                    namespace: pod.namespace,
                    service_account: pod.service_account,
                    addresses,
                };
                task.remember(Passed::new(remembered, &sandbox, &netns_path, inode));
                answer(Ok(Admitted::Passed(pass)));
            }) as Then
        });
    }

    fn remember(&mut self, passed: Passed) {
        if let Err(error) = self.folder.save(&passed) {
            tracing::error!(pod = passed.uid, %error, "cannot be remembered over a restart of the agent");
        }
        self.passed.insert(passed.sandbox.clone(), passed);
    }

    fn forget_passed(&mut self, uid: &str) {
        self.failures.remove(uid);
        let sandboxes: Vec<String> =
            self.passed.values().filter(|passed| passed.uid == uid).map(|passed| passed.sandbox.clone()).collect();
        for sandbox in sandboxes {
            self.forget_sandbox(&sandbox);
        }
    }

    fn forget_sandbox(&mut self, sandbox: &str) {
        self.passed.remove(sandbox);
        if let Err(error) = self.folder.remove(sandbox) {
            tracing::warn!(sandbox, %error, "cannot be forgotten");
        }
    }

    fn delete(&mut self, uid: String, sandbox: String, asked_at_ms: u64, done: Done<Result<(), ManagerError>>) {
        if sandbox.is_empty() {
            self.forget_passed(&uid);
        } else {
            self.asked.remove(&sandbox);
            if self.passed.contains_key(&sandbox) {
                self.forget_sandbox(&sandbox);
            }
            self.ended.retain(|(ended, _)| *ended != sandbox);
            self.ended.push_back((sandbox.clone(), asked_at_ms));
            if self.ended.len() > MAX_ENDED {
                self.ended.pop_front();
            }
        }
        let manager = self.manager.clone();
        self.moving.begin(uid.clone(), async move {
            let withdrawn = manager.withdraw(uid, sandbox).await;
            Box::new(move |_: &mut Self| drop(done.send(withdrawn))) as Then
        });
    }

    fn check(&self, sandbox: &str) -> Option<Checked> {
        let passed = self.passed.get(sandbox)?;
        match self.known().knowledge.decide(named(passed), &NOBODY) {
            Decision::Pass(pass) => Some(Checked::Passed(pass.to_string())),
            // It will be enrolled shortly; until then it is not as it should be.
            Decision::Enrol(_) => None,
        }
    }

    async fn prune(&mut self, valid: &[String], asked_at_ms: u64, done: Done<usize>) {
        let valid: HashSet<&str> = valid.iter().map(String::as_str).collect();
        let mut ended = Vec::new();
        for pod in self.manager.pods() {
            ended.push((pod.info.uid.clone(), pod.sandbox().id, pod.netns().inode()));
        }
        ended.extend(self.passed.values().map(|one| (one.uid.clone(), one.sandbox.clone(), one.netns_inode)));
        ended.retain(|(_, sandbox, _)| {
            let is_later = self.asked.get(sandbox).is_some_and(|asked| *asked > asked_at_ms);
            !sandbox.is_empty() && !valid.contains(sandbox.as_str()) && !is_later
        });
        let mut answers = Vec::new();
        for (uid, sandbox, inode) in ended {
            // Without a path the question is whether a process is in it.
            if !has_left(PathBuf::new(), inode).await {
                tracing::warn!(pod = uid, sandbox, "said to have ended, but processes run in it; it stays as it is");
                continue;
            }
            tracing::info!(pod = uid, sandbox, "ended, as the runtime's list says");
            let (done, answer) = oneshot::channel();
            answers.push((uid.clone(), answer));
            let deferred = self.moving.defer(Command::Delete { uid, sandbox, asked_at_ms, done });
            if let Some(Command::Delete { uid, sandbox, asked_at_ms, done }) = deferred {
                self.delete(uid, sandbox, asked_at_ms, done);
            }
        }
        tokio::spawn(async move {
            let mut pruned = 0;
            for (uid, answer) in answers {
                match answer.await {
                    Ok(Ok(())) => pruned += 1,
                    Ok(Err(error)) => tracing::warn!(pod = uid, %error, "cannot be withdrawn"),
                    // The agent stops.
                    Err(_) => return,
                }
            }
            let _ = done.send(pruned);
        });
    }

    /// Takes note of pods that the plugin let pass without an agent, and forgets those that are gone.
    async fn look_after_passed(&mut self) {
        let (folder, known) = (self.folder.clone(), self.passed.keys().cloned().collect::<HashSet<_>>());
        let loaded = tokio::task::spawn_blocking(move || folder.load(|sandbox| !known.contains(sandbox))).await;
        match loaded {
            Ok(Ok(loaded)) => self.passed.extend(loaded.into_iter().map(|passed| (passed.sandbox.clone(), passed))),
            Ok(Err(error)) => tracing::warn!(%error, "cannot read which pods passed"),
            // The runtime ends.
            Err(_) => return,
        }
        for passed in self.passed.values().cloned().collect::<Vec<_>>() {
            if has_left(passed.netns_path, passed.netns_inode).await {
                self.forget_sandbox(&passed.sandbox);
            }
        }
        let (passed, manager) = (&self.passed, &self.manager);
        let known = self.known.borrow().clone();
        let held: HashSet<String> = manager.held().into_iter().map(|held| held.info.uid).collect();
        let is_wanted = |pod: PodName<'_>| matches!(known.knowledge.decide(pod, &NOBODY), Decision::Enrol(_));
        let running = known.running.iter().filter(|running| {
            let uid = Some(running.uid.as_str());
            is_wanted(PodName { namespace: &running.namespace, name: &running.name, uid })
        });
        let wanted: HashSet<&str> = running.map(|running| running.uid.as_str()).collect();
        let is_late = |uid: &str| passed.values().any(|one| one.uid == *uid && is_wanted(named(one)));
        // Of one that is neither there nor to be there is nothing to say: what could not be withdrawn has left after all.
        self.failures.retain(|uid, _| held.contains(uid) || wanted.contains(uid.as_str()) || is_late(uid));
        let enrolled: HashSet<String> = manager.pods().iter().map(|pod| pod.sandbox().id).collect();
        // Of those on their way it is not known yet.
        if self.moving.is_empty() {
            self.asked.retain(|sandbox, _| passed.contains_key(sandbox) || enrolled.contains(sandbox));
        }
    }

    /// Leaves what is known to the plugin.
    async fn write(&mut self) {
        let (known, file) = (self.known(), self.file.clone());
        if known.origin != Origin::Source {
            return;
        }
        match tokio::task::spawn_blocking(move || knowledge::save(&file, &known.knowledge)).await {
            Ok(Ok(())) => self.written = Some(Instant::now()),
            Ok(Err(error)) => tracing::error!(%error, "cannot leave labels to the plugin"),
            // The runtime ends.
            Err(_) => {}
        }
    }

    async fn write_if_old(&mut self) {
        if self.written.is_none_or(|written| written.elapsed() > REFRESH) {
            self.write().await;
        }
    }

    /// Brings pods that run to where their labels say. Only what the source says for certain moves a pod.
    async fn follow(&mut self) {
        let known = self.known();
        if known.origin != Origin::Source {
            return;
        }
        for held in self.manager.held() {
            let info = &held.info;
            let uid = Some(info.uid.as_str()).filter(|uid| *uid != held.sandbox.id);
            let named = match (info.name.as_str(), uid) {
                // Its file is lost, and its object, if there is one, tells the name.
                ("", Some(uid)) => known.knowledge.name_of(uid),
                (name, uid) => Some(PodName { namespace: &info.namespace, name, uid }),
            };
            if let Some(named) = named
                && let Decision::Pass(pass) = known.knowledge.decide(named, &NOBODY)
                && self.is_due(&info.uid)
            {
                let (name, namespace) = (named.name, named.namespace);
                tracing::info!(pod = info.uid, name, namespace, why = %pass, "to be withdrawn while it runs");
                self.withdraw(&held);
            }
        }
        for passed in self.passed.values().cloned().collect::<Vec<_>>() {
            if let Some(pod) = self.manager.pod(&passed.uid) {
                // Here: an agent was ended before it forgot that the pod had passed. In another sandbox: that one counts.
                let is_wanted = !matches!(known.knowledge.decide(named(&passed), &NOBODY), Decision::Pass(_));
                if is_wanted && pod.sandbox().id == passed.sandbox {
                    self.forget_sandbox(&passed.sandbox);
                }
                continue;
            }
            if let Decision::Enrol(why) = known.knowledge.decide(named(&passed), &NOBODY)
                && why.is_certain()
                && self.is_due(&passed.uid)
            {
                let account = known.knowledge.pod(named(&passed)).map(|pod| pod.service_account.clone());
                let (uid, name, namespace) = (&passed.uid, &passed.name, &passed.namespace);
                tracing::info!(pod = uid, name, namespace, %why, "to be enrolled while it runs");
                let foreign = known.knowledge.foreign_kernel(named(&passed));
                self.enrol_late(passed, account.unwrap_or_default(), foreign);
            }
        }
        self.follow_unannounced(&known);
        if known.lists_pods {
            let uids = known.knowledge.pods.values().flat_map(BTreeMap::values).flat_map(|pod| &pod.uids);
            self.manager.listed(uids.cloned().collect()).await;
        }
    }

    /// Pods that ran before anybody announced them, as all do on a node that the mesh is new to.
    fn follow_unannounced(&mut self, known: &Known) {
        for running in &known.running {
            let is_announced = running.uids.iter().any(|uid| {
                let has_passed = || self.passed.values().any(|passed| passed.uid == *uid);
                self.moving.contains(uid) || self.manager.pod(uid).is_some() || has_passed()
            });
            let named = PodName { namespace: &running.namespace, name: &running.name, uid: Some(&running.uid) };
            if !is_announced
                && !running.ends
                && matches!(known.knowledge.decide(named, &NOBODY), Decision::Enrol(why) if why.is_certain())
                && self.is_due(&running.uid)
            {
                let (uid, namespace, name) = (&running.uid, &running.namespace, &running.name);
                tracing::info!(pod = uid, name, namespace, "runs and was never announced; to be enrolled");
                self.enrol_found(running.clone(), known.knowledge.foreign_kernel(named));
            }
        }
    }

    fn enrol_found(&mut self, pod: Running, foreign: Option<ForeignKernel>) {
        let (known_as, manager, uids) = (pod.uid.clone(), self.manager.clone(), pod.uids.clone());
        let opened = self.moving.search(move || open_found(&uids));
        // As the runtime will name it.
        let uid = pod.uids.last().cloned().unwrap_or(pod.uid);
        let named = uid.clone();
        let enrolled = async move {
            foreign.map_or(Ok(()), |foreign| Err(foreign.to_string()))?;
            let (netns, path) = opened.await?;
            let info = PodInfo {
                uid,
                name: pod.name,
                namespace: pod.namespace,
                service_account: pod.service_account,
                addresses: pod.addresses,
            };
            enrol(&manager, &info, netns, Sandbox { id: String::new(), path }).await
        };
        self.follow_to(named, known_as, enrolled, |_| {});
    }

    /// A pod that runs has lost its label.
    fn withdraw(&mut self, Held { info, sandbox, netns_inode }: &Held) {
        let remembered = PassedPod {
            uid: info.uid.clone(),
            name: info.name.clone(),
            namespace: info.namespace.clone(),
            service_account: info.service_account.clone(),
            addresses: info.addresses.clone(),
        };
        if sandbox.id.is_empty() {
            tracing::warn!(pod = info.uid, "its sandbox is not known; a later label needs a restart");
        } else {
            // First: an agent that is ended here finds it again, and finds it enrolled.
            self.remember(Passed::new(remembered, &sandbox.id, &sandbox.path, *netns_inode));
        }
        let (uid, manager) = (info.uid.clone(), self.manager.clone());
        let withdrawn = async move { manager.withdraw(uid, String::new()).await.map_err(|error| error.to_string()) };
        self.follow_to(info.uid.clone(), info.uid.clone(), withdrawn, |_| {});
    }

    /// A pod that runs has got the label.
    fn enrol_late(&mut self, passed: Passed, service_account: String, foreign: Option<ForeignKernel>) {
        let Passed { netns_path, netns_inode, uid, sandbox, .. } = passed.clone();
        let (known_as, manager, forgotten) = (uid.clone(), self.manager.clone(), sandbox.clone());
        let opened = self.moving.search(move || namespace_of(netns_path, netns_inode, uid));
        let enrolled = async move {
            foreign.map_or(Ok(()), |foreign| Err(foreign.to_string()))?;
            let (netns, path) = opened.await?;
            let info = PodInfo {
                uid: passed.uid,
                name: passed.name,
                namespace: passed.namespace,
                service_account,
                addresses: passed.addresses,
            };
            enrol(&manager, &info, netns, Sandbox { id: sandbox, path }).await
        };
        self.follow_to(known_as.clone(), known_as, enrolled, move |task| task.forget_sandbox(&forgotten));
    }

    /// Brings a pod to where its labels say. What becomes of it is noted under the UID that the source knows it by.
    fn follow_to(
        &mut self,
        uid: String,
        known_as: String,
        way: impl Future<Output = Result<(), String>> + Send + 'static,
        arrived: impl FnOnce(&mut Self) + Send + 'static,
    ) {
        self.moving.begin(uid, async move {
            let done = way.await;
            Box::new(move |task: &mut Self| {
                if done.is_ok() {
                    arrived(task);
                }
                task.note(&known_as, done);
            }) as Then
        });
    }

    fn is_due(&self, uid: &str) -> bool {
        !self.moving.contains(uid) && self.failures.get(uid).is_none_or(|failure| failure.next <= Instant::now())
    }

    /// Logs what became of a change, the same reason once.
    fn note(&mut self, uid: &str, done: Result<(), String>) {
        let Err(reason) = done else {
            self.failures.remove(uid);
            tracing::info!(pod = uid, "done, as its labels say");
            return;
        };
        let before = self.failures.get(uid);
        if before.is_none_or(|before| before.reason != reason) {
            tracing::error!(pod = uid, reason, "cannot be brought to where its labels say; trying again");
        }
        let wait = before.map_or(ROUND, |before| (before.wait * 2).min(LONGEST));
        self.failures.insert(uid.to_owned(), Failure { reason, wait, next: Instant::now() + wait });
    }
}

async fn enrol(manager: &Manager, info: &PodInfo, netns: File, sandbox: Sandbox) -> Result<(), String> {
    // As if it had been announced: what cannot be a pod is refused.
    let info = PodInfo::try_from(Some(info.to_wire())).map_err(|error| error.to_string())?;
    manager.enrol(info, netns.into(), sandbox).await.map_err(|error| error.to_string())
}

fn named(passed: &Passed) -> PodName<'_> {
    let uid = (passed.uid != passed.sandbox).then_some(passed.uid.as_str());
    PodName { namespace: &passed.namespace, name: &passed.name, uid }
}

/// Whether a namespace has left its path and no process is in it. What cannot be found out counts as no.
async fn has_left(path: PathBuf, inode: u64) -> bool {
    tokio::task::spawn_blocking(move || is_gone(Path::new(&path), inode)).await.unwrap_or(false)
}

/// The namespace of a pod that was announced, and its path: where it was said to be, else where the pod's processes are.
/// Blocks.
fn namespace_of(path: PathBuf, inode: u64, uid: String) -> Result<(File, PathBuf), String> {
    if inode_at(&path) == Some(inode) {
        let netns = File::open(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        return match netns.metadata() {
            Ok(opened) if opened.ino() == inode => Ok((netns, path)),
            _ => Err(String::from("its network namespace was replaced")),
        };
    }
    let unknown = |error| format!("its network namespace is not known or not at its path any more: {error}");
    let (netns, path) = open_found(&[uid]).map_err(unknown)?;
    match netns.metadata() {
        Ok(opened) if inode == 0 || opened.ino() == inode => Ok((netns, path)),
        _ => Err(unknown(String::from("its processes are in another; restart the pod"))),
    }
}

/// The namespace that the processes of a pod are in, and its path. Blocks.
fn open_found(uids: &[String]) -> Result<(File, PathBuf), String> {
    let Found { open, path, inode } = found::find(uids).map_err(|error| error.to_string())?;
    let netns = File::open(&open).map_err(|error| format!("{}: {error}", open.display()))?;
    match netns.metadata() {
        Ok(opened) if opened.ino() == inode => Ok((netns, path)),
        _ => Err(String::from("its process ended while its namespace was looked for")),
    }
}

fn address(bytes: &[u8]) -> Option<std::net::IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(Into::into),
        16 => <[u8; 16]>::try_from(bytes).ok().map(Into::into),
        _ => None,
    }
}
