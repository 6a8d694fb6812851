//! Address families: IPv4, IPv6 and both, and the ways in which applications make their sockets.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::{connect, counter, dial, echo_any, until_connected};
use tests::Error;
use tests::cluster::{Cluster, Mesh};
use tests::families::Families;
use tests::links::{self, Via};
use tests::netns::NetNs;

const MARKER: &str = "marker-of-the-families-test";
const ASK: [&str; 4] = ["--send", "hello", "--read", "5"];

/// Loose or strict: a pod's packets must arrive by the interface that answers leave by.
fn strict(network: &NetNs) -> Result<(), Error> {
    network.sysctl("net/ipv4/conf/all/rp_filter", "1")?;
    network.sysctl("net/ipv4/conf/eth0/rp_filter", "1")?;
    // Data with the SYN, whether or not there is a cookie.
    network.sysctl("net/ipv4/tcp_fastopen", "5")
}

/// The harness itself, without a mesh: what fails here is not the mesh's fault.
#[test]
fn pods_of_both_families_reach_each_other_without_a_mesh() -> Result<(), Error> {
    let cluster = Cluster::builder().mesh(Mesh::Off).families(Families::Dual).start()?;
    let server = echo_any(&cluster, "server", 2).start()?;
    assert_eq!(server.ips().len(), 2);
    for node in [1, 2] {
        let client = cluster.pod(&format!("client-{node}")).node(node).prepare(strict).start()?;
        for to in [server.at(7000), server.at_v6(7000)?] {
            let seen = connect(&client, &to.to_string(), &ASK);
            assert!(seen.ok && seen.peer == Some(to), "{seen:?}");
            assert_eq!(seen.local.unwrap().ip().is_ipv6(), to.is_ipv6());
            every_way(&client, to, 0);
        }
    }
    let lone = cluster.pod("lone").without_route(Families::V6).start()?;
    let seen = connect(&lone, &server.at_v6(7000)?.to_string(), &[]);
    assert_eq!(seen.error.as_deref(), Some("unreachable"), "{seen:?}");
    Ok(())
}

/// Dials in all ways that applications have; each must be carried.
fn every_way(client: &Arc<tests::pod::Pod>, to: SocketAddr, round: u16) {
    let own = client.ips().into_iter().find(|ip| ip.is_ipv4() == to.is_ipv4()).unwrap();
    let bound = SocketAddr::new(own, 20_000 + round).to_string();
    let some_port = SocketAddr::new(own, 0).to_string();
    let mut ways: Vec<Vec<&str>> = vec![
        vec![],
        vec!["--bind", &some_port],
        vec!["--bind", &bound, "--reuse"],
        vec!["--nonblocking"],
        vec!["--fast-open", "connect"],
        vec!["--fast-open", "sendto"],
    ];
    if to.is_ipv4() {
        ways.extend([vec!["--mapped"], vec!["--mapped", "--nonblocking"], vec!["--mapped", "--bind", &some_port]]);
    }
    if Path::new("/proc/sys/net/mptcp/enabled").exists() {
        ways.push(vec!["--mptcp"]);
    }
    for way in ways {
        let seen = dial(client, to, &way);
        assert!(seen.ok, "{way:?} to {to}: {seen:?}");
        assert_eq!(seen.peer.unwrap().ip().to_canonical(), to.ip(), "{way:?}: getpeername");
        let local = seen.local.unwrap();
        assert_eq!(local.ip().to_canonical(), own, "{way:?}: getsockname");
        if way.contains(&"--reuse") {
            assert_eq!(local.port(), 20_000 + round, "the port that it was bound to");
        }
    }
}

#[test]
fn sockets_of_every_kind_are_captured() -> Result<(), Error> {
    let cluster = Cluster::builder().families(Families::Dual).capture(MARKER).start()?;
    let near = echo_any(&cluster, "near", 1).enrolled(true).prepare(strict).start()?;
    let far = echo_any(&cluster, "far", 2).enrolled(true).prepare(strict).start()?;
    let client = cluster.pod("client").node(1).enrolled(true).prepare(strict).start()?;
    let mut round = 0;
    for server in [&near, &far] {
        for to in [server.at(7000), server.at_v6(7000)?] {
            until_connected(&client, &to.to_string());
            round += 1;
            every_way(&client, to, round);
        }
    }
    let report = cluster.finish_capture()?;
    let leaked: Vec<_> = report.marked(MARKER).collect();
    assert!(leaked.is_empty(), "in clear: {leaked:?}");
    Ok(())
}

#[test]
fn a_cluster_of_ipv6_alone() -> Result<(), Error> {
    let cluster = Cluster::builder().families(Families::V6).capture(MARKER).start()?;
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: server, namespace: default}\n\
                   spec: {selector: {app: server}, ports: [{port: 80, targetPort: 7000}]}\n";
    cluster.apply("server.yaml", service)?;
    let server = echo_any(&cluster, "server", 2).enrolled(true).start()?;
    let plain = echo_any(&cluster, "plain", 2).enrolled(false).start()?;
    let vip = cluster.directory().cluster_ip("default", "server").expect("a ClusterIP");
    assert!(vip.is_ipv6() && server.ips().iter().all(IpAddr::is_ipv6));
    let client = cluster.pod("client").node(1).enrolled(true).start()?;
    let outside = cluster.pod("outside").node(1).enrolled(false).start()?;
    for to in [server.at(7000), SocketAddr::new(vip, 80)] {
        until_connected(&client, &to.to_string());
        let seen = connect(&client, &to.to_string(), &["--send", "MARKER", "--read", "5"]);
        assert!(seen.ok, "{seen:?}");
    }
    for (from, to) in [(&client, &plain), (&outside, &server)] {
        let seen = connect(from, &to.at(7000).to_string(), &ASK);
        assert!(seen.ok && seen.received == "hello", "{seen:?}");
    }
    let report = cluster.finish_capture()?;
    let leaked: Vec<_> = report.marked(MARKER).collect();
    assert!(leaked.is_empty(), "in clear: {leaked:?}");
    Ok(())
}

#[test]
fn a_family_without_a_route_is_refused_by_the_kernel_so_that_applications_take_the_other() -> Result<(), Error> {
    let cluster = Cluster::builder().families(Families::Dual).start()?;
    let server = echo_any(&cluster, "server", 2).enrolled(true).start()?;
    let (v4, v6) = (server.at(7000), server.at_v6(7000)?);
    for (name, without, first, second) in [("without-v6", Families::V6, v6, v4), ("without-v4", Families::V4, v4, v6)] {
        let client = cluster.pod(name).node(1).enrolled(true).without_route(without).start()?;
        until_connected(&client, &second.to_string());
        let seen = connect(&client, &first.to_string(), &[]);
        assert_eq!(seen.error.as_deref(), Some("unreachable"), "{name}: {seen:?}");
        let second = second.to_string();
        let seen = dial(&client, first, &["--to", &second]);
        assert!(seen.ok && seen.total_ms < 1000.0, "{name}: {seen:?}");
    }
    // Pods that have only one family's addresses, in the same cluster.
    for families in [Families::V4, Families::V6] {
        let client = cluster.pod(&format!("{families:?}").to_lowercase()).node(1).families(families).enrolled(true);
        let client = client.start()?;
        for to in [v4, v6] {
            let possible = if to.is_ipv4() { families.v4() } else { families.v6() };
            let seen = connect(&client, &to.to_string(), &ASK);
            assert_eq!(seen.ok, possible, "{families:?} to {to}: {seen:?}");
        }
    }
    Ok(())
}

#[test]
fn every_address_of_a_pod_is_the_pods() -> Result<(), Error> {
    let cluster = Cluster::builder().families(Families::Dual).capture(MARKER).start()?;
    let ips = |texts: [&str; 4]| texts.map(|text| text.parse::<IpAddr>().expect("an address"));
    let many = ips(["10.244.2.200", "10.244.2.201", "fd10:244:0:2::c8", "fd10:244:0:2::c9"]);
    let own = ips(["10.244.1.200", "10.244.1.201", "fd10:244:0:1::c8", "fd10:244:0:1::c9"]);
    let server = echo_any(&cluster, "server", 2).enrolled(true).addresses(&many).start()?;
    let client = cluster.pod("client").node(1).enrolled(true).addresses(&own).start()?;
    for to in server.ips() {
        let to = SocketAddr::new(to, 7000);
        until_connected(&client, &to.to_string());
        for from in own.iter().filter(|from| from.is_ipv4() == to.is_ipv4()) {
            let seen = dial(&client, to, &["--bind", &SocketAddr::new(*from, 0).to_string()]);
            assert!(seen.ok && seen.local.unwrap().ip() == *from, "{from} to {to}: {seen:?}");
        }
    }
    let report = cluster.finish_capture()?;
    let leaked: Vec<_> = report.marked(MARKER).collect();
    assert!(leaked.is_empty(), "in clear: {leaked:?}");
    Ok(())
}

/// A network of its own behind `net1`: what goes there is none of the mesh's business, whenever it was attached.
#[test]
fn a_second_interface_is_left_alone() -> Result<(), Error> {
    let cluster = Cluster::builder().families(Families::Dual).agent_args(common::ADMIN).start()?;
    let other = &NetNs::create_for(Families::Dual, "second network")?;
    let attach = |network: &NetNs| {
        network.netlink(|handle| async move {
            links::veth(&handle, "net1", "eth0", other).await?;
            links::address(&handle, "net1", [192, 168, 77, 2].into(), 24).await?;
            links::address(&handle, "net1", "fd77::2".parse::<IpAddr>().expect("an address"), 64).await?;
            links::up(&handle, "net1").await
        })?;
        other.netlink(|handle| async move {
            links::address(&handle, "eth0", [192, 168, 77, 1].into(), 24).await?;
            links::address(&handle, "eth0", "fd77::1".parse::<IpAddr>().expect("an address"), 64).await?;
            links::up(&handle, "eth0").await
        })
    };
    let before = cluster.pod("before").node(1).enrolled(true).prepare(attach).start()?;
    let targets = ["192.168.77.1:9000", "[fd77::1]:9000"].map(|text| text.parse::<SocketAddr>().expect("an address"));
    let listeners = targets.map(|at| other.listen(at).expect("a port"));
    for (to, listener) in targets.into_iter().zip(&listeners) {
        let captured = counter(&cluster, 1, "captured");
        let seen = connect(&before, &to.to_string(), &[]);
        assert!(seen.ok, "{seen:?}");
        let (_stream, from) = listener.accept().unwrap();
        assert_eq!(Some(from), seen.local);
        assert_eq!(counter(&cluster, 1, "captured"), captured, "it was captured");
    }
    // A route by way of it that comes later, and one that goes.
    let to: SocketAddr = "192.168.78.1:9000".parse().expect("an address");
    other.netlink(|handle| async move { links::address(&handle, "lo", [192, 168, 78, 1].into(), 32).await })?;
    let _listener = other.listen(to)?;
    before.network().netlink(|handle| async move {
        let via = Via::Gateway([192, 168, 77, 1].into(), "net1");
        links::route(&handle, [192, 168, 78, 0].into(), 24, via, None).await
    })?;
    tests::wait::until("the new route is known", Duration::from_secs(10), || {
        let captured = counter(&cluster, 1, "captured");
        (connect(&before, &to.to_string(), &["--timeout", "1000"]).ok && counter(&cluster, 1, "captured") == captured)
            .then_some(())
    })?;
    Ok(())
}
