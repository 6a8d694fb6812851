//! What the eBPF programs and the agent must agree on: names of maps and programs, their layout, marks and ports.
//!
//! The programs themselves are in `program/`, a package of its own, because they are built for another target with
//! their own lock file. Structures are free of padding and cross the boundary as bytes, so that user space needs no
//! `unsafe`. Addresses are words as the kernel gives them to programs: network order in memory. Where one kind of
//! address stands for both families, IPv4 is written as IPv4-mapped IPv6.
#![no_std]
#![forbid(unsafe_code)]

mod counter;
mod pod;
mod steering;
mod tuple;

pub use counter::Counter;
pub use pod::{FLAG_DENY_OLDER, FLAG_DISARMED, FLAG_DNS, POD_ADDRESSES, PodEntry};
pub use steering::{Arrival, LOOPBACK, Protocol, Steering, steer};
pub use tuple::{FourTuple, ROUTE_PREFIX_BITS, RouteKey, is_loopback, is_mapped, mapped, words};

/// Version of everything that is pinned: maps, their layout, names. Part of the path in bpffs.
pub const LAYOUT_VERSION: u32 = 3;

/// Firewall mark of sockets whose connection is captured on its way out of a pod. All 32 bits are compared.
pub const MARK_OUTBOUND: u32 = 0x601;
/// Firewall mark of the proxy's sockets that deliver to the pod's own application.
pub const MARK_DELIVERY: u32 = 0x602;
/// Firewall mark of the proxy's sockets that ask a resolver: they are routed as if there were no capture.
pub const MARK_DNS: u32 = 0x603;
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
/// Port of the proxy's listeners in the pod for DNS, UDP and TCP.
pub const PORT_DNS: u16 = 15053;
/// Port of the resolvers that applications ask.
pub const PORT_RESOLVER: u16 = 53;

/// Key of the outbound listener in [`MAP_SOCKETS`].
pub const SOCKET_OUTBOUND: u32 = 0;
/// Key of the inbound plaintext listener in [`MAP_SOCKETS`].
pub const SOCKET_INBOUND_PLAINTEXT: u32 = 1;
/// Key of the HBONE listener in [`MAP_SOCKETS`].
pub const SOCKET_INBOUND_HBONE: u32 = 2;
/// Key of the UDP socket for DNS in [`MAP_SOCKETS`].
pub const SOCKET_DNS_UDP: u32 = 3;
/// Key of the TCP listener for DNS in [`MAP_SOCKETS`].
pub const SOCKET_DNS_TCP: u32 = 4;
/// Added to a key of [`MAP_SOCKETS`]: the listener for IPv6 alone, beside one that serves only IPv4. There is none where the
/// listener is a dual-stack socket, as all are that agents open now.
pub const SOCKET_V6: u32 = 8;
/// Entries of [`MAP_SOCKETS`]; some are spare.
pub const SOCKETS_CAPACITY: usize = 16;

/// Program on `cgroup/connect4`: marks new connections of enrolled pods.
pub const PROGRAM_CONNECT4: &str = "connect4";
/// Program on `cgroup/connect6`: the same for IPv6 and for IPv4-mapped addresses.
pub const PROGRAM_CONNECT6: &str = "connect6";
/// Program on `sk_lookup`, one instance per pod: steers connections to the proxy's listeners.
pub const PROGRAM_LOOKUP: &str = "lookup";
/// Traffic classifier at the pod's edge, one instance per pod: drops TCP that is not the proxy's.
pub const PROGRAM_GUARD: &str = "guard";
/// Program on `sock_ops` of the kubelet's cgroup: notes its connections, which are left alone.
pub const PROGRAM_PROBES: &str = "probes";

/// Hash map of the node: network namespace cookie (`u64`) to [`PodEntry`].
pub const MAP_PODS: &str = "PODS";
/// Trie of the node by [`RouteKey`]: a `u32` that is 1 where the destination leaves the pod through its own interface
/// and is therefore captured. What is not found, or 0, is left alone.
pub const MAP_ROUTES: &str = "ROUTES";
/// Socket storage of the node: present with a non-zero `u32` on the proxy's own sockets, which are never captured and
/// pass the guard. Connections that a listener accepts inherit it.
pub const MAP_EXEMPT: &str = "EXEMPT";
/// Hash map of the node by [`FourTuple`]: connections of the kubelet, which are left alone. The source is the kubelet.
pub const MAP_PROBES: &str = "PROBES";
/// Per-CPU array of the node: `u64` per [`Counter`].
pub const MAP_COUNTERS: &str = "COUNTERS";
/// Socket map of one pod: the proxy's listeners. User space reads their cookies (`u64`) and writes descriptors.
pub const MAP_SOCKETS: &str = "SOCKETS";
/// Array of one pod with one [`PodEntry`].
pub const MAP_POD: &str = "POD";
/// Hash map of one pod: cookies (`u64`) of the sockets that were connected before the pod was enrolled.
pub const MAP_OLDER: &str = "OLDER";
/// Ring buffer of the node with the programs' log records.
pub const MAP_LOGS: &str = "AYA_LOGS";
/// Read-only variable of the programs: which log records are made; 0 removes the code at load time.
pub const GLOBAL_LOG_LEVEL: &str = "AYA_LOG_LEVEL";

/// Pods of one node that can be enrolled.
pub const PODS_CAPACITY: usize = 4096;
/// Routes of all pods of one node.
pub const ROUTES_CAPACITY: usize = 65536;
/// Connections of the kubelet that are known at once; beyond it the one that was used least lately is forgotten.
pub const PROBES_CAPACITY: usize = 16384;
/// Most connections older than the enrolment that are known of one pod; further ones are cut.
pub const OLDER_CAPACITY: usize = 65536;
