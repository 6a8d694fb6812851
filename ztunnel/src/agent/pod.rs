//! One pod's enrolment in the kernel, from the first step to the last.

mod info;
mod keep;

use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ztunnel_ebpf::{MARK_DELIVERY, MARK_OUTBOUND};

use super::adopt::Stranded;
use super::capture::{CaptureError, PodCapture};
use super::host::{ForeignPrograms, HooksMissing, Host};
use super::netlink::Changes;
use super::netns::{Netns, NetnsError, inode_at};
use super::pod_network::{self, Before, Needs, PodNetworkError};
use super::sock_diag::{self, SockDiagError};
use super::sockets::{ListenerSet, SocketError};
use super::state::{Saved, State, StateError};

use keep::Told;

pub use info::{InvalidPod, PodInfo, Sandbox};

/// Marks of sockets that only make sense while the pod's rules are there.
const MARKS: [u32; 2] = [MARK_OUTBOUND, MARK_DELIVERY];

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
    /// Connections of this node may not be seen as the pod made them.
    #[error(transparent)]
    Foreign(#[from] ForeignPrograms),
    /// The node's own programs are gone.
    #[error(transparent)]
    Hooks(#[from] HooksMissing),
    /// Rules, routes or sysctl.
    #[error(transparent)]
    Network(#[from] PodNetworkError),
    /// Listeners.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Connections that it has.
    #[error(transparent)]
    Connections(#[from] SockDiagError),
    /// Programs and maps.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The file that a restarted agent reads.
    #[error(transparent)]
    State(#[from] StateError),
    /// What it was before has to leave first, and has not.
    #[error("it was withdrawn, but not wholly released: {0}")]
    NotReleased(String),
    /// The proxy was to return its listeners, and they are not there yet.
    #[error("the proxy that holds its listeners has not returned them; capture stays in force, try again later")]
    NoListeners,
    /// The proxy returned its listeners, and those for DNS were not among them and could not be opened.
    #[error("there are no listeners for DNS, which is captured; try again later")]
    NoDnsListeners,
    /// The same of those for IPv6.
    #[error("there are no listeners for IPv6, of which it has an address; try again later")]
    NoIpv6Listeners,
}

/// A pod that could not be enrolled.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct NotEnrolled {
    /// Why.
    #[source]
    pub error: EnrolError,
    /// What could not be taken back.
    pub left: Option<Stranded>,
}

impl<E: Into<EnrolError>> From<E> for Box<NotEnrolled> {
    fn from(error: E) -> Self {
        Self::new(NotEnrolled { error: error.into(), left: None })
    }
}

/// An enrolled pod. Dropping it changes nothing in the kernel but that the agent's duplicates of the sockets are
/// closed.
#[derive(Debug)]
pub struct Pod {
    /// As announced.
    pub info: PodInfo,
    netns: Netns,
    changes: Changes,
    before: Before,
    capture: PodCapture,
    sandbox: Mutex<Sandbox>,
    listeners: Mutex<Option<Arc<ListenerSet>>>,
    told: Mutex<Told>,
}

impl Pod {
    /// Enrols a pod: when this returns, the kernel was asked and everything is in force. Until the last steps no
    /// connection is captured; when a step fails all are taken back.
    ///
    /// Blocks; not for a runtime's thread.
    ///
    /// # Errors
    /// When a step fails.
    pub fn enrol(
        host: &Host,
        state: &State,
        info: PodInfo,
        netns: Netns,
        sandbox: Sandbox,
    ) -> Result<Self, Box<NotEnrolled>> {
        host.look_for_foreign_programs()?;
        host.refuse_foreign_programs()?;
        host.refuse_missing_hooks()?;
        // First of all, since it changes nothing: an address that is not the pod's.
        pod_network::find_interface(&netns, info.primary()?, host.home())?;
        let changes = netns.changes()?;
        let before = pod_network::before(&netns, &needs(host, &info))?;
        let saved = Saved::new(&info, &netns, &sandbox, before);
        let steps = || -> Result<_, EnrolError> {
            state.save(&saved)?;
            pod_network::prepare(&netns, &needs(host, &info))?;
            let listeners = ListenerSet::open(&netns, host.dns())?;
            let (capture, told) = keep::attach(host, &info, &netns, &listeners)?;
            Ok((listeners, capture, told))
        };
        let (listeners, capture, told) = match steps() {
            Ok(done) => done,
            Err(error) => {
                let left = undo(host, state, saved, &netns);
                return Err(Box::new(NotEnrolled { error, left }));
            }
        };
        let listeners = Mutex::new(Some(Arc::new(listeners)));
        let (sandbox, told) = (Mutex::new(sandbox), Mutex::new(told));
        let pod = Self { info, netns, changes, before, capture, sandbox, listeners, told };
        if let Err(error) = pod.verify(host) {
            let left = undo(host, state, saved, &pod.netns);
            return Err(Box::new(NotEnrolled { error, left }));
        }
        pod.warn_if_weaker();
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
        host: &Host,
        saved: &Saved,
        netns: Netns,
        returned: Option<Arc<ListenerSet>>,
    ) -> Result<Self, EnrolError> {
        let info = saved.pod.clone();
        let changes = netns.changes()?;
        pod_network::mend(&netns, &needs(host, &info))?;
        let listeners = match returned {
            Some(listeners) => Some(ListenerSet::completed(listeners, &netns, info.listeners(host))?),
            None => match ListenerSet::open(&netns, host.dns()) {
                Ok(listeners) => Some(Arc::new(listeners)),
                Err(SocketError::PortInUse(_)) => None,
                Err(error) => return Err(error.into()),
            },
        };
        let (capture, told) = keep::adopt(host, &info, &netns, listeners.as_deref())?;
        let mut sandbox = Sandbox { id: saved.sandbox.clone(), path: saved.netns_path.clone() };
        // A path that this agent cannot see, or that is another's by now, says nothing about the pod's end.
        if inode_at(&sandbox.path) != Some(netns.inode()) && !saved.has_lost_its_path() {
            sandbox.path = PathBuf::new();
        }
        let (sandbox, listeners, told) = (Mutex::new(sandbox), Mutex::new(listeners), Mutex::new(told));
        let pod = Self { info, netns, changes, before: saved.before, capture, sandbox, listeners, told };
        pod.warn_if_weaker();
        Ok(pod)
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

    /// What is left to do when it is withdrawn. It has no listeners after this: who leaves has them.
    #[must_use]
    pub fn leave(&self) -> Stranded {
        let (listeners, netns) = (self.lock().take(), self.netns.try_clone().ok());
        Stranded { listeners, leaving: true, netns, ..Stranded::new(self.saved()) }
    }

    /// What its file says.
    #[must_use]
    pub fn saved(&self) -> Saved {
        Saved::new(&self.info, &self.netns, &self.sandbox(), self.before)
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

    /// Whether the agent has every listener that the pod needs.
    ///
    /// # Errors
    /// [`EnrolError::NoListeners`], [`EnrolError::NoDnsListeners`], [`EnrolError::NoIpv6Listeners`].
    pub fn has_listeners(&self, host: &Host) -> Result<(), EnrolError> {
        let needs = self.info.listeners(host);
        match self.listeners() {
            None => Err(EnrolError::NoListeners),
            Some(listeners) if listeners.lacks_dns(needs) => Err(EnrolError::NoDnsListeners),
            Some(listeners) if !listeners.without_v6(needs).is_empty() => Err(EnrolError::NoIpv6Listeners),
            Some(_) => Ok(()),
        }
    }

    /// Opens new listeners where it has none and nobody else holds any, and those for DNS or for IPv6 where it has only the
    /// others. Blocks shortly.
    ///
    /// # Errors
    /// When a port is in use, or the kernel refuses.
    pub fn open_listeners(&self, host: &Host) -> Result<(), EnrolError> {
        let listeners = match self.listeners() {
            Some(_) if self.has_listeners(host).is_ok() => return Ok(()),
            Some(listeners) => ListenerSet::completed(listeners, &self.netns, self.info.listeners(host))?,
            None => Arc::new(ListenerSet::open(&self.netns, host.dns())?),
        };
        self.capture.replace_listeners(listeners.borrow())?;
        *self.lock() = Some(listeners);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<ListenerSet>>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What there is to know of a pod whose namespace is captured although nobody knows whose it is: its file is lost, or cannot be
/// read. `None`: the namespace is not captured. What was set in it before capture is not known any more, and stays as it is when
/// the pod leaves. `is_held`: the pod's programs are known to be attached there. Blocks shortly.
///
/// # Errors
/// When the kernel cannot be asked, or the file cannot be written.
pub fn rediscover(
    host: &Host,
    state: &State,
    info: &PodInfo,
    netns: &Netns,
    sandbox: &Sandbox,
    is_held: bool,
) -> Result<Option<Saved>, EnrolError> {
    if !is_held && !host.capture.captures(netns.cookie())? {
        return Ok(None);
    }
    // As when it is enrolled: an address that is not the pod's.
    pod_network::find_interface(netns, info.primary()?, host.home())?;
    let before = pod_network::before(netns, &needs(host, info))?;
    let saved = Saved::new(info, netns, sandbox, before);
    state.save(&saved)?;
    Ok(Some(saved))
}

/// Takes a pod over as what it is announced as now, in the namespace that it is captured in already. Its capture is in force
/// all the time. What is not announced stays as it was. Blocks shortly.
///
/// # Errors
/// When it cannot be that, as with an address that is not its own: then it is what it was.
pub fn adopt_as(
    host: &Host,
    state: &State,
    (saved, listeners): (&Saved, Option<Arc<ListenerSet>>),
    (info, netns, sandbox): (&PodInfo, Netns, Sandbox),
) -> Result<Pod, EnrolError> {
    if saved.pod == *info {
        return Pod::adopt(host, saved, netns, listeners);
    }
    pod_network::find_interface(&netns, info.primary()?, host.home())?;
    let now = pod_network::before(&netns, &needs(host, info))?;
    let fwmark_reflect_v6 = saved.before.fwmark_reflect_v6.or(now.fwmark_reflect_v6);
    let id = if sandbox.id.is_empty() { saved.sandbox.clone() } else { sandbox.id };
    let is_told = !sandbox.path.as_os_str().is_empty();
    let path = if is_told { sandbox.path } else { saved.netns_path.clone() };
    let mut changed = Saved::new(info, &netns, &Sandbox { id, path }, Before { fwmark_reflect_v6, ..saved.before });
    if !is_told {
        // This agent may see another folder there than the one in which the path was.
        changed.netns_folder = saved.netns_folder;
    }
    state.save(&changed)?;
    let adopted = Pod::adopt(host, &changed, netns, listeners);
    if adopted.is_err()
        && let Err(error) = state.save(saved)
    {
        tracing::warn!(pod = info.uid, %error, "cannot write down that it is what it was");
    }
    adopted
}

/// What is restored in a namespace of which nobody knows how it was: what is set now stays, except for the mesh's own rules and
/// routes. Blocks shortly.
///
/// # Errors
/// When it cannot be asked.
pub fn before_unknown(netns: &Netns) -> Result<Before, EnrolError> {
    Ok(pod_network::before(netns, &Needs { addresses: &[], dns: false })?)
}

/// First part of leaving: from now on nothing new is captured, and what was captured has ended. Blocks shortly.
///
/// # Errors
/// When the kernel refuses, or captured connections are still there: then the guard stands, since what they would send
/// must not leave in clear.
pub fn release(host: &Host, saved: &Saved, netns: Option<&Netns>) -> Result<(), EnrolError> {
    host.capture.release(saved.netns_cookie)?;
    if let Some(netns) = netns {
        end_captured(netns)?;
    }
    Ok(host.capture.unpin_pod(&saved.pod.uid)?)
}

/// Second part of leaving, when every proxy has closed its sockets of the pod or has had its time: what is left of their
/// connections ends, whatever those proxies do. Blocks shortly.
///
/// # Errors
/// When the kernel does not end some.
pub fn end_proxied(host: &Host, netns: &Netns) -> Result<(), EnrolError> {
    let exempt = host.capture.exempt_sockets()?;
    match sock_diag::destroy_stored(netns, exempt.as_fd()) {
        Ok(0) => Ok(()),
        Ok(ended) => {
            tracing::warn!(connections = ended, "connections of a withdrawn pod were left by the proxy, and ended");
            Ok(())
        }
        Err(error @ SockDiagError::Remaining(_)) => Err(error.into()),
        // All that the proxies were asked for is done.
        Err(error) => {
            tracing::warn!(%error, "cannot look whether the proxy has left connections of a withdrawn pod");
            Ok(())
        }
    }
}

/// Last part of leaving, when the proxy has closed its sockets: removes what is left of a pod in its namespace.
/// Connections that were captured end first: without the rules they would be sent in clear.
///
/// # Errors
/// When the kernel refuses, or captured connections are still there: then the rules stay.
pub fn restore(netns: &Netns, before: Before) -> Result<(), EnrolError> {
    end_captured(netns)?;
    Ok(pod_network::restore(netns, before)?)
}

/// Ends the connections of a pod that only work through the proxy. Blocks shortly.
///
/// # Errors
/// When the kernel refuses, or some are still there after a while.
fn end_captured(netns: &Netns) -> Result<(), EnrolError> {
    let ended = sock_diag::destroy(netns, &MARKS)?;
    if ended > 0 {
        tracing::info!(connections = ended, "captured connections of a withdrawn pod ended");
    }
    Ok(())
}

fn needs<'a>(host: &Host, info: &'a PodInfo) -> Needs<'a> {
    Needs { addresses: &info.addresses, dns: host.captures_dns() }
}

/// Takes back a failed enrolment. What cannot be taken back is only logged, since the first error is the one that matters,
/// and returned: it is to be tried again. The pod's file goes last, and says from the beginning what is to become of it.
fn undo(host: &Host, state: &State, saved: Saved, netns: &Netns) -> Option<Stranded> {
    let saved = saved.leaving();
    let uid = saved.pod.uid.as_str();
    if let Err(error) = state.save(&saved) {
        tracing::warn!(pod = uid, %error, "cannot write down that a failed enrolment is taken back");
    }
    let undone = release(host, &saved, Some(netns))
        .and_then(|()| restore(netns, saved.before))
        .and_then(|()| Ok(state.remove(uid)?));
    let error = undone.err()?;
    tracing::warn!(pod = uid, %error, "cannot take back a failed enrolment yet");
    let reason = format!("not enrolled, and not wholly taken back: {error}");
    let netns = netns.try_clone().ok();
    Some(Stranded { reason, leaving: true, netns, ..Stranded::new(saved) })
}
