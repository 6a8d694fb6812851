//! Asking the agent, for a program without a runtime.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_proto::node::{self, pod_request};
use mesh_runtime::seqpacket::{self, BlockingSocket};
use prost::Message as _;

/// The first version of the protocol in which the agent decides.
const VERSION: u32 = 2;

/// Why the agent could not be asked, or what it refused.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens at the agent's socket: the agent is away. Alone this may lead to a decision without it.
    #[error("the mesh's agent does not answer at {}: {source}", path.display())]
    Unreachable {
        /// Its socket.
        path: PathBuf,
        /// What failed.
        #[source]
        source: seqpacket::Error,
    },
    /// The agent did not answer, or not in time, and may be there all the same.
    #[error("the mesh's agent at {} gives no answer: {source}", path.display())]
    Unanswered {
        /// Its socket.
        path: PathBuf,
        /// What failed.
        #[source]
        source: seqpacket::Error,
    },
    /// The pod's network namespace cannot be opened.
    #[error("its network namespace {}: {source}", path.display())]
    Netns {
        /// Its path.
        path: PathBuf,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// The agent answered something else than an answer.
    #[error("the mesh's agent is not understood: {0}")]
    Answer(#[from] prost::DecodeError),
    /// An agent that is about to be replaced.
    #[error("the mesh's agent is of an earlier version than the plugin, {0}")]
    Earlier(u32),
    /// The agent said no.
    #[error("the mesh's agent says: {text}")]
    Refused {
        /// What it said.
        text: String,
        /// It may go away by itself.
        try_again: bool,
    },
}

impl ClientError {
    /// Whether asking again may help.
    #[must_use]
    pub const fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Unanswered { .. } | Self::Earlier(_) | Self::Answer(_) => true,
            Self::Refused { try_again, .. } => *try_again,
            Self::Netns { .. } => false,
        }
    }
}

/// A connection to the agent.
#[derive(Debug)]
pub struct Client {
    socket: BlockingSocket,
    path: PathBuf,
}

impl Client {
    /// Connects to the agent's `cni.sock`; each later request may take `patience`.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`] when nobody listens there, [`ClientError::Unanswered`] when that is not certain.
    pub fn connect(path: &Path, patience: Duration) -> Result<Self, ClientError> {
        let path = path.to_owned();
        match BlockingSocket::connect(&path, patience) {
            Ok(socket) => Ok(Self { socket, path }),
            Err(source) if is_absence(&source) => Err(ClientError::Unreachable { path, source }),
            Err(source) => Err(ClientError::Unanswered { path, source }),
        }
    }

    /// Has the agent decide about a pod that is about to start; when this returns, what it decided is in force.
    ///
    /// # Errors
    /// When the pod may not start, or the agent cannot be asked.
    pub fn admit(&self, request: node::AdmitPod) -> Result<node::PodResponse, ClientError> {
        let path = PathBuf::from(&request.netns_path);
        let file = File::open(&path).map_err(|source| ClientError::Netns { path, source })?;
        self.ask(pod_request::Kind::Admit(request), &[file.as_fd()])
    }

    /// Any other request.
    ///
    /// # Errors
    /// When the agent refuses or cannot be asked.
    pub fn request(&self, kind: pod_request::Kind) -> Result<node::PodResponse, ClientError> {
        self.ask(kind, &[])
    }

    /// All pods that the agent knows, each checked in the kernel; by UID.
    ///
    /// # Errors
    /// When the agent refuses or cannot be asked.
    pub fn list(&self) -> Result<Vec<node::PodState>, ClientError> {
        let mut pods: Vec<node::PodState> = Vec::new();
        loop {
            let last = pods.last().and_then(|state| state.pod.as_ref());
            let after = last.map(|pod| pod.uid.clone()).unwrap_or_default();
            let page = self.request(pod_request::Kind::List(node::ListPods { in_pages: true, after }))?;
            let is_last = !page.more || page.pods.is_empty();
            pods.extend(page.pods);
            if is_last {
                return Ok(pods);
            }
        }
    }

    fn ask(&self, kind: pod_request::Kind, fds: &[BorrowedFd<'_>]) -> Result<node::PodResponse, ClientError> {
        let unanswered = |source| ClientError::Unanswered { path: self.path.clone(), source };
        let request = node::PodRequest { kind: Some(kind) }.encode_to_vec();
        self.socket.send(&request, fds).map_err(unanswered)?;
        let (answer, _) = self.socket.recv(seqpacket::MAX_MESSAGE).map_err(unanswered)?;
        let answer = node::PodResponse::decode(answer)?;
        if answer.version < VERSION {
            return Err(ClientError::Earlier(answer.version));
        }
        if answer.error.is_empty() {
            Ok(answer)
        } else {
            Err(ClientError::Refused { text: answer.error, try_again: answer.try_again })
        }
    }
}

/// Whether a connect failed because nobody listens: there is no such file, or it is one that a dead process left.
fn is_absence(error: &seqpacket::Error) -> bool {
    match error {
        seqpacket::Error::Io(error) => {
            matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
        }
        seqpacket::Error::Closed
        | seqpacket::Error::Empty
        | seqpacket::Error::TooLarge(_)
        | seqpacket::Error::TooManyFds(_)
        | seqpacket::Error::Truncated(_)
        | seqpacket::Error::FdsTruncated
        | seqpacket::Error::AddressInUse
        | seqpacket::Error::NotASocket => false,
    }
}
