//! Announcing pods to the agent, for programs without a runtime.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_proto::node::{self, pod_request};
use mesh_runtime::seqpacket::{self, BlockingSocket};
use prost::Message as _;

/// How long the agent may take for one request.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why the agent could not be asked, or what it refused.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The agent cannot be reached: it is worth trying again.
    #[error("cannot reach the agent at {}: {source}", path.display())]
    Unreachable {
        /// Its socket.
        path: PathBuf,
        /// What failed.
        #[source]
        source: seqpacket::Error,
    },
    /// The pod's network namespace cannot be opened.
    #[error("{}: {source}", path.display())]
    Netns {
        /// Its path.
        path: PathBuf,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// The agent answered something else than an answer.
    #[error("the agent's answer is not understood: {0}")]
    Answer(#[from] prost::DecodeError),
    /// The agent said no.
    #[error("the agent refused: {0}")]
    Refused(String),
}

/// A connection to the agent.
#[derive(Debug)]
pub struct Client {
    socket: BlockingSocket,
    path: PathBuf,
}

impl Client {
    /// Connects to the agent's `cni.sock`.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let socket = BlockingSocket::connect(path, PATIENCE)
            .map_err(|source| ClientError::Unreachable { path: path.to_owned(), source })?;
        Ok(Self { socket, path: path.to_owned() })
    }

    /// Enrols a pod by the path of its network namespace, in the sandbox with this id (empty: unknown); when this returns
    /// its capture is in force.
    ///
    /// # Errors
    /// When the agent refuses or cannot be asked.
    pub fn enrol(&self, pod: node::Pod, netns: &Path, sandbox: &str) -> Result<(), ClientError> {
        let file = File::open(netns).map_err(|source| ClientError::Netns { path: netns.to_owned(), source })?;
        let request = node::EnrolPod {
            pod: Some(pod),
            netns_path: netns.display().to_string(),
            container_id: sandbox.to_owned(),
        };
        self.ask(pod_request::Kind::Enrol(request), &[file.as_fd()]).map(drop)
    }

    /// Withdraws a pod from the sandbox with this id (empty: from any); one that is not enrolled there is withdrawn
    /// already.
    ///
    /// # Errors
    /// When the agent refuses or cannot be asked.
    pub fn withdraw(&self, uid: &str, sandbox: &str) -> Result<(), ClientError> {
        let request = node::WithdrawPod { pod_uid: uid.to_owned(), container_id: sandbox.to_owned() };
        self.ask(pod_request::Kind::Withdraw(request), &[]).map(drop)
    }

    /// All pods that the agent knows, checked in the kernel now.
    ///
    /// # Errors
    /// When the agent refuses or cannot be asked.
    pub fn list(&self) -> Result<Vec<node::PodState>, ClientError> {
        Ok(self.ask(pod_request::Kind::List(node::ListPods {}), &[])?.pods)
    }

    fn ask(&self, kind: pod_request::Kind, fds: &[BorrowedFd<'_>]) -> Result<node::PodResponse, ClientError> {
        let unreachable = |source| ClientError::Unreachable { path: self.path.clone(), source };
        let request = node::PodRequest { kind: Some(kind) }.encode_to_vec();
        self.socket.send(&request, fds).map_err(unreachable)?;
        let (answer, _) = self.socket.recv(seqpacket::MAX_MESSAGE).map_err(unreachable)?;
        let answer = node::PodResponse::decode(answer)?;
        if answer.error.is_empty() { Ok(answer) } else { Err(ClientError::Refused(answer.error)) }
    }
}
