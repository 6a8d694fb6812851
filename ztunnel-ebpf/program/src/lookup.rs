//! Connections that arrive in a pod's namespace: which of the proxy's listeners gets them.

use aya_ebpf::{bindings::sk_action, macros::sk_lookup, programs::SkLookupContext};
use aya_log_ebpf::debug;
use core::ptr::addr_of;
use ztunnel_ebpf::{
    Counter, FLAG_DNS, FourTuple, PORT_DNS, PORT_INBOUND_HBONE, PORT_INBOUND_PLAINTEXT, PORT_OUTBOUND, PORT_RESOLVER,
    PodEntry, SOCKET_DNS_TCP, SOCKET_DNS_UDP, SOCKET_INBOUND_HBONE, SOCKET_INBOUND_PLAINTEXT, SOCKET_OUTBOUND,
};

use crate::maps::{POD, PROBES, SOCKETS, count, mapped};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_UDP: u32 = 17;
/// Index of `lo` in every namespace.
const LOOPBACK: u32 = 1;

/// What happens to a packet that has no socket of its own yet.
enum Verdict {
    /// The kernel looks for a listener as usual.
    LeaveAlone,
    /// To the listener under this key of the socket map, or nowhere.
    Steer(u32, Counter),
    /// To the listener for DNS, or to the outbound one where there is none for DNS.
    SteerDns,
    Drop,
}

/// What is asked of an address, in either family.
struct Place {
    /// The packet's destination is one of the pod's addresses.
    local_is_own: bool,
    /// The packet's destination is a loopback address.
    local_is_loopback: bool,
    /// The packet comes from one of the pod's addresses.
    remote_is_own: bool,
}

#[sk_lookup]
pub fn lookup(ctx: SkLookupContext) -> u32 {
    let (key, counter) = match decide(&ctx) {
        Verdict::LeaveAlone => return sk_action::SK_PASS,
        Verdict::Drop => {
            count(Counter::Dropped);
            debug!(&ctx, "dropped: addressed to a listener of the proxy");
            return sk_action::SK_DROP;
        }
        Verdict::SteerDns => {
            if SOCKETS.redirect_sk_lookup(&ctx, SOCKET_DNS_TCP, 0).is_ok() {
                count(Counter::DnsSteered);
                return sk_action::SK_PASS;
            }
            (SOCKET_OUTBOUND, Counter::OutboundSteered)
        }
        Verdict::Steer(key, counter) => (key, counter),
    };
    match SOCKETS.redirect_sk_lookup(&ctx, key, 0) {
        Ok(()) => {
            count(counter);
            sk_action::SK_PASS
        }
        Err(code) => {
            // Passing it on could reach the application's own listener.
            count(Counter::Dropped);
            debug!(&ctx, "dropped: no listener {}, error {}", key, code);
            sk_action::SK_DROP
        }
    }
}

#[inline(always)]
fn decide(ctx: &SkLookupContext) -> Verdict {
    // SAFETY: the kernel passes a valid context; each field is read once, by its own width.
    let (family, protocol, port, device) = unsafe {
        (
            addr_of!((*ctx.lookup).family).read_volatile(),
            addr_of!((*ctx.lookup).protocol).read_volatile(),
            addr_of!((*ctx.lookup).local_port).read_volatile(),
            addr_of!((*ctx.lookup).ingress_ifindex).read_volatile(),
        )
    };
    let resolver = port == u32::from(PORT_RESOLVER);
    if (family != AF_INET && family != AF_INET6) || (protocol != IPPROTO_TCP && !(protocol == IPPROTO_UDP && resolver))
    {
        return Verdict::LeaveAlone;
    }
    let Some(pod) = POD.get(0) else {
        return Verdict::Drop;
    };
    let place = if family == AF_INET { place_v4(ctx, pod) } else { place_v6(ctx, pod) };
    // Looped traffic to the pod's own address carries the index of that address's device, not of lo.
    let inside = device == LOOPBACK || place.remote_is_own;
    let elsewhere = !place.local_is_own && !place.local_is_loopback;
    if protocol == IPPROTO_UDP {
        return if inside && elsewhere && pod.has(FLAG_DNS) {
            Verdict::Steer(SOCKET_DNS_UDP, Counter::DnsSteered)
        } else {
            Verdict::LeaveAlone
        };
    }
    if inside {
        return if elsewhere && resolver && pod.has(FLAG_DNS) {
            Verdict::SteerDns
        } else if elsewhere {
            Verdict::Steer(SOCKET_OUTBOUND, Counter::OutboundSteered)
        } else if is_hidden(port) {
            // The transparent listeners are found by address too; what was not steered must not reach them.
            Verdict::Drop
        } else {
            Verdict::LeaveAlone
        };
    }
    if is_probe(ctx, family, port) {
        count(Counter::ProbesPassed);
        return Verdict::LeaveAlone;
    }
    if port == u32::from(PORT_INBOUND_HBONE) {
        // Steered rather than left alone: without the proxy's listener an application's own on that port must not get
        // it.
        return Verdict::Steer(SOCKET_INBOUND_HBONE, Counter::InboundSteered);
    }
    Verdict::Steer(SOCKET_INBOUND_PLAINTEXT, Counter::InboundSteered)
}

/// Ports of listeners that nobody may address by number.
#[inline(always)]
const fn is_hidden(port: u32) -> bool {
    port == PORT_OUTBOUND as u32 || port == PORT_INBOUND_PLAINTEXT as u32 || port == PORT_DNS as u32
}

#[inline(always)]
fn place_v4(ctx: &SkLookupContext, pod: &PodEntry) -> Place {
    // SAFETY: as in `decide`.
    let (local, remote) = unsafe {
        (addr_of!((*ctx.lookup).local_ip4).read_volatile(), addr_of!((*ctx.lookup).remote_ip4).read_volatile())
    };
    Place {
        local_is_own: pod.owns_v4(local),
        local_is_loopback: local.to_ne_bytes()[0] == 127,
        remote_is_own: pod.owns_v4(remote),
    }
}

#[inline(always)]
fn place_v6(ctx: &SkLookupContext, pod: &PodEntry) -> Place {
    let (local, remote) = addresses_v6(ctx);
    Place {
        local_is_own: pod.owns_v6(local),
        local_is_loopback: local[0] | local[1] | local[2] == 0 && local[3] == 1_u32.to_be(),
        remote_is_own: pod.owns_v6(remote),
    }
}

/// Local and remote address. Volatile, or LLVM joins neighbouring loads and the verifier refuses them.
#[inline(always)]
fn addresses_v6(ctx: &SkLookupContext) -> ([u32; 4], [u32; 4]) {
    // SAFETY: as in `decide`.
    unsafe {
        (
            [
                addr_of!((*ctx.lookup).local_ip6[0]).read_volatile(),
                addr_of!((*ctx.lookup).local_ip6[1]).read_volatile(),
                addr_of!((*ctx.lookup).local_ip6[2]).read_volatile(),
                addr_of!((*ctx.lookup).local_ip6[3]).read_volatile(),
            ],
            [
                addr_of!((*ctx.lookup).remote_ip6[0]).read_volatile(),
                addr_of!((*ctx.lookup).remote_ip6[1]).read_volatile(),
                addr_of!((*ctx.lookup).remote_ip6[2]).read_volatile(),
                addr_of!((*ctx.lookup).remote_ip6[3]).read_volatile(),
            ],
        )
    }
}

/// Whether the kubelet opened this connection. Only for packets from outside.
#[inline(always)]
fn is_probe(ctx: &SkLookupContext, family: u32, port: u32) -> bool {
    let (destination, source) = if family == AF_INET {
        // SAFETY: as in `decide`.
        unsafe {
            (
                mapped(addr_of!((*ctx.lookup).local_ip4).read_volatile()),
                mapped(addr_of!((*ctx.lookup).remote_ip4).read_volatile()),
            )
        }
    } else {
        addresses_v6(ctx)
    };
    // SAFETY: as in `decide`; this port is in network order.
    let source_port = u16::from_be(unsafe { addr_of!((*ctx.lookup).remote_port).read_volatile() });
    let tuple = FourTuple { source, destination, source_port, destination_port: port as u16 };
    PROBES.get_ptr(tuple).is_some()
}
