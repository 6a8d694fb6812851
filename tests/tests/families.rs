//! Address families: IPv4, IPv6 and both, and the ways in which applications make their sockets.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{connect, echo_any};
use tests::Error;
use tests::cluster::{Cluster, Mesh};
use tests::families::Families;

/// The harness itself, without a mesh: what fails here is not the mesh's fault.
#[test]
fn pods_of_both_families_reach_each_other_without_a_mesh() -> Result<(), Error> {
    let cluster = Cluster::builder().mesh(Mesh::Off).families(Families::Dual).start()?;
    let server = echo_any(&cluster, "server", 2).start()?;
    assert_eq!(server.ips().len(), 2);
    for node in [1, 2] {
        let client = cluster.pod(&format!("client-{node}")).node(node).start()?;
        for to in [server.at(7000), server.at_v6(7000)?] {
            let seen = connect(&client, &to.to_string(), &["--send", "hello", "--read", "5"]);
            assert!(seen.ok && seen.peer == Some(to), "{seen:?}");
            assert_eq!(seen.local.unwrap().ip().is_ipv6(), to.is_ipv6());
        }
    }
    let lone = cluster.pod("lone").without_route(Families::V6).start()?;
    let seen = connect(&lone, &server.at_v6(7000)?.to_string(), &[]);
    assert_eq!(seen.error.as_deref(), Some("unreachable"), "{seen:?}");
    Ok(())
}
