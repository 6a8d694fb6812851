//! ServiceEntries and WorkloadEntries, with real connections: hosts that are no services of Kubernetes, and workloads that
//! are no pods.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use common::{connect, echo, until_connected};
use tests::Error;
use tests::cluster::Cluster;
use tests::pod::Pod;
use tests::resolver;

const BOUND: Duration = Duration::from_secs(20);

fn client(cluster: &Cluster) -> Result<Arc<Pod>, Error> {
    cluster.pod("client").node(1).enrolled(true).resolver(resolver::ADDRESS.into()).start()
}

/// The address at which a program of the pod finds a host, once it is one of those that the mesh gives to hosts.
fn given_address(pod: &Pod, host: &str) -> Result<IpAddr, Error> {
    tests::wait::until(&format!("{host} has an address of the mesh"), BOUND, || {
        let done = pod.exec("/usr/bin/getent", Duration::from_secs(30), ["ahosts", host]).ok()?;
        let found: IpAddr = done.stdout.split_whitespace().next()?.parse().ok()?;
        let is_given = matches!(found, IpAddr::V4(v4) if v4.octets().starts_with(&[240, 240]));
        is_given.then_some(found)
    })
}

#[test]
fn a_host_outside_the_mesh_is_found_by_its_name_and_reached() -> Result<(), Error> {
    let cluster = Cluster::builder().nodes(1).start()?;
    let database = cluster.host("database")?;
    let listener = database.network.listen((database.address, 6432).into())?;
    let entry = |port: u32| {
        format!(
            "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: db, namespace: default}}
spec:
  hosts: [db.example.com]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{{number: {port}, name: sql, protocol: TCP}}]
  endpoints: [{{address: {}, ports: {{sql: 6432}}}}]
",
            database.address
        )
    };
    cluster.apply("db.yaml", &entry(5432))?;
    let client = client(&cluster)?;
    let address = given_address(&client, "db.example.com")?;
    let seen = connect(&client, &format!("{address}:5432"), &[]);
    assert!(seen.ok, "{seen:?}");
    assert_eq!(seen.peer, Some((address, 5432).into()), "the application sees whom it asked for");
    let (_stream, from) = listener.accept().unwrap();
    assert_eq!(from.ip(), client.ip());
    let wrong = connect(&client, &format!("{address}:5433"), &["--read-line", "--timeout", "1000"]);
    assert_eq!(wrong.error.as_deref(), Some("reset"), "{wrong:?}");
    // One that is not valid changes nothing and is reported.
    cluster.directory().write_raw("db.yaml", &entry(70000))?;
    tests::wait::until("culvertd says what it refused", BOUND, || {
        let log = cluster.control().ok()?.component.log_tail(200);
        (log.contains("ServiceEntry default/db") && log.contains("spec.ports[0].number")).then_some(())
    })?;
    assert!(connect(&client, &format!("{address}:5432"), &[]).ok);
    // Gone: the name is the resolver's again.
    cluster.directory().remove("db.yaml")?;
    cluster.resolver().add("db.example.com", &[IpAddr::from(database.address)]);
    tests::wait::until("the host is found outside", BOUND, || {
        let done = client.exec("/usr/bin/getent", Duration::from_secs(30), ["ahosts", "db.example.com"]).ok()?;
        done.stdout.starts_with(&database.address.to_string()).then_some(())
    })
}

#[test]
fn a_workload_entry_is_reached_by_mutual_tls_as_who_it_says() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let vm = echo(&cluster, "vm", 2).enrolled(true).start()?;
    let client = client(&cluster)?;
    until_connected(&client, &vm.at(7000).to_string());
    // From here on nothing but the entry tells of it, as of a machine of its own.
    cluster.directory().remove_pod("default", "vm")?;
    let entry = |account: &str| {
        format!(
            "apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: vm, namespace: default}}
spec: {{address: {}, serviceAccount: {account}, labels: {{app: legacy, networking.istio.io/tunnel: http}}}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: legacy, namespace: default}}
spec:
  hosts: [legacy.example.com]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{{number: 80, name: tcp, targetPort: 7000}}]
  workloadSelector: {{labels: {{app: legacy}}}}
",
            vm.ip()
        )
    };
    cluster.apply("vm.yaml", &entry("vm"))?;
    let address = given_address(&client, "legacy.example.com")?;
    let to = format!("{address}:80");
    let by = [("reporter", "destination"), ("connection_security_policy", "mutual_tls")];
    let tunnels = || {
        let text = cluster.node(2).unwrap().metrics().unwrap();
        tests::metrics::sum(&text, "istio_tcp_connections_opened_total", &by)
    };
    let before = tunnels();
    until_connected(&client, &to);
    assert!(tunnels() > before, "the tunnel ends at the entry");
    // The entry says that somebody else is there.
    cluster.apply("vm.yaml", &entry("somebody"))?;
    tests::wait::until("a server that is not who the entry says is refused", BOUND, || {
        let seen = connect(&client, &to, &["--send", "hello", "--read", "5", "--timeout", "2000"]);
        (!seen.ok).then_some(())
    })
}
