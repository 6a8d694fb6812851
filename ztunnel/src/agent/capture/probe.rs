//! Kernel features that capture stands on, each tried rather than guessed from a version.

use std::os::fd::AsFd as _;

use aya::maps::MapType;
use aya::programs::ProgramType;
use aya::sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported};

/// One feature.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// Its name.
    pub feature: &'static str,
    /// The first kernel that has it.
    pub since: &'static str,
    /// What cannot be done without it.
    pub loss: &'static str,
    /// Whether this kernel has it.
    pub present: bool,
}

/// All features. What only shows when a program is loaded (fields of a context) is reported by the loader.
#[must_use]
pub fn all() -> Vec<Probe> {
    let program = |kind| is_program_supported(kind).unwrap_or(false);
    let map = |kind| is_map_supported(kind).unwrap_or(false);
    let helper = |helper| is_helper_supported(ProgramType::CgroupSockAddr, helper).unwrap_or(false);
    vec![
        Probe {
            feature: "BPF_PROG_TYPE_CGROUP_SOCK_ADDR",
            since: "4.17",
            loss: "connections of pods cannot be captured",
            present: program(ProgramType::CgroupSockAddr),
        },
        Probe {
            feature: "BPF_PROG_TYPE_SK_LOOKUP",
            since: "5.9",
            loss: "connections cannot be steered to the proxy",
            present: program(ProgramType::SkLookup),
        },
        Probe {
            feature: "BPF_PROG_TYPE_SCHED_CLS",
            since: "4.1",
            loss: "TCP that is not the proxy's cannot be stopped at the pods' edge",
            present: program(ProgramType::SchedClassifier),
        },
        Probe {
            feature: "BPF_PROG_TYPE_SOCK_OPS",
            since: "4.13",
            loss: "the kubelet's connections cannot be told from those of others",
            present: program(ProgramType::SockOps),
        },
        Probe {
            feature: "BPF_MAP_TYPE_LPM_TRIE",
            since: "4.11",
            loss: "the programs cannot hold the pods' routes",
            present: map(MapType::LpmTrie),
        },
        Probe {
            feature: "BPF_MAP_TYPE_SK_STORAGE",
            since: "5.2",
            loss: "the proxy's own connections cannot be exempted",
            present: map(MapType::SkStorage),
        },
        Probe {
            feature: "BPF_MAP_TYPE_SOCKMAP",
            since: "4.14",
            loss: "the programs cannot hold the proxy's listeners",
            present: map(MapType::SockMap),
        },
        Probe {
            feature: "bpf_get_netns_cookie in connect hooks",
            since: "5.7",
            loss: "the programs cannot tell pods apart",
            present: helper(BpfHelper::BPF_FUNC_get_netns_cookie),
        },
        Probe {
            feature: "bpf_setsockopt in connect hooks",
            since: "5.8",
            loss: "connections cannot be marked",
            present: helper(BpfHelper::BPF_FUNC_setsockopt),
        },
        Probe {
            feature: "SO_NETNS_COOKIE",
            since: "5.14",
            loss: "the agent cannot name a pod's network namespace to the programs",
            present: socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None)
                .and_then(|socket| super::netns_cookie(socket.as_fd()))
                .is_ok(),
        },
    ]
}
