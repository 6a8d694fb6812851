//! One proxy takes over from another: nobody who connects notices.

use super::*;

/// What the agent and every proxy hold of one listening socket.
fn listening(at: SocketAddr) -> std::net::TcpListener {
    std::net::TcpListener::bind(at).unwrap()
}

#[tokio::test]
async fn what_waits_while_no_proxy_accepts_is_carried_by_the_next_once_it_knows() {
    let Pair { mesh, far: _far, server: _server, app, .. } = Pair::new().await;
    let application = TcpListener::bind(mesh.addr(SERVER, app)).await.unwrap();
    // Another address than the pair's own: real threads serve it, first the old proxy's and then the new one's.
    let vip = mesh.addr(VIP + 1, PORT);
    let held = listening(vip);
    let ports = [(u32::from(PORT), u32::from(app))];
    let workload = fixture::in_service(mesh.workload("server", SERVER), "api", &ports);
    let known = [mesh.workload("client", CLIENT), workload];
    let service = [mesh.service("api", VIP + 1, &ports)];

    let begin = |drain: mesh_runtime::drain::Watcher| {
        let proxy = mesh.proxy();
        let pod = proxy.pod("client", mesh.ip(CLIENT));
        let workers = Workers::start(2, &proxy.shared, &drain).unwrap();
        let hold = workers.start(&pod, vec![(Port::Outbound, held.try_clone().unwrap().into())]).unwrap();
        (proxy, pod, workers, hold)
    };
    let (trigger, drain) = mesh_runtime::drain::channel();
    let (old, old_pod, old_workers, _old_hold) = begin(drain);
    old.learn(&known, &service);
    let first = soon(TcpStream::connect(vip)).await.unwrap();
    let (served, _) = soon(application.accept()).await.unwrap();
    // Each of the two threads has the pod while it accepts for it.
    let serving = Arc::strong_count(&old_pod);
    let draining = tokio::spawn(trigger.drain(Duration::from_secs(30)));
    until(|| Arc::strong_count(&old_pod) + 2 <= serving).await;

    // Nobody accepts now; the new one is there and knows nothing yet.
    let waiting = soon(TcpStream::connect(vip)).await.unwrap();
    let (end, drain) = mesh_runtime::drain::channel();
    let (new, _new_pod, new_workers, _new_hold) = begin(drain);
    let early = tokio::time::timeout(Duration::from_millis(300), application.accept()).await;
    assert!(early.is_err(), "decided by a proxy that drains, or that knows nothing");
    new.learn(&known, &service);
    let (mut carried, _) = soon(application.accept()).await.unwrap();
    carried.write_all(b"hello").await.unwrap();
    drop(carried);
    let (mut waiting, mut read) = (waiting, String::new());
    soon(waiting.read_to_string(&mut read)).await.unwrap();
    assert_eq!(read, "hello");

    // What the old one carried goes on to its own end.
    assert!(!draining.is_finished());
    drop((first, served));
    assert_eq!(soon(draining).await.unwrap(), Drained::Complete);
    // Threads look for their end once they drain.
    drop(end);
    for workers in [old_workers, new_workers] {
        tokio::task::spawn_blocking(move || workers.stop()).await.unwrap();
    }
}

#[tokio::test]
async fn what_was_accepted_before_a_drain_and_is_not_decided_is_carried() {
    let mesh = Mesh::new();
    let (near, far) = (mesh.proxy(), mesh.proxy());
    let ports = [(u32::from(PORT), 18080)];
    let server = fixture::in_service(mesh.workload("server", SERVER), "api", &ports);
    for proxy in [&near, &far] {
        proxy.learn(&[mesh.workload("client", CLIENT), server.clone()], &[mesh.service("api", VIP, &ports)]);
    }
    let application = TcpListener::bind(mesh.addr(SERVER, 18080)).await.unwrap();
    // Peers of the far node wait in its queue: the near proxy's handshake is not answered.
    let hbone = listening(mesh.addr(SERVER, 15008));
    let client_pod = near.pod("client", mesh.ip(CLIENT));
    near.serve(&client_pod, Port::Outbound, mesh.addr(VIP, PORT)).await;
    let mut client = soon(TcpStream::connect(mesh.addr(VIP, PORT))).await.unwrap();
    until(|| near.shared.tunnels.all().len() == 1).await;
    let Proxy { shared, worker, drain, .. } = near;
    drop(drain);
    let draining = tokio::spawn(mesh.trigger().drain(Duration::from_secs(30)));
    tokio::task::yield_now().await;

    let server_pod = far.pod("server", mesh.ip(SERVER));
    let workers = Workers::start(1, &far.shared, &far.drain).unwrap();
    let _hold = workers.start(&server_pod, vec![(Port::Hbone, hbone.into())]).unwrap();
    let (mut carried, _) = soon(application.accept()).await.unwrap();
    carried.write_all(b"hello").await.unwrap();
    drop(carried);
    let mut read = String::new();
    soon(client.read_to_string(&mut read)).await.unwrap();
    assert_eq!(read, "hello");
    assert!(!draining.is_finished(), "the client has not ended yet");
    drop(client);
    assert_eq!(soon(draining).await.unwrap(), Drained::Complete);
    drop((shared, worker, mesh));
    tokio::task::spawn_blocking(move || workers.stop()).await.unwrap();
}
