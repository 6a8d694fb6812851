//! One pod: what is known of it, validated, and its enrolment in the kernel from the first step to the last.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_model::{InvalidSpiffeId, SpiffeId};
use mesh_proto::node;
use ztunnel_ebpf::{POD_ADDRESSES, PodEntry};

use super::capture::{CaptureError, NodeCapture, PodCapture};
use super::netns::{Netns, NetnsError, inode_at};
use super::pod_network::{self, Before, PodNetworkError};
use super::sockets::{ListenerSet, SocketError};
use super::state::{Saved, State, StateError};

/// Longest name, namespace, service account or UID: what Kubernetes allows of any.
const MAX_NAME: usize = 253;
/// Most addresses of a pod, of both families.
const MAX_ADDRESSES: usize = 8;

/// A pod as it was announced.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PodInfo {
    /// Unique for ever; Kubernetes' UID of the pod.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its service account: with the namespace, its identity.
    pub service_account: String,
    /// All addresses, the primary one first. At least one is IPv4.
    pub addresses: Vec<IpAddr>,
}

/// Why an announced pod is not acceptable.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPod {
    /// The message has no pod.
    #[error("the request names no pod")]
    None,
    /// A text is empty, too long or has characters that such a name cannot have.
    #[error("the pod's {0} is empty, longer than {MAX_NAME} bytes or holds unusual characters")]
    Text(&'static str),
    /// Namespace and service account are no identity.
    #[error(transparent)]
    Identity(#[from] InvalidSpiffeId),
    /// An address is not 4 or 16 bytes, or no address of a pod.
    #[error("one of the pod's addresses is not a unicast IPv4 or IPv6 address")]
    Address,
    /// None, or more than [`MAX_ADDRESSES`], or more than [`POD_ADDRESSES`] of IPv4.
    #[error("a pod has 1 to {POD_ADDRESSES} IPv4 addresses, and at most {MAX_ADDRESSES} in all")]
    Addresses,
}

/// Where a pod runs, as it was announced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sandbox {
    /// The runtime's id; empty if it gave none.
    pub id: String,
    /// Where the network namespace is to be found; empty if it has no path.
    pub path: PathBuf,
}

impl TryFrom<Option<node::Pod>> for PodInfo {
    type Error = InvalidPod;

    fn try_from(pod: Option<node::Pod>) -> Result<Self, InvalidPod> {
        let pod = pod.ok_or(InvalidPod::None)?;
        let addresses = pod.addresses.iter().map(|bytes| address(bytes)).collect::<Result<Vec<_>, _>>()?;
        let info = Self {
            uid: valid("uid", pod.uid, |byte| byte.is_ascii_graphic())?,
            name: valid("name", pod.name, in_name)?,
            namespace: valid("namespace", pod.namespace, in_name)?,
            service_account: valid("service account", pod.service_account, in_name)?,
            addresses,
        };
        // As the proxy will make it; the trust domain, which only the proxy knows, is not the pod's to choose.
        SpiffeId::new("cluster.local", &info.namespace, &info.service_account)?;
        let v4 = info.v4().count();
        if v4 == 0 || v4 > POD_ADDRESSES || info.addresses.len() > MAX_ADDRESSES {
            return Err(InvalidPod::Addresses);
        }
        Ok(info)
    }
}

impl PodInfo {
    /// The IPv4 addresses, the primary one first.
    pub fn v4(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.addresses.iter().filter_map(|address| match address {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        })
    }

    /// As a message.
    #[must_use]
    pub fn to_wire(&self) -> node::Pod {
        node::Pod {
            uid: self.uid.clone(),
            name: self.name.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
            addresses: self
                .addresses
                .iter()
                .map(|address| match address {
                    IpAddr::V4(v4) => v4.octets().to_vec(),
                    IpAddr::V6(v6) => v6.octets().to_vec(),
                })
                .collect(),
        }
    }

    fn entry(&self) -> Option<PodEntry> {
        let octets: Vec<[u8; 4]> = self.v4().map(|address| address.octets()).collect();
        PodEntry::new(&octets)
    }
}

fn in_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_')
}

fn valid(what: &'static str, text: String, allowed: fn(u8) -> bool) -> Result<String, InvalidPod> {
    if text.is_empty() || text.len() > MAX_NAME || !text.bytes().all(allowed) {
        return Err(InvalidPod::Text(what));
    }
    Ok(text)
}

fn address(bytes: &[u8]) -> Result<IpAddr, InvalidPod> {
    let address = match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).map(IpAddr::from),
        _ => return Err(InvalidPod::Address),
    };
    let address = address.map_err(|_| InvalidPod::Address)?;
    let unusable = address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || address == IpAddr::V4(Ipv4Addr::BROADCAST);
    if unusable { Err(InvalidPod::Address) } else { Ok(address) }
}

/// Why a pod is not enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The announcement is not acceptable.
    #[error(transparent)]
    Invalid(#[from] InvalidPod),
    /// Its namespace cannot be used.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// Another pod has the namespace.
    #[error("its network namespace belongs to pod {0}, which is enrolled")]
    SameNamespace(String),
    /// Rules, routes or sysctl.
    #[error(transparent)]
    Network(#[from] PodNetworkError),
    /// Listeners.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Programs and maps.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The file that a restarted agent reads.
    #[error(transparent)]
    State(#[from] StateError),
    /// The proxy was to return its listeners, and they are not there yet.
    #[error("the proxy that holds its listeners has not returned them; capture stays in force, try again later")]
    NoListeners,
}

/// An enrolled pod. Dropping it changes nothing in the kernel but that the agent's duplicates of the sockets are
/// closed.
#[derive(Debug)]
pub struct Pod {
    /// As announced.
    pub info: PodInfo,
    netns: Netns,
    entry: PodEntry,
    before: Before,
    capture: PodCapture,
    sandbox: Mutex<Sandbox>,
    listeners: Mutex<Option<Arc<ListenerSet>>>,
}

impl Pod {
    /// Enrols a pod: when this returns, the kernel was asked and everything is in force. Until the last step no
    /// connection is captured; when a step fails all are taken back.
    ///
    /// Blocks; not for a runtime's thread.
    ///
    /// # Errors
    /// When a step fails.
    pub fn enrol(
        node: &NodeCapture,
        state: &State,
        info: PodInfo,
        netns: Netns,
        sandbox: Sandbox,
    ) -> Result<Self, EnrolError> {
        let entry = info.entry().ok_or(InvalidPod::Addresses)?;
        let primary = info.v4().next().ok_or(InvalidPod::Addresses)?;
        let before = pod_network::prepare(&netns, primary)?;
        let steps = || {
            let listeners = ListenerSet::open(&netns)?;
            state.save(&Saved::new(&info, &netns, &sandbox, before))?;
            let capture = node.attach_pod(&info.uid, netns.as_fd(), entry, listeners.borrow())?;
            node.enrol(netns.cookie(), entry)?;
            Ok((listeners, capture))
        };
        let (listeners, capture) = match steps() {
            Ok(done) => done,
            Err(error) => {
                undo(node, state, &info.uid, &netns, before);
                return Err(error);
            }
        };
        let listeners = Mutex::new(Some(Arc::new(listeners)));
        let pod = Self { info, netns, entry, before, capture, sandbox: Mutex::new(sandbox), listeners };
        if let Err(error) = pod.verify(node) {
            undo(node, state, &pod.info.uid, &pod.netns, before);
            return Err(error);
        }
        Ok(pod)
    }

    /// Takes over a pod that an earlier agent enrolled. What is missing in the kernel is mended. Its listeners may be
    /// held by the proxy alone: then it has none until they are returned, if they are not among the arguments.
    ///
    /// Blocks; not for a runtime's thread.
    ///
    /// # Errors
    /// When it cannot be brought back in force; what is there of it stays.
    pub fn adopt(
        node: &NodeCapture,
        saved: &Saved,
        netns: Netns,
        returned: Option<Arc<ListenerSet>>,
    ) -> Result<Self, EnrolError> {
        let info = saved.pod.clone();
        let entry = info.entry().ok_or(InvalidPod::Addresses)?;
        let primary = info.v4().next().ok_or(InvalidPod::Addresses)?;
        pod_network::mend(&netns, primary)?;
        let capture = match node.adopt_pod(&info.uid).map(|capture| (capture.verify(netns.as_fd(), entry), capture)) {
            Some((Ok(()), capture)) => Some(capture),
            Some((Err(error), _)) if !error.is_absence() => return Err(error.into()),
            Some((Err(_), _)) | None => None,
        };
        let (listeners, opened) = match returned {
            Some(listeners) => (Some(listeners), false),
            None => match ListenerSet::open(&netns) {
                Ok(listeners) => (Some(Arc::new(listeners)), true),
                Err(SocketError::PortInUse(_)) => (None, false),
                Err(error) => return Err(error.into()),
            },
        };
        let capture = match (capture, &listeners) {
            (Some(capture), Some(listeners)) => {
                // Those that were returned are in the map.
                if opened {
                    capture.replace_listeners(listeners.borrow())?;
                }
                capture
            }
            (Some(capture), None) => capture,
            (None, Some(listeners)) => node.attach_pod(&info.uid, netns.as_fd(), entry, listeners.borrow())?,
            (None, None) => return Err(EnrolError::NoListeners),
        };
        node.enrol(netns.cookie(), entry)?;
        let mut sandbox = Sandbox { id: saved.sandbox.clone(), path: saved.netns_path.clone() };
        // A path that this agent cannot see, or that is another's by now, says nothing about the pod's end.
        if inode_at(&sandbox.path) != Some(netns.inode()) {
            sandbox.path.clear();
        }
        let (sandbox, listeners) = (Mutex::new(sandbox), Mutex::new(listeners));
        Ok(Self { info, netns, entry, before: saved.before, capture, sandbox, listeners })
    }

    /// Sets what is missing of it in the kernel and opens listeners if nobody has any. What is in force stays so, also
    /// when it fails. Blocks shortly.
    ///
    /// # Errors
    /// When it is not wholly in force; [`EnrolError::NoListeners`]: it will be when the proxy returns them.
    pub fn mend(&self, node: &NodeCapture) -> Result<(), EnrolError> {
        if self.verify(node).is_ok() {
            return Ok(());
        }
        let primary = self.info.v4().next().ok_or(InvalidPod::Addresses)?;
        pod_network::mend(&self.netns, primary)?;
        match (self.capture.verify(self.netns.as_fd(), self.entry), self.listeners()) {
            (Ok(()), _) => {}
            (Err(error), Some(listeners)) if error.is_absence() => {
                node.attach_pod(&self.info.uid, self.netns.as_fd(), self.entry, listeners.borrow())?;
            }
            (Err(error), _) => return Err(error.into()),
        }
        node.enrol(self.netns.cookie(), self.entry)?;
        match self.open_listeners() {
            Err(EnrolError::Socket(SocketError::PortInUse(_))) => return Err(EnrolError::NoListeners),
            opened => opened?,
        }
        self.verify(node)
    }

    /// Takes note of where it was announced to be now. What is not given stays as it was.
    ///
    /// # Errors
    /// When the state cannot be written.
    pub fn announced(&self, state: &State, sandbox: Sandbox) -> Result<(), EnrolError> {
        let known = self.sandbox();
        let id = if sandbox.id.is_empty() { known.id.clone() } else { sandbox.id };
        let path = if sandbox.path.as_os_str().is_empty() { known.path.clone() } else { sandbox.path };
        let now = Sandbox { id, path };
        if now != known {
            state.save(&Saved::new(&self.info, &self.netns, &now, self.before))?;
            *self.sandbox.lock().unwrap_or_else(PoisonError::into_inner) = now;
        }
        Ok(())
    }

    /// Where it runs.
    #[must_use]
    pub fn sandbox(&self) -> Sandbox {
        self.sandbox.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks the kernel whether everything is in force. Blocks shortly.
    ///
    /// # Errors
    /// What is not.
    pub fn verify(&self, node: &NodeCapture) -> Result<(), EnrolError> {
        self.capture.verify(self.netns.as_fd(), self.entry)?;
        if node.enrolled(self.netns.cookie())? != Some(self.entry) {
            return Err(CaptureError::NotInForce(String::from("the map of enrolled pods does not hold it")).into());
        }
        let primary = self.info.v4().next().ok_or(InvalidPod::Addresses)?;
        pod_network::verify(&self.netns, primary)?;
        if self.listeners().is_some() { Ok(()) } else { Err(EnrolError::NoListeners) }
    }

    /// First part of leaving: from now on nothing new is captured. Blocks shortly.
    ///
    /// # Errors
    /// When the kernel refuses; the other steps are done all the same.
    pub fn release(&self, node: &NodeCapture) -> Result<(), EnrolError> {
        let released = node.release(self.netns.cookie());
        self.capture.unpin()?;
        Ok(released?)
    }

    /// Last part of leaving, when the proxy has closed its sockets: the namespace becomes what it was. Blocks shortly.
    ///
    /// # Errors
    /// When the kernel refuses; the other steps are done all the same.
    pub fn restore(&self, state: &State) -> Result<(), EnrolError> {
        drop(self.lock().take());
        let restored = pod_network::restore(&self.netns, self.before);
        state.remove(&self.info.uid)?;
        Ok(restored?)
    }

    /// Its namespace.
    #[must_use]
    pub const fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Its listeners, if the agent has them.
    #[must_use]
    pub fn listeners(&self) -> Option<Arc<ListenerSet>> {
        self.lock().clone()
    }

    /// Takes listeners that a proxy returned, if they are of this pod and it has none.
    pub fn take_listeners(&self, listeners: ListenerSet) -> bool {
        let mut slot = self.lock();
        let taken = slot.is_none() && listeners.are_in(self.netns.cookie());
        if taken {
            *slot = Some(Arc::new(listeners));
        }
        taken
    }

    /// Opens new listeners where it has none and nobody else holds any. Blocks shortly.
    ///
    /// # Errors
    /// When a port is in use, or the kernel refuses.
    pub fn open_listeners(&self) -> Result<(), EnrolError> {
        if self.lock().is_some() {
            return Ok(());
        }
        let listeners = ListenerSet::open(&self.netns)?;
        self.capture.replace_listeners(listeners.borrow())?;
        *self.lock() = Some(Arc::new(listeners));
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<ListenerSet>>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes back a failed enrolment. What cannot be taken back is only logged: the first error is the one that matters.
fn undo(node: &NodeCapture, state: &State, uid: &str, netns: &Netns, before: Before) {
    let steps = [
        ("map of pods", node.release(netns.cookie()).map_err(EnrolError::from)),
        ("programs", node.unpin_pod(uid).map_err(EnrolError::from)),
        ("rules", pod_network::restore(netns, before).map_err(EnrolError::from)),
        ("state", state.remove(uid).map_err(EnrolError::from)),
    ];
    for (what, done) in steps {
        if let Err(error) = done {
            tracing::warn!(pod = uid, %error, "cannot take back a failed enrolment: {what}");
        }
    }
}

#[cfg(test)]
mod tests;
