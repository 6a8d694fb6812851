//! etcd and kube-apiserver: a real Kubernetes API, with or without nodes behind it.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, getsockname, setsockopt, socket, sockopt};

use serde_json::Value;

use super::api::Api;
use super::pki::{MASTERS, Pki};
use super::programs::{CONTROL, Programs};
use crate::cgroup::Cgroup;
use crate::cleanup::ClusterId;
use crate::component::Component;
use crate::error::Context;
use crate::http;
use crate::netns::NetNs;
use crate::process::Spec;
use crate::{Error, cleanup};

/// ClusterIPs of services.
pub const SERVICES: &str = "10.96.0.0/16";
/// The same in IPv6, for services that ask for one.
pub const SERVICES_V6: &str = "fd96::/112";
/// ClusterIP of the API server.
pub const SERVICE_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);

/// How long either may take to be ready: a machine that also builds has little time for them.
const READY: Duration = Duration::from_secs(120);

/// Where the two listen.
#[derive(Debug, Clone)]
pub enum Place {
    /// On the machine's loopback, at ports that are free.
    Loopback,
    /// In a namespace, at their usual ports; the API server also at this address.
    Network(Arc<NetNs>, Ipv4Addr),
}

impl Place {
    fn network(&self) -> Option<Arc<NetNs>> {
        match self {
            Self::Loopback => None,
            Self::Network(network, _) => Some(Arc::clone(network)),
        }
    }
}

/// Something that was asked of the API server.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Asked {
    /// `get`, `list`, `watch`, `create`, `update`, `patch` or `delete`.
    pub verb: String,
    /// The group; empty for Kubernetes' first one.
    pub group: String,
    /// The resource in the plural, with the part of it that was asked for.
    pub resource: String,
    /// The code of the answer.
    pub code: u16,
}

/// Who is audited: the mesh's own parts. Nobody else's requests are worth the room.
const AUDIT: &str = r#"
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: Metadata
    users:
      - culvertd
      - system:serviceaccount:culvert-system:culvertd
      - system:serviceaccount:culvert-system:culvert-node
      - system:serviceaccount:culvert-system:ztunnel
  - level: None
"#;

/// A running API server with its store. Ends when dropped.
///
/// ```no_run
/// # fn main() -> Result<(), tests::Error> {
/// let server = tests::kubernetes::ApiServer::start()?;
/// println!("KUBECONFIG={}", server.kubeconfig().display());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ApiServer {
    /// kube-apiserver. First, so that it ends first: it retries for ever without its store.
    pub component: Component,
    /// etcd.
    pub store: Component,
    pki: Arc<Pki>,
    api: Api,
    url: String,
    kubeconfig: PathBuf,
    audit: PathBuf,
    /// Its own folder, where it does not belong to a cluster.
    own: Option<ClusterId>,
    /// Held ports: bound with SO_REUSEPORT and never listened at, so that only a process of ours gets them.
    _ports: Vec<Port>,
}

impl ApiServer {
    /// Starts both on the machine's loopback, with the programs of `KUBERNETES_BIN_DIR`, and waits until they serve.
    ///
    /// # Errors
    /// A program is missing, ends early or is not ready in time; the tail of its log is in the error.
    pub fn start() -> Result<Self, Error> {
        cleanup::sweep()?;
        let programs = Programs::from_env(&[CONTROL])?;
        let id = ClusterId::new()?;
        let pki = Arc::new(Pki::create(&id.folder().join("pki"))?);
        match Self::start_in(&programs, &id.folder(), &Place::Loopback, pki, None) {
            Ok(mut server) => {
                server.own = Some(id);
                Ok(server)
            }
            Err(error) => {
                // The error that led here is the one to report.
                let _ = std::fs::remove_dir_all(id.folder());
                Err(error)
            }
        }
    }

    /// As [`ApiServer::start`], anywhere: with files in `folder`, certificates of `pki`, processes in `group`.
    ///
    /// # Errors
    /// As [`ApiServer::start`].
    pub fn start_in(
        programs: &Programs,
        folder: &Path,
        place: &Place,
        pki: Arc<Pki>,
        group: Option<&Cgroup>,
    ) -> Result<Self, Error> {
        let logs = folder.join("logs");
        std::fs::create_dir_all(&logs).during(|| format!("making {}", logs.display()))?;
        let ports = match place {
            Place::Loopback => (0..3).map(|_| Port::reserve()).collect::<Result<Vec<_>, _>>()?,
            Place::Network(..) => Vec::new(),
        };
        let port = |at: usize, usual: u16| ports.get(at).map_or(usual, |port| port.number);
        let loopback = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let (client, peer, secure) = (loopback(port(0, 2379)), loopback(port(1, 2380)), loopback(port(2, 6443)));
        let address = match place {
            Place::Loopback => Ipv4Addr::LOCALHOST,
            Place::Network(_, address) => *address,
        };
        let url = format!("https://{}", SocketAddr::from((address, secure.port())));
        let spec = |name: &str, args: Vec<String>| {
            let mut spec = Spec::new(name, programs.path(name), logs.join(format!("{name}.log"))).args(args);
            (spec.network, spec.group) = (place.network(), group.cloned());
            spec
        };

        let store = spec("etcd", etcd(folder, client, peer));
        let network = place.network();
        let store = Component::new(store, move || Ok(healthy(network.as_deref(), client))).ready_within(READY);
        store.launch()?;

        let kubeconfig = pki.kubeconfig("admin", &url, "culvert-admin", Some(MASTERS))?;
        let admin = pki.issue("culvert-harness", Some(MASTERS), &[], &[])?;
        let api = Api::new(secure, place.network(), &pki, &admin)?;
        let audit = logs.join("audit.log");
        let policy = folder.join("audit.yaml");
        std::fs::write(&policy, AUDIT).during(|| format!("writing {}", policy.display()))?;
        let mut args = apiserver(&pki, client, address, secure.port(), place)?;
        args.push(format!("--audit-policy-file={}", policy.display()));
        args.push(format!("--audit-log-path={}", audit.display()));
        let server = spec("kube-apiserver", args);
        let probe = api.clone();
        let component = Component::new(server, move || Ok(probe.ready())).ready_within(READY);
        store.wait_ready()?;
        component.start()?;
        Ok(Self { component, store, pki, api, url, kubeconfig, audit, own: None, _ports: ports })
    }

    /// A kubeconfig file with every right (group `system:masters`).
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Where it listens: `https://<address>:<port>`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A kubeconfig file for another user, with the rights that RBAC gives them. `file` names it.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn kubeconfig_for(&self, file: &str, user: &str, group: Option<&str>) -> Result<PathBuf, Error> {
        self.pki.kubeconfig(file, &self.url, user, group)
    }

    /// The cluster's authority.
    pub fn pki(&self) -> &Pki {
        &self.pki
    }

    /// A client with every right.
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// What a user has asked so far, as the API server's audit has it: verb, group, resource (`pods/status` of a part of it),
    /// and the code of the answer. Users of the mesh alone are audited: `culvertd`, and the service accounts of
    /// `culvert-system`. What still runs, such as a watch, is among it.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn asked_by(&self, user: &str) -> Result<BTreeSet<Asked>, Error> {
        let text = std::fs::read_to_string(&self.audit).during(|| format!("reading {}", self.audit.display()))?;
        let events = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let asked = events.filter(|event| event["user"]["username"] == user).filter_map(|event| {
            let object = &event["objectRef"];
            let text = |key: &str| object[key].as_str().unwrap_or_default().to_owned();
            let resource = match (text("resource"), text("subresource")) {
                // What is no resource: the version, or what kinds there are.
                (resource, _) if resource.is_empty() => return None,
                (resource, part) if part.is_empty() => resource,
                (resource, part) => format!("{resource}/{part}"),
            };
            let code = event["responseStatus"]["code"].as_u64().and_then(|code| u16::try_from(code).ok());
            let verb = event["verb"].as_str().unwrap_or_default().to_owned();
            Some(Asked { verb, group: text("apiGroup"), resource, code: code.unwrap_or_default() })
        });
        Ok(asked.collect())
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        let _ = self.component.kill();
        let _ = self.store.kill();
        if let Some(id) = self.own.take() {
            let _ = std::fs::remove_dir_all(id.folder());
        }
    }
}

fn etcd(folder: &Path, client: SocketAddr, peer: SocketAddr) -> Vec<String> {
    let (client, peer) = (format!("http://{client}"), format!("http://{peer}"));
    let pairs = [
        ("name", "culvert".to_owned()),
        ("data-dir", folder.join("etcd").display().to_string()),
        ("listen-client-urls", client.clone()),
        ("advertise-client-urls", client),
        ("listen-peer-urls", peer.clone()),
        ("initial-advertise-peer-urls", peer.clone()),
        ("initial-cluster", format!("culvert={peer}")),
        // What it holds is thrown away with the cluster.
        ("unsafe-no-fsync", "true".to_owned()),
        ("socket-reuse-port", "true".to_owned()),
        ("log-level", "warn".to_owned()),
    ];
    pairs.into_iter().map(|(name, value)| format!("--{name}={value}")).collect()
}

fn apiserver(pki: &Pki, store: SocketAddr, address: Ipv4Addr, port: u16, place: &Place) -> Result<Vec<String>, Error> {
    let names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"];
    let names: Vec<&str> = names.into_iter().chain(["localhost"]).collect();
    let ips = [IpAddr::from(address), Ipv4Addr::LOCALHOST.into(), SERVICE_IP.into()];
    let (certificate, key) = pki.issue_files("apiserver", "kube-apiserver", None, &names, &ips)?;
    let (client_certificate, client_key) =
        pki.issue_files("apiserver-kubelet-client", "kube-apiserver-kubelet-client", Some(MASTERS), &[], &[])?;
    let path = |path: PathBuf| path.display().to_string();
    let (bind, reconciler) = match place {
        // Endpoints may not be on the loopback, so that nobody announces this one.
        Place::Loopback => (Ipv4Addr::LOCALHOST, "none"),
        Place::Network(..) => (Ipv4Addr::UNSPECIFIED, "lease"),
    };
    let pairs = [
        ("etcd-servers", format!("http://{store}")),
        ("bind-address", bind.to_string()),
        ("advertise-address", address.to_string()),
        ("secure-port", port.to_string()),
        ("permit-port-sharing", "true".to_owned()),
        ("endpoint-reconciler-type", reconciler.to_owned()),
        ("service-cluster-ip-range", format!("{SERVICES},{SERVICES_V6}")),
        ("authorization-mode", "Node,RBAC".to_owned()),
        ("enable-admission-plugins", "NodeRestriction".to_owned()),
        ("allow-privileged", "true".to_owned()),
        // Webhooks and APIs of pods are reached by their addresses: nothing translates ClusterIPs here.
        ("enable-aggregator-routing", "true".to_owned()),
        ("client-ca-file", path(pki.path("ca.crt"))),
        ("tls-cert-file", path(certificate)),
        ("tls-private-key-file", path(key)),
        ("kubelet-client-certificate", path(client_certificate)),
        ("kubelet-client-key", path(client_key)),
        ("kubelet-preferred-address-types", "InternalIP".to_owned()),
        ("service-account-issuer", "https://kubernetes.default.svc.cluster.local".to_owned()),
        ("service-account-key-file", path(pki.path("service-account.pub"))),
        ("service-account-signing-key-file", path(pki.path("service-account.key"))),
        ("cert-dir", path(pki.path("generated"))),
    ];
    Ok(pairs.into_iter().map(|(name, value)| format!("--{name}={value}")).collect())
}

fn healthy(network: Option<&NetNs>, at: SocketAddr) -> bool {
    let stream = match network {
        Some(network) => network.connect(at, http::BOUND),
        None => std::net::TcpStream::connect_timeout(&at, http::BOUND).during(|| "connecting to etcd".to_owned()),
    };
    let answer = stream.and_then(|stream| http::exchange(stream, "GET", &at.to_string(), "/health"));
    answer.is_ok_and(|answer| answer.status == 200)
}

/// A port of the machine's loopback.
#[derive(Debug)]
struct Port {
    number: u16,
    _held: std::os::fd::OwnedFd,
}

impl Port {
    fn reserve() -> Result<Self, Error> {
        let what = || "reserving a port".to_owned();
        let held = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).during(what)?;
        setsockopt(&held, sockopt::ReusePort, &true).during(what)?;
        let raw = std::os::fd::AsRawFd::as_raw_fd(&held);
        bind(raw, &SockaddrIn::new(127, 0, 0, 1, 0)).during(what)?;
        let number = getsockname::<SockaddrIn>(raw).during(what)?.port();
        Ok(Self { number, _held: held })
    }
}
