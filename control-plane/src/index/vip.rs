//! Virtual addresses of services: those that are given, and those that must be chosen because there is no API server to
//! choose them.
//!
//! The choice is a pure function of the set of services, so that replicas agree and a restart changes nothing. A service
//! asks for the addresses of a fixed sequence, made by hashing its name and a counter, in 10.96.1.0 to 10.96.255.254
//! (the first 256 addresses of 10.96.0.0/16 are left to services that name theirs). Where two ask for the same address,
//! the one that has it written in its spec wins, then the one whose `namespace/name` comes first; the other asks for
//! its next. Like a stable matching, the outcome does not depend on the order of arrival.
//!
//! An address that two services have written in their specs goes to the first by name; the other is published without.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};

use sha2::{Digest, Sha256};

use super::Note;
use crate::api::{Families, Kind, Name, ObjectId, Service, ServiceAddresses};

/// Addresses that one service asks for before it goes without. The chance to need more is negligible until the range is
/// nearly full.
const MAX_ATTEMPTS: u32 = 64;

/// Claims on addresses. Derived order: given addresses win, then the name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Claim {
    chosen: bool,
    service: Name,
}

/// Who has which address.
#[derive(Debug, Default)]
pub(super) struct Vips {
    claims: HashMap<IpAddr, BTreeSet<Claim>>,
    services: HashMap<Name, Wish>,
}

#[derive(Debug)]
enum Wish {
    /// These addresses, as far as nobody else has them.
    Given(Vec<IpAddr>),
    /// The last of these, having been refused the others.
    Chosen(Vec<IpAddr>),
}

impl Vips {
    /// The service is new or has changed. Returns the services whose addresses may have changed.
    pub(super) fn set(&mut self, service: &Service) -> BTreeSet<Name> {
        let is_same = match (&service.addresses, self.services.get(&service.name)) {
            (ServiceAddresses::Given(wanted), Some(Wish::Given(current))) => wanted == current,
            (ServiceAddresses::Allocate, Some(Wish::Chosen(_))) => service.families != Families::Ipv6,
            (ServiceAddresses::Headless | ServiceAddresses::External, None) => true,
            _ => false,
        };
        if is_same {
            return BTreeSet::new();
        }
        let mut touched = self.remove(&service.name);
        match &service.addresses {
            ServiceAddresses::Given(addresses) => self.give(&service.name, addresses, &mut touched),
            // The range has no IPv6 addresses.
            ServiceAddresses::Allocate if service.families != Families::Ipv6 => {
                self.services.insert(service.name.clone(), Wish::Chosen(Vec::new()));
                self.choose(service.name.clone(), &mut touched);
            }
            ServiceAddresses::Allocate | ServiceAddresses::Headless | ServiceAddresses::External => {}
        }
        touched
    }

    /// The service is gone. Returns the services whose addresses may have changed.
    pub(super) fn remove(&mut self, service: &Name) -> BTreeSet<Name> {
        let mut touched = BTreeSet::new();
        let (addresses, chosen) = match self.services.remove(service) {
            None => return touched,
            Some(Wish::Given(addresses)) => (addresses, false),
            Some(Wish::Chosen(addresses)) => (addresses, true),
        };
        touched.insert(service.clone());
        let claim = Claim { chosen, service: service.clone() };
        for address in addresses {
            self.release(address, &claim, &mut touched);
        }
        touched
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
        for (service, wish) in &self.services {
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
        notes.sort_by(|a, b| a.object.cmp(&b.object));
        notes
    }

    fn has(&self, address: IpAddr, service: &Name) -> bool {
        self.claims.get(&address).and_then(BTreeSet::first).is_some_and(|claim| claim.service == *service)
    }

    fn give(&mut self, service: &Name, addresses: &[IpAddr], touched: &mut BTreeSet<Name>) {
        self.services.insert(service.clone(), Wish::Given(addresses.to_vec()));
        touched.insert(service.clone());
        for address in addresses {
            let loser = self.claim(*address, Claim { chosen: false, service: service.clone() });
            self.displaced(loser, touched);
        }
    }

    /// Claims the address; returns who had it and has lost it.
    fn claim(&mut self, address: IpAddr, claim: Claim) -> Option<Claim> {
        let claims = self.claims.entry(address).or_default();
        let before = claims.first().cloned();
        claims.insert(claim.clone());
        let wins = claims.first() == Some(&claim);
        before.filter(|before| wins && *before != claim)
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
            let Some(address) = candidate(&service, asked.len()) else { return };
            asked.push(address);
            let claim = Claim { chosen: true, service: service.clone() };
            let loser = self.claim(address, claim);
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
                released.extend(asked.split_off(kept).into_iter().map(|later| (later, next.clone())));
            }
        }
    }
}

/// The address that a service asks for at its n-th attempt; none once it has asked often enough.
fn candidate(service: &Name, attempt: usize) -> Option<IpAddr> {
    let attempt = u32::try_from(attempt).ok().filter(|attempt| *attempt < MAX_ATTEMPTS)?;
    let mut hash = Sha256::new();
    hash.update(service.namespace.as_bytes());
    hash.update(b"/");
    hash.update(service.name.as_bytes());
    hash.update(attempt.to_be_bytes());
    let digest = hash.finalize();
    let [high, low] = [digest.first().copied()?, digest.get(1).copied()?];
    // 255 x 256 addresses from 10.96.1.0 on; the last one is the network's broadcast address and moves by one.
    let high = high % 255 + 1;
    let low = if high == 255 && low == 255 { 254 } else { low };
    Some(Ipv4Addr::new(10, 96, high, low).into())
}
