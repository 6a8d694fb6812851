//! Keys of maps that hold addresses of both families.

use core::net::IpAddr;

/// An address as four words in network order; IPv4 is mapped to IPv6.
#[must_use]
pub fn words(address: IpAddr) -> [u32; 4] {
    let octets = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    let mut words = [0; 4];
    for (word, chunk) in words.iter_mut().zip(octets.as_chunks::<4>().0) {
        *word = u32::from_ne_bytes(*chunk);
    }
    words
}

const MAPPED: u32 = 0xffff_u32.to_be();

/// An IPv4 address, in network order, as four words.
#[inline(always)]
#[must_use]
pub const fn mapped(address: u32) -> [u32; 4] {
    [0, 0, MAPPED, address]
}

/// Whether four words are an IPv4-mapped address.
#[inline(always)]
#[must_use]
pub const fn is_mapped(address: &[u32; 4]) -> bool {
    address[0] == 0 && address[1] == 0 && address[2] == MAPPED
}

/// Whether an address is one of loopback, of either family.
#[inline(always)]
#[must_use]
pub const fn is_loopback(address: &[u32; 4]) -> bool {
    if is_mapped(address) {
        address[3].to_ne_bytes()[0] == 127
    } else {
        address[0] | address[1] | address[2] == 0 && address[3] == 1_u32.to_be()
    }
}

/// Bits of a [`RouteKey`] before the address: they belong to every prefix.
pub const ROUTE_PREFIX_BITS: u32 = 64;

/// Key of [`MAP_ROUTES`](crate::MAP_ROUTES), behind the length of the prefix.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteKey {
    /// Cookie of the pod's network namespace.
    pub cookie: u64,
    /// Destination.
    pub address: [u32; 4],
}

impl RouteKey {
    /// Bytes of one key in the map, without the length of the prefix.
    pub const SIZE: usize = size_of::<Self>();
    /// Length of the prefix that is one address: what look-ups ask for.
    pub const FULL: u32 = ROUTE_PREFIX_BITS + 128;

    /// Length of the whole prefix for a prefix of an address, both in bits.
    #[must_use]
    pub const fn prefix(address: IpAddr, length: u8) -> u32 {
        match address {
            IpAddr::V4(_) => ROUTE_PREFIX_BITS + 96 + length as u32,
            IpAddr::V6(_) => ROUTE_PREFIX_BITS + length as u32,
        }
    }

    /// The key as it lies in a map.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[..8].copy_from_slice(&self.cookie.to_ne_bytes());
        for (chunk, word) in bytes[8..].as_chunks_mut::<4>().0.iter_mut().zip(self.address) {
            *chunk = word.to_ne_bytes();
        }
        bytes
    }
}

/// A TCP connection, seen from the end that opened it. Key of [`MAP_PROBES`](crate::MAP_PROBES).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FourTuple {
    /// Address of the end that opened it.
    pub source: [u32; 4],
    /// Address of the other.
    pub destination: [u32; 4],
    /// Port of the end that opened it, in the order of this machine.
    pub source_port: u16,
    /// Port of the other.
    pub destination_port: u16,
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::{Ipv4Addr, Ipv6Addr};

    #[test]
    fn keys_are_free_of_padding() {
        assert_eq!(RouteKey::SIZE, 8 + 16);
        assert_eq!(size_of::<FourTuple>(), 16 + 16 + 2 + 2);
        assert_eq!(align_of::<FourTuple>(), 4);
    }

    #[test]
    fn addresses_are_in_network_order_and_ipv4_is_mapped() {
        let v4 = IpAddr::V4(Ipv4Addr::new(10, 1, 2, 3));
        assert_eq!(words(v4), [0, 0, 0xffff_u32.to_be(), u32::from_ne_bytes([10, 1, 2, 3])]);
        let v6 = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 5));
        assert_eq!(words(v6), [0xfd00_0000_u32.to_be(), 0, 0, 5_u32.to_be()]);
    }

    #[test]
    fn loopback_is_known_in_both_families() {
        for text in ["127.0.0.1", "127.255.0.3", "::1"] {
            assert!(is_loopback(&words(text.parse().unwrap())), "{text}");
        }
        for text in ["126.0.0.1", "10.0.0.127", "::", "::2", "fd00::1", "0.0.0.1"] {
            assert!(!is_loopback(&words(text.parse().unwrap())), "{text}");
        }
        assert_eq!(mapped(words(IpAddr::V4(Ipv4Addr::LOCALHOST))[3]), words(IpAddr::V4(Ipv4Addr::LOCALHOST)));
    }

    #[test]
    fn prefixes_count_the_cookie_and_the_mapping() {
        let v4 = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 0));
        let key = RouteKey { cookie: 7, address: words(v4) };
        assert_eq!(RouteKey::prefix(v4, 8), 168);
        assert_eq!(RouteKey::prefix(v4, 32), RouteKey::FULL);
        assert_eq!(RouteKey::prefix(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0), ROUTE_PREFIX_BITS);
        let bytes = key.to_bytes();
        assert_eq!(bytes[..8], 7_u64.to_ne_bytes());
        assert_eq!(bytes[18..], [255, 255, 10, 0, 0, 0]);
    }
}
