//! The pod's edge: TCP that did not come from the proxy does not leave.

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_hdr_start_off::BPF_HDR_START_NET, bpf_sock},
    helpers::generated::{
        bpf_get_listener_sock, bpf_get_socket_cookie, bpf_sk_fullsock, bpf_skb_load_bytes_relative, bpf_skb_pull_data,
    },
    macros::classifier,
    programs::TcContext,
};
use aya_log_ebpf::debug;
use core::mem::MaybeUninit;
use core::ptr::addr_of;
use ztunnel_ebpf::{Counter, FLAG_DENY_OLDER, FLAG_DISARMED, FourTuple, mapped};

use crate::maps::{EXEMPT, OLDER, POD, PROBES, count};

/// The packet goes on to whatever else looks at it.
const PASS: i32 = TC_ACT_UNSPEC;
const DROP: i32 = TC_ACT_SHOT as i32;

const ETH_P_IP: u32 = 0x0800_u16.to_be() as u32;
const ETH_P_IPV6: u32 = 0x86dd_u16.to_be() as u32;
/// Frames that carry IP behind another header: a VLAN tag, two of them, an MPLS label, PPPoE.
const WRAPPED: [u32; 5] = [
    0x8100_u16.to_be() as u32,
    0x88a8_u16.to_be() as u32,
    0x8847_u16.to_be() as u32,
    0x8848_u16.to_be() as u32,
    0x8864_u16.to_be() as u32,
];

const SOCK_STREAM: u32 = 1;
const TCP: u8 = 6;
/// Extension headers of IPv6.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
const MOBILITY: u8 = 135;
const HIP: u8 = 139;
const SHIM6: u8 = 140;
/// More extension headers than this are no honest packet.
const MAX_EXTENSIONS: usize = 6;

/// Bytes in which the headers of an honest packet lie.
const MAX_HEADERS: u32 = 256;

const FLAG_FIN: u8 = 1;
const FLAG_SYN: u8 = 2;
const FLAG_ACK: u8 = 16;

/// What a packet is.
enum Packet {
    /// Not TCP: none of the guard's business.
    Other,
    /// A TCP segment.
    Segment(Segment),
    /// Part of a TCP segment without its header, or something that cannot be read: TCP for all that is known.
    Unclear,
}

/// A TCP segment, seen from its receiver's end, as the key of the kubelet's connections is.
struct Segment {
    reverse: FourTuple,
    flags: u8,
    payload: bool,
}

/// Whose a packet is.
enum Owner {
    /// The proxy's.
    Proxy,
    /// A TCP socket of an application.
    Application,
    /// No socket, one that is no full socket any more or not yet, or one that is not TCP's: the kernel's own answers
    /// come from a raw socket.
    Other,
}

#[classifier]
pub fn guard(ctx: TcContext) -> i32 {
    let owner = owner(&ctx);
    if let Owner::Proxy = owner {
        return PASS;
    }
    let segment = match read(&ctx) {
        Packet::Other => return PASS,
        Packet::Unclear => return refuse(&ctx),
        Packet::Segment(segment) => segment,
    };
    if !matters(&owner, &segment) || PROBES.get_ptr(&segment.reverse).is_some() {
        return PASS;
    }
    // SAFETY: helper call with the program's own context; 0 without a socket.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.skb.skb.cast()) };
    if cookie != 0 && OLDER.get_ptr(cookie).is_some() && !POD.get(0).is_none_or(|pod| pod.has(FLAG_DENY_OLDER)) {
        count(Counter::OlderPassed);
        return PASS;
    }
    refuse(&ctx)
}

#[inline(always)]
fn refuse(ctx: &TcContext) -> i32 {
    if POD.get(0).is_some_and(|pod| pod.has(FLAG_DISARMED)) {
        return PASS;
    }
    count(Counter::GuardDropped);
    debug!(ctx, "dropped at the edge: {} bytes", ctx.len());
    DROP
}

/// Asks the packet's socket. The proxy's are told by it alone, without a look at the packet.
#[inline(always)]
fn owner(ctx: &TcContext) -> Owner {
    // SAFETY: the kernel passes a valid context; the field is read once, by its own width.
    let socket = unsafe { addr_of!((*ctx.skb.skb).__bindgen_anon_2.sk).read_volatile() };
    if socket.is_null() {
        return Owner::Other;
    }
    // SAFETY: the socket is the packet's, and is not null.
    let full = unsafe { bpf_sk_fullsock(socket) };
    if !full.is_null() {
        // SAFETY: a full socket that the packet holds.
        let (exempt, kind) = unsafe { (EXEMPT.holds(full), addr_of!((*full).type_).read_volatile()) };
        return match (exempt, kind) {
            (true, _) => Owner::Proxy,
            (false, SOCK_STREAM) => Owner::Application,
            (false, _) => Owner::Other,
        };
    }
    // A connection that is being accepted: what the listener is, it is.
    // SAFETY: as above; the helper takes sockets that are not full.
    let listener: *mut bpf_sock = unsafe { bpf_get_listener_sock(socket) };
    // SAFETY: null or a full socket.
    if !listener.is_null() {
        if unsafe { EXEMPT.holds(listener) } { Owner::Proxy } else { Owner::Application }
    } else {
        Owner::Other
    }
}

/// Whether a segment that is not the proxy's says anything, or opens anything. An answer to a connection that has no
/// request yet (SYN cookies) opens nothing by itself.
#[inline(always)]
fn matters(owner: &Owner, segment: &Segment) -> bool {
    match owner {
        Owner::Application | Owner::Proxy => true,
        Owner::Other => {
            let opens =
                segment.flags & FLAG_SYN != 0 && (segment.flags & FLAG_ACK == 0 || segment.flags & FLAG_FIN != 0);
            opens || segment.payload
        }
    }
}

#[inline(always)]
fn read(ctx: &TcContext) -> Packet {
    // SAFETY: the kernel passes a valid context; the field is read once, by its own width.
    let protocol = unsafe { addr_of!((*ctx.skb.skb).protocol).read_volatile() };
    if WRAPPED.contains(&protocol) {
        return Packet::Unclear;
    }
    // At the pod's end a packet socket may say any protocol of its frame: the version tells.
    match load::<1>(ctx, 0).map(|header| header[0] >> 4) {
        Some(4) => read_v4(ctx),
        Some(6) => read_v6(ctx),
        _ if protocol == ETH_P_IP || protocol == ETH_P_IPV6 => Packet::Unclear,
        _ => Packet::Other,
    }
}

#[inline(always)]
fn read_v4(ctx: &TcContext) -> Packet {
    let Some(header) = load::<20>(ctx, 0) else { return Packet::Unclear };
    if header[9] != TCP {
        return Packet::Other;
    }
    let length = u32::from(header[0] & 0xf) * 4;
    // A fragment, be it the first, or lengths that make no sense.
    if length < 20 || (header[6] & 0x3f | header[7]) != 0 {
        return Packet::Unclear;
    }
    let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    // 0 is a packet too long for the field.
    let end = match u32::from(u16::from_be_bytes([header[2], header[3]])) {
        0 => u32::MAX,
        total => total,
    };
    segment(ctx, length, end, mapped(word(16)), mapped(word(12)))
}

#[inline(always)]
fn read_v6(ctx: &TcContext) -> Packet {
    let Some(header) = load::<40>(ctx, 0) else { return Packet::Unclear };
    let end = match u32::from(u16::from_be_bytes([header[4], header[5]])) {
        0 => u32::MAX,
        behind => 40 + behind,
    };
    let mut next = header[6];
    let mut offset = 40_u32;
    for _ in 0..MAX_EXTENSIONS {
        match next {
            TCP => {
                let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
                let address = |at: usize| [word(at), word(at + 4), word(at + 8), word(at + 12)];
                return segment(ctx, offset, end, address(24), address(8));
            }
            HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION | MOBILITY | HIP | SHIM6 => {}
            _ => return Packet::Other,
        }
        let Some(extension) = load::<4>(ctx, offset) else { return Packet::Unclear };
        if next == FRAGMENT && (extension[2] | extension[3] & 0xf9) != 0 {
            // What follows counts in the first fragment alone, so what could be TCP is stopped there: the others may say
            // what they like. Headers behind this one may go on in another fragment. Linux does not fragment its own TCP.
            return match extension[0] {
                TCP | HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION | MOBILITY | HIP | SHIM6 => {
                    Packet::Unclear
                }
                _ => Packet::Other,
            };
        }
        offset += match next {
            FRAGMENT => 8,
            AUTHENTICATION => (u32::from(extension[1]) + 2) * 4,
            _ => (u32::from(extension[1]) + 1) * 8,
        };
        next = extension[0];
    }
    Packet::Unclear
}

/// Reads the TCP header at an offset from the IP header, in a packet that ends at another. `source` and `destination` are
/// those of the way back.
#[inline(always)]
fn segment(ctx: &TcContext, offset: u32, end: u32, source: [u32; 4], destination: [u32; 4]) -> Packet {
    let Some(header) = load::<14>(ctx, offset) else { return Packet::Unclear };
    let length = u32::from(header[12] >> 4) * 4;
    if length < 20 || end < offset + length {
        return Packet::Unclear;
    }
    let payload = end > offset + length;
    let reverse = FourTuple {
        source,
        destination,
        source_port: u16::from_be_bytes([header[2], header[3]]),
        destination_port: u16::from_be_bytes([header[0], header[1]]),
    };
    Packet::Segment(Segment { reverse, flags: header[13], payload })
}

/// Bytes of the packet, counted from its IP header.
#[inline(always)]
fn load<const LENGTH: usize>(ctx: &TcContext, offset: u32) -> Option<[u8; LENGTH]> {
    let mut bytes = MaybeUninit::<[u8; LENGTH]>::uninit();
    let skb = ctx.skb.skb.cast();
    // SAFETY: the helper writes LENGTH bytes, or fails.
    let mut read = || unsafe {
        bpf_skb_load_bytes_relative(skb, offset, bytes.as_mut_ptr().cast(), LENGTH as u32, BPF_HDR_START_NET)
    };
    if read() != 0 {
        // The helper reads what lies in one piece only.
        // SAFETY: helper call with the program's own context; no pointer into the packet is held.
        if unsafe { bpf_skb_pull_data(ctx.skb.skb, ctx.len().min(MAX_HEADERS)) } != 0 || read() != 0 {
            return None;
        }
    }
    // SAFETY: the helper filled it.
    Some(unsafe { bytes.assume_init() })
}
