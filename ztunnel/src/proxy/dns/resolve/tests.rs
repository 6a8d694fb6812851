use mesh_proto::workload as wire;

use super::*;
use crate::proxy::local::fixture::{id, in_service, ip, local, mesh, network_address, pod, service};

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
