//! Connections that arrive in a pod's namespace: which of the proxy's listeners gets them.

use aya_ebpf::{bindings::sk_action, macros::sk_lookup, programs::SkLookupContext};
use aya_log_ebpf::debug;
use core::ptr::addr_of;
use ztunnel_ebpf::{
    Counter, FLAG_DNS, FourTuple, PORT_DNS, PORT_INBOUND_HBONE, PORT_INBOUND_PLAINTEXT, PORT_OUTBOUND, PORT_RESOLVER,
    PodEntry, SOCKET_DNS_TCP, SOCKET_DNS_UDP, SOCKET_INBOUND_HBONE, SOCKET_INBOUND_PLAINTEXT, SOCKET_OUTBOUND,
};

use crate::maps::{POD, PROBES, SOCKETS, count, is_mapped, mapped};

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

/// A packet that has no socket of its own yet.
struct Packet {
    protocol: u32,
    device: u32,
    /// Destination and source, IPv4 as mapped.
    tuple: FourTuple,
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
    let Some(packet) = read(ctx) else {
        return Verdict::LeaveAlone;
    };
    let port = packet.tuple.destination_port;
    let resolver = port == PORT_RESOLVER;
    if packet.protocol != IPPROTO_TCP && !(packet.protocol == IPPROTO_UDP && resolver) {
        return Verdict::LeaveAlone;
    }
    let Some(pod) = POD.get(0) else {
        return Verdict::Drop;
    };
    let (local, remote) = (&packet.tuple.destination, &packet.tuple.source);
    // Looped traffic to the pod's own address carries the index of that address's device, not of lo.
    let inside = packet.device == LOOPBACK || owns(pod, remote);
    let elsewhere = !owns(pod, local) && !is_loopback(local);
    if packet.protocol == IPPROTO_UDP {
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
        } else if matches!(port, PORT_OUTBOUND | PORT_INBOUND_PLAINTEXT | PORT_DNS) {
            // The transparent listeners are found by address too; what was not steered must not reach them.
            Verdict::Drop
        } else {
            Verdict::LeaveAlone
        };
    }
    if PROBES.get_ptr(packet.tuple).is_some() {
        count(Counter::ProbesPassed);
        return Verdict::LeaveAlone;
    }
    if port == PORT_INBOUND_HBONE {
        // Steered rather than left alone: without the proxy's listener an application's own on that port must not get
        // it.
        return Verdict::Steer(SOCKET_INBOUND_HBONE, Counter::InboundSteered);
    }
    Verdict::Steer(SOCKET_INBOUND_PLAINTEXT, Counter::InboundSteered)
}

#[inline(always)]
fn owns(pod: &PodEntry, address: &[u32; 4]) -> bool {
    if is_mapped(address) { pod.owns_v4(address[3]) } else { pod.owns_v6(*address) }
}

#[inline(always)]
fn is_loopback(address: &[u32; 4]) -> bool {
    if is_mapped(address) {
        address[3].to_ne_bytes()[0] == 127
    } else {
        address[0] | address[1] | address[2] == 0 && address[3] == 1_u32.to_be()
    }
}

/// `None`: neither IPv4 nor IPv6.
///
/// All fields are read whatever the family (those of the other are 0), and volatile: else LLVM joins loads and the verifier
/// refuses them.
#[inline(always)]
fn read(ctx: &SkLookupContext) -> Option<Packet> {
    let lookup = ctx.lookup;
    // SAFETY: the kernel passes a valid context; each field is read once, by its own width.
    unsafe {
        let family = addr_of!((*lookup).family).read_volatile();
        let protocol = addr_of!((*lookup).protocol).read_volatile();
        let port = addr_of!((*lookup).local_port).read_volatile();
        let remote_port = addr_of!((*lookup).remote_port).read_volatile();
        let device = addr_of!((*lookup).ingress_ifindex).read_volatile();
        let local_v4 = addr_of!((*lookup).local_ip4).read_volatile();
        let remote_v4 = addr_of!((*lookup).remote_ip4).read_volatile();
        let local_v6 = [
            addr_of!((*lookup).local_ip6[0]).read_volatile(),
            addr_of!((*lookup).local_ip6[1]).read_volatile(),
            addr_of!((*lookup).local_ip6[2]).read_volatile(),
            addr_of!((*lookup).local_ip6[3]).read_volatile(),
        ];
        let remote_v6 = [
            addr_of!((*lookup).remote_ip6[0]).read_volatile(),
            addr_of!((*lookup).remote_ip6[1]).read_volatile(),
            addr_of!((*lookup).remote_ip6[2]).read_volatile(),
            addr_of!((*lookup).remote_ip6[3]).read_volatile(),
        ];
        let (destination, source) = match family {
            AF_INET => (mapped(local_v4), mapped(remote_v4)),
            AF_INET6 => (local_v6, remote_v6),
            _ => return None,
        };
        let tuple =
            FourTuple { source, destination, source_port: u16::from_be(remote_port), destination_port: port as u16 };
        Some(Packet { protocol, device, tuple })
    }
}
