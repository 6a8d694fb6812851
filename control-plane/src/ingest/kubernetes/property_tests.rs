//! The same objects, through the directory's way in and through the cluster's, make the same discovery resources, along
//! any sequence of edits, seen one by one or only in a later list.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::raw::Raw;
use super::watch::Step;
use super::{Gathered, WATCHED};
use crate::api::{self, Kind};
use crate::index::{Event, Index, Options, Resource};
use crate::ingest::Files;

#[derive(Clone, Debug)]
struct Edit {
    kind: Kind,
    name: u8,
    /// None for a deletion.
    variant: Option<u8>,
    /// The watch tells of it; otherwise only the next list does.
    is_seen: bool,
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let kind = prop::sample::select(WATCHED.to_vec());
    let edit = (kind, 0..3u8, prop::option::weighted(0.85, 0..8u8), prop::bool::weighted(0.8));
    prop::collection::vec(edit.prop_map(|(kind, name, variant, is_seen)| Edit { kind, name, variant, is_seen }), 1..60)
}

/// An object as the API server shows it, with what it adds to everything. Variants from 5 on are not valid; of pods 6 is one
/// that has ended, and 7 another one, which has an address of its own.
fn object(kind: Kind, name: u8, variant: u8, version: usize) -> Value {
    let mode =
        ["none", "ambient", "ambient", "none", "ambient", "sideways", "sideways", "ambient"][usize::from(variant)];
    let is_other = kind == Kind::Pod && variant == 7;
    let mut metadata = json!({
        "name": format!("x{name}"), "uid": format!("uid-{name}-{is_other}"), "resourceVersion": version.to_string(),
        "creationTimestamp": "2026-01-02T03:04:05Z",
        "labels": {"istio.io/dataplane-mode": mode, "app": format!("a{}", variant % 2)},
        "managedFields": [{"manager": "m", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1",
            "fieldsV1": {"f:spec": {}}}],
    });
    if variant == 2 {
        metadata["labels"]["istio.io/use-waypoint"] = json!("x0");
    }
    if !kind.is_cluster_scoped() {
        metadata["namespace"] = json!(format!("x{}", variant % 2));
    }
    let is_valid = variant < 5;
    let port = if is_valid { 8000 + u32::from(variant) } else { 70_000 };
    let ip = format!("10.0.0.{}", if variant == 7 { 9 } else { name + 1 });
    let vip = format!("10.96.0.{}", if variant == 7 { 9 } else { name + 1 });
    // A service without one has the endpoints of slices.
    let selector = if variant == 4 { json!(null) } else { json!({"app": format!("a{}", variant % 2)}) };
    let more = match kind {
        Kind::Namespace => json!({"spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}}),
        Kind::Node => {
            metadata["labels"] = json!({"topology.kubernetes.io/zone": if is_valid { mode } else { "a zone" }});
            json!({"status": {"images": [{"names": ["a"], "sizeBytes": 1}]}})
        }
        Kind::Pod => json!({
            "spec": {
                "nodeName": format!("x{}", variant % 3), "serviceAccountName": format!("sa{variant}"),
                "volumes": [{"name": "token", "emptyDir": {}}], "tolerations": [{"operator": "Exists"}],
                "containers": [{"name": "main", "image": "i", "ports": [{"name": "web", "containerPort": port, "protocol": "TCP"}]}],
            },
            "status": {
                "phase": if variant == 6 { "Failed" } else { "Running" }, "podIP": ip, "podIPs": [{"ip": ip}],
                "conditions": [{"type": "Ready", "status": if variant == 1 { "False" } else { "True" }, "lastTransitionTime": "2026-01-02T03:04:05Z"}],
            },
        }),
        Kind::Service => json!({"spec": {
            "type": "ClusterIP", "clusterIP": vip, "clusterIPs": [vip],
            "selector": selector, "ports": [{"name": "http", "port": port, "targetPort": "web", "protocol": "TCP"}],
        }}),
        Kind::EndpointSlice => {
            metadata["labels"] = json!({"kubernetes.io/service-name": format!("x{}", variant % 3)});
            json!({
                "addressType": "IPv4", "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
                "endpoints": [{"addresses": [format!("10.0.0.{}", variant + 1)], "conditions": {"ready": true}}],
            })
        }
        Kind::ServiceAccount | Kind::Deployment => json!({}),
        Kind::AuthorizationPolicy => json!({"spec": {
            "selector": selector.is_object().then(|| json!({"matchLabels": selector})), "action": if is_valid { "DENY" } else { "PERHAPS" },
            "rules": [{"to": [{"operation": {"ports": [port.to_string()]}}]}],
        }}),
        Kind::PeerAuthentication => json!({"spec": {
            "selector": selector.is_object().then(|| json!({"matchLabels": selector})),
            "mtls": {"mode": if !is_valid { "STRIKT" } else if variant == 1 { "PERMISSIVE" } else { "STRICT" }},
        }}),
        Kind::ServiceEntry => json!({"spec": {
            "hosts": [format!("h{}.example.com", variant % 3)], "location": "MESH_INTERNAL", "resolution": "STATIC",
            "ports": [{"number": if is_valid { 80 } else { 0 }, "name": "http", "protocol": "HTTP", "targetPort": port % 65_536}],
            "addresses": if variant > 5 { json!([format!("10.97.{variant}.0/24")]) } else { json!(null) },
            "endpoints": selector.is_null().then(|| json!([{"address": "10.0.0.7"}, {"address": format!("10.0.0.{}", name + 1)}])),
            "workloadSelector": selector.is_object().then(|| json!({"labels": selector})),
        }}),
        Kind::WorkloadEntry => json!({
            "spec": {
                "address": if variant == 5 { String::new() } else { format!("10.0.0.{}", name + 2 + variant / 7) }, "serviceAccount": format!("sa{variant}"),
                "labels": {"app": format!("a{}", variant % 2)}, "ports": {"http": port % 65_536},
                "weight": if is_valid { i32::from(variant) } else { -1 },
            },
            "status": {"conditions": [{"type": "Healthy", "status": if variant == 1 { "False" } else { "True" }}]},
        }),
        Kind::Gateway => json!({
            "spec": {
                "gatewayClassName": if is_valid { "istio-waypoint" } else { "" },
                "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE", "allowedRoutes": {"namespaces": {"from": "Same"}}}],
            },
            "status": {"addresses": [{"type": "IPAddress", "value": format!("10.96.0.{}", variant + 1)}]},
        }),
        Kind::GatewayClass => {
            json!({"spec": {"controllerName": if is_valid { "istio.io/mesh-controller" } else { "" }}})
        }
    };
    let mut whole = json!({"apiVersion": kind.api_version(), "kind": kind.as_str(), "metadata": metadata});
    for (key, value) in more.as_object().into_iter().flatten() {
        whole[key] = value.clone();
    }
    whole
}

fn raw(object: &Value) -> Raw {
    serde_json::from_str(&object.to_string()).unwrap()
}

type Key = (Kind, Option<String>, String);

fn key(object: &Value) -> Key {
    let kind = Kind::ALL.into_iter().find(|kind| object["kind"] == kind.as_str()).unwrap();
    let text = |key: &str| object["metadata"][key].as_str().map(str::to_owned);
    (kind, text("namespace"), text("name").unwrap())
}

fn path((kind, namespace, name): &Key) -> String {
    format!("{kind}-{}-{name}.yaml", namespace.as_deref().unwrap_or("none"))
}

/// Both ways in, and what each has made of it.
struct Both {
    gathered: Gathered,
    files: Files,
    there: BTreeSet<Key>,
    cluster: Index,
    directory: Index,
}

impl Both {
    fn new() -> Self {
        let index = || {
            Index::new(Options {
                cluster_id: "Kubernetes".to_owned(),
                cluster_domain: "cluster.local".to_owned(),
                trust_domain: "cluster.local".to_owned(),
                root_namespace: "culvert-system".into(),
                confirmation: Duration::from_secs(60),
            })
        };
        let gathered = Gathered::new(WATCHED);
        Self { gathered, files: Files::default(), there: BTreeSet::new(), cluster: index(), directory: index() }
    }

    fn step(&mut self, kind: Kind, step: &Step) {
        self.gathered.take(kind, step);
    }

    /// Everything is listed anew.
    fn list(&mut self, objects: &BTreeMap<Key, Value>) {
        for kind in WATCHED {
            self.step(kind, &Step::Listing);
            for (_, object) in objects.iter().filter(|((listed, ..), _)| *listed == kind) {
                self.step(kind, &Step::Present(raw(object)));
            }
            self.step(kind, &Step::Listed);
        }
        let mut events = Vec::new();
        for (key, object) in objects {
            events.extend(self.files.update(&path(key), api::parse(&object.to_string())));
        }
        let gone: Vec<Key> = self.there.iter().filter(|key| !objects.contains_key(*key)).cloned().collect();
        for key in gone {
            events.extend(self.files.remove(&path(&key)));
        }
        self.there = objects.keys().cloned().collect();
        self.publish(events);
    }

    fn publish(&mut self, directory: Vec<Event>) {
        self.directory.apply(directory, now());
        let cluster = self.gathered.batch().map(|batch| batch.events).unwrap_or_default();
        self.cluster.apply(cluster, now());
    }
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn resources(index: &Index) -> BTreeMap<Arc<str>, Arc<Resource>> {
    let all = index.resources().chain(index.policies());
    all.map(|resource| (resource.name.clone(), resource.clone())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn both_ways_in_lead_to_the_same(edits in edits()) {
        let mut both = Both::new();
        let mut objects: BTreeMap<Key, Value> = BTreeMap::new();
        both.list(&objects);
        let mut is_behind = false;
        for (version, edit) in edits.iter().enumerate() {
            let object = object(edit.kind, edit.name, edit.variant.unwrap_or_default(), version + 1);
            let key = key(&object);
            let was_there = objects.contains_key(&key);
            match edit.variant {
                Some(_) => drop(objects.insert(key.clone(), object.clone())),
                None => drop(objects.remove(&key)),
            }
            if !edit.is_seen {
                is_behind = true;
                continue;
            }
            if std::mem::take(&mut is_behind) {
                both.list(&objects);
            } else if edit.variant.is_some() {
                both.step(edit.kind, &Step::Present(raw(&object)));
                both.there.insert(key.clone());
                let events = both.files.update(&path(&key), api::parse(&object.to_string()));
                both.publish(events);
            } else if was_there {
                both.step(edit.kind, &Step::Gone(raw(&object)));
                both.there.remove(&key);
                let events = both.files.remove(&path(&key));
                both.publish(events);
            }
            prop_assert_eq!(resources(&both.cluster), resources(&both.directory));
            prop_assert_eq!(both.cluster.counts(), both.directory.counts());
            prop_assert_eq!(both.cluster.notes(), both.directory.notes());
        }
        let refused = |report: &crate::ingest::Report| {
            let told = report.refused.iter().map(|refusal| (refusal.object.clone(), refusal.keeps_last_good, refusal.problems.clone()));
            let mut told: Vec<_> = told.collect();
            told.sort_by(|a, b| a.0.cmp(&b.0));
            told
        };
        prop_assert_eq!(refused(both.gathered.told.as_deref().unwrap()), refused(&both.files.report()));
    }
}

#[test]
fn the_edits_make_something() {
    let mut both = Both::new();
    let objects = [
        object(Kind::Namespace, 0, 2, 1),
        object(Kind::Pod, 0, 2, 2),
        object(Kind::Service, 1, 4, 3),
        object(Kind::EndpointSlice, 0, 4, 4),
    ];
    both.list(&objects.into_iter().map(|object| (key(&object), object)).collect());
    let resources = resources(&both.cluster);
    // The pod, the service, and the endpoint that is no pod.
    assert_eq!(resources.len(), 3, "{:?}", resources.keys());
    assert!(both.gathered.told.unwrap().refused.is_empty());
}
