//! HBONE from peers: mutual TLS as the pod, then for each CONNECT a decision by [`admit`](super::admit), a connection to the
//! pod's application with the client's address, and only then the answer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mesh_hbone::copy::splice;
use mesh_hbone::headers::FORWARDED;
use mesh_hbone::server::Request;
use mesh_hbone::{Headers, server};
use mesh_identity::handshake;
use mesh_model::{Service, Snapshot, SpiffeId, Workload};
use mesh_runtime::drain::Watcher;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};

use super::admit::{Admission, Connect, Connection, Denial, admit};
use super::dial::{self, Unanswered};
use super::error::ConnectionError;
use super::forwarded;
use super::guard;
use super::open::PodStream;
use super::pods::Pod;
use super::record::{Direction, Facts, Record};
use super::sources::Source;
use super::tunnels::{Negotiated, TunnelFacts};
use super::worker::{Accepted, Permits, Worker};

/// Longest that a peer may take to begin the TLS handshake.
const FIRST_BYTES: Duration = Duration::from_secs(2);

/// One tunnel that a peer has opened to a pod.
struct Tunnel {
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    peer: SpiffeId,
    connection: Connection,
    facts: Arc<TunnelFacts>,
    drain: Watcher,
}

/// Serves one tunnel until it ends, the pod is gone, or the proxy has drained.
pub async fn serve(worker: Arc<Worker>, pod: Arc<Pod>, accepted: Accepted, permits: Permits, drain: Watcher) {
    let _token = pod.live.token();
    let serving = async {
        let Accepted { stream, peer, local } = accepted;
        // What counts it is held until it ends.
        let Permits { waiting, handshakes, tunnel, mut source } = permits;
        let accepted = match (&tunnel, &source) {
            (Some(_), Some(source)) => {
                let limits = (waiting, source, handshakes);
                authenticate(&worker, &pod, stream, peer, limits).await
            }
            (_, None) => Err(ConnectionError::TooManyFromPeer),
            (None, Some(_)) => Err(ConnectionError::TooManyTunnels),
        };
        source.iter_mut().for_each(Source::established);
        let (tls, identity) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                let mut facts = Facts::new(Direction::Inbound, peer, local);
                facts.dst.workload = worker.shared.local(&pod).workload(&worker.shared.state.snapshot()).cloned();
                return Record::refused(&worker.shared.metrics, &facts, &error);
            }
        };
        let facts = Arc::clone(tls.get_ref().0.facts());
        let told = Arc::clone(&facts);
        let tunnel = Arc::new(Tunnel {
            worker: Arc::clone(&worker),
            pod: Arc::clone(&pod),
            peer: identity,
            connection: Connection { local, peer },
            facts,
            drain: drain.clone(),
        });
        let options = mesh_hbone::Options { backlog: Arc::clone(&told.backlog), ..worker.shared.hbone.clone() };
        let turn = worker.turns.of(&pod.uid);
        let handler = move |request| turn.run(Arc::clone(&tunnel).connect(request));
        tokio::select! {
            served = server::serve(tls, &options, drain.draining(), handler) => {
                if let Err(error) = served {
                    tracing::debug!(%error, %peer, "tunnel ended");
                }
            }
            () = told.told_to_close() => {}
        }
    };
    tokio::select! {
        () = serving => {}
        () = pod.live.closed() => {}
        () = drain.forced() => {}
    }
}

async fn authenticate(
    worker: &Worker,
    pod: &Pod,
    stream: PodStream,
    peer: SocketAddr,
    (waiting, source, handshakes): (Option<OwnedSemaphorePermit>, &Source, Arc<Semaphore>),
) -> Result<(tokio_rustls::server::TlsStream<super::tunnels::Metered>, SpiffeId), ConnectionError> {
    // A handshake is not begun for somebody who says nothing: handshakes are few, and all peers of the pod share them.
    match timeout(FIRST_BYTES, stream.peek(&mut [0])).await {
        // What has failed meanwhile fails again when it is read.
        Ok(_) => {}
        Err(_) => return Err(ConnectionError::Silent),
    }
    // The peer's own share first, so that nobody waits with one of those that all share. Neither is ever closed; without a
    // permit nothing would be bounded.
    let deadline = Instant::now() + handshake::TIMEOUT;
    let own = timeout_at(deadline, source.handshake()).await.map_err(|_| ConnectionError::TooManyFromPeer)?;
    let _own = own.ok_or(ConnectionError::Dropped)?;
    let shared = timeout_at(deadline, handshakes.acquire_owned()).await;
    let _shared = shared.map_err(|_| ConnectionError::TooManyHandshakes)?.map_err(|_| ConnectionError::Dropped)?;
    drop(waiting);
    let shared = &worker.shared;
    let credential = shared.certificates.certificate(&pod.identity).await?;
    let backlog = shared.hbone_of(pod).backlog;
    let io = shared.tunnels.list(Direction::Inbound, pod, peer, stream, &backlog);
    let (tls, identity) = handshake::accept(io, &credential).await?;
    let (io, connection) = tls.get_ref();
    // Set once, here.
    let _ = io.facts().negotiated.set(Negotiated::of(identity.clone(), connection));
    Ok((tls, identity))
}

impl Tunnel {
    /// Serves one CONNECT, from its arrival to its record.
    async fn connect(self: Arc<Self>, mut request: Request) {
        let _drain = self.drain.clone();
        let _counted = Counted::new(&self.facts);
        let shared = &self.worker.shared;
        let mut facts = Facts::new(Direction::Inbound, self.connection.peer, self.connection.local);
        facts.counters = self.pod.counters();
        facts.mtls = true;
        facts.hbone_addr = Some(request.authority.clone());
        facts.src.identity = Some(self.peer.clone());
        facts.dst.identity = Some(self.pod.identity.clone());
        // Without an answer the pod stays unknown, and nothing is let in.
        let local = shared.local(&self.pod);
        let looked_up = tokio::select! {
            biased;
            _ = shared.lookup.inbound(&shared.state, &local, &self.pod.lookups) => Ok(()),
            given_up = request.given_up() => Err(ConnectionError::from(given_up)),
        };
        if let Err(error) = looked_up {
            request.refuse(error.reply());
            return Record::refused(&shared.metrics, &facts, &error);
        }
        let rules = shared.state.rules_version();
        let admission = match self.decide(&mut facts, &request) {
            Ok(admission) => admission,
            Err(error) => {
                request.refuse(error.reply());
                return Record::refused(&shared.metrics, &facts, &error);
            }
        };
        let record = match Record::open(&shared.metrics, &self.pod.live, facts) {
            Ok(record) => record,
            Err(error) => return request.refuse(error.reply()),
        };
        guard::catch_up(shared, &self.pod, &record, rules);
        let result = self.carry(&admission, request, &record).await;
        record.finish(result);
    }

    fn decide(&self, facts: &mut Facts, request: &Request) -> Result<Admission, ConnectionError> {
        let shared = &self.worker.shared;
        let snapshot = shared.state.snapshot();
        let connect = Connect { authority: &request.authority };
        let decided = admit(&snapshot, &shared.local(&self.pod), &self.peer, self.connection, &connect);
        note(facts, &snapshot, request.headers.get(FORWARDED).and_then(forwarded::host), decided)
    }

    /// Connects to the application, answers, and copies until both directions have ended.
    async fn carry(&self, admission: &Admission, mut request: Request, record: &Record) -> Result<(), ConnectionError> {
        let delivered = tokio::select! {
            biased;
            reason = record.told_to_close() => Err(reason.into()),
            // Boxed: what is needed only until the application has accepted must not be kept by the open connection.
            delivered = Box::pin(dial::deliver(&self.pod, admission.source_ip, admission.target.0)) => delivered,
            given_up = request.given_up() => Err(given_up.into()),
        };
        let app = match delivered {
            Ok(app) => Unanswered::new(app),
            Err(error) => {
                request.refuse(error.reply());
                return Err(error);
            }
        };
        let stream = request.accept(&Headers::new()).map_err(ConnectionError::GaveUp)?;
        tokio::select! {
            biased;
            reason = record.told_to_close() => Err(reason.into()),
            copied = splice(stream, app.answered()?, &record.facts.counters) => Ok(copied?),
        }
    }
}

/// Counts a stream of a tunnel.
struct Counted(Arc<TunnelFacts>);

impl Counted {
    fn new(facts: &Arc<TunnelFacts>) -> Self {
        facts.streams.fetch_add(1, Ordering::Relaxed);
        facts.served.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(facts))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Puts what was decided about an inbound connection into its record; `host` is the service that the client says it means.
///
/// # Errors
/// The denial.
pub fn note(
    facts: &mut Facts,
    snapshot: &Snapshot,
    host: Option<&str>,
    decided: Result<Admission, Denial>,
) -> Result<Admission, ConnectionError> {
    match decided {
        Ok(admission) => {
            facts.service = service_of(snapshot, &admission.destination, admission.target.0.port(), host);
            facts.src.workload.clone_from(&admission.source);
            facts.dst.workload = Some(Arc::clone(&admission.destination));
            facts.policy.clone_from(&admission.allowed.policy);
            Ok(admission)
        }
        Err(denial) => {
            facts.src.workload.clone_from(&denial.source);
            facts.dst.workload.clone_from(&denial.destination);
            facts.policy = denial.policy().cloned();
            Err(denial.into())
        }
    }
}

/// The service that a connection to `port` of `workload` was probably meant for: the one that the client says, if the
/// workload is in it, else the first that has the port. For the record only.
fn service_of(snapshot: &Snapshot, workload: &Workload, port: u16, host: Option<&str>) -> Option<Arc<Service>> {
    let services = || workload.services.iter().filter_map(|member| snapshot.service_by_name(&member.service));
    let named = host.and_then(|host| services().find(|service| *service.hostname == *host));
    let serves = |service: &Service| {
        service.ports.iter().any(|known| workload.target_port(service, known.service_port) == Some(port))
    };
    named.or_else(|| services().find(|service| serves(service))).cloned()
}
