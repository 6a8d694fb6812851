//! What applications see of their connections: true addresses, every way of ending, bulk, many at once, and who may
//! talk to whom inside and outside of the mesh.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use common::{connect, echo};
use serde_json::Value;
use tests::Error;
use tests::cluster::Cluster;
use tests::pod::Pod;

const BOUND: Duration = Duration::from_secs(20);

/// What the server saw: the banner's `peer` and `local`.
fn banner(received: &str) -> (String, String) {
    let line: Value = serde_json::from_str(received.trim()).unwrap_or_else(|e| panic!("{e}: {received}"));
    (line["peer"].as_str().unwrap().to_owned(), line["local"].as_str().unwrap().to_owned())
}

fn json(pod: &Pod, bound: Duration, args: &[&str]) -> Value {
    let output = pod.run_for(bound, args).unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
    output.json().unwrap()
}

#[test]
fn both_ends_see_true_addresses_and_the_server_may_speak_first() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let server = cluster.pod("server").node(2).enrolled(true);
    let server = server.command(["echo", "--listen", "0.0.0.0:7000", "--mode", "banner"]).start()?;
    for node in [1, 2] {
        let client = cluster.pod(&format!("client-{node}")).node(node).enrolled(true).start()?;
        let seen = connect(&client, &server.at(7000).to_string(), &["--read-line"]);
        assert!(seen.ok, "{seen:?}");
        assert_eq!(seen.peer, Some(server.at(7000)), "getpeername of the client");
        assert_eq!(seen.local.unwrap().ip(), client.ip(), "getsockname of the client");
        let (peer, local) = banner(&seen.received);
        assert_eq!(local, server.at(7000).to_string(), "getsockname of the server");
        assert_eq!(peer.split(':').next(), Some(client.ip().to_string().as_str()), "getpeername of the server");
    }
    Ok(())
}

#[test]
fn half_close_in_both_directions() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let server = |name: &str, mode: &str| {
        let listen = ["echo", "--listen", "0.0.0.0:7000", "--mode", mode];
        cluster.pod(name).node(2).enrolled(true).command(listen).start()
    };
    let (sink, first) = (server("sink", "sink")?, server("first", "close-first")?);
    for node in [1, 2] {
        let client = cluster.pod(&format!("client-{node}")).node(node).enrolled(true).start()?;
        let (sink, first) = (sink.at(7000).to_string(), first.at(7000).to_string());
        json(&client, BOUND, &["half-close", "--sink", &sink, "--bytes", "100000"]);
        json(&client, BOUND, &["half-close", "--close-first", &first, "--bytes", "4321"]);
    }
    let log = first.application();
    tests::wait::until("the server heard the client after its own close", BOUND, || {
        (log.log_tail(50).matches("\"received\":4321").count() == 2).then_some(())
    })?;
    Ok(())
}

#[test]
fn a_reset_arrives_as_a_reset_and_a_refused_port_within_a_second() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let server = cluster.pod("server").node(2).enrolled(true);
    let server = server.command(["echo", "--listen", "0.0.0.0:7000", "--mode", "reset"]).start()?;
    for node in [1, 2] {
        let client = cluster.pod(&format!("client-{node}")).node(node).enrolled(true).start()?;
        let seen = connect(&client, &server.at(7000).to_string(), &["--send", "x", "--read", "1"]);
        assert_eq!(seen.error.as_deref(), Some("reset"), "{seen:?}");

        // The bound of one second is the client's own: longer than that is a failure of another kind.
        let refused = ["--send", "x", "--read", "1", "--timeout", "1000"];
        let seen = connect(&client, &server.at(1).to_string(), &refused);
        assert!(["refused", "reset"].contains(&seen.error.as_deref().unwrap_or("none")), "{seen:?}");
    }
    Ok(())
}

#[test]
fn a_gibibyte_each_way_with_checksum() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let server = cluster.pod("server").node(2).enrolled(true);
    let server = server.command(["echo", "--listen", "0.0.0.0:7000", "--mode", "transfer"]).start()?;
    let client = cluster.pod("client").node(1).enrolled(true).start()?;
    let gibibyte = (1_u64 << 30).to_string();
    let to = server.at(7000).to_string();
    let args = ["transfer", "--to", &to, "--send", &gibibyte, "--receive", &gibibyte];
    let done = json(&client, Duration::from_secs(300), &args);
    assert_eq!((done["sent"].as_u64(), done["received"].as_u64()), (Some(1 << 30), Some(1 << 30)), "{done}");
    assert_eq!(done["checksum"], true, "{done}");
    Ok(())
}

#[test]
fn five_hundred_at_once() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let server = echo(&cluster, "server", 2).enrolled(true).start()?;
    for node in [1, 2] {
        let client = cluster.pod(&format!("client-{node}")).node(node).enrolled(true).start()?;
        let to = server.at(7000).to_string();
        let done = json(&client, Duration::from_secs(60), &["parallel", "--to", &to, "--connections", "500"]);
        assert_eq!(done["succeeded"], 500, "{done}");
    }
    Ok(())
}

#[test]
fn in_and_out_of_the_mesh() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let ask = ["--send", "hello", "--read", "5"];
    let inside = echo(&cluster, "inside", 2).enrolled(true).start()?;
    let outside = echo(&cluster, "outside", 2).enrolled(false).start()?;
    let pods = [
        cluster.pod("enrolled-1").node(1).enrolled(true).start()?,
        cluster.pod("enrolled-2").node(2).enrolled(true).start()?,
        cluster.pod("plain-1").node(1).enrolled(false).start()?,
        cluster.pod("plain-2").node(2).enrolled(false).start()?,
    ];
    for from in &pods {
        for to in [&inside, &outside] {
            let seen = connect(from, &to.at(7000).to_string(), &ask);
            assert!(seen.ok && seen.received == "hello", "{} to {}: {seen:?}", from.name(), to.name());
            assert_eq!(seen.peer, Some(to.at(7000)));
        }
    }
    // A destination that nobody knows: a host beside the nodes.
    let host = cluster.host("stranger")?;
    let listener = host.network.listen((host.address, 7000).into())?;
    let seen = connect(&pods[0], &format!("{}:7000", host.address), &[]);
    assert!(seen.ok, "{seen:?}");
    let (_stream, from) = listener.accept().unwrap();
    assert_eq!(from.ip(), pods[0].ip(), "passed through from the pod's own address");
    Ok(())
}

#[test]
fn plaintext_from_outside_shows_the_real_client() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let server = cluster.pod("server").node(2).enrolled(true);
    let server = server.command(["echo", "--listen", "0.0.0.0:7000", "--mode", "banner"]).start()?;
    let client = cluster.pod("client").node(1).enrolled(false).start()?;
    let seen = connect(&client, &server.at(7000).to_string(), &["--read-line"]);
    assert!(seen.ok, "{seen:?}");
    let (peer, local) = banner(&seen.received);
    assert_eq!(local, server.at(7000).to_string());
    assert_eq!(peer.split(':').next(), Some(client.ip().to_string().as_str()));
    Ok(())
}

/// The proxy delivers with the client's address and a port of its own choice, which must not be one that the client has.
#[test]
fn a_client_with_a_wide_range_of_ports_meets_no_delivery() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let server = echo(&cluster, "server", 2).enrolled(true).start()?;
    let client = cluster.pod("client").node(1).enrolled(false).start()?;
    client.network().sysctl("net/ipv4/ip_local_port_range", "10000 32767")?;
    let to = server.at(7000).to_string();
    for _ in 0..3 {
        let args = ["parallel", "--to", &to, "--connections", "800", "--timeout", "900"];
        let done = json(&client, Duration::from_secs(60), &args);
        assert_eq!(done["succeeded"], 800, "{done}");
    }
    Ok(())
}

#[test]
fn a_pod_reaches_itself_by_address_and_by_service() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: me, namespace: default}\n\
                   spec: {clusterIP: 10.96.5.5, selector: {app: me}, ports: [{port: 80, targetPort: 7000}]}\n";
    cluster.apply("me.yaml", service)?;
    let me = echo(&cluster, "me", 1).enrolled(true).start()?;
    let ask = ["--send", "hello", "--read", "5"];
    for to in [me.at(7000).to_string(), "127.0.0.1:7000".to_owned()] {
        let seen = connect(&me, &to, &ask);
        assert!(seen.ok && seen.received == "hello", "{to}: {seen:?}");
    }
    common::until_connected(&me, "10.96.5.5:80");
    let seen = connect(&me, "me.default:80", &ask);
    assert!(seen.ok && seen.received == "hello", "by name: {seen:?}");
    Ok(())
}

#[test]
fn connections_open_before_enrolment_live_on() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let server = echo(&cluster, "server", 2).enrolled(true).unannounced().start()?;
    let client = cluster.pod("client").node(1).enrolled(true).unannounced().start()?;
    let to = server.at(7000).to_string();
    let held = client.spawn(["hold", "--to", &to, "--for", "600000"])?;
    held.wait_for("\"event\":\"alive\"", BOUND)?;
    client.enrol()?;
    server.enrol()?;
    let exchanges = |text: &str| text.matches("\"event\":\"alive\"").count();
    let then = exchanges(&held.stdout());
    tests::wait::until("the old connection is still used", BOUND, || {
        (exchanges(&held.stdout()) >= then + 3).then_some(())
    })?;
    // And a new one is captured.
    common::until_connected(&client, &to);
    let dump = cluster.node(1)?.config_dump()?.to_string();
    assert!(dump.contains(&server.identity()), "a tunnel to the server: {dump}");
    assert!(!held.stdout().contains("\"event\":\"end\""), "{}", held.stdout());
    Ok(())
}
