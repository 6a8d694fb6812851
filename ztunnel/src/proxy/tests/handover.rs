//! The conversation with the agent, played here by the test.

use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use mesh_proto::node::{self, agent_message, proxy_message};
use mesh_runtime::ready::Readiness;
use mesh_runtime::seqpacket::{Listener, MAX_MESSAGE, Socket};
use prost::Message;
use tokio::sync::mpsc;

use crate::proxy::handover::Handover;
use crate::proxy::pods::{Host, Pod, Pods, Port};
use crate::proxy::sockets::{NodeCap, SocketKind};
use crate::proxy::testing::{soon, until};

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
}

struct Agent {
    listener: Listener,
    pods: Arc<Pods>,
    started: Started,
    readiness: Readiness,
    _dir: tempfile::TempDir,
}

impl Agent {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let listener = Listener::bind(&path, 0o600).unwrap();
        let (sender, notices) = mpsc::unbounded_channel();
        let started = Started::default();
        let pods = Pods::new(Box::new(started.clone()), "cluster.local".into(), 10, NodeCap::new(100), sender);
        let readiness = Readiness::new();
        let pending = Some(readiness.register("agent"));
        tokio::spawn(Handover { agent_socket: path, pods: Arc::clone(&pods), notices, pending }.run());
        Self { listener, pods, started, readiness, _dir: dir }
    }

    /// The proxy's next connection, after both hellos; with the pods that it kept.
    async fn accept(&self) -> (Conversation, Vec<(node::PodKept, usize)>) {
        let socket = Conversation(soon(self.listener.accept()).await.unwrap());
        let (proxy_message::Kind::Hello(hello), _) = socket.next().await else { panic!("no hello") };
        assert_eq!(hello.version, 1);
        let mut kept = Vec::new();
        for _ in 0..hello.kept_pods {
            let (proxy_message::Kind::PodKept(one), fds) = socket.next().await else { panic!("no kept pod") };
            kept.push((one, fds.len()));
        }
        socket.send(agent_message::Kind::Hello(node::Hello { version: 1, kept_pods: 0 }), &[]).await;
        (socket, kept)
    }
}

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
        let pod = node::Pod {
            uid: uid.into(),
            name: "cart".into(),
            namespace: "shop".into(),
            service_account: "cart".into(),
            addresses: vec![vec![10, 0, 0, 1]],
        };
        let listeners = vec![node::Listener::Outbound.into(), node::Listener::InboundHbone.into()];
        let added = node::PodAdded { pod: Some(pod), listeners };
        self.send(agent_message::Kind::PodAdded(added), &sockets(fds)).await;
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
    let answer =
        node::Sockets { pod_uid: "uid-1".into(), kind: request.kind, count: request.count, error: String::new() };
    socket.send(agent_message::Kind::Sockets(answer), &sockets(request.count as usize)).await;
    let kind = SocketKind::from_wire(request.kind).unwrap();
    let stock = agent.pods.stock("uid-1").unwrap();
    until(|| stock.idle(kind) == request.count as usize).await;

    let token = pod.live.token();
    let ended = tokio::spawn(async move {
        pod.live.closed().await;
        drop(token);
    });
    socket.send(agent_message::Kind::PodRemoved(node::PodRemoved { pod_uid: "uid-1".into() }), &[]).await;
    assert_eq!(socket.ack().await, node::Ack { pod_uid: "uid-1".into(), error: String::new() });
    assert!(ended.is_finished(), "acknowledged only when everything of the pod has ended");
    assert_eq!(stock.idle(kind), 0);
    assert!(agent.pods.uids().is_empty());
}

#[tokio::test]
async fn a_pod_that_cannot_be_served_or_ended_is_said_so() {
    let agent = Agent::new();
    let (socket, _) = agent.accept().await;
    socket.add("uid-1", 1).await;
    assert!(socket.ack().await.error.contains("2 listeners"));
    socket.add("uid-2", 2).await;
    assert_eq!(socket.ack().await.error, "");
    let (pod, _) = agent.started.0.lock().unwrap()[0].clone();
    let _stuck = pod.live.token();
    socket.send(agent_message::Kind::PodRemoved(node::PodRemoved { pod_uid: "uid-2".into() }), &[]).await;
    assert!(socket.ack().await.error.contains("did not end"));
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
    let expected =
        ["goes", "stays"].map(|uid| (node::PodKept { pod_uid: uid.into(), listeners: listeners.clone() }, 2));
    assert_eq!(kept, expected);
    assert_eq!(agent.pods.uids().len(), 2, "nothing ended while the agent was away");
    socket.add("stays", 2).await;
    assert_eq!(socket.ack().await.error, "");
    assert_eq!(agent.started.0.lock().unwrap().len(), 2, "a pod that is served already stays as it is");
    socket.snapshot_sent().await;
    until(|| agent.pods.uids().len() == 1).await;
    assert_eq!(&*agent.pods.uids()[0], "stays");
}
