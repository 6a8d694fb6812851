//! The destinations of each pod that are captured: a copy of its routing table in a trie that the connect hooks read.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{MapData, MapError};
use ztunnel_ebpf as abi;

use super::error::{CaptureError, map_error};

/// A destination and whether connections to it are captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Address; bits behind the prefix do not count.
    pub address: IpAddr,
    /// Length of the prefix in bits.
    pub prefix: u8,
    /// Whether it leaves the pod by the interface that has its address.
    pub captured: bool,
}

type Bytes = [u8; abi::RouteKey::SIZE];
/// Length and bytes of a key, in an order.
type Name = (u32, Bytes);

/// How often all keys are listed, for those that somebody else put there.
const SWEEP_EVERY: Duration = Duration::from_secs(300);

/// The trie, and which keys it holds for each namespace: the kernel only lists those of all of them at once.
pub struct Routes {
    trie: LpmTrie<MapData, Bytes, u32>,
    known: BTreeMap<u64, BTreeSet<Name>>,
    swept: Instant,
}

impl Routes {
    /// With what is pinned.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new(trie: LpmTrie<MapData, Bytes, u32>) -> Result<Self, CaptureError> {
        Ok(Self { known: list(&trie)?, trie, swept: Instant::now() })
    }

    /// Puts these in the place of those that the namespace has.
    ///
    /// # Errors
    /// When the kernel refuses; then some of it may be done.
    pub fn set(&mut self, cookie: u64, routes: &[Route]) -> Result<(), CaptureError> {
        let known = self.known.entry(cookie).or_default();
        let mut wanted = BTreeSet::new();
        for route in routes {
            let (length, data) = name(cookie, route);
            self.trie
                .insert(&Key::new(length, data), u32::from(route.captured), 0)
                .map_err(map_error(abi::MAP_ROUTES))?;
            wanted.insert((length, data));
            known.insert((length, data));
        }
        let stale: Vec<Name> = known.difference(&wanted).copied().collect();
        for (length, data) in stale {
            match self.trie.remove(&Key::new(length, data)) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(map_error(abi::MAP_ROUTES)(error)),
            }
            known.remove(&(length, data));
        }
        if known.is_empty() {
            self.known.remove(&cookie);
        }
        Ok(())
    }

    /// What the kernel holds for a namespace. Each route that was set is looked up as the connect hooks do it; one that
    /// somebody else added is seen after the next listing of all.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn of(&mut self, cookie: u64) -> Result<Vec<Route>, CaptureError> {
        if self.swept.elapsed() >= SWEEP_EVERY {
            self.sweep()?;
        }
        let mut found = Vec::new();
        for name in self.known.get(&cookie).into_iter().flatten() {
            match self.trie.get(&Key::new(name.0, name.1), 0) {
                Ok(value) => found.extend(route(name, value != 0)),
                Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(map_error(abi::MAP_ROUTES)(error)),
            }
        }
        Ok(found)
    }

    /// Lists all keys.
    fn sweep(&mut self) -> Result<(), CaptureError> {
        self.known = list(&self.trie)?;
        self.swept = Instant::now();
        Ok(())
    }
}

/// All keys by the cookie of their namespace.
fn list(trie: &LpmTrie<MapData, Bytes, u32>) -> Result<BTreeMap<u64, BTreeSet<Name>>, CaptureError> {
    let mut known: BTreeMap<u64, BTreeSet<Name>> = BTreeMap::new();
    for key in trie.keys() {
        let key = key.map_err(map_error(abi::MAP_ROUTES))?;
        let name = (key.prefix_len(), key.data());
        known.entry(cookie_of(&name)).or_default().insert(name);
    }
    Ok(known)
}

fn name(cookie: u64, route: &Route) -> Name {
    let prefix = abi::RouteKey::prefix(route.address, route.prefix).min(abi::RouteKey::FULL);
    let mut data = abi::RouteKey { cookie, address: abi::words(route.address) }.to_bytes();
    // The kernel keeps what is behind the prefix, and would take it for another key when it lists them.
    for (index, byte) in data.iter_mut().enumerate() {
        let before = u32::try_from(index * 8).unwrap_or(u32::MAX);
        let kept = prefix.saturating_sub(before).min(8);
        *byte &= !0xff_u8.checked_shr(kept).unwrap_or(0);
    }
    (prefix, data)
}

fn cookie_of((_, data): &Name) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *data;
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

fn route((length, data): &Name, captured: bool) -> Option<Route> {
    let octets: [u8; 16] = data.get(8..)?.try_into().ok()?;
    let bits = u8::try_from(length.checked_sub(abi::ROUTE_PREFIX_BITS)?).ok()?;
    let v6 = Ipv6Addr::from(octets);
    Some(match (v6.to_ipv4_mapped(), bits.checked_sub(96)) {
        (Some(v4), Some(prefix)) => Route { address: v4.into(), prefix, captured },
        _ => Route { address: v6.into(), prefix: bits, captured },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_and_keys_are_the_same_and_bits_behind_the_prefix_do_not_count() {
        for (text, prefix) in [("10.1.2.0", 24), ("0.0.0.0", 0), ("fd00::", 8), ("::", 0), ("fd00::5", 128)] {
            let wanted = Route { address: text.parse().unwrap(), prefix, captured: true };
            assert_eq!(route(&name(7, &wanted), true), Some(wanted));
        }
        let sloppy = Route { address: "10.1.255.255".parse().unwrap(), prefix: 17, captured: false };
        let exact = Route { address: "10.1.128.0".parse().unwrap(), ..sloppy };
        assert_eq!(name(7, &sloppy), name(7, &exact));
        assert_eq!(cookie_of(&name(7, &exact)), 7);
    }
}
