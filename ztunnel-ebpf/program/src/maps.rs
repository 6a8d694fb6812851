//! The maps, and counting. Names and layouts are those of the library `ztunnel_ebpf`.

use core::ptr::{null, null_mut};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_CLONE, BPF_F_NO_PREALLOC,
        bpf_map_type::{BPF_MAP_TYPE_SK_STORAGE, BPF_MAP_TYPE_SOCKMAP},
        bpf_sock,
    },
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray},
    helpers::generated::{bpf_map_lookup_elem, bpf_sk_assign, bpf_sk_release, bpf_sk_storage_get},
    macros::btf_map,
    programs::SkLookupContext,
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
pub static SOCKETS: Listeners = Listeners::new();

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

/// A socket map whose values are cookies to user space. The library's own kind has values of four bytes, which only
/// programs can read.
#[repr(C)]
pub struct Listeners {
    r#type: *const [i32; BPF_MAP_TYPE_SOCKMAP as usize],
    key: *const u32,
    value: *const u64,
    max_entries: *const [i32; SOCKETS_CAPACITY],
    map_flags: *const [i32; 0],
}

// SAFETY: as above.
unsafe impl Sync for Listeners {}

impl Listeners {
    const fn new() -> Self {
        Self { r#type: null(), key: null(), value: null(), max_entries: null(), map_flags: null() }
    }

    /// Gives the packet to the listener under this key.
    ///
    /// # Errors
    /// A negative number of the kernel's: there is no listener, or it is of another family or protocol.
    #[inline(always)]
    pub fn give(&self, ctx: &SkLookupContext, key: u32) -> Result<(), i64> {
        let map = core::ptr::from_ref(self).cast_mut().cast();
        // SAFETY: the map is one of this object, and the key outlives the call.
        let socket = unsafe { bpf_map_lookup_elem(map, core::ptr::from_ref(&key).cast()) };
        if socket.is_null() {
            return Err(-ENOENT);
        }
        // SAFETY: the socket was taken from the map, and is given back once.
        let done = unsafe {
            let done = bpf_sk_assign(ctx.as_ptr().cast(), socket, 0);
            bpf_sk_release(socket);
            done
        };
        if done == 0 { Ok(()) } else { Err(done) }
    }
}

/// There is no such entry.
const ENOENT: i64 = 2;

/// Adds one to a counter of this CPU.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the kernel keeps array elements alive as long as the program; this CPU's copy has no other writer.
        unsafe { *value += 1 };
    }
}
