//! A change of configuration reaches both nodes, and new connections follow it; an invalid one changes nothing and is
//! reported.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::{connect, until_connected};
use tests::Error;
use tests::cluster::Cluster;
use tests::pod::Pod;
use tests::process::Spec;

const BOUND: Duration = Duration::from_secs(20);

fn service(name: &str, address: &str, target: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\nspec:\n  clusterIP: {address}\n  \
         selector: {{app: web}}\n  ports: [{{name: tcp, port: 80, targetPort: {target}}}]\n"
    )
}

/// The pods that answered twelve connections, by the name in their banner.
fn answered(client: &Pod, to: &str) -> BTreeSet<String> {
    let ask = ["--read-line", "--timeout", "2000"];
    let seen = (0..12).map(|_| connect(client, to, &ask)).filter(|seen| seen.ok);
    let pods = seen.filter_map(|seen| serde_json::from_str::<serde_json::Value>(seen.received.trim()).ok());
    pods.filter_map(|line| line["pod"].as_str().map(str::to_owned)).collect()
}

fn until_answered(client: &Pod, to: &str, by: &[&str]) -> Result<(), Error> {
    let want: BTreeSet<String> = by.iter().map(ToString::to_string).collect();
    let what = format!("{} is answered by {by:?} at {to}", client.name());
    tests::wait::until(&what, BOUND, || (answered(client, to) == want).then_some(()))
}

#[test]
fn new_connections_follow_a_service() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let web = |name: &str, node: usize| {
        let pod = cluster.pod(name).node(node).enrolled(true).label("app", "web").port("serving", 7000);
        pod.command(["echo", "--listen", "0.0.0.0:7000", "--mode", "banner"]).start()
    };
    let (one, two) = (web("one", 1)?, web("two", 2)?);
    cluster.apply("web.yaml", &service("web", "10.96.1.1", "serving"))?;
    let clients = [
        cluster.pod("client-1").node(1).enrolled(true).start()?,
        cluster.pod("client-2").node(2).enrolled(true).start()?,
    ];
    for client in &clients {
        until_answered(client, "10.96.1.1:80", &["one", "two"])?;
    }
    let three = web("three", 1)?;
    for client in &clients {
        until_answered(client, "10.96.1.1:80", &["one", "two", "three"])?;
    }
    // Not ready any more, and gone.
    two.set_ready(false)?;
    cluster.delete(&three)?;
    for client in &clients {
        until_answered(client, "10.96.1.1:80", &["one"])?;
    }
    // Renamed: the old address is no service any more, the new one is.
    cluster.directory().remove("web.yaml")?;
    cluster.apply("renamed.yaml", &service("renamed", "10.96.1.2", "7000"))?;
    for client in &clients {
        until_answered(client, "10.96.1.2:80", &["one"])?;
        let old = connect(client, "10.96.1.1:80", &["--read-line", "--timeout", "1000"]);
        assert!(!old.ok, "{old:?}");
    }
    // An address of the service that has no such port, and one without ready endpoints.
    let wrong = connect(&clients[0], "10.96.1.2:81", &["--read-line", "--timeout", "1000"]);
    assert_eq!(wrong.error.as_deref(), Some("reset"), "{wrong:?}");
    one.set_ready(false)?;
    for client in &clients {
        until_answered(client, "10.96.1.2:80", &[])?;
    }
    Ok(())
}

/// As kube-proxy does it (KEP-1669).
#[test]
fn pods_that_terminate_serve_until_they_are_gone() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let web = |name: &str, node: usize| {
        let pod = cluster.pod(name).node(node).enrolled(true).service_account(name).label("app", "web");
        pod.command(["echo", "--listen", "0.0.0.0:7000", "--mode", "banner"]).start()
    };
    let (one, two) = (web("one", 1)?, web("two", 2)?);
    cluster.apply("web.yaml", &service("web", "10.96.1.1", "7000"))?;
    let client = cluster.pod("client").node(1).enrolled(true).start()?;
    until_answered(&client, "10.96.1.1:80", &["one", "two"])?;
    // One is left that does not terminate.
    two.begin_to_end()?;
    until_answered(&client, "10.96.1.1:80", &["one"])?;
    // Its own address goes on to be reached through a tunnel.
    let direct = connect(&client, &two.at(7000).to_string(), &["--read-line", "--timeout", "2000"]);
    assert!(direct.ok, "{direct:?}");
    let tunnels = |node: usize| {
        let text = cluster.node(node)?.metrics()?;
        let by = [("reporter", "destination"), ("connection_security_policy", "mutual_tls")];
        Ok::<_, Error>(tests::metrics::sum(&text, "istio_tcp_connections_opened_total", &by))
    };
    let before = tunnels(2)?;
    one.begin_to_end()?;
    until_answered(&client, "10.96.1.1:80", &["one", "two"])?;
    assert!(tunnels(2)? > before, "what is draining is reached by mutual TLS");
    // Terminating and not ready any more.
    one.set_ready(false)?;
    until_answered(&client, "10.96.1.1:80", &["two"])?;
    two.set_ready(false)?;
    until_answered(&client, "10.96.1.1:80", &[])?;
    // Where those that are not ready are asked for, all are served alike.
    let all = service("web", "10.96.1.1", "7000").replace("spec:\n", "spec:\n  publishNotReadyAddresses: true\n");
    cluster.apply("web.yaml", &all)?;
    until_answered(&client, "10.96.1.1:80", &["one", "two"])
}

/// The same of endpoints that are no pods.
#[test]
fn endpoints_that_terminate_serve_until_they_are_gone() -> Result<(), Error> {
    let cluster = Cluster::builder().nodes(1).start()?;
    let hosts = [cluster.host("left")?, cluster.host("right")?];
    let serve = |host: &tests::cluster::Host| {
        let mut spec = Spec::new(
            &host.name,
            tests::cluster::bin_dir()?.join("culvert-app"),
            cluster.folder().join("logs").join(format!("{}.log", host.name)),
        );
        spec = spec.args(["echo", "--listen", "0.0.0.0:7000", "--mode", "banner"]).env("POD_NAME", &host.name);
        spec.network = Some(std::sync::Arc::clone(&host.network));
        spec.start()
    };
    let _servers = [serve(&hosts[0])?, serve(&hosts[1])?];
    let slice = |left: &str, right: &str| {
        format!(
            "apiVersion: v1
kind: Service
metadata: {{name: db, namespace: default}}
spec: {{clusterIP: 10.96.1.9, ports: [{{name: tcp, port: 80, targetPort: 7000}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: db-1, namespace: default, labels: {{kubernetes.io/service-name: db}}}}
addressType: IPv4
ports: [{{name: tcp, port: 7000}}]
endpoints:
- {{addresses: [{}], conditions: {{{left}}}}}
- {{addresses: [{}], conditions: {{{right}}}}}
",
            hosts[0].address, hosts[1].address
        )
    };
    let draining = "ready: false, serving: true, terminating: true";
    let client = cluster.pod("client").node(1).enrolled(true).start()?;
    for (left, right, expected) in [
        ("ready: true", "ready: true", &["left", "right"][..]),
        ("ready: true", draining, &["left"]),
        (draining, draining, &["left", "right"]),
        ("ready: false, serving: false, terminating: true", draining, &["right"]),
        ("ready: false", "ready: false", &[]),
    ] {
        cluster.apply("db.yaml", &slice(left, right))?;
        until_answered(&client, "10.96.1.9:80", expected)?;
    }
    Ok(())
}

#[test]
fn an_invalid_file_changes_nothing_and_is_reported() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    cluster.apply("web.yaml", &service("web", "10.96.1.1", "7000"))?;
    let _server = common::echo(&cluster, "server", 2).label("app", "web").enrolled(true).start()?;
    let client = cluster.pod("client").node(1).enrolled(true).start()?;
    until_connected(&client, "10.96.1.1:80");

    let refused = |text: &str| tests::metrics::sum(text, "culvert_objects_refused", &[]);
    let before = refused(&cluster.control()?.metrics()?);
    cluster.directory().write_raw("web.yaml", &service("web", "10.96.1.1", "70000"))?;
    let report = tests::wait::until("culvertd says what it refused", BOUND, || {
        let log = cluster.control().ok()?.component.log_tail(200);
        (log.contains("web.yaml") && log.contains("targetPort")).then_some(log)
    })?;
    assert!(report.contains("Service default/web"), "the object is named: {report}");
    tests::wait::until("the refusal is counted", BOUND, || {
        let now = refused(&cluster.control().ok()?.metrics().ok()?);
        (now > before).then_some(())
    })?;
    let seen = connect(&client, "10.96.1.1:80", &["--send", "hello", "--read", "5"]);
    assert!(seen.ok, "the last good version is in force: {seen:?}");

    cluster.apply("web.yaml", &service("web", "10.96.1.3", "7000"))?;
    until_connected(&client, "10.96.1.3:80");
    Ok(())
}
