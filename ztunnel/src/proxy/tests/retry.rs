//! Endpoints that fail before any byte of the application was sent: the next one is tried, or the same once more.

use std::sync::atomic::Ordering;

use super::*;
use crate::proxy::worker::Permits;

/// The second endpoint's last byte.
const OTHER: u8 = 3;

/// A service of several endpoints, of which `server` is in the client's zone and `other` is not; their pods are served where
/// that is said.
struct Several {
    mesh: Mesh,
    near: Proxy,
    far: Proxy,
    _client: Arc<Pod>,
    app: u16,
}

impl Several {
    /// `other` is the endpoint that can be reached; `change` says what is wrong with `server`.
    async fn new(change: impl Fn(&mut wire::Workload)) -> Self {
        Self::balanced(change, None).await
    }

    async fn balanced(change: impl Fn(&mut wire::Workload), how: Option<wire::LoadBalancing>) -> Self {
        let mesh = Mesh::new();
        let app = free_port(&mesh).await;
        let ports = [(u32::from(PORT), u32::from(app))];
        let workload = |zone: &str, name: &str, at| wire::Workload {
            locality: Some(wire::Locality { zone: zone.into(), ..Default::default() }),
            ..mesh.workload(name, at)
        };
        let mut server = fixture::in_service(workload("near", "server", SERVER), "api", &ports);
        let other = fixture::in_service(workload("far", "other", OTHER), "api", &ports);
        let client = workload("near", "client", CLIENT);
        let service = wire::Service { load_balancing: how, ..mesh.service("api", VIP, &ports) };
        let (near, far) = (mesh.proxy(), mesh.proxy());
        far.learn(&[client.clone(), server.clone(), other.clone()], std::slice::from_ref(&service));
        change(&mut server);
        near.learn(&[client, server, other], &[service]);
        let pod = near.pod("client", mesh.ip(CLIENT));
        near.serve(&pod, Port::Outbound, mesh.addr(VIP, PORT)).await;
        let other = far.pod("other", mesh.ip(OTHER));
        far.serve(&other, Port::Hbone, mesh.addr(OTHER, 15008)).await;
        Self { mesh, near, far, _client: pod, app }
    }

    async fn serve_server(&self) {
        let server = self.far.pod("server", self.mesh.ip(SERVER));
        self.far.serve(&server, Port::Hbone, self.mesh.addr(SERVER, 15008)).await;
    }

    /// Connects so often that both endpoints are met, and expects the application of `other` each time.
    async fn always_reaches_the_other(&self) {
        let listener = TcpListener::bind(self.mesh.addr(OTHER, self.app)).await.unwrap();
        for _ in 0..12 {
            let (client, accepted) =
                tokio::join!(soon(TcpStream::connect(self.mesh.addr(VIP, PORT))), listener.accept());
            let (mut client, mut server) = (client.unwrap(), accepted.unwrap().0);
            server.write_all(b"welcome").await.unwrap();
            drop(server);
            let mut read = String::new();
            soon(client.read_to_string(&mut read)).await.unwrap();
            assert_eq!(read, "welcome");
        }
        let labels = ["reporter=\"source\"", "destination_principal=\"spiffe://cluster.local/ns/shop/sa/other\""];
        until(|| self.near.metric("istio_tcp_connections_closed_total", &labels) == 12).await;
        assert_eq!(self.near.metric("istio_tcp_connections_opened_total", &labels), 12);
        assert_eq!(self.near.metric("istio_tcp_connections_failed_total", &[]), 0);
        assert_eq!(self.near.metric("istio_tcp_sockets_open", &[]), 0);
    }
}

#[tokio::test]
async fn an_endpoint_that_refuses_tcp_is_passed_over() {
    Several::new(|_| {}).await.always_reaches_the_other().await;
}

#[tokio::test]
async fn an_endpoint_that_is_somebody_else_is_passed_over() {
    let several = Several::new(|server| server.service_account = "stranger".into()).await;
    several.serve_server().await;
    several.always_reaches_the_other().await;
}

#[tokio::test]
async fn an_endpoint_whose_application_is_not_there_is_passed_over() {
    let several = Several::new(|_| {}).await;
    several.serve_server().await;
    several.always_reaches_the_other().await;
    assert!(several.far.metric("istio_tcp_connections_failed_total", &[]) > 0, "it was asked");
}

#[tokio::test]
async fn an_endpoint_without_the_mesh_that_refuses_is_passed_over() {
    Several::new(|server| server.tunnel_protocol = 0).await.always_reaches_the_other().await;
}

fn zone(mode: wire::load_balancing::Mode) -> Option<wire::LoadBalancing> {
    let routing_preference = vec![wire::load_balancing::Scope::Zone.into()];
    Some(wire::LoadBalancing { routing_preference, mode: mode.into(), ..Default::default() })
}

#[tokio::test]
async fn a_zone_that_fails_is_followed_by_the_next_one() {
    let several = Several::balanced(|_| {}, zone(wire::load_balancing::Mode::Failover)).await;
    several.always_reaches_the_other().await;
}

#[tokio::test]
async fn who_wants_its_own_zone_alone_gets_no_other() {
    let several = Several::balanced(|_| {}, zone(wire::load_balancing::Mode::Strict)).await;
    let listener = TcpListener::bind(several.mesh.addr(OTHER, several.app)).await.unwrap();
    let mut refused = soon(TcpStream::connect(several.mesh.addr(VIP, PORT))).await.unwrap();
    let error = soon(refused.read(&mut [0; 16])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    until(|| several.near.metric("istio_tcp_connections_failed_total", &[]) == 1).await;
    assert_eq!(several.far.metric("istio_tcp_connections_opened_total", &[]), 0);
    assert!(tokio::time::timeout(Duration::ZERO, listener.accept()).await.is_err(), "nobody asked the other zone");
}

#[tokio::test]
async fn an_endpoint_that_says_nothing_is_left_for_the_next_one() {
    let several = Several::new(|_| {}).await;
    // Accepts TCP and never answers the handshake.
    let silent = TcpListener::bind(several.mesh.addr(SERVER, 15008)).await.unwrap();
    let listener = TcpListener::bind(several.mesh.addr(OTHER, several.app)).await.unwrap();
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(soon(TcpStream::connect(several.mesh.addr(VIP, PORT))).await.unwrap());
    }
    // All of them, in the time that one may take.
    soon(async {
        for _ in 0..8 {
            let (mut server, _) = listener.accept().await.unwrap();
            server.write_all(b"welcome").await.unwrap();
        }
    })
    .await;
    drop(silent);
}

#[tokio::test]
async fn what_policy_denies_is_not_tried_elsewhere() {
    let several = Several::new(|_| {}).await;
    several.serve_server().await;
    let principal = security::StringMatch {
        match_type: Some(security::string_match::MatchType::Exact("cluster.local/ns/shop/sa/client".into())),
    };
    let policy = security::Authorization {
        name: "nobody".into(),
        namespace: "shop".into(),
        scope: security::Scope::Namespace.into(),
        action: security::Action::Deny.into(),
        rules: vec![security::Rule {
            clauses: vec![security::Clause {
                matches: vec![security::Match { principals: vec![principal], ..Default::default() }],
            }],
        }],
        ..Default::default()
    };
    several.far.update(AUTHORIZATION_TYPE, vec![resource("shop/nobody", &policy)]);
    assert_reset(soon(TcpStream::connect(several.mesh.addr(VIP, PORT))).await.unwrap()).await;
    until(|| several.near.metric("istio_tcp_connections_failed_total", &["response_flags=\"DENY\""]) == 1).await;
    assert_eq!(several.far.metric("istio_tcp_connections_failed_total", &["response_flags=\"DENY\""]), 1);
}

/// A peer's proxy that dies takes its tunnels with it. Whoever waited for an answer must not notice.
#[tokio::test]
async fn a_tunnel_that_is_lost_before_the_answer_is_made_anew() {
    let mesh = Mesh::new();
    let app = free_port(&mesh).await;
    let (near, first, second) = (mesh.proxy(), mesh.proxy(), mesh.proxy());
    let (client, server) = (mesh.workload("client", CLIENT), mesh.workload("server", SERVER));
    for proxy in [&near, &first, &second] {
        proxy.learn(&[client.clone(), server.clone()], &[]);
    }
    let pod = near.pod("client", mesh.ip(CLIENT));
    // By the pod's own address: there is no other endpoint.
    let at = mesh.addr(SERVER, 15008);
    let std_listener = std::net::TcpListener::bind(at).unwrap();
    std_listener.set_nonblocking(true).unwrap();
    let stuck = first.pod_with("server", mesh.ip(SERVER), LocalSockets { stuck: true, ..Default::default() }, 100);
    let duplicate = TcpListener::from_std(std_listener.try_clone().unwrap()).unwrap();
    tokio::spawn(crate::proxy::worker::accept(
        Arc::clone(&first.worker),
        Arc::clone(&stuck),
        Port::Hbone,
        duplicate,
        first.drain.clone(),
    ));
    let captured = TcpListener::bind(mesh.addr(51, 0)).await.unwrap();
    let (application, accepted) = tokio::join!(TcpStream::connect(captured.local_addr().unwrap()), captured.accept());
    let (mut application, (stream, peer)) = (application.unwrap(), accepted.unwrap());
    let accepted = Accepted { stream: pod.open.enter(stream).unwrap(), peer, local: mesh.addr(SERVER, app) };
    let worker = Arc::clone(&near.worker);
    let serving = tokio::spawn({
        let pod = Arc::clone(&pod);
        async move { crate::proxy::outbound::serve(&worker, &pod, accepted).await }
    });
    // The request is there and waits for a socket; then its proxy is gone, and the next one has the listener.
    until(|| first.shared.tunnels.all().iter().any(|tunnel| tunnel.streams.load(Ordering::Relaxed) == 1)).await;
    let listener = TcpListener::bind(mesh.addr(SERVER, app)).await.unwrap();
    let served = second.pod("server", mesh.ip(SERVER));
    soon(stuck.live.close()).await;
    let again = TcpListener::from_std(std_listener).unwrap();
    tokio::spawn(crate::proxy::worker::accept(
        Arc::clone(&second.worker),
        served,
        Port::Hbone,
        again,
        second.drain.clone(),
    ));
    let (mut upstream, _) = soon(listener.accept()).await.unwrap();
    upstream.write_all(b"carried").await.unwrap();
    drop(upstream);
    let mut read = String::new();
    soon(application.read_to_string(&mut read)).await.unwrap();
    assert_eq!(read, "carried");
    drop(application);
    soon(serving).await.unwrap();
    assert_eq!(near.metric("istio_tcp_connections_failed_total", &[]), 0);
    assert_eq!(near.metric("istio_tcp_connections_closed_total", &["response_flags=\"-\""]), 1);
}

#[tokio::test]
async fn a_pod_with_too_many_tunnels_says_so() {
    let pair = Pair::new().await;
    let listener = TcpListener::bind(pair.mesh.addr(70, 0)).await.unwrap();
    let (_peer, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let (stream, peer) = accepted.unwrap();
    let handshakes = Arc::new(tokio::sync::Semaphore::new(1));
    let source = crate::proxy::sources::Sources::default().enter(peer.ip());
    let permits = Permits { waiting: None, handshakes, source, tunnel: None };
    let (worker, pod, drain) = (Arc::clone(&pair.far.worker), Arc::clone(&pair.server), pair.far.drain.clone());
    let accepted = Accepted::new(pod.open.enter(stream).unwrap(), peer).unwrap();
    soon(Box::pin(crate::proxy::inbound::serve(worker, pod, accepted, permits, drain))).await;
    assert_eq!(pair.far.metric("culvert_connection_failures_total", &["reason=\"too_many_tunnels\""]), 1);
}

#[tokio::test]
async fn a_peer_is_not_blamed_for_the_handshakes_of_others() {
    let pair = Pair::new().await;
    let listener = TcpListener::bind(pair.mesh.addr(70, 0)).await.unwrap();
    let (client, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let (stream, peer) = accepted.unwrap();
    client.as_ref().unwrap().writable().await.unwrap();
    assert_eq!(client.as_ref().unwrap().try_write(&[22]).unwrap(), 1);
    // Others have all of them.
    let handshakes = Arc::new(tokio::sync::Semaphore::new(0));
    let source = crate::proxy::sources::Sources::default().enter(peer.ip());
    let tunnel = Arc::new(tokio::sync::Semaphore::new(1)).try_acquire_owned().ok();
    let permits = Permits { waiting: None, handshakes, source, tunnel };
    let (worker, pod, drain) = (Arc::clone(&pair.far.worker), Arc::clone(&pair.server), pair.far.drain.clone());
    let accepted = Accepted::new(pod.open.enter(stream).unwrap(), peer).unwrap();
    let serving = Box::pin(crate::proxy::inbound::serve(worker, pod, accepted, permits, drain));
    tokio::time::timeout(2 * mesh_identity::handshake::TIMEOUT, serving).await.expect("it is told in time");
    assert_eq!(pair.far.metric("culvert_connection_failures_total", &["reason=\"too_many_handshakes\""]), 1);
}
