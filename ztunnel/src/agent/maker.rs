//! The thread that makes sockets in pods' namespaces: it enters one per batch and returns, so that it keeps none alive.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, mpsc};
use std::thread;

use mesh_proto::node::SocketKind;
use nix::sched::{CloneFlags, setns};
use tokio::sync::oneshot;

use super::capture::NodeCapture;
use super::netns::NetnsError;
use super::pod::{EnrolError, Pod};
use super::sockets::{self, SocketError};

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
    Upstream,
    /// To the pod's own application.
    Delivery,
}

/// Why no socket was made.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// The message asks for something else.
    #[error("unknown kind of socket")]
    Kind,
    /// In the namespace, or exempting the socket.
    #[error(transparent)]
    Pod(#[from] EnrolError),
    /// The thread is gone, or its queue is full.
    #[error("the agent cannot make sockets now")]
    Busy,
}

impl TryFrom<i32> for Kind {
    type Error = MakeError;

    fn try_from(wire: i32) -> Result<Self, MakeError> {
        match SocketKind::try_from(wire) {
            Ok(SocketKind::UpstreamV4) => Ok(Self::Upstream),
            Ok(SocketKind::DeliveryV4) => Ok(Self::Delivery),
            Ok(
                SocketKind::UpstreamV6
                | SocketKind::DeliveryV6
                | SocketKind::DnsUpstreamV4
                | SocketKind::DnsUpstreamV6
                | SocketKind::DnsReply
                | SocketKind::Unspecified,
            )
            | Err(_) => Err(MakeError::Kind),
        }
    }
}

impl Maker {
    /// Starts the thread; it ends with the last clone.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(node: Arc<NodeCapture>) -> io::Result<Self> {
        let home = File::open("/proc/self/ns/net")?;
        let (batches, queue) = mpsc::sync_channel::<Batch>(QUEUE);
        thread::Builder::new().name(String::from("sockets")).spawn(move || {
            while let Ok(Batch { pod, kind, count, made }) = queue.recv() {
                // Whoever asked may have gone: then the sockets are closed.
                let _ = made.send(make(&node, &home, &pod, kind, count));
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

fn make(node: &NodeCapture, home: &File, pod: &Pod, kind: Kind, count: usize) -> Result<Vec<OwnedFd>, MakeError> {
    let enter = |fd| setns(fd, CloneFlags::CLONE_NEWNET).map_err(|errno| NetnsError::Enter(errno.into()));
    enter(pod.netns().as_fd()).map_err(EnrolError::from)?;
    let made: Result<Vec<OwnedFd>, EnrolError> = (0..count).map(|_| one(node, kind)).collect();
    enter(home.as_fd()).map_err(EnrolError::from)?;
    Ok(made?)
}

fn one(node: &NodeCapture, kind: Kind) -> Result<OwnedFd, EnrolError> {
    let socket: Result<OwnedFd, SocketError> = match kind {
        Kind::Upstream => sockets::upstream(),
        Kind::Delivery => sockets::delivery(),
    };
    let socket = socket?;
    node.exempt(socket.as_fd())?;
    Ok(socket)
}
