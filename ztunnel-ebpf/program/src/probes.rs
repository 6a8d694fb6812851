//! The kubelet's connections: noted before their first packet leaves, forgotten when they end.

use aya_ebpf::{bindings::BPF_SOCK_OPS_STATE_CB_FLAG, macros::sock_ops, programs::SockOpsContext};
use aya_log_ebpf::debug;
use core::ptr::addr_of;
use ztunnel_ebpf::{FourTuple, mapped};

use crate::maps::PROBES;

/// `BPF_SOCK_OPS_TCP_CONNECT_CB`: a connection is about to be opened.
const CONNECT: u32 = 3;
/// `BPF_SOCK_OPS_STATE_CB`: a connection changes its state, from the first argument to the second.
const STATE: u32 = 10;
const TCP_CLOSE: u32 = 7;

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

#[sock_ops]
pub fn probes(ctx: SockOpsContext) -> u32 {
    // SAFETY: the kernel passes a valid context; each field is read once, by its own width.
    let (operation, family) =
        unsafe { (addr_of!((*ctx.ops).op).read_volatile(), addr_of!((*ctx.ops).family).read_volatile()) };
    if operation != CONNECT && operation != STATE || family != AF_INET && family != AF_INET6 {
        return 0;
    }
    let tuple = tuple(&ctx, family);
    if operation == STATE {
        // SAFETY: as above; this operation has two arguments.
        let state = unsafe { addr_of!((*ctx.ops).__bindgen_anon_1.args[1]).read_volatile() };
        if state == TCP_CLOSE {
            let _ = PROBES.remove(tuple);
        }
        return 0;
    }
    // A full map forgets what was used least lately.
    let noted = PROBES.insert(tuple, 1, 0);
    let _ = ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32);
    debug!(
        &ctx,
        "kubelet: port {} to port {}, noted: {}",
        tuple.source_port,
        tuple.destination_port,
        noted.is_ok() as u8
    );
    0
}

/// The connection, of which this is the end that opened it. All fields are read whatever the family, and volatile: else
/// LLVM joins loads and the verifier refuses them.
#[inline(always)]
fn tuple(ctx: &SockOpsContext, family: u32) -> FourTuple {
    let ops = ctx.ops;
    // SAFETY: as above.
    unsafe {
        let local_v4 = addr_of!((*ops).local_ip4).read_volatile();
        let remote_v4 = addr_of!((*ops).remote_ip4).read_volatile();
        let local_v6 = [
            addr_of!((*ops).local_ip6[0]).read_volatile(),
            addr_of!((*ops).local_ip6[1]).read_volatile(),
            addr_of!((*ops).local_ip6[2]).read_volatile(),
            addr_of!((*ops).local_ip6[3]).read_volatile(),
        ];
        let remote_v6 = [
            addr_of!((*ops).remote_ip6[0]).read_volatile(),
            addr_of!((*ops).remote_ip6[1]).read_volatile(),
            addr_of!((*ops).remote_ip6[2]).read_volatile(),
            addr_of!((*ops).remote_ip6[3]).read_volatile(),
        ];
        // The one is in the order of this machine, the other in network order, in four bytes.
        let source_port = addr_of!((*ops).local_port).read_volatile() as u16;
        let destination_port = u32::from_be(addr_of!((*ops).remote_port).read_volatile()) as u16;
        let (source, destination) =
            if family == AF_INET { (mapped(local_v4), mapped(remote_v4)) } else { (local_v6, remote_v6) };
        FourTuple { source, destination, source_port, destination_port }
    }
}
