//! The kubelet's probes reach enrolled pods as if there were no mesh; whoever else is on the node is outside of it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{counter, echo_any};
use tests::Error;
use tests::app::clients::connect::Report;
use tests::cluster::Cluster;
use tests::families::Families;

#[test]
fn probes_pass_by_their_connection_and_nobody_else_does() -> Result<(), Error> {
    let cluster = Cluster::builder().families(Families::Dual).kubelet().agent_args(common::ADMIN).start()?;
    let server = cluster.pod("server").node(1).enrolled(true);
    let server = server.command(["echo", "--listen", "[::]:7000", "--mode", "banner"]).start()?;
    for to in [server.at(7000), server.at_v6(7000)?] {
        for as_kubelet in [true, false, true, false] {
            let (passed, steered) = (counter(&cluster, 1, "probes_passed"), counter(&cluster, 1, "inbound_steered"));
            let to = to.to_string();
            let seen = cluster.run_on_node(1, as_kubelet, &["connect", "--to", &to, "--read-line"])?;
            let seen: Report = seen.json()?;
            assert!(seen.ok, "as the kubelet: {as_kubelet}: {seen:?}");
            let passed = counter(&cluster, 1, "probes_passed") - passed;
            let steered = counter(&cluster, 1, "inbound_steered") - steered;
            assert_eq!((passed > 0.0, steered > 0.0), (as_kubelet, !as_kubelet), "{to}: {passed} {steered}");
        }
    }
    // Another node's kubelet is nobody here.
    let steered = counter(&cluster, 1, "inbound_steered");
    let seen = cluster.run_on_node(2, true, &["connect", "--to", &server.at(7000).to_string(), "--read-line"])?;
    assert!(seen.json::<Report>()?.ok);
    assert!(counter(&cluster, 1, "inbound_steered") > steered);
    Ok(())
}

/// A rolled agent keeps what it found.
#[test]
fn probes_pass_while_the_agent_is_away() -> Result<(), Error> {
    let cluster = Cluster::builder().nodes(1).kubelet().agent_args(common::ADMIN).start()?;
    let server = echo_any(&cluster, "server", 1).enrolled(true).start()?;
    let to = server.at(7000).to_string();
    cluster.node(1)?.agent()?.kill()?;
    cluster.node(1)?.proxy()?.kill()?;
    let args = ["connect", "--to", &to, "--send", "hello", "--read", "5", "--timeout", "1000"];
    assert!(cluster.run_on_node(1, true, &args)?.json::<Report>()?.ok, "the probe");
    assert!(!cluster.run_on_node(1, false, &args)?.json::<Report>()?.ok, "anybody else, and no proxy runs");
    Ok(())
}
