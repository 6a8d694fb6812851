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

    /// Directory of YAML with the Namespaces and Pods whose labels say which pods are enrolled; it is followed. Without it
    /// every pod that the CNI plugin asks for is enrolled.
    #[arg(long, env = "CULVERT_SOURCE_DIR", value_name = "DIR")]
    pub source_dir: Option<PathBuf>,

    /// Name of this node: pods that run on another one are not looked at. Without it all are.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,

    /// Cgroup (v2) of the kubelet, as a path of the host. The probes that it makes reach enrolled pods without the mesh;
    /// without this they are plaintext from outside like any other, which strict mutual TLS refuses.
    #[arg(long, env = "CULVERT_KUBELET_CGROUP", value_name = "DIR")]
    pub kubelet_cgroup: Option<PathBuf>,

    /// Whether the proxy answers the pods' DNS queries for names that the mesh knows. Off: pods ask their resolvers directly.
    #[arg(long, env = "CULVERT_DNS", value_name = "on|off", default_value = "on", hide_possible_values = true)]
    pub dns: Switch,

    /// What becomes of connections that a pod opened before it was enrolled. `allow`: they live on, unencrypted, and are
    /// counted. `deny`: they can send nothing more.
    #[arg(
        long,
        env = "CULVERT_OLDER_CONNECTIONS",
        value_name = "allow|deny",
        default_value = "allow",
        hide_possible_values = true
    )]
    pub older_connections: OlderConnections,

    /// Names of eBPF programs of others that may stand on the node's connect hooks, because they do not rewrite addresses.
    /// While there is any other, no pod is reported enrolled.
    #[arg(long, env = "CULVERT_ALLOW_FOREIGN_PROGRAMS", value_name = "NAMES", value_delimiter = ',')]
    pub allow_foreign_programs: Vec<String>,

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

/// On or off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Switch {
    /// On.
    #[default]
    On,
    /// Off.
    Off,
}

/// What becomes of connections that are older than the enrolment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OlderConnections {
    /// They live on.
    #[default]
    Allow,
    /// They can send nothing more.
    Deny,
}
