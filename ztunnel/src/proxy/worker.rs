//! The threads that carry connections. Each has a runtime of its own and accepts on its own duplicate of every pod's
//! listening sockets; a connection never leaves the thread that accepted it, nor does a pooled tunnel.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use mesh_hbone::Backlog;
use mesh_hbone::pool::{IDLE_TIMEOUT, Pool};
use mesh_identity::Store;
use mesh_model::SpiffeId;
use mesh_runtime::drain::Watcher;
use socket2::SockRef;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

use super::dns::{self, Dns};
use super::error::ConnectionError;
use super::local::{Listed, LocalAddresses, LocalPod};
use super::lookup::Lookup;
use super::metrics::Metrics;
use super::open::{Came, PodStream};
use super::pods::{Host, Pod, Port};
use super::record::{Direction, Facts, Record};
use super::sockets::tune;
use super::sources::{Source, Sources};
use super::state::State;
use super::tunnels::Tunnels;
use super::turns::Turns;
use super::{inbound, outbound, plaintext};

/// TLS handshakes that one thread runs at a time for one pod.
const HANDSHAKES: usize = 128;

/// Connections of one pod that wait for their first bytes, or for others' handshakes, in one thread; more wait in the
/// kernel's accept queue.
const WAITING: usize = 1024;

/// Tunnels that one thread serves at a time for one pod.
const TUNNELS: usize = 4096;

/// Longest that the last bytes in tunnels may take when the proxy ends.
const FLUSH: Duration = Duration::from_secs(1);

/// Time between two looks whether they are gone.
const FLUSH_STEP: Duration = Duration::from_millis(5);

/// Pause after a failed accept, which is a shortage of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections that are accepted in one go; then others have their turn.
const ACCEPTED_IN_A_ROW: usize = 16;

/// What all threads share.
pub struct Shared {
    /// What discovery has brought.
    pub state: Arc<State>,
    /// What asks discovery for more.
    pub lookup: Lookup,
    /// Certificates of the pods.
    pub certificates: Store,
    /// All metrics.
    pub metrics: Metrics,
    /// The tunnels that are open.
    pub tunnels: Tunnels,
    /// The addresses of the pods that are served.
    pub addresses: Arc<LocalAddresses>,
    /// Limits and times of tunnels.
    pub hbone: mesh_hbone::Options,
    /// What answers the pods' queries for names.
    pub dns: Dns,
    /// Network of this node.
    pub network: String,
    /// Name of this node.
    pub node: String,
    /// Cluster of this node.
    pub cluster_id: String,
}

impl Shared {
    /// The options of one tunnel of a pod, which pays for what the tunnel holds.
    pub fn hbone_of(&self, pod: &Pod) -> mesh_hbone::Options {
        mesh_hbone::Options { backlog: Backlog::of(pod.memory.clone()), ..self.hbone.clone() }
    }

    /// A pod as the decisions know it.
    pub fn local<'a>(&'a self, pod: &'a Pod) -> LocalPod<'a> {
        LocalPod {
            name: &pod.name,
            namespace: &pod.namespace,
            identity: &pod.identity,
            addresses: &pod.addresses,
            network: &self.network,
            node: &self.node,
            cluster_id: &self.cluster_id,
        }
    }
}

/// What connections may share a tunnel: those of one source to one destination.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    /// Who opens it.
    pub source: SpiffeId,
    /// From where.
    pub source_ip: IpAddr,
    /// To where.
    pub next_hop: SocketAddr,
    /// Who may be there.
    pub expected: Vec<SpiffeId>,
}

/// One thread's own things.
pub struct Worker {
    /// What it shares with the others.
    pub shared: Arc<Shared>,
    /// Its tunnels.
    pub pool: outbound::TunnelPool,
    /// Whose tasks run when.
    pub turns: Turns,
    /// Peers that refused a tunnel's certificate after the handshake.
    pub refusals: outbound::Refusals,
}

impl Worker {
    /// A worker without tunnels.
    pub fn new(shared: Arc<Shared>) -> Arc<Self> {
        Arc::new(Self {
            shared,
            pool: Pool::new(IDLE_TIMEOUT),
            turns: Turns::default(),
            refusals: outbound::Refusals::default(),
        })
    }
}

/// A listening socket to serve.
struct Serve {
    pod: Arc<Pod>,
    port: Port,
    listener: OwnedFd,
}

/// All threads.
pub struct Workers {
    serve: Vec<mpsc::UnboundedSender<Serve>>,
    stop: watch::Sender<bool>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Whose turn it is to serve a socket that only one thread serves.
    turn: AtomicUsize,
    shared: Arc<Shared>,
}

impl Workers {
    /// Starts `count` threads, which end after [`Workers::stop`].
    ///
    /// # Errors
    /// When a thread or its runtime cannot be made.
    pub fn start(count: usize, shared: &Arc<Shared>, drain: &Watcher) -> io::Result<Arc<Self>> {
        let stop = watch::Sender::new(false);
        let (mut serve, mut threads) = (Vec::new(), Vec::new());
        for index in 0..count {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let (sender, receiver) = mpsc::unbounded_channel();
            let worker = Worker::new(Arc::clone(shared));
            let main = run(worker, receiver, drain.clone(), stop.subscribe());
            let thread = std::thread::Builder::new().name(format!("worker-{index}"));
            threads.push(thread.spawn(move || runtime.block_on(main))?);
            serve.push(sender);
        }
        Ok(Arc::new(Self {
            serve,
            stop,
            threads: Mutex::new(threads),
            turn: AtomicUsize::new(0),
            shared: Arc::clone(shared),
        }))
    }

    /// Ends all threads, and what they still carry.
    pub fn stop(&self) {
        self.stop.send_replace(true);
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a worker thread had panicked");
            }
        }
    }
}

impl Host for Arc<Workers> {
    fn start(&self, pod: &Arc<Pod>, listeners: Vec<(Port, OwnedFd)>) -> io::Result<Box<dyn Send>> {
        self.extend(pod, listeners)?;
        self.shared.metrics.pods_active.inc();
        self.shared.metrics.pods_started.inc();
        let certificate = self.shared.certificates.retain(&pod.identity);
        let addresses = self.shared.addresses.list(&pod.addresses);
        Ok(Box::new(Served { metrics: self.shared.metrics.clone(), _certificate: certificate, _addresses: addresses }))
    }

    fn extend(&self, pod: &Arc<Pod>, listeners: Vec<(Port, OwnedFd)>) -> io::Result<()> {
        let mut all = Vec::new();
        for (port, listener) in listeners {
            if port == Port::DnsUdp {
                // Datagrams need no second thread, and every one that waits for them is woken by each.
                dns::udp::prepare(&listener)?;
                let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.serve.len().max(1);
                if let Some(worker) = self.serve.get(turn) {
                    // A worker that is gone: the proxy is ending.
                    let _ = worker.send(Serve { pod: Arc::clone(pod), port, listener });
                }
                continue;
            }
            let known = SockRef::from(&listener);
            known.set_nonblocking(true)?;
            tune(&known)?;
            for _ in 1..self.serve.len() {
                all.push((port, listener.try_clone()?));
            }
            all.push((port, listener));
        }
        // One duplicate of each listener for each worker, in turn.
        for ((port, listener), worker) in all.into_iter().zip(self.serve.iter().cycle()) {
            // A worker that is gone: the proxy is ending.
            let _ = worker.send(Serve { pod: Arc::clone(pod), port, listener });
        }
        Ok(())
    }
}

/// Kept while a pod is served: its certificate stays fresh, and its addresses are known.
struct Served {
    metrics: Metrics,
    _certificate: mesh_identity::Retained,
    _addresses: Listed,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.metrics.pods_active.dec();
        self.metrics.pods_stopped.inc();
    }
}

async fn run(
    worker: Arc<Worker>,
    mut serve: mpsc::UnboundedReceiver<Serve>,
    drain: Watcher,
    mut stop: watch::Receiver<bool>,
) {
    loop {
        let next = tokio::select! {
            biased;
            () = drain.draining() => break,
            next = serve.recv() => next,
        };
        let Some(Serve { pod, port, listener }) = next else { break };
        if port == Port::DnsUdp {
            let turn = worker.turns.of(&pod.uid);
            tokio::spawn(turn.run(dns::udp::serve(Arc::clone(&worker), pod, listener, drain.clone())));
            continue;
        }
        match TcpListener::from_std(std::net::TcpListener::from(listener)) {
            Ok(listener) => {
                let turn = worker.turns.of(&pod.uid);
                tokio::spawn(turn.run(accept(Arc::clone(&worker), pod, port, listener, drain.clone())));
            }
            Err(error) => tracing::error!(%error, ?pod, ?port, "cannot serve a listening socket"),
        }
    }
    drop(drain);
    // Listening sockets of pods that come now are not held: nobody here would accept, and a removal could not close them.
    drop(serve);
    // What was begun goes on until the owner says stop.
    let _ = stop.wait_for(|stop| *stop).await;
    // The last bytes of connections that have ended may still wait in their tunnels, which end once nobody has them.
    worker.pool.retain(|_| false);
    let tunnels = &worker.shared.tunnels;
    let flushed = async {
        while tunnels.all().iter().any(|tunnel| tunnel.direction == Direction::Outbound) {
            tokio::time::sleep(FLUSH_STEP).await;
        }
    };
    // A peer that reads nothing more is not waited for.
    let _ = tokio::time::timeout(FLUSH, flushed).await;
}

/// Accepts what comes to one listening socket until the pod is gone or the proxy drains.
pub async fn accept(worker: Arc<Worker>, pod: Arc<Pod>, port: Port, listener: TcpListener, drain: Watcher) {
    let _token = pod.live.token();
    let gate = pod.open.gate();
    let sources = Sources::default();
    let [waiting, handshakes, tunnels] = [WAITING, HANDSHAKES, TUNNELS].map(|limit| Arc::new(Semaphore::new(limit)));
    let ended = async {
        tokio::select! {
            () = pod.live.closed() => {}
            () = drain.draining() => {}
        }
    };
    tokio::pin!(ended);
    // What comes before discovery has told all waits in the kernel's queue: it cannot be decided yet.
    tokio::select! {
        biased;
        () = &mut ended => return,
        () = worker.shared.state.complete() => {}
    }
    let mut in_a_row = 0;
    loop {
        if in_a_row == ACCEPTED_IN_A_ROW {
            in_a_row = 0;
            tokio::task::yield_now().await;
        }
        in_a_row += 1;
        let next = async {
            // The permit first: a connection over the limit stays in the kernel's queue.
            let permit = match port {
                Port::Hbone => Arc::clone(&waiting).acquire_owned().await.ok(),
                Port::Outbound | Port::Plaintext | Port::DnsUdp | Port::DnsTcp => None,
            };
            (permit, gate.accept(&listener).await)
        };
        let (permit, accepted) = tokio::select! {
            biased;
            () = &mut ended => return,
            next = next => next,
        };
        let (stream, peer) = match accepted {
            Ok(Came::In(stream, peer)) => (stream, peer),
            Ok(Came::TooMany { peer, local }) => {
                refuse(&worker.shared, &pod, port, canonical(peer), canonical(local));
                continue;
            }
            Err(error) => {
                tracing::warn!(%error, ?pod, ?port, "accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let permits = Permits {
            waiting: permit,
            handshakes: Arc::clone(&handshakes),
            source: sources.enter(peer.ip().to_canonical()),
            tunnel: Arc::clone(&tunnels).try_acquire_owned().ok(),
        };
        let (worker, pod, drain) = (Arc::clone(&worker), Arc::clone(&pod), drain.clone());
        let accepted = match Accepted::new(stream, peer) {
            Ok(accepted) => accepted,
            // It has ended already.
            Err(error) => {
                tracing::debug!(%error, ?pod, ?port, "an accepted connection has no address");
                continue;
            }
        };
        spawn(worker, pod, port, accepted, permits, drain);
    }
}

/// Reports a connection that was reset for want of descriptors.
fn refuse(shared: &Shared, pod: &Pod, port: Port, peer: SocketAddr, local: SocketAddr) {
    let workload = shared.local(pod).workload(&shared.state.snapshot()).cloned();
    let facts = match port {
        Port::Outbound | Port::DnsTcp | Port::DnsUdp => {
            let mut facts = Facts::new(Direction::Outbound, peer, local);
            (facts.src.workload, facts.src.identity) = (workload, Some(pod.identity.clone()));
            facts
        }
        Port::Plaintext | Port::Hbone => {
            let mut facts = Facts::new(Direction::Inbound, peer, local);
            facts.dst.workload = workload;
            facts
        }
    };
    Record::refused(&shared.metrics, &facts, &ConnectionError::TooManySockets);
}

/// A connection that was accepted.
pub struct Accepted {
    /// The connection.
    pub stream: PodStream,
    /// Its far end.
    pub peer: SocketAddr,
    /// Its near end: what the far end connected to.
    pub local: SocketAddr,
}

impl Accepted {
    /// Listening sockets take both families; what came as IPv4 is IPv4 from here on.
    ///
    /// # Errors
    /// When the socket does not tell its address any more.
    pub fn new(stream: PodStream, peer: SocketAddr) -> io::Result<Self> {
        let local = canonical(stream.local_addr()?);
        Ok(Self { stream, peer: canonical(peer), local })
    }
}

/// An IPv4-mapped IPv6 address as the IPv4 address that it means.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// What counts a tunnel.
pub struct Permits {
    /// To be dropped when the handshake begins.
    pub waiting: Option<OwnedSemaphorePermit>,
    /// To be taken for the handshake.
    pub handshakes: Arc<Semaphore>,
    /// None: the peer's address has too many.
    pub source: Option<Source>,
    /// None: the pod has too many.
    pub tunnel: Option<OwnedSemaphorePermit>,
}

fn spawn(worker: Arc<Worker>, pod: Arc<Pod>, port: Port, accepted: Accepted, permits: Permits, drain: Watcher) {
    let turn = worker.turns.of(&pod.uid);
    match port {
        Port::Outbound => tokio::spawn(turn.run(async move {
            let _token = drain;
            outbound::serve(&worker, &pod, accepted).await;
        })),
        // Streams do not come to the socket of datagrams.
        Port::DnsTcp | Port::DnsUdp => tokio::spawn(turn.run(async move {
            let _token = drain;
            dns::tcp::serve(&worker, &pod, accepted).await;
        })),
        Port::Plaintext => tokio::spawn(turn.run(async move {
            let _token = drain;
            plaintext::serve(&worker, &pod, accepted).await;
        })),
        Port::Hbone => tokio::spawn(turn.run(inbound::serve(worker, pod, accepted, permits, drain))),
    };
}
