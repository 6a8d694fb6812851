//! The eBPF programs of one node.
//!
//! `connect4` and `connect6` sit at the root of the cgroup hierarchy and mark new connections of enrolled pods; one
//! instance of `lookup` sits in each pod's network namespace and steers connections to the proxy's listeners; one of `guard`
//! sits at each pod's edge and drops TCP that is not the proxy's. `probes` sits at the kubelet's cgroup and notes its
//! connections, which are left alone. Nothing is rewritten.
#![no_std]
#![no_main]

mod connect;
mod guard;
mod lookup;
mod maps;
mod probes;

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Helpers that take and return packets' sockets are open to programs under the GPL only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
