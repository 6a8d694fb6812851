use super::*;
use crate::fixture::{network_address, service};

#[test]
fn what_is_said_is_taken() {
    let wire = wire::Service {
        subject_alt_names: vec!["spiffe://td/ns/a/sa/b".into(), "web.example.com".into()],
        canonical: true,
        visibility: 1,
        load_balancing: Some(wire::LoadBalancing { routing_preference: vec![2, 4], mode: 2, health_policy: 1 }),
        ..service("web", &["10.96.0.1", "::ffff:10.96.0.2"], &[(443, 0), (80, 8080)])
    };
    let taken = Service::try_from(&wire).unwrap();
    assert_eq!(&**taken.key(), "shop/web");
    assert_eq!(
        taken.addresses.iter().map(|vip| vip.block.to_string()).collect::<Vec<_>>(),
        ["10.96.0.1/32", "10.96.0.2/32"]
    );
    assert_eq!(taken.port(80).and_then(|port| port.target_port), Some(8080));
    assert_eq!(taken.port(443).map(|port| port.target_port), Some(None));
    assert!(taken.port(81).is_none());
    assert_eq!(*taken.subject_alt_names, ["spiffe://td/ns/a/sa/b".parse().unwrap()]);
    assert_eq!(*taken.load_balancing.preference, [LocalityScope::Zone, LocalityScope::Node]);
    assert!(taken.load_balancing.mode == LoadBalancingMode::Failover && taken.load_balancing.allow_unhealthy);
    assert!(taken.canonical && taken.visible_from("shop") && !taken.visible_from("other"));
}

#[test]
fn a_port_for_tcp_and_udp_is_one_port() {
    // (service port, target port) as listed, and as kept.
    let cases = [
        (vec![(53, 1053), (53, 1053), (9153, 9153)], vec![(53, Some(1053)), (9153, Some(9153))]),
        (vec![(53, 1053), (53, 2053)], vec![(53, Some(1053))]),
        (vec![(53, 0), (53, 2053)], vec![(53, Some(2053))]),
        (vec![(80, 0), (53, 0), (53, 0)], vec![(53, None), (80, None)]),
    ];
    for (listed, kept) in cases {
        let ports = Service::try_from(&service("dns", &["10.96.0.10"], &listed)).unwrap().ports;
        let ports: Vec<_> = ports.iter().map(|port| (port.service_port, port.target_port)).collect();
        assert_eq!(ports, kept, "{listed:?}");
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let refused = |change: fn(&mut wire::Service)| {
        let mut wire = service("web", &["10.96.0.1"], &[(80, 8080)]);
        change(&mut wire);
        Service::try_from(&wire).unwrap_err()
    };
    assert_eq!(refused(|s| s.hostname.clear()), InvalidService::Unnamed);
    assert_eq!(refused(|s| s.namespace.clear()), InvalidService::Unnamed);
    assert_eq!(refused(|s| s.ports[0].target_port = 65536), InvalidPort::Range(65536).into());
    assert_eq!(refused(|s| s.ports[0].app_protocol = 99), InvalidPort::AppProtocol(99).into());
    assert!(matches!(refused(|s| s.addresses[0].length = Some(33)), InvalidService::Address(_)));
    assert!(matches!(refused(|s| s.addresses[0].address.clear()), InvalidService::Address(_)));
    assert!(matches!(refused(|s| s.visibility = 7), InvalidService::Unknown { field: "visibility", value: 7 }));
    let balanced = |change: fn(&mut wire::LoadBalancing)| {
        let mut load_balancing = wire::LoadBalancing::default();
        change(&mut load_balancing);
        let wire = wire::Service { load_balancing: Some(load_balancing), ..service("web", &[], &[]) };
        Service::try_from(&wire).unwrap_err()
    };
    assert!(matches!(balanced(|l| l.mode = 9), InvalidService::Unknown { .. }));
    assert!(matches!(balanced(|l| l.health_policy = 9), InvalidService::Unknown { .. }));
    assert!(matches!(balanced(|l| l.routing_preference = vec![0]), InvalidService::Unknown { .. }));
    assert_eq!(balanced(|l| l.routing_preference = vec![1; 7]), InvalidService::LongPreference { length: 7 });
    let gateway = |hbone_mtls_port, address: Option<wire::NetworkAddress>| wire::GatewayAddress {
        hbone_mtls_port,
        destination: address.map(wire::gateway_address::Destination::Address),
    };
    let bound = |waypoint| {
        let wire = wire::Service { waypoint: Some(waypoint), ..service("web", &[], &[]) };
        Service::try_from(&wire)
    };
    assert_eq!(bound(gateway(0, None)), Err(InvalidGateway::NoDestination.into()));
    let far = bound(gateway(65536, Some(network_address("10.0.0.1"))));
    assert_eq!(far, Err(InvalidGateway::Port { port: 65536 }.into()));
    let default = bound(gateway(0, Some(network_address("10.0.0.1")))).unwrap();
    assert_eq!(default.waypoint.map(|waypoint| waypoint.hbone_port), Some(15008));
}

#[test]
fn a_service_bound_to_weightless_waypoints_is_still_bound() {
    let destination = wire::gateway_address::Destination::Address(network_address("10.0.0.1"));
    let waypoint = wire::GatewayAddress { destination: Some(destination), hbone_mtls_port: 0 };
    let weighted_waypoints = vec![wire::WeightedWaypoint { destination: Some(waypoint), weight: 0 }];
    let bound = Service::try_from(&wire::Service { weighted_waypoints, ..service("web", &[], &[]) }).unwrap();
    assert!(bound.has_waypoint());
    assert!(bound.choose_waypoint(&mut fastrand::Rng::with_seed(1)).is_some());
    let free = Service::try_from(&service("web", &[], &[])).unwrap();
    assert!(!free.has_waypoint() && free.choose_waypoint(&mut fastrand::Rng::with_seed(1)).is_none());
}
