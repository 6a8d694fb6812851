//! The maps, and counting. Names and layouts are those of the library `ztunnel_ebpf`.

use aya_ebpf::{
    btf_maps::{Array, HashMap, PerCpuArray, SkStorage, SockMap},
    macros::btf_map,
};
use ztunnel_ebpf::{Counter, PODS_CAPACITY, PodEntry, SOCKETS_CAPACITY};

/// Node: network namespace cookie to pod.
#[btf_map]
pub static PODS: HashMap<u64, PodEntry, PODS_CAPACITY> = HashMap::new();

/// Node: the proxy's own sockets.
#[btf_map]
pub static EXEMPT: SkStorage<u32> = SkStorage::new();

/// Node: counters.
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { Counter::ALL.len() }> = PerCpuArray::new();

/// Pod: the proxy's listeners.
#[btf_map]
pub static SOCKETS: SockMap<SOCKETS_CAPACITY> = SockMap::new();

/// Pod: its addresses.
#[btf_map]
pub static POD: Array<PodEntry, 1> = Array::new();

/// Adds one to a counter of this CPU.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the kernel keeps array elements alive as long as the program; this CPU's copy has no other writer.
        unsafe { *value += 1 };
    }
}
