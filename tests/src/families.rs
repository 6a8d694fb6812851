//! Address families of a cluster, and its plan of addresses in both.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Address families of a cluster, a pod or a service.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Families {
    /// IPv4 alone; namespaces have no IPv6 at all.
    #[default]
    V4,
    /// IPv6 alone.
    V6,
    /// Both, IPv4 first.
    Dual,
}

impl Families {
    /// IPv4 is among them.
    pub fn v4(self) -> bool {
        matches!(self, Self::V4 | Self::Dual)
    }

    /// IPv6 is among them.
    pub fn v6(self) -> bool {
        matches!(self, Self::V6 | Self::Dual)
    }

    /// Those of the addresses that are of these families.
    pub(crate) fn pick(self, v4: Ipv4Addr, v6: Ipv6Addr) -> Vec<IpAddr> {
        let both = [self.v4().then_some(IpAddr::V4(v4)), self.v6().then_some(IpAddr::V6(v6))];
        both.into_iter().flatten().collect()
    }

    /// As `spec.ipFamilies` lists them.
    pub(crate) fn names(self) -> &'static [&'static str] {
        match self {
            Self::V4 => &["IPv4"],
            Self::V6 => &["IPv6"],
            Self::Dual => &["IPv4", "IPv6"],
        }
    }
}

/// The pods' IPv4 gateway, the same in every pod: an address of the node that answers on each pod's link.
pub const POD_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The pods' IPv6 gateway: the link-local address of the node's end of each pod's link.
pub const POD_GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// Two ends of a link to the fabric, IPv4: the fabric's and the other's.
pub(crate) fn fabric_v4(octet: u8) -> (Ipv4Addr, Ipv4Addr) {
    (Ipv4Addr::new(172, 31, octet, 1), Ipv4Addr::new(172, 31, octet, 2))
}

/// The same in IPv6.
pub(crate) fn fabric_v6(octet: u8) -> (Ipv6Addr, Ipv6Addr) {
    let end = |last| Ipv6Addr::new(0xfd31, 0, 0, u16::from(octet), 0, 0, 0, last);
    (end(1), end(2))
}

/// The pods' networks of a node.
pub(crate) fn pod_networks(octet: u8) -> (Ipv4Addr, Ipv6Addr) {
    (Ipv4Addr::new(10, 244, octet, 0), Ipv6Addr::new(0xfd10, 0x244, 0, u16::from(octet), 0, 0, 0, 0))
}

/// A pod's addresses on a node.
pub(crate) fn pod_addresses(octet: u8, number: u8) -> (Ipv4Addr, Ipv6Addr) {
    let (v4, v6) = (pod_networks(octet).0.octets(), pod_networks(octet).1.segments());
    let last = [v6[0], v6[1], v6[2], v6[3], 0, 0, 0, u16::from(number)];
    (Ipv4Addr::new(v4[0], v4[1], v4[2], number), last.into())
}

/// The virtual addresses number `number` of services.
pub(crate) fn service_addresses(number: u16) -> (Ipv4Addr, Ipv6Addr) {
    let [high, low] = number.to_be_bytes();
    (Ipv4Addr::new(10, 96, high, low), Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, number))
}
