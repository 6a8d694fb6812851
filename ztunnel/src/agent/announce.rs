//! Where pods are announced: the CNI plugin, or whoever plays the container runtime, asks on a socket for root.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mesh_proto::node::{self, pod_request};
use mesh_runtime::seqpacket::{self, Listener, Socket};
use prost::Message as _;
use tokio::sync::Semaphore;

use super::manager::Manager;
use super::pod::{PodInfo, Sandbox};

/// The version of the protocol.
const VERSION: u32 = 1;
/// Largest request.
const MAX_MESSAGE: usize = 16 << 10;
/// Longest path of a namespace.
const MAX_PATH: usize = 4096;
/// Longest id of a sandbox; runtimes use 64 digits.
const MAX_SANDBOX: usize = 256;
/// Connections at a time.
const MAX_CONNECTIONS: usize = 64;
/// Wait after a connection that could not be accepted.
const PAUSE: Duration = Duration::from_millis(200);
/// How long a connection may be silent.
const IDLE: Duration = Duration::from_secs(60);

/// Serves requests until the task is aborted.
pub async fn serve(listener: Listener, manager: Manager) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let socket = accept(&listener).await;
        let manager = manager.clone();
        tokio::spawn(async move {
            match tokio::time::timeout(IDLE * 10, connection(&socket, &manager)).await {
                Ok(Ok(()) | Err(seqpacket::Error::Closed)) | Err(_) => {}
                Ok(Err(error)) => tracing::warn!(%error, "connection of an announcer ended"),
            }
            drop(permit);
        });
    }
}

/// The next connection. Whatever is in the way of it, such as too many open files, is waited out: pods are served on.
pub(super) async fn accept(listener: &Listener) -> Socket {
    loop {
        match listener.accept().await {
            Ok(socket) => return socket,
            Err(error) => {
                tracing::error!(%error, "cannot accept a connection, trying again");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn connection(socket: &Socket, manager: &Manager) -> Result<(), seqpacket::Error> {
    let uid = socket.peer()?.uid;
    if uid != 0 {
        tracing::warn!(uid, "only root may announce pods");
        return Ok(());
    }
    loop {
        let Ok(received) = tokio::time::timeout(IDLE, socket.recv(MAX_MESSAGE)).await else { return Ok(()) };
        let (bytes, fds) = received?;
        let response = match node::PodRequest::decode(bytes) {
            Ok(request) => respond(request, fds, manager).await,
            Err(error) => refusal(format!("not a request: {error}")),
        };
        let bytes = fit(response).encode_to_vec();
        let Ok(sent) = tokio::time::timeout(IDLE, socket.send(&bytes, &[])).await else { return Ok(()) };
        sent?;
    }
}

async fn respond(request: node::PodRequest, fds: Vec<OwnedFd>, manager: &Manager) -> node::PodResponse {
    match request.kind {
        Some(pod_request::Kind::Enrol(request)) => {
            let done = enrol(request, fds, manager).await;
            response(done.err().unwrap_or_default(), Vec::new())
        }
        Some(pod_request::Kind::Withdraw(request)) => {
            let done = manager.withdraw(request.pod_uid, request.container_id).await;
            let error = done.err().map(|error| error.to_string()).unwrap_or_default();
            response(error, Vec::new())
        }
        Some(pod_request::Kind::List(node::ListPods {})) => match manager.list().await {
            Ok(pods) => response(String::new(), pods.into_iter().map(Into::into).collect()),
            Err(error) => refusal(error.to_string()),
        },
        None => refusal(String::from("a request of an unknown kind")),
    }
}

async fn enrol(request: node::EnrolPod, fds: Vec<OwnedFd>, manager: &Manager) -> Result<(), String> {
    let info = PodInfo::try_from(request.pod).map_err(|error| error.to_string())?;
    let [netns] = <[OwnedFd; 1]>::try_from(fds)
        .map_err(|fds| format!("{} descriptors; one, of the network namespace, is wanted", fds.len()))?;
    if request.netns_path.len() > MAX_PATH {
        return Err(String::from("the path of the network namespace is too long"));
    }
    let path = PathBuf::from(request.netns_path);
    if !path.as_os_str().is_empty() && !path.is_absolute() {
        return Err(String::from("the path of the network namespace is not absolute"));
    }
    if request.container_id.len() > MAX_SANDBOX {
        return Err(String::from("the id of the sandbox is too long"));
    }
    let sandbox = Sandbox { id: request.container_id, path };
    manager.enrol(info, netns, sandbox).await.map_err(|error| error.to_string())
}

fn refusal(error: String) -> node::PodResponse {
    response(error, Vec::new())
}

fn response(error: String, pods: Vec<node::PodState>) -> node::PodResponse {
    node::PodResponse { error, pods, version: VERSION }
}

/// A list that is too long for one message is cut, and says so.
fn fit(mut response: node::PodResponse) -> node::PodResponse {
    let all = response.pods.len();
    while response.encoded_len() > seqpacket::MAX_MESSAGE - 128 && !response.pods.is_empty() {
        response.pods.truncate(response.pods.len() * 9 / 10);
        response.error = format!("the list is cut: {} of {all} pods", response.pods.len());
    }
    response
}
