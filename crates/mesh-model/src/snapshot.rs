//! Everything discovery has brought, as one value.
//!
//! A snapshot is built of persistent maps: a clone is a handful of pointers, and a change copies only the few nodes on
//! its path that a clone still shares. One writer changes its own copy and publishes clones; readers never lock.

use std::net::IpAddr;
use std::sync::Arc;

use imbl::{HashMap, OrdMap};
use mesh_proto::{security, workload as wire};
use prost::Message as _;
use thiserror::Error;

use crate::address::Cidr;
use crate::blocks::{Blocks, Few, add_to, remove_from};
use crate::endpoints::ServiceEndpoints;
use crate::intern::Interner;
use crate::invalid;
use crate::policy::{Authorization, InvalidAuthorization, Scope};
use crate::service::{InvalidService, Service};
use crate::unusable::{Place, Unusable, UnusableSet, workload_rank};
use crate::workload::{InvalidWorkload, TunnelProtocol, Workload};

/// All workloads, services and policies at one moment. See the module's description for what it costs.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    interned: Interner,
    workloads: HashMap<Arc<str>, Arc<Workload>>,
    /// Of every network; the most telling first.
    workloads_by_ip: HashMap<IpAddr, Few<Workload>>,
    services: HashMap<Arc<str>, Arc<Service>>,
    /// Of every network; the one that wins first.
    services_by_block: Blocks<Service>,
    /// By host name in lower case; the one that wins first.
    services_by_host: HashMap<Arc<str>, Few<Service>>,
    /// Never of a name that `workloads` or `services` has.
    unusable: UnusableSet,
    endpoints: HashMap<Arc<str>, ServiceEndpoints>,
    policies: HashMap<Arc<str>, Arc<Authorization>>,
    global_policies: OrdMap<Arc<str>, Arc<Authorization>>,
    namespace_policies: HashMap<Arc<str>, OrdMap<Arc<str>, Arc<Authorization>>>,
}

/// One change to a snapshot.
#[derive(Debug, Clone)]
pub enum Change {
    /// A workload is new or changed.
    Workload(Box<Workload>),
    /// A service is new or changed.
    Service(Box<Service>),
    /// A policy is new or changed.
    Authorization(Box<Authorization>),
    /// A workload or a service has come that cannot be taken.
    Unusable(Box<Unusable>),
    /// The workload of this uid or the service of this key is gone.
    RemoveAddress(String),
    /// The policy of this key is gone.
    RemoveAuthorization(String),
}

impl Change {
    /// Reads the body of an `istio.workload.Address` that discovery calls `name`.
    ///
    /// There is always a change to apply: what cannot be taken becomes [`Unusable`], so that traffic to it is refused,
    /// and the reason is given beside it. What the control plane itself says is [`invalid`] is no mistake of its.
    pub fn address(name: &str, body: &[u8]) -> (Self, Option<InvalidChange>) {
        let unusable = |unusable: Unusable, error| (Self::Unusable(Box::new(unusable)), Some(error));
        let told = |unusable: Unusable| (Self::Unusable(Box::new(unusable)), None);
        let unreadable = |error: InvalidChange| unusable(Unusable::unreadable(name, &error.to_string()), error);
        match wire::Address::decode(body).map(|address| address.r#type) {
            Err(error) => unreadable(error.into()),
            Ok(None) => unreadable(InvalidChange::Empty),
            Ok(Some(wire::address::Type::Workload(wire))) if invalid::is_said(&wire.extensions) => {
                told(Unusable::workload(name, invalid::REASON, &wire))
            }
            Ok(Some(wire::address::Type::Service(wire))) if invalid::is_said(&wire.extensions) => {
                told(Unusable::service(name, invalid::REASON, &wire))
            }
            Ok(Some(wire::address::Type::Workload(wire))) => match Workload::try_from(&wire) {
                Ok(workload) => (Self::Workload(Box::new(workload)), None),
                Err(error) => unusable(Unusable::workload(name, &error.to_string(), &wire), error.into()),
            },
            Ok(Some(wire::address::Type::Service(wire))) => match Service::try_from(&wire) {
                Ok(service) => (Self::Service(Box::new(service)), None),
                Err(error) => unusable(Unusable::service(name, &error.to_string(), &wire), error.into()),
            },
        }
    }

    /// Reads the body of an `istio.security.Authorization` that discovery calls `name`, `<namespace>/<name>`.
    ///
    /// There is always a change to apply: a policy that cannot be understood becomes one that denies where it
    /// applies, and the reason is given beside it. A dry-run policy denies nothing even then; it is there for the
    /// workloads that name it, and says nothing. Where not even the scope can be read, the policy denies in the
    /// namespace that its name says.
    pub fn authorization(name: &str, body: &[u8]) -> (Self, Option<InvalidChange>) {
        let wire = match security::Authorization::decode(body) {
            Ok(wire) => wire,
            Err(error) => return (Self::invalid_authorization(name, Scope::Namespace), Some(error.into())),
        };
        match Authorization::try_from(&wire) {
            Ok(policy) => (Self::Authorization(Box::new(policy)), None),
            Err(error) if wire.dry_run => {
                let (namespace, name) = name.split_once('/').unwrap_or(("", name));
                let mut silent = Authorization::invalid(namespace, name, Scope::WorkloadSelector);
                silent.dry_run = true;
                (Self::Authorization(Box::new(silent)), Some(error.into()))
            }
            Err(error) => {
                // A scope of the future may be wider than any of today's.
                let scope = Scope::try_from(wire.scope).unwrap_or(Scope::Global);
                (Self::invalid_authorization(name, scope), Some(error.into()))
            }
        }
    }

    fn invalid_authorization(key: &str, scope: Scope) -> Self {
        let (namespace, name) = key.split_once('/').unwrap_or(("", key));
        // Without a namespace in the name there is no telling where it applies.
        let scope = if namespace.is_empty() { Scope::Global } else { scope };
        Self::Authorization(Box::new(Authorization::invalid(namespace, name, scope)))
    }
}

/// Why a resource cannot be taken.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum InvalidChange {
    /// The bytes are not the message.
    #[error("the resource cannot be decoded: {0}")]
    Decode(#[from] prost::DecodeError),
    /// An address that is neither a workload nor a service.
    #[error("the resource is neither a workload nor a service")]
    Empty,
    /// A workload.
    #[error(transparent)]
    Workload(#[from] InvalidWorkload),
    /// A service.
    #[error(transparent)]
    Service(#[from] InvalidService),
    /// A policy.
    #[error(transparent)]
    Authorization(#[from] InvalidAuthorization),
}

/// Changes. Each costs O(log n) in what the snapshot holds, except that a service whose ports or load balancing
/// change files its own endpoints anew.
impl Snapshot {
    /// An empty snapshot.
    pub fn new() -> Self {
        Self::default()
    }

    /// Applies one change.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Workload(workload) => self.upsert_workload(*workload),
            Change::Service(service) => self.upsert_service(*service),
            Change::Authorization(policy) => self.upsert_authorization(*policy),
            Change::Unusable(unusable) => self.upsert_unusable(*unusable),
            Change::RemoveAddress(name) => self.remove_address(&name),
            Change::RemoveAuthorization(name) => self.remove_authorization(&name),
        }
    }

    /// Adds a workload, or replaces the one of the same uid.
    pub fn upsert_workload(&mut self, mut workload: Workload) {
        self.interned.share(&mut workload);
        self.unusable.remove(&workload.uid);
        let workload = Arc::new(workload);
        let old = self.workloads.insert(Arc::clone(&workload.uid), Arc::clone(&workload));
        if old.as_deref() == Some(&*workload) {
            // Indexes hold the old allocation; keep one for all.
            if let Some(old) = old {
                self.workloads.insert(Arc::clone(&old.uid), old);
            }
            return;
        }
        if let Some(old) = &old {
            self.forget_addresses(old);
            let left = old.services.iter().filter(|membership| !workload.in_service(&membership.service));
            left.for_each(|membership| self.leave_service(&membership.service, old));
        }
        if !workload.host_network {
            for ip in &workload.addresses {
                add_to(&mut self.workloads_by_ip, *ip, &workload, |a, b| address_rank(a).cmp(&address_rank(b)));
            }
        }
        for membership in workload.services.iter() {
            let before = old.as_deref().filter(|old| old.in_service(&membership.service));
            self.endpoints.entry(Arc::clone(&membership.service)).or_default().insert(&workload, before);
        }
    }

    /// Adds a service, or replaces the one of the same key.
    pub fn upsert_service(&mut self, service: Service) {
        self.unusable.remove(service.key());
        let service = Arc::new(service);
        let old = self.services.insert(Arc::clone(service.key()), Arc::clone(&service));
        if let Some(old) = &old {
            self.forget_blocks(old);
        }
        for vip in &service.addresses {
            self.services_by_block.insert(vip.block, &service, |a, b| block_rank(a).cmp(&block_rank(b)));
        }
        add_to(&mut self.services_by_host, host_key(&service), &service, |a, b| block_rank(a).cmp(&block_rank(b)));
        self.endpoints.entry(Arc::clone(service.key())).or_default().set_service(Some(&service));
    }

    /// Adds a policy, or replaces the one of the same key.
    pub fn upsert_authorization(&mut self, policy: Authorization) {
        self.remove_authorization(&Arc::clone(policy.key()));
        let policy = Arc::new(policy);
        let key = policy.key();
        self.policies.insert(Arc::clone(key), Arc::clone(&policy));
        match policy.scope {
            Scope::Global => {
                self.global_policies.insert(Arc::clone(key), policy);
            }
            Scope::Namespace => {
                let namespace = self.namespace_policies.entry(Arc::clone(&policy.namespace)).or_default();
                namespace.insert(Arc::clone(key), policy);
            }
            Scope::WorkloadSelector => {}
        }
    }

    /// Records a policy that could not be understood: it denies wherever it applies, until a good version comes.
    pub fn upsert_invalid_authorization(&mut self, namespace: &str, name: &str, scope: Scope) {
        self.upsert_authorization(Authorization::invalid(namespace, name, scope));
    }

    /// Puts what cannot be taken in the place of the workload or service of that name, until a good version comes or it is
    /// removed. Where not all addresses of the new version can be read, those of the one before are refused as well.
    pub fn upsert_unusable(&mut self, mut unusable: Unusable) {
        let name = Arc::clone(&unusable.name);
        let workload = self.workloads.get(&name).map(|workload| Place::from(&**workload));
        let service = self.services.get(&name).map(|service| Place::from(&**service));
        let before = self.unusable.get(&name).and_then(|before| before.place().cloned());
        workload.into_iter().chain(service).chain(before).for_each(|place| unusable.replace(place));
        self.remove_address(&name);
        self.unusable.insert(unusable);
    }

    /// Takes out the workload of that uid, or the service of that key. Unknown names change nothing.
    pub fn remove_address(&mut self, name: &str) {
        self.unusable.remove(name);
        if let Some(workload) = self.workloads.remove(name) {
            self.forget_addresses(&workload);
            workload.services.iter().for_each(|membership| self.leave_service(&membership.service, &workload));
            drop(workload);
            self.interned.release();
        }
        if let Some(service) = self.services.remove(name) {
            self.forget_blocks(&service);
            if let Some(endpoints) = self.endpoints.get_mut(name) {
                endpoints.set_service(None);
                if endpoints.is_empty() {
                    self.endpoints.remove(name);
                }
            }
        }
    }

    /// Takes out the policy of that key. Unknown keys change nothing.
    pub fn remove_authorization(&mut self, key: &str) {
        let Some(policy) = self.policies.remove(key) else { return };
        match policy.scope {
            Scope::Global => {
                self.global_policies.remove(key);
            }
            Scope::Namespace => {
                let Some(namespace) = self.namespace_policies.get_mut(&policy.namespace) else { return };
                namespace.remove(key);
                if namespace.is_empty() {
                    self.namespace_policies.remove(&policy.namespace);
                }
            }
            Scope::WorkloadSelector => {}
        }
    }

    fn leave_service(&mut self, key: &str, workload: &Workload) {
        let Some(endpoints) = self.endpoints.get_mut(key) else { return };
        endpoints.remove(workload);
        if endpoints.is_empty() {
            self.endpoints.remove(key);
        }
    }

    fn forget_addresses(&mut self, workload: &Workload) {
        for ip in &workload.addresses {
            remove_from(&mut self.workloads_by_ip, ip, |other| other.uid == workload.uid);
        }
    }

    fn forget_blocks(&mut self, service: &Service) {
        for vip in &service.addresses {
            self.services_by_block.remove(&vip.block, |other| other.key() == service.key());
        }
        remove_from(&mut self.services_by_host, &host_key(service), |other| other.key() == service.key());
    }
}

/// Look-ups.
impl Snapshot {
    /// The workload of that uid.
    pub fn workload_by_uid(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload that has `ip` in `network`. Workloads on their node's network do not count: their address says
    /// nothing about which of them is meant. Where several have it, pods come first, then what speaks HBONE.
    pub fn workload_by_ip(&self, network: &str, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.workloads_by_ip.get(&ip.to_canonical())?.iter().find(|workload| *workload.location.network == *network)
    }

    /// Whether a workload or a service has this very address in `network`; one that has a block around it does not count,
    /// since something narrower may be there that is not known.
    pub fn knows_address(&self, network: &str, ip: IpAddr) -> bool {
        let only = Cidr::host(ip);
        let has_it =
            |service: &Arc<Service>| service.addresses.iter().any(|vip| *vip.network == *network && vip.block == only);
        self.workload_by_ip(network, ip).is_some() || self.services_by_vip(network, ip).any(has_it)
    }

    /// The service of that key, `<namespace>/<hostname>`.
    pub fn service_by_name(&self, key: &str) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// The services of that host name, in lower case and without a dot at its end; the canonical one first, then by key.
    pub fn services_by_host(&self, host: &str) -> impl Iterator<Item = &Arc<Service>> {
        self.services_by_host.get(host).into_iter().flat_map(|services| services.iter())
    }

    /// The service that has `ip` as a virtual address in `network`. Where several do, the narrowest block wins, then
    /// the canonical one, then the first by key.
    pub fn service_by_vip(&self, network: &str, ip: IpAddr) -> Option<&Arc<Service>> {
        self.services_by_vip(network, ip).next()
    }

    /// Every service that has `ip` as a virtual address in `network`, the one that wins first.
    pub fn services_by_vip<'a>(&'a self, network: &str, ip: IpAddr) -> impl Iterator<Item = &'a Arc<Service>> {
        self.services_by_block.around(ip).flat_map(move |(block, services)| {
            let here = move |service: &&Arc<Service>| {
                service.addresses.iter().any(|vip| *vip.network == *network && vip.block == block)
            };
            services.iter().filter(here)
        })
    }

    /// The policy of that key, `<namespace>/<name>`.
    pub fn authorization(&self, key: &str) -> Option<&Arc<Authorization>> {
        self.policies.get(key)
    }

    /// All workloads, in no order.
    pub fn workloads(&self) -> impl ExactSizeIterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// All services, in no order.
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// All policies, in no order.
    pub fn authorizations(&self) -> impl ExactSizeIterator<Item = &Arc<Authorization>> {
        self.policies.values()
    }

    /// What discovery sent under that name and cannot be taken.
    pub fn unusable(&self, name: &str) -> Option<&Arc<Unusable>> {
        self.unusable.get(name)
    }

    /// All that cannot be taken, in no order.
    pub fn all_unusable(&self) -> impl ExactSizeIterator<Item = &Arc<Unusable>> {
        self.unusable.iter()
    }

    pub(crate) fn unusable_set(&self) -> &UnusableSet {
        &self.unusable
    }

    pub(crate) fn endpoints_of(&self, service: &str) -> Option<&ServiceEndpoints> {
        self.endpoints.get(service)
    }

    pub(crate) fn global_policies(&self) -> impl Iterator<Item = &Arc<Authorization>> {
        self.global_policies.values()
    }

    pub(crate) fn namespace_policies(&self, namespace: &str) -> impl Iterator<Item = &Arc<Authorization>> {
        self.namespace_policies.get(namespace).into_iter().flat_map(OrdMap::values)
    }
}

fn address_rank(workload: &Workload) -> (bool, bool, &str) {
    workload_rank(&workload.uid, workload.tunnel_protocol == TunnelProtocol::Hbone)
}

fn host_key(service: &Service) -> Arc<str> {
    let host = service.hostname.trim_end_matches('.');
    if host.len() == service.hostname.len() && !host.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Arc::clone(&service.hostname);
    }
    host.to_ascii_lowercase().into()
}

fn block_rank(service: &Service) -> (bool, &str) {
    (!service.canonical, service.key())
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
