//! What the proxy is told at start: flags, each also an environment variable, checked together so that an operator
//! sees every mistake at once.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use mesh_hbone::memory::Limits;

/// MiB that may be held where no limit of memory is known: half of what the manifest allows.
const HELD_WITHOUT_LIMIT: usize = 512;

/// Least MiB that may be held.
const MIN_HELD_MEMORY: usize = 16;

/// Flags of `ztunnel proxy`.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    /// The agent's Unix socket on this node, from which pods and their sockets come.
    #[arg(long, env = "CULVERT_AGENT_SOCKET", default_value = "/run/culvert/proxy/agent.sock", value_name = "PATH")]
    pub agent_socket: PathBuf,

    /// Control plane that serves discovery: `https://host:port`.
    #[arg(
        long,
        env = "CULVERT_XDS_ADDRESS",
        default_value = "https://culvertd.culvert-system.svc:15012",
        value_name = "URL"
    )]
    pub xds_address: String,

    /// How much discovery tells: everything that there is, or what the pods of this node use. On demand, a first connection
    /// to an address waits for an answer, and is refused while the control plane is away; names that were not used yet are
    /// forwarded to the pod's resolver.
    #[arg(long, env = "CULVERT_DISCOVERY", value_enum, default_value_t = Scope::All, value_name = "SCOPE")]
    pub discovery: Scope,

    /// Control plane that signs certificates: `https://host:port`. Default: the discovery address.
    #[arg(long, env = "CULVERT_CA_ADDRESS", value_name = "URL")]
    pub ca_address: Option<String>,

    /// PEM file with the roots that the control plane's own certificate must chain to.
    #[arg(long, env = "CULVERT_CA_ROOTS", default_value = "/var/run/secrets/culvert/root.pem", value_name = "FILE")]
    pub ca_roots: PathBuf,

    /// File with the bearer token of this proxy's service account; read again for every connection, as it is rotated.
    #[arg(long, env = "CULVERT_TOKEN", default_value = "/var/run/secrets/culvert/token", value_name = "FILE")]
    pub token: PathBuf,

    /// Name of the node that this proxy serves.
    #[arg(long, env = "CULVERT_NODE", value_name = "NAME")]
    pub node: String,

    /// Cluster that this node belongs to.
    #[arg(long, env = "CULVERT_CLUSTER_ID", default_value = "Kubernetes", value_name = "ID")]
    pub cluster_id: String,

    /// Trust domain of the identities of this cluster.
    #[arg(long, env = "CULVERT_TRUST_DOMAIN", default_value = "cluster.local", value_name = "DOMAIN")]
    pub trust_domain: String,

    /// Domain that the names of this cluster's services end in.
    #[arg(long, env = "CULVERT_CLUSTER_DOMAIN", default_value = "cluster.local", value_name = "DOMAIN")]
    pub cluster_domain: String,

    /// Network that this node's pods are on; empty for a mesh of one network.
    #[arg(long, env = "CULVERT_NETWORK", default_value = "", value_name = "NAME")]
    pub network: String,

    /// Name of this proxy's own pod, as the control plane is told. Default: `ztunnel-<node>`.
    #[arg(long, env = "CULVERT_POD_NAME", value_name = "NAME")]
    pub pod_name: Option<String>,

    /// Namespace of this proxy's own pod.
    #[arg(long, env = "CULVERT_POD_NAMESPACE", default_value = "culvert-system", value_name = "NAMESPACE")]
    pub pod_namespace: String,

    /// Address of this proxy's own pod, as the control plane is told.
    #[arg(long, env = "CULVERT_INSTANCE_IP", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST), value_name = "IP")]
    pub instance_ip: IpAddr,

    /// Where the admin interface listens; localhost only.
    #[arg(long, env = "CULVERT_ADMIN_ADDR", default_value = "127.0.0.1:15000", value_name = "IP:PORT")]
    pub admin_addr: SocketAddr,

    /// Where readiness is answered.
    #[arg(long, env = "CULVERT_READY_ADDR", default_value = "0.0.0.0:15021", value_name = "IP:PORT")]
    pub ready_addr: SocketAddr,

    /// Where metrics are served.
    #[arg(long, env = "CULVERT_METRICS_ADDR", default_value = "0.0.0.0:15020", value_name = "IP:PORT")]
    pub metrics_addr: SocketAddr,

    /// Threads that carry connections. Default: one per core, at most four.
    #[arg(long, env = "CULVERT_WORKERS", value_name = "COUNT")]
    pub workers: Option<usize>,

    /// User and group that the proxy becomes when it is started as root.
    #[arg(long, env = "CULVERT_UID", default_value_t = 1337, value_name = "UID")]
    pub uid: u32,

    /// Connections of one pod that may be open at once, both directions together.
    #[arg(long, env = "CULVERT_MAX_CONNECTIONS_PER_POD", default_value_t = 20_000, value_name = "COUNT")]
    pub max_connections_per_pod: usize,

    /// MiB that the proxy may hold for receivers that do not take what is sent to them, all pods together; one pod may hold
    /// half of that. Of a pod that holds more, connections that have waited longest are reset. Default: half of the control
    /// group's limit of memory, or 512 where there is none.
    #[arg(long, env = "CULVERT_MAX_HELD_MEMORY", value_name = "MIB")]
    pub max_held_memory: Option<usize>,

    /// Sockets that may lie in stock for all pods of the node together.
    #[arg(long, env = "CULVERT_STOCK_CAP", default_value_t = 4096, value_name = "COUNT")]
    pub stock_cap: usize,

    /// How long open connections may go on after SIGTERM, in seconds.
    #[arg(long, env = "CULVERT_DRAIN_DEADLINE", default_value = "30", value_parser = seconds, value_name = "SECONDS")]
    pub drain_deadline: Duration,

    /// What is logged: a level, or `target=level` pairs separated by commas.
    #[arg(long, env = "CULVERT_LOG_LEVEL", default_value = "info", value_name = "LEVEL")]
    pub log_level: String,

    /// How it is logged: `text` or `json`.
    #[arg(long, env = "CULVERT_LOG_FORMAT", default_value = "text", value_name = "FORMAT")]
    pub log_format: String,
}

/// How much discovery tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Scope {
    /// All workloads and services of the mesh.
    All,
    /// Those that are asked for.
    OnDemand,
}

/// Everything that is wrong with a configuration, one line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidConfig(pub Vec<String>);

impl fmt::Display for InvalidConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("invalid configuration: ")?;
        f.write_str(&self.0.join("; "))
    }
}

impl std::error::Error for InvalidConfig {}

impl Config {
    /// Checks what the types of the fields do not say already, and reports all of it together.
    ///
    /// # Errors
    /// Every mistake found, naming the flag.
    pub fn check(&self) -> Result<(), InvalidConfig> {
        let mut wrong = Vec::new();
        for (flag, url) in [("--xds-address", Some(&self.xds_address)), ("--ca-address", self.ca_address.as_ref())] {
            if let Some(url) = url
                && !url.starts_with("https://")
            {
                wrong.push(format!("{flag} is {url:?}: it must be https://host:port, the token would leak otherwise"));
            }
        }
        if self.node.is_empty() {
            wrong.push("--node is empty: it must name this node as the control plane knows it".to_owned());
        }
        if self.trust_domain.is_empty() || self.trust_domain.contains('/') {
            wrong.push(format!("--trust-domain is {:?}: it must be a name such as cluster.local", self.trust_domain));
        }
        if !is_domain(&self.cluster_domain) {
            wrong.push(format!(
                "--cluster-domain is {:?}: it must be a name such as cluster.local",
                self.cluster_domain
            ));
        }
        if !self.admin_addr.ip().is_loopback() {
            wrong.push(format!("--admin-addr is {}: it must be a loopback address", self.admin_addr));
        }
        if self.uid == 0 {
            wrong.push("--uid is 0: the proxy never runs as root".to_owned());
        }
        if self.workers == Some(0) {
            wrong.push("--workers is 0: at least one thread must carry connections".to_owned());
        }
        if let Some(held @ 0..MIN_HELD_MEMORY) = self.max_held_memory {
            wrong.push(format!(
                "--max-held-memory is {held}: below {MIN_HELD_MEMORY} MiB a few slow receivers take all of it"
            ));
        }
        if wrong.is_empty() { Ok(()) } else { Err(InvalidConfig(wrong)) }
    }

    /// Threads that carry connections.
    pub fn worker_count(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from).min(4);
        self.workers.unwrap_or_else(cores)
    }

    /// How much may be held for receivers.
    pub fn held_memory(&self) -> Limits {
        let mebibytes = self.max_held_memory.unwrap_or_else(|| default_held_memory(None));
        Limits::of(mebibytes.saturating_mul(1 << 20))
    }

    /// Name of this proxy's own pod.
    pub fn own_pod_name(&self) -> String {
        self.pod_name.clone().unwrap_or_else(|| format!("ztunnel-{}", self.node))
    }

    /// Address of the certificate authority.
    pub fn ca(&self) -> &str {
        self.ca_address.as_deref().unwrap_or(&self.xds_address)
    }
}

/// MiB that may be held in a process that may have `limit` bytes of memory.
pub fn default_held_memory(limit: Option<u64>) -> usize {
    let half = limit.map_or(HELD_WITHOUT_LIMIT, |limit| usize::try_from(limit >> 21).unwrap_or(usize::MAX));
    half.max(MIN_HELD_MEMORY)
}

/// Whether it is a domain name as hosts have it, perhaps with a dot at its end.
fn is_domain(text: &str) -> bool {
    let label = |label: &str| {
        let usual = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        (1..=63).contains(&label.len()) && usual
    };
    text.len() <= 200 && text.strip_suffix('.').unwrap_or(text).split('.').all(label)
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: u32 = text.parse().map_err(|_| format!("{text:?} is not a whole number of seconds"))?;
    Ok(Duration::from_secs(seconds.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        config: Config,
    }

    #[test]
    fn defaults_are_valid() {
        let config = Command::try_parse_from(["proxy", "--node", "a"]).unwrap().config;
        assert_eq!(config.check(), Ok(()));
        assert_eq!(config.ca(), config.xds_address);
        assert_eq!(config.own_pod_name(), "ztunnel-a");
        assert_eq!(config.drain_deadline, Duration::from_secs(30));
    }

    #[test]
    fn addresses_may_be_of_either_family() {
        let flags = ["proxy", "--node", "a", "--admin-addr", "[::1]:15000", "--metrics-addr", "[::]:15020"];
        let more = ["--ready-addr", "[::]:15021", "--instance-ip", "2001:db8::1"];
        let config = Command::try_parse_from(flags.iter().chain(&more)).unwrap().config;
        assert_eq!(config.check(), Ok(()));
        assert_eq!(config.ready_addr, "[::]:15021".parse().unwrap());
    }

    #[test]
    fn what_may_be_held_is_half_of_the_memory_that_there_is() {
        assert_eq!(default_held_memory(Some(1 << 30)), 512);
        assert_eq!(default_held_memory(None), 512);
        assert_eq!(default_held_memory(Some(3 << 20)), MIN_HELD_MEMORY);
        let config = Command::try_parse_from(["proxy", "--node", "a", "--max-held-memory", "64"]).unwrap().config;
        assert_eq!((config.check(), config.held_memory()), (Ok(()), Limits::of(64 << 20)));
    }

    #[test]
    fn every_mistake_is_reported_at_once() {
        let flags = ["proxy", "--node", "", "--xds-address", "http://x:1", "--uid", "0", "--workers", "0"];
        let more = ["--admin-addr", "0.0.0.0:1", "--ca-address", "x:1", "--trust-domain", "a/b"];
        let more = more.iter().chain(&["--cluster-domain", "a..b", "--max-held-memory", "15"]);
        let config = Command::try_parse_from(flags.iter().chain(more)).unwrap().config;
        let wrong = config.check().unwrap_err();
        assert_eq!(wrong.0.len(), 9, "{wrong}");
        for flag in [
            "--node",
            "--xds-address",
            "--ca-address",
            "--uid",
            "--workers",
            "--admin-addr",
            "--trust-domain",
            "--cluster-domain",
            "--max-held-memory",
        ] {
            assert!(wrong.to_string().contains(flag), "{flag} is missing in {wrong}");
        }
    }
}
