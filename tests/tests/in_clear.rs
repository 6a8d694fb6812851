//! What the wire shows, with the capture running from before the first pod until after the last: nothing in clear
//! between enrolled pods, only HBONE between the nodes, no rule and no connection tracking anywhere.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::net::IpAddr;
use std::sync::Arc;

use common::{connect, echo};
use tests::capture::LinkKind;
use tests::cluster::Cluster;
use tests::metrics;
use tests::node::Node;
use tests::pod::Pod;
use tests::{Error, netns::NetNs};

const MARKER: &str = "marker-of-the-capture-test";
const OPEN_MARKER: &str = "marker-of-the-pod-outside";

fn carried(node: &Node) -> Result<f64, Error> {
    let text = node.metrics()?;
    let sum = |name: &str| metrics::sum(&text, name, &[("connection_security_policy", "mutual_tls")]);
    Ok(sum("istio_tcp_sent_bytes_total") + sum("istio_tcp_received_bytes_total"))
}

#[test]
fn nothing_between_enrolled_pods_is_seen_in_clear() -> Result<(), Error> {
    let cluster = Cluster::builder().capture(MARKER).also_look_for(OPEN_MARKER).start()?;
    let server = echo(&cluster, "server", 2).enrolled(true).start()?;
    let client = cluster.pod("client").node(1).service_account("client").enrolled(true).start()?;
    let neighbour = cluster.pod("neighbour").node(2).service_account("neighbour").enrolled(true).start()?;
    let outside_server = echo(&cluster, "outside-server", 2).enrolled(false).start()?;
    let outside = cluster.pod("outside").node(1).enrolled(false).start()?;
    let before = [carried(cluster.node(1)?)?, carried(cluster.node(2)?)?];

    // Between nodes and on one node, both directions, more than one segment.
    let long = "MARKER ".repeat(400);
    for from in [&client, &neighbour] {
        let seen = connect(from, &server.at(7000).to_string(), &["--send", &long, "--read", "5000"]);
        assert!(seen.ok && seen.received.contains(MARKER), "{seen:?}");
    }
    // Positive control: outside the mesh the same thing is seen.
    let open = format!("{OPEN_MARKER} in clear");
    let seen = connect(&outside, &outside_server.at(7000).to_string(), &["--send", &open, "--read", "20"]);
    assert!(seen.ok, "{seen:?}");

    let dump = cluster.node(1)?.config_dump()?.to_string();
    for fact in ["\"h2\"", &server.identity(), &client.identity()] {
        assert!(dump.contains(fact), "{fact} is not in the proxy's configuration dump: {dump}");
    }
    assert!(!dump.contains("PRIVATE KEY"), "a key in the dump");
    for (index, before) in before.into_iter().enumerate() {
        let after = carried(cluster.node(index + 1)?)?;
        assert!(after - before >= 2.0 * 2800.0, "node {}: the tunnel carried {before} to {after} bytes", index + 1);
    }

    for pod in cluster.pods() {
        cluster.delete(&pod)?;
    }
    let report = cluster.finish_capture()?;
    let leaked: Vec<_> = report.marked(MARKER).collect();
    assert!(leaked.is_empty(), "in clear: {leaked:?}");
    let links_of_control = report.marked(OPEN_MARKER).filter(|(l, _)| matches!(l.kind, LinkKind::Pod { .. })).count();
    assert!(links_of_control >= 2, "the capture sees what is in clear, on both pods' links");
    assert!(report.marked(OPEN_MARKER).any(|(l, _)| matches!(l.kind, LinkKind::Node { .. })), "and between the nodes");

    let meshed: Vec<IpAddr> = [&server, &client, &neighbour].map(|p| p.ip()).to_vec();
    let mut tunnels = 0;
    for (link, flow) in report.between(&meshed, &meshed) {
        assert_eq!(flow.protocol, 6, "{link:?}");
        let ports = [flow.source.port(), flow.destination.port()];
        assert!(ports.contains(&15008), "between enrolled pods, but not HBONE: {flow:?}");
        if flow.payload > 0 {
            assert!(flow.is_tls(), "not TLS 1.3 records: {flow:?}");
            tunnels += 1;
        }
    }
    assert!(tunnels >= 4, "both tunnels were seen in both directions, {tunnels}");
    Ok(())
}

#[path = "common/netfilter.rs"]
mod netfilter;

fn every_namespace<'c>(cluster: &'c Cluster, pods: &'c [Arc<Pod>]) -> Vec<&'c NetNs> {
    let mut all = vec![cluster.fabric()];
    for node in cluster.nodes() {
        all.push(node.network());
        all.extend(node.proxy_network());
    }
    all.extend(pods.iter().map(|p| p.network()));
    all
}

#[test]
fn no_rule_and_no_connection_tracking() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let server = echo(&cluster, "server", 2).enrolled(true).start()?;
    let client = cluster.pod("client").node(1).enrolled(true).start()?;
    let seen = connect(&client, &server.at(7000).to_string(), &["--send", "x", "--read", "1"]);
    assert!(seen.ok, "{seen:?}");
    let pods = cluster.pods();
    for network in every_namespace(&cluster, &pods) {
        let found = network.run(netfilter::findings)?.map_err(|e| Error::io("asking netfilter", e))?;
        assert_eq!(found, netfilter::Findings::default(), "{}", network.label());
    }
    // Positive control, in a namespace of its own.
    let scratch = NetNs::create("scratch")?;
    let found = scratch.run(|| netfilter::make_nft_table("t").and_then(|()| netfilter::findings()))?;
    assert_eq!(found.map_err(|e| Error::io("making a table", e))?.nft_tables, 1);
    Ok(())
}
