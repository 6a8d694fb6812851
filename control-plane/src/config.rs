//! The command line, and what becomes of it. Every mistake is reported at once. Every option is an environment variable
//! as well: `--source-dir` is `CULVERT_SOURCE_DIR`.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::ca::ServiceAccount;
use crate::index;
use crate::ingest::Credentials;

/// The command line of `culvertd`.
#[derive(Debug, Parser)]
#[command(name = "culvertd", version, about = "Culvert's control plane: discovery, certificates, validation")]
#[command(args_conflicts_with_subcommands = true)]
pub struct CommandLine {
    /// What to do; without one, serve.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to serve.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// What `culvertd` can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve discovery and certificates (the default)
    Serve(Box<ServeArgs>),
    /// Print a service-account token signed by the local authority
    Token(TokenArgs),
    /// Check manifests and report every mistake
    Check(CheckArgs),
}

/// Options of `culvertd serve`, as given.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Where the objects come from [default: directory if --source-dir is given, kubernetes if --kubeconfig is]
    #[arg(long, value_enum, env = "CULVERT_SOURCE")]
    pub source: Option<SourceKind>,
    /// Directory of Kubernetes manifests (*.yaml, *.yml), read again on every change
    #[arg(long, value_name = "DIR", env = "CULVERT_SOURCE_DIR")]
    pub source_dir: Option<PathBuf>,
    /// Credentials for the API server [default: those of the pod]
    #[arg(long, value_name = "FILE", env = "CULVERT_KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// Directory for the root's key and the key that signs tokens; root.pem appears in it. A cluster keeps the root in a
    /// Secret instead
    #[arg(long, value_name = "DIR", env = "CULVERT_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// Where discovery and certificates are served, over TLS
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:15012", env = "CULVERT_XDS_ADDR")]
    pub xds_addr: String,
    /// A DNS name or address in the certificate of that port; repeatable
    #[arg(long, value_name = "NAME", env = "CULVERT_XDS_SAN", value_delimiter = ',',
          default_values = ["culvertd.culvert-system.svc", "localhost", "127.0.0.1"])]
    pub xds_san: Vec<String>,
    /// The cluster's id
    #[arg(long, value_name = "ID", default_value = "Kubernetes", env = "CULVERT_CLUSTER_ID")]
    pub cluster_id: String,
    /// The trust domain of every identity
    #[arg(long, value_name = "NAME", default_value = "cluster.local", env = "CULVERT_TRUST_DOMAIN")]
    pub trust_domain: String,
    /// The DNS domain of services
    #[arg(long, value_name = "NAME", default_value = "cluster.local", env = "CULVERT_CLUSTER_DOMAIN")]
    pub cluster_domain: String,
    /// The namespace of the mesh's own pods
    #[arg(long, value_name = "NAME", default_value = "culvert-system", env = "CULVERT_SYSTEM_NAMESPACE")]
    pub system_namespace: String,
    /// This replica's name, for people: which one leads
    #[arg(long, value_name = "NAME", default_value = "culvertd", env = "CULVERT_POD_NAME")]
    pub pod_name: String,
    /// The namespace whose policies hold in the whole mesh [default: the system namespace]
    #[arg(long, value_name = "NAMESPACE", env = "CULVERT_ROOT_NAMESPACE")]
    pub root_namespace: Option<String>,
    /// A service account whose pods may ask for certificates of other pods on their node; repeatable [default: ztunnel
    /// in the system namespace]
    #[arg(long, value_name = "NAMESPACE/NAME", env = "CULVERT_NODE_PROXY", value_delimiter = ',')]
    pub node_proxy: Vec<String>,
    /// For whom tokens of a cluster's service accounts must be; repeatable
    #[arg(long, value_name = "NAME", env = "CULVERT_TOKEN_AUDIENCE", value_delimiter = ',',
          default_values = [crate::ca::AUDIENCE])]
    pub token_audience: Vec<String>,
    /// How long an enrolled pod gets no traffic while its node's agent has not confirmed that it is captured
    #[arg(long, value_name = "TIME", default_value = "60s", env = "CULVERT_CONFIRMATION_TIMEOUT")]
    pub confirmation_timeout: String,
    /// Where the API server asks whether objects are valid, over TLS; of a cluster only
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:15017", env = "CULVERT_WEBHOOK_ADDR")]
    pub webhook_addr: String,
    /// Where metrics are served
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:15014", env = "CULVERT_METRICS_ADDR")]
    pub metrics_addr: String,
    /// Where readiness is served
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:15021", env = "CULVERT_READY_ADDR")]
    pub ready_addr: String,
    /// Where the admin pages are served; a loopback address
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:15016", env = "CULVERT_ADMIN_ADDR")]
    pub admin_addr: String,
    /// Log level, or levels by target: info,mesh_xds=debug
    #[arg(long, value_name = "LEVEL", default_value = "info", env = "CULVERT_LOG_LEVEL")]
    pub log_level: String,
    /// Log format: text or json
    #[arg(long, value_name = "FORMAT", default_value = "text", env = "CULVERT_LOG_FORMAT")]
    pub log_format: String,
}

/// Kinds of sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SourceKind {
    /// The API server of a cluster.
    Kubernetes,
    /// A directory of manifests.
    Directory,
}

/// Options of `culvertd token`.
#[derive(Debug, Args)]
pub struct TokenArgs {
    /// The state directory of the culvertd that is to accept the token
    #[arg(long, value_name = "DIR", env = "CULVERT_STATE_DIR")]
    pub state_dir: PathBuf,
    /// Namespace of the service account
    #[arg(long)]
    pub namespace: String,
    /// The service account
    #[arg(long)]
    pub service_account: String,
    /// The pod that the token is bound to
    #[arg(long)]
    pub pod: Option<String>,
    /// That pod's uid
    #[arg(long, requires = "pod")]
    pub pod_uid: Option<String>,
    /// That pod's node
    #[arg(long)]
    pub node_name: Option<String>,
    /// Whom the token is for
    #[arg(long, default_value = crate::ca::AUDIENCE)]
    pub audience: String,
    /// How long the token is good, such as 90s, 15m, 24h
    #[arg(long, value_name = "TIME", default_value = "24h")]
    pub lifetime: String,
}

/// Options of `culvertd check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Directory of Kubernetes manifests (*.yaml, *.yml)
    #[arg(long, value_name = "DIR", env = "CULVERT_SOURCE_DIR")]
    pub source_dir: PathBuf,
    /// How to print the result
    #[arg(long, value_enum, default_value_t)]
    pub output: Output,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// Where objects come from, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory of manifests.
    Directory {
        /// The directory.
        manifests: PathBuf,
        /// Directory of keys.
        state: PathBuf,
    },
    /// The API server that these credentials are for.
    Kubernetes(Credentials),
}

/// How to serve, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where objects come from.
    pub source: Source,
    /// The namespace of the mesh's own pods, with the authority's Secret.
    pub system_namespace: String,
    /// This replica's name.
    pub pod_name: String,
    /// For whom tokens of a cluster's service accounts must be.
    pub token_audiences: Vec<String>,
    /// Where discovery and certificates are served.
    pub xds_addr: SocketAddr,
    /// Names in the certificate of that port.
    pub xds_san: Vec<String>,
    /// What is the same for every resource.
    pub index: index::Options,
    /// Who may ask for certificates of other pods on its node.
    pub node_proxies: Vec<ServiceAccount>,
    /// Where the API server asks whether objects are valid.
    pub webhook_addr: SocketAddr,
    /// Where metrics are served.
    pub metrics_addr: SocketAddr,
    /// Where readiness is served.
    pub ready_addr: SocketAddr,
    /// Where the admin pages are served.
    pub admin_addr: SocketAddr,
}

/// A mistake on the command line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("--{option}: {message}")]
pub struct ConfigError {
    option: &'static str,
    message: String,
}

impl Config {
    /// Checks the options.
    ///
    /// # Errors
    /// Every mistake.
    pub fn new(args: &ServeArgs) -> Result<Self, Vec<ConfigError>> {
        let mut errors = Errors::default();
        let source = errors.source(args);
        if args.token_audience.iter().all(String::is_empty) {
            errors.add("token-audience", "is empty; name at least one");
        }
        if args.cluster_id.is_empty() || args.cluster_id.contains('/') {
            errors.add("cluster-id", format_args!("{:?} is empty or holds a slash; use a plain word", args.cluster_id));
        }
        errors.domain("trust-domain", &args.trust_domain);
        errors.domain("cluster-domain", &args.cluster_domain);
        if args.root_namespace.as_ref().is_some_and(String::is_empty) {
            errors.add("root-namespace", "is empty; name a namespace, or leave the option out");
        }
        if args.xds_san.iter().all(String::is_empty) {
            errors.add("xds-san", "is empty; name at least one host name or address that clients use");
        }
        let own = format!("{}/ztunnel", args.system_namespace);
        let named = if args.node_proxy.is_empty() { std::slice::from_ref(&own) } else { &args.node_proxy };
        let config = Self {
            source,
            system_namespace: args.system_namespace.clone(),
            pod_name: args.pod_name.clone(),
            token_audiences: args.token_audience.iter().filter(|name| !name.is_empty()).cloned().collect(),
            xds_addr: errors.address("xds-addr", &args.xds_addr),
            xds_san: args.xds_san.iter().filter(|name| !name.is_empty()).cloned().collect(),
            index: index::Options {
                cluster_id: args.cluster_id.clone(),
                cluster_domain: args.cluster_domain.clone(),
                trust_domain: args.trust_domain.clone(),
                root_namespace: args.root_namespace.as_ref().unwrap_or(&args.system_namespace).as_str().into(),
                confirmation: errors.time("confirmation-timeout", &args.confirmation_timeout),
            },
            node_proxies: named.iter().filter_map(|name| errors.service_account("node-proxy", name)).collect(),
            webhook_addr: errors.address("webhook-addr", &args.webhook_addr),
            metrics_addr: errors.address("metrics-addr", &args.metrics_addr),
            ready_addr: errors.address("ready-addr", &args.ready_addr),
            admin_addr: errors.address("admin-addr", &args.admin_addr),
        };
        if !config.admin_addr.ip().is_loopback() {
            errors.add("admin-addr", "is not a loopback address; the admin pages are for this machine only");
        }
        if errors.0.is_empty() { Ok(config) } else { Err(errors.0) }
    }
}

/// Reads a time such as `500ms`, `90s`, `15m`, `24h`.
///
/// # Errors
/// It is none.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let wrong = || format!("{text:?} is not a time; write it like 500ms, 90s, 15m or 24h");
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let milliseconds: u64 = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(milliseconds).map(Duration::from_millis).ok_or_else(wrong)
}

#[derive(Default)]
struct Errors(Vec<ConfigError>);

impl Errors {
    fn add(&mut self, option: &'static str, message: impl fmt::Display) {
        self.0.push(ConfigError { option, message: message.to_string() });
    }

    fn source(&mut self, args: &ServeArgs) -> Source {
        let implied = match (&args.source_dir, &args.kubeconfig) {
            (None, Some(_)) => SourceKind::Kubernetes,
            (Some(_) | None, _) => SourceKind::Directory,
        };
        match args.source.unwrap_or(implied) {
            SourceKind::Kubernetes => {
                if args.source_dir.is_some() {
                    self.add("source-dir", "is not read with --source kubernetes; leave one of the two out");
                }
                if args.state_dir.is_some() {
                    self.add("state-dir", "is not read with the Kubernetes source, which keeps the root in a Secret");
                }
                let file = args.kubeconfig.clone();
                Source::Kubernetes(file.map_or(Credentials::InCluster, Credentials::Kubeconfig))
            }
            SourceKind::Directory => {
                if args.kubeconfig.is_some() {
                    self.add("kubeconfig", "is not read with the directory source; leave it or --source-dir out");
                }
                let mut folder = |option, value: &Option<PathBuf>, fix: &str| {
                    if value.is_none() {
                        self.add(option, format_args!("is missing; name a directory{fix}"));
                    }
                    value.clone().unwrap_or_default()
                };
                Source::Directory {
                    manifests: folder("source-dir", &args.source_dir, ", or choose --source kubernetes"),
                    state: folder("state-dir", &args.state_dir, ""),
                }
            }
        }
    }

    fn address(&mut self, option: &'static str, text: &str) -> SocketAddr {
        text.parse().unwrap_or_else(|_| {
            self.add(option, format_args!("{text:?} is not an address; write it like 127.0.0.1:15012"));
            SocketAddr::from(([127, 0, 0, 1], 0))
        })
    }

    fn time(&mut self, option: &'static str, text: &str) -> Duration {
        parse_time(text).unwrap_or_else(|message| {
            self.add(option, message);
            Duration::ZERO
        })
    }

    /// A DNS name, in lower case.
    fn domain(&mut self, option: &'static str, text: &str) {
        let is_part = |part: &str| {
            !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        if !text.split('.').all(is_part) {
            self.add(option, format_args!("{text:?} is not a domain; write it like cluster.local"));
        }
    }

    fn service_account(&mut self, option: &'static str, text: &str) -> Option<ServiceAccount> {
        text.parse().inspect_err(|error| self.add(option, error)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve_args(line: &[&str]) -> ServeArgs {
        CommandLine::try_parse_from([&["culvertd"], line].concat()).unwrap().serve
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let config = Config::new(&serve_args(&["--source-dir", "a", "--state-dir", "b"])).unwrap();
        assert_eq!(config.xds_addr, "0.0.0.0:15012".parse().unwrap());
        assert_eq!(config.node_proxies[0].to_string(), "culvert-system/ztunnel");
        assert_eq!(config.xds_san.len(), 3);
        assert_eq!(&*config.index.root_namespace, "culvert-system");
        assert_eq!(config.index.confirmation, Duration::from_secs(60));
    }

    #[test]
    fn every_mistake_is_reported_at_once() {
        let args = serve_args(&[
            "--xds-addr",
            "nowhere",
            "--trust-domain",
            "A_b",
            "--admin-addr",
            "0.0.0.0:1",
            "--confirmation-timeout",
            "soon",
            "--node-proxy",
            "ztunnel",
            "--cluster-id",
            "a/b",
        ]);
        let errors = Config::new(&args).unwrap_err();
        let mut options: Vec<_> = errors.iter().map(|error| error.option).collect();
        options.sort_unstable();
        assert_eq!(
            options,
            [
                "admin-addr",
                "cluster-id",
                "confirmation-timeout",
                "node-proxy",
                "source-dir",
                "state-dir",
                "trust-domain",
                "xds-addr",
            ]
        );
    }

    #[test]
    fn the_source_is_what_was_named() {
        let source = |line: &[&str]| {
            let options = |errors: Vec<ConfigError>| errors.into_iter().map(|error| error.option).collect::<Vec<_>>();
            Config::new(&serve_args(line)).map(|config| config.source).map_err(options)
        };
        let folders = Source::Directory { manifests: "a".into(), state: "s".into() };
        let file = Source::Kubernetes(Credentials::Kubeconfig("k".into()));
        assert_eq!(source(&["--source-dir", "a", "--state-dir", "s"]), Ok(folders.clone()));
        assert_eq!(source(&["--source=directory", "--source-dir", "a", "--state-dir", "s"]), Ok(folders));
        assert_eq!(source(&["--source=kubernetes"]), Ok(Source::Kubernetes(Credentials::InCluster)));
        assert_eq!(source(&["--kubeconfig", "k"]), Ok(file.clone()));
        assert_eq!(source(&["--source=kubernetes", "--kubeconfig", "k"]), Ok(file));
        let mixed = ["--source=kubernetes", "--source-dir", "a", "--state-dir", "s"];
        assert_eq!(source(&mixed), Err(vec!["source-dir", "state-dir"]));
        assert_eq!(source(&["--source-dir", "a", "--state-dir", "s", "--kubeconfig", "k"]), Err(vec!["kubeconfig"]));
        assert_eq!(source(&[]), Err(vec!["source-dir", "state-dir"]));
    }

    #[test]
    fn commands_do_not_need_the_options_of_serving() {
        let line = CommandLine::try_parse_from(["culvertd", "check", "--source-dir", "a", "--output", "json"]).unwrap();
        assert!(matches!(line.command, Some(Command::Check(CheckArgs { output: Output::Json, .. }))));
        let token = ["token", "--state-dir", "s", "--namespace", "n", "--service-account", "a", "--pod", "p"];
        let line = CommandLine::try_parse_from([&["culvertd"][..], &token].concat()).unwrap();
        assert!(matches!(line.command, Some(Command::Token(_))));
    }

    #[test]
    fn times() {
        assert_eq!(parse_time("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_time("24h"), Ok(Duration::from_secs(86_400)));
        assert_eq!(parse_time("500ms"), Ok(Duration::from_millis(500)));
        for text in ["", "s", "10", "10d", "-1s", "99999999999999999999s", "9999999999999999999h"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }
}
