//! What the container runtime's CNI plugin says to the agent: pods come and go.

use std::io::{IoSlice, IoSliceMut};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use mesh_proto::node::{EnrolPod, ListPods, Pod, PodRequest, PodResponse, PodState, WithdrawPod, pod_request::Kind};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg, sendmsg, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;
use prost::Message;

use crate::Error;
use crate::error::Context;
use crate::kube::PodRecord;
use crate::netns::NetNs;

/// Longest answer of the agent.
const ANSWER: usize = 1 << 20;

fn octets(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The agent of one node, as the container runtime reaches it.
#[derive(Debug, Clone)]
pub struct Agent {
    socket: PathBuf,
    node: usize,
}

impl Agent {
    /// The agent that listens at `socket`.
    pub fn new(socket: impl Into<PathBuf>, node: usize) -> Self {
        Self { socket: socket.into(), node }
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Announces a pod with its network namespace and waits for the agent's word that the kernel captures it.
    ///
    /// # Errors
    /// The agent does not answer, or refuses.
    pub fn enrol(&self, pod: &PodRecord, network: &NetNs) -> Result<(), Error> {
        let described = Pod {
            uid: pod.uid.clone(),
            name: pod.name.clone(),
            namespace: pod.namespace.clone(),
            service_account: pod.service_account.clone(),
            addresses: pod.ips.iter().map(octets).collect(),
        };
        let netns_path = network.path().display().to_string();
        let enrol = EnrolPod { pod: Some(described), netns_path, container_id: String::new() };
        let request = PodRequest { kind: Some(Kind::Enrol(enrol)) };
        self.ask(&request, Some(network.as_fd()), &pod.name).map(drop)
    }

    /// Announces a pod's end.
    ///
    /// # Errors
    /// The agent does not answer, or refuses.
    pub fn withdraw(&self, pod: &PodRecord) -> Result<(), Error> {
        let withdraw = WithdrawPod { pod_uid: pod.uid.clone(), container_id: String::new() };
        let request = PodRequest { kind: Some(Kind::Withdraw(withdraw)) };
        self.ask(&request, None, &pod.name).map(drop)
    }

    /// The pods that the agent knows.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn list(&self) -> Result<Vec<PodState>, Error> {
        let request = PodRequest { kind: Some(Kind::List(ListPods::default())) };
        self.ask(&request, None, "(list)").map(|answer| answer.pods)
    }

    /// True if the agent has the pod in its list.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn knows(&self, uid: &str) -> Result<bool, Error> {
        Ok(self.list()?.iter().any(|p| p.pod.as_ref().is_some_and(|p| p.uid == uid)))
    }

    fn ask(&self, request: &PodRequest, network: Option<BorrowedFd<'_>>, pod: &str) -> Result<PodResponse, Error> {
        let refused = |reason: String| Error::Announce { node: self.node, pod: pod.to_owned(), reason };
        let answer = self.exchange(&request.encode_to_vec(), network)?;
        if answer.is_empty() {
            return Err(refused("closed the connection without an answer".to_owned()));
        }
        let answer = PodResponse::decode(answer.as_slice()).map_err(|e| refused(e.to_string()))?;
        if answer.error.is_empty() { Ok(answer) } else { Err(refused(answer.error)) }
    }

    fn exchange(&self, message: &[u8], descriptor: Option<BorrowedFd<'_>>) -> Result<Vec<u8>, Error> {
        let what = || format!("speaking to the agent at {}", self.socket.display());
        let own: OwnedFd =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).during(what)?;
        setsockopt(&own, sockopt::ReceiveTimeout, &TimeVal::new(20, 0)).during(what)?;
        let address = UnixAddr::new(&self.socket).during(what)?;
        connect(own.as_raw_fd(), &address).during(what)?;
        let raw: Vec<_> = descriptor.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let controls = if raw.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<UnixAddr>(own.as_raw_fd(), &[IoSlice::new(message)], controls, flags, None).during(what)?;
        let mut answer = vec![0; ANSWER];
        let mut into = [IoSliceMut::new(&mut answer)];
        let got = recvmsg::<UnixAddr>(own.as_raw_fd(), &mut into, None, MsgFlags::MSG_CMSG_CLOEXEC).during(what)?.bytes;
        answer.truncate(got);
        Ok(answer)
    }
}
