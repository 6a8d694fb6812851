//! A pod goes while nothing on its thread runs.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};

use futures_util::future::BoxFuture;
use mesh_proto::node;

use super::*;
use crate::proxy::descriptors::Descriptors;
use crate::proxy::open::OpenSockets;
use crate::proxy::pods::AddError;
use crate::proxy::sockets::{Notice, SocketKind, SocketSource, TakeError, Want};

/// Connections of the pod that goes.
const MANY: usize = 1000;

/// Sockets that whoever takes one waits for with his whole thread.
struct Held {
    waits: Sender<()>,
    go_on: Mutex<Receiver<()>>,
}

impl SocketSource for Held {
    fn take(&self, _: SocketKind) -> BoxFuture<'_, Result<OwnedFd, TakeError>> {
        self.waits.send(()).unwrap();
        let _ = self.go_on.lock().unwrap_or_else(PoisonError::into_inner).recv();
        Box::pin(async { Err(TakeError::Empty) })
    }

    fn reply(&self, _: std::net::IpAddr) -> BoxFuture<'_, Result<Arc<OwnedFd>, TakeError>> {
        Box::pin(async { Err(TakeError::Empty) })
    }
}

/// Answers the orders of sockets, as the agent does.
async fn stock(pods: Arc<Pods>, mut orders: tokio::sync::mpsc::UnboundedReceiver<Notice>) {
    let make = || socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap().into();
    while let Some(Notice { pod_uid, want: Want::Shelf(kind) }) = orders.recv().await {
        let Some(stock) = pods.stock(&pod_uid) else { continue };
        while let Some(count) = stock.next_order(kind) {
            stock.fill(kind, (0..count).map(|_| make()).collect());
        }
    }
}

fn add(pods: &Pods, name: &str, ip: std::net::IpAddr, listener: &std::net::TcpListener) -> Result<(), AddError> {
    let std::net::IpAddr::V4(ip) = ip else { panic!("tests are of IPv4") };
    let pod = node::Pod {
        uid: name.into(),
        name: name.into(),
        namespace: "shop".into(),
        service_account: name.into(),
        addresses: vec![ip.octets().to_vec()],
    };
    pods.add(Some(&pod), &[node::Listener::Outbound.into()], vec![listener.try_clone().unwrap().into()]).0
}

fn listen(at: SocketAddr) -> std::net::TcpListener {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&at.into()).unwrap();
    socket.listen(4096).unwrap();
    socket.into()
}

/// Connections through the proxy, each with the application's end.
async fn carry(to: SocketAddr, application: &TcpListener, count: usize) -> Vec<(TcpStream, TcpStream)> {
    let mut carried = Vec::new();
    for _ in 0..count {
        let (client, accepted) = tokio::join!(TcpStream::connect(to), soon(application.accept()));
        carried.push((client.unwrap(), accepted.unwrap().0));
    }
    carried
}

async fn is_reset(stream: &mut TcpStream) -> bool {
    let end = soon(stream.read(&mut [0])).await;
    end.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

#[tokio::test]
async fn a_pod_is_ended_while_its_thread_is_held_up_and_others_of_the_thread_are_left_alone() {
    mesh_runtime::limits::raise_open_files().unwrap();
    let pair = Pair::new().await;
    let Pair { mesh, near, far, app, .. } = &pair;
    let application = pair.listen().await;
    let ports = [(u32::from(PORT), u32::from(*app))];
    let workload = fixture::in_service(mesh.workload("server", SERVER), "one", &ports);
    let workload = fixture::in_service(workload, "other", &ports);
    let clients = [("goes", 11), ("stays", 12), ("holds", 13)].map(|(name, last)| mesh.workload(name, last));
    far.learn(&clients, &[]);
    let services = [mesh.service("one", VIP + 1, &ports), mesh.service("other", VIP + 2, &ports)];
    near.learn(&[&clients[..], &[workload]].concat(), &services);

    // All of them on one real thread.
    let workers = Workers::start(1, &near.shared, &near.drain).unwrap();
    let (notices, orders) = tokio::sync::mpsc::unbounded_channel();
    let memory = mesh_hbone::Memory::new(mesh_hbone::memory::Limits::of(512 << 20));
    let pods =
        Pods::new(Box::new(Arc::clone(&workers)), "cluster.local".into(), bounds(2 * MANY, 100), notices, memory);
    tokio::spawn(stock(Arc::clone(&pods), orders));
    let (to_goes, to_stays) = (mesh.addr(VIP + 1, PORT), mesh.addr(VIP + 2, PORT));
    let (going, staying) = (listen(to_goes), listen(to_stays));
    add(&pods, "goes", mesh.ip(11), &going).unwrap();
    add(&pods, "stays", mesh.ip(12), &staying).unwrap();
    let goes = pods.pods().into_iter().find(|pod| &*pod.uid == "goes").unwrap();
    let mut gone = carry(to_goes, &application, MANY).await;
    let mut stayed = carry(to_stays, &application, 1).await;
    drop(going);

    // Where that leads nobody knows, so that it would go on in plain: by a socket that is waited for.
    let (waits, is_waited) = channel();
    let (let_go, go_on) = channel();
    let mut holds = near.pod("holds", mesh.ip(13));
    Arc::get_mut(&mut holds).unwrap().sockets = Arc::new(Held { waits, go_on: Mutex::new(go_on) });
    let holding = listen(mesh.addr(60, 0));
    let to_holds = holding.local_addr().unwrap();
    let _holds = workers.start(&holds, vec![(Port::Outbound, holding.into())]).unwrap();
    let _held = TcpStream::connect(to_holds).await.unwrap();
    until(|| is_waited.try_recv().is_ok()).await;

    pods.remove("goes").unwrap().ended().await.unwrap();
    assert!(goes.live.count() == MANY && goes.open.count() > MANY, "no task of it has run");
    for (client, server) in &mut gone {
        assert!(is_reset(client).await);
        assert!(is_reset(server).await);
    }
    let refused = TcpStream::connect(to_goes).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    // As when the pod is enrolled again.
    drop(listen(to_goes));
    let (client, server) = &mut stayed[0];
    client.write_all(b"still here").await.unwrap();

    let_go.send(()).unwrap();
    let mut said = [0; 10];
    soon(server.read_exact(&mut said)).await.unwrap();
    until(|| goes.live.count() == 0 && goes.open.count() == 0).await;
}

#[tokio::test]
async fn a_pod_that_has_as_many_sockets_as_are_left_is_told_so_and_others_have_theirs() {
    let pair = Pair::new().await;
    let listener = pair.listen().await;
    let (_first, _server, _) = pair.carried(&listener).await;
    // Of this process two are left for pods: the tunnel, which the other two share, and one connection.
    let descriptors = Descriptors::new(8);
    descriptors.saw(3);
    let at = pair.mesh.addr(VIP + 1, PORT);
    let ports = [(u32::from(PORT), u32::from(pair.app))];
    let workload = fixture::in_service(pair.mesh.workload("server", SERVER), "one", &ports);
    let clients = [pair.mesh.workload("client", CLIENT), pair.mesh.workload("greedy", 11)];
    pair.far.learn(&clients, &[]);
    pair.near.learn(&[&clients[..], &[workload]].concat(), &[pair.mesh.service("one", VIP + 1, &ports)]);
    let mut greedy = pair.near.pod("greedy", pair.mesh.ip(11));
    Arc::get_mut(&mut greedy).unwrap().open = OpenSockets::new(Arc::clone(&descriptors));
    pair.near.serve(&greedy, Port::Outbound, at).await;

    let carried = carry(at, &listener, 1).await;
    assert_reset(TcpStream::connect(at).await.unwrap()).await;
    let labels = ["reason=\"too_many_sockets\"", "reporter=\"source\""];
    assert_eq!(pair.near.metric("culvert_connection_failures_total", &labels), 1);
    assert!(OpenSockets::new(descriptors).enter(listen(pair.mesh.addr(61, 0))).is_ok(), "another pod may have one");
    drop(carried);
    until(|| greedy.live.count() == 0).await;
    carry(at, &listener, 1).await;
}
