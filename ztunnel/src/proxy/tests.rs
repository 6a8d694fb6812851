//! The whole path over loopback: application, outbound proxy, HBONE, inbound proxy, application.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_hbone::Memory;
use mesh_hbone::memory::Limits;
use mesh_proto::security;
use mesh_proto::workload as wire;
use mesh_runtime::drain::Drained;
use mesh_xds::AUTHORIZATION_TYPE;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::live::CloseReason;
use super::local::fixture;
use super::pods::{Host, Pod, Pods, Port};
use super::sources::BEGUN;
use super::testing::{LocalSockets, Mesh, Proxy, bounds, resource, soon, until};
use super::worker::{Accepted, Workers};
use super::{guard, plaintext};

mod discovery;
mod handover;
mod held;
mod removal;
mod restart;
mod retry;

/// The client's pod, the server's pod and the service's address, by their last byte.
const CLIENT: u8 = 1;
const SERVER: u8 = 2;
const VIP: u8 = 9;
const PORT: u16 = 8080;

/// A client's pod on one node and a server's on another, whose application is reached by a service.
struct Pair {
    mesh: Mesh,
    near: Proxy,
    far: Proxy,
    client: Arc<Pod>,
    server: Arc<Pod>,
    /// Port of the application.
    app: u16,
}

impl Pair {
    async fn new() -> Self {
        Self::with(Mesh::new(), |_| {}, LocalSockets::default(), 100_000).await
    }

    async fn with(mesh: Mesh, change: impl Fn(&mut wire::Workload), client_sockets: LocalSockets, max: usize) -> Self {
        Self::with_sockets(mesh, change, [client_sockets, LocalSockets::default()], max).await
    }

    async fn with_sockets(
        mesh: Mesh,
        change: impl Fn(&mut wire::Workload),
        [client_sockets, server_sockets]: [LocalSockets; 2],
        max: usize,
    ) -> Self {
        let app = free_port(&mesh).await;
        let ports = [(u32::from(PORT), u32::from(app))];
        let mut server = fixture::in_service(mesh.workload("server", SERVER), "api", &ports);
        let client = mesh.workload("client", CLIENT);
        let service = mesh.service("api", VIP, &ports);
        let (near, far) = (mesh.proxy(), mesh.proxy());
        far.learn(&[client.clone(), server.clone()], std::slice::from_ref(&service));
        change(&mut server);
        near.learn(&[client, server], &[service]);
        let client = near.pod_with("client", mesh.ip(CLIENT), client_sockets, max);
        let server = far.pod_with("server", mesh.ip(SERVER), server_sockets, 100_000);
        near.serve(&client, Port::Outbound, mesh.addr(VIP, PORT)).await;
        far.serve(&server, Port::Hbone, mesh.addr(SERVER, 15008)).await;
        Self { mesh, near, far, client, server, app }
    }

    /// An application in the server's pod.
    async fn listen(&self) -> TcpListener {
        TcpListener::bind(self.mesh.addr(SERVER, self.app)).await.unwrap()
    }

    /// An application in the client's pod connects to the service.
    async fn connect(&self) -> TcpStream {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(self.mesh.addr(CLIENT, 0)).unwrap();
        soon(socket.connect(self.mesh.addr(VIP, PORT))).await.unwrap()
    }

    /// Both ends of one carried connection.
    async fn carried(&self, listener: &TcpListener) -> (TcpStream, TcpStream, SocketAddr) {
        let (client, accepted) = tokio::join!(self.connect(), soon(listener.accept()));
        let (server, seen) = accepted.unwrap();
        (client, server, seen)
    }

    /// Policies that the server's node has.
    fn policy(&self, name: &str, denied: &str) {
        let principal = security::StringMatch {
            match_type: Some(security::string_match::MatchType::Exact(format!("cluster.local/ns/shop/sa/{denied}"))),
        };
        let matches = vec![security::Match { principals: vec![principal], ..Default::default() }];
        let policy = security::Authorization {
            name: name.into(),
            namespace: "shop".into(),
            scope: security::Scope::Namespace.into(),
            action: security::Action::Deny.into(),
            rules: vec![security::Rule { clauses: vec![security::Clause { matches }] }],
            ..Default::default()
        };
        self.far.update(AUTHORIZATION_TYPE, vec![resource(&format!("shop/{name}"), &policy)]);
    }
}

async fn free_port(mesh: &Mesh) -> u16 {
    TcpListener::bind(mesh.addr(SERVER, 0)).await.unwrap().local_addr().unwrap().port()
}

/// The application must see a reset, soon, and not one byte.
async fn assert_reset(mut client: TcpStream) {
    let error = soon(client.read(&mut [0; 16])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn bytes_and_ends_pass_both_ways_and_the_client_is_seen() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let (mut client, mut server, seen) = pair.carried(&listener).await;
    assert_eq!(seen.ip(), pair.mesh.ip(CLIENT), "the application sees the real client");
    assert!((1024..10_000).contains(&seen.port()), "{seen}");

    server.write_all(b"welcome").await.unwrap();
    let mut greeting = [0; 7];
    soon(client.read_exact(&mut greeting)).await.unwrap();
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut asked = String::new();
    soon(server.read_to_string(&mut asked)).await.unwrap();
    assert_eq!(asked, "question");
    // Half closed: the answer still passes.
    server.write_all(b"the answer").await.unwrap();
    drop(server);
    let mut answer = String::new();
    soon(client.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "the answer");

    let near = ["reporter=\"source\"", "connection_security_policy=\"mutual_tls\"", "response_flags=\"-\""];
    until(|| pair.near.metric("istio_tcp_connections_closed_total", &near) == 1).await;
    assert_eq!(pair.near.metric("istio_tcp_received_bytes_total", &near), 8, "what the client sent");
    assert_eq!(pair.near.metric("istio_tcp_sent_bytes_total", &near), 17, "what the client got");
    let far = ["reporter=\"destination\"", "destination_service_name=\"api\"", "/sa/client\""];
    until(|| pair.far.metric("istio_tcp_connections_closed_total", &far) == 1).await;
    assert_eq!(pair.far.metric("istio_tcp_received_bytes_total", &far), 8);
    assert_eq!(pair.far.metric("istio_tcp_sent_bytes_total", &far), 17);
    assert_eq!(pair.far.metric("istio_tcp_sockets_open", &[]), 0);
}

#[tokio::test]
async fn many_connections_share_a_tunnel_with_both_identities() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let mut open = Vec::new();
    for _ in 0..20 {
        open.push(pair.carried(&listener).await);
    }
    let tunnels = pair.near.shared.tunnels.all();
    assert_eq!(tunnels.len(), 1);
    let negotiated = tunnels[0].negotiated.get().unwrap();
    assert_eq!((negotiated.alpn.as_str(), negotiated.version.as_str()), ("h2", "TLSv1_3"));
    assert_eq!(tunnels[0].identity, fixture::id("shop", "client"));
    assert_eq!(negotiated.peer, fixture::id("shop", "server"));
    let far = pair.far.shared.tunnels.all();
    assert_eq!(far[0].negotiated.get().unwrap().peer, fixture::id("shop", "client"));
    assert_eq!(far[0].streams.load(std::sync::atomic::Ordering::Relaxed), 20);
    assert_eq!(pair.client.live.count(), 20);
    drop(open);
    until(|| pair.client.live.count() + pair.server.live.count() == 0).await;
}

#[tokio::test]
async fn a_megabyte_each_way_arrives_whole() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let (mut client, mut server, _) = pair.carried(&listener).await;
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i % 251) as u8).collect();
    let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
    let (mut client_reads, mut client_writes) = client.split();
    let (mut server_reads, mut server_writes) = server.split();
    let copies = async {
        let _ = tokio::join!(
            async { (client_writes.write_all(&data).await.unwrap(), client_writes.shutdown().await.unwrap()) },
            async { (server_writes.write_all(&data).await.unwrap(), server_writes.shutdown().await.unwrap()) },
            async { client_reads.read_to_end(&mut to_client).await.unwrap() },
            async { server_reads.read_to_end(&mut to_server).await.unwrap() },
        );
    };
    soon(copies).await;
    assert!(to_server == data && to_client == data);
}

#[tokio::test]
async fn a_refused_port_is_a_reset_at_once() {
    let pair = Pair::new().await;
    assert_reset(pair.connect().await).await;
    until(|| pair.far.metric("istio_tcp_connections_failed_total", &["response_flags=\"CONNECT\""]) == 1).await;
    assert_eq!(pair.near.metric("culvert_connection_failures_total", &["reason=\"refused_by_peer\""]), 1);
}

#[tokio::test]
async fn a_denied_connection_is_a_reset_and_counts_as_denied_at_both_ends() {
    let pair = Pair::new().await;
    let _listener = pair.listen().await;
    pair.policy("no-client", "client");
    assert_reset(pair.connect().await).await;
    until(|| pair.near.metric("istio_tcp_connections_failed_total", &["response_flags=\"DENY\""]) == 1).await;
    assert_eq!(pair.far.metric("istio_tcp_connections_failed_total", &["response_flags=\"DENY\""]), 1);
}

#[tokio::test]
async fn a_policy_that_comes_later_closes_what_it_denies_and_nothing_else() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let (client, _server, _) = pair.carried(&listener).await;
    let pods = register(&pair.server);
    tokio::spawn(guard::run(Arc::clone(&pair.far.shared), pods));
    tokio::task::yield_now().await;
    pair.policy("no-other", "other");
    pair.policy("no-client", "client");
    assert_reset(client).await;
    until(|| pair.far.metric("istio_tcp_connections_closed_total", &["response_flags=\"DENY\""]) == 1).await;
    assert_eq!(pair.far.metric("istio_tcp_connections_failed_total", &[]), 0, "it had been carried");
}

#[tokio::test]
async fn what_is_closed_before_its_answer_is_answered_with_the_reason() {
    for (reason, label) in [(CloseReason::Denied(None), "denied_by_peer"), (CloseReason::Drained, "refused_by_peer")] {
        let sockets = [LocalSockets::default(), LocalSockets { stuck: true, ..LocalSockets::default() }];
        let pair = Pair::with_sockets(Mesh::new(), |_| {}, sockets, 100_000).await;
        let client = pair.connect().await;
        until(|| pair.server.live.count() == 1).await;
        pair.server.live.close_all(&reason);
        assert_reset(client).await;
        let label = format!("reason=\"{label}\"");
        until(|| pair.near.metric("culvert_connection_failures_total", &[&label]) == 1).await;
    }
}

#[tokio::test]
async fn peers_that_say_nothing_keep_nobody_out() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(soon(TcpStream::connect(pair.mesh.addr(SERVER, 15008))).await.unwrap());
    }
    let failures = |reason| pair.far.metric("culvert_connection_failures_total", &[reason]);
    let _carried = pair.carried(&listener).await;
    // It did not have to wait until one of those was given up.
    assert_eq!(failures("reason=\"silent\""), 0);
    // All have one address, which may begin only so many at a time.
    until(|| failures("reason=\"silent\"") == BEGUN as u64).await;
    assert_eq!(failures("reason=\"too_many_from_peer\""), 200 - BEGUN as u64);
    for mut silent in silent {
        assert!(matches!(soon(silent.read(&mut [0])).await, Ok(0) | Err(_)), "it is closed");
    }
}

/// The register of a proxy that serves this pod.
fn register(pod: &Arc<Pod>) -> Arc<Pods> {
    let (notices, _orders) = tokio::sync::mpsc::unbounded_channel();
    let memory = Memory::new(Limits::of(512 << 20));
    let pods = Pods::new(Box::new(Fixed), "cluster.local".into(), bounds(9, 9), notices, memory);
    pods.insert_for_test(pod);
    pods
}

/// Serves nothing.
struct Fixed;

impl Host for Fixed {
    fn start(&self, _: &Arc<Pod>, _: Vec<(Port, std::os::fd::OwnedFd)>) -> std::io::Result<Box<dyn Send>> {
        Ok(Box::new(()))
    }

    fn extend(&self, _: &Arc<Pod>, _: Vec<(Port, std::os::fd::OwnedFd)>) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_server_that_is_somebody_else_gets_nothing() {
    let other = |server: &mut wire::Workload| server.service_account = "other".into();
    let pair = Pair::with(Mesh::new(), other, LocalSockets::default(), 100_000).await;
    let _listener = pair.listen().await;
    assert_reset(pair.connect().await).await;
    let failed = pair.near.metric("istio_tcp_connections_failed_total", &["response_flags=\"TLS_FAILURE\""]);
    assert_eq!(failed, 1);
}

#[tokio::test]
async fn without_a_certificate_nothing_leaves() {
    let mesh = Mesh::new();
    mesh.refuse("client");
    let pair = Pair::with(mesh, |_| {}, LocalSockets::default(), 100_000).await;
    assert_reset(pair.connect().await).await;
    let failed = pair.near.metric("istio_tcp_connections_failed_total", &["response_flags=\"IDENTITY_ERROR\""]);
    assert_eq!(failed, 1);
}

#[tokio::test]
async fn an_empty_stock_and_a_full_pod_have_reasons_of_their_own() {
    let pair = Pair::with(Mesh::new(), |_| {}, LocalSockets { empty: true, ..LocalSockets::default() }, 100_000).await;
    assert_reset(pair.connect().await).await;
    assert_eq!(pair.near.metric("culvert_connection_failures_total", &["reason=\"no_socket\""]), 1);

    let pair = Pair::with(Mesh::new(), |_| {}, LocalSockets::default(), 1).await;
    let listener = pair.listen().await;
    let _first = pair.carried(&listener).await;
    assert_reset(pair.connect().await).await;
    assert_eq!(pair.near.metric("culvert_connection_failures_total", &["reason=\"too_many_connections\""]), 1);
}

#[tokio::test]
async fn a_reset_passes_both_ways() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let (client, server, _) = pair.carried(&listener).await;
    server.set_zero_linger().unwrap();
    drop(server);
    assert_reset(client).await;
    let (client, server, _) = pair.carried(&listener).await;
    client.set_zero_linger().unwrap();
    drop(client);
    assert_reset(server).await;
}

#[tokio::test]
async fn what_the_mesh_does_not_know_passes_through_in_plain() {
    let pair = Pair::new().await;
    // Addressed to the application itself, by an address that no workload has.
    let stranger = pair.mesh.addr(50, pair.app);
    let listener = TcpListener::bind(stranger).await.unwrap();
    let captured = TcpListener::bind(pair.mesh.addr(51, 0)).await.unwrap();
    let at = captured.local_addr().unwrap();
    let (app, accepted) = tokio::join!(TcpStream::connect(at), captured.accept());
    let (app, (stream, peer)) = (app.unwrap(), accepted.unwrap());
    drop(captured);
    // The captured listener is gone; its address is the stranger's now.
    let stranger = TcpListener::bind(at).await.unwrap();
    drop(listener);
    super::testing::soon(async {
        let (worker, client) = (Arc::clone(&pair.near.worker), Arc::clone(&pair.client));
        let carrying = tokio::spawn(async move {
            let stream = client.open.enter(stream).unwrap();
            super::outbound::serve(&worker, &client, Accepted::new(stream, peer).unwrap()).await;
        });
        let (mut upstream, from) = stranger.accept().await.unwrap();
        assert_eq!(from.ip(), pair.mesh.ip(CLIENT), "from the pod's own address");
        upstream.write_all(b"plain").await.unwrap();
        drop(upstream);
        let mut app = app;
        let mut read = String::new();
        app.read_to_string(&mut read).await.unwrap();
        assert_eq!(read, "plain");
        drop(app);
        carrying.await.unwrap();
    })
    .await;
    let labels = ["connection_security_policy=\"unknown\"", "destination_workload=\"unknown\""];
    assert_eq!(pair.near.metric("istio_tcp_connections_closed_total", &labels), 1);
}

#[tokio::test]
async fn plaintext_from_outside_is_delivered_with_the_clients_address_or_refused() {
    let pair = Pair::new().await;
    for denied in [false, true] {
        // As the kernel steers it: accepted at the application's own address.
        let captured = pair.listen().await;
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(pair.mesh.addr(60, 0)).unwrap();
        let (outside, accepted) = tokio::join!(socket.connect(captured.local_addr().unwrap()), captured.accept());
        let (mut outside, (stream, peer)) = (outside.unwrap(), accepted.unwrap());
        drop(captured);
        let listener = pair.listen().await;
        if denied {
            let policy = security::Authorization {
                name: "strict".into(),
                namespace: "shop".into(),
                scope: security::Scope::Namespace.into(),
                action: security::Action::Deny.into(),
                rules: vec![security::Rule {
                    clauses: vec![security::Clause {
                        matches: vec![security::Match {
                            not_principals: vec![security::StringMatch {
                                match_type: Some(security::string_match::MatchType::Presence(())),
                            }],
                            ..Default::default()
                        }],
                    }],
                }],
                ..Default::default()
            };
            pair.far.update(AUTHORIZATION_TYPE, vec![resource("shop/strict", &policy)]);
        }
        let (worker, server) = (Arc::clone(&pair.far.worker), Arc::clone(&pair.server));
        let accepted = Accepted::new(server.open.enter(stream).unwrap(), peer).unwrap();
        let carrying = tokio::spawn(async move { plaintext::serve(&worker, &server, accepted).await });
        if denied {
            assert_reset(outside).await;
        } else {
            let (mut app, seen) = soon(listener.accept()).await.unwrap();
            assert_eq!(seen.ip(), peer.ip());
            assert_ne!(seen.port(), peer.port(), "or the two accepted sockets would be the same");
            outside.write_all(b"hello").await.unwrap();
            outside.shutdown().await.unwrap();
            let mut read = String::new();
            soon(app.read_to_string(&mut read)).await.unwrap();
            assert_eq!(read, "hello");
        }
        soon(carrying).await.unwrap();
    }
}

#[tokio::test]
async fn nothing_is_decided_before_discovery_has_told_all() {
    let mesh = Mesh::new();
    let proxy = mesh.proxy();
    let pod = proxy.pod("client", mesh.ip(CLIENT));
    let at = mesh.addr(VIP, PORT);
    proxy.serve(&pod, Port::Outbound, at).await;
    let app = soon(TcpStream::connect(at)).await.unwrap();
    // A service without endpoints, or, decided too early, an address that nobody knows.
    let waiting = tokio::time::timeout(Duration::from_millis(300), app.readable()).await;
    assert!(waiting.is_err(), "the connection waits in the queue");
    assert_eq!(proxy.metric("istio_tcp_connections_opened_total", &[]), 0);
    proxy.learn(&[mesh.workload("client", CLIENT)], &[mesh.service("api", VIP, &[(u32::from(PORT), 80)])]);
    assert_reset(app).await;
    assert_eq!(proxy.metric("culvert_connection_failures_total", &["reason=\"no_ready_endpoint\""]), 1);
}

/// One of these lives for each open connection.
#[tokio::test]
async fn a_connection_costs_little_memory() {
    let pair = Pair::new().await;
    let listener = TcpListener::bind(pair.mesh.addr(70, 0)).await.unwrap();
    let at = listener.local_addr().unwrap();
    for serve in ["outbound", "plaintext"] {
        let (_client, accepted) = tokio::join!(TcpStream::connect(at), listener.accept());
        let (stream, peer) = accepted.unwrap();
        let accepted = Accepted::new(pair.client.open.enter(stream).unwrap(), peer).unwrap();
        let size = match serve {
            "outbound" => size_of_val(&super::outbound::serve(&pair.near.worker, &pair.client, accepted)),
            _ => size_of_val(&plaintext::serve(&pair.near.worker, &pair.client, accepted)),
        };
        assert!(size < 3 << 10, "{serve}: {size} bytes");
    }
}

#[tokio::test]
async fn when_a_pod_goes_everything_of_it_ends() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let (client, server, _) = pair.carried(&listener).await;
    soon(pair.client.live.close()).await;
    assert_reset(client).await;
    assert_reset(server).await;
    assert_eq!(pair.near.shared.tunnels.all().len(), 0, "no tunnel of the pod is left");
    until(|| pair.server.live.count() == 0).await;
    let refused = TcpStream::connect(pair.mesh.addr(VIP, PORT)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn a_drain_takes_nothing_new_and_lets_what_is_open_finish() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let (mut client, mut server, _) = pair.carried(&listener).await;
    let Pair { mesh, near, far, client: _pod, server: _far_pod, app: _ } = pair;
    // Its own token would be waited for.
    drop(near);
    let drained = tokio::spawn(async move { (mesh.trigger().drain(Duration::from_secs(30)).await, mesh) });
    tokio::task::yield_now().await;
    server.write_all(b"still here").await.unwrap();
    server.shutdown().await.unwrap();
    let mut read = String::new();
    soon(client.read_to_string(&mut read)).await.unwrap();
    assert_eq!(read, "still here");
    assert!(!drained.is_finished(), "the client has not ended yet");
    drop(client);
    let (drained, mesh) = soon(drained).await.unwrap();
    assert_eq!(drained, Drained::Complete);
    let refused = TcpStream::connect(mesh.addr(VIP, PORT)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    drop(far);
}

#[tokio::test]
async fn a_proxy_that_drains_holds_no_listener_of_a_pod_that_comes() {
    let mesh = Mesh::new();
    let proxy = mesh.proxy();
    let pod = proxy.pod("client", mesh.ip(CLIENT));
    let workers = Workers::start(2, &proxy.shared, &proxy.drain).unwrap();
    let listen = || std::net::TcpListener::bind(mesh.addr(CLIENT, 0)).unwrap();
    let (before, after) = (listen(), listen());
    let (served, free) = (before.local_addr().unwrap(), after.local_addr().unwrap());
    let _before = workers.start(&pod, vec![(Port::Outbound, before.into())]).unwrap();
    drop(proxy.drain);
    let drain = tokio::spawn(mesh.trigger().drain(Duration::from_secs(30)));
    assert_eq!(soon(drain).await.unwrap(), Drained::Complete);
    let refuses = |to: SocketAddr| {
        let connected = std::net::TcpStream::connect_timeout(&to, Duration::from_secs(1));
        connected.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    };
    until(|| refuses(served)).await;
    let _after = workers.start(&pod, vec![(Port::Outbound, after.into())]).unwrap();
    until(|| refuses(free)).await;
    workers.stop();
}

#[tokio::test]
async fn after_its_deadline_a_drain_resets_what_is_left() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let (client, server, _) = pair.carried(&listener).await;
    let pods = register(&pair.client);
    let Pair { mesh, near, .. } = pair;
    let registry = near.registry.clone();
    // Its own token would be waited for.
    drop(near);
    let drained = soon(super::app::end(mesh.trigger(), &pods, Duration::from_millis(50))).await;
    assert_eq!(drained, Drained::Complete);
    assert_reset(client).await;
    assert_reset(server).await;
    assert!(registry.encode().unwrap().contains("istio_tcp_sockets_open{reporter=\"source\"} 0"));
}
