use super::*;
use crate::proxy::local::fixture::{
    at, id, in_service, ip, local, mesh, network_address, pod, service, waypoint, wire_ports,
};
use mesh_proto::workload as wire;
use prost::Message as _;

const CLIENT: &str = "10.0.0.1";

/// Plans for the pod `client`, which has [`CLIENT`].
fn from_client(snapshot: &Snapshot, dst: &str) -> Result<Plan, Refusal> {
    from_pod(snapshot, "client", CLIENT, dst)
}

fn from_pod(snapshot: &Snapshot, name: &str, address: &str, dst: &str) -> Result<Plan, Refusal> {
    let (identity, addresses) = (id("shop", name), [ip(address)]);
    let source = local(name, &identity, &addresses);
    plan(snapshot, &source, OriginalDst(at(dst)), &is_local, &mut fastrand::Rng::with_seed(7))
}

/// Plans for a pod that has all of these addresses.
fn from_addresses(snapshot: &Snapshot, own: &[&str], dst: &str) -> Result<Plan, Refusal> {
    let (identity, addresses) = (id("shop", "client"), own.iter().map(|one| ip(one)).collect::<Vec<_>>());
    let source = local("client", &identity, &addresses);
    plan(snapshot, &source, OriginalDst(at(dst)), &is_local, &mut fastrand::Rng::with_seed(7))
}

/// A pod of this node that discovery has not brought.
fn is_local(address: IpAddr) -> bool {
    address == ip("10.0.0.50")
}

/// A plan in one line, to compare tables with.
fn line(planned: Result<Plan, Refusal>) -> String {
    let who = |to: &Planned| {
        let name = |text: Option<&str>| text.unwrap_or("-").to_owned();
        let workload = name(to.workload.as_ref().map(|workload| &*workload.name));
        let service = name(to.service.as_ref().map(|service| &*service.name));
        format!("{workload} {service}")
    };
    match planned {
        Ok(Plan::Tunnel { next_hop, authority, expected, destination, kind }) => {
            let expected: Vec<_> =
                expected.iter().map(|id| format!("{}/{}", id.namespace(), id.service_account())).collect();
            format!("{kind:?} {} {authority} [{}] {}", next_hop.0, expected.join(","), who(&destination))
        }
        Ok(Plan::Plain { next_hop, destination }) => format!("Plain {} {}", next_hop.0, who(&destination)),
        Ok(Plan::PassThrough { next_hop, destination }) => format!("PassThrough {} {}", next_hop.0, who(&destination)),
        Err(refusal) => format!("{} {}", refusal.reason(), who(&refusal.destination)),
    }
}

/// `web` speaks HBONE, `old` does not, `legacy` has a sidecar; `named` leaves its target port to `web`.
fn shop() -> Snapshot {
    let web = in_service(pod("web", &["10.0.0.2"]), "web", &[(80, 8080), (81, 0)]);
    let web = in_service(web, "named", &[(80, 9090)]);
    let old = wire::Workload { tunnel_protocol: 0, ..in_service(pod("old", &["10.0.0.3"]), "old", &[(80, 8080)]) };
    let legacy = wire::Workload { tunnel_protocol: 2, ..pod("legacy", &["10.0.0.4"]) };
    let sick = in_service(pod("sick", &["10.0.0.5"]), "sick", &[]);
    let sick = wire::Workload { status: wire::WorkloadStatus::Unhealthy.into(), ..sick };
    let services = [
        service("web", "10.96.0.1", &[(80, 8080), (81, 8081), (15008, 8080), (90, 15008)]),
        service("old", "10.96.0.2", &[(80, 8080)]),
        service("named", "10.96.0.3", &[(80, 0), (81, 0)]),
        service("sick", "10.96.0.4", &[(80, 8080)]),
        service("empty", "10.96.0.5", &[(80, 8080)]),
    ];
    mesh(&[pod("client", &[CLIENT]), web, old, legacy, sick], &services)
}

#[test]
fn services_and_workloads() {
    let cases = [
        // An endpoint's target port, and the service's where the endpoint says none.
        ("10.96.0.1:80", "Direct 10.0.0.2:15008 10.0.0.2:8080 [shop/web] web web"),
        ("10.96.0.1:81", "Direct 10.0.0.2:15008 10.0.0.2:8081 [shop/web] web web"),
        ("10.96.0.1:82", "no_such_port - web"),
        // The mesh's own ports, asked for or led to.
        ("10.96.0.1:15008", "forbidden_port - web"),
        ("10.96.0.1:90", "forbidden_port web web"),
        ("10.96.0.2:80", "Plain 10.0.0.3:8080 old old"),
        ("10.96.0.3:80", "Direct 10.0.0.2:15008 10.0.0.2:9090 [shop/web] web named"),
        ("10.96.0.3:81", "no_ready_endpoint - named"),
        ("10.96.0.4:80", "no_ready_endpoint - sick"),
        ("10.96.0.5:80", "no_ready_endpoint - empty"),
        ("10.0.0.2:1234", "Direct 10.0.0.2:15008 10.0.0.2:1234 [shop/web] web -"),
        ("[::ffff:10.0.0.2]:1234", "Direct 10.0.0.2:15008 10.0.0.2:1234 [shop/web] web -"),
        ("10.0.0.2:15001", "forbidden_port web -"),
        ("10.0.0.2:15006", "forbidden_port web -"),
        ("10.0.0.2:15008", "forbidden_port web -"),
        ("10.0.0.3:1234", "Plain 10.0.0.3:1234 old -"),
        ("10.0.0.3:15008", "Plain 10.0.0.3:15008 old -"),
        ("10.0.0.4:1234", "Plain 10.0.0.4:1234 legacy -"),
        ("192.0.2.1:443", "PassThrough 192.0.2.1:443 - -"),
        ("192.0.2.1:15008", "PassThrough 192.0.2.1:15008 - -"),
    ];
    let snapshot = shop();
    for (dst, expected) in cases {
        assert_eq!(line(from_client(&snapshot, dst)), expected, "{dst}");
    }
}

#[test]
fn a_pod_that_discovery_has_not_brought_is_served() {
    let snapshot = shop();
    let planned = from_pod(&snapshot, "newcomer", "10.0.0.99", "10.96.0.1:80");
    assert_eq!(line(planned), "Direct 10.0.0.2:15008 10.0.0.2:8080 [shop/web] web web");
}

#[test]
fn the_pod_reaches_itself_by_its_service() {
    let planned = from_pod(&shop(), "web", "10.0.0.2", "10.96.0.1:80");
    assert_eq!(line(planned), "Direct 10.0.0.2:15008 10.0.0.2:8080 [shop/web] web web");
}

#[test]
fn identities_of_the_service_are_expected_too() {
    let names = ["spiffe://cluster.local/ns/shop/sa/other", "spiffe://cluster.local/ns/shop/sa/web", "web.example.com"];
    let subject_alt_names = names.map(String::from).to_vec();
    let web = wire::Service { subject_alt_names, ..service("web", "10.96.0.1", &[(80, 8080)]) };
    let snapshot = mesh(&[in_service(pod("web", &["10.0.0.2"]), "web", &[])], &[web]);
    let planned = line(from_client(&snapshot, "10.96.0.1:80"));
    assert_eq!(planned, "Direct 10.0.0.2:15008 10.0.0.2:8080 [shop/web,shop/other] web web");
}

#[test]
fn the_address_is_of_the_family_asked_for_where_there_is_one() {
    let dual = in_service(pod("dual", &["10.0.0.2", "2001:db8::2"]), "dual", &[]);
    let single = in_service(pod("single", &["10.0.0.3"]), "single", &[]);
    let both = |name, v4, v6| wire::Service {
        addresses: vec![network_address(v4), network_address(v6)],
        ..service(name, v4, &[(80, 8080)])
    };
    let services = [both("dual", "10.96.0.1", "2001:db8:f::1"), both("single", "10.96.0.2", "2001:db8:f::2")];
    let snapshot = mesh(&[dual, single], &services);
    let v4 = "Direct 10.0.0.2:15008 10.0.0.2:8080 [shop/dual] dual dual";
    let v6 = "Direct [2001:db8::2]:15008 [2001:db8::2]:8080 [shop/dual] dual dual";
    let single = "Direct 10.0.0.3:15008 10.0.0.3:8080 [shop/single] single single";
    let (own4, own6, both) = (&[CLIENT][..], &["2001:db8::1"][..], &[CLIENT, "2001:db8::1"][..]);
    let cases = [
        (both, "10.96.0.1:80", v4),
        (both, "[2001:db8:f::1]:80", v6),
        (both, "[2001:db8:f::2]:80", single),
        (own4, "[2001:db8:f::1]:80", v4),
        (own6, "10.96.0.1:80", v6),
        (own6, "[2001:db8:f::2]:80", "address_family - single"),
        // Workloads by their own address: the authority is the address that the tunnel goes to.
        (both, "[2001:db8::2]:99", "Direct [2001:db8::2]:15008 [2001:db8::2]:99 [shop/dual] dual -"),
        (own4, "[2001:db8::2]:99", "Direct 10.0.0.2:15008 10.0.0.2:99 [shop/dual] dual -"),
        (own6, "10.0.0.3:99", "address_family single -"),
        (both, "[2001:db8::2]:15008", "forbidden_port dual -"),
        (both, "[2001:db8:f::1]:15008", "forbidden_port - dual"),
        (both, "[2001:db8:9::9]:443", "PassThrough [2001:db8:9::9]:443 - -"),
    ];
    for (own, dst, expected) in cases {
        assert_eq!(line(from_addresses(&snapshot, own, dst)), expected, "{own:?} {dst}");
    }
}

#[test]
fn waypoints_of_either_family() {
    let gate = in_service(pod("gate", &["10.0.0.10", "2001:db8::10"]), "gate", &[]);
    let bound = wire::Service {
        waypoint: Some(waypoint("gate")),
        addresses: vec![network_address("10.96.0.1"), network_address("2001:db8:f::1")],
        ..service("web", "10.96.0.1", &[(80, 8080)])
    };
    let snapshot = mesh(&[gate], &[bound, service("gate", "10.96.0.10", &[])]);
    let (v4, v6) = ("10.0.0.10:15008", "[2001:db8::10]:15008");
    let cases = [
        (&[CLIENT, "2001:db8::1"][..], "10.96.0.1:80", v4),
        (&[CLIENT, "2001:db8::1"], "[2001:db8:f::1]:80", v6),
        (&[CLIENT], "[2001:db8:f::1]:80", v4),
        (&["2001:db8::1"], "10.96.0.1:80", v6),
    ];
    for (own, dst, hop) in cases {
        let expected = format!("ServiceWaypoint {hop} {dst} [shop/gate] gate web");
        assert_eq!(line(from_addresses(&snapshot, own, dst)), expected, "{own:?}");
    }
}

/// `web` is a service with a waypoint, `direct` a pod with one. `gate` is the waypoint, `shut` has no ready instance,
/// `gone` is not known.
fn guarded() -> Snapshot {
    let bound = |to: &str, vip, via| wire::Service { waypoint: Some(waypoint(via)), ..service(to, vip, &[(80, 8080)]) };
    let web = in_service(pod("web", &["10.0.0.2"]), "web", &[]);
    let gate = wire::Workload { tunnel_protocol: 0, ..in_service(pod("gate", &["10.0.0.10"]), "gate", &[]) };
    let shut = wire::Workload { status: 1, ..in_service(pod("shut", &["10.0.0.11"]), "shut", &[]) };
    let direct = wire::Workload { waypoint: Some(waypoint("gate")), ..pod("direct", &["10.0.0.3"]) };
    let lost = wire::Workload { waypoint: Some(waypoint("gone")), ..pod("lost", &["10.0.0.4"]) };
    let services = [
        bound("web", "10.96.0.1", "gate"),
        bound("behind-shut", "10.96.0.2", "shut"),
        bound("behind-gone", "10.96.0.3", "gone"),
        service("gate", "10.96.0.10", &[(15021, 15021)]),
        service("shut", "10.96.0.11", &[(15008, 15008)]),
        service("plain-way", "10.96.0.4", &[(80, 8080)]),
    ];
    mesh(&[web, gate, shut, direct, lost], &services)
}

#[test]
fn waypoints() {
    let cases = [
        ("10.96.0.1:80", "ServiceWaypoint 10.0.0.10:15008 10.96.0.1:80 [shop/gate] gate web"),
        ("10.96.0.1:81", "no_such_port - web"),
        ("10.96.0.2:80", "waypoint_not_ready - behind-shut"),
        ("10.96.0.3:80", "waypoint_unknown - behind-gone"),
        ("10.0.0.3:99", "WorkloadWaypoint 10.0.0.10:15008 10.0.0.3:99 [shop/gate] gate -"),
        ("10.0.0.3:15008", "forbidden_port direct -"),
        ("10.0.0.4:99", "waypoint_unknown lost -"),
        // Bound is the service, not the pod behind it.
        ("10.0.0.2:99", "Direct 10.0.0.2:15008 10.0.0.2:99 [shop/web] web -"),
    ];
    let snapshot = guarded();
    for (dst, expected) in cases {
        assert_eq!(line(from_client(&snapshot, dst)), expected, "{dst}");
    }
}

#[test]
fn a_waypoint_does_not_go_through_itself() {
    let snapshot = guarded();
    let planned = |dst| line(from_pod(&snapshot, "gate", "10.0.0.10", dst));
    assert_eq!(planned("10.96.0.1:80"), "Direct 10.0.0.2:15008 10.0.0.2:8080 [shop/web] web web");
    assert_eq!(planned("10.0.0.3:99"), "Direct 10.0.0.3:15008 10.0.0.3:99 [shop/direct] direct -");
    // Another one's destinations still go through that one.
    assert_eq!(planned("10.96.0.3:80"), "waypoint_unknown - behind-gone");
}

#[test]
fn a_waypoint_may_be_named_by_address_and_port() {
    let by_address = |ip: &str, port| {
        let destination = Some(wire::gateway_address::Destination::Address(network_address(ip)));
        Some(wire::GatewayAddress { destination, hbone_mtls_port: port })
    };
    let bound = |name, vip, waypoint| wire::Service { waypoint, ..service(name, vip, &[(80, 8080)]) };
    let gate = in_service(pod("gate", &["10.0.0.10"]), "gate", &[]);
    let services = [
        bound("by-vip", "10.96.0.1", by_address("10.96.0.10", 16000)),
        bound("by-pod", "10.96.0.2", by_address("10.0.0.10", 16000)),
        bound("by-none", "10.96.0.3", by_address("10.0.0.77", 0)),
        service("gate", "10.96.0.10", &[(16000, 17000)]),
    ];
    let snapshot = mesh(&[gate], &services);
    let cases = [
        ("10.96.0.1:80", "ServiceWaypoint 10.0.0.10:17000 10.96.0.1:80 [shop/gate] gate by-vip"),
        ("10.96.0.2:80", "ServiceWaypoint 10.0.0.10:16000 10.96.0.2:80 [shop/gate] gate by-pod"),
        ("10.96.0.3:80", "waypoint_unknown - by-none"),
    ];
    for (dst, expected) in cases {
        assert_eq!(line(from_client(&snapshot, dst)), expected, "{dst}");
    }
    let own = |dst| line(from_pod(&snapshot, "gate", "10.0.0.10", dst));
    assert_eq!(own("10.96.0.1:80"), "no_ready_endpoint - by-vip");
    assert_eq!(own("10.96.0.2:80"), "no_ready_endpoint - by-pod");
}

#[test]
fn several_waypoints_share_by_weight() {
    let weighted = |service, weight| wire::WeightedWaypoint { destination: Some(waypoint(service)), weight };
    let web = wire::Service {
        weighted_waypoints: vec![weighted("a", 1), weighted("b", 3), weighted("never", 0)],
        ..service("web", "10.96.0.1", &[(80, 8080)])
    };
    let gate = |name, ip| in_service(pod(name, &[ip]), name, &[]);
    let services = [web, service("a", "10.96.0.2", &[]), service("b", "10.96.0.3", &[])];
    let snapshot = mesh(&[gate("a", "10.0.0.10"), gate("b", "10.0.0.11")], &services);
    let (identity, addresses) = (id("shop", "client"), [ip(CLIENT)]);
    let mut random = fastrand::Rng::with_seed(1);
    let mut to_b = 0;
    for _ in 0..1000 {
        let source = local("client", &identity, &addresses);
        let Plan::Tunnel { next_hop, .. } =
            plan(&snapshot, &source, OriginalDst(at("10.96.0.1:80")), &is_local, &mut random).unwrap()
        else {
            panic!("not a tunnel")
        };
        to_b += usize::from(next_hop.0.ip() == ip("10.0.0.11"));
    }
    assert!((690..=810).contains(&to_b), "{to_b} of 1000");
}

#[test]
fn what_failed_is_followed_by_another_one_or_nothing() {
    let weighted = |service, weight| wire::WeightedWaypoint { destination: Some(waypoint(service)), weight };
    let shared = wire::Service {
        weighted_waypoints: vec![weighted("a", 1), weighted("b", 3), weighted("gone", 1)],
        ..service("shared", "10.96.0.1", &[(80, 8080)])
    };
    let bound = wire::Service { waypoint: Some(waypoint("b")), ..service("bound", "10.96.0.4", &[(80, 8080)]) };
    let ports = &[(80, 8080)][..];
    let named = |name, ip, service| in_service(pod(name, &[ip]), service, ports);
    let old = |name, ip| wire::Workload { tunnel_protocol: 0, ..named(name, ip, "web") };
    let pods = [
        named("a1", "10.0.0.10", "a"),
        named("b1", "10.0.0.11", "b"),
        old("w1", "10.0.0.21"),
        old("w2", "10.0.0.22"),
        wire::Workload { waypoint: Some(waypoint("b")), ..pod("behind", &["10.0.0.30"]) },
    ];
    let services = [shared, service("a", "10.96.0.2", &[]), service("b", "10.96.0.3", &[]), bound];
    let snapshot = mesh(&pods, &[&services[..], &[service("web", "10.96.0.5", ports)]].concat());
    let other = |dst: &str, tried: &[&str]| {
        let (identity, addresses) = (id("shop", "client"), [ip(CLIENT)]);
        let source = local("client", &identity, &addresses);
        let tried: Vec<Arc<str>> = tried.iter().map(|name| format!("Kubernetes//Pod/shop/{name}").into()).collect();
        let mut random = fastrand::Rng::with_seed(3);
        let plan = plan_other(&snapshot, &source, OriginalDst(at(dst)), &is_local, &mut random, &tried);
        plan.map_or_else(|| String::from("none"), |plan| line(Ok(plan)))
    };
    let cases: &[(&str, &[&str], &str)] = &[
        ("10.96.0.5:80", &["w1"], "Plain 10.0.0.22:8080 w2 web"),
        ("10.96.0.5:80", &["w2"], "Plain 10.0.0.21:8080 w1 web"),
        ("10.96.0.5:80", &["w2", "w1"], "none"),
        ("10.96.0.5:81", &[], "none"),
        // Of several waypoints another one, of one another instance.
        ("10.96.0.1:80", &["a1"], "ServiceWaypoint 10.0.0.11:15008 10.96.0.1:80 [shop/b1] b1 shared"),
        ("10.96.0.1:80", &["b1"], "ServiceWaypoint 10.0.0.10:15008 10.96.0.1:80 [shop/a1] a1 shared"),
        ("10.96.0.1:80", &["b1", "a1"], "none"),
        ("10.96.0.4:80", &["b1"], "none"),
        ("10.0.0.30:80", &["b1"], "none"),
        ("10.0.0.30:80", &["a1"], "WorkloadWaypoint 10.0.0.11:15008 10.0.0.30:80 [shop/b1] b1 -"),
        // There is one of each.
        ("10.0.0.21:80", &["w1"], "none"),
        ("10.0.0.21:80", &["w2"], "none"),
        ("192.0.2.1:80", &["w1"], "none"),
    ];
    for (dst, tried, expected) in cases {
        assert_eq!(other(dst, tried), *expected, "{dst} {tried:?}");
    }
}

#[test]
fn passthrough_goes_where_it_was_addressed() {
    let passthrough =
        wire::LoadBalancing { mode: wire::load_balancing::Mode::Passthrough.into(), ..Default::default() };
    let block = wire::NetworkAddress { length: Some(24), ..network_address("192.0.2.0") };
    let external = wire::Service {
        addresses: vec![block, network_address("10.0.0.2")],
        load_balancing: Some(passthrough),
        ..service("external", "192.0.2.0", &[(443, 0)])
    };
    let snapshot = mesh(&[pod("web", &["10.0.0.2"])], &[external]);
    let cases = [
        ("192.0.2.77:443", "PassThrough 192.0.2.77:443 - external"),
        ("192.0.2.77:444", "no_such_port - external"),
        ("10.0.0.2:443", "Direct 10.0.0.2:15008 10.0.0.2:443 [shop/web] web -"),
        ("192.0.3.77:443", "PassThrough 192.0.3.77:443 - -"),
    ];
    for (dst, expected) in cases {
        assert_eq!(line(from_client(&snapshot, dst)), expected, "{dst}");
    }
}

#[test]
fn what_cannot_be_taken_is_refused() {
    let mut snapshot = shop();
    let mut tell = |name: &str, one: wire::address::Type| {
        let body = wire::Address { r#type: Some(one) }.encode_to_vec();
        snapshot.apply(mesh_model::Change::address(name, &body).0);
    };
    // As they were, with a waypoint that cannot be read.
    let waypoint = Some(wire::GatewayAddress::default());
    let old = wire::Workload { tunnel_protocol: 0, waypoint: waypoint.clone(), ..pod("old", &["10.0.0.3"]) };
    tell("Kubernetes//Pod/shop/old", wire::address::Type::Workload(old));
    let web = wire::Service { waypoint, ..service("web", "10.96.0.1", &[(80, 8080)]) };
    tell("shop/web.shop.svc.cluster.local", wire::address::Type::Service(web));
    let passthrough =
        wire::LoadBalancing { mode: wire::load_balancing::Mode::Passthrough.into(), ..Default::default() };
    let left_alone = wire::Service { load_balancing: Some(passthrough), ..service("alone", "10.0.0.3", &[(80, 0)]) };
    let cases = [
        ("10.0.0.3:80", "invalid_destination - -"),
        ("10.96.0.1:80", "invalid_destination - -"),
        // Its last endpoint is the workload that cannot be taken.
        ("10.96.0.2:80", "no_ready_endpoint - old"),
    ];
    for (dst, expected) in cases {
        assert_eq!(line(from_client(&snapshot, dst)), expected, "{dst}");
    }
    let text = from_client(&snapshot, "10.0.0.3:80").unwrap_err().to_string();
    assert!(text.contains("Kubernetes//Pod/shop/old") && text.contains("waypoint"), "{text}");
    snapshot.upsert_service((&left_alone).try_into().unwrap());
    assert_eq!(line(from_client(&snapshot, "10.0.0.3:80")), "invalid_destination - alone");
}

#[test]
fn a_pod_of_this_node_that_discovery_has_not_brought_is_not_passed_through_to() {
    let mut snapshot = shop();
    assert_eq!(line(from_client(&snapshot, "10.0.0.50:80")), "not_discovered - -");
    assert_eq!(line(from_client(&snapshot, "[::ffff:10.0.0.50]:80")), "not_discovered - -");
    assert_eq!(line(from_client(&snapshot, "10.0.0.51:80")), "PassThrough 10.0.0.51:80 - -");
    snapshot.upsert_workload((&pod("late", &["10.0.0.50"])).try_into().unwrap());
    assert_eq!(line(from_client(&snapshot, "10.0.0.50:80")), "Direct 10.0.0.50:15008 10.0.0.50:80 [shop/late] late -");
}

#[test]
fn a_private_service_is_seen_in_its_namespace_only() {
    let private = wire::Service {
        visibility: wire::service::Visibility::Namespace.into(),
        ports: wire_ports(&[(80, 8080)]),
        ..service("web", "10.96.0.1", &[])
    };
    let snapshot = mesh(&[in_service(pod("web", &["10.0.0.2"]), "web", &[])], &[private]);
    let (identity, addresses) = (id("elsewhere", "client"), [ip(CLIENT)]);
    let stranger = LocalPod { namespace: "elsewhere", ..local("client", &identity, &addresses) };
    let random = &mut fastrand::Rng::with_seed(1);
    let planned = plan(&snapshot, &stranger, OriginalDst(at("10.96.0.1:80")), &is_local, random);
    assert_eq!(line(planned), "PassThrough 10.96.0.1:80 - -");
    assert!(line(from_client(&snapshot, "10.96.0.1:80")).starts_with("Direct 10.0.0.2:15008"));
}
