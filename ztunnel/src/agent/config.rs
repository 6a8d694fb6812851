//! The agent's options.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use nix::sys::statfs;
use serde_json::json;

use super::plugin::Plugin;
use crate::cni::decide::{Exclusions, SYSTEM_NAMESPACE};

/// Options of `ztunnel agent`.
#[derive(clap::Args, Clone, Debug)]
pub struct Config {
    /// Folder of the agent's sockets, lock and state. One agent per folder.
    #[arg(long, env = "CULVERT_RUN_DIR", value_name = "DIR", default_value = "/run/culvert")]
    pub run_dir: PathBuf,

    /// Where the cgroups of the host are mounted. Where version 1 stands beside version 2, the folder `unified` in it is used.
    #[arg(long, env = "CULVERT_CGROUP_ROOT", value_name = "DIR", default_value = "/sys/fs/cgroup")]
    pub cgroup_root: PathBuf,

    /// A mount of the host's proc whose `sys` can be written: a container's own cannot.
    #[arg(long, env = "CULVERT_PROC_DIR", value_name = "DIR", default_value = "/proc")]
    pub proc_dir: PathBuf,

    /// Folder on a bpffs in which links and maps are pinned; made if it is missing, the mount is not.
    #[arg(long, env = "CULVERT_BPFFS", value_name = "DIR", default_value = "/sys/fs/bpf/culvert")]
    pub bpffs: PathBuf,

    /// User id of the proxy, which alone (beside root) may take sockets.
    #[arg(long, env = "CULVERT_PROXY_UID", value_name = "UID", default_value_t = 1337)]
    pub proxy_uid: u32,

    /// Directory of YAML with the Namespaces and Pods whose labels say which pods are enrolled; it is followed. Without it
    /// and without --kubernetes every pod that the CNI plugin asks for is enrolled.
    #[arg(long, env = "CULVERT_SOURCE_DIR", value_name = "DIR", conflicts_with = "kubernetes")]
    pub source_dir: Option<PathBuf>,

    /// Take the labels of this node's pods and of namespaces from the Kubernetes API, enrol also pods that run already, and
    /// say on each pod's object whether it is captured. As the pod's service account, or with --kubeconfig.
    #[arg(long, env = "CULVERT_KUBERNETES", requires = "node_name")]
    pub kubernetes: bool,

    /// File that says where the Kubernetes API is and who asks.
    #[arg(long, env = "CULVERT_KUBECONFIG", value_name = "FILE", requires = "kubernetes")]
    pub kubeconfig: Option<PathBuf>,

    /// Name of this node: pods that run on another one are not looked at. Without it all are.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,

    /// The container runtime's folder of CNI plugins (usually /opt/cni/bin): the agent installs itself there. With
    /// --cni-conf-dir; without both somebody else installs the plugin.
    #[arg(long, env = "CULVERT_CNI_BIN_DIR", value_name = "DIR", requires = "cni_conf_dir")]
    pub cni_bin_dir: Option<PathBuf>,

    /// The container runtime's folder of network configurations (usually /etc/cni/net.d): the agent writes one of its own,
    /// 00-culvert.conflist, which is the CNI's with its plugin behind it, and follows what the node's CNI writes.
    #[arg(long, env = "CULVERT_CNI_CONF_DIR", value_name = "DIR", requires = "cni_bin_dir")]
    pub cni_conf_dir: Option<PathBuf>,

    /// Namespaces whose pods the CNI plugin lets pass unseen [default: kube-system and the mesh's own].
    #[arg(long, env = "CULVERT_EXCLUDED_NAMESPACES", value_name = "NAMES", value_delimiter = ',')]
    pub excluded_namespaces: Option<Vec<String>>,

    /// Namespace of the mesh's own pods, which the CNI plugin lets pass.
    #[arg(long, env = "CULVERT_SYSTEM_NAMESPACE", value_name = "NAME", default_value = SYSTEM_NAMESPACE)]
    pub system_namespace: String,

    /// Cgroup (v2) of the kubelet, as a path of the host. The probes that it makes reach enrolled pods without the mesh;
    /// without this they are plaintext from outside like any other, which strict mutual TLS refuses. Given more than once,
    /// or with commas: the first of those that exist.
    #[arg(long, env = "CULVERT_KUBELET_CGROUP", value_name = "DIR", value_delimiter = ',')]
    pub kubelet_cgroup: Vec<PathBuf>,

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

impl Config {
    /// Where the cgroup v2 hierarchy of the host is mounted.
    #[must_use]
    pub fn cgroup2_root(&self) -> PathBuf {
        let beside = self.cgroup_root.join("unified");
        let is_v2 = |path: &Path| {
            statfs::statfs(path).is_ok_and(|found| found.filesystem_type() == statfs::CGROUP2_SUPER_MAGIC)
        };
        if !is_v2(&self.cgroup_root) && is_v2(&beside) { beside } else { self.cgroup_root.clone() }
    }

    /// Which pods pass whatever their labels say: as the CNI plugin is told that this agent installs.
    #[must_use]
    pub fn exclusions(&self) -> Exclusions {
        Exclusions::or_default(self.system_namespace.clone(), self.excluded_namespaces.clone())
    }

    /// The CNI plugin, if the agent is to install it.
    #[must_use]
    pub fn plugin(&self) -> Option<Plugin> {
        let (bin_dir, conf_dir) = (self.cni_bin_dir.clone()?, self.cni_conf_dir.clone()?);
        let mut own = json!({
            // As the host's runtime sees it: the folder is the same inside and outside of the agent's container.
            "agentSocket": self.run_dir.join("cni.sock"),
            "systemNamespace": self.system_namespace,
        });
        if let (Some(excluded), Some(fields)) = (&self.excluded_namespaces, own.as_object_mut()) {
            fields.insert(String::from("excludedNamespaces"), json!(excluded));
        }
        Some(Plugin { bin_dir, conf_dir, own })
    }
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
