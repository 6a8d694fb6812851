//! Workloads and services that discovery sent and that cannot be taken.
//!
//! What such a resource would have said about its traffic, such as a waypoint or an identity, is not known. Forgetting it
//! would let its traffic through in plain, and keeping its last good version would leave out what is new. So it takes
//! the place of that version, and connections to it are refused until it is repaired or removed.

use std::cmp::Reverse;
use std::net::IpAddr;
use std::sync::Arc;

use imbl::HashMap;
use mesh_proto::workload as wire;

use crate::address::ip_from_bytes;
use crate::blocks::{Blocks, Few, add_to, remove_from};
use crate::resolve::Viewpoint;
use crate::service::{Service, Vip};
use crate::workload::{TunnelProtocol, Workload};

/// A workload or a service that cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unusable {
    /// The primary name in discovery.
    pub name: Arc<str>,
    /// What is wrong with it.
    pub reason: Arc<str>,
    place: Option<Place>,
    /// Whether the place is all that the resource says, rather than what of it could be read.
    complete: bool,
}

/// Where traffic to the resource goes, and what decides between several of the same address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    Workload { network: Arc<str>, addresses: Box<[IpAddr]>, hbone: bool },
    Service { vips: Box<[Vip]>, canonical: bool, private_to: Option<Arc<str>> },
}

impl Unusable {
    /// A resource of which nothing could be read.
    pub(crate) fn unreadable(name: &str, reason: &str) -> Self {
        Self { name: name.into(), reason: reason.into(), place: None, complete: false }
    }

    /// A workload that was read, and says what cannot be.
    pub(crate) fn workload(name: &str, reason: &str, wire: &wire::Workload) -> Self {
        let host_network = wire.network_mode == i32::from(wire::NetworkMode::HostNetwork);
        let listed: &[bytes::Bytes] = if host_network { &[] } else { &wire.addresses };
        let addresses: Box<[IpAddr]> = listed.iter().filter_map(|bytes| ip_from_bytes(bytes).ok()).collect();
        let complete = addresses.len() == listed.len();
        // A protocol of the future is no less than HBONE.
        let hbone = wire.tunnel_protocol != i32::from(wire::TunnelProtocol::None)
            && wire.tunnel_protocol != i32::from(wire::TunnelProtocol::LegacyIstioMtls);
        let place = Place::Workload { network: wire.network.as_str().into(), addresses, hbone };
        Self { place: Some(place), complete, ..Self::unreadable(name, reason) }
    }

    /// A service that was read, and says what cannot be.
    pub(crate) fn service(name: &str, reason: &str, wire: &wire::Service) -> Self {
        let vips: Box<[Vip]> = wire.addresses.iter().filter_map(|address| Vip::try_from(address).ok()).collect();
        let complete = vips.len() == wire.addresses.len();
        let private = wire.visibility == i32::from(wire::service::Visibility::Namespace);
        let private_to = private.then(|| wire.namespace.as_str().into());
        let place = Place::Service { vips, canonical: wire.canonical, private_to };
        Self { place: Some(place), complete, ..Self::unreadable(name, reason) }
    }

    /// Adds the addresses of the version before, where this one's could not all be read.
    pub(crate) fn replace(&mut self, before: Place) {
        if self.complete {
            return;
        }
        match (&mut self.place, before) {
            (None, before) => self.place = Some(before),
            (Some(Place::Workload { addresses, .. }), Place::Workload { addresses: before, .. }) => {
                add(addresses, before);
            }
            (Some(Place::Service { vips, .. }), Place::Service { vips: before, .. }) => add(vips, before),
            (Some(Place::Workload { .. }), Place::Service { .. })
            | (Some(Place::Service { .. }), Place::Workload { .. }) => {}
        }
    }

    pub(crate) fn place(&self) -> Option<&Place> {
        self.place.as_ref()
    }

    fn workload_rank(&self) -> WorkloadRank<'_> {
        let hbone = matches!(&self.place, Some(Place::Workload { hbone: true, .. }));
        workload_rank(&self.name, hbone)
    }

    fn service_rank(&self) -> (bool, &str) {
        let canonical = matches!(&self.place, Some(Place::Service { canonical: true, .. }));
        (!canonical, &self.name)
    }
}

fn add<T: PartialEq>(list: &mut Box<[T]>, more: Box<[T]>) {
    let mut all = std::mem::take(list).into_vec();
    for item in more {
        if !all.contains(&item) {
            all.push(item);
        }
    }
    *list = all.into();
}

impl From<&Workload> for Place {
    fn from(workload: &Workload) -> Self {
        let addresses = if workload.host_network { Box::default() } else { workload.addresses.clone() };
        let hbone = workload.tunnel_protocol == TunnelProtocol::Hbone;
        Self::Workload { network: Arc::clone(&workload.location.network), addresses, hbone }
    }
}

impl From<&Service> for Place {
    fn from(service: &Service) -> Self {
        let private_to = service.private.then(|| Arc::clone(&service.namespace));
        Self::Service { vips: service.addresses.clone(), canonical: service.canonical, private_to }
    }
}

/// Whether it is no pod, whether it is not in the mesh, uid.
pub(crate) type WorkloadRank<'a> = (bool, bool, &'a str);

/// Which of several workloads of one address is meant: the least. Pods are told by the platform, other objects by
/// people; what is in the mesh says more than what is not.
pub(crate) fn workload_rank(uid: &str, hbone: bool) -> WorkloadRank<'_> {
    (!uid.contains("//Pod/"), !hbone, uid)
}

/// Which of several services of one address is meant: the least. Prefix length, whether it is canonical, key.
pub(crate) type ServiceRank<'a> = (Reverse<u8>, bool, &'a str);

/// All that cannot be taken, by name and by address.
#[derive(Debug, Clone, Default)]
pub(crate) struct UnusableSet {
    names: HashMap<Arc<str>, Arc<Unusable>>,
    workloads: HashMap<IpAddr, Few<Unusable>>,
    services: Blocks<Unusable>,
}

impl UnusableSet {
    pub(crate) fn get(&self, name: &str) -> Option<&Arc<Unusable>> {
        self.names.get(name)
    }

    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = &Arc<Unusable>> {
        self.names.values()
    }

    pub(crate) fn insert(&mut self, unusable: Unusable) {
        self.remove(&unusable.name);
        let unusable = Arc::new(unusable);
        self.names.insert(Arc::clone(&unusable.name), Arc::clone(&unusable));
        match &unusable.place {
            None => {}
            Some(Place::Workload { addresses, .. }) => {
                for ip in addresses {
                    add_to(&mut self.workloads, *ip, &unusable, |a, b| a.workload_rank().cmp(&b.workload_rank()));
                }
            }
            Some(Place::Service { vips, .. }) => {
                for vip in vips {
                    self.services.insert(vip.block, &unusable, |a, b| a.service_rank().cmp(&b.service_rank()));
                }
            }
        }
    }

    pub(crate) fn remove(&mut self, name: &str) {
        let Some(unusable) = self.names.remove(name) else { return };
        match &unusable.place {
            None => {}
            Some(Place::Workload { addresses, .. }) => {
                for ip in addresses {
                    remove_from(&mut self.workloads, ip, |other| *other.name == *name);
                }
            }
            Some(Place::Service { vips, .. }) => {
                for vip in vips {
                    self.services.remove(&vip.block, |other| *other.name == *name);
                }
            }
        }
    }

    /// The workload of that address, with its rank.
    pub(crate) fn workload(&self, network: &str, ip: IpAddr) -> Option<(WorkloadRank<'_>, &Arc<Unusable>)> {
        let here = |one: &&Arc<Unusable>| matches!(&one.place, Some(Place::Workload { network: own, .. }) if **own == *network);
        let found = self.workloads.get(&ip.to_canonical())?.iter().find(here)?;
        Some((found.workload_rank(), found))
    }

    /// The service of that virtual address that a client at `from` sees, with its rank.
    pub(crate) fn service(&self, from: &Viewpoint<'_>, ip: IpAddr) -> Option<(ServiceRank<'_>, &Arc<Unusable>)> {
        self.services.around(ip).find_map(|(block, list)| {
            let here = |one: &&Arc<Unusable>| match &one.place {
                Some(Place::Service { vips, private_to, .. }) => {
                    private_to.as_deref().is_none_or(|namespace| namespace == from.namespace)
                        && vips.iter().any(|vip| *vip.network == *from.network && vip.block == block)
                }
                Some(Place::Workload { .. }) | None => false,
            };
            let found = list.iter().find(here)?;
            let (not_canonical, name) = found.service_rank();
            Some(((Reverse(block.length()), not_canonical, name), found))
        })
    }
}
