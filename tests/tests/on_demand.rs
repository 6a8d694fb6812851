//! Discovery on demand: a node's proxy knows what its pods use, and refuses what it cannot ask about.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use common::{beyond_its_link, connect, dial, echo, until_connected};
use tests::Error;
use tests::cluster::Cluster;
use tests::pod::Pod;

const MARKER: &str = "marker-of-the-on-demand-test";
const BOUND: Duration = Duration::from_secs(20);
const ASK: &[&str] = &["--send", "hello", "--read", "5", "--timeout", "9000"];

fn service(name: &str, address: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\nspec:\n  clusterIP: {address}\n  \
         selector: {{app: {name}}}\n  ports: [{{name: tcp, port: 80, targetPort: 7000}}]\n"
    )
}

/// What the proxy of the first node knows, by name: of `kind`, which is `workloads` or `services`.
fn known(cluster: &Cluster, kind: &str) -> BTreeSet<String> {
    let dump = cluster.node(1).unwrap().config_dump().unwrap();
    let names = dump[kind].as_array().unwrap().iter().filter_map(|one| one["name"].as_str());
    names.map(str::to_owned).collect()
}

/// Connections of the first node's pods that failed for `reason`.
fn failures(cluster: &Cluster, reason: &str) -> f64 {
    let text = cluster.node(1).unwrap().metrics().unwrap();
    tests::metrics::sum(&text, "culvert_connection_failures_total", &[("reason", reason)])
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn start(cluster: &Cluster, name: &str, app: &str, node: usize) -> Result<Arc<Pod>, Error> {
    // Not every proxy learns of it.
    echo(cluster, name, node).label("app", app).enrolled(true).unsettled().start()
}

/// Waits until a connection is carried by the mesh: before its peer is known to be captured it is not.
fn until_carried(client: &Pod, cluster: &Cluster, to: &str) {
    until_connected(client, to);
    let carried = || {
        let text = cluster.node(1).ok()?.metrics().ok()?;
        connect(client, to, ASK);
        let by = [("reporter", "source"), ("connection_security_policy", "mutual_tls")];
        (tests::metrics::sum(&text, "istio_tcp_connections_opened_total", &by) > 0.0).then_some(())
    };
    tests::wait::until(&format!("{to} is reached by mutual TLS"), BOUND, carried).unwrap();
}

#[test]
fn a_proxy_knows_what_its_pods_use() -> Result<(), Error> {
    let cluster = Cluster::builder().proxy_args(&["--discovery", "on-demand"]).capture(MARKER).start()?;
    cluster.apply("web.yaml", &service("web", "10.96.1.1"))?;
    cluster.apply("other.yaml", &service("other", "10.96.1.2"))?;
    let _server = start(&cluster, "web-1", "web", 2)?;
    let other = start(&cluster, "other-1", "other", 2)?;
    let direct = start(&cluster, "direct", "direct", 2)?;
    let client = start(&cluster, "client", "client", 1)?;
    let open = echo(&cluster, "open", 2).enrolled(false).unsettled().start()?;

    until_carried(&client, &cluster, "10.96.1.1:80");
    assert_eq!(known(&cluster, "workloads"), names(&["client", "web-1"]), "the pod itself, and the service's endpoint");
    assert_eq!(known(&cluster, "services"), names(&["web"]));
    until_connected(&client, &direct.at(7000).to_string());
    assert_eq!(known(&cluster, "workloads"), names(&["client", "direct", "web-1"]));

    // What belongs to a service in use is told; what nobody uses is not.
    let second = start(&cluster, "web-2", "web", 2)?;
    start(&cluster, "other-2", "other", 2)?;
    tests::wait::until("the second endpoint is known", BOUND, || {
        (known(&cluster, "workloads") == names(&["client", "direct", "web-1", "web-2"])).then_some(())
    })?;
    cluster.delete(&second)?;
    tests::wait::until("it is known to be gone", BOUND, || {
        (known(&cluster, "workloads") == names(&["client", "direct", "web-1"])).then_some(())
    })?;

    // Outside the mesh: a pod that is not in it, and what the control plane does not know.
    until_connected(&client, &open.at(7000).to_string());
    let before = failures(&cluster, "connect");
    let nobody = connect(&client, &format!("{}:9", cluster.host("nobody")?.address), ASK);
    assert!(!nobody.ok && failures(&cluster, "connect") > before, "passed on, and refused there: {nobody:?}");

    // Without the control plane: what was asked for is known, the rest is not let out.
    cluster.control()?.component.terminate(BOUND)?;
    let seen = connect(&client, "10.96.1.1:80", ASK);
    assert!(seen.ok, "{seen:?}");
    let seen = dial(&client, other.at(7000), &["--timeout", "9000"]);
    assert!(!seen.ok, "nobody knows whether it is in the mesh: {seen:?}");
    assert!(failures(&cluster, "discovery_timeout") > 0.0, "{}", cluster.node(1)?.metrics()?);
    cluster.control()?.component.start()?;
    until_connected(&client, &other.at(7000).to_string());
    assert_eq!(known(&cluster, "workloads"), names(&["client", "direct", "open", "other-1", "web-1"]));

    let report = cluster.finish_capture()?;
    let leaked = beyond_its_link(&report, MARKER, &["client"]);
    assert!(leaked.is_empty(), "in clear: {leaked:#?}");
    Ok(())
}
