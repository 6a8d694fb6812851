//! Virtual addresses of services: those that are given, and those that must be chosen because there is no API server to
//! choose them.
//!
//! The choice is a pure function of the set of services, so that replicas agree and a restart changes nothing. A service
//! asks for the addresses of a fixed sequence, made by hashing its name and a counter, in 10.96.1.0 to 10.96.255.254
//! (the first 256 addresses of 10.96.0.0/16 are left to services that name theirs). Where two ask for the same address,
//! the one that has it written in its spec wins, then the one whose `namespace/name` comes first; the other asks for
//! its next. Like a stable matching, the outcome does not depend on the order of arrival.
//!
//! Hosts of ServiceEntries have a range of their own, 240.240.1.0 to 240.240.255.254, which nobody routes (RFC 1112, section
//! 4). Of two that ask for the same address there the one whose entry is older has it: a new entry takes no address away.
//!
//! An address that two services have written in their specs goes to the first by name; the other is published without.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use super::Note;
use crate::api::{Families, Kind, Name, ObjectId, Service, ServiceAddresses};

/// Addresses that one service asks for before it goes without. The chance to need more is negligible until the range is
/// nearly full.
const MAX_ATTEMPTS: u32 = 64;
/// The first address of the range to choose from for services.
const FIRST: Ipv4Addr = Ipv4Addr::new(10, 96, 1, 0);
/// The first address of the range for hosts of entries.
const FIRST_OF_ENTRIES: Ipv4Addr = Ipv4Addr::new(240, 240, 1, 0);
/// Addresses in a range: without the first 256 of a /16, and its last.
const SIZE: u32 = 255 * 256 - 1;

/// Claims on addresses. Derived order: given addresses win, then age, then the name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Claim {
    chosen: bool,
    /// Not said of services.
    created: Option<SystemTime>,
    service: Name,
}

/// Who has which address.
#[derive(Debug)]
pub(super) struct Vips {
    /// The first address to choose.
    first: Ipv4Addr,
    /// How many addresses there are to choose from.
    size: u32,
    claims: HashMap<IpAddr, BTreeSet<Claim>>,
    services: HashMap<Name, Wish>,
    /// Of those that say when they were created.
    created: HashMap<Name, SystemTime>,
    /// Services that did not get what they asked for.
    losers: BTreeSet<Name>,
}

#[derive(Debug)]
enum Wish {
    /// These addresses, as far as nobody else has them.
    Given(Vec<IpAddr>),
    /// The last of these, having been refused the others.
    Chosen(Vec<IpAddr>),
}

impl Vips {
    /// For services.
    pub(super) fn of_services() -> Self {
        Self::new(FIRST, SIZE)
    }

    /// For hosts of entries.
    pub(super) fn of_entries() -> Self {
        Self::new(FIRST_OF_ENTRIES, SIZE)
    }

    fn new(first: Ipv4Addr, size: u32) -> Self {
        let (claims, services, created) = (HashMap::new(), HashMap::new(), HashMap::new());
        Self { first, size, claims, services, created, losers: BTreeSet::new() }
    }

    /// The service is new or has changed. Returns the services whose addresses may have changed.
    pub(super) fn set(&mut self, service: &Service) -> BTreeSet<Name> {
        let is_same = match (&service.addresses, self.services.get(&service.name)) {
            (ServiceAddresses::Given(wanted), Some(Wish::Given(current))) => wanted == current,
            (ServiceAddresses::Allocate, Some(Wish::Chosen(_))) => service.families != Families::Ipv6,
            (ServiceAddresses::Headless | ServiceAddresses::External, None) => true,
            _ => false,
        };
        let created = service.entry.as_ref().and_then(|entry| entry.created);
        if is_same && self.created.get(&service.name) == created.as_ref() {
            return BTreeSet::new();
        }
        let mut touched = self.take_back(&service.name);
        if let Some(created) = created {
            self.created.insert(service.name.clone(), created);
        }
        match &service.addresses {
            ServiceAddresses::Given(addresses) => self.give(&service.name, addresses, &mut touched),
            // The range has no IPv6 addresses.
            ServiceAddresses::Allocate if service.families != Families::Ipv6 => {
                self.services.insert(service.name.clone(), Wish::Chosen(Vec::new()));
                self.choose(service.name.clone(), &mut touched);
            }
            ServiceAddresses::Allocate | ServiceAddresses::Headless | ServiceAddresses::External => {}
        }
        self.count_losers(&touched);
        touched
    }

    /// The service is gone. Returns the services whose addresses may have changed.
    pub(super) fn remove(&mut self, service: &Name) -> BTreeSet<Name> {
        let touched = self.take_back(service);
        self.count_losers(&touched);
        touched
    }

    fn take_back(&mut self, service: &Name) -> BTreeSet<Name> {
        let mut touched = BTreeSet::new();
        let created = self.created.remove(service);
        let (addresses, chosen) = match self.services.remove(service) {
            None => return touched,
            Some(Wish::Given(addresses)) => (addresses, false),
            Some(Wish::Chosen(addresses)) => (addresses, true),
        };
        touched.insert(service.clone());
        let claim = Claim { chosen, created, service: service.clone() };
        for address in addresses {
            self.release(address, &claim, &mut touched);
        }
        touched
    }

    fn count_losers(&mut self, touched: &BTreeSet<Name>) {
        for service in touched {
            let has_all = match self.services.get(service) {
                None => true,
                Some(Wish::Given(addresses)) => addresses.iter().all(|address| self.has(*address, service)),
                Some(Wish::Chosen(asked)) => asked.last().is_some_and(|address| self.has(*address, service)),
            };
            if has_all {
                self.losers.remove(service);
            } else {
                self.losers.insert(service.clone());
            }
        }
    }

    /// The addresses that a service has, in the order of its spec.
    pub(super) fn of(&self, service: &Name) -> Vec<IpAddr> {
        match self.services.get(service) {
            None => Vec::new(),
            Some(Wish::Given(addresses)) => {
                addresses.iter().copied().filter(|address| self.has(*address, service)).collect()
            }
            Some(Wish::Chosen(asked)) => {
                asked.last().copied().into_iter().filter(|address| self.has(*address, service)).collect()
            }
        }
    }

    /// Services that did not get what they asked for.
    pub(super) fn notes(&self) -> Vec<Note> {
        let mut notes = Vec::new();
        for service in &self.losers {
            let Some(wish) = self.services.get(service) else { continue };
            let mut note = |reason: String| {
                notes.push(Note { object: ObjectId::namespaced(Kind::Service, service).to_string(), reason });
            };
            match wish {
                Wish::Given(addresses) => {
                    for address in addresses.iter().filter(|address| !self.has(**address, service)) {
                        let owner = self.claims.get(address).and_then(BTreeSet::first);
                        let owner = owner.map(|claim| claim.service.to_string()).unwrap_or_default();
                        note(format!(
                            "clusterIP {address} already belongs to Service {owner}; it is published without"
                        ));
                    }
                }
                Wish::Chosen(_) if self.of(service).is_empty() => {
                    note("no free address was found in 10.96.0.0/16; set spec.clusterIP".to_owned());
                }
                Wish::Chosen(_) => {}
            }
        }
        notes
    }

    /// Services that want an address to be chosen, and got none.
    pub(super) fn without(&self) -> impl Iterator<Item = &Name> {
        self.losers.iter().filter(|service| {
            matches!(self.services.get(*service), Some(Wish::Chosen(_))) && self.of(service).is_empty()
        })
    }

    fn has(&self, address: IpAddr, service: &Name) -> bool {
        self.claims.get(&address).and_then(BTreeSet::first).is_some_and(|claim| claim.service == *service)
    }

    fn give(&mut self, service: &Name, addresses: &[IpAddr], touched: &mut BTreeSet<Name>) {
        self.services.insert(service.clone(), Wish::Given(addresses.to_vec()));
        touched.insert(service.clone());
        let created = self.created.get(service).copied();
        for address in addresses {
            let loser = self.claim(*address, &Claim { chosen: false, created, service: service.clone() });
            self.displaced(loser, touched);
        }
    }

    /// Claims the address; returns who had it and has lost it.
    fn claim(&mut self, address: IpAddr, claim: &Claim) -> Option<Claim> {
        let claims = self.claims.entry(address).or_default();
        let before = claims.first().cloned();
        claims.insert(claim.clone());
        let wins = claims.first() == Some(claim);
        before.filter(|before| wins && before != claim)
    }

    fn displaced(&mut self, loser: Option<Claim>, touched: &mut BTreeSet<Name>) {
        if let Some(loser) = loser {
            touched.insert(loser.service.clone());
            if loser.chosen {
                self.choose(loser.service, touched);
            }
        }
    }

    /// Lets a service ask for its next addresses until it has one; whom it displaces asks on in turn.
    fn choose(&mut self, service: Name, touched: &mut BTreeSet<Name>) {
        let mut asking = Some(service);
        while let Some(service) = asking.take() {
            touched.insert(service.clone());
            let Some(Wish::Chosen(asked)) = self.services.get_mut(&service) else { return };
            let Some(address) = candidate(&service, asked.len(), self.first, self.size) else { return };
            // The sequence may come back to an address; what refused once refuses twice.
            let is_again = asked.contains(&address);
            asked.push(address);
            if is_again {
                asking = Some(service);
                continue;
            }
            let created = self.created.get(&service).copied();
            let claim = Claim { chosen: true, created, service: service.clone() };
            let loser = self.claim(address, &claim);
            asking = if self.has(address, &service) { loser.map(|loser| loser.service) } else { Some(service) };
        }
    }

    /// Gives the address back; the best of those that were refused it moves back to it, and gives back what it had.
    fn release(&mut self, address: IpAddr, claim: &Claim, touched: &mut BTreeSet<Name>) {
        let mut released = vec![(address, claim.clone())];
        while let Some((address, claim)) = released.pop() {
            let Some(claims) = self.claims.get_mut(&address) else { continue };
            let had = claims.first() == Some(&claim);
            claims.remove(&claim);
            let Some(next) = claims.first().cloned() else {
                self.claims.remove(&address);
                continue;
            };
            if !had {
                continue;
            }
            touched.insert(next.service.clone());
            if let (true, Some(Wish::Chosen(asked))) = (next.chosen, self.services.get_mut(&next.service)) {
                let kept = asked.iter().position(|candidate| *candidate == address).map_or(asked.len(), |at| at + 1);
                let later = asked.split_off(kept);
                let given_back = later.into_iter().filter(|later| !asked.contains(later));
                released.extend(given_back.map(|later| (later, next.clone())));
            }
        }
    }
}

/// The address that a service asks for at its n-th attempt, among `size`; none once it has asked often enough.
fn candidate(service: &Name, attempt: usize, first: Ipv4Addr, size: u32) -> Option<IpAddr> {
    let attempt = u32::try_from(attempt).ok().filter(|attempt| *attempt < MAX_ATTEMPTS)?;
    let mut hash = Sha256::new();
    hash.update(service.namespace.as_bytes());
    hash.update(b"/");
    hash.update(service.name.as_bytes());
    hash.update(attempt.to_be_bytes());
    let start = hash.finalize().first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes))?;
    let offset = start.checked_rem(size)?;
    Some(Ipv4Addr::from_bits(first.to_bits() + offset).into())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::api::{EntryPart, Topology, WaypointBinding};

    /// An age of 0 is none.
    fn service(name: &str, addresses: ServiceAddresses, age: u8) -> Arc<Service> {
        let created = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(100 - u64::from(age));
        let entry = EntryPart {
            is_made_up: false,
            name: "entry".into(),
            blocks: Vec::new(),
            is_passthrough: false,
            subject_alt_names: Vec::new(),
            is_private: false,
            created: Some(created),
        };
        Arc::new(Service {
            entry: (age > 0).then_some(entry),
            name: Name::new("ns", name),
            addresses,
            ingress: Vec::new(),
            ports: Vec::new(),
            selector: BTreeMap::new(),
            publish_not_ready: false,
            families: Families::Automatic,
            topology: Topology::Anywhere,
            waypoint: WaypointBinding::Unset,
            is_stand_in: false,
        })
    }

    fn addresses(vips: &Vips, names: impl Iterator<Item = Name>) -> Vec<Vec<IpAddr>> {
        names.map(|name| vips.of(&name)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        /// A range this small is nearly always full, so that services displace each other all the time.
        #[test]
        fn the_outcome_does_not_depend_on_history(edits in prop::collection::vec((0..9u8, 0..6u8, 0..3u8), 1..80)) {
            let size = 6;
            let mut vips = Vips::new(FIRST, size);
            let mut services: BTreeMap<Name, Arc<Service>> = BTreeMap::new();
            let mut known: BTreeMap<Name, Vec<IpAddr>> = BTreeMap::new();
            for (name, wish, age) in edits {
                let wish = match wish {
                    0..=2 => Some(ServiceAddresses::Allocate),
                    3 => Some(ServiceAddresses::Given(vec![FIRST.into(), Ipv4Addr::new(10, 96, 1, 3).into()])),
                    4 => Some(ServiceAddresses::Headless),
                    _ => None,
                };
                let name = Name::new("ns", format!("s{name}"));
                let touched = match wish {
                    Some(wish) => {
                        let service = service(&name.name, wish, age);
                        services.insert(name, service.clone());
                        vips.set(&service)
                    }
                    None => {
                        services.remove(&name);
                        vips.remove(&name)
                    }
                };
                for name in touched {
                    let now = vips.of(&name);
                    known.insert(name, now);
                }
            }
            let mut fresh = Vips::new(FIRST, size);
            for service in services.values().rev() {
                fresh.set(service);
            }
            prop_assert_eq!(addresses(&vips, services.keys().cloned()), addresses(&fresh, services.keys().cloned()));
            prop_assert_eq!(vips.notes(), fresh.notes());
            // Whoever followed the touched services knows every address.
            for name in services.keys() {
                prop_assert_eq!(known.get(name).cloned().unwrap_or_default(), vips.of(name));
            }
            // No address has two owners.
            let mut all: Vec<IpAddr> = services.keys().flat_map(|name| vips.of(name)).collect();
            let count = all.len();
            all.sort();
            all.dedup();
            prop_assert_eq!(all.len(), count);
        }
    }

    #[test]
    fn an_older_entry_keeps_its_address() {
        for (first, second) in [(1, 2), (2, 1)] {
            let mut vips = Vips::new(FIRST_OF_ENTRIES, 1);
            let (a, b) = (
                service("a.example.com", ServiceAddresses::Allocate, first),
                service("b.example.com", ServiceAddresses::Allocate, second),
            );
            vips.set(&a);
            vips.set(&b);
            let (older, younger) = if first > second { (&a, &b) } else { (&b, &a) };
            assert_eq!(vips.of(&older.name), [IpAddr::from(FIRST_OF_ENTRIES)]);
            assert_eq!((vips.of(&younger.name), vips.without().collect::<Vec<_>>()), (vec![], vec![&younger.name]));
        }
    }

    #[test]
    fn the_range_ends_before_the_broadcast_address() {
        let last = Ipv4Addr::from_bits(FIRST.to_bits() + SIZE - 1);
        assert_eq!(last, Ipv4Addr::new(10, 96, 255, 254));
        let name = Name::new("ns", "a");
        assert_eq!(candidate(&name, 0, FIRST, 1), Some(FIRST.into()));
        assert_eq!(candidate(&name, MAX_ATTEMPTS as usize, FIRST, SIZE), None);
    }
}
