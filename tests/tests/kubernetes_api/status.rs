//! What objects say of what became of them, and the events about those that are not valid.

use serde_json::{Value, json};
use tests::interop::xds_client::AUTHORIZATION_TYPE;
use tests::wait;

use super::LONG;
use super::gateway_api::{GATEWAY_CLASSES, gateway, gateway_class, gateways};
use super::scene::{Scene, pod, pod_status};

const POLICIES: &str = "/apis/security.istio.io/v1/namespaces/shop/authorizationpolicies";
const AUTHENTICATIONS: &str = "/apis/security.istio.io/v1/namespaces/shop/peerauthentications";
const SERVICES: &str = "/api/v1/namespaces/shop/services";

fn policy(name: &str, spec: &Value) -> Value {
    let metadata = json!({"name": name, "namespace": "shop"});
    json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": spec})
}

/// Waits until the object has a condition of the type and with that reason. Returns it.
fn until(scene: &Scene, path: &str, kind: &str, reason: &str) -> Value {
    let what = format!("{kind} of {path} for {reason}");
    let condition = |object: &Value| {
        let all = object["status"]["conditions"].as_array()?;
        all.iter().find(|one| one["type"] == kind && one["reason"] == reason).cloned()
    };
    scene.server().api().until(&what, path, LONG, condition).unwrap()
}

fn message(condition: &Value) -> &str {
    condition["message"].as_str().unwrap()
}

/// Waits for an event about the object with these words in it.
pub fn until_event(scene: &Scene, namespace: &str, object: &str, words: &str) -> Value {
    let path = format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events");
    wait::until(&format!("an event about {object} with {words}"), LONG, || {
        let events = scene.server().api().list(&path).unwrap();
        let is_it = |event: &Value| {
            event["regarding"]["name"] == object && event["note"].as_str().is_some_and(|note| note.contains(words))
        };
        events.into_iter().find(is_it)
    })
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_say_what_became_of_them() {
    let scene = Scene::new();
    scene.allow();
    scene.define("security.istio.io.yaml");
    scene.namespace("shop", &json!({"istio.io/dataplane-mode": "ambient"}));
    let unknown = json!({"rules": [{"from": [{"source": {"principals": ["a"], "moods": ["good"]}}]}]});
    let object = |name: &str| format!("{POLICIES}/{name}");
    scene.create(POLICIES, &policy("own", &json!({"rules": [{}]})));
    scene.create(POLICIES, &policy("odd", &unknown));
    scene.create(POLICIES, &policy("http", &json!({"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]})));
    let metadata = json!({"name": "strict", "namespace": "shop"});
    let strict = json!({
        "apiVersion": "security.istio.io/v1beta1", "kind": "PeerAuthentication", "metadata": metadata,
        "spec": {"mtls": {"mode": "STRICT"}},
    });
    scene.create(&AUTHENTICATIONS.replace("v1", "v1beta1"), &strict);
    let culvertd = scene.ready_culvertd();

    let own = until(&scene, &object("own"), "ZtunnelAccepted", "Accepted");
    assert_eq!((&own["status"], &own["observedGeneration"]), (&json!("True"), &json!(1)));
    until(&scene, &format!("{AUTHENTICATIONS}/strict"), "ZtunnelAccepted", "Accepted");
    let http = until(&scene, &object("http"), "ZtunnelAccepted", "UnsupportedValue");
    assert!(message(&http).contains("methods") && http["status"] == "True", "{http}");
    let odd = until(&scene, &object("odd"), "ZtunnelAccepted", "Invalid");
    assert!(odd["status"] == "False" && message(&odd).contains("spec.rules[0].from[0].source.moods: "), "{odd}");
    assert!(message(&odd).contains("is denied until this is mended"), "{odd}");
    let event = until_event(&scene, "shop", "odd", "source.moods");
    assert_eq!((&event["type"], &event["reason"]), (&json!("Warning"), &json!("Invalid")));
    assert_eq!(event["regarding"]["kind"], "AuthorizationPolicy");

    // Mended, and broken while there is a good version.
    scene.patch(&object("odd"), &json!({"spec": {"rules": [{}]}}));
    let mended = until(&scene, &object("odd"), "ZtunnelAccepted", "Accepted");
    assert_eq!(mended["observedGeneration"], 2);
    scene.patch(&object("odd"), &json!({"spec": {"selector": {"matchLabels": {"a*": "b"}}}}));
    let broken = until(&scene, &object("odd"), "ZtunnelAccepted", "Invalid");
    assert!(message(&broken).contains("the last good version stays in force"), "{broken}");
    until_event(&scene, "shop", "odd", "wildcard");

    scene.patch(&object("odd"), &json!({"spec": {"selector": null}}));
    until(&scene, &object("odd"), "ZtunnelAccepted", "Accepted");

    // Of what has no status of its own, events alone.
    let labels = json!({"istio.io/dataplane-mode": "sideways"});
    scene.namespace("lost", &labels);
    until_event(&scene, "default", "lost", "count as enrolled");

    // Nothing but the conditions is culvertd's; and what says so already is not written again, by another leader either.
    let found = scene.get(&object("own"));
    let managed = found["metadata"]["managedFields"].as_array().unwrap();
    let mine: Vec<&Value> = managed.iter().filter(|one| one["manager"] == "culvertd-status").collect();
    assert!(mine.len() == 1 && mine[0]["subresource"] == "status", "{managed:?}");
    culvertd.process.terminate(LONG).unwrap();
    let culvertd = scene.ready_culvertd();
    scene.create(POLICIES, &policy("later", &json!({"rules": [{}]})));
    until(&scene, &object("later"), "ZtunnelAccepted", "Accepted");
    assert_eq!(scene.get(&object("own"))["metadata"]["resourceVersion"], found["metadata"]["resourceVersion"]);
    let events = scene.server().api().list("/apis/events.k8s.io/v1/namespaces/shop/events").unwrap();
    assert_eq!(events.len(), 2, "{events:#?}");

    // Another writes the same condition: it is left to them.
    let conditions = json!([{"type": "ZtunnelAccepted", "status": "True", "reason": "Theirs", "message": "theirs"}]);
    let mut theirs = policy("own", &json!({}));
    theirs["status"] = json!({"conditions": conditions});
    theirs.as_object_mut().unwrap().remove("spec");
    scene.apply(&format!("{}/status", object("own")), &theirs);
    scene.create(POLICIES, &policy("last", &json!({"rules": [{}]})));
    until(&scene, &object("last"), "ZtunnelAccepted", "Accepted");
    until(&scene, &object("own"), "ZtunnelAccepted", "Theirs");
    drop(culvertd);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_says_whether_it_is_bound_to_a_waypoint() {
    let scene = Scene::new();
    scene.allow();
    scene.namespace("shop", &json!({"istio.io/dataplane-mode": "ambient"}));
    let ports = json!([{"port": 80}]);
    scene.service("shop", "web", &json!({"selector": {"app": "web"}, "ports": ports}));
    let _culvertd = scene.ready_culvertd();
    let web = format!("{SERVICES}/web");
    let namespace = "/api/v1/namespaces/shop";
    scene.patch(namespace, &json!({"metadata": {"labels": {"istio.io/use-waypoint": "gate"}}}));
    let bound = until(&scene, &web, "istio.io/WaypointBound", "WaypointIsNotReady");
    assert!(bound["status"] == "False" && message(&bound).contains("shop/gate"), "{bound}");
    scene.service("shop", "gate", &json!({"ports": ports}));
    let bound = until(&scene, &web, "istio.io/WaypointBound", "WaypointAccepted");
    assert_eq!(bound["status"], "True", "{bound}");
    scene.patch(&web, &json!({"metadata": {"labels": {"istio.io/use-waypoint": "none"}}}));
    let free = |object: &Value| object["status"]["conditions"].as_array().is_none_or(Vec::is_empty).then_some(());
    scene.server().api().until("a service that is not bound", &web, LONG, free).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_and_gateways_say_what_became_of_them() {
    let scene = Scene::new();
    scene.allow();
    scene.define("networking.istio.io.yaml");
    scene.define_gateways();
    scene.namespace("shop", &json!({}));
    let place = |plural: &str| format!("/apis/networking.istio.io/v1/namespaces/shop/{plural}");
    let entry = |kind: &str, spec: &Value| json!({"apiVersion": "networking.istio.io/v1", "kind": kind, "metadata": {"name": "one"}, "spec": spec});
    let spec = json!({"hosts": ["db.example.com"], "ports": [{"number": 80}], "addresses": ["192.0.2.1/240"]});
    scene.create(&place("serviceentries"), &entry("ServiceEntry", &spec));
    scene.create(&place("workloadentries"), &entry("WorkloadEntry", &json!({"address": "192.0.2.7"})));
    scene.create(GATEWAY_CLASSES, &gateway_class("waypoint"));
    scene.create(&gateways("shop"), &gateway("shop", "gate", "waypoint"));
    scene.create(&gateways("shop"), &gateway("shop", "other", "others"));
    let _culvertd = scene.ready_culvertd();

    let one = |plural: &str| format!("{}/one", place(plural));
    let bad = until(&scene, &one("serviceentries"), "ZtunnelAccepted", "Invalid");
    assert!(message(&bad).contains("spec.addresses[0]: ") && message(&bad).contains("are refused until"), "{bad}");
    until_event(&scene, "shop", "one", "spec.addresses[0]");
    scene.patch(&one("serviceentries"), &json!({"spec": {"addresses": ["192.0.2.0/24"]}}));
    let mended = until(&scene, &one("serviceentries"), "ZtunnelAccepted", "Accepted");
    assert_eq!((&mended["status"], &mended["observedGeneration"]), (&json!("True"), &json!(2)));
    let class = until(&scene, &format!("{GATEWAY_CLASSES}/waypoint"), "Accepted", "Accepted");
    assert_eq!(class["observedGeneration"], 1, "{class}");
    let gate = format!("{}/gate", gateways("shop"));
    until(&scene, &gate, "Accepted", "Accepted");
    let programmed = until(&scene, &gate, "Programmed", "AddressNotAssigned");
    assert!(message(&programmed).contains("no Service shop/gate"), "{programmed}");
    scene.service("shop", "gate", &json!({"ports": [{"port": 15008}]}));
    until(&scene, &gate, "Programmed", "Programmed");
    assert!(scene.get(&format!("{}/other", gateways("shop")))["status"].is_null());

    // What checks a workload writes a condition of its own: each keeps theirs.
    let mut healthy = entry("WorkloadEntry", &json!({}));
    healthy.as_object_mut().unwrap().remove("spec");
    healthy["status"] = json!({"conditions": [{"type": "Healthy", "status": "False"}]});
    until(&scene, &one("workloadentries"), "ZtunnelAccepted", "Accepted");
    scene.apply(&format!("{}/status", one("workloadentries")), &healthy);
    let both = |object: &Value| (object["status"]["conditions"].as_array()?.len() == 2).then_some(());
    scene.server().api().until("both conditions", &one("workloadentries"), LONG, both).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_says_which_proxies_refuse_it() {
    let scene = Scene::new();
    scene.allow();
    scene.define("security.istio.io.yaml");
    scene.namespace("shop", &json!({}));
    let ztunnel = scene.pod(&pod("culvert-system", "ztunnel-1", "ztunnel", "node-1"), &pod_status("10.244.0.2"));
    scene.create(POLICIES, &policy("own", &json!({"rules": [{}]})));
    let culvertd = scene.ready_culvertd();
    let path = format!("{POLICIES}/own");
    until(&scene, &path, "ZtunnelAccepted", "Accepted");

    let token = scene.token("culvert-system", "ztunnel", Some(&ztunnel));
    let mut session = culvertd.session(&scene.root(), &token).await.unwrap();
    // Whoever is no proxy of a node has no say.
    let stranger = scene.pod(&pod("shop", "web-1", "web", "node-1"), &pod_status("10.244.0.5"));
    let own = scene.token("shop", "web", Some(&stranger));
    let mut forger = culvertd.session(&scene.root(), &own).await.unwrap();
    let first = forger.next().await.unwrap();
    forger.nack(&first, "shop/own: because I say so").await.unwrap();
    let first = session.next().await.unwrap();
    assert_eq!(first.type_url, AUTHORIZATION_TYPE);
    session.nack(&first, "shop/own: too odd for me").await.unwrap();
    let refused = until(&scene, &path, "ZtunnelAccepted", "RefusedByProxy");
    assert!(refused["status"] == "False" && message(&refused).contains("(pod ztunnel-1)"), "{refused}");
    assert!(message(&refused).ends_with(": too odd for me"), "{refused}");

    scene.patch(&path, &json!({"spec": {"action": "DENY"}}));
    let next = session.next().await.unwrap();
    session.ack(&next).await.unwrap();
    let accepted = until(&scene, &path, "ZtunnelAccepted", "Accepted");
    assert_eq!((&accepted["status"], &accepted["observedGeneration"]), (&json!("True"), &json!(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_says_also_which_proxies_of_other_replicas_refuse_it() {
    const BOARD: &str = "/api/v1/namespaces/culvert-system/configmaps/culvertd-refusals";
    let scene = Scene::new();
    scene.allow();
    scene.define("security.istio.io.yaml");
    scene.namespace("shop", &json!({}));
    let ztunnel = scene.pod(&pod("culvert-system", "ztunnel-1", "ztunnel", "node-1"), &pod_status("10.244.0.2"));
    scene.create(POLICIES, &policy("own", &json!({"rules": [{}]})));
    let path = format!("{POLICIES}/own");
    let leading = scene.ready_culvertd();
    leading.status_until("it leads", |status| status["leader"]["leads"] == true);
    let follower = scene.ready_culvertd();
    until(&scene, &path, "ZtunnelAccepted", "Accepted");

    let token = scene.token("culvert-system", "ztunnel", Some(&ztunnel));
    let mut session = follower.session(&scene.root(), &token).await.unwrap();
    let first = session.next().await.unwrap();
    assert_eq!(first.type_url, AUTHORIZATION_TYPE);
    session.nack(&first, "shop/own: too odd for me").await.unwrap();
    let refused = until(&scene, &path, "ZtunnelAccepted", "RefusedByProxy");
    assert!(message(&refused).ends_with("(pod ztunnel-1): too odd for me"), "{refused}");
    assert_eq!(scene.get(BOARD)["data"].as_object().unwrap().len(), 1);

    // The next leader knows of it as well, from its own client or from the board.
    leading.process.terminate(LONG).unwrap();
    follower.status_until("it leads", |status| status["leader"]["leads"] == true);
    let another = scene.ready_culvertd();
    until(&scene, &path, "ZtunnelAccepted", "RefusedByProxy");

    // A replica that ends takes its word back.
    follower.process.terminate(LONG).unwrap();
    another.status_until("it leads", |status| status["leader"]["leads"] == true);
    until(&scene, &path, "ZtunnelAccepted", "Accepted");
    assert!(scene.get(BOARD)["data"].as_object().is_none_or(serde_json::Map::is_empty));
}
