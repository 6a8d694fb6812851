//! The proxy's side of the agent: says which pods there are, gives out listeners and fresh sockets, takes listeners
//! back.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mesh_proto::node::{self, agent_message, proxy_message};
use mesh_runtime::seqpacket::{self, Listener, Socket};
use prost::Message as _;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::Instant;

use super::announce::accept;
use super::maker::{Kind, Maker};
use super::manager::{Joining, Manager, ManagerError, Notice};
use super::sockets::ListenerSet;

/// The version of the protocol that this agent speaks.
pub const VERSION: u32 = 2;
/// The oldest that it speaks.
const OLDEST: u32 = 1;
/// From this version on a proxy answers DNS. One that speaks an older one may leave queries unanswered.
const DNS_SINCE: u32 = 2;
/// From this version on a proxy takes listeners that are added to those that it has. To an older one the pod would be
/// another, and its connections would end.
const V6_SINCE: u32 = 2;
/// Largest message of a proxy.
const MAX_MESSAGE: usize = 4096;
/// Proxies at a time: the current one, its successor, and room for one that is not noticed to be gone.
const MAX_PROXIES: usize = 4;
/// How long the peer may take for the first messages, and to take a message that is sent to it.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pods that a proxy can have kept: more than a node has.
const MAX_KEPT: u32 = 4096;
/// Requests of a proxy that wait for their answers: more than one has for all pods of a node. What is over is forgotten, and
/// asked for again by a proxy that still needs it: not to read it would make both wait for each other.
const MAX_REQUESTS: usize = 2048;
/// Messages that are on the way to a proxy at a time: fewer than the kernel keeps for one that does not read
/// (`net.unix.max_dgram_qlen`, 10), so that no message has to wait when it is sent.
const MAX_ON_THE_WAY: usize = 8;
/// Descriptors that are on the way with which no more messages are sent. They are open without being in anybody's table, so that
/// no limit of open files counts them.
const MANY_DESCRIPTORS: usize = 1024;
/// Messages that a proxy may leave unacknowledged.
const MAX_UNACKED: usize = 2 * ztunnel_ebpf::PODS_CAPACITY;

/// Why a connection was ended.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The peer is neither the proxy's user nor root.
    #[error("user {0} may not take sockets")]
    NotAllowed(u32),
    /// The socket failed, or the peer is gone.
    #[error(transparent)]
    Socket(#[from] seqpacket::Error),
    /// A message that is none.
    #[error("not a message: {0}")]
    Decode(#[from] prost::DecodeError),
    /// A message that has no place here.
    #[error("{0}")]
    Protocol(&'static str),
    /// The peer did not answer or read in time.
    #[error("the proxy did not {0} in time")]
    Slow(&'static str),
    /// Sockets of a pod that is gone are still open there.
    #[error("the proxy has not let go of pod {pod}: {error}")]
    NotRemoved {
        /// UID of the pod.
        pod: String,
        /// What the proxy said.
        error: String,
    },
    /// The agent stops.
    #[error(transparent)]
    Manager(#[from] ManagerError),
}

/// Serves proxies until the task is aborted.
pub async fn serve(listener: Listener, proxy_uid: u32, manager: Manager, maker: Maker) {
    let permits = Arc::new(Semaphore::new(MAX_PROXIES));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let socket = accept(&listener).await;
        let (manager, maker) = (manager.clone(), maker.clone());
        tokio::spawn(async move {
            match connection(&socket, proxy_uid, &manager, &maker).await {
                Err(HandoverError::Socket(seqpacket::Error::Closed)) => tracing::info!("the proxy disconnected"),
                Err(error) => tracing::warn!(%error, "connection of a proxy ended"),
                Ok(()) => tracing::info!("connection of a proxy ended: the agent cut it off"),
            }
            drop(permit);
        });
    }
}

async fn connection(socket: &Socket, proxy_uid: u32, manager: &Manager, maker: &Maker) -> Result<(), HandoverError> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let peer = socket.peer()?;
    if peer.uid != proxy_uid && peer.uid != 0 {
        return Err(HandoverError::NotAllowed(peer.uid));
    }
    let greeted = tokio::time::timeout(PATIENCE, greet(socket)).await;
    let (version, kept) = greeted.map_err(|_| HandoverError::Slow("say hello"))??;
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    tracing::info!(proxy = id, pid = peer.pid, version, kept = kept.len(), "a proxy connected");
    let mut notices = manager.join(id, Joining { kept, dns: version >= DNS_SINCE }).await?;
    let mut unacked = Unacked { proxy: id, version, messages: VecDeque::new(), refused: HashSet::new() };
    let result = exchange(socket, manager, maker, &mut notices, &mut unacked).await;
    // The manager may wait for an acknowledgement that will not come.
    drop((notices, unacked));
    manager.leave(id).await;
    result
}

/// Exchanges the first messages: the version that both speak, and what the proxy kept from an earlier agent.
async fn greet(socket: &Socket) -> Result<(u32, HashMap<String, ListenerSet>), HandoverError> {
    send(socket, agent_message::Kind::Hello(node::Hello { version: VERSION, kept_pods: 0 }), &[]).await?;
    let proxy_message::Kind::Hello(hello) = receive(socket).await?.0 else {
        return Err(HandoverError::Protocol("the first message is not Hello"));
    };
    if hello.version < OLDEST {
        return Err(HandoverError::Protocol("the proxy speaks only versions that this agent does not"));
    }
    if hello.kept_pods > MAX_KEPT {
        return Err(HandoverError::Protocol("more kept pods than a node has"));
    }
    let mut kept = HashMap::new();
    for _ in 0..hello.kept_pods {
        let (proxy_message::Kind::PodKept(pod), sockets) = receive(socket).await? else {
            return Err(HandoverError::Protocol("PodKept was announced and did not come"));
        };
        if pod.listeners.len() != sockets.len() {
            return Err(HandoverError::Protocol("PodKept with another number of descriptors than listeners"));
        }
        let sockets = pod.listeners().zip(sockets).collect();
        if let Some(listeners) = ListenerSet::returned(sockets) {
            kept.insert(pod.pod_uid, listeners);
        } else {
            tracing::warn!(pod = pod.pod_uid, "the proxy returned something else than the pod's listeners");
        }
    }
    Ok((hello.version.min(VERSION), kept))
}

/// What a proxy has not answered yet.
struct Unacked {
    proxy: u64,
    /// Of the protocol, as both speak it.
    version: u32,
    /// In order: the pod, and who wants to know that it is removed.
    messages: VecDeque<(String, Option<oneshot::Sender<()>>)>,
    /// Pods that it does not serve, as the manager was told.
    refused: HashSet<String>,
}

/// What was sent to a proxy since it had read everything. It is seen only when that is so again.
#[derive(Debug, Default)]
struct OnTheWay {
    messages: usize,
    descriptors: usize,
}

impl OnTheWay {
    fn add(&mut self, descriptors: usize) {
        self.messages += 1;
        self.descriptors += descriptors;
    }

    /// Whether nothing more is sent before the proxy has read everything.
    const fn is_full(&self) -> bool {
        self.messages >= MAX_ON_THE_WAY || self.descriptors >= MANY_DESCRIPTORS
    }
}

/// Returns when the manager cut the proxy off.
async fn exchange(
    socket: &Socket,
    manager: &Manager,
    maker: &Maker,
    notices: &mut mpsc::Receiver<Notice>,
    unacked: &mut Unacked,
) -> Result<(), HandoverError> {
    let mut requests: VecDeque<node::SocketRequest> = VecDeque::new();
    let mut on_the_way = OnTheWay::default();
    // Until when everything that is on the way is to be read.
    let mut deadline = Instant::now();
    loop {
        let full = on_the_way.is_full();
        tokio::select! {
            read = socket.drained(), if full => {
                read?;
                on_the_way = OnTheWay::default();
                continue;
            }
            () = tokio::time::sleep_until(deadline), if full => return Err(HandoverError::Slow("read")),
            () = std::future::ready(()), if !full && !requests.is_empty() => {
                let Some(request) = requests.pop_front() else { continue };
                on_the_way.add(answer(socket, manager, maker, request).await?);
            }
            notice = notices.recv(), if !full => match notice {
                Some(notice) => on_the_way.add(tell(socket, notice, unacked).await?),
                None => return Ok(()),
            },
            message = receive(socket) => {
                match message?.0 {
                    proxy_message::Kind::Ack(ack) => acknowledge(ack, manager, unacked).await?,
                    proxy_message::Kind::SocketRequest(request) if requests.len() >= MAX_REQUESTS => {
                        tracing::debug!(pod = request.pod_uid, "the proxy asks for more than it reads");
                    }
                    proxy_message::Kind::SocketRequest(request) => requests.push_back(request),
                    proxy_message::Kind::Hello(_) | proxy_message::Kind::PodKept(_) => {
                        return Err(HandoverError::Protocol("Hello or PodKept after the beginning"));
                    }
                }
                continue;
            }
        }
        // Something was sent.
        deadline = Instant::now() + PATIENCE;
    }
}

/// Tells the proxy; how many descriptors went with it.
async fn tell(socket: &Socket, notice: Notice, unacked: &mut Unacked) -> Result<usize, HandoverError> {
    if unacked.messages.len() >= MAX_UNACKED {
        return Err(HandoverError::Slow("acknowledge"));
    }
    match notice {
        Notice::Added(info, listeners) => {
            let (mut kinds, mut descriptors) = (listeners.kinds(), listeners.descriptors());
            if unacked.version < V6_SINCE {
                // They come last.
                let both = kinds.len() - listeners.v6.len();
                kinds.truncate(both);
                descriptors.truncate(both);
            }
            let kinds = kinds.into_iter().map(Into::into).collect();
            let message = node::PodAdded { pod: Some(info.to_wire()), listeners: kinds };
            unacked.messages.push_back((info.uid, None));
            send(socket, agent_message::Kind::PodAdded(message), &descriptors).await
        }
        Notice::Removed(uid, removed) => {
            unacked.messages.push_back((uid.clone(), Some(removed)));
            send(socket, agent_message::Kind::PodRemoved(node::PodRemoved { pod_uid: uid }), &[]).await
        }
        Notice::SnapshotSent => send(socket, agent_message::Kind::SnapshotSent(node::SnapshotSent {}), &[]).await,
    }
}

async fn acknowledge(ack: node::Ack, manager: &Manager, unacked: &mut Unacked) -> Result<(), HandoverError> {
    let node::Ack { pod_uid, error } = ack;
    match unacked.messages.pop_front() {
        Some((uid, _)) if uid != pod_uid => Err(HandoverError::Protocol("an acknowledgement of something else")),
        // Whoever waits for it learns that this connection ends.
        Some((pod, Some(_))) if !error.is_empty() => Err(HandoverError::NotRemoved { pod, error }),
        Some((uid, Some(removed))) => {
            // The refusal may have come after the manager forgot the pod: one of the same UID is not to be taken for refused.
            if unacked.refused.remove(&uid) {
                manager.answered(unacked.proxy, uid, String::new()).await;
            }
            // The manager may have lost patience.
            let _ = removed.send(());
            Ok(())
        }
        Some((uid, None)) => {
            if !error.is_empty() {
                tracing::error!(pod = uid, error, "the proxy does not serve a pod");
                unacked.refused.insert(uid.clone());
                manager.answered(unacked.proxy, uid, error).await;
            } else if unacked.refused.remove(&uid) {
                manager.answered(unacked.proxy, uid, error).await;
            }
            Ok(())
        }
        None => Err(HandoverError::Protocol("an acknowledgement of nothing")),
    }
}

/// Answers the proxy; how many descriptors went with it.
async fn answer(
    socket: &Socket,
    manager: &Manager,
    maker: &Maker,
    request: node::SocketRequest,
) -> Result<usize, HandoverError> {
    let (sockets, error) = match make(manager, maker, &request).await {
        Ok(sockets) => (sockets, String::new()),
        Err(error) => {
            tracing::warn!(pod = request.pod_uid, error, "no sockets for the proxy");
            (Vec::new(), error)
        }
    };
    let message = node::Sockets {
        pod_uid: request.pod_uid,
        kind: request.kind,
        count: u32::try_from(sockets.len()).unwrap_or(0),
        error,
        address: request.address,
    };
    let sockets: Vec<BorrowedFd<'_>> = sockets.iter().map(|socket| socket.as_fd()).collect();
    send(socket, agent_message::Kind::Sockets(message), &sockets).await
}

async fn make(manager: &Manager, maker: &Maker, request: &node::SocketRequest) -> Result<Vec<OwnedFd>, String> {
    let kind = Kind::try_from(request).map_err(|error| error.to_string())?;
    let count = usize::try_from(request.count).unwrap_or(usize::MAX);
    if count == 0 || count > seqpacket::MAX_FDS {
        return Err(format!("1 to {} sockets can be asked for at a time", seqpacket::MAX_FDS));
    }
    let pod = manager.pod(&request.pod_uid).ok_or_else(|| String::from("no such pod"))?;
    maker.make(pod, kind, count).await.map_err(|error| error.to_string())
}

/// Sends a message; how many descriptors went with it.
async fn send(socket: &Socket, kind: agent_message::Kind, fds: &[BorrowedFd<'_>]) -> Result<usize, HandoverError> {
    let bytes = node::AgentMessage { kind: Some(kind) }.encode_to_vec();
    tokio::time::timeout(PATIENCE, socket.send(&bytes, fds)).await.map_err(|_| HandoverError::Slow("read"))??;
    Ok(fds.len())
}

async fn receive(socket: &Socket) -> Result<(proxy_message::Kind, Vec<OwnedFd>), HandoverError> {
    let (bytes, fds) = socket.recv(MAX_MESSAGE).await?;
    match node::ProxyMessage::decode(bytes)?.kind {
        Some(kind) => Ok((kind, fds)),
        None => Err(HandoverError::Protocol("a message of an unknown kind")),
    }
}
