//! What stands before what is bound to a waypoint.

use mesh_model::{Change, GatewayAddress, Reach, Snapshot, UnresolvedGateway, Viewpoint};
use mesh_proto::workload as wire;
use prost::Message;

use super::Index;
use super::tests::{apply, delete, options, pod, time};
use crate::api::Kind;

const NAMESPACE: &str =
    "---\n{apiVersion: v1, kind: Namespace, metadata: {name: ns, labels: {istio.io/use-waypoint: gate}}}\n";
const WEB: &str = "---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: ns}
spec: {clusterIP: 10.96.0.7, selector: {app: web}, ports: [{name: http, port: 80}]}
";
/// What a waypoint's maker makes.
const MADE: &str = "---
apiVersion: v1
kind: Service
metadata: {name: gate, namespace: ns, labels: {gateway.networking.k8s.io/gateway-name: gate}}
spec: {clusterIP: 10.96.0.9, selector: {app: gate}, ports: [{name: hbone, port: 15008}]}
";

fn gateway(labels: &str, class: &str, listener: &str, status: &str) -> String {
    format!(
        "---\n{{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {{name: gate, namespace: ns, labels: {{{labels}}}}},
           spec: {{gatewayClassName: {class}, listeners: [{{name: web, port: 80, protocol: HTTP}}, {{name: mesh, {listener}}}]}},
           status: {{{status}}}}}\n"
    )
}

fn ordinary(labels: &str) -> String {
    gateway(labels, "istio-waypoint", "port: 15008, protocol: HBONE", "")
}

fn made() -> String {
    MADE.to_owned() + &pod("gate-1", "10.0.0.9", "app: gate, gateway.networking.k8s.io/gateway-name: gate", "")
}

fn index(text: &str) -> Index {
    let mut index = Index::new(options());
    index.apply(apply(&(NAMESPACE.to_owned() + WEB + &pod("web-1", "10.0.0.1", "app: web", "") + text)), time(0));
    index
}

fn snapshot(index: &Index) -> Snapshot {
    let mut snapshot = Snapshot::new();
    for resource in index.resources() {
        snapshot.apply(Change::address(&resource.name, &resource.body).0);
    }
    snapshot
}

/// The name of the instance that stands before what has the waypoint; none where nothing does.
fn instance(snapshot: &Snapshot, waypoint: Option<&GatewayAddress>) -> Option<Result<String, UnresolvedGateway>> {
    let reach = Reach::new([10, 0, 0, 2].into(), &[[10, 0, 0, 2].into()]);
    let from = Viewpoint::default();
    let found = snapshot.gateway(waypoint?, &from, &reach, &mut fastrand::Rng::with_seed(1), &[]);
    Some(found.map(|found| format!("{}@{}", found.workload.name, found.address)))
}

type Stands = Option<Result<String, UnresolvedGateway>>;

/// What stands before the service and before the pod itself.
fn before(index: &Index) -> (Stands, Stands) {
    let snapshot = snapshot(index);
    let service = snapshot.service_by_name("ns/web.ns.svc.cluster.local").unwrap();
    let pod = snapshot.workload_by_uid("Kubernetes//Pod/ns/web-1").unwrap();
    (instance(&snapshot, service.waypoint.as_ref()), instance(&snapshot, pod.waypoint()))
}

fn at(place: &str) -> Stands {
    Some(Ok(format!("gate-1@{place}")))
}

const REFUSED: Stands = Some(Err(UnresolvedGateway::Unknown));

#[test]
fn a_waypoint_is_for_what_its_label_says() {
    let here = || at("10.0.0.9:15008");
    for (labels, service, workload) in [
        ("", here(), None),
        ("istio.io/waypoint-for: service", here(), None),
        ("istio.io/waypoint-for: workload", None, here()),
        ("istio.io/waypoint-for: all", here(), here()),
        ("istio.io/waypoint-for: none", None, None),
    ] {
        assert_eq!(before(&index(&(made() + &ordinary(labels)))), (service, workload), "{labels}");
    }
}

#[test]
fn a_waypoint_is_where_its_status_says() {
    let placed = |port: u16, status: &str| {
        let listener = format!("port: {port}, protocol: HBONE");
        before(&index(&(made() + &gateway("", "culvert-waypoint", &listener, status)))).0
    };
    assert_eq!(placed(15008, "addresses: [{type: IPAddress, value: 10.96.0.9}]"), at("10.0.0.9:15008"));
    assert_eq!(placed(15009, "addresses: [{value: 10.0.0.9}]"), at("10.0.0.9:15009"));
    assert_eq!(placed(15008, "addresses: [{type: Hostname, value: gate.ns.svc.cluster.local}]"), at("10.0.0.9:15008"));
    assert_eq!(placed(15008, "addresses: [{type: Hostname, value: gone.ns.svc.cluster.local}]"), REFUSED);
    assert_eq!(placed(15008, "addresses: [{type: example.com/other, value: x}]"), at("10.0.0.9:15008"));
}

#[test]
fn what_is_no_waypoint_or_not_there_lets_nothing_through() {
    let refused = (REFUSED, REFUSED);
    // Nothing but the label.
    assert_eq!(before(&index("")), refused);
    // A gateway without anything that it is made of: only its service is known to be missing.
    assert_eq!(before(&index(&ordinary(""))), (REFUSED, None));
    // Another class's, and one without the listener.
    let foreign = gateway("", "nginx", "port: 15008, protocol: HBONE", "");
    let bare = gateway("", "nginx", "port: 443, protocol: HTTPS", "");
    for other in [foreign, bare] {
        assert_eq!(before(&index(&(made() + &other))), refused, "{other}");
    }
    // No instance is ready.
    let not_ready = made().replace("'True'", "'False'");
    assert_eq!(before(&index(&(not_ready + &ordinary("")))).0, Some(Err(UnresolvedGateway::NoReadyInstance)));
}

#[test]
fn a_class_says_who_makes_its_gateways() {
    let class = |controller: &str| {
        format!(
            "---\n{{apiVersion: gateway.networking.k8s.io/v1, kind: GatewayClass, metadata: {{name: mine}}, spec: {{controllerName: {controller}}}}}\n"
        )
    };
    let gateway = gateway("", "mine", "port: 15008, protocol: HBONE", "");
    let mut index = index(&(made() + &gateway));
    assert_eq!(before(&index).0, REFUSED);
    index.apply(apply(&class("culvert.dev/mesh-controller")), time(1));
    assert_eq!(before(&index).0, at("10.0.0.9:15008"));
    index.apply(apply(&class("example.com/other")), time(1));
    assert_eq!(before(&index).0, REFUSED);
    index.apply(apply(&class("istio.io/mesh-controller")), time(1));
    assert_eq!(before(&index).0, at("10.0.0.9:15008"));
    index.apply([delete(Kind::GatewayClass, "", "mine")], time(1));
    assert_eq!(before(&index).0, REFUSED);
}

#[test]
fn objects_of_other_namespaces_are_bound_only_where_the_waypoint_allows_it() {
    let others = NAMESPACE
        .replace("name: ns", "name: other")
        .replace("use-waypoint: gate", "use-waypoint: gate, istio.io/use-waypoint-namespace: ns")
        + &WEB.replace("namespace: ns", "namespace: other").replace("10.96.0.7", "10.96.0.17");
    let routes = |routes: &str| {
        gateway(
            "",
            "istio-waypoint",
            &format!("port: 15008, protocol: HBONE, allowedRoutes: {{namespaces: {{{routes}}}}}"),
            "",
        )
    };
    for (allowed, expected) in [
        ("", REFUSED),
        ("from: Same", REFUSED),
        ("from: All", at("10.0.0.9:15008")),
        ("from: Selector, selector: {matchLabels: {a: b}}", REFUSED),
    ] {
        let index = index(&(made() + &others + &routes(allowed)));
        let snapshot = snapshot(&index);
        let service = snapshot.service_by_name("other/web.other.svc.cluster.local").unwrap();
        assert_eq!(instance(&snapshot, service.waypoint.as_ref()), expected, "{allowed}");
        assert_eq!(before(&index).0, at("10.0.0.9:15008"));
        assert_eq!(index.notes().len(), usize::from(allowed.contains("Selector")), "{:?}", index.notes());
    }
}

#[test]
fn a_waypoint_does_not_stand_before_itself() {
    let index = index(&(made() + &ordinary("istio.io/waypoint-for: all")));
    let snapshot = snapshot(&index);
    assert!(snapshot.service_by_name("ns/gate.ns.svc.cluster.local").unwrap().waypoint.is_none());
    assert!(snapshot.workload_by_uid("Kubernetes//Pod/ns/gate-1").unwrap().waypoint().is_none());
}

#[test]
fn a_change_of_a_gateway_touches_what_is_bound_to_it() {
    let opted_out = WEB
        .replace("name: web, namespace: ns", "name: out, namespace: ns, labels: {istio.io/use-waypoint: none}")
        .replace("0.7", "0.8");
    let mut index = index(&(made() + &opted_out));
    let changes = index.apply(apply(&ordinary("")), time(1));
    let names: Vec<String> = changes.changed().map(|resource| resource.name.to_string()).collect();
    // The service's waypoint is the same as without the gateway, and the pod's is none.
    assert_eq!(names, ["Kubernetes//Pod/ns/web-1"]);
    let changes = index.apply(apply(&ordinary("istio.io/waypoint-for: workload")), time(1));
    let names: Vec<String> = changes.changed().map(|resource| resource.name.to_string()).collect();
    assert_eq!(names, ["Kubernetes//Pod/ns/web-1", "ns/web.ns.svc.cluster.local"]);
    let changes = index.apply([delete(Kind::Gateway, "ns", "gate")], time(1));
    let names: Vec<String> = changes.changed().map(|resource| resource.name.to_string()).collect();
    assert_eq!(names, ["ns/web.ns.svc.cluster.local"]);
    assert_eq!(before(&index), (at("10.0.0.9:15008"), at("10.0.0.9:15008")));
    let wire::address::Type::Service(out) = index
        .resources()
        .find(|resource| &*resource.name == "ns/out.ns.svc.cluster.local")
        .and_then(|resource| wire::Address::decode(&*resource.body).unwrap().r#type)
        .unwrap()
    else {
        panic!()
    };
    assert!(out.waypoint.is_none());
}
