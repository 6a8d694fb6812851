//! What the eBPF programs and the agent must agree on: names of maps and programs, their layout, marks and ports.
//!
//! The programs themselves are in `program/`, a package of its own, because they are built for another target with
//! their own lock file. Structures are free of padding and cross the boundary as bytes, so that user space needs no
//! `unsafe`.
//!
//! Limits of this version: IPv4 TCP (IPv4-mapped IPv6 sockets included) is captured, native IPv6 is left alone.
#![no_std]
#![forbid(unsafe_code)]

/// Version of everything that is pinned: maps, their layout, names. Part of the path in bpffs.
pub const LAYOUT_VERSION: u32 = 1;

/// Firewall mark of sockets whose connection is captured on its way out of a pod. All 32 bits are compared.
pub const MARK_OUTBOUND: u32 = 0x601;
/// Firewall mark of the proxy's sockets that deliver to the pod's own application.
pub const MARK_DELIVERY: u32 = 0x602;
/// Routing table inside a pod's namespace that sends marked packets to the loopback device.
pub const ROUTE_TABLE: u32 = 1500;
/// Priority of the policy rule that sends a mark to [`ROUTE_TABLE`]; the mark's `prohibit` rule stands one behind.
pub const RULE_PRIORITY: u32 = 1500;

/// Port of the proxy's listener in the pod for connections that applications open.
pub const PORT_OUTBOUND: u16 = 15001;
/// Port of the proxy's listener in the pod for plaintext from outside.
pub const PORT_INBOUND_PLAINTEXT: u16 = 15006;
/// Port of the proxy's listener in the pod for HBONE.
pub const PORT_INBOUND_HBONE: u16 = 15008;

/// Key of the outbound listener in [`MAP_SOCKETS`].
pub const SOCKET_OUTBOUND: u32 = 0;
/// Key of the inbound plaintext listener in [`MAP_SOCKETS`].
pub const SOCKET_INBOUND_PLAINTEXT: u32 = 1;
/// Key of the HBONE listener in [`MAP_SOCKETS`].
pub const SOCKET_INBOUND_HBONE: u32 = 2;
/// Entries of [`MAP_SOCKETS`]; some are spare (DNS, IPv6).
pub const SOCKETS_CAPACITY: usize = 8;

/// Program on `cgroup/connect4`: marks new connections of enrolled pods.
pub const PROGRAM_CONNECT4: &str = "connect4";
/// Program on `cgroup/connect6`: the same for IPv4-mapped addresses.
pub const PROGRAM_CONNECT6: &str = "connect6";
/// Program on `sk_lookup`, one instance per pod: steers connections to the proxy's listeners.
pub const PROGRAM_LOOKUP: &str = "lookup";

/// Hash map of the node: network namespace cookie (`u64`) to [`PodEntry`].
pub const MAP_PODS: &str = "PODS";
/// Socket storage of the node: present with a non-zero `u32` on the proxy's own sockets, which are never captured.
pub const MAP_EXEMPT: &str = "EXEMPT";
/// Per-CPU array of the node: `u64` per [`Counter`].
pub const MAP_COUNTERS: &str = "COUNTERS";
/// Socket map of one pod: the proxy's listeners.
pub const MAP_SOCKETS: &str = "SOCKETS";
/// Array of one pod with one [`PodEntry`].
pub const MAP_POD: &str = "POD";
/// Ring buffer of the node with the programs' log records.
pub const MAP_LOGS: &str = "AYA_LOGS";
/// Read-only variable of the programs: which log records are made; 0 removes the code at load time.
pub const GLOBAL_LOG_LEVEL: &str = "AYA_LOG_LEVEL";

/// Pods of one node that can be enrolled.
pub const PODS_CAPACITY: usize = 4096;
/// IPv4 addresses of one pod.
pub const POD_ADDRESSES: usize = 4;

/// What the programs know of an enrolled pod.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodEntry {
    /// The pod's own IPv4 addresses as on the wire (first octet first in memory); 0 is unused.
    pub addresses: [u32; POD_ADDRESSES],
    /// Reserved for exclusions; 0.
    pub flags: u32,
    /// Reserved; 0.
    pub reserved: u32,
}

impl PodEntry {
    /// Bytes of one entry in a map.
    pub const SIZE: usize = size_of::<Self>();

    /// An entry for these addresses (octets in network order). `None` if there are none, or more than
    /// [`POD_ADDRESSES`].
    #[must_use]
    pub fn new(addresses: &[[u8; 4]]) -> Option<Self> {
        if addresses.is_empty() || addresses.len() > POD_ADDRESSES {
            return None;
        }
        let mut entry = Self::default();
        for (slot, address) in entry.addresses.iter_mut().zip(addresses) {
            *slot = u32::from_ne_bytes(*address);
        }
        Some(entry)
    }

    /// Whether an address, as the kernel gives it to the programs, is the pod's own.
    #[inline(always)]
    #[must_use]
    pub fn owns(&self, address: u32) -> bool {
        address != 0
            && (self.addresses[0] == address
                || self.addresses[1] == address
                || self.addresses[2] == address
                || self.addresses[3] == address)
    }

    /// The entry as it lies in a map.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::SIZE] {
        let [a, b, c, d] = self.addresses;
        let mut bytes = [0; Self::SIZE];
        for (chunk, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip([a, b, c, d, self.flags, self.reserved]) {
            *chunk = word.to_ne_bytes();
        }
        bytes
    }

    /// The entry that lies in a map.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let mut words = [0; Self::SIZE / 4];
        for (word, chunk) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_ne_bytes(*chunk);
        }
        let [a, b, c, d, flags, reserved] = words;
        Self { addresses: [a, b, c, d], flags, reserved }
    }
}

/// What the programs count, per CPU, for the whole node. The value is the index in [`MAP_COUNTERS`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Connections of enrolled pods that were marked for the outbound listener.
    Captured = 0,
    /// Connections of enrolled pods that were refused because the socket could not be marked.
    Denied = 1,
    /// Packets from outside steered to a listener of the proxy.
    InboundSteered = 2,
    /// Packets of captured connections steered to the outbound listener.
    OutboundSteered = 3,
    /// Packets dropped because the proxy has no listener for them, or because they addressed one directly.
    Dropped = 4,
}

impl Counter {
    /// All of them, in the order of their index.
    pub const ALL: [Self; 5] =
        [Self::Captured, Self::Denied, Self::InboundSteered, Self::OutboundSteered, Self::Dropped];

    /// Name for metrics and status.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Captured => "captured",
            Self::Denied => "denied",
            Self::InboundSteered => "inbound_steered",
            Self::OutboundSteered => "outbound_steered",
            Self::Dropped => "dropped",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_free_of_padding() {
        assert_eq!(PodEntry::SIZE, 24);
        assert_eq!(align_of::<PodEntry>(), 4);
        assert_eq!(PodEntry::SIZE, POD_ADDRESSES * 4 + 4 + 4);
    }

    #[test]
    fn bytes_round_trip_in_network_order() {
        let entry = PodEntry::new(&[[10, 244, 1, 5], [10, 244, 1, 6]]).unwrap();
        let bytes = entry.to_bytes();
        assert_eq!(bytes[..8], [10, 244, 1, 5, 10, 244, 1, 6]);
        assert_eq!(PodEntry::from_bytes(&bytes), entry);
    }

    #[test]
    fn owns_its_addresses_and_never_the_unused_slot() {
        let entry = PodEntry::new(&[[10, 244, 1, 5]]).unwrap();
        assert!(entry.owns(u32::from_ne_bytes([10, 244, 1, 5])));
        assert!(!entry.owns(u32::from_ne_bytes([10, 244, 1, 6])));
        assert!(!entry.owns(0));
    }

    #[test]
    fn entry_needs_one_to_four_addresses() {
        assert_eq!(PodEntry::new(&[]), None);
        assert_eq!(PodEntry::new(&[[10, 0, 0, 1]; POD_ADDRESSES + 1]), None);
    }

    #[test]
    fn counters_are_indexed_in_order() {
        for (index, counter) in Counter::ALL.into_iter().enumerate() {
            assert_eq!(counter as usize, index);
        }
    }
}
