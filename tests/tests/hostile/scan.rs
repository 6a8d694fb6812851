//! Every port of a node, of a proxy and of an enrolled pod, tried by an enrolled application: what is open is what is meant to be.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use tests::app::clients::scan::Report;
use tests::metrics;
use tests::pod::Pod;

use crate::scene::{ECHO, Scene};

/// Longest that all ports of one address may take, on a machine that is busy.
const ALL_PORTS: Duration = Duration::from_secs(300);
/// The proxy's own pages that are for whoever may reach the pod network: metrics and readiness.
const PAGES: [u16; 2] = [15020, 15021];
/// How long what is connected must say nothing to count as open, in milliseconds: less than a tunnel may take to begin.
const SILENCE: &str = "1000";

/// Tries every port of an address from inside a pod; which are open, and why the others are not.
fn scan(from: &Pod, to: IpAddr, at_a_time: usize) -> Report {
    let (address, at_a_time) = (to.to_string(), at_a_time.to_string());
    let args = ["scan", "--to", &address, "--at-a-time", &at_a_time, "--silence", SILENCE];
    let report: Report = from.run_for(ALL_PORTS, args).unwrap().json().unwrap();
    println!("{} to {to}: {report:?}", from.name());
    assert_eq!(report.tried(), usize::from(u16::MAX), "{to}: {report:?}");
    report
}

/// Failed connections of a node's proxy, by their reason.
fn failures(scene: &Scene, node: usize) -> BTreeMap<String, f64> {
    let text = scene.cluster.node(node).unwrap().metrics().unwrap();
    let samples = metrics::samples(&text, "culvert_connection_failures_total");
    let mut all = BTreeMap::new();
    samples.for_each(|s| *all.entry(s.label("reason").unwrap().to_owned()).or_default() += s.value);
    all
}

/// Connections were refused because they lead nowhere, and none because there were so many: a port that was refused so may be open.
fn refused_for(scene: &Scene, node: usize, before: &BTreeMap<String, f64>, reasons: &[&str]) {
    let now = failures(scene, node);
    let new: Vec<_> = now.iter().filter(|(reason, count)| before.get(*reason).is_none_or(|n| n < *count)).collect();
    println!("node {node}: {new:?}");
    assert!(new.iter().all(|(reason, _)| reasons.contains(&reason.as_str())), "node {node}: {new:?}");
}

#[test]
fn an_enrolled_application_finds_no_port_open_that_is_not_meant_to_be() {
    let scene = Scene::start();
    let node = scene.cluster.node(1).unwrap();
    let proxy = node.mesh().unwrap().proxy().record.ip();
    let before = [failures(&scene, 1), failures(&scene, 2)];
    for (to, open) in [(node.address.into(), &[][..]), (proxy, &PAGES), (scene.target.ip(), &[ECHO])] {
        assert_eq!(scan(&scene.friend, to, 512).open, open, "{to}");
    }
    refused_for(&scene, 1, &before[0], &["connect", "refused_by_peer", "forbidden_port"]);
    refused_for(&scene, 2, &before[1], &["connect"]);
    scene.victim_is_well("a scan from inside of the mesh");
    scene.ends_as_it_was(32 << 10);
}
