//! Pods and services that are not valid, and were never: nobody takes them for strangers to the mesh.

use std::net::IpAddr;

use mesh_model::gateway::GatewayDestination;
use mesh_model::{Change, Destination, Health, Snapshot, TunnelProtocol, Viewpoint};
use mesh_proto::workload as wire;

use super::policy_tests::unread;
use super::tests::{
    CONFIRMATION, ENROLLED, WEB, apply, delete, find, index, options, pod, service, services, time, workload,
};
use super::{Event, Index, Roster};
use crate::api::{Kind, Object, ObjectId, Pod, stand_in};
use crate::ca::{Directory, NodeIdentity};

/// What a proxy makes of it all.
pub(super) fn snapshot(index: &Index) -> Snapshot {
    let mut snapshot = Snapshot::new();
    for resource in index.resources() {
        let (change, error) = Change::address(&resource.name, &resource.body);
        assert!(error.is_none(), "{}: {error:?}", resource.name);
        snapshot.apply(change);
    }
    snapshot
}

/// What an address is to a proxy.
pub(super) fn at(index: &Index, address: &str) -> String {
    let snapshot = snapshot(index);
    match snapshot.destination(&Viewpoint::default(), address.parse::<IpAddr>().unwrap()) {
        Destination::Service(service) => match &service.waypoint {
            Some(waypoint) if matches!(&waypoint.destination, GatewayDestination::Service(name) if name.ends_with(".invalid")) => {
                "refused".to_owned()
            }
            Some(_) | None => format!("service {}", service.name),
        },
        Destination::Workload(workload) => match workload.tunnel_protocol {
            TunnelProtocol::Hbone => format!("tunnel to {}", workload.spiffe_id().service_account()),
            TunnelProtocol::None | TunnelProtocol::LegacyIstioMtls => "plaintext".to_owned(),
        },
        Destination::Unusable(_) => "refused".to_owned(),
        Destination::Unknown => "stranger".to_owned(),
    }
}

#[test]
fn connections_to_a_service_that_is_not_valid_are_refused_wherever_it_can_be_read_to_be() {
    const V4: &str = "10.96.0.9";
    const BAD_PORT: &str = "selector: {app: web}, ports: [{port: 70000}]";
    let text = |meta: &str, spec: &str, status: &str| {
        format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: db, namespace: ns{meta}}}, spec: {spec}, status: {status}}}"
        )
    };
    let both = format!("{{clusterIPs: [{V4}, 'fd00::9'], ports: [{{port: 80}}], trafficDistribution: Anywhere}}");
    for (text, addresses) in [
        (text("", &format!("{{clusterIP: {V4}, {BAD_PORT}}}"), "{}"), &[V4][..]),
        (text("", &both, "{}"), &[V4, "fd00::9"]),
        (text("", &format!("{{clusterIP: {V4}, clusterIPs: [{V4}, bad], {BAD_PORT}}}"), "{}"), &[V4]),
        (text("", &format!("{{clusterIP: [], clusterIPs: ['::ffff:{V4}']}}"), "{}"), &[V4]),
        (text("", &format!("{{type: Future, clusterIP: {V4}, ports: [{{port: 80}}]}}"), "{}"), &[V4]),
        (
            text(
                "",
                &format!("{{clusterIP: {V4}, {BAD_PORT}}}"),
                "{loadBalancer: {ingress: [{ip: 192.0.2.1}, {ip: 9}]}}",
            ),
            &[V4, "192.0.2.1"],
        ),
        (text(", labels: [a]", &format!("{{clusterIP: {V4}, ports: [{{port: 80}}]}}"), "3"), &[V4]),
        (text("", &format!("{{clusterIP: {V4}, ports: many}}"), "[]"), &[V4]),
    ] {
        let mut index = index(&(ENROLLED.to_owned() + &pod("a", "10.0.0.1", "app: web", "") + WEB));
        addresses.iter().for_each(|address| assert_eq!(at(&index, address), "stranger"));
        index.apply(unread(&text), time(0));
        addresses.iter().for_each(|address| assert_eq!(at(&index, address), "refused", "{text}"));
        // Others go on, and nobody stands behind it.
        assert_eq!(
            (at(&index, "10.96.0.7").as_str(), services(&index, "a")),
            ("service web", vec!["web -> 80:8080".to_owned()])
        );
        // Whoever does not know why it is refused does not get through it either.
        let told = service(&index, "db");
        let Some(wire::gateway_address::Destination::Hostname(waypoint)) = told.waypoint.unwrap().destination else {
            panic!("an address")
        };
        assert!(waypoint.hostname.ends_with(".invalid") && told.ports.is_empty(), "{waypoint:?}");
        let notes = index.conflicts();
        assert!(notes[0].object == "Service ns/db" && notes[0].reason.contains("refused"), "{notes:?}");
        // Mended, it is a service as any other; and it is forgotten as one.
        let mended = format!("{{clusterIPs: [{V4}, 'fd00::9'], selector: {{app: web}}, ports: [{{port: 80}}]}}");
        let mut other = Index::new(options());
        other.apply(unread(&text), time(0));
        for index in [&mut index, &mut other] {
            index.apply(apply(&self::text(&mended)), time(0));
            assert_eq!((at(index, V4).as_str(), index.conflicts().len()), ("service db", 0));
        }
        assert_eq!(services(&index, "a"), ["db -> 80:80", "web -> 80:8080"]);
        index.apply(unread(&text), time(0));
        index.apply([delete(Kind::Service, "ns", "db")], time(0));
        assert_eq!((at(&index, V4).as_str(), index.conflicts().len()), ("stranger", 0));
    }
}

fn text(spec: &str) -> String {
    format!("{{apiVersion: v1, kind: Service, metadata: {{name: db, namespace: ns}}, spec: {spec}}}")
}

#[test]
fn a_service_that_is_not_valid_takes_no_endpoints_from_slices_and_no_name_of_a_host() {
    const SLICE: &str = "---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-1, namespace: ns, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
ports: [{port: 5432}]
endpoints: [{addresses: [192.0.2.1]}]
";
    let valid = text("{clusterIP: 10.96.0.9, ports: [{port: 5432}]}");
    let mut index = index(&format!("{valid}\n{SLICE}"));
    let endpoint = "Kubernetes/discovery.k8s.io/EndpointSlice/ns/db-1/192.0.2.1";
    assert!(find(&index, endpoint).is_some());
    index.apply(unread(&text("{clusterIP: 10.96.0.9, ports: [{port: 0}]}")), time(0));
    assert!(find(&index, endpoint).is_none());
    index.apply(apply(&valid), time(0));
    assert!(find(&index, endpoint).is_some());
    // Where nothing is given it is where it will be.
    index.apply(apply(&text("{ports: [{port: 5432}]}")), time(0));
    let chosen = service(&index, "db").addresses;
    index.apply(unread(&text("{ports: [{port: 0}]}")), time(0));
    assert_eq!(chosen.len(), 1);
    assert_eq!(service(&index, "db").addresses, chosen);
    // Without an address of its own there is nothing to refuse.
    for spec in ["{clusterIP: None, ports: [{port: 0}]}", "{type: ExternalName, externalName: 3}"] {
        index.apply(unread(&text(spec)), time(0));
        assert!(find(&index, "ns/db.ns.svc.cluster.local").is_none_or(|_| service(&index, "db").addresses.is_empty()));
    }
    // Nothing takes the name of something else.
    let value = serde_json::json!({"spec": {"clusterIP": "10.96.0.9"}});
    for (kind, namespace, name) in [
        (Kind::Service, "ns", "db.example.com"),
        (Kind::Service, "n/s", "db"),
        (Kind::Pod, "n", "s/a"),
        (Kind::Pod, "n/s", "a"),
    ] {
        assert_eq!(stand_in(&ObjectId { kind, namespace: namespace.into(), name: name.into() }, &value), None);
    }
}

/// A pod with this label, uncaptured, that is not valid for what is put in the place of `containers:`.
fn broken(labels: &str, instead: &str) -> String {
    let text = pod("a", "10.0.0.1", labels, "").replace("enabled", "x");
    text.replace("containers: [{name: main, ports: [{name: web, containerPort: 8080}]}]", instead)
}

#[test]
fn a_pod_that_is_not_valid_is_reached_by_tunnel_or_not_at_all_if_it_may_be_enrolled() {
    const BAD: &str = "containers: []";
    const AMBIENT: &str = "istio.io/dataplane-mode: ambient";
    const NONE: &str = "istio.io/dataplane-mode: none";
    const ODD: &str = "istio.io/dataplane-mode: sideways";
    const GOOD: &str = "containers: [{name: main}]";
    for (namespace, text, expected) in [
        (ENROLLED, broken("", BAD), "tunnel to sa"),
        ("", broken("", BAD), "plaintext"),
        ("", broken(AMBIENT, BAD), "tunnel to sa"),
        (ENROLLED, broken(NONE, BAD), "plaintext"),
        ("", broken(ODD, GOOD), "tunnel to sa"),
        ("", broken("istio.io/dataplane-mode: [none]", GOOD), "refused"),
        (ENROLLED, broken("", "containers: many"), "tunnel to sa"),
        (ENROLLED, broken("", &format!("{BAD}\n  restartPolicy: [a]")), "tunnel to sa"),
        (ENROLLED, broken("", BAD).replace("serviceAccountName: sa", "serviceAccountName: [sa]"), "refused"),
        (ENROLLED, broken("", BAD).replace("serviceAccountName: sa", "serviceAccountName: S/A"), "refused"),
        (ENROLLED, broken("", BAD).replace("  serviceAccountName: sa\n", ""), "tunnel to default"),
        // It is not there as a pod of the mesh.
        (ENROLLED, broken("", &format!("{BAD}\n  hostNetwork: true")), "stranger"),
        (ENROLLED, broken("", BAD).replace("Running", "Failed"), "stranger"),
        (ENROLLED, broken("", GOOD).replace("Running", "Dreaming"), "tunnel to sa"),
        (
            ENROLLED,
            broken("", GOOD).replace("podIP: 10.0.0.1", "podIP: [], podIPs: [{ip: 3}, {ip: 10.0.0.1}]"),
            "tunnel to sa",
        ),
    ] {
        let mut index = index(namespace);
        index.apply(unread(&text), time(0));
        assert_eq!(at(&index, "10.0.0.1"), expected, "{namespace}{text}");
        // However long nobody mends it.
        assert_eq!(index.next_deadline(), None);
        index.apply([], time(2 * CONFIRMATION.as_secs()));
        assert_eq!(at(&index, "10.0.0.1"), expected, "{namespace}{text}");
        let is_noted =
            index.conflicts().iter().any(|note| note.object == "Pod ns/a" && note.reason.starts_with("is not valid"));
        assert_eq!(is_noted, !text.contains("Failed"), "{:?}", index.conflicts());
        index.apply(apply(&pod("a", "10.0.0.1", NONE, "").replace("enabled", "x")), time(0));
        assert_eq!((at(&index, "10.0.0.1").as_str(), index.conflicts().len()), ("plaintext", 0));
        index.apply(unread(&text), time(0));
        index.apply([delete(Kind::Pod, "ns", "a")], time(0));
        assert_eq!((at(&index, "10.0.0.1").as_str(), index.conflicts().len()), ("stranger", 0));
    }
}

#[test]
fn a_pod_that_is_not_valid_takes_traffic_of_services_once_its_tunnel_is_there() {
    let odd = broken(
        "app: web, istio.io/dataplane-mode: sideways",
        "containers: [{name: m, ports: [{name: web, containerPort: 8080}]}]",
    );
    let health = |text: &str| {
        let mut index = index(&(ENROLLED.to_owned() + WEB));
        index.apply(unread(text), time(0));
        assert_eq!(services(&index, "a"), ["web -> 80:8080"]);
        mesh_model::Workload::try_from(&workload(&index, "a")).unwrap().health
    };
    let captured = odd.replace("redirection: x", "redirection: enabled");
    assert_eq!(health(&odd), Health::Unhealthy);
    assert_eq!(health(&captured), Health::Healthy);
    assert_eq!(health(&captured.replace("status: 'True'", "status: 'False'")), Health::Unhealthy);
    let ends = captured.replace("{name: a,", "{name: a, deletionTimestamp: 2026-01-01T00:00:00Z,");
    assert_eq!(health(&ends), Health::Draining);
    // One that is not to be enrolled serves as it did.
    let none = broken(
        "app: web, istio.io/dataplane-mode: none",
        "containers: [{name: m, ports: [{name: web, containerPort: 8080}]}, {name: M}]",
    );
    assert_eq!(health(&none), Health::Healthy);
}

#[test]
fn the_waypoint_of_a_pod_that_is_not_valid_is_not_passed_by() {
    let waypoint = |labels: &str| {
        let mut index = index(ENROLLED);
        index.apply(unread(&broken(labels, "containers: []")), time(0));
        match workload(&index, "a").waypoint.and_then(|waypoint| waypoint.destination) {
            Some(wire::gateway_address::Destination::Hostname(name)) => Some(name.hostname),
            None => None,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(waypoint("istio.io/use-waypoint: gate").as_deref(), Some("gate.ns.svc.cluster.local"));
    assert_eq!(waypoint("app: web"), None);
    assert_eq!(waypoint("app: 3").as_deref(), Some("_.ns.svc.cluster.local"));
}

#[test]
fn nobody_gets_a_certificate_as_nobody() {
    let roster = Roster::default();
    let pods = |text: &str| {
        roster.apply(&unread(text));
        let id = |account: &str| mesh_model::SpiffeId::new("cluster.local", "ns", account).unwrap();
        [Pod::NOBODY, "sa"].map(|account| roster.identity_on_node("node-1", &id(account)) == NodeIdentity::Present)
    };
    assert_eq!(pods(&broken("", "containers: []")), [false, true]);
    assert_eq!(pods(&broken("app: 3", "containers: []")), [false, false]);
    assert!(roster.pod("ns", "a").is_some());
}

#[test]
fn what_an_earlier_version_did_not_know_is_taken_from_the_one_that_is_not_valid() {
    let keep = |last: &str, newest: &str| {
        let (last, newest) = (apply(last), unread(newest));
        let ([Event::Apply(last)], [Event::Apply(newest)]) = (&last[..], &newest[..]) else {
            panic!("one object each")
        };
        crate::api::keep(last, Some(newest))
    };
    let good = pod("a", "10.0.0.1", "istio.io/dataplane-mode: ambient", "");
    let odd = |text: &str| text.replace("mode: ambient", "mode: sideways");
    let started = good.replace("  nodeName: node-1\n", "").replace("podIP: 10.0.0.1, ", "");
    let Some(Object::Pod(kept)) = keep(&started, &odd(&good)) else { panic!("not kept") };
    let addresses: Vec<IpAddr> = vec!["10.0.0.1".parse().unwrap()];
    assert_eq!((&kept.addresses, &*kept.node, kept.is_stand_in), (&addresses, "node-1", false));
    let Some(Object::Pod(kept)) = keep(&good, &odd(&started)) else { panic!("not kept") };
    assert_eq!((&kept.addresses, &*kept.node), (&addresses, "node-1"));
    let uid = |text: &str, uid: &str| text.replace("{name: a,", &format!("{{name: a, uid: {uid},"));
    assert!(keep(&uid(&good, "u1"), &uid(&odd(&good), "u1")).is_some());
    assert!(keep(&uid(&good, "u1"), &uid(&odd(&good), "u2")).is_none());
    assert!(keep(&good, &odd(&good).replace("Running", "Succeeded")).is_none());

    let service = |spec: &str| text(&format!("{{{spec}}}"));
    let bad = "ports: [{port: 0}]";
    let addresses = |last: &str, newest: &str| match keep(&service(last), &service(&format!("{newest}, {bad}"))) {
        Some(Object::Service(kept)) => kept.addresses.clone(),
        other => panic!("{other:?}"),
    };
    let given =
        |all: &[&str]| crate::api::ServiceAddresses::Given(all.iter().map(|one| one.parse().unwrap()).collect());
    let fixed = "clusterIP: 10.96.0.9, ports: [{port: 80}]";
    assert_eq!(addresses(fixed, "clusterIP: 10.96.0.9"), given(&["10.96.0.9"]));
    assert_eq!(addresses(fixed, "clusterIP: 10.96.0.8"), given(&["10.96.0.9", "10.96.0.8"]));
    assert_eq!(addresses(fixed, "clusterIP: None"), given(&["10.96.0.9"]));
    assert_eq!(addresses("type: ExternalName, externalName: a.b", "clusterIP: 10.96.0.8"), given(&["10.96.0.8"]));
}
