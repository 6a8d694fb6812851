//! Addresses as discovery carries them: bytes with a network, and blocks of them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use mesh_proto::workload as wire;
use thiserror::Error;

/// An IP address together with the network in which it means something. The empty network is a network.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkAddress {
    /// Name of the network; empty in a mesh of one network.
    pub network: Arc<str>,
    /// The address, never an IPv4 address mapped into IPv6.
    pub ip: IpAddr,
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.ip)
    }
}

impl TryFrom<&wire::NetworkAddress> for NetworkAddress {
    type Error = InvalidAddress;

    fn try_from(wire: &wire::NetworkAddress) -> Result<Self, Self::Error> {
        Ok(Self { network: wire.network.as_str().into(), ip: ip_from_bytes(&wire.address)? })
    }
}

/// Which of a workload's addresses a client can connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    like: IpAddr,
    v4: bool,
    v6: bool,
}

impl Reach {
    /// For a client that has the addresses `own`, and asked for `like`, whose family is preferred. A client none of whose
    /// addresses are known reaches everything.
    pub fn new(like: IpAddr, own: &[IpAddr]) -> Self {
        let has = |v4| own.is_empty() || own.iter().any(|ip| ip.is_ipv4() == v4);
        Self { like: like.to_canonical(), v4: has(true), v6: has(false) }
    }

    /// The first address of the preferred family, else the first; among those whose family the client has.
    pub fn choose(&self, addresses: &[IpAddr]) -> Option<IpAddr> {
        let mut reachable = addresses.iter().filter(|ip| self.can(**ip));
        let first = reachable.clone().next();
        reachable.find(|ip| ip.is_ipv4() == self.like.is_ipv4()).or(first).copied()
    }

    /// Whether the client has an address of the family of `ip`.
    pub fn can(&self, ip: IpAddr) -> bool {
        if ip.is_ipv4() { self.v4 } else { self.v6 }
    }
}

/// A block of addresses: those that share the first `length` bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr {
    base: IpAddr,
    length: u8,
}

impl Cidr {
    /// The block of `length` leading bits around `ip`. Bits after the prefix are cleared.
    ///
    /// # Errors
    /// When `length` is more than the address has bits.
    pub fn new(ip: IpAddr, length: u32) -> Result<Self, InvalidAddress> {
        // A block of mapped addresses is the IPv4 block: connections are compared in canonical form.
        let (ip, length) = match (ip, ip.to_canonical()) {
            (IpAddr::V6(_), canonical @ IpAddr::V4(_)) if length >= 96 => (canonical, length - 96),
            (ip, _) => (ip, length),
        };
        let short = u8::try_from(length).ok().filter(|length| *length <= bits(ip));
        let length = short.ok_or(InvalidAddress::PrefixLength { ip, length })?;
        Ok(Self { base: mask(ip, length), length })
    }

    /// The block of `length` leading bits around an address of 4 or 16 bytes in network order.
    ///
    /// # Errors
    /// When there are neither 4 nor 16 bytes, or `length` is more than the address has bits.
    pub fn from_bytes(bytes: &[u8], length: u32) -> Result<Self, InvalidAddress> {
        Self::new(raw_ip(bytes)?, length)
    }

    /// The block that holds `ip` alone.
    pub fn host(ip: IpAddr) -> Self {
        let ip = ip.to_canonical();
        Self { base: ip, length: bits(ip) }
    }

    /// Whether `ip` is in the block. An IPv4 address mapped into IPv6 counts as the IPv4 address.
    pub fn contains(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        ip.is_ipv4() == self.base.is_ipv4() && mask(ip, self.length) == self.base
    }

    /// The first address of the block.
    pub fn base(&self) -> IpAddr {
        self.base
    }

    /// Number of leading bits that are fixed.
    pub fn length(&self) -> u8 {
        self.length
    }

    /// Whether the block is a single address.
    pub fn is_host(&self) -> bool {
        self.length == bits(self.base)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.length)
    }
}

/// Why bytes are not an address or a block.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidAddress {
    /// Neither 4 nor 16 bytes.
    #[error("an address of {length} bytes; it must be 4 or 16")]
    ByteLength {
        /// Number of bytes given.
        length: usize,
    },
    /// A prefix longer than the address.
    #[error("prefix length {length} of {ip} is longer than the address")]
    PrefixLength {
        /// The address.
        ip: IpAddr,
        /// The prefix length as given.
        length: u32,
    },
}

/// Reads 4 or 16 bytes in network order; IPv4 mapped into IPv6 comes out as IPv4.
///
/// # Errors
/// When there are neither 4 nor 16 bytes.
pub fn ip_from_bytes(bytes: &[u8]) -> Result<IpAddr, InvalidAddress> {
    raw_ip(bytes).map(|ip| ip.to_canonical())
}

fn raw_ip(bytes: &[u8]) -> Result<IpAddr, InvalidAddress> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(IpAddr::V4(Ipv4Addr::from(v4)));
    }
    let v6 = <[u8; 16]>::try_from(bytes).map_err(|_| InvalidAddress::ByteLength { length: bytes.len() })?;
    Ok(IpAddr::V6(Ipv6Addr::from(v6)))
}

/// Number of bits of an address of this family.
fn bits(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// `ip` with everything after the first `length` bits cleared.
pub(crate) fn mask(ip: IpAddr, length: u8) -> IpAddr {
    match ip {
        IpAddr::V4(v4) => {
            let keep = u32::MAX.checked_shl(32 - u32::from(length.min(32))).unwrap_or(0);
            IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() & keep))
        }
        IpAddr::V6(v6) => {
            let keep = u128::MAX.checked_shl(128 - u32::from(length.min(128))).unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & keep))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn addresses_are_four_or_sixteen_bytes() {
        assert_eq!(ip_from_bytes(&[10, 0, 0, 1]), Ok(ip("10.0.0.1")));
        assert_eq!(ip_from_bytes(&[0; 16]), Ok(ip("::")));
        let mapped = Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets();
        assert_eq!(ip_from_bytes(&mapped), Ok(ip("10.0.0.1")));
        for length in [0, 3, 5, 15, 17] {
            assert_eq!(ip_from_bytes(&vec![1; length]), Err(InvalidAddress::ByteLength { length }));
        }
    }

    #[test]
    fn blocks_contain_what_shares_the_prefix() {
        let cases = [
            ("10.1.2.3", 8, "10.200.0.1", true),
            ("10.1.2.3", 8, "11.0.0.1", false),
            ("10.1.2.3", 32, "10.1.2.3", true),
            ("10.1.2.3", 32, "10.1.2.4", false),
            ("0.0.0.0", 0, "192.0.2.1", true),
            ("0.0.0.0", 0, "2001:db8::1", false),
            ("2001:db8::", 32, "2001:db8:ffff::1", true),
            ("2001:db8::", 32, "2001:db9::1", false),
            ("::", 0, "2001:db8::1", true),
            ("10.0.0.0", 8, "::ffff:10.1.1.1", true),
            ("::ffff:10.0.0.0", 104, "10.1.1.1", true),
            ("::", 0, "10.1.1.1", false),
        ];
        for (base, length, address, expected) in cases {
            let block = Cidr::new(ip(base), length).unwrap();
            assert_eq!(block.contains(ip(address)), expected, "{block} {address}");
        }
    }

    #[test]
    fn prefixes_longer_than_the_address_are_refused() {
        assert!(Cidr::new(ip("10.0.0.0"), 33).is_err());
        assert!(Cidr::new(ip("10.0.0.0"), 288).is_err());
        assert!(Cidr::new(ip("::1"), 129).is_err());
        assert!(Cidr::new(ip("::1"), 128).is_ok());
    }
}
