//! The datagrams of one pod: queries come in with the address of the resolver that was asked, and are answered from it.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_runtime::drain::Watcher;
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage, recvmsg, setsockopt, sockopt,
};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::Semaphore;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::answer::{Decision, Transport, decide};
use super::cache::{Cache, Key};
use super::forward::{ForwardError, Upstreams};
use super::message;
use super::metrics::Outcome;
use crate::proxy::live::{Full, Token};
use crate::proxy::open::Open;
use crate::proxy::pods::Pod;
use crate::proxy::sockets::TakeError;
use crate::proxy::worker::Worker;

/// Longest query.
const MAX_QUERY: usize = 4096;

/// Queries of one pod that wait for resolvers, or for a socket to answer from.
const IN_FLIGHT: usize = 512;

/// Resolvers of one pod that a socket is kept for.
const REPLIES: usize = 8;

/// Longest that the kernel may take to accept an answer.
const SEND: Duration = Duration::from_secs(1);

/// Pause after a failed receive, which is a shortage of memory.
const PAUSE: Duration = Duration::from_millis(100);

/// Time between two looks for sockets that nobody uses.
const SWEEP: Duration = Duration::from_secs(1);

/// What serves one pod.
struct Server {
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    upstreams: Upstreams,
    cache: Mutex<Cache>,
    replies: Mutex<Vec<(IpAddr, Arc<Open<UdpSocket>>)>>,
    in_flight: Arc<Semaphore>,
}

/// A query as it came.
#[derive(Debug, Clone, Copy)]
struct Asked {
    from: SocketAddr,
    resolver: SocketAddr,
}

/// Makes a UDP socket tell which address each datagram was sent to, and ready for [`serve`].
///
/// # Errors
/// When it is no UDP socket.
pub fn prepare(socket: &OwnedFd) -> io::Result<()> {
    let known = SockRef::from(socket);
    known.set_nonblocking(true)?;
    if known.r#type()? != socket2::Type::DGRAM {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a UDP socket"));
    }
    setsockopt(socket, sockopt::Ipv4OrigDstAddr, &true)?;
    if known.domain()? == socket2::Domain::IPV6 {
        setsockopt(socket, sockopt::Ipv6OrigDstAddr, &true)?;
    }
    Ok(())
}

/// Answers what comes to `socket` until the pod is gone or the proxy drains.
pub async fn serve(worker: Arc<Worker>, pod: Arc<Pod>, socket: OwnedFd, drain: Watcher) {
    let _token = pod.live.token();
    let socket = match UdpSocket::from_std(std::net::UdpSocket::from(socket)) {
        Ok(socket) => socket,
        Err(error) => return tracing::error!(%error, ?pod, "cannot serve DNS"),
    };
    let server = Arc::new(Server {
        upstreams: Upstreams::new(Arc::clone(&pod.sockets), Arc::clone(&pod.open)),
        cache: Mutex::default(),
        replies: Mutex::default(),
        in_flight: Arc::new(Semaphore::new(IN_FLIGHT)),
        worker,
        pod: Arc::clone(&pod),
    });
    let ended = async {
        tokio::select! {
            () = pod.live.closed() => {}
            () = drain.draining() => {}
        }
    };
    tokio::pin!(ended);
    let mut random = fastrand::Rng::new();
    let mut buffer = vec![0; MAX_QUERY];
    let mut sweeps = interval(SWEEP);
    sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let received = tokio::select! {
            biased;
            () = &mut ended => return,
            _ = sweeps.tick() => {
                server.upstreams.sweep();
                server.cache().sweep(Instant::now());
                continue;
            }
            received = receive(&socket, &mut buffer) => received,
        };
        let metrics = &server.worker.shared.dns.metrics;
        let (length, asked) = match received {
            Ok(Some(received)) => received,
            Ok(None) => {
                metrics.count(Outcome::Invalid);
                continue;
            }
            Err(error) => {
                tracing::debug!(%error, ?pod, "receiving a query failed");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        if !pod.dns.take() {
            metrics.count(Outcome::RateLimited);
            continue;
        }
        match buffer.get(..length) {
            Some(query) if server.is_own(asked) => server.take(query, asked, &mut random, &drain),
            Some(_) | None => metrics.count(Outcome::Invalid),
        }
    }
}

impl Server {
    /// Whether the pod itself asks somebody else. The listening socket can be reached from outside as well.
    fn is_own(&self, asked: Asked) -> bool {
        let Asked { from, resolver } = asked;
        let ip = resolver.ip();
        let somebody = !ip.is_unspecified() && !ip.is_multicast() && !self.pod.addresses.contains(&ip);
        self.pod.addresses.contains(&from.ip()) && somebody && resolver.port() == self.worker.shared.dns.port
    }

    /// Does with a query what is to be done.
    fn take(self: &Arc<Self>, query: &[u8], asked: Asked, random: &mut fastrand::Rng, drain: &Watcher) {
        let shared = &self.worker.shared;
        let metrics = &shared.dns.metrics;
        let snapshot = shared.state.is_complete().then(|| shared.state.snapshot());
        let local = shared.local(&self.pod);
        let decision = decide(snapshot.as_deref(), &local, &shared.dns.domain, query, Transport::Udp, random);
        let work = match decision {
            Decision::Drop => return metrics.count(Outcome::Invalid),
            Decision::Answer(answer, outcome) => Work::Send(answer, outcome),
            Decision::Forward => {
                let key = Key::of(asked.resolver.ip(), query);
                match key.as_ref().and_then(|key| self.cache().get(key, query, Instant::now())) {
                    Some(answer) => Work::Send(answer, Outcome::Cached),
                    None => Work::Ask(query.to_vec(), key),
                }
            }
        };
        if let Work::Send(answer, outcome) = &work
            && let Some(socket) = self.known_reply(asked.resolver.ip())
            && socket.try_send_to(answer, asked.from).is_ok()
        {
            return metrics.count(*outcome);
        }
        let Ok(permit) = Arc::clone(&self.in_flight).try_acquire_owned() else {
            return metrics.count(Outcome::Overloaded);
        };
        let (server, drain, token) = (Arc::clone(self), drain.clone(), self.pod.live.token());
        let turn = self.worker.turns.of(&self.pod.uid);
        tokio::spawn(turn.run(async move {
            let _held: (_, Watcher, Token) = (permit, drain, token);
            tokio::select! {
                () = server.finish(work, asked) => {}
                () = server.pod.live.closed() => {}
            }
        }));
    }

    async fn finish(&self, work: Work, asked: Asked) {
        let metrics = &self.worker.shared.dns.metrics;
        let (answer, outcome) = match work {
            Work::Send(answer, outcome) => (answer, outcome),
            Work::Ask(query, key) => {
                let mut resolver = asked.resolver;
                resolver.set_port(self.worker.shared.dns.upstream_port);
                let answer = self.upstreams.ask(resolver, &query, metrics).await;
                if let (Ok(answer), Some(key)) = (&answer, key) {
                    self.cache().put(key, answer, Instant::now());
                }
                let answer = match answer {
                    Ok(answer) => answer,
                    Err(error) => {
                        tracing::debug!(%error, pod = ?self.pod, "a query was not answered");
                        match error {
                            ForwardError::Timeout(_) | ForwardError::NoSocket(TakeError::PodGone) => {
                                return metrics.count(Outcome::Forwarded);
                            }
                            // Who asks goes on with the next resolver at once, as without the mesh.
                            ForwardError::Refused { .. }
                            | ForwardError::TooManySockets
                            | ForwardError::NoSocket(TakeError::Empty) => {
                                let Some(failure) = message::failure(&query) else {
                                    return metrics.count(Outcome::Forwarded);
                                };
                                failure
                            }
                        }
                    }
                };
                (answer, Outcome::Forwarded)
            }
        };
        // Without a socket that is what became of the query, whatever the answer was.
        metrics.count(self.send(&answer, asked).await.err().unwrap_or(outcome));
    }

    /// Sends an answer from the address of the resolver that was asked.
    async fn send(&self, answer: &[u8], asked: Asked) -> Result<(), Outcome> {
        let socket = match self.reply(asked.resolver.ip()).await {
            Ok(socket) => socket,
            Err(error) => {
                tracing::debug!(%error, pod = ?self.pod, resolver = %asked.resolver, "no socket to answer from");
                return Err(Outcome::NoSocket);
            }
        };
        if !matches!(timeout(SEND, socket.send_to(answer, asked.from)).await, Ok(Ok(_))) {
            tracing::debug!(pod = ?self.pod, to = %asked.from, "an answer could not be sent");
        }
        Ok(())
    }

    /// The socket for this resolver if there is one; it becomes the last to be given up.
    fn known_reply(&self, resolver: IpAddr) -> Option<Arc<Open<UdpSocket>>> {
        let mut replies = self.replies();
        let at = replies.iter().position(|(known, _)| *known == resolver)?;
        let found = replies.remove(at);
        let socket = Arc::clone(&found.1);
        replies.push(found);
        Some(socket)
    }

    async fn reply(&self, resolver: IpAddr) -> Result<Arc<Open<UdpSocket>>, TakeError> {
        if let Some(socket) = self.known_reply(resolver) {
            return Ok(socket);
        }
        let socket = self.pod.sockets.reply(resolver).await?;
        // All who wait for this resolver get the same one: the first of this thread registers it.
        if let Some(socket) = self.known_reply(resolver) {
            return Ok(socket);
        }
        let unusable = |error: io::Error| {
            tracing::error!(%error, "cannot use a socket to answer from");
            TakeError::Empty
        };
        let own = self.pod.open.enter(socket.try_clone().map_err(unusable)?).map_err(|(full, _)| match full {
            Full::TooMany => TakeError::Empty,
            Full::PodGone => TakeError::PodGone,
        })?;
        let socket = Arc::new(own.map(|socket| UdpSocket::from_std(socket.into())).map_err(unusable)?);
        let mut replies = self.replies();
        replies.retain(|(known, _)| *known != resolver);
        if replies.len() >= REPLIES {
            replies.remove(0);
        }
        replies.push((resolver, Arc::clone(&socket)));
        Ok(socket)
    }

    fn replies(&self) -> MutexGuard<'_, Vec<(IpAddr, Arc<Open<UdpSocket>>)>> {
        // A list of sockets is never half done.
        self.replies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        // At worst an answer is missing.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is left to do with a query.
enum Work {
    Send(Vec<u8>, Outcome),
    Ask(Vec<u8>, Option<Key>),
}

/// The next datagram; none if it is longer than a query, or has no address.
async fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<Option<(usize, Asked)>> {
    socket.async_io(Interest::READABLE, || receive_now(socket, buffer)).await
}

fn receive_now(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<Option<(usize, Asked)>> {
    let mut control = nix::cmsg_space!(libc::sockaddr_in, libc::sockaddr_in6);
    let mut parts = [IoSliceMut::new(buffer)];
    let received =
        recvmsg::<SockaddrStorage>(socket.as_fd().as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty())?;
    let from = received.address.as_ref().and_then(address);
    let mut to = None;
    for message in received.cmsgs()? {
        match message {
            ControlMessageOwned::Ipv4OrigDstAddr(v4) => to = Some(SocketAddrV4::from(SockaddrIn::from(v4)).into()),
            ControlMessageOwned::Ipv6OrigDstAddr(v6) => to = Some(SocketAddrV6::from(SockaddrIn6::from(v6)).into()),
            _ => {}
        }
    }
    let (Some(from), Some(to)) = (from, to) else { return Ok(None) };
    if received.flags.contains(MsgFlags::MSG_TRUNC) {
        return Ok(None);
    }
    Ok(Some((received.bytes, Asked { from: canonical(from), resolver: canonical(to) })))
}

fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = storage.as_sockaddr_in().map(|v4| SocketAddrV4::from(*v4).into());
    v4.or_else(|| storage.as_sockaddr_in6().map(|v6| SocketAddrV6::from(*v6).into()))
}

/// An IPv4-mapped address as the IPv4 address that it means; the interface of others is kept.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        v4 @ IpAddr::V4(_) => SocketAddr::new(v4, address.port()),
        IpAddr::V6(_) => address,
    }
}
