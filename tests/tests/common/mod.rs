//! What several end-to-end tests use.

#![allow(dead_code, reason = "each test file uses its part")]

pub mod storm;

use tests::app::clients::connect::Report;
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
