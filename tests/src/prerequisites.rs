//! What a machine must have for the cluster, all of it named at once.

use std::path::Path;

use crate::cgroup::Hierarchy;

/// Something missing, and how to get it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Missing {
    /// What.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

/// Everything that is missing; empty when the cluster can be started.
pub fn missing(bins: &Path) -> Vec<Missing> {
    let mut found = Vec::new();
    let mut need = |there: bool, what: &str, remedy: &str| {
        if !there {
            found.push(Missing { what: what.to_owned(), remedy: remedy.to_owned() });
        }
    };
    let root = nix::unistd::geteuid().is_root();
    need(root, "root", "run it with sudo");
    need(
        kernel().is_none_or(|v| v >= (6, 1)),
        "Linux 6.1 or newer",
        "boot a newer kernel (Debian 12 and Ubuntu 24.04 have one)",
    );
    need(
        Hierarchy::detect().is_ok(),
        "a cgroup v2 mount",
        "mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified",
    );
    let file_systems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has_bpf = file_systems.lines().any(|l| l.split_whitespace().last() == Some("bpf"));
    need(
        has_bpf,
        "the BPF system call and filesystem",
        "use a kernel with CONFIG_BPF_SYSCALL=y and CONFIG_CGROUP_BPF=y",
    );
    need(Path::new("/proc/self/ns/net").exists(), "network namespaces", "use a kernel with CONFIG_NET_NS=y");
    if root {
        let made = crate::netns::NetNs::create("probe").and_then(|near| {
            let far = crate::netns::NetNs::create("probe")?;
            near.netlink(|handle| async move { crate::links::veth(&handle, "probe0", "probe1", &far).await })
        });
        let why = made.err().map(|e| e.to_string()).unwrap_or_default();
        need(
            why.is_empty(),
            &format!("veth links in network namespaces ({why})"),
            "modprobe veth, and run outside a restricted container (CAP_SYS_ADMIN, CAP_NET_ADMIN)",
        );
    }
    for program in ["ztunnel", "culvertd", "culvert-app"] {
        let path = bins.join(program);
        need(path.exists(), &format!("the program {}", path.display()), "cargo build --workspace --bins");
    }
    found
}

/// Major and minor version of the running kernel.
fn kernel() -> Option<(u32, u32)> {
    let release = nix::sys::utsname::uname().ok()?.release().to_string_lossy().into_owned();
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}
