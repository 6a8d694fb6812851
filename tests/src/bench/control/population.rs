//! The objects of a cluster that does not exist. Pure.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use serde_json::{Value, json};

use crate::kube::{DATAPLANE_MODE, PodRecord, REDIRECTION};

/// Pods of one namespace.
const PER_NAMESPACE: usize = 100;
/// In the UID of every pod, twelve digits after it.
const UID: &str = "5e7a11ed-0000-4000-8000-";

/// How many of each kind there are. Pods are spread evenly over services and nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Population {
    /// Pods, all of them enrolled and ready.
    pub pods: usize,
    /// Services, each with a slice of the pods that it selects.
    pub services: usize,
    /// Nodes.
    pub nodes: usize,
}

impl Population {
    /// The kinds that there are objects of, by the plural that the API's paths have, with the number of objects.
    pub fn count(self, plural: &str) -> usize {
        match plural {
            "namespaces" => self.namespaces(),
            "nodes" => self.nodes,
            "pods" => self.pods,
            "services" | "endpointslices" => self.services,
            _ => 0,
        }
    }

    /// One object of such a kind.
    pub fn object(self, plural: &str, number: usize) -> Value {
        match plural {
            "namespaces" => {
                let labels = json!({DATAPLANE_MODE: "ambient"});
                object("v1", "Namespace", &json!({"name": namespace(number), "labels": labels}), &json!({}))
            }
            "nodes" => {
                let labels = json!({"topology.kubernetes.io/zone": format!("zone-{}", number % 3)});
                object("v1", "Node", &json!({"name": node(number), "labels": labels}), &json!({}))
            }
            "pods" => self.pod(number, "v1").object(),
            "services" => self.service(number),
            _ => self.slice(number),
        }
    }

    /// A pod with that version of its application, which discovery tells as its canonical revision.
    pub fn pod(self, number: usize, version: &str) -> PodRecord {
        let bits = u32::try_from(number).unwrap_or(u32::MAX);
        let app = self.app(number);
        let node_number = number % self.nodes.max(1);
        PodRecord {
            name: pod_name(&app, number),
            namespace: namespace(number / PER_NAMESPACE),
            uid: format!("{UID}{number:012}"),
            service_account: app.clone(),
            labels: BTreeMap::from([("app".to_owned(), app.clone()), ("version".to_owned(), version.to_owned())]),
            annotations: BTreeMap::from([(REDIRECTION.to_owned(), "enabled".to_owned())]),
            owner: Some(("ReplicaSet".to_owned(), format!("{app}-5b8d4c7f9d"))),
            node: node(node_number),
            host_ip: Ipv4Addr::from_bits(Ipv4Addr::new(172, 30, 0, 0).to_bits() + bits % 65_536).into(),
            ips: vec![Ipv4Addr::from_bits(Ipv4Addr::new(10, 128, 0, 10).to_bits() + bits).into()],
            ports: vec![("http".to_owned(), 8080)],
            ready: true,
            terminating: false,
        }
    }

    fn namespaces(self) -> usize {
        self.pods.div_ceil(PER_NAMESPACE)
    }

    /// Services of one namespace: the last one may have fewer.
    fn services_each(self) -> usize {
        self.services.div_ceil(self.namespaces().max(1)).max(1)
    }

    fn app(self, pod: usize) -> String {
        format!("app-{}", self.app_number(pod))
    }

    /// Which of the services of its namespace a pod is behind.
    fn app_number(self, pod: usize) -> usize {
        let each = self.services_each();
        let here = self.services.saturating_sub(pod / PER_NAMESPACE * each).min(each);
        pod % PER_NAMESPACE % here.max(1)
    }

    fn service(self, number: usize) -> Value {
        let each = self.services_each();
        let bits = u32::try_from(number).unwrap_or(u32::MAX);
        let address = Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 0, 10).to_bits() + bits);
        let app = format!("app-{}", number % each);
        let spec = json!({
            "selector": {"app": app}, "clusterIP": address, "clusterIPs": [address], "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}],
        });
        object("v1", "Service", &json!({"name": app, "namespace": namespace(number / each)}), &json!({"spec": spec}))
    }

    fn slice(self, number: usize) -> Value {
        let each = self.services_each();
        let (place, app) = (number / each, number % each);
        let in_namespace = (place * PER_NAMESPACE)..((place + 1) * PER_NAMESPACE).min(self.pods);
        let pods = in_namespace.filter(|pod| self.app_number(*pod) == app).map(|pod| self.pod(pod, "v1"));
        let endpoints: Vec<Value> = pods
            .map(|pod| {
                json!({
                    "addresses": [pod.ip()], "conditions": {"ready": true}, "nodeName": pod.node,
                    "targetRef": {"kind": "Pod", "name": pod.name, "namespace": pod.namespace, "uid": pod.uid},
                })
            })
            .collect();
        let metadata = json!({
            "name": format!("app-{app}-x7k2p"), "namespace": namespace(place),
            "labels": {"kubernetes.io/service-name": format!("app-{app}")},
        });
        let rest = json!({
            "addressType": "IPv4", "endpoints": endpoints,
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        });
        object("discovery.k8s.io/v1", "EndpointSlice", &metadata, &rest)
    }
}

fn object(api_version: &str, kind: &str, metadata: &Value, rest: &Value) -> Value {
    let mut object = json!({"apiVersion": api_version, "kind": kind, "metadata": metadata});
    if let (Some(object), Some(rest)) = (object.as_object_mut(), rest.as_object()) {
        object.extend(rest.clone());
    }
    object
}

fn namespace(number: usize) -> String {
    format!("space-{number}")
}

fn node(number: usize) -> String {
    format!("node-{number}")
}

fn pod_name(app: &str, number: usize) -> String {
    format!("{app}-5b8d4c7f9d-{number:06}")
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    const SOME: Population = Population { pods: 1_050, services: 105, nodes: 7 };

    #[test]
    fn every_object_is_one_of_its_own() {
        for (plural, path) in [
            ("namespaces", "/metadata/name"),
            ("nodes", "/metadata/name"),
            ("pods", "/metadata/uid"),
            ("pods", "/status/podIP"),
            ("services", "/spec/clusterIP"),
        ] {
            let count = SOME.count(plural);
            let objects = (0..count).map(|number| SOME.object(plural, number));
            let values: BTreeSet<String> = objects.map(|o| o.pointer(path).unwrap().to_string()).collect();
            assert_eq!(values.len(), count, "{plural} by {path}");
        }
    }

    #[test]
    fn every_pod_is_behind_one_service_that_has_it_in_its_slice() {
        let key = |o: &Value| (o["metadata"]["namespace"].to_string(), o["spec"]["selector"]["app"].to_string());
        let services: BTreeSet<_> = (0..105).map(|number| key(&SOME.object("services", number))).collect();
        assert_eq!(services.len(), 105);
        let mut slices: BTreeMap<String, usize> = BTreeMap::new();
        for slice in (0..105).map(|number| SOME.object("endpointslices", number)) {
            for endpoint in slice["endpoints"].as_array().unwrap() {
                *slices.entry(endpoint["targetRef"]["name"].to_string()).or_default() += 1;
            }
        }
        for pod in (0..1_050).map(|number| SOME.object("pods", number)) {
            let app = &pod["metadata"]["labels"]["app"];
            assert!(services.contains(&(pod["metadata"]["namespace"].to_string(), app.to_string())), "{pod}");
            assert_eq!(slices.get(&pod["metadata"]["name"].to_string()), Some(&1), "{pod}");
        }
    }
}
