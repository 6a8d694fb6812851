//! A privileged process in a pod tries to get its bytes out unencrypted. What it sends is carried by the mesh, or refused,
//! and never seen beyond the pod's own link.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use common::{beyond_its_link, connect, counter, dial, echo_any, until_connected};
use tests::Error;
use tests::cluster::Cluster;
use tests::families::Families;
use tests::pod::{Pod, Running};

const MARKER: &str = "marker-of-the-escape-test";
const OPEN_MARKER: &str = "marker-of-the-pod-that-may";
const BOUND: Duration = Duration::from_secs(20);

fn raw(from: &Pod, to: SocketAddr, how: &str, more: &[&str]) -> serde_json::Value {
    let own = from.ips().into_iter().find(|ip| ip.is_ipv4() == to.is_ipv4()).unwrap();
    let (to, own) = (to.to_string(), SocketAddr::new(own, 33_333).to_string());
    let args = ["raw", "--to", &to, "--from", &own, "--how", how];
    from.run_json(args.iter().chain(more)).unwrap()
}

/// So that the neighbour's address is known to packet sockets.
fn warm(from: &Pod, to: SocketAddr) {
    let seen = connect(from, &to.to_string(), &["--send", "hello", "--read", "5"]);
    assert!(seen.ok, "{seen:?}");
}

#[test]
fn marks_devices_and_marks_set_later() -> Result<(), Error> {
    let cluster = Cluster::builder().families(Families::Dual).capture(MARKER).start()?;
    let near = echo_any(&cluster, "near", 1).enrolled(true).start()?;
    let far = echo_any(&cluster, "far", 2).enrolled(true).start()?;
    let thief = cluster.pod("thief").node(1).enrolled(true).start()?;
    let marks = ["1537", "1538", "1539", "1", "16384", "1337", "4294967295"];
    for to in [near.at(7000), far.at(7000), near.at_v6(7000)?, far.at_v6(7000)?] {
        until_connected(&thief, &to.to_string());
        for mark in marks {
            for more in [&["--mark", mark][..], &["--mark", mark, "--device", "eth0"]] {
                let seen = dial(&thief, to, more);
                assert!(seen.ok, "carried as if nothing had been set, {more:?} to {to}: {seen:?}");
            }
            // Whatever becomes of the connection: what is sent afterwards does not leave.
            for more in [&["--then-mark", mark][..], &["--then-mark", mark, "--then-device", "eth0"]] {
                let more = [more, &["--timeout", "300"]].concat();
                let seen = dial(&thief, to, &more);
                assert!(seen.failed.as_deref() != Some("connect"), "{more:?} to {to}: {seen:?}");
            }
        }
        let seen = dial(&thief, to, &["--device", "eth0"]);
        assert!(seen.ok, "bound to a device: {seen:?}");
    }
    let report = cluster.finish_capture()?;
    let leaked = beyond_its_link(&report, MARKER, &["thief"]);
    assert!(leaked.is_empty(), "in clear: {leaked:#?}");
    Ok(())
}

#[test]
fn segments_of_raw_sockets() -> Result<(), Error> {
    let cluster = Cluster::builder().families(Families::Dual).agent_args(common::ADMIN);
    let cluster = cluster.capture(MARKER).also_look_for(OPEN_MARKER).start()?;
    let near = echo_any(&cluster, "near", 1).enrolled(true).start()?;
    let far = echo_any(&cluster, "far", 2).enrolled(true).start()?;
    let thief = cluster.pod("thief").node(1).enrolled(true).start()?;
    let open = cluster.pod("open").node(1).enrolled(false).start()?;
    let dropped = counter(&cluster, 1, "guard_dropped");
    for to in [near.at(7000), far.at(7000)] {
        warm(&open, to);
        warm(&thief, to);
        for how in ["tcp", "header", "fragments", "packet"] {
            for more in [&[][..], &["--mark", "1538"], &["--flags", "16"], &["--flags", "24", "--mark", "1537"]] {
                raw(&thief, to, how, more);
            }
            raw(&open, to, how, &["--text", OPEN_MARKER]);
        }
    }
    for to in [near.at_v6(7000)?, far.at_v6(7000)?] {
        raw(&thief, to, "tcp", &[]);
        raw(&open, to, "tcp", &["--text", OPEN_MARKER]);
    }
    assert!(counter(&cluster, 1, "guard_dropped") > dropped, "nothing was dropped, so nothing was tried");
    let report = cluster.finish_capture()?;
    for (family, count) in [("v4", 4), ("v6", 1)] {
        let seen = beyond_its_link(&report, OPEN_MARKER, &["open"]);
        let of_family = |flow: &&tests::capture::Flow| flow.destination.is_ipv4() == (family == "v4");
        let seen = seen.iter().map(|(_, flow)| *flow).filter(of_family).count();
        assert!(seen >= count, "positive control: a pod that may is seen, {family}: {seen}");
    }
    let leaked = beyond_its_link(&report, MARKER, &["thief"]);
    assert!(leaked.is_empty(), "in clear: {leaked:#?}");
    Ok(())
}

/// A pod that holds a connection made before it was enrolled.
fn with_older(cluster: &Cluster) -> Result<(Arc<Pod>, Arc<Pod>, Running), Error> {
    let server = echo_any(cluster, "server", 2).enrolled(true).unannounced().start()?;
    let client = cluster.pod("client").node(1).enrolled(true).unannounced().start()?;
    let to = server.at(7000).to_string();
    let held = client.spawn(["hold", "--to", &to, "--interval", "20", "--timeout", "4000"])?;
    held.wait_for("\"event\":\"alive\"", BOUND)?;
    Ok((server, client, held))
}

#[test]
fn older_connections_live_on_and_are_counted() -> Result<(), Error> {
    let cluster = Cluster::builder().agent_args(common::ADMIN).start()?;
    let (_server, client, held) = with_older(&cluster)?;
    let before = counter(&cluster, 1, "older_passed");
    client.enrol()?;
    tests::wait::until("older segments are counted", BOUND, || {
        (counter(&cluster, 1, "older_passed") > before + 10.0).then_some(())
    })?;
    assert!(!held.stdout().contains("\"event\":\"end\""), "{}", held.stdout());
    Ok(())
}

#[test]
fn older_connections_can_be_denied() -> Result<(), Error> {
    let args = [common::ADMIN, &["--older-connections", "deny"]].concat();
    let cluster = Cluster::builder().agent_args(&args).start()?;
    let (_server, client, held) = with_older(&cluster)?;
    client.enrol()?;
    held.wait_for("\"event\":\"end\"", BOUND)?;
    assert!(counter(&cluster, 1, "guard_dropped") > 0.0);
    Ok(())
}

#[test]
fn a_socket_made_before_the_enrolment_is_captured_when_it_connects() -> Result<(), Error> {
    let cluster = Cluster::builder().capture(MARKER).start()?;
    let server = echo_any(&cluster, "server", 2).enrolled(true).start()?;
    let client = cluster.pod("client").node(1).enrolled(true).unannounced().start()?;
    let go = cluster.folder().join("go");
    let (to, file) = (server.at(7000).to_string(), go.display().to_string());
    let made = client.spawn(["dial", "--to", &to, "--wait-for", &file, "--send", "MARKER"])?;
    made.wait_for("made", BOUND)?;
    client.enrol()?;
    client.wait_known()?;
    until_connected(&client, &to);
    std::fs::write(&go, "").unwrap();
    let done = made.finish(BOUND)?;
    assert!(done.status.success(), "{done:?}");
    let report = cluster.finish_capture()?;
    let leaked: Vec<_> = report.marked(MARKER).collect();
    assert!(leaked.is_empty(), "in clear: {leaked:?}");
    Ok(())
}
