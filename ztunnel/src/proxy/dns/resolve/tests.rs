use mesh_proto::workload as wire;

use super::*;
use crate::proxy::local::fixture::{id, in_service, ip, local, mesh, network_address, pod, service, with_port_names};

/// `reviews` has addresses of both families, `web` is headless with a StatefulSet's pods, `api.example.com` and a wildcard
/// are of the outside.
fn shop() -> Snapshot {
    let ports = &[(80, 8080)][..];
    let both = vec![network_address("10.96.0.1"), network_address("2001:db8:f::1")];
    let reviews = wire::Service { addresses: both, ..service("reviews", "10.96.0.1", ports) };
    let headless = |name: &str| wire::Service { addresses: Vec::new(), ..service(name, "10.96.0.9", ports) };
    let other = wire::Service {
        namespace: "bank".into(),
        hostname: "ledger.bank.svc.cluster.local".into(),
        ..service("ledger", "10.96.0.3", ports)
    };
    let secret = wire::Service {
        namespace: "bank".into(),
        hostname: "secret.bank.svc.cluster.local".into(),
        visibility: wire::service::Visibility::Namespace.into(),
        ..service("secret", "10.96.0.4", ports)
    };
    let host = |hostname: &str, vip| wire::Service { hostname: hostname.into(), ..service(hostname, vip, ports) };
    let passthrough = wire::Service {
        load_balancing: Some(wire::LoadBalancing {
            mode: wire::load_balancing::Mode::Passthrough.into(),
            ..Default::default()
        }),
        ..host("free.example.org", "240.0.0.9")
    };
    let block = wire::NetworkAddress { length: Some(24), ..network_address("192.0.2.0") };
    let blocks = wire::Service { addresses: vec![block], ..host("block.example.org", "192.0.2.0") };
    let stateful = |name: &str, address: &str| {
        let workload = in_service(pod(name, &[address, &address.replace("10.0.0.", "2001:db8::")]), "web", ports);
        wire::Workload { workload_name: "web".into(), ..workload }
    };
    let sick = wire::Workload { status: wire::WorkloadStatus::Unhealthy.into(), ..stateful("web-2", "10.0.0.7") };
    let deployed = wire::Workload { workload_name: "web-abc".into(), ..stateful("web-abc-12", "10.0.0.8") };
    let workloads = [pod("client", &["10.0.0.1"]), stateful("web-0", "10.0.0.5"), stateful("web-1", "10.0.0.6"), sick];
    let services = [
        reviews,
        headless("web"),
        headless("empty"),
        other,
        secret,
        host("API.example.com", "240.0.0.1"),
        host("*.wild.example.com", "240.0.0.2"),
        host("deep.wild.example.com", "240.0.0.3"),
        host("com.shop.svc.cluster.local", "10.96.0.20"),
        passthrough,
        blocks,
    ];
    let mut snapshot = mesh(&workloads, &services);
    snapshot.upsert_workload((&wire::Workload { services: Default::default(), ..deployed }).try_into().unwrap());
    snapshot
}

fn found(snapshot: &Snapshot, name: &str) -> String {
    let (identity, addresses) = (id("shop", "client"), [ip("10.0.0.1")]);
    let client = local("client", &identity, &addresses);
    match resolve(snapshot, &client, "cluster.local", name) {
        None => String::from("-"),
        Some(Found { mut addresses, alias_of }) => {
            addresses.sort();
            let addresses = addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" ");
            alias_of.map(|name| format!("{name}: ")).unwrap_or_default() + &addresses
        }
    }
}

#[test]
fn names_and_what_they_mean() {
    let reviews = "10.96.0.1 2001:db8:f::1";
    let cases = [
        ("reviews.shop.svc.cluster.local", reviews),
        ("reviews", reviews),
        ("reviews.shop", reviews),
        ("reviews.shop.svc", reviews),
        ("reviews.bank", "-"),
        ("reviews.shop.svc.example.org", "-"),
        ("ledger", "-"),
        ("ledger.bank", "10.96.0.3"),
        ("ledger.bank.svc.cluster.local", "10.96.0.3"),
        // Only its own namespace sees it.
        ("secret.bank.svc.cluster.local", "-"),
        // Search domains behind full names.
        (
            "reviews.shop.svc.cluster.local.shop.svc.cluster.local",
            &format!("reviews.shop.svc.cluster.local: {reviews}"),
        ),
        // A short name that the first search domain was appended to.
        ("ledger.bank.shop.svc.cluster.local", "ledger.bank.svc.cluster.local: 10.96.0.3"),
        ("reviews.shop.shop.svc.cluster.local", &format!("reviews.shop.svc.cluster.local: {reviews}")),
        ("api.example.com", "240.0.0.1"),
        ("api.example.com.shop.svc.cluster.local", "api.example.com: 240.0.0.1"),
        ("api.example.com.svc.cluster.local", "api.example.com: 240.0.0.1"),
        ("api.example.com.cluster.local", "api.example.com: 240.0.0.1"),
        // A search domain of another namespace is none of this pod's.
        ("api.example.com.bank.svc.cluster.local", "-"),
        ("x.wild.example.com", "240.0.0.2"),
        ("a.b.wild.example.com", "240.0.0.2"),
        ("deep.wild.example.com", "240.0.0.3"),
        ("wild.example.com", "-"),
        ("*.wild.example.com", "240.0.0.2"),
        ("www.example.com", "-"),
        ("example.com", "-"),
        ("com", "10.96.0.20"),
        // Who asks for these must get what they are outside.
        ("free.example.org", "-"),
        ("block.example.org", "-"),
        ("", "-"),
        (".", "-"),
        ("cluster.local", "-"),
        ("svc.cluster.local", "-"),
        ("shop.svc.cluster.local", "-"),
    ];
    let snapshot = shop();
    for (name, expected) in cases {
        assert_eq!(found(&snapshot, name), expected, "{name}");
    }
}

#[test]
fn headless_services_and_their_pods() {
    let cases = [
        ("web", "10.0.0.5 10.0.0.6 2001:db8::5 2001:db8::6"),
        ("web.shop.svc.cluster.local", "10.0.0.5 10.0.0.6 2001:db8::5 2001:db8::6"),
        ("empty", "-"),
        ("web-0.web.shop.svc.cluster.local", "10.0.0.5 2001:db8::5"),
        ("web-0.web", "10.0.0.5 2001:db8::5"),
        ("web-0.web.shop", "10.0.0.5 2001:db8::5"),
        ("web-0.web.shop.svc", "10.0.0.5 2001:db8::5"),
        ("10-0-0-6.web.shop.svc.cluster.local", "10.0.0.6 2001:db8::6"),
        ("2001-db8--6.web.shop.svc.cluster.local", "10.0.0.6 2001:db8::6"),
        // Not ready; not one of the service; of no StatefulSet; not headless.
        ("web-2.web.shop.svc.cluster.local", "-"),
        ("10-0-0-1.web.shop.svc.cluster.local", "-"),
        ("web-abc-12.web.shop.svc.cluster.local", "-"),
        ("web-0.reviews.shop.svc.cluster.local", "-"),
        ("web-0.web.bank.svc.cluster.local", "-"),
        ("web-9.web.shop.svc.cluster.local", "-"),
    ];
    let snapshot = shop();
    for (name, expected) in cases {
        assert_eq!(found(&snapshot, name), expected, "{name}");
    }
}

#[test]
fn the_namespace_of_the_client_comes_first() {
    let mut snapshot = shop();
    let twin = |namespace: &str, vip| wire::Service {
        namespace: namespace.into(),
        hostname: "twin.example.com".into(),
        ..service("twin", vip, &[])
    };
    snapshot.upsert_service((&twin("bank", "240.0.1.1")).try_into().unwrap());
    assert_eq!(found(&snapshot, "twin.example.com"), "240.0.1.1");
    snapshot.upsert_service((&twin("shop", "240.0.1.2")).try_into().unwrap());
    assert_eq!(found(&snapshot, "twin.example.com"), "240.0.1.2");
}

/// `reviews` and `web` as in [`shop`], with names for their ports: `web` leaves `admin` to each of its pods, of which a pod
/// without ordinal and one of another cluster have no names of their own.
fn named() -> Snapshot {
    let ports = &[(80, 8080), (81, 0)][..];
    let names = &[("http", 80), ("admin", 81)][..];
    let both = vec![network_address("10.96.0.1"), network_address("2001:db8:f::1")];
    let reviews = wire::Service { addresses: both, ..service("reviews", "10.96.0.1", ports) };
    let headless = |name: &str| wire::Service { addresses: Vec::new(), ..service(name, "10.96.0.9", ports) };
    let secret = wire::Service {
        namespace: "bank".into(),
        hostname: "secret.bank.svc.cluster.local".into(),
        visibility: wire::service::Visibility::Namespace.into(),
        ..service("secret", "10.96.0.4", ports)
    };
    let host = |hostname: &str, vip| wire::Service { hostname: hostname.into(), ..service(hostname, vip, ports) };
    let passthrough = wire::Service {
        load_balancing: Some(wire::LoadBalancing {
            mode: wire::load_balancing::Mode::Passthrough.into(),
            ..Default::default()
        }),
        ..host("free.example.org", "240.0.0.9")
    };
    let outside = wire::Service { addresses: Vec::new(), ..host("many.example.com", "240.0.0.9") };
    let services = [reviews, headless("web"), headless("empty"), secret, host("api.example.com", "240.0.0.1")];
    let more = [host("*.wild.example.com", "240.0.0.2"), passthrough, outside];
    let services = services.into_iter().chain(more).map(|service| with_port_names(service, names));
    let services: Vec<_> = services.chain([service("nameless", "10.96.0.30", ports)]).collect();
    let stateful = |name: &str, address: &str, own: &[(u32, u32)]| {
        let workload = in_service(pod(name, &[address, &address.replace("10.0.0.", "2001:db8::")]), "web", own);
        wire::Workload { workload_name: "web".into(), ..workload }
    };
    let far = wire::Workload { uid: "other//Pod/shop/web-3".into(), ..stateful("web-3", "10.0.0.9", &[]) };
    let mut only_v6 = in_service(pod("web-abc", &["2001:db8:1::"]), "web", &[]);
    only_v6.capacity = Some(5);
    let sick = wire::Workload { status: wire::WorkloadStatus::Unhealthy.into(), ..stateful("web-2", "10.0.0.7", &[]) };
    let pods = [
        pod("client", &["10.0.0.1"]),
        stateful("web-0", "10.0.0.5", &[(80, 8080), (81, 9001)]),
        stateful("web-1", "10.0.0.6", &[(80, 18080)]),
        sick,
        far,
        only_v6,
    ];
    let mut outsider = pod("outsider", &["198.51.100.1"]);
    outsider.services.insert("shop/many.example.com".into(), wire::PortList::default());
    mesh(&[&pods[..], &[outsider]].concat(), &services)
}

fn found_service(snapshot: &Snapshot, name: &str) -> Vec<String> {
    let (identity, addresses) = (id("shop", "client"), [ip("10.0.0.1")]);
    let client = local("client", &identity, &addresses);
    let Some(found) = resolve_service(snapshot, &client, "cluster.local", name) else { return Vec::new() };
    let line = |target: Target| {
        let addresses = target.addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" ");
        // Each target is a name that is known, with the very same addresses.
        let own = addresses_of(snapshot, &target.name);
        assert_eq!(own.as_ref(), Some(&target.addresses), "{}", target.name);
        format!("{} {}:{} {addresses}", target.weight, target.name, target.port)
    };
    let mut lines: Vec<String> = found.targets.into_iter().map(line).collect();
    lines.sort();
    found.alias_of.into_iter().chain(lines).collect()
}

fn addresses_of(snapshot: &Snapshot, name: &str) -> Option<Vec<IpAddr>> {
    let (identity, addresses) = (id("shop", "client"), [ip("10.0.0.1")]);
    let found = resolve(snapshot, &local("client", &identity, &addresses), "cluster.local", name);
    found.map(|found| found.addresses)
}

#[test]
fn services_by_the_names_of_their_ports() {
    let reviews = |port: u16| format!("100 reviews.shop.svc.cluster.local:{port} 10.96.0.1 2001:db8:f::1");
    let api = "100 api.example.com:80 240.0.0.1";
    let web = "web.shop.svc.cluster.local";
    let endpoints = [
        format!("1 10-0-0-9.{web}:8080 10.0.0.9 2001:db8::9"),
        format!("1 web-0.{web}:8080 10.0.0.5 2001:db8::5"),
        format!("1 web-1.{web}:18080 10.0.0.6 2001:db8::6"),
        format!("5 2001-db8-1--0.{web}:8080 2001:db8:1::"),
    ];
    let none: &[String] = &[];
    let cases: &[(&str, &[String])] = &[
        ("_http._tcp.reviews.shop.svc.cluster.local", &[reviews(80)]),
        ("_admin._tcp.reviews.shop.svc.cluster.local", &[reviews(81)]),
        ("_http._tcp.reviews", &[reviews(80)]),
        ("_http._tcp.reviews.shop", &[reviews(80)]),
        ("_http._tcp.reviews.shop.svc", &[reviews(80)]),
        ("_http._tcp.api.example.com", &[api.into()]),
        ("_http._tcp.api.example.com.shop.svc.cluster.local", &["_http._tcp.api.example.com".into(), api.into()]),
        ("_http._tcp.web.shop.svc.cluster.local", &endpoints),
        ("_http._tcp.web", &endpoints),
        // Only one pod says where it listens.
        ("_admin._tcp.web", &[format!("1 web-0.{web}:9001 10.0.0.5 2001:db8::5")]),
        // Not told, of another protocol, or not a name of a port.
        ("_grpc._tcp.reviews.shop.svc.cluster.local", none),
        ("_http._udp.reviews.shop.svc.cluster.local", none),
        ("http._tcp.reviews.shop.svc.cluster.local", none),
        ("_http.tcp.reviews.shop.svc.cluster.local", none),
        ("_._tcp.reviews.shop.svc.cluster.local", none),
        ("_http._tcp.nameless.shop.svc.cluster.local", none),
        ("reviews.shop.svc.cluster.local", none),
        ("_http._tcp", none),
        ("_http", none),
        // Nobody there; not seen from here; of the outside without addresses; a wildcard; to be left alone; an endpoint.
        ("_http._tcp.empty", none),
        ("_http._tcp.secret.bank.svc.cluster.local", none),
        ("_http._tcp.many.example.com", none),
        ("_http._tcp.x.wild.example.com", none),
        ("_http._tcp.*.wild.example.com", none),
        ("_http._tcp.free.example.org", none),
        ("_http._tcp.web-0.web.shop.svc.cluster.local", none),
    ];
    let snapshot = named();
    for (name, expected) in cases {
        assert_eq!(found_service(&snapshot, name), *expected, "{name}");
    }
}
