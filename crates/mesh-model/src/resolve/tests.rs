use mesh_proto::workload as wire;
use mesh_proto::workload::load_balancing::{Mode, Scope};

use super::*;
use crate::fixture::{in_service, pod, service, snapshot};

/// Zone and node.
type Place = (&'static str, &'static str);

/// Where the endpoints are that one connection of a client in zone `z1` on node `n1` tries, in their order, as long as each
/// fails.
fn tries(mode: Mode, preference: &[Scope], endpoints: &[Place]) -> String {
    let ports = &[(80, 8080)][..];
    let endpoint = |(number, (zone, node)): (usize, &(&str, &str))| {
        let at = pod(&format!("{zone}-{number}"), &[&format!("10.0.0.{}", number + 1)]);
        let locality = wire::Locality { zone: (*zone).into(), ..Default::default() };
        in_service(wire::Workload { node: (*node).into(), locality: Some(locality), ..at }, "web", ports)
    };
    let load_balancing = wire::LoadBalancing {
        routing_preference: preference.iter().map(|scope| (*scope).into()).collect(),
        mode: mode.into(),
        ..Default::default()
    };
    let web = wire::Service { load_balancing: Some(load_balancing), ..service("web", &["10.96.0.1"], ports) };
    let snapshot = snapshot(&endpoints.iter().enumerate().map(endpoint).collect::<Vec<_>>(), &[web]);
    let service = snapshot.service_by_name("shop/web").unwrap();
    let from = Viewpoint { zone: "z1", node: "n1", ..Default::default() };
    let (mut tried, mut order) = (Vec::new(), Vec::new());
    let mut random = fastrand::Rng::with_seed(9);
    while let Some(endpoint) = snapshot.select(service, 80, &from, &mut random, &tried) {
        let Workload { uid, location, .. } = &**endpoint.workload;
        assert!(!tried.contains(uid), "{uid} again");
        tried.push(Arc::clone(uid));
        order.push(format!("{}/{}", location.locality.zone, location.node));
    }
    assert!(snapshot.select_any(service, &from, &mut random, &tried).is_none(), "whatever the ports are");
    order.join(" ")
}

#[test]
fn an_endpoint_that_fails_is_followed_by_the_next_nearest() {
    let both = &[Scope::Zone, Scope::Node][..];
    let [here, zone, far]: [Place; 3] = [("z1", "n1"), ("z1", "n2"), ("z2", "n3")];
    let cases: &[(Mode, &[Scope], &[Place], &str)] = &[
        (Mode::Failover, both, &[far, zone, here], "z1/n1 z1/n2 z2/n3"),
        (Mode::Failover, both, &[far, zone, here, far, zone, here], "z1/n1 z1/n1 z1/n2 z1/n2 z2/n3 z2/n3"),
        (Mode::Failover, both, &[far, far], "z2/n3 z2/n3"),
        (Mode::Failover, both, &[far, here], "z1/n1 z2/n3"),
        // Not all of a group that fails, so that the next one gets its turn.
        (
            Mode::Failover,
            both,
            &[zone, zone, zone, zone, zone, far, far, far, far],
            "z1/n2 z1/n2 z1/n2 z2/n3 z2/n3 z2/n3",
        ),
        (Mode::Strict, both, &[far, zone, here, here], "z1/n1 z1/n1"),
        (Mode::Strict, &[Scope::Zone], &[far, ("z1", "n1"), ("z1", "n1")], "z1/n1 z1/n1"),
        (Mode::Strict, both, &[far, zone], ""),
        (Mode::UnspecifiedMode, both, &[far, far], "z2/n3 z2/n3"),
        (Mode::UnspecifiedMode, &[], &[far, far, far, far], "z2/n3 z2/n3 z2/n3"),
        (Mode::UnspecifiedMode, &[], &[], ""),
    ];
    for (mode, preference, endpoints, expected) in cases {
        assert_eq!(tries(*mode, preference, endpoints), *expected, "{mode:?} {preference:?} {endpoints:?}");
    }
}

#[test]
fn a_gateway_is_one_whose_instance_has_not_failed() {
    let ports = &[(15008, 15008)][..];
    let instances = ["w1", "w2"].map(|name| in_service(pod(name, &[&format!("10.0.0.{}", &name[1..])]), "wp", ports));
    let snapshot = snapshot(&instances, &[service("wp", &["10.96.0.1"], ports)]);
    let by = |ip: &str| {
        let destination = wire::gateway_address::Destination::Address(crate::fixture::network_address(ip));
        let address = wire::GatewayAddress { destination: Some(destination), hbone_mtls_port: 0 };
        crate::GatewayAddress::try_from(&address).unwrap()
    };
    let uid = |name: &str| -> Arc<str> { format!("Kubernetes//Pod/shop/{name}").into() };
    let reach = crate::Reach::new(crate::fixture::ip("10.0.0.9"), &[crate::fixture::ip("10.0.0.9")]);
    let cases: &[(&str, &[&str], Option<&str>)] = &[
        ("10.96.0.1", &["w1"], Some("w2")),
        ("10.96.0.1", &["w2"], Some("w1")),
        ("10.96.0.1", &["w1", "w2"], None),
        ("10.0.0.1", &[], Some("w1")),
        ("10.0.0.1", &["w1"], None),
    ];
    for (address, tried, expected) in cases {
        let tried: Vec<_> = tried.iter().map(|name| uid(name)).collect();
        let from = Viewpoint::default();
        let found = snapshot.gateway(&by(address), &from, &reach, &mut fastrand::Rng::with_seed(1), &tried);
        assert_eq!(
            found.ok().map(|found| found.workload.name.to_string()).as_deref(),
            *expected,
            "{address} {tried:?}"
        );
    }
}

#[test]
fn what_is_draining_serves_when_nobody_else_is_left() {
    let ports = &[(80, 8080)][..];
    let endpoint = |name: &str, number: u8| in_service(pod(name, &[&format!("10.0.0.{number}")]), "web", ports);
    let unhealthy = |workload| wire::Workload { status: wire::WorkloadStatus::Unhealthy.into(), ..workload };
    let draining = |workload| {
        let payload = prost_types::Any { type_url: crate::draining::PAYLOAD_TYPE.into(), value: Vec::new() };
        let extension = wire::Extension { name: crate::draining::EXTENSION.into(), config: Some(payload) };
        wire::Workload { extensions: vec![extension], ..unhealthy(workload) }
    };
    let (ready, old, older, sick) = (
        endpoint("ready", 1),
        draining(endpoint("old", 2)),
        draining(endpoint("older", 3)),
        unhealthy(endpoint("sick", 4)),
    );
    let cases: &[(&[&wire::Workload], bool, &[&str])] = &[
        (&[&ready, &old, &sick], false, &["ready", "old"]),
        (&[&old, &sick], false, &["old"]),
        (&[&old, &older], false, &["old older"]),
        (&[&sick], false, &[]),
        // publishNotReadyAddresses makes no difference between them.
        (&[&ready, &old, &sick], true, &["old ready sick"]),
    ];
    for (workloads, allow_unhealthy, expected) in cases {
        let load_balancing = wire::LoadBalancing { health_policy: (*allow_unhealthy).into(), ..Default::default() };
        let web = wire::Service { load_balancing: Some(load_balancing), ..service("web", &["10.96.0.1"], ports) };
        let workloads: Vec<_> = workloads.iter().map(|workload| (*workload).clone()).collect();
        let snapshot = snapshot(&workloads, &[web]);
        let service = snapshot.service_by_name("shop/web").unwrap();
        // What one connection after the other is given until each was tried.
        let (from, mut random, mut tried) = (Viewpoint::default(), fastrand::Rng::with_seed(4), Vec::new());
        for group in *expected {
            let mut left: Vec<&str> = group.split(' ').collect();
            while !left.is_empty() {
                let found = snapshot.select(service, 80, &from, &mut random, &tried).unwrap();
                let at = left.iter().position(|name| **name == *found.workload.name);
                left.remove(at.unwrap_or_else(|| panic!("{} before {left:?}", found.workload.name)));
                tried.push(Arc::clone(&found.workload.uid));
            }
        }
        assert!(snapshot.select(service, 80, &from, &mut random, &tried).is_none(), "{expected:?}");
    }
}

#[test]
fn a_gateway_by_its_address_serves_while_it_drains() {
    let at = pod("gate", &["10.0.0.1"]);
    let payload = prost_types::Any { type_url: crate::draining::PAYLOAD_TYPE.into(), value: Vec::new() };
    let extension = wire::Extension { name: crate::draining::EXTENSION.into(), config: Some(payload) };
    let status = wire::WorkloadStatus::Unhealthy.into();
    let sick = wire::Workload { status, ..at.clone() };
    let draining = wire::Workload { extensions: vec![extension], ..sick.clone() };
    for (workload, serves) in [(at, true), (draining, true), (sick, false)] {
        let snapshot = snapshot(&[workload], &[]);
        let destination = wire::gateway_address::Destination::Address(crate::fixture::network_address("10.0.0.1"));
        let address = wire::GatewayAddress { destination: Some(destination), hbone_mtls_port: 0 };
        let address = crate::GatewayAddress::try_from(&address).unwrap();
        let reach = crate::Reach::new(crate::fixture::ip("10.0.0.9"), &[crate::fixture::ip("10.0.0.9")]);
        let mut random = fastrand::Rng::with_seed(1);
        let found = snapshot.gateway(&address, &Viewpoint::default(), &reach, &mut random, &[]);
        assert_eq!(found.is_ok(), serves);
    }
}
