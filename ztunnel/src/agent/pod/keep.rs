//! A pod's capture: put in force, asked of the kernel, and mended where something of it is gone.

use std::sync::PoisonError;

use ztunnel_ebpf::PodEntry;

use super::super::capture::{Attachment, CaptureError, Guard, PodCapture, Route};
use super::super::drift::Drift;
use super::super::host::Host;
use super::super::netns::Netns;
use super::super::pod_network::{self, Interface, Missing, mirror};
use super::super::sockets::{ListenerSet, SocketError};
use super::{EnrolError, Pod, PodInfo, needs};

/// Puts a pod's capture in force, or tells the one that is in force its present addresses and listeners. Returns also the
/// destinations that the programs were told.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn attach(
    host: &Host,
    info: &PodInfo,
    netns: &Netns,
    entry: PodEntry,
    listeners: &ListenerSet,
) -> Result<(PodCapture, Vec<Route>), EnrolError> {
    let interface = interface(host, info, netns)?;
    let routes = mirror::read(netns, interface.index)?;
    host.capture.set_routes(netns.cookie(), &routes)?;
    let listeners = listeners.borrow();
    let attachment = Attachment { uid: &info.uid, netns, entry, listeners, guard: guard(interface) };
    Ok((host.capture.attach_pod(attachment)?, routes))
}

/// The capture that an earlier agent left of a pod, brought to what this one wants of it.
///
/// # Errors
/// When the kernel refuses; [`EnrolError::NoListeners`] when something is to be attached and there are none.
pub(super) fn adopt(
    host: &Host,
    info: &PodInfo,
    netns: &Netns,
    entry: PodEntry,
    listeners: Option<&ListenerSet>,
) -> Result<(PodCapture, Vec<Route>), EnrolError> {
    if let Some(listeners) = listeners {
        return attach(host, info, netns, entry, listeners);
    }
    let interface = interface(host, info, netns)?;
    let capture = host.capture.adopt_pod(&info.uid).ok_or(EnrolError::NoListeners)?;
    match capture.verify(netns, entry, guard(interface)) {
        Ok(()) => {}
        Err(error) if error.is_absence() => return Err(EnrolError::NoListeners),
        Err(error) => return Err(error.into()),
    }
    let routes = mirror::read(netns, interface.index)?;
    host.capture.set_routes(netns.cookie(), &routes)?;
    host.capture.enrol(netns.cookie(), entry)?;
    Ok((capture, routes))
}

/// Where a pod's packets are looked at last. What is on `lo` does not leave.
const fn guard(interface: Interface) -> Option<Guard> {
    match interface {
        Interface { is_loopback: true, .. } => None,
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

    /// Asks the kernel whether everything is in force. Blocks shortly.
    ///
    /// # Errors
    /// What is not.
    pub fn verify(&self, host: &Host) -> Result<(), EnrolError> {
        host.refuse_foreign_programs()?;
        let interface = interface(host, &self.info, &self.netns)?;
        self.capture.verify(&self.netns, self.entry, guard(interface))?;
        if host.capture.enrolled(self.netns.cookie())? != Some(self.entry) {
            return Err(CaptureError::NotInForce(String::from("the map of enrolled pods does not hold it")).into());
        }
        pod_network::verify(&self.netns, &needs(host, &self.info))?;
        self.has_listeners(host)
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
        let listeners = self.has_listeners(host);
        let wrong = [network, capture, foreign, listeners].into_iter().find_map(Result::err);
        (found, wrong)
    }

    fn mend_capture(&self, host: &Host, found: &mut Vec<Drift>) -> Result<(), EnrolError> {
        let interface = interface(host, &self.info, &self.netns)?;
        self.mirror(host, interface, found)?;
        let mut missing = Vec::new();
        match self.capture.verify_guard(&self.netns, guard(interface)) {
            Ok(()) => {}
            Err(error) if error.is_absence() => missing.push(Drift::Guard),
            Err(error) => return Err(error.into()),
        }
        match self.capture.verify(&self.netns, self.entry, None) {
            Ok(()) => {}
            Err(error) if error.is_absence() => missing.push(Drift::Program),
            Err(error) => return Err(error.into()),
        }
        if host.capture.enrolled(self.netns.cookie())? != Some(self.entry) {
            missing.push(Drift::Entry);
            host.capture.enrol(self.netns.cookie(), self.entry)?;
        }
        found.extend(&missing);
        let listeners = self.listeners();
        match (missing.iter().any(|what| *what != Drift::Entry), listeners) {
            (false, _) => Ok(()),
            (true, Some(listeners)) => attach(host, &self.info, &self.netns, self.entry, &listeners).map(drop),
            (true, None) => Err(EnrolError::NoListeners),
        }
    }

    /// Tells the programs of the namespace's routes: when they changed, and when what was told is gone.
    fn mirror(&self, host: &Host, interface: Interface, found: &mut Vec<Drift>) -> Result<(), EnrolError> {
        let wanted = mirror::read(&self.netns, interface.index)?;
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let in_force = host.capture.routes(self.netns.cookie())?;
        let same = |a: &[Route], b: &[Route]| a.len() == b.len() && a.iter().all(|route| b.contains(route));
        if same(&wanted, &in_force) {
            *told = wanted;
            return Ok(());
        }
        // Whether somebody took out what was told, or there is something new to tell.
        if !told.is_empty() && !same(&told, &in_force) {
            found.push(Drift::Destinations);
        }
        host.capture.set_routes(self.netns.cookie(), &wanted)?;
        *told = wanted;
        Ok(())
    }

    /// Sets what is missing of it in the kernel and opens listeners if nobody has any. Blocks shortly.
    ///
    /// # Errors
    /// When it is not wholly in force; [`EnrolError::NoListeners`]: it will be when the proxy returns them.
    pub fn mend(&self, host: &Host) -> Result<(), EnrolError> {
        match self.look_after(host).1 {
            None | Some(EnrolError::NoListeners | EnrolError::NoDnsListeners) => {}
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
