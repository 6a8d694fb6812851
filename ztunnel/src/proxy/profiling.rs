//! The admin pages under which other meshes' proxies give profiles. This one gives none, and says what does.
//!
//! A profile of the CPU from inside needs a timer's signal in every thread, whose handler unwinds stacks: the libraries for it
//! warn that it may deadlock (it takes the loader's locks), and its system calls are not among those that the jail allows.
//! A profile of the heap needs another allocator. From outside, the kernel takes both with nothing in the proxy.

use mesh_runtime::http::{Reply, Router, StatusCode};

const PROFILE: &str = "This proxy does not profile itself. From the node, as root:\n\
    \x20 perf record --call-graph dwarf -F 99 -p PID -- sleep 10\n\
    \x20 perf script > profile.perf   # pprof, flame graph tools and Firefox Profiler read it\n";

const HEAP: &str = "This proxy does not record its allocations. What it holds is counted in /config_dump and on the metrics port.\n\
    From the node, as root:\n\
    \x20 cat /proc/PID/smaps_rollup\n\
    \x20 bpftrace -p PID -e 'uprobe:libc:malloc { @bytes[ustack(12)] = sum(arg0); }'\n";

/// Adds the pages: each answers 501 with the way from outside.
pub fn mount(router: &mut Router) {
    for (path, text) in [("/debug/pprof/profile", PROFILE), ("/debug/pprof/heap", HEAP)] {
        router.get(path, "not here: says what to use instead", move |_| async move {
            Reply::text(text).with_status(StatusCode::NOT_IMPLEMENTED)
        });
    }
}
