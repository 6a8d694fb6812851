use super::*;
use crate::address::Reach;
use crate::fixture::{in_service, ip, pod, service};

#[test]
fn empty_means_default() {
    let workload =
        Workload::try_from(&wire::Workload { uid: "u".into(), namespace: "ns".into(), ..wire::Workload::default() })
            .unwrap();
    assert_eq!(workload.spiffe_id().as_str(), "spiffe://cluster.local/ns/ns/sa/default");
    assert_eq!(&*workload.location.cluster_id, "Kubernetes");
    assert_eq!((workload.capacity, workload.health, workload.host_network), (1, Health::Healthy, false));
    assert_eq!(workload.tunnel_protocol, TunnelProtocol::None);
    assert!(workload.addresses.is_empty());
}

#[test]
fn what_is_said_is_taken() {
    let mut wire = in_service(pod("web", &["10.0.0.1", "2001:db8::1", "::ffff:10.0.0.1"]), "b", &[(80, 8080), (81, 0)]);
    wire.trust_domain = "example.org".into();
    wire.status = 1;
    wire.network_mode = 1;
    wire.capacity = Some(0);
    wire.workload_type = 77;
    wire.authorization_policies = vec!["b/b".into(), "a/a".into(), "b/b".into()];
    wire.locality = Some(wire::Locality { region: "r".into(), zone: "z".into(), subzone: "s".into() });
    wire.application_tunnel = Some(wire::ApplicationTunnel { protocol: 1, port: 15088 });
    let workload = Workload::try_from(&in_service(wire, "a", &[])).unwrap();
    assert_eq!(workload.spiffe_id().as_str(), "spiffe://example.org/ns/shop/sa/web");
    assert_eq!(*workload.addresses, [ip("10.0.0.1"), ip("2001:db8::1")]);
    assert_eq!((workload.capacity, workload.health, workload.host_network), (0, Health::Unhealthy, true));
    assert_eq!(workload.origin.workload_type, WorkloadType::Pod);
    assert_eq!(*workload.authorization_policies, ["a/a".into(), "b/b".into()]);
    assert_eq!(&*workload.location.locality.zone, "z");
    assert_eq!(workload.application_tunnel, Some(ApplicationTunnel { port: 15088 }));
    assert!(workload.in_service("shop/a") && workload.in_service("shop/b") && !workload.in_service("shop/c"));
}

#[test]
fn target_ports() {
    let service = Service::try_from(&service("web", &[], &[(80, 8080), (81, 8081), (82, 0), (83, 0)])).unwrap();
    let web = in_service(pod("web", &[]), "web", &[(80, 9090), (81, 0), (82, 9092), (15008, 15008)]);
    let web = Workload::try_from(&web).unwrap();
    let other = Workload::try_from(&pod("other", &[])).unwrap();
    let cases = [(80, Some(9090)), (81, Some(8081)), (82, Some(9092)), (83, None), (84, None), (15008, Some(15008))];
    for (port, expected) in cases {
        assert_eq!(web.target_port(&service, port), expected, "{port}");
        assert_eq!(other.target_port(&service, port), None, "{port}");
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let refused = |change: fn(&mut wire::Workload)| {
        let mut wire = pod("web", &["10.0.0.1"]);
        change(&mut wire);
        Workload::try_from(&wire).unwrap_err()
    };
    assert_eq!(refused(|w| w.uid.clear()), InvalidWorkload::NoUid);
    assert!(matches!(refused(|w| w.namespace.clear()), InvalidWorkload::Identity(_)));
    assert!(matches!(refused(|w| w.service_account = "a/b".into()), InvalidWorkload::Identity(_)));
    assert!(matches!(refused(|w| w.addresses.push(vec![1, 2, 3].into())), InvalidWorkload::Address(_)));
    assert!(matches!(refused(|w| w.status = 9), InvalidWorkload::Unknown { field: "status", value: 9 }));
    assert!(matches!(refused(|w| w.tunnel_protocol = 9), InvalidWorkload::Unknown { .. }));
    assert!(matches!(refused(|w| w.network_mode = -1), InvalidWorkload::Unknown { .. }));
    assert!(matches!(
        refused(|w| w.application_tunnel = Some(wire::ApplicationTunnel { protocol: 1, port: 65536 })),
        InvalidWorkload::ApplicationTunnelPort { port: 65536 }
    ));
    assert!(matches!(
        refused(|w| w.waypoint = Some(wire::GatewayAddress::default())),
        InvalidWorkload::Gateway { field: "waypoint", source: InvalidGateway::NoDestination }
    ));
    for key in ["", "web", "/web", "shop/"] {
        let mut wire = pod("web", &[]);
        wire.services.insert(key.into(), wire::PortList::default());
        assert!(matches!(Workload::try_from(&wire), Err(InvalidWorkload::ServiceKey { .. })), "{key:?}");
    }
    for port in [(0, 80), (65536, 80), (80, 65536)] {
        let wire = in_service(pod("web", &[]), "web", &[port]);
        assert!(matches!(Workload::try_from(&wire), Err(InvalidWorkload::Port { .. })), "{port:?}");
    }
}

#[test]
fn a_port_for_tcp_and_udp_is_one_port() {
    let twice = Workload::try_from(&in_service(pod("web", &[]), "web", &[(80, 0), (80, 1), (80, 2)])).unwrap();
    let ports = twice.services[0].ports.iter().map(|port| (port.service_port, port.target_port));
    assert_eq!(ports.collect::<Vec<_>>(), [(80, Some(1))]);
}

#[test]
fn the_address_is_of_the_family_where_there_is_one() {
    let dual = Workload::try_from(&pod("dual", &["10.0.0.1", "2001:db8::1"])).unwrap();
    let single = Workload::try_from(&pod("single", &["10.0.0.1"])).unwrap();
    let none = Workload::try_from(&pod("none", &[])).unwrap();
    let (v4, v6) = (Some(ip("10.0.0.1")), Some(ip("2001:db8::1")));
    let (own4, own6, both) = (&["10.9.9.9"][..], &["2001:db8::9"][..], &["10.9.9.9", "2001:db8::9"][..]);
    let cases = [
        (&dual, "192.0.2.1", both, v4),
        (&dual, "::ffff:192.0.2.1", both, v4),
        (&dual, "::1", both, v6),
        (&dual, "::1", own4, v4),
        (&dual, "192.0.2.1", own6, v6),
        (&dual, "::1", &[], v6),
        (&single, "::1", both, v4),
        (&single, "::1", own6, None),
        (&none, "::1", both, None),
    ];
    for (workload, like, own, expected) in cases {
        let own: Vec<_> = own.iter().map(|one| ip(one)).collect();
        assert_eq!(workload.address_for(&Reach::new(ip(like), &own)), expected, "{} {like} {own:?}", workload.name);
    }
}
