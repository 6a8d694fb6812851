//! Two nodes in one process, for tests: pods are loopback addresses, sockets in their namespaces are ordinary ones, and
//! certificates come from an authority of the test's own.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use mesh_hbone::Memory;
use mesh_hbone::memory::Limits;
use mesh_identity::{Authority, CsrPublicKey, IssueError, IssuedCertificate, Issuer, Store};
use mesh_model::SpiffeId;
use mesh_proto::workload::{self as wire, address};
use mesh_runtime::drain::{self, Trigger, Watcher};
use mesh_runtime::metrics::Registry;
use mesh_xds::client::Sink;
use mesh_xds::{Resource, Update, WORKLOAD_TYPE};
use prost::Message;
use tokio::net::TcpListener;

use super::descriptors::Descriptors;
use super::dial::DeliveryPorts;
use super::dns::{Dns, DnsMetrics, PodBounds};
use super::live::Live;
use super::local::fixture;
use super::lookup::{Bound, Lookup};
use super::metrics::Metrics;
use super::open::OpenSockets;
use super::pods::{Bounds, Pod, Port};
use super::sockets::{Family, NodeCap, SocketKind, SocketSource, TakeError, prepare};
use super::state::{Discovery, State};
use super::tunnels::Tunnels;
use super::worker::{Shared, Worker, accept};

/// Where queries of tests are sent to, and where resolvers of tests listen: any user may bind these.
pub const DNS_TEST_PORT: u16 = 15353;
pub const DNS_TEST_UPSTREAM_PORT: u16 = 15354;

/// Longest that a test waits for anything.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Bounds what a test waits for.
pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("it did not happen in time")
}

/// Waits until something is so.
pub async fn until(mut so: impl FnMut() -> bool) {
    let wait = async {
        while !so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon(wait).await;
}

/// Ordinary sockets of the test's own namespace; none when told so.
#[derive(Default)]
pub struct LocalSockets {
    /// Whether there is nothing to give.
    pub empty: bool,
    /// Whether nobody answers.
    pub stuck: bool,
    /// What answers to queries are sent from.
    pub reply: Option<OwnedFd>,
}

impl SocketSource for LocalSockets {
    fn take(&self, kind: SocketKind) -> BoxFuture<'_, Result<OwnedFd, TakeError>> {
        let Self { empty, stuck, .. } = *self;
        Box::pin(async move {
            if stuck {
                std::future::pending::<()>().await;
            }
            if empty {
                return Err(TakeError::Empty);
            }
            let domain = match kind.family() {
                Family::V4 => socket2::Domain::IPV4,
                Family::V6 => socket2::Domain::IPV6,
            };
            let r#type = match kind {
                SocketKind::Upstream(_) | SocketKind::Delivery(_) => socket2::Type::STREAM,
                SocketKind::DnsUpstream(_) => socket2::Type::DGRAM,
            };
            let socket = socket2::Socket::new(domain, r#type, None).unwrap().into();
            prepare(kind, &socket).unwrap();
            Ok(socket)
        })
    }

    fn reply(&self, _: IpAddr) -> BoxFuture<'_, Result<Arc<OwnedFd>, TakeError>> {
        let reply = self.reply.as_ref().map(|socket| Arc::new(socket.try_clone().unwrap()));
        Box::pin(async move { reply.ok_or(TakeError::Empty) })
    }
}

struct Signer {
    authority: Authority,
    refused: Mutex<Vec<SpiffeId>>,
}

impl Issuer for Signer {
    fn issue<'a>(&'a self, id: &'a SpiffeId, csr: String) -> BoxFuture<'a, Result<IssuedCertificate, IssueError>> {
        Box::pin(async move {
            if self.refused.lock().unwrap().contains(id) {
                return Err(IssueError::Refused { reason: "not a pod of this node".into() });
            }
            let key = CsrPublicKey::from_pem(&csr).unwrap();
            Ok(self.authority.sign(&key, id, Duration::ZERO, SystemTime::now()).unwrap())
        })
    }
}

/// A mesh of loopback addresses that no other test uses.
pub struct Mesh {
    net: [u8; 3],
    signer: Arc<Signer>,
    drains: Mutex<Vec<Trigger>>,
    /// How much each proxy may hold for receivers.
    pub limits: Limits,
}

/// A proxy of the mesh, on the test's own runtime.
pub struct Proxy {
    pub shared: Arc<Shared>,
    pub worker: Arc<Worker>,
    pub registry: Registry,
    pub discovery: Mutex<Discovery>,
    pub drain: Watcher,
    pub memory: Memory,
}

impl Mesh {
    pub fn new() -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        // Another run of the same tests may be under way on this machine.
        let second = u8::try_from(std::process::id() % 200).unwrap() + 20;
        let authority = Authority::generate("cluster.local", SystemTime::now()).unwrap();
        Self {
            net: [127, second, NEXT.fetch_add(1, Ordering::Relaxed)],
            signer: Arc::new(Signer { authority, refused: Mutex::default() }),
            drains: Mutex::default(),
            limits: Limits::of(512 << 20),
        }
    }

    /// Makes the authority refuse certificates for the pod of this name.
    pub fn refuse(&self, name: &str) {
        self.signer.refused.lock().unwrap().push(fixture::id("shop", name));
    }

    pub fn ip(&self, last: u8) -> IpAddr {
        let [a, b, c] = self.net;
        Ipv4Addr::new(a, b, c, last).into()
    }

    pub fn addr(&self, last: u8, port: u16) -> SocketAddr {
        (self.ip(last), port).into()
    }

    /// A proxy that knows nothing yet.
    pub fn proxy(&self) -> Proxy {
        let registry = Registry::new();
        let state = State::new();
        let shared = Arc::new(Shared {
            state: Arc::clone(&state),
            lookup: Lookup::unneeded(),
            certificates: Store::new(
                Arc::clone(&self.signer) as Arc<dyn Issuer>,
                mesh_identity::Options { first_wait: Duration::from_secs(2), ..mesh_identity::Options::default() },
            ),
            metrics: Metrics::register(&registry),
            tunnels: Tunnels::default(),
            addresses: Arc::default(),
            hbone: mesh_hbone::Options::default(),
            dns: Dns {
                port: DNS_TEST_PORT,
                upstream_port: DNS_TEST_UPSTREAM_PORT,
                ..Dns::new("cluster.local", DnsMetrics::register(&registry))
            },
            network: String::new(),
            node: "node".into(),
            cluster_id: "Kubernetes".into(),
        });
        let (trigger, drain) = drain::channel();
        self.drains.lock().unwrap().push(trigger);
        let discovery = Mutex::new(state.sink("node"));
        let memory = Memory::new(self.limits);
        Proxy { worker: Worker::new(Arc::clone(&shared)), shared, registry, discovery, drain, memory }
    }

    /// What drains the proxy that was made first.
    pub fn trigger(&self) -> Trigger {
        self.drains.lock().unwrap().remove(0)
    }

    /// What discovery says of the pod of this name at the address that ends in `last`.
    pub fn workload(&self, name: &str, last: u8) -> wire::Workload {
        wire::Workload { node: "node".into(), ..fixture::pod(name, &[&self.ip(last).to_string()]) }
    }

    /// The service of this name at the address that ends in `last`.
    pub fn service(&self, name: &str, last: u8, ports: &[(u32, u32)]) -> wire::Service {
        fixture::service(name, &self.ip(last).to_string(), ports)
    }
}

/// No sockets, in a process that may have any number of them.
pub fn open_sockets() -> Arc<OpenSockets> {
    OpenSockets::new(Descriptors::new(1_000_000))
}

/// Bounds of pods that may have so many connections, and as many sockets in stock.
pub fn bounds(connections: usize, stock: usize) -> Bounds {
    Bounds { connections, stock: NodeCap::new(stock), descriptors: Descriptors::new(1_000_000) }
}

/// A resource as discovery sends it.
pub fn resource(name: &str, body: &impl Message) -> Resource {
    Resource { name: name.into(), aliases: Vec::new(), version: "1".into(), body: body.encode_to_vec().into() }
}

impl Proxy {
    /// Tells the proxy of workloads and services.
    pub fn learn(&self, workloads: &[wire::Workload], services: &[wire::Service]) {
        let of = |name: String, one: address::Type| resource(&name, &wire::Address { r#type: Some(one) });
        let workloads = workloads.iter().map(|one| of(one.uid.clone(), address::Type::Workload(one.clone())));
        let services = services
            .iter()
            .map(|one| of(format!("{}/{}", one.namespace, one.hostname), address::Type::Service(one.clone())));
        self.update(WORKLOAD_TYPE, workloads.chain(services).collect());
    }

    /// Gives the proxy a response of discovery, all of which must be accepted.
    pub fn update(&self, type_url: &str, set: Vec<Resource>) {
        let update = Update { type_url: type_url.into(), set, removed: Vec::new() };
        assert_eq!(self.discovery.lock().unwrap().apply(update), []);
        self.shared.state.set_complete();
    }

    /// A pod of this proxy's node.
    pub fn pod(&self, name: &str, ip: IpAddr) -> Arc<Pod> {
        self.pod_with(name, ip, LocalSockets::default(), 100_000)
    }

    /// The same, with other sockets and another limit of connections.
    pub fn pod_with(&self, name: &str, ip: IpAddr, sockets: LocalSockets, max: usize) -> Arc<Pod> {
        Arc::new(Pod {
            uid: name.into(),
            name: name.into(),
            namespace: "shop".into(),
            identity: fixture::id("shop", name),
            addresses: vec![ip],
            sockets: Arc::new(sockets),
            live: Live::new(max),
            open: open_sockets(),
            delivery_ports: DeliveryPorts::default(),
            dns: PodBounds::default(),
            lookups: Bound::default(),
            memory: self.memory.share(),
        })
    }

    /// Accepts on `at` as that port of the pod.
    pub async fn serve(&self, pod: &Arc<Pod>, port: Port, at: SocketAddr) {
        let listener = TcpListener::bind(at).await.unwrap();
        tokio::spawn(accept(Arc::clone(&self.worker), Arc::clone(pod), port, listener, self.drain.clone()));
    }

    /// The value of the metric whose line begins with `name` and holds all of `labels`.
    pub fn metric(&self, name: &str, labels: &[&str]) -> u64 {
        let text = self.registry.encode().unwrap();
        let lines =
            text.lines().filter(|line| line.starts_with(name) && labels.iter().all(|label| line.contains(label)));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64).sum()
    }
}
