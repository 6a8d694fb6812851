//! What holds while discovery is behind, or its resources come one after the other.

use std::time::Instant;

use mesh_xds::client::Sink as _;
use mesh_xds::{Update, WORKLOAD_TYPE};

use super::*;
use crate::proxy::record::{Direction, Facts};

#[tokio::test(start_paused = true)]
async fn a_policy_that_is_away_for_a_moment_closes_nothing() {
    let mesh = Mesh::new();
    let proxy = mesh.proxy();
    let pod = proxy.pod("server", mesh.ip(SERVER));
    let bound = wire::Workload { authorization_policies: vec!["shop/p".into()], ..mesh.workload("server", SERVER) };
    let policy = security::Authorization {
        name: "p".into(),
        namespace: "shop".into(),
        scope: security::Scope::WorkloadSelector.into(),
        rules: vec![security::Rule::default()],
        ..Default::default()
    };
    let add = || proxy.update(AUTHORIZATION_TYPE, vec![resource("shop/p", &policy)]);
    let remove = || {
        let update = Update { type_url: AUTHORIZATION_TYPE.into(), set: Vec::new(), removed: vec!["shop/p".into()] };
        assert_eq!(proxy.discovery.lock().unwrap().apply(update), []);
    };
    add();
    proxy.learn(std::slice::from_ref(&bound), &[]);
    let facts = Facts::new(Direction::Inbound, mesh.addr(CLIENT, 40000), mesh.addr(SERVER, 80));
    let live = pod.live.open(facts).unwrap();
    tokio::spawn(guard::run(Arc::clone(&proxy.shared), register(&pod)));
    let closed = async |seconds| tokio::time::timeout(Duration::from_secs(seconds), live.told_to_close()).await;
    tokio::task::yield_now().await;

    // The policy goes first, then the pod does not name it any more.
    remove();
    assert!(closed(3).await.is_err());
    proxy.learn(&[mesh.workload("server", SERVER)], &[]);
    assert!(closed(20).await.is_err());
    // The pod names it first, then it comes.
    proxy.learn(std::slice::from_ref(&bound), &[]);
    assert!(closed(4).await.is_err());
    add();
    assert!(closed(20).await.is_err());
    // It stays away.
    remove();
    assert!(closed(4).await.is_err(), "each absence has its own time");
    assert_eq!(closed(3).await, Ok(CloseReason::Denied(Some("shop/p".into()))));
}

#[tokio::test]
async fn a_pod_of_this_node_that_discovery_has_not_brought_is_waited_for() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let ports = [(u32::from(PORT), u32::from(pair.app))];
    let service = pair.mesh.service("api", VIP, &ports);
    let removed = vec![format!("{}/{}", service.namespace, service.hostname)];
    let update = Update { type_url: WORKLOAD_TYPE.into(), set: Vec::new(), removed };
    assert_eq!(pair.near.discovery.lock().unwrap().apply(update), []);
    let listed = pair.near.shared.addresses.list(&[pair.mesh.ip(VIP)]);
    // Nobody tells of it: it is not passed through to.
    let refused = Instant::now();
    assert_reset(pair.connect().await).await;
    assert!(refused.elapsed() >= Duration::from_millis(900), "{:?}", refused.elapsed());
    // Told of while the connection waits.
    let mut client = pair.connect().await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let server = fixture::in_service(pair.mesh.workload("server", SERVER), "api", &ports);
    pair.near.learn(&[server], &[service]);
    let (mut server, _) = soon(listener.accept()).await.unwrap();
    server.write_all(b"late").await.unwrap();
    let mut read = [0; 4];
    soon(client.read_exact(&mut read)).await.unwrap();
    assert_eq!(&read, b"late");
    drop(listed);
    assert!(!pair.near.shared.addresses.contains(pair.mesh.ip(VIP)));
}
