//! Which waypoint stands before an object. The object's own label wins over its namespace's.
//!
//! A waypoint that is not there, or does not take the object, is named all the same: traffic to what is bound to it is
//! refused, not let through.

use std::collections::HashMap;
use std::sync::Arc;

use mesh_proto::workload as wire;

use super::{Dirty, Index, Note, names};
use crate::api::{
    Gateway, GatewayClass, GatewayPlace, HboneListener, Kind, Name, ObjectId, WaypointBinding, WaypointFor, WaypointRef,
};

/// The port of HBONE.
const HBONE_PORT: u16 = 15008;
/// Ends the name of a host that is never there (RFC 2606, section 2).
const NOWHERE: &str = "waypoint.invalid";

/// What is addressed by the traffic that a waypoint is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Addressed {
    /// A service.
    Service,
    /// A workload itself.
    Workload,
}

/// Gateways and their classes.
#[derive(Debug, Default)]
pub(super) struct Gateways {
    all: HashMap<Name, Arc<Gateway>>,
    classes: HashMap<Arc<str>, Arc<GatewayClass>>,
}

impl Gateways {
    /// Returns what was there before.
    pub(super) fn insert(&mut self, gateway: Arc<Gateway>) -> Option<Arc<Gateway>> {
        self.all.insert(gateway.name.clone(), gateway)
    }

    /// Returns what was there.
    pub(super) fn remove(&mut self, name: &Name) -> Option<Arc<Gateway>> {
        self.all.remove(name)
    }

    /// Returns what was there before.
    pub(super) fn insert_class(&mut self, class: Arc<GatewayClass>) -> Option<Arc<GatewayClass>> {
        self.classes.insert(class.name.clone(), class)
    }

    /// Returns what was there.
    pub(super) fn remove_class(&mut self, name: &str) -> Option<Arc<GatewayClass>> {
        self.classes.remove(name)
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn class_count(&self) -> usize {
        self.classes.len()
    }

    /// Where the gateway takes HBONE, if it is a waypoint.
    fn listener<'a>(&self, gateway: &'a Gateway) -> Option<&'a HboneListener> {
        let class = self.classes.get(gateway.class.as_str()).map(Arc::as_ref);
        gateway.hbone.as_ref().filter(|_| gateway.is_waypoint(class))
    }

    /// What to tell people, by name.
    pub(super) fn notes(&self) -> Vec<Note> {
        let narrowed = self.all.values().filter(|gateway| self.listener(gateway).is_some_and(|one| one.is_narrowed));
        let note = |gateway: &Arc<Gateway>| Note {
            object: ObjectId::namespaced(Kind::Gateway, &gateway.name).to_string(),
            reason:
                "its listener for HBONE chooses namespaces in a way that is not supported: only objects of its own \
                     namespace can be bound to it; use from: Same or All"
                    .to_owned(),
        };
        let mut notes: Vec<Note> = narrowed.map(note).collect();
        notes.sort_by(|a, b| a.object.cmp(&b.object));
        notes
    }
}

impl Index {
    /// The waypoint of an object of `namespace` with its own binding, for traffic that is addressed to it so. It need not
    /// exist: traffic to an object that is bound to a waypoint that is not there is refused, not let through.
    pub(super) fn waypoint(
        &self,
        namespace: &str,
        own: &WaypointBinding,
        addressed: Addressed,
    ) -> Option<wire::GatewayAddress> {
        let name = self.bound_to(namespace, own)?;
        let Some(gateway) = self.gateways.all.get(&name) else {
            return Some(by_host(name.namespace.to_string(), self.options.cluster_hostname(&name), HBONE_PORT));
        };
        let listener = self.gateways.listener(gateway);
        let listener = listener.filter(|listener| listener.allows_all || *name.namespace == *namespace);
        let Some(listener) = listener else {
            return Some(nowhere(&name));
        };
        let is_for = match (gateway.waypoint_for, addressed) {
            (WaypointFor::All, _)
            | (WaypointFor::Service, Addressed::Service)
            | (WaypointFor::Workload, Addressed::Workload) => true,
            (WaypointFor::Service | WaypointFor::Workload | WaypointFor::Nothing, _) => false,
        };
        is_for.then(|| self.place(gateway, listener))
    }

    fn place(&self, gateway: &Gateway, listener: &HboneListener) -> wire::GatewayAddress {
        let namespace = gateway.name.namespace.to_string();
        match &gateway.address {
            Some(GatewayPlace::Ip(address)) => wire::GatewayAddress {
                destination: Some(wire::gateway_address::Destination::Address(wire::NetworkAddress {
                    address: names::address_bytes(*address),
                    ..Default::default()
                })),
                hbone_mtls_port: listener.port.into(),
            },
            Some(GatewayPlace::Host(host)) => by_host(namespace, host.clone(), listener.port),
            // Whoever makes it makes a service of its name.
            None => by_host(namespace, self.options.cluster_hostname(&gateway.name), listener.port),
        }
    }

    /// The waypoint that an object is bound to, by its own label or its namespace's.
    fn bound_to(&self, namespace: &str, own: &WaypointBinding) -> Option<Name> {
        let binding = match own {
            WaypointBinding::Unset => self.namespaces.waypoint(namespace),
            WaypointBinding::Off | WaypointBinding::Waypoint(_) => own,
        };
        match binding {
            WaypointBinding::Unset | WaypointBinding::Off => None,
            WaypointBinding::Waypoint(WaypointRef { namespace: other, name }) => {
                Some(Name::new(other.as_deref().unwrap_or(namespace), name.as_str()))
            }
        }
    }

    pub(super) fn touch_gateway(&mut self, name: &Name, old: Option<&Gateway>, dirty: &mut Dirty) {
        if old != self.gateways.all.get(name).map(Arc::as_ref) {
            self.touch_bound(name, dirty);
        }
    }

    pub(super) fn touch_gateway_class(&mut self, name: &str, old: Option<&GatewayClass>, dirty: &mut Dirty) {
        if old == self.gateways.classes.get(name).map(Arc::as_ref) {
            return;
        }
        let of_class = self.gateways.all.values().filter(|gateway| gateway.class == name);
        let gateways: Vec<Name> = of_class.map(|gateway| gateway.name.clone()).collect();
        gateways.iter().for_each(|gateway| self.touch_bound(gateway, dirty));
    }

    /// Everything that is bound to a gateway. It looks at all there is: gateways seldom change.
    fn touch_bound(&mut self, gateway: &Name, dirty: &mut Dirty) {
        let is_bound = |name: &Name, own: &WaypointBinding| {
            self.bound_to(&name.namespace, own).is_some_and(|bound| bound == *gateway)
        };
        let pods = self.pods.all().filter(|pod| is_bound(&pod.name, &pod.waypoint));
        dirty.pods.extend(pods.map(|pod| pod.name.clone()));
        let services = self.services.all().filter(|service| is_bound(&service.name, &service.waypoint));
        dirty.services.extend(services.map(|service| service.name.clone()));
        let workloads = self.workload_entries.all().filter(|entry| is_bound(&entry.name, &entry.waypoint));
        dirty.workload_entries.extend(workloads.map(|entry| entry.name.clone()));
        // Whether an entry is told at all depends on it.
        let entries = self.entries.all().filter(|entry| is_bound(&entry.name, &entry.waypoint));
        let entries: Vec<Name> = entries.map(|entry| entry.name.clone()).collect();
        self.touch_entries(&entries, dirty);
    }
}

/// A waypoint that is never there, in the place of the one of this name.
pub(super) fn nowhere(name: &Name) -> wire::GatewayAddress {
    by_host(name.namespace.to_string(), format!("{}.{}.{NOWHERE}", name.name, name.namespace), HBONE_PORT)
}

fn by_host(namespace: String, hostname: String, port: u16) -> wire::GatewayAddress {
    let name = wire::NamespacedHostname { namespace, hostname };
    wire::GatewayAddress {
        destination: Some(wire::gateway_address::Destination::Hostname(name)),
        hbone_mtls_port: port.into(),
    }
}
