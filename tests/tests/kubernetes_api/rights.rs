//! Every right that culvertd is installed with is one that it uses, and it asks for nothing that it has no right to.

use std::collections::BTreeSet;

use serde_json::json;
use tests::wait;

use super::LONG;
use super::gateway_api::{GATEWAY_CLASSES, gateway, gateway_class, gateways};
use super::scene::{self, Scene, pod, pod_status};

const REGISTRATIONS: &str = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations";

#[tokio::test(flavor = "multi_thread")]
async fn culvertd_uses_each_of_its_rights_and_no_other() {
    let scene = Scene::new();
    scene.allow();
    scene.define("security.istio.io.yaml");
    scene.define("networking.istio.io.yaml");
    for file in ["culvert/25-webhook.yaml", "crds/webhook.yaml"] {
        scene.create(REGISTRATIONS, &scene::shipped(file));
    }
    // Something of everything that it writes about: policies, entries, a gateway and its class, a service that is bound, a label
    // that means nothing, a node that waits for its agent.
    scene.define_gateways();
    let labels = json!({"istio.io/dataplane-mode": "ambient", "istio.io/use-waypoint": "gate"});
    scene.namespace("shop", &labels);
    scene.namespace("lost", &json!({"istio.io/dataplane-mode": "sideways"}));
    scene.service("shop", "web", &json!({"selector": {"app": "web"}, "ports": [{"port": 80}]}));
    for (kind, plural) in
        [("AuthorizationPolicy", "authorizationpolicies"), ("PeerAuthentication", "peerauthentications")]
    {
        let object = json!({
            "apiVersion": "security.istio.io/v1", "kind": kind, "metadata": {"name": "own", "namespace": "shop"}, "spec": {},
        });
        scene.create(&format!("/apis/security.istio.io/v1/namespaces/shop/{plural}"), &object);
    }
    let entries = "/apis/networking.istio.io/v1/namespaces/shop";
    let host = json!({"hosts": ["db.example.com"]});
    for (kind, plural, spec) in [
        ("ServiceEntry", "serviceentries", host),
        ("WorkloadEntry", "workloadentries", json!({"address": "192.0.2.7"})),
    ] {
        let object = json!({
            "apiVersion": "networking.istio.io/v1", "kind": kind, "metadata": {"name": "own", "namespace": "shop"}, "spec": spec,
        });
        scene.create(&format!("{entries}/{plural}"), &object);
    }
    scene.create(GATEWAY_CLASSES, &gateway_class("waypoint"));
    scene.create(&gateways("shop"), &gateway("shop", "gate", "waypoint"));
    let taints = json!([{"key": "culvert.dev/agent-not-ready", "effect": "NoSchedule"}]);
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}, "spec": {"taints": taints}});
    scene.create("/api/v1/nodes", &node);
    let mut agent = pod("culvert-system", "agent-1", "culvert-node", "node-1");
    agent["metadata"]["labels"]["app.kubernetes.io/name"] = json!("culvert-node");
    scene.pod(&agent, &pod_status("10.244.0.2"));
    let culvertd = scene.ready_culvertd();
    // Somebody shows a token.
    let caller = scene.token("culvert-system", "culvert-node", None);
    let _ = culvertd.certificate(&scene.root(), &caller, "spiffe://cluster.local/ns/x/sa/x", false).await;

    let rights = scene::rights();
    // An API server that streams no lists is asked for them: `ingest/kubernetes/fault_tests.rs`. What a ConfigMap is applied
    // to that is not there yet is made by that, and takes the right to it.
    let elsewhere = |(verb, _, resource): &&(String, String, String)| {
        verb == "list" || (verb == "create" && resource == "configmaps")
    };
    let wanted: BTreeSet<_> = rights.iter().filter(|right| !elsewhere(right)).cloned().collect();
    let asked = || scene.server().asked_by("culvertd").unwrap();
    let used = || asked().into_iter().map(|one| (one.verb, one.group, one.resource)).collect::<BTreeSet<_>>();
    let all = wait::until("all rights are used", LONG, || wanted.is_subset(&used()).then_some(()));
    all.unwrap_or_else(|error| panic!("{error}: not used: {:#?}", wanted.difference(&used()).collect::<Vec<_>>()));
    assert!(used().is_subset(&rights), "not given: {:#?}", used().difference(&rights).collect::<Vec<_>>());
    let denied: Vec<_> = asked().into_iter().filter(|one| one.code == 403).collect();
    assert!(denied.is_empty(), "{denied:#?}");
}
