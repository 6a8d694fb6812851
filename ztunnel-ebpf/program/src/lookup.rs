//! Connections that arrive in a pod's namespace: which of the proxy's listeners gets them.

use aya_ebpf::{bindings::sk_action, macros::sk_lookup, programs::SkLookupContext};
use aya_log_ebpf::debug;
use core::ptr::addr_of;
use ztunnel_ebpf::{
    Arrival, Counter, FourTuple, PORT_INBOUND_HBONE, Protocol, SOCKET_DNS_TCP, SOCKET_DNS_UDP, SOCKET_INBOUND_HBONE,
    SOCKET_INBOUND_PLAINTEXT, SOCKET_OUTBOUND, SOCKET_V6, Steering, is_mapped, mapped, steer,
};

use crate::maps::{POD, PROBES, SOCKETS, count};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_UDP: u32 = 17;

#[sk_lookup]
pub fn lookup(ctx: SkLookupContext) -> u32 {
    let Some(arrival) = read(&ctx) else {
        return sk_action::SK_PASS;
    };
    let steering = POD.get(0).map_or(Steering::Drop, |pod| steer(pod, &arrival));
    match steering {
        Steering::LeaveAlone => sk_action::SK_PASS,
        Steering::Drop => {
            count(Counter::Dropped);
            debug!(&ctx, "dropped: addressed to a listener of the proxy");
            sk_action::SK_DROP
        }
        Steering::Outbound => give(&ctx, &arrival, SOCKET_OUTBOUND, Counter::OutboundSteered),
        Steering::Dns if arrival.protocol == Protocol::Udp => give(&ctx, &arrival, SOCKET_DNS_UDP, Counter::DnsSteered),
        Steering::Dns if assign(&ctx, &arrival, SOCKET_DNS_TCP).is_ok() => {
            count(Counter::DnsSteered);
            sk_action::SK_PASS
        }
        Steering::Dns => give(&ctx, &arrival, SOCKET_OUTBOUND, Counter::OutboundSteered),
        Steering::Inbound if PROBES.get_ptr(arrival.tuple).is_some() => {
            count(Counter::ProbesPassed);
            sk_action::SK_PASS
        }
        // Steered rather than left alone: without the proxy's listener an application's own on that port must not get it.
        Steering::Inbound if arrival.tuple.destination_port == PORT_INBOUND_HBONE => {
            give(&ctx, &arrival, SOCKET_INBOUND_HBONE, Counter::InboundSteered)
        }
        Steering::Inbound => give(&ctx, &arrival, SOCKET_INBOUND_PLAINTEXT, Counter::InboundSteered),
    }
}

/// To the listener under this key of the socket map, or to nobody.
#[inline(always)]
fn give(ctx: &SkLookupContext, arrival: &Arrival, key: u32, counter: Counter) -> u32 {
    match assign(ctx, arrival, key) {
        Ok(()) => {
            count(counter);
            sk_action::SK_PASS
        }
        Err(code) => {
            // Passing it on could reach the application's own listener.
            count(Counter::Dropped);
            debug!(ctx, "dropped: no listener {}, error {}", key, code);
            sk_action::SK_DROP
        }
    }
}

/// A listener serves both families, or there is one for IPv6 alone beside it.
#[inline(always)]
fn assign(ctx: &SkLookupContext, arrival: &Arrival, key: u32) -> Result<(), i64> {
    if !is_mapped(&arrival.tuple.destination) && SOCKETS.give(ctx, key + SOCKET_V6).is_ok() {
        return Ok(());
    }
    SOCKETS.give(ctx, key)
}

/// `None`: neither TCP nor UDP, of neither IPv4 nor IPv6.
///
/// All fields are read whatever the family (those of the other are 0), and volatile: else LLVM joins loads and the verifier
/// refuses them.
#[inline(always)]
fn read(ctx: &SkLookupContext) -> Option<Arrival> {
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
        let protocol = match protocol {
            IPPROTO_TCP => Protocol::Tcp,
            IPPROTO_UDP => Protocol::Udp,
            _ => return None,
        };
        let (destination, source) = match family {
            AF_INET => (mapped(local_v4), mapped(remote_v4)),
            AF_INET6 => (local_v6, remote_v6),
            _ => return None,
        };
        let tuple =
            FourTuple { source, destination, source_port: u16::from_be(remote_port), destination_port: port as u16 };
        Some(Arrival { protocol, device, tuple })
    }
}
