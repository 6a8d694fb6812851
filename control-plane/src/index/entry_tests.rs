//! What ServiceEntries and WorkloadEntries become, and what a change of them touches.

use mesh_model::{Change, Destination, Snapshot, TunnelProtocol, Viewpoint};
use mesh_proto::workload as wire;
use prost::Message;

use super::tests::{apply, delete, options, pod, time};
use super::{Changes, Index};
use crate::api::Kind;

pub(super) fn service_entry(name: &str, spec: &str) -> String {
    format!(
        "---\n{{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {{name: {name}, namespace: ns}}, spec: {{{spec}}}}}\n"
    )
}

pub(super) fn workload_entry(name: &str, spec: &str) -> String {
    format!(
        "---\n{{apiVersion: networking.istio.io/v1, kind: WorkloadEntry, metadata: {{name: {name}, namespace: ns}}, spec: {{{spec}}}}}\n"
    )
}

const DB: &str = "hosts: [db.example.com], resolution: STATIC, ports: [{number: 5432, name: sql, protocol: TCP}], \
                  endpoints: [{address: 192.0.2.1}, {address: 192.0.2.2, ports: {sql: 6432}, weight: 3}]";

fn index(text: &str) -> Index {
    let mut index = Index::new(options());
    index.apply(apply(text), time(0));
    index
}

fn find(index: &Index, name: &str) -> Option<wire::address::Type> {
    let resource = index.resources().find(|resource| &*resource.name == name)?;
    wire::Address::decode(&*resource.body).unwrap().r#type
}

fn service(index: &Index, host: &str) -> Option<wire::Service> {
    match find(index, &format!("ns/{host}"))? {
        wire::address::Type::Service(service) => Some(service),
        wire::address::Type::Workload(workload) => panic!("{workload:?}"),
    }
}

fn workload(index: &Index, uid: &str) -> Option<wire::Workload> {
    match find(index, &format!("Kubernetes/{uid}"))? {
        wire::address::Type::Workload(workload) => Some(workload),
        wire::address::Type::Service(service) => panic!("{service:?}"),
    }
}

fn inline(index: &Index, entry: &str, address: &str) -> Option<wire::Workload> {
    workload(index, &format!("networking.istio.io/ServiceEntry/ns/{entry}/{address}"))
}

/// `host -> service port:target port, ...` of every service of a workload.
fn services(workload: &wire::Workload) -> Vec<String> {
    let of_one = |(key, list): (&String, &wire::PortList)| {
        let ports: Vec<_> =
            list.ports.iter().map(|port| format!("{}:{}", port.service_port, port.target_port)).collect();
        format!("{} -> {}", key.split_once('/').unwrap().1, ports.join(", "))
    };
    let mut all: Vec<String> = workload.services.iter().map(of_one).collect();
    all.sort();
    all
}

fn addresses(service: &wire::Service) -> Vec<String> {
    let text = |address: &wire::NetworkAddress| {
        let octets = <[u8; 4]>::try_from(&*address.address).unwrap();
        format!(
            "{}{}",
            std::net::Ipv4Addr::from(octets),
            address.length.map(|one| format!("/{one}")).unwrap_or_default()
        )
    };
    service.addresses.iter().map(text).collect()
}

fn reasons(index: &Index) -> Vec<String> {
    index.notes().into_iter().map(|note| format!("{}: {}", note.object, note.reason)).collect()
}

fn touched(changes: &Changes) -> Vec<String> {
    let removed = changes.removed().map(|name| format!("-{name}"));
    changes.changed().map(|resource| resource.name.to_string()).chain(removed).collect()
}

fn snapshot(index: &Index) -> Snapshot {
    let mut snapshot = Snapshot::new();
    for resource in index.resources() {
        let (change, error) = Change::address(&resource.name, &resource.body);
        assert!(error.is_none(), "{}: {error:?}", resource.name);
        snapshot.apply(change);
    }
    snapshot
}

#[test]
fn a_host_with_static_endpoints_is_a_service_with_an_address_of_its_own() {
    let index = index(&service_entry("db", DB));
    let db = service(&index, "db.example.com").unwrap();
    // Fixed for all time: a client may have it in a cache.
    assert_eq!(addresses(&db), ["240.240.215.134"]);
    assert_eq!((db.name.as_str(), db.hostname.as_str(), db.canonical), ("db", "db.example.com", false));
    assert!(db.load_balancing.is_none() && db.visibility() == wire::service::Visibility::Public);
    let one = inline(&index, "db", "192.0.2.1").unwrap();
    assert_eq!(services(&one), ["db.example.com -> 5432:5432"]);
    assert_eq!(
        (one.name.as_str(), one.namespace.as_str(), one.tunnel_protocol()),
        ("db", "ns", wire::TunnelProtocol::None)
    );
    let two = inline(&index, "db", "192.0.2.2").unwrap();
    assert_eq!((services(&two), two.capacity), (vec!["db.example.com -> 5432:6432".to_owned()], Some(3)));
    // As the proxy sees it.
    let snapshot = snapshot(&index);
    let from = Viewpoint { namespace: "other", ..Viewpoint::default() };
    let Destination::Service(known) = snapshot.destination(&from, "240.240.215.134".parse().unwrap()) else { panic!() };
    let chosen = snapshot.select(known, 5432, &from, &mut fastrand::Rng::with_seed(1), &[]).unwrap();
    assert_eq!(chosen.workload.tunnel_protocol, TunnelProtocol::None);
    assert_eq!(snapshot.services_by_host("db.example.com").count(), 1);
    assert_eq!(reasons(&index), Vec::<String>::new());
    assert_eq!((index.counts()[&Kind::ServiceEntry], index.counts()[&Kind::Service]), (1, 0));
}

#[test]
fn what_an_entry_says_of_its_hosts_reaches_the_wire() {
    let given = DB
        .replace("resolution", "addresses: [10.1.2.3, 10.2.0.0/16], exportTo: ['.'], subjectAltNames: [a], resolution");
    let all = index(&service_entry("db", &given.replace("[db.example.com]", "[db.example.com, '*.example.org']")));
    let db = service(&all, "db.example.com").unwrap();
    assert_eq!(
        (addresses(&db), db.visibility()),
        (vec!["10.1.2.3".to_owned(), "10.2.0.0/16".to_owned()], wire::service::Visibility::Namespace)
    );
    assert_eq!(db.subject_alt_names, ["a"]);
    assert_eq!(addresses(&service(&all, "*.example.org").unwrap()).len(), 2);
    assert_eq!(
        services(&inline(&all, "db", "192.0.2.1").unwrap()),
        ["*.example.org -> 5432:5432", "db.example.com -> 5432:5432"]
    );
    let aliases: Vec<_> = all.resources().flat_map(|resource| resource.aliases.clone()).collect();
    assert!(
        aliases.contains(&"/10.1.2.3".into()) && !aliases.iter().any(|alias| alias.contains("10.2.")),
        "{aliases:?}"
    );
    // Connections go where they are addressed.
    let none = index(&service_entry(
        "any",
        "hosts: ['*.example.com'], addresses: [10.3.0.0/16], ports: [{number: 443, name: tls, protocol: TLS}]",
    ));
    let any = service(&none, "*.example.com").unwrap();
    assert_eq!(any.load_balancing.as_ref().unwrap().mode(), wire::load_balancing::Mode::Passthrough);
    assert_eq!((addresses(&any), none.resources().count()), (vec!["10.3.0.0/16".to_owned()], 1));
    let none = index(&service_entry("any", "hosts: [a.example.com], ports: [{number: 443, name: tls}]"));
    assert_eq!(addresses(&service(&none, "a.example.com").unwrap()), Vec::<String>::new());
}

#[test]
fn a_workload_entry_is_a_workload_with_an_identity() {
    let labels = "labels: {app: vm, networking.istio.io/tunnel: http, service.istio.io/canonical-name: old}";
    let spec =
        format!("address: 192.0.2.7, serviceAccount: sa, locality: r/z/s, weight: 2, ports: {{web: 8081}}, {labels}");
    let services_of = "---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: ns}
spec: {clusterIP: 10.96.0.7, selector: {app: vm}, ports: [{name: http, port: 80, targetPort: web}, {name: sql, port: 81, targetPort: sql}, {name: x, port: 82, targetPort: 9}]}
";
    let entry = "hosts: [vm.example.com], resolution: STATIC, ports: [{number: 443, name: web, targetPort: 8443}, {number: 444, name: raw, targetPort: 8444}], \
                 workloadSelector: {labels: {app: vm}}";
    let mut index = index(
        &(workload_entry("vm", &spec)
            + services_of
            + &service_entry("vms", entry)
            + &pod("p", "10.0.0.1", "app: vm", "")),
    );
    let vm = workload(&index, "networking.istio.io/WorkloadEntry/ns/vm").unwrap();
    assert_eq!(services(&vm), ["vm.example.com -> 443:8081, 444:8444", "web.ns.svc.cluster.local -> 80:8081, 82:9"]);
    let expected = wire::Workload {
        uid: "Kubernetes/networking.istio.io/WorkloadEntry/ns/vm".to_owned(),
        name: "vm".to_owned(),
        namespace: "ns".to_owned(),
        addresses: vec![vec![192, 0, 2, 7].into()],
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        native_tunnel: true,
        service_account: "sa".to_owned(),
        canonical_name: "old".to_owned(),
        canonical_revision: "latest".to_owned(),
        workload_type: wire::WorkloadType::Pod.into(),
        workload_name: "vm".to_owned(),
        cluster_id: "Kubernetes".to_owned(),
        locality: Some(wire::Locality { region: "r".to_owned(), zone: "z".to_owned(), subzone: "s".to_owned() }),
        capacity: Some(2),
        services: vm.services.clone(),
        ..Default::default()
    };
    assert_eq!(vm, expected);
    assert_eq!(mesh_model::Workload::try_from(&vm).unwrap().spiffe_id().as_str(), "spiffe://cluster.local/ns/ns/sa/sa");
    // The entry's selector finds pods as well.
    assert_eq!(
        services(&workload(&index, "/Pod/ns/p").unwrap()),
        ["vm.example.com -> 443:8443, 444:8444", "web.ns.svc.cluster.local -> 80:8080, 82:9"]
    );
    // Only what is selected anew is touched.
    let changes = index.apply(apply(&service_entry("vms", &entry.replace("{app: vm}", "{app: else}"))), time(1));
    assert_eq!(touched(&changes), ["Kubernetes//Pod/ns/p", "Kubernetes/networking.istio.io/WorkloadEntry/ns/vm"]);
    let changes = index.apply([delete(Kind::WorkloadEntry, "ns", "vm")], time(1));
    assert_eq!(touched(&changes), ["-Kubernetes/networking.istio.io/WorkloadEntry/ns/vm"]);
}

#[test]
fn a_workload_entry_is_as_well_as_what_checks_it_says() {
    let object = |annotation: &str, status: &str| {
        format!(
            "---\n{{apiVersion: networking.istio.io/v1beta1, kind: WorkloadEntry, metadata: {{name: vm, namespace: ns, annotations: {{{annotation}}}}},
               spec: {{address: 192.0.2.7}}, status: {{{status}}}}}\n"
        )
    };
    let condition =
        |status: &str| format!("conditions: [{{type: Other, status: 'False'}}, {{type: Healthy, status: '{status}'}}]");
    let checked = "proxy.istio.io/health-checks-enabled: 'true'";
    let (healthy, unhealthy) = (wire::WorkloadStatus::Healthy, wire::WorkloadStatus::Unhealthy);
    for (annotation, status, expected) in [
        ("", String::new(), healthy),
        (checked, String::new(), unhealthy),
        (checked, condition("True"), healthy),
        (checked, condition("False"), unhealthy),
        ("", condition("False"), unhealthy),
    ] {
        let index = index(&object(annotation, &status));
        let vm = workload(&index, "networking.istio.io/WorkloadEntry/ns/vm").unwrap();
        assert_eq!(vm.status(), expected, "{annotation} {status}");
    }
    let captured = index(&object("ambient.istio.io/redirection: enabled", ""));
    let vm = workload(&captured, "networking.istio.io/WorkloadEntry/ns/vm").unwrap();
    assert_eq!((vm.tunnel_protocol(), vm.native_tunnel), (wire::TunnelProtocol::Hbone, false));
}

#[test]
fn policies_apply_to_what_is_no_pod() {
    let policy =
        "---\n{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: p, namespace: ns},
         spec: {selector: {matchLabels: {app: vm}}, rules: [{}]}}\n";
    let text = workload_entry("vm", "address: 192.0.2.7, labels: {app: vm}")
        + &service_entry("db", &DB.replace("{address: 192.0.2.1}", "{address: 192.0.2.1, labels: {app: vm}}"));
    let mut index = index(&text);
    let policies = |index: &Index| {
        let entry = workload(index, "networking.istio.io/WorkloadEntry/ns/vm").unwrap().authorization_policies;
        (entry, inline(index, "db", "192.0.2.1").unwrap().authorization_policies)
    };
    assert_eq!(policies(&index), (vec![], vec![]));
    index.apply(apply(policy), time(1));
    assert_eq!(policies(&index), (vec!["ns/p".to_owned()], vec!["ns/p".to_owned()]));
    assert_eq!(inline(&index, "db", "192.0.2.2").unwrap().authorization_policies, Vec::<String>::new());
    index.apply([delete(Kind::AuthorizationPolicy, "ns", "p")], time(1));
    assert_eq!(policies(&index), (vec![], vec![]));
}

#[test]
fn of_two_entries_for_a_host_the_older_has_it() {
    let at = |name: &str, created: &str, address: &str| {
        let spec = DB.replace("192.0.2.1}", &format!("{address}}}"));
        service_entry(name, &spec)
            .replace("namespace: ns}", &format!("namespace: ns, creationTimestamp: '{created}'}}"))
    };
    let mut index =
        index(&(at("a", "2026-01-02T00:00:00Z", "192.0.2.11") + &at("b", "2026-01-01T00:00:00Z", "192.0.2.12")));
    assert!(inline(&index, "a", "192.0.2.11").is_none() && inline(&index, "b", "192.0.2.12").is_some());
    assert_eq!(
        reasons(&index),
        [
            "ServiceEntry ns/a: host db.example.com already belongs to ServiceEntry ns/b, which is older; it is not in force here"
        ]
    );
    index.apply([delete(Kind::ServiceEntry, "ns", "b")], time(1));
    assert!(inline(&index, "a", "192.0.2.11").is_some() && inline(&index, "b", "192.0.2.12").is_none());
    assert_eq!(reasons(&index), Vec::<String>::new());
}

#[test]
fn a_name_of_the_namespaces_services_is_not_taken_from_them() {
    let web = "---\n{apiVersion: v1, kind: Service, metadata: {name: web, namespace: ns}, spec: {clusterIP: 10.96.0.7, ports: [{port: 80}]}}\n";
    let entry = service_entry("thief", &DB.replace("db.example.com", "web.ns.svc.cluster.local"));
    for text in [web.to_owned() + &entry, entry.clone() + web] {
        let index = index(&text);
        let web = service(&index, "web.ns.svc.cluster.local").unwrap();
        assert_eq!((addresses(&web), web.canonical), (vec!["10.96.0.7".to_owned()], true));
        assert_eq!(index.resources().count(), 1);
        assert!(reasons(&index)[0].contains("belongs to the namespace's own Services"), "{:?}", reasons(&index));
    }
    // Another namespace's name is told beside the service, which is the definition of it.
    let other = index(&service_entry("other", &DB.replace("db.example.com", "web.shop.svc.cluster.local")));
    assert!(!service(&other, "web.shop.svc.cluster.local").unwrap().canonical);
}

#[test]
fn names_that_nobody_looks_up_are_not_in_force_and_said_to_be_so() {
    let dns = "hosts: [api.example.com], resolution: DNS, ports: [{number: 443, name: tls}]";
    let mut index = index(&service_entry("api", dns));
    assert_eq!(index.resources().count(), 0);
    assert!(
        reasons(&index)[0].starts_with("ServiceEntry ns/api: is not in force: resolution DNS"),
        "{:?}",
        reasons(&index)
    );
    // A waypoint is what connections go to.
    let namespace = |labels: &str| {
        format!("---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: ns, labels: {{{labels}}}}}}}\n")
    };
    index.apply(apply(&namespace("istio.io/use-waypoint: gate")), time(1));
    let api = service(&index, "api.example.com").unwrap();
    assert!(api.waypoint.is_some() && addresses(&api).len() == 1);
    assert_eq!(reasons(&index), Vec::<String>::new());
    index.apply(apply(&namespace("")), time(1));
    assert_eq!(index.resources().count(), 0);
    // As far as there are addresses.
    let mixed = format!("{dns}, endpoints: [{{address: 192.0.2.1}}, {{address: eu.example.com}}]");
    index.apply(apply(&service_entry("api", &mixed)), time(1));
    assert_eq!(index.resources().count(), 2);
    assert_eq!(
        reasons(&index),
        ["ServiceEntry ns/api: endpoints that are names are not looked up, and get no connections: eu.example.com"]
    );
    index.apply(apply(&workload_entry("vm", "address: vm.example.com")), time(1));
    assert_eq!(index.resources().count(), 2);
    assert!(reasons(&index)[1].starts_with("WorkloadEntry ns/vm: its address is a name"), "{:?}", reasons(&index));
}

#[test]
fn what_is_bound_to_a_waypoint_says_so() {
    let bound = |text: String| text.replace("namespace: ns}", "namespace: ns, labels: {istio.io/use-waypoint: gate}}");
    let index = index(&bound(service_entry("db", DB) + &workload_entry("vm", "address: 192.0.2.7")));
    let hostname = |waypoint: Option<wire::GatewayAddress>| match waypoint.unwrap().destination.unwrap() {
        wire::gateway_address::Destination::Hostname(name) => format!("{}/{}", name.namespace, name.hostname),
        wire::gateway_address::Destination::Address(address) => panic!("{address:?}"),
    };
    assert_eq!(hostname(service(&index, "db.example.com").unwrap().waypoint), "ns/gate.ns.svc.cluster.local");
    let vm = workload(&index, "networking.istio.io/WorkloadEntry/ns/vm").unwrap();
    assert_eq!(hostname(vm.waypoint), "ns/gate.ns.svc.cluster.local");
    assert!(inline(&index, "db", "192.0.2.1").unwrap().waypoint.is_none());
}
