//! The Kubernetes API as a source of labels: this node's pods, and the labels of all namespaces. Nothing else is decoded,
//! and nothing is known before both have been listed whole.
//!
//! An API server that is away, restarts or has forgotten where we were (410) is asked again with growing pauses; what it
//! said last stays in force. A label that means nothing is taken for the last good one; without one it asks for the mesh, as
//! the control plane takes it, so that nothing is in plaintext for a slip.

pub mod report;

#[cfg(test)]
mod fault_tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::stream::{Stream, StreamExt as _, unfold};
use k8s_openapi::api::core::v1::{Namespace, Pod as ApiPod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::{ApiResource, Object, PartialObjectMeta};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::removal::{OwnNamespace, Removal};
use super::{Ask, Known, Origin, Running, Source};
use crate::cni::decide::{DATAPLANE_MODE, Exclusions, Mode, is_excluded};
use crate::cni::knowledge::{Knowledge, KnownPod};

/// Annotation of a static pod's object: the UID that the kubelet, and so the runtime, knows it by.
const STATIC_UID: &str = "kubernetes.io/config.hash";
/// Annotation of an object that stands for a static pod.
const MIRROR: &str = "kubernetes.io/config.mirror";
/// How long one watch lasts, in seconds: a connection that is dead without a word is not waited for longer.
const WATCH: u32 = 30;
/// Annotation of a pod whose capture was checked in the kernel.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";
/// Its value.
pub const ENABLED: &str = "enabled";
/// Events that are taken in before what is known is published once for all of them.
const BATCH: usize = 1024;

/// The source.
#[derive(Clone)]
pub struct Kubernetes {
    client: kube::Client,
    node: String,
    exclusions: Exclusions,
    removal: Removal,
}

/// What of a pod's `spec` decides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Spec {
    host_network: bool,
    service_account_name: String,
    runtime_class_name: Option<String>,
}

/// What of its `status` says where it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Status {
    phase: String,
    #[serde(rename = "podIPs")]
    pod_ips: Vec<PodIp>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct PodIp {
    ip: String,
}

type Pod = Object<Spec, Status>;

impl Kubernetes {
    /// A source that reads the pods of this node. Those that the plugin lets pass unseen are not enrolled while they run
    /// either. `removal` is told when the mesh is taken off the cluster.
    #[must_use]
    pub const fn new(client: kube::Client, node: String, exclusions: Exclusions, removal: Removal) -> Self {
        Self { client, node, exclusions, removal }
    }

    fn namespaces(&self) -> impl Stream<Item = watcher::Result<Event<PartialObjectMeta<Namespace>>>> + use<> {
        let api: Api<PartialObjectMeta<Namespace>> = Api::all(self.client.clone());
        follow(move || watcher::watcher(api.clone(), watcher::Config::default().timeout(WATCH))).default_backoff()
    }

    fn pods(&self) -> impl Stream<Item = watcher::Result<Event<Pod>>> + use<> {
        let api: Api<Pod> = Api::all_with(self.client.clone(), &ApiResource::erase::<ApiPod>(&()));
        let config = watcher::Config::default().timeout(WATCH).fields(&format!("spec.nodeName={}", self.node));
        follow(move || watcher::watcher(api.clone(), config.clone())).default_backoff()
    }
}

/// What `open` tells, begun anew where it cannot go on: the library notices that a version is too old only in a watch's
/// stream. Where the answer's code says so, it would ask for that version for ever.
fn follow<T, S>(open: impl Fn() -> S + Send) -> impl Stream<Item = watcher::Result<Event<T>>>
where
    S: Stream<Item = watcher::Result<Event<T>>> + Send + 'static,
{
    let first = open().boxed();
    unfold((open, first), |(open, mut stream)| async move {
        let next = stream.next().await?;
        if let Err(watcher::Error::WatchStartFailed(kube::Error::Api(status))) = &next
            // 504: a version that is from the future, after a restore of etcd.
            && matches!(status.code, 410 | 504)
        {
            stream = open().boxed();
        }
        Some((next, (open, stream)))
    })
}

impl Source for Kubernetes {
    fn ask(&self) -> Option<Ask> {
        Some(Ask::new(self.client.clone()))
    }

    async fn run(self, knowledge: watch::Sender<Arc<Known>>) {
        let (mut namespaces, mut pods) = (pin!(self.namespaces().fuse()), pin!(self.pods().fuse()));
        let mut cluster = Cluster { exclusions: self.exclusions.clone(), ..Cluster::default() };
        let mut own = OwnNamespace::new(self.exclusions.system_namespace.clone(), self.removal.clone());
        let mut namespace = |cluster: &mut Cluster, event| {
            own.take(&event);
            cluster.namespace(event);
        };
        let mut trouble = Trouble::default();
        loop {
            tokio::select! {
                () = knowledge.closed() => return,
                Some(event) = namespaces.next() => {
                    trouble.take("namespaces", event, |event| namespace(&mut cluster, event));
                }
                Some(event) = pods.next() => trouble.take("pods", event, |event| cluster.pod(event)),
                else => return,
            }
            // What has come meanwhile belongs to the same picture.
            for _ in 0..BATCH {
                if let Some(Some(event)) = namespaces.next().now_or_never() {
                    trouble.take("namespaces", event, |event| namespace(&mut cluster, event));
                } else if let Some(Some(event)) = pods.next().now_or_never() {
                    trouble.take("pods", event, |event| cluster.pod(event));
                } else {
                    break;
                }
            }
            if let Some(known) = cluster.known() {
                let changed = |now: &mut Arc<Known>| {
                    let is_news = **now != known;
                    if is_news {
                        *now = Arc::new(known);
                    }
                    is_news
                };
                knowledge.send_if_modified(changed);
            }
        }
    }
}

/// Whether the API is in trouble, by kind of object: said once.
#[derive(Debug, Default)]
struct Trouble(BTreeMap<&'static str, String>);

impl Trouble {
    fn take<E>(&mut self, kind: &'static str, event: watcher::Result<E>, mut use_it: impl FnMut(E)) {
        match event {
            Ok(event) => {
                if self.0.remove(kind).is_some() {
                    tracing::info!(kind, "the Kubernetes API answers again");
                }
                use_it(event);
            }
            Err(error) => {
                let text = error.to_string();
                if self.0.get(kind) != Some(&text) {
                    tracing::warn!(kind, %error, "the Kubernetes API; what it said last stays in force, asking again");
                    self.0.insert(kind, text);
                }
            }
        }
    }
}

/// Objects of one kind by name, with those of a list that is still under way.
#[derive(Debug)]
struct Kind<K, V> {
    objects: BTreeMap<K, V>,
    /// `None`: no list is under way.
    listing: Option<BTreeMap<K, V>>,
    is_complete: bool,
}

impl<K, V> Default for Kind<K, V> {
    fn default() -> Self {
        Self { objects: BTreeMap::new(), listing: None, is_complete: false }
    }
}

impl<K: Ord, V> Kind<K, V> {
    fn begin(&mut self) {
        self.listing = Some(BTreeMap::new());
    }

    fn set(&mut self, key: K, value: V) {
        self.listing.as_mut().unwrap_or(&mut self.objects).insert(key, value);
    }

    fn end(&mut self) {
        if let Some(listed) = self.listing.take() {
            self.objects = listed;
            self.is_complete = true;
        }
    }
}

/// All that is known of the cluster.
#[derive(Debug, Default)]
struct Cluster {
    namespaces: Kind<String, Mode>,
    /// By namespace and name.
    pods: Kind<(String, String), (KnownPod, Option<Running>)>,
    /// What was complained of, so that it is said once.
    complaints: BTreeSet<String>,
    exclusions: Exclusions,
}

impl Cluster {
    fn namespace(&mut self, event: Event<PartialObjectMeta<Namespace>>) {
        match event {
            Event::Init => self.namespaces.begin(),
            Event::InitDone => self.namespaces.end(),
            Event::Delete(object) => {
                self.namespaces.objects.remove(&object.metadata.name.unwrap_or_default());
            }
            Event::Apply(object) | Event::InitApply(object) => {
                let name = object.metadata.name.clone().unwrap_or_default();
                let mode = mode(&object.metadata).unwrap_or_else(|reason| {
                    let last = self.namespaces.objects.get(&name).copied();
                    self.complain(format!("Namespace {name}: {reason}"), last.is_some());
                    last.unwrap_or(Mode::Ambient)
                });
                self.namespaces.set(name, mode);
            }
        }
    }

    fn pod(&mut self, event: Event<Pod>) {
        match event {
            Event::Init => self.pods.begin(),
            Event::InitDone => self.pods.end(),
            Event::Delete(object) => {
                self.pods.objects.remove(&key(&object.metadata));
            }
            Event::Apply(object) | Event::InitApply(object) => {
                let key = key(&object.metadata);
                let mode = mode(&object.metadata).unwrap_or_else(|reason| {
                    // Of another pod with this name nothing is kept.
                    let uid = object.metadata.uid.clone().unwrap_or_default();
                    let last = self.pods.objects.get(&key).filter(|(known, _)| known.uids.contains(&uid));
                    let last = last.map(|(known, _)| known.mode);
                    self.complain(format!("Pod {}/{}: {reason}", key.0, key.1), last.is_some());
                    last.unwrap_or(Mode::Ambient)
                });
                self.pods.set(key, read(&object, mode));
            }
        }
    }

    fn complain(&mut self, text: String, keeps_last: bool) {
        /// Complaints that are remembered.
        const MOST: usize = 1024;
        if self.complaints.len() >= MOST {
            self.complaints.clear();
        }
        if !self.complaints.contains(&text) {
            let taken = if keeps_last { "the last good one counts" } else { "it counts as one that asks for the mesh" };
            tracing::warn!(keeps_last, "label refused, {taken}: {text}");
            self.complaints.insert(text);
        }
    }

    /// `None` until everything has been listed once.
    fn known(&self) -> Option<Known> {
        if !self.namespaces.is_complete || !self.pods.is_complete {
            return None;
        }
        let mut pods: BTreeMap<String, BTreeMap<String, KnownPod>> = BTreeMap::new();
        for ((namespace, name), (known, _)) in &self.pods.objects {
            pods.entry(namespace.clone()).or_default().insert(name.clone(), known.clone());
        }
        let is_seen = |running: &&Running| !is_excluded(&running.namespace, &running.name, &self.exclusions);
        let running = self.pods.objects.values().filter_map(|(_, running)| running.as_ref());
        let running = running.filter(is_seen).cloned().collect();
        let knowledge = Knowledge { namespaces: self.namespaces.objects.clone(), pods };
        Some(Known { knowledge, origin: Origin::Source, running, lists_pods: true })
    }
}

fn key(meta: &ObjectMeta) -> (String, String) {
    (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
}

/// What the label of an object says.
pub(super) fn mode(meta: &ObjectMeta) -> Result<Mode, String> {
    let labels = meta.labels.as_ref();
    Mode::read(labels.and_then(|labels| labels.get(DATAPLANE_MODE)).map(String::as_str)).map_err(|e| e.to_string())
}

/// A pod whose label says `mode`, and where it is if it runs in a network of its own.
fn read(pod: &Pod, mode: Mode) -> (KnownPod, Option<Running>) {
    let meta = &pod.metadata;
    let annotation = |name| meta.annotations.as_ref().and_then(|all| all.get(name)).map(String::as_str);
    let uid = meta.uid.clone().unwrap_or_default();
    let account = Some(pod.spec.service_account_name.as_str()).filter(|account| !account.is_empty());
    // Anybody may write the one; only the kubelet makes a pod with both, the mirror of a static one.
    let static_uid = annotation(MIRROR).and(annotation(STATIC_UID));
    let uids = [Some(uid.as_str()), static_uid].into_iter().flatten().filter(|uid| !uid.is_empty());
    let known = KnownPod {
        uids: uids.map(str::to_owned).collect(),
        mode,
        host_network: pod.spec.host_network,
        service_account: account.unwrap_or("default").to_owned(),
        runtime_class: pod.spec.runtime_class_name.clone().unwrap_or_default(),
    };
    let status = pod.status.clone().unwrap_or_default();
    let addresses: Vec<IpAddr> = status.pod_ips.iter().filter_map(|ip| ip.ip.parse().ok()).collect();
    let runs = matches!(status.phase.as_str(), "Pending" | "Running") && !addresses.is_empty();
    let (namespace, name) = key(meta);
    let running = (runs && !known.host_network).then(|| Running {
        uid,
        uids: known.uids.clone(),
        namespace,
        name,
        service_account: known.service_account.clone(),
        addresses,
        ends: meta.deletion_timestamp.is_some(),
        is_confirmed: annotation(REDIRECTION) == Some(ENABLED),
        owner: meta.owner_references.iter().flatten().find(|owner| owner.controller == Some(true)).cloned(),
    });
    (known, running)
}

impl std::fmt::Debug for Kubernetes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kubernetes").field("node", &self.node).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, uid: &str, more: &serde_json::Value) -> Pod {
        let mut object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": "shop", "uid": uid, "labels": {} },
            "spec": { "serviceAccountName": "web", "nodeName": "n", "containers": [{ "name": "c" }] },
            "status": { "phase": "Running", "podIPs": [{ "ip": "10.1.2.3" }, { "ip": "fd00::3" }] },
        });
        for (field, value) in more.as_object().into_iter().flatten() {
            for (name, value) in value.as_object().into_iter().flatten() {
                object[field][name] = value.clone();
            }
        }
        serde_json::from_value(object).unwrap()
    }

    fn namespace(name: &str, label: Option<&str>) -> PartialObjectMeta<Namespace> {
        let labels = label.map(|label| json!({ DATAPLANE_MODE: label })).unwrap_or_default();
        let meta = json!({ "metadata": { "name": name, "labels": labels } });
        serde_json::from_value(meta).unwrap()
    }

    fn listed(pods: Vec<Pod>) -> Cluster {
        let mut cluster = Cluster::default();
        cluster.namespace(Event::Init);
        cluster.namespace(Event::InitApply(namespace("shop", Some("ambient"))));
        cluster.namespace(Event::InitDone);
        cluster.pod(Event::Init);
        pods.into_iter().for_each(|pod| cluster.pod(Event::InitApply(pod)));
        cluster.pod(Event::InitDone);
        cluster
    }

    #[test]
    fn nothing_is_known_before_both_lists_are_complete() {
        let mut cluster = Cluster::default();
        assert!(cluster.known().is_none());
        cluster.pod(Event::Init);
        cluster.pod(Event::InitApply(pod("a", "u1", &json!({}))));
        cluster.pod(Event::InitDone);
        cluster.namespace(Event::Init);
        assert!(cluster.known().is_none());
        cluster.namespace(Event::InitDone);
        assert_eq!(cluster.known().unwrap().running.len(), 1);
    }

    #[test]
    fn list_anew_forgets_what_vanished_and_holds_the_old_until_it_is_whole() {
        let mut cluster = listed(vec![pod("a", "u1", &json!({})), pod("b", "u2", &json!({}))]);
        cluster.pod(Event::Init);
        cluster.pod(Event::InitApply(pod("b", "u2", &json!({}))));
        assert_eq!(cluster.known().unwrap().knowledge.pods["shop"].len(), 2);
        cluster.pod(Event::InitDone);
        assert_eq!(cluster.known().unwrap().knowledge.pods["shop"].keys().collect::<Vec<_>>(), ["b"]);
        cluster.pod(Event::Delete(pod("b", "u2", &json!({}))));
        assert!(cluster.known().unwrap().knowledge.pods.is_empty());
    }

    #[test]
    fn pod_is_read_with_what_decides() {
        let more = json!({
            "metadata": {
                "labels": { DATAPLANE_MODE: "none" },
                "annotations": { STATIC_UID: "hash", MIRROR: "hash", REDIRECTION: ENABLED },
            },
        });
        let known = listed(vec![pod("a", "u1", &more)]).known().unwrap();
        let read = &known.knowledge.pods["shop"]["a"];
        assert_eq!((read.uids.as_slice(), read.mode), (&["u1".into(), "hash".into()][..], Mode::None));
        let running = &known.running[0];
        assert!(running.is_confirmed && running.addresses.len() == 2 && running.service_account == "web");
        for (spec, status) in [
            (json!({ "hostNetwork": true }), json!({})),
            (json!({}), json!({ "phase": "Succeeded" })),
            (json!({}), json!({ "podIPs": [] })),
        ] {
            let known = listed(vec![pod("a", "u1", &json!({ "spec": spec, "status": status }))]).known().unwrap();
            assert!(known.running.is_empty(), "{spec} {status}");
            assert_eq!(known.knowledge.pods["shop"].len(), 1);
        }
    }

    #[test]
    fn pod_is_not_believed_to_be_a_static_one_and_excluded_ones_are_not_seen() {
        let claims = json!({ "metadata": { "annotations": { STATIC_UID: "u7" } } });
        let mut cluster = listed(vec![pod("a", "u1", &claims)]);
        assert_eq!(cluster.known().unwrap().running[0].uids, ["u1"]);
        cluster.exclusions = Exclusions { system_namespace: String::new(), namespaces: vec!["shop".into()] };
        assert!(cluster.known().unwrap().running.is_empty());
    }

    #[test]
    fn label_that_means_nothing_is_the_last_good_one_or_asks_for_the_mesh() {
        let wrong = || json!({ "metadata": { "labels": { DATAPLANE_MODE: "sidecar" } } });
        let mut cluster = listed(vec![pod("a", "u1", &json!({})), pod("b", "u2", &wrong())]);
        let mode = |cluster: &Cluster, name: &str| cluster.known().unwrap().knowledge.pods["shop"][name].mode;
        assert_eq!(
            mode(&cluster, "b"),
            Mode::Ambient,
            "never had a good one: it is to be enrolled, also while it runs"
        );
        assert_eq!(cluster.known().unwrap().running.len(), 2);
        cluster.pod(Event::Apply(pod("a", "u1", &wrong())));
        assert_eq!(mode(&cluster, "a"), Mode::Unset);
        // What is not its label is known as it is now.
        let mut ends = pod("a", "u1", &wrong());
        ends.status.as_mut().unwrap().pod_ips.truncate(1);
        cluster.pod(Event::Apply(ends));
        assert_eq!((mode(&cluster, "a"), cluster.known().unwrap().running[0].addresses.len()), (Mode::Unset, 1));
        cluster.pod(Event::Apply(pod("a", "u9", &wrong())));
        assert_eq!(mode(&cluster, "a"), Mode::Ambient, "another pod of the same name");
        cluster.namespace(Event::Apply(namespace("new", Some("Ambient"))));
        assert_eq!(cluster.known().unwrap().knowledge.namespaces["new"], Mode::Ambient, "never had a good one");
        cluster.namespace(Event::Apply(namespace("shop", Some("Ambient"))));
        assert_eq!(cluster.known().unwrap().knowledge.namespaces["shop"], Mode::Ambient);
        cluster.namespace(Event::Apply(namespace("shop", None)));
        assert_eq!(cluster.known().unwrap().knowledge.namespaces["shop"], Mode::Unset);
    }
}
