//! Programs of somebody else on the node's connect hooks, which rewrite addresses before the mesh sees them: no pod is
//! called enrolled while there is one, and the agent says what to do.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::net::Ipv4Addr;
use std::time::Duration;

use common::{echo_any, until_connected};
use tests::Error;
use tests::bpf::Foreign;
use tests::cluster::Cluster;
use tests::pod::Pod;

const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 77, 77);
/// Longest wait for anything.
const BOUND: Duration = Duration::from_secs(20);
/// What the agent says that one can do.
const REMEDY: &str = "socketLB.hostNamespaceOnly=true";

/// Why a pod is not enrolled, as the agent of node 1 says; empty if it is.
fn reason(cluster: &Cluster, pod: &Pod) -> Option<String> {
    let listed = cluster.agent(1).ok()?.list().ok()?;
    let state = listed.into_iter().find(|state| state.pod.as_ref().is_some_and(|listed| listed.uid == pod.uid()));
    state.map(|state| state.not_enrolled_reason)
}

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
    assert!(refused.contains(REMEDY), "the remedy: {refused}");
    let said = reason(&cluster, &client);
    assert!(said.as_ref().is_none_or(|reason| !reason.is_empty()), "{said:?}");
    drop(foreign);
    tests::wait::until("the pod is enrolled when it is gone", BOUND, || client.enrol().ok())?;
    until_connected(&client, &server.at(7000).to_string());
    Ok(())
}

/// It comes when pods are enrolled already. Nobody announces anything: the agent finds it by itself, and sees it go.
#[test]
fn a_program_that_comes_later_is_found_and_the_pods_are_enrolled_again_when_it_goes() -> Result<(), Error> {
    let cluster = Cluster::builder().nodes(1).start()?;
    let server = echo_any(&cluster, "server", 1).enrolled(true).start()?;
    let client = cluster.pod("client").node(1).enrolled(true).start()?;
    until_connected(&client, &server.at(7000).to_string());
    let std::net::IpAddr::V4(address) = server.ip() else { panic!("a cluster of IPv4") };
    for round in 1..=2 {
        assert_eq!(reason(&cluster, &client), Some(String::new()), "round {round}");
        let foreign = Foreign::attach(cluster.node(1)?.group().path(), VIP, address)?;
        for pod in [&client, &server] {
            tests::wait::until("the pod is reported, with the remedy", BOUND, || {
                reason(&cluster, pod).filter(|reason| reason.contains(REMEDY))
            })?;
        }
        let newcomer = cluster.pod(&format!("newcomer-{round}")).node(1).enrolled(true).unannounced().start()?;
        let refused = newcomer.enrol().expect_err("enrolled behind a program that rewrites addresses").to_string();
        assert!(refused.contains(REMEDY), "{refused}");
        // What was in force stays so: nothing goes out in plain because of a report.
        until_connected(&client, &server.at(7000).to_string());
        drop(foreign);
        for pod in [&client, &server] {
            let is_enrolled = || reason(&cluster, pod).filter(String::is_empty);
            tests::wait::until("the pod is enrolled again when it is gone", BOUND, is_enrolled)?;
        }
        newcomer.enrol()?;
        until_connected(&newcomer, &server.at(7000).to_string());
    }
    Ok(())
}
