//! What several end-to-end tests use.

#![allow(dead_code, reason = "each test file uses its part")]

pub mod storm;

use std::net::SocketAddr;

use tests::app::clients::connect::Report;
use tests::capture::{Flow, LinkKind, Report as Capture};
use tests::cluster::Cluster;
use tests::pod::{Pod, PodBuilder};

/// A pod `name` on that node with an echo server on port 7000 and a service account of its own.
pub fn echo<'c>(cluster: &'c Cluster, name: &str, node: usize) -> PodBuilder<'c> {
    let pod = cluster.pod(name).node(node).service_account(name).label("app", name);
    pod.command(["echo", "--listen", "0.0.0.0:7000"])
}

/// One connection of `culvert-app connect` from inside the pod; what it saw.
pub fn connect(from: &Pod, to: &str, args: &[&str]) -> Report {
    from.run_json(["connect", "--to", to].iter().chain(args)).unwrap()
}

/// Tries one exchange until it succeeds: a change is on its way through discovery.
pub fn until_connected(from: &Pod, to: &str) -> Report {
    let bound = std::time::Duration::from_secs(20);
    let ask = ["--send", "hello", "--read", "5", "--timeout", "2000"];
    let what = format!("{} reaches {to}", from.name());
    tests::wait::until(&what, bound, || Some(connect(from, to, &ask)).filter(|seen| seen.ok)).unwrap()
}

/// As [`echo`], listening in every family that the pod has.
pub fn echo_any<'c>(cluster: &'c Cluster, name: &str, node: usize) -> PodBuilder<'c> {
    let pod = cluster.pod(name).node(node).service_account(name).label("app", name);
    pod.command(["echo", "--listen", "[::]:7000"])
}

/// Tries to connect until it succeeds.
pub fn until_connected_only(from: &Pod, to: &str) -> Report {
    let bound = std::time::Duration::from_secs(20);
    let what = format!("{} connects to {to}", from.name());
    tests::wait::until(&what, bound, || Some(connect(from, to, &["--timeout", "2000"])).filter(|seen| seen.ok)).unwrap()
}

/// The agent's pages, in each node's namespace.
pub const ADMIN: &[&str] = &["--admin-addr", "127.0.0.1:15099"];

/// One exchange of the marker by `culvert-app dial`.
pub fn dial(from: &Pod, to: SocketAddr, args: &[&str]) -> Report {
    let to = to.to_string();
    from.run_json(["dial", "--to", &to, "--send", "MARKER"].iter().chain(args)).unwrap()
}

/// A counter of the kernel's programs on a node; the agents must have [`ADMIN`].
pub fn counter(cluster: &Cluster, node: usize, name: &str) -> f64 {
    let text = tests::http::get_ok(cluster.node(node).unwrap().network(), ([127, 0, 0, 1], 15099).into(), "/metrics");
    let text = text.unwrap();
    let found = tests::metrics::samples(&text, &format!("culvert_capture_{name}_total")).next();
    found.unwrap_or_else(|| panic!("no counter {name} in {text}")).value
}

/// Flows in which the marker was seen anywhere but on the links of these pods, on their way out. There, at the node's end,
/// is where the guard refuses them: the capture sees what arrives before the guard does.
pub fn beyond_its_link<'r>(report: &'r Capture, marker: &'r str, pods: &[&str]) -> Vec<(&'r LinkKind, &'r Flow)> {
    let own = |link: &LinkKind, flow: &Flow| match link {
        LinkKind::Pod { name, addresses, .. } => pods.contains(&name.as_str()) && addresses.contains(&flow.source.ip()),
        LinkKind::Node { .. } | LinkKind::Host { .. } => false,
    };
    report.marked(marker).map(|(link, flow)| (&link.kind, flow)).filter(|(link, flow)| !own(link, flow)).collect()
}
