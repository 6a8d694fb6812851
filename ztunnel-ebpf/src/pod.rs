//! What the programs know of an enrolled pod.

use core::net::IpAddr;

use crate::tuple::is_mapped;

/// Addresses of one pod, of each family.
pub const POD_ADDRESSES: usize = 4;

/// [`PodEntry::flags`]: requests to port 53 go to the proxy's DNS sockets.
pub const FLAG_DNS: u32 = 1;
/// [`PodEntry::flags`]: connections older than the enrolment may not send payload either.
pub const FLAG_DENY_OLDER: u32 = 2;
/// [`PodEntry::flags`]: the guard lets everything pass. Set by the agent when it takes a guard away that it may not find.
pub const FLAG_DISARMED: u32 = 4;

/// What the programs know of an enrolled pod.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodEntry {
    /// The pod's own IPv4 addresses as on the wire (first octet first in memory); 0 is unused.
    pub v4: [u32; POD_ADDRESSES],
    /// The pod's own IPv6 addresses likewise.
    pub v6: [[u32; 4]; POD_ADDRESSES],
    /// [`FLAG_DNS`], [`FLAG_DENY_OLDER`].
    pub flags: u32,
    /// Index in the pod's namespace of the interface that holds these addresses. 0: every interface counts as that one.
    pub interface: u32,
}

impl PodEntry {
    /// Bytes of one entry in a map.
    pub const SIZE: usize = size_of::<Self>();

    /// An entry for these addresses of an interface. `None` if there are none, or more than [`POD_ADDRESSES`] of one
    /// family, or one is unspecified.
    #[must_use]
    pub fn new(addresses: &[IpAddr], interface: u32, flags: u32) -> Option<Self> {
        let mut entry = Self { flags, interface, ..Self::default() };
        let (mut v4, mut v6) = (entry.v4.iter_mut(), entry.v6.iter_mut());
        for address in addresses {
            let octets = crate::words(*address);
            if address.is_unspecified() {
                return None;
            }
            match address {
                IpAddr::V4(_) => *v4.next()? = octets[3],
                IpAddr::V6(_) => *v6.next()? = octets,
            }
        }
        if addresses.is_empty() { None } else { Some(entry) }
    }

    /// Whether an IPv4 address, as the kernel gives it to the programs, is the pod's own.
    #[inline(always)]
    #[must_use]
    pub fn owns_v4(&self, address: u32) -> bool {
        let [a, b, c, d] = self.v4;
        address != 0 && (a == address || b == address || c == address || d == address)
    }

    /// The same for IPv6.
    #[inline(always)]
    #[must_use]
    pub fn owns_v6(&self, address: [u32; 4]) -> bool {
        let [a, b, c, d] = &self.v6;
        (address[0] | address[1] | address[2] | address[3]) != 0
            && (same(a, address) || same(b, address) || same(c, address) || same(d, address))
    }

    /// Whether an address, IPv4 as mapped, is the pod's own.
    #[inline(always)]
    #[must_use]
    pub fn owns(&self, address: &[u32; 4]) -> bool {
        if is_mapped(address) { self.owns_v4(address[3]) } else { self.owns_v6(*address) }
    }

    /// Whether a flag is set.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// The entry as it lies in a map.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        let words = self.v4.into_iter().chain(self.v6.into_iter().flatten()).chain([self.flags, self.interface]);
        for (chunk, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *chunk = word.to_ne_bytes();
        }
        bytes
    }

    /// The entry that lies in a map.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let mut words = bytes.as_chunks::<4>().0.iter().map(|chunk| u32::from_ne_bytes(*chunk));
        let mut next = || words.next().unwrap_or_default();
        Self {
            v4: core::array::from_fn(|_| next()),
            v6: core::array::from_fn(|_| core::array::from_fn(|_| next())),
            flags: next(),
            interface: next(),
        }
    }
}

/// Word by word: a comparison of arrays becomes a call, which costs more than it does.
#[inline(always)]
fn same(own: &[u32; 4], address: [u32; 4]) -> bool {
    own[0] == address[0] && own[1] == address[1] && own[2] == address[2] && own[3] == address[3]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words;
    use core::net::{Ipv4Addr, Ipv6Addr};

    const A: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 244, 1, 5));
    const B: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 244, 1, 6));
    const A6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 5));
    const B6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 6));

    #[test]
    fn layout_is_free_of_padding() {
        assert_eq!(PodEntry::SIZE, POD_ADDRESSES * 4 + POD_ADDRESSES * 16 + 4 + 4);
        assert_eq!(align_of::<PodEntry>(), 4);
    }

    #[test]
    fn bytes_round_trip_in_network_order() {
        let entry = PodEntry::new(&[A, A6, B, B6], 7, FLAG_DNS).unwrap();
        let bytes = entry.to_bytes();
        assert_eq!(bytes[..8], [10, 244, 1, 5, 10, 244, 1, 6]);
        assert_eq!(bytes[16..20], [0xfd, 0, 0, 0]);
        assert_eq!(PodEntry::from_bytes(&bytes), entry);
        assert!(entry.has(FLAG_DNS) && !entry.has(FLAG_DENY_OLDER));
    }

    #[test]
    fn owns_its_addresses_and_never_the_unused_slot() {
        let entry = PodEntry::new(&[A, A6], 0, 0).unwrap();
        assert!(entry.owns_v4(words(A)[3]) && entry.owns_v6(words(A6)));
        assert!(!entry.owns_v4(words(B)[3]) && !entry.owns_v6(words(B6)));
        assert!(entry.owns(&words(A)) && entry.owns(&words(A6)) && !entry.owns(&words(B)) && !entry.owns(&words(B6)));
        assert!(!entry.owns_v4(0) && !entry.owns_v6([0; 4]));
    }

    #[test]
    fn entry_needs_one_to_four_addresses_of_a_family() {
        assert_eq!(PodEntry::new(&[], 0, 0), None);
        assert_eq!(PodEntry::new(&[A; POD_ADDRESSES + 1], 0, 0), None);
        assert_eq!(PodEntry::new(&[A6; POD_ADDRESSES + 1], 0, 0), None);
        assert_eq!(PodEntry::new(&[IpAddr::V6(Ipv6Addr::UNSPECIFIED)], 0, 0), None);
        let both = [A, A, A, A, A6, A6, A6, A6];
        assert!(PodEntry::new(&both, 0, 0).is_some());
    }
}
