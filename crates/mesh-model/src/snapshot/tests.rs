use super::*;
use crate::fixture::{in_service, ip, network_address, pod, policy, service, snapshot};

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
    assert_eq!(snapshot.block_lengths.keys().copied().collect::<Vec<_>>(), [0, 8]);
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
    assert!(snapshot.services.is_empty() && snapshot.services_by_block.is_empty() && snapshot.block_lengths.is_empty());
    assert!(snapshot.endpoints.is_empty() && snapshot.policies.is_empty());
    assert!(snapshot.global_policies.is_empty() && snapshot.namespace_policies.is_empty());
}

#[test]
fn bodies_of_addresses() {
    let of = |r#type| wire::Address { r#type }.encode_to_vec();
    let workload = of(Some(wire::address::Type::Workload(pod("web", &[]))));
    assert!(matches!(Change::address(&workload), Ok(Change::Workload(_))));
    let service = of(Some(wire::address::Type::Service(service("web", &[], &[]))));
    assert!(matches!(Change::address(&service), Ok(Change::Service(_))));
    assert_eq!(Change::address(&of(None)).unwrap_err(), InvalidChange::Empty);
    assert!(matches!(Change::address(b"\xff"), Err(InvalidChange::Decode(_))));
    let nameless = of(Some(wire::address::Type::Workload(wire::Workload::default())));
    assert_eq!(Change::address(&nameless).unwrap_err(), InvalidWorkload::NoUid.into());
}
