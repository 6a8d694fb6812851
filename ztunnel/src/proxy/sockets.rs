//! Sockets in a pod's network namespace, where the proxy itself cannot go: the trait by which the data path asks for
//! one, and the stock that answers from what the agent has handed over.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use mesh_proto::node;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::IpBindAddressNoPort;
use socket2::{SockRef, TcpKeepalive};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

#[cfg(test)]
mod tests;

/// Longest time that a connection waits for a socket when the stock is empty. A fiftieth of it is plenty for the agent's
/// answer; but an agent that is rolled out is away for seconds, and what waits for the next one is not lost.
pub const STOCK_WAIT: Duration = Duration::from_secs(5);

/// Most sockets of one kind that lie in stock for one pod.
const SHELF_CAP: usize = 64;

/// Most descriptors that one message can carry (SCM_MAX_FD of the kernel).
const BATCH_CAP: usize = 253;

/// Sockets kept ready for a pod that has used any lately.
const WARM_STOCK: usize = 2;

/// Sweeps without use after which a pod is no longer warm.
const WARM_SWEEPS: u32 = 30;

/// An order that the agent has not answered by then is forgotten, and made again when needed.
const ORDER_LIFE: Duration = Duration::from_secs(2);

/// Silence after which a connection's peer is asked whether it is still there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);

/// Pause between two such questions.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// Questions without an answer after which the connection has failed: a peer that died is found in two minutes.
const KEEPALIVE_PROBES: u32 = 6;

/// Resolvers that sockets are on order for, one pod: more are refused.
const REPLIES_CAP: usize = 16;

/// A family of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address; an IPv4 address mapped into IPv6 is IPv4.
    pub fn of(ip: IpAddr) -> Self {
        if ip.to_canonical().is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// What a socket is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SocketKind {
    /// TCP to the next hop, exempt from capture.
    Upstream(Family),
    /// TCP to the pod's own application: transparent, so that it can be bound to the client's address.
    Delivery(Family),
    /// UDP to the resolver that an application asked, exempt from capture.
    DnsUpstream(Family),
}

impl SocketKind {
    /// All kinds.
    pub const ALL: [Self; 6] = [
        Self::Upstream(Family::V4),
        Self::Upstream(Family::V6),
        Self::Delivery(Family::V4),
        Self::Delivery(Family::V6),
        Self::DnsUpstream(Family::V4),
        Self::DnsUpstream(Family::V6),
    ];

    /// The kind as the agent knows it.
    pub fn to_wire(self) -> node::SocketKind {
        match self {
            Self::Upstream(Family::V4) => node::SocketKind::UpstreamV4,
            Self::Upstream(Family::V6) => node::SocketKind::UpstreamV6,
            Self::Delivery(Family::V4) => node::SocketKind::DeliveryV4,
            Self::Delivery(Family::V6) => node::SocketKind::DeliveryV6,
            Self::DnsUpstream(Family::V4) => node::SocketKind::DnsUpstreamV4,
            Self::DnsUpstream(Family::V6) => node::SocketKind::DnsUpstreamV6,
        }
    }

    /// Its family.
    pub fn family(self) -> Family {
        match self {
            Self::Upstream(family) | Self::Delivery(family) | Self::DnsUpstream(family) => family,
        }
    }

    /// The kind as dumps show it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Upstream(Family::V4) => "upstreamV4",
            Self::Upstream(Family::V6) => "upstreamV6",
            Self::Delivery(Family::V4) => "deliveryV4",
            Self::Delivery(Family::V6) => "deliveryV6",
            Self::DnsUpstream(Family::V4) => "dnsUpstreamV4",
            Self::DnsUpstream(Family::V6) => "dnsUpstreamV6",
        }
    }

    /// Whether a pod gets some of them before it has asked for any: what its first connection needs.
    fn is_stocked_early(self) -> bool {
        match self {
            Self::Upstream(_) | Self::Delivery(_) => true,
            Self::DnsUpstream(_) => false,
        }
    }

    /// The kind that the agent means; none for one that is not known here.
    pub fn from_wire(kind: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.to_wire() as i32 == kind)
    }
}

/// Why there is no socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TakeError {
    /// The stock is empty and the agent did not refill it in [`STOCK_WAIT`].
    #[error(
        "no socket in the pod's namespace is in stock and the agent gave none within a second; see the agent's log"
    )]
    Empty,
    /// The pod is gone.
    #[error("the pod is gone")]
    PodGone,
}

/// Sets what a socket needs before it is bound. Done when a socket is put into stock, where nobody waits for it.
///
/// # Errors
/// When the descriptor is no socket of that kind.
pub fn prepare(kind: SocketKind, socket: &OwnedFd) -> io::Result<()> {
    let known = SockRef::from(socket);
    known.set_nonblocking(true)?;
    match kind {
        SocketKind::Upstream(_) => {
            tune(&known)?;
            // The port is chosen at connect, per destination; otherwise bind would use up one port per socket.
            Ok(setsockopt(socket, IpBindAddressNoPort, &true)?)
        }
        SocketKind::Delivery(_) => {
            // No keepalive: the other end is in the same kernel, and never goes without a word.
            known.set_tcp_nodelay(true)?;
            // Ports in TIME_WAIT may be used again: only the whole of both addresses must be new, which connect checks.
            known.set_reuse_address(true)
        }
        SocketKind::DnsUpstream(_) => is_datagram(&known),
    }
}

fn is_datagram(socket: &SockRef<'_>) -> io::Result<()> {
    let is = socket.r#type()? == socket2::Type::DGRAM;
    is.then_some(()).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a UDP socket"))
}

/// Sets what every connection has that may lose its other end. A listening socket hands it on to what it accepts.
///
/// # Errors
/// When the socket is no TCP socket.
pub fn tune(socket: &SockRef<'_>) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    // Tunnels have their own, faster keepalive.
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL);
    socket.set_tcp_keepalive(&keepalive.with_retries(KEEPALIVE_PROBES))
}

/// Gives out fresh sockets that live in one pod's network namespace, and in no other.
pub trait SocketSource: Send + Sync {
    /// A fresh, unbound, unconnected socket, as [`prepare`] leaves it.
    fn take(&self, kind: SocketKind) -> BoxFuture<'_, Result<OwnedFd, TakeError>>;

    /// A UDP socket that is bound to the address of `resolver`, which answers to the pod's applications come from.
    /// All who wait for one get the same.
    fn reply(&self, resolver: IpAddr) -> BoxFuture<'_, Result<Arc<OwnedFd>, TakeError>>;
}

/// How many sockets lie in stock on this node, all pods together, and how many may.
#[derive(Debug)]
pub struct NodeCap {
    idle: AtomicUsize,
    cap: usize,
}

impl NodeCap {
    /// Room for `cap` sockets.
    pub fn new(cap: usize) -> Arc<Self> {
        Arc::new(Self { idle: AtomicUsize::new(0), cap })
    }

    /// Sockets in stock now.
    pub fn idle(&self) -> usize {
        self.idle.load(Ordering::Relaxed)
    }

    fn room(&self) -> usize {
        self.cap.saturating_sub(self.idle())
    }

    fn add(&self) -> bool {
        let more = |idle: usize| (idle < self.cap).then_some(idle + 1);
        self.idle.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    fn remove(&self, count: usize) {
        self.idle.fetch_sub(count, Ordering::Relaxed);
    }
}

/// A pod lacks sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Which pod.
    pub pod_uid: Arc<str>,
    /// Which sockets.
    pub want: Want,
}

/// What is lacking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// A shelf wants an order to be made: see [`Stock::next_order`].
    Shelf(SocketKind),
    /// One socket is to be bound for this resolver: see [`SocketSource::reply`].
    Reply(IpAddr),
}

/// The stock of one pod. Taken from by every worker thread, filled by the hand-over task.
#[derive(Debug)]
pub struct Stock {
    pod_uid: Arc<str>,
    shelves: [Mutex<Shelf>; 6],
    /// Sockets that are to be bound for a resolver.
    replies: Mutex<HashMap<IpAddr, Reply>>,
    node: Arc<NodeCap>,
    notices: mpsc::UnboundedSender<Notice>,
}

/// A socket that is to be bound for one resolver.
#[derive(Debug, Default)]
struct Reply {
    /// All of them get the same one.
    waiting: Vec<oneshot::Sender<Arc<OwnedFd>>>,
    /// A notice is on its way.
    noticed: bool,
    /// When the agent was asked, unless it has answered.
    ordered: Option<Instant>,
}

impl Reply {
    fn is_wanted(&mut self) -> bool {
        self.waiting.retain(|waiter| !waiter.is_closed());
        !self.waiting.is_empty()
    }

    /// Whether the agent was asked and may still answer.
    fn is_coming(&self, now: Instant) -> bool {
        self.ordered.is_some_and(|when| now.duration_since(when) <= ORDER_LIFE)
    }
}

/// Sockets of one kind.
#[derive(Debug, Default)]
struct Shelf {
    idle: Vec<OwnedFd>,
    waiting: VecDeque<oneshot::Sender<OwnedFd>>,
    /// Orders not yet answered, oldest first: when, and how many.
    ordered: VecDeque<(Instant, usize)>,
    /// A notice is on its way.
    noticed: bool,
    closed: bool,
    taken_now: usize,
    taken_before: usize,
    quiet_sweeps: u32,
}

impl Shelf {
    /// What was not answered in [`ORDER_LIFE`] will not be.
    fn forget_old_orders(&mut self, now: Instant) {
        if self.ordered.front().is_some_and(|(when, _)| now.duration_since(*when) > ORDER_LIFE) {
            self.ordered.clear();
        }
    }

    /// How many should lie here: what is taken in an eighth of a second.
    fn target(&self) -> usize {
        if self.quiet_sweeps >= WARM_SWEEPS {
            return 0;
        }
        (self.taken_now.max(self.taken_before) / 8).clamp(WARM_STOCK, SHELF_CAP)
    }

    /// How many more are needed than are on their way.
    fn lack(&mut self, room: usize) -> usize {
        self.waiting.retain(|waiter| !waiter.is_closed());
        let coming: usize = self.ordered.iter().map(|(_, count)| count).sum();
        let stock = self.target().min(self.idle.len() + room);
        (self.waiting.len() + stock).saturating_sub(self.idle.len() + coming)
    }

    /// Whether it is time to order: somebody waits for nothing, or half of the stock is gone.
    fn is_low(&mut self, room: usize) -> bool {
        let lack = self.lack(room);
        let coming: usize = self.ordered.iter().map(|(_, count)| count).sum();
        lack > 0 && (self.waiting.len() > coming || lack > self.target() / 2)
    }
}

impl Stock {
    /// An empty stock of a pod that has these addresses. What it needs is told through `notices`.
    pub fn new(
        pod_uid: Arc<str>,
        addresses: &[IpAddr],
        node: Arc<NodeCap>,
        notices: mpsc::UnboundedSender<Notice>,
    ) -> Arc<Self> {
        let stock = Self { pod_uid, shelves: Default::default(), replies: Mutex::default(), node, notices };
        for kind in SocketKind::ALL {
            // What the pod cannot or does not use yet lies in no stock until it is asked for.
            if !kind.is_stocked_early() || !addresses.iter().any(|ip| Family::of(*ip) == kind.family()) {
                stock.shelf(kind).quiet_sweeps = WARM_SWEEPS;
            }
        }
        Arc::new(stock)
    }

    /// Sockets of this kind that lie ready.
    pub fn idle(&self, kind: SocketKind) -> usize {
        self.shelf(kind).idle.len()
    }

    /// Tells the hand-over task about every shelf that is low. For a new pod, and after the agent came back.
    pub fn prime(&self) {
        for kind in SocketKind::ALL {
            let mut shelf = self.shelf(kind);
            shelf.ordered.clear();
            shelf.noticed = false;
            self.notice_if_low(kind, &mut shelf);
        }
        self.replies().retain(|resolver, reply| {
            (reply.noticed, reply.ordered) = (reply.is_wanted(), None);
            if reply.noticed {
                self.notice(Want::Reply(*resolver));
            }
            reply.noticed
        });
    }

    /// How many sockets to ask the agent for now, at most 253; they count as ordered from here on.
    pub fn next_order(&self, kind: SocketKind) -> Option<u32> {
        let now = Instant::now();
        let mut shelf = self.shelf(kind);
        shelf.noticed = false;
        shelf.forget_old_orders(now);
        let count = shelf.lack(self.node.room()).min(BATCH_CAP);
        if count == 0 || shelf.closed {
            return None;
        }
        shelf.ordered.push_back((now, count));
        u32::try_from(count).ok()
    }

    /// Takes in what the agent answered to the oldest order. Those who wait are served first; what is too much is closed.
    pub fn fill(&self, kind: SocketKind, sockets: Vec<OwnedFd>) {
        let mut too_many = Vec::new();
        let mut shelf = self.shelf(kind);
        shelf.ordered.pop_front();
        for socket in sockets.into_iter().filter(|socket| prepared(kind, socket)) {
            let Some(socket) = serve_waiting(&mut shelf.waiting, socket) else { continue };
            if !shelf.closed && shelf.idle.len() < shelf.target() && self.node.add() {
                shelf.idle.push(socket);
            } else {
                too_many.push(socket);
            }
        }
        // No notice here: an agent that answers with nothing must not be asked again at once. The next take or sweep does.
        drop(shelf);
    }

    /// To be called once a second: closes what has become too much, and orders what has become too little.
    pub fn sweep(&self) {
        for kind in SocketKind::ALL {
            let mut shelf = self.shelf(kind);
            shelf.quiet_sweeps = if shelf.taken_now == 0 { shelf.quiet_sweeps.saturating_add(1) } else { 0 };
            shelf.taken_before = std::mem::take(&mut shelf.taken_now);
            // Half at a time: a rate that wavers must not make sockets be closed and made again every second.
            let keep = shelf.target().max(shelf.idle.len() / 2);
            let too_many = if shelf.idle.len() > keep { shelf.idle.split_off(keep) } else { Vec::new() };
            self.node.remove(too_many.len());
            self.notice_if_low(kind, &mut shelf);
            drop(shelf);
        }
    }

    /// Closes every socket in stock, for good; whoever waits is told that the pod is gone.
    pub fn close(&self) {
        for kind in SocketKind::ALL {
            let mut shelf = self.shelf(kind);
            shelf.closed = true;
            shelf.waiting.clear();
            self.node.remove(shelf.idle.len());
            shelf.idle.clear();
        }
        self.replies().clear();
    }

    /// Whether to ask the agent now for a socket for this resolver; it counts as ordered from here on.
    pub fn next_reply(&self, resolver: IpAddr) -> bool {
        let now = Instant::now();
        let mut replies = self.replies();
        let Some(reply) = replies.get_mut(&resolver) else { return false };
        reply.noticed = false;
        if reply.is_coming(now) {
            return false;
        }
        if !reply.is_wanted() {
            replies.remove(&resolver);
            return false;
        }
        reply.ordered = Some(now);
        true
    }

    /// Takes in what the agent answered to the order of a socket for this resolver; none if it gave none.
    pub fn fill_reply(&self, resolver: IpAddr, socket: Option<OwnedFd>) {
        let mut replies = self.replies();
        let Some(reply) = replies.get_mut(&resolver) else { return };
        reply.ordered = None;
        let waiting = std::mem::take(&mut reply.waiting);
        if !reply.noticed {
            replies.remove(&resolver);
        }
        drop(replies);
        // Without a socket those who wait are told at once, as their ends of the channels are dropped.
        let Some(socket) = socket.filter(|socket| is_usable_reply(resolver, socket)).map(Arc::new) else { return };
        for waiter in waiting {
            // One that gave up needs none.
            let _ = waiter.send(Arc::clone(&socket));
        }
    }

    fn order_reply(&self, resolver: IpAddr) -> Result<oneshot::Receiver<Arc<OwnedFd>>, TakeError> {
        // A closed pod has no shelf that is open.
        if self.shelf(SocketKind::DnsUpstream(Family::of(resolver))).closed {
            return Err(TakeError::PodGone);
        }
        let now = Instant::now();
        let mut replies = self.replies();
        // What is on its way stays although nobody waits: it must not be ordered twice.
        replies.retain(|_, reply| reply.is_wanted() || reply.noticed || reply.is_coming(now));
        if replies.len() >= REPLIES_CAP && !replies.contains_key(&resolver) {
            return Err(TakeError::Empty);
        }
        let (give, wait) = oneshot::channel();
        let reply = replies.entry(resolver).or_default();
        reply.waiting.push(give);
        if !reply.noticed && !reply.is_coming(now) {
            reply.noticed = true;
            self.notice(Want::Reply(resolver));
        }
        Ok(wait)
    }

    fn replies(&self) -> MutexGuard<'_, HashMap<IpAddr, Reply>> {
        // A panic in a holder leaves nothing half done that matters here.
        self.replies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shelf(&self, kind: SocketKind) -> MutexGuard<'_, Shelf> {
        let [upstream_v4, upstream_v6, delivery_v4, delivery_v6, dns_v4, dns_v6] = &self.shelves;
        let shelf = match kind {
            SocketKind::Upstream(Family::V4) => upstream_v4,
            SocketKind::Upstream(Family::V6) => upstream_v6,
            SocketKind::Delivery(Family::V4) => delivery_v4,
            SocketKind::Delivery(Family::V6) => delivery_v6,
            SocketKind::DnsUpstream(Family::V4) => dns_v4,
            SocketKind::DnsUpstream(Family::V6) => dns_v6,
        };
        // A panic in a holder leaves nothing half done that matters here.
        shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notice_if_low(&self, kind: SocketKind, shelf: &mut Shelf) {
        shelf.forget_old_orders(Instant::now());
        if shelf.noticed || shelf.closed || !shelf.is_low(self.node.room()) {
            return;
        }
        shelf.noticed = true;
        self.notice(Want::Shelf(kind));
    }

    fn notice(&self, want: Want) {
        // Without a receiver the proxy is on its way out.
        let _ = self.notices.send(Notice { pod_uid: Arc::clone(&self.pod_uid), want });
    }

    fn take_or_wait(&self, kind: SocketKind) -> Result<Result<OwnedFd, oneshot::Receiver<OwnedFd>>, TakeError> {
        let mut shelf = self.shelf(kind);
        if shelf.closed {
            return Err(TakeError::PodGone);
        }
        shelf.taken_now += 1;
        shelf.quiet_sweeps = 0;
        let taken = match shelf.idle.pop() {
            Some(socket) => {
                self.node.remove(1);
                Ok(socket)
            }
            None => {
                let (give, wait) = oneshot::channel();
                shelf.waiting.push_back(give);
                Err(wait)
            }
        };
        self.notice_if_low(kind, &mut shelf);
        Ok(taken)
    }
}

impl SocketSource for Stock {
    fn take(&self, kind: SocketKind) -> BoxFuture<'_, Result<OwnedFd, TakeError>> {
        let taken = self.take_or_wait(kind);
        Box::pin(async move {
            match taken? {
                Ok(socket) => Ok(socket),
                Err(wait) => match tokio::time::timeout(STOCK_WAIT, wait).await {
                    Ok(Ok(socket)) => Ok(socket),
                    Ok(Err(_)) => Err(TakeError::PodGone),
                    Err(_) => Err(TakeError::Empty),
                },
            }
        })
    }

    fn reply(&self, resolver: IpAddr) -> BoxFuture<'_, Result<Arc<OwnedFd>, TakeError>> {
        let ordered = self.order_reply(resolver);
        Box::pin(async move {
            match tokio::time::timeout(STOCK_WAIT, ordered?).await {
                Ok(Ok(socket)) => Ok(socket),
                Ok(Err(_)) | Err(_) => Err(TakeError::Empty),
            }
        })
    }
}

fn is_usable_reply(resolver: IpAddr, socket: &OwnedFd) -> bool {
    let known = SockRef::from(socket);
    known
        .set_nonblocking(true)
        .and_then(|()| is_datagram(&known))
        .inspect_err(|error| tracing::error!(%error, %resolver, "the agent gave an unusable socket"))
        .is_ok()
}

fn prepared(kind: SocketKind, socket: &OwnedFd) -> bool {
    prepare(kind, socket)
        .inspect_err(|error| tracing::error!(%error, ?kind, "the agent gave an unusable socket"))
        .is_ok()
}

/// Gives the socket to the first that still waits; returns it when nobody does.
fn serve_waiting(waiting: &mut VecDeque<oneshot::Sender<OwnedFd>>, mut socket: OwnedFd) -> Option<OwnedFd> {
    while let Some(waiter) = waiting.pop_front() {
        match waiter.send(socket) {
            Ok(()) => return None,
            Err(back) => socket = back,
        }
    }
    Some(socket)
}
