//! What objects become, and what a change touches.

use std::time::{Duration, SystemTime};

use mesh_model::{Health, SpiffeId};
use mesh_proto::workload as wire;
use prost::Message;

use super::{Changes, Event, Index, Options, Roster};
use crate::api::{Kind, Name, ObjectId, Outcome, parse};
use crate::ca::{Directory, NodeIdentity};

const UNHEALTHY: wire::WorkloadStatus = wire::WorkloadStatus::Unhealthy;
pub(super) const CONFIRMATION: Duration = Duration::from_secs(60);

pub(super) fn options() -> Options {
    Options {
        cluster_id: "Kubernetes".to_owned(),
        cluster_domain: "cluster.local".to_owned(),
        trust_domain: "cluster.local".to_owned(),
        root_namespace: "root".into(),
        confirmation: CONFIRMATION,
    }
}

pub(super) fn time(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
}

/// Events that put every object of a manifest in force.
pub(super) fn apply(text: &str) -> Vec<Event> {
    let event = |outcome| match outcome {
        Outcome::Object(object) => Event::Apply(object),
        other => panic!("not accepted: {other:?}"),
    };
    parse(text).into_iter().map(|document| event(document.outcome)).collect()
}

pub(super) fn delete(kind: Kind, namespace: &str, name: &str) -> Event {
    Event::Delete(ObjectId { kind, namespace: namespace.into(), name: name.into() })
}

pub(super) fn index(text: &str) -> Index {
    let mut index = Index::new(options());
    index.apply(apply(text), time(0));
    index
}

fn decode(body: &[u8]) -> wire::address::Type {
    wire::Address::decode(body).unwrap().r#type.unwrap()
}

pub(super) fn find(index: &Index, name: &str) -> Option<wire::address::Type> {
    index.resources().find(|resource| &*resource.name == name).map(|resource| decode(&resource.body))
}

pub(super) fn workload(index: &Index, pod: &str) -> wire::Workload {
    match find(index, &format!("Kubernetes//Pod/ns/{pod}")) {
        Some(wire::address::Type::Workload(workload)) => workload,
        other => panic!("no workload {pod}: {other:?}"),
    }
}

pub(super) fn service(index: &Index, name: &str) -> wire::Service {
    match find(index, &format!("ns/{name}.ns.svc.cluster.local")) {
        Some(wire::address::Type::Service(service)) => service,
        other => panic!("no service {name}: {other:?}"),
    }
}

/// `service -> service port:target port, ...` of every service of a pod.
pub(super) fn services(index: &Index, pod: &str) -> Vec<String> {
    let mut list: Vec<String> = workload(index, pod)
        .services
        .into_iter()
        .map(|(name, list)| {
            let ports: Vec<String> =
                list.ports.iter().map(|port| format!("{}:{}", port.service_port, port.target_port)).collect();
            format!("{} -> {}", name.split(['/', '.']).nth(1).unwrap(), ports.join(", "))
        })
        .collect();
    list.sort();
    list
}

/// Last parts of the names of all changed resources; a removed one has a `-` before it.
fn touched(changes: &Changes) -> Vec<String> {
    let short = |name: &str| {
        let last = name.rsplit('/').next().unwrap_or_default();
        last.split(".ns.svc").next().unwrap_or_default().to_owned()
    };
    let removed = changes.removed().map(|name| format!("-{}", short(name)));
    changes.changed().map(|resource| short(&resource.name)).chain(removed).collect()
}

pub(super) fn pod(name: &str, address: &str, labels: &str, rest: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: ns, labels: {{{labels}}}, annotations: {{ambient.istio.io/redirection: enabled}}}}
spec:
  serviceAccountName: sa
  nodeName: node-1
  containers: [{{name: main, ports: [{{name: web, containerPort: 8080}}]}}]
  {rest}
status: {{phase: Running, podIP: {address}, conditions: [{{type: Ready, status: 'True'}}]}}
"
    )
}

pub(super) const ENROLLED: &str =
    "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: ns, labels: {istio.io/dataplane-mode: ambient}}\n";
pub(super) const WEB: &str = "---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: ns}
spec: {clusterIP: 10.96.0.7, selector: {app: web}, ports: [{name: http, port: 80, targetPort: web}]}
";

#[test]
fn the_names_of_ports_reach_the_proxy() {
    let spec = "---
apiVersion: v1
kind: Service
metadata: {name: dns, namespace: ns}
spec:
  clusterIP: 10.96.0.8
  ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53}, {name: metrics, port: 9153, targetPort: web}]
---
apiVersion: v1
kind: Service
metadata: {name: nameless, namespace: ns}
spec: {clusterIP: 10.96.0.9, ports: [{port: 80}]}
";
    let index = index(spec);
    let read = |name: &str| mesh_model::Service::try_from(&service(&index, name)).unwrap().port_names;
    let names = read("dns");
    assert_eq!((names.port("dns"), names.port("dns-tcp"), names.port("metrics")), (None, Some(53), Some(9153)));
    assert_eq!((service(&index, "nameless").extensions, read("nameless")), (Vec::new(), Default::default()));
}

#[test]
fn a_pod_becomes_a_workload() {
    let text = ENROLLED.to_owned()
        + WEB
        + "---\n{apiVersion: v1, kind: Node, metadata: {name: node-1, labels:
             {topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z}}}\n"
        + &pod("web-5d-x", "10.244.1.5", "app: web, version: v1, pod-template-hash: 5d", "").replace(
            "annotations:",
            "ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: web-5d, uid: u, controller: true}], annotations:",
        );
    let index = index(&text);
    let expected = wire::Workload {
        uid: "Kubernetes//Pod/ns/web-5d-x".to_owned(),
        name: "web-5d-x".to_owned(),
        namespace: "ns".to_owned(),
        addresses: vec![vec![10, 244, 1, 5].into()],
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        service_account: "sa".to_owned(),
        node: "node-1".to_owned(),
        canonical_name: "web".to_owned(),
        canonical_revision: "v1".to_owned(),
        workload_type: wire::WorkloadType::Deployment.into(),
        workload_name: "web".to_owned(),
        services: [(
            "ns/web.ns.svc.cluster.local".to_owned(),
            wire::PortList {
                ports: vec![wire::Port {
                    service_port: 80,
                    target_port: 8080,
                    app_protocol: wire::AppProtocol::Http11.into(),
                }],
            },
        )]
        .into(),
        cluster_id: "Kubernetes".to_owned(),
        locality: Some(wire::Locality { region: "r".to_owned(), zone: "z".to_owned(), subzone: String::new() }),
        ..Default::default()
    };
    assert_eq!(workload(&index, "web-5d-x"), expected);
    let service = service(&index, "web");
    assert_eq!(service.hostname, "web.ns.svc.cluster.local");
    assert_eq!(service.addresses[0].address.as_ref(), [10, 96, 0, 7]);
    // A named target port is each pod's own.
    assert_eq!((service.ports[0].service_port, service.ports[0].target_port), (80, 0));
    let aliases: Vec<_> = index.resources().flat_map(|resource| resource.aliases.clone()).collect();
    assert!(aliases.contains(&"/10.244.1.5".into()) && aliases.contains(&"/10.96.0.7".into()), "{aliases:?}");
}

#[test]
fn identity_health_and_protocol() {
    let base = pod("a", "10.0.0.1", "app: a", "");
    let without = |text: &str| base.replace(text, "");
    let annotation = ", annotations: {ambient.istio.io/redirection: enabled}";
    let ready = ", conditions: [{type: Ready, status: 'True'}]";
    let (hbone, none) = (wire::TunnelProtocol::Hbone, wire::TunnelProtocol::None);
    let (healthy, unhealthy) = (wire::WorkloadStatus::Healthy, wire::WorkloadStatus::Unhealthy);
    let plain = "---\n{apiVersion: v1, kind: Namespace, metadata: {name: ns}}\n";
    let native = base.replace("app: a", "app: a, networking.istio.io/tunnel: http");
    let opted_out = without(annotation).replace("app: a", "istio.io/dataplane-mode: none");
    let opted_in = without(annotation).replace("app: a", "istio.io/dataplane-mode: ambient");
    let table = [
        ("captured", ENROLLED, base.clone(), hbone, healthy),
        ("not ready", ENROLLED, without(ready), hbone, unhealthy),
        ("enrolled but not confirmed", ENROLLED, without(annotation), none, unhealthy),
        ("not enrolled", plain, without(annotation), none, healthy),
        ("no such namespace", "", without(annotation), none, healthy),
        ("opted out", ENROLLED, opted_out, none, healthy),
        ("opted in", plain, opted_in, none, unhealthy),
        ("speaks HBONE itself", plain, native, hbone, healthy),
        ("host network", ENROLLED, pod("a", "10.0.0.1", "app: a", "hostNetwork: true"), none, healthy),
        (
            "terminating",
            ENROLLED,
            base.replace("{name: a,", "{name: a, deletionTimestamp: 2026-01-01T00:00:00Z,"),
            hbone,
            unhealthy,
        ),
    ];
    for (name, namespace, text, protocol, status) in table {
        let workload = workload(&index(&(namespace.to_owned() + &text)), "a");
        assert_eq!((workload.tunnel_protocol(), workload.status()), (protocol, status), "{name}");
        let is_host = name == "host network";
        assert_eq!(workload.network_mode() == wire::NetworkMode::HostNetwork, is_host, "{name}");
        assert_eq!(workload.native_tunnel, name == "speaks HBONE itself", "{name}");
    }
    let foreign = Options { trust_domain: "example.org".to_owned(), ..options() };
    let mut index = Index::new(foreign);
    index.apply(apply(&base), time(0));
    assert_eq!(workload(&index, "a").trust_domain, "example.org");
}

#[test]
fn a_pod_that_terminates_is_said_to_serve_while_it_does() {
    let draining = |workload: &wire::Workload| workload.extensions.iter().any(|one| one.name == "culvert.dev/draining");
    let health = |text: &str| mesh_model::Workload::try_from(&workload(&index(text), "a")).unwrap().health;
    let ready = ENROLLED.to_owned() + &pod("a", "10.0.0.1", "app: a", "");
    let ends = |text: &str| text.replace("{name: a,", "{name: a, deletionTimestamp: 2026-01-01T00:00:00Z,");
    let not_ready = ready.replace("status: 'True'", "status: 'False'");
    let unconfirmed = ready.replace("enabled}", "pending}");
    for (text, expected) in [
        (ready.clone(), Health::Healthy),
        (ends(&ready), Health::Draining),
        (not_ready.clone(), Health::Unhealthy),
        (ends(&not_ready), Health::Unhealthy),
        // It would be served in plaintext.
        (ends(&unconfirmed), Health::Unhealthy),
    ] {
        assert_eq!(health(&text), expected, "{text}");
    }
    // Its own address goes on to be reached by HBONE, and it stays an endpoint.
    let index = index(&(WEB.to_owned() + &ends(&ready).replace("app: a", "app: web")));
    let workload = workload(&index, "a");
    assert!(draining(&workload));
    assert_eq!((workload.tunnel_protocol(), workload.status()), (wire::TunnelProtocol::Hbone, UNHEALTHY));
    assert_eq!(services(&index, "a"), ["web -> 80:8080"]);
}

#[test]
fn an_endpoint_that_terminates_is_said_to_serve_while_it_does() {
    let slice = |conditions: &str| {
        format!(
            "---
apiVersion: v1
kind: Service
metadata: {{name: db, namespace: ns}}
spec: {{clusterIP: 10.96.0.9, ports: [{{name: sql, port: 5432}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: db-1, namespace: ns, labels: {{kubernetes.io/service-name: db}}}}
addressType: IPv4
ports: [{{name: sql, port: 5432}}]
endpoints: [{{addresses: [192.0.2.1], conditions: {{{conditions}}}}}]
"
        )
    };
    for (conditions, expected) in [
        ("", Health::Healthy),
        ("ready: true, serving: true, terminating: false", Health::Healthy),
        ("ready: false, serving: true, terminating: true", Health::Draining),
        ("ready: false, serving: false, terminating: true", Health::Unhealthy),
        ("ready: false, terminating: true", Health::Unhealthy),
        ("ready: false, serving: true", Health::Unhealthy),
        ("ready: false", Health::Unhealthy),
        // Of a service with publishNotReadyAddresses.
        ("ready: true, serving: true, terminating: true", Health::Healthy),
    ] {
        let index = index(&slice(conditions));
        let found = find(&index, "Kubernetes/discovery.k8s.io/EndpointSlice/ns/db-1/192.0.2.1");
        let Some(wire::address::Type::Workload(workload)) = found else { panic!("no endpoint") };
        assert_eq!(mesh_model::Workload::try_from(&workload).unwrap().health, expected, "{conditions}");
    }
}

#[test]
fn pods_without_address_or_life_are_no_workloads() {
    for text in [
        pod("a", "10.0.0.1", "", "").replace("podIP: 10.0.0.1, ", ""),
        pod("a", "10.0.0.1", "", "").replace("Running", "Failed"),
        pod("a", "10.0.0.1", "", "").replace("Running", "Succeeded"),
    ] {
        assert_eq!(index(&text).resources().count(), 0);
    }
}

#[test]
fn a_pod_that_is_not_confirmed_is_kept_from_traffic_for_a_bounded_time() {
    let unconfirmed = pod("a", "10.0.0.1", "", "").replace("enabled", "pending");
    let mut index = index(ENROLLED);
    index.apply(apply(&unconfirmed), time(100));
    assert_eq!(workload(&index, "a").status(), wire::WorkloadStatus::Unhealthy);
    assert!(index.notes()[0].reason.contains("gets no traffic"), "{:?}", index.notes());
    assert_eq!(index.next_deadline(), Some(time(160)));
    assert!(index.apply([], time(159)).is_empty());
    // Another change of the pod does not give it more time.
    index.apply(apply(&unconfirmed.replace("node-1", "node-2")), time(159));
    assert_eq!(touched(&index.apply([], time(160))), ["a"]);
    let expired = workload(&index, "a");
    assert_eq!(
        (expired.status(), expired.tunnel_protocol()),
        (wire::WorkloadStatus::Healthy, wire::TunnelProtocol::None)
    );
    assert!(index.notes()[0].reason.contains("gets plaintext"), "{:?}", index.notes());
    assert_eq!(index.next_deadline(), None);
    index.apply(apply(&pod("a", "10.0.0.1", "", "")), time(161));
    assert_eq!(workload(&index, "a").tunnel_protocol(), wire::TunnelProtocol::Hbone);
    assert!(index.notes().is_empty());
    // After a restart, a pod has waited since it was created.
    let created = unconfirmed.replace("{name: a,", "{name: a, creationTimestamp: 2020-01-01T00:00:00Z,");
    let mut restarted = Index::new(options());
    restarted.apply(apply(&(ENROLLED.to_owned() + &created)), time(0));
    assert_eq!(workload(&restarted, "a").status(), wire::WorkloadStatus::Healthy);
}

#[test]
fn a_pod_that_is_enrolled_from_the_start_is_never_reached_in_plaintext() {
    let unconfirmed = pod("a", "10.0.0.1", "", "").replace("enabled", "pending");
    let no_address = unconfirmed.replace("podIP: 10.0.0.1, ", "");
    let (hbone, none) = (wire::TunnelProtocol::Hbone, wire::TunnelProtocol::None);
    let unhealthy = wire::WorkloadStatus::Unhealthy;
    let plain = "---\n{apiVersion: v1, kind: Namespace, metadata: {name: ns}}\n";
    for (name, begins, then, protocol) in [
        ("enrolled first", ENROLLED, &[][..], hbone),
        ("enrolled when it ran", plain, &[ENROLLED], none),
        ("enrolled anew when it ran", ENROLLED, &[plain, ENROLLED], none),
    ] {
        let mut index = index(begins);
        index.apply(apply(&no_address), time(100));
        index.apply(apply(&unconfirmed), time(101));
        for namespace in then {
            index.apply(apply(namespace), time(102));
        }
        let workload = workload(&index, "a");
        assert_eq!((workload.tunnel_protocol(), workload.status()), (protocol, unhealthy), "{name}");
        index.apply([], time(1000));
        let late = self::workload(&index, "a");
        assert_eq!((late.tunnel_protocol(), late.status()), (protocol, wire::WorkloadStatus::Healthy), "{name}");
    }
    // Another of the same name, which was not seen before it ran.
    let mut index = index(ENROLLED);
    index.apply(apply(&no_address), time(100));
    index.apply(apply(&no_address.replace("Pending", "Failed").replace("Running", "Failed")), time(101));
    index.apply(apply(&unconfirmed), time(102));
    assert_eq!(workload(&index, "a").tunnel_protocol(), none);
}

#[test]
fn services_find_their_pods_through_selectors() {
    let numbered = "---\n{apiVersion: v1, kind: Service, metadata: {name: num, namespace: ns},
        spec: {selector: {app: web, tier: front}, ports: [{name: a, port: 81, targetPort: 8081}, {name: b, port: 82}]}}\n";
    let external = "---\n{apiVersion: v1, kind: Service, metadata: {name: ext, namespace: ns},
        spec: {type: ExternalName, externalName: example.org, selector: {app: web}}}\n";
    let elsewhere = WEB.replace("namespace: ns", "namespace: other").replace("10.96.0.7", "10.96.0.8");
    let mut index = index(
        &(WEB.to_owned() + numbered + external + &elsewhere + &pod("a", "10.0.0.1", "app: web, tier: front", "")),
    );
    assert_eq!(services(&index, "a"), ["num -> 81:8081, 82:82", "web -> 80:8080"]);
    assert!(find(&index, "ns/ext.ns.svc.cluster.local").is_none());
    // A pod without the named port stands behind the service, but serves no port of it.
    index.apply(
        apply(&pod("a", "10.0.0.1", "app: web", "").replace("name: web, containerPort", "name: http, containerPort")),
        time(1),
    );
    assert_eq!(services(&index, "a"), ["web -> "]);
    index.apply([delete(Kind::Service, "ns", "web")], time(2));
    assert_eq!(services(&index, "a"), [""; 0]);
    assert!(find(&index, "ns/web.ns.svc.cluster.local").is_none());
}

#[test]
fn a_change_touches_only_what_depends_on_it() {
    let mut text = ENROLLED.to_owned() + WEB;
    for number in 0..50 {
        text += &pod(&format!("p{number}"), &format!("10.0.0.{}", number + 1), "app: web", "");
    }
    text += &pod("other", "10.0.1.1", "app: other", "");
    let mut index = index(&text);
    let mut change = |text: &str| touched(&index.apply(apply(text), time(1)));
    assert_eq!(change(&pod("p3", "10.0.0.99", "app: web", "")), ["p3"]);
    assert_eq!(change(&pod("p3", "10.0.0.99", "app: web", "")), [""; 0]);
    // A pod's label that nothing looks at changes nothing on the wire.
    assert_eq!(change(&pod("other", "10.0.1.1", "app: other, color: red", "")), ["other"; 0]);
    assert_eq!(change(&WEB.replace("app: web", "app: other")).len(), 51);
    assert_eq!(change(&WEB.replace("app: web", "app: other").replace("10.96.0.7", "10.96.0.9")), ["web"]);
    assert_eq!(change("---\n{apiVersion: v1, kind: ServiceAccount, metadata: {name: sa, namespace: ns}}"), [""; 0]);
    assert_eq!(touched(&index.apply([delete(Kind::Pod, "ns", "other")], time(1))), ["-other"]);
}

#[test]
fn service_options_reach_the_wire() {
    let spec = |rest: &str| {
        let text = format!("{{apiVersion: v1, kind: Service, metadata: {{name: s, namespace: ns}}, spec: {{{rest}}}}}");
        service(&index(&text), "s")
    };
    let headless = spec("clusterIP: None, publishNotReadyAddresses: true, selector: {a: b}");
    assert!(headless.addresses.is_empty() && headless.canonical);
    let balancing = headless.load_balancing.unwrap();
    assert_eq!(balancing.health_policy(), wire::load_balancing::HealthPolicy::AllowAll);
    let dual = spec("clusterIPs: [10.96.0.1, 'fd00::1'], ipFamilies: [IPv4, IPv6], ports: [{port: 1}]");
    assert_eq!((dual.addresses.len(), dual.ip_families()), (2, wire::IpFamilies::Dual));
    assert_eq!((dual.load_balancing, dual.waypoint), (None, None));
    let local = spec("internalTrafficPolicy: Local, ports: [{port: 1}]").load_balancing.unwrap();
    assert_eq!(local.mode(), wire::load_balancing::Mode::Strict);
    assert_eq!(local.routing_preference, [wire::load_balancing::Scope::Node as i32]);
}

#[test]
fn a_namespace_that_is_not_valid_counts_as_enrolled_and_hides_no_waypoint() {
    let uncaptured = |name: &str, address: &str, labels: &str| pod(name, address, labels, "").replace("enabled", "x");
    let mut index = index(
        &(uncaptured("plain", "10.0.0.1", "app: web")
            + &uncaptured("out", "10.0.0.2", "istio.io/dataplane-mode: none, istio.io/use-waypoint: none")
            + &pod("captured", "10.0.0.3", "", "")
            + WEB),
    );
    let tunnel = |index: &Index, name: &str| workload(index, name).tunnel_protocol();
    assert_eq!(tunnel(&index, "plain"), wire::TunnelProtocol::None);
    let gate = |index: &Index| {
        let bound = [service(index, "web").waypoint, workload(index, "plain").waypoint];
        bound.map(|waypoint| match waypoint?.destination? {
            wire::gateway_address::Destination::Hostname(name) => Some(name.hostname),
            other => panic!("{other:?}"),
        })
    };
    for (labels, expected) in [
        ("{istio.io/dataplane-mode: sideways, istio.io/use-waypoint: gate}", Some("gate.ns.svc.cluster.local")),
        ("{istio.io/dataplane-mode: sideways}", None),
        // Nobody knows which: none that is there.
        ("{istio.io/dataplane-mode: [ambient]}", Some("_.ns.svc.cluster.local")),
    ] {
        let text = format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: ns, labels: {labels}}}}}");
        index.apply(super::policy_tests::unread(&text), time(0));
        assert_eq!(gate(&index), [expected.map(str::to_owned), expected.map(str::to_owned)], "{labels}");
        // Never in plaintext, however long it takes to mend that.
        assert_eq!(tunnel(&index, "plain"), wire::TunnelProtocol::Hbone);
        assert_eq!((tunnel(&index, "captured"), index.next_deadline()), (wire::TunnelProtocol::Hbone, None));
        index.apply([], time(2 * CONFIRMATION.as_secs()));
        assert_eq!(tunnel(&index, "plain"), wire::TunnelProtocol::Hbone);
        // Its own label is not in doubt.
        assert_eq!((tunnel(&index, "out"), workload(&index, "out").waypoint), (wire::TunnelProtocol::None, None));
        let notes = index.conflicts();
        assert!(notes[0].object == "Namespace ns" && notes[0].reason.contains("count as enrolled"), "{notes:?}");
    }
    index.apply(apply("{apiVersion: v1, kind: Namespace, metadata: {name: ns}}"), time(0));
    assert_eq!((tunnel(&index, "plain"), gate(&index)), (wire::TunnelProtocol::None, [None, None]));
    assert!(index.conflicts().is_empty());
}

#[test]
fn a_waypoint_is_bound_by_label_whether_it_exists_or_not() {
    let namespace = ENROLLED.replace("ambient}", "ambient, istio.io/use-waypoint: gate}");
    let exempt = WEB.replace("name: web,", "name: free, labels: {istio.io/use-waypoint: none},").replace("0.7", "0.8");
    let index = index(
        &(namespace
            + WEB
            + &exempt
            + &pod("a", "10.0.0.1", "app: web", "")
            + &pod("gate", "10.0.0.2", "gateway.networking.k8s.io/gateway-name: gate", "")),
    );
    let expected = wire::GatewayAddress {
        destination: Some(wire::gateway_address::Destination::Hostname(wire::NamespacedHostname {
            namespace: "ns".to_owned(),
            hostname: "gate.ns.svc.cluster.local".to_owned(),
        })),
        hbone_mtls_port: 15008,
    };
    assert_eq!(service(&index, "web").waypoint, Some(expected.clone()));
    assert_eq!(workload(&index, "a").waypoint, Some(expected));
    assert_eq!((service(&index, "free").waypoint, workload(&index, "gate").waypoint), (None, None));
}

#[test]
fn endpoint_slices_stand_for_pods_and_for_others() {
    let text = "---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: ns}
spec: {clusterIP: 10.96.0.9, ports: [{name: sql, port: 5432, targetPort: 5432}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-1, namespace: ns, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
ports: [{name: sql, port: 15432}]
endpoints:
  - {addresses: [10.0.0.1]}
  - {addresses: [192.0.2.1], conditions: {ready: false}, zone: z}
  - {addresses: [192.0.2.2]}
";
    let mut index = index(&(text.to_owned() + &pod("a", "10.0.0.1", "app: a", "")));
    assert_eq!(services(&index, "a"), ["db -> 5432:15432"]);
    let endpoint = |index: &Index, address: &str| {
        find(index, &format!("Kubernetes/discovery.k8s.io/EndpointSlice/ns/db-1/{address}"))
    };
    let Some(wire::address::Type::Workload(outside)) = endpoint(&index, "192.0.2.1") else { panic!("no endpoint") };
    assert_eq!(
        (outside.status(), outside.tunnel_protocol()),
        (wire::WorkloadStatus::Unhealthy, wire::TunnelProtocol::None)
    );
    assert_eq!(outside.services["ns/db.ns.svc.cluster.local"].ports[0].target_port, 15432);
    assert_eq!(outside.locality.unwrap().zone, "z");
    assert!(endpoint(&index, "10.0.0.1").is_none(), "a pod's address is never given to a second workload");
    // When the pod goes, its address is an endpoint like any other; when it comes back, it is the pod again.
    let changes = index.apply([delete(Kind::Pod, "ns", "a")], time(1));
    assert_eq!(touched(&changes), ["10.0.0.1", "-a"]);
    let changes = index.apply(apply(&pod("a", "10.0.0.1", "app: a", "")), time(1));
    assert_eq!(touched(&changes), ["a", "-10.0.0.1"]);
    // With a selector what somebody wrote counts still, and what is derived from the selector does not.
    let (service, slice) = text.split_at(text.find("---\napiVersion: discovery").unwrap());
    let selecting = service.replace("{clusterIP", "{selector: {x: y}, clusterIP");
    assert!(touched(&index.apply(apply(&selecting), time(1))).is_empty());
    let managed = "service-name: db, endpointslice.kubernetes.io/managed-by: endpointslice-controller.k8s.io}";
    let changes = index.apply(apply(&slice.replace("service-name: db}", managed)), time(1));
    assert_eq!(touched(&changes), ["a", "-192.0.2.1", "-192.0.2.2"]);
    // What the selector finds has the service's ports; a slice beside it adds those that the pod does not serve otherwise.
    let both = selecting
        .replace("x: y", "app: a")
        .replace("targetPort: 5432}", "targetPort: 5432}, {name: web, port: 80, targetPort: http}");
    index.apply(apply(&both), time(1));
    assert_eq!(services(&index, "a"), ["db -> 5432:5432"]);
    index.apply(
        apply(&slice.replace("db-1", "db-2").replace("{name: sql, port: 15432}", "{name: web, port: 8000}")),
        time(1),
    );
    assert_eq!(services(&index, "a"), ["db -> 5432:5432, 80:8000"]);
}

#[test]
fn several_slices_of_one_pod_add_up() {
    let service = "---\n{apiVersion: v1, kind: Service, metadata: {name: db, namespace: ns},
        spec: {clusterIP: 10.96.0.9, ports: [{name: sql, port: 5432}, {name: admin, port: 9000}]}}\n";
    let slice = |name: &str, port: &str, number: u16, target: &str| {
        format!(
            "---\n{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4,
                metadata: {{name: {name}, namespace: ns, labels: {{kubernetes.io/service-name: db}}}},
                ports: [{{name: {port}, port: {number}}}], endpoints: [{{addresses: [10.0.0.1]{target}}}]}}\n"
        )
    };
    let referring = |name: &str| format!(", targetRef: {{kind: Pod, namespace: ns, name: {name}}}");
    let one = slice("db-1", "sql", 15432, &referring("a"));
    let other = slice("db-2", "admin", 19000, "");
    let mut index = index(&(service.to_owned() + &one + &other + &pod("a", "10.0.0.1", "", "")));
    assert_eq!(services(&index, "a"), ["db -> 5432:15432, 9000:19000"]);
    index.apply([delete(Kind::EndpointSlice, "ns", "db-1")], time(1));
    assert_eq!(services(&index, "a"), ["db -> 9000:19000"]);
    // Another pod's endpoint is not this one's, though it has the address; nor is it anybody's before that pod is known.
    let strange = slice("db-2", "admin", 19000, &referring("gone"));
    index.apply(apply(&strange), time(2));
    assert!(services(&index, "a").is_empty(), "{:?}", services(&index, "a"));
    let endpoint = "Kubernetes/discovery.k8s.io/EndpointSlice/ns/db-2/10.0.0.1";
    index.apply([delete(Kind::Pod, "ns", "a")], time(3));
    assert!(find(&index, endpoint).is_none(), "of a pod that is not known it is not known whether it is enrolled");
    index.apply(apply(&other), time(4));
    assert!(find(&index, endpoint).is_some(), "nobody says that it is a pod");
}

#[test]
fn virtual_addresses_are_chosen_the_same_way_whatever_the_order() {
    let service = |name: &str, rest: &str| {
        format!(
            "---\n{{apiVersion: v1, kind: Service, metadata: {{name: {name}, namespace: ns}}, spec: {{{rest} ports: [{{port: 1}}]}}}}\n"
        )
    };
    let mut index = index(&(service("a", "") + &service("b", "")));
    let address = |index: &Index, name: &str| -> Vec<String> {
        let to_text = |address: &wire::NetworkAddress| {
            address.address.iter().map(ToString::to_string).collect::<Vec<_>>().join(".")
        };
        super::tests::service(index, name).addresses.iter().map(to_text).collect()
    };
    let chosen = address(&index, "a");
    // Fixed for all time: a client may have it in a cache.
    assert_eq!(chosen, ["10.96.100.10"]);
    assert!(chosen[0].starts_with("10.96.") && chosen != address(&index, "b"));
    // One that has the address in its spec takes it; the other asks for its next, and gets it back afterwards.
    index.apply(apply(&service("z", &format!("clusterIP: {},", chosen[0]))), time(1));
    assert_eq!(address(&index, "z"), chosen);
    assert_ne!(address(&index, "a"), chosen);
    index.apply([delete(Kind::Service, "ns", "z")], time(2));
    assert_eq!(address(&index, "a"), chosen);
    // Two with the same address in their specs: the first by name has it, the other is reported.
    index.apply(apply(&(service("x", "clusterIP: 10.96.0.5,") + &service("w", "clusterIP: 10.96.0.5,"))), time(3));
    assert_eq!((address(&index, "w"), address(&index, "x")), (vec!["10.96.0.5".to_owned()], vec![]));
    assert!(index.notes()[0].reason.contains("belongs to Service ns/w"), "{:?}", index.notes());
}

#[test]
fn the_roster_tells_who_runs_where() {
    let roster = Roster::default();
    let id = |account: &str| format!("spiffe://cluster.local/ns/ns/sa/{account}").parse::<SpiffeId>().unwrap();
    assert!(!roster.is_synced());
    assert_eq!(roster.identity_on_node("node-1", &id("sa")), NodeIdentity::UnknownYet);
    let text = pod("a", "10.0.0.1", "", "");
    roster.apply(&apply(&text));
    assert!(roster.is_synced());
    assert_eq!(roster.identity_on_node("node-1", &id("sa")), NodeIdentity::Present);
    assert_eq!(roster.identity_on_node("node-2", &id("sa")), NodeIdentity::Absent);
    assert_eq!(roster.identity_on_node("", &id("sa")), NodeIdentity::Absent);
    assert_eq!(roster.identity_on_node("node-1", &id("other")), NodeIdentity::UnknownYet);
    assert_eq!(roster.pod("ns", "a").unwrap().service_account, "sa");
    roster.apply(&apply(&text.replace("Running", "Failed")));
    assert_eq!(roster.identity_on_node("node-1", &id("sa")), NodeIdentity::Absent);
    assert!(roster.pod("ns", "a").unwrap().is_over);
    // A second pod that is not scheduled yet may be on any node.
    roster.apply(&apply(&pod("b", "10.0.0.2", "", "").replace("  nodeName: node-1\n", "")));
    assert_eq!(roster.identity_on_node("node-1", &id("sa")), NodeIdentity::UnknownYet);
    roster.apply(&[delete(Kind::Pod, "ns", "a"), delete(Kind::Pod, "ns", "b")]);
    assert_eq!(roster.identity_on_node("node-1", &id("sa")), NodeIdentity::UnknownYet);
    assert!(roster.pod("ns", "a").is_none());
}

#[test]
fn counts_are_by_kind() {
    let text = ENROLLED.to_owned()
        + WEB
        + "---\n{apiVersion: v1, kind: ServiceAccount, metadata: {name: sa, namespace: ns}}\n";
    let mut index = index(&text);
    assert_eq!(index.counts()[&Kind::Service], 1);
    assert_eq!(index.counts()[&Kind::ServiceAccount], 1);
    index.apply([delete(Kind::ServiceAccount, "ns", "sa")], time(0));
    assert_eq!(index.counts()[&Kind::ServiceAccount], 0);
    let _ = Name::new("ns", "web");
}
