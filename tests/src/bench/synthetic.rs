//! Pods that exist in discovery only. Pure.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use serde_json::json;

use crate::kube::{DATAPLANE_MODE, PodRecord, REDIRECTION};

/// In the UID of every such pod, twelve digits after it.
const UID: &str = "5e7a11ed-0000-4000-8000-";

/// Pods of one namespace.
const PER_NAMESPACE: usize = 100;
/// Pods of one node.
const PER_NODE: u32 = 50;
/// Pods in one file.
const PER_FILE: usize = 1_000;

/// Files with `count` ready pods of the mesh, in namespaces with that label, on nodes that do not exist: names and
/// texts.
pub fn files(count: usize) -> Vec<(String, String)> {
    let namespaces = (0..count.div_ceil(PER_NAMESPACE)).map(|number| {
        let labels = json!({DATAPLANE_MODE: "ambient"});
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace(number), "labels": labels}})
    });
    let first = ("synthetic-namespaces.yaml".to_owned(), text(namespaces));
    let pods = (0..count.div_ceil(PER_FILE)).map(|file| {
        let numbers = file * PER_FILE..count.min((file + 1) * PER_FILE);
        (format!("synthetic-pods-{file}.yaml"), text(numbers.map(|number| pod(number).object())))
    });
    std::iter::once(first).chain(pods).collect()
}

/// The file of one more such pod, the one of that number, which is ready or not.
pub fn one(number: usize, ready: bool) -> String {
    text(std::iter::once(PodRecord { ready, namespace: namespace(0), ..pod(number) }.object()))
}

fn text(objects: impl Iterator<Item = serde_json::Value>) -> String {
    // JSON is YAML.
    objects.map(|object| format!("---\n{object}\n")).collect()
}

fn namespace(number: usize) -> String {
    format!("synthetic-{number}")
}

fn pod(number: usize) -> PodRecord {
    let bits = u32::try_from(number).unwrap_or(u32::MAX);
    let app = format!("app-{}", number % PER_NAMESPACE / 5);
    PodRecord {
        name: format!("{app}-{number:05}"),
        namespace: namespace(number / PER_NAMESPACE),
        uid: format!("{UID}{number:012}"),
        service_account: app.clone(),
        labels: BTreeMap::from([("app".to_owned(), app.clone()), ("version".to_owned(), "v1".to_owned())]),
        annotations: BTreeMap::from([(REDIRECTION.to_owned(), "enabled".to_owned())]),
        owner: Some(("ReplicaSet".to_owned(), format!("{app}-5b8d4c7f9d"))),
        node: format!("synthetic-{}", bits / PER_NODE),
        host_ip: Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 30, 0, 0)) + bits / PER_NODE).into(),
        ips: vec![Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 128, 0, 10)) + bits).into()],
        ports: vec![("http".to_owned(), 8080)],
        ready: true,
        terminating: false,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_pod_is_one_of_its_own() {
        let files = files(4_100);
        assert_eq!(files.len(), 6, "namespaces, and five files of pods");
        let mut objects = Vec::new();
        for (name, text) in &files {
            objects.extend(crate::kube::parse(name, text).unwrap());
        }
        let pods: Vec<_> = objects.iter().filter(|o| o["kind"] == "Pod").collect();
        assert_eq!((pods.len(), objects.len()), (4_100, 4_141));
        for path in ["/metadata/uid", "/metadata/name", "/status/podIP"] {
            let values: BTreeSet<_> = pods.iter().map(|p| p.pointer(path).unwrap().as_str().unwrap()).collect();
            assert_eq!(values.len(), 4_100, "{path}");
        }
        let namespaces = objects.iter().filter(|o| o["kind"] == "Namespace");
        let namespaces: Vec<_> = namespaces.map(|o| &o["metadata"]["name"]).collect();
        assert!(pods.iter().all(|p| namespaces.contains(&&p["metadata"]["namespace"])));
    }
}
