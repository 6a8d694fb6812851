//! ServiceEntries, found by name and by host; the service that each host becomes, and the workloads of the endpoints that
//! they list.
//!
//! Of several entries of a namespace for one host the oldest has it, of those that are valid if one is. A name that the services
//! of the namespace have belongs to them.
//!
//! An entry that is not valid stands at its hosts and addresses all the same, and nobody gets through. Its hosts are services
//! that are bound to a waypoint that is never there: so names are answered as ever, and connections refused. All its addresses
//! are those of one more service, of a made-up name: also where the hosts are another's.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_proto::workload as wire;

use super::multimap::MultiMap;
use super::resource::{Changes, Resource};
use super::waypoint::Addressed;
use super::{Dirty, Index, Note, encode, names, workload};
use crate::api::{
    EntryAddress, EntryEndpoint, EntryPart, Families, Kind, Name, ObjectId, Resolution, Service, ServiceAddresses,
    ServiceEntry, Topology,
};

/// Which of several entries has a host: the first. Those that stand for entries that are not valid come last.
type Claim = (bool, Option<SystemTime>, Name);

/// Ends the made-up name of what stands at the addresses of an entry that is not valid (RFC 2606, section 2).
const NOT_VALID: &str = "serviceentry.invalid";

/// The entries, with what finds them.
#[derive(Debug, Default)]
pub(super) struct Entries {
    all: HashMap<Name, Arc<ServiceEntry>>,
    by_namespace: MultiMap<Arc<str>, Name>,
    /// By namespace and host.
    by_host: HashMap<Name, BTreeSet<Claim>>,
    /// What to tell people of each.
    notes: BTreeMap<Name, Vec<String>>,
    /// The workloads that each one's endpoints became.
    workloads: HashMap<Name, BTreeSet<Arc<str>>>,
}

impl Entries {
    /// Returns what was there before.
    pub(super) fn insert(&mut self, entry: Arc<ServiceEntry>) -> Option<Arc<ServiceEntry>> {
        let old = self.remove(&entry.name);
        let name = &entry.name;
        self.by_namespace.insert(name.namespace.clone(), name.clone());
        for host in hosts(&entry) {
            self.by_host.entry(host).or_default().insert(claim(&entry));
        }
        self.all.insert(name.clone(), entry);
        old
    }

    /// Returns what was there.
    pub(super) fn remove(&mut self, name: &Name) -> Option<Arc<ServiceEntry>> {
        let entry = self.all.remove(name)?;
        self.by_namespace.remove(&name.namespace, name);
        for host in hosts(&entry) {
            if let Some(claims) = self.by_host.get_mut(&host) {
                claims.remove(&claim(&entry));
                if claims.is_empty() {
                    self.by_host.remove(&host);
                }
            }
        }
        Some(entry)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<ServiceEntry>> {
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

    /// The entry that has a host of a namespace.
    pub(super) fn of_host(&self, host: &Name) -> Option<&Arc<ServiceEntry>> {
        let (_, _, name) = self.by_host.get(host)?.first()?;
        self.all.get(name)
    }

    /// What to tell people, by name.
    pub(super) fn notes(&self) -> impl Iterator<Item = Note> {
        self.notes.iter().flat_map(|(name, reasons)| {
            let object = ObjectId::namespaced(Kind::ServiceEntry, name).to_string();
            reasons.iter().map(move |reason| Note { object: object.clone(), reason: reason.clone() })
        })
    }
}

fn claim(entry: &ServiceEntry) -> Claim {
    (entry.is_stand_in, entry.created, entry.name.clone())
}

/// The hosts of an entry, each with the namespace.
fn hosts(entry: &ServiceEntry) -> impl Iterator<Item = Name> {
    let given = entry.hosts.iter().map(|host| Name::new(entry.name.namespace.clone(), host.clone()));
    given.chain(made_up(entry))
}

/// The made-up host of an entry that is not valid.
fn made_up(entry: &ServiceEntry) -> Option<Name> {
    let Name { namespace, name } = &entry.name;
    entry.is_stand_in.then(|| Name::new(namespace.clone(), format!("{name}.{namespace}.{NOT_VALID}")))
}

impl Index {
    pub(super) fn touch_entry(&mut self, name: &Name, old: Option<&ServiceEntry>, dirty: &mut Dirty) {
        let new = self.entries.all.get(name).cloned();
        if old == new.as_deref() {
            return;
        }
        dirty.entries.insert(name.clone());
        let touched: BTreeSet<Name> = old.into_iter().chain(new.as_deref()).flat_map(hosts).collect();
        self.refresh_hosts(touched, dirty);
    }

    /// What the entries of a namespace become depends on its waypoint.
    pub(super) fn touch_entries_in(&mut self, namespace: &str, dirty: &mut Dirty) {
        let names: Vec<Name> = self.entries.in_namespace(namespace).cloned().collect();
        self.touch_entries(&names, dirty);
    }

    /// What these entries become may have changed, though they have not.
    pub(super) fn touch_entries(&mut self, names: &[Name], dirty: &mut Dirty) {
        let touched =
            names.iter().filter_map(|name| self.entries.all.get(name)).flat_map(|entry| hosts(entry)).collect();
        dirty.entries.extend(names.iter().cloned());
        self.refresh_hosts(touched, dirty);
    }

    /// Makes the services of these hosts what their entries say.
    fn refresh_hosts(&mut self, hosts: BTreeSet<Name>, dirty: &mut Dirty) {
        for host in hosts {
            let claims = self.entries.by_host.get(&host).into_iter().flatten();
            dirty.entries.extend(claims.map(|(_, _, name)| name.clone()));
            let old = match self.service_of_host(&host) {
                Some(service) => {
                    dirty.services.extend(self.entry_vips.set(&service));
                    self.services.insert(Arc::new(service))
                }
                None => {
                    dirty.services.extend(self.entry_vips.remove(&host));
                    self.services.remove(&host)
                }
            };
            self.touch_service(&host, old.as_deref(), dirty);
        }
    }

    /// The service that a host is; none where it is told to nobody.
    fn service_of_host(&self, host: &Name) -> Option<Service> {
        let entry = self.entries.of_host(host)?;
        if self.is_own_name(host) || !self.is_reachable(entry) {
            return None;
        }
        let is_passthrough = entry.resolution == Resolution::None;
        let is_made_up = made_up(entry).is_some_and(|made_up| made_up == *host);
        let takes_one = !is_passthrough && !is_made_up && entry.addresses.is_empty();
        Some(Service {
            name: host.clone(),
            addresses: if takes_one { ServiceAddresses::Allocate } else { ServiceAddresses::Headless },
            ingress: Vec::new(),
            ports: entry.ports.clone(),
            selector: entry.selector.clone(),
            publish_not_ready: false,
            families: Families::Automatic,
            topology: Topology::Anywhere,
            waypoint: entry.waypoint.clone(),
            entry: Some(EntryPart {
                name: entry.name.name.clone(),
                is_made_up,
                blocks: entry.addresses.iter().chain(&entry.also_at).copied().collect(),
                is_passthrough,
                subject_alt_names: entry.subject_alt_names.clone(),
                is_private: entry.is_private,
                created: entry.created,
            }),
            is_stand_in: entry.is_stand_in,
        })
    }

    /// Whether the host is a name that a service of its namespace has, or may have.
    fn is_own_name(&self, host: &Name) -> bool {
        let short = host.name.strip_suffix(&*self.options.cluster_domain).and_then(|rest| rest.strip_suffix(".svc."));
        let service = short.and_then(|short| short.strip_suffix(&*host.namespace)?.strip_suffix('.'));
        service.is_some_and(|service| !service.contains('.'))
    }

    /// Whether connections to the entry's hosts can be carried: to an address of an endpoint, as they are addressed, or to a
    /// waypoint. Nobody here looks names up.
    fn is_reachable(&self, entry: &ServiceEntry) -> bool {
        // What stands for one that is not valid is told, so that nobody is reached.
        entry.is_stand_in
            || !entry.is_only_names()
            || self.waypoint(&entry.name.namespace, &entry.waypoint, Addressed::Service).is_some()
    }

    pub(super) fn recompute_entry(&mut self, name: &Name, changes: &mut Changes) {
        let entry = self.entries.all.get(name).cloned();
        let resources = entry.as_ref().map(|entry| self.inline_workloads(entry)).unwrap_or_default();
        let current: BTreeSet<Arc<str>> = resources.keys().cloned().collect();
        for gone in self.entries.workloads.remove(name).unwrap_or_default().difference(&current) {
            self.addresses.withdraw(gone, changes);
        }
        for resource in resources.into_values() {
            self.addresses.publish(resource, changes);
        }
        if !current.is_empty() {
            self.entries.workloads.insert(name.clone(), current);
        }
        let notes = entry.map(|entry| self.notes_on(&entry)).unwrap_or_default();
        if notes.is_empty() {
            self.entries.notes.remove(name);
        } else {
            self.entries.notes.insert(name.clone(), notes);
        }
    }

    /// The hosts that are the entry's and known to proxies.
    fn hosts_of<'a>(&'a self, entry: &'a ServiceEntry) -> impl Iterator<Item = Name> + 'a {
        let is_its = |host: &Name| self.entries.of_host(host).is_some_and(|owner| owner.name == entry.name);
        hosts(entry).filter(move |host| is_its(host) && self.services.get(host).is_some())
    }

    /// One workload for each endpoint that has an address.
    fn inline_workloads(&self, entry: &ServiceEntry) -> BTreeMap<Arc<str>, Resource> {
        let mut resources = BTreeMap::new();
        let hosts: Vec<String> = self.hosts_of(entry).map(|host| self.options.service_key(&host)).collect();
        if hosts.is_empty() {
            return resources;
        }
        for endpoint in &entry.endpoints {
            let EntryAddress::Ip(address) = endpoint.address else { continue };
            let ports = wire::PortList { ports: workload::entry_ports(endpoint, &entry.ports) };
            let services = hosts.iter().map(|key| (key.clone(), ports.clone())).collect();
            let message = self.inline_workload(entry, endpoint, address);
            let services = if entry.is_stand_in { BTreeMap::new() } else { services };
            let resource = encode::workload(&message, services, vec![names::alias(address)]);
            resources.insert(resource.name.clone(), resource);
        }
        resources
    }

    fn inline_workload(&self, entry: &ServiceEntry, endpoint: &EntryEndpoint, address: IpAddr) -> wire::Workload {
        let around = workload::Surroundings {
            uid: self.options.inline_uid(&entry.name, address),
            // What the entry is bound to stands before its hosts, and the endpoint has no binding of its own.
            waypoint: None,
            locality: None,
            policies: self.policies_of(&entry.name.namespace, &endpoint.labels),
            is_waiting: false,
            is_from_start: false,
            is_in_doubt: false,
            is_refused: entry.is_stand_in,
        };
        workload::of_endpoint(&self.options, &entry.name, endpoint, &[address], true, around)
    }

    /// Hosts for which no address was left, each with its entry.
    pub(super) fn hosts_without_address(&self) -> impl Iterator<Item = Note> {
        self.entry_vips.without().filter_map(|host| {
            let entry = self.entries.of_host(host)?;
            let object = ObjectId::namespaced(Kind::ServiceEntry, &entry.name).to_string();
            let reason = format!("no free address was found in 240.240.0.0/16 for {}; set spec.addresses", host.name);
            Some(Note { object, reason })
        })
    }

    /// How the entry's effect differs from what its author may expect.
    fn notes_on(&self, entry: &ServiceEntry) -> Vec<String> {
        let mut notes = Vec::new();
        if entry.is_stand_in {
            notes.push(
                "is not valid, and has no earlier version: connections to those of its hosts and addresses that can be read \
                 are refused"
                    .to_owned(),
            );
            return notes;
        }
        if !self.is_reachable(entry) {
            notes.push(
                "is not in force: resolution DNS with nothing but names to look up is not supported without a waypoint; \
                 applications find and reach the hosts as they would without the entry"
                    .to_owned(),
            );
            return notes;
        }
        let named = entry.endpoints.iter().filter_map(|endpoint| match &endpoint.address {
            EntryAddress::Host(host) => Some(host.as_str()),
            EntryAddress::Ip(_) => None,
        });
        let named: Vec<&str> = named.collect();
        if !named.is_empty() {
            let names = named.join(", ");
            notes.push(format!("endpoints that are names are not looked up, and get no connections: {names}"));
        }
        for host in hosts(entry) {
            if self.is_own_name(&host) {
                notes.push(format!(
                    "host {} belongs to the namespace's own Services, and is not in force here",
                    host.name
                ));
            } else if let Some(owner) = self.entries.of_host(&host).filter(|owner| owner.name != entry.name) {
                notes.push(format!(
                    "host {} already belongs to ServiceEntry {}, which is older; it is not in force here",
                    host.name, owner.name
                ));
            }
        }
        notes
    }
}
