//! Which pods are to be enrolled, by the labels of pods and namespaces: where the labels come from ([`Source`]), what was
//! known of them when the agent last ran (a file that the CNI plugin reads too), and one task that admits pods as they
//! start and follows the labels afterwards.

mod directory;
pub(super) mod found;
mod fresh;
pub mod kubernetes;
mod objects;
mod removal;
mod source;
mod task;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use mesh_proto::node;
use tokio::sync::{Notify, mpsc, oneshot, watch};

pub use directory::{Directory, DirectoryError};
pub use fresh::Ask;
pub use kubernetes::Kubernetes;
pub use removal::Removal;
pub use source::{AnySource, SourceError};

use super::manager::{Listed, Manager, ManagerError};
use super::netns::NetnsError;
use super::pod::EnrolError;
use crate::cni::decide::{Decision, Exclusions, Pass};
use crate::cni::knowledge::{self, ForeignKernel, Knowledge, PodName};
use crate::cni::passed::{Folder, is_sandbox_id};
use task::{Command, Task, Tell};

/// Commands that wait.
const QUEUE: usize = 256;
/// How long a pod that is about to start waits for the source to know it. Its runtime asks again after that.
const SOURCE_PATIENCE: Duration = Duration::from_secs(2);
/// Oldest file of an earlier agent that is believed.
const MAX_AGE: Duration = Duration::from_hours(24);

/// Where labels come from.
pub trait Source: Send + 'static {
    /// A way to ask for what a label says now, where there is one.
    fn ask(&self) -> Option<Ask> {
        None
    }

    /// Publishes everything that it knows, each time that it changes. Ends when nobody listens any more.
    fn run(self, knowledge: watch::Sender<Arc<Known>>) -> impl Future<Output = ()> + Send;
}

/// What is known of labels, and since when.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// The labels.
    pub knowledge: Knowledge,
    /// Who says so.
    pub origin: Origin,
    /// Pods that run on this node, where the source tells.
    pub running: Vec<Running>,
    /// Whether every pod of this node is among those of `knowledge`, by UID.
    pub lists_pods: bool,
}

/// A pod that runs on this node in a network of its own.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Running {
    /// Its UID.
    pub uid: String,
    /// All UIDs by which the kubelet and the runtime may name it; see [`KnownPod`](knowledge::KnownPod).
    pub uids: Vec<String>,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its service account.
    pub service_account: String,
    /// Its addresses, the primary one first.
    pub addresses: Vec<IpAddr>,
    /// It is being deleted.
    pub ends: bool,
    /// Its annotation says that it is captured.
    pub is_confirmed: bool,
    /// What controls it.
    pub owner: Option<OwnerReference>,
}

impl Eq for Running {}

/// Why pods are not where their labels say, by UID.
pub type Problems = BTreeMap<String, String>;

/// Who says what is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    /// Nobody yet, or ever.
    #[default]
    Nobody,
    /// An earlier agent's file: good enough to let a pod start, not to change one that runs.
    File,
    /// The source.
    Source,
}

/// A pod that is about to start.
#[derive(Debug)]
pub struct Admission {
    /// The pod; its service account may be empty.
    pub pod: node::Pod,
    /// Path of its network namespace.
    pub netns_path: PathBuf,
    /// The runtime's id of its sandbox.
    pub sandbox: String,
    /// When the runtime asked, in milliseconds since the machine booted.
    pub asked_at_ms: u64,
}

/// What became of a pod that was to be admitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admitted {
    /// Enrolled, for this reason.
    Enrolled(String),
    /// Not to be enrolled.
    Passed(Pass),
}

/// Why a pod was not admitted.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionError {
    /// The sandbox has no id, or an unusual one.
    #[error("the id of the sandbox is empty, too long or holds unusual characters")]
    Sandbox,
    /// The sandbox was deleted after the runtime asked.
    #[error("its sandbox has ended meanwhile")]
    Ended,
    /// Nothing is known of it, so it would have to be enrolled; but under which identity?
    #[error(
        "neither the agent's source of labels nor the runtime says under which service account it runs{}",
        if *.0 {
            "; the source does not know this pod (yet)"
        } else {
            "; the agent has no source (--kubernetes or --source-dir)"
        }
    )]
    NoIdentity(bool),
    /// It runs where nothing can be captured.
    #[error(transparent)]
    ForeignKernel(#[from] ForeignKernel),
    /// The label of its namespace has changed, and the watch of namespaces does not say so yet.
    #[error("the label of its namespace was set just now and is not known here yet; the runtime asks again")]
    Behind,
    /// The agent could not do it.
    #[error(transparent)]
    Manager(#[from] ManagerError),
    /// Its namespace's descriptor.
    #[error("its network namespace cannot be looked at: {0}")]
    Netns(#[source] std::io::Error),
}

impl AdmissionError {
    /// Whether it may go away by itself.
    #[must_use]
    pub const fn may_pass(&self) -> bool {
        match self {
            Self::Sandbox | Self::Ended | Self::ForeignKernel(_) => false,
            Self::NoIdentity(has_source) => *has_source,
            Self::Manager(error) => {
                !matches!(error, ManagerError::Pod(EnrolError::Invalid(_) | EnrolError::Netns(NetnsError::Host)))
            }
            Self::Behind | Self::Netns(_) => true,
        }
    }
}

/// A pod as [`Enrolment::check`] finds it.
#[derive(Debug)]
pub enum Checked {
    /// Enrolled, or why not wholly.
    Enrolled(Listed),
    /// It passed, and still would.
    Passed(String),
}

/// The way to the task. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Enrolment {
    commands: mpsc::Sender<Command>,
    known: watch::Receiver<Arc<Known>>,
    manager: Manager,
    has_source: bool,
    ask: Option<Ask>,
    problems: watch::Receiver<Problems>,
    changed: Arc<Notify>,
}

impl Enrolment {
    /// Starts to follow the source, from what an earlier agent left in `run_dir`. Without a source every pod that is to be
    /// admitted is enrolled. Needs a tokio runtime.
    #[must_use]
    pub fn start(run_dir: &Path, manager: Manager, source: Option<impl Source>) -> Self {
        let file = knowledge::path(run_dir);
        let has_source = source.is_some();
        let ask = source.as_ref().and_then(Source::ask);
        let (publish, known) = watch::channel(Arc::new(earlier(&file, has_source)));
        if let Some(source) = source {
            tokio::spawn(source.run(publish));
        }
        let (commands, queue) = mpsc::channel(QUEUE);
        let (say, problems) = watch::channel(Problems::new());
        let changed = Arc::new(Notify::new());
        let tell = Tell { problems: say, changed: Arc::clone(&changed) };
        let task = Task::new(manager.clone(), known.clone(), file, Folder::new(run_dir), has_source, tell);
        tokio::spawn(task.run(queue));
        Self { commands, known, manager, has_source, ask, problems, changed }
    }

    /// Tells the Kubernetes API what becomes of this node's pods, until the agent ends.
    pub async fn report(self, kubernetes: Kubernetes) {
        let Self { known, manager, problems, changed, .. } = self;
        kubernetes::report::Report { kubernetes, known, manager, problems, changed }.run().await;
    }

    /// The pods that are enrolled.
    #[must_use]
    pub const fn manager(&self) -> &Manager {
        &self.manager
    }

    /// Decides about a pod that is about to start, and does what was decided; when this returns it is in force. A pod that
    /// the source does not know is waited for.
    ///
    /// # Errors
    /// When it may not start.
    pub async fn admit(&self, admission: Admission, netns: OwnedFd) -> Result<Admitted, AdmissionError> {
        if !is_sandbox_id(&admission.sandbox) {
            return Err(AdmissionError::Sandbox);
        }
        if self.has_source {
            let mut known = self.known.clone();
            let told = known.wait_for(|known| {
                known.origin == Origin::Source && is_certain(known.knowledge.decide(name(&admission), &NOBODY))
            });
            // Unknown: the task decides what to do about it.
            let _ = tokio::time::timeout(SOURCE_PATIENCE, told).await;
        }
        if let Some(ask) = &self.ask {
            let now = ask.namespace(&admission.pod.namespace);
            let settled = fresh::settle(&self.known, name(&admission), now, SOURCE_PATIENCE).await;
            settled.map_err(|fresh::Behind| AdmissionError::Behind)?;
        }
        self.ask(|done| Command::Admit { admission: Box::new(admission), netns, done }).await?
    }

    /// A sandbox ends: whatever is in force for it is taken back. `asked_at_ms` as in [`Admission`].
    ///
    /// # Errors
    /// When something of it stays.
    pub async fn delete(&self, uid: String, sandbox: String, asked_at_ms: u64) -> Result<(), ManagerError> {
        self.ask(|done| Command::Delete { uid, sandbox, asked_at_ms, done }).await?
    }

    /// How a pod is, asked from the kernel now; `None` if it is not known.
    ///
    /// # Errors
    /// When the agent stops.
    pub async fn check(&self, uid: &str, sandbox: &str) -> Result<Option<Checked>, ManagerError> {
        if let Some(listed) = self.manager.list().await?.into_iter().find(|listed| listed.info.uid == uid) {
            return Ok(Some(Checked::Enrolled(listed)));
        }
        let sandbox = sandbox.to_owned();
        self.ask(|done| Command::Check { sandbox, done }).await
    }

    /// Gives up sandboxes that are not among these, if no process runs in them. Returns how many.
    ///
    /// # Errors
    /// When the agent stops.
    pub async fn prune(&self, valid: Vec<String>, asked_at_ms: u64) -> Result<usize, ManagerError> {
        self.ask(|done| Command::Prune { valid, asked_at_ms, done }).await
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, ManagerError> {
        let (done, answer) = oneshot::channel();
        self.commands.send(command(done)).await.map_err(|_| ManagerError::Stopping)?;
        answer.await.map_err(|_| ManagerError::Stopping)
    }
}

/// The plugin has let pass whom its configuration excludes; the agent goes by labels alone.
static NOBODY: Exclusions = Exclusions { system_namespace: String::new(), namespaces: Vec::new() };

/// The pod's name. A runtime that gives no UID makes the plugin use the sandbox's id for it.
fn name(admission: &Admission) -> PodName<'_> {
    let pod = &admission.pod;
    PodName {
        namespace: &pod.namespace,
        name: &pod.name,
        uid: (pod.uid != admission.sandbox).then_some(pod.uid.as_str()),
    }
}

const fn is_certain(decision: Decision) -> bool {
    match decision {
        Decision::Pass(_) => true,
        Decision::Enrol(why) => why.is_certain(),
    }
}

/// What an earlier agent knew. An agent without a source removes it: the plugin must not go by it either.
fn earlier(file: &Path, has_source: bool) -> Known {
    if !has_source {
        if let Err(error) = crate::cni::files::remove(file) {
            tracing::warn!(%error, "cannot remove what an earlier agent knew of labels");
        }
        return Known::default();
    }
    match knowledge::load(file, MAX_AGE) {
        Ok(Some(knowledge)) => Known { knowledge, origin: Origin::File, running: Vec::new(), lists_pods: false },
        Ok(None) => Known::default(),
        Err(error) if error.is_absence() => Known::default(),
        Err(error) => {
            tracing::warn!(%error, "cannot use what an earlier agent knew of labels");
            Known::default()
        }
    }
}
