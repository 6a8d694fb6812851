//! Services and pods that are not valid, and were never: connections to them are refused or go by mutual TLS, and never in
//! plaintext as if they were strangers to the mesh; and what mends the object opens it again.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use common::{connect, echo, until_connected};
use tests::cluster::Cluster;
use tests::kube::{DATAPLANE_MODE, REDIRECTION};
use tests::pod::{Pod, wait_unlisted};
use tests::{Error, metrics, wait};

const BOUND: Duration = Duration::from_secs(20);

/// Whether one exchange with an echo server succeeds.
fn reaches(from: &Pod, to: &str) -> bool {
    connect(from, to, &["--send", "hello", "--read", "5", "--timeout", "2000"]).ok
}

fn until_refused(cluster: &Cluster, from: &Pod, to: &str) {
    wait::until(&format!("{} is refused at {to}", from.name()), BOUND, || (!reaches(from, to)).then_some(()))
        .unwrap_or_else(|error| panic!("{error}\n{}", cluster.logs(30)));
}

/// Connections that ended at a node's pods by mutual TLS.
fn tunnels(cluster: &Cluster, node: usize) -> f64 {
    let by = [("reporter", "destination"), ("connection_security_policy", "mutual_tls")];
    metrics::sum(&cluster.node(node).unwrap().metrics().unwrap(), "istio_tcp_connections_opened_total", &by)
}

#[test]
fn a_service_that_is_not_valid_is_refused_until_it_is_mended() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let _server = echo(&cluster, "server", 2).enrolled(true).start()?;
    let client = cluster.pod("client").node(1).service_account("client").enrolled(true).start()?;
    // Who has the service's address outside of the mesh: what leaves the mesh arrives here.
    let stranger = cluster.host("stranger")?;
    let listener = stranger.network.listen((stranger.address, 80).into())?;
    listener.set_nonblocking(true).unwrap();
    let arrives = || std::iter::from_fn(|| listener.accept().ok()).count();
    let to = format!("{}:80", stranger.address);
    let ask = ["--read-line", "--timeout", "1000"];
    connect(&client, &to, &ask);
    assert_eq!(arrives(), 1, "without the service it is a stranger's address");

    let service = |protocol: &str| {
        format!(
            "apiVersion: v1
kind: Service
metadata: {{name: web, namespace: default}}
spec:
  clusterIP: {}
  selector: {{app: server}}
  ports: [{{port: 80, targetPort: 7000, protocol: {protocol}}}]
",
            stranger.address
        )
    };
    let write = |protocol: &str| cluster.directory().write_raw("web.yaml", &service(protocol));
    let refused = || {
        wait::until("the service is refused", BOUND, || {
            (connect(&client, &to, &ask).error.as_deref() == Some("reset")).then_some(())
        })
        .unwrap_or_else(|error| panic!("{error}\n{}", cluster.logs(30)));
        arrives();
        assert!(!reaches(&client, &to));
        assert_eq!(arrives(), 0, "nothing of it leaves the mesh");
    };
    write("TKP")?;
    refused();
    let log = cluster.node(1)?.proxy()?.log_tail(100);
    assert!(log.contains("its object is not valid"), "the proxy says why: {log}");
    let log = cluster.control()?.component.log_tail(200);
    assert!(log.contains("Service default/web") && log.contains("spec.ports[0].protocol"), "{log}");
    // It was never valid for the next culvertd either.
    cluster.control()?.component.restart()?;
    refused();

    let before = tunnels(&cluster, 2);
    write("TCP")?;
    until_connected(&client, &to);
    assert!(tunnels(&cluster, 2) > before, "it is the server's, by mutual TLS");
    // The last good version stays.
    write("TKP")?;
    wait::until("culvertd keeps the last good version", BOUND, || {
        let log = cluster.control().ok()?.component.log_tail(200);
        log.lines().any(|line| line.contains("Service default/web") && line.contains("true")).then_some(())
    })?;
    assert!(reaches(&client, &to));
    assert_eq!(arrives(), 0);
    Ok(())
}

#[test]
fn a_pod_that_is_not_valid_is_not_reached_in_plaintext_until_it_is_mended() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let client = |name: &str, node: usize, enrolled: bool| {
        cluster.pod(name).node(node).service_account(name).enrolled(enrolled).start()
    };
    let (client, neighbour, outsider) =
        (client("client", 1, true)?, client("near", 2, true)?, client("out", 1, false)?);
    // Its label means nothing, and nobody captures its traffic.
    let server = echo(&cluster, "server", 2).label(DATAPLANE_MODE, "sideways").unsettled().start()?;
    let to = server.at(7000).to_string();
    until_connected(&outsider, &to);
    for from in [&client, &neighbour] {
        until_refused(&cluster, from, &to);
        assert!((0..3).all(|_| !reaches(from, &to)), "not once");
    }
    server.update(|record| drop(record.labels.insert(DATAPLANE_MODE.to_owned(), "none".to_owned())))?;
    for from in [&client, &neighbour] {
        until_connected(from, &to);
    }
    // Opted out is what it last said that can be understood.
    server.update(|record| drop(record.labels.insert(DATAPLANE_MODE.to_owned(), "sideways".to_owned())))?;
    cluster.control()?.component.restart()?;
    for from in [&client, &neighbour] {
        until_refused(&cluster, from, &to);
    }
    cluster.delete(&server)
}

#[test]
fn a_pod_whose_label_means_nothing_is_enrolled_and_reached_by_mutual_tls() -> Result<(), Error> {
    let cluster = Cluster::builder().cni().start()?;
    let client = cluster.pod("client").node(1).service_account("client").enrolled(true).start()?;
    let server = echo(&cluster, "server", 2).label(DATAPLANE_MODE, "sideways").unsettled().start()?;
    let to = server.at(7000).to_string();
    let agent = cluster.agent(2)?;
    assert!(agent.knows(&server.uid())?, "the agent captures it");
    // As the agent does in a cluster.
    server.update(|record| drop(record.annotations.insert(REDIRECTION.to_owned(), "enabled".to_owned())))?;
    let before = tunnels(&cluster, 2);
    wait::until("the server is reached by mutual TLS", BOUND, || {
        (reaches(&client, &to) && tunnels(&cluster, 2) > before).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", cluster.logs(30)));
    // Its label asks to be left alone.
    server.update(|record| {
        record.labels.insert(DATAPLANE_MODE.to_owned(), "none".to_owned());
        record.annotations.remove(REDIRECTION);
    })?;
    wait_unlisted(&agent, &server.uid())?;
    until_connected(&client, &to);
    Ok(())
}
