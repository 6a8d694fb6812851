//! The endpoints of one service, kept so that choosing one costs O(log n) whatever the service asks for.
//!
//! Every workload that claims the service is a member, whether or not the service is known yet. The ready ones are
//! filed under what they have in common with clients: their network, and each prefix of the service's routing
//! preference. Choosing is then a look-up of the longest prefix that fits the client, and a random pick in it; for a
//! connection that has failed there, in what is left of it, then in the next shorter one. Those that are draining are
//! filed apart, in the same way, and are chosen from when no ready one is left.

use std::fmt::Write as _;
use std::sync::Arc;

use imbl::OrdMap;

use crate::resolve::Viewpoint;
use crate::service::{LoadBalancingMode, LocalityScope, Service};
use crate::weighted::WeightedSet;
use crate::workload::{Health, Workload};

/// Endpoints of one group that one connection tries: where several fail, the rest of a zone is no better.
const TRIES: usize = 3;

/// Members and ready endpoints of one service.
#[derive(Debug, Clone, Default)]
pub(crate) struct ServiceEndpoints {
    members: WeightedSet,
    layout: Option<Arc<Layout>>,
    ready: Filed,
    /// The second choice.
    draining: Filed,
}

/// Endpoints of one standing.
#[derive(Debug, Clone, Default)]
struct Filed {
    /// Every one.
    all: Groups,
    /// For each port whose target the service leaves to its endpoints: those that have one.
    by_port: OrdMap<u16, Groups>,
}

/// Endpoints by what they have in common with clients, as [`group_key`] writes it.
type Groups = OrdMap<Arc<str>, WeightedSet>;

/// Whether an endpoint takes connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It does.
    Ready,
    /// It does where no ready one is.
    Draining,
}

/// What of a service decides where its endpoints are filed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    key: Arc<str>,
    mode: LoadBalancingMode,
    preference: Box<[LocalityScope]>,
    allow_unhealthy: bool,
    /// Ports whose target each endpoint says for itself.
    endpoint_ports: Box<[u16]>,
}

impl Layout {
    pub(crate) fn of(service: &Service) -> Self {
        let load_balancing = &service.load_balancing;
        let preference = match load_balancing.mode {
            LoadBalancingMode::Strict | LoadBalancingMode::Failover => load_balancing.preference.clone(),
            LoadBalancingMode::Spread | LoadBalancingMode::Passthrough => Box::default(),
        };
        Self {
            key: Arc::clone(service.key()),
            mode: load_balancing.mode,
            preference,
            allow_unhealthy: load_balancing.allow_unhealthy,
            endpoint_ports: service
                .ports
                .iter()
                .filter(|port| port.target_port.is_none())
                .map(|port| port.service_port)
                .collect(),
        }
    }

    /// The prefixes of the preference that endpoints are filed under, the longest first.
    fn prefixes(&self) -> impl Iterator<Item = &[LocalityScope]> {
        let shortest = match self.mode {
            LoadBalancingMode::Strict => self.preference.len(),
            LoadBalancingMode::Failover | LoadBalancingMode::Spread | LoadBalancingMode::Passthrough => 0,
        };
        (shortest..=self.preference.len()).rev().filter_map(|length| self.preference.get(..length))
    }

    /// None: it takes no connections.
    fn standing(&self, workload: &Workload) -> Option<Standing> {
        if workload.addresses.is_empty() || workload.capacity == 0 {
            return None;
        }
        match workload.health {
            Health::Healthy => Some(Standing::Ready),
            Health::Draining | Health::Unhealthy if self.allow_unhealthy => Some(Standing::Ready),
            Health::Draining => Some(Standing::Draining),
            Health::Unhealthy => None,
        }
    }
}

impl ServiceEndpoints {
    /// Adds a workload that claims the service, or replaces the one of the same uid. When `old` was there under this
    /// uid it must be given, so that it is taken out of the groups that it was in.
    pub(crate) fn insert(&mut self, workload: &Arc<Workload>, old: Option<&Workload>) {
        if let Some(old) = old {
            self.unfile(old);
        }
        self.members.insert(Arc::clone(workload));
        self.file(workload);
    }

    /// Takes a workload out.
    pub(crate) fn remove(&mut self, workload: &Workload) {
        self.unfile(workload);
        self.members.remove(&workload.uid);
    }

    /// Tells what the service is; None when it is gone. Files every member anew if that changes anything.
    pub(crate) fn set_service(&mut self, service: Option<&Service>) {
        let layout = service.map(Layout::of);
        if layout.as_ref() == self.layout.as_deref() {
            return;
        }
        self.layout = layout.map(Arc::new);
        self.ready = Filed::default();
        self.draining = Filed::default();
        let members = self.members.clone();
        for workload in members.iter() {
            self.file(workload);
        }
    }

    /// Whether neither a service nor a member is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.members.is_empty() && self.layout.is_none()
    }

    /// A random ready endpoint of those nearest to the client that serve `port`, any port with None; none of `tried`, which
    /// are uids. Those that are as near as several that were tried are given up, for the next nearest if the service
    /// allows them. Where no ready one is left, the same of those that are draining.
    pub(crate) fn pick(
        &self,
        port: Option<u16>,
        from: &Viewpoint<'_>,
        random: &mut fastrand::Rng,
        tried: &[Arc<str>],
    ) -> Option<&Arc<Workload>> {
        let layout = self.layout.as_ref()?;
        let ready = self.ready.pick(layout, port, from, random, tried);
        ready.or_else(|| self.draining.pick(layout, port, from, random, tried))
    }

    /// Every endpoint that is ready for `port` in any network, by uid within a network; any port with None.
    pub(crate) fn ready(&self, port: Option<u16>) -> Vec<&Arc<Workload>> {
        let Some(layout) = &self.layout else { return Vec::new() };
        let Some(groups) = self.ready.groups(layout, port) else { return Vec::new() };
        // Each endpoint is filed once under the prefixes of every length; count one length only.
        let longest = layout.preference.len() + 1;
        groups.iter().filter(|(key, _)| group_depth(key) == longest).flat_map(|(_, set)| set.iter()).collect()
    }

    /// As [`Self::ready`] for any port, at most `limit`.
    pub(crate) fn some_ready(&self, limit: usize) -> Vec<&Arc<Workload>> {
        let Some(layout) = &self.layout else { return Vec::new() };
        let longest = layout.preference.len() + 1;
        let groups = self.ready.all.iter().filter(|(key, _)| group_depth(key) == longest);
        groups.flat_map(|(_, set)| set.iter()).take(limit).collect()
    }

    fn filed(&mut self, standing: Standing) -> &mut Filed {
        match standing {
            Standing::Ready => &mut self.ready,
            Standing::Draining => &mut self.draining,
        }
    }

    fn file(&mut self, workload: &Arc<Workload>) {
        let Some(layout) = self.layout.clone() else { return };
        if let Some(standing) = layout.standing(workload) {
            self.filed(standing).file(&layout, workload);
        }
    }

    fn unfile(&mut self, workload: &Workload) {
        let Some(layout) = self.layout.clone() else { return };
        if let Some(standing) = layout.standing(workload) {
            self.filed(standing).unfile(&layout, workload);
        }
    }
}

impl Filed {
    /// See [`ServiceEndpoints::pick`].
    fn pick(
        &self,
        layout: &Layout,
        port: Option<u16>,
        from: &Viewpoint<'_>,
        random: &mut fastrand::Rng,
        tried: &[Arc<str>],
    ) -> Option<&Arc<Workload>> {
        let groups = self.groups(layout, port)?;
        let mut key = String::new();
        // Each group holds the one before, which is nearer.
        let (mut nearer, mut tried_nearer): (Option<&WeightedSet>, usize) = (None, 0);
        for prefix in layout.prefixes() {
            group_key(&mut key, from, prefix);
            let Some(group) = groups.get(key.as_str()) else { continue };
            let tried_in_all = tried.iter().filter(|uid| group.contains(uid)).count();
            if tried_in_all - tried_nearer < TRIES {
                let is_left = |one: &Workload| {
                    !tried.contains(&one.uid) && !nearer.is_some_and(|nearer| nearer.contains(&one.uid))
                };
                if let Some(picked) = group.pick_if(random, is_left) {
                    return Some(picked);
                }
            }
            (nearer, tried_nearer) = (Some(group), tried_in_all);
        }
        None
    }

    fn groups(&self, layout: &Layout, port: Option<u16>) -> Option<&Groups> {
        match port {
            Some(port) if layout.endpoint_ports.binary_search(&port).is_ok() => self.by_port.get(&port),
            Some(_) | None => Some(&self.all),
        }
    }

    fn file(&mut self, layout: &Layout, workload: &Arc<Workload>) {
        for_each_group(layout, workload, |port, key| {
            let groups = match port {
                None => &mut self.all,
                Some(port) => self.by_port.entry(port).or_default(),
            };
            match groups.get_mut(key) {
                Some(set) => set.insert(Arc::clone(workload)),
                None => {
                    let mut set = WeightedSet::default();
                    set.insert(Arc::clone(workload));
                    groups.insert(key.into(), set);
                }
            }
        });
    }

    fn unfile(&mut self, layout: &Layout, workload: &Workload) {
        for_each_group(layout, workload, |port, key| match port {
            None => drop_from(&mut self.all, key, &workload.uid),
            Some(port) => {
                let Some(groups) = self.by_port.get_mut(&port) else { return };
                drop_from(groups, key, &workload.uid);
                if groups.is_empty() {
                    self.by_port.remove(&port);
                }
            }
        });
    }
}

fn drop_from(groups: &mut Groups, key: &str, uid: &str) {
    let Some(set) = groups.get_mut(key) else { return };
    set.remove(uid);
    if set.is_empty() {
        groups.remove(key);
    }
}

/// Every group that an endpoint belongs to: None for all ports, and each port that it answers for itself.
fn for_each_group(layout: &Layout, workload: &Workload, mut each: impl FnMut(Option<u16>, &str)) {
    let place = Viewpoint::of(workload);
    let mut key = String::new();
    let own_ports = workload.membership(&layout.key).map_or(&[][..], |membership| &membership.ports);
    for prefix in layout.prefixes() {
        group_key(&mut key, &place, prefix);
        each(None, &key);
        for port in own_ports.iter().filter(|port| port.target_port.is_some()) {
            if layout.endpoint_ports.binary_search(&port.service_port).is_ok() {
                each(Some(port.service_port), &key);
            }
        }
    }
}

/// Writes the network and then what `place` has for each scope, each with its length before it, so that no two
/// places share a key by accident.
fn group_key(key: &mut String, place: &Viewpoint<'_>, prefix: &[LocalityScope]) {
    key.clear();
    let values = prefix.iter().map(|scope| place.scope(*scope));
    for value in std::iter::once(place.network).chain(values) {
        // Writing to a string does not fail.
        let _ = write!(key, "{}:{value}", value.len());
    }
}

/// Number of values in a key.
fn group_depth(key: &str) -> usize {
    let (mut rest, mut depth) = (key, 0);
    while let Some((length, tail)) = rest.split_once(':') {
        let Some(next) = length.parse().ok().and_then(|length: usize| tail.get(length..)) else { break };
        (rest, depth) = (next, depth + 1);
    }
    depth
}
