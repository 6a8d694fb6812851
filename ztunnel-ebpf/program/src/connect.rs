//! Connections that applications open: which are captured, and the mark that captures them.

use aya_ebpf::{
    EbpfContext as _,
    btf_maps::lpm_trie::Key,
    helpers::{bpf_get_netns_cookie, bpf_setsockopt},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use aya_log_ebpf::debug;
use core::ptr::addr_of;
use ztunnel_ebpf::{Counter, MARK_OUTBOUND, PodEntry, RouteKey, is_loopback, is_mapped, mapped};

use crate::maps::{EXEMPT, PODS, ROUTES, count};

/// The connection goes on.
const ALLOW: i32 = 1;
/// `connect` fails with EPERM.
const DENY: i32 = 0;

const SOCK_STREAM: u32 = 1;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_MPTCP: u32 = 262;
const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;
const SO_MARK: i32 = 36;

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the kernel passes a valid context; the field is read once, by its own width.
    let destination = unsafe { addr_of!((*ctx.sock_addr).user_ip4).read_volatile() };
    decide(&ctx, mapped(destination))
}

/// An IPv6 socket that connects to an IPv4-mapped address makes an IPv4 connection without passing `connect4`.
#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    let address = ctx.sock_addr;
    // SAFETY: as above; volatile, or LLVM joins neighbouring loads and the verifier refuses them.
    let destination = unsafe {
        [
            addr_of!((*address).user_ip6[0]).read_volatile(),
            addr_of!((*address).user_ip6[1]).read_volatile(),
            addr_of!((*address).user_ip6[2]).read_volatile(),
            addr_of!((*address).user_ip6[3]).read_volatile(),
        ]
    };
    decide(&ctx, destination)
}

/// `destination` is in network order, IPv4 as mapped.
#[inline(always)]
fn decide(ctx: &SockAddrContext, destination: [u32; 4]) -> i32 {
    // SAFETY: the kernel passes a valid context.
    let (kind, protocol) = unsafe {
        (addr_of!((*ctx.sock_addr).type_).read_volatile(), addr_of!((*ctx.sock_addr).protocol).read_volatile())
    };
    if kind != SOCK_STREAM || (protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP) {
        return ALLOW;
    }
    // SAFETY: helper call with the program's own context.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: the entry is only read; the agent replaces entries whole.
    let Some(pod) = (unsafe { PODS.get(cookie) }) else {
        return ALLOW;
    };
    // SAFETY: the context of this hook always has its socket, and holds it.
    let exempt = unsafe { EXEMPT.holds((*ctx.sock_addr).__bindgen_anon_1.sk) };
    if exempt || stays_inside(pod, &destination) || !leaves_by_own_interface(cookie, destination) {
        return ALLOW;
    }
    if protocol == IPPROTO_MPTCP {
        // The hook sees the first subflow, which is plain TCP to it. A kernel that shows the whole connection instead
        // would not pass the mark on to subflows: refused rather than sent in clear.
        count(Counter::Denied);
        return DENY;
    }
    match capture(ctx) {
        Ok(()) => {
            count(Counter::Captured);
            if is_mapped(&destination) {
                debug!(ctx, "captured: to {:i}, namespace {}", u32::from_be(destination[3]), cookie);
            } else {
                debug!(ctx, "captured: to {:i}, namespace {}", octets(destination), cookie);
            }
            ALLOW
        }
        Err(code) => {
            count(Counter::Denied);
            debug!(ctx, "refused: to {:i}, namespace {}, error {}", octets(destination), cookie, code);
            DENY
        }
    }
}

/// Loopback and the pod's own addresses. An unspecified address stands for loopback.
#[inline(always)]
fn stays_inside(pod: &PodEntry, destination: &[u32; 4]) -> bool {
    let head = destination[0] | destination[1] | destination[2];
    let unspecified = destination[3] == 0 && (head == 0 || is_mapped(destination));
    unspecified || is_loopback(destination) || pod.owns(destination)
}

/// What has no route, or leaves by another interface than the pod's own, is none of the mesh's business.
#[inline(always)]
fn leaves_by_own_interface(cookie: u64, address: [u32; 4]) -> bool {
    ROUTES.get(&Key::new(RouteKey::FULL, RouteKey { cookie, address })).is_some_and(|captured| *captured != 0)
}

#[inline(always)]
fn octets(address: [u32; 4]) -> [u8; 16] {
    // SAFETY: both are sixteen bytes without padding, and any bytes are octets.
    unsafe { core::mem::transmute(address) }
}

/// Marks the socket and frees it from its device: with a device the kernel would not choose the route of the mark.
#[inline(always)]
fn capture(ctx: &SockAddrContext) -> Result<(), i64> {
    let mut mark = MARK_OUTBOUND;
    set_option(ctx, SO_MARK, &mut mark)?;
    // SAFETY: the context of this hook always has its socket.
    let bound = unsafe {
        let socket = (*ctx.sock_addr).__bindgen_anon_1.sk;
        !socket.is_null() && (*socket).bound_dev_if != 0
    };
    if bound {
        let mut no_device = 0_u32;
        set_option(ctx, SO_BINDTODEVICE, &mut no_device)?;
    }
    Ok(())
}

#[inline(always)]
fn set_option(ctx: &SockAddrContext, option: i32, value: &mut u32) -> Result<(), i64> {
    // SAFETY: the kernel reads four bytes from the stack.
    match unsafe { bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, option, core::ptr::from_mut(value).cast(), 4) } {
        0 => Ok(()),
        code => Err(code),
    }
}
