//! The agent's options.

use std::net::SocketAddr;
use std::path::PathBuf;

/// Options of `ztunnel agent`.
#[derive(clap::Args, Clone, Debug)]
pub struct Config {
    /// Folder of the agent's sockets, lock and state. One agent per folder.
    #[arg(long, env = "CULVERT_RUN_DIR", value_name = "DIR", default_value = "/run/culvert")]
    pub run_dir: PathBuf,

    /// Where the cgroup v2 hierarchy of the host is mounted (`/sys/fs/cgroup/unified` where v1 stands beside it).
    #[arg(long, env = "CULVERT_CGROUP_ROOT", value_name = "DIR", default_value = "/sys/fs/cgroup")]
    pub cgroup_root: PathBuf,

    /// Folder on a bpffs in which links and maps are pinned; made if it is missing, the mount is not.
    #[arg(long, env = "CULVERT_BPFFS", value_name = "DIR", default_value = "/sys/fs/bpf/culvert")]
    pub bpffs: PathBuf,

    /// User id of the proxy, which alone (beside root) may take sockets.
    #[arg(long, env = "CULVERT_PROXY_UID", value_name = "UID", default_value_t = 1337)]
    pub proxy_uid: u32,

    /// Address of the admin and metrics pages, on the loopback device. No TCP port is opened without it.
    #[arg(long, env = "CULVERT_AGENT_ADMIN_ADDR", value_name = "ADDR")]
    pub admin_addr: Option<SocketAddr>,

    /// Log level: `info`, or a list such as `info,ztunnel::agent=debug`.
    #[arg(long, env = "CULVERT_LOG_LEVEL", value_name = "LEVELS", default_value = "info")]
    pub log_level: String,

    /// `text` or `json`.
    #[arg(long, env = "CULVERT_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    pub log_format: String,

    /// Load the eBPF programs with their log records, shown at level debug of the target `ebpf`. Programs that are
    /// adopted from an earlier agent keep the setting they were loaded with.
    #[arg(long, env = "CULVERT_EBPF_LOG")]
    pub ebpf_log: bool,

    /// Release every pod and remove all that agents of this run folder left in the kernel, then exit. Connections that
    /// are opened afterwards are no longer carried by the mesh.
    #[arg(long, visible_alias = "purge")]
    pub uninstall: bool,
}
