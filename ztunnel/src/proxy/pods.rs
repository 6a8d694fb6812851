//! The pods that this proxy serves: who they are, and the register that the hand-over keeps.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_hbone::Memory;
use mesh_hbone::copy::Counters;
use mesh_hbone::memory::{Hold, Share};
use mesh_model::address::ip_from_bytes;
use mesh_model::{InvalidAddress, InvalidSpiffeId, SpiffeId};
use mesh_proto::node;
use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};
use nix::sys::stat::fstat;
use tokio::sync::mpsc;

use super::descriptors::Descriptors;
use super::dial::DeliveryPorts;
use super::dns::PodBounds;
use super::live::Live;
use super::lookup::Bound;
use super::open::OpenSockets;
use super::record::Facts;
use super::sockets::{NodeCap, Notice, SocketSource, Stock};

/// Time for everything of a pod to end by itself once it is gone. A pod may have thousands of connections that end only when it
/// is their turn, on a node whose cores are all taken; what is left then is ended by force, without its tasks.
const BY_ITSELF: Duration = Duration::from_secs(1);

/// Time for what cannot be ended by force to end by itself after all. Only the end of the proxy closes it then, which breaks the
/// connections of all pods.
const LAST: Duration = Duration::from_secs(5);

/// A pod of this node that the kernel captures.
pub struct Pod {
    /// Unique, as the agent names it.
    pub uid: Arc<str>,
    /// Kubernetes name.
    pub name: Arc<str>,
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Who the pod is.
    pub identity: SpiffeId,
    /// Its addresses, the primary one first; never empty.
    pub addresses: Vec<IpAddr>,
    /// Where sockets in its namespace come from.
    pub sockets: Arc<dyn SocketSource>,
    /// What lives in it.
    pub live: Arc<Live<Facts>>,
    /// The sockets that are open in it.
    pub open: Arc<OpenSockets>,
    /// Which source ports deliveries use.
    pub delivery_ports: DeliveryPorts,
    /// How much of it may ask for names.
    pub dns: PodBounds,
    /// How much of it may wait for discovery.
    pub lookups: Bound,
    /// What is held for receivers of its connections.
    pub memory: Share,
}

impl Pod {
    /// The pod's primary address.
    pub fn ip(&self) -> IpAddr {
        self.addresses.first().copied().unwrap_or(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED))
    }

    /// What counts one of its connections.
    pub fn counters(&self) -> Counters {
        Counters::noted(Hold::of(self.memory.clone()))
    }

    /// Whether the agent says the same of both.
    fn is_like(&self, other: &Self) -> bool {
        self.name == other.name
            && self.namespace == other.namespace
            && self.identity == other.identity
            && self.addresses == other.addresses
    }
}

impl std::fmt::Debug for Pod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{} ({})", self.namespace, self.name, self.uid)
    }
}

/// Which of a pod's listening sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Port {
    /// 15001: what the pod's applications open.
    Outbound,
    /// 15006: plaintext from outside the pod.
    Plaintext,
    /// 15008: HBONE from peers.
    Hbone,
    /// 15053, UDP: queries of the pod's applications to any resolver.
    DnsUdp,
    /// 15053, TCP: connections of the pod's applications to port 53.
    DnsTcp,
}

impl Port {
    const ALL: [Self; 5] = [Self::Outbound, Self::Plaintext, Self::Hbone, Self::DnsUdp, Self::DnsTcp];

    /// As the agent knows it.
    pub fn to_wire(self) -> node::Listener {
        match self {
            Self::Outbound => node::Listener::Outbound,
            Self::Plaintext => node::Listener::InboundPlaintext,
            Self::Hbone => node::Listener::InboundHbone,
            Self::DnsUdp => node::Listener::DnsUdp,
            Self::DnsTcp => node::Listener::DnsTcp,
        }
    }

    /// What the agent means; none for one that is not known here.
    pub fn from_wire(listener: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.to_wire() as i32 == listener)
    }
}

/// Why a pod that the agent announced cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// The message has no pod.
    #[error("the message names no pod")]
    NoPod,
    /// Descriptors and listeners differ in number.
    #[error("{listeners} listeners are announced and {descriptors} descriptors came with them")]
    Descriptors {
        /// Listeners named in the message.
        listeners: usize,
        /// Descriptors beside it.
        descriptors: usize,
    },
    /// A pod without address.
    #[error("the pod has no address")]
    NoAddress,
    /// An address that is none.
    #[error(transparent)]
    Address(#[from] InvalidAddress),
    /// Namespace and service account make no identity.
    #[error("the pod's identity: {0}")]
    Identity(#[from] InvalidSpiffeId),
    /// A socket could not be taken over.
    #[error("taking over a listening socket: {0}")]
    Socket(#[from] io::Error),
}

/// What begins to serve a pod. What it returns is kept while the pod lives.
pub trait Host: Send + Sync {
    /// Serves the pod from these sockets, until its [`Live`] is closed.
    ///
    /// # Errors
    /// When a socket cannot be used.
    fn start(&self, pod: &Arc<Pod>, listeners: Vec<(Port, OwnedFd)>) -> io::Result<Box<dyn Send>>;

    /// Serves a pod that is served already from these sockets too.
    ///
    /// # Errors
    /// When a socket cannot be used.
    fn extend(&self, pod: &Arc<Pod>, listeners: Vec<(Port, OwnedFd)>) -> io::Result<()>;
}

/// The register of pods.
pub struct Pods {
    entries: Mutex<HashMap<Arc<str>, Entry>>,
    /// Pods that the agent announced and that could not be added.
    unserved: Mutex<HashSet<String>>,
    host: Box<dyn Host>,
    trust_domain: String,
    bounds: Bounds,
    notices: mpsc::UnboundedSender<Notice>,
    memory: Memory,
}

/// What bounds the pods.
pub struct Bounds {
    /// Connections of one pod.
    pub connections: usize,
    /// Sockets in stock, of all pods together.
    pub stock: Arc<NodeCap>,
    /// Descriptors of the process.
    pub descriptors: Arc<Descriptors>,
}

/// A pod's listening sockets.
pub type Listeners = Vec<(Port, Arc<OwnedFd>)>;

/// A pod with what the proxy keeps of it.
struct Entry {
    pod: Arc<Pod>,
    stock: Arc<Stock>,
    /// Ours to return to an agent that was restarted; every worker has duplicates.
    listeners: Listeners,
    _hold: Box<dyn Send>,
}

impl Entry {
    /// Those of these sockets that it is not served from yet; `None` if one that it is served from is not among them. A
    /// duplicate has the inode of the original, and no other socket can have it while the original is open.
    fn added(&self, listeners: Vec<(Port, OwnedFd)>) -> io::Result<Option<Vec<(Port, OwnedFd)>>> {
        let mut known = HashSet::new();
        for (port, fd) in &self.listeners {
            known.insert((*port, fstat(fd)?.st_ino));
        }
        let mut added = Vec::new();
        for (port, fd) in listeners {
            let inode = fstat(&fd)?.st_ino;
            if !known.remove(&(port, inode)) {
                added.push((port, fd));
            }
        }
        Ok(known.is_empty().then_some(added))
    }
}

fn duplicates(listeners: &[(Port, OwnedFd)]) -> io::Result<Vec<(Port, OwnedFd)>> {
    listeners.iter().map(|(port, fd)| Ok((*port, fd.try_clone()?))).collect()
}

fn shared(listeners: Vec<(Port, OwnedFd)>) -> Listeners {
    listeners.into_iter().map(|(port, fd)| (port, Arc::new(fd))).collect()
}

impl Pods {
    /// No pods. Stocks tell through `notices` what they lack; each pod has a share of `memory`.
    pub fn new(
        host: Box<dyn Host>,
        trust_domain: String,
        bounds: Bounds,
        notices: mpsc::UnboundedSender<Notice>,
        memory: Memory,
    ) -> Arc<Self> {
        let (entries, unserved) = Default::default();
        Arc::new(Self { entries, unserved, host, trust_domain, bounds, notices, memory })
    }

    /// Serves a pod that the agent announced. One that is served already from the same sockets stays as it is, and the
    /// descriptors are closed; from those that are new it is served too. One of the same uid that is another (its sandbox was made anew while the agent was away) is
    /// removed first: its removal is returned beside the result, to be waited for.
    ///
    /// # Errors
    /// Why it cannot be served; it counts as unserved until it is, or is removed.
    pub fn add(
        &self,
        wire: Option<&node::Pod>,
        listeners: &[i32],
        fds: Vec<OwnedFd>,
    ) -> (Result<(), AddError>, Option<Removal>) {
        let Some(wire) = wire else { return (Err(AddError::NoPod), None) };
        let mut replaced = None;
        let result = self.try_add(wire, listeners, fds, &mut replaced);
        if result.is_err() {
            self.unserved().insert(wire.uid.clone());
        } else {
            self.unserved().remove(&wire.uid);
        }
        (result, replaced)
    }

    fn try_add(
        &self,
        wire: &node::Pod,
        ports: &[i32],
        fds: Vec<OwnedFd>,
        replaced: &mut Option<Removal>,
    ) -> Result<(), AddError> {
        if ports.len() != fds.len() {
            return Err(AddError::Descriptors { listeners: ports.len(), descriptors: fds.len() });
        }
        let (pod, stock) = self.pod(wire)?;
        // A kind of listener that this version does not know is closed: nothing may queue in it for ever.
        let known = ports.iter().zip(fds).filter_map(|(port, fd)| Some((Port::from_wire(*port)?, fd)));
        let listeners: Vec<_> = known.collect();
        if let Some(entry) = self.entries().get_mut(&pod.uid)
            && entry.pod.is_like(&pod)
            && let Some(added) = entry.added(duplicates(&listeners)?)?
        {
            if !added.is_empty() {
                self.host.extend(&entry.pod, duplicates(&added)?)?;
                entry.listeners.extend(shared(added));
            }
            return Ok(());
        }
        *replaced = self.remove(&pod.uid);
        if let Some(replaced) = replaced {
            replaced.leave_open(&listeners)?;
        }
        let hold = self.host.start(&pod, duplicates(&listeners)?)?;
        stock.prime();
        tracing::info!(pod = ?pod, identity = %pod.identity, addresses = ?pod.addresses, "pod added");
        let uid = Arc::clone(&pod.uid);
        self.entries().insert(uid, Entry { pod, stock, listeners: shared(listeners), _hold: hold });
        Ok(())
    }

    fn pod(&self, wire: &node::Pod) -> Result<(Arc<Pod>, Arc<Stock>), AddError> {
        let addresses = wire.addresses.iter().map(|bytes| ip_from_bytes(bytes)).collect::<Result<Vec<_>, _>>()?;
        if addresses.is_empty() {
            return Err(AddError::NoAddress);
        }
        let uid: Arc<str> = wire.uid.as_str().into();
        let stock = Stock::new(Arc::clone(&uid), &addresses, Arc::clone(&self.bounds.stock), self.notices.clone());
        let pod = Pod {
            uid,
            name: wire.name.as_str().into(),
            namespace: wire.namespace.as_str().into(),
            identity: SpiffeId::new(&self.trust_domain, &wire.namespace, &wire.service_account)?,
            addresses,
            sockets: Arc::clone(&stock) as Arc<dyn SocketSource>,
            live: Live::new(self.bounds.connections),
            open: OpenSockets::new(Arc::clone(&self.bounds.descriptors)),
            delivery_ports: DeliveryPorts::default(),
            dns: PodBounds::default(),
            lookups: Bound::default(),
            memory: self.memory.share(),
        };
        Ok((Arc::new(pod), stock))
    }

    /// Tells everything of a pod to end, and closes its stocked sockets; the rest ends with the returned removal. One that is not
    /// served is gone already.
    pub fn remove(&self, uid: &str) -> Option<Removal> {
        self.unserved().remove(uid);
        let Entry { pod, stock, listeners, _hold } = self.entries().remove(uid)?;
        // Those that accept are told before the gates close: they wait for nothing else then.
        pod.live.end();
        pod.open.close();
        stock.close();
        Some(Removal { pod, listeners })
    }

    /// Removes every pod that is not among these.
    pub fn retain(&self, known: &HashSet<String>) -> Vec<Removal> {
        self.unserved().retain(|uid| known.contains(uid));
        let gone = self.uids().into_iter().filter(|uid| !known.contains(uid.as_ref()));
        gone.filter_map(|uid| self.remove(&uid)).collect()
    }

    /// How many pods the agent announced and that are not served.
    pub fn unserved_count(&self) -> usize {
        self.unserved().len()
    }

    /// Uids of the pods that are served.
    pub fn uids(&self) -> Vec<Arc<str>> {
        self.entries().keys().cloned().collect()
    }

    /// The pods that are served.
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.entries().values().map(|entry| Arc::clone(&entry.pod)).collect()
    }

    /// The stock of a pod.
    pub fn stock(&self, uid: &str) -> Option<Arc<Stock>> {
        self.entries().get(uid).map(|entry| Arc::clone(&entry.stock))
    }

    /// The stocks of all pods.
    pub fn stocks(&self) -> Vec<Arc<Stock>> {
        self.entries().values().map(|entry| Arc::clone(&entry.stock)).collect()
    }

    /// Each pod's listening sockets, for an agent that was restarted.
    pub fn listeners(&self) -> Vec<(Arc<str>, Listeners)> {
        self.entries().iter().map(|(uid, entry)| (Arc::clone(uid), entry.listeners.clone())).collect()
    }

    /// Registers a pod that a test has made.
    #[cfg(test)]
    pub fn insert_for_test(&self, pod: &Arc<Pod>) {
        let stock =
            Stock::new(Arc::clone(&pod.uid), &pod.addresses, Arc::clone(&self.bounds.stock), self.notices.clone());
        let entry = Entry { pod: Arc::clone(pod), stock, listeners: Listeners::default(), _hold: Box::new(()) };
        self.entries().insert(Arc::clone(&pod.uid), entry);
    }

    fn unserved(&self) -> MutexGuard<'_, HashSet<String>> {
        self.unserved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<Arc<str>, Entry>> {
        // Inserting and removing leave nothing half done.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end of what lives in a removed pod.
#[must_use]
pub struct Removal {
    pod: Arc<Pod>,
    listeners: Listeners,
}

impl Removal {
    /// Waits until everything of the pod has ended, or ends it: when this returns, no socket of it carries anything.
    ///
    /// # Errors
    /// When the kernel does not end a socket, nor whoever has it.
    pub async fn ended(self) -> Result<(), StillAlive> {
        let Self { pod, listeners } = self;
        if tokio::time::timeout(BY_ITSELF, pod.live.ended()).await.is_ok() {
            tracing::info!(?pod, "pod removed");
            return Ok(());
        }
        // The tasks that accept have duplicates of these, which this ends as well.
        let listening = listeners.iter().filter(|(_, listener)| shut(listener).is_err()).count();
        let aborted = pod.open.abort().await;
        let left = listening + aborted.left;
        tracing::warn!(?pod, ended = aborted.ended, left, "pod removed; what had not ended of it was ended by force");
        if left == 0 || tokio::time::timeout(LAST, pod.live.ended()).await.is_ok() {
            return Ok(());
        }
        Err(StillAlive { uid: Arc::clone(&pod.uid) })
    }

    /// Those of the pod's listening sockets that are among these are another's by now.
    fn leave_open(&mut self, others: &[(Port, OwnedFd)]) -> io::Result<()> {
        let mut known = HashSet::new();
        for (_, fd) in others {
            known.insert(fstat(fd)?.st_ino);
        }
        self.listeners.retain(|(_, fd)| fstat(fd).is_ok_and(|stat| !known.contains(&stat.st_ino)));
        Ok(())
    }
}

/// Ends a listening socket: what waits in it is reset, and nothing more comes.
fn shut(listener: &OwnedFd) -> nix::Result<()> {
    match shutdown(listener.as_raw_fd(), Shutdown::Both) {
        // Said of the one for datagrams, and done all the same.
        Ok(()) | Err(Errno::ENOTCONN) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Something of a removed pod did not end in time, nor could be ended. Only the end of the process closes it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("sockets of pod {uid}, which is gone, cannot be ended; the proxy ends to close them")]
pub struct StillAlive {
    /// Which pod.
    pub uid: Arc<str>,
}
