//! The conversation with the agent, played here by the test.

use std::io::Read as _;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use mesh_proto::node::{self, agent_message, proxy_message};
use mesh_runtime::ready::Readiness;
use mesh_runtime::seqpacket::{Listener, MAX_MESSAGE, Socket};
use prost::Message;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::proxy::handover::Handover;
use crate::proxy::open::Open;
use crate::proxy::pods::{Host, Pod, Pods, Port, StillAlive};
use crate::proxy::sockets::{Family, SocketKind, SocketSource, TakeError};
use crate::proxy::testing::{bounds, soon, until};

/// What was started, in order.
#[derive(Clone, Default)]
struct Started(Arc<Mutex<Vec<Start>>>);

type Start = (Arc<Pod>, Vec<Port>);

impl Host for Started {
    fn start(&self, pod: &Arc<Pod>, listeners: Vec<(Port, OwnedFd)>) -> std::io::Result<Box<dyn Send>> {
        let ports = listeners.iter().map(|(port, _)| *port).collect();
        self.0.lock().unwrap().push((Arc::clone(pod), ports));
        Ok(Box::new(()))
    }

    fn extend(&self, pod: &Arc<Pod>, listeners: Vec<(Port, OwnedFd)>) -> std::io::Result<()> {
        self.start(pod, listeners).map(drop)
    }
}

struct Agent {
    listener: Listener,
    pods: Arc<Pods>,
    started: Started,
    readiness: Readiness,
    failure: oneshot::Receiver<StillAlive>,
    _dir: tempfile::TempDir,
}

impl Agent {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let listener = Listener::bind(&path, 0o600).unwrap();
        let (sender, notices) = mpsc::unbounded_channel();
        let started = Started::default();
        let memory = mesh_hbone::Memory::new(mesh_hbone::memory::Limits::of(512 << 20));
        let pods = Pods::new(Box::new(started.clone()), "cluster.local".into(), bounds(10, 100), sender, memory);
        let readiness = Readiness::new();
        let pending = Some(readiness.register("agent"));
        let failure = Handover { agent_socket: path, pods: Arc::clone(&pods), notices, pending }.start().unwrap();
        Self { listener, pods, started, readiness, failure, _dir: dir }
    }

    /// The proxy's next connection, after both hellos; with the pods that it kept.
    async fn accept(&self) -> (Conversation, Vec<Kept>) {
        let socket = Conversation(soon(self.listener.accept()).await.unwrap());
        let (proxy_message::Kind::Hello(hello), _) = socket.next().await else { panic!("no hello") };
        assert_eq!(hello.version, 2, "it answers DNS");
        let mut kept = Vec::new();
        for _ in 0..hello.kept_pods {
            let (proxy_message::Kind::PodKept(one), fds) = socket.next().await else { panic!("no kept pod") };
            kept.push((one, fds));
        }
        // The version before: the proxy speaks it too.
        socket.send(agent_message::Kind::Hello(node::Hello { version: 1, kept_pods: 0 }), &[]).await;
        (socket, kept)
    }
}

/// What the proxy returned of a pod.
type Kept = (node::PodKept, Vec<OwnedFd>);

struct Conversation(Socket);

impl Conversation {
    async fn next(&self) -> (proxy_message::Kind, Vec<OwnedFd>) {
        let (message, fds) = soon(self.0.recv(MAX_MESSAGE)).await.unwrap();
        (node::ProxyMessage::decode(message).unwrap().kind.unwrap(), fds)
    }

    async fn ack(&self) -> node::Ack {
        loop {
            if let (proxy_message::Kind::Ack(ack), _) = self.next().await {
                return ack;
            }
        }
    }

    async fn request(&self) -> node::SocketRequest {
        loop {
            if let (proxy_message::Kind::SocketRequest(request), _) = self.next().await {
                return request;
            }
        }
    }

    async fn send(&self, kind: agent_message::Kind, fds: &[OwnedFd]) {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let message = node::AgentMessage { kind: Some(kind) };
        self.0.send(&message.encode_to_vec(), &fds).await.unwrap();
    }

    async fn add(&self, uid: &str, fds: usize) {
        self.add_from(uid, &sockets(fds)).await;
    }

    async fn add_from(&self, uid: &str, sockets: &[OwnedFd]) {
        let pod = node::Pod {
            uid: uid.into(),
            name: "cart".into(),
            namespace: "shop".into(),
            service_account: "cart".into(),
            addresses: vec![vec![10, 0, 0, 1]],
        };
        let kinds = [node::Listener::Outbound, node::Listener::InboundHbone, node::Listener::Outbound];
        let listeners = kinds.into_iter().take(sockets.len().max(2)).map(Into::into).collect();
        let added = node::PodAdded { pod: Some(pod), listeners };
        self.send(agent_message::Kind::PodAdded(added), sockets).await;
    }

    async fn remove(&self, uid: &str) {
        self.send(agent_message::Kind::PodRemoved(node::PodRemoved { pod_uid: uid.into() }), &[]).await;
    }

    async fn snapshot_sent(&self) {
        self.send(agent_message::Kind::SnapshotSent(node::SnapshotSent {}), &[]).await;
    }
}

fn sockets(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap().into()).collect()
}

#[tokio::test]
async fn a_pod_is_served_stocked_and_removed() {
    let agent = Agent::new();
    let (socket, kept) = agent.accept().await;
    assert!(kept.is_empty());
    socket.add("uid-1", 2).await;
    assert_eq!(socket.ack().await, node::Ack { pod_uid: "uid-1".into(), error: String::new() });
    let (pod, ports) = agent.started.0.lock().unwrap()[0].clone();
    assert_eq!(pod.identity.as_str(), "spiffe://cluster.local/ns/shop/sa/cart");
    assert_eq!(ports, [Port::Outbound, Port::Hbone]);
    assert!(!agent.readiness.is_ready());
    socket.snapshot_sent().await;
    soon(agent.readiness.ready()).await;

    let request = socket.request().await;
    assert_eq!(request.pod_uid, "uid-1");
    let answer = node::Sockets {
        pod_uid: "uid-1".into(),
        kind: request.kind,
        count: request.count,
        error: String::new(),
        address: Vec::new(),
    };
    socket.send(agent_message::Kind::Sockets(answer), &sockets(request.count as usize)).await;
    let kind = SocketKind::from_wire(request.kind).unwrap();
    let stock = agent.pods.stock("uid-1").unwrap();
    until(|| stock.idle(kind) == request.count as usize).await;

    let token = pod.live.token();
    let ended = tokio::spawn(async move {
        pod.live.closed().await;
        drop(token);
    });
    socket.remove("uid-1").await;
    assert_eq!(socket.ack().await, node::Ack { pod_uid: "uid-1".into(), error: String::new() });
    assert!(ended.is_finished(), "acknowledged only when everything of the pod has ended");
    assert_eq!(stock.idle(kind), 0);
    assert!(agent.pods.uids().is_empty());
}

#[tokio::test]
async fn a_pod_that_cannot_be_served_is_said_so_and_counts_until_it_is() {
    let agent = Agent::new();
    let (socket, _) = agent.accept().await;
    for (uid, sockets) in [("uid-1", 1), ("uid-2", 1)] {
        socket.add(uid, sockets).await;
        assert!(socket.ack().await.error.contains("2 listeners"));
    }
    assert_eq!(agent.pods.unserved_count(), 2);
    socket.add("uid-1", 2).await;
    assert_eq!(socket.ack().await.error, "");
    assert_eq!(agent.pods.unserved_count(), 1);
    socket.remove("uid-2").await;
    assert_eq!(socket.ack().await.error, "");
    assert_eq!(agent.pods.unserved_count(), 0);
}

#[tokio::test]
async fn what_does_not_end_of_a_pod_is_ended_by_force_and_the_proxy_goes_on() {
    let mut agent = Agent::new();
    let (socket, _) = agent.accept().await;
    let listeners = sockets(2);
    socket.add_from("uid-1", &listeners).await;
    assert_eq!(socket.ack().await.error, "");
    let (pod, _) = agent.started.0.lock().unwrap()[0].clone();
    let _stuck = pod.live.token();
    let outside = TcpListener::bind("127.0.0.1:0").unwrap();
    let connected = std::net::TcpStream::connect(outside.local_addr().unwrap()).unwrap();
    let _connected = pod.open.enter(connected).unwrap();
    socket.remove("uid-1").await;
    assert_eq!(socket.ack().await, node::Ack { pod_uid: "uid-1".into(), error: String::new() });
    let (mut peer, _) = outside.accept().unwrap();
    assert_eq!(peer.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    for listener in listeners.into_iter().map(TcpListener::from) {
        // The test has it open still, as a task of the pod may.
        std::net::TcpStream::connect(listener.local_addr().unwrap()).expect_err("nobody listens");
    }
    agent.failure.try_recv().expect_err("nothing has failed");
}

#[tokio::test]
async fn a_pod_that_cannot_be_ended_is_said_so_and_ends_the_proxy() {
    let agent = Agent::new();
    let (socket, _) = agent.accept().await;
    socket.add("uid-1", 2).await;
    assert_eq!(socket.ack().await.error, "");
    let (pod, _) = agent.started.0.lock().unwrap()[0].clone();
    let _stuck = (pod.live.token(), unendable(&pod));
    socket.remove("uid-1").await;
    assert!(socket.ack().await.error.contains("cannot be ended"));
    assert_eq!(soon(agent.failure).await, Ok(StillAlive { uid: "uid-1".into() }));
}

/// A socket of the pod that the kernel does not end by force.
fn unendable(pod: &Pod) -> Open<UnixStream> {
    pod.open.enter(UnixStream::pair().unwrap().0).unwrap()
}

#[tokio::test]
async fn a_removal_holds_up_no_order_and_is_acknowledged_in_its_turn() {
    let agent = Agent::new();
    let (socket, _) = agent.accept().await;
    for uid in ["goes", "stays"] {
        socket.add(uid, 2).await;
        assert_eq!(socket.ack().await.error, "");
    }
    let (pod, _) = agent.started.0.lock().unwrap()[0].clone();
    let slow = (pod.live.token(), unendable(&pod));
    socket.remove("goes").await;
    socket.add("comes", 2).await;
    soon(pod.live.closed()).await;
    // Two of each kind were ordered when the pod came.
    let _takes: Vec<JoinHandle<Result<OwnedFd, TakeError>>> = (0..9)
        .map(|_| {
            let stock = agent.pods.stock("stays").unwrap();
            tokio::spawn(async move { stock.take(SocketKind::Upstream(Family::V4)).await })
        })
        .collect();
    let mut ordered = 0;
    while ordered <= 4 {
        match socket.next().await.0 {
            proxy_message::Kind::SocketRequest(request) if request.pod_uid == "stays" => {
                ordered += request.count as usize;
            }
            proxy_message::Kind::SocketRequest(_) => {}
            other => panic!("the removal has not ended, and nothing that came later may be acknowledged: {other:?}"),
        }
    }
    drop(slow);
    assert_eq!(socket.ack().await, node::Ack { pod_uid: "goes".into(), error: String::new() });
    assert_eq!(socket.ack().await, node::Ack { pod_uid: "comes".into(), error: String::new() });
}

#[tokio::test]
async fn a_restarted_agent_gets_the_listeners_back_and_both_compare() {
    let agent = Agent::new();
    let (socket, _) = agent.accept().await;
    for uid in ["stays", "goes"] {
        socket.add(uid, 2).await;
        assert_eq!(socket.ack().await.error, "");
    }
    socket.snapshot_sent().await;
    soon(agent.readiness.ready()).await;
    drop(socket);

    let (socket, mut kept) = agent.accept().await;
    kept.sort_by(|(a, _), (b, _)| a.pod_uid.cmp(&b.pod_uid));
    let listeners = vec![node::Listener::Outbound as i32, node::Listener::InboundHbone as i32];
    let returned: Vec<_> = kept.iter().map(|(pod, fds)| (pod.pod_uid.as_str(), &pod.listeners, fds.len())).collect();
    assert_eq!(returned, [("goes", &listeners, 2), ("stays", &listeners, 2)]);
    assert_eq!(agent.pods.uids().len(), 2, "nothing ended while the agent was away");
    socket.add_from("stays", &kept[1].1).await;
    assert_eq!(socket.ack().await.error, "");
    assert_eq!(agent.started.0.lock().unwrap().len(), 2, "a pod that is served already stays as it is");
    socket.snapshot_sent().await;
    until(|| agent.pods.uids().len() == 1).await;
    assert_eq!(&*agent.pods.uids()[0], "stays");
}

#[tokio::test]
async fn listeners_that_are_added_to_a_pod_leave_its_connections_be() {
    let agent = Agent::new();
    let (socket, _) = agent.accept().await;
    let mut listeners = sockets(2);
    socket.add_from("uid-1", &listeners).await;
    assert_eq!(socket.ack().await.error, "");
    listeners.extend(sockets(1));
    socket.add_from("uid-1", &listeners).await;
    assert_eq!(socket.ack().await.error, "");
    let started = agent.started.0.lock().unwrap().clone();
    let [(pod, _), (same, added)] = started.as_slice() else { panic!("{started:?}") };
    assert!(Arc::ptr_eq(pod, same) && !pod.live.is_closed());
    assert_eq!(*added, [Port::Outbound]);
    drop(socket);
    let (socket, kept) = agent.accept().await;
    assert_eq!(kept[0].1.len(), 3, "all are returned");
    // With fewer it is another.
    listeners.pop();
    socket.add_from("uid-1", &listeners).await;
    assert_eq!(socket.ack().await.error, "");
    soon(pod.live.closed()).await;
}

#[tokio::test]
async fn a_sandbox_made_anew_while_the_agent_was_away_replaces_the_old_one() {
    let agent = Agent::new();
    let (socket, _) = agent.accept().await;
    socket.add("uid-1", 2).await;
    assert_eq!(socket.ack().await.error, "");
    drop(socket);

    let (socket, _) = agent.accept().await;
    let anew = sockets(2);
    socket.add_from("uid-1", &anew).await;
    assert_eq!(socket.ack().await.error, "");
    let started = agent.started.0.lock().unwrap().clone();
    let [(old, _), (new, _)] = started.as_slice() else { panic!("{started:?}") };
    soon(old.live.closed()).await;
    assert!(!new.live.is_closed());
    socket.snapshot_sent().await;
    drop(socket);
    let (_socket, kept) = agent.accept().await;
    let inode = |socket: &OwnedFd| nix::sys::stat::fstat(socket).unwrap().st_ino;
    assert_eq!(kept[0].1.iter().map(inode).collect::<Vec<_>>(), anew.iter().map(inode).collect::<Vec<_>>());
}
