//! culvertd against a real Kubernetes API: etcd and kube-apiserver, objects made through the API, tokens that the API
//! server signs. culvertd has the rights of its own role and no others.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "kubernetes_api/agent.rs"]
mod agent;
#[path = "kubernetes_api/entries.rs"]
mod entries;
#[path = "kubernetes_api/gateway_api.rs"]
mod gateway_api;
#[path = "kubernetes_api/leader.rs"]
mod leader;
#[path = "kubernetes_api/not_valid.rs"]
mod not_valid;
#[path = "kubernetes_api/plugged.rs"]
mod plugged;
#[path = "kubernetes_api/policies.rs"]
mod policies;
#[path = "kubernetes_api/rights.rs"]
mod rights;
#[path = "kubernetes_api/scene.rs"]
mod scene;
#[path = "kubernetes_api/status.rs"]
mod status;

use std::time::Duration;

use mesh_proto::workload::{Address, TunnelProtocol, address};
use scene::{Scene, pod, pod_status, slice};
use serde_json::{Value, json};
use tests::interop::xds_client::{Collected, WORKLOAD_TYPE, decode};
use tests::process::Signal;
use tests::wait;
use tonic::Code;

const LONG: Duration = Duration::from_secs(60);
const WEB: &str = "Kubernetes//Pod/shop/web-1";
const SERVICE: &str = "shop/web.shop.svc.cluster.local";

fn workload(collected: &Collected, name: &str) -> Option<mesh_proto::workload::Workload> {
    let message: Address = decode(collected.resources.get(name)?, WORKLOAD_TYPE).unwrap();
    match message.r#type? {
        address::Type::Workload(workload) => Some(workload),
        address::Type::Service(_) => None,
    }
}

fn services(collected: &Collected, name: &str) -> Vec<String> {
    workload(collected, name).map(|workload| workload.services.into_keys().collect()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn discovery_follows_the_api_server_through_its_restarts() {
    let scene = Scene::new();
    scene.namespace("shop", &json!({"istio.io/dataplane-mode": "ambient"}));
    scene.node("node-1");
    let ztunnel = scene.pod(&pod("culvert-system", "ztunnel-1", "ztunnel", "node-1"), &pod_status("10.244.0.2"));
    scene.pod(&pod("shop", "web-1", "web", "node-1"), &pod_status("10.244.0.5"));
    scene.pod(&pod("shop", "web-2", "web", "node-1"), &pod_status("10.244.0.6"));
    let ports = json!([{"port": 80, "targetPort": 8080}]);
    scene.service("shop", "web", &json!({"selector": {"app": "web"}, "ports": ports}));
    let cluster_ip =
        scene.get("/api/v1/namespaces/shop/services/web")["spec"]["clusterIP"].as_str().unwrap().to_owned();

    // Without the right to one of the kinds nothing is served: what is missing would count as deleted.
    scene.allow_all_but("endpointslices");
    let culvertd = scene.culvertd();
    let refused = |status: &Value| {
        let trouble = status["watches"]["EndpointSlice"]["trouble"].as_str();
        trouble.is_some_and(|text| text.contains("forbidden")) && status["watches"]["Pod"]["state"] == "synced"
    };
    let status = culvertd.status_until("the refusal", refused);
    assert_eq!((&status["synced"], &status["watches"]["EndpointSlice"]["state"]), (&json!(false), &json!("pending")));
    assert!(!culvertd.is_ready());
    scene.allow();
    wait::until("readiness", LONG, || culvertd.is_ready().then_some(())).unwrap();

    let token = scene.token("culvert-system", "ztunnel", Some(&ztunnel));
    let mut session = culvertd.session(&scene.root(), &token).await.unwrap();
    session.subscribe_wildcard(WORKLOAD_TYPE, &[]).await.unwrap();
    let first = session.collect_until(WORKLOAD_TYPE, |found| workload(found, WEB).is_some()).await.unwrap();
    // All at once, and nothing that refers to what is not there.
    assert_eq!(first.responses, 1);
    assert_eq!(services(&first, WEB), [SERVICE]);
    assert!(
        first.resources[SERVICE].aliases.contains(&format!("/{cluster_ip}")),
        "{:?}",
        first.resources[SERVICE].aliases
    );
    assert_eq!(workload(&first, WEB).unwrap().tunnel_protocol(), TunnelProtocol::None);

    // What the agent confirms; and an endpoint that is no pod, of a service that selects none.
    scene.annotate("shop", "web-1", "enabled");
    session
        .collect_until(WORKLOAD_TYPE, |found| {
            workload(found, WEB).is_some_and(|web| web.tunnel_protocol() == TunnelProtocol::Hbone)
        })
        .await
        .unwrap();
    scene.service("shop", "outside", &json!({"ports": [{"port": 80}]}));
    scene.create("/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices", &slice("outside", "192.0.2.7"));
    let outside = "Kubernetes/discovery.k8s.io/EndpointSlice/shop/outside-by-hand/192.0.2.7";
    session.collect_until(WORKLOAD_TYPE, |found| workload(found, outside).is_some()).await.unwrap();

    // A label that means nothing is reported, and the last good version stays.
    scene.label("shop", "web-1", &json!({"istio.io/dataplane-mode": "sideways"}));
    let status =
        culvertd.status_until("the refusal", |status| status["source"]["refused"][0]["object"] == "Pod shop/web-1");
    assert_eq!(status["source"]["refused"][0]["keeps_last_good"], true);
    scene.label("shop", "web-1", &json!({"istio.io/dataplane-mode": null}));
    culvertd.status_until("the correction", |status| status["source"]["refused"] == json!([]));
    assert!(workload(&session.collected(WORKLOAD_TYPE), WEB).is_some());

    // The API server goes: what is known stays served. It comes back: the watches go on.
    let server = scene.server();
    server.component.kill().unwrap();
    culvertd.status_until("the loss", |status| {
        status["watches"].as_object().unwrap().values().all(|watch| watch["trouble"].is_string())
    });
    assert!(culvertd.is_ready());
    server.component.restart().unwrap();
    scene.delete("/api/v1/namespaces/shop/pods/web-2");
    session.collect_until(WORKLOAD_TYPE, |found| found.removed.contains("Kubernetes//Pod/shop/web-2")).await.unwrap();

    // While culvertd does not listen, the API server forgets what happened (a new one knows nothing before its start):
    // only a list tells, and what it does not show is gone.
    let lists = |status: &Value| status["watches"]["Pod"]["lists"].as_u64().unwrap();
    let before = lists(&culvertd.status());
    culvertd.process.signal(Signal::SIGSTOP).unwrap();
    server.component.kill().unwrap();
    server.component.restart().unwrap();
    scene.delete("/api/v1/namespaces/shop/services/web");
    scene.delete("/api/v1/namespaces/shop/pods/web-1");
    scene.pod(&pod("shop", "web-3", "web", "node-1"), &pod_status("10.244.0.7"));
    server.component.kill().unwrap();
    server.component.restart().unwrap();
    culvertd.process.signal(Signal::SIGCONT).unwrap();
    let last = session
        .collect_until(WORKLOAD_TYPE, |found| {
            found.resources.contains_key("Kubernetes//Pod/shop/web-3")
                && !found.resources.contains_key(WEB)
                && !found.resources.contains_key(SERVICE)
        })
        .await
        .unwrap();
    assert!(last.resources.contains_key("Kubernetes//Pod/culvert-system/ztunnel-1"));
    assert!(lists(&culvertd.status()) > before, "the list was not repeated");
    let metrics = culvertd.metrics();
    for line in ["culvert_watch_synced{kind=\"Pod\"} 1", "culvert_objects{kind=\"Pod\"} 2", "culvert_xds_clients 1"] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in\n{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_given_by_the_word_of_the_api_server() {
    let scene = Scene::new();
    scene.allow();
    scene.namespace("shop", &json!({"istio.io/dataplane-mode": "ambient"}));
    let ztunnel = scene.pod(&pod("culvert-system", "ztunnel-1", "ztunnel", "node-1"), &pod_status("10.244.0.2"));
    let other = scene.pod(&pod("culvert-system", "ztunnel-2", "ztunnel", "node-2"), &pod_status("10.244.1.2"));
    let web = scene.pod(&pod("shop", "web-1", "web", "node-1"), &pod_status("10.244.0.5"));
    scene.pod(&pod("shop", "pay-1", "pay", "node-2"), &pod_status("10.244.1.5"));
    let mut ended = pod_status("10.244.0.9");
    ended["phase"] = json!("Succeeded");
    scene.pod(&pod("shop", "job-1", "job", "node-1"), &ended);
    let culvertd = scene.ready_culvertd();
    let root = scene.root();
    let ask = async |token: &str, identity: &str, impersonate: bool| {
        culvertd.certificate(&root, token, identity, impersonate).await
    };
    let id = |account: &str| format!("spiffe://cluster.local/ns/shop/sa/{account}");

    let proxy = scene.token("culvert-system", "ztunnel", Some(&ztunnel));
    assert_eq!(ask(&proxy, &id("web"), true).await.unwrap(), id("web"));
    // On another node; ended; not there yet.
    assert_eq!(ask(&proxy, &id("pay"), true).await.unwrap_err(), Code::PermissionDenied);
    assert_eq!(ask(&proxy, &id("job"), true).await.unwrap_err(), Code::PermissionDenied);
    assert_eq!(ask(&proxy, &id("later"), true).await.unwrap_err(), Code::Unavailable);
    scene.pod(&pod("shop", "later-1", "later", "node-1"), &pod_status("10.244.0.8"));
    culvertd.eventually("the new pod's certificate", async || ask(&proxy, &id("later"), true).await.is_ok()).await;
    assert_eq!(
        ask(&scene.token("culvert-system", "ztunnel", Some(&other)), &id("pay"), true).await.unwrap(),
        id("pay")
    );

    // An ordinary pod has its own identity and not its neighbour's.
    let own = scene.token("shop", "web", Some(&web));
    assert_eq!(ask(&own, &id("web"), false).await.unwrap(), id("web"));
    assert_eq!(ask(&own, &id("later"), true).await.unwrap_err(), Code::PermissionDenied);
    // A node proxy's account is not enough: the token must be bound to its pod, and meant for us.
    let unbound = scene.token("culvert-system", "ztunnel", None);
    assert_eq!(ask(&unbound, &id("web"), true).await.unwrap_err(), Code::PermissionDenied);
    let elsewhere = scene.token_for("culvert-system", "ztunnel", Some(&ztunnel), &["elsewhere"]);
    assert_eq!(ask(&elsewhere, &id("web"), true).await.unwrap_err(), Code::Unauthenticated);
    let forged = format!("{}AAAA", &proxy[..proxy.len() - 4]);
    assert_eq!(ask(&forged, &id("web"), true).await.unwrap_err(), Code::Unauthenticated);
    assert!(culvertd.session(&root, &forged).await.is_err());

    // While the API server is away: a token that it knew a moment ago is good, another one may be later.
    let fresh = scene.token("shop", "web", Some(&web));
    assert_eq!(ask(&proxy, &id("web"), true).await.unwrap(), id("web"));
    scene.server().component.kill().unwrap();
    assert_eq!(ask(&proxy, &id("web"), true).await.unwrap(), id("web"));
    assert_eq!(ask(&fresh, &id("web"), false).await.unwrap_err(), Code::Unavailable);
    scene.server().component.restart().unwrap();
    culvertd.eventually("the fresh token", async || ask(&fresh, &id("web"), false).await.is_ok()).await;

    // With its pod the node proxy's token ends, also where it was accepted a moment ago.
    assert!(ask(&proxy, &id("web"), true).await.is_ok());
    scene.delete("/api/v1/namespaces/culvert-system/pods/ztunnel-1");
    culvertd.eventually("the end of the token", async || ask(&proxy, &id("web"), true).await.is_err()).await;
    let replaced = scene.pod(&pod("culvert-system", "ztunnel-1", "ztunnel", "node-1"), &pod_status("10.244.0.2"));
    let renewed = scene.token("culvert-system", "ztunnel", Some(&replaced));
    culvertd.eventually("the new pod's token", async || ask(&renewed, &id("web"), true).await.is_ok()).await;
    assert!(ask(&proxy, &id("web"), true).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_share_a_root_and_follow_its_replacement() {
    let scene = Scene::new();
    scene.allow();
    let web = scene.pod(&pod("culvert-system", "web-1", "web", "node-1"), &pod_status("10.244.0.5"));
    let (one, another) = (scene.culvertd(), scene.culvertd());
    for replica in [&one, &another] {
        wait::until("readiness", LONG, || replica.is_ready().then_some(())).unwrap();
    }
    let root = scene.root();
    let token = scene.token("culvert-system", "web", Some(&web));
    let (first, second) = (one.chain(&root, &token).await.unwrap(), another.chain(&root, &token).await.unwrap());
    assert_eq!(first.last(), second.last());
    assert_eq!(first.last(), Some(&root));

    // A second root is trusted before it signs, and after that the first one still is.
    let secret = "/api/v1/namespaces/culvert-system/secrets/culvert-ca-root";
    let next = tests::kubernetes::pki::Pki::create(scene.folder()).unwrap();
    let both = format!("{root}{}", next.root());
    scene.patch(secret, &json!({"stringData": {"root-cert.pem": both}}));
    for replica in [&one, &another] {
        replica
            .eventually("both roots", async || {
                replica.chain(&root, &token).await.is_ok_and(|chain| chain.last() == Some(&both))
            })
            .await;
    }
    wait::until("the publication", LONG, || (scene.root() == both).then_some(())).unwrap();
    let key = std::fs::read_to_string(next.path("ca.key")).unwrap();
    scene.patch(secret, &json!({"stringData": {"ca-cert.pem": next.root(), "ca-key.pem": key}}));
    // From now on culvertd's own certificate is the new root's as well.
    for replica in [&one, &another] {
        replica.eventually("the switch", async || replica.chain(next.root(), &token).await.is_ok()).await;
    }
    // The one that signs is told of first.
    let turned = format!("{}{root}", next.root());
    let chain = one.chain(&both, &token).await.unwrap();
    assert_eq!(chain.last(), Some(&turned));

    // A mistake changes nothing; a Secret that is lost is put back as it was.
    scene.patch(secret, &json!({"stringData": {"ca-key.pem": "nonsense"}}));
    assert!(one.chain(next.root(), &token).await.is_ok());
    scene.delete(secret);
    let put_back = wait::until("the Secret", LONG, || scene.find(secret)).unwrap();
    assert_eq!(scene::text(&put_back["data"]["root-cert.pem"]), turned);
    assert_eq!(scene::text(&put_back["data"]["ca-cert.pem"]), next.root());

    // It is lost while nobody runs: no other root is made, which half of the mesh would not trust.
    drop((one, another));
    scene.delete(secret);
    let (replica, log) = scene.launch();
    let said = |text: &str| std::fs::read_to_string(&log).unwrap_or_default().contains(text).then_some(());
    wait::until("the complaint", LONG, || said("put it back, or delete the ConfigMap")).unwrap();
    assert!(scene.find(secret).is_none() && replica.running());
    let metadata = json!({"name": "culvert-ca-root"});
    let again = json!({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": put_back["data"]});
    scene.create("/api/v1/namespaces/culvert-system/secrets", &again);
    wait::until("the start", LONG, || said("listening")).unwrap();
    assert_eq!(scene.root(), turned);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_be_refused_is_refused_before_it_is_stored() {
    let scene = Scene::new();
    scene.allow();
    let culvertd = scene.ready_culvertd();
    let registrations = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations";
    scene.create(registrations, &scene::registration("culvert/25-webhook.yaml", culvertd.webhook));
    let attempt = |mode: &str| {
        let metadata = json!({"name": "attempt", "labels": {"istio.io/dataplane-mode": mode}});
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata});
        let path = "/api/v1/namespaces?dryRun=All";
        scene.server().api().request("POST", path, Some(("application/json", &object))).unwrap()
    };
    // Once culvertd has told the API server by which roots it is known.
    let refused = wait::until("the refusal", LONG, || Some(attempt("sideways")).filter(|answer| answer.status != 201));
    let refused = refused.unwrap();
    assert_eq!(refused.status, 422, "{}", refused.body);
    let answer: Value = serde_json::from_str(&refused.body).unwrap();
    assert!(answer["message"].as_str().unwrap().contains("metadata.labels[istio.io/dataplane-mode]"), "{answer}");
    assert_eq!(answer["details"]["causes"][0]["field"], "metadata.labels[istio.io/dataplane-mode]");
    assert_eq!(attempt("ambient").status, 201);
    // Away, it holds nothing up.
    drop(culvertd);
    assert_eq!(attempt("sideways").status, 201);
}
