//! Connections that arrive in a pod's namespace: which of the proxy's listeners gets them.

use aya_ebpf::{bindings::sk_action, macros::sk_lookup, programs::SkLookupContext};
use aya_log_ebpf::debug;
use core::ptr::addr_of;
use ztunnel_ebpf::{
    Counter, PORT_INBOUND_HBONE, PORT_INBOUND_PLAINTEXT, PORT_OUTBOUND, SOCKET_INBOUND_HBONE, SOCKET_INBOUND_PLAINTEXT,
    SOCKET_OUTBOUND,
};

use crate::maps::{POD, SOCKETS, count};

const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;
/// Index of `lo` in every namespace.
const LOOPBACK: u32 = 1;

/// What happens to a packet that has no socket of its own yet.
enum Verdict {
    /// The kernel looks for a listener as usual.
    LeaveAlone,
    /// To the listener under this key of the socket map, or nowhere.
    Steer(u32, Counter),
    Drop,
}

#[sk_lookup]
pub fn lookup(ctx: SkLookupContext) -> u32 {
    match decide(&ctx) {
        Verdict::LeaveAlone => sk_action::SK_PASS,
        Verdict::Steer(key, counter) => match SOCKETS.redirect_sk_lookup(&ctx, key, 0) {
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
        },
        Verdict::Drop => {
            count(Counter::Dropped);
            debug!(&ctx, "dropped: addressed to a listener of the proxy");
            sk_action::SK_DROP
        }
    }
}

#[inline(always)]
fn decide(ctx: &SkLookupContext) -> Verdict {
    // SAFETY: the kernel passes a valid context; each field is read once, by its own width.
    let (family, protocol, local, remote, port, device) = unsafe {
        (
            addr_of!((*ctx.lookup).family).read_volatile(),
            addr_of!((*ctx.lookup).protocol).read_volatile(),
            addr_of!((*ctx.lookup).local_ip4).read_volatile(),
            addr_of!((*ctx.lookup).remote_ip4).read_volatile(),
            addr_of!((*ctx.lookup).local_port).read_volatile(),
            addr_of!((*ctx.lookup).ingress_ifindex).read_volatile(),
        )
    };
    if family != AF_INET || protocol != IPPROTO_TCP {
        return Verdict::LeaveAlone;
    }
    let Some(pod) = POD.get(0) else {
        return Verdict::Drop;
    };
    // Looped traffic to the pod's own address carries the index of that address's device, not of lo.
    if device == LOOPBACK || pod.owns(remote) {
        return if !pod.owns(local) && local.to_ne_bytes()[0] != 127 {
            Verdict::Steer(SOCKET_OUTBOUND, Counter::OutboundSteered)
        } else if port == u32::from(PORT_OUTBOUND) || port == u32::from(PORT_INBOUND_PLAINTEXT) {
            // The transparent listeners are found by address too; what was not steered must not reach them.
            Verdict::Drop
        } else {
            Verdict::LeaveAlone
        };
    }
    if port == u32::from(PORT_INBOUND_HBONE) {
        // Steered rather than left alone: without the proxy's listener an application's own on that port must not get
        // it.
        return Verdict::Steer(SOCKET_INBOUND_HBONE, Counter::InboundSteered);
    }
    Verdict::Steer(SOCKET_INBOUND_PLAINTEXT, Counter::InboundSteered)
}
