//! WorkloadEntries, found by name and by label; and the workload that each becomes.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_proto::workload as wire;

use super::multimap::MultiMap;
use super::pods::selects;
use super::resource::Changes;
use super::waypoint::Addressed;
use super::{Dirty, Index, Note, encode, names, workload};
use crate::api::{EntryAddress, Kind, Labels, Name, ObjectId, WorkloadEntry};

/// The entries, with what finds them.
#[derive(Debug, Default)]
pub(super) struct WorkloadEntries {
    all: HashMap<Name, Arc<WorkloadEntry>>,
    by_namespace: MultiMap<Arc<str>, Name>,
}

impl WorkloadEntries {
    /// Returns what was there before.
    pub(super) fn insert(&mut self, entry: Arc<WorkloadEntry>) -> Option<Arc<WorkloadEntry>> {
        self.by_namespace.insert(entry.name.namespace.clone(), entry.name.clone());
        self.all.insert(entry.name.clone(), entry)
    }

    /// Returns what was there.
    pub(super) fn remove(&mut self, name: &Name) -> Option<Arc<WorkloadEntry>> {
        self.by_namespace.remove(&name.namespace, name);
        self.all.remove(name)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<WorkloadEntry>> {
        self.all.values()
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn in_namespace(&self, namespace: &str) -> impl Iterator<Item = &Name> {
        self.by_namespace.get(namespace)
    }

    /// The namespaces that have entries.
    pub(super) fn namespaces(&self) -> impl Iterator<Item = &Arc<str>> {
        self.by_namespace.keys()
    }

    /// The entries of a namespace that carry every label of `selector`. An empty selector selects nothing.
    pub(super) fn selected<'a>(&'a self, namespace: &str, selector: &'a Labels) -> impl Iterator<Item = &'a Name> {
        let carries_all = |name: &&Name| {
            let entry = self.all.get(*name);
            entry.is_some_and(|entry| selects(selector, &entry.endpoint.labels))
        };
        self.by_namespace.get(namespace).filter(carries_all)
    }

    /// What to tell people, by name.
    pub(super) fn notes(&self) -> Vec<Note> {
        let named = self.all.values().filter(|entry| matches!(entry.endpoint.address, EntryAddress::Host(_)));
        let note = |entry: &Arc<WorkloadEntry>| {
            Note {
            object: ObjectId::namespaced(Kind::WorkloadEntry, &entry.name).to_string(),
            reason: "its address is a name, which is not looked up: it gets no connections; set spec.address to an IP address"
                .to_owned(),
        }
        };
        let not_valid = self.all.values().filter(|entry| entry.is_stand_in);
        let not_valid = not_valid.map(|entry| Note {
            object: ObjectId::namespaced(Kind::WorkloadEntry, &entry.name).to_string(),
            reason: "is not valid, and has no earlier version: connections to its address are refused".to_owned(),
        });
        let mut notes: Vec<Note> = named.map(note).chain(not_valid).collect();
        notes.sort_by(|a, b| a.object.cmp(&b.object));
        notes
    }
}

impl Index {
    pub(super) fn touch_workload_entry(&self, name: &Name, old: Option<&WorkloadEntry>, dirty: &mut Dirty) {
        if old != self.workload_entries.all.get(name).map(Arc::as_ref) {
            dirty.workload_entries.insert(name.clone());
        }
    }

    pub(super) fn recompute_workload_entry(&mut self, name: &Name, changes: &mut Changes) {
        let uid = self.options.workload_entry_uid(name);
        let entry = self.workload_entries.all.get(name);
        let Some((entry, address)) = entry.and_then(|entry| match entry.endpoint.address {
            EntryAddress::Ip(address) => Some((entry, address)),
            EntryAddress::Host(_) => None,
        }) else {
            self.addresses.withdraw(&uid, changes);
            return;
        };
        let around = workload::Surroundings {
            uid,
            waypoint: self.waypoint(&name.namespace, &entry.waypoint, Addressed::Workload),
            locality: None,
            policies: self.policies_of(&name.namespace, &entry.endpoint.labels),
            is_waiting: false,
            is_from_start: false,
            is_in_doubt: false,
            is_refused: entry.is_stand_in,
        };
        let addresses: Vec<IpAddr> = std::iter::once(address).chain(entry.also_at).collect();
        let message = workload::of_endpoint(&self.options, name, &entry.endpoint, &addresses, entry.healthy, around);
        let aliases = addresses.into_iter().map(names::alias).collect();
        let services = if entry.is_stand_in { BTreeMap::new() } else { self.services_of_entry(entry) };
        let resource = encode::workload(&message, services, aliases);
        self.addresses.publish(resource, changes);
    }

    /// The services that an entry stands behind, with its own port for each of theirs.
    fn services_of_entry(&self, entry: &WorkloadEntry) -> BTreeMap<String, wire::PortList> {
        let selecting = self.services.selecting(&entry.name.namespace, &entry.endpoint.labels).into_iter();
        let place = |service: &Arc<crate::api::Service>| {
            let ports = match &service.entry {
                Some(_) => workload::entry_ports(&entry.endpoint, &service.ports),
                None => workload::service_ports(&entry.endpoint, &service.ports),
            };
            (self.options.service_key(&service.name), wire::PortList { ports })
        };
        selecting.filter(|service| super::services::is_carried(service)).map(place).collect()
    }
}
