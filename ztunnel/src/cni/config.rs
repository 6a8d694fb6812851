//! The plugin's input: configuration on standard input, the rest in the environment.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use super::decide::{Exclusions, SYSTEM_NAMESPACE};
use super::error::CniError;
use super::knowledge::PodName;
use super::passed::is_sandbox_id;

/// Versions of the specification that the plugin follows, in order. The lists of several CNIs are still of 0.3.1, which
/// differs for a plugin that adds no interface only in that there is no CHECK.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The newest of them.
pub const NEWEST: &str = "1.1.0";
/// Where the agent listens unless the configuration says otherwise.
const DEFAULT_SOCKET: &str = "/run/culvert/cni.sock";
/// Longest path of a socket that the kernel takes.
const MAX_SOCKET: usize = 107;
/// Longest name in CNI_ARGS.
const MAX_NAME: usize = 253;

/// What the plugin takes from its configuration.
#[derive(Debug)]
pub struct Configuration {
    /// Version of the specification that the runtime speaks.
    pub version: String,
    /// The plugin's own settings.
    pub own: Own,
    /// The result of the plugins before this one.
    pub previous: Option<Value>,
    /// GC: the sandboxes that are there; `None` if the runtime gave no list.
    pub valid: Option<Vec<String>>,
}

/// The field `culvert` of the configuration.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Own {
    /// Where the agent listens; the folder is the one that it leaves its files in.
    pub agent_socket: PathBuf,
    /// Whether pods of this network are enrolled at all.
    pub enrolled: bool,
    /// Service account of pods of which the agent's source knows none.
    pub service_account: String,
    /// Namespace of the mesh's own pods.
    pub system_namespace: String,
    /// Namespaces whose pods are never enrolled; default `kube-system` and the system namespace.
    pub excluded_namespaces: Option<Vec<String>>,
    /// For how long ADD asks the agent, in seconds; the runtime must have more patience.
    pub patience_seconds: u64,
    /// Oldest file of the agent's that is believed while the agent is away, in seconds.
    pub max_age_seconds: u64,
    /// Where the plugin writes what it did; default `cni.log` beside the socket.
    pub log_file: Option<PathBuf>,
}

impl Default for Own {
    fn default() -> Self {
        Self {
            agent_socket: DEFAULT_SOCKET.into(),
            enrolled: true,
            service_account: String::new(),
            system_namespace: String::from(SYSTEM_NAMESPACE),
            excluded_namespaces: None,
            patience_seconds: 30,
            max_age_seconds: 24 * 3600,
            log_file: None,
        }
    }
}

impl Own {
    /// Which pods pass whatever their labels say.
    #[must_use]
    pub fn exclusions(&self) -> Exclusions {
        Exclusions::or_default(self.system_namespace.clone(), self.excluded_namespaces.clone())
    }

    /// The agent's folder.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        self.agent_socket.parent().unwrap_or(Path::new("/"))
    }

    /// For how long ADD asks the agent.
    #[must_use]
    pub const fn patience(&self) -> Duration {
        Duration::from_secs(self.patience_seconds)
    }

    fn validate(&self) -> Result<(), &'static str> {
        if !self.agent_socket.is_absolute() || self.agent_socket.as_os_str().len() > MAX_SOCKET {
            return Err("culvert.agentSocket is not an absolute path of at most 107 bytes");
        }
        if self.log_file.as_ref().is_some_and(|path| !path.is_absolute()) {
            return Err("culvert.logFile is not an absolute path");
        }
        if !(1..=600).contains(&self.patience_seconds) {
            return Err("culvert.patienceSeconds is not 1 to 600");
        }
        Ok(())
    }
}

impl Configuration {
    /// Reads it.
    ///
    /// # Errors
    /// When it is not JSON, of another version, or not valid.
    pub fn parse(text: &[u8]) -> Result<Self, CniError> {
        let wrong = |what: &str| CniError::Configuration(what.to_owned());
        let mut all: Value = serde_json::from_slice(text)?;
        let fields = all.as_object_mut().ok_or_else(|| wrong("it is not an object"))?;
        let version = match fields.get("cniVersion") {
            Some(Value::String(version)) => version.clone(),
            Some(_) => return Err(wrong("cniVersion is not text")),
            None => return Err(wrong("cniVersion is missing")),
        };
        if !VERSIONS.contains(&version.as_str()) {
            return Err(CniError::Version(version));
        }
        if !fields.get("name").and_then(Value::as_str).is_some_and(is_sandbox_id) {
            return Err(wrong("the network's name is missing or has unusual characters"));
        }
        let own: Own = match fields.remove("culvert") {
            None => Own::default(),
            // From a list, too, its fields could be read.
            Some(own) if !own.is_object() => return Err(wrong("culvert is not an object")),
            Some(own) => serde_json::from_value(own).map_err(|error| wrong(&format!("culvert: {error}")))?,
        };
        own.validate().map_err(wrong)?;
        let previous = match fields.remove("prevResult") {
            None | Some(Value::Null) => None,
            Some(previous @ Value::Object(_)) => Some(previous),
            Some(_) => return Err(wrong("prevResult is not an object")),
        };
        let valid = fields.remove("cni.dev/valid-attachments").map(|list| attachments(&list)).transpose();
        Ok(Self { version, own, previous, valid: valid.map_err(wrong)? })
    }

    /// Refuses what the version does not have yet.
    ///
    /// # Errors
    /// When the version is an earlier one.
    pub fn at_least(&self, version: &str) -> Result<(), CniError> {
        let place = |wanted: &str| VERSIONS.iter().position(|known| *known == wanted);
        if place(&self.version) >= place(version) { Ok(()) } else { Err(CniError::Version(self.version.clone())) }
    }
}

/// The sandboxes of `cni.dev/valid-attachments`.
fn attachments(list: &Value) -> Result<Vec<String>, &'static str> {
    const WRONG: &str = "cni.dev/valid-attachments is not a list of attachments with a containerID";
    let list = list.as_array().ok_or(WRONG)?;
    list.iter().map(|one| Ok(one.get("containerID").and_then(Value::as_str).ok_or(WRONG)?.to_owned())).collect()
}

/// How variables are looked up; one that is not UTF-8 is an error.
pub type Lookup<'a> = &'a dyn Fn(&'static str) -> Result<Option<String>, CniError>;

/// The environment of ADD, DEL and CHECK.
#[derive(Debug)]
pub struct Attachment {
    /// The runtime's id of the sandbox.
    pub sandbox: String,
    /// The pod's network namespace; empty if not given.
    pub netns: PathBuf,
    /// Kubernetes' UID of the pod; empty if not given.
    pub uid: String,
    /// The pod's name; empty if not given.
    pub name: String,
    /// The pod's namespace; empty if not given.
    pub namespace: String,
    /// The pod's service account; empty if not given.
    pub service_account: String,
}

impl Attachment {
    /// Reads it.
    ///
    /// # Errors
    /// When a variable that all of the three commands need is missing, or one is invalid.
    pub fn read(lookup: Lookup<'_>) -> Result<Self, CniError> {
        let given = |name: &'static str| lookup(name).map(Option::unwrap_or_default);
        let sandbox = given("CNI_CONTAINERID")?;
        if !is_sandbox_id(&sandbox) {
            return Err(CniError::Environment("CNI_CONTAINERID"));
        }
        if !is_interface(&given("CNI_IFNAME")?) {
            return Err(CniError::Environment("CNI_IFNAME"));
        }
        let mut arguments = arguments(&given("CNI_ARGS")?)?;
        let mut argument = |name: &str| arguments.remove(name).unwrap_or_default();
        let infrastructure = argument("K8S_POD_INFRA_CONTAINER_ID");
        if !infrastructure.is_empty() && infrastructure != sandbox {
            return Err(CniError::Environment("K8S_POD_INFRA_CONTAINER_ID, which differs from CNI_CONTAINERID,"));
        }
        Ok(Self {
            netns: given("CNI_NETNS")?.into(),
            uid: argument("K8S_POD_UID"),
            name: argument("K8S_POD_NAME"),
            namespace: argument("K8S_POD_NAMESPACE"),
            service_account: argument("K8S_SERVICE_ACCOUNT"),
            sandbox,
        })
    }

    /// Refuses what cannot be decided about.
    ///
    /// # Errors
    /// When the pod has no name.
    pub fn require_pod(&self) -> Result<(), CniError> {
        if self.name.is_empty() {
            return Err(CniError::Environment("K8S_POD_NAME in CNI_ARGS"));
        }
        if self.namespace.is_empty() {
            return Err(CniError::Environment("K8S_POD_NAMESPACE in CNI_ARGS"));
        }
        Ok(())
    }

    /// Refuses a namespace that cannot be opened by its path.
    ///
    /// # Errors
    /// When it has none, or not an absolute one.
    pub fn require_netns(&self) -> Result<(), CniError> {
        if self.netns.is_absolute() { Ok(()) } else { Err(CniError::Environment("CNI_NETNS")) }
    }

    /// Who the pod is.
    #[must_use]
    pub fn pod(&self) -> PodName<'_> {
        let uid = Some(self.uid.as_str()).filter(|uid| !uid.is_empty());
        PodName { namespace: &self.namespace, name: &self.name, uid }
    }

    /// The UID, or the sandbox's id where the runtime gives none.
    #[must_use]
    pub fn uid_or_sandbox(&self) -> &str {
        if self.uid.is_empty() { &self.sandbox } else { &self.uid }
    }

    /// Namespace and name, for people.
    #[must_use]
    pub fn label(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// As the kernel and the specification have it.
fn is_interface(text: &str) -> bool {
    (1..=15).contains(&text.len())
        && !matches!(text, "." | "..")
        && !text
            .bytes()
            .any(|byte| matches!(byte, b'/' | b':') || byte.is_ascii_whitespace() || byte.is_ascii_control())
}

/// `CNI_ARGS`: `KEY=value;KEY=value`.
fn arguments(text: &str) -> Result<BTreeMap<String, String>, CniError> {
    let wrong = || CniError::Environment("CNI_ARGS");
    let mut found = BTreeMap::new();
    for pair in text.split(';').filter(|pair| !pair.trim().is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(wrong)?;
        let value = value.trim().to_owned();
        if value.len() > MAX_NAME && key.trim().starts_with("K8S_")
            || found.insert(key.trim().to_owned(), value).is_some()
        {
            return Err(wrong());
        }
    }
    Ok(found)
}

/// The addresses of the pod's own interfaces: `ips` whose interface has a sandbox, or that name no interface.
///
/// # Errors
/// When the result is not one of a plugin's.
pub fn addresses(previous: &Value) -> Result<Vec<IpAddr>, CniError> {
    let wrong = |what: &str| CniError::Configuration(format!("prevResult: {what}"));
    let list = |field: &'static str| match previous.get(field) {
        None | Some(Value::Null) => Ok(&[][..]),
        Some(list) => list.as_array().map(Vec::as_slice).ok_or_else(|| wrong(&format!("{field} is not a list"))),
    };
    let interfaces = list("interfaces")?;
    let mut found = Vec::new();
    for ip in list("ips")? {
        let is_in_pod = match ip.get("interface") {
            None | Some(Value::Null) => true,
            Some(index) => {
                let index = index.as_u64().and_then(|index| usize::try_from(index).ok());
                let interface = index.and_then(|index| interfaces.get(index));
                let interface = interface.ok_or_else(|| wrong("an address names an interface that is not there"))?;
                interface.get("sandbox").and_then(Value::as_str).is_some_and(|path| !path.is_empty())
            }
        };
        let text = ip.get("address").and_then(Value::as_str).unwrap_or_default();
        let address = text.split('/').next().unwrap_or_default().parse::<IpAddr>();
        let address = address.map_err(|_| wrong("an address is not one"))?;
        if is_in_pod && !found.contains(&address) {
            found.push(address);
        }
    }
    Ok(found)
}
