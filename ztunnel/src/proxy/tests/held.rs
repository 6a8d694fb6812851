//! A pod whose receivers take nothing, and what becomes of it.

use super::*;
use crate::proxy::held;

const MIB: usize = 1 << 20;

/// A connection of which as much is sent as goes, and nothing is read at the far end. The sender ends with how it failed.
async fn stalled(pair: &Pair, listener: &TcpListener) -> (TcpStream, tokio::task::JoinHandle<std::io::Error>) {
    let (mut client, server, _) = pair.carried(listener).await;
    let sending = async move {
        loop {
            if let Err(error) = client.write_all(&[7; 64 << 10]).await {
                return error;
            }
        }
    };
    (server, tokio::spawn(sending))
}

#[tokio::test]
async fn of_a_pod_that_holds_too_much_what_waited_longest_is_reset_and_nothing_else() {
    let mut mesh = Mesh::new();
    // Nothing is spared before, so that the limit is reached.
    mesh.limits = Limits { total: 64 * MIB, soft: 64 * MIB, hard: 12 * MIB };
    let pair = Pair::with(mesh, |_| {}, LocalSockets::default(), 100_000).await;
    let (far, pods) = (&pair.far, register(&pair.server));
    let shared = &far.shared;
    tokio::spawn(held::run(far.memory.clone(), pods, shared.tunnels.clone(), shared.metrics.clone()));
    let listener = pair.listen().await;
    let (mut asks, mut answers, _) = pair.carried(&listener).await;
    let (first, reset) = stalled(&pair, &listener).await;
    until(|| pair.server.memory.held() > 3 * MIB).await;
    let mut later = Vec::new();
    for _ in 0..2 {
        let count = pair.server.memory.held();
        later.push(stalled(&pair, &listener).await);
        until(|| pair.server.memory.held() != count).await;
    }
    assert!(matches!(soon(reset).await.unwrap().kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe));
    until(|| far.metric("culvert_held_resets_total", &[]) > 0).await;
    until(|| pair.server.memory.held() <= 12 * MIB).await;
    for _ in 0..50 {
        asks.write_all(b"ask").await.unwrap();
        soon(answers.read_exact(&mut [0; 3])).await.unwrap();
    }
    // The counts say that they are alive: the pod's other connections are.
    assert!(pair.server.live.count() >= 2);
    drop((later, first, asks, answers));
    until(|| far.memory.held() == 0).await;
}
