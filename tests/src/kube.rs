//! What the API server, the scheduler and the kubelet do for culvertd: a folder of YAML that always shows the
//! cluster as it is, with ClusterIPs allotted and pods with their status.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use serde_json::{Value, json};

use crate::Error;
use crate::error::Context;
use crate::families::{Families, service_addresses};

/// Label that enrols a namespace or a pod.
pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// Annotation that says a pod's traffic is captured.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";

/// A pod as the API server would show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodRecord {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Kubernetes UID.
    pub uid: String,
    /// Service account.
    pub service_account: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Owner as (kind, name), such as a ReplicaSet.
    pub owner: Option<(String, String)>,
    /// Name of its node.
    pub node: String,
    /// Address of its node.
    pub host_ip: IpAddr,
    /// Its addresses, the first being `status.podIP`.
    pub ips: Vec<IpAddr>,
    /// Container ports as (name, port).
    pub ports: Vec<(String, u16)>,
    /// Ready condition.
    pub ready: bool,
    /// It is being deleted.
    pub terminating: bool,
}

impl PodRecord {
    /// The object.
    pub fn object(&self) -> Value {
        let mut metadata = json!({
            "name": self.name, "namespace": self.namespace, "uid": self.uid, "labels": self.labels,
            "annotations": self.annotations,
        });
        if self.terminating {
            metadata["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        if let Some((kind, name)) = &self.owner {
            let owner = json!({
                "apiVersion": "apps/v1", "kind": kind, "name": name, "uid": format!("{:032x}", hash(name)),
                "controller": true,
            });
            metadata["ownerReferences"] = json!([owner]);
        }
        let ports: Vec<Value> = self.ports.iter().map(|(n, p)| json!({"name": n, "containerPort": p})).collect();
        let ready = if self.ready { "True" } else { "False" };
        let ips: Vec<Value> = self.ips.iter().map(|ip| json!({"ip": ip})).collect();
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": metadata,
            "spec": {
                "nodeName": self.node, "serviceAccountName": self.service_account,
                "containers": [{"name": "app", "image": "culvert-app", "ports": ports}],
            },
            "status": {
                "phase": "Running", "hostIP": self.host_ip, "podIP": self.ip(), "podIPs": ips,
                "conditions": [{"type": "Ready", "status": ready}],
            },
        })
    }

    /// Its first address.
    pub fn ip(&self) -> IpAddr {
        self.ips.first().copied().unwrap_or(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED))
    }

    /// True if the kernel captures its traffic, as the kubelet's node agent confirmed.
    pub fn captured(&self) -> bool {
        self.annotations.get(REDIRECTION).is_some_and(|v| v == "enabled")
    }
}

/// The folder, and what is in it.
#[derive(Debug)]
pub struct Directory {
    folder: PathBuf,
    families: Families,
    state: RwLock<State>,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, Vec<Value>>,
    pods: BTreeMap<(String, String), PodRecord>,
    /// Numbers of the services that were given ClusterIPs.
    cluster_ips: BTreeMap<(String, String), u16>,
}

impl Directory {
    /// Makes the folder. Services that name no families have `families`.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(folder: impl Into<PathBuf>, families: Families) -> Result<Self, Error> {
        let folder = folder.into();
        fs::create_dir_all(&folder).during(|| format!("making {}", folder.display()))?;
        Ok(Self { folder, families, state: RwLock::default() })
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Applies objects as `kubectl apply` would: services without a ClusterIP are given one. `name` names the file;
    /// applying the same name again replaces it. Gives the objects as applied.
    ///
    /// # Errors
    /// The text is not YAML, or the folder cannot be written.
    pub fn apply(&self, name: &str, yaml: &str) -> Result<Vec<Value>, Error> {
        let mut objects = parse(name, yaml)?;
        let mut state = self.write();
        for object in &mut objects {
            state.default_object(object, self.families);
        }
        self.put(name, &objects)?;
        state.files.insert(name.to_owned(), objects.clone());
        Ok(objects)
    }

    /// Writes a file into the folder as it is, valid or not, without the harness taking note of it.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn write_raw(&self, name: &str, text: &str) -> Result<(), Error> {
        self.replace(name, text)
    }

    /// Removes what was applied or written under `name`.
    ///
    /// # Errors
    /// No such file.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        self.write().files.remove(name);
        let path = self.folder.join(name);
        fs::remove_file(&path).during(|| format!("removing {}", path.display()))
    }

    /// Makes a namespace and a service account if they do not exist.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn ensure(&self, namespace: &str, service_account: &str) -> Result<(), Error> {
        let (has_namespace, has_account) = {
            let state = self.read();
            let mut objects = state.files.values().flatten();
            let has_namespace = objects.any(|o| kind(o) == "Namespace" && name(o) == namespace);
            let mut objects = state.files.values().flatten();
            let account =
                |o: &Value| kind(o) == "ServiceAccount" && namespace_of(o) == namespace && name(o) == service_account;
            (has_namespace, objects.any(account))
        };
        if !has_namespace {
            let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
            self.apply(&format!("namespace-{namespace}.yaml"), &object.to_string())?;
        }
        if !has_account {
            let metadata = json!({"name": service_account, "namespace": namespace});
            let object = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata});
            self.apply(&format!("serviceaccount-{namespace}-{service_account}.yaml"), &object.to_string())?;
        }
        Ok(())
    }

    /// Writes a pod, replacing what was known of it.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn put_pod(&self, pod: &PodRecord) -> Result<(), Error> {
        let mut state = self.write();
        self.put(&pod_file(&pod.namespace, &pod.name), &[pod.object()])?;
        state.pods.insert((pod.namespace.clone(), pod.name.clone()), pod.clone());
        Ok(())
    }

    /// Removes a pod.
    ///
    /// # Errors
    /// It is not there.
    pub fn remove_pod(&self, namespace: &str, name: &str) -> Result<(), Error> {
        self.write().pods.remove(&(namespace.to_owned(), name.to_owned()));
        let path = self.folder.join(pod_file(namespace, name));
        fs::remove_file(&path).during(|| format!("removing {}", path.display()))
    }

    /// All pods.
    pub fn pods(&self) -> Vec<PodRecord> {
        self.read().pods.values().cloned().collect()
    }

    /// All applied objects of a kind.
    pub fn objects(&self, of: &str) -> Vec<Value> {
        self.read().files.values().flatten().filter(|o| kind(o) == of).cloned().collect()
    }

    /// The first ClusterIP of a service; None if there is no such service or it is headless.
    pub fn cluster_ip(&self, namespace: &str, service: &str) -> Option<IpAddr> {
        self.cluster_ips(namespace, service).first().copied()
    }

    /// The ClusterIPs of a service; none if there is no such service or it is headless.
    pub fn cluster_ips(&self, namespace: &str, service: &str) -> Vec<IpAddr> {
        let state = self.read();
        state.service(namespace, service).map(virtual_addresses).unwrap_or_default()
    }

    /// Ready pods that a service selects, by name.
    pub fn endpoints(&self, namespace: &str, service: &str) -> Vec<PodRecord> {
        let state = self.read();
        state.service(namespace, service).map(|s| state.selected(namespace, s)).unwrap_or_default()
    }

    /// True if labels ask for the pod's traffic to be carried by the mesh.
    pub fn wants_mesh(&self, namespace: &str, labels: &BTreeMap<String, String>) -> bool {
        if let Some(mode) = labels.get(DATAPLANE_MODE) {
            return mode == "ambient";
        }
        let state = self.read();
        let mut namespaces = state.files.values().flatten().filter(|o| kind(o) == "Namespace" && name(o) == namespace);
        namespaces.any(|o| o["metadata"]["labels"][DATAPLANE_MODE] == "ambient")
    }

    /// Answers a name asked by the pod (or other host) at `client`: see the crate's page on services. None if there
    /// is no such service.
    pub fn resolve(&self, client: IpAddr, asked: &str) -> Option<Vec<IpAddr>> {
        let state = self.read();
        let client = state.pods.values().find(|p| p.ips.contains(&client));
        let mut labels = asked.trim_end_matches('.').split('.');
        let service = labels.next()?;
        let namespace = labels.next().or_else(|| client.map(|c| c.namespace.as_str()))?;
        let rest: Vec<&str> = labels.collect();
        if !matches!(rest.as_slice(), [] | ["svc"] | ["svc", "cluster", "local"]) {
            return None;
        }
        let found = state.service(namespace, service)?;
        let virtual_ips = virtual_addresses(found);
        if !virtual_ips.is_empty() && client.is_some_and(PodRecord::captured) {
            return Some(virtual_ips);
        }
        Some(state.selected(namespace, found).into_iter().flat_map(|p| p.ips).collect())
    }

    fn put(&self, name: &str, objects: &[Value]) -> Result<(), Error> {
        let mut text = String::new();
        for object in objects {
            text.push_str("---\n");
            let document = serde_saphyr::to_string(object);
            text.push_str(&document.map_err(|e| Error::Manifest { file: name.to_owned(), reason: e.to_string() })?);
            text.push('\n');
        }
        self.replace(name, &text)
    }

    /// By rename, so that a reader sees the old or the new file; the temporary name does not end in .yaml.
    fn replace(&self, name: &str, text: &str) -> Result<(), Error> {
        let path = self.folder.join(name);
        let new = self.folder.join(format!(".{name}.new"));
        fs::write(&new, text).during(|| format!("writing {}", new.display()))?;
        fs::rename(&new, &path).during(|| format!("writing {}", path.display()))
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What the API server fills in.
    fn default_object(&mut self, object: &mut Value, families: Families) {
        let namespaced = kind(object) != "Namespace";
        if namespaced && object["metadata"]["namespace"].is_null() {
            object["metadata"]["namespace"] = json!("default");
        }
        if kind(object) != "Service" || !object["spec"]["clusterIP"].is_null() {
            return;
        }
        let next = 20 + u16::try_from(self.cluster_ips.len()).unwrap_or(u16::MAX);
        let key = (namespace_of(object).to_owned(), name(object).to_owned());
        let (v4, v6) = service_addresses(*self.cluster_ips.entry(key).or_insert(next));
        let asked: Vec<&str> =
            object["spec"]["ipFamilies"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let families = match asked.as_slice() {
            [] => families,
            ["IPv4"] => Families::V4,
            ["IPv6"] => Families::V6,
            _ => Families::Dual,
        };
        let ips = families.pick(v4, v6);
        object["spec"]["clusterIP"] = json!(ips.first());
        object["spec"]["clusterIPs"] = json!(ips);
        object["spec"]["ipFamilies"] = json!(families.names());
    }

    fn service(&self, namespace: &str, service: &str) -> Option<&Value> {
        let mut objects = self.files.values().flatten();
        objects.find(|o| kind(o) == "Service" && namespace_of(o) == namespace && name(o) == service)
    }

    fn selected(&self, namespace: &str, service: &Value) -> Vec<PodRecord> {
        let Some(selector) = service["spec"]["selector"].as_object().filter(|s| !s.is_empty()) else {
            return Vec::new();
        };
        let matches = |pod: &&PodRecord| {
            pod.namespace == namespace
                && pod.ready
                && selector.iter().all(|(k, v)| pod.labels.get(k).map(String::as_str) == v.as_str())
        };
        self.pods.values().filter(matches).cloned().collect()
    }
}

/// The objects of a YAML text.
///
/// # Errors
/// Not YAML.
pub fn parse(file: &str, yaml: &str) -> Result<Vec<Value>, Error> {
    let documents: Result<Vec<Value>, _> = serde_saphyr::from_multiple(yaml);
    let documents = documents.map_err(|e| Error::Manifest { file: file.to_owned(), reason: e.to_string() })?;
    Ok(documents.into_iter().filter(|d| !d.is_null()).collect())
}

pub(crate) fn kind(object: &Value) -> &str {
    object["kind"].as_str().unwrap_or_default()
}

pub(crate) fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

pub(crate) fn namespace_of(object: &Value) -> &str {
    object["metadata"]["namespace"].as_str().unwrap_or("default")
}

fn virtual_addresses(service: &Value) -> Vec<IpAddr> {
    let (first, all) = (&service["spec"]["clusterIP"], &service["spec"]["clusterIPs"]);
    let texts = all.as_array().map_or_else(|| std::slice::from_ref(first), Vec::as_slice);
    texts.iter().filter_map(Value::as_str).filter_map(|ip| ip.parse().ok()).collect()
}

fn pod_file(namespace: &str, name: &str) -> String {
    format!("pod-{namespace}-{name}.yaml")
}

/// FNV-1a: names need a stable hash, nothing more.
pub(crate) fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}
