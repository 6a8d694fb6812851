//! The maps, and counting. Names and layouts are those of the library `ztunnel_ebpf`.

use core::ptr::{null, null_mut};

use aya_ebpf::{
    bindings::{BPF_F_CLONE, BPF_F_NO_PREALLOC, bpf_map_type::BPF_MAP_TYPE_SK_STORAGE, bpf_sock},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, SockMap},
    helpers::generated::bpf_sk_storage_get,
    macros::btf_map,
};
use ztunnel_ebpf::{
    Counter, FourTuple, OLDER_CAPACITY, PODS_CAPACITY, PROBES_CAPACITY, PodEntry, ROUTES_CAPACITY, RouteKey,
    SOCKETS_CAPACITY,
};

/// Node: network namespace cookie to pod.
#[btf_map]
pub static PODS: HashMap<u64, PodEntry, PODS_CAPACITY> = HashMap::new();

/// Node: which destinations of which namespace are captured.
#[btf_map]
pub static ROUTES: LpmTrie<RouteKey, u32, ROUTES_CAPACITY> = LpmTrie::new();

/// Node: the proxy's own sockets.
#[btf_map]
pub static EXEMPT: InheritedStorage = InheritedStorage::new();

/// Node: connections of the kubelet.
#[btf_map]
pub static PROBES: LruHashMap<FourTuple, u32, PROBES_CAPACITY> = LruHashMap::new();

/// Node: counters.
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { Counter::ALL.len() }> = PerCpuArray::new();

/// Pod: the proxy's listeners.
#[btf_map]
pub static SOCKETS: SockMap<SOCKETS_CAPACITY> = SockMap::new();

/// Pod: its addresses.
#[btf_map]
pub static POD: Array<PodEntry, 1> = Array::new();

/// Pod: sockets that were connected before it was enrolled. The agent cuts its size to what it finds.
#[btf_map]
pub static OLDER: HashMap<u64, u32, OLDER_CAPACITY> = HashMap::new();

/// Socket storage that accepted connections inherit from their listener. The library's own kind lacks the flag.
#[repr(C)]
pub struct InheritedStorage {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const u32,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

// SAFETY: the pointers only carry types to the loader and are never followed.
unsafe impl Sync for InheritedStorage {}

impl InheritedStorage {
    const fn new() -> Self {
        Self { r#type: null(), key: null(), value: null(), max_entries: null(), map_flags: null() }
    }

    /// Whether a socket is marked here. A null pointer is not.
    ///
    /// # Safety
    ///
    /// `socket` is null or a full socket that the kernel gave to the program.
    #[inline(always)]
    pub unsafe fn holds(&self, socket: *mut bpf_sock) -> bool {
        let map = core::ptr::from_ref(self).cast_mut().cast();
        // SAFETY: the map is one of this object; the caller vouches for the socket.
        let value = unsafe { bpf_sk_storage_get(map, socket.cast(), null_mut(), 0) }.cast::<u32>();
        // SAFETY: the kernel returns null or the socket's value, which lives as long as the program runs.
        unsafe { value.as_ref() }.is_some_and(|flag| *flag != 0)
    }
}

/// Adds one to a counter of this CPU.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the kernel keeps array elements alive as long as the program; this CPU's copy has no other writer.
        unsafe { *value += 1 };
    }
}

/// Whether four words are an IPv4-mapped address.
#[inline(always)]
pub fn is_mapped(address: &[u32; 4]) -> bool {
    address[0] == 0 && address[1] == 0 && address[2] == MAPPED
}

/// An IPv4 address as four words.
#[inline(always)]
pub const fn mapped(address: u32) -> [u32; 4] {
    [0, 0, MAPPED, address]
}

const MAPPED: u32 = 0xffff_u32.to_be();
