//! Programs of somebody else on the node's connect hooks, which rewrite addresses before the mesh sees them: no pod is
//! called enrolled while there is one, and the agent says what to do.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::net::Ipv4Addr;

use common::{echo_any, until_connected};
use tests::Error;
use tests::bpf::Foreign;
use tests::cluster::Cluster;

const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 77, 77);

#[test]
fn a_program_that_rewrites_addresses_is_found_and_no_pod_is_called_enrolled() -> Result<(), Error> {
    let cluster = Cluster::builder().nodes(1).start()?;
    let server = echo_any(&cluster, "server", 1).enrolled(false).start()?;
    let std::net::IpAddr::V4(address) = server.ip() else { panic!("a cluster of IPv4") };
    let foreign = Foreign::attach(cluster.node(1)?.group().path(), VIP, address)?;
    let client = cluster.pod("client").node(1).enrolled(true).unannounced().start()?;
    // Positive control: it does rewrite.
    until_connected(&client, &format!("{VIP}:7000"));
    let refused = client.enrol().expect_err("enrolled behind a program that rewrites addresses").to_string();
    assert!(refused.contains("socketLB.hostNamespaceOnly") || refused.contains("foreign"), "the remedy: {refused}");
    let listed = cluster.agent(1)?.list()?;
    let state = listed.iter().find(|state| state.pod.as_ref().is_some_and(|pod| pod.uid == client.uid()));
    assert!(state.is_none_or(|state| !state.not_enrolled_reason.is_empty()), "{state:?}");
    drop(foreign);
    tests::wait::until("the pod is enrolled when it is gone", std::time::Duration::from_secs(20), || {
        client.enrol().ok()
    })?;
    until_connected(&client, &server.at(7000).to_string());
    Ok(())
}
