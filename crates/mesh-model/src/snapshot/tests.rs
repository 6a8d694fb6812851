use super::*;
use crate::fixture::{in_service, ip, network_address, pod, policy, service, snapshot};
use crate::resolve::{Destination, Viewpoint};

#[test]
fn look_ups() {
    let vm = mesh_proto::workload::Workload { network: "far".into(), ..pod("vm", &["10.0.0.1"]) };
    let snapshot = snapshot(&[pod("web", &["10.0.0.1", "2001:db8::1"]), vm], &[service("web", &["10.96.0.1"], &[])]);
    let uid = |workload: Option<&Arc<Workload>>| workload.map(|workload| workload.uid.to_string());
    assert_eq!(uid(snapshot.workload_by_uid("Kubernetes//Pod/shop/web")), Some("Kubernetes//Pod/shop/web".into()));
    assert_eq!(uid(snapshot.workload_by_uid("web")), None);
    assert_eq!(uid(snapshot.workload_by_ip("", ip("10.0.0.1"))), Some("Kubernetes//Pod/shop/web".into()));
    assert_eq!(uid(snapshot.workload_by_ip("", ip("::ffff:10.0.0.1"))), Some("Kubernetes//Pod/shop/web".into()));
    assert_eq!(uid(snapshot.workload_by_ip("", ip("2001:db8::1"))), Some("Kubernetes//Pod/shop/web".into()));
    assert_eq!(uid(snapshot.workload_by_ip("far", ip("10.0.0.1"))), Some("Kubernetes//Pod/shop/vm".into()));
    assert_eq!(uid(snapshot.workload_by_ip("far", ip("2001:db8::1"))), None);
    assert!(snapshot.service_by_name("shop/web").is_some() && snapshot.service_by_name("web").is_none());
    assert!(snapshot.service_by_vip("", ip("10.96.0.1")).is_some());
    assert!(snapshot.service_by_vip("far", ip("10.96.0.1")).is_none());
    assert!(snapshot.service_by_vip("", ip("10.96.0.2")).is_none());
}

#[test]
fn services_of_one_name_and_one_address() {
    let named = |namespace: &str, canonical| wire::Service {
        namespace: namespace.into(),
        canonical,
        ..service("web", &["10.96.0.1"], &[])
    };
    let winner = |services: &[wire::Service]| {
        let snapshot = snapshot(&[], services);
        assert_eq!(snapshot.services().len(), services.len());
        snapshot.service_by_vip("", ip("10.96.0.1")).map(|service| service.key().to_string())
    };
    for services in [[named("b", false), named("a", false)], [named("a", false), named("b", false)]] {
        assert_eq!(winner(&services), Some("a/web".into()));
    }
    for services in [[named("b", true), named("a", false)], [named("a", false), named("b", true)]] {
        assert_eq!(winner(&services), Some("b/web".into()));
    }
}

#[test]
fn the_narrowest_block_wins() {
    let block = |name: &str, base, length| wire::Service {
        addresses: vec![wire::NetworkAddress { length: Some(length), ..network_address(base) }],
        ..service(name, &[], &[])
    };
    let services = [block("wide", "10.0.0.0", 8), block("narrow", "10.1.0.0", 16), block("all6", "::", 0)];
    let mut snapshot = snapshot(&[], &services);
    let at = |snapshot: &Snapshot, address: &str| {
        snapshot.service_by_vip("", ip(address)).map(|service| service.name.to_string())
    };
    assert_eq!(at(&snapshot, "10.1.2.3"), Some("narrow".into()));
    assert_eq!(at(&snapshot, "10.2.2.3"), Some("wide".into()));
    assert_eq!(at(&snapshot, "11.2.2.3"), None);
    assert_eq!(at(&snapshot, "2001:db8::1"), Some("all6".into()));
    snapshot.remove_address("shop/narrow");
    assert_eq!(at(&snapshot, "10.1.2.3"), Some("wide".into()));
    assert_eq!(snapshot.services_by_block.lengths(), [0, 8]);
}

#[test]
fn pods_win_over_entries_and_host_network_has_no_address_of_its_own() {
    let entry = |uid: &str| wire::Workload { uid: uid.into(), ..pod("entry", &["10.0.0.1"]) };
    let plain = wire::Workload { tunnel_protocol: 0, ..pod("aaa", &["10.0.0.1"]) };
    let host = wire::Workload { network_mode: 1, ..pod("host", &["10.0.0.1", "10.0.0.9"]) };
    let mut snapshot = snapshot(&[entry("a"), host, pod("web", &["10.0.0.1"]), plain], &[]);
    let at = |snapshot: &Snapshot| snapshot.workload_by_ip("", ip("10.0.0.1")).map(|workload| workload.uid.to_string());
    assert_eq!(at(&snapshot), Some("Kubernetes//Pod/shop/web".into()));
    snapshot.remove_address("Kubernetes//Pod/shop/web");
    assert_eq!(at(&snapshot), Some("Kubernetes//Pod/shop/aaa".into()));
    snapshot.remove_address("Kubernetes//Pod/shop/aaa");
    assert_eq!(at(&snapshot), Some("a".into()));
    snapshot.remove_address("a");
    assert_eq!(at(&snapshot), None);
    assert!(snapshot.workload_by_ip("", ip("10.0.0.9")).is_none());
}

#[test]
fn host_network_pods_are_endpoints_and_pods_without_address_are_not() {
    let host = wire::Workload { network_mode: 1, ..in_service(pod("host", &["10.0.0.1"]), "web", &[]) };
    let named = wire::Workload { hostname: "db.example.com".into(), ..in_service(pod("named", &[]), "web", &[]) };
    let snapshot = snapshot(&[host, named], &[service("web", &[], &[(80, 8080)])]);
    let ready = snapshot.ready_endpoints("shop/web", Some(80));
    assert_eq!(ready.iter().map(|workload| &*workload.name).collect::<Vec<_>>(), ["host"]);
}

#[test]
fn a_clone_does_not_see_later_changes() {
    let mut snapshot =
        snapshot(&[in_service(pod("a", &["10.0.0.1"]), "web", &[])], &[service("web", &[], &[(80, 80)])]);
    let before = snapshot.clone();
    snapshot.upsert_workload((&in_service(pod("b", &["10.0.0.2"]), "web", &[])).try_into().unwrap());
    snapshot.remove_address("Kubernetes//Pod/shop/a");
    snapshot.upsert_authorization((&policy("p", security::Action::Deny, vec![])).try_into().unwrap());
    let names = |snapshot: &Snapshot| {
        let ready = snapshot.ready_endpoints("shop/web", None);
        ready.iter().map(|workload| workload.name.to_string()).collect::<Vec<_>>()
    };
    assert_eq!((names(&before), names(&snapshot)), (vec!["a".to_owned()], vec!["b".to_owned()]));
    assert_eq!((before.authorizations().len(), snapshot.authorizations().len()), (0, 1));
}

#[test]
fn nothing_is_left_when_everything_is_gone() {
    let mut snapshot = snapshot(
        &[in_service(in_service(pod("a", &["10.0.0.1"]), "web", &[]), "gone", &[])],
        &[service("web", &["10.96.0.1"], &[(80, 0)])],
    );
    let policies = [security::Scope::Global, security::Scope::Namespace, security::Scope::WorkloadSelector];
    for scope in policies {
        let wire = security::Authorization { scope: scope.into(), ..policy("p", security::Action::Deny, vec![]) };
        snapshot.upsert_authorization((&wire).try_into().unwrap());
        // The same policy in another scope takes the place of the last.
        assert_eq!(snapshot.authorizations().len(), 1);
    }
    for name in ["shop/web", "Kubernetes//Pod/shop/a", "unknown"] {
        snapshot.apply(Change::RemoveAddress(name.into()));
    }
    snapshot.apply(Change::RemoveAuthorization("shop/p".into()));
    assert!(snapshot.workloads.is_empty() && snapshot.workloads_by_ip.is_empty());
    assert!(snapshot.services.is_empty() && snapshot.services_by_block.lengths().is_empty());
    assert!(snapshot.endpoints.is_empty() && snapshot.policies.is_empty());
    assert!(snapshot.global_policies.is_empty() && snapshot.namespace_policies.is_empty());
}

fn workload_body(workload: wire::Workload) -> Vec<u8> {
    wire::Address { r#type: Some(wire::address::Type::Workload(workload)) }.encode_to_vec()
}

fn service_body(service: wire::Service) -> Vec<u8> {
    wire::Address { r#type: Some(wire::address::Type::Service(service)) }.encode_to_vec()
}

#[test]
fn bodies_of_addresses() {
    assert!(matches!(Change::address("w", &workload_body(pod("web", &[]))), (Change::Workload(_), None)));
    assert!(matches!(Change::address("s", &service_body(service("web", &[], &[]))), (Change::Service(_), None)));
    let bad = |body: &[u8]| match Change::address("name", body) {
        (Change::Unusable(unusable), Some(error)) => {
            assert_eq!((&*unusable.name, &*unusable.reason), ("name", &*error.to_string()));
            error
        }
        (change, error) => panic!("{change:?} {error:?}"),
    };
    assert_eq!(bad(&wire::Address { r#type: None }.encode_to_vec()), InvalidChange::Empty);
    assert!(matches!(bad(b"\xff"), InvalidChange::Decode(_)));
    assert_eq!(bad(&workload_body(wire::Workload::default())), InvalidWorkload::NoUid.into());
}

/// What is at an address for a client of namespace `shop`: the name, with a `!` before what cannot be taken.
fn seen(snapshot: &Snapshot, address: &str) -> String {
    let from = Viewpoint { namespace: "shop", ..Viewpoint::default() };
    match snapshot.destination(&from, ip(address)) {
        Destination::Service(service) => service.key().to_string(),
        Destination::Workload(workload) => workload.uid.to_string(),
        Destination::Unusable(unusable) => format!("!{}", unusable.name),
        Destination::Unknown => "-".into(),
    }
}

#[test]
fn what_cannot_be_taken_is_in_the_place_of_what_it_replaces() {
    const UID: &str = "Kubernetes//Pod/shop/web";
    let mut snapshot = Snapshot::new();
    let mut tell = |name: &str, body: &[u8]| {
        snapshot.apply(Change::address(name, body).0);
        (seen(&snapshot, "10.0.0.1"), seen(&snapshot, "10.96.0.1"))
    };
    let is = |pod: &str, service: &str| (pod.to_owned(), service.to_owned());
    let good = in_service(pod("web", &["10.0.0.1"]), "web", &[]);
    let bad = wire::Workload { waypoint: Some(wire::GatewayAddress::default()), ..good.clone() };
    let vip = service("web", &["10.96.0.1"], &[(80, 8080)]);
    let bad_vip = wire::Service { visibility: 7, ..vip.clone() };
    let none = wire::Workload { addresses: vec![vec![1, 2, 3].into()], ..good.clone() };
    assert_eq!(tell(UID, &workload_body(bad.clone())), is("!Kubernetes//Pod/shop/web", "-"));
    assert_eq!(tell(UID, &workload_body(good.clone())), is(UID, "-"), "a good version repairs it");
    assert_eq!(tell("shop/web", &service_body(vip.clone())), is(UID, "shop/web"));
    assert_eq!(tell(UID, &workload_body(bad)), is("!Kubernetes//Pod/shop/web", "shop/web"));
    assert_eq!(tell("shop/web", &service_body(bad_vip)), is("!Kubernetes//Pod/shop/web", "!shop/web"));
    assert_eq!(tell("shop/web", &service_body(vip)), is("!Kubernetes//Pod/shop/web", "shop/web"));
    assert_eq!(tell(UID, &workload_body(good)), is(UID, "shop/web"));
    // Addresses that cannot be read are those of the version before.
    assert_eq!(tell(UID, &workload_body(none)), is("!Kubernetes//Pod/shop/web", "shop/web"));
    assert_eq!(tell(UID, b"\xff"), is("!Kubernetes//Pod/shop/web", "shop/web"));
    assert_eq!(tell("shop/web", b"\xff"), is("!Kubernetes//Pod/shop/web", "!shop/web"));
    assert!(snapshot.workload_by_uid(UID).is_none() && snapshot.service_by_name("shop/web").is_none());
    assert!(snapshot.endpoints.is_empty(), "it is no endpoint any more");
    snapshot.remove_address(UID);
    snapshot.remove_address("shop/web");
    assert_eq!((seen(&snapshot, "10.0.0.1"), seen(&snapshot, "10.96.0.1")), is("-", "-"));
    assert_eq!(snapshot.all_unusable().len(), 0);
}

#[test]
fn what_cannot_be_taken_takes_no_address_that_was_not_its_own() {
    let mut snapshot = snapshot(&[pod("web", &["10.0.0.1"])], &[service("web", &["10.96.0.1"], &[])]);
    let entry = wire::Workload { uid: "entry".into(), status: 9, ..pod("entry", &["10.0.0.1"]) };
    snapshot.apply(Change::address("entry", &workload_body(entry)).0);
    let wide = wire::NetworkAddress { length: Some(8), ..network_address("10.0.0.0") };
    let wide = wire::Service { addresses: vec![wide], visibility: 7, ..service("wide", &[], &[]) };
    snapshot.apply(Change::address("shop/wide", &service_body(wide)).0);
    let private = wire::Service { namespace: "far".into(), visibility: 1, ..service("web", &["192.0.2.1"], &[(0, 0)]) };
    snapshot.apply(Change::address("far/web", &service_body(private)).0);
    let host = wire::Workload { network_mode: 1, status: 9, ..pod("host", &["192.0.2.2"]) };
    snapshot.apply(Change::address("Kubernetes//Pod/shop/host", &workload_body(host)).0);
    assert_eq!(seen(&snapshot, "10.96.0.1"), "shop/web");
    assert_eq!(seen(&snapshot, "10.7.7.7"), "!shop/wide");
    assert_eq!(seen(&snapshot, "192.0.2.1"), "-", "not seen from here");
    assert_eq!(seen(&snapshot, "192.0.2.2"), "-", "the node's address");
    assert_eq!(seen(&snapshot, "10.0.0.1"), "Kubernetes//Pod/shop/web", "a block takes no workload's address");
    snapshot.remove_address("shop/wide");
    assert_eq!(seen(&snapshot, "10.0.0.1"), "Kubernetes//Pod/shop/web");
    snapshot.remove_address("Kubernetes//Pod/shop/web");
    assert_eq!(seen(&snapshot, "10.0.0.1"), "!entry");
}

#[test]
fn services_are_found_by_host_in_any_case() {
    let named = |namespace: &str, hostname: &str, canonical| wire::Service {
        namespace: namespace.into(),
        hostname: hostname.into(),
        canonical,
        ..service("web", &[], &[])
    };
    let mut snapshot = snapshot(&[], &[named("b", "Web.Example.com.", false), named("a", "web.example.com", false)]);
    let found = |snapshot: &Snapshot, host: &str| {
        snapshot.services_by_host(host).map(|service| service.namespace.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(found(&snapshot, "web.example.com"), ["a", "b"]);
    snapshot.upsert_service((&named("c", "web.example.com", true)).try_into().unwrap());
    assert_eq!(found(&snapshot, "web.example.com"), ["c", "a", "b"]);
    snapshot.remove_address("b/Web.Example.com.");
    snapshot.remove_address("c/web.example.com");
    assert_eq!(found(&snapshot, "web.example.com"), ["a"]);
    snapshot.remove_address("a/web.example.com");
    assert_eq!(found(&snapshot, "web.example.com"), Vec::<String>::new());
}

#[test]
fn some_endpoints_are_no_more_than_asked_for() {
    let pods: Vec<_> =
        (1..6).map(|i| in_service(pod(&format!("web-{i}"), &[&format!("10.0.0.{i}")]), "web", &[])).collect();
    let snapshot = snapshot(&pods, &[service("web", &[], &[(80, 80)])]);
    assert_eq!(snapshot.some_ready_endpoints("shop/web", 3).len(), 3);
    assert_eq!(snapshot.some_ready_endpoints("shop/web", 9).len(), 5);
    assert_eq!(snapshot.some_ready_endpoints("shop/none", 9).len(), 0);
}
