//! A pod's capture: put in force, asked of the kernel, and mended where something of it is gone.

use std::sync::{MutexGuard, PoisonError};

use ztunnel_ebpf::PodEntry;

use super::super::capture::{Attachment, CaptureError, Guard, PodCapture, Route};
use super::super::drift::Drift;
use super::super::host::Host;
use super::super::netns::Netns;
use super::super::pod_network::{self, Interface, Missing, mirror};
use super::super::sockets::{ListenerSet, SocketError};
use super::{EnrolError, InvalidPod, Pod, PodInfo, needs};

/// What the kernel was told of a pod last. What differs from it was changed behind the agent's back; what is to differ is a
/// change of the agent's own.
#[derive(Debug)]
pub(super) struct Told {
    entry: PodEntry,
    /// The destinations.
    routes: Vec<Route>,
    guard: Option<Guard>,
}

/// Puts a pod's capture in force, or tells the one that is in force its present addresses and listeners.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn attach(
    host: &Host,
    info: &PodInfo,
    netns: &Netns,
    listeners: &ListenerSet,
) -> Result<(PodCapture, Told), EnrolError> {
    let interface = interface(host, info, netns)?;
    let (entry, guard) = (entry(host, info, interface)?, guard(interface));
    let routes = mirror::read(netns, interface.index)?;
    host.capture.set_routes(netns.cookie(), &routes)?;
    let attachment = Attachment { uid: &info.uid, netns, entry, listeners: listeners.borrow(), guard };
    Ok((host.capture.attach_pod(attachment)?, Told { entry, routes, guard }))
}

/// The capture that an earlier agent left of a pod, brought to what this one wants of it.
///
/// # Errors
/// When the kernel refuses; [`EnrolError::NoListeners`] when something is to be attached and there are none.
pub(super) fn adopt(
    host: &Host,
    info: &PodInfo,
    netns: &Netns,
    listeners: Option<&ListenerSet>,
) -> Result<(PodCapture, Told), EnrolError> {
    if let Some(listeners) = listeners {
        return attach(host, info, netns, listeners);
    }
    let interface = interface(host, info, netns)?;
    let (entry, guard) = (entry(host, info, interface)?, guard(interface));
    let capture = host.capture.adopt_pod(&info.uid).ok_or(EnrolError::NoListeners)?;
    let in_force = capture.mend_pins().and_then(|_| capture.verify_programs(netns, guard));
    match in_force.and_then(|()| capture.tell(entry)) {
        Ok(()) => {}
        Err(error) if error.is_absence() => return Err(EnrolError::NoListeners),
        Err(error) => return Err(error.into()),
    }
    let routes = mirror::read(netns, interface.index)?;
    host.capture.set_routes(netns.cookie(), &routes)?;
    host.capture.enrol(netns.cookie(), entry)?;
    Ok((capture, Told { entry, routes, guard }))
}

/// What the programs are to know of a pod.
fn entry(host: &Host, info: &PodInfo, interface: Interface) -> Result<PodEntry, EnrolError> {
    // What reaches a pod whose address is on lo comes by any other interface.
    let index = if interface.is_on_loopback { 0 } else { interface.index };
    Ok(info.entry(index, host.flags()).ok_or(InvalidPod::Addresses)?)
}

/// Where a pod's packets are looked at last. None where there is no way out.
const fn guard(interface: Interface) -> Option<Guard> {
    match interface {
        interface if !interface.leads_out() => None,
        Interface { host_end: Some(index), .. } => Some(Guard::HostEnd { index }),
        Interface { index, .. } => Some(Guard::PodEnd { index }),
    }
}

fn interface(host: &Host, info: &PodInfo, netns: &Netns) -> Result<Interface, EnrolError> {
    Ok(pod_network::find_interface(netns, info.primary()?, host.home())?)
}

impl Pod {
    /// Whether links, addresses, routes or rules of the namespace changed since it was last asked.
    #[must_use]
    pub fn take_changes(&self) -> bool {
        self.changes.take()
    }

    /// Why the pod is held less firmly than others although everything is in force; `None` if it is not.
    #[must_use]
    pub fn weaker(&self) -> Option<&'static str> {
        match self.told().guard {
            Some(Guard::PodEnd { .. }) => Some(
                "its guard stands in the pod itself, for want of an end of its interface on the node: a process that may \
                 open packet sockets gets past it (PACKET_QDISC_BYPASS)",
            ),
            None => Some(
                "it has no guard, since its address is on lo and none of its routes leads out: where one is added, what the \
                 pod sends is held only a moment later",
            ),
            Some(Guard::HostEnd { .. }) => None,
        }
    }

    pub(super) fn warn_if_weaker(&self) {
        if let Some(why) = self.weaker() {
            let PodInfo { uid, name, namespace, .. } = &self.info;
            tracing::warn!(pod = uid, name, namespace, why, "held less firmly than others");
        }
    }

    /// Asks the kernel whether everything is in force. Blocks shortly.
    ///
    /// # Errors
    /// What is not.
    pub fn verify(&self, host: &Host) -> Result<(), EnrolError> {
        host.refuse_foreign_programs()?;
        host.refuse_missing_hooks()?;
        let interface = interface(host, &self.info, &self.netns)?;
        let entry = entry(host, &self.info, interface)?;
        self.capture.verify(&self.netns, entry, guard(interface))?;
        if host.capture.enrolled(self.netns.cookie())? != Some(entry) {
            return Err(CaptureError::NotInForce(String::from("the map of enrolled pods does not hold it")).into());
        }
        pod_network::verify(&self.netns, &needs(host, &self.info))?;
        self.has_listeners(host)?;
        let listeners = self.listeners().ok_or(EnrolError::NoListeners)?;
        Ok(self.capture.verify_listeners(listeners.borrow())?)
    }

    /// Tells the kernel what is chosen for all pods by now, in an order in which no query is lost. Blocks shortly.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn follow(&self, host: &Host) -> Result<(), EnrolError> {
        let entry = entry(host, &self.info, interface(host, &self.info, &self.netns)?)?;
        let needs = needs(host, &self.info);
        // Queries are brought here only while the programs give them to the proxy.
        if !needs.dns {
            pod_network::mend(&self.netns, &needs)?;
        }
        self.tell(host, entry)?;
        if needs.dns {
            pod_network::mend(&self.netns, &needs)?;
        }
        Ok(())
    }

    fn tell(&self, host: &Host, entry: PodEntry) -> Result<(), EnrolError> {
        self.capture.tell(entry)?;
        host.capture.enrol(self.netns.cookie(), entry)?;
        self.told().entry = entry;
        Ok(())
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks for everything that is missing in the kernel and mends it. What is in force stays so, also when something
    /// cannot be mended. Returns what was found, and why the pod is not wholly in force if it is not. Blocks shortly.
    pub fn look_after(&self, host: &Host) -> (Vec<Drift>, Option<EnrolError>) {
        let mut found = Vec::new();
        let network = pod_network::mend(&self.netns, &needs(host, &self.info));
        let network = network.map(|missing| found.extend(drift_of(&missing))).map_err(EnrolError::from);
        let capture = self.mend_capture(host, &mut found);
        for what in &found {
            host.drift.add(*what);
        }
        let foreign = host.refuse_foreign_programs().map_err(EnrolError::from);
        let hooks = host.refuse_missing_hooks().map_err(EnrolError::from);
        let listeners = self.has_listeners(host);
        let wrong = [network, capture, foreign, hooks, listeners].into_iter().find_map(Result::err);
        (found, wrong)
    }

    fn mend_capture(&self, host: &Host, found: &mut Vec<Drift>) -> Result<(), EnrolError> {
        let interface = interface(host, &self.info, &self.netns)?;
        self.mirror(host, interface, found)?;
        let (entry, guard) = (entry(host, &self.info, interface)?, guard(interface));
        let mut lost = self.lost_programs(guard)?;
        if !lost.is_empty() && self.capture.mend_pins()? {
            // Where only pins were gone, nothing has to be attached.
            found.push(Drift::Program);
            lost = self.lost_programs(guard)?;
        }
        // One that is wanted elsewhere than it was put was not taken away.
        let is_moved = self.told().guard != guard;
        found.extend(lost.iter().filter(|what| !is_moved || **what != Drift::Guard));
        match (lost.is_empty(), self.listeners()) {
            (true, listeners) => {
                self.mend_maps(host, entry, found)?;
                listeners.map_or(Ok(()), |listeners| self.mend_listeners(&listeners, found))
            }
            (false, listeners) => {
                // Whether the programs can be attached or not.
                self.mend_entry(host, entry, found)?;
                let listeners = listeners.ok_or(EnrolError::NoListeners)?;
                *self.told() = attach(host, &self.info, &self.netns, &listeners)?.1;
                Ok(())
            }
        }
    }

    /// What of the pod's programs is not attached, or uses other maps than those that are pinned.
    fn lost_programs(&self, guard: Option<Guard>) -> Result<Vec<Drift>, EnrolError> {
        let asked = [
            (self.capture.verify_lookup(&self.netns), Drift::Program),
            (self.capture.verify_guard(&self.netns, guard), Drift::Guard),
        ];
        let mut lost = Vec::new();
        for (in_force, what) in asked {
            match in_force {
                Ok(()) => {}
                Err(error) if error.is_absence() => lost.push(what),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(lost)
    }

    /// What the pod's programs and the connect hooks know of it.
    fn mend_maps(&self, host: &Host, entry: PodEntry, found: &mut Vec<Drift>) -> Result<(), EnrolError> {
        if self.told().entry != entry {
            return self.tell(host, entry);
        }
        match self.capture.verify_entry(entry) {
            Ok(()) => {}
            Err(error) if error.is_absence() => {
                found.push(Drift::Program);
                self.capture.tell(entry)?;
            }
            Err(error) => return Err(error.into()),
        }
        self.mend_entry(host, entry, found)
    }

    fn mend_entry(&self, host: &Host, entry: PodEntry, found: &mut Vec<Drift>) -> Result<(), EnrolError> {
        if host.capture.enrolled(self.netns.cookie())? == Some(entry) {
            return Ok(());
        }
        if self.told().entry == entry {
            found.push(Drift::Entry);
        }
        Ok(host.capture.enrol(self.netns.cookie(), entry)?)
    }

    fn mend_listeners(&self, listeners: &ListenerSet, found: &mut Vec<Drift>) -> Result<(), EnrolError> {
        match self.capture.verify_listeners(listeners.borrow()) {
            Ok(()) => Ok(()),
            Err(error) if error.is_absence() => {
                found.push(Drift::Listeners);
                Ok(self.capture.replace_listeners(listeners.borrow())?)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Tells the programs of the namespace's routes: when they changed, and when what was told is gone.
    fn mirror(&self, host: &Host, interface: Interface, found: &mut Vec<Drift>) -> Result<(), EnrolError> {
        let wanted = mirror::read(&self.netns, interface.index)?;
        let in_force = host.capture.routes(self.netns.cookie())?;
        let same = |a: &[Route], b: &[Route]| a.len() == b.len() && a.iter().all(|route| b.contains(route));
        if same(&wanted, &in_force) {
            self.told().routes = wanted;
            return Ok(());
        }
        // Whether somebody took out what was told, or there is something new to tell.
        let told = std::mem::take(&mut self.told().routes);
        if !told.is_empty() && !same(&told, &in_force) {
            found.push(Drift::Destinations);
        }
        host.capture.set_routes(self.netns.cookie(), &wanted)?;
        self.told().routes = wanted;
        Ok(())
    }

    /// Sets what is missing of it in the kernel and opens listeners if nobody has any. Blocks shortly.
    ///
    /// # Errors
    /// When it is not wholly in force; [`EnrolError::NoListeners`]: it will be when the proxy returns them.
    pub fn mend(&self, host: &Host) -> Result<(), EnrolError> {
        match self.look_after(host).1 {
            None | Some(EnrolError::NoListeners | EnrolError::NoDnsListeners | EnrolError::NoIpv6Listeners) => {}
            Some(error) => return Err(error),
        }
        match self.open_listeners(host) {
            Err(EnrolError::Socket(SocketError::PortInUse(_))) => {
                return Err(self.has_listeners(host).err().unwrap_or(EnrolError::NoListeners));
            }
            opened => opened?,
        }
        self.verify(host)
    }
}

fn drift_of(missing: &Missing) -> impl Iterator<Item = Drift> {
    let parts = [
        (!missing.rules.is_empty(), Drift::Rule),
        (!missing.routes.is_empty(), Drift::Route),
        (!missing.sysctls.is_empty(), Drift::Sysctl),
        (missing.loopback, Drift::Loopback),
    ];
    parts.into_iter().filter(|(is_missing, _)| *is_missing).map(|(_, what)| what)
}
