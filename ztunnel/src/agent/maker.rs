//! The thread that makes sockets in pods' namespaces: it enters one per batch and returns, so that it keeps none alive.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, mpsc};
use std::thread;

use mesh_proto::node::{SocketKind, SocketRequest};
use nix::sched::{CloneFlags, setns};
use tokio::sync::oneshot;

use super::host::Host;
use super::netns::NetnsError;
use super::pod::{EnrolError, Pod};
use super::sockets::{self, Family, SocketError};

/// Batches that wait; a proxy has one under way at a time.
const QUEUE: usize = 16;

/// Makes sockets. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Maker(mpsc::SyncSender<Batch>);

struct Batch {
    pod: Arc<Pod>,
    kind: Kind,
    count: usize,
    made: oneshot::Sender<Result<Vec<OwnedFd>, MakeError>>,
}

/// What is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// To the next hop.
    Upstream(Family),
    /// To the pod's own application.
    Delivery(Family),
    /// Queries to a resolver.
    DnsUpstream(Family),
    /// Answers in the name of the resolver with this address.
    DnsReply(IpAddr),
}

/// Why no socket was made.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// The message asks for something else.
    #[error("unknown kind of socket")]
    Kind,
    /// The address that comes with the request is none, or is wanted and missing, or has no place in it.
    #[error("an address of 4 or 16 bytes comes with a request for one DNS_REPLY, and with no other")]
    Address,
    /// In the namespace, or exempting the socket.
    #[error(transparent)]
    Pod(#[from] EnrolError),
    /// The thread is gone, or its queue is full.
    #[error("the agent cannot make sockets now")]
    Busy,
}

impl TryFrom<&SocketRequest> for Kind {
    type Error = MakeError;

    fn try_from(request: &SocketRequest) -> Result<Self, MakeError> {
        let address = request.address.as_slice();
        let kind = match SocketKind::try_from(request.kind) {
            Ok(SocketKind::UpstreamV4) => Self::Upstream(Family::V4),
            Ok(SocketKind::UpstreamV6) => Self::Upstream(Family::V6),
            Ok(SocketKind::DeliveryV4) => Self::Delivery(Family::V4),
            Ok(SocketKind::DeliveryV6) => Self::Delivery(Family::V6),
            Ok(SocketKind::DnsUpstreamV4) => Self::DnsUpstream(Family::V4),
            Ok(SocketKind::DnsUpstreamV6) => Self::DnsUpstream(Family::V6),
            Ok(SocketKind::DnsReply) if request.count == 1 => {
                let v4 = <[u8; 4]>::try_from(address).map(IpAddr::from);
                let address = v4.or_else(|_| <[u8; 16]>::try_from(address).map(IpAddr::from));
                return address.map(Self::DnsReply).map_err(|_| MakeError::Address);
            }
            Ok(SocketKind::DnsReply) => return Err(MakeError::Address),
            Ok(SocketKind::Unspecified) | Err(_) => return Err(MakeError::Kind),
        };
        if address.is_empty() { Ok(kind) } else { Err(MakeError::Address) }
    }
}

impl Maker {
    /// Starts the thread; it ends with the last clone.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(host: Arc<Host>) -> io::Result<Self> {
        let home = host.home().try_clone()?;
        let (batches, queue) = mpsc::sync_channel::<Batch>(QUEUE);
        thread::Builder::new().name(String::from("sockets")).spawn(move || {
            while let Ok(Batch { pod, kind, count, made }) = queue.recv() {
                // Whoever asked may have gone: then the sockets are closed.
                let _ = made.send(make(&host, &home, &pod, kind, count));
            }
        })?;
        Ok(Self(batches))
    }

    /// Makes a batch in a pod's namespace, each socket exempt from capture.
    ///
    /// # Errors
    /// When the kernel refuses; no socket is given out then.
    pub async fn make(&self, pod: Arc<Pod>, kind: Kind, count: usize) -> Result<Vec<OwnedFd>, MakeError> {
        let (made, result) = oneshot::channel();
        self.0.try_send(Batch { pod, kind, count, made }).map_err(|_| MakeError::Busy)?;
        result.await.map_err(|_| MakeError::Busy)?
    }
}

fn make(host: &Host, home: &File, pod: &Pod, kind: Kind, count: usize) -> Result<Vec<OwnedFd>, MakeError> {
    let enter = |fd| setns(fd, CloneFlags::CLONE_NEWNET).map_err(|errno| NetnsError::Enter(errno.into()));
    enter(pod.netns().as_fd()).map_err(EnrolError::from)?;
    let made: Result<Vec<OwnedFd>, EnrolError> = (0..count).map(|_| one(host, pod, kind)).collect();
    enter(home.as_fd()).map_err(EnrolError::from)?;
    Ok(made?)
}

fn one(host: &Host, pod: &Pod, kind: Kind) -> Result<OwnedFd, EnrolError> {
    let socket: Result<OwnedFd, SocketError> = match kind {
        Kind::Upstream(family) => sockets::upstream(family),
        Kind::Delivery(family) => sockets::delivery(family),
        Kind::DnsUpstream(family) => sockets::dns_upstream(family),
        Kind::DnsReply(resolver) => sockets::dns_reply(resolver, &pod.info.addresses),
    };
    let socket = socket?;
    host.capture.exempt(socket.as_fd())?;
    Ok(socket)
}
