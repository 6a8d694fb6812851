//! The conversation with the agent of this node: pods and their sockets come in, acknowledgements and orders for more
//! sockets go out. While the agent is away everything goes on; when it is back, both compare what they know. It has a
//! thread of its own: a connection that waits for a socket waits a second at most, whatever else the process does.

use std::collections::HashSet;
use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesOrdered;
use mesh_model::address::ip_from_bytes;
use mesh_proto::node::{self, agent_message, proxy_message};
use mesh_runtime::ready::Pending;
use mesh_runtime::seqpacket::{self, MAX_MESSAGE, Socket};
use prost::Message;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::pods::{Pods, Port, Removal, StillAlive};
use super::sockets::{Notice, SocketKind, Want};

/// The version of the messages that this proxy speaks. From 2 on it says that the proxy answers DNS.
const VERSION: u32 = 2;
/// The oldest version that it speaks.
const OLDEST: u32 = 1;

/// Time for the agent to answer the first message.
const HELLO: Duration = Duration::from_secs(5);

/// Longest wait between two attempts to reach the agent. An attempt costs two system calls, while the stock of sockets lasts
/// for a fraction of a second: a new agent must be found at once.
const MAX_BACKOFF: Duration = Duration::from_millis(100);

/// Time between two sweeps of the stocks: see [`super::sockets::Stock::sweep`].
const SWEEP: Duration = Duration::from_secs(1);

/// Why the conversation ended.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The socket failed, or the agent closed it.
    #[error("the agent's socket: {0}")]
    Socket(#[from] seqpacket::Error),
    /// Not a message.
    #[error("a message of the agent is malformed: {0}")]
    Decode(#[from] prost::DecodeError),
    /// The first message was another one, or none.
    #[error("the agent did not say hello within 5 s; is it another program's socket?")]
    NoHello,
    /// The agent speaks no version.
    #[error(
        "the agent speaks version {0} of the messages, this proxy {VERSION}: roll both DaemonSets to releases next to each other"
    )]
    Version(u32),
}

/// The proxy's end of the conversation.
pub struct Handover {
    /// Path of the agent's socket.
    pub agent_socket: PathBuf,
    /// Where pods are put.
    pub pods: Arc<Pods>,
    /// What stocks lack.
    pub notices: mpsc::UnboundedReceiver<Notice>,
    /// Finished when the agent has told all that it knows.
    pub pending: Option<Pending>,
}

/// Where removals report what they could not end.
type Failed = mpsc::UnboundedSender<StillAlive>;

/// What belongs to one connection to the agent.
struct Exchange<'a> {
    failed: &'a Failed,
    /// Collects the announced pods until the agent has told all.
    known: Option<HashSet<String>>,
    /// Acknowledgements, in the order of the messages; removals take time, and hold up nothing else.
    acks: FuturesOrdered<BoxFuture<'static, node::Ack>>,
}

impl Handover {
    /// Talks to the agent on a thread of its own, until the process ends. What comes out is a reason to end it.
    ///
    /// # Errors
    /// When the thread or its runtime cannot be made.
    pub fn start(self) -> io::Result<oneshot::Receiver<StillAlive>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (failed, failure) = oneshot::channel();
        std::thread::Builder::new().name(String::from("handover")).spawn(move || {
            // Without a receiver the process is ending already.
            let _ = failed.send(runtime.block_on(self.run()));
        })?;
        Ok(failure)
    }

    /// Talks to the agent, and connects again whenever it goes away, until something of a removed pod cannot be ended.
    pub async fn run(mut self) -> StillAlive {
        let (failed, mut failure) = mpsc::unbounded_channel();
        tokio::select! {
            // First the agent is told.
            biased;
            never = self.talk(&failed) => match never {},
            Some(still_alive) = failure.recv() => still_alive,
        }
    }

    async fn talk(&mut self, failed: &Failed) -> Infallible {
        let mut backoff = Backoff::default();
        loop {
            let begun = tokio::time::Instant::now();
            let error = match Socket::connect(&self.agent_socket) {
                Ok(socket) => match self.converse(&socket, failed).await {
                    Ok(never) => match never {},
                    Err(error) => error,
                },
                Err(error) => error.into(),
            };
            if begun.elapsed() > MAX_BACKOFF {
                backoff = Backoff::default();
            }
            let wait = backoff.next();
            tracing::warn!(%error, socket = %self.agent_socket.display(), retry_in = ?wait, "no agent");
            tokio::time::sleep(wait).await;
        }
    }

    async fn converse(&mut self, socket: &Socket, failed: &Failed) -> Result<Infallible, HandoverError> {
        self.greet(socket).await?;
        // Orders to the last agent are lost; those in the queue are made anew.
        while self.notices.try_recv().is_ok() {}
        for stock in self.pods.stocks() {
            stock.prime();
        }
        tracing::info!(socket = %self.agent_socket.display(), "connected to the agent");
        let mut exchange = Exchange { failed, known: Some(HashSet::new()), acks: FuturesOrdered::new() };
        let mut sweeps = interval(SWEEP);
        sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                received = socket.recv(MAX_MESSAGE) => {
                    let (message, fds) = received?;
                    self.take(&mut exchange, node::AgentMessage::decode(message)?, fds);
                }
                Some(ack) = exchange.acks.next() => send(socket, proxy_message::Kind::Ack(ack), &[]).await?,
                Some(notice) = self.notices.recv() => self.order(socket, &notice).await?,
                _ = sweeps.tick() => self.pods.stocks().iter().for_each(|stock| stock.sweep()),
            }
        }
    }

    /// Says hello and returns the listening sockets of an earlier agent.
    async fn greet(&self, socket: &Socket) -> Result<(), HandoverError> {
        let kept = self.pods.listeners();
        let kept_pods = u32::try_from(kept.len()).unwrap_or(u32::MAX);
        let hello = node::Hello { version: VERSION, kept_pods };
        send(socket, proxy_message::Kind::Hello(hello), &[]).await?;
        for (uid, listeners) in kept {
            let fds: Vec<BorrowedFd<'_>> = listeners.iter().map(|(_, fd)| fd.as_fd()).collect();
            let listeners = listeners.iter().map(|(port, _)| Port::to_wire(*port) as i32).collect();
            let kept = node::PodKept { pod_uid: uid.as_ref().to_owned(), listeners };
            send(socket, proxy_message::Kind::PodKept(kept), &fds).await?;
        }
        let (message, _) = timeout(HELLO, socket.recv(MAX_MESSAGE)).await.map_err(|_| HandoverError::NoHello)??;
        match node::AgentMessage::decode(message)?.kind {
            Some(agent_message::Kind::Hello(hello)) if hello.version >= OLDEST => Ok(()),
            Some(agent_message::Kind::Hello(hello)) => Err(HandoverError::Version(hello.version)),
            Some(_) | None => Err(HandoverError::NoHello),
        }
    }

    /// Does what one message says.
    fn take(&mut self, exchange: &mut Exchange<'_>, message: node::AgentMessage, fds: Vec<OwnedFd>) {
        match message.kind {
            Some(agent_message::Kind::PodAdded(added)) => {
                let uid = added.pod.as_ref().map(|pod| pod.uid.clone()).unwrap_or_default();
                let (result, replaced) = self.pods.add(added.pod.as_ref(), &added.listeners, fds);
                if let Some(replaced) = replaced {
                    tracing::warn!(pod_uid = uid, "a pod that is served has another sandbox now; the old one is ended");
                    drop(exchange.end(replaced));
                }
                let error = result.err().map(|error| error.to_string()).unwrap_or_default();
                if !error.is_empty() {
                    tracing::error!(error, pod_uid = uid, "cannot serve a pod");
                }
                if let Some(known) = &mut exchange.known {
                    known.insert(uid.clone());
                }
                exchange.acks.push_back(Box::pin(async { node::Ack { pod_uid: uid, error } }));
            }
            Some(agent_message::Kind::PodRemoved(node::PodRemoved { pod_uid })) => {
                if let Some(known) = &mut exchange.known {
                    known.remove(&pod_uid);
                }
                let ended = self.pods.remove(&pod_uid).map(|removal| exchange.end(removal));
                exchange.acks.push_back(Box::pin(async move {
                    let error = match ended {
                        Some(ended) => ended.await,
                        None => String::new(),
                    };
                    node::Ack { pod_uid, error }
                }));
            }
            Some(agent_message::Kind::SnapshotSent(_)) => {
                if let Some(known) = exchange.known.take() {
                    for removal in self.pods.retain(&known) {
                        drop(exchange.end(removal));
                    }
                }
                drop(self.pending.take());
            }
            Some(agent_message::Kind::Sockets(sockets)) => {
                if !sockets.error.is_empty() {
                    tracing::warn!(pod_uid = sockets.pod_uid, error = sockets.error, "the agent gave fewer sockets");
                }
                let Some(stock) = self.pods.stock(&sockets.pod_uid) else { return };
                if let Some(kind) = SocketKind::from_wire(sockets.kind) {
                    stock.fill(kind, fds);
                } else if sockets.kind == node::SocketKind::DnsReply as i32
                    && let Ok(resolver) = ip_from_bytes(&sockets.address)
                {
                    stock.fill_reply(resolver, fds.into_iter().next());
                }
            }
            // A newer agent may say more; what is not known here is not needed here.
            Some(agent_message::Kind::Hello(_)) | None => {}
        }
    }

    async fn order(&self, socket: &Socket, notice: &Notice) -> Result<(), HandoverError> {
        let Some(stock) = self.pods.stock(&notice.pod_uid) else { return Ok(()) };
        let pod_uid = || notice.pod_uid.as_ref().to_owned();
        match notice.want {
            Want::Shelf(kind) => {
                let wire = kind.to_wire() as i32;
                while let Some(count) = stock.next_order(kind) {
                    let request = node::SocketRequest { pod_uid: pod_uid(), kind: wire, count, address: Vec::new() };
                    send(socket, proxy_message::Kind::SocketRequest(request), &[]).await?;
                }
            }
            Want::Reply(resolver) => {
                if !stock.next_reply(resolver) {
                    return Ok(());
                }
                let address = match resolver {
                    IpAddr::V4(v4) => v4.octets().to_vec(),
                    IpAddr::V6(v6) => v6.octets().to_vec(),
                };
                let kind = node::SocketKind::DnsReply as i32;
                let request = node::SocketRequest { pod_uid: pod_uid(), kind, count: 1, address };
                send(socket, proxy_message::Kind::SocketRequest(request), &[]).await?;
            }
        }
        Ok(())
    }
}

impl Exchange<'_> {
    /// Ends what lives in a pod, whatever becomes of this exchange. Resolves to what is wrong, for the acknowledgement.
    fn end(&self, removal: Removal) -> impl Future<Output = String> + Send + 'static {
        let failed = self.failed.clone();
        let ended = tokio::spawn(async move {
            let Err(still_alive) = removal.ended().await else { return String::new() };
            let error = still_alive.to_string();
            // Nothing may come after this: the agent must have the reason before the process ends.
            let _ = failed.send(still_alive);
            error
        });
        async { ended.await.unwrap_or_else(|error| error.to_string()) }
    }
}

async fn send(socket: &Socket, kind: proxy_message::Kind, fds: &[BorrowedFd<'_>]) -> Result<(), HandoverError> {
    let message = node::ProxyMessage { kind: Some(kind) };
    Ok(socket.send(&message.encode_to_vec(), fds).await?)
}

/// Waits that double from 50 ms to [`MAX_BACKOFF`], each with up to a quarter more at random.
#[derive(Default)]
struct Backoff {
    attempts: u32,
}

impl Backoff {
    fn next(&mut self) -> Duration {
        let base = Duration::from_millis(50).saturating_mul(1 << self.attempts.min(10)).min(MAX_BACKOFF);
        self.attempts += 1;
        base + base.mul_f64(fastrand::f64() / 4.0)
    }
}
