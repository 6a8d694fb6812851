//! What was found out: of the API server, and of each part of the mesh. Plain data, read from what others say; every field
//! that is not there is the default.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::AskError;

/// Label of pods and namespaces that asks for the mesh.
pub const MODE: &str = "istio.io/dataplane-mode";
/// Annotation by which an agent says that a pod is captured.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";
/// Label that names a part of the mesh.
pub const PART: &str = "app.kubernetes.io/name";

/// Everything that `status` and `check` judge.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Version of the API server, such as `v1.36.2`.
    pub kubernetes: String,
    /// Namespace of the mesh's own pods.
    pub system_namespace: String,
    /// What is installed, by workload: how many pods of it there should be; none where it is not there.
    pub desired: BTreeMap<Component, Option<i32>>,
    /// The nodes, by name.
    pub nodes: Vec<Node>,
    /// The label [`MODE`] of every namespace.
    pub namespaces: BTreeMap<String, Option<String>>,
    /// All pods but the mesh's own.
    pub pods: Vec<Pod>,
    /// What agents said last of pods that are not as their labels say, by UID of the pod.
    pub complaints: BTreeMap<String, String>,
    /// Why the mesh's CNI plugin refused last to make a pod's network, by UID of the pod.
    pub refused_starts: BTreeMap<String, String>,
    /// Replicas of the control plane.
    pub culvertd: Vec<Asked<Culvertd>>,
    /// Agents: what each has in force, as the kernel says.
    pub agents: Vec<Asked<Vec<AgentPod>>>,
    /// Proxies.
    pub proxies: Vec<Asked<Dump>>,
    /// Roots that the cluster publishes; why they are not known.
    pub roots: Option<Result<Vec<Root>, String>>,
    /// What could not be asked of the API server, by kind of object.
    pub unknown: BTreeMap<String, String>,
}

/// A part of the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Component {
    /// The control plane.
    Culvertd,
    /// The agent of a node.
    Agent,
    /// The proxy of a node.
    Proxy,
}

impl Component {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Culvertd, Self::Agent, Self::Proxy];

    /// The value of [`PART`], and the name of its Deployment or DaemonSet.
    pub fn workload(self) -> &'static str {
        match self {
            Self::Culvertd => "culvertd",
            Self::Agent => "culvert-node",
            Self::Proxy => "ztunnel",
        }
    }

    /// As people say it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Culvertd => "culvertd",
            Self::Agent => "agent",
            Self::Proxy => "proxy",
        }
    }
}

/// A node of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its kernel's release.
    pub kernel: String,
    /// Its condition `Ready` holds.
    pub ready: bool,
    /// Its operating system is Linux.
    pub linux: bool,
}

/// A pod of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// All UIDs by which its node may name it.
    pub uids: Vec<String>,
    /// Its node; empty until it is scheduled.
    pub node: String,
    /// `status.phase`.
    pub phase: String,
    /// It has an address, so its network was made.
    pub has_address: bool,
    /// It shares the node's network.
    pub host_network: bool,
    /// It is being deleted.
    pub ends: bool,
    /// Its label [`MODE`].
    pub mode: Option<String>,
    /// Its annotation says that it is captured.
    pub annotated: bool,
    /// It runs in a sandbox of its own kernel, by its runtime class.
    pub runtime_class: Option<String>,
}

/// A pod of the mesh's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which part.
    pub component: Component,
    /// Its pod.
    pub pod: String,
    /// Its node.
    pub node: String,
    /// The image that it runs.
    pub image: String,
    /// Its condition `Ready` holds.
    pub ready: bool,
    /// Why it cannot be asked; none if its container runs.
    pub not_running: Option<String>,
    /// It is being deleted, or has ended.
    pub ends: bool,
}

/// A pod of the mesh's own, and what it answered.
#[derive(Clone, Debug)]
pub struct Asked<T> {
    /// The pod.
    pub part: Part,
    /// Its answer, or why there is none.
    pub answer: Result<T, AskError>,
}

/// A pod as `ztunnel pods -o json` has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct AgentPod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The UID by which the node knows it.
    pub uid: String,
    /// The kernel says that it is captured.
    pub enrolled: bool,
    /// Why it is not.
    pub reason: String,
    /// Why it is held less firmly than others are; empty if it is not.
    pub weaker: String,
}

/// culvertd's `/status`, as far as it is judged.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Culvertd {
    /// Its version; empty if it does not say.
    pub version: String,
    /// It has read everything.
    pub synced: bool,
    /// What it accepted and refused.
    pub source: SourceReport,
    /// Its watches, by kind.
    pub watches: BTreeMap<String, Watch>,
    /// What takes effect otherwise than its author may expect.
    pub notes: Vec<Note>,
    /// Versions of what it serves.
    pub resources: Vec<Served>,
    /// Who follows it.
    pub clients: Vec<Client>,
}

/// What a source accepted and refused.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct SourceReport {
    /// What is refused.
    pub refused: Vec<Refused>,
}

/// An object that is not accepted.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct Refused {
    /// The object, as `Kind namespace/name`.
    pub object: String,
    /// Every mistake in it.
    pub problems: Vec<Mistake>,
    /// An earlier version of it stays in force.
    pub keeps_last_good: bool,
}

/// A mistake in an object.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct Mistake {
    /// Path of the field.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// What makes it right.
    pub fix: String,
}

/// How one watch is doing.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Watch {
    /// `pending`, `synced` or `absent`.
    pub state: String,
    /// What is wrong now.
    pub trouble: Option<String>,
}

/// What takes effect otherwise than its author may expect.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct Note {
    /// The object, as `Kind namespace/name`.
    pub object: String,
    /// How.
    pub reason: String,
}

/// What is served of one type.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Served {
    /// The type's URL.
    pub r#type: String,
    /// How many resources.
    pub resources: u64,
    /// The catalog's version.
    pub version: u64,
}

/// A client of the control plane.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Client {
    /// What it calls itself: `ztunnel~IP~pod.namespace~...`.
    pub node_id: String,
    /// Since when, RFC 3339.
    pub connected_since: String,
    /// What it follows.
    pub types: Vec<ClientType>,
}

/// One type of a client.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ClientType {
    /// The type's URL.
    pub r#type: String,
    /// It follows everything.
    pub wildcard: bool,
    /// Version of the last response.
    pub sent: u64,
    /// Version of the last response that it accepted.
    pub acked: u64,
    /// A response waits for its acknowledgement.
    pub in_flight: bool,
    /// What it refused.
    pub nacks: Vec<Nack>,
}

/// A refusal by a client.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Nack {
    /// The resource; empty if the client named none.
    pub resource: String,
    /// Why.
    pub reason: String,
    /// When, RFC 3339.
    pub at: String,
}

/// A proxy's `/config_dump`, as far as `status` and `check` judge it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Dump {
    /// Its version.
    pub version: String,
    /// How it follows the control plane.
    pub discovery: Discovery,
    /// Certificates.
    pub certificates: Vec<Certificate>,
    /// Everything else, for tables.
    #[serde(flatten)]
    pub rest: BTreeMap<String, Value>,
}

/// How a proxy follows the control plane.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Discovery {
    /// Since when it is connected, RFC 3339.
    pub connected_since: Option<String>,
    /// Since when it is not, RFC 3339.
    pub disconnected_since: Option<String>,
    /// Everything was told once.
    pub synced: bool,
    /// Why the last connection ended.
    pub last_error: Option<String>,
}

/// A certificate of a proxy.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Certificate {
    /// For whom.
    pub identity: String,
    /// `Pending`, `Valid` or `Expired`.
    pub state: String,
    /// Its serial number.
    pub serial: Option<String>,
    /// From when, RFC 3339.
    pub valid_from: Option<String>,
    /// Until when, RFC 3339.
    pub expires: Option<String>,
    /// Why the last attempt to renew it failed.
    pub last_error: Option<String>,
    /// SHA-256 of the roots that are trusted with it, hexadecimal.
    pub roots: Option<Vec<String>>,
}

/// A root certificate.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Root {
    /// SHA-256 of it, hexadecimal.
    pub fingerprint: String,
    /// Whose.
    pub subject: String,
    /// Until when, RFC 3339.
    pub expires: String,
}
