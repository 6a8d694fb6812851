//! Policies as objects of a cluster: their kinds come and go, and what is not valid is refused.

use serde_json::{Value, json};
use tests::interop::xds_client::AUTHORIZATION_TYPE;
use tests::wait;

use super::LONG;
use super::scene::{self, DEFINITIONS, Scene, pod, pod_status};

const FILE: &str = "security.istio.io.yaml";

/// Where objects of a kind are, in one of its versions.
fn place(version: &str, plural: &str, namespace: &str) -> String {
    format!("/apis/security.istio.io/{version}/namespaces/{namespace}/{plural}")
}

fn policy(version: &str, kind: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": format!("security.istio.io/{version}"), "kind": kind, "metadata": {"name": name}, "spec": spec,
    })
}

fn state(status: &Value, kind: &str) -> Value {
    status["watches"][kind]["state"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_come_with_their_kind_and_go_only_with_it() {
    let scene = Scene::new();
    scene.allow();
    scene.namespace("shop", &json!({"istio.io/dataplane-mode": "ambient"}));
    let ztunnel = scene.pod(&pod("culvert-system", "ztunnel-1", "ztunnel", "node-1"), &pod_status("10.244.0.2"));
    let culvertd = scene.ready_culvertd();
    for kind in ["AuthorizationPolicy", "PeerAuthentication"] {
        assert_eq!(state(&culvertd.status(), kind), "absent");
    }
    let token = scene.token("culvert-system", "ztunnel", Some(&ztunnel));
    let mut session = culvertd.session(&scene.root(), &token).await.unwrap();

    // In either version.
    scene.define(FILE);
    let from = json!([{"from": [{"source": {"namespaces": ["shop"]}}]}]);
    let allow = policy("v1", "AuthorizationPolicy", "own", &json!({"rules": from}));
    scene.create(&place("v1", "authorizationpolicies", "shop"), &allow);
    let deny = policy("v1beta1", "AuthorizationPolicy", "none", &json!({"action": "DENY", "rules": [{}]}));
    scene.create(&place("v1beta1", "authorizationpolicies", "shop"), &deny);
    let strict = policy("v1", "PeerAuthentication", "strict", &json!({"mtls": {"mode": "STRICT"}}));
    scene.create(&place("v1", "peerauthentications", "shop"), &strict);
    culvertd.status_until("the kinds", |status| {
        ["AuthorizationPolicy", "PeerAuthentication"].iter().all(|kind| state(status, kind) == "synced")
    });
    let all = ["shop/none", "shop/own", "culvert-system/istio_converted_static_strict"];
    let found = session
        .collect_until(AUTHORIZATION_TYPE, |found| all.iter().all(|name| found.resources.contains_key(*name)))
        .await
        .unwrap();
    assert!(found.removed.is_empty(), "{:?}", found.removed);

    // While the API server starts it knows of no such kind, or has no objects of it; that removes none.
    scene.server().component.kill().unwrap();
    scene.server().component.restart().unwrap();
    let own = format!("{}/own", place("v1", "authorizationpolicies", "shop"));
    scene.patch(&own, &json!({"spec": {"action": "DENY"}}));
    let before = found.resources["shop/own"].clone();
    let found = session
        .collect_until(AUTHORIZATION_TYPE, |found| found.resources["shop/own"].resource != before.resource)
        .await
        .unwrap();
    assert!(found.removed.is_empty(), "{:?}", found.removed);

    // The definition goes, and takes its objects with it.
    scene.delete(&format!("{DEFINITIONS}/authorizationpolicies.security.istio.io"));
    let gone = |status: &Value| state(status, "AuthorizationPolicy") == "absent";
    culvertd.status_until("the end of the kind", gone);
    session
        .collect_until(AUTHORIZATION_TYPE, |found| {
            found.removed.contains("shop/own") && found.removed.contains("shop/none")
        })
        .await
        .unwrap();
    assert_eq!(state(&culvertd.status(), "PeerAuthentication"), "synced");
    assert!(session.collected(AUTHORIZATION_TYPE).resources.contains_key(all[2]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_is_not_valid_is_refused_before_it_is_stored() {
    let scene = Scene::new();
    scene.allow();
    scene.define(FILE);
    let culvertd = scene.ready_culvertd();
    let registrations = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations";
    scene.create(registrations, &scene::registration("crds/webhook.yaml", culvertd.webhook));
    let attempt = |version: &str, spec: Value| {
        let object = policy(version, "AuthorizationPolicy", "attempt", &spec);
        let path = format!("{}?dryRun=All&fieldValidation=Strict", place(version, "authorizationpolicies", "default"));
        scene.server().api().request("POST", &path, Some(("application/json", &object))).unwrap()
    };
    // A field that nobody knows might be what narrows the policy. The definition lets it pass, so that it is seen.
    let unknown = json!({"rules": [{"from": [{"source": {"principals": ["a"], "moods": ["good"]}}]}]});
    for version in ["v1", "v1beta1"] {
        // Once culvertd has told the API server by which roots it is known.
        let refused = wait::until("the refusal", LONG, || {
            Some(attempt(version, unknown.clone())).filter(|answer| answer.status != 201)
        });
        let refused = refused.unwrap();
        assert_eq!(refused.status, 422, "{}", refused.body);
        let answer: Value = serde_json::from_str(&refused.body).unwrap();
        let field = "spec.rules[0].from[0].source.moods";
        assert_eq!(answer["details"]["causes"][0]["field"], field, "{answer}");
        assert_eq!(attempt(version, json!({"rules": [{}]})).status, 201);
    }
    // What the definition itself refuses.
    assert_eq!(attempt("v1", json!({"action": "PERHAPS"})).status, 422);
    drop(culvertd);
    assert_eq!(attempt("v1", unknown).status, 201);
}
