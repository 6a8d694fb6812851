//! Where pods are announced: the CNI plugin, or whoever plays the container runtime, asks on a socket for root.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mesh_proto::node::{self, pod_request};
use mesh_runtime::ready::Readiness;
use mesh_runtime::seqpacket::{self, Listener, Socket};
use prost::Message as _;
use tokio::sync::Semaphore;

use super::enrolment::{Admission, Admitted, Checked, Enrolment};
use super::manager::Manager;
use super::pod::{PodInfo, Sandbox};
use super::pod_network;

/// The version of the protocol.
const VERSION: u32 = 2;
/// Largest request.
const MAX_MESSAGE: usize = seqpacket::MAX_MESSAGE;
/// Most bytes that the pods of a list take, so that there is room for the rest of the answer.
const MAX_LIST: usize = MAX_MESSAGE - 192;
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
pub async fn serve(listener: Listener, enrolment: Enrolment, readiness: Readiness) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let socket = accept(&listener).await;
        let (enrolment, readiness) = (enrolment.clone(), readiness.clone());
        tokio::spawn(async move {
            match tokio::time::timeout(IDLE * 10, connection(&socket, &enrolment, &readiness)).await {
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

async fn connection(socket: &Socket, enrolment: &Enrolment, readiness: &Readiness) -> Result<(), seqpacket::Error> {
    let uid = socket.peer()?.uid;
    if uid != 0 {
        tracing::warn!(uid, "only root may announce pods");
        return Ok(());
    }
    loop {
        let Ok(received) = tokio::time::timeout(IDLE, socket.recv(MAX_MESSAGE)).await else { return Ok(()) };
        let (bytes, fds) = received?;
        let response = match node::PodRequest::decode(bytes) {
            Ok(request) => respond(request, fds, enrolment, readiness).await,
            Err(error) => refusal(format!("not a request: {error}")),
        };
        let bytes = fit(response).encode_to_vec();
        let Ok(sent) = tokio::time::timeout(IDLE, socket.send(&bytes, &[])).await else { return Ok(()) };
        sent?;
    }
}

async fn respond(
    request: node::PodRequest,
    fds: Vec<OwnedFd>,
    enrolment: &Enrolment,
    readiness: &Readiness,
) -> node::PodResponse {
    match request.kind {
        Some(pod_request::Kind::Enrol(request)) => match enrol(request, fds, enrolment.manager()).await {
            Ok(()) => response(Vec::new()),
            Err(error) => refusal(error),
        },
        Some(pod_request::Kind::Withdraw(request)) => {
            match enrolment.delete(request.pod_uid, request.container_id, 0).await {
                Ok(()) => response(Vec::new()),
                Err(error) => refusal(error.to_string()),
            }
        }
        Some(pod_request::Kind::List(request)) => match enrolment.manager().list().await {
            Ok(pods) => list(&request, pods.into_iter().map(Into::into).collect()),
            Err(error) => refusal(error.to_string()),
        },
        Some(pod_request::Kind::Admit(request)) => admit(request, fds, enrolment).await,
        Some(pod_request::Kind::Delete(request)) => {
            match enrolment.delete(request.pod_uid, request.container_id, request.asked_at_ms).await {
                Ok(()) => response(Vec::new()),
                Err(error) => refusal(error.to_string()),
            }
        }
        Some(pod_request::Kind::Check(request)) => check(&request, enrolment).await,
        Some(pod_request::Kind::Prune(request)) => {
            match enrolment.prune(request.container_ids, request.asked_at_ms).await {
                Ok(_) => response(Vec::new()),
                Err(error) => refusal(error.to_string()),
            }
        }
        Some(pod_request::Kind::Ping(node::Ping {})) => match readiness.pending().as_slice() {
            [] => response(Vec::new()),
            pending => refusal(format!("not ready yet: {}", pending.join(", "))),
        },
        None => refusal(String::from("a request of an unknown kind")),
    }
}

async fn enrol(request: node::EnrolPod, fds: Vec<OwnedFd>, manager: &Manager) -> Result<(), String> {
    let info = PodInfo::try_from(request.pod).map_err(|error| error.to_string())?;
    let (netns, sandbox) = place(fds, request.netns_path, request.container_id)?;
    pod_network::settle(&netns, &info.addresses).await;
    manager.enrol(info, netns, sandbox).await.map_err(|error| error.to_string())
}

async fn admit(request: node::AdmitPod, fds: Vec<OwnedFd>, enrolment: &Enrolment) -> node::PodResponse {
    let (netns, sandbox) = match place(fds, request.netns_path, request.container_id) {
        Ok(place) => place,
        Err(error) => return refusal(error),
    };
    let Some(pod) = request.pod else { return refusal(String::from("the request names no pod")) };
    // Only those of IPv6 may have to be waited for.
    let octets = pod.addresses.iter().filter_map(|octets| <[u8; 16]>::try_from(octets.as_slice()).ok());
    let addresses: Vec<IpAddr> = octets.map(IpAddr::from).collect();
    if !addresses.is_empty() {
        pod_network::settle(&netns, &addresses).await;
    }
    let admission = Admission { pod, netns_path: sandbox.path, sandbox: sandbox.id, asked_at_ms: request.asked_at_ms };
    match enrolment.admit(admission, netns).await {
        Ok(Admitted::Enrolled(why)) => decided(node::Decision::Enrolled, why),
        Ok(Admitted::Passed(why)) => decided(node::Decision::Passed, why.to_string()),
        Err(error) => node::PodResponse { try_again: error.may_pass(), ..refusal(error.to_string()) },
    }
}

async fn check(request: &node::CheckPod, enrolment: &Enrolment) -> node::PodResponse {
    match enrolment.check(&request.pod_uid, &request.container_id).await {
        Ok(Some(Checked::Enrolled(listed))) => {
            let decided = decided(node::Decision::Enrolled, String::new());
            node::PodResponse { pods: vec![listed.into()], ..decided }
        }
        Ok(Some(Checked::Passed(why))) => decided(node::Decision::Passed, why),
        Ok(None) => response(Vec::new()),
        Err(error) => refusal(error.to_string()),
    }
}

/// Where a pod runs: its network namespace, the path of that and the sandbox's id.
fn place(fds: Vec<OwnedFd>, path: String, id: String) -> Result<(OwnedFd, Sandbox), String> {
    let [netns] = <[OwnedFd; 1]>::try_from(fds)
        .map_err(|fds| format!("{} descriptors; one, of the network namespace, is wanted", fds.len()))?;
    if path.len() > MAX_PATH {
        return Err(String::from("the path of the network namespace is too long"));
    }
    let path = PathBuf::from(path);
    if !path.as_os_str().is_empty() && !path.is_absolute() {
        return Err(String::from("the path of the network namespace is not absolute"));
    }
    if id.len() > MAX_SANDBOX {
        return Err(String::from("the id of the sandbox is too long"));
    }
    Ok((netns, Sandbox { id, path }))
}

fn refusal(error: String) -> node::PodResponse {
    node::PodResponse { error, ..response(Vec::new()) }
}

fn decided(decision: node::Decision, reason: String) -> node::PodResponse {
    node::PodResponse { decision: decision.into(), reason, ..response(Vec::new()) }
}

fn response(pods: Vec<node::PodState>) -> node::PodResponse {
    node::PodResponse { pods, version: VERSION, ..node::PodResponse::default() }
}

/// What is asked for of all pods.
fn list(request: &node::ListPods, mut pods: Vec<node::PodState>) -> node::PodResponse {
    /// More than a field's tag and length take.
    const FRAME: usize = 16;
    if !request.in_pages {
        return response(pods);
    }
    pods.retain(|state| uid(state) > request.after.as_str());
    pods.sort_by(|a, b| uid(a).cmp(uid(b)));
    let mut size = 0;
    let fits = pods.iter().take_while(|state| {
        size += state.encoded_len() + FRAME;
        size <= MAX_LIST
    });
    let fits = fits.count();
    let more = fits < pods.len();
    pods.truncate(fits);
    node::PodResponse { more, ..response(pods) }
}

fn uid(state: &node::PodState) -> &str {
    state.pod.as_ref().map(|pod| pod.uid.as_str()).unwrap_or_default()
}

/// A list that is too long for one message is cut, and says so.
fn fit(mut response: node::PodResponse) -> node::PodResponse {
    let all = response.pods.len();
    while response.encoded_len() > MAX_LIST + 64 && !response.pods.is_empty() {
        response.pods.truncate(response.pods.len() * 9 / 10);
        response.error = format!("the list is cut: {} of {all} pods", response.pods.len());
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pods(count: usize) -> Vec<node::PodState> {
        let pod = |number: usize| node::Pod {
            uid: format!("{:08x}-0000-4000-8000-{:012x}", number.wrapping_mul(0x9e37_79b1) & 0xffff_ffff, number),
            name: format!("web-5d4f8c7b9-{number:05}"),
            namespace: "a-namespace-of-some-length".into(),
            service_account: "an-account-of-some-length".into(),
            addresses: vec![vec![10; 4], vec![0xfd; 16]],
        };
        let state = |number| node::PodState {
            pod: Some(pod(number)),
            not_enrolled_reason: if number % 7 == 0 { "no rule ".repeat(60) } else { String::new() },
            ..node::PodState::default()
        };
        (0..count).map(state).collect()
    }

    #[test]
    fn pages_show_each_pod_once_and_fit_into_a_message() {
        for count in [0, 1, 250, 5_000] {
            let all = pods(count);
            let (mut found, mut request) = (Vec::new(), node::ListPods { in_pages: true, after: String::new() });
            loop {
                let page = fit(list(&request, all.clone()));
                assert!(page.encoded_len() <= seqpacket::MAX_MESSAGE && page.error.is_empty(), "{}", page.error);
                assert!(!page.pods.is_empty() || !page.more);
                found.extend(page.pods.iter().map(|state| uid(state).to_owned()));
                let Some(last) = found.last().filter(|_| page.more) else { break };
                request.after.clone_from(last);
            }
            let mut expected: Vec<_> = all.iter().map(|state| uid(state).to_owned()).collect();
            expected.sort();
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn who_knows_no_pages_is_told_that_the_list_is_cut() {
        let request = node::ListPods::default();
        assert_eq!(fit(list(&request, pods(100))).pods.len(), 100);
        let cut = fit(list(&request, pods(5_000)));
        assert!(cut.encoded_len() <= seqpacket::MAX_MESSAGE && cut.error.contains("of 5000 pods"), "{}", cut.error);
    }
}
